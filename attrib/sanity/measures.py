"""How alike two maps of one sample are: structural similarity, rank correlation, histograms of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import rankdata
from skimage.feature import hog as histograms
from skimage.metrics import structural_similarity

from attrib.drawing.pictures import PERCENTILE, is_signed
from attrib.types import UserError

Measure = Callable[[np.ndarray, np.ndarray], float]


def scaled(map: np.ndarray) -> np.ndarray:
    """``map`` / the 99th percentile of its magnitude, clipped to -1 .. 1, as pictures show it.

    Maps of different nets have different scales, and a single large value would press all others to zero.
    """
    magnitude = np.abs(map)
    limit = np.percentile(magnitude, PERCENTILE) or magnitude.max()  # where almost everything is 0
    return np.clip(map / (limit or 1.0), -1.0, 1.0)


def ssim(a: np.ndarray, b: np.ndarray, window: int = 5) -> float:
    """Structural similarity (Wang et al., 2004) of two maps (H, W), each ``scaled``; data range 1.

    If one of them is signed, both are shifted from -1 .. 1 to 0 .. 1, as their colours are: where the local means
    have opposite signs, SSIM would take the opposite of a map for the map itself.
    """
    a, b, signed = scaled(a), scaled(b), is_signed(a) or is_signed(b)
    a, b = ((m + 1) / 2 if signed else m for m in (a, b))
    return float(structural_similarity(a, b, win_size=window, data_range=1.0))


def ssim_released(a: np.ndarray, b: np.ndarray, window: int = 5) -> float:
    """Structural similarity as the code of InputIBA computes it, on unscaled maps in 256 steps.

    The maps are 8-bit pictures or floats in 0 .. 1; NaN for other floats, which that code refuses or which would wrap
    around (-0.01 becomes 254).
    """
    if any(m.dtype != np.uint8 and (m.min() < 0 or m.max() > 1) for m in (a, b)):
        return math.nan
    a, b = (m if m.dtype == np.uint8 else (m * 255).astype(np.uint8) for m in (a, b))
    return float(structural_similarity(a, b, win_size=window, data_range=255))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two maps of one shape; ties share their mean rank. NaN where one of them is constant."""
    x, y = (rankdata(m.ravel()) for m in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm else math.nan


def hog(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the histograms of oriented gradients of two maps (H, W), each ``scaled``.

    Cells of 16 x 16 pixels as in Adebayo et al.; in small maps, of a quarter of the shorter side. NaN if a histogram
    is constant.
    """
    side = max(1, min(16, *(length // 4 for length in a.shape)))
    x, y = (
        histograms(scaled(m), pixels_per_cell=(side, side), cells_per_block=(min(3, m.shape[0] // side),) * 2)
        for m in (a, b)
    )
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm else math.nan


MEASURES: Mapping[str, str] = {
    "spearman": "rank correlation of the values",
    "spearman_abs": "rank correlation of the magnitudes",
    "ssim": "structural similarity of the values",
    "ssim_abs": "structural similarity of the magnitudes",
    "hog": "correlation of the histograms of oriented gradients",
}
OF_IMAGES = ("ssim", "ssim_abs", "hog")


@dataclass(frozen=True)
class Agreement:
    """Which measures of agreement are computed for two maps.

    measures      names from ``MEASURES``; those for images are left out for texts and sounds
    window        side of SSIM's window, in pixels
    as_released   compute SSIM as InputIBA's code does, for maps in 0 .. 1
    """

    NAME: ClassVar[str] = "attrib.sanity.measures.Agreement"
    VERSION: ClassVar[int] = 1

    measures: tuple[str, ...] = ("spearman", "spearman_abs", "ssim", "ssim_abs")
    window: int = 5
    as_released: bool = False

    def __post_init__(self) -> None:
        for name in self.measures:
            if name not in MEASURES:
                raise UserError(f"sanity.measures: no measure {name!r}; there are {', '.join(MEASURES)}")
        if not self.measures:
            raise UserError(f"sanity.measures is empty; there are {', '.join(MEASURES)}")
        if self.window < 3 or self.window % 2 == 0:
            raise UserError(f"sanity.window must be odd and at least 3, not {self.window}")

    def of(self, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        """The agreement of two maps of one shape, (H, W), (T,) or (L,). NaN where a measure is not defined.

        Raises UserError if the shapes differ, or an image is smaller than the window.
        """
        if a.shape != b.shape:
            raise UserError(f"maps of {a.shape} and {b.shape} cannot be compared: explain both at one model.input.size")
        image = a.ndim == 2
        structural = ssim_released if self.as_released else ssim
        if image and min(a.shape) < self.window and {"ssim", "ssim_abs"} & set(self.measures):
            raise UserError(f"maps of {a.shape} are smaller than sanity.window={self.window}")
        every: dict[str, Measure] = {
            "spearman": spearman,
            "spearman_abs": lambda a, b: spearman(np.abs(a), np.abs(b)),
            "ssim": lambda a, b: structural(a, b, self.window),
            "ssim_abs": lambda a, b: structural(np.abs(a), np.abs(b), self.window),
            "hog": hog,
        }
        if not self.as_released:  # that truncates numbers, so its result depends on the precision
            a, b = a.astype(np.float64), b.astype(np.float64)
        return {name: every[name](a, b) for name in self.measures if image or name not in OF_IMAGES}
