"""Published weights load by name. Names and shapes are the published ones; the files are made here, with random values."""

import argparse
import collections
import json
import pickle
from pathlib import Path

import pytest
import torch

import actupose
import data
import train

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY = ["--epochs", "2", "--pretrain-epochs", "1", "--iters-per-epoch", "2", "--batch-size", "4", "--source-count", "60",
        "--target-count", "30", "--style-iters", "2", "--vae-steps", "5", "--image-size", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """Validation and test splits of a few images, so that a run takes seconds."""
    counts = data.Mannequin.DEFAULT_COUNTS
    monkeypatch.setattr(data.Mannequin, "DEFAULT_COUNTS", {key: min(n, 50) for key, n in counts.items()})


def published(file, key=None):
    """Names -> shapes of a published checkpoint."""
    path = GOLDEN / file
    if not path.exists():
        pytest.skip(f"names and shapes of the published weights (shared/golden/{file}) are not here")
    names = json.loads(path.read_text())
    return names[key] if key else names


def random_state(shapes):
    """A state dict of these names and shapes with values that tell parameters apart."""
    torch.manual_seed(1)
    return {name: torch.rand(shape) if shape else torch.tensor(7) for name, shape in shapes.items()}


def shapes_of(architecture, keypoints=16):
    return {name: list(value.shape) for name, value in actupose.PoseResNet(architecture, keypoints).state_dict().items()}


def torchvision_state(architecture="resnet18"):
    """What torchvision's file of an architecture holds: the backbone without a prefix, and the classifier."""
    shapes = {name.removeprefix("backbone."): shape for name, shape in shapes_of(architecture).items()
              if name.startswith("backbone.")}
    return random_state({**shapes, "fc.weight": [1000, 512], "fc.bias": [1000]})


def same(network, state, prefix=""):
    """Whether every parameter of the network that the state names has the state's values."""
    own = network.state_dict()
    return all(torch.equal(own[prefix + name], value) for name, value in state.items() if prefix + name in own)


# The published names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnet101"])
def test_torchvision_names(architecture):
    """Every parameter of torchvision's file is the backbone's or the classifier's, and the whole backbone is in it."""
    shapes = published("torchvision_resnet_state_dict.json", architecture)
    state, network = random_state(shapes), actupose.PoseResNet(architecture, 16)
    loaded, ignored, left = actupose.load_pose_weights(network, state)
    assert sorted(loaded) == sorted(f"backbone.{name}" for name in shapes if not name.startswith("fc."))
    assert set(ignored) == {"backbone.fc.weight", "backbone.fc.bias"}
    assert {name.split(".")[0] for name in left} == {"upsampling", "head"}
    assert same(network, state, "backbone.")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_the_base_methods_pose_network(prefix):
    """UDAPE's file: both networks, `module.` of DataParallel, the options it was written with; nothing is left out."""
    shapes = published("pose_resnet101_state_dict.json")
    state = random_state(shapes)
    network = actupose.PoseResNet("resnet101", shapes["head.bias"][0])
    student = {prefix + name: value for name, value in state.items()}
    teacher = {name: torch.zeros_like(value) for name, value in student.items()}
    loaded, ignored, left = actupose.load_pose_weights(network, {"student": student, "teacher": teacher, "epoch": 3})
    assert sorted(loaded) == sorted(network.state_dict()) and not left
    assert set(ignored) == {"teacher", "backbone.fc.weight", "backbone.fc.bias"}
    assert same(network, state)


def test_names_of_the_published_style_networks(tmp_path):
    """AdaIN's files: the decoder's are ours one by one; of the encoder those beyond relu4_1 are the ones left."""
    names = published("adain_state_dict.json")
    transfer = actupose.StyleTransfer("vgg")
    for part, key in (("encoder", "vgg_normalised"), ("decoder", "decoder")):
        state = random_state(names[key])
        torch.save(state, tmp_path / "file.pth")
        train.load_style_weights(getattr(transfer, part), tmp_path / "file.pth")
        own = getattr(transfer, part).state_dict()
        assert all(torch.equal(own[name], state[name]) for name in own)
        unused = {int(name.split(".")[0]) for name in state.keys() - own.keys()}
        assert unused == ({32, 35, 38, 42, 45, 48, 51} if part == "encoder" else set())


# Layouts -----------------------------------------------------------------------------------------------------


def test_old_files_lack_the_batch_norms_counters():
    state = {name: value for name, value in torchvision_state().items() if not name.endswith("num_batches_tracked")}
    network = actupose.PoseResNet("resnet18", 16)
    _, _, left = actupose.load_pose_weights(network, state)
    assert same(network, state, "backbone.") and "backbone.bn1.num_batches_tracked" in left


def test_regdas_files():
    """`model`: the pretrained PoseResNet whole; the adapted one, whose two heads of several layers are not ours, in part."""
    state = random_state(shapes_of("resnet18", 21))
    network = actupose.PoseResNet("resnet18", 21)
    loaded, ignored, left = actupose.load_pose_weights(network, {"model": state})
    assert len(loaded) == len(state) and not ignored and not left and same(network, state)

    adapted = {name: value for name, value in state.items() if not name.startswith("head.")}
    adapted |= {f"{head}.{name}": torch.rand(3) for head in ("head", "head_adv") for name in ("0.weight", "1.running_mean")}
    network = actupose.PoseResNet("resnet18", 21)
    before = network.head.weight.clone()
    loaded, ignored, left = actupose.load_pose_weights(network, {"model": adapted, "epoch": 1})
    assert set(left) == {"head.weight", "head.bias"} and torch.equal(network.head.weight, before)
    assert set(ignored) == {name for name in adapted if name.startswith("head")}
    assert same(network, adapted)


def cut(state, *names):
    return {name: value for name, value in state.items() if not name.startswith(names)}


@pytest.mark.parametrize("state, texts", [
    (lambda: {}, ["nothing"]),
    (lambda: {"vae.0.weight": torch.zeros(3)}, ["vae.0.weight", "PoseResNet"]),
    (lambda: {"student": {}, "teacher": None}, ["nothing"]),
    (lambda: random_state(shapes_of("resnet50")), ["(64, 64, 1, 1)", "(64, 64, 3, 3)", "another architecture"]),
    (lambda: random_state(shapes_of("resnet34")), ["backbone.layer", "this network has no"]),      # all of 18's, and more
    (lambda: random_state(shapes_of("resnet18", 21)), ["head.", "(21", "(16", "keypoints"]),
    (lambda: cut(random_state(shapes_of("resnet18")), "backbone.layer3.1.conv2"), ["layer3.1.conv2.weight", "missing"]),
    (lambda: cut(random_state(shapes_of("resnet18")), "upsampling.3"), ["upsampling.3.weight", "missing"]),
    (lambda: random_state(shapes_of("resnet18")) | {"head.bias": [0.0] * 16}, ["head.bias", "list"]),
])
def test_weights_that_do_not_fit(state, texts):
    """The error names the parameter, both shapes and what is the matter; the network is as it was."""
    network = actupose.PoseResNet("resnet18", 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        actupose.load_pose_weights(network, state())
    assert all(text in str(error.value) for text in texts), str(error.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# --weights ---------------------------------------------------------------------------------------------------


def test_imagenet_weights_are_fetched_with_their_hash(monkeypatch, capsys):
    """The published file of the architecture, by its address, checked; the network then starts from it."""
    asked, state = [], torchvision_state()

    def fetch(url, **options):
        asked.append((url, options))
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    settings = train.make_settings("demo", architecture="resnet18", weights="imagenet", image_size=32)
    weights, name = train.read_weights(settings)
    assert asked[0][0] == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert asked[0][1]["check_hash"] and asked[0][1]["weights_only"]
    network = actupose.PoseResNet("resnet18", 16)
    train.load_initial_weights(network, weights, name)
    assert same(network, state, "backbone.")
    report = capsys.readouterr().out
    assert "loaded: backbone (120)" in report and "classifier: backbone.fc.weight" in report and "head (2)" in report


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def fetch(url, **options):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    settings = train.make_settings("demo", architecture="resnet50", weights="imagenet")
    with pytest.raises(train.UserError, match="resnet50-0676ba61.pth.*no route to host.*give the file"):
        train.read_weights(settings)


def test_a_file_with_the_options_of_its_run(tmp_path):
    """UDAPE's file holds an argparse.Namespace and a learning rate schedule, which load as plain values; code does not."""
    state = random_state(shapes_of("narrow"))
    options = argparse.Namespace(lr=1e-4, lr_step=[45, 60], source="SURREAL", resize_scale=(0.6, 1.3))
    schedule = {"milestones": collections.Counter([45, 60]), "base_lrs": [1e-4]}
    torch.save({"student": state, "teacher": state, "lr_scheduler": schedule, "epoch": 60, "args": options},
               tmp_path / "best.pth")
    weights, path = train.read_weights(train.make_settings("demo", weights=str(tmp_path / "best.pth")))
    network = actupose.PoseResNet("narrow", 16)
    train.load_initial_weights(network, weights, path)
    assert same(network, state)
    with pytest.raises(train.UserError, match="best.pth"):                  # elsewhere a Namespace stays refused
        train.load_checkpoint(tmp_path / "best.pth")

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    with open(tmp_path / "evil.pth", "wb") as f:
        pickle.dump({"student": Payload()}, f, protocol=2)
    torch.save({"student": Payload()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(train.UserError, match=name):
            train.read_weights(train.make_settings("demo", weights=str(tmp_path / name)))
    assert not (tmp_path / "executed").exists()


def test_a_run_starts_from_a_file_and_resumes_without_it(tmp_path, monkeypatch, capsys):
    """--weights is recorded; what the first step sees are the file's weights; --resume needs the file no more."""
    file = tmp_path / "start.pth"
    state = random_state(shapes_of("narrow"))
    torch.save(state, file)
    whole, seen = train.train_epoch, []

    def stop(run, epoch, progress):
        seen.append({name: value.clone() for name, value in run.trainer.student.state_dict().items()})
        if epoch == 1:
            raise KeyboardInterrupt
        return whole(run, epoch, progress)

    monkeypatch.setattr(train, "train_epoch", stop)
    out = tmp_path / "r"
    assert train.main([*TINY, "--weights", str(file), "--out", str(out)]) == 130
    assert all(torch.equal(seen[0][name], value) for name, value in state.items())
    assert "loaded: backbone" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["weights"] == str(file)
    monkeypatch.setattr(train, "train_epoch", whole)
    file.unlink()
    assert train.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert train.main([*TINY, "--weights", str(file), "--out", str(tmp_path / "r2")]) == 2
    assert "start.pth: no such file" in capsys.readouterr().err

    # A run's directory is a source of weights, too: the student of its last epoch.
    weights, path = train.read_weights(train.make_settings("demo", weights=str(out)))
    network = actupose.PoseResNet("narrow", 16)
    train.load_initial_weights(network, weights, path)
    assert same(network, torch.load(out / "last.pt", weights_only=True)["student"])


@pytest.mark.parametrize("arguments, texts", [
    (["--weights", "imagenet"], ["--weights", "narrow", "resnet18"]),
    (["--weights", "no/such.pth"], ["no/such.pth"]),
    (["--weights", "."], ["last.pt"]),
    (["--weights", "r50.pth", "--architecture", "resnet18"], ["r50.pth", "layer1.0.conv1.weight", "--architecture"]),
    (["--weights", "text.pth"], ["text.pth"]),
])
def test_mistakes_get_one_line_before_anything_is_written(arguments, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(random_state(shapes_of("resnet50")), "r50.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert train.main([*TINY, *arguments, "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and all(text in error for text in texts), error
    assert not (tmp_path / "r").exists()


def test_vgg_weights_are_asked_for_before_the_data_and_not_by_a_checkpoint(tmp_path, monkeypatch):
    """A wrong --style-weights is said before datasets are opened; a run that has its networks in the checkpoint, resumed or
    evaluated elsewhere, does not need the directory."""
    class Opened(Exception):
        """The datasets' turn."""

    def opened(settings):
        raise Opened

    monkeypatch.setattr(train, "open_domains", opened)
    settings = train.make_settings(style="vgg", style_weights=str(tmp_path))
    with pytest.raises(train.UserError, match="--style-weights: .*vgg_normalised.pth is not there"):
        train.set_up(settings, torch.device("cpu"))
    with pytest.raises(Opened):
        train.set_up(settings, torch.device("cpu"), checkpoint={"style": {}}, path=tmp_path / "last.pt")
