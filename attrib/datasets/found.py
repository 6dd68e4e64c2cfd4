"""Which of the known layouts a folder of images has."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from attrib.datasets.cars import StanfordCars
from attrib.datasets.cifar import CIFAR10, CIFAR100
from attrib.datasets.coco import COCO
from attrib.datasets.cub import CUB200
from attrib.datasets.files import SUFFIXES, existing_folder, shown
from attrib.datasets.folder import ImageFolder
from attrib.datasets.idx import MNIST, FashionMNIST
from attrib.datasets.imagenet import ImageNet
from attrib.datasets.imagenet_s import ImageNetS
from attrib.datasets.images import ImageDataset
from attrib.datasets.kaggle import KaggleImageNet
from attrib.datasets.parquet import ArrowShards, ParquetShards
from attrib.datasets.stl import STL10
from attrib.datasets.tar import TarShards
from attrib.datasets.transform import ImageTransform
from attrib.datasets.voc import PascalVOC
from attrib.types import UserError

log = logging.getLogger(__name__)

_IDX = ("train-images-idx3-ubyte*", "t10k-images-idx3-ubyte*")
_WNID = re.compile(r"n\d{8}")


class Layout(NamedTuple):
    """A way in which sets lie on disk.

    name      of the preset
    what      the files that tell it from others
    fits      whether they are there; None: any file with the suffix will do
    kind, fields   how it is built
    sharded   whether it takes ``index``
    """

    name: str
    what: str
    fits: Callable[[Path], bool] | None
    kind: Callable[..., ImageDataset]
    fields: Callable[[Path, str | None], dict[str, Any]] = lambda root, split: {"root": str(root)} | _given(split)
    sharded: bool = False


def _given(split: str | None) -> dict[str, Any]:
    return {} if split is None else {"split": split}


def _has(*patterns: str) -> Callable[[Path], bool]:
    """Whether something matches each of the patterns."""
    return lambda root: all(next(root.glob(pattern), None) is not None for pattern in patterns)


def _any(*patterns: str) -> Callable[[Path], bool]:
    return lambda root: any(next(root.glob(pattern), None) is not None for pattern in patterns)


def _wnids(folder: Path) -> bool:
    """Whether its folders are named by WordNet ids."""
    if not folder.is_dir():
        return False
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return bool(folders) and all(_WNID.fullmatch(name) for name in folders)


def _torchvision(root: Path, split: str | None) -> dict[str, Any]:
    inside = root if _wnids(root) else root / (split or "val")
    if inside == root and split is not None:
        raise UserError(f"dataset.split: {root} holds the WordNet ids themselves; it has no split {split}")
    return {"root": str(inside), "classes": "imagenet"}


_TABLES = ("labels.csv", "boxes.csv")  # beside the folder of images
_INDEX = "imagenet_class_index.csv"


def _boxed(root: Path) -> Path | None:
    """The folder of images that the two tables lie beside: ``root`` itself, or its ``images``; None without it."""
    for top, images in ((root.absolute().parent, root), (root, root / "images")):
        if images.is_dir() and all((top / name).is_file() for name in _TABLES) and not _wnids(images):
            return images
    return None


def _boxed_images(root: Path, split: str | None) -> dict[str, Any]:
    """As the preset has it, without the numbers of the classes where no table says them."""
    fields = _folder(_boxed(root) or root, split)
    top = Path(fields["root"]).absolute().parent
    classes = str(top / _INDEX) if (top / _INDEX).is_file() else None
    return {**fields, **{name.removesuffix(".csv"): str(top / name) for name in _TABLES}, "classes": classes}


def _sharded(root: Path, split: str | None) -> dict[str, Any]:
    return {"root": str(root), "split": split}


def _suffixes(root: Path) -> set[str]:
    """Of all visible files at any depth. One walk, because a file server takes minutes for a million files."""
    found: set[str] = set()
    for _, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found |= {os.path.splitext(name)[1].lower() for name in names if not name.startswith(".")}
    return found


def _folder(root: Path, split: str | None) -> dict[str, Any]:
    if split is not None:
        raise UserError(f"dataset.split: {root} is read as folders of images, which have no split {split}")
    return {"root": str(root)}


LAYOUTS = (
    Layout("imagenet", "images/attribution and imagenet_class_index.json",
           _has("images/attribution", "imagenet_class_index.json"), ImageNet),
    Layout("imagenet_kaggle", "ILSVRC/Data/CLS-LOC", _any("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"), KaggleImageNet),
    Layout("image_folder with dataset.classes=imagenet", "val/<WordNet id>/, or WordNet ids only",
           lambda root: _wnids(root / "val") or _wnids(root), ImageFolder, _torchvision),
    Layout("boxed_images", "a folder of images beside labels.csv and boxes.csv", lambda root: _boxed(root) is not None,
           ImageFolder, _boxed_images),
    Layout("imagenet_s", "validation-segmentation/", _any("validation-segmentation", "train-semi-segmentation"),
           ImageNetS),
    Layout("voc", "JPEGImages/ and ImageSets/", lambda root: _has("JPEGImages", "ImageSets")(root)
           or _any("VOCdevkit/VOC*/JPEGImages", "VOC[0-9]*/JPEGImages")(root), PascalVOC),
    Layout("coco", "annotations/instances_*.json", _has("annotations/instances_*.json"), COCO),
    Layout("cub200", "images.txt and bounding_boxes.txt", lambda root: any(
           _has("images.txt", "bounding_boxes.txt")(top) for top in (root, root / "CUB_200_2011")), CUB200),
    Layout("cars", "cars_meta.mat", _any("devkit/cars_meta.mat", "cars_meta.mat"), StanfordCars),
    Layout("cifar10", "data_batch_1 or test_batch, also .bin",
           _any(*(f"{top}{name}_batch{end}" for top in ("", "cifar-10-batches-*/")
                  for name, end in (("data", "_1"), ("data", "_1.bin"), ("test", ""), ("test", ".bin")))), CIFAR10),
    Layout("cifar100", "fine_label_names.txt, or meta with train and test", lambda root: any(
           _has("fine_label_names.txt")(top) or all((top / name).is_file() for name in ("meta", "train", "test"))
           for top in (root, root / "cifar-100-python", root / "cifar-100-binary")), CIFAR100),
    Layout("mnist", "train- or t10k-images-idx3-ubyte",
           _any(*_IDX, "MNIST/raw/*-images-idx3-ubyte*"), MNIST),
    Layout("fashion_mnist", "train- or t10k-images-idx3-ubyte",
           _any(*_IDX, "FashionMNIST/raw/*-images-idx3-ubyte*"), FashionMNIST),
    Layout("stl10", "test_X.bin or train_X.bin", _any("t*_X.bin", "stl10_binary/t*_X.bin"), STL10),
)  # fmt: skip
# Asked only if no other fits, by the suffixes of the files: many of the others are folders of images too, and
# torchvision leaves the archives lying that it has unpacked.
LAST = {
    Layout("parquet", "*.parquet", None, ParquetShards, _sharded, True): {".parquet"},
    Layout("arrow", "*.arrow", None, ArrowShards, _sharded, True): {".arrow"},
    Layout("webdataset", "*.tar", None, TarShards, _sharded, True): {".tar"},
    Layout("image_folder", "images, in folders or not", None, ImageFolder, _folder): SUFFIXES,
}


def fitting(root: Path) -> tuple[Layout, ...]:
    """The layouts that a folder may have."""
    first = tuple(layout for layout in LAYOUTS if layout.fits and layout.fits(root))
    if first:
        return first
    there = _suffixes(root)
    return tuple(layout for layout, suffixes in LAST.items() if there & suffixes)


def found_images(
    root: str, transform: ImageTransform, split: str | None = None, index: str | None = None
) -> ImageDataset:
    """The dataset of the one known layout that ``root`` has, with the defaults of its preset. Its key is the same.

    root    a folder, or one shard
    split   None: the default of the layout
    index   see ``ShardedImages``

    Raises UserError, listing what was looked for, if none fits or several do.
    """
    top = Path(root).expanduser()
    if top.is_file():
        layouts = tuple(
            layout for layout, suffixes in LAST.items() if layout.sharded and top.suffix.lower() in suffixes
        )
    else:
        top = existing_folder(root, "dataset.root")
        layouts = fitting(top)
    if len(layouts) != 1:
        fit = f"{len(layouts)} known layouts fit" if layouts else "no known layout fits"
        looked = layouts or (*LAYOUTS, *LAST)
        listed = "\n".join(f"  dataset={layout.name}: {layout.what}" for layout in looked)
        raise UserError(f"dataset.root: {top}: {fit}; name one yourself. Looked for:\n{listed}")
    (layout,) = layouts
    fields = layout.fields(top, split) | ({"index": index} if layout.sharded else {})
    log.info("%s: dataset=%s (%s)", shown(str(top)), layout.name, layout.what)
    return layout.kind(transform=transform, **fields)
