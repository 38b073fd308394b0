"""`predict`: keypoints are found where the photograph has them, whatever its size, mode, orientation and box; files that
cannot be read are named and the rest is done. Expected places are drawn into the photographs here or worked out by hand."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import train

# Colours far apart, one for each of the first keypoints, on black.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


def dots(size, places, radius):
    """A black picture with dots, by keypoint colour, centred on places (x, y): pixel i reaches from i - 1/2 to i + 1/2."""
    scale = 4 if max(size) < 1000 else 1
    columns, rows = ((np.arange(scale * n) + 0.5) / scale - 0.5 for n in size)
    image = np.zeros((len(rows), len(columns), 3), dtype=np.uint8)
    for (x, y), colour in zip(places, COLOURS):
        image[(columns - x) ** 2 + (rows[:, None] - y) ** 2 <= radius ** 2] = colour
    return Image.fromarray(image).reduce(scale)


def colour_finder():
    """In place of a network: keypoint k is the centre of what has colour k."""
    def decode(crops):
        images = crops.float() / 255
        target = torch.tensor(COLOURS).float() / 255
        far = (images[:, None] - target[None, :, :, None, None]).abs().amax(2)                      # (B, 6, S, S)
        weight = (far < 0.4).double()
        line = torch.arange(crops.shape[-1], dtype=torch.float64)
        mass = weight.sum((2, 3)).clamp(min=1e-9)
        xy = torch.stack([(weight.sum(2) * line).sum(-1) / mass, (weight.sum(3) * line).sum(-1) / mass], -1)
        keypoints = torch.zeros(len(crops), 16, 2, dtype=torch.float64)
        keypoints[:, :6] = xy
        return keypoints.float(), torch.ones(len(crops), 16)
    return decode


def find(tmp_path, image, name="p.png", box=None, size=128, decode=None, **save):
    """The photograph through `predict_photographs`: keypoints (K, 2) of its JSON, the JSON, the picture."""
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    image.save(tmp_path / "in" / name, **save)
    failed = train.predict_photographs(decode or colour_finder(), data.BODY16, size, [(tmp_path / "in" / name, "p")],
                                       tmp_path / "out", box)
    assert failed == 0
    result = json.loads((tmp_path / "out" / "p.json").read_text())
    with Image.open(tmp_path / "out" / "p.jpg") as picture:
        picture.load()
    return np.array([[k["x"], k["y"]] for k in result["keypoints"]]), result, picture


PLACES = np.array([(30.0, 20.0), (170.0, 25.0), (100.0, 60.0), (40.0, 110.0), (165.0, 105.0), (100.0, 20.0)])


# Geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, factor", [((200, 130), 1), ((130, 200), 1), ((200, 200), 1), ((3000, 1950), 15),
                                          ((100, 65), 0.5)])
def test_keypoints_are_in_the_photographs_pixels(size, factor, tmp_path):
    """Landscape, portrait, square, far larger and smaller than the crop: to a fraction of a pixel of the crop."""
    places = PLACES if size != (130, 200) else PLACES[:, ::-1]
    places = (places + 0.5) * factor - 0.5
    found, result, picture = find(tmp_path, dots(size, places, 6 * factor))
    assert (result["width"], result["height"]) == size == picture.size
    assert np.abs(found[:6] - places).max() < 0.3 * max(size) / 128
    assert [k["name"] for k in result["keypoints"]] == list(data.BODY16.names) and result["box"] is None


def test_the_view_by_hand():
    """A 200 x 100 photograph in a 64 x 64 crop: scale 0.32, 32 rows, 16 above. Its first pixel's centre, 1/2 from the edge,
    is at 0.32 / 2 - 1/2 in x, and 16 further in y; its last pixel's at 64 - 0.16 - 1/2."""
    image = Image.new("RGB", (200, 100), (9, 8, 7))
    crop, view = train.crop_photograph(image, (0, 0, 200, 100), 64)
    points = torch.tensor([[0.0, 0.0], [199.0, 99.0]], dtype=torch.float64)
    expected = torch.tensor([[-0.34, 15.66], [63.34, 47.34]], dtype=torch.float64)
    assert torch.allclose(data.map_keypoints(points, view), expected, atol=1e-9)
    assert torch.allclose(data.map_keypoints(expected, data.invert_view(view)), points, atol=1e-9)
    assert crop[:, 16:48].flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]
    assert not crop[:, :16].any() and not crop[:, 48:].any()


def test_cells_of_a_network_in_the_photographs_pixels(tmp_path):
    """A network whose heatmaps peak at known cells. Photograph 400 x 300, crop 64, stride 4: scale 0.16, 48 rows, 8 above;
    cell (cx, cy) is crop pixel (4 cx, 4 cy), so x = (4 cx + 1/2) / 0.16 - 1/2, y = (4 cy - 8 + 1/2) / 0.16 - 1/2."""
    cells = torch.stack([torch.arange(16) % 16, (torch.arange(16) * 7) % 16], -1)

    class Network(torch.nn.Module):
        def forward(self, images):
            maps = torch.zeros(len(images), 16, 16, 16)
            maps[:, torch.arange(16), cells[:, 1], cells[:, 0]] = 0.75
            return maps, torch.zeros(len(images), 3)

    settings = train.make_settings("demo", architecture="resnet18", image_size=64, subcell=False)
    trainer = train.Trainer(settings, data.BODY16, None, torch.device("cpu"))
    network = Network()
    found, result, _ = find(tmp_path, Image.new("RGB", (400, 300)), size=64,
                            decode=lambda crops: trainer.decode(network, crops))
    expected = (4 * cells.numpy() - np.array([0, 8]) + 0.5) / 0.16 - 0.5
    assert np.abs(found - expected).max() < 1e-3
    assert {k["confidence"] for k in result["keypoints"]} == {0.75}


@pytest.mark.parametrize("box", [(100, 60, 80, 70), (0, 0, 40, 130), (150.5, 80.25, 90, 90), (-20, -20, 100, 70)])
def test_a_box_is_looked_at_closely(box, tmp_path):
    """A dot inside the box, six times smaller in the whole photograph than in the box's crop, is where it was drawn."""
    x, y, w, h = box
    centre = np.array([[max(x, 0) + 0.4 * min(w, 200 - max(x, 0)), max(y, 0) + 0.6 * min(h, 130 - max(y, 0))]])
    found, result, picture = find(tmp_path, dots((200, 130), centre, 3), box=box)
    assert np.abs(found[0] - centre[0]).max() < 0.5 and result["box"] == list(box)
    assert picture.size == (200, 130)


def test_a_box_shows_its_surroundings_where_the_photograph_has_them():
    """A tall box becomes a square about its centre; at the photograph's edge it is cut there."""
    assert train.photograph_region((200, 130), (100, 60, 20, 60)) == (80, 60, 140, 120)
    assert train.photograph_region((200, 130), (0, 60, 20, 60)) == (0, 60, 40, 120)
    assert train.photograph_region((200, 130), None) == (0, 0, 200, 130)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """The stored pixels turned as a camera does; keypoints, width and height are those of the upright photograph."""
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
            7: T.TRANSVERSE, 8: T.ROTATE_270}[orientation]
    upright = dots((200, 130), PLACES, 6)
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, result, picture = find(tmp_path, stored, "p.jpg", exif=exif, quality=95)
    assert (result["width"], result["height"]) == (200, 130) == picture.size
    assert np.abs(found[:6] - PLACES).max() < 0.6


# Formats and modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, save", [("p.PNG", {}), ("p.JPG", {"quality": 95, "subsampling": 0}),
                                        ("p.jpeg", {"quality": 95}), ("p.WebP", {"lossless": True})])
def test_formats(name, save, tmp_path):
    found, _, _ = find(tmp_path, dots((200, 130), PLACES, 6), name, **save)
    assert np.abs(found[:6] - PLACES).max() < 0.6


def test_colour_modes(tmp_path):
    """Palette, alpha, palette with transparency, CMYK: the colours arrive; what is transparent becomes white."""
    image = dots((200, 130), PLACES, 6)
    for converted, name in ((image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16), "p.png"),
                            (image.convert("RGBA"), "p.png"), (image.convert("CMYK"), "p.jpg")):
        found, _, _ = find(tmp_path, converted, name, **({"quality": 95} if name == "p.jpg" else {}))
        assert np.abs(found[:6] - PLACES).max() < 0.6, converted.mode
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.where(np.asarray(image).any(-1), 255, 0).astype(np.uint8)))
    _, _, picture = find(tmp_path, clear)
    assert picture.getpixel((199, 129)) == (255, 255, 255)
    palette = Image.new("P", (200, 130), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (100, 0, 200, 130))
    palette.save(tmp_path / "clear.png", transparency=0)
    rgb = train.read_photograph(tmp_path / "clear.png")
    assert rgb.getpixel((5, 5)) == (255, 255, 255) and rgb.getpixel((150, 5)) == (200, 100, 50)


def test_greys(tmp_path):
    """A ramp in 8 and 16 bits and in floating point, and black and white: the same grey in all."""
    ramp = np.linspace(0, 255, 256)[None].repeat(8, 0)
    pictures = {"L": Image.fromarray(ramp.astype(np.uint8)), "I;16": Image.fromarray((ramp * 257).astype(np.uint16)),
                "F": Image.fromarray((ramp / 3 - 7).astype(np.float32)), "I": Image.fromarray((ramp * 257).astype(np.int32))}
    for mode, picture in pictures.items():
        assert picture.mode == mode
        rgb = np.asarray(train.to_rgb(picture)).astype(int)
        assert rgb.shape == (8, 256, 3) and np.abs(rgb - ramp[..., None]).max() <= 1, mode
    pictures["I;16"].save(tmp_path / "grey.png")
    assert np.abs(np.asarray(train.read_photograph(tmp_path / "grey.png")).astype(int) - ramp[..., None]).max() <= 1
    for mode in ("1", "LA", "PA", "RGBX", "RGBa", "YCbCr", "LAB", "HSV", "I;16B", "I;16L"):
        assert train.to_rgb(Image.new(mode, (3, 2))).mode == "RGB", mode


# The picture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, width", [((64, 48), 1.5), ((400, 300), 4), ((3000, 2000), 30)])
def test_the_skeleton_is_drawn_where_the_keypoints_are(size, width, tmp_path):
    """A limb from r-ankle to r-knee, level, in the colour of the right side and as wide as the photograph is large."""
    keypoints = np.full((16, 2), np.nan)
    y = size[1] // 2
    keypoints[0], keypoints[1] = (0.2 * size[0], y), (0.8 * size[0], y)
    image = Image.new("RGB", size, (0, 60, 0))
    train.draw_photograph(tmp_path / "p.jpg", image, keypoints, np.ones(16), data.BODY16, size[0])
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.size == size
        picture = np.asarray(image).astype(int)
    red = (np.abs(picture - (240, 78, 88)) < 60).all(-1)
    column = red[:, size[0] // 2]
    assert column[y] and abs(column.sum() - width) <= 1 + 0.15 * width
    assert not red[:, :int(0.15 * size[0])].any() and (np.abs(picture[2, 2] - (0, 60, 0)) < 12).all()


# The command -------------------------------------------------------------------------------------------------


def make_run(folder, skeleton=data.BODY16, teacher=True, **changes):
    """A directory as an unfinished run leaves it: config.json and last.pt."""
    settings = train.make_settings("demo", **{"image_size": 32, **changes})
    trainer = train.Trainer(settings, skeleton, None, torch.device("cpu"))
    state = dict.fromkeys(train.CHECKPOINT)
    state.update(epoch=0, student=trainer.student.state_dict())
    if teacher:
        state["teacher"] = {name: value * 1.5 if value.is_floating_point() else value
                            for name, value in trainer.student.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    train.write_json(folder / "config.json", {**train.dataclasses.asdict(settings), "skeleton": train.dataclasses.asdict(skeleton)})
    train.save_checkpoint(folder / "last.pt", state)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "body")
    make_run(root / "hand", data.HAND21)
    make_run(root / "alone", teacher=False, method="source-only")
    return root


@pytest.fixture
def photographs(tmp_path):
    """Folder a: 1.jpg, 2.PNG, .hidden.png, notes.txt and a subfolder with deep.png; folder b: 1.png, 3.webp."""
    random = np.random.default_rng(0)
    for name in ("a/1.jpg", "a/2.PNG", "a/.hidden.png", "a/below/deep.png", "b/1.png", "b/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 45, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def predict(*arguments):
    return train.main(["predict", *map(str, arguments), "--device", "cpu"])


def read_all(out):
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def test_folders_files_and_equal_names(runs, photographs, capsys):
    """Folders without their subfolders; a file that is named twice is done once; equal names are told apart."""
    out = photographs / "out"
    assert predict(runs / "body", photographs / "a", photographs / "b", photographs / "a" / "1.jpg", "--out", out) == 0
    assert "4 of 4" in capsys.readouterr().out
    results = read_all(out)
    assert {name: Path(r["image"]).relative_to(photographs).as_posix() for name, r in results.items()} == {
        "1": "a/1.jpg", "2": "a/2.PNG", "1-2": "b/1.png", "3": "b/3.webp"}
    assert {p.name for p in out.iterdir()} == {name + suffix for name in results for suffix in (".jpg", ".json")}
    for result in results.values():
        assert [k["name"] for k in result["keypoints"]] == list(data.BODY16.names)


def test_batches_and_networks(runs, photographs):
    """The batch size changes nothing beyond rounding; the teacher is another network; 21 keypoints work alike."""
    outs = {}
    for name, run, options in (("one", "body", ["--batch-size", 1]), ("all", "body", []), ("hand", "hand", []),
                               ("teacher", "body", ["--network", "teacher"]), ("box", "body", ["--box", "5,5,20,20"])):
        assert predict(runs / run, photographs / "a", "--out", photographs / name, *options) == 0
        outs[name] = {key: np.array([[k["x"], k["y"], k["confidence"]] for k in r["keypoints"]])
                      for key, r in read_all(photographs / name).items()}
    assert all(np.allclose(outs["one"][key], outs["all"][key], atol=0.01) for key in outs["all"])
    assert not np.allclose(outs["teacher"]["1"], outs["all"]["1"]) and not np.allclose(outs["box"]["1"], outs["all"]["1"])
    assert outs["hand"]["1"].shape == (21, 3)
    names = [k["name"] for k in read_all(photographs / "hand")["1"]["keypoints"]]
    assert names == list(data.HAND21.names)


def test_a_skeleton_of_ones_own(photographs, capsys):
    """The skeleton is the run's, read from config.json; one that cannot be is refused in one line."""
    own = data.Skeleton(names=("nose", "l-ear", "r-ear"), limbs=((0, 1), (0, 2)), triplets=((1, 0, 2),), groups={"all": (0, 1, 2)},
                        root=(0,))
    run = make_run(photographs / "own", own)
    assert predict(run, photographs / "a", "--out", photographs / "out") == 0
    assert [k["name"] for k in read_all(photographs / "out")["1"]["keypoints"]] == ["nose", "l-ear", "r-ear"]
    assert train.saved_skeleton(run) == own
    config = json.loads((run / "config.json").read_text())
    good = config["skeleton"]
    for bad in (None, [], {**good, "limbs": [[0, 7]]}, {**good, "limbs": [[0]]}, {**good, "groups": 3}, {**good, "names": 5},
                {**good, "triplets": [[0, "1", 2]]}, {name: value for name, value in good.items() if name != "root"}):
        (run / "config.json").write_text(json.dumps({**config, "skeleton": bad}))
        assert predict(run, photographs / "a", "--out", photographs / "never") == 2
        error = capsys.readouterr().err
        assert "config.json: holds no skeleton" in error and error.count("\n") == 1
    assert not (photographs / "never").exists()


def damaged_files(folder):
    """Pictures that are none, by name."""
    folder.mkdir()
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    good.save(folder / "good.png")
    good.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:500])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    # A PNG of 30,000 x 30,000 pixels in a few kilobytes.
    line = b"\0" + bytes(30000 // 8)
    pack = zlib.compressobj()
    body = b"".join(pack.compress(line) for _ in range(30000)) + pack.flush()

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body)
                                      + chunk(b"IEND", b""))
    Image.new("1", (70000, 2)).save(folder / "long.png")
    return {"cut.jpg", "cut.png", "empty.jpg", "text.png", "link.png", "bomb.png", "long.png"}


@pytest.mark.parametrize("batch_size", [1, 32])
def test_damaged_files_are_named_and_the_rest_is_done(batch_size, runs, tmp_path, capsys):
    bad = damaged_files(tmp_path / "in")
    assert predict(runs / "body", tmp_path / "in", "--out", tmp_path / "out", "--batch-size", batch_size) == 1
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == len(bad) and all(line.startswith("train.py: ") for line in lines), output.err
    assert {Path(line.split(": ")[1]).name for line in lines} == bad
    assert "1 of 8" in output.out and set(read_all(tmp_path / "out")) == {"good"}


def test_a_box_outside_a_photograph_names_both(runs, photographs, capsys):
    Image.new("RGB", (200, 200)).save(photographs / "a" / "large.png")
    assert predict(runs / "body", photographs / "a", "--out", photographs / "out", "--box", "100,100,50,50") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "1.jpg" in lines[0] and all("100,100,50,50" in line and "45 x 30" in line for line in lines)
    assert set(read_all(photographs / "out")) == {"large"}


def test_mistakes_get_one_line(runs, photographs, capsys):
    (photographs / "none").mkdir()
    (photographs / "file").write_text("")
    shutil.copytree(runs / "body", photographs / "broken")
    (photographs / "broken" / "last.pt").write_bytes(b"junk")
    body, picture, out = runs / "body", photographs / "a" / "1.jpg", ["--out", photographs / "out"]
    for arguments, texts in (
            ([photographs / "none", picture, *out], ["none", "last.pt"]),
            ([photographs / "nowhere", picture, *out], ["nowhere"]),
            ([photographs / "broken", picture, *out], ["last.pt"]),
            ([body, photographs / "none", *out], ["none", "no photographs"]),
            ([body, photographs / "such.jpg", *out], ["such.jpg", "no such file"]),
            ([body, picture], ["--out"]),
            ([body, *out], ["image"]),
            ([body, picture, "--out", photographs / "file"], ["--out", "file"]),
            ([body, picture, "--out", photographs / "file" / "x"], ["--out", "file"]),
            ([body, picture, "--out", photographs / "a"], ["--out", "1.jpg"]),
            ([body, picture, *out, "--box", "1,2,3"], ["--box", "1,2,3"]),
            ([body, picture, *out, "--box", "1,2,0,3"], ["--box", "above 0"]),
            ([body, picture, *out, "--box", "1,2,nan,3"], ["--box"]),
            ([body, picture, *out, "--batch-size", "0"], ["--batch-size"]),
            ([body, picture, *out, "--network", "pupil"], ["--network"]),
            ([body, picture, *out, "--boxx", "1,1,1,1"], ["did you mean --box"]),
            ([runs / "alone", picture, *out, "--network", "teacher"], ["--network teacher", "source-only"])):
        assert predict(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("train.py: ") and error.count("\n") == 1 and all(text in error for text in texts), error
    assert not (photographs / "out").exists()


def test_the_crop_is_the_one_that_training_sees(tmp_path):
    """A photograph without a box is cropped as `data.LSP` crops it: the same pixels but for the JPEG decoder's shortcut."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "lspet"
    if not (shared / "joints.mat").exists():
        pytest.skip("photographs of LSP Extended (shared/lspet) are not here")
    dataset = data.LSP(shared, "test", 128)
    index = torch.arange(4)
    images, keypoints, visible = dataset[index]
    for i, file in enumerate(dataset.files[:4]):
        image = train.read_photograph(file)
        crop, view = train.crop_photograph(image, train.photograph_region(image.size, None), 128)
        assert F.l1_loss(crop.float(), images[i].float()) < 2
        back = data.map_keypoints(data.map_keypoints(keypoints[i].double(), data.invert_view(view)), view)
        assert torch.allclose(back, keypoints[i].double(), atol=1e-9)


def test_predictions_are_those_of_the_evaluation(tmp_path):
    """Square photographs of the network's own size: the keypoints are those that `evaluate` scores."""
    run = make_run(tmp_path / "r", image_size=32)
    dataset = data.Mannequin("target", "val", 32, 3)
    images, _, _ = dataset[torch.arange(3)]
    (tmp_path / "in").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy().copy()).save(tmp_path / "in" / f"{i}.png")
    assert predict(run, tmp_path / "in", "--out", tmp_path / "out") == 0
    trainer = train.Trainer(train.saved_settings(run), data.BODY16, None, torch.device("cpu"))
    state = torch.load(run / "last.pt", weights_only=True)
    trainer.load_networks(state["student"], state["teacher"], "last.pt")
    expected, confidence = trainer.predict(trainer.student, dataset)
    for i in range(3):
        result = read_all(tmp_path / "out")[str(i)]["keypoints"]
        assert np.allclose([[k["x"], k["y"]] for k in result], expected[i], atol=2e-3)
        assert np.allclose([k["confidence"] for k in result], confidence[i], atol=1e-3)
