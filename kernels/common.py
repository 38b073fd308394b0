"""What the operators share: where they run, and how a program walks over heatmaps of any strides."""
from contextlib import nullcontext
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not packaged outside Linux: kernels are then defined but never launched
    triton = SimpleNamespace(jit=lambda function: function)
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

TILE = 4096  # cells a program reads at a time: the whole of a 64x64 map


def runs_triton(*tensors):
    """Whether an operator on these tensors launches its Triton kernel; elsewhere the PyTorch reference runs.

    CUDA tensors do, and CPU tensors when TRITON_INTERPRET=1 was in the environment at import. float64 is the
    reference's: the kernels compute in float32.
    """
    if not HAVE_TRITON or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return tensors[0].is_cuda or (INTERPRET and tensors[0].device.type == "cpu")


def device_of(tensor):
    """Context in which Triton launches on the tensor's GPU, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(n):
    """Smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def map_layout(heatmaps):
    """Strides and tile of a kernel that reads `heatmaps` (B, K, H, W) where they lie, without a copy.

    Returns the strides (batch, keypoint, row, column), whether rows follow each other at the columns' stride
    (`flat`: a cell's offset is then its index times one stride), and the tile (keypoints, cells). A map whose
    cells are neighbours in memory is read by itself. In channels-last heatmaps the neighbours are keypoints:
    a program takes as many of them as fill a 32-byte sector, the least that a GPU's memory delivers.
    """
    keypoints, height, width = heatmaps.shape[1:]
    stride_b, stride_k, stride_h, stride_w = heatmaps.stride()
    flat = height == 1 or width == 1 or stride_h == width * stride_w
    if width == 1:
        stride_w = stride_h
    block_k = 1
    if stride_k == 1 and stride_w != 1:
        block_k = min(power_of_two(keypoints), 32 // heatmaps.element_size())
    block_n = min(power_of_two(height * width), TILE // block_k)
    return (stride_b, stride_k, stride_h, stride_w), flat, (block_k, block_n)


def warps_for(tile):
    """Warps for a tile (keypoints, cells): at most 16 elements a thread, so that nothing spills."""
    return max(1, min(8, tile[0] * tile[1] // 512))


@triton.jit
def tile_of_program(heatmaps, keypoints, stride_b, stride_k, BLOCK_K: tl.constexpr):
    """Pointers to the maps of this program (BLOCK_K,), their index b * K + k, and which of them exist."""
    tiles = tl.cdiv(keypoints, BLOCK_K)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
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
