"""The loaders of the paper's datasets, on miniature trees in the exact prepared layouts.

A dot drawn at each keypoint is found where the loader says it is, after cropping and after augmentation; and
splits, keypoint maps, visibility, handedness; the errors of trees that are not as they should be.
"""

import json
import pickle
import random
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BODY16, HAND21, SURREAL, Hand3DStudio, Human36M, RenderedHandPose
from miniatures import (RHD_PICTURES, SURREAL_JOINTS, compressed, dots, grid_points, make_h3d, make_human36m, make_rhd,
                        make_surreal, make_tree, numeric, variable, write_mat)


def centroids(images, keypoints, reach):
    """Centre of light within `reach` pixels of each keypoint: (B, K, 2); NaN where there is no light."""
    size = images.shape[-1]
    light = images.float().mean(1)
    light = light * (light > 40)                                   # JPEG ringing is no dot
    line = torch.arange(size)
    near = ((line - keypoints[..., None]).abs() < reach).float()   # (B, K, 2, size)
    weight = torch.einsum("bkx,bky,byx->bkyx", near[:, :, 0], near[:, :, 1], light)
    total = weight.sum((2, 3))
    return torch.stack([(weight.sum(2) * line).sum(-1) / total, (weight.sum(3) * line).sum(-1) / total], -1)


def check_dots(ds, counted=None):
    """The dots lie at the keypoints of the crops, and of augmented views of them."""
    images, keypoints, visible = ds[range(len(ds))]
    n, size = len(ds), ds.size
    assert images.dtype == torch.uint8 and images.shape == (n, 3, size, size)
    assert keypoints.dtype == visible.dtype == torch.float32
    assert keypoints.shape == (n, len(ds.skeleton), 2) and visible.shape == keypoints.shape[:2]
    assert torch.equal(keypoints, ds.keypoints) and torch.equal(visible, ds.visible)
    counted = visible > 0 if counted is None else counted
    reach = size / 14
    error = (centroids(images, keypoints, reach) - keypoints).abs().amax(-1)
    assert error[counted].max() < 0.6, error
    views = data.random_affine_view(data.hash_uniform(0, torch.arange(n), 5), size, 60, 20, 0.05, (0.8, 1.2))
    seen = data.denormalise(data.warp(data.normalise(images), views)).float()
    grey = data.denormalise(torch.zeros(1, 3, 1, 1)).float()       # what lies outside of the crop
    seen = torch.where((seen - grey).abs() < 2, torch.zeros(()), seen)
    moved = data.map_keypoints(keypoints, views)
    # Neither the view's edge nor the crop's, a line between black and grey, may come into reach of a dot.
    inside = counted.clone()
    for places in (moved, keypoints):
        inside &= ((places > 1.4 * reach) & (places < size - 1 - 1.4 * reach)).all(-1)
    error = (centroids(seen, moved, 0.7 * reach) - moved).abs().amax(-1)
    assert inside.sum() > counted.sum() / 3
    assert error[inside].max() < 1


def shuffled(n):
    """The published shuffle, on a list, with the module's own generator."""
    order = list(range(n))
    random.seed(42)
    random.shuffle(order)
    return order


# --- SURREAL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("sizes, suffix", [(False, "jpg"), (True, "png")])
def test_surreal_dots(tmp_path, size, sizes, suffix):
    names, places = make_surreal(tmp_path, sizes=sizes, suffix=suffix)
    for shoulders in ("published", "true"):
        ds = SURREAL(tmp_path, "train", size, shoulders)
        assert ds.skeleton is BODY16 and (ds.visible == 1).all()
        check_dots(ds)
        points, side = places[names.index(ds.names([0])[0])]
        collars_or_shoulders = [13, 14] if shoulders == "published" else [16, 17]
        joints = SURREAL_JOINTS[:12] + collars_or_shoulders + SURREAL_JOINTS[14:]
        expected = (points[joints] + 0.5) * size / side - 0.5   # pixel centres, before and after resizing
        np.testing.assert_allclose(ds.keypoints[0], expected, atol=1e-4)


def test_surreal_split(tmp_path):
    """All runs together, shuffled with seed 42, a fifth held out; validation is its own folder."""
    names, _ = make_surreal(tmp_path)
    order = shuffled(15)
    assert SURREAL(tmp_path, "test", 8).names(range(3)) == [names[i] for i in order[:3]]
    assert SURREAL(tmp_path, "train", 8).names(range(12)) == [names[i] for i in order[3:]]
    with pytest.raises(FileNotFoundError, match="val/run0.json: missing; the directory to give holds"):
        SURREAL(tmp_path, "val", 8)
    other, _ = make_surreal(tmp_path, "val", (1, 2, 1))
    assert sorted(SURREAL(tmp_path, "val", 8).names(range(4))) == sorted(other)


def test_shuffle_is_pythons():
    """The compact shuffle of indices permutes as `random.shuffle` permutes the published list."""
    assert data._shuffled(1000).tolist() == shuffled(1000)


def test_index_is_kept_beside_a_large_file(tmp_path, monkeypatch):
    """The arrays of a large annotation file are read back until it changes; a damaged copy is made anew."""
    make_surreal(tmp_path)
    plain = SURREAL(tmp_path, "train", 64)
    assert not list(tmp_path.glob("**/*.npz"))
    monkeypatch.setattr(data, "INDEX_CACHE_BYTES", 0)
    SURREAL(tmp_path, "train", 64)
    SURREAL(tmp_path, "train", 64, "true")
    copies = sorted((tmp_path / "train").glob("*.npz"))
    assert len(copies) == 6                                         # three runs, two choices of shoulders
    monkeypatch.setattr(data, "_read_annotations", None)            # it may not be read again
    again = SURREAL(tmp_path, "train", 64)
    assert torch.equal(again.keypoints, plain.keypoints) and again.names(range(12)) == plain.names(range(12))
    monkeypatch.undo()
    monkeypatch.setattr(data, "INDEX_CACHE_BYTES", 0)
    for copy in copies:
        copy.write_bytes(copy.read_bytes()[:100])
    assert torch.equal(SURREAL(tmp_path, "train", 64).keypoints, plain.keypoints)
    file = tmp_path / "train" / "run0.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:2]))
    assert len(SURREAL(tmp_path, "train", 64)) == 13 - 2


def test_loader_workers(tmp_path, monkeypatch):
    """Batches of a DataLoader's workers, crops kept or not; what one has decoded serves the others."""
    make_surreal(tmp_path)
    ds = SURREAL(tmp_path, "train", 32)
    batches = [[0, 1, 2], [3, 4, 5], [2, 1, 11]]
    loader = torch.utils.data.DataLoader(ds, sampler=batches, batch_size=None, num_workers=2,
                                         multiprocessing_context="fork")
    images = [batch[0] for batch in loader]
    assert ds._decoded.sum() == 7
    monkeypatch.setattr(data, "MAX_CROPS_BYTES", 0)
    anew = SURREAL(tmp_path, "train", 32)
    assert all(torch.equal(anew[batch][0], kept) for batch, kept in zip(batches, images))


def test_index_has_no_object_per_sample(tmp_path):
    """Everything that grows with the samples is an array, so that forked workers share its pages."""
    make_surreal(tmp_path)
    for value in vars(SURREAL(tmp_path, "train", 32)).values():
        if isinstance(value, np.ndarray):
            assert value.dtype != object
        else:
            assert not isinstance(value, (list, dict, tuple))


# --- Human3.6M ----------------------------------------------------------------------------------------


def test_human36m(tmp_path):
    names = make_human36m(tmp_path, {1: 2, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 11: 3})
    for size in (100, 256):
        ds = Human36M(tmp_path, "train", size)
        assert ds.skeleton is BODY16
        assert ds.names(range(7)) == [name for subject in (1, 5, 6, 7, 8) for name in names[subject]]
        check_dots(ds)
    test = Human36M(tmp_path, "test", 16)
    random.seed(42)
    drawn = random.choices(names[9] + names[11], k=3200)
    assert test.names(range(3200)) == drawn
    shift = names[9].index(drawn[0]) + 9 if drawn[0] in names[9] else names[11].index(drawn[0]) + 11
    np.testing.assert_allclose(test.keypoints[0], (grid_points(16, 512, shift) + 0.5) / 32 - 0.5)
    val = Human36M(tmp_path, "val", 16)
    assert sorted(val.names(range(len(val)))) == sorted(ds.names(range(7)))


# --- Hand-3D-Studio -----------------------------------------------------------------------------------


def test_hand_3d_studio(tmp_path):
    free = [sample["name"] for sample in make_h3d(tmp_path, 30) if sample["without_object"] == 1]
    order = [free[i] for i in shuffled(20)]
    for root in (tmp_path, tmp_path / "H3D_crop"):
        ds = Hand3DStudio(root, "train", 160)
        assert ds.names(range(16)) == order[4:] and ds.skeleton is HAND21
    check_dots(ds)
    assert Hand3DStudio(tmp_path, "test", 8).names(range(4)) == order[:4]
    assert Hand3DStudio(tmp_path, "val", 8).names(range(4)) == order[4:8]


# --- RHD ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 256])
def test_rhd(tmp_path, size):
    make_rhd(tmp_path, "training", range(len(RHD_PICTURES)))
    for root in (tmp_path, tmp_path / "RHD_published_v2"):
        ds = RenderedHandPose(root, "train", size)
    kept = [f"training/color/{i:05d}.png {'left' if side == 'L' else 'right'}"
            for i, picture in enumerate(RHD_PICTURES) for side in picture[4]]
    assert ds.names(range(len(ds))) == kept and ds.skeleton is HAND21
    assert ds.left.tolist() == [name.endswith("left") for name in kept]
    counts = [RHD_PICTURES[i][2 if side == "left" else 3] for i, side in
              ((int(name.split("/")[2][:5]), name.split()[1]) for name in kept)]
    assert ds.visible.sum(1).tolist() == counts
    check_dots(ds, counted=torch.ones(len(ds), 21, dtype=torch.bool))


def test_rhd_boxes_by_hand(tmp_path):
    """Picture 0: left hand 30 ... 110 by 40 ... 120, side 120, corner 70 - 60 = 10, 80 - 60 = 20. Its right
    hand 200 ... 290 by 180 ... 260, side 135, corner round(177.5) = 178 (to even), round(152.5) = 152."""
    make_rhd(tmp_path, "training", [0, 0, 1, 0, 0, 0])
    make_rhd(tmp_path, "evaluation", [1, 2])
    ds = RenderedHandPose(tmp_path, "train", 240)
    left, right, *_ = RHD_PICTURES[0]
    np.testing.assert_allclose(ds.keypoints[0], (left - [10, 20] + 0.5) * 2 - 0.5, atol=1e-4)
    placed = (right - [178, 152] + 0.5) * 240 / 135 - 0.5
    np.testing.assert_allclose(ds.keypoints[1], np.stack([239 - placed[:, 0], placed[:, 1]], 1), atol=1e-4)
    assert len(ds) == 11
    assert RenderedHandPose(tmp_path, "val", 8).names(range(3)) == ds.names([0, 5, 10])   # every fifth
    assert RenderedHandPose(tmp_path, "test", 8).names(range(2)) == [
        "evaluation/color/00000.png left", "evaluation/color/00001.png right"]


# --- pickles ------------------------------------------------------------------------------------------


def python2_array(values):
    """A float64 array as Python 2 pickled it (protocol 2): its bytes are a string, shorter than 256."""
    shape = b"".join(b"K" + bytes([n]) for n in values.shape)
    payload = values.astype("<f8").tobytes()
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR"
            b"(K\1(" + shape + b"tcnumpy\ndtype\n(U\2f8K\0K\1tR"
            b"(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
            b"\x89U" + bytes([len(payload)]) + payload + b"tb")


@pytest.mark.parametrize("protocol", range(6))
def test_array_pickles(tmp_path, protocol):
    """Arrays of every number type, order and layout, and scalars, in all protocols and under both names of
    NumPy's core."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 99, (3, 4)).astype(kind)
              for kind in ("f4", "f8", "i2", "i8", "u1", ">f8", ">i4", "?")]
    arrays += [np.asfortranarray(arrays[0]), np.zeros((0, 3)), np.array(2.5), arrays[1][::2]]
    content = {"arrays": arrays, "plain": (1, -2.5, "text", b"bytes", None, True, [10 ** 30]),
               7: np.float32(1.5), np.int64(3): np.bool_(1)}
    written = pickle.dumps(content, protocol=protocol)
    # The name's length stands before it from protocol 4 on: this renaming is for the older ones.
    spellings = {written} | ({written.replace(b"numpy._core", b"numpy.core")} if protocol < 4 else set())
    for text in spellings:
        (tmp_path / "a.pickle").write_bytes(text)
        read = data.read_array_pickle(tmp_path / "a.pickle")
        assert read["plain"] == content["plain"] and read[7] == 1.5 and read[3]
        for got, array in zip(read["arrays"], content["arrays"], strict=True):
            assert got.dtype == array.dtype and got.shape == array.shape
            np.testing.assert_array_equal(got, array)


def test_python2_pickle(tmp_path):
    values = np.array([[1.5, -2.25, 1e300], [0.1, 7.0, -1e-9]])
    (tmp_path / "a.pickle").write_bytes(b"\x80\2}K\5}U\6uv_vis" + python2_array(values) + b"ss.")
    read = data.read_array_pickle(tmp_path / "a.pickle")
    assert list(read) == [5] and list(read[5]) == ["uv_vis"]
    np.testing.assert_array_equal(read[5]["uv_vis"], values)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("payload, message", [
    (pickle.dumps(Call(print, "x")), "asks for builtins.print"),
    (b"cos\nsystem\n(S'touch owned'\ntR.", "asks for os.system"),
    (pickle.dumps(Call(np.load, "x"), 2), "asks for numpy"),
    (pickle.dumps(Call(pickle.loads, b"")), "asks for _pickle.loads"),
    (pickle.dumps(BODY16), "asks for data.Skeleton"),
    (pickle.dumps(np.array([None, 1])), "an array of type 'O8'"),
    (pickle.dumps(np.array(["text"])), "an array of type 'U4'"),
    (pickle.dumps(np.zeros(2, [("a", "f4")])), "an array of type 'V4'"),
    (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "text encoded as 'rot13'"),
    (b"Pelsewhere\n.", "refers to objects outside"),
    (b"\x80\2\x82\7.", "not a readable pickle"),
    (pickle.dumps({0: np.zeros((42, 3))})[:-9], "not a readable pickle"),
    (pickle.dumps(np.zeros((2, 3)), 2).replace(b"K\2K\3\x86", b"J\xff\xff\xff\x7fK\3\x86"),
     "not a readable pickle.*reshape"),
    (b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.", "numbers alone are read"),
    (b"", "not a readable pickle"), (b"PK\3\4", "not a readable pickle|refers"),
    (pickle.dumps([1, 2]), "no dict of pictures"), (pickle.dumps({}), "no dict of pictures"),
    (pickle.dumps({"a": {}}), "the id 'a'"), (pickle.dumps({-1: {}}), "the id -1|the id '-1'"),
    (pickle.dumps({3: {"xyz": np.zeros((42, 3))}}), "picture 3 has no 'uv_vis'"),
    (pickle.dumps({3: 4}), "picture 3 has no 'uv_vis'"),
    (pickle.dumps({3: {"uv_vis": np.zeros((21, 3))}}), r"picture 3 has shape \(21, 3\), expected \(42, 3\)"),
    (pickle.dumps({3: {"uv_vis": np.full((42, 3), np.nan)}}), "uv_vis of picture 3 has a keypoint"),
])
def test_bad_pickles(tmp_path, monkeypatch, payload, message):
    """Whatever is no array or number is refused by name and not run; a clear error for damage."""
    monkeypatch.chdir(tmp_path)
    make_rhd(tmp_path, "training", [0])
    file = tmp_path / "RHD_published_v2" / "training" / "anno_training.pickle"
    file.write_bytes(payload)
    with pytest.raises(data.DataError, match=f"anno_training.pickle: .*({message})"):
        RenderedHandPose(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_corrupted_pickles(tmp_path):
    """400 seeded corruptions of an annotation file: DataError with the path, or a read."""
    make_rhd(tmp_path, "training", [0, 1, 2])
    file = tmp_path / "RHD_published_v2" / "training" / "anno_training.pickle"
    whole, rng, refused = file.read_bytes(), random.Random(0), 0
    for trial in range(400):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            # Most bytes are values: half of the hits go to the names and sizes at the beginning.
            broken[rng.randrange(len(broken) if trial % 2 else 400)] ^= 1 << rng.randrange(8)
        file.write_bytes(broken[:rng.randrange(len(broken))] if trial % 8 == 0 else broken)
        try:
            RenderedHandPose(tmp_path, size=8)
        except data.DataError as error:
            assert "anno_training.pickle" in str(error)
            refused += 1
    assert 100 < refused < 400


# --- preparation --------------------------------------------------------------------------------------

STUB = """#!{python}
import os, sys
video = sys.argv[sys.argv.index("-i") + 1]
with open(video, "rb") as file:
    frames = file.read()
with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as log:
    log.write(os.path.basename(video) + "\\n")
if frames.startswith(b"broken"):
    sys.exit(video + ": moov atom not found")
sys.stdout.buffer.write(frames)
"""
FOCAL, CENTRE = 600, np.array([160, 120])
# World axes to the camera's, from the release's description: the camera looks along -x, z points to its left.
TO_CAMERA = np.array([[0.0, 0, -1], [0, 1, 0], [-1, 0, 0]])


@pytest.fixture
def stub_ffmpeg(tmp_path, monkeypatch):
    """An `ffmpeg` that writes out what a test has put into the video file; returns its log of calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").write_text(STUB.format(python=sys.executable))
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "calls"


def surreal_pose(t, shift):
    """Joints before SURREAL's camera (24, 3), metres, and in the frame (24, 2) pixels."""
    grid = (grid_points(24, 1000, t + shift) / 1000 - 0.5) * [1.2, 1.2 + 0.2 * t]
    joints = np.concatenate([grid + [0.3 * (shift % 3 - 1), 0.1], 6 + 0.1 * np.arange(24)[:, None] % 0.7], 1)
    return joints, joints[:, :2] * FOCAL / joints[:, 2:] + CENTRE


def make_clip(folder, name, frames, shift=0):
    """A clip of the original release: raw frames in place of a video, and its info.mat."""
    folder.mkdir(parents=True, exist_ok=True)
    poses = [surreal_pose(t, shift) for t in range(frames)]
    pictures = [np.array(dots(320, 240, places, 2)) for _, places in poses]
    (folder / f"{name}.mp4").write_bytes(np.stack(pictures).tobytes())
    camera = np.array([7.0, -0.5, 0.2])
    world = np.stack([joints @ TO_CAMERA + camera for joints, _ in poses], -1).transpose(1, 0, 2).astype("f4")
    places = np.stack([places for _, places in poses], -1).transpose(1, 0, 2).astype("f4")
    if frames == 1:
        places, world = places[..., 0], world[..., 0]
    write_mat(folder / f"{name}_info.mat", variable("sequence", (1, 3), b"abc", 4, 16),
              compressed(numeric("joints2D", places, "f4")), compressed(numeric("joints3D", world, "f4")))
    return poses


def prepare(capsys, *arguments):
    status = data.main(["prepare", *map(str, arguments), "--jobs", "2"])
    return status, *capsys.readouterr()


def test_prepare_surreal(tmp_path, stub_ffmpeg, capsys):
    """From videos to a layout that the loader reads: dots at the keypoints, the camera."""
    poses = {}
    for split, run, clip, frames in (("train", 0, "01_01_c0001", 3), ("train", 0, "01_01_c0002", 1),
                                     ("train", 1, "02_01_c0001", 2), ("train", 2, "03_01_c0001", 2),
                                     ("val", 0, "04_01_c0001", 2)):
        poses[clip] = make_clip(tmp_path / "raw" / "cmu" / split / f"run{run}" / clip[:5], clip, frames, run)
    status, printed, errors = prepare(capsys, "surreal", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and errors == ""
    assert "run0.json: 4 frames of 2 clips (2 of them new), 0 clips failed" in printed
    entries = json.loads((tmp_path / "out" / "train" / "run0.json").read_text())
    assert [sample["name"] for sample in entries] == [
        "01_01/01_01_c0001_f000.jpg", "01_01/01_01_c0001_f001.jpg", "01_01/01_01_c0001_f002.jpg",
        "01_01/01_01_c0002_f000.jpg"]
    assert not list((tmp_path / "out").glob("**/*.parts")) and not list((tmp_path / "out").glob("**/*.tmp"))
    for split, run in (("train", 0), ("train", 1), ("train", 2), ("val", 0)):
        for sample in json.loads((tmp_path / "out" / split / f"run{run}.json").read_text()):
            clip, t = sample["name"].split("/")[1].removesuffix(".jpg").split("_f")
            joints, places = poses[clip][int(t)]
            places2d, places3d, camera = (np.array(sample[key]) for key in
                                          ("keypoint2d", "keypoint3d", "intrinsic_matrix"))
            np.testing.assert_allclose(places3d, joints, atol=2e-3)   # found from the 2-D joints alone
            corner = places - places2d
            assert np.ptp(corner, 0).max() < 0.01 and (corner[0] == corner[0].round()).any()
            side = np.ptp(places, 0).max()
            assert sample["size"] == min(round(1.5 * side), 240)
            projected = places3d @ camera.T
            np.testing.assert_allclose(projected[:, :2] / projected[:, 2:], places2d, atol=0.1)
    for size in (128, 256):
        check_dots(SURREAL(tmp_path / "out", "train", size))

    calls = stub_ffmpeg.read_text().split()
    assert sorted(calls) == sorted(f"{clip}.mp4" for clip in poses)
    status, printed, _ = prepare(capsys, "surreal", tmp_path / "raw" / "cmu", tmp_path / "out")
    assert status == 0 and printed.count("there already") == 4 and stub_ffmpeg.read_text().split() == calls


def test_prepare_surreal_goes_on(tmp_path, stub_ffmpeg, capsys):
    """A clip that fails is named and left out; the next start does that one alone. Frames that show nobody or
    a person of a few pixels are left out."""
    folder = tmp_path / "raw" / "cmu" / "train" / "run0" / "01"
    for clip in ("a", "b", "c", "d"):
        make_clip(folder, clip, 2)
    (folder / "b.mp4").write_bytes(b"broken")
    (folder / "c_info.mat").unlink()
    write_mat(folder / "d_info.mat", numeric("joints2D", np.zeros((2, 24, 3), "f4"), "f4"),
              numeric("joints3D", np.zeros((3, 24, 3), "f4"), "f4"))
    status, printed, errors = prepare(capsys, "surreal", tmp_path / "raw", tmp_path / "out")
    assert status == 1 and "2 frames of 1 clips (1 of them new), 3 clips failed" in printed
    assert re.search("failed: .*b.mp4: ffmpeg cannot decode it .*moov atom not found", errors)
    assert re.search("failed: .*c_info.mat", errors)
    assert re.search("d.mp4: 2 frames of 320 x 240 pixels, d_info.mat has 3", errors)
    make_clip(folder, "b", 2)
    make_clip(folder, "c", 1)
    outside, tiny = np.full((24, 2), -50.0), np.linspace((100, 100), (109, 109), 24)
    poses = np.stack([outside, tiny, surreal_pose(0, 0)[1]])
    write_mat(folder / "d_info.mat", numeric("joints2D", poses.transpose(2, 1, 0).astype("f4"), "f4"),
              numeric("joints3D", np.zeros((3, 24, 3), "f4"), "f4"))
    (folder / "d.mp4").write_bytes(bytes(3 * 240 * 320 * 3))
    stub_ffmpeg.unlink()
    status, printed, errors = prepare(capsys, "surreal", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and errors == "" and "6 frames of 4 clips (3 of them new), 0 clips failed" in printed
    assert sorted(stub_ffmpeg.read_text().split()) == ["b.mp4", "c.mp4", "d.mp4"]
    names = [sample["name"] for sample in json.loads((tmp_path / "out" / "train" / "run0.json").read_text())]
    assert names == ["01/a_f000.jpg", "01/a_f001.jpg", "01/b_f000.jpg", "01/b_f001.jpg", "01/c_f000.jpg",
                     "01/d_f002.jpg"]


@pytest.mark.parametrize("places, joints, message", [
    (np.zeros((3, 24, 2)), np.zeros((3, 24, 2)), r"joints2D has shape \(3, 24, 2\), expected \(2, 24, T\)"),
    (np.zeros((2, 24, 2)), np.zeros((3, 24)), "2 frames of joints2D, 1 of joints3D"),
    (np.full((2, 24, 2), np.nan), np.zeros((3, 24, 2)), "joints2D holds values that are no place"),
])
def test_bad_surreal_info(tmp_path, stub_ffmpeg, capsys, places, joints, message):
    folder = tmp_path / "raw" / "cmu" / "train" / "run0" / "01"
    make_clip(folder, "a", 2)
    write_mat(folder / "a_info.mat", numeric("joints2D", places), numeric("joints3D", joints))
    status, _, errors = prepare(capsys, "surreal", tmp_path / "raw", tmp_path / "out")
    assert status == 1 and re.search(f"a_info.mat: {message}", errors)


def test_prepare_without(tmp_path, monkeypatch, capsys):
    """Without ffmpeg, how to install it; without a release, what was expected."""
    make_clip(tmp_path / "raw" / "cmu" / "train" / "run0" / "01", "a", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, errors = prepare(capsys, "surreal", tmp_path / "raw", tmp_path / "out")
    assert status == 2 and "ffmpeg: no such program" in errors and "apt-get install ffmpeg" in errors
    status, _, errors = prepare(capsys, "surreal", tmp_path, tmp_path / "out")
    assert status == 2 and "no SURREAL release; expected cmu/" in errors
    status, _, errors = prepare(capsys, "human36m", tmp_path / "raw", tmp_path / "out")
    assert status == 2 and "Human36M_subject1_data.json: missing; the directory to give holds" in errors


# Human3.6M joint of each of the 16 keypoints; the eighth is the middle of the shoulders, keypoints 12 and 13.
HUMAN36M_JOINTS = [3, 2, 1, 4, 5, 6, 0, 11, 8, 10, 16, 15, 14, 11, 12, 13]


def make_human36m_release(root, subject, frames):
    """The JSON release of one subject with two cameras -> names of every fifth image, places of all."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    cameras, images, joints_3d, places = {}, [], {}, {}
    for cam, angle in ((1, 0.3), (2, -2.9)):
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = np.array([[cos, -sin, 0], [0, 0, -1], [sin, cos, 0]])  # world z is up, the camera's y down
        numbers = rotation, (100.0 * cam, 900, 5000), (1145.0, 1143.0), (512.5, 515.4)
        cameras[cam] = tuple(map(np.array, numbers))
    for frame in range(frames):
        grid = (grid_points(17, 1000, 0) - 500) * [1.2, 1.5 + 0.1 * frame]
        grid[[14, 15, 11, 6]] = grid[[15, 14, 6, 11]]          # none in the middle of the shoulders
        world = np.stack([grid[:, 0], 40.0 * (np.arange(17) % 5), grid[:, 1] + 900], 1)
        joints_3d.setdefault("2", {}).setdefault("1", {})[str(frame)] = world.tolist()
        for cam, (rotation, t, f, c) in cameras.items():
            name = f"s_{subject:02d}_act_02_subact_01_ca_{cam:02d}/f_{frame:06d}.jpg"
            seen = world[HUMAN36M_JOINTS]
            seen[7] = (seen[12] + seen[13]) / 2
            seen = seen @ rotation.T + t
            places[name] = seen[:, :2] / seen[:, 2:] * f + c
            images.append({"file_name": name, "action_idx": 2, "subaction_idx": 1, "frame_idx": frame,
                           "cam_idx": cam})
            if (len(images) - 1) % 5 == 0:
                file = root / "images" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                dots(1000, 1002, places[name], 4).save(file, quality=95, subsampling=0)
    for kind, content in (("data", {"images": images, "annotations": []}), ("joint_3d", joints_3d),
                          ("camera", {str(cam): {key: value.tolist() for key, value in zip("Rtfc", camera)}
                                      for cam, camera in cameras.items()})):
        (root / "annotations" / f"Human36M_subject{subject}_{kind}.json").write_text(json.dumps(content))
    return [image["file_name"] for image in images][::5], places


def test_prepare_human36m(tmp_path, capsys):
    """Every fifth image: world to camera to picture to crop; dots at the loader's keypoints; going on."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    kept = {}
    for subject in (1, 5, 6, 7, 8):
        kept[subject], places = make_human36m_release(raw, subject, 4)
    status, printed, errors = prepare(capsys, "human36m", raw, out)
    assert status == 0 and errors == "" and printed.count("2 images, 0 failed") == 5
    entries = json.loads((out / "annotations" / "keypoints2d_8.json").read_text())
    assert [sample["name"] for sample in entries] == kept[8]
    for sample in entries:
        low, high = places[sample["name"]].min(0), places[sample["name"]].max(0)
        side = round(1.5 * (high - low).max())
        corner = np.round((low + high) / 2 - side / 2)
        expected = (places[sample["name"]] - corner + 0.5) * 512 / side - 0.5
        np.testing.assert_allclose(sample["keypoint2d"], expected, atol=1e-3)
        projected = np.array(sample["keypoint3d"]) @ np.array(sample["intrinsic_matrix"]).T
        np.testing.assert_allclose(projected[:, :2] / projected[:, 2:], expected, atol=1e-3)
    check_dots(Human36M(out, "train", 256))

    again = out / "annotations" / "keypoints2d_5.json"
    again.unlink()
    crop = out / "crop_images" / kept[5][0]
    before = crop.stat().st_mtime_ns
    (raw / "images" / kept[5][1]).write_bytes(b"no image")
    status, printed, errors = prepare(capsys, "human36m", raw, out)
    assert status == 1 and printed.count("there already") == 4
    assert "1 images, 1 failed; delete it to try" in printed
    assert re.search("failed: .*f_00000.*jpg: not a readable image", errors)
    assert crop.stat().st_mtime_ns == before and len(json.loads(again.read_text())) == 1


@pytest.mark.parametrize("kind, change, message", [
    ("camera", lambda c: c["1"].pop("R") and c, "Human36M_subject1_camera.json.*KeyError: 'R'"),
    ("data", lambda d: {}, "Human36M_subject1_data.json.*KeyError: 'images'"),
    ("data", lambda d: {"images": [d["images"][0] | {"frame_idx": 99}]}, "data.json: .* has no joints or"),
    ("data", lambda d: {"images": [d["images"][0] | {"file_name": "/etc/passwd"}]}, "no path below images"),
    ("joint_3d", lambda j: {"2": {"1": {"0": [[float("nan")] * 3] * 17}}}, "joint_3d.json: .* not in front"),
])
def test_bad_human36m_release(tmp_path, capsys, kind, change, message):
    make_human36m_release(tmp_path, 1, 1)
    file = tmp_path / "annotations" / f"Human36M_subject1_{kind}.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    status, _, errors = prepare(capsys, "human36m", tmp_path, tmp_path / "out")
    assert status == 2 and re.search(message, errors), errors
    file.write_text("{")
    status, _, errors = prepare(capsys, "human36m", tmp_path, tmp_path / "out")
    assert status == 2 and f"{file.name}: no JSON" in errors


# --- the data path's benchmark -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SURREAL", "Human36M", "H3D", "RHD", "LSP"])
def test_both_ways_do_the_same_work(tmp_path, name):
    """The batched augmentation and the published one, image by image in PIL, agree on pictures and heatmaps:
    PIL takes the nearest pixel and rounds the crop to whole ones, so they do so on average."""
    if name == "LSP":
        make_tree(tmp_path, False, [(200, 150), (90, 160), (120, 120)])
    elif name == "RHD":
        make_rhd(tmp_path, "training", [0, 1, 2])
    else:
        MAKERS[name][0](tmp_path)
    dataset = data.open_dataset(tmp_path, size=128)
    assert type(dataset).__name__ == {"H3D": "Hand3DStudio", "RHD": "RenderedHandPose"}.get(name, name)
    indices = torch.arange(3)
    u = torch.full((3, 11), 0.5)
    u[:, 0], u[:, 2], u[:, 5] = 0.6, 0.7, 4 / 7                    # 12 degrees, scale 1.09, no crop
    u[:, 8:] = torch.tensor([0.7, 0.2, 0.9])                        # brightness, contrast, saturation
    ours, theirs = data._augmented_batch(dataset, indices, u), data._augmented_in_pil(dataset, indices, u)
    assert ours[0].shape == theirs[0].shape == (3, 3, 128, 128)
    # Published code mirrors a right hand in another function. Outside of the crop it shows black, ours grey.
    same = dataset.left[:3] if name == "RHD" else torch.ones(3, dtype=torch.bool)
    difference = (ours[0] - theirs[0])[same, :, 24:-24, 24:-24].abs()
    assert difference.mean() < 0.12 and difference.median() < 0.02
    assert ours[1].shape == theirs[1].shape and (ours[1] - theirs[1]).abs().mean() < 0.002


def test_benchmark(tmp_path, capsys):
    make_surreal(tmp_path)
    assert data.main(["benchmark", str(tmp_path)]) == 0
    assert re.search(r"SURREAL, 12 images to 256 x 256, one core: \d+ images/s", capsys.readouterr().out)
    assert data.main(["benchmark", str(tmp_path / "train")]) == 2
    assert "no dataset; expected one of joints.mat, train/run0.json" in capsys.readouterr().err


# --- errors -------------------------------------------------------------------------------------------

MAKERS = {
    "SURREAL": (make_surreal, SURREAL, "train/run1.json", lambda root: root),
    "Human36M": (lambda root: make_human36m(root, {s: 2 for s in (1, 5, 6, 7, 8, 9, 11)}), Human36M,
                 "annotations/keypoints2d_6.json", lambda root: root),
    "H3D": (lambda root: make_h3d(root, 9), Hand3DStudio, "annotation.json", lambda root: root / "H3D_crop"),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("change, message", [
    (lambda e: [{k: v for k, v in e[0].items() if k != "keypoint2d"}] + e[1:], "entry 1 has no 'keypoint2d'"),
    (lambda e: [e[0], {k: v for k, v in e[1].items() if k != "name"}], "entry 2 has no 'name'"),
    (lambda e: [e[0], e[1] | {"keypoint2d": e[1]["keypoint2d"][:-1]}],
     r"keypoint2d of .* \(entry 2\) is not \d+ pairs"),
    (lambda e: [e[0] | {"keypoint2d": "none"}], "is not"),
    (lambda e: [e[0] | {"keypoint2d": [[float("nan"), 1.0]] + e[0]["keypoint2d"][1:]}],
     r"keypoint 0 of .* \(entry 1\) is at \[nan, 1.0\], which is no place"),
    (lambda e: [e[0] | {"keypoint2d": e[0]["keypoint2d"][:-1] + [[float("inf"), 1.0]]}], "no place in a pic"),
    (lambda e: [e[0] | {"name": "../secret.jpg"}], "the name of entry 1, '../secret.jpg', is no path below"),
    (lambda e: [e[0] | {"name": None}], "the name of entry 1"),
    (lambda e: [e[0] | {"size": -1}], "the size of entry 1, -1"),
    (lambda e: {"samples": e}, "is no JSON list"),
    (lambda e: [e], "entry 1 is no JSON object"),
])
def test_bad_annotations(tmp_path, name, change, message):
    make, loader, relative, base = MAKERS[name]
    make(tmp_path)
    file = base(tmp_path) / relative
    entries = json.loads(file.read_text())
    if name == "H3D":                                              # entries that count come first
        entries = sorted(entries, key=lambda sample: -sample["without_object"])
    file.write_text(json.dumps(change(entries)))
    with pytest.raises(data.DataError, match=f"{file.name}: .*{message}"):
        loader(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("", "ends before its list does"), ("[", "ends before"), ("[{}", "entry 1 has no 'name'|ends before"),
    ('[{"name": "a', "entry 1 is no complete JSON object"), ("[1]", "entry 1 is no JSON object"),
    ('[{"name": "a"} {"name": "b"}]', "entry 1 has no|entry 2 is no JSON object"), ("[]]", "goes on behind"),
    ("[,]", "entry 1 is no JSON"), ("\xff[", "is no JSON list"), ("[" * 100000, "entry 1 is no JSON object"),
    ('[{"a":' + "[" * 100000, "recursion|no complete"), ('[{"name": ' + "9" * 5000 + "}]", "4300 digits"),
])
def test_damaged_json(tmp_path, text, message):
    make_surreal(tmp_path)
    (tmp_path / "train" / "run0.json").write_text(text, encoding="utf-8")
    with pytest.raises(data.DataError, match=f"run0.json: .*({message})"):
        SURREAL(tmp_path)


def test_json_in_pieces(tmp_path, monkeypatch):
    """Entries that reach over the pieces in which the file is read, whatever the white space between them."""
    entries = [{"name": "n" * (i % 37), "keypoint2d": [[i, i / 7]], "text": "}],[{\\\"é"} for i in range(50)]
    monkeypatch.setattr(data, "_MAX_ENTRY_CHARS", 64)
    for indent in (None, 2):
        file = tmp_path / f"{indent}.json"
        text = " \n" + json.dumps(entries, indent=indent, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(data, "_MAX_ENTRY_CHARS", 256)
        assert list(data._json_entries(file)) == entries
    monkeypatch.setattr(data, "_MAX_ENTRY_CHARS", 16)               # an entry larger than any is
    with pytest.raises(data.DataError, match="no complete JSON object"):
        list(data._json_entries(file))
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(data._json_entries(tmp_path / "empty.json")) == []


@pytest.mark.parametrize("name", [*MAKERS, "RHD"])
def test_roots_and_arguments(tmp_path, name):
    if name == "RHD":
        make_rhd(tmp_path / "set", "training", [0, 1])
        loader, inner = RenderedHandPose, tmp_path / "set" / "RHD_published_v2" / "training"
    else:
        make, loader, relative, base = MAKERS[name]
        make(tmp_path / "set")
        inner = (base(tmp_path / "set") / relative).parent
    loader(tmp_path / "set", size=8)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory; give the one that holds"):
        loader(tmp_path / "nowhere")
    if name in ("SURREAL", "Human36M"):
        with pytest.raises(FileNotFoundError, match="missing; it is in .*set; give that directory"):
            loader(tmp_path)                                       # one level too high
        with pytest.raises(FileNotFoundError, match="missing; it is in .*set; give that directory"):
            loader(inner)                                          # one level too low
    else:
        with pytest.raises(FileNotFoundError, match="missing; the directory to give holds"):
            loader(tmp_path)
    with pytest.raises(ValueError, match="split 'dev'"):
        loader(tmp_path / "set", "dev")
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match="size"):
            loader(tmp_path / "set", size=size)
    with pytest.raises(ValueError, match="shoulders 'mine'"):
        SURREAL(tmp_path / "set", shoulders="mine")


@pytest.mark.parametrize("name", [*MAKERS, "RHD"])
def test_bad_images(tmp_path, name):
    """A missing, unreadable, truncated image, or one of another size, is named, and what lists it."""
    if name == "RHD":
        make_rhd(tmp_path, "training", [0] * 5)
        loader = RenderedHandPose
    else:
        make, loader, *_ = MAKERS[name]
        make(tmp_path)

    def base():
        return {"RHD": tmp_path / "RHD_published_v2", "H3D": tmp_path / "H3D_crop"}.get(name, tmp_path)
    ds = loader(tmp_path, size=16)
    first = ds.names([0])[0].removesuffix(" left")
    file = base() / first
    whole = file.read_bytes()

    def read():
        return loader(tmp_path, size=16)[[0]]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name}: missing; .* lists it"):
        read()
    half = whole[:len(whole) // 2]
    for damaged, message in ((b"no image", "not a readable image"), (half, "cannot be decoded")):
        file.write_bytes(damaged)
        with pytest.raises(data.DataError, match=f"{file.name}: {message}"):
            read()
    Image.new("RGB", (60, 50)).save(file)
    with pytest.raises(data.DataError, match=f"{file.name}: 60 x 50 pixels"):
        read()
    Image.new("L", (77, 77)).save(file)
    if name in ("SURREAL", "H3D"):                                 # any square is a crop, grey ones, too
        assert read()[0].shape == (1, 3, 16, 16)
        with pytest.raises(data.DataError, match="77 x 77 pixels, its keypoints are annotated for"):
            ds[[0]]                                                # changed behind the loader's back
    else:
        with pytest.raises(data.DataError, match="77 x 77 pixels, its keypoints are annotated for"):
            read()


def test_empty_splits(tmp_path):
    make_surreal(tmp_path / "surreal", runs=(1, 1, 1))
    with pytest.raises(data.DataError, match="split 'test' is empty, of 3 samples"):
        SURREAL(tmp_path / "surreal", "test")
    make_h3d(tmp_path, 3)
    with pytest.raises(data.DataError, match="annotation.json: split 'test' is empty"):
        Hand3DStudio(tmp_path, "test")
    make_human36m(tmp_path / "human", {s: 0 for s in (1, 5, 6, 7, 8, 9, 11)})
    for split in ("train", "val", "test"):
        with pytest.raises(data.DataError, match=f"annotations: split '{split}' is empty, of 0 samples"):
            Human36M(tmp_path / "human", split)
    make_rhd(tmp_path, "training", [5])
    with pytest.raises(data.DataError, match="anno_training.pickle: split 'train' is empty, of 1 "):
        RenderedHandPose(tmp_path)
