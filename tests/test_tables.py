"""The tables of a synthetic work directory are compared with plain pandas and numpy."""

import io
import math
import time

import numpy as np
import pandas as pd
import pytest
from synthetic import METHODS, UIDS, add_entry, add_rows, cell, iba, metric_folder, only, values_of
from tiny import tool

from attrib import formats, keys, stats, store, tables
from attrib.types import UserError

# rows -----------------------------------------------------------------------


def test_rows_are_tidy(root):
    frame = tables.rows(root)
    assert list(frame.columns) == tables.ROWS
    assert len(frame) == 3 * 20 * 3
    assert not frame.duplicated(["cell", "metric", "map", "uid", "column"]).any()
    assert set(frame["state"]) == {"ok"}
    for method in METHODS:
        part = only(frame, method=method)
        for j, column in enumerate(("ehr", "insertion", "deletion")):
            mine = only(part, column=column).set_index("uid")["value"]
            assert mine.loc[list(UIDS)].to_numpy() == pytest.approx(values_of(method)[:, j], abs=0)
    assert dict(zip(frame["column"], frame["direction"])) == {
        "ehr": "higher",
        "insertion": "higher",
        "deletion": "lower",
    }
    assert only(frame, uid=UIDS[3])["seconds"].tolist() == pytest.approx([0.53] * 9)


def test_of_a_repeated_sample_the_latest_row_counts(root):
    now = time.time()
    add_rows(
        iba(root),
        "ehr.11111111",
        [
            (UIDS[0], "f", "map", "ehr", 0.91, now + 20),  # twice, same fingerprint, later
            (UIDS[1], "f", "map", "ehr", 0.92, now - 900),  # earlier: does not count
            (UIDS[2], "new", "map", "ehr", 0.93, now + 20),  # another fingerprint, later
            (UIDS[3], "old", "map", "ehr", 0.94, now - 900),
        ],
    )
    frame = only(tables.rows(root), method="iba", column="ehr").set_index("uid")
    assert len(frame) == 20
    expected = [0.91, values_of("iba")[1, 0], 0.93, values_of("iba")[3, 0]]
    assert frame.loc[list(UIDS[:4]), "value"].tolist() == expected
    assert frame.loc[list(UIDS[:4]), "fingerprint"].tolist() == ["f", "f", "new", "f"]
    assert math.isnan(frame.loc[UIDS[2], "seconds"])  # its map is not the stored one


def test_failures_that_still_matter(root):
    made, now = iba(root), time.time()
    late, early = now + 50, now - 900
    add_entry(made, "new/1", "f", "load", "cannot read", late)  # nothing else known
    add_entry(made, "new/1", "f", "load", "cannot read again", late + 1)  # the same sample
    add_entry(made, "new/2", "f", "ehr", "no region of interest", late)  # in one metric only
    add_entry(made, UIDS[0], "f", "maps", "out of memory", early)  # succeeded later
    add_entry(made, UIDS[1], "f", "ehr", "other writer failed", late)  # succeeded before, same content
    add_entry(made, UIDS[2], "changed", "maps", "NaN map", late)  # content changed, then failed
    add_entry(made, UIDS[3], "", "load", "disk gone", late)  # no fingerprint: the score stands
    frame = only(tables.rows(root), method="iba")
    failed = frame[frame["state"] == "failed"]
    got = {(u, c): (s, r) for u, c, s, r in failed[["uid", "column", "stage", "reason"]].itertuples(index=False)}
    expected = {("new/1", c): ("load", "cannot read again") for c in ("ehr", "insertion", "deletion")}
    expected |= {(UIDS[2], c): ("maps", "NaN map") for c in ("ehr", "insertion", "deletion")}
    expected[("new/2", "ehr")] = ("ehr", "no region of interest")
    assert got == expected
    assert failed["value"].isna().all()
    table = tables.summary(tables.rows(root))
    counts = only(table, method="iba").set_index("column")[["n", "failed"]]
    assert counts.loc["ehr"].tolist() == [19, 3]
    assert counts.loc["insertion"].tolist() == [19, 2]
    assert only(table, method="ig")["failed"].tolist() == [0, 0, 0]


def test_a_metrics_failures_may_be_under_its_folders_name(root):
    add_entry(iba(root), "new/2", "f", "ehr.11111111", "no region", time.time())
    assert only(tables.summary(tables.rows(root)), method="iba", column="ehr")["failed"].tolist() == [1]
    frame = tables.rows(root)
    assert set(frame.loc[frame["state"] == "failed", "stage"]) == {"ehr"}


def test_a_failure_under_a_folders_name_is_that_metrics_alone(root):
    made, now = iba(root), time.time() + 9
    metric_folder(made, "ehr.33333333", {"ehr": "higher"}, parameters={"class": "ehr", "steps": 5})
    add_rows(made, "ehr.33333333", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    add_entry(made, UIDS[0], "changed", "ehr.33333333", "of one", now)
    add_entry(made, UIDS[1], "changed", "ehr", "of both", now)  # as older runs wrote it
    frame = only(tables.rows(root), state="failed")
    whole = f"ehr (key={keys.digest({'class': 'ehr'})[:8]})"
    assert set(frame[["metric", "stage", "reason"]].itertuples(index=False, name=None)) == {
        ("ehr (steps=5)", "ehr (steps=5)", "of one"),
        ("ehr (steps=5)", "ehr (steps=5)", "of both"),
        (whole, whole, "of both"),
    }


def test_samples_that_went_are_counted_nowhere(root):
    made, now = iba(root), time.time() + 9
    late = store.Arrays(made.folder / "maps", "w1")
    late.add("gone/map", "f", {"map": np.zeros((8, 8), np.float32)}, seconds=1e6)
    late.flush()
    add_rows(made, "ehr.11111111", [("gone/nan", "f", "map", "ehr", math.nan, now)])
    add_entry(made, "gone/failed", "f", "load", "cannot read", now)
    add_entry(made, "gone/failed", "f", "ehr.11111111", "no region", now)
    add_entry(made, "gone/failed", "f", "lost_metric", "crashed", now)
    before = only(tables.summary(tables.rows(root)), method="iba", column="ehr").iloc[0]
    assert (before["n"], before["failed"], before["pending"]) == (20, 2, 1)

    made.write_samples([*UIDS[2:], "later"])  # what is not computed yet is nobody's failure
    frame = tables.rows(root)
    assert set(only(frame, method="iba")["uid"]) == set(UIDS[2:])
    assert set(only(frame, method="ig")["uid"]) == set(UIDS)  # without samples.json all count
    table = only(tables.summary(frame), method="iba")
    assert table[["n", "failed", "pending"]].to_numpy().tolist() == [[18, 0, 0]] * 3
    row = only(table, column="ehr").iloc[0]
    assert row["mean"] == pytest.approx(values_of("iba")[2:, 0].mean())
    assert row["seconds"] == pytest.approx(0.5 + np.arange(2, 20).mean() / 100)
    assert tables.paired(frame, "ehr")["n"].tolist() == [18, 20, 18]

    made.write_samples([])
    assert set(tables.rows(root)["method"]) == {"grad_cam", "ig"}
    (made.folder / "samples.json").write_text("{")
    with pytest.raises(UserError, match=r"iba0000/samples\.json"):
        tables.rows(root)


def test_nan_is_a_failure_with_the_ledgers_reason(root):
    made, now = iba(root), time.time() + 5
    add_rows(
        made, "ehr.11111111", [(UIDS[0], "f", "map", "ehr", math.nan, now), (UIDS[1], "f", "map", "ehr", math.inf, now)]
    )
    add_entry(made, UIDS[0], "f", "ehr", "no region of interest", now)
    frame = only(tables.rows(root), method="iba", column="ehr").set_index("uid")
    assert frame.loc[list(UIDS[:2]), "state"].tolist() == ["failed", "failed"]
    assert frame.loc[UIDS[0], "reason"] == "no region of interest"
    assert frame.loc[UIDS[1], "reason"] == "the score is not finite"
    row = only(tables.summary(tables.rows(root)), method="iba", column="ehr").iloc[0]
    assert (row["n"], row["failed"]) == (18, 2)
    assert row["mean"] == pytest.approx(values_of("iba")[2:, 0].mean())


def test_maps_without_scores_are_pending_not_lost(root):
    made = iba(root)
    late = store.Arrays(made.folder / "maps", "w1")
    late.add("new/1", "f", {"map": np.zeros((8, 8), np.float32)}, seconds=1.0)
    late.flush()
    add_entry(made, "new/1", "f", "maps", "out of memory", time.time() - 900)  # the map came after all
    table = only(tables.summary(tables.rows(root)), method="iba")
    assert table["pending"].tolist() == [1, 1, 1]
    assert table["failed"].tolist() == [0, 0, 0]
    assert "1 pending" in formats.to_markdown(formats.wide_table(formats.wide(tables.summary(tables.rows(root)))[0]))


def test_cells_and_metrics_without_any_score_are_shown(root):
    nothing = cell(root, "photos.net.broken.99", method="broken")
    add_entry(nothing, UIDS[0], "f", "maps", "not supported", 1.0)
    no_rows = cell(root, "photos.net.empty.99", method="empty")
    metric_folder(no_rows, "ehr.11111111")
    add_entry(no_rows, UIDS[0], "f", "ehr", "no region", 1.0)
    add_entry(no_rows, UIDS[0], "f", "lost_metric", "crashed", 1.0)
    table = tables.summary(tables.rows(root))
    row = only(table, method="broken").iloc[0]
    assert (row["metric"], row["n"], row["failed"]) == ("", 0, 1)
    assert math.isnan(row["mean"])
    rows = only(table, method="empty").set_index("metric")
    assert rows.loc["ehr", ["map", "column", "n", "failed"]].tolist() == ["map", "ehr", 0, 1]
    assert rows.loc["lost_metric", ["n", "failed"]].tolist() == [0, 1]
    add_entry(no_rows, UIDS[0], "f", "lost.0123abcd", "crashed", 1.0)
    add_entry(no_rows, UIDS[1], "f", "lost", "crashed", 1.0)  # the same metric in an older ledger
    lost = only(tables.rows(root), metric="lost")
    assert lost[["uid", "state", "stage"]].to_numpy().tolist() == [[u, "failed", "lost"] for u in UIDS[:2]]
    drawn = formats.wide_table(formats.wide(table)[0])
    assert any("broken" in note for note in drawn.notes)
    formats.to_terminal(formats.long_table(table))
    assert len(tables.all_paired(tables.rows(root))) == 9


def test_unreadable_metric_json_keeps_the_numbers(root):
    (iba(root).folder / "scores" / "ehr.11111111" / "metric.json").unlink()
    row = only(tables.rows(root), method="iba", column="ehr")
    assert set(row["direction"]) == {"none"}
    assert len(row) == 20


def test_empty_and_foreign_directories(tmp_path):
    with pytest.raises(UserError, match=r"holds no results.*tools/run\.py"):
        tables.rows(tmp_path)
    with pytest.raises(UserError, match="holds no results"):
        tables.rows(tmp_path / "absent")
    cell(tmp_path, "a.b.c.d")
    with pytest.raises(UserError, match="no scores, maps or failures yet"):
        tables.rows(tmp_path)
    store.write_json(tmp_path / "other" / "spec.json", {"names": {"dataset": "x"}})
    with pytest.raises(UserError, match=r"other/spec\.json"):
        tables.rows(tmp_path)


# summary and pairs ----------------------------------------------------------


def test_summary_against_plain_numpy(root):
    table = tables.summary(tables.rows(root), 0.9)
    assert len(table) == 9
    for row in table.to_dict("records"):
        j = ("ehr", "insertion", "deletion").index(row["column"])
        values = values_of(row["method"])[:, j]
        expected = stats.interval(values, 0.9)
        assert (row["n"], row["failed"], row["pending"]) == (20, 0, 0)
        assert (row["mean"], row["lo"], row["hi"]) == pytest.approx((values.mean(), expected.lo, expected.hi), rel=1e-9)
        assert row["direction"] == ("↓" if row["column"] == "deletion" else "↑")
        assert row["seconds"] == pytest.approx(0.5 + np.arange(20).mean() / 100)
    means = table.pivot(index="method", columns="column", values="mean")
    best = table[table["best"]].set_index("column")["method"].to_dict()
    assert best == {
        "ehr": means["ehr"].idxmax(),
        "insertion": means["insertion"].idxmax(),
        "deletion": means["deletion"].idxmin(),
    }


def test_nothing_is_best_alone_or_without_a_direction(root):
    frame = tables.rows(root)
    assert not tables.summary(tables.where(frame, {"method": ["iba"]}))["best"].any()
    frame["direction"] = pd.Categorical(["none"] * len(frame))
    assert not tables.summary(frame)["best"].any()
    assert set(tables.paired(frame, "ehr")["better"]) == {""}


def test_pairs_against_plain_numpy(root):
    made = iba(root)
    add_rows(made, "ehr.11111111", [(UIDS[0], "changed", "map", "ehr", 0.9, time.time() + 9)])
    add_entry(made, UIDS[1], "changed", "ehr", "gone", time.time() + 9)
    tests = tables.paired(tables.rows(root), "ehr")
    assert list(zip(tests["a"], tests["b"])) == [("grad_cam", "iba"), ("grad_cam", "ig"), ("iba", "ig")]
    # iba's first sample is of other content, its second failed: 18 of 20 and 19 are common.
    assert tests[["n", "n_a", "n_b"]].to_numpy().tolist() == [[18, 20, 19], [20, 20, 20], [18, 19, 20]]
    for row in tests.to_dict("records"):
        rows = slice(2, None) if "iba" in (row["a"], row["b"]) else slice(None)
        a, b = values_of(row["a"])[rows, 0], values_of(row["b"])[rows, 0]
        expected = stats.paired_test(a, b)
        assert row["difference"] == pytest.approx((a - b).mean())
        assert (row["lo"], row["hi"], row["effect"]) == pytest.approx((expected.lo, expected.hi, expected.effect))
        assert row["p"] == pytest.approx(expected.p)
    assert tests["p_holm"].to_numpy() == pytest.approx(stats.holm(tests["p"]))
    assert tests["better"].tolist()[0] == "iba"
    assert tests["better"].tolist()[2] == "iba"
    text = formats.to_markdown(formats.paired_table(tests))
    assert "18 of 20, 19" in text
    with pytest.raises(UserError, match="no results have the column 'nope'"):
        tables.paired(tables.rows(root), "nope")


def test_lower_is_better_decides_who_won(root):
    tests = tables.paired(tables.rows(root), "deletion")
    first = only(tests, a="grad_cam", b="iba").iloc[0]
    assert first["difference"] > 0
    assert first["better"] == "iba"


def test_ties_with_the_best(root):
    frame = tables.rows(root)
    table, tests = tables.summary(frame), tables.all_paired(frame)
    tie = tables.ties(table, tests)
    assert not tie[table["best"]].any()
    assert not tie.any()  # iba is far ahead
    without = tables.where(frame, {"method": ["grad_cam", "ig"]})
    table, tests = tables.summary(without), tables.all_paired(without, ["ehr"])
    p = tests["p_holm"].iloc[0]
    assert tables.ties(table, tests, 1 - p * 0.9)[(table["column"] == "ehr") & ~table["best"]].all()
    assert not tables.ties(table, tests, 1 - min(p * 1.1, 0.99)).any()


def test_methods_with_several_maps_compete_with_each(root):
    made = iba(root)
    add_rows(made, "ehr.11111111", [(u, "f", "second", "ehr", 0.1, 1.0) for u in UIDS])
    frame = tables.rows(root)
    table = tables.summary(frame)
    assert set(only(table, column="ehr")["contender"]) == {"grad_cam", "iba · map", "iba · second", "ig"}
    assert len(tables.paired(frame, "ehr")) == 6


def test_where(root):
    frame = tables.rows(root)
    some = tables.where(frame, {"method": ["iba", "ig"], "column": ["ehr"]})
    assert set(some["method"]) == {"iba", "ig"}
    assert set(some["column"]) == {"ehr"}
    assert list(some["method"].cat.categories) == ["iba", "ig"]
    with pytest.raises(UserError, match=r"method=nope; there are: grad_cam, iba, ig"):
        tables.where(frame, {"method": ["iba", "nope"]})
    with pytest.raises(UserError, match="no field 'layer'"):
        tables.where(frame, {"layer": ["x"]})
    with pytest.raises(UserError, match="at once"):
        tables.where(tables.where(frame, {}), {"metric": ["ehr"], "column": ["deletion"]})


def test_a_name_selects_all_its_variants(tmp_path):
    for i, beta in enumerate((1, 10)):
        made = cell(tmp_path, f"photos.net.iba.{i}", beta=beta, steps=i)
        metric_folder(made, "ehr.11111111")
        add_rows(made, "ehr.11111111", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    frame = tables.rows(tmp_path)
    assert len(tables.where(frame, {"method": ["iba"]})) == 40
    assert len(tables.where(frame, {"method": ["iba (beta=1, steps=0)"]})) == 20
    table = tool("table")
    assert table.conditions(["method=iba (beta=1, steps=0),ig"]) == {"method": ["iba (beta=1, steps=0)", "ig"]}


def test_a_hundred_thousand_samples_in_seconds(tmp_path):
    n = 20_000
    uids = np.array([f"val/{i:06d}" for i in range(n)])
    for k in range(5):
        made = cell(tmp_path, f"photos.net.m{k}.1", method=f"m{k}")
        metric_folder(made, "ehr.11111111")
        columns = {"uid": uids, "fingerprint": ["f"] * n, "map": ["map"] * n, "column": ["ehr"] * n}
        columns |= {"value": np.random.default_rng(k).normal(k / 100, 1, n), "time": np.ones(n)}
        table = store.pa.table(columns, schema=store.Rows.SCHEMA)
        store.pq.write_table(table, made.folder / "scores" / "ehr.11111111" / "w0-00001.parquet")
    start = time.monotonic()
    frame = tables.rows(tmp_path)
    table = tables.summary(frame)
    tests = tables.all_paired(frame)
    assert time.monotonic() - start < 10
    assert table["n"].tolist() == [n] * 5
    assert len(tests) == 10
    buffer = io.StringIO(formats.to_csv(table))
    assert len(pd.read_csv(buffer)) == 5
