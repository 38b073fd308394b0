"""The command line and a whole run, tiny: what it writes, that it repeats, resumes and refuses with one clear line."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import actupose
import data
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--epochs", "3", "--pretrain-epochs", "1", "--iters-per-epoch", "2", "--batch-size", "4", "--source-count", "60",
        "--target-count", "30", "--style-iters", "4", "--vae-steps", "5", "--image-size", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """Validation and test splits of a few images, so that a run takes seconds."""
    from data import Mannequin
    monkeypatch.setattr(Mannequin, "DEFAULT_COUNTS", {key: min(n, 50) for key, n in Mannequin.DEFAULT_COUNTS.items()})


def run(*arguments):
    """The command line in this process -> exit status."""
    return train.main(list(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run of ACTUPose."""
    from data import Mannequin
    counts, Mannequin.DEFAULT_COUNTS = Mannequin.DEFAULT_COUNTS, {k: min(n, 50) for k, n in Mannequin.DEFAULT_COUNTS.items()}
    out = tmp_path_factory.mktemp("runs") / "run"
    try:
        assert run(*TINY, "--out", str(out)) == 0
    finally:
        Mannequin.DEFAULT_COUNTS = counts
    return out


def test_a_runs_directory(finished):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")
    result = json.loads((finished / "result.json").read_text(), parse_constant=no_constant)
    assert result["method"] == "actupose" and result["target"] == "mannequin-wild" and result["seed"] == 0
    assert set(result["pck"]) == {"shoulder", "elbow", "wrist", "hip", "knee", "ankle", "all"}
    assert all(0 <= v <= 100 for v in result["pck"].values()) and len(result["bins"]) == 25
    assert set(result["teacher"]["pck"]) == set(result["pck"]) and -100 <= result["evalpose"] <= 100
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1, 2]
    assert "consistency" not in log[0] and {"mse", "consistency", "evalpose", "cross_domain", "pairs", "kept"} <= set(log[1])
    assert json.loads((finished / "config.json").read_text())["epochs"] == 3
    pictures = sorted((finished / "figures").glob("*.png"))
    assert {"predictions.png", "domains.png", "style.png", "curriculum.png", "curves.png", "bins.png",
            "complexity.png"} <= {p.name for p in pictures}
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) >= 100


def test_evaluate_gets_the_same_numbers(finished, capsys):
    assert run("evaluate", str(finished), "--device", "cpu") == 0
    assert "the same as" in capsys.readouterr().out


def test_evaluate_says_when_the_figures_differ(finished, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    result = json.loads((out / "result.json").read_text())
    result["evalpose"] += 1.0
    (out / "result.json").write_text(json.dumps(result))
    assert run("evaluate", str(out), "--device", "cpu") == 2
    assert "result.json" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    assert run(*TINY, "--out", str(finished)) == 2
    assert "finished run" in capsys.readouterr().err and (finished / "last.pt").read_bytes() == before


def test_the_same_seed_gives_the_same_result_and_resume_goes_on(finished, tmp_path, monkeypatch):
    """A run stopped after its second epoch and resumed ends where the uninterrupted one did."""
    whole = train.train_epoch

    def stop(run_, epoch, progress):
        if epoch == 2:
            raise KeyboardInterrupt
        return whole(run_, epoch, progress)

    monkeypatch.setattr(train, "train_epoch", stop)
    assert run(*TINY, "--out", str(tmp_path / "r")) == 130
    monkeypatch.setattr(train, "train_epoch", whole)
    assert run(*TINY, "--out", str(tmp_path / "r")) == 2                  # not without --resume
    assert run("--resume", "--out", str(tmp_path / "r"), "--device", "cpu", "--lr", "0.5") == 2      # not with other settings
    assert run("--resume", "--out", str(tmp_path / "r"), "--device", "cpu") == 0
    one, two = (torch.load(d / "last.pt", weights_only=True)["student"] for d in (finished, tmp_path / "r"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads((d / "result.json").read_text()) for d in (finished, tmp_path / "r"))
    assert one["pck"] == two["pck"] and one["bins"] == two["bins"]


@pytest.mark.parametrize("method", ["source-only", "udape", "udape+vae-hm", "oracle"])
def test_methods_are_one_loop_with_parts_off(method, tmp_path):
    assert run(*TINY, "--method", method, "--out", str(tmp_path / "r")) == 0
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert ("consistency" in log[-1]) == method.startswith("udape") and "evalpose" not in log[-1]
    assert log[-1]["pool"] == {"source-only": 60, "udape": 60, "udape+vae-hm": 60 - 17 * 60 // 25, "oracle": 30}[method]


def test_compare_runs_what_is_missing_and_prints_a_table(tmp_path, capsys):
    options = ["compare", "--methods", "source-only,no-evalpose", "--seeds", "0,1", "--out", str(tmp_path / "c"), *TINY]
    assert run(*options) == 0
    table = capsys.readouterr().out
    assert "| source-only | 2 |" in table and "| no-evalpose | 2 |" in table
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("result.json")}
    assert len(stamps) == 4
    assert run(*options) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert run(*options, "--lr", "0.5") == 2 and "--lr" in capsys.readouterr().err


def test_comparison_table_by_hand():
    def result(value, seed, teacher=None):
        return {"pck": {"elbow": value - 1, "all": value}, "evalpose": 50.0, "seed": seed,
                "teacher": {"pck": {"all": teacher}} if teacher else None}
    rows = {"source-only": [result(30.0, 0), result(32.0, 1)], "udape": [result(42.0, 0, 43.0), result(44.0, 1, 45.0)],
            "oracle": [result(61.0, 0), result(61.0, 1)]}
    assert "| udape | 2 | 42.0 | **43.0** ± 1.4 | 44.0 | 50.0 | 40 % |" in train.comparison_table(rows)   # (43-31) / (61-31)
    rows["actupose"] = [result(47.0, 1), result(41.0, 0), result(90.0, 2)]        # to udape, by seed: 42 - 41, 44 - 47
    table = train.comparison_table(rows)
    assert "| 40 % | -1.0 ± 2.8 |" in table and table.splitlines()[0].endswith("| gap closed | to actupose |")
    assert train.comparison_table({"udape": rows["udape"]}).splitlines()[0].endswith("| EvalPose |")


@pytest.mark.parametrize("arguments, text", [
    (["--method", "actupos"], "--method"),
    (["--epochz", "3"], "did you mean --epochs"),
    (["--epochs", "many"], "--epochs"),
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "20"], "--pretrain-epochs"),
    (["--seed", "-1"], "--seed"),
    (["--bins", "100", "--source-count", "60", "--vae-steps", "1", "--style", "off"], "--bins"),
    (["--crop", "0,0"], "--crop"),
    (["--supervise", "target"], "--curriculum"),
    (["--method", "udape+vae-hm", "--source-count", "60", "--vae-steps", "1", "--style-iters", "1"], "--hard-bins"),
    (["--batch-size", "9999"], "--batch-size"),
    (["--image-size", "65"], "--image-size"),
    (["--target", "lsp"], "--target-root"),
    (["--target", "lsp", "--target-root", "no/such/place"], "no/such/place"),
    (["--device", "warp9"], "--device"),
    (["--zoom", "1"], "--zoom"),
    (["--style", "vgg"], "--style-weights"),
    (["--preset", "demi"], "--preset"),
    (["--resume", "--out", "no/such/run"], "no/such/run"),
    (["evaluate", "no/such/run"], "no/such/run"),
    (["evalate", "x"], "evalate"),
    (["compare", "--methods", "udap"], "udap"),
    (["compare", "--seeds", "a"], "--seeds"),
    (["compare", "--jobs", "0"], "--jobs"),
])
def test_mistakes_get_one_line(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_of_another_shape(finished, tmp_path, capsys):
    out = tmp_path / "r"
    out.mkdir()
    config = json.loads((finished / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architecture": "resnet18"}))
    (out / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    assert run("evaluate", str(out), "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "last.pt" in error and "--architecture" in error
    (out / "last.pt").write_bytes(b"not a checkpoint")
    assert run("evaluate", str(out), "--device", "cpu") == 2
    assert "last.pt" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(actupose, "heatmap_mse", lambda p, t, w: (p * math.nan).mean())
    assert run(*TINY, "--out", str(tmp_path / "r")) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and "--lr" in error and not (tmp_path / "r" / "last.pt").exists()


def test_help_names_default_and_papers_value():
    environment = dict(os.environ, COLUMNS="200")
    text = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True,
                          env=environment).stdout
    assert "[default 0.001; paper 0.0001]" in text and "curriculum (§3.1)" in text and "--preset {demo,paper}" in text
    for field in dataclasses.fields(train.Settings):
        default = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
        assert f"--{field.name.replace('_', '-')} " in text and f"default {default}" in text


def test_paper_preset_is_the_papers():
    """§4 and the base method's published settings."""
    s = train.make_settings("paper", style_weights="x")
    assert (s.architecture, s.image_size, s.sigma, s.batch_size, s.epochs, s.iters_per_epoch, s.lr) == \
        ("resnet101", 256, 2.0, 32, 70, 500, 1e-4)
    assert (s.bins, s.pace, s.spread, s.ema, s.w_udape, s.w_evalpose, s.w_cross) == (25, 2.0, 0.25, 0.999, 1.0, 0.1, 0.01)


def test_batches_cover_the_data():
    """Every pass visits each sample once, whatever the batch size; a batch depends on (seed, step) alone."""
    order = train.Shuffler(0, 10)
    drawn = np.concatenate([order.batch(4, step) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert np.array_equal(train.Shuffler(0, 10).batch(4, 3), drawn[12:16])


def make_trainer(style_transfer=None, **changes):
    settings = train.make_settings("demo", **{"image_size": 32, "batch_size": 4, "source_count": 8, "target_count": 8, **changes})
    return train.Trainer(settings, data.BODY16, style_transfer, torch.device("cpu"))


@pytest.mark.parametrize("style_prob", [0.0, 1.0])
def test_training_step_never_waits_for_the_device(style_prob):
    """No .item(), .cpu(), nonzero or boolean indexing inside a step: on the meta device, which has no values, each raises.
    (A copy from the host would pass.)"""
    trainer = make_trainer(actupose.StyleTransfer("small").to("meta"), style_prob=style_prob)
    trainer.teacher = actupose.make_teacher(trainer.student)
    for module in (trainer.student, trainer.teacher):
        module.to("meta")
    trainer.optimiser = torch.optim.SGD(trainer.student.parameters(), lr=0.1)
    trainer.device = torch.device("meta")
    trainer.limbs, trainer.triplets = trainer.limbs.to("meta"), trainer.triplets.to("meta")
    batch = (torch.arange(4), torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 16, 2), torch.ones(4, 16))
    terms, confidence = trainer.step(0, batch, batch[:2])
    assert confidence.device.type == "meta" and terms["consistency"].device.type == "meta"


def test_poses_are_compared_as_they_stand_in_the_image():
    """Eq. 7: with a network that is always right, the source pose that is compared is the image's own, whatever rotation
    and shear the student saw it under."""
    from data import Mannequin
    trainer = make_trainer(image_size=64)
    indices = torch.arange(8)
    batch = (indices, *Mannequin("source", "train", 64, 8)[indices])
    _, heatmaps, weight, _, _, _ = trainer.labelled_view(batch, step=3)
    trainer.student = lambda images: (heatmaps, torch.zeros(8, 4))
    source = trainer.supervised(batch, step=3)
    error = (source["pose"] - batch[2]).norm(dim=-1)[weight > 0]
    assert len(error) > 80 and error.quantile(0.9) < 1.0           # pixels; a cell is two
    assert (source["confidence"] > 0.8).all()


def test_masked_target_keypoints_do_not_count():
    """With nothing sure (mask ratio 0), the target adds neither consistency nor EvalPose nor pairs."""
    from data import Mannequin
    trainer = make_trainer(mask_ratio=0.0, image_size=64)
    trainer.teacher = actupose.make_teacher(trainer.student)
    indices = torch.arange(4)
    source, target = ((indices, *Mannequin(domain, "train", 64, 4)[indices]) for domain in ("source", "target"))
    terms, _ = trainer.step(0, source, target)
    assert terms["kept"] == 0 and terms["consistency"] == 0 and terms["pairs"] == 0 and terms["mse"] > 0
