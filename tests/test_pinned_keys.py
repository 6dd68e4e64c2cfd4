"""Names and keys of everything that is shipped, as they were before the modules moved.

If a test here fails, the results of everybody's work directories are not found any more. ``pinned_keys.json`` was
written by the code of commit 2a40110, the last one before the move. A class whose numbers change raises its
``VERSION``, and its line there changes with it; a new preset adds a line.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import attrib
from attrib import keys
from attrib.config.compose import compose
from attrib.config.objects import build, experiment, target
from attrib.config.places import presets

PINNED = json.loads((Path(__file__).parent / "pinned_keys.json").read_text())


def made(axis: str, name: str):
    chosen = f"[{name}]" if axis == "metric" else name
    node = compose("run", [f"{axis}={chosen}"]).values[axis]
    node = node[name] if axis == "metric" else node
    return build({k: v for k, v in node.items() if k not in ("name", "modalities")}, name)


@pytest.mark.parametrize("preset", [f"{axis}={name}" for axis in ("method", "metric") for name in presets(axis)])
def test_a_presets_name_and_key(preset):
    thing = made(*preset.split("="))
    found = {"class": keys.spec(thing)["class"], "key": keys.digest(thing)}
    if getattr(thing, "fit", None) is not None:
        found["fit"] = keys.digest(thing.fit)
    assert found == PINNED[preset]


def test_a_cells_folder():
    """Dataset, network with its weights, and method together."""
    composition = compose("run", ["method=random", "metric=[]"])
    cell = experiment(composition.values)
    assert cell.folder(cell.cell_key(None)) == "photos.efficientnet_lite0.random.1c1efed3"


def keyed_classes() -> list[type]:
    """Every frozen dataclass of attrib that has a VERSION or a NAME of its own."""
    found = {}
    for info in pkgutil.walk_packages(attrib.__path__, "attrib."):
        if info.name in ("attrib.__main__", "attrib.cluster.task"):
            continue
        for thing in vars(importlib.import_module(info.name)).values():
            if isinstance(thing, type) and dataclasses.is_dataclass(thing) and {"VERSION", "NAME"} & vars(thing).keys():
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize("kind", keyed_classes(), ids=lambda kind: kind.__qualname__)
def test_what_is_in_a_key_has_a_name_of_its_own(kind):
    """Written down, so that moving the file changes no key."""
    assert isinstance(vars(kind).get("NAME"), str)


def test_no_two_classes_have_one_name():
    names = [keys.stable_name(kind) for kind in keyed_classes()]
    assert len(set(names)) == len(names)


@dataclass(frozen=True)
class Moved:
    NAME: ClassVar[str] = "my_old_module.Mine"
    VERSION: ClassVar[int] = 2
    rate: float = 0.1


@dataclass(frozen=True)
class Derived(Moved):
    pass


def test_a_class_that_moved_keeps_its_key():
    assert keys.spec(Moved()) == {"class": "my_old_module.Mine", "VERSION": 2, "rate": 0.1}
    # Somebody's subclass is another class: it does not get the other's results.
    assert keys.spec(Derived())["class"] == "test_pinned_keys.Derived"


def test_paths_that_yaml_files_of_earlier_versions_name():
    for old in ("covariance.Covariance", "statistics.FeatureStatistics", "wgan.WGAN"):
        node = {"_target_": f"attrib.methods.{old}"}
        assert keys.stable_name(target(node, "here")) == f"attrib.methods.{old}"
    assert keys.spec(build({"_target_": "attrib.methods.wgan.WGAN", "epochs": 3}, "here"))["epochs"] == 3
