"""What must not be lost: curves while a repair is killed, states on disks without links, what is stored today."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from half_done import UIDS, cell
from synthetic import values_of

from attrib import report
from attrib.process.signals import SIGNALS
from attrib.results import tables
from attrib.running.states import _publish, _read
from attrib.store.cell import FORMAT, Arrays, Cell, ScoreRows
from attrib.store.files import write_atomic, write_json
from attrib.store.reading import UnreadableError
from attrib.upkeep import repair
from attrib.upkeep.status import Observer

METRIC = "ehr.11111111"
CALLS = ("replace", "rename", "unlink", "fsync")


def scored(root: Path) -> Path:
    """A cell whose ten samples have rows and curves, in chunks of two."""
    made = cell(root, 10, 0)
    write_json(made.folder / "scores" / METRIC / "metric.json", {"name": "ehr", "curves": {"c": ""}, "columns": {}})
    for i in range(0, 10, 2):
        rows, curves = made.scores(METRIC), made.curves(METRIC)
        for uid in UIDS[i : i + 2]:
            curves.add(uid, "f", {"map/c": np.ones(3, np.float32)})
            rows.add(uid, "f", {("map", "ehr"): 0.5})
        curves.flush()
        rows.flush()
    return made.folder / "scores" / METRIC


def damages(root: Path) -> list[repair.Damage]:
    return [damage for path, check in repair.checks(root) if (damage := check(path)) is not None]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_repair_that_is_killed_anywhere_forgets_no_curve(tmp_path, monkeypatch, unreadable):
    """At every rename, unlink and fsync in turn: a sample whose curves are lost has no rows, so it is scored again."""
    number, ended = 0, False
    while not ended:
        number += 1
        root = tmp_path / str(number)
        folder = scored(root)
        for path in sorted(folder.glob("*.safetensors"))[:3]:
            data = bytearray(path.read_bytes())
            data[20 if unreadable else -1] ^= 255
            path.write_bytes(data)
        left = number

        def counted(call):
            def one(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return call(*arguments, **options)

            return one

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                repair.put_aside(root, damages(root))
                ended = True
            except Killed:
                pass
        repair.put_aside(root, damages(root))
        assert damages(root) == []
        rows, curves = ScoreRows(folder).present(), set(Arrays(folder).index())
        assert rows <= curves, f"killed at call {number}"
        assert len(curves) == (4 if unreadable else 7)
    assert number > 5


def test_rows_without_curves_do_not_count_as_scored(tmp_path):
    folder = scored(tmp_path)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    stages = {stage.name: stage for stage in Observer(tmp_path).look().cells[0].stages}
    assert (stages[METRIC].done, stages[METRIC].todo) == (8, 2)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS])
def test_a_state_is_published_where_links_are_refused(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "01234567.safetensors"
    _publish(path, safetensors.torch.save({"a": torch.ones(2)}))
    assert torch.equal(_read(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_damaged_state_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "01234567.safetensors"
    path.write_bytes(b"damaged")
    unlink = os.unlink

    def watched(one, **options):
        assert Path(one) != path, "for a moment there would be no state"
        unlink(one, **options)

    monkeypatch.setattr(os, "unlink", watched)
    _publish(path, safetensors.torch.save({"a": torch.ones(2)}))
    assert torch.equal(_read(path)["a"], torch.ones(2))


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    order, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("rename"), replace(*a)))
    monkeypatch.setattr(os, "fsync", lambda h: (order.append(os.path.isdir(f"/proc/self/fd/{h}")), sync(h)))
    write_atomic(tmp_path / "a", b"x")
    assert order == [False, "rename", True]


def test_a_hangup_is_a_polite_stop():
    assert "SIGHUP" in {number.name for number in SIGNALS}


def test_a_cell_of_a_later_format_is_refused_and_others_are_shown(tmp_path):
    made = cell(tmp_path)
    path = made.folder / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))
    with pytest.raises(UnreadableError, match=r"spec\.json: format 2, .*take a newer one"):
        Cell(made.folder).spec  # noqa: B018
    assert any("format 2" in line for line in Observer(tmp_path).look().cells[0].broken)


def test_a_work_directory_of_format_1_is_read(tmp_path):
    """tests/stored was written by the version before cells had a format; it is never written anew."""
    root = Path(shutil.copytree(Path(__file__).parent / "stored", tmp_path / "work"))
    broken: list[str] = []
    summary = tables.summary(tables.rows(root, broken)).set_index(["method", "column"])
    assert broken == []
    assert damages(root) == []
    assert summary["n"].tolist() == [3, 3, 3, 3, 3, 3]
    assert summary.loc[("iba", "ehr"), "mean"] == pytest.approx(values_of("iba")[:3, 0].mean())
    made = Cell(root / "photos.net.iba.iba0000")
    assert "format" not in made.spec
    (key, *_) = made.maps.index()
    assert set(made.maps.read(key)) == {"map", "loss"}
    assert made.curves("ehr.11111111").read(key)["map/ehr_curve"].shape == (11,)
    assert [(e["uid"], e["stage"]) for e in made.ledger.entries()] == [("val/001", "ehr.11111111")]
    (status,) = Observer(root, ["iba"]).look().cells
    assert [(stage.done, stage.todo) for stage in status.stages] == [(3, 0)] * 3
    assert "val/000" in report.page(root)
