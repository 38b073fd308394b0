"""Skeletons, what a dataset must be, geometry, target heatmaps, augmentation, batches: by hand and against
the published base method."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

import data
from data import BODY16, HAND21


def views(n=5, size=64, seed=0):
    u = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))
    return data.random_affine_view(u, size, 60.0, 30.0, 0.05, (0.6, 1.3))


@pytest.mark.parametrize("skeleton, k", [(BODY16, 16), (HAND21, 21)])
def test_skeletons_are_consistent(skeleton, k):
    assert len(skeleton) == len(set(skeleton.names)) == k
    assert all(len(set(t)) == 3 and set(t) <= set(range(k)) for t in skeleton.triplets)
    assert set().union(*skeleton.limbs) == set(range(k))
    parts = []
    for name, group in skeleton.groups.items():
        if name != "all":
            parts += group
    assert list(skeleton.groups)[-1] == "all" and len(parts) == len(set(parts))
    assert set(parts) <= set(skeleton.groups["all"])


def test_triplets_cover_what_the_paper_needs():
    at = {BODY16.names[b] for _, b, _ in BODY16.triplets}
    for joint in ("elbow", "knee", "shoulder", "hip"):
        assert {"r-" + joint, "l-" + joint} <= at
    assert "upper neck" in at
    middles = [b for _, b, _ in HAND21.triplets]
    for m in (1, 5, 9, 13, 17):                                     # two in each finger, four at the wrist
        assert sum(m <= b < m + 4 for b in middles) == 2
    assert middles.count(0) == 4


def test_affine_keypoints_agree_with_published(golden):
    """Rotation, shear and scale about (W/2, H/2), then translation."""
    p = golden["affine_params_deg"]                       # rotation, shear x, shear y (0), tx, ty, scale
    view = data.affine_view(256, torch.deg2rad(p[:, 0]), torch.deg2rad(p[:, 1]), p[:, 5], p[:, 3:5])
    mapped = data.map_keypoints(golden["affine_keypoints_in"].double().expand(4, -1, -1), view)
    assert (p[:, 2] == 0).all() and torch.allclose(mapped, golden["affine_keypoints_out"], atol=1e-9)


def test_quarter_turn_by_hand():
    """A quarter turn about (32, 32) takes (42, 32), right of the centre, to (32, 42), below it."""
    view = data.affine_view(64, torch.tensor([math.pi / 2]), torch.zeros(1), torch.ones(1), torch.zeros(1, 2))
    mapped = data.map_keypoints(torch.tensor([[[42.0, 32.0]]]), view)
    assert torch.allclose(mapped, torch.tensor([[[32.0, 42.0]]]), atol=1e-4)


def test_inverse_and_composition():
    a = views(seed=1)
    b = views(seed=2)
    keypoints = torch.rand(5, 16, 2) * 64
    mapped = data.map_keypoints(keypoints, a)
    assert torch.allclose(data.map_keypoints(mapped, data.invert_view(a)), keypoints, atol=1e-3)
    both = data.map_keypoints(keypoints, data.compose_views(b, a))
    assert torch.allclose(both, data.map_keypoints(mapped, b), atol=1e-3)


def test_translation_by_hand():
    """A view that moves by (+3, -2) pixels moves each pixel so, and by (+1.5, -1) cells of stride 2."""
    images = torch.rand(1, 1, 16, 16)
    assert torch.allclose(data.warp(images, torch.eye(2, 3)[None], stride=4), images, atol=1e-5)
    view = torch.tensor([[[1.0, 0, 3], [0, 1, -2]]])
    out = data.warp(images, view)
    assert torch.allclose(out[..., :14, 3:], images[..., 2:, :13], atol=1e-5) and out[..., :3].max() < 1e-6
    half = data.warp(images, view, stride=2)
    assert torch.allclose(half[..., 0, 5], (images[..., 1, 3] + images[..., 1, 4]) / 2, atol=1e-5)


@pytest.mark.parametrize("stride, cells", [(1, 64), (2, 32), (4, 32)])
def test_heatmaps_and_keypoints_move_together(stride, cells):
    """A keypoint's heatmap, warped, peaks within a cell of the mapped keypoint; the warp back returns it."""
    size = stride * cells
    view = views(8, size)
    keypoints = size * (0.35 + 0.3 * torch.rand(8, 4, 2, generator=torch.Generator().manual_seed(0)))
    heatmaps, _ = data.render_heatmaps(keypoints, torch.ones(8, 4), cells, stride, 2.0, subcell=True)
    warped = data.warp(heatmaps, view, stride)
    mapped = data.map_keypoints(keypoints, view)
    inside = ((mapped > stride) & (mapped < size - 2 * stride)).all(-1)
    assert inside.sum() > 20
    for maps, expected in (warped, mapped), (data.warp(warped, data.invert_view(view), stride), keypoints):
        index = maps.flatten(2).argmax(-1)
        found = torch.stack([index % cells, index // cells], -1) * stride
        assert ((found - expected).abs().amax(-1)[inside] <= stride).all()


def test_warp_has_a_gradient():
    maps = torch.rand(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: data.warp(m, views(2, 16).double(), 2), maps)


def test_random_crop_covers_the_area():
    """Areas 0.6 and 1.3 of a 64 px image: sides 64 * sqrt(area), at a corner between 0 and 64 - side."""
    view = data.random_crop_view(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.5, 0.5]]), 64, (0.6, 1.3))
    low = 64 * math.sqrt(0.6)
    half = 32 * math.sqrt(1.3)
    corners = torch.tensor([[[0.0, 64 - low], [low, 64.0]], [[32 - half] * 2, [32 + half] * 2]])
    expected = torch.tensor([[0.0, 0.0], [64.0, 64.0]]).expand(2, 2, 2)
    assert torch.allclose(data.map_keypoints(corners, view), expected, atol=1e-3)


def test_target_heatmaps_agree_with_published(golden):
    """One difference, on purpose: int() of the published code takes x = -3.1 px, outside of the image, to
    cell 0; ours rounds down and leaves it out."""
    heatmaps, weight = data.render_heatmaps(golden["target_keypoints"], golden["target_visible"], 64, 4, 2.0)
    same = weight == golden["target_weight"]
    assert (~same).nonzero().tolist() == [[1, 1]] and -3.2 < golden["target_keypoints"][1, 1, 0] < -3.1
    assert torch.allclose(heatmaps[same], golden["target_heatmaps"][same], atol=1e-6)


def test_heatmap_by_hand():
    """(9, 6) px at stride 2: cell (5, 3) by int(x / 2 + 0.5), exp(-1/2) one sigma away, 0 beyond three."""
    heatmaps, weight = data.render_heatmaps(torch.tensor([[[9.0, 6.0]]]), torch.ones(1, 1), 16, 2, 1.0)
    assert weight.item() == 1 and heatmaps[0, 0, 3, 5] == 1
    assert heatmaps[0, 0, 3, 6].item() == pytest.approx(math.exp(-0.5)) and heatmaps[0, 0, 3, 9] == 0
    fine, _ = data.render_heatmaps(torch.tensor([[[9.0, 6.0]]]), torch.ones(1, 1), 16, 2, 1.0, subcell=True)
    assert fine[0, 0, 3, 4].item() == pytest.approx(math.exp(-0.125)) == fine[0, 0, 3, 5].item()


def test_unlabelled_and_outside_have_no_weight():
    keypoints = torch.tensor([[[10.0, 10.0], [10.0, 10.0], [-3.0, 10.0], [10.0, 64.0]]])
    heatmaps, weight = data.render_heatmaps(keypoints, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 32, 2, 1.0)
    assert weight.tolist() == [[1, 0, 0, 0]] and heatmaps[0, 1:].abs().sum() == 0


def test_outside_the_picture_views_are_black():
    """A view that looks outside sees black, as in a letterbox; jitter leaves it so. Normalised by hand."""
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    seen = data.warp(data.unit_range(images), torch.tensor([[[1.0, 0, 4], [0, 1, 0]]]))
    seen = data.colour_jitter(seen, torch.tensor([[1.0, 0.5, 1, 0, 0, 0]]), 0.25)
    assert seen[..., :4].max() < 1e-5 and (seen[..., 4:] > 200 / 255).all()
    black = data.normalise(seen)[0, :, 0, 0].tolist()
    assert black == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_colour_jitter_agrees_with_pillow(order):
    """Each change, in an image's own order, is that of Pillow's enhancer; factors of 1 change nothing."""
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(image)
    for change in order:
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
        picture = enhancer(picture).enhance((1.5, 1.4, 0.6)[change])
    u = torch.tensor([[1.0, 0.9, 0.1, *(order.index(change) / 4 for change in range(3))]])
    seen = data.colour_jitter(data.unit_range(torch.from_numpy(image).permute(2, 0, 1)[None]), u, 0.5)
    assert np.abs(255 * seen[0].permute(1, 2, 0).numpy() - picture).max() < 4       # Pillow rounds in between
    assert torch.allclose(data.colour_jitter(seen, torch.full((1, 6), 0.5), 0.5), seen, atol=1e-5)


def test_every_pass_of_batches_visits_all_once():
    """Batches of 4 over 10 samples: 25 are 10 passes, which differ. A span is a part of the same passes."""
    drawn = np.concatenate([data.shuffled_batch(10, 4, step, seed=3) for step in range(25)])
    passes = drawn.reshape(10, 10)
    assert (np.sort(passes, 1) == np.arange(10)).all() and not (passes[0] == passes[1]).all()
    assert (data.shuffled_batch(10, 4, 7, seed=3) == drawn[28:32]).all()
    for start, count in ((0, 100), (28, 4), (9, 1), (10, 10), (37, 55)):
        assert (data.shuffled_span(10, start, count, seed=3) == drawn[start:start + count]).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_the_errors(workers):
    assert list(data.prefetch((lambda i=i: i * i for i in range(20)), workers)) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch((lambda i=i: 1 // (5 - i) for i in range(9)), workers))


GOOD = dict(names=("a", "b", "c"), limbs=[(0, 1)], triplets=[(0, 1, 2)], groups={"all": [0]}, root=(0,))


@pytest.mark.parametrize("field, value", [
    ("names", ()), ("names", (1, 2)), ("limbs", ((0, 9),)), ("limbs", ((0, 1.0),)), ("limbs", (3, 4)),
    ("triplets", ((0, 1),)), ("triplets", ((0, 1, -1),)), ("groups", {"some": (0,)}),
    ("groups", {"all": ()}), ("root", ()), ("root", "a"), ("stand_ins", {1: ()}), ("stand_ins", {3: (0,)}),
    ("stand_ins", {1: (3,)}), ("stand_ins", {"b": (0,)}), ("stand_ins", {1.5: (0,)})])
def test_a_skeleton_that_does_not_fit_is_refused(field, value):
    data.Skeleton(**GOOD)
    with pytest.raises(ValueError, match=field):
        data.Skeleton(**{**GOOD, field: value})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_skeleton_is_the_same_however_it_is_given(kind):
    """By lists, tuples, NumPy or PyTorch integers, a range, or as read from a file that it was written to."""
    given = dict(names=["a", "b", "c", "d"], limbs=kind([[0, 1], [1, 2]]), triplets=kind([[0, 1, 2]]),
                 groups={"all": range(4), "ends": kind([0, 3])}, root=kind([0, 1]),
                 stand_ins={np.int64(2): kind([0, 3])})
    skeleton = data.Skeleton(**given)
    assert skeleton == data.Skeleton(("a", "b", "c", "d"), ((0, 1), (1, 2)), ((0, 1, 2),),
                                     {"all": (0, 1, 2, 3), "ends": (0, 3)}, (0, 1), {2: (0, 3)})
    assert data.Skeleton(**json.loads(json.dumps(dataclasses.asdict(skeleton)))) == skeleton


def test_stand_ins():
    """In place of a missing pelvis the hips, of the thorax the shoulders, of all others the root."""
    rows = BODY16.stand_in_rows
    assert rows[7] == (12, 13) and set(rows[:7] + rows[8:]) == {(2, 3)} and len(rows) == 16
    assert HAND21.stand_in_rows == ((0, 9),) * 21


class Own:
    """A dataset as a user writes it: five samples of 16 keypoints in images of 64 pixels."""
    skeleton = BODY16
    size = 64
    dtype = torch.uint8

    def __init__(self, **changes):
        self.keypoints = 63 * torch.rand(5, 16, 2, generator=torch.Generator().manual_seed(0))
        self.visible = torch.ones(5, 16)
        self.visible[:, 6:8] = 0
        vars(self).update(changes)

    def __len__(self):
        return len(self.keypoints)

    def names(self, indices):
        return [f"{int(i)}.jpg" for i in indices]

    def __getitem__(self, indices):
        images = torch.zeros(len(indices), 3, self.size, self.size, dtype=self.dtype)
        return images, self.keypoints[indices], self.visible[indices]


PLACES = Own().keypoints
CROPPED = PLACES + torch.tensor([30.0, 0])                          # nearly half of them are outside
MOSTLY_OUTSIDE = torch.where(torch.arange(80).view(5, 16, 1) % 15 > 0, PLACES - 500, PLACES)


@pytest.mark.parametrize("changes, message", [
    ({"visible": torch.tensor([0.0, 1, 1, 2]).repeat(5, 4)}, "`visible` other than 0 and 1.*COCO"),
    ({"visible": torch.full((5, 16), math.nan)}, "`visible` other than 0 and 1"),
    ({"keypoints": PLACES * 440 / 64}, "outside the image.*in pixels of the 64 x 64 image"),
    ({"keypoints": MOSTLY_OUTSIDE}, "outside the image.*in pixels of the 64 x 64 image"),
    ({"keypoints": PLACES / 63}, "within a pixel of the corner.*in pixels of the 64 x 64 image"),
    ({"keypoints": PLACES / 32 - 1}, "within a pixel of the corner"),
    ({"keypoints": torch.zeros(5, 16, 2)}, "within a pixel of the corner.*visible 0 where"),
    ({"keypoints": PLACES.double()}, "needs `keypoints`, a float32 tensor"),
    ({"keypoints": PLACES * math.nan}, "not finite"), ({"keypoints": PLACES * 1e30}, "beyond a million"),
    ({"visible": torch.ones(5, 15)}, "needs `visible`"),
    ({"skeleton": None}, "needs a `skeleton`"), ({"size": 64.0}, "`size`"),
    ({"dtype": torch.float32}, "must give uint8 images"), ({"names": lambda indices: []}, "needs names")])
def test_a_dataset_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(data.DataError, match=f"--source own: Own .*{message}"):
        data.check_dataset(Own(**changes), "--source own")


@pytest.mark.parametrize("spoil", [
    lambda indices, images, keypoints, visible: (images, keypoints / 64, visible),
    lambda indices, images, keypoints, visible: (images, keypoints.double(), visible),
    lambda indices, *batch: [part[indices.argsort()] for part in batch]])
def test_a_dataset_gives_the_labels_that_it_has(spoil, monkeypatch):
    """Of the samples that were asked for, in their order."""
    give = Own.__getitem__
    monkeypatch.setattr(Own, "__getitem__", lambda self, indices: spoil(indices, *give(self, indices)))
    with pytest.raises(data.DataError, match="other labels with images"):
        data.check_dataset(Own(), "")


@pytest.mark.parametrize("changes", [
    {}, {"keypoints": CROPPED}, {"visible": torch.zeros(5, 16)},
    {"keypoints": torch.zeros(5, 16, 2), "visible": torch.zeros(5, 16)},
    {"visible": torch.ones(1, 1).expand(5, 16)}])
def test_cropped_people_and_missing_labels_are_welcome(changes):
    data.check_dataset(Own(**changes), "")


def test_only_a_runs_own_leftovers_are_deleted(tmp_path):
    names = {"last.pt.17.tmp", "curves.png.17.tmp", "notes.tmp", "notes.17.tmp", "last.pt"}
    for name in names:
        (tmp_path / name).touch()
    data.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", "notes.17.tmp", "last.pt"}


def test_letterbox_by_hand():
    """40 x 20 pixels in a square of 20: half the size, five black rows above and below."""
    size, place, view = data.letterbox_view((0, 0, 40, 20), 20)
    assert size == (20, 10) and place == (0, 5)
    assert view @ [0.5, 0.5, 1] == pytest.approx([0, 5]) and view @ [38.5, 18.5, 1] == pytest.approx([19, 14])
    square = data.letterbox(Image.new("RGB", (40, 20), (255, 0, 0)), (0, 0, 40, 20), 20)
    assert square.shape == (3, 20, 20) and (square[0, 5:15] == 255).all() and square[:, :5].sum() == 0
