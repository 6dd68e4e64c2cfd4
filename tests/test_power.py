"""How many samples a comparison needs: against the exact power of a t-test, a simulation, and the plain definition."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from tiny import called, tool

from attrib.results import formats, power, stats, tables


def power_of_t(effect: float, n: int, alpha: float) -> float:
    """Of a two-sided paired t-test: the mean over what the estimated variance may turn out to be."""
    limit = scipy_stats.t.ppf(1 - alpha / 2, n - 1)
    variance = scipy_stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, n - 1) / (n - 1)
    shift = effect * math.sqrt(n)
    tails = scipy_stats.norm.sf(limit * np.sqrt(variance) - shift) + scipy_stats.norm.cdf(
        -limit * np.sqrt(variance) - shift
    )
    return float(tails.mean())


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 378])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
@pytest.mark.parametrize("effect", [0.1, 0.35, 0.8])
def test_the_size_is_that_of_an_exact_t_test(effect, wanted, alpha):
    n = power.needed(effect, wanted, alpha)
    assert power.needed(-effect, wanted, alpha) == n
    assert power_of_t(effect, n + 2, alpha) >= wanted
    assert power_of_t(effect, n - 4, alpha) < wanted


@pytest.mark.parametrize(("effect", "alpha"), [(0.6, 0.05), (1.4, 0.05), (1.5, 0.05 / 378)])
def test_the_permutation_test_finds_a_difference_as_often_as_it_is_said_to(effect, alpha):
    rng = np.random.default_rng(0)
    n = power.needed(effect, alpha=alpha)
    draws = rng.normal(effect, 1, (250, n))
    found = np.mean([stats.paired_test(d, np.zeros(n)).p <= alpha for d in draws])
    assert 0.8 - 0.075 < found < (0.875 if n >= 20 else 0.95)  # three standard errors; few samples have few possible p


def test_edges():
    assert power.needed(0.0) == math.inf
    assert math.isnan(power.needed(math.nan))
    assert power.needed(math.inf) == 6  # 2 / 2**6 is the first below .05
    assert power.needed(50.0) == 7
    assert power.needed(math.inf, alpha=0.05 / 378) == 14
    for wrong in ({"power": 1.0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            power.needed(0.5, **wrong)


def pairs_of(effects, n=20, confidence=0.95):
    rng = np.random.default_rng(1)
    lines = []
    for i, effect in enumerate(effects):
        d = rng.normal(effect, 1, n)
        test = stats.paired_test(d, np.zeros(n), confidence)
        place = {"dataset": "d", "model": "m", "metric": "ehr", "column": "ehr", "a": "one", "b": f"other {i}"}
        lines.append({**place, **vars(test), "p_holm": 0.0, "n_a": n, "n_b": n, "better": ""})
    return pd.DataFrame(lines)


def test_sizes_are_those_of_the_median_and_the_upper_quarter():
    tests = pairs_of([0.1, 0.5, 1.0, 2.0])
    tests["p_holm"] = [1.0, 0.3, 0.01, 0.001]
    (row,) = power.sizes(tests).to_dict("records")
    effects = sorted(abs(tests["effect"]))
    middle = effects[1]  # of an even number the lower of the two: infinite effects have no mean
    assert (row["pairs"], row["apart"], row["n"]) == (4, 2, 20)
    assert row["effect"] == middle
    assert row["needed"] == power.needed(middle)
    assert row["needed_holm"] == power.needed(middle, alpha=0.05 / 4) > row["needed"]
    assert row["easy"] == power.needed(effects[2]) <= row["needed"]
    assert row["half"] == pytest.approx(((tests["hi"] - tests["lo"]) / 2).median())
    (line,) = power.table(tests).body
    assert line[:4] == ["ehr", "4", "2", "20"]


def test_a_pair_is_found_whichever_way_round_it_was_tested():
    tests = pairs_of([1.0, 0.5])
    (forth,) = power.of_pair(tests, "one", "other 0").to_dict("records")
    (back,) = power.of_pair(tests, "other 0", "one").to_dict("records")
    assert forth["needed"] == back["needed"] == power.needed(forth["effect"])
    for name in ("difference", "effect", "rank_biserial"):
        assert back[name] == -forth[name]
    assert (back["lo"], back["hi"]) == (-forth["hi"], -forth["lo"])
    assert (back["a"], back["b"]) == ("other 0", "one")
    assert power.of_pair(tests, "one", "nobody").empty
    (line,) = power.pair_table(power.of_pair(tests, "one", "other 0")).body
    assert line[-1] == str(forth["needed"])
    assert formats.to_markdown(power.pair_table(power.of_pair(tests, "one", "other 0")))


def test_pairs_without_any_spread():
    tests = pairs_of([0.5, 0.5, 0.5, 0.5])
    tests["effect"] = [0.5, 1.0, math.inf, -math.inf]
    (row,) = power.sizes(tests).to_dict("records")
    assert (row["needed"], row["easy"]) == (power.needed(1.0), power.needed(math.inf))


def test_columns_of_one_name_are_told_apart():
    tests = pairs_of([0.5, 1.0])
    tests = pd.concat([tests, tests.assign(metric="ehr (steps=3)"), tests.assign(dataset="other")])
    rows = [tuple(row[:3]) for row in power.table(tests).body]
    assert rows == [("d", "ehr", "ehr"), ("d", "ehr (steps=3)", "ehr"), ("other", "ehr", "ehr")]
    rows = [tuple(row[:3]) for row in power.pair_table(power.of_pair(tests, "one", "other 0")).body]
    assert len(set(rows)) == 3


def test_no_pairs():
    assert power.of_pair(pairs_of([0.5])[:0], "one", "other").empty
    assert power.sizes(pairs_of([0.5], n=20).assign(n=1)).empty


def said(root, capfd, *words):
    return called(capfd, lambda: tool("table").main([str(root), *words]))


def test_on_the_command_line(root, tmp_path, capfd):
    shown = said(root, capfd, "--power")
    assert shown.status == 0, shown.err
    assert "two-sided, at 5 %" in " ".join(shown.out.split())
    assert "two-sided, at 1 %" in " ".join(said(root, capfd, "--power", "--confidence", "0.99").out.split())
    place = tmp_path / "power.csv"
    assert said(root, capfd, "--power", "--out", str(place)).status == 0
    found = pd.read_csv(place)
    frame = tables.rows(root)
    assert found["column"].tolist() == power.sizes(tables.all_paired(frame))["column"].tolist()
    agreed = said(root, capfd, "--agreement", "--format", "md")
    assert agreed.status == 0
    assert "do metrics agree?" in agreed.out


@pytest.mark.parametrize(
    "words",
    [("--power", "--agreement"), ("--power", "--ranks"), ("--power", "--pairs", "ehr"), ("--agreement", "--wide")],
)
def test_one_view_at_a_time(root, capfd, words):
    found = said(root, capfd, *words)
    assert found.status == 2
    assert "give one of --" in found.err


def test_a_directory_of_one_method_is_refused_in_a_sentence(root, capfd):
    for view, why in (("--power", "two methods on two common samples"), ("--agreement", "scores of three methods")):
        found = said(root, capfd, view, "--where", "method=iba")
        assert found.status == 2
        assert why in found.err
