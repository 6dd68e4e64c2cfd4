"""The contents of a work directory: listing them, and deleting what no cell refers to any more.

Only what attrib itself writes is ever deleted, by name and place; everything else is listed as kept, with the reason.
Symbolic links are never followed and never removed, so nothing outside the work directory can be reached.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from attrib.errors import UserError
from attrib.store.cell import Arrays, Cell, cells, counts
from attrib.store.damaged import DAMAGED
from attrib.store.reading import fits
from attrib.store.schemas import Needs
from attrib.store.temporary import TEMPORARY, is_dead
from attrib.store.workers import RUNNING, SILENT, clock, counted, read_object, workers
from attrib.upkeep.status import no_cells

DAY = 86400.0
NOT_OURS = "is a link, lies on another file system, or was not written by attrib"
_CELL = re.compile(r"[^./]+\.[^./]+\.[^./]+\.[0-9a-f]{8}")
FITTED = re.compile(r"(?P<key>[0-9a-f]{8})\.(?:(?P<partial>partial\.)?safetensors|json)")
SHARED = re.compile(r"(?P<kind>pictures|confidence)\.(?P<key>[0-9a-f]{8})(?:\.json)?")
_CHUNKS = (".safetensors", ".parquet", ".cache", ".json", ".tmp")
# What a cell's folder may hold, and the suffixes of what lies there; None: anything, users' hooks write there too.
_PARTS: Mapping[str, tuple[str, ...] | None] = {
    "maps": _CHUNKS,
    "scores": _CHUNKS,
    "failures": (".jsonl",),
    "masks": None,
    "runs": None,
}
_FILES = {"spec.json", "samples.json", "failures.jsonl"}


@dataclass(frozen=True)
class Measure:
    """``size`` bytes in ``files`` files, the newest ``age`` seconds old.

    ``strange``: links, other file systems, files that attrib does not write.
    """

    size: int = 0
    files: int = 0
    age: float = 0.0
    strange: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StoredItem:
    """A part of a work directory, such as a cell or a fitted state. ``uses`` names the cells that need it; ``kind``:

    cell, state (fitted), partial (unfinished), pictures (for the report), confidence, fingerprints, temporary,
    folder (of a cell, without spec.json), other (not of attrib, or not prune's business)
    """

    kind: str
    paths: tuple[Path, ...]
    measure: Measure
    about: str = ""
    uses: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.paths[0]


# ---- looking ----------------------------------------------------------------------------------------


def walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A file, or everything below a folder and the folder itself, with ``lstat``. Links are named, not followed."""
    try:
        about = path.lstat()
    except OSError:  # gone meanwhile
        return
    yield path, about
    if stat.S_ISDIR(about.st_mode):
        try:
            names = sorted(entry.name for entry in os.scandir(path))
        except OSError:
            return
        for name in names:
            yield from walk(path / name)


def measured(paths: Iterable[Path], now: float, suffixes: tuple[str, ...] | None = None) -> Measure:
    """Size and age of all files below ``paths``. ``suffixes``: of what attrib writes there; others are strange."""
    size, files, newest, strange = 0, 0, 0.0, []
    device = None
    for path in paths:
        for one, about in walk(path):
            device = about.st_dev if device is None else device
            regular, folder = stat.S_ISREG(about.st_mode), stat.S_ISDIR(about.st_mode)
            known = folder or suffixes is None or one.suffix in suffixes
            if not (regular or folder) or about.st_dev != device or not known:
                strange.append(one)
            elif regular:
                size, files, newest = size + about.st_size, files + 1, max(newest, about.st_mtime)
    return Measure(size, files, max(0.0, now - newest) if newest else 0.0, tuple(strange))


def temporaries(root: Path, now: float, *, dead: bool) -> list[StoredItem]:
    """Files under a temporary name. ``dead``: only those that nobody writes any more."""
    found = []
    for path, about in walk(root):
        if stat.S_ISREG(about.st_mode) and TEMPORARY.fullmatch(path.name):
            age = max(0.0, now - about.st_mtime)
            if dead and not is_dead(path.name, age):
                continue
            found.append(StoredItem("temporary", (path,), Measure(about.st_size, 1, age), "unfinished file"))
    return found


def inventory(root: Path | str, uses: Mapping[str, tuple[str, ...]]) -> list[StoredItem]:
    """Everything in a work directory, cells first; ``uses``: its :func:`references`. Raises UserError if it is none."""
    root = Path(root)
    now = clock(root) if root.is_dir() else 0.0
    found = [_cell(cell, now) for cell in cells(root)]
    state = root / "state"
    if not found and not state.is_dir():
        raise UserError(no_cells(root))
    found += _states(root, uses, now)
    for path in sorted(root.iterdir()):
        if path == state or (path / "spec.json").exists() or TEMPORARY.fullmatch(path.name):
            continue
        size = measured([path], now)
        if path.is_dir() and not path.is_symlink() and _CELL.fullmatch(path.name):
            strangers = foreign(path)
            about = "has no spec.json"
            if strangers:
                about = f"holds {strangers[0].relative_to(root)}, which attrib did not write"
            found.append(StoredItem("folder" if not strangers else "other", (path,), size, about))
        elif path.name == DAMAGED:
            found.append(
                StoredItem(
                    "other", (path,), size, "damaged files, moved here by repair; rm -r it once nobody needs them"
                )
            )
        else:
            found.append(StoredItem("other", (path,), size, "a link" if path.is_symlink() else ""))
    return found + temporaries(root, now, dead=False)


def _cell(cell: Cell, now: float) -> StoredItem:
    try:
        index = cell.maps.index()
        chunks = len({record.path for record in index.values()})
        words = [f"{counted(len(index), 'map')} in {counted(chunks, 'chunk')}"]
    except OSError as error:
        words = [f"maps cannot be read: {error}"]
    if cell.maps.broken:
        words.append(f"{len(cell.maps.broken)} damaged")
    try:
        words.insert(0, counted(len(cell.samples()), "sample"))
        words.append(counted(len(cell.metrics()), "metric"))
    except (UserError, OSError):
        words.append("samples.json is damaged")
    if cell.folder.is_symlink():
        words.append("a link")
    return StoredItem("cell", (cell.folder,), measured([cell.folder], now), ", ".join(words))


def references(root: Path) -> dict[str, tuple[str, ...]]:
    """``<key8>``, ``pictures.<key8>`` or ``confidence`` -> the cells (and graphs) that refer to it.

    Raises UserError for a cell whose spec cannot be read, because what it needs is then unknown.
    """
    found: dict[str, list[str]] = {}
    for cell in cells(root):
        spec = read_object(cell.folder / "spec.json")
        try:
            fits(spec, Needs)
        except ValueError as error:
            raise UserError(
                f"{cell.folder / 'spec.json'} cannot be read ({error}), so it is not known which states it needs; "
                "`attrib cache repair` moves it away, and the next run of the cell writes it anew"
            ) from error
        if spec["state_key"]:
            found.setdefault(spec["state_key"][:8], []).append(cell.folder.name)
        found.setdefault(f"pictures.{spec['pictures']}", []).append(cell.folder.name)
        if not spec.get("config") or _selects_by_confidence(spec["config"]):
            found.setdefault("confidence", []).append(cell.folder.name)
    for path in root.glob("graphs/*.*.*"):
        found.setdefault(path.name.rsplit(".", 1)[-1], []).append(f"graphs/{path.name}")
    return {key: tuple(names) for key, names in found.items()}


def _selects_by_confidence(node: Any) -> bool:
    """Whether a cell selects by confidence: it then needs all confidence files, for a spec does not say which."""
    if isinstance(node, Mapping):
        return node.get("min_confidence") is not None or any(map(_selects_by_confidence, node.values()))
    return isinstance(node, list) and any(map(_selects_by_confidence, node))


def _states(root: Path, uses: Mapping[str, tuple[str, ...]], now: float) -> list[StoredItem]:
    folder = root / "state"
    if folder.is_symlink():
        return [StoredItem("other", (folder,), Measure(), "a link, which is not followed")]
    groups: dict[tuple[str, str], list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if TEMPORARY.fullmatch(path.name):
            continue
        if (fitted := FITTED.fullmatch(path.name)) and not path.is_dir():
            kind = "partial" if fitted["partial"] else "state"
            groups.setdefault((kind, fitted["key"]), []).append(path)
        elif shared := SHARED.fullmatch(path.name):
            groups.setdefault((shared["kind"], shared["key"]), []).append(path)
        elif path.name == "fingerprints" and not path.is_symlink():
            others.append(
                StoredItem("fingerprints", (path,), measured([path], now), "remembered fingerprints of the data files")
            )
        else:
            others.append(StoredItem("other", (path,), measured([path], now), "not written by attrib"))
    found = []
    for (kind, key), paths in groups.items():
        name = {"pictures": f"pictures.{key}", "confidence": "confidence"}.get(kind, key)
        paths.sort(key=lambda path: path.suffix != ".safetensors")  # the state before what is said about it
        found.append(StoredItem(kind, tuple(paths), measured(paths, now, _CHUNKS), uses=uses.get(name, ())))
    return sorted(found, key=lambda item: (item.kind, item.path)) + others


def foreign(folder: Path) -> list[Path]:
    """The files in a cell's folder that attrib did not write, and links."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.is_file():
            if path.is_symlink() or not (path.name in _FILES or TEMPORARY.fullmatch(path.name)):
                found.append(path)
            continue
        suffixes = _PARTS.get(path.name, (".json", ".tmp"))  # else a folder of documents
        for one, about in walk(path):
            if stat.S_ISDIR(about.st_mode):
                continue
            known = suffixes is None or one.suffix in suffixes
            if not stat.S_ISREG(about.st_mode) or not known:
                found.append(one)
    return found


# ---- deleting ---------------------------------------------------------------------------------------


def refuse_while_running(root: Path | str, silent: float = SILENT) -> None:
    """Raises UserError if a worker of any cell shows signs of life."""
    root = Path(root)
    now = clock(root)
    for runs in sorted(root.glob("*/runs")):  # also of a folder whose spec.json was lost
        for worker in workers(runs.parent, now, silent):
            if worker.state == RUNNING:
                where = f"{worker.host or 'some host'}, pid {worker.pid}, last sign of life {worker.age:.0f} s ago"
                raise UserError(f"{worker.cell} is being worked on ({where}); stop it first, or wait")


def unused(root: Path | str) -> tuple[list[StoredItem], list[tuple[StoredItem, str]]]:
    """(what prune deletes; what it keeps although no cell refers to it, with the reason)."""
    root = Path(root)
    doomed: list[StoredItem] = []
    kept: list[tuple[StoredItem, str]] = []
    for item in inventory(root, references(root)):
        if item.uses or item.kind in ("cell", "fingerprints", "temporary"):
            continue
        if item.kind == "other":
            if item.about:
                kept.append((item, item.about))
        elif item.measure.strange:
            kept.append((item, f"{item.measure.strange[0]} {NOT_OURS}"))
        elif item.kind == "folder" and any(root.glob(f"{DAMAGED}/*/{escape(item.path.name)}/spec.json")):
            kept.append((item, "its spec.json was damaged and moved away; the next run of the cell writes it anew"))
        elif item.kind == "partial" and item.measure.age < DAY:
            kept.append((item, "an unfinished fit, saved within the last day"))
        else:
            doomed.append(item)
    return doomed, kept


def superseded(root: Path | str) -> list[StoredItem]:
    """Score folders of an older VERSION of a metric that the cell also has in a newer one, all else being equal."""
    root, found = Path(root), []
    now = clock(root)
    for cell in cells(root):
        newest: dict[str, int] = {}
        listed = []
        for name in cell.metrics():
            spec = read_object(cell.folder / "scores" / name / "metric.json").get("spec")
            if isinstance(spec, dict) and isinstance(spec.get("VERSION"), int):
                same = repr(sorted((k, v) for k, v in spec.items() if k != "VERSION"))
                newest[same] = max(newest.get(same, 0), spec["VERSION"])
                listed.append((name, same, spec["VERSION"]))
        for name, same, version in listed:
            if version < newest[same]:
                about = f"version {version} of the metric; the cell has version {newest[same]}"
                found.append(_scores(cell, name, about, now))
    return found


def scores(root: Path | str, pattern: str) -> list[StoredItem]:
    """The score folders whose names match: ``ehr.*``, or ``ehr.9561f895``."""
    root = Path(root)
    now = clock(root)
    found = [(cell, name) for cell in cells(root) for name in cell.metrics()]
    chosen = [(cell, name) for cell, name in found if fnmatch.fnmatchcase(name, pattern)]
    return [_scores(cell, name, "named on the command line", now) for cell, name in chosen]


def _scores(cell: Cell, name: str, about: str, now: float) -> StoredItem:
    path = cell.folder / "scores" / name
    measure = measured([path], now, _CHUNKS)
    links = tuple(part for part in (cell.folder, path.parent) if part.is_symlink())  # ``remove`` would refuse
    return StoredItem("scores", (path,), dataclasses.replace(measure, strange=links + measure.strange), about)


def remove(root: Path | str, path: Path) -> None:
    """Delete a file or folder of a work directory. Raises UserError if that would reach, or remove, a link."""
    check_inside(root, path)
    if path.is_dir():
        if links := measured([path], 0.0).strange:
            raise UserError(f"{links[0]} {NOT_OURS}; {path} is left as it is")
        shutil.rmtree(path)  # does not follow links that are made meanwhile
    else:
        path.unlink()


def check_inside(root: Path | str, path: Path) -> None:
    """Raises UserError unless ``path`` lies below ``root``, with no link on the way and none at its end."""
    root = Path(root)
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        parts = ("..",)
    place = root
    for part in parts or ("..",):
        place = place / part
        if part == ".." or place.is_symlink():
            raise UserError(f"{path} is not reached within {root} alone ({place} is a link or lies outside)")


def stale_maps(cell: Cell) -> Mapping[Path, tuple[int, int]]:
    """Chunk -> (samples that no longer belong to the cell, or had another content; all its samples).

    Empty where the cell has no samples.json.
    """
    said = cell.about()
    found: dict[Path, list[int]] = {}
    for (uid, fingerprint), record in Arrays(cell.folder / "maps").index().items():
        count = found.setdefault(record.path, [0, 0])
        count[0] += not counts(said, uid, fingerprint)
        count[1] += 1
    return {path: (stale, whole) for path, (stale, whole) in found.items() if stale}
