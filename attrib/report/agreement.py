"""The sanity check on the page and on the terminal: agreement with the original's maps over the randomised layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attrib import sanity
from attrib.drawing import pictures
from attrib.report.curves import Style, style
from attrib.results import formats, labels
from attrib.results import tables as views
from attrib.sanity import MEASURES, CellPair, SanityVerdict
from attrib.store.inputs import drawable, stored_array
from attrib.types import UserError

SAMPLES = 3  # whose maps are drawn ...
MOST_VARIANTS = 8  # ... for so many variants at most
MOST_TICKS = 12  # names of layers below a plot
LONGEST = 112  # pixels of a map's longer side


@dataclass(frozen=True)
class Strip:
    """The maps of one contender for one sample: of the original, then of each variant; empty where there is none."""

    contender: str
    style: Style
    images: Sequence[str]


@dataclass(frozen=True)
class Plot:
    title: str
    about: str
    image: str
    lines: Sequence[tuple[str, Style, str]]  # contender, style, how many samples


@dataclass(frozen=True)
class SanityCheck:
    """Everything about the randomised copies of one net, in one order."""

    title: str
    about: str
    plots: Sequence[Plot]
    verdicts: Sequence[tuple[Style, SanityVerdict]]
    tables: Sequence[formats.TextTable]
    columns: Sequence[str]  # of the strips
    strips: Sequence[tuple[str, Sequence[Strip]]]  # by sample


def checks(
    cells: Sequence[labels.Labelled], frame: pd.DataFrame, styles: Mapping[str, Style], confidence: float = 0.95
) -> list[SanityCheck]:
    """One per dataset, net, mode and seed of the new weights. ``frame``: from ``tables.rows``."""
    table = sanity.summary(cells, frame, confidence)
    styles = dict(styles)
    for contender in table["contender"].unique():
        styles.setdefault(contender, style(len(styles)))
    found = []
    for place, part in table.groupby(sanity.PLACE, sort=False):
        own = set(part["cell"])
        pairs = [pair for pair in sanity.pairs(cells) if pair.variant.cell.folder.name in own]
        found.append(
            SanityCheck(
                title=_title(place),
                about=_about(part),
                plots=[_plot(group, str(column), styles) for column, group in part.groupby("column", sort=False)],
                verdicts=[(styles[verdict.contender], verdict) for verdict in sanity.verdicts(part)],
                tables=_tables(part),
                **_strips(pairs, styles),
            )
        )
    return found


def tables(root: Path | str, confidence: float = 0.95) -> list[formats.TextTable]:
    """The same numbers as tables, for a terminal. Raises UserError if no maps have been compared."""
    table = sanity.summary(labels.labelled(root), views.rows(root), confidence)
    if table.empty:
        raise UserError(f"{root} holds no maps of randomised nets to compare; see docs/how-to/check-sanity.md")
    return [drawn for _, part in table.groupby(sanity.PLACE, sort=False) for drawn in _tables(part)]


def _title(place: Sequence[object]) -> str:
    dataset, model, mode, seed = place
    how = "from the output on" if mode == "cascade" else "one at a time"
    return f"{dataset}, {model}: layers randomised {how}" + (f", seed {seed}" if seed else "")


def _about(part: pd.DataFrame) -> str:
    copies = part["place"].nunique()
    return f"{copies} {'copy' if copies == 1 else 'copies'}; the net has {part['total'].max()} layers with weights."


def _variants(part: pd.DataFrame) -> list[tuple[int, str]]:
    """(place, layer) of every variant, from the output."""
    return list(dict.fromkeys(part[["place", "layer"]].sort_values("place").itertuples(index=False, name=None)))


def _tables(part: pd.DataFrame) -> list[formats.TextTable]:
    """Layers x contenders, one table per measure; the verdicts below the first."""
    place = tuple(part[name].iloc[0] for name in sanity.PLACE)
    contenders, found = list(dict.fromkeys(part["contender"])), []
    notes = [f"{v.contender}: {v.text}." for v in sanity.verdicts(part)]
    for column, group in part.groupby("column", sort=False):
        cell = {(row["place"], row["layer"], row["contender"]): row for row in group.to_dict("records")}
        body = []
        for variant in _variants(group):
            entries = [_entry(cell.get((*variant, contender))) for contender in contenders]
            body.append([str(variant[0]), variant[1], *entries])
        title = f"{_title(place)}. {MEASURES[column.split(' ')[0]].capitalize()} ({column}) with the original's maps, "
        title += f"n={formats.span(group['n'])}"
        most = group[["failed", "pending"]].max()
        more = [f"{most[name]} {name}" for name in ("failed", "pending") if most[name]]
        body_notes = [*notes, *([f"Samples that are in no mean, at most: {', '.join(more)}."] if more else [])]
        found.append(formats.TextTable(title, ["layers", "down to", *contenders], body, left=2, notes=body_notes))
        notes = []
    return found


def _entry(row: Mapping[str, float] | None) -> str:
    return "–" if row is None else formats.with_half(row["mean"], row["lo"], row["hi"])


def _plot(part: pd.DataFrame, column: str, styles: Mapping[str, Style]) -> Plot:
    variants = _variants(part)
    cascade = part["mode"].iloc[0] == "cascade"
    ticks = [name if len(variants) <= MOST_TICKS else str(place) for place, name in variants]
    if len(ticks) > 2 * MOST_TICKS:
        step = -(-len(ticks) // MOST_TICKS)
        ticks = [tick if i % step == 0 else "" for i, tick in enumerate(ticks, start=1)]
    drawn, lines = [], []
    for contender, group in part.groupby("contender", sort=False):
        look = styles[str(contender)]
        rows = {(row["place"], row["layer"]): row for row in group.to_dict("records")}
        mean, lo, hi = (
            np.array([1.0] * cascade + [rows[v][name] if v in rows else np.nan for v in variants])
            for name in ("mean", "lo", "hi")
        )
        drawn.append(pictures.PlotLine(mean, look.colour, lo, hi, dashed=look.dashed))
        lines.append((str(contender), look, f"n={formats.span(group['n'])}"))
    about = MEASURES[column.split(" ")[0]]
    image = pictures.plot(
        drawn,
        size=(5.2, 3.0),
        x="randomised from the output down to" if cascade else "randomised layer, from the output",
        y=about,
        unit_x=False,
        ticks=["none"] * cascade + ticks,
    )
    return Plot(column, about, image, lines)


def _strips(pairs: Sequence[CellPair], styles: Mapping[str, Style]) -> dict[str, Sequence]:
    """Maps of the first samples, of images only."""
    shown = list(dict.fromkeys((pair.about["place"], pair.layer) for pair in pairs))
    if len(shown) > MOST_VARIANTS:
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, MOST_VARIANTS).round().astype(int)]
    by_method: dict[str, dict[tuple[int, str], CellPair]] = {}
    for pair in pairs:
        by_method.setdefault(pair.original.method, {})[pair.about["place"], pair.layer] = pair
    keys = sorted(set.intersection(*(set(pair.original.maps()) for pair in pairs)))[:SAMPLES] if pairs else []
    found = []
    for key in keys:
        strips = []
        for method, variants in by_method.items():
            original = next(iter(variants.values())).original
            names = original.spec["maps"]
            for name in names:
                maps = [_map(original, key, name)]
                maps += [_map(variants[v].variant, key, name) if v in variants else None for v in shown]
                if maps[0] is None or maps[0].ndim != 2:
                    continue
                contender = formats.title(method, name if len(names) > 1 else "")
                signed = any(pictures.is_signed(m) for m in maps if m is not None)
                strips.append(Strip(contender, styles[contender], [_drawn(m, signed) for m in maps]))
        if strips:
            found.append((key[0], strips))
    return {"columns": ["original", *(layer for _, layer in shown)], "strips": found}


def _map(item: labels.Labelled, key: tuple[str, str], name: str) -> np.ndarray | None:
    map = stored_array(item.cell.maps, key, name)
    try:
        return None if map is None else drawable(map)
    except ValueError:
        return None


def _drawn(map: np.ndarray | None, signed: bool) -> str:
    if map is None:
        return ""
    return pictures.data_uri(pictures.heat(map, signed), photo=max(map.shape) > 64, longest=LONGEST)
