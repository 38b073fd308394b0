"""The operators that ACTUPose fuses: decoding of heatmaps, and the angles by which similar poses are found.

    heatmap_argmax(heatmaps)                cell and value of each map's maximum
    heatmap_argmax_mean(heatmaps, weight)   the same, and the mean value of a sample, for Eq. 4
    rectify(heatmaps, sigma, subcell)       the same, finer than a cell, redrawn as a Gaussian: pseudo-labels
    soft_argmax(heatmaps, beta)             expected cell, differentiable
    triplet_angle_distance(source, ...)     S x T mean angular difference, Eq. 7
    similar_pairs(source, ..., gamma)       list of the pairs below gamma, without the S x T matrix

Each is a custom operator of torch (`torch.ops.actupose.<name>`): on CUDA tensors a Triton kernel, on CPU
tensors the plain PyTorch of `kernels.reference`, which is the specification of both. With TRITON_INTERPRET=1
in the environment when this package is imported, CPU tensors go through the Triton kernels in Triton's
interpreter. Without Triton, or for float64, the reference runs everywhere.

They work under torch.compile(fullgraph=True), autocast (they compute in float32 whatever the input),
torch.func.vmap (but `similar_pairs`) and in CUDA graphs: call them once on tensors of the same layout before
the capture, since the first call compiles; give `similar_pairs` a capacity, since it else waits for the GPU.
The first call of all compiles a few lines of C besides: it needs gcc and Python's headers.

How to read a kernel. A kernel is the body of a loop that has no order: a grid of *programs* runs it, each with
its own `tl.program_id`, on one multiprocessor of the GPU. A program computes on *tiles*: `tl.arange(0, N)` is
a vector, `[:, None]` and `[None, :]` make it the rows or columns of a matrix, and arithmetic broadcasts as in
NumPy. Sides of tiles are powers of two. A pointer plus a tile of offsets is a tile of pointers, `tl.load` and
`tl.store` move their contents, and a *mask* says which of them exist: loads give `other` elsewhere. Nothing
says which of the program's *warps* (32 threads each) holds what: the compiler spreads a tile over the threads,
16 neighbouring bytes to each where it can prove that they are neighbours. What stays within a thread is free,
`tl.sum(..., axis)` across threads takes shuffles and, across warps, a *barrier* at which all wait. So loops
keep their sums per lane and reduce them once, at the end. Arguments marked `tl.constexpr` are compiled in, one
version of the kernel for each value; of other integers the compiler learns whether they are 1 or multiples of
16 (*specialisation*), as a stride of 1 is what makes neighbours. In each file: the formula and what it must
move, then the kernel, the plan (tiles, programs and constants for a layout, kept), the launch, the operator.
"""
import torch

# Importing the files of the operators registers them.
from kernels import heatmap_argmax as _, reference, triplet_angle as _  # noqa: F401
from kernels.common import runs_triton
from kernels.soft_argmax import SoftArgmax

__all__ = ["heatmap_argmax", "heatmap_argmax_mean", "rectify", "reference", "similar_pairs", "soft_argmax",
           "triplet_angle_distance"]


def _plain(name, value):
    """A tensor argument without its gradient. TypeError names what is not a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    return value.detach() if value.requires_grad else value


def _optional(name, value):
    return None if value is None else _plain(name, value)


def heatmap_argmax(heatmaps):
    """Cell and value of each heatmap's maximum.

    heatmaps: (B, K, H, W) floating point, any strides. Returns coords (B, K, 2) float32, cells (x, y), and
    confidence (B, K) float32. Ties, NaN, -inf and errors as in `reference.heatmap_argmax`. Not
    differentiable.
    """
    return torch.ops.actupose.heatmap_argmax(_plain("heatmaps", heatmaps))


def heatmap_argmax_mean(heatmaps, weight=None):
    """`heatmap_argmax`, and the mean confidence of each sample over its keypoints, which Eq. 4 re-ranks by.

    heatmaps: (B, K, H, W) floating point, any strides; weight: (B, K) floating point, 0 for keypoints that do
    not count, or None for equal weights. Returns coords (B, K, 2), confidence (B, K) and mean (B,), all
    float32. Errors as in `reference.heatmap_argmax_mean`. Not differentiable.
    """
    return torch.ops.actupose.heatmap_argmax_mean(_plain("heatmaps", heatmaps), _optional("weight", weight))


def rectify(heatmaps, sigma, subcell=False):
    """Each heatmap redrawn as a clean Gaussian at its maximum: the teacher's pseudo-labels (§3.2).

    heatmaps: (B, K, H, W) floating point, any strides; sigma: cells; subcell: finer than a cell. Returns maps
    (B, K, H, W), cells (B, K, 2) as (x, y) and confidence (B, K), float32. Formula and errors as in
    `reference.rectify`; on a GPU the Gaussians are within 1e-6 of it. Not differentiable.
    """
    return torch.ops.actupose.rectify(_plain("heatmaps", heatmaps), float(sigma), subcell)


def soft_argmax(heatmaps, beta):
    """Expected cell of each heatmap under softmax(beta * heatmap), differentiable in the heatmaps.

    On CUDA once, in reverse mode: a second derivative and forward mode are errors that
    `reference.soft_argmax` does not have.

    heatmaps: (B, K, H, W) floating point, any strides; beta > 0. Returns coords (B, K, 2), cells (x, y),
    float32 (float64 for float64 heatmaps). Accuracy and errors as in `reference.soft_argmax`.
    """
    _plain("heatmaps", heatmaps)   # a tensor
    if runs_triton(heatmaps):
        return SoftArgmax.apply(heatmaps, float(beta))[0]
    # The operator's backward pass forms the probabilities again to save memory. Where the reference runs
    # anyway, autograd keeps them, which is faster.
    return reference.soft_argmax(heatmaps, float(beta))


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Mean angular difference between every source and every target pose (Eq. 7), for choosing pairs.

    source (..., S, K, 2), target (..., T, K, 2) floating point, (x, y), leading dimensions equal or 1;
    triplets (A, 3) long; source_valid (..., S, K), target_valid (..., T, K) bool, or None when all keypoints
    count. Returns (..., S, T) float32, radians; inf for pairs with fewer than `min_triplets` usable triplets,
    or none. Formula and errors as in `reference.triplet_angle_distance`; on a GPU a triplet that names no
    keypoint is not usable. Not differentiable.
    """
    return torch.ops.actupose.triplet_angle_distance(
        _plain("source", source), _plain("target", target), _plain("triplets", triplets),
        _optional("source_valid", source_valid), _optional("target_valid", target_valid), min_triplets)


def similar_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
                  capacity=None):
    """The pairs of poses whose distance (Eq. 7) is below gamma, without their matrix in memory.

    source (S, K, 2), target (T, K, 2); gamma in radians; the rest as in `triplet_angle_distance`. Returns (P,
    2) int64: rows (index of source, index of target) in rising order, as `(distance < gamma).nonzero()`. To
    learn P it waits for the GPU; with `capacity` it does not, and returns that many rows, the first ones,
    those beyond P filled with -1. Errors as in `reference.similar_pairs`.
    """
    return torch.ops.actupose.similar_pairs(
        _plain("source", source), _plain("target", target), _plain("triplets", triplets), float(gamma),
        _optional("source_valid", source_valid), _optional("target_valid", target_valid), min_triplets, capacity)
