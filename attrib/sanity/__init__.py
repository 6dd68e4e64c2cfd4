"""The sanity check of attribution methods: how much maps of randomised nets agree with those of the original net.

Adebayo et al., *Sanity Checks for Saliency Maps*, NeurIPS 2018. The maps of a net with randomised layers
(``attrib.models.randomise``) are cells like any other. Here they are compared with the original's, and the results are
stored beside them, as scores of a metric ``agreement`` that tables show like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attrib import keys
from attrib.models.variant import ROOT
from attrib.results import formats, stats, tables
from attrib.results.labels import Labelled, labelled
from attrib.sanity.measures import MEASURES, Agreement
from attrib.store.cell import Cell
from attrib.store.files import write_json, writer_name

__all__ = [
    "MEASURES",
    "Agreement",
    "CellPair",
    "SanityVerdict",
    "compare",
    "pairs",
    "summary",
    "verdicts",
    "without_randomised",
]

NAME = "agreement"  # of the metric
RANKS = ("spearman", "spearman_abs")  # the measures that a verdict is based on: they need no common scale
HALF = 0.5  # a rank correlation above this is called high


@dataclass(frozen=True)
class CellPair:
    """A cell of a randomised net and the same cell of the original."""

    original: Labelled
    variant: Labelled

    @property
    def about(self) -> Mapping[str, Any]:
        """How the net was randomised: layers (from the output), place (how far they reach), total, mode, seed."""
        return self.variant.spec["randomised"]

    @property
    def layer(self) -> str:
        """The randomised layer that is furthest from the output."""
        return self.about["layers"][-1] or ROOT


def pairs(cells: Sequence[Labelled]) -> list[CellPair]:
    """Each cell of a randomised net whose original is there too; layers next to the output come first."""
    by_key = {item.spec.get("key"): item for item in cells}
    found = [
        CellPair(by_key[item.spec["randomised"]["original"]], item)
        for item in cells
        if item.spec.get("randomised", {}).get("original") in by_key
    ]
    return sorted(found, key=lambda pair: (pair.original.dataset, pair.original.model, pair.about["place"]))


def compare(root: Path | str, agreement: Agreement) -> int:
    """Compute the agreements that are missing in a work directory; returns for how many samples it did.

    Two maps are compared if uid, content and class are the same. A sample that cannot be compared is recorded in the
    ledger of the randomised net's cell.
    """
    # Not the name of another process, which may write to the same folder.
    writer = writer_name()
    return sum(_compare(pair, agreement, writer) for pair in pairs(labelled(root)))


def _compare(pair: CellPair, agreement: Agreement, writer: str) -> int:
    folder = f"{NAME}.{keys.digest(agreement)[:8]}"
    ours, theirs, names = pair.variant.maps(), pair.original.maps(), tuple(pair.variant.spec["maps"])
    cell = Cell(pair.variant.cell.folder, writer)
    rows = cell.scores(folder)
    present = rows.present()
    found = 0
    try:
        for key in (key for key in ours if key in theirs and key not in present):
            targets = [index[key].info.get("target") for index in (ours, theirs)]
            if targets[0] != targets[1]:
                why = f"its map explains class {targets[0]}, the original net's map class {targets[1]}"
                cell.ledger.add(*key, folder, why)
                continue
            try:
                a, b = (item.cell.maps.read(key, names) for item in (pair.variant, pair.original))
            except (OSError, KeyError) as error:
                cell.ledger.add(*key, folder, str(error))
                continue
            values = {name: agreement.of(b[name], a[name]) for name in names}
            if not (rows.folder / "metric.json").exists():
                # Neither more nor less is better: opposite maps, below zero, agree too.
                columns = dict.fromkeys(values[names[0]], "none")
                declared = {"columns": columns, "curves": {}}
                write_json(rows.folder / "metric.json", {"name": NAME, "spec": keys.spec(agreement), **declared})
            rows.add(*key, {(name, column): value for name in names for column, value in values[name].items()})
            rows.flush_if_due()
            found += 1
    finally:
        rows.flush()
    return found


# ---- views ------------------------------------------------------------------------------------

PLACE = ["dataset", "model", "mode", "seed"]


def summary(cells: Sequence[Labelled], frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row per randomised net, map and measure; ``frame`` is that of ``tables.rows``.

    ``dataset`` and ``model`` are those of the original, ``contender`` is the method (and map), ``place`` and ``layer``
    say how far the new weights reach, of ``total`` layers; ``column`` is the measure. ``mean``, over ``n`` samples,
    has the bootstrap interval ``lo`` to ``hi``; ``failed`` counts samples without a value (a measure may not be defined
    for a constant map), ``pending`` those that have not been compared. Empty if nothing has been.
    """
    found = []
    scored = frame[frame["metric"].astype(str).str.split(" (", regex=False).str[0] == NAME]
    for pair in pairs(cells):
        mine = scored[scored["cell"] == pair.variant.cell.folder.name]
        several = len(pair.original.spec["maps"]) > 1
        for (metric, map, column), group in mine.groupby(["metric", "map", "column"], observed=True, sort=False):
            states = group["state"].value_counts()
            mean = stats.interval(group.loc[group["state"] == "ok", "value"], confidence)
            found.append(
                {
                    "dataset": pair.original.dataset,
                    "model": pair.original.model,
                    **{name: pair.about[name] for name in ("mode", "seed", "place", "total")},
                    "layer": pair.layer,
                    "contender": formats.title(pair.original.method, map if several else ""),
                    "column": str(column) + str(metric)[len(NAME) :],
                    "n": mean.n,
                    "failed": int(states.get("failed", 0)),
                    "pending": int(states.get("pending", 0)),
                    "mean": mean.mean,
                    "lo": mean.lo,
                    "hi": mean.hi,
                    "cell": pair.variant.cell.folder.name,
                }
            )
    names = [*PLACE, "place", "total", "layer", "contender", "column", "n", "failed", "pending", "mean", "lo", "hi"]
    return pd.DataFrame(found, columns=[*names, "cell"])


@dataclass(frozen=True)
class SanityVerdict:
    """What the rank correlations say of a contender.

    passed  whether its maps depend on the weights; None if that is not clear
    """

    contender: str
    passed: bool | None
    text: str


def verdicts(part: pd.DataFrame) -> list[SanityVerdict]:
    """For each contender of a ``summary`` of one net and mode: do its maps depend on the weights?

    Decided by the rank correlations of values and of magnitudes with all layers randomised. One is high if its whole
    interval is above a half, and low if all of it is below.
    """
    found = []
    for contender, group in part[part["mode"] == "cascade"].groupby("contender", sort=False):
        whole = group[(group["place"] == group["total"]) & (group["n"] > 0)].set_index("column")
        ranks = {name: whole.loc[name] for name in RANKS if name in whole.index}
        if not ranks:
            found.append(SanityVerdict(contender, None, "not tested with all layers randomised"))
            continue
        sure = {name: (row["mean"],) * 2 if row["n"] < 2 else (row["lo"], row["hi"]) for name, row in ranks.items()}
        high = [name for name in ranks if sure[name][0] > HALF]
        if "spearman" in high or list(ranks) == high:
            what, passed = "hardly depends on the weights", False
        elif high:
            what, passed = "where it is large hardly depends on the weights; its signs do", False
        elif all(hi < HALF for _, hi in sure.values()):
            what, passed = "depends on the weights", True
        else:
            what, passed = "may depend on the weights", None
        texts = {name: "{} [{}, {}]".format(*map(_two, (row["mean"], *sure[name]))) for name, row in ranks.items()}
        if len(set(texts.values())) == 1:
            numbers = next(iter(texts.values()))
        else:
            numbers = ", ".join(f"{text} of the {MEASURES[name].split()[-1]}" for name, text in texts.items())
        found.append(SanityVerdict(contender, passed, f"{what}: with all of them random, rank correlation {numbers}"))
    return found


def _two(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def without_randomised(cells: Sequence[Labelled], frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``tables.rows`` without those of randomised nets that have no scores but agreements."""
    scored = frame[(frame["metric"] != "") & ~frame["metric"].astype(str).str.startswith(NAME)]
    bare = {pair.variant.cell.folder.name for pair in pairs(cells)} - set(scored["cell"].astype(str))
    if not bare:
        return frame
    return tables.only(frame, ~frame["cell"].isin(bare))
