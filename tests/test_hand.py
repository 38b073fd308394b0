"""The hand's 21 keypoints go the whole way: training with rotations of +-180 degrees, evaluation, pictures, prediction."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train


class Hands:
    """Hands of straight fingers in random poses, drawn as dots: the protocol of every dataset, 21 keypoints."""

    def __init__(self, count, size, seed):
        random = np.random.default_rng(seed)
        self.skeleton, self.size = data.HAND21, size
        turn, spread = random.uniform(-np.pi, np.pi, count), random.uniform(0.1, 0.4, count)
        bend = random.uniform(0.5, 1.0, (count, 5))
        self.keypoints = torch.zeros(count, 21, 2)
        for finger in range(5):
            angle = turn + spread * (finger - 2)
            for joint in range(4):
                length = size * (0.15 + 0.08 * joint * bend[:, finger])
                self.keypoints[:, 1 + 4 * finger + joint, 0] = torch.from_numpy(length * np.cos(angle))
                self.keypoints[:, 1 + 4 * finger + joint, 1] = torch.from_numpy(length * np.sin(angle))
        self.keypoints += size / 2
        self.visible = torch.ones(count, 21)
        self.visible[::7, 4] = 0                                     # some thumb tips are not labelled
        dots = data.draw_gaussians(self.keypoints, size, 1.0).amax(1)
        self.images = (255 * dots[:, None]).expand(-1, 3, -1, -1).to(torch.uint8).contiguous()

    def __len__(self):
        return len(self.keypoints)

    def names(self, indices):
        return [f"hand {i}" for i in indices]

    def __getitem__(self, indices):
        indices = torch.as_tensor(indices)
        return self.images[indices], self.keypoints[indices], self.visible[indices]


@pytest.fixture
def hands(monkeypatch):
    monkeypatch.setattr(train, "open_domains", lambda settings: train.Domains(
        Hands(60, settings.image_size, 0), Hands(30, settings.image_size, 1),
        Hands(20, settings.image_size, 2), Hands(30, settings.image_size, 3)))


TINY = ["--epochs", "2", "--pretrain-epochs", "1", "--iters-per-epoch", "3", "--batch-size", "6", "--style-iters", "2",
        "--vae-steps", "5", "--image-size", "32", "--bins", "10", "--rotation", "180", "--device", "cpu"]


def test_a_run_on_hands(hands, tmp_path):
    out = tmp_path / "r"
    assert train.main([*TINY, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert list(result["pck"]) == ["MCP", "PIP", "DIP", "fingertip", "all"] and len(result["bins"]) == 10
    assert list(result["teacher"]["pck"]) == list(result["pck"])
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"consistency", "evalpose", "cross_domain"} <= set(last)
    pictures = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"predictions", "domains", "style", "curriculum", "curves", "bins", "complexity"} <= pictures
    assert train.main(["evaluate", str(out), "--device", "cpu"]) == 0

    Image.fromarray(Hands(1, 32, 5).images[0].permute(1, 2, 0).numpy()).resize((90, 90)).save(tmp_path / "hand.png")
    options = ["--out", str(tmp_path / "p"), "--device", "cpu"]
    assert train.main(["predict", str(out), str(tmp_path / "hand.png"), *options]) == 0
    keypoints = json.loads((tmp_path / "p" / "hand.json").read_text())["keypoints"]
    assert [k["name"] for k in keypoints] == list(data.HAND21.names)


def test_every_step_of_adaptation_sees_all_21_keypoints(hands):
    """Occlusion can hide any keypoint, Eq. 5 has 20 limbs and Eq. 7 the triplets of five fingers and their spreads."""
    settings = train.make_settings("demo", image_size=32, batch_size=6, source_count=30, rotation=180.0, occlusion=1.0)
    trainer = train.Trainer(settings, data.HAND21, None, torch.device("cpu"))
    trainer.teacher = train.actupose.make_teacher(trainer.student)
    domains = train.open_domains(settings)
    index = torch.arange(6)
    terms, confidence = trainer.step(0, (index, *domains.source[index]), (index, *domains.target[index]))
    assert len(trainer.limbs) == 20 and len(trainer.triplets) == 14 and confidence.shape == (6,)
    assert all(torch.isfinite(value).all() for value in terms.values())


def test_bodies_and_hands_do_not_go_together(tmp_path, monkeypatch):
    """Said before a dataset is read where the classes tell, after that where only the datasets do; hands of one's own are
    rotated by 180 degrees as RHD's are."""
    with pytest.raises(train.UserError, match=r"--source surreal --target h3d: their keypoints differ \(r-ankle, ..., 16"):
        train.make_settings(source="surreal", source_root=str(tmp_path), target="h3d", target_root=str(tmp_path))

    class OwnHands(data.RenderedHandPose):
        """Found by its class."""

    class Silent(Hands):
        """Its class does not say what it holds."""
        def __init__(self, root, split, size):
            super().__init__(40, size, 0)

    monkeypatch.setitem(train.SOURCES, "own", OwnHands)
    monkeypatch.setitem(train.TARGETS, "silent", Silent)
    monkeypatch.setattr(train.Settings.__dataclass_fields__["source"], "metadata",
                        {**train.Settings.__dataclass_fields__["source"].metadata, "choices": None})
    monkeypatch.setattr(train.Settings.__dataclass_fields__["target"], "metadata",
                        {**train.Settings.__dataclass_fields__["target"].metadata, "choices": None})
    settings = train.make_settings(source="own", source_root="r", target="silent", target_root="r")
    assert settings.rotation == 180.0
    settings = train.make_settings(source="mannequin", source_count=40, target="silent", target_root="r")
    with pytest.raises(train.UserError, match="their keypoints differ"):
        train.open_domains(settings)


def test_a_dataset_of_ones_own_is_looked_at_before_training():
    """What a dataset must be, each thing wrong in turn: a DataError that names the dataset and says what is expected."""
    def own(**changes):
        hands = Hands(4, 32, 0)
        for name, value in changes.items():
            setattr(hands, name, value)
        return hands

    data.check_dataset(own(), "--source own")
    keypoints = own().keypoints
    lost = keypoints.clone()
    lost[2, 4] = torch.nan
    for changes, message in ((dict(skeleton=None), "needs a `skeleton`"), (dict(size=32.0), "needs `size`"),
                             (dict(keypoints=keypoints.numpy()), "needs `keypoints`, a float32 tensor of shape"),
                             (dict(keypoints=keypoints[:, :3]), r"needs `keypoints`, a float32 tensor of shape \(4, 21, 2\)"),
                             (dict(visible=torch.ones(4, 21, dtype=torch.bool)), "needs `visible`, a float32 tensor"),
                             (dict(keypoints=lost), "no number: thumb tip of hand 2"),
                             (dict(images=own().images / 255.0), "must give uint8 images"),
                             (dict(size=64), r"uint8 images \(B, 3, 64, 64\)")):
        with pytest.raises(data.DataError, match=f"--source own: Hands .*{message}"):
            data.check_dataset(own(**changes), "--source own")


def test_a_skeleton_that_cannot_be():
    """ValueError that names the field."""
    good = dict(names=("a", "b", "c"), limbs=((0, 1),), triplets=((0, 1, 2),), groups={"all": (0, 1, 2)}, root=(1,))
    data.Skeleton(**good)
    for field, value in (("names", ()), ("limbs", ()), ("limbs", ((0, 3),)), ("limbs", ((0, 1, 2),)), ("triplets", ()),
                         ("triplets", ((0, 1),)), ("groups", {"feet": (0,)}), ("groups", {"all": (0, -1)}), ("root", ()),
                         ("root", (1.0,))):
        with pytest.raises(ValueError, match=field):
            data.Skeleton(**{**good, field: value})
