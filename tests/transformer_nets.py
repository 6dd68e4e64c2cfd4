"""Tiny transformers with random weights, of images and of texts, for the tests of LRP and of attention."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.types import Batch

K, WORDS, PAD = 3, 50, 1
_SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=WORDS, num_labels=K,
    pad_token_id=PAD,
)  # fmt: skip
_IMAGES = dict(img_size=32, num_classes=K)


class Masked(nn.Module):
    """A Hugging Face classifier of ids (N, T), which finds the padding itself."""

    pad_id = PAD

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, attention_mask=(x != PAD).long()).logits


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZES))


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=WORDS, num_labels=K, pad_token_id=PAD
    )
    return transformers.DistilBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, num_labels=K, pad_token_id=PAD, bos_token_id=2, eos_token_id=3
    )
    return transformers.GPT2ForSequenceClassification(config)


def _llama() -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_SIZES, num_key_value_heads=1))


TEXT: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "distilbert": _distilbert, "gpt2": _gpt2, "llama": _llama}
IMAGE: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=2, **_IMAGES),
    "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", patch_size=8, depth=2, **_IMAGES),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=K),
    "mean": lambda: timm.create_model(
        "vit_tiny_patch16_224", patch_size=8, depth=2, global_pool="avg", class_token=False, **_IMAGES
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2), **_IMAGES
    ),
}


def net_of(name: str) -> nn.Module:
    """With biases and gains that are not those of a new net."""
    torch.manual_seed(0)
    net = (TEXT | IMAGE)[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        spread = 0.2 if parameter.ndim == 1 else 0.1
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return (Masked(net) if name in TEXT else net).eval()


def classifier(name: str, dtype: torch.dtype = torch.float64, rows: int = 64) -> Classifier:
    net = net_of(name)
    layers = {}
    if name in TEXT:
        layers = {"embedding": next(path for path, m in net.named_modules() if isinstance(m, nn.Embedding))}
    return Classifier(net, layers, dtype=dtype, rows=rows)


def batch_of(name: str, n: int = 4) -> Batch:
    """In float64; texts are of different lengths."""
    generator = torch.Generator().manual_seed(2)
    uids, target = tuple(map(str, range(n))), torch.arange(n) % K
    if name in IMAGE:
        return Batch(uids, torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64), target)
    lengths = torch.tensor([7, 4, 6, 3, 5, 7][:n])
    x = torch.randint(4, WORDS, (n, 9), generator=generator)
    real = torch.arange(9) < lengths[:, None]
    words = torch.where(real, torch.arange(9), -1)
    return Batch(uids, x.masked_fill(~real, PAD), target, lengths=lengths, words=words)
