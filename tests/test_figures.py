"""The pictures: every one is written from small inputs, survives gaps, and shows what it says it shows."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data import BODY16, HAND21
from train import (draw_bins, draw_complexity, draw_curriculum, draw_curves, draw_predictions, draw_samples,
                   draw_skeleton, draw_style)

RED, BLUE, GREEN, AMBER = (240, 78, 88), (38, 132, 230), (32, 164, 118), (250, 178, 40)
NAN = float("nan")


def pixels(path, most=(1800, 1500), least=(100, 100)):
    """The picture's pixels (H, W, 3) as int, after a check of its format and size."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert least[0] <= image.width <= most[0] and least[1] <= image.height <= most[1]
        return np.asarray(image).astype(int)


def near(picture, colour, tolerance=12):
    """Where the picture has (about) this colour: bool (H, W)."""
    return (np.abs(picture - colour) <= tolerance).all(-1)


def samples(n, size=64, joints=16):
    """Grey images and one joint per place of a coarse grid, at least ten pixels apart."""
    images = torch.full((n, 3, size, size), 128, dtype=torch.uint8)
    joint = torch.arange(joints)
    grid = torch.stack([10 + 14 * (joint % 4), 6 + 10 * (joint // 4)], -1).float()
    return images, grid.expand(n, joints, 2).clone(), torch.ones(n, joints)


def skeleton_image(keypoints, visible, colour=None, confidence=None, skeleton=BODY16):
    image = Image.new("RGB", (120, 120), (128, 128, 128))
    draw_skeleton(ImageDraw.Draw(image, "RGBA"), keypoints, visible, skeleton, colour, 4, confidence)
    return np.asarray(image).astype(int)


def test_joints_have_the_colour_of_their_side():
    keypoints = 2 * samples(1)[1][0]
    picture = skeleton_image(keypoints, torch.ones(16))
    for joint, colour in ((0, RED), (11, RED), (5, BLUE), (14, BLUE), (6, AMBER), (9, AMBER)):
        x, y = keypoints[joint].int().tolist()
        assert tuple(picture[y, x]) == colour, BODY16.names[joint]
    one = skeleton_image(keypoints, torch.ones(16), colour=GREEN)
    assert near(one, GREEN).any() and not near(one, RED).any() and not near(one, BLUE).any()


def test_fingers_of_a_hand_have_colours_of_their_own():
    keypoints = torch.stack([8 + 5.0 * torch.arange(21), 10 + 4.5 * (torch.arange(21) * 8 % 21)], -1)
    picture = skeleton_image(keypoints, torch.ones(21), skeleton=HAND21)
    tips = [tuple(picture[int(y), int(x)]) for x, y in keypoints[[4, 8, 12, 16, 20]].tolist()]
    assert len(set(tips)) == 5


def test_unlabelled_and_nan_keypoints_and_their_limbs_are_left_out():
    keypoints = torch.full((16, 2), NAN)
    keypoints[0], keypoints[1] = torch.tensor([20.0, 20.0]), torch.tensor([100.0, 20.0])   # r-ankle, r-knee
    keypoints[5] = torch.tensor([60.0, 90.0])
    visible = torch.zeros(16)
    visible[[0, 1, 6]] = 1                            # pelvis: visible, but NaN
    picture = skeleton_image(keypoints, visible)
    assert near(picture, RED)[20, 30:90].all()        # the limb from ankle to knee
    assert (picture[40:] == 128).all()                # the left ankle is unlabelled


def test_low_confidence_fades():
    keypoints = 2 * samples(1)[1][0]
    confidence = torch.ones(16)
    confidence[0] = 0.1
    confidence[5] = NAN                               # counts as none at all
    picture = skeleton_image(keypoints, torch.ones(16), confidence=confidence)
    plain = skeleton_image(keypoints, torch.ones(16))
    at = [keypoints[joint].int().tolist() for joint in (0, 5, 11)]
    assert [bool((picture[y, x] == plain[y, x]).all()) for x, y in at] == [False, False, True]
    distance = [np.abs(p[at[0][1], at[0][0]] - RED).sum() for p in (picture, plain)]
    assert distance[0] > 60 and distance[1] == 0


def test_hips_are_joined_through_the_pelvis_or_directly_where_it_is_unlabelled():
    keypoints = torch.full((16, 2), NAN)
    keypoints[[2, 3, 6]] = torch.tensor([[20.0, 60.0], [100.0, 60.0], [60.0, 20.0]])
    middle = []
    for pelvis in (1, 0):
        visible = torch.zeros(16)
        visible[[2, 3, 6]] = torch.tensor([1.0, 1.0, pelvis])
        middle.append(near(skeleton_image(keypoints, visible), AMBER)[60, 60])
    assert middle == [False, True]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_predictions_are_written_for_any_number(tmp_path, n):
    images, true, visible = samples(n)
    path = tmp_path / "deep" / "er" / "predictions.png"        # the directory is made
    titles = [f"sample {i}" for i in range(n)]
    draw_predictions(path, images, true, visible, true + 2, torch.rand(n, 16), BODY16, titles)
    pixels(path)
    assert path.stat().st_size < 1.5e6


def test_predicted_joint_is_coloured_where_the_keypoint_is(tmp_path):
    """The third panel shows the prediction, not the truth; panels are 192 pixels wide and 4 apart."""
    images, true, visible = samples(1)
    predicted = true.clone()
    predicted[0, 0] = torch.tensor([52.0, 55.0])                # r-ankle, where the truth has nothing
    predicted[0, 5] = torch.tensor([8.0, 55.0])                 # l-ankle
    draw_predictions(tmp_path / "p.png", images, true, visible, predicted, torch.ones(1, 16), BODY16)
    picture = pixels(tmp_path / "p.png")
    grey = near(picture, (128, 128, 128), 2)
    top, left = np.argwhere(grey).min(0)
    for x, y, colour in ((52, 55, RED), (8, 55, BLUE)):
        row, column = top + round((y + 0.5) * 3), left + round((x + 0.5) * 3)        # 64 pixels are 192
        assert grey[row, column] and grey[row, column + 196]    # image and ground truth: nothing there
        assert near(picture, colour)[row - 1:row + 1, column + 391:column + 393].all()


def test_prediction_caption_shows_pck_at_005(tmp_path):
    """The bar under a sample is as long as its PCK@0.05, 60 pixels at 100 %; up to 3.2 of 64 pixels count."""
    lengths = []
    for shift, share in ((3.1, 16), (3.3, 16), (9.0, 4)):
        images, true, visible = samples(1)
        predicted = true.clone()
        predicted[0, :share, 0] += shift
        draw_predictions(tmp_path / "p.png", images, true, visible, predicted, torch.ones(1, 16), BODY16)
        lengths.append(near(pixels(tmp_path / "p.png"), GREEN)[-36:].any(0).sum())
    assert lengths[0] == pytest.approx(60, abs=1) and lengths[1] == 0
    assert lengths[2] == pytest.approx(60 * 8 / 12, abs=1)  # four of the twelve scored are off


def test_predictions_survive_gaps_and_refuse_nothing_at_all(tmp_path):
    images, true, visible = samples(2)
    true[0, 3], visible[0, 3] = NAN, 0
    visible[1] = 0
    draw_predictions(tmp_path / "p.png", images, true, visible, true, torch.full((2, 16), NAN), BODY16)
    pixels(tmp_path / "p.png")
    with pytest.raises(ValueError, match="images"):
        draw_predictions(tmp_path / "q.png", images[:0], true[:0], visible[:0], true[:0], visible[:0], BODY16)


def test_samples_show_a_row_for_each_title(tmp_path):
    images, keypoints, visible = samples(3)
    rows = [("source", images, keypoints, visible), ("target", images[:2], keypoints[:2], visible[:2] * 0)]
    draw_samples(tmp_path / "samples.png", rows, BODY16)
    picture = pixels(tmp_path / "samples.png")
    half = len(picture) // 2
    assert near(picture[:half], RED).sum() > 100 and not near(picture[half:], RED).any()
    draw_samples(tmp_path / "many.png", [("many", *samples(30))], BODY16)
    pixels(tmp_path / "many.png", least=(100, 60))


def test_style_table_keeps_the_images_colours_and_columns(tmp_path):
    """Columns from left to right; a title may carry an arrow that the font lacks."""
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for i, colour in enumerate((RED, BLUE, GREEN, AMBER)):
        images[i] = torch.tensor(colour).view(3, 1, 1)
    draw_style(tmp_path / "style.png", [("source", images[:2]), ("source → target", images[2:])])
    picture = pixels(tmp_path / "style.png")
    centres = [np.argwhere(near(picture, colour, 1)).mean(0) for colour in (RED, BLUE, GREEN, AMBER)]
    assert centres[0][1] == centres[1][1] < centres[2][1] == centres[3][1]
    assert centres[0][0] == centres[2][0] < centres[1][0] == centres[3][0]


def test_curriculum_heat_map_follows_the_counts(tmp_path):
    """A count of zero is white, the largest is dark; epochs run upwards, bins to the right (Fig. 5)."""
    counts = np.zeros((6, 5))
    counts[0, 0] = counts[5, 4] = 100
    draw_curriculum(tmp_path / "c.png", [("window", counts)])
    picture = pixels(tmp_path / "c.png")
    dark = np.argwhere(near(picture, (14, 42, 92), 4))
    dark = dark[dark[:, 0] > 380]                               # below the curves
    low, high = dark[dark[:, 1] < 300], dark[dark[:, 1] > 400]
    assert len(low) > 1000 and len(high) > 1000 and low[:, 0].mean() > high[:, 0].mean()
    for shape in ((1, 1), (1, 7), (3, 2), (70, 25)):
        draw_curriculum(tmp_path / "c.png", [("a", np.ones(shape)), ("b", torch.zeros(shape)),
                                             ("c", np.full(shape, NAN))])
        pixels(tmp_path / "c.png")


def test_curves_skip_what_is_missing(tmp_path):
    log = [{"epoch": e, "lr": 1e-3, "mse": 10 / (e + 1), "val_student": None, "seconds": 3} for e in range(8)]
    log[2]["mse"] = NAN
    draw_curves(tmp_path / "a.png", log)
    two = pixels(tmp_path / "a.png")                            # mse, lr
    for line in log[4:]:
        line |= {"consistency": 3.0, "val_student": 40.0, "val_teacher": 41.0, "confidence": 0.5, "kept": 0.4}
    draw_curves(tmp_path / "b.png", log, adapt_from=4)
    assert pixels(tmp_path / "b.png").size > two.size
    draw_curves(tmp_path / "c.png", log[:1])                    # a run of one epoch
    draw_curves(tmp_path / "d.png", [{"epoch": 0}])             # nothing measured: an empty sheet
    assert (pixels(tmp_path / "d.png") == 255).all()
    with pytest.raises(ValueError, match="log"):
        draw_curves(tmp_path / "e.png", [])


def test_falling_loss_is_drawn_falling(tmp_path):
    draw_curves(tmp_path / "c.png", [{"epoch": e, "mse": 10.0 - e} for e in range(10)])
    rows, columns = np.nonzero(near(pixels(tmp_path / "c.png"), BLUE))
    assert np.corrcoef(rows, columns)[0, 1] > 0.99


def test_bar_heights_are_the_scores(tmp_path):
    """Bars are in proportion to the scores, in the order of the series; a missing score leaves a hole."""
    draw_bins(tmp_path / "bins.png", {"UDAPE": [80.0, 40.0, None], "ACTUPose": [NAN, 60.0, 20.0]}, "PCK")
    picture = pixels(tmp_path / "bins.png")[40:]                # below the legend
    bars = []
    for colour in (BLUE, RED):
        height = near(picture, colour, 2).sum(0)
        parts = np.split(height, np.flatnonzero(np.diff(height > 0)) + 1)
        bars.append([part.max() for part in parts if part.any()])
    assert len(bars[0]) == 2 and len(bars[1]) == 2
    assert np.array(bars) / bars[0][0] == pytest.approx(np.array([[1, 0.5], [0.75, 0.25]]), abs=0.02)
    draw_bins(tmp_path / "many.png", {f"method {i}": torch.rand(25) for i in range(12)}, "PCK")
    draw_bins(tmp_path / "none.png", {"nothing": [None, NAN]}, "PCK")
    pixels(tmp_path / "many.png")
    pixels(tmp_path / "none.png")


def test_complexity_scales_poses_to_their_cells(tmp_path):
    """Poses in any unit and place look the same; the chart's line rises with the mean."""
    poses, visible = samples(2)[1:]
    spread = {"mean": [5.0, 10.0, 20.0], "low": [2.0, 5.0, 9.0], "high": [9.0, 20.0, 40.0]}
    pictures = []
    for unit, place in ((1.0, 0.0), (1e-3, 0.0), (1e3, 1e5)):
        rows = [(0, poses * unit + place, visible), (2, poses[:1] * unit + place, visible[:1])]
        draw_complexity(tmp_path / "c.png", rows, spread, BODY16)
        pictures.append(pixels(tmp_path / "c.png"))
    assert all(np.abs(pictures[0] - other).mean() < 0.05 for other in pictures[1:])
    rows, columns = np.nonzero(near(pictures[0], BLUE))
    chart = columns > pictures[0].shape[1] - 600
    assert np.corrcoef(rows[chart], columns[chart])[0, 1] < -0.9
    visible[1] = 0
    poses[1] = NAN
    spread = {"mean": [NAN, 10.0, NAN], "low": [NAN, None, 1.0], "high": [NAN, 20.0, 2.0]}
    draw_complexity(tmp_path / "gaps.png", [(1, poses, visible)], spread, BODY16)
    pixels(tmp_path / "gaps.png")
