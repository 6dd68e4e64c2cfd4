"""CIFAR as torchvision leaves it: pickles of Python 2, read by a reader that can run nothing."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cifar import AS_IS, NAMES, write_set

from attrib.datasets import CIFAR10, CIFAR100
from attrib.datasets.cifar_pickle import read_pickle
from attrib.types import UserError

# ---- what Python 2's cPickle wrote, protocol 2, instruction by instruction --------------------------------


def text(value: str | bytes) -> bytes:
    value = value.encode("latin-1") if isinstance(value, str) else value
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)


class Python2:
    def __init__(self) -> None:
        self.memo = 0

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<i", self.memo)

    def value(self, value: Any) -> bytes:
        if isinstance(value, dict):
            items = b"".join(text(k) + self.put() + self.value(v) for k, v in value.items())
            return b"}" + self.put() + b"(" + items + b"u"
        if isinstance(value, list):
            out = b"]" + self.put()
            for at in range(0, len(value), 1000):  # it appends a thousand at a time
                out += b"(" + b"".join(self.value(v) for v in value[at : at + 1000]) + b"e"
            return out
        if isinstance(value, np.ndarray):
            return self.array(value)
        return number(value) if isinstance(value, int) else text(value) + self.put()

    def array(self, value: np.ndarray) -> bytes:
        new = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n" + self.put()
        new += number(0) + b"\x85" + self.put() + text("b") + b"\x87" + self.put() + b"R" + self.put()
        kind = b"cnumpy\ndtype\n" + self.put() + text("u1") + number(0) + number(1) + b"\x87" + self.put() + b"R"
        kind += self.put() + b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        shape = b"".join(map(number, value.shape)) + b"\x86" + self.put()
        return new + b"(" + number(1) + shape + kind + b"\x89" + text(value.tobytes()) + b"t" + self.put() + b"b"


def dump(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x02" + Python2().value(value) + b".")


def test_the_writer_of_the_test_is_pickle(tmp_path):
    """Python itself reads it; ``latin1`` is what torchvision passes."""
    data = {"data": np.arange(12, dtype=np.uint8).reshape(2, 6), "labels": [3, 300], "names": ["a", "b" * 400]}
    dump(tmp_path / "x", data)
    found = pickle.loads((tmp_path / "x").read_bytes(), encoding="latin1")
    ours = read_pickle(tmp_path / "x")
    for made in (found, ours):
        assert np.array_equal(made["data"], data["data"])
        assert (made["labels"], made["names"]) == (data["labels"], data["names"])


# ---- the sets --------------------------------------------------------------------------------------------


def python_version(binary: Path, root: Path) -> Path:
    """The same images as in the binary files."""
    for path in binary.glob("*.bin"):
        records = np.fromfile(path, np.uint8).reshape(10_000, 3073)
        names = [f"x_{i:06d}.png" for i in range(10_000)]
        content = {
            "batch_label": "a batch",
            "labels": records[:, 0].tolist(),
            "data": records[:, 1:],
            "filenames": names,
        }
        dump(root / path.stem, content)
    meta = {"num_cases_per_batch": 10_000, "label_names": NAMES.split(), "num_vis": 3072}
    dump(root / "batches.meta", meta)
    return root


def test_both_versions_of_cifar10_are_the_same_set(tmp_path):
    binary = write_set(tmp_path / "cifar-10-batches-bin")
    plain = CIFAR10(str(binary), AS_IS)
    python_version(binary, tmp_path / "torch" / "cifar-10-batches-py")
    for root in (tmp_path / "torch", tmp_path / "torch" / "cifar-10-batches-py", tmp_path):
        made = CIFAR10(str(root), AS_IS)
        assert (made.uids, made.key, made.names) == (plain.uids, plain.key, plain.names)
        some = ["test/00000", "test/00001", "test/09999"]
        assert torch.equal(made.batch(some).x, plain.batch(some).x)
        assert torch.equal(made.batch(some).target, plain.batch(some).target)
        assert [made.fingerprint(u) for u in some] == [plain.fingerprint(u) for u in some]


@pytest.mark.parametrize("split", ["test", "train", "val"])
@pytest.mark.quick("test")
def test_cifar100(tmp_path, split):
    rng = np.random.default_rng(0)
    for name, count in (("train", 50_000), ("test", 10_000)):
        coarse, fine = rng.integers(0, 20, count, dtype=np.uint8), rng.integers(0, 100, count, dtype=np.uint8)
        pixels = np.zeros((count, 3072), np.uint8)
        pixels[:, :8] = rng.integers(0, 256, (count, 8))
        (tmp_path / "b").mkdir(exist_ok=True)
        np.column_stack((coarse, fine, pixels)).tofile(tmp_path / "b" / f"{name}.bin")
        content = {
            "filenames": ["x"],
            "batch_label": name,
            "fine_labels": fine.tolist(),
            "coarse_labels": coarse.tolist(),
        }
        dump(tmp_path / "p" / "cifar-100-python" / name, {**content, "data": pixels})
    names = {"fine": [f"f{i}" for i in range(100)], "coarse": [f"c{i}" for i in range(20)]}
    for kind, these in names.items():
        (tmp_path / "b" / f"{kind}_label_names.txt").write_text("\n".join(these))
    dump(tmp_path / "p" / "cifar-100-python" / "meta", {f"{kind}_label_names": these for kind, these in names.items()})
    for labels in ("fine", "coarse"):
        binary = CIFAR100(str(tmp_path / "b"), AS_IS, split, labels)
        python = CIFAR100(str(tmp_path / "p"), AS_IS, split, labels)
        assert (binary.uids, binary.key, binary.names) == (python.uids, python.key, python.names)
        a, b = binary.batch(binary.uids[:50]), python.batch(python.uids[:50])
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.target, b.target)
        assert len(binary.names) == (100 if labels == "fine" else 20)
        assert len(set(a.target.tolist())) > 10
    assert CIFAR100(str(tmp_path / "b"), AS_IS).key != CIFAR100(str(tmp_path / "b"), AS_IS, labels="coarse").key
    with pytest.raises(UserError, match=r"labels must be fine or coarse"):
        CIFAR100(str(tmp_path / "b"), AS_IS, labels="both")


# ---- nothing is run ---------------------------------------------------------------------------------------

RAN: list[str] = []


class Payload:
    def __init__(self, what, *arguments) -> None:
        self.how = what, arguments

    def __reduce__(self):
        return self.how


def ran(*arguments: Any) -> dict:
    RAN.append(str(arguments))
    return {}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("payload", [Payload(ran, "x"), Payload(eval, "RAN.append('x')"), Payload(os.system, "true")])
def test_pickles_with_anything_else_are_refused_unrun(tmp_path, protocol, payload):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": payload}, protocol))
    with pytest.raises(UserError, match=r"damaged, or holds more than CIFAR's own files: .*; it was not unpickled"):
        read_pickle(tmp_path / "test_batch")
    assert RAN == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"\x80\x02}", b"\x80\x02}q\x01(U\x04data", b"\x80\x02(.", b"\x80\x02h\x05.", b"\x80\x02K\x01.",
        b"\x80\x02cos\nsystem\n(U\x04trueoR.", b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.", b"\x80\x02}K\x01b.",
        b"\x80\x02(i__builtin__\neval\n.", b"\x80\x02cnumpy\nndarray\n\x85R.", b"\x80\x02]}a\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02U\x04trueP0\n.", b"\x80\x02\x82\x01.", b"\x80\x02}}}s.", b"\x80\x02TU\xff\xff\xff.", b"garbage",
    ],
)  # fmt: skip
def test_damaged_and_hostile_programs_end_in_one_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.root: .*x"):
        read_pickle(tmp_path / "x")


def test_an_array_of_anything_but_bytes_is_refused(tmp_path):
    for values in (np.zeros((2, 3)), np.array([object()], dtype=object)):
        (tmp_path / "x").write_bytes(pickle.dumps({"data": values}, 2))
        with pytest.raises(UserError, match="not unpickled"):
            read_pickle(tmp_path / "x")


def test_wrong_content_is_named(tmp_path):
    root = python_version(write_set(tmp_path / "b"), tmp_path / "p")
    good = read_pickle(root / "test_batch")
    for change, reason in (
        ({"data": good["data"][:5]}, r"test_batch: data is \(5, 3072\), not \(10000, 3072\)"),
        ({"data": "word"}, r"data is str"),
        ({"labels": [10] * 10_000}, "labels: not 10,000 whole numbers from 0 to 9"),
        ({"labels": [1]}, "labels: not 10,000 whole numbers"),
    ):
        dump(root / "test_batch", {**good, **change})
        with pytest.raises(UserError, match=reason):
            CIFAR10(str(root), AS_IS)
    dump(root / "test_batch", good)
    dump(root / "batches.meta", {"label_names": ["cat"]})
    with pytest.raises(UserError, match=r"batches\.meta has 1 class names, not 10"):
        CIFAR10(str(root), AS_IS)
