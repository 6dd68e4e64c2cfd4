"""Selection: each rule, their order, and the messages when something is wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from attrib.datasets import Selection
from attrib.keys import spec
from attrib.types import SampleError, UserError


@dataclass(frozen=True)
class Fake:
    """Nine samples of three classes; box areas 0, 0.1, ..., 0.7 and one sample without a box."""

    uids: tuple[str, ...] = tuple(f"{c}/{i}" for c in ("ape", "bee", "cat") for i in range(3))
    broken: str = ""

    def box_area(self, uid: str) -> float | None:
        if uid == self.broken:
            raise SampleError(f"{uid}: bad header")
        position = self.uids.index(uid)
        return position / 10 if position < 8 else None


def unused(uids):
    raise AssertionError("the network must not be asked")


def test_no_rule_keeps_everything():
    assert Selection().apply(Fake(), unused) == Fake().uids


def test_count_is_stable_mixed_and_grows():
    chosen = [Selection(count=n).apply(Fake(), unused) for n in range(1, 10)]
    for n, uids in enumerate(chosen, 1):
        assert len(uids) == n
        assert list(uids) == sorted(uids)
        assert set(uids) <= set(chosen[-1])
    assert all(set(a) < set(b) for a, b in itertools.pairwise(chosen))
    assert Selection(count=99).apply(Fake(), unused) == Fake().uids
    assert Selection(count=4).apply(Fake(uids=Fake().uids[::-1]), unused) == chosen[3]
    assert len({Selection(count=4, seed=s).apply(Fake(), unused) for s in range(10)}) > 5


def test_box_area_is_strictly_below_and_drops_samples_without_a_box():
    assert Selection(max_box_area=0.3).apply(Fake(), unused) == ("ape/0", "ape/1", "ape/2")
    assert Selection(max_box_area=1.0).apply(Fake(), unused) == Fake().uids[:8]


def test_confidence_is_asked_once_for_what_the_cheaper_rules_left(tmp_path):
    (tmp_path / "list.txt").write_text("bee/0\nape/1\ncat/2\nape/2.JPEG\n")
    asked = []

    def confidence(uids):
        asked.append(tuple(uids))
        return {"ape/1": 0.6, "ape/2": 0.59, "bee/0": 0.99}

    selection = Selection(count=2, list=str(tmp_path / "list.txt"), max_box_area=0.33, min_confidence=0.6)
    assert selection.apply(Fake(), confidence) == ("ape/1", "bee/0")
    assert asked == [("ape/1", "ape/2", "bee/0")]


def test_unreadable_samples_stay_so_that_the_run_reports_them():
    assert "cat/0" in Selection(max_box_area=0.2).apply(Fake(broken="cat/0"), unused)
    kept = Selection(min_confidence=0.5).apply(Fake(), lambda uids: dict.fromkeys(uids[1:], 0.1))
    assert kept == ("ape/0",)


def test_list_takes_uids_and_file_names(tmp_path):
    (tmp_path / "list.txt").write_text("\ncat/1\n  ape/0.png  \ncat/1\n")
    assert Selection(list=str(tmp_path / "list.txt")).apply(Fake(), unused) == ("ape/0", "cat/1")


def test_unknown_entry_names_file_line_and_near_matches(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("ape/0\nbeee/1\n")
    with pytest.raises(UserError, match=r"list\.txt, line 2: no sample 'beee/1' in the dataset; did you mean 'bee/1'"):
        Selection(list=str(path)).apply(Fake(), unused)
    with pytest.raises(UserError, match="cannot be read"):
        Selection(list=str(tmp_path / "none.txt")).apply(Fake(), unused)


def test_nothing_left_says_which_rule_removed_how_many():
    with pytest.raises(UserError, match=r"of 9: .*max_box_area=0\.2 removed 7, .*min_confidence=0\.9 removed 2"):
        Selection(max_box_area=0.2, min_confidence=0.9).apply(Fake(), lambda uids: dict.fromkeys(uids, 0.5))
    with pytest.raises(UserError, match=r"max_box_area=0\.0 removed 9$"):
        Selection(max_box_area=0.0, min_confidence=0.9).apply(Fake(), unused)


@pytest.mark.parametrize(("field", "value"), [("count", 0), ("min_confidence", 60), ("max_box_area", -0.1)])
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UserError, match=f"select.{field}"):
        Selection(**{field: value})


def test_a_permutation_of_numpy():
    random = np.random.RandomState(1234).permutation(9)[:4]
    assert Selection(count=4, permutation=1234).apply(Fake(), unused) == tuple(sorted(Fake().uids[i] for i in random))
    assert spec(Selection(count=4)) == spec(Selection(count=4, permutation=None))
    assert "permutation" not in spec(Selection(count=4))
    for fields in ({}, {"count": 3, "min_confidence": 0.5}, {"count": 3, "list": "x"}):
        with pytest.raises(UserError, match=r"select\.permutation needs select\.count, and no other rule"):
            Selection(permutation=1, **fields)
