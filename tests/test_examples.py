"""The examples in docstrings run, in little time; every method and metric that can be chosen has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import attrib
from attrib.config.objects import target
from attrib.config.places import presets

# Rooms whose examples are run: those that people call from Python.
ROOMS = ("api", "methods", "metrics", "models", "checks", "errors", "keys", "types", "units", "config.compose")
REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
WITHOUT = {
    "Attention": "needs a net with attention: tests/test_attention_methods.py",
    "CausalPaths": "needs a net that is right about some classes: docs/tutorials/causal-paths.md",
    "CausalGradient": "as CausalPaths",
    "Eraser": "needs a net of texts: docs/how-to",
    "AdversarialAgreement": "needs ART, which is optional",
    "quantus_metric": "needs quantus, which is optional",
}


def modules() -> list[str]:
    found = []
    for room in ROOMS:
        module = importlib.import_module(f"attrib.{room}")
        found.append(module.__name__)
        below = pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}.")
        found += [one.name for one in below]
    return found


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in modules() for test in finder.find(importlib.import_module(name), name)]
    # One that needs a work directory is shown, but not run: tests/test_work_directory.py does what it does.
    return [test for test in found if any(not one.options.get(doctest.SKIP) for one in test.examples)]


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name.removeprefix("attrib."))
def test_example(example):
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert result.attempted
    assert not result.failed, "".join(said)


def test_every_method_and_metric_has_one():
    nodes = [OmegaConf.to_container(OmegaConf.load(path)) for path in presets("method").values()]
    nodes += [
        node for path in presets("metric").values() for node in OmegaConf.to_container(OmegaConf.load(path)).values()
    ]
    kinds = {target(node, "preset") for node in nodes}
    assert set(WITHOUT) <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        assert (kind.__name__ in WITHOUT) != (">>>" in (kind.__doc__ or "")), kind.__name__
    for name in attrib.__all__:
        documented = getattr(attrib, name)
        assert ">>>" in documented.__doc__, name


def test_everything_in_the_reference_has_one():
    paths = [path for page in REFERENCE.glob("*.md") for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(paths) > 60
    for path in paths:
        module, name = path.rsplit(".", 1)
        documented = getattr(importlib.import_module(module), name)
        assert name in WITHOUT or ">>>" in (documented.__doc__ or ""), path
