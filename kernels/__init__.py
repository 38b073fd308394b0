"""The operators that ACTUPose fuses: decoding of heatmaps, and the angles by which similar poses are found.

    heatmap_argmax(heatmaps)                cell and value of each map's maximum
    heatmap_argmax_mean(heatmaps, weight)   the same, and the mean value of a sample, for Eq. 4
    rectify(heatmaps, sigma, subcell)       the same, redrawn as a Gaussian: pseudo-labels
    soft_argmax(heatmaps, beta)             expected cell, differentiable
    triplet_angle_distance(source, ...)     S x T angular differences, Eq. 7

Each is a custom operator of torch (`torch.ops.actupose.<name>`): on CUDA tensors a Triton kernel, on CPU
tensors the plain PyTorch of `kernels.reference`, which is the specification of both. With TRITON_INTERPRET=1
in the environment when this package is imported, CPU tensors go through the Triton kernels in Triton's
interpreter. The reference also runs on a GPU: without Triton, where the first argument is float64 (no other
argument's dtype decides), and for poses with leading dimensions.

The operators work under torch.compile(fullgraph=True), autocast (half precision is computed in float32) and
in CUDA graphs. A launch is compiled at the first call, and kept, for each combination of shapes, strides,
dtypes, devices, alignment to 16 bytes, and numbers such as sigma. Before the capture of a graph, call the
operators once on such tensors. The very first call also compiles a few lines of C, with gcc and Python's
headers. torch.func.vmap calls an operator once per element and warns that this is slow.

How to read a kernel. A kernel is the body of a loop that has no order: a grid of *programs* runs it, each
with its own `tl.program_id`, on one multiprocessor of the GPU. A program computes on *tiles*: `tl.arange(0,
N)` is a vector, `[:, None]` and `[None, :]` make it a column or a row of a matrix, and arithmetic broadcasts
as in NumPy. Sides of tiles are powers of two. A pointer plus a tile of offsets is a tile of pointers;
`tl.load` and `tl.store` move their contents, and a *mask* says which of them exist: loads give `other`
elsewhere. The code does not say which of the program's *warps* (32 threads each) holds what: the compiler
spreads a tile over the threads, 16 neighbouring bytes to each where it can prove that they are neighbours.
Sums within a thread take no communication; `tl.sum(..., axis)` across threads takes shuffles and, across
warps, a *barrier* at which all wait. So loops keep their sums per lane and reduce them once, at the end.
Arguments marked `tl.constexpr` are compiled in, one version of the kernel for each value. Of other integers
the compiler learns whether they are 1 or multiples of 16 (*specialisation*): a stride of 1 is what makes
neighbours. Each file has the formula and what it must move, then the kernel, the plan (tiles, programs and
constants for a layout, computed once and kept), and the operator, which launches it. docs/kernels.md has
what the compiled code does, and its times.
"""
import torch

# Importing the files of the operators registers them.
from kernels import angles, argmax, reference  # noqa: F401
from kernels.common import runs_triton
from kernels.softargmax import SoftArgmax

__all__ = ["heatmap_argmax", "heatmap_argmax_mean", "rectify", "reference", "soft_argmax",
           "triplet_angle_distance"]

# Looked up once: to find an operator's overload takes 0.1 microseconds at every call.
_heatmap_argmax = torch.ops.actupose.heatmap_argmax.default
_heatmap_argmax_mean = torch.ops.actupose.heatmap_argmax_mean.default
_rectify = torch.ops.actupose.rectify.default
_triplet_angle_distance = torch.ops.actupose.triplet_angle_distance.default


def _plain(name, value):
    """A tensor argument without its gradient. TypeError names what is not a tensor.

    An operator without a gradient gives constants, in forward mode too. Called directly on a tensor that
    requires a gradient, torch.ops.actupose.<name> gives results that seem to have one: the backward pass
    then warns, and the gradient is None. Detaching spares the caller that.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    return value.detach() if value.requires_grad else value


def _optional(name, value):
    return None if value is None else _plain(name, value)


# Shapes, units, formulas and errors are those of the functions of the same name in `kernels.reference`.
# Strides are free, dtypes float16, bfloat16, float32 or float64, results float32 except `soft_argmax` of
# float64 heatmaps. A heatmap has from 1 to 2^20 cells; there may be no samples or no keypoints.

def heatmap_argmax(heatmaps):
    """Heatmaps (B, K, H, W) -> cells (B, K, 2) as (x, y) and values (B, K) of their maxima. No gradient."""
    return _heatmap_argmax(_plain("heatmaps", heatmaps))


def heatmap_argmax_mean(heatmaps, weight=None):
    """`heatmap_argmax`, and the mean value of a sample (B,) over its keypoints, weighted by (B, K). Eq. 4."""
    return _heatmap_argmax_mean(_plain("heatmaps", heatmaps), _optional("weight", weight))


def rectify(heatmaps, sigma, subcell=False):
    """Heatmaps (B, K, H, W) -> Gaussians (B, K, H, W) at their maxima, cells (B, K, 2), values (B, K).

    sigma: cells; subcell: finer than a cell. On a GPU the Gaussians are within 1e-6. No gradient.
    """
    return _rectify(_plain("heatmaps", heatmaps), float(sigma), subcell)


def soft_argmax(heatmaps, beta):
    """Heatmaps (B, K, H, W) -> expected cells (B, K, 2) under softmax(beta * heatmap), differentiable.

    beta: a number; it has no gradient, so a tensor that requires one is a TypeError. On a GPU in reverse
    mode: forward mode is an error there.
    """
    if not isinstance(heatmaps, torch.Tensor):
        raise TypeError(f"heatmaps must be a torch tensor, got {type(heatmaps).__name__}")
    if isinstance(beta, torch.Tensor) and beta.requires_grad:
        raise TypeError("beta must be a number: soft_argmax has no gradient for it. Give beta.item()")
    if runs_triton(heatmaps):
        return SoftArgmax.apply(heatmaps, float(beta))[0]
    # The operator's backward pass forms the probabilities again to save memory. Where the reference runs
    # anyway, autograd keeps them, which is faster.
    return reference.soft_argmax(heatmaps, float(beta))


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Poses (..., S, K, 2), (..., T, K, 2) -> angular differences (..., S, T) in radians, Eq. 7.

    No gradient. The kernel takes poses (S, K, 2) and (T, K, 2), as many as a CUDA grid has room for; all else
    is left to the reference, on a GPU too. To the kernel a triplet that names no keypoint is not usable. To
    the reference it is an error, which on a GPU ends the process's use of CUDA.
    """
    return _triplet_angle_distance(
        _plain("source", source), _plain("target", target), _plain("triplets", triplets),
        _optional("source_valid", source_valid), _optional("target_valid", target_valid), min_triplets)
