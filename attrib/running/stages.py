"""The stages of a run: its maps, then the scores of each metric; and the one door through which failures go."""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrib import keys
from attrib.experiment.reading import Kept, can_be_kept
from attrib.experiment.samples import Samples
from attrib.fit import State
from attrib.metrics.metric import Explain, reads_inputs
from attrib.models.device_memory import is_lost, is_out_of_memory, release_memory
from attrib.process.signals import Stop
from attrib.running.batch_size import Budget
from attrib.running.costs import Meter
from attrib.running.kept_inputs import KeptInputs, plain
from attrib.running.options import Options
from attrib.running.plan import Plan, metric_folder
from attrib.running.returned import checked
from attrib.running.summary import Summary
from attrib.store.cell import DamagedError, ScoreRows
from attrib.store.damaged import recover
from attrib.store.files import Buffered, Key, write_json
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)

LOOK_EVERY = 30.0  # seconds: reading all rows costs more than a few samples done twice
NO_ROOM = (
    "this sample does not fit into memory even alone; take fewer draws, a smaller input (model.input.size) or layer, "
    "run.dtype=float32, or a device with more memory"
)
LOST = (
    "%s failed: %s. No sample is to blame, and this process can do nothing there any more. What was computed is "
    "stored: run the same command again. If it fails again, CUDA_LAUNCH_BLOCKING=1 shows in which operation"
)

Result = tuple[tuple[str, ...], Mapping[str, np.ndarray]]  # the samples that succeeded, and their arrays


class Shared:
    """What the stages of a run share, and the one door through which every failure goes: ledger, summary and log."""

    def __init__(self, plan: Plan, options: Options, stop: Stop) -> None:
        self.plan, self.options, self.stop, self.summary = plan, options, stop, Summary()
        self._failed: set[tuple[str, str]] = set()
        again = any(map(reads_inputs, plan.experiment.metrics.values()))
        self.kept = Kept() if again and can_be_kept(plan.experiment.dataset) else None

    def fail(self, uid: str, place: str, reason: str) -> None:
        """``place`` as in ``Ledger.add``."""
        self.plan.cell.ledger.add(uid, self.plan.fingerprints[uid], place, reason)
        self._failed.add((uid, place))
        self.summary.failed = len(self._failed)
        log.warning("%s failed for %s: %s", place, uid, reason)

    @property
    def without_map(self) -> set[str]:
        """Samples that could not be read or explained, so that nothing of them can be scored either."""
        return {uid for uid, place in self._failed if place in ("load", "maps")}


class Stage(ABC):
    """One kind of result for the samples of a run: their maps, or their scores by one metric.

    name     what hooks and people read: "maps", or the name of the metric
    place    where the results lie, and what the ledger says: "maps", or the folder of the scores
    done     samples that have a result: it was there, it was computed, or another process did so meanwhile
    failed   samples that this run could not do
    budget   how many samples are computed at once
    buffers  what keeps the results until they are written, in the order in which that must happen
    """

    buffers: tuple[Buffered, ...]

    def __init__(self, shared: Shared, name: str, place: str, done: Iterable[str], *, asks_method: bool) -> None:
        self.shared, self.plan, self.name, self.place = shared, shared.plan, name, place
        self.done, self.failed = set(done), set[str]()
        experiment = shared.plan.experiment
        self.budget = Budget(shared.options.explained, experiment.model, experiment.method if asks_method else None)

    def todo(self) -> list[str]:
        """The samples that can be done now."""
        return [uid for uid in self.plan.uids if uid not in self.done and uid not in self.failed]

    @property
    def left(self) -> int:
        """How many samples are still to be done."""
        return len(set(self.plan.uids) - self.done - self.failed - self.shared.without_map)

    @property
    def all_failed(self) -> bool:
        return bool(self.failed) and not self.done

    @property
    def unwritten(self) -> int:
        """How many results were computed that are not on disk."""
        return self.buffers[-1].unwritten

    @abstractmethod
    def begin(self, todo: Sequence[str]) -> Samples:
        """Get ready for ``todo``. Returns where these samples are read from."""

    @abstractmethod
    def compute(self, batch: Batch) -> Result:
        """Compute and keep. A sample whose result is of no use fails by itself; an error concerns the whole batch."""

    @abstractmethod
    def present(self, uids: Sequence[str]) -> set[str]:
        """Which of these samples another process has done meanwhile."""

    def flush_if_due(self) -> None:
        if self.buffers[0].flush_if_due():
            for buffer in self.buffers[1:]:
                buffer.flush()

    def flush(self) -> None:
        for buffer in self.buffers:
            buffer.flush()

    def fail(self, uid: str, reason: str, *, unread: bool = False) -> None:
        """``unread``: it is the sample itself that cannot be read."""
        self.failed.add(uid)
        self.shared.fail(uid, "load" if unread else self.place, reason)

    def attempt(self, batch: Batch) -> Result:
        """``compute`` of the batch, or of pieces of it.

        If memory runs out, half as many samples at once from now on; after any other error each
        sample of the batch alone, so that only the guilty ones are lost. Errors of a device that failed for good
        are raised: every sample would seem guilty.
        """
        model, budget = self.plan.experiment.model, self.budget
        if len(batch) > budget.most:
            return self._pieces(batch, budget.most)
        rows = model.rows
        try:
            return self.compute(batch)
        except UserError:
            raise
        except Exception as error:  # a method or metric may raise anything
            if is_lost(error):
                log.error(LOST, model.device, error)
                raise
            full = is_out_of_memory(error)
            if len(batch) == 1 and not full and not isinstance(error, SampleError):
                log.exception("%s of %s", self.place, batch.uids[0])
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if full and str(error) else error}"
        if full:  # outside the except block, whose traceback keeps the batch's tensors alive
            release_memory(model.device)
            model.rows = rows  # halved in vain, perhaps to one: it was the samples that had no room
        if len(batch) == 1:
            self.fail(batch.uids[0], f"{reason}; {NO_ROOM}" if full else reason)
            return (), {}
        if full:
            budget.halve(len(batch))
        return self._pieces(batch, budget.most if full else 1)

    def _pieces(self, batch: Batch, size: int) -> Result:
        uids: tuple[str, ...] = ()
        parts: dict[str, list[np.ndarray]] = {}
        start = 0
        while start < len(batch) and not (start and self.shared.stop()):
            end = start + min(size, self.budget.most)
            succeeded, arrays = self.attempt(batch[start:end])
            start = end
            uids += succeeded
            for name, value in arrays.items():
                parts.setdefault(name, []).append(value)
        return uids, {name: np.concatenate(values) for name, values in parts.items()}


class Maps(Stage):
    """The maps, extras and documents of each sample. ``state()``: the fitted state, fitted when asked for."""

    def __init__(self, shared: Shared, state: Callable[[], State]) -> None:
        plan, self.state = shared.plan, state
        super().__init__(shared, "maps", "maps", plan.present, asks_method=True)
        self._store, self._root = plan.cell.maps, Path(shared.options.root)
        self.buffers = (self._store,)
        self._samples = plan.experiment.samples(plan.uids, shared.options.read, shared.kept)
        self._inputs = KeptInputs(plan, self._samples, self._root, shared.stop)
        self._meter = Meter(plan.experiment.model)
        self._lost: dict[Key, Mapping[str, Any]] = {}  # maps that were damaged -> what was noted beside them
        shared.summary.maps_present = len(self.done)

    def begin(self, todo: Sequence[str]) -> Samples:
        self._inputs.begin()
        return self._samples

    def flush_if_due(self) -> None:
        super().flush_if_due()
        self._inputs.check()

    def flush(self) -> None:
        super().flush()
        self._inputs.finish()

    def compute(self, batch: Batch) -> Result:
        experiment, fingerprints = self.plan.experiment, self.plan.fingerprints
        method = experiment.method
        self._meter.begin()
        arrays = checked(method, batch, experiment.explain(batch, self.state()))
        cost = self._meter.each(len(batch))
        finite = np.ones(len(batch), dtype=bool)
        for name in method.MAPS:
            finite &= np.isfinite(arrays[name]).reshape(len(batch), -1).all(1)
        for i, uid in enumerate(batch.uids):
            if not finite[i]:
                self.fail(uid, "the map has NaN or infinite values")
                continue
            length = None if batch.lengths is None else int(batch.lengths[i])
            per_token = () if length is None else (*method.MAPS, *method.TOKENS)
            one = {name: value[i, :length] if name in per_token else value[i] for name, value in arrays.items()}
            self._store.add(uid, fingerprints[uid], one, target=plain(batch.target[i]), **cost)
            self.shared.summary.maps_computed += 1
            self.done.add(uid)
            self._lost.pop(self.plan.key(uid), None)
        return _only(batch.uids, arrays, finite)

    def present(self, uids: Sequence[str]) -> set[str]:
        index = self._store.index(patient=True)
        return {u for u in uids if self.plan.key(u) in index}

    # ---- stored maps --------------------------------------------------------------------------

    def targets(self, uids: Iterable[str]) -> dict[str, Any]:
        """What the maps of these samples explain; without those that have no map, nor one that can be made again."""
        lost = {key: info for key, info in self._lost.items() if key[0] not in self.failed}
        stored, keys = self._store.index(), {uid: self.plan.key(uid) for uid in uids}
        noted = {uid: stored[key].info if key in stored else lost.get(key) for uid, key in keys.items()}
        return {uid: info["target"] for uid, info in noted.items() if info is not None}

    def read(self, uid: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Stored arrays of a sample; what turns out to be damaged, or gone, is computed again.

        Raises SampleError if that fails, KeyError for what was never stored.
        """
        key = self.plan.key(uid)
        if key not in self._lost:
            try:
                return self._store.read(key, names)
            except (DamagedError, FileNotFoundError):
                with self.shared.stop.deferred():  # what is recovered must be written
                    self._recover(key)
        if key in self._lost:
            if uid not in self.failed:
                batch, target = self._samples.batch([uid]), [self._lost[key]["target"]]
                self.attempt(dataclasses.replace(batch, target=batch.target.new_tensor(target)))
            if key in self._lost:
                raise SampleError("its map was damaged, and could not be computed again")
        return self._store.read(key, names)

    def _recover(self, key: Key) -> None:
        """Keep what is good in the chunk of this sample; the rest is to do again."""
        lost = recover(self._store, self._store.index()[key].path, self._root)
        self._lost |= lost
        mine = {u for u in self.plan.uids if self.plan.key(u) in lost}
        self.done -= mine
        self.shared.summary.maps_present -= len(mine & self.plan.present)


class Scores(Stage):
    """The scores of one metric."""

    def __init__(self, maps: Maps, name: str) -> None:
        plan, self._maps = maps.plan, maps
        self._metric = plan.experiment.metrics[name]
        folder = metric_folder(plan.experiment, name)
        super().__init__(maps.shared, name, folder, plan.scored[name], asks_method=self._metric.NEEDS_EXPLAIN)
        self._curves, self._rows = plan.cell.curves(folder), plan.cell.scores(folder)
        self.buffers = (self._curves, self._rows)  # a sample whose rows are there has its curves too
        self._targets: dict[str, Any] = {}
        self._on_disk: Set[Key] = set()
        self._looked = 0.0
        self.shared.summary.scores_present += len(self.done)

    def todo(self) -> list[str]:
        self._targets = self._maps.targets(super().todo())
        return list(self._targets)

    def begin(self, todo: Sequence[str]) -> Samples:
        spec, precision = keys.spec(self._metric), self.plan.experiment.score_precision
        if precision != "float32":
            spec = {**spec, "precision": precision}
        about = getattr(self._metric, "ABOUT", {})  # as below: a user's metric may be older
        bounds = getattr(self._metric, "BOUNDS", {})
        _describe(self._rows, self.name, spec, self._metric.COLUMNS, self._metric.CURVES, about, bounds)
        self._looked = time.monotonic()
        shared, inputs = self.shared, reads_inputs(self._metric)
        return self.plan.experiment.stored_samples(todo, shared.options.read, inputs=inputs, kept=shared.kept)

    def compute(self, batch: Batch) -> Result:
        start = time.perf_counter()
        experiment, metric = self.plan.experiment, self._metric
        target = torch.tensor([self._targets[u] for u in batch.uids], device=batch.x.device)
        batch = dataclasses.replace(batch, target=target)
        values: list[dict[tuple[str, str], float]] = [{} for _ in batch.uids]
        curves: list[dict[str, np.ndarray]] = [{} for _ in batch.uids]
        read = [self._maps.read(u, experiment.method.MAPS) for u in batch.uids]
        found: dict[str, np.ndarray] = {}
        for kind in experiment.method.MAPS:
            maps = _stacked([r[kind] for r in read], batch).to(experiment.model.device, experiment.model.dtype)
            scores = experiment.score(self.name, batch, maps, self._explain(kind))
            found = {key: value.detach().cpu().double().numpy() for key, value in scores.items()}
            for i in range(len(batch)):
                values[i] |= {(kind, c): float(found[c][i]) for c in metric.COLUMNS}
                curves[i] |= {f"{kind}/{c}": found[c][i].astype(np.float32) for c in metric.CURVES}
        seconds = (time.perf_counter() - start) / len(batch)
        finite = np.array([all(np.isfinite(list(v.values()))) for v in values])
        for i, uid in enumerate(batch.uids):
            if not finite[i]:
                self.fail(uid, why_undefined(batch, i, metric.NEEDS_ROI))
                continue
            self._curves.add(uid, self.plan.fingerprints[uid], curves[i], seconds=seconds)
            self._rows.add(uid, self.plan.fingerprints[uid], values[i])
            self.shared.summary.scores_computed += 1
            self.done.add(uid)
        return _only(batch.uids, found, finite)

    def _explain(self, kind: str) -> Explain:
        """What a metric that asks for other maps gets: the method's map of this name."""
        return lambda batch: self.plan.experiment.explain(batch, self._maps.state())[kind]

    def present(self, uids: Sequence[str]) -> set[str]:
        if time.monotonic() - self._looked > LOOK_EVERY:
            on_disk: Set[Key] = self._rows.present()
            if self._metric.CURVES:
                on_disk = on_disk & self._curves.index().keys()
            self._on_disk, self._looked = on_disk, time.monotonic()
        return {u for u in uids if self.plan.key(u) in self._on_disk}


def own_scores(maps: Maps) -> None:
    """Write the columns that the method itself has (``Method.COLUMNS``) as scores of all samples whose maps are stored.

    From what lies beside the maps, so that a killed run leaves nothing out.
    """
    plan, method = maps.plan, maps.plan.experiment.method
    for column, direction in method.COLUMNS.items():
        folder = f"{column}.{keys.digest(column)[:8]}"
        rows = plan.cell.scores(folder)
        present = rows.present()
        missing = maps.targets(u for u in plan.uids if plan.key(u) not in present)
        if missing:
            _describe(rows, column, {"class": column}, {column: direction}, {}, {column: method.EXTRAS.get(column, "")})
        for uid in missing:
            try:
                value = float(maps.read(uid, [column])[column])
            except (KeyError, SampleError) as error:
                maps.shared.fail(uid, folder, str(error))
                continue
            rows.add(uid, plan.fingerprints[uid], {(name, column): value for name in method.MAPS})
        maps.flush()  # those that had been damaged
        rows.flush()


def _describe(
    rows: ScoreRows,
    name: str,
    spec: Any,
    columns: Mapping[str, str],
    curves: Mapping[str, str],
    about: Mapping[str, str],
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """``metric.json`` of a folder of scores, unless it is there."""
    path = rows.folder / "metric.json"
    if not path.exists():
        declared = {"columns": dict(columns), "curves": dict(curves)}
        said = {"about": {c: about[c] for c in columns if about.get(c)}, "bounds": dict(bounds or {})}
        write_json(path, {"name": name, "spec": spec, **declared, **said})


def _only(uids: tuple[str, ...], arrays: Mapping[str, np.ndarray], keep: np.ndarray) -> Result:
    """Those samples of a result that ``keep``, (B,) bool, says."""
    return tuple(u for u, k in zip(uids, keep) if k), {name: value[keep] for name, value in arrays.items()}


def _stacked(maps: Sequence[np.ndarray], batch: Batch) -> Tensor:
    """One tensor; the maps of texts are stored at their own lengths, and get the batch's padding back."""
    if batch.lengths is not None:
        maps = [np.pad(m, (0, batch.x.shape[1] - len(m))) for m in maps]
    return torch.from_numpy(np.stack(maps))


def why_undefined(batch: Batch, i: int, needs_roi: bool) -> str:
    if needs_roi and (batch.roi is None or not batch.roi[i].any()):
        return "the score is not defined (NaN); the sample has no region of interest"
    return "the score is not defined (NaN) for this sample or map"
