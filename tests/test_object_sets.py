"""Sets with segmentations: VOC, COCO, CUB and ImageNet-S, each in its own layout, in small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import command, save

from attrib.datasets import COCO, CUB200, AllClasses, ImageNetS, ImageTransform, PascalVOC
from attrib.datasets.files import imagenet_classes
from attrib.types import UNREADABLE, SampleError, UserError

AS_IS = ImageTransform((14, 20), resize="none")
# pycocotools 2.0.11 beside numpy 2; Python does not show this warning to users.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def png(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


# PASCAL VOC -------------------------------------------------------------------------------------


def voc_object(name: str, box: tuple[int, int, int, int], difficult: int = 0) -> str:
    edges = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{edges}</bndbox></object>"


def voc(root: Path) -> Path:
    top = root / "VOCdevkit" / "VOC2012"
    objects = {
        "2007_000001": (voc_object("cat", (1, 1, 5, 4)), voc_object("cat", (11, 2, 20, 14))),
        "2007_000002": (voc_object("dog", (3, 3, 3, 3)), voc_object("person", (5, 5, 9, 9), difficult=1)),
    }
    values = np.zeros((14, 20), np.uint8)
    values[2:6, 3:9], values[8:12, 10:15], values[1, 1:19] = 8, 15, 255  # cat, person, void
    for i, (name, parts) in enumerate(objects.items()):
        save(top / "JPEGImages" / f"{name}.jpg", i)
        write(top / "Annotations" / f"{name}.xml", f"<annotation>{''.join(parts)}</annotation>")
        png(top / "SegmentationClass" / f"{name}.png", values)
    for folder in ("Main", "Segmentation"):
        write(top / "ImageSets" / folder / "val.txt", *objects)
    return top


def test_voc_masks_are_of_one_class_each(tmp_path):
    top = voc(tmp_path)
    dataset = PascalVOC(str(top), AS_IS)
    uids = ("2007_000001/cat", "2007_000002/dog", "2007_000002/person")
    assert dataset.uids == uids
    assert [dataset.names[dataset.label(u)] for u in uids] == ["cat", "dog", "person"]
    assert [dataset.label(u) for u in uids] == [7, 11, 14], "of 20 classes, without the background"
    roi = dataset.batch(uids).roi
    expected = torch.zeros(3, 14, 20, dtype=torch.bool)
    expected[0, 2:6, 3:9] = expected[2, 8:12, 10:15] = True
    assert torch.equal(roi, expected), "void belongs to nothing; the dog has no pixel"
    assert [dataset.box_area(u) for u in uids] == [24 / 280, None, 20 / 280]
    assert PascalVOC(str(tmp_path), AS_IS).key == dataset.key, "torchvision's folder, whatever lies above it"


def test_voc_boxes_count_pixels_from_one_and_include_the_last(tmp_path):
    dataset = PascalVOC(str(voc(tmp_path)), AS_IS, regions="boxes")
    assert dataset.uids == ("2007_000001/cat", "2007_000002/dog"), "the person is difficult"
    roi = dataset.batch(dataset.uids).roi
    expected = torch.zeros(2, 14, 20, dtype=torch.bool)
    expected[0, 0:4, 0:5] = expected[0, 1:14, 10:20] = expected[1, 2, 2] = True
    assert torch.equal(roi, expected)
    assert len(PascalVOC(str(tmp_path), AS_IS, regions="boxes", difficult=True).uids) == 3


@pytest.mark.parametrize("regions", ["masks", "boxes"])
def test_all_classes_of_an_image_are_the_labels_of_one_sample(tmp_path, regions):
    each = PascalVOC(str(voc(tmp_path)), AS_IS, regions=regions)
    whole = AllClasses(each)
    assert set(whole.uids) == {uid.rpartition("/")[0] for uid in each.uids}
    assert len({whole.key, each.key}) == 2
    batch = whole.batch(whole.uids)
    assert batch.target.shape == (len(whole.uids), 20)
    for row, uid in enumerate(whole.uids):
        parts = [part for part in each.uids if part.startswith(f"{uid}/")]
        ones = each.batch(parts)
        assert batch.target[row].nonzero().flatten().tolist() == sorted(ones.target.tolist())
        assert torch.equal(batch.roi[row], ones.roi.any(0))
        assert torch.equal(batch.x[row], ones.x[0])
    assert len({whole.fingerprint(uid) for uid in whole.uids}) == len(whole.uids)


def test_bad_voc_files_cost_their_samples_only(tmp_path):
    top = voc(tmp_path)
    write(top / "Annotations" / "2007_000001.xml", "<annotation><obj")
    write(top / "ImageSets" / "Segmentation" / "val.txt", "2007_000001", "2007_000002", "2007_000003")
    png(top / "SegmentationClass" / "2007_000002.png", np.zeros((14, 19)))
    dataset = PascalVOC(str(top), AS_IS)
    assert dataset.uids == ("2007_000001", "2007_000002/dog", "2007_000002/person", "2007_000003")
    for uid, reason in {
        "2007_000001": r"000001\.xml: cannot be read as a VOC annotation",
        "2007_000002/dog": "mask is 14x19 pixels",
        "2007_000003": r"000003\.xml: cannot be read",
    }.items():
        with pytest.raises(SampleError, match=reason):
            dataset.batch([uid])
        assert (dataset.fingerprint(uid) == UNREADABLE) == ("/" not in uid)
    with pytest.raises(SampleError, match="cannot be read"):
        dataset.box_area("2007_000001")
    with pytest.raises(UserError, match=r"dataset\.split: .*train\.txt cannot be read .*lists there: val"):
        PascalVOC(str(top), AS_IS, split="train")
    write(top / "ImageSets" / "Segmentation" / "bad.txt", "../../etc/passwd")
    with pytest.raises(UserError, match="is not the name of an image"):
        PascalVOC(str(top), AS_IS, split="bad")
    with pytest.raises(UserError, match="has no JPEGImages and ImageSets"):
        PascalVOC(str(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages"), AS_IS)


# COCO -------------------------------------------------------------------------------------------


def coco(root: Path, *more: dict) -> Path:
    for i in (1, 2):
        save(root / "val2017" / f"{i:012d}.jpg", i)
    box = [2.0, 3.0, 6.0, 5.0]
    square = [[2.0, 3.0, 8.0, 3.0, 8.0, 8.0, 2.0, 8.0]]
    runs = {"size": [14, 20], "counts": [14 * 10, 14, 14 * 9]}  # column 10
    everything = {"size": [14, 20], "counts": [0, 280]}
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 18, "bbox": box, "segmentation": square, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 18, "bbox": [10, 0, 1, 14], "segmentation": runs, "iscrowd": 0},
        {"id": 3, "image_id": 1, "category_id": 18, "bbox": [0, 0, 20, 14], "segmentation": everything, "iscrowd": 1},
        {"id": 4, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 14], "segmentation": everything, "iscrowd": 1},
        {"id": 5, "image_id": 2, "category_id": 90, "bbox": box, "segmentation": square, "iscrowd": 0},
        *more,
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 14, "width": 20} for i in (1, 2)],
        "categories": [{"id": i, "name": n} for i, n in ((90, "toothbrush"), (1, "person"), (18, "dog"))],
        "annotations": annotations,
    }
    write(root / "annotations" / "instances_val2017.json", json.dumps(content))
    return root


def test_coco_regions_are_the_targets_instances_without_crowds(tmp_path):
    dataset = COCO(str(coco(tmp_path)), AS_IS)
    uids = ("000000000001/dog", "000000000002/toothbrush")
    assert dataset.uids == uids
    assert [dataset.label(u) for u in uids] == [1, 2], "positions among the sorted ids, which have gaps"
    assert dict(dataset.names) == {0: "person", 1: "dog", 2: "toothbrush"}
    expected = torch.zeros(2, 14, 20, dtype=torch.bool)
    expected[:, 3:8, 2:8] = True
    expected[0, :, 10] = True
    assert torch.equal(dataset.batch(uids).roi, expected)
    boxes = COCO(str(tmp_path), AS_IS, regions="boxes")
    assert torch.equal(boxes.batch(uids).roi, expected)
    assert boxes.key != dataset.key
    assert boxes.described(uids[0]) != dataset.described(uids[0])


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1.0, 2.0, 3.0, 4.0]], "at least three points"),
        ([[1.0, 2.0, 3.0, 4.0, float("nan"), 1.0]], "lies outside"),
        ([[1.0, 2.0, 3.0, 4.0, 1e12, 1.0]], "lies outside"),
        ([], "at least three points"),
        (None, "segmentation cannot be used"),
        ({"size": [14, 20], "counts": [5, 5]}, "do not fill the image"),
        ({"size": [14, 20], "counts": [-5, 285]}, "do not fill the image"),
        ({"size": [1000, 1000], "counts": [10]}, r"its size is \[1000, 1000\], not \[14, 20\]"),
        ({"size": [14, 20], "counts": "PPYo0"}, "segmentation cannot be used"),
        ("word", "segmentation cannot be used"),
    ],
)
def test_a_bad_segmentation_costs_its_sample_only(tmp_path, segmentation, reason):
    bad = {"id": 9, "image_id": 2, "category_id": 18, "bbox": "x", "segmentation": segmentation}
    dataset = COCO(str(coco(tmp_path, bad)), AS_IS)
    with pytest.raises(SampleError, match=rf"annotation 9: .*{reason}"):
        dataset.batch(["000000000002/dog"])
    assert dataset.batch(["000000000001/dog", "000000000002/toothbrush"]).roi.any()
    with pytest.raises(SampleError, match="annotation 9: bbox cannot be used"):
        COCO(str(tmp_path), AS_IS, regions="boxes").batch(["000000000002/dog"])


def test_bad_coco_tables(tmp_path):
    coco(tmp_path, {"id": 7, "image_id": 99, "category_id": 18}, {"id": 8, "image_id": 1, "category_id": 77})
    dataset = COCO(str(tmp_path), AS_IS)
    assert dataset.uids[-2:] == ("annotation-5", "annotation-6")
    with pytest.raises(SampleError, match="annotation 7: has no usable 99"):
        dataset.batch(["annotation-5"])
    Image.new("RGB", (21, 14)).save(tmp_path / "val2017" / f"{2:012d}.jpg")
    with pytest.raises(SampleError):
        dataset.batch(["000000000002/toothbrush"])
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"instances_val2017\.json cannot be read as JSON"):
        COCO(str(tmp_path), AS_IS)
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match="has no list annotations, categories"):
        COCO(str(tmp_path), AS_IS)


def table(root: Path, **lists: list[dict]) -> str:
    """The set of ``coco`` with other lists; returns its root."""
    path = coco(root) / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lists))
    return str(root)


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]}, "two categories have the name 'dog'"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]}, "two categories have the id 1"),
        ({"categories": [{"name": "dog"}]}, "one of the categories has no id or no name"),
        ({"images": [{"id": i, "file_name": "a.jpg"} for i in (1, 2)]}, "two images have the file_name 'a.jpg'"),
        ({"images": [{"id": 1, "file_name": f"{i}.jpg"} for i in (1, 2)]}, "two images have the id 1"),
        ({"images": [{"id": [1], "file_name": "a.jpg"}]}, "one of the images has no id or no file_name"),
        ({"images": ["a.jpg"]}, "one of the images has no id or no file_name"),
    ],
)
def test_what_is_twice_in_cocos_tables_is_refused(tmp_path, lists, reason):
    with pytest.raises(UserError, match=reason):
        COCO(table(tmp_path, **lists), AS_IS, regions="boxes")


def test_images_of_one_name_and_two_suffixes_are_two(tmp_path):
    images = [{"id": i, "file_name": f, "height": 14, "width": 20} for i, f in ((1, "a.jpg"), (2, "a.png"))]
    root = table(tmp_path, images=images)
    assert COCO(root, AS_IS, regions="boxes").uids == ("a.jpg/dog", "a.png/toothbrush")


def test_all_classes_of_coco(tmp_path):
    """Names with a slash belong to the image in front of them; an image of which an annotation is bad is not used."""
    kinds = [{"id": 1, "name": "cat/dog"}, {"id": 2, "name": "tv/set"}]
    box = {"bbox": [2, 3, 6, 5], "iscrowd": 0}
    root = table(
        tmp_path,
        categories=kinds,
        annotations=[{"image_id": 1, "category_id": k, **box} for k in (1, 2)]
        + [{"image_id": 2, "category_id": k, **box} for k in (2, 77)]
        + [{"image_id": 55, "category_id": 1, **box}],
    )
    each = COCO(root, AS_IS, regions="boxes")
    whole = AllClasses(each)
    assert whole.uids == ("000000000001", "000000000002", "annotation-4")
    assert whole.batch(["000000000001"]).target.tolist() == [[1, 1]]
    for uid, reason in (("000000000002", "annotation 3: has no usable 77"), ("annotation-4", "has no usable 55")):
        with pytest.raises(SampleError, match=reason):
            whole.batch([uid])
    assert whole.fingerprint("000000000001") != UNREADABLE == whole.fingerprint("000000000002")


@pytest.mark.parametrize(("name", "classes", "images"), [("voc_all", 20, 2), ("coco_all", 3, 2)])
def test_a_run_on_images_with_all_their_classes(name, classes, images, tmp_path, capfd):
    root = voc(tmp_path / "data") if name == "voc_all" else coco(tmp_path / "data")
    given = [
        f"dataset={name}", f"dataset.each.root={root}", "model=lenet", f"model.num_classes={classes}",
        f"run.root={tmp_path / 'w'}",
    ]  # fmt: skip
    more = ["method=gradient", "metric=[ehr]", "dataset.select.min_confidence=0.01", "run.progress=false"]
    ended = command(capfd)(*given, *more)
    assert ended.status == 0, ended.err
    assert f"maps_computed={images} maps_present=0 scores_computed={images} scores_present=0 failed=0" in ended.out
    looked = command(capfd, "dataset")(*given)
    assert looked.status == 0, looked.err
    share = r"[0-9]+% of 2 samples, the predicted class being one of the labels \(chance: [0-9.]+%\)"
    assert re.search(rf"accuracy of the net +{share}", looked.out)


# CUB --------------------------------------------------------------------------------------------


def cub(root: Path) -> Path:
    top = root / "CUB_200_2011"
    files = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Auklet/B_1.jpg"]
    for i, file in enumerate(files):
        save(top / "images" / file, i)
        values = np.zeros((14, 20))
        values[4:9, 6:12], values[4, 6:12] = 204, 102  # seen by four annotators of five, and by two
        png(top / "segmentations" / file.replace("jpg", "png"), values)
    write(top / "images.txt", *(f"{i} {file}" for i, file in enumerate(files, 1)))
    write(top / "image_class_labels.txt", "1 1", "2 1", "3 2")
    write(top / "train_test_split.txt", "1 1", "2 0", "3 0")
    write(top / "classes.txt", "1 001.Albatross", "2 002.Auklet")
    write(top / "bounding_boxes.txt", *(f"{i} 5.0 3.0 10.0 8.0" for i in (1, 2, 3)))
    write(top / "parts" / "parts.txt", "1 back", "2 left eye")
    write(top / "parts" / "part_locs.txt", "2 1 8.0 6.0 1", "2 2 12.5 4.5 1", "3 1 8.0 6.0 1", "3 2 0.0 0.0 0")
    return top


def test_cub_boxes_masks_and_parts(tmp_path):
    top = cub(tmp_path)
    uids = ("test/001.Albatross/A_2", "test/002.Auklet/B_1")
    boxes, masks = CUB200(str(top), AS_IS), CUB200(str(tmp_path), AS_IS, regions="masks")
    assert boxes.uids == masks.uids == uids
    assert boxes.batch(uids).target.tolist() == [0, 1]
    assert boxes.names == {0: "001.Albatross", 1: "002.Auklet"}
    box, bird = torch.zeros(14, 20, dtype=torch.bool), torch.zeros(14, 20, dtype=torch.bool)
    box[3:11, 5:15], bird[5:9, 6:12] = True, True
    assert all(torch.equal(roi, box) for roi in boxes.batch(uids).roi)
    assert all(torch.equal(roi, bird) for roi in masks.batch(uids).roi)
    parts = CUB200(str(top), AS_IS, regions="parts").batch(uids).roi

    def near(x: float, y: float) -> torch.Tensor:
        return torch.tensor([[(j + 0.5 - x) ** 2 + (i + 0.5 - y) ** 2 <= 1 for j in range(20)] for i in range(14)])

    assert torch.equal(parts[0], near(8, 6) | near(12.5, 4.5)), "a tenth of the box's longer side, 10 pixels"
    assert torch.equal(parts[1], near(8, 6)), "the eye cannot be seen"
    eye = CUB200(str(top), AS_IS, regions="parts", parts=["left eye"], radius=0.2)
    assert eye.batch(uids).roi.any((1, 2)).tolist() == [True, False]
    assert len({d.key for d in (boxes, masks, eye, CUB200(str(top), AS_IS, regions="parts"))}) == 4
    assert CUB200(str(top), AS_IS, "train").uids == ("train/001.Albatross/A_1",)


def test_a_missing_row_of_cub_costs_its_image(tmp_path):
    top = cub(tmp_path)
    write(top / "image_class_labels.txt", "1 1", "3 9")
    dataset = CUB200(str(top), AS_IS, "train")
    assert dataset.batch(dataset.uids).target.tolist() == [0]
    with pytest.raises(UserError, match=r"no usable image of dataset\.split=test"):
        CUB200(str(top), AS_IS)
    write(top / "image_class_labels.txt", "1 1", "2 1", "3 9")
    dataset = CUB200(str(top), AS_IS)
    with pytest.raises(SampleError, match=r"image 3 \(002.Auklet/B_1.jpg\): class 9 is not in classes.txt"):
        dataset.batch(["test/002.Auklet/B_1"])
    write(top / "image_class_labels.txt", "1 1", "1 2")
    with pytest.raises(UserError, match="has two rows for 1"):
        CUB200(str(top), AS_IS)
    with pytest.raises(UserError, match="no part 'left ear'; did you mean 'left eye'"):
        CUB200(str(cub(tmp_path)), AS_IS, regions="parts", parts=["left ear"])


# ImageNet-S -------------------------------------------------------------------------------------


def imagenet_s(root: Path, classes: int = 300) -> list[str]:
    wnids = sorted(wnid for wnid, _ in imagenet_classes().values())[:classes]
    for wnid in wnids:
        (root / "validation" / wnid).mkdir(parents=True)
    for number in (1, 299):  # the second is more than a byte
        wnid = wnids[number - 1]
        save(root / "validation" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", number)
        values = np.zeros((14, 20, 3))
        values[2:7, 3:9] = (number % 256, number // 256, 0)
        values[0] = (1000 % 256, 1000 // 256, 0)
        values[9:12, 3:9] = (number % 256, number // 256 + 1, 0)  # another class
        png(root / "validation-segmentation" / wnid / f"ILSVRC2012_val_{number:08d}.png", values)
    return wnids


def test_imagenet_s(tmp_path):
    wnids = imagenet_s(tmp_path)
    dataset = ImageNetS(str(tmp_path), AS_IS)
    batch = dataset.batch(dataset.uids)
    index = {wnid: i for i, (wnid, _) in imagenet_classes().items()}
    assert dataset.uids == tuple(f"{wnids[n - 1]}/ILSVRC2012_val_{n:08d}" for n in (1, 299))
    assert batch.target.tolist() == [index[wnids[0]], index[wnids[298]]]
    expected = torch.zeros(14, 20, dtype=torch.bool)
    expected[2:7, 3:9] = True
    assert all(torch.equal(roi, expected) for roi in batch.roi)


def test_imagenet_s_without_all_its_classes_is_refused(tmp_path):
    imagenet_s(tmp_path, 299)
    with pytest.raises(UserError, match="has 299 folders, not one for each of the 50, 300 or 919 classes"):
        ImageNetS(str(tmp_path), AS_IS)


def test_a_gray_mask_of_imagenet_s_costs_its_sample(tmp_path):
    wnids = imagenet_s(tmp_path)
    png(tmp_path / "validation-segmentation" / wnids[0] / "ILSVRC2012_val_00000001.png", np.zeros((14, 20)))
    (tmp_path / "validation-segmentation" / wnids[298] / "ILSVRC2012_val_00000299.png").unlink()
    dataset = ImageNetS(str(tmp_path), AS_IS)
    for uid, reason in zip(dataset.uids, ("this one is gray", "there is no such mask")):
        with pytest.raises(SampleError, match=reason):
            dataset.batch([uid])
