"""What is kept of the first inputs of a cell, and maps, as far as they can be drawn: for the report and for exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attrib.store.cell import Arrays, Record
from attrib.store.files import Key

LARGEST = 1e30  # |value| of a map that is drawn: pictures are made in float32


class KeptInput(NamedTuple):
    """content: of an image (H, W, 3) uint8, of a sound (L,), of a text (T,) the number of each token's word.

    roi: the region of interest, (H, W) or (L,) bool. info: name, target, tokens, rate. All are None or empty where
    nothing is kept, or something else.
    """

    content: np.ndarray | None
    roi: np.ndarray | None
    info: Mapping[str, Any]


NO_INPUT = KeptInput(None, None, {})


def kept_input(stores: Sequence[Arrays], key: Key) -> KeptInput:
    """What is kept of the input with this uid and fingerprint."""
    store = next((store for store in stores if key in known(store)), None)
    if store is None:
        return NO_INPUT
    info = known(store)[key].info
    kind = "words" if "tokens" in info else "wave" if "rate" in info else "image"
    content, roi = stored_array(store, key, kind), stored_array(store, key, "roi")
    if content is not None and not _is(kind, content):
        content = None
    if content is None or roi is None or roi.dtype != bool or roi.shape != content.shape[: roi.ndim] or not roi.ndim:
        roi = None
    return KeptInput(content, roi, info)


def known(store: Arrays) -> Mapping[Key, Record]:
    """The inputs that are kept; none if the folder cannot be read."""
    try:
        return store.index()
    except OSError:
        return {}


def _is(kind: str, content: np.ndarray) -> bool:
    if kind == "image":
        return content.dtype == np.uint8 and content.ndim == 3 and content.shape[2] == 3 and content.size > 0
    types = "iu" if kind == "words" else "f"
    return content.dtype.kind in types and content.ndim == 1 and content.size > 0


def stored_array(arrays: Arrays, key: Key, name: str) -> np.ndarray | None:
    """None if it is not there, or damaged."""
    try:
        return arrays.read(key, [name])[name]
    except (KeyError, OSError):
        return None


def drawable(map: np.ndarray) -> np.ndarray:
    """A stored map as float64. Raises ValueError if nothing can be drawn of it."""
    if map.dtype.kind not in "fiub":
        raise ValueError(f"its map is of type {map.dtype}")
    if not map.size:
        raise ValueError(f"its map has no pixels: its shape is {map.shape}")
    values = np.asarray(map, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("its map has no finite value")
    if np.abs(finite).max() > LARGEST:
        raise ValueError(f"its map has values beyond {LARGEST:g}")
    return values
