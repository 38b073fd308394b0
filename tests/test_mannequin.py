"""The built-in benchmark (Mannequin): reproducible by seed and index, honest labels, the promised gaps."""
import numpy as np
import pytest
import torch

import data
from data import Mannequin, hash_uniform, sample_poses

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def splitmix(x):
    """The finaliser of splitmix64 on Python integers, from its publication (Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hash_uniform_matches_integers_of_unlimited_size():
    """torch's wrapping int64 arithmetic equals arithmetic modulo 2^64, for negative and huge counters too."""
    counters = [0, 1, 5, -3, (1 << 62) + 11]
    got = hash_uniform(7, torch.tensor(counters), 4, stream=3)
    key = splitmix((7 * 0xD1342543DE82EF95 + 3 * 0x2545F4914F6CDD1D) & MASK)
    for row, counter in zip(got.tolist(), counters):
        state = splitmix((splitmix((counter & MASK) ^ key) + GOLDEN) & MASK)
        want = [(splitmix((state + (j + 1) * GOLDEN) & MASK) >> 40) * 2.0 ** -24 for j in range(4)]
        assert row == want


def test_hash_uniform_is_uniform_and_streams_differ():
    """Moments of the uniform distribution, and no correlation between streams, seeds or neighbours."""
    index = torch.arange(20000)
    a = hash_uniform(0, index, 3)
    assert a.dtype == torch.float32 and a.min() >= 0 and a.max() < 1
    assert torch.allclose(a.mean(0), torch.full((3,), 0.5), atol=0.01)
    assert torch.allclose(a.var(0), torch.full((3,), 1 / 12), atol=0.003)
    columns = torch.stack((a[:, 0], a[:, 1], a[:, 0].roll(1), hash_uniform(1, index, 1)[:, 0],
                           hash_uniform(0, index, 1, stream=1)[:, 0]))
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 0.03


@pytest.mark.parametrize("domain", ["source", "target", "photo"])
@pytest.mark.parametrize("size", [33, 64])
def test_a_sample_is_a_function_of_seed_and_index(domain, size):
    """Bit-equal alone, in any batch and in a longer dataset; another seed gives another picture."""
    whole = Mannequin(domain, "train", size, count=30)
    images, keypoints, visible = whole[list(range(30))]
    assert images.shape == (30, 3, size, size) and images.dtype == torch.uint8
    assert keypoints.shape == (30, 16, 2) and keypoints.dtype == visible.dtype == torch.float32
    for i in (0, 5, 29):
        assert torch.equal(whole.render([i])[0], images[i])
    assert torch.equal(whole.render([7, 29, 3]), images[[7, 29, 3]])
    longer = Mannequin(domain, "train", size, count=40)
    assert torch.equal(longer.keypoints[:30], whole.keypoints)
    other = Mannequin(domain, "train", size, count=30, seed=1)
    assert (other.keypoints - whole.keypoints).abs().amax((1, 2)).min() > 0.5
    assert not torch.equal(other.render([5])[0], images[5])


def test_splits_and_domains_share_no_sample():
    """All splits draw from disjoint counters, and no pose occurs in two of them."""
    sets = [Mannequin(d, s, count=300) for d in ("source", "target") for s in ("train", "val", "test")]
    sets.append(Mannequin("photo", "train", count=300))
    counters = torch.cat([s.counters for s in sets])
    assert len(counters.unique()) == len(counters)
    poses = torch.cat([s.joints3d.flatten(1) for s in sets])
    assert torch.cdist(poses, poses).fill_diagonal_(1.0).min() > 1e-3


def test_default_counts_and_names():
    """6000 source, 2000 + 500 + 1000 target samples; names are unique."""
    assert [len(Mannequin(*k)) for k in (("source", "train"), ("target", "train"), ("target", "val"),
                                         ("target", "test"))] == [6000, 2000, 500, 1000]
    names = Mannequin("target", "val", count=20).names(torch.arange(20))
    assert len(set(names)) == 20 and all(isinstance(n, str) for n in names)


@pytest.mark.parametrize("domain", ["source", "target", "photo"])
def test_figures_keep_their_bones_and_fill_the_crop(domain):
    """Segments keep the figure's lengths in every pose; pelvis and thorax are midpoints; all is visible."""
    index = torch.arange(400)
    figures = sample_poses(0, index, domain)
    j = figures.joints
    bones = {"thigh": ((2, 1), (3, 4)), "shin": ((1, 0), (4, 5)), "upper_arm": ((12, 11), (13, 14)),
             "forearm": ((11, 10), (14, 15)), "hips": ((2, 3),), "shoulders": ((12, 13),), "spine": ((6, 7),),
             "neck": ((7, 8),), "head": ((8, 9),)}
    for name, pairs in bones.items():
        for a, b in pairs:
            torch.testing.assert_close((j[:, a] - j[:, b]).norm(dim=1), figures.lengths[name])
    torch.testing.assert_close(j[:, 6], (j[:, 2] + j[:, 3]) / 2, atol=1e-9, rtol=0)
    torch.testing.assert_close(j[:, 7], (j[:, 12] + j[:, 13]) / 2, atol=1e-9, rtol=0)
    # Knees and elbows bend one way only: the angle between the two segments stays within (35, 180] degrees.
    for a, b, c in ((2, 1, 0), (3, 4, 5), (12, 11, 10), (13, 14, 15)):
        p, q = j[:, a] - j[:, b], j[:, c] - j[:, b]
        angle = torch.rad2deg(torch.acos(((p * q).sum(1) / p.norm(dim=1) / q.norm(dim=1)).clamp(-1, 1)))
        assert angle.min() > 34.9
    view = Mannequin(domain, "train", 100, count=400)
    box = view.keypoints.amax(1) - view.keypoints.amin(1)
    least, most = (19, 82) if domain == "photo" else (55, 82)
    assert box.amax(1).min() > least and box.amax(1).max() < most
    assert view.visible.mean() > 0.99
    assert torch.equal(view.visible, ((view.keypoints >= 0) & (view.keypoints <= 99)).all(-1).float())


def test_keypoints_scale_with_the_image():
    """Pixel i of S covers [i, i + 1) / S of the picture: x + 1/2 is proportional to S."""
    small, large = (Mannequin("target", "test", s, count=20).keypoints for s in (32, 128))
    torch.testing.assert_close((small + 0.5) * 4, large + 0.5, atol=1e-4, rtol=0)


def test_source_is_long_tailed_and_target_is_not():
    """About four in five source figures are upright, and at most two in five target figures."""
    share = {}
    for domain in ("source", "target"):
        figures = Mannequin(domain, "train", count=2000)
        share[domain] = figures.upright.float().mean().item()
        y = figures.joints3d[..., 1]
        lower = torch.maximum(y[:, 0], y[:, 5])
        standing = (y[:, 9] > y[:, 6]) & (y[:, 6] > lower)
        assert standing[figures.upright].all()
        share[domain + " geometry"] = standing.float().mean().item()
    assert 0.76 < share["source"] < 0.84 and 0.2 < share["target"] < 0.4
    assert share["source geometry"] > share["target geometry"] + 0.1


def test_the_front_is_seen_and_tells_left_from_right():
    """The chest of an upright figure faces the camera, and its left is on the image's right."""
    figures = Mannequin("source", "train", count=500)
    j = figures.joints3d[figures.upright].double()
    across, up = j[:, 13] - j[:, 12], j[:, 7] - j[:, 6]
    front = torch.linalg.cross(across, up)  # left x up = front
    assert (front[:, 2] > 0).float().mean() > 0.95
    assert (figures.keypoints[figures.upright][:, 3, 0] > figures.keypoints[figures.upright][:, 2, 0]).all()


def test_photo_figures_are_seen_from_every_side_inside_a_letterbox():
    """Keypoints lie in the photograph; the margins beside it, of the aspects' size, are black, it is not; chests face
    both ways, heads point in every direction, and sizes spread as PHOTO says."""
    figures = Mannequin("photo", "train", 120, count=600)
    frame = data._photo_frame(0, figures.counters)
    assert {round(w / h, 2) for w, h in frame.tolist()} == set(data.PHOTO["aspects"]) and (frame.amax(1) == 1).all()
    margin = (1 - frame[:, None]) / 2 * 120 - 0.5
    assert (figures.keypoints >= margin).all() and (figures.keypoints <= 119 - margin).all()
    assert (figures.visible == 1).all()

    images = figures.render(torch.arange(60))
    for image, (width, height) in zip(images.amax(1), frame.tolist()):
        x, y = round(60 - 60 * width), round(60 - 60 * height)
        assert not image[:y].any() and not image[120 - y:].any() and not image[:, :x].any() and not image[:, 120 - x:].any()
        inside = image[y:120 - y, x:120 - x]
        assert inside.float().std() > 3 and (inside[:2] > 0).any() and (inside[:, :2] > 0).any()

    j = figures.joints3d.double()
    front = torch.linalg.cross(j[:, 13] - j[:, 12], j[:, 7] - j[:, 6])[:, 2] > 0
    assert 0.4 < front.float().mean() < 0.6
    up = figures.keypoints[:, 8] - figures.keypoints[:, 6]
    direction = torch.rad2deg(torch.atan2(up[:, 0], -up[:, 1]))
    share = torch.histc(direction, 8, -180, 180) / len(direction)
    assert share.min() > 0.03 and (direction.abs() < 45).float().mean() > 0.4
    extent = (figures.keypoints.amax(1) - figures.keypoints.amin(1)).amax(1) / 120
    assert 0.3 < extent.median() < 0.5 and (extent < 0.25).float().mean() > 0.08 and (extent > 0.6).float().mean() > 0.1


def test_photo_company_stands_behind_and_is_not_labelled(monkeypatch):
    """On black ground, with company in every picture, there is more to see than without, and the labelled figure is
    drawn where and as it was: the company is behind it."""
    monkeypatch.setattr(data, "_photo_backgrounds", lambda seed, index, size: torch.zeros(len(index), 3, size, size))
    monkeypatch.setattr(data, "_photograph", lambda seed, index, images: images)
    monkeypatch.setitem(data.PHOTO, "bar", 0.0)
    pictures = {}
    for company in ((0.0, 0.0), (1.0, 1.0)):
        monkeypatch.setitem(data.PHOTO, "company", company)
        pictures[company] = Mannequin("photo", "train", 96, count=30).render(torch.arange(30))
    alone, together = pictures.values()
    lit = (alone.amax(1) > 0)
    assert (together.amax(1) > 0).sum() > 1.15 * lit.sum()
    same = (alone == together).all(1)
    figures = Mannequin("photo", "train", 96, count=30)
    at = figures.keypoints.round().long()
    assert same[torch.arange(30)[:, None], at[..., 1], at[..., 0]].float().mean() > 0.97
    assert same[lit].float().mean() > 0.85                    # but for soft edges, which mix with what is behind


def test_limbs_are_drawn_where_the_keypoints_are(monkeypatch):
    """With the figure on black ground, pixels at all joints and at mid-limb are lit, the corners are not."""
    monkeypatch.setattr(data, "_backgrounds", lambda seed, index, domain, size: torch.zeros(
        len(index), 3, size, size))
    figures = Mannequin("source", "train", 96, count=40)
    images, keypoints, _ = figures[torch.arange(40)]
    lit = images.amax(1) > 0
    limbs = [(0, 1), (1, 2), (3, 4), (4, 5), (10, 11), (11, 12), (13, 14), (14, 15), (6, 7), (8, 9)]
    points = torch.cat([keypoints] + [(keypoints[:, [a]] + keypoints[:, [b]]) / 2 for a, b in limbs], 1)
    at = points.round().long()
    hit = lit[torch.arange(40)[:, None], at[..., 1], at[..., 0]]
    hit[:, 9] = True  # the head top lies on the outline itself
    assert hit.float().mean() > 0.995
    assert not lit[:, 0, 0].any() and 0.03 < lit.float().mean() < 0.4


@pytest.mark.parametrize("size", [16, 50])
def test_target_is_busier_than_source(size):
    """Neighbouring pixels differ several times as much in the target, at any resolution."""
    change = {}
    for domain in ("source", "target"):
        images = Mannequin(domain, "train", size, count=30).render(torch.arange(30)).float()
        change[domain] = (images[..., 1:] - images[..., :-1]).abs().mean().item()
    assert change["target"] > 1.5 * change["source"]


def test_cache_is_used_and_survives_damage(tmp_path):
    """A second dataset reads the file; a truncated, foreign or missing one is rendered again and replaced."""
    def make(**more):
        return Mannequin("source", "train", 24, count=8, cache=tmp_path / "cache", **more)
    seen = []
    first = make(progress=lambda done, total: seen.append((done, total)))
    images = first[list(range(8))][0]
    path = first.cache_file()
    assert seen[-1] == (8, 8) and [p.name for p in path.parent.iterdir()] == [path.name]
    marked = images.numpy().copy()
    marked[0] = 7
    np.save(path, marked)
    assert (make()[[0]][0] == 7).all()  # read, not rendered
    whole = path.read_bytes()
    np.save(path, np.zeros((3, 3), np.uint8))
    foreign = path.read_bytes()
    for damaged in (whole[:200], whole[:-10], b"", b"not an array", foreign, None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert torch.equal(make()[list(range(8))][0], images)
        assert np.array_equal(np.load(path, allow_pickle=False), images.numpy())
    assert make(seed=1).cache_file() != path


def test_bad_arguments_are_named():
    """ValueError says what was given and what is allowed."""
    with pytest.raises(ValueError, match="'wild' with split 'test'"):
        Mannequin("wild", "test")
    with pytest.raises(ValueError, match="size 0"):
        Mannequin("source", "train", size=0)
    with pytest.raises(ValueError, match="count 0"):
        Mannequin("source", "train", count=0)
