"""Export of maps from a work directory to other programs: pictures, .npy, .npz."""

from __future__ import annotations

import fnmatch
import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from attrib.drawing.pictures import heat, overlay, png, words_page
from attrib.drawing.spectrogram import draw
from attrib.errors import UserError
from attrib.store.cell import Arrays, Cell, cells, counts
from attrib.store.files import Key, picture_path, write_atomic
from attrib.store.inputs import KeptInput, drawable, kept_input
from attrib.store.reading import fits
from attrib.store.schemas import Spec
from attrib.store.temporary import sweep
from attrib.store.workers import read_object
from attrib.upkeep.status import matches, no_cells

FORMATS = ("png", "npy", "npz")


@dataclass
class Exported:
    """``files`` written. ``bare``: pictures of the map alone, because its input is not among those kept for the report.

    ``skipped``: sample, and why nothing was written for it. ``broken``: files that could not be read.
    """

    files: int = 0
    bare: int = 0
    skipped: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    cell: Cell
    key: Key
    name: str  # of the map; "" for all of them (npz)
    path: Path


def export(
    root: Path | str,
    out: Path | str,
    kind: str = "png",
    *,
    filters: Sequence[str] = (),
    maps: Sequence[str] = (),
    uids: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write the maps that count (``samples.json``) below ``out``: ``<cell>/<map>/<uid>.png`` or ``<cell>/<uid>.npz``.

    kind     png: the map over its input where the report keeps that (the first samples), else the map alone; of a text
             a page with coloured words (.html). npy: the map. npz: all that is stored of a sample, by name
    filters  of cells, see ``status.Observer``
    maps     names of maps, all if empty (npz: names of arrays)
    uids     samples, ``*`` and ``?`` match anything; all if empty

    Nothing in a uid leads out of ``out``. Raises UserError before anything is written if nothing is selected, or a
    file is there already and ``force`` is not given.
    """
    root, out = Path(root), Path(out)
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind}: choose one of {', '.join(FORMATS)}")
    sweep(out)  # of an export that was killed
    result = Exported()
    jobs = list(_jobs(root, out, kind, filters, maps, uids, result.broken))
    if not jobs:
        raise UserError(f"nothing in {root} is selected; `attrib cache list` shows its cells")
    taken: dict[Path, _Job] = {}
    for job in jobs:
        other = taken.setdefault(job.path, job)
        if other is not job:
            result.skipped.append(f"{job.key[0]}: {job.path} is already the file of {other.key[0]}")
    there = [path for path in taken if path.exists()]
    if there and not force:
        raise UserError(f"{there[0]} exists ({len(there)} files of {len(taken)}); --force writes over them")
    inputs: dict[str, Arrays] = {}
    for job in taken.values():
        try:
            arrays = job.cell.maps.read(job.key, [job.name] if job.name else maps or None)
        except (KeyError, OSError) as error:
            result.skipped.append(f"{job.key[0]}: {error}")
            continue
        if kind == "png":
            spec = read_object(job.cell.folder / "spec.json")
            folder = f"pictures.{spec.get('pictures')}"
            store = inputs.setdefault(folder, Arrays(root / "state" / folder))
            try:
                known = kept_input([store], job.key)
                data, bare = _picture(arrays[job.name], str(spec.get("modality", "image")), known, job.key[0])
            except ValueError as error:
                result.skipped.append(f"{job.key[0]}: {error}; export it as npy")
                continue
        else:
            data, bare = _packed(arrays, job.name), False
        if data is None:
            result.skipped.append(
                f"{job.key[0]}: its input is not kept, and its map cannot be drawn alone; export it as npy"
            )
            continue
        write_atomic(job.path, data)
        result.files, result.bare = result.files + 1, result.bare + bare
    return result


def _jobs(
    root: Path,
    out: Path,
    kind: str,
    filters: Sequence[str],
    maps: Sequence[str],
    uids: Sequence[str],
    broken: list[str],
) -> Iterable[_Job]:
    found = [cell for cell in cells(root) if matches(cell.folder.name, filters)]
    if not found:
        raise UserError(no_cells(root) if not filters else f"no cell in {root} matches {' and '.join(filters)}")
    for cell in found:
        try:
            spec = cell.spec
            fits(spec, Spec)
            said, index = cell.about(), cell.maps.index()
        except ValueError as error:
            broken.append(f"{cell.folder / 'spec.json'}: {error}")
            continue
        except (UserError, OSError) as error:
            broken.append(str(error))
            continue
        broken += cell.maps.broken
        suffix = ".html" if kind == "png" and spec.get("modality") == "text" else f".{kind}"
        for (uid, fingerprint), record in sorted(index.items()):
            if not counts(said, uid, fingerprint) or (
                uids and not any(fnmatch.fnmatchcase(uid, pattern) for pattern in uids)
            ):
                continue
            if kind == "npz":
                yield _Job(cell, (uid, fingerprint), "", picture_path(out / cell.folder.name, uid, suffix))
                continue
            own = [name for name in record.names if name in spec.get("maps", ())]
            for name in maps or own:
                if name in record.names:
                    # The name of a map comes from a file, as a uid does.
                    folder = picture_path(out / cell.folder.name, name, "")
                    yield _Job(cell, (uid, fingerprint), name, picture_path(folder, uid, suffix))


def _picture(map: np.ndarray, modality: str, known: KeptInput, uid: str) -> tuple[bytes | None, bool]:
    """A file's content, and whether it shows the map alone; None if there is nothing to draw it on.

    Raises ValueError if the map does not fit its input.
    """
    map, info = drawable(map), known.info
    if modality == "text":
        return (words_page(uid, info["tokens"], map).encode() if "tokens" in info else None), False
    if modality == "audio":
        if known.content is None or "rate" not in info:
            return None, False
        return png(draw(known.content, int(info["rate"]), map, known.roi)), False
    if known.content is not None:
        return png(overlay(known.content, map, known.roi)), False
    return (png(heat(map)), True) if map.ndim == 2 else (None, False)


def _packed(arrays: dict[str, np.ndarray], name: str) -> bytes:
    """One array as .npy; all of them (``name`` is "") as .npz, which ``np.load`` opens."""
    if name:
        return _npy(arrays[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, value in arrays.items():
            archive.writestr(f"{one.replace('/', '_')}.npy", _npy(value))
    return buffer.getvalue()


def _npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()
