"""The nets of docs/nets.md: architectures of torchvision, timm and transformers, and nets of users' own kinds.

Weights are random and seeded. Where a library lets it, a net has fewer and narrower layers, of the same kinds: what
is tried is whether its operations are understood. A net whose head begins as zeros gets a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.models import HuggingFaceClassifier, LeNet, ToneCNN
from attrib.models.output import Output
from attrib.models.text import last_step, real_tokens
from attrib.models.zoo import seeded

K = 4  # classes
WORDS, UNKNOWN, PAD = 30, 0, 1


@dataclass(frozen=True, eq=False)
class Entry:
    """A net of the table.

    name    in the table; what else a reader should know stands in ``about``
    build   the net with random weights
    shape   of an input; of texts the vocabulary and the longest text
    layers  roles that are named; cam and bottleneck are found out where they are not
    sentences   texts come from a tokenizer without a pre-tokenizer
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    about: str = ""
    layers: Mapping[str, str] = field(default_factory=dict)
    output: Any = None
    sentences: bool = False

    @property
    def modality(self) -> Literal["image", "text", "audio"]:
        return {3: "image", 2: "audio", 1: "text"}[len(self.shape)]  # type: ignore[return-value]

    def net(self) -> nn.Module:
        net = seeded(self.build, 1)
        generator = torch.Generator().manual_seed(2)
        for value in net.parameters():
            if value.ndim > 1 and not value.any():
                value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            self._calibrate(net, generator)
        elif self.modality == "image" and not any("Norm" in type(module).__name__ for module in net.modules()):
            for value in net.parameters():  # else little is left of the input behind many layers
                if value.ndim > 1:
                    nn.init.kaiming_normal_(value, nonlinearity="relu", generator=generator)
        return net.double().eval()

    def _calibrate(self, net: nn.Module, generator: torch.Generator) -> None:
        """Let the running statistics be those of noise, without which random nets of fifty layers say nothing."""
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
                module.momentum = None
                module.reset_running_stats()
            elif not [*module.children()]:
                module.eval()
        with torch.no_grad():
            net(torch.randn(4, *self.shape, generator=generator))


# ---- torchvision ------------------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(weights=None, num_classes=K, **options)

    return build


def _small_head(net: nn.Module, channels: int) -> nn.Module:
    """AlexNet or VGG without the hundred million weights of its head."""
    side = net.avgpool.output_size[0]
    sizes = (channels * side * side, 32, 32)
    inside = [(nn.Linear(n, m), nn.ReLU(inplace=True), nn.Dropout()) for n, m in pairwise(sizes)]
    net.classifier = nn.Sequential(*(part for parts in inside for part in parts), nn.Linear(32, K))
    return net


def _alexnet() -> nn.Module:
    from torchvision import models

    return _small_head(models.alexnet(weights=None), 256)


def vgg16(batch_norm: bool = False) -> nn.Module:
    """With the layers of VGG16, but an eighth of their channels."""
    from torchvision.models import vgg

    widths = [size if size == "M" else int(size) // 8 for size in vgg.cfgs["D"]]
    return _small_head(vgg.VGG(vgg.make_layers(widths, batch_norm), init_weights=False), 64)


def _resnet18() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=K)


def _resnet50() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=K, width_per_group=16)


def _efficientnet() -> nn.Module:
    from torchvision.models import efficientnet

    blocks, last = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
    return efficientnet.EfficientNet(blocks, 0.2, last_channel=last, num_classes=K)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenetv3

    blocks, last = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.5)
    return mobilenetv3.MobileNetV3(blocks, last, num_classes=K)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2, 2), 16, num_classes=K)


def _convnext() -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 2)], num_classes=K)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=K)


def _swin(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as parts

        new = {"block": parts.SwinTransformerBlockV2, "downsample_layer": parts.PatchMergingV2} if version == 2 else {}
        return parts.SwinTransformer([4, 4], 12, [2, 2, 2], [2, 2, 4], [4, 4], num_classes=K, **new)

    return build


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=K)


# ---- timm -------------------------------------------------------------------------------------------------


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=K, **options)

    return build


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=K, img_size=64, patch_size=16, num_blocks=3, embed_dim=24)


def _poolformer() -> nn.Module:
    from timm.models.metaformer import MetaFormer

    return MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=K)


VIT = {"depth": 3, "embed_dim": 24, "num_heads": 2}

# ---- transformers -----------------------------------------------------------------------------------------


def _hf_image(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, f"{kind}ForImageClassification")(
            getattr(transformers, f"{kind}Config")(num_labels=K, **options)
        )

    return build


def _hf_text(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(
            vocab_size=WORDS, num_labels=K, pad_token_id=PAD, bos_token_id=2, eos_token_id=3, **options
        )
        config.use_cache = False
        net = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        for name, value in net.named_parameters():  # .02 is so little that all words would be alike
            if value.ndim > 1 and "norm" not in name.lower():
                nn.init.normal_(value, 0.0, 0.3)
        return HuggingFaceClassifier(net, PAD, UNKNOWN)

    return build


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {**SIZES, "max_position_embeddings": 16}
FNET = {name: size for name, size in SIZES.items() if name != "num_attention_heads"}
PATCHES = {**SIZES, "num_hidden_layers": 3, "image_size": 64}

# ---- nets of users' own -----------------------------------------------------------------------------------


class OneLogit(nn.Module):
    """A net for two classes that returns a single logit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, 2, 2), nn.Conv2d(8, 12, 3, 2, 1)
        self.conv3, self.head = nn.Conv2d(12, 16, 3, 2, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class OwnLSTM(nn.Module):
    """As in many a tutorial: embedding, plain ``nn.LSTM``, the last real step, linear layer."""

    pad_id, mask_id = PAD, UNKNOWN

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 12, padding_idx=PAD)
        self.rnn, self.head = kind(12, 16, batch_first=True), nn.Linear(16, K)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.embedding(x))
        return self.head(last_step(out, real_tokens(x, PAD).sum(1)))


class OwnTextCNN(nn.Module):
    """Kim's: convolutions of several widths over the words, the largest value of each channel."""

    pad_id, mask_id = PAD, UNKNOWN

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 12)
        self.convs = nn.ModuleList(nn.Conv1d(12, 6, width, padding=width // 2) for width in (1, 3))
        self.head = nn.Linear(12, K)

    def forward(self, x: Tensor) -> Tensor:
        real = real_tokens(x, PAD).unsqueeze(1)
        z = self.embedding(x).mT * real
        found = [F.relu(conv(z)).masked_fill(~real, 0).amax(2) for conv in self.convs]
        return self.head(torch.cat(found, 1))


OWN_TEXT = {"embedding": "embedding", "bottleneck": "embedding"}
TEXT = (11,)

ZOO = (
    Entry("torchvision", "alexnet", _alexnet, about="small head"),
    Entry("torchvision", "vgg16", vgg16, about="narrow"),
    Entry("torchvision", "vgg16_bn", lambda: vgg16(True), about="narrow"),
    Entry("torchvision", "resnet18", _resnet18, about="4 blocks"),
    Entry("torchvision", "resnet50", _resnet50, about="5 blocks"),
    Entry("torchvision", "densenet", _densenet, about="2 layers a block"),
    Entry("torchvision", "squeezenet1_1", _torchvision("squeezenet1_1")),
    Entry("torchvision", "googlenet", _torchvision("googlenet", init_weights=False)),
    Entry("torchvision", "mobilenet_v2", _torchvision("mobilenet_v2", width_mult=0.25), about="narrow"),
    Entry("torchvision", "mobilenet_v3_small", _mobilenet_v3, about="narrow"),
    Entry("torchvision", "efficientnet_b0", _efficientnet, about="narrow"),
    Entry("torchvision", "shufflenet_v2_x0_5", _torchvision("shufflenet_v2_x0_5")),
    Entry("torchvision", "regnet_y_400mf", _torchvision("regnet_y_400mf")),
    Entry("torchvision", "convnext", _convnext, about="3 stages"),
    Entry("torchvision", "vit", _torchvision_vit, about="3 blocks"),
    Entry("torchvision", "swin", _swin(1), (3, 64, 96), "3 stages, 64 x 96"),
    Entry("torchvision", "swin_v2", _swin(2), about="3 stages"),
    Entry("torchvision", "maxvit", _maxvit, about="2 stages"),
    Entry("timm", "tf_efficientnet_lite0", _timm("tf_efficientnet_lite0")),
    Entry("timm", "resnet10t", _timm("resnet10t")),
    Entry("timm", "vit", _timm("vit_tiny_patch16_224", img_size=64, **VIT), about="3 blocks"),
    Entry(
        "timm",
        "vit with registers",
        _timm("vit_tiny_patch16_224", img_size=(64, 96), reg_tokens=4, **VIT),
        (3, 64, 96),
        "3 blocks, 64 x 96",
    ),
    Entry(
        "timm",
        "deit, distilled",
        _timm("deit_tiny_distilled_patch16_224", img_size=64, **VIT),
        about="3 blocks",
    ),
    Entry(
        "timm",
        "swin",
        _timm(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4
        ),
        about="2 stages",
    ),
    Entry("timm", "convnext", _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), about="5 blocks"),
    Entry("timm", "convnextv2", _timm("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), about="5 blocks"),
    Entry("timm", "mixer", _mixer, about="3 blocks"),
    Entry("timm", "beit", _timm("beit_base_patch16_224", img_size=64, **VIT), about="3 blocks"),
    Entry("timm", "eva02", _timm("eva02_tiny_patch14_224", img_size=56, **VIT), (3, 56, 56), "3 blocks"),
    Entry("timm", "cait", _timm("cait_xxs24_224", img_size=64, init_values=0.1, **VIT), about="3 blocks"),
    Entry("timm", "poolformer", _poolformer, about="4 blocks"),
    Entry("timm", "mobilevit_xxs", _timm("mobilevit_xxs")),
    Entry("timm", "pvt_v2_b0", _timm("pvt_v2_b0")),
    Entry("transformers", "ViT", _hf_image("ViT", **PATCHES), output="logits", about="3 blocks"),
    Entry(
        "transformers",
        "DINOv2 with registers",
        _hf_image("Dinov2WithRegisters", **{**PATCHES, "image_size": 96}),
        (3, 64, 96),
        "3 blocks, 64 x 96",
        output="logits",
    ),
    Entry(
        "transformers",
        "Swin",
        _hf_image("Swin", image_size=64, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4),
        output="logits",
        about="2 stages",
    ),
    Entry(
        "transformers",
        "ConvNeXt V2",
        _hf_image("ConvNextV2", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        output="logits",
        about="5 blocks",
    ),
    Entry("transformers", "BERT", _hf_text("Bert", **BERT), TEXT, "2 layers"),
    Entry("transformers", "RoBERTa", _hf_text("Roberta", **{**BERT, "max_position_embeddings": 18}), TEXT, "2 layers"),
    Entry(
        "transformers",
        "DistilBERT",
        _hf_text("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16),
        TEXT,
        "2 layers",
    ),
    Entry("transformers", "ALBERT", _hf_text("Albert", embedding_size=8, **BERT), TEXT, "a shared layer, run twice"),
    Entry("transformers", "ELECTRA", _hf_text("Electra", embedding_size=8, **BERT), TEXT, "2 layers"),
    Entry("transformers", "DeBERTa v2", _hf_text("DebertaV2", **BERT), TEXT, "2 layers"),
    Entry(
        "transformers",
        "FNet",
        _hf_text("FNet", hidden_size=16, num_hidden_layers=2, intermediate_size=24),
        TEXT,
        "2 layers",
    ),
    Entry("transformers", "GPT-2", _hf_text("GPT2", n_embd=16, n_layer=2, n_head=2, n_positions=16), TEXT, "2 layers"),
    Entry(
        "transformers",
        "Llama",
        _hf_text("Llama", num_key_value_heads=1, **{**BERT, "max_position_embeddings": 64}),
        TEXT,
        "2 layers, words by a tokenizer without a pre-tokenizer",
        sentences=True,
    ),
    Entry("own", "LeNet", lambda: LeNet(num_classes=K), (1, 32, 32), "attrib's"),
    Entry("own", "one logit", OneLogit, about="a net of a single logit", output=Output(read="sigmoid")),
    Entry("own", "LSTM", OwnLSTM, TEXT, "of a user", OWN_TEXT),
    Entry("own", "GRU", lambda: OwnLSTM(nn.GRU), TEXT, "of a user", OWN_TEXT),
    Entry("own", "text CNN", OwnTextCNN, TEXT, "of a user", OWN_TEXT),
    Entry("own", "ToneCNN", lambda: ToneCNN(num_classes=K, width=8), (1, 256), "attrib's, of sounds"),
)
