"""Known answers, scipy as a referee, and a small coverage simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from attrib.results import stats


def sample(n, seed=0):
    return np.random.default_rng(seed).gamma(1.0, 1.0, n)


def test_interval_is_scipys_bca():
    x = sample(40)
    expected = scipy_stats.bootstrap(
        (x,), np.mean, n_resamples=9999, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    found = stats.interval(x)
    assert (found.n, found.mean) == (40, x.mean())
    # The batches draw other numbers: equal within Monte-Carlo noise.
    assert (found.lo, found.hi) == pytest.approx((expected.low, expected.high), abs=0.05 * x.std() / math.sqrt(40) * 3)


def test_interval_is_repeatable_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    assert stats.interval(sample(30)) == stats.interval(sample(30))
    assert (np.random.get_state()[1] == before).all()


def test_wide_confidence_is_wider():
    x = sample(50)
    inner, outer = stats.interval(x, 0.8), stats.interval(x, 0.99)
    assert outer.lo < inner.lo < inner.mean < inner.hi < outer.hi


@pytest.mark.parametrize("unit", [1e-300, 1e-12, 3.0, 0.1, 1e150, 7e299])
@pytest.mark.parametrize("n", [3, 5, 7])
def test_the_unit_of_few_scores_changes_no_interval(n, unit):
    """Many resamples of few scores hold each once: their mean is the observed one, in whatever order it is added up."""
    a, b = np.random.default_rng(n).random((2, n))
    one, other = stats.paired_test(a, b), stats.paired_test(a * unit, b * unit)
    assert (other.lo / unit, other.hi / unit) == pytest.approx((one.lo, one.hi), rel=1e-9)
    assert other.p == one.p


def test_closed_form_agrees_with_the_bootstrap_where_it_takes_over():
    x = sample(stats.LARGE_BOOTSTRAP)
    se = x.std() / math.sqrt(x.size)
    assert stats._abc(x, 0.95) == pytest.approx(stats._bootstrap(x, 0.95, 0), abs=0.1 * se)
    # A symmetric sample has no acceleration: exactly the normal interval.
    y = np.concatenate([x, -x])
    se = y.std() / math.sqrt(y.size)
    assert stats._abc(y, 0.95) == pytest.approx((-1.959964 * se, 1.959964 * se), rel=1e-6)
    assert stats.interval(y).lo == stats._abc(y, 0.95)[0]


def test_interval_of_degenerate_inputs():
    none = stats.interval([])
    assert none.n == 0
    assert all(map(math.isnan, (none.mean, none.lo, none.hi)))
    one = stats.interval([3.0, math.nan, math.inf])
    assert (one.n, one.mean) == (1, 3.0)
    assert math.isnan(one.lo)
    assert math.isnan(one.hi)
    assert stats.interval([2.0] * 5) == stats.MeanInterval(5, 2.0, 2.0, 2.0)
    noise = stats.interval([0.3, 0.1 + 0.2])
    assert noise.lo == noise.hi == noise.mean
    two = stats.interval([0.0, 1.0])
    assert (two.lo, two.hi) == (0.0, 1.0)
    assert stats.interval([1.0, 2.0, math.nan, 4.0]) == stats.interval([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match=r"confidence.*95$"):
        stats.interval([1, 2], confidence=95)


def test_percentile_interval_where_bca_is_undefined(monkeypatch):
    real = scipy_stats.bootstrap

    def undefined(*args, method, **kwargs):
        result = real(*args, method="percentile", **kwargs)
        if method == "BCa":
            result.confidence_interval = type(result.confidence_interval)(math.nan, math.nan)
        return result

    monkeypatch.setattr(stats.stats, "bootstrap", undefined)
    x = sample(20)
    found = stats.interval(x)
    assert found.lo < x.mean() < found.hi


@pytest.mark.parametrize("n", [30, 400])
def test_coverage(n):
    """A 90 % interval of a skewed variable's mean (1) covers it in about 90 % of the samples."""
    covered = [(lambda i: i.lo <= 1.0 <= i.hi)(stats.interval(sample(n, seed), 0.9, seed=seed)) for seed in range(200)]
    assert 0.83 <= np.mean(covered) <= 0.96


def test_paired_test_by_hand():
    # Differences 1, 2, 3: of the eight sign patterns only +++ and --- reach |sum| = 6.
    found = stats.paired_test([2, 4, 6], [1, 2, 3])
    assert (found.n, found.difference, found.p) == (3, 2.0, 0.25)
    assert found.effect == pytest.approx(2.0)  # mean 2, standard deviation 1
    back = stats.paired_test([1, 2, 3], [2, 4, 6])
    assert (back.difference, back.p, back.effect) == (-2.0, 0.25, pytest.approx(-2.0))


@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_paired_test_is_exact_when_small(n):
    a, b = sample(n, 1), sample(n, 2) + 0.4
    expected = scipy_stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert stats.paired_test(a, b).p == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [15, 60, 400])
def test_paired_test_agrees_with_scipy_and_t_when_larger(n):
    rng = np.random.default_rng(n)
    b = sample(n)
    a = b + rng.normal(1.0, 4.0, n) / math.sqrt(n)
    found = stats.paired_test(a, b)
    expected = scipy_stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=4999, random_state=np.random.default_rng(1)
    )
    assert found.p == pytest.approx(expected.pvalue, abs=0.025)
    assert found.p == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, abs=0.04)
    assert found.lo <= found.difference <= found.hi
    assert found == stats.paired_test(a, b)


@pytest.mark.parametrize(
    "d",
    [
        np.random.default_rng(0).normal(1.5, 1, 18),
        np.random.default_rng(1).exponential(1, 16),
        np.where(np.arange(18) < 1, -1.0, 1.0),  # the sum takes few values
        np.where(np.arange(16) < 13, 1.0, 0.0),  # what is equal counts for neither
        np.array([-0.001, *np.ones(16)]),
        np.array([1000.0, *np.ones(16), -1.0]),  # of hardly a sign but the largest does the sum depend
    ],
    ids=["normal", "all ahead", "lattice", "ties", "one tiny", "one enormous"],
)
def test_a_small_p_is_that_of_all_outcomes(d):
    """Slowly: all 2**n of them. Fewer than ten of 9,999 random ones would be as extreme."""
    d, size = d.astype(float), np.abs(d)
    sums = np.zeros(1)
    for one in size:
        sums = np.concatenate((sums - one, sums + one))
    exact = float((np.abs(sums) >= abs(d.sum()) - 1e-9).mean())
    assert exact < 10 / stats.RESAMPLES
    found = stats.paired_test(d, np.zeros(d.size)).p
    assert found == pytest.approx(exact, rel=0.1)
    assert found == stats.paired_test(-d[::-1], np.zeros(d.size)).p


@pytest.mark.parametrize(("n", "ahead", "outlier"), [(100, 80, 1000.0), (60, 50, 100.0), (200, 150, 300.0)])
def test_a_small_p_with_an_outlier(n, ahead, outlier):
    """Where all signs but one are coins of equal size, the sum is that of a binomial distribution."""
    d = np.concatenate(([outlier], np.ones(ahead), -np.ones(n - ahead)))
    least = outlier + 2 * ahead - n
    # The outlier is +, and at least ``ahead`` of the others are; or all of it turned round.
    exact = scipy_stats.binom.sf(ahead - 1, n, 0.5)
    assert outlier > n  # so the outlier alone decides the sign of the sum
    assert stats.paired_test(d, 0 * d).p == pytest.approx(exact, rel=0.1)
    assert d.sum() == least


def test_a_small_p_of_many_samples():
    """No p below 1 / 10,000 would survive the correction of a table of 500 pairs."""
    d = np.random.default_rng(2).normal(0.6, 1, 300)
    found = stats.paired_test(d, 0 * d)
    assert found.p == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, rel=5)  # of another test
    assert found.p < 1e-16
    assert stats.paired_test(np.ones(200), np.zeros(200)).p == pytest.approx(stats.smallest_p(200), rel=0.1)


def test_normal_limit_agrees_with_the_permutations_where_it_takes_over(monkeypatch):
    n = stats.LARGE_PERMUTATION
    d = np.random.default_rng(0).standard_t(4, n) + 0.05
    random = stats._sign_flip(d, 0)
    monkeypatch.setattr(stats, "LARGE_PERMUTATION", n - 1)
    assert stats._sign_flip(d, 0) == pytest.approx(random, abs=0.01)


def test_paired_test_of_degenerate_inputs():
    same = stats.paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.difference, same.lo, same.hi, same.p, same.effect) == (0, 0, 0, 1, 0)
    rounding = stats.paired_test([0.1 + 0.2] * 20, [0.3] * 20)
    assert (rounding.p, rounding.effect) == (1.0, 0.0)
    shifted = stats.paired_test([2.0] * 4, [1.0] * 4)
    assert (shifted.p, shifted.effect) == (2 / 16, math.inf)
    gaps = stats.paired_test([1.0, math.nan, 3.0, 4.0], [0.0, 1.0, math.inf, 1.0])
    assert (gaps.n, gaps.difference) == (2, 2.0)
    assert stats.paired_test([3.0], [1.0]).p == 1.0
    none = stats.paired_test([math.nan], [1.0])
    assert none.n == 0
    assert math.isnan(none.p)
    with pytest.raises(ValueError, match="got 2 and 1"):
        stats.paired_test([1, 2], [1])


def test_false_alarms_come_at_their_rate():
    rng = np.random.default_rng(5)
    p = [stats.paired_test(rng.exponential(1, 20), rng.exponential(1, 20)).p for _ in range(150)]
    assert 0.04 <= np.mean(np.array(p) < 0.1) <= 0.17


def test_holm():
    # Sorted .01, .03, .04 times 3, 2, 1 is .03, .06, .04, made monotone.
    assert stats.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]).shape == (0,)
    with_gap = stats.holm([0.02, math.nan, 0.5])
    assert with_gap[[0, 2]] == pytest.approx([0.04, 0.5])
    assert math.isnan(with_gap[1])


def test_rank_biserial():
    # |d| = 1, 2, 3 have the ranks 1, 2, 3; those of the wins are 1 and 3: (4 - 2) / 6.
    assert stats.paired_test([1, 0, 3], [0, 2, 0]).rank_biserial == pytest.approx(2 / 6)
    assert stats.paired_test([2, 4, 6], [1, 2, 3]).rank_biserial == 1.0
    assert stats.paired_test([1, 2, 3], [2, 4, 6]).rank_biserial == -1.0
    assert stats.paired_test([1.0] * 4, [1.0] * 4).rank_biserial == 0.0
    # An outlier turns d_z, not the rank correlation.
    outlier = stats.paired_test([1.0] * 9 + [0.0], [0.0] * 9 + [1000.0])
    assert outlier.effect < 0 < outlier.rank_biserial
    assert math.isnan(stats.paired_test([], []).rank_biserial)


@pytest.mark.parametrize("seed", range(4))
def test_rank_biserial_is_made_of_wilcoxons_sums(seed):
    d = np.round(np.random.default_rng(seed).normal(0.3, 1, 25), 1)  # with ties and zeros
    won = scipy_stats.wilcoxon(d, zero_method="zsplit", alternative="greater", method="asymptotic").statistic
    total = d.size * (d.size + 1) / 2
    assert stats.paired_test(d, np.zeros(25)).rank_biserial == pytest.approx((2 * won - total) / total)


# Demšar 2006 ("Statistical comparisons of classifiers over multiple data sets", JMLR 7), table 6:
# ranks of C4.5, C4.5+m, C4.5+cf and C4.5+m+cf on 14 data sets.
DEMSAR = [
    [4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 2, 3], [4, 1, 3, 2], [4, 2, 3, 1], [1, 2.5, 4, 2.5], [3, 2, 4, 1],
    [2.5, 2.5, 4, 1], [4, 3, 2, 1], [2.5] * 4, [4, 2.5, 1, 2.5], [3, 2, 4, 1], [4, 1, 2, 3], [3, 1, 4, 2],
]  # fmt: skip


def test_ranks_of_demsars_example():
    found = stats.ranks(DEMSAR, higher=False)
    assert found.n == 14
    assert np.round(found.ranks, 3).tolist() == [3.143, 2.0, 2.893, 1.964]
    assert round(found.difference, 2) == 1.25  # the critical difference that section 3.2.2 gives
    # He does not correct for ties: 9.28 in the paper.
    ties = (4**3 - 4) + 3 * (2**3 - 2)
    assert round(found.chi2 * (1 - ties / (14 * 4 * 15)), 2) == 9.28
    expected = scipy_stats.friedmanchisquare(*np.transpose(DEMSAR))
    assert (found.chi2, found.p) == pytest.approx(tuple(expected))
    # Friedman's test rejects, but even best and worst are less than the critical difference apart.
    assert found.p < 0.05
    assert set(found.groups) == {"a"}
    assert stats.ranks(-np.array(DEMSAR)).ranks.tolist() == found.ranks.tolist()


@pytest.mark.parametrize(
    ("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (10, 3.164)]
)
def test_critical_differences_are_those_of_demsars_table_5(k, q):
    found = stats.ranks(np.random.default_rng(0).normal(size=(30, k)))
    assert found.difference / math.sqrt(k * (k + 1) / (6 * 30)) == pytest.approx(q, abs=1e-3)


def test_groups_of_methods():
    rng = np.random.default_rng(3)
    clear = stats.ranks(rng.normal(size=(200, 4)) + np.array([0, 9, 0, 5]))
    assert clear.groups == ("c", "a", "c", "b")
    assert clear.p < 1e-6
    # A middle method that is like both of its neighbours bears both letters.
    assert stats._letters(np.array([1.0, 1.6, 2.2]), 0.7) == ("a", "ab", "b")
    assert stats._letters(np.array([2.2, 1.0, 1.6]), 0.0) == ("c", "a", "b")
    assert stats._letters(np.arange(60.0), 0.0)[-1] == "(59)"


def test_ranks_of_degenerate_inputs():
    same = stats.ranks(np.ones((5, 3)))
    assert (same.chi2, same.p, same.groups) == (0.0, 1.0, ("a", "a", "a"))
    gaps = stats.ranks([[3, 1], [math.nan, 2], [5, 1], [math.inf, 0]])
    assert (gaps.n, gaps.ranks.tolist()) == (2, [1.0, 2.0])
    none = stats.ranks(np.full((3, 2), math.nan))
    assert none.n == 0
    assert math.isnan(none.p)
    with pytest.raises(ValueError, match="two methods"):
        stats.ranks([[1.0], [2.0]])


# Rounding ----------------------------------------------------------------------------------------


def exact_rank_biserial(i: np.ndarray) -> float:
    """Of whole numbers, which have no rounding."""
    ranked = scipy_stats.rankdata(np.abs(i))
    return float((ranked * np.sign(i)).sum() / ranked.sum())


def test_equal_differences_share_their_rank():
    """scipy#17667: of 1/40, 1/20, 1/20, 1/20 the ranks are 1, 3, 3, 3, which float64 subtraction does not see."""
    found = stats.paired_test([0.5, 0.825, 0.375, 0.5], [0.525, 0.775, 0.325, 0.55])
    assert found.rank_biserial == pytest.approx((-1 + 3 + 3 - 3) / 10, abs=1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [2, 9, 14, 15, 60, 400])
@pytest.mark.parametrize("parts", [3, 9, 10, 49])
def test_shares_of_a_whole_are_compared_as_the_counts_they_are(n, parts, dtype):
    """Means of zeros and ones, as ROAD gives: k / parts. All that does not depend on the unit is that of the counts."""
    rng = np.random.default_rng(n * parts)
    i, j = rng.integers(0, parts + 1, (2, n))
    shares = [(k.astype(dtype) / dtype(parts)).astype(dtype) for k in (i, j)]
    found, right = stats.paired_test(*shares), stats.paired_test(i, j)
    assert (found.p, found.rank_biserial) == (right.p, pytest.approx(exact_rank_biserial(i - j), abs=1e-12))
    assert found.effect == pytest.approx(right.effect, rel=1e-5)
    assert found.difference * parts == pytest.approx(right.difference, abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_shares_computed_in_two_ways_are_ranked_as_the_counts_they_are(dtype):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 10, (50, 4))
    ninths = np.stack([[np.full(k, 1 / 9, dtype).sum(dtype=dtype) for k in row] for row in counts])
    ninths[:, 0] = counts[:, 0] / dtype(9)
    found, right = stats.ranks(ninths), stats.ranks(counts)
    assert (ninths != counts / dtype(9)).any()  # there is something to be equalised
    assert np.array_equal(found.ranks, right.ranks)
    assert (found.p, found.groups) == (right.p, right.groups)


@pytest.mark.parametrize("higher", [True, False])
def test_paired_test_and_ranks_agree_on_scores_that_are_equal_up_to_rounding(higher):
    x = np.linspace(0.1, 0.9, 40)
    y = np.nextafter(x * (1 + 2e-16), 2)
    assert (stats.paired_test(y, x).p, stats.paired_test(y, x).rank_biserial) == (1.0, 0.0)
    found = stats.ranks(np.stack([y, x], 1), higher=higher)
    assert (found.p, found.groups, list(found.ranks)) == (1.0, ("a", "a"), [1.5, 1.5])


def test_differences_that_are_all_the_same_have_no_spread():
    a = np.linspace(0.1, 0.9, 30)
    found = stats.paired_test(a + 1e-5, a)
    assert len(set((a + 1e-5) - a)) > 1  # rounding makes them differ
    assert (found.effect, found.rank_biserial) == (np.inf, 1.0)
    assert found.lo == found.hi == pytest.approx(1e-5, rel=1e-6)


def test_what_is_larger_than_rounding_stays():
    x = np.random.default_rng(0).normal(size=2000)
    error = stats.rounding_error(x)
    assert np.array_equal(stats.equalised(x, error), x)
    assert error == pytest.approx(1e-12 * np.abs(x))
    assert stats.rounding_error(x.astype(np.float32).astype(float)) == pytest.approx(1e-6 * np.abs(x), rel=1e-3)
    # 0 and 1e-300, large and small scores of one column: sizes decide, not the largest of the column.
    assert stats.paired_test([1e9, 3e-9, 2e-300], [2e9, 1e-9, 1e-300]).rank_biserial == pytest.approx((-3 + 2 + 1) / 6)


def test_a_group_of_equal_values_is_no_wider_than_their_error():
    """However many values lie close together: a chain of neighbours must not make the ends equal."""
    values = np.arange(10_000) * 0.7
    equal = stats.equalised(values, np.ones_like(values))
    assert (values - equal).max() <= 1
    assert len(np.unique(equal)) == 5000


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=30), st.randoms())
def test_equalised_does_not_depend_on_the_order(pairs, random):
    values, error = (np.array(column, float) for column in zip(*pairs))
    equal = stats.equalised(values, error)
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert np.array_equal(stats.equalised(values[order], error[order]), equal[order])
    assert ((values >= equal) & (values - equal <= 3)).all()
    assert set(equal) <= set(values)


def equalised_by_hand(values, error):
    """One value after another, from the least: of a value's errors the largest counts."""
    error = [max(e for v, e in zip(values, error) if v == value) for value in values]
    found, first = list(values), None
    for i in sorted(range(len(values)), key=values.__getitem__):
        joins = first is not None and values[i] - values[first] <= max(error[i], error[first])
        first = first if joins else i
        found[i] = values[first]
    return found


@given(st.integers(1, 8), st.integers(1, 4), st.randoms())
def test_equalised_by_hand_alone_and_in_columns(n, k, random):
    values, error = (np.array([[random.randint(0, most) / 2 for _ in range(k)] for _ in range(n)]) for most in (20, 3))
    found = stats.equalised(values, error)
    for j in range(k):
        by_hand = equalised_by_hand(values[:, j].tolist(), error[:, j].tolist())
        assert found[:, j].tolist() == stats.equalised(values[:, j], error[:, j]).tolist() == by_hand


def test_whom_none_beats_against_plain_loops():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.normal(size=(12, 5)) + generator.normal(size=(12, 1))
        values[generator.random(values.shape) < 0.5] = np.nan
        expected = []
        for i in range(5):
            beaten = False
            for j in range(5):
                both = np.isfinite(values[:, i]) & np.isfinite(values[:, j])
                beaten |= bool(both.any()) and values[both, j].mean() > values[both, i].mean() + 1e-9
            expected.append(not beaten)
        assert stats.none_better(values).tolist() == expected
    circle = np.array([[1.0, 0.0, np.nan], [np.nan, 1.0, 0.0], [0.0, np.nan, 1.0]])
    assert not stats.none_better(circle).any()
    assert stats.none_better(np.array([[0.1 + 0.2, 0.3]])).all()
