"""What a study found: its tables and pictures as one Markdown document, drawn anew from its work directories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from attrib import sanity
from attrib.papers import study_figures
from attrib.papers.presets import FULL
from attrib.papers.study import AGREEMENT, COST, MEANS, SAMPLES, WEIGHTS, Part, Study
from attrib.results import agreement, formats, labels, power, tables
from attrib.results.written import TextTable, one_line, to_csv, to_markdown
from attrib.store.cell import cells
from attrib.store.files import write_atomic


class Found(NamedTuple):
    """One finding: tables for people, the numbers behind them, and pictures as PNG."""

    name: str
    tables: list[TextTable]
    numbers: pd.DataFrame
    pictures: list[bytes]


def write(study: Study, confidence: float = 0.95) -> Path:
    """Write ``ROOT/studies/NAME.md`` and, in a folder beside it, pictures and the numbers as CSV. The document's path.

    A part without results is named as such; so is every sample that failed or is pending.
    """
    place = study.root / "studies" / f"{study.name}.md"
    folder = place.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"# {one_line(study.title)}", study.note] if study.note else [f"# {one_line(study.title)}"]
    if study.size != FULL:
        text.append(
            f"paper.size={study.size}: small data and nets, to see that every command works. The numbers mean nothing."
        )
    for part in study.parts:
        text += [f"## {one_line(part.title)}", *filter(None, (part.question, part.note))]
        if not cells(part.root):
            text.append(f"No results yet in {part.root}.")
        else:
            for found in findings(part, confidence):
                text += _drawn(found, part, folder, place.parent)
        text += ["```bash\n" + "\n".join(map(str, part.commands)) + "\n```"]
    write_atomic(place, ("\n\n".join(text) + "\n").encode())
    return place


def _drawn(found: Found, part: Part, folder: Path, base: Path) -> Iterator[str]:
    name = f"{part.name}_{found.name}"
    write_atomic(folder / f"{name}.csv", to_csv(found.numbers).encode())
    for i, picture in enumerate(found.pictures):
        path = folder / (f"{name}.png" if i == 0 else f"{name}_{i + 1}.png")
        write_atomic(path, picture)
        yield f"![{one_line(part.title)}: {found.name}]({os.path.relpath(path, base)})"
    for table in found.tables:
        yield to_markdown(table).rstrip()


def findings(part: Part, confidence: float = 0.95) -> Iterator[Found]:
    """What the part is asked for, in the order in which it asks.

    Raises UserError for a work directory without results.
    """
    listed = labels.labelled(part.root)
    frame = tables.rows(part.root)
    scores = _asked(sanity.without_randomised(listed, frame), listed, part)
    compared = _without(
        scores, scores["method"].astype(str).map(lambda label: any(tables.named(label, n) for n in part.aside))
    )
    make: dict[str, Callable[[], Found]] = {
        MEANS: lambda: _means(scores, confidence),
        SAMPLES: lambda: _samples(scores, part, confidence),
        AGREEMENT: lambda: _agreement(compared, confidence),
        COST: lambda: _cost(compared, part, confidence),
        WEIGHTS: lambda: _weights(listed, frame, part, confidence),
    }
    for name in part.find:
        found = make[name]()
        if found.tables:
            yield found


def _asked(frame: pd.DataFrame, listed: list[labels.Labelled], part: Part) -> pd.DataFrame:
    """The scores that the part looks at: its columns, or all of metrics, without what methods say of themselves."""
    metrics = {name for item in listed for name in item.spec["config"].get("metric") or {}}
    kept = frame["metric"].astype(str).str.split(" (", regex=False).str[0].isin(metrics)
    if part.columns:
        kept &= frame["column"].isin(part.columns)
    return _without(frame, ~kept)


def _without(frame: pd.DataFrame, gone: pd.Series) -> pd.DataFrame:
    kept = frame[~gone].copy()
    for name in kept.select_dtypes("category"):
        kept[name] = kept[name].cat.remove_unused_categories()
    return kept


def _means(frame: pd.DataFrame, confidence: float) -> Found:
    summary = tables.summary(frame, confidence)
    return Found(MEANS, [formats.wide_table(block) for block in formats.wide(summary)], summary, [])


def _samples(frame: pd.DataFrame, part: Part, confidence: float) -> Found:
    tests = tables.all_paired(frame, confidence=confidence)
    sizes = power.sizes(tests, confidence=confidence)
    drawn = [power.table(sizes, confidence=confidence)] if len(sizes) else []
    pairs = [power.of_pair(tests, *pair, confidence=confidence) for pair in part.pairs]
    known = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame()
    if len(known):
        drawn.append(power.pair_table(known, confidence=confidence))
    return Found(SAMPLES, drawn, tests, [])


def _agreement(frame: pd.DataFrame, confidence: float) -> Found:
    found = agreement.agreement(frame, confidence)
    blocks = [block for _, block in found.groupby(["dataset", "model"], sort=False)]
    return Found(
        AGREEMENT, agreement.tables(found, confidence), found, [study_figures.squares(block) for block in blocks]
    )


def _cost(frame: pd.DataFrame, part: Part, confidence: float) -> Found:
    summary = (
        tables.summary(frame[frame["column"] == part.cost], confidence)
        if (frame["column"] == part.cost).any()
        else None
    )
    if summary is None:
        return Found(COST, [], pd.DataFrame(), [])
    front = pd.concat([study_figures.front(block) for _, block in summary.groupby(["dataset", "model"], sort=False)])
    shown, drawn = front[front["front"]].sort_values("seconds"), []
    names = ["dataset", "model"] if front[["dataset", "model"]].drop_duplicates().shape[0] > 1 else []
    body = [
        [
            *(row[name] for name in names),
            row["contender"],
            formats.with_half(row["mean"], row["lo"], row["hi"]),
            *formats.cost_texts(row),
        ]
        for row in shown.to_dict("records")
    ]
    note = "Only methods of which none that is at least as good costs less time."
    header = [*names, "method", part.cost, *formats.COSTS]
    drawn = [TextTable("The best for their price", header, body, left=len(names) + 1, notes=(note,))]
    pictures = [study_figures.costs(block, part.cost) for _, block in front.groupby(["dataset", "model"], sort=False)]
    return Found(COST, drawn, front, pictures)


def _weights(listed: list[labels.Labelled], frame: pd.DataFrame, part: Part, confidence: float) -> Found:
    summary = sanity.summary(listed, frame, confidence)
    if summary.empty:
        return Found(WEIGHTS, [], summary, [])
    blocks = [block for _, block in summary.groupby(sanity.PLACE, sort=False)]
    return Found(WEIGHTS, [_verdicts(block) for block in blocks], summary, [study_figures.weights(b) for b in blocks])


def _verdicts(block: pd.DataFrame) -> TextTable:
    """Methods x (measure, layers), and whether the method passes."""
    variants = list(
        dict.fromkeys(block[["column", "place"]].sort_values(["column", "place"]).itertuples(index=False, name=None))
    )
    layers = dict(zip(block["place"], block["layer"]))
    cell = {(row["contender"], row["column"], row["place"]): row for row in block.to_dict("records")}
    passed = {verdict.contender: verdict for verdict in sanity.verdicts(block)}
    words = {True: "yes", False: "no", None: "not clear"}
    body = []
    for name in dict.fromkeys(block["contender"]):
        rows = [cell.get((name, *variant)) for variant in variants]
        entries = ["–" if row is None else formats.with_half(row["mean"], row["lo"], row["hi"]) for row in rows]
        body.append([name, *entries, words[passed[name].passed] if name in passed else "–"])
    header = ["method", *(f"{column}, down to {layers[place]}" for column, place in variants), "depends on the weights"]
    least, most = block["n"].min(), block["n"].max()
    counts = f"n={most}" if least == most else f"n={least} to {most}"
    dataset, model = block["dataset"].iloc[0], block["model"].iloc[0]
    note = (
        "Rank correlation with the trained network's map, of values and of magnitudes. With all layers random: no if "
        "the whole interval of one is above a half (of the magnitudes alone: the place does not depend, the signs do), "
        "yes if both intervals are below. A map that is constant has no rank and does not count in n."
    )
    return TextTable(f"{dataset}, {model}, {counts}", header, body, left=1, notes=(note,))
