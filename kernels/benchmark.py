"""Measures the operators against plain PyTorch:  python -m kernels.benchmark

One table per operator and per use of one (soft_argmax_gradient: forward and backward; similar_mask: the
training step's triplet_angle_distance < gamma; similar_pairs: with a capacity), over sizes, dtypes and
layouts. A column is a provider (Triton, also in a CUDA graph; `kernels.reference`, eager and compiled;
torch.max without coordinates; the field's published NumPy, with the copy to the host) and how it is timed:

    cold cache, GPU time   Between two events around one call, after a buffer of four L2 caches was read: the
                           cache holds neither data nor writes still to be made. The host issues the call
                           during the reading, so its time does not count, as it may in Triton's `do_bench`.
    warm cache, GPU time   `triton.testing.do_bench_cudagraph`: calls in a row, in one graph
    warm cache, host time  `torch.utils.benchmark.Timer`: wall time, with all that the call has to do

A cell holds the median time and the limit's share of it in per cent. The limit is the time of what must be
read plus that of what must be written, or of the arithmetic if longer, at rates measured in the same run.

Two tables of host time follow: until a call returns, on CUDA or, without a GPU, on tiny CPU tensors with
launches that do nothing; and on CPU tensors, of the operators over the reference that they run there. Before
anything is timed, each operator is checked against the float64 reference: an error ends the run.
"""
import argparse
import logging
import math
import platform
import sys
import time
import timeit
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from subprocess import getoutput
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.utils.benchmark import Timer

import kernels
from kernels import common, reference

# What to call: m is `kernels` or its reference; the rest is from `map_inputs` or `pose_inputs`.
HEATMAP_OPERATORS = {
    "heatmap_argmax": lambda m, maps, weight, gradient: m.heatmap_argmax(maps),
    "heatmap_argmax_mean": lambda m, maps, weight, gradient: m.heatmap_argmax_mean(maps, weight),
    "rectify": lambda m, maps, weight, gradient: m.rectify(maps, SIGMA, True),
    "soft_argmax": lambda m, maps, weight, gradient: m.soft_argmax(maps, BETA),
    "soft_argmax_gradient": lambda m, maps, weight, gradient: m.soft_argmax(maps, BETA)}   # see `call_of`
POSE_OPERATORS = {
    "triplet_angle_distance": lambda m, gamma, *poses: m.triplet_angle_distance(*poses),
    "similar_mask": lambda m, gamma, *poses: m.triplet_angle_distance(*poses) < gamma,
    "similar_pairs": lambda m, gamma, *poses: m.similar_pairs(
        *poses[:3], gamma, *poses[3:], capacity_for(len(poses[0]), len(poses[1])))}
OPERATORS = HEATMAP_OPERATORS | POSE_OPERATORS
COLD, WARM, HOST = "cold cache, GPU time", "warm cache, GPU time", "warm cache, host time"
GRAPH = "triton, CUDA graph"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}   # training's first
BODY, HAND = (32, 16, 64, 64), (32, 21, 64, 64)   # the paper's batches of heatmaps (B, K, H, W)
LARGE = [(2048, 16, 64, 64), (64, 16, 256, 256), (4, 16, 1024, 1024)]   # 256 MB and more in float32
BODY_POSE, HAND_POSE = (16, 16), (14, 21)   # triplets A, keypoints K
BETA, SIGMA, MIN_TRIPLETS = 10.0, 2.0, 4   # their values do not matter for the time
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
STEP = Plan([(BODY, torch.float32, "channels-last")], [(32, 32, *BODY_POSE, True)], seconds=0.1)
CHECK = Plan([*product([BODY, HAND, (5, 3, 37, 23), (1, 2, 1024, 1024)], DTYPES, LAYOUTS)],
             [(S, T, *pose, True) for pose in (BODY_POSE, HAND_POSE)
              for S, T in ((32, 32), (33, 65), (300, 257))])
TINY = Plan([((2, 4, 8, 8), torch.float32, "channels-last")], [(4, 4, *BODY_POSE, True)])


def capacity_for(S, T):
    """Rows for the similar pairs of S source and T target poses: twice what is expected."""
    return 1 + round(2 * SIMILAR * S * T)


def work(operator, shape, itemsize=4):
    """Bytes that an operator must read, bytes that it must write, operations.

    shape: (B, K, H, W) of heatmaps, or (S, T, A, K) of S source and T target poses with A triplets. Heatmaps
    are read once, or twice for forward and backward; coordinates, poses and angles are too small to count.
    Eq. 7 takes a difference, a square and a sum for each pair and triplet.
    """
    if operator in HEATMAP_OPERATORS:
        cells, gradient = math.prod(shape), operator == "soft_argmax_gradient"
        written = itemsize if gradient else 4 if operator == "rectify" else 0
        return dict(read_bytes=(1 + gradient) * itemsize * cells, written_bytes=written * cells, operations=0)
    S, T, A, _ = shape
    written = {"triplet_angle_distance": 4 * S * T, "similar_mask": S * T,
               "similar_pairs": 16 * capacity_for(S, T)}[operator]
    return dict(read_bytes=0, written_bytes=written, operations=3 * S * T * A)


def map_inputs(shape, dtype, layout, generator, adverse=False):
    """Heatmaps (B, K, H, W) in [0, 1), weights (B, K), gradient of the coordinates (B, K, 2).

    adverse: maps with ties, and some that hold NaN, are -inf, constant, or have a high peak.
    """
    maps = torch.rand(shape, generator=generator, device=generator.device)
    if adverse:
        maps[:, ::2] = (8 * maps[:, ::2]).round() / 8
        maps[0, 0, -1, 0] = maps[0, 0, 0, -1] = math.nan
        if len(maps) > 4:
            maps[1, 0], maps[2, 0], maps[3, 0], maps[-1, 0, -1, -1] = -math.inf, 0.5, -1.0, 30.0
    numbers = torch.linspace(0, 1, 2 * math.prod(shape[:2]), device=maps.device).view(*shape[:2], 2)
    return maps.to(dtype).contiguous(memory_format=LAYOUTS[layout]), numbers[..., 0].contiguous(), numbers


def pose_inputs(S, T, A, K, generator, masked=True):
    """gamma, below which lie about SIMILAR of the pairs, and the arguments of triplet_angle_distance."""
    def rand(*shape):
        return torch.rand(shape, generator=generator, device=generator.device)
    triplets = rand(A, K).argsort(dim=1)[:, :3].contiguous()
    source, target, valid = 64 * rand(S, K, 2), 64 * rand(T, K, 2), rand(S + T, K) < 0.9
    masks = (valid[:S], valid[S:]) if masked else (None, None)
    some = (valid[:S][:512], valid[S:][:512]) if masked else masks
    few = reference.triplet_angle_distance(source[:512], target[:512], triplets, *some, MIN_TRIPLETS)
    gamma = few.flatten().kthvalue(max(1, int(SIMILAR * few.numel()))).values.item()
    return gamma, source, target, triplets, *masks, MIN_TRIPLETS


def cases(operator, plan, generator):
    """Rows of an operator's table (dict) and their inputs, which are made one at a time to save memory."""
    if operator in HEATMAP_OPERATORS:
        for shape, dtype, layout in plan.heatmaps:
            inputs = map_inputs(shape, dtype, layout, generator, adverse=plan is CHECK)
            yield dict(operator=operator, size="x".join(map(str, shape)), dtype=str(dtype)[6:], layout=layout,
                       **work(operator, shape, dtype.itemsize)), inputs
        return
    for *shape, masked in plan.poses:
        S, T, A, K = shape
        yield dict(operator=operator, size=f"S = {S:,}, T = {T:,}, A = {A}, K = {K}", dtype="float32",
                   layout="masks" if masked else "no masks",
                   **work(operator, shape)), pose_inputs(*shape, generator, masked)


def call_of(operator, module, inputs, wrap=lambda function: function):
    """A call without arguments of the operator from `module` on `inputs`; wrap: what compiles it."""
    function = wrap(lambda *inputs: OPERATORS[operator](module, *inputs))
    if operator != "soft_argmax_gradient":
        return lambda: function(*inputs)
    maps, gradient = inputs[0].requires_grad_(), inputs[2]
    return lambda: torch.autograd.grad(function(*inputs), maps, gradient)


def decode_on_host(heatmaps):
    """The published decoding: a copy to the host, then NumPy's argmax and maximum over each flattened map."""
    maps = heatmaps.float() if heatmaps.dtype == torch.bfloat16 else heatmaps   # NumPy has no bfloat16
    flat, width = maps.cpu().numpy().reshape(*maps.shape[:2], -1), maps.shape[3]
    index = flat.argmax(2)
    return np.stack((index % width, index // width), 2).astype(np.float32), flat.max(2)


def calls_of(operator, inputs, cuda):
    """The calls to time, by provider."""
    def compiled(**mode):
        return call_of(operator, reference, inputs, lambda f: torch.compile(f, dynamic=False, **mode))
    triton, eager = (call_of(operator, module, inputs) for module in (kernels, reference))
    calls = {"triton": triton, GRAPH: triton, "eager": eager, "torch.compile": compiled()}
    if cuda:
        calls["torch.compile, reduce-overhead"] = compiled(mode="reduce-overhead")
    if operator == "heatmap_argmax":
        calls["torch.max"] = lambda: inputs[0].flatten(2).max(2)
        calls["NumPy"] = lambda: decode_on_host(inputs[0])
    return calls


def error_of(operator, inputs):
    """The worst difference from the float64 reference: (by what is allowed, difference, allowed).

    Allowed: none for the argmax; 1e-5 for the mean confidence, for what rectify returns, and in cells for the
    soft-argmax, times side / 64 beyond 64; for its gradient 1e-4 of the largest, and the rounding of a dtype
    below float32; 1e-5 rad for distances, and for how far from gamma a wrong pair is.
    """
    exact = [value.detach().cpu() if torch.is_tensor(value) else value for value in inputs]
    exact = [value.double() if getattr(value, "dtype", None) in DTYPES else value for value in exact]
    ours = call_of(operator, kernels, inputs)()
    if operator.startswith("similar"):
        gamma, *poses = exact
        distance, found = reference.triplet_angle_distance(*poses), ours.cpu()
        if operator != "similar_mask":
            pairs = found[found[:, 0] >= 0]
            found = torch.zeros(distance.shape, dtype=torch.bool)
            found[pairs[:, 0], pairs[:, 1]] = True
            if not torch.equal(found.nonzero(), pairs):   # each pair once, row after row
                return math.inf, math.inf, 1e-5
        error = ((distance - gamma).abs() * (found != (distance < gamma))).nan_to_num(0.0).max().item()
        return error / 1e-5, error, 1e-5
    true = call_of(operator, reference, exact)()
    ours, true = (result if isinstance(result, tuple) else (result,) for result in (ours, true))
    allowed = [1e-5] * len(true)
    if operator.startswith("heatmap_argmax"):
        allowed[:2] = 0.0, 0.0
    elif operator == "soft_argmax":
        allowed[0] *= max(1, max(inputs[0].shape[2:]) / 64)
    elif operator == "soft_argmax_gradient":
        rounding = 0.0 if inputs[0].dtype == torch.float32 else torch.finfo(inputs[0].dtype).eps / 2
        allowed[0] = (1e-4 + rounding) * true[0].nan_to_num(0.0).abs().max().item()
    worst = []
    for our, their, limit in zip(ours, true, allowed):
        our = our.detach().cpu().double()
        same = (our == their) | (our.isnan() & their.isnan())
        error = torch.where(same, 0.0, (our - their).abs()).nan_to_num(math.inf).max().item()
        worst.append((error / (limit or 1e-300), error, limit))
    return max(worst)


class Clock:
    """Times calls on one device; on CUDA it owns the buffer that displaces the cache."""

    def __init__(self, device, seconds):
        self.device, self.cuda, self.seconds = device, device.type == "cuda", seconds
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.ones(max(cache, 1 << 25), device=device)   # numbers of 4 bytes

    def between_events(self, call):
        """Seconds of the device for a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    samples, end = [], time.perf_counter() + seconds
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
    """Best rates of reading, writing and copying (read plus write) large tensors, bytes/s, and of a float32
    matrix product, operations/s; on CUDA, microseconds of an empty kernel."""
    numbers, n = (1 << 28, 8192) if clock.cuda else (1 << 26, 2048)   # 1 GB
    source, target = torch.ones(2, numbers, device=clock.device)
    factor = torch.rand(n, n, device=clock.device)
    readings = source.sum, source.amax, lambda: source.view(4096, -1).amax(1)
    launch = common.Launch(empty_kernel, (1,), (), {}) if clock.cuda and common.HAVE_TRITON else None
    return dict(read=4 * numbers / min(map(clock.best, readings)),
                write=4 * numbers / clock.best(lambda: target.fill_(2.0)),
                copy=8 * numbers / clock.best(lambda: target.copy_(source)),
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
    """Fill `row["providers"]` with a dict for each provider, and `row["speedup"]`, of Triton over eager."""
    row["limit, ms"], row["providers"] = limit_ms(row, limits), {}
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
    times = [row["providers"][provider].get("ms") for provider in ("triton", "eager")]
    row["speedup"] = times[1] / times[0] if all(times) else None


@contextmanager
def no_launches():
    """Operators on CPU tensors prepare launches as for a GPU and launch nothing: results are arbitrary."""
    with (mock.patch.object(common, "INTERPRET", True),
          mock.patch.object(common.Launch, "__call__", lambda launch, *pointers: (*pointers, *launch.fixed)),
          mock.patch.object(reference, "check_indices", lambda triplets, keypoints: None)):
        yield


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

    generator, lines = torch.Generator(device).manual_seed(seed), []
    for row, inputs in (case for operator in operators for case in cases(operator, plan, generator)):
        pair = [call_of(row["operator"], module, inputs) for module in (kernels, reference)]
        ours, eager = (1e6 * np.min(repeat(lambda: [turn(call) for call in pair], seconds), axis=0)).tolist()
        lines.append({"operator": row["operator"], "size": row["size"], "operator, us": ours,
                      "eager, us": eager, "operator / eager": ours / eager})
    return lines


def short(value):
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6f}" if 0 < value < 0.001 else f"{value:.3g}"


def print_table(title, lines):
    """Lines, which are dicts of the same columns, as a table in Markdown."""
    print(f"\n## {title}\n")
    for cells in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)):
        cells = [short(cell) if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells)} |", flush=True)


def line_of(row, cuda):
    """The line of a measured row."""
    cells, line = row["providers"], {name: row[name] for name in ("size", "dtype", "layout", "limit, ms")}
    for provider, cell in cells.items():
        line[f"{provider}: ms (% of limit), {timing_of(provider, cuda)}"] = (
            cell.get("skipped") or f"{short(cell['ms'])} ({short(100 * cell['share'])})")
    if cuda:
        line |= {f"extra MB, {p}": cells[p].get("extra_bytes", math.nan) / 1e6 for p in ("triton", "eager")}
    return line | {"eager / triton": row["speedup"] or "not measured"}


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


def main(arguments=None, plan=None):
    """Run the benchmark; returns the exit status: 1 if an operator is wrong. `plan`: in place of FULL."""
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", allow_abbrev=False,
                                     description="Check the operators, then time them against PyTorch.")
    parser.error = lambda message: parser.exit(2, f"{message} (--help lists the options)\n")
    parser.add_argument("--quick", action="store_true", help="only the sizes of training, measured shortly")
    parser.add_argument("--only", choices=OPERATORS, metavar="NAME", help="one of " + ", ".join(OPERATORS))
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs [default: 0]")
    options = parser.parse_args(arguments)
    if common.INTERPRET:
        parser.exit(2, "Triton's interpreter is on, whose time would say nothing: unset TRITON_INTERPRET\n")
    plan, seed = plan or (STEP if options.quick else FULL), options.seed
    operators = [options.only] if options.only else list(OPERATORS)
    device, cpu = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.device("cpu")
    torch._logging.set_logs(dynamo=logging.ERROR)   # the reference's checks look at values: a graph break
    clock = Clock(device, plan.seconds)
    limits = measure_limits(clock)
    if not clock.cuda:
        print("No CUDA device: the Triton columns are not measured; its interpreter's time says nothing.")
    facts = header(device, seed)   # the clocks after some work
    facts |= {f"{name}, GB/s": limits[name] / 1e9 for name in ("read", "write", "copy")}
    facts |= {"float32 product, GFLOP/s": limits["fp32"] / 1e9, "empty kernel, us": limits["launch_us"]}
    print_table("What ran where, and the limits measured there",
                [dict(what=what, value=value) for what, value in facts.items()])

    checks = []
    for operator in operators:
        errors = [(*error_of(operator, inputs), f"{row['size']} {row['dtype']} {row['layout']}")
                  for row, inputs in cases(operator, CHECK, torch.Generator(device).manual_seed(seed))]
        excess, error, allowed, at = max(errors)
        if excess > 1:
            print(f"{operator} is wrong for {at}: error {error:.3g}, allowed {allowed:.3g}; repeat it with "
                  f"--only {operator} --seed {seed}", file=sys.stderr)
            return 1
        checks.append(dict(operator=operator, error=f"{error:.2g}", allowed=f"{allowed:.2g}", at=at))
    print_table("Largest errors against the float64 reference", checks)

    for operator in operators:
        rows = []
        for row, inputs in cases(operator, plan, torch.Generator(device).manual_seed(seed)):
            measure_row(row, calls_of(operator, inputs, clock.cuda), clock, limits)
            rows.append(row)
        print_table(operator, [line_of(row, clock.cuda) for row in rows])
    if common.HAVE_TRITON:
        with nullcontext() if clock.cuda else no_launches():
            lines = host_times(operators, STEP if clock.cuda else TINY, device, seed, 4 * plan.seconds, 10)
        print_table("Host time of a call" + ", launches doing nothing" * (not clock.cuda), lines)
    print_table("On CPU tensors: the operator over its reference called directly",
                host_times(operators, STEP, cpu, seed, 4 * plan.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
