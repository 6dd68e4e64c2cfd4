"""What metrics say of maps in memory: a row for each sample, map, metric and column."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attrib.api.computing import Failures, Handed, One, batches
from attrib.experiment.cell import Experiment
from attrib.experiment.regions import has_none
from attrib.experiment.samples import in_order
from attrib.fit import State
from attrib.models.device_memory import is_lost
from attrib.running.stages import why_undefined
from attrib.types import Batch, UserError

log = logging.getLogger(__name__)

COLUMNS = ("uid", "map", "metric", "column", "direction", "value", "state", "reason")  # of a table of scores


def scores(
    cell: Experiment,
    known: Mapping[str, One],
    size: int,
    state: State | None = None,
    asked: Sequence[str] = (),
    failures: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """A row for each sample, map, metric and column, see ``COLUMNS``.

    asked      the samples in the order of the rows; by default those that are ``known``
    failures   those of them that have no map -> why

    A metric that is refused has failed for every sample, if another one is left. Raises UserError.
    """
    check_metrics(cell, known)
    failures = failures or {}
    order = in_order(cell.dataset, sorted(known), size)
    rows: dict[str, list[dict[str, Any]]] = {uid: [] for uid in asked or known}
    refused: dict[str, UserError] = {}
    for name, metric in cell.metrics.items():
        found: dict[str, list[dict[str, Any]]] = {}
        failed = Failures(dict(failures))
        try:
            for batch in batches(cell.stored_samples(order, size), order, failed):
                target = torch.stack([known[uid].target for uid in batch.uids]).to(batch.x.device)
                batch = dataclasses.replace(batch, target=target)
                for kind in cell.method.MAPS:
                    maps = _stacked(batch, [known[uid].arrays[kind] for uid in batch.uids], kind)
                    one = _scored(cell, name, kind, batch, maps.to(cell.model.device, cell.model.dtype), state or {})
                    for uid in batch.uids:
                        found.setdefault(uid, []).extend(one[uid])
        except UserError as error:
            refused[name] = error
            found, failed = {}, Failures({uid: failures.get(uid, str(error)) for uid in rows})
        for uid, reason in failed.reasons.items():
            found[uid] = [
                row for kind in cell.method.MAPS for row in _nothing(metric.COLUMNS, (uid, kind, name), reason)
            ]
        for uid, listed in found.items():
            rows[uid] += listed
    if refused and len(refused) == len(cell.metrics):
        raise next(iter(refused.values()))
    for name, why in refused.items():
        log.warning("metric %s of %s is refused: %s", name, cell.names["method"], why)
    return pd.DataFrame([row for uid in rows for row in rows[uid]], columns=list(COLUMNS))


def check_metrics(cell: Experiment, uids: Iterable[str]) -> None:
    """Raises UserError for a metric that lacks an argument: regions, or a method."""
    for name, metric in cell.metrics.items():
        if metric.NEEDS_EXPLAIN and isinstance(cell.method, Handed):
            raise UserError(f"metric {name} asks for the maps of other inputs; give it an Explanation instead of maps")
        if metric.NEEDS_ROI and has_none(cell.dataset, uids):
            raise UserError(f"metric {name} needs regions of interest; give them as roi=...")


def _nothing(columns: Mapping[str, str], names: tuple[str, str, str], why: str) -> Iterator[dict[str, Any]]:
    """The rows of a sample, map and metric without scores."""
    for column, direction in columns.items():
        yield dict(zip(COLUMNS, (*names, column, direction, np.nan, "failed", why)))


def _scored(
    cell: Experiment, name: str, kind: str, batch: Batch, maps: Tensor, state: State
) -> dict[str, list[dict[str, Any]]]:
    """uid -> rows. After an error each sample alone, as in a run, so that only the guilty ones have no score."""
    columns = cell.metrics[name].COLUMNS
    try:
        scored = cell.score(name, batch, maps, _explain(cell, state, kind))
    except UserError:
        raise
    except Exception as error:  # a metric may raise anything
        if is_lost(error):
            raise
        if len(batch) > 1:
            parts = [_scored(cell, name, kind, batch[i : i + 1], maps[i : i + 1], state) for i in range(len(batch))]
            return {uid: rows for part in parts for uid, rows in part.items()}
        why = f"{type(error).__name__}: {error}"
        return {batch.uids[0]: list(_nothing(columns, (batch.uids[0], kind, name), why))}
    found = {column: value.detach().cpu().double().numpy() for column, value in scored.items()}
    needs_roi = cell.metrics[name].NEEDS_ROI
    return {
        uid: list(_rows(columns, batch, i, (uid, kind, name), found, needs_roi)) for i, uid in enumerate(batch.uids)
    }


def _explain(cell: Experiment, state: State, kind: str) -> Any:
    return lambda batch: cell.explain(batch, state)[kind]


def _rows(
    columns: Mapping[str, str],
    batch: Batch,
    i: int,
    names: tuple[str, str, str],
    found: Mapping[str, np.ndarray],
    needs_roi: bool,
) -> Iterator[dict[str, Any]]:
    """Of one sample, map and metric."""
    values = {column: float(found[column][i]) for column in columns}
    failed = not all(np.isfinite(list(values.values())))
    state, reason = ("failed", why_undefined(batch, i, needs_roi)) if failed else ("ok", "")
    for column, direction in columns.items():
        yield dict(zip(COLUMNS, (*names, column, direction, values[column], state, reason)))


def _stacked(batch: Batch, maps: Sequence[np.ndarray], kind: str) -> Tensor:
    """One tensor with the places of the inputs; those of texts get the batch's padding back. Raises UserError."""
    places = tuple(batch.x.shape[1:] if batch.lengths is not None else batch.x.shape[2:])
    found = []
    for i, (uid, map) in enumerate(zip(batch.uids, maps)):
        if batch.lengths is not None and map.ndim == 1 and len(map) >= int(batch.lengths[i]):
            length = int(batch.lengths[i])
            map = np.pad(map[:length], (0, places[0] - length))
        if map.shape != places:
            hint = "; of maps with channels give one number for each place, such as maps.sum(1)"
            deeper = map.ndim == len(places) + 1 and map.shape[1:] == places
            raise UserError(f"maps: {kind} of {uid} is {map.shape}, but its input has {places}{hint if deeper else ''}")
        found.append(map)
    return torch.from_numpy(np.stack(found))
