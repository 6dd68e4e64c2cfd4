"""Samples on their way from a dataset to a model: read ahead, moved to the device, target resolved."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

import torch
from torch import Tensor

from attrib.datasets import Dataset
from attrib.models import Classifier, probabilities
from attrib.models.classifier import is_out_of_memory, release_memory
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)

Target = Literal["label", "predicted"] | int
PATIENCE = 2.0  # seconds that whoever stops early gives to what is being read: on a dead file server it may hang

Loaded = tuple[Batch | None, list[tuple[str, str]]]  # what could be read; (uid, reason) of what could not


def example(dataset: Dataset) -> Tensor:
    """The input (1, *input) of the first sample that can be read. Raises UserError if none can."""
    for uid in dataset.uids:
        try:
            return dataset.batch([uid]).x
        except Exception:  # the ledger will say so
            continue
    raise UserError("no sample of the dataset can be read")


class Samples:
    """Some samples of a dataset as a model wants them, in batches.

    target   which class is explained: the dataset's label, the class the model predicts (of a copy with
             randomised layers: the class that the original predicts), or the one with this number; None leaves
             the dataset's target as it is, for work that needs none or knows it already
    classes  class of the dataset -> class of the net, see ``targets.matched``; None: the numbers are the same
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
    ) -> None:
        number = isinstance(target, int) and not isinstance(target, bool) and target >= 0
        if not number and target not in ("label", "predicted", None):
            raise UserError(f"dataset.target must be label or predicted, not {target!r}, or the number of a class")
        if batch < 1:
            raise UserError(f"run.batch must be at least 1, not {batch}")
        self.dataset, self.model, self.target = dataset, model, target
        self.uids, self._size, self.classes = tuple(uids), batch, classes
        self.skipped: dict[str, str] = {}  # uid -> reason, of what iterating could not read

    def _ready(self, batch: Batch) -> Batch:
        if isinstance(self.target, int):
            batch = dataclasses.replace(batch, target=torch.full((len(batch),), self.target))
        elif self.target == "label" and self.classes is not None:
            batch = dataclasses.replace(batch, target=self._of_the_net(batch))
        targets = batch.target.cpu()
        batch = batch.to(self.model.device, self.model.dtype)
        if self.target is None:
            return batch
        if self.target == "predicted":
            return dataclasses.replace(batch, target=self.model.original.logits(batch.x).argmax(1))
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0:
            unknown = [uid for uid, t in zip(batch.uids, targets.reshape(len(batch), -1).amin(1).tolist()) if t < 0]
            own = "the model's own class with dataset.target=predicted, or " if self.model.output.read.decides else ""
            reason = getattr(self.dataset, "label_problems", {}).get(unknown[0])
            raise SampleError(
                f"{unknown[0]} has no label{f' ({reason})' if reason else ''}; explain {own}one output of all with "
                "dataset.target=NUMBER"
            )
        classes = self.model.outputs(batch.x)
        # On a GPU an index out of range would take the whole process down.
        highest = highest if targets.ndim == 1 else targets.shape[1] - 1
        if highest >= classes:
            if isinstance(self.target, int):
                raise UserError(f"dataset.target={self.target}, but the model's outputs are 0 to {classes - 1}")
            uid = batch.uids[int(targets.argmax()) if targets.ndim == 1 else 0]
            raise SampleError(
                f"{uid} has class {highest}, but the model has {classes} classes; check the dataset's class "
                "index (dataset.classes) and the model, or explain one output of all with dataset.target=NUMBER"
            )
        return batch

    def _of_the_net(self, batch: Batch) -> Tensor:
        """The labels (B,) as numbers of the net's classes. Raises SampleError for one that the net does not know."""
        assert self.classes is not None
        labels = batch.target.tolist()
        for uid, label in zip(batch.uids, labels):
            if label >= 0 and label not in self.classes:
                name = self.dataset.names.get(label)
                raise SampleError(f"{uid} has class {label}{f' ({name})' if name else ''}, which the net does not know")
        return torch.tensor([label if label < 0 else self.classes[label] for label in labels])

    def batch(self, uids: Sequence[str]) -> Batch:
        """Raises SampleError if one of them cannot be read or has no target."""
        return self._ready(self.dataset.batch(uids))

    def _read(self, uids: Sequence[str]) -> Loaded:
        """In a worker thread: a bad sample costs the others nothing."""
        try:
            return self.dataset.batch(uids), []
        except Exception as error:  # a user's dataset may raise anything
            if isinstance(error, UserError):
                raise
            if len(uids) == 1:
                return None, [(uids[0], f"{type(error).__name__}: {error}")]
        good, bad = [], []
        for uid in uids:
            batch, failed = self._read([uid])
            bad += failed
            good += [uid] if batch is not None else []
        if not good:
            return None, bad
        try:
            return self.dataset.batch(good), bad
        except Exception as error:
            raise UserError(
                f"samples {good[0]} to {good[-1]} can be read one by one, but not as a batch "
                f"({type(error).__name__}: {error}); try run.batch=1"
            ) from error

    def load(self, chunks: Iterable[Sequence[str]]) -> Iterator[Loaded]:
        """Each chunk of uids as one batch, or several if the device has no room; the next two are read while one is
        worked on."""
        pool = ThreadPoolExecutor(2)
        waiting: deque[Future[Loaded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(self._read, chunk))
                if len(waiting) > 2:
                    yield from self._finish(waiting[0].result())
                    waiting.popleft()
            while waiting:
                yield from self._finish(waiting[0].result())
                waiting.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not wait([f for f in waiting if not f.cancelled()], PATIENCE).not_done:
                pool.shutdown()

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
        if batch is None or self.model.examine(batch.x, batch.lengths) or batch.lengths is None:
            yield batch, bad
            return
        lengths = batch.lengths.tolist()
        for length in dict.fromkeys(lengths):
            rows = [i for i, other in enumerate(lengths) if other == length]
            yield batch[rows].cut(length), bad
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
        """The (original) model's softmax probability of the target, of the samples that can be read."""
        found: dict[str, float] = {}
        for batch, _ in self.load(self.chunks(uids)):
            if batch is not None:
                probability = probabilities(self.model.original.logits(batch.x), link=self.model.link)
                picked = probability.gather(1, batch.target[:, None])[:, 0]
                found |= dict(zip(batch.uids, picked.tolist()))
        return found


def parse_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU. Raises UserError for a device this machine does not have."""
    # TF32 rounds to 10 bits: a GPU would give other numbers than a CPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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
