"""Do metrics agree: against scipy one draw at a time, what must hold, the edges."""

from __future__ import annotations

import itertools

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


def test_methods_are_compared_on_common_samples():
    values = drawn()
    gone = {("b", 2, i) for i in range(15)} | {("a", 1, 0), ("b", 4, 3)}
    row = entry(agreement.agreement(frame_of(values, drop=gone)), "a", "b")
    kept, common = [0, 1, 3, 4, 5], [i for i in range(15) if i not in (0, 3)]
    means = [values[name][kept][:, common].mean(1) for name in "ab"]
    assert (row["methods"], row["n"]) == (5, 13)
    assert row["rho"] == pytest.approx(spearmanr(*means).statistic)


def test_methods_that_were_tried_on_easy_samples_alone_look_no_better():
    """Of ten equal methods, four saw the easy half only: by both columns their own means would be the best."""
    rng = np.random.default_rng(4)
    easy = np.where(np.arange(40) < 20, 5.0, 0.0)
    values = {name: easy + rng.normal(0, 1, (10, 40)) for name in "ab"}
    gone = {(name, k, i) for name in "ab" for k in range(4) for i in range(20, 40)}
    found = entry(agreement.agreement(frame_of(values, drop=gone)), "a", "b")
    assert found["n"] == 20
    assert found["rho"] == pytest.approx(spearmanr(*(values[name][:, :20].mean(1) for name in "ab")).statistic)
    assert found["lo"] < 0 < found["hi"]


def test_one_sample_has_no_interval():
    found = agreement.agreement(frame_of(drawn(n=1)))
    row = entry(found, "a", "b")
    assert row["n"] == 1
    assert np.isnan([row["lo"], row["hi"]]).all()
    assert np.isnan(entry(found, "a", "a")["rho"])  # there are no halves
    (table,) = agreement.tables(found)
    assert table.body[0][1] == "–"
    assert "[" not in table.body[1][1]


def test_many_samples_are_drawn_in_blocks(monkeypatch):
    whole = agreement.agreement(frame_of(drawn()))
    monkeypatch.setattr(agreement, "_BLOCK", 15 * 100)
    parts = agreement.agreement(frame_of(drawn()))
    assert parts[["rho", "n"]][parts["a"] != parts["b"]].equals(whole[["rho", "n"]][whole["a"] != whole["b"]])
    np.testing.assert_allclose(parts[["lo", "hi"]], whole[["lo", "hi"]], atol=0.08)


def test_columns_of_one_name_under_two_metrics():
    frame = frame_of(drawn())
    frame["metric"] = frame["metric"].replace("b", "other")
    frame["column"] = "x"
    assert set(agreement.agreement(frame)["a"]) == {"x · a", "x · other"}


def test_two_methods_or_no_direction_or_no_difference():
    assert agreement.agreement(frame_of(drawn(k=2))).empty
    assert set(agreement.agreement(frame_of(drawn(), {"b": "none"}))["b"]) == {"a"}
    flat = agreement.agreement(frame_of({"a": drawn()["a"], "flat": np.ones((6, 15))}))
    assert np.isnan(entry(flat, "a", "flat")["rho"])
    (table,) = agreement.tables(flat)
    assert table.body[1][1] == "–"
    assert agreement.agreement(frame_of({})).empty


def test_means_that_differ_by_rounding_share_their_rank():
    """Ninths that add up to the same, as ROAD's accuracies do: neither their order nor the last bit decides."""
    a = np.array([[1, 2, 3], [3, 2, 1], [2, 1, 3], [8, 8, 8]]) / 9
    b = np.array([[0.3] * 3, [0.2] * 3, [0.1] * 3, [0.05] * 3])
    for order in itertools.permutations(range(3)):
        row = entry(agreement.agreement(frame_of({"a": a[:, order], "b": b})), "a", "b")
        assert row["rho"] == pytest.approx(spearmanr([0, 0, 0, 1], [4, 3, 2, 1])[0])
    tied = entry(agreement.agreement(frame_of({"a": a[:3], "b": b[:3]})), "a", "b")
    assert np.isnan(tied["rho"])
