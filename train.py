"""Train, evaluate, predict and compare: `python train.py` runs ACTUPose on the built-in benchmark.

Read `Trainer.step`, one iteration of the method (Fig. 4 of the paper), and `train`, one run. Before them
stand the settings and the data of a run; after them evaluation, files, pictures, `compare`, the command line.
"""
import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps

import actupose
import data
import kernels
from data import (Progress, colour_jitter, compose_views, invert_view, letterbox, letterbox_view,
                  map_keypoints, normalise, prefetch, random_affine_view, random_crop_view, render_heatmaps,
                  replacing, shuffled_batch, unit_range, warp, write_text)


class UserError(Exception):
    """A mistake that the user can mend: printed on one line, exit status 2."""


# --- Settings -----------------------------------------------------------------------------------------------

# A method is the one loop with parts on or off; an ablation is ACTUPose with one setting changed.
SUPERVISED = dict(curriculum="off", style="off", w_evalpose=0.0, w_cross=0.0)
METHODS = {
    "source-only": SUPERVISED,
    "regda": SUPERVISED,                                    # `Trainer.regda_step` after them
    "udape": dict(curriculum="off", w_evalpose=0.0, w_cross=0.0),
    "udape+vae-hm": dict(curriculum="hardest", w_evalpose=0.0, w_cross=0.0),
    "actupose": dict(),
    "oracle": SUPERVISED,                                   # from the target's labels
}
TAUGHT = ("udape", "udape+vae-hm", "actupose")              # a teacher joins after the pretraining epochs
ABLATIONS = {
    "no-curriculum": dict(curriculum="off"), "no-eq4": dict(rescoring="off"),
    "literal-eq4": dict(rescoring="literal"), "min-max": dict(scale="minmax"),
    "static": dict(curriculum="static"),                         # the same dose of hard poses, without order
    "no-evalpose": dict(w_evalpose=0.0), "no-cross-domain": dict(w_cross=0.0),
    "centred-cross-domain": dict(centred=True), "literal-eq8": dict(map_sums=False),
    "no-style": dict(style="off"), "no-occlusion": dict(occlusion=0.0),
}
DRAWN = ("active", "static")      # curricula that draw a new pool in each epoch; the others have a fixed one
# --preset paper: §4 of the paper and the published base method. What is not named here is as in the demo.
PAPER = dict(architecture="resnet101", weights="imagenet", image_size=256, sigma=2.0, subcell=False,
             iters_per_epoch=500, workers=8, lr=1e-4, lr_drops=(44.0, 59.0), lr_factor=0.1, ema=0.999,
             pace=2.0, vae_steps=20000, occlusion_confidence=0.9, style="vgg", style_iters=20000)
# A source of hands: Gamma lets as large a share of random source pairs be similar as on bodies.
HANDS = {"mannequin-hand": dict(target="mannequin-hand-wild", gamma=0.019),
         "rhd": dict(rotation=180.0, gamma=0.019)}                             # in every direction

# Rendered domains: the arguments of data.Mannequin.
RENDERED = {"mannequin": dict(domain="source"), "mannequin-hand": dict(domain="source", hand=True),
            "mannequin-wild": dict(domain="target"), "mannequin-hand-wild": dict(domain="target", hand=True)}
# Datasets on disk: their loaders.
SOURCES = {"surreal": data.SURREAL, "rhd": data.RenderedHandPose}
TARGETS = {"lsp": data.LSP, "human36m": data.Human36M, "h3d": data.Hand3DStudio}


def option(default, text, choices=None, low=-math.inf, above=-math.inf, high=math.inf):
    """A field of Settings: default, help, and the values it takes (low <= or above < value <= high)."""
    return field(default=default, metadata=dict(help=text, choices=choices, low=low, above=above, high=high))


@dataclass
class Settings:
    """What a run is told. The defaults are the demo's; all but cache and workers decide its result."""
    method: str = option("actupose", "which of the paper's rows to train", tuple(METHODS))
    source: str = option("mannequin", "labelled source domain", (*RENDERED, *SOURCES))
    source_root: str = option("", "directory of the source dataset, for a source on disk")
    target: str = option("mannequin-wild", "unlabelled target domain", (*RENDERED, *TARGETS))
    target_root: str = option("", "directory of the target dataset, for a target on disk")
    shoulders: str = option("published", "of surreal: its collar joints, or the true", ("published", "true"))
    source_count: int = option(6000, "rendered source training images", low=1)
    target_count: int = option(2000, "rendered unlabelled target images", low=1)
    seed: int = option(0, "seed of the data, initialisation and every draw", low=0, high=2 ** 31 - 1)
    cache: str = option("", "directory that keeps rendered images, safe to delete")

    architecture: str = option("narrow", "pose network", tuple(actupose.ARCHITECTURES))
    weights: str = option("", "start of the network: imagenet (torchvision's file, fetched once), a file of "
                          "torchvision's, RegDA's, UDAPE's or ours, or a run's directory")
    image_size: int = option(64, "side of the input in pixels", low=32)
    sigma: float = option(1.0, "deviation of a target heatmap's Gaussian in cells", above=0)
    subcell: bool = option(True, "targets and decoding finer than a cell; off: the published protocol")

    epochs: int = option(70, "epochs in all", low=1)
    pretrain_epochs: int = option(40, "epochs on the source before the teacher joins", low=0)
    iters_per_epoch: int = option(45, "iterations per epoch", low=1)
    batch_size: int = option(32, "images of each domain per batch, over all processes", low=1)
    workers: int = option(0, "threads that decode batches ahead (0: none)", low=0)
    lr: float = option(1e-3, "learning rate of Adam", above=0)
    lr_drops: tuple = option((45.0, 60.0), "epochs at which it drops, counted from 0")
    lr_factor: float = option(0.3, "factor of each drop", above=0)
    ema: float = option(0.99, "decay of the teacher's moving average", low=0, high=1)

    curriculum: str = option("active", "samples of an epoch", ("active", "static", "off", "hardest"))
    bins: int = option(25, "N_b, complexity bins", low=1)
    hard_bins: int = option(8, "bins that udape+vae-hm trains on", low=1)
    pace: float = option(6.0, "lambda of Eq. 3: how fast the peak moves to hard bins", above=0)
    spread: float = option(0.25, "sigma of Eq. 3", above=0)
    scale: str = option("rank", "s_j of Eq. 3: a bin's rank or its scaled mean score", ("rank", "minmax"))
    rescoring: str = option("relative", "re-scoring by confidence", ("relative", "literal", "off"))
    vae_steps: int = option(1500, "training steps of the Pose-VAE", low=1)
    vae_kl: float = option(1e-3, "lambda of Eq. 1", low=0)
    vae_latent: int = option(8, "latent dimensions of the Pose-VAE", low=1)
    vae_width: int = option(128, "width of its hidden layers", low=1)

    mask_ratio: float = option(0.5, "share of pseudo-labels, the least confident, left out", low=0, high=1)
    occlusion: float = option(0.5, "probability of hiding a confident keypoint", low=0, high=1)
    occlusion_confidence: float = option(0.5, "confidence from which a keypoint may be hidden", low=0)
    style: str = option("small", "networks of the style transfer", ("small", "vgg", "off"))
    style_weights: str = option("", "directory of vgg_normalised.pth, and of decoder.pth or it is trained")
    style_prob: float = option(0.5, "probability of restyling a batch, each direction", low=0, high=1)
    style_iters: int = option(300, "iterations that train the style networks", low=1)

    rotation: float = option(60.0, "random rotation of the views, +- degrees (rhd: 180)", low=0)
    shear: float = option(30.0, "random shear of the views, +- degrees", low=0, high=80)
    translate: float = option(0.05, "random translation, +- share of the side", low=0)
    zoom: tuple = option((0.6, 1.3), "random scale of the views: low,high", above=0)
    crop: tuple = option((0.6, 1.0), "area of the random resized crop: low,high", above=0, high=1)
    jitter: float = option(0.25, "strength of the colour jitter", low=0, high=1)

    w_udape: float = option(1.0, "w1 of Eq. 8", low=0)
    w_evalpose: float = option(0.1, "w2 of Eq. 8, EvalPose (Eq. 5)", low=0)
    w_cross: float = option(0.01, "w3 of Eq. 8, cross-domain features (Eq. 6)", low=0)
    centred: bool = option(False, "subtract each domain's batch mean of the features in Eq. 6")
    map_sums: bool = option(True, "heatmap errors of Eq. 8 as sums over the body; off: means over the cells")
    beta: float = option(50.0, "sharpness of the soft-argmax", above=0)
    gamma: float = option(0.06, "Gamma, the threshold on Eq. 7 in radians (hands: 0.019)", low=0)

    amp: str = option("auto", "train in bf16; auto: where the device computes in it", ("auto", "bf16", "off"))
    compile: bool = option(False, "compile the pose networks (torch.compile): minutes at the start")

    def __post_init__(self):
        """Check every setting. UserError names the option, what it takes and what was given."""
        def require(fits, name, rule):
            if not fits:
                given = show(getattr(self, name))
                raise UserError(f"--{name.replace('_', '-')}: {rule}" + (f", got {given}" if given else ""))

        for f in dataclasses.fields(self):
            rule, kind = f.metadata, type(f.default)
            if isinstance(getattr(self, f.name), list):                      # from config.json
                setattr(self, f.name, tuple(getattr(self, f.name)))
            value = getattr(self, f.name)
            fits = type(value) is kind or (kind is float and type(value) is int)
            require(fits, f.name, f"must be of type {kind.__name__}")
            choices = rule["choices"] or (value,)
            require(value in choices, f.name, f"use {' or '.join(map(str, choices))}")
            for number in value if kind is tuple else () if kind is str else (value,):
                require(math.isfinite(number), f.name, "must be finite")
                require(number >= rule["low"], f.name, f"must be at least {rule['low']}")
                require(number > rule["above"], f.name, f"must be above {rule['above']}")
                require(number <= rule["high"], f.name, f"must be at most {rule['high']}")
        for name in ("zoom", "crop"):
            pair = getattr(self, name)
            require(len(pair) == 2 and pair[0] <= pair[1], name, "must be low,high with low <= high")
        require(self.image_size % 32 == 0, "image_size", "must be a multiple of 32")
        require(self.hard_bins <= self.bins or self.curriculum != "hardest", "hard_bins",
                f"must be at most --bins {self.bins}")
        adapts = self.method in (*TAUGHT, "regda")
        require(self.pretrain_epochs < self.epochs or not adapts, "pretrain_epochs",
                f"must be below --epochs {self.epochs}, or adaptation never begins; give both")
        require(self.source != self.target, "target", "must differ from --source")
        require(self.weights != "imagenet" or self.architecture in IMAGENET_FILES, "architecture",
                f"--weights imagenet needs {' or '.join(IMAGENET_FILES)}")
        require(self.style != "small" or not self.style_weights, "style_weights", "needs --style vgg")
        require(self.style != "vgg" or self.style_weights, "style_weights",
                "--style vgg needs the directory of vgg_normalised.pth (or use --style small)")
        for name, loaders in (("source", SOURCES), ("target", TARGETS)):
            domain, root = getattr(self, name), getattr(self, f"{name}_root")
            require(domain not in loaders or root, f"{name}_root", f"--{name} {domain} needs its directory")
            require(domain in loaders or not root, f"{name}_root", f"leave it out, {domain} is rendered")


def show(value):
    """A setting as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    return ",".join(str(v).removesuffix(".0") if isinstance(v, float) else str(v) for v in numbers)


def make_settings(preset="demo", **given):
    """Settings of a preset, then what hands change, then what is given, then what makes the method."""
    source, fixed = given.get("source"), METHODS.get(given.get("method"), {})
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(f"--{name.replace('_', '-')}: --method {given['method']} has {show(value)}, got "
                            f"{show(given[name])}; leave it out, or use --method actupose")
    values = {**(PAPER if preset == "paper" else {}), **HANDS.get(source, {})}
    return Settings(**{**values, **given, **fixed})


# --- Data of a run ------------------------------------------------------------------------------------------


def open_domains(settings):
    """The datasets of a run: labelled source, unlabelled target, val for choices, test for the table.

    Images are rendered or decoded when they are first used. UserError or DataError names what is missing.
    """
    s = settings

    def open_split(role, name, split):
        if name in RENDERED:
            count = {"source": s.source_count, "target": s.target_count}[role] if split == "train" else None
            return data.Mannequin(**RENDERED[name], split=split, size=s.image_size, count=count, seed=s.seed,
                                  cache=s.cache or None, progress=Progress(f"rendering {name} {split}"))
        options = dict(shoulders=s.shoulders, progress=Progress(name)) if name == "surreal" else {}
        try:
            dataset = {**SOURCES, **TARGETS}[name](getattr(s, f"{role}_root"), split, s.image_size, **options)
        except FileNotFoundError as e:
            raise UserError(f"--{role}-root: {e}") from None
        data.check_dataset(dataset, f"--{role} {name}")
        return dataset

    source, target = open_split("source", s.source, "train"), open_split("target", s.target, "train")
    if source.skeleton.names != target.skeleton.names:
        raise UserError(f"--source {s.source} --target {s.target}: {len(source.skeleton)} and "
                        f"{len(target.skeleton)} keypoints; take two domains of bodies or two of hands")
    for name, dataset in (("source", source), ("target", target)):
        for option in ("batch_size", "bins"):
            if len(dataset) < getattr(s, option):
                raise UserError(f"--{option.replace('_', '-')}: {getattr(s, option)} is more than the "
                                f"{len(dataset)} training images of the {name}")
    return SimpleNamespace(source=source, target=target, val=open_split("target", s.target, "val"),
                           test=open_split("target", s.target, "test"))


def batches(run, pool, steps):
    """Jobs for `prefetch`, one per step. Each loads (source indices (B,) of all processes, source batch,
    target batch); the batches are this process's share, as `Trainer.step` takes them."""
    s, target = run.settings, run.domains.target if run.trainer.uses_target else None
    pin = run.trainer.device.type == "cuda"            # the copy to a GPU is then asynchronous

    def load(dataset, indices):
        return [t.pin_memory() if pin else t for t in dataset[shard(indices)]]

    for step in steps:
        # A drawn pool is new in each epoch and in random order; a fixed one is passed over again and again.
        if s.curriculum in DRAWN:
            at = (np.arange(s.batch_size) + (step - steps[0]) * s.batch_size) % len(pool)
        else:
            at = shuffled_batch(len(pool), s.batch_size, step, s.seed)
        indices, other = torch.from_numpy(pool[at]), None
        if target is not None:
            other = torch.from_numpy(shuffled_batch(len(target), s.batch_size, step, s.seed + 1))
        yield lambda indices=indices, other=other: (
            indices, load(run.labelled, indices), None if other is None else load(target, other))


# --- The step -----------------------------------------------------------------------------------------------


def draw_step(seed, step, batch_size, num_keypoints, device):
    """The random numbers of a step, by name: a function of (seed, step). Uniform in [0, 1), (B, n).

    Every process draws them for the whole batch and keeps its share: their number changes nothing.
    """
    random = np.random.default_rng((seed, step))

    def draw(n):
        numbers = torch.from_numpy(random.random((batch_size, n), dtype=np.float32))
        return shard(numbers).to(device, non_blocking=True)

    return SimpleNamespace(
        source_crop=draw(3), source_affine=draw(5), source_jitter=draw(6),
        target_crop=draw(3), student_affine=draw(5), student_jitter=draw(6),
        teacher_affine=draw(5), teacher_jitter=draw(6), occlusion=draw(3 + num_keypoints),
        restyle_source=random.random(), restyle_target=random.random(),                 # one number per batch
        alpha_source=random.random(), alpha_target=random.random())


class Trainer:
    """Student, teacher, style networks, optimiser, and the step that trains them."""

    def __init__(self, settings, skeleton, device):
        s = self.settings = settings
        self.skeleton, self.device, self.style_transfer, self.teacher = skeleton, device, None, None
        torch.manual_seed(s.seed)
        self.set_student(actupose.PoseResNet(s.architecture, len(skeleton)))
        # A function of the network is compiled, not the network: parameters keep their names in checkpoints.
        def call(network, images):
            return network(images)

        self.call = torch.compile(call) if s.compile else call
        self.stride, self.cells = self.student.stride, s.image_size // self.student.stride
        # Decision: the terms of Eq. 8 are sums over the body, averaged over samples: heatmap errors over
        # keypoints and cells, as Eq. 5 over limbs. Their mean, 1e-3, would drown under w2 (--map-sums off).
        self.map_cells = len(skeleton) * self.cells ** 2 if s.map_sums else 1
        self.limbs = torch.tensor(skeleton.limbs, device=device)
        self.triplets = torch.tensor(skeleton.triplets, device=device)

    def set_student(self, network):
        """Place the network that is trained on the device, with an optimiser of its own."""
        if world_size() > 1 and self.device.type == "cuda":     # torch has no SyncBatchNorm for CPUs
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.student = network.to(self.device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.student.parameters(), lr=self.settings.lr,
                                          fused=self.device.type == "cuda")

    def start_regda(self):
        """RegDA's adaptation begins: two new regressors on psi, and a new optimiser."""
        torch.manual_seed(self.settings.seed)
        actupose.make_regressors(self.student)
        self.set_student(self.student)

    @property
    def uses_target(self):
        """Whether a step needs target images: for their style, for the teacher or for RegDA."""
        networks = self.style_transfer, self.teacher, self.student.head_adv
        return any(network is not None for network in networks)

    def autocast(self):
        """The context in which networks compute: bfloat16 with --amp bf16."""
        bf16 = self.settings.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def forward(self, network, images):
        """Heatmaps (B, K, h, h) and features (B, C) of a pose network, float32."""
        with self.autocast():
            heatmaps, features = self.call(network, images.contiguous(memory_format=torch.channels_last))
        return heatmaps.float(), features.float()

    def crop(self, u):
        """Views (B, 2, 3) of a random resized crop, from uniform numbers (B, 3)."""
        return random_crop_view(u, self.settings.image_size, self.settings.crop)

    def affine(self, u):
        """Views (B, 2, 3) of a random rotation, shear, scale and translation, from uniform numbers (B, 5)."""
        s = self.settings
        return random_affine_view(u, s.image_size, s.rotation, s.shear, s.translate, s.zoom)

    def augment(self, images, view, jitter):
        """uint8 images (B, 3, S, S) through views (B, 2, 3), with colour jitter from (B, 6), normalised."""
        return normalise(colour_jitter(warp(unit_range(images), view), jitter, self.settings.jitter))

    @torch.no_grad()
    def restyle(self, content, style, coin, alpha):
        """With probability --style-prob (coin: uniform) the content images in the style images' look."""
        if self.style_transfer is None or coin >= self.settings.style_prob:
            return content
        with self.autocast():
            return self.style_transfer(content, style, alpha).float()

    def view_source(self, random, source_batch):
        """A source batch in random views: images, views, keypoints, label maps, their weight (B, K)."""
        s = self.settings
        images, keypoints, visible = (t.to(self.device, non_blocking=True) for t in source_batch)
        view = compose_views(self.affine(random.source_affine), self.crop(random.source_crop))
        keypoints = map_keypoints(keypoints, view)
        labels, weight = render_heatmaps(keypoints, visible, self.cells, self.stride, s.sigma, s.subcell)
        return self.augment(images, view, random.source_jitter), view, keypoints, labels, weight

    def descend(self, loss, *parts):
        """A step of Adam on the parameters of these parts of the student; the others stay."""
        self.optimiser.zero_grad()
        loss.backward(inputs=[parameter for part in parts for parameter in part.parameters()])
        average_gradients(self.student)
        self.optimiser.step()

    def step(self, step, source_batch, target_batch):
        """One iteration on this process's share of a batch: Fig. 4.

        source_batch: uint8 images (B, 3, S, S), keypoints (B, K, 2) in pixels, visible (B, K); target_batch:
        the same, of which only the images are used, or None where nothing needs it. Returns scalars by name,
        the terms of Eq. 8 among them, on the device, and the mean confidence of each source sample (B,).
        """
        s = self.settings
        random = draw_step(s.seed, step, s.batch_size, len(self.skeleton), self.device)
        self.student.train()

        # Both domains in random views. One crop serves both views of a target image; they meet in its frame.
        source_images, source_view, keypoints, labels, weight = self.view_source(random, source_batch)
        styled_source = source_images
        if target_batch is not None:
            target_images = target_batch[0].to(self.device, non_blocking=True)
            common, teacher_view = self.crop(random.target_crop), self.affine(random.teacher_affine)
            view = compose_views(teacher_view, common)
            teacher_images = self.augment(target_images, view, random.teacher_jitter)
            styled_source = self.restyle(source_images, teacher_images, random.restyle_source,
                                         random.alpha_source)

        # The student learns from the source's labels. Keypoints outside the view do not count as unsure.
        predicted, features = self.forward(self.student, styled_source)
        mse = self.map_cells * actupose.heatmap_mse(predicted, labels, weight)
        cells, confidence, mean_confidence = kernels.heatmap_argmax_mean(predicted, weight)
        terms = dict(mse=mse, confidence=mean_confidence.mean())
        udape, evalpose, cross = mse, 0.0, 0.0

        if self.teacher is not None:
            with torch.no_grad():
                # The teacher labels the target images; its maps are taken back into the common frame.
                self.teacher.train()                            # batch statistics, as in the base method
                styled_target = self.restyle(teacher_images, source_images, random.restyle_target,
                                             random.alpha_target)
                maps, teacher_features = self.forward(self.teacher, styled_target)
                maps = warp(maps, invert_view(teacher_view), self.stride)
                pseudo_maps, pseudo_cells, pseudo_confidence = actupose.rectify(maps, s.sigma, s.subcell)
                confident = actupose.confidence_mask(gather(pseudo_confidence), s.mask_ratio)
                # The student gets another view of the same images, a confident keypoint hidden.
                student_view = self.affine(random.student_affine)
                view = compose_views(student_view, common)
                student_images = self.augment(target_images, view, random.student_jitter)
                in_view = map_keypoints(pseudo_cells * self.stride, student_view)
                student_images, hidden = actupose.occlude_keypoints(
                    student_images, in_view, pseudo_confidence, random.occlusion,
                    half=s.image_size * 10 / 256, probability=s.occlusion, minimum=s.occlusion_confidence)
                # Decision: what the student's view does not show, it is not asked to predict.
                mask = shard(confident) & ((in_view >= 0) & (in_view <= s.image_size - 1)).all(-1)

            # It has to agree with the pseudo-labels, in place and in the directions of the limbs.
            target_maps, _ = self.forward(self.student, student_images)
            target_maps = warp(target_maps, invert_view(student_view), self.stride)
            consistency = self.map_cells * actupose.consistency_loss(target_maps, pseudo_maps, mask)
            udape = mse + consistency
            terms.update(consistency=consistency, teacher_confidence=pseudo_confidence.mean(),
                         kept=mask.float().mean(), hidden=(hidden >= 0).float().mean())
            if s.w_evalpose:
                source_pose, target_pose = (kernels.soft_argmax(m, s.beta) for m in (predicted, target_maps))
                evalpose = (actupose.evalpose(source_pose, keypoints / self.stride, self.limbs, weight)
                            + actupose.evalpose(target_pose, pseudo_cells, self.limbs, mask))
                terms["evalpose"] = evalpose
            if s.w_cross:
                # Poses are compared (Eq. 7) as they stand in the image: a sheared view has other angles.
                if s.subcell:
                    cells = cells + actupose.subcell_offset(predicted.detach(), cells, confidence)
                pose = map_keypoints(cells * self.stride, invert_view(source_view))
                distance = kernels.triplet_angle_distance(pose, gather(pseudo_cells), self.triplets,
                                                          weight > 0, confident, min_triplets=4)      # Eq. 7
                similar = distance < s.gamma
                # Eq. 6 sums over all pairs, while gradients are averaged over the processes.
                cross = world_size() * actupose.cross_domain_loss(features, gather(teacher_features), similar,
                                                                  s.centred)
                terms.update(cross_domain=cross, pairs=world_size() * similar.float().sum())

        loss = actupose.total_loss(udape, evalpose, cross, (s.w_udape, s.w_evalpose, s.w_cross))      # Eq. 8
        self.descend(loss, self.student)
        if self.teacher is not None:
            actupose.update_teacher(self.teacher, self.student, s.ema)
        return {name: value.detach() for name, value in dict(terms, loss=loss).items()}, mean_confidence

    def regda_step(self, step, source_batch, target_batch):
        """One iteration of the baseline RegDA after pretraining; arguments and results as of `step`.

        The published optimisers of psi, f and f' are one here, as Adam's state is per parameter.
        """
        s, network = self.settings, self.student.train()
        random = draw_step(s.seed, step, s.batch_size, len(self.skeleton), self.device)
        source_images, _, _, labels, weight = self.view_source(random, source_batch)
        view = compose_views(self.affine(random.student_affine), self.crop(random.target_crop))
        target_images = target_batch[0].to(self.device, non_blocking=True)
        target_images = self.augment(target_images, view, random.student_jitter)
        unweighted = torch.ones_like(weight)            # published: the visibility of the target, a label
        begin, end = s.pretrain_epochs * s.iters_per_epoch, s.epochs * s.iters_per_epoch
        factor = actupose.gradient_factor(step - begin, end - begin)
        psi, f, f_adv = (network.backbone, network.upsampling), network.head, network.head_adv

        def regress(images):
            """Heatmaps of f and f', and what f's make of f': ground truth and ground false."""
            with self.autocast():
                maps, maps_adv = actupose.regressor_maps(network, images, factor)
            return maps.float(), maps_adv.float(), *actupose.ground_maps(maps.float(), s.sigma, s.subcell)

        # A: on the source all learn; f' is to agree with f, with a margin of 4.
        maps, maps_adv, ground_truth, _ = regress(source_images)
        kl = actupose.heatmap_kl(maps, labels, weight)
        agreement = actupose.heatmap_kl(maps_adv, ground_truth, weight, 1e-7)
        self.descend(kl + 4 * agreement, *psi, f, f_adv)
        # B: on the target f' learns to disagree.
        _, maps_adv, _, ground_false = regress(target_images)
        disagreement = actupose.heatmap_kl(maps_adv, ground_false, unweighted, 1e-7)
        self.descend(disagreement, f_adv)
        # C: psi learns features on which f' agrees all the same.
        _, maps_adv, ground_truth, _ = regress(target_images)
        target_agreement = actupose.heatmap_kl(maps_adv, ground_truth, unweighted, 1e-7)
        self.descend(target_agreement, *psi)

        confidence = kernels.heatmap_argmax_mean(maps.flatten(2).softmax(-1).view_as(maps), weight)[2]
        terms = dict(kl=kl, agreement=agreement, disagreement=disagreement, target_agreement=target_agreement,
                     confidence=confidence.mean(), loss=kl + 4 * agreement + disagreement + target_agreement)
        return {name: value.detach() for name, value in terms.items()}, confidence


# --- The loop -----------------------------------------------------------------------------------------------


def train(settings, out, device="auto", resume=False):
    """One run: data, epochs, result.json and figures/ in the directory `out`. Returns the result.

    Killed at any moment and called again with `resume`, it goes on from its last finished epoch to the same
    result, bit for bit on a CPU with as many threads. Raises UserError for what the user can mend.
    """
    out, device, started = Path(out), choose_device(device), time.time()
    s = settings = resolve_amp(settings, device)
    checkpoint = starting_point(out, resume)
    run = set_up(settings, device, checkpoint)
    trainer, curriculum, log, progress = run.trainer, run.curriculum, run.log, Progress(s.method)
    if checkpoint is None and rank() == 0:
        write_config(out, settings, trainer.skeleton, device)

    for epoch in range(len(log), s.epochs):
        if s.method in TAUGHT and epoch == s.pretrain_epochs:
            trainer.teacher = actupose.make_teacher(trainer.student)
        if s.method == "regda" and epoch == s.pretrain_epochs and trainer.student.head_adv is None:
            trainer.start_regda()
        one_step = trainer.step if trainer.student.head_adv is None else trainer.regda_step
        begun, lr = time.time(), s.lr * s.lr_factor ** sum(epoch >= drop for drop in s.lr_drops)
        trainer.optimiser.param_groups[0]["lr"] = lr

        # The source samples of this epoch.
        if s.curriculum in DRAWN:
            pool = curriculum.sample(epoch)                                                           # Eq. 3
            run.drawn.append(curriculum.drawn_per_bin.tolist())
        elif s.curriculum == "hardest":
            pool = curriculum.hardest(s.hard_bins)
        else:
            pool = np.arange(len(run.labelled))

        # A step per batch.
        steps = range(epoch * s.iters_per_epoch, (epoch + 1) * s.iters_per_epoch)
        sums, seen, confidences, unchecked = {}, [], [], []
        for step, (indices, source, target) in zip(steps, prefetch(batches(run, pool, steps), s.workers)):
            terms, confidence = one_step(step, source, target)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value
            seen.append(indices)
            confidences.append(confidence)
            unchecked.append((step, indices, terms))
            if device.type == "cpu" or len(unchecked) == 50 or step == steps[-1]:   # on a GPU each look waits
                check_finite(unchecked, run, out)
                unchecked = []
            progress(step + 1, s.epochs * s.iters_per_epoch, f"epoch {epoch + 1}/{s.epochs}")
        seconds = time.time() - begun

        # The ranking for the next epoch, by what the student was sure of in this one.
        if s.curriculum == "active":
            curriculum.observe(torch.cat(seen), gather(torch.stack(confidences, 1)).T.flatten().cpu())
            curriculum.rerank()                                                                       # Eq. 4

        # Log, validate, save.
        means = gather(torch.stack(list(sums.values()))[None]).mean(0).tolist()
        log.append({"epoch": epoch, "lr": lr, "pool": len(pool),
                    **{name: value / s.iters_per_epoch for name, value in zip(sums, means)}})
        for network in filter(None, (trainer.student, trainer.teacher)):
            broadcast(network.buffers())                        # BatchNorm's, where each process has its own
        if (epoch + 1) % 10 == 0 or epoch + 1 == s.epochs:
            scores, _ = evaluate(run, run.domains.val)
            log[-1].update((f"val_{name}", score["pck"]["all"]) for name, score in scores.items())
        if rank() == 0:
            # The log first: a run killed between the two writes the same line again.
            write_text(out / "log.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in log))
            save_checkpoint(out / "last.pt", state_of(run))
            write_speed(out / "speed.jsonl", epoch, seconds, trainer, started)

    scores, predictions = evaluate(run, run.domains.test)
    result = {"method": s.method, "source": s.source, "target": s.target, "seed": s.seed, **scores["student"],
              "teacher": scores.get("teacher"), "val": log[-1]["val_student"], "epochs": s.epochs}
    if rank() == 0:
        draw_figures(run, scores, predictions, out / "figures")
        write_json(out / "result.json", result)                 # last: with it the run is finished
    return result


def check_finite(steps, run, out):
    """UserError that names the first of the steps (step, indices, terms) with a loss that is not finite."""
    losses = gather(torch.stack([terms["loss"] for _, _, terms in steps])[None])
    finite = torch.isfinite(losses).all(0).tolist()
    if all(finite) and torch.stack([p.isfinite().all() for p in run.trainer.student.parameters()]).all():
        return
    step, indices, terms = steps[-1 if all(finite) else finite.index(False)]
    found = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
    kept = f"; {out / 'last.pt'} keeps the last good state" if (out / "last.pt").exists() else ""
    raise UserError(f"step {step}: loss or weights are not finite ({found}); source samples "
                    f"{', '.join(run.labelled.names(indices))}. Lower --lr, --w-evalpose or --w-cross{kept}")


def set_up(settings, device, checkpoint=None):
    """Data, Pose-VAE, curriculum, networks and style transfer of a run; from a checkpoint where one is given.

    Returns a namespace: settings, domains, labelled (the dataset whose labels are used), vae, curriculum,
    trainer, log (a row per finished epoch) and drawn (per epoch, the samples drawn from each bin: Fig. 5).
    """
    s, where = settings, "the checkpoint"
    if checkpoint is None and s.style_weights and not Path(s.style_weights, "vgg_normalised.pth").exists():
        raise UserError(f"--style-weights: {s.style_weights} holds no vgg_normalised.pth; give its directory")
    domains = open_domains(s)
    weights = read_weights(s) if s.weights and checkpoint is None else None
    source, skeleton = domains.source, domains.source.skeleton
    trainer = Trainer(s, skeleton, device)
    if s.method == "regda" and not s.pretrain_epochs:           # a checkpoint of RegDA then loads whole
        trainer.start_regda()
    if weights is not None:
        load_initial_weights(trainer.student, *weights)
    poses = source.keypoints, source.visible, skeleton.root
    if checkpoint is None:
        vae = actupose.train_pose_vae(*poses, s.vae_steps, s.vae_kl, s.vae_latent, s.vae_width, s.seed)
    else:
        vae = actupose.PoseVAE(len(skeleton), s.vae_width, s.vae_latent).eval()
        load_weights(vae, checkpoint["vae"], where)
    broadcast(vae.state_dict().values())
    complexity = actupose.pose_complexity(vae, *poses)
    broadcast([complexity])
    if not complexity.isfinite().all():
        raise UserError("--vae-kl: the Pose-VAE diverged, its scores are not finite; lower it")
    curriculum = actupose.ActiveCurriculum(complexity.numpy(), s.epochs, s.bins, s.pace, s.spread, s.scale,
                                           s.rescoring, s.seed, s.curriculum == "static")
    if s.curriculum == "hardest" and len(curriculum.hardest(s.hard_bins)) < s.batch_size:
        raise UserError(f"--hard-bins: {s.hard_bins} bins hold fewer samples than a batch ({s.batch_size})")
    if checkpoint is None:
        trainer.style_transfer = prepare_style(s, domains, trainer)            # last: it can take an hour
        broadcast(trainer.style_transfer.state_dict().values() if trainer.style_transfer else [])
    elif checkpoint["style"] is not None:
        trainer.style_transfer = actupose.StyleTransfer(s.style).to(device).requires_grad_(False).eval()
        load_weights(trainer.style_transfer, checkpoint["style"], where)
    run = SimpleNamespace(settings=s, domains=domains, vae=vae, curriculum=curriculum, trainer=trainer,
                          labelled=domains.target if s.method == "oracle" else source, log=[], drawn=[])
    if checkpoint is not None:
        load_networks(trainer, checkpoint, where)
        try:
            trainer.optimiser.load_state_dict(checkpoint["optimiser"])
            curriculum.load_state_dict(checkpoint["curriculum"])
        except ValueError as e:
            raise UserError(f"{where}: {e}; go on with the data that the run was started on") from None
        run.log, run.drawn = checkpoint["log"], checkpoint["drawn"]
    return run


def prepare_style(settings, domains, trainer):
    """The style networks of a run, trained on the images of its two domains; None when off."""
    s = settings
    if s.style == "off":
        return None
    torch.manual_seed(s.seed)
    transfer, folder = actupose.StyleTransfer(s.style).to(trainer.device), Path(s.style_weights)
    if s.style_weights:
        load_style_weights(transfer.encoder, folder / "vgg_normalised.pth")
        if (folder / "decoder.pth").exists():
            load_style_weights(transfer.decoder, folder / "decoder.pth")
            return transfer.requires_grad_(False).eval()
    size = min(16, s.batch_size)

    def images(i):
        batch = (dataset[shuffled_batch(len(dataset), size, i, s.seed)][0].to(trainer.device)
                 for dataset in (domains.source, domains.target))
        return tuple(normalise(unit_range(images)) for images in batch)

    return actupose.train_style_transfer(transfer, images, s.style_iters, train_encoder=not s.style_weights,
                                         lr=2e-3 if s.style == "small" else 1e-4,       # AdaIN's own for VGG
                                         autocast=trainer.autocast, progress=Progress("style transfer"))


# --- Evaluation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(network, images, settings, device):
    """uint8 images (B, 3, S, S) -> keypoints (B, K, 2) in their pixels and confidences (B, K), on the CPU."""
    images = normalise(unit_range(images.to(device))).contiguous(memory_format=torch.channels_last)
    maps = network.eval()(images)[0]
    cells, confidence = actupose.decode_keypoints(maps, settings.subcell)
    if network.head_adv is not None:                          # RegDA's maps are logits
        confidence = maps.flatten(2).softmax(-1).amax(-1)
    return cells.cpu() * network.stride, confidence.cpu()


def predict(trainer, network, dataset, batch_size=64):
    """Keypoints (N, K, 2) in pixels and confidences (N, K) of a whole dataset, on the CPU."""
    parts = [decode(network, dataset[indices][0], trainer.settings, trainer.device)
             for indices in torch.arange(len(dataset)).split(batch_size)]
    return tuple(map(torch.cat, zip(*parts)))


def evaluate(run, dataset):
    """Scores of the present weights, {"student": ..., "teacher": ...}, and the student's predictions."""
    trainer, s, predictions, scores = run.trainer, run.settings, {}, {}
    complexity = actupose.pose_complexity(run.vae, dataset.keypoints, dataset.visible, dataset.skeleton.root)
    bins = actupose.assign_bins(complexity, min(s.bins, len(dataset)))
    networks = {"student": trainer.student}
    if trainer.teacher is not None:
        # Decision: the teacher is scored with the student's BatchNorm statistics; its own, of augmented
        # views, fit clean images badly.
        networks["teacher"] = actupose.make_teacher(trainer.teacher)
        for own, students in zip(networks["teacher"].buffers(), trainer.student.buffers()):
            own.copy_(students)
    for name, network in networks.items():
        found = predictions[name] = predict(trainer, network, dataset)
        scores[name] = actupose.score(found[0], dataset, trainer.stride, s.subcell, bins, s.bins)
    return scores, predictions["student"]


def evaluate_run(out, device):
    """`evaluate RUN`: score the last checkpoint again. UserError where result.json says something else."""
    run = set_up(saved_settings(out), device, load_run(out / "last.pt"))
    scores, _ = evaluate(run, run.domains.test)
    result = {**scores["student"], "teacher": scores.get("teacher")}
    print(actupose.run_summary(result))
    if not (out / "result.json").exists():
        print(f"after {len(run.log)} of {run.settings.epochs} epochs; --resume --out {out} goes on")
    elif result != {key: value for key, value in read_json(out / "result.json").items() if key in result}:
        raise UserError(f"{out / 'result.json'}: holds other scores than this machine and these threads give")
    else:
        print(f"the same as {out / 'result.json'}")


# --- Processes: `torchrun --nproc-per-node N train.py ...` -------------------------------------------------
#
# All draw the same epoch and random numbers, compute their share of each batch, and average gradients. What
# looks at the whole batch (confidence mask, pairs of Eq. 6, BatchNorm on GPUs) is gathered.


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
    """The inverse of `shard`: (N, ...) of every process -> (N * world_size(), ...), by rank."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def broadcast(tensors):
    """Give all processes the values of process 0, in place: each computes its own last bits."""
    for tensor in tensors if world_size() > 1 else ():
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def average_gradients(network):
    """Replace the gradients by their mean over the processes."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    for gradient in gradients if world_size() > 1 else ():
        dist.all_reduce(gradient)
        gradient /= world_size()


# --- Files of a run, checkpoints, weights -------------------------------------------------------------------


def write_json(path, value):
    """JSON, replaced atomically; ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path):
    """A JSON object that a run wrote. UserError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, no JSON object; remove {path.parent} and run again")
    return value


def write_config(out, settings, skeleton, device):
    """config.json: the settings, the skeleton, and what computed the run. Makes the directory."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", {
        **dataclasses.asdict(settings), "skeleton": dataclasses.asdict(skeleton), "processes": world_size(),
        "device": kernels.common.device_name(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
        "python": sys.version.split()[0]})


def saved_settings(out):
    """The settings in a run's config.json."""
    known = {f.name for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in read_json(out / "config.json").items() if name in known}
    try:
        return Settings(**values)
    except (UserError, ValueError, TypeError) as e:
        raise UserError(f"{out / 'config.json'}: {e}; mend it, or give another run") from None


def write_speed(path, epoch, seconds, trainer, started):
    """Append a line to speed.jsonl: what depends on the clock and so cannot stand in log.jsonl."""
    images = trainer.settings.iters_per_epoch * trainer.settings.batch_size * (1 + trainer.uses_target)
    row = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1),
           "total_seconds": round(time.time() - started, 1), "memory_gb": peak_memory_gb()}
    if trainer.device.type == "cuda":
        row["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(trainer.device) / 1e9, 2)
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def peak_memory_gb():
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def state_of(run):
    """What a checkpoint holds: tensors and plain values only, so that it loads without unpickling code.

    Random numbers need no state: each is a function of the seed, the step and the sample.
    """
    trainer = run.trainer
    parts = dict(student=trainer.student, teacher=trainer.teacher, style=trainer.style_transfer, vae=run.vae,
                 optimiser=trainer.optimiser, curriculum=run.curriculum)
    return {"log": run.log, "drawn": run.drawn,
            **{name: part and part.state_dict() for name, part in parts.items()}}


def save_checkpoint(path, state):
    """torch.save and the SHA-256 of its bytes, in place of `path`; what was there becomes previous.pt.

    At every moment last.pt or previous.pt is whole.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path, keep=path.with_name("previous.pt")) as f:
        f.write(buffer.getbuffer())
        f.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_run(path):
    """A checkpoint that `save_checkpoint` wrote. Its digest is verified before anything is parsed."""
    try:
        content = memoryview(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file (a run has it after its first epoch)") from None
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise UserError(f"{path}: damaged, its digest does not fit")
    return load_torch(io.BytesIO(content), path)


def load_torch(file, path):
    """A torch file as a dictionary of tensors and plain values. Nothing in it is executed."""
    try:
        # UDAPE's and RegDA's files hold the options they were written with: plain values, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
        reason = f"it holds a {type(state).__name__}"
    except Exception as e:                                      # of many kinds, where the file is damaged
        state, reason = None, "no such file" if isinstance(e, FileNotFoundError) else type(e).__name__
    if not isinstance(state, dict):
        raise UserError(f"{path}: no readable dictionary of tensors and plain values ({reason}); replace it")
    return state


def starting_point(out, resume):
    """The checkpoint to go on from, previous.pt where last.pt is damaged; None to start anew."""
    last, previous = out / "last.pt", out / "previous.pt"
    saved = last.exists() or previous.exists()
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out: {parent} is not a directory that can be written to; give another")
    if not resume and (saved or (out / "result.json").exists()):
        raise UserError(f"--out: {out} holds a run; give another, add --resume, or `evaluate {out}`")
    if rank() == 0:                                             # of a run that was killed while it wrote
        for stale in (*out.glob("*.json*.tmp"), *out.glob("*.pt.*.tmp"), *out.glob("figures/*.png.*.tmp")):
            stale.unlink()
    if not resume:
        return None
    if not saved and (out / "config.json").exists():
        return None                                             # killed before it saved an epoch
    try:
        return load_run(last)
    except UserError as damage:
        if not previous.exists():
            raise
        state = load_run(previous)
        gather(torch.zeros(1))                                  # all have read it
        if rank() == 0:
            warn(f"{damage}: going on from {previous}, {len(state['log'])} epochs done, to the same result")
            os.replace(previous, last)                          # or the damaged file would become previous.pt
        return state


def load_weights(module, state, path):
    """module.load_state_dict; UserError names the file and the first thing that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        mine, theirs = (getattr(d.get(name), "shape", "missing") for d in (own, state))
        if mine != theirs:
            raise UserError(f"{path}: {name} is {theirs} there and {mine} in this network; is it of another "
                            f"--architecture or skeleton?")
    module.load_state_dict(state)


def load_networks(trainer, checkpoint, path):
    """Restore student, with RegDA's regressors where it has them, and teacher (None before it joins)."""
    if "head_adv.0.weight" in checkpoint["student"] and trainer.student.head_adv is None:
        trainer.start_regda()
    load_weights(trainer.student, checkpoint["student"], path)
    if checkpoint["teacher"] is not None:
        trainer.teacher = actupose.make_teacher(trainer.student)
        load_weights(trainer.teacher, checkpoint["teacher"], path)


def load_style_weights(network, path):
    """Published AdaIN weights into an encoder or decoder, by name; layers beyond relu4_1 are ignored."""
    own, state = network.state_dict(), load_torch(path, path)
    load_weights(network, {name: value for name, value in state.items() if name in own}, path)


# torchvision's ResNets trained on ImageNet; the digits are the start of the file's SHA-256.
IMAGENET_FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth",
                  "resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}


def read_weights(settings):
    """What --weights names: a dictionary for `actupose.load_pose_weights`, and where it is from."""
    if settings.weights != "imagenet":
        path = Path(settings.weights)
        return (load_run(path / "last.pt"), path) if path.is_dir() else (load_torch(path, path), path)
    url = f"https://download.pytorch.org/models/{IMAGENET_FILES[settings.architecture]}"
    try:
        load = torch.hub.load_state_dict_from_url
        return load(url, map_location="cpu", check_hash=True, weights_only=True), url
    except Exception as e:                                      # no network, a wrong hash, a damaged file
        raise UserError(f"--weights imagenet: {url} cannot be had ({e}); give the file, fetched by other "
                        f"means, or remove a damaged one from {torch.hub.get_dir()}") from None


def load_initial_weights(network, weights, path):
    """Weights from `read_weights` into the pose network; prints what was loaded, what was not, and why."""
    try:
        loaded, ignored, left = actupose.load_pose_weights(network, weights)
    except ValueError as e:
        raise UserError(f"--weights: {path}: {e}; give its --architecture, or other weights") from None
    if rank() == 0:
        print(f"weights from {path}: {len(loaded)} tensors; ignored: {', '.join(ignored) or 'none'}; left at "
              f"the initialisation: {', '.join(left) or 'none'}")


# --- Pictures, drawn at twice their size and reduced when saved: smooth lines. Coordinates are the drawing's.

INK, GREY, GRID, WHITE = (34, 40, 49), (112, 122, 136), (228, 232, 238), (255, 255, 255)
BLUE, RED, GREEN, YELLOW = (38, 132, 230), (240, 78, 88), (32, 164, 118), (250, 178, 40)
PURPLE, SLATE = (136, 84, 208), (96, 108, 122)
PALETTE = (BLUE, RED, GREEN, YELLOW, PURPLE, SLATE)
# Colours of joints by the beginning of their names; others are yellow.
JOINT_COLOURS = {"r-": RED, "l-": BLUE, "thumb": RED, "index": PURPLE, "middle": GREEN, "ring": BLUE,
                 "little": SLATE}
BINS_LABEL = "complexity bin, simple to complex"


def blank(width, height):
    """A white picture of this size and its ImageDraw."""
    image = Image.new("RGB", (width, height), WHITE)
    return image, ImageDraw.Draw(image, "RGBA")


def write(draw, x, y, text, size=24, colour=GREY, anchor="ls"):
    """Text at (x, y) with one of Pillow's anchors; returns where it ends if it starts at x."""
    font = ImageFont.load_default(size=size)
    draw.text((x, y), str(text), colour, font, anchor)
    return x + font.getlength(str(text))


def save_picture(image, path):
    """PNG at half the size, replaced atomically; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        image.reduce(2).save(f, format="PNG", optimize=True)


def chart(draw, box, series, title, xlabel, kind="line", labels=None):
    """A chart in box (x0, y0, x1, y1), with a legend where there are several series.

    series: label -> (x (n,), y), y NaN where there is nothing. y: (n,) of a "line" or "bar"; (n, 6) of a
    "box": end of a whisker, quartiles, end of the other, mean. labels: text at x = 0, 1, ... in place of
    numbers, for lines whose y (n, seeds) are dots, each joined with its neighbours' mean; no zero is needed.
    """
    x0, y0, x1, y1 = box
    series = {label: [np.asarray(values, float) for values in xy] for label, xy in series.items()}
    xs, ys = (np.concatenate([xy[i].ravel() for xy in series.values()]) for i in (0, 1))
    margin, ys = 0.0 if kind == "line" and not labels else 0.6, ys[np.isfinite(ys)]
    left, right = xs.min() - margin, max(xs.max() + margin, xs.min() + 1)
    low, high = min(ys.min(initial=0), 0), ys.max(initial=0)
    high += 0.05 * max(high - low, 1e-9)
    if labels:
        low, high = ys.min(initial=high) - 1, ys.max(initial=0) + 1

    def place(x, y):
        return x0 + (x - left) / (right - left) * (x1 - x0), y1 - (y - low) / (high - low) * (y1 - y0)

    def ticks(start, end):
        power = 10.0 ** math.floor(math.log10((end - start) / 6))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= (end - start) / 6)
        return np.arange(math.ceil(start / step), math.floor(end / step) + 1) * step

    for value, text in enumerate(labels) if labels else ((v, f"{v:,.6g}") for v in ticks(left, right)):
        write(draw, place(value, low)[0], y1 + 32, text, 22, anchor="ms")
    for value in ticks(low, high):
        y = place(left, value)[1]
        draw.line([x0, y, x1, y], GRID if value else GREY, 2)
        write(draw, x0 - 12, y, f"{value:,.6g}", 22, anchor="rm")
    write(draw, (x0 + x1) / 2, y1 + 68, xlabel, anchor="ms")
    end = write(draw, x0, y0 - 24, title, 28, INK) + 40
    for i, (label, (x, y)) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        if len(series) > 1:
            draw.rectangle([end, y0 - 44, end + 20, y0 - 24], colour)
            end = write(draw, end + 28, y0 - 24, label) + 28
        points = [(at, value) for at, value in zip(x, y) if np.isfinite(value).all()]
        if kind == "line":
            draw.line([place(at, np.mean(value)) for at, value in points], colour, 4, joint="curve")
            for spot in (place(at, value) for at, values in points if labels for value in values):
                draw.circle(spot, 7, colour, WHITE)
        for at, value in points if kind == "bar" else ():
            start, width = at - 0.4 + 0.8 * i / len(series), 0.72 / len(series)
            draw.rectangle([*place(start, max(value, 0)), *place(start + width, min(value, 0))], colour)
        for at, (lowest, lower, median, upper, highest, mean) in points if kind == "box" else ():
            draw.line([place(at, lowest), place(at, highest)], colour, 2)
            draw.rectangle([*place(at - 0.3, upper), *place(at + 0.3, lower)], (206, 226, 250), colour, 2)
            for y, half in ((lowest, 0.15), (median, 0.3), (highest, 0.15)):
                draw.line([place(at - half, y), place(at + half, y)], colour, 4 if y == median else 2)
            draw.circle(place(at, mean), 6, RED, WHITE)


def draw_skeleton(draw, keypoints, visible, skeleton, width, confidence=None):
    """Limbs and joints of one figure, outlined in white, coloured by body side or finger.

    draw: ImageDraw.Draw(image, "RGBA"); keypoints: (K, 2) in pixels of that image; visible: (K,), 0 leaves
    one out; width: of a limb in pixels; confidence: (K,) in [0, 1], fades what is unsure.
    """
    points, shown = [tuple(p) for p in np.asarray(keypoints, float).tolist()], np.asarray(visible) > 0
    sure = np.ones(len(points)) if confidence is None else np.nan_to_num(confidence.numpy()).clip(0, 1)
    alpha = (255 * (0.2 + 0.8 * sure)).round().astype(int)
    colours = [next((c for start, c in JOINT_COLOURS.items() if name.startswith(start)), YELLOW)
               for name in skeleton.names]
    neighbours, limbs = [set() for _ in points], []
    for a, b in skeleton.limbs:
        # The line from hip to hip repeats the two from the hips to the pelvis, where that is labelled.
        if shown[a] and shown[b] and not neighbours[a] & neighbours[b]:
            neighbours[a].add(b)
            neighbours[b].add(a)
            sides = {colours[a], colours[b]} - {YELLOW}
            colour = sides.pop() if len(sides) == 1 else YELLOW
            limbs.append(([points[a], points[b]], min(alpha[a], alpha[b]), colour))
    for ends, opacity, _ in limbs:
        draw.line(ends, (*WHITE, opacity * 4 // 5), round(width * 1.7))
    for ends, opacity, colour in limbs:
        draw.line(ends, (*colour, opacity), round(width))
    for k in np.flatnonzero(shown):
        draw.circle(points[k], width * 1.35, (*WHITE, alpha[k]))
        draw.circle(points[k], width * 0.95, (*colours[k], alpha[k]))


def draw_panels(path, panels, columns, skeleton, titles=(), side=320):
    """Images in rows of `columns`, each with a caption above and, where given, a skeleton.

    panels: list of (caption, uint8 image (3, S, S), pose); pose: None or (keypoints (K, 2) in pixels of the
    image, visible (K,), confidence (K,) or None). titles: of the columns.
    """
    wide, high, top = side + 12, side + 52, 44 * bool(titles)
    canvas, draw = blank(12 + min(columns, len(panels)) * wide, top + 8 + -(-len(panels) // columns) * high)
    for c, title in enumerate(titles):
        write(draw, 10 + c * wide, 36, title, 30, INK)
    for i, (caption, image, pose) in enumerate(panels):
        x, y = 10 + i % columns * wide, top + i // columns * high
        panel = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        panel = panel.resize((side, side), Image.Resampling.BICUBIC)
        if pose is not None:                                    # pixel centres stay centres
            keypoints = (pose[0] + 0.5) * (side / image.shape[-1]) - 0.5
            draw_skeleton(ImageDraw.Draw(panel, "RGBA"), keypoints, pose[1], skeleton, side / 56, pose[2])
        write(draw, x, y + 32, caption, 26, GREY if titles else INK)
        canvas.paste(panel, (x, y + 44))
    save_picture(canvas, path)


def prediction_panel(trainer, dataset, i, image, keypoints, confidence):
    """A panel of `draw_panels`: sample i with its predicted pose, under its own PCK and EvalPose score."""
    one = SimpleNamespace(skeleton=dataset.skeleton, size=dataset.size, keypoints=dataset.keypoints[[i]],
                          visible=dataset.visible[[i]])
    scored = actupose.score(keypoints[None], one, trainer.stride, trainer.settings.subcell)
    caption = f"PCK {actupose.fmt(scored['pck']['all'], 0)}  EvalPose {actupose.fmt(scored['evalpose'], 0)}"
    return caption, image, (keypoints, torch.ones(len(keypoints)), confidence)


def draw_pairs(path, trainer, source, target):
    """Fig. 7: the nearest pairs by Eq. 7, nearest first, no image twice; the student's poses on the first 64
    training images of both domains. Pruned are, as in a step, unlabelled source keypoints and the target's
    less confident half, drawn faint."""
    s, panels = trainer.settings, []
    images, _, visible = source[torch.arange(min(64, len(source)))]
    others, _, _ = target[torch.arange(min(64, len(target)))]
    (poses, _), (found, sure) = (decode(trainer.student, i, s, trainer.device) for i in (images, others))
    sure, triplets = actupose.confidence_mask(sure, s.mask_ratio), trainer.triplets.cpu()
    distance = kernels.triplet_angle_distance(poses, found, triplets, visible > 0, sure, min_triplets=4)
    while len(panels) < 24 and distance.isfinite().any():
        m, n = divmod(distance.argmin().item(), len(others))
        remark = "" if distance[m, n] < s.gamma else f"not below {show(s.gamma)}"
        panels += [(f"Eq. 7: {distance[m, n]:.3f} rad", images[m], (poses[m], visible[m], None)),
                   (remark, others[n], (found[n], torch.ones(len(found[n])), sure[n].float()))]
        distance[m] = distance[:, n] = math.inf
    if panels:
        draw_panels(path, panels, 8, trainer.skeleton)


def draw_chart(path, series, title, kind, xlabel=BINS_LABEL, labels=None):
    """A picture of one chart, label -> values at 0, 1, ...: Fig. 5 (lines), Fig. 9 (bars), Fig. 10."""
    width = max(1800, 30 * max(map(len, series.values())) * len(series) * (kind == "bar"))
    canvas, draw = blank(width, 720)
    series = {label: (range(len(values)), values) for label, values in series.items()}
    chart(draw, (110, 80, width - 20, 600), series, title, xlabel, kind, labels)
    save_picture(canvas, path)


def draw_complexity(path, dataset, bins, num_bins):
    """Fig. 2 and 3: the first poses of five bins, and a box plot of Eq. 7 between the poses of each bin.

    bins: (N,) the bin of each pose of the dataset. A box has the quartiles of the distances between the first
    hundred poses of its bin, whiskers to the last within 1.5 heights of the box, and their mean as a dot.
    """
    skeleton, triplets, boxes = dataset.skeleton, torch.tensor(dataset.skeleton.triplets), []
    canvas, draw = blank(2800, 1120)
    for r, j in enumerate(np.unique(np.linspace(0, num_bins - 1, 5).astype(int))):
        write(draw, 40, 170 + r * 190, f"bin {j}")
        for n, i in enumerate(np.flatnonzero(bins == j)[:7]):
            pose, seen = actupose.normalise_poses(dataset.keypoints[[i]], dataset.visible[[i]], skeleton.root)
            place = pose.view(-1, 2).numpy() * 160 + (250 + n * 190, 170 + r * 190)
            draw_skeleton(draw, place, seen.view(-1, 2)[:, 0], skeleton, 120 / len(skeleton))
    for j in range(num_bins):
        of_bin = torch.from_numpy(np.flatnonzero(bins == j)[:100])
        poses, valid = dataset.keypoints[of_bin], dataset.visible[of_bin] > 0
        distance = kernels.triplet_angle_distance(poses, poses, triplets, valid, valid)
        pairs = distance[torch.ones_like(distance).triu(1) > 0]
        pairs = pairs[pairs.isfinite()].numpy() if pairs.isfinite().any() else np.array([math.nan])
        low, median, high = np.quantile(pairs, (0.25, 0.5, 0.75))
        inside = pairs[~(np.abs(pairs - (low + high) / 2) > 2 * (high - low))]       # of the whiskers
        boxes.append([inside.min(), low, median, high, inside.max(), pairs.mean()])
    chart(draw, (1700, 80, 2760, 1000), {"": (range(num_bins), boxes)},
          "mean angular difference (Eq. 7) between the poses of a bin, rad", BINS_LABEL, "box")
    save_picture(canvas, path)


def draw_figures(run, scores, predictions, folder):
    """All pictures of a finished run. The samples shown are the first of each split, not chosen."""
    s, trainer, curriculum, skeleton = run.settings, run.trainer, run.curriculum, run.trainer.skeleton
    source, test, panels, similar = run.domains.source, run.domains.test, [], []
    for i, (image, *found) in enumerate(zip(test[torch.arange(min(12, len(test)))][0], *predictions)):
        panels += [("", image, None), ("ground truth", image, (test.keypoints[i], test.visible[i], None)),
                   prediction_panel(trainer, test, i, image, *found)]
    draw_panels(folder / "predictions.png", panels, 9, skeleton)                                      # Fig. 8
    if run.labelled is source:         # Fig. 1: beside them, the source poses nearest to the ground truth
        distance = kernels.triplet_angle_distance(
            test.keypoints[:6], source.keypoints[:10_000], trainer.triplets.cpu(), test.visible[:6] > 0,
            source.visible[:10_000] > 0, min_triplets=4)
        for i, nearest in enumerate(distance.argsort()[:, :3]):
            similar += panels[3 * i:3 * i + 3] + [(f"Eq. 7: {distance[i, n]:.3f} rad", image, (*pose, None))
                                                  for n, image, *pose in zip(nearest, *source[nearest])]
        draw_panels(folder / "similar.png", similar, 6, skeleton)
    if s.w_cross:
        draw_pairs(folder / "pairs.png", trainer, source, run.domains.target)                         # Fig. 7
    bins = actupose.assign_bins(curriculum.complexity, s.bins)
    draw_complexity(folder / "complexity.png", source, bins, s.bins)                               # Fig. 2-3
    if s.curriculum == "active":
        arrival = min(math.ceil(s.epochs / s.pace), s.epochs - 1)               # of the peak at the last bin
        epochs = np.unique(np.linspace(0, arrival, 5).round().astype(int))
        drawn = {f"epoch {e}: {sum(run.drawn[e]):,}": run.drawn[e] for e in epochs}
        draw_chart(folder / "curriculum.png", drawn, "samples drawn", "line")                         # Fig. 5
    if s.curriculum == "active" and s.rescoring != "off":
        # Fig. 6: the samples that moved farthest since the Pose-VAE ranked them, up and then down.
        now = actupose.assign_bins(curriculum.score, s.bins)
        order = torch.from_numpy(np.argsort(bins - now, kind="stable"))
        moved = [(f"bin {bins[i]} to {now[i]}", image, (*pose, None)) for chosen in (order[:8], order[-8:])
                 for i, image, *pose in zip(chosen, *source[chosen])]
        draw_panels(folder / "reranked.png", moved, 8, skeleton)
    draw_chart(folder / "bins.png", {k: found["bins"] for k, found in scores.items()}, "PCK@0.05", "bar")


# --- Photographs --------------------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")                   # what is taken from a folder


def find_photographs(inputs, out):
    """Files and folders -> {name: file}. UserError for what is missing, or would be overwritten."""
    files = {}
    for path in map(Path, inputs):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not found or not path.exists():
            raise UserError(f"{path}: no such picture, or a folder without any ({' '.join(SUFFIXES)})")
        for file in found:
            if file.resolve().parent == out.resolve():
                raise UserError(f"--out: {out} holds {file}, which could be overwritten; give another")
            if files.setdefault(file.name, file).resolve() != file.resolve():
                raise UserError(f"{file}: {files[file.name]} has the same name; predict them one by one")
    return files


def predict_run(run, inputs, out, box, device):
    """Draw each photograph FILE with its skeleton (FILE.jpg, FILE.json). Returns 1 if one failed, else 0."""
    settings, checkpoint = saved_settings(run), load_run(run / "last.pt")
    skeleton = data.Skeleton(**read_json(run / "config.json")["skeleton"])
    files = find_photographs(inputs, out)
    trainer, size = Trainer(settings, skeleton, device), settings.image_size
    load_networks(trainer, checkpoint, run / "last.pt")
    out.mkdir(parents=True, exist_ok=True)
    progress, failed = Progress("photographs"), 0
    for done, (name, file) in enumerate(files.items(), 1):
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
            x, y, w, h = box or (0, 0, *image.size)
            region = max(x, 0), max(y, 0), min(x + w, image.width), min(y + h, image.height)
            crop = letterbox(image, region, size)
        except Exception as e:                                  # a damaged file, or a box outside of it
            failed += 1
            warn(f"{file}: {e}" + (f" (is --box {show(box)} within its pixels?)" if box else ""))
            continue
        keypoints, confidence = (t[0] for t in decode(trainer.student, crop[None], settings, device))
        to_picture = invert_view(torch.from_numpy(letterbox_view(region, size)[2]))
        keypoints = map_keypoints(keypoints.double(), to_picture)
        width, seen = max(region[2] - region[0], region[3] - region[1], 150) / 100, torch.ones(len(skeleton))
        draw_skeleton(ImageDraw.Draw(image, "RGBA"), keypoints, seen, skeleton, width, confidence)
        with replacing(out / f"{name}.jpg") as f:
            image.save(f, format="JPEG", quality=92)
        rows = zip(skeleton.names, keypoints.tolist(), confidence.tolist())
        write_json(out / f"{name}.json", {
            "image": str(file), "width": image.width, "height": image.height, "box": box,
            "keypoints": [{"name": joint, "x": round(x, 3), "y": round(y, 3), "confidence": round(c, 4)}
                          for joint, (x, y), c in rows]})
        progress(done, len(files))
    print(f"{len(files) - failed} of {len(files)} photographs done by {run}, in {out}")
    return 1 if failed else 0


# --- Many runs, one table -----------------------------------------------------------------------------------


def compare(methods, sweep, tasks, seeds, out, jobs, preset, device, **given):
    """Run what is missing of rows x seeds in `out`, `jobs` at a time; print the table, draw the pictures.

    sweep: (NAME, values) of settings; each value is a row of ACTUPose.
    """
    if tasks and (given or methods or sweep or seeds or out or preset != "demo"):
        raise UserError("--tasks: shows finished comparisons as they are; leave the other options out")
    if tasks:
        print(actupose.tasks_table(finished_tasks(map(Path, tasks.split(",")))))
        return
    root, rows, runs, waiting = out or Path("runs/compare"), {}, {}, {}
    seeds = list(dict.fromkeys(int(seed) if seed % 1 == 0 else seed for seed in seeds or (0, 1, 2)))
    for name in methods.split(",") if methods is not None else () if sweep else METHODS:
        if name not in METHODS and name not in ABLATIONS:
            raise UserError(f"--methods: use {' or '.join((*METHODS, *ABLATIONS))}, got {name}")
        rows[name] = dict(METHODS[name], method=name) if name in METHODS else ABLATIONS[name]
    swept = {}
    for name, values in sweep:
        swept[name] = list(dict.fromkeys([*swept.get(name, ()), *values]))
        rows.update((f"actupose {name}={show(value)}", {name: value}) for value in values)
    for name, changes in rows.items():
        for seed in seeds:
            values = {**given, "seed": seed, **changes}
            settings = make_settings(preset, **values)
            # A value of a sweep that is the default's, or an ablation's, is that row's run.
            same = (row for row in ("actupose", *ABLATIONS) if " " in name and settings == make_settings(
                preset, **{**given, "seed": seed, **ABLATIONS.get(row, {})}))
            run = runs[name, seed] = root / f"{next(same, name).replace(' ', '-')}-s{seed}"
            if (run / "config.json").exists():
                check_same_settings(run, dataclasses.asdict(settings))
            if not (run / "result.json").exists():
                words = [f"--{key.replace('_', '-')}={show(value)}" for key, value in values.items()]
                words += ["--resume"] * (run / "config.json").exists()
                waiting[run] = [sys.executable, __file__, f"--preset={preset}", f"--device={device}",
                                f"--out={run}", *words]
    failed = run_commands(waiting, jobs)
    results = {name: [read_json(runs[name, seed] / "result.json") for seed in seeds
                      if (runs[name, seed] / "result.json").exists()] for name in rows}
    results = {name: found for name, found in results.items() if found}
    if results:
        ours = (name for name in results if runs[name, seeds[0]].name == f"actupose-s{seeds[0]}")
        print(actupose.comparison_table(results, next(ours, ""), bool(sweep)), flush=True)
    first = {name: runs[name, seeds[0]] for name in results if " " not in name}
    if len(first) > 1:
        bins = {name: np.array([r["bins"] for r in results[name]], float).mean(0) for name in first}
        draw_chart(root / "bins.png", bins, "PCK@0.05", "bar")                                        # Fig. 9
        draw_comparison(root / "panel.png", first, choose_device(device))                             # Fig. 8
    for name, values in swept.items() if not failed else ():                                         # Fig. 10
        found = [results[f"actupose {name}={show(value)}"] for value in sorted(values)]
        scores = {"validation": [[r["val"] for r in rows] for rows in found],
                  "test": [[r["pck"]["all"] for r in rows] for rows in found]}
        label, ticks = Settings.__dataclass_fields__[name].metadata["help"], [*map(show, sorted(values))]
        draw_chart(root / f"sweep-{name}.png", scores, "PCK@0.05", "line", f"{name}: {label}", ticks)
    if failed:
        raise UserError("; ".join(failed))


def run_commands(commands, jobs):
    """Run {directory: command}, `jobs` at a time, their output to output.txt there. Returns what failed."""
    waiting, running, failed, progress = dict(commands), {}, [], Progress("runs")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                out = next(iter(waiting))
                out.mkdir(parents=True, exist_ok=True)
                with open(out / "output.txt", "a") as f:
                    running[out] = subprocess.Popen(waiting.pop(out), stdout=f, stderr=f, env=threads)
            time.sleep(0.5)
            for out in [out for out, process in running.items() if process.poll() is not None]:
                if status := running.pop(out).returncode:
                    failed.append(f"{out}: exit status {status}, see {out / 'output.txt'}")
                progress(len(commands) - len(waiting) - len(running), len(commands), out.name)
    finally:
        for process in running.values():                        # after Ctrl-C
            process.terminate()
            process.wait()
    return failed


def finished_tasks(folders):
    """For `actupose.tasks_table`: the results of finished comparisons, {title: {method: [result, ...]}}."""
    tasks = {}
    for folder in folders:
        runs = {name: [read_json(path) for path in sorted(folder.glob(f"{name}-s[0-9]*/result.json"))]
                for name in (*METHODS, *ABLATIONS)}
        titles = {f"{folder}: {r['source']} → {r['target']}" for found in runs.values() for r in found}
        if len(titles) != 1:
            raise UserError(f"--tasks: {folder} holds finished runs of {len(titles)} tasks; give directories "
                            f"in which `compare` ran one task each")
        tasks[titles.pop()] = runs
    return tasks


def draw_comparison(path, runs, device):
    """Fig. 8: the first test images in rows, the ground truth and each method's predictions in columns.

    runs: {method: directory}. One without a readable last.pt is left out.
    """
    columns = {}
    for name, out in runs.items():
        try:
            settings, checkpoint = saved_settings(out), load_run(out / "last.pt")
            if not columns:                                     # the data of all runs
                test = open_domains(settings).test
                images = test[torch.arange(min(6, len(test)))][0]
                truth = zip(images, test.keypoints, test.visible)
                columns["ground truth"] = [("", image, (*pose, None)) for image, *pose in truth]
            trainer = Trainer(settings, test.skeleton, device)
            load_networks(trainer, checkpoint, out / "last.pt")
        except (UserError, data.DataError) as e:
            warn(f"{e}; {path} is without {name}")
            continue
        found = zip(images, *decode(trainer.student, images, settings, device))
        columns[name] = [prediction_panel(trainer, test, i, *row) for i, row in enumerate(found)]
    if columns:
        panels = [panel for row in zip(*columns.values()) for panel in row]
        draw_panels(path, panels, len(columns), test.skeleton, list(columns))


# --- Command line -------------------------------------------------------------------------------------------

HELP = {
    "train": """Train ACTUPose or a baseline. With no option: ACTUPose on the built-in benchmark, in minutes.

  python train.py --source mannequin-hand      the demo with hands
  python train.py --resume --out RUN           go on with a run that was stopped
  python train.py evaluate RUN | predict RUN IMAGE... --out DIR | compare      (each has its --help)""",
    "evaluate": "Score a run's last checkpoint again.",
    "predict": """Find the keypoints of photographs with a run's network: for each a picture and a JSON file.

Keypoints are in pixels of the upright picture, the centre of its first pixel at (0, 0). Confidence is the
height of the heatmap's peak (RegDA: of its softmax). A file that cannot be read is named, others go on.""",
    "compare": f"""Run what is missing of methods x seeds, skip what is finished, print the table in Markdown.

  python train.py compare --jobs 2                         Table 1, Fig. 8 (panel.png), Fig. 9 (bins.png)
  python train.py compare --sweep pace=1,2,3,4,6           Fig. 10 b; likewise bins, spread, w_evalpose, ...
  python train.py compare --tasks runs/compare,runs/hands  Table 2, of finished comparisons

methods:   {', '.join(METHODS)}
ablations: {', '.join(ABLATIONS)} (ACTUPose with one thing changed)""",
}
# The field of Settings that begins a group of options in --help.
GROUPS = {"method": "task", "architecture": "network", "epochs": "schedule", "curriculum": "curriculum",
          "mask_ratio": "adaptation", "rotation": "augmentation", "w_udape": "losses", "amp": "speed"}


def choose_device(name):
    """auto, cpu, cuda, ... -> torch.device; a GPU each under torchrun. UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and world_size() > 1 else name
        device = torch.zeros(1, device=torch.device(name)).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device: {name!r} cannot be used here; use cpu, cuda or cuda:1") from None


def resolve_amp(settings, device):
    """The settings with --amp auto resolved: bf16 where the device computes in it, else off."""
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    auto = "bf16" if native else "off"
    return dataclasses.replace(settings, amp=auto if settings.amp == "auto" else settings.amp)


def parse(kind):
    """argparse's type of an option: on or off for a bool, numbers with commas for a tuple, else itself."""
    def switch_or_numbers(text):
        try:
            return {"on": True, "off": False}[text] if kind is bool else tuple(map(float, text.split(",")))
        except (KeyError, ValueError):
            rule = "on or off" if kind is bool else "numbers with commas"
            raise argparse.ArgumentTypeError(f"use {rule}, got {text!r}") from None
    return switch_or_numbers if kind in (bool, tuple) else kind


def sweep_setting(text):
    """argparse's type of --sweep: NAME=V1,V2,... -> (NAME, values)."""
    name, values = text.partition("=")[0].replace("-", "_"), text.partition("=")[2]
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Settings)
             if f.name != "seed" and not isinstance(f.default, (str, tuple))}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"{name!r} is no setting to sweep")
    try:
        return name, [parse(kinds[name])(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"use NAME=V1,V2,... with numbers, got {text!r}") from None


class Parser(argparse.ArgumentParser):
    """Says on one line what is wrong, with the nearest option for a typo."""

    def __init__(self, verb):
        super().__init__(prog=f"train.py {verb}".removesuffix(" train"), description=HELP[verb],
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")

    def add_settings(self, skip=()):
        """An option per field of Settings, in groups, with its default and the paper's value in the help."""
        group = None
        for f in dataclasses.fields(Settings):
            kind, choices = type(f.default), f.metadata["choices"]
            group = self.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
            paper = f"; paper {show(PAPER[f.name])}" if f.name in PAPER else ""
            if f.name not in skip:
                group.add_argument(
                    "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, choices=choices,
                    type=parse(kind),
                    help=f"{f.metadata['help']} [{show(f.default) or 'none'}{paper}]".replace("%", "%%"),
                    metavar=None if choices else {bool: "on|off", tuple: "A,B"}.get(kind, kind.__name__))

    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings]
        for word in (w.split("=")[0] for w in self.words if w.startswith("--")):
            near = difflib.get_close_matches(word, known, 1, 0.75)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
        raise UserError(f"{message} (--help lists the options)")


def check_same_settings(out, given):
    """The settings of the run in `out`; UserError where others are given."""
    saved = saved_settings(out)
    for name, value in given.items():
        was = getattr(saved, name)
        if was != value and name not in ("cache", "workers") and (name, value) != ("amp", "auto"):
            raise UserError(f"--{name.replace('_', '-')}: the run in {out} was started with {show(was)}, not "
                            f"{show(value)}; give {show(was) or 'nothing'}, or another --out")
    return saved


def command(arguments):
    """train (with no word), evaluate RUN, predict RUN IMAGE..., compare. Returns the exit status."""
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    rest = arguments[1:] if arguments[:1] == [verb] else arguments
    if verb not in HELP:
        raise UserError(f"unknown command {verb!r}; use {', '.join(HELP)}")
    if verb != "train" and world_size() > 1:
        raise UserError(f"{verb}: takes one process; run it without torchrun")
    parser = Parser(verb)
    parser.words, add = rest, parser.add_argument
    if verb in ("evaluate", "predict"):
        add("run", type=Path, help="directory of the run")
    else:
        add("--out", type=Path, help="directory of the results [runs/METHOD-TARGET-sSEED or runs/compare]")
        add("--preset", choices=("demo", "paper"), default="demo", help="values of options not given [demo]")
        parser.add_settings(skip=("method", "seed") if verb == "compare" else ())
    if verb == "train":
        add("--resume", action="store_true", help="go on with the unfinished run in --out")
    elif verb == "predict":
        add("inputs", nargs="+", metavar="image", help=f"a picture or a folder ({' '.join(SUFFIXES)})")
        add("--out", type=Path, required=True, help="directory of the results")
        add("--box", type=parse(tuple), metavar="X,Y,W,H", help="the part of each picture that shows the "
            "person or hand: corner, width and height in its pixels [all of it]")
    elif verb == "compare":
        add("--methods", help="rows of the table [all methods; with --sweep none]")
        add("--sweep", action="append", default=[], type=sweep_setting, metavar="NAME=V1,V2,...",
            help="a row of actupose per value of a setting, and a plot; can be given again")
        add("--tasks", metavar="DIR,DIR,...", help="put the tables of these finished comparisons together")
        add("--seeds", type=parse(tuple), help="seeds of each row [0,1,2]")
        add("--jobs", type=int, default=1, help="runs at a time, which share the cores [1]")
    options = vars(parser.parse_args(rest))
    if verb == "train":
        train_command(**options)
    elif verb == "evaluate":
        evaluate_run(options["run"], choose_device(options["device"]))
    elif verb == "predict":
        box = options["box"]
        if box and not (len(box) == 4 and min(box[2:]) > 0):
            raise UserError(f"--box: use x,y,w,h in pixels with w and h above 0, got {show(box)}")
        return predict_run(**{**options, "device": choose_device(options["device"])})
    elif options["jobs"] < 1:
        raise UserError(f"--jobs: must be at least 1, got {options['jobs']}")
    else:
        compare(**options)
    return 0


def train_command(preset, out, device, resume, **given):
    """`train` with the options of the command line."""
    started = time.time()
    settings = None if resume and out else make_settings(preset, **given)
    out = out or Path(f"runs/{settings.method}-{settings.target}-s{settings.seed}")
    settings = check_same_settings(out, given) if resume else settings
    if settings.batch_size % world_size():
        raise UserError(f"--batch-size: {settings.batch_size} is no multiple of the {world_size()} processes")
    if resume and (out / "result.json").exists():
        print(f"{out}: the run is finished")
        return
    result = train(settings, out, device, resume)
    if rank() == 0:
        print(actupose.run_summary(result))
        print(f"{time.time() - started:.0f} s, {peak_memory_gb()} GB; pictures in {out / 'figures'}")


def warn(message):
    """One line on stderr, below a progress line that may stand there."""
    print(("\n" if Progress.unfinished else "") + f"train.py: {message}", file=sys.stderr, flush=True)
    Progress.unfinished = False


def main(arguments):
    """`command`, expected errors on one line. Status 1: a photo failed, a bug; 2: a mistake; 130: Ctrl-C."""
    status, processes = 2, int(os.environ.get("WORLD_SIZE", 1))
    advice = {"evaluate": "", "predict": "", "compare": "; the same command goes on"}.get(
        " ".join(arguments[:1]), "; --resume goes on from the last saved epoch")
    try:
        if processes > 1:
            dist.init_process_group()                           # gloo for CPU tensors, NCCL for GPUs
        status = command(arguments)
    except (UserError, data.DataError) as e:
        warn(e)
    except OSError as e:                                        # a full disk, say
        warn(f"{e.filename}: {e.strerror}{advice}" if e.filename else e)
    except KeyboardInterrupt:
        warn(f"interrupted{advice}")
        status = 130
    except Exception:                                           # a bug: its traceback is shown, in any case
        if processes == 1:
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    if processes > 1:                                           # under torchrun a normal shutdown can hang
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
