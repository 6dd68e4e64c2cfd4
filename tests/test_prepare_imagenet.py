"""``attrib prepare-imagenet`` on a validation set of 30 images in five classes."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tiny import tool

from attrib.datasets import ImageNet, ImageTransform
from attrib.datasets.prepare import find_sources, imagenet_classes, prepare, read_meta
from attrib.types import UserError

WNIDS = ["n01440764", "n01443537", "n02123045", "n02123159", "n03124043"]


def wnid(i: int) -> str:
    return WNIDS[(i * 7) % 5]


@pytest.fixture
def full(tmp_path) -> Path:
    """flat/, sorted/, and the three forms of labels."""
    rng = np.random.default_rng(0)
    truth, solution = [], ["ImageId,PredictionString"]
    for i in range(1, 31):
        name = f"ILSVRC2012_val_{i:08d}"
        flat = tmp_path / "flat" / f"{name}.JPEG"
        flat.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(flat)
        folder = tmp_path / "sorted" / wnid(i)
        folder.mkdir(parents=True, exist_ok=True)
        os.link(flat, folder / flat.name)
        truth.append(str(100 - WNIDS.index(wnid(i))))  # ILSVRC ids run another way than the sorted WordNet ids
        solution.append(f"{name},{wnid(i)} 0 0 8 12 {wnid(i)} 4 0 16 6 ")
        annotation = tmp_path / "xml" / "val" / f"{name}.xml"
        annotation.parent.mkdir(parents=True, exist_ok=True)
        annotation.write_text(
            f"<annotation><size><width>16</width><height>12</height></size><object><name>{wnid(i)}</name><bndbox>"
            "<xmin>0</xmin><ymin>0</ymin><xmax>4</xmax><ymax>12</ymax></bndbox></object></annotation>"
        )
    (tmp_path / "truth.txt").write_text("\n".join(truth) + "\n")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(solution) + "\n")
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    rows = [(100 - i, w, 0) for i, w in enumerate(WNIDS)] + [(7, "n00000007", 3)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    return tmp_path


def listing(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_three_forms_of_labels_agree(full):
    flat = full / "flat"
    by_truth = find_sources(flat, full / "truth.txt")  # meta.mat lies beside it
    by_solution = find_sources(flat, full / "LOC_val_solution.csv")
    by_folder = find_sources(full / "sorted", None)
    (full / "synsets.txt").write_text("\n".join(wnid(i) for i in range(1, 31)))
    by_wnid = find_sources(flat, full / "synsets.txt")
    places = [s.place for s in by_truth]
    assert len(places) == 30
    for other in (by_solution, by_folder, by_wnid):
        assert [s.place for s in other] == places
    assert by_solution[0].boxes == ((0, 0, 8, 12), (4, 0, 16, 6))
    assert read_meta(full / "meta.mat")["100"] == WNIDS[0]
    (flat / "ILSVRC2012_val_00000001.JPEG").unlink()
    assert [s.place for s in find_sources(flat, full / "truth.txt")] == places[1:], "lines belong to numbers"


def test_sets_are_disjoint_balanced_and_load(full):
    sources = find_sources(full / "flat", full / "truth.txt", full / "xml")
    target = full / "out"
    report = prepare(sources, target, attribution=5, estimation=12)
    assert (report.sources, report.classes, report.removed) == (30, 5, 0)
    transform = ImageTransform(8)
    attribution, estimation = ImageNet(target, transform), ImageNet(target, transform, split="estimation")
    assert len(attribution.uids) == 5
    assert len(estimation.uids) == 12
    assert not set(attribution.uids) & set(estimation.uids)
    assert set(Counter(u.split("/")[0] for u in attribution.uids).values()) == {1}
    assert set(Counter(u.split("/")[0] for u in estimation.uids).values()) == {2, 3}
    batch = attribution.batch(attribution.uids)
    assert batch.roi.float().mean((1, 2)).tolist() == [0.25] * 5
    index = {w: i for i, (w, _) in imagenet_classes().items()}
    assert batch.target.tolist() == [index[u.split("/")[0]] for u in attribution.uids]
    assert len(index) == 1000
    assert index["n01440764"] == 0


def test_again_is_a_no_op_and_repairs(full):
    sources = find_sources(full / "sorted", None)
    first = prepare(sources, full / "out", attribution=4, estimation=9)
    before = listing(full / "out")
    again = prepare(sources[::-1], full / "out", attribution=4, estimation=9)
    assert (again.written, again.present) == (0, first.written)
    assert listing(full / "out") == before
    next((full / "out" / "images").rglob("*.JPEG")).unlink()
    assert prepare(sources, full / "out", attribution=4, estimation=9).written == 1
    assert listing(full / "out") == before
    prepare(sources, full / "other", attribution=4, estimation=9)
    assert listing(full / "other") == before
    prepare(sources, full / "seed", attribution=4, estimation=9, seed=1)
    assert listing(full / "seed") != before


def test_another_choice_needs_force_and_replaces(full):
    sources = find_sources(full / "flat", full / "LOC_val_solution.csv")
    prepare(sources, full / "out", attribution=4, estimation=9)
    with pytest.raises(UserError, match=r"seed 0, 4 attribution, 9 estimation.*--force"):
        prepare(sources, full / "out", attribution=4, estimation=9, seed=1)
    prepare(sources, full / "out", attribution=6, estimation=3, seed=1, force=True)
    prepare(sources, full / "fresh", attribution=6, estimation=3, seed=1)
    assert listing(full / "out") == listing(full / "fresh")
    dataset = ImageNet(full / "out", ImageTransform(8))
    assert dataset.batch(dataset.uids).roi.float().mean((1, 2)).tolist() == [0.75] * 6, "boxes of the CSV"

    foreign = full / "foreign"
    (foreign / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="did not make it"):
        prepare(sources, foreign, attribution=1, estimation=1)
    prepare(sources, foreign, attribution=1, estimation=1, force=True)


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_links(full, link):
    sources = find_sources(full / "flat", full / "truth.txt")
    prepare(sources, full / "out", attribution=3, estimation=3, link=link)
    for image in (full / "out" / "images").rglob("*.JPEG"):
        assert image.is_symlink() == (link == "symbolic")
        assert image.samefile(full / "flat" / image.name)
    again = prepare(
        find_sources(full / "flat", full / "truth.txt"), full / "out", attribution=3, estimation=3, link=link
    )
    assert again.written == 0
    assert not list((full / "out").rglob(".*"))


def test_names_cannot_leave_the_target(full):
    solution = full / "LOC_val_solution.csv"
    solution.write_text(solution.read_text().replace(wnid(3), "../../n01440764"))
    with pytest.raises(UserError, match="not a name that this tool accepts"):
        find_sources(full / "flat", solution)

    sources = find_sources(full / "sorted", None)
    (full / "out" / "images").mkdir(parents=True)
    (full / "away").mkdir()
    (full / "out" / "images" / "attribution").symlink_to(full / "away")
    with pytest.raises(UserError, match="a link leads away"):
        prepare(sources, full / "out", attribution=3, estimation=3, force=True)
    assert not list((full / "away").iterdir())

    prepare(sources, full / "good", attribution=3, estimation=3)
    plan = json.loads((full / "good" / "prepared.json").read_text())
    victim = full / "victim.JPEG"
    victim.write_bytes(b"")
    plan["attribution"] = ["../../../victim.JPEG"]
    (full / "good" / "prepared.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="not a name"):
        prepare(sources, full / "good", attribution=3, estimation=3, force=True)
    assert victim.exists()


def test_messages(full):
    flat = full / "flat"
    with pytest.raises(UserError, match="flat images"):
        find_sources(flat, None)
    (full / "meta.mat").rename(full / "moved.mat")
    with pytest.raises(UserError, match="--meta must name"):
        find_sources(flat, full / "truth.txt")
    (full / "bad.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"bad\.mat is not the meta\.mat"):
        find_sources(flat, full / "truth.txt", meta=full / "bad.mat")
    (full / "short.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match="has 1 lines"):
        find_sources(flat, full / "short.txt")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        find_sources(flat, full / "gone.txt")
    sources = find_sources(full / "sorted", None)
    with pytest.raises(UserError, match="999 images were asked for, but only 30"):
        prepare(sources, full / "out", attribution=999)
    (full / "classes.json").write_text('{"0": ["n01440764", "tench"]}')
    with pytest.raises(UserError, match=r"n01443537.* not in the class index"):
        prepare(sources, full / "out", attribution=5, estimation=20, classes=full / "classes.json")
    assert not (full / "out").exists()


def test_the_tool_prints_what_it_did(full, capsys):
    main = tool("prepare_imagenet").main
    given = ["--images", str(full / "sorted"), "--target", str(full / "out"), "--attribution", "5", "--estimation", "5"]
    assert main(given) == 0
    assert "30 images of 5 classes found; 11 files written, 0 present" in capsys.readouterr().out
    assert main([*given, "--seed", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
