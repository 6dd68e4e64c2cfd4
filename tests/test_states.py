"""Fitted states: computed once, published whole, the first writer decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from attrib.experiment.samples import Samples
from attrib.fit import Fit, FitData, Partial, Progress, State
from attrib.models import Classifier
from attrib.running.hooks import FitBar
from attrib.running.states import load_confidence, load_state
from attrib.types import Batch, SampleError, UserError

UIDS = ("a", "b", "c")
KEY = "0123456789abcdef"


class Data:
    uids, key = UIDS, "data"

    def __init__(self) -> None:
        self.content = dict.fromkeys(UIDS, "1")

    def fingerprint(self, uid: str) -> str:
        return self.content[uid]

    def batch(self, uids) -> Batch:
        x = torch.tensor([[float(UIDS.index(u)), float(self.content[u])] for u in uids])
        return Batch(tuple(uids), x, torch.zeros(len(uids), dtype=torch.long))


@dataclass(frozen=True)
class Counting(Fit):
    """Counts its own runs in ``calls``; may be overtaken by another job, or fail."""

    VERSION: ClassVar[int] = 1
    TARGETS: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    calls: ClassVar[list[int]] = []

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        self.calls.append(1)
        partial.save({"step": torch.arange(6).reshape(2, 3).T})
        assert partial.load() is not None
        return {"value": torch.full((2,), float(len(self.calls))), "n": torch.tensor(len(data.uids))}


@pytest.fixture
def samples() -> Samples:
    Counting.calls.clear()
    torch.manual_seed(0)
    return Samples(Data(), Classifier(nn.Linear(2, 3)), UIDS)


def test_fitted_once(tmp_path, samples):
    first = load_state(tmp_path, KEY, Counting(), samples.model, samples)
    again = load_state(tmp_path, KEY, Counting(), samples.model, samples)
    assert first["n"] == 3
    assert torch.equal(first["value"], again["value"])
    assert len(Counting.calls) == 1
    about = json.loads((tmp_path / "state" / f"{KEY[:8]}.json").read_text())
    assert about["key"] == KEY
    assert about["samples"] == list(UIDS)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [f"{KEY[:8]}.json", f"{KEY[:8]}.safetensors"]


def test_the_first_of_two_jobs_decides(tmp_path, samples):
    """A job that finishes later must go on with the file that is there, not with its own numbers."""

    @dataclass(frozen=True)
    class Overtaken(Counting):
        def run(self, model, data, partial, report) -> State:
            load_state(tmp_path, KEY, Counting(), model, data)  # another job, meanwhile
            return {"value": torch.full((2,), -1.0), "n": torch.tensor(0)}

    state = load_state(tmp_path, KEY, Overtaken(), samples.model, samples)
    assert state["value"].tolist() == [1.0, 1.0]


def test_a_damaged_state_is_fitted_again(tmp_path, samples):
    load_state(tmp_path, KEY, Counting(), samples.model, samples)
    (tmp_path / "state" / f"{KEY[:8]}.safetensors").write_bytes(b"damaged")
    assert load_state(tmp_path, KEY, Counting(), samples.model, samples)["value"].tolist() == [2.0, 2.0]


def test_an_unusable_estimation_set_is_a_users_error(tmp_path, samples):
    @dataclass(frozen=True)
    class Failing(Counting):
        def run(self, model, data, partial, report) -> State:
            raise SampleError("a.png cannot be read")

    with pytest.raises(UserError, match=r"Failing cannot be fitted: a\.png"):
        load_state(tmp_path, KEY, Failing(), samples.model, samples)


def test_confidence_is_remembered_by_content(tmp_path, samples):
    asked: list[tuple[str, ...]] = []
    original = samples.confidence

    def watched(uids):
        asked.append(tuple(uids))
        return original(uids)

    samples.confidence = watched
    first = load_confidence(tmp_path, samples, UIDS[:2])
    assert load_confidence(tmp_path, samples, UIDS) | first == load_confidence(tmp_path, samples, UIDS)
    samples.dataset.content["b"] = "2"
    changed = load_confidence(tmp_path, samples, UIDS)
    assert asked == [("a", "b"), ("c",), ("b",)]
    assert changed["a"] == first["a"]
    assert changed["b"] != first["b"]


def test_a_fit_in_parts_shows_a_bar_for_each(capfd):
    bar = FitBar()
    for what, done in (("one", 1), ("one", 3), ("two", 2), ("two", 1), ("two", 3)):  # "two" runs again
        bar.show(Progress(what, done, 3, "classes"))
    bar.close()
    said = capfd.readouterr().err
    assert said.count("3/3") == 2
    assert "classes" in said
