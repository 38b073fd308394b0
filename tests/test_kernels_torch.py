"""The fused operators as part of torch: registration, compilation, vmap, autocast, 64-bit offsets."""
import sys

import pytest
import torch

import kernels
from kernels import common, reference
from test_kernels import CUDA, TRIPLETS, random_maps, random_mask, random_poses

HEATMAP_ARGMAX, SOFT_ARGMAX, TRIPLET_ANGLE = (
    sys.modules[f"kernels.{name}"] for name in ("heatmap_argmax", "soft_argmax", "triplet_angle"))
triton_only = pytest.mark.skipif(not common.HAVE_TRITON, reason="Triton is not installed")


# --- torch.library ------------------------------------------------------------------------------------------

def test_opcheck(backend):
    """Schemas, fake implementations and autograd rules of all operators pass torch's own checks."""
    operators = torch.ops.actupose
    maps = random_maps((2, 3, 7, 5)).to(backend)
    weight = maps[:, :, 0, 0].abs()
    calls = []
    channels_last = maps.half().contiguous(memory_format=torch.channels_last)
    for layout in (maps, channels_last, maps[:, :1].expand_as(maps)):
        coords, stats = operators.soft_argmax_forward(layout, 4.0)
        trained = layout.detach().requires_grad_()
        calls += [(operators.heatmap_argmax, layout), (operators.heatmap_argmax_mean, layout, weight),
                  (operators.rectify, layout, 1.5, True), (operators.soft_argmax, trained, 4.0),
                  (operators.soft_argmax_forward, layout, 4.0),
                  (operators.soft_argmax_backward, layout, torch.ones_like(coords), coords, stats, 4.0)]
    source, target, triplets = (t.to(backend) for t in (random_poses(4), random_poses(3, seed=1), TRIPLETS))
    valid = random_mask(4, 8).to(backend)
    batches = random_poses(2, 1, 4).to(backend), random_poses(3, 5).to(backend)
    calls += [(operators.triplet_angle_distance, source, target, triplets),
              (operators.triplet_angle_distance, source, target, triplets, valid, None, 2),
              (operators.triplet_angle_distance, *batches, triplets),
              (operators.similar_pairs, source, target, triplets, 0.2, valid),
              (operators.similar_pairs, source, target, triplets, 0.2, valid, None, 1, 7)]
    for operator, *arguments in calls:
        torch.library.opcheck(operator.default, tuple(arguments))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, compiler):
    """torch.compile(fullgraph=True) gives the same results and gradients, also for another batch size."""
    def decode(maps, source, target, triplets, valid):
        pairs = []
        if backend == "cuda" or common.INTERPRET:   # the reference's pairs are a loop over data
            pairs = [kernels.similar_pairs(source, target, triplets, 0.2, valid, capacity=9)]
        distance = kernels.triplet_angle_distance(source, target, triplets, valid, min_triplets=2)
        return (kernels.soft_argmax(maps, 4.0), *kernels.heatmap_argmax(maps),
                *kernels.heatmap_argmax_mean(maps), *kernels.rectify(maps, 1.5, True), distance, *pairs)

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        maps = random_maps((batch, 3, 7, 5)).to(backend).requires_grad_()
        arguments = (maps, random_poses(batch).to(backend), random_poses(3, seed=1).to(backend),
                     TRIPLETS.to(backend), torch.ones(batch, 8, dtype=torch.bool, device=backend))
        expected, found = decode(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(result[0].square().sum(), maps)[0] for result in (expected, found)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Half-precision heatmaps under autocast are decoded in float32; their gradients come back in half."""
    maps = random_maps((2, 3, 9, 8)).to(backend, dtype).requires_grad_()
    poses, triplets = random_poses(6).to(backend), TRIPLETS.to(backend)

    def results():
        coords = kernels.soft_argmax(maps, 20.0)
        return (coords, *torch.autograd.grad(coords.square().sum(), maps), *kernels.heatmap_argmax_mean(maps),
                kernels.triplet_angle_distance(poses, poses.to(dtype), triplets))

    plain = results()
    with torch.autocast(torch.device(backend).type, dtype=dtype):
        under = results()
    assert [tensor.dtype for tensor in under] == [torch.float32, dtype] + [torch.float32] * 4
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


def test_derivatives_are_right_or_refused(backend):
    """torch.func's grad, vjp and a second derivative are the reference's; so is jvp, or it is an error."""
    maps, direction = random_maps((1, 2, 4, 4)).to(backend), random_maps((1, 2, 2), seed=1).to(backend)
    plain, operator = (lambda given, module=module: module.soft_argmax(given, 4.0)
                       for module in (reference, torch.ops.actupose))
    expected, = torch.func.vjp(plain, maps)[1](direction)
    pulled, = torch.func.vjp(lambda given: kernels.soft_argmax(given, 4.0), maps)[1](direction)
    gradient = torch.func.grad(lambda given: (kernels.soft_argmax(given, 4.0) * direction).sum())(maps)
    trained = maps.clone().requires_grad_()
    direct, = torch.autograd.grad(operator(trained), trained, direction, create_graph=True)
    for found in (pulled, gradient, direct):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    second, = torch.autograd.grad(direct.square().sum(), trained)
    true, = torch.autograd.grad(
        torch.autograd.grad(plain(trained), trained, direction, create_graph=True)[0].square().sum(), trained)
    torch.testing.assert_close(second, true, rtol=1e-4, atol=1e-5)
    for function in (operator, lambda given: kernels.soft_argmax(given, 4.0)):
        try:
            tangent = torch.func.jvp(function, (maps,), (maps,))[1]
        except RuntimeError:   # the kernels have no forward mode, and say so
            continue
        torch.testing.assert_close(tangent, torch.func.jvp(plain, (maps,), (maps,))[1], rtol=0, atol=1e-5)


# --- launches -----------------------------------------------------------------------------------------------

def test_a_second_call_plans_and_compiles_nothing(monkeypatch):
    """Part 6: layout and compiled kernel are kept per shape, strides, dtype, device and alignment."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    started, poses = [], random_poses(9)
    plans = [value for module in (HEATMAP_ARGMAX, SOFT_ARGMAX, TRIPLET_ANGLE)
             for value in vars(module).values() if hasattr(value, "cache_clear")]
    monkeypatch.setattr(common, "INTERPRET", True)
    monkeypatch.setattr(common, "start", lambda launch, pointers: started.append(launch) or (lambda *_: None))
    for plan in plans:
        plan.cache_clear()
    maps = random_maps((3, 5, 9, 7))
    # 10 launches: argmax, its mean's two, rectify, soft-argmax's two; the angles, their distances; the
    # angles, the pairs. Content and capacity do not matter; another dtype, shape or alignment does.
    for index, (maps, poses, launches, misses) in enumerate((
            (maps, poses, 10, 7), (maps + 1, poses + 1, 10, 7), (maps.half(), poses.half(), 20, 14),
            (maps[1:].clone(), poses[1:].clone(), 30, 21), (maps[1:], poses[1:].clone(), 36, 26),
            (maps, poses, 36, 26))):
        kernels.heatmap_argmax(maps)
        kernels.heatmap_argmax_mean(maps, torch.ones(maps.shape[:2]))
        kernels.rectify(maps, 1.5)
        torch.autograd.grad(kernels.soft_argmax(maps.requires_grad_(), 4.0).sum(), maps)
        kernels.triplet_angle_distance(poses, poses, TRIPLETS)
        kernels.similar_pairs(poses, poses, TRIPLETS, 0.1, capacity=1 + index)
        assert (len(started), sum(plan.cache_info().misses for plan in plans)) == (launches, misses)
    for plan in plans:   # the stand-ins must not outlive the test
        plan.cache_clear()


def test_a_missing_compiler_is_named():
    """Triton compiles C when a kernel first runs; without a compiler its message gets a cure."""
    def kernel(*arguments, **options):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    with pytest.raises(RuntimeError, match="install gcc"):
        common.Launch({(1, 1, 1): kernel}, (1,), (), {})(torch.ones(1))


# --- where they run -----------------------------------------------------------------------------------------

def test_offsets_beyond_2_31_elements(backend):
    """Samples, rows, keypoints and poses may lie 2^31 elements apart, which an int32 does not hold, and 2^30,
    which it does. The 4 GB between them are never touched, and so take no memory."""
    room = torch.empty(2 ** 31 + 4096, dtype=torch.float16, device=backend)
    content = random_maps((3, 1, 8, 8)).half().to(backend)
    for shape, strides in (((3, 1, 8, 8), (2 ** 30, 64, 8, 1)), ((1, 1, 3, 8), (0, 0, 2 ** 30, 1)),
                           ((1, 3, 8, 8), (0, 2 ** 30, 8, 1))):
        plain = content.flatten()[:shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
        maps = room.as_strided(shape, strides).copy_(plain)
        weight = torch.ones(shape[:2], device=backend)
        torch.testing.assert_close(kernels.heatmap_argmax_mean(maps, weight),
                                   reference.heatmap_argmax_mean(plain, weight), rtol=0, atol=1e-6)
        maps, plain = maps.detach().requires_grad_(), plain.detach().requires_grad_()
        found, expected = kernels.soft_argmax(maps, 5.0), reference.soft_argmax(plain, 5.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(*torch.autograd.grad(found.square().sum(), maps),
                                   *torch.autograd.grad(expected.square().sum(), plain), rtol=2e-3, atol=1e-4)
    poses = room.as_strided((3, 8, 2), (2 ** 30, 2, 1)).copy_(random_poses(3))
    plain, triplets = poses.clone(memory_format=torch.contiguous_format), TRIPLETS.to(backend)
    torch.testing.assert_close(kernels.triplet_angle_distance(poses, poses, triplets),
                               reference.triplet_angle_distance(plain, plain, triplets), rtol=0, atol=1e-6)
    assert kernels.similar_pairs(poses, poses, triplets, 0.01).tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_contiguous_maps_beyond_2_31_on_gpu():
    maps = torch.zeros(2**31 // 2**20 + 2, 1, 1024, 1024, dtype=torch.float16, device="cuda")
    maps[-1, 0, 700, 900] = 1.0
    coords, confidence = kernels.heatmap_argmax(maps)
    assert coords[-1, 0].tolist() == [900.0, 700.0] and confidence[-1, 0].item() == 1.0
    torch.testing.assert_close(kernels.soft_argmax(maps, 1000.0)[-1, 0].cpu(), torch.tensor([900.0, 700.0]))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_cuda_graph_on_gpu():
    """A replay of the graph decodes the new content of its inputs."""
    maps = torch.rand(4, 16, 64, 64, device="cuda")
    poses, triplets = random_poses(8).cuda(), TRIPLETS.cuda()

    def decode():
        return (*kernels.heatmap_argmax(maps), kernels.soft_argmax(maps, 5.0), *kernels.rectify(maps, 1.5),
                kernels.triplet_angle_distance(poses, poses, triplets), *kernels.heatmap_argmax_mean(maps),
                kernels.similar_pairs(poses, poses, triplets, 0.1, capacity=64))

    decode()   # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode()
    maps.copy_(torch.rand(4, 16, 64, 64))
    graph.replay()
    torch.testing.assert_close(found, decode(), rtol=0, atol=0)


@pytest.mark.parametrize("prepare, environment, printed", [
    pytest.param("", {"TRITON_INTERPRET": "1"}, "kernel 1.0", marks=triton_only, id="interpreter"),
    pytest.param("", {}, "1.0", id="CPU"),
    pytest.param("import sys; sys.modules['triton'] = None", {}, "1.0", id="no Triton")])
def test_what_runs_on_the_cpu(prepare, environment, printed, run_python):
    """DESIGN §8: CPU tensors go through the kernels under TRITON_INTERPRET=1, otherwise, and without Triton,
    through the reference."""
    code = ("import torch, kernels; from kernels import common; start = common.start\n"
            "common.start = lambda *arguments: print('kernel', end=' ') or start(*arguments)\n"
            "print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())")
    assert run_python(f"{prepare}\n{code}", **environment).strip() == printed


COMPILE = """
import re, subprocess, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels
from kernels import common

CAPABILITY, CUBIN = int(sys.argv[1]), sys.argv[2]
names = "heatmap_argmax", "soft_argmax", "triplet_angle"
argmax, soft, angle = (sys.modules["kernels." + name] for name in names)

def loops(cubin):
    # (instructions, barriers) of each loop: from the target of a branch backwards up to that branch.
    listing = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-sass", cubin], text=True)
    code = re.findall(r"/[*]([0-9a-f]{4,})[*]/ +([^;]+);", listing)   # (address, instruction)
    place, found = {int(address, 16): n for n, (address, _) in enumerate(code)}, []
    for last, (address, instruction) in enumerate(code):
        target = re.search(r"BRA.* (0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(address, 16):   # those that lead to themselves are padding
            body = code[place[int(target[1], 16)]:last + 1]
            found.append((len(body), sum("BAR." in instruction for _, instruction in body)))
    return found

def report(title, launch, *pointers):
    # Compiled as the launch would be: aligned pointers, sizes of 1 as constants, multiples of 16 marked.
    names, constants = launch.kernel.arg_names, dict(launch.constants)
    values = launch.fixed[:len(launch.fixed) - len(constants)]
    types = dict(zip(names, pointers))
    aligned = [name for name, kind in types.items() if kind[0] == "*"]
    for name, value in zip(names[len(pointers):], values):
        types[name] = "fp32" if isinstance(value, float) or name == "gamma" else "i32"
        if value == 1:
            constants[name] = 1
        elif value % 16 == 0:
            aligned.append(name)
    types.update(dict.fromkeys(constants, "constexpr"))
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constexprs=constants,
                  attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned}),
        target=GPUTarget("cuda", CAPABILITY, 32), options=launch.options)
    with open(CUBIN, "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.check_output([tool, "--dump-resource-usage", CUBIN], text=True)
    used = dict(word.split(":")[:2] for word in usage.split() if ":" in word)
    wide = sum(compiled.asm["ptx"].count(access) for access in ("ld.global.v4.b32", "st.global.v4.b32"))
    found = loops(CUBIN)
    print(title, launch.grid[0] * launch.grid[1], compiled.metadata.num_warps, used["REG"],
          int(used["STACK"]) + int(used["LOCAL"]), wide, max([barriers for _, barriers in found], default=0),
          " ".join(str(instructions) for instructions, _ in found), sep="|")

LAST = torch.channels_last
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
PAPER = [((32, 16, 64, 64), dtype, layout) for dtype in TYPES for layout in (torch.contiguous_format, LAST)]
OTHERS = [((1024, 16, 64, 64), torch.bfloat16, LAST), ((4, 16, 1024, 1024), torch.float32, LAST)]
for shape, dtype, layout in PAPER + OTHERS if CAPABILITY == 90 else PAPER[:2]:
    strides, maps = torch.empty(shape, device="meta").to(memory_format=layout).stride(), TYPES[dtype]
    key = (shape, strides, dtype, 0, True)
    of = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {'channels-last' if layout == LAST else 'contiguous'}"
    first, finish, shared = argmax.plan(*key, True, None)
    report(f"argmax {of}", first, maps, "*fp32", "*fp32", "*i32")
    report(f"soft-argmax backward {of}", soft.plan_backward(*key, strides, 10.0), maps, "*fp32", "*fp32",
           "*fp32", maps)
    first, join, _ = soft.plan(*key, 10.0)
    report(f"soft-argmax forward {of}", first, maps, "*fp32", "*fp32", "*fp64")
    if shared:
        report(f"argmax finish {of}", finish, maps, "*fp32", "*fp32", "*i32", "*fp32", "*fp32")
        report(f"soft-argmax join {of}", join, "*fp32", "*fp32", "*fp64")
    else:
        report(f"rectify {of}", argmax.plan_rectify(*key, 1.0, True), maps, "*fp32", "*fp32", "*fp32")
for size, mining in ((32, False), (4096, False), (4096, True)):
    poses, valid = (((size, 16, *last), torch.empty(size, 16, *last).stride(), dtype, "cuda", True)
                    for last, dtype in (((2,), torch.float32), ((), torch.bool)))
    triplets = (16, 3), (3, 1), torch.int64, "cuda", True
    _, _, fill, use = angle.plan(poses, poses, triplets, valid, None, 4, mining)
    pointers = ("*i64", "*i64", "*i64", "i64", "fp32") if mining else ("*fp32",)
    report(f"{'pairs' if mining else 'distance'} {size} x {size}", use, "*fp32", *pointers)
report("angles", fill, "*fp32", "*fp32", "*i1", "*i64", "*i64", "*fp32")
"""


@triton_only
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile_without_a_gpu(capability, tmp_path, run_python):
    """Part 6: what the operators launch becomes cubins that spill no register. At the paper's size 2,048
    warps are at work in either layout. No loop has more than two barriers. `pytest -s` prints the table."""
    for tool in ("ptxas_blackwell" if capability == "100" else "ptxas", "cuobjdump"):
        try:
            getattr(common.triton.knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    output = run_python(COMPILE, capability, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))
    rows = [line.split("|") for line in output.splitlines()]
    for row in [("sm_" + capability, "programs", "warps", "registers", "spilled", "16-byte accesses",
                 "barriers in a loop", "loops' instructions"), *rows]:
        print("{:60} {:>8} {:>5} {:>9} {:>7} {:>16} {:>18}  {}".format(*row))
    assert len(rows) == (37 if capability == "90" else 12)
    for title, programs, warps, _, spilled, wide, barriers, instructions in rows:
        without = title.startswith(("distance", "pairs", "soft-argmax backward"))
        assert spilled == "0" and int(barriers) <= (0 if without else 2), title
        if title.startswith("distance 4096"):   # a warp takes two triplets of 64 x 64 pairs at a time
            assert int(instructions.split()[0]) <= 2 * 140
        assert "contiguous" not in title or int(wide) >= 1, title
        if "32x16x64x64" in title:
            assert int(programs) * int(warps) >= 2048, title
