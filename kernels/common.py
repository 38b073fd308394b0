"""What the operators share: where they run, how they are registered and launched, how programs divide maps."""
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not packaged outside Linux: kernels are then defined but never launched
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda function: function))
    tl = SimpleNamespace(constexpr=None)
    HAVE_TRITON = False
else:
    HAVE_TRITON = True

# Triton reads TRITON_INTERPRET where a kernel is defined, that is, when this package is imported. Kernels
# defined under it run on CPU tensors, in Triton's interpreter.
INTERPRET = HAVE_TRITON and triton.knobs.runtime.interpret

# Where they run on CUDA, results are within tolerance with multiply-adds fused or not; naming the choice
# keeps Triton 3.9 from warning that its default will change.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

WARPS = 4096     # warps that give each of a large GPU's 132 multiprocessors half of what it holds
SHARE = 16384    # cells; below about this a map is read before the launch that joins its shares has begun


def runs_triton(tensor):
    """Whether an operator on this tensor launches its Triton kernel; elsewhere the PyTorch reference runs.

    CUDA tensors do, and CPU tensors when TRITON_INTERPRET=1 was in the environment at import. float64 is the
    reference's: the kernels compute in float32.
    """
    return HAVE_TRITON and tensor.dtype != torch.float64 and (tensor.is_cuda or INTERPRET and tensor.is_cpu)


# Operators --------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("actupose", "DEF")


def register(schema, on_gpu, plain, fake=None):
    """Define the operator torch.ops.actupose.<name> with this schema, and return it.

    on_gpu: launches its kernel; plain: its reference, which runs elsewhere; fake: the same for tensors without
    data, for torch.compile, if it is not the reference itself. The parts of `torch.library` are used one by one
    because `torch.library.custom_op`, which wraps them all, adds about 5 microseconds to every call.
    """
    def operator(*arguments):
        return on_gpu(*arguments) if runs_triton(arguments[0]) else plain(*arguments)

    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"actupose::{name}", fake or plain, lib=LIBRARY)
    return getattr(torch.ops.actupose, name).default


# Launches ---------------------------------------------------------------------------------------------------

HERE = nullcontext()


def device_of(tensor):
    """Context in which Triton launches on the tensor's GPU, whichever is the current one."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(tensor.device)


class Launch:
    """A kernel on a grid, with everything but its pointers: compiled at the first call, then called directly.

    Triton's own kernel[grid](...) looks at each argument of each call to find its code, which takes longer than
    a small kernel runs. So an operator makes its launches once for each `plan_key` of its tensors, and hands
    them pointers. sizes: the numbers that follow these; constants: the constexpr arguments, in order.
    """

    def __init__(self, kernel, grid, sizes, constants, **options):
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], constants
        self.options, self.fixed, self.run = options | COMPILE_OPTIONS, (*sizes, *constants.values()), None

    def __call__(self, *pointers):
        if self.run is None:
            self.run = start(self, pointers)
        else:
            self.run(*pointers, *self.fixed)


def start(launch, pointers):
    """Compile and run a launch for the first time. Returns what runs it again, given all arguments in order."""
    kernel = launch.kernel[launch.grid]
    try:
        compiled = kernel(*pointers, *launch.fixed, **launch.options)
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise RuntimeError("Triton compiles a few lines of C when a kernel first runs: install gcc and Python's "
                           "headers (python3-dev), or set CC. kernels.reference needs neither") from error
    return kernel if compiled is None else compiled[launch.grid]   # None: of the interpreter


def plan_key(tensor):
    """What compiled code depends on of a tensor: shape, strides, dtype, device, alignment."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0


def ceil_div(a, b):
    """a / b, rounded up. Triton's own takes 2 microseconds on the host, as does its next_power_of_2."""
    return -(-a // b)


def power_of_2(n):
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


# How programs divide heatmaps -------------------------------------------------------------------------------

class Layout(NamedTuple):
    """How programs divide heatmaps that they read where they lie, without a copy."""
    keypoints: int     # maps at `strides[1]` from each other; then the next batch, at strides[0]
    strides: tuple     # of batch, keypoint, row, column
    flat: bool         # rows follow each other at the columns' stride: cell n lies at n * strides[3]
    block_k: int       # maps of a program
    lanes: int         # cells that it loads at a time
    vector: int        # of them neighbours in memory, for one load of a thread
    rows: int          # such loads of a step, all under way at once
    warps: int
    programs: int      # over the maps
    shares: int        # programs over the cells of a map
    share: int         # cells of a share


def walk(shape, strides):
    """Strides of batch, keypoint, row, column; whether rows follow each other at the columns' stride, so that
    cell n lies at n times it; and whether a cell's neighbours in memory are keypoints, as in channels-last."""
    stride_b, stride_k, stride_h, stride_w = strides
    flat = shape[2] == 1 or shape[3] == 1 or stride_h == shape[3] * stride_w
    if shape[3] == 1:
        stride_w = stride_h
    return stride_b, stride_k, stride_h, stride_w, flat, stride_k == 1 and stride_w != 1


def divide(shape, strides, itemsize, split=True):
    """Layout of heatmaps of that shape (B, K, H, W), B and K at least 1. split: large maps may have shares.

    A thread loads 16 bytes at a time. Where a map's cells are neighbours in memory, these are cells; small
    maps share a program. In channels-last heatmaps the neighbours are keypoints: a program takes as many as
    fill a 32-byte sector, the least that a GPU's memory delivers, or 4 of them with twice the threads where
    the programs would else not fill the GPU. Large maps, when few, are divided among several programs.

        heatmaps, float32                     block_k  lanes x rows  warps  programs  shares
        32 x 16 x 64 x 64                           1      1024 x 4      8       512       1
        32 x 16 x 64 x 64, channels-last            4       512 x 4     16       128       1
        1024 x 16 x 64 x 64, channels-last          8       128 x 4      8      2048       1
        32 x 16 x 8 x 8                            16        64 x 1      8        32       1
        4 x 16 x 1024 x 1024                        1      1024 x 4      8        64       8
    """
    batch, keypoints, height, width = shape
    *strides, flat, across = walk(shape, strides)
    if batch == 1 or strides[0] == keypoints * strides[1]:   # B samples of K maps are as one of B K
        batch, keypoints = 1, batch * keypoints
    cells = height * width
    vector, tile = 16 // itemsize, 1024   # elements of a thread's load and of a program's
    if across and batch * ceil_div(keypoints, 32 // itemsize) * 8 < WARPS // 2:
        block_k, vector, tile = 4, 4, 2048
    elif across:
        block_k = 32 // itemsize
    else:
        block_k = max(1, tile // power_of_2(cells))
    block_k = min(power_of_2(keypoints), block_k)
    lanes = min(power_of_2(cells), tile // block_k)
    rows = min(4, ceil_div(power_of_2(cells), lanes))
    warps = max(1, block_k * lanes // (32 * vector))
    programs = batch * ceil_div(keypoints, block_k)
    shares = max(1, min(cells // SHARE, WARPS // (programs * warps))) if split else 1
    share = ceil_div(cells, shares * rows * lanes) * rows * lanes
    return Layout(keypoints, tuple(strides), flat, block_k, lanes, 1 if across else min(vector, lanes), rows, warps, programs,
                  ceil_div(cells, share), share)


@triton.jit
def maps_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K: tl.constexpr):
    """Pointers to the maps of this program (BLOCK_K,), their index b * K + k, and which of them exist."""
    blocks = tl.cdiv(keypoints, BLOCK_K)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    # int64: a batch of large maps has more than 2^31 cells.
    return heatmaps + b * stride_b + k.to(tl.int64) * stride_k, b * keypoints + k, k < keypoints


@triton.jit
def cell_offset(n, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Offset of cell n = y * width + x from the start of its map."""
    if FLAT:
        offset = n.to(tl.int64) * stride_w
    else:
        offset = (n // width).to(tl.int64) * stride_h + (n % width).to(tl.int64) * stride_w
    return offset


def device_name(device):
    """What a torch.device is called by its maker, for reports; a CPU by Linux alone."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].split(": ")[1] if models else "CPU"
