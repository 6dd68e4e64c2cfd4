"""Samples on their way from a dataset to a model: read ahead, moved to the device, target resolved."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from attrib.datasets import Dataset, Texts, holds_texts
from attrib.experiment.reading import Kept, Loaded, Reader
from attrib.experiment.targets import Contrast, Rule, Target, parsed, rules_of
from attrib.models import Classifier, probabilities
from attrib.models.device_memory import is_out_of_memory, release_memory
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)


def example(dataset: Dataset) -> Tensor:
    """The input (1, *input) of the first sample that can be read. Raises UserError if none can."""
    first = ""
    for uid in dataset.uids:
        try:
            return dataset.batch([uid]).x
        except Exception as error:  # the ledger will say so
            first = first or (str(error) if uid in str(error) else f"{uid}: {error}")
    raise UserError(f"no sample of the dataset can be read ({first or 'there is none'})")


def in_order(dataset: Dataset, uids: Sequence[str], batch: int | str | None) -> Sequence[str]:
    """Texts by their length, because a batch is padded to its longest; the order does not matter otherwise.

    The longest first: what fits them fits the others too. ``batch`` is how many are explained at once.
    """
    if not holds_texts(dataset) or batch == 1:
        return uids
    return sorted(uids, key=lambda uid: (-_length(dataset, uid), uid))


def _length(dataset: Texts, uid: str) -> int:
    try:
        return len(dataset.tokens(uid))
    except Exception:  # a user's dataset may raise anything
        return 0  # the ledger will say so


class Samples:
    """Some samples of a dataset as a model wants them, in batches.

    target   which class is explained: the dataset's label, the class the model predicts (of a copy with
             randomised layers: the class that the original predicts), the one it would predict next ("second"), the
             one with this number, or a contrast of two of these, see ``targets``; None leaves the dataset's target as
             it is, for work that needs none or knows it already
    inputs   false: the regions of images are read and not the images, so that ``Batch.x`` is (B, 0, H, W) and there
             are no targets
    classes  class of the dataset -> class of the net, see ``targets.matched``; None: the numbers are the same
    kept     where decoded images are looked for first, and left for others
    asked    see ``fit.FitData``
    Iterating skips what cannot be read, with a warning and an entry in ``skipped``.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: Classifier,
        uids: Sequence[str],
        *,
        target: Target | None = "label",
        batch: int = 8,
        classes: Mapping[int, int] | None = None,
        inputs: bool = True,
        kept: Kept | None = None,
    ) -> None:
        if batch < 1:
            raise UserError(f"run.batch must be at least 1, not {batch}")
        self.dataset, self.model = dataset, model
        self.target = None if target is None else parsed(target, model.classes)
        self.uids, self._size, self.classes = tuple(uids), batch, classes
        self._reader = Reader(dataset, inputs=inputs, kept=kept, pinned=model.device.type == "cuda")
        self.asked: frozenset[int] | None = None
        self.skipped: dict[str, str] = {}  # uid -> reason, of what iterating could not read

    def _ready(self, batch: Batch) -> Batch:
        labelled = "label" in rules_of(self.target)
        if labelled:
            batch = dataclasses.replace(batch, target=self._labels(batch))
        labels = batch.target.cpu()
        if batch.lengths is not None:
            self.model.output.read.check_texts(self.model.module, batch)
        batch = batch.to(self.model.device, self.model.dtype)
        if self.target is None:
            return batch
        if self.target in ("predicted", "second"):
            return dataclasses.replace(batch, target=self._chosen(batch, self.target))
        classes = self.model.outputs(batch.x)
        for rule in rules_of(self.target):
            if isinstance(rule, int) and rule >= classes:
                raise UserError(f"dataset.target={rule}, but the model's outputs are 0 to {classes - 1}")
        if labelled:
            self._check_labels(batch.uids, labels, classes)
        if not isinstance(self.target, Contrast):
            return dataclasses.replace(batch, target=self._chosen(batch, self.target))
        return dataclasses.replace(batch, target=self._contrast(batch, self.target, classes))

    def _chosen(self, batch: Batch, rule: Rule) -> Tensor:
        """The classes (B,) that a rule means; the labels may be (B, K)."""
        if rule == "label":
            return batch.target
        if isinstance(rule, int):
            return torch.full((len(batch),), rule, device=batch.x.device)
        logits = self.model.original.logits(batch.x)
        if rule == "predicted":
            return logits.argmax(1)
        if logits.shape[1] < 2:
            raise UserError("dataset.target=second: the model has one output only")
        # The first of equals is the prediction, as argmax has it.
        return logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf).argmax(1)

    def _contrast(self, batch: Batch, contrast: Contrast, classes: int) -> Tensor:
        """(B, K) with 1 for one class and -1 for the other. Raises SampleError where they are the same."""
        both = [self._chosen(batch, rule) for rule in (contrast.of, contrast.against)]
        if any(chosen.ndim != 1 for chosen in both):
            raise UserError(f"dataset.target={contrast}: the samples have several labels each, not one")
        for uid, of, against in zip(batch.uids, *(chosen.tolist() for chosen in both)):
            if of == against:
                raise SampleError(f"{uid}: {contrast.of} and {contrast.against} are the same class, {of}")
        of, against = (torch.nn.functional.one_hot(chosen, classes) for chosen in both)
        return of - against

    def _check_labels(self, uids: Sequence[str], targets: Tensor, classes: int) -> None:
        """Raises SampleError for one without label, or whose class the model does not have.

        On a GPU an index out of range would take the whole process down.
        """
        decides = self.model.output.read.decides
        own = "the model's own class with dataset.target=predicted, or " if decides else ""
        instead = f"; explain {own}one output of all with dataset.target=NUMBER"
        if targets.ndim == 2:
            self._check_several(uids, targets, classes, instead)
            return
        labels = targets.tolist()  # looked at by Python: at each call of torch the threads that read may take over
        if min(labels) < 0:
            uid = uids[labels.index(min(labels))]
            reason = getattr(self.dataset, "label_problems", {}).get(uid)
            raise SampleError(f"{uid} has no label{f' ({reason})' if reason else ''}{instead}")
        if max(labels) >= classes:
            uid = uids[labels.index(max(labels))]
            raise SampleError(
                f"{uid} has class {max(labels)}, but the model has {classes} classes; check the dataset's class "
                "index (dataset.classes) and the model, or explain one output of all with dataset.target=NUMBER"
            )

    def _check_several(self, uids: Sequence[str], targets: Tensor, classes: int, instead: str) -> None:
        """Of labels (B, K). Raises SampleError."""
        if targets.shape[1] != classes:
            raise SampleError(
                f"{uids[0]} has labels for {targets.shape[1]} classes, but the model has {classes}; the target of a "
                "sample with several labels has a 1 or a 0 for each class of the model"
            )
        for uid, row in zip(uids, targets):
            for label in ((row != 0) & (row != 1)).nonzero().flatten().tolist():
                value, names = row[label].item(), self.model.classes
                what = "" if names is None else f" ({names.shown(label)})"
                why = "unknown (-1)" if value == -1 else f"{value:.3g}, not 1 or 0"
                raise SampleError(f"{uid}: its label of class {label}{what} is {why}{instead}")
            if not row.any():
                raise SampleError(f"{uid} has no label: none of its {classes} labels is 1{instead}")

    def _labels(self, batch: Batch) -> Tensor:
        """The labels as numbers of the net's classes (B,), or a 1 for each of them (B, K).

        Raises SampleError for a class that the net does not know.
        """
        given = batch.target
        if given.ndim == 2:
            wide = len(self.model.classes or ())
            fewer = given.shape[1] < wide and given.shape[1] == len(self.dataset.names)
            if self.classes is None and not fewer:
                return given
            made = given.new_zeros(len(given), wide)
            for label in range(given.shape[1]):
                there = given[:, label] != 0
                if there.any():
                    found = self._of_the_net(batch.uids[int(there.int().argmax())], label)
                    made[:, found] = torch.where(there, given[:, label], made[:, found])
            return made
        if self.classes is None:
            return given
        numbers = zip(batch.uids, given.tolist())
        return torch.tensor([label if label < 0 else self._of_the_net(uid, label) for uid, label in numbers])

    def _of_the_net(self, uid: str, label: int) -> int:
        if self.classes is None:
            return label
        if label not in self.classes:
            name = self.dataset.names.get(label)
            raise SampleError(f"{uid} has class {label}{f' ({name})' if name else ''}, which the net does not know")
        return self.classes[label]

    def batch(self, uids: Sequence[str]) -> Batch:
        """Raises SampleError if one of them cannot be read or has no target."""
        return self._ready(self._reader.batch(uids))

    def load(self, chunks: Iterable[Sequence[str]]) -> Iterator[Loaded]:
        """Each chunk of uids as one batch, or several if the device has no room, read ahead."""
        with closing(self._reader.ahead(chunks)) as ahead:
            for loaded in ahead:
                yield from self._finish(loaded)

    def _finish(self, loaded: Loaded) -> Iterator[Loaded]:
        batch, bad = loaded
        if batch is None:
            yield None, bad
            return
        reason = ""
        try:
            ready = self._prepared(batch, bad)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            yield from self._lengths_apart(*ready)
            return
        release_memory(self.model.device)
        if len(batch) == 1:
            yield None, [*bad, (batch.uids[0], reason)]
            return
        half = len(batch) // 2
        yield from self._finish((batch[:half], bad))
        yield from self._finish((batch[half:], []))

    def _lengths_apart(self, batch: Batch | None, bad: list[tuple[str, str]]) -> Iterator[Loaded]:
        """The batch or, for a net that sees the padding of texts, one for each length in it, without padding."""
        if (
            batch is None
            or not self._reader.inputs
            or self.model.examine(batch.x, batch.lengths)
            or batch.lengths is None
        ):
            yield batch, bad
            return
        for _, alike in batch.by_length():
            yield alike, bad
            bad = []

    def _prepared(self, batch: Batch, bad: list[tuple[str, str]]) -> Loaded:
        try:
            return self._ready(batch), bad
        except SampleError as error:
            if is_out_of_memory(error):
                raise
            good = []
            for i, uid in enumerate(batch.uids):
                try:
                    self._ready(batch[[i]])
                    good.append(i)
                except SampleError as error:
                    bad = [*bad, (uid, f"SampleError: {error}")]
            return (self._ready(batch[good]) if good else None), bad

    def chunks(self, uids: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        uids = self.uids if uids is None else tuple(uids)
        return [uids[i : i + self._size] for i in range(0, len(uids), self._size)]

    def __iter__(self) -> Iterator[Batch]:
        for batch, unread in self.load(self.chunks()):
            for uid, reason in unread:
                if uid not in self.skipped:
                    log.warning("%s is left out of the estimation: %s", uid, reason)
                self.skipped[uid] = reason
            if batch is not None:
                yield batch

    def confidence(self, uids: Sequence[str]) -> Mapping[str, float]:
        """The (original) model's probability of the target, of the samples that can be read.

        Of several labels: that of the least probable, by sigmoids. Of a contrast: that of the class it is for.
        """
        found: dict[str, float] = {}
        for batch, _ in self.load(self.chunks(uids)):
            if batch is not None:
                target = batch.target.argmax(1) if isinstance(self.target, Contrast) else batch.target
                logits, several = self.model.original.logits(batch.x), target.ndim == 2
                probability = probabilities(logits, several, self.model.link)
                if several:
                    picked = probability.masked_fill(target != 1, torch.inf).amin(1)
                else:
                    picked = probability.gather(1, target[:, None])[:, 0]
                found |= dict(zip(batch.uids, picked.tolist()))
        return found


def classes_of(samples: Iterable[Batch]) -> frozenset[int] | None:
    """The classes that are explained of some samples; None where a sample has several."""
    found: set[int] = set()
    for batch in samples:
        if batch.target.ndim != 1:
            return None
        found.update(batch.target.tolist())
    return frozenset(found)


def parse_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU. Raises UserError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"run.device={name}: not a device; try auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"run.device={name}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use; take run.device=cpu, or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"run.device={name}: no MPS on this machine; take run.device=cpu, or auto")
    return device
