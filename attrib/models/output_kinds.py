"""The kinds of outputs (``model.output.read``): what is explained, one score per row and class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attrib.keys import tensor_digest
from attrib.models.output_kind import Link, OutputKind, keep, like
from attrib.models.output_region import Region
from attrib.models.text import last_step, real_tokens
from attrib.types import Batch, SampleError, UserError

ROUNDING = 1e-4  # of probabilities that a net has computed


class Classes(OutputKind):
    """A logit per class; classes exclude each other."""

    READ = "classes"


@dataclass(frozen=True, eq=False)
class Probabilities(OutputKind):
    """Probabilities (N, K), whose logits the net does not return. The scores are logits that have these probabilities.

    What is below 0 or above 1 becomes NaN, which is no score.

    link  "softmax": they exclude each other and add up to 1; the scores are their logarithms. "sigmoid": each is by
          itself; the scores are log(p / (1 - p))
    """

    READ: ClassVar[str] = "probabilities"
    link: Link = "softmax"

    def __post_init__(self) -> None:
        if self.link not in get_args(Link):
            raise UserError(f"model.output: link must be softmax or sigmoid, not {self.link!r}")

    @property
    def spec(self) -> dict[str, Any]:
        return {"link": self.link}

    def link_of(self, net: nn.Module) -> Link:
        return self.link

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        raw = self._tensor(raw, "probabilities (N, K)", (2,))
        return _logarithm(raw) if self.link == "softmax" else _logit(raw)


def _logarithm(p: Any) -> Any:
    known = p.masked_fill((p < 0) | (p > 1 + ROUNDING), torch.nan)
    return known.clamp(min=torch.finfo(torch.float32).tiny).log()  # that of 0 would be infinite


def _logit(p: Any) -> Any:
    return _logarithm(p) - (1 - p).clamp(min=torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True, eq=False)
class Sigmoid(OutputKind):
    """One logit s, whose sigmoid is the probability of class 1.

    The scores are (-s/2, s/2), whose softmax is that sigmoid, so that both classes can be explained.

    of  "logit", or "probability": the net has applied the sigmoid itself, and s is log(p / (1 - p))
    """

    READ: ClassVar[str] = "sigmoid"
    of: Literal["logit", "probability"] = "logit"

    def __post_init__(self) -> None:
        if self.of not in ("logit", "probability"):
            raise UserError(f"model.output: of must be logit or probability, not {self.of!r}")

    @property
    def spec(self) -> dict[str, Any]:
        return {} if self.of == "logit" else {"of": self.of}

    def scores(self, net: nn.Module, raw: Any, x: Tensor) -> Any:
        if not isinstance(raw, Tensor | fx.Proxy):
            raise UserError(f"model.output: a single logit is a tensor (N, 1) or (N,), not a {type(raw).__name__}")
        logit: Any = (raw if self.of == "logit" else _logit(raw)).reshape(-1, 1)
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
        keep(net, "output_prompts", (float(scale) * F.normalize(found.to(like(net)), dim=1)))
        keep(net, "output_bias", torch.full((len(found),), float(bias)).to(like(net)))

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
        keep(net, "output_candidates", torch.tensor(ids, device=like(net).device))
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
    kind.READ: kind for kind in (Classes, Probabilities, Sigmoid, Value, Region, Similarity, NextToken)
}


def _plain_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _distinct(values: Sequence[Any], field: str) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"model.output: {field} has {value!r} twice; classes must differ")
