"""Perturbed copies of inputs, made and scored in blocks: the engine of the perturbation metrics.

A metric describes its perturbed images by one function of (sample, column); ``score_grid`` calls it
for at most ``model.rows`` images at a time, so that memory does not grow with the number of columns.
``score_rows`` does the same for any list of rows; ``words`` makes those of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from attrib.models import Classifier
from attrib.noise import Noise

Baseline = Literal["zero", "blur", "mean"]
Output = Literal["probability", "logit"]
BASELINES: tuple[str, ...] = get_args(Baseline)
OUTPUTS: tuple[str, ...] = get_args(Output)


def ranks(map: Tensor, noise: Noise, ragged: bool = False) -> Tensor:
    """(B, *spatial) -> int64 of the same shape: 0 for the sample's largest value, then 1, 2, ...

    Equal values are ordered by a random permutation from the sample's own stream, so that ties
    favour no position, and the order is the same for every map of a sample, alone or in a batch.
    ``ragged``: values of -inf behind a sample's own ones do not change the order of these.
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
          (None: ``blur_kernel``), mirrored at the border; of sounds, in samples: a low-pass

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
    if x.ndim == 3:
        return gaussian_blur(x.unsqueeze(2), [side, 1], [sigma, sigma]).squeeze(2)
    return gaussian_blur(x, [side, side], [sigma, sigma])


def target_score(logits: Tensor, target: Tensor, output: Output) -> Tensor:
    """(R, K) logits and the target's (R,) class or (R, K) labels -> (R,) float64.

    One class: its softmax probability, or its logit. Several labels: the mean over the positive
    ones of their sigmoid probability (labels do not compete), or logit; NaN where none is positive.
    """
    logits = logits.to(torch.float64)
    if target.ndim == 1:
        scores = logits.softmax(dim=1) if output == "probability" else logits
        return scores.gather(1, target.long()[:, None]).squeeze(1)
    scores = logits.sigmoid() if output == "probability" else logits
    positive = target > 0
    return (scores * positive).sum(dim=1) / positive.sum(dim=1)


@torch.no_grad()
def score_rows(
    model: Classifier,
    target: Tensor,
    sample: Tensor,
    logits: Callable[[slice], Tensor],
    output: Output = "probability",
) -> Tensor:
    """The target's score of N perturbed rows, of which row i was made from sample ``sample[i]``: (N,) float64.

    ``logits(rows)`` makes a block of at most ``model.rows`` rows on the model's device and returns
    what the net says about them, (R, K). A block that runs out of memory is made again, smaller.
    """
    target = target.to(model.device)
    if len(sample) == 0:
        return torch.zeros(0, dtype=torch.float64, device=model.device)
    return model.chunked(lambda rows: target_score(logits(rows), target[sample[rows]], output), len(sample))


def score_grid(
    model: Classifier,
    target: Tensor,
    columns: int,
    images: Callable[[Tensor, Tensor], Tensor],
    output: Output = "probability",
) -> Tensor:
    """The target's score of a B x ``columns`` grid of perturbed images: (B, columns) float64.

    ``images(sample, column)`` gets two index vectors (R,), R at most ``model.rows``, on the model's
    device, and returns the images (R, *input). The grid runs on over the samples, so that all
    blocks but the last are full.
    """
    row = torch.arange(len(target) * columns, device=model.device)
    sample, column = row // columns, row % columns
    scores = score_rows(model, target, sample, lambda r: model.module(images(sample[r], column[r])), output)
    return scores.view(len(target), columns)
