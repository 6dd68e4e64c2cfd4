"""What the rest of attrib asks of a dataset: the same of every one, and a little more of images, texts and sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np

from attrib.types import Batch


class Dataset(Protocol):
    """Samples that can be asked for by name, in any order and any number."""

    @property
    def modality(self) -> str:
        """ "image", "text" or "audio": which of the protocols below the dataset keeps as well."""
        ...

    @property
    def uids(self) -> tuple[str, ...]:
        """Sorted and stable: they name the same samples wherever the data lie."""
        ...

    @property
    def key(self) -> str:
        """Digest of how a file becomes a sample: class and transform, never a path. Content: ``fingerprint``."""
        ...

    @property
    def names(self) -> Mapping[int, str]:
        """Class index -> class name, where known."""
        ...

    def fingerprint(self, uid: str) -> str:
        """Short digest of the sample's bytes, target and region: if it changes, results are recomputed.

        Never raises for damaged data; such a sample is reported by ``batch``.
        """
        ...

    def batch(self, uids: Sequence[str]) -> Batch:
        """Images: x (B, C, H, W) float32, normalised; roi (B, H, W) bool, all False for a sample without a box, None
        if this dataset never has boxes. Texts: x (B, T) token ids, lengths (B,), words (B, T). Sounds: x (B, C, L)
        float32, normalised; roi (B, L). Always: target (B,) long, -1 where unknown. See ``attrib.types.Batch``.

        Raises SampleError, naming file and reason, if one of them cannot be read.
        """
        ...

    def box_area(self, uid: str) -> float | None:
        """Area of the target's region, or union of its boxes, as a fraction of the stored image; None without.

        Of a sound: the marked fraction of its time. Cheap for images: their pixels are not decoded.
        Raises SampleError if the boxes or the image's header cannot be read.
        """
        ...


class Images(Dataset, Protocol):
    """A dataset whose modality is "image"."""

    def picture(self, uid: str) -> np.ndarray:
        """(H, W, 3) uint8, what the network sees, before normalisation. Raises SampleError like ``batch``."""
        ...


class Texts(Dataset, Protocol):
    """A dataset whose modality is "text"."""

    def tokens(self, uid: str) -> tuple[str, ...]:
        """The tokens as a person reads them, one for each of the sample's ids. Raises SampleError like ``batch``."""
        ...


class Sounds(Dataset, Protocol):
    """A dataset whose modality is "audio"."""

    @property
    def rate(self) -> int:
        """Samples per second of ``wave`` and of the batches."""
        ...

    def wave(self, uid: str) -> np.ndarray:
        """(L,) float32 in -1 .. 1, what the network hears, before normalisation. Raises SampleError like ``batch``."""
        ...


class Files(Dataset, Protocol):
    """A dataset that also derives from ``attrib.datasets.files.InFiles``."""

    @property
    def fingerprints(self) -> dict[str, str]: ...

    def sources(self, uid: str) -> tuple[str, ...]: ...

    def described(self, uid: str) -> tuple[Any, ...]: ...


def holds_images(dataset: Dataset) -> TypeGuard[Images]:
    return dataset.modality == "image"


def holds_texts(dataset: Dataset) -> TypeGuard[Texts]:
    return dataset.modality == "text"


def holds_sounds(dataset: Dataset) -> TypeGuard[Sounds]:
    return dataset.modality == "audio"
