"""What a method returned, checked against what it declares: a user's own may get names, shapes or padding wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib.methods import Method
from attrib.types import Batch, UserError


def checked(method: Method, batch: Batch, returned: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Everything that ``method.attribute`` said of a batch, as it is stored: float32, documents as JSON in bytes.

    Raises UserError for what is wrong whatever the sample, which ends the run; ValueError or TypeError for a document
    that JSON cannot hold.
    """
    name = type(method).__name__
    declared = {*method.MAPS, *method.EXTRAS, *method.DOCUMENTS}
    if not isinstance(returned, Mapping):
        raise UserError(
            f"{name}.attribute returned a {type(returned).__name__}; it must be a mapping with {sorted(declared)}"
        )
    if set(returned) != declared:
        raise UserError(f"{name}.attribute returned {sorted(returned)}, but MAPS and EXTRAS say {sorted(declared)}")
    arrays = {key: packed(returned[key]) for key in returned if key in method.DOCUMENTS}
    for key, value in returned.items():
        if key not in arrays:
            if not isinstance(value, Tensor):
                raise UserError(f"{name}: {key} is a {type(value).__name__}; it must be a tensor")
            if value.is_complex() or value.layout != torch.strided:
                kind = "complex" if value.is_complex() else f"of the layout {value.layout}"
                raise UserError(f"{name}: {key} is {kind}; it must be a dense tensor of real numbers")
            arrays[key] = value.detach().float().cpu().numpy()
    for key, value in arrays.items():
        if not _fits(method, batch, key, value.shape):
            places = batch.x.shape[2:] if batch.mask is None else batch.x.shape[1:]
            wanted = f"; it must be {(len(batch), *places)}" if key in method.MAPS else ""
            raise UserError(f"{name}: {key} has shape {value.shape} for inputs {tuple(batch.x.shape)}{wanted}")
        if batch.mask is not None and key in method.MAPS and value[~batch.mask.cpu().numpy()].any():
            raise UserError(f"{name}: {key} is not zero on the padding of the texts")
    return arrays


def _fits(method: Method, batch: Batch, key: str, shape: tuple[int, ...]) -> bool:
    """Maps have the places of the input, per-token extras its tokens, columns one number; all have a row per sample."""
    if shape[:1] != (len(batch),):
        return False
    if key in method.MAPS:
        return len(shape) > 1 and shape[1:] == tuple(batch.x.shape[1 - len(shape) :])
    if key in method.TOKENS and batch.lengths is not None:
        return shape[1:2] == (batch.x.shape[1],)
    return key not in method.COLUMNS or len(shape) == 1


def packed(documents: Sequence[Any]) -> np.ndarray:
    """B values that JSON can hold -> (B,) objects, each a (bytes,) uint8 array as the store keeps it.

    Raises ValueError for a document with NaN or infinite numbers, TypeError for what is not JSON.
    """
    found = np.empty(len(documents), dtype=object)
    for i, document in enumerate(documents):
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
        found[i] = np.frombuffer(text.encode(), dtype=np.uint8)
    return found
