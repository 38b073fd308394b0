"""Triplet-angle distance: the mean angular difference between all source and all target poses (Eq. 7).

    theta(first, middle, last) = atan2(|a x b|, a . b),    a = first - middle,    b = last - middle
    distance[m, n] = ||theta_m - theta_n|| sqrt(A / n_valid) / K

over the n_valid triplets that are usable in both poses; and the list of the pairs below a threshold.

What it must move: the poses, 8 K (S + T) bytes, and the matrix, 4 S T bytes. What it must do: a difference, a
square and a sum for every pair and triplet, 3 S T A operations, and (S + T) A angles of about 60. At S = T =
4096 and A = 16 that is 67 MB, 16 microseconds of H200's memory, and 0.8 billion operations, 28 microseconds
of its float32 lanes: arithmetic decides, and it is all in the inner sum.

In PyTorch the differences are a tensor S x T x A, with a mask of a quarter of its size, both written and read
again to be summed over A: 5 GB of traffic for the 67 MB. Here a program owns a tile of the matrix. For a few
triplets at a time (COLUMNS) it forms the angles of the tile's poses from their keypoints, one angle a thread,
shares them among its threads and adds the squared differences to the tile in registers. Nothing but the
result is written. The angles of a pose are formed again in every tile that it meets: 2 BLOCK of them against
BLOCK x BLOCK differences, in place of a table of angles and the launch that would write it.

Pruning costs nothing where there is nothing to prune: a program looks whether all poses of its tile have the
triplets at hand, and only if not does it test each pair. An angle that is not usable stands as +inf among
the source's and as -inf among the target's, so that the difference tells.

The list of similar pairs comes from running one kernel twice: first it counts the pairs of each row, then,
where the running sum of the counts says, it writes them. Because it is the same compiled code that decides
both times, the counts are right to the last pair, and rows and columns come in rising order whatever the
order of the programs. Two 65,536 x 65,536 passes take two numbers a row, not the 17 GB of the matrix.
"""
from typing import Optional

import torch
from torch import Tensor

from kernels import reference
from kernels.common import COMPILE_OPTIONS, PROGRAMS, device_of, register, runs_triton, tl, triton

# Tile of (BLOCK x BLOCK) pairs, and the triplets taken at a time. Large tiles form few angles a pair, and two
# triplets keep the differences in registers. A matrix of few such tiles would leave most of a GPU idle while
# each program loops over the triplets: there small tiles take them all at once.
LARGE = dict(BLOCK=64, COLUMNS=2, num_warps=4)
SMALL = dict(BLOCK=16, COLUMNS=16, num_warps=4)
FEW_TILES = 128
MINING = dict(BLOCK=32, COLUMNS=4, num_warps=4)   # places of the pairs, int64, take the registers of the rest


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
def angles(poses, valid, n, first, middle, last, known, stride_n, stride_k, stride_c,
           valid_stride_n, valid_stride_k, MASKED: tl.constexpr):
    """Angles of the poses n (BLOCK,) at some triplets (COLUMNS,), and whether they are usable."""
    pose = poses + (n.to(tl.int64) * stride_n)[:, None]
    x = tl.load(pose + (middle * stride_k)[None, :]).to(tl.float32)
    y = tl.load(pose + (middle * stride_k + stride_c)[None, :]).to(tl.float32)
    ax = tl.load(pose + (first * stride_k)[None, :]).to(tl.float32) - x
    ay = tl.load(pose + (first * stride_k + stride_c)[None, :]).to(tl.float32) - y
    bx = tl.load(pose + (last * stride_k)[None, :]).to(tl.float32) - x
    by = tl.load(pose + (last * stride_k + stride_c)[None, :]).to(tl.float32) - y
    usable = known[None, :] & ((ax != 0.0) | (ay != 0.0)) & ((bx != 0.0) | (by != 0.0))
    if MASKED:
        flags = valid + (n.to(tl.int64) * valid_stride_n)[:, None]
        usable = usable & (tl.load(flags + (first * valid_stride_k)[None, :]) != 0)
        usable = usable & (tl.load(flags + (middle * valid_stride_k)[None, :]) != 0)
        usable = usable & (tl.load(flags + (last * valid_stride_k)[None, :]) != 0)
    return atan2_upper(tl.abs(ax * by - ay * bx), ax * bx + ay * by), usable


@triton.jit
def encoded(angle, usable, SIGN: tl.constexpr):
    """Angles as the inner sum takes them, (COLUMNS, BLOCK), and 1 if all are numbers and usable.

    Not usable: +inf or -inf by side, whose difference with anything of the other side is infinite. NaN:
    +1e38 or -1e38, whose difference is finite but for the former, and whose square is infinite.
    """
    number = angle == angle
    plain = tl.min(tl.min((usable & number).to(tl.int32), axis=1), axis=0)
    angle = tl.where(usable, tl.where(number, angle, SIGN * 1e38), SIGN * float("inf"))
    return tl.trans(angle), plain


@triton.jit
def tile_distance(source, target, source_valid, target_valid, triplets, s, t, keypoints, A, min_triplets,
                  source_n, source_k, source_c, target_n, target_k, target_c,
                  source_valid_n, source_valid_k, target_valid_n, target_valid_k,
                  SOURCE_MASKED: tl.constexpr, TARGET_MASKED: tl.constexpr,
                  BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Distances (BLOCK, BLOCK) between the source poses s (BLOCK,) and the target poses t (BLOCK,)."""
    squares = tl.zeros((BLOCK, BLOCK), tl.float32)
    missing = tl.zeros((BLOCK, BLOCK), tl.int32)
    all_plain = 1
    for start in range(0, A, COLUMNS):
        a = start + tl.arange(0, COLUMNS)
        first = tl.load(triplets + 3 * a, mask=a < A, other=-1)
        middle = tl.load(triplets + 3 * a + 1, mask=a < A, other=-1)
        last = tl.load(triplets + 3 * a + 2, mask=a < A, other=-1)
        # Indices on a GPU were not checked by the host: one out of range must not read beyond the poses.
        low = tl.minimum(tl.minimum(first, middle), last)
        high = tl.maximum(tl.maximum(first, middle), last)
        known = (low >= 0) & (high < keypoints)
        first = tl.where(known, first, 0)
        middle = tl.where(known, middle, 0)
        last = tl.where(known, last, 0)
        source_angle, source_usable = angles(
            source, source_valid, s, first, middle, last, known, source_n, source_k, source_c,
            source_valid_n, source_valid_k, SOURCE_MASKED)
        target_angle, target_usable = angles(
            target, target_valid, t, first, middle, last, known, target_n, target_k, target_c,
            target_valid_n, target_valid_k, TARGET_MASKED)
        ours, ours_plain = encoded(source_angle, source_usable, 1.0)
        theirs, theirs_plain = encoded(target_angle, target_usable, -1.0)
        plain = tl.minimum(ours_plain, theirs_plain)
        all_plain = tl.minimum(all_plain, plain)
        # (COLUMNS, BLOCK, BLOCK): the first axis lies within a thread, which sums over it in registers.
        difference = ours[:, :, None] - theirs[:, None, :]
        if plain == 0:
            unusable = tl.abs(difference) == float("inf")
            difference = tl.where(unusable, 0.0, difference)
            missing += tl.sum(unusable.to(tl.int32), axis=0)
        squares += tl.sum(difference * difference, axis=0)
    distance = tl.sqrt(squares) / keypoints
    if (all_plain == 0) | (min_triplets > A):
        # Columns beyond A were counted as missing.
        shared = tl.cdiv(A, COLUMNS) * COLUMNS - missing
        distance *= tl.sqrt(A / tl.maximum(shared, 1).to(tl.float32))
        distance = tl.where(squares == float("inf"), float("nan"), distance)
        distance = tl.where(shared >= min_triplets, distance, float("inf"))
    return distance


@triton.jit
def distance_kernel(source, target, source_valid, target_valid, triplets, distance,
                    S, T, keypoints, A, min_triplets,
                    source_b, source_n, source_k, source_c, target_b, target_n, target_k, target_c,
                    source_valid_b, source_valid_n, source_valid_k,
                    target_valid_b, target_valid_n, target_valid_k,
                    SOURCE_MASKED: tl.constexpr, TARGET_MASKED: tl.constexpr,
                    BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (tile of a matrix): its distances."""
    wide = tl.cdiv(T, BLOCK)
    tiles = tl.cdiv(S, BLOCK) * wide
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    s = tile // wide * BLOCK + tl.arange(0, BLOCK)
    t = tile % wide * BLOCK + tl.arange(0, BLOCK)
    # Lanes beyond the last pose repeat it, and are not stored.
    result = tile_distance(
        source + b * source_b, target + b * target_b, source_valid + b * source_valid_b,
        target_valid + b * target_valid_b, triplets, tl.minimum(s, S - 1), tl.minimum(t, T - 1), keypoints, A,
        min_triplets, source_n, source_k, source_c, target_n, target_k, target_c,
        source_valid_n, source_valid_k, target_valid_n, target_valid_k,
        SOURCE_MASKED, TARGET_MASKED, BLOCK, COLUMNS)
    # int64: the matrix may have more than 2^31 entries.
    entry = (b * S + s)[:, None] * T + t[None, :]
    tl.store(distance + entry, result, mask=(s < S)[:, None] & (t < T)[None, :])


@triton.jit
def pairs_kernel(source, target, source_valid, target_valid, triplets, counts, starts, pairs, limit,
                 gamma, S, T, keypoints, A, min_triplets, chunk,
                 source_n, source_k, source_c, target_n, target_k, target_c,
                 source_valid_n, source_valid_k, target_valid_n, target_valid_k,
                 SOURCE_MASKED: tl.constexpr, TARGET_MASKED: tl.constexpr,
                 BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (rows, chunk of columns): count the pairs of each row if the limit is 0, else write them.

    The limit is read from memory: as an argument Triton would compile the kernel for its value.
    """
    room = tl.load(limit)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, T)
    entry = s.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    position = tl.load(starts + entry, mask=s < S, other=0)   # of no meaning, nor used, while counting
    found = tl.zeros((BLOCK,), tl.int64)
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        distance = tile_distance(
            source, target, source_valid, target_valid, triplets, tl.minimum(s, S - 1), tl.minimum(t, T - 1),
            keypoints, A, min_triplets, source_n, source_k, source_c, target_n, target_k, target_c,
            source_valid_n, source_valid_k, target_valid_n, target_valid_k,
            SOURCE_MASKED, TARGET_MASKED, BLOCK, COLUMNS)
        hit = ((distance < gamma) & (s < S)[:, None] & (t < end)[None, :]).to(tl.int32)
        row = tl.sum(hit, axis=1)
        if tl.max(row, axis=0) * room > 0:
            place = (position + found)[:, None] + tl.cumsum(hit, axis=1) - hit
            write = (hit == 1) & (place < room)
            tl.store(pairs + 2 * place, s[:, None] + tl.zeros_like(place), mask=write)
            tl.store(pairs + 2 * place + 1, t[None, :] + tl.zeros_like(place), mask=write)
        found += row
    if room == 0:
        tl.store(counts + entry, found, mask=s < S)


def launch(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """`reference.triplet_angle_distance` with the Triton kernel; any strides, not float64."""
    S, T, keypoints = source.shape[-3], target.shape[-3], source.shape[-2]
    lead = torch.broadcast_shapes(source.shape[:-3], target.shape[:-3])
    distance = source.new_empty((*lead, S, T), dtype=torch.float32)
    if distance.numel() == 0:
        return distance

    def one_batch(tensor, dims):
        return tensor.expand(*lead, *tensor.shape[-dims:]).reshape(-1, *tensor.shape[-dims:])

    source, target = one_batch(source, 3), one_batch(target, 3)
    # A mask that is not given is never read; any tensor will do for its pointer.
    flags, flag_strides = [], []
    for valid in (source_valid, target_valid):
        flags.append(triplets if valid is None else one_batch(valid.view(torch.uint8), 2))
        flag_strides += (0, 0, 0) if valid is None else flags[-1].stride()

    def tiles(block):
        return source.shape[0] * triton.cdiv(S, block) * triton.cdiv(T, block)

    tile = LARGE if tiles(LARGE["BLOCK"]) >= FEW_TILES else SMALL
    with device_of(source):
        distance_kernel[(tiles(tile["BLOCK"]),)](
            source, target, *flags, triplets.contiguous(), distance, S, T, keypoints, triplets.shape[0],
            max(1, min_triplets), *source.stride(), *target.stride(), *flag_strides,
            SOURCE_MASKED=source_valid is not None, TARGET_MASKED=target_valid is not None,
            **tile, **COMPILE_OPTIONS)
    return distance


def launch_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
                 capacity=None):
    """`reference.similar_pairs` with the Triton kernel; any strides, not float64."""
    S, T, keypoints = source.shape[0], target.shape[0], source.shape[1]
    if S * T == 0 or capacity == 0:
        return triplets.new_full((capacity or 0, 2), -1)
    flags, flag_strides = [], []
    for valid in (source_valid, target_valid):
        flags.append(triplets if valid is None else valid.view(torch.uint8))
        flag_strides += (0, 0) if valid is None else flags[-1].stride()
    block = MINING["BLOCK"]
    # Few rows: their columns are divided too, so that there are programs enough.
    rows = triton.cdiv(S, block)
    chunks = min(triton.cdiv(T, block), triton.cdiv(2 * PROGRAMS, rows))
    chunk = triton.cdiv(triton.cdiv(T, chunks), block) * block
    chunks = triton.cdiv(T, chunk)

    def run(counts, starts, pairs, limit):
        with device_of(source):
            pairs_kernel[(rows, chunks)](
                source, target, *flags, triplets.contiguous(), counts, starts, pairs, limit, gamma, S, T,
                keypoints, triplets.shape[0], max(1, min_triplets), chunk, *source.stride(), *target.stride(),
                *flag_strides,
                SOURCE_MASKED=source_valid is not None, TARGET_MASKED=target_valid is not None,
                **MINING, **COMPILE_OPTIONS)

    counts = triplets.new_empty((S, chunks))
    run(counts, counts, counts, triplets.new_zeros(1))
    ends = counts.flatten().cumsum(0)
    if capacity is None:
        pairs = triplets.new_empty((ends[-1].item(), 2))   # waits for the GPU
    else:
        pairs = triplets.new_full((capacity, 2), -1)
    if len(pairs):
        run(counts, ends - counts.flatten(), pairs, triplets.new_full((1,), len(pairs)))
    return pairs


def triplet_angle_distance(source: Tensor, target: Tensor, triplets: Tensor,
                           source_valid: Optional[Tensor] = None, target_valid: Optional[Tensor] = None,
                           min_triplets: int = 1):
    """The operator behind `kernels.triplet_angle_distance`, which says what it takes and returns."""
    arguments = source, target, triplets, source_valid, target_valid, min_triplets
    if not runs_triton(source, target):
        return reference.triplet_angle_distance(*arguments)
    reference.check_poses(*arguments)
    reference.check_indices(triplets, source.shape[-2])
    return launch(*arguments)


def similar_pairs(source: Tensor, target: Tensor, triplets: Tensor, gamma: float,
                  source_valid: Optional[Tensor] = None, target_valid: Optional[Tensor] = None,
                  min_triplets: int = 1, capacity: Optional[int] = None):
    """The operator behind `kernels.similar_pairs`, which says what it takes and returns."""
    arguments = source, target, triplets, gamma, source_valid, target_valid, min_triplets, capacity
    if not runs_triton(source, target):
        return reference.similar_pairs(*arguments)
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    reference.check_pairs(source, target, gamma, capacity)
    reference.check_indices(triplets, source.shape[-2])
    return launch_pairs(*arguments)


def fake_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Shape and dtype of `triplet_angle_distance`."""
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    lead = torch.broadcast_shapes(source.shape[:-3], target.shape[:-3])
    return source.new_empty((*lead, source.shape[-3], target.shape[-3]), dtype=torch.float32)


def fake_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
               capacity=None):
    """Shape and dtype of `similar_pairs`, whose number of rows is learnt when it runs."""
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    reference.check_pairs(source, target, gamma, capacity)
    if capacity is None:
        capacity = torch.library.get_ctx().new_dynamic_size()
    return triplets.new_empty((capacity, 2))


def map_distance(operator):
    """vmap of the distance: the mapped dimension becomes the first of the leading ones."""
    def rule(info, in_dims, *arguments):
        if in_dims[2] is not None:
            raise ValueError("triplets must be the same for all that is mapped over: give them in_dims None")
        lead = max(poses.dim() + (dim is None) - 4 for poses, dim in zip(arguments[:2], in_dims))

        def mapped(tensor, dim, own):
            tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor[(slice(None), *(None,) * (lead + 1 + own - tensor.dim()))]

        arguments = list(arguments)
        for i, own in ((0, 3), (1, 3), (3, 2), (4, 2)):   # poses end in (N, K, 2), masks in (N, K)
            if i < len(arguments) and arguments[i] is not None:
                arguments[i] = mapped(arguments[i], in_dims[i], own)
        return operator(*arguments), 0
    return rule


register("triplet_angle_distance(Tensor source, Tensor target, Tensor triplets, Tensor? source_valid=None, "
         "Tensor? target_valid=None, int min_triplets=1) -> Tensor",
         triplet_angle_distance, fake_distance, map_distance)
register("similar_pairs(Tensor source, Tensor target, Tensor triplets, float gamma, "
         "Tensor? source_valid=None, Tensor? target_valid=None, int min_triplets=1, SymInt? capacity=None) "
         "-> Tensor",
         similar_pairs, fake_pairs, None)
