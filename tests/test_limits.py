"""Inputs that would eat the machine cost their sample, in no time; the others go on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import pictures, write_image

from attrib import keys
from attrib.datasets import ImageFolder, ImageTransform
from attrib.datasets.audio import AudioFolder, WaveTransform
from attrib.datasets.imagenet import read_voc
from attrib.types import UNREADABLE, SampleError, UserError

GOOD = "p000"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def vast(path: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(path)


def long(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**34)


@pytest.mark.parametrize("make", [fifo, endless, vast, long])
def test_a_picture_that_is_none_or_too_large(make, tmp_path):
    images = pictures(tmp_path, 2)
    make(images / "odd.png")
    dataset = ImageFolder(str(images), ImageTransform(size=16))
    start = time.process_time()
    with pytest.raises(SampleError, match=r"odd\.png: .*(regular file|pixels)"):
        dataset.batch(["odd"])
    dataset.fingerprint("odd")
    assert time.process_time() - start < 2
    assert len(dataset.batch([GOOD])) == 1


def test_the_limit_can_be_raised_and_changes_no_key(tmp_path):
    write_image(tmp_path / "a.png", 0)
    small, large = (ImageTransform(size=16, max_pixels=n) for n in (1599, 1600))
    with pytest.raises(SampleError, match=r"40 x 40 pixels, more than 1599; \+dataset.transform.max_pixels=1600"):
        ImageFolder(str(tmp_path), small).batch(["a"])
    assert len(ImageFolder(str(tmp_path), large).batch(["a"])) == 1
    assert keys.digest(small) == keys.digest(large) == keys.digest(ImageTransform(size=16))
    with pytest.raises(UserError, match="max_pixels must be at least 1"):
        ImageTransform(max_pixels=0)


def test_too_many_boxes(tmp_path):
    images = pictures(tmp_path, 2)
    table = tmp_path / "boxes.csv"
    table.write_text("file,x1,y1,x2,y2\n" + "p000.png,1,1,9,9\n" + "p001.png,1,1,9,9\n" * 300_000)
    start = time.process_time()
    dataset = ImageFolder(str(images), ImageTransform(size=16), boxes=str(table))
    assert time.process_time() - start < 20, "linear"
    with pytest.raises(SampleError, match=r"300000 boxes, more than 1000; \+dataset.transform.max_boxes=300000"):
        dataset.batch(["p001"])
    assert dataset.fingerprint("p001") == UNREADABLE
    assert dataset.batch([GOOD]).roi.any()


def test_an_annotation_with_too_many_boxes(tmp_path):
    box = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{box * 30_000}</annotation>")
    start = time.process_time()
    assert len(read_voc(path).boxes["cat"]) == 30_000
    assert time.process_time() - start < 5
    path.write_text(f"<annotation>{box * 300_000}</annotation>")
    with pytest.raises(SampleError, match=r"a\.xml: .* MB"):
        read_voc(path)


def test_a_recording_that_is_none(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "x.wav")
    dataset = AudioFolder(str(tmp_path), WaveTransform(length=100, rate=8000))
    with pytest.raises(SampleError, match="regular file"):
        dataset.batch(dataset.uids)
