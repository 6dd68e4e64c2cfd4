"""Small image nets, written at random: ``generate(seed)`` is a program of some 20 lines, and the net that it makes.

The program is Python source, so that whoever meets a net that fails can read it, paste it and shorten it. A second
version of the same program is its *reference*: no in-place operations, no views that are written through, and every
elementwise function ``f`` is a call ``each(kind, f, x)`` of whoever runs it. So guided backpropagation, deconvolution
and DeepLIFT's rescale rule can be computed by rules that are a line each (``fuzz_checks``), however the net itself
writes its ReLUs.

The same seed gives the same net everywhere: all choices and weights come from one generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")
Each = Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]

SIZES = ((3, 12, 12), (3, 9, 14), (2, 13, 10), (1, 12, 16))
PLACES = 24  # a side longer than this is not enlarged any further


class Choices:
    """What is drawn for one net."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def one(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self._generator)) < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


class Place(NamedTuple):
    """How the output of a layer lies on the image; the program that made the layer knows."""

    layout: str  # channels_first | channels_last | tokens
    grid: tuple[int, int]
    prefix: int = 0  # tokens in front of the grid


@dataclass
class Program:
    """A net that is being written. Every line is run at once, so the shape of ``x`` is always known.

    places    the layers that run once and whose output has places
    again     layers that run twice
    features  what a check must know of: "relu" (some form of it), "max" (the largest of several numbers), "product"
              (of two things that depend on the input, norms and attention among them), "batch" (rows interact),
              "random", "untraced" (Python that looks at shapes or rows)
    """

    choices: Choices
    shape: tuple[int, int, int]
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    features: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._scope: dict[str, Any] = {**_NAMES, "each": plain, "self": nn.Module().eval(), "x": _probe(self.shape)}

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W) of x now."""
        c, h, w = self._scope["x"].shape[1:]
        return c, h, w

    @property
    def contiguous(self) -> bool:
        """Whether x may be viewed in any shape."""
        return self._scope["x"].is_contiguous()

    def name(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}{self._counts[kind]}"

    def define(self, code: str) -> None:
        """A line of ``__init__``."""
        self.init.append(code)
        exec(code, self._scope)
        self._scope["self"].double().eval()

    def module(self, kind: str, expression: str) -> str:
        """A new module; returns its path."""
        path = self.name(kind)
        self.define(f"self.{path} = {expression}")
        return path

    def line(self, code: str, rule: str | Sequence[str] | None = None) -> None:
        """A line of ``forward``, and what stands for it in the reference."""
        rules = [code] if rule is None else [rule] if isinstance(rule, str) else list(rule)
        self.forward.append(code)
        self.rules += rules
        with torch.no_grad():
            for one in rules:
                exec(one, self._scope)

    def place(self, path: str, layout: str = "channels_first", prefix: int = 0) -> None:
        """The layer that was written last has the places of x as it is now."""
        self.places[path] = Place(layout, self.size[1:], prefix)

    def source(self, reference: bool = False) -> str:
        body = self.rules if reference else self.forward
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", "    def forward(self, x):", *(f"        {line}" for line in body), "        return x"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Generated:
    """A net with what its program knows of it."""

    seed: int
    shape: tuple[int, int, int]
    classes: int
    program: Program
    net: nn.Module

    @property
    def lines(self) -> list[str]:
        """The program, to read."""
        return [f"# seed {self.seed}, x (N, {', '.join(map(str, self.shape))})", *self.program.source().splitlines()]

    def reference(self, each: Each) -> nn.Module:
        """The same net, with every elementwise function computed by ``each``."""
        net = _made(self.program.source(reference=True), each)
        net.load_state_dict(self.net.state_dict())
        return net


def plain(kind: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The ``each`` that changes nothing."""
    return function(x)


def generate(seed: int) -> Generated:
    from generated_blocks import write  # which writes into a Program

    choices = Choices(seed)
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global generator
        program = Program(choices, choices.one(SIZES))
        classes = choices.integer(3, 5)
        write(program, classes)
        net = _made(program.source(), plain)
    _weigh(net, choices)
    return Generated(seed, program.shape, classes, program, net)


_NAMES: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math}


def _probe(shape: tuple[int, int, int]) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(1, *shape).repeat(2, 1, 1, 1)


def _made(source: str, each: Each) -> nn.Module:
    scope = {**_NAMES, "each": each, "__name__": "generated"}
    exec(source, scope)
    with torch.random.fork_rng(devices=[]):
        return scope["Net"]().double().eval().requires_grad_(False)


def _weigh(net: nn.Module, choices: Choices) -> None:
    """Weights that keep signals at about their size, and statistics of norms that are not the trivial ones."""
    slopes = {id(p) for module in net.modules() if isinstance(module, nn.PReLU) for p in module.parameters()}
    for p in net.parameters():
        drawn = choices.normal(*p.shape)
        if p.ndim > 1:
            p.data = drawn * 1.5 / math.sqrt(p[0].numel())
        elif id(p) in slopes:
            p.data = 0.25 + 0.1 * drawn
        else:  # a bias, or the weights of a norm: not near zero, and of both signs
            p.data = 0.4 * drawn + 0.3
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * choices.normal(*buffer.shape))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + choices.normal(*buffer.shape).abs())
