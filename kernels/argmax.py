"""Heatmap argmax: the cell of each map's maximum and the value there, read from the map once.

    (x, y) = argmax h[y, x],    confidence = h[y, x],    mean = sum_k w_k confidence_k / sum_k w_k

Eq. 4 multiplies a sample's score by K / sum_k confidence_k: the inverse of the mean. The weights are ours.
`rectify` is the teacher's whole decoding (§3.2): the same, with `subcell` moved to the vertex of the
parabola through the maximum and its neighbours, and a clean Gaussian drawn there.

Every cell must be read once, and compared: 32 x 16 x 64 x 64 floats are 8.4 MB, 1.9 microseconds of an H200's
memory. In PyTorch this is a flattening (a copy, unless the map lies contiguous), a maximum that writes int64
indices, a remainder, a division, a stack and conversions: eight launches, each longer than the reading. Here
a program reads a map, or several, in whatever layout. Each lane keeps the best of its cells, and one
reduction picks among the lanes. Only when maps are few and large is a map shared among programs; a second
launch then picks among their candidates. It also computes a sample's mean confidence, over the maps of
several programs, which needs no atomic counters.

In torch.max the first of equal cells wins, and the first NaN over everything; a comparison of floats knows
neither rule. So a lane, which sees its cells in rising order, takes a cell only if that changes the maximum;
and lanes are compared by one integer: the value's bits, ordered as the floats are, above the cell's number,
counted down.
"""
import functools
import math

import torch

from kernels import reference
from kernels.common import (Launch, cell_offset, divide, maps_of_program, plan_key, power_of_2, register, tl,
                            triton)


@triton.jit
def first_maximum(value, n):
    """Along axis 1: the n (>= 0) of the first NaN, else of the first maximum."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)   # -0 equals 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)   # two's complement from sign and magnitude
    order = tl.where(value != value, 0x7FFFFFFF, order)
    best = tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64), axis=1)
    return 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def best_cell(maps, exists, begin, end, width, stride_h, stride_w,
              FLAT: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """The first maximum's cell of each map (BLOCK_K,) among the cells begin ... end - 1.

    `higher` is the maximum so far, or NaN since the first NaN. Its bits change exactly at the cells that
    torch.max would take. An equal cell leaves them, because adding 0 removed -0. So does a later NaN, because
    a GPU's maximum returns one NaN whatever the bits of its operands. A lane remembers in which row of LANES
    cells the last change was.
    """
    lane = tl.arange(0, LANES)
    best = tl.full((BLOCK_K, LANES), float("-inf"), tl.float32)
    best_row = tl.zeros((BLOCK_K, LANES), tl.int32) + begin
    for start in range(begin, end, ROWS * LANES):
        for row in tl.static_range(ROWS):
            n = start + (row * LANES + lane)
            inside = exists[:, None] & (n < end)[None, :]
            offset = cell_offset(n, width, stride_h, stride_w, FLAT)
            value = tl.load(maps[:, None] + offset[None, :], mask=inside, other=float("-inf")).to(tl.float32)
            value += 0.0   # makes 0 of -0
            higher = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
            changed = higher.to(tl.int32, bitcast=True) != best.to(tl.int32, bitcast=True)
            best_row = tl.where(changed, start + row * LANES, best_row)
            best = higher
    return first_maximum(best, best_row + lane[None, :])


@triton.jit
def store_cell(coords, confidence, maps, map_index, exists, n, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Write the cell n of each map as (x, y), and the map's value there. Returns the value.

    It is read again, because `best_cell` turned -0 into 0 and replaced the bits of a NaN.
    """
    value = tl.load(maps + cell_offset(n, width, stride_h, stride_w, FLAT), mask=exists, other=0.0)
    tl.store(coords + 2 * map_index, (n % width).to(tl.float32), mask=exists)
    tl.store(coords + 2 * map_index + 1, (n // width).to(tl.float32), mask=exists)
    tl.store(confidence + map_index, value.to(tl.float32), mask=exists)
    return value.to(tl.float32)


@triton.jit
def argmax_kernel(heatmaps, coords, confidence, candidates,
                  keypoints, cells, width, share, stride_b, stride_k, stride_h, stride_w,
                  FLAT: tl.constexpr, SHARED: tl.constexpr,
                  BLOCK_K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Program (block of maps, share of their cells): the maximum over the share, the result if it is all."""
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    begin = tl.program_id(1) * share
    n = best_cell(maps, exists, begin, tl.minimum(begin + share, cells), width, stride_h, stride_w,
                  FLAT, BLOCK_K, LANES, ROWS)
    if SHARED:
        tl.store(candidates + map_index * tl.num_programs(1) + tl.program_id(1), n, mask=exists)
    else:
        store_cell(coords, confidence, maps, map_index, exists, n, width, stride_h, stride_w, FLAT)


@triton.jit
def finish_kernel(heatmaps, coords, confidence, candidates, weight, mean,
                  keypoints, cells, width, shares, stride_b, stride_k, stride_h, stride_w, weight_b, weight_k,
                  FLAT: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, WEIGHTED: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (sample): the maximum among the candidates of each map's shares; the mean confidence.

    keypoints: K. `argmax_kernel` has B K instead where it can take the maps of all samples as those of one.
    """
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
            # Lanes beyond the shares stand for -inf at cell 0, the result for a map of -inf all the same.
            value = store_cell(coords, confidence, maps, map_index, exists, first_maximum(value, n), width,
                               stride_h, stride_w, FLAT)
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
        total_weight = tl.where(total_weight == 0.0, 1.0, total_weight)
        tl.store(mean + b, tl.div_rn(tl.sum(weighted, axis=0), total_weight))


@triton.jit
def vertex(maps, exists, n, top, i, size, step, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Offset from cell n, number i of `size` along an axis, to the vertex of the parabola through the maximum
    `top` there and its neighbours `step` cells away: within +- 1/2, 0 at an edge or where it is flat."""
    inner = exists & (i > 0) & (i < size - 1)
    before = tl.load(maps + cell_offset(n - step, width, stride_h, stride_w, FLAT), mask=inner, other=0.0)
    after = tl.load(maps + cell_offset(n + step, width, stride_h, stride_w, FLAT), mask=inner, other=0.0)
    before = before.to(tl.float32)
    after = after.to(tl.float32)
    curvature = 2.0 * top - before - after
    curved = inner & ~(curvature <= 0.0)
    offset = tl.div_rn(0.5 * (after - before), tl.where(curvature > 0.0, curvature, 1.0))
    clamped = tl.minimum(tl.maximum(offset, -0.5), 0.5)
    return tl.where(curved, tl.where(offset != offset, offset, clamped), 0.0)


@triton.jit
def rectify_kernel(heatmaps, coords, confidence, drawn,
                   scale, radius, keypoints, cells, stride_b, stride_k, stride_h, stride_w,
                   WIDTH: tl.constexpr, FLAT: tl.constexpr, SUBCELL: tl.constexpr,
                   BLOCK_K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Program (block of maps): maximum, vertex, and the Gaussian exp2(scale * distance^2) within `radius`.

    The width is compiled in: every drawn cell is divided by it, and a division by an integer that is known
    only at run time takes several times as many instructions.
    """
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    n = best_cell(maps, exists, 0, cells, WIDTH, stride_h, stride_w, FLAT, BLOCK_K, LANES, ROWS)
    top = store_cell(coords, confidence, maps, map_index, exists, n, WIDTH, stride_h, stride_w, FLAT)
    x = (n % WIDTH).to(tl.float32)
    y = (n // WIDTH).to(tl.float32)
    if SUBCELL:
        x += vertex(maps, exists, n, top, n % WIDTH, WIDTH, 1, WIDTH, stride_h, stride_w, FLAT)
        y += vertex(maps, exists, n, top, n // WIDTH, cells // WIDTH, WIDTH, WIDTH, stride_h, stride_w, FLAT)
        tl.store(coords + 2 * map_index, x, mask=exists)
        tl.store(coords + 2 * map_index + 1, y, mask=exists)
    for start in range(0, cells, LANES):
        cell = start + tl.arange(0, LANES)
        dx = (cell % WIDTH).to(tl.float32)[None, :] - x[:, None]
        dy = (cell // WIDTH).to(tl.float32)[None, :] - y[:, None]
        beyond = (tl.abs(dx) > radius) | (tl.abs(dy) > radius)
        gaussian = tl.where(beyond, 0.0, tl.exp2(scale * (dx * dx + dy * dy)))
        tl.store(drawn + (map_index * cells)[:, None] + cell[None, :], gaussian,
                 mask=exists[:, None] & (cell < cells)[None, :])


@functools.lru_cache(maxsize=1024)
def plan(shape, strides, dtype, device, aligned, with_mean, weight_key):
    """Launches of `heatmap_argmax` and, None where not needed, of its finish; the candidates of a map."""
    reference.check_heatmaps(shape, dtype)
    batch, keypoints, height, width = shape
    layout = divide(shape, strides, dtype.itemsize)
    shared = layout.shares > 1
    first = Launch(argmax_kernel, (layout.programs, layout.shares),
                   (layout.keypoints, height * width, width, layout.share, *layout.strides),
                   dict(FLAT=layout.flat, SHARED=shared, BLOCK_K=layout.block_k, LANES=layout.lanes,
                        ROWS=layout.rows), num_warps=layout.warps)
    if not shared and not with_mean:
        return first, None, 0
    block_s = power_of_2(layout.shares)
    weight_strides = (0, 0) if weight_key is None else weight_key[1]
    finish = Launch(finish_kernel, (batch,),
                    (keypoints, height * width, width, layout.shares, *layout.strides, *weight_strides),
                    dict(FLAT=layout.flat, SHARED=shared, MEAN=with_mean,
                         WEIGHTED=weight_key is not None,
                         BLOCK_K=min(power_of_2(keypoints), max(1, 512 // block_s)), BLOCK_S=block_s),
                    num_warps=1)   # its sums stay within the warp
    return first, finish, layout.shares if shared else 0


def heatmap_argmax(heatmaps, mean=None, weight=None):
    """The operator behind `kernels.heatmap_argmax`. mean: (B,) that takes the mean confidences, or None."""
    weight_key = None if weight is None else plan_key(weight)
    first, finish, shares = plan(*plan_key(heatmaps), mean is not None, weight_key)
    batch, keypoints, _, _ = heatmaps.shape
    coords = heatmaps.new_empty(batch, keypoints, 2, dtype=torch.float32)   # a tuple would take 0.3 us longer
    confidence = coords.new_empty(batch, keypoints)
    candidates = coords.new_empty(batch, keypoints, shares, dtype=torch.int32) if shares else coords
    first(heatmaps, coords, confidence, candidates)
    if finish is not None:
        finish(heatmaps, coords, confidence, candidates, coords if weight is None else weight,
               coords if mean is None else mean)
    return coords, confidence


def heatmap_argmax_mean(heatmaps, weight=None):
    """The operator behind `kernels.heatmap_argmax_mean`."""
    reference.check_weight(weight, heatmaps)
    mean = heatmaps.new_empty(len(heatmaps), dtype=torch.float32)
    return *heatmap_argmax(heatmaps, mean, weight), mean


@functools.lru_cache(maxsize=1024)
def plan_rectify(shape, strides, dtype, device, aligned, sigma, subcell):
    """The launch of `rectify`."""
    reference.check_heatmaps(shape, dtype)
    reference.check_positive("sigma", sigma)
    layout = divide(shape, strides, dtype.itemsize, split=False)
    return Launch(rectify_kernel, (layout.programs,),
                  (-0.5 / (sigma * sigma * math.log(2)), 3 * sigma + 1e-3, layout.keypoints,
                   shape[2] * shape[3], *layout.strides),
                  dict(WIDTH=shape[3], FLAT=layout.flat, SUBCELL=subcell, BLOCK_K=layout.block_k,
                       LANES=layout.lanes, ROWS=layout.rows), num_warps=layout.warps)


def rectify(heatmaps, sigma, subcell=False):
    """The operator behind `kernels.rectify`."""
    launch = plan_rectify(*plan_key(heatmaps), sigma, subcell)
    drawn = heatmaps.new_empty(heatmaps.shape, dtype=torch.float32)
    confidence = drawn.new_empty(drawn.shape[:2])
    coords = drawn.new_empty(*confidence.shape, 2)
    launch(heatmaps, coords, confidence, drawn)
    return drawn, coords, confidence


register("heatmap_argmax(Tensor heatmaps) -> (Tensor coords, Tensor confidence)",
         heatmap_argmax, reference.heatmap_argmax)
register("heatmap_argmax_mean(Tensor heatmaps, Tensor? weight=None) -> "
         "(Tensor coords, Tensor confidence, Tensor mean)",
         heatmap_argmax_mean, reference.heatmap_argmax_mean)
register("rectify(Tensor heatmaps, float sigma, bool subcell=False) -> "
         "(Tensor maps, Tensor cells, Tensor confidence)", rectify, reference.rectify)
