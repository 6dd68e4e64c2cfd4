"""The numbers that methods explain: the target's loss and its score, for one label or several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def target_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (N, K), target (N,) class index or (N, K) 0/1 -> (N,) loss.

    One label: cross-entropy. Several: mean of -log sigmoid over the positive labels.
    """
    if target.ndim == 1:
        return F.cross_entropy(logits, target, reduction="none")
    positive = target.to(logits.dtype)
    return -(F.logsigmoid(logits) * positive).sum(1) / positive.sum(1).clamp(min=1)


def target_score(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (N, K), target as above -> (N,) the target's logit; several labels: the sum of theirs."""
    if target.ndim == 1:
        return logits.gather(1, target[:, None])[:, 0]
    return torch.where(target.bool(), logits, 0).sum(1)
