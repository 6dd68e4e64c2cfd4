"""An input beside its perturbed twin: does a hierarchy stay what it was?

Singh, Murdoch & Yu (ICLR 2019, section 4.4) compare the order in which pixels are agglomerated, of an image and
of one that was changed to fool the net.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from attrib.agglomeration.trees import Tree
from attrib.methods.parts.losses import target_loss
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

Kind = Literal["noise", "fgsm"]


def twin(model: Classifier, batch: Batch, kind: Kind, size: float, noise: Noise) -> Batch:
    """The batch with every (normalised) number changed by at most ``size``.

    "noise": uniform on -size .. size, of each sample's own stream; "fgsm": by ``size`` against the target
    (Goodfellow, Shlens & Szegedy, ICLR 2015, section 4). Raises UserError for texts.
    """
    if batch.lengths is not None:
        raise UserError("token ids have no perturbed twins; take images or sounds")
    if kind == "noise":
        change = 2 * noise.uniform(*batch.x.shape[1:]) - 1
    else:

        def loss(logits: Tensor, rows: slice) -> Tensor:
            return target_loss(logits, batch.target[rows])

        change = model.gradient(batch.x, loss)[1].sign()
    return dataclasses.replace(batch, x=batch.x + size * change)


class Agreement(NamedTuple):
    """How much two trees over the same units have in common."""

    scores: float  # rank correlation of the units' own scores
    ranks: float  # rank correlation of the steps in which units were chosen
    common: float  # components that both have, of those that either has


def agreement(one: Tree, other: Tree) -> Agreement:
    """Rank correlations are Spearman's; NaN where all units are alike. Raises ValueError for other units."""
    if one.shape != other.shape:
        raise ValueError(f"trees over {one.shape} and {other.shape} units cannot be compared")
    ids = [{node.id for node in tree.nodes[tree.n :]} for tree in (one, other)]
    either = len(ids[0] | ids[1])
    return Agreement(
        _spearman(one.unit_scores, other.unit_scores),
        _spearman(one.ranks, other.ranks),
        len(ids[0] & ids[1]) / either if either else 1.0,
    )


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (rankdata(values.ravel()) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else float("nan")


@torch.no_grad()
def predicted(model: Classifier, batch: Batch) -> list[int]:
    return model.logits(batch.x).argmax(1).tolist()
