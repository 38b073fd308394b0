"""The loaders of the paper's datasets, on miniature trees in the exact layouts and on real files.

Promises: a dot drawn at each keypoint is where the loader says; splits, keypoint maps, visibility and
handedness are the published ones; a missing or damaged file is named in one line; files from outside run
nothing and take no memory on trust.
"""
import json
import math
import pickle
import random
import struct
import tracemalloc
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BODY16, HAND21, LSP, SURREAL, DataError, Hand3DStudio, Human36M, RenderedHandPose, read_mat
from miniatures import (CLASS, LSP_SLOTS, MAT_HEADER, RHD_PICTURES, SURREAL_JOINTS, check_dots, compressed,
                        element, entry, grid_points, make_h3d, make_human36m, make_rhd, make_surreal,
                        make_tree, numeric, variable, write_mat)
from tiny_runs import ROOT

SHARED = ROOT.parent / "shared"


def shuffled(n):
    """The published shuffle."""
    order = list(range(n))
    random.seed(42)
    random.shuffle(order)
    return order


def all_names(ds):
    return ds.names(range(len(ds)))


@contextmanager
def memory(limit):
    """The block's peak of traced memory stays below `limit` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("extended", [False, True], ids=["LSP", "LSP Extended"])
@pytest.mark.parametrize("size", [100, 256])
def test_lsp(tmp_path, extended, size):
    """Dots within 0.3 pixels in enlarged and reduced pictures; which joints are visible."""
    sizes = [(200, 100), (90, 161), (333, 77), (64, 64), (1001, 665), (401, 802), (40, 31)]
    _, flags = make_tree(tmp_path, extended, sizes)
    ds = LSP(tmp_path, "train", size, transductive=True)
    expected = torch.zeros(7, 16)
    expected[:, LSP_SLOTS] = torch.from_numpy(flags == (1 if extended else 0)).float()
    assert ds.skeleton is BODY16 and torch.equal(ds.visible, expected)
    placed = expected > 0
    placed[:, LSP_SLOTS] |= not extended                           # occluded joints keep their place
    assert (ds.keypoints[~placed] == 0).all()
    check_dots(ds, placed, 0.3)


def test_lsp_splits(tmp_path):
    """LSP: all images everywhere (published), or its halves; LSP Extended: 80 / 5 / 15 % in file order."""
    make_tree(tmp_path / "lsp", False, [(20, 20)] * 10)
    make_tree(tmp_path / "lspet", True, [(20, 20)] * 40)
    cases = [("lsp", "train", False, 0, 5), ("lsp", "test", False, 5, 10), ("lspet", "train", None, 0, 32),
             ("lspet", "val", None, 32, 34), ("lspet", "test", None, 34, 40)]
    for split in ("train", "val", "test"):
        cases += [("lsp", split, None, 0, 10), ("lspet", split, True, 0, 40)]
    for root, split, transductive, begin, end in cases:
        names = all_names(LSP(tmp_path / root, split, 8, transductive))
        assert [int(name[2:-4]) for name in names] == list(range(begin + 1, end + 1))
    with pytest.raises(DataError, match="'val'.*'train' and 'test'"):
        LSP(tmp_path / "lsp", "val", 8, False)
    make_tree(tmp_path / "few", True, [(20, 20)] * 4)
    with pytest.raises(DataError, match="4 pictures leave none for 'val'; give 20"):
        LSP(tmp_path / "few", "val", 8)


def test_lsp_errors_name_the_file(tmp_path):
    """Missing, damaged, cut (not kept as a crop) and superfluous images; bad labels."""
    make_tree(tmp_path, False, [(30, 20)] * 4)
    third = tmp_path / "images" / "im0003.jpg"
    whole = third.read_bytes()

    def refuse(error, message):
        with pytest.raises(error, match=message):
            LSP(tmp_path)[[1, 2]]
    third.unlink()
    refuse(FileNotFoundError, "im0003.jpg: missing; .*joints.mat is for .* holds 3 images")
    third.write_bytes(b"no image")
    refuse(DataError, "im0003.jpg: not a readable image")
    third.write_bytes(whole[:-30])
    ds = LSP(tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match="im0003.jpg: cannot be decoded.*truncated"):
            ds[[1, 2]]
    third.with_name("im0005.jpg").write_bytes(whole)
    refuse(DataError, "im0005.jpg: has no annotation")
    for array, message in ((np.zeros((2, 14, 4)), "shape .*, expected "), (np.zeros((3, 14, 0)), "shape"),
                           (np.full((3, 14, 4), 0.5), "must be 0 or 1"),
                           (np.full((3, 14, 4), [[[np.nan]], [[0]], [[1]]]), "out of range in image 1")):
        write_mat(tmp_path / "joints.mat", numeric("joints", array))
        refuse(DataError, "joints.mat.*" + message)


@pytest.mark.skipif(not (SHARED / "lspet").is_dir(), reason="no photographs in ../shared/lspet")
def test_photographs():
    """LSP Extended as released: split sizes, and one joint by hand from its image's size."""
    ds = LSP(SHARED / "lspet", "train", 128)
    assert [len(ds), *(len(LSP(SHARED / "lspet", split, 8)) for split in ("val", "test"))] == [1600, 100, 300]
    with Image.open(SHARED / "lspet" / "images" / "im00001.jpg") as image:
        sides = np.array(image.size)
    # Within a pixel of the continuous mapping: sides and padding are rounded to whole pixels.
    expected = (np.array([26.03094352, 86.41022512]) - sides / 2) * 128 / sides.max() + 64
    np.testing.assert_allclose(ds.keypoints[0, 1], expected, atol=1)
    assert ds.visible[0, :2].tolist() == [0, 1]
    assert (ds[range(0, 1600, 100)][0].float().std((1, 2, 3)) > 10).all()


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "compressed"])
def test_mat(tmp_path, pack):
    """All numeric classes, stored narrower, small ones in the tag; other matrices are stepped over."""
    cell = element(14, element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<2i", 1, 1))
                   + element(1, b"bg", small=True) + numeric("", np.ones((1, 1))))
    variables = [variable("text", (1, 4), b"abcd", 4, 16), cell, variable("s", (3, 3), b"\0" * 8, 5, 5),
                 numeric("z", np.ones((1, 2)), flags=0x800)]
    expected = {"n": np.array([[7.0, 200.0]]), "none": np.zeros((0, 3))}
    variables += [numeric("n", expected["n"], "u1", small=True), numeric("none", expected["none"])]
    for matrix_class in CLASS:
        for stored in ("u1", matrix_class):
            name = f"v{matrix_class}{stored}"
            expected[name] = np.arange(16).reshape(2, 2, 4).astype(matrix_class)
            variables.append(numeric(name, expected[name], stored))
    path = write_mat(tmp_path / "a.mat", *map(compressed, variables) if pack else variables)
    for name, array in expected.items():
        assert read_mat(path, name).dtype == array.dtype
        np.testing.assert_array_equal(read_mat(path, name), array)
    for name in ("text", "bg", "s", "z"):
        with pytest.raises(DataError, match=f"a.mat.*'{name}' .*is not a real numeric array"):
            read_mat(path, name)
    with pytest.raises(DataError, match="no variable 'joints'; the file holds text, bg, s, z, n, none, "):
        read_mat(path, "joints")


def hostile_files():
    """What is wrong -> the bytes of a file, and words of the message."""
    big = 2**31 - 1
    good = numeric("joints", np.ones((3, 14)))
    bomb = zlib.compress(b"\0" * (1 << 22))
    uncut = zlib.compress(good)[:-4]                            # whole but for its checksum
    start = element(6, b"\6".ljust(8, b"\0")) + element(5, struct.pack("<2i", 1, 1)) + element(1, b"joints")
    one = b"\0" * 8
    variables = {
        "dimensions beyond the bytes": (variable("joints", (1 << 24, 1), one, 6, 9), "do not fill"),
        "empty with huge axes": (variable("joints", (0, big, big, big), b"", 6, 9), "beyond the limit"),
        "negative dimensions": (variable("joints", (-1, -1), one, 6, 9), "beyond the limit"),
        "a thousand dimensions": (variable("joints", (1,) * 1000, one, 6, 9), "not a real numeric"),
        "element beyond all": (element(14, start + struct.pack("<II", 9, 64) + one), "declares 64 bytes"),
        "inflated size of 4 GB": (compressed(struct.pack("<II", 14, 2**32 - 1) + start), "beyond the limit"),
        "inflates to more": (compressed(good + b"\0" * 100), "does not inflate to the"),
        "no checksum": (struct.pack("<II", 15, len(uncut)) + uncut, "does not inflate to the"),
        "a bomb": (struct.pack("<II", 15, len(bomb)) + bomb, "not a variable"),
        "no such class": (variable("joints", (1, 1), one, 99, 9), "class 99"),
        "no such storage": (variable("joints", (1, 1), one, 6, 8), "type 8"), "trailing bytes": (b"\0\0", ""),
    }
    return {what: (MAT_HEADER + body, message) for what, (body, message) in variables.items()} | {
        "v7.3": (b"MATLAB 7.3 MAT-file".ljust(512), "HDF5.*'-v7'"),
        "big-endian": (b"MATLAB 5.0".ljust(124) + b"\x01\x00MI", "not a little-endian MATLAB level-5 file")}


@pytest.mark.parametrize("what", HOSTILE := hostile_files())
def test_hostile_mat_files(tmp_path, what):
    """A size that the bytes do not bear out, or a lying type: an error with the path, no memory taken."""
    payload, message = HOSTILE[what]
    (tmp_path / "a.mat").write_bytes(payload)
    with memory(4 << 20), pytest.raises(DataError, match="a.mat: .*" + message):
        read_mat(tmp_path / "a.mat", "joints")


def corrupted(whole, head, trial):
    """Flipped bits, a cut or an overwritten size; half of the bits and sizes in the first `head` bytes."""
    rng = random.Random(trial)
    broken = bytearray(whole)
    reach = head if trial % 2 else len(broken)
    if trial % 3 == 0:
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif trial % 3 == 1:
        del broken[rng.randrange(len(broken)):]
    else:
        at = 4 * rng.randrange(32, reach // 4)
        broken[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 255, 2**16, 2**28, 2**31, 2**32 - 8]))
    return broken


@pytest.mark.parametrize("form", ["mat", "inflated mat", "pickle"])
def test_corrupted_files(tmp_path, form):
    """200 corruptions of each file: an error with its path, or values of the true size; little memory."""
    mat = SHARED / "mat" / "lsp_joints.mat"
    file = tmp_path / "joints.mat"
    if form == "pickle":
        make_rhd(tmp_path, "training", [0, 1, 2])
        file = mat = tmp_path / "RHD_published_v2" / "training" / "anno_training.pickle"
    if not mat.is_file():
        pytest.skip("no original files in ../shared/mat")
    whole = mat.read_bytes()
    refused = 0
    if form == "inflated mat":
        whole = whole[:128] + zlib.decompress(whole[136:])
    with memory(math.inf if form == "pickle" else 1 << 26):
        for trial in range(200):
            file.write_bytes(corrupted(whole, 320, trial))
            try:
                if form == "pickle":
                    RenderedHandPose(tmp_path, size=8)
                else:
                    assert read_mat(file, "joints").size == 14 * 3 * 2000
            except DataError as error:
                assert file.name in str(error)
                refused += 1
    assert 40 < refused < 200


@pytest.mark.skipif(not (SHARED / "mat").is_dir(), reason="no original files in ../shared/mat")
def test_original_annotations():
    """Both releases, written by MATLAB: shapes, a joint and shares as published."""
    _, positions, visible = data._read_lsp_joints(SHARED / "mat" / "lsp_joints.mat")
    assert positions.shape == (2000, 14, 2)
    np.testing.assert_allclose(positions[0, 0], [473.95283019, 552.63152053], atol=5e-9)
    assert round(100 * (1 - visible[:, :12].mean()), 1) == 8.4 and round(100 * (~visible).any(1).mean()) == 47
    extended = read_mat(SHARED / "mat" / "lspet_joints.mat", "joints")
    assert extended.shape == (14, 3, 10000) and round(100 * (extended[:, 2].min(0) == 1).mean()) == 39
    np.testing.assert_allclose(extended[1, :, 0], [26.03094352, 86.41022512, 1], atol=5e-9)


@pytest.mark.parametrize("sizes, suffix, size", [(False, "jpg", 128), (True, "png", 256)])
def test_surreal(tmp_path, sizes, suffix, size):
    """Published and true shoulders; runs shuffled with seed 42, a fifth held out; val is its own folder."""
    names, places = make_surreal(tmp_path, sizes=sizes, suffix=suffix)
    validation, _ = make_surreal(tmp_path, "val", (1, 2, 1))
    order = shuffled(15)
    for shoulders, smpl in (("published", [13, 14]), ("true", [16, 17])):   # published: collars
        ds = SURREAL(tmp_path, "train", size, shoulders)
        assert all_names(ds) == [names[i] for i in order[3:]] and (ds.visible == 1).all()
        check_dots(ds)
        points, side = places[order[3]]
        expected = points[SURREAL_JOINTS[:12] + smpl + SURREAL_JOINTS[14:]]
        np.testing.assert_allclose(ds.keypoints[0], (expected + 0.5) * size / side - 0.5, atol=1e-4)
    assert all_names(SURREAL(tmp_path, "test", 8)) == [names[i] for i in order[:3]]
    assert sorted(all_names(SURREAL(tmp_path, "val", 8))) == sorted(validation)
    make_surreal(tmp_path, runs=(1, 1, 1))
    with pytest.raises(DataError, match="split 'test' is empty"):
        SURREAL(tmp_path, "test")


def test_human36m(tmp_path):
    """Subjects 1, 5, 6, 7, 8 train; 3,200 draws with repeats of 9 and 11 are the test."""
    names = make_human36m(tmp_path, {1: 2, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 11: 3})
    ds = Human36M(tmp_path, "train", 256)
    assert all_names(ds) == [name for subject in (1, 5, 6, 7, 8) for name in names[subject]]
    np.testing.assert_allclose(ds.keypoints[0], (grid_points(16, 512, 1) + 0.5) / 2 - 0.5)
    check_dots(ds)
    random.seed(42)
    assert all_names(Human36M(tmp_path, "test", 8)) == random.choices(names[9] + names[11], k=3200)
    assert sorted(all_names(Human36M(tmp_path, "val", 8))) == sorted(all_names(ds))


def test_hand_3d_studio(tmp_path):
    """Hands without an object, shuffled with seed 42, a fifth held out."""
    free = [sample["name"] for sample in make_h3d(tmp_path, 30) if sample["without_object"] == 1]
    order = [free[i] for i in shuffled(20)]
    ds = Hand3DStudio(tmp_path, "train", 160)
    assert all_names(ds) == order[4:] and ds.skeleton is HAND21
    check_dots(ds)
    assert all_names(Hand3DStudio(tmp_path, "test", 8)) == order[:4]
    assert all_names(Hand3DStudio(tmp_path / "H3D_crop", "val", 8)) == order[4:8]


def test_index_is_kept_beside_a_large_file(tmp_path, monkeypatch):
    """The arrays of a large annotation file are read back until it changes; a damaged copy is made anew."""
    make_surreal(tmp_path)
    plain = {shoulders: SURREAL(tmp_path, "train", 64, shoulders) for shoulders in ("published", "true")}
    assert not list(tmp_path.glob("**/*.npz"))
    monkeypatch.setattr(data, "INDEX_CACHE_BYTES", 0)
    read = data._read_annotations
    for reader in (read, None, read):                               # None: it may not be read again
        monkeypatch.setattr(data, "_read_annotations", reader)
        for shoulders, ds in plain.items():
            again = SURREAL(tmp_path, "train", 64, shoulders)
            assert torch.equal(again.keypoints, ds.keypoints) and all_names(again) == all_names(ds)
        for copy in tmp_path.glob("train/*.npz") if reader is None else ():
            copy.write_bytes(copy.read_bytes()[:100])
    file = tmp_path / "train" / "run0.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:2]))
    assert len(SURREAL(tmp_path, "train", 64)) == 13 - 2


def test_no_object_per_sample(tmp_path):
    """Parsing an entry leaves nothing but its numbers: as objects they would take ten times the text."""
    file = tmp_path / "run0.json"
    file.write_text(json.dumps([entry("a/b.jpg", grid_points(24, 99, 0))] * 2000))
    with memory(3 * file.stat().st_size + 4e6):
        assert len(data._read_annotations(file, "", 24, list(range(24)), bool)[0]) == 2000


def test_indexing(tmp_path, monkeypatch):
    """1-D indices of any kind; crops are the same kept in memory, decoded anew, or by another process."""
    make_surreal(tmp_path)
    ds = SURREAL(tmp_path, "train", 32)
    images, keypoints, _ = ds[torch.tensor([3, 0, 3])]
    assert torch.equal(images[0], images[2]) and torch.equal(keypoints, ds.keypoints[[3, 0, 3]])
    assert torch.equal(ds[np.array([-1, 0])][0][1], images[1]) and ds[[]][0].shape == (0, 3, 32, 32)
    kept = ds[range(12)][0]
    monkeypatch.setattr(data, "MAX_CROPS_BYTES", 0)
    loader = torch.utils.data.DataLoader(SURREAL(tmp_path, "train", 32), sampler=[[0, 1, 2], range(3, 12)],
                                         batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch[0] for batch in loader]), kept)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert torch.equal(ds[range(12)][0], kept)                      # decoded once


MAKERS = {
    "SURREAL": (make_surreal, SURREAL, "train/run1.json"),
    "Human36M": (lambda root: make_human36m(root, {s: 2 for s in (1, 5, 6, 7, 8, 9, 11)}), Human36M,
                 "annotations/keypoints2d_6.json"),
    "H3D": (lambda root: make_h3d(root, 9), Hand3DStudio, "H3D_crop/annotation.json"),
    "RHD": (lambda root: make_rhd(root, "training", [0] * 5), RenderedHandPose, None),
}


# Key of an entry, its value or what makes it from the right one, words of the message.
BAD_ENTRIES = [
    ("keypoint2d", None, "keypoint2d of"), ("keypoint2d", "none", "could not convert"),
    ("keypoint2d", lambda places: places[:-1], r"keypoint2d of .* is not \d+ pairs of coordinates"),
    ("keypoint2d", lambda places: [[float("nan"), 1]] + places[1:], "keypoint2d of"),
    ("keypoint2d", lambda places: places[1:] + [[10 ** 400, 1]], ""), ("size", -1, "size -1"),
    ("name", None, "name 'None' is not a path"), ("name", "../secret.jpg", "name '../secret.jpg' is not a"),
    ("name", "/etc/passwd", "name '/etc/passwd' is not a path"), ("name", "a\0b", "name"),
]


@pytest.mark.parametrize("name", ["SURREAL", "Human36M", "H3D"])
def test_bad_entries(tmp_path, name):
    """An entry that is not as described is refused with its file and number."""
    make, loader, relative = MAKERS[name]
    make(tmp_path)
    file = tmp_path / relative
    text = file.read_text()
    for key, value, message in BAD_ENTRIES:
        entries = sorted(json.loads(text), key=lambda sample: -sample.get("without_object", 0))
        entries[1][key] = value(entries[1][key]) if callable(value) else value
        file.write_text(json.dumps(entries))
        with pytest.raises(DataError, match=f"{file.name}: at entry 2: {message}.*; expected a list"):
            loader(tmp_path)


def test_other_ways_to_write_the_same(tmp_path):
    """An entry may hold more than is needed. JSON may be laid out in any way, after a byte order mark. A size
    may end in .0, `without_object` be true."""
    make_h3d(tmp_path, 9)
    before = Hand3DStudio(tmp_path, size=16)
    images = before[range(len(before))][0]
    file = tmp_path / "H3D_crop" / "annotation.json"
    entries = json.loads(file.read_text())
    for sample in entries:
        with Image.open(file.parent / sample["name"]) as image:
            sample["size"] = float(image.width)
        sample["without_object"] = bool(sample["without_object"])
        sample["camera"] = {"fov": 50, "lens": {"name": None}, "list": [{}, {"keypoint2d": 3}]}
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8-sig")
    after = Hand3DStudio(tmp_path, size=16)
    assert all_names(after) == all_names(before) and torch.equal(after.keypoints, before.keypoints)
    assert torch.equal(after[range(len(after))][0], images)


def test_damaged_json(tmp_path):
    make_surreal(tmp_path)
    for text in ("", "[", "{}", "[] 1", '[{"name": "a"} {}]', "[{}]]", "[{},]", "[{}", '[{"name": "a', "[]]",
                 "[,]", "\xff[", "[" * 100000, '[{"a":' + "[" * 100000, '[{"name": ' + "9" * 5000 + "}]",
                 "[1]", "[null]", "[[]]", "null"):
        (tmp_path / "train" / "run0.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="run0.json: .*fetch or prepare it again"):
            SURREAL(tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_bad_trees(tmp_path, name):
    """Named: which directory to give for a missing root, a missing, unreadable, truncated image, one of
    another size, and what lists it; a wrong argument."""
    make, loader, _ = MAKERS[name]
    make(tmp_path / "set")
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{root}.*: missing; give the directory that holds "):
            loader(root)
    with pytest.raises(ValueError, match="split 'dev': must be"):
        loader(tmp_path / "set", "dev")
    ds = loader(tmp_path / "set", size=16)
    shown = []
    ds.check_files(lambda done, total: shown.append((done, total)))
    assert shown == [(i + 1, len(ds)) for i in range(len(ds))]
    base = tmp_path / "set" / {"RHD": "RHD_published_v2", "H3D": "H3D_crop"}.get(name, "")
    file = base / ds.names([0])[0].removesuffix(" left")
    half = file.read_bytes()[:file.stat().st_size // 2]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name}: missing; .* lists it; fetch"):
        loader(tmp_path / "set", size=16)[[0]]
    for damaged, message in ((b"no image", "not a readable image"), (half, "cannot be decoded")):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{file.name}: {message}"):
            loader(tmp_path / "set", size=16)[[0]]
        with pytest.raises(DataError, match=f"{file.name}: {message}"):
            loader(tmp_path / "set", size=16).check_files()
    Image.new("RGB", (60, 50)).save(file)
    for reader in (ds, loader(tmp_path / "set", size=16)):         # changed behind its back, or before
        with pytest.raises(DataError, match=f"{file.name}: 60 x 50 pixels, but .* the same release"):
            reader[[0]]


def test_rhd(tmp_path):
    """Which hands are samples, their visibility and handedness. By hand: the first left one, 30 ... 110 by
    40 ... 120, has side 120, corner (10, 20); the right one, 200 ... 290 by 180 ... 260, side 135, corner
    round(177.5, 152.5) = (178, 152), to even."""
    make_rhd(tmp_path, "training", range(len(RHD_PICTURES)))
    make_rhd(tmp_path, "evaluation", [1, 2])
    ds = RenderedHandPose(tmp_path, "train", 240)
    kept = []
    for i, (*_, sides) in enumerate(RHD_PICTURES):
        kept += [(i, int(side == "R")) for side in sides]
    assert all_names(ds) == [f"training/color/{i:05d}.png {('left', 'right')[right]}" for i, right in kept]
    assert ds.left.tolist() == [not right for _, right in kept]
    assert ds.visible.sum(1).tolist() == [RHD_PICTURES[i][2 + right] for i, right in kept]
    check_dots(ds, torch.ones(len(ds), 21, dtype=torch.bool))
    left, right, *_ = RHD_PICTURES[0]
    np.testing.assert_allclose(ds.keypoints[0], (left - [10, 20] + 0.5) * 2 - 0.5, atol=1e-4)
    placed = (right - [178, 152] + 0.5) * 240 / 135 - 0.5
    np.testing.assert_allclose(ds.keypoints[1], np.stack([239 - placed[:, 0], placed[:, 1]], 1), atol=1e-4)
    root = tmp_path / "RHD_published_v2"
    assert all_names(RenderedHandPose(root, "val", 8)) == ds.names(range(0, len(ds), 5))     # every fifth
    assert all_names(RenderedHandPose(root, "test", 8)) == [
        "evaluation/color/00000.png left", "evaluation/color/00001.png right"]


def test_rhd_with_numpy_integers_as_keys(tmp_path):
    """The numbers of the pictures may be of any integer type."""
    make_rhd(tmp_path, "training", [0, 1, 2])
    before = RenderedHandPose(tmp_path, "train", 16)
    file = tmp_path / "RHD_published_v2" / "training" / "anno_training.pickle"
    annotations = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({np.uint16(key): value for key, value in annotations.items()}))
    after = RenderedHandPose(tmp_path, "train", 16)
    assert all_names(after) == all_names(before) and torch.equal(after.keypoints, before.keypoints)


def test_array_pickles(tmp_path):
    """Arrays of every number type, order and layout, in all protocols; and as Python 2 wrote them."""
    values = np.array([[1.5, -2.25, 1e300], [0.1, 7.0, -1e-9]])
    arrays = {kind: np.arange(12).reshape(3, 4).astype(kind) for kind in ("f4", "f8", "i8", "u1", ">f8", "?")}
    arrays |= {"fortran": np.asfortranarray(values), "scalar": np.float32(1.5), "strided": values[:, ::2]}
    content = {3: arrays, 7: {"plain": (1, -2.5, "text", b"bytes", None, True, [10 ** 30])}}
    for protocol in range(6):
        (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, protocol=protocol))
        read = data.read_array_pickle(tmp_path / "a.pickle")
        assert read[7] == content[7] and list(read[3]) == list(arrays)
        for name, array in arrays.items():
            assert read[3][name].dtype == array.dtype
            np.testing.assert_array_equal(read[3][name], array)
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR(K\1(K\2K\3tcnumpy\ndtype\n"
             b"(U\2f8K\0K\1tR(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U\x30"
             + values.astype("<f8").tobytes() + b"tb")
    (tmp_path / "a.pickle").write_bytes(b"\x80\2}K\5}U\6uv_vis" + array + b"ss.")
    np.testing.assert_array_equal(data.read_array_pickle(tmp_path / "a.pickle")[5]["uv_vis"], values)


@pytest.mark.parametrize("payload, message", [
    (b"cos\nsystem\n(S'touch owned'\ntR.", "asks for os.system"),
    (b"cbuiltins\neval\n(S'1'\ntR.", "asks for builtins.eval"),
    (b"cnumpy\nload\n(S'x'\ntR.", "asks for numpy.load"),
    (pickle.dumps(np.array([None, 1])), "an array of type 'O8'"),
    (pickle.dumps(np.zeros(2, [("a", "f4")])), "an array of type 'V4'"),
    (b"Pelsewhere\n.", "cannot be read.*persistent"), (b"", "cannot be read"),
    (pickle.dumps(np.zeros((2, 3)), 2).replace(b"K\2K\3\x86", b"J\xff\xff\xff\x7fK\3\x86"), "reshape"),
    (pickle.dumps([1, 2]), "not a dict"), (pickle.dumps({"a": {}}), "entry .a. is not"),
    (pickle.dumps({3: 4}), "entry .3. is not"), (pickle.dumps({3: {"uv_vis": 1}}), "entry .3. is not"),
    (pickle.dumps({3: {"uv_vis": np.full((42, 3), np.nan)}}), "entry .3. is not"),
])
def test_bad_pickles(tmp_path, monkeypatch, payload, message):
    """Whatever is no array or number is refused by name and not run; a clear error for damage."""
    monkeypatch.chdir(tmp_path)
    make_rhd(tmp_path, "training", [0])
    (tmp_path / "RHD_published_v2" / "training" / "anno_training.pickle").write_bytes(payload)
    with pytest.raises(DataError, match=f"anno_training.pickle: .*{message}"):
        RenderedHandPose(tmp_path)
    assert not (tmp_path / "owned").exists()
