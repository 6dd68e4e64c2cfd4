"""Tiny Hugging Face models with random weights, saved in folders as a user has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from attrib.noise import Noise

WORDS = [
    "[PAD]", "[UNK]", "[MASK]", "a", "the", "photo", "of", "cat", "dog", "bird", "good", "bad", "film", "was", "is",
    "very", "not", "it",
]  # fmt: skip
TOWER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT = dict(TOWER, vocab_size=len(WORDS), max_position_embeddings=8, projection_dim=12)
VISION = dict(TOWER, image_size=16, patch_size=4, projection_dim=12)
ENDS = dict(pad_token_id=0, bos_token_id=17, eos_token_id=16)
with torch.device("meta"):
    _VIT = dict(transformers.ViTModel(transformers.ViTConfig(**TOWER)).named_modules())
VIT_LAYER = "net.vit.layers.0" if "layers.0" in _VIT else "net.vit.encoder.layer.0"  # transformers has renamed it


def random_weights(net: torch.nn.Module) -> torch.nn.Module:
    """Larger than transformers' own, so that what differs differs visibly."""
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim > 1:
                value.copy_(0.3 * Noise([name]).normal(*value.shape)[0])
            elif "bias" in name and value.ndim:
                value.copy_(0.1 * Noise([name]).normal(*value.shape)[0])
    return net


def tokenizer(**special: str) -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


def _saved(folder: Path, build: Callable[[Any], Any], config: Any, *parts: Any) -> Path:
    with torch.random.fork_rng():
        net = random_weights(build(config))
    net.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    names = dict(enumerate(["cat", "dog", "bird"]))
    config = transformers.ViTConfig(**TOWER, image_size=16, patch_size=4, id2label=names)
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resample=3
    )
    return _saved(folder, transformers.AutoModelForImageClassification.from_config, config, processor)


def swin(folder: Path) -> Path:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return _saved(folder, transformers.AutoModelForImageClassification.from_config, config)


def convnext(folder: Path) -> Path:
    config = transformers.ConvNextConfig(hidden_sizes=[6, 8, 8, 10], depths=[1, 1, 1, 1], num_labels=3)
    return _saved(folder, transformers.AutoModelForImageClassification.from_config, config)


def deit(folder: Path) -> Path:
    config = transformers.DeiTConfig(**TOWER, image_size=16, patch_size=4, num_labels=3)
    return _saved(folder, transformers.DeiTForImageClassification, config)


def resnet(folder: Path) -> Path:
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return _saved(folder, transformers.AutoModelForImageClassification.from_config, config)


def clip(folder: Path) -> Path:
    config = transformers.CLIPConfig(
        text_config=dict(TEXT, **ENDS), vision_config=VISION, projection_dim=12, logit_scale_init_value=1.5
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return _saved(folder, transformers.AutoModel.from_config, config, tokenizer(), processor)


def siglip(folder: Path) -> Path:
    config = transformers.SiglipConfig(text_config=dict(TEXT, **ENDS), vision_config=VISION)
    return _saved(folder, transformers.AutoModel.from_config, config, tokenizer())


def gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=2, eos_token_id=2
    )
    return _saved(folder, transformers.AutoModelForCausalLM.from_config, config, tokenizer(pad_token="[MASK]"))


def llama(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        **TOWER, vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=12, **ENDS
    )
    return _saved(folder, transformers.AutoModelForCausalLM.from_config, config, tokenizer())


def bert(folder: Path) -> Path:
    """No decoder: it looks at both sides."""
    config = transformers.BertConfig(**TOWER, vocab_size=len(WORDS), max_position_embeddings=12)
    return _saved(folder, transformers.BertLMHeadModel, config, tokenizer())


IMAGES: dict[str, Callable[[Path], Path]] = {
    "vit": vit, "swin": swin, "convnext": convnext, "deit": deit, "resnet": resnet,
}  # fmt: skip
DECODERS: dict[str, Callable[[Path], Path]] = {"gpt2": gpt2, "llama": llama}
