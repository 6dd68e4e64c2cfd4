"""Regions in image files: what is in the picture, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from attrib.datasets.files import existing_folder, image_files, log, opened, shown
from attrib.types import SampleError, UserError

Values = Literal["binary", "index"]


def read_values(path: Path) -> np.ndarray:
    """(h, w) the numbers of a gray image, or the indices of one with a palette; (h, w, 3) of one with colours.

    Raises SampleError naming the file.
    """
    try:
        with opened(path) as stream, Image.open(stream) as image:
            if image.mode in ("P", "L", "1", "I", "RGB") or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.int64)
            mode = image.mode
    except FileNotFoundError as error:
        raise SampleError(f"{shown(str(path))}: there is no such mask") from error
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to IndexError
        raise SampleError(f"{shown(str(path))}: cannot be read as a mask: {error or type(error).__name__}") from error
    raise SampleError(f"{shown(str(path))}: a mask must be gray or have a palette, not {mode}")


def gray(path: Path) -> np.ndarray:
    """(h, w) like ``read_values``; colours are refused."""
    values = read_values(path)
    if values.ndim != 2:
        raise SampleError(f"{shown(str(path))}: a mask must be gray or have a palette, not RGB")
    return values


class MaskFolder:
    """PNG masks beside images: at an image's path below ``root``, with the suffix .png.

    values       "binary": pixels that are not 0 are the region, and all of them have one value;
                 "index": a pixel is the index of its class, and the region has that of the label
    first_class  with "index": the pixel that stands for class 0, such as 1 where 0 is the background

    Raises UserError if there are no masks for any of ``files``; a warning says how many lack one.
    """

    def __init__(self, root: str, files: Sequence[str], values: Values = "binary", first_class: int = 0) -> None:
        if values not in get_args(Values):
            raise UserError(f"dataset.mask_values must be binary or index, not {values!r}")
        self.root, self.values, self.first_class = existing_folder(root, "dataset.masks"), values, first_class
        self._known = {file for file in image_files(self.root, "dataset.masks") if file.endswith(".png")}
        without = [file for file in files if _png(file) not in self._known]
        if len(without) == len(files):
            raise UserError(f"dataset.masks: {self.root} has no mask for any image, such as {_png(shown(files[0]))}")
        if without:
            log.warning(
                "dataset.masks: %s has no mask for %d of %d images, such as %s; they have no region",
                *(self.root, len(without), len(files), _png(shown(without[0]))),
            )

    def path(self, file: str) -> Path:
        return self.root / _png(file)

    def region(self, file: str, label: int) -> np.ndarray:
        """(h, w) bool; (0, 0) where there is no mask. Raises SampleError naming the mask."""
        if _png(file) not in self._known:
            return np.zeros((0, 0), dtype=bool)
        path = self.path(file)
        found = gray(path)
        if self.values == "index":
            if label < 0:
                raise SampleError(f"{shown(str(path))}: holds classes, but its image has no label")
            return found == label + self.first_class
        used = np.unique(found[found != 0])
        if len(used) > 1:
            raise SampleError(
                f"{shown(str(path))}: holds {len(used)} values beside 0 ({', '.join(map(str, used[:4]))}, ...), so it "
                "is not binary; if they are classes, set dataset.mask_values=index"
            )
        return found != 0

    def described(self) -> Mapping[str, object]:
        return {"values": self.values, "first_class": self.first_class}


def _png(file: str) -> str:
    return file.rpartition(".")[0] + ".png"
