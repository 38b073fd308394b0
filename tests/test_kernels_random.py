"""Random differential tests of the fused operators: many shapes, layouts, dtypes and special values at once.

The operators run as Triton kernels, on the GPU if there is one and else in Triton's interpreter, and the
PyTorch reference runs on the same inputs. Both are compared with expectations worked out here in float64. The
cases come from seeds; a failure names the seed and what was drawn.
"""
import sys

import numpy as np
import pytest
import torch

import kernels
from kernels import common, reference

CUDA = torch.cuda.is_available()
INF, NAN = float("inf"), float("nan")
TRIPLET_ANGLE = sys.modules["kernels.triplet_angle"]   # as an attribute of the package it is the operator
# The interpreter computes with NumPy, which warns of what special values are there to try.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    "invalid value", "divide by zero", "overflow encountered", "All-NaN slice")]
CHUNK = 20   # seeds of a test
CASES = {"argmax": 240, "soft_argmax": 160, "distance": 160, "pairs": 60}
FLOATS = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def device(monkeypatch):
    """Device on which the operators run their Triton kernels."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    if CUDA:
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(common, "INTERPRET", True)
    return "cpu"


def seeds(operator):
    """Parametrises a test with the first seed of each chunk of an operator's cases."""
    return pytest.mark.parametrize("first", range(0, CASES[operator], CHUNK))


def generator(operator, seed):
    return np.random.default_rng([list(CASES).index(operator), seed])


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def laid_out(rng, tensor):
    """The tensor with its memory laid out at random: permuted, with gaps, or repeated (its values change)."""
    layout = pick(rng, ["contiguous", "permuted", "channels-last", "gaps", "permuted gaps", "expanded"])
    dims = tensor.dim()
    order = list(range(dims))
    if layout == "channels-last":
        order = [0, *range(2, dims), 1] if dims > 2 else order[::-1]
    elif layout.startswith("permuted"):
        order = rng.permutation(dims).tolist()
    if layout == "expanded":
        repeated = rng.random(dims) < 0.5
        few = tensor[tuple(slice(0, 1) if repeat else slice(None) for repeat in repeated)]
        return few.contiguous().expand(tensor.shape)
    stored = tensor.permute(order).contiguous()
    if layout.endswith("gaps"):
        step, before, after = (rng.integers(low, 3, dims).tolist() for low in (1, 0, 0))
        room = stored.new_ones([b + n * s + a for n, s, b, a in zip(stored.shape, step, before, after)])
        if room.is_floating_point():
            room.fill_(INF)   # must not be read
        gaps = tuple(slice(b, b + n * s, s) for n, s, b in zip(stored.shape, step, before))
        room[gaps] = stored
        stored = room[gaps]
    return stored.permute(np.argsort(order).tolist())


def described(seed, *tensors, **numbers):
    """What a failure shows of a case."""
    shown = [f"{tuple(t.shape)} strides {t.stride()} {t.dtype}" for t in tensors if t is not None]
    return f"seed {seed}: {'; '.join(shown)}; {numbers}"


def float64(tensor):
    return tensor.detach().cpu().double().numpy()


def to(device, tensor):
    """The same strides on the device: `Tensor.to` would make expanded and spaced tensors dense."""
    if tensor is None or device == "cpu":
        return tensor
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    size = last + 1 if tensor.numel() else 0
    memory = torch.as_strided(tensor, (size,), (1,)).to(device)
    return torch.as_strided(memory, tensor.shape, tensor.stride(), 0)


# --- heatmaps -----------------------------------------------------------------------------------------------

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


def random_maps(rng, seed):
    """Heatmaps of one of the dtypes: numbers, or a few levels with many ties, and special values in some."""
    shape = random_shape(rng, ["tiny", "usual", "usual", "line", "tiny", "usual", "tiny", "large"][seed % 8])
    values = rng.standard_normal(shape)
    if rng.random() < 0.5:
        values = rng.integers(-2, rng.integers(-1, 4), shape) / 2.0
    flat = values.reshape(*shape[:2], shape[2] * shape[3])
    if rng.random() < 0.5:
        for special in rng.permutation([NAN, INF, -INF, -INF, -0.0]):
            chosen = rng.random(shape[:2]) < pick(rng, [0.1, 0.5])
            where = pick(rng, ["first", "last", "all", "some", "start"])
            n, count = np.arange(flat.shape[2]), flat.shape[2]
            cells = {"first": n == 0, "last": n == count - 1, "all": n >= 0, "start": n < 0.9 * count,
                     "some": rng.random(count) < 0.3}[where]
            flat[chosen[..., None] & cells] = special
    return laid_out(rng, torch.from_numpy(flat.reshape(shape)).to(pick(rng, FLOATS)))


def numpy_argmax(maps):
    """As torch.max over the flattened map: the first NaN, or else the first maximum. Cells (x, y), values."""
    flat = float64(maps).reshape(*maps.shape[:2], maps.shape[2] * maps.shape[3])
    index = flat.argmax(axis=2)
    y, x = np.divmod(index, maps.shape[3])
    value = np.take_along_axis(flat, index[..., None], axis=2)[..., 0]
    return np.stack((x, y), axis=2), value.astype(np.float32)


@seeds("argmax")
def test_argmax(device, first):
    """Cell and confidence to the bit; the mean confidence of Eq. 4 within float32's rounding of its terms."""
    for seed in range(first, first + CHUNK):
        rng = generator("argmax", seed)
        maps = random_maps(rng, seed)
        weight = None
        if rng.random() < 0.8:
            weight = torch.from_numpy(rng.random(maps.shape[:2]) * (rng.random(maps.shape[:2]) < 0.6))
            weight = laid_out(rng, weight.to(pick(rng, FLOATS)))
        case = described(seed, maps, weight)
        cells, values = numpy_argmax(maps)
        w = np.ones(values.shape) if weight is None else float64(weight.float())
        with np.errstate(invalid="ignore"):
            terms = np.where(w == 0, 0, w * values.astype(np.float64))
            total = np.where(w.sum(axis=1) == 0, 1, w.sum(axis=1))
            mean = terms.sum(axis=1) / total
        finite = np.isfinite(mean)
        allowed = 1e-6 * (np.abs(terms).sum(axis=1) / total)[finite]

        given = to(device, maps), to(device, weight)
        for result in (kernels.heatmap_argmax(given[0]), kernels.heatmap_argmax_mean(*given),
                       reference.heatmap_argmax(maps), reference.heatmap_argmax_mean(maps, weight)):
            coords, confidence = (part.cpu().numpy() for part in result[:2])
            assert coords.dtype == confidence.dtype == np.float32, case
            assert np.array_equal(coords, cells), case
            assert np.array_equal(confidence, values, equal_nan=True), case
            number = ~np.isnan(values)
            assert np.array_equal(np.signbit(confidence[number]), np.signbit(values[number])), case
            if len(result) == 3:
                found = result[2].cpu().numpy()
                assert np.array_equal(found[~finite], mean[~finite].astype(np.float32), equal_nan=True), case
                assert (np.abs(found[finite] - mean[finite]) <= allowed).all(), case


def float64_soft_argmax(maps, beta):
    """Expected cells (x, y) under softmax(beta * maps); maps (B, K, H, W) float64, differentiable."""
    flat = maps.flatten(2)
    weight = (beta * (flat - flat.detach().amax(dim=2, keepdim=True))).exp()
    cell = torch.arange(flat.shape[2])
    width = maps.shape[3]
    position = torch.stack((cell % width, cell // width), dim=1).double()
    return weight @ position / weight.sum(dim=2, keepdim=True)


@seeds("soft_argmax")
def test_soft_argmax_and_gradient(device, first):
    """Within 1e-5 cells up to 64 a side; the gradient as that allows, and 2e-5 of its largest value."""
    for seed in range(first, first + CHUNK):
        rng = generator("soft_argmax", seed)
        maps = random_maps(rng, seed)
        beta = float(np.exp(rng.uniform(np.log(0.1), np.log(300))))
        direction = torch.from_numpy(rng.standard_normal((*maps.shape[:2], 2)))
        case = described(seed, maps, beta=beta)
        exact = maps.double().clone().requires_grad_()
        expected = float64_soft_argmax(exact, beta)
        gradient, = torch.autograd.grad((expected * direction).sum(), exact)
        expected, gradient = expected.detach(), gradient.flatten(2)
        none = expected.isnan().any(dim=2)
        cells = 1e-5 * max(1.0, max(maps.shape[2:]) / 64)
        # The gradient beta p_n (x_n - X) g is as exact as X, where p_n is not small.
        rounding = beta * (cells * direction.abs().sum(dim=2))[~none][:, None] \
            * torch.softmax(beta * exact.detach().flatten(2), dim=2)[~none]
        largest = gradient[~none].abs().amax(dim=1, keepdim=True) if maps.numel() else gradient[~none]
        eps = torch.finfo(maps.dtype).eps if maps.element_size() == 2 else 2e-5
        tiny = torch.finfo(maps.dtype).tiny
        for function, where in ((kernels.soft_argmax, device), (reference.soft_argmax, "cpu")):
            given = to(where, maps).detach().requires_grad_()
            coords = function(given, beta)
            found, = torch.autograd.grad((coords * direction.to(coords)).sum(), given)
            assert coords.dtype == (torch.float64 if maps.dtype == torch.float64 else torch.float32), case
            assert found.dtype == maps.dtype and found.shape == maps.shape, case
            coords, found = coords.detach().cpu().double(), found.cpu().double().flatten(2)
            assert torch.equal(coords.isnan(), none[..., None].expand_as(coords)), case
            assert ((coords - expected)[~none].abs() <= cells).all(), case
            assert found[none].isnan().all(), case
            assert ((found - gradient)[~none].abs() <= rounding + eps * largest + tiny).all(), case


def test_soft_argmax_of_a_peak_in_the_corner(device):
    """The hardest map: in float32 the peak's coordinate, half a side from the centre where sums are taken
    from, would be rounded with each sum that the level cells around it enter, and be off by 4e-5."""
    levels = torch.linspace(-18, -2, 60).view(1, -1, 1, 1)
    maps = levels.repeat(1, 1, 64, 64)
    maps[..., 0, 0] = 0
    expected = float64_soft_argmax(maps.double(), 1.0)
    for coords in (kernels.soft_argmax(maps.to(device), 1.0), reference.soft_argmax(maps, 1.0)):
        assert (coords.cpu() - expected).abs().max() < 1e-5


# --- poses --------------------------------------------------------------------------------------------------

def random_bank(rng, shape, dtype):
    """Poses (..., N, K, 2), a mask (..., N, K) or None; coincident and collinear keypoints, NaN in some."""
    poses = 128 + 60 * rng.standard_normal((*shape, 2))
    if rng.random() < 0.4:
        poses = rng.integers(0, 3, poses.shape).astype(float)   # many coincide, and lie on lines
    mask = rng.random(shape) > rng.choice([0.05, 0.5]) if rng.random() < 0.6 else None
    if mask is not None:
        poses[~mask & (rng.random(shape) < 0.5)] = NAN   # does not matter
    if rng.random() < 0.3:
        poses[(rng.random(shape) < 0.1 / shape[-1]), 1] = NAN
    poses = laid_out(rng, torch.from_numpy(poses).to(dtype))
    return poses, mask if mask is None else laid_out(rng, torch.from_numpy(mask))


def random_triplets(rng, keypoints):
    """(A, 3): distinct keypoints, with repeated ones in some."""
    triplets = rng.random((int(rng.choice([0, 1, 2, 5, 16, 32, 33, 40])), keypoints)).argsort(axis=1)[:, :3]
    if rng.random() < 0.1:
        triplets = rng.integers(0, keypoints, triplets.shape)
    return laid_out(rng, torch.from_numpy(triplets.astype(np.int64)))


def numpy_distance(source, target, triplets, source_valid, target_valid, min_triplets):
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


def random_banks(rng, lead, target_lead):
    """Arguments of the distance: source, target, triplets, source_valid, target_valid, min_triplets."""
    dtypes = pick(rng, FLOATS[:4]), pick(rng, FLOATS if rng.random() < 0.3 else FLOATS[:4])
    keypoints = int(rng.integers(3, 23))
    most = 20 if lead else 71
    banks = [random_bank(rng, (*dims, int(rng.integers(0, most)), keypoints), dtype)
             for dims, dtype in zip((lead, target_lead), dtypes)]
    triplets = random_triplets(rng, keypoints)
    least = int(rng.integers(0, len(triplets) + 2)) if rng.random() < 0.5 else int(rng.integers(0, 3))
    return banks[0][0], banks[1][0], triplets, banks[0][1], banks[1][1], least


def given_to(device, banks):
    return *(to(device, tensor) for tensor in banks[:5]), banks[5]


@seeds("distance")
def test_distance(device, first, monkeypatch):
    """Eq. 7 within 1e-5 rad; inf and NaN exactly where they belong; in small tiles and in large ones."""
    leads = [((), ()), ((), ()), ((), ()), ((2,), (2,)), ((1,), (3,)), ((2, 1), (1, 3)), ((), (2,)),
             ((0,), (1,))]
    for seed in range(first, first + CHUNK):
        rng = generator("distance", seed)
        banks = random_banks(rng, *leads[seed % 8])
        monkeypatch.setattr(TRIPLET_ANGLE, "FEW_TILES", 0 if seed % 3 == 0 else 128)   # large tiles or not
        case = described(seed, *banks[:5], min_triplets=banks[5])
        expected = numpy_distance(*banks)
        number = np.isfinite(expected)
        for found in (kernels.triplet_angle_distance(*given_to(device, banks)),
                      reference.triplet_angle_distance(*banks)):
            assert found.dtype == torch.float32 and found.shape == expected.shape, case
            found = float64(found)
            assert np.array_equal(np.isnan(found), np.isnan(expected)), case
            assert np.array_equal(found == INF, expected == INF), case
            assert (np.abs(found[number] - expected[number]) < 1e-5).all(), case


def clear_of(rng, distance):
    """A threshold that no distance is within 1e-5 of, now and then below or above all."""
    values = np.unique(distance[np.isfinite(distance)])
    edges = np.concatenate(([0.0], values, [4.0]))
    wide = np.flatnonzero(np.diff(edges) > 4e-5)
    gap = int(pick(rng, wide))
    return float(edges[gap] + edges[gap + 1]) / 2 if rng.random() < 0.9 else pick(rng, [0.0, INF])


@seeds("pairs")
def test_similar_pairs(device, first, monkeypatch):
    """The rows and columns of distances below gamma, in rising order, cut or filled to the capacity."""
    for seed in range(first, first + CHUNK):
        rng = generator("pairs", seed)
        banks = random_banks(rng, (), ())
        # With few programs to use, chunks of columns are of several tiles.
        monkeypatch.setattr(TRIPLET_ANGLE, "PROGRAMS", int(pick(rng, [1, 2, 3, 512])))
        distance = numpy_distance(*banks)
        gamma = clear_of(rng, distance)
        pairs = torch.from_numpy(np.argwhere(distance < gamma))
        count = len(pairs)
        capacity = pick(rng, [None, 0, 1, max(0, count - 1), count, count + 5, count // 2])
        if capacity is not None:
            filled = torch.full((capacity, 2), -1)
            filled[:count] = pairs[:capacity]
            pairs = filled
        case = described(seed, *banks[:5], min_triplets=banks[5], gamma=gamma, capacity=capacity)
        given = given_to(device, banks)
        arguments = *given[:3], gamma, *given[3:], capacity
        for _ in range(2):   # the order of the programs must not show
            found = kernels.similar_pairs(*arguments)
            assert found.dtype == torch.int64 and torch.equal(found.cpu(), pairs), case
        assert torch.equal(reference.similar_pairs(*banks[:3], gamma, *banks[3:], capacity), pairs), case


def test_number_of_cases():
    assert sum(CASES.values()) >= 500 and all(number % CHUNK == 0 for number in CASES.values())
