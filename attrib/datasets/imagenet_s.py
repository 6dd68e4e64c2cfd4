"""ImageNet-S: ImageNet images with the pixels of their class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from attrib.classes import imagenet_classes
from attrib.datasets.arrays import check_split
from attrib.datasets.files import existing_folder, image_files, shown, uids_of
from attrib.datasets.masks import read_values
from attrib.datasets.picture_files import PictureFiles
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.types import SampleError, UserError

_SIZES = (50, 300, 919)  # classes of the three sets


class ImageNetS(PictureFiles):
    """``<split>/<wnid>/*.JPEG`` and ``<split>-segmentation/<wnid>/*.png`` below ``root`` (Gao et al., *Large-scale
    Unsupervised Semantic Segmentation*, TPAMI 2022).

    A mask's pixel is R + 256 G: the position of its class among the sorted WordNet ids, from 1; 0 is anything else, and
    1000 is ignored, so both are outside. The label is ImageNet's class index of the folder. ImageNet-S has put five
    classes into others (its page lists them), so a few images of the set of 919 lie in a folder that is a synonym of
    their class.

    split  "validation" or "train-semi"

    Raises UserError if a folder is missing, or if there are not the 50, 300 or 919 classes of one of the sets, whose
    numbers would then be unknown.
    """

    def __init__(
        self, root: str, transform: ImageTransform, split: Literal["validation", "train-semi"] = "validation"
    ) -> None:
        check_split(split, ("validation", "train-semi"))
        top = existing_folder(root, "dataset.root")
        images, self._masks = top / split, top / f"{split}-segmentation"
        for folder in (images, self._masks):
            if not folder.is_dir():
                raise UserError(f"dataset.root: there is no {folder}; the layout is that of ImageNet-S")
        wnids = sorted(path.name for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
        if len(wnids) not in _SIZES:
            raise UserError(
                f"dataset.root: {images} has {len(wnids)} folders, not one for each of the 50, 300 or 919 classes of "
                "ImageNet-S; the numbers in the masks are positions among all of them"
            )
        table = imagenet_classes()
        index = {wnid: i for i, (wnid, _) in table.items()}
        unknown = [wnid for wnid in wnids if wnid not in index]
        if unknown:
            raise UserError(f"dataset.root: {images / shown(unknown[0])} is not a WordNet id of ImageNet")
        self._values = {wnid: number for number, wnid in enumerate(wnids, 1)}
        self._files = uids_of([file for file in image_files(images) if "/" in file])
        wnid_of = {uid: file.partition("/")[0] for uid, file in self._files.items()}
        super().__init__(
            {uid: images / file for uid, file in self._files.items()},
            {uid: index[wnid] for uid, wnid in wnid_of.items()},
            transform,
            {i: name for i, (_, name) in table.items()},
        )
        self.wnids = {i: wnid for i, (wnid, _) in table.items()}
        self.key = digest(self.key, split, len(wnids))

    def region(self, uid: str) -> np.ndarray | None:
        path = self._mask(uid)
        values = read_values(path)
        if values.ndim != 3:
            raise SampleError(f"{path}: a mask of ImageNet-S is RGB, its class R + 256 G; this one is gray")
        return values[..., 0] + 256 * values[..., 1] == self._values[self._files[uid].partition("/")[0]]

    def _mask(self, uid: str) -> Path:
        return (self._masks / self._files[uid]).with_suffix(".png")

    def sources(self, uid: str) -> tuple[str, ...]:
        return self.files(uid, self._mask(uid))

    def described(self, uid: str) -> tuple[Any, ...]:
        return self.label(uid), len(self._values), self._files[uid].partition("/")[0]
