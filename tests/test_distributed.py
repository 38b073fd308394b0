"""Several processes (torchrun, gloo, two on a CPU) take the steps of one, write once and end together."""
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import actupose
import data
import train
from tiny_runs import SCRIPT, child_environment, files_in, read

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
# Weights hardly change, or rounding would grow from step to step.
OPTIONS = """--epochs 3 --pretrain-epochs 1 --iters-per-epoch 4 --batch-size 6 --image-size 32 --lr 1e-9
             --source-count 60 --target-count 30 --style-iters 2 --vae-steps 5 --bins 5 --hard-bins 5
             --gamma 1.2 --occlusion 1 --occlusion-confidence 0 --amp off --device cpu""".split()

# train.py with BatchNorm frozen, which on CPUs would look at each process's share alone. Takes a list of
# words per run. Keeps each step's terms, confidences, gradient and first keypoints in OUT.steps. Process 1
# fails if it writes, and with FAULT.
COMMAND = SCRIPT + """
import json
import os

torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
command = train.command
found = []

def observe(step):
    def observed(trainer, number, source_batch, target_images):
        if number == 5 and train.rank() == 1 and "FAULT" in os.environ:
            raise data.DataError("im1.jpg: cannot be read")
        terms, confidence = step(trainer, number, source_batch, target_images)
        means = train.gather(torch.stack(list(terms.values()))[None]).mean(0)
        gradient = torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None])
        first = train.gather(source_batch[1][:, 0])
        found.append((dict(zip(terms, means.tolist())), confidence, gradient, first))
        return terms, confidence
    return observed

def kept(runs):
    if train.rank() == 1:
        train.replacing = train.write_text = train.open = data.replacing = lambda *arguments: 1 / 0
    for words in map(json.loads, runs):
        found.clear()
        command(words)
        torch.save(found, words[-1] + f".steps{train.rank()}")
    return 0

train.Trainer.step = observe(train.Trainer.step)
train.RegDATrainer.adversarial_step = observe(train.RegDATrainer.adversarial_step)
train.command = kept
sys.exit(train.main(sys.argv[1:]))
"""


def run(processes, *runs, **environment):
    """Exit status, stdout and stderr of COMMAND. runs: a list of words each, its directory last."""
    script = runs[0][-1].with_suffix(".py")
    script.write_text(COMMAND)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [script, *(json.dumps(words, default=str) for words in runs)]
    done = subprocess.run(command, env=child_environment(**environment), capture_output=True, text=True,
                          timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of the same run by one process and by two, from weights as after some training.

    Each has a neighbour DIRECTORY-regda, by the same processes.
    """
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    state = actupose.PoseResNet("narrow", 16).state_dict()
    for name in [name for name, value in state.items() if value.ndim == 4]:
        state[name] += (0.4 if name == "head.weight" else 0.05) * torch.randn(state[name].shape)
    torch.save(state, folder / "start.pth")
    options = [*OPTIONS, "--weights", folder / "start.pth"]
    for processes in (1, 2):
        out = folder / f"of-{processes}"
        regda = ["--method", "regda", "--epochs", "2", "--out", folder / f"of-{processes}-regda"]
        status, output, errors = run(processes, [*options, "--out", out], [*options, *regda])
        assert status == 0, errors
        assert output.count("PCK@0.05") == output.count("weights from") == 2            # one process speaks
    return folder / "of-1", folder / "of-2"


def test_two_processes_do_what_one_does(runs):
    """Terms of Eq. 8 are means over the batch or a sum over its pairs: with half of it each, two processes
    find the same terms, confidences in the batch's order and gradient, restyled or not, in both phases.
    So the epochs, the re-ranking and the log are the same, in one set of files that process 0 writes."""
    alone = torch.load(f"{runs[0]}.steps0", weights_only=True)
    settings = train.make_settings(batch_size=6)
    coins = [train.draw_step(settings, step, 16, "cpu").restyle_source < 0.5 for step in range(12)]
    assert len({(step < 4, coin) for step, coin in enumerate(coins)}) == 4        # both coins in both phases
    assert all(terms["hidden"] > 0.5 and 0.1 < terms["kept"] < 0.9 for terms, *_ in alone[4:])
    assert sum(terms["pairs"] > 0 for terms, *_ in alone[4:]) > 4
    for together in (torch.load(f"{runs[1]}.steps{rank}", weights_only=True) for rank in (0, 1)):
        for ours, theirs in zip(alone, together, strict=True):
            assert theirs[0] == pytest.approx(ours[0], rel=1e-4, abs=1e-6)
            assert torch.allclose(theirs[1], ours[1], rtol=1e-4) and ours[1].std() > 0.1 * ours[1].mean()
            assert (theirs[2] - ours[2]).norm() < 1e-4 * ours[2].norm()

    assert files_in(runs[0]) == files_in(runs[1])
    rows = [read(out / "log.jsonl") for out in runs]
    assert len(rows[0]) == 3 == len(read(runs[1] / "speed.jsonl"))
    assert all(theirs == pytest.approx(ours, rel=1e-4, abs=1e-6) for ours, theirs in zip(*rows, strict=True))

    # Each sample's confidence counts by its epoch's mean; samples are known by their first keypoint.
    keypoints = data.Mannequin("source", "train", 32, 60).keypoints[:, 0]
    relative = torch.ones(60)
    for epoch in alone[:4], alone[4:8], alone[8:]:
        confidence = torch.cat([confidence for _, confidence, *_ in epoch]).clamp(0.05, 1.0)
        seen = (torch.cat([first for *_, first in epoch])[:, None] == keypoints).all(-1)
        for sample, value in zip(seen.nonzero()[:, 1], confidence / confidence.mean(), strict=True):
            relative[sample] = value
    states = [train.load_run(out / "last.pt")["curriculum"] for out in runs]
    assert states[0]["drawn"] == states[1]["drawn"] and len(relative.unique()) > 10
    for state in states:
        assert torch.allclose(state["relative"], relative, rtol=1e-4)


def test_regda_in_two_processes(runs):
    """The same terms, and in step C the same gradient of psi, which the others' parts have no share in."""
    found = [torch.load(f"{out}-regda.steps0", weights_only=True) for out in runs]
    for ours, theirs in zip(*found, strict=True):
        assert theirs[0] == pytest.approx(ours[0], rel=1e-4, abs=1e-6)
        assert theirs[2].shape == ours[2].shape and (theirs[2] - ours[2]).norm() <= 1e-3 * ours[2].norm()
    assert "kl" in ours[0] and len(found[0]) == 8 and ours[2].norm() > 0


def test_what_several_processes_refuse(monkeypatch):
    """Under torchrun `evaluate` is refused, and a batch that the processes cannot share equally."""
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for words, text in ("evaluate x", "evaluate: .* without torchrun"), ("--batch-size 9", "--batch-size: 9"):
        with pytest.raises(train.UserError, match=text):
            train.command(words.split())


def test_an_error_in_one_process_ends_all_and_one_process_goes_on(launch, tmp_path):
    """Process 1 alone cannot read an image: all end, with its message and a status other than 0. A single
    process then goes on where the run was saved."""
    out = tmp_path / "r"
    status, _, errors = run(2, [*OPTIONS, "--out", out], FAULT="1")
    before = (out / "log.jsonl").read_text()
    assert status != 0 and "train.py: im1.jpg: cannot be read" in errors and before.count("\n") == 1
    assert not list(out.glob("*.tmp"))
    assert train.main(["--resume", "--device", "cpu", "--out", str(out)]) == 0
    after = (out / "log.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 3
    assert read(out / "result.json")["epochs"] == 3
