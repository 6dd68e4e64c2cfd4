"""Tables: views of the rows in a work directory. Nothing here is stored; drawing a table twice gives the same table.

``rows`` reads, ``summary`` and ``paired`` compute; ``formats`` lays out and writes. A sample is either counted
in n or named as failed or pending, and pairs are compared on their common samples only; none is dropped in
silence. Results of samples, or of contents of samples, that ``samples.json`` no longer lists are counted nowhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from attrib.errors import UNREADABLE, UserError, printable
from attrib.results import formats, stats
from attrib.results.labels import AXES, Labelled, ScoreFolder, labelled, lost, metrics
from attrib.store.cell import UNASKED
from attrib.store.ledger import Ledger
from attrib.store.workers import asked, clock, refusal, workers

log = logging.getLogger(__name__)

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
WHERE = (*AXES, "metric", "map", "column")
_GROUP = ["cell", "dataset", "model", "method", "map", "contender", "metric", "column", "direction"]
COSTS = ["seconds", "rows", "memory", "device"]  # as attrib.running.costs notes them beside a map
ROWS = [*_GROUP, "uid", "fingerprint", "value", "state", "stage", "reason", *COSTS, "time"]
_ITEM = ["uid", "map", "column"]
PAIRED = ["dataset", "model", "metric", "column", "a", "b", "n", "n_a", "n_b", "difference", "lo", "hi", "p", "p_holm"]
PAIRED += ["effect", "rank_biserial", "better"]


# Reading ------------------------------------------------------------------------------------------------


def rows(root: Path | str, broken: list[str] | None = None) -> pd.DataFrame:
    """Everything known about every sample: one row per (cell, map, metric, column, uid).

    ``dataset``, ``model``, ``method`` and ``metric`` are labels (see :func:`labelled`). ``state`` is

    * ``ok``: ``value`` is the latest one, and finite. Only the fingerprint in ``samples.json`` counts. Where
      that has none, a uid that is there under two fingerprints is taken once, by time;
    * ``failed``: the ledger has an entry and no success answers it, or the value is not finite;
      ``stage`` (load, maps or the metric's label) and ``reason`` say why. A success under the
      entry's fingerprint answers it whenever it came (a second writer did the same sample), one
      under another fingerprint only if it is later. That a file could not be read is answered by
      any success that counts. A value that was computed before the data changed and then failed
      is not shown;
    * ``pending``: none of the two, but a run was asked for the sample (``samples.json``) or its map is stored;
    * ``mapped``: its map is stored, the cell has no score at all, and its newest run was asked for none;
    * ``unasked``: it is selected, but no run was asked for it (``run.limit``).

    A sample that a cell is no longer about has no rows. A cell without any score has
    these samples under an empty metric, map and column. ``contender`` is the method,
    with its map where a method has several. ``seconds``, ``rows``, ``memory`` and ``device`` are what the
    map took (:mod:`attrib.running.costs`; NaN and "" where nothing is noted), ``time`` is Unix time.

    What cannot be read is left out, and ``broken`` gets a line for each such file; without that list it is a warning.
    Raises UserError if ``root`` holds no cell.
    """
    found: list[str] = []
    try:
        return _rows(root, found)
    finally:
        if broken is not None:
            broken += (line for line in dict.fromkeys(found) if line not in broken)
        elif found:
            log.warning("%d files of %s cannot be read, the first: %s", len(found), root, printable(found[0]))


def _rows(root: Path | str, broken: list[str]) -> pd.DataFrame:
    listed = labelled(root, broken)
    by_cell = metrics((item.cell for item in listed), broken)
    parts = []
    for item in listed:
        maps = _maps(item)
        due = _due(item, maps)
        unasked = {u for u, f in (item.samples or {}).items() if f == UNASKED} - set(maps["uid"])
        entries = _entries(item)
        broken += item.cell.ledger.broken
        broken += [f"{path}: not a folder" for path in item.cell.misplaced()]
        name = item.cell.folder.name
        own = by_cell.get(name) or [ScoreFolder("", "", {}, {})]
        for scores in (*own, *lost(entries["stage"], name, by_cell)):
            mine = entries[entries["stage"].isin({"load", "maps", scores.folder})]
            part = _metric_rows(item, scores, maps, due, mine)
            waiting = part["state"] == "pending"
            part["state"] = part["state"].mask(waiting & part["uid"].isin(unasked), "unasked")
            if not scores.label and asked(workers(item.cell.folder, time.time())) == set():
                part["state"] = part["state"].mask(waiting & part["uid"].isin(maps["uid"]), "mapped")
            parts.append(
                part.assign(
                    cell=name,
                    dataset=item.dataset,
                    model=item.model,
                    method=item.method,
                    metric=scores.label,
                    direction=part["column"].map({c: scores.columns.get(c, "none") for c in part["column"].unique()}),
                )
            )
    frame = pd.concat(parts, ignore_index=True)
    if frame.empty:
        unread = f"; {len(broken)} files cannot be read, the first: {broken[0]}" if broken else ""
        raise UserError(f"the cells in {root} hold no scores, maps or failures yet{unread}")
    several = frame["map"].where(frame["map"] != "").groupby(frame["method"]).transform("nunique") > 1
    named = several & (frame["map"] != "")
    frame["contender"] = frame["method"].where(~named, frame["method"] + formats.BETWEEN + frame["map"])
    frame["device"] = frame["device"].fillna("")
    for column in (*_GROUP, "state", "stage", "device"):  # few values, many rows
        codes, names = pd.factorize(frame[column].astype(str))
        frame[column] = pd.Categorical.from_codes(codes, categories=names.tolist())
    return frame[ROWS]


def _metric_rows(
    item: Labelled, scores: ScoreFolder, maps: pd.DataFrame, due: pd.DataFrame, entries: pd.DataFrame
) -> pd.DataFrame:
    empty = pd.DataFrame(columns=[*_ITEM, "fingerprint"])
    table = _stored(item, scores.folder) if scores.folder else empty
    table = table[_counting(item, table)]
    if table.empty:
        names = itertools.product(item.spec["maps"], scores.columns) if scores.columns else [("", "")]
        wanted = pd.DataFrame(list(names), columns=["map", "column"], dtype=str)
        table = pd.DataFrame({"uid": [], "fingerprint": [], "map": [], "column": [], "value": [], "time": []})
        table = table.astype({"value": float, "time": float, **dict.fromkeys(("uid", "fingerprint", *_ITEM), str)})
    else:
        wanted = table[["map", "column"]].drop_duplicates()
        table = table.sort_values("time", kind="stable").drop_duplicates(_ITEM, keep="last")
    finite = np.isfinite(table["value"].to_numpy())
    stage, reason = np.where(finite, "", scores.label), np.where(finite, "", "the score is not finite")
    table = table.assign(state=np.where(finite, "ok", "failed"), stage=stage, reason=reason)

    if len(entries):
        failed = _unanswered(entries, wanted, table[finite], maps)
        failed = failed.assign(stage=failed["stage"].where(failed["stage"] != scores.folder, scores.label))
        table = pd.concat([table, failed[table.columns]] if len(failed) else [table])
        table = table.drop_duplicates(_ITEM, keep="last")
    # A metric that is known by its failures alone has nothing pending.
    if not scores.lost and len(table) < len(wanted) * len({*table["uid"].unique(), *due["uid"].unique()}):
        pending = due.merge(wanted, how="cross").assign(value=np.nan, time=np.nan, state="pending", stage="", reason="")
        pending = pending[table.columns]
        table = pd.concat([table, pending] if len(pending) else [table]).drop_duplicates(_ITEM, keep="first")
    return table.sort_values("uid", kind="stable").merge(maps, how="left", on=["uid", "fingerprint"])


def _stored(item: Labelled, folder: str) -> pd.DataFrame:
    stored = item.cell.scores(folder)
    # Which writer did a sample is nothing that a table may show; a sample's own rows stay in the order of its columns.
    found = stored.table().to_pandas().sort_values("uid", kind="stable", ignore_index=True)
    item.broken.extend(stored.broken)
    return found


def _unanswered(entries: pd.DataFrame, wanted: pd.DataFrame, ok: pd.DataFrame, maps: pd.DataFrame) -> pd.DataFrame:
    """The ledger's latest entry per wanted (map, column) and uid that no success answers, see :func:`rows`."""
    failed = entries.merge(wanted, how="cross").merge(
        ok[[*_ITEM, "fingerprint", "time"]], how="left", on=_ITEM, suffixes=("", "_ok")
    )
    answered = (failed["fingerprint"] == failed["fingerprint_ok"]) | (failed["time_ok"] >= failed["time"])
    # An unreadable file has no fingerprint: the stored score may well be of the same content.
    answered |= (failed["fingerprint"] == UNREADABLE) & failed["fingerprint_ok"].notna()
    # Where the map was computed later, only its score is missing.
    mapped = failed[["uid", "fingerprint"]].merge(maps, how="left", indicator="found")["found"] == "both"
    mapped |= (failed["fingerprint"] == UNREADABLE) & failed["uid"].isin(maps["uid"])
    answered |= mapped.to_numpy() & failed["stage"].isin(["load", "maps"])
    failed = failed[~answered].sort_values("time", kind="stable").drop_duplicates(_ITEM, keep="last")
    return failed.assign(state="failed", value=np.nan)


def _counting(item: Labelled, frame: pd.DataFrame) -> np.ndarray:
    """Which rows count: those of the cell's present samples, under their present fingerprints."""
    if item.samples is None:
        return np.ones(len(frame), dtype=bool)
    keys = zip(frame["uid"].tolist(), frame["fingerprint"].tolist(), strict=True)
    return np.array([item.counts(*key) for key in keys], dtype=bool)


def _due(item: Labelled, maps: pd.DataFrame) -> pd.DataFrame:
    """uid and fingerprint of every sample that should have scores: the selected ones, else those with a map."""
    due: dict[str, str] = dict(zip(maps["uid"].tolist(), maps["fingerprint"].tolist(), strict=True))
    if item.samples is not None:
        due = {uid: fingerprint or due.get(uid, "") for uid, fingerprint in item.samples.items()}
    return pd.DataFrame({"uid": list(due), "fingerprint": list(due.values())}, dtype=str)


def _maps(item: Labelled) -> pd.DataFrame:
    """uid, fingerprint and costs of every stored map that counts (see :func:`_counting`)."""
    index = item.maps()
    infos = [record.info for record in index.values()]
    return pd.DataFrame(
        {
            "uid": pd.Series([uid for uid, _ in index], dtype=str),
            "fingerprint": pd.Series([fingerprint for _, fingerprint in index], dtype=str),
            **{name: pd.Series([info.get(name, math.nan) for info in infos], dtype=float) for name in COSTS[:3]},
            "device": pd.Series([info.get("device", "") for info in infos], dtype=str),
        }
    )


def _entries(item: Labelled) -> pd.DataFrame:
    frame = pd.DataFrame(item.cell.ledger.entries(), columns=[*Ledger.FIELDS, "time"])
    frame = frame.astype({**dict.fromkeys(Ledger.FIELDS, str), "time": float})
    unread = (frame["fingerprint"] == UNREADABLE) & np.array([item.about(uid) for uid in frame["uid"]], dtype=bool)
    return frame[unread | _counting(item, frame)]


def where(frame: pd.DataFrame, conditions: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows that meet every condition, such as ``{"dataset": ["photos"], "method": ["iba", "grad_cam"]}``.

    A value is a label or the name it begins with (``iba`` is every ``iba (...)``). Raises UserError for
    an unknown field or a value that nothing has.
    """
    meets = pd.Series(True, index=frame.index)
    for name, values in conditions.items():
        if name not in WHERE:
            raise UserError(f"results are chosen by {', '.join(WHERE)} (--where), not by {name!r}")
        labels = [label for label in frame[name].cat.categories if label]
        for value in values:
            if not any(named(label, value) for label in labels):
                raise UserError(f"no results have {name}={value}; there are: {', '.join(labels) or 'none'}")
        meets &= frame[name].isin([label for label in labels if any(named(label, value) for value in values)])
    if not meets.any():
        raise UserError("no results meet all conditions (--where) at once")
    return only(frame, meets)


def only(frame: pd.DataFrame, kept: pd.Series) -> pd.DataFrame:
    """The rows that are ``kept`` (bool), whose categories are those that they have."""
    frame = frame[kept].copy()
    for name in frame.select_dtypes("category"):
        frame[name] = frame[name].cat.remove_unused_categories()
    return frame


def named(label: str, value: str) -> bool:
    """Whether a label is meant: by all of it, or by the name that it begins with."""
    return value in (label, label.split(" (")[0])


def whole(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows for whoever needs the whole selection: samples that no run was asked for are pending, too."""
    return frame.assign(state=frame["state"].astype(str).replace("unasked", "pending").astype("category"))


def failed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell, sample and reason why it failed: dataset, model, method, stage, reason, uid, as texts."""
    names = [*AXES, "stage", "reason", "uid"]
    found = frame.loc[frame["state"] == "failed", names].astype(str)
    return found.drop_duplicates(ignore_index=True)


# Computing ----------------------------------------------------------------------------------------------


def refused(frame: pd.DataFrame, root: Path | str) -> dict[str, str]:
    """Cell with pending samples -> why its last run was refused; no cell whose run was not."""
    cells = frame.loc[frame["state"] == "pending", "cell"].astype(str).unique()
    now = clock(Path(root)) if len(cells) else 0.0
    found = {name: refusal(workers(Path(root) / name, now)) for name in cells}
    return {name: why for name, why in found.items() if why}


def summary(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row per cell, map and column, from :func:`rows`.

    n samples (of a cell that was asked for maps alone: those that have one), failed and pending ones; mean with its
    bootstrap interval (:func:`attrib.results.stats.interval`); direction ↑ (higher is better), ↓ or nothing;
    ``best``: no other of its dataset, model and column has a better mean, if there are several and the column has a
    direction. Means that are equal up to rounding are equally good; of two that have scores of different samples, the
    means of their common ones are compared (:func:`attrib.results.stats.none_better`). Mean seconds and rows through
    the net per sample, peak memory in bytes, device (several are joined by +), NaN and "" where not known.
    """
    found = []
    for names, group in frame.groupby(_GROUP, observed=True, sort=False):
        ok = group["state"] == "ok"
        mean = stats.interval(group.loc[ok, "value"], confidence)
        states = group["state"].value_counts()
        found.append(
            {
                **dict(zip(_GROUP, names, strict=True)),
                "n": mean.n + int(states.get("mapped", 0)),
                "failed": int(states.get("failed", 0)),
                "pending": int(states.get("pending", 0)),
                "mean": mean.mean,
                "lo": mean.lo,
                "hi": mean.hi,
                "seconds": group["seconds"].sort_values().mean(),
                "rows": group["rows"].sort_values().mean(),
                "memory": group["memory"].max(),
                "device": " + ".join(sorted(d for d in group["device"].unique() if d)),
            }
        )
    table = pd.DataFrame(found)
    table["best"] = _best(frame[frame["state"] == "ok"], table)
    table["direction"] = table["direction"].map(ARROWS)
    for name in _GROUP:
        if name != "direction":
            table[name] = pd.Categorical(table[name], categories=frame[name].cat.categories)
    table = table.sort_values(["dataset", "model", "metric", "column", "method", "map"], kind="stable")
    table = table.astype(dict.fromkeys(_GROUP, str)).reset_index(drop=True)
    return table[[*_GROUP, "n", "failed", "pending", "mean", "lo", "hi", "best", *COSTS]]


def _best(scored: pd.DataFrame, table: pd.DataFrame) -> pd.Series:
    """Which rows of a summary of these scores are ``best``."""
    place = ["dataset", "model", "metric", "column"]
    best = pd.Series(False, index=table.index)
    samples = scored.groupby(place, observed=True, sort=False)
    for names, own in table[(table["direction"] != "none") & table["mean"].notna()].groupby(place, sort=False):
        if len(own) < 2:
            continue
        sign, here = 1 if own["direction"].iloc[0] == "higher" else -1, samples.get_group(names)
        values = sign * own["mean"].to_numpy()[None]
        if (own["n"] < here.groupby(["uid", "fingerprint"], observed=True).ngroups).any():
            by_method = here.astype({"contender": str}).pivot(
                index=["uid", "fingerprint"], columns="contender", values="value"
            )
            values = sign * by_method[list(own["contender"])].to_numpy()
        best[own.index] = stats.none_better(values)
    return best


def paired(frame: pd.DataFrame, column: str, confidence: float = 0.95) -> pd.DataFrame:
    """All pairs of methods (and maps) on their common samples, per dataset, model and metric.

    A sample is common if both have a finite score of it under the same uid *and* fingerprint. Each row:
    n common samples, the n of each side, mean difference a - b with its interval, p of the permutation
    test, p after Holm's correction over all pairs of the dataset, model and metric, two effect sizes
    (:func:`attrib.results.stats.paired_test`), and ``better``: which of the two, empty where p_holm does not reach
    1 - confidence or the column has no direction. Raises UserError if nothing has the column.
    """
    frame = frame[frame["column"] == column]
    if frame.empty:
        raise UserError(f"no results have the column {column!r}")
    frame = frame[frame["state"] == "ok"]
    found = []
    for names, group in frame.groupby(["dataset", "model", "metric", "direction"], observed=True, sort=False):
        if group["contender"].nunique() < 2:
            continue
        group = group.astype({"contender": str})
        values = group.pivot(index=["uid", "fingerprint"], columns="contender", values="value")
        values = values[list(group["contender"].unique())]
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
    return pd.DataFrame(found, columns=PAIRED)


def all_paired(frame: pd.DataFrame, columns: Sequence[str] = (), confidence: float = 0.95) -> pd.DataFrame:
    """:func:`paired` for these columns, or for all."""
    names = list(columns) or [c for c in frame["column"].astype(str).unique() if c]
    if not names:
        return pd.DataFrame(columns=PAIRED)
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


def ranks(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Average ranks of the methods (and maps), one row per contender and column that has a direction.

    They are taken on the samples of which every contender with any score has one (uid and fingerprint).
    n such samples, n_own of the contender itself; ``rank`` (1 is best), ``group`` (see
    :class:`attrib.results.stats.Ranks`), Friedman's chi-squared and p, the critical difference.
    A contender without scores has n_own 0 and no rank.
    Columns without two contenders to rank are left out.
    """
    found = []
    frame = frame[frame["column"].astype(bool) & (frame["direction"] != "none")].astype({"contender": str})
    for names, group in frame.groupby(["dataset", "model", "metric", "column", "direction"], observed=True, sort=False):
        ok = group[group["state"] == "ok"]
        values = ok.pivot(index=["uid", "fingerprint"], columns="contender", values="value")
        listed = list(dict.fromkeys(group["contender"]))
        ranked = [name for name in listed if name in values]
        if len(ranked) < 2:
            continue
        result = stats.ranks(values[ranked], higher=names[-1] == "higher", confidence=confidence)
        places = dict(zip(ranked, zip(result.ranks, result.groups, strict=True), strict=True))
        common = {"n": result.n, "friedman": result.chi2, "p": result.p, "critical_difference": result.difference}
        for name in listed:
            rank, letters = places.get(name, (math.nan, ""))
            own = int(values[name].count()) if name in places else 0
            row = {"contender": name, "rank": float(rank), "group": letters, "n_own": own, **common}
            found.append({**dict(zip(("dataset", "model", "metric", "column"), names[:4])), **row})
    order = ("dataset", "model", "metric", "column", "contender", "rank", "group", "n", "n_own")
    table = pd.DataFrame(found, columns=[*order, "friedman", "p", "critical_difference"])
    return table.sort_values(["dataset", "model", "metric", "column", "rank"], kind="stable", ignore_index=True)
