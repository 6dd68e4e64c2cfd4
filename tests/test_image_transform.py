"""From image files to a network's input: geometry against slow references, and every kind of file."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny import pixels, save
from torchvision import transforms as tv

from attrib.datasets import Box, ImageFolder, ImageTransform
from attrib.datasets.depth import mark
from attrib.datasets.images import decode
from attrib.types import UNREADABLE, SampleError, UserError

SMALL = ImageTransform(16)
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def png(array: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    stream.seek(0)
    return stream


# Transform --------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(40, 31), (31, 40), (17, 90), (9, 9)])
@pytest.mark.parametrize("size", [24, (20, 24)])
def test_image_equals_torchvision(interpolation, shape, size):
    image = Image.fromarray(pixels(*shape))
    mode = tv.InterpolationMode(interpolation)
    normal = [tv.ToTensor(), tv.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))]
    pair = [size, size] if isinstance(size, int) else list(size)
    common = {"size": size, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": interpolation}

    crop = tv.Compose([tv.Resize(round(24 / 0.875), mode), tv.CenterCrop(pair), *normal])
    assert torch.equal(ImageTransform(**common, resize="crop").tensor(image), crop(image))
    squash = tv.Compose([tv.Resize(pair, mode), *normal])
    assert torch.equal(ImageTransform(**common, resize="squash").tensor(image), squash(image))


def test_one_channel_equals_torchvision_grayscale():
    image = Image.fromarray(pixels())
    ours = ImageTransform(16, mean=(0.5,), std=(0.2,)).tensor(image)
    theirs = tv.Compose([tv.Grayscale(), tv.Resize([16, 16]), tv.ToTensor(), tv.Normalize((0.5,), (0.2,))])(image)
    assert ours.shape == (1, 16, 16)
    assert torch.equal(ours, theirs)


def slow_mask(box, size, transform):
    """Every pixel's centre, carried back to the stored image by torchvision's own sizes."""
    width, height = size
    out_h, out_w = transform.size
    if transform.resize == "squash":
        new_w, new_h = out_w, out_h
    else:
        new_w, new_h = tv.Resize(transform.resize_size)(Image.new("L", size)).size
    left, top = round((new_w - out_w) / 2), round((new_h - out_h) / 2)
    mask = torch.zeros(out_h, out_w, dtype=torch.bool)
    for i in range(out_h):
        for j in range(out_w):
            x, y = (j + 0.5 + left) * width / new_w, (i + 0.5 + top) * height / new_h
            mask[i, j] = box.x1 <= x < box.x2 and box.y1 <= y < box.y2
    return mask


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("size", [(40, 31), (23, 70), (5, 6)])
def test_boxes_equal_the_slow_reference(resize, size):
    transform = ImageTransform((14, 18), resize=resize)
    rng = np.random.default_rng(1)
    boxes = []
    for _ in range(12):
        corner = rng.uniform(-0.4, 0.8, 2)
        box = Box(*(corner * size).tolist(), *((corner + rng.uniform(0.1, 1.0, 2)) * size).tolist())
        expected = slow_mask(box, size, transform)
        if expected.any():  # else the rule of one pixel, tested below, may apply
            assert torch.equal(transform.mask([box], size), expected)
            boxes.append(box)
    assert len(boxes) >= 6
    union = torch.stack([transform.mask([b], size) for b in boxes]).any(0)
    assert torch.equal(transform.mask(boxes, size), union)


def test_mask_of_an_image_that_is_resized_is_the_box():
    """The image's own pixels, resized, show the box where the mask says it is."""
    stored = np.zeros((30, 60, 3), dtype=np.uint8)
    stored[10:20, 20:40] = 255
    for resize in ("squash", "crop"):
        transform = ImageTransform(15, resize=resize, **HALF)
        mask = transform.mask([Box(20, 10, 40, 20)], (60, 30))
        seen = transform.tensor(Image.fromarray(stored))[0] > 0
        assert torch.equal(mask, seen)


def test_small_box_has_a_pixel_and_a_box_outside_has_none():
    transform = ImageTransform(16, resize="crop", resize_size=16)
    size = (320, 160)  # the crop shows x from 80 to 240
    assert transform.mask([Box(100, 50, 101, 51)], size).nonzero().tolist() == [[5, 2]]
    assert transform.mask([Box(239.5, 159.5, 240, 160)], size).nonzero().tolist() == [[15, 15]]
    assert not transform.mask([Box(0, 0, 80, 160), Box(240, 0, 320, 160), Box(-9, -9, -1, -1)], size).any()
    assert transform.mask([Box(-100, -100, 999, 999)], size).all()
    halves = [transform.mask([Box(x, 0, x + 41, 160)], size) for x in (80, 121, 162)]
    assert not (halves[0] & halves[1] | halves[1] & halves[2]).any()


def test_equal_transforms_have_equal_keys_and_bad_ones_say_why():
    assert ImageTransform(16, mean=[0, 0, 0], std=[1, 1, 1]) == ImageTransform([16, 16], (0.0,) * 3, (1.0,) * 3)
    assert ImageTransform(224, resize="crop").resize_size == 256
    for field, wrong in {
        "size": {"size": 0},
        "mean": {"mean": (0.5, 0.5)},
        "std": {"std": (1, 1, 0)},
        "resize": {"resize": "stretch"},
        "resize_size": {"resize": "crop", "resize_size": 100},
        "squash": {"resize_size": 256},
        "interpolation": {"interpolation": "sinc"},
    }.items():
        with pytest.raises(UserError, match=field):
            ImageTransform(**wrong)


# Decoding ---------------------------------------------------------------------------------------


def test_every_kind_of_file_becomes_rgb(tmp_path):
    rgb = pixels()
    gray = rgb[..., 0]
    alpha = np.dstack([rgb, np.zeros_like(gray)])
    assert (np.array(decode(png(rgb))) == rgb).all()
    assert (np.array(decode(png(gray))) == gray[..., None]).all()
    assert (np.array(decode(png(alpha))) == rgb).all(), "transparency is ignored, as torchvision does"
    deep = gray.astype(np.uint16) * 256 + 77
    assert (np.array(decode(png(deep))) == gray[..., None]).all(), "16 bits keep their high byte"
    assert (np.array(decode(png(gray > 127))) == (gray > 127)[..., None] * 255).all()

    palette = Image.fromarray(rgb).quantize(16)
    for info in ({}, {"transparency": bytes(range(16))}, {"transparency": 3}):
        palette.save(tmp_path / "p.png", **info)
        with open(tmp_path / "p.png", "rb") as file:
            assert (np.array(decode(file)) == np.array(palette.convert("RGB"))).all()

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    with open(tmp_path / "c.jpg", "rb") as file:
        assert np.abs(np.array(decode(file)).astype(int) - [255, 0, 0]).max() < 4


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert ImageFolder(tmp_path, SMALL).image("a").size == (20, 10)


@pytest.mark.parametrize("kind", ["corrupt.jpg", "truncated.jpg", "truncated.png", "empty.png", "text.jpg", "gone.png"])
def test_unreadable_image_is_a_sample_error(tmp_path, kind):
    path = save(tmp_path / kind, width=64, height=64)
    save(tmp_path / "good.png")
    data = path.read_bytes()
    if kind.startswith("truncated"):
        path.write_bytes(data[: len(data) // 2])
    elif kind == "corrupt.jpg":
        path.write_bytes(data[:20] + bytes(len(data) - 20))
    elif kind != "gone.png":
        path.write_bytes(b"" if kind == "empty.png" else b"not an image")
    dataset = ImageFolder(tmp_path, SMALL)
    uid = path.stem
    if kind == "gone.png":
        path.unlink()
    for read in (lambda: dataset.batch([uid]), lambda: dataset.picture(uid)):
        with pytest.raises(SampleError, match=kind):
            read()
    assert (dataset.fingerprint(uid) == UNREADABLE) == (kind == "gone.png")
    assert dataset.batch(["good"]).x.shape == (1, 3, 16, 16)


def test_resize_none_needs_the_right_size(tmp_path):
    save(tmp_path / "right.png", width=16, height=16)
    save(tmp_path / "wrong.png")
    Image.fromarray(np.zeros((16, 16), np.float32)).save(tmp_path / "float.tif")
    dataset = ImageFolder(tmp_path, ImageTransform(16, resize="none", **HALF))
    assert dataset.batch(["right"]).x.shape == (1, 3, 16, 16)
    with pytest.raises(SampleError, match=r"wrong\.png.*14x20 pixels"):
        dataset.batch(["wrong"])
    with pytest.raises(SampleError, match=r"float\.tif.*floating"):
        dataset.batch(["float"])


# More than 8 bits -------------------------------------------------------------------------------

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # each of the 256 levels once
LEVELS = (RAMP >> 8).astype(np.uint8)


def tiff(pixels: np.ndarray, **how) -> io.BytesIO:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **{"photometric": "minisblack", **how})
    stream.seek(0)
    return stream


def twelve_bits() -> io.BytesIO:
    """A TIFF of two pixels in three bytes, which tifffile does not write without more packages."""
    high, low = (RAMP >> 4).ravel()[::2].astype(int), (RAMP >> 4).ravel()[1::2].astype(int)
    data = bytes(b for a, c in zip(high, low) for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return io.BytesIO(
        struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


DEEP = {
    "16": lambda: tiff(RAMP),
    "16 big-endian": lambda: tiff(RAMP, byteorder=">"),
    "16 compressed": lambda: tiff(RAMP, byteorder=">", compression="zlib"),
    "16 white is 0": lambda: tiff(65535 - RAMP, photometric="miniswhite"),
    "16 signed": lambda: tiff((RAMP >> 1).astype(np.int16)),
    "16 signed, big-endian": lambda: tiff((RAMP >> 1).astype(np.int16), byteorder=">"),
    "32": lambda: tiff(RAMP.astype(np.uint32) << 16),
    "32 signed": lambda: tiff(RAMP.astype(np.int32) << 15),
    "32 signed, big-endian": lambda: tiff(RAMP.astype(np.int32) << 15, byteorder=">"),
    "16 in 32": lambda: tiff(RAMP.astype(np.uint32)),
    "12": twelve_bits,
    "16 RGB": lambda: tiff(np.stack([RAMP] * 3, -1), photometric="rgb"),
    "PNG": lambda: png(RAMP),
    "PGM": lambda: io.BytesIO(b"P5\n16 16\n65535\n" + RAMP.astype(">u2").tobytes()),
    "PGM of 12 bits": lambda: io.BytesIO(b"P5\n16 16\n4095\n" + (RAMP >> 4).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("form", DEEP)
def test_of_more_than_eight_bits_the_highest_count(form):
    assert (np.array(decode(DEEP[form]())) == LEVELS[..., None]).all()


@pytest.mark.parametrize(
    ("pixels", "how", "message"),
    [
        ((RAMP.astype(int) - 9).astype(np.int16), {}, "pixels down to -"),
        (RAMP.astype(np.uint32) * 16, {}, "pixels up to 1048560 in 32 bits: neither 16 bits nor the full range"),
        (RAMP.astype(np.float32), {}, "floating-point"),
        ((RAMP >> 1).astype(np.int16), {"byteorder": ">", "compression": "zlib"}, "misreads compressed signed"),
        (
            np.stack([RAMP] * 3),
            {"photometric": "rgb", "planarconfig": "separate"},
            "misreads 16-bit colours",
        ),
    ],
)
def test_numbers_without_a_range_are_refused(tmp_path, pixels, how, message):
    (tmp_path / "a.tif").write_bytes(tiff(pixels, **how).getvalue())
    dataset = ImageFolder(str(tmp_path), SMALL)
    with pytest.raises(SampleError, match=rf"a\.tif: .*{message}"):
        dataset.batch(["a"])
    assert dataset.fingerprint("a") != UNREADABLE


def test_only_images_that_were_decoded_wrongly_have_another_fingerprint():
    unchanged = {"16", "16 big-endian", "16 compressed", "16 RGB", "PNG", "PGM", "PGM of 12 bits"}
    assert {form for form, make in DEEP.items() if not mark(make().getvalue())} == unchanged
    assert not mark(tiff(LEVELS).getvalue())
    assert not mark(b"II*\0 damaged")
