"""Soft-argmax: the expected cell of each map under a softmax over its cells, forward and backward.

    p_n = exp(beta h_n) / sum_m exp(beta h_m),    X = sum_n p_n x_n,    Y = sum_n p_n y_n
    dL/dh_n = beta p_n ((x_n - X) dL/dX + (y_n - Y) dL/dY)

What they must move: the forward pass reads every cell once, the backward pass reads it once and writes its
gradient. What they must do: an exponential and about ten additions and products for each cell and pass.

In PyTorch the probabilities are a tensor as large as the maps: written, read for each marginal, kept for the
backward pass, read there again beside two more of its size. Here a program of the forward pass holds the
running maximum and three sums, of the weights exp(beta (h - maximum)) and of those times x and y, while it
reads a map once; when the maximum grows, the sums so far are scaled down. It writes X, Y and, for the
backward pass, the maximum and the sum of the weights: from these a program of the backward pass forms the
probability of any cell again, without a look at the others.

The sums run in float64. A distinct peak far from the centre, plus thousands of small weights, each of which
rounds the sum so far, would be off by 4e-5 cells in float32; a data-centre GPU has the float64 additions to
spare while it waits for the maps. The weights themselves are float32, and coordinates are summed from the
map's centre, which together keeps the result within 1e-5 cells of float64 at 64 cells a side.
"""
import torch
from torch import Tensor

from kernels import reference
from kernels.common import (COMPILE_OPTIONS, LIBRARY, cell_offset, device_of, divide, join_batches,
                            maps_of_program, one_stride, register, runs_triton, tl, triton, warps_for)


def forward_options(block_k, block_n):
    """Compile options of the forward kernel, for blocks of maps and of cells.

    Where a thread has several maps, it keeps sums of 8 bytes for each, and takes fewer cells. Left to itself
    the assembler still spills one or two of these to fit a further program in; hence maxnreg.
    """
    if block_k > 4:
        return dict(num_warps=warps_for(block_k * block_n, 8), maxnreg=160, **COMPILE_OPTIONS)
    return dict(num_warps=warps_for(block_k * block_n), **COMPILE_OPTIONS)


@triton.jit
def load_cells(maps, exists, n, end, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Cells n (BLOCK_N,) of each map as float32 (BLOCK_K, BLOCK_N), -inf from `end` on: probability zero."""
    inside = exists[:, None] & (n < end)[None, :]
    offset = cell_offset(n, width, stride_h, stride_w, FLAT)
    return tl.load(maps[:, None] + offset[None, :], mask=inside, other=float("-inf")).to(tl.float32)


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
def store_result(coords, stats, map_index, exists, top, total, x, y, width, height):
    """Write the expected cell, given sums from the map's centre, and what the backward pass needs."""
    total = tl.where(exists, total, 1.0)
    tl.store(coords + 2 * map_index, (x / total + 0.5 * (width - 1)).to(tl.float32), mask=exists)
    tl.store(coords + 2 * map_index + 1, (y / total + 0.5 * (height - 1)).to(tl.float32), mask=exists)
    tl.store(stats + 2 * map_index, top.to(tl.float32), mask=exists)
    tl.store(stats + 2 * map_index + 1, total.to(tl.float32), mask=exists)


@triton.jit
def forward_kernel(heatmaps, coords, stats, partial, beta, keypoints, cells, share,
                   stride_b, stride_k, stride_h, stride_w, WIDTH: tl.constexpr, FLAT: tl.constexpr,
                   SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (block of maps, share of their cells): the sums over the share, the result if it is all."""
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    height = cells // WIDTH
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, cells)
    top = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float64)
    total_x = tl.zeros((BLOCK_K,), tl.float64)
    total_y = tl.zeros((BLOCK_K,), tl.float64)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        value = load_cells(maps, exists, n, end, WIDTH, stride_h, stride_w, FLAT)
        new_top = tl.maximum(top, tl.max(value, axis=1))
        shift = finite_or_zero(new_top)
        weight = exponential(beta, value - shift[:, None])
        x = (n % WIDTH).to(tl.float32) - 0.5 * (WIDTH - 1)
        y = (n // WIDTH).to(tl.float32) - 0.5 * (height - 1)
        kept = exponential(beta, top - shift).to(tl.float64)
        total = total * kept + tl.sum(weight.to(tl.float64), axis=1)
        total_x = total_x * kept + tl.sum((weight * x[None, :]).to(tl.float64), axis=1)
        total_y = total_y * kept + tl.sum((weight * y[None, :]).to(tl.float64), axis=1)
        top = new_top
    if SHARED:
        entry = partial + 4 * (map_index * tl.num_programs(1) + tl.program_id(1))
        tl.store(entry, top, mask=exists)
        tl.store(entry + 1, total, mask=exists)
        tl.store(entry + 2, total_x, mask=exists)
        tl.store(entry + 3, total_y, mask=exists)
    else:
        top = finite_or_zero(top)
        store_result(coords, stats, map_index, exists, top, total, total_x, total_y, WIDTH, height)


@triton.jit
def join_kernel(coords, stats, partial, beta, maps, shares, width, height,
                BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (block of maps): the sums of their shares, scaled to one maximum and added."""
    map_index = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    inside = (map_index < maps)[:, None] & (s < shares)[None, :]
    entry = partial + 4 * (map_index[:, None] * shares + s[None, :])
    tops = tl.load(entry, mask=inside, other=float("-inf"))
    shift = finite_or_zero(tl.max(tops, axis=1))
    kept = exponential(beta, (tops - shift[:, None]).to(tl.float32)).to(tl.float64)
    total = tl.sum(kept * tl.load(entry + 1, mask=inside, other=0.0), axis=1)
    x = tl.sum(kept * tl.load(entry + 2, mask=inside, other=0.0), axis=1)
    y = tl.sum(kept * tl.load(entry + 3, mask=inside, other=0.0), axis=1)
    store_result(coords, stats, map_index, map_index < maps, shift, total, x, y, width, height)


@triton.jit
def backward_kernel(heatmaps, grad_coords, coords, stats, grad_heatmaps, beta, keypoints, cells, share,
                    stride_b, stride_k, stride_h, stride_w, grad_b, grad_k, grad_h, grad_w,
                    WIDTH: tl.constexpr, FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (block of maps, share of their cells): each cell is read, and its gradient written."""
    maps, map_index, exists = maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    grads, _, _ = maps_of_program(grad_heatmaps, keypoints, grad_b, grad_k, BLOCK_K)
    shift = tl.load(stats + 2 * map_index, mask=exists, other=0.0)
    slope = beta / tl.load(stats + 2 * map_index + 1, mask=exists, other=1.0)
    x = tl.load(coords + 2 * map_index, mask=exists, other=0.0)
    y = tl.load(coords + 2 * map_index + 1, mask=exists, other=0.0)
    slope_x = slope * tl.load(grad_coords + 2 * map_index, mask=exists, other=0.0)
    slope_y = slope * tl.load(grad_coords + 2 * map_index + 1, mask=exists, other=0.0)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, cells)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        value = load_cells(maps, exists, n, end, WIDTH, stride_h, stride_w, FLAT)
        weight = exponential(beta, value - shift[:, None])
        along_x = ((n % WIDTH).to(tl.float32)[None, :] - x[:, None]) * slope_x[:, None]
        along_y = ((n // WIDTH).to(tl.float32)[None, :] - y[:, None]) * slope_y[:, None]
        offset = cell_offset(n, WIDTH, grad_h, grad_w, GRAD_FLAT)
        grad = (weight * (along_x + along_y)).to(grad_heatmaps.dtype.element_ty)
        tl.store(grads[:, None] + offset[None, :], grad, mask=exists[:, None] & (n < end)[None, :])


def launch(heatmaps, beta):
    """Coordinates (B, K, 2) and statistics (B, K, 2) of `heatmaps`, any strides, not float64, with Triton."""
    batch, keypoints, height, width = heatmaps.shape
    maps = batch * keypoints
    coords = heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32)
    stats = torch.empty_like(coords)
    if maps == 0:
        return coords, stats
    layout = divide(heatmaps)
    shared = layout.shares > 1
    # A tensor that the launch does not touch stands in for the one that it has no use for.
    partial = coords.new_empty((maps, layout.shares, 4), dtype=torch.float64) if shared else stats
    with device_of(heatmaps):
        forward_kernel[(layout.programs, layout.shares)](
            heatmaps, coords, stats, partial, beta, layout.keypoints, height * width, layout.share,
            *layout.strides, WIDTH=width, FLAT=layout.flat, SHARED=shared, BLOCK_K=layout.block_k,
            BLOCK_N=layout.block_n, **forward_options(layout.block_k, layout.block_n))
        if shared:
            block_s = triton.next_power_of_2(layout.shares)
            block_k = max(1, 512 // block_s)
            join_kernel[(triton.cdiv(maps, block_k),)](
                coords, stats, partial, beta, maps, layout.shares, width, height, BLOCK_K=block_k,
                BLOCK_S=block_s, num_warps=4, **COMPILE_OPTIONS)
    return coords, stats


def launch_backward(grad_coords, heatmaps, coords, stats, beta):
    """Gradient (B, K, H, W) in the dtype and layout of `heatmaps`, with Triton."""
    batch, keypoints, height, width = heatmaps.shape
    grad_heatmaps = torch.empty_like(heatmaps)
    if batch * keypoints == 0:
        return grad_heatmaps
    join = one_stride(heatmaps) and one_stride(grad_heatmaps)
    read, written = divide(heatmaps, join), divide(grad_heatmaps, join)
    with device_of(heatmaps):
        backward_kernel[(written.programs, written.shares)](
            heatmaps, grad_coords.contiguous(), coords, stats, grad_heatmaps, beta, written.keypoints,
            height * width, written.share, *read.strides, *written.strides, WIDTH=width, FLAT=read.flat,
            GRAD_FLAT=written.flat, BLOCK_K=written.block_k, BLOCK_N=written.block_n,
            num_warps=warps_for(written.block_k * written.block_n), **COMPILE_OPTIONS)
    return grad_heatmaps


def soft_argmax_forward(heatmaps: Tensor, beta: float):
    """Coordinates (B, K, 2) as of `kernels.soft_argmax`, and (B, K, 2) numbers for the backward pass."""
    reference.check_heatmaps(heatmaps)
    reference.check_beta(beta)
    if runs_triton(heatmaps):
        return launch(heatmaps, beta)
    coords = reference.soft_argmax(heatmaps, beta)
    return coords, torch.zeros_like(coords)   # the reference's backward pass forms the softmax anew


def soft_argmax_backward(grad_coords, heatmaps, coords, stats, beta):
    """Gradient (B, K, H, W) of the heatmaps, given that of the coordinates (B, K, 2)."""
    if runs_triton(heatmaps):
        return launch_backward(grad_coords, heatmaps, coords, stats, beta)
    return reference.soft_argmax_backward(grad_coords, heatmaps, coords, beta)


def fake_forward(heatmaps, beta):
    """Shapes and dtypes of `soft_argmax_forward`."""
    reference.check_heatmaps(heatmaps)
    reference.check_beta(beta)
    dtype = torch.float64 if heatmaps.dtype == torch.float64 else torch.float32
    coords = heatmaps.new_empty((heatmaps.shape[0], heatmaps.shape[1], 2), dtype=dtype)
    return coords, torch.empty_like(coords)


def save_for_backward(ctx, inputs, output):
    """What the backward pass needs: the heatmaps, and two numbers of each beside the result."""
    ctx.beta = inputs[1]
    ctx.save_for_backward(inputs[0], *output)


def backward(ctx, grad_coords, grad_stats):
    """Autograd's rule: (B, K, 2) -> gradients of heatmaps and, none, of beta."""
    return backward_op(grad_coords, *ctx.saved_tensors, ctx.beta), None


def no_second_backward(ctx, grad):
    """Autograd's rule for the gradient's own gradient: an error, where torch would say zero."""
    raise RuntimeError("soft_argmax is differentiable once: its gradient has none of its own. Use "
                       "kernels.reference.soft_argmax for second derivatives")


backward_op = register(
    "soft_argmax_backward(Tensor grad_coords, Tensor heatmaps, Tensor coords, Tensor stats, float beta) -> "
    "Tensor",
    soft_argmax_backward, lambda grad_coords, heatmaps, coords, stats, beta: torch.empty_like(heatmaps))
torch.library.register_autograd("actupose::soft_argmax_backward", no_second_backward, lib=LIBRARY)
forward_op = register("soft_argmax_forward(Tensor heatmaps, float beta) -> (Tensor coords, Tensor stats)",
                      soft_argmax_forward, fake_forward)
torch.library.register_autograd("actupose::soft_argmax_forward", backward, setup_context=save_for_backward,
                                lib=LIBRARY)
LIBRARY.define("soft_argmax(Tensor heatmaps, float beta) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.register_vmap("actupose::soft_argmax", join_batches(torch.ops.actupose.soft_argmax.default),
                            lib=LIBRARY)
LIBRARY.impl("soft_argmax", lambda heatmaps, beta: forward_op(heatmaps, beta)[0], "CompositeImplicitAutograd")
