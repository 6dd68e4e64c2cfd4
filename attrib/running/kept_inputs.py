"""The first inputs of a cell as the network sees them, kept so that a report needs no dataset."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attrib.classes import joined
from attrib.datasets import holds_images, holds_sounds, holds_texts
from attrib.experiment.cell import Experiment
from attrib.experiment.reading import PATIENCE
from attrib.experiment.samples import Samples
from attrib.models import probabilities
from attrib.process.signals import Stop
from attrib.running.plan import Plan
from attrib.store.cell import Arrays, Key
from attrib.types import Batch, UserError

MOST = 100


Told = tuple[Key, dict[str, np.ndarray], dict[str, Any]]  # a sample, arrays, and what is not an array


class KeptInputs:
    """Those of ``plan`` that are not there yet, without those of which something cannot be had: the ledger will say so.

    What the net says of them is asked for by ``begin``, as only one thread may use the net. Another thread gets images
    and sounds, and writes everything, while maps are computed.
    """

    def __init__(self, plan: Plan, samples: Samples, root: Path, stop: Stop) -> None:
        self._plan, self._samples, self._stop = plan, samples, stop
        self._kept = Arrays(root / "state" / f"pictures.{plan.experiment.pictures_key}", plan.cell.writer)
        self._writing: Future[None] | None = None

    def begin(self) -> None:
        """Returns when the net is no longer needed. Raises UserError."""
        plan, present, mine = self._plan, self._kept.index(), set(self._plan.uids)
        missing = [uid for uid in plan.selected[:MOST] if uid in mine and plan.key(uid) not in present]
        told: list[Told] = []
        for batch, _ in self._samples.load(self._samples.chunks(missing)):
            if batch is not None:
                plan.refresh_fingerprints(batch.uids)
                told += self._told(batch)
        if told:
            pool = ThreadPoolExecutor(1, "attrib-inputs")
            self._writing = pool.submit(self._write, told)
            pool.shutdown(wait=False)

    def _told(self, batch: Batch) -> list[Told]:
        """What is kept of the samples of a batch, as far as the net is needed for it."""
        experiment, samples = self._plan.experiment, self._samples
        try:
            shown = [shown_input(samples, uid) if holds_texts(samples.dataset) else ({}, {}) for uid in batch.uids]
            more = said(experiment, samples, batch)
        except UserError:
            raise
        except Exception:
            return [one for i in range(len(batch)) for one in self._told(batch[[i]])] if len(batch) > 1 else []
        found: list[Told] = []
        for i, uid in enumerate(batch.uids):
            arrays, info = shown[i]
            if batch.roi is not None and batch.roi[i].any():
                arrays["roi"] = batch.roi[i].cpu().numpy()
            target = plain(batch.target[i])
            info = {**info, **more[i], "name": target_name(experiment, target), "target": target}
            found.append((self._plan.key(uid), arrays, info))
        return found

    def _write(self, told: list[Told]) -> None:
        for key, arrays, info in told:
            if self._stop():
                break  # the next run goes on
            if not holds_texts(self._samples.dataset):
                try:
                    shown, more = shown_input(self._samples, key[0])
                except UserError:
                    raise
                except Exception:
                    continue
                arrays, info = arrays | shown, info | more
            self._kept.add(*key, arrays, **info)
            self._kept.flush_if_due()  # a hundred long sounds would be gigabytes
        self._kept.flush()

    def check(self) -> None:
        """Raises OSError if they could not be written."""
        if self._writing is not None and self._writing.done():
            written, self._writing = self._writing, None
            written.result()

    def finish(self) -> None:
        """Wait until they are written, but not for a file server that is dead if told to stop. Raises as ``check``."""
        while self._writing is not None and wait([self._writing], PATIENCE).not_done and not self._stop():
            pass
        self.check()


def said(experiment: Experiment, samples: Samples, batch: Batch) -> list[dict[str, Any]]:
    """Which class the net takes each sample of a batch for, how surely, and whether that is its label.

    ``predicted``, ``predicted_name``, ``probability``, ``right``, as far as they are known: no net without a decision
    is asked, nor for samples that have several labels, and what is right is known where the label is explained.
    """
    model = samples.model.original
    if not model.output.read.decides or batch.target.ndim != 1:
        return [{} for _ in batch.uids]
    logits = model.logits(batch.x)
    best = logits.argmax(1)
    right = (best == batch.target).tolist()
    sure = None if model.link is None else probabilities(logits, link=model.link).amax(1).tolist()
    found: list[dict[str, Any]] = []
    for i, (label, finite) in enumerate(zip(best.tolist(), logits.isfinite().all(1).tolist())):
        one = {"predicted": label, "predicted_name": experiment.class_name(label)}
        one |= {} if sure is None else {"probability": sure[i]}
        one |= {"right": right[i]} if samples.target == "label" else {}
        found.append(one if finite else {})
    return found


def target_name(experiment: Experiment, target: int | list[int]) -> str:
    """What the class, or each class of several or of a contrast, is called; "" where that is not known."""
    name = experiment.class_name
    if isinstance(target, int):
        return name(target)
    return joined(target, lambda i: name(i) or str(i)) if any(name(i) for i, v in enumerate(target) if v) else ""


def shown_input(samples: Samples, uid: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a person needs to see of a sample: arrays, and what is not an array."""
    dataset = samples.dataset
    if holds_texts(dataset):
        words = samples.batch([uid]).words
        assert words is not None
        return {"words": words[0].cpu().numpy()}, {"tokens": list(dataset.tokens(uid))}
    if holds_sounds(dataset):
        return {"wave": dataset.wave(uid)}, {"rate": dataset.rate}
    assert holds_images(dataset)
    return {"image": dataset.picture(uid)}, {}


def plain(target: Tensor) -> int | list[int]:
    return int(target) if target.ndim == 0 else [int(t) for t in target]
