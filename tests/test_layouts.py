"""Layouts in which people have ImageNet and the small sets, and ``dataset=auto``, which looks."""

from __future__ import annotations

import shutil
from pathlib import Path

import hydra.utils
import numpy as np
import pytest
import test_cars
import test_cifar
import test_datasets
import test_idx
import test_object_sets
import test_shards
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_cifar_pickle import python_version
from tiny import ROOT, command, save

from attrib.datasets import (
    MNIST,
    STL10,
    FashionMNIST,
    ImageFolder,
    ImageTransform,
    KaggleImageNet,
    Selection,
    found_images,
)
from attrib.datasets.found import LAST, LAYOUTS, fitting
from attrib.types import SampleError, UserError

# pycocotools 2.0.11 beside numpy 2; Python does not show this warning to users.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SMALL = ImageTransform(16)
AS_IS = ImageTransform((14, 20), resize="none")
TENCH, GOLDFISH = "n01440764", "n01443537"  # ImageNet's classes 0 and 1


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# ImageNet ---------------------------------------------------------------------------------------


def kaggle(root: Path, rows: tuple[str, ...] | None = None, annotations: bool = True) -> Path:
    for i in (1, 2, 3):
        save(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", i)
    default = (
        f"ILSVRC2012_val_00000003,{GOLDFISH} 0 0 5 5 {TENCH} 1 1 3 3 {GOLDFISH} 10 2 14 6 ",
        f"ILSVRC2012_val_00000001,{TENCH} 2 3 8 9 ",
        f"ILSVRC2012_val_00000002,{TENCH} 0 0 20 14 ",
        f"ILSVRC2012_val_00000099,{TENCH} 0 0 20 14 ",
    )
    write(root / "LOC_val_solution.csv", "ImageId,PredictionString", *(default if rows is None else rows))
    if annotations:
        text = test_datasets.voc((TENCH, (4, 4, 8, 8)), (GOLDFISH, (0, 0, 1, 1)), size=(40, 28))
        write(root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000002.xml", text)
    return root


def test_kaggles_layout(tmp_path):
    dataset = KaggleImageNet(str(kaggle(tmp_path)), AS_IS)
    assert dataset.uids == tuple(f"ILSVRC2012_val_{i:08d}" for i in (1, 2, 3))
    batch = dataset.batch(dataset.uids)
    assert batch.target.tolist() == [0, 0, 1]
    assert dataset.names[0].startswith("tench")
    expected = torch.zeros(3, 14, 20, dtype=torch.bool)
    expected[0, 3:9, 2:8] = True
    expected[1, 2:4, 2:4] = True  # of the annotation, which is of an image twice as large
    expected[2, 0:5, 0:5] = expected[2, 2:6, 10:14] = True  # of the label's class only
    assert torch.equal(batch.roi, expected)
    assert KaggleImageNet(str(tmp_path / "ILSVRC"), AS_IS).uids == dataset.uids


def test_a_bad_row_of_the_solution_costs_its_image_the_label(tmp_path):
    one = f"ILSVRC2012_val_00000001,{TENCH} 0 0 5 5"
    rows = (one, f"ILSVRC2012_val_00000002,{TENCH} 0 0 5 5", f"ILSVRC2012_val_00000002,{GOLDFISH} 0 0 5 5")
    dataset = KaggleImageNet(str(kaggle(tmp_path, rows)), AS_IS)
    assert dataset.batch(dataset.uids).target.tolist() == [0, -1, -1]
    assert "line 4: a second row" in dataset.label_problems["ILSVRC2012_val_00000002"]
    assert "has no row for it" in dataset.label_problems["ILSVRC2012_val_00000003"]
    for row in ("n99999999 0 0 5 5", f"{TENCH} 0 0 5", "", f"{TENCH} 5 0 0 5"):
        dataset = KaggleImageNet(str(kaggle(tmp_path, (one, f"ILSVRC2012_val_00000002,{row}"))), AS_IS)
        assert "line 3" in dataset.label_problems["ILSVRC2012_val_00000002"]
    with pytest.raises(UserError, match="has no row for it"):
        KaggleImageNet(str(kaggle(tmp_path, ())), AS_IS)
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"there is no .*LOC_val_solution\.csv, which has the labels"):
        KaggleImageNet(str(tmp_path), AS_IS)
    write(tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml", "<a")
    kaggle(tmp_path, (one,))
    with pytest.raises(SampleError, match="cannot be read as a VOC annotation"):
        KaggleImageNet(str(tmp_path), AS_IS).batch(["ILSVRC2012_val_00000001"])


def test_kaggles_training_images_are_in_folders(tmp_path):
    save(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train" / GOLDFISH / f"{GOLDFISH}_1.JPEG")
    dataset = KaggleImageNet(str(tmp_path), AS_IS, "train")
    assert dataset.batch([f"{GOLDFISH}/{GOLDFISH}_1"]).target.tolist() == [1]


def torchvision(root: Path) -> Path:
    for wnid in (GOLDFISH, TENCH):
        save(root / "val" / wnid / "ILSVRC2012_val_00000001.JPEG")
        save(root / "train" / wnid / f"{wnid}_10.JPEG")
    (root / "ILSVRC2012_img_val.tar").write_bytes(b"the archive that torchvision unpacked")
    return root


def test_torchvisions_folder_has_imagenets_indices(tmp_path):
    torchvision(tmp_path)
    dataset = ImageFolder(str(tmp_path / "val"), SMALL, classes="imagenet")
    assert {u: dataset.label(u) for u in dataset.uids} == {
        f"{TENCH}/ILSVRC2012_val_00000001": 0, f"{GOLDFISH}/ILSVRC2012_val_00000001": 1,
    }  # fmt: skip
    assert found_images(str(tmp_path), SMALL).key == dataset.key
    assert found_images(str(tmp_path), SMALL, split="train").uids[0] == f"{TENCH}/{TENCH}_10"
    assert found_images(str(tmp_path / "val"), SMALL).uids == dataset.uids
    with pytest.raises(UserError, match="holds the WordNet ids themselves; it has no split val"):
        found_images(str(tmp_path / "val"), SMALL, split="val")


# Small sets as torchvision leaves them -----------------------------------------------------------


def stl(root: Path) -> Path:
    top = root / "stl10_binary"
    top.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 5_000), ("test", 8_000)):
        with open(top / f"{part}_X.bin", "wb") as file:
            file.write(rng.integers(0, 256, 2 * 27_648, dtype=np.uint8).tobytes())
            file.truncate(count * 27_648)
        (np.arange(count) % 10 + 1).astype(np.uint8).tofile(top / f"{part}_y.bin")
    write(top / "class_names.txt", *(f"class{i}" for i in range(10)))
    return root


def test_stl10(tmp_path):
    dataset = STL10(str(stl(tmp_path)), ImageTransform(96, resize="none"))
    assert len(dataset.uids) == 8_000
    planes = np.fromfile(tmp_path / "stl10_binary" / "test_X.bin", np.uint8, 2 * 27_648).reshape(2, 3, 96, 96)
    for i, uid in enumerate(("test/00000", "test/00001")):
        # torchvision: np.transpose(images, (0, 1, 3, 2)), then channels last
        assert np.array_equal(dataset.picture(uid), planes[i].transpose(0, 2, 1).transpose(1, 2, 0))
    assert dataset.batch(["test/00000", "test/00019"]).target.tolist() == [0, 9]
    assert dataset.names[9] == "class9"
    train, val = (STL10(str(tmp_path / "stl10_binary"), SMALL, split) for split in ("train", "val"))
    assert len(train.uids) + len(val.uids) == 5_000
    labels = tmp_path / "stl10_binary" / "test_y.bin"
    labels.write_bytes(b"\x01" * 7_999 + b"\x0b")
    with pytest.raises(UserError, match=r"test_y\.bin: label 11 of image 7999, not 1 to 10"):
        STL10(str(tmp_path), SMALL)
    labels.write_bytes(b"\x01" * 7_999)
    with pytest.raises(UserError, match=r"test_y\.bin has 7,999 bytes, not 8,000: it is cut short"):
        STL10(str(tmp_path), SMALL)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_mnist_where_torchvision_leaves_it(tmp_path, kind):
    test_idx.write_set(tmp_path / kind.__name__ / "raw")
    above, itself = kind(str(tmp_path), SMALL), kind(str(tmp_path / kind.__name__ / "raw"), SMALL)
    assert above.uids == itself.uids
    assert above.fingerprint(above.uids[0]) == itself.fingerprint(itself.uids[0])


# dataset=auto -----------------------------------------------------------------------------------


def plain(root: Path) -> Path:
    save(root / "cat" / "a.png")
    save(root / "dog" / "b.png")
    return root


def cifar_python(root: Path) -> Path:
    python_version(test_cifar.write_set(root.parent / "binary", train=True), root / "cifar-10-batches-py")
    return root


def cifar100(root: Path) -> Path:
    root.mkdir()
    for name, count in (("train", 50_000), ("test", 10_000)):
        with open(root / f"{name}.bin", "wb") as file:
            file.truncate(count * 3074)
    for kind, count in (("fine", 100), ("coarse", 20)):
        write(root / f"{kind}_label_names.txt", *(f"c{i}" for i in range(count)))
    return root


def boxed(root: Path) -> Path:
    for i in range(3):
        save(root / "images" / f"{i}.png", i)
    write(root / "labels.csv", "file,label", *(f"{i}.png,{i}" for i in range(3)))
    write(root / "boxes.csv", "file,x1,y1,x2,y2", "0.png,1,1,4,4", "2.png,2,2,8,8")
    return root


WRITE = {
    "imagenet": test_datasets.imagenet,
    "imagenet_kaggle": kaggle,
    "image_folder with dataset.classes=imagenet": torchvision,
    "imagenet_s": lambda root: (test_object_sets.imagenet_s(root), root)[1],
    "voc": lambda root: (test_object_sets.voc(root), root)[1],
    "coco": test_object_sets.coco,
    "cub200": test_object_sets.cub,
    "cars": test_cars.write_set,
    "cifar10": cifar_python,
    "cifar100": cifar100,
    "mnist": lambda root: (test_idx.write_set(root / "MNIST" / "raw"), root)[1],
    "fashion_mnist": lambda root: (test_idx.write_set(root / "FashionMNIST" / "raw"), root)[1],
    "stl10": stl,
    "parquet": test_shards.parquet,
    "arrow": test_shards.arrow,
    "webdataset": test_shards.web,
    "image_folder": plain,
    "boxed_images": boxed,
}


@pytest.mark.parametrize("name", WRITE)
def test_each_layout_is_found_and_said(name, tmp_path, caplog):
    root = tmp_path / "data"
    written = WRITE[name](root)
    root = written if isinstance(written, Path) else root
    caplog.set_level("INFO")
    assert [layout.name for layout in fitting(root)] == [name]
    dataset = found_images(str(root), SMALL)
    assert f"{root}: dataset={name} (" in caplog.text
    assert dataset.batch(dataset.uids[:2]).x.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("name", sorted(name for name in test_datasets.ELSEWHERE if not name.endswith("_all")))
def test_presets(name, tmp_path):
    """They compose with a net and build, and so does their estimation set, of which some need another split."""
    root = tmp_path / "data"
    written = WRITE["webdataset" if name == "auto" else name](root)
    root = written if isinstance(written, Path) else root
    if name == "imagenet_s":
        for part in ("", "-segmentation"):
            shutil.copytree(root / f"validation{part}", root / f"train-semi{part}")
    if name == "voc":
        for folder in ("Segmentation", "Main"):
            lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / folder
            (lists / "train.txt").write_text((lists / "val.txt").read_text())
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "run", [f"dataset={name}", "model=lenet", f"dataset.root={root}", f"run.root={tmp_path / 'w'}"]
        )
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["dataset"]
    assert (node.pop("name"), node.pop("target")) == (name, "label")
    assert node.get("index", str(tmp_path / "w")) == str(tmp_path / "w")
    assert hydra.utils.instantiate(node.pop("select")) == Selection()
    estimation = node.pop("estimation")
    assert estimation.pop("select") == {"count": 500}
    for part in (node, estimation):
        made = hydra.utils.instantiate(part)
        batch = made.batch(made.uids[:1])
        assert batch.x.shape == (1, 1, 32, 32)
        assert (batch.roi is not None) == (name in ("coco", "cub200", "imagenet_kaggle", "imagenet_s", "voc"))


def test_every_layout_is_tried():
    assert {layout.name for layout in (*LAYOUTS, *LAST)} == WRITE.keys()


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("below", ["", "images"])
def test_boxed_images_are_those_of_the_preset(below, index, tmp_path):
    """By the folder of images as by the one above it, with and without a table of the classes' names."""
    root = boxed(tmp_path / "data")
    if index:
        rows = [f"{i},n0000000{i},{c}" for i, c in enumerate("abc")]
        write(root / "imagenet_class_index.csv", "label,wnid,name", *rows)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        given = [] if index else ["dataset.classes=null"]
        config = compose("run", ["dataset=boxed_images", "model=lenet", f"dataset.root={root / 'images'}", *given])
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["dataset"]
    for name in ("_target_", "_convert_", "name", "target", "select", "estimation", "transform"):
        node.pop(name)
    named = ImageFolder(**node, transform=SMALL)
    found = found_images(str(root / below), SMALL)
    assert found.key == named.key
    assert [found.fingerprint(uid) for uid in found.uids] == [named.fingerprint(uid) for uid in named.uids]
    assert found.batch(found.uids).roi.flatten(1).any(1).tolist() == [True, False, True]
    with pytest.raises(UserError, match="have no split test"):
        found_images(str(root / below), SMALL, split="test")


def test_nothing_and_two_are_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no known layout fits; name one yourself.*dataset=voc: JPEG.*\*\.tar"):
        found_images(str(tmp_path), SMALL)
    test_idx.write_set(tmp_path / "idx")
    with pytest.raises(UserError, match=r"(?s)2 known layouts fit; .*=mnist: .*=fashion_mnist: ") as error:
        found_images(str(tmp_path / "idx"), SMALL)
    assert "voc" not in str(error.value), "only those that fit"
    test_shards.web(plain(tmp_path / "mixed"))
    with pytest.raises(UserError, match=r"(?s)2 known layouts fit; .*dataset=webdataset.*dataset=image_folder"):
        found_images(str(tmp_path / "mixed"), SMALL)
    with pytest.raises(UserError, match="does not exist"):
        found_images(str(tmp_path / "none"), SMALL)
    with pytest.raises(UserError, match="read as folders of images, which have no split test"):
        found_images(str(plain(tmp_path / "plain")), SMALL, split="test")


@pytest.mark.parametrize(
    ("name", "gone"),
    [("mnist", "MNIST/raw/train-*"), ("cifar10", "cifar-10-batches-py/data_batch_*"), ("stl10", "*/train_*")],
)
def test_the_test_images_alone_are_found_too(name, gone, tmp_path):
    written = WRITE[name](tmp_path / "data")
    root = written if isinstance(written, Path) else tmp_path / "data"
    for path in root.glob(gone):
        path.unlink()
    assert [layout.name for layout in fitting(root)] == [name]
    assert found_images(str(root), SMALL).uids


@pytest.mark.parametrize("name", ["parquet", "arrow", "webdataset"])
def test_one_shard_is_found_too(name, tmp_path):
    root = WRITE[name](tmp_path / "data")
    shard = sorted(path for path in root.rglob("*") if path.suffix in (".parquet", ".arrow", ".tar"))[0]
    assert set(found_images(str(shard), SMALL).uids) <= set(found_images(str(root), SMALL).uids)
    with pytest.raises(UserError, match="no known layout fits"):
        found_images(str(save(tmp_path / "a.png")), SMALL)


def test_a_run_of_auto(tmp_path, capfd, caplog):
    root = test_shards.parquet(tmp_path / "data")
    result = command(capfd)(
        "dataset=auto", f"dataset.root={root}", "model=small_cnn", "method=random", "metric=[]",
        f"run.root={tmp_path / 'work'}", "run.progress=false",
    )  # fmt: skip
    assert "maps_computed=4" in result.out, result.err
    assert "dataset=parquet (*.parquet)" in result.err + caplog.text
