"""Defines the Triton kernels for the interpreter where there is no GPU.

Triton reads TRITON_INTERPRET where a kernel is defined, so it is set while `kernels` is imported, and only
then: the tests' own subprocesses must not inherit it. The operators keep to the PyTorch reference on the CPU,
as they do for users, except in the tests of the kernels, which set `kernels.common.INTERPRET` themselves.
With TRITON_INTERPRET=1 in the environment the whole suite goes through the kernels, slowly.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    from kernels import common
    common.INTERPRET = False
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the published base method's code, as tensors; tests that ask for it skip without the file."""
    path = Path(__file__).resolve().parents[2] / "shared" / "golden" / "udape.npz"
    if not path.exists():
        pytest.skip("golden values of the base method (shared/golden/udape.npz) are not here")
    return {name: torch.from_numpy(np.array(value)) for name, value in np.load(path, allow_pickle=False).items()}
