"""A work directory half done, made by hand: a cell of ten samples and the folders that runs leave."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from attrib.store.cell import Cell
from attrib.store.files import write_json

NAME = "photos.net.iba.01234567"
METRIC = "ehr.aaaaaaaa"
SPEC = {"key": "01234567" + "0" * 56, "state_key": "fedcba98" + "0" * 56, "pictures": "11112222", "maps": {"map": ""}}
UIDS = tuple(f"p{i}" for i in range(10))


def cell(root: Path, maps: int = 4, scores: int = 2, samples: tuple[str, ...] | None = UIDS, name: str = NAME) -> Cell:
    """A cell of ten samples, half done."""
    made = Cell(root / name, "20260101-000000-1-0-aaaa")
    made.write_spec(SPEC)
    if samples is not None:
        made.write_samples(samples, dict.fromkeys(samples, "f"))
    rows = made.scores(METRIC)
    for i, uid in enumerate(UIDS[:maps]):
        made.maps.add(uid, "f", {"map": np.ones((2, 2), np.float32)}, seconds=2.0)
        if i < scores:
            rows.add(uid, "f", {("map", "ehr"): 0.5})
    made.maps.flush()
    rows.flush()
    return made


def run_folder(
    made: Cell, name: str = "20260101-000000-4242-0-aaaa", *, age: float = 0.0, summary=None, **progress
) -> Path:
    """A run as ``attrib.running.run`` leaves it; ``age`` seconds ago its last file was written."""
    folder = made.folder / "runs" / name
    write_json(folder / "config.json", {"run": {"shard": 0, "shards": 1}})
    (folder / f"{name}.log").write_text("first\nsecond\n\x1b[2Jthird\n")
    known = {"stage": "maps", "done": 2, "total": 6, "rate": 0.5, "host": "far", "pid": 4242, "shard": 0, "shards": 1}
    write_json(folder / "progress.json", {**known, **progress})
    if summary is not None:
        write_json(folder / "summary.json", summary)
    for path in folder.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))
    return folder
