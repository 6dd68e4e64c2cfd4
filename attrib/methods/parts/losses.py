"""The numbers that methods explain: the target's loss and its score, for one label or several."""

from __future__ import annotations

import torch
from torch import Tensor

from attrib.models.output import log_probabilities
from attrib.models.output_kind import Link


def target_loss(logits: Tensor, target: Tensor, link: Link | None = "softmax") -> Tensor:
    """Logits (N, K), target (N,) class index or (N, K) 0/1 -> (N,) loss; ``link`` is ``Classifier.link``.

    One label: -log of its probability, the cross-entropy. Several: mean of -log sigmoid over the positive labels.
    Raises UserError for scores without probabilities.
    """
    if target.ndim == 1:
        return -log_probabilities(logits, link=link).gather(1, target[:, None])[:, 0]
    positive = target.to(logits.dtype)
    return -(log_probabilities(logits, True, link) * positive).sum(1) / positive.sum(1).clamp(min=1)


def target_score(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (N, K), target as above -> (N,) the target's logit; several labels: the sum of theirs.

    Where the target is -1 the logit is subtracted: a contrast is one class of 1 and one of -1.
    """
    if target.ndim == 1:
        return logits.gather(1, target[:, None])[:, 0]
    return torch.where(target.bool(), logits * target.sign(), 0).sum(1)
