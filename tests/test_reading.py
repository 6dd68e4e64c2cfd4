"""Which axes of a layer are space: right for nets of every kind, and refused where it cannot be known."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from attrib.methods.cam import GradCAM
from attrib.methods.iba import IBA
from attrib.methods.parts.layout import on_image
from attrib.models import Classifier
from attrib.models.reading import Reading, described
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W = 64, 96


def seeded(build, *args, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **options).eval()


def vit(**options) -> nn.Module:
    options = {"img_size": (H, W), "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 4, **options}
    return seeded(timm.create_model, options.pop("arch", "vit_tiny_patch16_224"), **options)


def torchvision_vit() -> nn.Module:
    return seeded(VisionTransformer, 64, 16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=4)


def swin() -> nn.Module:
    return seeded(SwinTransformer, [4, 4], 12, [2, 2, 2], [2, 2, 4], [4, 4], num_classes=4)


def convnext() -> nn.Module:
    return seeded(ConvNeXt, [CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)], num_classes=4)


def timm_swin() -> nn.Module:
    options = {"img_size": (H, W), "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return seeded(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=4, **options)


class Padded(nn.Module):
    """A stride that does not divide the image, any number of tokens in front, and places of one size all along."""

    def __init__(self, prefix: int, padding: int = 0, channels: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 16, 16, padding)
        self.front = nn.Parameter(torch.randn(1, prefix, channels))
        self.block, self.head = nn.TransformerEncoderLayer(channels, 2, 16, batch_first=True), nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        tokens = torch.cat((self.front.expand(len(x), -1, -1), tokens), 1)
        return self.head(self.block(tokens).mean(1))


READINGS = [
    (vit, "blocks.2", (H, W), "tokens:4x6+1"),
    (lambda: vit(reg_tokens=4), "blocks.1", (H, W), "tokens:4x6+5"),
    (lambda: vit(arch="deit_tiny_distilled_patch16_224"), "blocks.2.norm2", (H, W), "tokens:4x6+2"),
    (lambda: vit(class_token=False, global_pool="avg"), "blocks.0", (H, W), "tokens:4x6+0"),
    # Random attention looks everywhere alike: what changes does not tell, but timm's net knows.
    (vit, "blocks.2.attn", (H, W), "tokens:4x6+1"),
    (torchvision_vit, "encoder.layers.encoder_layer_1", (64, 64), "tokens:4x4+1"),
    (swin, "features.1", (H, W), "channels_last"),
    (swin, "features.5", (H, W), "channels_last"),
    (swin, "permute", (H, W), "channels_first"),
    (timm_swin, "layers.1", (H, W), "channels_last"),
    (convnext, "features.1", (H, W), "channels_first"),
    (convnext, "features.1.0.block.2", (H, W), "channels_last"),
    (convnext, "avgpool", (H, W), "channels_first"),
    (lambda: seeded(Padded, 1), "block", (66, 103), "tokens:4x6+1"),
    (lambda: seeded(Padded, 0, 8), "block", (57, 100), "tokens:4x7+0"),
    (lambda: seeded(Padded, 17), "block", (112, 112), "tokens:7x7+17"),
    (lambda: seeded(Padded, 1), "block", (450, 600), "tokens:28x37+1"),
    (lambda: seeded(Padded, 9), "patch", (80, 112), "channels_first"),
    (lambda: seeded(Padded, 0, channels=6), "patch", (96, 96), "channels_first"),  # 6 x 6 x 6
]


@pytest.mark.parametrize(("build", "path", "size", "expected"), READINGS, ids=[f"{r[1]}-{r[3]}" for r in READINGS])
def test_the_reading_of_a_layer(build, path, size, expected):
    net = build()
    model = Classifier(net, {"layer": path})
    before, state = model.passed, torch.random.get_rng_state()
    found = model.roles.reading("layer", (3, *size))
    assert str(found) == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.passed == before
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_reading_is_found_once_and_holds_for_copies_with_other_weights():
    model = Classifier(swin(), {"layer": "features.1"})
    found = [model.roles.reading("layer", (3, H, W)) for _ in range(2)]
    assert found[0] is found[1]
    broken = swin()
    for value in broken.parameters():
        value.data.zero_()
    copied = Classifier(broken, {"layer": "features.1"}, original=model)
    assert copied.roles.reading("layer", (3, H, W)) is found[0]


class Turned(nn.Module):
    """Layers whose places lie on the image in no way that a reading knows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.patch, self.layer, self.head, self.how = nn.Conv2d(3, 5, 8, 8), nn.Identity(), nn.Linear(5, 4), how

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch(x)
        order = torch.randperm(z[0, 0].numel(), generator=torch.Generator().manual_seed(0))
        z = {
            "transposed": lambda: z.mT,
            "attention": lambda: (z.flatten(2).mT @ z.flatten(2)).unsqueeze(1).expand(-1, 5, -1, -1),
            "channels_before_tokens": lambda: z.flatten(2),
            "shuffled": lambda: z.flatten(2)[:, :, order].mT,
            "constant": lambda: z * 0,
        }[self.how]()
        z = self.layer(z)
        return self.head(z.mean(1) if self.how == "shuffled" else z.flatten(2).mean(2))


class Says(Padded):
    """As timm's nets do, it says how many tokens stand in front of the grid, and how large it is; perhaps wrongly."""

    def __init__(self, grid: tuple[int, int], prefix: int = 1) -> None:
        super().__init__(1)
        self.num_prefix_tokens, self.patch_embed = prefix, nn.Identity()
        self.patch_embed.dynamic_feat_size = lambda image: grid


class Config:
    """As much of a Hugging Face configuration as is read."""

    def __init__(self, **fields) -> None:
        self.model_type = "vit"
        vars(self).update(fields)


class Configured(nn.Module):
    """As transformers' nets do, it has a configuration, and its tokens in front are parameters; perhaps others."""

    def __init__(self, shape: tuple[int, int, int] = (1, 1, 8), **fields) -> None:
        super().__init__()
        self.config, self.net = Config(**fields), Padded(5)
        self.cls_token, self.register_tokens = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("build", "path", "said"),
    [
        (lambda: Says((6, 4)), "block", r"tokens:6x4\+1"),
        (lambda: Says((2, 11), prefix=3), "block", r"tokens:2x11\+3"),
        (lambda: Configured((1, 3, 8), patch_size=(32, 8), num_register_tokens=3), "net.block", "no"),
        (lambda: Configured((1, 4, 8), patch_size=(8, 32), num_register_tokens=4), "net.block", r"tokens:8x3\+5"),
    ],
)
def test_a_net_that_says_otherwise_than_its_places_is_refused(build, path, said):
    model = Classifier(seeded(build), {"cam": path})
    batch = Batch(("a",), torch.randn(1, 3, H, W, generator=torch.Generator().manual_seed(0)), torch.tensor([1]))
    if said == "no":  # 2 x 12 + 4 are not 29 tokens: it speaks of others
        assert GradCAM().attribute(model, batch, {}, Noise(batch.uids))["cam"].shape == (1, 4, 6)
        return
    with pytest.raises(
        UserError, match=rf"model\.layers\.cam: .*tokens to be tokens:4x6.*they are {said}\. Set layout"
    ):
        GradCAM().attribute(model, batch, {}, Noise(batch.uids))
    right = "tokens:4x6+1" if path == "block" else "tokens:4x6+5"
    assert GradCAM(layout=right).attribute(model, batch, {}, Noise(batch.uids))["cam"].shape == (1, 4, 6)


def hugging_face(kind: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=96)
    return seeded(
        lambda: getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **options))
    )


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Dinov2WithRegisters", {"num_register_tokens": 3}, Reading("tokens", (4, 6), 4)),
        ("Dinov2", {"patch_size": 8}, Reading("tokens", (8, 12), 1)),
        ("DeiT", {}, Reading("tokens", (4, 6), 2)),
        ("IJepa", {"patch_size": 16}, Reading("tokens", (4, 6))),
        ("ViT", {"patch_size": [8, 16]}, Reading("tokens", (8, 6), 1)),
    ],
)
def test_what_a_configuration_says(kind, options, expected):
    """Without looking at places: of any layer with that many tokens."""
    net = hugging_face(kind, **options)
    h, w = expected.grid
    inside = next(path for path, module in net.named_modules() if isinstance(module, nn.LayerNorm))
    assert described(net, inside, (h * w + expected.prefix, 16), (H, W)) == expected
    assert described(net, inside, (h * w + expected.prefix + 1, 16), (H, W)) is None
    net.config.num_register_tokens = 17  # of which it holds none
    assert described(net, inside, (h * w + expected.prefix, 16), (H, W)) is None


@pytest.mark.parametrize("how", ["transposed", "attention", "channels_before_tokens", "shuffled", "constant"])
def test_what_no_reading_fits_is_refused(how):
    model = Classifier(seeded(Turned, how), {"cam": "layer"})
    batch = Batch(("a",), torch.randn(1, 3, H, W), torch.tensor([1]))
    with pytest.raises(
        UserError, match=r"model\.layers\.cam: the layer layer of Turned.*set layout to .*tokens:HxW\+P"
    ):
        GradCAM().attribute(model, batch, {}, Noise(batch.uids))
    assert not any(module._forward_hooks for module in model.module.modules())


def test_what_the_user_knows_is_taken():
    model = Classifier(seeded(Turned, "shuffled"), {"cam": "layer"}, dtype=torch.float64)
    batch = Batch(("a",), torch.randn(1, 3, H, W, dtype=torch.float64), torch.tensor([1]))
    found = GradCAM(layout="tokens:8x12", relu=False).attribute(model, batch, {}, Noise(batch.uids))
    assert found["cam"].shape == (1, 8, 12)
    with pytest.raises(UserError, match="8 x 11 \\+ 0 is 88, but it has 96 tokens"):
        GradCAM(layout="tokens:8x11").attribute(model, batch, {}, Noise(batch.uids))
    for method in (GradCAM, IBA):
        with pytest.raises(UserError, match=rf"{method.__name__}\.layout is 'rows', must be auto, channels_first"):
            method(layout="rows")


# ---- numbers, from slow and obvious references in float64 ------------------------------------------------


def cam_by_hand(net: nn.Module, path: str, x: Tensor, target: int, reading: Reading) -> Tensor:
    """(h, w) of one image: every place and channel by itself."""
    kept: list[Tensor] = []

    def keep(_module, _inputs, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    handle = net.get_submodule(path).register_forward_hook(keep)
    (gradient,) = torch.autograd.grad(net(x[None])[0, target], kept)
    handle.remove()
    z, gradient = kept[0][0].detach(), gradient[0]
    h, w = reading.grid
    at = {
        "channels_first": lambda t, i, j: t[:, i, j],
        "channels_last": lambda t, i, j: t[i, j],
        "tokens": lambda t, i, j: t[reading.prefix + i * w + j],
    }[reading.name]
    weights = sum(at(gradient, i, j) for i in range(h) for j in range(w)) / (h * w)
    return torch.stack([torch.stack([weights @ at(z, i, j) for j in range(w)]) for i in range(h)])


NUMBERS = [
    (swin, "features.3", Reading("channels_last", (8, 12))),
    (lambda: vit(reg_tokens=4), "blocks.1", Reading("tokens", (4, 6), 5)),
    (convnext, "features.3", Reading("channels_first", (8, 12))),
]


@pytest.mark.parametrize(("build", "path", "reading"), NUMBERS, ids=[reading.name for _, _, reading in NUMBERS])
def test_grad_cam_on_every_kind_of_layer(build, path, reading):
    net = build().double()
    x = torch.randn(2, 3, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch(("a", "b"), x, torch.tensor([1, 3]))
    model = Classifier(net, {"cam": path}, dtype=torch.float64)
    found = GradCAM(relu=False).attribute(model, batch, {}, Noise(batch.uids))["cam"]
    for i in range(2):
        expected = cam_by_hand(net, path, x[i], int(batch.target[i]), reading)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)


def test_iba_at_channels_last_equals_iba_at_channels_first():
    """The same net once with a layer (B, H, W, C) and once with (B, C, H, W): the bits of a place are the same."""

    class Net(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.patch, self.layer, self.head, self.last = nn.Conv2d(3, 7, 8, 8), nn.Identity(), nn.Linear(7, 4), last

        def forward(self, x: Tensor) -> Tensor:
            z = self.patch(x)
            z = self.layer(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.layer(z)
            return self.head((z.sin() * z).mean((2, 3)))

    x = torch.randn(2, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch(("a", "b"), x, torch.tensor([1, 3]))
    found = []
    for last in (False, True):
        model = Classifier(seeded(Net, last).double(), {"bottleneck": "layer"}, dtype=torch.float64)
        z = model.until("bottleneck", x).z
        state = {"mean": z.mean(0), "std": z.std(0) + 1, "active": torch.ones_like(z[0])}
        # 7 x 7 x 7: no size says which axis is which. A layer without noise, so that both orders see the same.
        places = on_image(model, "bottleneck", x, z)
        assert places.name == ("channels_last" if last else "channels_first")
        bits = places.bits(0.5 * ((z - state["mean"]) / state["std"]).square())
        found.append((bits, places.smooth(z, 1.0).sum(-1 if last else 1), places.spread(bits)))
        assert IBA(steps=2, batch=2).attribute(model, batch, state, Noise(batch.uids))["capacity"].shape == (2, 7, 7)
    for first, last in zip(*found, strict=True):
        torch.testing.assert_close(first, last, rtol=1e-12, atol=1e-12)
