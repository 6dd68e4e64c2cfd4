"""Perturbed copies of inputs: does the hierarchy of a copy stay that of the input?

Singh, Murdoch & Yu (ICLR 2019, section 4.4) compare the order in which pixels are agglomerated in an image and in a
copy that was changed to fool the net.
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


def perturbed(model: Classifier, batch: Batch, kind: Kind, size: float, noise: Noise) -> Batch:
    """A copy of the batch with every (normalised) number changed by at most ``size``.

    "noise" adds a number that is uniform on -size .. size, from each sample's own stream; "fgsm" adds or subtracts
    ``size`` so that the loss of the target grows (Goodfellow, Shlens & Szegedy, ICLR 2015, section 4). Raises UserError
    for texts.
    """
    if batch.lengths is not None:
        raise UserError("token ids cannot be perturbed by small changes; take images or sounds")
    if kind == "noise":
        change = 2 * noise.uniform(*batch.x.shape[1:]) - 1
    else:

        def loss(logits: Tensor, rows: slice) -> Tensor:
            return target_loss(logits, batch.target[rows], model.link)

        change = model.gradient(batch.x, loss)[1].sign()
    return dataclasses.replace(batch, x=batch.x + size * change)


class TreeAgreement(NamedTuple):
    """How much two trees over the same units have in common."""

    scores: float  # rank correlation of the units' own scores
    ranks: float  # rank correlation of the steps in which units were chosen
    common: float  # share of the components of either tree that are in both


def tree_agreement(one: Tree, other: Tree) -> TreeAgreement:
    """The agreement of two trees; Spearman's rank correlation is NaN where all units have the same value.

    Raises ValueError for trees over different units.
    """
    if one.shape != other.shape:
        raise ValueError(f"trees over {one.shape} and {other.shape} units cannot be compared")
    ids = [{node.id for node in tree.nodes[tree.n :]} for tree in (one, other)]
    either = len(ids[0] | ids[1])
    return TreeAgreement(
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
    """The class of each sample of the batch that has the largest logit."""
    return model.logits(batch.x).argmax(1).tolist()
