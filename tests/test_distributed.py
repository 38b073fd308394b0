"""Several processes (torchrun, gloo, two CPU processes): they follow a single one, end together, and go on in another number.

Every term of Eq. 8 is a mean over the samples of a batch, or a sum over pairs of the whole batch: so two processes with
half the batch each must find the same terms and the same gradient, but for rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import actupose
import data
import train

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
TINY = ["--epochs", "4", "--pretrain-epochs", "2", "--iters-per-epoch", "4", "--batch-size", "6", "--source-count", "60",
        "--target-count", "30", "--style", "off", "--vae-steps", "5", "--image-size", "32", "--device", "cpu"]
# Validation and test splits of 19 images, which two processes cannot share evenly.
MAIN = """
import os, sys
import data, train
data.Mannequin.DEFAULT_COUNTS = {key: min(n, 19) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
train.draw_figures = lambda run, scores, predictions, folder: folder.mkdir() or (folder / train.LAST_PICTURE).touch()
fault, whole = os.environ.get("FAULT"), train.Trainer.step       # of process 1, in the second step of the first epoch

def step(trainer, number, *batches):
    if number == 1 and train.rank() == 1 and fault == "unreadable":
        raise data.DataError("im1.jpg: cannot be read")
    terms, confidence = whole(trainer, number, *batches)
    if number == 1 and train.rank() == 1 and fault == "not finite":
        terms["mse"] = terms["mse"] * float("nan")
    return terms, confidence

train.Trainer.step = step
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""

# What one process, and each of two, computes: terms and gradients of single steps from the same weights, before and
# after the teacher has joined, and predictions of a dataset of odd size.
STEPS = """
import os
import sys
import torch
import torch.distributed as dist
import actupose, data, train

def compute(**more):
    settings = train.make_settings("demo", style="off", batch_size=8, image_size=32, gamma=0.8, **more)
    trainer = train.Trainer(settings, data.BODY16, None, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():                           # as after some training: heatmaps with maxima that stand out
        for parameter in trainer.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    source, target = (data.Mannequin(domain, "train", 32, 16) for domain in ("source", "target"))
    weights = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    found = {}
    for step, phase in enumerate(("pretraining", "adaptation")):
        if phase == "adaptation":
            trainer.teacher = actupose.make_teacher(trainer.student)
        indices = train.share(torch.arange(8) + 8 * step)
        trainer.student.load_state_dict(weights)
        terms, confidence = trainer.step(step, (indices, *source[indices]), (indices, *target[indices]))
        found[phase] = {
            "terms": train.mean_of_processes(terms), "confidence": train.gather(confidence),
            "gradient": torch.cat([p.grad.flatten() for p in trainer.student.parameters()]),
            "statistics": torch.cat([b.float().flatten() for b in trainer.student.buffers()])}
    trainer.student.load_state_dict(weights)
    found["predictions"] = torch.cat(trainer.predict(trainer.student, data.Mannequin("target", "val", 32, 7), 2)[:1])
    return found

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"synchronised": compute(), "own": compute(sync_batchnorm=False)}
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    os._exit(0)                                     # as train.main ends one of several processes
"""


def torchrun(processes, script, *arguments):
    """The command that starts `script` in several processes, as the README's does."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script),
            *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("TRITON_INTERPRET", None)


def run(command, timeout=100, **environment):
    """The finished process of a command, its output as text."""
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
                          timeout=timeout)


def said(errors):
    """Of what several processes and torchrun wrote on stderr, the lines of train.py."""
    return [line for line in errors.splitlines() if line.startswith("train.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with MAIN and STEPS as scripts."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "main.py").write_text(MAIN)
    (folder / "steps.py").write_text(STEPS)
    return folder


@pytest.fixture(scope="module")
def together(folder):
    """A run of two processes that nothing interrupts."""
    done = run(torchrun(2, folder / "main.py", *TINY, "--cache", folder / "cache", "--out", folder / "together"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PCK@0.05") == 1 and "(process" not in done.stderr        # one of them speaks
    return folder / "together"


def test_two_processes_take_the_step_of_one(folder):
    """Terms of Eq. 8, the gradient after averaging, confidences in the batch's order and BatchNorm's statistics."""
    done = run(torchrun(2, folder / "steps.py", folder / "found.pt"))
    assert done.returncode == 0, done.stderr
    two = torch.load(folder / "found.pt", weights_only=True)
    scope = {"__name__": "one"}
    exec(STEPS, scope)
    one = scope["compute"]()
    assert one["adaptation"]["terms"]["pairs"] > 4 and one["adaptation"]["terms"]["kept"] > 0.1
    for phase in ("pretraining", "adaptation"):
        ours, theirs = one[phase], two["synchronised"][phase]
        for name, value in ours["terms"].items():
            torch.testing.assert_close(theirs["terms"][name], value.float(), rtol=1e-4, atol=1e-4, msg=f"{phase} {name}")
        for name in ("confidence", "statistics"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)
        difference = (theirs["gradient"] - ours["gradient"]).norm() / ours["gradient"].norm()
        assert difference < 1e-3, f"{phase}: {difference}"
        # With each process's own BatchNorm it is another gradient: the test can tell.
        own = two["own"][phase]
        assert (own["gradient"] - ours["gradient"]).norm() / ours["gradient"].norm() > 10 * difference
        assert (own["statistics"] - ours["statistics"]).abs().max() > 1e-3
    torch.testing.assert_close(two["synchronised"]["predictions"], one["predictions"], rtol=1e-5, atol=1e-4)


def test_a_run_of_two_processes_follows_that_of_one(together, folder):
    """The same epochs are drawn; losses start equal and stay close; the scores are those of every image once."""
    done = run([sys.executable, folder / "main.py", *TINY, "--cache", folder / "cache", "--out", folder / "alone"])
    assert done.returncode == 0, done.stderr
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (folder / "alone", together)]
    for alone, two in zip(*logs):
        assert alone.keys() == two.keys()
        assert two["pool"] == alone["pool"] and two["peak_bin"] == alone["peak_bin"]
        assert two["mse"] == pytest.approx(alone["mse"], rel=0.05)
    assert logs[1][0]["mse"] == pytest.approx(logs[0][0]["mse"], rel=1e-3)
    assert logs[1][0]["confidence"] == pytest.approx(logs[0][0]["confidence"], rel=0.03)
    states = [torch.load(out / "last.pt", weights_only=True) for out in (folder / "alone", together)]
    assert states[0]["drawn"][0] == states[1]["drawn"][0]
    drawn = [state["curriculum"]["confidence"] > 0 for state in states]      # of the samples that have been drawn
    assert (drawn[0] == drawn[1]).float().mean() > 0.9 and 0 < drawn[0].float().mean() < 1

    done = run([sys.executable, folder / "main.py", "evaluate", together])    # one process, the whole test split
    assert done.returncode == 0 and "the same as" in done.stdout, done.stdout + done.stderr


def children(process):
    """Process numbers of a process's children."""
    path = Path(f"/proc/{process}/task/{process}/children")
    if not path.exists():
        pytest.skip("needs /proc to find the processes that torchrun starts")
    return [int(number) for number in path.read_text().split()]


def start(folder, out, arguments):
    """torchrun's process of a run of two, once it has saved an epoch (or has ended)."""
    process = subprocess.Popen(torchrun(2, folder / "main.py", *arguments, "--out", out), cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(6000):
        if (out / "log.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    return process


def start_and_wait(folder, out):
    """A run of two processes with many epochs, once it has saved something: torchrun's process and the two others'."""
    arguments = [*TINY, "--cache", folder / "cache", "--style-iters", "4"]
    arguments[arguments.index("--epochs") + 1] = "400"
    arguments[arguments.index("off")] = "small"
    process = start(folder, out, arguments)
    assert process.poll() is None, process.communicate()[1]
    return process, children(process.pid)


def test_killing_one_process_ends_all_and_another_number_goes_on(folder):
    """SIGKILL of one: the other ends with a message, within the time limit, and one process takes the run up again."""
    out = folder / "killed"
    process, workers = start_and_wait(folder, out)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "the connection with the other processes broke" in errors or "goes on" in errors, errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    before = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    alone = subprocess.Popen([sys.executable, folder / "main.py", "--resume", "--out", out], cwd=ROOT, env=ENVIRONMENT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        after = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        if len(after) > len(before) + 3 or alone.poll() is not None:
            break
        time.sleep(0.1)
    alone.send_signal(signal.SIGTERM)
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 143 and "goes on" in errors, errors
    assert after[:len(before)] == before and len(after) > len(before) + 3
    config = json.loads((out / "config.json").read_text())
    assert config["processes"] == 2 and config["resumed"][0]["processes"] == 1


def test_a_preempted_run_of_two_processes_saves_and_goes_on_to_the_same(together, folder):
    """SIGTERM to torchrun, as a cluster sends it: both stop at the same step, one message, and with --resume the log is
    that of the run that nothing interrupted."""
    out = folder / "preempted"
    process = start(folder, out, [*TINY, "--cache", folder / "cache"])
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("--resume --out") == 1, errors
    done = run(torchrun(2, folder / "main.py", "--resume", "--out", out))
    assert done.returncode == 0, done.stderr
    assert (out / "log.jsonl").read_bytes() == (together / "log.jsonl").read_bytes()
    assert (out / "result.json").read_bytes() == (together / "result.json").read_bytes()


def test_a_batch_that_cannot_be_shared(folder, monkeypatch):
    """The number of processes must divide the batch; said before anything is computed."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(train.UserError, match="--batch-size: 6 cannot be shared by 4 processes"):
        train.train(train.make_settings("demo", batch_size=6), folder / "never")
    assert not (folder / "never").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_one_process_ends_all(workers, together, folder):
    """An image that process 1 alone cannot read: its message, and the other does not wait for it for ever."""
    out = folder / f"unreadable-{workers}"
    done = run(torchrun(2, folder / "main.py", *TINY, "--cache", folder / "cache", "--workers", workers, "--out", out),
               FAULT="unreadable")
    lines = said(done.stderr)
    assert done.returncode != 0 and "train.py (process 1): im1.jpg: cannot be read" in lines, done.stderr
    assert all("connection with the other processes broke" in line for line in lines if "im1.jpg" not in line)


def test_a_loss_that_is_not_finite_in_one_process(together, folder):
    """Process 1's alone: one message and the record name the term and the samples of the whole batch."""
    out = folder / "nonfinite"
    done = run(torchrun(2, folder / "main.py", *TINY, "--cache", folder / "cache", "--out", out), FAULT="not finite")
    lines = said(done.stderr)
    assert done.returncode != 0 and len(lines) == 1 and "epoch 0, step 1: mse not finite" in lines[0], done.stderr
    record = json.loads((out / "nonfinite.json").read_text())
    assert record["terms"]["mse"] == "nan" and record["terms"]["confidence"] != "nan"
    assert len(record["labelled"]["indices"]) == 6


@pytest.mark.parametrize("arguments, text", [(["--lrr", "1"], "did you mean --lr?"), (["status", "x"], "without torchrun")])
def test_a_mistake_is_said_once(arguments, text, folder):
    """All processes find it; the first says it."""
    done = run(torchrun(2, folder / "main.py", *arguments))
    lines = said(done.stderr)
    assert done.returncode != 0 and len(lines) == 1 and text in lines[0], done.stderr


def test_each_process_takes_its_own_gpu(monkeypatch, tmp_path):
    """Process 0 writes "cuda:0" into config.json; the others do not take that one when the run goes on."""
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    (tmp_path / "config.json").write_text('{"device": "cuda:0"}')
    assert train.resumed_device(tmp_path, "auto") == "cuda:0"
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert str(train.choose_device(train.resumed_device(tmp_path, "auto"))) == "cuda:1"
    with pytest.raises(train.UserError, match="each of 2 processes takes its own; give --device cuda"):
        train.choose_device("cuda:0")


def small_trainer(**more):
    """A trainer on 32-pixel images with a teacher, and a batch of each domain."""
    settings = train.make_settings("demo", style="off", batch_size=8, image_size=32, gamma=0.8, **more)
    trainer = train.Trainer(settings, data.BODY16, None, torch.device("cpu"))
    trainer.teacher = actupose.make_teacher(trainer.student)
    indices = torch.arange(8)
    return trainer, [(indices, *data.Mannequin(domain, "train", 32, 8)[indices]) for domain in ("source", "target")]


def test_accumulation_is_the_mean_of_the_parts():
    """--accumulate 2: the gradient is the mean of those of the two halves, each with its own BatchNorm and mask; the sum
    over pairs (Eq. 6) counts both halves' in full, so each half's is doubled before the mean."""
    trainer, batches = small_trainer(accumulate=2)
    trainer.step(0, *batches)
    found = [p.grad.clone() for p in trainer.student.parameters()]
    other, _ = small_trainer(accumulate=2)
    other.student.train()
    for half in (slice(0, 4), slice(4, 8)):
        loss, _, _ = other.losses(0, *([t[half] for t in batch] for batch in batches))
        (loss / 2).backward()
    for ours, theirs in zip(found, other.student.parameters()):
        torch.testing.assert_close(ours, theirs.grad)
    once, _ = small_trainer()
    loss, terms, _ = once.losses(0, *([t[:4] for t in batch] for batch in batches))
    doubled, of_two, _ = small_trainer(accumulate=2)[0].losses(0, *([t[:4] for t in batch] for batch in batches))
    assert of_two["pairs"] == 2 * terms["pairs"] and terms["pairs"] > 0
    torch.testing.assert_close(doubled - loss, 0.01 * terms["cross_domain"])                        # w3 of Eq. 8


def test_clipping_bounds_the_gradient():
    """--clip: the 2-norm of the whole gradient that Adam sees is at most that; 0 leaves it alone."""
    norms = {}
    for clip in (0.0, 0.5):
        trainer, batches = small_trainer(clip=clip)
        trainer.step(0, *batches)
        norms[clip] = torch.cat([p.grad.flatten() for p in trainer.student.parameters()]).norm().item()
    assert norms[0.5] == pytest.approx(0.5, rel=1e-3) and norms[0.0] > 1
