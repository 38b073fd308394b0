"""Published weights load by name or not at all. Names and shapes are the published ones, values random."""
import argparse
import collections
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import actupose
import train

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
Payload = type("Payload", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})    # if it is unpickled


def published(file, key=None):
    if not (GOLDEN / file).exists():
        pytest.skip(f"names and shapes of the published weights (shared/golden/{file}) are not here")
    names = json.loads((GOLDEN / file).read_text())
    return {name: torch.rand(shape) for name, shape in (names[key] if key else names).items()}


def ours(architecture, keypoints=16, leave_out="nothing"):
    """A state with the names of our own network, but for those that begin so."""
    own = actupose.PoseResNet(architecture, keypoints).state_dict()
    return {name: torch.rand(value.shape) for name, value in own.items() if not name.startswith(leave_out)}


def check(architecture, given, state, ignored=(), left=(), regressors=False):
    """Loaded are all parameters but those of the parts `left`, with the values in `state`, by our names."""
    keypoints = len(state.get("head.bias", state.get("head.3.bias", range(16))))
    network = actupose.PoseResNet(architecture, keypoints)
    if regressors:
        actupose.make_regressors(network)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    loaded, found_ignored, found_left = actupose.load_pose_weights(network, given)
    assert set(found_ignored) == set(ignored) and {name.split(".")[0] for name in found_left} == set(left)
    assert sorted([*loaded, *found_left]) == sorted(before) and len(loaded) > 60
    for name, value in network.state_dict().items():
        assert torch.equal(value, (state if name in loaded else before)[name].to(value.dtype)), name


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_torchvision(architecture):
    """The backbone without a prefix, and the classifier; files from before 2018 lack BatchNorm's counters."""
    given = published("torchvision_resnet_state_dict.json", architecture)
    state = {f"backbone.{name}": value for name, value in given.items()}
    classifier = {"backbone.fc.weight", "backbone.fc.bias"}
    check(architecture, given, state, classifier, {"upsampling", "head"})
    old = {name: value for name, value in given.items() if not name.endswith("num_batches_tracked")}
    check(architecture, old, state, classifier, {"upsampling", "head", "backbone"})


def test_udape(tmp_path):
    """Both networks under `module.`, a schedule, the options as a Namespace: the student is loaded whole."""
    state = published("pose_resnet101_state_dict.json")
    student = {f"module.{name}": value for name, value in state.items()}
    torch.save({"student": student, "teacher": {"module.head.bias": torch.zeros(1)}, "epoch": 60,
                "lr_scheduler": {"milestones": collections.Counter([45, 60])},
                "args": argparse.Namespace(lr=1e-4, lr_step=[45, 60])}, tmp_path / "best.pth")
    weights, path = train.read_weights(train.make_settings(weights=str(tmp_path / "best.pth")))
    check("resnet101", weights, state, {"teacher", "backbone.fc.weight", "backbone.fc.bias"})


def test_regda():
    """`model`: the pretrained network whole; of the adapted one all but its two heads of two layers. One
    with RegDA's two regressors takes the adapted one whole, and of the pretrained one psi."""
    check("resnet18", {"model": (state := ours("resnet18", 21)), "epoch": 1}, state)
    state = ours("resnet18", leave_out="head")
    heads = {name: torch.rand(3) for name in ("head.0.weight", "head.1.bias", "head_adv.0.weight")}
    check("resnet18", {"model": state | heads}, state, heads, {"head"})
    shapes = {"0.weight": (256, 256, 3, 3), "1.num_batches_tracked": (), "3.weight": (21, 256, 1, 1),
              **dict.fromkeys("0.bias 1.weight 1.bias 1.running_mean 1.running_var".split(), 256),
              "3.bias": 21}
    state |= {f"{head}.{name}": torch.rand(shape) for head in ("head", "head_adv")
              for name, shape in shapes.items()}
    check("resnet18", {"model": state}, state, regressors=True)
    state = ours("resnet18")
    check("resnet18", state, state, {"head.weight", "head.bias"}, {"head", "head_adv"}, regressors=True)


def test_ours(tmp_path):
    """A checkpoint, or the directory of a run: the student of its last epoch."""
    state = ours("narrow", 21)
    train.save_checkpoint(tmp_path / "last.pt", {"student": state, "teacher": None, "log": []})
    for path in (tmp_path, tmp_path / "last.pt"):
        check("narrow", train.read_weights(train.make_settings(weights=str(path)))[0], state)


def test_style_weights(tmp_path):
    """AdaIN's files: every parameter of ours is theirs, none is left to train. A wrong shape is refused."""
    encoder, decoder = (published("adain_state_dict.json", key) for key in ("vgg_normalised", "decoder"))
    torch.save(encoder, tmp_path / "vgg_normalised.pth")
    torch.save(decoder, tmp_path / "decoder.pth")
    settings = train.make_settings(style="vgg", style_weights=str(tmp_path))
    transfer = train.prepare_style(settings, None, SimpleNamespace(device="cpu"))
    for network, state in ((transfer.encoder, encoder), (transfer.decoder, decoder)):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    unused = {int(name.split(".")[0]) for name in encoder.keys() - transfer.encoder.state_dict().keys()}
    assert unused == {32, 35, 38, 42, 45, 48, 51}                           # beyond relu4_1
    torch.save({**decoder, "1.bias": torch.zeros(3)}, tmp_path / "decoder.pth")
    with pytest.raises(train.UserError, match="decoder.pth: 1.bias"):
        train.prepare_style(settings, None, SimpleNamespace(device="cpu"))


@pytest.mark.parametrize("state, texts", [
    (dict, ["no parameter"]),
    (lambda: ours("resnet50"), ["(64, 64, 1, 1)", "(64, 64, 3, 3)", "another architecture"]),
    (lambda: ours("resnet18") | {"tail.weight": torch.zeros(3)}, ["this network has no tail.weight"]),
    (lambda: ours("resnet18", 21), ["head.", "(21", "(16", "keypoints"]),
    (lambda: ours("resnet18", leave_out="backbone.layer3.1.conv2"), ["layer3.1.conv2.weight", "missing"]),
    (lambda: ours("resnet18", leave_out="upsampling.3"), ["upsampling.3.weight", "missing"]),
    (lambda: ours("resnet18") | {"head.bias": [0.0] * 16}, ["head.bias", "list"])])
def test_what_does_not_fit_is_refused_whole(state, texts):
    """The error names the parameter and what is the matter; the network is as it was."""
    network = actupose.PoseResNet("resnet18", 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        actupose.load_pose_weights(network, state())
    assert all(text in str(error.value) for text in texts), str(error.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("weights", ["imagenet", "no/such.pth", "empty", "other.pth", "text.pth",
                                     "tensor.pth", "evil1.pth", "evil2.pth"])
def test_mistakes_get_one_line_before_anything_is_written(weights, tmp_path, monkeypatch, capsys):
    """And nothing of a hostile file is executed."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.pth").write_text("not a checkpoint")
    Path("evil1.pth").write_bytes(pickle.dumps({"student": Payload()}, protocol=2))
    torch.save({"student": Payload()}, "evil2.pth")
    torch.save(torch.zeros(3), "tensor.pth")
    torch.save(ours("resnet18"), "other.pth")
    assert train.main(["--device", "cpu", "--weights", weights, "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and weights in error and error.count("\n") == 1, error
    assert not Path("r").exists() and not Path("executed").exists()
