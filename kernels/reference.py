"""The operators of this package in plain PyTorch: the specification of the Triton kernels.

This is also what runs on the CPU. Every function takes tensors of any strides. Coordinates are (x, y), in
cells of the heatmap; angles are in radians.
"""
import torch

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def check_float(name, dtype):
    """Raise TypeError unless the tensor of that name is of a floating-point dtype that PyTorch adds."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point (float16, bfloat16, float32 or float64), got "
                        f"{dtype}: convert with .float()")


def check_heatmaps(shape, dtype):
    """Raise TypeError / ValueError unless heatmaps (B, K, H, W) are floating point, of 1 to 2^20 cells."""
    if len(shape) != 4:
        raise ValueError(f"heatmaps must have 4 dimensions (B, K, H, W), got shape {tuple(shape)}")
    check_float("heatmaps", dtype)
    if not 0 < shape[2] * shape[3] <= 2 ** 20:
        raise ValueError(f"heatmaps must have from 1 to 2^20 cells, got shape {tuple(shape)}")


def check_positive(name, value):
    """Raise ValueError unless the number of that name (sigma, beta) is positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_weight(weight, heatmaps):
    """Raise TypeError / ValueError unless `weight` is None or a floating (B, K) on the heatmaps' device."""
    if weight is None:
        return
    check_float("weight", weight.dtype)
    if weight.shape != heatmaps.shape[:2]:
        raise ValueError(f"weight must have shape {tuple(heatmaps.shape[:2])}, got {tuple(weight.shape)}")
    if weight.device != heatmaps.device:
        raise ValueError(f"weight is on {weight.device} but heatmaps on {heatmaps.device}: move one of them")


def check_poses(source, target, triplets, source_valid, target_valid, min_triplets):
    """Raise TypeError / ValueError unless shapes, dtypes and devices fit `triplet_angle_distance`."""
    for name, poses, valid in ("source", source, source_valid), ("target", target, target_valid):
        if len(poses.shape) < 3 or poses.shape[-1] != 2 or poses.shape[-2] == 0:
            raise ValueError(f"{name} must have shape (..., poses, K, 2), K >= 1, got {tuple(poses.shape)}")
        check_float(name, poses.dtype)
        if valid is not None and valid.dtype != torch.bool:
            raise TypeError(f"{name}_valid must be bool, got {valid.dtype}: compare it with a threshold")
        if valid is not None and valid.shape != poses.shape[:-1]:
            raise ValueError(f"{name}_valid must have shape {tuple(poses.shape[:-1])}, "
                             f"got {tuple(valid.shape)}")
    if source.shape[-2] != target.shape[-2]:
        raise ValueError(f"source and target must have the same keypoints K, got {source.shape[-2]} and "
                         f"{target.shape[-2]}")
    for ours, theirs in zip(reversed(source.shape[:-3]), reversed(target.shape[:-3])):
        if ours != theirs and 1 not in (ours, theirs):
            raise ValueError("the leading dimensions of source and target must be equal or 1, got "
                             f"{tuple(source.shape[:-3])} and {tuple(target.shape[:-3])}")
    if len(triplets.shape) != 2 or triplets.shape[1] != 3:
        raise ValueError(f"triplets must have shape (A, 3), got {tuple(triplets.shape)}")
    if triplets.dtype != torch.int64:
        raise TypeError(f"triplets must be int64, got {triplets.dtype}: convert them with .long()")
    others = dict(target=target, triplets=triplets, source_valid=source_valid, target_valid=target_valid)
    for name, other in others.items():
        if other is not None and other.device != source.device:
            raise ValueError(f"{name} on {other.device}, source on {source.device}: move one of them")
    if min_triplets < 0:
        raise ValueError(f"min_triplets must not be negative, got {min_triplets}")


def check_indices(triplets, keypoints):
    """Raise ValueError unless `triplets` hold indices below `keypoints`.

    Only plain tensors on a CPU: a look at others would wait for the GPU, and torch.compile's have no values.
    """
    if type(triplets) is torch.Tensor and triplets.is_cpu and triplets.numel():
        low = triplets.min().item()
        high = triplets.max().item()
        if low < 0 or high >= keypoints:
            raise ValueError(f"triplets must hold keypoint indices in [0, {keypoints}), got {low} ... {high}")


def heatmap_argmax(heatmaps):
    """Cell and value of each heatmap's maximum.

    heatmaps: (B, K, H, W) floating point. Returns coords (B, K, 2) float32, cells (x, y), and confidence (B,
    K) float32, the value at that cell. As in `torch.max` over the flattened map, ties go to the first cell in
    row-major order and the first NaN wins over every number; a map of -inf decodes to cell (0, 0). Not
    differentiable. Raises ValueError for a wrong shape, TypeError for a dtype that is not floating point.
    """
    check_heatmaps(heatmaps.shape, heatmaps.dtype)
    confidence, index = heatmaps.detach().flatten(2).max(dim=2)
    width = heatmaps.shape[3]
    coords = torch.stack((index % width, index // width), dim=2)
    return coords.float(), confidence.float().contiguous()


def heatmap_argmax_mean(heatmaps, weight=None):
    """`heatmap_argmax`, and the mean confidence of each sample over its keypoints, which Eq. 4 re-ranks by.

    weight: (B, K) floating point, or None for equal weights. Returns coords (B, K, 2), confidence (B, K) and
    mean (B,), float32: sum(weight * confidence) / sum(weight) over the keypoints whose weight is not 0, and 0
    where none is. Raises as `heatmap_argmax`, and for a weight of another shape, dtype or device.
    """
    coords, confidence = heatmap_argmax(heatmaps)
    check_weight(weight, heatmaps)
    weight = torch.ones_like(confidence) if weight is None else weight.detach().float()
    total = weight.sum(dim=1)
    weighted = torch.where(weight == 0, 0.0, weight * confidence).sum(dim=1)
    return coords, confidence, weighted / torch.where(total == 0, 1.0, total)


def subcell_offset(heatmaps, cells, confidence):
    """From the maximum's cell to the vertex of the parabola through it and its neighbours, on each axis.

    heatmaps: (B, K, H, W); cells (B, K, 2), confidence (B, K): their maxima. Returns (B, K, 2) within +- 1/2,
    0 at an edge, and NaN on an axis where a neighbour is -inf or the maximum is NaN.
    """
    height, width = heatmaps.shape[-2:]
    flat = heatmaps.flatten(2)
    index = cells.long()
    offset = []
    for axis, (size, step) in enumerate(((width, 1), (height, width))):
        i = index[..., axis]
        at = index[..., 1] * width + index[..., 0]
        edge = (i == 0) | (i == size - 1)
        before = flat.gather(2, torch.where(edge, at, at - step)[..., None])[..., 0].float()
        after = flat.gather(2, torch.where(edge, at, at + step)[..., None])[..., 0].float()
        curvature = 2 * confidence - before - after
        vertex = 0.5 * (after - before) / torch.where(curvature > 0, curvature, 1.0)
        offset.append(torch.where(edge | (curvature <= 0), 0.0, vertex.clamp(-0.5, 0.5)))
    return torch.stack(offset, -1)


def draw_gaussians(cells, height, width, sigma):
    """Gaussians of height 1 at cells (B, K, 2), (x, y), cut at 3 sigma on each axis -> (B, K, H, W)."""
    radius = 3 * sigma + 1e-3                     # 3 sigma itself is inside, as in the published targets
    profiles = []
    for axis, size in enumerate((width, height)):
        offset = torch.arange(size, device=cells.device, dtype=cells.dtype) - cells[..., axis, None]
        profiles.append(torch.exp(-offset ** 2 / (2 * sigma ** 2)) * (offset.abs() <= radius))
    return profiles[1][..., :, None] * profiles[0][..., None, :]


def rectify(heatmaps, sigma, subcell=False):
    """Each heatmap redrawn as a Gaussian of height 1 at its maximum: the teacher's pseudo-labels (§3.2).

    heatmaps: (B, K, H, W) floating point; sigma: the Gaussian's deviation in cells, cut at 3 sigma on each
    axis; subcell: at the vertex of `subcell_offset`, else at the cell. Returns maps (B, K, H, W), cells (B,
    K, 2) as (x, y) and confidence (B, K), the maximum, all float32 and contiguous. Where a coordinate is NaN
    (see `subcell_offset`) the drawn map is NaN: here all of it, by the kernel only the cells within 3 sigma
    of the other coordinate if that is a number. Not differentiable. Raises as `heatmap_argmax`, and
    ValueError for sigma <= 0.
    """
    check_positive("sigma", sigma)
    cells, confidence = heatmap_argmax(heatmaps)
    if subcell:
        cells = cells + subcell_offset(heatmaps.detach(), cells, confidence)
    return draw_gaussians(cells, *heatmaps.shape[2:], sigma), cells, confidence


def soft_argmax(heatmaps, beta):
    """Expected cell under softmax(beta * heatmap): an argmax that has a gradient.

    heatmaps: (B, K, H, W) floating point; beta > 0, the inverse temperature. Returns coords (B, K, 2), cells
    (x, y): float64 for float64 heatmaps, otherwise computed and returned in float32, within 1e-5 cells of
    float64 for sides up to 64, and in proportion beyond. A map that holds NaN or inf, or nothing but -inf,
    has coordinates and a gradient of NaN; in others a cell of -inf has the probability 0. Raises as
    `heatmap_argmax`, and for beta <= 0.
    """
    check_heatmaps(heatmaps.shape, heatmaps.dtype)
    check_positive("beta", beta)
    probability = cell_probabilities(heatmaps, beta)
    coords = expected_cell(probability, probability.dtype)
    if probability.dtype == torch.float64 or probability.device.type == "mps":   # which has no float64
        return coords
    # The value from sums in float64, its gradient from those in float32, which cost autograd half as much.
    exact = expected_cell(probability.detach(), torch.float64).to(coords.dtype)
    return coords + (exact - coords).detach()


def soft_argmax_backward(heatmaps, grad_coords, coords, stats, beta):
    """Gradient of `soft_argmax`: d/dh_n = beta p_n ((x_n - X) g_x + (y_n - Y) g_y), with (X, Y) = coords.

    grad_coords: (B, K, 2), the gradient g of the loss with respect to the coordinates; stats: the kernel's,
    not used. Returns (B, K, H, W) in the dtype and memory layout of the heatmaps.
    """
    height, width = heatmaps.shape[2:]
    xs = torch.arange(width, dtype=coords.dtype, device=coords.device)
    ys = torch.arange(height, dtype=coords.dtype, device=coords.device)
    slope = beta * grad_coords.to(coords.dtype)
    along_x = (xs - coords[..., 0, None]) * slope[..., 0, None]
    along_y = (ys - coords[..., 1, None]) * slope[..., 1, None]
    along = along_y[..., :, None] + along_x[..., None, :]
    return torch.mul(cell_probabilities(heatmaps, beta), along, out=torch.empty_like(heatmaps))


def cell_probabilities(heatmaps, beta):
    """softmax(beta * heatmap) over the cells of each map: float64 for float64 heatmaps, else float32."""
    cells = (heatmaps if heatmaps.dtype == torch.float64 else heatmaps.float()).flatten(2)
    # Differences from the maximum are exact near it; beta times the heatmap itself would be rounded first.
    # Adding a constant does not change a softmax, so the maximum needs no gradient.
    return torch.softmax(beta * (cells - cells.detach().amax(dim=2, keepdim=True)), dim=2).unflatten(
        2, heatmaps.shape[2:])


def expected_cell(probability, dtype):
    """Mean cell (x, y) under `probability` (B, K, H, W), summed in `dtype`: (B, K, 2).

    Marginals and sums in place of a matrix product, which TF32 settings would make less exact. Cells count
    from the centre, and what the softmax rounded to one is divided by its sum: the result would else carry a
    rounding error of the whole side.
    """
    columns = probability.sum(dim=2, dtype=dtype)
    rows = probability.sum(dim=3, dtype=dtype)
    width = columns.shape[2]
    height = rows.shape[2]
    x = torch.arange(width, dtype=dtype, device=columns.device) - 0.5 * (width - 1)
    y = torch.arange(height, dtype=dtype, device=rows.device) - 0.5 * (height - 1)
    total = columns.sum(dim=2)
    return torch.stack(((columns * x).sum(dim=2) / total + 0.5 * (width - 1),
                        (rows * y).sum(dim=2) / total + 0.5 * (height - 1)), dim=2)


def triplet_angles(keypoints, triplets, valid=None):
    """Angle at the middle keypoint of each triplet, the vector theta of Eq. 7.

    keypoints: (..., K, 2) floating point, (x, y); triplets: (A, 3) long, each (end, middle, end); valid:
    (..., K) bool, or None when all are. Returns angles (..., A) in [0, pi], float64 for float64 keypoints and
    else float32, and usable (..., A) bool: the three keypoints are valid and neither limb has length zero.
    The angle is atan2(|a x b|, a . b), accurate at 0 and pi where arccos is not; it is 0 where not usable.
    """
    if keypoints.dtype != torch.float64:
        keypoints = keypoints.float()
    first, middle, last = keypoints[..., triplets, :].unbind(dim=-2)
    a = first - middle
    b = last - middle
    cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    dot = a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1]
    usable = (a != 0).any(dim=-1) & (b != 0).any(dim=-1)
    if valid is not None:
        usable = usable & valid[..., triplets].all(dim=-1)
    angles = torch.atan2(cross.abs(), dot)
    return torch.where(usable, angles, torch.zeros_like(angles)), usable


def triplet_angle_distance(source, target, triplets, source_valid=None, target_valid=None, min_triplets=1):
    """Angular difference between every source and every target pose (Eq. 7).

        distance[m, n] = ||theta_m - theta_n|| * sqrt(A / n_valid) / K

    over the n_valid triplets that are usable in both poses (see `triplet_angles`). The factor sqrt(A /
    n_valid), which is ours, keeps pruning from making poses look alike; a pair with no usable triplet, or
    with fewer than `min_triplets`, has distance inf.

    source: (..., S, K, 2), target: (..., T, K, 2) floating point, (x, y) in any one unit in which coordinates
    are below 1e18 and limbs are longer than 1e-18, since the product of two limbs must neither overflow nor
    underflow in float32; leading dimensions equal or 1; triplets: (A, 3) long, keypoint indices (end, middle,
    end); source_valid (..., S, K), target_valid (..., T, K): bool, or None when all are valid. All on one
    device. Returns (..., S, T) float32, radians. Not differentiable as an operator: it is used to choose
    pairs. Raises ValueError / TypeError naming the argument for wrong shapes, dtypes or devices, and for
    triplets on a CPU that are out of range.
    """
    check_poses(source, target, triplets, source_valid, target_valid, min_triplets)
    check_indices(triplets, source.shape[-2])
    source_angles, source_usable = triplet_angles(source, triplets, source_valid)
    target_angles, target_usable = triplet_angles(target, triplets, target_valid)
    both = source_usable[..., :, None, :] & target_usable[..., None, :, :]
    difference = torch.where(both, source_angles[..., :, None, :] - target_angles[..., None, :, :], 0.0)
    count = both.sum(dim=-1)
    scale = torch.sqrt(triplets.shape[0] / count.clamp(min=1).to(difference.dtype)) / source.shape[-2]
    distance = torch.linalg.vector_norm(difference, dim=-1) * scale                                 # Eq. 7
    return torch.where(count >= max(min_triplets, 1), distance, float("inf")).float()
