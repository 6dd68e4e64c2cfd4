"""Presets: a table of a paper as a grid of runs, with the value that the paper gives for each entry.

``configs/paper/NAME.yaml`` says rows × columns. A row adds Hydra overrides (a method) and names the map that is
judged; a column adds overrides (a model) and names the score that is read. So every entry is one command line of
``attrib run``. :mod:`attrib.papers.comparison` finds the entries in a work directory.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from attrib.config.compose import Composition, Override, compose, compose_node, parse_overrides
from attrib.running.options import Options
from attrib.types import UserError

FULL, TINY = "full", "tiny"
FIELDS = (
    "title",
    "source",
    "place",
    "note",
    "needs",
    "duration",
    "digests",
    "size",
    "tolerance",
    "columns",
    "rows",
    "tiny",
)
HOW = ("run", "hydra", "paper")  # overrides of these never choose rows or columns

Pairs = Mapping[str, Override]  # parsed overrides by what they set


@dataclass(frozen=True)
class Published:
    """A number read in the paper. ``source``: table and page, or the address of a page that shows it."""

    value: float
    tolerance: float
    source: str


@dataclass(frozen=True)
class Comparison:
    """A number that is not published but is worth a look beside ours, such as raw results; it gets no verdict."""

    value: float
    spread: float | None
    source: str


@dataclass(frozen=True)
class GridLine:
    """A row or a column. ``reads``: of a row its map ("": the method's only one), of a column METRIC.COLUMN.

    also   of a row: further overrides in some of the columns
    """

    label: str
    overrides: Pairs
    reads: str
    published: Mapping[str, Published | None] = field(default_factory=dict)
    comparison: Mapping[str, Comparison] = field(default_factory=dict)
    also: Mapping[str, Pairs] = field(default_factory=dict)


@dataclass(frozen=True)
class TableEntry:
    """One number of the table, and the overrides of the run that computes it."""

    row: str
    column: str
    map: str
    metric: str
    score: str
    overrides: tuple[str, ...]
    published: Published | None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Preset:
    """A table of a paper, row by row. ``changed``: what the command line chose, replaced or added.

    needs, duration   for people: data and weights that must be there, and how long the table takes to compute
    digests           of an exported study: row -> "weights" and "data" of its net and samples (``papers.export``)
    """

    name: str
    title: str
    source: str
    note: str
    entries: tuple[TableEntry, ...]
    changed: tuple[str, ...] = ()
    how: tuple[str, ...] = ()  # overrides of run.*
    folder: Path | None = None  # Hydra's --config-dir
    size: str = FULL
    needs: str = ""
    duration: str = ""
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The work directory of its cells."""
        given = [one.removeprefix("run.root=") for one in self.how if one.startswith("run.root=")]
        return Path(given[-1] if given else Options.root)

    @property
    def jobs(self) -> list[tuple[str, ...]]:
        """The overrides of every run that the table needs."""
        return list(dict.fromkeys(entry.overrides for entry in self.entries))

    def overrides(self, job: Sequence[str]) -> list[str]:
        """For ``attrib run``: what computes one of the ``jobs``."""
        return [f"paper={self.name}", *job, *self.how]

    def arguments(self, job: Sequence[str]) -> list[str]:
        """``overrides``, and where the preset lies."""
        more = ["--config-dir", str(self.folder)] if self.folder else []
        return [*more, *self.overrides(job)]

    @property
    def all_arguments(self) -> list[str]:
        """For ``attrib run``: what computes all jobs."""
        size = [] if self.size == FULL else [f"paper.size={self.size}"]
        return ["-m", *self.arguments([*size, *self.changed])]


def load(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Preset:
    """The preset as the overrides of a command line leave it.

    An override of what rows or columns set chooses those that agree with it; of what a row sweeps over, it takes
    the place of the values; any other override is added to every entry. With ``paper.size=tiny`` the overrides of
    ``tiny`` take the place of those of rows and columns, a row's own ``tiny`` is added to it, and nothing is published.

    Raises UserError that names the file and the field.
    """
    where = f"configs/paper/{name}.yaml"
    given = parse_overrides(overrides)
    node = _node(name, overrides, folder)
    if not node.get("rows") or not node.get("columns") or not node.get("title"):
        raise UserError(f"{where} is not a table: it needs paper.title, paper.rows and paper.columns")
    if unknown := sorted(node.keys() - set(FIELDS)):
        raise UserError(f"{where}: paper has no field {unknown[0]!r} (fields: {', '.join(FIELDS)})")
    tiny = node.get("size", FULL) == TINY
    if node.get("size", FULL) not in ((FULL, TINY) if node.get("tiny") else (FULL,)):
        raise UserError(f"{where}: there is no paper.size={node['size']}; {FULL} or, where it is given, {TINY}")

    what = {key: o for key, o in given.items() if key.split(".")[0].lstrip("+~") not in HOW}
    rows = _chosen([_row(where, label, line, node, tiny) for label, line in node["rows"].items()], what, where)
    columns = _chosen([_column(where, label, line) for label, line in node["columns"].items()], what, where)
    forced: Pairs = {**(parse_overrides(shlex.split(node["tiny"]), f"{where}: tiny") if tiny else {}), **what}
    for column in columns:
        forced = _open(forced, column)
    entries = []
    for row in rows:
        mine = _open(forced, row)
        for label, pairs in _swept(row, mine):
            for column in columns:
                also = row.also.get(column.label, {})
                full = {**pairs, **column.overrides, **also, **{key: pairs[key] for key in mine}}
                metric, _, score = column.reads.partition(".")
                value = None if tiny else row.published.get(column.label)
                beside = None if tiny else row.comparison.get(column.label)
                entries.append(TableEntry(label, column.label, row.reads, metric, score, _written(full), value, beside))
    source = ", ".join(str(node[name]) for name in ("source", "place") if node.get(name))
    changed = tuple(_line(o) for o in what.values())
    how = tuple(_line(o) for key, o in given.items() if key not in what and not key.startswith("paper"))
    note, needs, duration = (" ".join(str(node.get(name) or "").split()) for name in ("note", "needs", "duration"))
    size = TINY if tiny else FULL
    digests = {} if tiny else _fields(f"{where}: digests", node.get("digests") or {}, tuple(node["rows"]))
    title = str(node["title"])
    return Preset(name, title, source, note, tuple(entries), changed, how, folder, size, needs, duration, digests)


def _node(name: str, overrides: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """``paper`` of the composed configuration as plain values; empty if there is none."""
    chosen = [f"paper={name}", *(o for o in overrides if o.startswith("paper."))]
    node = compose_node("run", chosen, folder).get("paper")
    plain = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _row(where: str, label: str, line: Any, node: Mapping[str, Any], tiny: bool) -> GridLine:
    at = f"{where}: rows: {label}"
    known = ("with", "map", "published", "comparison", "also", "tiny")
    line = _fields(at, {"with": line} if isinstance(line, str) else line, known)
    published, beside, also = (_fields(f"{at}: {n}", line.get(n) or {}, tuple(node["columns"])) for n in known[2:5])
    values = {column: _published(f"{at}: {column}", value, node) for column, value in published.items()}
    others = {column: _comparison(f"{at}: {column}", value) for column, value in beside.items()}
    more = {column: parse_overrides(shlex.split(text), f"{at}: also") for column, text in also.items()}
    small = (line.get("tiny") or "") if tiny else ""
    overrides = parse_overrides(shlex.split(f"{line.get('with') or ''} {small}"), at)
    if any(values.values()) and any(o.is_sweep_override() for o in overrides.values()):
        raise UserError(f"{at}: a row of several values cannot have one published value; write a row for each")
    return GridLine(label, overrides, line.get("map") or "", values, others, more)


def _column(where: str, label: str, line: Any) -> GridLine:
    at = f"{where}: columns: {label}"
    line = _fields(at, {"score": line} if isinstance(line, str) else line, ("score", "with"))
    if str(line.get("score")).count(".") != 1:
        raise UserError(f"{at}: score must be METRIC.COLUMN, such as ehr.ehr, not {line.get('score')!r}")
    overrides = parse_overrides(shlex.split(line.get("with") or ""), at)
    if any(o.is_sweep_override() for o in overrides.values()):
        raise UserError(f"{at}: a column has one value; write a column for each")
    return GridLine(label, overrides, line["score"])


def _fields(at: str, given: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"{at} must have the fields {', '.join(known)}, not {given!r}")
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{at} has no {unknown[0]!r} (only {', '.join(known)})")
    return given


def _published(at: str, value: Any, node: Mapping[str, Any]) -> Published | None:
    """From null, a number, or {value, tolerance, source}; tolerance and source default to those of the table."""
    given = _fields(at, value if isinstance(value, Mapping) else {"value": value}, ("value", "tolerance", "source"))
    if given.get("value") is None:
        return None
    table = f"{node['source']}, {node['place']}" if node.get("source") and node.get("place") else None
    full = {"tolerance": node.get("tolerance"), "source": table, **given}
    numbers = [full["value"], full["tolerance"]]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not plain or full["tolerance"] < 0 or not full["source"]:
        raise UserError(
            f"{at}: a published value needs a number, a tolerance and a source (paper and table), not {full}"
        )
    return Published(float(full["value"]), float(full["tolerance"]), str(full["source"]))


def _comparison(at: str, value: Any) -> Comparison:
    given = _fields(at, value, ("value", "spread", "source"))
    numbers = [given.get("value"), given.get("spread") or 0.0]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise UserError(
            f"{at}: a comparison needs a number as value, and as spread a number or none, not {dict(given)}"
        )
    if not given.get("source"):
        raise UserError(f"{at}: a comparison needs a source")
    spread = given.get("spread")
    return Comparison(float(given["value"]), None if spread is None else float(spread), str(given["source"]))


def _values(override: Override) -> list[str]:
    """What an override sets, one string for each value that it sweeps over."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _chosen(lines: Sequence[GridLine], given: Pairs, where: str) -> list[GridLine]:
    """The lines that agree with what the command line sets. Raises UserError if none does."""
    kept = list(lines)
    for key, override in given.items():
        setting = {line.label: line.overrides[key] for line in kept if key in line.overrides}
        fixed = {label: _values(o)[0] for label, o in setting.items() if not o.is_sweep_override()}
        kept = [line for line in kept if fixed.get(line.label, _values(override)[0]) in _values(override)]
        if not kept:
            known = ", ".join(dict.fromkeys(fixed.values()))
            raise UserError(f"{where}: nothing has {override.input_line}; there is {key}={known}")
    return kept


def _open(forced: Pairs, line: GridLine) -> Pairs:
    """``forced`` without sweeps over what this row or column sets: they only chose it, and it has one of the values."""
    own = {key for key, o in line.overrides.items() if not o.is_sweep_override()}
    return {key: o for key, o in forced.items() if not (key in own and o.is_sweep_override())}


def _swept(row: GridLine, forced: Pairs) -> Iterator[tuple[str, dict[str, Override]]]:
    """(label, overrides) for each value that the row or the command line sweeps over; {} in the label is the value."""
    pairs = {**row.overrides, **forced}
    named = [key for key, o in pairs.items() if o.is_sweep_override() or _is_sweep(row.overrides.get(key))]
    for values in itertools.product(*(_values(pairs[key]) for key in named)):
        label, single = row.label, [f"{pairs[k].get_key_element()}={v}" for k, v in zip(named, values)]
        for key, value in zip(named, values):
            label = label.replace("{}", value, 1) if "{}" in label else f"{label} ({key.rpartition('.')[2]}={value})"
        yield label, {**pairs, **parse_overrides(single, row.label)}


def _is_sweep(override: Override | None) -> bool:
    return override is not None and override.is_sweep_override()


def _line(override: Override) -> str:
    """The override as it stands on the command line; Hydra notes that of everything it parses."""
    assert override.input_line is not None
    return override.input_line


def _written(pairs: Pairs) -> tuple[str, ...]:
    """In the order in which people write them: parts (model=vgg16) before their fields."""
    return tuple(_line(o) for o in sorted(pairs.values(), key=lambda o: "." in o.key_or_group))


def configuration(preset: Preset, job: Sequence[str]) -> Composition:
    """One of a preset's jobs, composed."""
    return compose("run", [f"paper={preset.name}", *job], preset.folder)
