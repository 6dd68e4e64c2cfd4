"""Measures of agreement of two maps, and what is made of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from nets import golden

from attrib.sanity import MEASURES, Agreement, verdicts
from attrib.sanity.measures import hog, scaled, spearman, ssim, ssim_released
from attrib.types import UserError

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 20, 24))


def test_ssim_as_released():
    stored = golden("metric_ssim")
    a, b = stored["a"], stored["b"]
    as_bytes = [(m * 255).astype(np.uint8) for m in (a, b)]
    pairs = {
        "float": (a, b), "uint8": as_bytes, "mixed": (as_bytes[0], b), "self": (a, a),
        "float32": (a.astype(np.float32), b.astype(np.float32)),
    }  # fmt: skip
    released = Agreement(("ssim",), as_released=True)
    for name, (x, y) in pairs.items():
        assert ssim_released(x, y) == pytest.approx(float(stored[f"ssim_{name}"]), abs=1e-6)
        assert released.of(x, y)["ssim"] == pytest.approx(float(stored[f"ssim_{name}"]), abs=1e-6)
    # What InputIBA's code refuses or lets wrap.
    assert math.isnan(ssim_released(a - 0.01, b))
    assert math.isnan(ssim_released(a, b * 1.5))


def slow_ssim(a, b, span, window=5):
    """Wang et al. 2004, equation 13, over every whole window, with unbiased variances."""
    values, n = [], window**2
    for i, j in itertools.product(*(range(length - window + 1) for length in a.shape)):
        x, y = (m[i : i + window, j : j + window].ravel() for m in (a, b))
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        covariance = ((x - x.mean()) * (y - y.mean())).sum() / (n - 1)
        top = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
        values.append(top / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var(ddof=1) + y.var(ddof=1) + c2)))
    return np.mean(values)


def test_ssim_is_that_of_the_paper_on_what_the_picture_shows():
    def shown(m):
        return np.clip(m / np.percentile(np.abs(m), 99), -1, 1)

    assert ssim(A, B) == pytest.approx(slow_ssim((shown(A) + 1) / 2, (shown(B) + 1) / 2, 1), abs=1e-12)
    a, b = np.abs(A), np.abs(B)
    assert ssim(a, b) == pytest.approx(slow_ssim(shown(a), shown(b), 1), abs=1e-12)
    assert ssim(7 * A, B / 9) == pytest.approx(ssim(A, B))  # the unit does not matter


def slow_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_the_correlation_of_ranks(ties):
    a, b = (m.ravel()[:60].round(1 if ties else 9) for m in (A, B))
    expected = np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1]
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure(name):
    def measured(a, b):
        return Agreement((name,)).of(a, b)[name]

    assert measured(A, A) == pytest.approx(1)
    assert measured(A, B) == pytest.approx(measured(B, A))
    assert measured(A, 3 * A) == pytest.approx(1)
    assert -1 <= measured(A, B) < 0.5
    assert measured(A, A + 0.3 * B) > measured(A, A + 2 * B)


def test_magnitudes_do_not_see_the_sign():
    found = Agreement(tuple(MEASURES)).of(A, -A)
    assert found["spearman"] == pytest.approx(-1)
    assert found["spearman_abs"] == found["ssim_abs"] == pytest.approx(1)
    assert found["ssim"] < 0


def test_undefined_is_nan_not_a_number_made_up():
    flat = np.zeros((20, 24))
    found = Agreement(tuple(MEASURES)).of(A, flat)
    assert math.isnan(found["spearman"])
    assert math.isnan(found["spearman_abs"])
    assert math.isnan(found["hog"])
    assert abs(found["ssim"]) < 0.2
    assert math.isnan(spearman(np.ones(1), np.ones(1)))


def test_maps_that_are_nearly_zero_everywhere():
    spike = np.zeros((20, 24))
    spike[3, 4] = 8
    assert scaled(spike).max() == 1
    assert not scaled(np.zeros((5, 5))).any()


def test_texts_and_sounds_have_ranks_only():
    assert set(Agreement().of(A[0], B[0])) == {"spearman", "spearman_abs"}
    assert set(Agreement().of(A, B)) == {"spearman", "spearman_abs", "ssim", "ssim_abs"}
    assert hog(A[:9, :9], A[:9, :9]) == pytest.approx(1)  # small maps


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"no measure 'sim'; there are spearman, .*hog"):
        Agreement(("sim",))
    with pytest.raises(UserError, match="is empty"):
        Agreement(())
    for window in (4, 1):
        with pytest.raises(UserError, match=f"window must be odd and at least 3, not {window}"):
            Agreement(window=window)
    with pytest.raises(UserError, match=r"\(20, 24\) and \(24, 20\) cannot be compared"):
        Agreement().of(A, B.T)
    with pytest.raises(UserError, match=r"maps of \(4, 24\) are smaller than sanity\.window=5"):
        Agreement().of(A[:4], B[:4])


# ---- verdicts ---------------------------------------------------------------------------------


def rows(contender, place=5, mode="cascade", n=50, **columns):
    return [
        {"contender": contender, "place": place, "total": 5, "mode": mode, "n": n, "column": name,
         "mean": mean, "lo": mean - 0.02 if n > 1 else math.nan, "hi": mean + 0.02 if n > 1 else math.nan}
        for name, mean in columns.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "passed", "text"),
    [
        (rows("m", spearman=0.97, spearman_abs=0.97), False, "hardly depends on the weights: .* 0.97"),
        (rows("m", spearman=0.1, spearman_abs=0.9), False, "where it is large hardly .* 0.90 .* of the magnitudes"),
        (rows("m", spearman=-0.001, spearman_abs=0.4, ssim=0.99), True, "^depends .* 0.00 .* of the values, 0.40"),
        (rows("m", spearman=0.1, spearman_abs=0.49), None, "may depend"),
        (rows("m", spearman_abs=0.8), False, "hardly depends"),
        (rows("m", n=1, spearman=0.8), False, "hardly depends"),
        (rows("m", place=3, spearman=0.97), None, "not tested with all layers"),
        (rows("m", ssim=0.97), None, "not tested"),
    ],
)
def test_verdict(found, passed, text):
    (verdict,) = verdicts(pd.DataFrame(found))
    assert verdict.contender == "m"
    assert verdict.passed is passed
    assert pd.Series([verdict.text]).str.contains(text).all()


def test_layers_alone_have_no_verdict():
    assert verdicts(pd.DataFrame(rows("m", mode="independent", spearman=0.9))) == []
