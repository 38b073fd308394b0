"""Runs and the command line: methods end to end, what an epoch trains on, the step (Fig. 4), mistakes."""
import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import actupose
import data
import kernels
import train
from miniatures import make_h3d, make_human36m, make_rhd, make_surreal, make_tree
from tiny_runs import SCRIPT, TINY, check_one_line, child_environment, read, record

CPU = torch.device("cpu")


# --- Whole runs ---------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """What a method's run leaves behind."""
    pretraining: str            # terms in the log, beside epoch, lr and pool
    adaptation: str
    validated: str              # scores in the last row
    pools: tuple                # smallest and largest pool of the three epochs
    trained_on: str             # domains whose training images were looked at
    pictures: str


SUPERVISED = "mse confidence loss"
TAUGHT = "mse confidence loss consistency teacher_confidence kept hidden"
ALL_TERMS = TAUGHT + " evalpose cross_domain pairs"
REGDA = "kl agreement disagreement target_agreement confidence loss"
BOTH = "val_student val_teacher"
ALWAYS = "curves predictions complexity bins"
EXPECTED = {
    "source-only": Expected(SUPERVISED, SUPERVISED, "val_student", (60, 60), "source", ALWAYS + " similar"),
    "regda": Expected(SUPERVISED, REGDA, "val_student", (60, 60), "source target", ALWAYS + " similar"),
    "udape": Expected(SUPERVISED, TAUGHT, BOTH, (60, 60), "source target", ALWAYS + " similar"),
    "udape+vae-hm": Expected(SUPERVISED, TAUGHT, BOTH, (24, 24), "source target", ALWAYS + " similar"),
    # Eq. 3, the peak at an end of five bins of 12, s_j = j / 4: 12 (1 + e^-1/2 + e^-2 + e^-9/2 + e^-8) = 21.0
    "actupose": Expected(SUPERVISED, ALL_TERMS, BOTH, (19, 24), "source target",
                         ALWAYS + " similar curriculum reranked"),
    "oracle": Expected(SUPERVISED, SUPERVISED, "val_student", (30, 30), "target", ALWAYS),
}


class Finished(NamedTuple):
    """A finished run."""
    out: Path
    looked_at: set              # each (domain, split) of which it looked at images
    output: str
    errors: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory, launch):
    """A finished run of a method, made once."""
    @functools.cache
    def get(method):
        out = tmp_path_factory.mktemp("runs") / method
        looks = []
        output = io.StringIO()
        errors = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            record(patch, looks, data.Mannequin, "__getitem__")
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                assert launch(out, "--method", method, figures=True) == 0
        looked_at = {(dataset.domain, dataset.split) for _, (dataset, _), _ in looks}
        return Finished(out, looked_at, output.getvalue(), errors.getvalue())
    return get


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_end_to_end(method, finished):
    """One loop with parts on or off: terms, samples, images looked at, scores and files."""
    expected = EXPECTED[method]
    out = finished(method).out
    images = {("target", "val"), ("target", "test")}
    for domain in expected.trained_on.split():
        images.add((domain, "train"))
    assert finished(method).looked_at == images

    log = read(out / "log.jsonl")
    phases = [expected.pretraining, expected.adaptation, f"{expected.adaptation} {expected.validated}"]
    assert [set(row) - {"epoch", "lr", "pool"} for row in log] == [set(phase.split()) for phase in phases]
    assert [row["epoch"] for row in log] == [0, 1, 2]
    # Of six steps the second, fourth and sixth: 0.006 (0.02 + 0.49 (1 + cos 30, 90, 150 degrees)).
    assert [row["lr"] for row in log] == pytest.approx([0.00560611, 0.00306, 0.00051389], abs=1e-8)
    smallest, largest = expected.pools
    assert all(smallest <= row["pool"] <= largest for row in log)

    result = read(out / "result.json")
    assert list(result) == "method source target seed pck evalpose bins teacher val epochs".split()
    assert (result["method"], result["source"], result["target"]) == (method, "mannequin", "mannequin-wild")
    assert (result["seed"], result["epochs"], result["val"]) == (0, 3, log[2]["val_student"])
    assert (result["teacher"] is not None) == (expected.validated == BOTH)
    for scores in filter(None, (result, result["teacher"])):
        assert list(scores["pck"]) == ["shoulder", "elbow", "wrist", "hip", "knee", "ankle", "all"]
        assert all(0 <= value <= 100 for value in (*scores["pck"].values(), *scores["bins"]))
        assert len(scores["bins"]) == 5 and -100 <= scores["evalpose"] <= 100

    pictures = {path.stem for path in (out / "figures").iterdir()}
    assert pictures - {"pairs"} == set(expected.pictures.split())
    assert method == "actupose" or "pairs" not in pictures      # an untrained network may find no pair
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "speed.jsonl", "last.pt", "previous.pt", "result.json", "figures"}


def test_nothing_depends_on_the_clock_or_on_workers(finished, launch, tmp_path, monkeypatch):
    """Same seed, a clock that leaps and threads that decode ahead: the same bytes."""
    monkeypatch.setattr(train, "time", Mock(time=Mock(side_effect=range(0, 10 ** 9, 1000))))
    assert launch(tmp_path, "--workers", 2) == 0
    speed = read(tmp_path / "speed.jsonl")
    assert set(speed[0]) >= {"epoch", "seconds", "images_per_second", "memory_gb"}
    assert len(speed) == 3 and speed[0]["seconds"] == 1000
    for name in ("log.jsonl", "result.json", "last.pt"):
        assert (tmp_path / name).read_bytes() == (finished("actupose").out / name).read_bytes(), name


class Toy(data.Mannequin):
    """A dataset with a skeleton of 30 keypoints."""

    def __init__(self, root, split, size):
        super().__init__("target", split, size, 20)
        names = [f"p{k}" for k in range(30)]
        limbs = [[k, k + 1] for k in range(29)]
        triplets = [[k, k + 1, k + 2] for k in range(28)]
        self.skeleton = data.Skeleton(names, limbs, triplets, {"all": [*range(30)]}, [0, 29])
        random = torch.Generator().manual_seed(len(root))
        self.keypoints = torch.rand(20, 30, 2, generator=random) * (size - 1)
        self.visible = torch.ones(20, 30)


def test_a_skeleton_of_thirty_keypoints(launch, tmp_path, monkeypatch):
    """Nothing is sized for 16 or 21 keypoints, down to a photograph."""
    monkeypatch.setitem(train.SOURCES, "rhd", Toy)
    monkeypatch.setitem(train.TARGETS, "h3d", Toy)
    options = "--source rhd --target h3d --source-root a --target-root bc --style off".split()
    assert launch(tmp_path / "run", *options, figures=True) == 0
    assert "pairs" in read(tmp_path / "run" / "log.jsonl")[1]
    Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
    words = [str(tmp_path / name) for name in ("run", "x.png")]
    assert train.main(["predict", *words, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    found = read(tmp_path / "out" / "x.png.json")["keypoints"]
    assert [keypoint["name"] for keypoint in found] == [f"p{k}" for k in range(30)]


@pytest.mark.parametrize("changes, message", [
    (dict(size=64), "--image-size: the images of --source rhd have 64 pixels, got 32"),
    (dict(visible=torch.zeros(20, 30)), "--source rhd: no keypoint is labelled"),
    (dict(keypoints=torch.zeros(19, 30, 2)), "--source rhd: Unfit needs `keypoints`")])
def test_a_source_that_cannot_be_trained_on(changes, message, launch, tmp_path, monkeypatch, capsys):
    class Unfit(Toy):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            vars(self).update(changes)

    monkeypatch.setitem(train.SOURCES, "rhd", Unfit)
    monkeypatch.setitem(train.TARGETS, "h3d", Toy)
    options = "--source rhd --target h3d --source-root a --target-root bc --style off".split()
    assert launch(tmp_path / "run", *options) == 2
    check_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


MAKERS = {
    "surreal": make_surreal,
    "h3d": lambda root: make_h3d(root, 40),
    "rhd": lambda root: make_rhd(root, "training", [*range(7)] * 2),
    "lsp": lambda root: make_tree(root, False, [(90 + 5 * i, 80) for i in range(6)]),
    "human36m": lambda root: make_human36m(root, {1: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 11: 1}),
}


@pytest.mark.parametrize("source, target", [("surreal", "lsp"), ("surreal", "human36m"), ("rhd", "h3d")])
def test_the_papers_tasks_from_their_command(source, target, launch, tmp_path, monkeypatch, capsys):
    """--preset paper, made small, trains on miniature trees in the exact layouts."""
    choices = data.random.Random.choices
    monkeypatch.setattr(data.random.Random, "choices", lambda self, order, k: choices(self, order, k=20))
    options = ["--preset", "paper"]
    options += "--architecture narrow --weights= --style small --bins 3 --hard-bins 1 --workers 1".split()
    for role, name in (("source", source), ("target", target)):
        (tmp_path / name).mkdir()
        MAKERS[name](tmp_path / name)
        options += [f"--{role}={name}", f"--{role}-root={tmp_path / name}"]
    assert launch(tmp_path / "run", *options) == 0
    check_one_line(capsys.readouterr().err, "--lr-drops: 44,59 lie beyond --epochs 3")
    assert launch(tmp_path / "run", *options, "--resume") == 0
    result = read(tmp_path / "run" / "result.json")
    config = read(tmp_path / "run" / "config.json")
    skeleton = data.HAND21 if source == "rhd" else data.BODY16
    assert (result["source"], result["target"]) == (source, target)
    assert set(result["pck"]) == set(skeleton.groups)
    assert config["rotation"] == (180 if source == "rhd" else 60)
    assert not config["subcell"] and config["ema"] == 0.999


# --- What an epoch trains on --------------------------------------------------------------------------------


class Backwards(actupose.ActiveCurriculum):
    """A reader's own: from the hardest bin to the simplest."""

    def peak_bin(self, epoch):
        return self.num_bins - 1 - super().peak_bin(epoch)


def check_epochs(calls, epochs):
    """An epoch's steps get what `samples` gave, in its order; confidences are observed, then ranked."""
    poses = data.Mannequin("source", "train", 32, 60).keypoints
    assert [name for name, _, _ in calls] == ["samples", "step", "step", "observe", "rerank"] * len(epochs)
    for i, epoch in enumerate(epochs):
        drawn, one, two, observed, _ = calls[5 * i:5 * i + 5]
        curriculum, *asked = drawn[1]
        samples, pool = drawn[2]
        assert asked == [epoch, 8] and len(samples) == 8 <= pool
        trained = torch.cat([step[1][2][1] for step in (one, two)])
        assert torch.equal(trained, poses[samples])
        confidence = torch.cat([step[2][1] for step in (one, two)])
        assert observed[1][0] is curriculum and np.array_equal(observed[1][1], samples)
        assert torch.equal(torch.as_tensor(observed[1][2]), confidence)


@pytest.mark.parametrize("name, kind, method", [
    ("active", actupose.ActiveCurriculum, "actupose"), ("static", actupose.StaticCurriculum, "actupose"),
    ("hardest", actupose.FixedCurriculum, "udape+vae-hm"), ("backwards", Backwards, "actupose")])
def test_an_epoch_trains_on_what_its_curriculum_gives(name, kind, method, launch, tmp_path, monkeypatch):
    """So does a run that is interrupted and resumed. A new curriculum needs no more than its row."""
    monkeypatch.setitem(actupose.CURRICULA, "backwards", Backwards.of)
    options = ["--method", method, "--curriculum", name, "--style", "off"]
    if method != "actupose":
        options = ["--method", method]
    calls = []
    record(monkeypatch, calls, kind, "samples", "observe", "rerank")
    record(monkeypatch, calls, train.Trainer, "step")
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_speed", Mock(side_effect=KeyboardInterrupt))        # at the epoch's end
        assert launch(tmp_path, *options) == 130
    check_epochs(calls, [0])
    calls.clear()
    assert launch(tmp_path, *options, "--resume", figures=True) == 0
    check_epochs(calls, [1, 2])
    if name == "hardest":
        assert not (tmp_path / "figures" / "curriculum.png").exists()
        return
    drawn = train.load_run(tmp_path / "last.pt")["curriculum"]["drawn"]
    peaks = {"active": (0, 4, 4), "static": (4, 4, 4), "backwards": (4, 0, 0)}[name]
    assert [drawn[epoch][peak] for epoch, peak in enumerate(peaks)] == [12] * 3         # all of the peak bin
    assert [row["pool"] for row in read(tmp_path / "log.jsonl")] == [sum(drawn[epoch]) for epoch in range(3)]
    assert (tmp_path / "figures" / "curriculum.png").exists()


class OnlySamples:
    """Half of a curriculum."""

    def samples(self, epoch, count):
        return np.arange(count), 60

    def observe(self, indices, confidence):
        pass


class Unreadable(actupose.FixedCurriculum):
    """Saves an array of NumPy's, which checkpoints cannot give back."""

    def state_dict(self):
        return {"score": np.ones(3)}


class Few(actupose.FixedCurriculum):
    """Gives its pool, whatever is asked for: too many samples."""

    def samples(self, epoch, count):
        return self.pool, len(self.pool)


@pytest.mark.parametrize("kind, pool, error, text", [
    (OnlySamples, None, TypeError, "OnlySamples: has no drawn"),
    (Unreadable, 8, TypeError, "Unreadable.state_dict: gives more than tensors and plain values"),
    (Few, 9, ValueError, "Few.samples: gave 9 samples, not 8")])
def test_half_a_curriculum_fails_aloud(kind, pool, error, text, launch, tmp_path, monkeypatch):
    """A run fails before its first step, and does not train on something else."""
    def make(settings, complexity, count):
        return kind(np.arange(pool), 0) if pool else kind()

    monkeypatch.setitem(actupose.CURRICULA, "own", make)
    monkeypatch.setattr(train.Trainer, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(error, match=text):
        launch(tmp_path / "r", "--curriculum", "own", "--style", "off")


def test_full_rescoring_looks_at_all_samples_as_they_are(launch, tmp_path, monkeypatch):
    """Eq. 4 "full": at an epoch's end the confidence on every source sample, in evaluation mode, in the image
    as it is; the mean of the heatmaps' maxima over its labelled keypoints."""
    calls = []
    record(monkeypatch, calls, actupose.ActiveCurriculum, "observe")
    options = "--epochs 1 --pretrain-epochs 0 --style off --rescoring full --amp off".split()
    assert launch(tmp_path, *options) == 0
    [(_, (_, indices, confidence), _)] = calls
    assert np.array_equal(indices, np.arange(60))
    source = data.Mannequin("source", "train", 32, 60)
    images, _, visible = source[torch.arange(60)]
    network = actupose.PoseResNet("narrow", 16)
    network.load_state_dict(train.load_run(tmp_path / "last.pt")["student"])
    with torch.no_grad():
        maps, _ = network.eval()(data.normalise(images / 255))
    expected = (maps.amax((2, 3)) * visible).sum(1) / visible.sum(1)
    assert torch.allclose(torch.as_tensor(confidence), expected, atol=1e-5)
    curriculum = train.load_run(tmp_path / "last.pt")["curriculum"]
    clipped = expected.clamp(0.05, 1.0)
    assert torch.allclose(curriculum["relative"], clipped / clipped.mean(), rtol=1e-3)


# --- The step -----------------------------------------------------------------------------------------------


def make_trainer(teacher=True, **changes):
    """A trainer of tiny images, its teacher as at the beginning of adaptation."""
    settings = train.make_settings(**{**dict(image_size=32, batch_size=4, style="off", amp="off"), **changes})
    trainer = train.make_trainer(settings, data.BODY16, CPU)
    if teacher:
        trainer.begin_adaptation()
    return trainer


def batches(size=32, n=4):
    """A source batch (images, keypoints, visible), and target images."""
    source, target = (data.Mannequin(domain, "train", size, n) for domain in ("source", "target"))
    return source[torch.arange(n)], target[torch.arange(n)][0]


def test_the_supervised_step():
    """Before the teacher joins, Eq. 8 is w_udape times the heatmap error."""
    trainer = make_trainer(teacher=False, w_udape=0.5)
    assert trainer.teacher is None and not trainer.uses_target
    terms, confidence = trainer.step(0, batches()[0], None)
    assert set(terms) == {"mse", "confidence", "loss"} and terms["loss"] == 0.5 * terms["mse"] > 0
    assert confidence.shape == (4,) and torch.isclose(confidence.mean(), terms["confidence"])


def test_the_step_with_a_teacher():
    """Eq. 8 with all its terms; the teacher is the moving average of the student and gets no gradient."""
    trainer = make_trainer(w_udape=0.5, w_evalpose=0.3, w_cross=0.2, gamma=9.0)     # gamma: all are similar
    before = [parameter.clone() for parameter in trainer.teacher.parameters()]
    terms, _ = trainer.step(1, *batches())
    extra = 0.3 * terms["evalpose"] + 0.2 * terms["cross_domain"]
    assert torch.isclose(terms["loss"], 0.5 * (terms["mse"] + terms["consistency"]) + extra)
    assert terms["evalpose"] != 0 and terms["cross_domain"] < 0 < terms["pairs"] <= 16
    assert 0 < terms["kept"] <= 0.5
    for old, new, student in zip(before, trainer.teacher.parameters(), trainer.student.parameters()):
        assert torch.allclose(new, 0.99 * old + 0.01 * student, atol=1e-7) and not torch.equal(old, student)
        assert not new.requires_grad


def test_the_step_with_nothing_sure():
    """All pseudo-labels left out: they teach nothing, and no pair is similar."""
    terms, _ = make_trainer(mask_ratio=1.0, gamma=9.0).step(0, *batches())
    assert terms["kept"] == terms["consistency"] == terms["pairs"] == 0 < terms["mse"]


def test_the_step_without_the_papers_terms(monkeypatch):
    """Weights of 0 leave Eq. 5 and 6 out, and the poses that they alone need are not computed."""
    monkeypatch.setattr(kernels, "soft_argmax", lambda *_: pytest.fail("computed for nothing"))
    monkeypatch.setattr(kernels, "triplet_angle_distance", lambda *_: pytest.fail("computed for nothing"))
    terms, _ = make_trainer(w_evalpose=0.0, w_cross=0.0).step(0, *batches())
    assert set(terms) == set(TAUGHT.split())
    assert torch.isclose(terms["loss"], terms["mse"] + terms["consistency"])


def test_scales_of_the_terms():
    """Heatmap errors are sums over 16 maps of 16 x 16 cells, or means; Eq. 6 with features centred."""
    all_pairs = dict(gamma=9.0, mask_ratio=0.0)
    plain, _ = make_trainer(**all_pairs).step(0, *batches())
    other, _ = make_trainer(**all_pairs, map_sums=False, centred=True).step(0, *batches())
    for name in ("mse", "consistency"):
        assert torch.isclose(plain[name], 16 ** 3 * other[name])
    assert plain["pairs"] == other["pairs"] > 0
    assert plain["cross_domain"] < other["cross_domain"] - 0.5 * plain["pairs"]     # without the common part


@pytest.mark.parametrize("probability, threshold, share", [(1.0, 0.0, 1), (0.0, 0.0, 0), (1.0, 1e9, 0)])
def test_how_many_images_hide_a_keypoint(probability, threshold, share):
    """Each image with a confident keypoint in view hides one, or no image does."""
    trainer = make_trainer(occlusion=probability, occlusion_confidence=threshold, batch_size=32)
    trainer.teacher.head.bias.data.fill_(0.3)                                       # all are confident
    assert trainer.step(2, *batches(n=32))[0]["hidden"] == share


@pytest.mark.parametrize("iteration", [0, 100])
def test_regdas_three_steps(iteration, monkeypatch):
    """Which parts move in A (source, all), B (target, f') and C (target, psi), by gradients of which losses.
    At the first iteration of adaptation the layer is shut: psi gets no gradient from f'."""
    trainer = make_trainer(method="regda", pretrain_epochs=2, iters_per_epoch=3)
    network = trainer.student
    update = trainer.optimiser.step
    moves = []
    gradients = []
    calls = []

    def step():
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        update()
        moves.append({name.split(".")[0] for name, parameter in network.named_parameters()
                      if not torch.equal(parameter, before[name])})
        gradients.append([parameter.grad for parameter in network.backbone.parameters()])

    trainer.optimiser.step = step
    record(monkeypatch, calls, actupose, "heatmap_kl", "ground_maps", "gradient_factor")
    terms, confidence = trainer.step(6 + iteration, *batches())
    psi = {"backbone", "upsampling"}
    assert calls[0][:2] == ("gradient_factor", (iteration, 68 * 3))            # after 2 of 70 epochs
    assert moves == [psi | {"head", "head_adv"}, {"head_adv"}, psi] and gradients[1][0] is None
    assert any(gradient.abs().max() > 0 for gradient in gradients[2]) == (iteration > 0)

    grounds = [result for name, _, result in calls if name == "ground_maps"]
    losses = [(arguments, result) for name, arguments, result in calls if name == "heatmap_kl"]
    for (arguments, _), (truth, false), wanted in zip(losses[1:], grounds, ("truth", "false", "truth")):
        assert arguments[1] is (truth if wanted == "truth" else false)
    assert [arguments[3:] for arguments, _ in losses] == [(), (1e-7,), (1e-7,), (1e-7,)]
    assert all((arguments[2] == 1).all() for arguments, _ in losses[2:])       # no visibility of the target
    kl, agreement, disagreement, on_target = [result for _, result in losses]
    assert torch.isclose(terms["loss"], kl + 4 * agreement + disagreement + on_target)
    assert confidence.shape == (4,)
    network.head[-1].bias.data += 5                 # of the logits; the peak of their softmax stays
    assert train.decode(network, batches()[1], trainer.settings, CPU)[1].max() <= 1


def test_style_is_that_of_the_other_domains_sample(monkeypatch):
    """A look is that of the other domain's sample, augmented and not yet restyled itself. There is one alpha
    per batch. Each direction has its own probability."""
    trainer = make_trainer(style_prob=1.0)
    random = train.draw_step(trainer.settings, 4, 16, CPU)
    calls = []
    restyled = []

    def brighter(*arguments):
        restyled.append(arguments)
        return arguments[0] + 1

    trainer.style_transfer = brighter
    record(monkeypatch, calls, trainer, "forward")
    trainer.step(4, *batches())
    fed = [images for _, (_, images), _ in calls]
    (source, look, alpha), (target, other_look, beta) = restyled
    assert torch.equal(look, target) and torch.equal(other_look, source) and not torch.equal(source, target)
    assert (alpha, beta) == (random.alpha_source, random.alpha_target) and 0 <= alpha != beta < 1
    assert torch.equal(fed[0], source + 1) and torch.equal(fed[1], target + 1)      # student, teacher
    trainer.settings.style_prob = (random.restyle_source + random.restyle_target) / 2
    trainer.step(4, *batches())
    assert len(restyled) == 3
    assert torch.equal(restyled[2][0], source) == (random.restyle_source < random.restyle_target)


def test_random_numbers_are_a_function_of_seed_and_step(monkeypatch):
    """They do not depend on global generators. Each of several processes takes its slice of them."""
    def draw(seed=3, step=5):
        settings = train.make_settings(seed=seed, batch_size=6)
        drawn = vars(train.draw_step(settings, step, 30, CPU))
        return {name: torch.as_tensor(value) for name, value in drawn.items()}

    whole = draw()
    others = draw(step=6), draw(seed=4)
    torch.manual_seed(1)
    np.random.seed(1)
    again = draw()
    shares = []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(train, "rank", lambda: number)
        shares.append(draw())
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert not any(torch.equal(value, other[name]) for other in others), name
        one, two = (share[name] for share in shares)
        if value.ndim:
            assert torch.equal(torch.cat([one, two]), value), name
        else:
            assert one == two == value, name                                        # one number per batch


def test_poses_are_compared_as_they_stand_in_the_image(monkeypatch):
    """Eq. 7: with a network that is always right, the source pose compared is the image's, not the view's."""
    trainer = make_trainer(image_size=64, batch_size=8, gamma=9.0)
    source, target = batches(64, 8)
    drawn = []
    compared = []
    record(monkeypatch, drawn, train, "render_heatmaps")
    record(monkeypatch, compared, kernels, "triplet_angle_distance")

    def right(network, images):
        maps, _ = drawn[0][2]
        return maps + 0 * network.head.weight.sum(), torch.ones(8, 4)

    trainer.forward = right
    terms, _ = trainer.step(3, source, target)
    _, weight = drawn[0][2]
    pose = compared[0][1][0]
    error = (pose - source[1]).norm(dim=-1)[weight > 0]
    assert len(error) > 80 and error.quantile(0.9) < 1.0                    # pixels; a cell is 2
    assert terms["mse"] == 0 and terms["cross_domain"] == -terms["pairs"] < 0       # the features are equal


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_nan_stops_the_run_and_names_the_batch(broken, launch, tmp_path, capsys, monkeypatch):
    """The run ends where it happens, here in the second step of epoch 1, and keeps the last good state."""
    mse = actupose.heatmap_mse
    average = train.average_gradients
    losses = []

    def spoil_loss(*arguments):
        losses.append(mse(*arguments) * (math.nan if broken == "loss" and len(losses) == 3 else 1))
        return losses[-1]

    def spoil_weight(network):
        average(network)
        if broken == "weight" and len(losses) == 4:
            network.head.bias.data[0] = math.inf

    looks = []
    record(monkeypatch, looks, data.Mannequin, "__getitem__")
    monkeypatch.setattr(actupose, "heatmap_mse", spoil_loss)
    monkeypatch.setattr(train, "average_gradients", spoil_weight)
    assert launch(tmp_path, "--method", "source-only") == 2
    _, (source, batch), _ = looks[-1]
    names = ", ".join(source.names(batch))
    check_one_line(capsys.readouterr().err, "step 3: ", names, "--lr", "last.pt keeps the last good state")
    state = train.load_run(tmp_path / "last.pt")
    assert len(state["log"]) == len(read(tmp_path / "log.jsonl")) == 1
    assert all(value.isfinite().all() for value in state["student"].values())


# --- Settings and mistakes ----------------------------------------------------------------------------------

def test_settings_without_effect_are_named(capsys, monkeypatch, tmp_path):
    """The run is trained all the same."""
    monkeypatch.setattr(train, "train", Mock(side_effect=train.UserError("trained")))
    words = ["--method", "udape", "--pace", "2", "--gamma", "1", "--out", str(tmp_path)]
    assert train.main(words) == 2
    assert capsys.readouterr().err.splitlines() == [
        "train.py: --pace: has no effect with --curriculum off",
        "train.py: --gamma: has no effect with --w-cross 0",
        "train.py: trained"]


def test_the_papers_preset():
    """§4 and the base method's published settings; what is given wins; a method fixes what makes it."""
    s = train.make_settings("paper", style_weights="x")
    assert (s.architecture, s.weights, s.image_size) == ("resnet101", "imagenet", 256)
    assert (s.sigma, s.subcell) == (2.0, False)
    assert (s.epochs, s.pretrain_epochs, s.iters_per_epoch, s.batch_size) == (70, 40, 500, 32)
    assert (s.lr, s.lr_drops, s.lr_factor, s.ema, s.mask_ratio) == (1e-4, (44.0, 59.0), 0.1, 0.999, 0.5)
    assert (s.bins, s.pace, s.spread, s.w_udape, s.w_evalpose, s.w_cross) == (25, 2.0, 0.25, 1.0, 0.1, 0.01)
    assert (s.style, s.style_prob, s.occlusion, s.occlusion_confidence) == ("vgg", 0.5, 0.5, 0.9)
    assert (s.rotation, s.shear, s.translate, s.jitter) == (60, 30, 0.05, 0.25)
    assert (s.zoom, s.crop) == ((0.6, 1.3), (0.6, 1.0))
    published = [1e-4] * 44 + [1e-5] * 15 + [1e-6] * 11         # x 0.1 at epochs 45 and 60, counted from 1
    for first in (0, 499):
        rates = [train.learning_rate(s, epoch * 500 + first) for epoch in range(70)]
        assert rates == pytest.approx(published)
    s = train.make_settings("paper", method="source-only", lr=0.5)
    assert (s.style, s.w_evalpose, s.w_cross, s.curriculum) == ("off", 0.0, 0.0, "off")
    assert (s.lr, s.sigma) == (0.5, 2.0)
    hand = train.make_settings(source="mannequin-hand", gamma=0.5)
    assert (hand.target, hand.gamma) == ("mannequin-hand-wild", 0.5)


@pytest.mark.parametrize("native, auto", [(True, "bf16"), (False, "off")])
def test_amp_auto_asks_the_processor(native, auto, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    for given, resolved in (("auto", auto), ("bf16", "bf16"), ("off", "off")):
        assert train.resolve_amp(train.make_settings(amp=given), CPU).amp == resolved


# "=>": what the answer says. Without it, it names the first option.
MISTAKES = """
--method actupos; --epochs many; --epochs 0 => --epochs: must be at least 1, got 0; --seed -1; --lr nan;
--lr 0; --seed 99999999999999999999; --sigma inf; --lr-drops 5,nan; --ema 1.5; --vae-kl -1; --crop 0,1;
--crop 1,0.6; --crop 0.6,1.3 => at most 1; --zoom 1; --zoom 1x2; --subcell yes; --image-size 65;
--curriculum forwards => active; --weights imagenet => --architecture: --weights imagenet needs resnet18;
--style-weights x; --style-decoder x; --source-root x; --shoulders left;
--method udape+vae-hm --hard-bins 26 => --hard-bins: must be at most; --preset demi;
--epochs 20 => --pretrain-epochs; --style vgg => --style-weights;
--style vgg --style-weights . => --style-weights: . holds no vgg_normalised.pth;
--device warp9 => --device: torch finds no device 'warp9' here; --device meta;
--shoulders true => --shoulders: needs --source surreal; --out= => --out: use a path;
--lr-drops 44 => --lr-drops: needs --schedule steps; --source surreal => --source-root;
--source mannequin-wild => --source and --target must differ;
--target lsp --target-root no/place => --target-root: no/place; --resume --out no/run => no/run;
--source mannequin-hand --target mannequin-wild --source-count 60 => two domains of bodies or two of hands;
--bins 61 --source-count 60 => --bins: 61 is more than the 60 training images of the source;
--target lsp --target-root . --target-count 9 => --target-count: needs a rendered --target, got 9;
--epochz 3 => did you mean --epochs?; --metod=udape => did you mean --method?; evalate x => evalate;
evaluate no/run => no/run; evaluate => run; evaluate no/run --lr 1 => --lr;
--device cpu evaluate no/run => evaluate: comes first; evaluate no/run --cash x => did you mean --cache?;
--cache /dev/null/x => --cache: /dev/null is not a directory;
--method udape --w-cross 1 => --w-cross: --method udape has 0; --out /dev/null/x => --out: /dev/null is not"""


@pytest.mark.parametrize("mistake", [" ".join(mistake.split()) for mistake in MISTAKES.split(";")])
def test_mistakes_are_answered_in_one_line(mistake, capsys, tmp_path, monkeypatch):
    """On stderr, naming the option; exit status 2; nothing written, no directory made."""
    monkeypatch.chdir(tmp_path)
    arguments, _, text = mistake.partition(" => ")
    assert train.main(arguments.split()) == 2
    said = capsys.readouterr()
    check_one_line(said.err, text or arguments.split()[0])
    assert not said.out and not list(tmp_path.iterdir())


def test_without_a_compiler_nothing_begins(launch, tmp_path, monkeypatch, capsys):
    """torch.compile fails when it is first used: asked before data and style networks are made."""
    fails = Mock(side_effect=RuntimeError("No working C++ compiler found\nand a long story"))
    monkeypatch.setattr(torch, "compile", lambda function: fails)
    assert launch(tmp_path / "run", "--compile", "on") == 2
    check_one_line(capsys.readouterr().err, "--compile: torch.compile fails here (No working C++ compiler")
    assert not (tmp_path / "run").exists()


# --- A run speaks -------------------------------------------------------------------------------------------


def test_a_line_per_epoch_and_the_scores(finished):
    """On standard output, also where that is no terminal, and with nothing else said."""
    out, _, output, errors = finished("actupose")
    lines = output.splitlines()
    log = read(out / "log.jsonl")
    result = read(out / "result.json")
    for row, line in zip(log, lines):
        words = line.split()
        assert words[:2] == ["epoch", f"{row['epoch'] + 1}/3"] and words[3] == "s"
        for name, value in row.items():
            if name not in ("epoch", "pool"):
                assert float(words[words.index(name) + 1]) == pytest.approx(value, rel=1e-3, abs=0.05), name
    assert f"{result['pck']['all']:.1f}" in lines[4] and f"{result['evalpose']:.1f}" in lines[4]
    assert f"{result['teacher']['pck']['all']:.1f}" in lines[5]
    assert str(out / "figures") in lines[-1] and not errors


STREAMS = {
    "a reader that goes away": ("set -o pipefail; {} 2>errors | head -n 1 >said", {}),
    "no standard output": ("{} >&- 2>errors", {}),
    "no standard error": ("{} 2>&- >said", {}),
    "ASCII, WORLD_SIZE left over": ("{} 2>errors >said", dict(
        PYTHONIOENCODING="ascii", WORLD_SIZE="4", RANK="2", LOCAL_RANK="2", MASTER_ADDR="nowhere")),
}


def test_streams_end_no_run(tmp_path):
    """Runs finish with status 0 and no traceback, in a directory with a name that ASCII lacks."""
    script = f"{SCRIPT}\nsys.exit(train.main(sys.argv[1:]))\n"
    words = [*TINY, "--method", "source-only", "--epochs", "1", "--out", "é→"]
    command = " ".join([sys.executable, "run.py", *words])
    runs = {}
    for name, (line, changes) in STREAMS.items():                           # side by side: it saves seconds
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.py").write_text(script)
        runs[folder] = subprocess.Popen(["bash", "-c", line.format(command)], cwd=folder,
                                        env=child_environment(PYTHONUTF8="0", **changes))
    for folder, run in runs.items():
        status = run.wait()
        said = {name: (folder / name).read_text() for name in ("said", "errors") if (folder / name).exists()}
        assert status == 0, (folder, said)
        assert not said.get("errors") and "Traceback" not in said.get("said", ""), (folder, said)
        assert (folder / "é→" / "result.json").exists(), folder


# --- evaluate, and pictures that cannot be drawn ------------------------------------------------------------


def evaluate(run):
    return train.main(["evaluate", str(run), "--device", "cpu"])


def test_evaluate_scores_a_run_again(finished, tmp_path, capsys):
    """It finds the same numbers, and says so. It names a result.json with others, and how far a run is."""
    run = shutil.copytree(finished("actupose").out, tmp_path / "r")
    assert evaluate(run) == 0
    result = read(run / "result.json")
    said = capsys.readouterr().out
    assert "the same as" in said
    assert f"{result['pck']['all']:.1f}" in said and f"{result['evalpose']:.1f}" in said
    result["teacher"]["pck"]["all"] += 1
    (run / "result.json").write_text(json.dumps(result))
    assert evaluate(run) == 2
    check_one_line(capsys.readouterr().err, "result.json: holds other scores")
    (run / "result.json").unlink()
    assert evaluate(run) == 0
    assert "after 3 of 3 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lr": "fast"}', '{"lr": NaN}', '{"zoom": [1, "x"]}',
                                  '{"bins": 0}', '{"curriculum": []}'])
def test_a_damaged_config_is_named(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert evaluate(tmp_path) == 2
    check_one_line(capsys.readouterr().err, "config.json")


def test_a_config_of_other_code_is_named(tmp_path):
    """What it lacks would else take a default it was not trained with. A setting that is off may lack."""
    settings = train.make_settings()
    saved = dataclasses.asdict(settings)
    del saved["centred"]
    train.write_json(tmp_path / "config.json", saved)
    assert train.saved_settings(tmp_path) == settings
    del saved["jitter"]
    train.write_json(tmp_path / "config.json", saved)
    with pytest.raises(train.UserError, match="config.json: has no jitter"):
        train.saved_settings(tmp_path)


def test_a_picture_that_cannot_be_drawn_costs_a_line(launch, tmp_path, capsys, monkeypatch):
    """The result is there, the run ends well, and `evaluate` draws the picture again."""
    figures = tmp_path / "figures"
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_boxes", Mock(side_effect=AttributeError("no circle")))
        assert launch(tmp_path, "--method", "source-only", "--epochs", 1, figures=True) == 0
    check_one_line(capsys.readouterr().err, str(figures / "complexity.png"), "no circle")
    assert read(tmp_path / "result.json")["epochs"] == 1
    drawn = {path.name for path in figures.iterdir()}
    assert drawn == {"curves.png", "predictions.png", "bins.png", "similar.png"}
    assert evaluate(tmp_path) == 0
    assert {path.name for path in figures.iterdir()} == drawn | {"complexity.png"}
