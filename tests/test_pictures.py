"""Figures and `predict`: pictures show what they say, keypoints are found where the photograph has them."""
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import actupose
import data
import kernels
import train
from data import BODY16, HAND21
from tiny_runs import check_one_line

RED = (240, 78, 88)
BLUE = (38, 132, 230)
YELLOW = (250, 178, 40)
CPU = torch.device("cpu")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
PLACES = np.array([(30.0, 20.0), (170.0, 25.0), (100.0, 60.0), (40.0, 110.0), (165.0, 105.0), (100.0, 20.0)])


def near(picture, colour, tolerance=12):
    """Where a picture has (about) this colour: bool (H, W)."""
    return (np.abs(np.asarray(picture).astype(int) - colour) <= tolerance).all(-1)


# --- Figures ------------------------------------------------------------------------------------------------


def draw(keypoints, visible, confidence=None, skeleton=BODY16):
    image = Image.new("RGB", (120, 120), (128, 128, 128))
    train.draw_skeleton(ImageDraw.Draw(image, "RGBA"), keypoints, visible, skeleton, 4, confidence)
    return np.asarray(image).astype(int)


def test_the_colours_of_a_skeleton():
    """By side of the body and by finger; low confidence fades."""
    k = torch.arange(21)
    body = torch.stack([20 + 28 * (k % 4), 12 + 20 * (k // 4)], 1)[:16]
    confidence = torch.ones(16)
    confidence[0] = 0.1
    confidence[5] = math.nan
    plain = draw(body, torch.ones(16))
    faded = draw(body, torch.ones(16), confidence)
    for joint, colour in ((0, RED), (11, RED), (5, BLUE), (14, BLUE), (6, YELLOW), (9, YELLOW)):
        x, y = body[joint].tolist()
        assert tuple(plain[y, x]) == colour, BODY16.names[joint]
        assert (np.abs(faded[y, x] - colour).sum() > 60) == (joint in (0, 5)), BODY16.names[joint]
    hand = torch.stack([8 + 5 * k, 9 + 5 * (8 * k % 21)], 1)
    fingers = draw(hand, torch.ones(21), skeleton=HAND21)
    assert len({tuple(fingers[y, x]) for x, y in hand[[4, 8, 12, 16, 20]].tolist()}) == 5


@pytest.mark.parametrize("pelvis", [1, 0])
def test_unlabelled_joints_are_left_out(pelvis):
    """Hips are joined through the pelvis, or directly where it is not labelled. Nothing is drawn at NaN."""
    body = torch.full((16, 2), math.nan)
    body[[0, 1, 2, 3, 6]] = torch.tensor([[20.0, 110], [100, 110], [20, 60], [100, 60], [60, 20]])
    visible = torch.zeros(16)
    visible[[0, 1, 2, 3, 6]] = torch.tensor([1, 1, 1, 1, pelvis]).float()
    picture = draw(body, visible)
    assert near(picture, RED)[110, 30:90].all()                                     # the right shank
    assert near(picture, YELLOW)[20, 60] == pelvis
    assert near(picture, YELLOW)[60, 60] == 1 - pelvis                              # halfway from hip to hip


@pytest.fixture
def drawn(monkeypatch):
    """The Panels of each picture, by its name, in place of the pictures."""
    panels = {}
    monkeypatch.setattr(train, "draw_panels", lambda path, rows, *_: panels.update({path.stem: rows}))
    return panels


def make_run(**changes):
    """A run of 30 samples that is not trained: its labelled source, its unlabelled target, three bins."""
    s = train.make_settings(image_size=32, bins=3, hard_bins=1, epochs=1, pretrain_epochs=0, **changes)
    source, target = (data.Mannequin(domain, "train", 32, 30) for domain in ("source", "target"))
    source.visible[:] = 1
    target.visible[:] = 0
    trainer = train.Trainer(s, BODY16, CPU)
    trainer.begin_adaptation()
    curriculum = actupose.ActiveCurriculum(np.arange(30), 1, 3)
    curriculum.sample(0)
    domains = SimpleNamespace(source=source, target=target, val=target, test=target)
    log = [{"epoch": 0, "lr": 0.1, "pool": 9, "loss": 1.0, "val_student": None, "val_teacher": None}]
    return SimpleNamespace(settings=s, domains=domains, trainer=trainer, curriculum=curriculum, log=log,
                           labelled=source, vae=actupose.PoseVAE(16), complexity=np.arange(30.0))


def test_all_figures_of_a_run_where_nothing_is_labelled(tmp_path, capsys, monkeypatch):
    """Captions, bars and curves do without scores."""
    monkeypatch.setattr(train, "draw_panels", functools.partial(train.draw_panels, side=40))  # saves seconds
    run = make_run()
    scores, predictions = train.evaluate(run, run.domains.test)
    assert scores["student"]["bins"] == [None] * 3 and scores["student"]["pck"]["all"] is None
    train.draw_figures(run, scores, predictions, tmp_path)
    assert not capsys.readouterr().err
    assert {path.stem for path in tmp_path.iterdir()} == {
        "curves", "predictions", "similar", "pairs", "curriculum", "reranked", "bins", "complexity"}


def test_what_the_figures_show(tmp_path, drawn):
    """Fig. 1: the source pose that equals the target's. Fig. 6: what Eq. 4 has moved farthest, up and down.
    Fig. 8: the first test images, with PCK of all labelled keypoints, one of the 16 missed here."""
    run = make_run()
    source = run.domains.source
    test = run.domains.test
    test.keypoints[0] = source.keypoints[7]
    test.visible[0] = 1
    run.curriculum.score[[3, 29]] = 40, -1
    scores, (keypoints, confidence) = train.evaluate(run, test)
    keypoints[0] = test.keypoints[0]
    keypoints[0, 6] += 10                                       # the pelvis, which the tables do not score
    train.draw_figures(run, scores, (keypoints, confidence), tmp_path)
    for panel, caption, image in ((drawn["similar"][0][3], "Eq. 7: 0.000 rad", 7),
                                  (drawn["reranked"][0][0], "bin 0 to 2", 3),
                                  (drawn["reranked"][1][-1], "bin 2 to 0", 29)):
        assert panel.caption == caption and torch.equal(panel.image, source[[image]][0][0])
    alone, truth, prediction = drawn["predictions"][0][:3]
    assert alone.keypoints is None and torch.equal(truth.keypoints, test.keypoints[0])
    assert torch.equal(prediction.keypoints, keypoints[0]) and torch.equal(prediction.image, test[[0]][0][0])
    assert prediction.caption.startswith("PCK 94 ")             # 15 of 16
    assert drawn["predictions"][0][5].caption == "PCK -  EvalPose -"


def test_pairs_by_equation_7(tmp_path, drawn, monkeypatch):
    """Fig. 7: nearest first, no image twice, none with 3 triplets left, those not below Gamma marked. The
    source's poses are the student's, the target's the teacher's."""
    run = make_run(gamma=0.1, mask_ratio=0.0)
    source = run.domains.source
    source.visible[3:, 5:] = 0
    turn = torch.tensor([0, 0, 1, 0, 1.0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0])         # the joints that move
    poses = torch.stack([source.keypoints[0] + 9 * k * turn[:, None] for k in range(3)])
    found = {"student": poses[[0, 1, 2] + [0] * 27], "teacher": poses[[2] + [0] * 29]}
    asked = []

    def decode(network, images, *_):
        asked.append(network)
        who = "student" if network is run.trainer.student else "teacher"
        return found[who], torch.arange(480.0).view(30, 16)

    monkeypatch.setattr(train, "decode", decode)
    train.draw_pairs(tmp_path / "pairs.png", run)
    distance = kernels.triplet_angle_distance(poses[1:2], poses[:1], run.trainer.triplets)[0, 0]
    assert len(asked) == 2 and distance > 0.1                   # what is left for the third pair
    panels = [panel for row in drawn["pairs"] for panel in row]
    pairs = ((0, 1, "Eq. 7: 0.000 rad", ""), (2, 0, "Eq. 7: 0.000 rad", ""),
             (1, 2, f"Eq. 7: {distance:.3f} rad", "not below 0.1"))
    assert len(panels) == 6
    for ours, theirs, (m, n, caption, remark) in zip(panels[::2], panels[1::2], pairs):
        assert (ours.caption, theirs.caption) == (caption, remark)
        assert torch.equal(ours.image, source[[m]][0][0])
        assert torch.equal(theirs.image, run.domains.target[[n]][0][0])


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
    weight = (far < 0.4).double()
    line = torch.arange(crops.shape[-1], dtype=torch.float64)
    xy = torch.stack([(weight.sum(2) * line).sum(-1), (weight.sum(3) * line).sum(-1)], -1)
    xy = xy / weight.sum((2, 3)).clamp(min=1e-9)[..., None]
    return torch.cat([xy, torch.zeros(1, 10, 2)], 1).float(), torch.full((1, 16), 0.75)


def predict(run, *arguments):
    return train.main(["predict", str(run), *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory as an unfinished run leaves it."""
    out = tmp_path_factory.mktemp("runs") / "body"
    out.mkdir()
    settings = train.make_settings(image_size=128)
    student = train.Trainer(settings, BODY16, CPU).student.state_dict()
    train.write_config(out, settings, BODY16, CPU)
    train.save_checkpoint(out / "last.pt", dict(student=student, teacher=None, style=None, log=[{}]))
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
    places = PLACES[:, ::-1] if size == (130, 200) else PLACES
    places = (places + 0.5) * factor - 0.5
    found, result = find(dots(size, places, 6 * factor))
    assert (result["width"], result["height"]) == size and result["box"] is None
    assert np.abs(found[:6] - places).max() < 0.3 * max(size) / 128


@pytest.mark.parametrize("box", ["100,60,80,70", "0,0,40,130", "150.5,80.25,90,90", "-20,-20,100,70"])
def test_a_box_is_looked_at_closely(box, find):
    x, y, w, h = map(float, box.split(","))
    centre = max(x, 0) + 0.4 * min(w, 200 - max(x, 0)), max(y, 0) + 0.6 * min(h, 130 - max(y, 0))
    found, result = find(dots((200, 130), [centre], 3), f"--box={box}")
    assert np.abs(found[0] - centre).max() < 0.5 and result["box"] == [x, y, w, h]


def test_predict_opens_pictures_as_the_loaders_do(find, monkeypatch):
    """By data.open_picture, which turns and converts them: what it gives is looked at and drawn on."""
    upright = dots((200, 130))
    monkeypatch.setattr(data, "open_picture", lambda path: upright.copy())
    found, result = find(Image.new("L", (30, 40)))
    assert (result["width"], result["height"]) == (200, 130) and np.abs(found[:6] - PLACES).max() < 0.6


def test_unreadable_files_are_named_and_the_rest_is_done(run, tmp_path, capsys):
    """Exit status 1. So for a box outside of a picture."""
    folder = tmp_path / "in"
    out = ("--out", tmp_path / "out")
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "good.png"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:None if name == "good.png" else 900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "link.png").symlink_to("nowhere")
    assert predict(run, folder, *out) == 1
    said = capsys.readouterr()
    bad = ["cut.jpg", "cut.png", "empty.jpg", "link.png"]
    lines = said.err.splitlines()
    assert len(lines) == 4 and all("/in/" + name in line for name, line in zip(bad, lines))
    assert "1 of 5" in said.out and len(list((tmp_path / "out").iterdir())) == 2
    assert predict(run, folder / "good.png", *out, "--box", "100,100,50,50") == 1
    check_one_line(capsys.readouterr().err, "good.png", "--box 100,100,50,50")


def test_the_home_directory_in_predicts_paths(run, tmp_path, monkeypatch):
    """~ is expanded in each, wherever a shell has left it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    assert predict("~/run", "~/x.png", "--out=~/out") == 0
    assert (tmp_path / "out" / "x.png.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("arguments, text", [
    ("no/run a", "no/run"), ("body no.png", "no.png"), ("body none", "none"), ("body a b", "same name"),
    ("body a --out a", "--out"), ("body a/1.png --out ./b/../a", "--out"), ("body a --box 1,2,3", "--box"),
    ("body a --box 0,0,inf,9", "--box"), ("body a --box 1,2,0,3", "--box"),
    ("body a --boxx 1,1,1,1", "did you mean --box?"), ("body", "image")])
def test_mistakes_of_predict(arguments, text, run, tmp_path, capsys, monkeypatch):
    """Pictures of one name, results that could overwrite pictures: one line, status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "none"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(f"{name}/1.png")
    (tmp_path / "none" / "1.png").unlink()
    (tmp_path / "body").symlink_to(run)
    before = sorted(tmp_path.rglob("*"))
    words = arguments.split()
    if "--out" not in words:
        words += ["--out", "out"]
    assert predict(*words) == 2
    check_one_line(capsys.readouterr().err, text)
    assert sorted(tmp_path.rglob("*")) == before
