"""Recordings as numbers, by libsndfile (``soundfile``): WAV, FLAC, OGG, MP3."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np

SLOWEST, FASTEST = 100, 768_000  # samples a second; a damaged header may claim anything
_ENDLESS = 0xFFFFFFFF  # what a program writes that does not know how long its stream will be


class Sound(NamedTuple):
    """samples (n,) float64, one channel, full scale is -1 .. 1; rate in samples per second."""

    samples: np.ndarray
    rate: int


def read_sound(data: bytes) -> Sound:
    """The sound of a file, channels averaged.

    Raises ValueError that says what is wrong with it.
    """
    import soundfile  # loads a library, which other data do not need

    _check_whole(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, promised = file.samplerate, file.frames
            if not SLOWEST <= rate <= FASTEST:
                raise ValueError(f"damaged format: {file.channels} channels, {rate} samples a second")
            values = file.read(dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = getattr(error, "error_string", error)  # without the name of the stream
        raise ValueError(f"empty, damaged or not a sound that libsndfile knows ({reason})") from error
    if len(values) < promised:
        raise ValueError(f"cut short: {len(values)} of {promised} samples of sound")
    if not len(values):
        raise ValueError("no sound in it")
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinite samples")
    return Sound(values.mean(1), rate)


def _check_whole(data: bytes) -> None:
    """libsndfile takes a WAV file that is cut short for a shorter one. Raises ValueError."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"data":
            if size != _ENDLESS and at + size > len(data):
                raise ValueError(f"cut short: {len(data) - at} of {size} bytes of sound")
            return
        at += size + size % 2
