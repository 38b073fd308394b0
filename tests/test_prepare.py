"""Preparation of the original releases of SURREAL and Human3.6M.

Promises: frame t of a clip gets the labels of frame t; crops and keypoints are those of the published
protocol; what fails is named; a second start does what is left.
"""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data import SURREAL, Human36M
from docs import prepare
from miniatures import check_dots, grid_points, make_clip, make_human36m_release, write_info

STUB = """#!{python}
import os, sys
given = sys.argv[1:]
if given[-2:] == ["-h", "long"]:
    sys.exit(print("{option} parameter  set it"))
video = given[given.index("-i") + 1]
print(os.path.basename(video), file=open(__file__ + ".calls", "a"))
frames = open(video, "rb").read()
if frames.startswith(b"broken"):
    sys.exit(video + ": moov atom not found")
if frames.startswith(b"damaged"):
    print("Error at MB: 9", file=sys.stderr)
    frames = bytes(3 * 240 * 320 * 2)
if "{option} {value}" not in " ".join(given[given.index("-i"):]):
    frames = frames[:3 * 240 * 320] * (len(frames) // (3 * 240 * 320))      # fills up by time stamps
if "-noautorotate" not in given[:given.index("-i")]:
    frames = frames[::-1]
sys.stdout.buffer.write(frames)
"""


@pytest.fixture
def calls(request, tmp_path, monkeypatch):
    """An `ffmpeg` that writes out what a test has put into the video file -> the log of its calls.

    Like the real one it repeats and drops frames, and turns them, unless it is told not to."""
    option, value = getattr(request, "param", "-fps_mode passthrough").split()
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(STUB.format(python=sys.executable, option=option, value=value))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program.with_name("ffmpeg.calls")


def run(capsys, *arguments):
    status = prepare.main([*map(str, arguments), "--jobs", "2"])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("calls", ["-fps_mode passthrough", "-vsync 0"], ids=["new", "old"], indirect=True)
def test_surreal(tmp_path, calls, capsys):
    """From videos to a layout that the loader reads: the published crop, dots at the keypoints."""
    raw = tmp_path / "raw"
    out = tmp_path / "out"
    first = make_clip(raw / "cmu/train/run0/01", "a", 3) + make_clip(raw / "cmu/train/run0/01", "b", 1)
    make_clip(raw / "cmu/train/run1/02", "c", 2, 1)
    make_clip(raw / "cmu/train/run2/03", "d", 2, 2)
    status, printed, errors = run(capsys, "surreal", raw, out)
    assert status == 0 and errors == ""
    assert "run0.json: 4 frames of 2 clips, 0 clips failed" in printed
    entries = json.loads((out / "train/run0.json").read_text())
    assert [sample["name"][3:-4] for sample in entries] == ["a_f000", "a_f001", "a_f002", "b_f000"]
    assert not list(out.glob("**/*.parts")) and not list(out.glob("**/*.tmp"))
    for sample, places in zip(entries, first):
        side = min(round(1.5 * np.ptp(places, 0).max()), 240)
        corner = np.round((places.min(0) + places.max(0) - side) / 2).clip(0, [320 - side, 240 - side])
        np.testing.assert_allclose(sample["keypoint2d"], places - corner, atol=1e-3)
        assert sample["size"] == side
    check_dots(SURREAL(out, "train", 128))
    assert sorted(calls.read_text().split()) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    status, printed, _ = run(capsys, "surreal", raw / "cmu", out)
    assert status == 0 and printed.count("there already") == 3 and len(calls.read_text().split()) == 4


def test_surreal_goes_on(tmp_path, calls, capsys):
    """A run without clips, and a clip that fails, are named; the next start does what is left. Frames of
    nobody or a few pixels go."""
    folder = tmp_path / "raw" / "cmu" / "train" / "run0" / "01"
    arguments = "surreal", tmp_path / "raw", tmp_path / "out"
    folder.mkdir(parents=True)
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and "run0: no clips" in errors
    for clip in "abcdef":
        make_clip(folder, clip, 2)
    (folder / "b.mp4").write_bytes(b"broken")
    (folder / "c_info.mat").unlink()
    write_info(folder / "d_info.mat", np.zeros((2, 24, 3)))
    write_info(folder / "e_info.mat", np.full((2, 24, 2), np.nan))
    (folder / "f.mp4").write_bytes(b"damaged")
    status, printed, errors = run(capsys, *arguments)
    assert status == 1 and "2 frames of 1 clips, 5 clips failed" in printed
    for message in ("b.mp4: ffmpeg: .*moov atom not found", "c_info.mat", "e_info.mat: joints2D of shape",
                    "d.mp4: ffmpeg: 2 frames of 320 x 240 pixels; d_info.mat has 3 frames",
                    "f.mp4: ffmpeg: Error at MB"):
        assert re.search("failed: .*" + message, errors)
    for clip in "bcef":
        make_clip(folder, clip, 1)
    outside = np.full((24, 2), -50.0)
    tiny = np.linspace((100, 100), (109, 109), 24)
    write_info(folder / "d_info.mat", np.stack([outside, tiny, grid_points(24, 120, 0)]).T)
    (folder / "d.mp4").write_bytes(bytes(3 * 240 * 320 * 3))
    calls.unlink()
    status, printed, errors = run(capsys, *arguments)
    assert status == 0 and errors == "" and "7 frames of 6 clips, 0 clips failed" in printed
    assert sorted(calls.read_text().split()) == ["b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4"]
    entries = json.loads((tmp_path / "out" / "train" / "run0.json").read_text())
    assert [e["name"][3:-4] for e in entries] == ["a_f000", "a_f001", "b_f000", "c_f000", "d_f002", "e_f000",
                                                  "f_f000"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")
def test_uneven_time_stamps(tmp_path, capsys):
    """A video of growing gaps between its frames: every frame once, in order, with its own labels."""
    folder = tmp_path / "raw" / "cmu" / "train" / "run0" / "01"
    folder.mkdir(parents=True)
    frames = np.concatenate([np.full((1, 240, 320, 3), 25 * t, np.uint8) for t in range(10)])
    _, passthrough = prepare.find_ffmpeg()
    made = subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-s", "320x240", "-pix_fmt", "rgb24",
                           "-r", "100", "-i", "pipe:0", "-vf", "setpts=N*N+N", *passthrough,
                           "-c:v", "mpeg4", "-q:v", "1", str(folder / "a.mp4")],
                          input=frames.tobytes(), capture_output=True)
    if made.returncode:
        pytest.skip(f"this ffmpeg cannot write such a video: {made.stderr.decode()[:200]}")
    write_info(folder / "a_info.mat", np.stack([grid_points(24, 200, t) for t in range(10)]).T)
    assert run(capsys, "surreal", tmp_path / "raw", tmp_path / "out")[0] == 0
    for t, sample in enumerate(json.loads((tmp_path / "out" / "train" / "run0.json").read_text())):
        assert sample["name"] == f"01/a_f{t:03d}.jpg"
        with Image.open(tmp_path / "out" / "train" / "run0" / sample["name"]) as crop:
            assert abs(np.asarray(crop).mean() - 25 * t) < 8
    whole = (folder / "a.mp4").read_bytes()
    at = whole.index(b"mdat") + 700
    (folder / "a.mp4").write_bytes(whole[:at] + bytes(b ^ 0x5A for b in whole[at:at + 30]) + whole[at + 30:])
    status, _, errors = run(capsys, "surreal", tmp_path / "raw", tmp_path / "again")
    assert status == 1 and "a.mp4: ffmpeg: " in errors              # it fills damaged frames in


def test_human36m(tmp_path, capsys):
    """Every fifth image: world to camera to picture to crop; dots at the loader's keypoints; going on."""
    raw = tmp_path / "raw"
    out = tmp_path / "out"
    for subject in (1, 5, 6, 7, 8):
        kept, places = make_human36m_release(raw, subject)
    status, printed, errors = run(capsys, "human36m", raw, out)
    assert (status, errors) == (0, "") and printed.count("2 images, 0 failed") == 5
    listed = out / "annotations" / "keypoints2d_8.json"
    entries = json.loads(listed.read_text())
    assert [sample["name"] for sample in entries] == kept
    for sample in entries:
        points = places[sample["name"]]
        side = round(1.5 * np.ptp(points, 0).max())
        expected = (points - np.round((points.min(0) + points.max(0) - side) / 2) + 0.5) * 512 / side - 0.5
        np.testing.assert_allclose(sample["keypoint2d"], expected, atol=1e-3)
    check_dots(Human36M(out, "train", 256))
    listed.unlink()
    before = (out / "crop_images" / kept[0]).stat().st_mtime_ns
    (raw / "images" / kept[1]).write_bytes(b"no image")
    status, printed, errors = run(capsys, "human36m", raw, out)
    assert status == 1 and printed.count("there already") == 4 and "1 images, 1 failed; delete it" in printed
    assert re.search("failed: .*f_000005.jpg: .*cannot identify image", errors)
    assert (out / "crop_images" / kept[0]).stat().st_mtime_ns == before
    assert len(json.loads(listed.read_text())) == 1


def test_bad_human36m_release(tmp_path, capsys):
    make_human36m_release(tmp_path, 1)
    for kind, change, message in (
            ("camera", lambda text: text.replace("R", "Q"), "KeyError: 'R'"),
            ("data", lambda text: text.replace('"frame_idx": 0', '"frame_idx": 99'), "KeyError: '99'"),
            ("data", lambda text: text.replace("s_01/", "/etc/"), "'/etc/.* is no path"),
            ("joint_3d", lambda text: re.sub("-?[0-9.]{4,}", "NaN", text), "behind the camera"),
            ("joint_3d", lambda text: text[:-1], "joint_3d.json: JSONDecodeError")):
        file = tmp_path / "annotations" / f"Human36M_subject1_{kind}.json"
        whole = file.read_text()
        file.write_text(change(whole))
        status, _, errors = run(capsys, "human36m", tmp_path, tmp_path / "out")
        assert status == 2 and re.search("Human36M_subject1_.*" + message, errors), errors
        file.write_text(whole)
    for image in (tmp_path / "images").rglob("*.jpg"):
        image.write_bytes(b"")
    assert run(capsys, "human36m", tmp_path, tmp_path / "out")[0] == 2
    assert not [*(tmp_path / "out").rglob("*.json")]             # it would look finished


@pytest.mark.parametrize("dataset, there, message", [
    ("surreal", "cmu/train/run0", "ffmpeg: not found.*apt-get install ffmpeg"),
    ("surreal", "cmu", "no SURREAL release; give the directory that holds cmu/train/run0"),
    ("human36m", "images", "Human36M_subject1_data.json: missing; give the directory")])
def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys, dataset, there, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / there).mkdir(parents=True)
    status, _, errors = run(capsys, dataset, tmp_path, tmp_path / "out")
    assert status == 2 and re.search(message, errors) and errors.count("\n") == 1
