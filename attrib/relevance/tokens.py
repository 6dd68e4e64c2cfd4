"""Whether one token can be followed through all layers of a net that attends.

What attention methods say of token j of the input is true only if token j of each attention is token j of the one
before, and if tokens meet nowhere else. A graph does not show that (a flip, a convolution over tokens and a layer norm
are all calls like others), so it is found out by changing what an attention gives at some tokens:

- At each later attention, nothing else may change. Every bit of a token's number makes two sets of tokens, those that
  have it and those that do not. If nothing leaks from any of these sets, no token depends on another one.
- Behind the last attention, there must be a place at which tokens are still apart, and behind which the logits read
  them alike: one of them, or all of some. A class token may be read beside the mean of others.
- The input is changed in bands. What answers in the first attention says which tokens are the input's there: what goes
  around attention must not move either, and all heads must have the same token at the same place. Else what seems to
  be heads are rows of an image, or windows.

All runs are of the same shape, so that what does not change is equal to the bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from attrib.models.calls import call, is_float, operation
from attrib.models.graph import Graph
from attrib.noise import Noise
from attrib.relevance.ways import ELSE, REFUSED, Ways, ancestors, tokens_of
from attrib.types import UserError

BANDS = 4  # of the image, along each axis; of a text, in all
LEAK = 1e-3  # what other tokens may change by, as a share of what those change by that are changed
ROUNDING = 16.0  # so many times the precision of the largest number is no change
SIZES = (
    1.0,
    1e3,
    1e6,
)  # of a change, in units of what it changes; larger where it is not seen, as behind a layer scale
SEEN = 1e3  # times the rounding, that a change must make
QUERIES = 64  # rows of a matrix of weights that are looked at
SAME = 0.25  # distance of the same token's places in two heads, as a share of that of any two
CELLS = 64  # tokens whose places are compared


@dataclass
class _Run:
    """What a pass shows.

    values   of every attention, (heads, T, D)
    weights  of some queries, (heads, Q, T)
    mixed    what it gives, (N, T, C)
    behind   what the calls give that all ways behind the last attention lead through
    """

    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    behind: dict[fx.Node, Tensor] = field(default_factory=dict)


# (the run so far, what an attention gives (N, T, C)) -> what to go on with
Change = Callable[[_Run, Tensor], Tensor]


def check_followed(graph: Graph, products: Sequence[fx.Node], ways: Ways, x: Tensor) -> None:
    """Raises UserError unless each token of a graph's attentions can be followed from the input x to the logits.

    products  of weights and values, in order
    x         (N, *input), one row if the graph is good for that
    """
    with torch.no_grad():
        _Check(graph, products, ways, x).check()


class _Check:
    def __init__(self, graph: Graph, products: Sequence[fx.Node], ways: Ways, x: Tensor) -> None:
        self.graph, self.products, self.x = graph, products, x
        self.behind = [node for node in ways.through(graph.output) if products[-1] in ancestors(graph, node)]
        self.plain = self.run(x)
        self.tokens = self.plain.values[0].shape[1]
        self.noise = [
            _size(mixed) * Noise([f"attention/{i}"], device=x.device, dtype=mixed.dtype).normal(*mixed.shape[1:])
            for i, mixed in enumerate(self.plain.mixed)
        ]

    def check(self) -> None:
        starts = list(self.starts())
        self.check_heads(starts)
        sets = list(self.sets())
        if not sets:
            return
        for size in SIZES:
            runs = [self.run(self.x, self.changing(of, size)) for of in sets]
            if self.seen(runs):
                break
        answering = [self.answering(run) for run in starts]
        for run, of in zip([*runs, *starts], [*sets, *answering], strict=True):
            self.check_apart(run, of)
        self.check_read(runs, starts, answering)

    # ---- runs ------------------------------------------------------------------------------------------

    def run(self, x: Tensor, change: Change | None = None, replaced: Mapping[fx.Node, Tensor] | None = None,
            embedded: Callable[[Tensor], Tensor] | None = None) -> _Run:  # fmt: skip
        """A pass in which ``change`` is made behind every attention; in place of some calls there is what they give."""
        found = _Run()

        def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if replaced and node in replaced:
                return replaced[node]
            result = call(node)(*args, **kwargs)
            if embedded is not None and operation(node) == "embedding" and node.args[1] is self.graph.input:
                return embedded(result)
            if node in self.products:
                weight, value = args[:2]
                found.values.append(value.reshape(-1, *value.shape[-2:]))
                step = -(-weight.shape[-1] // QUERIES)
                found.weights.append(weight.reshape(-1, *weight.shape[-2:])[:, ::step].clone())
                mixed = tokens_of(result, len(self.x))
                found.mixed.append(mixed)
                if change is not None:
                    mixed = change(found, mixed)
                    result = mixed.unflatten(2, (-1, result.shape[-1])).transpose(1, 2).reshape(result.shape)
            if node in self.behind and isinstance(result, Tensor):
                found.behind[node] = result
            return result

        found.behind[self.graph.output] = self.graph.propagate(x, rule)
        return found

    def sets(self) -> Iterator[Tensor]:
        """(T,) of tokens to change: those with a bit in their number, and those without."""
        number = torch.arange(self.tokens, device=self.x.device)
        for bit in range((self.tokens - 1).bit_length()):
            has = (number >> bit) % 2 == 1
            yield has
            yield ~has

    def changing(self, of: Tensor, size: float) -> Change:
        def change(run: _Run, _mixed: Tensor) -> Tensor:
            plain, noise = self.plain.mixed[len(run.mixed) - 1], self.noise[len(run.mixed) - 1]
            return torch.where(of[:, None], plain + size * noise, plain)

        return change

    def starts(self) -> Iterator[_Run]:
        """Of a changed input. Tokens that do not answer in the first attention go on as they were."""

        def change(run: _Run, mixed: Tensor) -> Tensor:
            return torch.where(self.answering(run)[:, None], mixed, self.plain.mixed[len(run.mixed) - 1])

        def noise(like: Tensor) -> Tensor:
            new = Noise(["attention"], device=like.device, dtype=like.dtype).normal(*like.shape[1:])
            return like.mean() + _size(like - like.mean()) * new

        def inside(band: Tensor, given: Tensor) -> Tensor:
            return torch.where(band, noise(given), given)

        if is_float(self.graph.input):
            new = noise(self.x)
            for axis in (2, 3):
                for band in _bands(self.x.shape[axis], self.x.device):
                    yield self.run(torch.where(band.view(-1, *[1] * (3 - axis)), new, self.x), change)
        else:
            for band in _bands(self.x.shape[1], self.x.device):
                yield self.run(self.x, change, embedded=partial(inside, band[:, None]))

    # ---- what they show ----------------------------------------------------------------------------------

    def answering(self, run: _Run) -> Tensor:
        """(T,) the tokens that are others in the first attention."""
        now, before = run.values[0], self.plain.values[0]
        return ((now - before).abs() > _rounding(before)).any(2).any(0)

    def seen(self, runs: Sequence[_Run]) -> bool:
        """Whether the changes are large beside rounding, wherever they are looked for."""
        pairs = [([run.values[i] for run in runs], before) for i, before in enumerate(self.plain.values) if i]
        pairs += [([run.behind[node] for run in runs], before) for node, before in self.plain.behind.items()]
        shown = [(torch.stack(now) - before).abs().amax() > SEEN * _rounding(before) for now, before in pairs]
        return bool(torch.stack(shown).all())

    def check_apart(self, run: _Run, of: Tensor) -> None:
        """That tokens which are not ``of`` those that were changed are at each later attention what they were."""
        leaks = []
        for i, (now, before) in enumerate(zip(run.values, self.plain.values, strict=True)):
            change = (now - before).abs().amax((0, 2))
            allowed = torch.maximum(LEAK * change.masked_fill(~of, 0).sum() / of.sum().clamp(min=1), _rounding(before))
            leaks.append((change.masked_fill(of, 0) > allowed).any() | self._weights_leak(run, i, of))
        for i, leaks_here in enumerate(torch.stack(leaks).tolist()):
            if leaks_here:
                at = self.graph.where(self.products[i])
                before_it = f"the attention of {self.graph.where(self.products[i - 1])}" if i else "the input"
                raise UserError(
                    f"{REFUSED} whose tokens can be followed: what {at} attends to as one token depends on other "
                    f"tokens of {before_it}, because they are moved or mixed between, as by a flip, a shift or a "
                    f"convolution. {ELSE}"
                )

    def _weights_leak(self, run: _Run, i: int, of: Tensor) -> Tensor:
        """Whether an unchanged query attends otherwise to unchanged keys, but for what it has left for all of them."""
        now, before = run.weights[i], self.plain.weights[i]
        info = torch.finfo(before.dtype)
        known = (now > info.tiny * 2**20) & (before > info.tiny * 2**20)
        ratio = (now.clamp(min=info.tiny) / before.clamp(min=info.tiny)).log()

        def spread(which: Tensor) -> Tensor:
            high, low = ratio.masked_fill(~which, -torch.inf).amax(2), ratio.masked_fill(~which, torch.inf).amin(2)
            return torch.where(high > low, high - low, 0.0)

        step = -(-self.tokens // QUERIES)
        held = spread(known & ~of).masked_fill(of[::step], 0)
        return (held > torch.clamp(LEAK * spread(known).mean(), min=1e3 * ROUNDING * info.eps)).any()

    def check_heads(self, starts: Sequence[_Run]) -> None:
        """That one token of all heads is the same place of the input."""
        before = self.plain.values[0]
        energy = torch.stack([(run.values[0] - before).double().square().sum(2) for run in starts])  # (B, heads, T)
        step = -(-self.tokens // CELLS)
        share = energy[:, :, ::step] / energy[:, :, ::step].sum(0).clamp(min=torch.finfo(energy.dtype).tiny)
        rows = len(self.x)
        share = share.unflatten(1, (rows, -1))[:, 0].permute(1, 2, 0)  # (heads, T, B), of the first row
        answers = share.sum(2) > 0.5  # a class token does not; neither does a head that is pruned
        both = answers[:, None] & answers
        apart = (share[:, None] - share).abs().sum(3)
        cells, all_answer = share.flatten(0, 1), answers.flatten()
        anywhere = torch.cdist(cells, cells, p=1)[all_answer][:, all_answer]
        pairs, of_any = both.sum() - answers.sum(), anywhere.numel() - len(anywhere)
        if of_any and bool(apart[both].sum() / pairs.clamp(min=1) > SAME * anywhere.sum() / of_any):
            where = self.graph.where(self.products[0])
            raise UserError(
                f"{REFUSED} over the whole input: {where} attends with {len(share)} matrices of {self.tokens} tokens "
                "that are not heads, as the same token stands at another place of the input in each, as in attention "
                f"along rows or in windows. {ELSE}"
            )

    def check_read(self, runs: Sequence[_Run], starts: Sequence[_Run], answering: Sequence[Tensor]) -> None:
        """That the logits read some tokens alike, behind the last place where all are apart."""
        at = self.last_apart(runs)
        if at is None:
            self.refuse_read("they meet where something else comes to them, or before they are read")
        node, owner = at
        for run, of in zip(starts, answering, strict=True):
            change = (run.behind[node] - self.plain.behind[node]).abs()
            others = (owner >= 0) & ~of[owner]
            allowed = torch.maximum(LEAK * change.mean(), _rounding(self.plain.behind[node]))
            if bool((change.masked_fill(~others, 0) > allowed).any()):
                self.refuse_read("what goes around the last attention is moved")
        if node is self.graph.output:  # each logit is of one token
            self.check_alike(torch.ones_like(self.plain.behind[node]), owner)
            return
        with torch.enable_grad():
            leaf = self.plain.behind[node].clone().requires_grad_()
            logits = self.run(self.x, replaced={node: leaf}).behind[self.graph.output]
            weight = torch.cos(torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype))
            (gradient,) = torch.autograd.grad((logits * weight).sum(), leaf)
        for tokens in self.check_alike(gradient, owner):
            self.check_order(runs, tokens)

    def check_order(self, runs: Sequence[_Run], tokens: Tensor) -> None:
        """That the logits stay the same when tokens that they read alike change places right behind the attention.

        Else they were weighed by their place before they met.
        """
        found = self.apart(runs, self.behind)
        assert found is not None
        node, owner = found
        value, places = self.plain.behind[node].clone(), [(owner == token).nonzero() for token in tokens]
        if len({len(place) for place in places}) > 1:
            return  # not one vector for each token
        moved, twice = value.clone(), value.clone()
        for i, place in enumerate(places):
            moved[tuple(place.T)] = value[tuple(places[i - 1].T)]
        twice[tuple(places[0].T)] = value[tuple(places[1].T)]
        now, other = (self.run(self.x, replaced={node: one}).behind[self.graph.output] for one in (moved, twice))
        before = self.plain.behind[self.graph.output]
        allowed = torch.maximum(LEAK * (other - before).abs().amax(), 64 * _rounding(before))
        if bool((now - before).abs().amax() > allowed):
            self.refuse_read("it reads them with different weights")

    def last_apart(self, runs: Sequence[_Run]) -> tuple[fx.Node, Tensor] | None:
        """The last call behind which no number depends on two tokens, and the token of every number it gives, or -1."""
        return self.apart(runs, reversed(self.behind))

    def apart(self, runs: Sequence[_Run], nodes: Iterable[fx.Node]) -> tuple[fx.Node, Tensor] | None:
        """The first of ``nodes`` of which no number depends on two tokens, and the token of every number, or -1."""
        for node in nodes:
            if node not in self.plain.behind:
                continue
            before = self.plain.behind[node]
            change = torch.stack([(run.behind[node] - before).abs() for run in runs])
            changed = change > torch.maximum(LEAK * change.mean(), _rounding(before))
            has, has_not = changed[::2], changed[1::2]
            if not bool((has & has_not).any()):
                bits = 2 ** torch.arange(len(has), device=before.device)
                token = (has * bits.view(-1, *[1] * before.ndim)).sum(0)
                return node, token.masked_fill(~changed.any(0), -1)
        return None

    def check_alike(self, gradient: Tensor, owner: Tensor) -> list[Tensor]:
        """That of the numbers of several tokens, those of all tokens, or of all but one, have the same gradients.

        Gives the tokens that are read alike, if there are several.
        """
        places = [axis for axis in range(owner.ndim) if _differs(owner, axis)]
        channels = [axis for axis in range(owner.ndim) if axis not in places]
        count = math.prod(owner.shape[axis] for axis in places)
        gradient, token = (t.permute(*places, *channels).reshape(count, -1) for t in (gradient, owner))
        token, size = token.amax(1), gradient.abs().amax(1)
        read = (token >= 0) & (size > torch.finfo(size.dtype).eps * size.amax())
        gradient, token = gradient[read], token[read]
        if len(token) < 2:
            return []
        tolerance = LEAK * gradient.abs().amax()
        alike = (gradient - gradient[0]).abs().amax(1) <= tolerance
        others = gradient[~alike]
        if len(others) and bool(((others - others[0]).abs().amax(1) > tolerance).any()):
            self.refuse_read("it reads them with different weights, or after they have met")
        if len(others) and bool(_parallel(gradient[0], others[0])):
            self.refuse_read("it reads them with different weights")
        if len(token.unique()) < len(token):
            self.refuse_read("it reads some of them several times")
        return [some for some in (token[alike], token[~alike]) if len(some) > 1]

    def refuse_read(self, why: str) -> NoReturn:
        last = self.graph.where(self.products[-1])
        raise UserError(
            f"{REFUSED} whose tokens are read one by one or as a mean: {self.graph.name} does not read the tokens "
            f"that the last attention, {last}, gives like that: {why}. {ELSE}"
        )


def _size(of: Tensor) -> Tensor:
    """The root of the mean square; 1 of zeros."""
    size = of.square().mean().sqrt()
    return torch.where(size > 0, size, 1.0)


def _rounding(of: Tensor) -> Tensor:
    return ROUNDING * torch.finfo(of.dtype).eps * of.abs().amax()


def _bands(length: int, device: torch.device) -> Iterator[Tensor]:
    """(length,) masks, each of a part."""
    at = torch.arange(length, device=device) * BANDS // length
    return (at == band for band in range(BANDS) if band < length)


def _differs(owner: Tensor, axis: int) -> bool:
    """Whether the token changes along an axis."""
    one, other = owner.narrow(axis, 0, owner.shape[axis] - 1), owner.narrow(axis, 1, owner.shape[axis] - 1)
    return bool(((one >= 0) & (other >= 0) & (one != other)).any())


def _parallel(one: Tensor, other: Tensor) -> Tensor:
    """Whether one is a multiple of the other."""
    product = (one * other).sum().square()
    return product > (1 - LEAK) * one.square().sum() * other.square().sum()
