"""What the runner does with a cell, in memory: the same steps, by the same code, without a work directory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from attrib import keys
from attrib.api.names import Given
from attrib.api.nets import Net
from attrib.api.parts import Explainer, estimation
from attrib.api.speech import to_callers
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
from attrib.running.stages import NO_ROOM
from attrib.running.states import fit_state, load_state
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)

EXAMINED = 8  # samples, among which two different ones are looked for before the first is explained


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


@dataclass
class Failures:
    """Samples that cannot be explained, as a run's ledger has them: uid -> why.

    first   what a method raised first, with its traceback; None where samples could not be read, say
    """

    reasons: dict[str, str] = field(default_factory=dict)
    first: Exception | None = None

    def add(self, uid: str, reason: str, error: Exception | None = None) -> None:
        if uid not in self.reasons:
            reason = to_callers(reason.removeprefix("SampleError: "))
            says = re.search(rf"(?<!\w){re.escape(uid)}(?!\w)", reason)
            self.reasons[uid] = reason if says else f"{uid}: {reason}"
            self.first = self.first or error

    def among(self, uids: Sequence[str]) -> dict[str, str]:
        """The reasons in the order of ``uids``. Raises the first, or what the method raised, if no sample is left."""
        found = {uid: self.reasons[uid] for uid in uids if uid in self.reasons}
        if len(found) == len(uids):
            if self.first is not None:
                raise self.first
            others = len(uids) - 1
            more = f" (nor can {others} more be explained)" if others else ""
            raise SampleError(next(iter(found.values())) + more)
        return found


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
    cell.check_layers()
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
        asked = classes_of(batches(cell.samples(uids, batch), uids, Failures())) if fit.BY_CLASS else None
        samples = cell.estimation_samples(batch)
        if root is not None:
            try:
                known[key] = load_state(Path(root), cell.state_key(samples), fit, cell.model, samples, asked=asked)
            except OSError as error:
                raise UserError(f"root={str(root)!r}: what is fitted cannot be kept there: {error}") from error
        else:
            log.info("fitting %s on %d samples", type(fit).__name__, len(samples.uids))
            samples.asked = asked
            known[key] = fit_state(fit, cell.model, samples, _Memory(), log.info)
    return known[key]


# ---- maps -----------------------------------------------------------------------------------------------


def batches(samples: Samples, uids: Sequence[str], failed: Failures) -> Iterator[Batch]:
    """As a run goes through them; those that cannot be read are added to ``failed``."""
    for batch, unread in samples.load(samples.chunks(uids)):
        for uid, reason in unread:
            failed.add(uid, reason)
        if batch is not None:
            yield batch


def explained(cell: Experiment, uids: Sequence[str], size: int, state: State) -> tuple[dict[str, One], dict[str, str]]:
    """uid -> what the method says of it; and of those that cannot be explained, why. As a run goes on without them.

    Raises what the method raised, or SampleError, if no sample is left.
    """
    cell.examine(uids[:EXAMINED])
    meter, found, failed = Meter(cell.model), dict[str, One](), Failures()
    for batch in batches(cell.samples(uids, size), in_order(cell.dataset, sorted(uids), size), failed):
        found |= _attempt(cell, batch, state, meter, failed)
    return found, failed.among(uids)


def _attempt(cell: Experiment, batch: Batch, state: State, meter: Meter, failed: Failures) -> dict[str, One]:
    """Of the batch or, where memory has no room for it, of its halves; after another error, of each sample alone."""
    model, reason, size = cell.model, "", 1
    rows = model.rows
    try:
        meter.begin()
        arrays = checked(cell.method, batch, cell.explain(batch, state))
        return _apart(cell.method, batch, arrays, meter.each(len(batch)), failed)
    except UserError:
        raise
    except Exception as error:  # a method may raise anything
        if is_lost(error):
            raise
        if not is_out_of_memory(error):
            if len(batch) == 1:
                sample = isinstance(error, SampleError)
                failed.add(batch.uids[0], str(error) if sample else f"{type(error).__name__}: {error}", error)
                return {}
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            size = max(1, len(batch) // 2)
    if reason:
        release_memory(model.device)  # outside the except block, whose traceback keeps the batch's tensors alive
        model.rows = rows
        if len(batch) == 1:
            failed.add(batch.uids[0], f"{reason}; {NO_ROOM}")
            return {}
    found: dict[str, One] = {}
    for start in range(0, len(batch), size):
        found |= _attempt(cell, batch[start : start + size], state, meter, failed)
    return found


def _apart(
    method: Method, batch: Batch, arrays: Mapping[str, np.ndarray], cost: Mapping[str, Any], failed: Failures
) -> dict[str, One]:
    found = {}
    for i, uid in enumerate(batch.uids):
        if not all(np.isfinite(arrays[name][i]).all() for name in method.MAPS):
            failed.add(uid, "the map has NaN or infinite values")
            continue
        length = None if batch.lengths is None else int(batch.lengths[i])
        cut = () if length is None else (*method.MAPS, *method.TOKENS)
        one = {name: value[i, :length] if name in cut else value[i] for name, value in arrays.items()}
        found[uid] = One(one, batch.target[i].cpu(), cost)
    return found


def targets_of(cell: Experiment, uids: Sequence[str], size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is explained of each sample; and of those that cannot be read, why. Raises SampleError if none can."""
    cell.examine(uids[:EXAMINED])
    found, failed = dict[str, Tensor](), Failures()
    for batch in batches(cell.samples(uids, size), in_order(cell.dataset, sorted(uids), size), failed):
        found |= dict(zip(batch.uids, batch.target.cpu()))
    return found, failed.among(uids)
