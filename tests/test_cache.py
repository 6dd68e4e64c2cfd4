"""Looking after a work directory: damage is found and named, what is in use stays, nothing leads out of the root."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from half_done import METRIC, NAME, SPEC, UIDS, cell, run_folder
from PIL import Image
from safetensors.numpy import save_file
from tiny import command, only_cell, pictures, tool

from attrib.store.cell import Arrays, Cell, cells
from attrib.store.damaged import DAMAGED
from attrib.types import UserError
from attrib.upkeep import cache, export, repair

STATE, PICTURES = SPEC["state_key"][:8], f"pictures.{SPEC['pictures']}"


@pytest.fixture
def root(tmp_path) -> Path:
    """A cell with all its maps in two chunks, scores and curves, a state, pictures, neighbours that are not ours."""
    root = tmp_path / "work"
    made = cell(root, 4, 4)
    for uid in UIDS[4:]:
        made.maps.add(uid, "f", {"map": np.full((2, 2), 3, np.float32)}, target=1)
    made.maps.flush()
    curves = made.curves(METRIC)
    for uid in UIDS[:4]:
        curves.add(uid, "f", {"map/c": np.arange(3.0)}, seconds=1.0)
    curves.flush()
    described = {"name": "ehr", "spec": {"class": "EHR", "VERSION": 1}, "columns": {"ehr": "higher"}, "curves": {}}
    (made.folder / "scores" / METRIC / "metric.json").write_text(json.dumps(described))
    state(root, STATE)
    kept = Arrays(root / "state" / PICTURES, "w")
    kept.add("p0", "f", {"image": np.zeros((4, 4, 3), np.uint8)}, name="cat")
    kept.flush()
    (root / "train" / "net").mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    return root


def state(root: Path, key8: str) -> Path:
    (root / "state").mkdir(exist_ok=True)
    save_file({"x": np.ones(3)}, root / "state" / f"{key8}.safetensors")
    (root / "state" / f"{key8}.json").write_text('{"key": "k"}')
    return root / "state" / f"{key8}.safetensors"


def main(*arguments: object) -> int:
    return tool("cache").main([str(a) for a in arguments])


def tree(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.name.endswith(".cache")}


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def chunks(root: Path, folder: str = "maps") -> list[Path]:
    return sorted((root / NAME / folder).glob("*.safetensors"))


def old(path: Path, days: float = 2) -> Path:
    when = time.time() - days * cache.DAY
    os.utime(path, (when, when))
    return path


# list --------------------------------------------------------------------------------------------


def test_list(root, capsys):
    state(root, "99999999")
    (root / NAME / "maps" / ".x.safetensors.12-0123abcd.tmp").write_bytes(b"123")
    assert main("list", root) == 0
    text = capsys.readouterr().out
    assert "10 samples, 10 maps in 2 chunks, 1 metric" in text
    states = [line.split("  ")[-1] for line in text.splitlines() if line.startswith("state")]
    assert states == ["used by no cell", "used by 1 cell"]
    assert "notes.txt" in text
    assert ".x.safetensors.12-0123abcd.tmp" in text
    (root / NAME / "spec.json").write_text("{")
    assert main("list", root) == 0  # also where it says nothing of the states
    assert "it is not known which states" in capsys.readouterr().out


def test_no_work_directory(tmp_path, capsys):
    for command_ in ("list", "verify", "repair", "prune"):
        assert main(command_, tmp_path) == 2
        assert "holds no cells" in capsys.readouterr().err
    assert main("list", tmp_path / "none") == 2
    assert main("export", tmp_path, tmp_path / "out") == 2


# verify, repair ----------------------------------------------------------------------------------


def test_verify_names_what_is_damaged(root, capsys):
    assert main("verify", root) == 0
    first, second = chunks(root)
    flip(first)  # a value
    second.write_bytes(second.read_bytes()[:-3])  # cut short: its list is whole
    flip(next((root / NAME / "scores" / METRIC).glob("*.parquet")), 8)
    flip(root / "state" / f"{STATE}.safetensors", 0)
    (root / NAME / "samples.json").write_text("3")
    assert main("verify", root) == 1
    found = {d.path: d for d in repair_damages(root)}
    assert len(found) == 5
    assert {uid for uid, _ in found[first].samples} == set(UIDS[:4])
    assert "wrong checksum of map of p" in found[first].problem
    assert {uid for uid, _ in found[second].samples} == set(UIDS[4:])
    text = capsys.readouterr().out
    assert "held 4 samples: p0, p1, p2, p3" in text
    assert "5 damaged" in text


def repair_damages(root: Path) -> list[repair.Damage]:
    return [damage for path, check in repair.checks(root) if (damage := check(path)) is not None]


@pytest.mark.parametrize("content", [b"", b"\x00", b"x" * 100, b"\xff" * 16, (2).to_bytes(8, "little") + b"[]"])
def test_no_chunk_at_all(root, content):
    chunks(root)[0].write_bytes(content)
    next((root / NAME / "scores" / METRIC).glob("*.parquet")).write_bytes(content)
    found = repair_damages(root)
    assert [d.samples for d in found] == [None, None]


def test_every_flipped_byte_of_a_chunk_is_found(root):
    """Or it is in the gaps that nobody reads: then the arrays are as they were."""
    path = chunks(root)[0]
    whole = path.read_bytes()
    before = {key: Arrays(path.parent).read(key) for key in Arrays(path.parent).index()}
    (path.parent / "index.cache").unlink(missing_ok=True)
    for at in range(0, len(whole), 7):
        flip(path, at)
        if repair.chunk(path) is None:
            stored = Arrays(path.parent)
            for key in set(before) & set(stored.index()):
                np.testing.assert_array_equal(stored.read(key)["map"], before[key]["map"])
        path.write_bytes(whole)


def test_repair_moves_damage_away_and_the_next_run_finds_the_rest(root, capsys):
    first = chunks(root)[0]
    flip(first)
    assert main("repair", root, "--dry") == 1
    assert first.exists()
    assert main("repair", root, "--yes") == 0
    assert "moved to .damaged" in capsys.readouterr().out
    assert not first.exists()
    (moved,) = (root / DAMAGED).glob(f"*/{NAME}/maps/*.safetensors")
    assert moved.name == first.name
    after = Cell(root / NAME).maps
    assert len(after.index()) == 9  # the one with the wrong byte is gone, the others of its chunk are saved
    assert {(uid, "f") for uid in UIDS[4:]} < set(after.index())
    assert all(after.index()[uid, "f"].info == {"seconds": 2.0} for uid, _ in after.index() if uid in UIDS[:4])
    assert main("verify", root) == 0
    assert [c.folder.name for c in cells(root)] == [NAME]


@pytest.mark.parametrize("target", ["spec.json", "/dev/zero", "/nowhere"])
@pytest.mark.parametrize("delete", [False, True])
def test_a_damaged_file_that_is_a_link_goes_as_a_link(root, target, delete, tmp_path):
    """What it leads to stays, and one link does not keep the others from being repaired."""
    for name in ("spec.json", "maps/z.safetensors"):
        (root / NAME / name).unlink(missing_ok=True)
        (root / NAME / name).symlink_to(target)
    assert main("repair", root, "--yes", *(["--delete"] if delete else [])) == 0
    assert not any(os.path.lexists(root / NAME / name) for name in ("spec.json", "maps/z.safetensors"))


def test_a_folder_in_the_place_of_an_index_makes_way(root):
    index = root / NAME / "maps" / "index.cache"
    index.unlink(missing_ok=True)
    index.mkdir()
    assert main("repair", root, "--yes") == 0
    assert index.is_file()


def test_what_others_put_beside_the_states_is_not_repaired(root):
    """Nor a file of confidences that is empty because no sample could be read."""
    (root / "state" / "notes.json").write_text("[1]")
    (root / "state" / "mine.safetensors").write_text("mine")
    (root / "state" / "77777777.safetensors").mkdir()
    (root / "state" / "confidence.01234567.json").write_text("{}")
    before = tree(root)
    assert main("repair", root, "--yes", "--delete") == 0
    assert tree(root) == before
    (root / "state" / "confidence.01234567.json").write_text("[")
    assert [damage.path.name for damage in repair_damages(root)] == ["confidence.01234567.json"]


def test_repair_asks_first(root, monkeypatch):
    flip(chunks(root)[0])
    before = tree(root)
    for answer in ("", "n\n", "yes please\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert main("repair", root) == 1
    assert tree(root) == before
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main("repair", root, "--delete") == 0
    assert len(Cell(root / NAME).maps.index()) == 9
    assert not any((root / DAMAGED).iterdir())


@pytest.mark.parametrize("readable", [True, False])
def test_lost_curves_take_their_scores_along(root, readable):
    """A run takes a sample with rows for one that has its curves too."""
    made = Cell(root / NAME, "20260101-000001-1-0-bbbb")
    rows, curves = made.scores(METRIC), made.curves(METRIC)
    rows.add("p5", "f", {("map", "ehr"): 0.25})
    curves.add("p5", "f", {"map/c": np.zeros(3)})
    rows.flush()
    curves.flush()
    first = chunks(root, f"scores/{METRIC}")[0]  # p0 .. p3
    if readable:
        flip(first)
    else:
        first.write_bytes(b"nothing")
    assert main("repair", root, "--yes") == 0
    assert len(made.scores(METRIC).present()) == (4 if readable else 1)
    assert set(made.curves(METRIC).index()) == made.scores(METRIC).present()


def test_repair_removes_what_dead_writers_left(root):
    young = root / NAME / "maps" / ".x.safetensors.12-0123abcd.tmp"
    young.write_bytes(b"1")
    dead = [old(_touched(root / NAME / "scores" / METRIC / ".y.parquet.7-0123abcd.tmp")),
            old(_touched(root / "state" / f".{STATE}.safetensors.0123456789abcdef.tmp"))]  # fmt: skip
    others = [old(_touched(root / ".hidden.tmp")), old(_touched(root / "train" / "x.tmp"))]
    assert main("repair", root, "--yes") == 0
    assert not any(path.exists() for path in dead)
    assert young.exists()
    assert all(path.exists() for path in others)


def _touched(path: Path) -> Path:
    path.write_bytes(b"1")
    return path


def test_repair_makes_a_new_index(root):
    folder = root / NAME / "maps"
    assert main("repair", root, "--yes") == 0
    (folder / "index.cache").write_bytes(b"nonsense")
    assert main("repair", root, "--yes") == 0
    assert len(Arrays(folder).index()) == 10


def test_a_repaired_run_computes_exactly_what_was_lost(monkeypatch, capfd, tmp_path):
    run = command(capfd)
    images, root = pictures(tmp_path), tmp_path / "work"
    what = ("dataset=tiny", "model=small_cnn", "method=gradient", "metric=[insertion_deletion]")
    how = ("run.progress=false", "metric.insertion_deletion.steps=4", f"dataset.root={images}", f"run.root={root}")
    arguments = (*what, *how, "run.batch=1")
    run(*arguments, "run.limit=4")
    run(*arguments)
    made = only_cell(root)
    whole = {key: made.maps.read(key)["map"] for key in made.maps.index()}
    flip(sorted((made.folder / "maps").glob("*.safetensors"))[1])  # one of its two maps
    flip(sorted((made.folder / "scores" / made.metrics()[0]).glob("*.safetensors"))[0])  # one of its four curves
    assert main("repair", root, "--yes") == 0
    result = run(*arguments)
    assert "maps_computed=1 maps_present=5 scores_computed=1 scores_present=5 failed=0" in result.out
    after = Cell(made.folder)
    assert {key: after.maps.read(key)["map"].tobytes() for key in after.maps.index()} == {
        key: value.tobytes() for key, value in whole.items()
    }


# prune -------------------------------------------------------------------------------------------


def test_prune_deletes_only_what_nobody_refers_to(root, capsys):
    before = tree(root)
    lost = state(root, "99999999")
    (root / "state" / "88888888.partial.safetensors").write_bytes(b"1")  # of today
    old(_touched(root / "state" / "77777777.partial.safetensors"))
    old(_touched(root / "state" / "confidence.66666666.json"))
    (root / "state" / "pictures.55555555").mkdir()
    (root / "state" / "fingerprints").mkdir()
    (root / "state" / "foreign.txt").write_text("mine")
    orphan = cell(root, name="photos.net.gone.76543210")
    (orphan.folder / "spec.json").unlink()
    middle = tree(root)
    assert main("prune", root, "--dry") == 0
    assert tree(root) == middle
    # The cell's spec has no configuration, so nobody knows whether it selects by confidence.
    assert main("prune", root, "--yes") == 0
    after = tree(root)
    assert after - before == {
        "state/88888888.partial.safetensors",
        "state/confidence.66666666.json",
        "state/fingerprints",
        "state/foreign.txt",
    }
    assert before <= after
    assert not lost.exists()
    assert "used by no cell" in capsys.readouterr().out


@pytest.mark.parametrize(("least", "stays"), [(None, False), (0.6, True)])
def test_confidences(root, least, stays):
    spec = {**SPEC, "config": {"dataset": {"select": {"min_confidence": least}}}}
    (root / NAME / "spec.json").write_text(json.dumps(spec))
    path = _touched(root / "state" / "confidence.66666666.json")
    assert main("prune", root, "--yes") == 0
    assert path.exists() is stays


def test_a_state_that_graphs_were_drawn_from_stays(root):
    path = state(root, "99999999")
    (root / "graphs" / "cifar.net.99999999").mkdir(parents=True)
    assert main("prune", root, "--yes") == 0
    assert path.exists()


def test_prune_asks_first(root, monkeypatch):
    path = state(root, "99999999")
    for answer in ("", "\n", "no\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert main("prune", root) == 0
        assert path.exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main("prune", root) == 0
    assert not path.exists()


def test_prune_looks_again_after_the_answer(root, monkeypatch):
    """While somebody thinks about it, a cell comes that needs the state; or a worker."""
    path = state(root, "99999999")
    module = tool("cache")

    def comes(question, args):
        made = cell(root, name="photos.net.new.11111111")
        (made.folder / "spec.json").write_text(json.dumps({**SPEC, "state_key": "9" * 64}))
        return True

    monkeypatch.setattr(module, "ask", comes)
    assert module.main(["prune", str(root)]) == 0
    assert path.exists()
    path = state(root, "abcdef12")

    def works(question, args):
        run_folder(Cell(root / NAME))
        return True

    monkeypatch.setattr(module, "ask", works)
    assert module.main(["prune", str(root)]) == 2
    assert path.exists()


@pytest.mark.parametrize("command_", ["prune", "repair"])
def test_nothing_is_touched_while_a_worker_lives(root, capsys, command_):
    path = state(root, "99999999")
    flip(chunks(root)[0])
    folder = run_folder(Cell(root / NAME))
    assert main(command_, root, "--yes") == 2
    assert "is being worked on (far, pid 4242" in capsys.readouterr().err
    for file in folder.iterdir():
        old(file)
    assert main(command_, root, "--yes") == 0
    assert path.exists() is (command_ == "repair")


def test_a_spec_that_cannot_be_read_protects_all_states(root, capsys):
    path = state(root, "99999999")
    (root / NAME / "spec.json").write_text("{}")
    assert main("prune", root, "--yes") == 2
    assert "it is not known which states it needs" in capsys.readouterr().err
    assert path.exists()


def test_a_cell_whose_spec_was_damaged_is_not_taken_for_a_leftover(root, capsys):
    (root / NAME / "spec.json").write_text("{")
    assert main("repair", root, "--yes") == 0
    assert not (root / NAME / "spec.json").exists()
    assert main("prune", root, "--yes") == 0
    assert "its spec.json was damaged" in capsys.readouterr().out
    assert len(Cell(root / NAME).maps.index()) == 10


def test_links_are_not_followed(root, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.safetensors").write_text("1")
    orphan = root / "photos.net.gone.76543210"
    (orphan / "maps").mkdir(parents=True)
    (orphan / "maps" / "x.safetensors").symlink_to(outside / "precious.safetensors")
    (root / "photos.net.linked.00000001").symlink_to(outside)
    (root / "state" / "pictures.55555555").symlink_to(outside)
    (root / "state" / "99999999.safetensors").symlink_to(outside / "precious.safetensors")
    before = tree(root)
    assert main("prune", root, "--yes") == 0
    assert tree(root) == before
    assert (outside / "precious.safetensors").read_text() == "1"
    text = capsys.readouterr().out
    assert "holds maps/x.safetensors, which attrib did not write" in text.replace("photos.net.gone.76543210/", "")
    assert text.count("kept:") == 4


def test_scores_of_a_cell_elsewhere_are_left_alone(root, tmp_path, capsys):
    """The others go all the same."""
    shutil.copytree(root / NAME, tmp_path / "scratch")
    (root / "photos.net.a.00000001").symlink_to(tmp_path / "scratch")
    assert main("prune", root, "--yes", "--scores", "ehr.*") == 0
    assert (tmp_path / "scratch" / "scores" / METRIC / "metric.json").exists()
    assert not (root / NAME / "scores" / METRIC).exists()
    assert "is a link" in capsys.readouterr().out


def test_a_state_folder_elsewhere_is_left_alone(root, tmp_path):
    state(root, "99999999")
    shutil.move(root / "state", tmp_path / "scratch")
    (root / "state").symlink_to(tmp_path / "scratch")
    assert main("prune", root, "--yes") == 0
    assert (tmp_path / "scratch" / "99999999.safetensors").exists()


def test_remove_does_not_leave_the_root(root, tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (root / "way").symlink_to(outside)
    for path in (
        outside,
        root / ".." / "outside",
        root / "way" / "deep",
        root / "way",
        root,
        root / "state" / ".." / "..",
    ):
        with pytest.raises(UserError, match="is not reached within"):
            cache.remove(root, path)
    assert (outside / "deep").is_dir()


@pytest.mark.parametrize("strange", ["notes.txt", "maps/notes.txt", "scores/ehr.aaaaaaaa/thesis.tex", "tree/data.csv"])
def test_a_folder_with_something_of_others_stays(root, strange):
    orphan = cell(root, name="photos.net.gone.76543210")
    (orphan.folder / "spec.json").unlink()
    path = orphan.folder / strange
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert main("prune", root, "--yes") == 0
    assert path.read_text() == "mine"
    assert (orphan.folder / "samples.json").exists()
    path.unlink()
    assert main("prune", root, "--yes") == 0
    assert not orphan.folder.exists()


@pytest.mark.parametrize(
    "place", ["state/pictures.55555555", f"{NAME}/scores/own.dddddddd", "state/99999999.safetensors"]
)
def test_notes_between_our_files_stay(root, place):
    (root / place).mkdir()
    (root / place / "notes.txt").write_text("mine")
    assert main("prune", root, "--yes", "--scores", "own.*") == 0
    assert (root / place / "notes.txt").read_text() == "mine"


def test_old_versions_of_a_metric(root):
    for name, described in {
        "ehr.bbbbbbbb": {"class": "EHR", "VERSION": 2},
        "ehr.cccccccc": {"class": "EHR", "VERSION": 1, "steps": 5},  # another metric, though of one class
        "own.dddddddd": {"class": "own"},
    }.items():
        folder = root / NAME / "scores" / name
        folder.mkdir()
        (folder / "metric.json").write_text(json.dumps({"name": "ehr", "spec": described}))
    assert main("prune", root, "--yes") == 0
    assert len(Cell(root / NAME).metrics()) == 4
    assert main("prune", root, "--yes", "--old-versions") == 0
    assert Cell(root / NAME).metrics() == ["ehr.bbbbbbbb", "ehr.cccccccc", "own.dddddddd"]
    assert main("prune", root, "--yes", "--scores", "ehr.*") == 0
    assert Cell(root / NAME).metrics() == ["own.dddddddd"]


def test_maps_of_samples_that_went(root, capsys):
    made = Cell(root / NAME)
    before = {key: (made.maps.read(key)["map"].tobytes(), dict(r.info)) for key, r in made.maps.index().items()}
    made.write_samples(("p0", "p1", "p2", "p3", "p9"), {"p1": "changed"})
    assert main("prune", root, "--yes") == 0
    assert len(Cell(root / NAME).maps.index()) == 10
    assert main("prune", root, "--yes", "--samples") == 0
    assert "6 maps dropped" in capsys.readouterr().out
    after = Cell(root / NAME).maps
    assert {key: (after.read(key)["map"].tobytes(), dict(r.info)) for key, r in after.index().items()} == {
        key: value for key, value in before.items() if key[0] in ("p0", "p2", "p3", "p9")
    }
    assert main("verify", root) == 0
    (root / NAME / "samples.json").unlink()
    assert main("prune", root, "--yes", "--samples") == 0  # it does not say: all counts
    assert len(Cell(root / NAME).maps.index()) == 4


# export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "npz", "png"])
def test_export(root, tmp_path, kind, capsys):
    out = tmp_path / "out"
    assert main("export", root, out, "--format", kind, "--uid", "p0", "p?5", "p9") == 0
    folder = out / NAME if kind == "npz" else out / NAME / "map"
    assert sorted(p.name for p in folder.iterdir()) == [f"p0.{kind}", f"p9.{kind}"]
    if kind == "npy":
        np.testing.assert_array_equal(np.load(folder / "p9.npy"), np.full((2, 2), 3, np.float32))
    elif kind == "npz":
        with np.load(folder / "p9.npz") as found:
            np.testing.assert_array_equal(found["map"], np.full((2, 2), 3, np.float32))
    else:
        with Image.open(folder / "p0.png") as over, Image.open(folder / "p9.png") as bare:
            assert (over.size, bare.size) == ((4, 4), (2, 2))  # over its input; alone
        assert "(1 without the input" in capsys.readouterr().out


def test_export_does_not_overwrite(root, tmp_path, capsys):
    path = tmp_path / "out" / NAME / "map" / "p3.npy"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert main("export", root, tmp_path / "out", "--format", "npy") == 2
    assert "--force" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["p3.npy"]
    assert path.read_text() == "mine"
    assert main("export", root, tmp_path / "out", "--format", "npy", "--force") == 0
    assert np.load(path).shape == (2, 2)


def test_export_stays_in_its_folder(tmp_path):
    odd = ("../../x", "/etc/passwd", "..", "a/../../b", "nul\0", "x" * 300, "a//b", "\u202e/ü")
    made = Cell(tmp_path / "work" / NAME, "w")
    made.write_spec(SPEC)
    for i, uid in enumerate(odd):
        made.maps.add(uid, "f", {"map": np.full((2, 2), i, np.float32), "../up": np.zeros((2, 2))})
    made.maps.flush()
    out = tmp_path / "deep" / "out"
    for kind in ("npy", "npz", "png"):
        done = export.export(tmp_path / "work", out, kind)
        assert (done.files, done.skipped) == (len(odd), [])
    done = export.export(tmp_path / "work", out, "npy", maps=["../up"])
    assert done.files == len(odd)
    assert {p.name for p in tmp_path.iterdir()} == {"work", "deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"out"}
    assert {p.name for p in out.iterdir()} == {NAME}
    assert len(list(out.rglob("*.npy"))) == 2 * len(odd)


def test_two_long_names_that_begin_alike_are_two_files(tmp_path, capsys):
    made = Cell(tmp_path / "work" / NAME, "w")
    made.write_spec(SPEC)
    for uid in ("x" * 250, "x" * 260):
        made.maps.add(uid, "f", {"map": np.ones((2, 2))})
    made.maps.flush()
    assert main("export", tmp_path / "work", tmp_path / "out", "--format", "npy") == 0
    assert "2 files" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 2


def test_export_says_what_is_not_there(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert main("export", root, out, "--cell", "grad_cam") == 2
    assert main("export", root, out, "--map", "none") == 2
    assert main("export", root, out, "--uid", "none") == 2
    assert not out.exists()
    flip(chunks(root)[0])
    assert main("export", root, out, "--format", "npy") == 1
    assert "damaged" in capsys.readouterr().out
    assert len(list(out.rglob("*.npy"))) >= 6


def test_texts_become_pages(tmp_path):
    made = Cell(tmp_path / "work" / NAME, "w")
    made.write_spec({**SPEC, "modality": "text"})
    made.maps.add("a", "f", {"map": np.array([0.0, 1.0], np.float32)})
    made.maps.add("b", "f", {"map": np.array([0.0], np.float32)})
    made.maps.flush()
    kept = Arrays(tmp_path / "work" / "state" / PICTURES, "w")
    kept.add("a", "f", {"words": np.array([0, 1])}, tokens=["<b>", "fine"])
    kept.flush()
    done = export.export(tmp_path / "work", tmp_path / "out")
    assert done.files == 1
    assert "its input is not kept" in done.skipped[0]
    page = (tmp_path / "out" / NAME / "map" / "a.html").read_text()
    assert "&lt;b&gt;" in page
    assert "fine" in page


def test_what_a_chunk_says_of_its_samples_has_a_checksum_too(root):
    path = sorted((root / NAME / "maps").glob("*.safetensors"))[0]
    data, said = path.read_bytes(), b'fingerprint\\": \\"f'
    assert said in data
    path.write_bytes(data.replace(said, said[:-1] + b"g", 1))
    damage = repair.chunk(path)
    assert damage.problem == "wrong checksum of what it says of its samples"
    assert damage.samples
