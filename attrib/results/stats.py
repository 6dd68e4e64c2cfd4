"""Statistics of per-sample scores: intervals of means, paired tests, effect sizes, corrections, ranks.

Numpy and scipy only. Everything is a function of its arguments: random draws come from a local generator with a fixed
seed, so that a table drawn twice is the same table. Samples have no order, so everything is sorted before it is drawn
from or added up, and no unit of measurement is too small or too large for a square (:func:`in_unit`).

Scores are the results of arithmetic, and rounding must not decide which of two equal ones is larger: 4/9 - 3/9 and
3/9 - 2/9 are the same number, but not the same float. One rule serves all tests and ranks. A score is known up to
:func:`rounding_error`, a difference up to the larger error of its two scores; values that differ by no more than their
error are equal (:func:`equalised`), and so share their rank.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

RESAMPLES = 9_999
EXACT = 14  # up to so many pairs all 2**n sign flips are walked through
LARGE_BOOTSTRAP = 100  # above, the closed form differs from BCa by less than BCa's own Monte-Carlo noise
LARGE_PERMUTATION = 1_000  # above, the same holds for the normal limit of the sign-flip distribution
_BATCH = 1_000_000  # elements drawn at a time: bounds memory, fits the cache
_TILTED = 2_500  # draws for a tail, of which about half count
_FEW = 10  # hits among RESAMPLES below which a p is estimated as a tail
# Relative error of a score by rounding: some thousand units in the last place of float64, eight of float32, because a
# score is the end of many operations.
ROUNDING, ROUNDING_SINGLE = 1e-12, 1e-6


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its confidence interval. ``n`` is how many finite values it rests on."""

    n: int
    mean: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Paired:
    """A paired comparison: mean of a - b with its interval, two-sided p, two effect sizes, number of pairs."""

    n: int
    difference: float
    lo: float
    hi: float
    p: float
    effect: float  # Cohen's d_z
    rank_biserial: float


@dataclass(frozen=True)
class Ranks:
    """k methods ranked on each of n samples, the best of a sample first.

    ranks       (k,) mean rank of each; equal scores share the mean of their places
    chi2, p     Friedman's test of "all are alike", k - 1 degrees of freedom
    difference  Nemenyi's critical difference: mean ranks further apart are distinguishable
    groups      (k,) letters; methods that share one are not distinguishable
    """

    n: int
    ranks: np.ndarray
    chi2: float
    p: float
    difference: float
    groups: tuple[str, ...]


def rounding_error(scores: np.ndarray) -> np.ndarray:
    """How far each of the finite ``scores`` (any shape) may be off by rounding.

    Relative to its size: ``ROUNDING``, or ``ROUNDING_SINGLE`` where every score is a float32 number, as the scores of
    a metric are that computes in float32.
    """
    with np.errstate(over="ignore"):
        single = np.array_equal(scores.astype(np.float32), scores)
    return (ROUNDING_SINGLE if single else ROUNDING) * np.abs(scores)


def none_better(values: np.ndarray) -> np.ndarray:
    """Which of k methods no other beats, (k,) bool; scores (n, k), higher is better, NaN where there is none.

    Two are compared by the means of the samples that both have, if there are any; means that differ by rounding alone
    are equal. It may be none, as with three methods each of which is better than the next.

    >>> none_better(np.array([[0.9, 0.8], [0.5, np.nan]]))
    array([ True, False])
    """
    finite = np.isfinite(values)
    there = finite.astype(float)
    common = there.T @ there
    mean = (np.where(finite, values, 0.0).T @ there) / np.maximum(common, 1)  # of each, on the other's samples
    behind = mean.T - mean > rounding_error(mean)
    return ~(behind & (common > 0)).any(axis=1)


def equalised(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``values`` (n,) with those that are equal up to their ``error`` (n,) made exactly equal; (n, k): each column.

    From the least value upwards, each value that is no further above the first of its group than the error of either
    takes that first one's place. A group is therefore never wider than an error, however many values there are.
    """
    place = np.lexsort((-error, values), axis=0)  # of the same value the most uncertain one first
    levels, slack = (np.take_along_axis(x, place, axis=0) for x in (values, error))
    number = np.arange(len(levels)).reshape(-1, *[1] * (levels.ndim - 1))
    same = np.zeros(levels.shape, dtype=bool)
    same[1:] = levels[1:] == levels[:-1]
    slack = np.take_along_axis(slack, np.maximum.accumulate(np.where(same, 0, number)), axis=0)
    # Only where a value is this close to the one before may it join a group.
    near = np.diff(levels, axis=0) <= np.maximum(slack[1:], np.maximum.accumulate(slack, axis=0)[:-1])
    first = np.broadcast_to(number, levels.shape).copy()  # of each level's group
    for i in np.flatnonzero(near.reshape(len(near), math.prod(levels.shape[1:])).any(1)) + 1:
        start = first[i - 1 : i]
        lowest, its = (np.take_along_axis(x, start, axis=0)[0] for x in (levels, slack))
        first[i] = np.where(levels[i] - lowest <= np.maximum(slack[i], its), start[0], first[i])
    found = np.empty_like(levels)
    np.put_along_axis(found, place, np.take_along_axis(levels, first, axis=0), axis=0)
    return found


def interval(values: ArrayLike, confidence: float = 0.95, *, seed: int = 0) -> MeanInterval:
    """Bootstrap confidence interval of the mean of ``values`` (n,).

    BCa (bias-corrected and accelerated; Efron 1987) with 9,999 resamples. Above 100 values its
    closed form for a mean, the ABC interval (DiCiccio & Efron 1992), which costs one pass.

    Values that are not finite are left out; ``n`` counts the others. n = 0: everything is NaN. n = 1: the
    mean alone, lo and hi are NaN. All values equal: an interval of width zero, which is what the
    bootstrap gives and says nothing about values not seen. Where BCa is undefined otherwise, the
    percentile interval.
    """
    _check(confidence)
    x = np.asarray(values, dtype=np.float64).ravel()
    x = x[np.isfinite(x)]
    if x.size < 2:
        return MeanInterval(x.size, float(x.mean()) if x.size else math.nan, math.nan, math.nan)
    constant = _constant(x)
    x, unit = in_unit(np.sort(x))
    mean = float(x.mean()) * unit
    if constant:
        return MeanInterval(x.size, mean, mean, mean)
    lo, hi = _abc(x, confidence) if x.size > LARGE_BOOTSTRAP else _bootstrap(x, confidence, seed)
    return MeanInterval(x.size, mean, lo * unit, hi * unit)


def paired_test(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, *, seed: int = 0) -> Paired:
    """Compare two methods on the same samples; ``a`` and ``b`` are (n,), in the same order.

    The permutation test of scipy.stats.permutation_test(permutation_type="samples") on the mean
    difference: under the null hypothesis the two scores of a sample may be swapped, so the sign of
    each difference is a coin. All 2**n outcomes up to n = 14; 9,999 random ones up to n = 1,000,
    where p = (hits + 1) / 10,000; above, the normal limit of the same distribution. Fewer than ten hits say
    little of a small p, and no p below 1 / 10,000 could come out, which a table of 500 pairs needs after correction:
    the coins are then biased towards the observed outcome and each draw weighted by how much likelier that
    made it (importance sampling by exponential tilting; Siegmund, Ann. Statist. 4, 1976), which is right to some
    per cent however small p is.
    (Our own loop, because one matrix product is ten times faster than scipy's; tests compare them.)

    Two effect sizes, which unlike p do not grow with n. Cohen's d_z, mean difference over standard
    deviation of the differences, is the size of what is tested; ±inf where all differences are equal
    and not 0, 0 where all are 0, NaN for n = 1. The matched-pairs rank-biserial correlation (Kerby
    2014) is what no outlier can move: the share of the ranks of |a - b| at which a is ahead, less the
    share at which b is; 1 if a is always ahead, -1 if b is. Differences of 0 take their ranks, and
    count for neither. NaN for n = 0.

    Differences that are equal up to the rounding of the scores (see above) are equal in all of this; what is 0 up
    to rounding is 0.

    Pairs with a value that is not finite are left out; ``n`` counts the others. The interval is that
    of :func:`interval`. Raises ValueError if the lengths differ.
    """
    _check(confidence)
    a, b = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if a.size != b.size:
        raise ValueError(f"paired_test needs two equally long sequences, got {a.size} and {b.size} values")
    use = np.isfinite(a) & np.isfinite(b)
    a, b = a[use], b[use]
    error = rounding_error(np.stack((a, b))).max(0)
    d = np.where(np.abs(a - b) <= error, 0.0, a - b)
    error[d == 0] = 0
    d = np.copysign(equalised(np.abs(d), error), d)
    order = np.lexsort((error, d, np.abs(d)))
    d, error = d[order], error[order]
    mean = interval(d, confidence, seed=seed)
    d, unit = in_unit(d)
    p = _sign_flip(d, seed, float(np.linalg.norm(error / unit)))
    return Paired(mean.n, mean.mean, mean.lo, mean.hi, p, _effect(d), _rank_biserial(d))


def smallest_p(n: int) -> float:
    """The smallest p that :func:`paired_test` can have for ``n`` pairs: that of one outcome and its opposite."""
    return 0.0 if n > LARGE_PERMUTATION else min(1.0, 2.0 ** (1 - n))


def in_unit(x: np.ndarray) -> tuple[np.ndarray, float]:
    """``x`` (n,) over the power of two below its largest size, and that power: exact, and squares stay finite."""
    _, exponent = math.frexp(float(np.abs(x).max(initial=0.0)))
    return np.ldexp(x, 1 - exponent), math.ldexp(1.0, exponent - 1)


def holm(p: ArrayLike) -> np.ndarray:
    """p-values (k,) adjusted for k tests (Holm 1979): the chance of any false alarm stays below alpha.

    NaN (a test without pairs) stays NaN and does not count as a test.
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]  # NaN sorts last
    steps = p[order] * np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def ranks(scores: ArrayLike, *, higher: bool = True, confidence: float = 0.95) -> Ranks:
    """Rank k >= 2 methods by their ``scores`` (n, k) of the same n samples (Demšar 2006, section 3.2.2).

    Friedman's chi-squared is corrected for ties, as in scipy.stats.friedmanchisquare. The critical
    difference is q sqrt(k (k + 1) / 6n), q the Studentized range over sqrt(2). Where Friedman's test
    does not reject at 1 - confidence, all methods are one group. Scores of a sample that are equal up to
    rounding (see above) share their rank.

    Samples with a score that is not finite are left out; ``n`` counts the others. n = 0: everything is
    NaN. Raises ValueError for fewer than two methods.
    """
    _check(confidence)
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"ranks needs (samples, methods) of at least two methods, got {x.shape}")
    x = x[np.isfinite(x).all(1)]
    n, k = x.shape
    if not n:
        return Ranks(0, np.full(k, math.nan), math.nan, math.nan, math.nan, ("",) * k)
    error = rounding_error(x)
    gaps = np.diff(np.sort(x, axis=1), axis=1)
    # Only where two scores are almost, but not exactly, equal is there anything to do.
    for i in np.flatnonzero(((gaps > 0) & (gaps <= error.max(1, keepdims=True))).any(1)):
        x[i] = equalised(x[i], error[i])
    each = stats.rankdata(-x if higher else x, axis=1)
    mean = each.mean(0)
    # Equal scores take 1 / 12 (t^3 - t) off the sum of squared ranks; nothing is left where all are equal.
    free = ((each - (k + 1) / 2) ** 2).sum() / (n * k * (k * k - 1) / 12)
    spread = 12 * n / (k * (k + 1)) * ((mean - (k + 1) / 2) ** 2).sum()
    chi2 = float(spread / free) if free > 1e-12 else 0.0
    p = float(stats.chi2.sf(chi2, k - 1))
    q = stats.studentized_range.ppf(confidence, k, math.inf) / math.sqrt(2)
    difference = float(q * math.sqrt(k * (k + 1) / (6 * n)))
    alike = math.inf if p > 1 - confidence else difference
    return Ranks(n, mean, chi2, p, difference, _letters(mean, alike))


def _letters(mean: np.ndarray, alike: float) -> tuple[str, ...]:
    """A letter for each largest run of neighbouring ranks that lie within ``alike``."""
    order, letters, end, names = np.argsort(mean, kind="stable"), [""] * mean.size, 0, 0
    for first in range(mean.size):
        last = first
        while last < mean.size and mean[order[last]] - mean[order[first]] <= alike:
            last += 1
        if last > end:
            for place in order[first:last]:
                letters[place] += _name(names)
            end, names = last, names + 1
    return tuple(letters)


def _name(number: int) -> str:
    """a .. z, then A .. Z, then numbers in brackets."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return alphabet[number] if number < len(alphabet) else f"({number})"


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1 (such as 0.95), got {confidence}")


def _constant(x: np.ndarray) -> bool:
    return bool(np.ptp(x) <= rounding_error(x).max())


def _bootstrap(x: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    centre, error = float(x.mean()), ROUNDING * float(np.abs(x).mean())
    means = _resamples(x.size, seed) @ x / x.size
    # BCa counts how many lie below the observed mean, so one that equals it must do so to the last bit.
    drawn = SimpleNamespace(bootstrap_distribution=np.where(np.abs(means - centre) <= error, centre, means))
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # answered by the second method
            found = stats.bootstrap(
                (x,), np.mean, confidence_level=confidence, n_resamples=0, bootstrap_result=drawn, method=method
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return float(found.low), float(found.high)


# A table has hundreds of intervals and tests of as many samples, and to draw takes longer than to add up.
@functools.lru_cache(maxsize=1)
def _resamples(n: int, seed: int) -> np.ndarray:
    """How often each of n values is in each of ``RESAMPLES`` bootstrap samples, (RESAMPLES, n)."""
    rng, counts = np.random.default_rng(seed), np.zeros((RESAMPLES, n))
    each = max(1, _BATCH // n)
    for block in (counts[i : i + each] for i in range(0, RESAMPLES, each)):
        drawn = rng.integers(0, n, block.shape) + n * np.arange(len(block))[:, None]
        block += np.bincount(drawn.ravel(), minlength=block.size).reshape(block.shape)
    return counts


def _abc(x: np.ndarray, confidence: float) -> tuple[float, float]:
    """DiCiccio & Efron 1992, for a mean: the bias correction equals the acceleration a, curvature is 0."""
    x = np.sort(x)
    d = x - x.mean()
    squares = (d**2).sum()
    sigma, a = math.sqrt(squares) / x.size, (d**3).sum() / (6 * squares**1.5)
    z = stats.norm.ppf((1 + confidence) / 2)
    lo, hi = (x.mean() + sigma * w / (1 - a * w) ** 2 for w in (a - z, a + z))
    return float(lo), float(hi)


def _sign_flip(d: np.ndarray, seed: int, error: float = 0.0) -> float:
    """Two-sided p of the mean of ``d`` (n,), whose sum is known up to ``error``, under random signs; NaN for n = 0.

    Under these only the sizes count, so that neither the order nor the sign of ``d`` changes p.
    """
    if d.size == 0:
        return math.nan
    if not d.any():
        return 1.0
    if d.size > LARGE_PERMUTATION:
        return float(2 * stats.norm.sf(abs(math.fsum(d)) / math.sqrt(math.fsum(d**2))))
    size = np.sort(np.abs(d))
    # Rounding in the sums must not break ties with the observed value.
    least = abs(math.fsum(d)) - max(error, ROUNDING * size.sum())
    if d.size <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=d.size)))
        return float((np.abs(signs @ size) >= least).mean())
    sums = (2 * (coins @ size) - size.sum() for coins in _coins(d.size, seed))
    hits = sum(int((np.abs(found) >= least).sum()) for found in sums)
    if hits < _FEW:
        return _tail(size, least, seed)
    return (hits + 1) / (RESAMPLES + 1)


@functools.lru_cache(maxsize=1)
def _coins(n: int, seed: int) -> tuple[np.ndarray, ...]:
    """``RESAMPLES`` times n coins, 0 or 1, in blocks (count, n)."""
    rng, left, blocks = np.random.default_rng(seed), RESAMPLES, []
    while left:
        count = min(left, max(1, _BATCH // n))
        blocks.append(rng.integers(0, 2, (count, n), dtype=np.int8).astype(np.float64))
        left -= count
    return tuple(blocks)


def _tail(size: np.ndarray, least: float, seed: int) -> float:
    """Two-sided p of ``least`` under random signs of ``size`` (n,), all >= 0, where it is small.

    A sign is + with probability 1 / (1 + exp(-2 t size)), with t such that the mean of the sum is about ``least``.
    A draw with the sum s then weighs exp(sum(log cosh(t size)) - t s).
    """
    size = size[size > 0]
    scaled, bound = size / size.max(), least / size.max()

    def short(t: float) -> float:
        return float((scaled * np.tanh(t * scaled)).sum()) - bound

    most = 1.0
    while short(most) <= 0 and most < 1e12:  # few large sizes among many small ones want a large t
        most *= 8
    # If the mean cannot get there, nearly all signs are as observed, and so they are with the largest t.
    t = most if short(most) <= 0 else float(optimize.brentq(short, 0.0, most))
    likely = 1 / (1 + np.exp(-2 * t * scaled))
    log_cosh = np.logaddexp(t * scaled, -t * scaled).sum() - scaled.size * math.log(2)
    rng, weights, left = np.random.default_rng(seed), 0.0, _TILTED
    while left:
        count = min(left, max(1, _BATCH // size.size))
        sums = (2.0 * (rng.random((count, size.size)) < likely) - 1) @ scaled
        hit = sums[sums >= bound]
        weights += float(np.exp(log_cosh - t * hit).sum())
        left -= count
    return min(1.0, max(2 * weights / _TILTED, smallest_p(size.size)))


def _effect(d: np.ndarray) -> float:
    if d.size < 2:
        return math.nan
    if _constant(d):
        return 0.0 if d[0] == 0 else math.copysign(math.inf, d[0])
    return float(d.mean() / d.std(ddof=1))


def _rank_biserial(d: np.ndarray) -> float:
    if d.size == 0:
        return math.nan
    ranked = stats.rankdata(np.abs(d))
    return float((ranked * np.sign(d)).sum() / ranked.sum())
