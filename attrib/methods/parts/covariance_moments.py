"""Streaming sums over a data set, from which covariances are computed.

They are in float64 and do not depend on how the data is divided into batches: moments are merged by the update
of Chan, Golub & LeVeque (1979); the sums of a ``Sketch`` are taken about its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from attrib.fit import FitData, Progress
from attrib.methods.parts.inputs import Inputs
from attrib.models import Classifier
from attrib.types import UserError

ONE_LABEL = "Covariance.per_class needs one label per sample; these have several"


class CoMoments:
    """Streaming mean (C, F) of rows (C, F), and the sums ``m2`` of products of deviations from it.

    squares   None: only the square of each number, (C, F); "shared": one matrix (1, F, F), summed over C;
              "each": a matrix for each channel, (C, F, F)
    """

    def __init__(self, squares: Literal["shared", "each"] | None) -> None:
        self.n, self.squares = 0, squares
        self.mean = self.m2 = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x (rows, C, F)."""
        if not len(x):
            return
        x = x.to(torch.float64)
        n, mean = len(x), x.mean(0)
        m2, total, delta = self._products(x - mean), self.n + n, mean - self.mean
        between = self._products(delta[None]) * (self.n * n / total) if self.n else 0
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + m2 + between
        self.n = total

    def _products(self, x: Tensor) -> Tensor:
        if self.squares is None:
            return x.square().sum(0)
        if self.squares == "each":
            return torch.einsum("nci,ncj->cij", x, x)
        flat = x.flatten(0, 1)
        return (flat.T @ flat)[None]


class PlaceMoments:
    """``CoMoments`` of texts, of each place by itself: T places so far, with ``n`` (T,) observations each.

    mean   (T, E)
    m2     (T, E), or with ``squares`` the products of all pairs, (T, E, E)
    """

    def __init__(self, squares: bool) -> None:
        self.squares = squares
        self.n = self.mean = self.m2 = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, mask: Tensor) -> None:
        """x (rows, T, E), of which the tokens where ``mask`` (rows, T) is True are observations."""
        x, real = x.to(torch.float64), mask.to(x.device, torch.float64).unsqueeze(2)
        n = real.sum((0, 2))
        mean = (x * real).sum(0) / n.clamp(min=1)[:, None]
        m2 = self._products((x - mean) * real)
        most = max(len(n), len(self.n) if self.n.ndim else 0)
        before = [_longer(value, like, most) for value, like in ((self.n, n), (self.mean, mean), (self.m2, m2))]
        n, mean, m2 = (_longer(value, value, most) for value in (n, mean, m2))
        total, delta = before[0] + n, mean - before[1]
        share = n / total.clamp(min=1)
        between = self._products(delta[None]) * (before[0] * share).view(-1, *[1] * (m2.ndim - 1))
        self.n, self.mean, self.m2 = total, before[1] + delta * share[:, None], before[2] + m2 + between

    def _products(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,ntj->tij", x, x) if self.squares else x.square().sum(0)


def _longer(value: Tensor, like: Tensor, places: int) -> Tensor:
    """(t, ...), or a 0 of no shape, -> (places, ...) with zeros at the end and the other dimensions of ``like``."""
    longer = like.new_zeros(places, *like.shape[1:])
    if value.ndim:
        longer[: len(value)] = value
    return longer


class Sketch:
    """Streaming product of a covariance with the columns of q (F, k), and its diagonal, from rows (F,)."""

    def __init__(self, q: Tensor) -> None:
        self.n, self.q = 0, q
        self._first = self._sum = self._squares = self._product = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x (rows, F)."""
        if not len(x):
            return
        x = x.to(torch.float64)
        if not self.n:
            self._first = x[0].clone()  # about it, so that a large mean costs no digits
        x = x - self._first
        self._sum = self._sum + x.sum(0)
        self._squares = self._squares + x.square().sum(0)
        self._product = self._product + x.T @ (x @ self.q)
        self.n += len(x)

    def result(self) -> tuple[Tensor, Tensor]:
        """The product (F, k) and the variances (F,), with ddof 1."""
        mean = self._sum / self.n
        product = self._product - self.n * mean[:, None] * (mean @ self.q)
        return product / (self.n - 1), ((self._squares - self.n * mean**2) / (self.n - 1)).clamp(min=0)


class Observations:
    """The observations of a data set; each iteration reads it anew and gives pairs (class or -1, rows (n, C, F)).

    Of texts a row is a real token, (n, 1, E).

    per_class   the rows of each class by themselves; otherwise the class is given as -1
    whole       all features of an image or sound together, (n, 1, C F)
    report      see ``Fit.run``
    """

    def __init__(
        self, model: Classifier, data: FitData, per_class: bool, whole: bool, report: Callable[[str], None]
    ) -> None:
        self.model, self.data, self.per_class, self.whole, self.report = model, data, per_class, whole, report
        self.shape: tuple[int, ...] = ()  # of an image or sound

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for label, x, mask in self.samples():
            yield label, self._rows(x, mask)

    def samples(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(class or -1, (rows, *x), of texts which tokens are real (rows, T)), for each batch and class."""
        seen = 0
        for batch in self.data:
            if self.per_class and batch.target.ndim != 1:
                raise UserError(ONE_LABEL)
            x = batch.x if batch.mask is None else Inputs.of(self.model, batch).x
            for label in sorted(batch.target.unique().tolist()) if self.per_class else [-1]:
                mine = batch.target == label if self.per_class else torch.ones(len(x), dtype=torch.bool)
                yield label, x[mine.to(x.device)], None if batch.mask is None else batch.mask[mine]
            seen += len(batch)
            self.report(Progress("covariance", seen, len(self.data.uids), "samples"))

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return x[mask].unsqueeze(1)
        if self.shape not in ((), tuple(x.shape[1:])):
            raise UserError(f"Covariance: inputs of {tuple(x.shape[1:])} and of {self.shape} in one estimation set")
        self.shape = tuple(x.shape[1:])
        return x.flatten(1).unsqueeze(1) if self.whole or x.ndim == 2 else x.flatten(2)


def check_rows(counts: dict[int, int], per_class: bool) -> None:
    """Raises UserError unless there are at least two observations (of each class: ``counts`` is by class)."""
    few = [label for label, n in counts.items() if n < 2]
    if few or not counts:
        of = f" of each class, and class {few[0]} has {counts[few[0]]}" if per_class and few else ""
        raise UserError(f"a covariance needs at least 2 samples{of}: the estimation set is too small")


def check_spread(variance: Tensor) -> None:
    """Raises UserError if a variance is zero or not finite."""
    if not variance.isfinite().all():
        raise UserError("the covariance has NaN or infinite values: so has a sample of the estimation set")
    if not (variance > 0).all():
        raise UserError("the inputs of the estimation set do not vary: they have no covariance")
