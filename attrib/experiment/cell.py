"""One cell of a table: what is computed, and the keys that say so."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrib import keys
from attrib.classes import ClassNames, listed
from attrib.datasets import Dataset, Selection
from attrib.experiment.originals import Originals
from attrib.experiment.reading import Kept
from attrib.experiment.samples import Samples, example
from attrib.experiment.targets import Contrast, Target, matched, parsed, rules_of
from attrib.fit import State
from attrib.methods import Method
from attrib.metrics import Metric
from attrib.metrics.metric import Explain
from attrib.models import Classifier
from attrib.models.every_word import check_every_word, embeds
from attrib.models.precision import Arithmetic
from attrib.models.reading import taken_before
from attrib.noise import Noise
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class Experiment:
    """A dataset, a model, a method and metrics. How it is run (``plan.Options``) is not part of it.

    names    labels for people and folders: {"dataset": "photos", "model": ..., "method": ...}
    target   which class is explained, see ``samples.Samples`` and ``targets``; here also by name
    estimation   what the method's state is fitted on; None if it has none
    config   the resolved configuration it was built from, kept for the record
    scorer   the net as metrics see it, if it is computed in another arithmetic there; None: ``model``
    """

    names: Mapping[str, str]
    dataset: Dataset
    model: Classifier
    method: Method
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    target: Target | Any = "label"
    select: Selection = field(default_factory=Selection)
    estimation: Dataset | None = None
    estimation_select: Selection = field(default_factory=Selection)
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    scorer: Classifier | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a method or metric that does not fit the dataset or the model's output."""
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}")
        holds = self.dataset.modality
        fitting = ",".join(name for name, metric in self.metrics.items() if holds in metric.MODALITIES)
        advice = dict.fromkeys(self.metrics, f"take metric=[{fitting}]" if fitting else "leave it out")
        parts: dict[str, Method | Metric] = {self.names["method"]: self.method, **self.metrics}
        for name, part in parts.items():
            if holds not in part.MODALITIES:
                raise UserError(
                    f"{name} is for {' and '.join(part.MODALITIES)} data, but dataset {self.names['dataset']} holds "
                    f"{holds}; {advice.get(name, 'docs/use.md lists the methods for it')}"
                )
        object.__setattr__(self, "target", parsed(self.target, self._known_classes))
        self._check_output()
        if isinstance(self.target, Contrast):
            self._check_contrast(self.target)

    @property
    def _known_classes(self) -> ClassNames | None:
        """Among which a name in ``target`` is found: the net's, or the dataset's if these are numbered as the net's."""
        names = self.dataset.names
        if self.model.original.classes is not None or sorted(names) != list(range(len(names) or -1)):
            return self.model.original.classes
        if self.model.known_outputs not in (None, len(names)):
            return None
        return ClassNames.of([names[i] for i in range(len(names))], f"dataset {self.names['dataset']}")

    def _check_contrast(self, contrast: Contrast) -> None:
        """Raises UserError for a method or metric for which the difference of two scores makes no sense."""

        def able(part: Method | Metric) -> bool:
            return bool(getattr(part, "CONTRASTS", False)) and not getattr(part, "NEEDS_PROBABILITIES", False)

        why = "needs the probability of a class, or knows one class only"
        if not able(self.method):
            raise UserError(
                f"dataset.target={contrast}: method {self.names['method']} {why}; {_set(self.method, 'method')}take a "
                "method that explains the score itself, such as gradient, integrated_gradients, occlusion, lime, "
                "grad_cam or cd"
            )
        fit = [name for name, metric in self.metrics.items() if able(metric)]
        for name, metric in self.metrics.items():
            if name not in fit:
                raise UserError(
                    f"dataset.target={contrast}: metric {name} {why}; {_set(metric, f'metric.{name}')}take "
                    f"metric=[{','.join(fit)}]"
                )

    def _check_output(self) -> None:
        """Raises UserError for whatever asks for probabilities, or for the net's decision, where there is none."""
        model, read = self.model, f"model.output.read={self.model.output.read.READ}"
        if model.link is None:
            if getattr(self.method, "NEEDS_PROBABILITIES", False):
                raise UserError(
                    f"method {self.names['method']} works with the probabilities of classes, and with {read} there are "
                    f"none; {_set(self.method, 'method')}take a method that explains the score itself, such as "
                    "gradient, integrated_gradients, occlusion, lime, grad_cam or cd"
                )
            able = [n for n, m in self.metrics.items() if not getattr(m, "NEEDS_PROBABILITIES", False)]
            for name, metric in self.metrics.items():
                if name not in able:
                    raise UserError(
                        f"metric {name} works with the probabilities of classes, and with {read} there are none; "
                        f"{_set(metric, f'metric.{name}')}take metric=[{','.join(able)}]"
                    )
            for select, where in ((self.select, "dataset"), (self.estimation_select, "dataset.estimation")):
                if select.min_confidence is not None:
                    raise UserError(
                        f"{where}.select.min_confidence asks for the probability of the target, and with {read} there "
                        "are none; set it to null"
                    )
        asked = [rule for rule in rules_of(self.target) if rule in ("predicted", "second")]
        if asked and not model.output.read.decides:
            raise UserError(
                f"dataset.target={asked[0]}: with {read} the net decides for no class; say what is explained by number "
                "(dataset.target=0), or take the dataset's labels (dataset.target=label)"
            )

    def samples(self, uids: Sequence[str], batch: int, kept: Kept | None = None) -> Samples:
        return Samples(self.dataset, self.model, uids, target=self.target, batch=batch, classes=self.classes, kept=kept)

    def stored_samples(
        self, uids: Sequence[str], batch: int, *, inputs: bool = True, kept: Kept | None = None
    ) -> Samples:
        """For work on stored maps, which say themselves what they explain; without ``inputs`` on maps and regions."""
        inputs = inputs or self.model.output.read.per_sample or not hasattr(self.dataset, "regions")
        return Samples(self.dataset, self.model, uids, target=None, batch=batch, inputs=inputs, kept=kept)

    @cached_property
    def classes(self) -> Mapping[int, int] | None:
        """Class of the dataset -> class of the net; None where the numbers are the same, or not asked for.

        Raises UserError for a class of the samples that the net does not have.
        """
        return self._matched(self.dataset, self.select, "dataset")

    @cached_property
    def _estimation_classes(self) -> Mapping[int, int] | None:
        assert self.estimation is not None
        return self._matched(self.estimation, self.estimation_select, "dataset.estimation")

    def _matched(self, dataset: Dataset, select: Selection, where: str) -> Mapping[int, int] | None:
        if "label" not in rules_of(self.target):
            return None
        names, outputs = dataset.names, self.model.known_outputs
        if self.model.classes is None and outputs is not None and max(names, default=-1) >= outputs:
            raise UserError(
                f"{where}: the data have classes up to {max(names)} ({listed(names.values())}), the net has {outputs}, "
                "and nothing says what those are called; name them as model.classes, or explain "
                "dataset.target=predicted"
            )
        return matched(dataset, self.model.classes, select.listed(dataset), where)

    def class_name(self, index: int) -> str:
        """What the net or, where it has no names and as many classes, the dataset calls a class; "" if neither does."""
        model, names = self.model.original, self.dataset.names
        if model.classes is not None:
            return model.classes.shown(index) if index < len(model.classes) else ""
        known = model.known_outputs
        theirs = known is not None and max(names, default=-1) >= known
        numbered = getattr(self.dataset, "numbering", "given") == "given" or "label" in rules_of(self.target)
        return names.get(index, "") if numbered and not theirs else ""

    def explain(self, batch: Batch, state: State) -> Mapping[str, Any]:
        """What the method says of a batch, with random numbers of the samples' own."""

        self._check_words(self.model, lambda: self.layers, batch)

        def attribute(some: Batch, _rows: slice) -> Mapping[str, Any]:
            noise = Noise(some.uids, self.seed, self.model.device, self.model.dtype)
            return self.method.attribute(self.model, some, state, noise)

        return self.of_samples(batch, attribute)

    def score(self, name: str, batch: Batch, maps: Tensor, explain: Explain | None = None) -> Mapping[str, Tensor]:
        """What a metric says of ``maps`` (B, *places); ``explain`` is for one that asks for other maps."""
        metric, model = self.metrics[name], self.scorer or self.model
        more = {"explain": explain} if metric.NEEDS_EXPLAIN else {}
        if not model.output.read.per_sample:
            batch = self._originals.told(name, model, batch)
        self._check_words(model, lambda: metric.roles, batch)

        def scored(some: Batch, rows: slice) -> Mapping[str, Tensor]:
            noise = Noise(some.uids, self.seed, maps.device, maps.dtype).child(name)
            return metric.score(model, some, maps[rows], noise, **more)

        return self.of_samples(batch, scored)

    def _check_words(self, model: Classifier, roles: Callable[[], Iterable[str]], batch: Batch) -> None:
        """Raises UserError for a text net that reads its words not only by the layer where they are explained."""
        if batch.words is None:
            return
        for path, role in {model.roles.path(role): role for role in roles() if embeds(model, role)}.items():
            if path not in self._words_tried and check_every_word(model, role, batch):
                self._words_tried.add(path)

    @cached_property
    def _originals(self) -> Originals:
        asking = {n: getattr(metric, "NEEDS_LOGITS", ()) for n, metric in self.metrics.items()}  # a user's may be older
        return Originals([n for n, data in asking.items() if self.dataset.modality in data], len(self.method.MAPS))

    @cached_property
    def _words_tried(self) -> set[str]:
        return set()

    def examine(self, uids: Sequence[str]) -> None:
        """Try the net on the first two different of these samples that can be read (``models.exam``).

        Both come together, so that it is tried on one alone only if there is no other. Raises UserError for a net that
        is refused.
        """
        first: Batch | None = None
        for uid in uids:
            if self.model.exam is not None and self.model.exam.on == "samples":
                return
            try:
                batch = self.dataset.batch([uid] if first is None else [first.uids[0], uid])
            except Exception:  # whoever asks for its map will be told
                continue
            if first is None:
                first = batch
            else:
                self._examine(batch)
        if first is not None:
            self._examine(first)

    def _examine(self, batch: Batch) -> None:
        batch = batch.to(self.model.device, self.model.dtype)
        self.model.examine(batch.x, batch.lengths)

    def of_samples(self, batch: Batch, function: Callable[[Batch, slice], Mapping[str, Any]]) -> Mapping[str, Any]:
        """``function(batch, rows)``; where scores depend on the sample that is explained, of one sample at a time."""
        if not self.model.output.read.per_sample:
            return function(batch, slice(0, len(batch)))
        found: list[Mapping[str, Any]] = []
        for i in range(len(batch)):
            one = batch[i : i + 1]
            with self.model.explaining(one.x, one.target):
                found.append(function(one, slice(i, i + 1)))
        return {name: _joined([each[name] for each in found]) for name in found[0]}

    def estimation_samples(self, batch: int) -> Samples:
        """What the method's state is fitted on."""
        if self.estimation is None:
            raise UserError(f"{self.names['method']} needs an estimation set: dataset.estimation")
        fit, select = self.method.fit, self.estimation_select
        wanted = fit is None or fit.TARGETS
        classes = self._estimation_classes if wanted or select.min_confidence is not None else None

        def of(uids: Sequence[str], target: Target | None) -> Samples:
            assert self.estimation is not None
            return Samples(self.estimation, self.model, uids, target=target, batch=batch, classes=classes)

        chosen = select.apply(self.estimation, of(self.estimation.uids, self.target).confidence)
        return of(chosen, self.target if wanted else None)

    # ---- keys ---------------------------------------------------------------------------------

    @cached_property
    def dataset_key(self) -> str:
        """Which samples, explained for which class. A list file counts by its content."""
        more = [] if self.classes is None else [{"classes": sorted(self.classes.items())}]
        return keys.digest(self.dataset.key, self.target, _selection_spec(self.select), *more)

    @cached_property
    def pictures_key(self) -> str:
        """Of the inputs kept for the report, which bear the name of the class that the model is asked for."""
        names = self.model.original.class_names
        more = [] if names is None else [names]
        return keys.digest(self.dataset_key, self.model.original.key, *more)[:8]

    @property
    def layers(self) -> dict[str, str]:
        """Role -> path of the layers that the method reads. Raises UserError if the model does not have one."""
        text = self.method.TEXT_ROLES if self.dataset.modality == "text" else ()
        return self._layers([*self.method.roles, *text])

    def check_layers(self) -> None:
        """Raises UserError if the model has no layer for a role that the method or its fit reads."""
        self._layers([*self.layers, *(self.method.fit.roles if self.method.fit else ())])

    def _layers(self, roles: Sequence[str]) -> dict[str, str]:
        return {role: self._path(role) for role in roles}

    def _path(self, role: str) -> str:
        """One that nobody named may have to be found out, for inputs of this shape."""
        named = role in self.model.roles.named or self.dataset.modality == "text"
        return self.model.roles.path(role, None if named else self.model.input_shape or self._shape)

    @cached_property
    def readings(self) -> dict[str, str]:
        """Role -> how a layer is read that earlier versions took otherwise, see ``reading.taken_before``.

        Raises UserError if it cannot be found out which axes of a layer are space.
        """
        return self._readings(self.method.laid)

    def _readings(self, laid: Mapping[str, str]) -> dict[str, str]:
        asked = {role: said for role, said in laid.items() if said in ("auto", "tokens")}
        if not asked or self.dataset.modality == "text":
            return {}
        shape = self.model.input_shape or self._shape
        found = {role: self.model.roles.reading(role, shape, said) for role, said in asked.items()}
        image = (shape[-2], shape[-1])
        return {role: str(reading) for role, reading in found.items() if not taken_before(reading, image)}

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Of an input: that of the first that can be read. Raises UserError if none can."""
        return tuple(example(self.dataset).shape[1:])

    def state_key(self, samples: Samples, model: Classifier | None = None) -> str:
        """What the state is fitted on, sample by sample, and by what."""
        fit = self.method.fit
        assert fit is not None
        content = [(uid, samples.dataset.fingerprint(uid)) for uid in samples.uids]
        text = getattr(fit, "TEXT_ROLES", ()) if self.dataset.modality == "text" else ()  # few fits have any
        layers = self._layers([*fit.roles, *text])
        key = (model or self.model).key
        readings = self._readings(getattr(fit, "laid", {}))  # few fits lay anything out
        more: list[Any] = [readings] if readings else []
        if samples.target is not None and samples.classes is not None:
            more.append({"classes": sorted(samples.classes.items())})
        return keys.digest(fit, key, layers, samples.dataset.key, content, samples.target, *more)

    def cell_key(self, state_key: str | None, model: Classifier | None = None) -> str:
        key = (model or self.model).key
        more = [self.readings] if self.readings else []
        return keys.digest(self.dataset_key, key, self.layers, self.method, self.seed, state_key, *more)

    def original_key(self, samples: Samples | None) -> str | None:
        """The key of the same cell of the net that this one's is a randomised copy of; None if it is none.

        ``samples`` are those of the fit, if the method has one.
        """
        if self.model.variant is None:
            return None
        original = self.original
        return self.cell_key(None if samples is None else self.state_key(samples, original), original)

    @property
    def original(self) -> Classifier:
        """The net that this one is a randomised copy of, in the same arithmetic; else the net itself."""
        return self.model if self.model.variant is None else self.model.original.with_precision(self.model.precision)

    def metric_key(self, name: str) -> str:
        metric = self.metrics[name]
        read = self._layers([role for role in metric.roles if role in self.model.roles.named])
        more: list[Any] = [read] if read else []
        if self.score_precision != "float32":
            more.append({"precision": self.score_precision})
        return keys.digest(metric, self.seed, *more)

    @property
    def score_precision(self) -> Arithmetic:
        """The arithmetic in which metrics ask the net."""
        return (self.scorer or self.model).precision

    def folder(self, cell_key: str) -> str:
        """Names are labels that people choose: only plain characters become part of a path."""
        names = (self.names[part] for part in ("dataset", "model", "method"))
        plain = ("".join(c if c.isalnum() or c in "-_" else "-" for c in name) for name in names)
        return ".".join([*plain, cell_key[:8]])


def _set(part: Any, where: str) -> str:
    """What to set so that a method or metric goes without probabilities, if it can."""
    for name, wants, instead in (("output", "probability", "logit"), ("softmax", None, "false")):
        if hasattr(part, name) and wants in (None, getattr(part, name)):
            return f"set {where}.{name}={instead}, or "
    return ""


def _joined(values: list[Any]) -> Any:
    """The results of single samples as that of their batch."""
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else [one for value in values for one in value]


def _selection_spec(select: Selection) -> Any:
    if select.list is None:
        return select
    path = Path(select.list).expanduser()
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"select.list: {path} cannot be read: {error}") from error
    return dataclasses.replace(select, list=content)
