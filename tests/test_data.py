"""Skeletons, geometry, target heatmaps and augmentation: one convention, checked by hand and against the published base."""

import math

import numpy as np
import pytest
import torch

import data
from data import BODY16, HAND21



def views(n=5, size=64, seed=0):
    u = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))
    return data.random_affine_view(u, size, 60.0, 30.0, 0.05, (0.6, 1.3))


# --- skeletons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skeleton, k", [(BODY16, 16), (HAND21, 21)])
def test_skeletons_are_consistent(skeleton, k):
    assert len(skeleton) == len(set(skeleton.names)) == k
    assert all(len(set(t)) == 3 and set(t) <= set(range(k)) for t in skeleton.triplets)
    assert len(set(skeleton.limbs)) == len(skeleton.limbs) and {i for limb in skeleton.limbs for i in limb} == set(range(k))
    parts = [i for name, group in skeleton.groups.items() if name != "all" for i in group]
    assert list(skeleton.groups)[-1] == "all" and len(parts) == len(set(parts))
    assert set(parts) <= set(skeleton.groups["all"])


def test_triplets_cover_what_the_paper_needs():
    names = BODY16.names
    at = {names[b] for _, b, _ in BODY16.triplets}
    assert {"r-elbow", "l-elbow", "r-knee", "l-knee", "r-shoulder", "l-shoulder", "r-hip", "l-hip", "upper neck"} <= at
    assert all(sum(b in range(m, m + 4) for _, b, _ in HAND21.triplets) == 2 for m in (1, 5, 9, 13, 17))
    assert sum(b == 0 for _, b, _ in HAND21.triplets) == 4


# --- geometry ---------------------------------------------------------------------------------------------


def test_affine_keypoints_agree_with_published(golden):
    """Rotation, shear and scale about (W/2, H/2), then translation. Columns: rotation, shear x, shear y (0), tx, ty, scale."""
    p = golden["affine_params_deg"]
    view = data.affine_view(256, torch.deg2rad(p[:, 0]), torch.deg2rad(p[:, 1]), p[:, 5], p[:, 3:5])
    mapped = data.map_keypoints(golden["affine_keypoints_in"].double().expand(4, -1, -1), view)
    assert (p[:, 2] == 0).all() and torch.allclose(mapped, golden["affine_keypoints_out"], atol=1e-9)


def test_quarter_turn_by_hand():
    """A quarter turn about (32, 32) takes (42, 32), right of the centre, to (32, 42), below it."""
    view = data.affine_view(64, torch.tensor([math.pi / 2]), torch.zeros(1), torch.ones(1), torch.zeros(1, 2))
    assert torch.allclose(data.map_keypoints(torch.tensor([[[42.0, 32.0]]]), view), torch.tensor([[[32.0, 42.0]]]), atol=1e-4)


def test_inverse_and_composition():
    a, b = views(seed=1), views(seed=2)
    keypoints = torch.rand(5, 16, 2) * 64
    assert torch.allclose(data.map_keypoints(data.map_keypoints(keypoints, a), data.invert_view(a)), keypoints, atol=1e-3)
    assert torch.allclose(data.map_keypoints(keypoints, data.compose_views(b, a)),
                          data.map_keypoints(data.map_keypoints(keypoints, a), b), atol=1e-3)


def test_identity_warp_changes_nothing():
    images = torch.rand(2, 3, 33, 47)
    identity = torch.eye(2, 3).expand(2, 2, 3)
    assert torch.allclose(data.warp(images, identity), images, atol=1e-4)
    assert torch.allclose(data.warp(images, identity, stride=4), images, atol=1e-4)


def test_translation_by_hand():
    """A view that moves by (+3, -2) pixels moves every pixel so, and by (+1.5, -1) cells of stride 2."""
    images = torch.rand(1, 1, 16, 16)
    view = torch.tensor([[[1.0, 0, 3], [0, 1, -2]]])
    out = data.warp(images, view)
    assert torch.allclose(out[..., :14, 3:], images[..., 2:, :13], atol=1e-5) and (out[..., :3].abs() < 1e-6).all()
    half = data.warp(images, view, stride=2)
    assert torch.allclose(half[..., 0, 5], (images[..., 1, 3] + images[..., 1, 4]) / 2, atol=1e-5)


@pytest.mark.parametrize("stride, cells", [(1, 64), (2, 32), (4, 32)])
def test_heatmaps_and_keypoints_move_together(stride, cells):
    """The heatmap of a keypoint, warped, peaks where the mapped keypoint is, within a cell; and the warp back returns it."""
    size = stride * cells
    view = views(8, size)
    keypoints = size * (0.35 + 0.3 * torch.rand(8, 4, 2, generator=torch.Generator().manual_seed(0)))
    heatmaps, _ = data.render_heatmaps(keypoints, torch.ones(8, 4), cells, stride, 2.0, subcell=True)
    warped = data.warp(heatmaps, view, stride)
    mapped = data.map_keypoints(keypoints, view)
    inside = ((mapped > stride) & (mapped < size - 2 * stride)).all(-1)
    index = warped.flatten(2).argmax(-1)
    found = torch.stack([index % cells, index // cells], -1) * stride
    assert inside.sum() > 20 and ((found - mapped).abs().amax(-1)[inside] <= stride).all()
    back = data.warp(warped, data.invert_view(view), stride).flatten(2).argmax(-1)
    found = torch.stack([back % cells, back // cells], -1) * stride
    assert ((found - keypoints).abs().amax(-1)[inside] <= stride).all()


def test_warp_has_a_gradient():
    maps = torch.rand(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: data.warp(m, views(2, 16).double(), 2), maps)


def test_random_crop_covers_the_area():
    """Areas 0.6 and 1.3 of a 64 px image: sides 64 * sqrt(area), at a corner between 0 and 64 - side."""
    u = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.5, 0.5]])
    view = data.random_crop_view(u, 64, (0.6, 1.3))
    low = 64 * math.sqrt(0.6)
    corners = torch.tensor([[[0.0, 64 - low], [low, 64.0]], [[32 - 32 * math.sqrt(1.3)] * 2, [32 + 32 * math.sqrt(1.3)] * 2]])
    assert torch.allclose(data.map_keypoints(corners, view), torch.tensor([[0.0, 0.0], [64.0, 64.0]]).expand(2, 2, 2), atol=1e-3)


# --- heatmaps ---------------------------------------------------------------------------------------------


def test_target_heatmaps_agree_with_published(golden):
    """One difference, on purpose: the published code rounds with int(), which takes x = -3.1 px (cell -0.78 + 0.5) to cell 0
    though the keypoint lies outside the image; ours rounds down and leaves it out."""
    heatmaps, weight = data.render_heatmaps(golden["target_keypoints"], golden["target_visible"], 64, 4, 2.0)
    differs = (weight != golden["target_weight"]).nonzero().tolist()
    assert differs == [[1, 1]] and golden["target_keypoints"][1, 1, 0].item() == pytest.approx(-3.128, abs=1e-3)
    same = torch.ones(6, 16, dtype=torch.bool)
    same[1, 1] = False
    assert torch.allclose(heatmaps[same], golden["target_heatmaps"][same], atol=1e-6)


def test_heatmap_by_hand():
    """(9, 6) px at stride 2: cell (5, 3) by int(x / 2 + 0.5), height exp(-1/2) one sigma away, nothing beyond three."""
    heatmaps, weight = data.render_heatmaps(torch.tensor([[[9.0, 6.0]]]), torch.ones(1, 1), 16, 2, 1.0)
    assert weight.item() == 1 and heatmaps[0, 0, 3, 5] == 1
    assert heatmaps[0, 0, 3, 6].item() == pytest.approx(math.exp(-0.5)) and heatmaps[0, 0, 3, 9] == 0
    fine, _ = data.render_heatmaps(torch.tensor([[[9.0, 6.0]]]), torch.ones(1, 1), 16, 2, 1.0, subcell=True)
    assert fine[0, 0, 3, 4].item() == pytest.approx(math.exp(-0.125)) == fine[0, 0, 3, 5].item()


def test_unlabelled_and_outside_have_no_weight():
    keypoints = torch.tensor([[[10.0, 10.0], [10.0, 10.0], [-3.0, 10.0], [10.0, 64.0]]])
    heatmaps, weight = data.render_heatmaps(keypoints, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 32, 2, 1.0)
    assert weight.tolist() == [[1, 0, 0, 0]] and heatmaps[0, 1:].abs().sum() == 0


# --- augmentation -----------------------------------------------------------------------------------------


def test_normalise_round_trip():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.denormalise(data.normalise(data.unit_range(images))), images)


def test_outside_the_picture_views_are_black():
    """A view that looks outside sees black, as beside a letterbox, and jitter and normalisation leave it so."""
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    seen = data.warp(data.unit_range(images), torch.tensor([[[1.0, 0, 4], [0, 1, 0]]]))
    seen = data.denormalise(data.normalise(data.colour_jitter(seen, torch.tensor([[1.0, 0.5, 1, 0, 0, 0]]), 0.25)))
    assert (seen[..., :4] == 0).all() and (seen[..., 4:] > 200).all()


def pil_jitter(image, factors, order):
    """Pillow's own enhancers, one after the other."""
    from PIL import Image, ImageEnhance
    picture = Image.fromarray(image)
    for change in order:
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
        picture = enhancer(picture).enhance(factors[change])
    return np.asarray(picture)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_colour_jitter_agrees_with_pillow(order):
    """Each image has its own order of brightness, contrast and saturation; each change is Pillow's, clamped."""
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    u = torch.zeros(1, 6)
    u[0, :3] = torch.tensor([1.0, 0.9, 0.1])
    u[0, 3:] = torch.tensor([float(order.index(change)) for change in range(3)]) / 4
    expected = pil_jitter(image, [1.5, 1.4, 0.6], order)
    seen = data.colour_jitter(data.unit_range(torch.from_numpy(image).permute(2, 0, 1)[None]), u, 0.5)
    assert np.abs(255 * seen[0].permute(1, 2, 0).numpy() - expected).max() < 4      # Pillow rounds in between
    unchanged = data.colour_jitter(seen, torch.full((1, 6), 0.5), 0.5)
    assert torch.allclose(unchanged, seen, atol=1e-5)


# --- batches ----------------------------------------------------------------------------------------------


def test_every_pass_of_batches_visits_all_once():
    """Batches of 4 over 10 samples: 5 passes are 25 half-overlapping batches, each sample 10 times, passes differ."""
    drawn = np.concatenate([data.shuffled_batch(10, 4, step, seed=3) for step in range(25)])
    passes = drawn.reshape(10, 10)
    assert (np.sort(passes, 1) == np.arange(10)).all() and not (passes[0] == passes[1]).all()
    assert (data.shuffled_batch(10, 4, 7, seed=3) == drawn[28:32]).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_the_errors(workers):
    assert list(data.prefetch((lambda i=i: i * i for i in range(20)), workers)) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch((lambda i=i: 1 // (5 - i) for i in range(9)), workers))


@pytest.mark.parametrize("field, value", [("names", ()), ("limbs", ((0, 9),)), ("triplets", ((0, 1),)),
                                          ("groups", {"some": (0,)}), ("root", ())])
def test_a_skeleton_that_does_not_fit_is_refused(field, value):
    good = dict(names=("a", "b", "c"), limbs=((0, 1),), triplets=((0, 1, 2),), groups={"all": (0, 1)}, root=(0,))
    data.Skeleton(**good)
    with pytest.raises(ValueError, match=field):
        data.Skeleton(**{**good, field: value})


def test_letterbox_by_hand():
    """40 x 20 pixels in a square of 20: half the size, five black rows above and below; pixel centres map to centres."""
    from PIL import Image
    size, place, view = data.letterbox_view((0, 0, 40, 20), 20)
    assert size == (20, 10) and place == (0, 5)
    assert view @ [0.5, 0.5, 1] == pytest.approx([0, 5]) and view @ [39.5, 19.5, 1] == pytest.approx([19.5, 14.5])
    square = data.letterbox(Image.new("RGB", (40, 20), (255, 0, 0)), (0, 0, 40, 20), 20)
    assert square.shape == (3, 20, 20) and (square[0, 5:15] == 255).all() and square[:, :5].sum() == 0
