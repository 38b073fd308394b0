"""Heatmap argmax: the cell of each map's maximum and the value there, read from the map once.

    (x, y) = argmax h[y, x],    confidence = h[y, x],    mean = sum_k w_k confidence_k / sum_k w_k  (Eq. 4)

What it must move: every cell once, B K H W times 2 or 4 bytes, and 12 bytes a map of results. What it must
do: a comparison or two for each cell, far less than a GPU can do in the time that the bytes take. So the time
to reach is that of reading the maps; 32 x 16 x 64 x 64 floats are 8.4 MB, 2 microseconds from H200's memory.

In PyTorch this is a flattening (a copy, unless the map lies contiguous), a maximum that writes int64 indices,
a remainder, a division, a stack and conversions: eight launches, each longer than the reading. Here a program
reads a map, or several small ones, in whatever layout, and writes three floats for each. Only when there are
fewer maps than a GPU has room for, and they are large, is a map shared among programs; a second launch then
picks among their candidates. The mean confidence of a sample, which Eq. 4 re-ranks by, is over maps of
several programs: it too waits for the second launch, which reads K floats, rather than for atomic counters.

A comparison of floats knows neither ties nor NaN as torch.max does: first cell wins, and the first NaN wins
over everything. Each lane therefore keeps the best of its cells with their index, in rising order, and the
lanes are reduced to the smallest index among the NaN, or else among the equals of the maximum.
"""
from typing import Optional

import torch
from torch import Tensor

from kernels import reference
from kernels.common import (COMPILE_OPTIONS, cell_offset, device_of, divide, maps_of_program,
                            register, runs_triton, tl, triton, warps_for)


@triton.jit
def first_maximum(value, index, none):
    """Along axis 1: the index of the first NaN, else of the first maximum (index grows in no particular
    order)."""
    nan = value != value
    any_nan = tl.max(nan.to(tl.int32), axis=1)
    top = tl.max(tl.where(nan, float("-inf"), value), axis=1)
    hit = nan | ((value == top[:, None]) & (any_nan == 0)[:, None])
    return tl.min(tl.where(hit, index, none), axis=1)


@triton.jit
def store_cell(coords, confidence, maps, map_index, exists, n, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Write the cell n of each map as (x, y), and the map's value there, read again so that it is the same
    bits. Returns the value."""
    value = tl.load(maps + cell_offset(n, width, stride_h, stride_w, FLAT), mask=exists, other=0.0)
    tl.store(coords + 2 * map_index, (n % width).to(tl.float32), mask=exists)
    tl.store(coords + 2 * map_index + 1, (n // width).to(tl.float32), mask=exists)
    tl.store(confidence + map_index, value.to(tl.float32), mask=exists)
    return value.to(tl.float32)


@triton.jit
def argmax_kernel(heatmaps, coords, confidence, candidates, keypoints, cells, width, share,
                  stride_b, stride_k, stride_h, stride_w,
                  FLAT: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (block of maps, share of their cells): the maximum over the share, the result if it is all."""
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    lane = tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * share
    # Every lane keeps the best of the cells it saw, in rising order, so that > alone keeps the first of
    # equals.
    best = tl.full((BLOCK_K, BLOCK_N), float("-inf"), tl.float32)
    best_n = tl.zeros((BLOCK_K, BLOCK_N), tl.int32) + (begin + lane)[None, :]
    for start in range(begin, tl.minimum(begin + share, cells), BLOCK_N):
        n = start + lane
        inside = exists[:, None] & (n < cells)[None, :]
        offset = cell_offset(n, width, stride_h, stride_w, FLAT)
        value = tl.load(maps[:, None] + offset[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        best_n = tl.where(better, n[None, :], best_n)
    first = first_maximum(best, best_n, cells)
    if SHARED:
        tl.store(candidates + map_index * tl.num_programs(1) + tl.program_id(1), first, mask=exists)
    else:
        store_cell(coords, confidence, maps, map_index, exists, first, width, stride_h, stride_w, FLAT)


@triton.jit
def finish_kernel(heatmaps, coords, confidence, candidates, weight, mean, keypoints, cells, width, shares,
                  stride_b, stride_k, stride_h, stride_w, weight_b, weight_k,
                  FLAT: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, WEIGHTED: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (sample): the maximum among the candidates of each map's shares; the mean confidence."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    weighted = tl.zeros((BLOCK_K,), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, keypoints, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        exists = k < keypoints
        map_index = b * keypoints + k
        maps = heatmaps + b * stride_b + k.to(tl.int64) * stride_k
        if SHARED:
            inside = exists[:, None] & (s < shares)[None, :]
            n = tl.load(candidates + map_index[:, None] * shares + s[None, :], mask=inside, other=0)
            offset = cell_offset(n, width, stride_h, stride_w, FLAT)
            value = tl.load(maps[:, None] + offset, mask=inside, other=float("-inf")).to(tl.float32)
            # Lanes beyond the shares stand for -inf at cell 0, which is the result for a map of -inf all the
            # same.
            first = first_maximum(value, n, cells)
            value = store_cell(coords, confidence, maps, map_index, exists, first, width, stride_h, stride_w,
                               FLAT)
        else:
            value = tl.load(confidence + map_index, mask=exists, other=0.0)
        if MEAN:
            w = exists.to(tl.float32)
            if WEIGHTED:
                entry = weight + b * weight_b + k.to(tl.int64) * weight_k
                w = tl.load(entry, mask=exists, other=0.0).to(tl.float32)
            # A keypoint without weight does not count, whatever its map holds: NaN times 0 would.
            weighted += tl.where(w == 0.0, 0.0, w * value)
            total += w
    if MEAN:
        total_weight = tl.sum(total, axis=0)
        tl.store(mean + b, tl.sum(weighted, axis=0) / tl.where(total_weight == 0.0, 1.0, total_weight))


def decode(heatmaps, with_mean, weight=None):
    """Coordinates, confidence and, if asked for, mean confidence of `heatmaps`, not float64, with Triton."""
    batch, keypoints, height, width = heatmaps.shape
    cells = height * width
    coords = heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32)
    confidence = heatmaps.new_empty((batch, keypoints), dtype=torch.float32)
    mean = heatmaps.new_empty(batch if with_mean else 0, dtype=torch.float32)
    if batch * keypoints == 0:
        return coords, confidence, mean.zero_()
    layout = divide(heatmaps)
    shared = layout.shares > 1
    # Tensors that a launch does not touch stand in for those that it has no use for.
    candidates = coords
    if shared:
        candidates = heatmaps.new_empty((batch * keypoints, layout.shares), dtype=torch.int32)
    with device_of(heatmaps):
        argmax_kernel[(layout.programs, layout.shares)](
            heatmaps, coords, confidence, candidates, layout.keypoints, cells, width, layout.share,
            *layout.strides, FLAT=layout.flat, SHARED=shared, BLOCK_K=layout.block_k, BLOCK_N=layout.block_n,
            num_warps=warps_for(layout.block_k * layout.block_n), **COMPILE_OPTIONS)
        if shared or with_mean:
            block_s = triton.next_power_of_2(layout.shares)
            finish_kernel[(batch,)](
                heatmaps, coords, confidence, candidates, coords if weight is None else weight, mean,
                keypoints, cells, width, layout.shares, *heatmaps.stride(),
                *((0, 0) if weight is None else weight.stride()),
                FLAT=layout.flat and width > 1, SHARED=shared, MEAN=with_mean, WEIGHTED=weight is not None,
                BLOCK_K=min(triton.next_power_of_2(keypoints), max(1, 2048 // block_s)), BLOCK_S=block_s,
                num_warps=4, **COMPILE_OPTIONS)
    return coords, confidence, mean


def heatmap_argmax(heatmaps: Tensor):
    """The operator behind `kernels.heatmap_argmax`, which says what it takes and returns."""
    reference.check_heatmaps(heatmaps)
    if runs_triton(heatmaps):
        return decode(heatmaps, with_mean=False)[:2]
    return reference.heatmap_argmax(heatmaps)


def heatmap_argmax_mean(heatmaps: Tensor, weight: Optional[Tensor] = None):
    """The operator behind `kernels.heatmap_argmax_mean`, which says what it takes and returns."""
    reference.check_heatmaps(heatmaps)
    reference.check_weight(weight, heatmaps)
    if runs_triton(heatmaps):
        return decode(heatmaps, True, weight)
    return reference.heatmap_argmax_mean(heatmaps, weight)


def fake_argmax(heatmaps):
    """Shapes and dtypes of `heatmap_argmax`."""
    reference.check_heatmaps(heatmaps)
    batch, keypoints = heatmaps.shape[:2]
    return (heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32),
            heatmaps.new_empty((batch, keypoints), dtype=torch.float32))


def fake_argmax_mean(heatmaps, weight=None):
    """Shapes and dtypes of `heatmap_argmax_mean`."""
    reference.check_weight(weight, heatmaps)
    return (*fake_argmax(heatmaps), heatmaps.new_empty(heatmaps.shape[:1], dtype=torch.float32))


register("heatmap_argmax(Tensor heatmaps) -> (Tensor coords, Tensor confidence)", heatmap_argmax, fake_argmax)
register("heatmap_argmax_mean(Tensor heatmaps, Tensor? weight=None) -> "
         "(Tensor coords, Tensor confidence, Tensor mean)", heatmap_argmax_mean, fake_argmax_mean)
