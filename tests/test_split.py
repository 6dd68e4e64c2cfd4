"""Cutting nets: both ways of cutting give the whole net's logits and gradients, and do no needless work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import small_cnn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from attrib.models import Classifier
from attrib.models.layers import count_calls, hooked
from attrib.models.split import CannotSplitError, GraphSplit, HookSplit, split, trace
from attrib.types import UserError


def images(n: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, *(shape or (3, 64, 64)), generator=generator)


def vgg() -> nn.Module:
    with torch.device("meta"):  # nobody waits for 120 million random numbers
        net = models.vgg11()
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(nn.Linear(512, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return net.to_empty(device="cpu")


def timm_net(arch: str, **options) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(arch, num_classes=10, **options)


def torchvision_net(arch: str) -> Callable[[], nn.Module]:
    return lambda: getattr(models, arch)(weights=None, num_classes=10)


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=10)


def vit() -> nn.Module:
    return models.VisionTransformer(64, 16, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=10)


def convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)], num_classes=10)


# builder, {path: whether torch.fx can cut there}
NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, bool]]] = {
    "resnet18": (
        torchvision_net("resnet18"),
        {"conv1": True, "layer2": True, "layer2.0.bn2": True, "layer1.1.conv2": True, "layer3.0.downsample": True},
    ),
    "vgg11": (vgg, {"features": True, "features.10": True, "classifier.0": True}),
    "densenet121": (
        torchvision_net("densenet121"),
        {"features.denseblock2.denselayer3.conv1": True, "features.denseblock1": True},
    ),
    "efficientnet_b0": (
        torchvision_net("efficientnet_b0"),
        {"features.4": True, "features.3.1.block.1": True, "features.3.1.block.2.fc1": True},
    ),
    "mobilenet_v3_small": (torchvision_net("mobilenet_v3_small"), {"features.4": True, "features.5.block.2": True}),
    "convnext": (convnext, {"features.1": True, "features.3.0.block.3": True}),
    "vit": (
        vit,
        {
            "encoder.layers.encoder_layer_1": True,
            "encoder.layers.encoder_layer_1.mlp": True,
            "encoder.layers.encoder_layer_1.self_attention": False,  # returns a tuple
        },
    ),
    "swin": (swin, {"features.1": True, "features.3.0.attn": True, "features.1.1.mlp": True}),
    "timm vit_tiny": (
        timm_net("vit_tiny_patch16_224", img_size=64, depth=3),
        {"blocks.1": True, "blocks.1.attn": True, "blocks.0.mlp.fc1": True},
    ),
    "timm tf_efficientnet_lite0": (
        timm_net("tf_efficientnet_lite0"),
        {"blocks.3": True, "blocks.3.1.bn2": True, "conv_stem": True},
    ),
}


def build(name: str) -> Classifier:
    make, paths = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        # Some heads begin with zeros, and norms without effect or a signal that fades would hide mistakes.
        for path, value in net.named_parameters():
            if value.ndim > 1:
                nn.init.normal_(value, 0.0, 1.5 / value[0].numel() ** 0.5)
            else:
                nn.init.normal_(value, 0.0 if "bias" in path else 1.0, 0.1)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            net.train()(images(4))
    return Classifier(net, {p: p for p in paths}, rows=4, input_shape=(3, 64, 64), fold=False)


def replaced(module: nn.Module, path: str, x: Tensor, z: Tensor) -> Tensor:
    """The whole net with another output of one layer: what ``after`` must give."""

    def hook(_module, _inputs, output):
        return (z.clone(), *output[1:]) if isinstance(output, tuple) else z.clone()

    with hooked(module.get_submodule(path), hook):
        return module(x.clone())


def close(a: Tensor, b: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


class Calls:
    """Which modules without children run."""

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        self.handles = [
            m.register_forward_hook(lambda *_, n=n: self.names.append(n))
            for n, m in module.named_modules()
            if not list(m.children())
        ]

    def __enter__(self) -> list[str]:
        return self.names

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick("convnext", "swin", "timm vit_tiny")
def test_every_cut_gives_the_whole_net(name, caplog):
    model = build(name)
    net, x = model.module, images(2)
    expected = model.logits(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    weight = images(4, 10)
    for path, by_graph in NETS[name][1].items():
        z, rest = model.until(path, x)
        assert type(model._splits[path]) is (GraphSplit if by_graph else HookSplit), caplog.text
        assert all(len(t) == 2 for t in (z, *rest))
        close(model.after(path, z, rest), expected)

        # Two rows per sample, each with another output of the layer.
        many = z.repeat_interleave(2, 0)
        many = many + 0.5 * many.std() * images(4, *z.shape[1:])
        leaf = many.clone().requires_grad_()
        wanted = replaced(net, path, x.repeat_interleave(2, 0), leaf)
        assert (wanted - expected.repeat_interleave(2, 0)).abs().max() > 1e-3 * expected.abs().max()
        (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), leaf)
        cuts = {"graph": model._splits[path], "hooks": HookSplit(net, path)}
        for cut in cuts.values():
            model._splits[path] = cut
            z, rest = model.until(path, x)
            close(model.after(path, many, rest), wanted.detach())
            values, grad = model.gradient(many, lambda out, rows: (out * weight[rows]).sum(1), path, rest)
            close(values, (wanted * weight).sum(1).detach())
            close(grad, wanted_grad, 1e-3)
        model._splits[path] = cuts["graph"]

        with Calls(net) as whole:
            net(x)
        if by_graph:
            with Calls(net) as front:
                z, rest = model.until(path, x)
            with Calls(net) as rear:
                model.after(path, z, rest)
            assert {n for n in whole if n == path or n.startswith(f"{path}.")} <= set(front)
            # Each half does its part and no more. (Modules that are not torch's own are traced
            # into, so that their hooks do not run.)
            seen = {n for n in whole if type(net.get_submodule(n)).__module__.startswith("torch.nn.")}
            assert Counter(n for n in front + rear if n in seen) == Counter(n for n in whole if n in seen)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_nothing_behind_and_nothing_before():
    model = build("resnet18")
    x = images(1)
    with Calls(model.module) as front:
        z, rest = model.until("layer2.0.bn2", x)  # traces and checks, which costs whole passes
        front.clear()
        z, rest = model.until("layer2.0.bn2", x)
    with Calls(model.module) as rear:
        model.after("layer2.0.bn2", z, rest)
    assert {"conv1", "layer1.1.bn2", "layer2.0.downsample.0", "layer2.0.bn2"} <= set(front)
    assert not [n for n in front if n.startswith(("layer2.1", "layer3", "layer4", "fc", "avgpool"))]
    assert {"layer2.1.conv1", "layer4.1.bn2", "fc"} <= set(rear)
    assert not [n for n in rear if n.startswith(("conv1", "layer1", "layer2.0.downsample"))]
    with Calls(model.module) as by_hooks:
        HookSplit(model.module, "layer2.0.bn2").front(x)
    assert not [n for n in by_hooks if n.startswith(("layer2.1", "layer3", "layer4", "fc"))]


# Nets that are difficult --------------------------------------------------------------------------


class Base(nn.Module):
    """(N, 4) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.other = nn.Linear(6, 6)


def cut(kind: type[nn.Module], path: str = "layer") -> tuple[Classifier, type]:
    """Checks the cut; says how it was made."""
    torch.manual_seed(0)
    model = Classifier(kind(), {"layer": path}, dtype=torch.float64, rows=3)
    x = images(2, 4).double()
    z, rest = model.until("layer", x)
    close(model.after("layer", z, rest), model.logits(x), 1e-12)
    many = z.repeat_interleave(3, 0) + images(6, *z.shape[1:])
    wanted = replaced(model.module, path, x.repeat_interleave(3, 0), many)
    close(model.after("layer", many, rest), wanted, 1e-12)
    return model, type(model._splits["layer"])


def test_a_net_that_cannot_be_traced_is_cut_by_hooks(caplog):
    class Branches(Base):
        def forward(self, x):
            x = self.stem(x)
            x = x + self.layer(x) if x.abs().sum() < 1e9 else x - self.layer(x)
            return self.head(x)

    with caplog.at_level(logging.INFO):
        assert cut(Branches)[1] is HookSplit
    assert "torch.fx cannot trace Branches" in caplog.text
    assert "using hooks at layer" in caplog.text


def test_a_layer_with_a_tuple():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Tuples(Base):
        def __init__(self):
            super().__init__()
            self.layer = Pair(6, 6)

        def forward(self, x):
            a, b = self.layer(self.stem(x))
            return self.head(F.relu(a) * b) if self.both else self.head(F.relu(a))

        both = False

    class Both(Tuples):
        both = True

    assert cut(Tuples)[1] is HookSplit
    # Cut at the first, what the second holds would go around the cut.
    with pytest.raises(UserError, match=r"layer layer of Both gives 2 things, and the net reads others than the first"):
        cut(Both)


def test_optional_arguments_do_not_stand_in_the_way():
    """timm's transformers have some; tracing must not take a missing mask for a given one."""

    class Optional(Base):
        def forward(self, x, mask=None, scale: float = 2.0, *, causal: bool = False):
            x = self.layer(self.stem(x) * scale)
            if mask is not None:
                x = x * mask
            if causal:
                x = x.cumsum(1)
            return self.head(x)

    assert cut(Optional)[1] is GraphSplit


def test_a_statement_in_place_is_not_lost():
    """torch.fx drops a call whose result nobody uses, whatever the call does to its input."""

    class Statements(Base):
        def forward(self, x):
            x = self.stem(x)
            x.relu_()
            x = self.layer(x)
            F.relu(x, inplace=True)
            return self.head(x)

    cut(Statements)


@pytest.mark.parametrize("path", ["layer", "head"])
def test_rows_are_told_apart(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A net that numbers its rows, which torch.fx can trace, and hands the numbers over as they were."""

    class Numbered(Base):
        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(self.stem(x))
            return self.head(z + z[torch.arange(x.shape[0]), x.abs().argmax(1)][:, None])

    with caplog.at_level(logging.INFO):
        assert cut(Numbered, path)[1] is (HookSplit if path == "layer" else GraphSplit)
    assert ("a row behind the cut reads another row" in caplog.text) == (path == "layer")


def test_a_layer_with_its_rows_in_another_order_is_refused() -> None:
    class Sorted(Base):
        def forward(self, x: Tensor) -> Tensor:
            order = x.sum(1).argsort()
            z = self.stem(x) + self.other(self.layer(self.stem(x[order])))[order.argsort()]
            return self.head(z)

    assert cut(Sorted, "head")[1] is GraphSplit
    with pytest.raises(UserError, match="layer layer of Sorted gives the rows of a batch in an order of its own"):
        cut(Sorted)


def test_a_net_that_writes_into_its_input_is_cut_by_hooks():
    """Before the layer and behind it; each half is given the input as it was."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            z = self.layer(x)
            x.add_(1.0)
            return self.head(z.mean((2, 3))) + x.mean((1, 2, 3))[:, None]

    torch.manual_seed(0)
    net, x = Overwrites().double().eval(), images(3, 3, 6, 6).double()
    model = Classifier(net, {"layer": "layer"}, dtype=torch.float64)
    expected, given = net(x.clone()).detach(), x.clone()
    front = model.until("layer", x)
    torch.testing.assert_close(front.z, net.layer(2 * x).detach(), rtol=0, atol=1e-12)
    for _ in range(2):
        torch.testing.assert_close(model.after("layer", front.z, front.rest), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, given)


@pytest.mark.parametrize("way", ["method", "many", "augmented", "function"])
def test_what_is_written_through_a_view_is_not_lost(way: str) -> None:
    """Nobody reads the result of such an operation, neither in front of the layer nor behind it."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def write(self, x: Tensor) -> None:
            view = x.flatten(2)[..., :7]
            if way == "method":
                view.relu_()
            elif way == "many":
                view.sub_(0.5).mul_(2.0)
            elif way == "augmented":
                view += 1e-4  # a difference that is small beside the logits
            else:
                F.threshold(view, 0.0, 0.0, True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.write(x)
            x = self.layer(x)
            self.write(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    net, x = Views().double().eval(), images(3, 3, 8, 8).double()
    model = Classifier(net, {"layer": "layer"}, dtype=torch.float64)
    with torch.no_grad():
        expected, x1 = net(x.clone()), net.first(x)
        net.write(x1)
        front = model.until("layer", x)
        torch.testing.assert_close(front.z, net.layer(x1), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.after("layer", front.z, front.rest), expected, rtol=0, atol=1e-12)


class Checkpointed(nn.Module):
    """What timm's and torchvision's nets do with ``set_grad_checkpointing`` and ``memory_efficient``."""

    def __init__(self, again: bool = True, by_value: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Tanh())
        self.head, self.again, self.by_value = nn.Linear(4, 2), again, by_value

    def forward(self, x: Tensor) -> Tensor:
        if self.by_value and x.max() > 1e9:  # torch.fx cannot trace this
            x = x * 2
        z = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
        return self.head(z.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # in torch 2.4 itself
def test_a_net_that_runs_parts_again_on_the_way_back_is_cut_by_graph():
    torch.manual_seed(0)
    net, x = Checkpointed().double(), images(2, 3, 9, 9).double()
    plain = Checkpointed(again=False).double()
    plain.load_state_dict(net.state_dict())
    found, expected = (Classifier(n, {"layer": "body.1"}, dtype=torch.float64) for n in (net, plain))
    for model in (found, expected):
        model.until("layer", x)
    z = found.until("layer", x).z
    for role, at in ((None, x), ("layer", z)):
        got = found.gradient(at, lambda logits, _: logits[:, 0], role)
        torch.testing.assert_close(got, expected.gradient(at, lambda logits, _: logits[:, 0], role), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # in torch 2.4 itself
def test_where_no_graph_helps_it_is_refused_at_a_layer():
    x = images(2, 3, 9, 9).double()
    model = Classifier(Checkpointed(by_value=True).double(), {"layer": "body.1"}, dtype=torch.float64)
    z, rest = model.until("layer", x)
    torch.testing.assert_close(model.after("layer", z, rest), model.logits(x), rtol=0, atol=1e-12)
    with pytest.raises(UserError, match=r"Checkpointed runs parts of itself again .*set_grad_checkpointing\(False\)"):
        model.gradient(z, lambda logits, _: logits[:, 0], "layer", rest)


def test_constants_and_parameters_on_both_sides():
    class Constants(Base):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            twice = self.scale * torch.tensor([2.0], dtype=torch.float64)
            x = self.layer(self.stem(x) * twice)
            return self.head(x * twice + self.other(x) * torch.arange(6.0))

    model, how = cut(Constants)
    assert how is GraphSplit
    assert model.until("layer", images(2, 4).double()).rest == ()


def test_a_baked_in_batch_size_is_noticed():
    class Baked(Base):
        def forward(self, x):
            n = len(x) if isinstance(x, Tensor) else 1  # a traced net sees a proxy
            return self.head(self.layer(self.stem(x).reshape(n, 6)).reshape(n, 6))

    assert cut(Baked)[1] is HookSplit

    class OneOnly(Base):
        def forward(self, x):
            return self.head(self.layer(self.stem(x)).reshape(1, 6))

    model = Classifier(OneOnly(), {"layer": "layer"})
    with pytest.raises(UserError, match="OneOnly takes one sample alone, but not two together"):
        model.until("layer", images(2, 4))


def test_a_layer_whose_rows_are_no_samples_is_refused():
    class TimeFirst(Base):
        def forward(self, x):
            x = self.stem(x)[:, None].expand(-1, 5, -1).transpose(0, 1)
            return self.head(self.layer(x).mean(0))

    class Strings(nn.Linear):
        def forward(self, x):
            return {"z": super().forward(x)}

    class Named(Base):
        def __init__(self):
            super().__init__()
            self.layer = Strings(6, 6)

        def forward(self, x):
            return self.head(self.layer(self.stem(x))["z"])

    for kind, why in ((TimeFirst, r"TimeFirst gives \(5, 1, 6\) .* not one row per sample"), (Named, "gives a dict")):
        with pytest.raises(UserError, match=rf"layer layer .*{why}.*; take .* layer.*model\.layers"):
            Classifier(kind(), {"layer": "layer"}).until("layer", images(2, 4))
    model = Classifier(
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4
        ),
        {"windows": "layers.0.blocks.0.attn"},
    )
    with pytest.raises(UserError, match="not one row per sample"):
        model.until("windows", images(1, 3, 32, 32))


def test_a_layer_that_runs_twice_or_never():
    class Twice(Base):
        def forward(self, x):
            return self.head(self.layer(self.layer(self.stem(x))))

    for path, calls in (("layer", 2), ("other", 0)):
        with pytest.raises(UserError, match=rf"layer {path} of Twice runs {calls} times .* model\.layers\.<role>"):
            Classifier(Twice(), {"layer": path}).until("layer", images(2, 4))


def test_a_layer_that_runs_for_some_inputs_only():
    class Sometimes(Base):
        def forward(self, x):
            x = self.stem(x)
            return self.head(self.layer(x) if x.abs().sum() < 1e3 else x)

    model = Classifier(Sometimes(), {"layer": "layer"})
    model.until("layer", images(2, 4))
    with pytest.raises(UserError, match="Sometimes did not run the layer layer for these inputs"):
        model.until("layer", 1e9 * images(2, 4))


def test_an_input_with_nan_is_no_reason_for_hooks():
    model = Classifier(small_cnn(), {"layer": "features.5"})
    model.until("layer", torch.full((1, 3, 32, 32), float("nan")))
    assert type(model._splits["layer"]) is GraphSplit


def test_tied_weights_and_shared_storage():
    """The two halves hold the net's own modules: no second copy of the weights."""
    model = Classifier(small_cnn(), {"layer": "features.5"})
    model.until("layer", images(1, 3, 32, 32))
    halves = model._splits["layer"]
    own = {id(p) for p in model.module.parameters()}
    assert {id(p) for half in (halves.front_graph, halves.rear_graph) for p in half.parameters()} <= own


# Hooks do not stay --------------------------------------------------------------------------------


def test_hooks_are_gone_after_errors():
    class Fails(Base):
        fail = ""

        def forward(self, x):
            if self.fail == "before":
                raise RuntimeError("no luck")
            x = self.layer(self.stem(x))
            if self.fail == "behind":
                raise RuntimeError("no luck")
            return self.head(x) if x.sum() < 1e9 else x

    net = Fails().eval()
    by_hooks, x = HookSplit(net, "layer"), images(2, 4)
    z, rest = by_hooks.front(x)
    for where in ("before", "behind"):
        net.fail = where
        if where == "before":
            with pytest.raises(RuntimeError, match="no luck"):
                by_hooks.front(x)
        for call in (
            lambda: by_hooks.rear(z, rest),
            lambda: count_calls(net, "layer", x),
            lambda: split(net, "layer", x),
        ):
            with pytest.raises(RuntimeError, match="no luck"):
                call()
    assert not net.layer._forward_hooks
    net.fail = ""
    torch.testing.assert_close(by_hooks.rear(z, rest), net(x))


def test_graph_split_says_why_it_cannot():
    class Two(Base):
        def forward(self, x):
            return self.head(self.layer(self.layer(self.stem(x))))

    with pytest.raises(CannotSplitError, match="layer appears 2 times in the graph"):
        GraphSplit(Two(), "layer")
    with pytest.raises(CannotSplitError, match="cannot trace Unwilling: "):
        trace(type("Unwilling", (Base,), {"forward": lambda self, x: self.head(x) if x.sum() > 0 else x})())


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def _stopped(z):
    with torch.no_grad():
        return z * 3


@pytest.mark.parametrize(("function", "factor"), [(_Doubled.apply, 2), (lambda z: z + _stopped(z), 1)])
def test_a_net_with_a_way_back_of_its_own_is_cut_by_hooks(function, factor):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(function(self.conv(x)).mean((2, 3)))

    net = Own().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cut = split(net, "conv", x)
    assert isinstance(cut, HookSplit)
    z, rest = cut.front(x)
    leaf = z.detach().requires_grad_()
    (got,) = torch.autograd.grad(cut.rear(leaf.clone(), rest)[:, 0].sum(), leaf)
    expected = factor * net.fc.weight[0].detach().view(1, 4, 1, 1).expand_as(z) / z[0, 0].numel()
    torch.testing.assert_close(got, expected)


class Sentences(nn.Module):
    """A small transformer with a mask of padding; ``kind`` is how places come in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.words, self.pos = kind, nn.Embedding(20, 8, padding_idx=0), nn.Parameter(torch.randn(1, 12, 8))
        self.table = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def places(self, ids: Tensor) -> Tensor:
        if self.kind == "a slice":
            return self.pos[:, : ids.shape[1]]
        if self.kind == "a slice without rows":
            return self.pos[0, : ids.shape[1]]
        if self.kind == "a table":
            return self.table(torch.arange(ids.shape[1], device=ids.device))
        return self.table(torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1))

    def forward(self, ids: Tensor) -> Tensor:
        gone = ids == 0
        z = self.encoder(self.words(ids) + self.places(ids), src_key_padding_mask=gone)
        return self.head((z * ~gone[..., None]).sum(1) / (~gone).sum(1, keepdim=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kind", ["a slice", "a slice without rows", "a table", "a table for each row"])
def test_places_of_words_are_handed_over_for_each_row(kind, length, capfd):
    """They depend on the length of the texts alone, and may have one row for all of them."""
    torch.manual_seed(2)
    net, ids = Sentences(kind).eval().double(), torch.randint(1, 20, (3, length))
    way = split(net, "words", ids)
    for rows in (ids[:1], ids[:2], ids):
        z, rest = way.front(rows)
        assert all(len(t) == len(rows) for t in (z, *rest))
        close(way.rear(z, rest), net(rows))
        twice = [t.repeat_interleave(2, 0) for t in rest]  # as methods send changed copies of each sample
        close(way.rear(z.repeat_interleave(2, 0), twice), net(rows.repeat_interleave(2, 0)))
        order = torch.arange(len(rows)).flip(0)
        close(way.rear(z[order], tuple(t[order] for t in rest)), net(rows[order]))
    assert "Traceback" not in capfd.readouterr().err


class _FixedRows(Base):
    """Behind the layer there must be one row, which only a run with two tells."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)).reshape(1, 6))


class _FixedRest(Base):
    """What goes around the layer is for one row, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        return self.head(self.layer(z) + z.reshape(1, 6))


@pytest.mark.parametrize("kind", [_FixedRows, _FixedRest])
def test_a_trial_that_fails_prints_nothing(kind, capfd):
    """torch.fx prints what fails in a graph that is called."""
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"layer of .*: the net does not run when cut there"):
        split(kind().eval(), "layer", images(1, 4))
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_layer_that_gives_a_nested_tensor_is_refused():
    ids = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0]])
    with pytest.raises(UserError, match=r"nested tensor.*take a layer outside of the nn\.TransformerEncoder"):
        split(Sentences("a slice").eval(), "encoder.layers.0.norm2", ids)
