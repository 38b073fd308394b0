"""Runs that survive: killed anywhere, damaged, out of disk or interrupted, they end in the same bits."""
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
TINY = """--epochs 3 --pretrain-epochs 1 --iters-per-epoch 2 --batch-size 4 --source-count 40 --style-iters 2
          --target-count 30 --vae-steps 5 --image-size 32 --amp off --device cpu""".split()

# Imports the project once and forks a process per start of a run, with one thread: sums have one order. A job
# may have it end by a signal at the n-th moment of a kind, or limit the size of its files.
STARTER = """
import io, json, os, resource, signal, sys, threading
import torch
import actupose, data, train

data.Mannequin.DEFAULT_COUNTS = {key: min(n, 20) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
train.draw_panels = train.draw_complexity = lambda *arguments: None         # the slow ones
signal.signal(signal.SIGINT, signal.default_int_handler)

def arm(kind, which, number):
    moments = iter(range(1, 10 ** 6))
    end = lambda: next(moments) == which and os.kill(os.getpid(), number)

    class HalfWriter(io.FileIO):
        def write(self, content):
            half = super().write(content[:len(content) // 2])
            return half + (end() or super().write(content[half:]))

    if kind == "clock":
        threading.Timer(which, os.kill, (os.getpid(), number)).start()
    elif kind == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (which, which))
    elif kind == "write":
        data.open = lambda path, mode: HalfWriter(path, "w") if mode == "wb" else open(path, mode)
    elif kind:                                                  # before and after the calls of a function
        module, name = kind.split(".")
        function = getattr(globals()[module], name)
        setattr(globals()[module], name, lambda *a, **k: (end(), function(*a, **k), end())[1])

for line in sys.stdin:
    arguments, log, kind, which, number = json.loads(line)
    if os.fork() == 0:
        status, sys.stdout = 99, open(log, "w")
        sys.stderr = sys.stdout
        try:
            arm(kind, which, number)
            status = train.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(out, kind, which, number) -> exit status (-9: killed) and output of one start of the tiny run, or
    of one with other options. Where its settings are written, `--resume --out RUN` alone resumes it."""
    log, cache = tmp_path_factory.mktemp("start") / "output.txt", tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)

    def start(out, kind="", which=0, number=signal.SIGKILL, others=()):
        anew = [*TINY, *others, "--cache", str(cache)]
        options = ["--resume"] if (out / "config.json").exists() else anew
        job = [*options, "--out", str(out)], str(log), kind, which, number
        print(json.dumps(job), file=process.stdin, flush=True)
        return int(process.stdout.readline()), log.read_text()

    with subprocess.Popen([sys.executable, "-c", STARTER], cwd=Path(__file__).parents[1], env=environment,
                          text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    """The directory of the tiny run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(out)[0] == 0
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    """The run as it was when it had saved its last epoch and neither its pictures nor its result."""
    out = tmp_path / "runs" / "actupose-mannequin-wild-s0"                  # --out by default
    return shutil.copytree(finished, out, ignore=shutil.ignore_patterns("result.json", "figures"))


def plain(state):
    """A checkpoint as text, to be compared: tensors as type, shape and digest of their bits."""
    return json.dumps(state, default=lambda tensor: (
        str(tensor.dtype), tensor.shape, hashlib.sha256(tensor.numpy().tobytes()).hexdigest()))


def load(path):
    """What a checkpoint holds: nothing, with no epoch done, where it is refused in words that name it."""
    try:
        return train.load_run(path)
    except train.UserError as error:
        assert str(path) in str(error)
        return {"log": []}


def assert_same_run(one, two):
    """The same files, no *.tmp among them; results, log and pictures byte by byte, tensors bit by bit."""
    files = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in (one, two)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith((".png", "result.json", "log.jsonl")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert plain(load(one / "last.pt")) == plain(load(two / "last.pt")) != plain(load(one / "previous.pt"))


LARGEST = {"actupose.total_loss": 12, "torch.save": 6, "write": 12, "os.fsync": 20, "os.replace": 20,
           "train.draw_by_bin": 4, "clock": 0.5}                            # moments of a kind in a whole run


def test_killed_anywhere_and_resumed_to_the_same_bits(start, finished, tmp_path):
    """12 kills, seeded: within steps, in the middle of writing, at syncs and renames, between pictures and
    result, by the clock. No finished epoch is lost, and each chain of kills ends as the run never killed."""
    choice, kills, chain = random.Random(7), [*LARGEST, *LARGEST][:12], 0
    choice.shuffle(kills)
    while kills:
        out, chain, status, epochs = tmp_path / f"chain{chain}", chain + 1, -9, 0
        while status:
            kind, most = (kills[-1], LARGEST[kills[-1]]) if kills else ("", 1)
            which = choice.uniform(0, most) if kind == "clock" else choice.randint(1, most)
            status, output = start(out, kind, which)
            assert status in (0, -9), output
            kills = kills[:-1] if status else kills
            before, epochs = epochs, max(len(load(out / name)["log"]) for name in ("last.pt", "previous.pt"))
            assert epochs >= before
        assert_same_run(finished, out)
    assert chain < 12                                                       # one chain had several kills


@pytest.mark.parametrize("kind, which, number, expected, text, epochs", [
    ("write", 1, signal.SIGKILL, -9, "", 0), ("actupose.total_loss", 1, signal.SIGKILL, -9, "", 0),
    ("actupose.total_loss", 6, signal.SIGINT, 130, "interrupted", 1), ("limit", 0, 0, 2, "File too large", 1),
    ("write", 5, signal.SIGINT, 130, "interrupted", 1)])
def test_ended_at_one_moment(kind, which, number, expected, text, epochs, start, finished, tmp_path):
    """Killed before the first epoch was saved, even while it wrote its settings, a run starts anew. Ctrl-C or
    files that may not grow to the size of a checkpoint with a teacher, which the second epoch writes, end it
    with one line and leave nothing half-written. Each goes on to the same bits."""
    out, which = tmp_path / "r", which or (finished / "last.pt").stat().st_size - 20_000
    status, output = start(out, kind, which, number)
    assert status == expected and text in output and output.count("\n") == ("--resume" in output) == epochs
    assert len(load(out / "last.pt")["log"]) == epochs and not (text and list(out.rglob("*.tmp")))
    assert start(out)[0] == 0
    assert_same_run(finished, out)


def test_regda_goes_on_to_the_same_bits(start, tmp_path):
    """Killed before its first epoch with two regressors was saved, then in the second, which goes on with
    their weights, their BatchNorm and the new optimiser's state."""
    whole, killed, regda = tmp_path / "whole", tmp_path / "killed", ("--method", "regda")
    assert start(whole, others=regda)[0] == 0
    for moment, epochs in ((3, 1), (3, 2)):                                 # before the second torch.save
        assert start(killed, "torch.save", moment, others=regda)[0] == -9
        state = load(killed / "last.pt")
        assert len(state["log"]) == epochs and ("head_adv.0.weight" in state["student"]) == (epochs > 1)
    assert start(killed)[0] == 0
    assert_same_run(whole, killed)


@pytest.mark.parametrize("option, value", [("--lr", "0.5"), ("--zoom", "1,2"), ("--amp", "bf16")])
def test_resume_refuses_other_settings(option, value, finished, unfinished, monkeypatch, capsys):
    """The option is named, with --out or without. With the same settings a finished run is said to be so and
    left alone; without --resume no run is overwritten."""
    monkeypatch.chdir(unfinished.parents[1])
    monkeypatch.setattr(train, "set_up", lambda *arguments: pytest.fail("the run went on"))
    before = {path: path.stat().st_mtime_ns for out in (finished, unfinished) for path in out.rglob("*")}
    for place in ["--out", str(unfinished)], ["--out", str(finished)], []:
        assert train.main(["--resume", *TINY, option, value, *place]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train.py: {option}: ") and value in error and error.count("\n") == 1
    assert train.main(["--resume", *TINY, "--out", str(finished)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main([*TINY, "--out", str(unfinished)]) == 2 and "--resume" in capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, start, finished, unfinished):
    """One line names the damaged file and the one used; the result is the same. Both damaged: one line."""
    last, previous = unfinished / "last.pt", unfinished / "previous.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()
    if damage != "missing":
        last.write_bytes(content[:-1000] if damage == "cut" else content)
    status, output = start(unfinished)
    said = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert status == 0 and len(said) == 1 and said[0].startswith(f"train.py: {last}: "), output
    assert f"going on from {previous}, 2 epochs" in said[0]
    assert len(load(previous)["log"]) == 2                                  # not the damaged one, kept
    assert_same_run(finished, unfinished)

    (unfinished / "result.json").unlink()
    for path in (last, previous):
        path.write_bytes(content)
    status, output = start(unfinished)
    assert status == 2 and f"{previous}: damaged" in output and output.count("\n") == 1, output
    assert "goes on from" not in output                                     # there is nothing to go on from


STATE = {"student": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "log": [{"epoch": 0}]}
Payload = type("Payload", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})    # if it is unpickled


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_corrupted_and_hostile_checkpoints(tmp_path, monkeypatch):
    """100 files with a bit flipped, cut, with bytes removed, added or set to zero: none loads as something
    else. With a digest that fits one may, but nothing is raised but UserError, and nothing is executed."""
    monkeypatch.chdir(tmp_path)
    path, choice, refused = tmp_path / "last.pt", random.Random(1), 0
    train.save_checkpoint(path, STATE)
    content = path.read_bytes()
    for i in range(100):
        at, size = choice.randrange(len(content)), choice.randint(1, 200)
        flipped, after = bytes([content[at] ^ 1 << i % 8]) + content[at + 1:], content[at + size:]
        changed = content[:at] + [flipped, b"", after, bytes(size) + content[at:], bytes(size) + after][i % 5]
        path.write_bytes(changed)
        state = load(path)
        assert state == {"log": []} or plain(state) == plain(STATE)         # zeros over zeros change nothing
        refused += state == {"log": []}
        path.write_bytes(changed[:-32] + hashlib.sha256(changed[:-32]).digest())
        load(path)
    hostile = {**STATE, "student": Payload()}
    contents = [pickle.dumps(hostile, protocol) for protocol in range(2, 6)] + [pickle.dumps(None)]
    for value in (hostile, Payload(), torch.zeros(3)):
        torch.save(value, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content + hashlib.sha256(content).digest())
        assert load(path) == {"log": []}
    assert refused > 90 and not Path("executed").exists()
    pickle.loads(contents[0])
    assert Path("executed").exists()                                        # it would have been
