"""What a method says of a sample beside its maps, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def packed(documents: Sequence[Any]) -> np.ndarray:
    """B values that JSON can hold -> (B,) objects, each a (bytes,) uint8 array as the store keeps it.

    Raises ValueError for a document with NaN or infinite numbers, TypeError for what is not JSON.
    """
    found = np.empty(len(documents), dtype=object)
    for i, document in enumerate(documents):
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
        found[i] = np.frombuffer(text.encode(), dtype=np.uint8)
    return found


def unpacked(array: np.ndarray) -> Any:
    """The document that the store holds as (bytes,) uint8."""
    return json.loads(array.tobytes())
