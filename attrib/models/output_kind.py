"""A kind of output (``model.output.read``): how one score per row and class comes out of what a net returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from attrib.types import Batch, UserError

Link = Literal["softmax", "sigmoid"]  # softmax: classes exclude each other; sigmoid: each is true or not by itself


@dataclass(frozen=True, eq=False)
class OutputKind:
    """Makes scores (N, K) of what a net returns, or of what ``model.output.take`` takes of it.

    A kind keeps tensors that belong to a net (masks, prompts) in the net, as buffers that are no part of its state.

    READ   its name in ``model.output.read``
    LEAST  the smallest K
    """

    READ: ClassVar[str]
    LEAST: ClassVar[int] = 2

    @property
    def decides(self) -> bool:
        """Whether the class with the largest score is the net's answer."""
        return True

    @property
    def per_sample(self) -> bool:
        """Whether a score depends on which sample is explained, see ``Classifier.explaining``."""
        return False

    @property
    def spec(self) -> dict[str, Any]:
        """What enters the model's key, beside the name."""
        return {}

    def link_of(self, net: nn.Module) -> Link | None:
        """How probabilities are made of scores; None if there are none."""
        return "softmax"

    def class_names(self, net: nn.Module) -> tuple[str, ...] | None:
        """The names of the K classes, where they are known."""
        names = getattr(net, "class_names", None)
        return tuple(names) if isinstance(names, tuple | list) else None

    def prepare(self, net: nn.Module) -> None:
        """Look up once what is needed of ``net``, which is on its device by now. Raises UserError."""

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        """What the net returned for the rows x -> (N, K). Raises UserError for what cannot be read like this."""
        return raw

    def check_texts(self, net: nn.Module, batch: Batch) -> None:
        """Raises SampleError for a text whose score cannot be told."""

    def _tensor(self, raw: Any, what: str, dims: Sequence[int]) -> Tensor:
        """``raw``, if it is a tensor of so many dimensions; while the net is traced nobody knows."""
        if isinstance(raw, fx.Proxy):
            return raw  # type: ignore[return-value]
        if not isinstance(raw, Tensor) or raw.ndim not in dims or not raw.is_floating_point():
            shape = f"a tensor {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise UserError(f"model.output: read={self.READ} wants {what}, and the net returns {shape}")
        return raw


def like(net: nn.Module) -> Tensor:
    """An empty tensor on the net's device and in its precision."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            return parameter.detach().new_empty(0)
    return torch.empty(0)


def keep(net: nn.Module, name: str, value: Tensor) -> None:
    """Hold a tensor in the net, as a buffer that is no part of its state."""
    net.register_buffer(name, value, persistent=False)
