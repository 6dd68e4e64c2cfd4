"""One self-contained HTML page from a work directory: which method is best, by how much, and what the maps look like.

Every text that comes from data or files (uids, class names, reasons, labels) is escaped by the template; pictures are
data: URIs, plots are SVG images. One script runs, ``page.js``, which the page's policy lets through by its digest, and
nothing is loaded. Without it the page shows the same; with it tables sort, and samples are found and compared.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

import attrib
from attrib import sanity
from attrib.drawing import pictures
from attrib.errors import UserError, did_you_mean, plain, printable
from attrib.report import agreement, curves, gallery, graphs, headline, provenance, ranks, scores, trees
from attrib.report.curves import Curve, Style
from attrib.report.gallery import Gallery
from attrib.report.headline import HeadlineScore, Leader
from attrib.report.ranks import Diagram
from attrib.report.trees import Hierarchy
from attrib.results import formats, labels, significance, tables
from attrib.store.files import write_atomic

HERE = Path(__file__).parent
PAGE_BYTES = 24_500_000  # of the whole page: galleries get what everything else leaves
TREE_BYTES = 3_000_000  # of all pictures of hierarchies; and as many of all pictures of causal graphs


def write(
    root: Path | str,
    out: Path | str,
    *,
    samples: int = 12,
    confidence: float = 0.95,
    command: str = "",
    broken: list[str] | None = None,
    sample: str | None = None,
) -> Path:
    """Write the page of a work directory. Raises UserError if there is nothing to show. The options: see ``page``."""
    out = Path(out)
    text = page(root, samples=samples, confidence=confidence, command=command, broken=broken, sample=sample)
    write_atomic(out, text.encode(errors="replace"))
    return out


def page(
    root: Path | str,
    *,
    samples: int = 12,
    confidence: float = 0.95,
    command: str = "",
    broken: list[str] | None = None,
    sample: str | None = None,
) -> str:
    """The HTML. ``samples``: rows of each gallery, fewer where the pictures would make the page too large.

    ``broken`` gets a line for each file that cannot be read; the page names them, too. ``sample``: a uid; the page then
    shows its maps and scores alone, the maps larger. Raises UserError for one without maps.
    """
    root, broken = Path(root), [] if broken is None else broken
    cells = labels.labelled(root, broken)
    frame = tables.rows(root, broken)
    every, frame = frame, sanity.without_randomised(cells, frame)  # randomised nets have a section of their own
    if sample is None:
        context = _all(root, cells, every, frame, samples, confidence, broken)
    else:
        context = _one(root, cells, frame, sample)
    if (state := root / "state").exists() and not state.is_dir():
        broken.append(f"{state}: not a folder")
    broken[:] = dict.fromkeys(broken)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    render = functools.partial(
        environment().get_template("page.html.jinja").render,
        title=f"{root.resolve().name}: {'attribution report' if sample is None else f'sample {sample}'}",
        broken=[printable(line) for line in broken],
        level=formats.percent(confidence),
        legends={s: pictures.data_uri(pictures.legend(s)) for s in (True, False)},
        percentile=pictures.PERCENTILE,
        sheet=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawn={
            "date": time.strftime("%Y-%m-%d %H:%M %Z"),
            "command": command,
            "machine": f"{platform.node()}, {platform.platform()}, Python {platform.python_version()}",
            "attrib": attrib.__version__,
            "work directory": str(root.resolve()),
        },
        **context,
    )
    if sample is None:
        budget = (PAGE_BYTES - len(render().encode(errors="replace"))) // max(1, len(context["blocks"]))
        return render(blocks=[_with_gallery(block, root, cells, frame, samples, budget) for block in context["blocks"]])
    return render()


def _with_gallery(
    block: Block, root: Path, cells: Sequence[labels.Labelled], frame: pd.DataFrame, samples: int, budget: int
) -> Block:
    own, part = _of(cells, frame, block.dataset, block.model)
    return replace(block, gallery=gallery.gallery(root, own, part, samples, budget, list(block.numbers)))


def _of(
    cells: Sequence[labels.Labelled], frame: pd.DataFrame, dataset: str, model: str
) -> tuple[list[labels.Labelled], pd.DataFrame]:
    """What there is of one dataset and model."""
    own = [c for c in cells if (c.dataset, c.model) == (dataset, model)]
    return own, frame[(frame["dataset"] == dataset) & (frame["model"] == model)]


def environment() -> jinja2.Environment:
    """Where the templates of pages are; texts that they are given are escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=plain,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _all(
    root: Path,
    cells: Sequence[labels.Labelled],
    every: pd.DataFrame,
    frame: pd.DataFrame,
    samples: int,
    confidence: float,
    broken: list[str],
) -> dict[str, Any]:
    """What the template shows of a whole work directory, but for galleries.

    ``every``: the rows with those of randomised nets.
    """
    summary = tables.summary(frame, confidence)
    tests = tables.all_paired(frame, confidence=confidence)
    summary["tie"] = tables.ties(summary, tests, confidence)
    by_cell = labels.metrics(item.cell for item in cells)  # what is damaged of them is known by now
    about = {(m.label, column): text for listed in by_cell.values() for m in listed for column, text in m.about.items()}
    styles = {c: curves.style(i) for i, c in enumerate(dict.fromkeys(summary["contender"]))}
    wides = formats.wide(summary)
    refused = provenance.refusals(every, root)
    blocks = []
    for wide in wides:
        own, part = _of(cells, frame, wide.dataset, wide.model)
        ranked = tables.ranks(part, confidence)
        mine = tests[(tests["dataset"] == wide.dataset) & (tests["model"] == wide.model)]
        names = scores.contenders(part)
        explained = [(title, about[place]) for title, place in zip(wide.columns, wide.places) if place in about]
        blocks.append(
            Block(
                dataset=wide.dataset,
                model=wide.model,
                device=wide.device,
                columns=list(zip(wide.columns, wide.counts)),
                costs=wide.costs,
                uneven=formats.UNEVEN if wide.uneven else "",
                explained=explained,
                notes=() if explained else formats.spelt_out(wide.columns),
                never=significance.sentence(significance.hopeless(mine, confidence), confidence) if len(mine) else "",
                lines=headline.lines(wide, styles),
                numbers={name: i for i, name in enumerate(names)},
                scores=scores.as_json(part, about),
                unscored=wide.unscored,
                refused=[r for r in refused if (r["dataset"], r["model"]) == (wide.dataset, wide.model)],
                verdicts=headline.verdicts(summary, wide, mine, confidence),
                pairs=formats.paired_table(mine, confidence) if len(mine) else None,
                ranks=_rank_table(ranked, confidence),
                diagrams=ranks.diagrams(ranked, styles),
                curves=curves.means(own, part, by_cell, styles),
                hierarchies=trees.hierarchies(root, own, part, samples, TREE_BYTES // len(wides)),
                losses=curves.losses(own, part, styles),
            )
        )
    causal = graphs.graphs(root, TREE_BYTES)
    records = [run for item in cells for run in provenance.runs(item.cell, broken)]
    broken += [f"{root / 'graphs' / one.title}: {problem}" for one in causal for problem in one.problems]
    return {
        "single": False,
        "facts": headline.facts(frame),
        "blocks": blocks,
        "checks": agreement.checks(cells, every, styles, confidence),
        "graphs": causal,
        "long": formats.long_table(summary, confidence),
        "failures": provenance.failures(every),
        "refused": refused,
        "costs": provenance.costs(cells),
        "provenance": provenance.provenance(cells),
        "runs": records,
        "specs": [(c.cell.folder.name, json.dumps(c.spec, indent=2, ensure_ascii=False)) for c in cells],
    }


def _one(root: Path, cells: Sequence[labels.Labelled], frame: pd.DataFrame, uid: str) -> dict[str, Any]:
    """What the template shows of a single sample."""
    blocks = []
    for dataset, model in dict.fromkeys((c.dataset, c.model) for c in cells):
        own, part = _of(cells, frame, dataset, model)
        names = scores.contenders(part)
        shown = gallery.gallery(root, own, part, 1, PAGE_BYTES, names, only=uid)
        if shown is not None:
            numbers = {name: i for i, name in enumerate(names)}
            blocks.append(Block(dataset, model, gallery=shown, numbers=numbers))
    if not blocks:
        near = did_you_mean(uid, frame["uid"].astype(str).unique())
        raise UserError(f"--sample {uid}: {root} holds no map of a sample of this name{near}")
    return {"single": True, "facts": (), "blocks": blocks, "checks": (), "graphs": ()}


def _rank_table(table: pd.DataFrame, confidence: float) -> formats.TextTable | None:
    """Of three methods or more; of two, the paired test says all."""
    return formats.rank_tables(table, confidence)[0] if table["contender"].nunique() > 2 else None


@dataclass(frozen=True)
class Block:
    """Everything about one dataset and model. ``numbers``: of the methods, by which the page's script knows them."""

    dataset: str
    model: str
    device: str = ""
    columns: Sequence[tuple[str, str]] = ()
    costs: Sequence[str] = ()
    uneven: str = ""  # a sentence, where some column has means of different numbers of samples
    explained: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    never: str = ""  # a sentence, where no test could become significant
    lines: Sequence[tuple[str, Style, Sequence[str], Sequence[HeadlineScore | None]]] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    scores: str = ""
    unscored: Mapping[str, str] = field(default_factory=dict)
    refused: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[Leader] = ()
    pairs: formats.TextTable | None = None
    ranks: formats.TextTable | None = None
    diagrams: Sequence[Diagram] = ()
    curves: Sequence[Curve] = ()
    gallery: Gallery | None = None
    hierarchies: Sequence[Hierarchy] = ()
    losses: Sequence[Curve] = ()
