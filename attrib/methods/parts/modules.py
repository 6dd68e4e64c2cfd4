"""Whether a library that follows the modules of a net sees all that the net computes."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from attrib.methods.parts.propagation import hookable
from attrib.models import Classifier
from attrib.models.activations import RELU_LIKE
from attrib.models.aten import of_input, operation
from attrib.models.split import hooked
from attrib.types import UserError

# Calls that compute nothing, and modules that make no others in eval mode.
SHAPE = frozenset((
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "alias", "detach",
    "clone",
))  # fmt: skip
IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten)


def check_relus(model: Classifier, x: Tensor, what: str, instead: str) -> None:
    """Raises UserError unless every ReLU of the net, on x (N, *input), is a module of the class ReLU."""
    relus, seen = len(hookable(model, RELU_LIKE).found(x)), sum(issubclass(kind, nn.ReLU) for kind in _called(model, x))
    if not relus or seen != relus:
        raise UserError(
            f"{what} replaces modules of the class ReLU, and only {seen} of the {relus} ReLUs of "
            f"{type(model.module).__name__} are such; take {instead}"
        )


def check_modules_alone(model: Classifier, x: Tensor, what: str) -> None:
    """Raises UserError unless every call of the net, on x (N, *input), is the only one of a module without others."""
    graph = model.graph(x).graph
    depends = of_input(graph)
    calls = sum(n in depends and operation(n) not in {"", *SHAPE} for n in graph.nodes)
    seen = sum(not issubclass(kind, IDLE) for kind in _called(model, x))
    if calls != seen:
        raise UserError(
            f"{what} sees only modules, and {type(model.module).__name__} makes {calls} calls with {seen} of them: "
            "what lies between, such as the sum of a residual connection, would get a wrong relevance"
        )


@torch.no_grad()
def _called(model: Classifier, x: Tensor) -> list[type]:
    """The classes of the modules without others inside, once for each time that one is called."""
    called: list[type] = []
    with contextlib.ExitStack() as stack:
        for module in model.module.modules():
            if not any(True for _ in module.children()):
                stack.enter_context(hooked(module, lambda module, *_: called.append(type(module))))
        model.module(x.clone())
    return called
