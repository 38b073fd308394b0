"""Train, evaluate, predict and compare: `python train.py` runs ACTUPose on the built-in benchmark.

    settings       one dataclass; the command line, the presets and config.json come from it
    data           which datasets a run uses, and in which order
    processes      what the processes of one run share, when torchrun starts several
    the step       one iteration of the method (Fig. 4 of the paper), assembled from actupose.py
    the loop       `train`: one run, from top to bottom
    evaluation     the published scores
    checkpoints    last.pt and previous.pt, published weights
    pictures       drawn with Pillow into figures/
    photographs    skeletons for any picture
    compare        many runs, one table
    main           the command line
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps

import actupose
import data
import kernels
from data import (Progress, colour_jitter, compose_views, denormalise, invert_view, letterbox, letterbox_view,
                  map_keypoints, normalise, random_affine_view, random_crop_view, render_heatmaps, replacing,
                  warp, write_text)


class UserError(Exception):
    """A mistake that the user can mend: printed on one line, exit status 2."""


# ----------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------

# A method is the one loop with parts on or off; an ablation is ACTUPose with one setting changed.
METHODS = {
    "source-only": dict(adapt=False, curriculum="off", style="off", w_evalpose=0.0, w_cross=0.0),
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
    "no-occlusion": dict(occlusion=0.0),
}
# --preset paper: §4 of the paper and the published base method. All other values are the defaults below.
PAPER = dict(architecture="resnet101", weights="imagenet", image_size=256, sigma=2.0, subcell=False,
             iters_per_epoch=500, workers=8, lr=1e-4, lr_factor=0.1, ema=0.999,
             pace=2.0, vae_steps=20000, style="vgg", style_iters=20000)

# Rendered domains: the arguments of data.Mannequin.
RENDERED = {"mannequin": dict(domain="source"), "mannequin-wild": dict(domain="target")}
# Datasets on disk: their loaders.
SOURCES = {"surreal": data.SURREAL, "rhd": data.RenderedHandPose}
TARGETS = {"lsp": data.LSP, "human36m": data.Human36M, "h3d": data.Hand3DStudio}


def option(default, group, text, choices=None, low=None, above=None, high=None):
    """A field of Settings: its default, what --help says, and the values it takes (low <= or above < value <= high)."""
    return field(default=default, metadata=dict(group=group, help=text, choices=choices, low=low, above=above,
                                                high=high))


@dataclass
class Settings:
    """Everything that decides a run's result. The defaults are the demo's."""
    method: str = option("actupose", "task", "which of the paper's rows to train", tuple(METHODS))
    source: str = option("mannequin", "task", "labelled source domain", (*RENDERED, *SOURCES))
    source_root: str = option("", "task", "directory of the source dataset, for a source on disk")
    target: str = option("mannequin-wild", "task", "unlabelled target domain", ("mannequin-wild", *TARGETS))
    target_root: str = option("", "task", "directory of the target dataset, for a target on disk")
    shoulders: str = option("published", "task", "shoulders of surreal: published (its collar joints, as in all "
                            "published results) or true", ("published", "true"))
    source_count: int = option(6000, "task", "rendered source training images", low=1)
    target_count: int = option(2000, "task", "rendered unlabelled target images", low=1)
    seed: int = option(0, "task", "seed of the data, initialisation, augmentation and every draw", low=0)
    cache: str = option("", "task", "directory for rendered images, safe to delete [default: render anew, ~20 s]")

    architecture: str = option("narrow", "network", "pose network", tuple(actupose.ARCHITECTURES))
    weights: str = option("", "network", "what the pose network starts from: imagenet (torchvision's file, fetched "
                          "once), a file of torchvision's, RegDA's, UDAPE's or ours, or the directory of a run")
    image_size: int = option(64, "network", "side of the input in pixels", low=32)
    sigma: float = option(1.0, "network", "deviation of a target heatmap's Gaussian in cells", above=0)
    subcell: bool = option(True, "network", "targets and decoding finer than a heatmap cell; off: the published "
                           "protocol, cells against cells")

    epochs: int = option(70, "schedule", "epochs in all", low=1)
    pretrain_epochs: int = option(40, "schedule", "epochs on the source before the teacher joins", low=0)
    iters_per_epoch: int = option(30, "schedule", "iterations per epoch", low=1)
    batch_size: int = option(32, "schedule", "images of each domain per batch, over all processes", low=1)
    workers: int = option(0, "schedule", "threads that decode batches ahead (0: none)", low=0)
    lr: float = option(1e-3, "schedule", "learning rate of Adam", above=0)
    lr_drops: tuple = option((45, 60), "schedule", "epochs at which it drops, counted from 0")
    lr_factor: float = option(0.3, "schedule", "factor of each drop", above=0)
    ema: float = option(0.99, "schedule", "decay of the teacher's moving average", low=0, high=1)

    curriculum: str = option("active", "curriculum (§3.1)", "source samples of an epoch: active (Eq. 3-4), off "
                             "(all), or the hardest bins", ("active", "off", "hardest"))
    bins: int = option(25, "curriculum (§3.1)", "N_b, complexity bins", low=1)
    hard_bins: int = option(8, "curriculum (§3.1)", "bins that udape+vae-hm trains on", low=1)
    pace: float = option(6.0, "curriculum (§3.1)", "lambda of Eq. 3: how fast the peak moves to hard bins", above=0)
    spread: float = option(0.25, "curriculum (§3.1)", "sigma of Eq. 3", above=0)
    scale: str = option("rank", "curriculum (§3.1)", "s_j of Eq. 3: a bin's rank, or its min-max scaled mean score",
                        ("rank", "minmax"))
    rescoring: str = option("relative", "curriculum (§3.1)", "Eq. 4: relative to the mean confidence, literal "
                            "(cumulative), off", ("relative", "literal", "off"))
    vae_steps: int = option(1500, "curriculum (§3.1)", "training steps of the Pose-VAE", low=1)

    supervise: str = option("source", "adaptation (§3.2)", "whose labels are used: target makes the oracle",
                            ("source", "target"))
    adapt: bool = option(True, "adaptation (§3.2)", "teacher and consistency after the pretraining epochs")
    mask_ratio: float = option(0.5, "adaptation (§3.2)", "share of pseudo-labels, the least confident, left out",
                               low=0, high=1)
    occlusion: float = option(0.5, "adaptation (§3.2)", "probability of hiding a confident keypoint from the "
                              "student", low=0, high=1)
    style: str = option("small", "adaptation (§3.2)", "style transfer networks; small is trained on the run's own "
                        "images", ("small", "vgg", "off"))
    style_weights: str = option("", "adaptation (§3.2)", "directory of vgg_normalised.pth, and of decoder.pth if it "
                                "is not to be trained on the two domains")
    style_prob: float = option(0.5, "adaptation (§3.2)", "probability of restyling a batch, each direction", low=0,
                               high=1)
    style_iters: int = option(300, "adaptation (§3.2)", "iterations that train the style networks", low=1)

    rotation: float = option(60.0, "augmentation (§3.2)", "random rotation of the views, +- degrees", low=0)
    shear: float = option(30.0, "augmentation (§3.2)", "random shear of the views, +- degrees", low=0, high=80)
    translate: float = option(0.05, "augmentation (§3.2)", "random translation, +- share of the side", low=0)
    zoom: tuple = option((0.6, 1.3), "augmentation (§3.2)", "random scale of the views: low,high", above=0)
    crop: tuple = option((0.6, 1.3), "augmentation (§3.2)", "area of the random resized crop: low,high", above=0)
    jitter: float = option(0.25, "augmentation (§3.2)", "strength of the colour jitter", low=0, high=1)

    w_udape: float = option(1.0, "losses (§3.3-3.4)", "w1 of Eq. 8", low=0)
    w_evalpose: float = option(0.1, "losses (§3.3-3.4)", "w2 of Eq. 8, EvalPose (Eq. 5)", low=0)
    w_cross: float = option(0.01, "losses (§3.3-3.4)", "w3 of Eq. 8, cross-domain features (Eq. 6)", low=0)
    beta: float = option(50.0, "losses (§3.3-3.4)", "sharpness of the soft-argmax", above=0)
    gamma: float = option(0.06, "losses (§3.3-3.4)", "Gamma, the threshold on Eq. 7 in radians", low=0)

    amp: str = option("auto", "speed", "bf16: networks compute in bfloat16 in training, losses and evaluation stay "
                      "in float32; auto: bf16 where the processor or GPU computes in it", ("auto", "bf16", "off"))
    compile: bool = option(False, "speed", "compile the pose networks (torch.compile): minutes at the start")

    def __post_init__(self):
        """Check every setting; UserError names the option, what is wrong and what it takes."""
        def require(fits, name, rule):
            if not fits:
                raise UserError(f"--{name.replace('_', '-')}: {rule}, got {show(getattr(self, name)) or 'nothing'}")

        for f in dataclasses.fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if isinstance(f.default, tuple):
                value = tuple(value)
                setattr(self, f.name, value)
            require(not rule["choices"] or value in rule["choices"], f.name, f"use {' or '.join(rule['choices'] or ())}")
            for number in value if isinstance(value, tuple) else (value,) if not isinstance(value, str) else ():
                require(math.isfinite(number), f.name, "must be finite")
                require(rule["low"] is None or number >= rule["low"], f.name, f"must be at least {rule['low']}")
                require(rule["above"] is None or number > rule["above"], f.name, f"must be above {rule['above']}")
                require(rule["high"] is None or number <= rule["high"], f.name, f"must be at most {rule['high']}")
        for name in ("zoom", "crop"):
            value = getattr(self, name)
            require(len(value) == 2 and value[0] <= value[1], name, "must be two numbers low,high with low <= high")
        require(self.image_size % 32 == 0, "image_size", "must be a multiple of 32")
        require(self.hard_bins <= self.bins, "hard_bins", f"must be at most --bins ({self.bins})")
        require(not self.adapt or self.pretrain_epochs < self.epochs, "pretrain_epochs",
                f"must be below --epochs ({self.epochs}) or the teacher never joins; give both")
        require(self.source != self.target, "target", "must differ from --source")
        require(self.weights != "imagenet" or self.architecture in IMAGENET_FILES, "architecture",
                f"--weights imagenet needs {' or '.join(IMAGENET_FILES)}")
        require(self.supervise == "source" or self.curriculum == "off", "curriculum",
                "the curriculum ranks source samples, so --supervise target needs off (or use --method oracle)")
        require(self.style != "small" or not self.style_weights, "style", "--style-weights are VGG's; use vgg")
        require(self.style != "vgg" or self.style_weights, "style_weights",
                "--style vgg needs the directory of vgg_normalised.pth (or use --style small)")
        for name, loaders in (("source", SOURCES), ("target", TARGETS)):
            domain, root = getattr(self, name), getattr(self, f"{name}_root")
            require(domain not in loaders or root, f"{name}_root", f"--{name} {domain} needs its directory")
            require(domain in loaders or not root, f"{name}_root", f"{domain} is rendered, not read; leave it out "
                    f"or use --{name} {' or '.join(loaders)}")
        check_skeletons(self, skeleton_of(self.source), skeleton_of(self.target))


def show(value):
    """A setting as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def skeleton_of(name):
    """The skeleton of a --source or --target; None where its class does not say."""
    return getattr({**SOURCES, **TARGETS}.get(name, data.Mannequin), "skeleton", None)


def check_skeletons(settings, source, target):
    """UserError where source and target do not have the same keypoints."""
    if source and target and source.names != target.names:
        raise UserError(f"--source {settings.source} --target {settings.target}: their keypoints differ "
                        f"({len(source)}: {source.names[0]}, ... and {len(target)}: {target.names[0]}, ...); "
                        f"take two domains of bodies or two of hands")


def make_settings(preset="demo", **given):
    """Settings of a preset, then what the method changes, then what is given; the later wins."""
    values = dict(PAPER) if preset == "paper" else {}
    method = given.get("method", "actupose")
    if method not in METHODS:
        raise UserError(f"--method: use {' or '.join(METHODS)}, got {method}")
    if skeleton_of(given.get("source")) is data.HAND21:
        values["rotation"] = 180.0                         # hands come in every direction, as in the base method
    return Settings(**{**values, **METHODS[method], **given})


# ----------------------------------------------------------------------------------------------------------
# Data of a run
# ----------------------------------------------------------------------------------------------------------


def open_domains(settings):
    """The datasets of a run: labelled source, unlabelled target, val for choices, test for the table.

    Images are rendered or decoded when they are first used. UserError or data.DataError names what is missing.
    """
    s = settings

    def open_split(role, name, split):
        if name in RENDERED:
            count = {"source": s.source_count, "target": s.target_count}[role] if split == "train" else None
            return data.Mannequin(**RENDERED[name], split=split, size=s.image_size, count=count, seed=s.seed,
                                  cache=s.cache or None, progress=Progress(f"rendering {name} {split}"))
        options = dict(shoulders=s.shoulders, progress=Progress("reading surreal")) if name == "surreal" else {}
        root = s.source_root if role == "source" else s.target_root
        try:
            dataset = {**SOURCES, **TARGETS}[name](root, split, s.image_size, **options)
        except FileNotFoundError as e:
            raise UserError(f"--{role}-root: {e}") from None
        data.check_dataset(dataset, f"--{role} {name}")
        return dataset

    domains = SimpleNamespace(source=open_split("source", s.source, "train"),
                              target=open_split("target", s.target, "train"),
                              val=open_split("target", s.target, "val"), test=open_split("target", s.target, "test"))
    check_skeletons(s, domains.source.skeleton, domains.target.skeleton)
    for name in ("source", "target"):
        n = len(getattr(domains, name))
        if n < s.batch_size:
            raise UserError(f"--batch-size: {s.batch_size} is more than the {n} training images of the {name}")
    if s.bins > len(domains.source):
        raise UserError(f"--bins: {s.bins} is more than the {len(domains.source)} training images of the source")
    return domains


@lru_cache(8)
def shuffled(n, seed, i):
    """The order of 0 ... n - 1 in the i-th pass over them."""
    return np.random.default_rng((seed, i)).permutation(n)


def shuffled_batch(n, size, step, seed):
    """The `step`-th batch of `size` positions (size <= n) of endless passes over 0 ... n - 1, each in a new order."""
    i, at = divmod(step * size, n)
    batch = shuffled(n, seed, i)[at:at + size]
    return batch if len(batch) == size else np.concatenate([batch, shuffled(n, seed, i + 1)[:size - len(batch)]])


def prefetch(jobs, workers):
    """Results of the callables `jobs`, in their order, computed ahead by `workers` threads.

    Decoding an image releases Python's lock, so threads are enough.
    """
    if not workers:
        yield from (job() for job in jobs)
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
            for future in waiting:                # an interrupted run does not wait for batches it will not use
                future.cancel()


# ----------------------------------------------------------------------------------------------------------
# Processes: `torchrun --nproc-per-node N train.py ...`
#
# Every process draws the same epoch and the same random numbers, computes its share of each batch, and averages
# gradients with the others. What looks at the whole batch (the confidence mask, the pairs of Eq. 6, BatchNorm on
# GPUs) is gathered. With one process all of this does nothing.
# ----------------------------------------------------------------------------------------------------------


def world_size():
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process; process 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(rows):
    """This process's slice of a batch that all processes hold; world_size() divides its length."""
    count = len(rows) // world_size()
    return rows[rank() * count:(rank() + 1) * count]


def gather(rows):
    """The inverse of `shard`: (N, ...) of every process -> (N * world_size(), ...), by rank. No gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def broadcast(tensors):
    """Give every process the values of process 0, in place: what each computes may differ in the last bits."""
    for tensor in tensors if world_size() > 1 else ():
        on_device = tensor.cuda() if dist.get_backend() == "nccl" else tensor.contiguous()
        dist.broadcast(on_device, 0)
        tensor.copy_(on_device)


def average_gradients(network):
    """Replace the gradients by their mean over the processes, in one message."""
    if world_size() > 1:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / world_size()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


# ----------------------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------------------


def draw_step(settings, step, source, target, num_keypoints):
    """STAGE 1: the old hash."""
    uniform = lambda indices, stream: data.hash_uniform(settings.seed, indices, 40, stream=step * 3 + stream + 1000)
    u = uniform(source, 0)
    r = SimpleNamespace(source_crop=u[:, :3], source_affine=u[:, 3:8], source_jitter=u[:, 8:11], alpha_source=u[:, 11])
    coin = np.random.default_rng((settings.seed, 7, step))
    r.coin = coin
    if target is not None:
        u, v = uniform(target, 1), uniform(target, 2)
        r.target_crop, r.student_affine, r.student_jitter = u[:, :3], u[:, 3:8], u[:, 8:11]
        r.teacher_affine, r.teacher_jitter, r.alpha_target = v[:, 3:8], v[:, 8:11], v[:, 11]
        r.occlusion = u[:, 12:15 + num_keypoints]
    return r


class Trainer:
    """Student, teacher, style networks, optimiser, and the step that trains them."""

    def __init__(self, settings, skeleton, device):
        s = self.settings = settings
        self.skeleton, self.device, self.style_transfer, self.teacher = skeleton, device, None, None
        torch.manual_seed(s.seed)
        student = actupose.PoseResNet(s.architecture, len(skeleton))
        if world_size() > 1 and device.type == "cuda":          # torch has no SyncBatchNorm for CPUs
            student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
        self.student = student.to(device, memory_format=torch.channels_last)
        # A function of the network, not the network, is compiled: its parameters keep their names in checkpoints.
        self.call = torch.compile(_call) if s.compile else _call
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=s.lr, fused=device.type == "cuda")
        self.stride, self.cells = self.student.stride, s.image_size // self.student.stride
        # Decision: the terms of Eq. 8 are sums over the body, averaged over samples: heatmap errors are summed over
        # keypoints and cells, as Eq. 5 is over limbs. Their plain mean is about 1e-3 and would drown under w2 = 0.1.
        self.summed = len(skeleton) * self.cells ** 2
        self.limbs = torch.tensor(skeleton.limbs, device=device)
        self.triplets = torch.tensor(skeleton.triplets, device=device)

    @property
    def uses_target(self):
        """Whether a step needs target images: for their style, or for the teacher."""
        return self.style_transfer is not None or self.teacher is not None

    def autocast(self):
        """The context in which the networks compute: bfloat16 with --amp bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp == "bf16" else nullcontext()

    def forward(self, network, images):
        """Heatmaps (B, K, h, h) and features (B, C) of a pose network, float32."""
        with self.autocast():
            heatmaps, features = self.call(network, images)
        return heatmaps.float(), features.float()

    def crop(self, u):
        """Views (B, 2, 3) of a random resized crop, from uniform numbers (B, 3)."""
        return random_crop_view(u, self.settings.image_size, self.settings.crop)

    def affine(self, u):
        """Views (B, 2, 3) of a random rotation, shear, scale and translation, from uniform numbers (B, 5)."""
        s = self.settings
        return random_affine_view(u, s.image_size, s.rotation, s.shear, s.translate, s.zoom)

    def see(self, images, view, jitter):
        """uint8 images (B, 3, S, S) through a view, with colour jitter (B, 3), normalised."""
        return colour_jitter(warp(normalise(images), view), jitter, self.settings.jitter)

    @torch.no_grad()
    def restyle(self, content, style, coin, alpha):
        """With probability --style-prob the content batch in the style batch's look, with strength alpha."""
        if self.style_transfer is None or coin >= self.settings.style_prob:
            return content
        with self.autocast():
            return self.style_transfer(content, style.roll(1, 0), alpha).float()

    def step(self, step, source_batch, target_batch):
        """One iteration on this process's share of a batch: Fig. 4.

        Batches: (indices (B,), uint8 images (B, 3, S, S), keypoints (B, K, 2) in pixels, visible (B, K)); of the
        target batch (None where nothing needs it) only the images are used. Returns the terms of Eq. 8 and other
        scalars by name, on the device, and the mean confidence of each source sample (B,) for Eq. 4.
        """
        s = self.settings
        indices, images, keypoints, visible = (t.to(self.device, non_blocking=True) for t in source_batch)
        target = target_batch and target_batch[0].to(self.device)
        random = draw_step(s, step, indices, target, len(self.skeleton))
        self.student.train()

        # The source batch in a random view, perhaps in the target's style.
        source_view = compose_views(self.affine(random.source_affine), self.crop(random.source_crop))
        source_images = self.see(images, source_view, random.source_jitter)
        keypoints = map_keypoints(keypoints, source_view)
        labels, weight = render_heatmaps(keypoints, visible, self.cells, self.stride, s.sigma, s.subcell)
        styled = source_images
        if target_batch is not None:
            target_images = target_batch[1].to(self.device, non_blocking=True)
            common = self.crop(random.target_crop)                 # the frame that both views of the target start from
            styled = self.restyle(source_images, warp(normalise(target_images), common), random.coin.random(),
                                  random.alpha_source)
        predicted, features = self.forward(self.student, styled)
        mse = actupose.heatmap_mse(predicted, labels, weight)
        # Eq. 4 wants a sample's mean confidence; keypoints that the view cut off do not count.
        cells, confidence, mean_confidence = kernels.heatmap_argmax_mean(predicted, weight)
        terms = dict(mse=self.summed * mse, confidence=mean_confidence.mean())
        udape, evalpose, cross = self.summed * mse, 0.0, 0.0

        if self.teacher is not None:
            # The teacher sees the target in its own view, perhaps in the source's style, and gives pseudo-labels.
            student_view, teacher_view = self.affine(random.student_affine), self.affine(random.teacher_affine)
            with torch.no_grad():
                teacher_images = self.see(target_images, compose_views(teacher_view, common), random.teacher_jitter)
                teacher_images = self.restyle(teacher_images, source_images, random.coin.random(), random.alpha_target)
                self.teacher.train()                               # batch statistics, as in the base method
                maps, teacher_features = self.forward(self.teacher, teacher_images)
                maps = warp(maps, invert_view(teacher_view), self.stride)               # into the common frame
                pseudo, pseudo_cells, pseudo_confidence = actupose.rectify(maps, s.sigma, s.subcell)
                all_cells, all_features = gather(pseudo_cells), gather(teacher_features)
                all_sure = actupose.confidence_mask(gather(pseudo_confidence), s.mask_ratio)
                # Decision: what the student's view does not show, it is not asked to predict.
                in_view = map_keypoints(pseudo_cells * self.stride, student_view)
                mask = shard(all_sure) & ((in_view >= 0) & (in_view <= s.image_size - 1)).all(-1)
                student_images = self.see(target_images, compose_views(student_view, common), random.student_jitter)
                student_images, hidden = actupose.occlude_keypoints(
                    student_images, in_view, pseudo_confidence, random.occlusion, half=s.image_size * 10 / 256,
                    probability=s.occlusion)

            # The student sees it in another view, with a confident keypoint hidden, and has to agree.
            on_target, _ = self.forward(self.student, student_images)
            on_target = warp(on_target, invert_view(student_view), self.stride)
            consistency = actupose.consistency_loss(on_target, pseudo, mask)
            udape = self.summed * (mse + consistency)
            terms.update(consistency=self.summed * consistency, kept=mask.float().mean(),
                         teacher_confidence=pseudo_confidence.mean())
            if s.w_evalpose:
                evalpose = (actupose.evalpose(kernels.soft_argmax(predicted, s.beta), keypoints / self.stride,
                                              self.limbs, weight)
                            + actupose.evalpose(kernels.soft_argmax(on_target, s.beta), pseudo_cells, self.limbs, mask))
                terms["evalpose"] = evalpose
            if s.w_cross:
                # Poses are compared (Eq. 7) as they stand in the image: a sheared view has other angles.
                if s.subcell:
                    cells = cells + actupose.subcell_offset(predicted.detach(), cells, confidence)
                pose = map_keypoints(cells * self.stride, invert_view(source_view))
                pairs = actupose.mine_pairs(pose, all_cells, self.triplets, s.gamma, weight > 0, all_sure,
                                            capacity=len(pose) * len(all_cells))
                # Eq. 6 sums over pairs, and gradients are averaged over processes: a share's sum is scaled up.
                cross = world_size() * actupose.cross_domain_loss(features, all_features, pairs)
                terms.update(cross_domain=cross, pairs=world_size() * (pairs[:, 0] >= 0).float().sum())

        loss = actupose.total_loss(udape, evalpose, cross, (s.w_udape, s.w_evalpose, s.w_cross))          # Eq. 8
        self.optimiser.zero_grad()
        loss.backward()
        average_gradients(self.student)
        self.optimiser.step()
        if self.teacher is not None:
            actupose.update_teacher(self.teacher, self.student, s.ema)
        terms["loss"] = loss
        return {name: value.detach() for name, value in terms.items()}, mean_confidence

    def set_learning_rate(self, epoch):
        """--lr times --lr-factor at each of --lr-drops; returns it."""
        s = self.settings
        lr = s.lr * s.lr_factor ** sum(epoch >= drop for drop in s.lr_drops)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    def scored_teacher(self):
        """The teacher as it is scored, None before it joins.

        Decision: its parameters with the student's BatchNorm statistics; its own are those of strongly augmented,
        restyled views in training mode and fit clean images badly.
        """
        if self.teacher is None:
            return None
        teacher = actupose.make_teacher(self.teacher)
        for own, students in zip(teacher.buffers(), self.student.buffers()):
            own.copy_(students)
        return teacher

    @torch.no_grad()
    def decode(self, network, images):
        """uint8 images (B, 3, S, S) -> keypoints (B, K, 2) in their pixels and confidences (B, K), on the CPU."""
        images = normalise(images.to(self.device)).contiguous(memory_format=torch.channels_last)
        cells, confidence = actupose.decode_keypoints(network.eval()(images)[0], self.settings.subcell)
        return cells.cpu() * self.stride, confidence.cpu()


def _call(network, images):
    return network(images)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------


def batches(run, pool, steps):
    """Jobs for `prefetch`, one per step: each loads (source indices (B,) of all processes, source batch, target
    batch), the batches as `Trainer.step` takes them."""
    s, target = run.settings, run.domains.target if run.trainer.uses_target else None
    pin = run.trainer.device.type == "cuda"                    # from pinned memory the copy to the GPU is asynchronous

    def load(dataset, indices):
        batch = (indices, *dataset[indices])
        return tuple(t.pin_memory() for t in batch) if pin else batch

    for step in steps:
        # An active pool is new in each epoch and already in random order; a fixed one is passed over again and again.
        at = ((np.arange(s.batch_size) + (step - steps[0]) * s.batch_size) % len(pool) if s.curriculum == "active"
              else shuffled_batch(len(pool), s.batch_size, step, s.seed))
        source = torch.from_numpy(pool[at])
        unlabelled = target and shard(torch.from_numpy(shuffled_batch(len(target), s.batch_size, step, s.seed + 1)))
        yield lambda source=source, unlabelled=unlabelled: (
            source, load(run.labelled, shard(source)), target and load(target, unlabelled))


def train(settings, out, device="auto", resume=False):
    """One run: data, epochs, result.json and figures/ in the directory `out`. Returns the result.

    Killed at any moment and called again with `resume`, it goes on from its last finished epoch and writes the same
    result.json, log.jsonl and weights, bit for bit on a CPU with the same number of threads. Raises UserError for
    what the user can mend.
    """
    out, device = Path(out), choose_device(device)
    s = settings = resolve_amp(settings, device)
    checkpoint = newest_checkpoint(out) if resume else refuse_to_overwrite(out)
    run = set_up(settings, device, checkpoint)
    trainer, curriculum, log = run.trainer, run.curriculum, run.log
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)                 # only now: a mistake above leaves no directory behind
        if checkpoint is None:
            write_config(out, settings, trainer.skeleton, device)
    progress, started = Progress(s.method), time.time()

    for epoch in range(len(log), s.epochs):
        if s.adapt and epoch == s.pretrain_epochs:
            trainer.teacher = actupose.make_teacher(trainer.student)
        lr, begun = trainer.set_learning_rate(epoch), time.time()

        # The source samples of this epoch.
        if s.curriculum == "active":
            pool = curriculum.sample(epoch)                                                               # Eq. 3
            run.drawn.append(curriculum.drawn_per_bin.tolist())
        elif s.curriculum == "hardest":
            pool = curriculum.hardest(s.hard_bins)
        else:
            pool = np.arange(len(run.labelled))

        # One step per batch.
        steps = range(epoch * s.iters_per_epoch, (epoch + 1) * s.iters_per_epoch)
        sums, seen, confidences, unchecked = {}, [], [], []
        for step, (indices, source, target) in zip(steps, prefetch(batches(run, pool, steps), s.workers)):
            terms, confidence = trainer.step(step, source, target)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value
            seen.append(indices)
            confidences.append(confidence)
            unchecked.append((step, indices, terms))
            if device.type == "cpu" or len(unchecked) == 50 or step == steps[-1]:      # on a GPU each look waits
                check_finite(unchecked, run, out)
                unchecked = []
            progress(step + 1, s.epochs * s.iters_per_epoch, f"epoch {epoch + 1}/{s.epochs}")
        check_finite_weights(trainer.student, epoch, out)

        # What the student was sure of in this epoch decides the ranking of the next.
        if s.curriculum == "active":
            curriculum.observe(torch.cat(seen), gather(torch.stack(confidences, 1)).T.flatten().cpu())
            curriculum.rerank()                                                                           # Eq. 4

        means = gather(torch.stack(list(sums.values()))[None]).mean(0).tolist()
        row = {"epoch": epoch, "lr": lr, "pool": len(pool),
               **{name: value / s.iters_per_epoch for name, value in zip(sums, means)}}
        if s.curriculum == "active":
            row["peak_bin"] = curriculum.peak_bin(epoch)
        seconds = time.time() - begun
        for network in filter(None, (trainer.student, trainer.teacher)):
            broadcast(network.buffers())                       # BatchNorm's statistics, where each process has its own
        if (epoch + 1) % 10 == 0 or epoch + 1 == s.epochs:
            row.update(validate(run))
        log.append(row)
        if rank() == 0:
            save_checkpoint(out / "last.pt", state_of(run))
            write_lines(out / "log.jsonl", log)
            write_speed(out / "speed.jsonl", epoch, seconds, s, trainer, time.time() - started)

    scores, predictions = evaluate(run)
    result = {"method": s.method, "source": s.source, "target": s.target, "seed": s.seed, **scores["student"],
              "teacher": scores.get("teacher"), "val": log[-1]["val_student"], "epochs": s.epochs}
    if rank() == 0:
        write_lines(out / "log.jsonl", log)                    # again: a run killed after its last checkpoint ends here
        draw_figures(run, scores, predictions, out / "figures")
        write_json(out / "result.json", result)                # last: with it the run is finished
    return result


def check_finite(steps, run, out):
    """UserError at the first step, of (step, indices, terms), whose loss is not finite in any process."""
    losses = gather(torch.stack([terms["loss"] for _, _, terms in steps])[None])
    finite = torch.isfinite(losses).all(0).tolist()
    if not all(finite):
        step, indices, terms = steps[finite.index(False)]
        found = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
        raise UserError(f"step {step}: the loss is not finite ({found}); source samples "
                        f"{', '.join(run.labelled.names(indices))}. Lower --lr, --w-evalpose or --w-cross"
                        f"{last_good_state(out)}")


def check_finite_weights(network, epoch, out):
    """UserError where a step with a finite loss has left weights that are not."""
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"epoch {epoch}: {name} is not finite after a step. Lower --lr{last_good_state(out)}")


def last_good_state(out):
    """What a message says of the last checkpoint."""
    return f"; {out / 'last.pt'} keeps the last good state" if (out / "last.pt").exists() else ""


def set_up(settings, device, checkpoint=None):
    """Data, Pose-VAE, curriculum, networks and style transfer of a run; from a checkpoint where one is given.

    Returns a namespace: settings, domains, labelled (the dataset whose labels are used), vae, curriculum, trainer,
    log (a row per finished epoch) and drawn (per epoch, the samples drawn from each bin: Fig. 5).
    """
    s, path = settings, "last.pt"
    weights = read_weights(s) if s.weights and checkpoint is None else None
    domains = open_domains(s)
    source, skeleton = domains.source, domains.source.skeleton
    trainer = Trainer(s, skeleton, device)
    if weights is not None:
        load_initial_weights(trainer.student, *weights)
    if checkpoint is None:
        vae = actupose.train_pose_vae(source.keypoints, source.visible, skeleton.root, s.vae_steps, seed=s.seed)
    else:
        vae = actupose.PoseVAE(len(skeleton)).eval()
        load_weights(vae, checkpoint["vae"], path)
    broadcast(vae.state_dict().values())
    complexity = actupose.pose_complexity(vae, source.keypoints, source.visible, skeleton.root)
    broadcast([complexity])
    try:
        curriculum = actupose.ActiveCurriculum(complexity.numpy(), s.epochs, s.bins, s.pace, s.spread, s.scale,
                                               s.rescoring, s.seed)
    except ValueError as e:
        raise UserError(f"curriculum: {e}") from None
    if s.curriculum == "hardest" and len(curriculum.hardest(s.hard_bins)) < s.batch_size:
        raise UserError(f"--hard-bins: {s.hard_bins} bins hold fewer samples than a batch ({s.batch_size})")
    if checkpoint is None:
        trainer.style_transfer = prepare_style(s, domains, device)           # last: it can take an hour
        if trainer.style_transfer is not None:
            broadcast(trainer.style_transfer.state_dict().values())
    elif checkpoint["style"] is not None:
        trainer.style_transfer = actupose.StyleTransfer(s.style).to(device).requires_grad_(False).eval()
        load_weights(trainer.style_transfer, checkpoint["style"], path)
    run = SimpleNamespace(settings=s, domains=domains, vae=vae, curriculum=curriculum, trainer=trainer, log=[],
                          drawn=[], labelled=domains.target if s.supervise == "target" else source)
    if checkpoint is not None:
        load_networks(trainer, checkpoint, path)
        try:
            trainer.optimiser.load_state_dict(checkpoint["optimiser"])
            curriculum.load_state_dict(checkpoint["curriculum"])
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{path}: {e}; resume with the data that the run was started on") from None
        run.log, run.drawn = checkpoint["log"], checkpoint["drawn"]
    return run


def prepare_style(settings, domains, device):
    """The style transfer networks of a run, trained on the images of its two domains; None when off."""
    s = settings
    if s.style == "off":
        return None
    torch.manual_seed(s.seed)
    transfer = actupose.StyleTransfer(s.style).to(device)
    if s.style_weights:
        folder = Path(s.style_weights)
        load_style_weights(transfer.encoder, folder / "vgg_normalised.pth")
        if (folder / "decoder.pth").exists():
            load_style_weights(transfer.decoder, folder / "decoder.pth")
            return transfer.requires_grad_(False).eval()
    size = min(16, s.batch_size)

    def images(i):
        return tuple(normalise(dataset[shuffled_batch(len(dataset), size, i, s.seed)][0].to(device))
                     for dataset in (domains.source, domains.target))

    return actupose.train_style_transfer(transfer, images, s.style_iters, train_encoder=not s.style_weights,
                                         lr=2e-3 if s.style == "small" else 1e-4,        # AdaIN's own for VGG
                                         progress=Progress("style transfer"))


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(trainer, network, dataset, batch_size=64):
    """Keypoints (N, K, 2) in pixels and confidences (N, K) of a whole dataset, on the CPU.

    Each process takes a range of the samples.
    """
    bounds = [len(dataset) * r // world_size() for r in range(world_size() + 1)]
    counts = [end - begin for begin, end in zip(bounds, bounds[1:])]
    begin, end = bounds[rank()], bounds[rank() + 1]
    found = torch.zeros(max(counts), len(trainer.skeleton), 3)        # one shape everywhere, so that it can be gathered
    for start in range(begin, end, batch_size):
        stop = min(start + batch_size, end)
        keypoints, confidence = trainer.decode(network, dataset[torch.arange(start, stop)][0])
        found[start - begin:stop - begin] = torch.cat([keypoints, confidence[..., None]], -1)
    parts = gather(found.to(trainer.device)).cpu().split(max(counts))
    found = torch.cat([part[:count] for part, count in zip(parts, counts)])
    return found[..., :2], found[..., 2]


def scoring_frame(dataset, stride, subcell):
    """The truth as it is scored: keypoints (N, K, 2) in pixels and weight (N, K).

    subcell: pixels against pixels. Otherwise the published protocol, cells against cells: keypoints whose cell lies
    outside the map or has x <= 1 or y <= 1 are left out.
    """
    if subcell:
        return dataset.keypoints, dataset.visible
    cells = torch.floor(dataset.keypoints / stride + 0.5)
    return cells * stride, dataset.visible * ((cells > 1) & (cells < dataset.size // stride)).all(-1)


def score(predicted, dataset, stride, subcell, bins=None, num_bins=25):
    """PCK by group, EvalPose score, and PCK by complexity bin (bins: (N,), the bin of each pose)."""
    true, weight = scoring_frame(dataset, stride, subcell)
    size, groups = dataset.size, dataset.skeleton.groups
    result = {"pck": {name: _number(value) for name, value in
                      actupose.pck(predicted, true, weight, size, groups).items()},
              "evalpose": actupose.evalpose_score(predicted, true, torch.tensor(dataset.skeleton.limbs), weight)}
    if bins is not None:
        scored = list(groups["all"])
        hits, counted = actupose.pck_hits(predicted[:, scored], true[:, scored], weight[:, scored], 0.05 * size)
        per_pose, usable = 100 * hits.sum(1) / counted.sum(1).clamp(min=1), counted.any(1).numpy()
        result["bins"] = [_number(per_pose[torch.from_numpy((bins == j) & usable)].mean().item())
                          for j in range(num_bins)]
    return result


def _number(value):
    return None if math.isnan(value) else value                 # nothing is labelled; JSON has no NaN


def validate(run):
    """PCK of student and teacher on the validation split, for choices and curves."""
    networks = {"val_student": run.trainer.student, "val_teacher": run.trainer.scored_teacher()}
    return {name: score(predict(run.trainer, network, run.domains.val)[0], run.domains.val, run.trainer.stride,
                        run.settings.subcell)["pck"]["all"]
            for name, network in networks.items() if network is not None}


def evaluate(run):
    """Scores of the present weights on the test split, {"student": ..., "teacher": ...}; the student's predictions."""
    trainer, test, s = run.trainer, run.domains.test, run.settings
    complexity = actupose.pose_complexity(run.vae, test.keypoints, test.visible, test.skeleton.root)
    bins = actupose.assign_bins(complexity, s.bins)
    predictions = {name: predict(trainer, network, test) for name, network in
                   (("student", trainer.student), ("teacher", trainer.scored_teacher())) if network is not None}
    scores = {name: score(found[0], test, trainer.stride, s.subcell, bins, s.bins)
              for name, found in predictions.items()}
    return scores, predictions["student"]


def evaluate_run(out, device):
    """`evaluate RUN`: score the last checkpoint again; UserError where result.json says something else."""
    checkpoint = load_run(out / "last.pt")
    run = set_up(saved_settings(out), device, checkpoint)
    result = {**(scores := evaluate(run)[0])["student"], "teacher": scores.get("teacher")}
    print_result(result)
    if not (out / "result.json").exists():
        print(f"after {len(run.log)} of {run.settings.epochs} epochs; the run is not finished, "
              f"`{resume_command(out)}` goes on")
        return
    stored = read_json(out / "result.json")
    different = [key for key in result if stored.get(key) != result[key]]
    if different:
        raise UserError(f"{out / 'result.json'}: holds other {', '.join(different)} than this evaluation. The last "
                        f"digits depend on machine, device and threads; larger differences mean mixed files")
    print(f"the same as {out / 'result.json'}")


def print_result(result):
    """PCK by group of student and teacher, EvalPose, and PCK by complexity bin."""
    print("PCK@0.05  " + "".join(f"{name:>11}" for name in result["pck"]) + "   EvalPose")
    for name, scores in (("student", result), ("teacher", result["teacher"])):
        if scores:
            print(f"{name:10}" + "".join(f"{fmt(v):>11}" for v in scores["pck"].values())
                  + f"{scores['evalpose']:11.1f}")
    print("student by complexity bin of the pose, simple to complex: "
          + " ".join(fmt(value, 0) for value in result["bins"]))


def fmt(value, digits=1):
    """A score as text, a dash where nothing is labelled."""
    return "-" if value is None else f"{value:.{digits}f}"


# ----------------------------------------------------------------------------------------------------------
# Files of a run, checkpoints and weights
# ----------------------------------------------------------------------------------------------------------


def write_json(path, value):
    """JSON, replaced atomically; ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_lines(path, rows):
    """log.jsonl: a line per epoch."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path):
    """A JSON object that a run wrote. UserError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?") from None
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); remove {path.parent} and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (no JSON object); remove {path.parent} and run again")
    return value


def write_config(out, settings, skeleton, device):
    """config.json: the settings, the skeleton, and what computed the run."""
    packages = {}
    for name in ("torch", "numpy", "pillow", "triton"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    write_json(out / "config.json", {**dataclasses.asdict(settings), "skeleton": dataclasses.asdict(skeleton),
                                     "device": kernels.common.device_name(device), "processes": world_size(),
                                     "threads": torch.get_num_threads(), "python": platform.python_version(), **packages})


def saved_settings(out):
    """The settings in a run's config.json."""
    path, known = out / "config.json", {f.name: f.default for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in read_json(path).items() if name in known}
    for name, value in values.items():
        kind = list if isinstance(known[name], tuple) else type(known[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{path}: damaged ({name} is {value!r}); mend it, or remove {out} and run again")
    return Settings(**values)


def saved_skeleton(out):
    """The skeleton of a run, from its config.json: its data may not be here."""
    saved = read_json(out / "config.json").get("skeleton")
    try:
        limbs, triplets = (tuple(map(tuple, saved[name])) for name in ("limbs", "triplets"))
        groups = {name: tuple(keypoints) for name, keypoints in saved["groups"].items()}
        return data.Skeleton(tuple(saved["names"]), limbs, triplets, groups, tuple(saved["root"]))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{out / 'config.json'}: holds no usable skeleton ({e}); give another run") from None


def write_speed(path, epoch, seconds, settings, trainer, total):
    """Append a line to speed.jsonl: what depends on the clock and so cannot stand in log.jsonl."""
    images = settings.iters_per_epoch * settings.batch_size * (1 + trainer.uses_target)
    row = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1),
           "total_seconds": round(total, 1), "memory_gb": peak_memory_gb()}
    if trainer.device.type == "cuda":
        row["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(trainer.device) / 1e9, 2)
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def peak_memory_gb():
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def resume_command(out):
    """How to go on with a run."""
    return f"python train.py --resume --out {shlex.quote(str(out))}"


def refuse_to_overwrite(out):
    """UserError where `out` holds a run already, or cannot be made."""
    if (out / "result.json").exists():
        raise UserError(f"--out: {out} holds a finished run; give another, or `evaluate {out}`")
    if (out / "last.pt").exists() or (out / "previous.pt").exists():
        raise UserError(f"--out: {out} holds an unfinished run; add --resume to go on with it, or give another")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out: {out} cannot be made, {parent} is not a writable directory; give another")


def state_of(run):
    """What a checkpoint holds: tensors and plain values only, so that it loads without unpickling code.

    Random numbers need no state: each is a function of the seed, the step and the sample.
    """
    trainer = run.trainer
    return dict(student=trainer.student.state_dict(), teacher=trainer.teacher and trainer.teacher.state_dict(),
                style=trainer.style_transfer and trainer.style_transfer.state_dict(),
                optimiser=trainer.optimiser.state_dict(), vae=run.vae.state_dict(),
                curriculum=run.curriculum.state_dict(), log=run.log, drawn=run.drawn)


def save_checkpoint(path, state):
    """torch.save followed by the SHA-256 of its bytes, in place of `path`; what was there becomes previous.pt.

    At every moment last.pt or previous.pt is whole.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path, keep=path.with_name("previous.pt")) as f:
        f.write(buffer.getbuffer())
        f.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_run(path):
    """A checkpoint that `save_checkpoint` wrote. Its digest is verified before it is parsed.

    UserError when it is missing or damaged.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; is {path.parent} a run that has finished an epoch?") from None
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise UserError(f"{path}: damaged (its digest does not fit); --resume goes on from previous.pt beside it")
    return load_torch(io.BytesIO(content), path)


def load_torch(file, path):
    """A torch file as a dictionary of tensors and plain values; nothing in it is executed. UserError names `path`."""
    try:
        # UDAPE's and RegDA's files hold the options they were written with, an argparse.Namespace: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:
        raise UserError(f"{path}: not a readable file of tensors and plain values ({type(e).__name__}); replace it") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no dictionary of tensors; replace it")
    return state


def newest_checkpoint(out):
    """The checkpoint to go on from: last.pt, or previous.pt where that is damaged, which is said.

    None for a run that was killed before its first epoch was saved. UserError when neither can be read.
    """
    last, previous = out / "last.pt", out / "previous.pt"
    if not last.exists() and not previous.exists() and (out / "config.json").exists():
        return None
    try:
        return load_run(last)
    except UserError as damage:
        if not previous.exists():
            raise
        state = load_run(previous)
        warn(f"{damage}. Going on from {previous}, {len(state['log'])} epochs done, to the same result")
        if rank() == 0:
            os.replace(previous, last)             # or the damaged file would become the new previous.pt
        return state


def load_weights(module, state, path):
    """module.load_state_dict with an error that names the file and the first thing that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        where = "lacks" if name in own else "has an unknown"
        raise UserError(f"{path}: the checkpoint {where} {name}; is it of another --architecture or skeleton?")
    for name, value in own.items():
        if not torch.is_tensor(state[name]) or value.shape != state[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(getattr(state[name], 'shape', ()))}, this network "
                            f"{tuple(value.shape)}; use the --architecture and data of the run that wrote it")
    module.load_state_dict(state)


def load_networks(trainer, checkpoint, path):
    """Restore student and teacher (None before it joins)."""
    load_weights(trainer.student, checkpoint["student"], path)
    if checkpoint["teacher"] is not None:
        trainer.teacher = actupose.make_teacher(trainer.student)
        load_weights(trainer.teacher, checkpoint["teacher"], path)


def load_style_weights(network, path):
    """Published AdaIN weights into an encoder or decoder, by name; layers beyond relu4_1 are ignored."""
    state, own = load_torch(path, path), network.state_dict()
    load_weights(network, {name: value for name, value in state.items() if name in own}, path)


# torchvision's ResNets trained on ImageNet; the digits are the start of the file's SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth",
                  "resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}


def read_weights(settings):
    """What --weights names -> a dictionary for `actupose.load_pose_weights`, and the file's name or address."""
    if settings.weights == "imagenet":
        url = IMAGENET_URL + IMAGENET_FILES[settings.architecture]
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True), url
        except Exception as e:                   # no network, a wrong hash, a damaged file: from many libraries
            raise UserError(f"--weights imagenet: {url} could not be fetched or read ({e}); fetch it by other means "
                            f"and give the file, or remove a damaged one from {torch.hub.get_dir()}") from None
    path = Path(settings.weights)
    return (load_run(path / "last.pt"), path / "last.pt") if path.is_dir() else (load_torch(path, path), path)


def load_initial_weights(network, weights, path):
    """Weights from `read_weights` into the pose network; prints what was loaded, what was not, and why."""
    try:
        loaded, ignored, left = actupose.load_pose_weights(network, weights)
    except ValueError as e:
        raise UserError(f"--weights: {path}: {e}; give the --architecture that it belongs to, or other weights") from None

    def parts(names):
        counts = Counter(name.split(".")[0] for name in names)
        return ", ".join(f"{part} ({count})" for part, count in counts.items())

    if rank() == 0:
        print(f"weights from {path}:\n  loaded: {parts(loaded)}")
        for reason in dict.fromkeys(ignored.values()):
            print(f"  ignored, {reason}: {', '.join(name for name in ignored if ignored[name] == reason)}")
        if left:
            print(f"  not in it, left at the initialisation: {parts(left)}")


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------

INK, GREY, GRID, WHITE = (34, 40, 49), (112, 122, 136), (228, 232, 238), (255, 255, 255)
RIGHT, LEFT, CENTRE = (240, 78, 88), (38, 132, 230), (250, 178, 40)
PALETTE = (LEFT, RIGHT, (32, 164, 118), CENTRE, (136, 84, 208), (96, 108, 122), (24, 190, 207), (227, 119, 194),
           (150, 100, 70), (160, 190, 60))
JOINT_COLOURS = {"r-": RIGHT, "l-": LEFT, "thumb": RIGHT, "index": PALETTE[4], "middle": PALETTE[2], "ring": LEFT,
                 "little": PALETTE[5]}                       # by the beginning of a keypoint's name


class Canvas:
    """A white picture drawn at twice its size and reduced when saved: smooth lines with Pillow alone.

    Arguments are in pixels of the saved picture; colours are (r, g, b) or (r, g, b, alpha).
    """

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * round(width), 2 * round(height)), WHITE)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def line(self, points, colour, width=1.0):
        self.draw.line([(2 * x, 2 * y) for x, y in points], colour, max(1, round(2 * width)), joint="curve")

    def box(self, x0, y0, x1, y1, colour):
        self.draw.rectangle([round(2 * v) for v in (x0, y0, x1, y1)], colour)

    def dot(self, x, y, radius, colour):
        self.draw.circle((2 * x, 2 * y), 2 * radius, colour)

    def text(self, x, y, text, size=12, colour=GREY, anchor="ls"):
        """Text at (x, y) with one of Pillow's anchors; returns where it ends if it starts at x."""
        font = ImageFont.load_default(size=2 * size)
        self.draw.text((2 * x, 2 * y), str(text), colour, font, anchor)
        return x + font.getlength(str(text)) / 2

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            self.image.reduce(2).save(f, format="PNG", optimize=True)


def chart(canvas, box, series, title, xlabel="", kind="line"):
    """A chart in box (x0, y0, x1, y1), with a legend where there are several series.

    series: label -> (x, y), where y (n,) is a line or bars, and (n, 5) the quantiles of a box plot (kind "box").
    Values that are NaN or None are left out. Returns the function (x, y) -> place on the canvas.
    """
    x0, y0, x1, y1 = box
    series = {label: (np.asarray(x, float), np.asarray(y, float)) for label, (x, y) in series.items()}
    xs, ys = (np.concatenate([part[i].ravel() for part in series.values()]) for i in (0, 1))
    ys, margin = ys[np.isfinite(ys)], 0.0 if kind == "line" else 0.6
    left, right = xs.min() - margin, max(xs.max() + margin, xs.min() + 1e-9)
    low = min(ys.min(initial=0), 0)
    high = max(ys.max(initial=low), low + 1e-9) * 1.05

    def place(x, y):
        return x0 + (x - left) / (right - left) * (x1 - x0), y1 - (y - low) / (high - low) * (y1 - y0)

    for axis, (start, end, count) in enumerate(((left, right, 8), (low, high, 5))):
        power = 10.0 ** math.floor(math.log10((end - start) / count))
        tick = next(m * power for m in (1, 2, 5, 10) if m * power >= (end - start) / count)
        tick = max(tick, 1) if axis == 0 and xs.max() > 2 else tick          # epochs and bins are whole
        for value in np.arange(math.ceil(start / tick), math.floor(end / tick) + 1) * tick:
            if axis == 0:
                canvas.text(place(value, low)[0], y1 + 16, f"{value:,.6g}", 11, anchor="ms")
            else:
                canvas.line([(x0, place(left, value)[1]), (x1, place(left, value)[1])], GRID)
                canvas.text(x0 - 6, place(left, value)[1], f"{value:,.6g}", 11, anchor="rm")
    canvas.line([place(left, 0), place(right, 0)], GREY)
    canvas.text((x0 + x1) / 2, y1 + 34, xlabel, anchor="ms")
    end = canvas.text(x0, y0 - 12, title, 14, INK) + 24
    for i, ((label, (x, y)), colour) in enumerate(zip(series.items(), cycle(PALETTE))):
        if len(series) > 1:
            canvas.box(end, y0 - 22, end + 10, y0 - 12, colour)
            end = canvas.text(end + 15, y0 - 12, label) + 18
        known = np.isfinite(y if y.ndim == 1 else y[:, 0])
        points = list(zip(x[known], y[known]))
        if kind == "line":
            canvas.line([place(*point) for point in points], colour, 2)
            for point in points if len(points) < 16 else ():
                canvas.dot(*place(*point), 3, colour)
        for at, values in points if kind == "bar" else ():
            (a, top), (b, zero) = place(at - 0.4 + 0.8 * i / len(series), values), place(at - 0.4 + 0.8 * (i + 0.9) / len(series), 0)
            canvas.box(a, min(top, zero), b, max(top, zero), colour)
        for at, values in points if kind == "box" else ():
            whiskers = [place(at, value) for value in values]
            canvas.line([whiskers[0], whiskers[4]], colour)
            canvas.box(place(at - 0.3, 0)[0], whiskers[3][1], place(at + 0.3, 0)[0], whiskers[1][1], (*colour, 90))
            canvas.line([place(at - 0.3, values[2]), place(at + 0.3, values[2])], colour, 2)
    return place


def draw_skeleton(draw, keypoints, visible, skeleton, width, confidence=None):
    """Limbs and joints of one figure, outlined in white, coloured by body side or finger.

    draw: ImageDraw.Draw(image, "RGBA"); keypoints: (K, 2) in pixels of that image; visible: (K,), 0 leaves a keypoint
    out; width: of a limb in pixels; confidence: (K,) in [0, 1], fades what is unsure.
    """
    points = [tuple(p) for p in np.asarray(keypoints, float).tolist()]
    shown = (np.asarray(visible) > 0) & np.isfinite(np.asarray(keypoints, float)).all(-1)
    sure = np.ones(len(points)) if confidence is None else np.clip(np.nan_to_num(np.asarray(confidence, float)), 0, 1)
    alpha = (255 * (0.2 + 0.8 * sure)).round().astype(int)
    colours = [next((c for start, c in JOINT_COLOURS.items() if name.startswith(start)), CENTRE)
               for name in skeleton.names]
    neighbours, limbs = [set() for _ in points], []
    for a, b in skeleton.limbs:
        # The line from hip to hip repeats the two from the hips to the pelvis, where that is labelled.
        if shown[a] and shown[b] and not neighbours[a] & neighbours[b]:
            neighbours[a].add(b)
            neighbours[b].add(a)
            sides = {colours[a], colours[b]} - {CENTRE}
            limbs.append(([points[a], points[b]], min(alpha[a], alpha[b]), sides.pop() if len(sides) == 1 else CENTRE))
    for ends, opacity, _ in limbs:
        draw.line(ends, (*WHITE, opacity * 4 // 5), round(width * 1.7))
    for ends, opacity, colour in limbs:
        draw.line(ends, (*colour, opacity), round(width))
    for k in np.flatnonzero(shown):
        draw.circle(points[k], width * 1.35, (*WHITE, alpha[k]))
        draw.circle(points[k], width * 0.95, (*colours[k], alpha[k]))


def draw_panels(path, rows, skeleton, side=160):
    """Rows of images, each with a caption above and, where given, a skeleton.

    rows: lists of (caption, image (3, S, S) uint8, pose): pose is None or (keypoints (K, 2) in pixels of the image,
    visible (K,), confidence (K,) or None).
    """
    cell = side + 6
    canvas = Canvas(12 + max(map(len, rows)) * cell, 8 + len(rows) * (cell + 20))
    for r, row in enumerate(rows):
        for c, (caption, image, pose) in enumerate(row):
            panel = Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))
            panel = panel.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
            if pose is not None:                              # pixel centres stay centres
                keypoints = (np.asarray(pose[0], float) + 0.5) * (2 * side / image.shape[-1]) - 0.5
                draw_skeleton(ImageDraw.Draw(panel, "RGBA"), keypoints, pose[1], skeleton, side / 28, pose[2])
            x, y = 8 + c * cell, 4 + r * (cell + 20)
            canvas.text(x, y + 16, caption, colour=INK)
            canvas.image.paste(panel, (2 * x, 2 * y + 44))
    canvas.save(path)


def draw_curves(path, log):
    """The course of a run over its epochs. log: a dictionary per epoch, as the lines of log.jsonl."""
    panels = {"L_mse": ["mse"], "L_consistency": ["consistency"], "EvalPose, Eq. 5": ["evalpose"],
              "cross-domain, Eq. 6": ["cross_domain"], "validation PCK@0.05": ["val_student", "val_teacher"],
              "confidence": ["confidence", "teacher_confidence", "kept"], "pairs, Eq. 7": ["pairs"],
              "learning rate": ["lr"]}
    canvas = Canvas(4 * 360 + 20, 2 * 250)
    for n, (title, names) in enumerate(panels.items()):
        series = {name: [(row["epoch"], row[name]) for row in log if row.get(name) is not None] for name in names}
        x, y = 60 + n % 4 * 360, 40 + n // 4 * 250
        if any(series.values()):
            chart(canvas, (x, y, x + 280, y + 150), {name: zip(*rows) for name, rows in series.items() if rows}, title,
                  "epoch")
    canvas.save(path)


def draw_bins(path, series):
    """Fig. 9: PCK over the bins of rising pose complexity, a bar per method. series: label -> N_b scores or None."""
    bins = max(map(len, series.values()))
    canvas = Canvas(width := max(700, bins * (12 * len(series) + 8)), 330)
    chart(canvas, (50, 40, width - 10, 280), {label: (range(len(y)), y) for label, y in series.items()}, "PCK@0.05",
          "complexity bin, simple to complex", "bar")
    canvas.save(path)


def draw_curriculum(path, drawn):
    """Fig. 5: how many samples an epoch draws from each bin, for five epochs. drawn: (epochs, N_b)."""
    chosen = np.unique(np.linspace(0, len(drawn) - 1, 5).round().astype(int))
    canvas = Canvas(860, 380)
    chart(canvas, (60, 40, 850, 330), {f"epoch {e}: {sum(drawn[e]):,}": (range(len(drawn[e])), drawn[e]) for e in chosen},
          "samples drawn", "complexity bin, simple to complex")
    canvas.save(path)


def draw_complexity(path, dataset, bins, num_bins):
    """Fig. 2 and 3: the first poses of five bins, and how much the poses within each bin differ (Eq. 7).

    bins: (N,) the bin of each pose of the dataset. The boxes are quartiles of the root mean square difference of the
    angles, in degrees, between the first hundred poses of a bin, with the 5th and 95th percentile as whiskers.
    """
    cell, skeleton = 96, dataset.skeleton
    canvas, triplets, quantiles = Canvas(1400, 560), torch.tensor(skeleton.triplets), []
    canvas.text(20, 30, "poses by bin", 14, INK)
    for r, j in enumerate(np.unique(np.linspace(0, num_bins - 1, 5).astype(int))):
        canvas.text(20, 40 + (r + 0.5) * cell, f"bin {j}")
        for n, i in enumerate(np.flatnonzero(bins == j)[:7]):
            pose, seen = dataset.keypoints[i].numpy(), dataset.visible[i].numpy() > 0
            if seen.any():
                low, high = pose[seen].min(0), pose[seen].max(0)
                place = (pose - (low + high) / 2) * 0.84 * cell / max((high - low).max(), 1e-9)
                place += (80 + (n + 0.5) * cell, 40 + (r + 0.5) * cell)
                draw_skeleton(canvas.draw, 2 * place, seen, skeleton, 5)
    for j in range(num_bins):
        of_bin = torch.from_numpy(np.flatnonzero(bins == j)[:100])
        poses, valid = dataset.keypoints[of_bin], dataset.visible[of_bin] > 0
        distance = kernels.triplet_angle_distance(poses, poses, triplets, valid, valid)
        pairs = distance[torch.ones_like(distance).triu(1) > 0]
        pairs = torch.rad2deg(pairs[pairs.isfinite()] * len(skeleton) / math.sqrt(len(triplets)))
        quantiles.append(pairs.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist() if len(pairs)
                         else [math.nan] * 5)
    chart(canvas, (840, 40, 1380, 500), {"": (range(num_bins), quantiles)}, "difference of angles within a bin, degrees",
          "complexity bin, simple to complex", "box")
    canvas.save(path)


def draw_figures(run, scores, predictions, folder):
    """All pictures of a finished run. The samples shown are the first of each split, not chosen."""
    domains, s, skeleton = run.domains, run.settings, run.trainer.skeleton
    limbs, size, panels = torch.tensor(skeleton.limbs), s.image_size, []

    def first(dataset, count):
        return dataset[torch.arange(min(count, len(dataset)))]

    images, true, visible = first(domains.test, 12)
    found, sure = predictions
    for i, image in enumerate(images):
        one, groups = slice(i, i + 1), {"all": skeleton.groups["all"]}
        pck = actupose.pck(found[one], true[one], visible[one], size, groups)["all"]
        evalpose = actupose.evalpose_score(found[one], true[one], limbs, visible[one])
        panels += [("", image, None), ("ground truth", image, (true[i], visible[i], None)),
                   (f"PCK {pck:.0f}  EvalPose {evalpose:.0f}", image, (found[i], np.ones(len(skeleton)), sure[i]))]
    draw_panels(folder / "predictions.png", [panels[i:i + 9] for i in range(0, len(panels), 9)], skeleton)     # Fig. 8
    rows = []
    for name, dataset in ((s.source, domains.source), (s.target, domains.val)):
        shown = zip(*first(dataset, 8))
        rows.append([(name if i == 0 else "", image, (keypoints, seen, None))
                     for i, (image, keypoints, seen) in enumerate(shown)])
    draw_panels(folder / "domains.png", rows, skeleton)
    if run.trainer.style_transfer is not None:
        source, target = (first(dataset, min(8, len(domains.source), len(domains.target)))[0]
                          for dataset in (domains.source, domains.target))
        draw_panels(folder / "style.png", [[(title if i == 0 else "", image, None) for i, image in enumerate(images)]
                                           for title, images in restyled_examples(run.trainer, source, target)], skeleton)
    if s.curriculum == "active":
        draw_curriculum(folder / "curriculum.png", run.drawn)
    draw_curves(folder / "curves.png", run.log)
    draw_bins(folder / "bins.png", {name: values["bins"] for name, values in scores.items()})
    draw_complexity(folder / "complexity.png", domains.source, actupose.assign_bins(run.curriculum.complexity, s.bins),
                    s.bins)


def restyled_examples(trainer, source, target):
    """Rows of (title, uint8 images): both domains as they are and fully in the other's style."""
    normalised = [normalise(images.to(trainer.device)) for images in (source, target)]
    full = torch.ones(len(source), device=trainer.device)
    restyled = [denormalise(trainer.style_transfer(content, style, full)).cpu()
                for content, style in (normalised, normalised[::-1])]
    return (("source", source), ("source -> target", restyled[0]), ("target", target), ("target -> source", restyled[1]))


# ----------------------------------------------------------------------------------------------------------
# Photographs
# ----------------------------------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")                # what is taken from a folder


def find_photographs(inputs, out):
    """Files and folders -> {name of the outputs: file}. UserError for what is missing, or would overwrite another."""
    files = {}
    for path in map(Path, inputs):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()
                           and not p.name.startswith("."))
        if not found or not path.exists():
            raise UserError(f"{path}: no such picture, or a folder without any ({' '.join(SUFFIXES)})")
        for file in found:
            if file.resolve().parent == out.resolve():
                raise UserError(f"--out: {out} holds the photograph {file}, which could be overwritten; give another")
            if files.setdefault(file.name, file).resolve() != file.resolve():
                raise UserError(f"{file}: another picture is called {file.name}, too; predict them one by one")
    return files


def photograph_region(size, box):
    """The part of a photograph of size (width, height) that the network sees: edges (left, top, right, bottom).

    box: (x, y, w, h) in pixels, or None for all. A box is widened about its centre to a square, as far as the
    photograph reaches. ValueError when the box lies outside.
    """
    if box is None:
        return 0, 0, *size
    side, edges = max(box[2:]), []
    for start, length, end in zip(box[:2], box[2:], size):
        if start >= end or start + length <= 0:
            raise ValueError(f"--box {show(box)} lies outside of its {size[0]} x {size[1]} pixels")
        edges.append((max(start + (length - side) / 2, 0), min(start + (length + side) / 2, end)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def predict_run(run, inputs, out, box, network, device):
    """`predict`: the skeleton on each photograph (NAME.jpg) and its keypoints (NAME.json). Exit status 1 if one failed."""
    settings, skeleton, checkpoint = saved_settings(run), saved_skeleton(run), load_run(run / "last.pt")
    if checkpoint[network] is None:
        raise UserError(f"--network {network}: {run} has none ({settings.method}, {len(checkpoint['log'])} epochs)")
    files = find_photographs(inputs, out)
    trainer = Trainer(settings, skeleton, device)
    load_networks(trainer, checkpoint, run / "last.pt")
    model = trainer.student if network == "student" else trainer.scored_teacher()
    out.mkdir(parents=True, exist_ok=True)
    progress, failed = Progress("photographs"), 0
    for done, (name, file) in enumerate(files.items(), 1):
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
            region = photograph_region(image.size, box)
        except Exception as e:                       # a damaged file raises whatever its decoder stumbles on
            failed += 1
            warn(f"{file}: {e if isinstance(e, ValueError) else f'not a readable photograph ({e})'}")
            continue
        keypoints, confidence = (t[0] for t in trainer.decode(model, letterbox(image, region, settings.image_size)[None]))
        _, _, view = letterbox_view(region, settings.image_size)
        keypoints = map_keypoints(keypoints.double(), invert_view(torch.from_numpy(view)))
        width = max(max(region[2] - region[0], region[3] - region[1]) / 100, 1.5)
        draw_skeleton(ImageDraw.Draw(image, "RGBA"), keypoints, np.ones(len(skeleton)), skeleton, width, confidence)
        with replacing(out / f"{name}.jpg") as f:
            image.save(f, format="JPEG", quality=92, subsampling=0)
        write_json(out / f"{name}.json", {
            "image": str(file), "width": image.width, "height": image.height, "box": box, "keypoints": [
                {"name": joint, "x": round(x, 3), "y": round(y, 3), "confidence": round(c, 4)}
                for joint, (x, y), c in zip(skeleton.names, keypoints.tolist(), confidence.tolist())]})
        progress(done, len(files))
    print(f"{len(files) - failed} of {len(files)} photographs done by the {network} of {run}, in {out}")
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------------
# Many runs, one table
# ----------------------------------------------------------------------------------------------------------


def compare(names, seeds, root, jobs, preset, device, given):
    """Run what is missing of names x seeds under `root`, `jobs` at a time, and print the table in Markdown."""
    runs = {(name, seed): root / f"{name}-s{seed}" for name in names for seed in seeds}
    waiting = []
    for (name, seed), out in runs.items():
        if name not in {**METHODS, **ABLATIONS}:
            raise UserError(f"--methods: use {' or '.join((*METHODS, *ABLATIONS))}, got {name}")
        values = {**given, "seed": seed, **(dict(method=name) if name in METHODS else ABLATIONS[name])}
        settings = make_settings(preset, **values)
        if (out / "config.json").exists():
            check_same_settings(out, dataclasses.asdict(settings))
        if not (out / "result.json").exists():
            command = [sys.executable, __file__, "--preset", preset, "--device", device, "--out", str(out)]
            for key, value in values.items():
                command += [f"--{key.replace('_', '-')}", show(value)]
            waiting.append((out, command + ["--resume"] * (out / "config.json").exists()))
    progress, running, failed, total = Progress("runs"), {}, [], len(waiting)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                out, command = waiting.pop(0)
                out.mkdir(parents=True, exist_ok=True)
                with open(out / "output.txt", "a") as f:
                    running[out] = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)
            time.sleep(0.5)
            for out, process in [item for item in running.items() if item[1].poll() is not None]:
                del running[out]
                if process.returncode:
                    failed.append(f"{out}: exit status {process.returncode}, see {out / 'output.txt'}")
                progress(total - len(waiting) - len(running), total, out.name)
    finally:
        for process in running.values():                     # after Ctrl-C
            process.terminate()
            process.wait()
    results = {name: [read_json(runs[name, seed] / "result.json") for seed in seeds
                      if (runs[name, seed] / "result.json").exists()] for name in names}
    results = {name: rows for name, rows in results.items() if rows}
    print(comparison_table(results))
    if results:
        draw_bins(root / "bins.png", {name: np.nanmean(np.array([r["bins"] for r in rows], dtype=float), 0)
                                      for name, rows in results.items()})
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
    gap = overall["oracle"] - overall["source-only"] if {"oracle", "source-only"} <= set(overall) else 0.0
    ours = {r["seed"]: r["pck"]["all"] for r in results.get("actupose", ())}
    groups = [g for g in next(iter(results.values()))[0]["pck"] if g != "all"] if results else []
    header = ["method", "seeds", *groups, "all", "teacher", "EvalPose"]
    header += ["gap closed"] * bool(gap) + ["to actupose"] * bool(ours)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, rows in results.items():
        cells = [name, str(len(rows)), *(fmt(mean(r["pck"][g] for r in rows)) for g in groups),
                 f"**{fmt(overall[name])}**{spread([r['pck']['all'] for r in rows])}",
                 fmt(mean(r["teacher"]["pck"]["all"] for r in rows if r["teacher"])), fmt(mean(r["evalpose"] for r in rows))]
        if gap:
            cells.append(f"{100 * (overall[name] - overall['source-only']) / gap:.0f} %")
        if ours:
            differences = [r["pck"]["all"] - ours[r["seed"]] for r in rows if r["seed"] in ours]
            cells.append(f"{mean(differences):+.1f}{spread(differences)}" if differences and name != "actupose" else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------

HELP = {
    "train": """Train ACTUPose or a baseline. With no option: ACTUPose on the built-in benchmark, in minutes on a CPU.

  python train.py                                          the demo
  python train.py --method udape --seed 1                  a baseline, another seed
  python train.py --target lsp --target-root DIR           adapt to real photographs
  python train.py --resume --out RUN                       go on with a run that was stopped, to the same bits
  python train.py evaluate RUN                             score a finished run again
  python train.py predict RUN IMAGE_OR_FOLDER... --out DIR draw skeletons on photographs
  python train.py compare --methods udape,actupose         several runs, one table""",
    "evaluate": "Repeat the evaluation of a run's last checkpoint.",
    "predict": """Find the keypoints of photographs with a run's network: for each a picture and a JSON file.

Keypoints are in pixels of the picture, turned upright by its EXIF orientation; the centre of its first pixel is at
(0, 0). Confidence is the height of the heatmap's peak. A file that cannot be read is named; the others are done.""",
    "compare": f"""Run what is missing of methods x seeds, skip what is finished, print the table in Markdown.

methods:   {', '.join(METHODS)}
ablations: {', '.join(ABLATIONS)} (ACTUPose with one thing changed)""",
}


def choose_device(name):
    """auto, cpu, cuda, ... -> torch.device. Processes of torchrun get a GPU each. UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(f"--device: {name!r} cannot be used ({str(e).splitlines()[0]}); use cpu, cuda or cuda:1") from None
    return device


def resolve_amp(settings, device):
    """Settings with --amp auto resolved for the device. UserError where bf16 is asked for and not computed in."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if settings.amp == "bf16" and device.type == "cuda" and not native:
        raise UserError(f"--amp bf16: {kernels.common.device_name(device)} does not compute in it; use --amp off")
    return dataclasses.replace(settings, amp={"auto": "bf16" if native else "off"}.get(settings.amp, settings.amp))


def parse_switch(text):
    """on or off -> bool."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"use on or off, got {text!r}")
    return text == "on"


def parse_numbers(text):
    """Comma-separated numbers -> tuple."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"use numbers with commas, got {text!r}") from None


class Parser(argparse.ArgumentParser):
    """Says on one line what is wrong, with the nearest option for a typo."""

    def __init__(self, verb, settings_without=None):
        super().__init__(prog=f"train.py {verb}".removesuffix(" train"), description=HELP[verb], allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")
        for f in dataclasses.fields(Settings) if settings_without is not None else ():
            self.add_setting(f) if f.name not in settings_without else None

    def add_setting(self, f):
        """The option of a field of Settings, with its default and the paper's value in the help."""
        kind, title = type(f.default), f.metadata["group"]
        group = next((g for g in self._action_groups if g.title == title), None) or self.add_argument_group(title)
        paper = f"; paper {show(PAPER[f.name])}" if f.name in PAPER else ""
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, choices=f.metadata["choices"],
                           type={bool: parse_switch, tuple: parse_numbers}.get(kind, kind),
                           help=f"{f.metadata['help']} [{show(f.default)}{paper}]".replace("%", "%%"),
                           metavar=None if f.metadata["choices"] else kind.__name__.upper())

    def parse_args(self, arguments):
        self.words = arguments
        return super().parse_args(arguments)

    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings]
        for word in (w.split("=")[0] for w in self.words if w.startswith("--")):
            near = difflib.get_close_matches(word, known, 1)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
        raise UserError(f"{message} (--help lists the options)")


def check_same_settings(out, given):
    """UserError where the run in `out` was started with other settings than those given."""
    saved = saved_settings(out)
    for name, value in given.items():
        was = getattr(saved, name)
        if was != value and name not in ("cache", "workers") and (name, value) != ("amp", "auto"):
            raise UserError(f"--{name.replace('_', '-')}: the run in {out} was started with {show(was)}, not "
                            f"{show(value)}; leave the option out, or give another --out")
    return saved


def command(arguments):
    """train (with no word), evaluate RUN, predict RUN IMAGE..., compare. Returns the exit status."""
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    rest = arguments[1:] if arguments[:1] == [verb] else arguments
    if verb not in HELP:
        near = difflib.get_close_matches(verb, HELP, 1)
        raise UserError(f"unknown command {verb!r}{f', did you mean {near[0]}?' if near else ''}; use {', '.join(HELP)}")
    if verb != "train" and world_size() > 1:
        raise UserError(f"{verb}: takes one process; run it without torchrun")
    parser = Parser(verb, {"train": (), "compare": ("method", "seed")}.get(verb))
    if verb in ("train", "compare"):
        parser.add_argument("--preset", choices=("demo", "paper"), default="demo", help="values of the options not given")
        parser.add_argument("--out", default="", help=f"directory of the results [runs/"
                            f"{'METHOD-TARGET-sSEED' if verb == 'train' else 'compare'}]")
    if verb in ("evaluate", "predict"):
        parser.add_argument("run", type=Path, help="directory of the run")
    if verb == "train":
        parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
        given = vars(parser.parse_args(rest))
        preset, out, device, resume = (given.pop(name) for name in ("preset", "out", "device", "resume"))
        settings = None if resume and out else make_settings(preset, **given)
        out = Path(out or f"runs/{settings.method}-{settings.target}-s{settings.seed}")
        if resume:
            settings = check_same_settings(out, given)
            if (out / "result.json").exists():
                print(f"{out}: the run is finished")
                return 0
        if settings.batch_size % world_size():
            raise UserError(f"--batch-size: must be a multiple of the {world_size()} processes, got {settings.batch_size}")
        started, result = time.time(), train(settings, out, device, resume)
        if rank() == 0:
            print_result(result)
            print(f"{time.time() - started:.0f} s, {peak_memory_gb()} GB; pictures in {out / 'figures'}")
    elif verb == "evaluate":
        options = parser.parse_args(rest)
        evaluate_run(options.run, choose_device(options.device))
    elif verb == "predict":
        parser.add_argument("inputs", nargs="+", metavar="image", help=f"a picture or a folder ({' '.join(SUFFIXES)})")
        parser.add_argument("--out", type=Path, required=True, help="directory of the results")
        parser.add_argument("--box", type=parse_numbers, metavar="X,Y,W,H", help="the part of each picture that shows "
                            "the person or hand: corner, width and height in its pixels [default: all of it]")
        parser.add_argument("--network", choices=("student", "teacher"), default="student", help="[student]")
        options = parser.parse_args(rest)
        if options.box and not (len(options.box) == 4 and min(options.box[2:]) > 0):
            raise UserError(f"--box: use x,y,w,h in pixels with w and h above 0, got {show(options.box)}")
        return predict_run(options.run, options.inputs, options.out, options.box, options.network,
                           choose_device(options.device))
    else:
        parser.add_argument("--methods", default=",".join(METHODS), help="rows of the table [the five methods]")
        parser.add_argument("--seeds", default="0,1,2", type=parse_numbers, help="seeds of each row [0,1,2]")
        parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores [1]")
        given = vars(parser.parse_args(rest))
        names, seeds, jobs, preset, out, device = (given.pop(name) for name in ("methods", "seeds", "jobs", "preset",
                                                                                "out", "device"))
        if jobs < 1:
            raise UserError(f"--jobs: must be at least 1, got {jobs}")
        compare(list(dict.fromkeys(names.split(","))), list(dict.fromkeys(map(int, seeds))),
                Path(out or "runs/compare"), jobs, preset, device, given)
    return 0


def warn(message):
    """One line on stderr, below a progress line that may stand there."""
    print(("\n" if Progress.unfinished else "") + f"train.py: {message}", file=sys.stderr, flush=True)
    Progress.unfinished = False


def main(arguments):
    """`command` with expected errors on one line. Exit status 0; 1: a photograph failed; 2: a mistake; 130: Ctrl-C."""
    status, processes = 2, int(os.environ.get("WORLD_SIZE", 1))
    try:
        if processes > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        status = command(arguments)
    except (UserError, data.DataError) as e:
        warn(e)
    except OSError as e:                                     # a full disk, say
        warn(f"{e.filename or 'system'}: {e.strerror or e}; after a run's first epoch --resume goes on")
    except KeyboardInterrupt:
        warn("interrupted; a run goes on with --resume from its last finished epoch")
        status = 130
    finally:
        if processes > 1:                                    # under torchrun a normal shutdown can hang
            sys.stdout.flush()
            sys.stderr.flush()
            if sys.exc_info()[0]:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
