"""Keys: the same for the same thing in every process, different for anything that changes numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib.datasets import Digits, ImageTransform, Photos, Tones, WaveTransform
from attrib.keys import digest, shard_of, short_name, spec, stable_hash, tensor_digest


@dataclass(frozen=True)
class Inner:
    VERSION: ClassVar[int] = 1
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    VERSION: ClassVar[int] = 3
    name: str = "x"
    inner: Inner = Inner()
    steps: tuple[int, ...] = (1, 2)
    options: dict[str, Any] = field(default_factory=lambda: {"b": None, "a": True})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


# Specs ------------------------------------------------------------------------------------------


def test_pinned():
    """If this fails, no work directory's results are found any more."""
    assert spec(Outer()) == {
        "class": "test_keys.Outer",
        "VERSION": 3,
        "name": "x",
        "inner": {"class": "test_keys.Inner", "VERSION": 1, "rate": 0.1},
        "steps": [1, 2],
        "options": {"a": True, "b": None},
    }
    assert digest() == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # sha256 of "[]"
    assert digest(Outer(), 1, "ü", [0.1, 1e300]) == "a32c0ea8e18f3b6468ab6f3c50ef3fe2a784f7cd31a3ecb7314f808b0fe2cb10"


@settings(deadline=None, max_examples=60)
@given(JSON)
def test_equal_things_have_equal_keys(thing):
    assert digest(thing) == digest(thing)
    assert digest(spec(thing)) == digest(thing)
    assert digest(thing, thing) != digest(thing)


def test_the_order_of_names_does_not_matter():
    a, b = (make_dataclass("Made", names, frozen=True)(p=1, q=2) for names in (["p", "q"], ["q", "p"]))
    assert digest(a) == digest(b)
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1})
    assert digest({3, 1, 2}) == digest(frozenset((2, 3, 1)))
    assert digest([1, 2]) != digest([2, 1])
    assert digest((1, 2)) == digest([1, 2])


def test_sets_have_one_order_in_every_process():
    thing = "{'a', 'b', None, (1, 'x'), *range(8), *map(str, range(8))}"
    found = subprocess.run(
        [sys.executable, "-c", f"from attrib.keys import digest; print(digest({thing}))"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == digest(eval(thing))


def test_everything_that_changes_numbers_changes_the_key():
    class Newer(Inner):
        VERSION = 2

    Newer.__qualname__, Newer.__module__ = "Inner", Inner.__module__
    things = [
        Outer(),
        Outer(name="y"),
        Outer(inner=Inner(0.2)),
        Outer(inner=Newer()),
        Outer(steps=(2, 1)),
        Outer(options={"a": True}),
        Inner(),
        Inner(0.1 + 1e-17 + 1e-16),
        Inner(1),
        Inner(1.0),
        Inner(True),
        Inner("0.1"),
        Inner(None),
        Inner(float("inf")),
        Inner(float("-inf")),
        Inner(float("nan")),
        Inner(-0.0),
        Inner(0.0),
        Inner(torch.tensor([0.1])),
    ]
    digests = [digest(t) for t in things]
    assert [n for n in Counter(digests).values() if n > 1] == []


def test_a_field_called_version_does_not_hide_the_version():
    first, second = (
        make_dataclass("Made", [("version", int, 1)], namespace={"VERSION": n}, frozen=True)() for n in (1, 2)
    )
    assert digest(first) != digest(second)


@pytest.mark.parametrize("thing", [lambda x: x, object(), Inner, Path("/tmp"), 1j, b"x", open, torch.float32])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"a": [t]}, lambda t: Inner(t), lambda t: {t}])
def test_what_has_no_stable_description_is_refused(thing, wrap):
    with pytest.raises(TypeError, match="no stable description"):
        digest(wrap(thing))


# Tensors ----------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def test_tensor_digest_pinned():
    assert tensor_digest({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    tensors = {"b": torch.arange(3.0), "a": torch.tensor(True)}
    assert tensor_digest(tensors) == "77c7835aeba8341bcac79ba4b3a465eddb751718d6861bd520ce19af4ef1cc08"
    assert tensor_digest(dict(reversed(tensors.items()))) == tensor_digest(tensors)


def test_dtype_shape_values_and_names_count():
    tensors = [{"a": torch.zeros(shape, dtype=d)} for d in DTYPES for shape in ((), (1,), (4,), (2, 2), (0,), (0, 2))]
    tensors += [{"b": torch.zeros(4)}, {"a": torch.tensor([0, 0, 0, -0.0])}, {"a": torch.zeros(2), "b": torch.zeros(2)}]
    tensors += [{"a": torch.full((4,), float("nan"))}, {"a": torch.ones(4)}]
    digests = [tensor_digest(t) for t in tensors]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_memory_layout_does_not_count(dtype):
    dense = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    views = {
        "transposed": dense.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "strided": torch.stack((dense, dense), dim=-1)[..., 0],
        "parameter": torch.nn.Parameter(dense) if dense.is_floating_point() else dense,
        "conjugated": dense.conj().resolve_conj().conj() if dense.is_complex() else dense,
    }
    for name, view in views.items():
        assert tensor_digest({"a": view}) == tensor_digest({"a": dense}), name


# Shards -----------------------------------------------------------------------------------------


def test_stable_hash_pinned():
    assert stable_hash("val/n01440764/000293") == 16412036222913923848
    assert shard_of("val/n01440764/000293", 7) == stable_hash("val/n01440764/000293") % 7


@pytest.mark.parametrize("shards", [1, 2, 7, 64])
def test_shards_partition_evenly(shards):
    counts = Counter(shard_of(f"val/{i:05d}", shards) for i in range(20_000))
    assert sorted(counts) == list(range(shards))
    expected = 20_000 / shards
    assert all(abs(n - expected) < 4.5 * expected**0.5 for n in counts.values())


# Datasets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "start"),
    [
        (lambda: Photos(ImageTransform()), "e71c38334555a54a52c44965"),
        (lambda: Digits(ImageTransform(size=8, mean=(0.5,), std=(0.5,))), "8e95b4a6768577d49bd4caee"),
        (lambda: Tones(WaveTransform(8000, 4096)), "9fab0c726c4e92d345d1e414"),
    ],
    ids=["photos", "digits", "tones"],
)
def test_keys_of_datasets_are_pinned(dataset, start):
    assert dataset().key.startswith(start)


def test_a_renamed_dataset_keeps_its_key_by_its_old_name():
    class Renamed(Digits):
        NAME: ClassVar[str] = "Digits"

    class Inherited(Renamed):
        pass

    transform = ImageTransform(size=8, mean=(0.5,), std=(0.5,))
    assert Renamed(transform).key == Digits(transform).key
    assert short_name(Inherited).endswith("<locals>.Inherited")
    assert Inherited(transform).key != Digits(transform).key
