"""The paper's equations, with values worked out by hand or in float64, and agreement with the published base method."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import actupose
import data

SHARED = Path(__file__).resolve().parents[2] / "shared"


# --- §3.1.1 -----------------------------------------------------------------------------------------------


def test_eq1_by_hand():
    poses = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    reconstruction = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    mean = torch.tensor([[2.0], [0.0]])
    log_var = torch.tensor([[0.0], [math.log(4.0)]])
    # sample 0: 1 + 4 = 5, KL = (4 + 1 - 1 - 0) / 2 = 2; sample 1: 9, KL = (0 + 4 - 1 - log 4) / 2
    expected = ((5 + 0.5 * 2) + (9 + 0.5 * (3 - math.log(4)) / 2)) / 2
    assert actupose.vae_loss(poses, reconstruction, mean, log_var, kl_weight=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_eq1_kl_against_sampling():
    """The closed form of the KL term equals a Monte Carlo estimate of E_q[log q - log p]."""
    mean, log_var = torch.tensor([[0.7, -0.3]], dtype=torch.float64), torch.tensor([[-0.5, 0.4]], dtype=torch.float64)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    torch.manual_seed(0)
    z = q.sample((400_000,))
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean().item()
    zero = torch.zeros(1, 4, dtype=torch.float64)
    assert actupose.vae_loss(zero, zero, mean, log_var, kl_weight=1.0).item() == pytest.approx(estimate, abs=5e-3)


def test_eq2_by_hand_with_missing_coordinates():
    """Eq. 2 over the coordinates that are there, rescaled to the full count."""
    poses, reconstruction = torch.tensor([[1.0, 2.0, 3.0, 100.0]]), torch.zeros(1, 4)
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert actupose.reconstruction_error(poses, reconstruction, weight).item() == pytest.approx(14 * 4 / 3)


def test_poses_are_free_of_place_and_size():
    torch.manual_seed(0)
    keypoints, visible = torch.rand(20, 16, 2) * 100, (torch.rand(20, 16) < 0.8).float()
    poses, weight = actupose.normalise_poses(keypoints, visible, (2, 3))
    moved, _ = actupose.normalise_poses(keypoints * 3.5 + torch.tensor([40.0, -7.0]), visible, (2, 3))
    assert torch.allclose(poses, moved, atol=1e-5)
    seen = poses.view(20, 16, 2)[visible.bool()]
    assert seen.abs().max() <= 0.5 + 1e-6
    assert torch.equal(weight.view(20, 16, 2)[..., 0], visible)


def test_missing_keypoints_do_not_change_a_pose_through_their_coordinates():
    torch.manual_seed(0)
    keypoints, visible = torch.rand(5, 16, 2), torch.ones(5, 16)
    visible[:, 7] = 0
    junk = keypoints.clone()
    junk[:, 7] = -999.0
    assert torch.equal(actupose.normalise_poses(keypoints, visible, (2, 3))[0],
                       actupose.normalise_poses(junk, visible, (2, 3))[0])
    nothing, weight = actupose.normalise_poses(keypoints, torch.zeros(5, 16), (2, 3))
    assert torch.isfinite(nothing).all() and weight.sum() == 0


def test_rare_poses_score_high():
    """The reason for Eq. 2: nine tenths are variations of one pose, one tenth are arbitrary; the arbitrary lead."""
    torch.manual_seed(0)
    base = torch.rand(16, 2)
    keypoints = base + 0.03 * torch.randn(1000, 16, 2)
    keypoints[:100] = torch.rand(100, 16, 2)
    visible = torch.ones(1000, 16)
    vae = actupose.train_pose_vae(keypoints, visible, (2, 3), steps=300)
    complexity = actupose.pose_complexity(vae, keypoints, visible, (2, 3))
    assert set(complexity.argsort(descending=True)[:80].tolist()) <= set(range(100))
    again = actupose.pose_complexity(vae, keypoints, visible, (2, 3), chunk=77)
    assert torch.allclose(complexity, again, atol=1e-5)              # no draw, whatever the chunks


def test_bins_are_equal_and_ordered():
    scores = np.random.default_rng(0).random(1003)
    bins = actupose.assign_bins(scores, 25)
    assert np.bincount(bins).min() >= 40 and np.bincount(bins).max() <= 41
    assert all(scores[bins == j].max() <= scores[bins == j + 1].min() for j in range(24))


@pytest.mark.skipif(not (SHARED / "mat" / "lspet_joints.mat").exists(), reason="real LSP Extended annotations are not here")
def test_fig3_on_real_poses():
    """Fig. 3: within a bin of real poses, the spread of the triplet angles rises with complexity."""
    from kernels.reference import triplet_angles
    joints = data.read_mat(SHARED / "mat" / "lspet_joints.mat", "joints")
    joints = torch.from_numpy(np.ascontiguousarray(joints, dtype=np.float32)).permute(2, 0, 1)
    joints = joints[(joints[..., 2] == 1).all(1)][..., :2]
    keypoints, visible = torch.zeros(len(joints), 16, 2), torch.zeros(len(joints), 16)
    slots = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]
    keypoints[:, slots], visible[:, slots] = joints, 1.0
    vae = actupose.train_pose_vae(keypoints, visible, (2, 3), steps=800)
    bins = actupose.assign_bins(actupose.pose_complexity(vae, keypoints, visible, (2, 3)), 25)
    triplets = torch.tensor([t for t in data.BODY16.triplets if not {6, 7} & set(t)])
    angles, valid = triplet_angles(keypoints, triplets)
    spread = []
    for j in range(25):
        of_bin, ok = angles[torch.from_numpy(bins == j)], valid[torch.from_numpy(bins == j)].float()
        centre = (of_bin * ok).sum(0) / ok.sum(0)
        spread.append((((of_bin - centre).abs() * ok).sum() / ok.sum()).item())
    ranks = np.argsort(np.argsort(spread))
    assert np.corrcoef(ranks, np.arange(25))[0, 1] > 0.8, spread
    assert np.mean(spread[-5:]) > 1.3 * np.mean(spread[:5]), spread


# --- §3.1.2 -----------------------------------------------------------------------------------------------


def make_curriculum(n=1000, **changes):
    return actupose.ActiveCurriculum(np.random.default_rng(0).random(n).astype(np.float32), **{"epochs": 70, **changes})


def test_eq3_by_hand():
    """lambda 2, 25 bins, 70 epochs: at epoch 7 the peak is int(2 * 25 * 7 / 70) = 5; ranks are j / 24."""
    curriculum = make_curriculum()
    assert [curriculum.peak_bin(e) for e in (0, 7, 34, 35, 69)] == [0, 5, 24, 24, 24]
    p = curriculum.probabilities(7)
    for j in (0, 5, 11, 24):
        assert p[j] == pytest.approx(math.exp(-((j - 5) / 24) ** 2 / (2 * 0.25 ** 2)), rel=1e-12)


def test_eq3_minmax_by_hand():
    """Four samples in two bins with mean scores 1 and 5: min-max gives s = 0 and 1."""
    curriculum = actupose.ActiveCurriculum(np.float32([0, 2, 4, 6]), epochs=4, num_bins=2, pace=1.0, spread=0.5, scale="minmax")
    assert curriculum.bin_score == pytest.approx([1, 5])
    assert curriculum.probabilities(0) == pytest.approx([1, math.exp(-2)])
    assert curriculum.probabilities(3) == pytest.approx([math.exp(-2), 1])


def test_an_epochs_sample_follows_eq3():
    """p_j N / N_b samples of bin j, none twice, from that bin, another draw each epoch, the same with the same seed."""
    curriculum = make_curriculum(5000)
    bins = actupose.assign_bins(curriculum.complexity, 25)
    for epoch in (0, 20, 69):
        drawn = curriculum.sample(epoch)
        assert len(set(drawn.tolist())) == len(drawn)
        counts = np.bincount(bins[drawn], minlength=25)
        assert np.abs(counts - curriculum.probabilities(epoch) * 200).max() < 1
        assert np.array_equal(counts, curriculum.drawn_per_bin)
    assert np.array_equal(curriculum.sample(20), make_curriculum(5000).sample(20))
    assert not np.array_equal(curriculum.sample(20), make_curriculum(5000, seed=1).sample(20))


def test_the_draw_is_unbiased():
    """Over many epochs with one peak, each bin is drawn p_j N / N_b times on average, though that is no whole number."""
    curriculum = make_curriculum(100, epochs=4000, pace=1e-6, num_bins=10)
    counts = np.zeros(10)
    for epoch in range(2000):
        counts += np.diff(np.searchsorted(np.sort(actupose.assign_bins(curriculum.complexity, 10)[curriculum.sample(epoch)]),
                                          np.arange(11)))
    expected = np.exp(-(np.arange(10) / 9) ** 2 / (2 * 0.25 ** 2)) * 10
    assert counts / 2000 == pytest.approx(expected, abs=0.06)


def test_never_an_empty_epoch():
    curriculum = make_curriculum(30, num_bins=25, spread=1e-4)
    assert all(len(curriculum.sample(epoch)) >= 1 for epoch in range(70))


def test_eq4_relative_by_hand():
    curriculum = actupose.ActiveCurriculum(np.float32([1, 2, 3, 4]), epochs=2, num_bins=2)
    curriculum.observe([0, 1], [0.25, 0.75])
    curriculum.rerank()
    # the epoch's mean is 0.5: 1 * 0.5 / 0.25, 2 * 0.5 / 0.75, and factor 1 for what was never seen
    assert curriculum.score == pytest.approx([2, 4 / 3, 3, 4])
    curriculum.rerank()
    assert curriculum.score == pytest.approx([2, 4 / 3, 3, 4])         # not cumulative


def test_eq4_a_confidence_counts_relative_to_its_own_epoch():
    """Networks grow surer: 0.08 in an epoch of mean 0.08 and 0.4 in one of mean 0.4 say the same of a sample.

    All calls of `observe` between two `rerank`s are one epoch; what is not drawn keeps its relative value.
    """
    curriculum = actupose.ActiveCurriculum(np.float32([1, 2, 3, 4]), epochs=9, num_bins=2)
    curriculum.observe([0], [0.08])
    curriculum.observe([1], [0.08])
    curriculum.rerank()
    assert curriculum.score == pytest.approx([1, 2, 3, 4])
    curriculum.observe([1], [0.2])
    curriculum.observe([2], [0.6])
    curriculum.rerank()                                                # mean 0.4: factors 2 and 2 / 3
    assert curriculum.score == pytest.approx([1, 4, 2, 4])
    curriculum.observe([0, 3], [0.9, 0.3])
    curriculum.rerank()                                                # mean 0.6; samples 1 and 2 as before
    assert curriculum.score == pytest.approx([2 / 3, 4, 2, 8])


def test_eq4_literal_by_hand():
    """As printed: each sample drawn in the epoch is multiplied once by 1 / confidence, and products accumulate.

    Only the order counts, so scores are divided by their mean.
    """
    curriculum = actupose.ActiveCurriculum(np.float32([1, 2, 3, 4]), epochs=2, num_bins=2, confidence="literal")
    curriculum.observe([0, 1, 2], [0.1, 0.5, 0.5])
    curriculum.rerank()
    assert curriculum.score == pytest.approx(np.array([10, 4, 6, 4]) / 6)
    curriculum.rerank()                                                # no epoch between: nothing is applied again
    assert curriculum.score == pytest.approx(np.array([10, 4, 6, 4]) / 6)
    curriculum.observe([1, 3], [0.4, 0.8])
    curriculum.rerank()
    assert curriculum.score == pytest.approx(np.array([10, 10, 6, 5]) / 7.75)


@pytest.mark.parametrize("bad, word", [(dict(num_bins=9), "num_bins"), (dict(scale="x"), "scale"),
                                       (dict(confidence="x"), "confidence"), (dict(pace=0), "pace")])
def test_curriculum_errors_name_the_argument(bad, word):
    with pytest.raises(ValueError, match=word):
        actupose.ActiveCurriculum(np.float32([1, 2, 3, 4]), **{"epochs": 2, "num_bins": 2, **bad})


def test_low_confidence_moves_a_sample_up():
    """Fig. 6: low confidence moves a sample to a higher bin, high confidence to a lower one."""
    curriculum = make_curriculum(1000)
    middle = curriculum.order[500]
    others = np.arange(1000)
    position = {}
    for confidence in (0.2, 0.9):
        curriculum.observe(others, np.full(1000, 0.5))
        curriculum.observe([middle], [confidence])
        curriculum.rerank()
        position[confidence] = int(np.flatnonzero(curriculum.order == middle)[0])
    assert position[0.9] < 500 < position[0.2]


def test_curriculum_state_round_trip():
    curriculum, other = make_curriculum(200), make_curriculum(200)
    curriculum.observe(np.arange(50), np.linspace(0.1, 0.9, 50))
    curriculum.rerank()
    other.load_state_dict(curriculum.state_dict())
    assert np.array_equal(curriculum.sample(3), other.sample(3))
    with pytest.raises(ValueError, match="200 samples"):
        make_curriculum(100).load_state_dict(curriculum.state_dict())


@pytest.mark.parametrize("change, text", [({"scale": "x"}, "scale"), ({"confidence": "x"}, "confidence"), ({"pace": 0}, "pace"),
                                          ({"num_bins": 2000}, "num_bins")])
def test_curriculum_says_what_is_wrong(change, text):
    with pytest.raises(ValueError, match=text):
        make_curriculum(**change)


def test_six_million_samples_are_arrays():
    """The paper's 6 million frames: what the curriculum holds is a few arrays (the README gives the time)."""
    n = 6_000_000
    curriculum = actupose.ActiveCurriculum(np.random.default_rng(0).random(n, dtype=np.float32), epochs=70)
    curriculum.observe(np.arange(1000), np.full(1000, 0.5))
    start = time.perf_counter()
    curriculum.rerank()
    drawn = curriculum.sample(10)
    print(f"re-rank and draw of 6 million: {time.perf_counter() - start:.2f} s")
    assert len(drawn) == curriculum.drawn_per_bin.sum() > n / 10
    held = sum(value.nbytes for value in vars(curriculum).values() if isinstance(value, np.ndarray))
    assert held <= 6 * 4 * n


# --- §3.2 -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "golden" / "pose_resnet101_state_dict.json").exists(), reason="shared/golden is not here")
def test_parameter_names_of_the_published_network():
    published = json.loads((SHARED / "golden" / "pose_resnet101_state_dict.json").read_text())
    own = {name: list(value.shape) for name, value in actupose.PoseResNet("resnet101", 16).state_dict().items()}
    assert own == {name: shape for name, shape in published.items() if not name.startswith("backbone.fc")}


@pytest.mark.skipif(not (SHARED / "golden" / "torchvision_resnet_state_dict.json").exists(), reason="shared/golden is not here")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_parameter_names_of_torchvision(name):
    published = json.loads((SHARED / "golden" / "torchvision_resnet_state_dict.json").read_text())[name]
    own = {key: list(value.shape) for key, value in actupose.PoseResNet(name, 16).backbone.state_dict().items()}
    assert own == {key: shape for key, shape in published.items() if not key.startswith("fc.")}


@pytest.mark.skipif(not (SHARED / "golden" / "adain_state_dict.json").exists(), reason="shared/golden is not here")
def test_parameter_names_of_the_published_style_networks():
    published = json.loads((SHARED / "golden" / "adain_state_dict.json").read_text())
    encoder, decoder, _ = actupose.vgg_networks()
    shapes = {name: list(value.shape) for name, value in decoder.state_dict().items()}
    assert shapes == published["decoder"]
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes == {name: shape for name, shape in published["vgg_normalised"].items() if int(name.split(".")[0]) < 31}


@pytest.mark.parametrize("name, size, cells", [("narrow", 64, 32), ("narrow", 96, 48), ("resnet18", 64, 16), ("resnet50", 96, 24)])
def test_network_shapes(name, size, cells):
    net = actupose.PoseResNet(name, 21)
    heatmaps, features = net(torch.zeros(2, 3, size, size))
    assert heatmaps.shape == (2, 21, cells, cells) and features.shape == (2, net.backbone.channels)
    assert size // net.stride == cells


def test_adain_agrees_with_published(golden):
    assert torch.allclose(actupose.adain(golden["adain_content"], golden["adain_style"]), golden["adain_out"], atol=1e-5)


@pytest.mark.parametrize("networks", ["small", "vgg"])
def test_style_transfer_gives_valid_pixels(networks):
    """Whatever the decoder says, the output is an image: as large as the content, within black and white."""
    torch.manual_seed(0)
    transfer = actupose.StyleTransfer(networks).eval()
    content = data.normalise(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        transfer.decoder[-2 if networks == "small" else -1].bias.fill_(3.0)
        out = transfer(content, data.normalise(torch.rand(2, 3, 32, 32)), 0.7)
    low, high = (data.normalise(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    assert out.shape == content.shape and (out >= low).all() and (out <= high).all() and (out == high).any()


def test_adain_computes_in_float32():
    """With bfloat16 features, the statistics are those of the same numbers in float32."""
    content, style = torch.randn(2, 4, 16, 16).bfloat16() + 30, torch.randn(2, 4, 16, 16).bfloat16() + 30
    (mean_c, std_c), (mean_s, std_s) = (actupose.channel_statistics(maps.double()) for maps in (content, style))
    exact = (content.double() - mean_c) / std_c * std_s + mean_s
    out = actupose.adain(content, style)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, atol=1e-3)


def test_style_transfer_learns_to_carry_colour():
    """Trained on dark red and light blue noise images, it gives a red image the blue domain's mean colour, and alpha = 0
    leaves the image about as it was."""
    torch.manual_seed(0)
    red, blue = torch.tensor([0.5, -1.0, -1.0]), torch.tensor([-0.5, 0.5, 1.5])

    def batches(i):
        torch.manual_seed(i)
        return tuple(colour[:, None, None] + 0.4 * torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), 32) for colour in (red, blue))

    transfer = actupose.train_style_transfer(actupose.StyleTransfer("small"), batches, 160, train_encoder=True)
    content, style = batches(1000)
    restyled, same = transfer(content, style, 1.0), transfer(content, style, 0.0)
    assert (restyled.mean((0, 2, 3)) - blue).abs().max() < 0.4
    assert (same.mean((0, 2, 3)) - red).abs().max() < 0.2
    assert not any(p.requires_grad for p in transfer.parameters())


def test_teacher_is_a_moving_average_of_parameters():
    student = actupose.PoseResNet("narrow", 16)
    teacher = actupose.make_teacher(student)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    actupose.update_teacher(teacher, student, 0.9)
    for p, q in zip(teacher.parameters(), before):
        assert torch.allclose(p, q + 0.1, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_rectified_maps_agree_with_published(golden):
    out, cells, confidence = actupose.rectify(golden["rectify_in"].float(), sigma=2.0)
    assert torch.allclose(out, golden["rectify_out"], atol=1e-6)
    assert torch.equal(confidence, golden["rectify_in"].float().amax((2, 3)))


def test_losses_agree_with_published(golden):
    student, teacher = golden["loss_student"].float(), golden["loss_teacher"].float()
    mse = actupose.heatmap_mse(student, teacher, golden["loss_weight"])
    assert mse.item() == pytest.approx(golden["loss_joints_mse"].item(), rel=1e-5)
    mask = actupose.confidence_mask(teacher.amax((2, 3)), golden["loss_mask_ratio"].item())
    assert torch.equal(mask, golden["loss_mask"])
    assert actupose.consistency_loss(student, teacher, mask).item() == pytest.approx(golden["loss_consistency"].item(), rel=1e-5)


def test_consistency_by_hand():
    """Golden's mask is empty (its confidences tie at the maximum), so a mask with content is worked out here."""
    student, teacher = torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0, 0], [0, 2]], [[5, 5], [5, 5]]]])
    mask = torch.tensor([[True, False]])
    assert actupose.consistency_loss(student, teacher, mask).item() == pytest.approx((1 + 4) / 8)


def test_confidence_mask_by_hand():
    """The ratio is the share left out: 0.5 keeps those above the median, 0.2 eight of ten, 1 none, 0 all but the last."""
    confidence = torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.3, 0.2]])
    assert actupose.confidence_mask(confidence, 0.5).tolist() == [[True, False, True], [True, False, False]]
    ten = torch.arange(10.0).view(2, 5)
    assert actupose.confidence_mask(ten, 0.2).flatten().tolist() == [False] * 2 + [True] * 8
    assert actupose.confidence_mask(ten, 1.0).sum() == 0 and actupose.confidence_mask(ten, 0.0).sum() == 9


def test_occlusion_lands_on_the_keypoint():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 64, 64)
    keypoints = torch.tensor([20.0, 40.0]).expand(6, 3, 2).clone()
    keypoints[:, 1] = torch.tensor([50.0, 10.0])
    confidence = torch.tensor([[0.95, 0.1, 0.2]]).repeat(6, 1)
    confidence[1] = 0.5                                                  # nothing confident enough
    keypoints[2, 0] = -5.0                                               # confident, but outside the image
    u = torch.rand(6, 6)
    u[:, 0] = 0.1
    u[3, 0] = 0.9                                                        # the coin says no
    out, hidden = actupose.occlude_keypoints(images, keypoints, confidence, u, half=4)
    assert hidden.tolist() == [0, -1, -1, -1, 0, 0]
    changed = (out != images).any(1)
    for b, k in enumerate(hidden.tolist()):
        if k < 0:
            assert not changed[b].any()
        else:
            rows, columns = changed[b].nonzero().T
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 44, 16, 24)
            values = set(images[b, 0].flatten().tolist())
            assert set(out[b, 0].flatten().tolist()) <= values           # copied from the same image


# --- §3.3 -------------------------------------------------------------------------------------------------


def test_eq5_by_hand():
    """Two limbs at 0 and 60 degrees to their labels, a third without label: -(1 + 1/2); another sample: +1."""
    limbs = torch.tensor([[0, 1], [1, 2], [2, 3]])
    labelled = torch.tensor([[[0.0, 0], [2, 0], [4, 0], [9, 9]], [[0, 0], [1, 0], [1, 0], [0, 0]]])
    angle = math.radians(60)
    predicted = torch.tensor([[[1.0, 1], [6, 1], [6 + 3 * math.cos(angle), 1 + 3 * math.sin(angle)], [0, 0]],
                              [[0, 0], [-1, 0], [5, 0], [0, 0]]])
    weight = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0]])
    cosine, valid = actupose.limb_cosines(predicted, labelled, limbs, weight)
    assert valid.tolist() == [[1, 1, 0], [1, 0, 0]]                      # sample 1's second limb has no length
    assert actupose.evalpose(predicted, labelled, limbs, weight).item() == pytest.approx((-1.5 + 1) / 2, abs=1e-6)
    assert actupose.evalpose_score(predicted, labelled, limbs, weight) == pytest.approx(100 * (1 + 0.5 - 1) / 3, abs=1e-4)


def test_eq5_gradient():
    torch.manual_seed(0)
    labelled = torch.randn(3, 4, 2, dtype=torch.float64)
    predicted = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 1, 1, 0]] * 3, dtype=torch.float64)
    limbs = torch.tensor([[0, 1], [1, 2], [2, 3]])
    assert torch.autograd.gradcheck(lambda p: actupose.evalpose(p, labelled, limbs, weight), predicted)


def test_eq5_gradient_of_coincident_keypoints_is_finite():
    predicted = torch.zeros(1, 2, 2, requires_grad=True)
    actupose.evalpose(predicted, torch.rand(1, 2, 2), torch.tensor([[0, 1]]), torch.ones(1, 2)).backward()
    assert torch.isfinite(predicted.grad).all()


# --- §3.4 -------------------------------------------------------------------------------------------------


def test_eq6_by_hand():
    source, target = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 4], [1, 0], [-1, 0]])
    pairs = torch.tensor([[0, 0], [0, 2], [1, 0]])
    assert actupose.cross_domain_loss(source, target, pairs).item() == pytest.approx(-(0.6 - 1 + 0.8))
    padded = torch.tensor([[0, 0], [0, 2], [1, 0], [-1, -1], [-1, -1]])
    assert actupose.cross_domain_loss(source, target, padded).item() == pytest.approx(-(0.6 - 1 + 0.8))
    assert actupose.cross_domain_loss(source, target, pairs[:0]).item() == 0


def test_eq6_gradient_reaches_the_student_alone():
    torch.manual_seed(0)
    source, target = torch.randn(3, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    pairs = torch.tensor([[0, 0], [1, 0], [1, 1]])
    actupose.cross_domain_loss(source, target, pairs).backward()
    assert target.grad is None and source.grad[2].abs().sum() == 0 and source.grad[:2].abs().sum() > 0


def test_eq7_by_hand():
    """A straight and a right-angled arm, one triplet of three keypoints: the angles pi and pi/2, over K = 3."""
    straight = torch.tensor([[0.0, 0], [1, 0], [2, 0]])
    bent = torch.tensor([[0.0, 0], [1, 0], [1, 5]])
    triplets = torch.tensor([[0, 1, 2]])
    difference = (math.pi / 2) / 3
    both = torch.stack([straight, bent])
    everything = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert actupose.mine_pairs(both, both, triplets, difference + 1e-3, min_triplets=1).tolist() == everything
    assert actupose.mine_pairs(both, both, triplets, difference - 1e-3, min_triplets=1).tolist() == [[0, 0], [1, 1]]
    padded = actupose.mine_pairs(both, both, triplets, difference - 1e-3, min_triplets=1, capacity=3)
    assert padded.tolist() == [[0, 0], [1, 1], [-1, -1]]


def test_mining_prunes_unsure_keypoints():
    torch.manual_seed(0)
    poses = torch.rand(4, 16, 2)
    triplets = torch.tensor(data.BODY16.triplets)
    itself = {(i, i) for i in range(4)}

    def mined(*arguments):
        return {tuple(pair) for pair in actupose.mine_pairs(*arguments).tolist()}

    assert itself <= mined(poses, poses, triplets, 0.05)
    disturbed = poses.clone()
    disturbed[:, 10] += 30.0                                             # a wrist that is wrong but known to be unsure
    valid = torch.ones(4, 16, dtype=torch.bool)
    valid[:, 10] = False
    assert itself <= mined(poses, disturbed, triplets, 1e-4, None, valid)
    assert not itself & mined(poses, disturbed, triplets, 1e-4)
    assert not mined(poses, poses, triplets, 9.0, None, torch.zeros(4, 16, dtype=torch.bool))


def test_eq8_by_hand():
    assert actupose.total_loss(2.0, -3.0, -5.0) == pytest.approx(2 - 0.3 - 0.05)
    assert actupose.total_loss(2.0, -3.0, -5.0, (1, 0, 0)) == 2.0


def test_gradients_of_the_losses():
    """Eq. 1, L_mse, L_consistency and Eq. 6 against finite differences, in float64."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    poses, weight = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[1.0, 1, 1, 1, 0, 0]] * 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r, m, v: actupose.vae_loss(poses, r, m, v, 0.3, weight),
                                    (leaf(3, 6), leaf(3, 2), leaf(3, 2)))
    target, seen = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: actupose.heatmap_mse(p, target, seen), leaf(2, 3, 4, 4))
    assert torch.autograd.gradcheck(lambda p: actupose.consistency_loss(p, target, seen > 0), leaf(2, 3, 4, 4))
    pairs = torch.tensor([[0, 0], [1, 0], [1, 1], [-1, -1]])
    features = torch.randn(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: actupose.cross_domain_loss(f, features, pairs), leaf(3, 5))


# --- §4 ---------------------------------------------------------------------------------------------------


def test_pck_agrees_with_published(golden):
    """The published PCK decodes both sides on the heatmap grid and counts cells with x > 1 and y > 1 only."""
    # As published: keypoints -> heatmaps (64 cells, sigma 2) -> argmax. A keypoint outside leaves an empty map, cell (0, 0).
    (predicted, _), (true, counted) = (data.render_heatmaps(golden[f"pck_{name}_keypoints"], visible, 64, 4, 2.0) for name, visible in
                                       (("pred", torch.ones_like(golden["pck_visible"])), ("true", golden["pck_visible"])))
    (predicted, _), (true, _) = (actupose.decode_keypoints(heatmaps) for heatmaps in (predicted, true))
    counted = counted * (true > 1).all(-1)
    hits, counted = actupose.pck_hits(predicted, true, counted, 0.05 * 64)
    per_joint = hits.sum(0).double() / counted.sum(0)
    assert torch.allclose(per_joint, golden["pck_per_joint"], atol=1e-6)
    overall = actupose.pck(predicted, true, counted, 64)
    assert overall["all"] == pytest.approx(100 * golden["pck_mean"].item(), abs=1e-4)


def test_pck_by_hand():
    """Distance at most 0.05 * 100 = 5; a group is the mean of its keypoints' percentages; unlabelled ones do not count."""
    true = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[[3.0, 4.0], [0, 5.1], [0, 0]], [[50, 0], [0, 1], [0, 0]]])
    weight = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    scores = actupose.pck(predicted, true, weight, 100, {"a": (0,), "b": (1,), "c": (2,), "all": (0, 1, 2)})
    assert scores["a"] == 50 and scores["b"] == 0 and math.isnan(scores["c"]) and scores["all"] == 25


def test_subcell_decoding():
    """The parabola's vertex is within a tenth of a cell of a Gaussian's centre; at the border the cell itself."""
    centres = torch.tensor([[[5.3, 7.6], [10.0, 3.45], [0.0, 15.0]]])
    heatmaps = data.draw_gaussians(centres, 16, 1.5)
    cells, confidence = actupose.decode_keypoints(heatmaps, subcell=True)
    assert (cells - centres).abs().max() < 0.1 and confidence[0, 2] == 1
    whole, _ = actupose.decode_keypoints(heatmaps)
    assert whole[0].tolist() == [[5, 8], [10, 3], [0, 15]]
