"""The built-in benchmark: poses within limits, keypoints on the joints, the same sample in any batch."""

import numpy as np
import pytest
import torch

import data

LOOKS = [("source", False), ("source", True), ("target", False), ("target", True), ("everyday", False),
         ("everyday", True)]


def make(domain="source", split="train", hand=False, **options):
    return data.Mannequin(domain, split, hand=hand, **{"count": 6, **options})


@pytest.mark.parametrize("domain, hand", LOOKS)
def test_shapes_and_types(domain, hand):
    dataset = make(domain, hand=hand, size=48)
    images, keypoints, visible = dataset[torch.tensor([4, 0])]
    k = 21 if hand else 16
    assert len(dataset.skeleton) == k and len(dataset) == 6 and dataset.size == 48
    assert images.shape == (2, 3, 48, 48) and keypoints.shape == (2, k, 2) and visible.shape == (2, k)
    inside = (keypoints >= 0) & (keypoints <= 47)
    assert torch.equal(visible, inside.all(-1).float()) and torch.equal(keypoints, dataset.keypoints[[4, 0]])
    assert dataset.names([3]) == ["hand-" * hand + f"{domain}-train-000003"]


@pytest.mark.parametrize("domain, hand", LOOKS)
def test_a_sample_depends_on_seed_domain_split_and_index_alone(domain, hand):
    few = make(domain, hand=hand, count=3)
    many = make(domain, hand=hand, count=9)
    assert torch.equal(few[[2]][0], many[[5, 2]][0][1:])
    assert torch.allclose(few.keypoints, many.keypoints[:3], atol=1e-4)
    other = "source" if domain == "target" else "target"
    for changed in (make(domain, hand=hand, seed=1), make(domain, "val", hand=hand), make(other, hand=hand)):
        assert not torch.allclose(few.keypoints, changed.keypoints[:3], atol=1.0)


def test_tables_keep_to_the_joint_limits():
    for poses, rest, limits in ((data.POSES, data.STANDING, data.JOINT_LIMITS),
                                (data.GESTURES, data.HAND_OPEN, data.HAND_LIMITS)):
        for kind, (_, _, _, ranges) in {"rest": (0, 0, 0, rest), **poses}.items():
            for name, (low, high) in ranges.items():
                least, most = limits.get(name.split("_")[-1], (-360, 360))
                assert least <= low <= high <= most, (kind, name)


@pytest.mark.parametrize("domain", ["source", "target"])
def test_bodies_have_human_proportions_and_joints(domain):
    joints = make(domain, count=500).joints
    mean = data.SEGMENTS
    spread = 1.08 * (1 + data.PROPORTION[domain])
    for name, pairs in (("thigh", ((1, 2), (4, 3))), ("shin", ((0, 1), (5, 4))), ("spine", ((6, 7),)),
                        ("upper_arm", ((11, 12), (14, 13))), ("forearm", ((10, 11), (15, 14)))):
        length = np.array([np.linalg.norm(joints[:, a] - joints[:, b], axis=-1) for a, b in pairs])
        assert np.allclose(length, length[0])                              # left as right
        assert (length < mean[name] * spread + 1e-9).all() and (length > mean[name] / spread ** 1.2).all()
    for a, b, c in ((0, 1, 2), (3, 4, 5), (10, 11, 12), (13, 14, 15)):     # knees and elbows
        u = joints[:, a] - joints[:, b]
        v = joints[:, c] - joints[:, b]
        cos = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
        assert (np.degrees(np.arccos(cos)) > 180 - 145 - 1e-6).all()


def test_source_is_mostly_upright_and_the_target_is_not():
    source = make("source", count=2000)
    target = make("target", count=2000)
    assert 0.76 < source.easy.float().mean() < 0.84 and 0.20 < target.easy.float().mean() < 0.30
    x, y = (target.keypoints[:, 7] - target.keypoints[:, 6]).T
    tilt = torch.rad2deg(torch.atan2(x, -y)).abs()
    assert 0.70 < (tilt < 30).float().mean() < 0.85 and 0.03 < (tilt > 120).float().mean() < 0.07
    assert make("source", hand=True, count=500).easy.float().mean() > 0.6
    assert make("target", hand=True, count=500).easy.float().mean() < 0.3


@pytest.mark.parametrize("hand", [False, True])
def test_everyday_differs_from_the_target_in_its_mix_of_poses_alone(tmp_path, hand):
    """Drawn from the same random numbers and in the same look; a pose of a kind that both draw is the same.
    Easy poses are as frequent as in the source: about 80 % of bodies, in the target 25 %."""
    everyday, target, source = (make(domain, hand=hand, count=1500)
                                for domain in ("everyday", "target", "source"))
    easy = [dataset.easy.float().mean() for dataset in (everyday, target, source)]
    assert abs(easy[0] - easy[2]) < 0.03 and easy[0] - easy[1] > 0.45
    assert hand or abs(easy[0] - 0.8) < 0.04 and abs(easy[1] - 0.25) < 0.04
    same = np.abs(everyday.joints - target.joints).max((1, 2)) == 0
    assert 0.03 < same.mean() < 0.6 and not np.isclose(everyday.joints, source.joints).all((1, 2)).any()
    i = int(np.flatnonzero(same)[0])
    assert (everyday.render(i) == target.render(i)).all()
    assert everyday.names([12]) == ["hand-" * hand + "everyday-train-000012"]
    for domain in ("everyday", "target", "source"):
        make(domain, hand=hand, count=2, size=8, cache=tmp_path)[[0]]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("domain", ["source", "target"])
def test_hands_are_left_and_fingers_bend_to_the_palm(domain):
    joints = make(domain, hand=True, count=300).joints
    wrist, index, little = (joints[:, k] for k in (0, 5, 17))
    palm = np.cross(little - wrist, index - wrist)                         # out of a left hand's palm
    assert ((joints[:, 2] - joints[:, 1]) * palm).sum(-1).mean() > 0       # thumbs oppose
    for m in (5, 9, 13, 17):
        for a, b, c in ((m, m + 1, m + 2), (m + 1, m + 2, m + 3)):
            bend = np.cross(joints[:, b] - joints[:, a], joints[:, c] - joints[:, b])
            assert ((bend * (index - little)).sum(-1) < 1e-6).all()


@pytest.mark.parametrize("hand", [False, True])
def test_keypoints_lie_on_the_drawn_figure(hand):
    dataset = make("source", hand=hand, size=256)
    for i in range(len(dataset)):
        x, y = dataset.keypoints[i].round().long().clamp(0, 255).T.numpy()
        image = dataset.render(i).astype(int)
        assert (np.abs(image[:, y, x] - image[:, y, 0]).max(0) > 8).mean() > 0.9       # not the background
        away = np.linalg.norm(dataset.keypoints[i].numpy()[:, None] - dataset.ends[i].reshape(-1, 2), axis=-1)
        assert (np.delete(away.min(1), [] if hand else [9]) < 0.1).all()   # pixels; the head's top is no end


@pytest.mark.parametrize("hand, role", [(False, "eye"), (False, "mark"), (True, "nail"), (True, "crease")])
def test_front_and_back_differ(hand, role):
    dataset = make("source", hand=hand, count=300)
    parts = [r == role for r in dataset.roles]
    shown = dataset.radii[:, parts, 0].max(1) > 0
    assert 0.35 < shown.mean() < 0.8 if hand else shown.mean() > 0.9       # a body's front is mostly seen
    before = dataset.render(i := int(np.flatnonzero(shown)[0]))
    dataset.radii[i, parts] = 0
    assert (before != dataset.render(i)).any()


def test_blur_leaves_no_dark_frame(monkeypatch):
    monkeypatch.setitem(data.WILD, "blur", 0.05)
    plain = data.Image.new("RGB", (64, 64), (200, 200, 200))
    image = data.photograph(np.random.default_rng(0), plain).astype(float)
    assert abs(image[[0, -1]].mean() / image[2:-2].mean() - 1) < 0.02


def test_cache_round_trip_and_damage(tmp_path):
    calls = []
    first = make("target", cache=tmp_path / "new", progress=lambda done, total: calls.append((done, total)))
    images = first[range(6)][0]
    path, = (tmp_path / "new").iterdir()
    assert calls == [(i, 6) for i in range(1, 7)]
    again = make("target", cache=tmp_path / "new", progress=lambda *_: pytest.fail("rendered again"))
    assert torch.equal(again[range(6)][0], images)
    for damage in (b"", path.read_bytes()[:1000], b"PK\x03\x04 something else"):
        path.write_bytes(damage)
        assert torch.equal(make("target", cache=tmp_path / "new")[range(6)][0], images)


def test_a_cache_that_cannot_be_written_loses_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("no directory")
    images = make(cache=tmp_path / "file" / "cache")[range(6)][0]
    assert torch.equal(images, make()[range(6)][0])
    said = capsys.readouterr().err
    assert "cache: cannot be written" in said and str(tmp_path) in said and said.count("\n") == 1


@pytest.mark.parametrize("options, words", [
    ({"domain": "moon"}, "domain"), ({"split": "all"}, "split"), ({"size": 0}, "size: 0"),
    ({"count": 0}, "count: 0"), ({"seed": -1}, "seed: -1")])
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
