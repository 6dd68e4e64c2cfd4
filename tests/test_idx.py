"""MNIST and Fashion-MNIST from IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from nets import small_cnn_images

from attrib.datasets import MNIST, FashionMNIST, ImageTransform
from attrib.types import UserError

AS_IS = ImageTransform(28, (0.0,), (1.0,), resize="none")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(root: Path, count: int = 200, pack: bool = False) -> dict[str, np.ndarray]:
    """The four files with random content; ``count`` images in each pair."""
    root.mkdir(parents=True, exist_ok=True)
    rng, arrays = np.random.default_rng(0), {}
    for stem in ("train", "t10k"):
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = rng.permutation(np.arange(count, dtype=np.uint8) % 10)
    for name, array in arrays.items():
        if pack:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (root / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("pack", [False, True])
def test_pixels_and_labels(tmp_path, pack):
    arrays = write_set(tmp_path, pack=pack)
    seen = []
    for split, stem in (("train", "train"), ("val", "train"), ("test", "t10k")):
        dataset = MNIST(str(tmp_path), AS_IS, split)
        rows = [int(uid.rpartition("/")[2]) for uid in dataset.uids]
        batch = dataset.batch(dataset.uids)
        assert batch.target.tolist() == arrays[f"{stem}-labels-idx1-ubyte"][rows].tolist()
        pixels = (batch.x[:, 0] * 255).round().byte().numpy()
        assert np.array_equal(pixels, arrays[f"{stem}-images-idx3-ubyte"][rows])
        assert {uid.partition("/")[0] for uid in dataset.uids} == {"test" if split == "test" else "train"}
        seen += dataset.uids
    assert len(seen) == len(set(seen)) == 400
    assert 10 <= len(MNIST(str(tmp_path), AS_IS, "val").uids) <= 30


def test_nothing_depends_on_the_place_or_on_compression(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b", pack=True)
    a, b = MNIST(str(tmp_path / "a"), AS_IS), MNIST(str(tmp_path / "b"), AS_IS)
    assert a.key == b.key
    assert [a.fingerprint(u) for u in a.uids] == [b.fingerprint(u) for u in b.uids]
    keys = {a.key, MNIST(str(tmp_path / "a"), AS_IS, "val").key, FashionMNIST(str(tmp_path / "a"), AS_IS).key}
    assert len(keys) == 3
    assert FashionMNIST(str(tmp_path / "a"), AS_IS).names[9] == "Ankle boot"


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
WHOLE = idx(np.zeros((200, 28, 28), np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, WHOLE[:-1], "cut short: its header says 200 x 28 x 28 bytes"),
        (IMAGES, WHOLE + b"x", "longer than it should be: its header says 200 x"),
        (IMAGES, WHOLE[:9], "ends inside its header"),
        (IMAGES, b"", "begins with nothing, not with 00000803"),
        (IMAGES, idx(np.zeros(200, np.uint8)), "begins with 00000801, not with 00000803"),
        (LABELS, WHOLE, "begins with 00000803, not with 00000801.* 1 dimension does"),
        (LABELS, idx(np.zeros(199, np.uint8)), "199 labels"),
        (
            LABELS,
            idx(np.arange(200, dtype=np.uint8) % 11),
            "label 10 of image 10 is not one of the 10 classes",
        ),
        (IMAGES, idx(np.zeros((0, 28, 28), np.uint8)), "holds no images"),
        (IMAGES, bytes([0, 0, 8, 3]) + b"\xff" * 12, "is damaged: its header says 4294967295 x"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    write_set(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"dataset\.root: .*{name}.*{message}"):
        MNIST(str(tmp_path), AS_IS)
    MNIST(str(tmp_path), AS_IS, "train")


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-20], lambda c: c[:40] + b"\0\0\0\0" + c[44:], lambda c: b"no gzip", lambda c: c[:5]]
)
def test_damaged_gzip_is_named(tmp_path, damage):
    write_set(tmp_path, pack=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{IMAGES}\.gz (cannot be read|is cut short|begins)"):
        MNIST(str(tmp_path), AS_IS)


def test_missing_files_and_wrong_splits(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.root: .*nowhere does not exist"):
        MNIST(str(tmp_path / "nowhere"), AS_IS)
    with pytest.raises(UserError, match=rf"has neither {IMAGES} nor {IMAGES}\.gz; data/README"):
        MNIST(str(tmp_path), AS_IS)
    write_set(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.split must be train, val or test, not 't10k'"):
        MNIST(str(tmp_path), AS_IS, "t10k")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_holds_the_goldens_images():
    dataset = FashionMNIST(str(DEBIAN), ImageTransform(28, (0.2860,), (0.3530,), resize="none"))
    assert len(dataset.uids) == 10_000
    assert dataset.names[dataset.label("test/00000")] == "Ankle boot"
    batch = dataset.batch(dataset.uids[:1000])
    wanted, labels = small_cnn_images()
    for image, label in zip(wanted[:, 0, 2:-2, 2:-2], labels):  # the goldens' makers padded them
        same = (batch.x[:, 0] - image).abs().amax((1, 2)) < 1e-5
        assert same.sum() == 1
        assert batch.target[same].item() == label
