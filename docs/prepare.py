"""Original releases of SURREAL and Human3.6M -> the layouts that the loaders of data.py read.

    python -m docs.prepare surreal RAW OUT [--jobs N]
    python -m docs.prepare human36m RAW OUT [--jobs N]

docs/datasets.md describes both layouts. A command that was stopped goes on where it was when it is started
again. It exits with 1 where clips or pictures failed (the first 20 are named), and with 2 where it could not
go on.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from data import (DataError, Progress, find_annotation, is_safe_path, open_picture, read_mat, replacing,
                  square_box, write_text)


def in_processes(work, tasks, jobs, title):
    """work(*task) for all tasks in `jobs` processes -> (results, messages of the tasks that failed)."""
    show = Progress(title)
    results = []
    errors = []
    pool = ProcessPoolExecutor(max(jobs, 1))
    try:
        futures = [pool.submit(work, *task) for task in tasks]
        for task, future in zip(tasks, futures):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                raise
            except Exception as error:  # whatever is wrong with one file, the others are done
                errors.append(f"{task[0]}: " + str(error).removeprefix(f"{task[0]}: "))
            show(len(results) + len(errors), len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)
    return results, errors


def save_crop(picture, box, side, file, name, keypoints):
    """Save a box (left, top, right, bottom) of an RGB picture, resized to a square of `side` pixels.

    A crop that is there already stays. keypoints: (K, 2) pixels of the picture. Returns the sample's entry
    in the annotation file, JSON in one line."""
    if not file.is_file():
        crop = picture.resize((side, side), Image.Resampling.BICUBIC, box)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            crop.save(stream, "JPEG", quality=95)
    scale = side / (box[2] - box[0])
    keypoints = (keypoints - box[:2] + 0.5) * scale - 0.5  # pixel i covers i - 1/2 ... i + 1/2
    return json.dumps({"name": name, "keypoint2d": np.round(keypoints, 3).tolist(), "size": side})


def write_entries(file, entries):
    """Write entries of `save_crop` as one JSON list."""
    write_text(file, "[\n" + ",\n".join(entries) + "\n]\n")


# --- SURREAL: videos, each with a MATLAB file --------------------------------------------------------------

WIDTH = 320     # of all its videos
HEIGHT = 240


def prepare_surreal(raw, out, jobs):
    """SURREAL's original release (the directory of `cmu`, or `cmu` itself) -> the layout of data.SURREAL.

    A frame is cropped to its `square_box`. Frames that show no joint, or whose crop would be smaller than 16
    pixels, are left out. Started again, it does the clips that are not done. Yields, per run, a summary and
    the messages of the clips that failed."""
    if (raw / "cmu").is_dir():
        raw = raw / "cmu"
    runs = []
    for split in ("train", "val", "test"):
        runs += sorted((raw / split).glob("run[012]"))
    if not runs:
        raise FileNotFoundError(f"{raw}: no SURREAL release; give the directory that holds cmu/train/run0")
    decoder = None
    for folder in runs:
        run = folder.relative_to(raw)
        listed = out / f"{run}.json"
        parts = out / f"{run}.parts"  # the entries of each clip that is done
        if listed.is_file() and not parts.is_dir():
            yield f"{listed}: there already; delete it to take new clips", []
            continue
        decoder = decoder or find_ffmpeg()
        parts.mkdir(parents=True, exist_ok=True)
        tasks = []
        clips = []
        for video in sorted(folder.glob("*/*.mp4")):
            part = parts / f"{video.parent.name}--{video.stem}.json"
            clips.append(part)
            if not part.is_file():
                tasks.append((video, decoder, out / run, part))
        if not clips:
            raise DataError(f"{folder}: no clips SEQUENCE/*.mp4; is the release unpacked?")
        _, errors = in_processes(prepare_clip, tasks, jobs, f"{run}: clip")
        done = [part.read_text() for part in clips if part.is_file()]
        entries = "".join(done).splitlines()
        write_entries(listed, entries)
        if not errors:
            shutil.rmtree(parts)  # kept otherwise: the next start tries only the failed clips
        yield f"{listed}: {len(entries)} frames of {len(done)} clips, {len(errors)} clips failed", errors


def find_ffmpeg():
    """The path of ffmpeg, and its options for passing every frame on once, whatever its time stamp."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise FileNotFoundError("ffmpeg: not found; it decodes the videos: `apt-get install ffmpeg`")
    options = subprocess.run([ffmpeg, "-hide_banner", "-h", "long"], capture_output=True,
                             stdin=subprocess.DEVNULL).stdout
    if b"-fps_mode" in options:
        return ffmpeg, ("-fps_mode", "passthrough")
    return ffmpeg, ("-vsync", "0")  # before version 5.1


def prepare_clip(video, decoder, folder, part):
    """Write the crops of a clip, then its entries, one per line."""
    info = video.with_name(f"{video.stem}_info.mat")
    points = np.atleast_3d(read_mat(info, "joints2D")).T.astype(np.float64)  # (T, 24, 2)
    if points.shape[1:] != (24, 2) or not (np.abs(points) < 1e6).all():
        raise DataError(f"{info}: joints2D of shape {points.T.shape} is not (2, 24, T) pixel coordinates")
    entries = []
    for t, picture in enumerate(decode_frames(video, decoder, info, len(points))):
        corner, side = square_box(points[t].min(0), points[t].max(0), (WIDTH, HEIGHT))
        seen = ((points[t] >= 0) & (points[t] <= (WIDTH - 1, HEIGHT - 1))).all(-1)
        if side < 16 or not seen.any():
            continue
        name = f"{video.parent.name}/{video.stem}_f{t:03d}.jpg"
        box = (*corner, *(corner + side))
        entries.append(save_crop(Image.fromarray(picture), box, int(side), folder / name, name, points[t]))
    write_text(part, "".join(entry + "\n" for entry in entries))


def decode_frames(video, decoder, info, count):
    """The `count` frames of a video as they are stored, (count, 240, 320, 3) uint8."""
    ffmpeg, passthrough = decoder
    command = [ffmpeg, "-v", "error", "-nostdin", "-threads", "1", "-noautorotate",
               "-i", str(video.resolve()), *passthrough,
               "-frames:v", str(count + 1),  # one more, to see when there are too many
               "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    frames = len(done.stdout) / (HEIGHT * WIDTH * 3)
    # A damaged frame is an error message, but ffmpeg fills it in and exits with 0.
    if done.returncode or done.stderr or frames != count:
        said = done.stderr.decode("utf-8", "replace").strip()
        said = said or f"{frames:.10g} frames of {WIDTH} x {HEIGHT} pixels"
        raise DataError(f"ffmpeg: {said}; {info.name} has {count} frames; fetch both again")
    return np.frombuffer(done.stdout, np.uint8).reshape(count, HEIGHT, WIDTH, 3)


# --- Human3.6M: photographs, annotated in JSON files -------------------------------------------------------

JOINTS = [3, 2, 1, 4, 5, 6, 0, 11, 8, 10, 16, 15, 14, 11, 12, 13]  # of its 17: those of BODY16
CROP = 512  # pixels


def prepare_human36m(raw, out, jobs):
    """Human3.6M's JSON release -> the layout of data.Human36M.

    Every fifth frame is cropped to its `square_box` and resized to 512 x 512. Started again, it goes on.
    Yields, per subject, a summary and the messages of the pictures that failed."""
    found = "annotations/Human36M_subject{}_data.json"
    subjects = [n for n in (1, 5, 6, 7, 8, 9, 11) if (raw / found.format(n)).is_file()]
    if not subjects:
        find_annotation(raw, found.format(1))
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        listed = out / f"annotations/keypoints2d_{subject}.json"
        if listed.is_file():
            yield f"{listed}: there already", []
            continue
        tasks = []
        for name, keypoints in project_subject(raw / "annotations", subject):
            tasks.append((raw / "images" / name, out / "crop_images" / name, name, keypoints))
        entries, errors = in_processes(crop_photograph, tasks, jobs, f"subject {subject}: image")
        if not entries:  # an empty list would look finished at the next start
            first = errors[0] if errors else "none is listed"
            raise DataError(f"subject {subject}: no image could be read: {first}")
        write_entries(listed, entries)
        again = "; delete it to try these again" if errors else ""
        yield f"{listed}: {len(entries)} images, {len(errors)} failed{again}", errors


def project_subject(folder, subject):
    """Annotations of a subject -> [(file name, keypoints (16, 2) in pixels of the photograph)]."""
    samples = []
    loaded = []
    try:
        for kind in ("camera", "data", "joint_3d"):
            file = folder / f"Human36M_subject{subject}_{kind}.json"
            loaded.append(json.loads(file.read_text(encoding="utf-8-sig")))
        cameras, images, joints = loaded
        file = folder / f"Human36M_subject{subject}_*.json"
        for image in images["images"][::5]:
            name = image["file_name"]
            of_subaction = joints[str(image["action_idx"])][str(image["subaction_idx"])]
            world = np.array(of_subaction[str(image["frame_idx"])], np.float64).reshape(17, 3)[JOINTS]
            world[7] = (world[12] + world[13]) / 2  # the thorax is the middle of the shoulders
            camera = cameras[str(image["cam_idx"])]
            rotation, t, f, c = (np.array(camera[key], np.float64) for key in ("R", "t", "f", "c"))
            seen = world @ rotation.reshape(3, 3).T + t.reshape(3)
            if not is_safe_path(name) or not (seen[:, 2] > 0).all():  # NaN compares as False
                raise ValueError(f"{str(name)[:60]!r} is no path, or its joints are behind the camera")
            samples.append((name, seen[:, :2] / seen[:, 2:] * f + c))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{file}: {type(error).__name__}: {error}; fetch it again") from error
    return samples


def crop_photograph(source, target, name, keypoints):
    """Cut the square around a person's keypoints (K, 2) out of a picture, and save it."""
    picture = open_picture(source)
    corner, side = square_box(keypoints.min(0), keypoints.max(0), picture.size)
    return save_crop(picture, (*corner, *(corner + side)), CROP, target, name, keypoints)


# --- Command line ------------------------------------------------------------------------------------------

DATASETS = {"surreal": prepare_surreal, "human36m": prepare_human36m}


def main(arguments=None):
    """Returns the exit status: 1 where clips or pictures failed, 2 where it could not go on."""
    parser = argparse.ArgumentParser(prog="python -m docs.prepare",
                                     description="Original releases -> the loaders' layouts.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("raw", type=Path, help="directory of the original release")
    parser.add_argument("out", type=Path, help="directory to fill; started again, it goes on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    given = parser.parse_args(arguments)
    failures = []
    try:
        for line, errors in DATASETS[given.dataset](given.raw, given.out, given.jobs):
            print(line)
            failures += errors
    except (DataError, OSError, BrokenProcessPool) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for message in failures[:20]:
        print(f"failed: {message}", file=sys.stderr)
    if len(failures) > 20:
        print(f"failed: {len(failures) - 20} more", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
