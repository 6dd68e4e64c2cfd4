"""Whether a library that follows the modules of a net sees all that the net computes."""

from __future__ import annotations

from torch import Tensor, fx, nn

from attrib.methods.parts.propagation import relus
from attrib.models import Classifier
from attrib.models.calls import operation
from attrib.types import UserError

# Calls that compute nothing.
SHAPE = frozenset((
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "t", "transpose", "permute", "expand", "squeeze",
    "unsqueeze", "alias", "detach", "clone", "contiguous", "dropout",
))  # fmt: skip


def check_relus(model: Classifier, x: Tensor, what: str, instead: str) -> None:
    """Raises UserError unless every ReLU of the net, on x (N, *input), is the call of a module of the class ReLU."""
    found = relus(model).found(x)
    modules = _modules(model)
    seen = sum(isinstance(modules.get(_path(node)), nn.ReLU) for node in found)
    if not found or seen < len(found):
        raise UserError(
            f"{what} replaces modules of the class ReLU, and only {seen} of the {len(found)} ReLUs of "
            f"{type(model.module).__name__} are such; take {instead}"
        )


def check_modules_alone(model: Classifier, x: Tensor, what: str) -> None:
    """Raises UserError unless all that the net computes, on x (N, *input), it does in modules without others inside."""
    graph, modules = model.graph(x), _modules(model)
    for node in graph.nodes:
        if node in graph.fed and operation(node) not in ("", *SHAPE):
            module = modules.get(_path(node))
            if module is None or any(True for _ in module.children()):
                raise UserError(
                    f"{what} sees only modules, and {graph.where(node)} of {graph.name} calls {operation(node)} "
                    "itself: what lies between modules, such as the sum of a residual connection, would get a wrong "
                    "relevance"
                )


def _modules(model: Classifier) -> dict[str, nn.Module]:
    return dict(model.module.named_modules(remove_duplicate=False))


def _path(node: fx.Node) -> str:
    """Of the module that makes a call."""
    path: str = node.meta["module"][0]
    return path
