"""Defines the Triton kernels for the interpreter where there is no GPU.

Triton reads TRITON_INTERPRET where a kernel is defined, so it is set while `kernels` is imported, and only
then: the tests' own subprocesses must not inherit it. The operators keep to the PyTorch reference on the CPU,
as they do for users, except in the tests of the kernels, which set `kernels.common.INTERPRET` themselves.
With TRITON_INTERPRET=1 in the environment the whole suite goes through the kernels, slowly.
"""
import os

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    from kernels import common
    common.INTERPRET = False
    del os.environ["TRITON_INTERPRET"]
