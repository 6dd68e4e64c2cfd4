"""Labels: the names under which cells and metrics are shown.

A label is the name from the configuration; where one name stands for several things, the fields in which
they differ follow.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attrib import keys
from attrib.errors import UserError
from attrib.store.cell import Cell, Record, cells, counts
from attrib.store.files import Key
from attrib.store.reading import document, fits
from attrib.store.schemas import MetricNote, Spec

AXES = ("dataset", "model", "method")
# What a spec.json must say, see attrib.running.plan.spec_of.
_SPEC = {"names", "config", "method", "maps", "layers", "weights", "seed", "versions", "git", "pictures"}
_SPEC |= {"dataset_key", "model_key", "state_key"}


@dataclass(frozen=True)
class Labelled:
    """A cell, its spec and the names under which tables show its dataset, model and method.

    ``samples``: the uids the cell is about now, with the fingerprint that counts or None, if any does;
    (UNASKED for one that no run was asked for); None if the cell has no samples.json (no run filled it); all that it
    holds counts then.
    ``broken``: files of the work directory that turned out to be damaged, one list for all its cells.
    """

    cell: Cell
    spec: Mapping[str, Any]
    dataset: str
    model: str
    method: str
    samples: Mapping[str, str | None] | None = None
    broken: list[str] = field(default_factory=list, compare=False)

    def about(self, uid: str) -> bool:
        return self.samples is None or uid in self.samples

    def counts(self, uid: str, fingerprint: str) -> bool:
        """Whether a result under this fingerprint is one of the sample as it is now."""
        return counts(self.samples, uid, fingerprint)

    def maps(self) -> dict[Key, Record]:
        """The stored maps that count."""
        try:
            index = self.cell.maps.index()
        except OSError as error:
            self.broken.append(f"{self.cell.maps.folder}: {error}")
            return {}
        self.broken.extend(line for line in self.cell.maps.broken if line not in self.broken)
        return {key: record for key, record in index.items() if self.counts(*key)}


def labelled(root: Path | str, broken: list[str] | None = None) -> list[Labelled]:
    """Every cell of a work directory with its labels; one of which spec.json or samples.json is damaged is left out.

    A label is the name from the configuration. Where one name stands for several things, the fields
    that differ follow: ``iba (beta=1)``, ``iba (beta=10)``. No two cells have all three labels in common.
    Raises UserError if there is no cell, or none that can be read.
    """
    broken = [] if broken is None else broken
    found = []
    for cell in cells(Path(root)):
        try:
            found.append((cell, _spec(cell), cell.about()))
        except (UserError, OSError) as error:
            broken.append(str(error))
    if not found and broken:
        raise UserError(f"no cell of {root} can be read: {broken[0]}")
    if not found:
        raise UserError(
            f"{root} holds no results: no <dataset>.<model>.<method>.<key>/spec.json there. "
            "Give the work directory that `attrib run` wrote to (or run it first)."
        )
    columns = []
    for axis in AXES:
        described = [_describe(spec, axis) for _, spec, _ in found]
        columns.append(_labels([(spec["names"][axis], *what) for (_, spec, _), what in zip(found, described)]))
    # Cells may also differ in what depends on the model or the data: the layers that are read, the fitted state.
    places = ["\0".join(names) for names in zip(*columns)]
    others = [{**spec["layers"], "state": str(spec["state_key"])[:8]} for _, spec, _ in found]
    key8 = [cell.folder.name.rsplit(".", 1)[-1] for cell, *_ in found]
    for i, label in enumerate(_labels(list(zip(places, key8, others)))):
        columns[2][i] = (columns[2][i] + label.removeprefix(places[i])).replace(") (", ", ")
    return [
        Labelled(cell, spec, dataset, model, method, about, broken)
        for (cell, spec, about), dataset, model, method in zip(found, *columns, strict=True)
    ]


def _spec(cell: Cell) -> dict[str, Any]:
    """Raises UserError or OSError."""
    spec, path = cell.spec, cell.folder / "spec.json"
    if missing := sorted(_SPEC - spec.keys()):
        raise UserError(f"{path} does not say its {', '.join(missing)}")
    try:
        fits(spec, Spec)
    except ValueError as error:
        raise UserError(f"{path} is not the description of a cell: {error}") from error
    return spec


def _describe(spec: Mapping[str, Any], axis: str) -> tuple[str, dict[str, Any]]:
    """(identity, fields) of a cell's dataset, model or method.

    Two cells share an axis if the identities are equal. That is a key, because a configuration also says
    *how* (paths), which must not split a table.
    """
    if axis == "method":
        fields = {**spec["method"], "seed": spec["seed"]}
        return keys.digest(fields), fields
    config = spec["config"].get(axis)
    fields = dict(config) if isinstance(config, Mapping) else {}  # experiments made in Python have no configuration
    if axis == "model":
        fields.pop("layers", None)  # which of them a method uses is the method's business
        fields["weights"] = str(spec["weights"])[:8]
        fields["precision"] = spec.get("precision", "float32")
    else:
        fields.pop("estimation", None)  # of the fit: where it differs, so does the state
    return spec[f"{axis}_key"], fields


def _labels(things: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """One label per (name, identity, fields): equal for equal names and identities, else different."""
    kinds: dict[str, dict[str, dict[str, str]]] = {}
    for name, identity, fields in things:
        kinds.setdefault(name, {}).setdefault(identity, dict(_flat(fields)))
    labels: dict[tuple[str, str], str] = {}
    for name, variants in kinds.items():
        every = list(dict.fromkeys(itertools.chain.from_iterable(variants.values())))
        differing = [f for f in every if len({fields.get(f) for fields in variants.values()}) > 1]
        written = {
            identity: ", ".join(f"{f}={fields[f]}" for f in differing if f in fields)
            for identity, fields in variants.items()
        }
        for identity, text in written.items():
            unique = bool(text) and sum(other == text for other in written.values()) == 1
            text = text if unique else ", ".join(filter(None, (text, f"key={identity[:8]}")))
            labels[name, identity] = _writable(f"{name} ({text})" if len(variants) > 1 else name)
    return [labels[name, identity] for name, identity, _ in things]


def _writable(text: str) -> str:
    """No table and no file holds the bytes of a path that are not UTF-8: they are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class ScoreFolder:
    """A folder of scores: its metric's label, its columns (name -> direction) and curves (name -> axes).

    ``about``: a line for each column; ``bounds``: what no point of a curve is below or above. Folders of earlier
    versions have neither.
    ``lost``: there is no such folder, only the ledger knows the metric.
    """

    folder: str
    label: str
    columns: Mapping[str, str]
    curves: Mapping[str, str]
    lost: bool = False
    about: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def metrics(cell_list: Iterable[Cell], broken: list[str] | None = None) -> dict[str, list[ScoreFolder]]:
    """Cell name -> its folders of scores, labelled alike in all cells. A damaged metric.json adds to ``broken``."""
    found: list[tuple[str, str, MetricNote]] = []
    for cell in cell_list:
        for folder in cell.metrics():
            try:
                note = document(cell.folder / "scores" / folder / "metric.json", MetricNote)
            except OSError as error:
                note = MetricNote()  # the scores are shown without a direction
                if broken is not None and not isinstance(error, FileNotFoundError):  # else killed before it was written
                    broken.append(str(error))
            found.append((cell.folder.name, folder, note))
    things = [
        (
            d.name or folder.rsplit(".", 1)[0],
            keys.digest(folder if d.spec is None else d.spec),
            {"precision": "float32", **(d.spec or {})},
        )
        for _, folder, d in found
    ]
    labels = _labels(things)
    seen = set()
    result: dict[str, list[ScoreFolder]] = {}
    for (name, folder, d), label in zip(found, labels):
        if (name, label) in seen:  # one metric twice in a cell, under two keys
            label = f"{label} [{folder.rsplit('.', 1)[-1]}]"
        seen.add((name, label))
        result.setdefault(name, []).append(
            ScoreFolder(folder, label, d.columns, d.curves, about=d.about, bounds=d.bounds)
        )
    return result


def lost(stages: Iterable[str], cell: str, known: Mapping[str, Sequence[ScoreFolder]]) -> list[ScoreFolder]:
    """The metrics of which a cell has failures in its ledger, but no scores; labelled as in other cells.

    ``known`` is what :func:`metrics` found.
    """
    own = known.get(cell, [])
    labels = {scores.folder: scores.label for listed in known.values() for scores in listed}
    understood = {"load", "maps", *(scores.folder for scores in own)}
    taken = {scores.label for scores in own}
    found = []
    for stage in sorted(set(stages) - understood):
        name, _, key8 = stage.rpartition(".")
        label = labels.get(stage, name or stage)
        if label in taken:
            label = f"{label} [{key8}]"
        taken.add(label)
        found.append(ScoreFolder(stage, label, {}, {}, lost=True))
    return found
