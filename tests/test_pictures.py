"""Figures and `predict`: pictures show what they say, keypoints are found where the photograph has them."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import actupose
import data
import train
from data import BODY16, HAND21

RED, BLUE, YELLOW, NAN, CPU = (240, 78, 88), (38, 132, 230), (250, 178, 40), math.nan, torch.device("cpu")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
PLACES = np.array([(30.0, 20.0), (170.0, 25.0), (100.0, 60.0), (40.0, 110.0), (165.0, 105.0), (100.0, 20.0)])


def near(picture, colour, tolerance=12):
    """Where a picture, or the picture in a file, has (about) this colour: bool (H, W)."""
    picture = np.asarray(Image.open(picture) if not isinstance(picture, np.ndarray) else picture).astype(int)
    return (np.abs(picture - colour) <= tolerance).all(-1)


# --- Figures ------------------------------------------------------------------------------------------------


def draw(keypoints, visible, confidence=None, skeleton=BODY16):
    image = Image.new("RGB", (120, 120), (128, 128, 128))
    train.draw_skeleton(ImageDraw.Draw(image, "RGBA"), keypoints, visible, skeleton, 4, confidence)
    return np.asarray(image).astype(int)


def test_a_skeleton_by_its_pixels():
    """Colours by side and finger at the keypoints; what is not labelled is left out; low confidence fades;
    hips are joined through the pelvis, or directly where it is not labelled."""
    k, confidence = torch.arange(21), torch.ones(16)
    body = torch.stack([20 + 28 * (k % 4), 12 + 20 * (k // 4)], 1)[:16]
    confidence[0], confidence[5] = 0.1, NAN
    plain, faded = draw(body, torch.ones(16)), draw(body, torch.ones(16), confidence)
    for joint, colour in ((0, RED), (11, RED), (5, BLUE), (14, BLUE), (6, YELLOW), (9, YELLOW)):
        x, y = body[joint].tolist()
        assert tuple(plain[y, x]) == colour, BODY16.names[joint]
        assert (np.abs(faded[y, x] - colour).sum() > 60) == (joint in (0, 5)), BODY16.names[joint]
    hand = torch.stack([8 + 5 * k, 9 + 5 * (8 * k % 21)], 1)
    fingers = draw(hand, torch.ones(21), skeleton=HAND21)
    assert len({tuple(fingers[y, x]) for x, y in hand[[4, 8, 12, 16, 20]].tolist()}) == 5
    body = torch.full((16, 2), NAN)
    body[[0, 1, 2, 3, 6]] = torch.tensor([[20.0, 110], [100, 110], [20, 60], [100, 60], [60, 20]])
    for pelvis in (1.0, 0.0):
        visible = torch.zeros(16)
        visible[[0, 1, 2, 3, 6]] = torch.tensor([1, 1, 1, 1, pelvis])
        picture = draw(body, visible)
        assert near(picture, RED)[110, 30:90].all() and near(picture, YELLOW)[20, 60] == pelvis
        assert near(picture, YELLOW)[60, 60] == 1 - pelvis                          # halfway from hip to hip


def test_charts_by_their_pixels(tmp_path):
    """Bars as high as the values, in the order of the series; NaN leaves a hole; a rising line rises."""
    path, bars = tmp_path / "c.png", []
    train.draw_chart(path, {"one": [80.0, 40, NAN], "two": [NAN, 60, 20]}, "PCK", "bar")
    for colour in (BLUE, RED):
        height = near(path, colour, 2)[30:].sum(0)                                  # below the legend
        parts = np.split(height, np.flatnonzero(np.diff(height > 0)) + 1)
        bars.append([part.max() for part in parts if part.any()])
    assert np.array(bars) / bars[0][0] == pytest.approx(np.array([[1, 0.5], [0.75, 0.25]]), abs=0.02)
    assert near(path, BLUE, 2)[30:].any(0).argmax() < near(path, RED, 2)[30:].any(0).argmax()
    train.draw_chart(path, {"": range(9)}, "drawn", "line")
    assert np.corrcoef(*np.nonzero(near(path, BLUE)))[0, 1] < -0.99
    seeds = [[50.0, 58], [40, 40], [44, 48]]                                        # means 54, 40, 46
    train.draw_chart(path, {"": seeds}, "PCK", "line", "pace", ["1", "2", "1000"])
    line, per_unit = near(path, BLUE, 2), 260 / 20                                  # the axis is 39 ... 59
    for x, at in zip((0.6 / 3.2, 1.6 / 3.2, 2.6 / 3.2), seeds):                     # dots and their mean
        column = 300 - np.flatnonzero(line[:, round(55 + x * 835) - 2:][:, :5].any(1))
        for value in (*at, sum(at) / len(at)):
            assert np.abs(column - (value - 39) * per_unit).min() < 3, (at, value)
    many = {f"method {i}": range(25) for i in range(13)}
    for series, kind in (({"a": [NAN, NAN]}, "bar"), ({"a": [0.0]}, "line"), (many, "bar")):
        train.draw_chart(path, series, "", kind)                                   # nothing to draw, or much


def test_all_figures_of_a_run_where_nothing_is_labelled(tmp_path, monkeypatch):
    """Captions and bars do without scores. A bin of more varied poses has a higher box. Fig. 1: one pose is
    known, the source's 7. Fig. 6: what Eq. 4 has moved farthest, up and down."""
    s = train.make_settings(image_size=32, bins=3, hard_bins=1, epochs=1, pretrain_epochs=0)
    source, target = (data.Mannequin(domain, "train", 32, 30) for domain in ("source", "target"))
    source.visible[:], target.visible[:] = 1, 0
    noise = torch.randn(30, 16, 2, generator=torch.Generator().manual_seed(0))
    source.keypoints = source.keypoints[:1] + noise * (0.5 + torch.arange(30) // 10 * 2)[:, None, None]
    trainer, curriculum = train.Trainer(s, BODY16, CPU), actupose.ActiveCurriculum(np.arange(30), 1, 3)
    domains = SimpleNamespace(source=source, target=target, test=target)
    run = SimpleNamespace(settings=s, domains=domains, trainer=trainer, curriculum=curriculum, log=[],
                          labelled=source, vae=actupose.PoseVAE(16), drawn=[[10, 0, 3]])
    scores, predictions = train.evaluate(run, target)
    assert scores["student"]["bins"] == [None] * 3 and scores["student"]["pck"]["all"] is None
    train.draw_figures(run, scores, predictions, tmp_path)
    pictures = {path.stem for path in tmp_path.iterdir()}
    assert pictures == {"predictions", "similar", "pairs", "curriculum", "reranked", "bins", "complexity"}
    assert np.corrcoef(*np.nonzero(near(tmp_path / "complexity.png", BLUE)[:, 850:]))[0, 1] < -0.5
    target.keypoints[0], target.visible[0], panels = source.keypoints[7], 1, {}
    curriculum.score[[3, 29]] = 40, -1
    monkeypatch.setattr(train, "draw_panels", lambda path, rows, *_: panels.update({path.stem: rows}))
    train.draw_figures(run, scores, predictions, tmp_path)
    shown = panels["similar"][3], panels["reranked"][0], panels["reranked"][-1]
    assert [caption for caption, *_ in shown] == ["Eq. 7: 0.000 rad", "bin 0 to 2", "bin 2 to 0"]
    images = source[torch.tensor([7, 3, 29])][0]
    assert all(torch.equal(panel[1], image) for panel, image in zip(shown, images))


def test_a_box_plot_by_its_pixels():
    """Whiskers' ends, quartiles and mean at their heights (Fig. 3)."""
    image, draw = train.blank(400, 700)
    train.chart(draw, (100, 100, 300, 600), {"": ([0], [[10, 30, 40, 60, 100, 80]])}, "", "", "box")
    picture, x = np.asarray(image), 100 + round(0.6 / 1.6 * 200)
    blue = near(picture, BLUE, 2)
    place = {value: round(600 - value / 105 * 500) for value in (10, 30, 40, 60, 80, 100)}
    reach = {value: blue[place[value] - 3:place[value] + 4, x + 15].any() for value in place}
    assert reach == {10: True, 30: True, 40: True, 60: True, 80: False, 100: True}
    assert near(picture, RED, 2)[place[80], x] and blue[place[100]:place[60] - 20, x].sum() > 50
    assert not blue[:place[100] - 4].any() and not blue[place[10] + 4:595, x].any()


def test_pairs_by_equation_7(tmp_path, monkeypatch):
    """Fig. 7: nearest first, no image twice, none with 3 triplets left, those not below Gamma marked."""
    trainer = train.Trainer(train.make_settings(image_size=32, gamma=0.1, mask_ratio=0.0), BODY16, CPU)
    source, target = (data.Mannequin(domain, "train", 32, n) for domain, n in (("source", 4), ("target", 3)))
    source.visible[:], source.visible[3, 5:], rows = 1, 0, []
    turn = torch.tensor([0, 0, 1, 0, 1.0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0])         # the joints that move
    poses = [source.keypoints[:1] + 9 * k * turn[:, None] for k in range(3)]
    found = iter([torch.cat([*poses, poses[0]]), torch.cat([poses[2], poses[0], poses[0]])])
    monkeypatch.setattr(train, "decode", lambda *_: (next(found), torch.arange(48.0).view(3, 16)))
    monkeypatch.setattr(train, "draw_panels", lambda path, panels, *_: rows.extend(panels))
    train.draw_pairs(tmp_path, trainer, source, target)
    distance = actupose.kernels.triplet_angle_distance(poses[1], poses[0], trainer.triplets)[0, 0]
    assert distance > 0.1                                       # what is left for the third pair
    pictures = [*source[torch.arange(3)][0][[0, 2, 1]], *target[torch.arange(3)][0][[1, 0, 2]]]
    assert all(torch.equal(panel[1], image) for panel, image in zip(rows[::2] + rows[1::2], pictures))
    assert [caption for caption, _, _ in rows] == ["Eq. 7: 0.000 rad", ""] * 2 + [
        f"Eq. 7: {distance:.3f} rad", "not below 0.1"]


# --- predict ------------------------------------------------------------------------------------------------


def dots(size, places=PLACES, radius=6):
    """A black picture with a dot at each place (x, y), of its keypoint's colour. Pixel i lies at i."""
    scale = 4 if max(size) < 1000 else 1
    columns, rows = ((np.arange(scale * n) + 0.5) / scale - 0.5 for n in size)
    image = np.zeros((len(rows), len(columns), 3), dtype=np.uint8)
    for (x, y), colour in zip(places, COLOURS):
        image[(columns - x) ** 2 + (rows[:, None] - y) ** 2 <= radius ** 2] = colour
    return Image.fromarray(image).reduce(scale)


def find_colours(network, crops, settings, device):
    """In place of a network: keypoint k is the centre of what has colour k in the crop."""
    far = (crops[:, None] / 255 - torch.tensor(COLOURS)[..., None, None] / 255).abs().amax(2)
    weight, line = (far < 0.4).double(), torch.arange(crops.shape[-1], dtype=torch.float64)
    xy = torch.stack([(weight.sum(2) * line).sum(-1), (weight.sum(3) * line).sum(-1)], -1)
    xy = xy / weight.sum((2, 3)).clamp(min=1e-9)[..., None]
    return torch.cat([xy, torch.zeros(1, 10, 2)], 1).float(), torch.full((1, 16), 0.75)


def predict(run, *arguments):
    return train.main(["predict", str(run), *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory as an unfinished run leaves it."""
    out, settings = tmp_path_factory.mktemp("runs") / "body", train.make_settings(image_size=128)
    student = train.Trainer(settings, BODY16, CPU).student.state_dict()
    train.write_config(out, settings, BODY16, CPU)
    train.save_checkpoint(out / "last.pt", dict(student=student, teacher=None, log=[{}]))
    return out


@pytest.fixture
def find(run, tmp_path, monkeypatch):
    """A photograph through `predict` with `find_colours` -> keypoints (K, 2) and the JSON."""
    def find(image, *options, name="p.png", **save):
        image.save(tmp_path / name, **save)
        assert predict(run, tmp_path / name, "--out", tmp_path / "out", *options) == 0
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        with Image.open(tmp_path / "out" / f"{name}.jpg") as picture:
            assert picture.size == (result["width"], result["height"])
        assert [k["name"] for k in result["keypoints"]] == list(BODY16.names)
        return np.array([[k["x"], k["y"]] for k in result["keypoints"]]), result

    monkeypatch.setattr(train, "decode", find_colours)
    return find


@pytest.mark.parametrize("size, factor", [
    ((200, 130), 1), ((130, 200), 1), ((200, 200), 1), ((3000, 1950), 15), ((100, 65), 0.5)])
def test_keypoints_are_in_the_photographs_pixels(size, factor, find):
    """Landscape, portrait, square, far larger and smaller than the crop: to a part of the crop's pixel."""
    places = ((PLACES if size != (130, 200) else PLACES[:, ::-1]) + 0.5) * factor - 0.5
    found, result = find(dots(size, places, 6 * factor))
    assert (result["width"], result["height"]) == size and result["box"] is None
    assert np.abs(found[:6] - places).max() < 0.3 * max(size) / 128


@pytest.mark.parametrize("box", ["100,60,80,70", "0,0,40,130", "150.5,80.25,90,90", "-20,-20,100,70"])
def test_a_box_is_looked_at_closely(box, find):
    x, y, w, h = map(float, box.split(","))
    centre = max(x, 0) + 0.4 * min(w, 200 - max(x, 0)), max(y, 0) + 0.6 * min(h, 130 - max(y, 0))
    found, result = find(dots((200, 130), [centre], 3), f"--box={box}")
    assert np.abs(found[0] - centre).max() < 0.5 and result["box"] == [x, y, w, h]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, find):
    """The stored pixels turned as a camera does; keypoints, width and height are the upright photograph's."""
    T, exif, upright = Image.Transpose, Image.Exif(), dots((200, 130))
    turns = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE,
             T.ROTATE_270)
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(turns[orientation - 2])
    found, result = find(stored, name="p.jpg", exif=exif, quality=95)
    assert (result["width"], result["height"]) == (200, 130) and np.abs(found[:6] - PLACES).max() < 0.6


def test_formats_and_colour_modes(find, tmp_path):
    """The colours arrive from palette, alpha, CMYK; greys, 16 bits, transparency do not crash. The skeleton
    is drawn on the photograph, as wide as that is large."""
    for name, mode, save in (("p.WebP", "RGB", dict(lossless=True)), ("p.jpeg", "CMYK", dict(quality=95)),
                             ("p.png", "P", {}), ("p.png", "RGBA", {})):
        found, _ = find(dots((200, 130)).convert(mode, palette=Image.Palette.ADAPTIVE), name=name, **save)
        assert np.abs(found[:6] - PLACES).max() < 0.6, mode
    for mode, save in (("L", {}), ("LA", {}), ("1", {}), ("I;16", {}), ("P", dict(transparency=1))):
        find(Image.new(mode, (40, 30), 1), **save)
    find(dots((1000, 800), [(200, 700), (800, 700), *[(5, 5)] * 4], 30))            # r-ankle, r-knee
    red = near(tmp_path / "out" / "p.png.jpg", RED, 60)
    assert red[697:704, 300:700].all() and abs(red[600:, 500].sum() - 10) <= 3 and not red[300:, :100].any()


def test_unreadable_files_are_named_and_the_rest_is_done(run, tmp_path, capsys):
    """Exit status 1. So for a box outside of a picture."""
    folder, out = tmp_path / "in", ("--out", tmp_path / "out")
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "good.png"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:None if name == "good.png" else 900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "link.png").symlink_to("nowhere")
    assert predict(run, folder, *out) == 1
    said, bad = capsys.readouterr(), ["cut.jpg", "cut.png", "empty.jpg", "link.png"]
    lines = said.err.splitlines()
    assert len(lines) == 4 and all("/in/" + name in line for name, line in zip(bad, lines))
    assert "1 of 5" in said.out and len(list((tmp_path / "out").iterdir())) == 2
    assert predict(run, folder / "good.png", *out, "--box", "100,100,50,50") == 1
    error = capsys.readouterr().err
    assert "good.png" in error and "--box 100,100,50,50" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments, text", [
    ("no/run a", "no/run"), ("body no.png", "no.png"), ("body none", "none"), ("body a b", "same name"),
    ("body a --out a", "--out"), ("body a/1.png --out ./b/../a", "--out"), ("body a --box 1,2,3", "--box"),
    ("body a --box 1,2,0,3", "--box"), ("body a --boxx 1,1,1,1", "did you mean --box?"), ("body", "image")])
def test_mistakes_of_predict(arguments, text, run, tmp_path, capsys, monkeypatch):
    """Pictures of one name, results that could overwrite pictures: one line, status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "none"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(f"{name}/1.png")
    (tmp_path / "none" / "1.png").unlink()
    (tmp_path / "body").symlink_to(run)
    before, arguments = sorted(tmp_path.rglob("*")), arguments.split()
    assert predict(*arguments, *([] if "--out" in arguments else ["--out", "out"])) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
