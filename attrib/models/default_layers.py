"""Layers for the roles ``cam`` and ``bottleneck`` where a user names none, found out by running the net.

A candidate is a *cut*: a module that runs once, gives a single tensor, and which everything behind it reads, so that
no path from the input to the logits goes around it. Whether that is so stands in the graph that autograd keeps of a
forward pass. Its depth is counted in weight layers: modules without children that have a weight of two dimensions or
more (convolutions, linear layers, recurrent layers), in the order in which they run.

A cut is taken only if it has more than one place (``attrib.models.reading``) and most of its places reach the
logits: behind the last block of a vision transformer, only the class token is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from attrib.models.device_memory import is_out_of_memory
from attrib.models.reading import Reading, only
from attrib.models.ways_back import check_way_back
from attrib.noise import Noise
from attrib.types import UserError

ROLES = ("cam", "bottleneck")
MIDDLE = (0.4, 0.5)  # shares of the weight layers between which a bottleneck is looked for first
REACHED = 0.5  # least share of a layer's places whose change changes the logits
SHOWN = 8  # candidates in a message

Look = Callable[[str], Reading | None]  # how the layer at a path is read; None if that cannot be found out


@dataclass(frozen=True)
class DefaultLayer:
    """The layer of a role, and why it was chosen, for people."""

    path: str
    why: str


@dataclass(frozen=True)
class Cut:
    """The output of a module, beside which nothing goes from the input to the logits.

    depth     weight layers that have run up to here
    gradient  (1, *layer), of a mixture of the logits
    """

    path: str
    depth: int
    gradient: Tensor


def default_layer(net: nn.Module, role: str, input_shape: Sequence[int], like: Tensor, look: Look) -> DefaultLayer:
    """The layer for ``role``, for inputs (*input_shape).

    cam         the end of what the last weight layer with places gives: the last cut behind it that has the same
                grid, so that norms and activations count to it, and pooling does not
    bottleneck  in the middle of the net, where 40 to 50 % of the weight layers have run, the end of the outermost
                module (a stage rather than a block, a block rather than a part of one); of several the deepest, and
                directly behind its weight layer. Without any there, the deepest before. The papers put it there as
                well: at conv4_1 of VGG16 and at the end of stage 2 of ResNet-50

    net    in eval mode, with frozen parameters
    like   a tensor of the device and the dtype of the inputs

    Raises UserError with the candidates if there is no such layer.
    """
    if role not in ROLES:
        raise ValueError(f"only {' and '.join(ROLES)} have defaults, not {role}")
    found, total = cuts(net, input_shape, like)
    unread: list[str] = []

    def grid(cut: Cut) -> tuple[int, int] | None:
        """Of a cut with places that reach the logits."""
        if only(cut.gradient.shape[1:]) is not None:
            return None
        reading = look(cut.path)
        if reading is None:
            unread.append(cut.path)
        return reading.grid if reading and _places(reading) > 1 and _reached(cut.gradient, reading) else None

    order = _for_cam(found) if role == "cam" else _for_bottleneck(found, total)
    chosen, size = next(((cut, size) for cut in order if (size := grid(cut))), (None, (0, 0)))
    if chosen is None:
        unknown = f"; which axes are places could not be told of {_some(unread)}" if unread else ""
        raise UserError(
            f"model.layers.{role}: {type(net).__name__} has no layer that could be taken by default, with places that "
            f"reach the logits and read by everything behind it. Name one, which must run once and give one tensor "
            f"(read by everything behind them are {_some([cut.path for cut in reversed(found)])}{unknown})"
        )
    if role == "cam":
        behind = found[found.index(chosen) + 1 :]
        for cut in behind:
            if cut.depth != chosen.depth or cut.gradient.shape != chosen.gradient.shape:
                break
            chosen = cut if grid(cut) == size else chosen
    rule = {"cam": "the last layer", "bottleneck": "a layer in the middle of the net"}[role]
    passed = f"; places could not be told of {_some(unread)}" if unread else ""
    return DefaultLayer(
        chosen.path,
        f"{rule} that everything behind it reads and that has places, {size[0]} x {size[1]}, behind {chosen.depth} of "
        f"{total} weight layers{passed}",
    )


def _for_cam(found: Sequence[Cut]) -> Iterator[Cut]:
    """From the back; of cuts with no weight layer between them, the first one first."""
    for _, group in groupby(reversed(found), key=lambda cut: cut.depth):
        yield from reversed([*group])


def _for_bottleneck(found: Sequence[Cut], total: int) -> list[Cut]:
    behind_weights = [cut for cut in found if cut.depth and cut.depth <= MIDDLE[1] * total]

    def rank(cut: Cut) -> tuple[bool, int, int]:
        before = cut.depth < MIDDLE[0] * total
        return before, 0 if before else cut.path.count("."), -cut.depth

    return sorted(behind_weights, key=rank)


def _some(paths: Sequence[str]) -> str:
    return (", ".join(paths[:SHOWN]) + ", ..." * (len(paths) > SHOWN)) or "none"


def _places(reading: Reading) -> int:
    return reading.grid[0] * reading.grid[1]


def _reached(gradient: Tensor, reading: Reading) -> bool:
    """Whether a change of most places changes the logits."""
    size = gradient[0].abs()
    channels = {"channels_first": 0, "channels_last": 2, "tokens": 1, "vector": 0}[reading.name]
    if reading.name != "tokens" and size.ndim == 2:  # a sound: (C, l) or (l, C)
        channels = min(channels, 1)
    places = size.amax(channels).flatten()[-_places(reading) :]
    return bool((places > 0).double().mean() >= REACHED)


# ---- what a forward pass tells --------------------------------------------------------------------------


@torch.enable_grad()
def cuts(net: nn.Module, input_shape: Sequence[int], like: Tensor) -> tuple[list[Cut], int]:
    """The cuts in the order in which they run, and the number of weight layers.

    Several modules may give the same tensor: then it is the outermost, such as a stage rather than its last block.
    Raises UserError if no gradient flows from the logits to the input.
    """
    x = Noise(["layers"], device=like.device, dtype=like.dtype).normal(*input_shape).requires_grad_()
    ran: list[tuple[str, nn.Module, Any, int]] = []  # path, module, (node, number of its output), depth
    depth = 0

    def record(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal depth
            depth += _is_weight_layer(module)
            made = (output.grad_fn, output.output_nr) if isinstance(output, Tensor) and len(output) == 1 else None
            ran.append((path, module, made, depth))

        return hook

    with ExitStack() as stack:
        for path, module in net.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                stack.callback(module.register_forward_hook(record(path)).remove)
        with _refused_without_gradients(net, x):
            logits = net(x.clone())
    if logits.grad_fn is None:
        raise UserError(
            f"no gradient flows from the logits of {type(net).__name__} to its input, so no layer of it can be chosen "
            "by default; name one (model.layers)"
        )
    calls: dict[str, int] = {}
    for path, *_ in ran:
        calls[path] = calls.get(path, 0) + 1
    narrow = dict(_narrow(logits.grad_fn))
    by_tensor: dict[Any, tuple[str, int]] = {}
    for path, _, made, at in ran:  # what contains a module ends after it
        if made and made[0] is not None and narrow.get(made[0]) == {made[1]} and calls[path] == 1:
            earlier = by_tensor.get(made)
            if earlier is None or f"{earlier[0]}.".startswith(f"{path}."):
                by_tensor[made] = (path, at if earlier is None else earlier[1])
    kept: dict[Any, Tensor] = {}

    def keep(made: Any) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[made[1]]
            if gradient is not None:
                kept[made] = gradient.detach()

        return hook

    with ExitStack() as stack:
        for made in by_tensor:
            stack.callback(made[0].register_prehook(keep(made)).remove)
        mixture = Noise(["logits"], device=like.device, dtype=like.dtype).normal(logits.shape[1])
        with _refused_without_gradients(net, x):
            (slope,) = torch.autograd.grad(logits, x, mixture)
    if not slope.any():
        raise UserError(
            f"the logits of {type(net).__name__} do not change with its input (their gradient is zero, as behind a "
            "head of zeros), so no layer of it can be chosen by default; name one (model.layers)"
        )
    return [Cut(path, at, kept[made]) for made, (path, at) in by_tensor.items() if made in kept], depth


@contextmanager
def _refused_without_gradients(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Raises UserError for a net that autograd cannot follow, or not go back through."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            try:
                check_way_back(net, x.detach(), error)
            except UserError as refusal:
                raise UserError(
                    f"no layer of {type(net).__name__} can be chosen by default; name one (model.layers), which a "
                    f"method without gradients, such as score_cam, can read: {refusal}"
                ) from error
        raise


def _is_weight_layer(module: nn.Module) -> bool:
    """Whether it has a weight matrix itself, and no parts."""
    return not any(True for _ in module.children()) and any(
        sum(side > 1 for side in p.shape) >= 2 for p in module.parameters(recurse=False)
    )


def _narrow(root: Any) -> Iterator[tuple[Any, set[int]]]:
    """The nodes of autograd's graph through which every path from ``root`` to the input leads.

    With the numbers of their outputs that are read. Only the input may require gradients.
    """
    waiting: dict[Any, int] = {}  # node -> edges to it
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            waiting[node] = waiting.get(node, 0) + 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    # Nodes come after all that read them; where a single one is open, nothing goes around it.
    read: dict[Any, set[int]] = {root: {0}}
    ready, opened = [root], {root}
    while ready:
        node = ready.pop()
        if opened == {node}:
            yield node, read[node]
        opened.discard(node)
        for after, number in node.next_functions:
            if after is None:
                continue
            read.setdefault(after, set()).add(number)
            opened.add(after)
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


def only_embedding(net: nn.Module) -> DefaultLayer:
    """The embedding of the tokens, of a net that has no other embedding. Raises UserError.

    >>> only_embedding(nn.Sequential(nn.Embedding(9, 4), nn.Flatten())).path
    '0'
    """
    found = [path for path, module in net.named_modules() if isinstance(module, nn.Embedding)]
    if len(found) == 1:
        return DefaultLayer(found[0], "the only embedding")
    what = f"its embeddings are {', '.join(found)}" if found else "it has no nn.Embedding"
    raise UserError(
        f"{type(net).__name__} has no layer for the role 'embedding', which embeds tokens ({what}); "
        "set model.layers.embedding"
    )
