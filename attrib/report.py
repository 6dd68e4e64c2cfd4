"""One self-contained HTML page from a work directory: what won, by how much, what the maps look like.

Every text that comes from data or files (uids, class names, reasons, labels) is escaped by the template;
pictures are data: URIs, plots are SVG images, so nothing on the page can run or load anything.
"""

from __future__ import annotations

import json
import platform
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

import attrib
from attrib import pictures, tables
from attrib.store import Arrays, Cell, Key, write_atomic
from attrib.tables import Labelled, Scores

IMAGE_BYTES = 11_000_000  # of all galleries together; a page beyond 15 MB is no pleasure to open
LONGEST = 224  # pixels of a thumbnail's longer side
MOST_CURVES = 2_000  # samples whose curves are read, per method: a band does not get better by more
MOST_LOSSES = 24
MOST_UIDS = 50  # uids listed per kind of failure


def write(root: Path | str, out: Path | str, *, samples: int = 12, confidence: float = 0.95, command: str = "") -> Path:
    """Write the page of a work directory. Raises UserError if there is nothing to show."""
    out = Path(out)
    write_atomic(out, page(root, samples=samples, confidence=confidence, command=command).encode())
    return out


def page(root: Path | str, *, samples: int = 12, confidence: float = 0.95, command: str = "") -> str:
    """The HTML. ``samples``: rows of each gallery, fewer where the pictures would make the page too large."""
    root = Path(root)
    cells = tables.labelled(root)
    frame = tables.rows(root)
    summary = tables.summary(frame, confidence)
    tests = tables.all_paired(frame, confidence=confidence)
    summary["tie"] = tables.ties(summary, tests, confidence)
    scores = tables.metrics(item.cell for item in cells)
    styles = {c: _style(i) for i, c in enumerate(dict.fromkeys(summary["contender"]))}

    wides = tables.wide(summary)
    blocks = []
    for wide in wides:
        own = [c for c in cells if (c.dataset, c.model) == (wide.dataset, wide.model)]
        inside = (frame["dataset"] == wide.dataset) & (frame["model"] == wide.model)
        part = frame[inside]
        mine = tests[(tests["dataset"] == wide.dataset) & (tests["model"] == wide.model)]
        blocks.append(
            Block(
                dataset=wide.dataset,
                model=wide.model,
                columns=list(zip(wide.columns, wide.counts)),
                lines=_lines(wide, styles),
                unscored=wide.unscored,
                verdicts=_verdicts(summary, wide, mine, confidence),
                pairs=tables.paired_table(mine, confidence) if len(mine) else None,
                curves=_curves(own, part, scores, styles),
                gallery=_gallery(root, own, part, samples, IMAGE_BYTES // len(wides)),
                losses=_losses(own, part, styles),
            )
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=f"{root.resolve().name}: attribution report",
        facts=_facts(frame),
        blocks=blocks,
        styles=styles,
        long=tables.long_table(summary, confidence),
        level=tables.percent(confidence),
        legends={s: pictures.data_uri(pictures.legend(s)) for s in (True, False)},
        percentile=pictures.PERCENTILE,
        failures=_failures(frame),
        costs=_costs(cells),
        provenance=_provenance(cells),
        runs=[run for item in cells for run in _runs(item.cell)],
        specs=[(c.cell.folder.name, json.dumps(c.spec, indent=2, ensure_ascii=False)) for c in cells],
        drawn={
            "date": time.strftime("%Y-%m-%d %H:%M %Z"),
            "command": command,
            "machine": f"{platform.node()}, {platform.platform()}, Python {platform.python_version()}",
            "attrib": attrib.__version__,
            "work directory": str(root.resolve()),
        },
    )


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every plot of the page."""

    colour: str
    dashed: bool


def _style(i: int) -> Style:
    return Style(pictures.COLOURS[i % len(pictures.COLOURS)], i // len(pictures.COLOURS) % 2 == 1)


@dataclass(frozen=True)
class Entry:
    """One number of the headline table, with its interval as places (0 to 100) on its column's axis."""

    mean: str
    half: str
    exact: str
    count: str
    best: bool
    tie: bool
    dot: float | None
    left: float
    width: float


@dataclass(frozen=True)
class Verdict:
    """Who has the best mean of a column, whom it beats clearly and whom not."""

    column: str
    best: Sequence[str]
    value: str
    ahead: Sequence[tuple[str, str]]  # (contender, Holm's p)
    level: Sequence[tuple[str, str]]
    apart: Sequence[str]  # no common samples


@dataclass(frozen=True)
class Curve:
    title: str
    about: str
    image: str
    lines: Sequence[tuple[str, Style, int]]  # contender, style, samples
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Tile:
    """One map of one sample: a picture, coloured tokens, or the reason why there is none."""

    image: str = ""
    tokens: Sequence[tuple[str, str, str]] = ()  # word, its colour, colour of the letters
    limit: str = ""
    scores: Sequence[tuple[str, str]] = ()
    problem: str = ""


@dataclass(frozen=True)
class Sample:
    uid: str
    name: str
    image: str
    tiles: Sequence[Tile]
    pixelated: bool = False


@dataclass(frozen=True)
class Gallery:
    columns: Sequence[tuple[str, str, bool]]  # contender, what the map is, whether it is signed
    samples: Sequence[Sample]
    note: str


@dataclass(frozen=True)
class Block:
    """Everything about one dataset and model."""

    dataset: str
    model: str
    columns: Sequence[tuple[str, str]]
    lines: Sequence[tuple[str, Style, str, Sequence[Entry | None]]]
    unscored: Mapping[str, str]
    verdicts: Sequence[Verdict]
    pairs: tables.Table | None
    curves: Sequence[Curve]
    gallery: Gallery | None
    losses: Sequence[Curve] = field(default_factory=tuple)


# Numbers ------------------------------------------------------------------------------------------------


def _lines(wide: tables.Wide, styles: Mapping[str, Style]) -> list[tuple[str, Style, str, list[Entry | None]]]:
    axes = []
    for i in range(len(wide.columns)):
        ends = [e[i][k] for _, _, e in wide.lines if e[i] for k in ("mean", "lo", "hi") if np.isfinite(e[i][k])]
        axes.append((min(ends), max(ends)) if ends else (0.0, 0.0))
    return [
        (
            contender,
            styles[contender],
            tables.seconds_text(seconds),
            [_entry(e, shared, axis) for e, shared, axis in zip(entries, wide.counts, axes, strict=True)],
        )
        for contender, seconds, entries in wide.lines
    ]


def _entry(row: Mapping[str, Any] | None, shared: str, axis: tuple[float, float]) -> Entry | None:
    if row is None:
        return None
    mean, lo, hi = row["mean"], row["lo"], row["hi"]
    low, span = axis[0], axis[1] - axis[0]
    place = {"dot": None, "left": 0.0, "width": 0.0}
    if np.isfinite(mean) and span > 0:
        place["dot"] = round(100 * (mean - low) / span, 2)
        if np.isfinite(lo):
            place |= {"left": round(100 * (lo - low) / span, 2), "width": round(100 * (hi - lo) / span, 2)}
    return Entry(
        mean=tables.rounded(mean, lo, hi),
        half=tables.rounded((hi - lo) / 2, lo, hi) if hi > lo else "",
        exact=f"{mean!r} [{lo!r}, {hi!r}]",
        count="" if shared else tables.count_text(row["n"], row["failed"], row["pending"]),
        best=bool(row["best"]),
        tie=bool(row["tie"]),
        **place,
    )


def _verdicts(summary: pd.DataFrame, wide: tables.Wide, tests: pd.DataFrame, confidence: float) -> list[Verdict]:
    block = summary[(summary["dataset"] == wide.dataset) & (summary["model"] == wide.model) & summary["best"]]
    found = []
    for (metric, column), best in block.groupby(["metric", "column"], sort=False):
        row = best.iloc[0]
        places = tests[(tests["metric"] == metric) & (tests["column"] == column)]
        ahead, level, apart = [], [], []
        for test in places.to_dict("records"):
            if row["contender"] not in (test["a"], test["b"]):
                continue
            other = test["b"] if row["contender"] == test["a"] else test["a"]
            if test["n"] == 0:
                apart.append(other)
            else:
                kind = ahead if test["better"] == row["contender"] else level
                kind.append((other, _p_is(test["p_holm"])))
        title = f"{column} {row['direction']}" if metric == column else f"{column} {row['direction']} · {metric}"
        value = tables.with_half(row["mean"], row["lo"], row["hi"])
        found.append(Verdict(title, list(best["contender"]), value, ahead, level, apart))
    return found


def _p_is(p: float) -> str:
    text = tables.p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _facts(frame: pd.DataFrame) -> list[tuple[int, str]]:
    """The line below the title: how much of what."""
    failed = frame.loc[frame["state"] == "failed", ["cell", "uid"]].drop_duplicates()
    pending = frame.loc[frame["state"] == "pending", ["cell", "uid"]].drop_duplicates()
    counts = [
        (frame["method"].nunique(), "method"),
        (frame["dataset"].nunique(), "dataset"),
        (frame["model"].nunique(), "model"),
        (len(frame[["dataset", "uid"]].drop_duplicates()), "sample"),
        (int((frame["state"] == "ok").sum()), "score"),
        (len(failed), "failure"),
    ]
    facts = [(n, name if n == 1 else f"{name}s") for n, name in counts]
    return facts + ([(len(pending), "pending")] if len(pending) else [])


# Curves -------------------------------------------------------------------------------------------------


def _read(arrays: Arrays, wanted: Iterable[Key], name: str) -> tuple[list[np.ndarray], int]:
    """The array ``name`` of every stored sample that has it, opening each chunk once; and how many are damaged."""
    index = arrays.index()
    by_file: dict[Path, list[Any]] = {}
    for key in wanted:
        if (record := index.get(key)) is not None and name in record.names:
            by_file.setdefault(record.path, []).append(record)
    found, damaged = [], 0
    for path, records in by_file.items():
        try:
            with safe_open(path, framework="numpy") as file:
                for record in records:
                    value = file.get_tensor(f"{record.position}/{name}")
                    if zlib.crc32(np.ascontiguousarray(value).data) == record.crc[name]:
                        found.append(value)
                    else:
                        damaged += 1
        except (SafetensorError, OSError):
            damaged += len(records)
    return found, damaged


def _aligned(values: Sequence[np.ndarray]) -> np.ndarray:
    """(N, S); curves of different lengths are interpolated on the equal steps of the longest."""
    longest = max(len(v) for v in values)
    grid = np.linspace(0, 1, longest)
    same = (v if len(v) == longest else np.interp(grid, np.linspace(0, 1, len(v)), v) for v in values)
    return np.stack([np.asarray(v, dtype=np.float64) for v in same])


def _curves(
    cells: Sequence[Labelled],
    frame: pd.DataFrame,
    scores: Mapping[str, Sequence[Scores]],
    styles: Mapping[str, Style],
) -> list[Curve]:
    """Mean curve of every method with a band of 1.96 standard errors, one plot per metric and curve."""
    plots: dict[tuple[str, str], dict[str, Any]] = {}
    for item in cells:
        mine = frame[(frame["cell"] == item.cell.folder.name) & (frame["state"] == "ok")]
        for folder in scores.get(item.cell.folder.name, []):
            if not folder.curves:
                continue
            arrays = item.cell.curves(folder.folder)
            own = mine[mine["metric"] == folder.label]
            for (map_name, contender), group in own.groupby(["map", "contender"], observed=True, sort=False):
                wanted = list(dict.fromkeys(zip(group["uid"], group["fingerprint"])))
                for curve, about in folder.curves.items():
                    values, damaged = _read(arrays, wanted[:MOST_CURVES], f"{map_name}/{curve}")
                    entry = plots.setdefault((folder.label, curve), {"about": about, "lines": [], "notes": []})
                    if len(wanted) > MOST_CURVES:
                        entry["notes"].append(f"{contender}: the first {MOST_CURVES} of {len(wanted)} samples.")
                    if damaged:
                        entry["notes"].append(f"{contender}: {damaged} curves are damaged on disk and left out.")
                    values = [v for v in values if v.ndim == 1 and len(v) > 1 and np.isfinite(v).all()]
                    if values:
                        entry["lines"].append((contender, _aligned(values)))
    return [
        Curve(
            title=curve.removesuffix("_curve") + ("" if label in curve else f" · {label}"),
            about=entry["about"],
            image=_mean_plot(entry["lines"], entry["about"], styles),
            lines=[(contender, styles[contender], len(values)) for contender, values in entry["lines"]],
            notes=entry["notes"],
        )
        for (label, curve), entry in plots.items()
        if entry["lines"]
    ]


def _mean_plot(lines: Sequence[tuple[str, np.ndarray]], about: str, styles: Mapping[str, Style]) -> str:
    drawn = []
    for contender, values in lines:
        mean, style, band = values.mean(0), styles[contender], None
        if len(values) > 1:
            band = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        lo, hi = (None, None) if band is None else (mean - band, mean + band)
        drawn.append(pictures.Line(mean, style.colour, lo, hi, dashed=style.dashed))
    x, y = _axes(about)
    return pictures.plot(drawn, x=x, y=y)


def _axes(about: str) -> tuple[str, str]:
    """``x: threshold; y: ratio`` -> ("threshold", "ratio")."""
    before, _, y = about.partition("y:")
    return before.strip().removeprefix("x:").strip(" ,;"), y.strip()


def _losses(cells: Sequence[Labelled], frame: pd.DataFrame, styles: Mapping[str, Style]) -> list[Curve]:
    """The extras ``loss*`` (S,) of some samples: one thin line a sample, their mean on top."""
    found = []
    for item in cells:
        index = item.cell.maps.index()
        names = dict.fromkeys(n for record in index.values() for n in record.names if n.startswith("loss"))
        method = frame.loc[frame["cell"] == item.cell.folder.name, "contender"]
        style = styles[method.iloc[0]] if len(method) else Style(pictures.COLOURS[0], False)
        for name in names:
            values, _ = _read(item.cell.maps, list(index)[:MOST_LOSSES], name)
            values = [v for v in values if v.ndim == 1 and len(v) > 1]
            if not values:
                continue
            lines = [pictures.Line(v, style.colour, width=0.5) for v in values]
            if len({len(v) for v in values}) == 1:
                lines.append(pictures.Line(np.mean(values, axis=0), style.colour, width=2.2))
            image = pictures.plot(lines, size=(3.4, 2.2), x="step", y=name, unit_x=False)
            found.append(Curve(f"{item.method} · {name}", "", image, [(item.method, style, len(values))]))
    return found


# Gallery ------------------------------------------------------------------------------------------------


def _gallery(root: Path, cells: Sequence[Labelled], frame: pd.DataFrame, samples: int, budget: int) -> Gallery | None:
    """Samples × maps. Rows stop where the pictures would exceed ``budget`` bytes."""
    stores = list(dict.fromkeys(c.spec["pictures"] for c in cells if c.spec.get("pictures")))
    inputs = [Arrays(root / "state" / f"pictures.{key}") for key in stores]
    keys_of = [_current(c.cell, frame) for c in cells]
    pictured = list(dict.fromkeys(uid for store in inputs for uid, _ in store.index()))
    stored = list(dict.fromkeys(uid for known in keys_of for uid in known))
    uids = [u for u in pictured if any(u in known for known in keys_of)] or sorted(stored)
    if not uids or samples < 1:
        return None

    columns = []  # (cell, its keys, map, contender, about, signed)
    for item, known in zip(cells, keys_of):
        shown = [u for u in uids[:samples] if u in known]
        for name, about in (item.spec.get("maps") or {}).items():
            maps = [m for u in shown if (m := _array(item.cell.maps, known[u], name)) is not None]
            if maps:
                several = len(item.spec["maps"]) > 1
                label = f"{item.method} · {name}" if several else item.method
                columns.append((item, known, name, label, about, any(map(pictures.is_signed, maps))))

    shown, used = [], 0
    for uid in uids[:samples]:
        sample = _sample(uid, inputs, columns, frame[frame["uid"] == uid])
        used += len(sample.image) + sum(len(tile.image) for tile in sample.tiles)
        if used > budget and shown:
            break
        shown.append(sample)
    note = f"{len(shown)} of {len(stored)} samples with maps." if len(shown) < len(stored) else ""
    if not pictured:
        note += " The work directory holds no pictures of the inputs: maps are drawn alone."
    return Gallery([(label, about, signed) for *_, label, about, signed in columns], shown, note.strip())


def _current(cell: Cell, frame: pd.DataFrame) -> dict[str, Key]:
    """uid -> where its map lies: under the fingerprint that the tables use, else the last one stored."""
    known = {uid: (uid, fingerprint) for uid, fingerprint in cell.maps.index()}
    rows = frame.loc[frame["cell"] == cell.folder.name, ["uid", "fingerprint"]].drop_duplicates()
    index = cell.maps.index()
    return known | {u: (u, f) for u, f in rows.itertuples(index=False, name=None) if (u, f) in index}


def _array(arrays: Arrays, key: Key, name: str) -> np.ndarray | None:
    try:
        return arrays.read(key, [name])[name]
    except (KeyError, OSError, SafetensorError):
        return None


def _sample(uid: str, inputs: Sequence[Arrays], columns: Sequence[Any], frame: pd.DataFrame) -> Sample:
    image = roi = None
    info: Mapping[str, Any] = {}
    for store in inputs:
        key = next((k for k in store.index() if k[0] == uid), None)
        if key is not None:
            image, roi, info = _array(store, key, "image"), _array(store, key, "roi"), store.index()[key].info
            break
    tokens = [str(t) for t in info.get("tokens", ())]
    tiles = []
    for item, known, name, _, _, signed in columns:
        mine = frame[(frame["cell"] == item.cell.folder.name) & frame["map"].isin([name, ""])]
        scores = mine[mine["state"] == "ok"]
        numbers = [(c, f"{v:.3g}") for c, v in zip(scores["column"], scores["value"])]
        failed = mine[mine["state"] == "failed"]
        problem = "; ".join(dict.fromkeys(f"{s}: {r}" for s, r in zip(failed["stage"], failed["reason"])))
        map = _array(item.cell.maps, known[uid], name) if uid in known else None
        if map is None:
            tiles.append(Tile(scores=numbers, problem=problem or "no map stored"))
        else:
            tiles.append(_tile(map, image, roi, tokens, signed, numbers, problem))
    drawn = (
        "" if image is None else pictures.data_uri(pictures.outlined(image, roi), photo=_photo(image), longest=LONGEST)
    )
    name, target = str(info.get("name") or ""), info.get("target")
    if target is not None:
        name = f"{name} ({target})" if name else f"class {target}"
    return Sample(uid, name, drawn, tiles, image is not None and max(image.shape) < 64)


def _photo(image: np.ndarray) -> bool:
    return max(image.shape) > 64  # JPEG would smear a 28-pixel digit


def _tile(
    map: np.ndarray,
    image: np.ndarray | None,
    roi: np.ndarray | None,
    tokens: Sequence[str],
    signed: bool,
    scores: Sequence[tuple[str, str]],
    problem: str,
) -> Tile:
    limit = f"{'±' if signed else ''}{pictures.scale(map, signed).limit:.3g}"
    if map.ndim == 1:
        words = tokens if len(tokens) == len(map) else [str(i) for i in range(len(map))]
        return Tile("", [(w, *c) for w, c in zip(words, pictures.strip(map, signed))], limit, scores, problem)
    if map.ndim != 2:
        return Tile(scores=scores, problem=problem or f"a map of shape {map.shape} cannot be drawn")
    drawn = pictures.heat(map, signed) if image is None else pictures.overlay(image, map, roi, signed)
    return Tile(pictures.data_uri(drawn, photo=_photo(drawn), longest=LONGEST), (), limit, scores, problem)


# Failures, costs, provenance ----------------------------------------------------------------------------


def _failures(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Equal reasons together: where, why, how many, the first uids."""
    names = ["dataset", "model", "method", "stage", "reason"]
    failed = frame.loc[frame["state"] == "failed", [*names, "uid"]].astype(str).drop_duplicates()
    found = []
    for key, group in failed.groupby(names, sort=False):
        uids = list(group["uid"])
        found.append(
            {**dict(zip(names, key)), "count": len(uids), "uids": uids[:MOST_UIDS], "more": len(uids[MOST_UIDS:])}
        )
    return sorted(found, key=lambda f: -f["count"])


def _costs(cells: Sequence[Labelled]) -> list[dict[str, Any]]:
    found = []
    for item in cells:
        infos = [record.info for record in item.cell.maps.index().values()]
        seconds = np.array([i["seconds"] for i in infos if "seconds" in i], dtype=float)
        rows = np.array([i["rows"] for i in infos if "rows" in i], dtype=float)
        found.append(
            {
                **{axis: getattr(item, axis) for axis in tables.AXES},
                "maps": len(infos),
                "mean": float(seconds.mean()) if seconds.size else None,
                "median": f"{np.median(seconds):.3g}" if seconds.size else "–",
                "total": _duration(seconds.sum()) if seconds.size else "–",
                "rows": f"{rows.mean():.4g}" if rows.size else "–",
                "broken": item.cell.maps.broken,
            }
        )
    most = max((c["mean"] for c in found if c["mean"] is not None), default=0) or 1
    return [{**c, "share": round(100 * (c["mean"] or 0) / most, 2)} for c in found]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def _provenance(cells: Sequence[Labelled]) -> list[tuple[str, list[str]]]:
    """(what, its different values). More than one commit or version is worth seeing."""
    versions: dict[str, list[str]] = {}
    for item in cells:
        for name, version in (item.spec.get("versions") or {}).items():
            versions.setdefault(name, []).append(f"{name} {version}")
    facts = {
        "Commit": [str(c.spec.get("git") or "not a git checkout") for c in cells],
        "Weights": [f"{c.model}: {c.spec.get('weights') or 'unknown'}" for c in cells],
        "Seed": [str((c.spec.get("config") or {}).get("seed", "unknown")) for c in cells],
    }
    shown = [(name, list(dict.fromkeys(values))) for name, values in facts.items()]
    return [*shown, ("Versions", [v for values in versions.values() for v in dict.fromkeys(values)])]


def _runs(cell: Cell) -> list[dict[str, Any]]:
    """Every run that wrote to a cell: its counts and its environment, as far as it left them."""
    found = []
    for folder in sorted((cell.folder / "runs").glob("*")):
        environment = ""
        for path in sorted(folder.glob("environment*")):
            environment += path.read_text(errors="replace")
        known = _json(folder / "summary.json")
        counts = {k: v for k, v in known.items() if isinstance(v, (int, float, str))}
        about = _json(folder / "environment.json")
        found.append(
            {
                "cell": cell.folder.name,
                "run": folder.name,
                "counts": counts,
                "command": _text(about.get("command", known.get("command", ""))),
                "machine": _text(about.get("machine", known.get("machine", ""))),
                "environment": environment,
            }
        )
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # a killed run has no summary
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
