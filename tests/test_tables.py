"""A synthetic work directory made with the real store; the tables are compared with plain pandas."""

import importlib.util
import io
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attrib import stats, store, tables
from attrib.types import UserError

METHODS = ("grad_cam", "iba", "ig")
SCORES = {
    "ehr.11111111": ("ehr", {"ehr": "higher"}, {"ehr_curve": "x: threshold; y: ratio"}),
    "insertion_deletion.22222222": ("insertion_deletion", {"insertion": "higher", "deletion": "lower"}, {}),
}
UIDS = tuple(f"val/{i:03d}" for i in range(20))


def tool(name):
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tools_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spec(dataset="photos", model="net", method="iba", **fields):
    """What the runner writes as spec.json."""
    seed = fields.pop("seed", 0)
    return {
        "names": {"dataset": dataset, "model": model, "method": method},
        "key": "0" * 64,
        "config": {"dataset": {"_target_": "d", "root": "/a"}, "model": {"_target_": "m"}, "method": {}, "seed": seed},
        "method": {"class": f"attrib.methods.{method}.Method", "version": 1, **fields},
        "maps": {"map": "relevance, signed, input resolution"},
        "weights": "ab" * 32,
        "versions": {"torch": "2.15.0", "numpy": "2.4.6"},
        "git": None,
        "pictures": "cafecafe",
    }


def cell(root, folder, **fields):
    made = store.Cell(Path(root) / folder, "w0")
    made.write_spec(spec(**fields))
    return made


def metric_folder(made, folder, columns=None, curves=None, parameters=None):
    name, known_columns, known_curves = SCORES.get(folder, (folder.split(".")[0], columns, curves or {}))
    text = {"name": name, "spec": parameters or {"class": name}, "columns": known_columns, "curves": known_curves}
    store.write_json(made.folder / "scores" / folder / "metric.json", text)


def add_rows(made, folder, rows, writer="w0"):
    """rows: (uid, fingerprint, map, column, value, time), written as one chunk of another writer."""
    table = store.pa.Table.from_pylist([dict(zip(store.Rows.SCHEMA.names, r)) for r in rows], store.Rows.SCHEMA)
    path = made.folder / "scores" / folder / f"{writer}-{time.monotonic_ns()}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    store.pq.write_table(table, path)


def add_entry(made, uid, fingerprint, stage, reason, at):
    entry = {"uid": uid, "fingerprint": fingerprint, "stage": stage, "reason": reason, "time": at}
    made.folder.mkdir(parents=True, exist_ok=True)
    with open(made.ledger.path, "a") as file:
        file.write("\n" + json.dumps(entry) + "\n")


def values_of(method):
    """(20, 3): ehr, insertion, deletion of every sample."""
    rng = np.random.default_rng(7)
    base = rng.uniform(0.2, 0.6, (20, 3))
    shift = {"grad_cam": 0.0, "iba": 0.15, "ig": -0.02}[method]
    return base + shift * np.array([1, 1, -1]) + np.random.default_rng(METHODS.index(method)).normal(0, 0.04, (20, 3))


def build(root, side=8, uids=UIDS, maps=None, pictures=None):
    """3 methods × 20 samples × 2 metrics; failures, duplicates and two fingerprints in iba."""
    root = Path(root)
    for method in METHODS:
        made = cell(root, f"photos.net.{method}.{method:.4}0000", method=method)
        values, rng = values_of(method), np.random.default_rng(METHODS.index(method))
        for i, uid in enumerate(uids):
            arrays = {"map": maps(method, i) if maps else rng.normal(size=(side, side)).astype(np.float32)}
            if method == "iba":
                arrays["loss"] = np.exp(-np.arange(10) / 3).astype(np.float32) + i / 50
            made.maps.add(uid, "f", arrays, seconds=0.5 + i / 100, rows=10)
        made.maps.flush()
        for folder, (_, columns, curves) in SCORES.items():
            metric_folder(made, folder)
            writer, curve_writer = made.scores(folder), made.curves(folder)
            for i, uid in enumerate(uids):
                column = dict(zip(("ehr", "insertion", "deletion"), values[i]))
                writer.add(uid, "f", {("map", c): column[c] for c in columns})
                curve_writer.add(uid, "f", {f"map/{c}": np.linspace(1, values[i, 0], 11) for c in curves})
            writer.flush()
            if curves:
                curve_writer.flush()
        run = made.folder / "runs" / "20261101-7-0"
        store.write_json(run / "summary.json", {"maps_computed": 20, "failed": 0, "seconds": 9.5})
        store.write_json(
            run / "environment.json", {"command": ["tools/run.py", "method=" + method], "machine": "node7"}
        )
    inputs = store.Arrays(root / "state" / "pictures.cafecafe", "w0")
    for i, uid in enumerate(uids[:6]):
        picture = pictures(i) if pictures else np.full((side, side, 3), 40 * i, np.uint8)
        roi = np.zeros(picture.shape[:2], bool)
        roi[len(roi) // 4 : -len(roi) // 4, len(roi) // 4 : -len(roi) // 4] = True
        inputs.add(uid, "", {"image": picture, "roi": roi}, name=f"class {i}", target=i)
    inputs.flush()
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tables") / "work")


@pytest.fixture
def root(built, tmp_path):
    return shutil.copytree(built, tmp_path / "work")


def iba(root):
    return store.Cell(root / "photos.net.iba.iba0000")


def only(frame, **equal):
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame


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
    assert "1 pending" in tables.to_markdown(tables.wide_table(tables.wide(tables.summary(tables.rows(root)))[0]))


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
    drawn = tables.wide_table(tables.wide(table)[0])
    assert any("broken" in note for note in drawn.notes)
    tables.to_terminal(tables.long_table(table))
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


# labels ---------------------------------------------------------------------


def labels(root, axis="method"):
    return [getattr(item, axis) for item in tables.labelled(root)]


def test_labels_of_variants_name_the_fields_that_differ(tmp_path):
    cell(tmp_path, "photos.net.iba.1", method="iba", beta=1, steps=10, fit={"n": 5})
    cell(tmp_path, "photos.net.iba.2", method="iba", beta=10, steps=10, fit={"n": 5})
    cell(tmp_path, "photos.net.iba.3", method="iba", beta=10, steps=10, fit={"n": 9})
    cell(tmp_path, "photos.net.ig.1", method="ig", steps=3)
    assert labels(tmp_path) == ["iba (beta=1, fit.n=5)", "iba (beta=10, fit.n=5)", "iba (beta=10, fit.n=9)", "ig"]


def test_the_same_method_keeps_its_label_in_all_datasets_and_models(tmp_path):
    cell(tmp_path, "cats.net.iba.1", dataset="cats", method="iba", beta=1)
    cell(tmp_path, "photos.net.iba.2", method="iba", beta=1)
    cell(tmp_path, "photos.other.iba.3", model="other", method="iba", beta=2)
    assert labels(tmp_path) == ["iba (beta=1)", "iba (beta=1)", "iba (beta=2)"]


def test_labels_of_seeds_versions_weights_and_datasets(tmp_path):
    cell(tmp_path, "photos.net.iba.1", seed=0)
    cell(tmp_path, "photos.net.iba.2", seed=1)
    assert labels(tmp_path) == ["iba (seed=0)", "iba (seed=1)"]
    for i, change in enumerate(({"weights": "cd" * 32}, {"pictures": "beefbeef"})):
        made = store.Cell(tmp_path / f"photos.net.iba.x{i}")
        made.write_spec(spec() | change)
    assert set(labels(tmp_path, "model")) == {"net (weights=abababab)", "net (weights=cdcdcdcd)"}
    # Equal configurations, other keys: the key itself tells them apart.
    assert set(labels(tmp_path, "dataset")) == {"photos (key=cafecafe)", "photos (key=beefbeef)"}


def test_labels_of_what_else_makes_a_cell(tmp_path):
    for key, layer, state in (
        ("1", "features.3", "aa" * 32),
        ("2", "features.9", "bb" * 32),
        ("3", "features.9", None),
    ):
        made = store.Cell(tmp_path / f"photos.net.iba.{key}")
        made.write_spec(spec(beta=1) | {"layers": {"bottleneck": layer}, "state_key": state})
    cell(tmp_path, "photos.net.iba.4", beta=2)
    assert labels(tmp_path) == [
        "iba (beta=1, bottleneck=features.3, state=aaaaaaaa)",
        "iba (beta=1, bottleneck=features.9, state=bbbbbbbb)",
        "iba (beta=1, bottleneck=features.9, state=None)",
        "iba (beta=2)",
    ]


def test_cells_that_nothing_tells_apart_show_their_keys(tmp_path):
    cell(tmp_path, "photos.net.iba.0a")
    cell(tmp_path, "photos.net.iba.0b")
    assert labels(tmp_path) == ["iba (key=0a)", "iba (key=0b)"]


def test_another_path_to_the_same_data_is_the_same_dataset(tmp_path):
    for i, path in enumerate(("/scratch", "/home")):
        made = store.Cell(tmp_path / f"photos.net.iba.{i}")
        described = spec()
        described["config"]["dataset"]["root"] = path
        made.write_spec(described)
    assert labels(tmp_path, "dataset") == ["photos", "photos"]


def test_labels_of_metric_parameters(root):
    made = iba(root)
    metric_folder(made, "ehr.33333333", {"ehr": "higher"}, parameters={"class": "ehr", "steps": 5})
    add_rows(made, "ehr.33333333", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    table = tables.summary(tables.rows(root))
    assert set(only(table, column="ehr")["metric"]) == {
        "ehr (key=" + tables.keys.digest({"class": "ehr"})[:8] + ")",
        "ehr (steps=5)",
    }
    titles = tables.wide(table)[0].columns
    assert "ehr · ehr (steps=5) ↑" in titles
    assert "deletion ↓" in titles


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
    text = tables.to_markdown(tables.paired_table(tests))
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


# formats --------------------------------------------------------------------


def test_rounding_follows_the_interval():
    assert tables.rounded(0.41234, 0.40, 0.4251) == "0.412"
    assert tables.rounded(0.41234, 0.2, 0.6) == "0.41"
    assert tables.rounded(1234.5678, 1100, 1400) == "1235"
    assert tables.rounded(0.00012345, 0.00012, 0.00013) == "0.0001234"
    assert tables.rounded(0.41234) == "0.4123"
    assert tables.rounded(math.nan) == "–"
    assert tables.with_half(0.41234, 0.40, 0.4251) == "0.412 ± 0.013"
    assert tables.with_half(0.5, 0.5, 0.5) == "0.5"
    assert tables.p_text(0.0001) == "< .001"
    assert tables.p_text(0.0421) == ".042"
    assert tables.p_text(1.0) == "1.000"


def run(root, *args):
    return tool("table").main([str(root), *args])


def test_csv_has_full_precision(root, tmp_path):
    assert run(root, "--out", str(tmp_path / "t.csv")) == 0
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, converters={"mean": float})
    table = tables.summary(tables.rows(root))
    assert list(back.columns) == list(table.columns)
    assert back["mean"].tolist() == table["mean"].tolist()
    assert run(root, "--rows", "--out", str(tmp_path / "rows.csv")) == 0
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 180
    assert run(root, "--pairs", "ehr", "--out", str(tmp_path / "pairs.csv")) == 0
    assert pd.read_csv(tmp_path / "pairs.csv")["a"].tolist() == ["grad_cam", "grad_cam", "iba"]


def test_markdown(root, capsys):
    assert run(root, "--format", "md", "--wide") == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == r"| method | ehr ↑ (n=20) | insertion ↑ (n=20) | deletion ↓ (n=20) | s/sample |"
    assert lines[1] == "| :-- | --: | --: | --: | --: |"
    assert len(lines) == 5
    assert "**0." in next(line for line in lines if "| iba" in line)
    assert r"| grad\_cam |" in text
    assert run(root, "--format", "md", "--pairs") == 0
    text = capsys.readouterr().out
    assert "Paired tests" in text
    assert text.count("\n| ehr ") >= 3


def test_latex(root, capsys):
    assert run(root, "--format", "tex") == 0
    text = capsys.readouterr().out
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"grad\_cam", r"$\uparrow$", r"\textbf{0."):
        assert part in text
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1
    assert tables._tex("50% of $x_1$ & {#2} ~^\\") == (
        r"50\% of \$x\_1\$ \& \{\#2\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_terminal_is_the_default_with_paired_tests(root, capsys, tmp_path):
    assert run(root) == 0
    text = capsys.readouterr().out
    assert "photos, net" in text
    assert "Paired tests" in text
    assert "p (Holm)" in text
    assert run(root, "--wide", "--out", str(tmp_path / "t.txt")) == 0
    assert "±" in (tmp_path / "t.txt").read_text()


def test_names_are_not_markup(tmp_path, capsys):
    made = cell(tmp_path, "photos.net.odd.1", method="[red]a|b*")
    metric_folder(made, "ehr.11111111")
    add_rows(made, "ehr.11111111", [(u, "f", "map", "ehr", 0.5, 1.0) for u in UIDS])
    assert run(tmp_path) == 0
    assert "[red]a|b*" in capsys.readouterr().out
    assert run(tmp_path, "--format", "md") == 0
    assert r"\[red\]a\|b\*" in capsys.readouterr().out


def test_long_lists_of_pairs_say_what_they_hide(root):
    tests = tables.all_paired(tables.rows(root))
    table = tables.paired_table(tests, most=4)
    assert len(table.body) == 4
    assert any("5 more pairs" in note for note in table.notes)


def test_unequal_n_is_said(root):
    add_entry(iba(root), UIDS[1], "changed", "ehr", "gone", time.time() + 9)
    table = tables.summary(tables.rows(root))
    assert any("n differs" in note and "ehr" in note for note in tables.long_table(table).notes)
    text = tables.to_markdown(tables.wide_table(tables.wide(table)[0]))
    assert "(n=19, 1 failed)" in text
    assert "| ehr ↑ |" in text  # the header no longer states a common n


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--wide", "--format", "csv"], "--wide"),
        (["--rows"], "--rows"),
        (["--out", "t.docx"], "suffix"),
        (["--confidence", "95"], "0.95"),
        (["--where", "method"], "FIELD=VALUE"),
        (["--where", "method=nope"], "there are"),
        (["--pairs", "nope"], "nope"),
    ],
)
def test_mistakes_are_named(root, capsys, args, message):
    assert run(root, *args) == 2
    assert message in capsys.readouterr().err


def test_empty_root_exits_2(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "holds no results" in capsys.readouterr().err


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
    buffer = io.StringIO(tables.to_csv(table))
    assert len(pd.read_csv(buffer)) == 5
