"""Whether gradients flow through one way of computing a net as through another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor | None:
    """Of a sum of what ``function`` gives, with different weights; None where autograd finds no way, or no way back."""
    try:
        with torch.enable_grad():
            result = function(leaf.clone())
            weights = torch.linspace(1, 2, result[0].numel(), dtype=result.dtype, device=result.device)
            return torch.autograd.grad((result.flatten(1) * weights).sum(), leaf)[0] if result.requires_grad else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def near(got: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two gradients differ by rounding alone."""
    if got is None or expected is None:
        return got is expected
    size = expected.abs().nan_to_num(0.0, 0.0).amax().item()
    return torch.allclose(got, expected, rtol=0, atol=1e-3 * size, equal_nan=True)
