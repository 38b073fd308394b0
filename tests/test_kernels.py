"""The fused operators against hand values, float64 and the published base method.

Every test with the `backend` fixture runs twice: on the PyTorch reference, and on the Triton kernels, on the
GPU if there is one and otherwise in Triton's interpreter. NumPy and autograd compute the expected values in
float64. A seeded test draws its shapes, layouts, dtypes and special values at random; its id names the seed.
"""
import numpy as np
import pytest
import torch

import kernels
from kernels import angles, common, reference

CUDA = torch.cuda.is_available()
INF = float("inf")
NAN = float("nan")
TRIPLETS = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [5, 6, 7]])
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["contiguous", "channels-last", "transposed", "swapped", "gaps", "expanded"]
ALL_LAYOUTS = LAYOUTS + ["permuted", "permuted gaps"]
# The interpreter computes with NumPy, which warns of the special values that the tests try.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    "invalid value", "divide by zero", "overflow encountered", "All-NaN slice")]


def random_maps(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_poses(*lead, keypoints=8, seed=0):
    return 128 + 60 * torch.randn(*lead, keypoints, 2, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.2


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def laid_out(tensor, layout, rng):
    """The tensor with another memory layout: dimensions permuted, with gaps, or repeated (new values)."""
    dims = tensor.dim()
    order = list(range(dims))
    if layout == "expanded":
        repeated = rng.random(dims) < 0.5
        few = tensor[tuple(slice(0, 1) if repeat else slice(None) for repeat in repeated)]
        return few.contiguous().expand(tensor.shape)
    if layout == "channels-last":
        order = [0, *range(2, dims), 1]
    elif layout == "transposed":
        order[-2:] = dims - 1, dims - 2
    elif layout == "swapped":
        order[:2] = 1, 0
    elif layout.startswith("permuted"):
        order = rng.permutation(dims).tolist()
    stored = tensor.permute(order).contiguous()
    if layout.endswith("gaps"):
        step, before, after = (rng.integers(low, 3, dims).tolist() for low in (1, 0, 0))
        room = stored.new_ones([b + n * s + a for n, s, b, a in zip(stored.shape, step, before, after)])
        if room.is_floating_point():
            room.fill_(INF)   # an operator must not read the gaps
        gaps = tuple(slice(b, b + n * s, s) for n, s, b in zip(stored.shape, step, before))
        room[gaps] = stored
        stored = room[gaps]
    return stored.permute(np.argsort(order).tolist())


def to(device, tensor):
    """The tensor on the device with the same strides: `Tensor.to` would close gaps and copy repeats."""
    if tensor is None or device == "cpu":
        return tensor
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    memory = torch.as_strided(tensor, (last + 1 if tensor.numel() else 0,), (1,)).to(device)
    return torch.as_strided(memory, tensor.shape, tensor.stride(), 0)


def float64(tensor):
    return tensor.detach().cpu().double().numpy()


# --- heatmaps: checks against float64 -----------------------------------------------------------------------

def numpy_argmax(maps):
    """Cells (x, y) and values of the first NaN of each map, or else of its first maximum, as torch.max."""
    flat = float64(maps).reshape(*maps.shape[:2], maps.shape[2] * maps.shape[3])
    index = flat.argmax(axis=2)
    y, x = np.divmod(index, maps.shape[3])
    value = np.take_along_axis(flat, index[..., None], axis=2)[..., 0]
    return np.stack((x, y), axis=2), value.astype(np.float32)


def check_argmax(backend, maps, weight=None):
    """Cells and confidences are equal to the bit, Eq. 4's mean within the rounding of its float32 terms."""
    cells, values = numpy_argmax(maps)
    w = np.ones(values.shape) if weight is None else float64(weight.float())
    terms = np.where(w == 0, 0, w * values.astype(np.float64))
    total = np.where(w.sum(axis=1) == 0, 1, w.sum(axis=1))
    mean = terms.sum(axis=1) / total
    finite = np.isfinite(mean)
    given = to(backend, maps).detach().requires_grad_()
    weight = None if weight is None else to(backend, weight).requires_grad_()   # Eq. 4 ranks: no gradient
    for result in (kernels.heatmap_argmax(given), kernels.heatmap_argmax_mean(given, weight)):
        assert not any(part.requires_grad or part.dtype != torch.float32 for part in result)
        coords, confidence, *means = (part.cpu().numpy() for part in result)
        assert np.array_equal(coords, cells)
        assert np.array_equal(confidence, values, equal_nan=True)
        number = ~np.isnan(values)
        assert np.array_equal(np.signbit(confidence[number]), np.signbit(values[number]))
        for found in means:
            assert np.array_equal(found[~finite], mean[~finite].astype(np.float32), equal_nan=True)
            assert (np.abs(found - mean) <= 1e-6 * np.abs(terms).sum(axis=1) / total)[finite].all()


def float64_soft_argmax(maps, beta):
    """Expected cells (x, y) under softmax(beta * maps); maps (B, K, H, W) float64, differentiable."""
    flat = maps.flatten(2)
    weight = (beta * (flat - flat.detach().amax(dim=2, keepdim=True))).exp()
    cell = torch.arange(flat.shape[2])
    position = torch.stack((cell % maps.shape[3], cell // maps.shape[3]), dim=1).double()
    return weight @ position / weight.sum(dim=2, keepdim=True)


def check_soft_argmax(backend, maps, beta, function=kernels.soft_argmax):
    """Coordinates are within 1e-5 cells for sides up to 64 and in proportion beyond; the gradient within what
    that error allows plus 2e-5 of its largest value (for halves: their own rounding)."""
    direction = random_maps((2, *maps.shape[:2]), seed=1).double().permute(1, 2, 0)   # not contiguous either
    exact = maps.detach().double().clone().requires_grad_()
    expected = float64_soft_argmax(exact, beta)
    gradient, = torch.autograd.grad((expected * direction).sum(), exact)
    expected = expected.detach()
    gradient = gradient.flatten(2)
    none = expected.isnan().any(dim=2)   # maps with NaN or inf, or with nothing but -inf
    cells = 1e-5 * max(1.0, max(maps.shape[2:]) / 64)
    # An error of X moves the gradient beta p_n (x_n - X) g by beta p_n g times as much.
    allowed = beta * cells * direction.abs().sum(dim=2)[..., None] \
        * torch.softmax(beta * exact.detach().flatten(2), dim=2)
    eps = torch.finfo(maps.dtype).eps if maps.element_size() == 2 else 2e-5
    allowed += eps * gradient.abs().amax(dim=2, keepdim=True) + torch.finfo(maps.dtype).tiny

    given = to(backend, maps).detach().requires_grad_()
    coords = function(given, beta)
    found, = torch.autograd.grad((coords * direction.to(coords)).sum(), given)
    assert coords.dtype == (torch.float64 if maps.dtype == torch.float64 else torch.float32)
    assert found.dtype == maps.dtype and found.shape == maps.shape
    coords = coords.detach().cpu().double()
    found = found.cpu().double().flatten(2)
    assert torch.equal(coords.isnan(), none[..., None].expand_as(coords)) and found[none].isnan().all()
    assert ((coords - expected)[~none].abs() <= cells).all()
    assert ((found - gradient).abs() <= allowed)[~none].all()


def check_rectify(backend, maps, sigma=1.3):
    """Confidence is equal to the bit. A cell lies on the maximum, or at the vertex of the parabola through it
    and its neighbours, as far as float32 can tell; the Gaussian around the cell is within 1e-6 of float64."""
    maximum, values = numpy_argmax(maps)
    exact = float64(maps)
    height, width = maps.shape[2:]
    padded = np.pad(exact, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=NAN)   # NaN: no neighbour
    b, k = np.ogrid[:maps.shape[0], :maps.shape[1]]
    x = maximum[..., 0] + 1
    y = maximum[..., 1] + 1
    top = padded[b, k, y, x]
    offset, allowed = np.zeros((2, *maximum.shape))
    for axis, (dx, dy) in enumerate(((1, 0), (0, 1))):
        before = padded[b, k, y - dy, x - dx]
        after = padded[b, k, y + dy, x + dx]
        curvature = 2 * top - before - after
        rounding = 1e-6 * (2 * np.abs(top) + np.abs(before) + np.abs(after))
        known = curvature > 0   # not at an edge, where a neighbour is missing
        offset[..., axis] = np.where(known, np.clip((after - before) / 2 / curvature, -0.5, 0.5), 0)
        allowed[..., axis] = np.where(known, np.minimum(1, rounding / curvature) + 4e-6, 0)
    around = [padded[b, k, y + dy, x + dx] for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    usual = np.isfinite(top) & ~np.isinf(around).any(axis=0)
    for subcell in (False, True):
        result = kernels.rectify(to(backend, maps).detach().requires_grad_(), sigma, subcell)
        assert not any(part.requires_grad or part.dtype != torch.float32 for part in result)
        drawn, cells, confidence = (part.cpu().numpy() for part in result)
        assert drawn.shape == maps.shape and np.array_equal(confidence, values, equal_nan=True)
        error = np.abs(cells - maximum - subcell * offset)
        last_bit = 1e-7 * maximum   # of the coordinate in float32
        assert (error <= subcell * (allowed + last_bit))[usual].all()
        if not subcell:
            assert np.array_equal(cells, maximum)
        dx = np.arange(width) - cells[..., 0, None, None].astype(np.float64)
        dy = np.arange(height)[:, None] - cells[..., 1, None, None].astype(np.float64)
        farther = np.maximum(np.abs(dx), np.abs(dy)) - 3 * sigma   # cut at 3 sigma and a thousandth
        gaussian = np.where(farther > 1e-3, 0, np.exp(-(dx ** 2 + dy ** 2) / (2 * sigma ** 2)))
        close = (np.abs(drawn - gaussian) <= 1e-6) | (np.abs(farther - 1e-3) < 1e-4)
        assert close[np.isfinite(cells).all(axis=2)].all()


# --- heatmaps: all operators -------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 71, 66), (3, 5, 3, 4), (2, 0, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_dtype_and_layout(backend, shape):
    """Each pair of a shape, a dtype and a layout comes up. `test_random_heatmaps` draws all three freely."""
    rng = np.random.default_rng(sum(shape))
    weight = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5))
    for n, layout in enumerate(LAYOUTS, SHAPES.index(shape)):
        maps = laid_out(random_maps(shape).to(FLOATS[n % len(FLOATS)]), layout, rng)
        check_argmax(backend, maps, laid_out(weight, layout, rng))
        check_soft_argmax(backend, maps, 20.0)
        check_rectify(backend, maps)


def test_large_maps_are_shared_among_programs(backend):
    """Ties and NaN lie on either side of a share's border; one share holds nothing but -inf. The maps are
    transposed: `test_random_heatmaps` has large ones of other layouts."""
    rng = np.random.default_rng(0)
    maps = random_maps((4, 1, 195, 257), seed=1)   # three shares, of 20,480 cells at most
    flat = maps.view(4, -1)
    flat[1, 15000] = flat[1, 45000] = 9.0
    flat[2, 5] = INF
    flat[2, 45001] = NAN
    flat[2, 25000] = NAN
    flat[3] = -INF
    check_argmax(backend, laid_out(maps, "transposed", rng))
    weight = torch.tensor([[0.2, 3.0, 1.0], [0.0, 2.0, 0.1]])
    check_argmax(backend, laid_out(random_maps((2, 3, 128, 257)), "transposed", rng), weight)
    maps = random_maps((1, 2, 195, 257)) * 0.1
    maps[0, 0, :80] = -INF
    maps[0, 1, 170, 3] = 0.9
    maps[0, 1, 10, 200] = 0.88
    check_soft_argmax(backend, laid_out(maps, "transposed", rng), 20.0)
    check_rectify(backend, laid_out(maps, "transposed", rng), sigma=20.0)


def random_shape(rng, kind):
    """(B, K, H, W): tiny maps that share a program, usual ones, single rows and columns, a few large ones."""
    if kind == "tiny":
        return tuple(rng.integers([0, 0, 1, 1], [6, 25, 5, 5]).tolist())
    if kind == "line":
        shape = [*rng.integers(1, [3, 5]).tolist(), 1, int(rng.integers(1, 5000))]
        return tuple(shape) if rng.random() < 0.5 else (*shape[:2], shape[3], shape[2])
    if kind == "large":
        return pick(rng, [(1, 1, 300, 257), (1, 3, 200, 190), (2, 1, 129, 256), (1, 2, 33000, 1),
                          (3, 1, 1, 40001)])
    return tuple(rng.integers(1, [4, 9, 71, 71]).tolist())


def drawn_maps(rng, seed):
    """Heatmaps of numbers, or of a few levels with many ties; some hold NaN, infinities or -0.0."""
    shape = random_shape(rng, ["tiny", "usual", "usual", "line", "tiny", "usual", "tiny", "large"][seed % 8])
    values = rng.standard_normal(shape)
    if rng.random() < 0.5:
        values = rng.integers(-2, rng.integers(-1, 4), shape) / 2.0
    flat = values.reshape(*shape[:2], shape[2] * shape[3])
    if rng.random() < 0.5:
        n = np.arange(flat.shape[2])
        count = flat.shape[2]
        for special in rng.permutation([NAN, INF, -INF, -INF, -0.0]):
            chosen = rng.random(shape[:2]) < pick(rng, [0.1, 0.5])
            cells = pick(rng, [n == 0, n == count - 1, n >= 0, n < 0.9 * count, rng.random(count) < 0.3])
            flat[chosen[..., None] & cells] = special
    return laid_out(torch.from_numpy(values).to(pick(rng, FLOATS)), pick(rng, ALL_LAYOUTS), rng)


@pytest.mark.parametrize("seed", range(24))
def test_random_heatmaps(backend, seed):
    rng = np.random.default_rng([0, seed])
    maps = drawn_maps(rng, seed)
    weight = None
    if rng.random() < 0.8:
        weight = torch.from_numpy(rng.random(maps.shape[:2]) * (rng.random(maps.shape[:2]) < 0.6))
        weight = laid_out(weight.to(pick(rng, FLOATS)), pick(rng, ALL_LAYOUTS), rng)
    check_argmax(backend, maps, weight)
    check_soft_argmax(backend, maps, float(np.exp(rng.uniform(np.log(0.1), np.log(300)))))
    check_rectify(backend, maps, float(rng.uniform(0.3, 4)))


def test_rectify_by_hand(backend):
    """The first of three equal maxima has 0 on one side: its vertex is half a cell towards the other. There
    is none at an edge, or where all is equal."""
    maps = torch.zeros(1, 3, 4, 5)
    maps[0, 0, 1:4, 2] = torch.tensor([0.2, 1.0, 0.6])
    maps[0, 0, 2, 1:4] = torch.tensor([1.0, 1.0, 1.0])
    maps[0, 1, 0, 4] = 2.0
    drawn, cells, confidence = (part.cpu() for part in kernels.rectify(maps.to(backend), 0.5, True))
    assert confidence.tolist() == [[1.0, 2.0, 0.0]]
    # The first of the equal maxima, at x = 1, has 0 before it and 1 after it: (1 - 0) / 2 / (2 - 0 - 1).
    torch.testing.assert_close(cells[0], torch.tensor([[1.5, 2.0], [4.0, 0.0], [0.0, 0.0]]))
    assert drawn[0, 1, 0, 4] == 1 and drawn[0, 1, 0, 3].item() == pytest.approx(np.exp(-2), abs=1e-6)
    assert drawn[0, 1, 0, 2] == 0   # beyond 3 sigma


# --- heatmap_argmax -----------------------------------------------------------------------------------------

def test_argmax_special_values(backend):
    """Ties go to the first cell, NaN wins as in torch.max, maps without a finite value decode."""
    maps = torch.full((1, 10, 2, 3), -1.0)
    maps[0, 0] = 0.0                                              # all equal: the first cell
    maps[0, 1] = -INF                                             # all -inf: the first cell
    maps[0, 2, 0, 2] = maps[0, 2, 1, 0] = 4.0                     # a tie, broken in row-major order
    maps[0, 3, 1, 2] = INF
    maps[0, 4, 0, 1] = INF
    maps[0, 4, 1, 0] = NAN
    maps[0, 4, 1, 2] = NAN                                      # the first NaN, whatever else there is
    maps[0, 5] = NAN
    maps[0, 6] = -INF
    maps[0, 6, 1, 1] = -1e30                                      # the one number among -inf
    maps[0, 7, 0, 1] = -0.0
    maps[0, 7, 1, 1] = 0.0                                      # -0.0 equals 0.0 and comes first
    maps[0, 8] = INF
    maps[0, 9, 1, 1] = -0.25                                      # a maximum below zero
    cells, values = numpy_argmax(maps)
    assert [*map(tuple, cells[0])] == [(0, 0), (0, 0), (2, 0), (2, 1), (0, 1), (0, 0), (1, 1), (1, 0), (0, 0),
                                       (1, 1)]
    expected = np.float32([0, -INF, 4, INF, NAN, NAN, -1e30, -0.0, INF, -0.25])
    assert np.array_equal(values[0], expected, equal_nan=True)
    assert np.array_equal(maps.flatten(2).max(dim=2).indices[0], cells[0] @ [1, 3])   # as torch.max
    for layout in LAYOUTS:
        check_argmax(backend, laid_out(maps, layout, np.random.default_rng(0)))


def test_argmax_agrees_with_the_published_base_method(backend, golden):
    """Published decoding moves maps whose maximum is not positive to (0, 0); ours decodes them too."""
    maps, coords, top = (golden[f"argmax_{name}"] for name in ("heatmaps", "coords", "max"))
    found, confidence = (result.cpu() for result in kernels.heatmap_argmax(maps.to(backend)))
    positive = top > 0
    assert torch.equal(confidence, top) and torch.equal(found[positive], coords[positive])
    assert not coords[~positive].any() and (~positive).sum() == 1
    check_argmax(backend, maps)


# --- soft_argmax --------------------------------------------------------------------------------------------

def test_soft_argmax_hand_values(backend):
    maps = torch.full((1, 6, 2, 3), -INF)
    # Weights 1 and 3 at x = 0 and x = 2 of row 1; equal cells; no value for -inf alone, with NaN or with inf.
    maps[0, 0, 1, 0] = 0.0
    maps[0, 0, 1, 2] = float(np.log(3.0)) / 2
    maps[0, 1] = -4.0
    maps[0, 3:] = 0.0
    maps[0, 3, 1, 1] = NAN
    maps[0, 4, 1, 2] = INF
    coords = kernels.soft_argmax(maps.to(backend), 2).cpu()
    expected = torch.tensor([[[1.5, 1.0], [1.0, 0.5], [NAN, NAN], [NAN, NAN], [NAN, NAN], [1.0, 0.5]]])
    torch.testing.assert_close(coords, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_soft_argmax_of_hard_maps(backend):
    """The running maximum grows from tile to tile, from -inf first, and earlier sums are scaled down. A peak
    in the corner is far from the centre, where sums are taken from: float32 sums would be off by 4e-5."""
    maps = torch.linspace(-3, 3, 100 * 90).view(1, 1, 100, 90).repeat(1, 2, 1, 1)
    maps[0, 0, :60] = -INF
    check_soft_argmax(backend, maps, 5.0)
    maps = torch.linspace(-18, -2, 60).view(1, -1, 1, 1).repeat(1, 1, 64, 64)
    maps[..., 0, 0] = 0
    check_soft_argmax(backend, maps, 1.0)


@pytest.mark.parametrize("module", [kernels, torch.ops.actupose], ids=lambda m: m.__name__)
def test_soft_argmax_gradient_by_differences(backend, module):
    """On the CPU `kernels` is the reference: torch.ops alone reaches the operator's own backward pass."""
    function = module.soft_argmax
    maps = random_maps((2, 2, 3, 4)).double().requires_grad_()
    for layout in (maps, maps.permute(0, 1, 3, 2)):
        assert torch.autograd.gradcheck(lambda given: function(given, 1.5), (layout,))
    for dtype in FLOATS:
        check_soft_argmax(backend, random_maps((2, 2, 9, 4)).to(dtype), 1.5, function)


# --- triplet_angle_distance ---------------------------------------------------------------------------------

def numpy_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Eq. 7 in float64, each angle that of a complex product."""
    def angles(poses, valid):
        points = float64(poses) @ np.array([1, 1j])
        first, middle, last = np.moveaxis(points[..., triplets.numpy()], -1, 0)
        usable = (first != middle) & (last != middle)
        if valid is not None:
            usable = usable & valid.numpy()[..., triplets.numpy()].all(axis=-1)
        return np.abs(np.angle((first - middle) * np.conj(last - middle))), usable

    ours, ours_usable = angles(source, source_valid)
    theirs, theirs_usable = angles(target, target_valid)
    both = ours_usable[..., :, None, :] & theirs_usable[..., None, :, :]
    squares = np.where(both, (ours[..., :, None, :] - theirs[..., None, :, :]) ** 2, 0).sum(axis=-1)
    count = both.sum(axis=-1)
    distance = np.sqrt(squares * len(triplets) / np.maximum(count, 1)) / source.shape[-2]
    return np.where(count >= max(min_triplets, 1), distance, INF)


def check_distance(backend, *banks):
    """Eq. 7 holds within 1e-5 rad, with inf and NaN exactly where they belong. banks: as for the operator."""
    expected = numpy_distance(*banks)
    found = kernels.triplet_angle_distance(*(to(backend, tensor) for tensor in banks[:5]), *banks[5:])
    assert found.dtype == torch.float32 and found.shape == expected.shape
    found = float64(found)
    number = np.isfinite(expected)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(found == INF, expected == INF)
    assert (np.abs(found[number] - expected[number]) < 1e-5).all()


def use_tile(monkeypatch, tile):
    """Set the tile of the distance kernel, which otherwise follows from the size."""
    monkeypatch.setattr(angles, "TILES", (tile,))
    angles.plan.cache_clear()


@pytest.fixture(params=angles.TILES, ids=lambda tile: f"tile {tile[0]}")
def tiles(request, monkeypatch):
    use_tile(monkeypatch, request.param)


def hand_poses(backend):
    """A right, a straight and a folded angle, and their triplet: right is (pi - pi/2) / 3 from the others."""
    poses = [[[0.0, 1], [0, 0], [1, 0]], [[-1, 0], [0, 0], [2, 0]], [[3, 0], [0, 0], [1, 0]]]
    return torch.tensor(poses, device=backend), torch.tensor([[0, 1, 2]], device=backend)


def test_distance_hand_values(backend, tiles):
    """Eq. 7 of one triplet of three keypoints: the difference of two angles, over K = 3."""
    poses, triplet = hand_poses(backend)
    expected = torch.tensor([[0.0, 1, 1], [1, 0, 2], [1, 2, 0]]) * np.pi / 6
    found = kernels.triplet_angle_distance(poses, poses, triplet).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source, target", [(1, 33), (17, 130), (0, 5)])
def test_distance_of_every_size(backend, tiles, source, target):
    """One or many tiles, no poses; without masks and with; more triplets than a tile takes at a time.
    Layouts, dtypes and leading dimensions: `test_random_distances`."""
    ours = random_poses(source)
    theirs = random_poses(target, seed=1)
    check_distance(backend, ours, theirs, TRIPLETS)
    check_distance(backend, ours.double(), theirs, TRIPLETS)   # left to the reference
    check_distance(backend, ours, theirs, TRIPLETS.repeat(4, 1), random_mask(source, 8, seed=2),
                   random_mask(target, 8, seed=3), 3)


def test_angles_are_accurate_from_zero_to_pi(backend):
    """Against a folded pose of angle 0, K times the distance is the angle, also at 0 and pi, where arccos is
    off by 3e-4: within 1.5e-6 of float64."""
    folded = hand_poses(backend)[0][2:]
    triplet = hand_poses(backend)[1]
    theta = torch.linspace(0, float(np.pi), 201, dtype=torch.float64)
    ends = (3 * torch.stack((theta.cos(), theta.sin()), dim=1)).float()
    limbs = random_poses(20, keypoints=1)[:, 0] - 128
    middle = torch.zeros(241, 2)
    first = torch.cat((ends, limbs, limbs))
    last = torch.cat((torch.tensor([[0.5, 0.0]]).expand(201, 2), 0.7 * limbs, -0.3 * limbs))
    angles = torch.atan2(ends[:, 1].double().abs(), ends[:, 0].double())   # of coordinates rounded to float32
    expected = torch.cat((angles, torch.zeros(20), torch.full((20,), np.pi)))
    poses = torch.stack((first, middle, last), dim=1).to(backend)
    found = 3 * kernels.triplet_angle_distance(poses, folded, triplet)[:, 0].cpu().double()
    assert (found - expected).abs().max() < 1.5e-6


def test_coincident_keypoints_and_pruning(backend, tiles):
    """A limb without length or a pruned keypoint takes its triplets out; the norm is rescaled."""
    pose, other, triplets = (t.to(backend) for t in (random_poses(1), random_poses(1, seed=1), TRIPLETS))
    coincident = other.clone()
    coincident[0, 7] = coincident[0, 6]                     # the limb 6-7 has no length: 5-6-7 drops out,
    valid = torch.ones(1, 8, dtype=torch.bool, device=backend)
    valid[0, 7] = False                                     # as it does without keypoint 7
    without_7 = other.clone()
    without_7[0, 7] = NAN                                   # what lies at a pruned keypoint does not matter
    # The norm over the four other triplets, of five: rescaled by sqrt(5 / 4).
    expected = kernels.triplet_angle_distance(pose, other, triplets[:4]) * (5 / 4) ** 0.5
    for target, *rest in ((coincident,), (other, None, valid), (other, valid, None), (other, valid, valid, 4),
                          (without_7, None, valid)):
        found = kernels.triplet_angle_distance(pose, target, triplets, *rest)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for used, *rest in ((triplets, valid, valid, 5), (triplets, ~valid, valid, 0), (triplets[:0],)):
        assert kernels.triplet_angle_distance(pose, other, used, *rest).item() == INF
    assert kernels.triplet_angle_distance(pose, without_7, triplets).isnan().all()
    # A triplet drops out of the first few that a tile takes, and none of the later ones.
    check_distance(backend, random_poses(1), coincident.cpu(), TRIPLETS[[4] + [0] * 31])


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 3e17])
def test_limbs_may_have_any_length_whose_products_are_numbers(backend, scale):
    """Limbs from 1e-18, below which their product underflows, to coordinates of 1e18, where it overflows."""
    poses, triplet = hand_poses(backend)
    expected = kernels.triplet_angle_distance(poses, poses, triplet)
    found = kernels.triplet_angle_distance(scale * poses, poses * scale, triplet)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_index_that_names_no_keypoint_is_not_usable(monkeypatch):
    """Nobody checks triplets on a GPU before the launch: one out of range must not read beyond the poses."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(common, "INTERPRET", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(reference, "check_indices", lambda triplets, keypoints: None)
    wrong = torch.cat((TRIPLETS, torch.tensor([[0, 8, 1], [-1, 2, 3], [2 ** 40, 1, 2]])))
    source, target, right, wrong = (tensor.to("cuda" if CUDA else "cpu") for tensor in
                                    (random_poses(3), random_poses(4, seed=1), TRIPLETS, wrong))
    distance = kernels.triplet_angle_distance
    expected = distance(source, target, right) * (8 / 5) ** 0.5   # five of the eight are left
    torch.testing.assert_close(distance(source, target, wrong), expected, rtol=0, atol=1e-6)


def random_bank(rng, shape, dtype):
    """Poses (..., N, K, 2), a mask (..., N, K) or None; coincident and collinear keypoints, NaN in some."""
    poses = 128 + 60 * rng.standard_normal((*shape, 2))
    if rng.random() < 0.4:
        poses = rng.integers(0, 3, poses.shape).astype(float)   # many coincide or lie on one line
    mask = rng.random(shape) > rng.choice([0.05, 0.5]) if rng.random() < 0.6 else None
    if mask is not None:
        poses[~mask & (rng.random(shape) < 0.5)] = NAN   # does not matter
    if rng.random() < 0.3:
        poses[(rng.random(shape) < 0.1 / shape[-1]), 1] = NAN
    poses = laid_out(torch.from_numpy(poses).to(dtype), pick(rng, ALL_LAYOUTS), rng)
    return poses, mask if mask is None else laid_out(torch.from_numpy(mask), pick(rng, ALL_LAYOUTS), rng)


def random_banks(rng, lead=(), target_lead=()):
    """Arguments of the distance: source, target, triplets, source_valid, target_valid, min_triplets."""
    dtypes = pick(rng, FLOATS[:3]), pick(rng, FLOATS if rng.random() < 0.3 else FLOATS[:3])
    keypoints = int(rng.integers(3, 23))
    (source, source_valid), (target, target_valid) = (
        random_bank(rng, (*dims, int(rng.integers(0, 20 if lead else 71)), keypoints), dtype)
        for dims, dtype in zip((lead, target_lead), dtypes))
    triplets = rng.random((int(rng.choice([0, 1, 2, 5, 16, 32, 33, 70])), keypoints)).argsort(axis=1)[:, :3]
    if rng.random() < 0.1:
        triplets = rng.integers(0, keypoints, triplets.shape)   # a keypoint may come twice in a triplet
    triplets = laid_out(torch.from_numpy(triplets.astype(np.int64)), pick(rng, ALL_LAYOUTS), rng)
    least = int(rng.integers(0, len(triplets) + 2)) if rng.random() < 0.5 else int(rng.integers(0, 3))
    return source, target, triplets, source_valid, target_valid, least


@pytest.mark.parametrize("seed", range(24))
def test_random_distances(backend, seed, monkeypatch):
    """Every fourth seed has leading dimensions, which are the reference's."""
    leads = [((2,), (2,)), ((1,), (3,)), ((2, 1), (1, 3)), ((), (2,)), ((0,), (1,)), ((3, 1), (2,))]
    use_tile(monkeypatch, angles.TILES[seed % 3])
    lead = leads[seed // 4] if seed % 4 == 3 else ((), ())
    check_distance(backend, *random_banks(np.random.default_rng([1, seed]), *lead))


# --- errors -------------------------------------------------------------------------------------------------

def test_errors_name_the_argument(backend):
    maps = torch.zeros(1, 2, 3, 4, device=backend)
    poses = torch.zeros(2, 8, 2, device=backend)
    triplets = TRIPLETS.to(backend)
    valid = torch.ones(2, 8, dtype=torch.bool, device=backend)
    weight = torch.ones(1, 2, device=backend)
    argmax = kernels.heatmap_argmax
    mean = kernels.heatmap_argmax_mean
    soft = kernels.soft_argmax
    distance = kernels.triplet_angle_distance
    float8 = torch.float8_e4m3fn
    cases = [
        (ValueError, "heatmaps", argmax, maps[0]),
        (TypeError, "heatmaps", argmax, maps.long()),
        (TypeError, "heatmaps", argmax, np.zeros((1, 2, 3, 4))),
        (ValueError, "heatmaps", argmax, maps[:, :, :0]),
        (ValueError, "2\\^20 cells", argmax, maps[:, :, :1, :1].expand(1, 2, 1025, 1024)),
        (ValueError, "heatmaps", kernels.rectify, maps[0], 1.0),
        (ValueError, "sigma", kernels.rectify, maps, 0.0),
        (ValueError, "weight", mean, maps, torch.ones(1, 3, device=backend)),
        (TypeError, "weight", mean, maps, weight.bool()),
        (TypeError, "weight", mean, maps, [1.0, 1.0]),
        (ValueError, "weight", mean, maps, weight.to("meta")),
        (ValueError, "heatmaps", soft, maps[0], 1.0),
        (TypeError, "heatmaps", soft, maps.int(), 1.0),
        *((ValueError, "beta", soft, maps, beta) for beta in (0.0, -1, NAN)),
        (TypeError, "beta", soft, maps, torch.tensor(2.0, requires_grad=True)),   # its gradient would be lost
        *((TypeError, "heatmaps.*float8", function, maps.to(float8), *rest) for function, *rest in
          ((argmax,), (mean,), (kernels.rectify, 1.0), (soft, 1.0))),
        (TypeError, "weight.*float8", mean, maps, weight.to(float8)),
        (TypeError, "target.*float8", distance, poses, poses.to(float8), triplets),
        (ValueError, "source", distance, poses[0], poses, triplets),
        (TypeError, "target", distance, poses, poses.long(), triplets),
        (ValueError, "source and target", distance, poses, poses[:, :7], triplets),
        (ValueError, "leading dimensions of source and target", distance, poses.expand(2, 1, 2, 8, 2),
         poses.expand(3, 1, 2, 8, 2), triplets),
        (ValueError, "target", distance, poses, poses.to("meta"), triplets),
        (ValueError, "triplets", distance, poses, poses, triplets.to("meta")),
        (ValueError, "triplets", distance, poses, poses, triplets[:, :2]),
        (TypeError, "triplets", distance, poses, poses, triplets.float()),
        (TypeError, "triplets", distance, poses, poses, triplets.tolist()),
        (TypeError, "source_valid", distance, poses, poses, triplets, poses[..., 0]),
        (ValueError, "target_valid", distance, poses, poses, triplets, None, valid[:1]),
        (ValueError, "source_valid", distance, poses, poses, triplets, valid.to("meta")),
        (ValueError, "min_triplets", distance, poses, poses, triplets, None, None, -1)]
    if backend == "cpu":   # nobody reads the values of a tensor on a GPU
        cases += [(ValueError, "triplets", distance, poses, poses, triplets + step) for step in (1, -1)]
    for error, name, function, *arguments in cases:
        with pytest.raises(error, match=name):
            function(*arguments)
