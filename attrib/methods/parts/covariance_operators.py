"""A covariance as an operator: its product with a vector, draws from it, and its conditional on the other places.

The numbers of a sample, of shape (*x), are taken as G groups of F features, and an operator acts on each group
separately:

    kind                          images (C, H, W), sounds (C, L)    texts (T, E)
    scale (a number per feature)  any                                any
    matrix, stack                 C groups of H * W places           T groups of E numbers
    full, low_rank                one group of all C * H * W         T groups of E numbers

Any dimensions may stand in front of those of a sample: values are (..., *x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

Quadratic = Callable[[Tensor], Tensor]  # (..., *x) -> (...)


class Operator(Protocol):
    """The covariance of one sample's numbers."""

    @property
    def independent(self) -> bool:
        """Whether places are independent of each other, so that knowing the others says nothing about a place."""
        ...

    def apply(self, v: Tensor) -> Tensor:
        """(..., *x) -> the covariance times v."""
        ...

    def sample(self, eps: Tensor) -> Tensor:
        """Standard normal numbers (..., *x) -> normal ones with this covariance."""
        ...

    def conditional(self, places: Tensor) -> Quadratic:
        """The quadratic form v -> v_A' S v_A, where A are the numbers at these places.

        places   (m,) indices into the flattened (*places)

        S is the covariance of A given all other numbers R: the Schur complement S_AA - S_AR S_RR^-1 S_RA,
        which is the inverse of A's block of the precision matrix. Only where places depend on each other.
        """
        ...


@dataclass(frozen=True)
class Scale:
    """Independent numbers. ``variance`` broadcasts to (..., *x)."""

    variance: Tensor
    independent: bool = True

    def apply(self, v: Tensor) -> Tensor:
        return v * self.variance.to(v)

    def sample(self, eps: Tensor) -> Tensor:
        return eps * self.variance.sqrt().to(eps)

    def conditional(self, places: Tensor) -> Quadratic:
        raise NotImplementedError("independent places need no conditional")


@dataclass(frozen=True)
class Groups:
    """How the numbers of a sample (*x) form G groups of F features.

    shape   (*x)
    split   how many of its first dimensions number the groups: 1, or 0 for a single group
    places  how many places x has; the F features are one channel's places, or those of all channels in turn
    """

    shape: tuple[int, ...]
    split: int
    places: int

    def __call__(self, v: Tensor) -> Tensor:
        """(..., *x) -> (..., G, F)"""
        lead = v.shape[: v.ndim - len(self.shape)]
        return v.reshape(*lead, *(self.shape[:1] if self.split else (1,)), -1)

    def back(self, v: Tensor) -> Tensor:
        """(..., G, F) -> (..., *x)"""
        return v.reshape(*v.shape[:-2], *self.shape)

    def features(self, places: Tensor, n: int) -> Tensor:
        """Which of a group's n features lie at these places."""
        first = torch.arange(0, n, self.places, device=places.device)
        return (first[:, None] + places).flatten()


def _root(matrix: Tensor) -> Tensor:
    """(..., F, F) Cholesky's factor; NaN, without waiting for the device, of what is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((info != 0)[..., None, None], torch.nan)


@dataclass(frozen=True)
class Dense:
    """One matrix for all groups, or one for each; ``matrix`` = ``factor`` ``factor``', both (1 or G, F, F)."""

    groups: Groups
    matrix: Tensor
    factor: Tensor
    independent: bool

    def _times(self, m: Tensor, v: Tensor) -> Tensor:
        v = self.groups(v)
        if len(m) == 1:
            return self.groups.back(v @ m[0].T)
        return self.groups.back(torch.einsum("gij,...gj->...gi", m, v))

    def apply(self, v: Tensor) -> Tensor:
        return self._times(self.matrix.to(v), v)

    def sample(self, eps: Tensor) -> Tensor:
        return self._times(self.factor.to(eps), eps)

    def conditional(self, places: Tensor) -> Quadratic:
        at = self.groups.features(places, self.matrix.shape[-1])
        part = self._precision[:, at][:, :, at]
        inverse = torch.cholesky_inverse(_root(part))

        def value(v: Tensor) -> Tensor:
            inside = self.groups(v)[..., at]
            s = inverse.to(v)
            times = inside @ s[0] if len(s) == 1 else torch.einsum("gij,...gj->...gi", s, inside)
            return (times * inside).sum((-2, -1))

        return value

    @cached_property
    def _precision(self) -> Tensor:
        return torch.cholesky_inverse(self.factor)


@dataclass(frozen=True)
class LowRank:
    """D^1/2 (1 + V g V') D^1/2, with D = diag(rest) (F,), V = basis (F, r) orthonormal and gain g (r,) > 0."""

    groups: Groups
    rest: Tensor
    basis: Tensor
    gain: Tensor
    independent: bool

    def _around(self, v: Tensor, gain: Tensor) -> Tensor:
        """(1 + V gain V') v for v (..., F)."""
        basis = self.basis.to(v)
        return v + ((v @ basis) * gain.to(v)) @ basis.T

    def apply(self, v: Tensor) -> Tensor:
        root = self.rest.sqrt().to(v)
        return self.groups.back(root * self._around(root * self.groups(v), self.gain))

    def sample(self, eps: Tensor) -> Tensor:
        root = self.rest.sqrt().to(eps)
        return self.groups.back(root * self._around(self.groups(eps), (1 + self.gain).sqrt() - 1))

    def conditional(self, places: Tensor) -> Quadratic:
        """By Woodbury: S = D_A^1/2 (1 + V_A (1 / g + V_R' V_R)^-1 V_A') D_A^1/2."""
        at = self.groups.features(places, len(self.rest))
        basis, root = self.basis[at], self.rest[at].sqrt()
        others = torch.diag(1 + 1 / self.gain) - basis.T @ basis  # V' V = 1
        half = _root(torch.linalg.inv_ex(others).inverse)

        def value(v: Tensor) -> Tensor:
            w = self.groups(v)[..., at] * root.to(v)
            return w.square().sum((-2, -1)) + (w @ (basis @ half).to(v)).square().sum((-2, -1))

        return value
