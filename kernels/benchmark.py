"""Measures the operators against plain PyTorch:  python -m kernels.benchmark

A table for each operator, and for three ways to call one (soft_argmax_gradient: forward and backward;
similar_mask: triplet_angle_distance < gamma, the training step's; similar_pairs_capacity: without waiting for
their number), over sizes, dtypes and layouts. A column is a provider (`triton`; the same in a CUDA graph;
`eager`, which is `kernels.reference`; torch.compile of that; torch.max without coordinates; the field's
published NumPy, with the copy to the host) and how it is timed:

    cold cache, GPU time   Between two events around one call. A buffer of four L2 caches is read before, so
                           neither the data nor writes still to be made are in the cache, and the call is
                           queued meanwhile, so the host's time does not show. Triton's own `do_bench` leaves
                           its writes in the cache and counts the host's time where that is longer.
    warm cache, GPU time   `triton.testing.do_bench_cudagraph`: calls in a row, in one graph
    warm cache, host time  `torch.utils.benchmark.Timer`: wall time, with all that the call has to do

A cell holds the median time and the limit's share of it in per cent. The limit is the time of what must be
read plus that of what must be written, or of the arithmetic if longer, at rates measured in the same run.

Then follows the host time of a call alone, what a small batch costs: on CUDA until the call returns, the
queue empty; else on tiny CPU tensors with launches that do nothing. The last table says what an operator on
CPU tensors, where it runs its reference, costs over that. Before anything is timed, each operator is checked
against the float64 reference; one that fails ends the run with status 1. Triton's interpreter is never timed.
"""
import argparse
import logging
import math
import platform
import secrets
import subprocess
import sys
import textwrap
import time
import timeit
from contextlib import contextmanager, nullcontext
from pathlib import Path
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
    "similar_pairs": lambda m, gamma, *poses: m.similar_pairs(*poses[:3], gamma, *poses[3:]),
    "similar_pairs_capacity": lambda m, gamma, *poses: m.similar_pairs(
        *poses[:3], gamma, *poses[3:], capacity_for(len(poses[0]), len(poses[1])))}
OPERATORS = HEATMAP_OPERATORS | POSE_OPERATORS
PROVIDERS = {"triton": "triton", "graph": "triton, CUDA graph", "eager": "eager", "compile": "torch.compile",
             "reduce": "torch.compile, reduce-overhead", "max": "torch.max", "numpy": "NumPy"}
COLD, WARM, HOST = "cold cache, GPU time", "warm cache, GPU time", "warm cache, host time"
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
    heatmaps: list     # (shape, dtype, layout) of each row
    poses: list        # (S, T, A, K, masked) of each row; masked: a tenth of the keypoints is not valid
    seconds: float = 0.0   # for a cell, about


FULL = Plan([(BODY, dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
            + [(shape, dtype, layout) for shape in (HAND, LARGE[0])
               for dtype in (torch.float32, torch.bfloat16) for layout in LAYOUTS]
            + [(shape, torch.float32, layout) for shape in LARGE[1:] for layout in LAYOUTS],
            [(S, S, *BODY_POSE, S == 32) for S in (32, 256, 1024, 4096, 16384, 65536)]
            + [(4096, 4096, *BODY_POSE, True), (32, 32, *HAND_POSE, True), (4096, 4096, *HAND_POSE, False)],
            seconds=0.5)
QUICK = Plan([(BODY, torch.float32, "channels-last"), (BODY, torch.bfloat16, "contiguous")],
             [(32, 32, *BODY_POSE, True), (1024, 1024, *HAND_POSE, False)], seconds=0.1)
CHECK = Plan([(shape, dtype, layout) for shape in (BODY, HAND, (5, 3, 37, 23), (1, 2, 1024, 1024))
              for dtype in DTYPES for layout in LAYOUTS],
             [(S, T, *pose, True) for pose in (BODY_POSE, HAND_POSE)
              for S, T in ((32, 32), (33, 65), (300, 257))])
STEP = Plan(QUICK.heatmaps[:1], QUICK.poses[:1])   # what training calls
TINY = Plan([((2, 4, 8, 8), torch.float32, "channels-last")], [(4, 4, *BODY_POSE, True)])


# Inputs and the work on them -------------------------------------------------------------------------------

def capacity_for(S, T):
    """Rows for the similar pairs of S source and T target poses: twice what is expected."""
    return 1 + round(2 * SIMILAR * S * T)


def work(operator, shape, itemsize=4):
    """Bytes that an operator must read, bytes that it must write, operations.

    shape: (B, K, H, W) of heatmaps, or (S, T, A, K) of S source and T target poses with A triplets. Heatmaps
    are read once, or twice for forward and backward, as the coordinates are needed before the gradient. What
    is small beside them does not count, nor do poses and angles. Eq. 7 takes a difference, a square and a sum
    for each pair and triplet. The similar pairs are nominally SIMILAR of all.
    """
    if operator in HEATMAP_OPERATORS:
        cells, gradient = math.prod(shape), operator == "soft_argmax_gradient"
        written = itemsize if gradient else 4 if operator == "rectify" else 0
        return dict(read_bytes=(1 + gradient) * itemsize * cells, written_bytes=written * cells, operations=0)
    S, T, A, _ = shape
    written = {"triplet_angle_distance": 4 * S * T, "similar_mask": S * T,
               "similar_pairs": round(16 * SIMILAR * S * T),
               "similar_pairs_capacity": 16 * capacity_for(S, T)}[operator]
    return dict(read_bytes=0, written_bytes=written, operations=3 * S * T * A)


def map_inputs(shape, dtype, layout, generator, adverse=False):
    """Heatmaps (B, K, H, W) in [0, 1), weights (B, K), gradient of the coordinates (B, K, 2). adverse: maps
    with ties, and some that hold NaN, are -inf, constant, or have a high peak."""
    maps = torch.rand(shape, generator=generator, device=generator.device)
    if adverse:
        maps[:, ::2] = (8 * maps[:, ::2]).round() / 8
        maps[0, 0, -1, 0] = maps[0, 0, 0, -1] = math.nan
        for sample, value in zip(maps[1:-1], (-math.inf, 0.5, -1.0)):
            sample[0] = value
        maps[1:, :1][-1:, :, -1, -1] = 30.0   # the last sample, if not the only one
    numbers = torch.linspace(0, 1, 2 * math.prod(shape[:2]), device=maps.device).view(*shape[:2], 2)
    return maps.to(dtype).contiguous(memory_format=LAYOUTS[layout]), numbers[..., 0].contiguous(), numbers


def pose_inputs(S, T, A, K, generator, masked=True):
    """gamma, below which lie about SIMILAR of the pairs, and the arguments of triplet_angle_distance: source
    (S, K, 2), target (T, K, 2), triplets (A, 3), source_valid (S, K), target_valid (T, K), min_triplets.
    masked: a tenth of the keypoints is not valid; else there are no masks."""
    def rand(*shape):
        return torch.rand(shape, generator=generator, device=generator.device)
    triplets = rand(A, K).argsort(dim=1)[:, :3].contiguous()
    source, target, valid = 64 * rand(S, K, 2), 64 * rand(T, K, 2), rand(S + T, K) < 0.9
    masks = (valid[:S], valid[S:]) if masked else (None, None)
    some = (mask if mask is None else mask[:512] for mask in masks)
    few = reference.triplet_angle_distance(source[:512], target[:512], triplets, *some, MIN_TRIPLETS)
    gamma = few.flatten().kthvalue(max(1, int(SIMILAR * few.numel()))).values.item()
    return gamma, source, target, triplets, *masks, MIN_TRIPLETS


def cases(operator, plan, generator):
    """Rows of an operator's table (dict) and their inputs, one at a time so that one lies in memory."""
    if operator in HEATMAP_OPERATORS:
        for shape, dtype, layout in plan.heatmaps:
            inputs = map_inputs(shape, dtype, layout, generator, adverse=plan is CHECK)
            yield dict(operator=operator, size="x".join(map(str, shape)), dtype=str(dtype)[6:], layout=layout,
                       **work(operator, shape, dtype.itemsize)), inputs
        return
    for *shape, masked in plan.poses:
        S, T, A, K = shape
        if operator == "similar_mask" and S > 32 and plan is not CHECK:   # beyond what training calls
            continue
        yield dict(operator=operator, size=f"S = {S:,}, T = {T:,}, A = {A}, K = {K}", dtype="float32",
                   layout="masks" if masked else "no masks", **work(operator, shape)
                   ), pose_inputs(*shape, generator, masked)


def call_of(operator, module, inputs, wrap=lambda function: function):
    """A call without arguments of the operator from `module` on `inputs`; `wrap`: what compiles it."""
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
    triton = call_of(operator, kernels, inputs)
    calls = dict(triton=triton, graph=triton, eager=call_of(operator, reference, inputs), compile=compiled())
    if cuda:
        calls["reduce"] = compiled(mode="reduce-overhead")
    if operator == "heatmap_argmax":
        calls |= dict(max=lambda: inputs[0].flatten(2).max(2), numpy=lambda: decode_on_host(inputs[0]))
    return calls


# Correctness -----------------------------------------------------------------------------------------------

def error_of(operator, inputs):
    """The worst difference from the float64 reference: (by what is allowed, difference, allowed).

    Allowed: none for the argmax; 1e-5 for the mean confidence, for what rectify returns, and in cells for the
    soft-argmax, times side / 64 beyond 64; for its gradient 1e-4 of the largest, and half a unit in the last
    place of a dtype below float32; 1e-5 rad for distances, and from gamma for pairs that are wrong.
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
    errors = []
    for our, their in zip(ours, true):
        our, their = our.detach().cpu().double(), their.double()
        same = (our == their) | (our.isnan() & their.isnan())
        errors.append(torch.where(same, 0.0, (our - their).abs()).nan_to_num(math.inf))
    return max((error.max().item() / (limit or 1e-300), error.max().item(), limit)
               for error, limit in zip(errors, allowed))


# Time and memory -------------------------------------------------------------------------------------------

class Clock:
    """Times calls on one device; on CUDA it owns the buffer that displaces the cache."""

    def __init__(self, device, seconds):
        self.device, self.cuda, self.seconds = device, device.type == "cuda", seconds
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.ones(max(cache, 1 << 25), device=device)   # numbers of 4 bytes
            self.flush_seconds = self.best(self.buffer.amax)

    def between_events(self, call, flushes=1):
        """Seconds of the device for a call, queued behind so many readings of the buffer."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
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
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        issued = time.perf_counter() - start
        extra = torch.cuda.max_memory_allocated() - before
        # Enough readings of the buffer that the host has issued the whole call before they end.
        flushes = min(200, 1 + math.ceil(1.5 * issued / self.flush_seconds))
        times = repeat(lambda: self.between_events(call, flushes), self.seconds)
        return dict(ms=1000 * float(np.median(times)), extra_bytes=extra)


def repeat(sample, seconds):
    """Samples taken until `seconds` have passed: at least three, at most a thousand."""
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or len(samples) < 1000 and time.perf_counter() < end:
        samples.append(sample())
    return samples


def timing_of(provider, cuda):
    """How a provider's calls are timed."""
    if provider == "graph":
        return WARM
    return COLD if provider == "triton" or cuda and provider != "numpy" else HOST


@common.triton.jit
def empty_kernel(pointer):
    """What a launch takes that has nothing to do."""
    pass


def measure_limits(clock):
    """Best rates of reading, writing and copying (its bytes twice) large tensors, in bytes/s; of a matrix
    product of side n in float32, 2 n^3 operations; on CUDA, seconds of an empty kernel."""
    numbers, n = (1 << 28, 8192) if clock.cuda else (1 << 26, 2048)   # 1 GB
    source, target = torch.ones(2, numbers, device=clock.device)
    torch.set_float32_matmul_precision("highest")   # no TF32
    factor = torch.rand(n, n, device=clock.device)
    product = torch.empty_like(factor)
    readings = source.sum, source.amax, lambda: source.view(4096, -1).amax(1)
    limits = dict(read=4 * numbers / min(map(clock.best, readings)),
                  write=4 * numbers / clock.best(lambda: target.fill_(2.0)),
                  copy=8 * numbers / clock.best(lambda: target.copy_(source)),
                  fp32=2 * n**3 / clock.best(lambda: torch.mm(factor, factor, out=product)), launch=None)
    if clock.cuda and common.HAVE_TRITON:
        launch = common.Launch(empty_kernel, (1,), (), {})
        limits["launch"] = clock.best(lambda: launch(source), 100)
    return limits


def limit_ms(row, limits):
    """The least time that a row can take. Three operations of Eq. 7 take the time of four of a product: a
    difference alone, then square and sum as one multiply-add, which a product counts as two."""
    return 1000 * max(row["read_bytes"] / limits["read"] + row["written_bytes"] / limits["write"],
                      row["operations"] / (0.75 * limits["fp32"]))


def why_skipped(row, provider, cuda):
    """Why this cell is not to be measured, or None."""
    if provider in ("triton", "graph") and not (cuda and common.HAVE_TRITON):
        return "not measured"
    if provider == "graph" and row["operator"] == "similar_pairs":
        return "waits for the GPU"
    return "too much for a CPU" if not cuda and row["operations"] > HOST_OPERATIONS else None


def measure_row(row, calls, clock, limits):
    """Fill `row["providers"]` with a dict for each provider, and `row["speedup"]`, of Triton over eager."""
    row["limit_ms"], row["providers"] = limit_ms(row, limits), {}
    for provider, call in calls.items():
        cell = dict(skipped=why_skipped(row, provider, clock.cuda))
        try:
            if not cell["skipped"]:
                torch.compiler.reset()   # else the rows would reach the limit of recompilations
                if clock.cuda:
                    torch.cuda.empty_cache()
                for _ in range(3 if provider == "reduce" else 1):   # it records its graph in the second
                    call()
                cell = clock.measure(call, timing_of(provider, clock.cuda))
                cell["share"] = row["limit_ms"] / cell["ms"]
        except torch.OutOfMemoryError:
            cell = dict(skipped="out of memory")
        except Exception as error:   # whatever a compiler that is missing, or a graph, may raise
            if provider in ("triton", "eager"):
                raise
            first = textwrap.shorten(str(error).strip().split("\n")[0], 60, placeholder=" ...")
            cell = dict(skipped=f"failed: {first}")
        row["providers"][provider] = cell
    times = [row["providers"][provider].get("ms") for provider in ("triton", "eager")]
    row["speedup"] = times[1] / times[0] if all(times) else None


@contextmanager
def no_launches():
    """Operators on CPU tensors do what they do on CUDA tensors, but launch nothing; results are arbitrary.

    Nor does anything look at the values of the triplets, in the reference neither, as on a GPU.
    """
    launches = []

    def start(launch, pointers):
        launches.append(launch)
        return lambda *arguments: None
    with mock.patch.multiple(common, INTERPRET=True, start=start), \
            mock.patch.object(reference, "check_indices", lambda triplets, keypoints: None):
        try:
            yield
        finally:
            for launch in launches:   # an operator keeps its launches: the next call starts them
                launch.run = None


def host_times(operators, plan, device, seed, seconds, calls=1):
    """What the host spends on an operator and on its reference until they return: a dict for each row.

    The two take turns of so many calls, after as many that are not timed. What disturbs a turn only lengthens
    it: the fastest counts.
    """
    def turn(call):
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return timeit.timeit(call, number=calls) / calls

    generator, rows = torch.Generator(device).manual_seed(seed), []
    for row, inputs in (case for operator in operators for case in cases(operator, plan, generator)):
        pair = [call_of(row["operator"], module, inputs) for module in (kernels, reference)]
        ours, eager = (1e6 * np.min(repeat(lambda: [turn(call) for call in pair], seconds), axis=0)).tolist()
        rows.append(row | dict(operator_us=ours, eager_us=eager, ratio=ours / eager))
    return rows


# Tables ----------------------------------------------------------------------------------------------------

def short(value):
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6f}" if 0 < value < 0.001 else f"{value:.3g}"


def print_table(title, head, lines):
    """A table in Markdown."""
    rows = ["| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines]]
    print("\n".join([f"\n## {title}\n", *rows]), flush=True)


def print_operator(rows, cuda):
    """The table of one operator."""
    head = ["size", "dtype", "layout", "limit, ms"]
    head += [f"{PROVIDERS[p]}: ms (% of limit), {timing_of(p, cuda)}" for p in rows[0]["providers"]]
    head += ["extra MB, triton", "extra MB, eager"] * cuda + ["triton over eager"]
    lines = []
    for row in rows:
        cells = row["providers"]
        times = [cell.get("skipped") or f"{short(cell['ms'])} ({short(100 * cell['share'])})"
                 for cell in cells.values()]
        extra = [short(cells[p].get("extra_bytes", math.nan) / 1e6) for p in ("triton", "eager")] * cuda
        lines.append([row["size"], row["dtype"], row["layout"], short(row["limit_ms"]), *times, *extra,
                      f"{short(row['speedup'])}x" if row["speedup"] else "not measured"])
    print_table(rows[0]["operator"], head, lines)


def print_host(title, rows):
    """A table of `host_times`."""
    print_table(title, ["operator", "size", "operator, us", "eager, us", "operator / eager"],
                [[row["operator"], row["size"], short(row["operator_us"]), short(row["eager_us"]),
                  f"{row['ratio']:.3f}"] for row in rows])


def said_by(*command):
    """What a command prints, or "unknown" where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=Path(__file__).parents[1], text=True, capture_output=True,
                              check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def header(device, seed):
    """What ran where, for the report."""
    facts = dict(device=common.device_name(device))
    if device.type == "cuda":
        names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"]
        said = said_by("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader",
                       f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}").split(", ")
        facts |= dict(zip(names, said if len(said) == len(names) else ["unknown"] * len(names)))
    return facts | {"commit": said_by("git", "describe", "--always", "--dirty", "--exclude=*"),
                    "torch": torch.__version__, "Triton": getattr(common.triton, "__version__", "none"),
                    "Python": platform.python_version(), "threads": torch.get_num_threads(), "seed": seed}


# Command line ----------------------------------------------------------------------------------------------

def main(arguments=None, plan=None):
    """Run the benchmark; returns the exit status: 1 if an operator is wrong. `plan`: in place of FULL."""
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", allow_abbrev=False,
                                     description="Check the operators, then time them against PyTorch.")
    parser.error = lambda message: parser.exit(2, f"{message} (--help lists the options)\n")
    parser.add_argument("--quick", action="store_true", help="few sizes, measured shortly: about a minute")
    parser.add_argument("--only", choices=OPERATORS, metavar="NAME", help="one of " + ", ".join(OPERATORS))
    parser.add_argument("--seed", type=int, help="of the random inputs [default: a new one]")
    options = parser.parse_args(arguments)
    if common.INTERPRET:
        parser.exit(2, "Triton's interpreter is on, whose time would say nothing: unset TRITON_INTERPRET\n")
    plan = plan or (QUICK if options.quick else FULL)
    operators = [options.only] if options.only else list(OPERATORS)
    cpu = device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    seed = secrets.randbits(31) if options.seed is None else options.seed
    # Graph breaks and the like; a compilation that fails says so in its cell.
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.CRITICAL)
    clock = Clock(device, plan.seconds)
    limits = measure_limits(clock)
    facts, checks = header(device, seed), []   # the clocks after some work
    if not clock.cuda:
        print("No CUDA device: the Triton columns are not measured; its interpreter's time says nothing.")
    rates = [(f"{name}, GB/s", short(limits[name] / 1e9)) for name in ("read", "write", "copy")]
    floor = "not measured" if limits["launch"] is None else short(1e6 * limits["launch"])
    print_table("What ran where, and the limits measured there", ["what", "value"], [
        *facts.items(), *rates, ("float32 product, GFLOP/s", short(limits["fp32"] / 1e9)),
        ("an empty Triton kernel, us of GPU time", floor)])

    for operator in operators:
        errors = [(*error_of(operator, inputs), f"{row['size']} {row['dtype']} {row['layout']}")
                  for row, inputs in cases(operator, CHECK, torch.Generator(device).manual_seed(seed))]
        excess, error, allowed, at = max(errors)
        if excess > 1:
            print(f"{operator} is wrong for {at}: error {error:.3g}, allowed {allowed:.3g}; repeat it with "
                  f"--only {operator} --seed {seed}", file=sys.stderr)
            return 1
        checks.append([operator, f"{error:.2g}", f"{allowed:.2g}", at])
    print_table("Largest errors against the float64 reference", ["operator", "error", "allowed", "at"], checks)
    for operator in operators:
        rows = []
        for row, inputs in cases(operator, plan, torch.Generator(device).manual_seed(seed)):
            if sys.stderr.isatty():
                print(f"\r{operator} {row['size']}".ljust(80), end="\r", file=sys.stderr, flush=True)
            measure_row(row, calls_of(operator, inputs, clock.cuda), clock, limits)
            rows.append(row)
        print_operator(rows, clock.cuda)
    if common.HAVE_TRITON:
        small = STEP if clock.cuda else TINY
        free = [operator for operator in operators if operator != "similar_pairs"]   # which waits for the GPU
        with nullcontext() if clock.cuda else no_launches():
            rows = host_times(free, small, device, seed, 4 * plan.seconds, 10)
        print_host("Host time of a call" + ", launches doing nothing" * (not clock.cuda), rows)
    print_host("On CPU tensors: the operator over its reference called directly",
               host_times(operators, STEP, cpu, seed, 4 * plan.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
