"""The gallery of a section: samples x maps, each with its scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attrib.classes import shown_target
from attrib.drawing import pictures, spectrogram
from attrib.results import formats
from attrib.results.labels import Labelled
from attrib.store.cell import Arrays
from attrib.store.files import Key
from attrib.store.inputs import NO_INPUT, KeptInput, drawable, kept_input, stored_array
from attrib.store.inputs import known as known_inputs

SIZES = (224, 192, 160, 128, 112)  # pixels of a thumbnail's longer side: the largest that fits the budget
BYTES = 0.38  # of a thumbnail as base64, per pixel: what a JPEG of an overlay takes at the least
TAGS = 360  # bytes around what a tile or a sample says
SINGLE = 448  # pixels, on the page of a single sample
Rows = dict[tuple[str, str], list[Any]]  # of tables.rows, by uid and cell


@dataclass(frozen=True)
class Tile:
    """One map of one sample: a picture (of a sound: below its spectrogram), coloured words, or why there is none."""

    image: str = ""
    words: Sequence[pictures.Word] = ()
    limit: str = ""
    scores: Sequence[tuple[str, str]] = ()
    problem: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Sample:
    """``says``: what the net takes it for, and how surely; ``right``: whether it is, None where that is not known."""

    uid: str
    name: str
    image: str
    tiles: Sequence[Tile]
    pixelated: bool = False
    says: str = ""
    right: bool | None = None
    sure: float | None = None


@dataclass(frozen=True)
class Gallery:
    columns: Sequence[tuple[str, str, bool]]  # method (and map), what the map is, whether it is signed
    methods: Sequence[int]  # of each column: its contender's place in the scores of the page
    samples: Sequence[Sample]
    note: str
    sound: bool = False  # whether the samples are sounds

    @property
    def text(self) -> bool:
        """Whether the samples are texts."""
        return any(tile.words for sample in self.samples for tile in sample.tiles)


def gallery(
    root: Path,
    cells: Sequence[Labelled],
    frame: pd.DataFrame,
    samples: int,
    budget: int,
    contenders: Sequence[str] = (),
    only: str | None = None,
) -> Gallery | None:
    """Samples × maps. Pictures are as large as fits ``budget`` bytes of the page; rows stop where they would exceed it.

    ``contenders``: those of the page's scores, which a column may be one of. ``only``: this sample alone.
    """
    stores = list(dict.fromkeys(c.spec["pictures"] for c in cells))
    inputs = [Arrays(root / "state" / f"pictures.{key}") for key in stores]
    keys_of = [current_keys(c, frame) for c in cells]
    current = {key for known in keys_of for key in known.values()}
    pictured = list(dict.fromkeys(key[0] for store in inputs for key in known_inputs(store) if key in current))
    stored = list(dict.fromkeys(uid for known in keys_of for uid in known))
    uids = pictured or sorted(stored)
    if only is not None:
        uids = [only] if only in stored else []
    if not uids or samples < 1:
        return None

    columns = []  # (cell, its keys, map, contender, about, signed)
    for item, known in zip(cells, keys_of):
        having = [u for u in uids[:samples] if u in known]
        for name, about in item.spec["maps"].items():
            maps = [m for u in having if (m := stored_array(item.cell.maps, known[u], name)) is not None]
            if maps:
                several = len(item.spec["maps"]) > 1
                label = formats.title(item.method, name if several else "")
                signed = says_signed(about) or any(map(pictures.is_signed, maps))
                columns.append((item, known, name, label, about, signed))

    rows = _rows(frame, uids[:samples])
    each = budget / (len(uids[:samples]) * (len(columns) + 1))
    sizes = [SINGLE] if only is not None else [s for s in SIZES[:-1] if s * s * BYTES <= each] + [SIZES[-1]]
    for longest in sizes:
        shown, used = list[Sample](), 0
        for uid in uids[:samples]:
            sample = _sample(uid, inputs, columns, rows, longest)
            used += _bytes(sample)
            if used > budget and shown:
                break
            shown.append(sample)
        if len(shown) == len(uids[:samples]):
            break
    part = len(shown) < len(stored) and only is None
    note = f"{len(shown)} of {len(stored)} samples with maps." if part else ""
    if not pictured:
        note += " The work directory holds no pictures of the inputs: maps are drawn alone."
    sound = any(map(_is_sound, cells))
    titles = [(label, about, signed) for *_, label, about, signed in columns]
    places = {contender: i for i, contender in enumerate(contenders)}
    methods = [places.get(label, places.get(item.method, -1)) for item, _, _, label, _, _ in columns]
    return Gallery(titles, methods, shown, note.strip(), sound)


def _bytes(sample: Sample) -> int:
    """About what a sample takes of the page."""
    texts = [sample.uid * 4, sample.name * 3, sample.says * 2, sample.image]
    for tile in sample.tiles:
        texts += [tile.image, tile.alt, tile.problem, *(f"{name} {value}" for name, value in tile.scores)]
        texts += [word.text + word.ground + word.ink + 40 * " " for word in tile.words]
    return TAGS * (1 + len(sample.tiles)) + sum(len(text.encode(errors="replace")) + 5 for text in texts)


def says_signed(about: str) -> bool:
    """Whether a method says of its map (``Method.MAPS``) that it is signed, whatever its fields are."""
    return re.search(r"\bsigned\b(?! unless)", about) is not None


def _rows(frame: pd.DataFrame, uids: Sequence[str]) -> Rows:
    found: Rows = {}
    names = ["uid", "cell", "map", "state", "stage", "reason", "metric", "column", "value"]
    for row in frame.loc[frame["uid"].isin(uids), names].itertuples(index=False):
        found.setdefault((row.uid, row.cell), []).append(row)
    return found


def _is_sound(item: Labelled) -> bool:
    return item.spec.get("modality") == "audio"


def current_keys(item: Labelled, frame: pd.DataFrame) -> dict[str, Key]:
    """uid -> key of its map: under the fingerprint that the tables use, else the one that was stored last."""
    index = item.maps()
    known = {uid: (uid, fingerprint) for uid, fingerprint in index}
    rows = frame.loc[frame["cell"] == item.cell.folder.name, ["uid", "fingerprint"]].drop_duplicates()
    return known | {u: (u, f) for u, f in rows.itertuples(index=False, name=None) if (u, f) in index}


def _sample(uid: str, inputs: Sequence[Arrays], columns: Sequence[Any], rows: Rows, longest: int = SIZES[0]) -> Sample:
    keys = dict.fromkeys(known[uid] for _, known, *_ in columns if uid in known)
    inputs_of = {key: _small(kept_input(inputs, key), longest) for key in keys}  # several where cells differ in data
    image, roi, info = next((found for found in inputs_of.values() if found is not NO_INPUT), NO_INPUT)
    tiles = []
    for item, known, name, label, _, signed in columns:
        mine = [row for row in rows.get((uid, item.cell.folder.name), ()) if row.map in (name, "")]
        ok = [row for row in mine if row.state == "ok"]
        metrics: dict[str, set[str]] = {}  # of a column: several metrics may have one of the same name
        for row in ok:
            metrics.setdefault(row.column, set()).add(row.metric)
        numbers = [
            (formats.column_title(row.column, row.metric, len(metrics[row.column]) == 1), f"{row.value:.3g}")
            for row in ok
        ]
        problem = "; ".join(dict.fromkeys(f"{row.stage}: {row.reason}" for row in mine if row.state == "failed"))
        map = stored_array(item.cell.maps, known[uid], name) if uid in known else None
        if map is None:
            absent = "no map stored" if item.about(uid) else "no longer one of its samples"
            tiles.append(Tile(scores=numbers, problem=problem or absent))
        else:
            own_image, own_roi, own_info = inputs_of[known[uid]]
            shown = tile(map, own_image, own_roi, own_info, signed, numbers, problem, _is_sound(item), longest)
            said = ", ".join(f"{column} {value}" for column, value in numbers)
            tiles.append(replace(shown, alt=f"Map of {label} for {uid}" + (f": {said}" if said else "")))
    image = None if "tokens" in info else image
    if image is not None:
        image = spectrogram.draw(image, int(info["rate"]), roi=roi) if "rate" in info else pictures.outlined(image, roi)
    drawn = "" if image is None else pictures.data_uri(image, photo=_photo(image), longest=longest)
    name = shown_target(str(info.get("name") or ""), info.get("target"))
    return Sample(uid, name, drawn, tiles, image is not None and max(image.shape) < 64, *_prediction(info))


def _small(known: KeptInput, longest: int) -> KeptInput:
    """With a picture of the size that is shown: colours are mixed for its pixels alone."""
    image = known.content
    return known if image is None or image.ndim != 3 else known._replace(content=pictures.shrunk(image, longest))


def _prediction(info: Mapping[str, Any]) -> tuple[str, bool | None, float | None]:
    """``says``, ``right`` and ``sure`` of a sample, from what a run has kept beside its input."""
    if "predicted" not in info:
        return "", None, None
    sure = info.get("probability")
    share = "" if sure is None else f", {100 * sure:.3g} %"
    return shown_target(info.get("predicted_name", ""), info["predicted"]) + share, info.get("right"), sure


def _photo(image: np.ndarray) -> bool:
    return max(image.shape) > 64  # JPEG would smear a 28-pixel digit


def tile(
    map: np.ndarray,
    image: np.ndarray | None,
    roi: np.ndarray | None,
    info: Mapping[str, Any],
    signed: bool,
    scores: Sequence[tuple[str, str]],
    problem: str,
    sound: bool,
    longest: int = SIZES[0],
) -> Tile:
    """A map as it is shown: over its ``image``, below its sound (``info["rate"]``), or as the colours of its words.

    image   (H, W, 3) uint8, a sound (L,), or the numbers of a text's words (T,), whose tokens are ``info["tokens"]``
    """
    try:
        map = drawable(map)
    except ValueError as error:
        return Tile(scores=scores, problem=problem or str(error))
    sign, tokens = "±" if signed else "", [str(t) for t in info.get("tokens", ())]
    if sound and map.ndim == 1:
        if image is not None and image.shape == map.shape:
            drawn = spectrogram.draw(image, int(info["rate"]), map, roi, signed)
        else:  # the map alone, below silence
            drawn = spectrogram.draw(np.zeros(map.shape), len(map), map, None, signed)
        uri = pictures.data_uri(drawn, photo=True, longest=longest)
        return Tile(uri, (), f"{sign}{spectrogram.limit(map):.3g}", scores, problem)
    limit = f"{sign}{pictures.scale(map, signed).limit:.3g}"
    if map.ndim == 1:
        known = len(tokens) == len(map)
        numbers = image if known and image is not None and image.shape == map.shape else None
        words = pictures.words(tokens if known else [str(i) for i in range(len(map))], map, signed, numbers)
        return Tile("", words, limit, scores, problem)
    if map.ndim != 2:
        return Tile(scores=scores, problem=problem or f"a map of shape {map.shape} cannot be drawn")
    drawn = pictures.heat(map, signed) if image is None else pictures.overlay(image, map, roi, signed)
    return Tile(pictures.data_uri(drawn, photo=_photo(drawn), longest=longest), (), limit, scores, problem)
