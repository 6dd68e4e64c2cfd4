"""Do metrics agree: against scipy one draw at a time, what must hold, the edges."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from attrib.results import agreement


def frame_of(values, directions=None, drop=()):
    """``values``: column -> (methods, samples)."""
    lines = []
    for column, scores in values.items():
        for k, row in enumerate(scores):
            for i, value in enumerate(row):
                if (column, k, i) in drop:
                    continue
                direction = (directions or {}).get(column, "higher")
                lines.append(("d", "m", column, column, f"method {k}", direction, f"s{i}", "f", "ok", float(value)))
    names = ["dataset", "model", "metric", "column", "contender", "direction", "uid", "fingerprint", "state", "value"]
    return pd.DataFrame(lines, columns=names)


def drawn(k=6, n=15, seed=0):
    rng = np.random.default_rng(seed)
    quality = np.linspace(0, 1, k)[:, None]
    return {"a": quality + rng.normal(0, 0.5, (k, n)), "b": -quality + rng.normal(0, 0.5, (k, n))}


def entry(found, a, b):
    (row,) = found[(found["a"] == a) & (found["b"] == b)].to_dict("records")
    return row


def test_it_is_the_rank_correlation_of_the_means():
    values = drawn()
    row = entry(agreement.agreement(frame_of(values, {"b": "lower"})), "a", "b")
    assert row["rho"] == pytest.approx(spearmanr(values["a"].mean(1), -values["b"].mean(1)).statistic)
    assert row["rho"] > 0.5
    assert (row["methods"], row["n"]) == (6, 15)
    assert row["lo"] <= row["rho"] <= row["hi"]


def test_the_interval_is_that_of_resampled_samples():
    """Slowly: one draw after the other, by scipy."""
    values = drawn(seed=3)
    row = entry(agreement.agreement(frame_of(values)), "a", "b")
    rng = np.random.default_rng(8)
    found = []
    for _ in range(1_000):
        chosen = rng.integers(0, 15, 15)
        found.append(spearmanr(values["a"][:, chosen].mean(1), values["b"][:, chosen].mean(1)).statistic)
    assert (row["lo"], row["hi"]) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=0.08)


def test_order_of_rows_and_units_do_not_matter():
    values = drawn()
    frame = frame_of(values)
    first = agreement.agreement(frame)
    other = agreement.agreement(frame_of({**values, "a": 1000 * values["a"] - 7}))
    pd.testing.assert_frame_equal(first, other)
    shuffled = frame.sample(frac=1, random_state=0)
    assert entry(agreement.agreement(shuffled.sort_values("column", kind="stable")), "a", "b")["rho"] == pytest.approx(
        entry(first, "a", "b")["rho"]
    )


def test_a_column_against_itself_is_one_half_against_the_other():
    sure, noise = drawn(n=200, k=5), np.random.default_rng(1).normal(size=(5, 200))
    found = agreement.agreement(frame_of({"sure": sure["a"], "noise": noise}))
    assert entry(found, "sure", "sure")["rho"] > 0.95
    assert abs(entry(found, "noise", "noise")["rho"]) < 0.75
    assert entry(found, "noise", "noise")["rho"] < entry(found, "sure", "sure")["rho"]


def test_methods_without_a_score_of_both_are_left_out():
    values = drawn()
    gone = {("b", 2, i) for i in range(15)} | {("a", 1, 0)}
    row = entry(agreement.agreement(frame_of(values, drop=gone)), "a", "b")
    kept = [k for k in range(6) if k != 2]
    a = values["a"].copy()
    a[1, 0] = np.nan
    assert row["methods"] == 5
    assert row["rho"] == pytest.approx(spearmanr(np.nanmean(a, 1)[kept], values["b"].mean(1)[kept]).statistic)


def test_two_methods_or_no_direction_or_no_difference():
    assert agreement.agreement(frame_of(drawn(k=2))).empty
    assert set(agreement.agreement(frame_of(drawn(), {"b": "none"}))["b"]) == {"a"}
    flat = agreement.agreement(frame_of({"a": drawn()["a"], "flat": np.ones((6, 15))}))
    assert np.isnan(entry(flat, "a", "flat")["rho"])
    (table,) = agreement.tables(flat)
    assert table.body[1][1] == "–"
    assert agreement.agreement(frame_of({})).empty
