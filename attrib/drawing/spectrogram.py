"""Pictures of sounds: a spectrogram, and below it the map's values over time."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attrib.drawing import pictures

SIZE = (150, 224)  # height and width in pixels
STRIP = 48  # rows of them for the map, below the spectrogram
GAP = 2
DECIBELS = 60.0  # what lies further below the loudest is black
WINDOW = 0.02  # seconds of each spectrum


def draw(
    wave: np.ndarray,
    rate: int,
    map: np.ndarray | None = None,
    roi: np.ndarray | None = None,
    signed: bool | None = None,
    size: tuple[int, int] = SIZE,
) -> np.ndarray:
    """A sound ``wave`` (L,) with ``rate`` samples a second -> (H, W, 3) uint8, time from left to right.

    Above, grey, the spectrogram, low pitches at the bottom. Below, a bar for each column of pixels: up in the
    colours of positive values the mean of ``map`` (L,) over its moments, counting positive values only, and down
    that of the negative ones. The gradient of a sound changes its sign with every swing of the wave, so that a
    mean over both signs would be close to 0. Without a map the strip shows the wave itself. ``roi`` (L,) bool is
    outlined.

    Raises ValueError for other shapes.
    """
    wave = np.asarray(wave, dtype=np.float64)
    if wave.ndim != 1:
        raise ValueError(f"a sound is (L,), not of shape {wave.shape}")
    for name, array in (("map", map), ("roi", roi)):
        if array is not None and np.shape(array) != wave.shape:
            raise ValueError(f"a {name} of shape {np.shape(array)} does not fit a sound of shape {wave.shape}")
    height, width = size
    above = np.repeat(_bytes(spectrogram(wave, rate, (height - STRIP - GAP, width)))[..., None], 3, axis=2)
    if roi is not None:
        columns = _columns(np.asarray(roi, dtype=np.float64), width) >= 0.5
        above = pictures.outlined(above, np.broadcast_to(columns, above.shape[:2]))
    below = _swing(wave, width) if map is None else _bars(np.asarray(map), width, signed)
    return np.concatenate((above, np.full((GAP, width, 3), 128, np.uint8), below))


def spectrogram(wave: np.ndarray, rate: int, size: tuple[int, int]) -> np.ndarray:
    """(L,) -> (H, W) in 0 .. 1: decibels below the loudest, the highest pitch, rate / 2, in the first row."""
    from scipy import signal  # takes a second to import

    window = int(np.clip(WINDOW * rate, 16, max(16, len(wave))))
    hop = max(1, min(window // 2, len(wave) // size[1]))
    framed = np.pad(wave, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(framed, window)[: len(wave) : hop]
    power = np.abs(np.fft.rfft(frames * signal.windows.hann(window), 2 * window, axis=1)) ** 2
    loudest = power.max()
    decibels = 10 * np.log10(np.maximum(power / loudest, 1e-12)) if loudest > 0 else np.full(power.shape, -DECIBELS)
    grey = np.clip(1 + decibels / DECIBELS, 0, 1).T[::-1]
    return np.asarray(Image.fromarray(grey.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))


def moments(map: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(L,) -> the means of what is positive and of what is negative in it, over equal parts of time: (W,) >= 0 each."""
    values = np.nan_to_num(np.asarray(map, dtype=np.float64), posinf=0.0, neginf=0.0)
    return _columns(np.maximum(values, 0), width), _columns(np.maximum(-values, 0), width)


def _columns(values: np.ndarray, width: int) -> np.ndarray:
    """(L,) -> (W,): means over equal parts; where there are fewer numbers than parts, each number several times."""
    edges = np.linspace(0, len(values), width + 1)
    first = np.minimum(edges[:-1].astype(int), len(values) - 1)
    last = np.maximum(np.ceil(edges[1:]).astype(int), first + 1)
    total = np.concatenate(([0.0], values.cumsum()))
    return (total[last] - total[first]) / (last - first)


def limit(map: np.ndarray, width: int = SIZE[1]) -> float:
    """The number that the longest bar stands for."""
    return float(max(np.max(part) for part in moments(map, width)))


def _bars(map: np.ndarray, width: int, signed: bool | None) -> np.ndarray:
    """(L,) -> (STRIP, W, 3) uint8."""
    signed = pictures.is_signed(map) if signed is None else signed
    up, down = moments(map, width)
    longest = limit(map, width) or 1.0
    # The height at the middle of each row, in bars' lengths; above 0 the first half of a signed strip.
    rows = np.linspace(1, -1 if signed else 0, 2 * STRIP + 1)[1::2, None]
    filled = (rows > 0) & (rows < up / longest) | (rows < 0) & (-rows < down / longest)
    colours = np.where(rows > 0, up / longest, -down / longest) if signed else up / longest * np.ones_like(rows)
    painted = pictures.coloured(colours, signed)
    return np.where(filled[..., None], painted, np.uint8(255 if signed else 0))


def _swing(wave: np.ndarray, width: int) -> np.ndarray:
    """The wave's outline, (STRIP, W, 3) uint8."""
    up, down = (np.sqrt(2 * part) for part in moments(np.sign(wave) * wave**2, width))
    longest = max(up.max(), down.max()) or 1.0
    rows = np.linspace(1, -1, 2 * STRIP + 1)[1::2, None]
    filled = (rows < up / longest) & (rows > -down / longest)
    return np.where(filled[..., None], np.uint8(70), np.full(3, 255, np.uint8))


def _bytes(unit: np.ndarray) -> np.ndarray:
    return (np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)
