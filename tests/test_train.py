"""Runs and the command line: the loop, the step (Fig. 4), settings, refusals, evaluate, compare."""
import functools
import json
import math
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import actupose
import data
import train
from miniatures import make_h3d, make_human36m, make_rhd, make_surreal, make_tree

TINY = ("--epochs 3 --pretrain-epochs 1 --iters-per-epoch 2 --batch-size 4 --source-count 60 --image-size 32 "
        "--target-count 30 --style-iters 2 --vae-steps 5 --bins 5 --hard-bins 2 --lr-drops 1,2 --device cpu "
        "--lr-factor 0.5").split()
# What each row of the paper's tables differs in from ACTUPose.
UDAPE = dict(curriculum="off", w_evalpose=0.0, w_cross=0.0)
SUPERVISED = dict(UDAPE, style="off")
ROWS = {"actupose": {}, "udape": UDAPE, "udape+vae-hm": dict(UDAPE, curriculum="hardest"),
        "source-only": SUPERVISED, "regda": SUPERVISED, "oracle": SUPERVISED}


def record(patch, calls, owner, *names):
    """Append (name, arguments, result) of each call of these functions of `owner` to calls."""
    for name in names:
        def spy(*arguments, name=name, function=getattr(owner, name), **options):
            result = function(*arguments, **options)
            calls.append((name, arguments, result))
            return result
        patch.setattr(owner, name, spy)


def read(path):
    """A JSON file, or the list that a file of JSON lines is."""
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def launch(tmp_path_factory):
    """`train.py TINY ...` in this process, 30 images to score. launch.looks: the batches it looked at."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def launch(out, *options):
        launch.looks.clear()
        return train.main([*TINY, "--cache", cache, "--out", str(out), *map(str, options)])

    launch.looks = []
    with pytest.MonkeyPatch.context() as patch:
        few = {key: min(n, 30) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
        patch.setattr(data.Mannequin, "DEFAULT_COUNTS", few)
        patch.setattr(train, "draw_panels", functools.partial(train.draw_panels, side=40))     # saves seconds
        record(patch, launch.looks, data.Mannequin, "__getitem__")
        yield launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory, launch):
    """A finished run by name of method or ablation, made once -> its directory, the splits it looked at."""
    @functools.cache
    def get(name):
        changes, out = train.ABLATIONS.get(name, dict(method=name)), tmp_path_factory.mktemp("runs") / name
        words = (f"--{key.replace('_', '-')}={train.show(value)}" for key, value in changes.items())
        assert launch(out, *words) == 0
        return out, {(dataset.domain, dataset.split) for _, (dataset, _), _ in launch.looks}
    return get


# --- Whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROWS, *train.ABLATIONS])
def test_every_method_and_ablation_end_to_end(name, finished):
    """One loop with parts on or off: settings, terms, samples drawn, images looked at, files of the run."""
    assert ROWS.keys() == train.METHODS.keys()
    changes, (out, looked_at) = {**ROWS, **train.ABLATIONS}[name], finished(name)
    config, result, log = (read(out / file) for file in ("config.json", "result.json", "log.jsonl"))
    assert all(config[key] == value for key, value in changes.items()) and config["amp"] in ("bf16", "off")
    w_evalpose, w_cross = changes.get("w_evalpose", 0.1), changes.get("w_cross", 0.01)
    adapts, curriculum = ROWS.get(name) is not SUPERVISED, changes.get("curriculum", "active")

    regda = {"kl", "agreement", "disagreement", "target_agreement"}
    supervised = {"epoch", "lr", "pool", "mse", "confidence", "loss"}
    adapted = supervised | {"consistency", "teacher_confidence", "kept", "hidden"} if adapts else supervised
    adapted = adapted.union(["evalpose"][:w_evalpose > 0], ["cross_domain", "pairs"][:2 * (w_cross > 0)])
    adapted = supervised - {"mse"} | regda if name == "regda" else adapted
    last = adapted.union(["val_student"], ["val_teacher"][:adapts])
    assert [set(row) for row in log] == [supervised, adapted, last]
    assert [(row["epoch"], row["lr"]) for row in log] == [(0, 1e-3), (1, 5e-4), (2, 2.5e-4)]
    assert train.load_run(out / "last.pt")["optimiser"]["param_groups"][0]["lr"] == 2.5e-4
    for row in log[:1 if name == "regda" else 3]:                                                     # Eq. 8
        extra = w_evalpose * row.get("evalpose", 0) + w_cross * row.get("cross_domain", 0)
        assert row["loss"] == pytest.approx(row["mse"] + row.get("consistency", 0) + extra, rel=1e-4)
    assert name != "no-occlusion" or log[1]["hidden"] == log[2]["hidden"] == 0

    if curriculum in ("active", "static"):
        drawn = train.load_run(out / "last.pt")["drawn"]
        assert [sum(bins) for bins in drawn] == [row["pool"] for row in log] and len(drawn[0]) == 5
        peaks = (4, 4, 4) if name == "static" else (0, 4, 4)           # g; the peak bin is drawn whole
        assert all(bins[peak] == 12 for bins, peak in zip(drawn, peaks))
        if name not in ("min-max", "static"):   # Eq. 3 with s_j = j / 4: 12 exp(-j^2 / 2), rounded up or down
            assert all(abs(n - 12 * math.exp(-j * j / 2)) < 1 for j, n in enumerate(drawn[0]))
    else:
        assert {row["pool"] for row in log} == {{"oracle": 30, "udape+vae-hm": 24}.get(name, 60)}
    trained = {"source-only": ["source"], "oracle": ["target"]}.get(name, ["source", "target"])
    assert looked_at == {("target", "val"), ("target", "test"), *((domain, "train") for domain in trained)}

    assert set(result) == set("method source target seed pck evalpose bins teacher val epochs".split())
    assert result["method"] == (name if name in ROWS else "actupose")
    assert result["val"] == log[2]["val_student"] and (result["teacher"] is not None) == adapts
    for scores in filter(None, (result, result["teacher"])):
        assert set(scores["pck"]) == {"shoulder", "elbow", "wrist", "hip", "knee", "ankle", "all"}
        assert all(0 <= value <= 100 for value in (*scores["pck"].values(), *scores["bins"]))
        assert len(scores["bins"]) == 5 and -100 <= scores["evalpose"] <= 100
    pictures, active = {path.stem for path in (out / "figures").iterdir()}, curriculum == "active"
    assert pictures - {"pairs"} == {"predictions", "bins", "complexity"}.union(
        ["similar"][name == "oracle":], ["curriculum"][:active], ["reranked"][:active and name != "no-eq4"])
    assert w_cross > 0 or "pairs" not in pictures               # an untrained network may find none, too


def test_nothing_depends_on_the_clock_or_on_workers(finished, launch, tmp_path, monkeypatch):
    """Same seed, a clock that leaps and threads that decode ahead: the same bytes."""
    monkeypatch.setattr(train, "time", Mock(time=Mock(side_effect=range(0, 10 ** 9, 1000))))
    assert launch(tmp_path, "--workers", 2) == 0
    speed = read(tmp_path / "speed.jsonl")
    assert set(speed[0]) >= {"epoch", "seconds", "images_per_second", "total_seconds", "memory_gb"}
    assert len(speed) == 3 and speed[0]["seconds"] == 1000
    for name in ("log.jsonl", "result.json", "last.pt"):
        assert (tmp_path / name).read_bytes() == (finished("actupose")[0] / name).read_bytes(), name


def test_the_curriculum_observes_and_ranks_again_at_each_epochs_end(launch, tmp_path, monkeypatch):
    """Eq. 4 gets what an epoch's steps trained on, each with its confidence; `grep "Eq. 4"` finds it."""
    calls, poses = [], data.Mannequin("source", "train", 32, 60).keypoints
    record(monkeypatch, calls, actupose.ActiveCurriculum, "sample", "observe", "rerank")
    record(monkeypatch, calls, train.Trainer, "step")
    assert launch(tmp_path, "--style", "off", "--vae-latent", 3, "--vae-width", 9) == 0
    assert train.load_run(tmp_path / "last.pt")["vae"]["encoder.4.weight"].shape == (2 * 3, 9)       # Eq. 1
    assert [name for name, _, _ in calls] == ["sample", "step", "step", "observe", "rerank"] * 3
    for e in range(3):
        sample, one, two, (_, (_, indices, confidence), _), _ = calls[5 * e:5 * e + 5]
        assert sample[1][1] == e and set(indices.tolist()) <= set(sample[2].tolist()) and len(indices) == 8
        assert torch.equal(poses[indices], torch.cat([step[1][2][1] for step in (one, two)]))
        assert torch.equal(confidence, torch.cat([step[2][1] for step in (one, two)]))
    module, loop = (Path(m.__file__).read_text() for m in (actupose, train))
    inside = module.partition("\nclass ActiveCurriculum:")[2].partition("\n# ---")[0]
    assert inside.count("Eq. 4") == module.count("Eq. 4") > 0 and loop.count("Eq. 4") == 1


class Toy(data.Mannequin):
    """A dataset with a skeleton of 30 keypoints."""
    def __init__(self, root, split, size):
        super().__init__("target", split, size, 20)
        limbs, triplets = [[k, k + 1] for k in range(29)], [[k, k + 1, k + 2] for k in range(28)]
        names, groups = [f"p{k}" for k in range(30)], {"all": [*range(30)]}
        self.skeleton = data.Skeleton(names, limbs, triplets, groups, [0, 29])
        random = torch.Generator().manual_seed(len(root))
        self.keypoints = torch.rand(20, 30, 2, generator=random) * (size - 1)
        self.visible = torch.ones(20, 30)


def test_a_skeleton_of_thirty_keypoints(launch, tmp_path, monkeypatch, capsys):
    """Nothing is sized for 16 or 21 keypoints: 26 and more crashed the first version."""
    monkeypatch.setitem(train.SOURCES, "rhd", Toy)
    monkeypatch.setitem(train.TARGETS, "h3d", Toy)
    options = "--source rhd --target h3d --source-root a --target-root bc --style off".split()
    run, picture, out = (str(tmp_path / name) for name in ("run", "x.png", "out"))
    assert launch(run, *options) == 0 and "pairs" in read(tmp_path / "run" / "log.jsonl")[1]
    Image.new("RGB", (50, 40)).save(picture)
    assert train.main(["predict", run, picture, "--out", out, "--device", "cpu"]) == 0
    found = read(tmp_path / "out" / "x.png.json")["keypoints"]
    assert [keypoint["name"] for keypoint in found] == [f"p{k}" for k in range(30)]
    capsys.readouterr()
    monkeypatch.setattr(Toy, "__len__", lambda self: 19)            # what a dataset needs is said
    assert launch(tmp_path / "bad", *options) == 2
    assert "--source rhd: Toy needs `keypoints`" in capsys.readouterr().err


@pytest.mark.parametrize("source, target", [("surreal", "lsp"), ("surreal", "human36m"), ("rhd", "h3d")])
def test_the_papers_tasks_from_their_command(source, target, tmp_path, monkeypatch):
    """--preset paper made small, on miniature trees in the exact layouts."""
    choices, hand = data.random.Random.choices, source == "rhd"
    monkeypatch.setattr(data.random.Random, "choices", lambda self, order, k: choices(self, order, k=20))
    makers = {"surreal": make_surreal, "h3d": lambda root: make_h3d(root, 40),
              "rhd": lambda root: make_rhd(root, "training", [*range(7)] * 2),
              "lsp": lambda root: make_tree(root, False, [(90 + 5 * i, 80) for i in range(6)]),
              "human36m": lambda root: make_human36m(root, {1: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 11: 1})}
    options = "--architecture narrow --weights= --style small --bins 3 --hard-bins 1 --workers 1".split()
    for role, name in (("source", source), ("target", target)):
        (tmp_path / name).mkdir()
        makers[name](tmp_path / name)
        options += [f"--{role}={name}", f"--{role}-root={tmp_path / name}"]
    assert train.main(["--preset", "paper", *TINY, *options, "--out", str(tmp_path / "run")]) == 0
    result, config = (read(tmp_path / "run" / name) for name in ("result.json", "config.json"))
    assert (result["source"], result["target"]) == (source, target)
    assert set(result["pck"]) == set((data.HAND21 if hand else data.BODY16).groups)
    assert config["rotation"] == (180 if hand else 60) and not config["subcell"] and config["ema"] == 0.999


# --- The step -----------------------------------------------------------------------------------------------


def make_trainer(**changes):
    tiny = dict(image_size=32, batch_size=4, style="off", amp="off")
    settings = train.make_settings(**{**tiny, **changes})
    trainer = train.Trainer(settings, data.BODY16, torch.device("cpu"))
    trainer.teacher = actupose.make_teacher(trainer.student)
    return trainer


def batches(size=32, n=4):
    return [data.Mannequin(domain, "train", size, n)[torch.arange(n)] for domain in ("source", "target")]


def test_the_step():
    """Eq. 8 before and after the teacher joins, its moving average, nothing sure, how many images hide."""
    trainer = make_trainer(w_udape=0.5, w_evalpose=0.3, w_cross=0.2, gamma=9.0)      # gamma: all are similar
    teacher, trainer.teacher = trainer.teacher, None
    terms, _ = trainer.step(0, batches()[0], None)
    assert set(terms) == {"mse", "confidence", "loss"} and terms["loss"] == 0.5 * terms["mse"] > 0
    trainer.teacher, before = teacher, [p.clone() for p in teacher.parameters()]
    terms, _ = trainer.step(1, *batches())
    extra = 0.3 * terms["evalpose"] + 0.2 * terms["cross_domain"]
    assert torch.isclose(terms["loss"], 0.5 * (terms["mse"] + terms["consistency"]) + extra) and extra != 0
    assert terms["cross_domain"] < 0 < terms["pairs"] <= 16 and 0 < terms["kept"] <= 0.5
    for old, new, student in zip(before, teacher.parameters(), trainer.student.parameters()):
        assert torch.allclose(new, 0.99 * old + 0.01 * student, atol=1e-7) and not torch.equal(old, student)
        assert not new.requires_grad
    terms, _ = make_trainer(mask_ratio=1.0, gamma=9.0).step(0, *batches())
    assert terms["kept"] == terms["consistency"] == terms["pairs"] == 0 < terms["mse"]
    plain, other = (make_trainer(gamma=9.0, map_sums=sums, centred=not sums).step(0, *batches())[0]
                    for sums in (True, False))
    for name in ("mse", "consistency"):                     # Eq. 8: a sum over 16 maps of 16 x 16, or a mean
        assert torch.isclose(plain[name], 16 ** 3 * other[name]) and plain["pairs"] == other["pairs"]
    assert plain["cross_domain"] < other["cross_domain"] - 0.5 * plain["pairs"]     # without the common part
    for probability, threshold, share in ((1.0, 0.0, 1), (0.0, 0.0, 0), (1.0, 1e9, 0)):
        trainer = make_trainer(occlusion=probability, occlusion_confidence=threshold, batch_size=32)
        trainer.teacher.head.bias.data.fill_(0.3)                                # every confidence is above 0
        assert trainer.step(2, *batches(n=32))[0]["hidden"] == share


def test_regdas_three_steps(monkeypatch):
    """Which parts move in A (source, all), B (target, f') and C (target, psi), by gradients of which losses.
    At the first iteration of adaptation the layer is shut: psi gets no gradient from f'."""
    for iteration in (0, 500):
        trainer, moves, gradients, calls = make_trainer(pretrain_epochs=2, iters_per_epoch=3), [], [], []
        trainer.start_regda()
        network, update = trainer.student, trainer.optimiser.step

        def step():
            before = {name: p.clone() for name, p in network.named_parameters()}
            update()
            moves.append({name.split(".")[0] for name, p in network.named_parameters()
                          if not torch.equal(p, before[name])})
            gradients.append([p.grad for p in network.backbone.parameters()])

        trainer.optimiser.step = step
        with monkeypatch.context() as patch:
            record(patch, calls, actupose, "heatmap_kl", "ground_maps", "gradient_factor")
            terms, confidence = trainer.regda_step(6 + iteration, *batches())
        psi = {"backbone", "upsampling"}
        assert calls[0][:2] == ("gradient_factor", (iteration, 68 * 3))        # after 2 of 70 epochs
        assert moves == [psi | {"head", "head_adv"}, {"head_adv"}, psi] and gradients[1][0] is None
        assert any(g.abs().max() > 0 for g in gradients[2]) == (iteration > 0)
        drawn, losses = ([c for c in calls if c[0] == name] for name in ("ground_maps", "heatmap_kl"))
        for loss, (_, _, labels), which in zip(losses[1:], drawn, (0, 1, 0)):     # ground truth, false, truth
            assert loss[1][1] is labels[which]
        assert [loss[1][3:] for loss in losses] == [(), (1e-7,), (1e-7,), (1e-7,)]
        kl, agreement, disagreement, on_target = (loss[2] for loss in losses)
        assert torch.isclose(terms["loss"], kl + 4 * agreement + disagreement + on_target)
        assert confidence.shape == (4,) and all((loss[1][2] == 1).all() for loss in losses[2:])
    network.head[-1].bias.data += 5                 # of the logits; the peak of their softmax stays
    assert train.decode(network, batches()[1][0], trainer.settings, trainer.device)[1].max() <= 1


def test_style_is_that_of_the_other_domains_sample():
    """As augmented, not yet restyled itself; one alpha per batch; each direction with its own probability."""
    trainer, calls, fed = make_trainer(style_prob=1.0), [], []
    forward, random = trainer.forward, train.draw_step(0, 4, 4, 16, "cpu")
    trainer.forward = lambda network, images: fed.append(images) or forward(network, images)
    trainer.style_transfer = lambda *arguments: calls.append(arguments) or arguments[0] + 1
    trainer.step(4, *batches())
    (source, look, alpha), (target, other_look, beta) = calls
    assert torch.equal(look, target) and torch.equal(other_look, source) and not torch.equal(source, target)
    assert (alpha, beta) == (random.alpha_source, random.alpha_target) and 0 <= alpha != beta < 1
    assert torch.equal(fed[0], source + 1) and torch.equal(fed[1], target + 1)      # student, teacher
    low, high = sorted((random.restyle_source, random.restyle_target))
    trainer.settings.style_prob = (low + high) / 2
    trainer.step(4, *batches())
    assert len(calls) == 3 and torch.equal(calls[2][0], source) == (random.restyle_source == low)


def test_random_numbers_are_a_function_of_seed_and_step(monkeypatch):
    """And of nothing else: not of global generators; each of several processes has its slice of them."""
    def draw(seed=3, step=5):
        numbers = vars(train.draw_step(seed, step, 6, 30, "cpu"))
        return {name: torch.as_tensor(value) for name, value in numbers.items()}

    whole, others = draw(), (draw(step=6), draw(seed=4))
    torch.manual_seed(1)
    np.random.seed(1)
    again, shares = draw(), []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(train, "rank", lambda: number)
        shares.append(draw())
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert not any(torch.equal(value, other[name]) for other in others), name
        one, two = (share[name] for share in shares)                                 # or one number per batch
        assert torch.equal(torch.cat([one, two]), value) if value.ndim else one == two == value, name
    numbers = torch.cat([value.flatten() for value in whole.values()])
    assert 0 <= numbers.min() and numbers.max() < 1 and len(numbers.unique()) > 0.99 * len(numbers)


def test_poses_are_compared_as_they_stand_in_the_image(monkeypatch):
    """Eq. 7: with a network that is always right, the source pose compared is the image's, not the view's."""
    trainer, (source, target) = make_trainer(image_size=64, batch_size=8, gamma=9.0), batches(64, 8)
    calls = []
    record(monkeypatch, calls, train, "render_heatmaps")
    record(monkeypatch, calls, train.kernels, "triplet_angle_distance")
    trainer.forward = lambda network, _: (calls[0][2][0] + 0 * network.head.weight.sum(), torch.ones(8, 4))
    terms, _ = trainer.step(3, source, target)
    (_, _, (_, weight)), (_, (pose, *_), _) = calls
    error = (pose - source[1]).norm(dim=-1)[weight > 0]
    assert terms["cross_domain"] == -terms["pairs"] < 0                            # the features are equal
    assert len(error) > 80 and error.quantile(0.9) < 1.0 and terms["mse"] == 0       # pixels; a cell is 2


# --- Settings and refusals ----------------------------------------------------------------------------------


def test_the_papers_preset_and_what_wins(monkeypatch):
    """§4 and the base method's published settings; what is given wins; --amp auto asks the processor."""
    s = train.make_settings("paper", style_weights="x")
    assert (s.architecture, s.weights, s.image_size, s.sigma, s.subcell) == (
        "resnet101", "imagenet", 256, 2.0, False)
    assert (s.epochs, s.pretrain_epochs, s.iters_per_epoch, s.batch_size) == (70, 40, 500, 32)
    assert (s.lr, s.lr_drops, s.lr_factor, s.ema, s.mask_ratio) == (1e-4, (44.0, 59.0), 0.1, 0.999, 0.5)
    assert (s.bins, s.pace, s.spread, s.w_udape, s.w_evalpose, s.w_cross) == (25, 2.0, 0.25, 1.0, 0.1, 0.01)
    assert (s.style, s.style_prob, s.occlusion, s.occlusion_confidence) == ("vgg", 0.5, 0.5, 0.9)
    assert (s.rotation, s.shear, s.translate, s.jitter) == (60, 30, 0.05, 0.25)
    assert (s.zoom, s.crop) == ((0.6, 1.3), (0.6, 1.0))
    assert train.make_settings("paper", method="source-only").style == "off"
    s = train.make_settings("paper", method="source-only", style="off", lr=0.5)
    assert (s.style, s.lr, s.sigma, s.w_cross) == ("off", 0.5, 2.0, 0.0)
    hand = train.make_settings(source="mannequin-hand", gamma=0.5)
    assert (hand.target, hand.gamma) == ("mannequin-hand-wild", 0.5)
    for native, auto in ((True, "bf16"), (False, "off")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: native)
        resolved = [train.resolve_amp(train.make_settings(amp=amp), torch.device("cpu")).amp
                    for amp in ("auto", "bf16", "off")]
        assert resolved == [auto, "bf16", "off"]


# "=>": what the answer says. Without it, it names the first option.
MISTAKES = """
--method actupos; --epochs many; --epochs 0 => --epochs: must be at least 1, got 0; --seed -1; --lr nan;
--lr 0; --seed 99999999999999999999; --sigma inf; --lr-drops 5,nan; --ema 1.5; --vae-kl -1; --crop 0,1;
--crop 1,0.6; --crop 0.6,1.3 => at most 1; --zoom 1; --zoom 1x2; --subcell yes; --image-size 65;
--method udape+vae-hm --hard-bins 26 => --hard-bins: must be at most; --preset demi; --style-weights x;
--source-root x; --shoulders left; --epochs 20 => --pretrain-epochs; --style vgg => --style-weights;
--device warp9 => --device: 'warp9'; --source surreal => --source-root; compare --tasks a --seeds 1 => leave;
--source mannequin-wild => --target: must differ from --source;
--target lsp --target-root no/place => --target-root: no/place/joints.mat; --resume --out no/run => no/run;
--source mannequin-hand --target mannequin-wild --source-count 60 => two domains of bodies or two of hands;
--bins 61 --hard-bins 1 --source-count 60 => --bins: 61 is more than the 60 training images of the source;
--batch-size 31 --source-count 60 --target-count 30 => --batch-size: 31 is more than the 30;
--hard-bins 8 --method udape+vae-hm --source-count 60 --vae-steps 1 --image-size 32;
--epochz 3 => did you mean --epochs?; --metod=udape => did you mean --method?; evalate x => unknown command;
evaluate no/run => no/run; evaluate => run; compare --tasks no/run => --tasks: no/run holds;
compare --methods udap => --methods; compare --seeds a => --seeds; compare --seeds nan => --seed: must be of;
compare --jobs 0 => --jobs; compare --method udape => did you mean --methods?;
compare --sweep pase=1 => --sweep: 'pase' is no setting; compare --sweep pace=1,x => --sweep: use NAME=;
compare --sweep seed=1 => --sweep: 'seed' is no setting; compare --sweep pace => --sweep;
compare --sweep source=lsp => 'source' is no setting; compare --sweep pace=0 => --pace: must be above 0;
compare --tasks a --lr 1 => leave; --method udape --w-cross 1 => --w-cross: --method udape has 0"""


@pytest.mark.parametrize("mistake", [" ".join(mistake.split()) for mistake in MISTAKES.split(";")])
def test_mistakes_are_answered_in_one_line(mistake, capsys, tmp_path, monkeypatch):
    """On stderr, naming the option; exit status 2; nothing written."""
    monkeypatch.chdir(tmp_path)
    arguments, _, text = mistake.partition(" => ")
    assert train.main(arguments.split()) == 2
    said = capsys.readouterr()
    assert (text or arguments.split()[0]) in said.err and said.err.startswith("train.py: ")
    assert said.err.count("\n") == 1 and not said.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_nan_stops_the_run_and_names_the_batch(broken, launch, tmp_path, capsys, monkeypatch):
    """At the step where it happens, the second of epoch 1; the last good state stays."""
    losses, mse = [], actupose.heatmap_mse

    def spoil_loss(*arguments):
        losses.append(mse(*arguments) * (math.nan if broken == "loss" and len(losses) == 3 else 1))
        return losses[-1]

    def spoil_weight(network):
        network.head.bias.data[0] = math.inf if broken == "weight" and len(losses) == 4 else 0

    monkeypatch.setattr(actupose, "heatmap_mse", spoil_loss)
    monkeypatch.setattr(train, "average_gradients", spoil_weight)
    assert launch(tmp_path, "--method", "source-only") == 2
    error, state = capsys.readouterr().err, train.load_run(tmp_path / "last.pt")
    _, (source, batch), _ = launch.looks[-1]
    assert "step 3: " in error and ", ".join(source.names(batch)) in error and "--lr" in error
    assert error.count("\n") == 1 and "last.pt keeps the last good state" in error
    assert len(state["log"]) == len(read(tmp_path / "log.jsonl")) == 1
    assert all(value.isfinite().all() for value in state["student"].values())


# --- evaluate and compare -----------------------------------------------------------------------------------


def test_evaluate_scores_a_run_again(finished, tmp_path, capsys):
    """The same numbers; says where result.json holds others, the run is unfinished, config.json damaged."""
    shutil.copytree(finished("actupose")[0], tmp_path / "r")
    path, command = tmp_path / "r" / "result.json", ["evaluate", str(tmp_path / "r"), "--device", "cpu"]
    assert train.main(command) == 0
    result, said = read(path), capsys.readouterr().out
    assert "the same as" in said
    assert f"{result['pck']['all']:.1f}" in said and f"{result['evalpose']:.1f}" in said
    result["teacher"]["pck"]["all"] += 1
    path.write_text(json.dumps(result))
    assert train.main(command) == 2 and "result.json: holds other scores" in capsys.readouterr().err
    path.unlink()
    assert train.main(command) == 0 and "after 3 of 3 epochs" in capsys.readouterr().out
    for text in ("", "{", "[]", '{"lr": "fast"}', '{"lr": NaN}', '{"zoom": [1, "x"]}', '{"bins": 0}'):
        (tmp_path / "r" / "config.json").write_text(text)
        assert train.main(command) == 2, text
        error = capsys.readouterr().err
        assert "config.json" in error and error.count("\n") == 1


@pytest.fixture
def compare(tmp_path, capsys, monkeypatch):
    """`compare` into tmp_path -> its status, rows of the table (cells), stderr. The processes run here, in
    turn; compare.started: their directories, and whether they go on."""
    def process(command, **_):
        out = next(Path(word).name for word in command if word.startswith("--out="))
        compare.started.append((out, "--resume" in command))
        status = train.main(command[2:])
        return Mock(returncode=status, poll=lambda: status)

    def compare(*options):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(train.subprocess, "Popen", process)
            patch.setattr(train, "time", Mock(time=time.time))
            status = train.main(["compare", *TINY, "--out", str(tmp_path), *options])
        said = capsys.readouterr()
        rows = [line[2:-2].split(" | ") for line in said.out.splitlines() if line.startswith("| ")]
        return status, rows, said.err

    compare.started = []
    return compare


def test_compare_runs_what_is_missing(launch, compare, tmp_path, monkeypatch):
    """What is finished is left alone, what was interrupted goes on, other settings are refused."""
    options = ["--style", "off", "--epochs", "2", "--zoom", "0.6123456,1.3"]
    rows = ["--methods", "source-only,no-eq4", "--seeds", "0,1", *options]
    assert launch(tmp_path / "source-only-s0", "--method", "source-only", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_speed", Mock(side_effect=KeyboardInterrupt))      # after the first epoch
        assert launch(tmp_path / "no-eq4-s1", "--rescoring", "off", "--seed", 1, *options) == 130
    status, table, _ = compare(*rows)
    new = [("source-only-s1", False), ("no-eq4-s0", False), ("no-eq4-s1", True)]
    assert status == 0 and compare.started == new
    a, b = (read(tmp_path / f"source-only-s{seed}" / "result.json")["pck"]["all"] for seed in (0, 1))
    assert [cells[:2] for cells in table[1:]] == [["source-only", "2"], ["no-eq4", "2"]]
    assert f"**{(a + b) / 2:.1f}** ± {abs(a - b) / math.sqrt(2):.1f}" in table[1]
    assert compare(*rows)[:2] == (0, table) and compare(*rows, "--lr", "0.5")[:2] == (2, [])
    assert compare.started == new


def test_tasks_side_by_side(tmp_path, capsys, monkeypatch):
    """Table 2 by hand: of finished runs alone; PoseDA is quoted where the paper has a figure."""
    def finish(folder, name, value, target, source="surreal"):
        result = dict(source=source, target=target, pck={"all": value})
        (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / name / "result.json").write_text(json.dumps(result))

    monkeypatch.chdir(tmp_path)
    for seed, value in enumerate((60.0, 62.0)):
        finish("a", f"actupose-s{seed}", value, "lsp")
        finish("a", f"actupose-spread=2-s{seed}", 99.0, "lsp")                         # a sweep is no method
    finish("a", "oracle-s0", 80.0, "lsp")
    finish("b", "actupose-s0", 50.0, "mannequin-wild", "mannequin")
    (tmp_path / "b" / "udape-s0").mkdir()                                            # not finished
    assert train.main(["compare", "--tasks", "a,b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| method | a: surreal → lsp | b: mannequin → mannequin-wild |", "|---|---|---|",
        "| actupose | 61.0 ± 1.4 (2) | 50.0 (1) |",
        "| oracle | 80.0 (1) (trained on its test images, unless this is LSP Extended) | - |",
        "| PoseDA (quoted from the paper) | 77.9 | - |"]
    assert train.main(["compare", "--tasks", "b"]) == 0 and "PoseDA" not in capsys.readouterr().out
    finish("b", "actupose-s1", 50.0, "lsp")
    assert train.main(["compare", "--tasks", "b"]) == 2


def test_sweeps_and_the_panel(finished, compare, tmp_path, monkeypatch):
    """A row, run and point per value (Fig. 10). The default's value or an ablation's is that row's run, also
    where its config.json is older than a setting. Fig. 8: six test images by those whose last.pt is there."""
    panels, one = [], ("--seeds", "0")
    for name in ("udape", "actupose"):
        shutil.copytree(finished(name)[0], tmp_path / f"{name}-s0")
    old = read(tmp_path / "actupose-s0" / "config.json")
    del old["shoulders"]
    (tmp_path / "actupose-s0" / "config.json").write_text(json.dumps(old))
    record(monkeypatch, panels, train, "draw_panels")
    status, rows, _ = compare(*one, "--sweep", "bins=1,5", "--sweep", "w-cross=0.01,0")
    values = ["bins=1", "bins=5", "w_cross=0.01", "w_cross=0"]
    assert status == 0 and [cells[0] for cells in rows[1:]] == [f"actupose {value}" for value in values]
    assert [out for out, _ in compare.started] == ["actupose-bins=1-s0", "no-cross-domain-s0"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"sweep-bins.png", "sweep-w_cross.png"}
    test, val = (read(tmp_path / "actupose-s0" / "result.json")[key] for key in ("pck", "val"))
    at = rows[0].index("val")
    assert rows[2][at - 1:at + 1] == [f"**{test['all']:.1f}**", f"{val:.1f}"]
    status, rows, errors = compare(*one, "--methods", "udape,actupose")
    _, (_, drawn, columns, _, titles), _ = panels[-1]
    assert (status, len(rows), errors) == (0, 3, "") and "val" not in rows[0]
    assert columns == 3 and titles == ["ground truth", "udape", "actupose"] and len(drawn) == 18
    images = data.Mannequin("target", "test", 32, 30)
    for i, (caption, image, (keypoints, *_)) in enumerate(drawn):
        assert torch.equal(image, images[[i // 3]][0][0])
        own = torch.equal(keypoints, images.keypoints[i // 3])
        assert own and not caption if i % 3 == 0 else caption.startswith("PCK ") and "  EvalPose " in caption
    assert Image.open(tmp_path / "panel.png").size == ((12 + 3 * 52) // 2, (44 + 8 + 6 * 92) // 2)
    (tmp_path / "udape-s0" / "last.pt").unlink()
    status, rows, errors = compare(*one, "--methods", "udape,actupose")
    assert (status, len(rows)) == (0, 3) and "png is without udape" in errors
    assert panels[-1][1][4] == ["ground truth", "actupose"] and len(compare.started) == 2
