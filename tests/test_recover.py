"""A damaged chunk: the good samples stay, with what was noted beside them; the others are named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from attrib.store.cell import Arrays, DamagedError
from attrib.store.damaged import recover
from attrib.types import UserError

UIDS = ("a", "b", "c")


def stored(root: Path, writer: str = "w") -> Arrays:
    """Three samples in one chunk, of which the last is damaged."""
    arrays = Arrays(root / "cell" / "maps", writer)
    for i, uid in enumerate(UIDS):
        arrays.add(uid, "f", {"map": np.full((4, 4), float(i))}, target=i, seconds=0.5)
    arrays.flush()
    return arrays


def damaged(root: Path) -> Path:
    (path,) = (root / "cell" / "maps").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return path


def test_the_good_ones_stay(tmp_path):
    stored(tmp_path)
    path = damaged(tmp_path)
    maps = Arrays(path.parent, "x")
    lost = recover(maps, path, tmp_path)
    assert lost == {("c", "f"): {"target": 2, "seconds": 0.5}}
    for reader in (maps, Arrays(path.parent)):
        index = reader.index()
        assert sorted(uid for uid, _ in index) == ["a", "b"]
        assert index["b", "f"].info == {"target": 1, "seconds": 0.5}
        assert reader.read(("b", "f"))["map"].max() == 1
        assert not reader.broken
    (aside,) = (tmp_path / ".damaged").rglob("*.safetensors")
    assert aside.relative_to(tmp_path / ".damaged").parts[1:] == ("cell", "maps", path.name)


def test_another_process_was_faster(tmp_path):
    """Its copies are found, and nothing is lost that it has kept."""
    stored(tmp_path)
    path = damaged(tmp_path)
    slower = Arrays(path.parent, "y")
    slower.index()
    recover(Arrays(path.parent, "x"), path, tmp_path)
    with pytest.raises(FileNotFoundError):
        slower.read(("a", "f"))
    assert list(recover(slower, path, tmp_path)) == [("c", "f")]
    assert slower.read(("a", "f"))["map"].max() == 0
    assert len(list(path.parent.glob("*.safetensors"))) == 1


def test_a_disk_that_takes_nothing(tmp_path, monkeypatch):
    """The chunk stays where it is, so nothing is lost."""
    stored(tmp_path)
    path = damaged(tmp_path)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    maps = Arrays(path.parent, "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot be written anew.*No space left"):
            recover(maps, path, tmp_path)
    assert path.exists()
    reader = Arrays(path.parent)
    assert reader.read(("a", "f"))["map"].max() == 0
    with pytest.raises(DamagedError, match=r"wrong checksum of map of c; delete the file"):
        reader.read(("c", "f"))
