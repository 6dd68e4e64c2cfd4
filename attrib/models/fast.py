"""A net as it is best computed: batch norms folded, and in the memory format that is faster. A *how*.

On a CPU, nets whose work is mostly 2-d convolutions are computed in ``channels_last`` (docs/performance.md). This is a
rule and not a measurement, which would choose differently in another run: then maps would agree up to rounding alone,
and not to the bit.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from attrib.models.compiled import Compiled
from attrib.models.device_memory import is_lost
from attrib.models.exam import tolerance
from attrib.models.float32 import all_bits
from attrib.models.folding import cast, channels_last, folded, graph_of, has_hooks
from attrib.models.fused import LARGE, fused, harmless
from attrib.models.split import CannotSplitError, GraphSplit, Split, run_of
from attrib.models.ways_back import gradient, near

log = logging.getLogger(__name__)

LEAST = 10**7  # products a row, below which a net is too small to gain anything


class Fast:
    """A function of tensors, (N, ...) each, as it is best computed.

    How is found out at its first call, which takes as long as about ten rows: all samples shall be computed alike. Its
    results are the same up to rounding, which is tried on rows of the inputs, for every shape of them. That gradients
    flow in the same way is tried on the graph before anything is folded: it makes the very same calls, while
    rounding alone turns some ReLUs on or off, and a single one in a deep layer can change a gradient by a percent.
    Where something is not the same, where torch.fx cannot trace the function, or while somebody has hooks on its
    modules, it is computed as it was. What the function does beside computing its result (counting, keeping an
    activation) does not happen. Weights that were changed since are noticed, and how is found out anew; not what was
    written into ``weight.data``, which torch does not count.

    slow      the function as it was: a net, or a part of one
    name      for the log
    compile   whether it is compiled as well, see ``compiled.Compiled``
    """

    def __init__(self, slow: nn.Module, name: str, compile: bool = False) -> None:
        self._slow, self._name, self._compile = slow, name, compile
        self._run, self._said = run_of(slow), False
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of the function, of which these are the weights."""
        self._weights = _weights(self._slow)
        self._made = False
        self._fast: _Way | None = None  # once it was made, if there is one
        self._graph = self._slow  # as it was traced
        self._alike: dict[torch.dtype, bool] = {}  # of torch.autocast -> whether the graph does the same in it
        self._known: dict[tuple[torch.Size, ...], bool] = {}  # shapes of inputs -> whether the fast one does

    def __call__(self, *inputs: Tensor) -> Any:
        way, device = self._way(inputs), inputs[0].device.type
        if isinstance(way, _Way) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if dtype not in self._alike:
                self._alike[dtype] = self._same_within(inputs)
            way = way.within(dtype) if self._alike[dtype] else self._run
        return way(*inputs)

    @torch.inference_mode(False)  # what is made in it has no gradients, ever
    def _same_within(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the graph does what the function does within torch.autocast, on which a net may depend."""
        if self._graph is self._slow:
            return True
        one = [x[:1].detach().clone() for x in inputs]
        with torch.no_grad():
            expected, got = _tensors(self._run(*_copies(one))), _tensors(run_of(self._graph)(*_copies(one)))
        # Gradients are finer than a few rounded logits.
        back = [_gradient(function, one) for function in (self._run, run_of(self._graph))]
        same = all(map(_identical, [*expected, back[0]], [*got, back[1]]))
        return same or self._not("it depends on torch.autocast, which torch.fx does not see")

    def _way(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        if has_hooks(self._slow):
            self._not_compiled("somebody has hooks on its modules")
            return self._slow
        if (self._made and self._fast is None) or not all(map(_suits, inputs)):
            return self._run
        if not _same_weights(self._weights, _weights(self._slow)):
            self._begin()
        shapes = tuple(x.shape[1:] for x in inputs)
        if shapes not in self._known:
            self._known[shapes] = self._try(inputs)
        return self._fast if self._fast is not None and self._known[shapes] else self._run

    @torch.inference_mode(False)
    def _try(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a fast way for inputs of these shapes."""
        if not self._made and _products(self._slow, inputs[0]) < LEAST:
            self._not_compiled("it is too small to gain anything")
            return False
        dtype = next((p.dtype for p in self._slow.parameters() if p.is_floating_point()), torch.float32)
        two = [_tame(x[:2].detach().to(dtype)) for x in inputs]
        try:
            with torch.autocast(two[0].device.type, enabled=False), all_bits():
                way = self._fast if self._made else self._make(two)
                same = way is not None and self._same(way, two)
        except CannotSplitError as reason:
            return self._not(str(reason))
        except Exception as error:  # of memory, which is short, or of a net that does not run as a graph
            if is_lost(error):
                raise
            return self._not(f"{type(error).__name__}: {error}".splitlines()[0])
        if way is None or not same:
            return self._not("" if way is None else "its logits are not the same up to rounding")
        if not self._made:
            self._made, self._fast = True, way
            log.info("%s: %s", self._name, way.described)
        return True

    def _not(self, reason: str) -> bool:
        self._made = True  # a fast way that serves other shapes stays
        if reason:
            what, level = ("compiled", logging.WARNING) if self._compile else ("with its norms folded", logging.INFO)
            log.log(level, "%s is computed as it is written, not %s: %s", self._name, what, reason)
        return False

    def _not_compiled(self, reason: str) -> None:
        """Says once that, and why, what was to be compiled is not."""
        if self._compile and not self._said:
            self._said = True
            log.warning("run.compile: %s is not compiled, but computed as it is: %s", self._name, reason)

    def _make(self, inputs: list[Tensor]) -> _Way | None:
        """A way that may be faster. Raises CannotSplitError for a net whose graph is another function."""
        graph = self._slow if isinstance(self._slow, fx.GraphModule) else graph_of(self._slow)
        one = [x[:1] for x in inputs]
        new, mostly = folded(graph, *one)
        last = mostly and inputs[0].ndim == 4 and inputs[0].device.type == "cpu"
        if new is graph and not last and not self._compile:
            return None
        if graph is not self._slow and not near(*(_gradient(way, one) for way in (run_of(graph), self._run))):
            raise CannotSplitError("it stops gradients or has a way back of its own, which torch.fx does not see")
        self._graph = graph
        way = _Way(channels_last(new) if last else new, last, new is not graph)
        if self._compile:
            way.compile(self._name, [torch.cat((x, x))[:2] for x in inputs])
        elif last:
            way.fuse(inputs)
        return way

    def _same(self, way: _Way, inputs: list[Tensor]) -> bool:
        """Whether a way gives what the function as it was does."""
        with torch.no_grad():
            pairs = list(zip(_tensors(way(*_copies(inputs))), _tensors(self._run(*_copies(inputs))), strict=True))
        return all(_close(got, expected) for got, expected in pairs)


class _Way:
    """A graph that computes in one memory format, and takes and gives tensors as they are elsewhere."""

    def __init__(self, graph: fx.GraphModule, last: bool, folds: bool) -> None:
        self.graph, self.last, self._folds = graph, last, folds
        self._fused: fx.GraphModule | None = None
        self._compiled: Compiled | None = None
        self._within: dict[torch.dtype, _Way] = {}

    @property
    def described(self) -> str:
        compiled = self._compiled is not None and self._compiled.works
        how = ["norms folded"] * self._folds + ["compiled"] * compiled
        how += ["convolutions fused"] * (self._fused is not None)
        return ", ".join([*how, f"{'channels_last' if self.last else 'contiguous'} memory"])

    def fuse(self, inputs: list[Tensor]) -> None:
        """From now on its convolutions are fused, if numbers and gradients of inputs are the same but for rounding."""
        new = fused(self.graph)
        if new is None:
            return

        def tried() -> tuple[list[Tensor], Tensor | None]:
            with torch.no_grad():
                found = _tensors(self(*_copies(inputs)))
            return found, _gradient(self, inputs)

        (expected, back), self._fused = tried(), new
        try:
            got, new_back = tried()
            same = all(map(_close, got, expected)) and _mostly_same(new_back, back)
        except (RuntimeError, AttributeError) as error:  # such as of a torch without these operations
            if is_lost(error):
                raise
            same = False
        self._fused = new if same else None

    def compile(self, name: str, two: list[Tensor]) -> None:
        """From now on it is compiled, if gradients of two rows of inputs are the same but for rounding.

        ``name`` is for the log.
        """
        expected, self._compiled = _gradient(self, two), Compiled(self.graph, name)
        got = _gradient(self, two)
        if self._compiled.works and not _mostly_same(got, expected):
            self._compiled.give_up("its gradients are not those of the graph")

    def within(self, dtype: torch.dtype) -> _Way:
        """The same for use within torch.autocast, which else would cast frozen weights anew in every pass."""
        if dtype not in self._within:
            with torch.inference_mode(False):
                way = self._within[dtype] = _Way(cast(self.graph, dtype), self.last, self._folds)
                way._fused = None if self._fused is None else fused(way.graph)
                if self._compiled is not None and self._compiled.works:
                    way._compiled = Compiled(way.graph, f"{self._compiled.name} in {dtype}")
        return self._within[dtype]

    def __call__(self, *inputs: Tensor) -> Any:
        run = self._compiled or run_of(self.graph)
        if self._fused is not None and harmless(*inputs):
            run = run_of(self._fused)
        if not self.last:
            return run(*inputs)
        found = run(*(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs))
        return found.contiguous() if isinstance(found, Tensor) else tuple(t.contiguous() for t in found)


def fast_net(net: nn.Module, compile: bool = False) -> Fast:
    """A net (N, *input) -> logits (N, K).

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    >>> fast_net(net)(torch.ones(1, 3, 8, 8)).shape
    torch.Size([1, 2])
    """
    return Fast(net, type(net).__name__, compile)


def fast_split(cut: Split, net: nn.Module, path: str, compile: bool = False) -> Split:
    """A net cut at ``path``, with both parts as they are best computed; one that is cut by hooks needs its modules.

    What is behind the cut runs often, so ``compile`` is for that alone.
    """
    if not isinstance(cut, GraphSplit):
        return cut
    name = type(net).__name__
    front, rear = cut.front_graph, cut.rear_graph
    return cut.computed_by(Fast(front, f"{name} before {path}"), Fast(rear, f"{name} behind {path}", compile))


class _Weight(NamedTuple):
    """A weight, how often it was written to, and where it lies, which ``weight.data = new`` alone changes."""

    tensor: Tensor
    version: int
    place: int


def _weights(net: nn.Module) -> list[_Weight]:
    tensors = itertools.chain(net.parameters(), net.buffers())
    return [_Weight(t, 0 if t.is_inference() else t._version, _place(t)) for t in tensors]


def _place(t: Tensor) -> int:
    return 0 if torch._C._functorch.is_functorch_wrapped_tensor(t) else t.data_ptr()


def _same_weights(one: list[_Weight], other: list[_Weight]) -> bool:
    """Tensors are kept and compared themselves: the ``id`` of one that is gone may be given to another."""
    return len(one) == len(other) and all(a.tensor is b.tensor and a[1:] == b[1:] for a, b in zip(one, other))


def _suits(x: Tensor) -> bool:
    """Whether a tensor is one of images, sounds or features, with numbers of its own."""
    return (
        x.is_floating_point() and x.ndim > 1 and len(x) > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _products(net: nn.Module, x: Tensor) -> int:
    """At most so many products a row take the layers with weights, if none makes its input larger."""
    places = math.prod(x.shape[2:])
    each = (
        sum(p.numel() for p in module.parameters(recurse=False)) * (1 if isinstance(module, nn.Linear) else places)
        for module in net.modules()
    )
    return sum(each)


def _tame(x: Tensor) -> Tensor:
    """A copy with ordinary numbers in the place of NaN and large ones, of which a comparison would show nothing."""
    return x.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGE / 2, LARGE / 2)


def _copies(inputs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs]  # a net may change what it is given in place


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _close(got: Tensor, expected: Tensor) -> bool:
    """Whether numbers are equal up to rounding; what an input makes infinite or NaN must be so in both."""
    if not expected.is_floating_point():
        return _identical(got, expected)  # a mask or indices, say, that the rear of a net needs
    size = expected.abs().nan_to_num(0.0, 0.0).max().clamp(min=torch.finfo(torch.float32).tiny).item()
    bound = tolerance(expected) * size
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=bound, equal_nan=True)


def _identical(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _mostly_same(got: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two gradients are the same but for rounding, by which a few ReLUs may be on that were off."""
    if got is None or expected is None:
        return got is expected
    got, expected = got.nan_to_num(), expected.nan_to_num()
    return bool((got - expected).norm() <= 0.05 * expected.norm())


def _gradient(function: Callable[..., Any], inputs: list[Tensor]) -> Tensor | None:
    first, *others = _copies(inputs)
    return gradient(lambda x: _tensors(function(x, *others))[0], first.requires_grad_())
