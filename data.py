"""Everything between a disk (or a renderer) and a training batch.

    skeletons        BODY16, HAND21: names, limb pairs (Eq. 5), triplets (Eq. 7), score groups
    random numbers   hash_uniform: a function of (seed, sample), whatever batch the sample comes in
    geometry         views as batched 2x3 matrices: one convention for images, heatmaps and keypoints
    heatmaps         targets rendered in batch
    augmentation     views and colour jitter in batch, on the training device
    Mannequin        the built-in benchmark: an articulated figure and a batched renderer
    datasets         LSP (and LSP Extended), SURREAL, Human36M, Hand3DStudio, RenderedHandPose: the paper's
    read_mat, read_array_pickle    annotation files of MATLAB and Python, as files from outside

The geometry convention, written once: keypoints are (x, y) in pixels of the network's input, and the
centre of image pixel i lies at x = i. A heatmap cell is `stride` pixels and cell i stands for
x = stride * i. A view is a matrix M (2x3) that takes image pixels to view pixels,
(x', y') = M @ (x, y, 1); images and heatmaps are warped by it, keypoints multiplied by it, and
`invert_view` undoes it.

A dataset is anything with `skeleton`, `size`, `keypoints` (N, K, 2), `visible` (N, K), `len()` and batched
indexing: `dataset[indices]` gives uint8 crops (B, 3, S, S), keypoints (B, K, 2) in pixels, and visibility
(B, K). The augmentation happens later, in batch and on the device.
"""

import argparse
import array
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance


class DataError(ValueError):
    """A file from outside that is not what it should be; the message names it and says what was expected."""


# ----------------------------------------------------------------------------------------------------------
# Shared by all: progress, atomic writes, the letterbox
# ----------------------------------------------------------------------------------------------------------


class Progress:
    """One line on stderr that says how far the work is and how long it will take; quiet when not a terminal."""

    unfinished = False                                   # whether a line without its end stands on the terminal

    def __init__(self, title):
        self.title, self.start, self.first, self.drawn = title, None, 0, 0.0
        self.live = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"

    def __call__(self, done, total, note=""):
        """Show that `done` of `total` is finished. The time left is reckoned from the first call on."""
        now = time.time()
        if self.start is None:
            self.start, self.first = now, done
        if not self.live or (done < total and now - self.drawn < 0.2):
            return
        self.drawn = now
        left = (now - self.start) / max(done - self.first, 1) * (total - done)
        line = f"{self.title} {done}/{total}, {left // 60:.0f}:{left % 60:02.0f} left {note}"
        Progress.unfinished = done < total
        print("\r" + line.ljust(79)[:79], end="" if done < total else "\n", file=sys.stderr, flush=True)


@contextmanager
def replacing(path, keep=None):
    """A binary file to write. It takes the place of `path` when the block ends well and is removed otherwise.

    A crash or a full disk leaves the old file or the new one, whole. keep: the name that the old file is given.
    OSError names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")          # several processes may write the same file
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def letterbox_view(region, size):
    """Where a region of a picture lies in a size x size square: as large as fits, its aspect kept, centred.

    region: edges (left, top, right, bottom) in pixels of the picture. Returns (width, height) and (left, top) of its
    place in the square, whole pixels, and the view (2, 3), float64 numpy, from the picture's pixels to the square's.
    """
    left, top, right, bottom = region
    scale = size / max(right - left, bottom - top)
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    x, y = (size - width) // 2, (size - height) // 2
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    # Pixel i covers i - 1/2 ... i + 1/2, in the picture and in the square.
    view = np.array([[scale_x, 0, (0.5 - left) * scale_x - 0.5 + x], [0, scale_y, (0.5 - top) * scale_y - 0.5 + y]])
    return (width, height), (x, y), view


def letterbox(image, region, size):
    """A region of an RGB picture in a size x size square, black beside it: uint8 (3, size, size)."""
    fitted, place, _ = letterbox_view(region, size)
    square = Image.new("RGB", (size, size))
    square.paste(image.resize(fitted, Image.Resampling.BILINEAR, region), place)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------
# Skeletons
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skeleton:
    """Keypoints of one kind of body and what the paper's equations need to know of them.

    names: K keypoint names; limbs: pairs (a, b), the vectors of Eq. 5; triplets: (a, b, c), the angles at
    keypoint b of Eq. 7; groups: the columns of the paper's tables, name -> keypoint indices, "all" last;
    root: the keypoints whose mean stands in for a missing one in the Pose-VAE. ValueError where one of these
    is empty, of another length, or names a keypoint that is not there.
    """
    names: tuple
    limbs: tuple
    triplets: tuple
    groups: dict
    root: tuple

    def __post_init__(self):
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError("names: must be texts, one a keypoint")
        if not isinstance(self.groups, dict) or "all" not in self.groups:
            raise ValueError("groups: must be a dictionary of keypoints by name, with 'all' among the names")
        for what, rows, length in (("limbs", self.limbs, 2), ("triplets", self.triplets, 3),
                                   ("groups", self.groups.values(), None), ("root", [self.root], None)):
            if not rows or not all(isinstance(row, tuple) and row and length in (None, len(row)) for row in rows):
                raise ValueError(f"{what}: must be tuples of {length or 'some'} keypoints, one at least")
            for keypoint in (keypoint for row in rows for keypoint in row):
                if type(keypoint) is not int or not 0 <= keypoint < len(self.names):
                    raise ValueError(f"{what}: {keypoint!r} is no keypoint, which are 0 ... {len(self.names) - 1}")

    def __len__(self):
        return len(self.names)


def check_dataset(dataset, name):
    """DataError, which says what is expected, where `dataset` is not what a dataset must be (the module's docstring).

    Looks at the skeleton, all keypoints, and one sample; name: for the message.
    """
    def require(fits, what):
        if not fits:
            raise DataError(f"{name}: {type(dataset).__name__} {what}")

    require(isinstance(getattr(dataset, "skeleton", None), Skeleton), "needs a `skeleton`, a data.Skeleton")
    for method in ("__len__", "__getitem__", "names"):
        require(hasattr(dataset, method), f"needs the method `{method}`")
    n, k, size = len(dataset), len(dataset.skeleton), getattr(dataset, "size", None)
    require(n > 0, "holds no sample")
    require(type(size) is int, "needs `size`, the side of its images in pixels")
    for attribute, shape in (("keypoints", (n, k, 2)), ("visible", (n, k))):
        values = getattr(dataset, attribute, None)
        require(torch.is_tensor(values) and values.dtype == torch.float32 and tuple(values.shape) == shape,
                f"needs `{attribute}`, a float32 tensor of shape {shape}")
    for start in range(0, n, 1 << 20):                        # of millions, a part at a time
        part = slice(start, start + (1 << 20))
        bad = ~torch.isfinite(dataset.keypoints[part]).all(-1)
        if bad.any():
            sample, keypoint = bad.nonzero()[0].tolist()
            require(False, f"has a keypoint that is no number: {dataset.skeleton.names[keypoint]} of "
                           f"{dataset.names([start + sample])[0]}; where it is not labelled, give (0, 0) and visible 0")
    sample = dataset[torch.tensor([0])]
    shapes = ((1, 3, size, size), (1, k, 2), (1, k))
    require(len(sample) == 3 and all(torch.is_tensor(t) and tuple(t.shape) == shape for t, shape in zip(sample, shapes))
            and sample[0].dtype == torch.uint8,
            f"must give uint8 images (B, 3, {size}, {size}), keypoints (B, {k}, 2) and visible (B, {k}) for B indices")


BODY16 = Skeleton(
    names=("r-ankle", "r-knee", "r-hip", "l-hip", "l-knee", "l-ankle", "pelvis", "thorax", "upper neck",
           "head top", "r-wrist", "r-elbow", "r-shoulder", "l-shoulder", "l-elbow", "l-wrist"),
    limbs=((0, 1), (1, 2), (2, 6), (3, 6), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),          # legs and spine
           (7, 12), (12, 11), (11, 10), (7, 13), (13, 14), (14, 15),                       # arms
           (2, 3), (12, 13), (2, 12), (3, 13)),                # the trunk's frame, labelled in LSP as well
    triplets=((10, 11, 12), (13, 14, 15),                      # elbows
              (0, 1, 2), (3, 4, 5),                            # knees
              (11, 12, 13), (12, 13, 14), (11, 12, 2), (14, 13, 3),    # shoulders: to the other one, to the hip
              (1, 2, 3), (2, 3, 4), (1, 2, 12), (4, 3, 13),            # hips: to the other one, to the shoulder
              (12, 8, 9), (13, 8, 9), (7, 8, 9),               # neck
              (6, 7, 8)),                                      # spine
    groups={"shoulder": (12, 13), "elbow": (11, 14), "wrist": (10, 15), "hip": (2, 3), "knee": (1, 4),
            "ankle": (0, 5), "all": (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15)},
    root=(2, 3))

_FINGERS = tuple(range(1, 21, 4))                              # the MCP of thumb, index, middle, ring, little
HAND21 = Skeleton(
    names=("wrist",) + tuple(f"{finger} {joint}" for finger in ("thumb", "index", "middle", "ring", "little")
                             for joint in ("MCP", "PIP", "DIP", "tip")),
    limbs=tuple((a, b) for m in _FINGERS for a, b in ((0, m), (m, m + 1), (m + 1, m + 2), (m + 2, m + 3))),
    triplets=tuple(t for m in _FINGERS for t in ((0, m, m + 1), (m, m + 1, m + 2)))        # two per finger
    + tuple((m, 0, m + 4) for m in _FINGERS[:-1]),                                         # the spreads
    groups={"MCP": (1, 5, 9, 13, 17), "PIP": (2, 6, 10, 14, 18), "DIP": (3, 7, 11, 15, 19),
            "fingertip": (4, 8, 12, 16, 20), "all": tuple(range(21))},
    root=(0, 9))


# ----------------------------------------------------------------------------------------------------------
# Geometry
# ----------------------------------------------------------------------------------------------------------


def affine_view(size, rotation, shear, scale, translate):
    """Views that rotate, shear and scale about the image's centre (size / 2), then translate.

    size: side of the square image in pixels; rotation, shear: (B,) radians (positive rotation turns x
    towards y, clockwise on a screen); scale: (B,); translate: (B, 2) pixels.
    Returns (B, 2, 3). The composition is the one of the published base method (tests: `affine_*`).
    """
    cos, sin = torch.cos(rotation), torch.sin(rotation)
    tan = torch.tan(shear)
    linear = torch.stack([torch.stack([cos, -cos * tan - sin], -1),
                          torch.stack([sin, -sin * tan + cos], -1)], -2) * scale[:, None, None]
    centre = torch.full((2,), size / 2, dtype=linear.dtype, device=linear.device)
    offset = centre + translate - linear @ centre
    return torch.cat([linear, offset[..., None]], -1)


def compose_views(outer, inner):
    """The view that applies `inner` first and `outer` to its result; both (B, 2, 3) in pixels."""
    linear = outer[..., :2] @ inner[..., :2]
    offset = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, offset], -1)


def invert_view(view):
    """The inverse of views (B, 2, 3), by the closed form of a 2x2 inverse (no host-device synchronisation)."""
    a, b, c, d = view[..., 0, 0], view[..., 0, 1], view[..., 1, 0], view[..., 1, 1]
    linear = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    linear = linear / (a * d - b * c)[..., None, None]
    return torch.cat([linear, -linear @ view[..., 2:]], -1)


def map_keypoints(keypoints, view):
    """Keypoints (B, K, 2) in image pixels -> view pixels, by views (B, 2, 3)."""
    return keypoints @ view[..., :2].transpose(-1, -2) + view[..., 2].unsqueeze(-2)


def warp(maps, view, stride=1):
    """Images or heatmaps seen through views: output(M x) = input(x), zero where the view looks outside.

    maps: (B, C, H, W); view: (B, 2, 3) in pixels; stride: pixels per cell of `maps` (1 for images).
    Bilinear and differentiable. Returns (B, C, H, W).
    """
    height, width = maps.shape[-2:]
    half_x, half_y = max((width - 1) / 2, 0.5), max((height - 1) / 2, 0.5)
    exact = torch.float64 if maps.dtype == torch.float64 else torch.float32
    (a, b, x), (c, d, y) = (row.unsqueeze(-1).unbind(-2) for row in invert_view(view).to(exact).unbind(-2))
    # From output cells to input cells, in grid_sample's units: -1 ... 1 from the centre of cell 0 to the last's.
    across = torch.linspace(-1, 1, width, dtype=exact, device=maps.device)
    down = torch.linspace(-1, 1, height, dtype=exact, device=maps.device)
    x = (a * half_x + b * half_y + x / stride) / half_x - 1 + a * across
    y = (c * half_x + d * half_y + y / stride) / half_y - 1 + (c * (half_x / half_y)) * across
    # A sum over rows and columns, of x + iy, which writes x and y side by side: on a CPU a twentieth of
    # affine_grid's time.
    row, column = torch.complex(x, y), torch.complex(b * (half_y / half_x) * down, d * down)
    grid = torch.view_as_real(row[:, None, :] + column[:, :, None]).to(maps.dtype)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


# ----------------------------------------------------------------------------------------------------------
# Target heatmaps
# ----------------------------------------------------------------------------------------------------------


def draw_gaussians(cells, size, sigma):
    """Gaussians of height 1 at cells (B, K, 2), (x, y), cut at 3 sigma on each axis -> (B, K, size, size)."""
    line = torch.arange(size, device=cells.device, dtype=cells.dtype)
    offset = line - cells[..., None]                                        # (B, K, 2, size)
    radius = 3 * sigma + 1e-3                     # 3 sigma itself is inside, as in the published targets
    profile = torch.exp(-offset ** 2 / (2 * sigma ** 2)) * (offset.abs() <= radius)
    return profile[..., 1, :, None] * profile[..., 0, None, :]


def render_heatmaps(keypoints, visible, size, stride, sigma, subcell=False):
    """Target heatmaps of keypoints and the weight of each.

    keypoints: (B, K, 2) pixels; visible: (B, K), 1 where labelled; size: cells a side; stride: pixels a
    cell; sigma: cells. The Gaussian stands on the nearest cell, int(x / stride + 1/2), as in the published
    targets; `subcell` leaves it at x / stride, worth having where cells are coarse.
    Returns heatmaps (B, K, size, size) and weight (B, K): 0, with an empty map, where a keypoint is
    unlabelled or its cell lies outside.
    """
    exact = keypoints / stride
    cell = torch.floor(exact + 0.5)
    inside = ((cell >= 0) & (cell < size)).all(-1)
    weight = visible * inside
    heatmaps = draw_gaussians(exact if subcell else cell, size, sigma)
    return heatmaps * weight[..., None, None], weight


# ----------------------------------------------------------------------------------------------------------
# Augmentation: in batch, on the training device, a function of (seed, sample) alone
# ----------------------------------------------------------------------------------------------------------

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's, as the base method's


@functools.lru_cache
def _per_channel(values, device):
    """Three numbers as (3, 1, 1) on a device; kept, so that a training step makes no copy from the host."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images):
    """uint8 (B, 3, H, W) -> float32, zero mean and unit deviation by ImageNet's statistics."""
    mean, std = (_per_channel(values, images.device) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images - 255 * mean).mul_(1 / (255 * std))


def denormalise(images):
    """The inverse of `normalise`: float (B, 3, H, W) -> uint8, clamped."""
    colours = images * _per_channel(IMAGE_STD, images.device) + _per_channel(IMAGE_MEAN, images.device)
    return (colours * 255).round().clamp(0, 255).to(torch.uint8)


def random_crop_view(u, size, area):
    """Random resized crop as a view: u (B, 3) in [0, 1); area: (low, high) of the crop's area over the image's.

    A crop larger than the image shows a margin. Returns (B, 2, 3).
    """
    side = size * torch.sqrt(area[0] + (area[1] - area[0]) * u[:, 0])
    corner = (size - side)[:, None] * u[:, 1:3]
    linear = torch.eye(2, device=u.device).expand(len(u), 2, 2) * (size / side)[:, None, None]
    return torch.cat([linear, -(linear @ corner[..., None])], -1)


def random_affine_view(u, size, rotation, shear, translate, scale):
    """Random affine view: u (B, 5) in [0, 1); rotation, shear in degrees (+-); translate as a share of the
    side (+-); scale: (low, high). Returns (B, 2, 3)."""
    signed = 2 * u - 1
    return affine_view(size, torch.deg2rad(signed[:, 0] * rotation), torch.deg2rad(signed[:, 1] * shear),
                       scale[0] + (scale[1] - scale[0]) * u[:, 2], signed[:, 3:5] * (translate * size))


def colour_jitter(images, u, strength):
    """Brightness, contrast and saturation, each by a factor in 1 +- strength; u: (B, 3) in [0, 1).

    images: (B, 3, H, W), normalised; the factors act on the colours behind them.
    """
    brightness, contrast, saturation = (1 + strength * (2 * u - 1)).T[..., None, None, None]
    mean, std = (_per_channel(values, images.device) for values in (IMAGE_MEAN, IMAGE_STD))
    luma = _per_channel((0.299, 0.587, 0.114), images.device)
    # One affine map of the colours: brightness scales them; contrast scales their distance from the picture's
    # mean grey, saturation that from the pixel's own grey, which leaves greys alone as luma sums to 1.
    mean_grey = brightness * ((images.mean((2, 3), keepdim=True) * std + mean) * luma).sum(1, keepdim=True)
    gain = brightness * contrast
    offset = (gain * (saturation * mean + (1 - saturation) * (luma * mean).sum())
              + (1 - contrast) * mean_grey - mean) / std
    jittered = (images * (gain * saturation)).add_(offset)  # in place: passes over memory are the cost
    for channel in range(3):
        share = gain * (1 - saturation) * (luma * std)[channel] / std
        jittered.addcmul_(share, images[:, channel:channel + 1])
    for channel, (middle, spread) in enumerate(zip(IMAGE_MEAN, IMAGE_STD)):
        jittered[:, channel].clamp_(-middle / spread, (1 - middle) / spread)
    return jittered


# ---------------------------------------------------------------------------------------------------------
# Built-in benchmark: Mannequin -> Mannequin-Wild
#
# An articulated figure is posed by forward kinematics, seen by a perspective camera and drawn as shaded
# capsules. Everything random is a hash of (seed, index), so a sample is the same whatever batch, order,
# process or device it is drawn in. The small scene stage (poses, camera, looks) runs in float64 and the pixel
# stage uses only + - * / sqrt floor min max, which IEEE rounds exactly: sin or exp in float32 differ in the
# last bit between the vector and the remainder loop of torch, and so would depend on the batch.
# ---------------------------------------------------------------------------------------------------------

RENDERER_VERSION = 2  # part of the cache file's name: raise it when the pictures change

# Streams of random numbers: one per purpose, so that adding a draw to one leaves the others as they were.
POSE, PROPORTIONS, CAMERA, LOOK, CLUTTER, DISTRACTORS, OCCLUDERS, POST, GRAIN, FIELD = range(1, 11)
TUMBLE, FRAME, CLOTHES, EXPOSURE, GROUND, COMPANY = 40, 41, 42, 43, 44, 70       # those of `photo`

# Difficulty of the target's appearance. Lengths are fractions of the image side, colours are in [0, 1].
WILD = {
    "textured": 0.5,            # probability that a garment carries a pattern
    "pattern_contrast": 0.35,   # how far the second colour of a pattern goes from the first
    "saturation": 0.4,          # of the background's colours, 1 = any RGB colour
    "background": 0.5,          # contrast of the whole background
    "value_noise": 0.20,        # weight of the value noise in the background
    "clutter": 5,               # polygons, ellipses and bars behind the figure
    "distractors": 2,           # two-segment limbs behind the figure
    "occluders": 2,             # at most so many shapes in front of it,
    "occluder": 0.20,           # each present with this probability
    "light": 0.20,              # strength of the light gradient across the image
    "cast": 0.12,               # colour cast, per channel
    "contrast": (0.80, 1.15),
    "blur": 0.008,              # largest standard deviation of the blur
    "grain": 0.030,             # largest standard deviation of the sensor noise
}
PLAIN = {"gradient": 0.25, "value_noise": 0.06}  # the source: a smooth gradient, faintly mottled

# The third look, `photo`: a labelled source for real photographs of sports, letterboxed as `LSP` pads them.
# Its poses and what is not named here are the target's.
PHOTO = {
    "tumbling": 0.45,           # probability of any direction of the body in the image
    "extent": (0.20, 0.80),     # longer side of the figure's box, drawn evenly in its logarithm
    "aspects": (0.66, 0.75, 0.75, 1.0, 1.33, 1.33, 1.5),    # width over height of the photograph
    "offset": 0.20,             # of the figure from the photograph's centre, +-
    "company": (0.45, 0.25),    # probability of each further figure, behind
    "poles": 3,                 # long thin bars behind the figure
    "bar": 0.20,                # probability of one in front of it
    "structure": 0.40,          # probability of windows, fences, stands: a grid above the horizon
    "grey": 0.05,               # probability of a picture without colour
    "exposure": (0.55, 1.30),
}

# Ranges of the joint angles in degrees. The prefix a_/b_ names the two sides, left and right after a coin
# toss; without a prefix an entry of the limbs holds for both. Signs: `lean`, `bend`, `nod` forward; `hip`,
# `arm` forward (flexion); `spread`, `lift` outwards (abduction); `legrot` outwards, `armrot` inwards;
# `roll` in the image plane, `yaw` about the body's long axis (within 70: the front is always seen).
TRUNK = ("roll", "yaw", "lean", "bend", "side", "twist", "nod", "turn", "tilt")
LIMB = ("hip", "spread", "legrot", "knee", "arm", "lift", "armrot", "elbow")
ANGLES = TRUNK + tuple(f"a_{n}" for n in LIMB) + tuple(f"b_{n}" for n in LIMB)
MIRRORED = ("roll", "side", "twist", "turn", "tilt")  # change sign when left and right are exchanged

# Human limits, never exceeded by a kind of pose below.
JOINT_LIMITS = {
    "bend": (-30, 90), "side": (-35, 35), "twist": (-45, 45), "nod": (-45, 50), "turn": (-70, 70),
    "tilt": (-40, 40), "hip": (-35, 125), "spread": (-20, 70), "legrot": (-40, 50), "knee": (0, 145),
    "arm": (-60, 180), "lift": (-10, 100), "armrot": (-90, 80), "elbow": (0, 145),
}
STANDING = {
    "roll": (-5, 5), "yaw": (-70, 70), "lean": (-5, 5), "bend": (-4, 10), "side": (-6, 6), "twist": (-10, 10),
    "nod": (-12, 18), "turn": (-25, 25), "tilt": (-10, 10), "hip": (-8, 12), "spread": (0, 12),
    "legrot": (-5, 25), "knee": (0, 14), "arm": (-15, 18), "lift": (4, 22), "armrot": (-10, 40),
    "elbow": (4, 35),
}
FREE_ARMS = {"arm": (-30, 130), "lift": (5, 80), "armrot": (-50, 60), "elbow": (5, 120)}
# name: (weight in the source, weight in the target, upright, ranges that differ from STANDING); weights are
# relative: sample_poses divides them by their sum.
POSES = {
    "stand": (0.34, 0.09, True, {}),
    "walk": (0.24, 0.10, True, {
        "a_hip": (8, 35), "a_knee": (0, 30), "b_hip": (-25, 0), "b_knee": (5, 45), "a_arm": (-32, -4),
        "b_arm": (5, 38), "elbow": (5, 50), "bend": (0, 12)}),
    "gesture": (0.22, 0.09, True, {
        "a_arm": (0, 90), "a_lift": (5, 60), "a_elbow": (10, 115), "a_armrot": (-30, 60), "b_arm": (-15, 40),
        "b_lift": (4, 40), "b_elbow": (5, 90)}),
    "crouch": (0.030, 0.08, False, {
        **FREE_ARMS, "hip": (60, 118), "knee": (70, 140), "spread": (5, 42), "lean": (0, 32),
        "bend": (5, 40)}),
    "kick": (0.020, 0.09, False, {
        **FREE_ARMS, "a_hip": (45, 120), "a_knee": (0, 65), "a_spread": (0, 45), "b_hip": (-15, 12),
        "b_knee": (0, 35), "lean": (-30, 8), "roll": (-28, 12), "side": (-20, 20)}),
    "lunge": (0.025, 0.09, False, {
        **FREE_ARMS, "a_hip": (45, 100), "a_knee": (50, 110), "b_hip": (-33, -5), "b_knee": (5, 65),
        "spread": (3, 35), "lean": (0, 28), "bend": (-5, 35), "roll": (-12, 12)}),
    "raise": (0.035, 0.09, False, {
        "arm": (105, 180), "lift": (0, 55), "armrot": (-30, 30), "elbow": (0, 75), "hip": (-15, 35),
        "spread": (0, 40), "knee": (0, 65), "bend": (-25, 10), "side": (-20, 20), "roll": (-15, 15)}),
    "sit": (0.025, 0.06, False, {
        "hip": (70, 105), "knee": (10, 110), "spread": (3, 35), "lean": (-25, 12), "bend": (-5, 35),
        "arm": (-30, 80), "lift": (5, 45), "elbow": (10, 100)}),
    "run": (0.020, 0.12, False, {
        "a_hip": (35, 90), "a_knee": (45, 120), "b_hip": (-33, 0), "b_knee": (10, 95), "lean": (5, 30),
        "a_arm": (-58, -15), "b_arm": (15, 85), "elbow": (55, 120), "twist": (-20, 20), "roll": (-12, 12)}),
    "throw": (0.015, 0.09, False, {
        **FREE_ARMS, "a_arm": (50, 170), "a_lift": (15, 95), "a_armrot": (-85, 20), "a_elbow": (20, 125),
        "a_hip": (-30, 15), "b_hip": (0, 70), "knee": (0, 70), "spread": (3, 40), "twist": (-40, 40),
        "side": (-28, 28), "bend": (-15, 40), "roll": (-18, 18)}),
    "stoop": (0.010, 0.05, False, {
        "lean": (10, 45), "bend": (30, 80), "hip": (10, 70), "knee": (0, 50), "arm": (30, 130),
        "lift": (3, 50), "elbow": (0, 80), "nod": (-40, 20)}),
    "handstand": (0.006, 0.05, False, {
        "roll": (150, 210), "arm": (150, 180), "lift": (0, 35), "elbow": (0, 30), "hip": (-22, 70),
        "spread": (0, 55), "knee": (0, 90), "bend": (-25, 15), "nod": (-40, 10), "lean": (-15, 15)}),
    "cartwheel": (0.006, 0.05, False, {
        "roll": (100, 170), "arm": (140, 180), "lift": (5, 55), "elbow": (0, 30), "hip": (-20, 30),
        "spread": (25, 68), "knee": (0, 35), "side": (-25, 25)}),
    "lie": (0.008, 0.05, False, {
        **FREE_ARMS, "a_arm": (-20, 170), "roll": (68, 112), "hip": (-10, 85), "knee": (0, 110),
        "spread": (0, 40), "bend": (-15, 30)}),
}
POSE_NAMES = tuple(POSES)
UPRIGHT = tuple(p[2] for p in POSES.values())  # the easy kinds; the rest is the tail

# Mean lengths in metres; a figure's are these times a common stature and a factor of its own each.
SEGMENTS = {"hips": 0.20, "spine": 0.50, "shoulders": 0.35, "neck": 0.10, "head": 0.24, "upper_arm": 0.29,
            "forearm": 0.26, "thigh": 0.44, "shin": 0.43}


def _signed(value):
    """The 64-bit pattern of a Python integer as the signed value torch.int64 stores."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x, bits):
    """Logical right shift of int64 (torch's own shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x):
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of the 64-bit integers; any shape."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


GOLDEN = _signed(0x9E3779B97F4A7C15)


def _hash(seed, index, stream):
    """State (B,) int64 of the samples `index` (B,) int64 in one stream of one seed."""
    key = _signed(seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D)
    key = _mix(torch.full((1,), key, dtype=torch.int64, device=index.device))      # filled there, not copied
    return _mix(_mix(index ^ key) + GOLDEN)


def hash_uniform(seed, index, count, stream=0):
    """Random numbers that depend on (seed, stream, index, column) alone: (B, count) float32 in [0, 1).

    `index` is a (B,) int64 tensor of counters (any value); all arithmetic wraps modulo 2^64.
    """
    columns = torch.arange(1, count + 1, device=index.device) * GOLDEN
    bits = _mix(_hash(seed, index, stream)[:, None] + columns)
    return _shift(bits, 40).to(torch.float32) * 2.0 ** -24


def _hash_normal(state):
    """Nearly normal numbers of mean 0 and variance 1, one per int64 of `state`, as float32.

    The sum of four 16-bit uniforms (Irwin-Hall): exact arithmetic, unlike Box-Muller's log and cos.
    """
    bits = _mix(state)
    total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + ((bits >> 48) & 0xFFFF)
    return (total.to(torch.float32) * 2.0 ** -16 - 2.0) * math.sqrt(3.0)


def _pose_table():
    """Ranges (kinds, angles, 2) in radians from POSES, checked against JOINT_LIMITS."""
    table = torch.empty(len(POSES), len(ANGLES), 2, dtype=torch.float64)
    for k, (kind, (_, _, _, ranges)) in enumerate(POSES.items()):
        for j, name in enumerate(ANGLES):
            plain = name[2:] if name[:2] in ("a_", "b_") else name
            low, high = ranges.get(name, ranges.get(plain, STANDING[plain]))
            least, most = JOINT_LIMITS.get(plain, (-360, 360))
            if not least <= low <= high <= most:
                raise ValueError(f"POSES[{kind!r}]: {name} = ({low}, {high}) leaves the joint's limits "
                                 f"({least}, {most}); narrow the range.")
            table[k, j, 0], table[k, j, 1] = math.radians(low), math.radians(high)
    return table


def _rotation(axis, angle):
    """Rotations (B,3,3) by `angle` (B,) radians about the axis 0, 1 or 2 (right-handed)."""
    c, s, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rows = {0: (one, zero, zero, zero, c, -s, zero, s, c),
            1: (c, zero, s, zero, one, zero, -s, zero, c),
            2: (c, -s, zero, s, c, zero, zero, zero, one)}[axis]
    return torch.stack(rows, -1).view(-1, 3, 3)


@dataclass
class Figures:
    """B posed figures in metres: x to the image's right, y up, z towards the camera, pelvis at the origin."""
    joints: torch.Tensor    # (B,16,3) float64, in the order of BODY16
    lengths: dict           # segment -> (B,) metres; of hips and shoulders the full width
    girth: torch.Tensor     # (B,) factor of all radii
    kind: torch.Tensor      # (B,) index into POSE_NAMES
    root: torch.Tensor      # (B,3,3) frame of the pelvis; columns: body's left, up, front
    chest: torch.Tensor     # (B,3,3)
    head: torch.Tensor      # (B,3,3)
    feet: tuple             # toes (left, right), each (B,3)
    hands: tuple            # finger tips (left, right), each (B,3)


def sample_poses(seed, index, domain):
    """Posed figures of the samples `index` (B,) int64 under the pose distribution of `domain`.

    `domain` is 'source' (long-tailed, 80 % upright), 'target' (sports-like) or 'photo' (the same, seen from any
    side and often head down). Forward kinematics from the pelvis outwards: segments keep their lengths, only
    angles within JOINT_LIMITS vary. Returns Figures.
    """
    device = index.device
    weights = torch.tensor([p[0 if domain == "source" else 1] for p in POSES.values()], dtype=torch.float64)
    draws = hash_uniform(seed, index, 2 + len(ANGLES), POSE).double()
    edges = (weights.cumsum(0) / weights.sum())[:-1].to(device)
    kind = torch.searchsorted(edges, draws[:, 0].contiguous(), right=True)
    table = _pose_table().to(device)[kind]
    values = table[..., 0] + (table[..., 1] - table[..., 0]) * draws[:, 2:]
    angle = dict(zip(ANGLES, values.unbind(1)))
    mirror = draws[:, 1] < 0.5
    for name in MIRRORED:
        angle[name] = torch.where(mirror, -angle[name], angle[name])
    if domain == "photo":
        turn = hash_uniform(seed, index, 3, TUMBLE).double()
        angle["yaw"] = 2 * math.pi * turn[:, 0]
        angle["roll"] = torch.where(turn[:, 1] < PHOTO["tumbling"], 2 * math.pi * turn[:, 2], angle["roll"])
    side_of = {+1: {n: torch.where(mirror, angle["b_" + n], angle["a_" + n]) for n in LIMB},
               -1: {n: torch.where(mirror, angle["a_" + n], angle["b_" + n]) for n in LIMB}}

    body = hash_uniform(seed, index, len(SEGMENTS) + 2, PROPORTIONS).double() * 2 - 1
    stature = 1 + 0.08 * body[:, 0]
    girth = 1.20 + 0.20 * body[:, 1]
    lengths = {name: mean * stature * (1 + 0.09 * body[:, 2 + i])
               for i, (name, mean) in enumerate(SEGMENTS.items())}
    camera = hash_uniform(seed, index, 1, CAMERA).double()
    pitch = math.radians(12) * (2 * camera[:, 0] - 1)

    root = (_rotation(0, pitch) @ _rotation(2, angle["roll"]) @ _rotation(1, angle["yaw"])
            @ _rotation(0, angle["lean"]))
    chest = root @ _rotation(0, angle["bend"]) @ _rotation(2, angle["side"]) @ _rotation(1, angle["twist"])
    head = chest @ _rotation(0, angle["nod"]) @ _rotation(2, angle["tilt"]) @ _rotation(1, angle["turn"])

    def along(frame, axis, metres):
        return frame[:, :, axis] * metres[:, None]

    pelvis = torch.zeros(len(index), 3, dtype=torch.float64, device=device)
    thorax = pelvis + along(chest, 1, lengths["spine"])
    neck = thorax + along(chest, 1, lengths["neck"])
    top = neck + along(head, 1, lengths["head"])
    sides = {}
    for side in (+1, -1):  # the body's left, its right
        a = side_of[side]
        hip = pelvis + along(root, 0, side * lengths["hips"] / 2)
        thigh = (root @ _rotation(0, -a["hip"]) @ _rotation(2, side * a["spread"])
                 @ _rotation(1, side * a["legrot"]))
        knee = hip - along(thigh, 1, lengths["thigh"])
        shin = thigh @ _rotation(0, a["knee"])
        ankle = knee - along(shin, 1, lengths["shin"])
        toe = ankle + along(shin, 2, 0.15 * stature) - along(shin, 1, 0.07 * stature)
        shoulder = thorax + along(chest, 0, side * lengths["shoulders"] / 2)
        upper = (chest @ _rotation(0, -a["arm"]) @ _rotation(2, side * a["lift"])
                 @ _rotation(1, -side * a["armrot"]))
        elbow = shoulder - along(upper, 1, lengths["upper_arm"])
        fore = upper @ _rotation(0, -a["elbow"])
        wrist = elbow - along(fore, 1, lengths["forearm"])
        tip = wrist - along(fore, 1, 0.09 * stature)
        sides[side] = (ankle, knee, hip, toe, wrist, elbow, shoulder, tip)
    ankle, knee, hip, toe_l, wrist, elbow, shoulder, tip_l = sides[+1]
    r_ankle, r_knee, r_hip, toe_r, r_wrist, r_elbow, r_shoulder, tip_r = sides[-1]
    joints = torch.stack((r_ankle, r_knee, r_hip, hip, knee, ankle, pelvis, thorax, neck, top,
                          r_wrist, r_elbow, r_shoulder, shoulder, elbow, wrist), 1)
    return Figures(joints, lengths, girth, kind, root, chest, head, (toe_l, toe_r), (tip_l, tip_r))


@dataclass
class View:
    """A perspective camera per figure; (u, v) is in image sides from the top left corner, v downwards."""
    distance: torch.Tensor  # (B,) metres from the camera to the plane of the pelvis
    scale: torch.Tensor     # (B,) image sides per metre at that plane
    shift: torch.Tensor     # (B,2)

    def project(self, points):
        """(B,N,3) metres -> (B,N,2) image sides."""
        near = (self.scale * self.distance)[:, None] / (self.distance[:, None] - points[..., 2])
        flat = torch.stack((points[..., 0] * near, -points[..., 1] * near), -1)
        return flat + self.shift[:, None]


def _photo_frame(seed, index):
    """Width and height (B,2) of the photograph in its square of 1, black beside it, as `fit_square` leaves it."""
    draw = hash_uniform(seed, index, 1, FRAME).double()[:, 0]
    aspects = torch.tensor(PHOTO["aspects"], dtype=torch.float64, device=index.device)
    aspect = aspects[(draw * len(aspects)).long()]
    return torch.stack((aspect, 1 / aspect), 1).clamp(max=1)


def _frame_figures(seed, index, figures, domain):
    """Cameras that put each figure's box at 60-80 % of the image, wholly inside up to a hand or a foot; in a
    'photo' at PHOTO["extent"], about the middle of the photograph."""
    draws = hash_uniform(seed, index, 5, CAMERA).double()
    distance = 3.0 + 4.0 * draws[:, 1]
    centred = torch.zeros_like(draws[:, :2])
    flat = View(distance, torch.ones_like(distance), centred).project(figures.joints)
    low, high = flat.amin(1), flat.amax(1)
    if domain == "photo":
        least, most = (math.log(extent) for extent in PHOTO["extent"])
        scale = (least + (most - least) * draws[:, 2]).exp() / (high - low).amax(1)
        frame = _photo_frame(seed, index)
        scale = torch.minimum(scale, (0.96 * frame / (high - low)).amin(1))
        room = (0.98 * frame - (high - low) * scale[:, None]) / 2
        offset = torch.maximum(torch.minimum(PHOTO["offset"] * (2 * draws[:, 3:5] - 1), room), -room)
        return View(distance, scale, 0.5 + offset - (low + high) / 2 * scale[:, None])
    extent = 0.60 + 0.20 * draws[:, 2]
    scale = extent / (high - low).amax(1)
    room = (1 - (high - low) * scale[:, None]) / 2
    # A crop around a person, roughly centred; the margin is the flesh around the joints, not to be cut off.
    offset = (2 * draws[:, 3:5] - 1) * (room - 0.06).clamp(0, 0.06)
    return View(distance, scale, 0.5 + offset - (low + high) / 2 * scale[:, None])


def _skin(draws):
    """Skin colours (B,3) from three uniform numbers (B,3): from pale to dark, a little varied."""
    pale = torch.tensor([0.95, 0.78, 0.67], dtype=torch.float64, device=draws.device)
    dark = torch.tensor([0.38, 0.24, 0.17], dtype=torch.float64, device=draws.device)
    tone = (1 - draws[:, :1]) * pale + draws[:, :1] * dark
    return (tone + 0.06 * (draws - 0.5)).clamp(0, 1)


def _grey(colours):
    """Mean (B,1,...) of colours (B,3,...), added in one order whatever the batch."""
    return (colours[:, 0:1] + colours[:, 1:2] + colours[:, 2:3]) / 3


def _clothes(seed, index, shirt, trousers, shoes, skin):
    """What athletes wear in a 'photo': muted, dark or white; arms, legs, feet or all but the trunks often bare.

    All (B,3). Returns shirt, trousers, shoes and the colours of upper arms and thighs.
    """
    d = hash_uniform(seed, index, 10, CLOTHES).double()

    def muted(colour, u, v):
        grey = _grey(colour)
        colour = grey + (0.2 + 0.8 * v[:, None]) * (colour - grey)
        colour = torch.where((u < 0.3)[:, None], 0.05 + 0.15 * colour, colour)            # black, navy, ...
        return torch.where((u > 0.8)[:, None], 0.82 + 0.16 * colour, colour)              # white

    shirt, trousers = muted(shirt, d[:, 0], d[:, 1]), muted(trousers, d[:, 2], d[:, 3])
    trousers = torch.where(d[:, 4:5] < 0.25, shirt, trousers)                             # a leotard, a tracksuit
    shirt = torch.where(d[:, 5:6] < 0.12, skin, shirt)
    shoes = torch.where(d[:, 6:7] < 0.3, skin, shoes)
    upper_arm = torch.where(d[:, 7:8] < 0.45, skin, shirt)
    thigh = torch.where(d[:, 8:9] < 0.35, skin, trousers)
    return shirt, trousers, shoes, upper_arm, thigh


def _capsules(seed, index, figures, view, domain):
    """The figure (and the target's distractor limbs) as tapered capsules: dict of (B,P) and (B,P,3) tensors.

    ends `a`, `b` (B,P,2) and radii `ra`, `rb` in image sides, depths `za`, `zb` in metres, `metres` per
    image side, colours `first`, `second`, and the pattern that mixes them (kind, frequency, phase).
    """
    j = figures.joints
    look = hash_uniform(seed, index, 40, LOOK).double()
    size = figures.girth * (figures.lengths["spine"] / SEGMENTS["spine"])
    skin = _skin(look[:, 0:3])
    shirt, trousers, shoes, mark = look[:, 3:6], look[:, 6:9], look[:, 9:12] * 0.7, look[:, 12:15]
    hair = look[:, 15:18] * torch.tensor([0.5, 0.35, 0.25], dtype=torch.float64, device=look.device)
    upper_arm, thigh = shirt, trousers
    if domain == "photo":
        shirt, trousers, shoes, upper_arm, thigh = _clothes(seed, index, shirt, trousers, shoes, skin)
    # The mark and the face must stand out, or front and back (hence left and right) could not be told.
    mark = torch.where((shirt.mean(1) > 0.5)[:, None], mark * 0.3, 0.7 + mark * 0.3)
    sleeve = torch.where(look[:, 18:19] < 0.5, upper_arm, skin)
    shank = torch.where(look[:, 19:20] < 0.65, thigh, skin)
    eyes = torch.full_like(skin, 0.05)

    def at(point, frame, x, y, z):
        return point + frame[:, :, 0] * x + frame[:, :, 1] * y + frame[:, :, 2] * z

    wide = 0.5 * figures.lengths["hips"][:, None]
    span = 0.5 * figures.lengths["shoulders"][:, None]
    unit = size[:, None]
    head_radius = (0.42 * figures.lengths["head"])[:, None]
    crown = j[:, 9] - figures.head[:, :, 1] * head_radius
    jaw = crown - figures.head[:, :, 1] * 0.35 * head_radius
    breast = at(j[:, 7], figures.chest, 0 * unit, -0.13 * unit, 0.085 * unit)
    parts = []  # (end, end, radius, radius in metres, colour, garment: 0 shirt, 1 trousers, -1 none)

    def part(a, b, ra, rb, colour, garment):
        parts.append((a, b, ra * size, rb * size, colour, garment))

    for side, hip, knee, ankle, toe, shoulder, elbow, wrist, tip in (
            (+1, 3, 4, 5, figures.feet[0], 13, 14, 15, figures.hands[0]),
            (-1, 2, 1, 0, figures.feet[1], 12, 11, 10, figures.hands[1])):
        part(j[:, hip], j[:, knee], 0.088, 0.060, thigh, 1)
        part(j[:, knee], j[:, ankle], 0.060, 0.044, shank, 1)
        part(j[:, ankle] - 0.02 * (toe - j[:, ankle]), toe, 0.050, 0.040, shoes, -1)
        part(j[:, shoulder], j[:, elbow], 0.056, 0.043, upper_arm, 0)
        part(j[:, elbow], j[:, wrist], 0.044, 0.036, sleeve, 0)
        part(j[:, wrist], tip, 0.040, 0.044, skin, -1)
        part(at(j[:, 6], figures.root, side * wide * 0.55, 0 * unit, 0 * unit),
             at(j[:, 7], figures.chest, side * span * 0.50, -0.08 * unit, 0 * unit), 0.088, 0.098, shirt, 0)
        part(at(crown, figures.head, side * 0.36 * head_radius, 0 * unit, 0.88 * head_radius),
             at(crown, figures.head, side * 0.36 * head_radius, 0.01 * unit, 0.88 * head_radius),
             0.022, 0.022, eyes, -1)
    part(j[:, 2], j[:, 3], 0.085, 0.085, trousers, 1)
    part(at(j[:, 7], figures.chest, span * 0.85, -0.03 * unit, 0 * unit),
         at(j[:, 7], figures.chest, -span * 0.85, -0.03 * unit, 0 * unit), 0.062, 0.062, shirt, 0)
    part(at(j[:, 7], figures.chest, 0 * unit, -0.02 * unit, 0 * unit), j[:, 8], 0.056, 0.050, skin, -1)
    part(breast, breast - figures.chest[:, :, 1] * 0.10 * unit, 0.052, 0.052, mark, -1)
    back = at(crown, figures.head, 0 * unit, 0 * unit, -0.10 * head_radius)
    parts.append((back, jaw - figures.head[:, :, 2] * 0.25 * head_radius, head_radius[:, 0],
                  head_radius[:, 0] * 0.8, hair, -1))
    face = at(crown, figures.head, 0 * unit, -0.22 * head_radius, 0.30 * head_radius)
    parts.append((face, at(jaw, figures.head, 0 * unit, -0.1 * head_radius, 0.2 * head_radius),
                  head_radius[:, 0] * 0.82, head_radius[:, 0] * 0.68, skin, -1))

    ends_a, ends_b = torch.stack([p[0] for p in parts], 1), torch.stack([p[1] for p in parts], 1)
    near_a = view.distance[:, None] / (view.distance[:, None] - ends_a[..., 2]) * view.scale[:, None]
    near_b = view.distance[:, None] / (view.distance[:, None] - ends_b[..., 2]) * view.scale[:, None]
    capsules = {
        "a": view.project(ends_a), "b": view.project(ends_b),
        "ra": torch.stack([p[2] for p in parts], 1) * near_a,
        "rb": torch.stack([p[3] for p in parts], 1) * near_b,
        "za": ends_a[..., 2], "zb": ends_b[..., 2],
        "first": torch.stack([p[4] for p in parts], 1),
        "metres": (1 / view.scale)[:, None].expand(-1, len(parts)),
    }
    garment = torch.tensor([p[5] for p in parts], device=index.device)
    capsules["second"] = capsules["first"]
    capsules["pattern"] = torch.zeros_like(capsules["ra"])
    capsules["frequency"] = torch.ones_like(capsules["ra"])
    if domain != "source":
        for g, column in ((0, 20), (1, 27)):
            d = look[:, column:column + 7]
            kind = (1 + (d[:, 1] * 4).floor()) * (d[:, 0] < WILD["textured"])
            worn = (garment == g)[None]
            base = shirt if g == 0 else trousers
            # A sleeve or a leg of bare skin keeps its plain look.
            worn = worn & (capsules["first"] == base[:, None]).all(-1)
            other = base + (d[:, 2:5] - base) * WILD["pattern_contrast"]
            capsules["second"] = torch.where(worn[..., None], other[:, None], capsules["second"])
            capsules["pattern"] = torch.where(worn, kind[:, None], capsules["pattern"])
            capsules["frequency"] = torch.where(worn, (5 + 9 * d[:, 5:6]), capsules["frequency"])
    if domain == "target":
        limbs = _distractors(seed, index, view, torch.stack((skin, shirt, trousers), 1))
        capsules = {name: torch.cat((limbs[name], capsules[name]), 1) for name in capsules}
    return capsules


def _company(seed, index, view):
    """Further figures behind that of a 'photo', as its `_capsules`: onlookers, unlabelled."""
    crowd = []
    for n, probability in enumerate(PHOTO["company"]):
        d = hash_uniform(seed, index, 4, COMPANY + n).double()
        other = _hash(seed, index, COMPANY + 11 + n)
        figures = sample_poses(seed, other, "target" if n else "source")                  # one stands, one is at it
        scale = view.scale * (0.35 + 0.5 * d[:, 1])
        place = torch.where((d[:, 0] < probability)[:, None], 0.1 + 0.8 * d[:, 2:4], torch.full_like(d[:, 2:4], -9))
        crowd.append(_capsules(seed, other, figures, View(view.distance, scale, place), "photo"))
        for depth in ("za", "zb"):
            crowd[-1][depth] = crowd[-1][depth] - 8 * (n + 1)                             # behind all of the figure
    return crowd


def _distractors(seed, index, view, colours):
    """Limb-like pairs of capsules behind the figure, in the manner of `_capsules`; `colours` (B,3,3)."""
    count = WILD["distractors"]
    d = hash_uniform(seed, index, count * 14, DISTRACTORS).double().view(len(index), count, 14)
    start = d[..., 0:2]
    turn = 2 * math.pi * d[..., 2]
    reach = 0.12 + 0.14 * d[..., 3]
    middle = start + torch.stack((turn.cos(), turn.sin()), -1) * reach[..., None]
    turn = turn + (d[..., 4] - 0.5) * 4
    end = middle + torch.stack((turn.cos(), turn.sin()), -1) * (0.10 + 0.14 * d[..., 5])[..., None]
    radius = 0.020 + 0.022 * d[..., 6]
    own = torch.where((d[..., 7] < 0.4)[..., None], d[..., 8:11],
                      colours.gather(1, (d[..., 11] * 3).long()[..., None].expand(-1, -1, 3)))
    depth = torch.full_like(radius, -4.0)
    pattern = torch.where(d[..., 12] < 0.3, 1 + (d[..., 13] * 4).floor(), torch.zeros_like(depth))
    pair = {"a": (start, middle), "b": (middle, end),
            "ra": (radius * 1.2, radius), "rb": (radius, radius * 0.75),
            "za": (depth, depth), "zb": (depth, depth), "first": (own, own), "second": (1 - own, 1 - own),
            "metres": ((1 / view.scale)[:, None].expand_as(depth),) * 2, "pattern": (pattern, pattern),
            "frequency": (depth * 0 + 8, depth * 0 + 8)}
    return {name: torch.cat(two, 1) for name, two in pair.items()}


def _box_pixels(low, high, size):
    """Pixels of the boxes low..high (B,2) in pixels: sample, y and x indices, each (M,)."""
    i = torch.arange(size, device=low.device)
    columns = (i >= low[:, :1]) & (i <= high[:, :1])
    rows = (i >= low[:, 1:]) & (i <= high[:, 1:])
    return (rows[:, :, None] & columns[:, None, :]).nonzero(as_tuple=True)


def _triangle_wave(x):
    """Period 1, from 0 to 1 and back: a stripe pattern without sin."""
    return (2 * (x - x.floor()) - 1).abs()


def _pattern(kind, u, v, frequency, salt):
    """Weight (M,) in [0, 1] of a pattern's second colour at (u, v) metres on the cloth.

    kind 0 plain, 1 rings, 2 lengthwise stripes, 3 checks, 4 blotches; `salt` (M,) int64 seeds the blotches.
    """
    def hard(wave):
        return ((wave - 0.5) * 3 + 0.5).clamp(0, 1)
    ring, stripe = hard(_triangle_wave(u * frequency)), hard(_triangle_wave(v * frequency))
    check = ring + stripe - 2 * ring * stripe
    cell = (u * frequency * 2).floor().long() * 7919 + (v * frequency * 2).floor().long() * 104729
    blotch = _shift(_mix(salt + cell), 40).to(u.dtype) * 2.0 ** -24
    return torch.where(kind == 1, ring, torch.where(kind == 2, stripe, torch.where(
        kind == 3, check, torch.where(kind == 4, blotch, torch.zeros_like(u)))))


def _paint_capsules(canvas, capsules, light, salt, size):
    """Draw capsules (see `_capsules`) over canvas (B,3,S,S) in place, the nearest on top pixel by pixel.

    They are visited from far to near, so that a soft edge mixes with what lies behind it. Only the pixels
    of a capsule's box are computed. light (B,3) points to the lamp; salt (B,) int64 seeds the patterns.
    """
    order = (capsules["za"] + capsules["zb"]).argsort(dim=1, stable=True)
    depth = torch.full((len(canvas), size, size), -1e3, device=canvas.device)
    light = light.float()
    for column in order.unbind(1):
        rows = torch.arange(len(column), device=column.device)
        c = {name: value[rows, column] for name, value in capsules.items()}
        a, b = c["a"] * size - 0.5, c["b"] * size - 0.5
        ra, rb = c["ra"] * size, c["rb"] * size
        low = torch.minimum(a - ra[:, None], b - rb[:, None]) - 1
        high = torch.maximum(a + ra[:, None], b + rb[:, None]) + 1
        n, y, x = _box_pixels(low, high, size)
        ab = b - a
        length2 = (ab * ab).sum(1)
        per_sample = torch.stack((
            a[:, 0], a[:, 1], ab[:, 0], ab[:, 1], ab[:, 0] / length2.clamp(min=1e-6),
            ab[:, 1] / length2.clamp(min=1e-6), ra, rb - ra, c["za"], c["zb"] - c["za"], c["metres"] / size,
            c["pattern"], c["frequency"], length2.sqrt(),
            *c["first"].unbind(1), *c["second"].unbind(1))).float()
        (ax, ay, dx, dy, ex, ey, r0, dr, z0, dz, metres, kind, frequency, length,
         *colours) = per_sample[:, n].unbind(0)
        px, py = x.float() - ax, y.float() - ay
        t = (px * ex + py * ey).clamp(0, 1)
        ox, oy = px - t * dx, py - t * dy          # offset from the axis
        away = (ox * ox + oy * oy).sqrt()
        radius = r0 + t * dr
        cover = (radius - away + 0.5).clamp(0, 1)
        bulge = (radius * radius - away * away).clamp(min=0).sqrt()
        z = z0 + t * dz + bulge * metres
        cover = torch.where(z > depth[n, y, x], cover, torch.zeros_like(cover))
        lx, ly, lz = light[n].unbind(1)
        shade = 0.45 + 0.60 * ((ox * lx + oy * ly + bulge * lz) / radius.clamp(min=1e-3)).clamp(min=0)
        # Darker towards the outline, so that a limb shows before a body part of the same colour.
        shade = shade * (0.6 + 0.4 * bulge / radius.clamp(min=1e-3))
        across = (ox * dy - oy * dx) / length.clamp(min=1e-3)
        second = _pattern(kind, t * length * metres, across * metres + 10, frequency, salt[n])
        first = torch.stack(colours[:3])
        colour = (first + second * (torch.stack(colours[3:]) - first)) * shade
        under = canvas[n, :, y, x].T
        canvas[n, :, y, x] = (under + cover * (colour - under)).T
        depth[n, y, x] = torch.where(cover > 0.5, z, depth[n, y, x])


def _paint_shapes(canvas, draws, present, extent, size, poles=False):
    """Draw flat ellipses, boxes, triangles and thin bars over canvas (B,3,S,S) in place.

    draws (B,P,12) uniform numbers, present (B,P) bool, extent (least, most) half-size in image sides; poles:
    nothing but thin bars, two in three of them upright or level.
    """
    d = draws.double()
    centre = d[..., 0:2] * size - 0.5
    turn = math.pi * d[..., 2]
    half = (extent[0] + (extent[1] - extent[0]) * d[..., 3]) * size
    bar = d[..., 5] < (1 if poles else 0.3)
    aspect = torch.where(bar, 0.06 + 0.10 * d[..., 4], 0.4 + 0.6 * d[..., 4])
    if poles:
        turn, aspect = torch.where(d[..., 6] < 0.67, (2 * d[..., 2]).round() * (math.pi / 2), turn), 0.2 * aspect
    long = torch.where(bar, half * 1.8, half)
    kind = torch.where(bar, torch.ones_like(half), (d[..., 6] * 3).floor())  # 0 ellipse, 1 box, 2 triangle
    reach = torch.where(present, long * 1.5, torch.full_like(long, -1e4))
    values = torch.stack((centre[..., 0], centre[..., 1], turn.cos(), turn.sin(), long,
                          (long * aspect).clamp(min=0.6), kind, *d[..., 7:12].unbind(-1))).float()
    for p in range(d.shape[1]):
        n, y, x = _box_pixels(centre[:, p] - reach[:, p, None], centre[:, p] + reach[:, p, None], size)
        cx, cy, cos, sin, w, h, kind, red, green, blue, slope, stripes = values[:, n, p].unbind(0)
        px, py = x.float() - cx, y.float() - cy
        u, v = (px * cos + py * sin) / w, (py * cos - px * sin) / h
        ellipse = (u * u + v * v).sqrt()
        box = torch.maximum(u.abs(), v.abs())
        triangle = torch.maximum(v, 2 * u.abs() - v - 1)
        edge = torch.where(kind == 0, ellipse, torch.where(kind == 1, box, triangle))
        cover = ((1 - edge) * h + 0.5).clamp(0, 1)
        band = torch.where(stripes < 0.3, 0.65 + 0.7 * _triangle_wave(u * (2 + 12 * stripes)),
                           torch.ones_like(u))
        colour = torch.stack((red, green, blue)) * band * (1 + (slope - 0.5) * u)
        under = canvas[n, :, y, x].T
        canvas[n, :, y, x] = (under + cover * (colour - under)).T


def _value_noise(seed, index, cells, channels, size, stream):
    """Smooth noise (B,channels,S,S) in [0, 1): random values on a grid of cells x cells, interpolated."""
    grid = hash_uniform(seed, index, channels * (cells + 1) ** 2, stream)
    grid = grid.view(len(index), channels, cells + 1, cells + 1)
    at = (torch.arange(size, device=index.device).float() + 0.5) * (cells / size)
    low = at.floor().clamp(max=cells - 1)
    w = at - low
    w = w * w * (3 - 2 * w)
    low = low.long()
    rows = grid[:, :, low] * (1 - w)[:, None] + grid[:, :, low + 1] * w[:, None]
    return rows[..., low] * (1 - w) + rows[..., low + 1] * w


def _backgrounds(seed, index, domain, size):
    """Backgrounds (B,3,S,S) float32: a vertical gradient, mottled in the source, cluttered in the target."""
    d = hash_uniform(seed, index, 8, FIELD)[..., None, None]
    ramp = ((torch.arange(size, device=index.device).float() + 0.5) / size)[None, None, :, None]
    if domain == "source":
        base = 0.25 + 0.65 * d[:, 0:1] + 0.12 * (d[:, 1:4] - 0.5)
        mottle = _value_noise(seed, index, 4, 1, size, FIELD + 10) - 0.5
        return base + PLAIN["gradient"] * (d[:, 4:5] * 2 - 1) * (ramp - 0.5) + PLAIN["value_noise"] * mottle
    canvas = d[:, 0:3] + (d[:, 3:6] - d[:, 0:3]) * ramp
    canvas = canvas.expand(-1, -1, -1, size).clone()
    for octave, cells in enumerate((3, 6, 12, 24)):
        noise = _value_noise(seed, index, cells, 3 if octave == 0 else 1, size, FIELD + 10 + octave) - 0.5
        canvas += WILD["value_noise"] * 2 * noise / (1 + 0.5 * octave)
    draws = hash_uniform(seed, index, WILD["clutter"] * 12, CLUTTER).view(len(index), -1, 12)
    _paint_shapes(canvas, draws, draws[..., 0] >= 0, (0.05, 0.24), size)
    grey = _grey(canvas)
    canvas = grey + WILD["saturation"] * (canvas - grey)
    level = d[:, 6:7]
    return level + WILD["background"] * (canvas - level)


def _photo_backgrounds(seed, index, size):
    """Backgrounds (B,3,S,S) float32 of a 'photo': ground and what stands behind it, either with noise of its own
    spectrum, from mats and sky to gravel and leaves; windows, fences or stands; flat things; poles."""
    d = hash_uniform(seed, index, 26, GROUND)[..., None, None]
    place = (torch.arange(size, device=index.device).float() + 0.5) / size
    x, y = place[None, None, None, :], place[None, None, :, None]
    horizon = 0.25 + 0.7 * d[:, 0:1]
    above = (((horizon + (d[:, 1:2] - 0.5) * 0.3 * d[:, 2:3] * (x - 0.5)) - y) * size + 0.5).clamp(0, 1)
    fields = []
    for part, column in enumerate((3, 10)):
        colour, e = d[:, column:column + 3], d[:, column + 3:column + 7]
        grey = _grey(colour)
        field = grey + 0.5 * e[:, 0:1] * (colour - grey) + (e[:, 1:2] - 0.5) * 0.4 * (y - 0.5)
        weight, tint = 0.30 * e[:, 2:3] * e[:, 2:3], 1 + 0.5 * (d[:, 23:26] - 0.5)
        for octave, cells in enumerate((3, 6, 12, 24, 48)):
            noise = _value_noise(seed, index, min(cells, size), 1, size, GROUND + 10 + 10 * part + octave) - 0.5
            field = field + 2 * weight * tint * noise
            weight = weight * (0.45 + 0.65 * e[:, 3:4])              # from smooth shading to rough surfaces
        fields.append(field)
    across, down = (_triangle_wave(axis * (2 + 14 * e)) for axis, e in ((x, d[:, 17:18]), (y, d[:, 18:19])))
    wide, high = d[:, 19:20], d[:, 20:21]
    grid = ((across - wide) * 4).clamp(0, 1) * ((down - high) * 4).clamp(0, 1)
    built = (d[:, 21:22] < PHOTO["structure"]).float() * (d[:, 22:23] - 0.5)
    canvas = fields[0] + above * (fields[1] + built * grid - fields[0])
    draws = hash_uniform(seed, index, 4 * 12, CLUTTER).view(len(index), -1, 12)
    draws = torch.cat((draws[..., :7], 0.3 * draws[..., 7:10] + 0.7 * draws[..., 7:8], draws[..., 10:]), -1)
    _paint_shapes(canvas, draws, draws[..., 0] < 0.6, (0.04, 0.30), size)
    draws = hash_uniform(seed, index, PHOTO["poles"] * 13, DISTRACTORS).view(len(index), -1, 13)
    draws[..., 7:10] = 0.3 * draws[..., 7:10] + 0.7 * draws[..., 7:8]                     # mostly grey
    _paint_shapes(canvas, draws[..., :12], draws[..., 12] < 0.5, (0.15, 0.5), size, poles=True)
    return canvas


def _blur(images, sigma):
    """Separable Gaussian blur of (B,3,S,S) by sigma (B,) pixels.

    The border is repeated outwards first: zeros would leave a dark frame that gives the domain away.
    """
    # The widest blur there can be, not the widest of this batch: an image must not depend on its batch.
    reach = max(1, math.ceil(2.5 * WILD["blur"] * images.shape[-1]))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float64)
    taps = (-0.5 * (offsets / sigma.double().clamp(min=0.05)[:, None]) ** 2).exp()
    taps = (taps / taps.sum(1, keepdim=True)).float()
    size = images.shape[-1]
    for dim in (2, 3):
        position = torch.arange(size, device=images.device)
        total = torch.zeros_like(images)
        for k in range(2 * reach + 1):
            total += taps[:, k, None, None, None] * images.index_select(
                dim, (position + (k - reach)).clamp(0, size - 1))
        images = total
    return images


def _photograph(seed, index, images):
    """What camera and lamp do to the target's images (B,3,S,S): light, cast, contrast, blur, grain."""
    size = images.shape[-1]
    d = hash_uniform(seed, index, 10, POST)
    turn = 2 * math.pi * d[:, 0].double()
    place = (torch.arange(size, device=index.device).float() + 0.5) / size - 0.5
    slope = torch.stack((turn.cos(), turn.sin()), 1).float() * (2 * WILD["light"] * d[:, 1:2])
    light = 1 + slope[:, 0, None, None] * place + slope[:, 1, None, None] * place[:, None]
    cast = 1 + WILD["cast"] * (2 * d[:, 2:5] - 1)
    low, high = WILD["contrast"]
    contrast = (low + (high - low) * d[:, 5])[:, None, None, None]
    level = 0.5 + 0.16 * (d[:, 6] - 0.5)[:, None, None, None]
    images = (images * light[:, None] * cast[:, :, None, None] - 0.5) * contrast + level
    images = _blur(images, WILD["blur"] * size * d[:, 7])
    cells = torch.arange(3 * size * size, device=index.device) * GOLDEN
    grain = _hash_normal(_hash(seed, index, GRAIN)[:, None] + cells).view_as(images)
    return images + (WILD["grain"] * d[:, 8] * d[:, 8])[:, None, None, None] * grain


def _expose(seed, index, images):
    """A 'photo' from images (B,3,S,S): exposure, now and then grey, black beside the photograph."""
    size, d = images.shape[-1], hash_uniform(seed, index, 2, EXPOSURE)[..., None, None]
    low, high = PHOTO["exposure"]
    images = images * (low + (high - low) * d[:, 0:1])
    images = torch.where(d[:, 1:2] < PHOTO["grey"], _grey(images), images)
    width, height = (_photo_frame(seed, index) * size / 2).round().float()[..., None, None, None].unbind(1)
    from_centre = (torch.arange(size, device=index.device).float() + 0.5 - size / 2).abs()
    return images * (from_centre < width) * (from_centre[:, None] < height)


def _render_chunk(seed, index, domain, size):
    """Images (B,3,S,S) uint8 of the samples `index` (B,) int64, on its device."""
    figures = sample_poses(seed, index, domain)
    view = _frame_figures(seed, index, figures, domain)
    capsules = _capsules(seed, index, figures, view, domain)
    if domain == "photo":
        images = _photo_backgrounds(seed, index, size)
        crowd = [*_company(seed, index, view), capsules]
        capsules = {name: torch.cat([c[name] for c in crowd], 1) for name in capsules}
    else:
        images = _backgrounds(seed, index, domain, size)
    images = images.expand(-1, 3, size, size).contiguous()
    lamp = torch.tensor([[-0.35, -0.60, 0.72]], dtype=torch.float64, device=index.device)
    lamp = lamp.repeat(len(index), 1)
    if domain != "source":
        d = hash_uniform(seed, index, 2, POST + 10).double()
        lamp = lamp + torch.stack((1.2 * (d[:, 0] - 0.5), 0.8 * (d[:, 1] - 0.5), 0 * d[:, 0]), 1)
        lamp = lamp / (lamp * lamp).sum(1, keepdim=True).sqrt()
    _paint_capsules(images, capsules, lamp, _hash(seed, index, LOOK + 20), size)
    if domain == "target":
        d = hash_uniform(seed, index, WILD["occluders"] * 13, OCCLUDERS).view(len(index), -1, 13)
        _paint_shapes(images, d[..., :12], d[..., 12] < WILD["occluder"], (0.05, 0.13), size)
        images = _photograph(seed, index, images)
    if domain == "photo":
        d = hash_uniform(seed, index, 13, OCCLUDERS).view(len(index), 1, 13)
        _paint_shapes(images, d[..., :12], d[..., 12] < PHOTO["bar"], (0.15, 0.5), size, poles=True)
        images = _expose(seed, index, _photograph(seed, index, images))
    return (images * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


class Mannequin:
    """The built-in benchmark: figures on plain ground ('source') or in the wild ('target'), BODY16.

    domain 'source', 'target', or 'photo', a labelled source that resembles photographs of sports; split
    'train', 'val' or 'test' (the splits and domains draw from disjoint ranges of counters); size S in pixels;
    count samples (default: DEFAULT_COUNTS). Poses and keypoints are computed at once; the images are rendered
    together when the first one is asked for and kept as uint8.
    `cache` is a directory for them (created if missing, safe to delete): one .npy file whose name carries
    all parameters. `progress(done, total)` is called while rendering.

    Attributes: skeleton, size, keypoints (N,16,2) float32 pixels (x, y), visible (N,16) float32: 1 where
    the keypoint lies inside the image (its place is known even if something covers it), kind (N,) int64
    index into POSE_NAMES, upright (N,) bool.
    Raises ValueError for an unknown domain or split, or a size or count below 1.
    """
    skeleton = BODY16
    DEFAULT_COUNTS = {("source", "train"): 6000, ("source", "val"): 500, ("source", "test"): 1000,
                      ("target", "train"): 2000, ("target", "val"): 500, ("target", "test"): 1000,
                      ("photo", "train"): 6000}
    CHUNK_PIXELS = 25 * 64 * 64

    def __init__(self, domain, split, size=64, count=None, seed=0, cache=None, progress=None):
        if (domain, split) not in self.DEFAULT_COUNTS:
            raise ValueError(f"Mannequin: no domain {domain!r} with split {split!r}; "
                             "use 'source' or 'target' with 'train', 'val' or 'test', or 'photo' with 'train'.")
        count = self.DEFAULT_COUNTS[domain, split] if count is None else count
        if size < 1 or count < 1:
            raise ValueError(f"Mannequin: size {size} and count {count} must be at least 1.")
        self.domain, self.split, self.size, self.seed = domain, split, int(size), int(seed)
        self.cache = None if cache is None else Path(cache)
        self.progress = progress
        block = list(self.DEFAULT_COUNTS).index((domain, split))
        self.counters = torch.arange(count) + (block << 32)
        figures = sample_poses(self.seed, self.counters, domain)
        self.joints3d = figures.joints.float()
        view = _frame_figures(self.seed, self.counters, figures, domain)
        self.keypoints = (view.project(figures.joints) * self.size - 0.5).float()
        inside = (self.keypoints >= 0) & (self.keypoints <= self.size - 1)
        self.visible = inside.all(-1).float()
        self.kind = figures.kind
        self.upright = torch.tensor(UPRIGHT)[self.kind]
        self._images = None

    def __len__(self):
        return len(self.counters)

    def names(self, indices):
        """Names of samples, e.g. 'target-test-000012'."""
        return [f"{self.domain}-{self.split}-{int(i):06d}" for i in indices]

    def __getitem__(self, indices):
        """Images (B,3,S,S) uint8, keypoints (B,16,2) and visible (B,16) float32 of 1-D `indices`."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self._images is None:
            self._images = self._load()
        return self._images[indices], self.keypoints[indices], self.visible[indices]

    def render(self, indices, device="cpu"):
        """Render samples afresh on any device, without cache: (B,3,S,S) uint8."""
        counters = self.counters[torch.as_tensor(indices, dtype=torch.int64)].to(device)
        chunk = max(1, self.CHUNK_PIXELS // self.size ** 2)
        return torch.cat([_render_chunk(self.seed, part, self.domain, self.size)
                          for part in counters.split(chunk)])

    def cache_file(self):
        """Path of the cache file, or None without a cache directory."""
        if self.cache is None:
            return None
        settings = (RENDERER_VERSION, self.domain, self.split, self.size, len(self), self.seed, WILD,
                    PHOTO if self.domain == "photo" else PLAIN, POSES, SEGMENTS)
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        return self.cache / f"mannequin-{self.domain}-{self.split}-{self.size}px-{len(self)}-{digest}.npy"

    def _load(self):
        """All images from the cache if it holds them, rendered (and stored) otherwise."""
        shape, path = (len(self), 3, self.size, self.size), self.cache_file()
        if path is not None and path.exists():
            try:
                stored = np.load(path, allow_pickle=False)
            except (ValueError, EOFError, OSError):
                stored = np.empty(0)  # cut short or not ours: rendered again below
            if stored.shape == shape and stored.dtype == np.uint8:
                return torch.from_numpy(stored)
        images = torch.empty(shape, dtype=torch.uint8)
        chunk = max(1, self.CHUNK_PIXELS // self.size ** 2)
        for start in range(0, len(self), chunk):
            part = self.counters[start:start + chunk]
            images[start:start + chunk] = _render_chunk(self.seed, part, self.domain, self.size)
            if self.progress is not None:
                self.progress(min(start + chunk, len(self)), len(self))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other processes may render it too
            with open(part, "wb") as file:
                np.save(file, images.numpy(), allow_pickle=False)
            os.replace(part, path)
        return images


# ----------------------------------------------------------------------------------------------------------
# MATLAB files (level 5, what MATLAB writes with -v6 and -v7)
# ----------------------------------------------------------------------------------------------------------

MAX_MAT_BYTES = 1 << 28  # of one variable: seventy times the largest annotation that the loaders read
_MAT_HEADER_BYTES = 4096  # enough for a variable's flags, dimensions and name
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15
_MAT_STORAGE = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
                13: "u8"}
_MAT_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MAT_NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8",
                15: "u8"}
_MAT_CHAR, _MAT_OPAQUE = 4, 17
_MAT_UNREAD = {1: "a cell array", 2: "a struct", 3: "an object", 5: "a sparse matrix",
               16: "a function handle", 17: "an object"}


def read_mat(path, name):
    """One numeric or char variable of a MATLAB level-5 file, plain or compressed, of either byte order.

    Numeric arrays come in MATLAB's shape and class as C-ordered native arrays (a logical array as uint8).
    A char array (..., n) comes as an array (...) of strings, a row of text as shape (1,). Cells, structs,
    objects and sparse matrices are stepped over. The file is treated as untrusted: nothing in it is executed,
    every size is checked against the bytes that are there before memory is taken, and a variable of more than
    `MAX_MAT_BYTES` is refused.

    Raises FileNotFoundError without the file; ValueError, which names the file, where it is no level-5 file
    (HDF5-based v7.3 files included), is damaged, lacks the variable (those present are listed), or the
    variable is of a kind that is not read.
    """
    with open(path, "rb") as file:
        try:
            return _read_mat_variable(file, os.fstat(file.fileno()).st_size, name)
        except (ValueError, zlib.error) as error:
            raise DataError(f"{path}: {error}") from error


def _read_mat_variable(file, file_bytes, name):
    header = file.read(128)
    if header.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise DataError("a MATLAB v7.3 (HDF5) file; load it in MATLAB and save it again with "
                         "save(..., '-v7')")
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    if order is None or struct.unpack(order + "H", header[124:126])[0] >> 8 != 1:
        raise DataError("not a MATLAB level-5 file (no such header); save it with MATLAB's save(..., '-v7')")

    present = []
    position = 128
    while position < file_bytes:
        file.seek(position)
        tag = file.read(8)
        if len(tag) < 8:
            raise DataError(f"truncated: {len(tag)} bytes of an 8-byte tag at offset {position}")
        kind, nbytes = struct.unpack(order + "II", tag)
        if nbytes > file_bytes - position - 8:
            raise DataError(f"truncated: the element at offset {position} declares {nbytes} bytes, "
                             f"{file_bytes - position - 8} are left")
        if kind == _MAT_MATRIX:
            inflate, start = None, file.read(min(nbytes, _MAT_HEADER_BYTES))
            matrix_bytes = nbytes
        elif kind == _MAT_COMPRESSED:
            inflate = zlib.decompressobj()
            start = inflate.decompress(file.read(min(nbytes, 65536)), _MAT_HEADER_BYTES)
            if len(start) < 8:
                raise DataError(f"truncated: the compressed element at offset {position} is cut short")
            kind, matrix_bytes = struct.unpack(order + "II", start[:8])
            start = start[8:]
        if kind != _MAT_MATRIX:
            raise DataError(f"the element at offset {position} is of type {kind}, not a variable: "
                             "the file is damaged")
        matrix_class, is_complex, shape, found, at = _mat_variable_header(start[:matrix_bytes], order)
        if found == name:
            if matrix_class in _MAT_UNREAD or is_complex:
                raise DataError(f"variable {name!r} is {_MAT_UNREAD.get(matrix_class, 'complex')}; only "
                                 "real numeric and char arrays are read")
            if matrix_bytes > MAX_MAT_BYTES or nbytes > MAX_MAT_BYTES:
                raise DataError(f"variable {name!r} declares {max(matrix_bytes, nbytes)} bytes, more than "
                                 f"the limit of {MAX_MAT_BYTES}")
            # Eight bytes a value, the widest class. Empty axes count as one, or an empty array could still
            # claim billions of rows.
            if min(shape) < 0 or 8 * math.prod(max(n, 1) for n in shape) > MAX_MAT_BYTES:
                raise DataError(f"variable {name!r} has dimensions {shape}, negative or beyond the limit of "
                                 f"{MAX_MAT_BYTES} bytes")
            missing = matrix_bytes - len(start)
            if inflate is None:
                matrix = start + file.read(missing)
            else:
                rest = inflate.unconsumed_tail + file.read(nbytes - min(nbytes, 65536))
                # One byte more than declared, so that zlib runs on to the checksum at its end.
                matrix = start + inflate.decompress(rest, max(missing, 0) + 1)
                if not inflate.eof or len(matrix) != matrix_bytes:
                    raise DataError(f"variable {name!r} does not inflate to the {matrix_bytes} bytes "
                                     "that it declares")
            return _mat_array(matrix, at, matrix_class, shape, order)
        present.append(found)
        position += 8 + nbytes
    raise DataError(f"no variable {name!r}; the file holds "
                     + (", ".join(present[:20]) + (", ..." if len(present) > 20 else "") or "none"))


def _mat_element(data, at, order):
    """The element at byte `at` of `data` -> (type, its bytes, where the next one begins)."""
    if at + 8 > len(data):
        raise DataError("truncated: a variable ends inside an element's tag")
    kind, nbytes = struct.unpack_from(order + "II", data, at)
    if kind >> 16:  # a small element: size and type share the first word, up to four bytes follow at once
        kind, nbytes, begin, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if nbytes > 4:
            raise DataError(f"a small element declares {nbytes} bytes, at most 4 fit: the file is damaged")
    else:
        begin, following = at + 8, at + 8 + nbytes + -nbytes % 8
    if begin + nbytes > len(data):
        raise DataError(f"truncated: an element declares {nbytes} bytes, {len(data) - begin} are left")
    return kind, memoryview(data)[begin:begin + nbytes], following


def _mat_variable_header(data, order):
    """First bytes of a variable -> (class, whether complex, shape, name, where its values begin)."""
    kind, flags, at = _mat_element(data, 0, order)
    if kind != 6 or len(flags) != 8:
        raise DataError("a variable without array flags: the file is damaged")
    word = struct.unpack_from(order + "I", flags)[0]
    matrix_class = word & 0xFF
    if matrix_class not in _MAT_NUMERIC and matrix_class not in _MAT_UNREAD and matrix_class != _MAT_CHAR:
        raise DataError(f"a variable of class {matrix_class}, which does not exist: the file is damaged")
    shape = ()
    if matrix_class != _MAT_OPAQUE:  # the one class without dimensions
        kind, sizes, at = _mat_element(data, at, order)
        if kind != 5 or len(sizes) % 4 or not 8 <= len(sizes) <= 4 * 32:
            raise DataError("a variable without valid dimensions: the file is damaged")
        shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    kind, letters, at = _mat_element(data, at, order)
    if kind not in (1, 2, 16):
        raise DataError("a variable without a name: the file is damaged")
    return matrix_class, bool(word & 0x800), shape, bytes(letters).decode("latin-1"), at


def _mat_array(matrix, at, matrix_class, shape, order):
    """The values at byte `at` of a variable as an array of its class and shape."""
    kind, data, _ = _mat_element(matrix, at, order)
    if matrix_class == _MAT_CHAR:
        if kind not in _MAT_TEXT:
            raise DataError(f"text stored as type {kind}: the file is damaged")
        encoding = _MAT_TEXT[kind]
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if order == "<" else "-be"
        # MATLAB's dimensions count UTF-16 units, whatever encoding the file stores.
        text = bytes(data).decode(encoding, "replace").encode("utf-16-le", "replace")
        values = np.frombuffer(text, "<u2")
    else:
        if kind not in _MAT_STORAGE:
            raise DataError(f"numbers stored as type {kind}: the file is damaged")
        storage = np.dtype(order + _MAT_STORAGE[kind])
        if len(data) % storage.itemsize:
            raise DataError(f"{len(data)} bytes of values are no multiple of {storage.itemsize}")
        values = np.frombuffer(data, storage)
    if values.size != math.prod(shape):
        raise DataError(f"dimensions {shape} ask for {math.prod(shape)} values, {values.size} are stored")
    values = values.reshape(shape, order="F")  # MATLAB is column-major

    if matrix_class == _MAT_CHAR:
        if values.size == 0:
            return np.zeros(shape[:-1], dtype="U1")
        rows = np.ascontiguousarray(values).reshape(-1, shape[-1])
        strings = [row.tobytes().decode("utf-16-le", "replace") for row in rows]
        return np.array(strings, dtype=str).reshape(shape[:-1])
    # MATLAB stores an array in the smallest type that holds its values, so class and storage differ; the
    # storage of values that the class cannot hold is damage.
    target = np.dtype(_MAT_NUMERIC[matrix_class])
    if storage.kind == "f" and (target.kind != "f" or storage.itemsize > target.itemsize):
        raise DataError(f"an array of class {target.name} stored as {storage.name}: the file is damaged")
    array = np.array(values, dtype=target, order="C")
    if target.kind != "f" and not np.array_equal(array, values):
        raise DataError(f"values outside the range of their class {target.name}: the file is damaged")
    return array


# ----------------------------------------------------------------------------------------------------------
# Datasets on disk: what their loaders share
# ----------------------------------------------------------------------------------------------------------

MAX_CROPS_BYTES = 2 << 30  # crops are kept in memory up to this size, beyond it decoded at every use
INDEX_CACHE_BYTES = 64 << 20  # larger annotation files leave their arrays beside them for the next time
_MAX_ENTRY_CHARS = 1 << 20  # of one sample in an annotation file; the real ones have three thousand
_BLOCK = 4096  # samples that pass through Python objects at a time
_SPLITS = ("train", "val", "test")
# What Pillow's decoders raise on damaged files, beside OSError.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError,
                  struct.error, zlib.error, Image.DecompressionBombError)


class _CropsOnDisk:
    """Batched indexing over crops that are decoded when they are asked for.

    A subclass sets `skeleton`, `size`, `keypoints` (N, K, 2) and `visible` (N, K), calls `_make_room`, and
    defines `_name(i)` -> str, `_source(i)` -> (image file, the region (left, top, width, height) that
    the crop shows, None for all of it), and `_decode(i)` -> uint8 (3, S, S).
    """

    def _make_room(self):
        shape = len(self), 3, self.size, self.size
        nbytes = math.prod(shape)
        # Shared pages: what one worker of a DataLoader has decoded serves the others. Untouched pages cost
        # nothing: a set read in part takes memory for that part.
        self._crops = None
        if 0 < nbytes <= MAX_CROPS_BYTES:
            self._crops = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).view(shape)
        self._decoded = torch.frombuffer(mmap.mmap(-1, max(len(self), 1)), dtype=torch.bool)

    def __len__(self):
        return len(self.keypoints)

    def names(self, indices):
        """Names of samples, a 1-D list, array or tensor of indices -> list of str."""
        return [self._name(i) for i in _index_tensor(indices, len(self)).tolist()]

    def __getitem__(self, indices):
        """Images (B, 3, S, S) uint8, keypoints (B, K, 2) and visible (B, K) float32 of 1-D `indices`."""
        indices = _index_tensor(indices, len(self))
        if self._crops is None:
            images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
            for row, i in enumerate(indices.tolist()):
                images[row] = self._decode(i)
        else:
            for i in indices[~self._decoded[indices]].unique().tolist():
                self._crops[i] = self._decode(i)
                self._decoded[i] = True
            images = self._crops[indices]
        return images, self.keypoints[indices], self.visible[indices]


def _check_arguments(split, size):
    if split not in _SPLITS:
        raise ValueError(f"split {split!r}: must be 'train', 'val' or 'test'")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size {size!r}: must be a positive integer, the side of the crop in pixels")


def _index_tensor(indices, n):
    """1-D integer indices as a LongTensor, each checked to be within -n ... n-1 and made non-negative."""
    indices = torch.as_tensor(indices)
    if indices.ndim != 1 or (len(indices) and (indices.is_floating_point() or indices.dtype == torch.bool)):
        raise TypeError("indices must be a 1-D list, array or tensor of integers, not "
                        f"{indices.dtype} of shape {tuple(indices.shape)}")
    indices = indices.long()
    if len(indices) and (indices.min() < -n or indices.max() >= n):
        raise IndexError(f"indices reach from {indices.min()} to {indices.max()}; there are {n} samples")
    return torch.where(indices < 0, indices + n, indices)


def _find_annotation(root, relative, layout):
    """root / relative, a file of every copy of the dataset; FileNotFoundError says where it is instead."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory; give the one that holds {layout}")
    if not (root / relative).is_file():
        below, above = sorted(root.glob(f"*/{relative}")), root.resolve().parent
        found = below[0].parents[len(Path(relative).parts) - 1] if below else above
        if (found / relative).is_file():
            hint = f"it is in {found}; give that directory"
        else:
            hint = f"the directory to give holds {layout}"
        raise FileNotFoundError(f"{root / relative}: missing; {hint}")
    return root / relative


def _open_image(file, listed_in=None):
    """The picture behind a path, its header read; `listed_in` is the annotation file that names it."""
    try:
        return Image.open(file)
    except FileNotFoundError as error:
        source = f"{listed_in} lists it; " if listed_in else ""
        raise FileNotFoundError(f"{file}: missing; {source}fetch the image again") from error
    except _DECODE_ERRORS as error:
        raise DataError(f"{file}: not a readable image ({error}); fetch it again") from error


def _read_crop(file, size, region=None, sides=None, listed_in=None):
    """A picture, or the region (left, top, width, height) of it, fitted into a square: uint8 (3, size, size).

    sides: (width, height) that the annotation was made for, in pixels; DataError where it has others.
    """
    with _open_image(file, listed_in) as image:
        width, height = image.size
        if sides is not None and (width, height) != tuple(sides):
            raise DataError(f"{file}: {width} x {height} pixels, its keypoints are annotated for "
                            f"{sides[0]} x {sides[1]}; take images and annotations from the same release")
        left, top, wide, high = region or (0, 0, width, height)
        fitted, (column, row) = fit_square(wide, high, size)
        try:
            # JPEG decodes large pictures at 1/2, 1/4 or 1/8 at a fraction of the cost, never below the size
            # wanted.
            image.draft(None, (math.ceil(width * fitted[0] / wide), math.ceil(height * fitted[1] / high)))
            picture = image.convert("RGB")
        except _DECODE_ERRORS as error:
            raise DataError(f"{file}: cannot be decoded ({error}); fetch the image again") from error
    # The reduced picture's sides are rounded up; the original covers width / reduction of it, so that the
    # mapping of coordinates stays exact.
    reduction = 1 << round(math.log2(max(width / picture.width, height / picture.height, 1)))
    box = [value / reduction for value in (left, top, left + wide, top + high)]
    if all(value.is_integer() for value in box):
        # The same filter as PIL's, several times as fast where the processor has vectors of bytes.
        shown = picture if region is None else picture.crop(tuple(map(int, box)))
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None]
        if pixels.shape[2:] != fitted[::-1]:
            pixels = F.interpolate(pixels, fitted[::-1], mode="bilinear", antialias=True, align_corners=False)
        pixels = pixels[0]
    else:
        resized = picture.resize(fitted, Image.Resampling.BILINEAR, tuple(box))
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    if fitted == (size, size):
        return pixels
    crop = torch.zeros(3, size, size, dtype=torch.uint8)
    crop[:, row:row + fitted[1], column:column + fitted[0]] = pixels
    return crop


def fit_square(width, height, size):
    """Sides of a picture of width x height fitted into size x size, and (left, top) of its centred place."""
    scale = size / max(width, height)
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    return fitted, ((size - fitted[0]) // 2, (size - fitted[1]) // 2)


# ----------------------------------------------------------------------------------------------------------
# LSP and LSP Extended
# ----------------------------------------------------------------------------------------------------------

_LSP_SLOTS = (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9)  # BODY16 keypoint of each of the 14 joints


class LSP(_CropsOnDisk):
    """Leeds Sports Pose and LSP Extended: sports photographs with 14 labelled joints.

    `root` holds `joints.mat` and `images/`. Which of the two it is shows in the shape of `joints`:
      LSP           (3, 14, N), `images/im0001.jpg` ...; third value 1 = occluded
      LSP Extended  (14, 3, N), `images/im00001.jpg` ...; third value 1 = labelled
    An occluded joint of LSP has a position and counts as labelled, as in the published protocol. A joint of
    LSP Extended that is not labelled, and pelvis and thorax, which neither has, get visible = 0 and keypoint
    (0, 0). Labelled joints may lie outside the picture; they stay labelled.

    split: 'train', 'val' or 'test'.
    transductive: True makes every split the whole set, which is the published protocol of SURREAL -> LSP (the
        unlabelled training images are the test images). False keeps them apart: LSP's own halves (the first
        1,000 of 2,000 train, the others test, no 'val'); for LSP Extended, in file order, 80 % train,
        5 % val, 15 % test. None (default): True for LSP, False for LSP Extended, which has no published
        protocol.
    size: side S of the crop in pixels.

    Each photograph is resized, its aspect kept, until its longer side is S, and padded with zeros, centred,
    to S x S. Image pixel i is at coordinate i; PIL's resize maps pixel centres, so a joint at x of a picture
    w wide, resized to w', goes to (x + 0.5) w'/w - 0.5 + left, and the same for y. The joints' coordinates
    are used as published: MATLAB may have counted them from 1, a shift below the annotators' precision.

    Attributes: skeleton, size, files, keypoints (N, 16, 2) float32 in pixels (x, y) of the crop, visible
    (N, 16) float32. `ds[indices]` with a 1-D list, array or LongTensor gives (images uint8 (B, 3, S, S),
    keypoints (B, 16, 2), visible (B, 16)). Crops are decoded at first use and kept where the whole set fits
    into `MAX_CROPS_BYTES`.

    Raises FileNotFoundError for a missing root, joints.mat or image, ValueError for files or arguments that
    are not as described, IndexError / TypeError for bad indices; each names the file or argument.
    """
    skeleton = BODY16

    def __init__(self, root, split="train", size=256, transductive=None):
        _check_arguments(split, size)
        root = Path(root)
        joints_file = _find_annotation(root, "joints.mat", "joints.mat and images/")
        extended, positions, labelled = _read_lsp_joints(joints_file)
        files = _find_lsp_images(root / "images", len(positions), extended, joints_file)
        chosen = _lsp_split(len(files), split, extended, transductive, root)

        self.size = size
        self.files = files[chosen]
        self.keypoints = torch.zeros(len(self.files), 16, 2)
        self.visible = torch.zeros(len(self.files), 16)
        self.visible[:, _LSP_SLOTS] = torch.from_numpy(labelled[chosen]).float()
        mapped = [(xy + 0.5) * scale - 0.5 + offset
                  for xy, (scale, offset) in zip(positions[chosen], map(self._crop_geometry, self.files))]
        self.keypoints[:, _LSP_SLOTS] = torch.from_numpy(np.stack(mapped)).float()
        self.keypoints[self.visible == 0] = 0

        self._make_room()

    def _name(self, i):
        return self.files[i].name

    def _source(self, i):
        return self.files[i], None

    def _crop_geometry(self, file):
        """Scale and offset, each (x, y), from the picture to the crop; reads the picture's header alone."""
        with _open_image(file) as image:
            picture = np.array(image.size, dtype=np.float64)
        fitted, offset = fit_square(*image.size, self.size)
        return np.array(fitted) / picture, np.array(offset)

    def _decode(self, i):
        return _read_crop(self.files[i], self.size)


def _read_lsp_joints(joints_file):
    """joints.mat -> (extended, positions (N, 14, 2) in pixels of the photographs, labelled (N, 14) bool)."""
    joints = read_mat(joints_file, "joints")
    shape = joints.shape
    if joints.ndim == 2:  # MATLAB drops a last axis of one
        joints = joints[..., None]
    if joints.ndim != 3 or joints.shape[:2] not in ((3, 14), (14, 3)) or joints.dtype.kind not in "fiu":
        raise DataError(f"{joints_file}: 'joints' has shape {shape}, expected (3, 14, N), LSP, or "
                         "(14, 3, N), LSP Extended")
    if joints.shape[2] == 0:
        raise DataError(f"{joints_file}: 'joints' has shape {shape}: no image")
    extended = joints.shape[0] == 14
    joints = joints.transpose((2, 0, 1) if extended else (2, 1, 0)).astype(np.float64)
    flag = joints[..., 2]
    if not np.isin(flag, (0, 1)).all():
        raise DataError(f"{joints_file}: the third value of a joint must be 0 or 1, "
                         f"found {flag[~np.isin(flag, (0, 1))][0]}")
    labelled = flag == 1 if extended else np.ones(flag.shape, dtype=bool)
    bad = labelled & ~(np.abs(joints[..., :2]) < 1e6).all(-1)  # not a number counts as bad, too
    if bad.any():
        image, joint = np.argwhere(bad)[0]
        raise DataError(f"{joints_file}: joint {joint + 1} of image {image + 1} is labelled at "
                         f"{joints[image, joint, :2].tolist()}, which is no place in a picture")
    return extended, joints[..., :2], labelled


def _find_lsp_images(folder, n, extended, joints_file):
    """The n images of joints.mat in order, as an array of paths; none may be missing or left over."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; it must hold the {n} images of joints.mat")
    with os.scandir(folder) as entries:
        found = {entry.name for entry in entries if re.fullmatch(r"im\d+\.jpg", entry.name)}
    expected = [f"im{i + 1:0{5 if extended else 4}d}.jpg" for i in range(n)]
    missing = next((name for name in expected if name not in found), None)
    if missing:
        raise FileNotFoundError(f"{folder / missing}: missing; {joints_file} has {n} entries "
                                f"({'LSP Extended' if extended else 'LSP'}) and needs {expected[0]} ... "
                                f"{expected[-1]}, the directory holds {len(found)} images")
    extra = min(found.difference(expected), default=None)
    if extra:
        raise DataError(f"{folder / extra}: no entry for it in {joints_file}, which has {n}; the directory "
                         f"holds {len(found)} images. Take images and joints.mat from the same release")
    return np.array([folder / name for name in expected], dtype=object)


def _lsp_split(n, split, extended, transductive, root):
    """The part of n images, in file order, that a split takes, as a slice."""
    if transductive or (transductive is None and not extended):
        return slice(0, n)
    if extended:
        train_end, val_end = n * 80 // 100, n * 85 // 100
        bounds = {"train": (0, train_end), "val": (train_end, val_end), "test": (val_end, n)}
    elif split == "val":
        raise DataError("split 'val': LSP's own split has 'train' and 'test' only; choose one of them, or "
                         "transductive=True")
    else:
        bounds = {"train": (0, n // 2), "test": (n // 2, n)}
    begin, end = bounds[split]
    if begin == end:
        raise DataError(f"{root}: split {split!r} is empty, of {n} images; use a larger set or "
                         "transductive=True")
    return slice(begin, end)


# ----------------------------------------------------------------------------------------------------------
# Annotations of millions of samples, as arrays
# ----------------------------------------------------------------------------------------------------------


@dataclass
class _Annotations:
    """n samples without a Python object for any of them.

    text: (characters,) uint8, all names in UTF-8, one after the other; start: (n,) int64 and length: (n,)
    uint16, each name's place in it; keypoints: (n, K, 2) float32 in pixels (x, y) of the picture; side: (n,)
    uint16, pixels of the square picture, 0 where the annotation does not say.
    """
    text: np.ndarray
    start: np.ndarray
    length: np.ndarray
    keypoints: np.ndarray
    side: np.ndarray

    def __len__(self):
        return len(self.start)

    def name(self, i):
        return self.text[self.start[i]:self.start[i] + self.length[i]].tobytes().decode()


def _json_entries(file):
    """The objects of a JSON file that is one list of them, read piece by piece: memory for one at a time.

    Raises DataError, which names the file and the entry, where it is anything else.
    """
    decoder, count, spaces = json.JSONDecoder(), 0, re.compile(r"[ \t\r\n]*")
    try:
        with open(file, encoding="utf-8") as stream:
            text, at, opened, separated = stream.read(_MAX_ENTRY_CHARS), 0, False, True
            while True:
                at = spaces.match(text, at).end()
                if at == len(text):
                    text, at = stream.read(_MAX_ENTRY_CHARS), 0
                    if not text:
                        raise DataError("ends before its list does")
                elif not opened:
                    if text[at] != "[":
                        raise DataError("is no JSON list of samples")
                    opened, at = True, at + 1
                elif text[at] == "]" and (count == 0 or not separated):
                    if text[at + 1:].strip() or stream.read(_MAX_ENTRY_CHARS).strip():
                        raise DataError("goes on behind its list")
                    return
                elif text[at] == "," and not separated:
                    separated, at = True, at + 1
                elif text[at] != "{" or not separated:
                    raise DataError(f"entry {count + 1} is no JSON object")
                else:
                    try:
                        entry, at = decoder.raw_decode(text, at)
                    except json.JSONDecodeError as error:
                        # The entry may go on in the next piece.
                        more = stream.read(_MAX_ENTRY_CHARS) if len(text) - at <= _MAX_ENTRY_CHARS else ""
                        if not more:
                            raise DataError(f"entry {count + 1} is no complete JSON object "
                                            f"({error.msg})") from error
                        text, at = text[at:] + more, 0
                        continue
                    count, separated = count + 1, False
                    yield entry
    except (ValueError, RecursionError) as error:  # DataError, bytes that are no UTF-8, endless numbers
        raise DataError(f"{file}: {error}; fetch or prepare the annotations again") from error


def _read_annotations(file, prefix, total, joints, keep=None):
    """An annotation file of the prepared layouts -> _Annotations.

    file: JSON list of {name, keypoint2d [total, 2], ...}, coordinates in pixels of a square picture; `size`,
    its side in pixels, is read where it is given. prefix: put before each name; joints: which of the `total`
    keypoints to keep, in the skeleton's order; keep(entry) -> whether the sample counts (default: all do).
    """
    blocks, block = [], []
    for number, entry in enumerate(_json_entries(file), 1):
        try:
            if keep is not None and not keep(entry):
                continue
            name, side = entry["name"], entry.get("size", 0)
            block.append((number, name, entry["keypoint2d"], side))
        except KeyError as error:
            raise DataError(f"{file}: entry {number} has no {error.args[0]!r}; expected name and keypoint2d "
                            f"[{total}, 2]") from error
        if (not isinstance(name, str) or not 0 < len(name) < 1000 or name.startswith("/")
                or ".." in name.split("/")):
            raise DataError(f"{file}: the name of entry {number}, {str(name)[:60]!r}, is no path below the "
                            "images")
        if type(side) is not int or not 0 <= side < 1 << 16:
            raise DataError(f"{file}: the size of entry {number}, {side!r}, is no number of pixels")
        if len(block) == _BLOCK:
            blocks.append(_pack_block(file, prefix, total, joints, block))
            block = []
    blocks.append(_pack_block(file, prefix, total, joints, block))
    text, length, keypoints, side = (np.concatenate(column) for column in zip(*blocks))
    return _Annotations(text, np.cumsum(length, dtype=np.int64) - length, length, keypoints, side)


def _pack_block(file, prefix, total, joints, block):
    """Entries [(number, name, keypoint2d, side)] -> arrays: text, lengths, keypoints (n, K, 2), sides."""
    numbers, names, places, sides = zip(*block) if block else ((), (), (), ())
    for number, name, place in zip(numbers, names, places):
        if _shape_of(place) != (total, 2):
            raise DataError(f"{file}: keypoint2d of {name!r} (entry {number}) is not {total} pairs of "
                            "numbers")
    keypoints = np.array(places, dtype=np.float64).reshape(-1, total, 2)
    bad = ~(np.abs(keypoints) < 1e6).all(-1)  # not a number counts as bad, too
    if bad.any():
        i, joint = np.argwhere(bad)[0]
        raise DataError(f"{file}: keypoint {joint} of {names[i]!r} (entry {numbers[i]}) is at "
                        f"{keypoints[i, joint].tolist()}, which is no place in a picture")
    encoded = [(prefix + name).encode() for name in names]
    return (np.frombuffer(b"".join(encoded), np.uint8), np.array([len(name) for name in encoded], np.uint16),
            keypoints[:, joints].astype(np.float32), np.array(sides, np.uint16))


def _shape_of(value):
    """Shape of nested lists of numbers, or None where they are ragged or hold anything else."""
    try:
        return np.array(value, dtype=np.float64).shape
    except (ValueError, TypeError, OverflowError):
        return None


def _measure_sides(root, annotations, listed_in, progress):
    """Fill in the sides that the annotation does not give, from the headers of the images."""
    def side_of(name):
        with _open_image(root / name, listed_in) as image:
            width, height = image.size
        if width != height:
            raise DataError(f"{root / name}: {width} x {height} pixels; {listed_in} is of the prepared "
                            "layout, whose images are square crops")
        return width

    unknown = np.flatnonzero(annotations.side == 0)
    with ThreadPoolExecutor(16) as pool:  # the time goes into waiting for the disk
        for at in range(0, len(unknown), _BLOCK):
            rows = unknown[at:at + _BLOCK]
            annotations.side[rows] = list(pool.map(side_of, map(annotations.name, rows)))
            if progress is not None:
                progress(at + len(rows), len(unknown))


def _load_annotations(root, file, prefix, total, joints, keep=None, side=None, progress=None):
    """`_read_annotations` with every picture's side known, from an earlier reading's arrays where they are
    there.

    root: what the names (with their prefix) are relative to. side: of all pictures, in pixels; None: as the
    annotation says, else as the image says. An annotation file beyond INDEX_CACHE_BYTES takes minutes to
    read, so its arrays are left beside it; they hold for that very file (its size and time of change).
    """
    status = file.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns, len(prefix)], np.int64)
    index = file.with_name(f"{file.stem}.{zlib.crc32(bytes(joints)):08x}.npz")
    fields = [field.name for field in dataclasses.fields(_Annotations)]
    if status.st_size > INDEX_CACHE_BYTES and index.is_file():
        try:
            with np.load(index, allow_pickle=False) as stored:
                if np.array_equal(stored["stamp"], stamp):
                    return _Annotations(*(stored[field] for field in fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            index.unlink(missing_ok=True)  # cut short: made anew below
    annotations = _read_annotations(file, prefix, total, joints, keep)
    if side is not None:
        annotations.side[:] = side
    _measure_sides(root, annotations, file, progress)
    if status.st_size > INDEX_CACHE_BYTES and os.access(file.parent, os.W_OK):
        part = index.with_name(f"{index.name}.{os.getpid()}.tmp")  # other processes may write it, too
        with open(part, "wb") as stream:
            np.savez(stream, stamp=stamp, **{field: getattr(annotations, field) for field in fields})
        os.replace(part, index)
    return annotations


def _shuffled(n):
    """0 ... n - 1 in the order of the published splits: `random.seed(42); random.shuffle(samples)`."""
    order = array.array("q", range(n))  # eight bytes a sample, where a list takes forty
    random.Random(42).shuffle(order)
    return np.frombuffer(order, np.int64)


def _check_not_empty(order, n, split, where):
    if len(order) == 0:
        raise DataError(f"{where}: split {split!r} is empty, of {n} samples; is the dataset complete?")


class _SquareCrops(_CropsOnDisk):
    """Images that are square crops already, listed in JSON files: SURREAL, Human3.6M and H3D as prepared."""

    def _index(self, root, size, parts, order):
        """Take the samples `order` of the concatenated `parts` (_Annotations, emptied on the way)."""
        self.root, self.size = root, size
        ends = np.cumsum([len(part) for part in parts])
        keypoints = np.empty((len(order), len(self.skeleton), 2), np.float32)
        self._side = np.empty(len(order), np.uint16)
        self._start, self._length = np.empty(len(order), np.int64), np.empty(len(order), np.uint16)
        offset = 0
        for part, end in zip(parts, ends):
            rows = np.flatnonzero((order >= end - len(part)) & (order < end))
            taken = order[rows] - (end - len(part))
            self._start[rows] = part.start[taken] + offset
            self._length[rows] = part.length[taken]
            self._side[rows] = part.side[taken]
            for at in range(0, len(rows), _BLOCK):
                some = taken[at:at + _BLOCK]
                scale = (size / part.side[some]).astype(np.float32)[:, None, None]
                # A picture's pixel i covers i ... i + 1, its centre at i + 1/2, before and after the resize.
                keypoints[rows[at:at + _BLOCK]] = (part.keypoints[some] + 0.5) * scale - 0.5
            part.keypoints = None
            offset += len(part.text)
        self._text = np.concatenate([part.text for part in parts])
        self.keypoints = torch.from_numpy(keypoints)
        self.visible = torch.ones(1, 1).expand(len(order), len(self.skeleton))  # one number, seen N x K times
        self._make_room()

    def _name(self, i):
        return self._text[self._start[i]:self._start[i] + self._length[i]].tobytes().decode()

    def _source(self, i):
        return self.root / self._name(i), None

    def _decode(self, i):
        side = int(self._side[i])
        return _read_crop(self.root / self._name(i), self.size, sides=(side, side),
                          listed_in="its annotation file")


# ----------------------------------------------------------------------------------------------------------
# SURREAL, Human3.6M and H3D
# ----------------------------------------------------------------------------------------------------------

# BODY16 keypoint -> SMPL joint, as in the published protocol.
_SURREAL_JOINTS = (7, 4, 1, 2, 5, 8, 0, 9, 12, 15, 20, 18, 13, 14, 19, 21)
_TRUE_SHOULDERS = {12: 16, 13: 17}


class SURREAL(_SquareCrops):
    """SURREAL in the prepared layout: synthetic people, 16 body keypoints (BODY16).

    `root` holds `{train,val}/run{0,1,2}.json`, lists of {name, keypoint2d [24, 2] in pixels of the image,
    ...}, and the images `{train,val}/run{r}/{name}`, square crops about 1.5 times the person.

    split: 'train' or 'test': the three runs of `train` concatenated, shuffled by Python's `random.seed(42)`;
        the first min(20 %, 3200) are held out as 'test', the others are 'train'. 'val': the runs of `val`.
    shoulders: 'published' fills keypoints 12 and 13 with SMPL's *collar* joints 13 and 14, as all published
        results on SURREAL -> LSP and Human3.6M do (they all score low on shoulders, whose place in the target
        is another); 'true' takes the shoulders, SMPL's 16 and 17.
    progress(done, total): called while headers of images are read, which happens where an entry has no
    `size`.

    Left and right are mirrored, consistently so: SMPL's joint 7 is the left ankle and keypoint 0 the right
    one. The pictures are seen that way by every published method, and the labels are kept.

    Attributes: skeleton, size, keypoints (N, 16, 2) float32 pixels (x, y) of the S x S crop, visible (N, 16)
    all 1. The index takes about 180 bytes a sample. Raises FileNotFoundError for a missing root, annotation
    file or image, ValueError for files or arguments that are not as described; each names the file or the
    argument.
    """
    skeleton = BODY16

    def __init__(self, root, split="train", size=256, shoulders="published", progress=None):
        _check_arguments(split, size)
        if shoulders not in ("published", "true"):
            raise ValueError(f"shoulders {shoulders!r}: must be 'published' or 'true'")
        root = Path(root)
        folder = "val" if split == "val" else "train"
        joints = _SURREAL_JOINTS
        if shoulders == "true":
            joints = tuple(_TRUE_SHOULDERS.get(slot, joint) for slot, joint in enumerate(joints))
        layout = "train/run{0,1,2}.json and val/run{0,1,2}.json"
        files = [_find_annotation(root, f"{folder}/run{run}.json", layout) for run in range(3)]
        parts = [_load_annotations(root, file, f"{folder}/{file.stem}/", 24, joints, progress=progress)
                 for file in files]
        order = _shuffled(sum(map(len, parts)))
        held_out = min(int(len(order) * 0.2), 3200)
        n = len(order)
        if split != "val":
            order = order[held_out:] if split == "train" else order[:held_out]
        _check_not_empty(order, n, split, root / folder)
        self._index(root, size, parts, order)


class Human36M(_SquareCrops):
    """Human3.6M in the prepared layout: photographs of actors, 16 body keypoints (BODY16).

    `root` holds `annotations/keypoints2d_{1,5,6,7,8,9,11}.json`, lists of {name, keypoint2d [16, 2], ...},
    and the images `crop_images/{name}`, crops of 512 x 512 pixels, 1.5 times the person.

    split: 'train': subjects 1, 5, 6, 7, 8; 'test': 3,200 samples of subjects 9 and 11, drawn by Python's
        `random.seed(42); random.choices`, so that a few come twice, as published; 'val', which the published
        protocol does not have: 3,200 of the training subjects, without repeats.

    Attributes and errors as for SURREAL.
    """
    skeleton = BODY16
    SUBJECTS = {"train": (1, 5, 6, 7, 8), "val": (1, 5, 6, 7, 8), "test": (9, 11)}

    def __init__(self, root, split="train", size=256):
        _check_arguments(split, size)
        root = Path(root)
        files = [_find_annotation(root, f"annotations/keypoints2d_{subject}.json",
                                  "annotations/keypoints2d_{1,5,6,7,8,9,11}.json and crop_images/")
                 for subject in self.SUBJECTS[split]]
        parts = [_load_annotations(root, file, "crop_images/", 16, tuple(range(16)), side=512)
                 for file in files]
        n = sum(map(len, parts))
        order = np.arange(n)
        if split == "test" and n:
            order = np.array(random.Random(42).choices(range(n), k=3200))
        elif split == "val":
            order = np.array(random.Random(42).sample(range(n), min(3200, n)), np.int64)
        _check_not_empty(order, n, split, root / "annotations")
        self._index(root, size, parts, order)


class Hand3DStudio(_SquareCrops):
    """Hand-3D-Studio in the prepared layout: photographs of hands, 21 keypoints (HAND21).

    `root` holds `H3D_crop/`, or is it: `annotation.json`, a list of {name, keypoint2d [21, 2],
    without_object, ...}, and the images `{name}`, square crops. Hands that hold an object (`without_object`
    other than 1) are left out.

    split: shuffled by Python's `random.seed(42)`, the first min(20 %, 3200) are 'test', all others 'train';
        'val' is as many again behind 'test', within 'train', as in the published base method: training
        leaves their labels aside.

    Attributes and errors as for SURREAL.
    """
    skeleton = HAND21

    def __init__(self, root, split="train", size=256):
        _check_arguments(split, size)
        root = Path(root)
        if (root / "H3D_crop").is_dir():
            root = root / "H3D_crop"
        file = _find_annotation(root, "annotation.json", "H3D_crop/annotation.json and the images it names")
        part = _load_annotations(root, file, "", 21, tuple(range(21)),
                                 keep=lambda entry: entry["without_object"] in (1, "1"))
        order = _shuffled(len(part))
        held_out = min(int(len(order) * 0.2), 3200)
        n = len(order)
        bounds = {"test": (0, held_out), "val": (held_out, 2 * held_out), "train": (held_out, n)}[split]
        order = order[slice(*bounds)]
        _check_not_empty(order, n, split, file)
        self._index(root, size, [part], order)


# ----------------------------------------------------------------------------------------------------------
# RHD
# ----------------------------------------------------------------------------------------------------------


class _PickledDtype:
    """What a pickle says of a NumPy data type: number types alone, by their code."""

    def __init__(self, code, align=False, copy=False):
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biuf][1248]", code):
            raise DataError(f"an array of type {str(code)[:40]!r}; numbers alone are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """What a pickle says of a NumPy array; built from its bytes, so that no size is taken on trust."""
    array = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, values = state
        # A string of Python 2 arrives as text, each of its bytes as the character of that number.
        values = values.encode("latin-1") if isinstance(values, str) else values
        self.array = np.frombuffer(values, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _pickled_buffer(values, dtype, shape, order):
    pickled = _PickledArray()
    pickled.__setstate__((1, shape, dtype, order == "F", values))
    return pickled


def _pickled_scalar(dtype, values):
    values = values.encode("latin-1") if isinstance(values, str) else values
    return np.frombuffer(values, dtype.dtype, count=1)[0]


def _pickled_bytes(text="", encoding="latin1"):
    """bytes in the old protocols, which have no opcode for them: `_codecs.encode(text, 'latin1')`, `bytes()`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DataError(f"text encoded as {str(encoding)[:40]!r}; numbers alone are read")
    return text.encode("latin-1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays, data types and scalars beside Python's own numbers, strings and containers.

    Nothing of NumPy is called, either: the names that a pickled array uses stand for the classes above.
    """
    ADMITTED = {("numpy", "ndarray"): _PickledArray, ("numpy", "dtype"): _PickledDtype,
                ("_codecs", "encode"): _pickled_bytes, ("__builtin__", "bytes"): _pickled_bytes}
    for core in ("numpy.core", "numpy._core"):  # NumPy renamed its core in version 2
        ADMITTED[core + ".multiarray", "_reconstruct"] = _PickledArray
        ADMITTED[core + ".multiarray", "scalar"] = _pickled_scalar
        ADMITTED[core + ".numeric", "_frombuffer"] = _pickled_buffer

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise DataError(f"asks for {module}.{name}; a file of annotations holds NumPy arrays and numbers "
                            "alone. It may be hostile: fetch it from the dataset's own site")
        return self.ADMITTED[module, name]

    def persistent_load(self, identity):
        raise DataError("refers to objects outside of it; a file of annotations does not")


def read_array_pickle(path):
    """A pickle of NumPy arrays, numbers, strings, lists, tuples and dicts; Python 2's are read as well.

    Arrays come as read-only numpy arrays. The file is treated as untrusted: whatever else it names is
    refused and nothing in it is executed. Raises FileNotFoundError without the file, ValueError, which names
    the file, where it asks for anything else or is damaged.
    """
    def plain(value):
        if isinstance(value, _PickledArray):
            return value.array
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(plain(item) for item in value)
        return value

    with open(path, "rb") as file:
        try:
            return plain(_ArrayUnpickler(file, encoding="latin-1").load())
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # damaged opcodes do anything to anything: every error is possible
            raise DataError(f"{path}: not a readable pickle ({type(error).__name__}: {error}); "
                            "fetch it again") from error


# RHD's fingers run from tip to base: HAND21 keypoint -> row of a hand.
_RHD_ROWS = (0, 4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17)


class RenderedHandPose(_CropsOnDisk):
    """RHD, Rendered Hand Pose: synthetic hands, 21 keypoints (HAND21), all turned into left hands.

    `root` holds `RHD_published_v2/`, or is it: `{training,evaluation}/color/00000.png` ... of 320 x 320
    pixels and `{training,evaluation}/anno_{training,evaluation}.pickle`, id -> {uv_vis [42, 3], ...}: x, y,
    visible of the left hand's 21 keypoints, then of the right's.

    A hand is a sample when its square box, 1.5 times the box of its keypoints, at most the picture, is
    larger than 64 pixels, more than 16 of its keypoints are visible, and the box of the other hand's
    keypoints covers less than 30 % of it: none, one or both hands of a picture. It is cropped to that box; a
    right hand is mirrored. Keypoints that are not visible have visible = 0 and keep their place, which the
    renderer knows.

    split: 'train' (`training`), 'test' (`evaluation`), or 'val': every fifth sample of 'train', as in the
        published base method.

    Attributes: skeleton, size, keypoints (N, 21, 2) float32 pixels (x, y) of the S x S crop, visible (N, 21)
    float32, left (N,) bool: which hands were not mirrored. Names are those of the images and the hand's.
    Errors as for SURREAL.
    """
    skeleton = HAND21
    SIDE = 320

    def __init__(self, root, split="train", size=256):
        _check_arguments(split, size)
        root = Path(root)
        if (root / "RHD_published_v2").is_dir():
            root = root / "RHD_published_v2"
        part = "evaluation" if split == "test" else "training"
        file = _find_annotation(root, f"{part}/anno_{part}.pickle",
                                "RHD_published_v2/{training,evaluation}, each with color/ and anno_*.pickle")
        ids, hands = _read_rhd(file)
        positions, seen = hands[..., :2], hands[..., 2] > 0.5      # (pictures, hand: left or right, 21, 2)
        low, high = positions.min(2), positions.max(2)
        corner, side = square_box(low, high, (self.SIDE, self.SIDE))
        other_low, other_high = low[:, ::-1], high[:, ::-1]
        last = corner + side[..., None] - 1
        shared = np.minimum(last, other_high) - np.maximum(corner, other_low) + 1
        covered = shared.clip(min=0).prod(-1) / side.clip(min=1) ** 2
        kept = (side - 1 > 64) & (seen.sum(-1) > 16) & (covered < 0.3)
        picture, hand = np.nonzero(kept)
        if split == "val":
            picture, hand = picture[::5], hand[::5]
        _check_not_empty(picture, len(ids), split, file)

        self.root, self.size = root, size
        self._folder, self._ids = f"{part}/color", ids[picture]
        self._corner = corner[picture, hand].astype(np.uint16)
        self._box = side[picture, hand].astype(np.uint16)
        self._annotation = file
        self.left = torch.from_numpy(hand == 0)
        crop = self._corner[:, None]
        scale = size / self._box[:, None, None]
        keypoints = torch.from_numpy((positions[picture, hand] - crop + 0.5) * scale - 0.5).float()
        keypoints[~self.left, :, 0] = size - 1 - keypoints[~self.left, :, 0]
        self.keypoints, self.visible = keypoints, torch.from_numpy(seen[picture, hand]).float()
        self._make_room()

    def _file(self, i):
        return f"{self._folder}/{self._ids[i]:05d}.png"

    def _name(self, i):
        return f"{self._file(i)} {'left' if self.left[i] else 'right'}"

    def _source(self, i):
        side = int(self._box[i])
        return self.root / self._file(i), (*self._corner[i].tolist(), side, side)

    def _decode(self, i):
        file, region = self._source(i)
        crop = _read_crop(file, self.size, region, (self.SIDE, self.SIDE), self._annotation)
        return crop if self.left[i] else crop.flip(-1)


def _read_rhd(file):
    """anno_*.pickle -> ids (n,) int64, hands (n, 2, 21, 3): x, y, visible; left hand first."""
    annotations = read_array_pickle(file)
    if not isinstance(annotations, dict) or not annotations:
        raise DataError(f"{file}: no dict of pictures; expected id -> {{uv_vis [42, 3], ...}}")
    hands = np.empty((len(annotations), 42, 3))
    for row, (identity, entry) in zip(hands, annotations.items()):
        if not isinstance(identity, (int, np.integer)) or not 0 <= identity < 10 ** 9:
            raise DataError(f"{file}: the id {str(identity)[:40]!r} is no number of a picture")
        if not isinstance(entry, dict) or "uv_vis" not in entry:
            raise DataError(f"{file}: picture {identity} has no 'uv_vis'")
        values = entry["uv_vis"]
        if not isinstance(values, np.ndarray) or values.shape != (42, 3):
            raise DataError(f"{file}: uv_vis of picture {identity} has shape {np.shape(values)}, "
                            "expected (42, 3)")
        if not (np.abs(values) < 1e6).all():  # not a number counts as bad, too
            raise DataError(f"{file}: uv_vis of picture {identity} has a keypoint that is at no place in a "
                            "picture")
        row[:] = values
    rows = [row + hand for hand in (0, 21) for row in _RHD_ROWS]
    return np.array(list(annotations), np.int64), hands[:, rows].reshape(-1, 2, 21, 3)


def square_box(low, high, sides, scale=1.5):
    """Square boxes around boxes of keypoints, moved into the picture: the crops of the published protocol.

    low, high: (..., 2) smallest and largest (x, y) of the keypoints in pixels; sides: (width, height) of the
    picture. Returns corner (..., 2), the box's first column and row, and its side (...), both int64 pixels:
    `scale` times the larger side of the keypoints' box, at most the picture's smaller one.
    """
    side = np.minimum(np.round(scale * (high - low).max(-1)), min(sides)).astype(np.int64)
    corner = np.round((low + high) / 2 - side[..., None] / 2).astype(np.int64)
    return np.clip(corner, 0, np.array(sides) - side[..., None]), side


# ----------------------------------------------------------------------------------------------------------
# Preparation: the original releases of SURREAL and Human3.6M -> the layouts that the loaders read
# ----------------------------------------------------------------------------------------------------------

SURREAL_FRAME = (320, 240)
# SURREAL's camera, the same in all clips: 600 pixels of focal length, the axis through the middle; and the
# rotation of world axes to the camera's, as its authors publish it (mirrored, as all of SURREAL is).
_SURREAL_FOCAL = 600.0
_SURREAL_WORLD_TO_CAMERA = np.array([[0.0, 0, -1], [0, 1, 0], [-1, 0, 0]])
_MIN_PERSON_SIDE = 16  # pixels: a smaller box shows nobody
_CROP_MARGIN = 1.5
# Human3.6M's 17 joints -> BODY16; keypoint 7 becomes the middle of the shoulders.
_HUMAN36M_JOINTS = (3, 2, 1, 4, 5, 6, 0, 11, 8, 10, 16, 15, 14, 11, 12, 13)
_HUMAN36M_SIDE, _HUMAN36M_EVERY = 512, 5


class _ProgressLine:
    """One line on a terminal that says how far the work is and how long it will take; quiet elsewhere."""

    def __init__(self, title):
        self.title, self.start, self.shown = title, time.monotonic(), 0.0

    def __call__(self, done, total):
        now = time.monotonic()
        if not sys.stderr.isatty() or (done < total and now - self.shown < 0.5):
            return
        self.shown = now
        minutes, seconds = divmod((now - self.start) / done * (total - done), 60)
        line = f"{self.title} {done}/{total}, {minutes:.0f}:{seconds:02.0f} left"
        print("\r" + line.ljust(79)[:79], end="" if done < total else "\n", file=sys.stderr, flush=True)


def _in_processes(function, tasks, jobs, title):
    """Results of function(task) in the order of `tasks`, worked off by `jobs` processes."""
    show = _ProgressLine(title)
    pool = ProcessPoolExecutor(min(jobs, max(len(tasks), 1)))
    try:
        for done, result in enumerate(pool.map(function, tasks), 1):
            show(done, len(tasks))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _replace_text(path, pieces):
    """Write pieces of text to a file so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(part, "w", encoding="utf-8") as file:
        for piece in pieces:
            file.write(piece)
    os.replace(part, path)


def _json_list(texts):
    """Entries, each as text -> the pieces of a JSON list of them."""
    yield "["
    for i, text in enumerate(texts):
        yield (",\n" if i else "\n") + text
    yield "\n]\n"


def _rounded(values, decimals):
    return np.round(values, decimals).tolist()


def prepare_surreal(raw, out, jobs):
    """SURREAL's original release -> the layout of `SURREAL`, with everything that is in it and not yet
    prepared.

    raw: directory with `cmu/{train,val,test}/run{0,1,2}/<sequence>/<clip>.mp4` and `<clip>_info.mat`, or
    `cmu` itself; out: directory for `{split}/run{r}.json` and `{split}/run{r}/<sequence>/<clip>_f000.jpg`
    ...; jobs: processes. A frame's crop is the square around its 24 joints, 1.5 times their box, moved into
    the frame. Frames that show no joint, or a person of less than 16 pixels, are left out. An entry also has
    `size`, the crop's side, so that the loader need not open the images; keypoint3d is in the camera's axes,
    metres, with the place of the camera from a fit to the 2-D joints.

    A clip that was done stays done when the work is started again; a run's JSON is replaced in one go.
    Returns (summary lines, messages of clips that could not be read). Raises FileNotFoundError where `raw`
    holds no such release or there is no `ffmpeg` program to decode the videos with.
    """
    raw = raw / "cmu" if (raw / "cmu").is_dir() else raw
    runs = [(split, run) for split in ("train", "val", "test") for run in range(3)
            if (raw / split / f"run{run}").is_dir()]
    if not runs:
        raise FileNotFoundError(f"{raw}: no SURREAL release; expected cmu/{{train,val,test}}/run{{0,1,2}}/"
                                "<sequence>/<clip>.mp4 with <clip>_info.mat in the directory to give")
    ffmpeg = shutil.which("ffmpeg")
    lines, failures = [], []
    for split, run in runs:
        folder, parts = out / split / f"run{run}", out / split / f"run{run}.parts"
        listed = folder.with_suffix(".json")
        if listed.is_file() and not parts.is_dir():
            lines.append(f"{listed}: there already")
            continue
        if ffmpeg is None:
            raise FileNotFoundError("ffmpeg: no such program; SURREAL's videos are decoded with it. Install "
                                    "it: `apt-get install ffmpeg` (Debian, Ubuntu), `brew install ffmpeg` "
                                    "(macOS), `conda install ffmpeg`")
        videos = sorted((raw / split / f"run{run}").glob("*/*.mp4"))
        texts = [parts / f"{video.parent.name}--{video.stem}.json" for video in videos]
        parts.mkdir(parents=True, exist_ok=True)
        tasks = [(ffmpeg, video, folder, text) for video, text in zip(videos, texts) if not text.is_file()]
        results = _in_processes(_prepare_clip, tasks, jobs, f"{split}/run{run}: clip")
        errors = [error for error in results if error]
        done = [text for text in texts if text.is_file()]
        frames = 0

        def entries():
            nonlocal frames
            for text in done:
                for entry in text.read_text(encoding="utf-8").splitlines():
                    frames += 1
                    yield entry
        _replace_text(listed, _json_list(entries()))
        if not errors:
            shutil.rmtree(parts)  # kept otherwise: the next start tries the failed clips alone
        failures += errors
        lines.append(f"{listed}: {frames} frames of {len(done)} clips ({len(tasks) - len(errors)} of them "
                     f"new), {len(errors)} clips failed")
    return lines, failures


def _prepare_clip(task):
    """Crops of a clip and, when all are there, its entries, a line each. Returns an error's text, or None."""
    ffmpeg, video, folder, text = task
    try:
        info = video.with_name(f"{video.stem}_info.mat")
        places, joints = _read_surreal_info(info)
        entries = []
        for t, frame in enumerate(_video_frames(ffmpeg, video, len(places), info)):
            low, high = places[t].min(0), places[t].max(0)
            corner, side = square_box(low, high, SURREAL_FRAME, _CROP_MARGIN)
            seen = ((places[t] >= 0) & (places[t] <= np.array(SURREAL_FRAME) - 1)).all(-1)
            if not seen.any() or side < _MIN_PERSON_SIDE:
                continue
            (left, top), side = corner.tolist(), int(side)
            name = f"{video.parent.name}/{video.stem}_f{t:03d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame[top:top + side, left:left + side]).save(folder / name, quality=95)
            centre = np.array(SURREAL_FRAME) / 2 - corner
            camera = [[_SURREAL_FOCAL, 0, centre[0]], [0, _SURREAL_FOCAL, centre[1]], [0, 0, 1]]
            entries.append(json.dumps({"name": name, "keypoint2d": _rounded(places[t] - corner, 3),
                                       "keypoint3d": _rounded(joints[t], 4), "intrinsic_matrix": camera,
                                       "size": side}))
        _replace_text(text, (entry + "\n" for entry in entries))
    except (DataError, OSError) as error:
        return f"{error}"


def _read_surreal_info(info):
    """info.mat of a clip -> joints (T, 24, 2) in pixels of the frame, (T, 24, 3) in metres."""
    places, joints = (read_mat(info, name) for name in ("joints2D", "joints3D"))
    for name, array, rows in (("joints2D", places, 2), ("joints3D", joints, 3)):
        if array.ndim not in (2, 3) or array.shape[:2] != (rows, 24) or array.dtype.kind != "f":
            raise DataError(f"{info}: {name} has shape {array.shape}, expected ({rows}, 24, T)")
        if not (np.abs(array) < 1e6).all():  # not a number counts as bad, too
            raise DataError(f"{info}: {name} holds values that are no place")
    # A clip of one frame has lost its last axis.
    places, joints = (np.atleast_3d(a).transpose(2, 1, 0).astype(np.float64) for a in (places, joints))
    if len(places) != len(joints):
        raise DataError(f"{info}: {len(places)} frames of joints2D, {len(joints)} of joints3D")
    return places, _place_before_camera(joints @ _SURREAL_WORLD_TO_CAMERA.T, places)


def _place_before_camera(joints, places):
    """Move joints (T, 24, 3), already in the camera's axes, to where they project on `places` (T, 24, 2).

    x = f (X + tx) / (Z + tz) + cx is linear in the move t; with a = x - cx it reads a tz - f tx = f X - a Z,
    and the least squares over joints and both axes are a regression with a common slope tz.
    """
    a = places - np.array(SURREAL_FRAME) / 2
    b = _SURREAL_FOCAL * joints[..., :2] - a * joints[..., 2:]
    mean_a, mean_b = a.mean(1, keepdims=True), b.mean(1, keepdims=True)
    spread = ((a - mean_a) ** 2).sum((1, 2)).clip(min=1e-9)
    tz = ((a - mean_a) * (b - mean_b)).sum((1, 2)) / spread
    txy = (mean_a[:, 0] * tz[:, None] - mean_b[:, 0]) / _SURREAL_FOCAL
    return joints + np.concatenate([txy, tz[:, None]], 1)[:, None]


def _video_frames(ffmpeg, video, count, info):
    """The `count` frames of a clip, (count, 240, 320, 3) uint8; one more is asked for, to see too many."""
    width, height = SURREAL_FRAME
    command = [ffmpeg, "-v", "error", "-nostdin", "-threads", "1", "-i", str(video.resolve()), "-frames:v",
               str(count + 1), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"{video}: ffmpeg cannot decode it ({reason[0]}); fetch the clip again")
    if len(done.stdout) != count * width * height * 3:
        found = len(done.stdout) / (width * height * 3)
        raise DataError(f"{video}: {found:.10g} frames of {width} x {height} pixels, {info.name} has "
                        f"{count}; fetch both again")
    return np.frombuffer(done.stdout, np.uint8).reshape(count, height, width, 3)


def prepare_human36m(raw, out, jobs):
    """Human3.6M's JSON release -> the layout of `Human36M`, for every subject that is there and not yet
    prepared.

    raw: directory with `annotations/Human36M_subject{n}_{camera,data,joint_3d}.json` and `images/`; out:
    directory for `annotations/keypoints2d_{n}.json` and `crop_images/`; jobs: processes. Every fifth frame;
    17 joints -> 16, keypoint 7 in the middle of the shoulders; world -> camera by R and t, projection by f
    and c; cropped to the square of 1.5 times the keypoints' box, moved into the picture, and resized to 512
    x 512.

    Crops that are there are not made again; a subject's JSON comes last, in one go. Returns (summary lines,
    messages of images that could not be read: they are left out). Raises FileNotFoundError or ValueError,
    which name the file, for a release that is not as described.
    """
    subjects = [subject for subject in (1, 5, 6, 7, 8, 9, 11)
                if (raw / f"annotations/Human36M_subject{subject}_data.json").is_file()]
    if not subjects:
        _find_annotation(raw, "annotations/Human36M_subject1_data.json", "images/ and annotations/"
                         "Human36M_subject{1,5,6,7,8,9,11}_{camera,data,joint_3d}.json")
    lines, failures = [], []
    for subject in subjects:
        listed = out / f"annotations/keypoints2d_{subject}.json"
        if listed.is_file():
            lines.append(f"{listed}: there already")
            continue
        samples = _project_human36m(raw / "annotations", subject)
        chunks = [(raw / "images", out / "crop_images", samples[at:at + 32])
                  for at in range(0, len(samples), 32)]
        texts, errors = [], []
        for made, failed in _in_processes(_crop_human36m, chunks, jobs, f"subject {subject}: 32 images"):
            texts += made
            errors += failed
        _replace_text(listed, _json_list(texts))
        failures += errors
        lines.append(f"{listed}: {len(texts)} images, {len(errors)} failed"
                     + ("; delete it to try these again" if errors else ""))
    return lines, failures


def _project_human36m(folder, subject):
    """Annotations of a subject -> [(file name, keypoints (16, 2) pixels, keypoints (16, 3) mm, K (3, 3))]."""
    files = {kind: folder / f"Human36M_subject{subject}_{kind}.json"
             for kind in ("camera", "data", "joint_3d")}
    loaded = {}
    for kind, file in files.items():
        try:
            loaded[kind] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: missing; a subject has a camera, a data and a joint_3d "
                                    "file") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: no JSON ({error}); fetch it again") from error
    try:
        cameras = {}
        for index, camera in loaded["camera"].items():
            rotation, t, f, c = (np.array(camera[key], np.float64) for key in ("R", "t", "f", "c"))
            intrinsics = np.array([[f[0], 0, c[0]], [0, f[1], c[1]], [0, 0, 1]])
            cameras[index] = rotation.reshape(3, 3), t.reshape(3), intrinsics
        images = loaded["data"]["images"][::_HUMAN36M_EVERY]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{files['camera']}, {files['data']}: not as described ({type(error).__name__}: "
                        f"{error}); expected {{cam: {{R, t, f, c}}}} and {{images: [{{file_name, ...}}]}}"
                        ) from error
    samples = []
    for image in images:
        try:
            name, action, subaction, frame, cam = (
                image[key] for key in ("file_name", "action_idx", "subaction_idx", "frame_idx", "cam_idx"))
            world = np.array(loaded["joint_3d"][str(action)][str(subaction)][str(frame)], np.float64)
            rotation, t, intrinsics = cameras[str(cam)]
            joints = world.reshape(17, 3)[list(_HUMAN36M_JOINTS)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{files['data']}: {str(image)[:200]} has no joints or camera in the files "
                            f"beside it ({type(error).__name__}: {error})") from error
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{files['data']}: the file name {str(name)[:60]!r} is no path below images/")
        joints[7] = (joints[12] + joints[13]) / 2
        joints = joints @ rotation.T + t
        if not (joints[:, 2] > 0).all():  # not a number counts as bad, too
            raise DataError(f"{files['joint_3d']}: joints of {name} are not in front of the camera")
        projected = joints @ intrinsics.T
        samples.append((name, projected[:, :2] / projected[:, 2:], joints, intrinsics))
    return samples


def _crop_human36m(task):
    """Crop a few images -> (their entries as text, messages of those that failed)."""
    source, target, samples = task
    texts, errors = [], []
    for name, places, joints, intrinsics in samples:
        try:
            with _open_image(source / name) as image:
                corner, side = square_box(places.min(0), places.max(0), image.size, _CROP_MARGIN)
                if side < _MIN_PERSON_SIDE:
                    raise DataError(f"{source / name}: a person of {side} pixels; are joints in millimetres?")
                if not (target / name).is_file():
                    _save_crop(image, corner, side, target / name)
        except (DataError, OSError) as error:
            errors.append(str(error))
            continue
        zoom = _HUMAN36M_SIDE / side
        # Pixels as areas: pixel i covers i ... i + 1 of the picture, so that its centre is at i + 1/2.
        view = np.array([[zoom, 0, 0], [0, zoom, 0], [0, 0, 1]])
        view[:2, 2] = (0.5 - corner) * zoom - 0.5
        texts.append(json.dumps({"name": name, "keypoint2d": _rounded(places @ view[:2, :2] + view[:2, 2], 3),
                                 "keypoint3d": _rounded(joints, 3),
                                 "intrinsic_matrix": _rounded(view @ intrinsics, 6)}))
    return texts, errors


def _save_crop(image, corner, side, target):
    try:
        box = (*corner.tolist(), *(corner + side).tolist())
        crop = image.convert("RGB").resize((_HUMAN36M_SIDE, _HUMAN36M_SIDE), Image.Resampling.BICUBIC, box)
    except _DECODE_ERRORS as error:
        raise DataError(f"{image.filename}: cannot be decoded ({error}); fetch the image again") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    crop.save(part, Image.registered_extensions().get(target.suffix.lower(), "JPEG"), quality=95)
    os.replace(part, target)


# ----------------------------------------------------------------------------------------------------------
# Benchmark of the data path
# ----------------------------------------------------------------------------------------------------------

_BENCHMARK_BATCH = 8  # what the processor's cache holds: at 32 the same work takes nearly twice as long


def open_dataset(root, split="train", size=256):
    """The dataset whose layout `root` has, told by its annotation file."""
    root = Path(root)
    layouts = {"joints.mat": LSP, "train/run0.json": SURREAL, "annotations/keypoints2d_1.json": Human36M,
               "H3D_crop/annotation.json": Hand3DStudio, "annotation.json": Hand3DStudio,
               "RHD_published_v2/training/anno_training.pickle": RenderedHandPose,
               "training/anno_training.pickle": RenderedHandPose}
    for relative, loader in layouts.items():
        if (root / relative).is_file():
            return loader(root, split, size)
    raise FileNotFoundError(f"{root}: no dataset; expected one of {', '.join(layouts)} in it")


def _augmented_batch(dataset, indices, u):
    """To an augmented batch, as in training: u (B, 11) -> images (B, 3, S, S), heatmaps (B, K, S/4, S/4)."""
    images, keypoints, visible = dataset[indices]
    size = dataset.size
    view = compose_views(random_affine_view(u[:, :5], size, 60, 30, 0.05, (0.6, 1.3)),
                         random_crop_view(u[:, 5:8], size, (0.6, 1.3)))
    images = colour_jitter(warp(normalise(images), view), u[:, 8:11], 0.25)
    heatmaps, _ = render_heatmaps(map_keypoints(keypoints, view), visible, size // 4, 4, 2.0)
    return images, heatmaps


def _augmented_in_pil(dataset, indices, u):
    """The same work as published code does it: image by image in PIL and NumPy, a heatmap at a time."""
    size = dataset.size
    images, targets = [], []
    for i, numbers in zip(indices.tolist(), u.double().numpy()):
        file, region = dataset._source(i)
        with Image.open(file) as image:
            image = image.convert("RGB")
        if region is not None:
            left, top, width, height = region
            image = image.crop((left, top, left + width, top + height))
        fitted, offset = fit_square(*image.size, size)
        picture = Image.new("RGB", (size, size))
        picture.paste(image.resize(fitted, Image.Resampling.BILINEAR), offset)
        crop = random_crop_view(torch.from_numpy(numbers[None, 5:8]), size, (0.6, 1.3))[0].numpy()
        low, high = -crop[:, 2] / crop[0, 0], (size - crop[:, 2]) / crop[0, 0]
        picture = picture.crop((*low.round().astype(int).tolist(), *high.round().astype(int).tolist()))
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        affine = random_affine_view(torch.from_numpy(numbers[None, :5]), size, 60, 30, 0.05, (0.6, 1.3))
        inverse = invert_view(affine)[0].numpy().ravel().tolist()
        picture = picture.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)
        enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for enhancer, number in zip(enhancers, numbers[8:]):
            picture = enhancer(picture).enhance(1 + 0.25 * (2 * number - 1))
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
        images.append(tensor.sub_(torch.tensor(IMAGE_MEAN)[:, None, None])
                      .div_(torch.tensor(IMAGE_STD)[:, None, None]))
        places = dataset.keypoints[i].double().numpy()
        for view in (crop, affine[0].numpy()):
            places = places @ view[:, :2].T + view[:, 2]
        target = np.zeros((len(places), size // 4, size // 4), np.float32)
        line = np.arange(size // 4, dtype=np.float32)
        for heatmap, place, visible in zip(target, places, dataset.visible[i].tolist()):
            x, y = np.floor(place / 4 + 0.5)
            if visible and 0 <= x < size // 4 and 0 <= y < size // 4:
                heatmap[:] = np.exp(-((line - x) ** 2 + (line[:, None] - y) ** 2) / 8)
                heatmap[(abs(line[:, None] - y) > 6) | (abs(line - x) > 6)] = 0
        targets.append(torch.from_numpy(target))
    return torch.stack(images), torch.stack(targets)


def benchmark(root, count=256):
    """Images per second on one core, from the file to the augmented batch, beside the published way.

    root: a dataset in a layout of the loaders; count: images, drawn from its training split, decoded anew by
    both. The best of five rounds counts, so that reading from the disk does not. Returns (ours, published).
    """
    dataset = open_dataset(root)
    dataset._crops = None                                          # decode at every use
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        indices = torch.from_numpy(np.random.default_rng(0).permutation(len(dataset))[:count])
        u = hash_uniform(0, indices, 11)
        batches = list(zip(indices.split(_BENCHMARK_BATCH), u.split(_BENCHMARK_BATCH)))
        best = {_augmented_batch: math.inf, _augmented_in_pil: math.inf}
        for work in list(best) * 5:                                # in turns: whatever else runs slows both
            start = time.perf_counter()
            for batch in batches:
                work(dataset, *batch)
            best[work] = min(best[work], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    rates = [len(indices) / seconds for seconds in best.values()]
    print(f"{type(dataset).__name__}, {len(indices)} images to {dataset.size} x {dataset.size}, one core: "
          f"{rates[0]:.0f} images/s in batches of {_BENCHMARK_BATCH}, {rates[1]:.0f} images/s in PIL, image "
          f"by image ({rates[0] / rates[1]:.1f} x)")
    return tuple(rates)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(arguments):
    """`prepare` and `benchmark`. Returns the exit status: 1 where single files failed, 2 where all did."""
    parser = argparse.ArgumentParser(prog="data.py", description="Prepare datasets, measure the data path.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="original release -> the layout that the loaders read")
    prepare.add_argument("dataset", choices=("surreal", "human36m"))
    prepare.add_argument("raw", type=Path, help="directory of the original release")
    prepare.add_argument("out", type=Path, help="directory to fill; started again, it goes on")
    prepare.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                         help="processes (default: %(default)s)")
    measure = commands.add_parser("benchmark", help="images per second per core, file to augmented batch")
    measure.add_argument("root", type=Path, help="directory of a dataset that one of the loaders reads")
    given = parser.parse_args(arguments)
    if given.command == "prepare" and given.jobs < 1:
        parser.error("--jobs: must be at least 1")
    start = time.monotonic()
    try:
        if given.command == "benchmark":
            benchmark(given.root)
            return 0
        work = prepare_surreal if given.dataset == "surreal" else prepare_human36m
        lines, failures = work(given.raw, given.out, given.jobs)
    except (DataError, OSError, BrokenProcessPool) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    for message in failures[:20]:
        print(f"failed: {message}", file=sys.stderr)
    if len(failures) > 20:
        print(f"failed: {len(failures) - 20} more", file=sys.stderr)
    print("\n".join(lines))
    print(f"{time.monotonic() - start:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
