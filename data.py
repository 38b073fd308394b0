"""Everything between a disk (or a renderer) and a training batch.

    skeletons      BODY16, HAND21: names, limb pairs (Eq. 5), triplets (Eq. 7), score groups
    geometry       views as batched 2x3 matrices: one convention for images, keypoints and heatmaps
    heatmaps       the training targets of the pose network
    augmentation   views and colour jitter in batch, on the training device
    batches        the order of samples; loading ahead
    Mannequin      the built-in benchmark: bodies and hands, posed and drawn
    pictures       one function opens a picture for all: upright, 8 bits, RGB
    datasets       SURREAL, LSP, Human36M, RenderedHandPose, Hand3DStudio, each with its reader beside it

The geometry convention, written once: keypoints are (x, y) in pixels of the network's input, and the centre
of image pixel i lies at x = i. A heatmap cell is `stride` pixels and cell i stands for x = stride * i. A view
is a matrix M (2x3) that takes image pixels to view pixels, (x', y') = M @ (x, y, 1); images and heatmaps are
warped by it, keypoints multiplied by it, and `invert_view` undoes it.

A dataset is anything with `skeleton`, `size`, `keypoints` (N, K, 2), `visible` (N, K), `names(indices)`,
`len()` and batched indexing: `dataset[indices]` gives uint8 crops (B, 3, S, S), keypoints (B, K, 2) in
pixels, and visibility (B, K). Augmentation happens later, in batch and on the device.
"""

import array
import functools
import hashlib
import json
import math
import operator
import os
import pickle
import random
import re
import struct
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from kernels.reference import draw_gaussians


class DataError(ValueError):
    """A file from outside that is not what it should be. The message names the file and says what to do."""


# --- Progress and atomic writes ----------------------------------------------------------------------------

class Progress:
    """One line on stderr: how far the work is and how long it will take; quiet when not a terminal."""
    unfinished = False  # whether a line without its end stands on the terminal

    def __init__(self, title):
        self.title = title
        self.live = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self.start = None  # when it was called first, and how much was done then
        self.first = 0
        self.drawn = 0.0  # when the line was last drawn

    def __call__(self, done, total, note=""):
        """Show that `done` of `total` is finished. The time left is estimated from the first call on."""
        now = time.time()
        if self.start is None:
            self.start = now
            self.first = done
        if not self.live or (done < total and now - self.drawn < 0.2):
            return
        self.drawn = now
        left = (now - self.start) / max(done - self.first, 1) * (total - done)
        line = f"{self.title} {done}/{total}, {left // 60:.0f}:{left % 60:02.0f} left {note}"
        Progress.unfinished = done < total
        end = "" if done < total else "\n"
        print("\r" + line.ljust(79)[:79], end=end, file=sys.stderr, flush=True)


@contextmanager
def replacing(path, keep=None):
    """A binary file to write, which takes the place of `path` when the block ends without an error.

    A crash or a full disk leaves the old file or the new one, whole. keep: a name for the old one, under
    which alone a crash may leave it. OSError names `path`."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the file
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
        with suppress(OSError):  # on a disk that cannot be written to
            temporary.unlink()


def remove_leftovers(folder):
    """Delete the temporary files of a process that was killed within `replacing`."""
    for path in folder.glob("*.tmp"):
        if re.search(r"\.(json|jsonl|pt|png)\.\d+\.tmp$", path.name):
            path.unlink()


def write_text(path, text):
    """Write a text file atomically, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


# --- Skeletons ---------------------------------------------------------------------------------------------

@dataclass
class Skeleton:
    """Keypoints of one kind of body and what the paper's equations need to know of them.

    names: one per keypoint. limbs: pairs (a, b), the vectors of Eq. 5. triplets: (a, b, c), the angles at b
    of Eq. 7. groups: the columns of the paper's tables, name -> keypoints, with "all". root: keypoints in
    the middle of the body. stand_ins: keypoint -> the keypoints whose mean takes its place in the Pose-VAE
    where it is missing; another missing keypoint takes the mean of `root`.

    Sequences of any kind are kept as tuples of int, so that a skeleton can be written as JSON and read
    again. ValueError names the field that does not fit."""
    names: tuple
    limbs: tuple
    triplets: tuple
    groups: dict
    root: tuple
    stand_ins: dict = field(default_factory=dict)

    def __post_init__(self):
        self.names = tuple(self.names)
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError("names must be strings, one per keypoint")
        if "all" not in self.groups:
            raise ValueError("groups must have 'all'")
        if not len(self.limbs) or not len(self.triplets):
            raise ValueError("limbs and triplets: give at least one of each")
        self.limbs = tuple(self._check("limbs", row, 2) for row in self.limbs)
        self.triplets = tuple(self._check("triplets", row, 3) for row in self.triplets)
        self.groups = {name: self._check("groups", row) for name, row in self.groups.items()}
        self.root = self._check("root", self.root)
        stand_ins = {}
        for missing, row in self.stand_ins.items():
            if isinstance(missing, str) and missing.isdigit():  # JSON makes keys strings
                missing = int(missing)
            missing, = self._check("stand_ins", [missing])
            stand_ins[missing] = self._check("stand_ins", row)
        self.stand_ins = stand_ins

    def _check(self, field, row, length=None):
        """A sequence of keypoints, `length` of them or some -> tuple of int."""
        try:
            row = tuple(operator.index(k) for k in row)
        except TypeError as error:
            raise ValueError(f"{field}: {row!r} is not a sequence of whole numbers") from error
        wrong_length = len(row) != length if length else not row
        if wrong_length or min(row) < 0 or max(row) >= len(self):
            raise ValueError(f"{field}: {row} must be {length or 'some'} keypoints below {len(self)}")
        return row

    def __len__(self):
        return len(self.names)

    @property
    def stand_in_rows(self):
        """K tuples: the keypoints whose mean takes the place of each missing one."""
        return tuple(self.stand_ins.get(k, self.root) for k in range(len(self)))


BODY16 = Skeleton(
    names=("r-ankle", "r-knee", "r-hip", "l-hip", "l-knee", "l-ankle", "pelvis", "thorax", "upper neck",
           "head top", "r-wrist", "r-elbow", "r-shoulder", "l-shoulder", "l-elbow", "l-wrist"),
    limbs=((0, 1), (1, 2), (2, 6), (3, 6), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),  # legs and spine
           (7, 12), (12, 11), (11, 10), (7, 13), (13, 14), (14, 15),                # arms
           (2, 3), (12, 13), (2, 12), (3, 13)),         # the trunk's frame, labelled in LSP as well
    triplets=((10, 11, 12), (13, 14, 15), (0, 1, 2), (3, 4, 5),      # elbows, knees
              (11, 12, 13), (12, 13, 14), (11, 12, 2), (14, 13, 3),  # shoulders: to the other one, to the hip
              (1, 2, 3), (2, 3, 4), (1, 2, 12), (4, 3, 13),          # hips: to the other one, to the shoulder
              (12, 8, 9), (13, 8, 9), (7, 8, 9), (6, 7, 8)),         # neck, spine
    groups={"shoulder": (12, 13), "elbow": (11, 14), "wrist": (10, 15), "hip": (2, 3), "knee": (1, 4),
            "ankle": (0, 5), "all": (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15)},
    root=(2, 3),
    stand_ins={6: (2, 3), 7: (12, 13)})  # pelvis: hips; thorax: shoulders. LSP labels neither


def _hand_skeleton():
    """21 keypoints: the wrist, then MCP, PIP, DIP and tip of the thumb, ..., the little finger."""
    names = ["wrist"]
    limbs = []
    bends = []  # two angles per finger
    spreads = []  # the angles between neighbouring fingers, at the wrist
    for finger, base in {"thumb": 1, "index": 5, "middle": 9, "ring": 13, "little": 17}.items():
        names += [f"{finger} MCP", f"{finger} PIP", f"{finger} DIP", f"{finger} tip"]
        limbs += [(0, base), (base, base + 1), (base + 1, base + 2), (base + 2, base + 3)]
        bends += [(0, base, base + 1), (base, base + 1, base + 2)]
        if base < 17:
            spreads.append((base, 0, base + 4))
    groups = {"MCP": (1, 5, 9, 13, 17), "PIP": (2, 6, 10, 14, 18), "DIP": (3, 7, 11, 15, 19),
              "fingertip": (4, 8, 12, 16, 20), "all": tuple(range(21))}
    return Skeleton(tuple(names), tuple(limbs), tuple(bends + spreads), groups, root=(0, 9))


HAND21 = _hand_skeleton()


def check_dataset(dataset, name):
    """DataError, for `name`, where `dataset` is not what the module's docstring describes."""
    def require(fits, what):
        if not fits:
            raise DataError(f"{name}: {type(dataset).__name__} {what}")

    require(isinstance(getattr(dataset, "skeleton", None), Skeleton), "needs a `skeleton`, a data.Skeleton")
    n = len(dataset)
    k = len(dataset.skeleton)
    size = getattr(dataset, "size", None)
    require(n > 0 and type(size) is int, "needs samples, and `size`, the side of its images in pixels")
    for attribute, shape in {"keypoints": (n, k, 2), "visible": (n, k)}.items():
        values = getattr(dataset, attribute, None)
        require(torch.is_tensor(values) and values.dtype == torch.float32 and values.shape == shape,
                f"needs `{attribute}`, a float32 tensor of shape {shape}")
    keypoints = dataset.keypoints
    require(bool((keypoints.abs() < 1e6).all()), "has keypoints that are not finite, or beyond a million "
            "pixels; where one is not labelled, give (0, 0) and visible 0")
    seen = dataset.visible == 1
    require(bool((seen | (dataset.visible == 0)).all()),
            "has `visible` other than 0 and 1; give 1 where a keypoint is labelled and 0 where it is not "
            "(of COCO's flags, 1 and 2 are labelled)")
    labelled = int(seen.sum())
    outside = int((seen & ((keypoints < -0.5) | (keypoints > size - 0.5)).any(-1)).sum())
    in_the_corner = int((seen & (keypoints.abs() <= 1).all(-1)).sum())
    unit = f"give keypoints as (x, y) in pixels of the {size} x {size} image"
    require(labelled == 0 or in_the_corner < labelled, "has all its labelled keypoints within a pixel of the "
            f"corner, as with coordinates in 0 ... 1; {unit}, and visible 0 where there is no label")
    require(2 * outside <= labelled, f"has {outside} of its {labelled} labelled keypoints outside the image, "
            f"as with pixels of the original picture or of another resolution; {unit}")
    indices = torch.tensor([n - 1, 0])
    require(len(dataset.names(indices)) == 2, "needs names(indices), a string per sample")
    images, *labels = dataset[indices]
    shapes = [tuple(values.shape) for values in (images, *labels)]
    require(images.dtype == torch.uint8 and shapes == [(2, 3, size, size), (2, k, 2), (2, k)],
            f"must give uint8 images (B, 3, {size}, {size}), keypoints (B, {k}, 2) and visible (B, {k})")
    for given, stated in zip(labels, (dataset.keypoints, dataset.visible)):
        require(given.dtype == torch.float32 and torch.equal(given, stated[indices]),
                "gives other labels with images than the rows of its `keypoints` and `visible` for the same "
                "indices, in their order")


# --- Geometry ----------------------------------------------------------------------------------------------

def affine_view(size, rotation, shear, scale, translate):
    """Views (B, 2, 3) that rotate, shear and scale about the centre (size / 2), then translate, composed as
    in the published base method. rotation (clockwise on a screen), shear: (B,) radians; scale: (B,);
    translate: (B, 2) and size, the image's side: pixels."""
    cos = torch.cos(rotation)
    sin = torch.sin(rotation)
    tan = torch.tan(shear)
    first_row = torch.stack([cos, -cos * tan - sin], -1)
    second_row = torch.stack([sin, -sin * tan + cos], -1)
    linear = torch.stack([first_row, second_row], -2) * scale[:, None, None]
    centre = torch.full((2,), size / 2, dtype=linear.dtype, device=linear.device)
    offset = centre + translate - linear @ centre
    return torch.cat([linear, offset[..., None]], -1)


def compose_views(outer, inner):
    """The view that applies `inner` first and `outer` to its result; both (B, 2, 3) in pixels."""
    linear = outer[..., :2] @ inner[..., :2]
    offset = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, offset], -1)


def invert_view(view):
    """The inverse of views (B, 2, 3), by the closed form of a 2x2 inverse: no wait for a GPU."""
    a, b = view[..., 0, :2].unbind(-1)
    c, d = view[..., 1, :2].unbind(-1)
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    linear = adjugate / (a * d - b * c)[..., None, None]
    return torch.cat([linear, -linear @ view[..., 2:]], -1)


def map_keypoints(keypoints, view):
    """Keypoints (B, K, 2) in image pixels -> view pixels, by views (B, 2, 3)."""
    return keypoints @ view[..., :2].transpose(-1, -2) + view[..., 2].unsqueeze(-2)


def warp(maps, view, stride=1):
    """Images or heatmaps (B, C, H, W) seen through views (B, 2, 3): output(M x) = input(x), zero outside.
    Bilinear and differentiable. stride: pixels per cell of `maps`, 1 for images."""
    height, width = maps.shape[-2:]
    x = torch.arange(width, dtype=maps.dtype, device=maps.device) * stride
    y = torch.arange(height, dtype=maps.dtype, device=maps.device) * stride
    inverse = invert_view(view).to(maps.dtype)
    # grid_sample counts from -1 to 1 between the centres of the first and the last cell.
    scale = 2 / (stride * (maps.new_tensor([width, height]) - 1).clamp(min=1))
    columns = inverse[:, None, :, 0] * x[:, None] * scale                                # (B, W, 2)
    rows = (inverse[:, None, :, 1] * y[:, None] + inverse[:, None, :, 2]) * scale - 1    # (B, H, 2)
    grid = columns[:, None] + rows[:, :, None]
    return F.grid_sample(maps, grid, padding_mode="zeros", align_corners=True)


# --- Target heatmaps ---------------------------------------------------------------------------------------

def render_heatmaps(keypoints, visible, size, stride, sigma, subcell=False):
    """Target heatmaps (B, K, size, size) of keypoints and the weight (B, K) of each.

    keypoints: (B, K, 2) pixels; visible: (B, K), 1 where labelled; size: cells per side; stride: pixels
    per cell; sigma: cells. The Gaussian stands on the nearest cell, floor(x / stride + 1/2) (published:
    int(), which differs left of and above the image); `subcell` leaves it at x / stride, for coarse cells.
    Where a keypoint is unlabelled or its cell lies outside, the weight is 0 and the map empty."""
    exact = keypoints / stride
    cell = torch.floor(exact + 0.5)
    inside = ((cell >= 0) & (cell < size)).all(-1)
    weight = visible * inside
    heatmaps = draw_gaussians(exact if subcell else cell, size, size, sigma)
    return heatmaps * weight[..., None, None], weight


# --- Augmentation: in batch, on the training device, from uniform numbers that the caller draws ------------

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the base method
IMAGE_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)


@functools.lru_cache
def per_channel(values, device):
    """Three numbers as (3, 1, 1) on a device; kept, so that a step makes no copy from the host."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def unit_range(images):
    """uint8 (B, 3, H, W) -> float32 in [0, 1]."""
    return images.float() / 255


def normalise(images):
    """Images in [0, 1] (B, 3, H, W) -> zero mean and unit deviation by ImageNet's statistics."""
    return (images - per_channel(IMAGE_MEAN, images.device)) / per_channel(IMAGE_STD, images.device)


def random_crop_view(u, size, area):
    """Random resized crop as a view: u (B, 3) in [0, 1); area: (low, high), the crop's share of the image's
    area. Returns (B, 2, 3)."""
    side = size * torch.sqrt(area[0] + (area[1] - area[0]) * u[:, 0])
    corner = (size - side)[:, None] * u[:, 1:3]
    linear = torch.eye(2, device=u.device) * (size / side)[:, None, None]
    return torch.cat([linear, -(linear @ corner[..., None])], -1)


def random_affine_view(u, size, rotation, shear, translate, scale):
    """Random affine view: u (B, 5) in [0, 1); rotation, shear in degrees (+-); translate as a share of the
    side (+-); scale: (low, high). Returns (B, 2, 3)."""
    signed = 2 * u - 1
    return affine_view(size,
                       rotation=torch.deg2rad(signed[:, 0] * rotation),
                       shear=torch.deg2rad(signed[:, 1] * shear),
                       scale=scale[0] + (scale[1] - scale[0]) * u[:, 2],
                       translate=signed[:, 3:5] * (translate * size))


def colour_jitter(images, u, strength):
    """Brightness, contrast and saturation of images (B, 3, H, W) in [0, 1], each by a factor in 1 +-
    strength, in a random order per image; u: (B, 6) in [0, 1), factors and order. As in the published
    transforms, a change blends the image with black, with its mean grey or with its own grey, and clamps."""
    factors = 1 + strength * (2 * u[:, :3] - 1)
    luma = per_channel(LUMA, images.device)
    for change in u[:, 3:].argsort(1).unbind(1):  # (B,): 0 brightness, 1 contrast, 2 saturation
        factor = factors.gather(1, change[:, None])[..., None, None]
        change = change[:, None, None, None]
        grey = (images * luma).sum(1, keepdim=True)
        other = grey * (change == 2) + grey.mean((2, 3), keepdim=True) * (change == 1)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images


# --- Batches -----------------------------------------------------------------------------------------------

@functools.lru_cache(8)
def shuffled(n, seed, i):
    """The order of 0 ... n - 1 in the i-th pass over them."""
    return np.random.default_rng((seed, i)).permutation(n)


def shuffled_span(n, start, count, seed):
    """Positions start ... start + count - 1 of endless passes over 0 ... n - 1, each in a new order."""
    first = start // n
    last = (start + count - 1) // n
    passes = np.concatenate([shuffled(n, seed, i) for i in range(first, last + 1)])
    return passes[start - first * n:][:count]


def shuffled_batch(n, size, step, seed):
    """The `step`-th batch of `size` positions, see `shuffled_span`."""
    return shuffled_span(n, step * size, size, seed)


def prefetch(jobs, workers):
    """Results of the callables `jobs`, in order, computed ahead by threads: decoding releases the GIL."""
    if not workers:
        for job in jobs:
            yield job()
        return
    pool = ThreadPoolExecutor(workers)
    waiting = []
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, jobs that wait are dropped


# --- The built-in benchmark: bodies and hands, a clean source and wild targets -----------------------------

# Forward kinematics, a perspective camera, shaded limbs. Metres, x to the image's right, y up, z to the
# camera; degrees. All numbers of a sample come from default_rng((seed, domain, split, index)).
RENDERER_VERSION = 3        # raise it when pictures change and no table of `benchmark_tables` did
POSE_NUMBERS = 43           # uniform numbers per sample: 4 camera, 12 proportions, kind and 26 angles
SUPERSAMPLING = 4           # pictures are drawn this many times larger, then averaged

# Difficulty of the target's appearance. Lengths are shares of the image side, colours are in [0, 1].
WILD = {
    "textured": 0.5, "pattern_contrast": 0.45, "gloves": 0.6,   # patterned garments, contrast, gloved hands
    "background": 0.55, "saturation": 0.35, "noise": 0.40,      # contrast, colour, noise of the background
    "clutter": 6, "distractors": 2, "occluders": (0.2, 0.2),    # shapes, limbs; probability of each in front
    "light": 0.20, "cast": 0.12, "contrast": (0.80, 1.15),      # light gradient, colour cast per channel
    "blur": 0.008, "grain": 0.030}                              # largest standard deviations
PLAIN = dict(gloves=0, textured=0, background=0.35, saturation=0.3, noise=0.15, clutter=0, distractors=0,
             occluders=())                                      # the source

# Angles of a body. a_/b_ name its two sides, left and right after a coin toss. Signs: `lean`, `bend`, `nod`
# forward; `hip`, `arm` forward (flexion); `spread`, `lift` outwards (abduction); `legrot` outwards, `armrot`
# inwards; `roll` in the image plane; `yaw` about the body's long axis, within 70 so that the front is seen.
BODY_LIMB = ("hip", "spread", "legrot", "knee", "arm", "lift", "armrot", "elbow")
BODY_ANGLES = ("pitch", "roll", "yaw", "lean", "bend", "side", "twist", "nod", "turn", "tilt",
               *(f"a_{name}" for name in BODY_LIMB), *(f"b_{name}" for name in BODY_LIMB))
JOINT_LIMITS = dict(bend=(-30, 90), side=(-35, 35), twist=(-45, 45), nod=(-45, 50), turn=(-70, 70),
    tilt=(-40, 40), hip=(-35, 125), spread=(-20, 70), legrot=(-40, 50), knee=(0, 145), arm=(-60, 180),
    lift=(-10, 100), armrot=(-90, 80), elbow=(0, 145))
STANDING = dict(pitch=(-12, 12), roll=(-5, 5), yaw=(-70, 70), lean=(-5, 5), bend=(-4, 10), side=(-6, 6),
    twist=(-10, 10), nod=(-12, 18), turn=(-25, 25), tilt=(-10, 10), hip=(-8, 12), spread=(0, 12),
    legrot=(-5, 25), knee=(0, 14), arm=(-15, 18), lift=(4, 22), armrot=(-10, 40), elbow=(4, 35))
FREE_ARMS = dict(arm=(-30, 130), lift=(5, 80), armrot=(-50, 60), elbow=(5, 120))
POSES = {       # name: a row of `Kind`, with the ranges that differ from STANDING
    "stand": (0.34, 0.08, True, {}),
    "walk": (0.24, 0.09, True, dict(a_hip=(8, 35), a_knee=(0, 30), b_hip=(-25, 0), b_knee=(5, 45),
        a_arm=(-32, -4), b_arm=(5, 38), elbow=(5, 50), bend=(0, 12))),
    "gesture": (0.22, 0.08, True, dict(a_arm=(0, 90), a_lift=(5, 60), a_elbow=(10, 115), a_armrot=(-30, 60),
        b_arm=(-15, 40), b_lift=(4, 40), b_elbow=(5, 90))),
    "crouch": (0.030, 0.08, False, FREE_ARMS | dict(hip=(60, 118), knee=(70, 140), spread=(5, 42),
        lean=(0, 32), bend=(5, 40))),
    "kick": (0.020, 0.09, False, FREE_ARMS | dict(a_hip=(45, 120), a_knee=(0, 65), a_spread=(0, 45),
        b_hip=(-15, 12), b_knee=(0, 35), lean=(-30, 8), roll=(-28, 12), side=(-20, 20))),
    "lunge": (0.025, 0.10, False, FREE_ARMS | dict(a_hip=(45, 100), a_knee=(50, 110), b_hip=(-33, -5),
        b_knee=(5, 65), spread=(3, 35), lean=(0, 28), bend=(-5, 35), roll=(-12, 12))),
    "raise": (0.035, 0.10, False, dict(arm=(105, 180), lift=(0, 55), armrot=(-30, 30), elbow=(0, 75),
        hip=(-15, 35), spread=(0, 40), knee=(0, 65), bend=(-25, 10), side=(-20, 20))),
    "sit": (0.025, 0.06, False, dict(hip=(70, 105), knee=(10, 110), spread=(3, 35), lean=(-25, 12),
        bend=(-5, 35), arm=(-30, 80), lift=(5, 45), elbow=(10, 100))),
    "run": (0.020, 0.13, False, dict(a_hip=(35, 90), a_knee=(45, 120), b_hip=(-33, 0), b_knee=(10, 95),
        lean=(5, 30), a_arm=(-58, -15), b_arm=(15, 85), elbow=(55, 120), twist=(-20, 20), roll=(-12, 12))),
    "throw": (0.015, 0.10, False, FREE_ARMS | dict(a_arm=(50, 170), a_lift=(15, 95), a_armrot=(-85, 20),
        a_elbow=(20, 125), a_hip=(-30, 15), b_hip=(0, 70), knee=(0, 70), spread=(3, 40), twist=(-40, 40),
        side=(-28, 28), bend=(-15, 40), roll=(-18, 18))),
    "stoop": (0.010, 0.04, False, dict(lean=(10, 45), bend=(30, 80), hip=(10, 70), knee=(0, 50),
        arm=(30, 130), lift=(3, 50), elbow=(0, 80), nod=(-40, 20))),
    "handstand": (0.012, 0.05, False, dict(roll=(120, 210), arm=(145, 180), lift=(0, 45), elbow=(0, 30),
        hip=(-22, 60), spread=(0, 60), knee=(0, 80), bend=(-25, 15), side=(-15, 15), nod=(-40, 10))),
    "lie": (0.008, 0.03, False, FREE_ARMS | dict(a_arm=(-20, 170), roll=(68, 112), hip=(-10, 85),
        knee=(0, 110), spread=(0, 40), bend=(-15, 30)))}
# Mean lengths in metres. A figure's are these times a common stature and a factor each, +- PROPORTION.
# WIDER: how far the ranges of limbs and fingers go on from their tables towards the joint limits.
SEGMENTS = {"hips": 0.20, "spine": 0.50, "shoulders": 0.35, "neck": 0.10, "head": 0.24, "upper_arm": 0.29,
            "forearm": 0.26, "thigh": 0.44, "shin": 0.43}
PROPORTION = {"source": 0.09, "target": 0.14}
WIDER = {"source": 0.0, "target": 0.15}

# Angles of a hand. `flex` at the MCP and `curl` at the PIP bend a finger to the palm, `splay` turns it to the
# thumb. The thumb: `radial` away from the index in the palm's plane, `palmar` out of it, `tflex`, `tcurl`.
# `pitch`, `roll`, `yaw` turn the hand before the camera; `bend`, `deviate` turn the forearm against it.
FINGERS = "index", "middle", "ring", "little"
HAND_ANGLES = ("pitch", "roll", "yaw", "bend", "deviate", "radial", "palmar", "tflex", "tcurl",
               "index_flex", "index_curl", "index_splay", "middle_flex", "middle_curl", "middle_splay",
               "ring_flex", "ring_curl", "ring_splay", "little_flex", "little_curl", "little_splay")
HAND_LIMITS = dict(flex=(-20, 90), curl=(0, 110), splay=(-15, 15), radial=(0, 65), palmar=(-5, 60),
    tflex=(-10, 60), tcurl=(-15, 80), bend=(-60, 60), deviate=(-20, 30))
HAND_OPEN = dict(bend=(-25, 25), deviate=(-10, 15), flex=(-5, 18), curl=(2, 20), splay=(-4, 4),
    radial=(25, 50), palmar=(5, 30), tflex=(0, 20), tcurl=(0, 25))
HAND_VIEW = {"source": dict(pitch=(-25, 25), roll=(-60, 60), yaw=(-35, 35)),
             "target": dict(pitch=(-35, 35), roll=(-60, 60), yaw=(-50, 50), bend=(-35, 35))}
FIST = dict(flex=(62, 88), curl=(75, 108), radial=(5, 20), palmar=(35, 58), tflex=(25, 58))
THUMB_OUT = dict(radial=(40, 65), palmar=(0, 25), tflex=(-10, 5), tcurl=(-12, 8))
INDEX, MIDDLE, RING, LITTLE = ({f"{finger}_flex": (-8, 20), f"{finger}_curl": (0, 18)} for finger in FINGERS)
GESTURES = {                # as POSES, with the ranges that differ from HAND_OPEN
    "open": (0.32, 0.05, True, {}),
    "relaxed": (0.27, 0.06, True, dict(flex=(5, 38), curl=(12, 48), radial=(15, 40), tcurl=(5, 35))),
    "flat": (0.11, 0.04, True, dict(splay=(-2, 2), curl=(0, 8), radial=(5, 25), palmar=(0, 15))),
    "spread": (0.05, 0.08, False, dict(index_splay=(6, 14), ring_splay=(-8, -3), little_splay=(-15, -8),
        radial=(45, 65), flex=(-15, 8))),
    "fist": (0.045, 0.12, False, FIST), "point": (0.02, 0.10, False, FIST | INDEX),
    "two": (0.025, 0.09, False, FIST | INDEX | MIDDLE | dict(index_splay=(2, 13), middle_splay=(-8, 0))),
    "four": (0.035, 0.12, False, FIST | INDEX | MIDDLE | RING | LITTLE),
    "thumb": (0.025, 0.08, False, FIST | THUMB_OUT), "phone": (0.01, 0.05, False, FIST | THUMB_OUT | LITTLE),
    "pinch": (0.035, 0.09, False, dict(index_flex=(42, 62), index_curl=(42, 65), flex=(0, 55), curl=(5, 60),
        radial=(12, 28), palmar=(42, 58), tflex=(5, 25))),
    "claw": (0.025, 0.06, False, dict(flex=(-12, 20), curl=(50, 95), tcurl=(20, 65), radial=(30, 60))),
    "grip": (0.03, 0.06, False, dict(flex=(30, 65), curl=(35, 75), palmar=(35, 58), radial=(15, 40)))}
# Finger: its base in metres (x away from the thumb, y to the fingertips, z out of the palm), the lengths of
# its bones, the splay at rest in degrees, the radii of its joints.
HAND_BONES = {
    "thumb": ((-0.024, 0.024, 0.008), (0.046, 0.034, 0.027), 0, (0.0150, 0.0108, 0.0094, 0.0078)),
    "index": ((-0.027, 0.088, 0.003), (0.043, 0.026, 0.021), 5, (0.0105, 0.0094, 0.0084, 0.0072)),
    "middle": ((-0.006, 0.092, 0.000), (0.047, 0.030, 0.022), 1, (0.0105, 0.0094, 0.0084, 0.0072)),
    "ring": ((0.014, 0.087, 0.000), (0.044, 0.028, 0.022), -4, (0.0102, 0.0091, 0.0081, 0.0070)),
    "little": ((0.032, 0.076, 0.004), (0.035, 0.021, 0.020), -9, (0.0092, 0.0083, 0.0074, 0.0063))}


class Kind(NamedTuple):
    """A kind of pose, a row of POSES or GESTURES."""
    source: float  # its weight in the source, and in the target
    target: float
    easy: bool
    ranges: dict  # of angles in degrees


class Part(NamedTuple):
    """A limb, a patch of flesh or a mark: two circles and what lies between them."""
    role: str  # what it is drawn as, see `choose_colours`
    a: np.ndarray  # (N, 3), the centres of the circles, metres
    b: np.ndarray
    radius_a: float | np.ndarray  # metres, times the figure's girth: a number or (N,)
    radius_b: float | np.ndarray
    group: str | None = None  # parts of one group merge into one shape
    normal: np.ndarray | None = None  # (N, 3): a mark on its group, not seen where it faces away


class Parts(NamedTuple):
    """P parts of N figures, stacked."""
    roles: tuple  # (P,)
    groups: list  # the numbers of the parts that are drawn together
    ends: np.ndarray  # (N, P, 2, 3) metres
    radii: np.ndarray  # (N, P, 2) metres


def draw_angles(u, domain, mix, poses, names, rest, limits):
    """Whether poses are of an easy kind (N,), and {name: (N,) radians}, by the tables above.

    u: (N, 1 + names) uniform numbers; domain: "source" or "target", whose ranges; mix: whose weights."""
    kinds = [Kind(*row) for row in poses.values()]
    weights = np.cumsum([kind.source if mix == "source" else kind.target for kind in kinds])
    table = np.empty((len(kinds), len(names), 2))
    for k, kind in enumerate(kinds):
        for j, name in enumerate(names):
            plain = name.split("_")[-1]
            table[k, j] = kind.ranges.get(name, kind.ranges.get(plain, rest[plain]))
            if "_" in name:  # of a limb, a finger
                table[k, j] += WIDER[domain] * (limits[plain] - table[k, j])
    drawn = np.searchsorted(weights[:-1] / weights[-1], u[:, 0], side="right")
    low, high = np.radians(table[drawn]).T  # each (angles, N)
    angles = low + (high - low) * u[:, 1:1 + len(names)].T
    return np.array([kind.easy for kind in kinds])[drawn], dict(zip(names, angles))


def turn(frame, axes, *angles):
    """Frames (N, 3, 3) turned about their own `axes`, a string of x, y, z, by one angle (N,) per axis."""
    for axis, angle in zip(axes, angles):
        i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        matrix = np.tile(np.eye(3), (len(angle), 1, 1))
        matrix[:, i, i] = np.cos(angle)
        matrix[:, j, j] = np.cos(angle)
        matrix[:, j, i] = np.sin(angle)
        matrix[:, i, j] = -np.sin(angle)
        frame = frame @ matrix
    return frame


def along(frame, x, y, z):
    """Vectors (N, 3) of components x, y, z, numbers or (N,), along the columns of frames (N, 3, 3)."""
    return sum(frame[:, :, axis] * np.reshape(value, (-1, 1)) for axis, value in enumerate((x, y, z)))


def stack_parts(parts, girth):
    """P `Part`s of N figures -> `Parts`. Radii are multiplied by girth (N,)."""
    groups = {}
    ends = []
    radii = []
    for p, part in enumerate(parts):
        thickness = girth
        if part.normal is not None:
            thickness = girth * (part.normal[:, 2] > 0.15)  # no radius where it faces away
        groups.setdefault(part.group or p, []).append(p)  # one without a group is drawn alone
        ends.append(np.stack([part.a, part.b], 1))
        radii.append(np.stack([part.radius_a * thickness, part.radius_b * thickness], 1))
    roles = tuple(part.role for part in parts)
    return Parts(roles, list(groups.values()), np.stack(ends, 1), np.stack(radii, 1))


def pose_bodies(u, domain, mix):
    """Pose bodies: u (N, 39) uniform numbers -> easy (N,), joints (N, 16, 3) metres, `Parts`."""
    easy, angle = draw_angles(u[:, 12:], domain, mix, POSES, BODY_ANGLES, STANDING, JOINT_LIMITS)
    mirror = u[:, 9] < 0.5
    for name in ("roll", "side", "twist", "turn", "tilt"):
        angle[name] = np.where(mirror, -angle[name], angle[name])
    stature = 0.92 + 0.16 * u[:, 10]
    girth = 0.95 + 0.45 * u[:, 11]
    length = {}
    for (name, mean), factor in zip(SEGMENTS.items(), u.T):
        length[name] = mean * stature * (1 + PROPORTION[domain] * (2 * factor - 1))
    # Columns of a frame: the left, up, front of what it belongs to.
    root = turn(np.eye(3), "xzyx", angle["pitch"], angle["roll"], angle["yaw"], angle["lean"])
    chest = turn(root, "xzy", angle["bend"], angle["side"], angle["twist"])
    head = turn(chest, "xzy", angle["nod"], angle["tilt"], angle["turn"])
    pelvis = np.zeros((len(u), 3))
    thorax = along(chest, 0, length["spine"], 0)
    neck = thorax + along(chest, 0, length["neck"], 0)
    top = neck + along(head, 0, length["head"], 0)
    joints = {6: pelvis, 7: thorax, 8: neck, 9: top}
    r = 0.42 * length["head"]  # the head's radius
    h = r / girth
    crown = top - along(head, 0, r, 0.1 * r)
    face = top - along(head, 0, 1.22 * r, -0.3 * r)
    mark = thorax + along(chest, 0, -0.13, 0.085 * girth)
    parts = [Part("hair", crown, crown - along(head, 0, 0.35 * r, 0.15 * r), h, 0.8 * h),
             Part("skin", face, face - along(head, 0, 0.23 * r, 0.1 * r), 0.82 * h, 0.68 * h, "face"),
             Part("skin", thorax, neck, 0.052, 0.048, "trunk")]
    for side, indices in ((1, (5, 4, 3, 13, 14, 15)), (-1, (0, 1, 2, 12, 11, 10))):  # left, right
        swap = mirror == (side > 0)
        a = {name: np.where(swap, angle["b_" + name], angle["a_" + name]) for name in BODY_LIMB}
        thigh = turn(root, "xzy", -a["hip"], side * a["spread"], side * a["legrot"])
        shin = turn(thigh, "x", a["knee"])
        arm = turn(chest, "xzy", -a["arm"], side * a["lift"], -side * a["armrot"])
        fore = turn(arm, "x", -a["elbow"])
        hip = along(root, side * length["hips"] / 2, 0, 0)
        knee = hip - along(thigh, 0, length["thigh"], 0)
        ankle = knee - along(shin, 0, length["shin"], 0)
        shoulder = thorax + along(chest, side * length["shoulders"] / 2, 0, 0)
        elbow = shoulder - along(arm, 0, length["upper_arm"], 0)
        wrist = elbow - along(fore, 0, length["forearm"], 0)
        joints.update(zip(indices, (ankle, knee, hip, shoulder, elbow, wrist)))
        toes = ankle + along(shin, 0, -0.07, 0.15)
        fingers = wrist - along(fore, 0, 0.09, 0)
        waist = along(root, side * 0.05, 0.03, 0)
        armpit = thorax + along(chest, side * 0.088, -0.08, 0)
        shirt_end = shoulder - along(chest, side * 0.03, 0.03, 0)
        eye = crown + along(head, side * 0.36 * r, -0.05 * r, 1.05 * r)
        lid = eye - along(head, 0, 0.05 * r, 0)
        parts += [Part("thigh", hip, knee, 0.086, 0.060),
                  Part("shank", knee, ankle, 0.060, 0.042),
                  Part("shoe", ankle, toes, 0.048, 0.036),
                  Part("upper arm", shoulder, elbow, 0.056, 0.043),
                  Part("forearm", elbow, wrist, 0.043, 0.034),
                  Part("skin", wrist, fingers, 0.036, 0.042),
                  Part("trousers", pelvis, hip, 0.085, 0.085, "trunk"),
                  Part("shirt", waist, armpit, 0.088, 0.098, "trunk"),
                  Part("shirt", thorax, shirt_end, 0.060, 0.060, "trunk"),
                  Part("eye", eye, lid, 0.22 * h, 0.2 * h, "face", normal=head[:, :, 2])]
    parts.append(Part("mark", mark, mark - along(chest, 0, 0.11, 0), 0.05, 0.05, "trunk",
                      normal=chest[:, :, 2]))
    return easy, np.stack([joints[k] for k in range(16)], 1), stack_parts(parts, girth)


def pose_hands(u, domain, mix):
    """Pose left hands: u (N, 39) uniform numbers -> easy (N,), joints (N, 21, 3) metres, `Parts`."""
    rest = HAND_OPEN | HAND_VIEW[domain]
    easy, angle = draw_angles(u[:, 12:], domain, mix, GESTURES, HAND_ANGLES, rest, HAND_LIMITS)
    back = np.where(u[:, 9] < 0.5, math.pi, 0)  # the palm or the back is seen
    girth = 0.9 + 0.3 * u[:, 10]
    palm = turn(np.eye(3), "zxy", angle["roll"], angle["pitch"], angle["yaw"] + back)
    fore = turn(palm, "zx", angle["deviate"], angle["bend"])
    wrist = np.zeros((len(u), 3))
    cuff = along(fore, 0, -0.05, 0)
    elbow = along(fore, 0, -0.22, 0)
    joints = [wrist]
    parts = [Part("skin", cuff, wrist, 0.029, 0.024), Part("sleeve", elbow, cuff, 0.042, 0.037)]
    for (finger, (base, bones, splay, radii)), factor in zip(HAND_BONES.items(), u.T):
        start = along(palm, *base)
        joints.append(start)
        if finger == "thumb":  # bends across the palm: turned about its axis
            axis = np.full(len(u), math.radians(60))
            frame = turn(palm, "zxy", angle["radial"], angle["palmar"], axis)
            bends = (np.zeros(len(u)), angle["tflex"], angle["tcurl"])
        else:  # the outer joint follows the middle one
            frame = turn(palm, "z", math.radians(splay) + angle[finger + "_splay"])
            curl = angle[finger + "_curl"]
            bends = (angle[finger + "_flex"], curl, 0.6 * curl)
            ball = along(palm, 0.45 * base[0], 0.012, 0)
            parts.append(Part("skin", ball, start, 0.0165, 0.0125, "palm"))
        for i, bend in enumerate(bends):
            frame = turn(frame, "x", bend)
            bone = along(frame, 0, bones[i] * (1 + PROPORTION[domain] * (2 * factor - 1)), 0)
            parts.append(Part("skin", start, start + bone, radii[i], radii[i + 1], f"{finger} {i}"))
            start = start + bone
            joints.append(start)
        nail = start + along(frame, 0, 0, -0.6 * radii[3] * girth)
        parts.append(Part("nail", nail - 0.5 * bone, nail - 0.12 * bone, 0.0052, 0.005, f"{finger} 2",
                          normal=-frame[:, :, 2]))
    for ax, ay, bx, by in ((-24, 66, 20, 72), (-28, 56, 14, 50), (-10, 56, 0, 16)):  # millimetres
        a = along(palm, ax / 1000, ay / 1000, 0.012)
        b = along(palm, bx / 1000, by / 1000, 0.012)
        parts.append(Part("crease", a, b, 0.0016, 0.0016, "palm", normal=palm[:, :, 2]))
    return easy, np.stack(joints, 1), stack_parts(parts, girth)


def project_figures(u, joints, parts, distances, size):
    """Perspective cameras that put each figure's box at 60-80 % of the image, roughly centred.

    u: (N, 4) uniform numbers; joints: (N, K, 3); distances: of the nearest and the farthest camera, metres;
    size: the image's side. Returns joints (N, K, 2), ends (N, P, 2, 2) and radii (N, P, 2) in pixels."""
    k = joints.shape[1]
    points = np.concatenate([joints, parts.ends.reshape(len(u), -1, 3)], 1)
    distance = (distances[0] + (distances[1] - distances[0]) * u[:, :1])[..., None]
    near = distance / (distance - points[..., 2:])  # magnification (N, K + 2 P, 1)
    flat = points[..., :2] * (1, -1) * near
    low = flat[:, :k].min(1)
    high = flat[:, :k].max(1)
    scale = (0.60 + 0.20 * u[:, 1:2]) / (high - low).max(1, keepdims=True)
    room = np.clip((1 - (high - low) * scale) / 2 - 0.06, 0, 0.06)  # 0.06: flesh around the joints
    shift = 0.5 + (2 * u[:, 2:4] - 1) * room - (low + high) / 2 * scale
    flat = (flat * scale[..., None] + shift[:, None]) * size - 0.5
    ends = flat[:, k:].reshape(*parts.ends.shape[:3], 2)
    radii = parts.radii * near[:, k:].reshape(parts.radii.shape) * scale[..., None] * size
    return flat[:, :k], ends, radii


# Tones from a limb's outline to its highlight: radius, shift towards the lamp (both in radii), brightness.
TONES = ((1.00, 0.00, 0.45), (0.84, 0.10, 0.76), (0.58, 0.24, 0.98), (0.28, 0.38, 1.12))
# Patches of a garment's second colour: from, to along the limb in [0, 1]; from, to across it in [-1, 1].
PATTERNS = (((0.0, 0.2, -1, 1), (0.3, 0.5, -1, 1), (0.6, 0.8, -1, 1), (0.9, 1, -1, 1)),       # rings
            ((0, 1, -0.9, -0.6), (0, 1, -0.3, 0), (0, 1, 0.3, 0.6), (0, 1, 0.8, 1)),          # stripes
            ((0, 0.3, -1, 0), (0.3, 0.6, 0, 1), (0.6, 0.9, -1, 0), (0.9, 1, 0, 1)),           # checks
            ((0.5, 1, -1, 1),))                                                               # a half


def draw_limbs(draw, order, ends, radii, colours, patches, lamp):
    """Draw tapered limbs, two circles and what lies between them, as nested tones.

    order: groups of limbs from far to near; ends (P, 2, 2), radii (P, 2): pixels; colours (P, 2, 3) in
    [0, 1]: of limb and patches; patches: P rows of PATTERNS; lamp (2,): its direction."""
    tones = []
    for scale, shift, bright in TONES:
        centres = ends + shift * radii[..., None] * lamp
        fills = np.clip(255 * bright * colours, 0, 255).astype(int)
        tones.append((centres.tolist(), (scale * radii).tolist(), fills.tolist()))
    for group in order:
        for centres, rings, fills in tones:
            for p in group:
                if max(rings[p]) >= 0.5:
                    draw_tone(draw, centres[p], rings[p], fills[p], patches[p])


def draw_tone(draw, centres, radii, fills, patches):
    """Draw one limb in one tone, its patches in another: two centres, radii and fills."""
    (ax, ay), (bx, by) = centres
    ra, rb = radii
    first, second = fills
    for x, y, r in ((ax, ay, ra), (bx, by, rb)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(first))
    dx = bx - ax
    dy = by - ay
    length = math.hypot(dx, dy) + 1e-6
    for n, (t0, t1, s0, s1) in enumerate(((0, 1, -1, 1), *patches)):
        corners = []
        for t, s in ((t0, s0), (t0, s1), (t1, s1), (t1, s0)):
            wide = s * (ra + t * (rb - ra)) / length
            corners += [ax + t * dx - wide * dy, ay + t * dy + wide * dx]
        draw.polygon(corners, fill=tuple(second if n else first))


def draw_shape(draw, rng, extent, colour):
    """Draw an ellipse, a box, a triangle or a bar anywhere. extent: (low, high) of its half-size, in sides of
    the canvas."""
    side = draw.im.size[0]
    corners = rng.choice((3, 4, 4, 24))
    turn = math.pi * rng.random()
    angle = 2 * math.pi * (np.arange(corners) + 0.5) / corners
    aspect = 0.1 if rng.random() < 0.25 else rng.uniform(0.4, 1)
    outline = np.stack([np.cos(angle), aspect * np.sin(angle)], 1) * rng.uniform(*extent) * side
    outline = outline @ ((math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn)))
    centre = rng.random(2) * side
    for shrink, tone in ((1, 255), (0.7, 205)):
        points = (shrink * outline + centre).ravel().tolist()
        draw.polygon(points, fill=tuple((tone * colour).astype(int)))


def draw_background(rng, look, size):
    """A canvas (PIL, SUPERSAMPLING * size): a gradient with noise and clutter; look: WILD or PLAIN."""
    level = rng.uniform(0.25, 0.9)

    def mute(colour):
        grey = colour.mean(-1, keepdims=True)
        muted = grey + look["saturation"] * (colour - grey)
        return np.clip(level + look["background"] * (muted - 0.5), 0, 1)

    top, bottom = rng.random((2, 3))
    canvas = top + (bottom - top) * np.linspace(0, 1, size)[:, None, None].repeat(size, 1)
    grids = (4, 7, 13, 25) if look is WILD else (4,)
    for cells in grids:
        grid = Image.fromarray(rng.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        smooth = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 255 - 0.5
        canvas += look["noise"] * (4 / cells) ** 0.5 * smooth
    canvas = Image.fromarray((255 * mute(canvas)).astype(np.uint8))
    canvas = canvas.resize((SUPERSAMPLING * size,) * 2, Image.Resampling.BILINEAR)
    for _ in range(look["clutter"]):
        draw_shape(ImageDraw.Draw(canvas), rng, (0.05, 0.26), mute(rng.random(3)))
    return canvas


def choose_colours(rng, look, roles):
    """Colours (P, 2, 3) in [0, 1] of P parts and of their patches, and the patches, by the parts' roles."""
    tone = rng.random()
    tint, shirt, trousers, shoe, hair, mark = rng.random((6, 3))
    skin = (0.95, 0.78, 0.67) - tone * np.array((0.57, 0.54, 0.50)) + 0.06 * (tint - 0.5)  # pale to dark
    gloved = "nail" in roles and rng.random() < look["gloves"]  # only hands have nails
    if gloved:
        skin = tint
    long_sleeves, long_legs = rng.random(2) < (0.5, 0.65)
    # What tells front from back, hence left from right, must stand out: eyes, mark, nails, creases.
    colours = {"skin": skin, "hair": hair * (0.5, 0.35, 0.25), "eye": (0.04, 0.04, 0.04), "shoe": 0.7 * shoe,
               "mark": 0.3 * mark + (0.0 if shirt.mean() > 0.5 else 0.7), "crease": 0.6 * skin,
               "nail": 0.4 * skin + (0.6, 0.5, 0.5), "shirt": shirt, "upper arm": shirt, "sleeve": shirt,
               "forearm": shirt if long_sleeves else skin, "trousers": trousers, "thigh": trousers,
               "shank": trousers if long_legs else skin}
    first = np.array([colours[role] for role in roles])
    second = first.copy()
    patches = [()] * len(roles)
    garments = [shirt, trousers]
    if gloved:
        garments.append(skin)
    for garment in garments:
        worn = (first == garment).all(1)
        pattern = rng.integers(len(PATTERNS))
        other = rng.random(3)
        if rng.random() < look["textured"]:
            second[worn] += WILD["pattern_contrast"] * (other - garment)
            for p in np.flatnonzero(worn):
                patches[p] = PATTERNS[pattern]
    return np.stack([first, second], 1), patches


def photograph(rng, image):
    """What lamp and camera do to a PIL image of the target -> (S, S, 3) uint8."""
    size = image.width
    turn = 2 * math.pi * rng.random()
    place = np.linspace(-1, 1, size)
    slope = math.cos(turn) * place + math.sin(turn) * place[:, None]
    light = 1 + WILD["light"] * rng.random() * slope
    cast = 1 + WILD["cast"] * rng.uniform(-1, 1, 3)
    pixels = (np.asarray(image) / 255 * (light[..., None] * cast) - 0.5) * rng.uniform(*WILD["contrast"])
    image = Image.fromarray((255 * np.clip(pixels + rng.uniform(0.42, 0.58), 0, 1)).astype(np.uint8))
    # Pillow's blur repeats the border outwards; zeros would leave a dark frame that gives the domain away.
    image = image.filter(ImageFilter.GaussianBlur(WILD["blur"] * size * rng.random()))
    grain = 255 * WILD["grain"] * rng.random() ** 2
    grain = grain * rng.standard_normal((size, size, 3), dtype=np.float32)
    return np.clip(np.asarray(image) + grain + 0.5, 0, 255).astype(np.uint8)


def benchmark_tables():
    """The tables of the built-in benchmark. RENDERER_VERSION stands for its code and its other numbers."""
    return (WILD, PLAIN, TONES, PATTERNS, POSES, STANDING, JOINT_LIMITS, SEGMENTS, PROPORTION, WIDER,
            GESTURES, HAND_LIMITS, HAND_OPEN, HAND_VIEW, HAND_BONES)


class Mannequin:
    """The built-in benchmark: bodies (BODY16) or left hands (HAND21).

    domain: 'source' is clean and its poses are mostly easy; 'target' is wild and its poses mostly hard;
    'everyday' looks like the target, with the kinds of pose as often as in the source. cache: a directory
    for the images, safe to delete; they are rendered when the first is asked for, and progress(done, total)
    is called. visible: 1 where a keypoint lies inside the image, covered or not. joints: (N, K, 3) metres;
    easy: (N,) bool, the easy kinds of pose."""
    DEFAULT_COUNTS = {("source", "train"): 6000, ("source", "val"): 500, ("source", "test"): 1000,
                      ("target", "train"): 2000, ("target", "val"): 500, ("target", "test"): 1000,
                      ("everyday", "train"): 2000, ("everyday", "val"): 500, ("everyday", "test"): 1000}

    def __init__(self, domain, split, size=64, count=None, seed=0, cache=None, progress=None, hand=False):
        if (domain, split) not in self.DEFAULT_COUNTS:
            raise ValueError(f"domain, split: unknown {domain!r}, {split!r}; use 'source', 'target' or "
                             "'everyday' with 'train', 'val' or 'test'")
        if count is None:
            count = self.DEFAULT_COUNTS[domain, split]
        for name, value, least in (("size", size, 1), ("count", count, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: {value} is too small; give {least} or more")
        self.domain = domain
        self.split = split
        self.size = size
        self.seed = seed
        self.hand = hand
        self.cache = cache
        self.progress = progress or (lambda *_: None)
        self._images = None
        self._rendering = threading.Lock()
        # Whose look, proportions, ranges and random numbers it has, and whose kinds of pose.
        drawn_as = "source" if domain == "source" else "target"
        mix = "target" if domain == "target" else "source"
        self.look = PLAIN if drawn_as == "source" else WILD
        self.key = (seed, 2 * hand + (drawn_as == "target"), ("train", "val", "test").index(split))
        u = np.stack([np.random.default_rng((*self.key, i)).random(POSE_NUMBERS) for i in range(count)])
        self.skeleton = HAND21 if hand else BODY16
        pose = pose_hands if hand else pose_bodies
        distances = (0.5, 1.1) if hand else (3.0, 7.0)
        easy, self.joints, parts = pose(u[:, 4:], drawn_as, mix)
        self.easy = torch.from_numpy(easy)
        self.roles = parts.roles
        self.groups = parts.groups
        self.depth = parts.ends[..., 2].mean(-1)  # (N, P), towards the camera
        keypoints, self.ends, self.radii = project_figures(u, self.joints, parts, distances, size)
        self.keypoints = torch.from_numpy(keypoints).float()
        self.visible = ((self.keypoints >= 0) & (self.keypoints <= size - 1)).all(-1).float()

    def __len__(self):
        return len(self.joints)

    def names(self, indices):
        """Names of samples, for example 'target-test-000012' or 'hand-target-test-000012'."""
        prefix = f"{'hand-' if self.hand else ''}{self.domain}-{self.split}"
        return [f"{prefix}-{int(i):06d}" for i in indices]

    def __getitem__(self, indices):
        """Images (B, 3, S, S) uint8, keypoints (B, K, 2) and visible (B, K) of 1-D `indices`."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        with self._rendering:  # threads that prefetch ask at once
            if self._images is None:
                self._images = self._all_images()
        return self._images[indices], self.keypoints[indices], self.visible[indices]

    def render(self, index):
        """Draw one sample: (3, S, S) uint8."""
        look = self.look
        rng = np.random.default_rng((*self.key, index))
        rng.random(POSE_NUMBERS)  # the pose's numbers come first
        canvas = draw_background(rng, look, self.size)
        draw = ImageDraw.Draw(canvas)
        side = canvas.width
        lamp = np.array((-0.5, -0.86))
        if look is WILD:
            lamp = lamp + rng.uniform(-0.5, 0.5, 2)
        colours, patches = choose_colours(rng, look, self.roles)
        for _ in range(look["distractors"]):  # two limbs in a row, of the figure's colours
            chain = np.cumsum([rng.random(2), *rng.uniform(-0.22, 0.22, (2, 2))], 0)
            ends = side * chain[[[0, 1], [1, 2]]]
            radii = side * rng.uniform(0.02, 0.04) * np.array(((1.2, 1), (1, 0.75)))
            own = rng.integers(len(colours))
            draw_limbs(draw, [[0], [1]], ends, radii, colours[[own, own]], [patches[own]] * 2, lamp)
        ends = SUPERSAMPLING * (self.ends[index] + 0.5) - 0.5
        radii = SUPERSAMPLING * self.radii[index]
        order = sorted(self.groups, key=lambda group: sum(self.depth[index, group]) / len(group))
        draw_limbs(draw, order, ends, radii, colours, patches, lamp)
        for probability in look["occluders"]:
            if rng.random() < probability:
                draw_shape(draw, rng, (0.05, 0.13), rng.random(3))
        image = canvas.reduce(SUPERSAMPLING)
        pixels = photograph(rng, image) if look is WILD else np.asarray(image)
        return pixels.transpose(2, 0, 1)

    def _all_images(self):
        """All images (N, 3, S, S): from the cache if it holds them, else rendered and stored there."""
        digest = hashlib.sha256(repr((RENDERER_VERSION, self.seed, benchmark_tables())).encode())
        name = f"mannequin-{self.names([len(self)])[0]}-{self.size}px-{digest.hexdigest()[:16]}.u8"
        path = Path(self.cache or ".") / name
        shape = (len(self), 3, self.size, self.size)
        if self.cache and path.exists() and path.stat().st_size == math.prod(shape):  # else cut off
            return torch.from_numpy(np.fromfile(path, np.uint8).reshape(shape))
        images = np.empty(shape, np.uint8)
        for i in range(len(self)):
            images[i] = self.render(i)
            self.progress(i + 1, len(self))
        if self.cache:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    file.write(images)
            except OSError as error:  # they are only rendered again
                print(f"cache: cannot be written ({error}); the next run renders its images again",
                      file=sys.stderr)
        return torch.from_numpy(images)


# --- Pictures read from a disk -----------------------------------------------------------------------------

JPEG = ("JPEG", "MPO")  # Pillow's formats whose header tells the orientation
MID_GREY = 128  # what stands behind the transparent parts of a picture
# How a picture comes upright, by its EXIF orientation. 1 is upright, 5 to 8 lie on their side.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


class Picture(NamedTuple):
    """A decoded picture, upright, 8-bit RGB."""
    image: Image.Image  # a JPEG may be reduced
    sides: tuple  # width and height of the whole picture, in its own pixels
    box: tuple  # (left, top, right, bottom), where the whole picture lies in `image`


def open_picture(path):
    """An image file -> an upright, 8-bit RGB image (PIL).

    It is turned and mirrored by its EXIF orientation; a damaged EXIF block counts as upright. 16-bit grey is
    scaled to 8 bits. Transparent parts show a mid-grey background. Of an animation the first picture counts.

    FileNotFoundError where there is no such file. DataError where it cannot be read or decoded, or where its
    values are 32-bit integers or floating point, whose range nothing tells; the message names the file."""
    return decode_picture(path).image


def decode_picture(path, least=None):
    """As `open_picture` -> Picture. least: (width, height) that suffice of the whole upright picture: JPEG
    decodes at 1/2, 1/4 or 1/8 at a fraction of the cost, and never below these sides."""
    with _open_image(path) as image:
        try:
            width, height = image.size
            draft = None
            if least is not None and image.format in JPEG:
                draft = image.draft(None, least[::-1] if _orientation(image) > 4 else least)
            image.load()
            if draft is None:
                width, height = image.size
            orientation = _orientation(image)  # after decoding: Pillow turns a TIFF by itself
            picture = _to_rgb(image, path)
        except DataError:
            raise
        except Exception as error:  # Pillow's readers raise errors of any kind on damaged files
            raise DataError(f"{path}: cannot be decoded ({error}); fetch the image again") from error
    reduction = 1 if draft is None else width / draft[1][2]  # 1, 2, 4 or 8
    if orientation > 1:
        picture = picture.transpose(UPRIGHT[orientation])
    if orientation > 4:
        width, height = height, width
    across = width / reduction
    down = height / reduction
    # Its last pixels may be covered in part; turning and mirroring make them the first.
    left = picture.width - across if orientation in (2, 3, 6, 7) else 0
    top = picture.height - down if orientation in (3, 4, 7, 8) else 0
    return Picture(picture, (width, height), (left, top, left + across, top + down))


def picture_sides(path):
    """Width and height of an upright picture. A JPEG's or a square's header says; others are decoded."""
    with _open_image(path) as image:
        if image.width == image.height:
            return image.size
        if image.format in JPEG:
            return image.size[::-1] if _orientation(image) > 4 else image.size
    return decode_picture(path).sides


def _open_image(path):
    """A file's header -> PIL image, not yet decoded."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing") from error
    except Exception as error:  # Pillow's readers raise errors of any kind on damaged files
        raise DataError(f"{path}: not a readable image ({error}); fetch it again, or save it anew as JPEG or "
                        "PNG") from error


def _orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; 1 where there is none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in UPRIGHT else 1
    except Exception:  # of any kind, where the EXIF block is damaged
        return 1


def _to_rgb(image, path):
    """A decoded PIL image of any mode -> 8-bit RGB."""
    # Pillow holds 16-bit grey as I;16 or I, by its version and the format of the file.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0] if image.format == "TIFF" else 16
        grey = (values >> (bits - 8)).astype(np.uint8)
        if "transparency" in image.info:  # the value that is transparent
            grey[values == image.info["transparency"]] = MID_GREY
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
        raise DataError(f"{path}: its values are {kind}, whose range nothing tells; save it anew with 8 or "
                        "16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (MID_GREY, MID_GREY, MID_GREY, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def letterbox_view(region, size):
    """Where a region (left, top, right, bottom) of a picture lies in a size x size square: as large as fits,
    its aspect kept, centred.

    Returns (width, height) and (left, top) of its place, whole pixels, and the view from the picture's
    pixels to the square's, (2, 3) float64 numpy."""
    left, top, right, bottom = region
    scale = size / max(right - left, bottom - top)
    width = max(1, round((right - left) * scale))
    height = max(1, round((bottom - top) * scale))
    x = (size - width) // 2
    y = (size - height) // 2
    scale_x = width / (right - left)
    scale_y = height / (bottom - top)
    # Pixel i covers i - 1/2 ... i + 1/2, in the picture and in the square.
    view = np.array([[scale_x, 0, (0.5 - left) * scale_x - 0.5 + x],
                     [0, scale_y, (0.5 - top) * scale_y - 0.5 + y]])
    return (width, height), (x, y), view


def letterbox(image, region, size):
    """A region of an RGB picture in a size x size square, black beside it: uint8 (3, size, size)."""
    fitted, place, _ = letterbox_view(region, size)
    square = Image.new("RGB", (size, size))
    square.paste(image.resize(fitted, Image.Resampling.BILINEAR, region), place)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


@contextmanager
def _listed_in(file):
    """A picture that is missing in this block is one that the annotation file lists."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {file} lists it; fetch the image again") from error


def _read_crop(path, size, sides, region, annotation):
    """The region (left, top, right, bottom) of a picture, None for all of it -> uint8 (3, size, size).

    sides: (width, height) that the picture must have; annotation: the file that says so."""
    width, height = sides
    left, top, right, bottom = region or (0, 0, width, height)
    (wide, high), _, _ = letterbox_view((left, top, right, bottom), size)
    least = (math.ceil(width * wide / (right - left)), math.ceil(height * high / (bottom - top)))
    with _listed_in(annotation):
        picture = decode_picture(path, least)
    if picture.sides != (width, height):
        raise DataError(f"{path}: {picture.sides[0]} x {picture.sides[1]} pixels, but {annotation} is for "
                        f"{width} x {height}; take both from the same release")
    x, y, end_x, end_y = picture.box
    region = (x + left * (end_x - x) / width, y + top * (end_y - y) / height,
              x + right * (end_x - x) / width, y + bottom * (end_y - y) / height)
    return letterbox(picture.image, region, size)


MAX_CROPS_BYTES = 2 << 30  # a set whose crops fit is kept in memory; a larger one is decoded at every use


class _CropsOnDisk:
    """Batched indexing over crops of pictures, each decoded when it is first asked for.

    Layouts, splits and traps of the datasets: docs/datasets.md. root may be the directory named there, or
    hold it. All that grows with N is an array: SURREAL has millions of samples. A file that is not as
    described is named."""

    def __init__(self, root, split, size, folder=""):
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r}: must be 'train', 'val' or 'test'")
        inner = Path(root, folder)
        self.root = inner if inner.is_dir() else Path(root)
        self.split = split
        self.size = size

    def _fill(self, annotation, names, sides, keypoints, visible):
        """names: (N,) bytes, the pictures below root; sides: (N, 2), their width and height in pixels, or
        None where `_decode` needs none; annotation: the file that lists them, for messages."""
        if len(names) == 0:
            raise DataError(f"{annotation}: split {self.split!r} is empty; is the dataset complete?")
        self.keypoints = keypoints
        self.visible = visible
        self._annotation = annotation
        self._names = names
        self._sides = sides
        fits = len(names) * 3 * self.size ** 2 <= MAX_CROPS_BYTES
        self._crop = functools.cache(self._decode) if fits else self._decode

    def __len__(self):
        return len(self.keypoints)

    def names(self, indices):
        """Names of samples: a 1-D list, array or tensor of indices -> list of str."""
        return [self._names[i].decode() for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]

    def __getitem__(self, indices):
        """1-D indices -> images (B, 3, S, S) uint8, keypoints (B, K, 2) and visible (B, K) float32."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = torch.zeros(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for row, i in enumerate(indices.tolist()):
            images[row] = self._crop(i)
        return images, self.keypoints[indices], self.visible[indices]

    def _decode(self, i):
        path = self.root / self._names[i].decode()
        return _read_crop(path, self.size, self._sides[i].tolist(), None, self._annotation)

    def check_files(self, progress=lambda *_: None):
        """Decode every picture once and keep none, so that a missing or damaged one is named at once.

        It takes one or two ms per picture: made for validation and test splits (a few thousand), the latter
        of which is read when the training is over, not for the millions of a training split.
        progress(done, total)."""
        jobs = (functools.partial(self._decode, i) for i in range(len(self)))
        for done, _ in enumerate(prefetch(jobs, workers=4)):
            progress(done + 1, len(self))


def find_annotation(root, relative):
    """The path of an annotation file below root. FileNotFoundError says which directory to give."""
    if not (root / relative).is_file():
        raise FileNotFoundError(f"{root / relative}: missing; give the directory that holds {relative}")
    return root / relative


# --- SURREAL, prepared as square crops and annotated in JSON files, as Human3.6M and Hand-3D-Studio are ----

INDEX_CACHE_BYTES = 64 << 20  # a larger annotation file leaves its arrays beside it for the next time


class Annotations(NamedTuple):
    """What the loaders need of n samples."""
    names: np.ndarray  # (n,) bytes, the pictures below the dataset's root
    keypoints: np.ndarray  # (n, K, 2) float32 pixels of the pictures
    sides: np.ndarray  # (n,) uint16, the side of each square picture in pixels


def is_safe_path(name):
    """Whether a name from an annotation file is a path below the directory that it is joined to."""
    plain = isinstance(name, str) and re.fullmatch("[^/\0][^\0]{,254}", name)
    return bool(plain) and ".." not in name.split("/")


def read_json_list(file):
    """The entries of a JSON list, parsed one at a time: millions do not stay as Python objects. ValueError
    where the file is something else."""
    text = Path(file).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\r\n]*")
    at = space.match(text).end()
    if re.compile(r"\[\s*\]\s*").fullmatch(text, at):
        return
    before = "["
    while text.startswith(before, at):
        at = space.match(text, at + 1).end()
        entry, at = decode(text, at)
        yield entry
        at = space.match(text, at).end()
        before = ","
    if text[at:].rstrip() != "]":
        raise ValueError("not a JSON list of samples")


def _read_annotations(file, prefix, total, joints, keep):
    """A JSON list of {name, keypoint2d [total, 2], ...} -> Annotations.

    prefix: put before each name; joints: the keypoints to take; keep(entry): whether the sample counts. A
    side is the entry's `size`, or 0 where it has none."""
    names = bytearray()
    keypoints = array.array("f")
    sides = array.array("H")
    count = 0
    try:
        for entry in read_json_list(file):
            count += 1
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            if not keep(entry):
                continue
            name = entry.get("name")
            if not is_safe_path(name):
                raise ValueError(f"name {str(name)[:60]!r} is not a path below the images")
            side = entry.get("size", 0)
            if type(side) not in (int, float) or side != int(side) or not 0 <= side < 1 << 16:
                raise ValueError(f"size {side!r} is not a number of pixels")
            points = np.array(entry.get("keypoint2d"), np.float64)
            if points.shape != (total, 2) or not (np.abs(points) < 1e6).all():  # NaN compares as False
                raise ValueError(f"keypoint2d of {name!r} is not {total} pairs of coordinates")
            names.extend((prefix + name).encode() + b"\0")
            keypoints.frombytes(points[joints].astype(np.float32).tobytes())
            sides.append(int(side))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{file}: at entry {count}: {error}; expected a list of {{name, keypoint2d "
                        f"[{total}, 2], ...}}; fetch or prepare it again") from error
    return Annotations(np.array(bytes(names).split(b"\0")[:-1], "S"),
                       np.array(keypoints, np.float32).reshape(-1, len(joints), 2),
                       np.array(sides, np.uint16))


def _load_annotations(root, path, prefix, total, joints, keep=lambda _: True, side=0,
                      progress=lambda *_: None):
    """`_read_annotations`, or what an earlier call left beside a large file, with all sides known.

    side: of all pictures, or 0: as the entry says, or else the header of the image."""
    file = find_annotation(root, path)
    status = file.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns])
    large = status.st_size > INDEX_CACHE_BYTES
    index = file.with_name(f"{file.stem}.{zlib.crc32(bytes(joints)):08x}.npz")
    if large and index.is_file():
        try:
            with open(index, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                if np.array_equal(stored["stamp"], stamp):
                    return Annotations(stored["names"], stored["keypoints"], stored["sides"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: made again below
    found = _read_annotations(file, prefix, total, list(joints), keep)
    if side:
        found.sides[:] = side
    unknown = np.flatnonzero(found.sides == 0)
    with _listed_in(file):
        jobs = (functools.partial(picture_sides, root / found.names[i].decode()) for i in unknown)
        for n, (width, _) in enumerate(prefetch(jobs, workers=16)):  # it is the disk that takes time
            found.sides[unknown[n]] = width
            progress(n + 1, len(unknown))
    if large and os.access(file.parent, os.W_OK):
        with replacing(index) as stream:
            np.savez(stream, stamp=stamp, **found._asdict())
    return found


def _published_order(n):
    """0 ... n - 1 in the published order (`random.seed(42)`), in two: what is held out, and the others."""
    order = array.array("q", range(n))
    random.Random(42).shuffle(order)
    held_out = min(int(n * 0.2), 3200)
    return np.split(np.array(order), [held_out])


class _SquareCrops(_CropsOnDisk):
    def _take(self, annotation, parts, order):
        """Take the samples `order` of the concatenated `parts`, each of `_load_annotations`."""
        names = np.concatenate([part.names for part in parts])[order]
        keypoints = np.concatenate([part.keypoints for part in parts])[order]
        sides = np.concatenate([part.sides for part in parts])[order]
        scale = (self.size / sides).astype(np.float32)[:, None, None]
        keypoints = torch.from_numpy((keypoints + 0.5) * scale - 0.5)  # pixel i covers i - 1/2 ... i + 1/2
        visible = torch.ones(1, 1).expand(len(names), len(self.skeleton))  # one number, seen N x K times
        self._fill(annotation, names, np.stack([sides, sides], 1), keypoints, visible)


class SURREAL(_SquareCrops):
    """SURREAL, prepared: `{train,val}/run{0,1,2}.json` and square crops of synthetic people (BODY16).

    split: of the runs of `train`, shuffled with seed 42, the first min(20 %, 3200) are 'test', the others
    'train'; 'val' is the runs of `val`. shoulders: collar joints ('published') or 'true'. Published code
    fills keypoints 12 and 13 with SMPL's collar joints, not with its shoulders. progress(done, total):
    called while image headers are read, where entries have no `size`."""
    skeleton = BODY16
    SHOULDERS = {"published": (13, 14), "true": (16, 17)}  # of SMPL's 24 joints

    def __init__(self, root, split="train", size=256, shoulders="published", progress=lambda *_: None):
        super().__init__(root, split, size)
        folder = "val" if split == "val" else "train"
        joints = (7, 4, 1, 2, 5, 8, 0, 9, 12, 15, 20, 18, *self.SHOULDERS[shoulders], 19, 21)
        parts = []
        for run in range(3):
            parts.append(_load_annotations(self.root, f"{folder}/run{run}.json", f"{folder}/run{run}/", 24,
                                           joints, progress=progress))
            if len(parts[-1].names) == 0:
                raise DataError(f"{self.root / folder}/run{run}.json: lists no image; prepare it again")
        held_out, others = _published_order(sum(len(part.names) for part in parts))
        order = {"train": others, "test": held_out, "val": np.concatenate([held_out, others])}[split]
        self._take(self.root / folder / "run*.json", parts, order)


# --- LSP and LSP Extended, annotated in MATLAB files (level 5, what MATLAB writes with -v6 and -v7) --------

MAX_MAT_BYTES = 1 << 28  # of one variable: seventy times the largest annotation that the loaders read
_MAT_STORAGE = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_CLASS = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_MAT_MATRIX = 14
_MAT_COMPRESSED = 15
_MAT_COMPLEX = 8  # a bit of the flags


def read_mat(path, name):
    """One real numeric variable of a little-endian MATLAB level-5 file, plain or compressed. The file is
    untrusted: a size is checked against MAX_MAT_BYTES and the bytes that are there."""
    try:
        return _read_mat(Path(path).read_bytes(), name)
    except (ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: {error}") from error


def _read_mat(data, name):
    if data.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise DataError("a MATLAB v7.3 (HDF5) file; load it in MATLAB and save it with save(..., '-v7')")
    if data[124:128] != b"\x00\x01IM":
        raise DataError("not a little-endian MATLAB level-5 file; save it with MATLAB's save(..., '-v7')")
    start = 128
    present = []
    while start < len(data):
        kind, nbytes = struct.unpack_from("<II", data, start)
        body = data[start + 8:start + 8 + nbytes]
        start += 8 + nbytes
        inflate = None
        if kind == _MAT_COMPRESSED:  # inflate its header first
            inflate = zlib.decompressobj()
            body = inflate.decompress(body, 4096)
            kind, nbytes = struct.unpack_from("<II", body)
            body = body[8:]
        if kind != _MAT_MATRIX:
            raise DataError(f"an element of type {kind}, not a variable: the file is damaged")
        flags, _, at = _mat_element(body, 0)
        dimensions, _, at = _mat_element(body, at)
        letters, _, at = _mat_element(body, at)
        present.append(letters.decode("latin-1"))
        if present[-1] == name:
            break
    else:
        raise DataError(f"no variable {name!r}; the file holds {', '.join(present[:20]) or 'none'}")

    matrix_class = flags[0] if len(flags) == 8 else None
    if matrix_class not in _MAT_CLASS or flags[1] & _MAT_COMPLEX or not 8 <= len(dimensions) <= 128:
        raise DataError(f"variable {name!r} (class {matrix_class}) is not a real numeric array")
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    # An empty axis counts as one, or an empty array could claim billions of rows.
    claimed = 8 * math.prod(max(n, 1) for n in shape)
    if min(shape) < 0 or max(nbytes, claimed) > MAX_MAT_BYTES:
        raise DataError(f"variable {name!r} of shape {shape} is beyond the limit of {MAX_MAT_BYTES} bytes")
    if inflate is not None:  # to one byte more than declared, so that zlib verifies its checksum
        body += inflate.decompress(inflate.unconsumed_tail, max(nbytes - len(body), 0) + 1)
        if not inflate.eof or len(body) != nbytes:
            raise DataError(f"variable {name!r} does not inflate to the {nbytes} bytes that it declares")
    values, kind, _ = _mat_element(body, at)
    storage = np.dtype(_MAT_STORAGE.get(kind, "V1"))
    if storage.kind == "V" or len(values) != math.prod(shape) * storage.itemsize:
        raise DataError(f"variable {name!r}: {len(values)} bytes of type {kind} do not fill shape {shape}")
    # MATLAB stores values in the smallest type that holds them, in column-major order.
    values = np.frombuffer(values, storage).reshape(shape, order="F")
    return values.astype(_MAT_CLASS[matrix_class], order="C")


def _mat_element(data, at):
    """The element at byte `at` of `data` -> (its bytes, type, where the next one begins)."""
    kind, nbytes = struct.unpack_from("<II", data, at)
    if kind >> 16:  # small: size and type share the first word, up to four bytes follow at once
        nbytes = kind >> 16
        kind = kind & 0xFFFF
        begin = at + 4
        following = at + 8
    else:
        begin = at + 8
        following = begin + nbytes + -nbytes % 8
    if begin + nbytes > min(following, len(data)):
        raise DataError(f"truncated: an element declares {nbytes} bytes, more than there are")
    return data[begin:begin + nbytes], kind, following


class LSP(_CropsOnDisk):
    """Leeds Sports Pose and LSP Extended: `joints.mat` and `images/`, 14 joints of BODY16.

    As published, an occluded joint of LSP keeps its position but has visible = 0: it is neither trained on
    nor scored. An unlabelled joint, pelvis and thorax have visible = 0, too, and lie at (0, 0).
    transductive: True makes every split the whole set, as published for SURREAL -> LSP. False: LSP is half
    'train', half 'test'; LSP Extended 80 % 'train', 5 % 'val', 15 % 'test'. None: True for LSP alone."""
    skeleton = BODY16
    SLOTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]  # keypoint of each of the 14 joints
    HALVES = {"train": (0, 50), "test": (50, 100)}  # per cent
    EXTENDED = {"train": (0, 80), "val": (80, 85), "test": (85, 100)}

    def __init__(self, root, split="train", size=256, transductive=None):
        super().__init__(root, split, size)
        file = find_annotation(self.root, "joints.mat")
        self.root = self.root / "images"
        extended, positions, labelled = _read_lsp_joints(file)
        names = _lsp_images(self.root, len(positions), extended, file)
        parts = self.EXTENDED if extended else self.HALVES
        if transductive is None:
            transductive = not extended
        if transductive:
            parts = {split: (0, 100)}
        if split not in parts:
            raise DataError("split 'val': LSP has only 'train' and 'test'; or choose transductive=True")
        begin, end = (len(names) * percent // 100 for percent in parts[split])
        if begin == end:
            raise DataError(f"{file}: {len(names)} pictures leave none for {split!r}; give 20 or more")
        names = names[begin:end]
        positions = positions[begin:end]
        sides = np.zeros((len(names), 2), np.int64)
        keypoints = torch.zeros(len(names), 16, 2)
        visible = torch.zeros(len(names), 16)
        visible[:, self.SLOTS] = torch.from_numpy(labelled[begin:end]).float()
        for i, name in enumerate(names):
            with _listed_in(file):
                sides[i] = picture_sides(self.root / name.decode())
            _, _, view = letterbox_view((0, 0, *sides[i].tolist()), size)
            placed = positions[i] @ view[:, :2].T + view[:, 2]
            keypoints[i, self.SLOTS] = torch.from_numpy(placed).float()
        if extended:
            keypoints[visible == 0] = 0
        self._fill(file, names, sides, keypoints, visible)


def _read_lsp_joints(file):
    """joints.mat -> (extended, positions (N, 14, 2) in pixels of the photographs, visible (N, 14) bool). LSP
    is (3, 14, N), the third value 1 where occluded; LSP Extended (14, 3, N), and 1 where labelled."""
    joints = np.atleast_3d(read_mat(file, "joints")).astype(np.float64)  # MATLAB drops a last axis of one
    if joints.ndim != 3 or joints.shape[:2] not in ((3, 14), (14, 3)) or joints.shape[2] == 0:
        raise DataError(f"{file}: 'joints' has shape {joints.shape}, expected (3, 14, N) or (14, 3, N)")
    extended = joints.shape[0] == 14
    joints = joints.transpose(2, 0, 1) if extended else joints.transpose(2, 1, 0)
    positions = joints[..., :2]
    flag = joints[..., 2]
    if not np.isin(flag, (0, 1)).all():
        raise DataError(f"{file}: the third value of a joint must be 0 or 1")
    visible = flag == extended
    has_place = visible | (not extended)  # an occluded joint of LSP has one
    bad = has_place & ~(np.abs(positions) < 1e6).all(-1)  # NaN counts as bad, too
    if bad.any():
        raise DataError(f"{file}: coordinates out of range in image {np.argwhere(bad)[0, 0] + 1}")
    return extended, positions, visible


def _lsp_images(folder, n, extended, annotation):
    """Names of the n images of joints.mat, (n,) bytes; none may be missing or left over."""
    digits = 5 if extended else 4
    names = [f"im{i + 1:0{digits}d}.jpg" for i in range(n)]
    found = {name for name in os.listdir(folder) if re.fullmatch(r"im\d+\.jpg", name)}
    for wrong in sorted(found.symmetric_difference(names)):
        release = (f"{annotation} is for {names[0]} ... {names[-1]}, the directory holds {len(found)} "
                   "images. Take both from the same release")
        if wrong in names:
            raise FileNotFoundError(f"{folder / wrong}: missing; {release}")
        raise DataError(f"{folder / wrong}: has no annotation; {release}")
    return np.array(names, "S")


# --- Human3.6M ---------------------------------------------------------------------------------------------

class Human36M(_SquareCrops):
    """Human3.6M, prepared: `annotations/keypoints2d_{subject}.json` and `crop_images/` of actors (BODY16).

    split: 'train' is subjects 1, 5, 6, 7, 8; 'test' is 3,200 samples of subjects 9 and 11, drawn with seed
    42 and with repeats, as published; 'val', not published, is 3,200 of the training samples, once."""
    skeleton = BODY16

    def __init__(self, root, split="train", size=256):
        super().__init__(root, split, size)
        parts = []
        for subject in (9, 11) if split == "test" else (1, 5, 6, 7, 8):
            parts.append(_load_annotations(self.root, f"annotations/keypoints2d_{subject}.json",
                                           "crop_images/", 16, range(16), side=512))
        order = range(sum(len(part.names) for part in parts))
        if split == "test" and len(order) > 0:
            order = random.Random(42).choices(order, k=3200)
        elif split == "val":
            order = random.Random(42).sample(order, min(3200, len(order)))
        self._take(self.root / "annotations", parts, np.array(order, np.int64))


# --- RHD, annotated in pickles -----------------------------------------------------------------------------

class _PickledDtype:
    """Stands in for numpy.dtype: number types alone, by their code."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>|=]?[biuf][1248]", str(code)):
            raise DataError(f"an array of type {str(code)[:40]!r}; only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands in for numpy.ndarray; built from the bytes that are there, so that no size is taken on trust."""
    array = None

    def fill(self, values, dtype, shape=(), order="C"):
        if isinstance(values, str):  # of Python 2
            values = values.encode("latin-1")
        self.array = np.frombuffer(values, dtype.dtype).reshape(shape, order=order)
        return self

    def __setstate__(self, state):
        _, shape, dtype, fortran, values = state
        self.fill(values, dtype, shape, "F" if fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Maps the names of a pickled NumPy array (2 renamed its core) to the stand-ins, refuses all others."""
    ADMITTED = {"numpy.ndarray": _PickledArray, "numpy.dtype": _PickledDtype,
                "multiarray._reconstruct": lambda *_: _PickledArray(),
                "multiarray.scalar": lambda dtype, values: _PickledArray().fill(values, dtype).array[()],
                "numeric._frombuffer": lambda *state: _PickledArray().fill(*state),
                "_codecs.encode": lambda text, _: text.encode("latin-1")}  # bytes, in old protocols

    def find_class(self, module, name):
        admitted = self.ADMITTED.get(re.sub(r"^numpy\._?core\.", "", f"{module}.{name}"))
        if admitted is None:
            raise DataError(f"asks for {module}.{name}, which no array or number needs. It may be hostile: "
                            "fetch it from the dataset's own site")
        return admitted


def read_array_pickle(path):
    """A pickle of nested dicts of NumPy arrays (read-only here), numbers and strings, Python 2's included.
    The file is untrusted: whatever else it names is refused, and nothing in it is executed."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.array if isinstance(value, _PickledArray) else value

    with open(path, "rb") as file:
        try:
            return plain(_ArrayUnpickler(file, encoding="latin-1").load())
        except Exception as error:  # damaged opcodes raise errors of any kind
            raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


class RenderedHandPose(_CropsOnDisk):
    """RHD, Rendered Hand Pose: synthetic hands, 21 keypoints (HAND21), all turned into left hands.

    A hand is a sample when its square box, 1.5 times the box of its keypoints, spans more than 64 pixels
    from its first to its last, more than 16 keypoints are visible, and the box of the other hand's keypoints
    covers less than 30 % of it. It is cropped to that box; a right hand is mirrored. Invisible keypoints keep
    their place. split: 'val' is every fifth sample of 'train', as published. left: (N,) bool, the hands not
    mirrored."""
    skeleton = HAND21
    SIDE = 320
    ROWS = [0, 4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17]  # from tip to base

    def __init__(self, root, split="train", size=256):
        super().__init__(root, split, size, "RHD_published_v2")
        part = "evaluation" if split == "test" else "training"
        file = find_annotation(self.root, f"{part}/anno_{part}.pickle")
        ids, hands = self._read(file)
        positions = hands[..., :2]  # (pictures, left or right hand, 21, 2)
        seen = hands[..., 2] > 0.5
        low = positions.min(2)
        high = positions.max(2)
        corner, side = square_box(low, high, (self.SIDE, self.SIDE))
        begin = np.maximum(corner, low[:, ::-1])  # of what the box shares with the other hand's
        end = np.minimum(corner + side[..., None], high[:, ::-1] + 1)
        covered = (end - begin).clip(min=0).prod(-1) / side.clip(min=1) ** 2
        picture, hand = np.nonzero((side - 1 > 64) & (seen.sum(-1) > 16) & (covered < 0.3))
        if split == "val":
            picture = picture[::5]
            hand = hand[::5]
        corner = corner[picture, hand]
        side = side[picture, hand, None]
        self._regions = np.concatenate([corner, corner + side], 1)
        self.left = torch.from_numpy(hand == 0)
        keypoints = (positions[picture, hand] - corner[:, None] + 0.5) * (size / side[..., None]) - 0.5
        keypoints = torch.from_numpy(keypoints).float()
        keypoints[~self.left, :, 0] = size - 1 - keypoints[~self.left, :, 0]
        visible = torch.from_numpy(seen[picture, hand]).float()
        names = [f"{part}/color/{ids[i]:05d}.png {('left', 'right')[h]}" for i, h in zip(picture, hand)]
        self._fill(file, np.array(names, "S"), None, keypoints, visible)

    def _decode(self, i):
        name = self._names[i].decode().split()[0]
        region = self._regions[i].tolist()
        crop = _read_crop(self.root / name, self.size, (self.SIDE, self.SIDE), region, self._annotation)
        return crop if self.left[i] else crop.flip(-1)

    def _read(self, file):
        """anno_*.pickle -> ids of the pictures [n], hands (n, 2, 21, 3): x, y, visible; left one first."""
        annotations = read_array_pickle(file)
        if not isinstance(annotations, dict) or not annotations:
            raise DataError(f"{file}: not a dict id -> {{uv_vis [42, 3], ...}}")
        ids = []
        hands = []
        for identity, entry in annotations.items():
            values = entry.get("uv_vis") if isinstance(entry, dict) else None
            numbered = isinstance(identity, (int, np.integer)) and 0 <= identity < 10 ** 9
            placed = isinstance(values, np.ndarray) and values.shape == (42, 3) and (abs(values) < 1e6).all()
            if not numbered or not placed:
                raise DataError(f"{file}: entry {str(identity)[:40]!r} is not the number of a picture -> "
                                "uv_vis, [42, 3] pixel coordinates")
            ids.append(int(identity))
            hands.append(values)
        hands = np.stack(hands).astype(np.float64)
        return ids, hands.reshape(-1, 2, 21, 3)[:, :, self.ROWS]


def square_box(low, high, sides):
    """The crops of the published protocol: square boxes around boxes of keypoints, moved into the picture.
    low, high: (..., 2) smallest and largest (x, y); sides: (width, height) of the picture. Returns corner
    (..., 2) and side (...), int64 pixels; side: 1.5 times the box's larger one, at most the picture's."""
    side = np.minimum(np.round(1.5 * (high - low).max(-1)), min(sides)).astype(np.int64)
    corner = np.round((low + high) / 2 - side[..., None] / 2).astype(np.int64)
    return np.clip(corner, 0, np.array(sides) - side[..., None]), side


# --- Hand-3D-Studio ----------------------------------------------------------------------------------------

class Hand3DStudio(_SquareCrops):
    """Hand-3D-Studio, prepared: `H3D_crop/annotation.json` and square crops of hands (HAND21).

    Only hands with `without_object` 1 count. split: shuffled with seed 42, the first min(20 %, 3200) are
    'test', the others 'train'; 'val' is as many again, the first of 'train', as published."""
    skeleton = HAND21

    def __init__(self, root, split="train", size=256):
        super().__init__(root, split, size, "H3D_crop")
        part = _load_annotations(self.root, "annotation.json", "", 21, range(21),
                                 keep=lambda entry: entry.get("without_object") in (1, "1"))
        held_out, others = _published_order(len(part.names))
        order = {"train": others, "test": held_out, "val": others[:len(held_out)]}[split]
        self._take(self.root / "annotation.json", [part], order)
