"""Runs that survive: killed anywhere, damaged, out of disk or interrupted, they end in the same bits. A
directory has one owner, and data may be moved."""
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
from unittest.mock import Mock

import pytest
import torch

import train
from miniatures import make_tree
from tiny_runs import SCRIPT, TINY, Payload, check_one_line, child_environment, files_in, read

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

# Imports the project once and forks a process per start of a run, with one thread: sums have one order. A job
# may have it end by a signal at the n-th moment of a kind, or limit the size of its files.
STARTER = SCRIPT + """
import io, json, os, resource, signal, threading
import actupose

signal.signal(signal.SIGINT, signal.default_int_handler)

def arm(kind, which, number):
    moments = iter(range(1, 10 ** 6))

    def end():
        if next(moments) == which:
            os.kill(os.getpid(), number)

    def ends_around(function):
        def ending(*arguments, **options):
            end()
            result = function(*arguments, **options)
            end()
            return result
        return ending

    class HalfWriter(io.FileIO):
        def write(self, content):
            half = super().write(content[:len(content) // 2])
            end()
            return half + super().write(content[half:])

    if kind == "clock":
        threading.Timer(which, os.kill, (os.getpid(), number)).start()
    elif kind == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (which, which))
    elif kind == "write":
        data.open = lambda path, mode: HalfWriter(path, "w") if mode == "wb" else open(path, mode)
    elif kind:
        module, name = kind.split(".")
        setattr(globals()[module], name, ends_around(getattr(globals()[module], name)))

for line in sys.stdin:
    arguments, log, kind, which, number = json.loads(line)
    if os.fork() == 0:
        status = 99
        sys.stdout = open(log, "w")
        sys.stderr = open(log + ".errors", "w")
        try:
            arm(kind, which, number)
            status = train.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(out, kind, which, number): one start of the tiny run, or of one with other options. Where its
    settings are written, `--resume --out RUN` alone goes on with it; where its result is, `evaluate` draws.

    Returns the exit status (-9: killed) and what is on stderr.
    """
    log = tmp_path_factory.mktemp("start") / "output"
    cache = tmp_path_factory.mktemp("cache")

    def start(out, kind="", which=0, number=signal.SIGKILL, others=()):
        words = [*TINY, "--amp", "off", *others, "--cache", str(cache), "--out", str(out)]
        if (out / "config.json").exists():
            words = ["--resume", "--device", "cpu", "--out", str(out)]
        if (out / "result.json").exists():
            words = ["evaluate", str(out), "--device", "cpu"]
        print(json.dumps([words, str(log), kind, which, number]), file=process.stdin, flush=True)
        return int(process.stdout.readline()), log.with_name("output.errors").read_text()

    with subprocess.Popen([sys.executable, "-c", STARTER], env=child_environment(), text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    """The directory of the tiny run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(out)[0] == 0
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    """The run as it was when it had saved its last epoch and neither its result nor its pictures."""
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
    assert files_in(one) == files_in(two)
    for name in files_in(one):
        if name.endswith((".png", "result.json", "log.jsonl")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert plain(load(one / "last.pt")) == plain(load(two / "last.pt")) != plain(load(one / "previous.pt"))


# Moments of a kind in a whole run.
LARGEST = {"actupose.total_loss": 12, "train.save_checkpoint": 6, "write": 15, "os.fsync": 30,
           "os.replace": 30, "train.save_picture": 6, "clock": 0.5}


def test_killed_anywhere_and_resumed_to_the_same_bits(start, finished, tmp_path):
    """8 kills, seeded: within steps, in the middle of writing, at syncs and renames, between result and
    pictures, by the clock. No finished epoch is lost; each chain of kills ends as the run never killed."""
    choice = random.Random(7)
    kills = [*LARGEST, "write"]
    choice.shuffle(kills)
    chain = 0
    while kills:
        out = tmp_path / f"chain{chain}"
        chain += 1
        status = -9
        epochs = 0
        while status:
            kind = kills[-1] if kills else ""
            most = LARGEST.get(kind, 1)
            which = choice.uniform(0, most) if kind == "clock" else choice.randint(1, most)
            status, errors = start(out, kind, which)
            assert status in (0, -9), errors
            if status:
                kills.pop()
            before = epochs
            epochs = max(len(load(out / name)["log"]) for name in ("last.pt", "previous.pt"))
            assert epochs >= before
        assert_same_run(finished, out)
    assert chain < 8                                                       # one chain had several kills


def test_killed_between_result_and_pictures(start, finished, unfinished):
    """With its result a run is finished: `evaluate` draws what is missing."""
    assert start(unfinished, "train.save_picture", 4)[0] == -9
    assert (unfinished / "result.json").read_bytes() == (finished / "result.json").read_bytes()
    assert start(unfinished)[0] == 0
    assert_same_run(finished, unfinished)


@pytest.mark.parametrize("kind, which, number, expected, text, epochs", [
    ("write", 1, signal.SIGKILL, -9, "", 0), ("actupose.total_loss", 1, signal.SIGKILL, -9, "", 0),
    ("actupose.total_loss", 6, signal.SIGINT, 130, "interrupted", 1), ("limit", 0, 0, 2, "File too large", 1),
    ("write", 5, signal.SIGINT, 130, "interrupted", 1)])
def test_ended_at_one_moment(kind, which, number, expected, text, epochs, start, finished, tmp_path):
    """Killed before the first epoch was saved, even while it wrote its settings, a run starts anew. Ctrl-C or
    files that may not grow to the size of a checkpoint with a teacher, which the second epoch writes, end it
    with one line and leave nothing half-written. Each goes on to the same bits."""
    out = tmp_path / "r"
    if kind == "limit":
        which = (finished / "last.pt").stat().st_size - 20_000
    status, errors = start(out, kind, which, number)
    assert status == expected and text in errors and errors.count("\n") == ("--resume" in errors) == epochs
    assert len(load(out / "last.pt")["log"]) == epochs and not (text and list(out.rglob("*.tmp")))
    assert start(out)[0] == 0
    assert_same_run(finished, out)


def test_regda_goes_on_to_the_same_bits(start, tmp_path):
    """Killed before its first epoch with two regressors was saved, then in the second, which goes on with
    their weights, their BatchNorm and the new optimiser's state."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    regda = ("--method", "regda")
    assert start(whole, others=regda)[0] == 0
    for moment, epochs in ((3, 1), (3, 2)):                                 # before the second checkpoint
        assert start(killed, "train.save_checkpoint", moment, others=regda)[0] == -9
        state = load(killed / "last.pt")
        assert len(state["log"]) == epochs and ("head_adv.0.weight" in state["student"]) == (epochs > 1)
    assert start(killed)[0] == 0
    assert_same_run(whole, killed)


def test_resume_refuses_other_settings(finished, unfinished, monkeypatch, capsys):
    """The option is named, with --out or without. With the same settings a finished run is said to be so and
    left alone. Without --resume no run is overwritten."""
    monkeypatch.chdir(unfinished.parents[1])
    monkeypatch.setattr(train, "set_up", lambda *arguments: pytest.fail("the run went on"))
    (unfinished / "last.pt.1.tmp").write_text("being written by a run at work")
    files = [*finished.rglob("*"), *unfinished.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    for option, value in (("--lr", "0.5"), ("--zoom", "1,2"), ("--amp", "bf16")):
        for place in ["--out", str(unfinished)], ["--out", str(finished)], []:
            assert train.main(["--resume", *TINY, option, value, *place]) == 2
            check_one_line(capsys.readouterr().err, f"train.py: {option}: ", value)
    assert train.main(["--resume", "--preset", "paper", *TINY, "--out", str(unfinished)]) == 2
    check_one_line(capsys.readouterr().err, "--architecture: ", "with narrow, not resnet101")
    for preset in [], ["--preset", "demo"]:
        assert train.main(["--resume", *preset, *TINY, "--out", str(finished)]) == 0
        assert "is finished" in capsys.readouterr().out
    for place in unfinished, finished, unfinished / "last.pt":              # the last is no directory
        assert train.main([*TINY, "--out", str(place)]) == 2
        check_one_line(capsys.readouterr().err, "--out: ")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, start, finished, unfinished, capsys):
    """One line names the damaged file and the one used; the result is the same. Both damaged: one line.
    `evaluate` says what is left."""
    last = unfinished / "last.pt"
    previous = unfinished / "previous.pt"
    content = bytearray(last.read_bytes())
    last.unlink()
    if damage == "cut":
        last.write_bytes(content[:-1000])
        assert train.main(["evaluate", str(unfinished), "--device", "cpu"]) == 2
        check_one_line(capsys.readouterr().err, f"{last}: damaged", "--resume goes on from previous.pt")
    status, errors = start(unfinished)
    assert status == 0
    check_one_line(errors, f"train.py: {last}: ", f"going on from {previous}, 2 epochs")
    assert len(load(previous)["log"]) == 2                                  # not the damaged one, kept
    assert_same_run(finished, unfinished)

    (unfinished / "result.json").unlink()
    content[len(content) // 2] ^= 1
    for path in (last, previous):
        path.write_bytes(content)
    status, errors = start(unfinished)
    assert status == 2 and "goes on from" not in errors                     # there is nothing to go on from
    check_one_line(errors, f"{previous}: damaged")


# --- Directories and places ---------------------------------------------------------------------------------


def test_a_directory_has_one_owner(launch, tmp_path, monkeypatch, capsys):
    """While a run is at work, another start is refused on one line, whether it is to begin or to resume. The
    result is that of an undisturbed run."""
    few = ["--method", "source-only", "--epochs", "2"]
    out = tmp_path / "run"
    step = train.Trainer.step

    def disturbed(trainer, number, *batch):
        if number == 3:                                         # after an epoch
            for options in [], ["--resume"]:
                capsys.readouterr()
                assert train.main([*TINY, *few, "--out", str(out), *options]) == 2
                check_one_line(capsys.readouterr().err, "--out: another process is at work", str(out))
        return step(trainer, number, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", disturbed)
        assert launch(out, *few) == 0
    assert launch(tmp_path / "alone", *few) == 0
    for name in ("log.jsonl", "result.json", "last.pt"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_refused_process_leaves_the_owners_directory(tmp_path):
    """Also where it is still empty, and was not there when the refused one looked."""
    out = tmp_path / "a" / "b"
    owner = train.claimed(out)
    check_writable = train.check_writable
    with pytest.MonkeyPatch.context() as patch:
        def made_meanwhile(path, name):
            patch.setattr(train, "check_writable", check_writable)
            owner.__enter__()

        patch.setattr(train, "check_writable", made_meanwhile)
        with pytest.raises(train.UserError, match="another process"), train.claimed(out):
            pass
    assert out.is_dir()
    owner.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())                         # the owner wrote nothing into it


def test_a_directory_with_settings_holds_a_run(launch, tmp_path, capsys, monkeypatch):
    """A run that was killed in the Pose-VAE, say: no other overwrites it, and --resume begins it."""
    with monkeypatch.context() as patch:
        patch.setattr(train.actupose, "train_pose_vae", Mock(side_effect=KeyboardInterrupt))
        assert launch(tmp_path / "r", "--style", "off") == 130
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["config.json"]
    capsys.readouterr()
    assert launch(tmp_path / "r", "--style", "off", "--lr", 0.5) == 2
    check_one_line(capsys.readouterr().err, "--out: ", "holds a run")
    assert train.main(["--resume", "--device", "cpu", "--out", str(tmp_path / "r")]) == 0
    assert read(tmp_path / "r" / "config.json")["lr"] == 0.006


def test_the_home_directory_in_a_runs_paths(launch, tmp_path, monkeypatch):
    """~ is expanded in --out and --cache, and in every path of the settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert launch("~/runs/x", *"--method source-only --epochs 1 --cache=~/cache".split()) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}
    assert list((tmp_path / "cache").glob("*.u8"))
    assert train.main(["evaluate", "~/runs/x", "--device", "cpu"]) == 0
    for name in train.PATHS:
        given = {"style": "vgg", "style_weights": "~/s", "source": "surreal", "source_root": "~/a",
                 "target": "lsp", "target_root": "~/b", name: "~/there"}
        assert getattr(train.make_settings(**given), name) == str(tmp_path / "there")
        # The same words with --resume are the same settings.
        with monkeypatch.context() as patch:
            patch.setattr(train, "saved_settings", lambda out: train.make_settings(**given))
            assert getattr(train.check_same_settings("x", {name: "~/there"}), name) == str(tmp_path / "there")


def test_a_dataset_that_moved(launch, tmp_path, capsys, monkeypatch):
    """--resume and `evaluate` take its new place and write it down. Other data are refused."""
    sizes = [(90 + 5 * i, 80) for i in range(6)]
    for name, count in (("old", 6), ("other", 5)):
        (tmp_path / name).mkdir()
        make_tree(tmp_path / name, False, sizes[:count])
    monkeypatch.setattr(train.data.random.Random, "choices", lambda self, order, k: order[:3])
    out = tmp_path / "run"
    options = ["--target", "lsp", "--style", "off", "--curriculum", "off", "--bins", 3, "--hard-bins", 2]
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_speed", Mock(side_effect=KeyboardInterrupt))
        assert launch(out, *options, "--target-root", tmp_path / "old") == 130
    (tmp_path / "old").rename(tmp_path / "new")
    capsys.readouterr()
    resume = ["--resume", "--device", "cpu", "--out", str(out)]
    assert train.main(resume) == 2
    check_one_line(capsys.readouterr().err, "--target-root: ", str(tmp_path / "old"))
    assert train.main([*resume, "--target-root", str(tmp_path / "other")]) == 2
    check_one_line(capsys.readouterr().err, "go on with the data that the run was started on")
    assert train.main([*resume, "--target-root", str(tmp_path / "new")]) == 0
    assert read(out / "config.json")["target_root"] == str(tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "third")
    assert train.main(["evaluate", str(out), "--device", "cpu"]) == 2
    make_tree(tmp_path / "other", False, [(60, 80)] * 6)
    words = ["evaluate", str(out), "--device", "cpu"]
    assert train.main([*words, "--target-root", str(tmp_path / "other")]) == 2
    check_one_line(capsys.readouterr().err.splitlines(True)[-1], "holds other scores")
    assert read(out / "config.json")["target_root"] == str(tmp_path / "new")           # not the wrong place
    assert train.main([*words, "--target-root", str(tmp_path / "third")]) == 0
    assert train.main(words) == 0
    assert capsys.readouterr().out.count("the same as") == 2


# --- Hostile files ------------------------------------------------------------------------------------------


STATE = {"student": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "log": [{"epoch": 0}]}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_corrupted_and_hostile_checkpoints(tmp_path, monkeypatch):
    """100 files with a bit flipped, cut, with bytes removed, added or set to zero: none loads as something
    else. With a digest that fits one may, but nothing is raised but UserError, and nothing is executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    choice = random.Random(1)
    refused = 0
    train.save_checkpoint(path, STATE)
    content = path.read_bytes()
    for i in range(100):
        at = choice.randrange(len(content))
        size = choice.randint(1, 200)
        flipped = bytes([content[at] ^ 1 << i % 8]) + content[at + 1:]
        after = content[at + size:]
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
