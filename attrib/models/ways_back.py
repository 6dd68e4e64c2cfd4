"""Whether gradients flow through a net, and through one way of computing it as through another; and rightly."""

from __future__ import annotations

from collections.abc import Callable
from traceback import walk_tb

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from attrib.types import UserError


def gradient(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor | None:
    """Of a sum of what ``function`` gives, with different weights; None where autograd finds no way, or no way back.

    Raises CheckpointError where a part that ``function`` changed by hooks is run again, without them, on the way back.
    """
    try:
        with torch.enable_grad():
            result = with_contiguous_norms(function(leaf.clone()), len(leaf))
            weights = torch.linspace(1, 2, result[0].numel(), dtype=result.dtype, device=result.device)
            return torch.autograd.grad((result.flatten(1) * weights).sum(), leaf)[0] if result.requires_grad else None
    except (torch.OutOfMemoryError, CheckpointError):
        raise
    except RuntimeError:
        return None


def check_way_back(net: nn.Module, x: Tensor | None, error: Exception) -> None:
    """Raises UserError if an error comes of there being no gradient of the net's scores.

    x  images or sounds, with which that is tried; None for others, such as texts, whose ids have no gradient anyway
    """
    if _of_autograd(error) and torch.is_inference_mode_enabled():
        raise UserError(
            "within torch.inference_mode there are no gradients, whoever asks; leave it (torch.no_grad may stay)"
        ) from error
    if isinstance(error, CheckpointError):
        raise UserError(
            f"{type(net).__name__} runs parts of itself again on the way back, as torch.utils.checkpoint does; "
            "a layer that is read or replaced is there as it was. Switch that off: set_grad_checkpointing(False) in "
            "timm, gradient_checkpointing_disable() in transformers, memory_efficient=False in torchvision"
        ) from error
    there = x is not None and _fails_with_gradients_alone(net, x, error)
    back = _of_autograd(error) and (x is None or gradient(net, x.clone().requires_grad_()) is None)
    if not there and not back:
        return
    name, reason = type(net).__name__, (str(error) or type(error).__name__).splitlines()[0]
    start, instead = ("its input (of a text: its embedding)", "lime") if x is None else ("its input", "rise")
    raise UserError(
        f"no gradient comes from the scores of {name} to {start}: {reason}. It stops gradients (detach, no_grad), "
        "or computes something that autograd cannot go back through. Take a method that needs no gradient, such as "
        f"occlusion or {instead}"
    ) from error


def _fails_with_gradients_alone(net: nn.Module, x: Tensor, error: Exception) -> bool:
    """Whether an error is the net's own on its way forward, where autograd follows and nowhere else.

    Autograd refuses some operations in place, such as those on the results of ``chunk``, when they are called.
    """
    if _of_autograd(error) or isinstance(error, UserError):
        return False
    try:
        with torch.no_grad():
            net(x.clone())
    except RuntimeError:
        return False
    try:
        with torch.enable_grad():
            net(x.clone().requires_grad_().clone())
    except RuntimeError as same:
        return str(same) == str(error)
    return False


def _of_autograd(error: Exception) -> bool:
    """Whether an error was raised on the way back."""
    return any(frame.f_globals.get("__name__") == "torch.autograd" for frame, _ in walk_tb(error.__traceback__))


def near(got: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two gradients differ by rounding alone."""
    if got is None or expected is None:
        return got is expected
    size = expected.abs().nan_to_num(0.0, 0.0).amax().item()
    return torch.allclose(got, expected, rtol=0, atol=1e-3 * size, equal_nan=True)


def with_contiguous_norms(result: Tensor, rows: int) -> Tensor:
    """``result`` itself; if computed of one row, every batch norm gets a contiguous gradient on the way back."""
    nodes: list[Node | None] = [result.grad_fn] if rows == 1 else []
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name():
            contiguous_back(node)
        nodes += [function for function, _ in node.next_functions]
    return result


def contiguous_back(norm: Node) -> None:
    """Lets the gradients that come back to a batch norm be contiguous.

    Of one row, torch's kernel for the CPU (2.15) reads a gradient wrong whose channels lie last behind a view, as it is
    where tokens are made: ``norm(x).flatten(2).transpose(1, 2)``. Of several rows it reads the same gradient right.
    """
    norm.register_prehook(lambda gradients: tuple(None if grad is None else grad.contiguous() for grad in gradients))
