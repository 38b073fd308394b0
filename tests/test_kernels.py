"""The fused operators against hand values, float64 and the published base method.

Every test with the `backend` fixture runs twice: on the PyTorch reference, and on the Triton kernels, on the
GPU if there is one and else in Triton's interpreter. Expected values are worked out here with numpy, in
float64.
"""
import os
import subprocess
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
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 21, 64, 48), (2, 16, 33, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Device on which the operators run their reference, or their Triton kernels."""
    if request.param == "reference":
        monkeypatch.setattr(common, "INTERPRET", False)
        return "cpu"
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    if CUDA:
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(common, "INTERPRET", True)
    return "cpu"


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


def test_argmax_of_nothing(backend):
    for batch, keypoints in ((0, 3), (2, 0), (0, 0)):
        coords, confidence = kernels.heatmap_argmax(torch.zeros(batch, keypoints, 4, 4, device=backend))
        assert coords.shape == (batch, keypoints, 2) and confidence.shape == (batch, keypoints)


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
    """Within 1e-4 cells, and the gradient within 1e-5 of its largest value (for halves: their own
    rounding)."""
    beta = 20.0
    direction = random_maps((*shape[:2], 2), seed=1)
    for name, maps in layouts(random_maps(shape).to(dtype)):
        exact = maps.detach().double().requires_grad_()
        gradient, = torch.autograd.grad((reference.soft_argmax(exact, beta) * direction).sum(), exact)
        ours = maps.detach().to(backend).requires_grad_()
        coords = kernels.soft_argmax(ours, beta)
        found, = torch.autograd.grad((coords * direction.to(backend)).sum(), ours)
        assert coords.dtype == torch.float32 and found.dtype == dtype
        assert np.abs(coords.detach().cpu().numpy() - numpy_soft_argmax(maps, beta)).max() < 1e-4, name
        allowed = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        error = (found.cpu().double() - gradient).abs().max().item()
        assert error <= allowed * gradient.abs().max().item() + 1e-6, name


def test_soft_argmax_over_many_tiles(backend):
    """The running maximum grows from tile to tile, from -inf first, and earlier sums are scaled down."""
    maps = torch.linspace(-3, 3, 100 * 90).view(1, 1, 100, 90).repeat(1, 2, 1, 1)
    maps[0, 0, :60] = -INF
    coords = kernels.soft_argmax(maps.to(backend), 5.0)
    assert np.abs(coords.cpu().numpy() - numpy_soft_argmax(maps, 5.0)).max() < 1e-4


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


@pytest.mark.parametrize("S,T", [(1, 1), (1, 33), (33, 1), (33, 257), (0, 5), (5, 0)])
def test_distance_against_float64(backend, S, T):
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


def test_distance_is_symmetric_and_zero_on_itself(backend):
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


def test_angle_is_accurate_over_its_range(backend):
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


def test_coincident_keypoints_and_pruning(backend):
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
    ]
    if backend == "cpu":
        cases += [(ValueError, "triplets", lambda: distance(poses, poses, triplets + 1)),
                  (ValueError, "triplets", lambda: distance(poses, poses, triplets - 1))]
    for error, name, call in cases:
        with pytest.raises(error, match=name):
            call()


# --- as operators of torch ----------------------------------------------------------------------------------

def operator_calls(device):
    maps = random_maps((2, 3, 7, 5)).to(device)
    source, target = random_poses(4).to(device), random_poses(3, seed=1).to(device)
    valid = torch.rand(4, 8).to(device) > 0.2
    operators = torch.ops.actupose
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    for layout in (maps, channels_last, maps.half(), maps[:, :1].expand(2, 3, 7, 5)):
        yield operators.heatmap_argmax.default, (layout,)
        yield operators.soft_argmax.default, (layout.detach().requires_grad_(), 4.0)
        yield operators.soft_argmax_backward.default, (maps[:, :, 0, :2].contiguous(), layout, 4.0)
    yield operators.triplet_angle_distance.default, (source, target, TRIPLETS.to(device))
    yield operators.triplet_angle_distance.default, (source, target, TRIPLETS.to(device), valid, None, 2)


def test_opcheck(backend):
    for operator, arguments in operator_calls(backend):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, compiler):
    def decode(maps, source, target, triplets, valid):
        coords, confidence = kernels.heatmap_argmax(maps)
        return (coords, confidence, kernels.soft_argmax(maps, 4.0),
                kernels.triplet_angle_distance(source, target, triplets, valid, min_triplets=2))

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        maps = random_maps((batch, 3, 7, 5)).to(backend).requires_grad_()
        arguments = (maps, random_poses(batch).to(backend), random_poses(3, seed=1).to(backend),
                     TRIPLETS.to(backend), torch.ones(batch, 8, dtype=torch.bool, device=backend))
        expected, found = decode(*arguments), compiled(*arguments)
        for ours, eager in zip(found, expected):
            assert torch.equal(ours, eager)
        gradients = [torch.autograd.grad(result[2].square().sum(), maps)[0] for result in (expected, found)]
        assert torch.equal(*gradients)


def run_python(code, *arguments, **environment):
    """Run `code` in a fresh interpreter without TRITON_INTERPRET, unless it is given."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env={**clean, **environment},
                            text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_environment_chooses_the_interpreter():
    """DESIGN §8: with TRITON_INTERPRET=1 CPU tensors go through the kernels, without it through the
    reference."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    code = ("import torch, kernels; from kernels import common, reference; reference.heatmap_argmax = None\n"
            "try: print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())\n"
            "except TypeError: print('reference')")
    assert run_python(code, TRITON_INTERPRET="1").strip() == "1.0"
    assert run_python(code).strip() == "reference"


def test_works_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, kernels; print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())")
    assert run_python(code).strip() == "1.0"


COMPILE = """
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.common import COMPILE_OPTIONS, warps_for
from kernels.heatmap_argmax import argmax_kernel, choose_kernel
from kernels.soft_argmax import backward_kernel, forward_kernel
from kernels.triplet_angle import BLOCK, distance_kernel

def report(kernel, pointers, constants, warps):
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    types.update({name: "constexpr" for name in constants})
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if types[name][0] == "*" or types[name] == "i32" and name in ("cells", "width", "share")}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, **COMPILE_OPTIONS})
    with open(sys.argv[2], "wb") as file:
        file.write(compiled.asm["cubin"])
    usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", sys.argv[2]],
                           check=True, capture_output=True, text=True).stdout
    print(kernel.__name__, *[word for word in usage.split() if word.startswith(("REG:", "STACK:", "LOCAL:"))])

for element, tile, unit in (("fp32", (1, 4096), "stride_w"), ("fp32", (8, 512), "stride_k"),
                            ("bf16", (1, 4096), "stride_w"), ("bf16", (16, 256), "stride_k")):
    maps = {"heatmaps": "*" + element, "grad_heatmaps": "*" + element, "coords": "*fp32",
            "grad_coords": "*fp32", "confidence": "*fp32", "candidates": "*i32", "beta": "fp32"}
    layout = {"FLAT": True, "BLOCK_K": tile[0], "BLOCK_N": tile[1], unit: 1}
    warps = warps_for(tile)
    report(argmax_kernel, maps, {"SHARED": tile[0] == 1, **layout}, warps)
    report(forward_kernel, maps, {"WIDTH": 64, **layout}, warps)
    report(backward_kernel, maps, {"WIDTH": 64, "GRAD_FLAT": True, "grad_" + unit: 1, **layout}, warps)
report(choose_kernel, maps, {"FLAT": False, "BLOCK_S": 64}, 1)
poses = {"source": "*fp32", "target": "*fp32", "source_valid": "*u8", "target_valid": "*u8",
         "triplets": "*i64", "distance": "*fp32"}
for masked in (False, True):
    flags = {"HAS_SOURCE_VALID": masked, "HAS_TARGET_VALID": masked}
    report(distance_kernel, poses, {"BLOCK": BLOCK, "source_c": 1, "target_c": 1, **flags}, 1)
"""


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile_without_a_gpu(capability, tmp_path):
    """DESIGN §8: a cubin for each kernel, and by its own account no stack, that is, no spilled register."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    assembler = "ptxas_blackwell" if capability == "100" else "ptxas"
    for tool in (assembler, "cuobjdump"):
        try:
            getattr(common.triton.knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    output = run_python(COMPILE, capability, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))
    lines = output.splitlines()
    assert len(lines) == 15
    for line in lines:
        assert line.split()[2:] == ["STACK:0", "LOCAL:0"], line


# --- on a GPU -----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_offsets_beyond_2_31_on_gpu():
    """The last of the maps lies beyond 2^31 elements, and so does the gradient there."""
    maps = torch.zeros(2**31 // 2**20 + 2, 1, 1024, 1024, dtype=torch.float16, device="cuda")
    maps[-1, 0, 700, 900] = 1.0
    coords, confidence = kernels.heatmap_argmax(maps)
    assert coords[-1, 0].tolist() == [900.0, 700.0] and confidence[-1, 0].item() == 1.0
    torch.testing.assert_close(kernels.soft_argmax(maps, 1000.0)[-1, 0].cpu(), torch.tensor([900.0, 700.0]))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_cuda_graph_on_gpu():
    maps = torch.rand(4, 16, 64, 64, device="cuda")
    poses, triplets = random_poses(8).cuda(), TRIPLETS.cuda()

    def decode():
        return (*kernels.heatmap_argmax(maps), kernels.soft_argmax(maps, 5.0),
                kernels.triplet_angle_distance(poses, poses, triplets))

    decode()   # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode()
    maps.copy_(torch.rand(4, 16, 64, 64))
    graph.replay()
    for ours, expected in zip(found, decode()):
        assert torch.equal(ours, expected)
