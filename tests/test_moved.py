"""A class of the user's moves to another module: its results are found again, and how to keep them is said."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from half_done import SPEC, UIDS, cell
from tiny import ROOT, called, pictures

from attrib.cli.main import dispatch
from attrib.store.cell import Cell
from attrib.store.files import write_json
from attrib.upkeep.moved import MovedClass
from attrib.upkeep.status import Observer

OLD, NEW = "photos.net.mine.aaaaaaaa", "photos.net.mine.bbbbbbbb"


def spec(path: str = "first.Mine", **other: Any) -> dict[str, Any]:
    method = {"class": path, "VERSION": 2, "beta": 0.5, "parts": [{"class": "attrib.x.Part", "VERSION": 1}]}
    about = {"dataset_key": "d" * 64, "model_key": "m" * 64, "layers": {"feature": "5"}, "seed": 0, "state_key": None}
    names = {"dataset": "photos", "model": "net", "method": "mine"}
    return {**SPEC, "names": names, "method": method, **about, **other}


def make(root: Path, name: str, about: dict[str, Any], maps: int = 0) -> Cell:
    made = cell(root, maps, 0, name=name)
    write_json(made.folder / "spec.json", about)
    return made


def found(root: Path, *filters: str) -> list[MovedClass]:
    return list(Observer(root, filters).look().moved)


def test_the_old_cell_and_the_line_to_write(tmp_path):
    make(tmp_path, OLD, spec(), 4)
    make(tmp_path, NEW, spec("second.place.Mine"), 1)
    (one,) = found(tmp_path)
    assert (one.cell, one.part, one.old, one.new, one.done) == (NEW, "maps", OLD, NEW, 4)
    assert one.older.names == {"second.place.Mine": "first.Mine"}
    assert 'second.place.Mine:  NAME: ClassVar[str] = "first.Mine"' in "\n".join(one.advice)
    assert OLD in one.advice[0]
    assert NEW in one.advice[-1]
    assert found(tmp_path, "bbbbbbbb") == [one]  # also where the filter hides the old one
    assert found(tmp_path, "aaaaaaaa") == []
    assert json.loads(json.dumps(one.record()))["names"] == {"second.place.Mine": "first.Mine"}


def test_it_is_shown(tmp_path, capfd):
    make(tmp_path, OLD, spec(), 4)
    make(tmp_path, NEW, spec("second.Mine"))
    shown = called(capfd, lambda: dispatch(["status", str(tmp_path)]))
    assert 'NAME: ClassVar[str] = "first.Mine"' in shown.out
    listed = json.loads(called(capfd, lambda: dispatch(["status", str(tmp_path), "--json"])).out)
    assert [(one["new"], one["old"], one["done"]) for one in listed["moved"]] == [(NEW, OLD, 4)]


def test_a_class_within_a_field_and_a_class_with_another_name(tmp_path):
    about = spec("first.Mine")
    about["method"]["parts"][0]["class"] = "first.Part"
    now = spec("second.Renamed")  # the name in the configuration is still "mine"
    now["method"]["parts"][0]["class"] = "second.Part"
    make(tmp_path, OLD, about, 4)
    make(tmp_path, NEW, now)
    assert found(tmp_path)[0].older.names == {"second.Renamed": "first.Mine", "second.Part": "first.Part"}


@pytest.mark.parametrize(
    "other",
    [
        {"method": {**spec()["method"], "class": "second.Mine", "VERSION": 3}},
        {"method": {**spec()["method"], "class": "second.Mine", "beta": 1.0}},
        {"method": {**spec()["method"], "class": "second.Mine", "parts": []}},
        {"method": {**spec()["method"], "class": "second.Mine", "more": None}},
        {"dataset_key": "e" * 64},
        {"model_key": "n" * 64},
        {"layers": {"feature": "6"}},
        {"seed": 1},
        {"state_key": "f" * 64},
        {"names": {"method": "yours"}, "method": {**spec()["method"], "class": "second.Yours"}},
    ],
)
def test_what_is_another_thing_is_not_named(tmp_path, other):
    make(tmp_path, OLD, spec(), 4)
    make(tmp_path, NEW, {**spec("second.Mine"), **other})
    assert found(tmp_path) == []


@pytest.mark.parametrize("path", ["first.Mine", "second.Mine"])
def test_equal_classes_and_finished_cells_are_not_named(tmp_path, path):
    make(tmp_path, OLD, spec(), 10)
    make(tmp_path, NEW, spec(path), 10 if path == "second.Mine" else 0)
    assert found(tmp_path) == []


def test_of_several_old_cells_the_one_that_has_most(tmp_path):
    make(tmp_path, OLD, spec(), 4)
    make(tmp_path, "photos.net.mine.cccccccc", spec("between.Mine"), 2)
    make(tmp_path, NEW, spec("second.Mine"))
    assert {one.new: one.old for one in found(tmp_path)} == {NEW: OLD, "photos.net.mine.cccccccc": OLD}


def state(root: Path, key: str, path: str, samples: tuple[str, ...] = ("a", "b")) -> None:
    about = {"key": key, "fit": {"class": path, "VERSION": 1, "draws": 3}, "samples": list(samples)}
    write_json(root / "state" / f"{key[:8]}.json", about)


THEN, NOW = "1" * 64, "2" * 64


def test_a_fit_that_moved_along(tmp_path):
    """Its class stands in the state's key, which is in the cell's."""
    state(tmp_path, THEN, "first.MyFit")
    make(tmp_path, OLD, spec(state_key=THEN), 4)
    make(tmp_path, NEW, spec("second.Mine", state_key=NOW))
    (one,) = found(tmp_path)  # its state is not fitted yet
    assert (one.older.names, one.older.fit) == ({"second.Mine": "first.Mine"}, "first.MyFit")
    assert 'the class of its fit:  NAME: ClassVar[str] = "first.MyFit"' in "\n".join(one.advice)
    state(tmp_path, NOW, "second.MyFit")
    (one,) = found(tmp_path)
    assert (one.older.names, one.older.fit) == ({"second.Mine": "first.Mine", "second.MyFit": "first.MyFit"}, None)


def test_a_fit_that_moved_alone(tmp_path):
    make(tmp_path, OLD, spec(state_key=THEN), 4)
    make(tmp_path, NEW, spec(state_key=NOW))
    state(tmp_path, THEN, "first.MyFit")
    assert found(tmp_path) == []  # more likely fitted on other samples
    state(tmp_path, NOW, "second.MyFit")
    assert found(tmp_path)[0].older.names == {"second.MyFit": "first.MyFit"}
    state(tmp_path, NOW, "second.MyFit", ("a", "b", "c"))
    assert found(tmp_path) == []


def test_a_fit_of_which_nothing_is_known(tmp_path):
    make(tmp_path, OLD, spec(state_key=THEN), 4)
    make(tmp_path, NEW, spec("second.Mine", state_key=NOW))
    (one,) = found(tmp_path)
    assert one.older.fit == ""
    assert "its fit, if that was moved too" in "\n".join(one.advice)
    state(tmp_path, THEN, "attrib.methods.iba.Statistics")  # which has a name of its own: the samples are others
    assert found(tmp_path) == []


def metric(made: Cell, folder: str, path: str, scores: int) -> None:
    about = {"name": folder.rpartition(".")[0], "spec": {"class": path, "VERSION": 1, "steps": 9}}
    write_json(made.folder / "scores" / folder / "metric.json", about)
    rows = made.scores(folder)
    for uid in UIDS[:scores]:
        rows.add(uid, "f", {("map", "mine"): 0.5})
    rows.flush()


def test_a_metric_that_moved(tmp_path):
    made = make(tmp_path, OLD, spec(), 10)
    metric(made, "mine.11111111", "first.Score", 7)
    metric(made, "mine.22222222", "second.Score", 2)
    metric(made, "other.33333333", "second.Other", 2)
    (one,) = found(tmp_path)
    assert (one.part, one.done, one.older.names) == ("mine.22222222", 7, {"second.Score": "first.Score"})
    assert (one.old, one.new) == (f"{OLD}/scores/mine.11111111", f"{OLD}/scores/mine.22222222")


def test_damaged_descriptions_do_no_harm(tmp_path):
    make(tmp_path, OLD, spec(), 4)
    make(tmp_path, NEW, spec("second.Mine"))
    (tmp_path / OLD / "spec.json").write_text("[1")
    assert found(tmp_path) == []
    write_json(tmp_path / OLD / "spec.json", {**spec(), "method": [1], "names": 3})
    assert found(tmp_path) == []


MODULE = """
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attrib.fit import Fit
from attrib.methods import Method


@dataclass(frozen=True)
class MyFit(Fit):
    #fit
    VERSION: ClassVar[int] = 1
    roles: ClassVar[tuple[str, ...]] = ()

    def run(self, model, data, partial, report):
        return {"mean": torch.stack([batch.x.mean() for batch in data]).mean()}


@dataclass(frozen=True)
class MyMethod(Method):
    #method
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "brightness"}

    @property
    def fit(self):
        return MyFit()

    def attribute(self, model, batch, state, noise):
        return {"map": (batch.x - state["mean"]).mean(1)}


@dataclass(frozen=True)
class MyScore:
    #metric
    VERSION: ClassVar[int] = 1
    NEEDS_ROI: ClassVar[bool] = False
    NEEDS_EXPLAIN: ClassVar[bool] = False
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    roles: ClassVar[tuple[str, ...]] = ()
    COLUMNS: ClassVar[Mapping[str, str]] = {"mine": "higher"}
    CURVES: ClassVar[Mapping[str, str]] = {}

    def score(self, model, batch, map, noise):
        return {"mine": map.double().mean((1, 2))}
"""


def test_of_a_real_run(monkeypatch, capfd, tmp_path):
    """Move the module, follow the advice: the old results are gone on with, and nothing is computed twice."""
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    configs, root, images = tmp_path / "configs", tmp_path / "work", pictures(tmp_path)
    shutil.copytree(ROOT / "tests" / "configs", configs)
    (configs / "metric").mkdir()

    def place(name: str, code: str) -> None:
        (tmp_path / "code" / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        (configs / "method" / "mine.yaml").write_text(f"name: mine\n_target_: {name}.MyMethod\n")
        (configs / "metric" / "mine.yaml").write_text(f"mine:\n  _target_: {name}.MyScore\n")

    def run(limit: int) -> dict[str, Any]:
        words = ["run", "--config-dir", str(configs), "dataset=tiny", "model=small_cnn", "method=mine", "metric=[mine]"]
        more = [f"dataset.root={images}", f"run.root={root}", f"run.limit={limit}", "run.progress=false"]
        ended = called(capfd, lambda: dispatch([*words, *more]))
        assert ended.status == 0, ended.err
        newest = max(root.glob("*/runs/*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())

    place("moved_first", MODULE)
    assert run(5)["maps_computed"] == 5
    place("moved_second", MODULE)
    assert run(1)["maps_computed"] == 1
    (one,) = found(root)
    assert one.done == 5
    assert one.older.names == {f"moved_second.{kind}": f"moved_first.{kind}" for kind in ("MyMethod", "MyFit")}

    kept = MODULE
    for mark, kind in (("fit", "MyFit"), ("method", "MyMethod")):
        kept = kept.replace(f"#{mark}", f'NAME: ClassVar[str] = "moved_first.{kind}"')
    place("moved_third", kept)
    shutil.rmtree(root / one.new)
    summary = run(6)
    assert (summary["maps_present"], summary["maps_computed"]) == (5, 1)
    assert [one for one in found(root) if one.part == "maps"] == []
