"""The end of the page: failures, costs, and where the numbers come from."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from attrib.results import formats, tables
from attrib.results.labels import AXES, Labelled
from attrib.store.cell import Cell
from attrib.store.reading import document
from attrib.store.schemas import Environment

MOST_UIDS = 50  # uids listed per kind of failure


def failures(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Failures grouped by stage and reason: how many there are, and the first uids."""
    names = [*AXES, "stage", "reason"]
    found = []
    for key, group in tables.failed(frame).groupby(names, sort=False):
        uids = list(group["uid"])
        found.append(
            {**dict(zip(names, key)), "count": len(uids), "uids": uids[:MOST_UIDS], "more": len(uids[MOST_UIDS:])}
        )
    return sorted(found, key=lambda f: -f["count"])


def refusals(frame: pd.DataFrame, root: Path) -> list[dict[str, Any]]:
    """Cells whose pending samples nothing will compute: why their last run was refused."""
    found = []
    for cell, why in tables.refused(frame, root).items():
        part = frame[(frame["cell"] == cell) & (frame["state"] == "pending")]
        about = {axis: str(part[axis].iloc[0]) for axis in AXES}
        found.append({**about, "cell": cell, "reason": why, "count": part["uid"].nunique()})
    return found


def costs(cells: Sequence[Labelled]) -> list[dict[str, Any]]:
    found = []
    for item in cells:
        infos = [record.info for record in item.maps().values()]
        seconds, rows, memories = (
            np.array([i[name] for i in infos if i.get(name) is not None], dtype=float)
            for name in ("seconds", "rows", "memory")
        )
        memory = memories.max(initial=-math.inf) if memories.size else math.nan
        found.append(
            {
                **{axis: getattr(item, axis) for axis in AXES},
                "maps": len(infos),
                "mean": float(seconds.mean()) if seconds.size else None,
                "median": f"{np.median(seconds):.3g}" if seconds.size else "–",
                "total": _duration(seconds.sum()) if seconds.size else "–",
                "rows": formats.rows_text(rows.mean() if rows.size else math.nan),
                "memory": formats.memory_text(memory),
                "device": " + ".join(dict.fromkeys(i["device"] for i in infos if "device" in i)) or "–",
                "broken": item.cell.maps.broken,
            }
        )
    most = max((c["mean"] for c in found if c["mean"] is not None), default=0) or 1
    return [{**c, "share": round(100 * (c["mean"] or 0) / most, 2)} for c in found]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def provenance(cells: Sequence[Labelled]) -> list[tuple[str, list[str]]]:
    """(name, its different values): more than one commit or version is worth a warning, so all are shown."""
    versions: dict[str, list[str]] = {}
    for item in cells:
        for name, version in item.spec["versions"].items():
            versions.setdefault(name, []).append(f"{name} {version}")
    facts = {
        "Commit": [str(c.spec["git"] or "not a git checkout") for c in cells],
        "Weights": [f"{c.model}: {c.spec['weights']}" for c in cells],
        "Seed": [str(c.spec["seed"]) for c in cells],
    }
    shown = [(name, list(dict.fromkeys(values))) for name, values in facts.items()]
    return [*shown, ("Versions", [v for values in versions.values() for v in dict.fromkeys(values)])]


def runs(cell: Cell, broken: list[str]) -> list[dict[str, Any]]:
    """Every run of a cell: its counts and its environment, as far as it wrote them."""
    found = []
    for folder in sorted((cell.folder / "runs").glob("*")):
        about = _document(folder / "environment.json", broken)
        try:
            known = msgspec.convert(about, Environment)
        except msgspec.ValidationError as error:
            known = Environment()
            broken.append(f"{folder / 'environment.json'}: {error}")
        shown = {name: value for name, value in about.items() if name != "packages"}  # some hundred lines of each run
        found.append(
            {
                "cell": cell.folder.name,
                "run": folder.name,
                "counts": _document(folder / "summary.json", broken),
                "command": shlex.join(known.command),
                "machine": known.machine,
                "environment": json.dumps(shown, indent=2, ensure_ascii=False) if about else "",
            }
        )
    return found


def _document(path: Path, broken: list[str]) -> dict[str, Any]:
    try:
        return document(path, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        return {}  # a killed run has no summary
    except OSError as error:
        broken.append(str(error))
        return {}
