"""Runs that survive: killed anywhere, damaged checkpoints, full disks and Ctrl-C end in the same bits after --resume."""

import contextlib
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

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
TINY = ["--epochs", "3", "--pretrain-epochs", "1", "--iters-per-epoch", "2", "--batch-size", "4", "--source-count",
        "40", "--target-count", "30", "--style-iters", "2", "--vae-steps", "5", "--image-size", "32", "--amp", "off",
        "--device", "cpu"]

# Imports the project once and forks a process per start of a run, as one thread, so that sums have one order.
# A job may end the process by a signal at the n-th moment of a kind, or limit the size of its files.
STARTER = """
import io, json, os, signal, sys, threading
import torch
import actupose, data, train

data.Mannequin.DEFAULT_COUNTS = {key: min(n, 20) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
train.draw_panels = train.draw_complexity = lambda *arguments: None         # the slow ones
signal.signal(signal.SIGINT, signal.default_int_handler)
PLACES = {"step": (actupose, "total_loss"), "save": (torch, "save"), "fsync": (os, "fsync"),
          "replace": (os, "replace"), "picture": (train, "draw_by_bin")}

def arm(kind, which, number):
    count = [0]

    def tick():
        count[0] += 1
        if count[0] == which:
            os.kill(os.getpid(), number)
            return True

    class HalfWriter(io.BufferedWriter):
        def write(self, content):
            if count[0] + 1 == which:                                       # half of it reaches the disk
                super().write(memoryview(content)[:len(content) // 2])
                self.flush()
            return tick() or super().write(content)

    if kind == "clock":
        threading.Timer(which, os.kill, (os.getpid(), number)).start()
    elif kind == "limit":
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (which, which))
    elif kind == "write":
        data.open = lambda path, mode="r": HalfWriter(io.FileIO(path, "w")) if mode == "wb" else open(path, mode)
    elif kind:
        owner, name = PLACES[kind]
        function = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (tick(), function(*a, **k), tick())[1])     # before and after

for line in sys.stdin:
    arguments, kind, which, number, log = json.loads(line)
    if (child := os.fork()) == 0:
        status = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            arm(kind, which, number)
            status = train.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(arguments, kind, which, number) -> exit status (-9: killed) and output of one start of a run."""
    folder = tmp_path_factory.mktemp("start")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(arguments, kind="", which=0, number=signal.SIGKILL):
        job = list(map(str, arguments)), kind, which, int(number), str(folder / "output.txt")
        print(json.dumps(job), file=process.stdin, flush=True)
        return int(process.stdout.readline()), (folder / "output.txt").read_text()

    yield start
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The command line of the tiny run, all but --out; rendered images are kept from run to run."""
    return [*TINY, "--cache", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options, start):
    """The directory of the tiny run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, output = start([*options, "--out", out])
    assert status == 0, output
    return out


def copy_unfinished(finished, out):
    """The run as it was when it had saved the last epoch and not yet its result."""
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "figures")
    return out


def equal(one, two):
    """Whether two checkpoints' values are the same to the bit."""
    if torch.is_tensor(one):
        return (torch.is_tensor(two) and one.dtype == two.dtype and one.shape == two.shape
                and one.numpy().tobytes() == two.numpy().tobytes())
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(one, two):
    """Results, log and pictures byte by byte, checkpoints bit by bit, the same files and no *.tmp among them."""
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (one, two)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith((".png", "result.json", "log.jsonl")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    states = [torch.load(out / "last.pt", weights_only=True) for out in (one, two)]
    assert len(states[0]["log"]) == 3 and states[0]["teacher"] and equal(*states)


# Ended at any moment -----------------------------------------------------------------------------------------

LARGEST = {"step": 12, "save": 6, "write": 12, "fsync": 20, "replace": 20, "picture": 4, "clock": 0.5}  # of `which`


def test_killed_anywhere_and_resumed_to_the_same_bits(start, options, finished, tmp_path):
    """12 kills, seeded: within steps, in the middle of writing, around each sync and rename, between pictures and
    result, by the clock. At every moment a whole checkpoint is there once there was one; every chain of kills
    ends as the run that nothing interrupted."""
    choice, kills, chain = random.Random(7), [*LARGEST, "step", "write", "write", "replace", "replace"], 0
    choice.shuffle(kills)
    while kills:
        out, chain, status, epochs = tmp_path / f"chain{chain}", chain + 1, -9, 0
        while status:
            kind = kills[-1] if kills else ""
            which = choice.uniform(0, LARGEST["clock"]) if kind == "clock" else choice.randint(1, LARGEST.get(kind, 1))
            # Killed before it had written its settings, a run is started again; from there on it is resumed.
            again = ["--resume"] if (out / "config.json").exists() else options
            status, output = start([*again, "--out", out], kind, which)
            assert status in (0, -9), output
            kills = kills[:-1] if status else kills
            if epochs or any(out.glob("*.pt")):
                saved = []
                for name in ("last.pt", "previous.pt"):
                    with contextlib.suppress(train.UserError):
                        saved.append(len(train.load_run(out / name)["log"]))
                assert max(saved) >= epochs                                 # no finished epoch was lost
                epochs = max(saved)
        assert_same_run(finished, out)
    assert chain < 12                                                       # most chains are of several kills


@pytest.mark.parametrize("kind, which", [("step", 6), ("write", 5)])
def test_ctrl_c_is_one_line_and_130(kind, which, start, options, finished, tmp_path):
    """Within a step, or in the middle of writing a checkpoint: no traceback, nothing half-written, then the same."""
    status, output = start([*options, "--out", tmp_path / "r"], kind, which, signal.SIGINT)
    assert status == 130 and output.count("\n") == 1 and "--resume" in output, output
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "r" / "result.json").exists()
    assert start(["--resume", "--out", tmp_path / "r"])[0] == 0
    assert_same_run(finished, tmp_path / "r")


def test_killed_before_the_first_epoch_was_saved_starts_anew(start, options, finished, tmp_path):
    out = tmp_path / "r"
    assert start([*options, "--out", out], "step", 1)[0] == -9
    assert [p.name for p in out.iterdir()] == ["config.json"]
    status, output = start(["evaluate", out])
    assert status == 2 and "last.pt" in output and output.count("\n") == 1
    assert start(["--resume", "--out", out])[0] == 0
    assert_same_run(finished, out)


def test_a_full_disk(start, options, finished, tmp_path):
    """No file may grow to the size of a checkpoint with a teacher, which the second epoch writes: one line that
    names the file; the first epoch's checkpoint is whole; with room again the run goes on to the same bits."""
    out, size = tmp_path / "r", (finished / "last.pt").stat().st_size
    status, output = start([*options, "--out", out], "limit", size - 20_000)
    assert status == 2 and output.count("\n") == 1 and "--resume" in output, output
    assert f"{out / 'last.pt'}: File too large" in output and not list(out.rglob("*.tmp"))
    assert len(train.load_run(out / "last.pt")["log"]) == 1
    assert start(["--resume", "--out", out])[0] == 0
    assert_same_run(finished, out)


def test_a_finished_run_is_left_alone(finished, capsys):
    """--resume says that it is finished; without it, nothing is overwritten."""
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train.main(["--resume", "--out", str(finished)]) == 0 and "is finished" in capsys.readouterr().out
    assert train.main([*TINY, "--out", str(finished)]) == 2 and "--resume" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


@pytest.mark.parametrize("option, value", [("--lr", "0.5"), ("--method", "udape"), ("--epochs", "4"), ("--zoom", "1,2")])
@pytest.mark.parametrize("named", [True, False])
def test_resume_refuses_other_settings(named, option, value, finished, tmp_path, monkeypatch, capsys):
    """The option is named; so it is where the run lies in the directory that --out has by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "set_up", None)                              # it does not come so far
    out = copy_unfinished(finished, Path(f"runs/{'udape' if option == '--method' else 'actupose'}-mannequin-wild-s0"))
    same = [*TINY, "--cache", json.loads((out / "config.json").read_text())["cache"]]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train.main(["--resume", *same, option, value, *["--out", str(out)] * named]) == 2
    error = capsys.readouterr().err
    assert option in error and value in error and error.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


# Damaged checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, start, finished, tmp_path):
    """One line says which file is damaged and which is used; the result is the same. Both damaged: one line."""
    out = copy_unfinished(finished, tmp_path / "r")
    content = bytearray((out / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "last.pt").unlink()
    if damage != "missing":
        (out / "last.pt").write_bytes(content[:-1000] if damage == "cut" else content)
    status, output = start(["evaluate", out])
    assert status == 2 and str(out / "last.pt") in output and output.count("\n") == 1, output
    status, output = start(["--resume", "--out", out])
    said = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert status == 0 and len(said) == 1 and str(out / "last.pt") in said[0], output
    assert str(out / "previous.pt") in said[0] and "2 epochs" in said[0]
    assert len(train.load_run(out / "previous.pt")["log"]) == 2             # not the damaged one, kept in its place
    assert_same_run(finished, out)

    (out / "result.json").unlink()
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(content)
    status, output = start(["--resume", "--out", out])
    assert status == 2 and "previous.pt: damaged" in output and output.count("\n") == 1, output
    assert "goes on from" not in output                                     # there is nothing to go on from


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


STATE = {"student": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "log": [{"epoch": 0}], "teacher": None}


def corruptions(content, choice, number):
    """The bytes, changed: flipped bits, cut, something added, removed, set to zero or moved."""
    n = len(content)
    for i in range(number):
        at, size, changed = choice.randrange(n), choice.randint(1, 200), bytearray(content)
        if i % 6 == 0:
            for _ in range(choice.randint(1, 8)):
                changed[choice.randrange(n)] ^= 1 << choice.randrange(8)
        other = choice.randrange(n)
        yield bytes([changed, content[:at], content[:at] + choice.randbytes(size) + content[at:],
                     content[:at] + content[at + size:], content[:at] + bytes(size) + content[at + size:],
                     content[:at] + content[other:other + size] + content[at:]][i % 6])


def test_corruptions_do_not_load(tmp_path):
    """None of 100 loads as something else; each is refused in words that name the file."""
    path = tmp_path / "last.pt"
    train.save_checkpoint(path, STATE)
    content, refused = path.read_bytes(), 0
    assert equal(train.load_run(path), STATE)
    for changed in corruptions(content, random.Random(1), 100):
        path.write_bytes(changed)
        try:
            assert equal(train.load_run(path), STATE)                       # zeros over zeros change nothing
        except train.UserError as e:
            assert str(path) in str(e)
            refused += 1
    assert refused > 90


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_right_digest_is_no_trust(tmp_path):
    """The digest says that the bytes are whole, not whose they are: nothing in them is executed, and what cannot
    be read is a UserError that names the file."""
    path, executed = tmp_path / "last.pt", tmp_path / "executed"
    hostile = {**STATE, "student": Payload(executed)}
    contents = [pickle.dumps(hostile, protocol) for protocol in range(2, 6)]
    contents += [pickle.dumps(value) for value in (None, 3, [])]
    for value in (hostile, Payload(executed), torch.zeros(3)):
        torch.save(value, path)
        contents.append(path.read_bytes())
    train.save_checkpoint(path, STATE)
    garbage = list(corruptions(path.read_bytes()[:-32], random.Random(2), 60))
    refused = 0
    for content in [*contents, *garbage]:
        path.write_bytes(content + hashlib.sha256(content).digest())
        try:
            train.load_run(path)
        except train.UserError as e:
            assert str(path) in str(e)
            refused += 1
        assert refused >= min(len(contents), refused + len(garbage))
    assert refused >= len(contents) and not executed.exists()
    pickle.loads(contents[0])
    assert executed.exists()                                                # the payload is one
