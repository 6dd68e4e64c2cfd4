"""One self-contained HTML page from a work directory: which method is best, by how much, and what the maps look like.

Every text that comes from data or files (uids, class names, reasons, labels) is escaped by the template;
pictures are data: URIs, plots are SVG images, so nothing on the page can run or load anything.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

import attrib
from attrib import sanity
from attrib.drawing import pictures
from attrib.errors import plain, printable
from attrib.report import agreement, curves, gallery, graphs, headline, provenance, ranks, trees
from attrib.report.curves import Curve, Style
from attrib.report.gallery import Gallery
from attrib.report.headline import HeadlineScore, Leader
from attrib.report.ranks import Diagram
from attrib.report.trees import Hierarchy
from attrib.results import formats, labels, tables
from attrib.store.files import write_atomic

IMAGE_BYTES = 11_000_000  # of all galleries together, so that the page stays below 15 MB


def write(
    root: Path | str,
    out: Path | str,
    *,
    samples: int = 12,
    confidence: float = 0.95,
    command: str = "",
    broken: list[str] | None = None,
) -> Path:
    """Write the page of a work directory. Raises UserError if there is nothing to show. ``broken``: see ``page``."""
    out = Path(out)
    text = page(root, samples=samples, confidence=confidence, command=command, broken=broken)
    write_atomic(out, text.encode(errors="replace"))
    return out


def page(
    root: Path | str,
    *,
    samples: int = 12,
    confidence: float = 0.95,
    command: str = "",
    broken: list[str] | None = None,
) -> str:
    """The HTML. ``samples``: rows of each gallery, fewer where the pictures would make the page too large.

    ``broken`` gets a line for each file that cannot be read; the page names them, too.
    """
    root, broken = Path(root), [] if broken is None else broken
    cells = labels.labelled(root, broken)
    frame = tables.rows(root, broken)
    every, frame = frame, sanity.without_randomised(cells, frame)  # randomised nets have a section of their own
    summary = tables.summary(frame, confidence)
    tests = tables.all_paired(frame, confidence=confidence)
    summary["tie"] = tables.ties(summary, tests, confidence)
    scores = labels.metrics(item.cell for item in cells)  # what is damaged of them is known by now
    styles = {c: curves.style(i) for i, c in enumerate(dict.fromkeys(summary["contender"]))}

    wides = formats.wide(summary)
    blocks = []
    for wide in wides:
        own = [c for c in cells if (c.dataset, c.model) == (wide.dataset, wide.model)]
        inside = (frame["dataset"] == wide.dataset) & (frame["model"] == wide.model)
        part = frame[inside]
        ranked = tables.ranks(part, confidence)
        mine = tests[(tests["dataset"] == wide.dataset) & (tests["model"] == wide.model)]
        blocks.append(
            Block(
                dataset=wide.dataset,
                model=wide.model,
                device=wide.device,
                columns=list(zip(wide.columns, wide.counts)),
                costs=wide.costs,
                notes=formats.spelt_out(wide.columns),
                lines=headline.lines(wide, styles),
                unscored=wide.unscored,
                verdicts=headline.verdicts(summary, wide, mine, confidence),
                pairs=formats.paired_table(mine, confidence) if len(mine) else None,
                ranks=_rank_table(ranked, confidence),
                diagrams=ranks.diagrams(ranked, styles),
                curves=curves.means(own, part, scores, styles),
                gallery=gallery.gallery(root, own, part, samples, IMAGE_BYTES // len(wides)),
                hierarchies=trees.hierarchies(root, own, part, samples, IMAGE_BYTES // 3 // len(wides)),
                losses=curves.losses(own, part, styles),
            )
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=plain,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    causal = graphs.graphs(root, IMAGE_BYTES // 3)
    records = [run for item in cells for run in provenance.runs(item.cell, broken)]
    broken += [f"{root / 'graphs' / one.title}: {problem}" for one in causal for problem in one.problems]
    if (state := root / "state").exists() and not state.is_dir():
        broken.append(f"{state}: not a folder")
    broken[:] = dict.fromkeys(broken)
    return environment.get_template("page.html.jinja").render(
        title=f"{root.resolve().name}: attribution report",
        facts=headline.facts(frame),
        blocks=blocks,
        checks=agreement.checks(cells, every, styles, confidence),
        graphs=causal,
        broken=[printable(line) for line in broken],
        styles=styles,
        long=formats.long_table(summary, confidence),
        level=formats.percent(confidence),
        legends={s: pictures.data_uri(pictures.legend(s)) for s in (True, False)},
        percentile=pictures.PERCENTILE,
        failures=provenance.failures(every),
        costs=provenance.costs(cells),
        provenance=provenance.provenance(cells),
        runs=records,
        specs=[(c.cell.folder.name, json.dumps(c.spec, indent=2, ensure_ascii=False)) for c in cells],
        drawn={
            "date": time.strftime("%Y-%m-%d %H:%M %Z"),
            "command": command,
            "machine": f"{platform.node()}, {platform.platform()}, Python {platform.python_version()}",
            "attrib": attrib.__version__,
            "work directory": str(root.resolve()),
        },
    )


def _rank_table(table: pd.DataFrame, confidence: float) -> formats.TextTable | None:
    """Of three methods or more; of two, the paired test says all."""
    return formats.rank_tables(table, confidence)[0] if table["contender"].nunique() > 2 else None


@dataclass(frozen=True)
class Block:
    """Everything about one dataset and model."""

    dataset: str
    model: str
    device: str
    columns: Sequence[tuple[str, str]]
    costs: Sequence[str]
    notes: Sequence[str]
    lines: Sequence[tuple[str, Style, Sequence[str], Sequence[HeadlineScore | None]]]
    unscored: Mapping[str, str]
    verdicts: Sequence[Leader]
    pairs: formats.TextTable | None
    ranks: formats.TextTable | None
    diagrams: Sequence[Diagram]
    curves: Sequence[Curve]
    gallery: Gallery | None
    hierarchies: Sequence[Hierarchy]
    losses: Sequence[Curve]
