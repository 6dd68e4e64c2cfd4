"""Perturbed copies of inputs, made and scored in blocks: the engine of the perturbation metrics.

A metric describes its perturbed images by one function of (sample, column); ``score_grid`` calls it
for at most ``model.rows`` images at a time, so that memory does not grow with the number of columns.
``score_mixed`` and ``score_path`` are faster where every image is made of two; ``score_rows`` takes any list
of rows; ``words`` makes those of texts.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.models import Classifier, ScoreScale, precision, probabilities
from attrib.models.output_kind import Link
from attrib.noise import Noise
from attrib.types import Batch

Baseline = Literal["zero", "blur", "mean"]
BASELINES: tuple[str, ...] = get_args(Baseline)
OUTPUTS: tuple[str, ...] = get_args(ScoreScale)
SMALL = 2**14  # numbers in an image; a CPU makes smaller images faster as a whole than from the image before


def ranks(map: Tensor, noise: Noise, ragged: bool = False) -> Tensor:
    """(B, *spatial) -> int64 of the same shape: 0 for the sample's largest value, then 1, 2, ...

    Equal values are ordered by a random permutation from the sample's own stream, so that ties
    favour no position, and the order is the same for every map of a sample, alone or in a batch.
    ``ragged``: -inf appended to a sample's values, as padding, does not change the order of the values before.
    """
    values = map.flatten(1)
    shuffle = noise.permutation(values.shape[1], ragged).to(map.device)
    order = shuffle.gather(1, values.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))
    place = torch.arange(values.shape[1], device=map.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).view(map.shape)


def tiles(map: Tensor, side: int) -> Tensor:
    """(B, *spatial) -> (B, *fewer): the mean over each tile of ``side`` places a side, fewer at the far edges.

    A tile of a sound is a window of time.
    """
    if side == 1:
        return map
    pool, sides = F.avg_pool1d if map.ndim == 2 else F.avg_pool2d, [min(side, n) for n in map.shape[1:]]
    return pool(map.unsqueeze(1), sides, ceil_mode=True).squeeze(1)


def untiled(values: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """(B, *tiles) -> (B, *size): the value of each place's tile."""
    for dim, places in enumerate(size, start=1):
        values = values.repeat_interleave(side, dim).narrow(dim, 0, places)
    return values


def blur_kernel(sigma: float) -> int:
    """Side of the blur's window, in pixels, that the released InputIBA code takes: 2 sigma - 1, made odd."""
    return max(int(2 * sigma - 1), 1) | 1


def baseline(x: Tensor, kind: Baseline, sigma: float = 5.0, kernel: int | None = None) -> Tensor:
    """What removed pixels of ``x`` (B, C, H, W), or samples of sounds (B, C, L), are replaced with; same shape.

    zero  0 of the normalised input: the colour that the normalisation subtracts, silence
    mean  the input's own mean per channel
    blur  Gaussian of standard deviation ``sigma`` pixels in a window of ``kernel`` pixels
          (None: ``blur_kernel``), mirrored at the border; of sounds, in samples: a low-pass filter

    Raises ValueError if the window is wider than the input can be mirrored.
    """
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "mean":
        return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True).expand_as(x)
    if kind != "blur":
        raise ValueError(f"unknown baseline {kind!r}, must be one of {', '.join(BASELINES)}")
    side = blur_kernel(sigma) if kernel is None else kernel
    if side // 2 >= min(x.shape[2:]):
        raise ValueError(f"a blur window of {side} pixels does not fit an input of {tuple(x.shape[2:])}")
    from torchvision.transforms.functional import gaussian_blur  # takes seconds to import

    if x.ndim == 3:
        return gaussian_blur(x.unsqueeze(2), [side, 1], [sigma, sigma]).squeeze(2)
    return gaussian_blur(x, [side, side], [sigma, sigma])


def target_score(logits: Tensor, target: Tensor, output: ScoreScale, link: Link | None = "softmax") -> Tensor:
    """(R, K) logits and the target's (R,) class or (R, K) labels -> (R,) float64; ``link`` is ``Classifier.link``.

    One class: its probability, or its logit. Several labels: the mean over the positive ones of their
    sigmoid probability (labels do not compete), or logit; NaN where none is positive. A contrast, in which another
    class is -1: the difference of the two logits.
    """
    logits = logits.to(torch.float64)
    if target.ndim == 1:
        scores = probabilities(logits, link=link) if output == "probability" else logits
        return scores.gather(1, target.long()[:, None]).squeeze(1)
    scores = probabilities(logits, True, link) if output == "probability" else logits
    positive = target > 0
    return (scores * target.sign()).sum(dim=1) / positive.sum(dim=1)


def whole(model: Classifier, batch: Batch) -> Tensor:
    """(B, K) logits of the inputs as they are; a metric that asks for them says so with NEEDS_LOGITS."""
    return model.logits(batch.to(model.device, model.dtype).x) if batch.logits is None else batch.logits


def own_score(model: Classifier, batch: Batch, chosen: Tensor, output: ScoreScale = "probability") -> Tensor:
    """(R,) float64: the target's score of the inputs ``chosen`` (R,) as they are, of which there may be none."""
    target = batch.target.to(model.device)[chosen]
    if batch.logits is not None:
        return target_score(batch.logits[chosen], target, output, model.link)
    x = batch.to(model.device, model.dtype).x[chosen]
    return score_rows(model, target, torch.arange(len(x), device=x.device), lambda rows: model(x[rows].clone()), output)


def rounding(model: Classifier, logits: Tensor, score: Tensor, output: ScoreScale) -> Tensor:
    """How far ``score`` (B, S), of B inputs and copies of them, may be off because the net rounds: (B, S) float64.

    ``logits`` (B, K) are those of the inputs. A quotient by differences of scores that are no larger than this says
    how the net rounds, and nothing of the input. Probabilities near 0 and 1 are better known than those between.
    """
    size = logits.double().abs().amax(1, keepdim=True) * precision.rounding(model.dtype, model.precision)
    if output == "probability":
        size = size * score * (1 - score)
    return size + 16 * torch.finfo(torch.float64).eps * score.abs()


@torch.no_grad()
def score_rows(
    model: Classifier,
    target: Tensor,
    sample: Tensor,
    logits: Callable[[slice], Tensor],
    output: ScoreScale = "probability",
) -> Tensor:
    """The target's score of N perturbed rows, of which row i was made from sample ``sample[i]``: (N,) float64.

    ``logits(rows)`` makes a block of at most ``model.rows`` rows on the model's device and returns
    what the net says about them, (R, K). A block that runs out of memory is made again, smaller.
    """
    target = target.to(model.device)
    if len(sample) == 0:
        return torch.zeros(0, dtype=torch.float64, device=model.device)
    return model.chunked(lambda rows: target_score(logits(rows), target[sample[rows]], output, model.link), len(sample))


def score_grid(
    model: Classifier,
    target: Tensor,
    columns: int,
    images: Callable[[Tensor, Tensor], Tensor],
    output: ScoreScale = "probability",
) -> Tensor:
    """The target's score of a B x ``columns`` grid of perturbed images: (B, columns) float64.

    ``images(sample, column)`` gets two index vectors (R,), R at most ``model.rows``, on the model's
    device, and returns the images (R, *input). The grid runs on over the samples, so that all
    blocks but the last are full.
    """
    row = torch.arange(len(target) * columns, device=model.device)
    sample, column = row // columns, row % columns
    scores = score_rows(model, target, sample, lambda r: model(images(sample[r], column[r])), output)
    return scores.view(len(target), columns)


def score_mixed(
    model: Classifier,
    target: Tensor,
    columns: int,
    start: Tensor,
    end: Tensor,
    replaced: Callable[[int, slice], Tensor],
    output: ScoreScale = "probability",
) -> Tensor:
    """``score_grid`` of images that are ``end`` where something is replaced, else ``start``: (B, columns) float64.

    ``start`` and ``end`` are (B, C, *places) on the model's device; ``replaced(i, columns)`` gets the number of a
    sample and a slice of its columns, and says where: (R, 1 or C, *places) bool.
    """

    def make(out: Tensor, i: int, some: slice) -> None:
        torch.where(replaced(i, some), end[i], start[i], out=out)

    return _score_made(model, target, columns, start, make, output)


def score_path(
    model: Classifier,
    target: Tensor,
    start: Tensor,
    end: Tensor,
    rank: Tensor,
    counts: Tensor,
    output: ScoreScale = "probability",
) -> Tensor:
    """The target's score on the way from ``start`` to ``end``, both (B, C, *places): (B, S) float64.

    At point s the places whose ``rank``, (B, *places) integers, is below ``counts[s]``, (S,) in ascending order, are
    those of ``end``. All on the model's device.
    """
    rank, below = rank.flatten(1), counts.to(rank.dtype)
    size = start.shape[2:]

    def replaced(i: int, some: slice) -> Tensor:
        return (rank[i] < below[some, None]).view(-1, 1, *size)

    if start.device.type != "cpu" or start[:1].numel() < SMALL:  # few operations
        return score_mixed(model, target, len(counts), start, end, replaced, output)
    # A CPU copies several times faster than it selects, so an image is a copy of the one before with what is new.
    sorted_rank, order = rank.sort(dim=1)
    reached = torch.searchsorted(sorted_rank, below.expand(len(rank), -1).contiguous()).tolist()

    def make(out: Tensor, i: int, some: slice) -> None:
        torch.where(replaced(i, slice(some.start, some.start + 1)), end[i], start[i], out=out[:1])
        _go_on(out.flatten(2), end[i].flatten(1), order[i], reached[i][some])

    return _score_made(model, target, len(counts), start, make, output)


def _go_on(out: Tensor, end: Tensor, order: Tensor, reached: list[int]) -> None:
    """Fill ``out`` (R, C, N), whose first row is given. Row r is the row before, but for the places
    ``order[reached[r - 1] : reached[r]]``, where it is ``end`` (C, N)."""
    few, row = max(1024, len(order) // 64), 1
    while row < len(out):
        # As many rows at once as differ in few places.
        done = reached[row - 1]
        stop = max(row + 1, bisect.bisect_right(reached, done + few, row))
        new, last = order[done : reached[stop - 1]], out[row - 1]
        out[row:stop] = last
        if len(new):
            gone = torch.arange(done, done + len(new)) < torch.tensor(reached[row:stop])[:, None, None]
            out[row:stop].index_copy_(2, new, torch.where(gone, end[:, new], last[:, new]))
        row = stop


def _score_made(
    model: Classifier,
    target: Tensor,
    columns: int,
    like: Tensor,
    make: Callable[[Tensor, int, slice], None],
    output: ScoreScale,
) -> Tensor:
    """``score_grid``, where ``make(out, i, columns)`` fills ``out`` (R, C, *places) with images of sample i."""
    buffer = like[:0]

    def logits(rows: slice) -> Tensor:
        nonlocal buffer
        # One buffer for all blocks, since getting fresh memory from the system takes time.
        count, row = rows.stop - rows.start, rows.start
        if not count <= len(buffer) < 2 * count:
            buffer = like[:0]  # frees the old one first
            buffer = torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device)
        while row < rows.stop:
            i, column = divmod(row, columns)
            some = min(columns - column, rows.stop - row)
            make(buffer[row - rows.start :][:some], i, slice(column, column + some))
            row += some
        return model(buffer[:count])

    sample = torch.arange(len(target), device=model.device).repeat_interleave(columns)
    return score_rows(model, target, sample, logits, output).view(len(target), columns)
