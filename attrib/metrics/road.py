"""ROAD: what the net still recognises when pixels are replaced by what their neighbours suggest."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import ranks, target_score
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

# A pixel without a value is the mean of its neighbours: 1/6 for those at its sides, 1/12 for those at its corners.
_NEIGHBOURS = tuple(
    (row, column, (1 if row and column else 2) / 12)
    for row in (-1, 0, 1)
    for column in (-1, 0, 1)
    if row or column
)  # fmt: skip
_LEAF = 16  # a part of the grid with at most so many pixels is not divided further


@dataclass(frozen=True)
class ROAD(Metric):
    """Remove and debias (Rong, Leemann, Borisov, Kasneci & Kasneci, *A Consistent and Efficient Evaluation Strategy
    for Attribution Methods*, ICML 2022), with its noisy linear imputation, weights as in the released program.

    A share of the pixels goes, the most relevant first (MoRF) or the least relevant first (LeRF), and is filled in
    by linear imputation: each such pixel is the weighted mean of its eight neighbours, 1/6 of those at its
    sides and 1/12 of those at its corners, which themselves may be unknown (a sparse linear system; at the image's
    border, of the neighbours there are), and noise is added. So the mask itself gives little away about the class.

        morf_accuracy     1 where the target is still the net's first choice, else 0, the mean over the shares;
                          the mean over samples is what the paper shows for each share (the curves)
        morf_probability  softmax of the target in its place, which tells more of a single sample
        lerf_...          the same, the least relevant first
        road, road_probability   lerf - morf; pytorch-grad-cam's ROADCombined takes half of such a difference

    shares   of the pixels that go, each in (0, 1), rounded down; at least one pixel goes, and one stays
    noise    standard deviation, as a share of the input's range (largest minus smallest number): the paper's 0.01
             for images in 0 .. 1. One draw for a sample, the same for all shares, both orders and all maps

    Several labels: of the positive ones, the share with a positive logit, and the mean probability. Equal values
    are ordered by the sample's own stream, see ``perturb.ranks``; LeRF is the reverse of MoRF. A map with NaN or
    infinite values: NaN. The released program removes, with LeRF and share p, the share 1 - p; here p goes in both.

    Costs two forward passes a share, and as many solutions of a system of up to H W unknowns on the CPU, in
    double precision, by as many threads as torch has: see ``Imputer``.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), ROAD())
    >>> list(rows["column"])
    ['road', 'morf_accuracy', 'lerf_accuracy', 'road_probability', 'morf_probability', 'lerf_probability']
    """

    NAME: ClassVar[str] = "attrib.metrics.road.ROAD"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    COLUMNS: ClassVar[Mapping[str, Direction]] = {
        "road": "higher", "morf_accuracy": "lower", "lerf_accuracy": "higher",
        "road_probability": "higher", "morf_probability": "lower", "lerf_probability": "higher",
    }  # fmt: skip
    ABOUT: ClassVar[Mapping[str, str]] = {
        "road": "lerf_accuracy - morf_accuracy: how much more harm it does to remove what is relevant",
        "morf_accuracy": "how often the target is recognised after the most relevant pixels were removed and filled in",
        "lerf_accuracy": "the same, the least relevant pixels first",
        "road_probability": "lerf_probability - morf_probability: the same of the target's probability",
        "morf_probability": "mean probability of the target after the most relevant pixels were removed and filled in",
        "lerf_probability": "the same, the least relevant pixels first",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        f"{order}_{what}_curve": f"x: the shares of pixels imputed, {first} relevant first; y: {y}"
        for order, first in (("morf", "most"), ("lerf", "least"))
        for what, y in (("accuracy", "1 if the target is recognised"), ("probability", "probability of the target"))
    }
    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = dict.fromkeys(CURVES, (0.0, 1.0))

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    noise: float = 0.01

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError(f"ROAD.shares is {list(self.shares)}, must be one or more shares of the pixels, in (0, 1)")
        require(self, "noise", at_least=0)

    def counts(self, pixels: int) -> list[int]:
        """How many pixels go."""
        # 1e-9, because 0.29 * 100 is below 29.
        return [min(max(1, int(share * pixels + 1e-9)), pixels - 1) for share in self.shares]

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W) -> six columns (B,), four curves (B, shares), float64 on the model's device.

        Raises ValueError if the map does not fit the images, or these have a single pixel.
        """
        if batch.x.ndim != 4 or map.shape != (len(batch), *batch.x.shape[2:]) or map[0].numel() < 2:
            raise ValueError(f"ROAD: a map of shape {tuple(map.shape)} does not fit images {tuple(batch.x.shape)}")
        rank = ranks(map.detach(), noise.child("ties")).cpu().numpy()
        defined = map.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        x = batch.x.detach().cpu().double()
        low, high = x.flatten(1).aminmax(dim=1)
        filled = self.noise * (high - low)[:, None, None, None] * noise.normal(*x.shape[1:]).cpu().double()

        counts, pixels = self.counts(map[0].numel()), map[0].numel()
        columns, imputer = 2 * len(counts), Imputer(*x.shape[2:])
        found = torch.full((2, len(batch), columns), torch.nan, dtype=torch.float64, device=model.device)

        def image(row: tuple[int, int]) -> Tensor:
            sample, column = row
            count = counts[column % len(counts)]
            gone = rank[sample] < count if column < len(counts) else rank[sample] >= pixels - count
            made = torch.from_numpy(imputer(x[sample].numpy(), gone))
            return (made + filled[sample] * torch.from_numpy(gone)).to(model.dtype)

        target, blocks, start = batch.target.to(model.device)[defined].repeat_interleave(columns, 0), [], 0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            while start < len(defined):
                # As many samples as fill a block; all their images wait in memory.
                stop = min(len(defined), start + max(1, model.rows // columns))
                rows = [(sample, column) for sample in defined[start:stop] for column in range(columns)]
                images = torch.stack(list(pool.map(image, rows)))
                blocks.append(recognised(model, images, target[start * columns : stop * columns]))
                start = stop
        if blocks:
            found[:, defined] = torch.cat(blocks).T.view(2, len(defined), columns)

        curves = {}
        for what, values in zip(("accuracy", "probability"), found, strict=True):
            curves[f"morf_{what}_curve"], curves[f"lerf_{what}_curve"] = values.chunk(2, dim=1)
        scores = {name.removesuffix("_curve"): curve.mean(1) for name, curve in curves.items()}
        for name, what in (("road", "accuracy"), ("road_probability", "probability")):
            scores[name] = scores[f"lerf_{what}"] - scores[f"morf_{what}"]
        return scores | curves


@torch.no_grad()
def recognised(model: Classifier, images: Tensor, target: Tensor) -> Tensor:
    """(N, *input) -> (N, 2): whether the target is the first choice, and its probability."""

    def both(rows: slice) -> Tensor:
        # A copy, because a net may change what it is given, and a block without memory is tried again.
        logits, wanted = model(images[rows].to(model.device, copy=True)).double(), target[rows]
        if wanted.ndim == 1:
            first = (logits.argmax(1) == wanted).double()
        else:
            positive = wanted > 0
            first = ((logits > 0) & positive).sum(1) / positive.sum(1).double()
        return torch.stack((first, target_score(logits, wanted, "probability", model.link)), 1)

    return model.chunked(both, len(images))


class Imputer:
    """Linear imputation of images of one size.

    The unknowns are eliminated in the order of a nested dissection of the grid (George, *Nested dissection of a
    regular finite element mesh*, 1973): by halves, and the line between them last, so that the factors stay sparse,
    whatever part of the grid is unknown. The system is symmetric and diagonally dominant: no pivoting.
    """

    def __init__(self, height: int, width: int) -> None:
        self._order = np.concatenate(_dissected(np.arange(height * width).reshape(height, width)))

    def __call__(self, x: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """(C, H, W) float64 and which pixels are gone, (H, W) bool, not all -> (C, H, W), a copy."""
        from scipy import sparse  # takes a quarter of a second to import
        from scipy.sparse import linalg

        height, width = gone.shape
        pixels = self._order[gone.ravel()[self._order]]
        n = len(pixels)
        number = np.full((height + 2, width + 2), -2)  # of an unknown; -1: known, -2: outside
        inner = np.full(gone.size, -1)
        inner[pixels] = np.arange(n)
        number[1:-1, 1:-1] = inner.reshape(gone.shape)
        number, values = number.ravel(), np.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(len(x), -1)

        here = (pixels // width + 1) * (width + 2) + pixels % width + 1
        diagonal, right = np.zeros(n), np.zeros((n, len(x)))
        entries = []
        for row, column, weight in _NEIGHBOURS:
            there = here + row * (width + 2) + column
            other = number[there]
            diagonal += weight * (other > -2)
            known, unknown = np.flatnonzero(other == -1), np.flatnonzero(other >= 0)
            right[known] += weight * values[:, there[known]].T
            entries.append((np.full(len(unknown), -weight), unknown, other[unknown]))
        entries.append((diagonal, np.arange(n), np.arange(n)))
        data, rows, columns = (np.concatenate(part) for part in zip(*entries, strict=True))
        system = sparse.csc_matrix((data, (rows, columns)), shape=(n, n))
        factors = linalg.splu(system, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        made = x.reshape(len(x), -1).copy()
        made[:, pixels] = factors.solve(right).T
        return made.reshape(x.shape)


def _dissected(grid: np.ndarray) -> list[np.ndarray]:
    """The numbers in a grid (h, w), the line that halves it last."""
    if grid.size <= _LEAF:
        return [grid.ravel()]
    if len(grid) < grid.shape[1]:
        grid = grid.T
    middle = len(grid) // 2
    return [*_dissected(grid[:middle]), *_dissected(grid[middle + 1 :]), grid[middle]]
