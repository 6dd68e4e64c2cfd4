"""What is already as the net reads it: tensors, batches and torch datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from attrib.api.loaders import collate_of, places_of
from attrib.api.names import Given, Input, labels_of, named, writable
from attrib.api.rows import InMemory, Item, OfBatch, OfItems, OfTorch, real_length
from attrib.datasets import ImageTransform, WaveTransform
from attrib.datasets.memory import Tensors
from attrib.keys import tensor_digest
from attrib.models.text import real_tokens
from attrib.types import Batch, UserError

TRIED = 8  # samples of a dataset, among which one is looked for that can be read


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the net of these tensors wants its data.

    how   its input, as far as it is known
    own   the id of padding that the net itself names
    """

    how: Input
    own: int | None = None

    @property
    def pad(self) -> int | None:
        """The id behind a text, which is no word of it: the net's own counts, else its tokenizer's."""
        return getattr(self.how, "pad", None) if self.own is None else self.own

    def dataset(self, read: Callable[[str], Batch], uids: Sequence[str], modality: str, width: int = 0) -> Tensors:
        """``width`` is the places of the longest text."""
        transform = self.how if isinstance(self.how, ImageTransform | WaveTransform) else None
        return Tensors(uids, read, modality, transform, self.pad if modality == "text" else None, width=width)


def of_tensors(many: Sequence[Tensor], net: Reading, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    """Samples in memory. A text has the same name, and so the same random numbers, however far it was padded."""
    pad = net.pad if _modality(many[0]) == "text" else None
    contents = [one if pad is None else one[: real_length(one, pad)] for one in many]
    names = named(uids, [tensor_digest({"": content})[:8] for content in contents])
    item = InMemory(dict(zip(names, many)), labels_of(labels, names))
    return Given(_made(names, item, many[0], net, what, max(len(one) for one in many)), names)


def _modality(one: Tensor) -> str | None:
    return {(3, True): "image", (2, True): "audio", (1, False): "text"}.get((one.ndim, one.is_floating_point()))


def _made(uids: Sequence[str], item: Item, one: Tensor, net: Reading, what: str, width: int) -> Tensors:
    """Samples that ``item`` gives; ``one`` is one of the inputs. ``width`` is the places of the longest text."""
    modality = _modality(one)
    if modality is None:
        raise UserError(
            f"{what}: a sample of {one.dtype} {tuple(one.shape)}; images are (C, H, W) and sounds (C, L), of floats, "
            "texts are (T,) ids"
        )
    if modality == "text":
        return net.dataset(OfItems(item, modality, net.pad), uids, modality, width)
    return net.dataset(OfItems(item, modality), uids, modality)


def of_batch(x: Batch, net: Reading, uids: Sequence[str] | None, labels: Any) -> Given:
    """The samples of a batch, by the names that are given or else its own.

    Of texts without lengths, what the net pads with is padding.
    """
    if len(x) == 0:
        raise UserError("x holds no sample")
    if uids is not None:
        x = dataclasses.replace(x, uids=named(uids, x.uids))
    known = labels_of(labels, x.uids)
    if known:
        x = dataclasses.replace(x, target=torch.stack([known[uid] for uid in x.uids]))
    if len(set(x.uids)) < len(x):
        raise UserError("uids: a name stands for two samples of the batch")
    writable(x.uids)
    modality = {4: "image", 3: "audio", 2: "text"}.get(x.x.ndim)
    if modality is None:
        raise UserError(f"a Batch of inputs {tuple(x.x.shape)}; images have 4 axes, sounds 3, texts 2")
    if modality != "text":
        return Given(net.dataset(OfBatch(x), x.uids, modality), x.uids)
    lengths = x.lengths
    if lengths is None:
        pad, whole = net.pad, torch.full((len(x),), x.x.shape[1])
        lengths = whole if pad is None else real_tokens(x.x, pad).sum(1).cpu()
        x = dataclasses.replace(x, lengths=lengths)
    if x.words is None:  # nothing says which ids are one word
        places = torch.arange(x.x.shape[1]).expand(x.x.shape)
        x = dataclasses.replace(x, words=places.where(places < lengths.cpu()[:, None], -1))
    return Given(net.dataset(OfBatch(x), x.uids, modality, x.x.shape[1]), x.uids)


def of_torch(x: Any, net: Reading, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    """Of a torch dataset, or the one that a DataLoader loads from; each sample is read when it is asked for.

    The names are the places in it. A dataset that gives something else each time, such as random crops, is explained
    as it happens to be.
    """
    loads = isinstance(x, torch_data.DataLoader)
    source = x.dataset if loads else x
    if isinstance(source, torch_data.IterableDataset) or not hasattr(source, "__len__"):
        raise UserError(f"{what}: {type(source).__name__} has no length; give a dataset with __getitem__, or a list")
    places = places_of(x, what) if loads else list(range(len(source)))
    if not places:
        raise UserError(f"{what} holds no sample")
    width = len(str(max(places)))
    names = named(uids, [f"{place:0{width}d}" for place in places])
    collate = collate_of(x, what) if loads else None
    item = OfTorch(source, dict(zip(names, places)), labels_of(labels, names), what, collate)
    first = _first(item, names)
    data = _made(names, item, first, net, what, len(first) if first.ndim else 0)
    data.label_problems = item.problems
    return Given(data, names)


def _first(item: OfTorch, names: Sequence[str]) -> Tensor:
    """The input of the first sample that can be read, among some. Raises what the dataset raises if none can."""
    failed: Exception | None = None
    for name in names[:TRIED]:
        try:
            return item(name)[0]
        except UserError:
            raise
        except Exception as error:  # a user's dataset may raise anything; the sample will be said to have failed
            failed = failed or error
    assert failed is not None
    raise failed
