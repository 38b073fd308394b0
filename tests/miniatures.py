"""Miniature datasets in the exact layouts, a dot at each keypoint, and MAT-files written byte by byte."""
import json
import pickle
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from data import check_dataset

# The tables of the formats, written out again.
LSP_SLOTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]
SURREAL_JOINTS = [7, 4, 1, 2, 5, 8, 0, 9, 12, 15, 20, 18, 13, 14, 19, 21]
RHD_ROWS = [0, 4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17]
MAT_HEADER = b"MATLAB 5.0 MAT-file, written by a test".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
# MATLAB's numbers for the storage of values and for the class of a variable.
STORAGE = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}
CLASS = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}


def element(kind, payload, small=False):
    if small and len(payload) <= 4:
        return struct.pack("<I", len(payload) << 16 | kind) + payload.ljust(4, b"\0")
    return struct.pack("<II", kind, len(payload)) + payload + b"\0" * (-len(payload) % 8)


def variable(name, shape, values, matrix_class, storage, small=False, flags=0):
    """A variable as the format describes it; `values` are its bytes, already column-major."""
    body = element(6, struct.pack("<II", flags | matrix_class, 0))
    body += element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, body + element(1, name.encode(), small) + element(storage, values, small))


def numeric(name, array, stored="f8", small=False, flags=0):
    values = array.astype("<" + stored).tobytes(order="F")
    return variable(name, array.shape, values, CLASS[array.dtype.str[1:]], STORAGE[stored], small, flags)


def compressed(payload, level=6):
    body = zlib.compress(payload, level)
    return struct.pack("<II", 15, len(body)) + body


def write_mat(path, *variables):
    path.write_bytes(MAT_HEADER + b"".join(variables))
    return path


def dots(width, height, points, radius):
    """A dark picture with a bright square around each point (x, y), to a fraction of a pixel."""
    picture = np.zeros((height, width))
    for x, y in points:
        across = np.clip(radius + 0.5 - abs(np.arange(width) - x), 0, 1)
        down = np.clip(radius + 0.5 - abs(np.arange(height) - y), 0, 1)
        rows = down > 0
        picture[rows] = np.maximum(picture[rows], 255 * np.outer(down[rows], across))
    return Image.fromarray(np.repeat(picture[..., None].round().astype(np.uint8), 3, 2))


def save(picture, file, quality=95):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, **({"quality": quality, "subsampling": 0} if file.suffix == ".jpg" else {}))


def check_dots(ds, counted=None, tolerance=0.6):
    """Shapes and types as promised; the centre of the light near each keypoint is the keypoint."""
    check_dataset(ds, "")
    images, keypoints, visible = ds[range(len(ds))]
    size = ds.size
    light = images.float().mean(1)
    light = light * (light > 40)                                   # JPEG ringing is no dot
    line = torch.arange(size)
    near = ((line - keypoints[..., None]).abs() < size / 15).float()    # (B, K, 2, size)
    weight = torch.einsum("bkx,bky,byx->bkyx", near[:, :, 0], near[:, :, 1], light)
    centre = torch.stack([(weight.sum(2) * line).sum(-1), (weight.sum(3) * line).sum(-1)], -1)
    error = (centre / weight.sum((2, 3))[..., None] - keypoints).abs().amax(-1)
    assert error[visible > 0 if counted is None else counted].max() < tolerance, error


def make_tree(root, extended, sizes):
    """A miniature of LSP or LSP Extended -> positions (N, 14, 2), third values (N, 14)."""
    positions = np.zeros((len(sizes), 14, 2))
    flags = np.full((len(sizes), 14), float(extended))
    flags[1::2, ::4] = 1 - extended                      # occluded in LSP, not labelled in LSP Extended
    for i, (width, height) in enumerate(sizes):
        place = (np.arange(14) * 3 + i) % 15             # a 5 x 3 grid keeps the dots apart
        positions[i] = ((np.stack([place % 5, place // 5], 1) + 0.5) * [width / 5, height / 3]).round()
        name = f"im{i + 1:0{5 if extended else 4}d}.jpg"
        radius = max(1, round(max(width, height) / 100))
        save(dots(width, height, positions[i], radius), root / "images" / name)
    joints = np.concatenate([positions, flags[..., None]], 2).transpose((1, 2, 0) if extended else (2, 1, 0))
    write_mat(root / "joints.mat", compressed(numeric("joints", joints)))
    return positions, flags


def grid_points(count, side, shift):
    """`count` places of a 5 x 5 grid in a square picture, whole pixels, in an order that `shift` changes."""
    place = (np.arange(count) * 7 + shift) % 25
    return (np.stack([place % 5, place // 5], 1) + 0.5) * (side / 5) // 1


def entry(name, points):
    """A sample as the published prepared layouts list it."""
    return {"name": name, "keypoint2d": points.tolist(), "keypoint3d": np.ones((len(points), 3)).tolist(),
            "intrinsic_matrix": np.eye(3).tolist()}


def make_surreal(root, folder="train", runs=(4, 5, 6), sizes=False, suffix="jpg"):
    """A miniature of the prepared layout -> names in the files' order, all 24 places and side of each."""
    names = []
    places = []
    for run, count in enumerate(runs):
        entries = []
        for i in range(count):
            side = 90 + 17 * ((i + run) % 5)
            points = grid_points(24, side, i)
            name = f"01_{run:02d}/01_{run:02d}_c0001_{i}.{suffix}"
            save(dots(side, side, points[SURREAL_JOINTS + [16, 17]], 2), root / folder / f"run{run}" / name)
            entries.append(entry(name, points) | ({"size": side} if sizes else {}))
            names.append(f"{folder}/run{run}/{name}")
            places.append((points, side))
        (root / folder / f"run{run}.json").write_text(json.dumps(entries))
    return names, places


def make_human36m(root, counts):
    """A miniature with counts[subject] samples of each subject -> {subject: names}."""
    (root / "annotations").mkdir(parents=True)
    names = {}
    for subject, count in counts.items():
        entries = []
        for i in range(count):
            points = grid_points(16, 512, i + subject)
            name = f"s_{subject:02d}_act_02_subact_01_ca_01/s_{subject:02d}_act_02_{5 * i + 1:06d}.jpg"
            save(dots(512, 512, points, 4), root / "crop_images" / name, quality=90)
            entries.append(entry(name, points))
        names[subject] = [f"crop_images/{sample['name']}" for sample in entries]
        (root / "annotations" / f"keypoints2d_{subject}.json").write_text(json.dumps(entries))
    return names


def make_h3d(root, count):
    """A miniature in which every third hand holds an object -> its entries."""
    entries = []
    for i in range(count):
        side = 140 + 30 * (i % 4)
        points = grid_points(21, side, i)
        save(dots(side, side, points, 2), root / "H3D_crop" / f"part{i % 5 + 1}/{i:03d}.jpg")
        entries.append(entry(f"part{i % 5 + 1}/{i:03d}.jpg", points) | {"without_object": int(i % 3 > 0)})
    (root / "H3D_crop" / "annotation.json").write_text(json.dumps(entries))
    return entries


def hand(low, high, shift):
    """21 places within the box low ... high whose own box is that box, in the order of HAND21."""
    points = grid_points(21, 1000, shift)
    points = (points - points.min(0)) / (points.max(0) - points.min(0))
    return np.round(low + points * (np.array(high) - low))


FAR = np.tile([900.0, 900.0], (21, 1))                             # a hand outside of the picture
# Left hand, right hand, how many of each are visible, and which of them are samples (L, R).
RHD_PICTURES = [
    (hand((30, 40), (110, 120), 0), hand((200, 180), (290, 260), 3), 21, 21, "LR"),
    (hand((60, 60), (240, 250), 1), FAR, 21, 0, "L"),               # 1.5 x 190 = 285, inside the picture
    (FAR, hand((250, 10), (318, 100), 5), 0, 20, "R"),              # moved in from the right and upper edge
    (hand((30, 40), (110, 120), 2), hand((200, 180), (290, 260), 4), 16, 17, "R"),     # 16 visible: too few
    (hand((30, 40), (73, 83), 2), hand((200, 180), (244, 224), 4), 21, 21, "R"),       # 1.5 x 43 = 64.5; 66
    (hand((30, 40), (110, 120), 0), hand((50, 60), (130, 140), 1), 21, 21, ""),        # they cover each other
    (hand((10, 10), (310, 310), 6), FAR, 21, 0, "L"),               # the whole picture
]


def make_rhd(root, folder, numbers):
    """A miniature with the pictures of the table; a dot at each keypoint of both hands."""
    base = root / "RHD_published_v2" / folder
    annotations = {}
    for identity, number in enumerate(numbers):
        left, right, seen_left, seen_right, _ = RHD_PICTURES[number]
        save(dots(320, 320, np.concatenate([left, right]), 2), base / "color" / f"{identity:05d}.png")
        stored = np.zeros((42, 3))
        for first, points, seen in ((0, left, seen_left), (21, right, seen_right)):
            for keypoint, row in enumerate(RHD_ROWS):               # fingers are stored from tip to base
                stored[first + row] = *points[keypoint], keypoint < seen
        annotations[identity] = {"uv_vis": stored, "xyz": np.zeros((42, 3)), "K": np.eye(3)}
    (base / f"anno_{folder}.pickle").write_bytes(pickle.dumps(annotations))


def make_clip(folder, name, frames, shift=0):
    """A clip of the original release, raw frames in place of a video -> places (T, 24, 2)."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [grid_points(24, 120 + 20 * t, t + shift) + [60 + 30 * shift, 20] for t in range(frames)]
    (folder / f"{name}.mp4").write_bytes(b"".join(dots(320, 240, points, 2).tobytes() for points in places))
    write_info(folder / f"{name}_info.mat", places[0].T if frames == 1 else np.stack(places).T)
    return places


def write_info(path, joints):
    joints = compressed(numeric("joints2D", joints.astype("f4"), "f4"))
    write_mat(path, variable("sequence", (1, 3), b"abc", 4, 16), joints)


def make_human36m_release(root, subject):
    """The JSON release of one subject, one camera, six frames -> names of every fifth, places of all."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images = []
    joints = {}
    places = {}
    cos = np.cos(0.3)
    sin = np.sin(0.3)
    rotation = np.array([[cos, -sin, 0], [0, 0, -1], [sin, cos, 0]])   # world z is up, the camera's y is down
    t = np.array([100.0, 900, 5000])
    f = np.array([1145.0, 1143.0])
    c = np.array([512.5, 515.4])
    for frame in range(6):
        grid = (grid_points(17, 1000, 0) - 500) * [1.2, 1.5 + 0.1 * frame]
        grid[[14, 15, 11, 6]] = grid[[15, 14, 6, 11]]          # none in the middle of the shoulders
        world = np.stack([grid[:, 0], 40.0 * (np.arange(17) % 5), grid[:, 1] + 900], 1)
        joints[str(frame)] = world.tolist()
        seen = world[[3, 2, 1, 4, 5, 6, 0, 11, 8, 10, 16, 15, 14, 11, 12, 13]]
        seen[7] = (seen[12] + seen[13]) / 2
        seen = seen @ rotation.T + t
        name = f"s_{subject:02d}/f_{frame:06d}.jpg"
        places[name] = seen[:, :2] / seen[:, 2:] * f + c
        images.append(dict(file_name=name, cam_idx=1, action_idx=2, subaction_idx=1, frame_idx=frame))
        if frame % 5 == 0:
            save(dots(1000, 1002, places[name], 4), root / "images" / name)
    camera = {"R": rotation.tolist(), "t": t.tolist(), "f": f.tolist(), "c": c.tolist()}
    for kind, content in {"data": {"images": images}, "joint_3d": {"2": {"1": joints}},
                          "camera": {"1": camera}}.items():
        (root / "annotations" / f"Human36M_subject{subject}_{kind}.json").write_text(json.dumps(content))
    return list(places)[::5], places
