"""What a run would do: which samples, which cell, what it already holds."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attrib
from attrib import keys
from attrib.experiment.cell import Experiment
from attrib.experiment.regions import check_regions
from attrib.models import Classifier
from attrib.models.structure import own_code
from attrib.models.variant import Variant
from attrib.process.garbage import uncollected
from attrib.process.git import git_commit
from attrib.process.signals import Stop
from attrib.running.fingerprints import Fingerprints
from attrib.running.options import Options
from attrib.running.states import load_confidence, state_path
from attrib.store.arrays import mean_seconds
from attrib.store.cell import FORMAT, Arrays, Cell, cells
from attrib.store.files import Key
from attrib.types import UNREADABLE, UserError


@dataclass
class Plan:
    """What a run of an experiment would do."""

    experiment: Experiment
    cell: Cell
    selected: tuple[str, ...]  # by the rules of the dataset, before limit and shard
    asked: tuple[str, ...]  # those within the limit, of all shards together
    uids: tuple[str, ...]  # of this run
    fingerprints: dict[str, str]
    state_key: str | None
    original: str | None  # key of the cell of the net whose randomised copy is explained here
    fitted: bool = True  # whether the method's state is stored
    fits: int = 0  # samples that it is fitted on
    present: set[str] = field(default_factory=set)
    scored: dict[str, set[str]] = field(default_factory=dict)
    alike: Sequence[Cell] = ()  # in which it is recorded how long a sample takes, the nearest first

    @cached_property
    def seconds(self) -> float | None:
        """Per map, from what is recorded."""
        return _mean_seconds(cell.maps for cell in self.alike)

    @cached_property
    def score_seconds(self) -> dict[str, float]:
        """Per score of each metric, from what is recorded."""
        folders = {name: metric_folder(self.experiment, name) for name in self.scored}
        means = {name: _mean_seconds(cell.curves(folder) for cell in self.alike) for name, folder in folders.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def key(self, uid: str) -> Key:
        return uid, self.fingerprints[uid]

    def refresh_fingerprints(self, uids: Iterable[str]) -> None:
        """Take the fingerprints of files that could not be read when the run was planned, and now could."""
        for uid in uids:
            if self.fingerprints[uid] == UNREADABLE:
                self.fingerprints[uid] = self.experiment.dataset.fingerprint(uid)

    @property
    def to_explain(self) -> list[str]:
        """The samples that need the method: maps are missing, or scores of a metric that asks for maps."""
        asking = [self.scored[name] for name, metric in self.experiment.metrics.items() if metric.NEEDS_EXPLAIN]
        return [uid for uid in self.uids if any(uid not in done for done in (self.present, *asking))]

    @property
    def explains(self) -> bool:
        return bool(self.to_explain)

    def __str__(self) -> str:
        missing = len(self.uids) - len(self.present)
        lines = [
            f"{self.cell.folder.name}: {len(self.uids)} samples, {len(self.present)} maps present, {missing} to compute"
        ]
        if self.experiment.method.fit is not None and self.explains:
            what, of = type(self.experiment.method.fit).__name__, f"{self.fits} samples"
            lines.append(f"  {what}: fitted on {of}" if self.fitted else f"  {what}: to be fitted first, on {of}")
        for name, done in self.scored.items():
            due = len(self.uids) - len(done)
            each = self.score_seconds.get(name) if due else None
            time = f", about {each * due:.0f} s" if each is not None else ""
            lines.append(f"  {name}: {len(done)} present, {due} to compute{time}")
        if missing and self.seconds is not None:
            total = self.seconds * missing
            lines.append(f"  about {total:.0f} s for the maps ({self.seconds:.3g} s per sample recorded)")
        elif missing:
            lines.append("  no time recorded yet for this method")
        return "\n".join(lines)


def metric_folder(experiment: Experiment, name: str) -> str:
    return f"{name}.{experiment.metric_key(name)[:8]}"


def make_plan(experiment: Experiment, options: Options, writer: str = "", stop: Stop | None = None) -> Plan:
    """Selects the samples, finds the cell and what it already holds. Computes no maps.

    Raises UserError, also for a work directory that cannot be read.
    """
    try:
        return _planned(experiment, options, writer, stop)
    except NotADirectoryError as error:
        raise UserError(
            f"{error.filename}: a folder belongs there, and it is something else, or lies in what is; move that away, "
            "or take another run.root"
        ) from error
    except OSError as error:
        raise UserError(f"run.root={options.root} cannot be read: {error}; take another run.root") from error


def _planned(experiment: Experiment, options: Options, writer: str, stop: Stop | None) -> Plan:
    root = Path(options.root)
    prints = Fingerprints(root, writer)
    whole = experiment.samples(experiment.dataset.uids, options.read)
    selected = experiment.select.apply(experiment.dataset, lambda u: load_confidence(root, whole, u, stop, prints))
    asked = selected[: options.limit]
    uids = tuple(u for u in asked if keys.shard_of(u, options.shards) == options.shard)
    fitted_on = None if experiment.method.fit is None else experiment.estimation_samples(options.read)
    if fitted_on is not None:
        prints.of(fitted_on.dataset, fitted_on.uids)
    state_key = None if fitted_on is None else experiment.state_key(fitted_on)
    folder = root / experiment.folder(experiment.cell_key(state_key))
    cell = Cell(folder, writer, flush_seconds=options.flush)
    fingerprints = prints.of(experiment.dataset, uids)
    prints.save()
    original = experiment.original_key(fitted_on)
    fitted = state_key is None or state_path(root, state_key).exists()
    fits = 0 if fitted_on is None else len(fitted_on.uids)
    found = Plan(experiment, cell, selected, asked, uids, fingerprints, state_key, original, fitted, fits)
    found.alike = _alike(cell, root)
    _look(found)
    return found


@uncollected()
def _look(plan: Plan) -> None:
    """What of a plan is stored."""
    index = plan.cell.maps.index()
    plan.present = {uid for uid in plan.uids if plan.key(uid) in index}
    for name, metric in plan.experiment.metrics.items():
        scored = whole_scores(plan.cell, metric_folder(plan.experiment, name), metric.CURVES)
        plan.scored[name] = {uid for uid in plan.uids if plan.key(uid) in scored}


def whole_scores(cell: Cell, folder: str, curves: Collection[str]) -> Set[Key]:
    """The samples whose rows are stored and, if the metric has ``curves``, those too: curves alone may be lost."""
    scored = cell.scores(folder).present()
    return scored & cell.curves(folder).index().keys() if curves and scored else scored


def check_metrics(plan: Plan) -> None:
    """Before anything is computed or written. Raises UserError for a metric of regions on a dataset that has none."""
    experiment = plan.experiment
    check_regions(experiment.metrics, experiment.dataset, plan.uids, experiment.names["dataset"])


def _alike(cell: Cell, root: Path) -> list[Cell]:
    """This cell, and others with the same model and method names: what is recorded there says how long it takes."""
    names = cell.folder.name.split(".")[1:3]
    return [cell, *(c for c in cells(root) if c.folder != cell.folder and c.folder.name.split(".")[1:3] == names)]


def _mean_seconds(stored: Iterable[Arrays]) -> float | None:
    """Mean seconds per sample of the first store that has any; of a few of its chunks."""
    for arrays in stored:
        if (seconds := mean_seconds(arrays.sampled())) is not None:
            return seconds
    return None


def spec_of(plan: Plan) -> dict[str, Any]:
    """What stands in a cell's spec.json: enough to know what its numbers are."""
    experiment = plan.experiment
    return {
        "format": FORMAT,
        "names": dict(experiment.names),
        "key": experiment.cell_key(plan.state_key),
        "dataset_key": experiment.dataset_key,
        "modality": experiment.dataset.modality,
        "state_key": plan.state_key,
        "model_key": experiment.model.key,
        "weights": experiment.model.weights,
        "exam": exam_of(experiment.model),
        "output": _output(experiment.model),
        "layers": experiment.layers,
        **({} if experiment.model.precision == "float32" else {"precision": experiment.model.precision}),
        **_defaults(experiment),
        "seed": experiment.seed,
        "method": keys.spec(experiment.method),
        "maps": dict(experiment.method.MAPS),
        "extras": dict(experiment.method.EXTRAS),
        "documents": dict(experiment.method.DOCUMENTS),
        "pictures": experiment.pictures_key,
        "config": dict(experiment.config),
        "versions": {
            "attrib": attrib.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "git": git_commit(),
        **({"code": code} if (code := _own_code(experiment)) else {}),
        **({} if experiment.model.variant is None else {"randomised": _randomised(experiment.model.variant, plan)}),
    }


def _own_code(experiment: Experiment) -> dict[str, str]:
    """Digests of the code of a model and a method that are somebody's own."""
    classes = {"model": map(type, experiment.model.original.module.modules()), "method": [type(experiment.method)]}
    return {part: found for part, kinds in classes.items() if (found := own_code(*kinds)) is not None}


def exam_of(model: Classifier) -> dict[str, Any] | None:
    """What the net did with two inputs, as plain data."""
    return None if model.exam is None else keys.spec(asdict(model.exam))


def _output(model: Classifier) -> dict[str, Any]:
    """What is explained: how the scores are read, how probabilities are made of them, and the names of the classes."""
    names = model.class_names
    return {
        "read": model.output.read.READ,
        "probabilities": model.link,
        "class_names": None if names is None else list(names),
    }


def _defaults(experiment: Experiment) -> dict[str, Any]:
    """Why those layers were chosen that nobody named."""
    found = experiment.model.original.roles.found
    why = {role: found[role].why for role in experiment.layers if role in found}
    return {"default_layers": why} if why else {}


def _randomised(variant: Variant, plan: Plan) -> dict[str, Any]:
    """What a sanity check needs to know: ``attrib.sanity`` reads it."""
    return {
        "original": plan.original,
        "model": plan.experiment.original.key,
        "layers": list(variant.layers),
        "place": variant.place,
        "total": variant.total,
        "mode": variant.how.mode,
        "seed": variant.how.seed,
    }
