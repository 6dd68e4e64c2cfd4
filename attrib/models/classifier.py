"""The classifier that all methods and metrics talk to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrib.classes import ClassNames
from attrib.keys import digest, tensor_digest
from attrib.models.admission import Admission
from attrib.models.device_memory import is_lost, is_out_of_memory, release_memory
from attrib.models.exam import Exam
from attrib.models.fast import fast_net, fast_split
from attrib.models.float32 import use_all_bits
from attrib.models.forms import own_path, tensors, unwrapped
from attrib.models.graph import Graph, Graphs
from attrib.models.layers import first_tensor, hooked
from attrib.models.output import Output, Take
from attrib.models.output_kind import Link
from attrib.models.precision import Arithmetic, check, computed, multiplied
from attrib.models.preparation import prepared
from attrib.models.roles import Roles
from attrib.models.sizes import START, fitting_rows
from attrib.models.split import Front, Split, between, split
from attrib.models.variant import Variant
from attrib.models.ways_back import check_way_back, with_contiguous_norms
from attrib.process.memory import Heap
from attrib.types import SampleError, UserError

log = logging.getLogger(__name__)


class Classifier:
    """A private, frozen copy of a net, and the only place where rows are cut into chunks.

    The given module is deep-copied, put into eval mode, its parameters frozen, its in-place
    operations switched off and modules registered at several paths separated; the caller's own
    module is left alone.

    Before its numbers are used the net is tried on two inputs (``attrib.models.exam``): on noise when it is made,
    if ``input_shape`` is given, and on the first real samples that it sees. A net that is random, or in which the
    samples of a batch interact, is refused. One that sees the padding of texts gets only texts of equal length
    together from then on. ``exam`` is what was found.

    module       maps (N, *input) to logits (N, K) or to other scores, perhaps by way of ``output``
    layers       role -> module path, e.g. {"bottleneck": "features.17"}. None leaves the role out, as if it were not
                 named: cam and bottleneck are then found out when they are asked for (``default_layers``)
    rows         how many rows go through the net at a time; halved when memory runs out. "auto": found out when the net
                 is first tried, see ``attrib.models.sizes``
    spec         plain description of how the net was built, part of ``key``
    input_shape  if given, the net is tried on noise images of this shape, and their logits are compared before and
                 after the preparation
    output       how the scores come out of what the net returns: an ``Output``, its fields (``{"read": "value"}``), or
                 a field, index or function
    classes      what the classes are called, in their order; empty: nobody knows; None: what the module says
                 (``class_names``)
    variant      of a copy with randomised layers: which ones; else None
    original     of a copy with randomised layers: the classifier it was made from. Where the experiment goes by
                 predictions (of the class to explain, of the samples to select), it goes by the original's.
                 Any other classifier is its own original
    precision    the arithmetic of the net, see ``with_precision``
    fold         whether the net may be computed with its batch norms folded into the layers in front of them, and in
                 another memory format (``attrib.models.fast``). ``module`` stays as it is
    compile      whether ``torch.compile`` makes what runs often faster still: the net, and what is behind a layer

    Raises UserError for a layer that does not exist, and for a net that is refused.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> model = Classifier(net, {"cam": "1"}, input_shape=(3, 4, 4), classes=("cat", "dog"))
    >>> model.logits(torch.rand(5, 3, 4, 4)).shape, model.roles.path("cam")
    (torch.Size([5, 2]), '1')
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, str | None] | None = None,
        *,
        rows: int | Literal["auto"] = START,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        spec: Mapping[str, Any] | None = None,
        input_shape: tuple[int, ...] | None = None,
        variant: Variant | None = None,
        original: Classifier | None = None,
        output: Output | Mapping[str, Any] | Take | None = None,
        classes: ClassNames | Sequence[str] | None = None,
        fold: bool = True,
        compile: bool = False,
    ) -> None:
        if rows != "auto" and rows < 1:
            raise UserError(f"run.rows must be at least 1, or auto, not {rows}")
        if compile and not fold:
            raise UserError("run.compile=true compiles nets as run.fold=true prepares them; set that as well")
        given, module = module, unwrapped(module)
        self.output = Output.of(output)
        self.device, self.dtype = torch.device(device), dtype
        self.rows_given = rows
        self._rows, self._rows_open = (START, True) if rows == "auto" else (rows, False)
        use_all_bits()
        self.variant, self.original = variant, original or self
        self.precision: Arithmetic = "float32"
        self.input_shape = input_shape
        self._heap = Heap()
        self.passed = 0  # rows that went through the net so far; a cost, reported beside seconds
        self.weights = tensor_digest(tensors(module))
        read = {} if self.output.spec is None else {"output": self.output.spec}
        self.key = digest(type(module).__qualname__, {**(spec or {}), **read}, self.weights)
        ready = prepared(module, self.output, self.device, dtype, input_shape, pairs=self._rows > 1)
        self.module = ready.net
        self._admission = Admission(self.module, self.output, ready.exam, input_shape)
        self._outputs = ready.outputs  # K, once it is known
        if ready.probe is not None:
            self._fit_rows(ready.probe)
        self._given_classes = classes if classes is None or isinstance(classes, ClassNames) else _named(classes)
        if self._outputs is not None:
            self.check_classes(self._outputs)
        self.fold = fold and not self.output.read.per_sample  # a graph would keep the region of the first sample
        self.compile = compile and self.fold
        if compile and not self.compile:
            log.warning("run.compile: %s is not compiled: its scores depend on the sample", type(module).__name__)
        self._net: Callable[[Tensor], Tensor] = fast_net(self.module, compile) if self.fold else self.module
        self._splits: dict[str, Split] = {}
        self._graphs = Graphs(self.module)
        self.roles: Roles = Roles(
            {role: own_path(path, given) for role, path in (layers or {}).items() if path is not None},
            self.module,
            self._admission,
            self._uncounted,
            torch.empty(0, device=self.device, dtype=self.dtype),
            None if original is None else original.roles,
        )

    @property
    def rows(self) -> int:
        """How many rows may go through the net at a time."""
        return 1 if self._admission.one_by_one else self._rows

    @rows.setter
    def rows(self, rows: int) -> None:
        self._rows = rows

    @property
    def exam(self) -> Exam | None:
        """What the net did with the inputs that it was tried on; None if there were none yet."""
        return self._admission.exam

    def examine(self, x: Tensor, lengths: Tensor | None = None) -> bool:
        """Try the net on the first two different samples of x (N, *input); nothing once that was done.

        ``lengths`` (N,) are those of texts. Returns whether texts of different lengths may stand in one batch.
        Raises UserError for a net that is refused.
        """
        if self._admission.see(x, lengths, self.rows):
            self._splits.clear()
        self._fit_rows(x[:1])
        return not self._admission.lengths_apart

    def of_one_length(self, x: Tensor) -> list[Tensor]:
        """Texts (N, T) in parts whose layers can be read, without padding if the net sees it; other inputs as they are.

        The parts have all rows, but not in their order.
        """
        self.examine(x)
        return self._admission.of_one_length(x)

    def _fit_rows(self, x: Tensor) -> None:
        """Decide how many ``rows`` there are at a time, if that is open and x (1, *input) goes through."""
        if not self._rows_open or not len(x):
            return
        self._rows_open = False
        try:
            with self.output.alone(self.module):
                self.rows = fitting_rows(self.module, x)
        except Exception as error:  # of the net itself, on this sample: whoever brought it will meet it
            if is_lost(error):
                raise
            return
        log.info("run.rows=auto: %d rows at a time", self.rows)

    def _admit(self, x: Tensor) -> None:
        """What comes before the layers of a net are read for x."""
        self.examine(x)
        self._admission.check_padding(x)

    # ---- precision --------------------------------------------------------------------------

    def with_precision(self, precision: Arithmetic) -> Classifier:
        """The same net in another arithmetic, see ``attrib.models.precision``; it shares all that was found out.

        Its ``key`` is another, and its ``original`` is a classifier in float32. Raises UserError for an arithmetic
        that the device does not have.

        >>> import torch
        >>> model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), input_shape=(3, 2, 2))
        >>> coarse = model.with_precision("bfloat16")
        >>> coarse.logits(torch.ones(1, 3, 2, 2)).dtype, coarse.key == model.key
        (torch.float32, False)
        """
        if precision == self.precision:
            return self
        if self.precision != "float32":
            raise ValueError(f"the net is computed in {self.precision} already")
        check(precision, self.device, self.dtype)
        other = copy.copy(self)
        other.precision, other.original = precision, self.original
        other.key = digest(self.key, {"precision": precision})
        return other

    def check_precision(self, what: str, where: str = "precision.explain") -> None:
        """Raises UserError in the name of ``what``, which computes the net in its own way, unless that is float32."""
        if self.precision != "float32":
            raise UserError(f"{what} computes the net in float32 only; set {where}=float32")

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *input) -> (N, K), in one piece and as the net gives it: gradients flow, and x may be changed in place.

        For what is cut into pieces elsewhere, see ``chunked``; else ``logits`` and ``gradient`` are the way.
        """
        return self._scores(self._net, x)

    def _scores(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """In the classifier's dtype: some nets end in ``.float()`` or ``.double()``, whatever they are given."""
        found = self._computed(function, *inputs)
        return found.to(self.dtype) if found.is_floating_point() else found

    def _computed(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        found = computed(self.precision, self.device, self.dtype, function, *inputs)
        return with_contiguous_norms(found, len(inputs[0]))

    # ---- what is explained ------------------------------------------------------------------

    @property
    def link(self) -> Link | None:
        """How probabilities are made of the scores, see ``output.probabilities``; None if there are none."""
        return self.output.read.link_of(self.module)

    @cached_property
    def classes(self) -> ClassNames | None:
        """What the K classes are called, as far as ``model.classes``, the net or ``model.output`` knows."""
        if self.original is not self:
            return self.original.classes
        if self._given_classes is not None:
            return self._given_classes if len(self._given_classes) else None
        names = self.output.read.class_names(self.module)
        if names is None or self._outputs not in (None, len(names)):  # of another net that this one was made from
            return None
        return ClassNames.of(names, f"what {type(self.module).__name__} says of its classes")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the K classes, see ``classes``."""
        return None if self.classes is None else self.classes.names

    def check_classes(self, outputs: int) -> None:
        """Raises UserError if ``model.classes`` names more or fewer than K classes."""
        given = self._given_classes
        if given and len(given) != outputs:
            raise UserError(
                f"{given.source} names {len(given)} classes, but the net has {outputs}; set model.classes to the names "
                "of the net's, or to none"
            )

    @property
    def known_outputs(self) -> int | None:
        """K, if it is known by now."""
        return self._outputs

    def outputs(self, x: Tensor) -> int:
        """K. Only the first row of x (N, *input) is looked at, and only once."""
        if self._outputs is None:
            with self.explaining(x[:1]):
                self._outputs = self.logits(x[:1]).shape[1]
            self.check_classes(self._outputs)
        return self._outputs

    @contextmanager
    def explaining(self, x: Tensor, target: Tensor | None = None) -> Iterator[None]:
        """Meanwhile all that goes through the net are perturbed copies of the sample x (1, *input).

        That makes a difference where the scores depend on the sample (``OutputKind.per_sample``): there nothing can be
        computed outside. Within another one, that one goes on. Raises SampleError if the region of ``target``, (1,) or
        (1, K), has no pixel.
        """
        if not self.output.read.per_sample or self.module.output_first is not None:
            yield
            return
        if len(x) != 1:
            raise ValueError(f"{len(x)} samples; one at a time is explained")
        net = self.original.module
        with torch.no_grad(), self.output.alone(net) as seen:
            net(x.clone())
        (first,) = seen
        if target is not None:
            classes = target[:1] if target.ndim == 1 else target[0].nonzero().flatten()
            for missing in classes[~torch.isin(classes.to(first.device), first).to(classes.device)].tolist():
                raise SampleError(f"the net gives no pixel of this sample to class {missing}")
        self._graphs.forget()  # they hold the region of a sample as a constant
        try:
            with self.output.explaining(self.module, first):
                yield
        finally:
            self._graphs.forget()

    # ---- chunks -----------------------------------------------------------------------------

    def chunked(self, function: Callable[[slice], Any], n: int, cost: int = 1, least: int | None = None) -> Any:
        """``function(slice)`` over 0 .. n-1 in pieces, results concatenated along dimension 0.

        ``cost`` is the number of rows that one item sends through the net at a time; a piece
        has at most ``rows // cost`` items, and at least one. ``least`` is the number of rows below
        which a single item cannot go, for a function that heeds ``self.rows`` itself; by default
        an item cannot be cut at all. When memory runs out, ``rows`` is halved for good and the
        piece tried again; when nothing is left to cut, SampleError is raised.
        ``function`` returns a tensor or a tuple of tensors and must not have side effects.

        Raises UserError where it asks for a gradient that the net does not have.
        """
        pieces: list[Any] = []
        start = 0
        while start < n:
            size = min(max(1, self.rows // cost), n - start)
            try:
                with multiplied(self.precision):
                    pieces.append(function(slice(start, start + size)))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    shape = self._admission.shape
                    x = None if shape is None else torch.zeros(1, *shape, dtype=self.dtype, device=self.device)
                    check_way_back(self.module, x, error)
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
            else:
                start += size
                self.passed += size * cost
                self._heap.tidy()
                continue
            # Outside the except block, whose traceback keeps the piece's tensors alive.
            release_memory(self.device)
            if size == 1 and min(self.rows, cost) <= (cost if least is None else least):
                raise SampleError(f"out of memory even with one {'row' if cost == 1 else 'sample'} at a time: {reason}")
            self.rows = max(1, min(self.rows, size * cost) // 2)
            log.warning("out of memory; going on with run.rows=%d", self.rows)
        if not pieces:
            raise ValueError("nothing to compute: no rows")
        if isinstance(pieces[0], tuple):
            return tuple(torch.cat(part) for part in zip(*pieces, strict=True))
        return torch.cat(pieces)

    def _uncounted(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function`` of x (N, ...) in pieces. What it finds is of the net, so its rows are no sample's cost."""
        passed = self.passed
        try:
            return self.chunked(lambda rows: function(x[rows]), len(x))
        finally:
            self.passed = passed

    # ---- forward ----------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(N, *input) -> (N, K), without gradients."""
        self.examine(x)
        # Here and below a copy goes in, because a net may change what it is given in place.
        return self.chunked(lambda rows: self(x[rows].clone()), len(x))

    def graph(self, x: Tensor) -> Graph:
        """The net as a graph of ATen calls, for inputs of x's shape (N, *input) and any number of rows.

        Made once, whatever the number of rows and, where the net allows it, the length of texts; compared with the
        net on rows of x for every other shape. Raises UserError for a net that torch cannot export, or that computes
        something else than its graph, or that is computed in another arithmetic than float32.
        """
        self.check_precision("a method that reads the net as a graph")
        self._admit(x)
        # The original's would hold the region of another sample, or none.
        same = self.original is not self and not self.output.read.per_sample
        return self._graphs.of(x, self.original.graph if same else None)

    def check_gradient(self, x: Tensor) -> None:
        """Raises UserError unless gradients flow through the graph as through the net, for images or sounds x."""
        self._graphs.check_gradient(self.graph(x), x)

    def _split(self, role: str, x: Tensor | None = None) -> Split:
        if role not in self._splits:
            if x is None:
                raise RuntimeError(f"call until({role!r}, x) before after({role!r}, ...)")
            cut = split(self.module, self.roles.path(role), x, pairs=self.rows > 1)
            self._splits[role] = fast_split(cut, self.module, self.roles.path(role), self.compile) if self.fold else cut
        return self._splits[role]

    @torch.no_grad()
    def until(self, role: str, x: Tensor) -> Front:
        """(B, *input) -> the layer's output (B, *layer) and what the rest of the net needs beside it.

        Computes nothing behind the layer, except branches that run beside it.
        """
        self._admit(x)
        cut = self._split(role, x)

        def piece(rows: slice) -> tuple[Tensor, ...]:
            rest: list[Tensor] = []

            def layer(x: Tensor) -> Tensor:
                z, more = cut.front(x)
                rest.extend(more)
                return z

            return (self._computed(layer, x[rows].clone()), *rest)

        z, *rest = self.chunked(piece, len(x))
        return Front(z, tuple(rest))

    def vjp(
        self, role: str, x: Tensor, keep: bool = True, start: tuple[str, Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(N, *input) -> the layer's output (N, *layer), and the way back from there.

        The function that is returned takes a gradient at the layer's output, (N, *layer), to the
        input, (N, *input): a vector-Jacobian product of the front of the net. With ``keep`` its
        first call uses the graph of the forward pass if N is within ``rows``; else the front runs
        again, piece by piece, so that memory is bounded by ``rows`` whatever N is.

        ``start`` is another role in front of this one, and inputs (B, *input): then x is that
        layer's output, the N // B rows of one input lie next to each other, and the way back ends there.

        Raises UserError if no gradient flows between the two.
        """
        self._admit(x if start is None else start[1])
        kept: list[tuple[Tensor, Tensor]] = []
        if start is None:
            cut = self._split(role, x)

            def layer(rows: slice, value: Tensor) -> Tensor:
                return cut.front(value).z

        else:
            first, inputs = start

            def layer(rows: slice, value: Tensor) -> Tensor:
                index = torch.arange(rows.start, rows.stop, device=x.device) // (len(x) // len(inputs))
                return between(self.module, self.roles.path(first), self.roles.path(role), inputs[index], value)

        def front(rows: slice, graph: bool) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(graph):
                leaf = x[rows].detach().requires_grad_(graph)
                z = self._computed(lambda value: layer(rows, value), leaf.clone())
            if graph and not z.requires_grad:  # parameters are frozen: it can only come from the input
                raise UserError(f"no gradient flows from {self.roles.path(role)} to the input; take another layer")
            return leaf, z

        def forward(rows: slice) -> Tensor:
            whole = keep and rows.stop - rows.start == len(x)
            leaf, z = front(rows, whole)
            if whole:
                kept.append((leaf, z))
            return z.detach()

        def back(grad: Tensor) -> Tensor:
            def piece(rows: slice) -> Tensor:
                whole = rows.stop - rows.start == len(x)
                if not whole:
                    kept.clear()
                again = not kept
                leaf, z = front(rows, True) if again else kept.pop()
                (found,) = torch.autograd.grad(z, leaf, grad[rows])
                found = found.contiguous()
                if not again:
                    self.passed -= len(x)  # they went through the net once, and were counted then
                return found

            return self.chunked(piece, len(x))

        return self.chunked(forward, len(x)), back

    @torch.no_grad()
    def record(self, roles: Sequence[str], x: Tensor) -> dict[str, Tensor]:
        """(B, *input) -> the outputs of several layers, (B, *layer) each, in one pass of the whole net.

        Of a layer that returns a tuple, its first element. Raises UserError for a layer that does
        not run exactly once.
        """

        self._admit(x)

        def piece(rows: slice) -> tuple[Tensor, ...]:
            found: dict[str, list[Tensor]] = {role: [] for role in roles}

            def catch(role: str) -> Callable[[nn.Module, Any, Any], None]:
                def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                    # A copy: what comes next may write into it.
                    layer = first_tensor(output, self.roles.path(role))
                    found[role].append(layer.to(self.dtype if layer.is_floating_point() else None, copy=True))

                return hook

            with ExitStack() as stack:
                for role in found:
                    stack.enter_context(hooked(self.roles.layer(role), catch(role)))
                self._computed(self.module, x[rows].clone())
            for role, outputs in found.items():
                if len(outputs) != 1:
                    raise UserError(
                        f"layer {self.roles.path(role)} runs {len(outputs)} times in a forward pass; "
                        f"set model.layers.{role} to one that runs exactly once"
                    )
            return tuple(outputs[0] for outputs in found.values())

        return dict(zip(dict.fromkeys(roles), self.chunked(piece, len(x)), strict=True))

    def rear(self, role: str) -> Callable[..., Tensor]:
        """The net behind a layer as a function (z (N, *layer), *rest of N rows each) -> logits (N, K).

        For what ``after`` and ``gradient`` do not offer: gradients flow, and nothing is cut into
        pieces. Call ``until`` first.
        """
        cut = self._split(role)
        return lambda *z_and_rest: self._scores(lambda z, *rest: cut.rear(z, rest), *z_and_rest)

    def _rear(self, role: str, z: Tensor, rest: tuple[Tensor, ...], rows: slice, n: int) -> Tensor:
        cut = self._split(role)
        if rest:
            repeats, odd = divmod(n, len(rest[0]))
            if odd or not repeats:
                raise ValueError(f"{n} rows cannot be shared out evenly among {len(rest[0])} samples")
            index = torch.arange(rows.start, rows.stop, device=z.device) // repeats
            rest = tuple(t[index] for t in rest)
        return self._scores(lambda z, *rest: cut.rear(z, rest), z, *rest)

    @torch.no_grad()
    def after(self, role: str, z: Tensor, rest: tuple[Tensor, ...] = ()) -> Tensor:
        """Logits (N, K) with the layer's output replaced by z (N, *layer).

        ``rest`` comes from ``until`` and has B rows; N is a multiple of B, and the N // B rows
        of one sample lie next to each other. Computes nothing before the layer, unless the net
        could not be traced.
        """
        return self.chunked(lambda rows: self._rear(role, z[rows].clone(), rest, rows, len(z)), len(z))

    def gradient(
        self,
        z: Tensor,
        objective: Callable[[Tensor, slice], Tensor],
        role: str | None = None,
        rest: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Values (N,) of an objective of the logits, and their gradients (N, *layer).

        ``objective(logits, rows)`` gives one number per row; rows must not interact. With a
        role, z replaces that layer's output as in ``after``; without, z is the input. No graph
        outlives a chunk, so memory is bounded by ``rows`` whatever N is.
        """

        if role is None:
            self._admit(z)

        def piece(rows: slice) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = z[rows].detach().requires_grad_()
                value = leaf.clone()
                out = self(value) if role is None else self._rear(role, value, rest, rows, len(z))
                values = objective(out, rows)
                (grad,) = torch.autograd.grad(values.sum(), leaf)
            return values.detach(), grad.contiguous()

        return self.chunked(piece, len(z))


def _named(classes: Sequence[str]) -> ClassNames:
    if isinstance(classes, str) or not all(isinstance(one, str) for one in classes):
        raise UserError(f"classes: give the name of each class, such as ('cat', 'dog'), not {classes!r}")
    return ClassNames.of(classes, "classes")
