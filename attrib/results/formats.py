"""Formats: numbers as texts, and tables laid out for people.

``long_table``, ``wide_table``, ``paired_table`` and ``rank_tables`` lay out what ``tables.summary``, ``paired``
and ``ranks`` computed; ``to_csv``, ``to_markdown``, ``to_latex`` and ``to_terminal``, of :mod:`attrib.results.written`,
write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from attrib.results import significance
from attrib.results.written import TextTable, to_csv, to_latex, to_markdown, to_terminal

__all__ = [
    "COSTS",
    "TextTable",
    "Wide",
    "cost_texts",
    "count_text",
    "decimals",
    "devices",
    "long_table",
    "memory_text",
    "p_text",
    "paired_table",
    "percent",
    "rank_tables",
    "rounded",
    "rows_text",
    "seconds_text",
    "span",
    "spelt_out",
    "title",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_terminal",
    "wide",
    "wide_table",
    "with_half",
]


def decimals(half: float) -> int:
    """Digits after the point that show two digits of ``half``, an interval's half width."""
    return min(max(0, 1 - math.floor(math.log10(half))), 12)


def rounded(value: float, lo: float = math.nan, hi: float = math.nan) -> str:
    """A number with the digits its interval supports; four significant ones without an interval."""
    if math.isnan(value):
        return "–"
    half = (hi - lo) / 2
    if not (math.isfinite(half) and half > 0):
        return f"{value:.4g}"
    digits = decimals(half)
    if digits <= 7:
        return f"{value:.{digits}f}"
    # 2.24e-07 instead of seven zeros after the point.
    size = math.floor(math.log10(abs(value))) if value else -digits
    return f"{value:.{max(0, digits + size)}e}"


def with_half(value: float, lo: float, hi: float) -> str:
    """``0.412 ± 0.013``; the half width of the interval, which need not be symmetric."""
    return f"{rounded(value, lo, hi)} ± {rounded((hi - lo) / 2, lo, hi)}" if hi > lo else rounded(value)


def seconds_text(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


def rows_text(rows: float) -> str:
    return "–" if math.isnan(rows) else f"{rows:.3g}" if rows < 100 else f"{rows:,.0f}"


def memory_text(size: float) -> str:
    """``size`` in bytes."""
    if math.isnan(size):
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


BETWEEN = " · "  # a method and its map, a column and its metric
# Abbreviations in the names of metrics and columns: a note below each table that has them.
SPELT_OUT = {
    "ehr": "ehr: effective heat ratio (InputIBA), how much of a map's heat lies within the region of interest.",
}
COSTS = ("s/sample", "rows/sample", "peak memory")  # what ``cost_texts`` gives


def cost_texts(row: Mapping[str, Any]) -> list[str]:
    """The costs in a row of ``tables.summary``: seconds and rows through the net per sample, peak memory."""
    return [seconds_text(row["seconds"]), rows_text(row["rows"]), memory_text(row["memory"])]


def devices(found: Iterable[str]) -> tuple[str, bool]:
    """(the device to name in the title, "" if there are several; whether each line has to name its own)."""
    names = [name for name in dict.fromkeys(found) if name]
    return (names[0], False) if len(names) == 1 else ("", len(names) > 1)


def spelt_out(titles: Iterable[str]) -> tuple[str, ...]:
    """A note for each abbreviation among the words of these titles."""
    words = set(re.findall(r"\w+", " ".join(titles).lower()))
    return tuple(note for word, note in SPELT_OUT.items() if word in words)


def title(*parts: str) -> str:
    """What belongs together, as a method and one of its maps, in one name; what is empty is left out."""
    return BETWEEN.join(filter(None, parts))


def column_title(column: str, metric: str, alone: bool | None = None) -> str:
    """A column with the metric that has it, unless it is ``alone``: by default where it is called like its metric.

    >>> column_title("insertion", "insertion_deletion"), column_title("ehr", "ehr")
    ('insertion · insertion_deletion', 'ehr')
    """
    return column if (column == metric if alone is None else alone) else title(column, metric)


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def p_text(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def span(values: pd.Series) -> str:
    """``12``, or ``12 to 20``."""
    least, most = values.min(), values.max()
    return f"{most}" if least == most else f"{least} to {most}"


def count_text(n: int, failed: int, pending: int) -> str:
    parts = [f"n={n}", f"{failed} failed" if failed else "", f"{pending} pending" if pending else ""]
    return ", ".join(filter(None, parts))


def maps_text(row: Mapping[str, Any]) -> str:
    """The counts of a cell without scores, a row of ``tables.summary``: ``6 maps, 1 failed``."""
    text = count_text(row["n"], row["failed"], row["pending"])
    maps = "1 map" if row["n"] == 1 else f"{row['n']} maps"
    return text.replace(f"n={row['n']}", maps, 1) if row["n"] else text


def long_table(table: pd.DataFrame, confidence: float = 0.95) -> TextTable:
    """A summary with one line per cell, map and column; the best in bold."""
    names = [*_shared_last(table, ["dataset", "model"]), "contender"]
    names += ["metric"] if table["metric"].ne(table["column"]).any() else []
    pending = table["pending"].any()
    level = percent(confidence)
    device, several = devices(table["device"])
    header = [*names, "column", "n", "failed", *(["pending"] if pending else []), "mean", f"{level} CI"]
    header += [*COSTS, *(["device"] if several else [])]
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
                *cost_texts(row),
                *([row["device"] or "–"] if several else []),
            ]
        )
    header[names.index("contender")] = "method"
    bold = frozenset((i, header.index("mean")) for i, best in enumerate(table["best"]) if best)
    return TextTable(title(_title(table), device), header, body, bold, len(names) + 1, _notes(table))


UNEVEN = (
    "Where n differs, means are of different samples: what is best is so on the samples that it shares with each other "
    "method, and paired tests are of common samples, too."
)


@dataclass(frozen=True)
class Wide:
    """A summary laid out as methods × columns for one dataset and model.

    columns  titles, such as ``ehr ↑``
    counts   below each title, the counts that all its entries share (``n=20, 1 failed``), or ""
    lines    (contender, its costs as ``cost_texts`` and, where they differ, its device; one summary row or None
             per column)
    unscored the counts of contenders without any score: ``6 maps``, or ``n=0, 3 failed`` where scores are due
    device   the one that all lines have in common
    costs    titles of the costs
    places   (metric, column) of each title
    """

    dataset: str
    model: str
    columns: Sequence[str]
    counts: Sequence[str]
    lines: Sequence[tuple[str, Sequence[str], Sequence[Mapping[str, Any] | None]]]
    unscored: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    costs: Sequence[str] = COSTS
    places: Sequence[tuple[str, str]] = ()

    @property
    def uneven(self) -> bool:
        """Whether some column has means of different numbers of samples."""
        columns = zip(*(entries for _, _, entries in self.lines))
        return any(len({row["n"] for row in column if row is not None}) > 1 for column in columns)


def wide(table: pd.DataFrame) -> list[Wide]:
    """A summary as methods × columns, one block per dataset and model."""
    blocks = []
    for (dataset, model), block in table.groupby(["dataset", "model"], sort=False):
        places = [place for place in dict.fromkeys(zip(block["metric"], block["column"])) if place[1]]
        homes: dict[str, set[str]] = {}
        for metric, column in places:
            homes.setdefault(column, set()).add(metric)
        arrows = dict(zip(zip(block["metric"], block["column"]), block["direction"]))
        titles = [f"{column_title(c, m, len(homes[c]) == 1)} {arrows[m, c]}".rstrip() for m, c in places]
        records = {(r["contender"], r["metric"], r["column"]): r for r in block.to_dict("records")}
        names = list(dict.fromkeys(sorted(block["contender"], key=list(dict.fromkeys(block["contender"])).index)))
        device, several = devices(block["device"])
        costs = block.groupby("contender").agg(
            {"seconds": "mean", "rows": "mean", "memory": "max", "device": lambda d: title(*dict.fromkeys(d))}
        )
        texts = {c: [*cost_texts(row), *([row["device"] or "–"] if several else [])] for c, row in costs.iterrows()}
        lines = [(c, texts[c], [records.get((c, *place)) for place in places]) for c in names]
        counts = []
        for i in range(len(places)):
            scored = [row for _, _, entries in lines if (row := entries[i])]
            found = {count_text(row["n"], row["failed"], row["pending"]) for row in scored}
            counts.append(found.pop() if len(found) == 1 else "")
        bare = [r for r in block.to_dict("records") if not r["column"]]
        unscored = {r["contender"]: maps_text(r) for r in bare}
        heads = (*COSTS, *(["device"] if several else []))
        blocks.append(Wide(str(dataset), str(model), titles, counts, lines, unscored, device, heads, places))
    return blocks


def wide_table(block: Wide) -> TextTable:
    """Methods × columns, ``mean ± half width``; the best of a column in bold."""
    header = ["method", *(f"{c} ({n})" if n else c for c, n in zip(block.columns, block.counts)), *block.costs]
    body, bold, empty = [], set(), []
    for i, (contender, costs, entries) in enumerate(block.lines):
        line = [contender]
        for j, (entry, shared) in enumerate(zip(entries, block.counts)):
            text = "–" if entry is None else with_half(entry["mean"], entry["lo"], entry["hi"])
            if entry is not None and not shared:
                text += f" ({count_text(entry['n'], entry['failed'], entry['pending'])})"
            if entry is not None and entry["best"]:
                bold.add((i, j + 1))
            line.append(text)
        body.append([*line, *costs])
        if not any(entries):
            empty.append(f"{contender} ({count})" if (count := block.unscored.get(contender)) else contender)
    missing = [f"No scores: {', '.join(empty)}."] if empty else []
    uneven = [UNEVEN] if block.uneven else []
    notes = (*missing, *uneven, *spelt_out(block.columns))
    return TextTable(title(f"{block.dataset}, {block.model}", block.device), header, body, frozenset(bold), 1, notes)


def paired_table(tests: pd.DataFrame, confidence: float = 0.95, *, most: int | None = None) -> TextTable:
    """Paired tests, one pair a line; the better method in bold where the difference is clear.

    ``most``: of longer lists only the pairs with the smallest p are shown, and a note says how many are not.
    """
    shown = tests
    notes = [
        "difference: mean of a - b on the common samples; p: two-sided permutation test; "
        "p (Holm): over all pairs of a dataset, model and metric. Effect sizes: d_z, mean difference / standard "
        "deviation of the differences; r_rb, rank-biserial correlation, 1 if a is higher on every sample, -1 if b is."
    ]
    if most is not None and len(tests) > most:
        shown = tests.sort_values("p_holm", kind="stable").head(most)
        notes.append(f"{len(tests) - most} more pairs are not shown; --pairs COLUMN shows all of a column.")
    if never := significance.sentence(significance.hopeless(tests, confidence), confidence):
        notes.append(never)
    names = _shared_last(tests, ["dataset", "model"])
    names += ["metric"] if tests["metric"].ne(tests["column"]).any() else []
    header = [*names, "column", "a", "b", "n common", "difference", f"{percent(confidence)} CI"]
    header += ["p", "p (Holm)", "d_z", "r_rb"]
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
                *("–" if math.isnan(row[name]) else f"{row[name]:+.2f}" for name in ("effect", "rank_biserial")),
            ]
        )
        if row["better"]:
            bold.add((i, len(names) + (1 if row["better"] == row["a"] else 2)))
    return TextTable("Paired tests", header, body, frozenset(bold), len(names) + 3, notes)


def rank_tables(table: pd.DataFrame, confidence: float = 0.95) -> list[TextTable]:
    """Mean ranks from ``tables.ranks`` as methods × columns, one table per dataset and model.

    Methods are in the order of their mean rank over the columns; the best of a column in bold.
    """
    drawn = []
    note = (
        "Mean rank on the common samples, 1 is best. Methods that share a letter are not distinguishable: their "
        f"ranks differ by less than the critical difference (Nemenyi, {percent(confidence)}), or Friedman's test "
        "does not reject."
    )
    for (dataset, model), block in table.groupby(["dataset", "model"], sort=False):
        columns = {place: part.to_dict("records") for place, part in block.groupby(["metric", "column"], sort=False)}
        order = list(block.groupby("contender", sort=False)["rank"].mean().sort_values(kind="stable").index)
        header, bold, body = ["rank"], set(), [[name] for name in order]
        below = [["n common"], ["Friedman p"], ["critical difference"]]
        for j, ((metric, column), rows) in enumerate(columns.items(), 1):
            header.append(column_title(column, metric))
            ranks = {row["contender"]: row for row in rows if not math.isnan(row["rank"])}
            for i, name in enumerate(order):
                row = ranks.get(name)
                body[i].append("–" if row is None else f"{row['rank']:.2f} {row['group']}")
                if row is not None and row["rank"] == min(other["rank"] for other in ranks.values()):
                    bold.add((i, j))
            n, most = rows[0]["n"], max(row["n_own"] for row in rows)
            below[0].append(f"{n}" if n == most else f"{n} of {most}")
            below[1].append(p_text(rows[0]["p"]))
            below[2].append(rounded(rows[0]["critical_difference"]))
        drawn.append(
            TextTable(
                f"Ranks: {dataset}, {model}", header, [*body, *below], frozenset(bold), 1, (note, *spelt_out(header))
            )
        )
    return drawn


def _shared_last(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that vary in the table, and so need a column."""
    return [name for name in names if table[name].nunique() > 1]


def _title(table: pd.DataFrame) -> str:
    return ", ".join(str(table[name].iloc[0]) for name in ("dataset", "model") if table[name].nunique() == 1)


def _notes(table: pd.DataFrame) -> tuple[str, ...]:
    unequal = table.loc[table["n"] > 0].groupby(["dataset", "model", "metric", "column"])["n"].nunique().gt(1)
    places = list(dict.fromkeys(name for *_, name in unequal[unequal].index))
    note = f"n differs between methods in: {', '.join(places)}; paired tests use common samples."
    return (*([note] if places else []), *spelt_out([*table["metric"], *table["column"]]))
