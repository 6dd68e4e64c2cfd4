"""The first inputs of a cell as the network sees them, kept so that a report needs no dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attrib.classes import joined
from attrib.datasets import holds_images, holds_sounds, holds_texts
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import Samples
from attrib.models import probabilities
from attrib.running.plan import Plan
from attrib.store.cell import Arrays
from attrib.types import Batch, UserError

MOST = 100


def keep_inputs(plan: Plan, samples: Samples, root: Path) -> None:
    """Those of ``plan`` that are not there yet; one that cannot be read is left out."""
    kept = Arrays(root / "state" / f"pictures.{plan.experiment.pictures_key}", plan.cell.writer)
    present, mine = kept.index(), set(plan.uids)
    missing = [uid for uid in plan.selected[:MOST] if uid in mine and plan.key(uid) not in present]
    for batch, _ in samples.load(samples.chunks(missing)):
        if batch is not None:
            plan.refresh_fingerprints(batch.uids)
            _keep(kept, plan, samples, batch)
    kept.flush()


def _keep(kept: Arrays, plan: Plan, samples: Samples, batch: Batch) -> None:
    """The samples of a batch, without those of which something cannot be had: the ledger will say so in time."""
    try:
        found = [
            (*shown_input(samples, uid), more)
            for uid, more in zip(batch.uids, said(plan.experiment, samples, batch), strict=True)
        ]
    except UserError:
        raise
    except Exception:
        if len(batch) > 1:
            for i in range(len(batch)):
                _keep(kept, plan, samples, batch[[i]])
        return
    for i, (uid, (arrays, info, more)) in enumerate(zip(batch.uids, found, strict=True)):
        if batch.roi is not None and batch.roi[i].any():
            arrays["roi"] = batch.roi[i].cpu().numpy()
        target = plain(batch.target[i])
        info = {**info, **more, "name": target_name(plan.experiment, target), "target": target}
        kept.add(*plan.key(uid), arrays, **info)


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
