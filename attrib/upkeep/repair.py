"""Verification reads the files of a work directory and compares them with their checksums; repair moves damaged ones.

A damaged chunk is no loss: its samples count as missing, and the next run computes exactly those.
"""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from safetensors import safe_open

from attrib.errors import UserError
from attrib.store.cell import READING, Arrays, Cell, ScoreRows, cells, counts, described, read_rows
from attrib.store.damaged import DAMAGED, recover
from attrib.store.damaged import put_aside as move_aside
from attrib.store.files import Key, write_atomic, writer_name
from attrib.store.ledger import Ledger, read_ledger
from attrib.store.reading import DOCUMENT, LISTING, content, document, parsed, regular
from attrib.store.rows import packed
from attrib.store.schemas import (
    GRAPH_TABLES,
    CausalGraph,
    Confidences,
    Environment,
    MetricNote,
    Progress,
    RunConfig,
    RunSummary,
    SampleList,
    SampleNote,
    Spec,
)
from attrib.store.workers import PROGRESS, SUMMARY
from attrib.upkeep.cache import FITTED, SHARED, check_inside, references
from attrib.upkeep.status import no_cells


@dataclass(frozen=True)
class Damage:
    """A file that cannot be used, and the samples it held; None if it no longer says which."""

    path: Path
    problem: str
    samples: tuple[Key, ...] | None = None


LONGEST_HEADER = 100_000_000  # of a chunk, in bytes: what the safetensors library itself allows
FOLDERS = ("maps", "scores", "failures", "runs")

exists = os.path.lexists  # also of a link to nothing
FileCheck = Callable[[Path], Damage | None]


# ---- checking ---------------------------------------------------------------------------------------


def checks(root: Path | str) -> list[tuple[Path, FileCheck]]:
    """Every file that is checked, and how. Raises UserError if ``root`` holds nothing to check."""
    root = Path(root)
    found: list[tuple[Path, FileCheck]] = []
    for cell in cells(root):
        folder = cell.folder
        found += [(folder / "spec.json", _spec), *[(p, _samples) for p in [folder / "samples.json"] if exists(p)]]
        found += [(path, _folder) for name in FOLDERS if exists(path := folder / name)]
        found += [(path, _folder) for path in sorted((folder / "scores").glob("[!.]*"))]
        found += [(path, chunk) for path in _chunks(folder / "maps")]
        for name in cell.metrics():
            scores = folder / "scores" / name
            found += [(path, _metric) for path in [scores / "metric.json"] if exists(path)]
            found += [(path, chunk) for path in _chunks(scores)]
            found += [(path, rows) for path in sorted(scores.glob("[!.]*.parquet"))]
        found += [(path, _ledger) for path in Ledger(folder).files]
        runs = sorted(folder.glob("runs/[!.]*/"))
        found += [(run / name, check) for run in runs for name, check in _RUN if exists(run / name)]
    found += [(path, _graph) for path in sorted(root.glob("graphs/*/class_*.json"))]
    tables = [folder / name for folder in sorted(root.glob("graphs/*/")) for name in GRAPH_TABLES]
    tables = [path for path in tables if exists(path)]  # a pattern would not find a link to itself
    found += [(path, _graph_table) for path in tables]
    found += [(path, _picture) for path in sorted(root.glob("graphs/*/[!.]*.png"))]
    state, used = root / "state", _used(root)
    found += [(state, _folder)] if exists(state) else []
    for path in sorted(state.glob("[!.]*")):
        fitted = FITTED.fullmatch(path.name)
        if fitted and (not path.is_dir() or fitted["key"] in used):  # a folder in the place of one that a cell needs
            found.append((path, _state if path.suffix == ".safetensors" else _object))
        elif path.is_dir():
            found += [(one, chunk) for one in (_chunks(path) if SHARED.fullmatch(path.name) else ())]
        elif SHARED.fullmatch(path.name):
            found.append((path, _confidence))
    if not found:
        raise UserError(no_cells(root))
    return found


def _used(root: Path) -> Set[str]:
    """The states that cells refer to; none where a cell does not say any more, which is damage itself."""
    try:
        return references(root).keys()
    except (UserError, OSError):
        return frozenset()


def chunk(path: Path) -> Damage | None:
    """A chunk of arrays: every array of every sample against its checksum."""
    try:
        regular(path)
        with safe_open(path, framework="numpy") as file:
            samples = described(file, path)
            bad, problem = [], ""
            for i, sample in enumerate(samples):
                for name, crc in sample["crc"].items():
                    if zlib.crc32(np.ascontiguousarray(file.get_tensor(f"{i}/{name}")).data) != crc:
                        bad.append(str(sample["uid"]))
                        problem = problem or f"wrong checksum of {name} of {sample['uid']}"
            keys = tuple((str(s["uid"]), str(s["fingerprint"])) for s in samples)
    except READING as error:
        return Damage(path, str(error).removeprefix(f"{path}: "), _header(path))
    more = f" and {len(set(bad)) - 1} more" if len(set(bad)) > 1 else ""
    return Damage(path, problem + more, keys) if bad else None


def _header(path: Path) -> tuple[Key, ...] | None:
    """The samples of a chunk of which only the beginning can be read."""
    try:
        size = regular(path).st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, LONGEST_HEADER):
                return None
            metadata = parsed(file.read(length), dict[str, Any])["__metadata__"]
        return tuple((s["uid"], s["fingerprint"]) for s in parsed(metadata["samples"], list[SampleNote]))
    except READING:
        return None


def rows(path: Path) -> Damage | None:
    """A file of score rows: every page against its checksum."""
    try:
        table = read_rows(path)
        odd = sum(column.null_count for column in table.columns)
        odd += int(np.isinf(table["time"].to_numpy()).sum())
        if not odd:
            return None
        problem = f"{odd} fields of rows are null, or no time"
    except READING as error:
        problem = str(error).removeprefix(f"{path}: ")
    try:
        table = read_rows(path, ["uid", "fingerprint"])
        keys = dict.fromkeys(zip(table["uid"].to_pylist(), table["fingerprint"].to_pylist()))
    except READING:
        return Damage(path, problem)
    return Damage(path, problem, tuple((str(uid), str(fingerprint)) for uid, fingerprint in keys))


def _document(path: Path, kind: Any, most: int = DOCUMENT) -> Damage | None:
    try:
        document(path, kind, most)
    except FileNotFoundError:
        return None if not os.path.lexists(path) else Damage(path, "a link to nothing")
    except OSError as error:
        return Damage(path, str(error).removeprefix(f"{path}: "))
    return None


def _object(path: Path) -> Damage | None:
    return _document(path, dict[str, Any])


def _spec(path: Path) -> Damage | None:
    try:
        if (damage := _document(path, Spec)) is None:
            Cell(path.parent).spec  # noqa: B018 - whether it is this cell's
        return damage
    except OSError as error:
        return Damage(path, str(error).removeprefix(f"{path}: "))


def _metric(path: Path) -> Damage | None:
    return _document(path, MetricNote)


def _graph(path: Path) -> Damage | None:
    return _document(path, CausalGraph)


def _graph_table(path: Path) -> Damage | None:
    texts, numbers = GRAPH_TABLES[path.name]
    try:
        frame = pd.read_csv(io.BytesIO(content(path)))
        frame[list(texts)], frame[list(numbers)].astype(float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Damage(path, f"{type(error).__name__}: {error}")
    return None


def _picture(path: Path) -> Damage | None:
    try:
        with Image.open(io.BytesIO(content(path))) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL, for damaged files
        return Damage(path, f"{type(error).__name__}: {error}")
    return None


_RUN: tuple[tuple[str, FileCheck], ...] = (
    (PROGRESS, lambda path: _document(path, Progress)),
    (SUMMARY, lambda path: _document(path, RunSummary)),
    ("config.json", lambda path: _document(path, RunConfig)),
    ("environment.json", lambda path: _document(path, Environment)),
)


def _confidence(path: Path) -> Damage | None:
    """A JSON object, which is empty where no sample could be read."""
    return _document(path, Confidences, LISTING)


def _samples(path: Path) -> Damage | None:
    return _document(path, SampleList, LISTING)


def _folder(path: Path) -> Damage | None:
    return None if path.is_dir() else Damage(path, "not a folder")


def _ledger(path: Path) -> Damage | None:
    """Lines cut off by a kill are no damage."""
    _, problem = read_ledger(path)
    return Damage(path, problem) if problem else None


def _state(path: Path) -> Damage | None:
    """A fitted state has no checksums: only whether it is whole."""
    try:
        regular(path)
        with safe_open(path, framework="pt") as file:
            list(file.keys())
    except READING as error:
        return Damage(path, str(error))
    return None


def _chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


# ---- repairing --------------------------------------------------------------------------------------


def put_aside(root: Path | str, damages: Sequence[Damage], *, delete: bool = False) -> int:
    """Move damaged files to ``<root>/.damaged/<time>/``, or delete them; returns how many samples of chunks were saved.

    What is good in a damaged chunk is written anew first. With curves that are lost go the scores of their samples, so
    that the next run computes both. A damaged file that is a link goes as a link. Raises UserError for a file that is
    reached by one.
    """
    root, saved = Path(root), 0
    place = root / DAMAGED
    for path in (place, *(damage.path.parent for damage in damages)):
        if path != root:
            check_inside(root, path)
    before = set(place.iterdir()) if place.is_dir() else set()
    # Rows go before the damaged curves that belong to them are moved: a repair that is killed in between is repeated.
    for folder in dict.fromkeys(d.path.parent for d in damages if d.path.parent.parent.name == "scores"):
        _forget(folder, [d for d in damages if d.path.parent == folder and d.path.suffix == ".safetensors"])
    for damage in damages:
        if damage.path.suffix == ".safetensors" and damage.path.parent != root / "state":
            arrays = Arrays(damage.path.parent, writer_name())
            held = sum(record.path == damage.path for record in arrays.index().values())
            saved += held - len(recover(arrays, damage.path, root))
        else:
            move_aside(damage.path, root)
    for path in set(place.iterdir()) - before if delete else ():
        shutil.rmtree(path)  # follows no links
    return saved


def _forget(folder: Path, damages: Sequence[Damage]) -> None:
    """Drop the rows of samples whose curves are lost with these chunks.

    If a chunk does not say any more which those are: of all samples without whole curves.
    """
    curves, damaged = Arrays(folder), {damage.path for damage in damages}
    whole: set[Key] = set()
    for key, record in curves.index().items():
        if record.path in damaged:
            try:
                curves.read(key)
            except OSError:
                continue
        whole.add(key)
    lost = {key for damage in damages for key in damage.samples or () if key not in whole}
    if any(damage.samples is None for damage in damages):
        lost |= {key for key in ScoreRows(folder).present() if key not in whole}
    for path in sorted(folder.glob("[!.]*.parquet")):
        if path.is_symlink() or rows(path) is not None:
            continue
        table = read_rows(path)
        keep = [key not in lost for key in zip(table["uid"].to_pylist(), table["fingerprint"].to_pylist())]
        if all(keep):
            continue
        if any(keep):
            write_atomic(folder / f"{writer_name()}-00001.parquet", packed(table.filter(pa.array(keep)), folder))
        path.unlink()


def reindex(root: Path | str) -> int:
    """Rebuild the indices that say which sample lies in which chunk; returns the number of samples in all of them."""
    root = Path(root)
    folders = [cell.folder / "maps" for cell in cells(root)]
    folders += [cell.folder / "scores" / name for cell in cells(root) for name in cell.metrics()]
    folders += sorted(path for path in root.glob("state/pictures.*") if path.is_dir())
    for memory in (path for folder in folders for path in folder.glob("*.cache")):
        if memory.is_dir() and not memory.is_symlink():
            move_aside(memory, root)
    for folder in folders:
        ScoreRows(folder).files.memory.unlink(missing_ok=True)
    return sum(Arrays(folder).reindex() for folder in folders if _chunks(folder))


def drop(root: Path | str, cell: Cell, paths: Iterable[Path]) -> int:
    """Write these chunks of maps anew without samples that no longer belong to the cell; returns how many were dropped.

    The new chunk is whole before the old one goes. Raises UserError if a chunk is damaged, or reached by a link.
    """
    said, dropped = cell.samples(), 0
    for path in paths:
        check_inside(root, path)
        if damage := chunk(path):
            raise UserError(f"{path} is damaged ({damage.problem}); run `attrib cache repair` first")
        fresh = Arrays(path.parent, writer_name())
        with safe_open(path, framework="numpy") as file:
            for i, sample in enumerate(described(file, path)):
                uid, fingerprint = sample["uid"], sample["fingerprint"]
                if counts(said, uid, fingerprint):
                    arrays = {name: file.get_tensor(f"{i}/{name}") for name in sample["crc"]}
                    fresh.add(uid, fingerprint, arrays, **sample["info"])
                else:
                    dropped += 1
        fresh.flush()
        path.unlink()
    return dropped
