"""scikit-learn's digits, and digits among clutter."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import forbid_global_rng
from PIL import Image
from sklearn.datasets import load_digits
from test_idx import write_set
from tiny import save

from attrib.datasets import MNIST, Box, Digits, DigitsCanvas, ImageFolder, ImageTransform, PixelDataset
from attrib.datasets.arrays import netpbm
from attrib.keys import shard_of
from attrib.types import UNREADABLE, SampleError, UserError

GREY = ImageTransform(8, (0.0,), (1.0,), resize="none")
CANVAS = ImageTransform(64, (0.0,), (1.0,), resize="none")


@pytest.fixture(scope="module")
def canvas() -> DigitsCanvas:
    return DigitsCanvas(CANVAS)


# Pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_netpbm_keeps_the_pixels(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "x").write_bytes(netpbm(pixels.swapaxes(0, 1)))  # not contiguous
    assert np.array_equal(Image.open(tmp_path / "x"), pixels.swapaxes(0, 1))


class One(PixelDataset):
    def __init__(self, pixels: np.ndarray, label: int = 0, box: Box | None = None) -> None:
        super().__init__(["one"], GREY, boxed=box is not None)
        self._pixels, self._label, self._box = pixels, label, box

    def pixels(self, uid: str) -> np.ndarray:
        return self._pixels

    def label(self, uid: str) -> int:
        return self._label

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return (self._box,) if self._box else ()


def test_fingerprint_is_of_pixels_label_and_boxes():
    zeros = np.zeros((8, 8), np.uint8)
    first = One(zeros).fingerprint("one")
    assert One(zeros.copy()).fingerprint("one") == first
    other = zeros.copy()
    other[7, 7] = 1
    changed = [One(other), One(zeros, 1), One(zeros, 0, Box(0, 0, 1, 1)), One(zeros.reshape(4, 16))]
    assert len({first, *(d.fingerprint("one") for d in changed)}) == 5
    assert One(zeros, 0, Box(0, 0, 4, 4)).box_area("one") == 0.25
    assert One(zeros.reshape(4, 16)).size("one") == (16, 4)


# Digits -----------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    found = load_digits()
    names = set()
    for split in ("train", "val", "test"):
        dataset = Digits(GREY, split)
        assert dataset.uids == tuple(sorted(dataset.uids))
        rows = [int(uid.removeprefix(f"{split}/")) for uid in dataset.uids]
        batch = dataset.batch(dataset.uids)
        assert batch.target.tolist() == found.target[rows].tolist()
        assert batch.x.shape == (len(rows), 1, 8, 8)
        torch.testing.assert_close(batch.x[:, 0].double(), torch.tensor(found.images[rows] / 16), atol=0.002, rtol=0)
        assert set(batch.target.tolist()) == set(range(10)) == set(dataset.names)
        names |= set(rows)
        assert abs(len(rows) / 1797 - {"train": 0.7, "val": 0.15, "test": 0.15}[split]) < 0.02
    assert len(names) == 1797


def test_digits_are_the_same_everywhere():
    dataset = Digits(GREY)
    assert dataset.uids[:5] == ("test/0001", "test/0006", "test/0010", "test/0023", "test/0024")
    assert dataset.batch(["test/0001"]).target.tolist() == [1]
    assert dataset.fingerprint("test/0001") == Digits(ImageTransform(32)).fingerprint("test/0001")
    keys = [Digits(GREY).key, Digits(GREY, "train").key, Digits(ImageTransform(32)).key]
    assert len(set(keys)) == 3
    assert Digits(GREY).key == dataset.key
    assert {shard_of(uid, 10) for uid in dataset.uids} == set(range(10))
    assert dataset.picture("test/0001").shape == (8, 8, 3)
    assert dataset.batch(dataset.uids[:2]).roi is None


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        Digits(GREY)


def test_a_wrong_split_is_named():
    with pytest.raises(UserError, match=r"dataset\.split must be train, val or test, not 'valid'"):
        Digits(GREY, "valid")


# Canvas -----------------------------------------------------------------------------------------


def inside(dataset: DigitsCanvas, uid: str, grow: int = 0) -> np.ndarray:
    mask = np.zeros((dataset.pixels(uid).shape), bool)
    for box in dataset.boxes(uid):
        x1, y1, x2, y2 = map(int, box)
        mask[max(0, y1 - grow) : y2 + grow, max(0, x1 - grow) : x2 + grow] = True
    return mask


def test_the_box_is_tight_around_the_digit():
    dataset = DigitsCanvas(CANVAS, clutter=0)
    for uid in dataset.uids[:60]:
        (box,) = dataset.boxes(uid)
        rows, columns = np.nonzero(dataset.pixels(uid))
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert max(box.x2 - box.x1, box.y2 - box.y1) <= 28


def test_clutter_stays_outside_of_the_box_and_leaves_the_digit_alone(canvas):
    bare = DigitsCanvas(CANVAS, clutter=0)
    clutter = []
    for uid in canvas.uids[:60]:
        box = inside(canvas, uid)
        assert canvas.boxes(uid) == bare.boxes(uid)
        assert np.array_equal(np.where(box, canvas.pixels(uid), 0), bare.pixels(uid))
        assert not np.where(inside(canvas, uid, grow=2) & ~box, canvas.pixels(uid), 0).any()
        clutter.append(np.where(box, 0, canvas.pixels(uid)) > 0)
    assert min(c.sum() for c in clutter) > 50
    assert max(c.sum() for c in clutter) <= 8 * 10 * 10
    share = np.mean(clutter, axis=0)  # it may lie anywhere
    assert (share > 0).mean() > 0.95


def test_the_digit_is_that_of_the_source(canvas):
    digits = Digits(GREY)
    for uid in canvas.uids[:20]:
        base = uid.removesuffix("/view-00")
        assert canvas.label(uid) == digits.label(base)
        wanted = np.array(digits.image(base).convert("L").resize((28, 28), Image.Resampling.BICUBIC))
        wanted[wanted < 16] = 0
        (box,) = canvas.boxes(uid)
        x1, y1, x2, y2 = map(int, box)
        part = canvas.pixels(uid)[y1:y2, x1:x2]
        hits = [
            (y, x)
            for y in range(29 - part.shape[0])
            for x in range(29 - part.shape[1])
            if np.array_equal(wanted[y : y + part.shape[0], x : x + part.shape[1]], part)
        ]
        assert len(hits) == 1
        assert part.sum() == wanted.sum(), "all of it"


def test_a_canvas_depends_on_nothing_but_its_name_and_the_seed(canvas):
    with forbid_global_rng():
        batch = canvas.batch(canvas.uids[:6])
    again = DigitsCanvas(CANVAS, views=3)
    assert len(again.uids) == 3 * len(canvas.uids)
    for i in (4, 0):
        assert torch.equal(again.batch([canvas.uids[i]]).x[0], batch.x[i])
    assert again.key == canvas.key
    assert not torch.equal(again.batch(["test/0001/view-01"]).x[0], batch.x[0])
    other = DigitsCanvas(CANVAS, seed=1)
    assert other.key != canvas.key
    assert other.fingerprint("test/0001/view-00") != canvas.fingerprint("test/0001/view-00")


def test_places_are_spread_over_the_canvas(canvas):
    boxes = [canvas.boxes(uid)[0] for uid in canvas.uids]
    for low, high in ((b.x1 for b in boxes), (b.x2 for b in boxes)), ((b.y1 for b in boxes), (b.y2 for b in boxes)):
        assert min(low) <= 1
        assert max(high) >= 63
    assert abs(np.mean([(b.x1 + b.x2) / 2 for b in boxes]) - 32) < 2


def test_region_of_interest_in_the_networks_pixels(canvas):
    batch = canvas.batch(canvas.uids[:10])
    assert batch.x.shape == (10, 1, 64, 64)
    for i, uid in enumerate(batch.uids):
        assert np.array_equal(batch.roi[i], inside(canvas, uid))
        assert canvas.box_area(uid) == inside(canvas, uid).mean()
    rgb = DigitsCanvas(ImageTransform(32)).batch(canvas.uids[:2])
    assert rgb.x.shape == (2, 3, 32, 32)
    assert abs(rgb.roi.float().mean() - batch.roi[:2].float().mean()) < 0.03


@pytest.mark.parametrize(("digits", "size", "clutter"), [(2, 64, 6), (3, 96, 12), (4, 64, 0), (4, 128, 5)])
def test_several_digits_of_one_class(digits, size, clutter):
    transform = ImageTransform(size, (0.0,), (1.0,), resize="none")
    dataset = DigitsCanvas(transform, digits=digits, size=size, clutter=clutter)
    bare = DigitsCanvas(transform, digits=digits, size=size, clutter=0)
    classes = {d: [u for u in dataset.uids if dataset.label(u) == d] for d in range(10)}
    for uid in dataset.uids[:20]:
        boxes = dataset.boxes(uid)
        assert len(boxes) == digits
        box = inside(dataset, uid)
        assert box.sum() == sum((b.x2 - b.x1) * (b.y2 - b.y1) for b in boxes), "none overlaps another"
        assert np.array_equal(np.where(box, dataset.pixels(uid), 0), bare.pixels(uid))
        assert uid in classes[dataset.label(uid)]


def test_mnist_among_clutter(tmp_path: Path):
    write_set(tmp_path, count=20)
    transform = ImageTransform(64, (0.0,), (1.0,), resize="none")

    def source(**given):
        return MNIST(root=str(tmp_path), **given)

    dataset = DigitsCanvas(transform, source=source)
    assert len(dataset.uids) == 20
    assert dataset.batch(dataset.uids).roi.any((1, 2)).all()
    assert dataset.key != DigitsCanvas(transform).key


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 27}, "has no room"),
        ({"size": 30}, "has no room for dataset.digits=1 of 28 pixels and fragments of 10"),
        ({"digits": 4}, "has no room"),
        ({"digits": 5}, "has no room"),
        ({"digits": 0}, r"dataset\.digits must be at least 1, not 0"),
        ({"clutter": -1}, r"dataset\.clutter must be at least 0"),
        ({"views": 0}, r"dataset\.views must be at least 1"),
        ({"split": "all"}, r"dataset\.split"),
    ],
)
def test_wrong_canvases_say_so(given, message):
    with pytest.raises(UserError, match=message):
        DigitsCanvas(CANVAS, **given)


def test_the_tightest_canvas_has_room():
    transform = ImageTransform(56, (0.0,), (1.0,), resize="none")
    dataset = DigitsCanvas(transform, size=56, digits=1, clutter=20)
    assert dataset.batch(dataset.uids[:40]).x.shape == (40, 1, 56, 56)
    with pytest.raises(UserError, match="no room"):
        DigitsCanvas(transform, size=55)


def test_a_source_that_cannot_be_read_costs_one_sample(tmp_path: Path):
    save(tmp_path / "0" / "a.png")
    save(tmp_path / "0" / "b.png").write_bytes(b"")
    Image.new("L", (8, 8)).save(tmp_path / "0" / "c.png")
    dataset = DigitsCanvas(
        CANVAS, clutter=0, source=lambda split, transform: ImageFolder(str(tmp_path), transform), digit=20
    )
    assert dataset.batch(["0/a/view-00"]).roi.any()
    for uid, reason in (("0/b/view-00", r"b\.png: empty, damaged"), ("0/c/view-00", r"c\.png: no pixel of it")):
        with pytest.raises(SampleError, match=reason):
            dataset.batch([uid])
        assert dataset.fingerprint(uid) == UNREADABLE
