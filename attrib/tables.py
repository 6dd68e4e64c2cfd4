"""Tables: views of the rows in a work directory. Nothing here is stored; a table drawn twice is the same.

``rows`` reads, ``summary`` and ``paired`` compute, ``long_table``, ``wide_table`` and ``paired_table``
lay out, and ``to_markdown``, ``to_latex`` and ``to_terminal`` write. A sample is either counted in n or
named as failed or pending, and pairs are compared on their common samples only; none is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich.box
import rich.table
import rich.text

from attrib import keys, stats
from attrib.store import Cell, cells
from attrib.types import UserError

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
AXES = ("dataset", "model", "method")
WHERE = (*AXES, "metric", "map", "column")
_GROUP = ["cell", "dataset", "model", "method", "map", "contender", "metric", "column", "direction"]
ROWS = [*_GROUP, "uid", "fingerprint", "value", "state", "stage", "reason", "seconds", "time"]
_ITEM = ["uid", "map", "column"]


# Reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A cell, its spec and the names under which tables show its dataset, model and method."""

    cell: Cell
    spec: Mapping[str, Any]
    dataset: str
    model: str
    method: str


def labelled(root: Path | str) -> list[Labelled]:
    """Every cell of a work directory with its labels.

    A label is the name from the configuration. Where one name stands for several things, the fields
    that differ follow: ``iba (beta=1)``, ``iba (beta=10)``. No two cells have all three labels in common.
    Raises UserError if there is no cell.
    """
    found = [(cell, _spec(cell)) for cell in cells(Path(root))]
    if not found:
        raise UserError(
            f"{root} holds no results: no <dataset>.<model>.<method>.<key>/spec.json there. "
            "Give the work directory that tools/run.py wrote (or run it first)."
        )
    columns = []
    for axis in AXES:
        described = [_describe(spec, axis) for _, spec in found]
        columns.append(_labels([(spec["names"][axis], *what) for (_, spec), what in zip(found, described)]))
    # What else makes a cell of its own depends on the model or the data: layers, the fitted state.
    places = ["\0".join(names) for names in zip(*columns)]
    others = [{**(spec.get("layers") or {}), "state": str(spec.get("state_key"))[:8]} for _, spec in found]
    key8 = [cell.folder.name.rsplit(".", 1)[-1] for cell, _ in found]
    for i, label in enumerate(_labels(list(zip(places, key8, others)))):
        columns[2][i] = (columns[2][i] + label.removeprefix(places[i])).replace(") (", ", ")
    return [Labelled(cell, spec, *labels) for (cell, spec), *labels in zip(found, *columns)]


def _spec(cell: Cell) -> dict[str, Any]:
    try:
        spec = cell.spec
        missing = [axis for axis in AXES if not isinstance(spec["names"][axis], str)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{cell.folder / 'spec.json'} is not the description of a cell: {error!r}") from error
    if missing:
        raise UserError(f"{cell.folder / 'spec.json'} does not name its {', '.join(missing)}")
    return spec


def _describe(spec: Mapping[str, Any], axis: str) -> tuple[str, dict[str, Any]]:
    """(identity, fields) of a cell's dataset, model or method.

    Two cells share an axis if the identities are equal. That is a key where there is one, because a
    configuration also says *how* (paths), which must not split a table.
    """
    config = spec.get("config") or {}
    fields = dict(config.get(axis) or {})
    if axis == "method":
        fields = {**(spec.get("method") or fields), "seed": spec.get("seed", config.get("seed"))}
        return keys.digest(fields), fields
    if axis == "model":
        fields.pop("layers", None)  # which of them a method uses is the method's business
        fields["weights"] = str(spec.get("weights"))[:8]
        return str(spec.get("model_key") or spec.get("weights") or keys.digest(fields)), fields
    return str(spec.get("dataset_key") or spec.get("pictures") or keys.digest(fields)), fields


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
            labels[name, identity] = f"{name} ({text})" if len(variants) > 1 else name
    return [labels[name, identity] for name, identity, _ in things]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Scores:
    """A folder of scores: which metric wrote it, under which label, and what its columns and curves are."""

    folder: str
    name: str
    label: str
    columns: Mapping[str, str]
    curves: Mapping[str, str]


def metrics(cell_list: Iterable[Cell]) -> dict[str, list[Scores]]:
    """Cell name -> its folders of scores, labelled alike in all cells."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for cell in cell_list:
        for folder in cell.metrics():
            try:
                described = json.loads((cell.folder / "scores" / folder / "metric.json").read_text())
            except (OSError, ValueError):
                described = {}  # killed before it was written; the scores are shown without a direction
            found.append((cell.folder.name, folder, {"name": folder.rsplit(".", 1)[0], **described}))
    things = [(d["name"], keys.digest(d.get("spec", folder)), d.get("spec") or {}) for _, folder, d in found]
    labels = _labels(things)
    seen = set()
    result: dict[str, list[Scores]] = {}
    for (cell, folder, d), label in zip(found, labels):
        if (cell, label) in seen:  # one metric twice in a cell, under two keys
            label = f"{label} [{folder.rsplit('.', 1)[-1]}]"
        seen.add((cell, label))
        result.setdefault(cell, []).append(Scores(folder, d["name"], label, d.get("columns", {}), d.get("curves", {})))
    return result


def rows(root: Path | str) -> pd.DataFrame:
    """Everything known about every sample: one row per (cell, map, metric, column, uid).

    ``dataset``, ``model``, ``method`` and ``metric`` are labels (see :func:`labelled`). ``state`` is

    * ``ok``: ``value`` is the latest finite one. A uid that is there twice, or under two
      fingerprints, is taken once, by time;
    * ``failed``: the ledger has an entry and no success answers it, or the value is not finite;
      ``stage`` and ``reason`` say why. A success under the entry's fingerprint answers it whenever it came (a second
      writer did the same sample), one under another fingerprint only if it is later. A value
      that was computed before the data changed and then failed is not shown;
    * ``pending``: its map is stored, its score is not.

    A cell without any score has its failed and pending samples under an empty metric, map and column.
    ``contender`` is the method, with its map where a method has several. ``seconds`` is what the map
    took, ``time`` is Unix time. Raises UserError if ``root`` holds no cell.
    """
    listed = labelled(root)
    by_cell = metrics(item.cell for item in listed)
    parts = []
    for item in listed:
        maps = _maps(item.cell)
        entries = _entries(item.cell)
        folders = by_cell.get(item.cell.folder.name, [])
        known = {"load", "maps", *(s.name for s in folders), *(s.folder for s in folders)}
        # A metric that failed on every sample may have left nothing but entries.
        lost = [Scores("", stage, stage, {}, {}) for stage in dict.fromkeys(entries["stage"]) if stage not in known]
        for scores in [*folders, *lost] or [Scores("", "", "", {}, {})]:
            stages = {"load", "maps", scores.name, scores.folder}
            part = _metric_rows(item, scores, maps, entries[entries["stage"].isin(stages)])
            parts.append(
                part.assign(
                    cell=item.cell.folder.name,
                    dataset=item.dataset,
                    model=item.model,
                    method=item.method,
                    metric=scores.label,
                    direction=part["column"].map({c: scores.columns.get(c, "none") for c in part["column"].unique()}),
                )
            )
    frame = pd.concat(parts, ignore_index=True)
    if frame.empty:
        raise UserError(f"the cells in {root} hold no scores, maps or failures yet")
    several = frame["map"].where(frame["map"] != "").groupby(frame["method"]).transform("nunique") > 1
    named = several & (frame["map"] != "")
    frame["contender"] = frame["method"].where(~named, frame["method"] + " · " + frame["map"])
    for column in (*_GROUP, "state", "stage"):  # few values, many rows
        values = frame[column].astype(str)
        frame[column] = pd.Categorical(values, categories=list(dict.fromkeys(values)))
    return frame[ROWS]


def _metric_rows(item: Labelled, scores: Scores, maps: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    table = item.cell.scores(scores.folder).table().to_pandas() if scores.folder else pd.DataFrame(columns=_ITEM)
    if table.empty:
        names = itertools.product(item.spec.get("maps") or [""], scores.columns) if scores.columns else [("", "")]
        wanted = pd.DataFrame(list(names), columns=["map", "column"], dtype=str)
        table = pd.DataFrame({"uid": [], "fingerprint": [], "map": [], "column": [], "value": [], "time": []})
        table = table.astype({"value": float, "time": float, **dict.fromkeys(("uid", "fingerprint", *_ITEM), str)})
    else:
        wanted = table[["map", "column"]].drop_duplicates()
        table = table.sort_values("time", kind="stable").drop_duplicates(_ITEM, keep="last")
    finite = np.isfinite(table["value"].to_numpy())
    stage, reason = np.where(finite, "", scores.name), np.where(finite, "", "the score is not finite")
    table = table.assign(state=np.where(finite, "ok", "failed"), stage=stage, reason=reason)

    if len(entries):
        failed = _unanswered(entries, wanted, table[finite], maps)
        table = pd.concat([table, failed[table.columns]] if len(failed) else [table])
        table = table.drop_duplicates(_ITEM, keep="last")
    due = scores.folder or not scores.name  # a metric that is known by its failures alone has nothing pending
    if due and len(table) < len(wanted) * len(set(table["uid"]) | set(maps["uid"])):
        pending = maps[["uid", "fingerprint"]].drop_duplicates("uid", keep="last").merge(wanted, how="cross")
        pending = pending.assign(value=np.nan, time=np.nan, state="pending", stage="", reason="")
        pending = pending[table.columns]
        table = pd.concat([table, pending] if len(pending) else [table]).drop_duplicates(_ITEM, keep="first")
    return table.merge(maps, how="left", on=["uid", "fingerprint"])


def _unanswered(entries: pd.DataFrame, wanted: pd.DataFrame, ok: pd.DataFrame, maps: pd.DataFrame) -> pd.DataFrame:
    """The ledger's latest entry per wanted (map, column) and uid that no success answers, see :func:`rows`."""
    failed = entries.merge(wanted, how="cross").merge(
        ok[[*_ITEM, "fingerprint", "time"]], how="left", on=_ITEM, suffixes=("", "_ok")
    )
    answered = (failed["fingerprint"] == failed["fingerprint_ok"]) | (failed["time_ok"] >= failed["time"])
    # An unreadable file has no fingerprint: nothing says that the stored score is not its own.
    answered |= (failed["fingerprint"] == "") & failed["fingerprint_ok"].notna()
    # Where the map came after all, only its score is missing.
    mapped = failed[["uid", "fingerprint"]].merge(maps, how="left", indicator="found")["found"] == "both"
    mapped |= (failed["fingerprint"] == "") & failed["uid"].isin(maps["uid"])
    answered |= mapped.to_numpy() & failed["stage"].isin(["load", "maps"])
    failed = failed[~answered].sort_values("time", kind="stable").drop_duplicates(_ITEM, keep="last")
    return failed.assign(state="failed", value=np.nan)


def _maps(cell: Cell) -> pd.DataFrame:
    """uid, fingerprint and seconds of every stored map."""
    index = cell.maps.index()
    return pd.DataFrame(
        {
            "uid": pd.Series([uid for uid, _ in index], dtype=str),
            "fingerprint": pd.Series([fingerprint for _, fingerprint in index], dtype=str),
            "seconds": pd.Series([record.info.get("seconds", math.nan) for record in index.values()], dtype=float),
        }
    )


def _entries(cell: Cell) -> pd.DataFrame:
    texts = dict.fromkeys(("uid", "fingerprint", "stage", "reason"), "")
    entries = [{**texts, "time": 0.0, **entry} for entry in cell.ledger.entries() if isinstance(entry, dict)]
    frame = pd.DataFrame(entries, columns=[*texts, "time"])
    return frame.astype({**dict.fromkeys(texts, str), "time": float})


def where(frame: pd.DataFrame, conditions: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows that meet every condition, such as ``{"dataset": ["photos"], "method": ["iba", "grad_cam"]}``.

    A value is a label or the name it begins with (``iba`` is every ``iba (...)``). Raises UserError for
    an unknown field or a value that nothing has.
    """
    for name, values in conditions.items():
        if name not in WHERE:
            raise UserError(f"--where knows no field {name!r}, only {', '.join(WHERE)}")
        labels = [label for label in frame[name].cat.categories if label]
        for value in values:
            if not any(_named(label, value) for label in labels):
                raise UserError(f"no results have {name}={value}; there are: {', '.join(labels) or 'none'}")
        kept = [label for label in labels if any(_named(label, value) for value in values)]
        frame = frame[frame[name].isin(kept)]
    if frame.empty:
        raise UserError("no results meet all --where conditions at once")
    frame = frame.copy()
    for name in _GROUP:
        frame[name] = frame[name].cat.remove_unused_categories()
    return frame


def _named(label: str, value: str) -> bool:
    return value in (label, label.split(" (")[0])


# Computing ----------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row per cell, map and column, from :func:`rows`.

    n samples, failed and pending ones; mean with its bootstrap interval (:func:`attrib.stats.interval`);
    direction ↑ (higher is better), ↓ or nothing; ``best``: the best mean of its dataset, model and
    column, if there are at least two and the column has a direction; mean seconds per sample.
    """
    found = []
    for names, group in frame.groupby(_GROUP, observed=True, sort=False):
        ok = group["state"] == "ok"
        mean = stats.interval(group.loc[ok, "value"], confidence)
        states = group["state"].value_counts()
        found.append(
            {
                **dict(zip(_GROUP, names, strict=True)),
                "n": mean.n,
                "failed": int(states.get("failed", 0)),
                "pending": int(states.get("pending", 0)),
                "mean": mean.mean,
                "lo": mean.lo,
                "hi": mean.hi,
                "seconds": group["seconds"].mean(),
            }
        )
    table = pd.DataFrame(found)
    higher = table["direction"] == "higher"
    score = table["mean"].where(higher, -table["mean"])
    per_column = score.groupby([table[name] for name in ("dataset", "model", "metric", "column")])
    table["best"] = (table["direction"] != "none") & (per_column.transform("count") > 1)
    table["best"] &= score == per_column.transform("max")
    table["direction"] = table["direction"].map(ARROWS)
    for name in _GROUP:
        if name != "direction":
            table[name] = pd.Categorical(table[name], categories=frame[name].cat.categories)
    table = table.sort_values(["dataset", "model", "metric", "column", "method", "map"], kind="stable")
    table = table.astype(dict.fromkeys(_GROUP, str)).reset_index(drop=True)
    return table[[*_GROUP, "n", "failed", "pending", "mean", "lo", "hi", "best", "seconds"]]


def paired(frame: pd.DataFrame, column: str, confidence: float = 0.95) -> pd.DataFrame:
    """All pairs of methods (and maps) on their common samples, per dataset, model and metric.

    A sample is common if both have a finite score of it under the same uid *and* fingerprint. Each row:
    n common samples, the n of each side, mean difference a - b with its interval, p of the permutation
    test, p after Holm's correction over all pairs of the dataset, model and metric, Cohen's d_z, and
    ``better``: which of the two, empty where p_holm does not reach 1 - confidence or the column has no
    direction. Raises UserError if nothing has the column.
    """
    frame = frame[frame["column"] == column]
    if frame.empty:
        raise UserError(f"no results have the column {column!r}")
    frame = frame[frame["state"] == "ok"].astype({"contender": str})
    found = []
    for names, group in frame.groupby(["dataset", "model", "metric", "direction"], observed=True, sort=False):
        values = group.pivot(index=["uid", "fingerprint"], columns="contender", values="value")
        values = values[list(dict.fromkeys(group["contender"]))]
        block = []
        for a, b in itertools.combinations(values.columns, 2):
            test = stats.paired_test(values[a], values[b], confidence)
            sizes = {"n_a": int(values[a].count()), "n_b": int(values[b].count())}
            block.append({"a": a, "b": b, **sizes, **dataclasses.asdict(test)})
        for row, p in zip(block, stats.holm([row["p"] for row in block]), strict=True):
            ahead = row["a"] if (row["difference"] > 0) == (names[3] == "higher") else row["b"]
            clear = p <= 1 - confidence and names[3] != "none"
            row |= {"p_holm": float(p), "better": ahead if clear else ""}
            found.append({**dict(zip(("dataset", "model", "metric"), names[:3])), "column": column, **row})
    order = ("dataset", "model", "metric", "column", "a", "b", "n", "n_a", "n_b")
    return pd.DataFrame(found, columns=[*order, "difference", "lo", "hi", "p", "p_holm", "effect", "better"])


def all_paired(frame: pd.DataFrame, columns: Sequence[str] = (), confidence: float = 0.95) -> pd.DataFrame:
    """:func:`paired` for these columns, or for all."""
    names = list(columns) or [c for c in dict.fromkeys(frame["column"].astype(str)) if c]
    if not names:
        return pd.DataFrame(columns=["dataset", "model", "metric", "column", "a", "b", "p_holm"])
    return pd.concat([paired(frame, name, confidence) for name in names], ignore_index=True)


def ties(table: pd.DataFrame, tests: pd.DataFrame, confidence: float = 0.95) -> pd.Series:
    """Which rows of a summary are not distinguishable from the best of their column (paired, Holm)."""
    names = ["dataset", "model", "metric", "column"]
    best = set(table.loc[table["best"], [*names, "contender"]].itertuples(index=False, name=None))
    level: set[tuple[str, ...]] = set()
    for *place, a, b in tests.loc[tests["p_holm"] > 1 - confidence, [*names, "a", "b"]].itertuples(
        index=False, name=None
    ):
        level |= {(*place, y) for x, y in ((a, b), (b, a)) if (*place, x) in best}
    rows_of = table[[*names, "contender"]].itertuples(index=False, name=None)
    return pd.Series([row in level and row not in best for row in rows_of], index=table.index, dtype=bool)


# Layout -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Texts ready to be written in any format. ``bold`` holds (row, column) positions."""

    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    left: int = 1  # so many columns are names, aligned left
    notes: Sequence[str] = field(default_factory=tuple)


def decimals(half: float) -> int:
    """Digits after the point that show two digits of ``half``, an interval's half width."""
    return min(max(0, 1 - math.floor(math.log10(half))), 12)


def rounded(value: float, lo: float = math.nan, hi: float = math.nan) -> str:
    """A number with the digits its interval supports; four significant ones without an interval."""
    if math.isnan(value):
        return "–"
    half = (hi - lo) / 2
    return f"{value:.{decimals(half)}f}" if math.isfinite(half) and half > 0 else f"{value:.4g}"


def with_half(value: float, lo: float, hi: float) -> str:
    """``0.412 ± 0.013``; the half width of the interval, which need not be symmetric."""
    return f"{rounded(value, lo, hi)} ± {rounded((hi - lo) / 2, lo, hi)}" if hi > lo else rounded(value)


def seconds_text(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def p_text(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def count_text(n: int, failed: int, pending: int) -> str:
    parts = [f"n={n}", f"{failed} failed" if failed else "", f"{pending} pending" if pending else ""]
    return ", ".join(filter(None, parts))


def long_table(table: pd.DataFrame, confidence: float = 0.95) -> Table:
    """A summary with one line per cell, map and column; the best in bold."""
    names = [*_shared_last(table, ["dataset", "model"]), "contender"]
    names += ["metric"] if table["metric"].ne(table["column"]).any() else []
    pending = table["pending"].any()
    level = percent(confidence)
    header = [*names, "column", "n", "failed", *(["pending"] if pending else []), "mean", f"{level} CI", "s/sample"]
    body = []
    for row in table.to_dict("records"):
        interval = f"[{rounded(row['lo'], row['lo'], row['hi'])}, {rounded(row['hi'], row['lo'], row['hi'])}]"
        body.append(
            [
                *(row[name] for name in names),
                f"{row['column']} {row['direction']}".strip(),
                *map(str, (row["n"], row["failed"], *([row["pending"]] if pending else []))),
                rounded(row["mean"], row["lo"], row["hi"]),
                interval if row["hi"] == row["hi"] else "–",
                seconds_text(row["seconds"]),
            ]
        )
    header[names.index("contender")] = "method"
    bold = frozenset((i, len(header) - 3) for i in np.flatnonzero(table["best"]))
    return Table(_title(table), header, body, bold, len(names) + 1, _notes(table))


@dataclass(frozen=True)
class Wide:
    """A summary laid out as methods × columns for one dataset and model.

    columns  titles, such as ``ehr ↑``
    counts   below each title, what all its entries share: ``n=20, 1 failed``, or nothing
    lines    (contender, seconds per sample, one summary row or None per column)
    unscored what is known of a contender without any score: ``n=0, 3 failed``
    """

    dataset: str
    model: str
    columns: Sequence[str]
    counts: Sequence[str]
    lines: Sequence[tuple[str, float, Sequence[Mapping[str, Any] | None]]]
    unscored: Mapping[str, str] = field(default_factory=dict)


def wide(table: pd.DataFrame) -> list[Wide]:
    """A summary as methods × columns, one block per dataset and model."""
    blocks = []
    for (dataset, model), block in table.groupby(["dataset", "model"], sort=False):
        places = [place for place in dict.fromkeys(zip(block["metric"], block["column"])) if place[1]]
        homes: dict[str, set[str]] = {}
        for metric, column in places:
            homes.setdefault(column, set()).add(metric)
        arrows = dict(zip(zip(block["metric"], block["column"]), block["direction"]))
        titles = [" ".join(filter(None, (c if len(homes[c]) == 1 else f"{c} · {m}", arrows[m, c]))) for m, c in places]
        records = {(r["contender"], r["metric"], r["column"]): r for r in block.to_dict("records")}
        names = list(dict.fromkeys(sorted(block["contender"], key=list(dict.fromkeys(block["contender"])).index)))
        seconds = block.groupby("contender")["seconds"].mean()
        lines = [(c, float(seconds[c]), [records.get((c, *place)) for place in places]) for c in names]
        counts = []
        for i in range(len(places)):
            texts = {count_text(e[i]["n"], e[i]["failed"], e[i]["pending"]) for _, _, e in lines if e[i]}
            counts.append(texts.pop() if len(texts) == 1 else "")
        bare = [r for r in block.to_dict("records") if not r["column"]]
        unscored = {r["contender"]: count_text(r["n"], r["failed"], r["pending"]) for r in bare}
        blocks.append(Wide(str(dataset), str(model), titles, counts, lines, unscored))
    return blocks


def wide_table(block: Wide) -> Table:
    """Methods × columns, ``mean ± half width``; the best of a column in bold."""
    header = ["method", *(f"{c} ({n})" if n else c for c, n in zip(block.columns, block.counts)), "s/sample"]
    body, bold, empty = [], set(), []
    for i, (contender, seconds, entries) in enumerate(block.lines):
        line = [contender]
        for j, (entry, shared) in enumerate(zip(entries, block.counts)):
            text = "–" if entry is None else with_half(entry["mean"], entry["lo"], entry["hi"])
            if entry is not None and not shared:
                text += f" ({count_text(entry['n'], entry['failed'], entry['pending'])})"
            if entry is not None and entry["best"]:
                bold.add((i, j + 1))
            line.append(text)
        body.append([*line, seconds_text(seconds)])
        if not any(entries):
            empty.append(f"{contender} ({count})" if (count := block.unscored.get(contender)) else contender)
    notes = (f"No scores: {', '.join(empty)}.",) if empty else ()
    return Table(f"{block.dataset}, {block.model}", header, body, frozenset(bold), 1, notes)


def paired_table(tests: pd.DataFrame, confidence: float = 0.95, *, most: int | None = None) -> Table:
    """Paired tests, one pair a line; the better method in bold where the difference is clear.

    ``most``: of longer lists only the pairs with the smallest p are shown, and a note says how many are not.
    """
    shown = tests
    notes = [
        "difference: mean of a - b on the common samples; p: two-sided permutation test; "
        "p (Holm): over all pairs of a dataset, model and metric; d_z: mean difference / its standard deviation."
    ]
    if most is not None and len(tests) > most:
        shown = tests.sort_values("p_holm", kind="stable").head(most)
        notes.append(f"{len(tests) - most} more pairs are not shown; --pairs COLUMN shows all of a column.")
    names = _shared_last(tests, ["dataset", "model"])
    names += ["metric"] if tests["metric"].ne(tests["column"]).any() else []
    header = [*names, "column", "a", "b", "n common", "difference", f"{percent(confidence)} CI", "p", "p (Holm)", "d_z"]
    body, bold = [], set()
    for i, row in enumerate(shown.to_dict("records")):
        lo, hi = row["lo"], row["hi"]
        common = f"{row['n']}" if row["n"] == row["n_a"] == row["n_b"] else f"{row['n']} of {row['n_a']}, {row['n_b']}"
        body.append(
            [
                *(row[name] for name in (*names, "column", "a", "b")),
                common,
                rounded(row["difference"], lo, hi),
                f"[{rounded(lo, lo, hi)}, {rounded(hi, lo, hi)}]" if hi == hi else "–",
                p_text(row["p"]),
                p_text(row["p_holm"]),
                "–" if math.isnan(row["effect"]) else f"{row['effect']:+.2f}",
            ]
        )
        if row["better"]:
            bold.add((i, len(names) + (1 if row["better"] == row["a"] else 2)))
    return Table("Paired tests", header, body, frozenset(bold), len(names) + 3, notes)


def _shared_last(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that vary, and so need a column of their own."""
    return [name for name in names if table[name].nunique() > 1]


def _title(table: pd.DataFrame) -> str:
    return ", ".join(str(table[name].iloc[0]) for name in ("dataset", "model") if table[name].nunique() == 1)


def _notes(table: pd.DataFrame) -> tuple[str, ...]:
    unequal = table.loc[table["n"] > 0].groupby(["dataset", "model", "metric", "column"])["n"].nunique().gt(1)
    places = list(dict.fromkeys(name for *_, name in unequal[unequal].index))
    return (f"n differs between methods in: {', '.join(places)}; paired tests use common samples.",) if places else ()


# Writing ------------------------------------------------------------------------------------------------


def to_csv(frame: pd.DataFrame) -> str:
    """Full precision, one header line."""
    return frame.to_csv(index=False)


def to_markdown(table: Table) -> str:
    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    lines = [f"**{_md(table.title)}**", ""] if table.title else []
    lines.append(line(map(_md, table.header)))
    lines.append(line(":--" if j < table.left else "--:" for j in range(len(table.header))))
    for i, row in enumerate(table.body):
        lines.append(line(f"**{_md(t)}**" if (i, j) in table.bold else _md(t) for j, t in enumerate(row)))
    lines += [f"\n{_md(note)}" for note in table.notes]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]~#$])", r"\\\1", " ".join(str(text).split()))


_TEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "·": r"$\cdot$",
    "×": r"$\times$",
}


def to_latex(table: Table) -> str:
    r"""A tabular for booktabs; ``\usepackage{booktabs}`` is all it needs."""

    def line(texts: Iterable[str]) -> str:
        return "  " + " & ".join(texts) + r" \\"

    lines = [f"% {' '.join(table.title.split())}; needs \\usepackage{{booktabs}}"]
    lines.append(rf"\begin{{tabular}}{{{'l' * table.left}{'r' * (len(table.header) - table.left)}}}")
    lines += [r"  \toprule", line(map(_tex, table.header)), r"  \midrule"]
    for i, row in enumerate(table.body):
        lines.append(line(rf"\textbf{{{_tex(t)}}}" if (i, j) in table.bold else _tex(t) for j, t in enumerate(row)))
    lines += [r"  \bottomrule", r"\end{tabular}", *(f"% {' '.join(note.split())}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in " ".join(str(text).split()))


def to_terminal(table: Table) -> rich.table.Table:
    """For rich.console.Console.print. Texts are never read as markup."""
    drawn = rich.table.Table(
        title=rich.text.Text(table.title, style="bold") if table.title else None,
        caption=rich.text.Text("\n".join(table.notes)) if table.notes else None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for j, name in enumerate(table.header):
        drawn.add_column(rich.text.Text(name), justify="left" if j < table.left else "right", overflow="fold")
    for i, row in enumerate(table.body):
        drawn.add_row(
            *(rich.text.Text(t, style="bold green" if (i, j) in table.bold else "") for j, t in enumerate(row))
        )
    return drawn
