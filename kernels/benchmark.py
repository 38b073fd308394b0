"""Measures the operators against plain PyTorch:  python -m kernels.benchmark

It prints a table per operator and per use of one, over sizes, dtypes and layouts. soft_argmax_gradient is
forward and backward, similar_mask is triplet_angle_distance < gamma, training_step is two of the calls of a
training step, timed as one: heatmap_argmax_mean and similar_mask. A column is a provider and how it is timed.
Providers are the operator in Triton, also in a CUDA graph; `kernels.reference`, eager and by torch.compile in
three modes; for the argmax torch.max without coordinates and the field's published NumPy, with the copy to
the host.

    cold cache, GPU time   Between two events around one call, after a buffer of four L2 caches was read: the
                           cache holds neither data nor writes still to be made. The host issues the call
                           during the reading, so its time does not count, as it may in Triton's `do_bench`.
    warm cache, GPU time   `triton.testing.do_bench_cudagraph`: calls in a row, in one graph
    warm cache, host time  `torch.utils.benchmark.Timer`: wall time, with all that the call has to do

A cell holds the median time and the limit's share of it in per cent. The limit is the time of what must be
read plus that of what must be written, or of the arithmetic if longer, at rates measured in the same run.
"fastest" is of those that return all that the operator does, timed alike.

Then comes what the compiled code executes (`kernels.compiled`; `--compiled 90` prints that alone), where "per
unit" counts the instructions for a map or for 64 x 64 pairs, and "issue time" is a bound from below, as the
time of reading is: all warps' instructions at one per cycle of each scheduler of an H200. Some, such as exp2
and conversions to float64, take more than a cycle (docs/kernels.md). Last are two tables of host time: until
a call returns, on CUDA or, without a GPU, on tiny CPU tensors with launches that do nothing; and on CPU
tensors, of the operators over the reference that they run there. Before anything is timed, each operator is
checked against the float64 reference: an error ends the run.
"""
import argparse
import logging
import math
import platform
import sys
import time
import timeit
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from subprocess import getoutput
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.benchmark import Timer

import kernels
from kernels import common, compiled, reference

# What to call: m is `kernels` or its reference; the rest is from `map_inputs` or `pose_inputs`.
HEATMAP_OPERATORS = {
    "heatmap_argmax": lambda m, maps, weight, gradient: m.heatmap_argmax(maps),
    "heatmap_argmax_mean": lambda m, maps, weight, gradient: m.heatmap_argmax_mean(maps, weight),
    "rectify": lambda m, maps, weight, gradient: m.rectify(maps, SIGMA, True),
    "soft_argmax": lambda m, maps, weight, gradient: m.soft_argmax(maps, BETA),
    "soft_argmax_gradient": lambda m, maps, weight, gradient: m.soft_argmax(maps, BETA)}   # see `call_of`
POSE_OPERATORS = {
    "triplet_angle_distance": lambda m, gamma, *poses: m.triplet_angle_distance(*poses),
    "similar_mask": lambda m, gamma, *poses: m.triplet_angle_distance(*poses) < gamma}
STEP_OPERATORS = {
    "training_step": lambda m, maps, weight, gradient, gamma, *poses: (
        *m.heatmap_argmax_mean(maps, weight), m.triplet_angle_distance(*poses) < gamma)}
OPERATORS = HEATMAP_OPERATORS | POSE_OPERATORS | STEP_OPERATORS
COLD = "cold cache, GPU time"
WARM = "warm cache, GPU time"
HOST = "warm cache, host time"
GRAPH = "triton, CUDA graph"
NOT_THE_OPERATOR = GRAPH, "torch.max", "NumPy"   # timed otherwise, or without all results
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}   # training's first
BODY = (32, 16, 64, 64)   # the paper's batches of heatmaps (B, K, H, W)
HAND = (32, 21, 64, 64)
LARGE = [(2048, 16, 64, 64), (64, 16, 256, 256), (4, 16, 1024, 1024)]   # 256 MB and more in float32
BODY_POSE = (16, 16)   # triplets A, keypoints K
HAND_POSE = (14, 21)
BETA = 10.0            # of these three the values do not matter for the time
SIGMA = 2.0
MIN_TRIPLETS = 4
SIMILAR = 0.01   # part of the pairs below gamma, about what choosing similar poses keeps
HOST_OPERATIONS = 5e9   # a call that needs more is not measured on a CPU


class Plan(NamedTuple):
    """What to measure and for how long."""
    heatmaps: list         # (shape, dtype, layout) of each row
    poses: list            # (S, T, A, K, masked) of each row; masked: a tenth of the keypoints is not valid
    seconds: float = 0.0   # for a cell, about


FULL = Plan([*product([BODY], DTYPES, LAYOUTS), *product([HAND, LARGE[0]], DTYPES[::2], LAYOUTS),
             *product(LARGE[1:], DTYPES[:1], LAYOUTS)],
            [(S, S, *BODY_POSE, S == 32) for S in (32, 256, 1024, 4096, 16384, 65536)]
            + [(4096, 4096, *BODY_POSE, True), (32, 32, *HAND_POSE, True), (4096, 4096, *HAND_POSE, False)],
            seconds=0.5)
QUICK = Plan([(BODY, torch.float32, "channels-last")], [(32, 32, *BODY_POSE, True)], seconds=0.1)
CHECK = Plan([*product([BODY, HAND, (5, 3, 37, 23), (1, 2, 1024, 1024)], DTYPES, LAYOUTS)],
             [(S, T, *pose, masked) for pose in (BODY_POSE, HAND_POSE) for masked in (True, False)
              for S, T in ((32, 32), (33, 65), (300, 257), (900, 1100))])
COMPILED = Plan([(BODY, torch.float32, "contiguous"), *product([BODY], DTYPES[::2], ["channels-last"]),
                 *product(LARGE[:1], DTYPES[::2], LAYOUTS), (LARGE[2], torch.float32, "channels-last")],
                [(S, S, *BODY_POSE, masked) for S in (32, 1024, 4096) for masked in (False, True)])
TINY = Plan([((2, 4, 8, 8), torch.float32, "channels-last")], [(4, 4, *BODY_POSE, True)])


def work(operator, shape, itemsize=4):
    """Bytes that an operator must read, bytes that it must write, operations, units: maps or 64 x 64 pairs.

    shape: (B, K, H, W) of heatmaps, or (S, T, A, K) of S source and T target poses with A triplets. Heatmaps
    are read once, or twice for forward and backward; coordinates, poses and angles are too small to count.
    Eq. 7 takes a difference, a square and a sum for each pair and triplet.
    """
    if operator in POSE_OPERATORS:
        S, T, A, _ = shape
        bytes_of_a_pair = 4 if operator == "triplet_angle_distance" else 1
        return dict(read_bytes=0, written_bytes=bytes_of_a_pair * S * T, operations=3 * S * T * A,
                    units=S * T / 4096)
    cells = math.prod(shape)
    reads = 1
    written = 0
    if operator == "rectify":
        written = 4
    elif operator == "soft_argmax_gradient":
        reads = 2
        written = itemsize
    return dict(read_bytes=reads * itemsize * cells, written_bytes=written * cells, operations=0,
                units=shape[0] * shape[1])


def map_inputs(shape, dtype, layout, generator, adverse=False):
    """Heatmaps (B, K, H, W) in [0, 1), weights (B, K), gradient of the coordinates (B, K, 2).

    adverse: maps with ties, and some that hold NaN, are -inf, constant, or have a high peak.
    """
    maps = torch.rand(shape, generator=generator, device=generator.device)
    if adverse:
        maps[:, ::2] = (8 * maps[:, ::2]).round() / 8
        maps[0, 0, -1, 0] = maps[0, 0, 0, -1] = math.nan
        if len(maps) > 4:
            maps[1, 0] = -math.inf
            maps[2, 0] = 0.5
            maps[3, 0] = -1.0
            maps[-1, 0, -1, -1] = 30.0
    numbers = torch.linspace(0, 1, 2 * math.prod(shape[:2]), device=maps.device).view(*shape[:2], 2)
    return maps.to(dtype).contiguous(memory_format=LAYOUTS[layout]), numbers[..., 0].contiguous(), numbers


def pose_inputs(S, T, A, K, generator, masked=True):
    """gamma, below which lie about SIMILAR of the pairs, and the arguments of triplet_angle_distance."""
    def rand(*shape):
        return torch.rand(shape, generator=generator, device=generator.device)

    triplets = rand(A, K).argsort(dim=1)[:, :3].contiguous()
    source = 64 * rand(S, K, 2)
    target = 64 * rand(T, K, 2)
    valid = rand(S + T, K) < 0.9
    masks = (valid[:S], valid[S:]) if masked else (None, None)
    some = (valid[:S][:512], valid[S:][:512]) if masked else masks
    few = reference.triplet_angle_distance(source[:512], target[:512], triplets, *some, MIN_TRIPLETS)
    gamma = few.flatten().kthvalue(max(1, int(SIMILAR * few.numel()))).values.item()
    return gamma, source, target, triplets, *masks, MIN_TRIPLETS


def cases(operator, plan, generator):
    """Rows of an operator's table (dict) and their inputs, which are made one at a time to save memory."""
    if operator in POSE_OPERATORS:
        for *shape, masked in plan.poses:
            S, T, A, K = shape
            yield dict(operator=operator, size=f"S = {S:,}, T = {T:,}, A = {A}, K = {K}", dtype="float32",
                       layout="masks" if masked else "no masks",
                       **work(operator, shape)), pose_inputs(*shape, generator, masked)
        return
    heatmaps = plan.heatmaps[:1] if operator in STEP_OPERATORS else plan.heatmaps
    for shape, dtype, layout in heatmaps:
        row = dict(operator=operator, size="x".join(map(str, shape)), dtype=str(dtype)[6:], layout=layout,
                   **work(operator, shape, dtype.itemsize))
        inputs = map_inputs(shape, dtype, layout, generator, adverse=plan is CHECK)
        if operator in STEP_OPERATORS:
            row["size"] += " and the first of Eq. 7"
            inputs += pose_inputs(*plan.poses[0][:4], generator, plan.poses[0][4])
        yield row, inputs


def call_of(operator, module, inputs, wrap=lambda function: function):
    """A call without arguments of the operator from `module` on `inputs`; wrap: what compiles it."""
    function = wrap(lambda *inputs: OPERATORS[operator](module, *inputs))
    if operator != "soft_argmax_gradient":
        return lambda: function(*inputs)
    maps = inputs[0].requires_grad_()
    return lambda: torch.autograd.grad(function(*inputs), maps, inputs[2])


def decode_on_host(heatmaps):
    """The published decoding: a copy to the host, then NumPy's argmax and maximum over each flattened map."""
    maps = heatmaps.float() if heatmaps.dtype == torch.bfloat16 else heatmaps   # NumPy has no bfloat16
    flat = maps.cpu().numpy().reshape(*maps.shape[:2], -1)
    index = flat.argmax(2)
    width = maps.shape[3]
    return np.stack((index % width, index // width), 2).astype(np.float32), flat.max(2)


def calls_of(operator, inputs, cuda):
    """The calls to time, by provider."""
    def compiled_in(**mode):
        return call_of(operator, reference, inputs, lambda f: torch.compile(f, dynamic=False, **mode))

    triton = call_of(operator, kernels, inputs)
    calls = {"triton": triton, GRAPH: triton, "eager": call_of(operator, reference, inputs),
             "torch.compile": compiled_in()}
    if cuda:
        calls["torch.compile, max-autotune"] = compiled_in(mode="max-autotune-no-cudagraphs")
        calls["torch.compile, reduce-overhead"] = compiled_in(mode="reduce-overhead")
    if operator == "heatmap_argmax":
        calls["torch.max"] = lambda: inputs[0].flatten(2).max(2)
        calls["NumPy"] = lambda: decode_on_host(inputs[0])
    return calls


def allowed_errors(operator, inputs, true):
    """What each result may be off by: nothing for the argmax; 1e-5 for the mean confidence, for what rectify
    returns, and in cells for the soft-argmax, times side / 64 beyond 64; for its gradient 1e-4 of the
    largest, and the rounding of a dtype below float32; 1.5e-6 rad for distances; a pair may be on the wrong
    side of gamma where the distance is as close to it."""
    if operator in POSE_OPERATORS:
        return [1.5e-6]
    if operator == "soft_argmax":
        return [1e-5 * max(1, max(inputs[0].shape[2:]) / 64)]
    if operator == "soft_argmax_gradient":
        rounding = 0.0 if inputs[0].dtype == torch.float32 else torch.finfo(inputs[0].dtype).eps / 2
        return [(1e-4 + rounding) * true[0].nan_to_num(0.0).abs().max().item()]
    if operator == "rectify":
        return [1e-5] * 3
    return [0.0, 0.0, 1e-5, 1.5e-6]   # of heatmap_argmax the first two, of its mean three, of the step four


def error_of(operator, inputs):
    """The worst difference from the float64 reference: (by what is allowed, difference, allowed)."""
    exact = [value.detach().cpu() if torch.is_tensor(value) else value for value in inputs]
    exact = [value.double() if getattr(value, "dtype", None) in DTYPES else value for value in exact]
    ours = call_of(operator, kernels, inputs)()
    true = call_of(operator, reference, exact)()
    ours = ours if isinstance(ours, tuple) else (ours,)
    true = true if isinstance(true, tuple) else (true,)
    worst = []
    for our, their, limit in zip(ours, true, allowed_errors(operator, inputs, true)):
        our = our.detach().cpu()
        same = (our == their) | (our.isnan() & their.isnan())
        if their.dtype == torch.bool:   # similar or not: how far from gamma is a pair that differs?
            gamma, *poses = exact[-7:]
            error = (reference.triplet_angle_distance(*poses) - gamma).abs()
        else:
            error = (our.double() - their).abs()
        error = torch.where(same, 0.0, error).nan_to_num(math.inf).max().item()
        worst.append((error / (limit or 1e-300), error, limit))
    return max(worst)


class Clock:
    """Times calls on one device; on CUDA it owns the buffer that displaces the cache."""

    def __init__(self, device, seconds):
        self.device = device
        self.cuda = device.type == "cuda"
        self.seconds = seconds
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.ones(max(cache, 1 << 25), device=device)   # numbers of 4 bytes

    def between_events(self, call):
        """Seconds of the device for a call."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for _ in range(20):   # a millisecond or more, in which the host issues the whole call
            self.buffer.amax()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def best(self, call, repetitions=8):
        """Seconds of the fastest of some calls."""
        once = self.between_events if self.cuda else lambda call: timeit.timeit(call, number=1)
        return min(once(call) for _ in range(repetitions))

    def measure(self, call, timing):
        """Median time (ms) of a call that ran before; if COLD, the peak of extra memory (bytes)."""
        if timing == WARM:
            return dict(ms=common.triton.testing.do_bench_cudagraph(call, return_mode="median"))
        if timing == HOST:
            timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
            return dict(ms=1000 * timer.blocked_autorange(min_run_time=self.seconds).median)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - before
        times = repeat(lambda: self.between_events(call), self.seconds)
        return dict(ms=1000 * float(np.median(times)), extra_bytes=extra)


def repeat(sample, seconds):
    """Samples taken until `seconds` have passed: at least three, at most a thousand."""
    samples = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or len(samples) < 1000 and time.perf_counter() < end:
        samples.append(sample())
    return samples


def timing_of(provider, cuda):
    """How a provider's calls are timed."""
    if provider == GRAPH:
        return WARM
    return COLD if provider == "triton" or cuda and provider != "NumPy" else HOST


@common.triton.jit
def empty_kernel(pointer):
    """Nothing: its time is that of a launch."""


def measure_limits(clock):
    """Best rates of reading and writing large tensors, bytes/s, and of a float32 matrix product,
    operations/s; on CUDA, microseconds of an empty kernel."""
    numbers, n = (1 << 28, 8192) if clock.cuda else (1 << 26, 2048)   # 1 GB
    source = torch.ones(numbers, device=clock.device)
    factor = torch.rand(n, n, device=clock.device)
    readings = source.sum, source.amax, lambda: source.view(4096, -1).amax(1)
    launch = common.Launch(empty_kernel, (1,), (), {}) if clock.cuda and common.HAVE_TRITON else None
    return dict(read=4 * numbers / min(map(clock.best, readings)),
                write=4 * numbers / clock.best(lambda: source.fill_(2.0)),
                fp32=2 * n**3 / clock.best(lambda: factor @ factor),
                launch_us=1e6 * clock.best(lambda: launch(source), 100) if launch else "not measured")


def limit_ms(row, limits):
    """The least time that a row can take. Eq. 7's three operations are two instructions, a difference and a
    multiply-add; a product counts an instruction as two."""
    return 1000 * max(row["read_bytes"] / limits["read"] + row["written_bytes"] / limits["write"],
                      row["operations"] / (0.75 * limits["fp32"]))


def why_skipped(row, provider, cuda):
    """Why this cell is not to be measured, or None."""
    if provider in ("triton", GRAPH) and not (cuda and common.HAVE_TRITON):
        return "not measured"
    return "too much for a CPU" if not cuda and row["operations"] > HOST_OPERATIONS else None


def measure_row(row, calls, clock, limits):
    """Fill `row["providers"]` with a dict for each provider, `row["speedup"]`, of Triton over eager, and
    `row["fastest"]`, the provider."""
    row["limit, ms"] = limit_ms(row, limits)
    row["providers"] = {}
    for provider, call in calls.items():
        cell = dict(skipped=why_skipped(row, provider, clock.cuda))
        try:
            if not cell["skipped"]:
                torch.compiler.reset()   # else the rows would reach the limit of recompilations
                if clock.cuda:
                    torch.cuda.empty_cache()
                for _ in range(3):   # reduce-overhead records its graph in the second
                    call()
                cell = clock.measure(call, timing_of(provider, clock.cuda))
                cell["share"] = row["limit, ms"] / cell["ms"]
        except Exception as error:   # a compiler that is missing, a graph, too little memory
            if provider in ("triton", "eager") and not isinstance(error, torch.OutOfMemoryError):
                raise
            cell = dict(skipped="failed: " + str(error).strip().split("\n")[0][:60])
        row["providers"][provider] = cell
    times = {provider: cell["ms"] for provider, cell in row["providers"].items() if "ms" in cell}
    row["speedup"] = times["eager"] / times["triton"] if {"eager", "triton"} <= set(times) else None
    alike = [provider for provider in times if provider not in NOT_THE_OPERATOR]
    row["fastest"] = min(alike, key=times.get, default=None)


def line_of(row, cuda):
    """The line of a measured row."""
    line = {name: row[name] for name in ("size", "dtype", "layout", "limit, ms")}
    for provider, cell in row["providers"].items():
        line[f"{provider}: ms (% of limit), {timing_of(provider, cuda)}"] = (
            cell.get("skipped") or f"{short(cell['ms'])} ({short(100 * cell['share'])})")
    if cuda:
        for provider in ("triton", "eager"):
            line[f"extra MB, {provider}"] = row["providers"][provider].get("extra_bytes", math.nan) / 1e6
    line["eager / triton"] = row["speedup"] or "not measured"
    line["fastest"] = row["fastest"] or "not measured"
    return line


def host_times(operators, plan, device, seed, seconds, calls=1):
    """Lines of a table: host microseconds until an operator and its reference return.

    The two take turns of so many calls, after as many that are not timed; the fastest turn counts.
    """
    def turn(call):
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return timeit.timeit(call, number=calls) / calls

    generator = torch.Generator(device).manual_seed(seed)
    lines = []
    for operator in operators:
        for row, inputs in cases(operator, plan, generator):
            pair = [call_of(operator, module, inputs) for module in (kernels, reference)]
            times = repeat(lambda: [turn(call) for call in pair], seconds)
            ours, eager = (1e6 * np.min(times, axis=0)).tolist()
            lines.append({"operator": operator, "size": row["size"], "operator, us": ours, "eager, us": eager,
                          "operator / eager": ours / eager})
    return lines


def header(device, seed):
    """What ran where, for the report. A command that fails leaves its message there."""
    facts = dict(device=common.device_name(device))
    if device.type == "cuda":
        names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
        card = torch.cuda.get_device_properties(device).uuid
        facts[names] = getoutput(f"nvidia-smi --query-gpu={names} --format=csv,noheader --id=GPU-{card}")
    commit = getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty --exclude='*'")
    return facts | {"commit": commit, "torch": torch.__version__,
                    "Triton": getattr(common.triton, "__version__", "none"),
                    "Python": platform.python_version(), "threads": torch.get_num_threads(), "seed": seed}


def short(value):
    """A cell of a table: three digits of a float, without an exponent; integers and words as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.6f}" if 0 < value < 0.001 else f"{value:.3g}"


def print_table(title, lines):
    """Lines, which are dicts of the same columns, as a table in Markdown."""
    print(f"\n### {title}\n")
    for cells in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)):
        print(f"| {' | '.join(short(cell) for cell in cells)} |", flush=True)


def print_compiled(capability, plan):
    """Print what the compiled code executes on GPUs of a compute capability (90: sm_90); returns whether it
    could be counted and no kernel spills registers."""
    why = compiled.missing(capability)
    if why:
        print(f"\nWhat the compiled code executes was not counted: {why}")
        return False
    lines = []
    for operator in ("heatmap_argmax", "rectify", "soft_argmax_gradient", "triplet_angle_distance"):
        for row, inputs in cases(operator, plan, torch.Generator().manual_seed(0)):
            for launch, pointers in compiled.launches_of(call_of(operator, kernels, inputs)):
                counts = compiled.count_launch(launch, pointers, capability)
                total = counts.pop("total")
                seconds = total / compiled.SCHEDULERS / compiled.CLOCK
                lines.append({"of": f"{row['size']} {row['dtype']} {row['layout']}", **counts,
                              "per unit": total / row["units"], "issue time, us": 1e6 * seconds})
    print_table(f"What sm_{capability} executes", lines)
    return not any(line["spilled"] for line in lines)


def print_checks(operators, device, seed):
    """Print the largest error of each operator; returns whether all are allowed."""
    lines = []
    for operator in operators:
        errors = [(*error_of(operator, inputs), f"{row['size']} {row['dtype']} {row['layout']}")
                  for row, inputs in cases(operator, CHECK, torch.Generator(device).manual_seed(seed))]
        excess, error, allowed, at = max(errors)
        if excess > 1:
            print(f"{operator} is wrong for {at}: error {error:.3g}, allowed {allowed:.3g}; repeat it with "
                  f"--only {operator} --seed {seed}", file=sys.stderr)
            return False
        lines.append(dict(operator=operator, error=f"{error:.2g}", allowed=f"{allowed:.2g}", at=at))
    print_table("Largest errors against the float64 reference", lines)
    return True


def main(arguments=None, plan=None):
    """Run the benchmark; returns the exit status: 1 if an operator is wrong. `plan`: in place of FULL."""
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", allow_abbrev=False,
                                     description="Check the operators, then time them against PyTorch.")
    parser.error = lambda message: parser.exit(2, f"benchmark: {message} (--help lists the options)\n")
    parser.add_argument("--quick", action="store_true", help="only the sizes of training, measured shortly")
    parser.add_argument("--only", choices=OPERATORS, metavar="NAME", help="one of " + ", ".join(OPERATORS))
    parser.add_argument("--compiled", type=int, choices=(80, 90, 100), metavar="CAPABILITY",
                        help="only what the compiled code executes on GPUs of that kind: 80, 90 or 100")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs [default: 0]")
    options = parser.parse_args(arguments)
    if common.INTERPRET:
        parser.exit(2, "Triton's interpreter is on, which says nothing of a GPU: unset TRITON_INTERPRET\n")
    to_compile = QUICK if options.quick else COMPILED
    if options.compiled:
        return 0 if print_compiled(options.compiled, to_compile) else 1
    plan = plan or (QUICK if options.quick else FULL)
    seed = options.seed
    operators = [options.only] if options.only else list(OPERATORS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._logging.set_logs(dynamo=logging.ERROR)   # the reference's checks look at values: a graph break
    clock = Clock(device, plan.seconds)
    limits = measure_limits(clock)
    if not clock.cuda:
        print("No CUDA device: the Triton columns are not measured; its interpreter's time says nothing.")
    facts = header(device, seed)   # the clocks after some work
    facts["read, GB/s"] = limits["read"] / 1e9
    facts["write, GB/s"] = limits["write"] / 1e9
    facts["float32 product, GFLOP/s"] = limits["fp32"] / 1e9
    facts["empty kernel, us"] = limits["launch_us"]
    print_table("What ran where, and the limits measured there",
                [dict(what=what, value=value) for what, value in facts.items()])
    if not print_checks(operators, device, seed):
        return 1
    for operator in operators:
        rows = []
        for row, inputs in cases(operator, plan, torch.Generator(device).manual_seed(seed)):
            measure_row(row, calls_of(operator, inputs, clock.cuda), clock, limits)
            rows.append(row)
        print_table(operator, [line_of(row, clock.cuda) for row in rows])
    if not options.only:
        major, minor = torch.cuda.get_device_capability(device) if clock.cuda else (9, 0)
        print_compiled(10 * major + minor, to_compile)
    if common.HAVE_TRITON:
        with nullcontext() if clock.cuda else compiled.no_launches():
            lines = host_times(operators, QUICK if clock.cuda else TINY, device, seed, 4 * plan.seconds, 50)
        print_table("Host time of a call" + ("" if clock.cuda else ", launches doing nothing"), lines)
    print_table("On CPU tensors: the operator over its reference called directly",
                host_times(operators, QUICK, torch.device("cpu"), seed, 4 * plan.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
