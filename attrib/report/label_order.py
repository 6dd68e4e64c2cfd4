"""Do the labels of a dataset mean what the net's classes mean? From its predictions for some samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

_CLEARLY = 0.3  # by how much another order of the labels must fit better to be named


@dataclass(frozen=True)
class LabelOrder:
    """accuracy: share of the n samples whose label the net predicts; chance: that share if the two were independent."""

    n: int
    accuracy: float
    chance: float
    warning: str = ""


def label_order(labels: np.ndarray, predicted: np.ndarray) -> LabelOrder:
    """Of (n,) labels and predictions, both of them numbers of the net's classes; n >= 1.

    ``warning`` says if the accuracy is within two standard errors of chance (the agreement that is expected of
    independent labels and predictions, as in Cohen's kappa), or if labels moved by a constant, or exchanged with each
    other, fit far better. Which exchange is best is found on half of the samples and tried on the other half, because
    among many classes some exchange fits any small set.
    """
    n, accuracy = len(labels), float(np.mean(labels == predicted))
    classes, (own, theirs) = _numbered(labels, predicted)
    chance = float(np.bincount(own, minlength=len(classes)) @ np.bincount(theirs, minlength=len(classes))) / n**2
    near = accuracy - chance <= 2 * (max(chance * (1 - chance), 1 / n) / n) ** 0.5
    moves, counts = np.unique(predicted - labels, return_counts=True)
    move, moved = int(moves[counts.argmax()]), float(counts.max() / n)
    exchanged = _exchanged(own, theirs, len(classes))
    if len(set(labels)) == 1:  # one class says nothing of an order
        why = "none is right" if accuracy == 0 else ""
    elif move and moved - accuracy > _CLEARLY:
        why = f"labels moved by {move:+d} would be right in {moved:.0%}: does one of them count a background class?"
    elif exchanged - accuracy > _CLEARLY:
        why = f"labels in another order would be right in {exchanged:.0%}: are the classes in the net's order?"
    elif near:
        why = "that is near chance: are the classes in the net's order, and the images prepared as the net wants them?"
    else:
        why = ""
    return LabelOrder(n, accuracy, chance, why)


def _numbered(*of: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The classes that occur, and the arrays as positions among them."""
    classes, places = np.unique(np.concatenate(of), return_inverse=True)
    return classes, np.split(places, len(of))


def _exchanged(labels: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """The accuracy with the best permutation of the labels, each half of the samples by the other half's."""
    right = 0
    for half in (0, 1):
        fitted = np.zeros((classes, classes))
        np.add.at(fitted, (labels[1 - half :: 2], predicted[1 - half :: 2]), 1)
        _, order = linear_sum_assignment(-fitted)
        seen = np.isin(labels[half::2], labels[1 - half :: 2])
        right += int(np.sum((order[labels[half::2]] == predicted[half::2]) & seen))
    return right / len(labels)
