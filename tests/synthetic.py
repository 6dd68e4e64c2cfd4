"""Synthetic work directories, made with the real store: what tests of tables and the report look at."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attrib.store import cell as store
from attrib.store.files import key8

METHODS = ("grad_cam", "iba", "ig")
SCORES = {
    "ehr.11111111": ("ehr", {"ehr": "higher"}, {"ehr_curve": "x: threshold; y: ratio"}),
    "insertion_deletion.22222222": ("insertion_deletion", {"insertion": "higher", "deletion": "lower"}, {}),
}
UIDS = tuple(f"val/{i:03d}" for i in range(20))


def spec(dataset="photos", model="net", method="iba", **fields):
    """What the runner writes as spec.json."""
    seed = fields.pop("seed", 0)
    return {
        "names": {"dataset": dataset, "model": model, "method": method},
        "key": "0" * 64,
        "dataset_key": "cafecafe" * 8,
        "state_key": None,
        "model_key": "beef" * 16,
        "layers": {},
        "seed": seed,
        "config": {"dataset": {"_target_": "d", "root": "/a"}, "model": {"_target_": "m"}, "method": {}},
        "method": {"class": f"attrib.methods.{method}.Method", "version": 1, **fields},
        "maps": {"map": "relevance, signed, input resolution"},
        "weights": "ab" * 32,
        "versions": {"torch": "2.15.0", "numpy": "2.4.6"},
        "git": None,
        "pictures": "cafecafe",
    }


def cell(root, folder, **fields):
    made = store.Cell(Path(root) / folder, "w0")
    key = key8(made.folder)
    made.write_spec(spec(**fields) | ({"key": key * 8} if key else {}))
    return made


def metric_folder(made, folder, columns=None, curves=None, parameters=None):
    name, known_columns, known_curves = SCORES.get(folder, (folder.split(".")[0], columns, curves or {}))
    text = {"name": name, "spec": parameters or {"class": name}, "columns": known_columns, "curves": known_curves}
    store.write_json(made.folder / "scores" / folder / "metric.json", text)


def add_rows(made, folder, rows, writer="w0"):
    """rows: (uid, fingerprint, map, column, value, time), written as one chunk of another writer."""
    table = pa.Table.from_pylist([dict(zip(store.ScoreRows.SCHEMA.names, r)) for r in rows], store.ScoreRows.SCHEMA)
    path = made.folder / "scores" / folder / f"{writer}-{time.monotonic_ns()}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def add_entry(made, uid, fingerprint, stage, reason, at):
    entry = {"uid": uid, "fingerprint": fingerprint, "stage": stage, "reason": reason, "time": at}
    made.ledger.path.parent.mkdir(parents=True, exist_ok=True)
    with open(made.ledger.path, "a") as file:
        file.write("\n" + json.dumps(entry) + "\n")


def values_of(method):
    """(20, 3): ehr, insertion, deletion of every sample."""
    rng = np.random.default_rng(7)
    base = rng.uniform(0.2, 0.6, (20, 3))
    shift = {"grad_cam": 0.0, "iba": 0.15, "ig": -0.02}[method]
    return base + shift * np.array([1, 1, -1]) + np.random.default_rng(METHODS.index(method)).normal(0, 0.04, (20, 3))


def build(root, side=8, uids=UIDS, maps=None, pictures=None):
    """3 methods × 20 samples × 2 metrics; failures, duplicates and two fingerprints in iba."""
    root = Path(root)
    for method in METHODS:
        made = cell(root, f"photos.net.{method}.{method:.4}0000", method=method)
        values, rng = values_of(method), np.random.default_rng(METHODS.index(method))
        for i, uid in enumerate(uids):
            arrays = {"map": maps(method, i) if maps else rng.normal(size=(side, side)).astype(np.float32)}
            if method == "iba":
                arrays["loss"] = np.exp(-np.arange(10) / 3).astype(np.float32) + i / 50
            made.maps.add(uid, "f", arrays, seconds=0.5 + i / 100, rows=10)
        made.maps.flush()
        for folder, (_, columns, curves) in SCORES.items():
            metric_folder(made, folder)
            writer, curve_writer = made.scores(folder), made.curves(folder)
            for i, uid in enumerate(uids):
                column = dict(zip(("ehr", "insertion", "deletion"), values[i]))
                writer.add(uid, "f", {("map", c): column[c] for c in columns})
                curve_writer.add(uid, "f", {f"map/{c}": np.linspace(1, values[i, 0], 11) for c in curves})
            writer.flush()
            if curves:
                curve_writer.flush()
        run = made.folder / "runs" / "20261101-7-0"
        store.write_json(run / "summary.json", {"maps_computed": 20, "failed": 0, "seconds": 9.5})
        store.write_json(
            run / "environment.json", {"command": ["tools/run.py", "method=" + method], "machine": "node7"}
        )
    inputs = store.Arrays(root / "state" / "pictures.cafecafe", "w0")
    for i, uid in enumerate(uids[:6]):
        picture = pictures(i) if pictures else np.full((side, side, 3), 40 * i, np.uint8)
        roi = np.zeros(picture.shape[:2], bool)
        roi[len(roi) // 4 : -len(roi) // 4, len(roi) // 4 : -len(roi) // 4] = True
        inputs.add(uid, "f", {"image": picture, "roi": roi}, name=f"class {i}", target=i)
    inputs.flush()
    return root


def iba(root):
    return store.Cell(root / "photos.net.iba.iba0000")


def only(frame, **equal):
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame
