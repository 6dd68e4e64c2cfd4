"""Values without sense are refused when an object is built, by a message that names class, field and value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from tiny import ROOT

from attrib.checks import require
from attrib.config.objects import build
from attrib.methods.input_iba import InputIBA
from attrib.methods.readout import IBAReadout, ReadoutFit
from attrib.types import UserError

PRESETS = sorted((ROOT / "configs" / "method").glob("*.yaml"))


@dataclass(frozen=True)
class Thing:
    size: float | None = 1.0
    kind: str | None = "round"


@pytest.mark.parametrize(
    ("size", "bounds", "message"),
    [
        (0, {"at_least": 1}, "must be at least 1"),
        (0.0, {"above": 0}, "must be above 0"),
        (1.0, {"at_least": 0, "below": 1}, "must be at least 0 and below 1"),
        (1.5, {"above": 0, "at_most": 1}, "must be above 0 and at most 1"),
        (0, {"at_least": 1, "or_none": True}, "must be at least 1, or null"),
        (None, {"at_least": 1}, "must be at least 1"),
        (math.nan, {"at_least": 1}, "must be at least 1"),
        (math.inf, {}, "must be a finite number"),
    ],
)
def test_numbers(size, bounds, message):
    with pytest.raises(UserError) as error:
        require(Thing(size), "size", **bounds)
    assert str(error.value) == f"Thing.size is {size!r}, {message}"


def test_words():
    with pytest.raises(UserError, match=r"^Thing\.kind is 'flat', must be one of round, square$"):
        require(Thing(kind="flat"), "kind", one_of=("round", "square"))
    with pytest.raises(UserError, match=r"^Thing\.kind is None, must be one of round, square$"):
        require(Thing(kind=None), "kind", one_of=("round", "square"))


def test_what_is_allowed():
    require(Thing(0.0), "size", at_least=0, at_most=0)
    require(Thing(-3.0), "size")
    require(Thing(None, None), "size", "kind", one_of=("round",), or_none=True)


# ---- every method's fields ------------------------------------------------------------------------------

# Fields that may be negative, and those of whole numbers that may be anything.
SIGNED = {"baseline", "initial_alpha", "mean", "beta of Search", "z", "fallback", "low", "high"}
ANY = {"train_seed", "seed", "layers"}
# Further values that make no sense: zero where there must be something, and too much of what is bounded.
ZERO = {
    *("steps", "samples", "batch", "draws", "train_batch", "window", "stride", "cells", "tiles", "side", "segments"),
    *("levels", "rank", "passes", "dataset_size", "sub_dataset_size", "critic_iter", "lr", "mask_lr", "mean_lr"),
    *("std_lr", "weight_clip", "std", "kernel_width", "keep", "temperature", "max_blur", "compactness", "tolerance"),
    *("var_spread", "area_growth"),
}
TOO_MUCH = {
    "percentile": 200.0,
    "momentum": 1.0,
    "active_neurons_threshold": 1.0,
    **dict.fromkeys(("shrinkage", "initial", "keep"), 1.5),
}


def preset(path) -> Any:
    node = yaml.safe_load(path.read_text())
    node.pop("name"), node.pop("modalities", None)
    return build(node, path.stem)


def parts(thing: Any) -> Iterator[Any]:
    """A method and the dataclasses in it."""
    yield thing
    for field in dataclasses.fields(thing):
        if dataclasses.is_dataclass(value := getattr(thing, field.name)):
            yield from parts(value)


def nonsense(part: Any) -> Iterator[tuple[str, Any]]:
    """Each number's field, with a value that must be refused."""
    for name, hint in get_type_hints(type(part)).items():
        kinds = {hint, *get_args(hint)}
        if name not in {field.name for field in dataclasses.fields(part)} or get_origin(hint) is tuple:
            continue
        if float in kinds:
            yield from ((name, value) for value in (math.nan, math.inf))
        free = {name, f"{name} of {type(part).__name__}"} & (SIGNED | ANY)
        if (float in kinds or int in kinds) and not free:
            yield name, (-1.0 if float in kinds else -1)
        if name in ZERO and f"{name} of {type(part).__name__}" != "draws of CausalPaths":  # none are an ablation
            yield name, 0
        if name in TOO_MUCH:
            yield name, TOO_MUCH[name]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_number_without_sense_is_refused(path):
    for part in parts(preset(path)):
        for name, value in nonsense(part):
            with pytest.raises(UserError) as error:
                dataclasses.replace(part, **{name: value})
            assert f"{type(part).__name__}.{name} is " in str(error.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_word_that_is_unknown_is_refused(path):
    for part in parts(preset(path)):
        hints = get_type_hints(type(part))
        for field in dataclasses.fields(part):
            words = [word for word in get_args(hints[field.name]) if isinstance(word, str)]
            if words:
                with pytest.raises(UserError, match=rf"{type(part).__name__}\.{field.name} is 'nonsense', must be"):
                    dataclasses.replace(part, **{field.name: "nonsense"})


def test_what_is_an_ablation_or_a_paper_choice_is_allowed():
    method = InputIBA()
    dataclasses.replace(method.gan, epochs=0)
    dataclasses.replace(method.feature, beta=0.0, sigma=0.0, active_neurons_threshold=0.0)
    dataclasses.replace(method.feature, sigma=None, initial_alpha=-2.0)


def test_a_fit_checks_what_its_method_checks():
    with pytest.raises(UserError, match=r"IBAReadout\.epochs is -1, must be at least 0"):
        IBAReadout(epochs=-1)
    with pytest.raises(UserError, match=r"ReadoutFit\.epochs is -1, must be at least 0"):
        dataclasses.replace(IBAReadout().fit, epochs=-1)
    assert isinstance(IBAReadout(epochs=0).fit, ReadoutFit)
