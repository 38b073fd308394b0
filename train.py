"""Train, evaluate, predict and compare: `python train.py` runs ACTUPose on the built-in benchmark.

    settings     one dataclass; the command line, the presets and config.json come from it
    data         which datasets a run uses, and in which order
    processes    what the processes of one run, if it has several, do together
    the step     one iteration of the method (Fig. 4 of the paper), assembled from actupose.py
    evaluation   the published scores
    a run        files and checkpoints, set-up, epochs, resume, result.json; where a step's time goes
    pictures     drawn with Pillow into figures/
    photographs  skeletons for any pictures
    compare      many runs -> one table
    main         the command line
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import difflib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps

import actupose
import data
import kernels
from data import (colour_jitter, compose_views, denormalise, hash_uniform, invert_view, map_keypoints, normalise,
                  random_affine_view, random_crop_view, render_heatmaps, warp)


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


class Damaged(UserError):
    """A checkpoint that is missing, cut short, changed or of another kind."""


class NotFinite(Exception):
    """A step whose loss is NaN or infinite. record: what `nonfinite.json` is to hold."""

    def __init__(self, record):
        super().__init__(record)
        self.record = record


class Stopped(BaseException):
    """A signal ended the run: one line, exit status 128 + the signal's number. No Exception: it may be raised anywhere."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


# ----------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------

# A method is the one loop with parts on or off; an ablation is ACTUPose with one setting changed.
METHODS = {
    "source-only": dict(supervise="source", adapt=False, curriculum="off", style="off", w_evalpose=0.0, w_cross=0.0),
    "udape": dict(curriculum="off", w_evalpose=0.0, w_cross=0.0),
    "udape+vae-hm": dict(curriculum="hardest", w_evalpose=0.0, w_cross=0.0),
    "actupose": dict(),
    "oracle": dict(supervise="target", adapt=False, curriculum="off", style="off", w_evalpose=0.0, w_cross=0.0),
}
ABLATIONS = {
    "no-curriculum": dict(curriculum="off"),
    "no-eq4": dict(rescoring="off"),
    "literal-eq4": dict(rescoring="literal"),
    "min-max": dict(scale="minmax"),
    "no-evalpose": dict(w_evalpose=0.0),
    "no-cross-domain": dict(w_cross=0.0),
    "no-style": dict(style="off"),
}


# torchvision's ResNets trained on ImageNet; the digits are the start of the file's SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth",
                  "resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}


# Rendered datasets: the domain of data.Mannequin.
RENDERED = {"mannequin": "source", "mannequin-wild": "target", "mannequin-photo": "photo"}
# Datasets on disk: their loaders.
SOURCES = {"surreal": data.SURREAL, "rhd": data.RenderedHandPose}
TARGETS = {"lsp": data.LSP, "human36m": data.Human36M, "h3d": data.Hand3DStudio}


def option(default, group, text, paper=None, choices=None):
    """A field of Settings with what --help says of it. paper: the value of the paper's preset, if another."""
    return field(default=default, metadata=dict(group=group, help=text, paper=paper, choices=choices))


@dataclass
class Settings:
    """Everything that decides a run's result. Defaults are the demo's; `paper` values the paper's (§4)."""
    method: str = option("actupose", "task", "which of the paper's rows to train", choices=tuple(METHODS))
    source: str = option("mannequin", "task", "labelled source domain; mannequin-wild is the built-in target with its labels, "
                         "mannequin-photo resembles photographs of sports", choices=(*RENDERED, *SOURCES))
    source_root: str = option("", "task", "directory of the source dataset, for sources on disk")
    target: str = option("mannequin-wild", "task", "unlabelled target domain", choices=("mannequin-wild", *TARGETS))
    target_root: str = option("", "task", "directory of the target dataset, for targets on disk")
    shoulders: str = option("published", "task", "shoulders of surreal: published (its collar joints, as all published "
                            "results have it) or true", choices=("published", "true"))
    source_count: int = option(6000, "task", "source training images that the built-in benchmark renders")
    target_count: int = option(2000, "task", "unlabelled target images that it renders")
    seed: int = option(0, "task", "seed of the data, initialisation, augmentation and every draw")
    cache: str = option("", "task", "directory for rendered images, safe to delete (default: render anew, ~20 s)")

    architecture: str = option("narrow", "network", "pose network", "resnet101", tuple(actupose.ARCHITECTURES))
    weights: str = option("", "network", "what the pose network starts from: imagenet (torchvision's published file, "
                          "fetched once), a file of torchvision's, RegDA's, UDAPE's or ours, or the directory of a run",
                          "imagenet")
    image_size: int = option(64, "network", "side of the input in pixels", 256)
    sigma: float = option(1.0, "network", "deviation of a target heatmap's Gaussian in cells", 2.0)
    subcell: bool = option(True, "network", "targets and decoding finer than a heatmap cell; off: the published "
                           "protocol, cells against cells", False)

    epochs: int = option(70, "schedule", "epochs in all")
    pretrain_epochs: int = option(40, "schedule", "epochs on the source before the teacher joins")
    iters_per_epoch: int = option(30, "schedule", "iterations an epoch", 500)
    batch_size: int = option(32, "schedule", "images of each domain in a batch, that of all processes together")
    accumulate: int = option(1, "schedule", "parts of a batch that are computed one after the other, for less memory; "
                             "BatchNorm, confidence mask and pairs are then those of a part")
    clip: float = option(0.0, "schedule", "longest gradient (2-norm) that the optimiser is given; 0: any")
    workers: int = option(0, "schedule", "threads that decode the batches to come (0: none)", 8)
    lr: float = option(1e-3, "schedule", "learning rate of Adam", 1e-4)
    lr_drops: str = option("45,60", "schedule", "epochs at which it drops")
    lr_factor: float = option(0.3, "schedule", "by what factor", 0.1)
    ema: float = option(0.99, "schedule", "decay of the teacher's moving average", 0.999)

    curriculum: str = option("active", "curriculum (§3.1)", "source samples of an epoch: active (Eq. 3-4), off (all), or "
                             "the hardest bins", choices=("active", "off", "hardest"))
    bins: int = option(25, "curriculum (§3.1)", "N_b, complexity bins")
    hard_bins: int = option(8, "curriculum (§3.1)", "bins that udape+vae-hm trains on")
    pace: float = option(6.0, "curriculum (§3.1)", "lambda of Eq. 3: how fast the peak moves to the hard bins", 2.0)
    spread: float = option(0.25, "curriculum (§3.1)", "sigma of Eq. 3")
    scale: str = option("rank", "curriculum (§3.1)", "s_j of Eq. 3: a bin's rank, or its min-max scaled mean score",
                        choices=("rank", "minmax"))
    rescoring: str = option("relative", "curriculum (§3.1)", "Eq. 4: relative to the mean confidence, literal "
                            "(cumulative), off", choices=("relative", "literal", "off"))
    vae_steps: int = option(1500, "curriculum (§3.1)", "training steps of the Pose-VAE", 20000)

    supervise: str = option("source", "adaptation (§3.2)", "whose labels are used: target makes the oracle",
                            choices=("source", "target"))
    adapt: bool = option(True, "adaptation (§3.2)", "teacher and consistency after the pretraining epochs")
    mask_ratio: float = option(0.5, "adaptation (§3.2)", "share of pseudo-labels, the most confident, that count")
    occlusion: float = option(0.5, "adaptation (§3.2)", "probability of hiding a confident keypoint from the student")
    style: str = option("small", "adaptation (§3.2)", "style transfer networks; small is trained on the run's own images",
                        "vgg", ("small", "vgg", "off"))
    style_weights: str = option("", "adaptation (§3.2)", "directory of vgg_normalised.pth, and of decoder.pth if it is "
                               "not to be trained on the two domains")
    style_prob: float = option(0.5, "adaptation (§3.2)", "probability of restyling a batch, each direction")
    style_iters: int = option(300, "adaptation (§3.2)", "iterations that train the style networks", 20000)

    rotation: float = option(60.0, "augmentation (§3.2)", "random rotation of the views, +- degrees (180 for hands)")
    shear: float = option(30.0, "augmentation (§3.2)", "random shear of the views, +- degrees")
    translate: float = option(0.05, "augmentation (§3.2)", "random translation, +- share of the side")
    zoom: str = option("0.6,1.3", "augmentation (§3.2)", "random scale of the views, low,high")
    crop: str = option("0.6,1.3", "augmentation (§3.2)", "area of the random resized crop, low,high")
    jitter: float = option(0.25, "augmentation (§3.2)", "strength of the colour jitter")

    w_udape: float = option(1.0, "losses (§3.3-3.4)", "w1 of Eq. 8")
    w_evalpose: float = option(0.1, "losses (§3.3-3.4)", "w2 of Eq. 8, EvalPose (Eq. 5)")
    w_cross: float = option(0.01, "losses (§3.3-3.4)", "w3 of Eq. 8, cross-domain features (Eq. 6)")
    beta: float = option(50.0, "losses (§3.3-3.4)", "sharpness of the soft-argmax")
    gamma: float = option(0.06, "losses (§3.3-3.4)", "Gamma, the threshold on Eq. 7 in radians")

    amp: str = option("off", "speed", "precision of the pose networks in training steps; losses and evaluation stay in "
                      "float32", choices=("off", "bf16"))
    sync_batchnorm: bool = option(True, "speed", "with several processes: BatchNorm over the whole batch, as with one; off: "
                                  "over each process's share, which is faster")
    compile: bool = option(False, "speed", "compile the pose networks (torch.compile): minutes at the start, worth it on a "
                           "GPU")
    deterministic: bool = option(False, "speed", "algorithms that give the same bits every time, slower; on a CPU they do "
                                 "anyway; what remains on a GPU is the gradient of warping heatmaps (grid_sample, from "
                                 "--pretrain-epochs on), which torch has in no such form and warns of")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"--{f.name.replace('_', '-')}: {value!r} is not one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name.replace('_', '-')}: must be a finite number, got {value}")
        positive = ("epochs", "iters_per_epoch", "batch_size", "lr", "sigma", "bins", "pace", "spread", "image_size",
                    "source_count", "target_count", "beta", "vae_steps", "style_iters")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')}: must be positive, got {getattr(self, name)}")
        if not 0 < self.hard_bins <= self.bins:
            raise UserError(f"--hard-bins: must be from 1 to --bins ({self.bins}), got {self.hard_bins}")
        for name in ("mask_ratio", "occlusion", "style_prob", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')}: must be from 0 to 1, got {getattr(self, name)}")
        if self.weights == "imagenet" and self.architecture not in IMAGENET_FILES:
            raise UserError(f"--weights imagenet: there are none for --architecture {self.architecture}; use one of "
                            f"{', '.join(IMAGENET_FILES)}")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UserError(f"--accumulate: must be a divisor of --batch-size ({self.batch_size}), got {self.accumulate}")
        if self.clip < 0:
            raise UserError(f"--clip: must be 0 or more, got {self.clip}")
        if self.workers < 0:
            raise UserError(f"--workers: must not be negative, got {self.workers}")
        if self.image_size % 32:
            raise UserError(f"--image-size: must be a multiple of 32, got {self.image_size}")
        if self.source == self.target:
            raise UserError(f"--source {self.source}: is the target too; give another --target, such as lsp")
        for role, name, root, loaders in (("source", self.source, self.source_root, SOURCES),
                                          ("target", self.target, self.target_root, TARGETS)):
            if name in loaders and not root:
                raise UserError(f"--{role} {name}: also give --{role}-root, the directory of the dataset")
            if root and name not in loaders:
                raise UserError(f"--{role}-root: {name} is rendered, not read; give --{role} "
                                f"{' or '.join(loaders)} with it, or leave it out")
        check_skeletons(self, skeleton_of(self.source), skeleton_of(self.target))
        self.numbers("lr_drops")
        for name in ("zoom", "crop"):
            low, high = self.numbers(name, 2)
            if not 0 < low <= high:
                raise UserError(f"--{name}: must be low,high with 0 < low <= high, got {getattr(self, name)}")
        if self.adapt and not 0 <= self.pretrain_epochs < self.epochs:
            raise UserError(f"--pretrain-epochs: must be from 0 to below --epochs ({self.epochs}), or the teacher never "
                            f"joins; got {self.pretrain_epochs}; give it too, {self.epochs * 4 // 7} would be in the demo's "
                            f"proportion")
        if self.seed < 0:
            raise UserError(f"--seed: must not be negative, got {self.seed}")
        if self.supervise == "target" and self.curriculum != "off":
            raise UserError("--supervise target: the curriculum ranks source samples; also give --curriculum off, or use "
                            "--method oracle")
        if self.style == "small" and self.style_weights:
            raise UserError(f"--style-weights: are VGG's, and --style is {self.style}; give --style vgg with them, or leave "
                            f"them out")
        if self.style == "vgg" and not self.style_weights:
            raise UserError("--style vgg: also give --style-weights, the directory of vgg_normalised.pth (and of decoder.pth, "
                            "or it is trained); or use --style small")

    def numbers(self, name, count=None):
        """A setting written as comma-separated numbers, as a list."""
        text = getattr(self, name)
        try:
            values = [float(part) for part in text.split(",") if part.strip()]
        except ValueError:
            values = None
        if values is None or (count and len(values) != count):
            raise UserError(f"--{name.replace('_', '-')}: must be {count or 'some'} numbers with commas, got {text!r}")
        return values


def skeleton_of(name):
    """The skeleton of a --source or --target; None where its class does not say."""
    return getattr({**SOURCES, **TARGETS}.get(name, data.Mannequin), "skeleton", None)


def check_skeletons(settings, source, target):
    """UserError where two skeletons, those that are known, do not have the same keypoints."""
    if source and target and source.names != target.names:
        raise UserError(f"--source {settings.source} --target {settings.target}: their keypoints differ ({source.names[0]}, ..., "
                        f"{len(source)} in all, and {target.names[0]}, ..., {len(target)}); bodies and hands do not go together")


def make_settings(preset="demo", **given):
    """Settings of a preset, then what the method changes, then what was given (the later wins)."""
    values = {}
    if preset == "paper":
        values = {f.name: f.metadata["paper"] for f in dataclasses.fields(Settings) if f.metadata["paper"] is not None}
    method = given.get("method", "actupose")
    if method not in METHODS:
        raise UserError(f"--method: unknown {method!r}; one of {', '.join(METHODS)}")
    if skeleton_of(given.get("source")) is data.HAND21:
        values["rotation"] = 180.0                         # hands come in every direction, as in the base method
    return Settings(**{**values, **METHODS[method], **given})


# ----------------------------------------------------------------------------------------------------------
# Data of a run
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Domains:
    """The datasets of a run: labelled source, unlabelled target, validation for choices, test for the table."""
    source: object
    target: object
    val: object
    test: object


def open_domains(settings):
    """The datasets that the settings name; images are rendered or decoded when first used."""
    size, cache = settings.image_size, settings.cache or None

    def mannequin(domain, split, count):
        return data.Mannequin(domain, split, size, count, seed=settings.seed, cache=cache,
                              progress=Progress(f"rendering {domain} {split}"))

    def on_disk(role, loader, root, split, **options):
        try:
            return loader(root, split, size, **options)
        except FileNotFoundError as e:
            raise UserError(f"--{role}-root: {e}") from None

    if settings.source in RENDERED:
        source = mannequin(RENDERED[settings.source], "train", settings.source_count)
    else:
        options = {}
        if settings.source == "surreal":
            options = dict(shoulders=settings.shoulders, progress=Progress("reading surreal"))
        source = on_disk("source", SOURCES[settings.source], settings.source_root, "train", **options)
    if settings.target == "mannequin-wild":
        target, val, test = (mannequin("target", split, count)
                             for split, count in (("train", settings.target_count), ("val", None), ("test", None)))
    else:
        target, val, test = (on_disk("target", TARGETS[settings.target], settings.target_root, split)
                             for split in ("train", "val", "test"))
    for role, name, datasets in (("source", settings.source, [source]), ("target", settings.target, [target, val, test])):
        for dataset in datasets if name in {**SOURCES, **TARGETS} else ():
            data.check_dataset(dataset, f"--{role} {name}")
    check_skeletons(settings, source.skeleton, target.skeleton)
    for name, dataset in (("source", source), ("target", target)):
        if len(dataset) < settings.batch_size:
            raise UserError(f"--batch-size: {settings.batch_size} is more than the {len(dataset)} images of the {name} "
                            f"training set; use a smaller batch")
    return Domains(source, target, val, test)


class Shuffler:
    """Endless batches of positions 0 ... n-1, each pass in a new random order: a function of (seed, step) alone."""

    def __init__(self, seed, n):
        self.seed, self.n, self.passes = seed, n, {}

    def _order(self, i):
        if i not in self.passes:
            self.passes = {j: order for j, order in self.passes.items() if j == i - 1}     # a batch spans two at most
            self.passes[i] = np.random.default_rng((self.seed, i)).permutation(self.n)
        return self.passes[i]

    def batch(self, batch_size, step):
        """The `step`-th batch of `batch_size` <= n positions."""
        start = step * batch_size
        i, at = divmod(start, self.n)
        first = self._order(i)[at:at + batch_size]
        if len(first) == batch_size:
            return first
        return np.concatenate([first, self._order(i + 1)[:batch_size - len(first)]])


# ----------------------------------------------------------------------------------------------------------
# Processes: `torchrun --nproc-per-node N train.py ...` starts this program N times
#
# Each process draws the whole batch (a function of seed and step), computes its share of it and averages gradients
# with the others. Every term of Eq. 8 is a mean over samples, so that this is the gradient of the whole batch; what
# looks at several samples at once (the mask's median, the pairs of Eq. 6, BatchNorm) is gathered. The exception is style
# transfer, which pairs images within a share. All without effect in a single process.
# ----------------------------------------------------------------------------------------------------------


def started_by_torchrun():
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


@contextmanager
def joined(device):
    """Within: connected with the other processes that torchrun started, if it did, by NCCL on GPUs and gloo on CPUs.

    A connection that breaks, as it does when another process ends, is a UserError. After an error it is left as it is:
    closing it would wait for the others, and they may wait for this one. `main` then ends the process at once.
    """
    if not started_by_torchrun():
        yield
        return
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as e:
        if isinstance(e, dist.DistError) or re.search("gloo|NCCL|onnection", str(e)):
            raise UserError(f"the connection with the other processes broke ({str(e).splitlines()[0][:100]}); one of them has "
                            f"ended, its message says why") from e
        raise


def processes():
    """How many processes take part in this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is; 0 writes all files."""
    return dist.get_rank() if processes() > 1 else 0


def said_before(message):
    """Whether another process has said this. They may not be joined yet, or no more: torchrun itself keeps the record."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        record = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                               timeout=datetime.timedelta(seconds=10))
        return record.add(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {message}", 1) > 1
    except (RuntimeError, dist.DistError):                        # torchrun is gone
        return False


def share(rows):
    """This process's rows of what all processes hold alike; `processes()` divides their number."""
    count = len(rows) // processes()
    return rows[rank() * count:(rank() + 1) * count]


def gather(rows):
    """The inverse of `share`: the rows (N, ...) of every process, by rank -> (N * processes(), ...). No gradient."""
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_of_processes(values):
    """Scalars by name, averaged over the processes."""
    if processes() == 1:
        return values
    stacked = gather(torch.stack([value.float() for value in values.values()])[None]).mean(0)
    return dict(zip(values, stacked))


def any_process(condition, device):
    """Whether the condition holds in any process."""
    if processes() == 1:
        return condition                                          # without a look at the GPU
    return bool(gather(torch.tensor([bool(condition)], dtype=torch.float32, device=device)).any())


def agree(*tensors):
    """Give all processes the values of process 0, in place: what each has computed may differ in the last bits."""
    if processes() > 1:
        for tensor in tensors:
            there = tensor.cuda() if dist.get_backend() == "nccl" else tensor
            dist.broadcast(there, 0)
            tensor.copy_(there)


class SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        return SumOfProcesses.forward(ctx, gradient)


class SyncBatchNorm(torch.nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, all of one size; on CPUs too, where torch has none.

    Same parameters and buffers as BatchNorm2d, so that a network changes over by its modules' class alone.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        moments = torch.stack([x.mean((0, 2, 3), dtype=torch.float32), (x.float() ** 2).mean((0, 2, 3))])
        mean, square = SumOfProcesses.apply(moments) / processes()
        variance = (square - mean ** 2).clamp(min=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * processes()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)   # bf16 stays bf16


# ----------------------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------------------

# Streams of random numbers of one step, so that they stay apart.
MIN_TRIPLETS = inspect.signature(actupose.mine_pairs).parameters["min_triplets"].default      # that two poses must share
SOURCE_STREAM, TARGET_STREAM, TEACHER_STREAM, STREAMS = 0, 1, 2, 3


class Stopwatch:
    """Seconds that each part of a step takes, for `profile`; the parts are named ranges in torch's trace, too.

    On a GPU each change of part waits for it, so that a part's time is its own: the sum is more than an undisturbed step.
    """

    def __init__(self, device):
        self.device, self.part, self.seconds = device, None, Counter()
        self.outputs = []                                         # of the student, where its backward pass begins

    def turn_to(self, part):
        """The time from now on is that of `part`; None stops."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self.since
            self.range.__exit__(None, None, None)
        self.part, self.since = part, now
        if part is not None:
            self.range = torch.profiler.record_function(part)
            self.range.__enter__()


def _call(network, images):
    return network(images)


class Trainer:
    """Networks, optimiser and one training step, without any loop over samples or keypoints."""

    def __init__(self, settings, skeleton, style_transfer, device):
        self.settings, self.skeleton, self.device = settings, skeleton, device
        torch.manual_seed(settings.seed)
        self.student = actupose.PoseResNet(settings.architecture, len(skeleton)).to(device)
        if settings.image_size % self.student.stride:
            raise UserError(f"--image-size: must be a multiple of the heatmap's stride {self.student.stride}")
        # A function of the network, not the network, is compiled: its parameters keep their names in checkpoints.
        self.call = torch.compile(_call) if settings.compile else _call
        self.student.to(memory_format=torch.channels_last)
        self.replica = None                            # of the student in each process, which averages gradients
        if processes() > 1:
            if settings.sync_batchnorm:
                for module in self.student.modules():
                    if type(module) is torch.nn.BatchNorm2d:
                        module.__class__ = SyncBatchNorm
            # Buffers stay each process's own: synchronised they are equal, else process 0's are those that are kept.
            replicate = torch.nn.parallel.DistributedDataParallel
            synchronise = "forward_sync_buffers"                  # torch 2.12's name for broadcast_buffers
            if synchronise not in inspect.signature(replicate).parameters:
                synchronise = "broadcast_buffers"
            self.replica = replicate(self.student, device_ids=[device] if device.type == "cuda" else None,
                                     **{synchronise: False})
        self.teacher = None
        self.style_transfer = style_transfer
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=settings.lr, fused=device.type == "cuda")
        self.stride = self.student.stride
        self.cells = settings.image_size // self.stride
        # Decision: the terms of Eq. 8 are sums over the body, averaged over samples: heatmap errors are summed over
        # keypoints and cells, as Eq. 5 is over limbs. Their plain mean is about 1e-3 and would drown under w2 = 0.1.
        self.summed = len(skeleton) * self.cells ** 2
        self.limbs = torch.tensor(skeleton.limbs, device=device)
        self.triplets = torch.tensor(skeleton.triplets, device=device)
        self.zoom, self.crop = settings.numbers("zoom", 2), settings.numbers("crop", 2)
        self.watch = None                                         # a Stopwatch in `profile`

    def now(self, part):
        """From here on the time goes to `part` of the step; nothing but in `profile`."""
        if self.watch is not None:
            self.watch.turn_to(part)

    @property
    def uses_target(self):
        """Whether a step takes target images: for their style, or for the teacher."""
        return self.style_transfer is not None or self.teacher is not None

    def learning_rate(self, epoch):
        """Set and return the epoch's learning rate: --lr, times --lr-factor at each of --lr-drops."""
        s = self.settings
        lr = s.lr * s.lr_factor ** sum(epoch >= drop for drop in s.numbers("lr_drops"))
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    def affine(self, u):
        """A random view from uniform numbers (B, 5)."""
        s = self.settings
        return random_affine_view(u, s.image_size, s.rotation, s.shear, s.translate, self.zoom)

    def restyle(self, content, style, u):
        """With probability --style-prob, the content batch in the style batch's look, strength alpha ~ U(0, 1)."""
        if self.style_transfer is None or self.coin.random() >= self.settings.style_prob:
            return content
        self.now("style")
        with torch.no_grad():
            return self.style_transfer(content, style.roll(1, 0), u)

    def forward(self, network, images):
        """Heatmaps and features of a pose network in a training step, float32 whatever --amp says of its inside."""
        self.now("student" if network is self.student else "teacher")
        amp = torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp == "bf16" else nullcontext()
        with amp:
            heatmaps, features = self.call(self.replica if self.replica and network is self.student else network, images)
        if self.watch is not None and network is self.student:
            self.watch.outputs += [heatmaps, features]
        self.now("losses")
        return heatmaps.float(), features.float()

    def backward(self, loss):
        """loss.backward(); in `profile` in two parts, down to the student's outputs and through the student."""
        if self.watch is None:
            loss.backward()
            return
        self.now("losses, backward")
        outputs, self.watch.outputs = self.watch.outputs, []
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        self.now("student, backward")
        used = [(output, gradient) for output, gradient in zip(outputs, gradients) if gradient is not None]
        torch.autograd.backward(*zip(*used))

    def random(self, indices, stream, step):
        """40 uniform numbers for each sample of a step: (B, 40), a function of (seed, sample, step)."""
        return hash_uniform(self.settings.seed, indices, 40, stream=step * STREAMS + stream + 1000)

    def labelled_view(self, batch, step):
        """Augmented images of a labelled batch and what belongs to them.

        batch: (indices (B,), uint8 images (B, 3, S, S), keypoints (B, K, 2) pixels, visible (B, K)). Returns images
        (B, 3, S, S), heatmaps (B, K, h, h), weight (B, K), keypoints (B, K, 2) in pixels of the view, the view
        (B, 2, 3), and the samples' uniform numbers (B, 40).
        """
        s = self.settings
        indices, images, keypoints, visible = (t.to(self.device, non_blocking=True) for t in batch)
        u = self.random(indices, SOURCE_STREAM, step)
        view = compose_views(self.affine(u[:, 3:8]), random_crop_view(u[:, :3], s.image_size, self.crop))
        images = colour_jitter(warp(normalise(images), view), u[:, 8:11], s.jitter)
        keypoints = map_keypoints(keypoints, view)
        heatmaps, weight = render_heatmaps(keypoints, visible, self.cells, self.stride, s.sigma, s.subcell)
        return images, heatmaps, weight, keypoints, view, u

    def supervised(self, batch, step, target_images=None):
        """L_mse on labelled images, and what the other losses need. target_images: whose style may be taken on."""
        s = self.settings
        images, heatmaps, weight, keypoints, view, u = self.labelled_view(batch, step)
        student_images = images if target_images is None else self.restyle(images, target_images, u[:, 11])
        predicted, features = self.forward(self.student, student_images)
        loss = actupose.heatmap_mse(predicted, heatmaps, weight)
        # Eq. 4 wants the mean confidence of a sample; keypoints that the view cut off do not count.
        cells, confidence, mean_confidence = kernels.heatmap_argmax_mean(predicted, weight)
        if s.subcell:
            cells = cells + actupose.subcell_offset(predicted.detach(), cells, confidence)
        # Poses are compared (Eq. 7) as they stand in the image: a sheared view has other angles.
        pose = map_keypoints(cells * self.stride, invert_view(view))
        return dict(images=images, predicted=predicted, features=features, loss=loss, weight=weight, pose=pose,
                    keypoints=keypoints, confidence=mean_confidence)

    def step(self, step, source_batch, target_batch):
        """One iteration. Batches: (indices, uint8 images, keypoints, visible); the target's labels are not used.

        Returns a dictionary of scalars on the device and the source samples' confidences (B,).
        """
        s = self.settings
        self.student.train()
        self.optimiser.zero_grad()
        parts = []
        for part in range(s.accumulate):
            batches = [batch and [t.chunk(s.accumulate)[part] for t in batch] for batch in (source_batch, target_batch)]
            last = part + 1 == s.accumulate                       # gradients are averaged over processes once
            with nullcontext() if last or processes() == 1 else self.replica.no_sync():
                loss, terms, confidence = self.losses(step, *batches)
                self.backward(loss / s.accumulate)
            parts.append((confidence, {name: value.detach() for name, value in terms.items()}))
        self.now("optimiser")
        if s.clip:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), s.clip, foreach=True)
        self.optimiser.step()
        if self.teacher is not None:
            actupose.update_teacher(self.teacher, self.student, s.ema)
        confidences, terms = zip(*parts)
        return {name: sum(t[name] for t in terms) / s.accumulate for name in terms[0]}, torch.cat(confidences)

    def losses(self, step, source_batch, target_batch):
        """Loss of a batch, or of this process's or this part's share of it: Eq. 8's L, its terms and the source samples'
        confidences (B,). Arguments as in `step`."""
        s = self.settings
        self.coin = np.random.default_rng((s.seed, 7, step))
        self.now("augmentation")
        indices = target_images = base = None
        if target_batch is not None:
            indices, target_images = (t.to(self.device, non_blocking=True) for t in target_batch[:2])
            target_images = normalise(target_images)
            u = self.random(indices, TARGET_STREAM, step)
            base = random_crop_view(u[:, :3], s.image_size, self.crop)   # the common frame of both views
        source = self.supervised(source_batch, step, None if base is None else warp(target_images, base))
        if self.teacher is None:
            loss, terms = s.w_udape * self.summed * source["loss"], dict(mse=self.summed * source["loss"])
        else:
            loss, terms = self.adapt(source, target_images, base, indices, u, step)
        terms.update(loss=loss, confidence=source["confidence"].mean())
        return loss, terms, source["confidence"]

    def adapt(self, source, target_images, base, indices, u, step):
        """The target's part of the step: teacher, pseudo-labels, consistency, Eq. 5-8. Returns loss and its terms."""
        s = self.settings
        self.now("augmentation")
        u_teacher = self.random(indices, TEACHER_STREAM, step)
        student_view, teacher_view = self.affine(u[:, 3:8]), self.affine(u_teacher[:, 3:8])

        with torch.no_grad():
            images = colour_jitter(warp(target_images, compose_views(teacher_view, base)), u_teacher[:, 8:11], s.jitter)
            images = self.restyle(images, source["images"], u_teacher[:, 11])
            self.teacher.train()                                         # batch statistics, as the base method
            maps, teacher_features = self.forward(self.teacher, images)
            maps = warp(maps, invert_view(teacher_view), self.stride)     # into the common frame
            pseudo, cells, confidence = actupose.rectify(maps, s.sigma, s.subcell)
            # Of all processes: the median is the batch's, and pairs are sought among all its targets, as with one process.
            all_cells, all_features = gather(cells), gather(teacher_features)
            all_sure = actupose.confidence_mask(gather(confidence), s.mask_ratio)
            sure = share(all_sure)
            # Decision: what the student's view does not show, it is not asked to predict.
            self.now("augmentation")
            in_view = map_keypoints(cells * self.stride, student_view)
            mask = sure & ((in_view >= 0) & (in_view <= s.image_size - 1)).all(-1)
            images = colour_jitter(warp(target_images, compose_views(student_view, base)), u[:, 8:11], s.jitter)
            images, _ = actupose.occlude_keypoints(images, in_view, confidence, u[:, 12:15 + len(self.skeleton)],
                                                   half=s.image_size * 10 / 256, probability=s.occlusion)

        predicted, _ = self.forward(self.student, images)
        predicted = warp(predicted, invert_view(student_view), self.stride)
        consistency = actupose.consistency_loss(predicted, pseudo, mask)
        udape = self.summed * (source["loss"] + consistency)

        evalpose = cross = torch.zeros((), device=self.device)
        if s.w_evalpose:
            on_source = kernels.soft_argmax(source["predicted"], s.beta)
            on_target = kernels.soft_argmax(predicted, s.beta)
            evalpose = (actupose.evalpose(on_source, source["keypoints"] / self.stride, self.limbs, source["weight"])
                        + actupose.evalpose(on_target, cells, self.limbs, mask))
        if s.w_cross:
            pairs = actupose.mine_pairs(source["pose"], all_cells, self.triplets, s.gamma, source["weight"] > 0, all_sure,
                                        capacity=len(all_cells) * len(source["pose"]))
            # Eq. 6 is a sum over pairs; losses are averaged over the shares of a batch, so a share's sum is scaled up.
            shares = processes() * s.accumulate
            cross = shares * actupose.cross_domain_loss(source["features"], all_features, pairs)
        loss = actupose.total_loss(udape, evalpose, cross, (s.w_udape, s.w_evalpose, s.w_cross))       # Eq. 8
        terms = dict(mse=self.summed * source["loss"], consistency=self.summed * consistency, kept=mask.float().mean(),
                     teacher_confidence=confidence.mean())
        if s.w_evalpose:
            terms["evalpose"] = evalpose
        if s.w_cross:
            terms.update(cross_domain=cross, pairs=shares * (pairs[:, 0] >= 0).float().sum())
        return loss, terms

    @torch.no_grad()
    def decode(self, model, images):
        """uint8 images (B, 3, S, S) -> keypoints (B, K, 2) in their pixels and confidences (B, K), on the CPU."""
        heatmaps, _ = model.eval()(normalise(images.to(self.device)).contiguous(memory_format=torch.channels_last))
        cells, confidence = actupose.decode_keypoints(heatmaps, self.settings.subcell)
        return cells.cpu() * self.stride, confidence.cpu()

    def predict(self, model, dataset, batch_size=64):
        """Keypoints (N, K, 2) in pixels and confidences (N, K) of a whole dataset, on the CPU.

        Each process takes a range of the samples; every sample is predicted once.
        """
        bounds = [len(dataset) * r // processes() for r in range(processes() + 1)]
        counts = [end - begin for begin, end in zip(bounds, bounds[1:])]
        begin, end, most = bounds[rank()], bounds[rank() + 1], max(counts)
        found = torch.zeros(most, len(self.skeleton), 3)          # the same shape everywhere, so that it can be gathered
        for start in range(begin, end, batch_size):
            stop = min(start + batch_size, end)
            keypoints, confidence = self.decode(model, dataset[torch.arange(start, stop)][0])
            found[start - begin:stop - begin] = torch.cat([keypoints, confidence[..., None]], -1)
        parts = gather(found.to(self.device)).cpu().split(most)
        found = torch.cat([part[:count] for part, count in zip(parts, counts)])
        return found[..., :2], found[..., 2]

    def load_networks(self, student, teacher, path):
        """Restore student and teacher (None before it joins) from a checkpoint's state dicts; path: for errors."""
        load_weights(self.student, student, path)
        if teacher is not None:
            self.teacher = actupose.make_teacher(self.student)
            load_weights(self.teacher, teacher, path)

    def scored_teacher(self):
        """The teacher as it is evaluated.

        Decision: its parameters with the student's BatchNorm statistics; its own are those of strongly
        augmented, restyled views in training mode and fit clean images badly.
        """
        if self.teacher is None:
            return None
        teacher = actupose.make_teacher(self.teacher)
        for mine, students in zip(teacher.buffers(), self.student.buffers()):
            mine.copy_(students)
        return teacher


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


def scoring_frame(dataset, stride, subcell):
    """Truth as it is scored: keypoints (N, K, 2), weight (N, K) and the side of the frame, in one unit.

    subcell: pixels against pixels. Otherwise the published protocol, cells against cells: keypoints whose
    cell lies outside the map or has x <= 1 or y <= 1 are left out.
    """
    if subcell:
        return dataset.keypoints, dataset.visible, dataset.size
    cells = torch.floor(dataset.keypoints / stride + 0.5)
    counted = ((cells > 1) & (cells < dataset.size // stride)).all(-1)
    return cells * stride, dataset.visible * counted, dataset.size


def score(predicted, dataset, stride, subcell, bins=None, num_bins=25):
    """PCK by group, EvalPose score, and PCK by complexity bin (bins: (N,), the bin of each pose)."""
    true, weight, size = scoring_frame(dataset, stride, subcell)
    def number(value):
        return None if math.isnan(value) else value                     # nothing labelled; JSON has no NaN

    scores = actupose.pck(predicted, true, weight, size, dataset.skeleton.groups)
    result = {"pck": {name: number(value) for name, value in scores.items()},
              "evalpose": actupose.evalpose_score(predicted, true, torch.tensor(dataset.skeleton.limbs), weight)}
    if bins is not None:
        scored = list(dataset.skeleton.groups["all"])
        hits, counted = actupose.pck_hits(predicted[:, scored], true[:, scored], weight[:, scored], 0.05 * size)
        per_pose = 100 * hits.sum(1) / counted.sum(1).clamp(min=1)
        usable = counted.any(1).numpy()
        result["bins"] = [number(per_pose[torch.from_numpy((bins == j) & usable)].mean().item())
                          for j in range(num_bins)]
    return result


# ----------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------


class Progress:
    """One line that says how far the work is and how long it will take; quiet when not a terminal."""

    unfinished = False                                       # a line without its end stands on the terminal

    def __init__(self, title):
        self.title, self.start, self.first, self.shown = title, None, 0, 0.0
        self.live = sys.stderr.isatty() and rank() == 0

    def __call__(self, done, total, note=""):
        """Show that `done` of `total` is finished. The time left is reckoned from the first call on."""
        now = time.time()
        if self.start is None:
            self.start, self.first = now, done
        if not self.live or (done < total and now - self.shown < 0.2):
            return
        self.shown = now
        left = (now - self.start) / max(done - self.first, 1) * (total - done)
        line = f"{self.title} {done}/{total}, {left // 60:.0f}:{left % 60:02.0f} left {note}"
        Progress.unfinished = done < total
        print("\r" + line.ljust(110)[:110], end="" if done < total else "\n", file=sys.stderr, flush=True)


def complain(message):
    """One line on stderr, below a progress line that may stand there; of several processes it says which one, and what
    all of them find wrong is said by the first that does."""
    if started_by_torchrun() and said_before(str(message)):
        return
    process = f" (process {os.environ['RANK']})" if started_by_torchrun() else ""
    print(("\n" if Progress.unfinished else "") + f"train.py{process}: {message}", file=sys.stderr)
    Progress.unfinished = False


@contextmanager
def replacing(path, keep=None):
    """A binary file to write, which takes the place of `path` when the block ends well and is removed otherwise.

    It is on the disk before it is renamed, so that a crash or a full disk leaves the old file or the new one, whole.
    keep: the name that the old file is given. OSError names `path`.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as e:
        with suppress(OSError):                  # in a directory that became read-only it stays; the next write takes it
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise OSError(e.errno, e.strerror or str(e), str(path)) from e
        raise


def sync_directory(folder):
    """Wait until renames in a directory are on the disk; where directories cannot be opened (Windows) nothing is needed."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path, text):
    """Write a text file so that a crash leaves either the old one or the new one."""
    with replacing(path) as f:
        f.write(text.encode())


def write_json(path, value):
    """`write_text` of JSON; ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_lines(path, rows):
    """log.jsonl and speed.jsonl: one line an epoch."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path):
    """A run's JSON file. UserError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?") from None
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); remove {path.parent} and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (no object of JSON); remove {path.parent} and run again")
    return value


def is_row(row, epoch, *keys):
    """Whether a value is a line of log.jsonl or speed.jsonl: numbers by name, `keys` among them."""
    return (isinstance(row, dict) and row.get("epoch") == epoch and all(isinstance(name, str) for name in row)
            and all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in row.values())
            and all(row.get(key) is not None for key in keys))


LOG_KEYS, SPEED_KEYS = ("lr",), ("seconds", "images_per_second", "total_seconds")


def read_lines(path, *keys):
    """The rows of log.jsonl or speed.jsonl, with `keys` in each; none before the first epoch is finished. UserError when
    damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); --resume writes it anew") from None
    for epoch, row in enumerate(rows):
        if not is_row(row, epoch, *keys):
            raise UserError(f"{path}: damaged (line {epoch + 1} is not that of an epoch); --resume writes it anew")
    return rows


def peak_memory_gb():
    """The most memory that this process has held, in GB; None where the system does not say."""
    try:
        import resource
    except ImportError:                                      # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


DIGEST_BYTES = 32                                            # of SHA-256


class _HashingWriter:
    """What torch.save writes to: the file, with a SHA-256 of all that passes."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, piece):
        try:
            self.digest.update(piece)
            return self.file.write(piece)
        except OSError as e:                                 # torch reports any failure as its own RuntimeError
            self.error = e
            raise

    def flush(self):
        self.file.flush()


def save_checkpoint(path, state):
    """torch.save, followed by the SHA-256 of its bytes, in place of `path`; what was there becomes previous.pt.

    torch.load looks for the end of its archive from the back and opens the file all the same. At every moment last.pt
    or previous.pt is whole. OSError when it cannot be written, both as they were.
    """
    with replacing(path, path.with_name("previous.pt")) as f:
        writer = _HashingWriter(f)
        try:
            torch.save(state, writer)
        except RuntimeError as e:
            raise (writer.error or e) from None
        f.write(writer.digest.digest())
    sync_directory(path.parent)


def load_checkpoint(path, *keys):
    """A torch file as a dictionary of tensors and plain values, nothing in it is executed.

    keys: what it must hold. UserError when it is missing, unreadable or holds something else.
    """
    try:
        with open(path, "rb") as f:
            return _read_state(f, path, keys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _read_state(f, path, keys):
    """`load_checkpoint` of an open file."""
    try:
        state = torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:
        raise Damaged(f"{path}: not a readable file of tensors and plain values ({type(e).__name__}); replace it, or "
                      f"start anew") from None
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise Damaged(f"{path}: not what was expected, a dictionary with {', '.join(keys) or 'tensors'}")
    return state


def load_run(path):
    """A checkpoint that `save_checkpoint` wrote. Nothing of it is parsed before its checksum is found right.

    Damaged, with the file and what to do, when it is missing, cut short, changed or of another kind.
    """
    try:
        with open(path, "rb") as f:
            if not _checksum_fits(f):
                raise Damaged(f"{path}: damaged, or written by an earlier version (its checksum does not fit); --resume goes on "
                              f"from previous.pt beside it, and --weights {path} takes an earlier version's network")
            f.seek(0)
            state = _read_state(f, path, CHECKPOINT)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path}: no such file; is {path.parent} the directory of a run that has saved something?") from None
    for name in ("student", "teacher", "style", "vae"):
        weights = state[name]
        if not (is_state_dict(weights) or (weights is None and name != "student")):
            raise Damaged(f"{path}: {name} is no dictionary of tensors; --resume goes on from previous.pt beside it")
    if type(state["epoch"]) is not int or state["epoch"] < -1:
        raise Damaged(f"{path}: epoch is {state['epoch']!r}; --resume goes on from previous.pt beside it")
    return state


def _checksum_fits(f):
    """Whether an open file ends with the SHA-256 of what stands before."""
    left, digest = os.fstat(f.fileno()).st_size - DIGEST_BYTES, hashlib.sha256()
    if left <= 0:
        return False
    while left > 0 and (piece := f.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    return f.read() == digest.digest()


def is_state_dict(value):
    """Whether a value is a dictionary of tensors by name."""
    return isinstance(value, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in value.items())


def load_weights(module, state, path):
    """module.load_state_dict with an error that names the file and the first thing that does not fit."""
    own = module.state_dict()
    if not is_state_dict(state):
        raise UserError(f"{path}: no dictionary of tensors where those of a network were expected; give another file")
    for name in sorted(own.keys() ^ state.keys()):
        where = "lacks" if name in own else "has an unknown"
        raise UserError(f"{path}: the checkpoint {where} {name}; is it of another --architecture or skeleton?")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, this network {tuple(value.shape)}; "
                            f"use the --architecture and data of the run that wrote it")
    try:
        module.load_state_dict(state)
    except RuntimeError as e:                                # tensors of a kind that cannot be copied
        raise UserError(f"{path}: {str(e).splitlines()[-1].strip()}; give another file") from None


def choose_device(name):
    """auto, cpu or cuda -> torch.device; UserError when it is not there. Processes of torchrun get a GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if started_by_torchrun() and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"--device: {name!r} is one GPU, and each of {os.environ['WORLD_SIZE']} processes takes its own; "
                            f"give --device cuda, and CUDA_VISIBLE_DEVICES to say which")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps|xpu(:\d+)?", name):
        raise UserError(f"--device: {name!r} is none; give cpu, cuda or, of several GPUs, cuda:1")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device: {name!r} cannot be used here ({str(e).splitlines()[0]}); try --device cpu") from None
    return device


def fitting_device(settings, name):
    """`choose_device`; UserError where a run with these settings cannot use it or these processes cannot share its batches."""
    count = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1
    if settings.batch_size % (count * settings.accumulate):
        raise UserError(f"--batch-size: {settings.batch_size} cannot be shared by {count} processes and --accumulate "
                        f"{settings.accumulate}; use a multiple of {count * settings.accumulate}")
    device = choose_device(name)
    if settings.amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--amp bf16: {torch.cuda.get_device_name(device)} does not compute in it; use --amp off")
    return device


def prepare_style(settings, domains, device):
    """The style transfer networks of a run, trained on its two domains' training images; None when off."""
    if settings.style == "off":
        return None
    torch.manual_seed(settings.seed)
    transfer = actupose.StyleTransfer(settings.style).to(device)
    if settings.style_weights:
        folder = Path(settings.style_weights)
        load_style_weights(transfer.encoder, folder / "vgg_normalised.pth")
        if (folder / "decoder.pth").exists():
            load_style_weights(transfer.decoder, folder / "decoder.pth")
            return transfer.requires_grad_(False).eval()
    size = min(16, settings.batch_size)
    shuffled = [(dataset, Shuffler(settings.seed, len(dataset))) for dataset in (domains.source, domains.target)]

    def batches(i):
        return tuple(normalise(dataset[shuffle.batch(size, i)][0].to(device)) for dataset, shuffle in shuffled)

    return actupose.train_style_transfer(transfer, batches, settings.style_iters,
                                         train_encoder=not settings.style_weights,
                                         lr=2e-3 if settings.style == "small" else 1e-4,   # AdaIN's own for VGG
                                         progress=Progress("style transfer"))


def load_style_weights(network, path):
    """Published AdaIN weights into an encoder or decoder, by name; layers beyond relu4_1 are ignored."""
    state = load_checkpoint(path)
    own = network.state_dict()
    load_weights(network, {name: value for name, value in state.items() if name in own}, path)


def read_weights(settings):
    """What --weights names -> a dictionary as `actupose.load_pose_weights` takes it, and the file's name or address."""
    if settings.weights == "imagenet":
        url = IMAGENET_URL + IMAGENET_FILES[settings.architecture]
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True), url
        except Exception as e:                   # no network, a wrong hash, a damaged file: from many libraries
            raise UserError(f"--weights imagenet: {url} could not be fetched or read ({e}); fetch it by other means and give "
                            f"the file, or remove a damaged one from {torch.hub.get_dir()}/checkpoints") from None
    path = Path(settings.weights)
    if path.is_dir():                            # of a run
        return load_run(path / "last.pt"), path / "last.pt"
    # UDAPE's and RegDA's files hold the options they were written with, an argparse.Namespace: plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_checkpoint(path), path


def load_initial_weights(network, weights, path):
    """Weights from `read_weights` into the pose network; prints what was loaded, what was not and why."""
    try:
        loaded, ignored, left = actupose.load_pose_weights(network, weights)
    except ValueError as e:
        raise UserError(f"--weights: {path}: {e}; give the --architecture that it belongs to, or other weights") from None

    def parts(names):
        counts = Counter(name.split(".")[0] for name in names)
        return ", ".join(f"{part} ({count})" for part, count in counts.items())

    if rank() > 0:
        return
    print(f"weights from {path}:\n  loaded: {parts(loaded)}")
    for reason in dict.fromkeys(ignored.values()):
        print(f"  ignored, {reason}: {', '.join(name for name in ignored if ignored[name] == reason)}")
    if left:
        print(f"  not in it, left at the initialisation: {parts(left)}")


CHECKPOINT = ("epoch", "student", "teacher", "style", "optimiser", "vae", "curriculum", "log", "drawn", "speed", "seconds",
              "position")


@dataclass
class Run:
    """All that a run consists of once it is set up; what changes in training is in `state` and `load`."""
    settings: Settings
    domains: Domains
    vae: actupose.PoseVAE
    curriculum: actupose.ActiveCurriculum
    trainer: Trainer
    log: list
    drawn: list                                              # per epoch, samples drawn from each bin (Fig. 5)
    speed: list = field(default_factory=list)                # per epoch, the line of speed.jsonl
    seconds: float = 0.0                                     # that the run had taken when it was saved
    position: dict = None                                    # where inside an epoch it was stopped: see train_epoch
    stopping: object = None                                  # `asked`: a signal asks to stop after the present step

    @property
    def labelled(self):
        """The dataset whose labels are used."""
        return self.domains.target if self.settings.supervise == "target" else self.domains.source

    def state(self, epoch):
        """Checkpoint after `epoch`: tensors and plain values only, so that it loads without unpickling code.

        With a position, it is of a moment within `epoch` + 1. Random numbers need no state: each is a function of the
        seed, the step and the sample.
        """
        trainer = self.trainer
        return dict(epoch=epoch, student=trainer.student.state_dict(),
                    teacher=trainer.teacher.state_dict() if trainer.teacher is not None else None,
                    style=trainer.style_transfer.state_dict() if trainer.style_transfer is not None else None,
                    optimiser=trainer.optimiser.state_dict(), vae=self.vae.state_dict(),
                    curriculum=self.curriculum.state_dict(), log=self.log, drawn=self.drawn, speed=self.speed,
                    seconds=self.seconds, position=self.position)

    def load(self, state, path):
        """Restore a checkpoint of `load_run`. Returns the next epoch; UserError where it does not belong to this run."""
        trainer, position = self.trainer, state["position"]
        trainer.load_networks(state["student"], state["teacher"], path)
        try:
            check_progress(state, self.settings, len(self.curriculum.score))
            check_moments(state["optimiser"], list(trainer.student.parameters()))
            # Its settings are this run's; the learning rate is set in each epoch.
            trainer.optimiser.load_state_dict({**trainer.optimiser.state_dict(), "state": state["optimiser"]["state"]})
            self.curriculum.load_state_dict(state["curriculum"])
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{path}: {e}; resume with the settings and data that the run was started on") from None
        self.log, self.drawn, self.speed = state["log"], state["drawn"], state["speed"]
        self.seconds, self.position = state["seconds"], position
        return state["epoch"] + 1


def is_tensor(value, dtype, *shape):
    """Whether a value is a plain tensor of this type and shape."""
    return torch.is_tensor(value) and value.layout == torch.strided and value.dtype == dtype and value.shape == shape


def check_moments(optimiser, parameters):
    """ValueError where a checkpoint's state of Adam is not that of these parameters."""
    moments = optimiser.get("state") if isinstance(optimiser, dict) else None
    fits = isinstance(moments, dict) and moments.keys() == set(range(len(parameters))) and all(
        isinstance(moments[i], dict) and is_tensor(moments[i].get("step"), torch.float32)
        and all(is_tensor(moments[i].get(name), p.dtype, *p.shape) for name in ("exp_avg", "exp_avg_sq"))
        for i, p in enumerate(parameters))
    if not fits:
        raise ValueError("the optimiser's state is not that of this network")


def check_progress(state, settings, samples):
    """ValueError where what a checkpoint says of the run's course is not what `Run.state` writes."""
    finished, position = state["epoch"] + 1, state["position"]

    def require(fits, what):
        if not fits:
            raise ValueError(f"{what} of another form than this version writes")

    def number(value):
        return type(value) in (int, float) and math.isfinite(value)

    def rows(name, keys):
        return isinstance(state[name], list) and len(state[name]) == finished and all(
            is_row(row, epoch, *keys) for epoch, row in enumerate(state[name]))

    require(finished < settings.epochs or (finished == settings.epochs and position is None), "epoch")
    require(rows("log", LOG_KEYS), "log")
    require(rows("speed", SPEED_KEYS), "speed")
    require(number(state["seconds"]), "seconds")
    drawn = (finished + (position is not None)) if settings.curriculum == "active" else 0
    require(isinstance(state["drawn"], list) and len(state["drawn"]) == drawn
            and all(isinstance(row, list) and len(row) == settings.bins and all(type(n) is int for n in row)
                    for row in state["drawn"]), "drawn")
    curriculum = state["curriculum"]
    require(isinstance(curriculum, dict) and torch.is_tensor(curriculum.get("score"))
            and all(is_tensor(curriculum.get(name), torch.float32, curriculum["score"].numel())
                    for name in ("score", "confidence")), "curriculum")
    if position is not None:
        require(isinstance(position, dict) and type(position.get("batch")) is int
                and 0 < position["batch"] < settings.iters_per_epoch and number(position.get("seconds")), "position")
        seen = position["batch"] * settings.batch_size
        require(is_state_dict(position.get("sums")) and all(is_tensor(v, torch.float32) for v in position["sums"].values()),
                "sums")
        require(is_tensor(position.get("indices"), torch.int64, seen)
                and is_tensor(position.get("confidence"), torch.float32, seen)
                and (settings.curriculum != "active"
                     or (position["indices"].min() >= 0 and position["indices"].max() < samples)), "indices")


def memory_available():
    """Bytes of main memory that can still be taken, the limit of a container included; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for folder, limit, used in (("/sys/fs/cgroup", "memory.max", "memory.current"),
                                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            taken = int(Path(folder, used).read_text())
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            taken -= int(statistics["inactive_file"]) + int(statistics["active_file"])       # given back when asked for
            free = min(free, int(Path(folder, limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):              # no such control group, or "max": no limit
            continue
    return free


def check_memory(settings, domains, trainer):
    """UserError where what a run is certain to take is more than what is free.

    Counted: the crops that the datasets keep, as many as the run will ask for; teacher, gradient and the two moments
    of Adam, each the size of the network. Not counted, since it is not known beforehand: activations, the decoding.
    """
    crop, drawn = 3 * settings.image_size ** 2, settings.epochs * settings.iters_per_epoch * settings.batch_size
    on_target = settings.adapt or settings.style != "off" or settings.supervise == "target"
    crops = 0
    for dataset, used in ((domains.source, drawn if settings.supervise == "source" else 8),
                          (domains.target, drawn if on_target else 0), (domains.val, math.inf), (domains.test, math.inf)):
        if isinstance(dataset, data.Mannequin) and used:
            crops += len(dataset) * crop                     # rendered all together
        elif len(dataset) * crop <= data.MAX_CROPS_BYTES:
            crops += min(len(dataset), used) * crop
    networks = (3 + settings.adapt) * sum(p.nbytes for p in trainer.student.parameters())
    gpu = trainer.device.type == "cuda"
    checks = [(crops + networks * (not gpu), memory_available(), "memory")]
    if gpu:
        checks.append((networks, torch.cuda.mem_get_info(trainer.device)[0], "memory of the GPU"))
    for needed, free, what in checks:
        if free is not None and needed > free:
            raise UserError(f"--image-size {settings.image_size}, --architecture {settings.architecture}: images and networks "
                            f"take at least {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of {what} are free; make them "
                            f"smaller, or free some")


PICTURES_BYTES = 20_000_000                                  # figures/ and the text files: ten times the demo's


def checkpoint_bytes(run):
    """Bytes of the tensors in a run's last checkpoint; at the start, those to come are reckoned from the networks."""
    def size(state):
        return sum(value.nbytes for value in state.values()) if state else 0

    state = run.state(-1)
    moments = 2 * sum(p.nbytes for p in run.trainer.student.parameters())
    return (size(state["student"]) * (1 + run.settings.adapt) + moments + size(state["style"]) + size(state["vae"])
            + size(state["curriculum"]))


def check_disk(out, run):
    """UserError where the directory has no room for the run: three checkpoints, for a moment, and the pictures.

    last.pt and previous.pt stand while the next one is written.
    """
    there = sum(file.stat().st_size for file in (out / "last.pt", out / "previous.pt") if file.exists())
    needed = max(3 * checkpoint_bytes(run) - there, 0) + PICTURES_BYTES
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"{out}: {needed / 1e6:.0f} MB are needed for checkpoints and pictures and {free / 1e6:.0f} MB are "
                        f"free; free some, or give another --out")


def set_up(settings, device, checkpoint=None, path=None):
    """Data, Pose-VAE, curriculum, style transfer and networks of a run; from a checkpoint where there is one."""
    weights, vgg = None, Path(settings.style_weights) / "vgg_normalised.pth"
    if settings.style == "vgg" and checkpoint is None and not vgg.exists():          # a checkpoint holds its own
        raise UserError(f"--style-weights: {vgg} is not there; give the directory that holds AdaIN's published file, or --style "
                        f"small")
    if settings.weights not in ("", "imagenet") and checkpoint is None:
        weights = read_weights(settings)                     # a file: before datasets of minutes are opened
    domains = open_domains(settings)
    if settings.weights == "imagenet" and checkpoint is None:
        weights = read_weights(settings)                     # a download: when all else is in order
    source = domains.source
    root = source.skeleton.root
    if settings.bins > len(source):
        raise UserError(f"--bins: {settings.bins} are more than the {len(source)} images of the source training set")
    trainer = Trainer(settings, source.skeleton, None, device)
    check_memory(settings, domains, trainer)
    if weights is not None:
        load_initial_weights(trainer.student, *weights)
    if checkpoint is None:
        vae = actupose.train_pose_vae(source.keypoints, source.visible, root, settings.vae_steps, seed=settings.seed)
    else:
        vae = actupose.PoseVAE(len(source.skeleton)).eval()
        load_weights(vae, checkpoint["vae"], path)
    agree(*vae.state_dict().values())
    complexity = actupose.pose_complexity(vae, source.keypoints, source.visible, root)
    agree(complexity)
    try:
        curriculum = actupose.ActiveCurriculum(complexity.numpy(), settings.epochs, settings.bins, settings.pace, settings.spread,
                                               settings.scale, settings.rescoring, settings.seed)
    except ValueError as e:
        raise UserError(f"--bins: {e}") from None
    few = len(source.skeleton.triplets) < MIN_TRIPLETS
    if settings.w_cross and settings.adapt and few and rank() == 0:
        complain(f"--w-cross: Eq. 6 is without effect, its pairs need {MIN_TRIPLETS} triplets of the skeleton, which has "
                 f"{len(source.skeleton.triplets)}")
    if settings.curriculum == "hardest" and len(curriculum.hardest(settings.hard_bins)) < settings.batch_size:
        raise UserError(f"--hard-bins: {settings.hard_bins} bins hold fewer samples than a batch ({settings.batch_size})")
    if checkpoint is None:
        trainer.style_transfer = prepare_style(settings, domains, device)      # last: it can take an hour
        agree(*(trainer.style_transfer.state_dict().values() if trainer.style_transfer is not None else ()))
    elif checkpoint["style"] is not None:
        trainer.style_transfer = actupose.StyleTransfer(settings.style).to(device).requires_grad_(False).eval()
        load_weights(trainer.style_transfer, checkpoint["style"], path)
    return Run(settings, domains, vae, curriculum, trainer, [], [])


def ahead(jobs, workers):
    """Results of the callables `jobs`, in their order; `workers` threads are at work on those to come.

    Decoding images lets go of Python's lock, so threads do; what a batch holds depends on its place alone.
    """
    if workers == 0:
        for job in jobs:
            yield job()
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:                # a run that stops does not wait for what it will not use
                future.cancel()


CHECK_EVERY = {"cpu": 1, "cuda": 50}                         # steps between looks at the loss; on a GPU each look waits


def draw_pool(curriculum, epoch, settings):
    """Eq. 3: the epoch's source samples (n,). UserError where the settings leave none."""
    try:
        pool = curriculum.sample(epoch)
    except ValueError:                                       # shares of the bins that are no numbers
        pool = ()
    if len(pool) < 1:
        raise UserError(f"epoch {epoch}: the curriculum draws no sample with --spread {settings.spread}, --pace "
                        f"{settings.pace}, --bins {settings.bins} and --scale {settings.scale}; a larger --spread draws more")
    return pool


class Batches:
    """What one epoch trains on: the indices of each of its batches, and their loading. Several processes draw the same
    epoch, and each loads its share."""

    def __init__(self, run, epoch, pool):
        s = self.settings = run.settings
        self.first_step, self.pool, self.active = epoch * s.iters_per_epoch, pool, s.curriculum == "active"
        self.labelled = run.labelled
        self.target = run.domains.target if run.trainer.uses_target else None
        self.source_order, self.target_order = Shuffler(s.seed, len(pool)), Shuffler(s.seed + 1, len(run.domains.target))
        self.pin = run.trainer.device.type == "cuda"              # pinned memory: the copy to the GPU waits for nothing

    def indices(self, i):
        """Samples of the labelled and, or None, of the target batch i, of all processes."""
        step, size = self.first_step + i, self.settings.batch_size
        # An active pool is new each epoch and already in random order; a fixed one is passed over epoch after epoch.
        at = (np.arange(size) + i * size) % len(self.pool) if self.active else self.source_order.batch(size, step)
        target = None if self.target is None else torch.from_numpy(self.target_order.batch(size, step))
        return torch.from_numpy(self.pool[at]), target

    def load(self, labelled, target):
        """Loads what `indices` gave, in any thread. Returns the labelled indices and this process's share of the two batches:
        (indices, uint8 images, keypoints, visible), None without a target."""
        batches = []
        for dataset, indices in ((self.labelled, labelled), (self.target, target)):
            batch = None if indices is None else (share(indices), *dataset[share(indices)])
            batches.append(tuple(tensor.pin_memory() for tensor in batch) if batch and self.pin else batch)
        return labelled, *batches

    def jobs(self, steps):
        """`load` of the batches `steps`, not yet called; their indices are drawn here, in the thread that asks for a job."""
        return (partial(self.load, *self.indices(i)) for i in steps)

    def names(self, i):
        """Indices and names of the samples of batch i, for messages."""
        return {domain: {"indices": indices.tolist(), "names": dataset.names(indices)}
                for domain, dataset, indices in zip(("labelled", "target"), (self.labelled, self.target), self.indices(i))
                if indices is not None}


class Account:
    """What an epoch's steps return, kept on the device: sums of the terms, and the samples with their confidences.

    position: the account of an epoch that was stopped, as `position` gives it, or None.
    """

    def __init__(self, device, position):
        position = position or {"batch": 0, "sums": {}, "indices": torch.zeros(0, dtype=torch.int64),
                                "confidence": torch.zeros(0)}
        self.steps, self.before = position["batch"], position["confidence"]
        self.sums = {name: value.to(device) for name, value in position["sums"].items()}
        self.seen, self.confidences, self.unchecked = [position["indices"]], [], []

    def add(self, indices, terms, confidence):
        """A step: the indices of its whole batch, this process's terms and confidences."""
        self.seen.append(indices)
        self.confidences.append(confidence)
        self.unchecked.append((self.steps, terms))
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1

    def not_finite(self):
        """The first step, and its terms, that is not finite in any process, of those not looked at before; or None."""
        values = torch.stack([torch.stack(tuple(terms.values())) for _, terms in self.unchecked], 1)     # terms x steps
        finite = torch.isfinite(gather(values)).all(0).tolist()
        found = None if all(finite) else self.unchecked[finite.index(False)]
        self.unchecked = []
        return found and (found[0], mean_of_processes(found[1]))

    def observed(self):
        """Samples and their confidences, of all processes, in the order of the steps."""
        done = gather(torch.stack(self.confidences))                                   # process by process, steps x share
        done = done.view(processes(), len(self.confidences), -1).transpose(0, 1).flatten()
        return torch.cat(self.seen), torch.cat([self.before, done.cpu()])

    def position(self):
        """What the rest of the epoch needs when it is stopped here."""
        indices, confidence = self.observed()
        return {"batch": self.steps, "sums": mean_of_processes(self.sums), "indices": indices, "confidence": confidence}


def train_epoch(run, epoch, progress):
    """One epoch: re-rank and draw (Eq. 3-4), iterate. Returns the epoch's line for log.jsonl.

    Where `run.stopping` asks for it, it stops after a step, returns None and leaves the epoch's account in `run.position`.
    The curriculum is then as it was after this epoch's re-ranking, so that the same pool is drawn again.
    The line holds: epoch, lr (of Adam), pool (samples that the epoch may draw from), the means over the steps of mse
    (L_mse), consistency, evalpose (Eq. 5), cross_domain (Eq. 6), each unweighted, and loss (Eq. 8, weighted); kept
    (share of the target's keypoints that count), pairs (similar pairs of a batch), confidence and teacher_confidence
    (mean maximum of the source's and the target's heatmaps); peak_bin (g of Eq. 3). `train` adds val_student and
    val_teacher (PCK@0.05 in percent on the validation split) every tenth epoch and after the last.
    Raises NotFinite at the first step that is not.
    """
    s, trainer, curriculum = run.settings, run.trainer, run.curriculum
    begins, account = run.position is None, Account(trainer.device, run.position)
    run.position = None
    if s.adapt and epoch == s.pretrain_epochs and begins:
        trainer.teacher = actupose.make_teacher(trainer.student)
    if s.curriculum == "active":
        if begins:
            curriculum.rerank()                                          # Eq. 4
        pool = draw_pool(curriculum, epoch, s)                           # Eq. 3
        if begins:
            run.drawn.append(curriculum.drawn_per_bin.tolist())
    elif s.curriculum == "hardest":
        pool = curriculum.hardest(s.hard_bins)
    else:
        pool = np.arange(len(run.labelled))
    batches, lr = Batches(run, epoch, pool), trainer.learning_rate(epoch)

    remaining = range(account.steps, s.iters_per_epoch)
    trainer.now("data")
    for i, (indices, source_batch, target_batch) in zip(remaining, ahead(batches.jobs(remaining), s.workers)):
        step = epoch * s.iters_per_epoch + i
        terms, confidence = trainer.step(step, source_batch, target_batch)
        trainer.now("log")
        account.add(indices, terms, confidence)
        progress(step + 1, s.epochs * s.iters_per_epoch, f"epoch {epoch + 1}/{s.epochs}")
        last, asked = i + 1 == s.iters_per_epoch, run.stopping is not None and run.stopping.asked
        if len(account.unchecked) == CHECK_EVERY.get(trainer.device.type, 50) or last or (asked and processes() == 1):
            if found := account.not_finite():
                raise NotFinite({"epoch": epoch, "step": found[0], **batches.names(found[0]),
                                 "terms": {name: str(value.item()) for name, value in found[1].items()}})
            # All processes stop at the same step, or they would wait for each other.
            if any_process(asked, trainer.device) and not last:
                run.position = account.position()
                return None
        trainer.now("data")
    row = {"epoch": epoch, "lr": lr, "pool": len(pool)}
    row.update((name, value.item() / s.iters_per_epoch) for name, value in mean_of_processes(account.sums).items())
    if s.curriculum == "active":
        row["peak_bin"] = curriculum.peak_bin(epoch)
        curriculum.observe(*account.observed())
    return row


def validate(run):
    """PCK of student and teacher on the validation split, for choices and curves."""
    trainer, val = run.trainer, run.domains.val
    models = {"val_student": trainer.student, "val_teacher": trainer.scored_teacher()}
    return {name: score(trainer.predict(model, val)[0], val, trainer.stride, run.settings.subcell)["pck"]["all"]
            for name, model in models.items() if model is not None}


def evaluate(run):
    """Scores of the last epoch on the test split: {"student": ..., "teacher": ...} and the student's predictions."""
    trainer, test, s = run.trainer, run.domains.test, run.settings
    complexity = actupose.pose_complexity(run.vae, test.keypoints, test.visible, test.skeleton.root)
    bins = actupose.assign_bins(complexity, s.bins)
    student = trainer.predict(trainer.student, test)
    scores = {"student": score(student[0], test, trainer.stride, s.subcell, bins, s.bins)}
    if trainer.teacher is not None:
        teacher = trainer.predict(trainer.scored_teacher(), test)
        scores["teacher"] = score(teacher[0], test, trainer.stride, s.subcell, bins, s.bins)
    return scores, student


def check_out(out):
    """UserError where the directory --out can neither be used nor made."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out: {out} cannot be made, {parent} is not a writable directory; give another")


LAST_PICTURE = "complexity.png"                              # with result.json there, the run is finished


def finished(out):
    """Whether a run has its result and its pictures, which are drawn after it."""
    return (out / "result.json").exists() and (out / "figures" / LAST_PICTURE).exists()


def has_checkpoint(out):
    """Whether there is something to go on from. Between two renames previous.pt is alone."""
    return (out / "last.pt").exists() or (out / "previous.pt").exists()


def newest_checkpoint(out):
    """The checkpoint to go on from and its file: last.pt, or previous.pt when that is damaged, which is said.

    (None, None) for a run that was ended before it saved anything. UserError when neither can be read.
    """
    last, previous = out / "last.pt", out / "previous.pt"
    if not has_checkpoint(out) and not (out / "log.jsonl").exists():
        return None, None
    try:
        return load_run(last), last
    except Damaged as damage:
        try:
            state = load_run(previous)
        except Damaged as other:
            raise UserError(f"{damage}. Nor can previous.pt be used: {other}. Bring back one of them from a copy, or remove "
                            f"{out} and run again") from None
        complain(f"{damage}. Going on from {previous}, {state['epoch'] + 1} epochs done, to the same result")
        return state, previous


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopping:
    """What Ctrl-C, SIGTERM and a closed terminal do: a context. hint: a function that says how to go on.

    At first, and whenever `hold` is False, they end the command at once. With `hold` True the first one only sets `asked`
    to its number, for the loop to finish the step and save; a second one then ends the process as the system does.
    """

    def __init__(self, hint):
        self.hint, self.hold, self.asked, self.before = hint, False, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():          # elsewhere Python takes no handlers
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:             # nohup and the like
                    self.before[number] = signal.signal(number, self.handle) or signal.SIG_DFL
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """The signals' handler."""
        if not self.hold:
            raise self.stopped(number)
        self.asked = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if started_by_torchrun() and os.environ["RANK"] != "0":            # one says it
            return
        with suppress(OSError):                                            # a terminal that is gone
            os.write(2, b"\ntrain.py: finishing this step to save it; a second signal ends the run at once\n")

    def stopped(self, number, where="interrupted"):
        """The exception that ends the command."""
        return Stopped(number, f"{where}; {self.hint()}")


def resume_command(out):
    """How to go on with a run."""
    return f"python train.py --resume --out {shlex.quote(str(out))}"


def versions():
    """Versions of what computes a run; those that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}       # which says its build too
    for name in ("numpy", "pillow", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine(device):
    """What a run is computed on."""
    return {"device": str(device), "device_name": kernels.common.device_name(device), "processes": processes(),
            "threads": torch.get_num_threads(), "platform": platform.platform()}


def commit():
    """The git commit of this code, "+changes" where files differ from it; None without git or a repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def record_start(out, settings, skeleton, device, arguments, epoch, resumed):
    """config.json: settings, skeleton and origin of a run; where it is resumed, a line in its list "resumed" and no other
    change."""
    path = out / "config.json"
    if resumed:
        config = read_json(path)
        config["resumed"] = [*config.get("resumed", ()), {"epoch": epoch, **machine(device), **versions()}]
    else:
        config = {**dataclasses.asdict(settings), **versions(), **machine(device), "commit": commit(),
                  "arguments": list(arguments), "skeleton": dataclasses.asdict(skeleton), "resumed": []}
    write_json(path, config)


def train(settings, out, device="auto", resume=False, arguments=()):
    """One run, from data to result.json and figures/ in the directory `out`. Returns the result.

    arguments: the command line's, for config.json. Killed at any moment and called again with `resume` it writes the same
    result.json, log.jsonl and weights, to the bit on a CPU with the same number of threads. Raises Stopped on Ctrl-C and
    SIGTERM, after saving; UserError for what the user can mend, a full disk included.
    """
    out = Path(out)
    # cuBLAS reads this when it starts; it is one of the two values under which it repeats itself.
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = settings.deterministic
    device = fitting_device(settings, device)
    check_out(out)
    if finished(out) and resume:
        if not started_by_torchrun() or os.environ["RANK"] == "0":
            print(f"{out}: the run is finished")
        return read_result(out / "result.json")
    if (out / "result.json").exists() and not resume:
        raise UserError(f"{out}: holds a finished run; give another --out, or `evaluate {out}`")
    if has_checkpoint(out) and not resume:
        raise UserError(f"{out}: holds an unfinished run; add --resume to go on with it, or give another --out")

    def hint():
        return f"`{resume_command(out)}` goes on" if has_checkpoint(out) else "nothing was saved yet; give the command again"

    with Stopping(hint) as stopping, joined(device):
        return _train(settings, out, device, resume, arguments, stopping)


def _train(settings, out, device, resume, arguments, stopping):
    """`train`, once it is clear that there is something to do."""
    last = out / "last.pt"
    started = time.time()
    checkpoint, file = newest_checkpoint(out) if resume else (None, None)
    run = set_up(settings, device, checkpoint, file)
    first = run.load(checkpoint, file) if checkpoint is not None else 0
    started -= run.seconds
    run.stopping = stopping
    agree(torch.zeros(1))                       # all have read the checkpoint before it may be renamed
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)  # only now: a mistake in the settings leaves no directory behind
        check_disk(out, run)
        record_start(out, settings, run.domains.source.skeleton, device, arguments, first, resume)
        if file is not None and file != last:
            os.replace(file, last)              # or the damaged one would become the new previous.pt
    progress = Progress(settings.method)
    try:
        stopping.hold = True
        for epoch in range(first, settings.epochs):
            one_epoch(run, epoch, progress, out, started)
        stopping.hold = False
        if stopping.asked:                                # while the last epoch was saved
            raise stopping.stopped(stopping.asked)
        scores, predictions = evaluate(run)
        best = max((row for row in run.log if "val_student" in row), key=lambda row: row["val_student"] or 0.0)
        result = {"method": settings.method, "source": settings.source, "target": settings.target, "seed": settings.seed,
                  **scores["student"], "teacher": scores.get("teacher"), "val": run.log[-1]["val_student"],
                  "best_val": best["val_student"], "best_val_epoch": best["epoch"], "epochs": settings.epochs}
        if rank() > 0:
            return result
        write_lines(out / "log.jsonl", run.log)           # again: a run stopped between the files resumes here
        write_lines(out / "speed.jsonl", run.speed)
        write_json(out / "result.json", result)           # before the pictures: a failing picture must not lose the figures
        draw_figures(run, scores, predictions, out / "figures")
    except OSError as e:
        kept = f"; what was saved before is whole, and `{resume_command(out)}` goes on from it" if has_checkpoint(out) else ""
        raise UserError(f"{e.filename or out}: {e.strerror or e}{kept}") from e
    return result


def one_epoch(run, epoch, progress, out, started):
    """Train an epoch and save it, or as much of it as a signal leaves time for. started: the clock when the run had taken
    no time."""
    last, done = out / "last.pt", run.position["seconds"] if run.position else 0.0
    kept = f"the last good state is kept in {last}" if last.exists() else "nothing was saved yet"
    advice = f"lower --lr, or the weights --w-evalpose and --w-cross; {kept}"
    began = time.time() - done
    try:
        row = train_epoch(run, epoch, progress)
    except NotFinite as e:
        if rank() == 0:
            write_json(out / "nonfinite.json", e.record)
        agree(torch.zeros(1))                             # or torchrun would end process 0 before it has written
        bad = [name for name, value in e.record["terms"].items() if not math.isfinite(float(value))]
        raise UserError(f"epoch {epoch}, step {e.record['step']}: {', '.join(bad)} not finite, for "
                        f"{', '.join(e.record['labelled']['names'][:4])} and others, all in {out / 'nonfinite.json'}; {advice}"
                        ) from None
    seconds = time.time() - began
    for network in (run.trainer.student, run.trainer.teacher):
        agree(*(network.buffers() if network is not None else ()))      # BatchNorm's statistics, where each has its own
    bad = [name for name, value in run.trainer.student.state_dict().items() if not value.isfinite().all()]
    bad += [name for name, value in (row or {}).items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"epoch {epoch}: {bad[0]} not finite after a step; {advice}")
    if row is None:
        run.position["seconds"], run.seconds = seconds, time.time() - started
        if rank() == 0:
            save_checkpoint(last, run.state(epoch - 1))
        raise run.stopping.stopped(run.stopping.asked or signal.SIGTERM, f"stopped in epoch {epoch + 1} of {run.settings.epochs} after "
                                   f"{run.position['batch']} of {run.settings.iters_per_epoch} steps")
    if (epoch + 1) % 10 == 0 or epoch + 1 == run.settings.epochs:
        row.update(validate(run))
    run.log.append(row)
    run.seconds = time.time() - started
    images = run.settings.iters_per_epoch * run.settings.batch_size * (1 + run.trainer.uses_target)
    run.speed.append({"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1),
                      "total_seconds": round(run.seconds, 3), **peak_memory(run.trainer.device)})
    if rank() == 0:
        save_checkpoint(last, run.state(epoch))
        write_lines(out / "log.jsonl", run.log)
        write_lines(out / "speed.jsonl", run.speed)
    if any_process(run.stopping.asked, run.trainer.device):
        raise run.stopping.stopped(run.stopping.asked or signal.SIGTERM, f"stopped after epoch {epoch + 1} of {run.settings.epochs}")


NETWORKS = ("student", "student, backward", "teacher", "style")      # the parts of a step that are networks at work
PROFILE_STEPS = 20


def profile(settings, out, device):
    """Where a step's time goes, before and after the teacher joins: a table on stdout, and profile.json.gz in `out`, a trace
    for chrome://tracing or ui.perfetto.dev. Trains a few steps with networks that are thrown away.

    Returns {phase: {part: seconds a step}}. The parts: data (waiting for decoded images), augmentation (views, warps,
    colours, target heatmaps), the networks forward and backward, losses (pseudo-labels and Eq. 5-8) and their backward pass
    down to the networks' outputs, optimiser (Adam and the teacher's average), log.
    """
    device = fitting_device(settings, device)
    check_out(out)
    # Three epochs of each phase: one to warm up, one timed, one traced. Time does not depend on what networks have learned.
    settings = dataclasses.replace(settings, epochs=6 if settings.adapt else 3, pretrain_epochs=3 if settings.adapt else 0,
                                   iters_per_epoch=PROFILE_STEPS, vae_steps=1, style_iters=1)
    with joined(device):
        run = set_up(settings, device)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
        found, tracer = {}, torch.profiler.profile(activities=activities)
        for first, phase in ((0, "pretraining"), (3, "adaptation"))[:1 + settings.adapt]:
            train_epoch(run, first, Progress(phase))
            run.trainer.watch = Stopwatch(device)
            train_epoch(run, first + 1, Progress(phase))
            run.trainer.now(None)
            found[phase] = {part: seconds / PROFILE_STEPS for part, seconds in run.trainer.watch.seconds.items()}
            run.trainer.watch = Stopwatch(device)
            if first + 3 == settings.epochs:
                with tracer:
                    train_epoch(run, first + 2, Progress(phase))
                    run.trainer.now(None)
            run.trainer.watch = None
        if rank() > 0:
            return found
    out.mkdir(parents=True, exist_ok=True)
    tracer.export_chrome_trace(str(out / "profile.json.gz"))
    parts = list(dict.fromkeys(part for times in found.values() for part in times))
    totals = {phase: sum(times.values()) for phase, times in found.items()}
    print(f"{'ms a step':20}" + "".join(f"{phase:>20}" for phase in found))
    for part in parts:
        print(f"{part:20}" + "".join(f"{1e3 * times.get(part, 0):12.2f}{100 * times.get(part, 0) / totals[phase]:6.1f} %"
                                     for phase, times in found.items()))
    outside = {phase: sum(seconds for part, seconds in times.items() if part not in NETWORKS) for phase, times in found.items()}
    for name, sums in (("outside the networks", outside), ("in all", totals)):
        print(f"{name:20}" + "".join(f"{1e3 * sums[phase]:12.2f}{100 * sums[phase] / totals[phase]:6.1f} %" for phase in found))
    print(f"{settings.batch_size} images of each domain, {settings.image_size // run.trainer.stride} cells a side, "
          f"{machine(device)['device_name']}, {torch.get_num_threads()} threads; trace of the last phase in "
          f"{out / 'profile.json.gz'}")
    return found


def peak_memory(device):
    """Peak memory of this process, in GB, for speed.jsonl; on a GPU its tensors' too."""
    on_gpu = {"peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)} if device.type == "cuda" else {}
    return {"peak_memory_gb": peak_memory_gb(), **on_gpu}


def speed_text(speed):
    """What speed.jsonl says of a run, in a few words. Its lines: epoch, seconds (of the epoch's steps, what they waited for
    included), images_per_second (of both domains), total_seconds (of the run till then, the set-up included), peak memory."""
    if not speed:
        return "no epoch timed"
    last = speed[-1]
    memory = [row["peak_memory_gb"] for row in speed if row.get("peak_memory_gb") is not None]
    return (f"{last['total_seconds']:.0f} s, {last['images_per_second']:.0f} images/s"
            + (f", {max(memory):.2f} GB" if memory else ""))


def shown(value, digits=1):
    """A score as text, a dash where nothing is labelled."""
    return "-" if value is None else f"{value:.{digits}f}"


def read_result(path):
    """A run's result.json. UserError when it is missing, damaged or no result."""
    result = read_json(path)
    teacher = result.get("teacher")
    for scores in (result, *([teacher] if teacher else [])):
        if not (isinstance(scores, dict) and isinstance(scores.get("pck"), dict) and "all" in scores["pck"]
                and isinstance(scores.get("bins"), list) and type(scores.get("evalpose")) in (int, float)):
            raise UserError(f"{path}: damaged (scores are missing); remove it, and --resume writes it anew")
    return result


def print_result(result):
    """The tables of one result: PCK by group for student and teacher, EvalPose, and PCK by complexity bin."""
    groups = list(result["pck"])
    print("PCK@0.05  " + "".join(f"{name:>11}" for name in groups) + "   EvalPose")
    for name, scores in (("student", result), ("teacher", result["teacher"])):
        if scores:
            print(f"{name:10}" + "".join(f"{shown(scores['pck'][g]):>11}" for g in groups) + f"{scores['evalpose']:11.1f}")
    print("student by complexity bin of the pose, simple to complex: "
          + " ".join(shown(value, 0) for value in result["bins"]))


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------

INK, GREY, GRID, PAPER = (34, 40, 49), (112, 122, 136), (228, 232, 238), (255, 255, 255)
RIGHT, LEFT, CENTRE = (240, 78, 88), (38, 132, 230), (250, 178, 40)
PALETTE = (LEFT, RIGHT, (32, 164, 118), CENTRE, (136, 84, 208), (96, 108, 122), (24, 190, 207),
           (227, 119, 194), (150, 100, 70), (160, 190, 60))
FINGERS = {"thumb": RIGHT, "index": PALETTE[4], "middle": PALETTE[2], "ring": LEFT, "little": PALETTE[5]}
HEAT = ((248, 250, 252), (176, 212, 245), LEFT, (14, 42, 92))               # heat maps, from 0 to the maximum
ASCII = str.maketrans({"→": "->", "–": "-", "—": "-", "×": "x", "−": "-"})  # what Pillow's own font lacks


class Canvas:
    """A white picture drawn at twice its size and shrunk when saved: smooth lines with Pillow alone.

    Every argument is in pixels of the saved picture; colours are (r, g, b) or (r, g, b, alpha), 0 to 255.
    """
    SCALE = 2

    def __init__(self, width, height):
        self.image = Image.new("RGB", (self.SCALE * round(width), self.SCALE * round(height)), PAPER)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def line(self, points, colour, width=1.0):
        points = [(self.SCALE * x, self.SCALE * y) for x, y in points]
        self.draw.line(points, colour, max(1, round(self.SCALE * width)), joint="curve")

    def polygon(self, points, colour):
        self.draw.polygon([(self.SCALE * x, self.SCALE * y) for x, y in points], colour)

    def box(self, x0, y0, x1, y1, colour, radius=0):
        corners = [self.SCALE * x0, self.SCALE * y0, self.SCALE * x1 - 1, self.SCALE * y1 - 1]
        self.draw.rounded_rectangle([round(c) for c in corners], self.SCALE * radius, colour)

    def dot(self, x, y, radius, colour):
        self.draw.circle((self.SCALE * x, self.SCALE * y), self.SCALE * radius, colour)

    def text(self, x, y, text, size=13, colour=INK, anchor="la", bold=False):
        """Text at (x, y) with Pillow's anchors; returns where it ends if it starts at x."""
        font, text = ImageFont.load_default(size=self.SCALE * size), str(text).translate(ASCII)
        self.draw.text((self.SCALE * x, self.SCALE * y), text, colour, font, anchor,
                       stroke_width=0.013 * self.SCALE * size if bold else 0)
        return x + font.getlength(text) / self.SCALE

    def paste(self, image, x, y):
        """An image that is already SCALE times as large as it shall appear."""
        self.image.paste(image, (round(self.SCALE * x), round(self.SCALE * y)))

    def legend(self, x, y, entries, size=13):
        """Coloured swatches with their names, in a line from x on, centred on y; entries: (name, colour)."""
        for name, colour in entries:
            self.box(x, y - 5, x + 10, y + 5, colour, 2)
            x = self.text(x + 16, y, name, size, anchor="lm") + 20

    def save(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            self.image.reduce(self.SCALE).save(f, format="PNG", optimize=True)


def _array(values):
    """Tensors, lists and None -> a float64 array, NaN where there is nothing."""
    return np.asarray(values.detach().cpu() if torch.is_tensor(values) else values, dtype=np.float64)


def _panel(image, side):
    """One uint8 image (3, S, S) -> a picture for `Canvas.paste` that appears `side` pixels wide."""
    pixels = np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(1, 2, 0))
    return Image.fromarray(pixels).resize((Canvas.SCALE * side,) * 2, Image.Resampling.BICUBIC)


def _to_panel(keypoints, size, side):
    """Keypoints of an image of `size` pixels in those of its `_panel`; pixel centres stay centres."""
    return (_array(keypoints) + 0.5) * (Canvas.SCALE * side / size) - 0.5


def _ticks(low, high, count, smallest):
    """About `count` round numbers from low to high, at least `smallest` apart."""
    rough = max((high - low) / count, smallest, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough) + 1e-9)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return np.arange(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1) * step


def _axes(canvas, box, x_range, y_range, title="", xlabel="", ylabel="", ticks=(8, 5), y_step=0.0):
    """Title, grid and tick labels around box (x0, y0, x1, y1); returns data (x, y) -> points on the canvas.

    ticks: about how many on either axis; x counts epochs or bins, so its ticks are whole; y_step: the
    smallest step between ticks of y.
    """
    x0, y0, x1, y1 = box
    x_span, y_span = (max(high - low, 1e-9) for low, high in (x_range, y_range))

    def place(x, y):
        x, y = np.broadcast_arrays(_array(x), _array(y))
        return list(zip((x0 + (x - x_range[0]) / x_span * (x1 - x0)).ravel().tolist(),
                        (y1 - (y - y_range[0]) / y_span * (y1 - y0)).ravel().tolist()))

    for value in _ticks(*y_range, ticks[1], y_step):
        y = place(x_range[0], value)[0][1]
        canvas.line([(x0, y), (x1, y)], GRID)
        canvas.text(x0 - 6, y, f"{value:,.6g}", 11, GREY, "rm")
    canvas.line([(x0, y1), (x1, y1)], GREY)
    for value in _ticks(*x_range, ticks[0], smallest=1):
        canvas.text(place(value, y_range[0])[0][0], y1 + 6, f"{value:,.6g}", 11, GREY, "mt")
    canvas.text((x0 + x1) / 2, y1 + 22, xlabel, 12, GREY, "mt")
    end = canvas.text(x0, y0 - 12, title, 14, INK, "ls", bold=True)
    canvas.text(end + (8 if title else 0), y0 - 12, ylabel, 12, GREY, "ls")
    return place


def _smooth(values, parts=8):
    """A Catmull-Rom curve, kept above 0, through values (n,) at 0 ... n - 1: x from -1/2 to n - 1/2, y."""
    n = len(values)
    padded = np.concatenate([values[:1], values, values[-1:]])
    slope = (padded[2:] - padded[:-2]) / 2
    x = np.arange((n - 1) * parts + 1) / parts
    i = np.minimum(x.astype(int), max(n - 2, 0))
    t, j = x - i, np.minimum(i + 1, n - 1)
    y = (1 - t) ** 2 * ((1 + 2 * t) * values[i] + t * slope[i])
    y += t ** 2 * ((3 - 2 * t) * values[j] + (t - 1) * slope[j])
    return np.concatenate([[-0.5], x, [n - 0.5]]), np.maximum(np.concatenate([values[:1], y, values[-1:]]), 0)


def _heat(values):
    """Values in [0, 1] (...) -> colours (..., 3) uint8 of the heat map."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, c).round().astype(np.uint8) for c in zip(*HEAT)], -1)


def _joint_colour(name):
    """Right, left and centre of a body, or the finger of a hand, by the keypoint's name."""
    return FINGERS.get(name.split()[0]) or {"r-": RIGHT, "l-": LEFT}.get(name[:2], CENTRE)


def draw_skeleton(draw, keypoints, visible, skeleton, colour, width, confidence=None):
    """Limbs and joints of one figure, outlined in white so that they stand out from any background.

    draw: ImageDraw.Draw(image, "RGBA"); keypoints: (K, 2), (x, y) in pixels of that image; visible: (K,),
    0 leaves a keypoint and its limbs out; colour: one (r, g, b) for all, or None: by body side or finger;
    width: of a limb in pixels; confidence: (K,) in [0, 1], fades joints, and limbs by their less certain end.
    """
    keypoints, shown = _array(keypoints), _array(visible) > 0
    shown &= np.isfinite(keypoints).all(-1)
    colours = [colour or _joint_colour(name) for name in skeleton.names]
    certain = np.ones(len(skeleton)) if confidence is None else np.nan_to_num(_array(confidence)).clip(0, 1)
    alpha = (255 * (0.2 + 0.8 * certain)).round().astype(int)
    neighbours = [set() for _ in skeleton.names]
    limbs = []
    for a, b in skeleton.limbs:
        # The line from hip to hip repeats the two from the hips to the pelvis, where that is labelled.
        if shown[a] and shown[b] and not neighbours[a] & neighbours[b]:
            neighbours[a].add(b)
            neighbours[b].add(a)
            sides = {colours[a], colours[b]} - {CENTRE}
            limb_colour = sides.pop() if len(sides) == 1 else CENTRE
            limbs.append(([tuple(keypoints[a]), tuple(keypoints[b])], min(alpha[a], alpha[b]), limb_colour))
    for points, opacity, _ in limbs:
        draw.line(points, (*PAPER, opacity * 4 // 5), round(width * 1.7))
    for points, opacity, limb_colour in limbs:
        draw.line(points, (*limb_colour, opacity), round(width))
    for point, opacity, joint_colour, present in zip(keypoints.tolist(), alpha, colours, shown):
        if present:
            draw.circle(tuple(point), width * 1.35, (*PAPER, opacity))
            draw.circle(tuple(point), width * 0.95, (*joint_colour, opacity))


def draw_predictions(path, images, true, visible, predicted, confidence, skeleton, titles=None):
    """Samples as image, ground truth and prediction side by side, each with its own PCK@0.05.

    images: (n, 3, S, S) uint8; true, predicted: (n, K, 2) in pixels of the images; visible: (n, K), 0 = not
    labelled; confidence: (n, K), fades the prediction; titles: n strings for the captions. n up to 12.
    A keypoint counts as right within 0.05 S of the truth. Raises ValueError without a sample.
    """
    if not len(images):
        raise ValueError("images: no sample to draw; give at least one")
    side, gap, head, foot, margin = 192, 4, 62, 34, 12
    columns = {1: 1, 2: 2, 4: 2}.get(len(images), 3)
    cell_width, cell_height = 3 * side + 2 * gap, side + foot
    canvas = Canvas(2 * margin + columns * cell_width + (columns - 1) * margin,
                    head + math.ceil(len(images) / columns) * cell_height + 8)
    used = {_joint_colour(name) for name in skeleton.names}
    fingers = any(name.split()[0] in FINGERS for name in skeleton.names)
    meaning = FINGERS if fingers else {"right": RIGHT, "left": LEFT, "centre": CENTRE}
    canvas.legend(margin, 20, [(name, colour) for name, colour in meaning.items() if colour in used])
    for column in range(min(columns, len(images))):
        for i, name in enumerate(("image", "ground truth", "prediction (faint = unsure)")):
            x = margin + column * (cell_width + margin) + i * (side + gap)
            canvas.text(x, head - 8, name, 13, GREY, "ls")
    size = images.shape[-1]
    tensors = [torch.as_tensor(_array(values)) for values in (predicted, true, visible)]
    for n, image in enumerate(images):
        x = margin + (n % columns) * (cell_width + margin)
        y = head + (n // columns) * cell_height
        poses = [None, (true[n], visible[n], None), (predicted[n], np.ones(len(skeleton)), confidence[n])]
        for i, pose in enumerate(poses):
            panel = _panel(image, side)
            if pose is not None:
                draw_skeleton(ImageDraw.Draw(panel, "RGBA"), _to_panel(pose[0], size, side), pose[1],
                              skeleton, None, 6, pose[2])
            canvas.paste(panel, x + i * (side + gap), y)
        score = actupose.pck(*(t[n:n + 1] for t in tensors), size, {"all": skeleton.groups["all"]})["all"]
        caption = "no keypoint labelled" if math.isnan(score) else f"PCK@0.05  {score:.0f} %"
        middle = y + side + 14
        canvas.box(x, middle - 4, x + 60, middle + 4, GRID, 3)
        if score > 0:                     # a bar as long as the score: good and bad are seen at a glance
            canvas.box(x, middle - 4, x + max(0.6 * score, 6), middle + 4, PALETTE[2], 3)
        end = canvas.text(x + 68, middle, caption, 13, anchor="lm", bold=True)
        if titles is not None:
            canvas.text(end + 12, middle, titles[n], 13, GREY, "lm")
    canvas.save(path)


def draw_samples(path, rows, skeleton):
    """Rows of images with their labelled skeletons.

    rows: list of (title, images (n, 3, S, S) uint8, keypoints (n, K, 2) in their pixels, visible (n, K)).
    """
    gap, margin, head = 6, 20, 34
    most = max(len(images) for _, images, _, _ in rows)
    side = min(192, (1760 - gap * (most - 1)) // most)
    canvas = Canvas(2 * margin + most * (side + gap) - gap, 10 + len(rows) * (head + side) + margin)
    for r, (title, images, keypoints, visible) in enumerate(rows):
        y = 10 + r * (head + side) + head
        canvas.text(margin, y - 10, title, 15, anchor="ls", bold=True)
        for n, image in enumerate(images):
            panel = _panel(image, side)
            draw_skeleton(ImageDraw.Draw(panel, "RGBA"), _to_panel(keypoints[n], image.shape[-1], side),
                          visible[n], skeleton, None, max(3, side / 32))
            canvas.paste(panel, margin + n * (side + gap), y)
    canvas.save(path)


def draw_style(path, columns):
    """A table of images: columns is a list of (title, images (n, 3, S, S) uint8), one image a row."""
    side, gap, margin, head = 160, 8, 20, 40
    rows = max(len(images) for _, images in columns)
    canvas = Canvas(2 * margin + len(columns) * (side + gap) - gap, head + rows * (side + gap) - gap + margin)
    for c, (title, images) in enumerate(columns):
        x = margin + c * (side + gap)
        canvas.text(x + side / 2, head - 12, title, 14, anchor="ms", bold=True)
        for n, image in enumerate(images):
            canvas.paste(_panel(image, side), x, head + n * (side + gap))
    canvas.save(path)


def draw_curriculum(path, panels):
    """Fig. 5: how many samples each epoch draws from each bin, simplest bin first.

    panels: list of (title, counts (E, N_b)). Above, the curves of five epochs: the area under one is what the
    epoch trains on. Below, all epochs as a heat map, the five marked at its left edge.
    """
    width, curve, heat, margin = 520, 280, 180, 66
    canvas = Canvas(len(panels) * (width + margin) + 30, curve + heat + 170)
    for p, (title, counts) in enumerate(panels):
        counts = np.nan_to_num(_array(counts))
        epochs, bins = counts.shape
        x0, y0, y1 = p * (width + margin) + margin, 44, 44 + curve
        top, bin_range = max(counts.max(), 1.0), (-0.5, bins - 0.5)
        place = _axes(canvas, (x0, y0, x0 + width, y1), bin_range, (0, 1.08 * top), title, "",
                      "samples drawn", (12, 5))
        chosen = np.unique(np.linspace(0, epochs - 1, 5).round().astype(int))
        curves = [(epoch, colour, *_smooth(counts[epoch])) for epoch, colour in zip(chosen, PALETTE)]
        for _, colour, x, y in curves:
            canvas.polygon(place(x, y) + place([bins - 0.5, -0.5], 0), (*colour, 44))
        for i, (epoch, colour, x, y) in enumerate(curves):
            canvas.line(place(x, y), colour, 2)
            drawn = counts[epoch].sum()
            drawn = f"{drawn:,.0f}" if drawn < 1e5 else f"{drawn / 1000:,.0f}k"
            canvas.legend(x0 + i * width / len(curves), y1 + 36, [(f"epoch {epoch}: {drawn}", colour)], 11)
        y0, y1 = y1 + 80, y1 + 80 + heat
        place = _axes(canvas, (x0, y0, x0 + width, y1), bin_range, (-0.5, epochs - 0.5), "",
                      "bin, from simple to complex poses", f"epoch (white: none, dark: {top:,.0f} samples)",
                      (12, 5), 1)
        picture = Image.fromarray(_heat(counts[::-1] / top))
        size = (Canvas.SCALE * width, Canvas.SCALE * heat)
        canvas.paste(picture.resize(size, Image.Resampling.NEAREST), x0, y0)
        for epoch, colour, _, _ in curves:
            canvas.dot(*place(-0.5, epoch)[0], 4, colour)
    canvas.save(path)


def draw_curves(path, log, adapt_from=None):
    """A run's log over its epochs: loss terms, validation PCK, what adaptation works on, learning rate.

    log: a dict for each epoch, as the lines of log.jsonl; values that are missing, None or NaN are left out.
    adapt_from: the epoch at which adaptation starts, a dashed line. Raises ValueError for an empty log.
    """
    if not log:
        raise ValueError("log: no epoch to draw; train for at least one")
    panels = [("Pose loss (mse)", {"mse": ""}), ("Consistency (target)", {"consistency": ""}),
              ("EvalPose, Eq. 5", {"evalpose": ""}), ("Cross-domain, Eq. 6", {"cross_domain": ""}),
              ("Validation PCK@0.05, %", {"val_student": "student", "val_teacher": "teacher"}),
              ("Pseudo-labels", {"confidence": "confidence", "kept": "kept"}),
              ("Similar pairs, Eq. 7", {"pairs": ""}), ("Learning rate", {"lr": ""})]
    table = {}
    for key in (key for _, keys in panels for key in keys):
        xy = _array([[line["epoch"], line.get(key)] for line in log])
        table[key] = xy[np.isfinite(xy[:, 1])]
    full = [(title, {label: table[key] for key, label in keys.items()}) for title, keys in panels
            if any(len(table[key]) for key in keys)]
    width, height, margin, columns = 350, 190, 70, min(4, max(len(full), 1))
    canvas = Canvas(columns * (width + margin) + 30, max(-(-len(full) // columns), 1) * (height + 96) + 16)
    epochs = [line["epoch"] for line in log]
    for n, (title, panel) in enumerate(full):
        x0, y0 = n % columns * (width + margin) + margin, n // columns * (height + 96) + 44
        values = np.concatenate([xy[:, 1] for xy in panel.values()])
        low, high = min(values.min(), 0), values.max() if values.max() > 0 else 1
        place = _axes(canvas, (x0, y0, x0 + width, y0 + height), (min(epochs), max(epochs)),
                      (low, high + 0.08 * (high - low)), title, "epoch", ticks=(7, 6))
        if adapt_from is not None and min(epochs) <= adapt_from <= max(epochs):
            x = place(adapt_from, low)[0][0]
            for y in range(y0, y0 + height, 8):
                canvas.line([(x, y), (x, y + 4)], GREY)
            if n == 0:
                canvas.text(x - 5, y0 + 4, "adaptation starts", 11, GREY, "ra")
        for (label, xy), colour in zip(panel.items(), PALETTE):
            points = place(xy[:, 0], xy[:, 1])
            if len(points) > 1:
                canvas.line(points, colour, 2)
            for point in points if 3 * len(points) <= len(log) else points[-1:]:
                canvas.dot(*point, 3, colour)
        if len(panel) > 1:
            canvas.legend(x0 + 190, y0 - 17, list(zip(panel, PALETTE)), 12)
    canvas.save(path)


def draw_bins(path, series, ylabel):
    """Fig. 9: a score over the bins of rising pose complexity, a bar for each method.

    series: dict label -> N_b scores, None or NaN where a bin has none; ylabel: what the score is.
    """
    scores = {label: _array(values) for label, values in series.items()}
    bins = max(map(len, scores.values()))
    width = min(1600, max(420, 130 * len(scores), bins * (14 * len(scores) + 10)))
    x0, y0, height, margin = 64, 66, 300, 24
    canvas = Canvas(x0 + width + margin, y0 + height + 54)
    finite = np.concatenate([[0.0], *(values[np.isfinite(values)] for values in scores.values())])
    low, high = finite.min(), finite.max() if finite.max() > 0 else 1.0
    place = _axes(canvas, (x0, y0, x0 + width, y0 + height), (-0.5, bins - 0.5), (1.05 * low, 1.05 * high),
                  "", "complexity bin, from simple to complex poses", ylabel, (25, 6))
    bar = 0.8 / len(scores)
    for i, (values, colour) in enumerate(zip(scores.values(), cycle(PALETTE))):
        for b in np.flatnonzero(np.isfinite(values)):
            (left, y), (right, zero) = place([b - 0.4 + i * bar, b - 0.4 + (i + 0.92) * bar], [values[b], 0])
            canvas.box(left, min(y, zero), right, max(y, zero, min(y, zero) + 1), colour)
    canvas.legend(x0, 22, list(zip(scores, cycle(PALETTE))))
    canvas.save(path)


def draw_complexity(path, keypoints_per_bin, spread, skeleton):
    """Fig. 2 and 3: poses of some bins, and how much the poses within each bin differ.

    keypoints_per_bin: list of (bin, keypoints (m, K, 2) in any unit, y down, visible (m, K)), simplest first;
    every pose is scaled to its cell. spread: mean, low, high, each (N_b,): the angular difference between
    poses of a bin (Eq. 7) in degrees, its mean and the ends of its whiskers.
    """
    cell, head, margin, chart = 96, 44, 64, 560
    most = max(len(keypoints) for _, keypoints, _ in keypoints_per_bin)
    height = max(len(keypoints_per_bin) * cell, 300)
    canvas = Canvas(2 * margin + 30 + most * cell + chart + margin // 2, head + height + 50)
    canvas.text(20, head - 12, "Poses by bin", 14, anchor="ls", bold=True)
    for r, (number, poses, visible) in enumerate(keypoints_per_bin):
        y0 = head + r * height / len(keypoints_per_bin)
        canvas.text(20, y0 + cell / 2, f"bin {number}", 13, GREY, "lm")
        for n, (pose, shown) in enumerate(zip(_array(poses), _array(visible) > 0)):
            if shown.any():
                low, high = pose[shown].min(0), pose[shown].max(0)
                scale = 0.84 * cell / max(high - low).clip(1e-9)
                pose = (pose - (low + high) / 2) * scale + (margin + 20 + (n + 0.5) * cell, y0 + cell / 2)
                draw_skeleton(canvas.draw, pose * Canvas.SCALE, shown, skeleton, None, 5)
    mean, low, high = (_array(spread[key]) for key in ("mean", "low", "high"))
    x0, bins = 2 * margin + 30 + most * cell, np.flatnonzero(np.isfinite(mean))
    top = np.nanmax(np.concatenate([[1.0], mean, high]))
    place = _axes(canvas, (x0, head, x0 + chart, head + height), (-0.5, len(mean) - 0.5), (0, 1.05 * top),
                  "Angular difference within a bin", "bin, from simple to complex poses", "degrees", (12, 6))
    for b in bins[np.isfinite(low[bins]) & np.isfinite(high[bins])]:
        (left, y), (right, bottom) = place([b - 0.28, b + 0.28], [high[b], low[b]])
        canvas.box(left, y, right, max(bottom, y + 1), (*PALETTE[0], 70), 2)
    if len(bins) > 1:
        canvas.line(place(bins, mean[bins]), PALETTE[0], 2)
    for point in place(bins, mean[bins]):
        canvas.dot(*point, 3.5, PALETTE[0])
    canvas.save(path)


def bin_spread(keypoints, visible, skeleton, bins, num_bins, per_bin=100):
    """Fig. 3: how much the poses of each bin differ, by Eq. 7: {"mean", "low", "high"}, (N_b,) degrees a triplet.

    keypoints: (N, K, 2), any unit; visible: (N, K); bins: (N,). low and high are the quartiles over pairs of poses,
    NaN in a bin without a pair. The distance of Eq. 7 divides the norm by K; times K / sqrt(A) it is the root mean
    square over the A triplets.
    """
    triplets = torch.tensor(skeleton.triplets)
    columns = []
    for j in range(num_bins):
        of_bin = torch.from_numpy(np.flatnonzero(bins == j)[:per_bin])
        poses, valid = keypoints[of_bin], visible[of_bin] > 0
        distance = kernels.triplet_angle_distance(poses, poses, triplets, valid, valid)
        pairs = distance[torch.triu(torch.ones_like(distance), 1) > 0] * len(skeleton) / math.sqrt(len(triplets))
        pairs = torch.rad2deg(pairs[torch.isfinite(pairs)])
        columns.append([pairs.mean().item(), pairs.quantile(0.25).item(), pairs.quantile(0.75).item()] if len(pairs)
                       else [math.nan] * 3)
    return dict(zip(("mean", "low", "high"), np.array(columns).T))


def draw_figures(run, scores, predictions, folder):
    """All pictures of a finished run, into `folder`, LAST_PICTURE last.

    scores: of student and teacher, as `evaluate` gives them; predictions: the student's keypoints (N, K, 2) in pixels
    and confidences (N, K) on the test split. The samples shown are the first of each split.
    """
    trainer, domains, s = run.trainer, run.domains, run.settings
    skeleton = domains.source.skeleton

    def first(dataset, count):
        return dataset[torch.arange(min(count, len(dataset)))]

    images, true, visible = first(domains.test, 12)
    keypoints, confidence = (values[:len(images)] for values in predictions)
    limbs = torch.tensor(skeleton.limbs)
    titles = [f"EvalPose {actupose.evalpose_score(keypoints[i:i + 1], true[i:i + 1], limbs, visible[i:i + 1]):.0f}"
              for i in range(len(images))]
    draw_predictions(folder / "predictions.png", images, true, visible, keypoints, confidence, skeleton, titles)
    draw_samples(folder / "domains.png", [(f"source: {s.source}", *first(domains.source, 8)),
                                          (f"target: {s.target}", *first(domains.val, 8))], skeleton)
    if trainer.style_transfer is not None:
        shown_of_each = min(8, len(domains.source), len(domains.target))
        source, target = (normalise(first(domain, shown_of_each)[0].to(trainer.device))
                          for domain in (domains.source, domains.target))
        full = torch.ones(len(source), device=trainer.device)
        columns = (("source", source), ("source -> target", trainer.style_transfer(source, target, full)),
                   ("target", target), ("target -> source", trainer.style_transfer(target, source, full)))
        draw_style(folder / "style.png", [(title, denormalise(images).cpu()) for title, images in columns])
    if s.curriculum == "active":
        other = actupose.ActiveCurriculum(run.curriculum.complexity, s.epochs, s.bins, s.pace, s.spread,
                                          "minmax" if s.scale == "rank" else "rank")
        expected = [other.probabilities(epoch) * np.diff(other.edges) for epoch in range(s.epochs)]
        draw_curriculum(folder / "curriculum.png", [(f"this run: s_j by {s.scale}", np.array(run.drawn)),
                                                    (f"for comparison: s_j by {other.scale}", np.array(expected))])
    draw_curves(folder / "curves.png", run.log, s.pretrain_epochs if s.adapt else None)
    draw_bins(folder / "bins.png", {name: values["bins"] for name, values in scores.items()}, "PCK@0.05")
    bins = actupose.assign_bins(run.curriculum.complexity, s.bins)
    rows = []
    for j in np.unique(np.linspace(0, s.bins - 1, 5).astype(int)):
        of_bin = torch.from_numpy(np.flatnonzero(bins == j)[:8])
        rows.append((int(j), domains.source.keypoints[of_bin], domains.source.visible[of_bin]))
    spread = bin_spread(domains.source.keypoints, domains.source.visible, skeleton, bins, s.bins)
    draw_complexity(folder / LAST_PICTURE, rows, spread, skeleton)


# ----------------------------------------------------------------------------------------------------------
# Photographs
# ----------------------------------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")                # what is taken from a folder, in either case
MAX_SIDE = 65500                                             # of a picture in JPEG's format


def find_photographs(inputs, out):
    """Files and folders -> list of (file, name of its outputs); UserError for what is not there.

    Of a folder, its files with one of SUFFIXES, sorted; hidden files and subfolders are left alone. A file is taken
    once. A name is the file's without its suffix; where an earlier file has it, -2, -3, ... is appended.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
                           and not p.is_dir())
            if not found:
                raise UserError(f"{path}: no photographs in it ({' '.join(SUFFIXES)}; subfolders are not searched)")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    photographs, names = [], set()
    for file in {file.resolve(): file for file in files}.values():
        if file.resolve().parent == Path(out).resolve():
            raise UserError(f"--out: {out} holds the photograph {file}, which could be overwritten; give another "
                            f"directory")
        name, count = file.stem, 1
        while name.casefold() in names:                      # some file systems do not tell a.json from A.json
            count += 1
            name = f"{file.stem}-{count}"
        names.add(name.casefold())
        photographs.append((file, name))
    return photographs


def to_rgb(image):
    """A picture of any mode -> RGB. Greys of 16 bits and more are scaled to 8, what is transparent becomes white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = (grey.min(), grey.max()) if image.mode == "F" else (0, 65535)
        grey = (255 * (grey - low) / max(high - low, 1e-12)).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def read_photograph(file):
    """A photograph in RGB, turned upright by its EXIF orientation. DataError names a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of damage that leaves the picture readable, of half a bomb's pixels
            with Image.open(file) as image:
                if max(image.size) > MAX_SIDE:
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, a side is at most {MAX_SIDE}")
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as e:                       # a damaged file raises whatever its decoder stumbles on
        raise data.DataError(f"{file}: not a readable photograph ({e})") from None


def photograph_region(size, box):
    """The part of a photograph that the network is to see: (left, top, right, bottom), edges in its pixels.

    size: (width, height); box: (x, y, w, h), or None for the whole photograph. A box is widened about its centre to a
    square, as far as the photograph reaches: surroundings tell a body from its background. ValueError when box and
    photograph have less than a pixel in common.
    """
    if box is None:
        return 0, 0, *size
    edges = []
    for start, length, end in zip(box[:2], box[2:], size):
        if min(start + length, end) - max(start, 0) < min(1, length):
            raise ValueError(f"the box {','.join(f'{v:g}' for v in box)} (x,y,w,h) lies outside the photograph, which has "
                             f"{size[0]} x {size[1]} pixels")
        centre, side = start + length / 2, max(box[2:])
        edges.append((max(centre - side / 2, 0), min(centre + side / 2, end)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def crop_photograph(image, region, size):
    """What the network sees of a photograph: the region fitted into a square, zeros beside it, as `data.LSP` does.

    image: RGB; region: as `photograph_region` gives it; size: S. Returns uint8 (3, S, S) and the view (2, 3), float64,
    from the photograph's pixels to the crop's; in both, pixel i is at coordinate i and reaches from i - 1/2 to i + 1/2.
    """
    left, top, right, bottom = region
    (width, height), (x, y) = data.fit_square(right - left, bottom - top, size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=region))
    crop = torch.zeros(3, size, size, dtype=torch.uint8)
    crop[:, y:y + height, x:x + width] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    view = torch.tensor([[scale_x, 0, (0.5 - left) * scale_x - 0.5 + x],
                         [0, scale_y, (0.5 - top) * scale_y - 0.5 + y]], dtype=torch.float64)
    return crop, view


def draw_photograph(path, image, keypoints, confidence, skeleton, extent):
    """A photograph with the skeleton on it, as a JPEG file of the photograph's size.

    image: RGB; keypoints: (K, 2) in its pixels; confidence: (K,), fades what is uncertain; extent: side in pixels of
    the part that the skeleton lies in, which decides how wide its lines are.
    """
    scale = 2 if max(image.size) <= 2000 else 1              # drawn at twice the size and shrunk: smooth lines
    picture = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    draw_skeleton(ImageDraw.Draw(picture, "RGBA"), (_array(keypoints) + 0.5) * scale - 0.5, np.ones(len(skeleton)),
                  skeleton, None, scale * max(extent / 100, 1.5), confidence)
    picture.reduce(scale).save(path, format="JPEG", quality=92, subsampling=0)


def predict_photographs(decode, skeleton, size, photographs, out, box=None, batch_size=32):
    """Keypoints of photographs: for each a picture NAME.jpg and NAME.json in `out`. Returns how many failed.

    decode: uint8 crops (B, 3, S, S) -> keypoints (B, K, 2) in their pixels, confidence (B, K); size: S; photographs:
    list of (file, NAME); box: as in `photograph_region`, the same for all. A photograph that cannot be read, or that
    lies outside the box, is named on stderr and the others are done. Memory: a batch of crops and one photograph.
    """
    progress, failed = Progress("photographs"), 0
    for start in range(0, len(photographs), batch_size):
        batch, crops = [], []
        for file, name in photographs[start:start + batch_size]:
            try:
                image = read_photograph(file)
                region = photograph_region(image.size, box)
            except data.DataError as e:
                failed += 1
                complain(e)
            except ValueError as e:
                failed += 1
                complain(f"{file}: {e}")
            else:
                crop, view = crop_photograph(image, region, size)
                batch.append((file, name, region, invert_view(view)))
                crops.append(crop)
        keypoints, confidences = decode(torch.stack(crops)) if crops else ([], [])
        for (file, name, region, inverse), points, confidence in zip(batch, keypoints, confidences):
            points = map_keypoints(points.double(), inverse)
            image = read_photograph(file)
            draw_photograph(out / f"{name}.jpg", image, points, confidence, skeleton,
                            max(region[2] - region[0], region[3] - region[1]))
            rows = zip(skeleton.names, points.tolist(), confidence.tolist())
            write_json(out / f"{name}.json", {
                "image": str(file), "width": image.width, "height": image.height, "box": box,
                "keypoints": [{"name": joint, "x": round(x, 3), "y": round(y, 3), "confidence": round(c, 4)}
                              for joint, (x, y), c in rows]})
        progress(min(start + batch_size, len(photographs)), len(photographs))
    return failed


def predict_run(run, inputs, out, box, network, batch_size, device):
    """`predict`: the last checkpoint of a run on photographs. Returns the exit status, 1 when one failed."""
    if not (run / "last.pt").exists():
        raise UserError(f"{run}: holds no last.pt; give the directory of a run that has finished an epoch")
    settings, checkpoint = saved_settings(run), load_run(run / "last.pt")
    skeleton = saved_skeleton(run)
    if network == "teacher" and checkpoint["teacher"] is None:
        raise UserError(f"--network teacher: the run in {run} has none ({settings.method}, after epoch "
                        f"{checkpoint['epoch'] + 1}); use the student")
    check_out(out)
    photographs = find_photographs(inputs, out)
    trainer = Trainer(settings, skeleton, None, device)
    trainer.load_networks(checkpoint["student"], checkpoint["teacher"], run / "last.pt")
    model = trainer.student if network == "student" else trainer.scored_teacher()
    out.mkdir(parents=True, exist_ok=True)
    failed = predict_photographs(lambda crops: trainer.decode(model, crops), skeleton, settings.image_size, photographs,
                                 out, box, batch_size)
    print(f"{len(photographs) - failed} of {len(photographs)} photographs done by the {network} of {run}, in {out}")
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------------
# Many runs, one table
# ----------------------------------------------------------------------------------------------------------


def variant_settings(name, given):
    """Settings of a row of the comparison: a method, or "no-curriculum" and the like, ACTUPose with one change."""
    if name in METHODS:
        return {**given, "method": name}
    if name in ABLATIONS:
        return {**given, "method": "actupose", **ABLATIONS[name]}
    raise UserError(f"--methods: unknown {name!r}; methods: {', '.join(METHODS)}; ablations: {', '.join(ABLATIONS)}")


def compare(names, seeds, root, jobs, preset, device, given):
    """Run what is missing of names x seeds under `root`, in `jobs` processes, and print the table in Markdown."""
    root, names, seeds = Path(root), list(dict.fromkeys(names)), list(dict.fromkeys(seeds))
    wanted = [(name, seed, root / f"{name}-s{seed}") for name in names for seed in seeds]
    todo = []
    for name, seed, out in wanted:
        values = variant_settings(name, {**given, "seed": seed})
        settings = dataclasses.asdict(make_settings(preset, **values))
        if (out / "config.json").exists():
            saved = saved_settings(out)
            for key, value in settings.items():
                if getattr(saved, key) != value and key not in WITHOUT_EFFECT:
                    raise UserError(f"{out}: was run with --{key.replace('_', '-')} {getattr(saved, key)}, now {value} is "
                                    f"asked for; give another --out")
        if not finished(out):
            command = [sys.executable, __file__, "--preset", preset, "--device", device, "--out", str(out)]
            for key, value in values.items():
                command += [f"--{key.replace('_', '-')}", str(value)]
            todo.append((out, command + (["--resume"] if has_checkpoint(out) else [])))
    progress, running, failed = Progress("runs"), [], []
    total = len(todo)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                out, command = todo.pop(0)
                out.mkdir(parents=True, exist_ok=True)
                with open(out / "output.txt", "a") as f:
                    # A session of its own: Ctrl-C reaches this process alone, which tells the others below, once.
                    running.append((out, subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment,
                                                          start_new_session=True)))
            time.sleep(0.5)
            for out, process in [r for r in running if r[1].poll() is not None]:
                running.remove((out, process))
                if process.returncode:
                    failed.append(f"{out}: exit status {process.returncode}, see {out / 'output.txt'}")
                progress(total - len(todo) - len(running), total, out.name)
    except BaseException:
        for _, process in running:
            process.terminate()                              # each saves where it is
        for _, process in running:
            process.wait()
        raise
    results = {}
    for name, seed, out in wanted:
        if (out / "result.json").exists():
            results.setdefault(name, []).append(read_result(out / "result.json"))
    print(comparison_table(results))
    if results:
        draw_bins(root / "bins.png", {name: np.mean(np.array([r["bins"] for r in rows], dtype=float), 0).tolist()
                                       for name, rows in results.items()}, "PCK@0.05")
    if failed:
        raise UserError("; ".join(failed))


def comparison_table(results):
    """Markdown table of {name: [result, ...]}: means over seeds, and the sample deviation of the overall PCK.

    With source-only and oracle there: the share of the gap between them that is closed. With actupose there: the
    difference to it, seed by seed (every seed has its own data), and that difference's deviation.
    """
    def mean(values):
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    def spread(values):
        return f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""

    overall = {name: mean(r["pck"]["all"] for r in rows) for name, rows in results.items()}
    gap = overall.get("oracle", 0.0) - overall.get("source-only", 0.0) if {"oracle", "source-only"} <= set(overall) else 0.0
    ours = {r["seed"]: r["pck"]["all"] for r in results.get("actupose", ())}
    groups = [g for g in next(iter(results.values()))[0]["pck"] if g != "all"] if results else []
    header = ["method", "seeds", *groups, "all", "teacher", "EvalPose"]
    header += ["gap closed"] * bool(gap) + ["to actupose"] * bool(ours)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, rows in results.items():
        cells = [name, str(len(rows)), *(shown(mean(r["pck"][g] for r in rows)) for g in groups),
                 f"**{shown(overall[name])}**{spread([r['pck']['all'] for r in rows])}",
                 shown(mean(r["teacher"]["pck"]["all"] for r in rows if r["teacher"])), shown(mean(r["evalpose"] for r in rows))]
        if gap:
            cells.append(f"{100 * (overall[name] - overall['source-only']) / gap:.0f} %")
        if ours:
            pairs = [r["pck"]["all"] - ours[r["seed"]] for r in rows if r["seed"] in ours]
            cells.append(f"{mean(pairs):+.1f}{spread(pairs)}" if pairs and name != "actupose" else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def boolean(text):
    """on/off, true/false, yes/no, 1/0 -> bool."""
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")


def box_numbers(text):
    """X,Y,W,H -> four numbers, width and height positive."""
    try:
        box = [float(part) for part in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise argparse.ArgumentTypeError(f"must be x,y,w,h in pixels, w and h above 0, got {text!r}")
    return box


WITHOUT_EFFECT = ("cache", "workers")                    # settings that may differ between two runs of one result


def add_settings(parser, skip=()):
    """One --option for each field of Settings, in groups, with the default and the paper's value in the help."""
    groups = {}
    for f in dataclasses.fields(Settings):
        if f.name in skip:
            continue
        title = f.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        paper = f.metadata["paper"]
        default, paper = ({True: "on", False: "off"}.get(v, v) if isinstance(v, bool) else v for v in (f.default, paper))
        shown = [f"default {default}" if default != "" else "", f"paper {paper}" if paper is not None else ""]
        text = f.metadata["help"] + " [" + "; ".join(part for part in shown if part) + "]"
        kind = type(f.default)
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, choices=f.metadata["choices"],
                           type=boolean if kind is bool else kind, help=text.replace("[]", "").replace("%", "%%"),
                           metavar=None if f.metadata["choices"] else kind.__name__.upper())


def add_run_options(parser, out):
    """The options that do not change a result. out: what --out does if it is not given."""
    group = parser.add_argument_group("run")
    group.add_argument("--preset", choices=("demo", "paper"), default="demo",
                       help="which values the options below have if they are not given [default demo]")
    group.add_argument("--out", default="", help=f"directory of the results [default {out}]")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")
    return group


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, with the nearest option for a typo."""

    def parse_args(self, arguments):
        """As argparse's, remembering the words for `error`."""
        self.words = arguments
        return super().parse_args(arguments)

    def error(self, message):
        """UserError, so that a mistake ends in one line and exit status 2."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in (w.split("=")[0] for w in self.words if w.startswith("--")):
            near = difflib.get_close_matches(word, known, 1)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
        raise UserError(f"{message} (--help lists the options)")


def command(arguments):
    """The command line: train (with no word), status RUN, evaluate RUN, predict RUN IMAGE..., compare. Returns the exit
    status."""
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    rest = arguments[1:] if arguments[:1] == [verb] else arguments
    describe = argparse.RawDescriptionHelpFormatter
    if verb in ("status", "evaluate", "predict", "compare") and started_by_torchrun():
        raise UserError(f"{verb}: takes one process; give `python train.py {verb} ...`, without torchrun")
    if verb == "train":
        parser = Parser(prog="train.py", formatter_class=describe, allow_abbrev=False, description=TRAIN_HELP)
        group = add_run_options(parser, "runs/METHOD-[SOURCE-]TARGET-sSEED")
        group.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
        group.add_argument("--profile", action="store_true", help="do not train; measure where a step's time goes, and write a "
                           "trace into --out")
        add_settings(parser)
        given = vars(parser.parse_args(rest))
        preset, out, device, resume, measure = (given.pop(name) for name in ("preset", "out", "device", "resume", "profile"))
        if resume and measure:
            raise UserError("--profile: measures a run from its settings, not an unfinished one; leave out --resume")
        settings = None if resume and out else make_settings(preset, **given)
        if not out:
            source = "" if settings.source == "mannequin" else f"{settings.source}-"
            out = f"runs/{settings.method}-{source}{settings.target}-s{settings.seed}"
        out = Path(out)
        if measure:
            try:
                with Stopping(lambda: "a profile saves nothing before its end"):
                    profile(settings, out, device)
            except NotFinite as e:
                raise UserError(f"--profile: the loss is not finite after {e.record['step']} steps; lower --lr") from None
            return 0
        if resume:
            settings, device = resumed_settings(out, given), resumed_device(out, device)
        result = train(settings, out, device, resume, arguments)
        if started_by_torchrun() and int(os.environ["RANK"]) > 0:      # of several processes the first one speaks
            return 0
        print_result(result)
        print(f"{speed_text(read_lines(out / 'speed.jsonl', *SPEED_KEYS))}; pictures in {out / 'figures'}")
    elif verb == "status":
        parser = Parser(prog="train.py status", description="Say where a run stands and draw its curves.")
        parser.add_argument("run", help="directory of the run, which may be going on")
        print_status(Path(parser.parse_args(rest).run))
    elif verb == "evaluate":
        parser = Parser(prog="train.py evaluate", description="Repeat the evaluation of a run's last checkpoint.")
        parser.add_argument("run", help="directory of the run")
        parser.add_argument("--device", default="auto", help="cpu, cuda, ... [default: a GPU if there is one]")
        options = parser.parse_args(rest)
        evaluate_run(Path(options.run), choose_device(options.device))
    elif verb == "predict":
        parser = Parser(prog="train.py predict", formatter_class=describe, allow_abbrev=False, description=PREDICT_HELP)
        parser.add_argument("run", help="directory of the run")
        parser.add_argument("inputs", nargs="+", metavar="image",
                            help=f"a picture, or a folder of them ({' '.join(SUFFIXES)})")
        parser.add_argument("--out", required=True, help="directory of the results")
        parser.add_argument("--box", type=box_numbers, metavar="X,Y,W,H", help="the part of each picture that shows the "
                            "person or hand: corner, width and height in its pixels [default: the whole picture]")
        parser.add_argument("--network", choices=("student", "teacher"), default="student", help="[default student]")
        parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time [default 32]")
        parser.add_argument("--device", default="auto", help="cpu, cuda, ... [default: a GPU if there is one]")
        options = parser.parse_args(rest)
        if options.batch_size < 1:
            raise UserError(f"--batch-size: must be at least 1, got {options.batch_size}")
        return predict_run(Path(options.run), options.inputs, Path(options.out), options.box, options.network,
                           options.batch_size, choose_device(options.device))
    elif verb == "compare":
        parser = Parser(prog="train.py compare", formatter_class=describe, allow_abbrev=False, description=COMPARE_HELP)
        group = add_run_options(parser, "runs/compare")
        group.add_argument("--methods", default=",".join(METHODS), help="rows of the table [default: the five methods]")
        group.add_argument("--seeds", default="0,1,2", help="seeds of each row [default 0,1,2]")
        group.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores [default 1]")
        add_settings(parser, skip=("method", "seed"))
        given = vars(parser.parse_args(rest))
        names, seeds, jobs, preset, out, device = (given.pop(name) for name in ("methods", "seeds", "jobs", "preset", "out",
                                                                                "device"))
        try:
            seeds = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds: comma-separated whole numbers, got {seeds!r}") from None
        if jobs < 1:
            raise UserError(f"--jobs: must be at least 1, got {jobs}")
        with Stopping(lambda: "the same command goes on"):
            compare(names.split(","), seeds, out or "runs/compare", jobs, preset, device, given)
    else:
        near = difflib.get_close_matches(verb, ("train", "status", "evaluate", "predict", "compare"), 1)
        raise UserError(f"unknown command {verb!r}{f', did you mean {near[0]}?' if near else ''}; use train "
                        f"(the default), status RUN, evaluate RUN, predict RUN IMAGE... or compare")
    return 0


def main(arguments):
    """`command`, with an error in one line: exit status 0, 1 when some photographs failed, 2 for a mistake that the user
    can mend or a full disk, 130 for Ctrl-C, 143 for SIGTERM.

    One of several processes ends here and now: after an error, to leave Python in order can wait for the others for ever.
    """
    try:
        status = one_line(arguments)
    except Exception:
        if processes() == 1:
            raise
        traceback.print_exc()
        status = 1
    if started_by_torchrun():        # gloo's threads now and then abort a process that leaves Python in order, work done or not
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def one_line(arguments):
    """`command` and its exit status; errors that have a message in one line."""
    try:
        return command(arguments)
    except (UserError, data.DataError) as e:
        complain(e)
    except BrokenPipeError:                                  # `status RUN | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as e:
        complain(f"{e.filename or 'system'}: {e.strerror or e}")
    except Stopped as e:
        if not started_by_torchrun() or os.environ["RANK"] == "0":
            complain(e)
        return 128 + e.number
    except KeyboardInterrupt:
        training = arguments[:1] not in (["evaluate"], ["predict"], ["status"])
        complain("interrupted" + ("; --resume goes on from what was saved last" if training else ""))
        return 130
    return 2


def saved_settings(out):
    """Settings from a run's config.json; what an older version did not have takes its default."""
    path, known = out / "config.json", {f.name: f for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in read_json(path).items() if name in known}
    for name, value in values.items():
        kind = type(known[name].default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{path}: damaged ({name} is {value!r}, not a {kind.__name__}); mend it, or remove {out} and run "
                            f"again")
    return Settings(**values)


def saved_skeleton(out):
    """The skeleton of a run's data, which may not be here, from its config.json."""
    saved = read_json(out / "config.json").get("skeleton")
    try:
        limbs, triplets = (tuple(map(tuple, saved[name])) for name in ("limbs", "triplets"))
        groups = {name: tuple(keypoints) for name, keypoints in saved["groups"].items()}
        skeleton = data.Skeleton(tuple(saved["names"]), limbs, triplets, groups, tuple(saved["root"]))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{out / 'config.json'}: holds no skeleton that can be used ({type(e).__name__}: {e}); give a run of "
                        f"this version") from None
    return skeleton


def resumed_settings(out, given):
    """The settings that a run was started with; UserError where the command line asks for others."""
    settings = saved_settings(out)
    for name, value in given.items():
        if getattr(settings, name) != value and name not in WITHOUT_EFFECT:
            raise UserError(f"--{name.replace('_', '-')}: the run in {out} was started with {getattr(settings, name)}; "
                            f"leave the option out with --resume, or start a new run")
    return settings


def resumed_device(out, name):
    """The device to go on with: the one that the run was started on, where none is asked for and it is there."""
    if name == "auto":
        was = str(read_json(out / "config.json").get("device"))
        if started_by_torchrun():
            was = was.split(":")[0]                               # process 0 wrote its own GPU's number there
        with suppress(UserError):
            choose_device(was)
            return was
    return name


def print_status(out):
    """Where a run stands, from its files alone, so also while it goes on; draws figures/curves.png."""
    settings = saved_settings(out)
    log, speed = read_lines(out / "log.jsonl", *LOG_KEYS), read_lines(out / "speed.jsonl", *SPEED_KEYS)
    print(f"{out}: {settings.method}, {settings.source} -> {settings.target}, seed {settings.seed}")
    over = finished(out)
    print(f"{len(log)} of {settings.epochs} epochs done" + (", finished" if over else ""))
    if log:
        terms = {name: value for name, value in log[-1].items() if name != "epoch" and isinstance(value, (int, float))}
        print(f"epoch {log[-1]['epoch'] + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in terms.items()))
    validated = [row for row in log if "val_student" in row]
    if validated:
        row = validated[-1]
        print(f"validation PCK@0.05 after epoch {row['epoch'] + 1}: student {shown(row['val_student'])}"
              + (f", teacher {shown(row['val_teacher'])}" if "val_teacher" in row else ""))
    if (out / "result.json").exists():
        print_result(read_result(out / "result.json"))
    if speed:
        recent = speed[-6:]
        pace = recent[-1]["seconds"]
        if len(recent) > 1:                                 # from end to end: validation and saving included
            pace = (recent[-1]["total_seconds"] - recent[0]["total_seconds"]) / (len(recent) - 1)
        left = pace * (settings.epochs - len(speed))
        print(speed_text(speed) + ("" if over else f", about {left // 60:.0f}:{left % 60:02.0f} left"))
    for name in ("last.pt", "previous.pt"):
        if name == "last.pt" and has_checkpoint(out) or (out / name).exists():
            with suppress(FileNotFoundError):
                with open(out / name, "rb") as f:
                    if _checksum_fits(f):
                        continue
            print(f"{name}: missing or damaged (no checksum that fits)")
    written = max(file.stat().st_mtime for file in out.iterdir() if file.is_file())
    print(f"last wrote {max(time.time() - written, 0):.0f} s ago"
          + ("" if over else f"; if nothing runs, `{resume_command(out)}` goes on"))
    if log:
        draw_curves(out / "figures" / "curves.png", log, settings.pretrain_epochs if settings.adapt else None)
        print(f"curves in {out / 'figures' / 'curves.png'}")


def evaluate_run(out, device):
    """Score a run's last checkpoint again and say whether the figures are those of result.json."""
    settings = saved_settings(out)
    checkpoint = load_run(out / "last.pt")
    run = set_up(settings, device, checkpoint, out / "last.pt")
    run.load(checkpoint, out / "last.pt")
    scores, _ = evaluate(run)
    result = {**scores["student"], "teacher": scores.get("teacher")}
    print_result(result)
    if not (out / "result.json").exists():
        steps = f" and {checkpoint['position']['batch']} steps" if checkpoint["position"] else ""
        print(f"after {checkpoint['epoch'] + 1} of {settings.epochs} epochs{steps}; the run is not finished, "
              f"`{resume_command(out)}` goes on")
        return
    stored = read_result(out / "result.json")
    other = [key for key in result if stored.get(key) != result[key]]
    if other:
        raise UserError(f"{out / 'result.json'}: other figures of {', '.join(other)} (all {shown(stored['pck']['all'], 3)}, now "
                        f"{shown(result['pck']['all'], 3)}); the last digits depend on the machine, the device and the "
                        f"number of threads, anything more means that the run's files do not belong together")
    print(f"the same as {out / 'result.json'}")


TRAIN_HELP = """Train ACTUPose or a baseline. With no option: ACTUPose on the built-in benchmark, in minutes on a CPU.

  python train.py                                          the demo
  python train.py --method udape --seed 1                  a baseline, another seed
  python train.py --target lsp --target-root DIR           adapt to real photographs
  python train.py --architecture resnet18 --image-size 128 --weights imagenet
  python train.py --resume --out RUN                       go on with a run that was stopped or killed, to the same bits
  python train.py status RUN                               where a run stands, also while it goes on
  python train.py evaluate RUN                             score a finished run again
  python train.py predict RUN IMAGE_OR_FOLDER... --out DIR draw skeletons on photographs
  python train.py compare --methods udape,actupose         several runs, one table

Each option shows its default and, where it differs, the paper's value, which --preset paper takes."""

PREDICT_HELP = """Find the keypoints of photographs with a run's network: for each a picture with the skeleton and a JSON file.

Pictures may have any size and mode; EXIF orientation is applied, and the keypoints are in pixels of the upright picture,
the centre of its first pixel at (0, 0). Confidence is the height of the heatmap's peak. Subfolders are not searched. A
file that cannot be read is named, the others are done, and the exit status is 1."""

COMPARE_HELP = f"""Run what is missing of methods x seeds, skip what is finished, print the table in Markdown.

methods:   {', '.join(METHODS)}
ablations: {', '.join(ABLATIONS)} (ACTUPose with one thing changed)"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
