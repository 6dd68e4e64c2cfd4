"""The tables of a synthetic work directory are compared with plain pandas and numpy."""

import io
import math
import re
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import METHODS, UIDS, add_entry, add_rows, cell, iba, metric_folder, only, values_of
from tiny import tool

from attrib.results import formats, stats, tables
from attrib.store import cell as store
from attrib.types import UNREADABLE, UserError

EHR = "ehr.11111111"

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
        EHR,
        [
            (UIDS[0], "f", "map", "ehr", 0.91, now + 20),  # twice, same fingerprint, later
            (UIDS[1], "f", "map", "ehr", 0.92, now - 86_400),  # earlier: does not count
            (UIDS[2], "new", "map", "ehr", 0.93, now + 20),  # another fingerprint, later
            (UIDS[3], "old", "map", "ehr", 0.94, now - 86_400),
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
    late, early = now + 50, now - 86_400
    add_entry(made, "new/1", "f", "load", "cannot read", late)  # nothing else known
    add_entry(made, "new/1", "f", "load", "cannot read again", late + 1)  # the same sample
    add_entry(made, "new/2", "f", EHR, "no region of interest", late)  # in one metric only
    add_entry(made, UIDS[0], "f", "maps", "out of memory", early)  # succeeded later
    add_entry(made, UIDS[1], "f", EHR, "other writer failed", late)  # succeeded before, same content
    add_entry(made, UIDS[2], "changed", "maps", "NaN map", late)  # content changed, then failed
    add_entry(made, UIDS[3], UNREADABLE, "load", "disk gone", late)  # the score stands
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


def test_a_metrics_failures_are_shown_under_its_label(root):
    add_entry(iba(root), "new/2", "f", EHR, "no region", time.time())
    assert only(tables.summary(tables.rows(root)), method="iba", column="ehr")["failed"].tolist() == [1]
    frame = tables.rows(root)
    assert set(frame.loc[frame["state"] == "failed", "stage"]) == {"ehr"}


def test_a_failure_under_a_folders_name_is_that_metrics_alone(root):
    made, now = iba(root), time.time() + 9
    metric_folder(made, "ehr.33333333", {"ehr": "higher"}, parameters={"class": "ehr", "steps": 5})
    add_rows(made, "ehr.33333333", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    add_entry(made, UIDS[0], "changed", "ehr.33333333", "of one", now)
    frame = only(tables.rows(root), state="failed")
    assert set(frame[["metric", "stage", "reason"]].itertuples(index=False, name=None)) == {
        ("ehr (steps=5)", "ehr (steps=5)", "of one")
    }


def test_samples_beyond_the_limit_are_not_pending(root):
    made, later = iba(root), [f"later/{i}" for i in range(280)]
    made.write_samples([*UIDS, *later], dict.fromkeys(UIDS, "f"), UIDS)
    frame = tables.rows(root)
    row = only(tables.summary(frame), method="iba", column="ehr").iloc[0]
    assert (row["n"], row["failed"], row["pending"]) == (20, 0, 0)
    assert set(only(frame, state="unasked")["uid"]) == set(later)
    for asking in (tables.whole(frame), None):  # a paper's table is about all; a job array that has not begun is due
        if asking is None:
            made.write_samples([*UIDS, *later], {})
        row = only(tables.summary(tables.rows(root) if asking is None else asking), method="iba", column="ehr").iloc[0]
        assert (row["n"], row["pending"]) == (20, 280)


def test_maps_without_metrics_are_counted_as_maps(tmp_path):
    made = cell(tmp_path, "photos.net.ig.1", method="ig")
    for uid in UIDS[:6]:
        made.maps.add(uid, "f", {"map": np.zeros((4, 4), np.float32)})
    made.maps.flush()
    made.write_samples([*UIDS[:7], "more"], dict.fromkeys(UIDS[:7], "f"), UIDS[:7])
    progress = made.folder / "runs" / "20261101-7-0" / "progress.json"
    for metrics, text in (([], "6 maps, 1 pending"), (["ehr.11111111"], "n=0, 7 pending")):
        store.write_json(progress, {"metrics": metrics, "shards": 1})
        (block,) = formats.wide(tables.summary(tables.rows(tmp_path)))
        assert block.unscored == {"ig": text}


def test_samples_that_went_are_counted_nowhere(root):
    made, now = iba(root), time.time() + 9
    late = store.Arrays(made.folder / "maps", "w1")
    late.add("gone/map", "f", {"map": np.zeros((8, 8), np.float32)}, seconds=1e6)
    late.flush()
    add_rows(made, EHR, [("gone/nan", "f", "map", "ehr", math.nan, now)])
    add_entry(made, "gone/failed", "f", "load", "cannot read", now)
    add_entry(made, "gone/failed", "f", EHR, "no region", now)
    add_entry(made, "gone/failed", "f", "lost.0123abcd", "crashed", now)
    before = only(tables.summary(tables.rows(root)), method="iba", column="ehr").iloc[0]
    assert (before["n"], before["failed"], before["pending"]) == (20, 2, 1)

    made.write_samples(UIDS[2:], {})
    frame = tables.rows(root)
    assert set(only(frame, method="iba")["uid"]) == set(UIDS[2:])
    assert set(only(frame, method="ig")["uid"]) == set(UIDS)  # without samples.json all count
    table = only(tables.summary(frame), method="iba")
    assert table[["n", "failed", "pending"]].to_numpy().tolist() == [[18, 0, 0]] * 3
    row = only(table, column="ehr").iloc[0]
    assert row["mean"] == pytest.approx(values_of("iba")[2:, 0].mean())
    assert row["seconds"] == pytest.approx(0.5 + np.arange(2, 20).mean() / 100)
    assert tables.paired(frame, "ehr")["n"].tolist() == [18, 20, 18]

    made.write_samples([], {})
    assert set(tables.rows(root)["method"]) == {"grad_cam", "ig"}
    (made.folder / "samples.json").write_text("{")
    broken: list[str] = []
    assert set(tables.rows(root, broken)["method"]) == {"grad_cam", "ig"}
    (line,) = broken
    assert re.search(r"iba0000/samples\.json does not map", line)
    for other in ("grad_cam", "ig"):
        (root / f"photos.net.{other}.{other:.4}0000" / "samples.json").write_text("{")
    with pytest.raises(UserError, match=r"samples\.json"):
        tables.rows(root)


def test_nan_is_a_failure_with_the_ledgers_reason(root):
    made, now = iba(root), time.time() + 5
    add_rows(made, EHR, [(UIDS[0], "f", "map", "ehr", math.nan, now), (UIDS[1], "f", "map", "ehr", math.inf, now)])
    add_entry(made, UIDS[0], "f", EHR, "no region of interest", now)
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


def test_a_half_finished_cell_does_not_look_complete(root):
    more = [f"val/{i:03d}" for i in range(300)]
    made = iba(root)
    made.write_samples(more, dict.fromkeys(UIDS, "f"))
    add_entry(made, more[20], "f", "maps", "out of memory", 1.0)
    add_entry(made, more[21], UNREADABLE, "load", "disk gone", 1.0)
    begun = cell(root, "photos.net.begun.99", method="begun")
    begun.write_samples(more, {})
    frame = tables.rows(root)
    table = tables.summary(frame)
    assert only(table, method="iba")[["n", "failed", "pending"]].to_numpy().tolist() == [[20, 2, 278]] * 3
    assert only(table, method="begun")[["n", "failed", "pending"]].to_numpy().tolist() == [[0, 0, 300]]
    assert only(table, method="iba", column="ehr")["mean"].iloc[0] == pytest.approx(values_of("iba")[:, 0].mean())
    assert not frame.duplicated(["cell", "metric", "map", "uid", "column"]).any()
    wide = formats.to_markdown(formats.wide_table(formats.wide(table)[0]))
    assert "n=20, 2 failed, 278 pending" in wide
    assert "begun (n=0, 300 pending)" in wide
    assert "pending" in formats.long_table(table).header
    assert tables.paired(frame, "ehr")["n"].tolist() == [20, 20, 20]


def test_two_data_roots_with_the_same_names_do_not_mix(root):
    """Another data root (or an image changed and changed back): whichever was run last counts, all of it."""
    made, now = iba(root), time.time() + 9
    late = store.Arrays(made.folder / "maps", "w1")
    for uid in UIDS[:5]:
        late.add(uid, "other", {"map": np.zeros((8, 8), np.float32)}, seconds=9.0)
    late.flush()
    add_rows(made, EHR, [(u, "other", "map", "ehr", 0.9, now) for u in UIDS[:4]])
    add_entry(made, UIDS[4], "other", EHR, "no region", now)
    whole = dict.fromkeys(UIDS, "f")

    made.write_samples(UIDS, dict.fromkeys(UIDS, "other"))
    frame = only(tables.rows(root), method="iba", column="ehr")
    assert set(frame["fingerprint"]) == {"other"}
    assert frame["state"].value_counts().to_dict() == {"ok": 4, "failed": 1, "pending": 15}
    assert frame["seconds"].dropna().unique().tolist() == [9.0]
    assert set(only(tables.rows(root), method="iba", column="deletion")["state"]) == {"pending"}

    made.write_samples(UIDS, whole)  # back again: nothing of the later values is left
    frame = only(tables.rows(root), method="iba", column="ehr").set_index("uid")
    assert set(frame["state"]) == {"ok"}
    assert frame.loc[list(UIDS), "value"].to_numpy() == pytest.approx(values_of("iba")[:, 0], abs=0)
    assert set(frame["fingerprint"]) == {"f"}

    made.write_samples([], {})
    made.write_samples(UIDS, {})  # no fingerprint is known: by time
    frame = only(tables.rows(root), method="iba", column="ehr").set_index("uid")
    assert frame.loc[list(UIDS[:5]), "fingerprint"].tolist() == ["other"] * 5
    assert frame.loc[list(UIDS[:5]), "state"].tolist() == ["ok"] * 4 + ["failed"]


def test_a_hiccup_of_the_file_server_fails_nothing_for_good(root):
    made, now = iba(root), time.time() + 9
    made.write_samples([*UIDS, "mapped", "nothing"], dict.fromkeys(UIDS, "f"))
    late = store.Arrays(made.folder / "maps", "w1")
    late.add("mapped", "f", {"map": np.zeros((8, 8), np.float32)}, seconds=1.0)
    late.flush()
    for uid in (*UIDS[:5], "mapped", "nothing"):
        add_entry(made, uid, UNREADABLE, "load", "disk gone", now)
    add_entry(made, UIDS[5], "f", "load", "disk gone", now)
    made.write_samples([*UIDS, "mapped", "nothing"], dict.fromkeys(UIDS, UNREADABLE))
    table = only(tables.summary(tables.rows(root)), method="iba")
    assert table[["n", "failed", "pending"]].to_numpy().tolist() == [[20, 1, 1]] * 3
    assert len(made.ledger.entries()) == 8  # the history stays


def test_cells_and_metrics_without_any_score_are_shown(root):
    nothing = cell(root, "photos.net.broken.99", method="broken")
    add_entry(nothing, UIDS[0], "f", "maps", "not supported", 1.0)
    no_rows = cell(root, "photos.net.empty.99", method="empty")
    metric_folder(no_rows, EHR)
    add_entry(no_rows, UIDS[0], "f", EHR, "no region", 1.0)
    add_entry(no_rows, UIDS[0], "f", "lost.0123abcd", "crashed", 1.0)
    table = tables.summary(tables.rows(root))
    row = only(table, method="broken").iloc[0]
    assert (row["metric"], row["n"], row["failed"]) == ("", 0, 1)
    assert math.isnan(row["mean"])
    rows = only(table, method="empty").set_index("metric")
    assert rows.loc["ehr", ["map", "column", "n", "failed"]].tolist() == ["map", "ehr", 0, 1]
    assert rows.loc["lost", ["n", "failed"]].tolist() == [0, 1]
    lost = only(tables.rows(root), metric="lost")
    assert lost[["uid", "state", "stage"]].to_numpy().tolist() == [[UIDS[0], "failed", "lost"]]
    drawn = formats.wide_table(formats.wide(table)[0])
    assert any("broken" in note for note in drawn.notes)
    formats.to_terminal(formats.long_table(table))
    assert len(tables.all_paired(tables.rows(root))) == 9


def test_unreadable_metric_json_keeps_the_numbers(root):
    (iba(root).folder / "scores" / EHR / "metric.json").unlink()
    row = only(tables.rows(root), method="iba", column="ehr")
    assert set(row["direction"]) == {"none"}
    assert len(row) == 20


def test_empty_and_foreign_directories(tmp_path):
    with pytest.raises(UserError, match=r"holds no results.*attrib run"):
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


def test_of_different_samples_the_common_ones_say_what_is_best(root):
    """A method that saw the easy samples alone has a higher mean than one that is better on each of them."""
    frame = only(tables.rows(root), column="ehr")
    a, b, c = METHODS
    easy = frame["uid"].isin(UIDS[:5])
    frame["value"] = np.where(easy, 0.8, 0.2) + frame["method"].map({a: 0.1, b: 0.0, c: -0.1}).astype(float)
    frame["state"] = frame["state"].cat.add_categories("pending")
    frame.loc[~easy & (frame["method"] == b), ["value", "state"]] = [math.nan, "pending"]
    table = tables.summary(frame).set_index("method")
    assert table["n"].to_dict() == {a: 20, b: 5, c: 20}
    assert table["mean"].idxmax() == b
    assert table["best"].to_dict() == {a: True, b: False, c: False}
    (wide,) = formats.wide(table.reset_index())
    assert wide.uneven
    assert formats.UNEVEN in formats.wide_table(wide).notes
    (wide,) = formats.wide(tables.summary(tables.rows(root)))
    assert not wide.uneven
    assert formats.UNEVEN not in formats.wide_table(wide).notes


def test_pairs_against_plain_numpy(root):
    made = iba(root)
    add_rows(made, EHR, [(UIDS[0], "changed", "map", "ehr", 0.9, time.time() + 9)])
    add_entry(made, UIDS[1], "changed", EHR, "gone", time.time() + 9)
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
    add_rows(made, EHR, [(u, "f", "second", "ehr", 0.1, 1.0) for u in UIDS])
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
    with pytest.raises(UserError, match=r"chosen by .*, not by 'layer'"):
        tables.where(frame, {"layer": ["x"]})
    with pytest.raises(UserError, match="at once"):
        tables.where(tables.where(frame, {}), {"metric": ["ehr"], "column": ["deletion"]})


def test_a_name_selects_all_its_variants(tmp_path):
    for i, beta in enumerate((1, 10)):
        made = cell(tmp_path, f"photos.net.iba.{i}", beta=beta, steps=i)
        metric_folder(made, EHR)
        add_rows(made, EHR, [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
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
        metric_folder(made, EHR)
        columns = {"uid": uids, "fingerprint": ["f"] * n, "map": ["map"] * n, "column": ["ehr"] * n}
        columns |= {"value": np.random.default_rng(k).normal(k / 100, 1, n), "time": np.ones(n)}
        table = pa.table(columns, schema=store.ScoreRows.SCHEMA)
        pq.write_table(table, made.folder / "scores" / EHR / "w0-00001.parquet")
    start = time.monotonic()
    frame = tables.rows(tmp_path)
    table = tables.summary(frame)
    tests = tables.all_paired(frame)
    assert time.monotonic() - start < 10
    assert table["n"].tolist() == [n] * 5
    assert len(tests) == 10
    buffer = io.StringIO(formats.to_csv(table))
    assert len(pd.read_csv(buffer)) == 5


def test_means_that_are_equal_up_to_rounding_are_both_best(root):
    frame = tables.rows(root)
    scored = frame["column"] == "ehr"
    values = frame.loc[scored & (frame["method"] == METHODS[0]), "value"].to_numpy() + 1
    for method, numbers in zip(METHODS[:2], (values, np.nextafter(values, 3))):
        frame.loc[scored & (frame["method"] == method), "value"] = numbers
    table = tables.summary(frame)
    best = table.loc[(table["column"] == "ehr") & table["best"], "method"]
    assert set(best) == set(METHODS[:2])
    assert table.loc[table["column"] == "ehr", "mean"].nunique() == 3


def test_the_same_rows_in_other_files_are_the_same_table(tmp_path):
    """Sixty samples by one process, or by three shards whose files have any names and order."""
    rng, drawn = np.random.default_rng(0), []
    values, offsets = ({f"v/{i:02d}": rng.normal(size=2) for i in range(60)} for _ in range(2))
    for name, cut in {"one": [range(60)], "three": [range(2, 60, 3), range(0, 60, 3), range(1, 60, 3)]}.items():
        root = tmp_path / name
        for method, shift in (("a", 0.0), ("b", 0.3)):
            made = cell(root, f"photos.net.{method}.{method * 8}", method=method)
            metric_folder(made, "m.11111111", {"x": "higher", "y": "lower"})
            for k, part in enumerate(cut):
                uids = [f"v/{i:02d}" for i in (part if name == "one" else reversed(part))]
                scores = {uid: values[uid] + shift * offsets[uid] for uid in uids}
                rows = [(uid, "f", "map", c, scores[uid][j], 1.0) for uid in uids for j, c in enumerate("xy")]
                add_rows(made, "m.11111111", rows, writer=f"w{9 - k}")
        frame = tables.rows(root)
        drawn.append((tables.summary(frame), tables.all_paired(frame), tables.ranks(frame)))
    for one, three in zip(*drawn):
        pd.testing.assert_frame_equal(one, three, check_exact=True)
