"""Soft-argmax: the expected cell of each map under a softmax over its cells, forward and backward.

    p_n = exp(beta h_n) / sum_m exp(beta h_m),    X = sum_n p_n x_n,    Y = sum_n p_n y_n
    dL/dh_n = beta p_n ((x_n - X) dL/dX + (y_n - Y) dL/dY)

The forward pass must read every cell once, the backward pass must read it once and write its gradient; each
has an exponential and about ten additions and products to do for it. In PyTorch the probabilities are a
tensor as large as the maps: written, read for each marginal, kept for the backward pass, read there again
beside two more of its size. Here each vector of a program's tile has a running maximum and three sums over
its cells, of the weights exp(beta (h - maximum)) and of those times x and y; when the maximum grows, the sums
so far are scaled down. Vectors are joined once, after the last cell, so that no thread waits for another
while maps are read. A program writes X, Y and, for the backward pass, the maximum and the sum of the weights.
From these a program of the backward pass recomputes the probability of each cell in its tile, without a loop.

A float32 sum takes four cells at most, one per row of a step; everything beyond is added in float64. A
distinct peak far from the centre, plus thousands of small weights, each of which rounds the sum so far, would
be off by 4e-5 cells in float32 alone; conversions to float64 for every cell would keep the memory waiting.
Coordinates are summed from the map's centre. Together that keeps the result within 1e-5 cells of float64 at
64 cells per side.
"""
import functools
import inspect

import torch

from kernels import reference
from kernels.common import (LIBRARY, WARPS, Launch, ceil_div, cell_offset, divide, maps_of_program, plan_key,
                            power_of_2, register, tl, triton, walk)


@triton.jit
def finite_or_zero(top):
    """The running maximum as a shift for exp: zero while only -inf was seen, as -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exponential(beta, difference):
    """exp(beta * difference) by the GPU's own instruction, a power of two.

    Taking the difference from the maximum before it is multiplied is exact near the maximum, where the
    probability is.
    """
    return tl.exp2(difference * (beta * 1.4426950408889634))


@triton.jit
def join(top, total, x, y, beta):
    """Sums (BLOCK_K, N) of parts, each from its own maximum -> the largest and sums (BLOCK_K,) from it."""
    shift = finite_or_zero(tl.max(top, axis=1))
    kept = exponential(beta, top - shift[:, None]).to(tl.float64)
    return shift, tl.sum(kept * total, axis=1), tl.sum(kept * x, axis=1), tl.sum(kept * y, axis=1)


@triton.jit
def store_result(coords, stats, map_index, exists, top, total, x, y, width, height):
    """Write the expected cell, given sums from the map's centre, and what the backward pass needs."""
    total = tl.where(exists, total, 1.0)
    tl.store(coords + 2 * map_index, (x / total + 0.5 * (width - 1)).to(tl.float32), mask=exists)
    tl.store(coords + 2 * map_index + 1, (y / total + 0.5 * (height - 1)).to(tl.float32), mask=exists)
    tl.store(stats + 2 * map_index, top, mask=exists)
    tl.store(stats + 2 * map_index + 1, total.to(tl.float32), mask=exists)


@triton.jit
def forward_kernel(heatmaps, coords, stats, partial,
                   beta, keypoints, cells, share, stride_b, stride_k, stride_h, stride_w,
                   WIDTH: tl.constexpr, FLAT: tl.constexpr, SHARED: tl.constexpr,
                   BLOCK_K: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Program (block of maps, share of their cells): the sums over the share, the result if it is all.

    A step is over ROWS tiles of (BLOCK_K, VECTORS, VECTOR): VECTORS vectors of VECTOR cells of each map. A
    thread has whole vectors, the same ones in all rows, and adds their cells in its registers.
    """
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    height = cells // WIDTH
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, cells)
    top = tl.full((BLOCK_K, VECTORS), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K, VECTORS), tl.float64)
    total_x = tl.zeros((BLOCK_K, VECTORS), tl.float64)
    total_y = tl.zeros((BLOCK_K, VECTORS), tl.float64)
    cell = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in range(begin, end, ROWS * VECTORS * VECTOR):
        values = ()
        new_top = top
        for row in tl.static_range(ROWS):   # all loads are under way before the first is used
            n = start + row * VECTORS * VECTOR + cell
            inside = exists[:, None, None] & (n < end)[None, :, :]
            offset = cell_offset(n, WIDTH, stride_h, stride_w, FLAT)
            value = tl.load(maps[:, None, None] + offset[None, :, :], mask=inside, other=float("-inf"))
            values = values + (value.to(tl.float32),)   # outside -inf, whose probability is zero
            new_top = tl.maximum(new_top, tl.max(values[row], axis=2))
        shift = finite_or_zero(new_top)
        sums = tl.zeros((BLOCK_K, VECTORS, VECTOR), tl.float32)
        sums_x = tl.zeros((BLOCK_K, VECTORS, VECTOR), tl.float32)
        sums_y = tl.zeros((BLOCK_K, VECTORS, VECTOR), tl.float32)
        for row in tl.static_range(ROWS):
            n = start + row * VECTORS * VECTOR + cell
            weight = exponential(beta, values[row] - shift[:, :, None])
            sums += weight
            sums_x += weight * ((n % WIDTH).to(tl.float32) - 0.5 * (WIDTH - 1))[None, :, :]
            sums_y += weight * ((n // WIDTH).to(tl.float32) - 0.5 * (height - 1))[None, :, :]
        kept = exponential(beta, top - shift).to(tl.float64)
        total = total * kept + tl.sum(sums.to(tl.float64), axis=2)
        total_x = total_x * kept + tl.sum(sums_x.to(tl.float64), axis=2)
        total_y = total_y * kept + tl.sum(sums_y.to(tl.float64), axis=2)
        top = new_top
    top, sum_all, sum_x, sum_y = join(top, total, total_x, total_y, beta)
    if SHARED:
        entry = partial + 4 * (map_index * tl.num_programs(1) + tl.program_id(1))
        tl.store(entry, top, mask=exists)
        tl.store(entry + 1, sum_all, mask=exists)
        tl.store(entry + 2, sum_x, mask=exists)
        tl.store(entry + 3, sum_y, mask=exists)
    else:
        store_result(coords, stats, map_index, exists, top, sum_all, sum_x, sum_y, WIDTH, height)


@triton.jit
def join_kernel(coords, stats, partial, beta, maps, shares, width, height,
                BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (block of maps): the sums of their shares, scaled to one maximum and added."""
    map_index = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    inside = (map_index < maps)[:, None] & (s < shares)[None, :]
    entry = partial + 4 * (map_index[:, None] * shares + s[None, :])
    top, total, x, y = join(tl.load(entry, mask=inside, other=float("-inf")).to(tl.float32),
                            tl.load(entry + 1, mask=inside, other=0.0),
                            tl.load(entry + 2, mask=inside, other=0.0),
                            tl.load(entry + 3, mask=inside, other=0.0), beta)
    store_result(coords, stats, map_index, map_index < maps, top, total, x, y, width, height)


@triton.jit
def backward_kernel(heatmaps, grad_coords, coords, stats, grad_heatmaps,
                    beta, keypoints, cells, stride_b, stride_k, stride_h, stride_w,
                    grad_b, grad_k, grad_h, grad_w,
                    WIDTH: tl.constexpr, FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (block of maps, block of cells): each cell is read, and its gradient written."""
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    grads, _, _ = maps_of_program(grad_heatmaps, keypoints, grad_b, grad_k, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (n < cells)[None, :]
    offset = cell_offset(n, WIDTH, stride_h, stride_w, FLAT)
    value = tl.load(maps[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(stats + 2 * map_index, mask=exists, other=0.0)
    slope = tl.div_rn(beta, tl.load(stats + 2 * map_index + 1, mask=exists, other=1.0))
    x = tl.load(coords + 2 * map_index, mask=exists, other=0.0)
    y = tl.load(coords + 2 * map_index + 1, mask=exists, other=0.0)
    slope_x = slope * tl.load(grad_coords + 2 * map_index, mask=exists, other=0.0)
    slope_y = slope * tl.load(grad_coords + 2 * map_index + 1, mask=exists, other=0.0)
    weight = exponential(beta, value - shift[:, None])
    along_x = ((n % WIDTH).to(tl.float32)[None, :] - x[:, None]) * slope_x[:, None]
    along_y = ((n // WIDTH).to(tl.float32)[None, :] - y[:, None]) * slope_y[:, None]
    grad = (weight * (along_x + along_y)).to(grad_heatmaps.dtype.element_ty)
    offset = cell_offset(n, WIDTH, grad_h, grad_w, GRAD_FLAT)
    tl.store(grads[:, None] + offset[None, :], grad, mask=inside)


@functools.lru_cache(maxsize=1024)
def plan(shape, strides, dtype, device, aligned, beta):
    """Launches of the forward pass and, None where not needed, of the join; the shares of a map."""
    reference.check_heatmaps(shape, dtype)
    reference.check_positive("beta", beta)
    batch, keypoints, height, width = shape
    layout = divide(shape, strides, dtype.itemsize)
    shared = layout.shares > 1
    first = Launch(forward_kernel, (layout.programs, layout.shares),
                   (beta, layout.keypoints, height * width, layout.share, *layout.strides),
                   dict(WIDTH=width, FLAT=layout.flat, SHARED=shared, BLOCK_K=layout.block_k,
                        VECTORS=layout.lanes // layout.vector, ROWS=layout.rows, VECTOR=layout.vector),
                   num_warps=layout.warps)
    if not shared:
        return first, None, 0
    block_s = power_of_2(layout.shares)
    block_k = max(1, 512 // block_s)
    return first, Launch(join_kernel, (ceil_div(batch * keypoints, block_k),),
                         (beta, batch * keypoints, layout.shares, width, height),
                         dict(BLOCK_K=block_k, BLOCK_S=block_s)), layout.shares


@functools.lru_cache(maxsize=1024)
def plan_backward(shape, strides, dtype, device, aligned, grad_strides, beta):
    """The launch of the backward pass."""
    batch, keypoints, height, width = shape
    cells = height * width
    *read, read_flat, _ = walk(shape, strides)
    *written, flat, across = walk(shape, grad_strides)
    tile = 2048   # cells of a program of 4 warps
    if batch * keypoints * cells >= 4096 * WARPS // 4:
        # Twice as many still fill the GPU, and each thread has more cells for what it loads of their map.
        tile = 4096
    block_k = min(power_of_2(keypoints), 16 if across else max(1, tile // power_of_2(cells)))
    block_n = min(power_of_2(cells), tile // block_k)
    return Launch(backward_kernel, (batch * ceil_div(keypoints, block_k), ceil_div(cells, block_n)),
                  (beta, keypoints, cells, *read, *written),
                  dict(WIDTH=width, FLAT=read_flat, GRAD_FLAT=flat, BLOCK_K=block_k, BLOCK_N=block_n),
                  num_warps=max(1, block_k * block_n * 4 // tile))


def forward(heatmaps, beta):
    """Coordinates (B, K, 2) as of `kernels.soft_argmax`, and (B, K, 2) numbers for the backward pass."""
    first, finish, shares = plan(*plan_key(heatmaps), beta)
    coords = heatmaps.new_empty((*heatmaps.shape[:2], 2), dtype=torch.float32)
    stats = torch.empty_like(coords)
    partial = coords.new_empty((*coords.shape[:2], shares, 4), dtype=torch.float64) if shares else stats
    first(heatmaps, coords, stats, partial)
    if finish is not None:
        finish(coords, stats, partial)
    return coords, stats


def plain_forward(heatmaps, beta):
    """The same in plain PyTorch, whose backward pass forms the softmax anew."""
    coords = reference.soft_argmax(heatmaps.detach(), beta)
    return coords, torch.zeros_like(coords)


def backward(heatmaps, grad_coords, coords, stats, beta):
    """Gradient (B, K, H, W) of the heatmaps in their dtype and layout, given that of the coordinates."""
    grad_heatmaps = torch.empty_like(heatmaps)
    others = [tensor.contiguous() for tensor in (grad_coords, coords, stats)]
    shape, strides, dtype, device, aligned = plan_key(heatmaps)
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in others)
    launch = plan_backward(shape, strides, dtype, device, aligned, grad_heatmaps.stride(), beta)
    launch(heatmaps, *others, grad_heatmaps)
    return grad_heatmaps


class SoftArgmax(torch.autograd.Function):
    """(heatmaps, beta) -> coordinates and the numbers of the backward pass; reverse mode, of any order.

    By hand: `torch.library.register_autograd` costs some 60 microseconds more per forward and backward pass,
    and is silent about forward mode, which raises here.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(heatmaps, beta):
        return forward_op(heatmaps, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.beta = inputs[1]
        ctx.set_materialize_grads(False)   # else each backward pass would fill zeros for output[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx, grad_coords, _):
        if grad_coords is None:   # nothing depends on the coordinates
            return None, None
        if torch.is_grad_enabled():   # with create_graph=True the gradient may be differentiated itself
            heatmaps = ctx.saved_tensors[0]
            beta = ctx.beta
            _, pull_back = torch.func.vjp(lambda maps: reference.soft_argmax(maps, beta), heatmaps)
            return pull_back(grad_coords)[0], None
        heatmaps, coords, stats = ctx.saved_tensors
        return backward_op(heatmaps, grad_coords, coords, stats, ctx.beta), None


# Without this attribute, autograd works it out at every call, for 7 microseconds.
SoftArgmax.forward.__signature__ = inspect.signature(SoftArgmax.forward)

forward_op = register("soft_argmax_forward(Tensor heatmaps, float beta) -> (Tensor coords, Tensor stats)",
                      forward, plain_forward)
backward_op = register("soft_argmax_backward(Tensor heatmaps, Tensor grad_coords, Tensor coords, "
                       "Tensor stats, float beta) -> Tensor", backward, reference.soft_argmax_backward)
LIBRARY.define("soft_argmax(Tensor heatmaps, float beta) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.impl("soft_argmax", lambda heatmaps, beta: SoftArgmax.apply(heatmaps, beta)[0],
             "CompositeImplicitAutograd")
