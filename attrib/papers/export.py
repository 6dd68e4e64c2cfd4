"""A finished study as a preset that others run again: values, tolerances from intervals, digests of data and nets."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

import attrib
from attrib.config.compose import compose, compose_node, spelled
from attrib.config.places import presets as known_presets
from attrib.keys import digest
from attrib.results import labels, tables
from attrib.results.labels import AXES
from attrib.types import UserError


def digests(spec: Mapping[str, Any], samples: Mapping[str, str | None] | None) -> dict[str, str]:
    """What tells whether a cell is about the same net and the same samples, 16 digits each."""
    return {"weights": str(spec["weights"])[:16], "data": digest(dict(samples or {}))[:16]}


def as_preset(name: str, root: Path, folder: Path | None = None, confidence: float = 0.95) -> str:
    """The YAML of ``paper/NAME.yaml`` for what a work directory holds: a row per cell and map, a column per score.

    Columns are the scores that all cells have. A value's tolerance is half the width of its interval.

    Raises UserError for a work directory without scores, and for cells whose parts no preset describes, or that
    compute scores of one name in different ways.
    """
    items = labels.labelled(root)
    frame = tables.whole(tables.rows(root))
    if frame.empty:
        raise UserError(f"{root}: there are no scores to export")
    summary = tables.summary(frame, confidence)
    pending = summary[summary["pending"] > 0]
    if len(pending):
        raise UserError(f"{root}: {pending['cell'].iloc[0]} is not finished; the same attrib run goes on")
    summary = summary[summary["n"] > 0]
    items = [item for item in items if item.cell.folder.name in set(summary["cell"])]
    several = {axis for axis in AXES if len({getattr(item, axis) for item in items}) > 1}
    parts = [_parts(item.spec["config"], folder) for item in items]
    shared = [a for a in AXES[:2] if not parts[0][a].without and all(part[a] == parts[0][a] for part in parts)]
    metrics: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    columns: list[str] = []
    for item, part in zip(items, parts, strict=True):
        for metric, node in (item.spec["config"].get("metric") or {}).items():
            if metrics.setdefault(metric, node) != node:
                raise UserError(
                    f"{root}: the metric {metric} has other settings in {item.cell.folder.name} than before"
                )
        mine = summary[summary["cell"] == item.cell.folder.name]
        own = list(dict.fromkeys(f"{line['metric']}.{line['column']}" for line in mine.to_dict("records")))
        columns = [column for column in columns if column in own] if rows else own
        maps = list(dict.fromkeys(mine["map"]))
        label = ", ".join(getattr(item, axis) for axis in AXES if axis in several or axis == "method")
        seed = item.spec["config"].get("seed")
        words = [word for axis in AXES if axis not in shared for word in part[axis].overrides]
        for kind in maps:
            lines = mine[mine["map"] == kind].to_dict("records")
            row = label if len(maps) == 1 else f"{label}: {kind}"
            published = {f"{line['metric']}.{line['column']}": _value(line) for line in lines}
            rows[row] = {
                "with": shlex.join([*words, *([f"seed={seed}"] if seed else [])]),
                "map": kind,
                "published": published,
            }
            seen[row] = digests(item.spec, item.samples)
    if not columns:
        raise UserError(f"{root}: no score is there in all cells, so they make no table")
    for row_node in rows.values():
        row_node["published"] = {column: row_node["published"].get(column) for column in columns}
    paper = {
        "title": name,
        "source": f"a study of our own, attrib {attrib.__version__}",
        "place": f"exported from {root.name}",
        "tolerance": None,
        "needs": None,
        "duration": None,
        "note": f"Tolerances are half the widths of the study's {confidence:.0%} intervals.",
        "digests": seen,
        "size": "full",
        "columns": {column: column for column in columns},
        "rows": rows,
    }
    defaults: list[dict[str, Any]] = [{f"override /{axis}": parts[0][axis].name} for axis in shared] + [
        {"override /metric": []}
    ]
    fields = {axis: parts[0][axis].nested for axis in shared}
    node = {"defaults": defaults, **fields, "metric": metrics, "paper": paper}
    head = f"# @package _global_\n# {name}: a study exported by attrib paper --export; attrib paper {name}\n"
    return head + str(OmegaConf.to_yaml(OmegaConf.create(node)))


def _value(line: Mapping[str, Any]) -> dict[str, float] | None:
    half = (line["hi"] - line["lo"]) / 2
    if not (math.isfinite(line["mean"]) and math.isfinite(half)):
        return None
    return {"value": float(f"{line['mean']:.6g}"), "tolerance": float(f"{half:.3g}")}


# The parts of a cell ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A data set, net or method as its preset, and what differs from it: fields by their keys, and fields it lacks."""

    axis: str
    name: str
    fields: Mapping[str, Any]
    more: frozenset[str]  # of ``fields``, those that the preset does not have
    without: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        set_ = [f"{'+' * (key in self.more)}{key}={spelled(value)}" for key, value in self.fields.items()]
        return [f"{self.axis}={self.name}", *(f"~{key}" for key in self.without), *set_]

    @property
    def nested(self) -> dict[str, Any]:
        """The fields as they stand in YAML below the axis."""
        found: dict[str, Any] = {}
        for key, value in self.fields.items():
            *path, last = key.split(".")[1:]
            node = found
            for step in path:
                node = node.setdefault(step, {})
            node[last] = value
        return found


def _parts(config: Mapping[str, Any], folder: Path | None) -> dict[str, Part]:
    """Raises UserError if a part has a name that no preset has."""
    names = {axis: config[axis].get("name") for axis in AXES}
    for axis, name in names.items():
        if name not in known_presets(axis, folder):
            raise UserError(f"{axis}: no preset is called {name!r}, so the study cannot be written as presets")
    chosen = [*(f"{axis}={name}" for axis, name in names.items()), "metric=[]"]
    ours = {axis: dict(_leaves(config[axis], axis)) for axis in AXES}
    raw = OmegaConf.to_container(compose_node("run", chosen, folder))
    assert isinstance(raw, dict)
    open_ = [key for axis in AXES for key, value in _leaves(raw[axis], axis) if value == "???"]
    given = [f"{key}={spelled(ours[key.split('.')[0]][key])}" for key in open_ if key in ours[key.split(".")[0]]]
    base = compose("run", [*chosen, *given], folder).values
    found = {}
    for axis in AXES:
        theirs = dict(_leaves(base[axis], axis))
        fields = {k: v for k, v in ours[axis].items() if k not in theirs or theirs[k] != v or k in open_}
        gone = tuple(k for k in theirs if k not in ours[axis] and not any(o.startswith(f"{k}.") for o in ours[axis]))
        found[axis] = Part(axis, names[axis], fields, frozenset(fields.keys() - theirs.keys()), gone)
    return found


def _leaves(node: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{at}.{key}")
    else:
        yield at, node
