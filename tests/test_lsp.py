"""LSP and LSP Extended, and the reader of their MATLAB files: formats, promises of `read_mat` and `LSP`."""

import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BODY16, LSP, read_mat
from miniatures import CLASS, compressed, element, make_tree, numeric, variable, write_mat

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_mat = pytest.mark.skipif(not (SHARED / "mat").is_dir(), reason="no original annotation files here")
needs_lspet = pytest.mark.skipif(not (SHARED / "lspet").is_dir(), reason="no LSP Extended photographs here")


# --- read_mat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "compressed"])
def test_numeric_classes(tmp_path, order, pack):
    """All ten numeric classes, the storage narrower than the class as MATLAB writes it, column-major."""
    expected, variables = {}, []
    for matrix_class in CLASS:
        for stored in ("u1", "i2" if matrix_class[0] == "f" else "u1", matrix_class):
            name = f"v{matrix_class}{stored}"
            expected[name] = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11, 12], [13, 14, 15, 100]]],
                                      dtype=matrix_class)
            written = numeric(name, expected[name], stored, order)
            variables.append(compressed(written, order) if pack else written)
    path = write_mat(tmp_path / "all.mat", *variables, order=order)
    for name, array in expected.items():
        read = read_mat(path, name)
        assert read.dtype == array.dtype and read.dtype.isnative and read.flags.c_contiguous
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("order", "<>")
def test_small_elements_and_other_variables(tmp_path, order):
    """Up to four bytes stand in the tag; cells, structs, sparse and complex matrices are stepped over."""
    one = struct.pack(order + "2i", 1, 1)
    cell = element(14, element(6, struct.pack(order + "II", 1, 0), order) + element(5, one, order)
                   + element(1, b"bg", order, small=True) + numeric("", np.ones((1, 1)), order=order), order)
    opaque = element(14, element(6, struct.pack(order + "II", 17, 0), order) + element(1, b"table", order)
                     + element(1, b"MCOS", order, small=True), order)
    path = write_mat(tmp_path / "mixed.mat", cell, opaque,
                     compressed(variable("s", (3, 3), b"\0" * 8, 5, 5, order), order),
                     variable("info", (1, 1), b"\x08\0\0\0", 2, 5, order),
                     numeric("z", np.ones((1, 2)), order=order, flags=0x800),
                     numeric("n", np.array([[7.0, 200.0]]), "u1", order, small=True),
                     numeric("none", np.zeros((0, 3)), order=order),
                     numeric("flag", np.array([[1]], "u1"), "u1", order, flags=0x200), order=order)
    assert read_mat(path, "n").tolist() == [[7.0, 200.0]] and read_mat(path, "none").shape == (0, 3)
    assert read_mat(path, "flag").tolist() == [[1]]
    unread = {"bg": "cell", "table": "object", "s": "sparse", "info": "struct", "z": "complex"}
    for name, what in unread.items():
        with pytest.raises(ValueError, match=f"mixed.mat.*{name}.*{what}"):
            read_mat(path, name)
    with pytest.raises(ValueError, match="no variable 'joints'.*bg, table, s, info, z, n, none, flag"):
        read_mat(path, "joints")


@pytest.mark.parametrize("order", "<>")
def test_char_arrays(tmp_path, order):
    """Text in each encoding of the format; dimensions count UTF-16 units; a matrix gives its rows."""
    wide = "utf-16-le" if order == "<" else "utf-16-be"
    path = write_mat(tmp_path / "text.mat",
                     variable("utf8", (1, 5), "héllo".encode(), 4, 16, order),
                     variable("utf16", (1, 4), "a\U0001F600b".encode(wide), 4, 17, order),
                     variable("uint16", (1, 2), "ok".encode(wide), 4, 4, order, small=True),
                     variable("rows", (2, 3), b"adbecf", 4, 1, order),
                     variable("empty", (0, 0), b"", 4, 1, order), order=order)
    assert read_mat(path, "utf8").tolist() == ["héllo"]
    assert read_mat(path, "utf16").tolist() == ["a\U0001F600b"]
    assert read_mat(path, "uint16").tolist() == ["ok"]
    assert read_mat(path, "rows").tolist() == ["abc", "def"]
    assert read_mat(path, "empty").shape == (0,)


def test_other_formats_are_named(tmp_path):
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")
    (tmp_path / "v4.mat").write_bytes(struct.pack("<5i", 0, 1, 1, 0, 2).ljust(200, b"\0"))
    (tmp_path / "empty.mat").write_bytes(b"")
    with pytest.raises(ValueError, match="v73.mat.*HDF5.*'-v7'"):
        read_mat(tmp_path / "v73.mat", "joints")
    for name in ("v4.mat", "empty.mat"):
        with pytest.raises(ValueError, match=f"{name}.*not a MATLAB level-5 file"):
            read_mat(tmp_path / name, "joints")
    with pytest.raises(FileNotFoundError, match="absent.mat"):
        read_mat(tmp_path / "absent.mat", "joints")


def hostile_variables():
    """What is wrong -> the bytes of a variable, and words of the message."""
    big = 2**31 - 1
    good = numeric("joints", np.ones((3, 14)))
    bomb = zlib.compress(b"\0" * (1 << 22))
    uncut = zlib.compress(good)[:-4]  # without zlib's checksum
    one = element(5, struct.pack("<2i", 1, 1))
    start = element(6, struct.pack("<II", 6, 0)) + one + element(1, b"joints")
    nested = b""
    for _ in range(3000):
        nested = element(14, element(6, struct.pack("<II", 1, 0)) + one + element(1, b"joints") + nested)
    return {
        "dimensions beyond the bytes": (variable("joints", (1 << 24, 1), b"\0" * 16, 6, 9), "2 are stored"),
        "dimensions beyond the limit": (variable("joints", (big, big), b"\0" * 9, 6, 9), "beyond the limit"),
        "empty with huge axes": (variable("joints", (0, big, big, big), b"", 6, 9), "beyond the limit"),
        "billions of empty strings": (variable("joints", (big, 0), b"", 4, 1), "beyond the limit"),
        "narrow storage of a wide class": (
            compressed(variable("joints", (1 << 26, 1), b"\0" * (1 << 26), 6, 2)), "beyond the limit"),
        "negative dimensions": (variable("joints", (-1, -1), b"\0" * 8, 6, 9), "negative"),
        "one dimension": (variable("joints", (1,), b"\0" * 8, 6, 9), "without valid dimensions"),
        "a thousand dimensions": (variable("joints", (1,) * 1000, b"\0" * 8, 6, 9), "valid dimensions"),
        "size beyond the file": (struct.pack("<II", 14, 2**32 - 8) + start, "truncated"),
        "element beyond all": (element(14, start + struct.pack("<II", 9, 64) + b"\0" * 8), "declares 64 bytes"),
        "inflated size of 4 GB": (compressed(struct.pack("<II", 14, 2**32 - 1) + start), "more than the"),
        "inflates to more": (compressed(good + b"\0" * 100), "does not inflate to the"),
        "inflates to less": (compressed(good[:-100]), "does not inflate to the"),
        "no checksum": (struct.pack("<II", 15, len(uncut)) + uncut, "does not inflate to the"),
        "a bomb": (struct.pack("<II", 15, len(bomb)) + bomb, "not a variable"),
        "compressed within compressed": (compressed(compressed(good)), "not a variable"),
        "nested cells": (nested, "a cell array"),
        "no such class": (variable("joints", (1, 1), b"\0" * 8, 99, 9), "class 99"),
        "no such storage": (variable("joints", (1, 1), b"\0" * 8, 6, 8), "type 8"),
        "integers stored as floats": (variable("joints", (1, 1), b"\0" * 8, 9, 9), "uint8 stored as float64"),
        "single stored as double": (variable("joints", (1, 1), b"\0" * 8, 7, 9), "float32 stored as float64"),
        "values beyond the class": (variable("joints", (1, 1), b"\xff\xff", 9, 4), "outside the range"),
        "storage cut within a value": (variable("joints", (1, 1), b"\0" * 7, 6, 9), "no multiple of 8"),
        "small element of 8 bytes": (element(14, start + struct.pack("<I", 8 << 16 | 9) + b"\0" * 12),
                                     "at most 4 fit"),
        "no values": (element(14, start), "truncated"),
        "nothing in the variable": (element(14, b""), "truncated"),
        "text of another length": (variable("joints", (1, 9), b"abc", 4, 16), "3 are stored"),
        "trailing bytes": (b"\0\0\0", "3 bytes of an 8-byte tag"),
    }


HOSTILE = hostile_variables()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(tmp_path, what):
    """A size that the bytes do not bear out, or a lying type: ValueError with the path, no memory taken."""
    payload, message = HOSTILE[what]
    path = write_mat(tmp_path / "hostile.mat", payload)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="hostile.mat.*" + message):
            read_mat(path, "joints")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_inflation_stops_at_the_declared_size(tmp_path):
    """128 MB of zeros behind the 1 KB that the variable declares are not inflated."""
    start = numeric("joints", np.ones((1, 128)))
    deflate = zlib.compressobj(1)
    body = deflate.compress(start) + b"".join(deflate.compress(b"\0" * (1 << 24)) for _ in range(8))
    body += deflate.flush()
    path = write_mat(tmp_path / "bomb.mat", struct.pack("<II", 15, len(body)) + body)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bomb.mat.*does not inflate"):
            read_mat(path, "joints")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "compressed"])
def test_seeded_corruptions(tmp_path, pack):
    """Flipped bits, overwritten sizes and cuts: a ValueError with the path, or an array of the true shape."""
    joints = np.random.default_rng(0).normal(100, 30, (3, 14, 6))
    parts = [variable("note", (1, 4), b"text", 4, 16), numeric("joints", joints), numeric("z", joints[0])]
    path = write_mat(tmp_path / "c.mat", *[compressed(part) if pack else part for part in parts])
    whole, rng, refused = path.read_bytes(), random.Random(1), 0
    for trial in range(150):
        broken = bytearray(whole)
        if trial % 3 == 0:
            for _ in range(rng.randint(1, 4)):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        elif trial % 3 == 1:
            del broken[rng.randrange(len(broken)):]
        else:
            # Half of the sizes land on the tags of the first variables, where they are read as sizes.
            at = 4 * rng.randrange(32, 80 if trial % 2 else len(broken) // 4)
            size = rng.choice([0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
            broken[at:at + 4] = struct.pack("<I", size)
        path.write_bytes(broken)
        try:
            assert read_mat(path, "joints").shape == joints.shape
        except ValueError as error:
            assert "c.mat" in str(error)
            refused += 1
    assert 30 < refused < 150


CORRUPTIONS = 100  # of each form of a file; 2,000 of each have been run


@needs_mat
@pytest.mark.parametrize("form", ["as released", "uncompressed", "within"])
@pytest.mark.parametrize("name, values", [("lsp_joints.mat", 3 * 14 * 2000),
                                          ("lspet_joints.mat", 14 * 3 * 10000)])
def test_corrupted_originals(tmp_path, name, values, form):
    """Bit flips, cuts and inflated sizes of the file, of its uncompressed form, and within its compression,
    whose checksum stops most of them: DataError with the path or an array of as many values, in little memory."""
    whole = (SHARED / "mat" / name).read_bytes()
    if form != "as released":
        whole = whole[:128] + zlib.decompress(whole[136:])
    path, rng, refused = tmp_path / "c.mat", random.Random(3), 0
    tracemalloc.start()
    for trial in range(CORRUPTIONS):
        broken = bytearray(whole)
        if trial % 3 == 0:
            for _ in range(rng.randint(1, 4)):
                broken[rng.randrange(len(broken) if trial % 2 else 200)] ^= 1 << rng.randrange(8)
        elif trial % 3 == 1:
            del broken[rng.randrange(len(broken)):]
        else:
            at = 4 * rng.randrange(32, 64 if trial % 2 else len(broken) // 4)
            broken[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 255, 2**16, 2**28, 2**31, 2**32 - 8]))
        if form == "within":
            broken[128:] = compressed(broken[128:], level=0)
        path.write_bytes(broken)
        tracemalloc.reset_peak()
        try:
            read = read_mat(path, "joints")
            assert read.dtype == np.float64 and read.size == values
        except data.DataError as error:
            assert "c.mat" in str(error)
            refused += 1
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert CORRUPTIONS / 3 < refused < CORRUPTIONS


@pytest.mark.parametrize("frames", [100, 1])
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "compressed"])
def test_surreal_info(tmp_path, frames, pack):
    """SURREAL's info.mat: single arrays behind text and cells; a clip of one frame is [2, 24]."""
    rng = np.random.default_rng(0)
    places, joints = rng.normal(100, 30, (2, 24, frames)), rng.normal(0, 1, (3, 24, frames))
    places, joints = places.astype("f4"), joints.astype("f4")
    if frames == 1:
        places, joints = places[..., 0], joints[..., 0]
    one = struct.pack("<2i", 1, 1)
    cell = element(14, element(6, struct.pack("<II", 1, 0)) + element(5, one) + element(1, b"cloth")
                   + variable("", (1, 5), b"a.jpg", 4, 16))
    row = np.ones((1, frames))
    parts = [variable("sequence", (1, 11), b"01_01_c0001", 4, 16), cell,
             numeric("zrot", row.astype("f4"), "f4"),
             numeric("joints2D", places, "f4"), numeric("gender", row.astype("u1"), "u1", small=True),
             numeric("joints3D", joints, "f4"), variable("source", (1, 3), b"cmu", 4, 16)]
    path = write_mat(tmp_path / "c_info.mat", *[compressed(part) if pack else part for part in parts])
    np.testing.assert_array_equal(read_mat(path, "joints2D"), places)
    np.testing.assert_array_equal(read_mat(path, "joints3D"), joints)
    assert read_mat(path, "sequence").tolist() == ["01_01_c0001"]
    with pytest.raises(data.DataError, match="'cloth' is a cell array"):
        read_mat(path, "cloth")


@needs_mat
def test_original_annotations():
    """The files of both releases, written by MATLAB: shapes, first joints and shares as published."""
    lsp = read_mat(SHARED / "mat" / "lsp_joints.mat", "joints")
    assert lsp.shape == (3, 14, 2000) and lsp.dtype == np.float64
    np.testing.assert_allclose(lsp[:, 0, 0], [473.95283019, 552.63152053, 0], atol=5e-9)
    assert round(100 * lsp[2].mean()) == 7  # per cent occluded
    extended = read_mat(SHARED / "mat" / "lspet_joints.mat", "joints")
    assert extended.shape == (14, 3, 10000)
    np.testing.assert_allclose(extended[1, :, 0], [26.03094352, 86.41022512, 1], atol=5e-9)
    assert round(100 * (extended[:, 2].min(0) == 1).mean()) == 39  # per cent of images with all 14
    with pytest.raises(ValueError, match="no variable 'joint'; the file holds joints"):
        read_mat(SHARED / "mat" / "lsp_joints.mat", "joint")


# --- LSP --------------------------------------------------------------------------------------------

# Slot of BODY16 of r-ankle, r-knee, r-hip, l-hip, l-knee, l-ankle, r-wrist, r-elbow, r-shoulder, l-shoulder,
# l-elbow, l-wrist, neck, head top, from the table of the format.
SLOTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]
SIZES = [(200, 100), (90, 161), (333, 77), (64, 64), (1501, 997), (601, 1202), (40, 31), (809, 1617)]


@pytest.mark.parametrize("extended", [False, True], ids=["LSP", "LSP Extended"])
@pytest.mark.parametrize("size", [100, 256])
def test_keypoints_lie_on_the_picture(tmp_path, extended, size):
    """The dot drawn at each joint is found in the crop within 0.3 pixels of the keypoint: wide, tall,
    enlarged and strongly reduced (JPEG decoded at a fraction) pictures, both layouts."""
    make_tree(tmp_path / "set", extended, SIZES)
    ds = LSP(tmp_path / "set", "train", size, transductive=True)
    images, keypoints, visible = ds[list(range(len(SIZES)))]
    assert images.dtype == torch.uint8 and images.shape == (8, 3, size, size)
    assert keypoints.dtype == visible.dtype == torch.float32
    assert keypoints.shape == (8, 16, 2) and visible.shape == (8, 16)
    assert ds.skeleton is BODY16 and ds.size == size
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), -1).float()
    for i in range(8):
        light = images[i].float().mean(0)
        light = torch.where(light > 40, light, torch.zeros(()))  # JPEG ringing is no dot
        found = 0.0
        for slot in SLOTS:
            if visible[i, slot]:
                near = light * ((grid - keypoints[i, slot]).abs() < size / 16).all(-1)
                centroid = (near[..., None] * grid).sum((0, 1)) / near.sum()
                assert (centroid - keypoints[i, slot]).abs().max() < 0.3, (i, slot)
                found += near.sum()
        if visible[i, SLOTS].all():
            assert found > 0.99 * light.sum()  # no dot is anywhere else


def test_geometry_by_hand(tmp_path):
    """200 x 100 into 100: half size, 25 rows above, (x + 0.5) / 2 - 0.5. 100 x 200 into 400: twice."""
    for root, sizes in (("wide", [(200, 100)]), ("tall", [(100, 200)])):
        make_tree(tmp_path / root, False, sizes)
    wide = LSP(tmp_path / "wide", size=100)
    assert wide.keypoints[0, 0].tolist() == [9.75, 33.25]  # the joint is at (20, 17) of the photograph
    images, _, _ = wide[[0]]
    assert images[0, :, :25].max() == 0 and images[0, :, 75:].max() == 0 and images[0, :, 25:75].max() > 200
    tall = LSP(tmp_path / "tall", size=400)
    assert tall.keypoints[0, 0].tolist() == [120.5, 66.5]  # the joint is at (10, 33): 20.5 + 100, 66.5


def test_visibility_flags(tmp_path):
    """LSP's third value marks occlusion (the joint stays labelled), LSP Extended's marks labels; pelvis and
    thorax have none. Unlabelled keypoints are zero."""
    for extended in (False, True):
        make_tree(tmp_path / str(extended), extended, [(100, 80)] * 4)
        ds = LSP(tmp_path / str(extended), transductive=True, size=64)
        expected = torch.zeros(4, 16)
        expected[:, SLOTS] = 1
        if extended:
            expected[1::2, [0, 4, 12, 8]] = 0  # joints 0, 4, 8, 12
        assert torch.equal(ds.visible, expected)
        assert (ds.keypoints[expected == 0] == 0).all() and (ds.keypoints[expected == 1] > 0).all()


def test_splits(tmp_path):
    """LSP: all images everywhere (published), or its halves; LSP Extended: 80 / 5 / 15 % in file order."""
    make_tree(tmp_path / "lsp", False, [(20, 20)] * 10)
    make_tree(tmp_path / "lspet", True, [(20, 20)] * 40)

    def numbers(*args, **settings):
        ds = LSP(*args, size=8, **settings)
        return [int(name[2:-4]) for name in ds.names(range(len(ds)))]
    for split in ("train", "val", "test"):
        assert numbers(tmp_path / "lsp", split) == list(range(1, 11))
        assert numbers(tmp_path / "lspet", split, transductive=True) == list(range(1, 41))
    assert numbers(tmp_path / "lsp", "train", transductive=False) == list(range(1, 6))
    assert numbers(tmp_path / "lsp", "test", transductive=False) == list(range(6, 11))
    with pytest.raises(ValueError, match="'val'.*'train' and 'test' only"):
        LSP(tmp_path / "lsp", "val", transductive=False)
    assert numbers(tmp_path / "lspet", "train") == list(range(1, 33))
    assert numbers(tmp_path / "lspet", "val") == [33, 34]
    assert numbers(tmp_path / "lspet", "test") == list(range(35, 41))
    make_tree(tmp_path / "tiny", True, [(20, 20)] * 4)
    with pytest.raises(ValueError, match="'val' is empty, of 4 images"):
        LSP(tmp_path / "tiny", "val")


def test_a_single_image(tmp_path):
    """MATLAB drops the last axis of one: (14, 3) and (3, 14) are sets of one image."""
    for extended in (False, True):
        root = tmp_path / str(extended)
        make_tree(root, extended, [(30, 20)])
        joints = read_mat(root / "joints.mat", "joints")[..., 0]
        write_mat(root / "joints.mat", numeric("joints", joints))
        assert len(LSP(root, transductive=True, size=16)) == 1


def test_indexing(tmp_path, monkeypatch):
    """1-D indices of any kind; crops are the same kept in memory or decoded anew in a DataLoader."""
    make_tree(tmp_path / "set", False, SIZES[:4])
    ds = LSP(tmp_path / "set", size=32)
    images, keypoints, visible = ds[torch.tensor([3, 0, 3])]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert torch.equal(keypoints, ds.keypoints[[3, 0, 3]]) and torch.equal(visible, ds.visible[[3, 0, 3]])
    assert torch.equal(ds[np.array([-1, 0])][0], images[:2])
    assert ds[[]][0].shape == (0, 3, 32, 32) and ds.names([1, 0]) == ["im0002.jpg", "im0001.jpg"]
    images.zero_()  # a batch is the caller's own
    assert ds[[0]][0].max() > 0
    for bad in (2, [[0]], [0.5], [True]):
        with pytest.raises(TypeError, match="1-D"):
            ds[bad]
    with pytest.raises(IndexError, match="there are 4 samples"):
        ds[[4]]
    kept = ds[range(4)][0]
    (tmp_path / "set" / "images").rename(tmp_path / "set" / "elsewhere")
    assert torch.equal(ds[range(4)][0], kept)  # decoded once
    (tmp_path / "set" / "elsewhere").rename(tmp_path / "set" / "images")
    monkeypatch.setattr(data, "MAX_CROPS_BYTES", 0)
    anew = LSP(tmp_path / "set", size=32)
    loader = torch.utils.data.DataLoader(anew, sampler=[[0, 1], [2, 3]], batch_size=None)
    assert torch.equal(torch.cat([batch[0] for batch in loader]), kept)


def test_errors_name_the_file(tmp_path):
    root = tmp_path / "set"
    make_tree(root, False, [(30, 20)] * 4)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        LSP(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"joints.mat: missing; it is in .*set; give that"):
        LSP(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"joints.mat: missing; it is in .*set; give that"):
        LSP(root / "images")
    with pytest.raises(ValueError, match="split 'dev'"):
        LSP(root, "dev")
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match="size"):
            LSP(root, size=size)

    third = root / "images" / "im0003.jpg"
    whole = third.read_bytes()
    third.unlink()
    with pytest.raises(FileNotFoundError, match=r"im0003.jpg: missing; .* has 4 entries \(LSP\).*holds 3"):
        LSP(root)
    third.write_bytes(b"no image")
    with pytest.raises(ValueError, match="im0003.jpg: not a readable image"):
        LSP(root)
    third.write_bytes(whole[:-30])
    ds = LSP(root)
    with pytest.raises(ValueError, match="im0003.jpg: cannot be decoded.*truncated"):
        ds[[1, 2]]
    with pytest.raises(ValueError, match="im0003.jpg"):
        ds[[2]]  # a failed decode is not remembered as a crop
    third.write_bytes(whole)
    (root / "images" / "im0005.jpg").write_bytes(whole)
    with pytest.raises(ValueError, match="im0005.jpg: no entry for it"):
        LSP(root)
    (root / "images").rename(root / "pictures")
    with pytest.raises(FileNotFoundError, match="images: no such directory"):
        LSP(root)


@pytest.mark.parametrize("array, message", [
    (np.zeros((2, 14, 4)), r"shape \(2, 14, 4\), expected \(3, 14, N\)"),
    (np.zeros((3, 14, 0)), "no image"),
    (np.full((3, 14, 4), 0.5), "must be 0 or 1, found 0.5"),
    (np.full((3, 14, 4), [[[np.nan]], [[0]], [[0]]]), r"joint 1 of image 1 is labelled at \[nan, 0.0\]"),
])
def test_bad_annotations(tmp_path, array, message):
    make_tree(tmp_path / "set", False, [(30, 20)] * 4)
    write_mat(tmp_path / "set" / "joints.mat", numeric("joints", array))
    with pytest.raises(ValueError, match="joints.mat.*" + message):
        LSP(tmp_path / "set")


@needs_lspet
def test_photographs():
    """LSP Extended as released: split sizes, and one joint by hand from its image's size."""
    sizes = {split: len(LSP(SHARED / "lspet", split, 128)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1600, "val": 100, "test": 300}
    ds = LSP(SHARED / "lspet", "train", 128)
    with Image.open(SHARED / "lspet" / "images" / "im00001.jpg") as image:
        width, height = image.size
    scale = 128 / max(width, height)
    pad = np.array([128 - width * scale, 128 - height * scale]) / 2
    # Within a pixel of the continuous mapping: sides and padding are rounded to whole pixels.
    np.testing.assert_allclose(ds.keypoints[0, 1], np.array([26.03094352, 86.41022512]) * scale + pad, atol=1)
    assert ds.visible[0, 1] == 1 and ds.visible[0, 0] == 0
    images, keypoints, visible = ds[range(0, 1600, 100)]
    assert images.shape == (16, 3, 128, 128) and (images.float().std((1, 2, 3)) > 10).all()
    assert (visible[:, 6:8] == 0).all() and torch.isfinite(keypoints).all()
