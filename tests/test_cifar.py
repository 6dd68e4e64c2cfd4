"""CIFAR-10, binary version; the other one has a file of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attrib.datasets import CIFAR10, ImageTransform
from attrib.types import UserError

AS_IS = ImageTransform(32, (0.0,) * 3, (1.0,) * 3, resize="none")
NAMES = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"  # with an empty line, as it is


def record(label: int, red: int, green: int, blue: int) -> bytes:
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def write_set(root: Path, train: bool = False) -> Path:
    """Files of the real size, zero but for the first records."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "batches.meta.txt").write_text(NAMES)
    for number, name in enumerate(
        ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))] if train else ["test_batch"]
    ):
        with open(root / f"{name}.bin", "wb") as file:
            file.write(record(number + 3, 10 + number, 100, 200) + record(9, *range(3)))
            file.truncate(30_730_000)
    return root


def test_pixels_and_labels(tmp_path):
    root = write_set(tmp_path)
    planes = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    with open(root / "test_batch.bin", "r+b") as file:
        file.seek(2 * 3073)
        file.write(b"\x04" + planes.tobytes())
    dataset = CIFAR10(str(root), AS_IS)
    assert len(dataset.uids) == 10_000
    batch = dataset.batch(["test/00000", "test/00001", "test/00002", "test/09999"])
    assert batch.target.tolist() == [3, 9, 4, 0]
    assert [dataset.names[int(t)] for t in batch.target] == ["cat", "truck", "deer", "airplane"]
    assert (batch.x[:2] * 255).round().amax((2, 3)).tolist() == [[10, 100, 200], [0, 1, 2]]
    assert np.array_equal((batch.x[2] * 255).round().byte(), planes)
    assert np.array_equal(dataset.picture("test/00002"), planes.transpose(1, 2, 0))
    assert dataset.fingerprint("test/00003") == dataset.fingerprint("test/09999")
    assert dataset.fingerprint("test/00003") != dataset.fingerprint("test/00002")


def test_training_and_validation_images(tmp_path):
    root = write_set(tmp_path, train=True)
    train, val = CIFAR10(str(root), AS_IS, "train"), CIFAR10(str(root), AS_IS, "val")
    assert len(train.uids) + len(val.uids) == 50_000
    assert not set(train.uids) & set(val.uids)
    assert abs(len(val.uids) - 5000) < 200
    firsts = [f"train/{i:05d}" for i in range(0, 50_000, 10_000)]  # of the five files
    assert [(train if u in train.uids else val).label(u) for u in firsts] == [4, 5, 6, 7, 8]
    assert train.key != val.key


def test_damaged_files_are_named(tmp_path):
    root = write_set(tmp_path)
    path = root / "test_batch.bin"
    with open(path, "r+b") as file:
        file.seek(7 * 3073)
        file.write(b"\x0a")
    with pytest.raises(UserError, match=r"dataset\.root: .*test_batch\.bin: record 7 has the label 10, not 0 to 9"):
        CIFAR10(str(root), AS_IS)
    with open(path, "r+b") as file:
        file.truncate(30_730_000 - 3073)
    with pytest.raises(UserError, match=r"test_batch\.bin has 30,726,927 bytes, not 30,730,000: it is cut short"):
        CIFAR10(str(root), AS_IS)


def test_missing_files_are_named(tmp_path):
    root = write_set(tmp_path)
    with pytest.raises(UserError, match=r"has no data_batch_1\.bin; data/README\.md"):
        CIFAR10(str(root), AS_IS, "train")
    (root / "batches.meta.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"batches\.meta\.txt has 1 class names, not 10"):
        CIFAR10(str(root), AS_IS)
    (root / "batches.meta.txt").unlink()
    with pytest.raises(UserError, match=r"batches\.meta\.txt cannot be read"):
        CIFAR10(str(root), AS_IS)
    with pytest.raises(UserError, match=r"dataset\.split"):
        CIFAR10(str(root), AS_IS, "valid")


def test_pickles_are_refused_unread(tmp_path):
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"damaged, or holds more than CIFAR's own files: .*it was not unpickled"):
            CIFAR10(str(tmp_path), AS_IS, split)
