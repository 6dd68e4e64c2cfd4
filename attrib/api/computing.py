"""What the runner does with a cell, in memory: the same steps, by the same code, without a work directory."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attrib import keys
from attrib.api.names import Given
from attrib.api.nets import Net
from attrib.api.parts import Explainer, estimation
from attrib.config.objects import check_modality
from attrib.config.trained import check_encoder, check_transform
from attrib.datasets import Dataset, Selection, TextDataset
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import Samples, classes_of, example, in_order
from attrib.fit import State
from attrib.methods import Method
from attrib.metrics import Metric
from attrib.models import Classifier
from attrib.models.device_memory import is_lost, is_out_of_memory, release_memory
from attrib.noise import Noise
from attrib.running.costs import Meter
from attrib.running.returned import checked
from attrib.running.stages import NO_ROOM, why_undefined
from attrib.running.states import fit_state, load_state
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)

EXAMINED = 8  # samples, among which two different ones are looked for before the first is explained
COLUMNS = ("uid", "map", "metric", "column", "direction", "value", "state", "reason")  # of a table of scores


@dataclass(frozen=True)
class Handed(Method):
    """Maps that somebody else made: a method in name only."""

    names: tuple[str, ...]
    VERSION: ClassVar[int] = 1
    NAME: ClassVar[str] = "attrib.api.computing.Handed"
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    CONTRASTS: ClassVar[bool] = True

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802
        return dict.fromkeys(self.names, "")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Any]:
        raise UserError("these maps were handed over; a metric that asks for others needs an Explanation")


@dataclass(frozen=True)
class One:
    """What is known of a sample: arrays and target as the runner stores them, and what they cost."""

    arrays: Mapping[str, np.ndarray]
    target: Tensor
    cost: Mapping[str, Any]


def classifier_of(net: Net, found: Given, method: Explainer) -> Classifier:
    """The net as methods see it, in float32 unless it came otherwise. Raises UserError."""
    shape = None if found.dataset.modality == "text" else tuple(example(found.dataset).shape[1:])
    return net.classifier(method.method, shape, found.dataset)


def cell_of(
    net: Net,
    found: Given,
    target: Any,
    method: Explainer,
    metrics: Mapping[str, Metric],
    seed: int,
    fit: Any = None,
    overrides: Sequence[str] = (),
    model: Classifier | None = None,
) -> Experiment:
    """The experiment that these parts are. ``model``: of ``classifier_of``, if it was made before. Raises UserError."""
    data = found.dataset
    fitted_on: Dataset | None = None
    select = Selection()
    if method.method.fit is not None:
        if fit is None:
            raise UserError(
                f"{method.name} is fitted on data first: give it some (fit=...), such as images, tensors, a DataLoader "
                "or the name of a dataset (fit='photos')"
            )
        fitted_on, select = estimation(fit, net, method.name, overrides)
    model = model or classifier_of(net, found, method)
    model, scorer = model.with_precision(net.precision.explain), model.with_precision(net.precision.score)
    cell = Experiment(
        names={"dataset": "given", "model": net.name, "method": method.name},
        dataset=data,
        model=model,
        scorer=scorer,
        method=method.method,
        metrics=metrics,
        target=target,
        estimation=fitted_on,
        estimation_select=select,
        seed=seed,
    )
    check_modality(method.node, cell)
    try:
        cell.check_layers()
    except UserError as error:  # which speaks to those at a command line
        said = re.sub(r"set model\.layers\.(\w+)", r'give layers={"\1": "PATH"}', str(error))
        raise UserError(said) from error
    if isinstance(data, TextDataset):
        check_encoder(data.encoder, model, net.config.get("checkpoint"), net.name)
    if net.preset is not None:
        check_transform(getattr(data, "transform", None), net.config, model, net.name)
    return cell


# ---- fits -----------------------------------------------------------------------------------------------


class _Memory:
    """An unfinished fit that nobody will continue."""

    def load(self) -> State | None:
        return None

    def save(self, state: State) -> None:
        pass

    def wanted(self) -> bool:
        return False


def state_of(
    cell: Experiment,
    uids: Sequence[str],
    batch: int,
    root: str | Path | None,
    known: dict[str, State] | None = None,
) -> State:
    """What the method learned from data to explain these samples, as a run stores it.

    root    a work directory where it is looked for, and kept
    known   states of other methods that were fitted on the same data, with the same net; this one is added
    """
    fit, known = cell.method.fit, {} if known is None else known
    if fit is None:
        return {}
    key = keys.digest(fit)
    if key not in known:
        asked = classes_of(_batches(cell.samples(uids, batch), uids)) if fit.BY_CLASS else None
        samples = cell.estimation_samples(batch)
        if root is not None:
            known[key] = load_state(Path(root), cell.state_key(samples), fit, cell.model, samples, asked=asked)
        else:
            log.info("fitting %s on %d samples", type(fit).__name__, len(samples.uids))
            samples.asked = asked
            known[key] = fit_state(fit, cell.model, samples, _Memory(), log.info)
    return known[key]


# ---- maps -----------------------------------------------------------------------------------------------


def _batches(samples: Samples, uids: Sequence[str]) -> Iterator[Batch]:
    """As a run goes through them. Raises SampleError for one that cannot be read."""
    for batch, unread in samples.load(samples.chunks(uids)):
        for uid, reason in unread:
            reason = reason.removeprefix("SampleError: ")
            raise SampleError(reason if uid in reason else f"{uid}: {reason}")
        if batch is not None:
            yield batch


def explained(cell: Experiment, uids: Sequence[str], size: int, state: State) -> dict[str, One]:
    """uid -> what the method says of it. Raises SampleError for one that cannot be explained."""
    cell.examine(uids[:EXAMINED])
    meter, found = Meter(cell.model), dict[str, One]()
    for batch in _batches(cell.samples(uids, size), in_order(cell.dataset, sorted(uids), size)):
        found |= _attempt(cell, batch, state, meter)
    return found


def _attempt(cell: Experiment, batch: Batch, state: State, meter: Meter) -> dict[str, One]:
    """Of the batch or, where memory has no room for it, of its halves."""
    model, reason = cell.model, ""
    rows = model.rows
    try:
        meter.begin()
        arrays = checked(cell.method, batch, cell.explain(batch, state))
        return _apart(cell.method, batch, arrays, meter.each(len(batch)))
    except Exception as error:  # a method may raise anything
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    release_memory(model.device)  # outside the except block, whose traceback keeps the batch's tensors alive
    model.rows = rows
    if len(batch) == 1:
        raise SampleError(f"{batch.uids[0]}: {reason}; {NO_ROOM}")
    half = len(batch) // 2
    return _attempt(cell, batch[:half], state, meter) | _attempt(cell, batch[half:], state, meter)


def _apart(method: Method, batch: Batch, arrays: Mapping[str, np.ndarray], cost: Mapping[str, Any]) -> dict[str, One]:
    found = {}
    for i, uid in enumerate(batch.uids):
        if not all(np.isfinite(arrays[name][i]).all() for name in method.MAPS):
            raise SampleError(f"{uid}: the map has NaN or infinite values")
        length = None if batch.lengths is None else int(batch.lengths[i])
        cut = () if length is None else (*method.MAPS, *method.TOKENS)
        one = {name: value[i, :length] if name in cut else value[i] for name, value in arrays.items()}
        found[uid] = One(one, batch.target[i].cpu(), cost)
    return found


def targets_of(cell: Experiment, uids: Sequence[str], size: int) -> dict[str, Tensor]:
    """What is explained of each sample."""
    cell.examine(uids[:EXAMINED])
    found: dict[str, Tensor] = {}
    for batch in _batches(cell.samples(uids, size), in_order(cell.dataset, sorted(uids), size)):
        found |= dict(zip(batch.uids, batch.target.cpu()))
    return found


# ---- scores ---------------------------------------------------------------------------------------------


def scores(cell: Experiment, known: Mapping[str, One], size: int, state: State | None = None) -> pd.DataFrame:
    """A row for each sample (in the order of ``known``), map, metric and column, see ``COLUMNS``."""
    for name, metric in cell.metrics.items():
        if metric.NEEDS_EXPLAIN and isinstance(cell.method, Handed):
            raise UserError(f"metric {name} asks for the maps of other inputs; give it an Explanation instead of maps")
    rows: dict[str, list[dict[str, Any]]] = {uid: [] for uid in known}
    for name in cell.metrics:
        order = in_order(cell.dataset, sorted(known), size)
        for batch in _batches(cell.stored_samples(order, size), order):
            if cell.metrics[name].NEEDS_ROI and batch.roi is None:
                raise UserError(f"metric {name} needs regions of interest; give them as roi=...")
            target = torch.stack([known[uid].target for uid in batch.uids]).to(batch.x.device)
            batch = dataclasses.replace(batch, target=target)
            for kind in cell.method.MAPS:
                maps = _stacked(batch, [known[uid].arrays[kind] for uid in batch.uids], kind)
                found = _scored(cell, name, kind, batch, maps.to(cell.model.device, cell.model.dtype), state or {})
                for uid in batch.uids:
                    rows[uid] += found[uid]
    return pd.DataFrame([row for uid in known for row in rows[uid]], columns=list(COLUMNS))


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
        nothing = {column: np.full(1, np.nan) for column in columns}
        why = f"{type(error).__name__}: {error}"
        return {batch.uids[0]: list(_rows(columns, batch, 0, (batch.uids[0], kind, name), nothing, why))}
    found = {column: value.detach().cpu().double().numpy() for column, value in scored.items()}
    needs_roi = cell.metrics[name].NEEDS_ROI
    return {
        uid: list(_rows(columns, batch, i, (uid, kind, name), found, needs_roi=needs_roi))
        for i, uid in enumerate(batch.uids)
    }


def _explain(cell: Experiment, state: State, kind: str) -> Any:
    return lambda batch: cell.explain(batch, state)[kind]


def _rows(
    columns: Mapping[str, str],
    batch: Batch,
    i: int,
    names: tuple[str, str, str],
    found: Mapping[str, np.ndarray],
    why: str = "",
    needs_roi: bool = False,
) -> Iterator[dict[str, Any]]:
    """Of one sample, map and metric; ``why`` it has no score, if that is known."""
    values = {column: float(found[column][i]) for column in columns}
    failed = not all(np.isfinite(list(values.values())))
    state, reason = ("failed", why or why_undefined(batch, i, needs_roi)) if failed else ("ok", "")
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
            raise UserError(f"maps: {kind} of {uid} is {map.shape}, but its input has {places}")
        found.append(map)
    return torch.from_numpy(np.stack(found))
