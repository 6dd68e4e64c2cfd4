"""Hugging Face nets over images, by folder, package or name: classifiers, and image-text models such as CLIP.

As for texts (``huggingface``), weights are read from safetensors and nothing that comes with a model is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attrib.models.huggingface import (
    config_of,
    described,
    fill_head,
    loaded,
    location,
    names_of,
    processor_of,
    tokenizer_of,
)
from attrib.noise import Noise
from attrib.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class HuggingFaceImageClassifier(nn.Module):
    """A transformers ``...ForImageClassification``: images (N, C, H, W) to logits (N, K).

    Layers are found under ``net.``.
    """

    def __init__(self, net: PreTrainedModel) -> None:
        super().__init__()
        self.net = net

    @property
    def num_outputs(self) -> int:
        """Numbers that it returns for an image."""
        config: Any = self.net.config
        return int(config.num_labels)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return names_of(self.net.config)

    @property
    def spec(self) -> dict[str, Any]:
        """What the net computes, as plain data."""
        return described(self.net.config) | {"num_labels": self.num_outputs}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


class HuggingFaceImageText(nn.Module):
    """The image tower of CLIP or SigLIP: images (N, C, H, W) to embeddings (N, D). Its text tower embeds the prompts.

    source   where its tokenizer is
    """

    def __init__(self, net: PreTrainedModel, source: str) -> None:
        super().__init__()
        self.net, self.source = net, source

    @property
    def scale(self) -> float:
        """What the cosine of two embeddings is multiplied by."""
        return float(self.net.logit_scale.detach().exp())

    @property
    def bias(self) -> float:
        bias = getattr(self.net, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def link(self) -> Literal["softmax", "sigmoid"]:
        """A net with a bias was trained to say of each text by itself whether it fits (Zhai et al., ICCV 2023)."""
        return "sigmoid" if hasattr(self.net, "logit_bias") else "softmax"

    @property
    def spec(self) -> dict[str, Any]:
        """What the net computes, as plain data."""
        return described(self.net.config)

    def forward(self, x: Tensor) -> Tensor:
        return _pooled(self.net.get_image_features(pixel_values=x))

    def embed_prompts(self, texts: Sequence[str]) -> Tensor:
        """K texts -> (K, D). Raises UserError for one that is too long."""
        return _pooled(self.net.get_text_features(**self.tokens(texts)))

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text tower takes. Texts are padded to its full length: SigLIP needs it, CLIP does not mind."""
        length: int = self.net.config.text_config.max_position_embeddings
        tokenizer = tokenizer_of(self.source)
        for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
            if len(ids) > length:
                raise UserError(f"model.output: the prompt {text!r} has {len(ids)} tokens, the net takes {length}")
        if tokenizer.pad_token_id is None:
            raise UserError(f"model.path: {self.source}: its tokenizer has no padding token")
        found = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")
        device = next(self.net.parameters()).device
        return {name: value.to(device) for name, value in found.items() if name in ("input_ids", "attention_mask")}


def _pooled(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def hf_image_classifier(path: str, num_labels: int | None = None, **options: Any) -> HuggingFaceImageClassifier:
    """A pretrained image classifier, such as ViT, Swin or ResNet; arguments and errors are as for ``hf_classifier``."""
    where = location(path)
    config = config_of(path, where, num_labels, options)
    net, missing = loaded("AutoModelForImageClassification", path, where, config)
    fill_head(net, missing, path, num_labels)
    return HuggingFaceImageClassifier(net)


def hf_image_text(path: str, **options: Any) -> HuggingFaceImageText:
    """A pretrained image-text model, such as CLIP or SigLIP, for ``model.output={read: similarity, prompts: [...]}``.

    path     a folder with weights and a tokenizer; see ``hf_classifier``
    options  fields of the model's configuration

    Raises UserError as ``hf_classifier`` does, and for a model that computes its similarities in another way.
    """
    where = location(path)
    net, missing = loaded("AutoModel", path, where, config_of(path, where, None, options))
    wanted = ("get_image_features", "get_text_features", "logit_scale")
    if lacking := [name for name in wanted if not hasattr(net, name)]:
        raise UserError(f"model.path: {path} ({type(net).__name__}) is no image-text model: it has no {lacking[0]}")
    if missing:
        raise UserError(f"model.path: {path} is incomplete, its weights lack {', '.join(sorted(missing)[:6])}")
    made = HuggingFaceImageText(net, where).eval()
    _check_similarity(made, path)
    return made


@torch.no_grad()
def _check_similarity(made: HuggingFaceImageText, path: str) -> None:
    """Raises UserError unless similarities are what the model itself says."""
    vision: Any = made.net.config.vision_config
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    x, texts = Noise(["probe"]).normal(vision.num_channels, size, size), ["a", "one two"]
    image, prompts = (nn.functional.normalize(v, dim=1) for v in (made(x), made.embed_prompts(texts)))
    ours = made.scale * image @ prompts.T + made.bias
    theirs = made.net(pixel_values=x, **made.tokens(texts)).logits_per_image
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item()):
        raise UserError(
            f"model.path: {path}: the similarities of {type(made.net).__name__} are not scale * cosine + bias of its "
            "embeddings, so they cannot be explained"
        )


# ---- how images are prepared --------------------------------------------------------------------


def hf_input(path: str, **_: Any) -> dict[str, Any]:
    """What a model's image processor does, as fields of ``datasets.ImageTransform``, as far as they can say it.

    How it resizes is found out on an image of its own. Raises UserError for other colours.
    """
    where = location(path)
    folder = Path(where)
    files = (folder / "preprocessor_config.json", folder / "processor_config.json")
    if folder.is_dir() and not any(file.is_file() for file in files):
        return {}  # transformers would make up one
    processor = processor_of(where)
    about = processor.to_dict()
    if about.get("do_flip_channel_order"):
        raise UserError(f"model.path: {path}: its image processor turns RGB into BGR, which attrib does not do")
    probe = _probe()
    out = np.asarray(processor(probe, return_tensors="pt")["pixel_values"][0], dtype=np.float64)
    channels = len(out)
    normalised = about.get("do_normalize", False)
    mean, std = (
        [float(v) for v in (np.broadcast_to(about[name], channels) if normalised else [default] * channels)]
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    height, width = out.shape[1:]
    size = height if height == width else [height, width]
    pixels = np.moveaxis(out, 0, -1) * std + mean
    known: dict[str, Any] = {"size": size}
    resample = about.get("resample")
    if resample in _INTERPOLATION:
        known["interpolation"] = _INTERPOLATION[resample]
    for resize, resize_size in _ways(about, height, width):
        made = _resized(probe, resize, resize_size, height, width, resample)
        if any(np.abs(one / 255 - pixels).max() < 0.012 for one in made):  # three of 255 levels: libraries round
            return {**known, "mean": mean, "std": std, "resize": resize, "resize_size": resize_size}
    middle = np.array(probe.resize((width, height)), dtype=np.float64)[height // 2, width // 2] / 255
    if np.abs(middle - pixels[height // 2, width // 2]).max() < 0.1:  # the colours are as expected
        known |= {"mean": mean, "std": std}
    return known


_INTERPOLATION = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def _probe() -> Image.Image:
    """An image that is darker to the left, above and at the corner."""
    y, x = np.mgrid[:360, :300] / np.array([359, 299])[:, None, None]
    return Image.fromarray((np.stack((x, y, (x + y) / 2), -1) * 255).round().astype(np.uint8))


def _ways(about: dict[str, Any], height: int, width: int) -> Iterator[tuple[str, int | None]]:
    """In which images may be brought to their size, as ``resize`` and ``resize_size``."""
    yield "squash", None
    edge = (about.get("size") or {}).get("shortest_edge")
    if edge is not None:
        crop = about.get("crop_pct") or 1.0
        for side in dict.fromkeys((edge, int(edge / crop), int(256 / 224 * edge))):
            if side >= max(height, width):
                yield "crop", side


def _resized(
    image: Image.Image, resize: str, side: int | None, height: int, width: int, how: Any
) -> Iterator[np.ndarray]:
    """(height, width, 3); of crops whose margins are odd, with either rounding of the half."""
    if resize == "squash" or side is None:
        yield np.asarray(image.resize((width, height), how), dtype=np.float64)
        return
    shorter, longer = side, int(side * max(image.size) / min(image.size))
    w, h = (shorter, longer) if image.width <= image.height else (longer, shorter)
    resized = np.asarray(image.resize((w, h), how), dtype=np.float64)
    for half in (0, 1):
        left, top = (w - width + half) // 2, (h - height + half) // 2
        yield resized[top : top + height, left : left + width]
