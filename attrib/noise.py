"""Random numbers that belong to samples: one stream per (seed, uid).

A map must not depend on which other samples share its batch, on the order, on the shard or on
the device. ``torch.Generator`` cannot promise that: CPU and GPU generators give different
numbers, and one generator per sample means one Python call per sample and draw. So the streams
here are counter based: draw number ``c`` of a sample is a hash of (its key, c), computed for all
samples at once with integer tensor operations that are exact on every device.

The hash is SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number generators*,
OOPSLA 2014) with a start and an odd increment per stream, its finaliser being Stafford's
variant 13; it passes BigCrush.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # as signed 64-bit integers; multiplication wraps
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, k: int) -> Tensor:
    """Logical shift: torch's int64 ``>>`` copies the sign bit."""
    return (x >> k).bitwise_and_((1 << (64 - k)) - 1)


class Noise:
    """The random streams of B samples, which advance together.

    Every draw is a tensor (B, *shape) on ``device``; floating-point numbers have ``dtype``. Row i depends
    only on ``seed``, on ``uids[i]`` and on the shapes drawn before.

    Texts are padded to the longest of their batch, which must not change their numbers: with
    ``ragged=d`` neither the numbers at a place nor later draws depend on the size of dimension d of
    ``shape``.

    Floating-point numbers are computed in float32 and then converted, so that a float64 run sees the
    same noise as a float32 run.
    """

    def __init__(
        self,
        uids: Sequence[str],
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.uids, self.seed, self.device, self.dtype = tuple(uids), seed, torch.device(device), dtype
        keys = [hashlib.sha256(f"{seed}/{uid}".encode()).digest() for uid in self.uids]

        def word(key: bytes) -> int:
            return int.from_bytes(key, "big", signed=True)

        words = [[word(key[:8]) for key in keys], [word(key[8:16]) | 1 for key in keys]]
        # One copy to the device for both.
        self._start, self._step = torch.tensor(words, dtype=torch.int64, device=self.device).unsqueeze(2).unbind()
        self._count = 0  # 64-bit words drawn so far
        self._blocks = 0  # ragged draws so far

    def child(self, name: str) -> Noise:
        """Independent streams of the same samples for a named purpose, such as ``noise.child("fit")``."""
        # NUL, because "<uid>/fit" might be the uid of another sample.
        return Noise([f"{uid}\0{name}" for uid in self.uids], self.seed, self.device, self.dtype)

    def bits(self, n: int) -> Tensor:
        """(B, n) int64, all 64 bits random."""
        self._count += n
        return self._hash(torch.arange(self._count - n, self._count, device=self.device))

    def ragged_bits(self, shape: Sequence[int], dim: int) -> Tensor:
        """(B, *shape) int64, all 64 bits random; a ragged draw, see ``Noise``, along dimension ``dim`` of ``shape``."""
        # Every draw has a block of 2**40 counters, in the negative half that ``bits`` never reaches;
        # inside it the ragged dimension is the outermost one.
        self._blocks += 1
        counter = torch.arange(math.prod(shape), device=self.device) - (self._blocks << 40)
        others = [size for i, size in enumerate(shape) if i != dim]
        bits = self._hash(counter).reshape(len(self.uids), shape[dim], *others)
        return bits.movedim(1, 1 + dim)

    def _hash(self, counter: Tensor) -> Tensor:
        x = counter * self._step + self._start
        x ^= _shift_right(x, 30)
        x *= _MIX_1
        x ^= _shift_right(x, 27)
        x *= _MIX_2
        x ^= _shift_right(x, 31)
        return x

    def uniform(self, *shape: int, ragged: int | None = None) -> Tensor:
        """(B, *shape) uniform on [0, 1), in steps of 2^-24."""
        bits = self.bits(math.prod(shape)) if ragged is None else self.ragged_bits(shape, ragged)
        values = _shift_right(bits, 40).to(torch.float32).mul_(2.0**-24)
        return values.reshape(len(self.uids), *shape).to(self.dtype)

    def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
        """(B, *shape) standard normal, by Box and Muller (1958), who get two numbers from one 64-bit word."""
        if ragged is not None:  # only the first of the two is used: which are a pair must not depend on the size
            return self._box_muller(self.ragged_bits(shape, ragged))[0].to(self.dtype)
        n = math.prod(shape)
        pairs = torch.cat(self._box_muller(self.bits((n + 1) // 2)), dim=1)
        return pairs[:, :n].reshape(len(self.uids), *shape).to(self.dtype)

    @staticmethod
    def _box_muller(word: Tensor) -> tuple[Tensor, Tensor]:
        # (0, 1], so that the logarithm is finite; the largest deviate is 6.76.
        radius = _shift_right(word, 32).to(torch.float32).add_(0.5).mul_(2.0**-32)
        radius = radius.log_().mul_(-2.0).sqrt_()
        angle = word.bitwise_and_(0xFFFFFFFF).to(torch.float32).mul_(2.0 * math.pi / 2**32)
        return radius * angle.cos(), radius * angle.sin()

    def permutation(self, n: int, ragged: bool = False) -> Tensor:
        """(B, n) int64: a random order of 0 .. n-1 for every sample.

        With ``ragged`` the relative order of any of the numbers does not depend on n.
        """
        return (self.ragged_bits((n,), 0) if ragged else self.bits(n)).argsort(dim=1)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64, uniform on 0 .. high-1 (the bias is below high / 2**63)."""
        n = math.prod(shape)
        return _shift_right(self.bits(n), 1).remainder_(high).reshape(len(self.uids), *shape)


@contextlib.contextmanager
def global_states(seed: int, device: torch.device | str = "cpu") -> Iterator[Callable[[], bool]]:
    """Inside, the process-wide random states of Python, numpy and torch are seeded, and they are put back afterwards.

    For other people's code that draws from them. Those of an accelerator are put back too, but not seeded, as its
    numbers are others than the CPU's: what is yielded tells, afterwards, whether any were drawn.
    """
    place = torch.device(device)
    far = () if place.type == "cpu" else (torch.get_device_module(place),)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    before = [module.get_rng_state(place) for module in far]
    drawn = False
    try:
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())
        torch.random.set_rng_state(torch.Generator().manual_seed(seed % 2**63).get_state())
        yield lambda: drawn
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        for module, state in zip(far, before):
            drawn = not torch.equal(state, module.get_rng_state(place))
            module.set_rng_state(state, place)
