"""The arithmetic in which a net is computed, where it is another one than float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attrib.models.device_memory import of_the_device
from attrib.models.float32 import tf32
from attrib.types import UserError, did_you_mean

Arithmetic = Literal["float32", "tf32", "bfloat16", "float16"]
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)
# The size, 2 ** GROWN, at which the gradients of a row enter the net in float16, lest they vanish; see ``_Growth``.
GROWN = 10
_HALF: Mapping[Arithmetic, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
_COARSER: Mapping[Arithmetic, float] = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # the last bit


@dataclass(frozen=True)
class Precision:
    """``precision``: in which arithmetic the net is computed, while it is explained and while maps are scored.

    It is part of what is computed, and so of the keys: another precision makes other cells, or other scores of the
    same maps. Weights, maps, sums and statistics stay in ``run.dtype`` (torch.autocast chooses the operations that are
    computed in half the bits, such as convolutions and matrix products). What a dataset selects, and which class the
    net predicts, is decided in float32.

    float32    24 bits of significand; on a GPU, too, TF32 is off
    tf32       11 bits in convolutions and matrix products; of NVIDIA's GPUs from Ampere on
    bfloat16   8 bits, the range of float32
    float16    11 bits, numbers up to 65,504; see ``GROWN``

    >>> Precision.of("bfloat16")
    Precision(explain='bfloat16', score='bfloat16')
    >>> Precision.of({"score": "bfloat16"})
    Precision(explain='float32', score='bfloat16')
    """

    explain: Arithmetic = "float32"
    score: Arithmetic = "float32"

    def __post_init__(self) -> None:
        for name in ("explain", "score"):
            given = getattr(self, name)
            if given not in ARITHMETICS:
                what = "precision" if self.explain == self.score else f"precision.{name}"
                raise UserError(
                    f"{what} must be one of {', '.join(ARITHMETICS)}, not {given!r}{did_you_mean(given, ARITHMETICS)}"
                )

    @classmethod
    def of(cls, given: Any) -> Precision:
        """From ``precision``: one name for both, or ``{explain: ..., score: ...}``. Raises UserError."""
        if given is None:
            return cls()
        if isinstance(given, str):
            return cls(given, given)  # type: ignore[arg-type]  # which looks at it
        if not isinstance(given, Mapping):
            raise UserError(f"precision is the name of an arithmetic, or {{explain: ..., score: ...}}, not {given!r}")
        if unknown := set(given) - {"explain", "score"}:
            raise UserError(f"precision has the fields explain and score, not {', '.join(map(str, unknown))}")
        return cls(**given)


def check(arithmetic: Arithmetic, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where there is no such arithmetic."""
    if arithmetic == "float32":
        return
    if dtype != torch.float32:
        raise UserError(
            f"precision={arithmetic} contradicts run.dtype={str(dtype).removeprefix('torch.')}; set one of them only"
        )
    if arithmetic == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is arithmetic of NVIDIA's GPUs, and run.device is {device.type}")


def computed(
    arithmetic: Arithmetic, device: torch.device, dtype: torch.dtype, function: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """``function(*inputs)`` in this arithmetic; the result is in ``dtype``, as gradients at the inputs are.

    Raises UserError for a net that torch computes in float32, but not in this arithmetic.
    """
    half = _HALF.get(arithmetic)
    if half is None:
        return function(*inputs)
    growth = _Growth() if arithmetic == "float16" else None
    try:
        with torch.autocast(device.type, half):
            found = function(*(_Shrunk.apply(x, growth) if growth and x.is_floating_point() else x for x in inputs))
    except RuntimeError as error:
        if of_the_device(error):
            raise
        with torch.no_grad():
            function(*inputs)  # what fails here as well is no matter of precision
        why = str(error).rstrip(".")
        raise UserError(
            f"the net cannot be computed in {arithmetic} on {device.type}: {why}. Set precision=float32"
        ) from error
    if not found.is_floating_point():
        return found
    return found.to(dtype) if growth is None else _Grown.apply(found.to(dtype), growth)


class _Growth:
    """By how much the gradients of each row were multiplied, in the pass back that is under way: powers of two, (N,).

    How small a gradient is at the end of the net says nothing of the net: that of a probability is tiny where the net
    is sure. So each row starts with the same size, and is divided by as much in front of the net.
    """

    factor: Tensor


class _Grown(torch.autograd.Function):
    """The same tensor (N, ...), whose gradients are multiplied to a size of about 2 ** ``GROWN``, row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, growth: _Growth) -> Tensor:
        ctx.growth = growth
        return x.clone()  # a caller may change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            # Those of second order begin in the middle of the net, where nothing multiplies them.
            raise UserError(
                "gradients of gradients (create_graph=True) cannot be computed in float16; set precision=float32"
            )
        _, exponent = torch.frexp(grad.detach().abs().reshape(len(grad), -1).amax(1))
        # Within what float32 can hold, also where a gradient is zero.
        ctx.growth.factor = 2.0 ** (GROWN - exponent).clamp(-100, 100).to(grad.dtype)
        return grad * _beside(ctx.growth.factor, grad), None


class _Shrunk(torch.autograd.Function):
    """The same tensor (N, ...), whose gradients are divided by what those of the row were multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, growth: _Growth) -> Tensor:
        ctx.growth = growth
        return x.clone()  # a net may change its input in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / _beside(ctx.growth.factor, grad), None


def _beside(factor: Tensor, grad: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (grad.ndim - 1))


def rounding(dtype: torch.dtype, arithmetic: Arithmetic = "float32") -> float:
    """What a logit is off by rounding, as a share of the largest one.

    Some thousand units in the last place of float64, eight of float32, as ``results.stats`` has it, because a logit is
    the end of many operations. Of half the bits, the last one.
    """
    return _COARSER.get(arithmetic, _ROUNDING.get(dtype, 1e-6))


def multiplied(arithmetic: Arithmetic) -> AbstractContextManager[None]:
    """Meanwhile products on a GPU are computed in TF32, if that is the arithmetic; forwards and backwards."""
    return tf32() if arithmetic == "tf32" else nullcontext()
