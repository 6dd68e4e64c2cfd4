"""Values of a metric's fields that make no sense are refused when it is built, by the field's name, in every preset."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from tiny import ROOT

from attrib.config.objects import build
from attrib.types import UserError

PRESETS = {
    path.stem: next(iter(yaml.safe_load(path.read_text()).values()))
    for path in sorted((ROOT / "configs" / "metric").glob("*.yaml"))
}
# Beyond what no number of any metric can be: negative, or NaN.
BEYOND: dict[str, list[tuple[str, Any]]] = {
    "AdversarialAgreement": [("attack", "poison"), ("settings", 3), ("margin", -1.0), ("margin", math.inf),
                             ("min_confidence", 1.5)],
    "Degradation": [("tile", (8,)), ("tile", (0, 8)), ("baseline", "noise")],
    "EHR": [("base_threshold", 1.2), ("steps", 1), ("normalize", "minmax")],
    "Eraser": [("bins", ()), ("bins", (0.1, 1.2)), ("words", "drop")],
    "Infidelity": [("samples", 0), ("sides", (5, 2)), ("sides", (0, 2)), ("sigma", math.inf), ("beta", "negative")],
    "InsertionDeletion": [("steps", 0), ("fraction", 0.0), ("fraction", 1.2), ("window", 0), ("sigma", 0.0),
                           ("kernel", 4), ("output", "loss")],
    "IROF": [("segments", 0), ("compactness", 0.0), ("baseline", "noise")],
    "Lipschitz": [("samples", 0), ("radius", 0.0), ("radius", math.inf), ("normalize", "l1")],
    "Localisation": [("thresholds", 0), ("normalize", "minmax")],
    "ROAD": [("shares", ()), ("shares", (0.5, 1.0)), ("noise", math.inf)],
    "SensitivityN": [("points", 0), ("samples", 1), ("fraction", 1.0), ("sizes", ()), ("sizes", (0, 5))],
}  # fmt: skip
OF_QUANTUS = [
    ("ROAD", {"percentages": [10, 120]}, "percentages"),
    ("ROAD", {"noise": -0.1}, "noise"),
    ("PixelFlipping", {"features_in_step": 0}, "features_in_step"),
    ("MaxSensitivity", {"nr_samples": -1}, "nr_samples"),
    ("RegionPerturbation", {"patch_size": 2.5}, "patch_size"),
]


def senseless(name: str) -> Iterator[tuple[str, Any]]:
    metric = build(PRESETS[name], name)
    hints = get_type_hints(type(metric))
    for field in dataclasses.fields(metric):
        for kind in (hints[field.name], *get_args(hints[field.name])):  # of a union, its arms
            if get_origin(kind) is tuple:
                yield field.name, tuple(number(-1) for number in get_args(kind) if number is not Ellipsis)
            elif kind in (int, float):
                yield field.name, kind(-1)
                if kind is float:
                    yield field.name, math.nan
    yield from BEYOND[type(metric).__name__]


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("quantus")])
def test_refused(name):
    for field, value in senseless(name):
        other = "steps" if field == "step" else field  # of these, one is null
        with pytest.raises(UserError, match=rf"\.{field} is |{field} must be "):
            build({**PRESETS[name], other: None, field: value}, f"{name} with {field}={value}")


@pytest.mark.parametrize(("metric", "parameters", "field"), OF_QUANTUS)
def test_parameters_of_quantus(metric, parameters, field):
    with pytest.raises(UserError, match=f"Quantus.parameters: {field} is"):
        build({**PRESETS["quantus"], "metric": metric, "parameters": parameters}, "quantus")
