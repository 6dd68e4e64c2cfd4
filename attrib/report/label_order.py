"""Do the labels of a dataset mean what the net's classes mean? From its predictions for some samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

_CLEARLY = 0.3  # by how much another order of the labels must fit better to be named
_SURELY = 4  # standard errors: of many orders the best one is looked at


@dataclass(frozen=True)
class LabelOrder:
    """accuracy: share of the n samples of which the predicted class is a label; chance: that share if predictions and
    labels were independent."""

    n: int
    accuracy: float
    chance: float
    warning: str = ""


def label_order(labels: Sequence[Collection[int]], predicted: Sequence[int]) -> LabelOrder:
    """Of the labels and the prediction of each sample, all of them numbers of the net's classes; one sample or more.

    ``warning`` says if the accuracy is within two standard errors of chance (the agreement that is expected of
    independent labels and predictions, as in Cohen's kappa) and would not be if all were right, or if labels moved by a
    constant, or exchanged with each other, fit far better, and far better than by chance: whatever a net predicts for
    all samples is right for some order of the labels. Which exchange is best is found on half of the samples and tried
    on the other half, because among many classes some exchange fits any small set.
    """
    n, classes = len(labels), sorted({*predicted, *(c for some in labels for c in some)})
    place = {c: i for i, c in enumerate(classes)}
    shown = np.zeros((n, len(classes)), dtype=bool)
    for row, some in zip(shown, labels, strict=True):
        row[[place[c] for c in some]] = True
    said = np.array([place[c] for c in predicted])
    accuracy, chance = _agreement(shown, said)
    move, moved, moved_by_chance = _moved(labels, predicted)
    exchanged, exchanged_by_chance = _exchanged(shown, said)
    doubt = 2 * _error(chance, n)
    near = accuracy - chance <= doubt < 1 - chance  # of so few samples that all right may be chance, nothing is said
    if np.all(shown == shown[0]):  # one class says nothing of an order
        why = "none is right" if accuracy == 0 else ""
    elif move and moved >= exchanged and _fits(moved, moved_by_chance, accuracy, n):
        why = f"labels moved by {move:+d} would be right in {moved:.0%}: does one of them count a background class?"
    elif _fits(exchanged, exchanged_by_chance, accuracy, n):
        why = f"labels in another order would be right in {exchanged:.0%}: are the classes in the net's order?"
    elif near:
        why = "that is near chance: are the classes in the net's order, and the images prepared as the net wants them?"
    else:
        why = ""
    return LabelOrder(n, accuracy, chance, why)


def _agreement(shown: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """Of (n, C) labels and (n,) predictions: the share that agrees, and the share that would by chance."""
    n = len(said)
    counts = np.bincount(said, minlength=shown.shape[1])
    return float(shown[np.arange(n), said].mean()), float(shown.sum(0) @ counts) / n**2


def _error(chance: float, n: int) -> float:
    """Standard error of an agreement by chance of n samples."""
    return float((max(chance * (1 - chance), 1 / n) / n) ** 0.5)


def _fits(share: float, chance: float, accuracy: float, n: int) -> bool:
    """Whether another order of the labels fits far better than theirs, and than chance."""
    return share - accuracy > _CLEARLY and share - chance > max(_CLEARLY, _SURELY * _error(chance, n))


def _moved(labels: Sequence[Collection[int]], predicted: Sequence[int]) -> tuple[int, float, float]:
    """The constant that makes most labels right, in which share of the samples, and in which it would by chance."""
    n = len(predicted)
    moves = Counter(p - c for some, p in zip(labels, predicted, strict=True) for c in some)
    if not moves:
        return 0, 0.0, 0.0
    (move, right), *_ = moves.most_common(1)
    counts, said = Counter(c for some in labels for c in some), Counter(predicted)
    return move, right / n, sum(count * said[c + move] for c, count in counts.items()) / n**2


def _exchanged(shown: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """The agreement if each half's labels are exchanged as fits the other half best, and that by chance."""
    classes, other = shown.shape[1], np.zeros_like(shown)
    for half in (0, 1):
        fitting, tried = shown[1 - half :: 2], shown[half::2]
        together = np.zeros((classes, classes))
        np.add.at(together.T, said[1 - half :: 2], fitting)
        _, order = linear_sum_assignment(-together)  # label -> prediction
        seen = fitting.any(0)
        other[half::2][:, order[seen]] = tried[:, seen]
    return _agreement(other, said)
