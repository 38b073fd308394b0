"""Published weights load by name or not at all. Names and shapes are the published ones, values random."""
import argparse
import collections
import json
import pickle
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import actupose
import data
import train
from tiny_runs import ROOT, TINY, Payload, check_one_line

CPU = torch.device("cpu")
GOLDEN = ROOT.parent / "shared" / "golden"


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


def test_torchvision():
    """The backbone without a prefix, and the classifier; files from before 2018 lack BatchNorm's counters."""
    given = published("torchvision_resnet_state_dict.json", "resnet18")
    state = {f"backbone.{name}": value for name, value in given.items()}
    classifier = {"backbone.fc.weight", "backbone.fc.bias"}
    check("resnet18", given, state, classifier, {"upsampling", "head"})
    old = {name: value for name, value in given.items() if not name.endswith("num_batches_tracked")}
    check("resnet18", old, state, classifier, {"upsampling", "head", "backbone"})


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
    """A pretrained network loads whole, of an adapted one all but its two heads of two layers. A network with
    RegDA's two regressors takes the adapted one whole, and psi of the pretrained one."""
    state = ours("narrow", 21)
    check("narrow", {"model": state, "epoch": 1}, state)
    state = ours("narrow", leave_out="head")
    heads = {name: torch.rand(3) for name in ("head.0.weight", "head.1.bias", "head_adv.0.weight")}
    check("narrow", {"model": state | heads}, state, heads, {"head"})
    shapes = {"0.weight": (32, 32, 3, 3), "1.num_batches_tracked": (), "3.weight": (21, 32, 1, 1),
              **dict.fromkeys("0.bias 1.weight 1.bias 1.running_mean 1.running_var".split(), 32),
              "3.bias": 21}
    for name, shape in shapes.items():
        state[f"head.{name}"] = torch.rand(shape)
        state[f"head_adv.{name}"] = torch.rand(shape)
    check("narrow", {"model": state}, state, regressors=True)
    state = ours("narrow")
    check("narrow", state, state, {"head.weight", "head.bias"}, {"head", "head_adv"}, regressors=True)


def test_ours(tmp_path):
    """A checkpoint, or the directory of a run: the student of its last epoch."""
    state = ours("narrow", 21)
    train.save_checkpoint(tmp_path / "last.pt", {"student": state, "teacher": None, "log": []})
    for path in (tmp_path, tmp_path / "last.pt"):
        check("narrow", train.read_weights(train.make_settings(weights=str(path)))[0], state)


# --- Style networks -----------------------------------------------------------------------------------------


def open_style(**options):
    """The style networks of a run on tiny images, VGG's."""
    settings = train.make_settings(style="vgg", image_size=32, batch_size=8, **options)
    domains = SimpleNamespace(source=data.Mannequin("source", "train", 32, 8),
                              target=data.Mannequin("target", "train", 32, 8))
    return train.open_style(settings, CPU, domains), domains, settings


def test_adains_encoder_and_a_decoder_by_name(tmp_path, monkeypatch):
    """Every parameter of ours is theirs. A decoder beside the encoder is not taken: it has to be given. A
    wrong shape is refused."""
    encoder = published("adain_state_dict.json", "vgg_normalised")
    decoder = published("adain_state_dict.json", "decoder")
    for name, state in (("vgg_normalised.pth", encoder), ("decoder.pth", decoder)):
        torch.save(state, tmp_path / name)
    transfer, _, _ = open_style(style_weights=str(tmp_path))
    assert all(torch.equal(value, encoder[name]) for name, value in transfer.encoder.state_dict().items())
    assert not torch.equal(transfer.decoder.state_dict()["1.weight"], decoder["1.weight"])
    unused = {int(name.split(".")[0]) for name in encoder.keys() - transfer.encoder.state_dict().keys()}
    assert unused == {32, 35, 38, 42, 45, 48, 51}                           # beyond relu4_1
    monkeypatch.setattr(train, "check_decoder", lambda *_: None)            # these values are random
    given = dict(style_weights=str(tmp_path), style_decoder=str(tmp_path / "decoder.pth"))
    transfer, _, _ = open_style(**given)
    assert all(torch.equal(value, decoder[name]) for name, value in transfer.decoder.state_dict().items())
    torch.save({**decoder, "1.bias": torch.zeros(3)}, tmp_path / "decoder.pth")
    with pytest.raises(train.UserError, match="decoder.pth: .*1.bias"):
        open_style(**given)


def convolution(factor, shift):
    """A 1x1 layer that gives factor * x + shift, factor and shift per channel."""
    layer = torch.nn.Conv2d(3, 3, 1)
    layer.weight.data = torch.diag(factor).view(3, 3, 1, 1)
    layer.bias.data = shift.clone()
    return layer


MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
ONES = torch.ones(3)


@pytest.mark.parametrize("encoder, decoder, fits", [
    # The encoder takes what is normalised to 2x + 1; the decoder of this domain takes it back.
    ((2 * ONES, ONES), (ONES / 2, -ONES / 2), True),
    # As AdaIN's: a decoder that turns normalised images into 0 ... 1.
    ((2 * ONES, ONES), (ONES / 2 * STD, MEAN - STD / 2), False),
    # Of another domain: the channels are wrong, or nothing but the mean colour is there.
    ((2 * ONES, ONES), (-ONES / 2, ONES / 2), False),
    ((2 * ONES, ONES), (0 * ONES, ONES), False)])
def test_a_given_decoder_is_tried(encoder, decoder, fits, tmp_path, monkeypatch, capsys):
    """Before anything is written: normalised images have to come back without a style."""
    def networks():
        same = ONES, 0 * ONES
        return torch.nn.Sequential(convolution(*same)), torch.nn.Sequential(convolution(*same)), (0,)

    monkeypatch.setattr(actupose, "vgg_networks", networks)
    torch.save(torch.nn.Sequential(convolution(*encoder)).state_dict(), tmp_path / "vgg_normalised.pth")
    torch.save(torch.nn.Sequential(convolution(*decoder)).state_dict(), tmp_path / "decoder.pth")
    given = dict(style_weights=str(tmp_path), style_decoder=str(tmp_path / "decoder.pth"))
    if fits:
        transfer, domains, settings = open_style(**given)
        before = [parameter.clone() for parameter in transfer.parameters()]
        trainer = SimpleNamespace(style_transfer=transfer, device=CPU, autocast=None)
        train.train_style(SimpleNamespace(settings=settings, trainer=trainer, domains=domains))
        assert all(map(torch.equal, before, transfer.parameters()))         # what is given is not trained
        assert not any(parameter.requires_grad for parameter in transfer.parameters())
        return
    words = [*TINY, "--style", "vgg"]
    words += [f"{train.option_of(name)}={value}" for name, value in given.items()]
    assert train.main([*words, "--out", str(tmp_path / "r")]) == 2
    check_one_line(capsys.readouterr().err, "--style-decoder: ", "decoder.pth does not reproduce the images")
    assert not (tmp_path / "r").exists()


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state, texts", [
    (dict, ["no parameter"]),
    (lambda: ours("resnet18"), ["(64, 3, 7, 7)", "(16, 3, 5, 5)", "another architecture"]),
    (lambda: ours("narrow") | {"tail.weight": torch.zeros(3)}, ["this network has no tail.weight"]),
    (lambda: ours("narrow", 21), ["head.", "(21", "(16", "keypoints"]),
    (lambda: ours("narrow", leave_out="backbone.layer3.0.conv2"), ["layer3.0.conv2.weight", "missing"]),
    (lambda: ours("narrow", leave_out="upsampling.3"), ["upsampling.3.weight", "missing"]),
    (lambda: ours("narrow") | {"head.bias": [0.0] * 16}, ["head.bias", "list"])])
def test_what_does_not_fit_is_refused_whole(state, texts):
    """The error names the parameter and what is the matter; the network is as it was."""
    network = actupose.PoseResNet("narrow", 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        actupose.load_pose_weights(network, state())
    assert all(text in str(error.value) for text in texts), str(error.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


MODULE = torch.nn.Linear(2, 2)
ADVICE = "torch.save(model.state_dict(), FILE)"


def write_safetensors(path):
    """One tensor of four numbers: the header's length, the header, the numbers."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def write_script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # TorchScript is deprecated
        torch.jit.trace(MODULE, torch.zeros(1, 2)).save(path)


def cut(path):
    torch.save(MODULE.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


# What writes the file, and what the answer says.
FILES = {
    "a NumPy scalar": (lambda path: torch.save({"a": torch.zeros(1), "best": np.float64(1)}, path),
                       ["multiarray.scalar", "could run code", ADVICE]),
    "a module": (lambda path: torch.save(MODULE, path), ["torch.nn.modules.linear.Linear", ADVICE]),
    "TorchScript": (write_script, ["TorchScript", ADVICE]),
    "safetensors": (write_safetensors, ["it is a safetensors file", "safetensors.torch.load_file"]),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), ["it holds a Tensor", ADVICE]),
    "another network": (lambda path: torch.save(ours("resnet18"), path), ["give its --architecture"]),
    "a NumPy archive": (lambda path: np.savez(path.open("wb"), a=1), ["not written by torch.save", ADVICE]),
    "cut off": (cut, ["damaged", "fetch it again"]),
    "a page": (lambda path: path.write_text("<html>404"), ["damaged", "fetch it again"]),
    "hostile": (lambda path: path.write_bytes(pickle.dumps({"student": Payload()}, protocol=2)), [ADVICE]),
    "hostile, by torch": (lambda path: torch.save({"student": Payload()}, path), ["mkdir", "could run code"]),
    "nothing": (lambda path: None, ["No such file"]),
    "an empty folder": (Path.mkdir, ["last.pt: no such file"]),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_not_loaded(kind, tmp_path, monkeypatch, capsys):
    """One line says what was refused and what to do, before anything is written. A valid file is not called
    damaged. Nothing of a hostile file is executed."""
    monkeypatch.chdir(tmp_path)
    write, texts = FILES[kind]
    write(Path("x.pth"))
    assert train.main(["--device", "cpu", "--weights", "x.pth", "--out", "r"]) == 2
    error = capsys.readouterr().err
    check_one_line(error, "x.pth", *texts)
    assert kind in ("cut off", "a page", "a NumPy archive", "hostile") or "damaged" not in error
    assert not Path("r").exists() and not Path("executed").exists()
