"""Train, evaluate and predict: `python train.py` runs ACTUPose on the built-in benchmark.

Read `Trainer.step`, one iteration of the method (Fig. 4 of the paper), and `train`, the loop.
Before them stand the settings and the data of a run. After them come RegDA's steps, evaluation,
processes, files, pictures, photographs, the command line. Tables: `python -m docs.reproduce`.
"""
import argparse
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

import actupose
import data
import kernels
from data import (Progress, colour_jitter, compose_views, invert_view, letterbox, letterbox_view,
                  map_keypoints, normalise, prefetch, random_affine_view, random_crop_view,
                  remove_leftovers, render_heatmaps, replacing, shuffled_batch, unit_range, warp,
                  write_text)


class UserError(Exception):
    """A mistake that the user can mend. It is printed on one line; the exit status is 2."""


# --- Settings -------------------------------------------------------------------------------------

# All methods share one loop. A method says which of its parts are on or off.
SUPERVISED = dict(curriculum="off", style="off", w_evalpose=0.0, w_cross=0.0)
METHODS = {
    "source-only": SUPERVISED,
    "regda": SUPERVISED,                                        # adaptation: `RegDATrainer`
    "udape": dict(curriculum="off", w_evalpose=0.0, w_cross=0.0),
    "udape+vae-hm": dict(curriculum="hardest", w_evalpose=0.0, w_cross=0.0),
    "actupose": dict(),
    "oracle": SUPERVISED,                                       # from the target's labels
}
TAUGHT = ("udape", "udape+vae-hm", "actupose")                  # a teacher joins after pretraining
ADAPTING = (*TAUGHT, "regda")

# --preset paper: §4 of the paper, else the published base method, else our own decisions
# (docs/decisions.md says which).
PAPER = dict(
    architecture="resnet101", weights="imagenet", image_size=256, sigma=2.0, subcell=False,
    epochs=70, pretrain_epochs=40, iters_per_epoch=500, batch_size=32, workers=8,
    schedule="steps", lr=1e-4, lr_drops=(44.0, 59.0), lr_factor=0.1, ema=0.999,
    bins=25, hard_bins=8, pace=2.0, spread=0.25, vae_steps=20000,
    mask_ratio=0.5, occlusion=0.5, occlusion_confidence=0.9,
    style="vgg", style_prob=0.5, style_iters=20000,
    rotation=60.0, shear=30.0, translate=0.05, zoom=(0.6, 1.3), crop=(0.6, 1.0), jitter=0.25,
    w_udape=1.0, w_evalpose=0.1, w_cross=0.01, beta=50.0, gamma=0.06)
PRESETS = {"demo": {}, "paper": PAPER}
# What a source of hands changes. Gamma is chosen so that as many random source pairs are similar as
# for bodies.
HANDS = {
    "mannequin-hand": dict(target="mannequin-hand-wild", gamma=0.019),
    "rhd": dict(rotation=180.0, gamma=0.019),  # rotations in every direction, as published
}

# Rendered domains: the arguments of data.Mannequin.
RENDERED = {
    "mannequin": dict(domain="source"),
    "mannequin-hand": dict(domain="source", hand=True),
    "mannequin-wild": dict(domain="target"),
    "mannequin-everyday": dict(domain="everyday"),
    "mannequin-hand-wild": dict(domain="target", hand=True),
}
# Datasets on disk: their loaders.
SOURCES = {"surreal": data.SURREAL, "rhd": data.RenderedHandPose}
TARGETS = {"lsp": data.LSP, "human36m": data.Human36M, "h3d": data.Hand3DStudio}

# --schedule: the settings that it alone uses.
SCHEDULES = {"cosine": ("warmup", "lr_end"), "steps": ("lr_drops", "lr_factor")}

# Settings that have no effect where another one has one of these values.
IDLE = {
    **dict.fromkeys(("pace", "spread", "scale"), ("curriculum", ("off", "hardest"))),
    "rescoring": ("curriculum", ("off", "hardest", "static")),
    **dict.fromkeys(("gamma", "centred"), ("w_cross", (0.0,))),
}

# Settings that are paths, and those that may change when a run goes on.
PATHS = ("source_root", "target_root", "cache", "weights", "style_weights", "style_decoder")
CHANGEABLE = ("source_root", "target_root", "cache", "workers")


def option(default, text, choices=None, low=-math.inf, above=-math.inf, high=math.inf):
    """A field of Settings. Values: one of choices; low <= value, above < value, value <= high."""
    rule = dict(help=text, choices=choices, low=low, above=above, high=high)
    return field(default=default, metadata=rule)


@dataclass
class Settings:
    """What a run is told. The defaults are the demo's. All but CHANGEABLE decide its result."""
    method: str = option("actupose", "which of the paper's rows to train", tuple(METHODS))
    source: str = option("mannequin", "labelled source domain", (*RENDERED, *SOURCES))
    source_root: str = option("", "directory of the source dataset, for a source on disk")
    target: str = option("mannequin-wild", "unlabelled target domain", (*RENDERED, *TARGETS))
    target_root: str = option("", "directory of the target dataset, for a target on disk")
    shoulders: str = option("published", "SURREAL's shoulders: collar joints (published) or true",
                            ("published", "true"))
    source_count: int = option(6000, "rendered source training images", low=1)
    target_count: int = option(2000, "rendered unlabelled target images", low=1)
    seed: int = option(0, "seed of data, initialisation and every draw", low=0, high=2 ** 31 - 1)
    cache: str = option("", "directory that keeps rendered images, safe to delete")

    architecture: str = option("narrow", "pose network", tuple(actupose.ARCHITECTURES))
    weights: str = option("", "start of the network: imagenet (torchvision's file, fetched once), "
                          "a file of torchvision's, RegDA's, UDAPE's or ours, or a run's directory")
    image_size: int = option(64, "side of the input in pixels", low=32)
    sigma: float = option(1.5, "deviation of a target heatmap's Gaussian in cells", above=0)
    subcell: bool = option(True, "targets and decoding finer than a cell; off: as published")

    epochs: int = option(70, "epochs in all", low=1)
    pretrain_epochs: int = option(40, "epochs on the source before adaptation begins", low=0)
    iters_per_epoch: int = option(45, "iterations per epoch", low=1)
    batch_size: int = option(32, "images of each domain per batch, over all processes", low=1)
    workers: int = option(0, "threads that decode batches ahead (0: none)", low=0)
    schedule: str = option("cosine", "of the learning rate", tuple(SCHEDULES))
    lr: float = option(6e-3, "highest learning rate of Adam", above=0)
    warmup: float = option(0.03, "cosine: share of all iterations in which it rises", low=0, high=1)
    lr_end: float = option(0.02, "cosine: share of it that is left at the end", low=0, high=1)
    lr_drops: tuple = option((44.0, 59.0), "steps: epochs at which it drops, counted from 0",
                             low=0)
    lr_factor: float = option(0.1, "steps: factor of each drop", above=0)
    ema: float = option(0.99, "decay of the teacher's moving average", low=0, high=1)

    curriculum: str = option("active", "source samples of an epoch", actupose.CURRICULA)
    bins: int = option(25, "N_b, complexity bins", low=1)
    hard_bins: int = option(8, "bins that udape+vae-hm trains on", low=1)
    pace: float = option(6.0, "lambda of Eq. 3: how fast the peak moves to hard bins", above=0)
    spread: float = option(0.25, "sigma of Eq. 3", above=0)
    scale: str = option("rank", "s_j of Eq. 3: a bin's rank or scaled mean score",
                        ("rank", "minmax"))
    rescoring: str = option("relative", "Eq. 4: relative to the epoch's mean confidence, literal "
                            "(as printed), full (from a pass over all samples) or off",
                            actupose.RESCORING)
    vae_steps: int = option(1500, "training steps of the Pose-VAE", low=1)
    vae_kl: float = option(1e-3, "lambda of Eq. 1", low=0)
    vae_latent: int = option(8, "latent dimensions of the Pose-VAE", low=1)
    vae_width: int = option(128, "width of its hidden layers", low=1)

    mask_ratio: float = option(0.5, "share of pseudo-labels left out, the least confident", low=0,
                               high=1)
    occlusion: float = option(0.5, "probability of hiding a confident keypoint", low=0, high=1)
    occlusion_confidence: float = option(0.5, "confidence from which one may be hidden", low=0)
    style: str = option("small", "networks of the style transfer", ("small", "vgg", "off"))
    style_weights: str = option("", "directory of AdaIN's vgg_normalised.pth, the encoder")
    style_decoder: str = option("", "file of a decoder for normalised images, such as UDAPE's; "
                                "without it, one is trained")
    style_prob: float = option(0.5, "probability of restyling a batch, each direction", low=0,
                               high=1)
    style_iters: int = option(900, "iterations that train the style networks", low=1)

    rotation: float = option(30.0, "random rotation of the views, +- degrees (rhd: 180)", low=0)
    shear: float = option(0.0, "random shear of the views, +- degrees", low=0, high=80)
    translate: float = option(0.05, "random translation, +- share of the side", low=0)
    zoom: tuple = option((0.9, 1.1), "random scale of the views: low,high", above=0)
    crop: tuple = option((0.8, 1.0), "area of the random resized crop: low,high", above=0, high=1)
    jitter: float = option(0.25, "strength of the colour jitter", low=0, high=1)

    w_udape: float = option(1.0, "w1 of Eq. 8", low=0)
    w_evalpose: float = option(0.1, "w2 of Eq. 8, EvalPose (Eq. 5)", low=0)
    w_cross: float = option(0.01, "w3 of Eq. 8, cross-domain features (Eq. 6)", low=0)
    centred: bool = option(False, "Eq. 6: first subtract each domain's mean feature (under "
                           "torchrun the source's over a process's share)")
    map_sums: bool = option(True, "heatmap errors of Eq. 8 summed over the body; off: means over "
                            "the cells")
    beta: float = option(50.0, "sharpness of the soft-argmax", above=0)
    gamma: float = option(0.06, "Gamma, the threshold on Eq. 7 in radians (hands: 0.019)", low=0)

    amp: str = option("auto", "train in bf16; auto: where the device computes in it",
                      ("auto", "bf16", "off"))
    compile: bool = option(False, "compile the pose networks (torch.compile): minutes at the "
                            "start; not in RegDA's adaptation")

    def __post_init__(self):
        """UserError for a wrong value: see `check_settings`, which also expands ~ in paths."""
        check_settings(self)


def make_settings(preset="demo", **given):
    """The Settings of a run. Later ones win: preset, hands, what is given, what makes the method.

    UserError where a given value contradicts the method.
    """
    fixed = METHODS.get(given.get("method"), {})
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(f"{option_of(name)}: --method {given['method']} has {show(value)}, got "
                            f"{show(given[name])}; leave it out, or use --method actupose")
    values = dict(PRESETS[preset])
    values.update(HANDS.get(given.get("source"), {}))
    values.update(given)
    values.update(fixed)
    settings = Settings(**values)
    for schedule, names in SCHEDULES.items():
        for name in names:
            if name in given and settings.schedule != schedule:
                refuse(name, f"needs --schedule {schedule}", given[name])
    for role in ("source", "target"):
        name = f"{role}_count"
        if name in given and getattr(settings, role) not in RENDERED:
            refuse(name, f"needs a rendered --{role}", given[name])
    if "shoulders" in given and settings.source != "surreal":
        refuse("shoulders", "needs --source surreal", given["shoulders"])
    return settings


# --- Data of a run --------------------------------------------------------------------------------


class Domains(NamedTuple):
    """The datasets of a run."""
    source: object      # labelled, for training
    target: object      # its images alone are used for training, but by the oracle
    val: object         # of the target: for choices
    test: object        # of the target: for tables


def open_domains(settings):
    """The `Domains` of a run. Images are rendered or decoded when they are first used.

    UserError or DataError names what is missing or does not fit.
    """
    s = settings
    if s.cache:
        check_writable(Path(s.cache), "--cache")
    source = open_split(s, "source", "train")
    target = open_split(s, "target", "train")
    if source.skeleton.names != target.skeleton.names:
        raise UserError(f"--source {s.source} --target {s.target}: {len(source.skeleton)} and "
                        f"{len(target.skeleton)} keypoints; take two domains of bodies or two of "
                        "hands")
    if s.bins > len(source):
        raise UserError(f"--bins: {s.bins} is more than the {len(source)} training images of the "
                        "source")
    return Domains(source, target, open_split(s, "target", "val"), open_split(s, "target", "test"))


def open_split(settings, role, split):
    """One dataset of a run. role: "source" or "target"; split: "train", "val" or "test"."""
    s = settings
    name = getattr(s, role)
    if name in RENDERED:
        count = getattr(s, f"{role}_count") if split == "train" else None
        return data.Mannequin(**RENDERED[name], split=split, size=s.image_size, count=count,
                              seed=s.seed, cache=s.cache or None,
                              progress=Progress(f"rendering {name} {split}"))
    loader = SOURCES[name] if role == "source" else TARGETS[name]
    options = {}
    if name == "surreal":
        options = dict(shoulders=s.shoulders, progress=Progress(name))
    try:
        dataset = loader(getattr(s, f"{role}_root"), split, s.image_size, **options)
    except FileNotFoundError as error:
        raise UserError(f"--{role}-root: {error}") from None
    data.check_dataset(dataset, f"--{role} {name}")
    if dataset.size != s.image_size:
        rule = f"the images of --{role} {name} have {dataset.size} pixels"
        refuse("image_size", rule, s.image_size)
    return dataset


def batches(run, samples, steps):
    """Jobs for `prefetch`: one `load_step` per step, of this epoch's source samples in order."""
    count = len(steps) * run.settings.batch_size
    if len(samples) != count:
        name = type(run.curriculum).__name__
        raise ValueError(f"{name}.samples: gave {len(samples)} samples, not {count}")
    for step, indices in zip(steps, torch.from_numpy(samples).split(run.settings.batch_size)):
        yield functools.partial(load_step, run, step, indices)


def load_step(run, step, indices):
    """What `Trainer.step` takes: this process's share of a batch.

    indices: (B,) labelled samples of all processes. Returns indices, the labelled batch (images,
    keypoints, visible), and the target's images, or None where the step needs none.
    """
    s = run.settings
    pin = run.trainer.device.type == "cuda"  # the copy to a GPU is then asynchronous

    def load(dataset, chosen):
        batch = dataset[shard(chosen)]
        return [tensor.pin_memory() for tensor in batch] if pin else batch

    source_batch = load(run.labelled, indices)
    if not run.trainer.uses_target:
        return indices, source_batch, None
    target = run.domains.target
    # seed + 1: the images of the target come in an order of their own.
    target_indices = torch.from_numpy(shuffled_batch(len(target), s.batch_size, step, s.seed + 1))
    return indices, source_batch, load(target, target_indices)[0]


# --- The step -------------------------------------------------------------------------------------


def draw_step(settings, step, num_keypoints, device):
    """The random views and numbers of a step, by name: a function of (seed, step).

    Views are matrices (B, 2, 3), the rest is uniform in [0, 1). Every process draws them for the
    whole batch and keeps its share, so the number of processes changes nothing.
    """
    s = settings
    random = np.random.default_rng((s.seed, step))

    def draw(n):
        numbers = torch.from_numpy(random.random((s.batch_size, n), dtype=np.float32))
        return shard(numbers).to(device, non_blocking=True)

    def draw_crop():
        return random_crop_view(draw(3), s.image_size, s.crop)

    def draw_affine():
        return random_affine_view(draw(5), s.image_size, s.rotation, s.shear, s.translate, s.zoom)

    # Do not reorder: each draw takes the next numbers of the generator.
    return SimpleNamespace(
        image_to_source_crop=draw_crop(), source_crop_to_view=draw_affine(), source_jitter=draw(6),
        image_to_crop=draw_crop(),
        crop_to_student_view=draw_affine(), student_jitter=draw(6),
        crop_to_teacher_view=draw_affine(), teacher_jitter=draw(6),
        occlusion=draw(3 + num_keypoints),
        restyle_source=random.random(), restyle_target=random.random(),  # one number per batch
        alpha_source=random.random(), alpha_target=random.random())


class SourceView(NamedTuple):
    """A labelled batch in random views."""
    images: torch.Tensor        # (B, 3, S, S), normalised
    view: torch.Tensor          # (B, 2, 3), from the image to the view
    keypoints: torch.Tensor     # (B, K, 2), pixels of the view
    labels: torch.Tensor        # (B, K, h, h) target heatmaps
    weight: torch.Tensor        # (B, K), 0 for keypoints that are unlabelled or outside the view


class Trainer:
    """Student, teacher, style networks, optimiser, and the step that trains them."""

    def __init__(self, settings, skeleton, device):
        s = settings
        self.settings = settings
        self.skeleton = skeleton
        self.device = device
        self.teacher = None                                     # joins in `begin_adaptation`
        self.style_transfer = None                              # trained or loaded in `set_up`
        torch.manual_seed(s.seed)
        self.set_student(actupose.PoseResNet(s.architecture, len(skeleton)))

        # A function of the network is compiled, not the network: parameters keep their names in
        # checkpoints.
        def call(network, images):
            return network(images)

        self.call = torch.compile(call) if s.compile else call
        self.stride = self.student.stride
        self.cells = s.image_size // self.stride
        # Decision: the terms of Eq. 8 are sums over the body, averaged over samples: heatmap errors
        # over keypoints and cells, as Eq. 5 over limbs. Their mean, 1e-3, would drown under w2
        # (--map-sums off).
        self.map_scale = len(skeleton) * self.cells ** 2 if s.map_sums else 1
        self.limbs = torch.tensor(skeleton.limbs, device=device)
        self.triplets = torch.tensor(skeleton.triplets, device=device)

    def set_student(self, network):
        """Place the network that is trained on the device, with an optimiser of its own."""
        if world_size() > 1 and self.device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.student = network.to(self.device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=self.settings.lr,
                                          fused=self.device.type in ("cpu", "cuda"))

    def begin_adaptation(self):
        """Before the first epoch after pretraining: the teacher joins, in methods that have one."""
        if self.settings.method in TAUGHT:
            self.teacher = actupose.make_teacher(self.student)

    @property
    def uses_target(self):
        """Whether a step needs target images: for their style, or for the teacher."""
        return self.style_transfer is not None or self.teacher is not None

    def autocast(self):
        """The context in which networks compute: bfloat16 with --amp bf16."""
        if self.settings.amp == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def forward(self, network, images):
        """Heatmaps (B, K, h, h) and features (B, C) of a pose network, float32."""
        with self.autocast():
            images = images.contiguous(memory_format=torch.channels_last)
            heatmaps, features = self.call(network, images)
        return heatmaps.float(), features.float()

    def augment(self, images, view, jitter):
        """uint8 images (B, 3, S, S) through views (B, 2, 3), colours jittered, normalised."""
        images = warp(unit_range(images), view)
        return normalise(colour_jitter(images, jitter, self.settings.jitter))

    @torch.no_grad()
    def restyle(self, content, style, coin, alpha):
        """With probability style_prob, restyle the content images. coin: uniform in [0, 1)."""
        if self.style_transfer is None or coin >= self.settings.style_prob:
            return content
        with self.autocast():
            return self.style_transfer(content, style, alpha)

    def view_source(self, source_batch, random):
        """A labelled batch -> SourceView."""
        s = self.settings
        batch = [tensor.to(self.device, non_blocking=True) for tensor in source_batch]
        images, keypoints, visible = batch
        view = compose_views(random.source_crop_to_view, random.image_to_source_crop)
        images = self.augment(images, view, random.source_jitter)
        keypoints = map_keypoints(keypoints, view)
        labels, weight = render_heatmaps(keypoints, visible, self.cells, self.stride, s.sigma,
                                         s.subcell)
        return SourceView(images, view, keypoints, labels, weight)

    def descend(self, loss, *parts):
        """A step of Adam on the parameters of these parts of the student. The others stay."""
        parameters = []
        for part in parts:
            parameters += part.parameters()
        self.optimiser.zero_grad()
        loss.backward(inputs=parameters)
        average_gradients(self.student)
        self.optimiser.step()

    def step(self, step, source_batch, target_images):
        """One iteration on this process's share of a batch: Fig. 4.

        source_batch: uint8 images (B, 3, S, S), keypoints (B, K, 2) in pixels, visible (B, K).
        target_images: uint8 (B, 3, S, S), or None where `uses_target` is False. Returns scalars by
        name, the terms of Eq. 8 among them, on the device; and the mean confidence of each source
        sample of all processes.
        """
        s = self.settings
        random = draw_step(s, step, len(self.skeleton), self.device)
        self.student.train()

        # Both domains in random views. The two views of a target image share one crop.
        source = self.view_source(source_batch, random)
        styled_source = source.images
        if target_images is not None:
            target_images = target_images.to(self.device, non_blocking=True)
            image_to_teacher_view = compose_views(random.crop_to_teacher_view, random.image_to_crop)
            teacher_images = self.augment(target_images, image_to_teacher_view,
                                          random.teacher_jitter)
            styled_source = self.restyle(source.images, teacher_images, random.restyle_source,
                                         random.alpha_source)

        # The student learns from the source's labels.
        source_maps, source_features = self.forward(self.student, styled_source)
        mse = self.map_scale * actupose.heatmap_mse(source_maps, source.labels, source.weight)
        # Keypoints outside the view are left out of the mean confidence.
        source_cells, confidence, mean_confidence = kernels.heatmap_argmax_mean(
            source_maps, source.weight)
        terms = dict(mse=mse, confidence=mean_confidence.mean())
        udape = mse
        evalpose = 0.0
        cross_domain = 0.0

        # Decision: Eq. 5 and 6 join with the teacher, for both domains.
        if self.teacher is not None:
            with torch.no_grad():
                # The teacher labels the target images. Its maps are warped back to the crop.
                self.teacher.train()  # batch statistics, as in the base method
                styled_target = self.restyle(teacher_images, source.images, random.restyle_target,
                                             random.alpha_target)
                teacher_maps, teacher_features = self.forward(self.teacher, styled_target)
                teacher_view_to_crop = invert_view(random.crop_to_teacher_view)
                teacher_maps = warp(teacher_maps, teacher_view_to_crop, self.stride)
                pseudo_maps, pseudo_cells, pseudo_confidence = kernels.rectify(
                    teacher_maps, s.sigma, s.subcell)
                confident = actupose.confidence_mask(gather(pseudo_confidence), s.mask_ratio)

                # The student gets another view of the same images, a confident keypoint hidden.
                image_to_student_view = compose_views(random.crop_to_student_view,
                                                      random.image_to_crop)
                student_images = self.augment(target_images, image_to_student_view,
                                              random.student_jitter)
                keypoints_in_view = map_keypoints(pseudo_cells * self.stride,
                                                  random.crop_to_student_view)
                student_images, hidden = actupose.occlude_keypoints(
                    student_images, keypoints_in_view, pseudo_confidence, random.occlusion,
                    half=s.image_size * 10 / 256, probability=s.occlusion,
                    minimum=s.occlusion_confidence)
                # Decision: what the student's view does not show, it is not asked to predict.
                shown = (keypoints_in_view >= 0) & (keypoints_in_view <= s.image_size - 1)
                mask = shard(confident) & shown.all(-1)

            # It has to agree with the pseudo-labels.
            student_maps, _ = self.forward(self.student, student_images)
            student_view_to_crop = invert_view(random.crop_to_student_view)
            student_maps = warp(student_maps, student_view_to_crop, self.stride)
            consistency = actupose.consistency_loss(student_maps, pseudo_maps, mask)
            consistency = self.map_scale * consistency
            udape = mse + consistency
            terms.update(consistency=consistency, teacher_confidence=pseudo_confidence.mean(),
                         kept=mask.float().mean(), hidden=(hidden >= 0).float().mean())

            # Losses on poses are in cells. The student's poses are computed if one asks for them.
            @functools.cache
            def poses():
                """The student's poses (B, K, 2) of source and target, differentiable."""
                source_pose = kernels.soft_argmax(source_maps, s.beta)
                target_pose = kernels.soft_argmax(student_maps, s.beta)
                return source_pose, target_pose

            if s.w_evalpose:
                source_pose, target_pose = poses()
                labelled_pose = source.keypoints / self.stride
                evalpose = actupose.evalpose(source_pose, labelled_pose, self.limbs, source.weight)
                evalpose = evalpose + actupose.evalpose(target_pose, pseudo_cells, self.limbs, mask)
                terms["evalpose"] = evalpose

            if s.w_cross:
                # Poses are compared as they stand in the image: sheared views have other angles.
                # Decision: poses with fewer than 4 triplets in common are never similar.
                if s.subcell:
                    source_cells = source_cells + actupose.subcell_offset(
                        source_maps.detach(), source_cells, confidence)
                image_pose = map_keypoints(source_cells * self.stride, invert_view(source.view))
                distance = kernels.triplet_angle_distance(
                    image_pose, gather(pseudo_cells), self.triplets, source.weight > 0, confident,
                    min_triplets=4)                                                          # Eq. 7
                similar = distance < s.gamma
                # The sum of Eq. 6 is over all pairs, while gradients are averaged over processes.
                cross_domain = world_size() * actupose.cross_domain_loss(
                    source_features, gather(teacher_features), similar, s.centred)
                terms.update(cross_domain=cross_domain, pairs=world_size() * similar.float().sum())

        loss = actupose.total_loss(udape, evalpose, cross_domain,
                                   (s.w_udape, s.w_evalpose, s.w_cross))                     # Eq. 8
        terms["loss"] = loss
        self.descend(loss, self.student)
        if self.teacher is not None:
            actupose.update_teacher(self.teacher, self.student, s.ema)
        terms = {name: value.detach() for name, value in terms.items()}
        return terms, gather(mean_confidence)


# --- The loop -------------------------------------------------------------------------------------


def train(settings, out, device="auto", resume=False):
    """One run: data, epochs, result.json and figures/ in the directory `out`. Returns the result.

    Killed at any moment and called again with the same settings and `resume`, it goes on from its
    last finished epoch. On a CPU with as many threads, a resumed run is bit-identical. Raises
    UserError for what the user can mend.
    """
    device = choose_device(device)
    out = Path(out).expanduser()
    s = resolve_amp(settings, device)
    with claimed(out):
        run = set_up(s, device, starting_point(out, resume), out)
        trainer = run.trainer
        curriculum = run.curriculum
        progress = Progress(s.method)

        for epoch in range(len(run.log), s.epochs):
            if epoch == s.pretrain_epochs:
                trainer.begin_adaptation()
            begun = time.time()

            # The source samples of this epoch, then a step per batch of them.
            count = s.iters_per_epoch * s.batch_size
            samples, pool_size = curriculum.samples(epoch, count)                        # Eq. 3
            steps = range(epoch * s.iters_per_epoch, (epoch + 1) * s.iters_per_epoch)
            stats = EpochStats(run, out)
            jobs = batches(run, samples, steps)
            for step, batch in zip(steps, prefetch(jobs, s.workers)):
                indices, source_batch, target_images = batch
                lr = learning_rate(s, step)
                trainer.optimiser.param_groups[0]["lr"] = lr
                terms, confidence = trainer.step(step, source_batch, target_images)
                stats.add(step, indices, terms, confidence)
                progress(step + 1, s.epochs * s.iters_per_epoch, f"epoch {epoch + 1}/{s.epochs}")
            stats.check_finite()
            broadcast_buffers(trainer)

            # Rank the samples for the next epoch by the student's confidence in this one.
            if curriculum.observes_all:
                all_samples = np.arange(len(run.labelled))
                curriculum.observe(all_samples, confidence_on(run.labelled, trainer))
            else:
                curriculum.observe(samples, torch.cat(stats.confidences).cpu())
            curriculum.rerank()                                                          # Eq. 4
            seconds = time.time() - begun

            # Validate, log, save.
            row = {"epoch": epoch, "lr": lr, "pool": pool_size, **stats.means()}
            if (epoch + 1) % 10 == 0 or epoch + 1 == s.epochs:
                scores, _ = evaluate(run, run.domains.val)
                for name, score in scores.items():
                    row[f"val_{name}"] = score["pck"]["all"]
            run.log.append(row)
            if rank() == 0:
                say(epoch_line(row, s.epochs, seconds))
                # The log first: a run killed between the two writes the same line again.
                write_lines(out / "log.jsonl", run.log)
                save_checkpoint(out / "last.pt", state_of(run))
                write_speed(out / "speed.jsonl", epoch, seconds, trainer)

        scores, predictions = evaluate(run, run.domains.test)
        result = {"method": s.method, "source": s.source, "target": s.target, "seed": s.seed,
                  **scores["student"], "teacher": scores.get("teacher"),
                  "val": run.log[-1]["val_student"], "epochs": s.epochs}
        if rank() == 0:
            write_json(out / "result.json", result)  # with it the run is finished
            draw_figures(run, scores, predictions, out / "figures")
        return result


def learning_rate(settings, step):
    """The learning rate of a step.

    cosine: it rises in the first iterations, then falls along half a cosine. steps: as published, a
    factor at each of some epochs.
    """
    s = settings
    if s.schedule == "steps":
        epoch = step // s.iters_per_epoch
        return s.lr * s.lr_factor ** sum(epoch >= drop for drop in s.lr_drops)
    total = s.epochs * s.iters_per_epoch
    rise = min(1.0, (step + 1) / max(s.warmup * total, 1))
    fall = (1 + math.cos(math.pi * step / total)) / 2
    return s.lr * rise * (s.lr_end + (1 - s.lr_end) * fall)


class EpochStats:
    """What the steps of an epoch report: sums of the terms, and the confidence of each source
    sample.
    """

    def __init__(self, run, out):
        self.run = run
        self.out = out
        self.sums = {}
        self.confidences = []           # (B,) per step, in the order of the samples
        self.unchecked = []  # (step, indices, terms) whose losses have not been looked at

    def add(self, step, indices, terms, confidence):
        """Take in a step. UserError where a loss or weight is not finite."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.confidences.append(confidence)
        self.unchecked.append((step, indices, terms))
        # On a GPU each check waits for the device, so only every 50th step checks.
        if self.run.trainer.device.type == "cpu" or len(self.unchecked) == 50:
            self.check_finite()

    def check_finite(self):
        """UserError where a loss or weight is not finite. It names the first step with such a loss,
        else the last one.
        """
        steps = self.unchecked
        self.unchecked = []
        if not steps:
            return
        losses = torch.stack([terms["loss"] for _, _, terms in steps])
        finite = torch.isfinite(gather(losses[None])).all(0).tolist()
        weights = torch.nn.utils.get_total_norm(self.run.trainer.student.parameters())
        if all(finite) and weights.isfinite():
            return
        first = len(steps) - 1 if all(finite) else finite.index(False)
        step, indices, terms = steps[first]
        found = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
        names = ", ".join(self.run.labelled.names(indices))
        kept = ""
        if (self.out / "last.pt").exists():
            kept = (f"; {self.out / 'last.pt'} keeps the last good state, from which --weights "
                    f"{self.out} begins")
        advice = "Lower --lr, --w-evalpose or --w-cross, in another --out"
        if step == 0:
            advice = "Look at their labels, the options of the views and --sigma"
        raise UserError(f"step {step}: loss or weights are not finite ({found}); labelled samples "
                        f"{names}. {advice}{kept}")

    def means(self):
        """{term: mean over the steps and processes}."""
        sums = gather(torch.stack(list(self.sums.values()))[None]).mean(0).tolist()
        return {name: value / len(self.confidences) for name, value in zip(self.sums, sums)}


def epoch_line(row, epochs, seconds):
    """A row of log.jsonl as a line to read."""
    words = [f"epoch {row['epoch'] + 1}/{epochs}", f"{seconds:.1f} s"]
    for name, value in row.items():
        if name.startswith("val_"):
            words.append(f"{name} {fmt(value)}")
        elif name not in ("epoch", "pool"):
            words.append(f"{name} {value:.4g}")
    return "  ".join(words)


def say(line):
    """A line on standard output, in place of a progress line that stands on the terminal.

    A reader that went away (`| head`) does not end the run.
    """
    if Progress.unfinished:
        print("\r" + " " * 79, end="\r", file=sys.stderr, flush=True)
        Progress.unfinished = False
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def set_up(settings, device, checkpoint=None, out=None):
    """Data, Pose-VAE, curriculum, networks and style transfer of a run.

    checkpoint: what to go on from, or None. out: the directory of a run to be trained: its
    config.json is written when all that training needs is there, and before anything expensive.
    Returns a namespace: settings, domains, labelled (the dataset whose labels are used), vae,
    complexity (N,) of the source's poses, curriculum, trainer, and log (a row per finished epoch).
    """
    s = settings
    domains = open_domains(s)
    source = domains.source
    skeleton = source.skeleton
    role = "target" if s.method == "oracle" else "source"
    labelled = getattr(domains, role)
    if not labelled.visible.any():
        raise UserError(f"--{role} {getattr(s, role)}: no keypoint is labelled; {s.method} needs "
                        "labels to train on")
    make_curriculum(s, np.zeros(len(source)), len(labelled))  # refuses wrong settings now
    trainer = make_trainer(s, skeleton, device)
    if s.compile and out is not None:  # evaluation does not compile
        check_compiler(device)
    if checkpoint is None:
        if s.weights:
            load_initial_weights(trainer.student, *read_weights(s))
        trainer.style_transfer = open_style(s, device, domains)
    else:
        load_networks(trainer, checkpoint, "the checkpoint")
    if out is not None:
        for dataset in (domains.val, domains.test):
            if hasattr(dataset, "check_files"):  # on a disk: fail now, not after training
                dataset.check_files(Progress("looking at pictures"))
        if rank() == 0:
            write_config(out, s, skeleton, device)

    poses = (source.keypoints, source.visible, skeleton.stand_in_rows)
    if checkpoint is None:
        vae = actupose.train_pose_vae(*poses, s.vae_steps, s.vae_kl, s.vae_latent, s.vae_width,
                                      s.seed)
    else:
        vae = actupose.PoseVAE(len(skeleton), s.vae_width, s.vae_latent).eval()
        load_weights(vae, checkpoint["vae"], "the checkpoint")
    broadcast(vae.state_dict().values())
    complexity = actupose.pose_complexity(vae, *poses)
    broadcast([complexity])
    if not complexity.isfinite().all():
        raise UserError("--vae-kl: the Pose-VAE diverged, its scores are not finite; lower it")
    complexity = complexity.numpy()
    curriculum = make_curriculum(s, complexity, len(labelled))
    run = SimpleNamespace(settings=s, domains=domains, labelled=labelled, vae=vae, trainer=trainer,
                          complexity=complexity, curriculum=curriculum, log=[])
    if checkpoint is not None:
        counts = [len(dataset) for dataset in domains]
        if checkpoint["samples"] != counts:
            raise UserError(f"the checkpoint is of {checkpoint['samples']} samples (source; target:"
                            f" train, val, test), the data has {counts}; go on with the data that "
                            "the run was started on")
        trainer.optimiser.load_state_dict(checkpoint["optimiser"])
        curriculum.load_state_dict(checkpoint["curriculum"])
        run.log = checkpoint["log"]
    elif trainer.style_transfer is not None:
        train_style(run)  # last: it can take an hour
        broadcast(trainer.style_transfer.state_dict().values())
    return run


def check_compiler(device):
    """UserError where torch.compile does not work, before anything expensive."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds, most often without a C++ compiler
        reason = str(error).splitlines()[0]
        raise UserError(f"--compile: torch.compile fails here ({reason}); leave it off") from None


def make_curriculum(settings, complexity, count):
    """The curriculum of a run: the row of actupose.CURRICULA.

    complexity: (N,) of the source's poses; count: of labelled samples. UserError where it refuses
    the settings, TypeError where it lacks something.
    """
    try:
        curriculum = actupose.CURRICULA[settings.curriculum](settings, complexity, count)
    except ValueError as error:
        raise UserError(f"--curriculum {settings.curriculum}: {error}") from None
    kind = type(curriculum).__name__
    for name in vars(actupose.FixedCurriculum):
        if not name.startswith("_") and not hasattr(curriculum, name):
            raise TypeError(f"{kind}: has no {name}; actupose.FixedCurriculum has all that a "
                            "curriculum needs")
    state = io.BytesIO()
    torch.save(curriculum.state_dict(), state)
    state.seek(0)
    try:
        torch.load(state, weights_only=True)
    except pickle.UnpicklingError:
        raise TypeError(f"{kind}.state_dict: gives more than tensors and plain values, which no "
                        "checkpoint can give back") from None
    return curriculum


def style_images(dataset, i, settings, device):
    """The i-th batch of images of a domain for the style networks, normalised."""
    indices = shuffled_batch(len(dataset), min(16, settings.batch_size), i, settings.seed)
    images, _, _ = dataset[indices]
    return normalise(unit_range(images.to(device)))


def open_style(settings, device, domains):
    """The style networks of a run with the weights that are given; None when off."""
    s = settings
    if s.style == "off":
        return None
    torch.manual_seed(s.seed)
    transfer = actupose.StyleTransfer(s.style).to(device)
    if s.style_weights:
        encoder = Path(s.style_weights, "vgg_normalised.pth")
        if not encoder.exists():
            raise UserError(f"--style-weights: {s.style_weights} holds no vgg_normalised.pth; give "
                            "its directory")
        load_style_weights(transfer.encoder, encoder)
    if s.style_decoder:
        load_style_weights(transfer.decoder, Path(s.style_decoder))
        for dataset in (domains.source, domains.target):
            check_decoder(transfer, style_images(dataset, 0, s, device), s.style_decoder)
    return transfer


@torch.no_grad()
def check_decoder(transfer, images, path):
    """UserError where a given decoder does not reproduce images (B, 3, S, S) without a style.

    They must come back clearly better than their mean colours would. AdaIN's own decoder.pth fails:
    it was trained on images in 0 ... 1, those here are normalised.
    """
    decoded = transfer.decoder(transfer.encode(images)[-1])
    decoded = decoded[..., :images.shape[2], :images.shape[3]]
    spread = (images - images.mean((2, 3), keepdim=True)).square().mean()
    if not (decoded - images).square().mean() < spread / 2:
        raise UserError(f"--style-decoder: {path} does not reproduce the images of this run; give "
                        "one that was trained on normalised images of these domains (UDAPE's are, "
                        "AdaIN's own is not), or leave it out: it is then trained")


def train_style(run):
    """Train what was not given of the style networks, on the images of both domains."""
    s = run.settings
    trainer = run.trainer
    transfer = trainer.style_transfer
    if s.style_decoder:
        transfer.requires_grad_(False).eval()
        return
    domains = (run.domains.source, run.domains.target)

    def pair(i):
        return [style_images(dataset, i, s, trainer.device) for dataset in domains]

    small = s.style == "small"
    actupose.train_style_transfer(transfer, pair, s.style_iters, train_encoder=small,
                                  lr=2e-3 if small else 1e-4,  # AdaIN's own for VGG
                                  autocast=trainer.autocast, progress=Progress("style transfer"))


# --- The steps of the baseline RegDA --------------------------------------------------------------


class RegDATrainer(Trainer):
    """RegDA: the supervised step, then, on two regressors, three steps per pair of batches."""

    def __init__(self, settings, skeleton, device):
        super().__init__(settings, skeleton, device)
        if settings.pretrain_epochs == 0:
            self.begin_adaptation()  # weights of both regressors then load whole

    @property
    def uses_target(self):
        """Whether adaptation has begun: the network then has its two regressors."""
        return self.student.head_adv is not None

    def begin_adaptation(self):
        """Two new regressors on psi and a new optimiser, unless the network has regressors."""
        if not self.uses_target:
            torch.manual_seed(self.settings.seed)
            actupose.make_regressors(self.student)
            self.set_student(self.student)

    def step(self, step, source_batch, target_images):
        """`Trainer.step` before adaptation, `adversarial_step` in it."""
        if self.uses_target:
            return self.adversarial_step(step, source_batch, target_images)
        return super().step(step, source_batch, target_images)

    def adversarial_step(self, step, source_batch, target_images):
        """One iteration of RegDA's adaptation.

        The published optimisers of psi, f and f' are one here: Adam's state is per parameter.
        """
        s = self.settings
        random = draw_step(s, step, len(self.skeleton), self.device)
        network = self.student.train()
        source = self.view_source(source_batch, random)
        view = compose_views(random.crop_to_student_view, random.image_to_crop)
        target_images = target_images.to(self.device, non_blocking=True)
        target_images = self.augment(target_images, view, random.student_jitter)
        # The published code weights target keypoints by their visibility, which is a label.
        unweighted = torch.ones_like(source.weight)
        begin = s.pretrain_epochs * s.iters_per_epoch
        end = s.epochs * s.iters_per_epoch
        factor = actupose.gradient_factor(step - begin, end - begin)
        psi = (network.backbone, network.upsampling)
        f = network.head
        f_adv = network.head_adv

        def regress(images):
            """Heatmaps of f and f', and the targets of f' by f's maxima: ground truth and false."""
            with self.autocast():
                maps, maps_adv = actupose.regressor_maps(network, images, factor)
            ground_truth, ground_false = actupose.ground_maps(maps.float(), s.sigma, s.subcell)
            return maps.float(), maps_adv.float(), ground_truth, ground_false

        # A: on the source all parts learn, and f' learns to agree with f (weight 4, the margin).
        maps, maps_adv, ground_truth, _ = regress(source.images)
        kl = actupose.heatmap_kl(maps, source.labels, source.weight)
        agreement = actupose.heatmap_kl(maps_adv, ground_truth, source.weight, 1e-7)
        self.descend(kl + 4 * agreement, *psi, f, f_adv)
        # B: on the target f' learns to disagree.
        _, maps_adv, _, ground_false = regress(target_images)
        disagreement = actupose.heatmap_kl(maps_adv, ground_false, unweighted, 1e-7)
        self.descend(disagreement, f_adv)
        # C: on the target psi learns features on which f' agrees with f.
        _, maps_adv, ground_truth, _ = regress(target_images)
        target_agreement = actupose.heatmap_kl(maps_adv, ground_truth, unweighted, 1e-7)
        self.descend(target_agreement, *psi)

        probabilities = maps.flatten(2).softmax(-1).view_as(maps)
        _, _, mean_confidence = kernels.heatmap_argmax_mean(probabilities, source.weight)
        terms = dict(kl=kl, agreement=agreement, disagreement=disagreement,
                     target_agreement=target_agreement, confidence=mean_confidence.mean(),
                     loss=kl + 4 * agreement + disagreement + target_agreement)
        terms = {name: value.detach() for name, value in terms.items()}
        return terms, gather(mean_confidence)


def make_trainer(settings, skeleton, device):
    """The trainer of a method."""
    kind = RegDATrainer if settings.method == "regda" else Trainer
    return kind(settings, skeleton, device)


# --- Evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def decode(network, images, settings, device):
    """uint8 images (B, 3, S, S) -> keypoints (B, K, 2) in pixels, confidence (B, K), on the CPU."""
    images = normalise(unit_range(images.to(device))).contiguous(memory_format=torch.channels_last)
    maps, _ = network.eval()(images)
    cells, confidence = actupose.decode_keypoints(maps, settings.subcell)
    if network.head_adv is not None:                            # RegDA's maps are logits
        confidence = maps.flatten(2).softmax(-1).amax(-1)
    return cells.cpu() * network.stride, confidence.cpu()


def predict(trainer, network, dataset):
    """Keypoints (N, K, 2) in pixels and confidences (N, K) of a whole dataset, on the CPU."""
    keypoints = []
    confidences = []
    for indices in torch.arange(len(dataset)).split(64):
        images, _, _ = dataset[indices]
        found, confidence = decode(network, images, trainer.settings, trainer.device)
        keypoints.append(found)
        confidences.append(confidence)
    return torch.cat(keypoints), torch.cat(confidences)


def confidence_on(dataset, trainer):
    """The student's mean confidence (N,) on each labelled sample: a pass without augmentation."""
    _, confidence = predict(trainer, trainer.student, dataset)
    visible = dataset.visible
    confidence = (confidence * visible).sum(1) / visible.sum(1).clamp(min=1)
    broadcast([confidence])
    return confidence


def scored_teacher(trainer):
    """The teacher as it is scored and shown."""
    # Decision: with the student's BatchNorm statistics. Its own, of augmented views, fit clean
    # images badly.
    teacher = actupose.make_teacher(trainer.teacher)
    for own, students in zip(teacher.buffers(), trainer.student.buffers()):
        own.copy_(students)
    return teacher


def evaluate(run, dataset):
    """Scores {"student": ..., "teacher": ...} of the present weights; the student's predictions."""
    s = run.settings
    trainer = run.trainer
    complexity = actupose.pose_complexity(run.vae, dataset.keypoints, dataset.visible,
                                          dataset.skeleton.stand_in_rows)
    bins = actupose.assign_bins(complexity, min(s.bins, len(dataset)))

    def score(predictions):
        return actupose.score(predictions[0], dataset, trainer.stride, s.subcell, bins, s.bins)

    predictions = predict(trainer, trainer.student, dataset)
    scores = {"student": score(predictions)}
    if trainer.teacher is not None:
        scores["teacher"] = score(predict(trainer, scored_teacher(trainer), dataset))
    return scores, predictions


def evaluate_run(out, device, places):
    """`evaluate RUN`: score the last checkpoint and draw the pictures again.

    places: {setting: path} where the run's data lie now, which goes into config.json, unless the
    scores differ from those in result.json: that is a UserError.
    """
    settings = dataclasses.replace(saved_settings(out), **places)
    run = set_up(settings, device, load_run(out / "last.pt"))
    scores, predictions = evaluate(run, run.domains.test)
    result = {**scores["student"], "teacher": scores.get("teacher")}
    say(run_summary(result))
    path = out / "result.json"
    finished = path.exists()
    if finished:
        draw_figures(run, scores, predictions, out / "figures")
        saved = read_json(path)
        if any(saved.get(key) != value for key, value in result.items()):
            raise UserError(f"{path}: holds other scores; small differences are expected where "
                            "machine or --device or the number of threads is another, large ones "
                            "where the data are")
    if places:
        found = {name: getattr(settings, name) for name in places}
        write_json(out / "config.json", {**read_json(out / "config.json"), **found})
    if finished:
        say(f"the same as {path}")
    else:
        say(f"after {len(run.log)} of {settings.epochs} epochs; --resume --out {out} goes on")


def fmt(value, digits=1):
    """A score as text, a dash where nothing is labelled."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def run_summary(result):
    """What a run prints at its end: PCK by group, EvalPose score, PCK by complexity bin."""
    groups = "".join(f"{name:>11}" for name in result["pck"])
    lines = [f"PCK@0.05  {groups}   EvalPose"]
    for name, scores in (("student", result), ("teacher", result["teacher"])):
        if scores is not None:
            cells = "".join(f"{fmt(value):>11}" for value in scores["pck"].values())
            lines.append(f"{name:10}{cells}{fmt(scores['evalpose']):>11}")
    bins = " ".join(fmt(value, 0) for value in result["bins"])
    lines.append(f"student by complexity bin, simple to complex: {bins}")
    return "\n".join(lines)


# --- Processes: `torchrun --nproc-per-node N train.py ...` ----------------------------------------
#
# All draw the same epoch and random numbers, compute their share of each batch, and average
# gradients. What looks at the whole batch (confidence mask, pairs of Eq. 6, BatchNorm on GPUs) is
# gathered.


def world_size():
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process. Process 0 writes the files and speaks."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(rows):
    """This rank's slice of a replicated batch. world_size() divides its length."""
    count = len(rows) // world_size()
    return rows[rank() * count:(rank() + 1) * count]


def gather(rows):
    """The inverse of `shard`: (N, ...) of every process -> (N * world_size(), ...), by rank.

    With several processes the result has no gradient.
    """
    if world_size() == 1:
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def broadcast(tensors):
    """Copy rank 0's values to all ranks, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def broadcast_buffers(trainer):
    """Copy rank 0's BatchNorm statistics to all ranks: on CPUs each has its own."""
    broadcast(trainer.student.buffers())
    if trainer.teacher is not None:
        broadcast(trainer.teacher.buffers())


def average_gradients(network):
    """Replace the gradients by their mean over the processes."""
    if world_size() == 1:
        return
    for parameter in network.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


# --- Files of a run, checkpoints, weights ---------------------------------------------------------


def write_json(path, value):
    """JSON, replaced atomically. ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_lines(path, rows):
    """A line of JSON per row, replaced atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json(path):
    """A JSON object that a run wrote. UserError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        advice = "put a copy in its place; last.pt has the weights"
        if path.name == "result.json":
            advice = "remove it, and --resume writes it anew"
        raise UserError(f"{path}: damaged, no JSON object; {advice}")
    return value


def write_config(out, settings, skeleton, device):
    """config.json: settings, skeleton, and what computes the run. With it `out` holds a run."""
    write_json(out / "config.json", {
        **dataclasses.asdict(settings), "skeleton": dataclasses.asdict(skeleton),
        "processes": world_size(), "device": kernels.common.device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "numpy": np.__version__,
        "pillow": PIL.__version__, "python": sys.version.split()[0]})


def saved_settings(out):
    """The settings in a run's config.json."""
    known = {f.name for f in dataclasses.fields(Settings)}
    config = read_json(out / "config.json")
    try:
        settings = Settings(**{name: value for name, value in config.items() if name in known})
    except (UserError, TypeError) as error:
        raise UserError(f"{out / 'config.json'}: {error}; mend it, or give another run") from None
    for name, value in dataclasses.asdict(settings).items():
        if name not in config and value:  # a new setting that is 0, off or empty changes no run
            raise UserError(f"{out / 'config.json'}: has no {name}: another version of the "
                            "code wrote it; add the value that the run was started with")
    return settings


def write_speed(path, epoch, seconds, trainer):
    """A further line of speed.jsonl: what depends on the clock and so cannot stand in log.jsonl."""
    images = trainer.settings.iters_per_epoch * trainer.settings.batch_size
    if trainer.uses_target:
        images *= 2
    row = {"epoch": epoch, "seconds": round(seconds, 3),
           "images_per_second": round(images / seconds, 1), "memory_gb": peak_memory_gb()}
    if trainer.device.type == "cuda":
        row["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(trainer.device) / 1e9, 2)
    before = path.read_text() if path.exists() else ""
    write_text(path, f"{before}{json.dumps(row)}\n")


def peak_memory_gb():
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def state_of(run):
    """What a checkpoint holds: tensors and plain values, so that it loads without running code.

    Random numbers need no state: each is a function of the seed, the step and the sample.
    """
    def state(part):
        return None if part is None else part.state_dict()

    trainer = run.trainer
    return {"log": run.log, "samples": [len(dataset) for dataset in run.domains],
            "student": state(trainer.student), "teacher": state(trainer.teacher),
            "style": state(trainer.style_transfer), "vae": state(run.vae),
            "optimiser": state(trainer.optimiser), "curriculum": state(run.curriculum)}


def save_checkpoint(path, state):
    """torch.save and the SHA-256 of its bytes, in place of `path`, which becomes previous.pt.

    At every moment last.pt or previous.pt is whole.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path, keep=path.with_name("previous.pt")) as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_run(path):
    """A checkpoint that `save_checkpoint` wrote. Verifies the checksum before loading."""
    try:
        content = memoryview(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file (a run has it after its first epoch)") from None
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        hint = ""
        if path.name == "last.pt" and path.with_name("previous.pt").exists():
            hint = (" (without a result.json, train.py --resume goes on from previous.pt, an epoch "
                    "older)")
        raise UserError(f"{path}: damaged, its digest does not fit{hint}")
    return load_torch(io.BytesIO(content), path)


def load_torch(file, path):
    """A torch file as a dictionary of tensors and plain values. Nothing in it is executed."""
    try:
        # UDAPE's and RegDA's files hold the options they were written with: plain values, too.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about TorchScript: the error below says it
            state = torch.load(file, map_location="cpu", weights_only=True)
        reason = f"it holds a {type(state).__name__}"
        advice = "save the weights alone: torch.save(model.state_dict(), FILE)"
    except OSError as error:  # not there, a directory, not ours to read
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # of many kinds, where the file is damaged
        state = None
        reason = "damaged, or not written by torch.save"
        advice = "fetch it again, or save the weights by torch.save(model.state_dict(), FILE)"
        refused = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if refused:
            reason = f"it holds {refused[1] or 'a TorchScript module'}, which could run code"
            advice = "if you trust it, save its weights alone: torch.save(model.state_dict(), FILE)"
        elif is_safetensors(path):
            reason = "it is a safetensors file"
            advice = "convert it: torch.save(safetensors.torch.load_file(FILE), OUT)"
    if not isinstance(state, dict):
        raise UserError(f"{path}: no readable dictionary of tensors and plain values ({reason}); "
                        f"{advice}")
    return state


def is_safetensors(path):
    """Whether a file begins as safetensors files do: the length of a header, then the header, in
    JSON.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27


@contextmanager
def claimed(out):
    """Hold a run's directory while this process trains it. UserError where another process does."""
    if rank() != 0:
        yield
        return
    missing = [path for path in (out, *out.absolute().parents) if not path.exists()]
    check_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out: another process is at work in {out}; give another") from None
    try:
        yield
    finally:
        for path in missing:  # nothing was written before a mistake was found
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        os.close(handle)                                        # lets go of it


def check_writable(path, name):
    """UserError, for an option, where a directory cannot be written to, or cannot be made."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{name}: {nearest} is not a directory that can be written to; give "
                        "another")


def starting_point(out, resume):
    """The checkpoint to go on from, previous.pt where last.pt is damaged; None to start anew."""
    last = out / "last.pt"
    previous = out / "previous.pt"
    files = [out / "config.json", out / "result.json", last, previous]
    if not resume and rank() == 0 and any(file.exists() for file in files):
        raise UserError(f"--out: {out} holds a run; give another, add --resume, or `evaluate "
                        f"{out}`")
    if rank() == 0:  # of a run that was killed while it wrote
        remove_leftovers(out)
    if not resume or not (last.exists() or previous.exists()):
        return None                                             # new, or without a finished epoch
    try:
        return load_run(last)
    except UserError as damage:
        if not previous.exists():
            raise
        state = load_run(previous)
        gather(torch.zeros(1))                                  # all have read it
        if rank() == 0:
            warn(f"{damage}: going on from {previous}, {len(state['log'])} epochs done, to the "
                 "same result")
            os.replace(previous, last)  # or the damaged file would become previous.pt
        return state


def load_weights(module, state, path, hint="Is it of another --architecture or skeleton?"):
    """module.load_state_dict, strict. UserError names the file, what does not fit, and the hint."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]                     # after torch's headline
        raise UserError(f"{path}: {first.strip()} {hint}") from None


def load_networks(trainer, checkpoint, path):
    """Restore student, RegDA's regressors, teacher and style networks, where it has them."""
    if "head_adv.0.weight" in checkpoint["student"]:
        trainer.begin_adaptation()
    load_weights(trainer.student, checkpoint["student"], path)
    if checkpoint["teacher"] is not None:
        trainer.teacher = actupose.make_teacher(trainer.student)
        load_weights(trainer.teacher, checkpoint["teacher"], path)
    if checkpoint["style"] is not None:
        transfer = actupose.StyleTransfer(trainer.settings.style).to(trainer.device)
        load_weights(transfer, checkpoint["style"], path)
        trainer.style_transfer = transfer.requires_grad_(False).eval()


def load_style_weights(network, path):
    """Published AdaIN weights into an encoder or decoder, by name. Further layers are ignored."""
    own = network.state_dict()
    state = load_torch(path, path)
    state = {name: value for name, value in state.items() if name in own}
    load_weights(network, state, path, "Is it a file of AdaIN or UDAPE?")


# torchvision's ResNets trained on ImageNet; the digits are the start of the file's SHA-256.
IMAGENET_FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth",
                  "resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}


def read_weights(settings):
    """What --weights names: a dictionary for `actupose.load_pose_weights`, and where it is from."""
    if settings.weights != "imagenet":
        path = Path(settings.weights)
        if path.is_dir():
            return load_run(path / "last.pt"), path
        return load_torch(path, path), path
    url = f"https://download.pytorch.org/models/{IMAGENET_FILES[settings.architecture]}"
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                     weights_only=True)
    except Exception as error:  # no network, a wrong hash, a damaged file
        raise UserError(f"--weights imagenet: {url} cannot be had ({error}); give the file, fetched"
                        f" by other means, or remove a damaged one from {torch.hub.get_dir()}"
                        ) from None
    return weights, url


def load_initial_weights(network, weights, path):
    """Weights from `read_weights` into the pose network. Prints what was loaded and what not."""
    try:
        loaded, ignored, left = actupose.load_pose_weights(network, weights)
    except ValueError as error:
        raise UserError(f"--weights: {path}: {error}; give its --architecture, or other weights"
                        ) from None
    if rank() == 0:
        say(f"weights from {path}: {len(loaded)} tensors; ignored: {', '.join(ignored) or 'none'}; "
            f"left at the initialisation: {', '.join(left) or 'none'}")


# --- Pictures -------------------------------------------------------------------------------------
#
# Drawn at twice their size and reduced when saved, for smooth lines. Coordinates are the drawing's.

INK = (34, 40, 49)
GREY = (112, 122, 136)
GRID = (228, 232, 238)
WHITE = (255, 255, 255)
BLUE = (38, 132, 230)
RED = (240, 78, 88)
GREEN = (32, 164, 118)
YELLOW = (250, 178, 40)
PURPLE = (136, 84, 208)
SLATE = (96, 108, 122)
PALE_BLUE = (206, 226, 250)
PALETTE = (BLUE, RED, GREEN, YELLOW, PURPLE, SLATE)
# Colours of joints by the beginning of their names. Others are yellow.
JOINT_COLOURS = {"r-": RED, "l-": BLUE, "thumb": RED, "index": PURPLE, "middle": GREEN,
                 "ring": BLUE, "little": SLATE}
BINS_LABEL = "complexity bin, simple to complex"


def blank(width, height):
    """A white picture of this size and its ImageDraw."""
    image = Image.new("RGB", (width, height), WHITE)
    return image, ImageDraw.Draw(image, "RGBA")


def write(draw, x, y, text, size=24, colour=GREY, anchor="ls"):
    """Text at (x, y) with one of Pillow's anchors. Returns where it ends if it starts at x."""
    font = ImageFont.load_default(size=size)
    draw.text((x, y), str(text), colour, font, anchor)
    return x + font.getlength(str(text))


def save_picture(image, path):
    """PNG at half the size, replaced atomically. Makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.reduce(2).save(file, format="PNG", optimize=True)


class Chart:
    """Axes in a box (x0, y0, x1, y1) of a drawing, for x in [left, right] and y in [low, high].

    labels: text at x = 0, 1, ... in place of numbers.
    """

    def __init__(self, draw, box, x_range, y_range, title, xlabel, labels=None):
        self.draw = draw
        self.box = box
        self.left, self.right = x_range
        self.low, self.high = y_range
        x0, y0, x1, y1 = box
        if labels is None:
            labels = {value: f"{value:,.6g}" for value in ticks(self.left, self.right)}
        else:
            labels = dict(enumerate(labels))
        for value, text in labels.items():
            x, _ = self.place(value, self.low)
            write(draw, x, y1 + 32, text, 22, anchor="ms")
        for value in ticks(self.low, self.high):
            _, y = self.place(self.left, value)
            draw.line([x0, y, x1, y], GRID if value else GREY, 2)
            write(draw, x0 - 12, y, f"{value:,.6g}", 22, anchor="rm")
        write(draw, (x0 + x1) / 2, y1 + 68, xlabel, anchor="ms")
        self.end_of_title = write(draw, x0, y0 - 24, title, 28, INK)

    def place(self, x, y):
        """Values -> coordinates of the drawing."""
        x0, y0, x1, y1 = self.box
        return (x0 + (x - self.left) / (self.right - self.left) * (x1 - x0),
                y1 - (y - self.low) / (self.high - self.low) * (y1 - y0))

    def legend(self, names):
        """Names in the colours of PALETTE, after the title."""
        y = self.box[1] - 24
        end = self.end_of_title + 40
        for name, colour in zip(names, PALETTE * len(names)):
            self.draw.rectangle([end, y - 20, end + 20, y], colour)
            end = write(self.draw, end + 28, y, name) + 28

    def line(self, x, y, colour):
        """A line through the points. One that is NaN is left out, and its neighbours are joined."""
        points = [self.place(*point) for point in zip(x, y) if np.isfinite(point[1])]
        self.draw.line(points, colour, 4, joint="curve")

    def mark(self, x, text):
        """A vertical line with a word beside it."""
        at, _ = self.place(x, self.low)
        self.draw.line([at, self.box[1], at, self.box[3]], GREY, 2)
        write(self.draw, at + 8, self.box[1] + 20, text, 20)


def ticks(start, end):
    """Round numbers between start and end, about six."""
    power = 10.0 ** math.floor(math.log10((end - start) / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (end - start) / 6)
    return np.arange(math.ceil(start / step), math.floor(end / step) + 1) * step


def value_range(values):
    """Where an axis begins and ends that has 0 and these numbers on it, NaN left out."""
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    low = min(values.min(initial=0), 0)
    high = values.max(initial=0)
    return low, high + 0.05 * max(high - low, 1e-9)


def draw_bars(path, series, title):
    """Bars at x = 0, 1, ..., those of the series side by side: Fig. 9. series: {label: y (n,)}."""
    values = np.array(list(series.values()), float)
    count = values.shape[1]
    canvas, draw = blank(max(1800, 30 * values.size), 720)
    chart = Chart(draw, (110, 80, canvas.width - 20, 600), (-0.6, count - 0.4), value_range(values),
                  title, BINS_LABEL)
    for i, y in enumerate(values):
        for at in np.flatnonzero(np.isfinite(y)):
            start = at - 0.4 + 0.8 * i / len(values)
            end = start + 0.72 / len(values)
            top_left = chart.place(start, max(y[at], 0))
            bottom_right = chart.place(end, min(y[at], 0))
            draw.rectangle([*top_left, *bottom_right], PALETTE[i % len(PALETTE)])
    if len(series) > 1:
        chart.legend(series)
    save_picture(canvas, path)


def draw_boxes(draw, box, boxes, title):
    """A box plot in a part of a drawing: Fig. 3.

    boxes: (n, 6): a whisker's end, three quartiles, the other whisker's end, mean. NaN: a gap.
    """
    chart = Chart(draw, box, (-0.6, len(boxes) - 0.4), value_range(boxes), title, BINS_LABEL)
    for at, (lowest, lower, median, upper, highest, mean) in enumerate(boxes):
        if not np.isfinite(mean):
            continue
        draw.line([chart.place(at, lowest), chart.place(at, highest)], BLUE, 2)
        corners = [*chart.place(at - 0.3, upper), *chart.place(at + 0.3, lower)]
        draw.rectangle(corners, PALE_BLUE, BLUE, 2)
        for y, half, width in ((lowest, 0.15, 2), (median, 0.3, 4), (highest, 0.15, 2)):
            draw.line([chart.place(at - half, y), chart.place(at + half, y)], BLUE, width)
        draw.circle(chart.place(at, mean), 6, RED, WHITE)


def draw_curves(path, log, begin):
    """The terms and validation PCK of a run over its epochs, a small chart each.

    log: rows of log.jsonl; begin: the epoch in which adaptation begins, None where there is none.
    """
    names = ["val_student"]
    for row in log:
        for name in row:
            if name not in (*names, "epoch", "pool", "val_teacher"):
                names.append(name)
    columns = 3
    canvas, draw = blank(columns * 720, math.ceil(len(names) / columns) * 440)
    for i, name in enumerate(names):
        rows = [row for row in log if row.get(name) is not None]
        values = [row[name] for row in rows]
        x0 = i % columns * 720 + 110
        y0 = i // columns * 440 + 70
        chart = Chart(draw, (x0, y0, x0 + 570, y0 + 270), (0, max(len(log) - 1, 1)),
                      value_range(values), name, "epoch")
        chart.line([row["epoch"] for row in rows], values, BLUE)
        if begin is not None:
            chart.mark(begin, "adaptation")
    save_picture(canvas, path)


def draw_skeleton(draw, keypoints, visible, skeleton, width, confidence=None):
    """Limbs and joints of one figure, outlined in white, coloured by body side or finger.

    draw: ImageDraw.Draw(image, "RGBA"); keypoints: (K, 2) in pixels of that image; visible: (K,), 0
    leaves one out; width: of a limb in pixels; confidence: (K,) in [0, 1], fades what is unsure.
    """
    points = [tuple(point) for point in np.asarray(keypoints, float).tolist()]
    shown = np.asarray(visible) > 0
    sure = np.ones(len(points))
    if confidence is not None:
        sure = np.nan_to_num(np.asarray(confidence)).clip(0, 1)
    opacity = (255 * (0.45 + 0.55 * sure)).round().astype(int)
    colours = [joint_colour(name) for name in skeleton.names]
    limbs = limbs_to_draw(skeleton, shown)
    for a, b in limbs:
        outline = (*WHITE, min(opacity[a], opacity[b]) * 4 // 5)
        draw.line([points[a], points[b]], outline, round(width * 1.7))
    for a, b in limbs:
        sides = {colours[a], colours[b]} - {YELLOW}
        colour = sides.pop() if len(sides) == 1 else YELLOW
        draw.line([points[a], points[b]], (*colour, min(opacity[a], opacity[b])), round(width))
    for k in np.flatnonzero(shown):
        draw.circle(points[k], width * 1.35, (*WHITE, opacity[k]))
        draw.circle(points[k], width * 0.95, (*colours[k], opacity[k]))


def joint_colour(name):
    """The colour of a keypoint, by the beginning of its name."""
    fitting = (colour for start, colour in JOINT_COLOURS.items() if name.startswith(start))
    return next(fitting, YELLOW)


def limbs_to_draw(skeleton, shown):
    """The limbs (a, b) whose ends are shown, without those that shortcut two others.

    The line from hip to hip repeats those from the hips to the pelvis, where that is labelled.
    """
    neighbours = [set() for _ in skeleton.names]
    limbs = []
    for a, b in skeleton.limbs:
        if shown[a] and shown[b] and not neighbours[a] & neighbours[b]:
            neighbours[a].add(b)
            neighbours[b].add(a)
            limbs.append((a, b))
    return limbs


class Panel(NamedTuple):
    """An image with a caption above it and, where there are keypoints, a skeleton on it."""
    caption: str
    image: torch.Tensor                 # uint8 (3, S, S)
    keypoints: torch.Tensor = None      # (K, 2) in pixels of the image
    visible: torch.Tensor = None        # (K,)
    confidence: torch.Tensor = None     # (K,), fades what is unsure


def draw_panels(path, rows, skeleton, titles=(), side=320):
    """A picture of Panels. rows: lists of Panels; titles: of the columns; side: of a panel."""
    wide = side + 12
    high = side + 52
    top = 44 if titles else 0
    columns = max(len(row) for row in rows)
    canvas, draw = blank(12 + columns * wide, top + 8 + len(rows) * high)
    for c, title in enumerate(titles):
        write(draw, 10 + c * wide, 36, title, 30, INK)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            x = 10 + c * wide
            y = top + r * high
            write(draw, x, y + 32, panel.caption, 26, GREY if titles else INK)
            canvas.paste(draw_panel(panel, skeleton, side), (x, y + 44))
    save_picture(canvas, path)


def draw_panel(panel, skeleton, side):
    """The picture of one Panel, without its caption."""
    picture = Image.fromarray(panel.image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    if panel.keypoints is not None:  # pixel centres stay centres
        keypoints = (panel.keypoints + 0.5) * (side / panel.image.shape[-1]) - 0.5
        draw = ImageDraw.Draw(picture, "RGBA")
        draw_skeleton(draw, keypoints, panel.visible, skeleton, side / 56, panel.confidence)
    return picture


def truth_panel(caption, dataset, i):
    """Sample i of a dataset with its labels."""
    images, keypoints, visible = dataset[torch.tensor([int(i)])]
    return Panel(caption, images[0], keypoints[0], visible[0])


def prediction_panel(trainer, dataset, i, keypoints, confidence):
    """Sample i with a predicted pose (K, 2), under its own PCK and EvalPose score.

    As in the paper's Fig. 8, this PCK is of all labelled keypoints; the tables leave some out.
    """
    images, true, visible = dataset[torch.tensor([i])]
    one = SimpleNamespace(size=dataset.size, keypoints=true, visible=visible)
    true, weight = actupose.scoring_frame(one, trainer.stride, trainer.settings.subcell)
    pck = actupose.pck(keypoints[None], true, weight, dataset.size)["all"]
    evalpose = actupose.evalpose_score(keypoints[None], true, trainer.limbs.cpu(), weight)
    caption = f"PCK {fmt(pck, 0)}  EvalPose {fmt(evalpose, 0)}"
    return Panel(caption, images[0], keypoints, torch.ones(len(keypoints)), confidence)


def draw_figures(run, scores, predictions, folder):
    """All pictures of a finished run. The test images shown are the first of the split, not chosen.

    A picture that cannot be drawn costs a line on stderr: the result is written already.
    """
    s = run.settings
    source = run.domains.source
    curriculum = run.curriculum
    bins = actupose.assign_bins(run.complexity, s.bins)
    begin = s.pretrain_epochs if s.method in ADAPTING else None
    pck = {name: found["bins"] for name, found in scores.items()}
    pictures = {
        "curves.png": (draw_curves, run.log, begin),
        "predictions.png": (draw_predictions, run, predictions),
        "complexity.png": (draw_complexity, source, bins, s.bins),
        "bins.png": (draw_bars, pck, "PCK@0.05"),
    }
    if run.labelled is source:
        pictures["similar.png"] = (draw_similar, run, predictions)
    if s.w_cross:
        pictures["pairs.png"] = (draw_pairs, run)
    if curriculum.drawn:
        pictures["curriculum.png"] = (draw_drawn, curriculum, s)
    if curriculum.reranks:
        now = actupose.assign_bins(curriculum.score, s.bins)
        pictures["reranked.png"] = (draw_reranked, source, bins, now)
    remove_leftovers(folder)  # of a run that was killed while it drew
    for name, (draw, *arguments) in pictures.items():
        try:
            draw(folder / name, *arguments)
        except Exception as error:
            warn(f"{folder / name}: not drawn ({type(error).__name__}: {error})")


def draw_predictions(path, run, predictions):
    """Fig. 8: the first test images, three to a row: image, labels, the student's prediction."""
    panels = []
    for i in range(min(12, len(run.domains.test))):
        panels += panels_of(run, predictions, i)
    rows = [panels[start:start + 9] for start in range(0, len(panels), 9)]
    draw_panels(path, rows, run.trainer.skeleton)


def panels_of(run, predictions, i):
    """A test image alone, with its labels, and with the student's prediction."""
    test = run.domains.test
    keypoints, confidence = predictions
    truth = truth_panel("ground truth", test, i)
    found = prediction_panel(run.trainer, test, i, keypoints[i], confidence[i])
    return [Panel("", truth.image), truth, found]


def draw_similar(path, run, predictions):
    """Fig. 1: the first test images, each with the three nearest of 10,000 source poses."""
    source = run.domains.source
    test = run.domains.test
    shown = slice(0, 6)
    first = slice(0, 10_000)
    distance = kernels.triplet_angle_distance(
        test.keypoints[shown], source.keypoints[first], run.trainer.triplets.cpu(),
        test.visible[shown] > 0, source.visible[first] > 0, min_triplets=4)
    rows = []
    for i, nearest in enumerate(distance.argsort()[:, :3].tolist()):
        row = panels_of(run, predictions, i)
        for n in nearest:
            row.append(truth_panel(f"Eq. 7: {distance[i, n]:.3f} rad", source, n))
        rows.append(row)
    draw_panels(path, rows, run.trainer.skeleton)


def draw_pairs(path, run):
    """Fig. 7: the nearest pairs by Eq. 7, no image twice, of the first 64 training images of both.

    The student's poses of the source, the teacher's of the target. As in a step, unlabelled source
    keypoints and the target's less confident half are pruned. The latter are drawn faint.
    """
    s = run.settings
    trainer = run.trainer
    images, _, visible = run.domains.source[torch.arange(min(64, len(run.domains.source)))]
    target_images, _, _ = run.domains.target[torch.arange(min(64, len(run.domains.target)))]
    poses, _ = decode(trainer.student, images, s, trainer.device)
    target_poses, confidence = decode(scored_teacher(trainer), target_images, s, trainer.device)
    sure = actupose.confidence_mask(confidence, s.mask_ratio)
    distance = kernels.triplet_angle_distance(poses, target_poses, trainer.triplets.cpu(),
                                              visible > 0, sure, min_triplets=4)
    panels = []
    while len(panels) < 24 and distance.isfinite().any():
        m, n = divmod(distance.argmin().item(), len(target_images))
        caption = f"Eq. 7: {distance[m, n]:.3f} rad"
        remark = "" if distance[m, n] < s.gamma else f"not below {show(s.gamma)}"
        all_shown = torch.ones(len(target_poses[n]))
        panels.append(Panel(caption, images[m], poses[m], visible[m]))
        panels.append(Panel(remark, target_images[n], target_poses[n], all_shown, sure[n].float()))
        distance[m] = math.inf
        distance[:, n] = math.inf
    if panels:
        rows = [panels[start:start + 8] for start in range(0, len(panels), 8)]
        draw_panels(path, rows, trainer.skeleton)


def draw_drawn(path, curriculum, settings):
    """Fig. 5: how many samples of each bin made the pool of five epochs, and were trained on.

    The epochs: from the first to the one in which the peak arrives at the last bin.
    """
    s = settings
    arrival = min(math.ceil(s.epochs * (s.bins - 1) / (s.bins * s.pace)), s.epochs - 1)
    trained = s.iters_per_epoch * s.batch_size
    series = {}
    for epoch in np.unique(np.linspace(0, arrival, 5).round().astype(int)).tolist():
        drawn = curriculum.drawn[epoch]
        pool = sum(drawn)
        series[f"epoch {epoch}: {min(pool, trained):,} of {pool:,}"] = drawn
    canvas, draw = blank(2200, 720)
    counts = value_range(list(series.values()))
    chart = Chart(draw, (110, 80, 2180, 600), (0, max(s.bins - 1, 1)), counts, "samples drawn",
                  f"{BINS_LABEL}; in the legend: trained on, of the pool")
    for drawn, colour in zip(series.values(), PALETTE):
        chart.line(range(s.bins), drawn, colour)
    chart.legend(series)
    save_picture(canvas, path)


def draw_reranked(path, source, before, now):
    """Fig. 6: the samples that moved farthest since the Pose-VAE ranked them, up and then down.

    before, now: (N,) bins by the Pose-VAE's scores and by the present ones.
    """
    order = np.argsort(before - now, kind="stable")
    rows = []
    for chosen in (order[:8], order[-8:]):
        rows.append([truth_panel(f"bin {before[i]} to {now[i]}", source, i) for i in chosen])
    draw_panels(path, rows, source.skeleton)


def draw_complexity(path, dataset, bins, num_bins):
    """Fig. 2 and 3: some poses of five bins, and a box plot of Eq. 7 between the poses of each bin.

    bins: (N,) the bin of each pose of the dataset. A box has the quartiles of the distances between
    a hundred random poses of its bin, whiskers to the last within 1.5 heights of the box, and their
    mean as a dot.
    """
    skeleton = dataset.skeleton
    random = np.random.default_rng(0)
    chosen = [random.permutation(np.flatnonzero(bins == j))[:100] for j in range(num_bins)]
    canvas, draw = blank(2800, 1120)
    for r, j in enumerate(np.unique(np.linspace(0, num_bins - 1, 5).astype(int))):
        write(draw, 40, 170 + r * 190, f"bin {j}")
        for n, i in enumerate(chosen[j][:7]):
            pose, seen = actupose.normalise_poses(dataset.keypoints[[i]], dataset.visible[[i]],
                                                  skeleton.stand_in_rows)
            place = pose.view(-1, 2).numpy() * 160 + (250 + n * 190, 170 + r * 190)
            draw_skeleton(draw, place, seen.view(-1, 2)[:, 0], skeleton, 120 / len(skeleton))
    boxes = [box_of_bin(dataset, indices) for indices in chosen]
    draw_boxes(draw, (1700, 80, 2760, 1000), boxes,
               "mean angular difference (Eq. 7) between the poses of a bin, rad")
    save_picture(canvas, path)


def box_of_bin(dataset, indices):
    """A row of `draw_boxes`: Eq. 7 between all pairs of these poses. NaN where there is none."""
    indices = torch.from_numpy(indices)
    poses = dataset.keypoints[indices]
    valid = dataset.visible[indices] > 0
    triplets = torch.tensor(dataset.skeleton.triplets)
    distance = kernels.triplet_angle_distance(poses, poses, triplets, valid, valid)
    pairs = distance[torch.ones_like(distance).triu(1) > 0]
    pairs = pairs[pairs.isfinite()].numpy()
    if len(pairs) == 0:
        return [math.nan] * 6
    lower, median, upper = np.quantile(pairs, (0.25, 0.5, 0.75))
    reach = 1.5 * (upper - lower)
    inside = pairs[(pairs >= lower - reach) & (pairs <= upper + reach)]
    return [inside.min(), lower, median, upper, inside.max(), pairs.mean()]


# --- Photographs ----------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")                   # what is taken from a folder


def find_photographs(inputs, out):
    """Files and folders -> {name: file}. UserError for what is missing, or would be overwritten."""
    files = {}
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = [file for file in sorted(path.iterdir())
                     if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        if not found or not path.exists():
            raise UserError(f"{path}: no such picture, or a folder without any "
                            f"({' '.join(SUFFIXES)})")
        for file in found:
            if file.resolve().parent == out.resolve():
                raise UserError(f"--out: {out} holds {file}, which could be overwritten; give "
                                "another")
            if files.setdefault(file.name, file).resolve() != file.resolve():
                raise UserError(f"{file}: {files[file.name]} has the same name; give each an --out "
                                "of its own")
    return files


def predict_run(run, inputs, out, box, device):
    """`predict RUN IMAGE...`: draw each photograph FILE with its skeleton (FILE.jpg, FILE.json).

    box: (x, y, width, height), the part of each picture that is looked at, or None. Returns the
    exit status: 1 if a photograph failed, else 0.
    """
    settings = saved_settings(run)
    skeleton = data.Skeleton(**read_json(run / "config.json")["skeleton"])
    files = find_photographs(inputs, out)
    check_writable(out, "--out")
    trainer = make_trainer(settings, skeleton, device)
    load_networks(trainer, load_run(run / "last.pt"), run / "last.pt")
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress("photographs")
    failed = 0
    for done, (name, file) in enumerate(files.items(), 1):
        try:
            predict_photograph(trainer, name, file, out, box)
        except Exception as error:  # a damaged file, or a box outside of it: others go on
            failed += 1
            message = str(error)
            warn(message if message.startswith(str(file)) else f"{file}: {message}")
        progress(done, len(files))
    say(f"{len(files) - failed} of {len(files)} photographs done by {run}, in {out}")
    return 1 if failed else 0


def predict_photograph(trainer, name, file, out, box):
    """Draw one photograph with its skeleton, and write its keypoints."""
    size = trainer.settings.image_size
    skeleton = trainer.skeleton
    image = data.open_picture(file)
    x, y, w, h = box or (0, 0, *image.size)
    region = (max(x, 0), max(y, 0), min(x + w, image.width), min(y + h, image.height))
    if region[0] >= region[2] or region[1] >= region[3]:
        raise UserError(f"--box {show(box)} lies outside of its {image.width} x {image.height} "
                        "pixels; give x,y,w,h inside")
    crop = letterbox(image, region, size)
    keypoints, confidence = decode(trainer.student, crop[None], trainer.settings, trainer.device)
    _, _, view = letterbox_view(region, size)
    keypoints = map_keypoints(keypoints[0].double(), invert_view(torch.from_numpy(view)))
    confidence = confidence[0]
    left, top, right, bottom = region
    width = max(right - left, bottom - top, 150) / 100
    draw = ImageDraw.Draw(image, "RGBA")
    draw_skeleton(draw, keypoints, torch.ones(len(skeleton)), skeleton, width, confidence)
    with replacing(out / f"{name}.jpg") as picture:
        image.save(picture, format="JPEG", quality=92)
    rows = []
    for joint, (x, y), c in zip(skeleton.names, keypoints.tolist(), confidence.tolist()):
        rows.append({"name": joint, "x": round(x, 3), "y": round(y, 3), "confidence": round(c, 4)})
    write_json(out / f"{name}.json", {"image": str(file), "width": image.width,
                                      "height": image.height, "box": box, "keypoints": rows})


# --- Command line ---------------------------------------------------------------------------------

TRAIN_HELP = """Train ACTUPose or a baseline. With no option: ACTUPose on the built-in benchmark.

  python train.py --source mannequin-hand      the demo with hands
  python train.py --resume --out RUN           go on with a run that was stopped
  python train.py evaluate RUN                 score its last checkpoint again
  python train.py predict RUN IMAGE... --out DIR

Tables, sweeps and ablations: python -m docs.reproduce --help"""
PREDICT_HELP = """Find the keypoints of photographs with a run's student: a picture and a JSON file
each.

Keypoints are in pixels of the upright picture, the centre of its first pixel at (0, 0). Confidence
is the height of the heatmap's peak (RegDA: of its softmax). A file that cannot be read is named,
and others go on."""
# The field of Settings that begins a group of options in --help.
GROUPS = {"method": "task", "architecture": "network", "epochs": "schedule",
          "curriculum": "curriculum", "mask_ratio": "adaptation", "rotation": "augmentation",
          "w_udape": "losses", "amp": "speed"}


class Parser(argparse.ArgumentParser):
    """Says on one line what is wrong, with the nearest option for a typo."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", default="auto",
                          help="cpu, cuda, cuda:1, ... [a GPU if there is one]")

    def add_settings(self, skip=()):
        """An option per field of Settings, in groups; the help has its default and the paper's."""
        group = self
        for f in dataclasses.fields(Settings):
            if f.name in GROUPS:
                group = self.add_argument_group(GROUPS[f.name])
            if f.name in skip:
                continue
            kind = type(f.default)
            choices = f.metadata["choices"]
            paper = f"; paper {show(PAPER[f.name])}" if f.name in PAPER else ""
            text = f"{f.metadata['help']} [{show(f.default) or 'none'}{paper}]"
            metavar = {bool: "on|off", tuple: "A,B"}.get(kind, kind.__name__)
            group.add_argument(option_of(f.name), default=argparse.SUPPRESS, choices=choices,
                               type=PARSERS.get(kind, kind), help=text.replace("%", "%%"),
                               metavar=None if choices else metavar)

    def parse_known_args(self, words=None, namespace=None):
        """argparse's. Remembers for `error` which parser reads which words."""
        Parser.reading = self
        self.words = words
        return super().parse_known_args(words, namespace)

    def error(self, message):
        """UserError instead of argparse's exit."""
        known = list(Parser.reading._option_string_actions)
        for word in Parser.reading.words:
            word = word.partition("=")[0]
            if word.startswith("--") and word not in known:
                message = f"unknown option {word}"
                for near in difflib.get_close_matches(word, known, 1, 0.75):
                    message += f"; did you mean {near}?"
        raise UserError(f"{message} (--help lists the options)")


def parse_switch(text):
    """argparse's type of an on|off option."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"use on or off, got {text!r}")
    return text == "on"


def parse_numbers(text):
    """argparse's type of an option with several numbers: "0.6,1.3" -> (0.6, 1.3)."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"use numbers with commas, got {text!r}") from None


def parse_path(text):
    """argparse's type of a path; ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("use a path, got nothing")
    return Path(text).expanduser()


PARSERS = {bool: parse_switch, tuple: parse_numbers}


def check_settings(s):
    """UserError names the option, what it takes and what was given. Expands ~ in paths."""
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        if isinstance(value, list):  # a tuple that comes from config.json
            value = tuple(value)
            setattr(s, f.name, value)
        check_value(f, value)
    for name in PATHS:
        setattr(s, name, os.path.expanduser(getattr(s, name)))
    for name in ("zoom", "crop"):
        pair = getattr(s, name)
        if len(pair) != 2 or pair[0] > pair[1]:
            refuse(name, "must be low,high with low <= high", pair)
    if s.image_size % 32:
        refuse("image_size", "must be a multiple of 32", s.image_size)
    if s.curriculum == "hardest" and s.hard_bins > s.bins:
        refuse("hard_bins", f"must be at most --bins {s.bins}", s.hard_bins)
    if s.method in ADAPTING and s.pretrain_epochs >= s.epochs:
        refuse("pretrain_epochs", f"must be below --epochs {s.epochs}, or adaptation never begins; "
               "give both", s.pretrain_epochs)
    if s.source == s.target:
        raise UserError(f"--source and --target must differ (both {s.source})")
    if s.weights == "imagenet" and s.architecture not in IMAGENET_FILES:
        rule = f"--weights imagenet needs {' or '.join(IMAGENET_FILES)}"
        refuse("architecture", rule, s.architecture)
    for name in ("style_weights", "style_decoder"):
        if s.style == "small" and getattr(s, name):
            refuse(name, "needs --style vgg", getattr(s, name))
    if s.style == "vgg" and not s.style_weights:
        raise UserError("--style-weights: --style vgg needs the directory of vgg_normalised.pth "
                        "(or use --style small)")
    for role, loaders in (("source", SOURCES), ("target", TARGETS)):
        domain = getattr(s, role)
        root = getattr(s, f"{role}_root")
        if domain in loaders and not root:
            raise UserError(f"--{role}-root: --{role} {domain} needs its directory")
        if domain not in loaders and root:
            refuse(f"{role}_root", f"leave it out, {domain} is rendered", root)


def check_value(f, value):
    """UserError where the value of a field of Settings has another type or breaks its rule."""
    kind = type(f.default)
    rule = f.metadata
    if type(value) is not kind and not (kind is float and type(value) is int):
        refuse(f.name, f"must be of type {kind.__name__}", value)
    if rule["choices"] and value not in rule["choices"]:
        refuse(f.name, f"use {' or '.join(rule['choices'])}", value)
    if kind is str:
        return
    numbers = value if kind is tuple else (value,)
    for number in numbers:
        if not math.isfinite(number):
            refuse(f.name, "must be finite", value)
        if number < rule["low"]:
            refuse(f.name, f"must be at least {rule['low']}", value)
        if number <= rule["above"]:
            refuse(f.name, f"must be above {rule['above']}", value)
        if number > rule["high"]:
            refuse(f.name, f"must be at most {rule['high']}", value)


def refuse(name, rule, value):
    """UserError: the option of a setting, the rule for its values, the value that was given."""
    raise UserError(f"{option_of(name)}: {rule}, got {show(value)}")


def option_of(name):
    """The command line's option for a setting."""
    return "--" + name.replace("_", "-")


def show(value):
    """A setting as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return ",".join(show(number) for number in value)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def choose_device(name):
    """auto, cpu, cuda, ... -> torch.device; under torchrun a GPU each. UserError if not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=torch.device(name)).device
        torch.zeros(1, device=device).item()                    # "meta" holds no values
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device: torch finds no device {name!r} here; use cpu, or cuda or cuda:1"
                        " where there are such GPUs") from None
    return device


def resolve_amp(settings, device):
    """The settings with --amp auto resolved: bf16 where the device computes in it, else off."""
    if settings.amp != "auto":
        return settings
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dataclasses.replace(settings, amp="bf16" if native else "off")


def check_same_settings(out, given):
    """The settings of the run in `out`, CHANGEABLE ones as given. UserError where others differ."""
    saved = saved_settings(out)
    places = {}
    for name, value in given.items():
        was = getattr(saved, name)
        if name in PATHS:
            value = os.path.expanduser(value)                   # as in config.json
        if name in CHANGEABLE:
            places[name] = value
        elif was != value and (name, value) != ("amp", "auto"):
            raise UserError(f"{option_of(name)}: the run in {out} was started with {show(was)}, not"
                            f" {show(value)}; give {show(was) or 'nothing'}, or another --out")
    return dataclasses.replace(saved, **places)


def make_parser():
    """The command line: train with no word, evaluate RUN, predict RUN IMAGE..."""
    parser = Parser(prog="train.py", description=TRAIN_HELP)
    add = parser.add_argument
    add("--out", type=parse_path, help="directory of the run [runs/METHOD-TARGET-sSEED]")
    add("--resume", action="store_true", help="go on with the unfinished run in --out")
    add("--preset", choices=tuple(PRESETS),
        help="values of options that are not given [demo]")
    parser.add_settings()
    words = parser.add_subparsers(dest="word", metavar="evaluate | predict", title="other commands")

    evaluate = words.add_parser("evaluate", description="Score a run's last checkpoint, and draw "
                                "its pictures, again.")
    evaluate.add_argument("run", type=parse_path, help="directory of the run")
    for name in ("source_root", "target_root", "cache"):
        evaluate.add_argument(option_of(name), default=argparse.SUPPRESS, metavar="str",
                              help="where it lies now, if it was moved")

    predict = words.add_parser("predict", description=PREDICT_HELP)
    predict.add_argument("run", type=parse_path, help="directory of the run")
    predict.add_argument("inputs", nargs="+", type=parse_path, metavar="image",
                         help=f"a picture or a folder ({' '.join(SUFFIXES)})")
    predict.add_argument("--out", type=parse_path, required=True, help="directory of the results")
    predict.add_argument("--box", type=parse_numbers, metavar="X,Y,W,H",
                         help="the part of each picture that shows the person or hand: corner, "
                         "width and height in its pixels; --box=X,... where X is negative "
                         "[all of it]")
    return parser


def command(arguments):
    """What the words of the command line ask for. Returns the exit status."""
    options = vars(make_parser().parse_args(arguments))
    word = options.pop("word")
    if word and arguments[0] != word:
        raise UserError(f"{word}: comes first, its options after it")
    if word and world_size() > 1:
        raise UserError(f"{word}: takes one process; run it without torchrun")
    if word == "evaluate":
        places = {name: options[name] for name in CHANGEABLE if name in options}
        evaluate_run(options["run"], choose_device(options["device"]), places)
        return 0
    if word == "predict":
        box = options["box"]
        if box and (len(box) != 4 or min(box[2:]) <= 0 or not np.isfinite(box).all()):
            raise UserError(f"--box: use x,y,w,h in pixels with w and h above 0, got {show(box)}")
        return predict_run(options["run"], options["inputs"], options["out"], box,
                           choose_device(options["device"]))
    train_command(**options)
    return 0


def train_command(preset, out, device, resume, **given):
    """`train` with the options of the command line."""
    started = time.time()
    if not (resume and out):
        settings = make_settings(preset or "demo", **given)
        out = out or Path(f"runs/{settings.method}-{settings.target}-s{settings.seed}")
    if resume:
        settings = check_same_settings(out, {**preset_values(preset, out), **given})
    if settings.batch_size % world_size():
        raise UserError(f"--batch-size: {settings.batch_size} is no multiple of the {world_size()} "
                        "processes")
    if resume and (out / "result.json").exists():
        if rank() == 0:
            say(f"{out}: the run is finished; `evaluate {out}` draws its pictures again")
        return
    for name, (other, values) in IDLE.items():
        present = getattr(settings, other)
        if name in given and present in values and rank() == 0:
            warn(f"{option_of(name)}: has no effect with {option_of(other)} {show(present)}")
    if settings.schedule == "steps" and min(settings.lr_drops) >= settings.epochs and rank() == 0:
        warn(f"--lr-drops: {show(settings.lr_drops)} lie beyond --epochs {settings.epochs}; the "
             "learning rate never drops")
    result = train(settings, out, device, resume)
    if rank() == 0:
        say(run_summary(result))
        say(f"{time.time() - started:.0f} s, {peak_memory_gb()} GB; pictures in {out / 'figures'}")


def preset_values(preset, out):
    """What --preset says about the run in `out`, which goes on: {setting: value}.

    What the run's method and source decide comes before a preset and is left out.
    """
    if preset is None:
        return {}
    saved = saved_settings(out)
    first = {**HANDS.get(saved.source, {}), **METHODS[saved.method]}
    values = {name: getattr(Settings, name) for name in PAPER}
    values.update(PRESETS[preset])
    return {name: value for name, value in values.items() if name not in {*first, *CHANGEABLE}}


def warn(message, name="train.py"):
    """One line on stderr, below a progress line that may stand there."""
    if Progress.unfinished:
        print(file=sys.stderr)
        Progress.unfinished = False
    try:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")


def main(arguments):
    """The program. Status 1: a photograph failed, or a bug; 2: a mistake; 130: Ctrl-C."""
    processes = 1
    if dist.is_available() and dist.is_torchelastic_launched():  # by torchrun
        processes = int(os.environ["WORLD_SIZE"])
    advice = "; --resume goes on from the last saved epoch"
    if arguments[:1] in (["evaluate"], ["predict"]):
        advice = ""
    try:
        if processes > 1:
            dist.init_process_group()  # gloo for CPU tensors, NCCL for GPUs
        status = guarded(command, arguments, "train.py", advice)
    except Exception:  # a bug: its traceback is shown, in any case
        if processes == 1:
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    if processes > 1:  # under torchrun a normal shutdown can hang
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def guarded(program, arguments, name, advice):
    """Run a program on its arguments, with expected errors on one line. Returns the exit status."""
    mend_streams()
    try:
        return program(arguments)
    except (UserError, data.DataError) as error:
        warn(error, name)
    except OSError as error:  # a full disk, say
        warn(f"{error.filename}: {error.strerror}{advice}" if error.filename else error, name)
    except KeyboardInterrupt:
        warn(f"interrupted{advice}", name)
        return 130
    return 2


def mend_streams():
    """Mend the output streams, so that writing to them cannot end a run.

    What is written to a closed stream is dropped. Letters that an encoding lacks are escaped.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                      # pytest's have none
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
