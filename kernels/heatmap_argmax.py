"""Heatmap argmax: the cell of each map's maximum and the value there, read from the map once.

    (x, y) = argmax h[y, x],        confidence = h[y, x]

In PyTorch this is a flattening (a copy, unless the map lies contiguous), a maximum that writes int64 indices,
a remainder, a division, a stack and two conversions: many launches around a reduction that has nothing to do
but read the map. Here one program reads a map, in whatever layout, and writes three floats: the traffic is
the maps themselves. Only when there are fewer maps than a GPU has room for, and they are large, is a map
shared among programs and a second launch picks among their candidates.
"""
import torch
from torch import Tensor

from kernels import reference
from kernels.common import (COMPILE_OPTIONS, cell_offset, device_of, map_layout, power_of_two, runs_triton,
                            tile_of_program, tl, triton, warps_for)

ENOUGH_PROGRAMS = 512  # a few for each multiprocessor of a large GPU
CELLS_A_SHARE = 16384  # below about this a map is read before a second launch has begun


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
    bits."""
    value = tl.load(maps + cell_offset(n, width, stride_h, stride_w, FLAT), mask=exists, other=0.0)
    tl.store(coords + 2 * map_index, (n % width).to(tl.float32), mask=exists)
    tl.store(coords + 2 * map_index + 1, (n // width).to(tl.float32), mask=exists)
    tl.store(confidence + map_index, value.to(tl.float32), mask=exists)


@triton.jit
def argmax_kernel(heatmaps, coords, confidence, candidates, keypoints, cells, width, share,
                  stride_b, stride_k, stride_h, stride_w,
                  FLAT: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (tile of maps, share): the maximum over the share's cells, the result if there is one share."""
    maps, map_index, exists = tile_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
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
def choose_kernel(heatmaps, coords, confidence, candidates, keypoints, cells, width, shares,
                  stride_b, stride_k, stride_h, stride_w, FLAT: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (map): the maximum among the candidates of its shares."""
    maps, map_index, exists = tile_of_program(heatmaps, keypoints, stride_b, stride_k, 1)
    s = tl.arange(0, BLOCK_S)
    inside = exists[:, None] & (s < shares)[None, :]
    n = tl.load(candidates + map_index[:, None] * shares + s[None, :], mask=inside, other=0)
    offset = cell_offset(n, width, stride_h, stride_w, FLAT)
    value = tl.load(maps[:, None] + offset, mask=inside, other=float("-inf")).to(tl.float32)
    # Lanes beyond the shares stand for -inf at cell 0, which is the result for a map of -inf all the same.
    first = first_maximum(value, n, cells)
    store_cell(coords, confidence, maps, map_index, exists, first, width, stride_h, stride_w, FLAT)


def launch(heatmaps):
    """Decode `heatmaps` (B, K, H, W), any strides, not float64, with the Triton kernel."""
    reference.check_heatmaps(heatmaps)
    batch, keypoints, height, width = heatmaps.shape
    cells = height * width
    coords = heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32)
    confidence = heatmaps.new_empty((batch, keypoints), dtype=torch.float32)
    if batch * keypoints == 0:
        return coords, confidence
    strides, flat, tile = map_layout(heatmaps)
    programs = batch * triton.cdiv(keypoints, tile[0])
    shares = max(1, min(cells // CELLS_A_SHARE, ENOUGH_PROGRAMS // programs))
    share = triton.cdiv(triton.cdiv(cells, shares), tile[1]) * tile[1]
    shares = triton.cdiv(cells, share)
    candidates = coords
    if shares > 1:
        candidates = heatmaps.new_empty((batch, keypoints, shares), dtype=torch.int32)
    with device_of(heatmaps):
        argmax_kernel[(programs, shares)](
            heatmaps, coords, confidence, candidates, keypoints, cells, width, share, *strides,
            FLAT=flat, SHARED=shares > 1, BLOCK_K=tile[0], BLOCK_N=tile[1], num_warps=warps_for(tile),
            **COMPILE_OPTIONS)
        if shares > 1:
            choose_kernel[(batch * keypoints,)](
                heatmaps, coords, confidence, candidates, keypoints, cells, width, shares, *strides,
                FLAT=flat, BLOCK_S=power_of_two(shares), num_warps=1, **COMPILE_OPTIONS)
    return coords, confidence


@torch.library.custom_op("actupose::heatmap_argmax", mutates_args=())
def heatmap_argmax(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """The operator behind `kernels.heatmap_argmax`, which says what it takes and returns."""
    return launch(heatmaps) if runs_triton(heatmaps) else reference.heatmap_argmax(heatmaps)


@heatmap_argmax.register_fake
def _(heatmaps):
    reference.check_heatmaps(heatmaps)
    batch, keypoints = heatmaps.shape[:2]
    return (heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32),
            heatmaps.new_empty((batch, keypoints), dtype=torch.float32))
