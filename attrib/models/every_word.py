"""Whether a text net reads its words by one layer alone, so that a map made there is of all that they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attrib.models.classifier import Classifier
from attrib.models.exam import tolerance
from attrib.models.instead import told_apart
from attrib.models.layers import hooked
from attrib.models.padding import apart, tried
from attrib.models.token_axis import not_per_token
from attrib.types import Batch, UserError


def embeds(model: Classifier, role: str) -> bool:
    """Whether the role's layer is a table of vectors, which is where the words of a text go in."""
    return isinstance(model.roles.layer(role), nn.Embedding)


@torch.no_grad()
def check_every_word(model: Classifier, role: str, batch: Batch) -> bool:
    """Whether a text of the batch could be tried: one with different tokens.

    Nothing that the layer gives for its words is handed on (zeros are), and the net is told of other words: each
    comes where the next one was, so that one is lost and another stands twice, which a net that only counts them sees
    as well. Its logits must be equal then. A table of positions or of segments does not see it, nor does what finds
    the padding or the token that ends the text; and a weight of each word by which its vector is multiplied has
    nothing to weigh. Ids that came without words may have such tokens among them, so one kind of token, or two, may
    have to stay where they are.

    Raises UserError for a net that reads the words in another way as well, as a decoder with a table of its own does,
    and for one that gives the layer its words in another order.
    """
    assert batch.words is not None
    assert batch.lengths is not None  # of a text
    pad = getattr(model.module, "pad_id", -1)
    for i, length in enumerate(batch.lengths.tolist()):
        x, words = batch.x[i : i + 1, :length], batch.words[i, :length] >= 0
        # Where the id of padding is a word too, a net may find the text's end by it.
        words = words.to(x.device) & (x[0] != pad)
        _check_places(model, role, x, words)
        other = _moved(x, words)
        if torch.equal(other, x):
            continue
        z = _given(model, role, x, words)
        if z is None:
            return True  # whoever uses the layer will say so
        here = _logits(model, role, x, z)
        share = None if here is None else _change(model, role, other, z, here)
        if here is None or share is None:
            continue
        bound = tolerance(z) / 10
        if share > bound:
            left = (_change(model, role, some, z, here) for some in _others(x, words))
            if not any(change is not None and change <= bound for change in left):
                raise UserError(_not_alone(model, role, x, other, share))
        return True
    return False


def _outputs(model: Classifier, role: str, x: Tensor) -> list[Any]:
    """What the layer gives for a text (1, T), at each of its calls."""
    found: list[Any] = []
    with hooked(model.roles.layer(role), lambda _module, _inputs, output: found.append(output)):
        model.module(x.clone())
    return found


def _check_places(model: Classifier, role: str, x: Tensor, words: Tensor) -> None:
    """Raises UserError if another word at either end of a text (1, T) changes vectors, but not the one in its place.

    Also if the layer, called once, does not give (1, T, E): some methods ask the graph, which does not know texts.
    """
    plain = _outputs(model, role, x)
    if len(plain) != 1:
        return  # whoever uses the layer will say so
    if plain[0].shape[:-1] != x.shape:
        raise UserError(not_per_token(role, model.roles.path(role), plain[0], x))
    places = words.nonzero().flatten().tolist()
    for at in {places[0], places[-1]} if places else ():
        others = x[0, words & (x[0] != x[0, at])]
        if not len(others):
            continue
        changed = x.clone()
        changed[0, at] = others[0]
        if tried(model.module, changed) is None:
            continue
        (other,) = _outputs(model, role, changed)
        if other.shape != plain[0].shape:
            continue
        answers = (other != plain[0])[0].any(1)
        if answers.any() and not answers[at]:
            raise UserError(
                f"model.layers.{role}: {type(model.module).__name__} gives {model.roles.path(role)} the words in "
                f"another order: another word at place {at} of a text changes the vector of place "
                f"{int(answers.nonzero()[0])}, not its own, so that a map made there would be of other words. Let the "
                "net embed the words as they come and put their vectors into its order"
            )


def _given(model: Classifier, role: str, x: Tensor, words: Tensor) -> Tensor | None:
    """What the layer gives for a text (1, T), with zeros for its ``words``; None if it is called more than once."""
    found = _outputs(model, role, x)
    return found[0].masked_fill(words[None, :, None], 0) if len(found) == 1 else None


def _logits(model: Classifier, role: str, text: Tensor, z: Tensor) -> Tensor | None:
    """With ``z`` as the layer's output; None of a text that the net does not take.

    Not by the cut net, which would be tried on these texts, and they are made up.
    """
    with hooked(model.roles.layer(role), lambda _module, _inputs, _output: z.clone()):
        return tried(model.module, text)


def _change(model: Classifier, role: str, text: Tensor, z: Tensor, here: Tensor) -> float | None:
    """How far logits are from ``here`` with other words; None of a text that the net does not take."""
    there = _logits(model, role, text, z)
    return None if there is None else apart(here, there)


def _others(x: Tensor, words: Tensor) -> Iterator[Tensor]:
    """The text with its words moved but for those of one kind, for each kind; the last word's first.

    Then but for two kinds, one of which stands at an end: the token between two texts and the one behind them, say.
    """
    tokens = x[0, words].tolist()
    kinds = list(dict.fromkeys(reversed(tokens)))
    pairs = [(end, token) for end in (tokens[-1], tokens[0]) for token in kinds if token != end]
    for stay in [*((token,) for token in kinds), *pairs]:
        other = _moved(x, words & ~torch.isin(x[0], x.new_tensor(stay)))
        if not torch.equal(other, x):
            yield other


def _moved(x: Tensor, places: Tensor) -> Tensor:
    """The text (1, T) with each token at these places (T,) where the next one was; the first is there twice."""
    other, some = x.clone(), places.nonzero().squeeze(1)
    other[:, some[1:]] = x[:, some[:-1]]
    return other


def _not_alone(model: Classifier, role: str, x: Tensor, other: Tensor, share: float) -> str:
    path, name = model.roles.path(role), type(model.module).__name__
    tables = [table for table in told_apart(model.module, x, other) if table != path]
    way = f"by {' and '.join(tables)}" if tables else "in a way that is no nn.Embedding"
    return (
        f"model.layers.{role}: {name} reads the words not by {path} alone but also {way}: with no words there, others "
        f"in their places change its logits by {share:.2g} of the largest. A map made at {path} would be of a part of "
        "what the words do. Give a net in which one module embeds the words for all that read them, or take what does "
        "not go through that layer: a method that reads none or one behind them all, metrics with words=mask or "
        "words=delete"
    )
