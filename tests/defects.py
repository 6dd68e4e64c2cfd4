"""Work directories with one defect each, and the tools that must survive them: a table of (name, what does it)."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import synthetic
from half_done import run_folder
from tiny import tool

from attrib.store.cell import Arrays, ScoreRows
from attrib.store.files import write_json

UIDS = synthetic.UIDS[:4]
CELL, METRIC = "photos.net.iba.iba0000", "ehr.11111111"
NOTE, GRAPH = f"scores/{METRIC}/metric.json", "../graphs/net.c.12345678"
TEXT_VALUES = ScoreRows.SCHEMA.set(4, pa.field("value", pa.string()))
DEEP = "[" * 100_000 + "]" * 100_000
ENTRY = {"uid": "val/003", "fingerprint": "f", "stage": "maps", "reason": "odd", "time": 1.0}


def healthy(root: Path) -> Path:
    """Three cells of four samples with scores, one failure and one run each."""
    synthetic.build(root, side=4, uids=UIDS)
    made = synthetic.iba(root)
    _edit(made.folder / "spec.json", lambda spec: spec.update(state_key="01234567" * 8))
    write_json(made.folder / "samples.json", dict.fromkeys(UIDS, "f"))
    synthetic.add_entry(made, "val/003", "f", "maps", "an old failure", 1.0)
    run_folder(made, summary={"finished": True, "left": 0, "stopped": None, "failed": 0, "seconds": 2.0})
    return root


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _spec(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda cell: _edit(cell / "spec.json", change)


def _ledger(line: str) -> Callable[[Path], None]:
    def add(cell: Path) -> None:
        with open(cell / "failures.jsonl", "a") as file:
            file.write(f"\n{line}\n")

    return add


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(cell: Path) -> None:
        (cell / name).parent.mkdir(parents=True, exist_ok=True)
        (cell / name).write_text(text)

    return write


def _progress(**fields: Any) -> Callable[[Path], None]:
    def write(cell: Path) -> None:
        folder = cell / "runs" / "20260102-000000-7-0-bbbb"
        folder.mkdir()
        text = json.dumps({"stage": "maps", "done": 1, "total": 2, "shards": 1, **fields})
        (folder / "progress.json").write_text(text.replace('"HUGE"', "9" * 400).replace('"BEYOND"', "1e999"))

    return write


def _chunk(change: Callable[[list[dict[str, Any]]], object], folder: str = "maps") -> Callable[[Path], None]:
    """One more chunk, of one sample, whose description of itself is changed (its checksum is right)."""

    class Odd(Arrays):
        def _encoded(self, samples):
            from zlib import crc32

            from safetensors.numpy import save

            said = [{"uid": "odd", "fingerprint": "f", "crc": {"map": crc32(np.ones((2, 2), np.float32))}, "info": {}}]
            change(said)
            text = json.dumps(said).replace('"DEEP"', DEEP)
            return save({"0/map": np.ones((2, 2), np.float32)}, {"samples": text, "crc": str(crc32(text.encode()))})

    def write(cell: Path) -> None:
        odd = Odd(cell / folder, "odd")
        odd.add("odd", "f", {"map": np.ones(1)})
        odd.flush()

    return write


def _map(value: np.ndarray, **info: Any) -> Callable[[Path], None]:
    """A stored map of this shape and content, of a sample that the cell is about."""

    def write(cell: Path) -> None:
        for path in (cell / "maps").glob("*.safetensors"):
            path.unlink()
        made = Arrays(cell / "maps", "w1")
        for uid in UIDS:
            made.add(uid, "f", {"map": value if uid == "val/000" else np.ones((4, 4), np.float32)}, **info)
        made.flush()

    return write


def _picture(arrays: dict[str, np.ndarray], **info: Any) -> Callable[[Path], None]:
    """What is kept of the first input is this."""

    def write(cell: Path) -> None:
        made = Arrays(cell.parent / "state" / "pictures.cafecafe", "z9")
        made.add("val/000", "f", arrays, **info)
        made.flush()

    return write


def _rows(schema: pa.Schema = ScoreRows.SCHEMA, **fields: Any) -> Callable[[Path], None]:
    row = {"uid": "val/000", "fingerprint": "f", "map": "map", "column": "ehr", "value": 0.5, "time": 9e9, **fields}
    other = {**row, "uid": "val/001"} if schema is TEXT_VALUES else {**row, "uid": "val/001", "value": 0.5}

    def write(cell: Path) -> None:
        pq.write_table(pa.Table.from_pylist([row, other], schema=schema), cell / "scores" / METRIC / "z.parquet")

    return write


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file or folder."""

    def replace(cell: Path) -> None:
        path = cell / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(cell.parent / f".{path.name}.away.tmp")
        make(path)

    return replace


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    """A file of 40 GB that takes no room on disk."""
    with open(path, "wb") as file:
        file.truncate(40 * 2**30)


def _claims(size: int, *, large: bool = False) -> Callable[[Path], None]:
    def write(cell: Path) -> None:
        path = cell / "maps" / "z.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + b'{"__metadata__": {}}')
        if large:
            os.truncate(path, size + 8)

    return write


def _several(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda cell: [change(cell) for change in changes] and None


Defect = Callable[[Path], object]
# By name; each gets the folder of the cell.
DEFECTS: dict[str, Defect] = {
    "a ledger line that is a number": _ledger("7"),
    "a ledger line that is a list": _ledger('["uid"]'),
    "a ledger line without a field": _ledger(json.dumps({k: v for k, v in ENTRY.items() if k != "time"})),
    "a ledger line with text for a time": _ledger(json.dumps({**ENTRY, "time": "yesterday"})),
    "a ledger line with a number for a reason": _ledger(json.dumps({**ENTRY, "reason": 3})),
    "a ledger line with a time beyond float": _ledger(json.dumps({**ENTRY, "time": 1}).replace("1}", "1e999}")),
    "a ledger line nested deep": _ledger(DEEP),
    "a ledger line with a deep field": _ledger(json.dumps(ENTRY)[:-1] + f', "more": {DEEP}}}'),
    "names that are a list": _spec(lambda s: s.update(names=["photos", "net", "iba"])),
    "a name that is a number": _spec(lambda s: s["names"].update(dataset=3)),
    "maps that are a list": _spec(lambda s: s.update(maps=["map"])),
    "layers that are text": _spec(lambda s: s.update(layers="layer4")),
    "a method that is text": _spec(lambda s: s.update(method="iba")),
    "a configuration that is a number": _spec(lambda s: s.update(config=3)),
    "a configuration of odd parts": _spec(lambda s: s.update(config={"dataset": [1], "model": "net", "method": 2})),
    "versions that are null": _spec(lambda s: s.update(versions=None)),
    "keys that are numbers": _spec(lambda s: s.update(dataset_key=1, model_key=2, state_key=3, pictures=4)),
    "randomised without its fields": _spec(lambda s: s.update(randomised={"original": 3})),
    "documents that are text": _spec(lambda s: s.update(documents="tree")),
    "a spec nested deep": _text("spec.json", DEEP),
    "a spec with a deep field": _spec(lambda s: s["config"].update(more=json.loads("[" * 500 + "]" * 500))),
    "a spec that is null": _text("spec.json", "null"),
    "a spec that is no UTF-8": lambda cell: (cell / "spec.json").write_bytes(b'{"names": "\xff\xfe"}'),
    "a spec with a number of 5000 digits": _text("spec.json", '{"seed": ' + "9" * 5000 + "}"),
    "samples that are a number": _text("samples.json", "3"),
    "samples with odd fingerprints": _text("samples.json", '{"val/000": 3, "val/001": ["f"]}'),
    "samples nested deep": _text("samples.json", DEEP),
    "info that is no mapping": _chunk(lambda s: s[0].update(info=[1])),
    "info with text for seconds": _chunk(lambda s: s[0].update(info={"seconds": "long", "rows": []})),
    "info nested deep": _chunk(lambda s: s[0].update(info={"target": "DEEP"})),
    "a uid that is a number": _chunk(lambda s: s[0].update(uid=3)),
    "a uid that is null": _chunk(lambda s: s[0].update(uid=None)),
    "checksums that are a list": _chunk(lambda s: s[0].update(crc=["map"])),
    "a sample that is a number": _chunk(lambda s: s.__setitem__(0, 7)),
    "a sample without an array": _chunk(lambda s: s[0]["crc"].update(more=1)),
    "an odd chunk of curves": _chunk(lambda s: s[0].update(info=3), f"scores/{METRIC}"),
    "a header that claims 40 GB": _claims(40 * 2**30),
    "a header that claims 40 GB, and has them": _claims(40 * 2**30, large=True),
    "a header that claims 2**64": _claims(2**64 - 1),
    "a map without pixels": _map(np.zeros((0, 0), np.float32)),
    "a map without columns": _map(np.zeros((4, 0), np.float32)),
    "a map that is a number": _map(np.float32(3)),
    "a map of booleans": _map(np.zeros((4, 4), bool)),
    "a map of bytes": _map(np.zeros((4, 4), np.uint8)),
    "a map of NaN": _map(np.full((4, 4), np.nan, np.float32)),
    "a map of infinite values": _map(np.full((4, 4), np.inf, np.float32)),
    "a map of large values": _map(np.full((4, 4), 1e308)),
    "a map with three axes": _map(np.zeros((2, 3, 4), np.float32)),
    "a map with one axis": _map(np.zeros(4, np.float32)),
    "a picture of another type": _picture({"image": np.ones((4, 4, 3))}, name="odd", target=1),
    "a picture of another shape": _picture({"image": np.ones((4, 4), np.uint8)}, name="odd", target=1),
    "a picture without pixels": _picture({"image": np.ones((0, 4, 3), np.uint8)}, name="odd", target=1),
    "a picture and a region that do not fit": _picture(
        {"image": np.ones((4, 4, 3), np.uint8), "roi": np.ones(3, bool)}, name="odd", target=1
    ),
    "a picture whose name is a number": _picture({"image": np.ones((4, 4, 3), np.uint8)}, name=3, target="x"),
    "tokens that are a number": _picture({"words": np.arange(4)}, tokens=7),
    "a rate that is text": _picture({"wave": np.ones(4, np.float32)}, rate="fast"),
    "a row whose value is null": _rows(value=None),
    "a row whose uid is null": _rows(uid=None),
    "a row whose time is null": _rows(time=None),
    "a row whose column is null": _rows(column=None),
    "a row whose value is infinite": _rows(value=float("inf")),
    "a row whose time is infinite": _rows(time=float("inf")),
    "a row with text for a value": _rows(TEXT_VALUES, value="x"),
    "a metric that is a list": _text(NOTE, "[1]"),
    "a metric whose name is a number": _text(NOTE, '{"name": 3}'),
    "a metric with odd columns": _text(NOTE, '{"name": "ehr", "columns": ["ehr"]}'),
    "a metric with an odd direction": _text(NOTE, '{"name": "ehr", "columns": {"ehr": "up"}}'),
    "a metric with odd curves": _text(NOTE, '{"name": "ehr", "columns": {}, "curves": 3}'),
    "a metric whose spec is text": _text(NOTE, '{"name": "ehr", "spec": "ehr"}'),
    "a metric nested deep": _text(NOTE, DEEP),
    "progress beyond float": _progress(rate="BEYOND"),
    "progress with an integer beyond float": _progress(rate="HUGE"),
    "progress with counts beyond float": _progress(done="HUGE", total="HUGE", rate=1.0),
    "progress with odd fields": _progress(stage=3, metrics=[[1]], host={}),
    "progress nested deep": _text("runs/20260102-000000-7-0-bbbb/progress.json", DEEP),
    "a summary with odd fields": _text("runs/20260102-000000-7-0-bbbb/summary.json", '{"left": "x", "seconds": []}'),
    "an environment with odd fields": _text(
        "runs/20260102-000000-7-0-bbbb/environment.json", '{"command": [1, null], "machine": {}}'
    ),
    "a configuration of a run that is odd": _text("runs/20260102-000000-7-0-bbbb/config.json", '{"run": [3]}'),
    "maps that is a file": _instead("maps", lambda path: path.write_text("odd")),
    "scores that is a file": _instead("scores", lambda path: path.write_text("odd")),
    "a score folder that is a file": _instead("scores/odd.12345678", lambda path: path.write_text("odd")),
    "failures that is a file": _instead("failures", lambda path: path.write_text("odd")),
    "runs that is a file": _instead("runs", lambda path: path.write_text("odd")),
    "state that is a file": lambda cell: _instead("state", lambda path: path.write_text("odd"))(cell.parent),
    "a cache that is a folder": _instead("maps/index.cache", Path.mkdir),
    "a cache of something else": _text("maps/index.cache", "attrib 1 and something else"),
    "a graph that is odd": _text(f"{GRAPH}/class_1.json", '{"graph": {"class": 1}}'),
    "a graph nested deep": _text(f"{GRAPH}/class_1.json", DEEP),
    "a graph whose layers are odd": _text(
        f"{GRAPH}/class_1.json", '{"graph": {"class": 1, "name": "x", "samples": 3, "layers": [{"path": []}]}}'
    ),
    "a table of a graph that is odd": _text(f"{GRAPH}/effect.csv", "a,b\n1\n"),
}  # fmt: skip
PLACES = (
    "spec.json",
    "samples.json",
    "failures.jsonl",
    "failures/w.jsonl",
    "maps/z.safetensors",
    "maps/index.cache",
    NOTE,
    f"scores/{METRIC}/z.parquet",
    f"scores/{METRIC}/z.safetensors",
    f"scores/{METRIC}/rows.cache",
    "runs/20260102-000000-7-0-bbbb/progress.json",
    "runs/20260102-000000-7-0-bbbb/summary.json",
    "runs/20260102-000000-7-0-bbbb/20260102-000000-7-0-bbbb.log",
    "../state/pictures.cafecafe/z.safetensors",
    "../state/01234567.json",
    "../state/01234567.safetensors",
    f"{GRAPH}/class_1.json",
    f"{GRAPH}/effect.csv",
    f"{GRAPH}/stability.png",
)
KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": _loop,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a file of 40 GB": _sparse,
    "an empty file": Path.touch,
}
WRITTEN = len(DEFECTS)  # so many are of what is written; those that follow, of what lies in its place
DEFECTS |= {f"{kind} as {place}": _instead(place, make) for place in PLACES for kind, make in KINDS.items()}


class Outcome(NamedTuple):
    """How one tool ended, and what it said."""

    status: int | None  # None: with a traceback
    text: str


TOOLS = ("table", "report", "status", "cache verify", "cache export")


def commands(root: Path) -> dict[str, tuple[str, list[str]]]:
    """The module of each tool and its arguments."""
    out = root.parent / "exported"
    return {
        "table": ("table", [str(root), "--format", "csv"]),
        "report": ("report", [str(root), "--out", str(root.parent / "page.html")]),
        "status": ("status", [str(root)]),
        "cache verify": ("cache", ["verify", str(root)]),
        "cache export": ("cache", ["export", str(root), str(out), "--force"]),
    }


def outcomes(root: Path, tools: Sequence[str] = TOOLS, limit: float = 60.0) -> dict[str, Outcome]:
    """Each tool in a child of this process, which is killed after ``limit`` seconds: a read of C hears no signal."""
    said = root.parent / "said"
    said.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        for name in tools:
            module, arguments = commands(root)[name]
            with open(said / name, "w", errors="strict") as out, redirect_stdout(out), redirect_stderr(out):
                try:
                    status: int | None = tool(module).main(arguments)
                except SystemExit as end:
                    status = int(end.code or 0)
                except BaseException:
                    traceback.print_exc(file=out)
                    status = None
            (said / f"{name}.status").write_text(str(status))
        os._exit(0)
    end = time.monotonic() + limit
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.01)
    found = {}
    for name in tools:
        ended = said / f"{name}.status"
        text = (said / name).read_text() if (said / name).exists() else ""
        status = int(s) if ended.exists() and (s := ended.read_text()) != "None" else None
        found[name] = Outcome(status, text if ended.exists() else f"{text}\nit hung, or was killed")
    return found
