"""Layers that do not lie on the whole input: nets that crop or pad it are refused, all others are read as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import CenterCrop

from attrib.methods.cam import GradCAM
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


def shallow(**how) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **how), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    )


def deep(pad: int = 1) -> nn.Module:
    """Its places see most of the image."""
    sides = ((3, 8), (8, 8), (8, 16), (16, 16))
    layers = [(nn.Conv2d(a, b, 3, 1 + i % 2, pad), nn.BatchNorm2d(b), nn.ReLU()) for i, (a, b) in enumerate(sides)]
    return nn.Sequential(*(part for layer in layers for part in layer))


def patches() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Conv2d(8, 8, 1))


class Gate(nn.Module):
    """Of global context: each channel by what the whole image shows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.gate(z.mean((2, 3))).sigmoid()[..., None, None] + z.mean((2, 3), keepdim=True)


class Net(nn.Module):
    def __init__(self, features: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.before, self.features = before, features
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.before(x)))


def cam(net: nn.Module, size: tuple[int, int] = (64, 96), layer: str | None = "features") -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    net(x)
    model = Classifier(net, {"cam": layer})
    return GradCAM(relu=False).attribute(model, Batch(("a", "b"), x, torch.tensor([1, 2])), {}, Noise(("a", "b")))[
        "cam"
    ]


CROPPED = {
    "corner": (lambda x: x[:, :, :32, :48], "at the bottom"),
    "other corner": (lambda x: x[:, :, 32:, 48:], "at the top"),
    "centre": (CenterCrop((48, 72)), "at the top"),
    "nearly all": (CenterCrop((56, 84)), "at the top"),
    "rows alone": (lambda x: x[:, :, :48], "at the bottom"),
    "columns alone": (lambda x: x[..., 24:], "at the left"),
    "and enlarged": (lambda x: F.interpolate(x[..., 8:-8, 8:-8], size=x.shape[2:], mode="bilinear"), "at the top"),
}
PADDED = {
    "all around": lambda x: F.pad(x, (24, 24, 16, 16)),
    "one side": lambda x: F.pad(x, (0, 32)),
    "above": lambda x: F.pad(x, (0, 0, 24, 0)),
    "and shrunk": lambda x: F.interpolate(F.pad(x, (48, 48, 32, 32)), size=x.shape[2:], mode="bilinear"),
}


@pytest.mark.parametrize("features", [shallow, deep, patches])
@pytest.mark.parametrize("how", CROPPED)
def test_a_net_that_crops_is_refused(how, features):
    torch.manual_seed(1)
    before, side = CROPPED[how]
    with pytest.raises(UserError, match=rf"model\.layers\.cam: .*does not see the whole input: .* {side}.*Crop the"):
        cam(Net(features(), before).eval())


@pytest.mark.parametrize("features", [shallow, deep])
@pytest.mark.parametrize("how", PADDED)
def test_a_net_that_pads_is_refused(how, features):
    """By where its places stand, or because places that see nothing stand nowhere."""
    torch.manual_seed(1)
    with pytest.raises(UserError, match=r"model\.layers\.cam: .*(the net pads what it is given|does not tell which)"):
        cam(Net(features(), PADDED[how]).eval())


def test_padding_that_no_place_is_blind_to():
    """Padding like that of FCN, whose receptive fields reach the image from everywhere."""
    torch.manual_seed(1)
    with pytest.raises(UserError, match="those in the middle lie so far apart that the first stands at -"):
        cam(Net(nn.Sequential(nn.Conv2d(3, 8, 17, 2, 16), nn.ReLU()), lambda x: x).eval())


def test_a_crop_is_refused_without_a_named_layer_too():
    torch.manual_seed(1)
    with pytest.raises(UserError, match=r"Sequential's layer .* does not see the whole input"):
        cam(
            nn.Sequential(CenterCrop(48), *shallow(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
            layer=None,
        )


def test_a_user_who_knows_may_say_so():
    torch.manual_seed(1)
    net = Net(shallow(), CenterCrop((48, 72))).eval()
    x = torch.randn(1, 3, 64, 96)
    net(x)
    found = GradCAM(layout="channels_first").attribute(
        Classifier(net, {"cam": "features"}), Batch(("a",), x, torch.tensor([1])), {}, Noise(("a",))
    )
    assert found["cam"].shape == (1, 24, 36)


@pytest.mark.parametrize("length", ["beginning", "end"])
def test_a_sound_that_is_cut_is_refused(length):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv1d(1, 8, 9, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))
    net = nn.Sequential(nn.ConstantPad1d((-256, 0) if length == "beginning" else (0, -256), 0), *net).eval()
    batch = Batch(("a",), torch.randn(1, 1, 1024), torch.tensor([1]))
    with pytest.raises(UserError, match=rf"samples at the {length}"):
        GradCAM().attribute(Classifier(net, {"cam": "2"}), batch, {}, Noise(batch.uids))


class Causal(nn.Module):
    """Each step sees what came before it: everything is padded at the beginning."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        kernels = [nn.Conv1d(16 if i else 1, 16, 3, dilation=2**i) for i in range(blocks)]
        self.convolutions, self.head = nn.ModuleList(kernels), nn.Linear(16, 5)
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i, (convolution, act) in enumerate(zip(self.convolutions, self.acts, strict=True)):
            x = act(convolution(F.pad(x, (2 * 2**i, 0))))
        return self.head(x.mean(2))


@pytest.mark.parametrize(("blocks", "length"), [(4, 128), (4, 200), (6, 200), (6, 1000), (8, 1000)])
def test_causal_nets_are_read_at_their_last_layer(blocks, length):
    torch.manual_seed(0)
    model = Classifier(Causal(blocks).eval(), {}, input_shape=(1, length))
    assert model.roles.path("cam") == f"acts.{blocks - 1}"
    assert model.roles.reading("cam", (1, length)).grid == (1, length)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.quick(every=3)
def test_small_nets_of_sounds_are_not_refused_by_chance(seed):
    torch.manual_seed(seed)
    stride = 1 + seed % 4
    layers = nn.Conv1d(1, 4, 9, stride, 4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 5, padding=2), nn.ReLU()
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    assert Classifier(net, {"cam": "4"}, input_shape=(1, 100)).roles.reading("cam", (1, 100)).name == "channels_first"


ORDINARY = {
    "same": (shallow, (64, 96)),
    "dilated": (lambda: shallow(dilation=3), (64, 96)),
    "deep": (deep, (64, 96)),
    "without padding": (lambda: deep(0), (61, 93)),
    "a pixel too many": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 3)), (64, 96)),
    "odd": (deep, (53, 71)),
    "patches that do not fit": (patches, (71, 95)),
    "large strides": (lambda: nn.Sequential(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)), (99, 67)),
    "every fourth pixel": (lambda: nn.Conv2d(3, 8, 1, 4), (64, 95)),
    "large kernels": (lambda: nn.Conv2d(3, 8, 31, padding=15), (64, 64)),
    "global context": (lambda: nn.Sequential(shallow(), Gate()), (64, 96)),
    "a very large field": (
        lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=9, dilation=9) for _ in range(3))),
        (64, 64),
    ),
    "transposed": (lambda: nn.Sequential(shallow(), nn.ConvTranspose2d(8, 8, 2, 2)), (64, 96)),
}
RESIZED = {
    "smaller": lambda x: F.interpolate(x, size=(48, 40), mode="bilinear"),
    "larger": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "to patches": lambda x: F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16)),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("seed", range(3))
def test_ordinary_nets_are_read_as_before(name, seed):
    torch.manual_seed(seed)
    build, size = ORDINARY[name]
    assert cam(Net(build()).eval(), size).isfinite().all()


@pytest.mark.parametrize("name", RESIZED)
def test_what_is_resized_as_a_whole_is_right(name):
    torch.manual_seed(1)
    features = patches() if name == "to patches" else shallow()
    assert cam(Net(features, RESIZED[name]).eval(), (60, 93)).isfinite().all()
