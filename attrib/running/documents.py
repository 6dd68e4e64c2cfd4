"""What a method says of a sample beside its maps: documents as JSON, and numbers of its own in the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attrib import keys
from attrib.running.plan import Plan
from attrib.store.files import write_json
from attrib.types import SampleError


def packed(documents: Sequence[Any]) -> np.ndarray:
    """B values that JSON can hold -> (B,) objects, each a (bytes,) uint8 array as the store keeps it.

    Raises ValueError for a document with NaN or infinite numbers, TypeError for what is not JSON.
    """
    found = np.empty(len(documents), dtype=object)
    for i, document in enumerate(documents):
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
        found[i] = np.frombuffer(text.encode(), dtype=np.uint8)
    return found


def own_scores(work: Plan, read: Callable[[str, Iterable[str]], Mapping[str, np.ndarray]]) -> None:
    """Write the columns that the method itself has (``Method.COLUMNS``) as scores of all samples whose maps are stored.

    From what lies beside the maps, so that a killed run leaves nothing out. ``read`` gives arrays of a sample by name.
    """
    cell, method = work.cell, work.experiment.method
    for column, direction in method.COLUMNS.items():
        folder = f"{column}.{keys.digest(column)[:8]}"
        rows, index = cell.scores(folder), cell.maps.index()
        present = rows.present()
        missing = [u for u in work.uids if work.key(u) in index and work.key(u) not in present]
        if missing and not (rows.folder / "metric.json").exists():
            about = {"columns": {column: direction}, "curves": {}}
            write_json(rows.folder / "metric.json", {"name": column, "spec": {"class": column}, **about})
        for uid in missing:
            try:
                value = float(read(uid, [column])[column])
            except (KeyError, SampleError) as error:
                cell.ledger.add(uid, work.fingerprints[uid], folder, str(error))
                continue
            rows.add(uid, work.fingerprints[uid], {(name, column): value for name in method.MAPS})
        cell.maps.flush()  # those that had been damaged
        rows.flush()
