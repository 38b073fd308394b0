"""The fused operators against hand values, float64 and the published base method.

Every test with the `backend` fixture runs twice: on the PyTorch reference, and on the Triton kernels, on the
GPU if there is one and else in Triton's interpreter. Expected values are worked out here with numpy, in
float64.
"""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import common, reference

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CUDA = torch.cuda.is_available()
INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 21, 64, 48), (3, 16, 96, 72), (2, 16, 33, 1), (9, 5, 3, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_maps(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layouts(maps):
    """The same maps with their memory laid out in other ways: (name, tensor) pairs."""
    batch, keypoints, height, width = maps.shape
    yield "contiguous", maps
    yield "channels-last", maps.contiguous(memory_format=torch.channels_last)
    yield "transposed", maps.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch and keypoints swapped", maps.transpose(0, 1).contiguous().transpose(0, 1)
    room = maps.new_full((batch, keypoints + 1, height + 2, 2 * width + 3), INF)
    room[:, 1:, 1:-1, 2:-1:2] = maps
    yield "sliced", room[:, 1:, 1:-1, 2:-1:2]


def numpy_argmax(maps):
    """Row-major argmax, the first NaN counting as the maximum, as (x, y) and value."""
    flat = maps.double().flatten(2).numpy()
    index = flat.argmax(axis=2)
    y, x = np.unravel_index(index, maps.shape[2:])
    return np.stack((x, y), axis=2), np.take_along_axis(flat, index[..., None], axis=2)[..., 0]


def numpy_soft_argmax(maps, beta):
    flat = beta * maps.double().flatten(2).numpy()
    weight = np.exp(flat - flat.max(axis=2, keepdims=True))
    weight = (weight / weight.sum(axis=2, keepdims=True)).reshape(maps.shape)
    return np.stack(((weight.sum(axis=2) * np.arange(maps.shape[3])).sum(axis=2),
                     (weight.sum(axis=3) * np.arange(maps.shape[2])).sum(axis=2)), axis=2)


def numpy_distance(source, target, triplets, source_valid, target_valid, min_triplets=1):
    """Eq. 7 pair by pair, the angle as that of a complex quotient."""
    def angle(pose, valid, triplet):
        first, middle, last = (complex(*pose[i]) for i in triplet)
        if not all(valid[i] for i in triplet) or first == middle or last == middle:
            return None
        return abs(np.angle((first - middle) / (last - middle)))

    result = np.full((len(source), len(target)), INF)
    for i in range(len(source)):
        ours = [angle(source[i], source_valid[i], triplet) for triplet in triplets]
        for j in range(len(target)):
            theirs = [angle(target[j], target_valid[j], triplet) for triplet in triplets]
            squares = [(p - q) ** 2 for p, q in zip(ours, theirs) if p is not None and q is not None]
            if len(squares) >= max(min_triplets, 1):
                result[i, j] = np.sqrt(sum(squares) * len(triplets) / len(squares)) / source.shape[1]
    return result


# --- heatmap_argmax -----------------------------------------------------------------------------------------

def test_argmax_hand_values(backend):
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, 0, 2, 1] = 0.5   # row 2, column 1: (x, y) = (1, 2)
    maps[0, 1] = -7.0
    maps[0, 1, 0, 3] = -0.25
    coords, confidence = kernels.heatmap_argmax(maps.to(backend))
    assert coords.tolist() == [[[1.0, 2.0], [3.0, 0.0]]]
    assert confidence.tolist() == [[0.5, -0.25]]
    assert coords.dtype == confidence.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_argmax_equals_numpy_in_every_layout(backend, shape, dtype):
    for name, maps in layouts(random_maps(shape).to(dtype)):
        coords, value = numpy_argmax(maps)
        found, confidence = kernels.heatmap_argmax(maps.to(backend))
        assert np.array_equal(found.cpu().numpy(), coords), name
        assert np.array_equal(confidence.cpu().numpy(), value), name


def test_argmax_special_values(backend):
    """DESIGN §8: ties to the first cell, NaN as in torch.max, maps without a finite value decode."""
    maps = torch.full((1, 9, 2, 3), -1.0)
    maps[0, 0] = 0.0                                              # all equal: the first cell
    maps[0, 1] = -INF                                             # all -inf: the first cell
    maps[0, 2, 0, 2] = maps[0, 2, 1, 0] = 4.0                     # a tie, broken in row-major order
    maps[0, 3, 1, 2] = INF
    maps[0, 4, 0, 1] = INF
    maps[0, 4, 1, 0], maps[0, 4, 1, 2] = NAN, NAN                 # the first NaN, whatever else there is
    maps[0, 5] = NAN
    maps[0, 6] = -INF
    maps[0, 6, 1, 1] = -1e30                                      # the one number among -inf
    maps[0, 7, 0, 1], maps[0, 7, 1, 1] = -0.0, 0.0                # -0.0 equals 0.0 and comes first
    maps[0, 8] = INF
    expected = [[0, 0], [0, 0], [2, 0], [2, 1], [0, 1], [0, 0], [1, 1], [1, 0], [0, 0]]
    values = torch.tensor([0.0, -INF, 4.0, INF, NAN, NAN, -1e30, -0.0, INF])
    for name, layout in layouts(maps):
        coords, confidence = kernels.heatmap_argmax(layout.to(backend))
        assert coords[0].tolist() == expected, name
        torch.testing.assert_close(confidence[0].cpu(), values, rtol=0, atol=0, equal_nan=True)
        assert torch.signbit(confidence[0, 7]), name
    assert torch.equal(maps.flatten(2).max(dim=2).indices[0], torch.tensor([3 * y + x for x, y in expected]))


def test_argmax_of_large_maps(backend):
    """Few large maps are shared among programs; ties and NaN on either side of a share's border."""
    maps = torch.randn(4, 1, 300, 257, generator=torch.Generator().manual_seed(1))
    flat = maps.view(4, -1)
    flat[1, 20000] = flat[1, 70000] = 9.0
    flat[2, 5], flat[2, 60001], flat[2, 40000] = INF, NAN, NAN
    flat[3] = -INF
    for name, layout in layouts(maps):
        coords, confidence = kernels.heatmap_argmax(layout.to(backend))
        index = (coords[..., 1] * 257 + coords[..., 0])[:, 0].cpu()
        assert index.tolist() == [flat[0].argmax().item(), 20000, 40000, 0], name
        assert confidence[1].item() == 9.0 and confidence[2].isnan() and confidence[3].item() == -INF, name


def test_argmax_of_expanded_maps(backend):
    one = random_maps((1, 1, 6, 5)).to(backend)
    coords, confidence = kernels.heatmap_argmax(one.expand(3, 2, 6, 5))
    assert torch.equal(confidence, one.max().expand(3, 2))
    row = torch.tensor([[[[1.0], [3.0], [2.0]]]], device=backend).expand(2, 2, 3, 4)
    coords, confidence = kernels.heatmap_argmax(row)
    assert coords.tolist() == [[[0.0, 1.0]] * 2] * 2 and confidence.tolist() == [[3.0] * 2] * 2


def test_mean_confidence_by_hand(backend):
    """Eq. 4: (0.5 * 1 + 0.25 * 3) / 4; a keypoint without weight does not count, nor does its NaN."""
    maps = torch.zeros(3, 3, 2, 2)
    maps[0, 0, 1, 1], maps[0, 1, 0, 1], maps[0, 2] = 0.5, 0.25, NAN
    maps[1, :, 0, 0] = torch.tensor([1.0, 2.0, 6.0])
    maps[2] = NAN
    weight = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    coords, confidence, mean = kernels.heatmap_argmax_mean(maps.to(backend), weight.to(backend))
    assert mean.tolist() == [0.3125, 3.0, 0.0] and mean.dtype == torch.float32
    assert coords[0, 0].tolist() == [1.0, 1.0] and confidence[1].tolist() == [1.0, 2.0, 6.0]
    _, _, mean = kernels.heatmap_argmax_mean(maps.to(backend))
    assert mean[1].item() == 3.0 and mean[[0, 2]].isnan().all()
    _, _, transposed = kernels.heatmap_argmax_mean(maps.to(backend), weight.to(backend).T.contiguous().T)
    assert transposed.tolist() == [0.3125, 3.0, 0.0]


def test_mean_confidence_of_many_and_of_large_maps(backend):
    for shape in ((3, 70, 4, 4), (2, 3, 200, 301)):
        maps = random_maps(shape)
        weight = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5))
        for name, layout in layouts(maps):
            coords, confidence, mean = kernels.heatmap_argmax_mean(layout.to(backend), weight.to(backend))
            expected, value = numpy_argmax(maps)
            assert np.array_equal(coords.cpu().numpy(), expected), name
            assert np.array_equal(confidence.cpu().numpy(), value), name
            by_hand = (weight.double().numpy() * value).sum(1) / weight.double().numpy().sum(1)
            np.testing.assert_allclose(mean.cpu().numpy(), by_hand, rtol=1e-6, err_msg=name)


def test_argmax_of_nothing(backend):
    for batch, keypoints in ((0, 3), (2, 0), (0, 0)):
        coords, confidence = kernels.heatmap_argmax(torch.zeros(batch, keypoints, 4, 4, device=backend))
        assert coords.shape == (batch, keypoints, 2) and confidence.shape == (batch, keypoints)
        *_, mean = kernels.heatmap_argmax_mean(torch.zeros(batch, keypoints, 4, 4, device=backend))
        assert mean.tolist() == [0.0] * batch


def test_argmax_of_float64_and_without_gradient(backend):
    maps = random_maps((2, 3, 7, 5)).double().to(backend).requires_grad_()
    coords, confidence = kernels.heatmap_argmax(maps)
    expected, value = numpy_argmax(maps.detach().cpu())
    assert np.array_equal(coords.cpu().numpy(), expected)
    assert np.array_equal(confidence.cpu().numpy(), value.astype(np.float32))
    assert not coords.requires_grad and not confidence.requires_grad


def test_argmax_agrees_with_the_published_base_method(backend):
    """Published decoding moves maps whose maximum is not positive to (0, 0); ours decodes them too (DESIGN
    §8)."""
    path = SHARED / "golden" / "udape.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    golden = np.load(path)
    maps = torch.from_numpy(golden["argmax_heatmaps"])
    coords, confidence = (result.cpu().numpy() for result in kernels.heatmap_argmax(maps.to(backend)))
    positive = golden["argmax_max"] > 0
    assert np.array_equal(confidence, golden["argmax_max"])
    assert np.array_equal(coords[positive], golden["argmax_coords"][positive])
    assert not golden["argmax_coords"][~positive].any() and (~positive).sum() == 1
    assert np.array_equal(coords, numpy_argmax(maps)[0])


# --- soft_argmax --------------------------------------------------------------------------------------------

def test_soft_argmax_hand_values(backend):
    # Weights 1 and 3 at x = 0 and x = 2 of row 1: X = 6/4, Y = 1.
    maps = torch.full((1, 1, 2, 3), -INF)
    maps[0, 0, 1, 0], maps[0, 0, 1, 2] = 0.0, float(np.log(3.0)) / 2
    coords = kernels.soft_argmax(maps.to(backend), 2.0)
    torch.testing.assert_close(coords.cpu(), torch.tensor([[[1.5, 1.0]]]), rtol=0, atol=1e-6)
    flat = kernels.soft_argmax(torch.full((1, 1, 3, 5), -4.0, device=backend), 10)
    torch.testing.assert_close(flat.cpu(), torch.tensor([[[2.0, 1.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_argmax_and_its_gradient_against_float64(backend, shape, dtype):
    """Within 1e-5 cells at sides up to 64 and in proportion beyond; the gradient within 1e-5 of its largest
    value (for halves: their own rounding)."""
    beta = 20.0
    direction = random_maps((*shape[:2], 2), seed=1)
    for name, maps in layouts(random_maps(shape).to(dtype)):
        exact = maps.detach().double().requires_grad_()
        gradient, = torch.autograd.grad((reference.soft_argmax(exact, beta) * direction).sum(), exact)
        ours = maps.detach().to(backend).requires_grad_()
        coords = kernels.soft_argmax(ours, beta)
        found, = torch.autograd.grad((coords * direction.to(backend)).sum(), ours)
        assert coords.dtype == torch.float32 and found.dtype == dtype
        error = np.abs(coords.detach().cpu().numpy() - numpy_soft_argmax(maps, beta)).max()
        assert error < 1e-5 * max(1, max(shape[2:]) / 64), name
        allowed = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        error = (found.cpu().double() - gradient).abs().max().item()
        assert error <= allowed * gradient.abs().max().item() + 1e-6, name


def test_soft_argmax_over_many_tiles(backend):
    """The running maximum grows from tile to tile, from -inf first, and earlier sums are scaled down."""
    maps = torch.linspace(-3, 3, 100 * 90).view(1, 1, 100, 90).repeat(1, 2, 1, 1)
    maps[0, 0, :60] = -INF
    coords = kernels.soft_argmax(maps.to(backend), 5.0)
    assert np.abs(coords.cpu().numpy() - numpy_soft_argmax(maps, 5.0)).max() < 1e-5 * 100 / 64


def test_soft_argmax_of_large_maps(backend):
    """Few large maps are shared among programs, whose sums are joined; one share holds nothing but -inf."""
    maps = random_maps((2, 2, 300, 257)) * 0.1
    maps[0, 0, :100] = -INF
    maps[0, 1, 250, 3], maps[0, 1, 10, 200] = 0.9, 0.88
    direction = random_maps((2, 2, 2), seed=1)
    for name, layout in layouts(maps):
        exact = maps.double().requires_grad_()
        gradient, = torch.autograd.grad((reference.soft_argmax(exact, 20.0) * direction).sum(), exact)
        ours = layout.detach().to(backend).requires_grad_()
        coords = kernels.soft_argmax(ours, 20.0)
        found, = torch.autograd.grad((coords * direction.to(backend)).sum(), ours)
        error = np.abs(coords.detach().cpu().numpy() - numpy_soft_argmax(maps, 20.0)).max()
        assert error < 1e-5 * 300 / 64, name
        assert (found.cpu().double() - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_soft_argmax_has_no_value_where_softmax_has_none(backend):
    maps = torch.zeros(1, 4, 3, 3)
    maps[0, 1] = -INF
    maps[0, 2, 1, 1] = NAN
    maps[0, 3, 2, 2] = INF
    coords = kernels.soft_argmax(maps.to(backend), 3.0)
    assert coords.isnan().all(dim=2)[0].tolist() == [False, True, True, True]


def test_soft_argmax_of_nothing(backend):
    for batch, keypoints in ((0, 3), (2, 0)):
        maps = torch.zeros(batch, keypoints, 4, 4, device=backend, requires_grad=True)
        coords = kernels.soft_argmax(maps, 1.0)
        coords.sum().backward()
        assert coords.shape == (batch, keypoints, 2) and maps.grad.shape == maps.shape


def test_soft_argmax_gradcheck():
    maps = random_maps((2, 2, 3, 4)).double().requires_grad_()
    for layout in (maps, maps.permute(0, 1, 3, 2)):
        assert torch.autograd.gradcheck(lambda h: kernels.soft_argmax(h, 1.5), (layout,))
    assert torch.autograd.gradcheck(lambda h: reference.soft_argmax(h, 1.5), (maps,))


# --- triplet_angle_distance ---------------------------------------------------------------------------------

def random_poses(poses, keypoints=8, seed=0):
    return 128 + 60 * torch.randn(poses, keypoints, 2, generator=torch.Generator().manual_seed(seed))


TRIPLETS = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [5, 6, 7]])


def test_distance_hand_values(backend):
    """Eq. 7: right angle against straight, K = 3, one triplet: (pi - pi/2) / 3."""
    right = [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    straight = [[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    folded = [[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    poses = torch.tensor([right, straight, folded], device=backend)
    distance = kernels.triplet_angle_distance(poses, poses, torch.tensor([[0, 1, 2]], device=backend)).cpu()
    expected = torch.tensor([[0.0, 1, 1], [1, 0, 2], [1, 2, 0]]) * np.pi / 6
    torch.testing.assert_close(distance, expected, rtol=0, atol=1e-6)
    assert distance.dtype == torch.float32


@pytest.fixture(params=["small tiles", "large tiles"])
def tiles(request, monkeypatch):
    """The tile of the distance kernel, which otherwise follows from the size."""
    monkeypatch.setattr(sys.modules["kernels.triplet_angle"], "FEW_TILES",
                        0 if request.param == "large tiles" else 10 ** 9)


@pytest.mark.parametrize("S,T", [(1, 1), (1, 33), (33, 1), (33, 257), (0, 5), (5, 0)])
def test_distance_against_float64(backend, tiles, S, T):
    source, target = random_poses(S), random_poses(T, seed=1)
    source_valid = torch.rand(S, 8, generator=torch.Generator().manual_seed(2)) > 0.2
    target_valid = torch.rand(T, 8, generator=torch.Generator().manual_seed(3)) > 0.1
    for masks, minimum in (((None, None), 1), ((source_valid, None), 2), ((source_valid, target_valid), 3)):
        ours = kernels.triplet_angle_distance(
            source.to(backend), target.to(backend), TRIPLETS.to(backend),
            *(mask if mask is None else mask.to(backend) for mask in masks), min_triplets=minimum)
        full = [torch.ones(n, 8) if mask is None else mask for n, mask in zip((S, T), masks)]
        rows = slice(0, 6)   # the loop in float64 is slow; elsewhere all rows meet the reference
        expected = numpy_distance(source[rows].double().numpy(), target.double().numpy(),
                                  TRIPLETS.tolist(), full[0][rows].numpy(), full[1].numpy(), minimum)
        assert ours.shape == (S, T)
        found = ours[rows].cpu().double().numpy()
        assert np.array_equal(np.isinf(found), np.isinf(expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_distance_is_symmetric_and_zero_on_itself(backend, tiles):
    """Poses beyond one tile; turning, moving and scaling a pose changes none of its angles."""
    source, target = random_poses(70).to(backend), random_poses(40, seed=1).to(backend)
    triplets = TRIPLETS.to(backend)
    there = kernels.triplet_angle_distance(source, target, triplets)
    back = kernels.triplet_angle_distance(target, source, triplets)
    torch.testing.assert_close(there, back.T, rtol=0, atol=1e-6)
    assert kernels.triplet_angle_distance(source, source, triplets).diagonal().max() < 1e-6
    turned = 2.5 * source @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], device=source.device) - 40
    found = kernels.triplet_angle_distance(turned, target, triplets)
    torch.testing.assert_close(found, there, rtol=0, atol=1e-5)
    plain = reference.triplet_angle_distance(source.cpu(), target.cpu(), TRIPLETS)
    torch.testing.assert_close(there.cpu(), plain, rtol=0, atol=1e-6)


def test_angle_is_accurate_over_its_range(backend, tiles):
    """One triplet against a folded one of angle 0: K times the distance is the angle, within 1e-6 of
    float64."""
    theta = torch.linspace(0, float(np.pi), 2001, dtype=torch.float64)
    poses = torch.zeros(2001, 3, 2)
    poses[:, 0] = 3 * torch.stack((theta.cos(), theta.sin()), dim=1)
    poses[:, 2, 0] = 0.5
    folded = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]], device=backend)
    triplet = torch.tensor([[0, 1, 2]], device=backend)
    distance = kernels.triplet_angle_distance(poses.to(backend), folded, triplet)
    stored = poses[:, 0].double()
    expected = torch.atan2(stored[:, 1].abs(), stored[:, 0])   # of the coordinates as rounded to float32
    assert (3 * distance[:, 0].cpu().double() - expected).abs().max() < 1e-6


def test_collinear_triplets_have_angle_zero_or_pi(backend):
    """Limbs of any length and direction; arccos would be off by 3e-4 here."""
    direction = random_poses(50, keypoints=1) - 128
    middle = torch.zeros(50, 1, 2)
    opposite = torch.cat((direction, middle, -0.3 * direction), dim=1).to(backend)
    same = torch.cat((direction, middle, 0.7 * direction), dim=1).to(backend)
    folded = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]], device=backend)
    triplet = torch.tensor([[0, 1, 2]], device=backend)
    straight = 3 * kernels.triplet_angle_distance(opposite, folded, triplet).cpu().double()
    assert (straight - np.pi).abs().max() < 1e-6
    assert (3 * kernels.triplet_angle_distance(same, folded, triplet)).max() < 1e-6


def test_coincident_keypoints_and_pruning(backend, tiles):
    """DESIGN §4: a degenerate limb or a pruned keypoint takes its triplets out; the norm is rescaled."""
    pose = random_poses(1)
    other = random_poses(1, seed=1)
    degenerate = other.clone()
    degenerate[0, 7] = degenerate[0, 6]                     # the limb 6-7 has no length: 5-6-7 drops out
    valid = torch.ones(1, 8, dtype=torch.bool)
    valid[0, 7] = False                                     # as does pruning keypoint 7
    args = [tensor.to(backend) for tensor in (pose, other, degenerate, TRIPLETS, TRIPLETS[:4], valid)]
    pose, other, degenerate, triplets, kept, valid = args
    # With A = 4 the norm over four triplets stays as it is; with A = 5 it is rescaled by sqrt(5 / 4).
    expected = kernels.triplet_angle_distance(pose, other, kept) * (5 / 4) ** 0.5
    for ours in (kernels.triplet_angle_distance(pose, degenerate, triplets),
                 kernels.triplet_angle_distance(pose, other, triplets, None, valid),
                 kernels.triplet_angle_distance(pose, other, triplets, valid, None),
                 kernels.triplet_angle_distance(pose, other, triplets, valid, valid, min_triplets=4)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    pruned = kernels.triplet_angle_distance(pose, other, triplets, valid, valid, min_triplets=5)
    nothing = kernels.triplet_angle_distance(pose, other, triplets, ~valid, valid, min_triplets=0)
    no_triplets = kernels.triplet_angle_distance(pose, other, triplets[:0])
    assert pruned.item() == nothing.item() == no_triplets.item() == INF
    other[0, 7] = NAN                                       # what lies at a pruned keypoint does not matter
    torch.testing.assert_close(kernels.triplet_angle_distance(pose, other, triplets, None, valid), expected,
                               rtol=0, atol=1e-6)
    assert kernels.triplet_angle_distance(pose, other, triplets).isnan().all()


def test_distance_of_other_strides_and_dtypes(backend):
    source, target = random_poses(5).to(backend), random_poses(3, seed=1).to(backend)
    triplets, valid = TRIPLETS.to(backend), (torch.rand(5, 8) > 0.2).to(backend)
    expected = kernels.triplet_angle_distance(source, target, triplets, valid)
    room = torch.full((5, 17, 5), NAN, device=backend)
    room[:, 1::2, 1:5:3] = source
    reversed_target = target.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = kernels.triplet_angle_distance(room[:, 1::2, 1:5:3], reversed_target,
                                           triplets.T.contiguous().T, valid.T.contiguous().T)
    assert torch.equal(found, expected)
    repeated = kernels.triplet_angle_distance(source[:1].expand(4, 8, 2), target, triplets)
    assert torch.equal(repeated, repeated[:1].expand(4, 3))
    half = kernels.triplet_angle_distance(source.half(), target.bfloat16(), triplets)
    rounded = kernels.triplet_angle_distance(source.half().float(), target.bfloat16().float(), triplets)
    torch.testing.assert_close(half, rounded, rtol=0, atol=1e-6)
    double = kernels.triplet_angle_distance(source.double(), target, triplets, valid)
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-6)


def test_distance_of_many_triplets(backend, tiles):
    """A = 40, more than any tile takes at a time; a few triplets are missing here and there."""
    triplets = torch.randint(0, 8, (40, 3), generator=torch.Generator().manual_seed(4))
    triplets = triplets[(triplets[:, 0] != triplets[:, 1]) & (triplets[:, 2] != triplets[:, 1])]
    source, target = random_poses(5), random_poses(7, seed=1)
    source[2, 3], target[1, 4] = source[2, 5], target[1, 0]
    valid = torch.rand(7, 8, generator=torch.Generator().manual_seed(3)) > 0.2
    found = kernels.triplet_angle_distance(source.to(backend), target.to(backend), triplets.to(backend), None,
                                           valid.to(backend))
    expected = numpy_distance(source.double().numpy(), target.double().numpy(), triplets.tolist(),
                              np.ones((5, 8)), valid.numpy())
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=1e-5)


def test_distance_of_batches(backend, tiles):
    """Leading dimensions, equal or 1, are matrices of their own."""
    source = random_poses(2 * 3 * 4).view(2, 3, 4, 8, 2)
    target = random_poses(3 * 5, seed=1).view(1, 3, 5, 8, 2)
    source_valid = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(2)) > 0.2
    target_valid = torch.rand(1, 3, 5, 8, generator=torch.Generator().manual_seed(3)) > 0.2
    arguments = [tensor.to(backend) for tensor in (source, target, TRIPLETS, source_valid, target_valid)]
    found = kernels.triplet_angle_distance(*arguments, min_triplets=2).cpu()
    assert found.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            expected = numpy_distance(source[i, j].double().numpy(), target[0, j].double().numpy(), TRIPLETS.tolist(),
                                      source_valid[i, j].numpy(), target_valid[0, j].numpy(), 2)
            np.testing.assert_allclose(found[i, j].numpy(), expected, rtol=0, atol=1e-5)
    assert kernels.triplet_angle_distance(*(arguments[0][:, :0], arguments[1][:, :0]), arguments[2]).shape == (2, 0, 4, 5)
    with pytest.raises(ValueError, match="leading dimensions of source and target"):
        kernels.triplet_angle_distance(arguments[0], arguments[0][:, :2], arguments[2])


def test_index_that_names_no_keypoint_is_not_usable(monkeypatch):
    """On a GPU nobody checks the triplets before the launch; one out of range must not read beyond the poses."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    from kernels.triplet_angle import launch
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wrong = torch.cat((TRIPLETS, torch.tensor([[0, 8, 1], [-1, 2, 3], [2 ** 40, 1, 2]])))
    device = "cuda" if CUDA else "cpu"
    source, target, right, wrong = (tensor.to(device) for tensor in
                                    (random_poses(3), random_poses(4, seed=1), TRIPLETS, wrong))
    expected = launch(source, target, right) * (8 / 5) ** 0.5         # five of the eight are left
    torch.testing.assert_close(launch(source, target, wrong), expected, rtol=0, atol=1e-6)


# --- similar_pairs ------------------------------------------------------------------------------------------

def test_pairs_by_hand(backend):
    right = [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    straight = [[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    folded = [[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    poses, triplet = torch.tensor([right, straight, folded], device=backend), torch.tensor([[0, 1, 2]], device=backend)
    # Distances are multiples of pi / 6: right is 1 from both others, which are 2 from each other.
    assert kernels.similar_pairs(poses, poses, triplet, 0.1).tolist() == [[0, 0], [1, 1], [2, 2]]
    near = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 2]]
    found = kernels.similar_pairs(poses, poses, triplet, 0.6)
    assert found.tolist() == near and found.dtype == torch.int64
    assert kernels.similar_pairs(poses, poses, triplet, 0.6, capacity=3).tolist() == near[:3]
    assert kernels.similar_pairs(poses, poses, triplet, 0.6, capacity=7).tolist() == near
    assert kernels.similar_pairs(poses, poses, triplet, 0.6, capacity=9).tolist() == near + [[-1, -1]] * 2
    assert kernels.similar_pairs(poses, poses, triplet, 0.6, capacity=0).shape == (0, 2)
    assert kernels.similar_pairs(poses, poses, triplet, 0.0).shape == (0, 2)    # below, not at, gamma


@pytest.mark.parametrize("S,T", [(1, 1), (33, 257), (70, 40), (0, 5), (5, 0), (3, 1100)])
def test_pairs_are_the_entries_below_gamma(backend, S, T):
    source, target = random_poses(S), random_poses(T, seed=1)
    valid = torch.rand(T, 8, generator=torch.Generator().manual_seed(3)) > 0.1
    target[:T // 4] = source[torch.arange(T // 4) % max(S, 1)] if S else target[:T // 4]     # some are the same pose
    distance = reference.triplet_angle_distance(source.double(), target.double(), TRIPLETS, None, valid, 3)
    for gamma in (0.02, 0.1, 9.0):
        if (distance - gamma).abs().lt(1e-5).any():
            gamma += 1e-4
        found = kernels.similar_pairs(source.to(backend), target.to(backend), TRIPLETS.to(backend), gamma, None,
                                      valid.to(backend), 3)
        assert found.tolist() == (distance < gamma).nonzero().tolist()


def test_mining_does_not_hold_the_matrix(run_python):
    """8,000 x 8,000 poses on the CPU: the matrix and its mask would be 320 MB, the reference takes blocks."""
    code = ("import resource, torch, kernels; g = torch.Generator().manual_seed(0)\n"
            "poses = torch.randn(2, 8000, 3, 2, generator=g); triplet = torch.tensor([[0, 1, 2]])\n"
            "kernels.similar_pairs(poses[0, :9], poses[1, :9], triplet, 1e-6)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "pairs = kernels.similar_pairs(*poses, triplet, 1e-6)\n"
            "print(len(pairs), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    pairs, megabytes = map(int, run_python(code).split())
    # One triplet of three keypoints: pairs whose angles are within 3e-6. Were angles uniform, 122 of 6.4e7.
    assert 60 < pairs < 300 and megabytes < 200


def test_triplet_angles_helper():
    pose = torch.tensor([[[0.0, 2.0], [0.0, 0.0], [5.0, 5.0], [5.0, 5.0]]])
    triplets = torch.tensor([[0, 1, 2], [1, 2, 3], [0, 1, 3]])
    angles, usable = reference.triplet_angles(pose, triplets, torch.tensor([[True, True, True, False]]))
    assert usable.tolist() == [[True, False, False]] and angles[0, 1:].tolist() == [0.0, 0.0]
    assert angles[0, 0].item() == pytest.approx(np.pi / 4, abs=1e-6)


# --- errors -------------------------------------------------------------------------------------------------

def test_errors_name_the_argument(backend):
    maps = torch.zeros(1, 2, 3, 4, device=backend)
    poses, triplets = torch.zeros(2, 8, 2, device=backend), TRIPLETS.to(backend)
    valid = torch.ones(2, 8, dtype=torch.bool, device=backend)
    distance = kernels.triplet_angle_distance
    cases = [
        (ValueError, "heatmaps", lambda: kernels.heatmap_argmax(maps[0])),
        (TypeError, "heatmaps", lambda: kernels.heatmap_argmax(maps.long())),
        (TypeError, "heatmaps", lambda: kernels.heatmap_argmax(np.zeros((1, 2, 3, 4)))),
        (ValueError, "heatmaps", lambda: kernels.heatmap_argmax(maps[:, :, :0])),
        (ValueError, "heatmaps", lambda: kernels.soft_argmax(maps[0], 1.0)),
        (TypeError, "heatmaps", lambda: kernels.soft_argmax(maps.int(), 1.0)),
        (ValueError, "beta", lambda: kernels.soft_argmax(maps, 0.0)),
        (ValueError, "beta", lambda: kernels.soft_argmax(maps, -1)),
        (ValueError, "beta", lambda: kernels.soft_argmax(maps, NAN)),
        (ValueError, "source", lambda: distance(poses[0], poses, triplets)),
        (TypeError, "target", lambda: distance(poses, poses.long(), triplets)),
        (ValueError, "source and target", lambda: distance(poses, poses[:, :7], triplets)),
        (ValueError, "target", lambda: distance(poses, poses.to("meta"), triplets)),
        (ValueError, "triplets", lambda: distance(poses, poses, triplets.to("meta"))),
        (ValueError, "triplets", lambda: distance(poses, poses, triplets[:, :2])),
        (TypeError, "triplets", lambda: distance(poses, poses, triplets.float())),
        (TypeError, "triplets", lambda: distance(poses, poses, triplets.tolist())),
        (TypeError, "source_valid", lambda: distance(poses, poses, triplets, poses[..., 0])),
        (ValueError, "target_valid", lambda: distance(poses, poses, triplets, None, valid[:1])),
        (ValueError, "source_valid", lambda: distance(poses, poses, triplets, valid.to("meta"))),
        (ValueError, "min_triplets", lambda: distance(poses, poses, triplets, min_triplets=-1)),
        (ValueError, "weight", lambda: kernels.heatmap_argmax_mean(maps, torch.ones(1, 3, device=backend))),
        (TypeError, "weight", lambda: kernels.heatmap_argmax_mean(maps, torch.ones(1, 2, device=backend).bool())),
        (TypeError, "weight", lambda: kernels.heatmap_argmax_mean(maps, [1.0, 1.0])),
        (ValueError, "weight", lambda: kernels.heatmap_argmax_mean(maps, torch.ones(1, 2, device="meta"))),
        (ValueError, "gamma", lambda: kernels.similar_pairs(poses, poses, triplets, -0.1)),
        (ValueError, "gamma", lambda: kernels.similar_pairs(poses, poses, triplets, NAN)),
        (ValueError, "capacity", lambda: kernels.similar_pairs(poses, poses, triplets, 0.1, capacity=-1)),
        (ValueError, "source", lambda: kernels.similar_pairs(poses[None], poses[None], triplets, 0.1)),
    ]
    if backend == "cpu":
        cases += [(ValueError, "triplets", lambda: distance(poses, poses, triplets + 1)),
                  (ValueError, "triplets", lambda: distance(poses, poses, triplets - 1))]
    for error, name, call in cases:
        with pytest.raises(error, match=name):
            call()
