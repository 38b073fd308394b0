"""Shared fixtures. Without a GPU, also defines the Triton kernels for Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined. It is set only while `kernels` is imported, since
subprocesses of the tests must not inherit it. On the CPU the operators use the PyTorch reference, as they do
for users; the kernel tests set `kernels.common.INTERPRET` themselves. With TRITON_INTERPRET=1 in the
environment the whole suite goes through the kernels, slowly.
"""
import functools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tiny_runs import ROOT, child_environment, tiny

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    from kernels import common
    common.INTERPRET = False
    del os.environ["TRITON_INTERPRET"]

torch.set_num_threads(1)        # on tensors as small as the tests' more threads wait for each other


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Turns Ctrl-C on. A shell starts background jobs with SIGINT ignored, and a run respects that, as under
    nohup. Tests that interrupt a run would then hang or fail."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(out, *options): `train.py` with the options of a tiny run, in this process, 30 images to score.

    Returns the exit status. figures: whether the run draws its pictures, in small, which takes seconds.
    launch.cache: where rendered images are kept.
    """
    import data
    import train

    def launch(out, *options, figures=False):
        with pytest.MonkeyPatch.context() as patch:
            if not figures:
                patch.setattr(train, "draw_figures", lambda *arguments: None)
            return train.main(tiny("--cache", launch.cache, "--out", out, *options))

    launch.cache = str(tmp_path_factory.mktemp("cache"))
    few = {key: min(count, 30) for key, count in data.Mannequin.DEFAULT_COUNTS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Mannequin, "DEFAULT_COUNTS", few)
        patch.setattr(train, "draw_panels", functools.partial(train.draw_panels, side=40))     # saves seconds
        yield launch


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the published base method's code, as tensors. Skips the test without the file."""
    path = ROOT.parent / "shared" / "golden" / "udape.npz"
    if not path.exists():
        pytest.skip("golden values of the base method (shared/golden/udape.npz) are not here")
    arrays = np.load(path, allow_pickle=False)
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Device on which the operators run their reference, or their Triton kernels."""
    from kernels import common
    if request.param == "reference":
        monkeypatch.setattr(common, "INTERPRET", False)
        return "cpu"
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(common, "INTERPRET", True)
    return "cpu"


@pytest.fixture(scope="session")
def run_python():
    """Runs code in a fresh interpreter at the project's root, without TRITON_INTERPRET unless it is given."""
    def run(code, *arguments, **environment):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True,
                                env=child_environment(**environment), capture_output=True)
        assert result.returncode == 0, result.stderr
        return result.stdout
    return run
