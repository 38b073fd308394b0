"""Triplet-angle distance: how far the angles of all source and all target poses are apart (Eq. 7).

    theta(first, middle, last) = atan2(|a x b|, a . b),    a = first - middle,    b = last - middle
    distance[m, n] = ||theta_m - theta_n|| sqrt(A / n_valid) / K

over the n_valid triplets of A that are usable in both poses. The paper calls Eq. 7 the mean angular
difference. It is a norm over A angles, divided by the number of keypoints K. The factor sqrt(A / n_valid) is
ours.

In PyTorch the differences are a tensor (S, T, A) that is written and read again: 5 GB of traffic at S = T =
4096 and A = 16, for a matrix of 67 MB. Here a program computes the angles of the poses of a tile of the
matrix and adds the squared differences of its pairs in registers. So nothing is written but the result, and
one launch serves every size. Each tile computes the angles of its poses anew, which a table of all angles,
written by a launch before, would spare. In a tile of 128 x 128 pairs that is a tenth of the instructions; in
a small matrix, where most of a GPU has nothing to do, it costs no time, and the second launch would.

What is not usable costs nothing to leave out. Its angle is NaN, so is every difference from it, and the
maximum of NaN and 0 is 0. How many triplets are usable in both poses is the number of bits that are set in
both poses' words.
"""
from collections import namedtuple
from functools import lru_cache
from math import sqrt

import torch

from kernels import reference
from kernels.common import Launch, ceil_div, plan_key, power_of_2, register, tl, triton

# (BLOCK, COLUMNS): tiles of BLOCK x BLOCK pairs, COLUMNS triplets at a time. The product is the number of
# threads: at every step a thread computes one angle of each side.
TILES = (128, 1), (64, 2), (16, 16)
ENOUGH = 128           # tiles; about one for each multiprocessor of a large GPU
GRID_LIMIT = 65535     # CUDA's, for the second dimension of a grid

Key = namedtuple("Key", "shape strides dtype device aligned")   # a `plan_key`, by names


@triton.jit
def atan2_upper(y, x):
    """atan2(y, x) for y >= 0, in [0, pi], within 3e-7 rad: 0 and pi for y = 0 to the last bit, 0 at (0, 0).

    The polynomial for the arctangent of 0 ... 1 is Abramowitz and Stegun's 4.4.49, within 2e-8; the rest is
    symmetry. Only operators of the language: Triton's interpreter has no libdevice.
    """
    side = tl.abs(x)
    high = tl.maximum(tl.maximum(y, side), 1.1754944e-38)   # at least the smallest normal number: not 0 / 0
    t = tl.minimum(y, side) / high
    z = t * t
    series = 0.0028662257 * z - 0.0161657367
    series = series * z + 0.0429096138
    series = series * z - 0.0752896400
    series = series * z + 0.1065626393
    series = series * z - 0.1420889944
    series = series * z + 0.1999355085
    series = series * z - 0.3333314528
    angle = series * z * t + t
    angle = tl.where(y > side, 1.57079632679490 - angle, angle)
    return tl.where(x < 0.0, 3.14159265358979 - angle, angle)


@triton.jit
def keypoint(poses, number):
    """x and y of keypoints, counted from the first pose's first."""
    xy = 2 * number.to(tl.int64)[:, :, None] + tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(poses + xy).to(tl.float32))


@triton.jit
def pose_angles(poses, valid, pose, first, middle, last, known, UNDEFINED: tl.constexpr):
    """Angles (BLOCK, COLUMNS) of poses whose first keypoint is number `pose` (BLOCK, 1), at the triplets
    (1, COLUMNS) that name keypoints. NaN: not usable. UNDEFINED: usable, but a coordinate is NaN."""
    x, y = keypoint(poses, pose + middle)
    ax, ay = keypoint(poses, pose + first)
    bx, by = keypoint(poses, pose + last)
    ax -= x
    ay -= y
    bx -= x
    by -= y
    usable = known & (tl.minimum(tl.abs(ax) + tl.abs(ay), tl.abs(bx) + tl.abs(by)) != 0.0)   # have a length
    if valid is not None:
        usable &= tl.load(valid + (pose + first))
        usable &= tl.load(valid + (pose + middle))
        usable &= tl.load(valid + (pose + last))
    angle = atan2_upper(tl.abs(ax * by - ay * bx), ax * bx + ay * by)
    angle = tl.where(angle == angle, angle, UNDEFINED)
    return tl.where(usable, angle, float("nan"))


@triton.jit
def set_bits(words, theta, start, a, WORDS: tl.constexpr):
    """Words (WORDS, BLOCK) of 32 triplets with the bits set of those, among a = start, start + 1 ..., whose
    angle (BLOCK, COLUMNS) is usable."""
    bits = tl.sum((theta == theta).to(tl.int32) << (a % 32)[None, :], axis=1)[None, :]
    if WORDS > 1:
        bits = tl.where(tl.arange(0, WORDS)[:, None] == start // 32, bits, 0)
    return words + bits


@triton.jit
def count_bits(word):
    """How many bits of an int32 are set. LLVM knows this idiom and makes one instruction of it, POPC."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["T"])   # see docs/kernels.md: wider stores would take more registers
def distance_kernel(source, target, source_valid, target_valid, triplets, distance,
                    S, T, keypoints, A, min_triplets, scale,
                    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr):
    """Program (tile of target poses, tile of source poses): the angles of its poses, its distances.

    scale: sqrt(A) / K; WORDS: of 32 triplets each. Poses and masks are contiguous.
    """
    m = tl.program_id(1) * BLOCK     # first pose of the tile
    n = tl.program_id(0) * BLOCK
    # int64: there may be more than 2^31 coordinates, and more than 2^31 pairs.
    source += m.to(tl.int64) * 2 * keypoints
    target += n.to(tl.int64) * 2 * keypoints
    if source_valid is not None:
        source_valid += m.to(tl.int64) * keypoints
    if target_valid is not None:
        target_valid += n.to(tl.int64) * keypoints
    i = tl.arange(0, BLOCK)
    pose_m = tl.minimum(i, S - 1 - m)[:, None] * keypoints   # beyond the last pose, the last again
    pose_n = tl.minimum(i, T - 1 - n)[:, None] * keypoints
    squares = tl.zeros((BLOCK, BLOCK), tl.float32)
    words_m = tl.zeros((WORDS, BLOCK), tl.int32)
    words_n = tl.zeros((WORDS, BLOCK), tl.int32)
    for start in range(0, A, COLUMNS):
        a = start + tl.arange(0, COLUMNS)
        first = tl.load(triplets + 3 * a, mask=a < A, other=-1)
        middle = tl.load(triplets + 3 * a + 1, mask=a < A, other=-1)
        last = tl.load(triplets + 3 * a + 2, mask=a < A, other=-1)
        # Indices on a GPU were not checked by the host: one out of range must not read beyond the poses.
        # A negative one is large without its sign.
        known = (first.to(tl.uint64) < keypoints) & (middle.to(tl.uint64) < keypoints)
        known = (known & (last.to(tl.uint64) < keypoints))[None, :]
        first = tl.where(known, first[None, :], 0).to(tl.int32)
        middle = tl.where(known, middle[None, :], 0).to(tl.int32)
        last = tl.where(known, last[None, :], 0).to(tl.int32)
        # A usable triplet with a NaN coordinate must make the distance NaN, but NaN already means "not
        # usable". So it is +inf on the source side and -inf on the target side: its difference from every
        # usable angle is infinite, and below an infinite result becomes NaN.
        theta_m = pose_angles(source, source_valid, pose_m, first, middle, last, known, float("inf"))
        theta_n = pose_angles(target, target_valid, pose_n, first, middle, last, known, float("-inf"))
        words_m = set_bits(words_m, theta_m, start, a, WORDS)
        words_n = set_bits(words_n, theta_n, start, a, WORDS)
        difference = tl.trans(theta_m)[:, :, None] - tl.trans(theta_n)[:, None, :]
        kept = tl.maximum(tl.abs(difference), 0.0)   # 0 where the difference is NaN
        squares += tl.sum(kept * kept, axis=0)
    shared = tl.sum(count_bits(words_m[:, :, None] & words_n[:, None, :]), axis=0)
    # Both roots are approximate on a GPU, within a relative 2^-22.9. The factor is 0 where there are too few.
    factor = tl.where(shared >= min_triplets, tl.rsqrt(shared.to(tl.float32)) * scale, 0.0)
    result = tl.sqrt(squares) * factor   # Eq. 7
    result = tl.where(result == float("inf"), float("nan"), result)
    result = tl.where(factor > 0.0, result, float("inf"))
    distance += m.to(tl.int64) * T + n
    entry = i.to(tl.int64)[:, None] * T + i[None, :]
    tl.store(distance + entry, result, mask=(i < S - m)[:, None] & (i < T - n)[None, :])


@lru_cache(maxsize=1024)
def plan(source, target, triplets, source_valid, target_valid, min_triplets):
    """The launch for tensors that are given by their `plan_key`s, None where no pair can have a distance;
    whether its tiles are more than a grid can have."""
    source = Key(*source)
    target = Key(*target)
    triplets = Key(*triplets)
    source_valid = source_valid and Key(*source_valid)
    target_valid = target_valid and Key(*target_valid)
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    S, K, _ = source.shape
    T = target.shape[0]
    A = triplets.shape[0]
    least = max(min_triplets, 1)
    if S * T == 0 or least > A:
        return None, False
    words = power_of_2(ceil_div(A, 32))
    # The largest tile of which there are enough, and whose words are few; else the smallest.
    for block, columns in TILES:
        tiles = ceil_div(S, block) * ceil_div(T, block)
        if tiles >= ENOUGH and block * words <= 128:
            break
    grid = ceil_div(T, block), ceil_div(S, block)
    launch = Launch(distance_kernel, grid, (S, T, K, A, least, sqrt(A) / K),
                    dict(BLOCK=block, COLUMNS=columns, WORDS=words), num_warps=block * columns // 32)
    return launch, grid[1] > GRID_LIMIT


def key_of(tensor):
    """`plan_key`, None for None."""
    return None if tensor is None else plan_key(tensor)


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """The operator behind `kernels.triplet_angle_distance`."""
    arguments = source, target, triplets, source_valid, target_valid, min_triplets
    if source.dim() != 3 or target.dim() != 3:   # the kernel has no leading dimensions
        return reference.triplet_angle_distance(*arguments)
    # Poses are small: where they are not contiguous, to copy them costs less than strides in the kernel.
    source = source.contiguous()
    target = target.contiguous()
    triplets = triplets.contiguous()
    source_valid = None if source_valid is None else source_valid.contiguous()
    target_valid = None if target_valid is None else target_valid.contiguous()
    launch, too_many = plan(plan_key(source), plan_key(target), plan_key(triplets),
                            key_of(source_valid), key_of(target_valid), min_triplets)
    if too_many:
        return reference.triplet_angle_distance(*arguments)
    reference.check_indices(triplets, source.shape[-2])
    distance = source.new_empty(len(source), len(target), dtype=torch.float32)
    if launch is None:
        return distance.fill_(float("inf"))
    launch(source, target, source_valid, target_valid, triplets, distance)
    return distance


register("triplet_angle_distance(Tensor source, Tensor target, Tensor triplets, Tensor? source_valid=None, "
         "Tensor? target_valid=None, int min_triplets=1) -> Tensor",
         triplet_angle_distance, reference.triplet_angle_distance)
