"""The operators of this package in plain PyTorch: the specification of the Triton kernels.

This is also what runs on the CPU. Every function takes tensors of any strides. Coordinates are (x, y), in
cells of the heatmap; angles are in radians.
"""
import torch


def check_heatmaps(heatmaps):
    """Raise TypeError / ValueError unless `heatmaps` is a floating (B, K, H, W) tensor with H, W >= 1."""
    if heatmaps.dim() != 4:
        raise ValueError(f"heatmaps must have 4 dimensions (B, K, H, W), got shape {tuple(heatmaps.shape)}")
    if not heatmaps.is_floating_point():
        raise TypeError(f"heatmaps must be floating point, got {heatmaps.dtype}: convert them with .float()")
    if heatmaps.shape[2] == 0 or heatmaps.shape[3] == 0:
        raise ValueError(f"heatmaps must have at least one cell, got shape {tuple(heatmaps.shape)}")


def check_beta(beta):
    """Raise ValueError unless the inverse temperature `beta` is positive and finite."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")


def check_poses(source, target, triplets, source_valid, target_valid, min_triplets):
    """Raise TypeError / ValueError unless shapes, dtypes and devices fit `triplet_angle_distance`."""
    for name, poses in (("source", source), ("target", target)):
        if poses.dim() != 3 or poses.shape[2] != 2:
            raise ValueError(f"{name} must have shape (poses, K, 2), got {tuple(poses.shape)}")
        if not poses.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {poses.dtype}: convert it with .float()")
    if source.shape[1] != target.shape[1]:
        raise ValueError(f"source and target must have the same keypoints K, got {source.shape[1]} and "
                         f"{target.shape[1]}")
    if target.device != source.device:
        raise ValueError(f"target is on {target.device} but source on {source.device}: move one of them")
    masks = ("source_valid", source_valid, source), ("target_valid", target_valid, target)
    for name, valid, poses in masks:
        if valid is None:
            continue
        if valid.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {valid.dtype}: compare it with a threshold first")
        if valid.shape != poses.shape[:2]:
            raise ValueError(f"{name} must have shape {tuple(poses.shape[:2])}, got {tuple(valid.shape)}")
        if valid.device != source.device:
            raise ValueError(f"{name} is on {valid.device} but source on {source.device}: move one of them")
    if triplets.dim() != 2 or triplets.shape[1] != 3:
        raise ValueError(f"triplets must have shape (A, 3), got {tuple(triplets.shape)}")
    if triplets.dtype != torch.int64:
        raise TypeError(f"triplets must be int64, got {triplets.dtype}: convert them with .long()")
    if triplets.device != source.device:
        raise ValueError(f"triplets are on {triplets.device} but source on {source.device}: move them")
    if min_triplets < 0:
        raise ValueError(f"min_triplets must not be negative, got {min_triplets}")


def check_indices(triplets, keypoints):
    """Raise ValueError unless `triplets` hold indices below `keypoints`.

    Looking at the values of a tensor on a GPU would wait for the device, so only those on the CPU are
    checked.
    """
    if triplets.device.type == "cpu" and triplets.numel():
        low, high = triplets.min().item(), triplets.max().item()
        if low < 0 or high >= keypoints:
            raise ValueError(f"triplets must hold keypoint indices in [0, {keypoints}), got {low} ... {high}")


def heatmap_argmax(heatmaps):
    """Cell and value of each heatmap's maximum.

    heatmaps: (B, K, H, W) floating point. Returns coords (B, K, 2) float32, cells (x, y), and confidence (B,
    K) float32, the value at that cell. As in `torch.max` over the flattened map, ties go to the first cell in
    row-major order and the first NaN wins over every number; a map of -inf decodes to cell (0, 0). Not
    differentiable. Raises ValueError for a wrong shape, TypeError for a dtype that is not floating point.
    """
    check_heatmaps(heatmaps)
    confidence, index = heatmaps.detach().flatten(2).max(dim=2)
    width = heatmaps.shape[3]
    coords = torch.stack((index % width, index // width), dim=2)
    return coords.float(), confidence.float().contiguous()


def soft_argmax(heatmaps, beta):
    """Expected cell under softmax(beta * heatmap): an argmax that has a gradient.

    heatmaps: (B, K, H, W) floating point; beta > 0, the inverse temperature. Returns coords (B, K, 2), cells
    (x, y): float64 for float64 heatmaps, otherwise computed and returned in float32. Raises ValueError for a
    wrong shape or beta <= 0, TypeError for a dtype that is not floating point.
    """
    check_heatmaps(heatmaps)
    check_beta(beta)
    return expected_cell(cell_probabilities(heatmaps, beta))


def soft_argmax_backward(grad_coords, heatmaps, beta):
    """Gradient of `soft_argmax`: d/dh_n = beta p_n ((x_n - X) g_x + (y_n - Y) g_y), with (X, Y) its result.

    grad_coords: (B, K, 2), the gradient g of the loss with respect to the coordinates. Returns (B, K, H, W)
    in the dtype and memory layout of the heatmaps.
    """
    probability = cell_probabilities(heatmaps, beta)
    coords = expected_cell(probability)
    height, width = heatmaps.shape[2:]
    xs = torch.arange(width, dtype=coords.dtype, device=coords.device)
    ys = torch.arange(height, dtype=coords.dtype, device=coords.device)
    slope = beta * grad_coords.to(coords.dtype)
    along_x = (xs - coords[..., 0, None]) * slope[..., 0, None]
    along_y = (ys - coords[..., 1, None]) * slope[..., 1, None]
    along = along_y[..., :, None] + along_x[..., None, :]
    return torch.mul(probability, along, out=torch.empty_like(heatmaps))


def cell_probabilities(heatmaps, beta):
    """softmax(beta * heatmap) over a map's cells: (B, K, H, W), float64 for float64 heatmaps, else
    float32."""
    if heatmaps.dtype != torch.float64:
        heatmaps = heatmaps.float()
    return torch.softmax(beta * heatmaps.flatten(2), dim=2).unflatten(2, heatmaps.shape[2:])


def expected_cell(probability):
    """Mean cell (x, y) under `probability` (B, K, H, W): (B, K, 2)."""
    xs = torch.arange(probability.shape[3], dtype=probability.dtype, device=probability.device)
    ys = torch.arange(probability.shape[2], dtype=probability.dtype, device=probability.device)
    # Marginals and sums in place of a matrix product, which TF32 settings would make less exact.
    x = (probability.sum(dim=2) * xs).sum(dim=2)
    y = (probability.sum(dim=3) * ys).sum(dim=2)
    return torch.stack((x, y), dim=2)


def triplet_angles(keypoints, triplets, valid=None):
    """Angle at the middle keypoint of each triplet, the vector theta of Eq. 7.

    keypoints: (N, K, 2) floating point, (x, y); triplets: (A, 3) long, each (end, middle, end); valid: (N, K)
    bool, or None when all are. Returns angles (N, A) in [0, pi], float64 for float64 keypoints and else
    float32, and usable (N, A) bool: the three keypoints are valid and neither limb has length zero. The angle
    is atan2(|a x b|, a . b), accurate at 0 and pi where arccos is not; it is 0 where not usable.
    """
    if keypoints.dtype != torch.float64:
        keypoints = keypoints.float()
    first, middle, last = keypoints[:, triplets].unbind(dim=2)
    a, b = first - middle, last - middle
    cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    dot = a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1]
    usable = (a != 0).any(dim=2) & (b != 0).any(dim=2)
    if valid is not None:
        usable = usable & valid[:, triplets].all(dim=2)
    angles = torch.atan2(cross.abs(), dot)
    return torch.where(usable, angles, torch.zeros_like(angles)), usable


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Mean angular difference between every source and every target pose (Eq. 7).

        distance[m, n] = ||theta_m - theta_n|| * sqrt(A / n_valid) / K

    over the n_valid triplets that are usable in both poses (see `triplet_angles`). The factor sqrt(A /
    n_valid) keeps pruning from making poses look alike; a pair with no usable triplet, or with fewer than
    `min_triplets`, has distance inf.

    source: (S, K, 2), target: (T, K, 2) floating point, (x, y) in any one unit; triplets: (A, 3) long,
    keypoint indices with the middle keypoint in the middle; source_valid (S, K), target_valid (T, K): bool,
    or None when all are valid. All on one device. Returns (S, T) float32, radians. Not differentiable as an
    operator: it is used to choose pairs. Raises ValueError / TypeError naming the argument for wrong shapes,
    dtypes or devices, and for triplets out of range (those on a GPU are not looked at).
    """
    check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    check_indices(triplets, source.shape[1])
    source_angles, source_usable = triplet_angles(source, triplets, source_valid)
    target_angles, target_usable = triplet_angles(target, triplets, target_valid)
    both = source_usable[:, None] & target_usable[None]
    difference = torch.where(both, source_angles[:, None] - target_angles[None], 0.0)
    count = both.sum(dim=2)
    scale = torch.sqrt(triplets.shape[0] / count.clamp(min=1)) / source.shape[1]
    distance = torch.linalg.vector_norm(difference, dim=2) * scale
    return torch.where(count >= max(min_triplets, 1), distance, float("inf")).float()
