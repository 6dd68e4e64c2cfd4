"""Units and partitions: words, tiles, windows, superpixels, and a user's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from attrib.datasets import ImageFolder, ImageTransform
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition, Units


def images(n: int = 2, height: int = 12, width: int = 10) -> Batch:
    r = np.random.RandomState(0)
    return Batch(tuple(map(str, range(n))), torch.tensor(r.randn(n, 3, height, width)), torch.zeros(n).long())


def sounds(n: int = 2, length: int = 23) -> Batch:
    return Batch(tuple(map(str, range(n))), torch.zeros(n, 1, length), torch.zeros(n).long())


def texts() -> Batch:
    words = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, -1, -1, -1]])
    x = torch.ones_like(words)
    return Batch(("a", "b"), x, torch.zeros(2).long(), lengths=torch.tensor([6, 4]), words=words)


def partition(batch: Batch, units: Units) -> None:
    """Every unit that exists has a place, and the masks are disjoint."""
    masks = units.masks
    assert masks.shape == (len(batch), units.most, *units.of.shape[1:])
    assert masks.flatten(2).any(2).equal(units.exist[:, 0])
    assert masks.sum(1).equal((units.of >= 0).long())


def test_tiles_are_a_grid():
    units = Units.tiles(images(), 2)
    partition(images(), units)
    expected = torch.zeros(12, 10).long()
    expected[:6, 5:], expected[6:, :5], expected[6:, 5:] = 1, 2, 3
    assert units.of.equal(expected.expand(2, -1, -1))
    assert Units.tiles(images(), 99).n.tolist() == [120, 120]


def test_windows_are_equal():
    units = Units.windows(sounds(), 4)
    partition(sounds(), units)
    sizes = units.masks.sum(2)
    assert sizes.min() >= 5
    assert sizes.max() <= 6
    assert (units.of.diff(dim=1) >= 0).all()


def test_words_leave_special_tokens_out():
    units = Partition().of(texts())
    partition(texts(), units)
    assert units.n.tolist() == [3, 2]


def test_superpixels_follow_colours():
    x = torch.zeros(2, 3, 20, 20, dtype=torch.float64)
    x[0, 0, :, 10:] = 3.0
    x[1, 2, 10:] = 3.0
    batch = Batch(("a", "b"), x, torch.zeros(2).long())
    units = Partition("superpixels", segments=4).of(batch)
    partition(batch, units)
    for i in range(2):
        for number in range(int(units.n[i])):
            colours = x[i][:, units.of[i] == number]
            assert (colours == colours[:, :1]).all()
    alone = Partition("superpixels", segments=4).of(batch[[1]])
    assert alone.of.equal(units.of[1:])


def test_superpixels_of_one_channel_and_of_a_plain_image():
    batch = Batch(("a",), torch.randn(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)), torch.zeros(1).long())
    partition(batch, Partition("superpixels", segments=9).of(batch))
    plain = Batch(("a",), torch.ones(1, 3, 20, 20), torch.zeros(1).long())
    partition(plain, Partition("superpixels", segments=9).of(plain))
    with pytest.raises(SampleError, match="a: the image has NaN"):
        Partition("superpixels").of(Batch(("a",), torch.full((1, 3, 9, 9), torch.nan), torch.zeros(1).long()))


def test_sum_paint_and_spread():
    units = Units.given(torch.tensor([[0, 0, 1, -1], [1, 1, 1, 0]]))
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    assert units.sum(values).tolist() == [[3.0, 3.0], [4.0, 6.0]]
    assert units.paint(torch.tensor([[5.0, 7.0], [5.0, 7.0]])).tolist() == [[5, 5, 7, 0], [7, 7, 7, 5]]
    spread = units.spread(torch.tensor([[5.0, 7.0], [5.0, 6.0]]))
    assert spread.tolist() == [[2.5, 2.5, 7, 0], [2, 2, 2, 5]]
    assert units.sum(spread).tolist() == [[5.0, 7.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    ("batch", "kind", "n"),
    [(images(), "auto", 49), (sounds(), "auto", 23), (texts(), "auto", 3), (sounds(length=500), "windows", 50)],
)
def test_the_kind_follows_the_modality(batch, kind, n):
    assert Partition(kind).of(batch).most == n


@pytest.mark.parametrize(
    ("batch", "kind", "what"),
    [(images(), "words", "images"), (texts(), "tiles", "texts"), (sounds(), "superpixels", "sounds")],
)
def test_a_kind_that_the_samples_do_not_have(batch, kind, what):
    with pytest.raises(UserError, match=f"{kind!r}, which {what} do not have"):
        Partition(kind).of(batch)


def test_bad_fields():
    for fields in ({"kind": "pixels"}, {"side": 0}, {"segments": 0}, {"compactness": 0.0}):
        with pytest.raises(UserError, match=f"Partition.{next(iter(fields))}"):
            Partition(**fields)
    with pytest.raises(UserError, match=r"dataset\.units"):
        Partition("given").of(images())


def test_a_users_own_units(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "units" / name).mkdir(parents=True)
        Image.new("RGB", (8, 4)).save(tmp_path / "images" / name / "1.jpg")
    labels = np.zeros((4, 8), np.uint8)
    labels[:, 2:4], labels[:, 6:] = 7, 200
    file = tmp_path / "units" / "a" / "1.png"
    Image.fromarray(labels).save(file)
    Image.fromarray(labels.astype(np.uint16) * 100).save(tmp_path / "units" / "b" / "1.png")
    transform = ImageTransform(size=(2, 4), mean=(0.5,), std=(0.5,))
    data = ImageFolder(str(tmp_path / "images"), transform, units=str(tmp_path / "units"))
    batch = data.batch(data.uids)
    assert batch.units.tolist() == [[[-1, 0, -1, 1]] * 2] * 2
    units = Partition("given").of(batch)
    assert units.n.tolist() == [2, 2]
    before = data.fingerprint("a/1")
    plain = ImageFolder(str(tmp_path / "images"), transform)
    assert plain.batch(plain.uids).units is None
    assert plain.fingerprint("a/1") != before

    # A changed file is another sample; a wrong or missing one concerns that sample alone.
    Image.fromarray(labels.T.copy()).save(file)
    again = ImageFolder(str(tmp_path / "images"), transform, units=str(tmp_path / "units"))
    with pytest.raises(SampleError, match=r"a/1\.png: must be gray and of its image's size \(8, 4\)"):
        again.batch(["a/1"])
    file.unlink()
    with pytest.raises(SampleError, match=r"a/1\.png: cannot be read"):
        again.batch(["a/1"])
    assert again.fingerprint("a/1") == ""
    assert len(again.batch(["b/1"])) == 1


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_superpixels_of_any_number_of_channels_follow_the_image(channels):
    """Weighed against Lab's 0 .. 100, a compactness of 10 would hide an image of 0 .. 1 in a chessboard."""
    y, x = np.mgrid[:56, :56]
    disc = torch.tensor((y - 27.0) ** 2 + (x - 30.0) ** 2 < 17.0**2).double()

    def across(channels: int) -> int:
        batch = Batch(("a",), disc.expand(1, channels, 56, 56), torch.zeros(1).long())
        units = Units.superpixels(batch, 50, 10.0)
        share = units.sum(disc[None]) / units.sum(torch.ones_like(disc)[None])
        return int(((share > 0.05) & (share < 0.95)).sum())

    assert across(3) == 0
    assert across(channels) == 0


def test_a_gray_image_has_the_superpixels_of_its_copy_in_three_channels():
    gray = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, three = (Batch(("a", "b"), x, torch.zeros(2).long()) for x in (gray, gray.expand(2, 3, 30, 40)))
    assert torch.equal(Units.superpixels(one, 20, 5.0).of, Units.superpixels(three, 20, 5.0).of)
