"""The paper's equations against hand-worked and float64 values, and against the published base method."""

import math

import numpy as np
import pytest
import torch

import actupose
import data
import kernels
from tiny_runs import ROOT

CHAIN = torch.tensor([[0, 1], [1, 2], [2, 3]])       # limbs of a chain of four keypoints
HIPS = [(2, 3)] * 16                                 # stand-ins of every missing keypoint


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or with others."""
    torch.manual_seed(0)


# --- §3.1.1 -----------------------------------------------------------------------------------------------

def test_eq1_by_hand():
    poses = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    reconstruction = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    mean = torch.tensor([[2.0], [0.0]])
    log_var = torch.tensor([[0.0], [math.log(4.0)]])
    # sample 0: 1 + 4 = 5, KL = (4 + 1 - 1 - 0) / 2 = 2; sample 1: 9, KL = (0 + 4 - 1 - log 4) / 2
    expected = ((5 + 0.5 * 2) + (9 + 0.5 * (3 - math.log(4)) / 2)) / 2
    loss = actupose.vae_loss(poses, reconstruction, mean, log_var, kl_weight=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_eq2_by_hand():
    """The sum over the three known coordinates, 1 + 4 + 9, is rescaled to all four."""
    poses = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    error = actupose.reconstruction_error(poses, torch.zeros(1, 4), weight)
    assert error.item() == pytest.approx(14 * 4 / 3)


def test_a_missing_keypoint_lies_between_its_own_stand_ins():
    """Keypoint 2 between 0 and 1, keypoint 3 at what is known of 0 and 2, a keypoint without a known stand-in
    in the middle. The visible ones' box is 0 ... 8 wide: divided by 8, centred. The second pose is the first,
    of another size in another place. Of the third nothing is visible."""
    pose = torch.tensor([[0.0, 0.0], [8.0, 4.0], [99.0, 99.0], [99.0, 99.0]])
    keypoints = torch.stack([pose, 3.5 * pose + torch.tensor([40.0, -7.0]), pose])
    visible = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    poses, weight = actupose.normalise_poses(keypoints, visible, [(1,), (0,), (0, 1), (0, 2)])
    expected = torch.tensor([[-0.5, -0.25], [0.5, 0.25], [0.0, 0.0], [-0.5, -0.25]])
    assert torch.allclose(poses.view(3, 4, 2)[:2], expected, atol=1e-6)
    assert torch.equal(weight.view(3, 4, 2), visible[..., None].expand(3, 4, 2)) and poses.isfinite().all()
    poses, _ = actupose.normalise_poses(keypoints, visible, [(1,), (0,), (3,), (2,)])
    assert torch.equal(poses.view(3, 4, 2)[:2, 2:], torch.zeros(2, 2, 2))


def test_unlabelled_pelvis_and_thorax_leave_the_ranking():
    """LSP labels neither: without them all complexities change by about the same factor. A pelvis lies
    between the hips, a thorax between the shoulders; with hips for both, one in a hundred is off by 43 %."""
    source = data.Mannequin("source", "train", 64, 2000)
    target = data.Mannequin("target", "train", 64, 500)
    stand_ins = data.BODY16.stand_in_rows
    vae = actupose.train_pose_vae(source.keypoints, source.visible, stand_ins, steps=300)
    hidden = target.visible.clone()
    hidden[:, [6, 7]] = 0
    with_them = actupose.pose_complexity(vae, target.keypoints, target.visible, stand_ins)
    without = actupose.pose_complexity(vae, target.keypoints, hidden, stand_ins)
    factor = without / with_them
    assert (factor / factor.median() - 1).abs().quantile(0.99) < 0.25


def test_rare_poses_score_high():
    """Eq. 2: of 900 variations of one pose and 100 arbitrary poses, the arbitrary ones score highest."""
    keypoints = torch.rand(16, 2) + 0.03 * torch.randn(1000, 16, 2)
    keypoints[:100] = torch.rand(100, 16, 2)
    visible = torch.ones(1000, 16)
    vae = actupose.train_pose_vae(keypoints, visible, HIPS, steps=300)
    complexity = actupose.pose_complexity(vae, keypoints, visible, HIPS)
    assert set(complexity.argsort(descending=True)[:80].tolist()) <= set(range(100))
    again = actupose.pose_complexity(vae, keypoints, visible, HIPS, chunk=77)
    assert torch.allclose(complexity, again, atol=1e-5)               # no draw, whatever the chunks


def test_bins_are_equal_and_ordered():
    scores = np.random.default_rng(0).random(1003)
    bins = actupose.assign_bins(scores, 25)
    assert np.bincount(bins).min() >= 40 and np.bincount(bins).max() <= 41
    assert all(scores[bins == j].max() <= scores[bins == j + 1].min() for j in range(24))


def test_fig3_on_real_poses():
    """Fig. 3: within a bin of real poses, the spread of the triplet angles rises with complexity."""
    from kernels.reference import triplet_angles
    path = ROOT.parent / "shared" / "mat" / "lspet_joints.mat"
    if not path.exists():
        pytest.skip("the annotations of LSP Extended (shared/mat) are not here")
    joints = np.ascontiguousarray(data.read_mat(path, "joints"), dtype=np.float32)
    joints = torch.from_numpy(joints).permute(2, 0, 1)
    joints = joints[(joints[..., 2] == 1).all(1)][..., :2]
    keypoints = torch.zeros(len(joints), 16, 2)
    visible = torch.zeros(len(joints), 16)
    slots = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]
    keypoints[:, slots] = joints
    visible[:, slots] = 1.0
    vae = actupose.train_pose_vae(keypoints, visible, HIPS, steps=300)
    bins = actupose.assign_bins(actupose.pose_complexity(vae, keypoints, visible, HIPS), 25)
    triplets = torch.tensor([t for t in data.BODY16.triplets if not {6, 7} & set(t)])
    angles, valid = triplet_angles(keypoints, triplets)
    angles = torch.where(valid, angles, torch.nan)
    spread = []
    for j in range(25):
        of_bin = angles[torch.from_numpy(bins == j)]
        spread.append((of_bin - of_bin.nanmean(0)).abs().nanmean().item())
    ranks = np.argsort(np.argsort(spread))
    assert np.corrcoef(ranks, np.arange(25))[0, 1] > 0.8, spread
    assert np.mean(spread[-5:]) > 1.3 * np.mean(spread[:5]), spread


# --- §3.1.2 -----------------------------------------------------------------------------------------------

def make_curriculum(n=1000, **changes):
    scores = np.random.default_rng(0).random(n).astype(np.float32)
    return actupose.ActiveCurriculum(scores, **{"epochs": 70, **changes})


def test_eq3_by_hand():
    """lambda 2, 25 bins, 70 epochs: at epoch 7 the peak is int(2 * 25 * 7 / 70) = 5; ranks are j / 24."""
    curriculum = make_curriculum()
    assert [curriculum.peak_bin(e) for e in (0, 7, 34, 35, 69)] == [0, 5, 24, 24, 24]
    expected = [math.exp(-((j - 5) / 24) ** 2 / (2 * 0.25 ** 2)) for j in range(25)]
    assert curriculum.probabilities(7) == pytest.approx(expected, rel=1e-12)


def test_eq3_minmax_by_hand():
    """Four samples in two bins with mean scores 1 and 5: min-max gives s = 0 and 1."""
    curriculum = actupose.ActiveCurriculum(np.float32([0, 2, 4, 6]), epochs=4, num_bins=2, pace=1.0,
                                           spread=0.5, scale="minmax")
    assert curriculum.bin_score == pytest.approx([1, 5])
    assert curriculum.probabilities(0) == pytest.approx([1, math.exp(-2)])
    assert curriculum.probabilities(3) == pytest.approx([math.exp(-2), 1])


def test_an_epochs_sample_follows_eq3():
    """p_j N / N_b samples of bin j, none twice, at least one in all. The same seed gives the same draw."""
    curriculum = make_curriculum(5000)
    bins = actupose.assign_bins(curriculum.complexity, 25)
    for epoch in (0, 20, 69):
        drawn = curriculum.sample(epoch)
        assert len(set(drawn.tolist())) == len(drawn)
        counts = np.bincount(bins[drawn], minlength=25)
        assert np.abs(counts - curriculum.probabilities(epoch) * 200).max() < 1
        assert counts.tolist() == curriculum.drawn[epoch]
    assert np.array_equal(curriculum.sample(20), make_curriculum(5000).sample(20))
    assert not np.array_equal(curriculum.sample(20), make_curriculum(5000, seed=1).sample(20))
    narrow = make_curriculum(30, spread=1e-4)
    assert all(len(narrow.sample(epoch)) >= 1 for epoch in range(70))


def test_the_draw_is_unbiased():
    """Bin j gives p_j N / N_b samples on average over many epochs, though that is no whole number."""
    curriculum = make_curriculum(100, epochs=4000, pace=1e-6, num_bins=10)      # the peak stays at bin 0
    bins = actupose.assign_bins(curriculum.complexity, 10)
    counts = sum(np.bincount(bins[curriculum.sample(epoch)], minlength=10) for epoch in range(2000))
    expected = np.exp(-(np.arange(10) / 9) ** 2 / (2 * 0.25 ** 2)) * 10
    assert counts / 2000 == pytest.approx(expected, abs=0.06)


def test_samples_are_the_pool_cut_off_or_repeated():
    """As many as an epoch has room for, from the pool's beginning; and how large the pool is."""
    curriculum = make_curriculum(100, num_bins=5)
    pool = curriculum.sample(3)
    for count in (7, len(pool), 250):
        samples, size = curriculum.samples(3, count)
        assert size == len(pool) and samples.dtype == np.int64
        assert samples.tolist() == (pool.tolist() * 20)[:count]


def test_a_fixed_curriculum_passes_over_its_pool_again_and_again():
    """Every sample once per pass, each pass in a new order, wherever epochs begin; a function of the seed."""
    pool = np.array([3, 1, 4, 15, 9, 2, 6])
    curriculum = actupose.FixedCurriculum(pool, seed=5)
    drawn = []
    for epoch in range(7):
        samples, size = curriculum.samples(epoch, 4)
        assert size == 7
        drawn += samples.tolist()
    passes = [drawn[start:start + 7] for start in range(0, 28, 7)]
    assert all(sorted(each) == sorted(pool) for each in passes)
    assert len({tuple(each) for each in passes}) == 4
    longer, _ = actupose.FixedCurriculum(pool, seed=5).samples(0, 28)       # more than a pass in an epoch
    other, _ = actupose.FixedCurriculum(pool, seed=6).samples(0, 28)
    assert longer.tolist() == drawn != other.tolist()
    curriculum.observe(pool, np.full(7, 0.1))
    curriculum.rerank()
    assert curriculum.samples(2, 4)[0].tolist() == drawn[8:12]


@pytest.mark.parametrize("method, curriculum, pool", [
    ("udape+vae-hm", "hardest", range(12, 20)), ("actupose", "off", range(20))])
def test_what_a_fixed_curriculum_holds(method, curriculum, pool):
    """UDAPE + VAE-HM: the hardest 2 of 5 bins of 20 samples, numbered by complexity here; off: all."""
    from train import make_settings
    settings = make_settings(method=method, curriculum=curriculum, bins=5, hard_bins=2, batch_size=8)
    made = actupose.CURRICULA[curriculum](settings, np.arange(20.0), 20)
    assert sorted(made.samples(0, len(pool))[0]) == list(pool)


@pytest.mark.parametrize("epochs, shares", [
    (2, [1, 1]), (3, [1, (2 * math.exp(-2) + 1) / (2 + math.exp(-2))])])
def test_static_curriculum_by_hand(epochs, shares):
    """Two bins, two epochs, pace 1, s = 0 and 1: p = (1, q), then (q, 1), q = exp(-2). Their mean shares are
    equal; with three epochs the peak is at bin 0 twice. Confidences change nothing."""
    curriculum = actupose.StaticCurriculum(np.arange(40), epochs, 2, 1.0, 0.5)
    curriculum.observe(np.arange(40), np.linspace(1, 0.1, 40))
    curriculum.rerank()
    assert not curriculum.reranks and not curriculum.observes_all
    assert all(curriculum.probabilities(epoch) == pytest.approx(shares) for epoch in range(epochs))
    assert curriculum.order.tolist() == [*range(40)] and sum(curriculum.sample(0) < 20) == 20


# Per epoch: the calls of `observe`, then the scores after `rerank`.
EQ4_RELATIVE = [
    ([([0], [0.08]), ([1], [0.08])], [1, 2, 3, 4]),              # mean 0.08: factors 1 and 1
    ([([1], [0.2]), ([2], [0.6])], [1, 4, 2, 4]),                # mean 0.4: factors 2 and 2/3
    ([([0, 3], [0.9, 0.3])], [2 / 3, 4, 2, 8]),                  # mean 0.6; samples 1 and 2 as before
]
# All samples are seen, under the same weights: the scores of the Pose-VAE over confidence / mean.
EQ4_FULL = [
    ([([0, 1, 2, 3], [0.2, 0.4, 0.2, 0.8])], [2, 2, 6, 2]),      # mean 0.4
    ([([0, 1, 2, 3], [0.9, 0.3, 0.6, 0.6])], [2 / 3, 4, 3, 4]),  # mean 0.6; the epoch before is forgotten
]
EQ4_OFF = [([([0, 1, 2, 3], [0.9, 0.3, 0.6, 0.6])], [1, 2, 3, 4])]
EQ4_LITERAL = [
    ([([0, 1, 2], [0.1, 0.5, 0.5])], np.array([10, 4, 6, 4]) / 6),
    ([([1, 3], [0.4, 0.8])], np.array([10, 10, 6, 5]) / 7.75),
]


@pytest.mark.parametrize("mode, epochs", [("relative", EQ4_RELATIVE), ("literal", EQ4_LITERAL),
                                          ("full", EQ4_FULL), ("off", EQ4_OFF)])
def test_eq4_by_hand(mode, epochs):
    """Relative: a confidence counts against its epoch's mean, and what is not drawn keeps its factor.

    Literal: the products of 1 / confidence accumulate. Only the order counts, so scores have mean 1. As in
    Fig. 6, low confidence moves a sample to harder bins, high confidence to easier ones.
    """
    curriculum = actupose.ActiveCurriculum(np.float32([1, 2, 3, 4]), epochs=9, num_bins=2, rescoring=mode)
    assert curriculum.reranks == (mode != "off") and curriculum.observes_all == (mode == "full")
    for calls, expected in epochs:
        for indices, confidence in calls:
            curriculum.observe(indices, confidence)
        curriculum.rerank()
        assert curriculum.score == pytest.approx(expected)
        assert (np.diff(np.array(expected)[curriculum.order]) >= 0).all()
        curriculum.rerank()                                           # nothing is applied twice
        assert curriculum.score == pytest.approx(expected)


def test_curriculum_state_round_trip():
    """The ranking and what was drawn."""
    curriculum = make_curriculum(200)
    other = make_curriculum(200)
    curriculum.sample(0)
    curriculum.observe(np.arange(50), np.linspace(0.1, 0.9, 50))
    curriculum.rerank()
    other.load_state_dict(curriculum.state_dict())
    assert np.array_equal(curriculum.sample(3), other.sample(3))
    assert curriculum.drawn == other.drawn and set(other.drawn) == {0, 3}
    with pytest.raises(ValueError, match="200 samples"):
        make_curriculum(100).load_state_dict(curriculum.state_dict())


@pytest.mark.parametrize("bad", [{"scale": "x"}, {"rescoring": "x"}, {"pace": 0}, {"num_bins": 2000}])
def test_curriculum_errors_name_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_curriculum(**bad)


def test_the_state_is_a_few_arrays():
    """For the paper's six million frames about 100 MB: four numbers of four bytes per sample."""
    n = 600_000
    scores = np.random.default_rng(0).random(n, dtype=np.float32)
    curriculum = actupose.ActiveCurriculum(scores, epochs=70)
    curriculum.observe(np.arange(1000), np.full(1000, 0.5))
    curriculum.rerank()
    assert len(curriculum.sample(10)) == sum(curriculum.drawn[10]) > n / 10
    held = sum(value.nbytes for value in vars(curriculum).values() if isinstance(value, np.ndarray))
    others = [value for value in vars(curriculum).values() if isinstance(value, (list, dict))]
    assert held <= 4 * 4 * n + 1000 and sum(map(len, others)) < 10


# --- §3.2 -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, cells", [("narrow", 64, 32), ("narrow", 96, 48), ("resnet18", 64, 16),
                                               ("resnet50", 96, 24)])
def test_network_shapes(name, size, cells):
    net = actupose.PoseResNet(name, 21)
    heatmaps, features = net(torch.zeros(2, 3, size, size))
    assert heatmaps.shape == (2, 21, cells, cells) and features.shape == (2, net.backbone.channels)
    assert size // net.stride == cells


def test_adain_agrees_with_published(golden):
    out = actupose.adain(golden["adain_content"], golden["adain_style"])
    assert torch.allclose(out, golden["adain_out"], atol=1e-5)


def test_adain_computes_in_float32():
    """With bfloat16 features, the statistics are those of the same numbers in float64."""
    content, style = torch.randn(2, 2, 4, 16, 16).bfloat16() + 30
    std_c, mean_c = torch.std_mean(content.double(), (2, 3), keepdim=True)
    std_s, mean_s = torch.std_mean(style.double(), (2, 3), keepdim=True)
    exact = (content.double() - mean_c) / std_c * std_s + mean_s
    out = actupose.adain(content, style)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, atol=1e-3)


@pytest.mark.parametrize("networks", ["small", "vgg"])
def test_style_transfer_gives_valid_pixels(networks):
    """Whatever the decoder says, the output is as large as the content and between black and white."""
    transfer = actupose.StyleTransfer(networks).eval()
    content, style = data.normalise(torch.rand(4, 3, 32, 32)).split(2)
    with torch.no_grad():
        transfer.decoder[-2 if networks == "small" else -1].bias.fill_(3.0)
        out = transfer(content, style, 0.7)
    low, high = (data.normalise(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    assert out.shape == content.shape
    assert (out >= low).all() and (out <= high).all() and (out == high).any()


def test_style_transfer_learns_to_carry_colour():
    """A red image gets the mean colour of the blue domain, and with alpha = 0 stays about as it was."""
    red = torch.tensor([0.5, -1.0, -1.0])
    blue = torch.tensor([-0.5, 0.5, 1.5])

    def noise(colour):
        return colour[:, None, None] + 0.4 * torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), 32)

    def batches(i):
        torch.manual_seed(i)
        return noise(red), noise(blue)

    transfer = actupose.StyleTransfer("small")
    actupose.train_style_transfer(transfer, batches, 160, train_encoder=True)
    content, style = batches(1000)
    restyled = transfer(content, style, 1.0)
    same = transfer(content, style, 0.0)
    assert (restyled.mean((0, 2, 3)) - blue).abs().max() < 0.4
    assert (same.mean((0, 2, 3)) - red).abs().max() < 0.2
    assert not any(p.requires_grad for p in transfer.parameters())


class Doubling(torch.nn.Module):
    """A layer with a weight of 2."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * x


def test_the_style_losses_by_hand():
    """Content x = 0, 1, 2, 3 has features 2x and 4x; in the style of 2x they are to be 4x and 8x. AdaIN gives
    8x, which is decoded to 16x and encoded to 32x and 64x. Without a style, 4x is decoded to 8x."""
    transfer = actupose.StyleTransfer("small")
    transfer.encoder = torch.nn.Sequential(Doubling(), Doubling())
    transfer.decoder = Doubling()
    transfer.taps = (0, 1)
    x = torch.arange(4.0).view(1, 1, 2, 2)
    losses = (transfer.reconstruction_loss(x), *transfer.losses(x, 2 * x))
    square = 3.5
    mean = 1.5
    variance = 5 / 3                                            # of the sample
    expected = [(8 - 1) ** 2 * square, (64 - 8) ** 2 * square,
                ((32 - 4) ** 2 + (64 - 8) ** 2) * (mean ** 2 + variance)]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("train_encoder, total", [(False, 10 + 0.1 * 100), (True, 1 + 10 + 0.1 * 100)])
def test_what_the_style_decoder_descends(train_encoder, total):
    """A given encoder: content + 0.1 style, as published; one of our own: the reconstruction as well. In both
    directions."""
    transfer = actupose.StyleTransfer("small")
    transfer.decoder = Doubling()
    weight = transfer.decoder.weight
    directions = []

    def losses(content, style):
        directions.append((content, style))
        return 10 * weight, 100 * weight

    transfer.losses = losses
    transfer.reconstruction_loss = lambda images: weight
    actupose.train_style_transfer(transfer, lambda i: ("source", "target"), 1, train_encoder)
    assert directions == [("source", "target"), ("target", "source")]
    assert weight.grad.item() == pytest.approx(2 * total) and weight < 2


def test_a_given_encoder_is_not_trained():
    transfer = actupose.StyleTransfer("small")
    before = [parameter.clone() for parameter in transfer.parameters()]
    images = torch.randn(2, 3, 16, 16)
    actupose.train_style_transfer(transfer, lambda i: (images, images + 1), 2, train_encoder=False)
    same = [torch.equal(old, new) for old, new in zip(before, transfer.parameters())]
    encoder = len(list(transfer.encoder.parameters()))
    assert all(same[:encoder]) and not any(same[encoder:])


def test_rectified_maps_agree_with_published(golden):
    heatmaps = golden["rectify_in"].float()
    out, _, confidence = kernels.rectify(heatmaps, 2.0, False)
    assert torch.allclose(out, golden["rectify_out"], atol=1e-6)
    assert torch.equal(confidence, heatmaps.amax((2, 3)))


def test_losses_agree_with_published(golden):
    student = golden["loss_student"].float()
    teacher = golden["loss_teacher"].float()
    mse = actupose.heatmap_mse(student, teacher, golden["loss_weight"])
    assert mse.item() == pytest.approx(golden["loss_joints_mse"].item(), rel=1e-5)
    mask = actupose.confidence_mask(teacher.amax((2, 3)), golden["loss_mask_ratio"].item())
    assert torch.equal(mask, golden["loss_mask"])
    consistency = actupose.consistency_loss(student, teacher, mask)
    assert consistency.item() == pytest.approx(golden["loss_consistency"].item(), rel=1e-5)


def test_consistency_by_hand():
    """The published mask is empty, since its confidences tie at the maximum. This one has content."""
    student = torch.zeros(1, 2, 2, 2)
    teacher = torch.tensor([[[[1.0, 0], [0, 2]], [[5, 5], [5, 5]]]])
    loss = actupose.consistency_loss(student, teacher, torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx((1 + 4) / 8)


def test_confidence_mask_by_hand():
    """The ratio is the share left out: 0.5 up to the median, 0.2 two of ten, 1 all, 0 the last alone."""
    confidence = torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.3, 0.2]])
    assert actupose.confidence_mask(confidence, 0.5).tolist() == [[True, False, True], [True, False, False]]
    ten = torch.arange(10.0).view(2, 5)
    assert actupose.confidence_mask(ten, 0.2).flatten().tolist() == [False] * 2 + [True] * 8
    assert actupose.confidence_mask(ten, 1.0).sum() == 0 and actupose.confidence_mask(ten, 0.0).sum() == 9


def test_occlusion_lands_on_the_keypoint():
    """Adaptive occlusion hides a confident keypoint inside the image behind pixels of the same image."""
    images = torch.rand(6, 3, 64, 64)
    keypoints = torch.tensor([[20.0, 40], [50, 10], [20, 40]]).repeat(6, 1, 1)
    confidence = torch.tensor([[0.95, 0.1, 0.2]]).repeat(6, 1)
    u = torch.rand(6, 6)
    u[:, 0] = 0.1
    confidence[1] = 0.5                                               # nothing confident enough
    keypoints[2, 0] = -5.0                                            # confident, but outside the image
    u[3, 0] = 0.9                                                     # above the probability
    out, hidden = actupose.occlude_keypoints(images, keypoints, confidence, u, half=4)
    assert hidden.tolist() == [0, -1, -1, -1, 0, 0]
    changed = (out != images).any(1)
    assert not changed[1:4].any()
    for b in (0, 4, 5):
        rows, columns = changed[b].nonzero().T
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 44, 16, 24)
        assert torch.isin(out[b, 0], images[b, 0]).all()


# --- §3.3 -------------------------------------------------------------------------------------------------

def test_eq5_by_hand():
    """Sample 0: limbs at 0 and 60 degrees to their labels, a third without label. Sample 1: one at 180."""
    labelled = torch.tensor([[[0.0, 0], [2, 0], [4, 0], [9, 9]], [[0, 0], [1, 0], [1, 0], [0, 0]]])
    x = 3 * math.cos(math.radians(60))
    y = 3 * math.sin(math.radians(60))
    predicted = torch.tensor([[[1.0, 1], [6, 1], [6 + x, 1 + y], [0, 0]], [[0, 0], [-1, 0], [5, 0], [0, 0]]])
    inputs = predicted, labelled, CHAIN, torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0]])
    cosine = actupose.limb_cosines(*inputs)                         # sample 1's second limb has no length
    assert (cosine - torch.tensor([[1, 0.5, 0], [-1, 0, 0]])).abs().max() < 1e-6
    assert actupose.evalpose(*inputs).item() == pytest.approx((-(1 + 0.5) + 1) / 2, abs=1e-6)
    assert actupose.evalpose_score(*inputs) == pytest.approx(100 * (1 + 0.5 - 1) / 3, abs=1e-4)
    predicted[0, 2] = predicted[0, 1]                                 # a labelled limb, predicted as a point
    assert actupose.evalpose_score(*inputs) == pytest.approx(100 * (1 + 0 - 1) / 3, abs=1e-4)


# --- §3.4 -------------------------------------------------------------------------------------------------

def test_eq6_by_hand():
    """Cosines 0.6, -1 and 0.8; no pair gives 0. Centred, means (2, 0) and (5, 5) subtracted: (-1, 1), (1, -1)
    and (0, -3), (0, 3), of which three pairs are similar."""
    source = torch.tensor([[1.0, 0], [0, 2]])
    target = torch.tensor([[1.0, 0], [3, 4], [-1, 0]])
    similar = torch.tensor([[False, True, True], [False, True, False]])
    assert actupose.cross_domain_loss(source, target, similar).item() == pytest.approx(-0.4)
    assert actupose.cross_domain_loss(source, target, similar & False).item() == 0
    source = torch.tensor([[1.0, 1], [3, -1]])
    target = torch.tensor([[5.0, 2], [5, 8]])
    loss = actupose.cross_domain_loss(source, target, torch.tensor([[True, True], [False, True]]), True)
    assert loss.item() == pytest.approx(-(-1 + 1 - 1) / math.sqrt(2))


def test_eq6_gradient_reaches_the_student_alone():
    source = torch.randn(3, 5, requires_grad=True)
    target = torch.randn(2, 5, requires_grad=True)
    actupose.cross_domain_loss(source, target, torch.tensor([[1, 0], [1, 1], [0, 0]]) > 0).backward()
    assert target.grad is None and source.grad[2].abs().sum() == 0 and source.grad[:2].abs().sum() > 0


# Eq. 7 by hand: test_distance_hand_values in test_kernels.py.

def test_eq8_by_hand():
    assert actupose.total_loss(2.0, -3.0, -5.0) == pytest.approx(2 - 0.3 - 0.05)
    assert actupose.total_loss(2.0, -3.0, -5.0, (1, 0, 0)) == 2.0


def test_eq5_of_limbs_without_length_has_a_gradient():
    coincident = torch.zeros(3, 4, 2, requires_grad=True)
    actupose.evalpose(coincident, torch.randn(3, 4, 2), CHAIN, torch.ones(3, 4)).backward()
    assert torch.isfinite(coincident.grad).all()


# --- §4 ---------------------------------------------------------------------------------------------------

def test_regdas_losses_by_hand():
    """Softmax (1/4, 3/4) against (1/2, 1/2); with epsilon 1 the label (0, 1) is (1/3, 2/3). A keypoint of
    weight 0 has an empty map and no say. Ground false: the other joints, clipped to 1."""
    maps = torch.tensor([[[[0.0, math.log(3)]], [[5.0, 7.0]]]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0]])
    loss = actupose.heatmap_kl(maps, torch.tensor([[[[2.0, 2.0]], [[0.0, 0.0]]]]), weight)
    assert loss.item() == pytest.approx(math.log(4 / 3) / 2 / 2)
    loss.backward()
    assert maps.grad.flatten().tolist() == pytest.approx([-1 / 8, 1 / 8, 0, 0])         # softmax - label, / 2
    loss = actupose.heatmap_kl(maps, torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]]), weight, epsilon=1.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) / 3 + 2 * math.log(8 / 9) / 3) / 2, rel=1e-5)
    predicted = data.draw_gaussians(torch.tensor([[[2.0, 2], [2, 2], [6, 5]]]), 9, 9, 3.0)
    truth, false = actupose.ground_maps(predicted, sigma=1.0)
    assert truth[0, 0, 2, 3].item() == pytest.approx(math.exp(-0.5)) and truth[0, 2, 5, 6] == 1
    assert torch.allclose(false[0, 0], truth[0, 1] + truth[0, 2]) and false[0, 2, 2, 3] == 1    # 2 exp(-1/2)
    assert false[0, 2, 2, 4].item() == pytest.approx(2 * math.exp(-2)) and false[0, 2, 5, 6] == 0


def test_regdas_gradient_layer():
    """0.2 / (1 + exp(-i / 1000)) - 0.1 at iteration i of 15,000: 0, 0.0462 at 1,000, then 0.1; the same
    share of another number. Forward it changes nothing; psi gets that part of the gradient of f', f' all."""
    factors = [actupose.gradient_factor(*i) for i in ((0, 15000), (1000, 15000), (90, 1350), (15000, 15000))]
    assert factors == pytest.approx([0, 0.0462117, 0.0462117, 0.1], rel=1e-5)
    network = actupose.PoseResNet("narrow", 5)
    images = torch.rand(2, 3, 32, 32)
    actupose.make_regressors(network)
    found = []
    for factor in (1.0, 0.25):
        maps, adversary = actupose.regressor_maps(network.eval(), images, factor)
        network.zero_grad()
        adversary.square().sum().backward()
        found.append((adversary, network.upsampling[6].weight.grad, network.head_adv[3].weight.grad))
        assert torch.equal(maps, network(images)[0]) and network.head[3].weight.grad is None
    (adversary, psi, own), (same, quarter, whole) = found
    assert torch.equal(adversary, same) and torch.equal(own, whole) and psi.abs().sum() > 0
    assert torch.allclose(quarter, psi / 4, rtol=1e-4)


def test_pck_agrees_with_published(golden):
    """Both sides are decoded from heatmaps, and only cells with x > 1 and y > 1 count."""
    def decoded(name, visible):
        heatmaps, weight = data.render_heatmaps(golden[f"pck_{name}_keypoints"], visible, 64, 4, 2.0)
        return actupose.decode_keypoints(heatmaps)[0], weight

    predicted, _ = decoded("pred", torch.ones_like(golden["pck_visible"]))
    true, counted = decoded("true", golden["pck_visible"])
    counted = counted * (true > 1).all(-1)
    hits, counted = actupose.pck_hits(predicted, true, counted, 0.05 * 64)
    per_joint = hits.sum(0).double() / counted.sum(0)
    assert torch.allclose(per_joint, golden["pck_per_joint"], atol=1e-6)
    overall = actupose.pck(predicted, true, counted, 64)
    assert overall["all"] == pytest.approx(100 * golden["pck_mean"].item(), abs=1e-4)


def test_pck_by_hand():
    """Within 0.05 * 100 = 5. A group is the mean over its keypoints; unlabelled ones do not count."""
    true = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[[3.0, 4.0], [0, 5.1], [0, 0]], [[50, 0], [0, 1], [0, 0]]])
    weight = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    scores = actupose.pck(predicted, true, weight, 100, {"a": (0,), "b": (1,), "c": (2,), "all": (0, 1, 2)})
    assert scores == pytest.approx({"a": 50, "b": 0, "c": math.nan, "all": 25}, nan_ok=True)


def test_subcell_decoding():
    """The vertex is within 0.1 cells of a Gaussian's centre; at the border it is the cell itself."""
    centres = torch.tensor([[[5.3, 7.6], [10.0, 3.45], [0.0, 15.0]]])
    heatmaps = data.draw_gaussians(centres, 16, 16, 1.5)
    cells, confidence = actupose.decode_keypoints(heatmaps, subcell=True)
    assert (cells - centres).abs().max() < 0.1 and confidence[0, 2] == 1
    whole, _ = actupose.decode_keypoints(heatmaps)
    assert whole[0].tolist() == [[5, 8], [10, 3], [0, 15]]
