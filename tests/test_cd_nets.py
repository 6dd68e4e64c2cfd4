"""Contextual decomposition of whole nets: the original's numbers, and completeness on all architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import golden
from torch import Tensor, nn

from attrib.decomposition import Decomposer, decompose
from attrib.models import AcdCNN, Classifier

SHARED = Path(__file__).parents[2] / "shared" / "golden"


def load(module: nn.Module, arrays: dict[str, np.ndarray], prefix: str = "sd.") -> nn.Module:
    module.load_state_dict({k.removeprefix(prefix): torch.tensor(v) for k, v in arrays.items() if k.startswith(prefix)})
    return module.eval()


def close(value: Tensor, wanted: np.ndarray, tolerance: float) -> None:
    wanted = torch.tensor(wanted)
    assert value.shape == wanted.shape
    assert (value - wanted).abs().max() <= tolerance * wanted.abs().max()


# ---- the original's numbers --------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_golden_vgglike(both: bool) -> None:
    g = golden("cd_vgglike")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10),
    )  # fmt: skip
    model = Classifier(load(net, g))
    masks = torch.tensor(g["masks"]).expand(2, -1, -1, -1)
    found = decompose(model, torch.tensor(g["images"]), masks, both=both)
    close(found.relevant, g["rel"].swapaxes(0, 1), 1e-4)
    close(found.irrelevant, g["irrel"].swapaxes(0, 1), 1e-4)
    close(found.logits, g["logits"], 1e-4)
    assert found.error.max() < 1e-5


def seeded_fill(module: nn.Module, seed: int) -> nn.Module:
    """The weights that the makers of the goldens gave to torchvision's nets (``../shared/golden/README.md``)."""
    r = np.random.RandomState(seed)
    state = module.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        z = torch.tensor(np.float32(r.randn(*value.shape)))
        if name.endswith("running_var"):
            state[name] = 1 + 0.2 * z.abs()
        elif name.endswith("running_mean"):
            state[name] = 0.1 * z
        elif value.ndim >= 2:
            state[name] = z * np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            state[name] = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_golden_torchvision(name: str) -> None:
    from torchvision import models

    g = golden("cd_torchvision")
    net = seeded_fill(models.get_model(name, weights=None, num_classes=10), int(g[f"{name}_seed"]))
    total = sum(v.double().abs().sum().item() for v in net.state_dict().values() if v.is_floating_point())
    assert total == pytest.approx(float(g[f"{name}_sd_abs_sum"]), rel=1e-6)
    found = decompose(Classifier(net), torch.tensor(g["image"]), torch.tensor(g["mask"])[None, None])
    close(found.relevant[:, 0], g[f"{name}_rel"], 1e-3)
    close(found.irrelevant[:, 0], g[f"{name}_irrel"], 1e-3)
    close(found.logits, g[f"{name}_logits"], 1e-3)


@pytest.mark.parametrize("copied", [True, False])
def test_golden_of_a_module_that_runs_twice(copied: bool) -> None:
    """The original skips the second use. Also without Classifier, which gives each use a module of its own."""
    g = golden("cd_shared_relu")
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), relu, nn.Conv2d(4, 4, 3, padding=1), relu, nn.Flatten(),
                        nn.Linear(4096, 5))  # fmt: skip
    load(net, g)
    x, mask = torch.tensor(g["image"]), torch.tensor(g["mask"])[None, None]
    parts = decompose(Classifier(net), x, mask) if copied else Decomposer(net).decompose(x, mask)
    close(parts.relevant[:, 0], g["rel"], 1e-4)
    close(parts.irrelevant[:, 0], g["irrel"], 1e-4)


def mnist() -> tuple[dict[str, np.ndarray], nn.Module]:
    """The net that the authors' repository ships; its weights are not ours to pass on."""
    file = SHARED / "cd_mnist.npz"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    with np.load(file) as arrays:
        g = {key: arrays[key] for key in arrays.files}
    return g, load(AcdCNN(), g)


def skip_where_rounding_differs(found: Tensor, golden: np.ndarray) -> None:
    """Ties of max-pooling on the flat background are decided by rounding, which other machines do otherwise."""
    difference = (found - torch.tensor(golden)).abs().max() / np.abs(golden).max()
    assert difference < 0.01
    if difference > 1e-4:
        pytest.skip("this machine rounds otherwise than the authors' did, so other maxima of the flat background win")


def test_golden_mnist() -> None:
    g, net = mnist()
    model, x = Classifier(net), torch.tensor(g["images"])
    masks = torch.tensor(g["masks"]).expand(6, -1, -1, -1)
    found = decompose(model, x, masks, both=True)
    close(found.logits, g["logits"], 1e-4)
    close(found.relevant[:, 3:], g["rel"][:, 3:], 1e-6)  # no border between parts runs through the background
    skip_where_rounding_differs(found.relevant, g["rel"])
    close(found.relevant, g["rel"], 1e-4)
    close(found.irrelevant, g["irrel"], 1e-4)


def test_golden_mnist_without_the_rounding_of_the_original() -> None:
    """On the constant background max-pooling has ties: there, and only there, the numbers differ, and little."""
    g, net = mnist()
    masks = torch.tensor(g["masks"]).expand(6, -1, -1, -1)
    found = decompose(Classifier(net), torch.tensor(g["images"]), masks)
    difference = (found.relevant - torch.tensor(g["rel"])).abs() / np.abs(g["rel"]).max()
    assert difference.max() < 0.01
    # Everything, nothing, one pixel: no border between parts runs through the background.
    assert difference[:, 3:].max() < 1e-6
    # Without ties (noise far above rounding, far below the image) both forms agree.
    r = np.random.RandomState(0)
    x = torch.tensor(g["images"] + 1e-3 * r.randn(*g["images"].shape).astype(np.float32))
    one, other = (decompose(Classifier(net), x, masks, both=both).relevant for both in (False, True))
    assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_golden_mnist_with_another_relevant_input() -> None:
    """Relevant need not be a masked image: here it is a blurred one."""
    g, net = mnist()
    x = torch.tensor(g["images"][:1])
    blurred = F.avg_pool2d(x, 5, 1, 2)
    relevant, whole = Decomposer(net).split(x, blurred, torch.tensor([0]), both=True)
    skip_where_rounding_differs(relevant.detach(), g["tr_rel"])
    close(relevant.detach(), g["tr_rel"], 1e-4)
    close((whole - relevant).detach(), g["tr_irrel"], 1e-4)


# ---- completeness on all architectures ---------------------------------------------------------

ARCHITECTURES = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "convnext_tiny", "squeezenet1_1", "googlenet", "vit_b_16", "tf_efficientnet_lite0",
)  # fmt: skip


def architecture(name: str, size: int) -> nn.Module:
    """With random weights that keep the signal alive to the last layer, whose bias is not zero either."""
    import timm
    from torchvision import models

    options = {"googlenet": {"init_weights": False, "transform_input": True}, "vit_b_16": {"image_size": size}}
    if name.startswith("tf_"):
        net = timm.create_model(name, num_classes=10)
    else:
        net = models.get_model(name, weights=None, num_classes=10, **options.get(name, {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(generator=generator).mul_((2 / module.weight[0].numel()) ** 0.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(generator=generator).mul_(0.1)
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_(generator=generator).mul_(0.1)
                module.running_var.uniform_(0.7, 1.5, generator=generator)
    return net.eval()


def pictures(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A noise image; the upper half, a square in the middle, and half of the pixels."""
    r = np.random.RandomState(1)
    masks = torch.zeros(1, 3, size, size, dtype=torch.bool)
    masks[0, 0, : size // 2] = True
    masks[0, 1, size // 3 : size // 2, size // 3 : size // 2] = True
    masks[0, 2] = torch.tensor(r.rand(size, size) > 0.5)
    return torch.tensor(r.randn(1, 3, size, size)).to(dtype), masks


def completeness(name: str, size: int, dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """The largest error with both parts of every mask propagated on their own, and the largest share of a part."""
    x, masks = pictures(size, dtype)
    model = Classifier(architecture(name, size), rows=rows, dtype=dtype)
    found = decompose(model, x, masks, checks=3, tolerance=torch.inf)
    off = (found.relevant + found.irrelevant - model.logits(x)[:, None]).abs().amax((1, 2))
    assert (off <= (1e-4 if dtype == torch.float32 else 1e-9) * found.logits.abs().amax(1)).all()
    largest = found.relevant.abs().amax((1, 2)) / found.logits.abs().amax(1)
    assert found.relevant.std(1).amax(1).min() > 0  # the masks matter
    return found.error.max().item(), largest.max().item()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.quick("squeezenet1_1")
def test_parts_add_up_to_the_logits(name: str) -> None:
    size = 64
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        error, _ = completeness(name, size, dtype, 6)
        assert error <= limit


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_add_up_to_the_logits_at_full_size(name: str) -> None:
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        error, largest = completeness(name, 224, dtype, 6)
        print(f"{name} {dtype}: error {error:.1e}, largest relevant part {largest:.2g} of the largest logit")
        assert error <= limit
