"""The admission exam: what a net does with two samples, alone and together.

A number of attrib is a sample's own: it must not depend on what shares its batch, on the run, or on the padding of a
text. Most nets keep that, and those that do not look like the others. So each is tried on two samples, in five passes
of at most two rows, and two or three more for texts.

Rounding depends on the size of a batch. Differences are relative to the row's largest logit, and up to ``TOLERANCE``
they count as rounding: of float32 that is ten thousand times its precision, which deep nets use a tenth of, while the
statistics of a batch, or a unit that drops out, change the first or second digit. For padding the bound is a tenth of
that: what follows from it costs time, not the net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from attrib.models.calls import EachCall
from attrib.models.decisions import Decisions
from attrib.models.device_memory import of_the_device
from attrib.models.draws import drawing, generators
from attrib.models.output import Output
from attrib.models.output_kind import Link
from attrib.models.output_kinds import ROUNDING, Classes, Sigmoid
from attrib.models.padding import apart, seen
from attrib.noise import global_states
from attrib.types import UserError

aten = torch.ops.aten
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Exam:
    """How far logits are apart that should be equal, relative to the largest of their row.

    on        "noise": two made-up inputs, when the net was taken in. "sample": one real sample, and one made of it.
              "samples": two different real samples
    again     of equal runs
    together  of a sample alone and in a batch, in either order, and twice in a batch; None if rows go one by one
    padding   of a text alone and with padding, or beside a longer one, see ``models.padding``; None for what is no
              text, or where it is not known what pads
    sorted    whether a layer has the texts of a batch in an order of its own
    decides   whether the net reads numbers of its samples, and so may decide by them for the whole batch

    >>> from attrib.models import Classifier
    >>> model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_shape=(3, 2, 2))
    >>> model.exam.on, model.exam.again, model.exam.padding
    ('noise', 0.0, None)
    """

    on: Literal["noise", "sample", "samples"]
    again: float
    together: float | None = None
    padding: float | None = None
    sorted: bool = False
    decides: bool = False


def examine(
    net: nn.Module,
    output: Output,
    x: Tensor,
    on: Literal["noise", "sample", "samples"],
    pad: int | None = None,
    pairs: bool = True,
    tokens: Sequence[int] = (),
) -> Exam:
    """x (2, *input) are two different samples; texts of equal length, ``pad`` being the id of padding.

    ``tokens`` are others that texts consist of.

    Without ``pairs`` no two rows go through the net together.

    Raises UserError for a net that does not return logits, but probabilities or something else, draws random numbers,
    changes from run to run, or lets rows interact. An error of the net itself on one of the samples is raised as it is.
    """
    name, bound = type(net).__name__, tolerance(x)
    with torch.no_grad(), global_states(0, x.device), output.alone(net):

        def scores(rows: Tensor) -> Tensor:
            logits = net(rows)
            output.check(name, logits, len(rows))
            return logits

        def run(*rows: int) -> Tensor:
            return scores(x[list(rows)].clone())

        before = generators(x.device)
        alone = run(0)
        draws = not all(map(torch.equal, before, generators(x.device)))
        again = apart(alone, run(0))
        if again > bound or (draws and _drawn_numbers_count(run)):
            raise UserError(_random(net, x, again, draws))
        if type(output.read) is Classes and (link := _probabilities(alone, run)) is not None:
            raise UserError(_no_logits(name, link))
        single = isinstance(output.read, Sigmoid) and output.read.of == "logit"
        if single and _probabilities(2 * alone[:, 1:], lambda row: 2 * run(row)[:, 1:]) is not None:
            raise UserError(_no_logits(name, "sigmoid", "{read: sigmoid, of: probability}"))
        padding, turned = (None, False) if pad is None else seen(net, x, pad, pairs, tokens)
        if not pairs:
            return Exam(on, again, None, padding)
        try:
            both = x.clone()
            with Decisions(both) as decisions:
                ab = scores(both)
            ba, aa = run(1, 0), run(0, 0)
        except Exception as error:  # a user's net may raise anything
            if isinstance(error, UserError) or of_the_device(error):
                raise
            run(1)  # what the net does not take alone either, such as a text without its end, is not for two to blame
            raise UserError(
                f"{name} takes one sample alone, but not two together ({type(error).__name__}: {error}); a net must "
                "take a batch of any size"
            ) from error
        equal = ((alone, ab[:1]), (alone, ba[1:]), (ab[1:], ba[:1]), (alone, aa[:1]), (alone, aa[1:]))
        together = max(apart(one, other) for one, other in equal)
        if together > bound and not decisions.found:  # else each sample goes alone
            raise UserError(_interaction(net, x, together))
    return Exam(on, again, together, padding, turned, decisions.found)


def tolerance(x: Tensor) -> float:
    return TOLERANCE[torch.float64 if x.dtype == torch.float64 else torch.float32]


# ---- probabilities ------------------------------------------------------------------------------


def _probabilities(first: Tensor, run: Callable[[int], Tensor]) -> Link | None:
    """Which probabilities a net returns in the place of logits; None if it does not. ``first`` is what row 0 gave.

    Numbers from 0 to 1 that add up to 1 for two inputs are no chance. Those that do not add up are only what a sigmoid
    gave, be it clamped.
    """
    if not _between(first):
        return None
    both = torch.cat([first, run(1)]).double()
    if not _between(both):
        return None
    if both.shape[1] > 1 and ((both.sum(1) - 1).abs() <= ROUNDING).all():
        return "softmax"
    with _Sigmoids() as sigmoids:
        last = run(0)
    return "sigmoid" if any(_same(last, one) for one in sigmoids.found) else None


def _between(scores: Tensor) -> bool:
    return bool(((scores >= 0) & (scores <= 1 + ROUNDING)).all())


class _Sigmoids(EachCall):
    """Keeps what sigmoids give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.sigmoid, aten.sigmoid_, aten.hardsigmoid, aten.hardsigmoid_):
            self.found.append(out.clone())
        return out


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers, up to a clamp that keeps their logarithms finite."""
    return one.numel() == other.numel() and torch.allclose(one.flatten(), other.flatten(), rtol=0, atol=ROUNDING * 10)


def _no_logits(name: str, link: Link, single: str = "") -> str:
    """Why a net is refused that returns probabilities."""
    what = "probabilities (its scores add up to 1)" if link == "softmax" else "probabilities (what a sigmoid gave)"
    fields = "{read: probabilities}" if link == "softmax" else single or "{read: probabilities, link: sigmoid}"
    return (
        f"{name} returns {what}, not logits, and a softmax of these would be something else. Give the net without its "
        f"last {link}, or set model.output to {fields} (in Python: Classifier(net, output=...)), which takes logarithms"
    )


# ---- random numbers ------------------------------------------------------------------------------


def _drawn_numbers_count(run: Callable[[int], Tensor]) -> bool:
    """Whether the logits depend on what is drawn. Some nets draw in eval mode what they use in training only.

    Two runs may be equal by chance where little is dropped; so the smallest and the largest numbers are given.
    """
    found = []
    for value in (0, 1):
        try:
            with drawing(value):
                found.append(run(0))
        except Exception as error:  # a net may raise anything, here because of the numbers
            if of_the_device(error):
                raise
            return True
    return apart(*found) > 0


# ---- where it begins -----------------------------------------------------------------------------


class _Call(NamedTuple):
    path: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def _calls(net: nn.Module, x: Tensor, within: AbstractContextManager[Any]) -> list[_Call]:
    """All calls of modules in a pass, in the order in which they end."""
    calls: list[_Call] = []
    open_inputs: list[list[Tensor]] = []

    def kept(values: Any) -> list[Tensor]:
        return [t.detach().cpu().clone() for t in tree_leaves(values) if isinstance(t, Tensor)]

    def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
        open_inputs.append(kept((args, kwargs)))

    def end(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: calls.append(_Call(path, open_inputs.pop(), kept(output)))

    with ExitStack() as stack:
        for path, module in net.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(end(path)).remove)
        with within:
            net(x.clone())
    return calls


def _alike(one: list[Tensor], other: list[Tensor], bound: float) -> bool | None:
    """Whether values are equal, of the second as many rows as the first has; None where that cannot be told."""
    if len(one) != len(other):
        return None
    for a, b in zip(one, other, strict=True):
        if a.shape[1:] != b.shape[1:] or (a.ndim and len(b) not in (len(a), 2 * len(a))):
            return None
        if apart(a, b[: len(a)] if a.ndim else b) > bound:
            return False
    return True


def _origin(net: nn.Module, one: list[_Call], other: list[_Call], bound: float) -> tuple[str, nn.Module | None]:
    """The first module to make different outputs of equal inputs, in words and itself."""
    if [call.path for call in one] != [call.path for call in other]:
        return "a module that could not be found", None
    states = [(_alike(a.inputs, b.inputs, bound), _alike(a.outputs, b.outputs, bound)) for a, b in zip(one, other)]
    changed = [call.path for call, (inputs, _) in zip(one, states, strict=True) if inputs is False]
    for call, state in zip(one, states, strict=True):
        if state == (True, False):
            module = net.get_submodule(call.path)
            inside = [path for path in changed if not call.path or path.startswith(f"{call.path}.")]
            if not inside:
                name = f"{call.path} ({type(module).__name__})" if call.path else f"{type(module).__name__} itself"
                return name, module
            of = f" (at {call.path})" if call.path else ""
            return f"the forward of {type(module).__name__}{of} itself, before {inside[0]}", module
    return "a module that could not be found", None


def _random(net: nn.Module, x: Tensor, again: float, draws: bool) -> str:
    """Why a net is refused whose runs differ."""
    where = "a module that could not be found"
    # Equal runs may draw alike by chance. Where extreme numbers break the net, its own must do.
    for within in ([(drawing(0), drawing(1))] if draws else []) + [(nullcontext(), nullcontext())]:
        try:
            one, other = (_calls(net, x[:1], each) for each in within)
        except Exception as error:  # see _drawn_numbers_count
            if of_the_device(error):
                raise
            continue
        where = _origin(net, one, other, tolerance(x) / 100)[0]
        break
    name = type(net).__name__
    if draws:
        return (
            f"{name} is random in eval mode: it draws random numbers that change its logits, first in {where}. Its "
            "maps would change from run to run. Let it draw in training only, as F.dropout(x, p, self.training) does"
        )
    return (
        f"{name} is not deterministic: run twice on the same input, its logits differ by {again:.2g} of the largest, "
        f"first in {where}. It keeps something from run to run, or draws random numbers of its own; let it do so in "
        "training only"
    )


def _interaction(net: nn.Module, x: Tensor, together: float) -> str:
    """Why a net is refused whose rows interact."""
    one, other = (_calls(net, rows, nullcontext()) for rows in (x[:1], x))
    where, module = _origin(net, one, other, tolerance(x) / 100)
    advice = "Compute each row alone"
    if isinstance(module, _BatchNorm):
        advice = "It normalises by the statistics of the batch; give it running ones (track_running_stats=True)"
    return (
        f"the rows of a batch interact in {type(net).__name__}: the logits of a sample alone and beside another differ "
        f"by {together:.2g} of the largest, first in {where}. Its map would depend on what shares its batch. {advice}"
    )
