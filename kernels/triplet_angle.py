"""Triplet-angle distance: the mean angular difference between all source and all target poses (Eq. 7).

    theta(first, middle, last) = atan2(|a x b|, a . b),    a = first - middle,    b = last - middle
    distance[m, n] = ||theta_m - theta_n|| sqrt(A / n_valid) / K

over the n_valid triplets that are usable in both poses. In PyTorch the differences are a tensor S x T x A,
with a mask of the same size, both written and read again to be summed over A. Here a program owns a tile of
the S x T matrix and runs over the triplets: it forms the angles of the tile's source and target poses in
registers, straight from the keypoints, and adds their squared differences to the tile. Nothing but the result
is written, in one launch. The angles of a pose are formed again in each tile that it meets: 2 BLOCK of them
against BLOCK x BLOCK differences, in place of a second launch and a table of angles.
"""
from typing import Optional

import torch
from torch import Tensor

from kernels import reference
from kernels.common import COMPILE_OPTIONS, device_of, runs_triton, tl, triton

# A tile of 32 x 32 pairs for one warp: each of its 32 threads forms one source and one target angle and
# shares them. With fewer poses than threads Triton has every thread form all the angles that its own pairs
# need.
BLOCK = 32


@triton.jit
def atan2_upper(y, x):
    """atan2(y, x) for y >= 0, in [0, pi], within 3e-7 rad: 0 and pi for y = 0 to the last bit, 0 at (0, 0).

    The arctangent is the polynomial of Cephes' atanf on |t| <= tan(pi / 8); the rest is symmetry. Only
    operators of the language: Triton's interpreter has no libdevice.
    """
    side = tl.abs(x)
    low = tl.minimum(y, side)
    high = tl.maximum(y, side)
    # atan(r) = pi/4 + atan((r - 1) / (r + 1)) for r = low / high beyond tan(pi / 8).
    beyond = low > 0.41421356 * high
    bottom = tl.where(beyond, low + high, high)
    t = tl.where(beyond, low - high, low) / tl.where(bottom == 0.0, 1.0, bottom)
    z = t * t
    series = ((0.0805374449538 * z - 0.138776856032) * z + 0.199777106478) * z - 0.333329491539
    angle = series * z * t + t + tl.where(beyond, 0.78539816339745, 0.0)
    angle = tl.where(y > side, 1.57079632679490 - angle, angle)
    return tl.where(x < 0.0, 3.14159265358979 - angle, angle)


@triton.jit
def angles(poses, valid, n, count, first, middle, last, stride_n, stride_k, stride_c,
           valid_stride_n, valid_stride_k, HAS_VALID: tl.constexpr):
    """One triplet's angle in the poses n (BLOCK,), 0 where it is not usable, and whether it is."""
    inside = n < count
    pose = poses + n.to(tl.int64) * stride_n
    x = tl.load(pose + middle * stride_k, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(pose + middle * stride_k + stride_c, mask=inside, other=0.0).to(tl.float32)
    ax = tl.load(pose + first * stride_k, mask=inside, other=0.0).to(tl.float32) - x
    ay = tl.load(pose + first * stride_k + stride_c, mask=inside, other=0.0).to(tl.float32) - y
    bx = tl.load(pose + last * stride_k, mask=inside, other=0.0).to(tl.float32) - x
    by = tl.load(pose + last * stride_k + stride_c, mask=inside, other=0.0).to(tl.float32) - y
    usable = inside & ((ax != 0.0) | (ay != 0.0)) & ((bx != 0.0) | (by != 0.0))
    if HAS_VALID:
        flags = valid + n.to(tl.int64) * valid_stride_n
        usable = usable & (tl.load(flags + first * valid_stride_k, mask=inside, other=0) != 0)
        usable = usable & (tl.load(flags + middle * valid_stride_k, mask=inside, other=0) != 0)
        usable = usable & (tl.load(flags + last * valid_stride_k, mask=inside, other=0) != 0)
    return tl.where(usable, atan2_upper(tl.abs(ax * by - ay * bx), ax * bx + ay * by), 0.0), usable


@triton.jit
def distance_kernel(source, target, source_valid, target_valid, triplets, distance,
                    S, T, keypoints, A, minimum,
                    source_n, source_k, source_c, target_n, target_k, target_c,
                    source_valid_n, source_valid_k, target_valid_n, target_valid_k, triplet_a, triplet_i,
                    HAS_SOURCE_VALID: tl.constexpr, HAS_TARGET_VALID: tl.constexpr,
                    BLOCK: tl.constexpr):
    """Program (tile of the S x T matrix): sum the squared differences of its poses' angles over the
    triplets."""
    tiles = tl.cdiv(T, BLOCK)
    s = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK, BLOCK), tl.float32)
    shared = tl.zeros((BLOCK, BLOCK), tl.float32)
    for a in range(0, A):
        first = tl.load(triplets + a * triplet_a)
        middle = tl.load(triplets + a * triplet_a + triplet_i)
        last = tl.load(triplets + a * triplet_a + 2 * triplet_i)
        # Indices on a GPU were not checked by the host: one out of range must not read beyond the poses.
        low = tl.minimum(tl.minimum(first, middle), last)
        high = tl.maximum(tl.maximum(first, middle), last)
        known = tl.where(low >= 0, tl.where(high < keypoints, 1, 0), 0)
        source_angle, source_usable = angles(
            source, source_valid, s, S * known, first, middle, last, source_n, source_k, source_c,
            source_valid_n, source_valid_k, HAS_SOURCE_VALID)
        target_angle, target_usable = angles(
            target, target_valid, t, T * known, first, middle, last, target_n, target_k, target_c,
            target_valid_n, target_valid_k, HAS_TARGET_VALID)
        both = source_usable[:, None] & target_usable[None, :]
        difference = tl.where(both, source_angle[:, None] - target_angle[None, :], 0.0)
        squares += difference * difference
        shared += tl.where(both, 1.0, 0.0)
    scaled = tl.sqrt(squares * (A / tl.maximum(shared, 1.0))) / keypoints
    result = tl.where(shared >= tl.maximum(minimum, 1), scaled, float("inf"))
    # int64: the matrix may have more than 2^31 entries.
    entry = s.to(tl.int64)[:, None] * T + t[None, :]
    tl.store(distance + entry, result, mask=(s < S)[:, None] & (t < T)[None, :])


def launch(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """`reference.triplet_angle_distance` with the Triton kernel; any strides, not float64."""
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    reference.check_indices(triplets, source.shape[1])
    S, T, keypoints = source.shape[0], target.shape[0], source.shape[1]
    distance = source.new_empty((S, T), dtype=torch.float32)
    if S * T == 0:
        return distance
    # A mask that is not given is never read; any tensor will do for its pointer.
    source_flags = triplets if source_valid is None else source_valid.view(torch.uint8)
    target_flags = triplets if target_valid is None else target_valid.view(torch.uint8)
    with device_of(source):
        distance_kernel[(triton.cdiv(S, BLOCK) * triton.cdiv(T, BLOCK),)](
            source, target, source_flags, target_flags, triplets, distance,
            S, T, keypoints, triplets.shape[0], min_triplets, *source.stride(), *target.stride(),
            *source_flags.stride(), *target_flags.stride(), *triplets.stride(),
            HAS_SOURCE_VALID=source_valid is not None, HAS_TARGET_VALID=target_valid is not None,
            BLOCK=BLOCK, num_warps=1, **COMPILE_OPTIONS)
    return distance


@torch.library.custom_op("actupose::triplet_angle_distance", mutates_args=())
def triplet_angle_distance(source: Tensor, target: Tensor, triplets: Tensor,
                           source_valid: Optional[Tensor] = None, target_valid: Optional[Tensor] = None,
                           min_triplets: int = 1) -> Tensor:
    """The operator behind `kernels.triplet_angle_distance`, which says what it takes and returns."""
    decide = launch if runs_triton(source, target) else reference.triplet_angle_distance
    return decide(source, target, triplets, source_valid, target_valid, min_triplets)


@triplet_angle_distance.register_fake
def _(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    return source.new_empty((source.shape[0], target.shape[0]), dtype=torch.float32)
