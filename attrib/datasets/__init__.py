"""Datasets: named samples, as the model wants to see them.

A dataset knows files, labels, boxes and the model's input transform. It knows nothing of models,
methods or the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from attrib.datasets.folder import ImageFolder
from attrib.datasets.imagenet import ImageNet
from attrib.datasets.images import ImageDataset
from attrib.datasets.photos import Photos, PhotoViews
from attrib.datasets.select import Selection
from attrib.datasets.transform import Box, ImageTransform
from attrib.types import Batch

__all__ = [
    "Box",
    "Dataset",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageTransform",
    "PhotoViews",
    "Photos",
    "Selection",
]


class Dataset(Protocol):
    """Samples that can be asked for by name, in any order and any number.

    uids   sorted and stable: they name the same samples wherever the data lie
    key    digest of how a file becomes a sample: class and transform, never a path (content: ``fingerprint``)
    names  class index -> class name, where known
    """

    uids: tuple[str, ...]
    key: str
    names: Mapping[int, str]

    def fingerprint(self, uid: str) -> str:
        """Short digest of the sample's bytes, target and boxes: if it changes, results are recomputed.

        Never raises for damaged data; such a sample is reported by ``batch``.
        """
        ...

    def batch(self, uids: Sequence[str]) -> Batch:
        """x (B, C, H, W) float32, normalised; target (B,) long, -1 where unknown; roi (B, H, W) bool, all
        False for a sample without a box, None if this dataset never has boxes.

        Raises SampleError, naming file and reason, if one of them cannot be read.
        """
        ...

    def picture(self, uid: str) -> np.ndarray:
        """(H, W, 3) uint8: what the network sees, before normalisation. Raises SampleError like ``batch``."""
        ...

    def box_area(self, uid: str) -> float | None:
        """Area of the union of the target's boxes as a fraction of the stored image, None without boxes.

        Cheap: pixels are not decoded. Raises SampleError if the boxes or the image's header cannot be read.
        """
        ...
