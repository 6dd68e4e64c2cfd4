"""The kinds of outputs (``model.output.read``): what is explained, one score per row and class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, fx, nn

from attrib.keys import tensor_digest
from attrib.models.text import last_step, real_tokens
from attrib.types import Batch, SampleError, UserError

Link = Literal["softmax", "sigmoid"]  # softmax: classes exclude each other; sigmoid: each is true or not by itself


@dataclass(frozen=True, eq=False)
class OutputKind:
    """Makes scores (N, K) of what a net returns, or of what ``model.output.take`` takes of it.

    A kind keeps tensors that belong to a net (masks, prompts) in the net, as buffers that are no part of its state.

    READ   its name in ``model.output.read``
    LEAST  the smallest K
    """

    READ: ClassVar[str]
    LEAST: ClassVar[int] = 2

    @property
    def decides(self) -> bool:
        """Whether the class with the largest score is the net's answer."""
        return True

    @property
    def per_sample(self) -> bool:
        """Whether a score depends on which sample is explained, see ``Classifier.explaining``."""
        return False

    @property
    def spec(self) -> dict[str, Any]:
        """What enters the model's key, beside the name."""
        return {}

    def link_of(self, net: nn.Module) -> Link | None:
        """How probabilities are made of scores; None if there are none."""
        return "softmax"

    def class_names(self, net: nn.Module) -> tuple[str, ...] | None:
        """The names of the K classes, where they are known."""
        names = getattr(net, "class_names", None)
        return tuple(names) if isinstance(names, tuple | list) else None

    def prepare(self, net: nn.Module) -> None:
        """Look up once what is needed of ``net``, which is on its device by now. Raises UserError."""

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        """What the net returned for the rows x -> (N, K). Raises UserError for what cannot be read like this."""
        return raw

    def check_texts(self, net: nn.Module, batch: Batch) -> None:
        """Raises SampleError for a text whose score cannot be told."""

    def _tensor(self, raw: Any, what: str, dims: Sequence[int]) -> Tensor:
        """``raw``, if it is a tensor of so many dimensions; while the net is traced nobody knows."""
        if isinstance(raw, fx.Proxy):
            return raw  # type: ignore[return-value]
        if not isinstance(raw, Tensor) or raw.ndim not in dims or not raw.is_floating_point():
            shape = f"a tensor {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise UserError(f"model.output: read={self.READ} wants {what}, and the net returns {shape}")
        return raw


class Classes(OutputKind):
    """A logit per class; classes exclude each other."""

    READ = "classes"


class Sigmoid(OutputKind):
    """One logit s, whose sigmoid is the probability of class 1.

    The scores are (-s/2, s/2), whose softmax is that sigmoid, so that both classes can be explained.
    """

    READ = "sigmoid"

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        if not isinstance(raw, Tensor | fx.Proxy):
            raise UserError(f"model.output: a single logit is a tensor (N, 1) or (N,), not a {type(raw).__name__}")
        logit: Any = raw.reshape(-1, 1)
        return torch.cat((-logit / 2, logit / 2), 1)


class Value(OutputKind):
    """Values (N,) or (N, K) of a regression; the target is the number of a value. There are no probabilities."""

    READ = "value"
    LEAST = 1

    @property
    def decides(self) -> bool:
        return False

    def link_of(self, net: nn.Module) -> None:
        return None

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "values (N,) or (N, K)", (1, 2))
        return raw.reshape(raw.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Region(OutputKind):
    """Of a segmentation map (N, C, H, W), the logits of each class over a region. There are no probabilities.

    region  a box (x1, y1, x2, y2), whose edges are pixels of the map: (0, 0, W, H) is all of it; or a mask (H, W), a
            file (.png, where it is not 0, or .npy) or a tensor; or "predicted": for each class the pixels where it
            has the largest logit, for the sample that is explained. Of its perturbed copies the same pixels count
    reduce  "sum" or "mean" over the region
    """

    READ: ClassVar[str] = "region"
    LEAST: ClassVar[int] = 1
    region: Any = None
    reduce: Literal["sum", "mean"] = "sum"
    _mask: Tensor | None = dataclasses.field(init=False, default=None, repr=False)
    _pixels: int = dataclasses.field(init=False, default=0, repr=False)  # in the mask

    def __post_init__(self) -> None:
        region = self.region
        if self.reduce not in ("sum", "mean"):
            raise UserError(f"model.output: reduce must be sum or mean, not {self.reduce!r}")
        if region is None:
            raise UserError("model.output: read=region wants region: a box [x1, y1, x2, y2], a mask or predicted")
        if isinstance(region, str | Path) and region != "predicted":
            object.__setattr__(self, "_mask", _mask_of(Path(region).expanduser()))
        elif isinstance(region, Tensor | np.ndarray):
            object.__setattr__(self, "_mask", _checked_mask(torch.as_tensor(region), "model.output: the mask"))
        elif region != "predicted":
            whole = isinstance(region, Sequence) and all(type(edge) is int for edge in region)
            if not whole or len(region) != 4 or not (0 <= region[0] < region[2] and 0 <= region[1] < region[3]):
                raise UserError(
                    f"model.output: region {region!r} must be a box of four whole numbers x1 < x2, y1 < y2 "
                    "([x1, y1, x2, y2]), a mask or predicted"
                )
            object.__setattr__(self, "region", tuple(region))
        if self._mask is not None:
            object.__setattr__(self, "_pixels", int(self._mask.sum()))

    @property
    def per_sample(self) -> bool:
        return isinstance(self.region, str) and self.region == "predicted"

    @property
    def decides(self) -> bool:
        return not self.per_sample  # sums over regions of different sizes cannot be compared

    @property
    def spec(self) -> dict[str, Any]:
        region = self.region if self._mask is None else tensor_digest({"mask": self._mask})
        return {"region": region, "reduce": self.reduce}

    def link_of(self, net: nn.Module) -> None:
        return None

    def prepare(self, net: nn.Module) -> None:
        if self._mask is not None:
            _keep(net, "output_outside", ~self._mask.to(_like(net).device))
        if self.per_sample:
            net.output_first = None  # type: ignore[assignment]

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "a map (N, C, H, W) of logits", (4,))
        traced = isinstance(raw, fx.Proxy)
        if self.per_sample:
            if traced:  # the region would become a part of the graph, which is cut by hooks instead
                raise TypeError("a graph cannot hold the region of a sample")
            inside = self._inside(net, raw)
            total = raw.masked_fill(~inside, 0.0).sum((2, 3))
            return total if self.reduce == "sum" else total / inside.sum((2, 3)).clamp(min=1)
        if self._mask is not None:
            outside: Any = net.output_outside
            if not traced and outside.shape != raw.shape[2:]:
                raise UserError(
                    f"model.output: the mask has {_size(outside)} pixels, and the map that the net returns "
                    f"{_size(raw)} (height x width); give a mask of the map"
                )
            # Not by a product: outside, a net may say -inf.
            total, count = raw.masked_fill(outside, 0.0).sum((2, 3)), self._pixels
        else:
            x1, y1, x2, y2 = self.region
            if not traced and (x2 > raw.shape[3] or y2 > raw.shape[2]):
                raise UserError(
                    f"model.output: the box {list(self.region)} is not inside the map that the net returns, which has "
                    f"{_size(raw)} pixels (height x width)"
                )
            total, count = raw[:, :, y1:y2, x1:x2].sum((2, 3)), (x2 - x1) * (y2 - y1)
        return total if self.reduce == "sum" else total / count

    def _inside(self, net: nn.Module, raw: Tensor) -> Tensor:
        """(1 or N, C, H, W): the pixels that each class has."""
        first: Any = net.output_first
        if first is None:
            raise UserError(
                "model.output: the predicted region is that of the sample that is explained, and it is not known which "
                "that is; compute this within Classifier.explaining(x)"
            )
        if raw.shape[1] < 2:
            raise UserError("model.output: a map of one class has no predicted region; give a box or a mask")
        if isinstance(first, list):  # see ``Output.alone``
            first.append(raw.detach().argmax(1))
            first = first[-1]
        return first[:, None] == torch.arange(raw.shape[1], device=raw.device)[:, None, None]


@dataclass(frozen=True, eq=False)
class Similarity(OutputKind):
    """Of an image-text model, the similarity of an image with each of K texts: scale * cosine + bias.

    The net returns embeddings (N, D). One that embeds texts too has ``embed_prompts(texts) -> (K, D)``, ``scale``,
    ``bias`` and ``link``, which the fields replace. ``hf_image_text`` is such a net.

    prompts  the texts, or their embeddings (K, D)
    names    of the classes; None: the texts
    """

    READ: ClassVar[str] = "similarity"
    LEAST: ClassVar[int] = 1
    prompts: Any = None
    names: Sequence[str] | None = None
    scale: float | None = None
    bias: float | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        prompts = self.prompts
        texts = _plain_list(prompts) and all(isinstance(text, str) and text.strip() for text in prompts)
        if not texts and not (isinstance(prompts, Tensor) and prompts.ndim == 2 and prompts.is_floating_point()):
            raise UserError("model.output: read=similarity wants prompts: a list of texts, or their embeddings (K, D)")
        if not len(prompts):
            raise UserError("model.output: prompts is empty; give a text for each class")
        if texts:
            object.__setattr__(self, "prompts", tuple(prompts))
            _distinct(self.prompts, "prompts")
        if self.names is not None and (not _plain_list(self.names) or len(self.names) != len(prompts)):
            raise UserError(f"model.output: names must be a list of {len(prompts)}, one for each of the prompts")
        if self.link not in (None, "softmax", "sigmoid"):
            raise UserError(f"model.output: link must be softmax, sigmoid or null, not {self.link!r}")

    @property
    def spec(self) -> dict[str, Any]:
        given = isinstance(self.prompts, Tensor)
        prompts = tensor_digest({"prompts": self.prompts.detach()}) if given else list(self.prompts)
        return {"prompts": prompts, "scale": self.scale, "bias": self.bias, "link": self.link}

    def link_of(self, net: nn.Module) -> Link | None:
        return self.link or getattr(net, "link", "softmax")

    def class_names(self, net: nn.Module) -> tuple[str, ...] | None:
        names = self.names if self.names is not None or isinstance(self.prompts, Tensor) else self.prompts
        return None if names is None else tuple(map(str, names))

    def prepare(self, net: nn.Module) -> None:
        if self.link_of(net) == "softmax" and len(self.prompts) < 2:
            raise UserError("model.output: one prompt alone always has the probability 1; give two or more")
        embed: Callable[[Sequence[str]], Tensor] | None = getattr(net, "embed_prompts", None)
        if isinstance(self.prompts, Tensor):
            found = self.prompts.detach()
        elif embed is None:
            raise UserError(
                f"model.output: {type(net).__name__} cannot embed texts (it has no embed_prompts); give prompts as a "
                "tensor (K, D) of embeddings, or take model=huggingface_image_text"
            )
        else:
            with torch.no_grad():
                found = embed(self.prompts).detach()
        scale = getattr(net, "scale", None) if self.scale is None else self.scale
        bias = getattr(net, "bias", 0.0) if self.bias is None else self.bias
        if not isinstance(scale, float | int):
            raise UserError(
                f"model.output: {type(net).__name__} does not say the scale of its similarities; set model.output.scale"
            )
        # Folded into the texts, whose embeddings have length 1.
        _keep(net, "output_prompts", (float(scale) * F.normalize(found.to(_like(net)), dim=1)))
        _keep(net, "output_bias", torch.full((len(found),), float(bias)).to(_like(net)))

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "embeddings (N, D)", (2,))
        prompts: Any = net.output_prompts
        if isinstance(raw, Tensor) and raw.shape[1] != prompts.shape[1]:
            raise UserError(
                f"model.output: the net returns embeddings of {raw.shape[1]} numbers, those of the prompts have "
                f"{prompts.shape[1]}"
            )
        return F.linear(F.normalize(raw, dim=1), prompts, net.output_bias)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class NextToken(OutputKind):
    """Of a decoder, which returns logits (N, T, V), those of the token behind the last real one.

    candidates  K tokens, by number or, where the net has ``token_ids(words)``, by how they are written (" good", with
                the blank that belongs to it). Classes are then numbered as the list is, and their probabilities are
                those given that one of them comes next. None: all V tokens
    pad_id      id of padding; None: the net's own
    """

    READ: ClassVar[str] = "next_token"
    candidates: Sequence[str | int] | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.candidates is None:
            return
        known = _plain_list(self.candidates) and all(
            type(c) is str or (type(c) is int and c >= 0) for c in self.candidates
        )
        if not known or len(self.candidates) < 2:
            raise UserError(
                f"model.output: candidates must be a list of two tokens or more, by number or as they are written, not "
                f"{self.candidates!r}"
            )
        object.__setattr__(self, "candidates", tuple(self.candidates))

    @property
    def spec(self) -> dict[str, Any]:
        return {"candidates": None if self.candidates is None else list(self.candidates), "pad_id": self.pad_id}

    def class_names(self, net: nn.Module) -> tuple[str, ...] | None:
        return None if self.candidates is None else tuple(map(str, self.candidates))

    def _pad(self, net: nn.Module) -> int:
        pad = getattr(net, "pad_id", None) if self.pad_id is None else self.pad_id
        if not isinstance(pad, int):
            raise UserError(
                f"model.output: where a text ends cannot be told, because {type(net).__name__} has no pad_id; set "
                "model.output.pad_id"
            )
        return pad

    def prepare(self, net: nn.Module) -> None:
        self._pad(net)
        if self.candidates is None:
            return
        words = [word for word in self.candidates if isinstance(word, str)]
        look_up: Callable[[Sequence[str]], Sequence[int]] | None = getattr(net, "token_ids", None)
        if words and look_up is None:
            raise UserError(
                f"model.output: {type(net).__name__} has no tokenizer (token_ids); give candidates by their numbers"
            )
        found = dict(zip(words, look_up(words) if look_up is not None and words else (), strict=True))
        ids = [found[c] if isinstance(c, str) else c for c in self.candidates]
        _distinct(ids, "candidates")
        _keep(net, "output_candidates", torch.tensor(ids, device=_like(net).device))
        net.output_highest = max(ids)  # type: ignore[assignment]

    def check_texts(self, net: nn.Module, batch: Batch) -> None:
        pad = self._pad(net)
        assert batch.lengths is not None
        for uid, length, seen in zip(batch.uids, batch.lengths.tolist(), real_tokens(batch.x, pad).sum(1).tolist()):
            if seen < length:
                raise SampleError(
                    f"{uid} ends with the id of padding, {pad}, so the next token would be that of {length - seen} "
                    "before; set model.pad_id (or model.output.pad_id) to an id that ends no text"
                )

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "logits (N, T, V) of the next tokens", (3,))
        if isinstance(raw, Tensor) and raw.shape[:2] != x.shape[:2]:
            raise UserError(
                f"model.output: the net returns logits {tuple(raw.shape)} for tokens {tuple(x.shape)}; read=next_token "
                "wants one row of them for each token"
            )
        logits = last_step(raw, real_tokens(x, self._pad(net)).sum(1))
        if self.candidates is None:
            return logits
        highest: Any = net.output_highest  # on a GPU an index out of range would take the whole process down
        if isinstance(raw, Tensor) and raw.shape[2] <= highest:
            raise UserError(f"model.output: there is no token {highest}, the net knows {raw.shape[2]}")
        return logits.index_select(1, net.output_candidates)  # type: ignore[arg-type]


KINDS: Mapping[str, type[OutputKind]] = {
    kind.READ: kind for kind in (Classes, Sigmoid, Value, Region, Similarity, NextToken)
}


def _plain_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _distinct(values: Sequence[Any], field: str) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"model.output: {field} has {value!r} twice; classes must differ")


def _size(map: Tensor) -> str:
    return "x".join(str(side) for side in map.shape[-2:])


def _like(net: nn.Module) -> Tensor:
    """An empty tensor on the net's device and in its precision."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            return parameter.detach().new_empty(0)
    return torch.empty(0)


def _keep(net: nn.Module, name: str, value: Tensor) -> None:
    net.register_buffer(name, value, persistent=False)


def _checked_mask(mask: Tensor, where: str) -> Tensor:
    mask = mask != 0
    if mask.ndim != 2 or not mask.any():
        why = "has no pixel" if mask.ndim == 2 else f"has the shape {tuple(mask.shape)}, not (H, W)"
        raise UserError(f"{where} {why}")
    return mask.cpu()


def _mask_of(path: Path) -> Tensor:
    """A mask (H, W) bool from a file. Raises UserError that names it."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                array = np.asarray(image if image.mode in ("L", "1", "P", "I;16", "I") else image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"model.output: region: {path} cannot be read as a mask: {error}") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"model.output: region: {path} holds {array.dtype}, not the numbers of a mask")
    return _checked_mask(torch.from_numpy(np.array(array != 0)), f"model.output: region: {path}")
