"""Triplet-angle distance: the mean angular difference between all source and all target poses (Eq. 7).

    theta(first, middle, last) = atan2(|a x b|, a . b),    a = first - middle,    b = last - middle
    distance[m, n] = ||theta_m - theta_n|| sqrt(A / n_valid) / K

over the n_valid triplets that are usable in both poses; and the list of the pairs below a threshold.

In PyTorch the differences are a tensor (S, T, A) that is written and read again: 5 GB of traffic at S = T =
4096 and A = 16, for a matrix of 67 MB. Here a first launch writes the angles of all poses, (S + T) A numbers,
and each program of a second adds the squared differences of a tile of the matrix in registers. 64 x 64 pairs
on 4 warps take 87 instructions per warp and triplet on sm_90, 64 of them the arithmetic of 32 pairs per
thread, 96 registers, and no barrier in the loop: 30 us on an H100 by these counts, 20 by what it must write.

Pruning costs nothing where there is nothing to prune. An angle that is not usable is infinite, and one that
is NaN so large that its square is: a tile whose sums are finite is done, any other starts again and counts.

The list of similar pairs comes from running one kernel twice on the same table: first it counts the pairs of
each row, then it writes them at the places that the running sum of the counts gives. The same compiled code
decides both times, so the counts are right to the last pair, and pairs come in rising order whatever the
order of the programs. At 65,536 x 65,536 this takes two numbers per row, not the 17 GB of the matrix.
"""
from functools import lru_cache
from math import prod
from types import SimpleNamespace

import torch

from kernels import reference
from kernels.common import WARPS, Launch, ceil_div, plan_key, register, tl, triton

# Tile of (BLOCK x BLOCK) pairs, triplets taken at a time, options. Where there are few large tiles, most of a
# GPU would idle while each program waits for one triplet after the other: small tiles read all at once.
LARGE = 64, 2, dict(num_warps=4)
SMALL = 16, 16, dict(num_warps=4)
MINING = 16, 4, dict(num_warps=1)   # sums and maxima of a single warp need no barriers
FEW_TILES = 128     # large ones
ROWS = 64           # poses of a program that writes the table, whose rows are padded to a multiple


@triton.jit
def atan2_upper(y, x):
    """atan2(y, x) for y >= 0, in [0, pi], within 3e-7 rad: 0 and pi for y = 0 to the last bit, 0 at (0, 0).

    The arctangent is the polynomial of Cephes' atanf on |t| <= tan(pi / 8); the rest is symmetry. Only
    operators of the language: Triton's interpreter has no libdevice. A plain `/` is not exact on a GPU.
    """
    side = tl.abs(x)
    low = tl.minimum(y, side)
    high = tl.maximum(y, side)
    # atan(r) = pi/4 + atan((r - 1) / (r + 1)) for r = low / high beyond tan(pi / 8).
    beyond = low > 0.41421356 * high
    bottom = tl.where(beyond, low + high, high)
    t = tl.div_rn(tl.where(beyond, low - high, low), tl.where(bottom == 0.0, 1.0, bottom))
    z = t * t
    series = ((0.0805374449538 * z - 0.138776856032) * z + 0.199777106478) * z - 0.333329491539
    angle = series * z * t + t + tl.where(beyond, 0.78539816339745, 0.0)
    angle = tl.where(y > side, 1.57079632679490 - angle, angle)
    return tl.where(x < 0.0, 3.14159265358979 - angle, angle)


@triton.jit
def angles(poses, valid, triplets, n, a, keypoints, A, stride_n, stride_k, stride_c, valid_n, valid_k,
           MASKED: tl.constexpr, SIGN: tl.constexpr):
    """Angles of the poses n (1, BLOCK) at the triplets a (COLUMNS, 1), as the table holds them.

    Not usable: +inf or -inf by side, whose difference with anything of the other side is infinite. NaN:
    +1e38 or -1e38, whose difference is finite but for the former, and whose square is infinite.
    """
    first = tl.load(triplets + 3 * a, mask=a < A, other=-1)
    middle = tl.load(triplets + 3 * a + 1, mask=a < A, other=-1)
    last = tl.load(triplets + 3 * a + 2, mask=a < A, other=-1)
    # Indices on a GPU were not checked by the host: one out of range must not read beyond the poses.
    known = tl.minimum(tl.minimum(first, middle), last) >= 0
    known = known & (tl.maximum(tl.maximum(first, middle), last) < keypoints)
    first = tl.where(known, first, 0)
    middle = tl.where(known, middle, 0)
    last = tl.where(known, last, 0)
    pose = poses + n * stride_n
    x = tl.load(pose + middle * stride_k).to(tl.float32)
    y = tl.load(pose + middle * stride_k + stride_c).to(tl.float32)
    ax = tl.load(pose + first * stride_k).to(tl.float32) - x
    ay = tl.load(pose + first * stride_k + stride_c).to(tl.float32) - y
    bx = tl.load(pose + last * stride_k).to(tl.float32) - x
    by = tl.load(pose + last * stride_k + stride_c).to(tl.float32) - y
    usable = known & ((ax != 0.0) | (ay != 0.0)) & ((bx != 0.0) | (by != 0.0))
    if MASKED:
        flags = valid + n * valid_n
        usable = usable & tl.load(flags + first * valid_k)
        usable = usable & tl.load(flags + middle * valid_k) & tl.load(flags + last * valid_k)
    angle = atan2_upper(tl.abs(ax * by - ay * bx), ax * bx + ay * by)
    angle = tl.where(usable, tl.where(angle == angle, angle, SIGN * 1e38), SIGN * float("inf"))
    return tl.where(a < A, angle, 0.0)   # columns beyond A add nothing to a distance


@triton.jit
def table_kernel(source, target, source_valid, target_valid, triplets, table,
                 S, T, keypoints, A, columns, source_rows, rows,
                 source_b, source_n, source_k, source_c, target_b, target_n, target_k, target_c,
                 source_valid_b, source_valid_n, source_valid_k,
                 target_valid_b, target_valid_n, target_valid_k,
                 SOURCE_MASKED: tl.constexpr, TARGET_MASKED: tl.constexpr,
                 BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (batch, poses, triplets): their angles, into a table (batch, columns, rows). Its rows are those
    of the source, padded to a multiple of BLOCK by repeating the last pose, then those of the target."""
    blocks = rows // BLOCK
    a = tl.program_id(0) % (columns // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    block = tl.program_id(0) // (columns // COLUMNS)
    b = (block // blocks).to(tl.int64)
    row = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if block % blocks * BLOCK < source_rows:
        result = angles(source + b * source_b, source_valid + b * source_valid_b, triplets,
                        tl.minimum(row, S - 1), a, keypoints, A, source_n, source_k, source_c,
                        source_valid_n, source_valid_k, SOURCE_MASKED, 1.0)
    else:
        result = angles(target + b * target_b, target_valid + b * target_valid_b, triplets,
                        tl.minimum(row - source_rows, T - 1), a, keypoints, A, target_n, target_k, target_c,
                        target_valid_n, target_valid_k, TARGET_MASKED, -1.0)
    tl.store(table + (b * columns + a) * rows + row, result)


@triton.jit
def zero_tile(memory, BLOCK: tl.constexpr):
    """Zeros (BLOCK, BLOCK), divided among threads as rows in memory would be: nothing is read.

    Triton divides a tile as its loads and stores want it. From plain zeros a thread of a large tile has 32
    pairs of one column, with 33 angles to load; like this eight rows by four columns, with 12.
    """
    n = tl.arange(0, BLOCK)
    return tl.load(memory + n[:, None] * BLOCK + n[None, :], mask=(n < 0)[:, None], other=0.0)


@triton.jit
def tile_distance(source, target, A, min_triplets, columns, rows, scale,
                  BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Distances (BLOCK, BLOCK) of the table's rows from those at `source` and `target`.

    tl.sqrt is approximate on a GPU, within a relative 2^-23; exact, it would take as long as five triplets.
    """
    n = tl.arange(0, BLOCK)
    step = rows.to(tl.int64)
    squares = zero_tile(target, BLOCK)
    ours = source + n
    theirs = target + n
    for _ in range(0, columns, COLUMNS):
        for i in tl.static_range(COLUMNS):
            difference = tl.load(ours + i * step)[:, None] - tl.load(theirs + i * step)[None, :]
            squares += difference * difference
        ours += COLUMNS * step
        theirs += COLUMNS * step
    if tl.max(tl.max(squares, axis=1), axis=0) == float("inf"):
        # Some triplet is not usable or NaN: the sum again, over the usable ones, and their number.
        squares = zero_tile(target, BLOCK)
        missing = zero_tile(target, BLOCK)
        for i in range(0, columns):
            difference = tl.load(source + n + i * step)[:, None] - tl.load(target + n + i * step)[None, :]
            unusable = tl.abs(difference) == float("inf")
            squares += tl.where(unusable, 0.0, difference * difference)
            missing += tl.where(unusable, 1.0, 0.0)
        shared = A - missing
        squares *= A / tl.maximum(shared, 1.0)
        squares = tl.where(squares == float("inf"), float("nan"), squares)
        squares = tl.where(shared >= min_triplets, squares, float("inf"))
    return tl.sqrt(squares) * scale


@triton.jit
def distance_kernel(table, distance, S, T, A, min_triplets, columns, source_rows, rows, scale,
                    BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (tile of a matrix): its distances."""
    wide = (T - 1) // BLOCK + 1
    tiles = ((S - 1) // BLOCK + 1) * wide
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    s = (tile // wide).to(tl.int64) * BLOCK
    t = (tile % wide).to(tl.int64) * BLOCK
    table += b * columns * rows
    result = tile_distance(table + s, table + source_rows + t, A, min_triplets, columns, rows, scale,
                           BLOCK, COLUMNS)
    s += tl.arange(0, BLOCK)
    t += tl.arange(0, BLOCK)
    entry = (b * S + s)[:, None] * T + t[None, :]   # int64: there may be more than 2^31
    tl.store(distance + entry, result, mask=(s < S)[:, None] & (t < T)[None, :])


@triton.jit(do_not_specialize=["room"])   # room changes from call to call: not to compile for its value
def pairs_kernel(table, counts, ends, pairs, room: "i64", gamma,
                 S, T, A, min_triplets, columns, source_rows, rows, scale, chunk,
                 BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (rows, chunk of columns): count the pairs of each row if there is no room, else write them."""
    n = tl.arange(0, BLOCK)
    s = tl.program_id(0).to(tl.int64) * BLOCK + n
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, T)
    entry = s * tl.num_programs(1) + tl.program_id(1)
    start = tl.load(ends + entry - 1, mask=(s < S) & (entry > 0), other=0)   # not used while counting
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        distance = tile_distance(table + tl.program_id(0).to(tl.int64) * BLOCK, table + source_rows + first,
                                 A, min_triplets, columns, rows, scale, BLOCK, COLUMNS)
        hit = (distance < gamma) & (s < S)[:, None] & (n < end - first)[None, :]
        row = tl.sum(hit.to(tl.int32), axis=1)
        if room > 0:
            column = tl.zeros_like(row) - 1
            for i in range(0, tl.max(row, axis=0)):   # the next pair of each row
                column = tl.min(tl.where(hit & (n[None, :] > column[:, None]), n[None, :], BLOCK), axis=1)
                place = start + found + i
                write = (i < row) & (place < room)
                tl.store(pairs + 2 * place, s, mask=write)
                tl.store(pairs + 2 * place + 1, first + column, mask=write)
        found += row
    if room == 0:
        tl.store(counts + entry, found, mask=s < S)
    else:
        # The rows that are left: the programs take turns to fill them.
        programs = tl.num_programs(0) * tl.num_programs(1)
        this = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        total = tl.load(ends + tl.num_programs(1).to(tl.int64) * S - 1)
        for first in range(total + this * BLOCK, room, programs * BLOCK):
            left = 2 * first + tl.arange(0, 2 * BLOCK)
            tl.store(pairs + left, -1, mask=left < 2 * room)


@lru_cache(maxsize=1024)
def plan(source, target, triplets, source_valid, target_valid, min_triplets, mining):
    """Shape of the result (of the counts, if mining), shape of the table, launches that fill it and use it.

    Tensors are given by their `plan_key`s. Where no pair can have a distance there are no launches.
    """
    source, target, triplets, source_valid, target_valid = (   # by names, as the checks take them
        key and SimpleNamespace(**dict(zip(("shape", "strides", "dtype", "device"), key)))
        for key in (source, target, triplets, source_valid, target_valid))
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    (S, K), T, A = source.shape[-3:-1], target.shape[-3], triplets.shape[0]
    lead = torch.broadcast_shapes(source.shape[:-3], target.shape[:-3])
    batch = prod(lead)
    if batch * S * T == 0 or max(min_triplets, 1) > A:
        return (*lead, S, T), None, None, None

    def strides(tensor, dims):   # 0 for a batch that is missing, or one for all
        if tensor is None:
            return (0,) * dims
        return (tensor.strides[0] if tensor.shape[:1 - dims] > (1,) else 0, *tensor.strides[1 - dims:])

    block, at_a_time, options = MINING
    if not mining:
        large_tiles = batch * ceil_div(S, LARGE[0]) * ceil_div(T, LARGE[0])
        block, at_a_time, options = LARGE if large_tiles >= FEW_TILES else SMALL
    source_rows, target_rows = ceil_div(S, ROWS) * ROWS, ceil_div(T, ROWS) * ROWS
    rows, columns = source_rows + target_rows, ceil_div(A, at_a_time) * at_a_time
    masked = dict(SOURCE_MASKED=source_valid is not None, TARGET_MASKED=target_valid is not None)
    fill = Launch(table_kernel, (batch * (columns // at_a_time) * (rows // ROWS),),
                  (S, T, K, A, columns, source_rows, rows, *strides(source, 4), *strides(target, 4),
                   *strides(source_valid, 3), *strides(target_valid, 3)),
                  dict(**masked, BLOCK=ROWS, COLUMNS=at_a_time), num_warps=4)
    shape, grid = (*lead, S, T), (batch * ceil_div(S, block) * ceil_div(T, block),)
    sizes = S, T, A, max(min_triplets, 1), columns, source_rows, rows, 1 / K
    if mining:   # few rows: their columns are divided too, so that there are programs enough
        high, wide = ceil_div(S, block), ceil_div(T, block)
        chunk = ceil_div(wide, min(wide, ceil_div(WARPS, high)))
        grid = high, ceil_div(wide, chunk)
        shape, sizes = (S, grid[1]), (*sizes, chunk * block)
    use = Launch(pairs_kernel if mining else distance_kernel, grid, sizes,
                 dict(BLOCK=block, COLUMNS=at_a_time), **options)
    return shape, (batch, columns, rows), fill, use


def prepare(source, target, triplets, source_valid, target_valid, min_triplets, mining):
    """Fill the table of angles. Returns the shape of the result, the table, and the launch that uses it."""
    triplets = triplets.contiguous()
    tensors = source, target, triplets, source_valid, target_valid
    shape, table_shape, fill, use = plan(
        *[None if tensor is None else plan_key(tensor) for tensor in tensors], min_triplets, mining)
    reference.check_indices(triplets, source.shape[-2])
    if use is None:
        return shape, None, None
    table = source.new_empty(table_shape, dtype=torch.float32)
    fill(source, target, triplets if source_valid is None else source_valid,
         triplets if target_valid is None else target_valid, triplets, table)
    return shape, table, use


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """The operator behind `kernels.triplet_angle_distance`."""
    arguments = source, target, triplets, source_valid, target_valid, min_triplets
    if max(source.dim(), target.dim()) > 4:   # the kernels take one leading dimension at most
        return reference.triplet_angle_distance(*arguments)
    shape, table, use = prepare(*arguments, False)
    distance = source.new_empty(shape, dtype=torch.float32)
    if use is None:
        return distance.fill_(float("inf"))
    use(table, distance)
    return distance


def similar_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
                  capacity=None):
    """The operator behind `kernels.similar_pairs`."""
    reference.check_pairs(source, target, gamma, capacity)
    shape, table, use = prepare(source, target, triplets, source_valid, target_valid, min_triplets, True)
    if use is None or capacity == 0:
        return triplets.new_full((capacity or 0, 2), -1)
    counts = triplets.new_empty(shape)
    use(table, counts, counts, counts, 0, gamma)   # counts stand in for what is not used yet
    ends = counts.view(-1).cumsum(0)
    pairs = triplets.new_empty((ends[-1].item() if capacity is None else capacity, 2))   # item() waits
    if len(pairs):
        use(table, counts, ends, pairs, len(pairs), gamma)
    return pairs


def fake_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
               capacity=None):
    """Shape and dtype of `similar_pairs`, whose number of rows is learnt when it runs."""
    reference.check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    reference.check_pairs(source, target, gamma, capacity)
    if capacity is None:
        capacity = torch.library.get_ctx().new_dynamic_size()
    return triplets.new_empty((capacity, 2))


register("triplet_angle_distance(Tensor source, Tensor target, Tensor triplets, Tensor? source_valid=None, "
         "Tensor? target_valid=None, int min_triplets=1) -> Tensor",
         triplet_angle_distance, reference.triplet_angle_distance)
register("similar_pairs(Tensor source, Tensor target, Tensor triplets, float gamma, "
         "Tensor? source_valid=None, Tensor? target_valid=None, int min_triplets=1, SymInt? capacity=None) "
         "-> Tensor", similar_pairs, reference.similar_pairs, fake_pairs)
