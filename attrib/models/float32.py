"""How torch multiplies numbers of float32: with all their bits, or fewer. That is set for a whole process.

torch has two ways to say it, and refuses to answer in one what was said in the other, so both are set here:
``torch.set_float32_matmul_precision`` and ``allow_tf32``, and since torch 2.9 ``fp32_precision`` of each kind of
product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ALL_BITS = ("ieee", "none")  # none: as the device does by itself, unless something above says otherwise


def use_all_bits() -> None:
    """Multiply float32 with all its bits from now on, on every device.

    TF32 of a GPU has 10, and ``torch.set_float32_matmul_precision("medium")``, which many training scripts call, lets
    a CPU take bfloat16 of 7.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for kind in _kinds():
        if kind.fp32_precision not in _ALL_BITS:
            kind.fp32_precision = "ieee"


@contextmanager
def all_bits() -> Iterator[None]:
    """Meanwhile :func:`use_all_bits`; afterwards it is as the caller had it."""
    with _restored():
        use_all_bits()
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """Meanwhile products of float32 on a GPU have the bits of TF32; forwards and backwards."""
    with _restored():
        use_all_bits()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        yield


@contextmanager
def _restored() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    kinds = [(kind, kind.fp32_precision) for kind in _kinds()]
    named = _unless_mixed(torch.get_float32_matmul_precision)
    allowed = [(of, _unless_mixed(lambda of=of: of.allow_tf32)) for of in (matmul, cudnn)]
    try:
        yield
    finally:
        for of, value in allowed:
            if value is not None:
                of.allow_tf32 = value
        if named is not None:  # last, as allow_tf32 changes it
            torch.set_float32_matmul_precision(named)
        for kind, value in kinds:
            if kind.fp32_precision != value:
                kind.fp32_precision = value


def _unless_mixed(get: Any) -> Any:
    """What the older way says; None where only the newer one was used, and torch refuses to say."""
    try:
        return get()
    except RuntimeError:
        return None


def _kinds() -> list[Any]:
    """The kinds of products that have an ``fp32_precision``; none before torch 2.9."""
    several = ("matmul", "conv", "rnn")
    kinds = [getattr(torch.backends.mkldnn, name, None) for name in several]
    kinds += [torch.backends.cuda.matmul, *(getattr(torch.backends.cudnn, name, None) for name in several[1:])]
    return [kind for kind in kinds if hasattr(kind, "fp32_precision")]
