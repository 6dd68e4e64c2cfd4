"""A paper's table beside ours: what a work directory holds of a preset, and what is still to be computed.

An entry is found by comparing configurations: a cell is what any of its runs says it is (``spec.json``,
``runs/*/config.json``). Only methods and metrics are built, because their classes have versions; no weights
are read, no data is looked at, nothing is computed.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attrib import keys
from attrib.config.objects import build, completed
from attrib.papers.export import digests
from attrib.papers.presets import FULL, Preset, TableEntry, configuration
from attrib.results import formats, labels, tables
from attrib.store.cell import Cell, cells
from attrib.store.workers import read_object
from attrib.types import UserError

MOST = 12  # commands shown below a table
PASS, FAIL, MISSING, UNREAD = "PASS", "FAIL", "MISSING", "UNREAD"
_SUMMARY = ("n", "failed", "pending", "mean", "lo", "hi", *tables.COSTS)
_NONE = dict.fromkeys(_SUMMARY[:3], 0) | dict.fromkeys(_SUMMARY[3:], math.nan) | {"device": ""}


@dataclass(frozen=True)
class WantedCell:
    """What one of a preset's jobs computes: all by which its stored cell can be recognised."""

    config: Mapping[str, Any]
    method: Any  # as keys.spec gives it
    maps: tuple[str, ...]
    metrics: Mapping[str, Any]  # name -> as keys.spec gives it; None for what the method itself scores
    columns: Mapping[str, tuple[str, ...]]
    why: str = ""  # why it cannot be computed now


def table(preset: Preset, root: Path | str, confidence: float = 0.95) -> pd.DataFrame:
    """One row per entry: ours (as in ``tables.summary``), published, difference, verdict and the command.

    ``verdict``: MISSING where a sample of the entry has neither score nor failure, or nothing was scored;
    UNREAD where the published value has not been read in the paper yet; else PASS if the difference is within the
    tolerance, or FAIL. ``why`` explains MISSING. ``comparison``: a number that is not published. ``other``: of an
    exported study, whether the cell has other weights or data. Raises UserError for a preset that reads what its
    runs do not have.
    """
    held = [_Held.of(item) for item in labels.labelled(root)] if cells(Path(root)) else []
    wanted = {job: _wanted(preset, job) for job in preset.jobs}
    found = {job: _newest(held, what) for job, what in wanted.items()}
    summary, names = _numbers(Path(root), [item.cell for item in found.values() if item], confidence)
    lines = []
    for entry in preset.entries:
        what, item = wanted[entry.overrides], found[entry.overrides]
        kind = _map(preset, entry, what)
        ours = _NONE
        if item and (folder := item.scores(entry.metric, what.metrics[entry.metric])):
            place = (item.cell.folder.name, names[item.cell.folder.name, folder], kind, entry.score)
            ours = summary.get(place, _NONE)
        command = _command(preset.arguments(entry.overrides))
        lines.append({**_line(entry, ours, what), "other": _other(preset, entry, item), "command": command})
    return pd.DataFrame(lines)


def _line(entry: TableEntry, ours: Mapping[str, Any], what: WantedCell) -> dict[str, Any]:
    published, mean = entry.published, ours["mean"]
    difference = mean - published.value if published else math.nan
    missing = ours["pending"] > 0 or math.isnan(mean)
    if missing:
        verdict = MISSING
    elif published is None:
        verdict = UNREAD
    else:
        # A difference that equals the tolerance passes, however it is rounded.
        verdict = PASS if abs(difference) <= published.tolerance * (1 + 1e-9) + 1e-12 else FAIL
    some = f"{ours['n']} of {sum(ours[k] for k in _SUMMARY[:3])} samples" if ours["pending"] else ""
    names = {part: str(what.config[part].get("name", part)) for part in ("dataset", "model", "method")}
    return {
        "row": entry.row,
        "column": entry.column,
        **names,
        **{name: ours[name] for name in _SUMMARY},
        "published": published.value if published else math.nan,
        "tolerance": published.tolerance if published else math.nan,
        "difference": difference,
        "source": published.source if published else "",
        "comparison": entry.comparison.value if entry.comparison else math.nan,
        "comparison_spread": (entry.comparison.spread or math.nan) if entry.comparison else math.nan,
        "comparison_source": entry.comparison.source if entry.comparison else "",
        "verdict": verdict,
        "why": (what.why or some or ("all samples failed" if ours["failed"] else "")) if missing else "",
    }


def _other(preset: Preset, entry: TableEntry, item: _Held | None) -> str:
    """What the cell has other digests of than the study that the preset was exported from."""
    known = preset.digests.get(entry.row)
    if item is None or known is None:
        return ""
    mine = digests(item.spec, item.samples)
    return " and ".join(name for name in known if mine.get(name) != known[name])


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["attrib", "run", *arguments])


# Recognising ---------------------------------------------------------------------------------------------


def _wanted(preset: Preset, job: Sequence[str]) -> WantedCell:
    composition, where = configuration(preset, job), f"configs/paper/{preset.name}.yaml"
    config: Mapping[str, Any] = composition.values
    why = ""
    try:
        config = completed(config, composition.files)
    except UserError as error:  # a checkpoint that is not trained yet
        why = str(error)
    method = build({k: v for k, v in config["method"].items() if k not in ("name", "modalities")}, f"{where}: method")
    metrics = {name: build(node, f"{where}: {name}") for name, node in (config.get("metric") or {}).items() if node}
    own = dict.fromkeys(method.COLUMNS)
    return WantedCell(
        config=config,
        method=keys.spec(method),
        maps=tuple(method.MAPS),
        metrics={**own, **{name: keys.spec(metric) for name, metric in metrics.items()}},
        columns={**{n: (n,) for n in own}, **{name: tuple(metric.COLUMNS) for name, metric in metrics.items()}},
        why=why,
    )


def _map(preset: Preset, entry: TableEntry, what: WantedCell) -> str:
    """The map whose score an entry shows. Raises UserError if that is not clear, or the score is not computed."""
    where = f"configs/paper/{preset.name}.yaml: {entry.row}, {entry.column}"
    if entry.score not in what.columns.get(entry.metric, ()):
        known = [f"{metric}.{column}" for metric, columns in what.columns.items() for column in columns]
        raise UserError(f"{where}: {entry.metric}.{entry.score} is not computed, only {', '.join(known) or 'nothing'}")
    if entry.map in what.maps or (not entry.map and len(what.maps) == 1):
        return entry.map or what.maps[0]
    raise UserError(f"{where}: map must be one of {', '.join(what.maps)}, not {entry.map or 'left out'}")


@dataclass(frozen=True)
class _Held:
    """A stored cell, its spec and the configurations of its runs."""

    cell: Cell
    spec: Mapping[str, Any]
    configs: Sequence[Mapping[str, Any]]
    samples: Mapping[str, str | None] | None = None

    @classmethod
    def of(cls, item: labels.Labelled) -> _Held:
        runs = (read_object(path) for path in sorted(item.cell.folder.glob("runs/*/config.json")))
        return cls(item.cell, item.spec, [item.spec["config"], *runs], item.samples)

    def scores(self, name: str, metric: Any) -> str | None:
        """The folder of a metric's scores; None if there is none."""
        for folder in self.cell.metrics():
            about = read_object(self.cell.folder / "scores" / folder / "metric.json")
            if folder.rpartition(".")[0] == name and (metric is None or about.get("spec") == _plain(metric)):
                return folder
        return None


def _newest(held: Sequence[_Held], what: WantedCell) -> _Held | None:
    """The cell of a job; the newest if there are several, of earlier weights or data."""
    alike = [item for item in held if _same(item, what)]
    return max(alike, key=lambda item: (item.cell.folder / "spec.json").stat().st_mtime, default=None)


def _same(item: _Held, what: WantedCell) -> bool:
    if item.spec["method"] != _plain(what.method) or item.spec["seed"] != what.config.get("seed", 0):
        return False
    wanted = _identity(what.config, item.spec)
    return any(_identity(config, item.spec) == wanted for config in item.configs)


def _identity(config: Mapping[str, Any], spec: Mapping[str, Any]) -> Any:
    """What identifies a cell beside its method: data, net, and the layers that the method reads; names do not."""
    unread = {"name"} if spec["state_key"] else {"name", "estimation"}
    dataset = {k: v for k, v in (config.get("dataset") or {}).items() if k not in unread}
    model = {k: v for k, v in (config.get("model") or {}).items() if k not in ("name", "layers")}
    layers = (config.get("model") or {}).get("layers") or {}
    return _plain([dataset, model, {role: layers.get(role) for role in spec["layers"]}])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _numbers(root: Path, found: Sequence[Cell], confidence: float) -> tuple[dict[Any, Any], dict[Any, str]]:
    """Summary rows by (cell, metric, map, column), and the names that (cell, folder of scores) have there."""
    if not found:
        return {}, {}
    frame = tables.whole(tables.rows(root))
    frame = frame[frame["cell"].isin([cell.folder.name for cell in found])]
    if frame.empty:
        return {}, {}
    summary = tables.summary(frame, confidence).to_dict("records")
    names = labels.metrics(item.cell for item in labels.labelled(root))
    return (
        {(row["cell"], row["metric"], row["map"], row["column"]): row for row in summary},
        {(cell, scores.folder): scores.label for cell, listed in names.items() for scores in listed},
    )


def _with_spread(value: float, spread: float) -> str:
    return formats.rounded(value) + ("" if math.isnan(spread) else f" (sd {formats.rounded(spread)})")


# Laying out ----------------------------------------------------------------------------------------------


def drawn(preset: Preset, found: pd.DataFrame, confidence: float = 0.95) -> formats.TextTable:
    """The table for people: ours ± half the interval, published, difference, verdict, costs; below, what is missing."""
    device, several = formats.devices(found["device"])
    beside = found["comparison"].notna().any()
    header = ["method", "score", "n", "ours", "published", "difference", "tolerance", "verdict"]
    header += [*(["comparison"] if beside else []), *formats.COSTS]
    header += ["device"] if several else []
    body, bold = [], set()
    for i, row in enumerate(found.to_dict("records")):
        some = row["n"] + row["failed"] + row["pending"]
        body.append(
            [
                row["row"],
                row["column"],
                formats.count_text(row["n"], row["failed"], row["pending"]).removeprefix("n=") if some else "–",
                formats.with_half(row["mean"], row["lo"], row["hi"]),
                formats.rounded(row["published"]),
                "–" if math.isnan(row["difference"]) else f"{row['difference']:+.3g}",
                formats.rounded(row["tolerance"]),
                row["verdict"],
                *([_with_spread(row["comparison"], row["comparison_spread"])] if beside else []),
                *formats.cost_texts(row),
                *([row["device"] or "–"] if several else []),
            ]
        )
        if row["verdict"] == PASS:
            bold.add((i, header.index("verdict")))
    counts = found["verdict"].value_counts()
    words = [f"{counts[v]} {v}" for v in (PASS, FAIL, UNREAD, MISSING) if v in counts]
    notes = [
        f"{preset.source}. {', '.join(words)}. ours: mean ± half width of its {formats.percent(confidence)} interval."
    ]
    notes += [preset.note] if preset.note else []
    sources = [source for source in dict.fromkeys(found["comparison_source"]) if source]
    notes += [f"comparison (not a published value): {'; '.join(sources)}."] if sources else []
    notes += formats.spelt_out(found["column"])
    if preset.size == FULL and found["published"].isna().any():
        notes.append(f"A published value of – has not been read in the paper yet: configs/paper/{preset.name}.yaml.")
    if preset.size != FULL:
        notes.append(
            f"paper.size={preset.size}: other data and nets than the paper's; there is nothing to compare with."
        )
    if preset.changed:
        notes.append(f"Given on the command line: {' '.join(preset.changed)}.")
    for what, rows in found[found["other"] != ""].groupby("other", sort=False):
        notes.append(f"{', '.join(dict.fromkeys(rows['row']))}: other {what} than the study that was exported.")
    missing = found[found["verdict"] == MISSING]
    for why, rows in missing[missing["why"] != ""].groupby("why", sort=False):
        notes.append(f"{', '.join(dict.fromkeys(rows['row']))}: {why}")
    code = list(dict.fromkeys(missing["command"]))
    if code:
        shown = f"{MOST} of {len(code)}; --commands prints all" if len(code) > MOST else f"{len(code)}"
        notes.append(f"The first command computes all that is missing, the others ({shown}) one run each:")
        code = [_command(preset.all_arguments), *code[:MOST]]
    title = formats.title(preset.title, device)
    return formats.TextTable(title, header, body, frozenset(bold), 2, notes, code)
