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
    experiment = plan.experiment
    kept = Arrays(root / "state" / f"pictures.{experiment.pictures_key}", plan.cell.writer)
    present = kept.index()
    mine = set(plan.uids)
    for uid in plan.selected[:MOST]:
        if uid not in mine or plan.key(uid) in present:
            continue
        try:
            batch = samples.batch([uid])
            plan.refresh_fingerprints([uid])
            arrays, info = shown_input(samples, uid)
            info |= said(experiment, samples, batch)
        except UserError:
            raise
        except Exception:
            continue  # the ledger will say so when its map is due
        if batch.roi is not None and batch.roi.any():
            arrays["roi"] = batch.roi[0].cpu().numpy()
        target = plain(batch.target[0])
        kept.add(*plan.key(uid), arrays, name=target_name(experiment, target), target=target, **info)
    kept.flush()


def said(experiment: Experiment, samples: Samples, batch: Batch) -> dict[str, Any]:
    """Which class the net takes the one sample of a batch for, how surely, and whether that is its label.

    ``predicted``, ``predicted_name``, ``probability``, ``right``, as far as they are known: no net without a decision
    is asked, nor for a sample that has several labels, and what is right is known where the label is explained.
    """
    model = samples.model.original
    if not model.output.read.decides or batch.target.ndim != 1:
        return {}
    logits = model.logits(batch.x)
    if not logits.isfinite().all():
        return {}
    best = int(logits[0].argmax())
    found: dict[str, Any] = {"predicted": best, "predicted_name": experiment.class_name(best)}
    if model.link is not None:
        found["probability"] = float(probabilities(logits, link=model.link)[0, best])
    return {**found, "right": best == int(batch.target[0])} if samples.target == "label" else found


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
