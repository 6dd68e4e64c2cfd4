"""Causal graphs on the page: what ``attrib graph`` wrote below ``<root>/graphs``, a section per net."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from attrib.causal.subnetwork import summary
from attrib.drawing import pictures
from attrib.results import formats
from attrib.store.reading import content, document
from attrib.store.schemas import CausalGraph, GraphLayer

LONGEST = 1100  # pixels of a picture's longer side


@dataclass(frozen=True)
class GraphSection:
    """The graphs of one fit: their pictures, sizes, effect on the class's logit, and stability."""

    title: str
    images: Sequence[tuple[str, str]]  # caption, picture
    left: int  # classes whose picture is left out, because the page would be too large
    tables: Sequence[formats.TextTable]
    stability: str  # picture, or nothing
    problems: Sequence[str]  # files that cannot be read


def graphs(root: Path, budget: int) -> list[GraphSection]:
    """One per folder. ``budget``: bytes of all pictures together; those beyond it are left out."""
    folders = sorted(path for path in (root / "graphs").glob("*") if path.is_dir())
    found = [_graphs(folder, budget // len(folders)) for folder in folders]
    return [one for one in found if one.images or one.tables or one.stability or one.problems]


def _graphs(folder: Path, budget: int) -> GraphSection:
    problems: list[str] = []
    stability = _picture(folder / "stability.png", problems)
    used, left = len(stability), 0
    images: list[tuple[str, str]] = []
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("class_*.json"), key=lambda p: (len(p.name), p.name)):
        try:
            about = document(path, CausalGraph).graph
            caption = f"{about.class_} {about.name}".strip()
            rows.append({"class": caption, "samples": str(about.samples), **_layers(about.layers)})
        except OSError as error:
            problems.append(f"{path.name}: {str(error).removeprefix(f'{path}: ')}")
            continue
        image = _picture(path.with_suffix(".png"), problems)
        if image and used + len(image) > budget and images:
            left += 1
        elif image:
            used += len(image)
            images.append((caption, image))
    tables = [_sizes(rows)] if rows else []
    for name, draw in (("effect.csv", _effect), ("bootstrap.csv", _bootstrap)):
        if os.path.lexists(folder / name):
            try:
                tables.append(draw(pd.read_csv(io.BytesIO(content(folder / name)))))
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
    return GraphSection(folder.name, images, left, tables, stability, problems)


def _picture(path: Path, problems: list[str]) -> str:
    if not os.path.lexists(path):
        return ""
    try:
        with Image.open(io.BytesIO(content(path))) as image:
            return pictures.data_uri(np.asarray(image.convert("RGB")), longest=LONGEST)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL, for damaged files
        problems.append(f"{path.name}: {type(error).__name__}: {error}")
        return ""


def _layers(layers: Sequence[GraphLayer]) -> dict[str, str]:
    mark = {"fallback": "*"}
    return {layer.path: f"{layer.causes}/{layer.candidates}{mark.get(layer.how, '')}" for layer in layers}


def _sizes(rows: Sequence[dict[str, str]]) -> formats.TextTable:
    header = list(dict.fromkeys(name for row in rows for name in row))
    body = [[row.get(name, "–") for name in header] for row in rows]
    notes = ["* No candidate passed the test: causes are those whose removal lowers the logit beyond Search.fallback."]
    return formats.TextTable("Causes / candidates per layer", header, body, left=1, notes=notes)


def _effect(frame: pd.DataFrame) -> formats.TextTable:
    """The effect of the mean over the classes, and of the union of all graphs."""
    table = summary(frame.astype({"class": str}))
    table = table[table["class"].isin(["mean", "union"])]
    body = [
        [*row[:3], *(f"{value:.3f}" if np.isfinite(value) else "–" for value in row[3:])]
        for row in table[["class", "change", "network", "logit", "accuracy", "others"]].itertuples(index=False)
    ]
    notes = [
        "Of the class's own logit and samples; others: how many of the other classes' samples are given the class. "
        "Random: sub-networks with as many causes in every layer."
    ]
    header = ["class", "change", "network", "logit", "accuracy", "others"]
    return formats.TextTable(
        "The net with nothing but the causal paths, and without them", header, body, left=3, notes=notes
    )


def _bootstrap(frame: pd.DataFrame) -> formats.TextTable:
    mean = frame.groupby("layer", sort=False)[["nodes", "edges", "nodes_reference", "edges_reference"]].mean()
    body = [[layer, *(f"{v:.3f}" if np.isfinite(v) else "–" for v in row)] for layer, *row in mean.itertuples()]
    header = ["layer", "nodes", "edges", "nodes, all samples", "edges, all samples"]
    title = "Jaccard index of graphs over samples drawn with replacement, mean over the classes"
    notes = ["Between the draws, and with the graph over all samples."]
    return formats.TextTable(title, header, body, left=1, notes=notes)
