"""Datasets: named samples, as the model wants to see them.

A dataset knows files, labels, boxes and the model's input transform. It knows nothing of models,
methods or the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from attrib.datasets.arrays import ArrayDataset, PixelDataset
from attrib.datasets.audio import AudioDataset, Interval, WaveTransform, WavFolder
from attrib.datasets.cars import StanfordCars
from attrib.datasets.cifar import CIFAR10
from attrib.datasets.digits import Digits, DigitsCanvas
from attrib.datasets.folder import ImageFolder
from attrib.datasets.idx import MNIST, FashionMNIST
from attrib.datasets.imagenet import ImageNet
from attrib.datasets.images import ImageDataset
from attrib.datasets.photos import Photos, PhotoViews
from attrib.datasets.pieces import HuggingFaceEncoder
from attrib.datasets.select import Selection
from attrib.datasets.snippets import MovieSnippets
from attrib.datasets.table import TextTable
from attrib.datasets.text import IMDb, TextDataset
from attrib.datasets.tokens import Encoder, WordEncoder
from attrib.datasets.tones import Tones
from attrib.datasets.transform import Box, ImageTransform
from attrib.datasets.vectors import WordVectors, word_vectors
from attrib.datasets.wav import Sound
from attrib.types import Batch

__all__ = [
    "CIFAR10",
    "MNIST",
    "ArrayDataset",
    "AudioDataset",
    "Box",
    "Dataset",
    "Digits",
    "DigitsCanvas",
    "Encoder",
    "FashionMNIST",
    "HuggingFaceEncoder",
    "IMDb",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageTransform",
    "Interval",
    "MovieSnippets",
    "PhotoViews",
    "Photos",
    "PixelDataset",
    "Selection",
    "Sound",
    "StanfordCars",
    "TextDataset",
    "TextTable",
    "Tones",
    "WavFolder",
    "WaveTransform",
    "WordEncoder",
    "WordVectors",
    "word_vectors",
]


class Dataset(Protocol):
    """Samples that can be asked for by name, in any order and any number.

    uids   sorted and stable: they name the same samples wherever the data lie
    key    digest of how a file becomes a sample: class and transform, never a path (content: ``fingerprint``)
    names  class index -> class name, where known
    modality   "image", "text" or "audio"
    """

    modality: str
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
        False for a sample without a box, None if this dataset never has boxes. Texts: x (B, T) token ids,
        lengths (B,), words (B, T). Sounds: x (B, C, L), roi (B, L). See ``types.Batch``.

        Raises SampleError, naming file and reason, if one of them cannot be read.
        """
        ...

    def picture(self, uid: str) -> np.ndarray:
        """Images: (H, W, 3) uint8, what the network sees, before normalisation. Raises SampleError like ``batch``."""
        ...

    def tokens(self, uid: str) -> tuple[str, ...]:
        """Texts: the tokens as a person reads them, one for each of the sample's ids. Raises SampleError."""
        ...

    def wave(self, uid: str) -> np.ndarray:
        """Sounds: (L,) float32 in -1 .. 1, what the network hears, ``rate`` samples a second. Raises SampleError."""
        ...

    def box_area(self, uid: str) -> float | None:
        """Area of the union of the target's boxes as a fraction of the stored image, None without boxes.

        Of a sound: the share of the time.
        Cheap: pixels are not decoded. Raises SampleError if the boxes or the image's header cannot be read.
        """
        ...
