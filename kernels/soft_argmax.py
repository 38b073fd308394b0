"""Soft-argmax: the expected cell of each map under a softmax over its cells, forward and backward.

    p_n = exp(beta h_n) / sum_m exp(beta h_m),    X = sum_n p_n x_n,    Y = sum_n p_n y_n
    dL/dh_n = beta p_n ((x_n - X) dL/dX + (y_n - Y) dL/dY)

In PyTorch the probabilities are a tensor as large as the maps: written, read for each marginal, kept for the
backward pass and read there again. Here a program holds the running maximum and the three sums (of exp, x exp
and y exp) while it reads a map once, rescaling them when the maximum grows, so the forward pass reads the
maps and writes two floats for each. The backward pass keeps nothing but the maps: it forms the sums again,
then writes the gradient; the second read of a map finds it in the cache.
"""
import torch
from torch import Tensor

from kernels import reference
from kernels.common import (COMPILE_OPTIONS, cell_offset, device_of, map_layout, runs_triton, tile_of_program,
                            tl, triton, warps_for)


@triton.jit
def load_cells(maps, exists, n, cells, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Cells n (BLOCK_N,) of each map as float32 (BLOCK_K, BLOCK_N), -inf outside: a probability of zero."""
    inside = exists[:, None] & (n < cells)[None, :]
    offset = cell_offset(n, width, stride_h, stride_w, FLAT)
    return tl.load(maps[:, None] + offset[None, :], mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def finite_or_zero(top):
    """The running maximum as a shift for exp: zero while only -inf was seen, as -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def expectation(maps, exists, cells, beta, stride_h, stride_w, WIDTH: tl.constexpr, FLAT: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Shift and sum of exp(beta (h - shift)) of each map, and its expected cell: four (BLOCK_K,) float32."""
    top = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    total_x = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    total_y = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(0, cells, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        value = load_cells(maps, exists, n, cells, WIDTH, stride_h, stride_w, FLAT)
        new_top = tl.maximum(top, tl.max(value, axis=1))
        shift = finite_or_zero(new_top)
        # Subtracting before multiplying by beta is exact near the maximum, where the probability is.
        weight = tl.exp(beta * (value - shift[:, None]))
        kept = tl.exp(beta * (top - shift))[:, None]
        total = total * kept + weight
        total_x = total_x * kept + weight * (n % WIDTH).to(tl.float32)[None, :]
        total_y = total_y * kept + weight * (n // WIDTH).to(tl.float32)[None, :]
        top = new_top
    total = tl.where(exists, tl.sum(total, axis=1), 1.0)
    return finite_or_zero(top), total, tl.sum(total_x, axis=1) / total, tl.sum(total_y, axis=1) / total


@triton.jit
def forward_kernel(heatmaps, coords, beta, keypoints, cells, stride_b, stride_k, stride_h, stride_w,
                   WIDTH: tl.constexpr, FLAT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (tile of maps): their expected cells."""
    maps, map_index, exists = tile_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    _, _, x, y = expectation(maps, exists, cells, beta, stride_h, stride_w, WIDTH, FLAT, BLOCK_K, BLOCK_N)
    tl.store(coords + 2 * map_index, x, mask=exists)
    tl.store(coords + 2 * map_index + 1, y, mask=exists)


@triton.jit
def backward_kernel(heatmaps, grad_coords, grad_heatmaps, beta, keypoints, cells,
                    stride_b, stride_k, stride_h, stride_w,
                    grad_stride_b, grad_stride_k, grad_stride_h, grad_stride_w,
                    WIDTH: tl.constexpr, FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (tile of maps): the sums again, then the gradient of every cell."""
    maps, map_index, exists = tile_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K)
    grads, _, _ = tile_of_program(grad_heatmaps, keypoints, grad_stride_b, grad_stride_k, BLOCK_K)
    shift, total, x, y = expectation(
        maps, exists, cells, beta, stride_h, stride_w, WIDTH, FLAT, BLOCK_K, BLOCK_N)
    slope = beta / total
    slope_x = slope * tl.load(grad_coords + 2 * map_index, mask=exists, other=0.0)
    slope_y = slope * tl.load(grad_coords + 2 * map_index + 1, mask=exists, other=0.0)
    for start in range(0, cells, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        value = load_cells(maps, exists, n, cells, WIDTH, stride_h, stride_w, FLAT)
        weight = tl.exp(beta * (value - shift[:, None]))
        along_x = ((n % WIDTH).to(tl.float32)[None, :] - x[:, None]) * slope_x[:, None]
        along_y = ((n // WIDTH).to(tl.float32)[None, :] - y[:, None]) * slope_y[:, None]
        offset = cell_offset(n, WIDTH, grad_stride_h, grad_stride_w, GRAD_FLAT)
        grad = (weight * (along_x + along_y)).to(grad_heatmaps.dtype.element_ty)
        tl.store(grads[:, None] + offset[None, :], grad, mask=exists[:, None] & (n < cells)[None, :])


def launch(heatmaps, beta):
    """Expected cells (B, K, 2) float32 of `heatmaps` (B, K, H, W), any strides, not float64, with Triton."""
    reference.check_heatmaps(heatmaps)
    reference.check_beta(beta)
    batch, keypoints, height, width = heatmaps.shape
    coords = heatmaps.new_empty((batch, keypoints, 2), dtype=torch.float32)
    if batch * keypoints == 0:
        return coords
    strides, flat, tile = map_layout(heatmaps)
    with device_of(heatmaps):
        forward_kernel[(batch * triton.cdiv(keypoints, tile[0]),)](
            heatmaps, coords, beta, keypoints, height * width, *strides,
            WIDTH=width, FLAT=flat, BLOCK_K=tile[0], BLOCK_N=tile[1], num_warps=warps_for(tile),
            **COMPILE_OPTIONS)
    return coords


def launch_backward(grad_coords, heatmaps, beta):
    """Gradient (B, K, H, W) in the dtype and layout of `heatmaps`, given `grad_coords` (B, K, 2), with
    Triton."""
    batch, keypoints, height, width = heatmaps.shape
    grad_heatmaps = torch.empty_like(heatmaps)
    if batch * keypoints == 0:
        return grad_heatmaps
    strides, flat, tile = map_layout(heatmaps)
    grad_strides, grad_flat, _ = map_layout(grad_heatmaps)
    with device_of(heatmaps):
        backward_kernel[(batch * triton.cdiv(keypoints, tile[0]),)](
            heatmaps, grad_coords.contiguous(), grad_heatmaps, beta, keypoints, height * width,
            *strides, *grad_strides, WIDTH=width, FLAT=flat, GRAD_FLAT=grad_flat,
            BLOCK_K=tile[0], BLOCK_N=tile[1], num_warps=warps_for(tile), **COMPILE_OPTIONS)
    return grad_heatmaps


@torch.library.custom_op("actupose::soft_argmax", mutates_args=())
def soft_argmax(heatmaps: Tensor, beta: float) -> Tensor:
    """The operator behind `kernels.soft_argmax`, which says what it takes and returns."""
    return launch(heatmaps, beta) if runs_triton(heatmaps) else reference.soft_argmax(heatmaps, beta)


@soft_argmax.register_fake
def _(heatmaps, beta):
    reference.check_heatmaps(heatmaps)
    reference.check_beta(beta)
    dtype = torch.float64 if heatmaps.dtype == torch.float64 else torch.float32
    return heatmaps.new_empty((heatmaps.shape[0], heatmaps.shape[1], 2), dtype=dtype)


@torch.library.custom_op("actupose::soft_argmax_backward", mutates_args=())
def soft_argmax_backward(grad_coords: Tensor, heatmaps: Tensor, beta: float) -> Tensor:
    """Gradient of `soft_argmax`: grad_coords (B, K, 2), heatmaps (B, K, H, W) -> (B, K, H, W)."""
    if runs_triton(heatmaps):
        return launch_backward(grad_coords, heatmaps, beta)
    return reference.soft_argmax_backward(grad_coords, heatmaps, beta)


@soft_argmax_backward.register_fake
def _(grad_coords, heatmaps, beta):
    return torch.empty_like(heatmaps)


def save_for_backward(ctx, inputs, output):
    """What the backward pass needs: the heatmaps, whose probabilities it forms again, and beta."""
    heatmaps, ctx.beta = inputs
    ctx.save_for_backward(heatmaps)


def backward(ctx, grad_coords):
    """Autograd's rule: (B, K, 2) -> gradients of heatmaps and, none, of beta."""
    return soft_argmax_backward(grad_coords, *ctx.saved_tensors, ctx.beta), None


soft_argmax.register_autograd(backward, setup_context=save_for_backward)
