"""The paper's three tasks, from the README's command to a finished run, on miniature trees in the exact layouts."""
import json
import random
import time

import pytest
from PIL import Image

import data
import train
from test_datasets import make_h3d, make_human36m, make_rhd, make_surreal
from test_lsp import make_tree

TINY = ["--preset", "paper", "--architecture", "resnet18", "--weights", "", "--style", "small", "--epochs", "2",
        "--pretrain-epochs", "1", "--iters-per-epoch", "2", "--batch-size", "4", "--style-iters", "2", "--vae-steps", "5",
        "--image-size", "64", "--bins", "3", "--hard-bins", "1", "--device", "cpu"]


def surreal(root):
    make_surreal(root, runs=(4, 5, 6))


def rhd(root):
    make_rhd(root, "training", list(range(7)) * 2)
    make_rhd(root, "evaluation", [0, 2])


def lsp(root):
    make_tree(root, extended=False, sizes=[(90 + 5 * i, 80) for i in range(6)])


def human36m(root):
    make_human36m(root, {1: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 11: 1})


def h3d(root):
    make_h3d(root, 40)


@pytest.mark.parametrize("source, target", [(surreal, lsp), (surreal, human36m), (rhd, h3d)])
def test_a_task_from_its_command(source, target, tmp_path, monkeypatch):
    """Two epochs with the paper's preset made small; the run says what it was, and its pictures are there."""
    choices = random.Random.choices
    monkeypatch.setattr(random.Random, "choices", lambda self, population, k: choices(self, population, k=20))   # of 3,200
    for make in (source, target):
        (tmp_path / make.__name__).mkdir()
        make(tmp_path / make.__name__)
    out = tmp_path / "run"
    arguments = ["--source", source.__name__, "--source-root", str(tmp_path / source.__name__),
                 "--target", target.__name__, "--target-root", str(tmp_path / target.__name__)]
    assert train.main([*TINY, *arguments, "--workers", "2", "--out", str(out)]) == 0
    result, config = (json.loads((out / name).read_text()) for name in ("result.json", "config.json"))
    assert (result["source"], result["target"], result["epochs"]) == (source.__name__, target.__name__, 2)
    assert set(result["pck"]) == set(data.HAND21.groups if source is rhd else data.BODY16.groups) | {"all"}
    assert config["rotation"] == (180 if source is rhd else 60)
    for name in ("predictions", "domains", "curriculum", "bins"):
        assert Image.open(out / "figures" / f"{name}.png").size[0] > 300
    if source is not rhd:
        return
    again = tmp_path / "again"                                 # threads that decode ahead change nothing
    assert train.main([*TINY, *arguments, "--workers", "0", "--out", str(again)]) == 0
    assert json.loads((again / "result.json").read_text())["pck"] == result["pck"]


@pytest.mark.parametrize("arguments, message", [
    (["--source", "surreal"], "--source-root"),
    (["--source", "rhd", "--source-root", "x"], "hands"),
    (["--target", "h3d", "--target-root", "x"], "hands"),
    (["--source-root", "x"], "rendered"),
    (["--target-root", "x"], "rendered"),
    (["--source", "surreal", "--source-root", "no/such/place"], "no/such/place"),
    (["--source", "sureal"], "--source"),
    (["--shoulders", "left"], "--shoulders"),
    (["--workers", "-1"], "--workers"),
])
def test_mistakes_in_a_task(arguments, message, capsys, tmp_path):
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ahead_keeps_the_order_and_passes_errors_on(workers):
    def job(i):
        time.sleep(0.002 * (i % 3))
        if i == 7:
            raise ValueError("job 7")
        return i
    results = train.ahead((lambda i=i: job(i) for i in range(7)), workers)
    assert list(results) == list(range(7))
    with pytest.raises(ValueError, match="job 7"):
        list(train.ahead((lambda i=i: job(i) for i in range(9)), workers))
