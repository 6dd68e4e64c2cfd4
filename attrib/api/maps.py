"""Maps of other programs, and regions of interest: what is handed over beside the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib.api.names import Given
from attrib.datasets.memory import Pictures, Tensors, Waves
from attrib.types import UserError

ROUNDING = 1e-12  # of float64, relative: what numbers differ by that were computed in two ways
LOST = 0.1  # so many of a map's steps may be lost: of a million random numbers float32 loses a thirtieth

# ---- maps of other programs ---------------------------------------------------------------------


def maps_of(maps: Any, name: str, samples: int) -> Sequence[np.ndarray]:
    """One array for each sample, in the numbers that it came in. Raises UserError."""
    if isinstance(maps, Iterable) and not isinstance(maps, str | Mapping):
        each = maps if isinstance(maps, Tensor | np.ndarray) else list(maps)
        try:
            found = [np.asarray(_known(m.detach().cpu()) if isinstance(m, Tensor) else m) for m in each]
        except (TypeError, ValueError, RuntimeError):
            found = []
        if found and all(m.dtype.kind in "biuf" for m in found):
            if len(found) != samples:
                hint = "; of one sample they are maps[None]" if samples == 1 and found[0].ndim == 1 else ""
                if len(found) < samples:
                    hint = "; where samples have no map, give the Explanation itself, or those of x that have one"
                raise UserError(f"maps: {name} has {len(found)} maps for {samples} samples{hint}")
            return found
    what = f"{type(maps).__name__}{f' of {maps.dtype}' if isinstance(maps, Tensor | np.ndarray) else ''}"
    raise UserError(
        f"maps: {name} is {what}; give an Explanation, or real numbers (N, H, W), of sounds (N, L), of texts (N, T) or "
        "N maps (T,)"
    )


def _known(map: Tensor) -> Tensor:
    """numpy knows no bfloat16; each of its numbers is one of float32."""
    return map.float() if map.dtype == torch.bfloat16 else map


def as_computed(map: np.ndarray, dtype: torch.dtype, name: str) -> np.ndarray:
    """The map in ``dtype``, in which it is scored; ``name`` is what messages call it.

    Raises UserError where values become equal by that: metrics rank by them, and equal ones by chance. Differences of
    rounding are none, and a few of many values may fall together, as random ones do.
    """
    target = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    with np.errstate(over="ignore"):
        found = map.astype(target)
        if np.can_cast(map.dtype, target) and (map.dtype.kind == "f" or map.itemsize < target.itemsize):
            return found  # each number of the one is one of the other
        values = np.unique(map[np.isfinite(map)])
        kept = values.astype(target)
    wide = values.astype(np.longdouble)
    nearest = ROUNDING * np.maximum(np.abs(wide[1:]), np.abs(wide[:-1])) if map.dtype.kind == "f" else 0
    apart = np.diff(wide) > nearest
    lost, steps = int((apart & (kept[1:] == kept[:-1])).sum()), int(apart.sum())
    if lost <= LOST * steps and np.isfinite(kept).all():
        return found
    what = f"{lost} of {steps} steps between its values are" if lost else f"{np.abs(wide).max():.2g} is"
    finer = "" if target == np.float64 else "compute in float64 (run={'dtype': 'float64'}, or dtype= of a Classifier), "
    raise UserError(
        f"maps: {name} is {map.dtype}, and {what} lost in {target}, in which the net is computed; what is equal there "
        "would be ranked by chance. Leave a needless offset or scale out, as (maps - maps.min()) / (maps.max() - "
        f"maps.min()) does, {finer}or give maps.astype('{target}') if those values may count as equal"
    )


# ---- regions of interest ------------------------------------------------------------------------


def with_roi(found: Given, roi: Any) -> Given:
    """The samples with their regions of interest: bool, one for each sample.

    Of pictures (H, W) in the pixels of each picture, else as the network reads them: (H, W), of sounds (L,).

    Raises UserError.
    """
    dataset = found.dataset
    if not isinstance(dataset, Pictures | Waves | Tensors) or dataset.modality == "text":
        raise UserError("roi: texts have no regions, and a dataset brings its own; give images or sounds themselves")
    if not isinstance(roi, Iterable):
        raise UserError(f"roi is {type(roi).__name__}; give a region of bool for each sample")
    masks = [roi] if getattr(roi, "ndim", 3) == (1 if dataset.modality == "audio" else 2) else list(roi)
    if len(masks) != len(found.uids):
        raise UserError(f"roi: {len(masks)} regions for {len(found.uids)} samples")
    regions = {}
    for uid, mask in zip(found.uids, masks):  # of a sample that cannot be read too: its failure is said elsewhere
        array = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
        if array.dtype != bool:
            raise UserError(f"roi: the region of {uid} is {array.dtype}, not bool; roi > 0, say")
        wanted = _places(dataset, uid)
        if wanted is not None and array.shape != wanted:
            raise UserError(f"roi: the region of {uid} is {array.shape}, but the sample is {wanted}")
        regions[uid] = array
    return Given(dataset.with_regions(regions), found.uids)


def _places(dataset: Pictures | Waves | Tensors, uid: str) -> tuple[int, ...] | None:
    """None of a sample that cannot be read."""
    try:
        if isinstance(dataset, Pictures):
            width, height = dataset.size(uid)
            return height, width
        return tuple(dataset.batch([uid]).x.shape[2:])
    except UserError:
        raise
    except Exception:  # a user's dataset may raise anything
        return None
