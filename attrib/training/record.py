"""The record of a training in its folder: which training it is, its curve, its result."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from matplotlib.figure import Figure

from attrib.store.reading import UnreadableError, document
from attrib.types import UserError

T = TypeVar("T")
ConfigNode = Mapping[str, Any]

PARTS = ("train", "validation", "test")

# The fields that do not change the trained weights: paths, names, and what is only for the attribution to come.
_WITHOUT_EFFECT = {
    "dataset": ("name", "root", "target", "select", "estimation", "encoder", "split", "path", "archive"),
    "model": ("name", "layers", "checkpoint", "match", "classes"),
    "train": ("name", "root", "device", "progress", "restart", "hooks", "vis_backends", "baseline"),
}


def weight_settings(config: ConfigNode) -> dict[str, Any]:
    """All of a configuration that changes the trained weights, and ``data``, a digest of the samples."""
    kept = {part: {k: v for k, v in config[part].items() if k not in names} for part, names in _WITHOUT_EFFECT.items()}
    # The vocabulary is made from the training texts; the configuration only says where it will be found.
    kept["model"]["input"] = {k: v for k, v in kept["model"].get("input", {}).items() if k != "vocabulary"}
    if kept["model"].get("output") is None:  # as before there was such a field
        kept["model"].pop("output", None)
    return {**kept, "seed": config["seed"], "data": config["data"]}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}
    return {name: value}


def read(path: Path, kind: type[T]) -> T:
    """A file of a training. Raises UserError, which says what to do, if it is something else; OSError."""
    try:
        return document(path, kind)
    except UnreadableError as error:
        raise UserError(f"{error}; begin anew with train.restart=true") from error


class Trained(TypedDict):
    """What of ``config.json`` says which training it is."""

    dataset: dict[str, Any]
    model: dict[str, Any]
    train: dict[str, Any]
    seed: int
    data: Any


def check_same(folder: Path, config: ConfigNode) -> None:
    """Raises UserError, saying what differs, if ``config`` is not the training that this folder holds."""
    there = _flat(weight_settings(read(folder / "config.json", Trained)))
    here = _flat(json.loads(json.dumps(weight_settings(config))))
    names = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if names:
        said = "; ".join(
            "the training or validation samples have changed"
            if k == "data"
            else f"{k} was {there.get(k)!r}, now {here.get(k)!r}"
            for k in names[:6]
        )
        raise UserError(
            f"{folder} holds another training: {said}. Take another folder with train.name=..., "
            "or throw that one away with train.restart=true"
        )


def curve(history: Sequence[Mapping[str, float]], best: int) -> bytes:
    """Loss and accuracy by epoch, as a PNG file; a line marks the epoch that was kept."""
    figure = Figure(figsize=(8, 3))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.17, top=0.96)
    epochs = [row["epoch"] for row in history]
    for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        train = "loss" if kind == "loss" else "train_accuracy"
        axes.plot(epochs, [row[train] for row in history], label="training", marker=".")
        axes.plot(epochs, [row[f"validation_{kind}"] for row in history], label="validation", marker=".")
        axes.axvline(best, color="0.7", linewidth=1, zorder=0)
        axes.set(xlabel="epoch", ylabel=kind)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


class Baseline(TypedDict):
    """What a simple classifier of texts reaches."""

    name: str
    test: float


@dataclass(frozen=True)
class TrainingResult:
    """The content of ``result.json``."""

    name: str
    folder: str
    accuracy: Mapping[str, float]  # of the best epoch's weights on each of PARTS
    samples: Mapping[str, int]
    epochs: int
    best_epoch: int
    seconds: float  # of all epochs, also those of earlier starts
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        if missing := [part for part in PARTS if part not in self.accuracy or part not in self.samples]:
            raise ValueError(f"nothing is said about {', '.join(missing)}")

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {100 * self.accuracy[k]:.2f} % (n={self.samples[k]})" for k in PARTS)
        beside = f"; {self.baseline['name']}: test {100 * self.baseline['test']:.2f} %" if self.baseline else ""
        return (
            f"{self.name}: accuracy {parts}{beside}; epoch {self.best_epoch} of {self.epochs}, {self.seconds:.0f} s; "
            f"{Path(self.folder) / 'model.safetensors'}"
        )
