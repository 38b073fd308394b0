"""Runs that survive: killed anywhere and resumed to the same bits, damaged checkpoints, full disks, losses that are not
finite, and what `status` says."""

import copy
import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import actupose
import data
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--epochs", "4", "--pretrain-epochs", "2", "--iters-per-epoch", "4", "--batch-size", "4", "--source-count", "60",
        "--target-count", "30", "--style-iters", "4", "--vae-steps", "5", "--image-size", "32", "--device", "cpu"]
# Validation and test splits of a few images and no large pictures, so that a run takes a second.
QUICK = """
import data, train
data.Mannequin.DEFAULT_COUNTS = {key: min(n, 20) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
train.draw_predictions = train.draw_samples = train.draw_style = lambda *arguments: None
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """QUICK in this process, undone afterwards."""
    names = ("draw_predictions", "draw_samples", "draw_style")
    before = data.Mannequin.DEFAULT_COUNTS, [getattr(train, name) for name in names]
    exec(QUICK)
    yield
    data.Mannequin.DEFAULT_COUNTS = before[0]
    for name, function in zip(names, before[1]):
        setattr(train, name, function)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the rendered images are kept, so that each run need not render them."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, quick):
    """A finished, uninterrupted tiny run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*TINY, "--cache", cache, "--out", str(out)]) == 0
    return out


def equal(one, two):
    """Whether two checkpoints' values are the same to the bit."""
    if torch.is_tensor(one):
        return one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(one, two):
    """result.json and log.jsonl byte by byte, the tensors of last.pt bit by bit; all but the clock's figures."""
    for name in ("result.json", "log.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    states = [torch.load(out / "last.pt", weights_only=True) for out in (one, two)]
    for state in states:
        for name in ("speed", "seconds"):
            del state[name]
    assert equal(*states)
    assert not list(two.glob("*.tmp"))


# Kills -------------------------------------------------------------------------------------------------------

# Imports the project once, then forks a process for each start of a run and has it killed at a moment that a job names:
# at the n-th event of a kind, or after some seconds. Exit statuses go to stdout, one JSON list.
KILLER = QUICK + """
import json, os, sys, threading

def armed(owner, name, number, which, sides=("before", "after")):
    function, count = getattr(owner, name), [0]
    def tick():
        count[0] += 1
        if count[0] == which:
            os.kill(os.getpid(), number)
    def wrapped(*arguments, **options):
        if "before" in sides:
            tick()
        result = function(*arguments, **options)
        if "after" in sides:
            tick()
        return result
    setattr(owner, name, wrapped)

def start(job, log):
    child = os.fork()
    if child == 0:
        status = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            kind, which, number = job["kind"], job["which"], job["signal"]
            if kind == "step":
                armed(train.Trainer, "step", number, which)
            elif kind == "write":
                armed(train._HashingWriter, "write", number, which, ("after",))
            elif kind == "picture":
                armed(train, "draw_bins", number, which)
            elif kind in ("replace", "fsync"):
                armed(os, kind, number, which)
            elif kind == "seconds":
                threading.Timer(which, os.kill, (os.getpid(), number)).start()
            status = train.main(job["arguments"])
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(start(job, job["log"])), flush=True)
"""


class Killer:
    """Starts runs in forked processes that are killed."""

    def __init__(self, log):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self.log = log
        self.process = subprocess.Popen([sys.executable, "-c", KILLER], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, arguments, kind="", which=0, number=signal.SIGKILL):
        """Exit status of one start of a run, -9 when SIGKILL ended it."""
        job = dict(arguments=arguments, kind=kind, which=which, signal=int(number), log=str(self.log))
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def killer(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    killer = Killer(tmp_path / "output.txt")
    yield killer
    killer.close()


LARGEST = {"step": 12, "write": 6000, "replace": 12, "fsync": 12, "picture": 2, "seconds": 2.0}   # of `which`


def test_killed_anywhere_and_resumed_to_the_same_bits(killer, cache, tmp_path):
    """24 kills, seeded: within steps, in the middle of writing a checkpoint, around each rename and sync, between the result
    and the pictures, and whenever the clock says; SIGKILL, SIGTERM and SIGINT. Every chain of kills ends as the run that
    nothing interrupted."""
    choice = random.Random(5)
    options = [*TINY, "--cache", cache]
    assert killer([*options, "--out", str(tmp_path / "whole")]) == 0
    kills, chains, kinds = 0, 0, set()
    while kills < 24:
        out, chains = tmp_path / f"chain{chains}", chains + 1
        while True:
            # What was ended before the directory was made is started anew; everything after is --resume --out alone.
            arguments = ["--resume", "--out", str(out)] if out.exists() else [*options, "--out", str(out)]
            kind = choice.choice(list(LARGEST))
            which = choice.uniform(0.2, LARGEST[kind]) if kind == "seconds" else choice.randint(1, LARGEST[kind])
            number = choice.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            status = killer(arguments, kind, which, number)
            # SIGTERM in the first moments, before the run listens to it, ends the process as by default.
            assert status in (0, -9, 143, 130) or (kind, status) == ("seconds", -15), (status, kind, which, killer.log.read_text())
            if status == 0:
                break
            kills += 1
            kinds.add((kind, status))
            if train.has_checkpoint(out):
                state, _ = train.newest_checkpoint(out)                     # never without a good one
                assert state["epoch"] >= -1
        assert_same_run(tmp_path / "whole", out)
    assert {kind for kind, _ in kinds} >= {"step", "write", "replace", "fsync"} and {s for _, s in kinds} >= {-9, 143, 130}
    assert "Traceback" not in killer.log.read_text()


@pytest.mark.parametrize("method, number", [("actupose", signal.SIGTERM), ("oracle", signal.SIGINT)])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(method, number, cache, tmp_path, monkeypatch, capsys):
    """Inside an epoch of either phase: the step is finished, the state saved, the rest of the epoch draws the same pool."""
    options = [*TINY, "--cache", cache, "--method", method, "--rescoring", "literal", "--workers", "2"]
    assert train.main([*options, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    whole, out = train.Trainer.step, tmp_path / "a run"

    def interrupted(trainer, step, *batches):
        if step in (1, 10):
            os.kill(os.getpid(), number)
        return whole(trainer, step, *batches)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    arguments = [*options, "--out", str(out)]
    for batch in (2, 3):
        assert train.main(arguments) == 128 + number
        error = capsys.readouterr().err
        assert f"`python train.py --resume --out '{out}'` goes on" in error and f"after {batch} of 4 steps" in error
        assert train.load_run(out / "last.pt")["position"]["batch"] == batch
        assert train.main(["evaluate", str(out)]) == 0 and f"epochs and {batch} steps" in capsys.readouterr().out
        arguments = ["--resume", "--out", str(out)]
    assert train.main(arguments) == 0
    assert_same_run(tmp_path / "whole", out)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL               # the handlers were put back


def test_a_signal_during_the_set_up_leaves_at_once(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(actupose, "train_pose_vae", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main([*TINY, "--out", str(tmp_path / "r")]) == 143
    error = capsys.readouterr().err
    assert "nothing was saved" in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_a_second_signal_leaves_at_once(cache, tmp_path):
    """The first is on its way to be saved when the second comes: the process ends as by default."""
    job = [*TINY, "--cache", cache, "--out", str(tmp_path / "r")]
    code = (QUICK + "import os, signal, sys\n"
            "def twice(*a):\n    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
            "train.Trainer.step = twice\nsys.exit(train.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *job], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and "a second signal" in done.stderr
    assert not (tmp_path / "r" / "last.pt").exists()


def test_compare_passes_a_signal_on(cache, tmp_path):
    """Ctrl-C and SIGTERM reach `compare` alone; it tells its runs, each saves, and the same command goes on."""
    out = tmp_path / "c"
    options = [*TINY, "--iters-per-epoch", "5000", "--cache", cache]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "compare", "--methods", "source-only", "--seeds", "0",
                                "--out", str(out), *options], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (out / "source-only-s0" / "config.json").exists():            # it trains from here on
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    assert "the same command goes on" in process.communicate()[1] and process.returncode == 143
    assert train.load_run(out / "source-only-s0" / "last.pt")["position"] is not None
    assert "`python train.py --resume" in (out / "source-only-s0" / "output.txt").read_text()


def test_pictures_that_failed_are_drawn_by_resume(finished, tmp_path, monkeypatch, capsys):
    """The result is there, the pictures are not: unfinished still. A finished run is said to be finished and left alone."""
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "figures")
    assert train.main([*TINY, "--out", str(out)]) == 2 and "finished run" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert {p.name for p in (out / "figures").iterdir()} == {p.name for p in (finished / "figures").iterdir()}
    assert_same_run(finished, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert "finished" in capsys.readouterr().out and before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


# Checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_used(damage, finished, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    content = bytearray((out / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "last.pt").unlink()
    if damage != "missing":
        (out / "last.pt").write_bytes(content[:-1000] if damage == "cut" else content)
    for command in (["evaluate", str(out)], ["predict", str(out), str(out / "figures"), "--out", str(tmp_path / "p")]):
        assert train.main(command) == 2
        error = capsys.readouterr().err
        assert "last.pt" in error and error.count("\n") == 1
    assert train.main(["status", str(out)]) == 0 and "last.pt: missing or damaged" in capsys.readouterr().out
    assert train.main(["--resume", "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert str(out / "last.pt") in error and f"Going on from {out / 'previous.pt'}, 3 epochs" in error
    assert_same_run(finished, out)
    assert train.load_run(out / "previous.pt")["epoch"] == 2                # not the damaged one, kept in its place

    # Both bad: which files, and what to do.
    (out / "result.json").unlink()
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"")
    assert train.main(["--resume", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "last.pt" in error and "previous.pt" in error and "run again" in error and error.count("\n") == 1


def corruptions(content, choice):
    """Endless pairs (kind, changed bytes)."""
    n = len(content)
    while True:
        kind, at, size = choice.randrange(6), choice.randrange(n), choice.randint(1, 200)
        if kind == 0:
            changed = bytearray(content)
            for _ in range(choice.randint(1, 8)):
                changed[choice.randrange(n)] ^= 1 << choice.randrange(8)
        elif kind == 1:
            changed = content[:at]
        elif kind == 2:
            changed = content[:at] + choice.randbytes(size) + content[at:]
        elif kind == 3:
            other = choice.randrange(n)
            changed = bytearray(content)
            changed[at:at + size], changed[other:other + size] = content[other:other + size], content[at:at + size]
        elif kind == 4:
            changed = content[:at] + content[at + size:]
        else:
            changed = content[:at] + bytes(size) + content[at + size:]
        yield kind, bytes(changed)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def small_state():
    """A checkpoint's keys with a few small values."""
    state = dict.fromkeys(train.CHECKPOINT)
    return {**state, "epoch": 2, "student": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "log": [{"epoch": 0}],
            "drawn": [[1, 2]], "seconds": 1.5}


def test_500_corruptions_of_a_checkpoint(tmp_path):
    """None loads as something else, none raises anything but one line that names the file and says what to do."""
    path, choice, equals = tmp_path / "last.pt", random.Random(1), 0
    train.save_checkpoint(path, small_state())
    content = path.read_bytes()
    assert equal(torch.load(path, weights_only=True), small_state())        # by torch.load alone, the trailer in place
    stream = corruptions(content, choice)
    for _ in range(500):
        path.write_bytes(next(stream)[1])
        try:
            state = train.load_run(path)
        except train.UserError as e:
            assert str(path) in str(e) and "--resume goes on from previous.pt" in str(e)
        else:
            assert equal(state, small_state())
            equals += 1
    assert equals < 25                                                      # swaps of equal bytes and the like


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_corruptions_with_a_right_checksum(tmp_path):
    """The trailer says that the bytes are whole, not that they are ours: nothing is executed, nothing raises another
    exception than UserError."""
    path, choice, executed = tmp_path / "last.pt", random.Random(2), tmp_path / "executed"
    train.save_checkpoint(path, small_state())
    content = path.read_bytes()[:-train.DIGEST_BYTES]
    stream = corruptions(content, choice)
    pickles = [pickle.dumps({**small_state(), "student": Payload(executed)}, protocol) for protocol in range(2, 6)]
    pickles += [pickle.dumps(value) for value in (None, 3, [], {}, {"student": 1})]
    torch.save({**small_state(), "student": Payload(executed)}, tmp_path / "evil.pt")
    torch.save(Payload(executed), tmp_path / "evil2.pt")
    pickles += [(tmp_path / name).read_bytes() for name in ("evil.pt", "evil2.pt")]
    refused = 0
    for changed in [*pickles, *(next(stream)[1] for _ in range(200))]:
        path.write_bytes(changed + hashlib.sha256(changed).digest())
        try:
            train.load_run(path)
        except train.UserError as e:
            assert str(path) in str(e)
            refused += 1
    assert refused >= len(pickles) and not executed.exists()


def mutate(value, choice):
    """The value with one thing in it of another kind, missing or added."""
    strange = [None, -1, 10 ** 9, math.nan, "x", [], {}, {"a": 1}, torch.zeros(3), torch.zeros(0, dtype=torch.int64), True]
    if isinstance(value, dict) and value and choice.random() < 0.9:
        key = choice.choice(list(value))
        if choice.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: mutate(value[key], choice)}
    if isinstance(value, list) and value and choice.random() < 0.8:
        at = choice.randrange(len(value))
        return value[:at] + choice.choice([[], [mutate(value[at], choice)], [value[at]] * 2]) + value[at + 1:]
    return choice.choice(strange)


def test_checkpoints_of_another_form_are_refused_or_go_on(finished, tmp_path):
    """A file with a right checksum in which one value is of another kind: UserError, or a run that trains on."""
    settings = train.saved_settings(finished)
    settings.epochs = 6                                                     # there is something left to do
    states, start = [train.load_run(finished / "last.pt")], train.load_run(finished / "last.pt")
    run = train.set_up(settings, torch.device("cpu"), start, finished / "last.pt")
    run.load(start, finished / "last.pt")
    run.stopping = train.Stopping(lambda: "")
    run.stopping.asked = signal.SIGTERM
    assert train.train_epoch(run, 4, lambda *a: None) is None               # one step into the fifth epoch
    run.position["seconds"] = 1.0
    states.append(copy.deepcopy(run.state(3)))
    run.stopping.asked = None
    choice, path, outcomes = random.Random(3), tmp_path / "last.pt", {"refused": 0, "accepted": 0}
    for i in range(80):
        state = mutate(states[i % 2], choice) if i > 1 else states[i]
        train.save_checkpoint(path, state)
        try:
            loaded = train.load_run(path)
            if loaded["teacher"] is None:                                   # of before the third epoch
                continue
            train.train_epoch(run, run.load(loaded, path), lambda *a: None)
            outcomes["accepted"] += 1
        except train.UserError as e:
            assert i > 1 and str(path) in str(e)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30 and outcomes["accepted"] >= 2


# Disks, memory -----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_one_line(cache, tmp_path, finished):
    """A child whose files may not grow beyond a limit (EFBIG, as ENOSPC on a full disk): the last good checkpoint is whole,
    the temporary file gone, and the run goes on when there is room."""
    pytest.importorskip("resource")
    size = (finished / "last.pt").stat().st_size            # with a teacher, which joins in the third epoch
    code = (QUICK + "import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size - 20_000}, {size - 20_000}))\n"
            "sys.exit(train.main(sys.argv[1:]))")
    out = tmp_path / "r"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code, *TINY, "--cache", cache, "--out", str(out)], cwd=ROOT, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert str(out / "last.pt") in done.stderr and "--resume" in done.stderr
    assert train.load_run(out / "last.pt")["epoch"] == 1 and not list(out.glob("*.tmp"))
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_same_run(finished, out)


@pytest.mark.parametrize("function, error", [("fsync", errno.ENOSPC), ("replace", errno.EROFS)])
def test_every_write_may_fail(function, error, cache, tmp_path, finished, monkeypatch, capsys):
    """Disk full at the n-th sync, or the directory read-only from the n-th rename on."""
    whole = getattr(os, function)
    for which in (1, 2, 3, 5, 8, 12):
        out, count = tmp_path / f"r{which}", [0]

        def failing(*arguments):
            count[0] += 1
            if count[0] >= which:
                raise OSError(error, os.strerror(error))
            return whole(*arguments)

        monkeypatch.setattr(os, function, failing)
        assert train.main([*TINY, "--epochs", "3", "--pretrain-epochs", "1", "--cache", cache, "--out", str(out)]) == 2
        monkeypatch.setattr(os, function, whole)
        message = capsys.readouterr().err
        assert os.strerror(error) in message and str(out) in message and message.count("\n") == 1
        if train.has_checkpoint(out):
            train.newest_checkpoint(out)


def test_room_is_looked_for_before_the_first_epoch(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 10 ** 6, 10 ** 6))
    assert train.main([*TINY, "--cache", cache, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "MB are needed" in error and "1 MB are free" in error and not (tmp_path / "r" / "last.pt").exists()


def test_the_checkpoints_size_is_foreseen(finished, cache):
    """Of networks, moments and curriculum: what the disk check adds up is what the last checkpoint holds."""
    settings = train.saved_settings(finished)
    run = train.set_up(settings, torch.device("cpu"))
    foreseen = train.checkpoint_bytes(run)
    assert 0.9 * foreseen < (finished / "last.pt").stat().st_size < 1.3 * foreseen + 200_000     # names and records


def test_memory_is_looked_at_before_rendering(tmp_path, monkeypatch, capsys):
    """4,000 source, 30 target, 20 + 20 images of 3 x 32 x 32 bytes and four times the network: by hand."""
    monkeypatch.setattr(data.Mannequin, "_load", None)
    network = sum(p.nbytes for p in actupose.PoseResNet("narrow", 16).parameters())
    needed = 4070 * 3 * 32 * 32 + 4 * network
    options = [*TINY, "--source-count", "4000", "--vae-steps", "1", "--style", "off", "--out", str(tmp_path / "r")]
    monkeypatch.setattr(train, "memory_available", lambda: needed - 1)
    assert train.main(options) == 2
    assert f"{needed / 1e9:.2f} GB" in capsys.readouterr().err and not (tmp_path / "r").exists()
    monkeypatch.setattr(train, "memory_available", lambda: needed)
    settings = train.make_settings("demo", image_size=32, source_count=4000, target_count=30, batch_size=4)
    domains = train.open_domains(settings)
    train.check_memory(settings, domains, train.Trainer(settings, data.BODY16, None, torch.device("cpu")))


def test_free_memory_is_read():
    if sys.platform != "linux":
        pytest.skip("reads /proc/meminfo")
    assert 1e6 < train.memory_available() < 1e14


# Guards ------------------------------------------------------------------------------------------------------


def break_step(monkeypatch, at, name="mse"):
    """The `at`-th step of a run returns a term that is not finite."""
    whole = train.Trainer.step

    def broken(trainer, step, *batches):
        terms, confidence = whole(trainer, step, *batches)
        if step == at:
            terms[name] = terms[name] * math.nan
        return terms, confidence

    monkeypatch.setattr(train.Trainer, "step", broken)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_the_first_step_that_is_not_finite_is_found(every, cache, tmp_path, monkeypatch, capsys):
    """Step 1 of the third epoch, on whatever step the loss is looked at: its samples are named, the checkpoint is that of
    the second epoch."""
    monkeypatch.setitem(train.CHECK_EVERY, "cpu", every)
    batches, whole, out = [], train.Trainer.step, tmp_path / "r"

    def remembered(trainer, step, source, target):
        batches.append((source[0].tolist(), target[0].tolist()))
        return whole(trainer, step, source, target)

    monkeypatch.setattr(train.Trainer, "step", remembered)
    break_step(monkeypatch, 9)
    assert train.main([*TINY, "--cache", cache, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    record = json.loads((out / "nonfinite.json").read_text())
    assert (record["epoch"], record["step"], record["terms"]["mse"]) == (2, 1, "nan")
    assert {"loss", "consistency", "evalpose", "cross_domain"} <= set(record["terms"])
    assert record["labelled"]["indices"] == batches[9][0] and record["target"]["indices"] == batches[9][1]
    assert record["labelled"]["names"] == [f"source-train-{i:06d}" for i in batches[9][0]]
    assert "epoch 2, step 1: mse not finite" in error and record["labelled"]["names"][0] in error and "nonfinite.json" in error
    assert len(batches) == {1: 10, 3: 11, 50: 12}[every]
    assert train.load_run(out / "last.pt")["epoch"] == 1


def test_weights_that_are_not_finite_are_not_saved(cache, tmp_path, monkeypatch, capsys):
    """The last update of an epoch can spoil the weights after a loss that was finite."""
    whole, out = train.Trainer.step, tmp_path / "r"

    def broken(trainer, step, *batches):
        result = whole(trainer, step, *batches)
        if step == 7:
            trainer.student.head.weight.data[0, 0] = math.inf
        return result

    monkeypatch.setattr(train.Trainer, "step", broken)
    assert train.main([*TINY, "--cache", cache, "--out", str(out)]) == 2
    assert "head.weight not finite" in capsys.readouterr().err and train.load_run(out / "last.pt")["epoch"] == 0


@pytest.mark.parametrize("pool", ["empty", "no number"])
def test_a_curriculum_that_draws_nothing(pool, cache, tmp_path, monkeypatch, capsys):
    options = [*TINY, "--cache", cache, "--out", str(tmp_path / "r")]
    if pool == "empty":
        monkeypatch.setattr(actupose.ActiveCurriculum, "sample", lambda self, epoch: np.empty(0, dtype=np.int64))
    else:
        options += ["--spread", "1e-200"]                                   # its square is 0 and Eq. 3 is 0 / 0
    with np.errstate(invalid="ignore", divide="ignore"):
        assert train.main(options) == 2
    error = capsys.readouterr().err
    assert "--spread" in error and "--pace" in error and "--bins" in error


@pytest.mark.parametrize("option", ["lr", "pace", "w-evalpose", "spread"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_settings_are_finite(option, value, capsys):
    assert train.main([f"--{option}", value]) == 2 and f"--{option}" in capsys.readouterr().err


# Records -----------------------------------------------------------------------------------------------------


def test_result_and_log_hold_nothing_of_the_machine(finished):
    result = json.loads((finished / "result.json").read_text())
    log, speed = ([json.loads(line) for line in (finished / name).read_text().splitlines()]
                  for name in ("log.jsonl", "speed.jsonl"))
    assert not {"seconds", "peak_memory_gb", "device"} & {*result, *log[0]}
    assert [row["epoch"] for row in speed] == [0, 1, 2, 3]
    assert all({"seconds", "images_per_second", "total_seconds", "peak_memory_gb"} <= set(row) for row in speed)
    assert all(a["total_seconds"] < b["total_seconds"] for a, b in zip(speed, speed[1:]))
    s = train.saved_settings(finished)
    for row in log:                                                         # Eq. 8, by hand from the other terms
        total = row["mse"] + row.get("consistency", 0)
        total += s.w_evalpose * row.get("evalpose", 0) + s.w_cross * row.get("cross_domain", 0)
        assert math.isclose(row["loss"], total, rel_tol=1e-5)
    assert {"lr", "pool", "peak_bin", "confidence"} <= set(log[0]) and {"kept", "pairs"} <= set(log[-1])


def test_config_records_the_origin_and_each_resume(finished, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    origin = json.loads((out / "config.json").read_text())
    assert origin["arguments"] == [*TINY, "--cache", origin["cache"], "--out", str(finished)] and origin["resumed"] == []
    assert origin["torch"] == train.versions()["torch"] and origin["numpy"] == np.__version__
    assert {"python", "pillow", "platform", "device", "device_name", "threads", "commit"} <= set(origin)
    shutil.rmtree(out / "figures")
    assert train.main(["--resume", "--out", str(out)]) == 0
    now = json.loads((out / "config.json").read_text())
    resumed = now.pop("resumed")
    assert now == {key: value for key, value in origin.items() if key != "resumed"}
    assert len(resumed) == 1 and resumed[0]["epoch"] == 4 and resumed[0]["device"] == "cpu"

    # A config.json as earlier versions wrote it, and one that somebody has spoilt.
    old = {key: value for key, value in now.items() if key not in ("deterministic", "commit", "arguments", "platform")}
    train.write_json(out / "config.json", old)
    assert train.saved_settings(out) == train.saved_settings(finished)
    train.write_json(out / "config.json", {**old, "epochs": "4"})
    with pytest.raises(train.UserError, match="epochs"):
        train.saved_settings(out)


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train.commit() is None


def test_deterministic(cache, tmp_path, finished):
    """On a CPU it changes nothing but that torch is told."""
    try:
        assert train.main([*TINY, "--cache", cache, "--deterministic", "on", "--out", str(tmp_path / "r")]) == 0
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert_same_run(finished, tmp_path / "r")


# status ------------------------------------------------------------------------------------------------------


def test_status_of_a_run_that_goes_on_and_of_a_finished_one(cache, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "r", train.train_epoch

    def watched(run, epoch, progress):
        capsys.readouterr()
        assert train.main(["status", str(out)]) == 0                        # before the first epoch and between them
        text = capsys.readouterr().out
        assert f"{epoch} of 4 epochs done" in text and "last wrote" in text and "finished" not in text
        assert (out / "figures" / "curves.png").exists() == (epoch > 0)
        assert ("left" in text and "images/s" in text and "loss" in text) == (epoch > 0)
        return whole(run, epoch, progress)

    monkeypatch.setattr(train, "train_epoch", watched)
    assert train.main([*TINY, "--cache", cache, "--out", str(out)]) == 0
    capsys.readouterr()
    assert train.main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 epochs done, finished" in text and "PCK@0.05" in text and "validation" in text


def test_time_left_by_hand(finished, tmp_path, capsys):
    """Two epochs of 30 s with 10 s of validation and saving between them, two to come: 80 s."""
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    for name in ("log.jsonl", "speed.jsonl"):
        rows = [json.loads(line) for line in (out / name).read_text().splitlines()][:2]
        for epoch, row in enumerate(rows):
            if name == "speed.jsonl":
                row.update(seconds=30.0, total_seconds=100.0 + 40 * epoch)
        train.write_lines(out / name, rows)
    assert train.main(["status", str(out)]) == 0 and "about 1:20 left" in capsys.readouterr().out


@pytest.mark.parametrize("file, text", [("log.jsonl", "[1]\n"), ("log.jsonl", "{\"epo"), ("speed.jsonl", "{\"epoch\": 0}\n"),
                                        ("result.json", "{}"), ("config.json", "[]"), ("config.json", "{\"seed\": \"a\"}"),
                                        ("config.json", None)])
def test_status_of_damaged_files(file, text, finished, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    if text is None:
        (out / file).unlink()
    else:
        (out / file).write_text(text)
    assert train.main(["status", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out / file) in error and error.count("\n") == 1


def test_status_of_what_is_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (["status", str(tmp_path)], ["status", str(tmp_path / "file")], ["status", str(tmp_path / "none")]):
        assert train.main(arguments) == 2 and "config.json" in capsys.readouterr().err
    assert train.main(["status"]) == 2 and "run" in capsys.readouterr().err
    assert train.main(["stauts", "x"]) == 2 and "status RUN" in capsys.readouterr().err
