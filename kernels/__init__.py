"""The operators that ACTUPose fuses: decoding of heatmaps, and the angles by which similar poses are found.

    heatmap_argmax(heatmaps)                cell and value of each map's maximum
    heatmap_argmax_mean(heatmaps, weight)   the same, and the mean value of a sample, for Eq. 4
    soft_argmax(heatmaps, beta)             expected cell, differentiable
    triplet_angle_distance(source, ...)     S x T mean angular difference, Eq. 7
    similar_pairs(source, ..., gamma)       list of the pairs below gamma, without the S x T matrix

Each is a custom operator of torch (`torch.ops.actupose.<name>`): on CUDA tensors a Triton kernel, on CPU
tensors the plain PyTorch of `kernels.reference`, which is the specification of both. With TRITON_INTERPRET=1
in the environment when this package is imported, CPU tensors go through the Triton kernels in Triton's
interpreter. Without Triton, or for float64, the reference runs everywhere.

They work under torch.compile(fullgraph=True), autocast (they compute in float32 whatever the input),
torch.func.vmap (but `similar_pairs`) and in CUDA graphs; `similar_pairs` does so when it is given a capacity.
"""
import torch

# Importing the files of the operators registers them.
from kernels import heatmap_argmax as _, reference, soft_argmax as _, triplet_angle as _  # noqa: F401
from kernels.common import runs_triton
from kernels.soft_argmax import SoftArgmax

__all__ = ["heatmap_argmax", "heatmap_argmax_mean", "reference", "similar_pairs", "soft_argmax",
           "triplet_angle_distance"]


def _check_tensors(**arguments):
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")


def _detached(tensor):
    return tensor.detach() if tensor.requires_grad else tensor


def _check_masks(**masks):
    _check_tensors(**{name: value for name, value in masks.items() if value is not None})


def heatmap_argmax(heatmaps):
    """Cell and value of each heatmap's maximum.

    heatmaps: (B, K, H, W) floating point, any strides. Returns coords (B, K, 2) float32, cells (x, y), and
    confidence (B, K) float32. Ties, NaN, -inf and errors as in `reference.heatmap_argmax`. Not
    differentiable.
    """
    _check_tensors(heatmaps=heatmaps)
    return torch.ops.actupose.heatmap_argmax(_detached(heatmaps))


def heatmap_argmax_mean(heatmaps, weight=None):
    """`heatmap_argmax`, and the mean confidence of each sample over its keypoints, which Eq. 4 re-ranks by.

    heatmaps: (B, K, H, W) floating point, any strides; weight: (B, K) floating point, 0 for keypoints that do
    not count, or None for equal weights. Returns coords (B, K, 2), confidence (B, K) and mean (B,), all
    float32. Errors as in `reference.heatmap_argmax_mean`. Not differentiable.
    """
    _check_tensors(heatmaps=heatmaps)
    _check_masks(weight=weight)
    return torch.ops.actupose.heatmap_argmax_mean(_detached(heatmaps), None if weight is None else weight.detach())


def rectify(heatmaps, sigma, subcell=False):
    """Each heatmap redrawn as a clean Gaussian at its maximum: the teacher's pseudo-labels.

    heatmaps: (B, K, H, W) floating point, any strides; sigma: cells; subcell: finer than a cell. Returns maps
    (B, K, H, W), cells (B, K, 2) as (x, y) and confidence (B, K), float32. Formula and errors as in
    `reference.rectify`, the Gaussians within 1e-6. Not differentiable.
    """
    _check_tensors(heatmaps=heatmaps)
    return torch.ops.actupose.rectify(_detached(heatmaps), float(sigma), subcell)


def soft_argmax(heatmaps, beta):
    """Expected cell of each heatmap under softmax(beta * heatmap), differentiable in the heatmaps.

    On CUDA once, in reverse mode; forward-mode differentiation needs `reference.soft_argmax`.

    heatmaps: (B, K, H, W) floating point, any strides; beta > 0. Returns coords (B, K, 2), cells (x, y),
    float32 (float64 for float64 heatmaps). Accuracy and errors as in `reference.soft_argmax`.
    """
    _check_tensors(heatmaps=heatmaps)
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
    _check_tensors(source=source, target=target, triplets=triplets)
    _check_masks(source_valid=source_valid, target_valid=target_valid)
    return torch.ops.actupose.triplet_angle_distance(
        source.detach(), target.detach(), triplets, source_valid, target_valid, min_triplets)


def similar_pairs(source, target, triplets, gamma, source_valid=None, target_valid=None, min_triplets=1,
                  capacity=None):
    """The pairs of poses whose distance (Eq. 7) is below gamma, without their matrix in memory.

    source (S, K, 2), target (T, K, 2); gamma in radians; the rest as in `triplet_angle_distance`. Returns (P,
    2) int64: rows (index of source, index of target) in rising order, as `(distance < gamma).nonzero()`. To
    learn P it waits for the GPU; with `capacity` it does not, and returns that many rows, the first ones,
    those beyond P filled with -1. Errors as in `reference.similar_pairs`.
    """
    _check_tensors(source=source, target=target, triplets=triplets)
    _check_masks(source_valid=source_valid, target_valid=target_valid)
    return torch.ops.actupose.similar_pairs(
        source.detach(), target.detach(), triplets, float(gamma), source_valid, target_valid, min_triplets,
        capacity)
