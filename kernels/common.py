"""What operators share: where they run, how they are registered and launched, how programs divide maps."""
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import torch

try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:  # not packaged outside Linux: kernels are then defined but never launched
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda function: function))
    tl = SimpleNamespace(constexpr=None)
    HAVE_TRITON = False

# Triton reads TRITON_INTERPRET where a kernel is defined, that is, when this package is imported.
INTERPRET = HAVE_TRITON and triton.knobs.runtime.interpret
if INTERPRET:
    # tl.maximum(NaN, 0) is 0 on a GPU and by Triton's documentation, but NaN in the interpreters of 3.6, 3.7.
    from triton.runtime.interpreter import InterpreterBuilder
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, numpy.fmax)

WARPS = 4096     # warps that give each of a large GPU's 132 multiprocessors half of what it holds
SHARE = 16384    # cells of a share, at least: fewer are read before the launch that joins shares has begun


def runs_triton(tensor):
    """Whether an operator on this tensor launches its Triton kernel; if not, the PyTorch reference runs.

    float64 is the reference's: the kernels compute in float32.
    """
    return HAVE_TRITON and tensor.dtype != torch.float64 and (tensor.is_cuda or INTERPRET and tensor.is_cpu)


# Operators --------------------------------------------------------------------------------------------------

try:
    LIBRARY = torch.library.Library("actupose", "DEF")
except RuntimeError as error:
    raise RuntimeError("torch.ops.actupose exists: `kernels` was imported before in this process, and torch "
                       "registers operators once. Restart Python to import it again.") from error


def register(schema, on_gpu, plain):
    """Define the operator torch.ops.actupose.<name> with this schema, and return it.

    on_gpu: launches its kernel; plain: its reference, which runs elsewhere, and in torch.compile on tensors
    without data. The parts of `torch.library` are used one by one because `torch.library.custom_op`, which
    wraps them all, adds about 5 microseconds to every call.
    """
    def operator(*arguments):
        return on_gpu(*arguments) if runs_triton(arguments[0]) else plain(*arguments)

    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"actupose::{name}", plain, lib=LIBRARY)
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

    Triton's own kernel[grid](...) looks at each argument of each call to find its code, which takes longer
    than a small kernel runs. So an operator makes its launches once for each `plan_key` of its tensors, and
    then hands them pointers. Where these constants leave a kernel no use for a pointer, any tensor stands in.
    sizes: the numbers that follow the pointers; constants: the constexpr arguments, in order.
    """

    def __init__(self, kernel, grid, sizes, constants, **options):
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.constants = constants
        self.fixed = (*sizes, *constants.values())
        self.options = options | {"enable_fp_fusion": True}   # versions of Triton differ in its default
        self.run = None

    def __call__(self, *pointers):
        with device_of(pointers[0]):
            if self.run is None:
                self.run = start(self, pointers)
            else:
                self.run(*pointers, *self.fixed)


def start(launch, pointers):
    """Compile and run a launch for the first time. Returns what runs it again, given all its arguments."""
    if 0 in launch.grid:
        return lambda *arguments: None
    kernel = launch.kernel[launch.grid]
    try:
        compiled = kernel(*pointers, *launch.fixed, **launch.options)
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise RuntimeError("Triton compiles a little C when a kernel first runs: install gcc and Python's "
                           "headers (python3-dev), or set CC") from error
    return kernel if compiled is None else compiled[launch.grid]   # None: of the interpreter


def plan_key(tensor):
    """What compiled code depends on of a tensor: shape, strides, dtype, device, alignment."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0


def ceil_div(a, b):
    """a / b, rounded up. Triton's own takes 2 microseconds on the host, as does its next_power_of_2."""
    return -(-a // b)


def power_of_2(n):
    """The smallest power of 2 that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


# How programs divide heatmaps -------------------------------------------------------------------------------

class Layout(NamedTuple):
    """How programs divide heatmaps that they read where they lie, without a copy.

    A lane is a place in a program's tile, not a thread of a warp: a thread has `vector` neighbouring lanes.
    """
    keypoints: int     # maps at strides[1] from each other: K, or B K where samples lie at K times that
    strides: tuple     # of batch, keypoint, row, column
    flat: bool         # rows follow each other at the columns' stride: cell n lies at n * strides[3]
    block_k: int       # maps of a program
    lanes: int         # cells of each map that it loads at a time
    vector: int        # of them neighbours in memory, for one load of a thread
    rows: int          # such loads of a step, all under way at once
    warps: int
    programs: int      # over the maps
    shares: int        # programs over the cells of a map
    share: int         # cells of a share


def walk(shape, strides):
    """Strides of batch, keypoint, row, column; whether rows follow each other at the columns' stride, so
    that cell n lies at n times it; whether a cell's neighbours in memory are keypoints (channels-last)."""
    stride_b, stride_k, stride_h, stride_w = strides
    flat = shape[2] == 1 or shape[3] == 1 or stride_h == shape[3] * stride_w
    if shape[3] == 1:
        stride_w = stride_h
    return stride_b, stride_k, stride_h, stride_w, flat, stride_k == 1 and stride_w != 1


def divide(shape, strides, itemsize, split=True):
    """Layout of heatmaps of that shape (B, K, H, W). split: large maps may be divided into shares, except for
    `rectify`, which draws in the same launch and needs the whole map's maximum for it.

    A thread loads 16 bytes at a time. A program has one warp where the maps alone fill the GPU, and up to 8
    where they are few: across warps the last step of an argmax costs as many instructions as a 64 x 64 map.
    Where a map's cells are neighbours in memory, a load is of cells, and small maps share a program. In
    channels-last heatmaps the neighbours are keypoints: a program takes those of 64 bytes, two of the sectors
    in which memory delivers. Where that would leave most of the GPU without work, it takes only 4 keypoints
    (8 bytes of a 2-byte dtype), with 16 warps. Large maps, when few, are divided among several programs.

        heatmaps, float32                     block_k  lanes x rows  warps  programs  shares
        32 x 16 x 64 x 64                           1      1024 x 4      8       512       1
        2048 x 16 x 64 x 64                         1       128 x 4      1     32768       1
        32 x 16 x 64 x 64, channels-last            4       512 x 4     16       128       1
        2048 x 16 x 64 x 64, channels-last         16        16 x 4      2      2048       1
        32 x 16 x 8 x 8                            16        64 x 1      8        32       1
        4 x 16 x 1024 x 1024                        1      1024 x 4      8        64       8
    """
    batch, keypoints, height, width = shape
    *strides, flat, across = walk(shape, strides)
    if batch == 1 or strides[0] == keypoints * strides[1]:   # B samples of K maps are as one of B K
        keypoints = batch * keypoints
        batch = 1
    cells = height * width
    vector = 16 // itemsize
    block_k = 64 // itemsize if across else 1
    programs = batch * ceil_div(keypoints, block_k)
    warps = 8
    while warps > 1 and programs * warps > WARPS:
        warps //= 2
    tile = min(1024, 32 * vector * warps)   # elements of a program's load
    if across and programs < WARPS // 16:
        block_k = 4
        vector = 4
        tile = 2048
    elif not across:
        block_k = max(1, tile // power_of_2(cells))
    block_k = min(power_of_2(keypoints), block_k)
    lanes = min(power_of_2(cells), tile // block_k)
    rows = min(4, ceil_div(power_of_2(cells), lanes))
    warps = max(1, block_k * lanes // (32 * vector))
    programs = batch * ceil_div(keypoints, block_k)
    shares = max(1, min(cells // SHARE, WARPS // max(1, programs * warps))) if split else 1
    share = ceil_div(cells, shares * rows * lanes) * rows * lanes
    return Layout(keypoints, tuple(strides), flat, block_k, lanes, 1 if across else min(vector, lanes), rows,
                  warps, programs, ceil_div(cells, share), share)


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
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return text.partition("model name\t: ")[2].partition("\n")[0] or "CPU"
