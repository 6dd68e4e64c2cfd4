"""Batch: one row per sample, whatever is picked, moved or cast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib.types import Batch

ALL = Batch(
    ("a", "b", "c", "d"),
    torch.arange(24.0).reshape(4, 3, 2),
    torch.tensor([3, 1, 0, 2]),
    torch.arange(16).reshape(4, 2, 2) % 3 == 0,
    torch.tensor([4, 3, 2, 1]),
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(-4, 3), max_size=6)
    | st.builds(slice, *[st.none() | st.integers(-5, 5)] * 2, st.none() | st.integers(1, 3))
)
def test_rows_are_picked_together(rows):
    picked = ALL[rows]
    expected = list(range(4))[rows] if isinstance(rows, slice) else [r % 4 for r in rows]
    assert picked.uids == tuple("abcd"[i] for i in expected)
    assert len(picked) == len(expected)
    for name, value in ALL._tensors():
        assert torch.equal(getattr(picked, name), value[expected])


def test_what_is_not_there_stays_so():
    plain = Batch(("a",), torch.zeros(1, 3), torch.zeros(1))[[0, 0]].to("cpu", torch.float64)
    assert plain.roi is None
    assert plain.lengths is None
    assert plain.uids == ("a", "a")


def test_only_floating_inputs_are_cast():
    cast = ALL.to("cpu", torch.float64)
    assert cast.x.dtype == torch.float64
    assert (cast.target.dtype, cast.roi.dtype, cast.lengths.dtype) == (torch.int64, torch.bool, torch.int64)
    assert ALL.x.dtype == torch.float32
    assert ALL.to("cpu").x is ALL.x
    tokens = Batch(("a",), torch.tensor([[5, 6]]), torch.tensor([0]))
    assert tokens.to("cpu", torch.float64).x.dtype == torch.int64


@pytest.mark.parametrize("field", ["x", "target", "roi", "lengths"])
@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(5), torch.tensor(1.0)])
def test_one_row_per_uid(field, wrong):
    values = dict(ALL._tensors()) | {field: wrong}
    with pytest.raises(ValueError, match=rf"Batch\.{field} has shape .* expected 4 rows"):
        Batch(ALL.uids, **values)


def test_frozen():
    with pytest.raises(AttributeError):
        ALL.x = torch.zeros(4)
