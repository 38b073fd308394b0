"""Several processes (torchrun, gloo, two on a CPU) take the steps of one, write once and end together."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import actupose
import data
import train
from tiny_runs import SCRIPT, read

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
# Weights hardly change, or rounding would grow from step to step.
OPTIONS = """--epochs 3 --pretrain-epochs 1 --iters-per-epoch 4 --batch-size 6 --source-count 60
          --style-iters 2 --target-count 30 --vae-steps 5 --bins 5 --hard-bins 5 --image-size 32 --amp off --device cpu
          --lr 1e-9 --gamma 1.2 --occlusion 1 --occlusion-confidence 0""".split()

# train.py with BatchNorm frozen, which on CPUs would look at each process's share alone. Keeps each step's
# terms, confidences, gradient and first keypoints in OUT.steps. Process 1 fails if it writes, and with FAULT.
COMMAND = SCRIPT + """
import os
import torch

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

def kept(arguments):
    if train.rank() == 1:
        train.replacing = train.write_text = train.open = data.replacing = lambda *arguments: 1 / 0
    command(arguments)
    torch.save(found, arguments[-1] + f".steps{train.rank()}")
    return 0

train.Trainer.step = observe(train.Trainer.step)
train.RegDATrainer.adversarial_step = observe(train.RegDATrainer.adversarial_step)
train.command = kept
sys.exit(train.main(sys.argv[1:]))
"""


def run(processes, *arguments, **environment):
    """Exit status, stdout and stderr of COMMAND, beside the directory that the last argument names."""
    script = arguments[-1].with_suffix(".py")
    script.write_text(COMMAND)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
                   **environment}
    environment.pop("TRITON_INTERPRET", None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *torchrun * (processes > 1), script, *arguments], env=environment,
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of the same run by one process and by two, from weights as after some training."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    state = actupose.PoseResNet("narrow", 16).state_dict()
    for name in [name for name, value in state.items() if value.ndim == 4]:
        state[name] += (0.4 if name == "head.weight" else 0.05) * torch.randn(state[name].shape)
    torch.save(state, folder / "start.pth")
    for processes in (1, 2):
        status, output, errors = run(processes, *OPTIONS, "--weights", folder / "start.pth", "--out",
                                     folder / f"of-{processes}")
        assert status == 0, errors
        assert output.count("PCK@0.05") == output.count("weights from") == 1            # one process speaks
    return folder / "of-1", folder / "of-2"


def test_two_processes_do_what_one_does(runs):
    """Terms of Eq. 8 are means over the batch or a sum over its pairs: with half of it each, two processes
    find the same terms, confidences in the batch's order and gradient, restyled or not, in both phases.
    So the epochs, the re-ranking and the log are the same, in one set of files that process 0 writes."""
    alone = torch.load(f"{runs[0]}.steps0", weights_only=True)
    settings = train.make_settings(batch_size=6)
    coins = [train.draw_step(settings, step, 16, "cpu").restyle_source < 0.5 for step in range(12)]
    assert {(step < 4, coin) for step, coin in enumerate(coins)} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert all(terms["hidden"] > 0.5 and 0.1 < terms["kept"] < 0.9 for terms, *_ in alone[4:])
    assert sum(terms["pairs"] > 0 for terms, *_ in alone[4:]) > 4
    for together in (torch.load(f"{runs[1]}.steps{rank}", weights_only=True) for rank in (0, 1)):
        for ours, theirs in zip(alone, together, strict=True):
            assert theirs[0] == pytest.approx(ours[0], rel=1e-4, abs=1e-6)
            assert torch.allclose(theirs[1], ours[1], rtol=1e-4) and ours[1].std() > 0.1 * ours[1].mean()
            assert (theirs[2] - ours[2]).norm() < 1e-4 * ours[2].norm()

    files = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in runs]
    rows = [read(out / "log.jsonl") for out in runs]
    assert files[0] == files[1] and len(rows[0]) == 3 == len(read(runs[1] / "speed.jsonl"))
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


def test_regda_in_two_processes(runs, tmp_path):
    """The same terms, and in step C the same gradient of psi, which the others' parts have no share in."""
    found = []
    for processes in (1, 2):
        out = tmp_path / f"of-{processes}"
        options = "--method", "regda", "--epochs", "2", "--weights", runs[0].parent / "start.pth"
        assert run(processes, *OPTIONS, *options, "--out", out)[0] == 0
        found.append(torch.load(f"{out}.steps0", weights_only=True))
    for ours, theirs in zip(*found, strict=True):
        assert theirs[0] == pytest.approx(ours[0], rel=1e-4, abs=1e-6)
        assert theirs[2].shape == ours[2].shape and (theirs[2] - ours[2]).norm() <= 1e-3 * ours[2].norm()
    assert "kl" in ours[0] and len(found[0]) == 8 and ours[2].norm() > 0


def test_what_several_processes_refuse(monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for words, text in ("evaluate x", "evaluate: .* without torchrun"), ("--batch-size 9", "--batch-size: 9"):
        with pytest.raises(train.UserError, match=text):
            train.command(words.split())


def test_an_error_in_one_process_ends_all_and_one_process_goes_on(tmp_path):
    """What process 1 alone cannot read: its message, a status that is not 0, nobody waits for ever. A single
    process takes up the run where it was saved."""
    status, _, errors = run(2, *OPTIONS, "--out", tmp_path / "r", FAULT="1")
    before = (tmp_path / "r" / "log.jsonl").read_text()
    assert status != 0 and "train.py: im1.jpg: cannot be read" in errors and before.count("\n") == 1
    assert not list((tmp_path / "r").glob("*.tmp"))
    status, _, errors = run(1, "--resume", "--device", "cpu", "--out", tmp_path / "r")
    after = (tmp_path / "r" / "log.jsonl").read_text()
    assert status == 0 and after.startswith(before) and after.count("\n") == 3, errors
    assert read(tmp_path / "r" / "result.json")["epochs"] == 3
