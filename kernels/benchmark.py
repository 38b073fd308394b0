"""Measures the operators against plain PyTorch:  python -m kernels.benchmark

For each operator a table over sizes, dtypes and layouts, with one column for each provider:

    triton         the operators of this package on CUDA tensors
    eager          the same functions in plain PyTorch, `kernels.reference`
    torch.compile  the reference compiled, with static shapes
    NumPy          argmax only: as the field's published code decodes, on the host. The copy from the device
                   is counted; the results stay on the host, as they do there.

A cell holds the median time, the effective rate (useful bytes or operations, see `heatmap_work` and
`pose_work`, by that time), its share of the device's limit, and the peak of extra memory, outputs included.
The limits are measured in the same run: the best bandwidth of large copies, bytes read and written, taken as
the limit of reading alone and writing alone too; and the fp32 rate of a large matrix product without TF32. A
product counts a multiply-add as two operations, which Eq. 7's difference, square and sum can be only in part:
three quarters of that rate is all it can reach. Where an operator has both bytes and operations, the limit is
that of the two which binds.

Time on CUDA is the device's: the median between two events around one call, its data not in the cache (a
buffer of twice the L2 cache is written first), queued while that buffer is being written, so that the
latency of its launches does not show. Where the host is what limits, the latency does count: the columns
"call" hold the wall time of one call in a long series, Python included. On the CPU the wall time of a call
with warm caches is all there is. Triton's interpreter is never timed.

Before anything is timed, each operator is checked on fresh random inputs against the float64 reference; one
that fails ends the run with status 1. A last table holds what calling an operator on CPU tensors costs over
calling its reference directly.
"""
import argparse
import json
import logging
import math
import os
import platform
import secrets
import statistics
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import kernels
from kernels import common, reference

HEATMAP_OPERATORS = ["heatmap_argmax", "soft_argmax", "soft_argmax_gradient"]
POSE_OPERATORS = ["triplet_angle_distance", "similar_pairs"]
OPERATORS = HEATMAP_OPERATORS + POSE_OPERATORS
TITLES = {"heatmap_argmax": "heatmap_argmax", "soft_argmax": "soft_argmax, forward",
          "soft_argmax_gradient": "soft_argmax, forward and backward",
          "triplet_angle_distance": "triplet_angle_distance", "similar_pairs": "similar_pairs"}
PROVIDERS = {"triton": "triton", "eager": "eager", "compile": "torch.compile", "numpy": "NumPy"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
BODY, HAND = (32, 16, 64, 64), (32, 21, 64, 64)  # the paper's batches of heatmaps (B, K, H, W)
SKELETONS = [(16, 16), (14, 21)]  # triplets A and keypoints K of body and hand
BETA = 10.0  # inverse temperature of the soft-argmax; its value does not matter for the time
MIN_TRIPLETS = 4
SIMILAR = 0.01  # part of the pairs below gamma, about what choosing similar poses keeps


@dataclass
class Plan:
    """What to measure and for how long."""
    heatmaps: list     # (shape, dtype, layout) of each row
    poses: list        # (S = T, masked) of each row, rising, for both skeletons; masked: a tenth is not valid
    seconds: float     # spent on a cell, about
    patience: float    # seconds for one call, above which a cell is left out


FULL = Plan([(shape, dtype, layout) for shape in (BODY, (1024, 16, 64, 64)) for dtype in DTYPES
             for layout in LAYOUTS]
            + [(shape, torch.float32, "contiguous")
               for shape in (HAND, (64, 16, 256, 256), (4, 16, 1024, 1024))],
            [(32, False), (256, False), (1024, False), (4096, False), (4096, True), (16384, False),
             (65536, False)], seconds=0.5, patience=20.0)
QUICK = Plan([(BODY, torch.float32, "contiguous"), (BODY, torch.bfloat16, "channels-last"),
              ((256, 16, 64, 64), torch.float32, "contiguous")],
             [(32, False), (512, False), (512, True), (2048, False)], seconds=0.1, patience=2.0)


class CheckFailed(Exception):
    """An operator's result is not the reference's."""


# Inputs and the work on them -------------------------------------------------------------------------------

def heatmap_work(operator, shape, itemsize):
    """Useful bytes of an operator on heatmaps (B, K, H, W): the maps once, or for forward and backward the
    maps twice (the coordinates are needed before the gradient) and the gradient. The coordinates do not
    count."""
    return math.prod(shape) * itemsize * (3 if operator == "soft_argmax_gradient" else 1)


def pose_work(operator, S, T, A):
    """Useful bytes and operations for S source and T target poses with A triplets.

    Eq. 7 takes a difference, a square and a sum for each pair and triplet; the angles, of which there are
    S + T times A, do not count. Written are the matrix in float32, or the nominal SIMILAR of all pairs as two
    int64.
    """
    written = 4 * S * T if operator == "triplet_angle_distance" else round(16 * SIMILAR * S * T)
    return written, 3 * S * T * A


def random_maps(shape, dtype, layout, generator):
    """Heatmaps (B, K, H, W) in [0, 1), on the generator's device."""
    maps = torch.rand(shape, generator=generator, device=generator.device)
    return maps.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def random_poses(S, T, A, K, generator, masked=True):
    """Arguments of the pose operators but gamma: source (S, K, 2), target (T, K, 2), triplets (A, 3),
    source_valid (S, K), target_valid (T, K), min_triplets. masked: a tenth of the keypoints is not valid;
    else there are no masks."""
    def rand(*shape):
        return torch.rand(shape, generator=generator, device=generator.device)
    triplets = rand(A, K).argsort(dim=1)[:, :3].contiguous()
    valid = rand(S + T, K) < 0.9
    masks = (valid[:S], valid[S:]) if masked else (None, None)
    return 64 * rand(S, K, 2), 64 * rand(T, K, 2), triplets, *masks, MIN_TRIPLETS


def similarity_threshold(poses):
    """gamma below which lie about SIMILAR of the pairs, from the distances among 512 poses of each side."""
    source, target, triplets, source_valid, target_valid, least = poses
    masks = (None if valid is None else valid[:512] for valid in (source_valid, target_valid))
    few = reference.triplet_angle_distance(source[:512], target[:512], triplets, *masks, least)
    return few.flatten().kthvalue(max(1, int(SIMILAR * few.numel()))).values.item()


def name_of(dtype):
    """"float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def with_gradient(soft_argmax, maps):
    """A call of `soft_argmax` and its backward pass with a random gradient (B, K, 2) of the coordinates."""
    maps = maps.detach().requires_grad_()
    weights = torch.rand((*maps.shape[:2], 2), device=maps.device)
    return lambda: torch.autograd.grad(soft_argmax(maps, BETA), maps, weights)


def decode_on_host(heatmaps):
    """The published decoding: a copy to the host, then NumPy's argmax and maximum over each flattened map."""
    heatmaps = heatmaps.float() if heatmaps.dtype == torch.bfloat16 else heatmaps  # NumPy has no bfloat16
    maps = heatmaps.cpu().numpy()
    flat = maps.reshape(*maps.shape[:2], -1)
    index, width = flat.argmax(2), maps.shape[3]
    return np.stack((index % width, index // width), 2).astype(np.float32), flat.max(2)


def implementations(operator):
    """Functions of the operator, the reference, and the reference compiled with static shapes."""
    name = "soft_argmax" if operator == "soft_argmax_gradient" else operator
    plain = getattr(reference, name)
    return {"triton": getattr(kernels, name), "eager": plain, "compile": torch.compile(plain, dynamic=False)}


def heatmap_case(operator, maps, layout):
    """A row of the tables (dict) and, by provider, the calls to time: on heatmaps (B, K, H, W)."""
    calls = {}
    for provider, function in implementations(operator).items():
        if operator == "heatmap_argmax":
            calls[provider] = lambda function=function: function(maps)
        elif operator == "soft_argmax":
            calls[provider] = lambda function=function: function(maps, BETA)
        else:
            calls[provider] = with_gradient(function, maps)
    if operator == "heatmap_argmax":
        calls["numpy"] = lambda: decode_on_host(maps)
    coords = 4 * math.prod(maps.shape[:2]) * (3 if operator == "heatmap_argmax" else 2)
    output = maps.nbytes if operator == "soft_argmax_gradient" else coords
    work = heatmap_work(operator, maps.shape, maps.element_size())
    # Differences, probabilities and gradients in float32, at most six at a time.
    return dict(operator=operator, shape=list(maps.shape), dtype=name_of(maps.dtype), layout=layout,
                useful_bytes=work, operations=0, output_bytes=output, eager_bytes=24 * maps.numel()), calls


def pose_case(operator, poses):
    """A row of the tables (dict) and, by provider, the calls to time: on the arguments of `random_poses`."""
    S, T, A, K, masked = len(poses[0]), len(poses[1]), len(poses[2]), poses[0].shape[1], poses[3] is not None
    if operator == "similar_pairs":
        poses = (*poses[:3], similarity_threshold(poses), *poses[3:])
    calls = {provider: lambda function=function: function(*poses)
             for provider, function in implementations(operator).items()}
    useful_bytes, operations = pose_work(operator, S, T, A)
    # For each pair and triplet two differences in float32, a mask, and what summing them takes. The reference
    # of the similar pairs has a block of rows at a time, some tens of MB.
    eager_bytes = 10 * S * T * A if operator == "triplet_angle_distance" else useful_bytes
    return dict(operator=operator, shape=[S, T, A, K], dtype="float32",
                layout="masks" if masked else "no masks",
                useful_bytes=useful_bytes, operations=operations, output_bytes=useful_bytes,
                eager_bytes=eager_bytes), calls


def cases(operator, plan, generator):
    """The rows of an operator's table and their calls, one at a time so that one lies in memory."""
    if operator in HEATMAP_OPERATORS:
        for shape, dtype, layout in plan.heatmaps:
            yield heatmap_case(operator, random_maps(shape, dtype, layout, generator), layout)
    else:
        for A, K in SKELETONS:
            for S, masked in plan.poses:
                yield pose_case(operator, random_poses(S, S, A, K, generator, masked))


# Correctness -----------------------------------------------------------------------------------------------

def check_heatmaps(operator, generator):
    """Yields (case, largest error, allowed) on maps of the paper's sizes, of random sides, and large ones.

    Allowed: nothing for the argmax (the error is the number of maps that differ); 1e-5 cells, times side / 64
    beyond 64 cells, for the soft-argmax; for its gradient 1e-4 of the largest, and half a unit in the last
    place of a dtype below float32.
    """
    sides = torch.randint(2, 90, (4,), generator=generator, device=generator.device).tolist()
    for shape in BODY, HAND, (1 + sides[0] % 4, 1 + sides[1] % 24, *sides[2:]), (1, 2, 1024, 1024):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                maps = random_maps(shape, dtype, layout, generator)
                if operator == "heatmap_argmax":
                    maps[:, ::2] = (8 * maps[:, ::2]).round() / 8  # ties, of which the first counts
                exact = maps.double().cpu()
                name = f"{tuple(shape)} {name_of(dtype)} {layout}"
                if operator == "heatmap_argmax":
                    coords, confidence = kernels.heatmap_argmax(maps)
                    true_coords, true_confidence = reference.heatmap_argmax(exact)
                    wrong = (coords.cpu() != true_coords).any(2) | (confidence.cpu() != true_confidence)
                    yield name, wrong.sum().item(), 0.0
                elif operator == "soft_argmax":
                    error = kernels.soft_argmax(maps, BETA).cpu() - reference.soft_argmax(exact, BETA)
                    yield name, error.abs().max().item(), 1e-5 * max(1, max(shape[2:]) / 64)
                else:
                    weights = torch.rand((*shape[:2], 2), generator=generator, device=generator.device)
                    maps, exact = maps.requires_grad_(), exact.requires_grad_()
                    grad, = torch.autograd.grad(kernels.soft_argmax(maps, BETA), maps, weights)
                    true, = torch.autograd.grad(reference.soft_argmax(exact, BETA), exact,
                                                weights.double().cpu())
                    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
                    error = (grad.cpu() - true).abs().max() / true.abs().max()
                    yield name, error.item(), 1e-4 + rounding


def check_poses(operator, generator):
    """Yields (case, largest error, allowed): 1e-5 rad for the distances, inf in the same places; for the
    similar pairs, that many radians from gamma at most for a pair that is missing or too many."""
    for A, K in SKELETONS:
        for S, T in (32, 32), (33, 65), (300, 257):
            poses = random_poses(S, T, A, K, generator)
            exact = [value.cpu().double() if torch.is_tensor(value) and value.is_floating_point()
                     else value.cpu() if torch.is_tensor(value) else value for value in poses]
            distance = reference.triplet_angle_distance(*exact)
            name = f"S = {S}, T = {T}, A = {A}, K = {K}"
            if operator == "triplet_angle_distance":
                ours = kernels.triplet_angle_distance(*poses).cpu()
                error = torch.where(ours == distance, 0.0, (ours - distance).abs())  # inf equals inf
                yield name, error.max().item(), 1e-5
                continue
            gamma = similarity_threshold(exact)
            pairs = kernels.similar_pairs(*poses[:3], gamma, *poses[3:]).cpu()
            found = torch.zeros((S, T), dtype=torch.bool)
            found[pairs[:, 0], pairs[:, 1]] = True
            wrong = found != (distance < gamma)
            ordered = torch.equal(found.nonzero(), pairs)  # each pair once, row after row
            yield name, (distance - gamma)[wrong].abs().amax().item() if wrong.any() else 0.0, 1e-5
            yield name + ", order of the pairs", 0.0 if ordered else 1.0, 0.0


def check(operator, device, seed):
    """The worst of the operator's checks, as a dict. Raises CheckFailed for an error beyond the allowed."""
    generator = torch.Generator(device).manual_seed(seed)
    results = list((check_heatmaps if operator in HEATMAP_OPERATORS else check_poses)(operator, generator))
    for case, error, allowed in results:
        if not error <= allowed:  # a NaN fails too
            raise CheckFailed(f"{TITLES[operator]} is wrong for {case}: error {error:.3g}, allowed "
                              f"{allowed:.3g}; repeat it with --only {operator} --seed {seed}")
    case, error, allowed = max(results, key=lambda result: result[1] / (result[2] or 1.0))
    return dict(operator=operator, cases=len(results), largest_error=error, allowed=allowed, at=case)


# Time and memory -------------------------------------------------------------------------------------------

class Clock:
    """Times calls on one device; on CUDA it owns the buffer that displaces the cache."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(2 * cache, 1 << 26), dtype=torch.uint8, device=device)
            self.buffer_seconds = min(self.between_events(self.buffer.zero_, 0) for _ in range(10))

    def between_events(self, call, displacements):
        """Seconds of the device for a call, queued behind so many writes of the buffer."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(displacements):
            self.buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def once(self, call):
        """Seconds that a call takes from the host's side, and that issuing it takes."""
        self.wait()
        start = time.perf_counter()
        call()
        issued = time.perf_counter() - start
        self.wait()
        return time.perf_counter() - start, issued

    def wait(self):
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, call):
        """Median and quartiles (ms) of a call that ran before; on CUDA also the time of a call in a series
        (ms) and the peak of extra memory (bytes)."""
        if self.device.type == "cpu":
            return summary(repeat(lambda: self.once(call)[0], self.seconds))
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        whole, issued = self.once(call)
        extra = torch.cuda.max_memory_allocated(self.device) - before
        # Enough writes of the buffer that the host has issued the whole call before they end.
        displacements = min(200, 1 + math.ceil(1.5 * issued / self.buffer_seconds))
        times = repeat(lambda: self.between_events(call, displacements), self.seconds)
        series = max(1, min(1000, int(self.seconds / 3 / whole)))

        def calls():
            for _ in range(series):
                call()
        per_call = [self.once(calls)[0] / series for _ in range(3)]
        return summary(times) | dict(call_ms=1000 * statistics.median(per_call), extra_bytes=extra)


def repeat(sample, seconds):
    """Samples taken until `seconds` have passed: at least three, at most a thousand."""
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or len(samples) < 1000 and time.perf_counter() < end:
        samples.append(sample())
    return samples


def summary(times):
    """Median and quartiles in milliseconds of times in seconds."""
    low, median, high = statistics.quantiles([1000 * t for t in times], n=4, method="inclusive")
    return dict(ms=median, quartiles=[low, high], repetitions=len(times))


def measure_limits(clock):
    """Best bandwidth of a large copy, bytes read and written (bytes/s), and the fp32 rate of a matrix product
    of side n, 2 n^3 operations (operations/s)."""
    cuda = clock.device.type == "cuda"
    numbers, n = (1 << 28, 8192) if cuda else (1 << 26, 2048)
    seconds = (lambda call: clock.between_events(call, 0)) if cuda else (lambda call: clock.once(call)[0])
    source, target = torch.ones(2, numbers, device=clock.device)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(8))
    torch.set_float32_matmul_precision("highest")  # no TF32
    factor = torch.rand(n, n, device=clock.device)
    product = torch.empty_like(factor)
    mm = min(seconds(lambda: torch.mm(factor, factor, out=product)) for _ in range(4))
    return dict(copy_bytes_per_second=8 * numbers / copy, fp32_operations_per_second=2 * n**3 / mm)


def free_memory(device):
    """Bytes that a cell may take: nine tenths of a GPU's free memory, a quarter of the host's (4 GB where the
    system does not tell)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4e9
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0]) / 4


def why_skipped(row, provider, device, patience, pace):
    """Why this cell is not to be measured, or None. `pace`: seconds per pair of poses of the row before."""
    if provider == "triton" and not (device.type == "cuda" and common.HAVE_TRITON):
        return "not measured"
    # The compiler may merge the temporaries away. If not, a GPU says so; the host would run out of memory.
    merged = provider == "triton" or provider == "compile" and device.type == "cuda"
    need = row["output_bytes"] + (0 if merged else row["eager_bytes"])
    if need > free_memory(device):
        return f"needs {short(need / 1e9)} GB"
    seconds = pace * row["shape"][0] * row["shape"][1]
    if seconds > patience:
        return f"about {short(seconds)} s a call"
    return None


def measure_row(row, calls, clock, limits, patience, paces):
    """Fill `row["providers"]` with a dict for each provider, and `row["speedup"]`, of Triton over eager.

    `paces` holds the seconds per pair of poses at the size before, by provider and triplets, and is updated.
    """
    row["providers"] = {}
    least = max(row["useful_bytes"] / limits["copy_bytes_per_second"],
                row["operations"] / limits["fp32_operations_per_second"])
    for provider, call in calls.items():
        series = (row["operator"], provider, row["shape"][2])
        reason = why_skipped(row, provider, clock.device, patience, paces.get(series, 0.0))
        if reason:
            row["providers"][provider] = dict(skipped=reason)
            continue
        try:
            if provider == "compile":
                torch.compiler.reset()  # else the rows would reach the limit of recompilations
            call()
            cell = clock.measure(call)
        except torch.OutOfMemoryError:
            cell = dict(skipped="out of memory")
        except Exception as error:  # whatever a compiler that is missing or fails may raise
            if provider != "compile":
                raise
            first = textwrap.shorten(str(error).strip().split("\n")[0], 60, placeholder=" ...")
            cell = dict(skipped=f"failed: {first}", error=str(error))
        else:
            seconds = cell["ms"] / 1000
            cell |= dict(gb_per_second=row["useful_bytes"] / seconds / 1e9,
                         gflop_per_second=row["operations"] / seconds / 1e9, share=least / seconds)
            pairs = row["shape"][0] * row["shape"][1]
            if row["operations"] and pairs >= 2 ** 16:   # below, what a call costs hides what a pair does
                paces[series] = cell["quartiles"][0] / 1000 / pairs
        row["providers"][provider] = cell
    times = [row["providers"][provider].get("ms") for provider in ("triton", "eager")]
    row["speedup"] = times[1] / times[0] if all(times) else None


def dispatch_cost(operators, seed, seconds):
    """What an operator on CPU tensors costs over its reference: a dict for each, at the paper's sizes.

    The two are called in turn, the order changing, and the ratio is the median of the ratios call by call:
    what slows the machine down slows both.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for operator in operators:
        if operator in HEATMAP_OPERATORS:
            maps = random_maps(BODY, torch.float32, "contiguous", generator)
            inputs = [heatmap_case(operator, maps, "contiguous")]
        else:
            inputs = [pose_case(operator, random_poses(32, 32, A, K, generator)) for A, K in SKELETONS]
        clock = Clock(torch.device("cpu"), seconds)
        for row, calls in inputs:
            turn = [calls["triton"], calls["eager"]]  # on CPU tensors the operator runs no Triton
            clock.once(turn[0]), clock.once(turn[1])

            def pair():
                turn.reverse()
                times = {call: clock.once(call)[0] for call in turn}
                return times[calls["triton"]], times[calls["eager"]]
            times = repeat(pair, seconds)
            ratios = statistics.quantiles([ours / plain for ours, plain in times], n=4, method="inclusive")
            rows.append(dict(operator=operator, shape=row["shape"], repetitions=len(times), ratio=ratios[1],
                             quartiles=[ratios[0], ratios[2]],
                             operator_ms=1000 * statistics.median(ours for ours, _ in times),
                             reference_ms=1000 * statistics.median(plain for _, plain in times)))
    return rows


# Tables --------------------------------------------------------------------------------------------------

def short(value):
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6f}" if 0 < value < 0.001 else f"{value:.3g}"


def shape_text(row):
    """The sizes of a row in a few characters."""
    if row["operator"] in POSE_OPERATORS:
        S, T, A, K = row["shape"]
        return f"S = T = {S:,}, A = {A}, K = {K}"
    return "x".join(map(str, row["shape"]))


def cell_text(row, cell):
    """A cell of a table: time, rate, share of the limit and memory, or why there is none."""
    if "skipped" in cell:
        return cell["skipped"]
    rate = cell["gflop_per_second"] if row["operations"] else cell["gb_per_second"]
    extra = short(cell["extra_bytes"] / 1e6) if "extra_bytes" in cell else "-"
    return f"{short(cell['ms'])} · {short(rate)} · {short(100 * cell['share'])} · {extra}"


def table(head, lines):
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def operator_table(rows, cuda):
    """The table of one operator."""
    rate = "GFLOP/s" if rows[0]["operations"] else "GB/s"
    providers = list(rows[0]["providers"])
    head = ["shape", "dtype", "layout", "output MB"]
    head += [f"{PROVIDERS[p]}: ms · {rate} · % of limit · extra MB" for p in providers]
    head += ["call, triton: ms", "call, eager: ms"] * cuda + ["triton over eager"]
    lines = []
    for row in rows:
        line = [shape_text(row), row["dtype"], row["layout"], short(row["output_bytes"] / 1e6)]
        line += [cell_text(row, row["providers"][p]) for p in providers]
        calls = [row["providers"][p].get("call_ms") for p in ("triton", "eager")]
        line += [short(call) if call else "-" for call in calls] * cuda
        missing = "not measured" if "skipped" in row["providers"]["triton"] else "-"
        lines.append(line + [f"{short(row['speedup'])}x" if row["speedup"] else missing])
    return table(head, lines)


def header(device, limits, seed):
    """What ran where, for the report."""
    return dict(device=common.device_name(device), cuda=device.type == "cuda",
                threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                triton=common.triton.__version__ if common.HAVE_TRITON else None, seed=seed, **limits)


def show_progress(done, total, start, what):
    """On a terminal, a line that says how far it is and how long it may take; it is wiped when done."""
    if sys.stderr.isatty():
        spent = time.monotonic() - start
        left = f", about {spent / done * (total - done):.0f} s left" if done else ""
        line = f"{done}/{total} {what}{left}" if done < total else ""
        print("\r" + line.ljust(100), end="\r", file=sys.stderr, flush=True)


# Command line ----------------------------------------------------------------------------------------------

def writable_file(text):
    """The path of a file to be written; ArgumentTypeError, before the long run, where that would fail."""
    path = Path(text)
    try:
        if path.is_dir():
            raise OSError("it is a directory")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror or error}") from None
    return path


def main(arguments=None, plan=None):
    """Run the benchmark; returns the exit status: 1 if an operator is wrong. `plan`: in place of FULL."""
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", allow_abbrev=False,
                                     description="Check the operators, then time them against PyTorch.")
    parser.error = lambda message: parser.exit(2, f"{message} (--help lists the options)\n")
    parser.add_argument("--quick", action="store_true", help="few sizes, measured shortly: about a minute")
    parser.add_argument("--only", choices=OPERATORS, metavar="NAME", help="one of " + ", ".join(OPERATORS))
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--seed", type=int, help="of the random inputs [default: a new one]")
    options = parser.parse_args(arguments)
    if common.INTERPRET:
        parser.exit(2, "Triton's interpreter is on, whose time would say nothing: unset TRITON_INTERPRET\n")
    plan = plan or (QUICK if options.quick else FULL)
    operators = [options.only] if options.only else OPERATORS
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    seed = secrets.randbits(31) if options.seed is None else options.seed
    # Graph breaks and the like; a compilation that fails says so in its cell.
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.CRITICAL)
    if device.type == "cpu":
        print("No CUDA device: the Triton column is not measured (its interpreter's time would say nothing).")
    clock = Clock(device, plan.seconds)
    result = dict(header=header(device, measure_limits(clock), seed), checks=[], rows=[], dispatch=[])
    facts = result["header"]
    print(f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}, Triton {facts['triton']}, "
          f"Python {facts['python']}; seed {seed}")
    print(f"Limits, measured: copy {short(facts['copy_bytes_per_second'] / 1e9)} GB/s, "
          f"fp32 {short(facts['fp32_operations_per_second'] / 1e9)} GFLOP/s")

    try:
        result["checks"] = [check(operator, device, seed) for operator in operators]
    except CheckFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("\n## Largest errors against the float64 reference\n")
    print(table(["operator", "cases", "largest error", "allowed", "at"],
                [[TITLES[c["operator"]], c["cases"], f"{c['largest_error']:.2g}", f"{c['allowed']:.2g}",
                  c["at"]] for c in result["checks"]]))
    total = sum(len(plan.heatmaps) if operator in HEATMAP_OPERATORS else len(SKELETONS) * len(plan.poses)
                for operator in operators)
    start = time.monotonic()
    for operator in operators:
        rows, paces = [], {}
        for row, calls in cases(operator, plan, torch.Generator(device).manual_seed(seed)):
            show_progress(len(result["rows"]), total, start, f"{TITLES[operator]} {shape_text(row)}")
            measure_row(row, calls, clock, facts, plan.patience, paces)
            rows.append(row)
            result["rows"].append(row)
        show_progress(total, total, start, "")
        print(f"\n## {TITLES[operator]}\n\n{operator_table(rows, device.type == 'cuda')}", flush=True)
    result["dispatch"] = dispatch_cost(operators, seed, 4 * plan.seconds)
    print("\n## On CPU tensors: the operator over its reference called directly\n")
    print(table(["operator", "shape", "operator ms", "reference ms", "ratio (median)", "quartiles"],
                [[TITLES[d["operator"]], shape_text(d), short(d["operator_ms"]), short(d["reference_ms"]),
                  f"{d['ratio']:.3f}", " - ".join(f"{q:.3f}" for q in d["quartiles"])]
                 for d in result["dispatch"]]))
    if options.json:
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
