"""ACTUPose, in the order of the paper. `grep "# Eq. 3" *.py kernels/*.py` finds the lines that compute it.

    §3.1.1  Pose-VAE, complexity of a pose (Eq. 1-2), bins
    §3.1.2  active curriculum (Eq. 3-4)
    §3.2    pose network, style transfer, mean teacher, pseudo-labels, consistency (the base method, UDAPE)
    §3.3    EvalPose (Eq. 5)
    §3.4    cross-domain loss (Eq. 6), total loss (Eq. 8); Eq. 7 is kernels.triplet_angle_distance
    §4      a baseline, RegDA; PCK, EvalPose score, PCK by complexity bin

Letters are the paper's: N samples, N_b bins, K keypoints, e the epoch; in Eq. 6 and 7, S and T poses of the
source and target batch. In shapes, B is the batch; images have H x W pixels, heatmaps H x W cells.
Where the paper is silent, a comment that starts with "Decision:" says what is done here and why;
docs/decisions.md gathers them by equation.
"""

import copy
import math
import re
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from data import normalise, shuffled_span
from kernels.reference import subcell_offset

# --- §3.1.1 Pose-VAE: how hard is a pose for a model of the source's poses? --------------------------------


def normalise_poses(keypoints, visible, stand_ins):
    """Poses as the VAE sees them: the shape of a pose without its place and size.

    keypoints: (N, K, 2), any unit; visible: (N, K), 0 where the coordinates mean nothing; stand_ins: for each
    keypoint, the keypoints at whose mean it is put where it is missing (`Skeleton.stand_in_rows`), or at the
    box's centre where they are missing too.
    Returns poses (N, 2K) within -1/2 ... 1/2, and weight (N, 2K), 0 for missing keypoints.
    """
    # Decision: centred on the box of the visible keypoints and divided by its larger side, so that Eq. 2
    # ranks shapes; otherwise a large or off-centre person would count as a complex pose.
    seen = visible.bool()[..., None]
    low = torch.where(seen, keypoints, torch.inf).amin(1)
    high = torch.where(seen, keypoints, -torch.inf).amax(1)
    side = (high - low).amax(1).clamp(min=1e-6)
    poses = (keypoints - ((low + high) / 2)[:, None]) / side[:, None, None]
    # Decision: a missing keypoint is put near its true place, a thorax between the shoulders. LSP labels
    # neither pelvis nor thorax: with both put at the hips, its poses would look harder than they are.
    num_keypoints = keypoints.shape[1]
    listed = torch.zeros(num_keypoints, num_keypoints, dtype=poses.dtype)
    for k, others in enumerate(stand_ins):
        listed[k, list(others)] = 1
    available = listed * seen[..., 0][:, None, :]                                             # (N, K, K)
    known = torch.where(seen, poses, 0.0)
    middle = available @ known / available.sum(-1, keepdim=True).clamp(min=1)
    poses = torch.where(seen, poses, middle)
    return poses.flatten(1), seen.expand_as(keypoints).flatten(1).float()


class PoseVAE(nn.Module):
    """Variational auto-encoder of flattened 2D poses (N, 2K) with a `latent`-dimensional normal in
    between."""

    def __init__(self, num_keypoints, hidden=128, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2 * num_keypoints, hidden), nn.ReLU(),
                                     nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(),
                                     nn.Linear(hidden, hidden), nn.ReLU(),
                                     nn.Linear(hidden, 2 * num_keypoints))

    def encode(self, poses):
        """(N, 2K) -> mean and log-variance of the posterior, (N, latent) each."""
        return self.encoder(poses).chunk(2, dim=-1)

    def forward(self, poses, generator=None):
        """(N, 2K) -> reconstruction (N, 2K), mean, log-variance; the latent is drawn by
        reparameterisation."""
        mean, log_var = self.encode(poses)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.decoder(mean + noise * torch.exp(log_var / 2)), mean, log_var


def reconstruction_error(poses, reconstruction, weight=None):
    """Sum over the 2K coordinates of the squared error, per pose: (N, 2K), (N, 2K) -> (N,).

    weight: (N, 2K), 0 for missing coordinates; the sum over the others is rescaled to the full count.
    """
    error = (poses - reconstruction) ** 2
    if weight is None:
        return error.sum(-1)
    return (error * weight).sum(-1) * weight.shape[-1] / weight.sum(-1).clamp(min=1)


def vae_loss(poses, reconstruction, mean, log_var, kl_weight, weight=None):
    """Eq. 1: squared error + lambda * KL to the standard normal, mean over the batch. kl_weight: lambda."""
    kl = 0.5 * (mean ** 2 + log_var.exp() - 1 - log_var).sum(-1)
    return (reconstruction_error(poses, reconstruction, weight) + kl_weight * kl).mean()             # Eq. 1


def train_pose_vae(keypoints, visible, stand_ins, steps=1500, kl_weight=1e-3, latent=8, hidden=128, seed=0,
                   batch_size=256, lr=2e-3):
    """Fit a PoseVAE to poses (N, K, 2) with `visible` (N, K); deterministic by seed. Returns it in eval mode.

    stand_ins: see `normalise_poses`; kl_weight: lambda of Eq. 1; latent, hidden: its sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = PoseVAE(keypoints.shape[1], hidden, latent)
    optimiser = torch.optim.Adam(vae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        index = torch.randint(len(keypoints), (min(batch_size, len(keypoints)),), generator=generator)
        # Only the batch is normalised: the source may have millions of poses.
        poses, weight = normalise_poses(keypoints[index], visible[index], stand_ins)
        loss = vae_loss(poses, *vae(poses, generator), kl_weight, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return vae.eval()


@torch.no_grad()
def pose_complexity(vae, keypoints, visible, stand_ins, chunk=65536):
    """Eq. 2: how badly the VAE reconstructs each pose. keypoints (N, K, 2), visible (N, K) -> score (N,).

    Decision: decodes the mean of the posterior, without a draw, so that a score is a function of the pose.
    """
    scores = []
    for start in range(0, len(keypoints), chunk):
        part = slice(start, start + chunk)
        poses, weight = normalise_poses(keypoints[part], visible[part], stand_ins)
        scores.append(reconstruction_error(poses, vae.decoder(vae.encode(poses)[0]), weight))        # Eq. 2
    return torch.cat(scores)


def bin_edges(count, num_bins):
    """Where N_b bins of (nearly) equal size begin and end in `count` sorted samples: (N_b + 1,) int64."""
    return np.arange(num_bins + 1, dtype=np.int64) * count // num_bins


def assign_bins(scores, num_bins):
    """Scores (N,) -> bin of each sample (N,), 0 the simplest: sorted and cut into N_b equal parts."""
    scores = np.asarray(scores)
    bins = np.empty(len(scores), dtype=np.int64)
    sizes = np.diff(bin_edges(len(scores), num_bins))
    bins[np.argsort(scores, kind="stable")] = np.repeat(np.arange(num_bins), sizes)
    return bins


# --- §3.1.2 Active curriculum: which source samples an epoch trains on -------------------------------------


# What Eq. 4 does: re-score by relative confidence, as printed, by the confidence on all samples, or nothing.
RESCORING = ("relative", "literal", "full", "off")


class FixedCurriculum:
    """The same samples in every epoch, passed over again and again, each time in a new order.

    pool: (n,) the samples. An epoch of training calls `samples`, `observe` and `rerank`.
    """
    drawn = {}              # no pool is drawn from bins: see `ActiveCurriculum`
    reranks = False
    observes_all = False

    def __init__(self, pool, seed):
        self.pool = pool
        self.seed = seed

    def samples(self, epoch, count):
        """The `count` source samples of an epoch, in order, and from how many they were chosen."""
        span = shuffled_span(len(self.pool), epoch * count, count, self.seed)
        return self.pool[span], len(self.pool)

    def observe(self, indices, confidence):
        """Confidences change nothing."""

    def rerank(self):
        """The end of an epoch changes nothing."""

    def state_dict(self):
        """What training changes, as tensors and plain values: nothing."""
        return {}

    def load_state_dict(self, state):
        """Nothing to restore."""


class ActiveCurriculum:
    """Draws an epoch's source samples from bins of rising complexity and re-ranks them by confidence.

    complexity: (N,) the VAE's scores (Eq. 2). epochs: e runs over 0 ... epochs - 1. num_bins: N_b.
    pace: lambda, how fast the peak moves to the hard bins. spread: sigma of Eq. 3.
    scale: "rank" or "minmax", what s_j of Eq. 3 is. rescoring: one of RESCORING.
    All state is a few arrays of length N: six million samples take about 100 MB.

    An epoch is `samples(epoch, count)`, training with `observe(indices, confidence)`, and `rerank()`.
    """

    def __init__(self, complexity, epochs, num_bins=25, pace=2.0, spread=0.25, scale="rank",
                 rescoring="relative", seed=0):
        complexity = np.asarray(complexity, dtype=np.float32)
        if complexity.ndim != 1 or len(complexity) < num_bins:
            raise ValueError(f"num_bins: {num_bins} bins need at least {num_bins} scores in one dimension, "
                             f"got shape {complexity.shape}; use fewer bins or more data")
        if not np.isfinite(complexity).all():
            raise ValueError("complexity: scores must be finite; check the poses given to the Pose-VAE")
        if scale not in ("rank", "minmax"):
            raise ValueError(f"scale: must be 'rank' or 'minmax', got {scale!r}")
        if rescoring not in RESCORING:
            raise ValueError(f"rescoring: must be one of {', '.join(RESCORING)}, got {rescoring!r}")
        if not (pace > 0 and spread > 0 and epochs > 0):
            raise ValueError(f"pace, spread and epochs must be positive, got {pace}, {spread}, {epochs}")
        self.complexity = complexity
        self.epochs = epochs
        self.num_bins = num_bins
        self.pace = pace
        self.spread = spread
        self.scale = scale
        self.rescoring = rescoring
        self.seed = seed
        self.relative = np.ones(len(complexity), dtype=np.float32)    # confidence over its epoch's mean
        self.observed = []                                            # (indices, confidence) of this epoch
        self.drawn = {}                                               # epoch -> samples drawn from each bin
        self.edges = bin_edges(len(complexity), num_bins)
        self.score = complexity.copy()
        self._sort()

    @classmethod
    def of(cls, settings, complexity, count):
        """The curriculum of a run, a row of CURRICULA."""
        s = settings
        return cls(complexity, s.epochs, s.bins, s.pace, s.spread, s.scale, s.rescoring, s.seed)

    @property
    def reranks(self):
        """Whether Eq. 4 is on."""
        return self.rescoring != "off"

    @property
    def observes_all(self):
        """Whether `observe` wants the confidence on all samples at an epoch's end, not that of training."""
        return self.rescoring == "full"

    def _sort(self):
        self.order = np.argsort(self.score).astype(np.int32 if len(self.score) < 2 ** 31 else np.int64)
        sums = np.add.reduceat(self.score[self.order], self.edges[:-1], dtype=np.float64)
        self.bin_score = sums / np.diff(self.edges)                               # mean score of each bin

    def peak_bin(self, epoch):
        """g: the bin that contributes most.

        Decision: bins are 0 ... N_b - 1, so g is rounded down and stops at the last one.
        """
        return min(int(self.pace * self.num_bins * epoch / self.epochs), self.num_bins - 1)

    def probabilities(self, epoch):
        """Eq. 3: the share p_j of each bin that is drawn in an epoch, (N_b,)."""
        # Decision: bin means are heavy-tailed, so min-max scaled scores put nearly all bins within one sigma
        # of each other and the last one apart. The rank j / (N_b - 1) makes the moving window of Fig. 5.
        if self.scale == "rank":
            s = np.arange(self.num_bins) / max(self.num_bins - 1, 1)
        else:
            span = self.bin_score.max() - self.bin_score.min()
            s = (self.bin_score - self.bin_score.min()) / (span if span > 0 else 1.0)
        mu_g = s[self.peak_bin(epoch)]
        return np.exp(-((s - mu_g) / self.spread) ** 2 / 2)                                          # Eq. 3

    def sample(self, epoch):
        """The epoch's pool: p_j N / N_b of bin j, without replacement, in random order. (n,) int64.

        A function of (seed, epoch, current ranking). Never empty: the peak bin gives at least one sample.
        """
        random = np.random.default_rng((self.seed, epoch))
        sizes = np.diff(self.edges)
        wanted = self.probabilities(epoch) * sizes                                 # p_j N / N_b
        # Decision: rounded up or down at random, so that the mean over epochs is p_j N / N_b.
        count = np.floor(wanted + random.random(self.num_bins)).astype(np.int64)
        count = np.minimum(count, sizes)
        places = []
        for start, size, n in zip(self.edges, sizes, count):
            places.append(start + random.choice(size, n, replace=False, shuffle=False))
        places = np.concatenate(places)
        random.shuffle(places)
        self.drawn[epoch] = count.tolist()
        return self.order[places].astype(np.int64)

    def samples(self, epoch, count):
        """The `count` source samples of an epoch, in order, and from how many they were chosen.

        They are the pool of `sample` in its order, cut off or repeated to the length `count`.
        """
        pool = self.sample(epoch)
        return np.resize(pool, count), len(pool)

    def observe(self, indices, confidence):
        """Confidences seen in training: indices (n,), confidence (n,), a sample's mean heatmap maximum.

        Decision: taken from the training passes themselves, so Eq. 4 costs no extra pass over the source.
        With rescoring "full" they are from a pass over all samples. All calls between two `rerank`s are one
        epoch. Of a sample seen twice in it, the last confidence counts. A confidence of 0 is that of a view
        without a labelled keypoint, and says nothing. Others are clamped to 0.05 ... 1, which bounds a
        sample's factor in Eq. 4.
        """
        indices = np.asarray(indices)
        confidence = np.asarray(confidence, dtype=np.float32)
        kept = confidence != 0
        self.observed.append((indices[kept], np.clip(confidence[kept], 0.05, 1.0)))

    def rerank(self):
        """Eq. 4: re-score by confidence, sort again, cut into bins again. Call at the end of each epoch."""
        observed = self.observed
        self.observed = []
        if self.rescoring == "off" or not observed:
            return
        indices = np.concatenate([each for each, _ in observed])
        confidence = np.concatenate([each for _, each in observed])
        if self.rescoring == "literal":
            # As printed: a drawn sample's score is multiplied once, and products accumulate over the epochs.
            drawn, last = np.unique(indices[::-1], return_index=True)
            self.score[drawn] /= confidence[::-1][last]                                              # Eq. 4
            self.score /= self.score.mean(dtype=np.float64)     # ranks and min-max ignore it; stops overflow
        else:
            # Decision: a confidence counts relative to the mean of its own epoch, since networks grow surer:
            # raw values of different epochs would rank samples by when they were last seen. A sample not
            # drawn keeps its relative value. The score on the right-hand side is the VAE's: every confidence
            # is below 1, so the running product would grow for whatever was drawn and forget the VAE.
            self.relative[indices] = confidence / confidence.mean(dtype=np.float64)
            self.score = self.complexity / self.relative                                             # Eq. 4
        self._sort()

    def hardest(self, num_bins):
        """The samples of the `num_bins` hardest bins. (n,) int64."""
        return self.order[self.edges[-1 - num_bins]:].astype(np.int64)

    def state_dict(self):
        """What a checkpoint needs to go on: the arrays that training changes, and what was drawn."""
        return {"score": torch.from_numpy(self.score.copy()),
                "relative": torch.from_numpy(self.relative.copy()), "drawn": dict(self.drawn)}

    def load_state_dict(self, state):
        """Restore `state_dict`. ValueError when it belongs to another number of samples."""
        if state["score"].shape != self.score.shape:
            raise ValueError(f"state of {len(state['score'])} samples, the data has {len(self.score)}")
        self.score = state["score"].numpy().copy()
        self.relative = state["relative"].numpy().copy()
        self.drawn = dict(state["drawn"])
        self._sort()


class StaticCurriculum(ActiveCurriculum):
    """An ablation: over a run, the same dose of each bin as the active curriculum, but in no order.

    In every epoch p_j is the mean over the epochs of p_j / sum p_j, scaled so that the largest is 1.
    """
    reranks = False
    observes_all = False

    def probabilities(self, epoch):
        """The same shares (N_b,) in every epoch."""
        shares = np.zeros(self.num_bins)
        for e in range(self.epochs):
            p = super().probabilities(e)
            shares += p / p.sum()
        return shares / shares.max()

    def rerank(self):
        """Confidences change nothing."""
        self.observed = []


def hardest_bins(settings, complexity, count):
    """UDAPE + VAE-HM: the hardest bins alone, 8 of 25."""
    pool = ActiveCurriculum.of(settings, complexity, count).hardest(settings.hard_bins)
    return FixedCurriculum(pool, settings.seed)


def all_samples(settings, complexity, count):
    """No curriculum."""
    return FixedCurriculum(np.arange(count), settings.seed)


# --curriculum: functions of a run's settings, the complexity (N,) of the source's poses and the number of
# labelled samples. A new curriculum is a class (or function) above and a row of this table. It needs what
# FixedCurriculum has.
CURRICULA = {"active": ActiveCurriculum.of, "static": StaticCurriculum.of, "hardest": hardest_bins,
             "off": all_samples}


# --- §3.2 The base method: pose network --------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (ResNet-18/34); parameter names as in torchvision."""
    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x):
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + shortcut)


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3, 1x1 (ResNet-50/101), the stride on the 3x3; names as in torchvision."""
    expansion = 4

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x):
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + shortcut)


def _shortcut(inputs, outputs, stride):
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Backbone(nn.Module):
    """ResNet without its pooling and classifier: images (B, 3, H, W) -> features (B, C, H / s, W / s)."""

    def __init__(self, architecture):
        super().__init__()
        a = architecture
        channels = a.widths[0]
        self.conv1 = nn.Conv2d(3, channels, a.stem_kernel, 2, a.stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = a.stem_pool
        for i, (depth, width) in enumerate(zip(a.layers, a.widths)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(a.block(channels, width, stride))
                channels = width * a.block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = channels

    def forward(self, images):
        """The last feature map, stride 32 (16 without the stem's pooling)."""
        x = F.relu(self.bn1(self.conv1(images)))
        if self.pool:
            x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Architecture(NamedTuple):
    """Sizes of a PoseResNet. The defaults are the ResNets' of torchvision."""
    block: type                                 # BasicBlock or Bottleneck
    layers: tuple                               # blocks per stage
    widths: tuple = (64, 128, 256, 512)         # their channels
    stem_kernel: int = 7
    stem_pool: bool = True                      # max-pooling after the first convolution
    upsampling: int = 256                       # channels of the transposed convolutions


ARCHITECTURES = {
    "narrow": Architecture(BasicBlock, (1, 1, 1, 1), (16, 32, 64, 128), 5, False, 32),      # the demo's
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
}


class PoseResNet(nn.Module):
    """Simple Baselines [33]: ResNet, three transposed convolutions, a 1x1 head -> one heatmap per keypoint.

    Parameter names are those of the published base method (its unused `backbone.fc` apart), so that its
    checkpoints, and torchvision's for the backbone, load by name.
    """

    def __init__(self, architecture, num_keypoints):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: unknown {architecture!r}; one of {', '.join(ARCHITECTURES)}")
        sizes = ARCHITECTURES[architecture]
        width = sizes.upsampling
        self.backbone = Backbone(sizes)
        self.stride = 4 if sizes.stem_pool else 2                          # pixels per heatmap cell
        upsampling = []
        channels = self.backbone.channels
        for _ in range(3):
            upsampling.append(nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False))
            upsampling.append(nn.BatchNorm2d(width))
            upsampling.append(nn.ReLU())
            channels = width
        self.upsampling = nn.Sequential(*upsampling)
        self.head = nn.Conv2d(width, num_keypoints, 1)
        self.head_adv = None                                               # RegDA's, see `make_regressors`
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in (*self.upsampling, self.head):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Images (B, 3, H, W) -> heatmaps (B, K, H / stride, W / stride), features f (B, C) of Eq. 6.

        Decision: f is the global average of the backbone's last map, as the paper's Fig. 4 names no layer.
        """
        features = self.backbone(images)
        return self.head(self.upsampling(features)), features.mean((2, 3))


# Checkpoint keys that PoseResNet ignores: regex -> reason.
UNUSED_WEIGHTS = {r"backbone\.fc\..+": "ImageNet's classifier", r"head_adv\..+": "RegDA's adversarial head",
                  r"head\.\d+\..+": "RegDA's head of two layers",
                  r"head\.(weight|bias)": "a head of one layer, RegDA's have two"}


def load_pose_weights(network, state):
    """Load weights into a PoseResNet in place, by name.

    state: what a checkpoint holds: torchvision's ResNet (names of the backbone alone), a PoseResNet, or one
    under `student` (UDAPE's and our own, beside a teacher) or `model` (RegDA's); `module.` before the names
    is dropped. Backbone, upsampling and head are each taken whole, or left as they are where the state has
    nothing of them. Returns the names loaded, those ignored as a dictionary name -> why, and those left as
    they were. ValueError, and an unchanged network, when shapes or names do not fit: half a network would
    train unnoticed.
    """
    ignored = {}
    for key in ("student", "model"):
        if isinstance(state.get(key), dict):
            if state.get("teacher") is not None:
                ignored["teacher"] = "both networks start from the student's weights, as in UDAPE"
            state = state[key]
            break
    given = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith(("backbone.", "upsampling.", "head.")) for name in given):
        given = {f"backbone.{name}": value for name, value in given.items()}
    own = network.state_dict()
    if not any(name.startswith("backbone.") and name in own for name in given):
        raise ValueError(f"no parameter of this network is in it, but {', '.join(list(map(str, state))[:3])}")
    for name, value in given.items():
        if not torch.is_tensor(value):
            raise ValueError(f"{name} is not a tensor but a {type(value).__name__}")
        if name in own and value.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}: "
                             f"this network is of another architecture or has other keypoints")
        if name not in own:
            reasons = [why for pattern, why in UNUSED_WEIGHTS.items() if re.fullmatch(pattern, name)]
            if not reasons:
                raise ValueError(f"this network has no {name}: it is of another architecture")
            ignored[name] = reasons[0]
    loaded = [name for name in own if name in given]
    left = [name for name in own if name not in given]
    started = {name.split(".")[0] for name in loaded}
    for name in left:
        # Files from before 2018 lack the BatchNorm's counters, which nothing here reads.
        if name.split(".")[0] in started and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{name} is missing in it: this network is of another architecture")
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return loaded, ignored, left


# --- §3.2 The base method: style transfer between the domains (AdaIN) --------------------------------------


def channel_statistics(features):
    """(B, C, H, W) -> mean and standard deviation over the pixels, (B, C, 1, 1) each."""
    mean = features.mean((2, 3), keepdim=True)
    pixels = features.shape[2] * features.shape[3]
    # On a CPU torch.var takes twenty times as long.
    variance = (features - mean).square().sum((2, 3), keepdim=True) / (pixels - 1)
    return mean, (variance + 1e-5).sqrt()


def adain(content, style, alpha=1.0):
    """Adaptive instance normalisation: features (B, C, H, W) of content with the channel statistics of style.

    alpha: how much of it, 0 ... 1; the rest is the content as it is. In float32, whatever the networks
    compute in: a variance over a map loses too much in half precision.
    """
    content = content.float()
    mean_c, std_c = channel_statistics(content)
    mean_s, std_s = channel_statistics(style.float())
    # alpha ((content - mean_c) / std_c std_s + mean_s) + (1 - alpha) content, in one pass over the map
    scale = alpha * std_s / std_c + (1 - alpha)
    return (content - mean_c) * scale + torch.lerp(mean_c, mean_s, alpha)


def _conv(inputs, outputs):
    return [nn.ReflectionPad2d(1), nn.Conv2d(inputs, outputs, 3)]


def vgg_networks():
    """VGG-19 (normalised) up to relu4_1 and the mirrored decoder, layers numbered as in the published
    files."""
    encoder = [nn.Conv2d(3, 3, 1)]
    for inputs, outputs, pool in ((3, 64, False), (64, 64, True), (64, 128, False), (128, 128, True),
                                  (128, 256, False), (256, 256, False), (256, 256, False), (256, 256, True),
                                  (256, 512, False)):
        encoder += _conv(inputs, outputs) + [nn.ReLU()]
        if pool:
            encoder.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    decoder = []
    for inputs, outputs, up in ((512, 256, True), (256, 256, False), (256, 256, False), (256, 256, False),
                                (256, 128, True), (128, 128, False), (128, 64, True), (64, 64, False),
                                (64, 3, False)):
        decoder += _conv(inputs, outputs)
        if outputs != 3:                                                # the last gives the image's colours
            decoder.append(nn.ReLU())
        if up:
            decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
    taps = (3, 10, 17, 30)                                              # relu1_1, relu2_1, relu3_1, relu4_1
    return nn.Sequential(*encoder), nn.Sequential(*decoder), taps


def small_networks(width=16):
    """An encoder and decoder for the demo, of half resolution, trained from nothing on both domains."""
    encoder = nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())
    decoder = nn.Sequential(*_conv(width, 12), nn.PixelShuffle(2))         # 12: 3 colours of 2 x 2 pixels
    return encoder, decoder, (1, 3)


class StyleTransfer(nn.Module):
    """Gives images of one domain the look of the other: encode, AdaIN with strength alpha, decode.

    networks: "vgg" (the published base method's; load its weights by name into `encoder` and `decoder`) or
    "small" (half resolution, for the demo). Images are normalised, (B, 3, H, W).
    """

    def __init__(self, networks="small"):
        super().__init__()
        if networks not in ("vgg", "small"):
            raise ValueError(f"networks: must be 'vgg' or 'small', got {networks!r}")
        self.encoder, self.decoder, self.taps = vgg_networks() if networks == "vgg" else small_networks()

    def encode(self, images):
        """Features after each tapped layer, the last of which AdaIN acts on."""
        features = []
        for i, layer in enumerate(self.encoder):
            images = layer(images)
            if i in self.taps:
                features.append(images)
        return features

    def forward(self, content, style, alpha):
        """Content images in the look of style images, sample by sample, clamped to valid pixels; alpha: how
        much of it, 0 ... 1."""
        styled = adain(self.encode(content)[-1], self.encode(style)[-1], alpha)
        images = self.decoder(styled)[..., :content.shape[2], :content.shape[3]].float()
        black = normalise(images.new_zeros(1, 3, 1, 1))
        white = normalise(images.new_ones(1, 3, 1, 1))
        return images.clamp(black, white)

    def reconstruction_loss(self, images):
        """Mean squared error of images that are decoded as they were encoded, without a style."""
        return F.mse_loss(self.decoder(self.encode(images)[-1]).float(), images)

    def losses(self, content, style):
        """Content and style loss of one pair of batches: scalars, for the decoder."""
        style_features = self.encode(style)
        target = adain(self.encode(content)[-1], style_features[-1]).detach()
        restyled = self.encode(self.decoder(target))
        content_loss = F.mse_loss(restyled[-1].float(), target)
        style_loss = 0
        for ours, theirs in zip(restyled, style_features):
            mean, deviation = channel_statistics(ours.float())
            style_mean, style_deviation = channel_statistics(theirs.float())
            style_loss = style_loss + F.mse_loss(mean, style_mean.detach())
            style_loss = style_loss + F.mse_loss(deviation, style_deviation.detach())
        return content_loss, style_loss


def train_style_transfer(style_transfer, batches, iterations, train_encoder, lr=2e-3, style_weight=0.1,
                         autocast=nullcontext, progress=None):
    """Fit the decoder on both domains' images, in both directions, in place.

    For a given encoder the loss is the published one, content + 0.1 style. With `train_encoder`, for an
    encoder without published weights, the first half of the iterations trains encoder and decoder to
    reproduce the images. The second half freezes the encoder, and reproducing stays a term of the loss.
    batches: function of the iteration -> (source, target) normalised image batches (B, 3, H, W).
    autocast: context in which the networks compute. progress: called with (done, iterations).
    """
    encoder = style_transfer.encoder
    decoder = style_transfer.decoder
    trained = [*encoder.parameters(), *decoder.parameters()] if train_encoder else decoder.parameters()
    optimiser = torch.optim.Adam(trained, lr=lr)
    encoder.requires_grad_(train_encoder)
    for i in range(iterations):
        source, target = batches(i)
        loss = 0
        with autocast():
            if train_encoder and i < iterations // 2:
                for images in (source, target):
                    loss = loss + style_transfer.reconstruction_loss(images)
            else:
                encoder.requires_grad_(False)
                for content, style in ((source, target), (target, source)):
                    content_loss, style_loss = style_transfer.losses(content, style)
                    if train_encoder:
                        loss = loss + style_transfer.reconstruction_loss(content)
                    loss = loss + content_loss + style_weight * style_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if progress:
            progress(i + 1, iterations)
    style_transfer.requires_grad_(False).eval()


# --- §3.2 The base method: mean teacher, pseudo-labels, consistency ----------------------------------------


def make_teacher(student):
    """A copy of the student that receives no gradient."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher, student, decay):
    """Mean Teacher [28]: teacher <- decay * teacher + (1 - decay) * student, parameters only, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


def heatmap_mse(predicted, target, weight):
    """L_mse: half the mean squared error of heatmaps (B, K, H, W), keypoints weighted by (B, K)."""
    return 0.5 * ((predicted - target) ** 2 * weight[..., None, None]).mean()


def decode_keypoints(heatmaps, subcell=False):
    """Heatmaps (B, K, H, W) -> cells (B, K, 2) as (x, y), finer with `subcell`; confidence (B, K)."""
    cells, confidence = kernels.heatmap_argmax(heatmaps)
    if subcell:
        cells = cells + subcell_offset(heatmaps, cells, confidence)
    return cells, confidence


def confidence_mask(confidence, ratio=0.5):
    """The batch's keypoints that the teacher is surest of: confidence (B, K) -> bool (B, K).

    ratio: the share left out, as in the published code. At least one keypoint is left out, and with the
    surest of those left out all that tie with it.
    """
    count = confidence.numel()
    kept = count - round(ratio * count)
    falling = confidence.flatten().sort(descending=True).values
    first_left_out = falling[min(kept, count - 1)]
    return confidence > first_left_out


def consistency_loss(student, teacher, mask):
    """L_consistency: mean squared difference of heatmaps (B, K, H, W), over keypoints where mask (B, K) is
    set.

    As published, the mean is over all maps, masked ones counting as zero.
    """
    return ((student - teacher) ** 2 * mask[..., None, None]).mean()


def occlude_keypoints(images, keypoints, confidence, u, half, probability=0.5, minimum=0.9):
    """Adaptive occlusion: hide one confident keypoint behind a patch from elsewhere in the same image.

    images: (B, 3, H, H); keypoints: (B, K, 2) pixels of `images`; confidence: (B, K) of the teacher;
    u: (B, 3 + K) uniform random numbers: whether to hide, from where to copy (2), which keypoint (K);
    half: half the patch's side in pixels. An image is changed with `probability`, and only if a keypoint of
    at least `minimum` confidence lies inside it.
    Returns images (B, 3, H, H) and which keypoint was hidden (B,), -1 for none.
    """
    size = images.shape[-1]
    inside = ((keypoints >= 0) & (keypoints <= size - 1)).all(-1)
    eligible = (confidence >= minimum) & inside
    chosen = torch.where(eligible, u[:, 3:], -1.0).argmax(1)                       # a random eligible one
    hide = eligible.any(1) & (u[:, 0] < probability)
    centre = keypoints.gather(1, chosen[:, None, None].expand(-1, 1, 2))[:, 0]     # (B, 2)
    line = torch.arange(size, device=images.device)
    across = (line - centre[:, :1]).abs() <= half                                  # (B, H)
    down = (line - centre[:, 1:]).abs() <= half
    patch = down[:, :, None] & across[:, None, :]
    shift = (1 + u[:, 1:3] * (size - 1)).long()                                    # where it is copied from
    columns = (line + shift[:, :1]) % size
    rows = (line + shift[:, 1:]) % size
    copied_from = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, copied_from[:, None].expand(-1, 3, -1)).view_as(images)
    patch = (patch & hide[:, None, None])[:, None]
    return torch.where(patch, moved, images), torch.where(hide, chosen, -1)


# --- §3.3 EvalPose -----------------------------------------------------------------------------------------


def limb_cosines(predicted, labelled, limbs, weight):
    """Cosine between predicted and labelled limb vectors.

    predicted, labelled: (B, K, 2), one unit; limbs: (L, 2) keypoint pairs; weight: (B, K), 0 for keypoints
    that are unlabelled or not trusted.
    Returns (B, L): 0 where an end has no weight or a vector no length.
    """
    a, b = limbs.unbind(1)
    v = labelled[:, b] - labelled[:, a]
    v_hat = predicted[:, b] - predicted[:, a]
    product = (v ** 2).sum(-1) * (v_hat ** 2).sum(-1)
    valid = (weight[:, a] > 0) & (weight[:, b] > 0) & (product > 0)
    cosine = (v * v_hat).sum(-1) / torch.where(valid, product, 1.0).sqrt()
    return torch.where(valid, cosine, 0.0)


def evalpose(predicted, labelled, limbs, weight):
    """Eq. 5, within one domain: minus the sum over limbs of the cosine, mean over samples. Arguments:
    `limb_cosines`.

    Decision: predicted keypoints come from a soft-argmax of the heatmaps, since an argmax has no gradient.
    """
    return -limb_cosines(predicted, labelled, limbs, weight).sum(-1).mean()                          # Eq. 5


# --- §3.4 Cross-domain loss --------------------------------------------------------------------------------


def cross_domain_loss(source_features, target_features, similar, centred=False):
    """Eq. 6: minus the sum over similar pairs of the cosine of their features.

    source_features: (S, C) of the student; target_features: (T, C) of the teacher, no gradient; similar:
    (S, T) bool, the pairs whose distance (Eq. 7) is below Gamma. centred: an ablation. The mean of the given
    rows, which all poses share, is first subtracted from each domain's features.
    """
    dtype = torch.promote_types(source_features.dtype, torch.float32)             # not in half precision
    f_s = source_features.to(dtype)
    f_t = target_features.detach().to(dtype)
    if centred:
        f_s = f_s - f_s.mean(0)
        f_t = f_t - f_t.mean(0)
    f_s = F.normalize(f_s, dim=-1)
    f_t = F.normalize(f_t, dim=-1)
    return -((f_s @ f_t.T) * similar).sum()                                                          # Eq. 6


def total_loss(udape, evalpose_term, cross_domain, weights=(1.0, 0.1, 0.01)):
    """Eq. 8: L = w1 L_UDAPE + w2 L_evalpose + w3 L_cross-domain."""
    return weights[0] * udape + weights[1] * evalpose_term + weights[2] * cross_domain               # Eq. 8


# --- §4 Baseline: RegDA (Jiang et al., CVPR 2021): psi, backbone and upsampling, with two heads f and f' ---


def make_regressors(network):
    """Give a PoseResNet RegDA's two regressors in place of its head: f is `head`, f' `head_adv`.

    Both start from random weights; of the pretrained network only psi is kept. Parameter names are the
    published ones.
    """
    width = network.head.in_channels
    num_keypoints = network.head.out_channels
    for name in ("head", "head_adv"):
        first = nn.Conv2d(width, width, 3, padding=1)
        last = nn.Conv2d(width, num_keypoints, 1)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        setattr(network, name, nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), last))


def regressor_maps(network, images, factor):
    """Heatmaps of f and of f', (B, K, H, W) each. The gradient from f' to psi is multiplied by `factor`."""
    shared = network.upsampling(network.backbone(images))
    constant = shared.detach()
    return network.head(shared), network.head_adv(constant + factor * (shared - constant))


def gradient_factor(iteration, iterations, highest=0.1):
    """The factor of `regressor_maps` at this iteration of the adaptation: it rises from 0 to `highest`.

    Decision: the published curve has exp(-iteration / 1000) in its 15,000 iterations. A shorter adaptation
    runs through the same curve: exp(-15 iteration / iterations).
    """
    return 2 * highest / (1 + math.exp(-15 * iteration / iterations)) - highest


def heatmap_kl(heatmaps, labels, weight, epsilon=0.0):
    """RegDA's loss: KL from the labels, normalised to sum 1, to the spatial softmax of the heatmaps.

    heatmaps, labels: (B, K, H, W); weight: (B, K), the mean is over all keypoints. epsilon: added to labels
    that come from a prediction.
    """
    # A label of weight 0 is an empty map: 0 / 0, and NaN times 0 is NaN.
    labels = torch.where(weight[..., None] > 0, labels.flatten(2) + epsilon, 1.0)
    labels = labels / labels.sum(-1, keepdim=True)
    log_predicted = heatmaps.flatten(2).log_softmax(-1)
    return (F.kl_div(log_predicted, labels, reduction="none").sum(-1) * weight).mean()


def ground_maps(heatmaps, sigma, subcell=False):
    """Labels of f' where f predicts `heatmaps` (B, K, H, W): ground truth and ground false, of that shape.

    Ground truth: Gaussians at f's maxima. Ground false of a keypoint: the Gaussians of all other keypoints,
    clipped to 0 to 1. It trains f' to take the joint for another one.
    """
    truth, _, _ = kernels.rectify(heatmaps.detach(), sigma, subcell)
    others = 1 - torch.eye(truth.shape[1], device=truth.device)
    return truth, torch.einsum("jk,bkhw->bjhw", others, truth).clamp(0, 1)


# --- §4 Metrics --------------------------------------------------------------------------------------------


def pck_hits(predicted, true, weight, threshold):
    """Whether each keypoint counts and is within `threshold` (of the keypoints' unit) of the truth.

    predicted, true: (N, K, 2); weight: (N, K). Returns hits (N, K) bool and counted (N, K) bool.
    """
    distance = (predicted - true).norm(dim=-1)
    counted = weight > 0
    return (distance <= threshold) & counted, counted


def pck(predicted, true, weight, size, groups=None, threshold=0.05):
    """PCK@0.05: the percentage of keypoints within 0.05 * size of the truth.

    predicted, true: (N, K, 2) in one unit, `size` the image's (or heatmap's) side in that unit; weight:
    (N, K), 0 = not counted; groups: name -> keypoint indices (default: {"all": every keypoint}).
    Returns {group: percent}; as published, a group is the mean over its keypoints' own percentages,
    keypoints that are never labelled left out; NaN when nothing is counted.
    """
    hits, counted = pck_hits(predicted, true, weight, threshold * size)
    total = counted.sum(0)
    per_keypoint = torch.where(total > 0, 100.0 * hits.sum(0) / total.clamp(min=1), torch.nan)
    groups = groups or {"all": range(predicted.shape[1])}
    return {name: per_keypoint[list(index)].nanmean().item() for name, index in groups.items()}


def evalpose_score(predicted, labelled, limbs, weight):
    """EvalPose score of §4: 100 times the mean cosine over all labelled limbs, NaN where there is none.

    A limb predicted without length counts as cosine 0. Arguments: `limb_cosines`.
    """
    counted = limb_cosines(labelled, labelled, limbs, weight) > 0                  # labelled, of some length
    cosines = limb_cosines(predicted, labelled, limbs, weight)
    return (100 * cosines.sum() / counted.sum()).item()


def scoring_frame(dataset, stride, subcell):
    """The truth as it is scored: keypoints (N, K, 2) in pixels and weight (N, K).

    subcell: pixels against pixels. Otherwise the published protocol, cells against cells: keypoints whose
    cell lies outside the map or has x <= 1 or y <= 1 are left out.
    """
    if subcell:
        return dataset.keypoints, dataset.visible
    cells = torch.floor(dataset.keypoints / stride + 0.5)
    return cells * stride, dataset.visible * ((cells > 1) & (cells < dataset.size // stride)).all(-1)


def score(predicted, dataset, stride, subcell, bins=None, num_bins=25):
    """PCK by group, EvalPose score, and PCK by complexity bin (bins: (N,), the bin of each pose).

    A score is None where nothing is labelled: JSON has no NaN.
    """
    def number(value):
        return None if math.isnan(value) else value

    true, weight = scoring_frame(dataset, stride, subcell)
    size = dataset.size
    groups = dataset.skeleton.groups
    limbs = torch.tensor(dataset.skeleton.limbs)
    scores = pck(predicted, true, weight, size, groups)
    result = {"pck": {name: number(value) for name, value in scores.items()},
              "evalpose": number(evalpose_score(predicted, true, limbs, weight))}
    if bins is not None:
        scored = list(groups["all"])
        hits, counted = pck_hits(predicted[:, scored], true[:, scored], weight[:, scored], 0.05 * size)
        per_pose = 100 * hits.sum(1) / counted.sum(1).clamp(min=1)
        usable = counted.any(1).numpy()
        result["bins"] = []
        for j in range(num_bins):
            of_bin = torch.from_numpy((bins == j) & usable)
            result["bins"].append(number(per_pose[of_bin].mean().item()))
    return result
