"""The paper's three tasks, from the README's command to a finished run, on miniature trees in the exact layouts."""
import json
import random
import time

import pytest
import torch
from PIL import Image

import actupose
import data
import train
from miniatures import make_h3d, make_human36m, make_rhd, make_surreal, make_tree

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


def test_vgg_decoder_is_trained_where_none_is_given(tmp_path, monkeypatch):
    """With the published encoder alone the decoder is fitted to the two domains; the encoder stays as it was given."""
    monkeypatch.setattr(data.Mannequin, "DEFAULT_COUNTS", {k: min(n, 20) for k, n in data.Mannequin.DEFAULT_COUNTS.items()})
    torch.manual_seed(7)
    given = actupose.StyleTransfer("vgg")
    torch.save(given.encoder.state_dict(), tmp_path / "vgg_normalised.pth")
    settings = train.make_settings(style="vgg", style_weights=str(tmp_path), style_iters=1, image_size=32, batch_size=2,
                                   source_count=10, target_count=10)
    domains = train.open_domains(settings)
    trained = train.prepare_style(settings, domains, torch.device("cpu"))
    torch.manual_seed(settings.seed)
    start = actupose.StyleTransfer("vgg").decoder.state_dict()
    assert all(torch.equal(value, given.encoder.state_dict()[name]) for name, value in trained.encoder.state_dict().items())
    assert any(not torch.equal(value, start[name]) for name, value in trained.decoder.state_dict().items())
    torch.save(start, tmp_path / "decoder.pth")                # with it nothing is trained
    loaded = train.prepare_style(settings, domains, torch.device("cpu"))
    assert all(torch.equal(value, start[name]) for name, value in loaded.decoder.state_dict().items())


def test_wild_figures_as_a_labelled_source(tmp_path):
    """The rendered target with its labels: a source for photographs; not for itself."""
    settings = train.make_settings(source="mannequin-wild", target="lsp", target_root=str(tmp_path), image_size=32,
                                   source_count=40, batch_size=4)
    lsp(tmp_path)
    source = train.open_domains(settings).source
    wild = data.Mannequin("target", "train", 32, 40, seed=settings.seed)
    assert torch.equal(source[[0, 7]][0], wild[[0, 7]][0]) and torch.equal(source.keypoints, wild.keypoints)
    with pytest.raises(train.UserError, match="is the target too"):
        train.make_settings(source="mannequin-wild", target="mannequin-wild")
