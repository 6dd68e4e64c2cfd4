"""What all image datasets share: decoding, batches, fingerprints, areas of regions."""

from __future__ import annotations

import hashlib
import io
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from attrib.classes import Numbering
from attrib.datasets.depth import depth_of, eight_bits, mark
from attrib.datasets.files import note
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest, short_name
from attrib.types import UNREADABLE, Batch, SampleError

Arrays = tuple[np.ndarray | None, np.ndarray | None]  # units and region


def decode(stream: BinaryIO, most: int | None = None) -> Image.Image:
    """An RGB image as stored: EXIF orientation and transparency are ignored.

    That is ImageNet's convention and torchvision's: boxes refer to the pixels as they are stored,
    and the colours beneath transparent pixels show. Of more than 8 bits the highest 8 count, see ``depth``.

    most   pixels; a larger image is refused before it is decoded

    Raises whatever Pillow raises, and ValueError for images whose numbers have no fixed range, such as floating-point
    ones, and for those that Pillow misreads.
    """
    image: Image.Image = Image.open(stream)
    if most is not None and math.prod(image.size) > most:
        width, height = image.size
        raise ValueError(
            f"{width} x {height} pixels, more than {most}; +dataset.transform.max_pixels={width * height} admits it"
        )
    depth = depth_of(image)
    image.load()
    if image.mode == "F":
        raise ValueError("images of floating-point numbers have no fixed range; convert it to 8 or 16 bits")
    if depth is not None:
        return eight_bits(image, depth).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if a transparent palette goes to RGB at once
    return image.convert("RGB")


def union_area(boxes: Sequence[Box]) -> float:
    """Area covered by at least one of the boxes, in squared pixels."""
    xs = sorted({x for b in boxes for x in (b.x1, b.x2)})
    ys = sorted({y for b in boxes for y in (b.y1, b.y2)})
    covered = np.zeros((len(ys), len(xs)), dtype=bool)
    for b in boxes:
        covered[ys.index(b.y1) : ys.index(b.y2), xs.index(b.x1) : xs.index(b.x2)] = True
    return float(np.diff(ys, append=ys[-1]) @ covered @ np.diff(xs, append=xs[-1]))


class ImageDataset(ABC):
    """Images that Pillow can read. A subclass says where the bytes are, the label, and the boxes or the region.

    boxed            whether samples may have boxes or regions at all (``Batch.roi`` is None otherwise)
    label_problems   uid -> why this sample has no label (-1), where there is more to say than that it has none
    numbering        what the numbers of the classes are, see ``attrib.classes``
    wnids            class index -> WordNet id, where known
    """

    modality = "image"

    def __init__(
        self,
        uids: Iterable[str],
        transform: ImageTransform,
        names: Mapping[int, str] | None = None,
        boxed: bool = False,
    ) -> None:
        self.uids = tuple(sorted(uids))
        self.transform = transform
        self.names = dict(names or {})
        self.key = digest(short_name(type(self)), transform)
        self._boxed = boxed
        self.label_problems: dict[str, str] = {}
        self.numbering: Numbering = "given"
        self.wnids: Mapping[int, str] = {}
        self.fingerprints: dict[str, str] = {}

    @abstractmethod
    def open(self, uid: str) -> BinaryIO:
        """The encoded image, positioned at its start. Raises OSError."""

    @abstractmethod
    def label(self, uid: str) -> int:
        """Class index, -1 where unknown."""

    def boxes(self, uid: str) -> tuple[Box, ...]:
        """Boxes of the labelled class, in pixels of the stored image. Raises SampleError."""
        return ()

    def region(self, uid: str) -> np.ndarray | None:
        """(h, w) bool: the labelled object, in pixels of the stored image; it takes the place of the boxes.

        (0, 0) for a sample that has none, None if all samples have boxes at most. Raises SampleError.
        """
        return None

    def units(self, uid: str) -> np.ndarray | None:
        """(h, w) integers, the user's own units in pixels of the stored image, 0 for none. Raises SampleError."""
        return None

    def file(self, uid: str) -> str:
        """What messages call the sample."""
        return uid

    def image(self, uid: str) -> Image.Image:
        """The stored image, RGB. Raises SampleError, also for one that is not what its fingerprint was made of."""
        content, image = self._decoded(uid)
        self._note(uid, content, (self.units(uid), self.region(uid)))
        return image

    def _decoded(self, uid: str) -> tuple[bytes, Image.Image]:
        with self._blame(uid), self.open(uid) as stream:
            content = self._content(stream)
            return content, decode(io.BytesIO(content), self.transform.max_pixels)

    def _content(self, stream: BinaryIO) -> bytes:
        """All of a stream. Raises ValueError for a file that is longer than any image of so many pixels."""
        size, most = 0, 2**20 + 16 * self.transform.max_pixels
        with suppress(AttributeError, OSError):  # not every stream is a file
            size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes are no image of {self.transform.max_pixels} pixels or fewer")
        return stream.read()

    def _few_boxes(self, uid: str) -> tuple[Box, ...]:
        """``boxes``. Raises SampleError if there are too many."""
        found, most = self.boxes(uid), self.transform.max_boxes
        if len(found) > most:
            raise SampleError(
                f"{self.file(uid)}: {len(found)} boxes, more than {most}; +dataset.transform.max_boxes={len(found)} "
                "admits them"
            )
        return found

    def _note(self, uid: str, content: bytes, arrays: Arrays) -> None:
        """Take the fingerprint of what was decoded, or compare it. Raises SampleError."""
        if self._prints_content():
            found = self._print(uid, hashlib.sha256(content).hexdigest(), mark(content), arrays)
            note(self.fingerprints, uid, found, self.file(uid))

    def _prints_content(self) -> bool:
        """Whether the fingerprint is made by ``_print``: a subclass may have another one."""
        return type(self).fingerprint is ImageDataset.fingerprint

    @contextmanager
    def _blame(self, uid: str) -> Iterator[None]:
        """Any failure inside becomes a SampleError that names the file: on damaged data Pillow's decoders raise
        OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError and more."""
        try:
            yield
        except SampleError:
            raise
        except UnidentifiedImageError as error:
            raise SampleError(f"{self.file(uid)}: empty, damaged or not an image that Pillow knows") from error
        except OSError as error:
            raise SampleError(f"{self.file(uid)}: cannot be read: {error.strerror or error}") from error
        except Exception as error:
            raise SampleError(f"{self.file(uid)}: {error or type(error).__name__}") from error

    def fingerprint(self, uid: str) -> str:
        if uid not in self.fingerprints:
            try:
                with self.open(uid) as stream:
                    content = self._content(stream)
                whole = hashlib.sha256(content).hexdigest()
                value = self._print(uid, whole, mark(content), (self.units(uid), self.region(uid)))
            except (OSError, ValueError, SampleError):
                return UNREADABLE  # not remembered: the file server may come back
            self.fingerprints[uid] = value
        return self.fingerprints[uid]

    def _print(self, uid: str, content: str, marks: tuple[str, ...], arrays: Arrays) -> str:
        """The fingerprint of a sample whose encoded image has the digest ``content``; arrays: units and region."""
        more = [part for a in arrays if a is not None for part in (hashlib.sha256(a.tobytes()).hexdigest(), a.shape)]
        return digest(content, self.label(uid), self._few_boxes(uid), *more, *marks)[:16]

    def batch(self, uids: Sequence[str]) -> Batch:
        rows = [self._row(uid) for uid in uids]
        units = [found for _, _, found in rows if found is not None]
        return Batch(
            uids=tuple(uids),
            x=torch.stack([x for x, _, _ in rows]),
            target=torch.tensor([self.label(uid) for uid in uids], dtype=torch.long),
            roi=torch.stack([mask for _, mask, _ in rows]) if self._boxed else None,
            units=torch.stack(units) if len(units) == len(uids) else None,
        )

    def _row(self, uid: str) -> tuple[Tensor, Tensor, Tensor | None]:
        units, region = self.units(uid), self.region(uid)
        if type(self).image is ImageDataset.image:
            content, image = self._decoded(uid)
            self._note(uid, content, (units, region))
        else:
            image = self.image(uid)
        with self._blame(uid):
            x = self.transform.tensor(image)
            own = None if units is None else self.transform.units(units)
            return x, self._inside(uid, region, image.size), own

    def _inside(self, uid: str, region: np.ndarray | None, size: tuple[int, int]) -> Tensor:
        """(H, W) bool: the region or the boxes of an image of ``size``, (width, height). Raises SampleError."""
        if not self._boxed or region is None or not region.size:
            return self.transform.mask(self._few_boxes(uid), size)
        if region.shape != size[::-1]:
            shapes = "x".join(map(str, region.shape)), "x".join(map(str, size[::-1]))
            raise SampleError(f"{self.file(uid)}: its mask is {shapes[0]} pixels (height x width), not {shapes[1]}")
        return self.transform.region(region)

    def regions(self, uids: Sequence[str]) -> Tensor | None:
        """``batch(uids).roi``, (B, H, W) bool; of the images no more than their sizes is read. Raises SampleError."""
        if not self._boxed:
            return None
        own = type(self).image is not ImageDataset.image  # such images need not lie in a file with a header
        found = []
        for uid in uids:
            size = self.image(uid).size if own else self.size(uid)
            region = self.region(uid)
            with self._blame(uid):
                found.append(self._inside(uid, region, size))
        return torch.stack(found)

    def picture(self, uid: str) -> np.ndarray:
        image = self.image(uid)
        with self._blame(uid):
            return np.array(self.transform.picture(image).convert("RGB"))

    def size(self, uid: str) -> tuple[int, int]:
        """(width, height) of the stored image, from its header. Raises SampleError."""
        with self._blame(uid), self.open(uid) as stream:
            return Image.open(stream).size

    def box_area(self, uid: str) -> float | None:
        """Share of the stored image that the region or the boxes cover; None without either, or if it is empty."""
        region = self.region(uid)
        if region is not None:
            return float(region.mean()) if region.any() else None
        boxes = self._few_boxes(uid)
        if not boxes:
            return None
        width, height = self.size(uid)
        inside = [c for c in (b.clipped(width, height) for b in boxes) if c is not None]
        return union_area(inside) / (width * height) if inside else None
