"""The layers at which nets are cut: what they give, and whether a method may put something else in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attrib.models.admission import other_than
from attrib.models.device_memory import of_the_device
from attrib.models.padding import tried
from attrib.models.ways_back import near
from attrib.types import UserError


def first_tensor(output: Any, path: str) -> Tensor:
    """A layer's output, or the first element of a tuple or list. Raises UserError if that is no tensor."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(first, Tensor) and first.is_nested:
        raise UserError(
            f"layer {path} gives a nested tensor, from which torch has taken the padding; take a layer outside of the "
            "nn.TransformerEncoder (set model.layers.<role>), or build that with enable_nested_tensor=False"
        )
    if not isinstance(first, Tensor):
        what = f"a {type(output).__name__}" + ("" if first is output else f" that begins with {type(first).__name__}")
        raise UserError(
            f"layer {path} gives {what}, not a tensor; take a layer inside or behind it that gives one "
            "(set model.layers.<role>)"
        )
    return first


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """A forward hook that is gone afterwards, also after an error; other threads run the module as if it had none.

    Raises UserError for a part that is TorchScript.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"{module.original_name} is TorchScript, whose layers cannot be read; take a layer outside of it (set "
            "model.layers.<role>), or make the net with the torch.nn.Module that it was made from"
        )
    thread = threading.get_ident()

    def here(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    handle = module.register_forward_hook(here)
    try:
        yield
    finally:
        handle.remove()


def outputs_of(module: nn.Module, path: str, x: Tensor) -> list[Any]:
    """What the layer gives, call by call, in one forward pass."""
    found: list[Any] = []
    with hooked(module.get_submodule(path), lambda _module, _inputs, output: found.append(output)), torch.no_grad():
        module(x)
    return found


def count_calls(module: nn.Module, path: str, x: Tensor) -> int:
    """How often one forward pass runs the layer."""
    return len(outputs_of(module, path, x))


def _spoilt(value: Any) -> Any:
    """The same with NaN for every number that is not whole."""
    if isinstance(value, Tensor):
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_spoilt, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_spoilt, value))
    return {k: _spoilt(v) for k, v in value.items()} if isinstance(value, dict) else value


def _lent(module: nn.Module, path: str) -> list[str]:
    """The modules that have the layer's weights as their own."""
    own = {id(p) for p in module.get_submodule(path).parameters(recurse=False)}
    return [
        other
        for other, child in module.named_modules()
        if other != path and any(id(p) in own for p in child.parameters(recurse=False))
    ]


@torch.no_grad()
def check_layer(module: nn.Module, path: str, x: Tensor) -> None:
    """Raises UserError unless the layer runs once, and all that the net reads of it is one tensor, a row per sample."""
    outputs, where = outputs_of(module, path, x.clone()), f"layer {path} of {type(module).__name__}"
    if not outputs and (lent := _lent(module, path)):
        raise UserError(
            f"{where} never runs, and lends its weights to {' and '.join(lent)}; take a layer that runs "
            "(set model.layers.<role>)"
        )
    if len(outputs) != 1:
        raise UserError(
            f"{where} runs {len(outputs)} times in a forward pass; take a layer that runs exactly once "
            "(set model.layers.<role>)"
        )
    z = first_tensor(outputs[0], path)
    check_rows(where, z, len(x))
    if not isinstance(outputs[0], (tuple, list)) or len(outputs[0]) == 1:
        return
    with hooked(module.get_submodule(path), lambda _module, _inputs, output: (output[0], *map(_spoilt, output[1:]))):
        spoilt = module(x.clone())
    if not torch.equal(spoilt.nan_to_num(), module(x.clone()).nan_to_num()):
        raise UserError(
            f"{where} gives {len(outputs[0])} things, and the net reads others than the first; take a layer inside or "
            "behind it that gives one tensor (set model.layers.<role>)"
        )


def check_rows(layer: str, z: Tensor, samples: int) -> None:
    """Raises UserError unless a layer gives a row per sample; a net that loops over its samples runs it for each."""
    if z.shape[:1] != (samples,):
        raise UserError(
            f"{layer} gives {tuple(z.shape)} for {samples} samples, which is not one row per sample; take another "
            "layer (set model.layers.<role>)"
        )


@torch.no_grad()
def check_order(module: nn.Module, path: str, x: Tensor) -> None:
    """Raises UserError if the rows of the layer change places by what is in them; x is one sample, (1, *input)."""
    pair = torch.cat((x, other_than(x)))
    try:
        one, other = (first_tensor(outputs_of(module, path, rows)[0], path) for rows in (pair, pair.flip(0)))
    except Exception as error:  # a user's net may raise anything, of a sample that nobody has
        if of_the_device(error):
            raise
        return
    if len(one) == 2 and one.shape == other.shape and not near(one, other.flip(0)):
        raise UserError(
            f"layer {path} of {type(module).__name__} gives the rows of a batch in an order of its own, so that what "
            "is changed there would be another sample's; take another layer (set model.layers.<role>)"
        )


@torch.no_grad()
def probe_of(module: nn.Module, x: Tensor) -> Tensor:
    """One sample, (1, *input). Of a text of one token, a row for each token would pass for a row per sample."""
    if x.ndim == 2 and not x.is_floating_point() and x.shape[1] < 3:
        longer = x[:1].repeat(1, 3)[:, :3]
        if tried(module, longer) is not None:  # not every net takes texts of any length
            return longer
    return x[:1].clone()
