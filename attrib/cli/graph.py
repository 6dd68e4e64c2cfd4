"""``attrib graph``: causal graphs of a network's classes, what their paths are worth, and how stable they are.

The graphs are the fitted state of ``method=causal_paths``, found in ``run.root`` or fitted now.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from attrib.causal import CausalGraphs, ClassGraph, Sites, Structure, from_state
from attrib.causal.drawing import draw, draw_stability
from attrib.causal.exchange import HOW, to_json
from attrib.causal.stability import bootstrap, soft
from attrib.causal.subnetwork import effect, summary
from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.config.compose import Composition
from attrib.config.objects import experiment, options_of
from attrib.experiment.cell import Experiment
from attrib.process.signals import Stop, watching
from attrib.running.options import Options
from attrib.running.plan import make_plan
from attrib.running.states import load_state
from attrib.store.files import write_atomic, write_json
from attrib.types import UserError

PARTS = ("graphs", "effect", "stability")


class Wanted(NamedTuple):
    """What is to be written: the fields of configs/graph.yaml beside those of configs/run.yaml."""

    do: Sequence[str]
    betas: Sequence[float]
    repeats: int  # graphs at each beta, and by bootstrap
    draws: int  # random sub-networks
    out: str | None


def main(argv: Sequence[str]) -> int:
    args = PARSERS["graph"]().parse(argv)
    common.prepare()
    return common.grid("graph", args, _graphs)


def _graphs(composition: Composition) -> int:
    with watching() as stop:
        plain = dict(composition.values)
        wanted = _wanted(plain)
        cell = experiment(plain, composition.files)
        print(f"wrote {write(cell, options_of(plain['run']), wanted, stop)}")
    return 0


def _written(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    write_atomic(path, frame.to_csv(index=False).encode())
    return frame


def _png(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())


def _shown(title: str, frame: pd.DataFrame) -> None:
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(str(column))
    for row in frame.itertuples(index=False):
        table.add_row(*map(_said, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _said(value: Any) -> str:
    """A cell of a table; a dash where there is no number, as of the other classes in the union of all."""
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.3f}"


def _layers(graphs: Mapping[int, ClassGraph], names: Mapping[int, str]) -> pd.DataFrame:
    """Nodes per class and layer, causes / candidates; in the order of the classes, whichever was searched first."""
    rows = []
    for target, graph in sorted(graphs.items()):
        name = names.get(target, "")
        row = {"class": f"{target} {name}".strip() if name != str(target) else name, "samples": graph.samples}
        for path, found in graph.layers.items():
            row[path] = f"{int(found.causes.sum())}/{len(found.causes)}" + ("*" if HOW[found.how] == "fallback" else "")
        rows.append(row)
    return pd.DataFrame(rows)


def write(cell: Experiment, options: Options, wanted: Wanted, stop: Stop) -> Path:
    """All files that are wanted; returns their folder."""
    fit, model, root = cell.method.fit, cell.model, Path(options.root)
    if not isinstance(fit, CausalGraphs):
        raise UserError(f"method {cell.names['method']} has no causal graphs; take method=causal_paths")
    estimation = cell.estimation_samples(options.read)
    key = cell.state_key(estimation)
    state = load_state(root, key, fit, model, estimation, stop)
    folder = Path(wanted.out or root / "graphs" / f"{cell.names['dataset']}.{cell.names['model']}.{key[:8]}")
    chosen = fit.choose(model, estimation, lambda _: None) if "stability" in wanted.do else {}
    structure = Structure.of(model, estimation.batch(estimation.uids[:1]).x)
    graphs = from_state(structure, state)
    names = {target: cell.class_name(target) for target in graphs}
    if "graphs" in wanted.do:
        for target, graph in graphs.items():
            write_json(folder / f"class_{target}.json", to_json(structure, graph, names))
            _png(folder / f"class_{target}.png", draw(structure, graph, names.get(target, "")))
        if len(structure.paths) <= 12:
            _shown("causes / candidates per layer, * by the fallback", _layers(graphs, names))
    if "effect" in wanted.do:
        samples = cell.samples(make_plan(cell, options).uids, options.read)
        frame = _written(folder / "effect.csv", effect(model, structure, graphs, samples, wanted.draws, cell.seed))
        table = summary(frame)
        _shown(
            "sub-networks: mean over the classes, and the union of all graphs",
            table[table["class"].isin(["mean", "union"])],
        )
    if "stability" in wanted.do:
        sites, found, drawn = Sites(model, structure), [], []
        for target, uids in chosen.items():
            x = estimation.batch(uids).x
            found.append(soft(sites, x, target, fit.search, wanted.betas, wanted.repeats))
            drawn.append(bootstrap(sites, x, target, fit.search, wanted.repeats, cell.seed))
        frame = _written(folder / "stability.csv", pd.concat(found))
        _png(folder / "stability.png", draw_stability(frame))
        mean = _written(folder / "bootstrap.csv", pd.concat(drawn)).groupby("layer", sort=False).mean(numeric_only=True)
        _shown("Jaccard index under bootstrap, mean over the classes", mean.drop(columns="class").reset_index())
    return folder


def _wanted(plain: dict[str, Any]) -> Wanted:
    """Takes what is meant for this tool out of the configuration. Raises UserError."""
    wanted = Wanted(**{name: plain.pop(name) for name in Wanted._fields})
    for name in ("do", "betas"):
        if not isinstance(getattr(wanted, name), (list, tuple)):
            raise UserError(f"{name} must be a list, not {getattr(wanted, name)!r}; write {name}=[...]")
    for name, kind in (("repeats", int), ("draws", int), ("out", str)):
        value = getattr(wanted, name)
        if not isinstance(value, kind) and (name, value) != ("out", None):
            raise UserError(f"{name} must be {'a whole number' if kind is int else 'a path'}, not {value!r}")
    if strange := [beta for beta in wanted.betas if not isinstance(beta, (int, float))]:
        raise UserError(f"betas: {strange[0]!r} is no number")
    if unknown := [part for part in wanted.do if part not in PARTS]:
        raise UserError(f"do: {unknown[0]!r} is none of {', '.join(PARTS)}; write do=[graphs,effect]")
    if wanted.repeats < 2 or wanted.draws < 1 or not wanted.betas:
        raise UserError("repeats must be at least 2, draws at least 1, and betas not empty")
    return wanted
