"""What a study found: its tables and pictures as one Markdown document, drawn anew from its work directories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd

from attrib import sanity
from attrib.papers import study_figures
from attrib.papers.presets import FULL
from attrib.papers.study import AGREEMENT, COST, MEANS, SAMPLES, WEIGHTS, Part, Study
from attrib.results import agreement, formats, labels, power, tables
from attrib.results.written import TextTable, markdown, one_line, to_csv, to_markdown
from attrib.store.cell import cells
from attrib.store.files import write_atomic
from attrib.store.workers import read_object
from attrib.types import UserError


class Found(NamedTuple):
    """One finding: tables for people, the numbers behind them by what they are of, and pictures as PNG."""

    tables: Sequence[TextTable] = ()
    numbers: dict[str, pd.DataFrame] = {}
    pictures: Sequence[bytes] = ()


class Written(NamedTuple):
    """A document, a sentence for each part of which something could not be found out, files that cannot be read."""

    path: Path
    problems: list[str]
    broken: list[str]


def write(study: Study, confidence: float = 0.95) -> Written:
    """Write ``ROOT/studies/NAME.md`` and, in a folder beside it, pictures and the numbers as CSV.

    What could not be found out, samples that failed or are pending, and what cannot be read are said in the document.
    """
    place = study.root / "studies" / f"{study.name}.md"
    folder = place.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"# {markdown(study.title)}", *filter(None, [markdown(study.note)])]
    problems: list[str] = []
    broken: list[str] = []
    if study.size != FULL:
        text.append(
            f"paper.size={study.size}: small data and nets, to see that every command works. The numbers mean nothing."
        )
    for part in study.parts:
        text += [f"## {markdown(part.title)}", *filter(None, (markdown(part.question), markdown(part.note)))]
        unread: list[str] = []
        if not part.chosen and not cells(part.root):
            text.append("Not computed yet.")
            continue
        try:
            for name, found in findings(part, confidence, unread):
                text += _drawn(name, found, part, folder)
        except UserError as error:
            problems.append(f"{part.name}: {one_line(error)}")
            text.append(markdown(str(error)))
        if unread:
            text.append(markdown(f"Left out: {len(unread)} files cannot be read, the first: {unread[0]}"))
        text += ["```bash\n" + "\n".join(map(str, part.commands)) + "\n```"]
        broken += unread
    write_atomic(place, ("\n\n".join(text) + "\n").encode())
    return Written(place, problems, broken)


def _drawn(name: str, found: Found, part: Part, folder: Path) -> Iterator[str]:
    for what, numbers in found.numbers.items():
        write_atomic(folder / f"{part.name}_{what}.csv", to_csv(numbers).encode())
    for i, picture in enumerate(found.pictures):
        path = folder / (f"{part.name}_{name}.png" if i == 0 else f"{part.name}_{name}_{i + 1}.png")
        write_atomic(path, picture)
        yield f"![{markdown(part.title)}: {name}]({quote(os.path.relpath(path, folder.parent))})"
    for table in found.tables:
        yield to_markdown(table).rstrip()
    if not found.tables:
        yield f"Nothing to say of {name}: too few methods have scores of the same samples."


def findings(part: Part, confidence: float = 0.95, broken: list[str] | None = None) -> Iterator[tuple[str, Found]]:
    """What is missing, then what the part is asked for, in the order in which it asks.

    ``broken`` gets the files that cannot be read.

    Raises UserError for a work directory without results, or without those that are needed.
    """
    if not cells(part.root):
        raise UserError(f"no results yet in {part.root}")
    broken = [] if broken is None else broken
    listed = labels.labelled(part.root, broken)
    frame = tables.rows(part.root, broken)
    scores, unknown = _asked(sanity.without_randomised(listed, frame), listed, part)
    aside = [any(tables.named(label, name) for name in part.aside) for label in scores["method"].astype(str)]
    compared = tables.only(scores, ~pd.Series(aside, index=scores.index, dtype=bool))
    make: dict[str, Callable[[], Found]] = {
        MEANS: lambda: _means(scores, confidence),
        SAMPLES: lambda: _samples(scores, part, confidence),
        AGREEMENT: lambda: _agreement(compared, confidence),
        COST: lambda: _cost(compared, part, confidence),
        WEIGHTS: lambda: _weights(listed, frame, confidence),
    }
    if said := [*_missing(frame), *unknown]:
        yield "missing", Found([TextTable("", ["missing", "samples", "why"], said, left=1)])
    for name in part.find:
        if name != WEIGHTS and scores.empty:
            raise UserError(f"no scores yet in {part.root}")
        yield name, make[name]()


def _asked(frame: pd.DataFrame, listed: Sequence[labels.Labelled], part: Part) -> tuple[pd.DataFrame, list[list[str]]]:
    """The scores that the part looks at: its columns, or all of metrics, without what methods say of themselves.

    And a line for the columns that no score has, if there are any.
    """
    metrics: set[str] = set()
    for item in listed:
        runs = (read_object(path) for path in sorted(item.cell.folder.glob("runs/*/config.json")))
        for config in (item.spec["config"], *runs):
            metrics.update(config.get("metric") or {})
    metric = frame["metric"].astype(str).str.split(" (", regex=False).str[0]
    column = frame["column"].astype(str)
    kept = metric.isin(metrics)
    by_metric = metric + "." + column  # a column is named by itself, or as METRIC.COLUMN
    known = [*column[kept].unique(), *by_metric[kept].unique()]
    unknown = [name for name in (*part.columns, part.cost) if name and known and name not in known]
    if part.columns:
        kept &= column.isin(part.columns) | by_metric.isin(part.columns)
    lines = [f"{', '.join(unknown)}: no score is called so yet", "", f"there are {', '.join(known)}"]
    return tables.only(frame, kept), [lines] if unknown else []


def _missing(frame: pd.DataFrame) -> list[list[str]]:
    """For each method, how many samples failed or are pending, and why the first of them did."""
    found = []
    rows = frame[frame["state"].isin(["failed", "pending"])].astype({"contender": str, "method": str, "state": str})
    for (method, state), group in rows.groupby(["method", "state"], sort=False):
        reasons = [reason for reason in group["reason"].astype(str) if reason]
        found.append([f"{method}, {state}", str(group["uid"].nunique()), reasons[0] if reasons else ""])
    return found


def _means(frame: pd.DataFrame, confidence: float) -> Found:
    summary = tables.summary(frame, confidence)
    return Found([formats.wide_table(block) for block in formats.wide(summary)], {MEANS: summary})


def _samples(frame: pd.DataFrame, part: Part, confidence: float) -> Found:
    tests = tables.all_paired(frame, confidence=confidence)
    sizes = power.sizes(tests, confidence=confidence)
    drawn = [power.table(tests, confidence=confidence)] if len(sizes) else []
    numbers = {SAMPLES: sizes, "pairs": tests}
    if part.pairs:
        found = [power.of_pair(tests, *pair, confidence=confidence) for pair in part.pairs]
        known = pd.concat(found, ignore_index=True)
        missing = [f"{a} and {b}" for (a, b), rows in zip(part.pairs, found, strict=True) if rows.empty]
        table = power.pair_table(known, confidence=confidence)
        notes = [*table.notes, *([f"No results of both: {'; '.join(missing)}."] if missing else [])]
        drawn.append(TextTable(table.title, table.header, table.body, left=table.left, notes=notes))
    return Found(drawn, numbers)


def _agreement(frame: pd.DataFrame, confidence: float) -> Found:
    found = agreement.agreement(frame, confidence)
    blocks = [block for _, block in found.groupby(["dataset", "model"], sort=False)]
    return Found(agreement.tables(found, confidence), {AGREEMENT: found}, [study_figures.squares(b) for b in blocks])


def _cost(frame: pd.DataFrame, part: Part, confidence: float) -> Found:
    """On the samples that all methods have, because a method that was tried on easy ones only would look better."""
    fronts = []
    wanted = frame[(frame["column"] == part.cost) & (frame["state"] == "ok")]
    for _, block in wanted.groupby(["dataset", "model", "metric"], observed=True, sort=False):
        names = ["uid", "fingerprint"]
        each = block.groupby(names, observed=True)["contender"].nunique()
        common = each[each == block["contender"].nunique()].index
        block = block[pd.MultiIndex.from_frame(block[names]).isin(common)]
        if block.empty:
            raise UserError(f"cost: no sample has the {part.cost} of every method")
        if (block["direction"] == "none").any():
            raise UserError(f"cost: {part.cost} has no direction, so no method is better than another")
        fronts.append(study_figures.front(tables.summary(block, confidence)))
    if not fronts:
        return Found()
    found = pd.concat(fronts)
    names = [name for name in ("dataset", "model", "metric") if found[name].nunique() > 1]
    arrow = str(found["direction"].iloc[0])
    body = [
        [
            *(row[name] for name in names),
            row["contender"],
            str(row["n"]),
            formats.with_half(row["mean"], row["lo"], row["hi"]),
            *formats.cost_texts(row),
        ]
        for row in found[found["front"]].sort_values("seconds").to_dict("records")
    ]
    note = "Only methods of which none that is at least as good takes less time, on the samples that all methods have."
    header = [*names, "method", "n", f"{part.cost} {arrow}", *formats.COSTS]
    drawn = TextTable("The best for their price", header, body, left=len(names) + 1, notes=(note,))
    return Found([drawn], {COST: found}, [study_figures.costs(block, part.cost) for block in fronts])


def _weights(listed: list[labels.Labelled], frame: pd.DataFrame, confidence: float) -> Found:
    summary = sanity.summary(listed, frame, confidence)
    if summary.empty:
        raise UserError("no maps of randomised networks to compare; attrib sanity makes them")
    blocks = [block for _, block in summary.groupby(sanity.PLACE, sort=False)]
    ranked = [block for block in blocks if block["column"].isin(study_figures.RANKS).any()]
    tables_ = [_verdicts(block) for block in blocks]
    return Found(tables_, {WEIGHTS: summary}, [study_figures.weights(block) for block in ranked])


def _verdicts(block: pd.DataFrame) -> TextTable:
    """Methods x (measure, layers), and whether the method passes."""
    ordered = block[["column", "place"]].sort_values(["column", "place"])
    variants = list(dict.fromkeys(ordered.itertuples(index=False, name=None)))
    layers = dict(zip(block["place"], block["layer"]))
    cell = {(row["contender"], row["column"], row["place"]): row for row in block.to_dict("records")}
    passed = {verdict.contender: verdict for verdict in sanity.verdicts(block)}
    words = {True: "yes", False: "no", None: "not clear"}
    body = []
    for name in dict.fromkeys(block["contender"]):
        rows = [cell.get((name, *variant)) for variant in variants]
        entries = ["–" if row is None else formats.with_half(row["mean"], row["lo"], row["hi"]) for row in rows]
        body.append([name, *entries, words[passed[name].passed] if name in passed else "–"])
    how = study_figures.reach(block)
    header = ["method", *(f"{column}, {how} {layers[place]}" for column, place in variants), "depends on the weights"]
    counts = f"n={formats.span(block['n'])}"
    dataset, model = block["dataset"].iloc[0], block["model"].iloc[0]
    note = (
        "Agreement with the trained network's map; spearman is the rank correlation, spearman_abs that of the "
        "magnitudes. With all layers random: no if the whole interval of a rank correlation is above a half (of the "
        "magnitudes alone: the place does not depend, the signs do), yes if all are below. A constant map has no rank "
        "and does not count in n."
    )
    return TextTable(formats.title(f"{dataset}, {model}", counts), header, body, left=1, notes=(note,))
