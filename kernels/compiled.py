"""What a GPU executes, counted without one, for `python -m kernels.benchmark --compiled`.

A launch is compiled as it would be on a GPU of some compute capability, and its machine code is walked along.
A loop counts as often as the sizes say. The slow path of an exact division, which is a call, is left out. All
else that a branch forward could skip is counted.
"""
import re
import subprocess
import tempfile
from contextlib import contextmanager
from math import nan, prod
from pathlib import Path
from unittest import mock

import torch

from kernels import common, reference
from kernels.common import ceil_div

SCHEDULERS = 528   # of an H200: each issues at most one instruction per cycle
CLOCK = 1.9e9
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
         torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}

# Trips of each loop of a kernel, in the order of the code, given the kernel's arguments by name.
TRIPS = {
    "argmax_kernel": lambda v: [ceil_div(v["share"], v["ROWS"] * v["LANES"])],
    "finish_kernel": lambda v: [ceil_div(v["keypoints"], v["BLOCK_K"])],
    "rectify_kernel": lambda v: [ceil_div(v["cells"], v["ROWS"] * v["LANES"]),
                                 ceil_div(v["cells"], v["LANES"])],
    "forward_kernel": lambda v: [ceil_div(v["share"], v["ROWS"] * v["VECTORS"] * v["VECTOR"])],
    "distance_kernel": lambda v: [ceil_div(v["A"], v["COLUMNS"])]}


@contextmanager
def no_launches(instead=lambda launch, *pointers: (*pointers, *launch.fixed)):
    """Operators on CPU tensors prepare launches as for a GPU and call this instead: results are arbitrary."""
    with (mock.patch.object(common, "INTERPRET", True),
          mock.patch.object(common.Launch, "__call__", instead),
          mock.patch.object(reference, "check_indices", lambda triplets, keypoints: None)):
        yield


def launches_of(call):
    """(launch, its pointers) of everything that a call launches."""
    found = []
    with no_launches(lambda launch, *pointers: found.append((launch, pointers))):
        call()
    return found


def missing(capability):
    """Why kernels cannot be compiled and read here for that compute capability (90: sm_90), or None."""
    if not common.HAVE_TRITON:
        return "Triton is not installed"
    for tool in ("ptxas_blackwell" if capability >= 100 else "ptxas", "cuobjdump"):
        try:
            getattr(common.triton.knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            return f"this Triton has no {tool}: {error}"
    return None


def compile_launch(launch, pointers, capability):
    """The launch's kernel, compiled as the launch would: sizes of 1 are constants, multiples of 16 marked."""
    names = launch.kernel.arg_names
    constants = dict(launch.constants)
    types = {}
    aligned = []
    for name, pointer in zip(names, pointers):
        if pointer is None:
            constants[name] = None
            continue
        types[name] = "*" + TYPES[pointer.dtype]
        if pointer.data_ptr() % 16 == 0:
            aligned.append(name)
    for parameter, value in zip(launch.kernel.params[len(pointers):], launch.fixed):
        if parameter.name in launch.constants:
            continue
        types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, float) or parameter.do_not_specialize:
            continue
        if value == 1:
            constants[parameter.name] = 1
        elif value % 16 == 0:
            aligned.append(parameter.name)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    marks = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = common.triton.compiler.ASTSource(launch.kernel, signature, constexprs=constants, attrs=marks)
    target = common.triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return common.triton.compile(source, target=target, options=launch.options)


def machine_code(compiled):
    """The instructions of a compiled kernel, (address, text) each, and its resources by name."""
    tool = common.triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = subprocess.check_output([tool, "-sass", cubin], text=True, stderr=subprocess.DEVNULL)
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
    code = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", listing)
    resources = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    return [(int(address, 16), text) for address, text in code], {name: int(n) for name, n in resources}


def target_of(text, name="BRA"):
    """Address that a branch or a call leads to, or None."""
    branch = re.search(rf"\b{name}\b.* (0x[0-9a-f]+)", text)
    return int(branch[1], 16) if branch else None


def is_conditional(text):
    """Whether a branch is not always taken."""
    return text.startswith("@") or "," in text   # @P0 BRA 0x80, BRA.U UP0, 0x80


def jumps(code, place, n, target):
    """Whether a warp with work takes the branch to `target` before instruction n.

    It does where the branch has no condition, where it skips the slow path of a division, which is a call,
    and where it skips what stands in for a loop without a trip.
    """
    skipped = [text for _, text in code[n:target]]
    end = next(address for address, text in code if text.startswith("EXIT"))
    slow_path = any((target_of(text, "CALL") or 0) > end for text in skipped)
    if slow_path or not is_conditional(code[n - 1][1]):
        return True
    after = None if is_conditional(skipped[-1]) else target_of(skipped[-1])
    instead = code[target:place[after]] if after else []
    return any((target_of(text) or address) < address for address, text in instead)


def executed(code, trips):
    """The instructions that a warp executes. trips: of the loops, in the order of the code."""
    place = {address: n for n, (address, _) in enumerate(code)}
    left = {}   # trips of each loop still to come, by the address of its branch backwards
    trips = list(trips)
    path = []
    n = 0
    while True:
        address, text = code[n]
        path.append(text)
        n += 1
        if text.startswith("EXIT"):   # the last; "@P0 EXIT" is for threads without work
            break
        target = place.get(target_of(text))
        if target is None:
            continue
        if target >= n:
            n = target if jumps(code, place, n, target) else n
            continue
        if address not in left:
            if not trips:
                raise ValueError("more loops than in the kernel")
            left[address] = trips.pop(0) - 1
        if left[address] > 0:
            left[address] -= 1
            n = target
    if trips:
        raise ValueError("fewer loops than in the kernel")
    return path


def count_launch(launch, pointers, capability):
    """A launch's numbers: those of its programs, of a thread's registers and spilled bytes, of accesses of 16
    bytes in the code, and what a warp executes; "total" is of all warps."""
    compiled = compile_launch(launch, pointers, capability)
    code, used = machine_code(compiled)
    name = launch.kernel.fn.__name__
    values = dict(zip(launch.kernel.arg_names[len(pointers):], launch.fixed))
    wide = [compiled.asm["ptx"].count(access) for access in ("ld.global.v4.b32", "st.global.v4.b32")]
    counts = {"kernel": name, "programs": prod(launch.grid), "warps": compiled.metadata.num_warps,
              "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"],
              "16-byte accesses": sum(wide)}
    try:
        path = executed(code, TRIPS[name](values) if name in TRIPS else [])
        counts["barriers"] = sum("BAR." in text for text in path)
        counts["instructions"] = len(path)
    except ValueError as error:   # by another version of the compiler
        counts["barriers"] = str(error)
        counts["instructions"] = nan
    counts["total"] = counts["instructions"] * counts["warps"] * counts["programs"]
    return counts
