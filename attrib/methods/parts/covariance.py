"""The covariance of the noise of functional information: each sample's own variance, or fitted to the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import Fit, FitData, Partial, State
from attrib.methods.parts.covariance_moments import (
    ONE_LABEL,
    CoMoments,
    Observations,
    PlaceMoments,
    Sketch,
    check_rows,
    check_spread,
)
from attrib.methods.parts.covariance_operators import Dense, Groups, LowRank, Operator, Scale
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

Kind = Literal[
    "auto",
    "sample",
    "sample_channels",
    "scalar",
    "places",
    "channels",
    "diagonal",
    "matrix",
    "stack",
    "full",
    "low_rank",
]
UNFITTED = ("sample", "sample_channels")
BY_PLACE = ("places", "stack")  # of texts
SQUARES: dict[Kind, Literal["shared", "each"]] = {"matrix": "shared", "stack": "each", "full": "shared"}
LARGEST = 2**27  # numbers in the matrices of a state: 1 GiB, and as much again for their factors
_MORE = 10  # columns that the sketch has beyond the rank (Halko, Martinsson & Tropp, 2011)


@dataclass(frozen=True)
class Covariance(Fit):
    """Which covariance, and how it is estimated. Each sample's own variance (``sample...``) needs no fit.

    kind        sample           one variance: that of the sample's own numbers (the released code's None)
                sample_channels  the same of each channel, or of each token of a text (its per_channel)
                scalar           one variance for all samples: the mean over features
                channels         one per channel (C,); of texts one per number of the embedding (E,)
                diagonal         one per feature, (C, H, W); of texts like ``channels``
                matrix           (H W, H W), the same for all channels; of texts (E, E), the same for all tokens
                places           of texts only: one per place in the text (T,)
                stack            a matrix (H W, H W) for each channel; of texts (E, E) for each place in the text
                full             all features together, (C H W, C H W); not of texts
                low_rank         ``rank`` directions and a diagonal that keeps every variance as it is, over the
                                 features of ``full``; of texts over the E numbers of a token
                auto             low_rank; of texts matrix
    per_class   a covariance for each target class, of its samples and about their mean
    rank        of low_rank: directions at most; never more than samples - 1
    passes      of low_rank: how often the data is read. Subspace iteration and the Nystrom approximation of
                the last pass (Halko, Martinsson & Tropp, 2011, section 5.4); exact where rank >= samples - 1
    shrinkage   s, 0 .. 1: S becomes (1 - s) S + s t 1, with t the mean variance (Ledoit & Wolf, 2004)
    jitter      t times this is added to the diagonal. Without it a matrix from fewer samples than features
                has no Cholesky factor

    Every feature has its own mean subtracted, with ddof 1. Of texts each real token is one observation; of one place,
    each text that is long enough. A text that is longer than all but one of the estimation set is refused there.
    Memory: two matrices F x F in float64, of at most 1 GiB each (larger ones are refused: take ``low_rank``);
    low_rank has about 4 F (rank + 10) numbers, 350 MiB at 3 x 224 x 224 and rank 64, and nothing per sample.
    """

    NAME: ClassVar[str] = "attrib.methods.covariance.Covariance"
    VERSION: ClassVar[int] = 1
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    kind: Kind = "sample"
    per_class: bool = False
    rank: int = 64
    passes: int = 2
    shrinkage: float = 0.0
    jitter: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "kind", one_of=get_args(Kind))
        require(self, "rank", "passes", at_least=1)
        require(self, "shrinkage", at_least=0, at_most=1)
        require(self, "jitter", at_least=0)
        if self.jitter == self.shrinkage == 0 and self.kind in ("auto", "low_rank"):
            raise UserError(f"Covariance.jitter is {self.jitter}, must be above 0 for low_rank without shrinkage")
        if self.per_class and self.kind in UNFITTED:
            raise UserError(f"Covariance.per_class needs a covariance of the data, not kind={self.kind}")

    @property
    def roles(self) -> tuple[str, ...]:
        return ()

    @property
    def TARGETS(self) -> bool:  # noqa: N802  as in ``Fit``
        return self.per_class

    @property
    def fitted(self) -> bool:
        """Whether it is estimated from data; otherwise it is each sample's own variance."""
        return self.kind not in UNFITTED

    def _kind(self, text: bool) -> Kind:
        if text and self.kind == "full":
            raise UserError("Covariance.kind=full is not for texts, whose length varies; take matrix or stack")
        if not text and self.kind == "places":
            raise UserError("Covariance.kind=places is for texts only; take channels or diagonal")
        if self.kind == "auto":
            return "matrix" if text else "low_rank"
        return self.kind

    # ---- estimation -----------------------------------------------------------------------------

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        """The state, in float64; K is the number of classes, or 1 without ``per_class``.

        By kind: ``variance`` (K, ...); or ``covariance`` and its Cholesky ``factor``, (K, G, F, F); or ``rest``
        (K, F), ``basis`` (K, F, r) and ``gain`` (K, r), see ``LowRank``. Always ``classes`` (K,), -1 without
        ``per_class``, and ``n`` (K,), the observations of each. Of the places of texts also ``lengths`` (K,): how many
        places at the beginning have a covariance.

        Raises UserError for an estimation set that is too small, does not vary, or needs too much memory.
        """
        if not self.fitted:
            raise UserError(f"Covariance.kind={self.kind} is not fitted")
        first = next(iter(data), None)
        text = first is not None and first.mask is not None
        kind = self._kind(text)
        rows = Observations(model, data, self.per_class, whole=kind in ("full", "low_rank"), report=report)
        if kind == "low_rank":
            return self._low_rank(rows)
        if text and kind in BY_PLACE:
            return self._by_place(kind, rows)
        squares = SQUARES.get(kind)
        moments: dict[int, CoMoments] = {}
        for label, x in rows:
            if squares is not None and label not in moments:
                self._check_size(kind, x.shape[1] if squares == "each" else 1, x.shape[2], len(moments) + 1)
            moments.setdefault(label, CoMoments(squares)).add(x)
        check_rows({label: m.n for label, m in moments.items()}, self.per_class)
        labels = sorted(moments)
        about = {
            "classes": torch.tensor(labels),
            "n": torch.tensor([moments[label].n for label in labels]),
        }
        if squares is None:
            found = torch.stack([self._variance(kind, text, moments[label], rows.shape) for label in labels])
            return {"variance": found, **about}
        shared = moments[labels[0]].mean.shape[0] if squares == "shared" else 1
        matrix = torch.stack([moments[label].m2 / ((moments[label].n - 1) * shared) for label in labels])
        return {**self._factorised(matrix, about["n"]), **about}

    def given(self, covariance: Tensor) -> State:
        """The state of a known covariance of the shape of ``kind``: (), (C,), (T,), (C, H, W), (F, F) or (G, F, F)."""
        about = {"classes": torch.tensor([-1]), "n": torch.tensor([0])}
        covariance = covariance.to(torch.float64)[None]
        if self.kind in ("scalar", "places", "channels", "diagonal"):
            return {"variance": covariance.clone(), **about}
        return {**self._factorised(covariance if covariance.ndim == 4 else covariance[None], about["n"]), **about}

    def _variance(self, kind: Kind, text: bool, moments: CoMoments, shape: tuple[int, ...]) -> Tensor:
        variance = moments.m2 / (moments.n - 1)  # (C, F); of texts (1, E)
        if kind == "scalar":
            found = variance.mean()
        elif text:
            found = variance[0]
        else:
            found = variance.mean(1) if kind == "channels" else variance.view(shape)
        mean = variance.mean()
        check_spread(mean)
        return (1 - self.shrinkage) * found + (self.shrinkage + self.jitter) * mean

    def _by_place(self, kind: Kind, rows: Observations) -> State:
        """The variance or the matrix of each place in a text; one that is the same in all texts has only the jitter."""
        moments: dict[int, PlaceMoments] = {}
        for label, x, mask in rows.samples():
            assert mask is not None  # they are texts
            if kind == "stack":
                self._check_size(kind, x.shape[1], x.shape[2], len(moments | {label: None}))
            moments.setdefault(label, PlaceMoments(kind == "stack")).add(x, mask)
        check_rows({label: int(m.n.max()) if m.n.numel() else 0 for label, m in moments.items()}, self.per_class)
        labels = sorted(moments)
        lengths = [int((moments[label].n >= 2).sum()) for label in labels]
        found: dict[str, list[Tensor]] = {}
        for label, length in zip(labels, lengths, strict=True):
            m = moments[label]
            value = m.m2[:length] / (m.n[:length] - 1).view(-1, *[1] * (m.m2.ndim - 1))
            if kind == "stack":
                mean = value.diagonal(dim1=-2, dim2=-1).mean()
                made = {name: v[0] for name, v in self._factorised(value[None], m.n[:length], mean.view(1, 1)).items()}
            else:
                mean = value.mean()
                check_spread(mean)
                made = {"variance": (1 - self.shrinkage) * value.mean(1) + (self.shrinkage + self.jitter) * mean}
            for name, part in made.items():
                found.setdefault(name, []).append(_with_places(part, max(lengths)))
        about = {
            "classes": torch.tensor(labels),
            "n": torch.tensor([int(moments[label].n.max()) for label in labels]),
            "lengths": torch.tensor(lengths),
        }
        return {name: torch.stack(parts) for name, parts in found.items()} | about

    def _factorised(self, matrix: Tensor, n: Tensor, mean: Tensor | None = None) -> State:
        """``covariance`` (K, G, F, F), which is ``matrix`` after shrinkage, and its Cholesky ``factor``.

        mean  the mean variance, which shrinkage and jitter go by; None: each matrix's own
        """
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1) if mean is None else mean
        check_spread(mean)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        more = (self.shrinkage + self.jitter) * mean[..., None, None]
        matrix = (1 - self.shrinkage) * matrix + more * eye
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed.any():
            raise UserError(
                f"Covariance.kind={self.kind}: {matrix.shape[-1]} features from {int(n.min())} observations: it "
                f"is not positive definite; raise jitter ({self.jitter:g}) or shrinkage ({self.shrinkage:g})"
            )
        return {"covariance": matrix, "factor": factor}

    def _check_size(self, kind: Kind, groups: int, features: int, classes: int) -> None:
        numbers = classes * groups * features**2
        if numbers > LARGEST:
            raise UserError(
                f"Covariance.kind={kind}: {classes * groups} matrices of {features} x {features} take "
                f"{numbers * 8 / 2**30:.1f} GiB, more than {LARGEST * 8 / 2**30:.0f}; take kind=low_rank"
            )

    def _low_rank(self, rows: Observations) -> State:
        q: dict[int, Tensor] = {}
        sketches: dict[int, Sketch] = {}
        for step in range(self.passes):
            sketches = {}
            for label, x in rows:
                x = x[:, 0]
                if label not in sketches:
                    if step == 0:
                        q[label] = _columns(x.shape[1], self.rank + _MORE, x.device)
                    sketches[label] = Sketch(q[label])
                sketches[label].add(x)
            check_rows({label: s.n for label, s in sketches.items()}, self.per_class)
            if step + 1 < self.passes:
                # No more columns than the data has directions: the others would be rounding.
                q = {label: torch.linalg.qr(s.result()[0][:, : s.n - 1])[0] for label, s in sketches.items()}
        labels = sorted(sketches)
        parts = [self._nystrom(sketches[label]) for label in labels]
        rank = max(len(gain) for _, _, gain in parts)
        return {
            "rest": torch.stack([rest for rest, _, _ in parts]),
            "basis": torch.stack([_widened(basis, rank) for _, basis, _ in parts]),
            "gain": torch.stack([_widened(gain, rank) for _, _, gain in parts]),
            "classes": torch.tensor(labels),
            "n": torch.tensor([sketches[label].n for label in labels]),
        }

    def _nystrom(self, sketch: Sketch) -> tuple[Tensor, Tensor, Tensor]:
        """rest (F,), basis (F, r) and gain (r,), see ``LowRank``.

        The Nystrom approximation is below the covariance in every direction, so that what remains of each
        variance for the diagonal is never negative (Tropp et al., 2017).
        """
        product, variance = sketch.result()
        columns = min(product.shape[1], sketch.n - 1)
        product, q = product[:, :columns], sketch.q[:, :columns]
        mean = variance.mean()
        check_spread(mean)
        core = q.T @ product
        value, vector = torch.linalg.eigh((core + core.T) / 2)
        keep = value > value[-1] * 1e-10
        half = product @ (vector[:, keep] / value[keep].sqrt())  # (F, k), half half' is the approximation
        value, vector = torch.linalg.eigh(half.T @ half)
        half = half @ vector[:, value > value[-1] * 1e-10][:, -self.rank :]
        rest = variance - half.square().sum(1)
        rest = rest.where(rest > 1e-10 * mean, 0)  # less is a rounding error, which the jitter would magnify
        rest = (1 - self.shrinkage) * rest + (self.shrinkage + self.jitter) * mean
        half = half * (1 - self.shrinkage) ** 0.5
        if not half.any():
            return rest, half[:, :1], torch.zeros_like(mean)[None]
        basis, root, _ = torch.linalg.svd(half / rest.sqrt()[:, None], full_matrices=False)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return rest, basis * largest.sign(), root**2

    # ---- use --------------------------------------------------------------------------------------

    def of(self, batch: Batch, inputs: Inputs, state: State) -> Spread:
        """The covariances of these samples.

        Raises SampleError for a class that the state does not have, UserError for a state of other inputs.
        """
        x, text = inputs.x, inputs.mask is not None
        kind = self._kind(text)
        if not self.fitted:
            return Spread(torch.arange(len(x), device=x.device), [], _own_variance(kind, inputs))
        index = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if self.per_class:
            if batch.target.ndim != 1:
                raise UserError(ONE_LABEL)
            match = batch.target[:, None] == state["classes"].to(x.device)
            for uid, target, known in zip(batch.uids, batch.target.tolist(), match.any(1).tolist()):
                if not known:
                    raise SampleError(f"{uid}: the estimation set has no class {target} (Covariance.per_class)")
            index = match.long().argmax(1)
        shape = tuple(x.shape[1:])
        state = {name: value.to(x.device) for name, value in state.items()}
        if text and kind in BY_PLACE:
            self._check_lengths(batch, state, index)
        try:
            return Spread(index, [_operator(kind, text, shape, state, k) for k in range(len(state["classes"]))], None)
        except (KeyError, RuntimeError, ValueError) as error:
            what = f"inputs of another shape than {shape}, or is not of kind={kind}"
            raise UserError(f"Covariance: the state was fitted on {what}") from error

    def _check_lengths(self, batch: Batch, state: State, index: Tensor) -> None:
        """Raises SampleError for a text that is longer than the covariances reach."""
        assert batch.mask is not None
        each = state["variance"] if "variance" in state else state["covariance"]
        most = state.get("lengths", torch.tensor([each.shape[1]] * len(each), device=index.device))[index]
        for uid, length, reach in zip(batch.uids, batch.mask.sum(1).tolist(), most.tolist(), strict=True):
            if length > reach:
                raise SampleError(
                    f"{uid}: a text of {length} tokens, but Covariance.kind={self.kind} knows {reach} places only, "
                    "those that two texts of the estimation set have; take matrix, or longer texts there"
                )


@dataclass(frozen=True)
class Spread:
    """The covariances of B samples: each sample's own variance, or an operator that was fitted.

    index       (B,) the number of each sample's operator
    operators   one for each class that the state has; none if ``own`` is given
    own         each sample's own variance, which broadcasts to (B, *x); None if there are operators
    """

    index: Tensor
    operators: Sequence[Operator]
    own: Tensor | None

    @property
    def independent(self) -> bool:
        """See ``Operator.independent``."""
        return self.own is not None or self.operators[0].independent

    def apply(self, v: Tensor, at: Tensor) -> Tensor:
        """v (b, ..., *x) -> the covariance of each sample in ``at`` (b,) times its v."""
        return self._each(lambda operator, part: operator.apply(part), v, at)

    def sample(self, eps: Tensor, at: Tensor) -> Tensor:
        """Standard normal (b, ..., *x) -> normal with the covariances of the samples ``at`` (b,)."""
        return self._each(lambda operator, part: operator.sample(part), eps, at)

    def _each(self, do: Callable[[Operator, Tensor], Tensor], v: Tensor, at: Tensor) -> Tensor:
        if self.own is not None:
            own = self.own[at]
            return do(Scale(own.view(len(at), *[1] * (v.ndim - own.ndim), *own.shape[1:])), v)
        if len(self.operators) == 1:
            return do(self.operators[0], v)
        found, index = torch.empty_like(v), self.index[at]
        for k in index.unique().tolist():
            found[index == k] = do(self.operators[k], v[index == k])
        return found


def _columns(features: int, columns: int, device: torch.device) -> Tensor:
    """(F, k) random orthonormal columns, the same at every call."""
    noise = Noise(["covariance"], device=device, dtype=torch.float64)
    return torch.linalg.qr(noise.normal(features, min(columns, features))[0])[0]


def _widened(value: Tensor, size: int) -> Tensor:
    """(..., r) -> (..., size), filled up with zeros: a direction whose gain is 0 has no effect."""
    return torch.nn.functional.pad(value, (0, size - value.shape[-1]))


def _with_places(value: Tensor, places: int) -> Tensor:
    """(t, ...) -> (places, ...): the first ones, or zeros after those there are."""
    longer = value.new_zeros(places, *value.shape[1:])
    longer[: len(value)] = value[:places]
    return longer


def _own_variance(kind: Kind, inputs: Inputs) -> Tensor:
    """The unbiased variance of each sample, (B, 1, ...), or of each of its channels or tokens, (B, C, 1, ...)."""
    x, mask = inputs.x, inputs.mask
    if kind == "sample_channels":
        if x.ndim < 3:
            raise UserError(f"Covariance.kind=sample_channels: inputs {tuple(x.shape)} have no channels")
        variance = x.flatten(2).var(2)
        return (variance if mask is None else variance * mask).view(*x.shape[:2], *[1] * (x.ndim - 2))
    if mask is None:
        return x.flatten(1).var(1).view(-1, *[1] * (x.ndim - 1))
    real = mask[..., None].to(x.dtype)
    n = mask.sum(1).to(x.dtype) * x.shape[2]
    mean = (x * real).sum((1, 2)) / n
    square = ((x - mean[:, None, None]).square() * real).sum((1, 2))
    return (square / (n - 1)).view(-1, 1, 1)


def _operator(kind: Kind, text: bool, shape: tuple[int, ...], state: State, k: int) -> Operator:
    """The operator of class number k. Raises KeyError, RuntimeError or ValueError if the state does not fit."""
    if kind in ("scalar", "places", "channels", "diagonal"):
        variance = state["variance"][k]
        if kind == "places":
            variance = _with_places(variance, shape[0])[:, None]
        if kind == "channels" and not text:
            variance = variance.view(-1, *[1] * (len(shape) - 1))
        torch.broadcast_shapes(variance.shape, shape)
        return Scale(variance)
    places = 1 if text else shape[0] if len(shape) == 1 else torch.Size(shape[1:]).numel()
    split = int(text or (kind in ("matrix", "stack") and len(shape) > 1))
    groups = Groups(shape, split, places)
    features = torch.Size(shape[split:]).numel()
    if kind == "low_rank":
        rest, basis, gain = (state[name][k] for name in ("rest", "basis", "gain"))
        if len(rest) != features:
            raise ValueError("features")
        used = gain > 0
        return LowRank(groups, rest, basis[:, used], gain[used], text)
    matrix, factor = state["covariance"][k], state["factor"][k]
    if text and kind == "stack":
        matrix, factor = (_with_places(value, shape[0]) for value in (matrix, factor))
    if matrix.shape[-1] != features or matrix.shape[0] not in (1, shape[0]):
        raise ValueError("features")
    return Dense(groups, matrix, factor, text)
