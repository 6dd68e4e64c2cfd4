"""What a map costs: noted by the loop, and shown in every table."""

import math
import shutil

import numpy as np
import pytest
import torch
from nets import small_cnn
from synthetic import only
from tiny import tool

from attrib import report
from attrib.models import Classifier
from attrib.process import memory
from attrib.results import formats, tables
from attrib.running import costs
from attrib.store import cell as store
from attrib.types import UserError


def noted(root, method, **info):
    """The maps of a method of the synthetic directory again, with these costs."""
    cell = store.Cell(root / f"photos.net.{method}.{method:.4}0000")
    index = dict(cell.maps.index())
    arrays = {key: cell.maps.read(key) for key in index}
    shutil.rmtree(cell.folder / "maps")
    anew = store.Arrays(cell.folder / "maps", "w0")
    for i, (key, value) in enumerate(arrays.items()):
        anew.add(*key, value, **{name: v(i) if callable(v) else v for name, v in info.items()})
    anew.flush()


def _each(model, samples):
    meter = costs.Meter(model)
    meter.begin()
    return meter.each(samples)


def test_a_meter_counts_rows_and_seconds_of_each_sample():
    model = Classifier(small_cnn(), {}, rows=3)
    meter = costs.Meter(model)
    meter.begin()
    model.logits(torch.zeros(6, 3, 32, 32))
    cost = meter.each(2)
    assert cost["rows"] == 3
    assert 0 < cost["seconds"] < 60
    assert cost["device"] == costs.device_name(torch.device("cpu"))
    assert cost["device"].startswith("CPU, ")
    # Of the whole process: torch alone takes more than 50 MiB.
    assert 50 * 2**20 < cost["memory"] < 2**40


def test_what_was_freed_before_the_first_batch_is_not_the_methods(monkeypatch):
    done, peak = [], costs.Peak
    monkeypatch.setattr(costs, "begin_small", lambda: done.append("given back"))
    monkeypatch.setattr(costs, "Peak", lambda device: done.append("looked") or peak(device))
    monkeypatch.setattr(costs, "EVERY", 0.0)
    meter = costs.Meter(Classifier(small_cnn(), {}))
    for _ in range(2):
        meter.begin()
        meter.each(1)
    assert done == ["given back", "looked", "looked"]


def test_memory_is_absent_where_nothing_can_tell(monkeypatch):
    monkeypatch.setattr(costs.Peak, "bytes", lambda self: None)
    assert set(_each(Classifier(small_cnn(), {}), 1)) == {"seconds", "rows", "device"}


def test_short_batches_share_a_look_at_the_memory(monkeypatch):
    made = []
    monkeypatch.setattr(costs.Peak, "bytes", lambda self: made.append(self) or len(made))
    monkeypatch.setattr(costs, "EVERY", 1e6)
    meter, memories = costs.Meter(Classifier(small_cnn(), {})), []
    for _ in range(3):
        meter.begin()
        memories.append(meter.each(1)["memory"])
    assert len(made) == 1
    assert len(set(memories)) == 1
    monkeypatch.setattr(costs, "EVERY", 0.0)
    meter.begin()
    meter.each(1)
    assert len(made) == 2  # over all that was since the first look


def test_a_gpu_has_its_own_peak(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")

    class OnGpu:
        device, passed = torch.device("cuda", 0), 0

    assert _each(OnGpu(), 4) | {"seconds": 0} == {
        "seconds": 0, "rows": 0, "memory": 5000, "device": "NVIDIA Test"
    }  # fmt: skip
    assert calls == ["reset"]


def test_the_table_has_means_of_seconds_and_rows_and_the_peak_of_memory(root):
    noted(
        root, "iba", seconds=0.5, rows=lambda i: 100 + 2 * i, memory=lambda i: (i + 1) * 2**20, device="CPU, 2 threads"
    )
    table = tables.summary(tables.rows(root))
    row = only(table, method="iba").iloc[0]
    assert (row["seconds"], row["rows"], row["memory"], row["device"]) == (0.5, 119.0, 20 * 2**20, "CPU, 2 threads")
    # A store from before these were noted still reads.
    old = only(table, method="ig").iloc[0]
    assert (old["rows"], old["device"]) == (10.0, "")
    assert math.isnan(old["memory"])
    drawn = formats.long_table(table)
    assert drawn.title.endswith("CPU, 2 threads")
    line = next(line for line in drawn.body if line[0] == "iba")
    assert line[-3:] == ["0.5", "119", "20 MiB"]
    assert next(line for line in drawn.body if line[0] == "ig")[-1] == "–"
    (block,) = formats.wide(table)
    assert block.device == "CPU, 2 threads"
    assert formats.wide_table(block).header[-3:] == list(formats.COSTS)


def test_two_devices_are_both_named(root):
    noted(root, "iba", seconds=0.5, rows=1.0, device=lambda i: "CPU, 2 threads" if i else "NVIDIA X")
    noted(root, "ig", seconds=0.5, rows=1.0, device="NVIDIA X", memory=3 * 2**30)
    table = tables.summary(tables.rows(root))
    for drawn in (formats.long_table(table), formats.wide_table(formats.wide(table)[0])):
        assert drawn.header[-1] == "device"
        cells = {line[0]: line[-1] for line in drawn.body}
        assert cells["ig"] == "NVIDIA X"
        assert set(cells["iba"].split(" + ")) == {"CPU, 2 threads", "NVIDIA X"}
        assert cells["grad_cam"] == "–"
        assert "3.00 GiB" in {line[-2] for line in drawn.body}


def test_costs_are_in_every_format(root, tmp_path, capsys):
    noted(root, "iba", seconds=0.5, rows=12345.0, memory=7 * 2**20, device="CPU, 2 threads")
    for arguments in ([], ["--wide"], ["--format", "md"], ["--format", "tex"]):
        assert tool("table").main([str(root), *arguments]) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("peak memory", "12,345", "7 MiB", "CPU, 2 threads")), arguments
    assert tool("table").main([str(root), "--format", "csv"]) == 0
    assert "seconds,rows,memory,device" in capsys.readouterr().out
    page = report.page(root)
    assert "<th>peak memory</th>" in page
    assert page.count("7 MiB") >= 3  # on top, among the costs, in the whole table
    assert "on CPU, 2 threads" in page


# Ranks --------------------------------------------------------------------------------------------------


def test_ranks_are_of_the_common_samples(root):
    frame = tables.rows(root)
    table = tables.ranks(frame)
    assert set(table["column"]) == {"ehr", "insertion", "deletion"}
    assert set(table["n"]) == {20}
    values = frame[(frame["column"] == "deletion")].pivot(index="uid", columns="contender", values="value")
    expected = values.rank(axis=1).mean()  # lower is better
    found = only(table, column="deletion").set_index("contender")["rank"]
    assert found.to_dict() == pytest.approx(expected.to_dict())
    best = only(table, column="ehr").iloc[0]
    assert (best["contender"], best["group"]) == ("iba", "a")
    assert best["p"] < 0.001
    # One sample of one method less: it is in nobody's rank, and said.
    lost = frame[~((frame["contender"] == "ig") & (frame["uid"] == "val/003") & (frame["column"] == "ehr"))]
    fewer = tables.ranks(lost)
    assert set(only(fewer, column="ehr")["n"]) == {19}
    assert only(fewer, column="ehr").set_index("contender")["n_own"].to_dict() == {"iba": 20, "ig": 19, "grad_cam": 20}
    (drawn,) = formats.rank_tables(fewer)
    assert ["n common", "19 of 20", "20", "20"] in [list(line) for line in drawn.body]


def test_a_method_without_scores_has_no_rank(root):
    frame = tables.rows(root)
    frame = frame.astype({"state": str})
    frame.loc[frame["contender"] == "ig", ["value", "state"]] = [np.nan, "failed"]
    table = only(tables.ranks(frame), column="ehr").set_index("contender")
    assert table.loc["ig", "n_own"] == 0
    assert math.isnan(table.loc["ig", "rank"])
    assert set(table["n"]) == {20}
    (drawn,) = formats.rank_tables(tables.ranks(frame))
    assert [line[1] for line in drawn.body if line[0] == "ig"] == ["–"]
    assert len(tables.ranks(only(frame, contender="iba"))) == 0


def test_ranks_on_the_command_line(root, capsys):
    assert tool("table").main([str(root), "--ranks"]) == 0
    text = capsys.readouterr().out
    assert "Friedman p" in text
    assert "critical difference" in text
    assert "Ranks: photos, net" in text
    assert tool("table").main([str(root), "--ranks", "--format", "md", "--where", "column=ehr"]) == 0
    assert "| rank | ehr |" in capsys.readouterr().out
    assert tool("table").main([str(root), "--ranks", "--format", "csv"]) == 0
    assert "critical_difference" in capsys.readouterr().out.splitlines()[0]
    assert tool("table").main([str(root), "--ranks", "--where", "method=iba"]) == 2
    assert "two methods" in capsys.readouterr().err


def test_ranks_and_effect_sizes_are_in_the_report(root):
    page = report.page(root)
    assert "<summary>Ranks</summary>" in page
    assert "r_rb" in page
    tests = tables.all_paired(tables.rows(root), ["ehr"])
    table = formats.paired_table(tests)
    assert table.header[-2:] == ["d_z", "r_rb"]
    assert all(-1 <= float(line[-1]) <= 1 for line in table.body)
    with pytest.raises(UserError):
        tables.where(tables.rows(root), {"metric": ["nope"]})


def test_memory_is_given_back_only_where_the_process_has_grown(monkeypatch):
    sizes, done = iter([10 * memory.NOTABLE, 2 * memory.NOTABLE, int(2.5 * memory.NOTABLE), 4 * memory.NOTABLE, 0]), []
    monkeypatch.setattr(memory, "_left", 0)
    monkeypatch.setattr(memory, "resident", lambda: next(sizes))
    monkeypatch.setattr(memory, "give_back", lambda: done.append("given back"))
    memory.begin_small()  # 10, and 2 are left
    memory.begin_small()  # 2.5
    assert len(done) == 1
    memory.begin_small()  # 4
    assert len(done) == 2
