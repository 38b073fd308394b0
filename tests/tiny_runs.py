"""Runs that take seconds: their options, processes of their own, and ways to look into them."""
import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = """--epochs 3 --pretrain-epochs 1 --iters-per-epoch 2 --batch-size 4 --image-size 32
             --style-iters 2 --vae-steps 5 --bins 5 --hard-bins 2 --device cpu""".split()


def tiny(*options):
    """The words of a tiny run, then these options. A domain that has no directory is rendered: few images."""
    words = [str(option) for option in options]
    counts = []
    for role, count in (("source", 60), ("target", 30)):
        if not any(word.startswith(f"--{role}-root") for word in words):
            counts.append(f"--{role}-count={count}")
    return [*OPTIONS, *counts, *words]


TINY = tiny()
# train.py with few images to score and without the slow pictures, for runs in processes of their own. torch's
# optimisers import its compiler, which takes seconds; a stand-in saves them, since no run here compiles.
SCRIPT = """
import sys
from unittest.mock import Mock
import torch

torch._dynamo = Mock(disable=lambda function, *_, **__: function)
sys.modules["torch._dynamo"] = torch._dynamo
import data, train

data.Mannequin.DEFAULT_COUNTS = {key: min(n, 30) for key, n in data.Mannequin.DEFAULT_COUNTS.items()}
train.draw_panels = train.draw_complexity = lambda *arguments: None
"""


def child_environment(**changes):
    """The environment of a child process: one thread, no GPU, no interpreter of Triton, and these changes."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    clean.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    return {**clean, **changes}


# Unpickled, it makes the directory `executed`.
Payload = type("Payload", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})


def read(path):
    """A JSON file, or the list that a file of JSON lines is."""
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def files_in(out):
    """Everything in a directory, by its path from there."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def record(patch, calls, owner, *names):
    """Append (name, arguments, result) of each call of these functions of `owner` to calls."""
    for name in names:
        def spy(*arguments, name=name, function=getattr(owner, name), **options):
            result = function(*arguments, **options)
            calls.append((name, arguments, result))
            return result
        patch.setattr(owner, name, spy)


def check_one_line(error, *texts):
    """A mistake is answered on one line of stderr, which says all this."""
    assert error.startswith(("train.py: ", "docs.reproduce: ")) and error.count("\n") == 1, error
    for text in texts:
        assert text in error, error
