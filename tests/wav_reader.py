"""The reader of WAV files that attrib had before it read sounds by libsndfile: what the new one must agree with."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

SLOWEST, FASTEST = 100, 768_000  # samples a second; a damaged header may claim anything
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_ENDLESS = 0xFFFFFFFF  # what a program writes that does not know how long its stream will be


class Sound(NamedTuple):
    """samples (n,) float64, one channel, full scale is -1 .. 1; rate in samples per second."""

    samples: np.ndarray
    rate: int


def read_wav(data: bytes) -> Sound:
    """The sound of a WAV file, channels averaged.

    Raises ValueError that says what is wrong with it.
    """
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("empty, damaged or not a WAV file")
    form: tuple[int, int, int, int] | None = None  # tag, channels, rate, bits
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"fmt ":
            form = _format(data[at : at + size])
        elif name == b"data":
            if form is None:
                raise ValueError("sound before its format")
            if size != _ENDLESS and at + size > len(data):
                raise ValueError(f"cut short: {len(data) - at} of {size} bytes of sound")
            return Sound(_samples(data[at : at + size], *form), form[2])
        at += size + size % 2
    raise ValueError("no sound in it")


def _format(chunk: bytes) -> tuple[int, int, int, int]:
    if len(chunk) < 16:
        raise ValueError("damaged format")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == _EXTENSIBLE and len(chunk) >= 26:
        (tag,) = struct.unpack_from("<H", chunk, 24)
    if (tag, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        raise ValueError(f"{bits} bits of format {tag}; convert it to PCM of 8, 16, 24 or 32 bits")
    if not channels or not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"damaged format: {channels} channels, {rate} samples a second")
    return tag, channels, rate, bits


def _samples(data: bytes, tag: int, channels: int, rate: int, bits: int) -> np.ndarray:
    frames = len(data) // (channels * bits // 8)
    if not frames:
        raise ValueError("no sound in it")
    data = data[: frames * channels * bits // 8]
    if tag == _FLOAT:
        values = np.frombuffer(data, f"<f{bits // 8}").astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("NaN or infinite samples")
    elif bits == 8:  # the only ones without a sign
        values = (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    elif bits == 24:
        bytes_ = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = (np.pad(bytes_, ((0, 0), (1, 0))).view("<i4")[:, 0] >> 8) / 2.0**23
    else:
        values = np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)
    return values.reshape(frames, channels).mean(1)
