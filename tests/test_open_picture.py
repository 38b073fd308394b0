"""One function opens a picture for all: upright, 8-bit RGB, in the loaders and for photographs."""
import struct

import numpy as np
import pytest
from PIL import Image

import data
from data import LSP, SURREAL, DataError, open_picture
from miniatures import check_dots, make_surreal, make_tree

ORIENTATIONS = range(1, 9)
LOSSLESS = {".png": {}, ".tif": {}, ".webp": {"lossless": True, "exact": True}, ".gif": {},
            ".jpg": {"quality": 95, "subsampling": 0}}


def turned(upright, orientation):
    """How EXIF stores an upright picture (H, W, ...) in each orientation: the side of the picture at which
    its row 0 and column 0 lie is 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5 left top,
    6 right top, 7 right bottom, 8 left bottom."""
    if orientation >= 5:
        upright = upright.swapaxes(0, 1)                            # rows are columns now
    if orientation in (3, 4, 6, 7):
        upright = upright[::-1]
    if orientation in (2, 3, 7, 8):
        upright = upright[:, ::-1]
    return np.ascontiguousarray(upright)


def save_turned(path, upright, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(turned(upright, orientation)).save(path, exif=exif, **LOSSLESS[path.suffix])
    return path


def scene(width, height):
    """A smooth picture (H, W, 3) without symmetry."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def seen(path):
    """What `open_picture` gives, (H, W, 3) int."""
    image = open_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_upright(tmp_path, suffix, orientation):
    upright = scene(48, 35)
    path = save_turned(tmp_path / f"a{suffix}", upright, orientation)
    assert seen(path).shape == (35, 48, 3) and data.picture_sides(path) == (48, 35)
    assert np.abs(seen(path) - upright).max() <= (8 if suffix == ".jpg" else 0)


def test_labels_of_photographs_are_as_displayed(tmp_path):
    """Photographs of every orientation, large ones reduced by the JPEG decoder: dots at the keypoints."""
    make_tree(tmp_path, False, [(200, 100), (90, 161), (601, 402), (303, 607)] * 8)
    for i, path in enumerate(sorted((tmp_path / "images").iterdir())):
        save_turned(path, np.asarray(Image.open(path)), ORIENTATIONS[i // 4])
    for size in (64, 100):
        check_dots(LSP(tmp_path, "train", size), tolerance=0.35)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_crops_are_turned_as_well(tmp_path, suffix):
    """Square crops, of which only the header is read for their side."""
    names, _ = make_surreal(tmp_path, suffix=suffix[1:])
    for orientation, name in zip([2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 2], names):
        save_turned(tmp_path / name, np.asarray(Image.open(tmp_path / name)), orientation)
    check_dots(SURREAL(tmp_path, "train", 64))


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path):
    """407 x 300 pixels of which 90 x 70 suffice: a quarter, 102 x 75; the last column is covered in part."""
    for orientation, box in ((1, (0, 0, 101.75, 75)), (2, (0.25, 0, 102, 75)), (6, (0.25, 0, 102, 75)),
                             (8, (0, 0, 101.75, 75))):
        path = save_turned(tmp_path / "a.jpg", scene(407, 300), orientation)
        picture = data.decode_picture(path, (90, 70))
        assert picture.image.size == (102, 75) and picture.sides == (407, 300) and picture.box == box
        small = np.asarray(Image.fromarray(scene(408, 300)).reduce(4)).astype(int)
        assert np.abs(np.asarray(picture.image) - small)[:, 1:-1].mean() < 4


EXIF = b"Exif\0\0II*\0\x08\0\0\0"  # one tag follows: 0x0112, the orientation
BLOCKS = {"no EXIF": b"hello", "tags cut off": EXIF + b"\xff\xff",
          "a text": EXIF + b"\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
          "nine": EXIF + b"\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0"}


@pytest.mark.filterwarnings("ignore::UserWarning")                 # Pillow's, of the damaged block
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path, suffix, block):
    path = tmp_path / f"a{suffix}"
    upright = scene(20, 10)
    Image.fromarray(upright).save(path, exif=BLOCKS[block], **LOSSLESS[suffix])
    assert np.abs(seen(path) - upright).max() <= 16 and data.picture_sides(path) == (20, 10)


RAMP = np.tile(np.arange(256), (4, 1))                             # every 8-bit grey


def grey_tiff(path, values, bits, order="<", sample_format=1):
    """A grey TIFF of `bits` per value, by hand."""
    packed = np.unpackbits(values.astype(">u4").view(np.uint8).reshape(4, 256, 4), axis=2)[..., 32 - bits:]
    body = np.packbits(packed.reshape(4, -1), axis=1).tobytes()
    if order == "<" and bits == 16:
        body = np.frombuffer(body, ">u2").astype("<u2").tobytes()
    tags = {256: 256, 257: 4, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(body),
            339: sample_format}
    short = {tag: struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()}
    ifd = struct.pack(order + "H", len(tags)) + b"".join(short.values()) + bytes(4)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(body))
    path.write_bytes(start + body + ifd)


@pytest.mark.parametrize("form", ["png", "tif", "big-endian tif", "12-bit tif", "jp2", "pgm", "10-bit pgm"])
def test_deep_grey_is_scaled_to_eight_bits(tmp_path, form):
    path = tmp_path / f"a.{form.split()[-1]}"
    deep = RAMP * 257
    if form == "12-bit tif":
        grey_tiff(path, RAMP * 4095 // 255, 12)
    elif path.suffix == ".tif":
        grey_tiff(path, deep, 16, ">" if form.startswith("big") else "<")
    elif form == "10-bit pgm":
        path.write_bytes(b"P5 256 4 1023\n" + (RAMP * 1023 / 255).round().astype(">u2").tobytes())
    elif form == "pgm":
        path.write_bytes(b"P5 256 4 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep.astype(np.uint16)).save(path)
    assert np.abs(seen(path) - RAMP[..., None]).max() <= 1


def test_values_without_a_range_are_refused(tmp_path):
    Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "integer.tif")
    grey_tiff(tmp_path / "signed.tif", RAMP * 100, 16, sample_format=2)
    for name, kind in (("float", "floating point"), ("integer", "32-bit integers"), ("signed", "32-bit")):
        with pytest.raises(DataError, match=f"{name}.tif: its values are {kind}.*; save it anew with 8 or"):
            open_picture(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_show_mid_grey(tmp_path, suffix, mode):
    """Alpha 0, 128 and 255 over a colour that the first hides: grey, the mean of both, the colour."""
    pixels = np.zeros((6, 9, 4), np.uint8)
    pixels[..., :3] = (250, 10, 20)
    pixels[..., 3] = np.repeat([0, 128, 255], 3)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / f"a{suffix}", **LOSSLESS[suffix])
    colour = np.array(image.convert("RGB").getpixel((8, 0)))
    expected = np.stack([[128] * 3, (colour * 128 + 128 * 127) / 255, colour])
    assert np.abs(seen(tmp_path / f"a{suffix}")[0, ::4] - expected).max() <= 1


@pytest.mark.parametrize("form, transparent, expected", [
    ("P.png", 1, [10, 128, 70, 200]), ("P.gif", 1, [10, 128, 70, 200]),
    ("P.png", bytes([255, 0, 128, 255]), [10, 128, 99, 200]), ("L.png", 40, [10, 128, 70, 200]),
    ("RGB.png", (40, 40, 40), [10, 128, 70, 200]), ("I;16.png", 40 * 257, [10, 128, 70, 200])])
def test_a_transparent_colour_shows_mid_grey(tmp_path, form, transparent, expected):
    """One colour, or an alpha per colour of a palette: 70 at alpha 128 is (70 * 128 + 128 * 127) / 255."""
    mode, suffix = form.split(".")
    grey = np.array([[10, 40, 70, 200]] * 3, np.uint8)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2, 3]] * 3, np.uint8))
        image.putpalette(grey[0].repeat(3).tolist())
    elif mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / f"a.{suffix}", transparency=transparent)
    assert np.abs(seen(tmp_path / f"a.{suffix}")[0] - np.array(expected)[:, None]).max() <= 1


def test_other_modes_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(seen(tmp_path / "a.jpg") - [255, 0, 0]).max() < 4
    Image.new("1", (8, 8), 1).save(tmp_path / "a.png")
    assert (seen(tmp_path / "a.png") == 255).all()


@pytest.mark.filterwarnings("ignore::UserWarning")                 # Pillow's, of a TIFF cut off
@pytest.mark.parametrize("suffix", LOSSLESS)
def test_damaged_pictures_are_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match=f"a{suffix}: missing"):
        open_picture(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:20], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"a{suffix}: (cannot be decoded|not a readable image).*; fetch"):
            open_picture(path)
