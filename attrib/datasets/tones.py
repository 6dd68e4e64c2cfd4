"""Generated sounds: one event tells the class, and the interval in which it sounds is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from attrib.datasets.arrays import check_split
from attrib.datasets.audio import AudioDataset, Input, Interval
from attrib.datasets.sound import Sound
from attrib.noise import Noise
from attrib.types import UserError

COUNTS = {"train": 3000, "val": 600, "test": 600}  # clips of a split
RATE = 8000  # samples per second
LENGTH = 4096  # samples of a clip
LEVEL = 0.1  # root mean square of every event and distractor: loudness tells nothing
FADE = 40  # samples in which a sound comes and goes, 5 ms; else its edges would click

_Event = Callable[[np.ndarray, float], np.ndarray]  # seconds (n,), a pitch in Hz -> (n,)


def _sine(cycles: np.ndarray) -> np.ndarray:
    return np.sin(2 * math.pi * cycles)


def _rising(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * (t + t**2 / (2 * t[-1])))  # one octave


def _falling(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * (2 * t - t**2 / (2 * t[-1])))


def _tremolo(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * t) * (1 - np.cos(2 * math.pi * 50 * t))


def _trill(t: np.ndarray, pitch: float) -> np.ndarray:
    high = (t * 60).astype(int) % 2 == 1  # every note 1/60 s
    return _sine(np.cumsum(np.where(high, 1.5, 1.0) * pitch) / RATE)


def _chord(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * t) + _sine(1.5 * pitch * t)


def _clicks(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * t) * np.exp(-(t % 0.0125) / 0.001)  # 80 a second


def _steady(t: np.ndarray, pitch: float) -> np.ndarray:
    return _sine(pitch * t)


def _played(noise: np.ndarray) -> _Event:
    """A burst of noise, which has no pitch."""
    return lambda t, pitch: noise[: len(t)]


EVENTS: Mapping[str, _Event] = {
    "rising": _rising,
    "falling": _falling,
    "tremolo": _tremolo,
    "trill": _trill,
    "chord": _chord,
    "clicks": _clicks,
}


class Parts(NamedTuple):
    """What a clip is the sum of, (n,) float64 each, and the samples ``start`` .. ``end - 1`` where the event sounds."""

    event: np.ndarray
    distractors: np.ndarray
    hiss: np.ndarray
    start: int
    end: int


class Tones(AudioDataset):
    """Clips of half a second: an event of one of six kinds, sounds that mean nothing, and white noise.

    The clip is cut into ``distractors + 1`` slots of time. A random one holds the event, each of the others a
    distractor: a steady tone or a burst of noise, of the same loudness, the same pitches and the same durations
    as events, drawn alike for every class. So only the event tells the class, and its interval, which is the
    region of interest, says exactly where the evidence is.

    split         "train", "val" or "test", with uids, and so random streams, of their own
    distractors   how many, at least 0
    noise         root mean square of the white noise; events have 0.1
    seed          of everything random

    Clips are made at 8 kHz, as 16-bit numbers, one by one when they are asked for.
    """

    def __init__(
        self,
        transform: Input,
        split: Literal["train", "val", "test"] = "test",
        distractors: int = 3,
        noise: float = 0.02,
        seed: int = 0,
    ) -> None:
        check_split(split)
        if not 0 <= distractors <= 7:
            raise UserError(f"dataset.distractors is {distractors}, must lie between 0 and 7")
        if noise < 0:
            raise UserError(f"dataset.noise is {noise}, must not be negative")
        self._distractors, self._noise, self._seed = distractors, noise, seed
        self._slot = LENGTH // (distractors + 1)
        uids = [f"{split}/{i:05d}" for i in range(COUNTS[split])]
        self._labels = {uid: i % len(EVENTS) for i, uid in enumerate(uids)}
        super().__init__(uids, transform, dict(enumerate(EVENTS)), marked=True, about=[distractors, noise, seed])

    def label(self, uid: str) -> int:
        return self._labels[uid]

    def parts(self, uid: str) -> Parts:
        """The clip before its parts are added."""
        random = Noise([uid], self._seed).child("tones")
        slots = random.permutation(self._distractors + 1)[0].tolist()
        drawn = random.uniform(self._distractors + 1, 4)[0].tolist()
        hiss = self._noise * random.normal(LENGTH)[0].double().numpy()
        burst = random.child("bursts").normal(self._distractors, LENGTH)[0].double().numpy()
        event, distractors = np.zeros(LENGTH), np.zeros(LENGTH)
        start, end = self._place(slots[0], *drawn[0][:2])
        event[start:end] = _shaped(list(EVENTS.values())[self.label(uid)], end - start, drawn[0][2])
        for i, (slot, (long, where, pitch, kind)) in enumerate(zip(slots[1:], drawn[1:], strict=True)):
            left, right = self._place(slot, long, where)
            distractors[left:right] = _shaped(_steady if kind < 0.5 else _played(burst[i]), right - left, pitch)
        return Parts(event, distractors, hiss, start, end)

    def _place(self, slot: int, long: float, where: float) -> tuple[int, int]:
        """First sample of a sound in its slot, and the one behind its last: 70 to 95 % of the slot, at most 0.15 s."""
        size = int(min(self._slot * (0.7 + 0.25 * long), 0.15 * RATE))
        start = slot * self._slot + int((self._slot - size) * where)
        return start, start + size

    def sound(self, uid: str) -> Sound:
        parts = self.parts(uid)
        return Sound(_sixteen_bits(parts.event + parts.distractors + parts.hiss), RATE)

    def intervals(self, uid: str) -> tuple[Interval, ...]:
        parts = self.parts(uid)
        return (Interval(parts.start / RATE, parts.end / RATE),)


def _shaped(make: _Event, size: int, pitch: float) -> np.ndarray:
    """``size`` samples at the common loudness that fade in and out; ``pitch`` in [0, 1) is one of 500 .. 1200 Hz."""
    made = make(np.arange(size) / RATE, 500 * 2.4**pitch)
    fade = np.minimum(1.0, np.minimum(np.arange(size) + 0.5, size - 0.5 - np.arange(size)) / FADE)
    made = made * fade
    return made * (LEVEL / math.sqrt(np.mean(made**2)))


def _sixteen_bits(wave: np.ndarray) -> np.ndarray:
    """Rounded as in a WAV file, so that sines that differ in their last bits between machines make the same clip."""
    return np.rint(np.clip(wave, -1, 1) * 32767) / 32768
