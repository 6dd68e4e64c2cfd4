"""LRP: zennit's numbers on CNNs, a slow AttnLRP on a block of attention, and relevance that is nowhere lost."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from net_zoo import PAD, OwnTextCNN
from nets import small_cnn, small_cnn_images
from torch import nn
from transformer_nets import TEXT, batch_of
from transformer_nets import classifier as transformer
from zennit import composites as zennit_composites
from zennit import rules as zennit_rules
from zennit.attribution import Gradient as ZennitGradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer

from attrib.methods.lrp import LRP
from attrib.models import Classifier
from attrib.models.randomise import reinitialise, weighted_layers
from attrib.noise import Noise
from attrib.relevance.composites import Composite
from attrib.relevance.plan import Plan
from attrib.relevance.propagation import Propagation
from attrib.sanity.measures import spearman
from attrib.types import Batch, SampleError, UserError

LOW, HIGH = -6.0, 6.0
EYE = torch.eye(6)
COMPOSITES = {
    "epsilon_plus": zennit_composites.EpsilonPlus,
    "epsilon_plus_flat": zennit_composites.EpsilonPlusFlat,
    "epsilon_alpha2_beta1": zennit_composites.EpsilonAlpha2Beta1,
    "epsilon_alpha2_beta1_flat": zennit_composites.EpsilonAlpha2Beta1Flat,
    "epsilon_gamma_box": zennit_composites.EpsilonGammaBox,
}


def settled(net: nn.Module) -> nn.Module:
    """In eval mode and float64, with weights and statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.0  # zennit leaves it in the norm that it has merged
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return net.double().eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5)),
    ]
    return settled(nn.Sequential(*layers))


def images(n: int = 3, size: int = 16) -> Batch:
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Batch(tuple(map(str, range(n))), x, torch.arange(n) % 5)


def chosen(target: torch.Tensor):
    return lambda logits: torch.zeros_like(logits).scatter(1, target[:, None], logits.gather(1, target[:, None]))


def relevance(net: nn.Module, batch: Batch, composite: Composite, epsilon: float = 1e-6):
    graph = Classifier(net, dtype=batch.x.dtype).graph(batch.x)
    return Propagation(Plan(graph, graph.input), composite, epsilon).relevance(batch.x, chosen(batch.target))


def zennits(net: nn.Module, batch: Batch, composite) -> torch.Tensor:
    with warnings.catch_warnings(), ZennitGradient(net, composite) as attributor:
        warnings.simplefilter("ignore")
        return attributor(batch.x.clone(), chosen(batch.target))[1]


def same(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


def conserves(found, batch: Batch, relative: float) -> None:
    """All of the logits is at the input or was kept by a formula."""
    score = found.logits.gather(1, batch.target[:, None]).sum()
    missing = score.double() - found.relevance.sum(dtype=torch.float64) - found.ledger.kept
    assert abs(float(missing)) <= relative * max(float(found.ledger.size), float(score.abs()))


# ---- zennit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("net", ["cnn", "resnet18"])
@pytest.mark.quick("cnn-*", "resnet18-epsilon_gamma_box")
def test_composites_are_zennits(name, net):
    box = {"low": LOW, "high": HIGH} if name == "epsilon_gamma_box" else {}
    tensors = {key: torch.full((1, 3, 1, 1), value, dtype=torch.float64) for key, value in box.items()}
    torch.manual_seed(0)
    net = cnn() if net == "cnn" else settled(torchvision.models.resnet18(num_classes=5))
    batch = images(2, 32)
    found = relevance(net, batch, Composite.of(name, **box))
    canonizers = [ResNetCanonizer() if hasattr(net, "layer1") else SequentialMergeBatchNorm()]
    same(found.relevance, zennits(net, batch, COMPOSITES[name](**tensors, canonizers=canonizers)))
    conserves(found, batch, 1e-12)


RULES = {
    "epsilon": ({"epsilon": 0.1}, zennit_rules.Epsilon(0.1)),
    "gamma": ({"gamma": 0.7}, zennit_rules.Gamma(0.7)),
    "zplus": ({}, zennit_rules.ZPlus()),
    "alpha_beta": ({"alpha": 1.5, "beta": 0.5}, zennit_rules.AlphaBeta(1.5, 0.5)),
    "flat": ({}, zennit_rules.Flat()),
    "w_square": ({}, zennit_rules.WSquare()),
    "zbox": (
        {"low": LOW, "high": HIGH},
        zennit_rules.ZBox(*(torch.full((1, 1), v, dtype=torch.float64) for v in (LOW, HIGH))),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
@pytest.mark.quick(every=2)
def test_rules_are_zennits(rule, kind):
    """Inputs of both signs, with and without bias; what is kept is counted by the rule's own formula."""
    values, theirs = RULES[rule]
    torch.manual_seed(3)
    layer = {"conv": nn.Conv2d(3, 4, 3, stride=2), "transposed": nn.ConvTranspose2d(3, 4, 3, bias=False)}.get(kind)
    size = {"conv": 4 * 7 * 7, "transposed": 4 * 18 * 18}.get(kind)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5)) if layer is None else nn.Sequential(
        layer, nn.Flatten(), nn.Linear(size, 5)
    )  # fmt: skip
    net, batch = settled(net), images()
    lines = [{"first": True, "rule": rule, **values}]
    found = relevance(net, batch, Composite.of("epsilon", lines))
    first = net[1] if layer is None else layer
    if rule == "zbox" and layer is not None:
        theirs = zennit_rules.ZBox(*(torch.full((1, 3, 1, 1), v, dtype=torch.float64) for v in (LOW, HIGH)))
    by_class = [((type(first),), theirs.copy()), ((nn.Linear,), zennit_rules.Epsilon(1e-6))]
    same(found.relevance, zennits(net, batch, zennit_composites.LayerMapComposite(by_class)))
    conserves(found, batch, 1e-12)


# ---- every rule in matrix form, from the papers --------------------------------------------------------


def by_hand(rule: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """One sample through one linear layer, w (J, I): relevance (I,), by loops."""
    found = torch.zeros_like(x)
    for j in range(len(w)):
        z = [x[i] * w[j, i] for i in range(len(x))]
        up, down = [max(v, 0 * v) for v in z], [min(v, 0 * v) for v in z]
        if rule == "epsilon":
            share = [v / (sum(z) + b[j]) for v in z]
        elif rule == "zplus":
            share = [v / (sum(up) + b[j].clamp(min=0)) for v in up]
        elif rule == "alpha_beta":
            positive, negative = sum(up) + b[j].clamp(min=0), sum(down) + b[j].clamp(max=0)
            share = [2 * u / positive - d / negative for u, d in zip(up, down)]
        elif rule == "gamma":
            own = sum(z) + b[j]
            with_sign = [v + 0.25 * (u if own > 0 else d) for v, u, d in zip(z, up, down)]
            bias = b[j] + 0.25 * (b[j].clamp(min=0) if own > 0 else b[j].clamp(max=0))
            share = [v / (sum(with_sign) + bias) for v in with_sign]
        elif rule == "flat":
            share = [x.new_ones(()) / len(x)] * len(x)
        elif rule == "w_square":
            share = [w[j, i] ** 2 / (w[j].square().sum() + b[j] ** 2) for i in range(len(x))]
        else:
            box = [x[i] * w[j, i] - LOW * w[j, i].clamp(min=0) - HIGH * w[j, i].clamp(max=0) for i in range(len(x))]
            share = [v / sum(box) for v in box]
        found += torch.stack(share) * r[j]
    return found


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_the_papers(rule):
    torch.manual_seed(5)
    net = nn.Linear(7, 4).double()
    x = torch.randn(2, 7, dtype=torch.float64)
    values = {"zbox": {"low": LOW, "high": HIGH, "stabilizer": 0.0}, "epsilon": {"epsilon": 0.0}}
    lines = [{"rule": rule, **values.get(rule, {"stabilizer": 0.0})}]
    batch = Batch(("a", "b"), x, torch.tensor([0, 3]))
    found = relevance(net, batch, Composite.of("epsilon", lines)).relevance
    for i in range(2):
        out = chosen(batch.target[i : i + 1])(net(x[i : i + 1]).detach())[0]
        same(found[i], by_hand(rule, x[i], net.weight.detach(), net.bias.detach(), out))


# ---- attention -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """One block of attention over the rows of a picture, with a residual, a norm and a gated layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.norm, self.up, self.gate, self.head = (
            nn.LayerNorm(6),
            *(nn.Linear(6, 6) for _ in range(2)),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = x[:, 0]
        q, k, v = (f(x).unflatten(2, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = self.norm(x + self.o(mixed))
        return self.head((self.up(z) * F.silu(self.gate(z))).mean(1))


def attn_lrp(net: Block, x: torch.Tensor, target: int) -> torch.Tensor:
    """(T, 6) -> (T, 6): Achtibat et al. (2024), section 3, for one sample, head by head; epsilon 0."""
    t = len(x)
    linear = lambda f, x, r: x * ((r / f(x)) @ f.weight)  # noqa: E731
    q, k, v = net.q(x), net.k(x), net.v(x)
    heads = []
    for h in range(2):
        at = slice(3 * h, 3 * h + 3)
        scores = (q[:, at] / math.sqrt(3)) @ k[:, at].T
        weights = torch.stack([row.exp() / row.exp().sum() for row in scores])
        heads.append((at, scores, weights, weights @ v[:, at]))
    mixed = torch.cat([head[3] for head in heads], 1)
    out = net.o(mixed)
    residual = x + out
    z = net.norm(residual)
    gate = net.gate(z)
    product = net.up(z) * F.silu(gate)
    pooled = product.mean(0)
    logit = torch.zeros(4, dtype=x.dtype)
    logit[target] = net.head(pooled)[target]
    r_product = product / t / pooled * linear(net.head, pooled, logit)
    # Half to each factor; SiLU passes what it gets. The norm is linear in its input, for the deviation is a constant.
    r_z = linear(net.up, z, r_product / 2) + linear(net.gate, z, r_product / 2)
    r_residual = torch.zeros_like(residual)
    for i in range(t):
        deviation = (residual[i].var(correction=0) + net.norm.eps).sqrt()
        for j in range(6):  # z_j = w_j (x_j - mean of x) / deviation + b_j
            by = net.norm.weight[j] / deviation * (torch.eye(6, dtype=x.dtype)[j] - 1 / 6)
            r_residual[i] += residual[i] * by / z[i, j] * r_z[i, j]
    r_x = x / residual * r_residual
    r_mixed = linear(net.o, mixed, out / residual * r_residual)
    r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at, scores, weights, o in heads:
        r = r_mixed[:, at]
        r_scores = torch.zeros_like(scores)
        for i in range(t):
            r_weight = torch.stack([sum(weights[i, j] * v[j, at] * r[i] / (2 * o[i])) for j in range(t)])
            for j in range(t):
                r_v[j, at] += weights[i, j] * v[j, at] * r[i] / (2 * o[i])
                r_scores[i, j] = scores[i, j] * (r_weight[j] - weights[i, j] * r_weight.sum())
            for j in range(t):
                both = (q[i, at] / math.sqrt(3)) * k[j, at] * r_scores[i, j] / (2 * scores[i, j])
                r_q[i, at] += both
                r_k[j, at] += both
    return r_x + linear(net.q, x, r_q) + linear(net.k, x, r_k) + linear(net.v, x, r_v)


def test_attention_is_attn_lrp():
    torch.manual_seed(0)
    net = settled(Block())
    x = torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    batch = Batch(("a", "b"), x, torch.tensor([1, 3]))
    found = relevance(net, batch, Composite.of("epsilon", epsilon=0.0), epsilon=0.0)
    with torch.no_grad():
        for i in range(2):
            same(found.relevance[i, 0], attn_lrp(net, x[i, 0], int(batch.target[i])))
    conserves(found, batch, 1e-12)


# ---- what is conserved, and where it goes --------------------------------------------------------------


def test_without_biases_all_relevance_is_at_the_input():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)),
    ).double()
    found = LRP(composite="epsilon", epsilon=0.0).attribute(Classifier(net, dtype=torch.float64), images(), {}, None)
    assert found["bias_relevance"].abs().max() < 1e-12


class Written(nn.Module):
    """The same net as ``Named``, by other calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        z = F.conv2d(x, self.conv.weight, self.conv.bias)
        z = z * torch.sigmoid(z)
        z = z.flatten(2).sum(2) / z[0, 0].numel()
        z = z * (z.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return torch.addmm(self.fc.bias, z, self.fc.weight.t())


class Named(Written):
    def forward(self, x):
        z = F.silu(self.conv(x)).mean((2, 3))
        return self.fc(F.rms_norm(z, (6,), eps=1e-5))


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat"])
def test_it_does_not_matter_how_the_net_is_written(composite):
    one, other = (
        LRP(composite=composite, epsilon=1e-12).attribute(
            Classifier(net.double(), dtype=torch.float64), images(), {}, None
        )
        for net in (Named(), Written())
    )
    torch.testing.assert_close(one["map"], other["map"], rtol=0, atol=1e-6 * one["map"].abs().max().item())


class Forms(nn.Module):
    """A net with something in its middle, ``form(net, z)`` of z (N, 6, 16, 16)."""

    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.second, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)
        self.bn, self.ln, self.frozen = nn.BatchNorm2d(6), nn.LayerNorm(6), torchvision.ops.FrozenBatchNorm2d(6, 1e-5)
        self.a, self.b, self.square = (nn.Parameter(torch.randn(size)) for size in ((6,), (6,), (6, 6)))
        for value in (self.bn.weight, self.bn.bias, self.bn.running_mean, self.ln.weight, self.ln.bias):
            value.data.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.frozen.load_state_dict({k: v for k, v in self.bn.state_dict().items() if "num" not in k})
        self.form = form
        self.double().eval()

    def forward(self, x):
        z = self.form(self, self.conv(x))
        return self.fc(z.mean((2, 3)) if z.ndim == 4 else z)


def lrp_of(form, composite: str = "epsilon_plus_flat") -> torch.Tensor:
    method = LRP(composite=composite, epsilon=1e-9)
    return method.attribute(Classifier(Forms(form), dtype=torch.float64), images(2), {}, None)["map"]


def _first_of(weights, z):
    return weights[..., :1].mean(-1) + z.mean((2, 3))


def _softmax(exponent, hidden=None):
    def form(net, z):
        flat = z.flatten(2)
        e = exponent(flat).exp()
        return _first_of(e / e.sum(-1, keepdim=True), z)

    return form


def _layer_norm(net, z):
    z = z.mean((2, 3))
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * net.ln.weight + net.ln.bias


def _by_frozen(net, z, weight):
    scale = weight * (net.bn.running_var + 1e-5).rsqrt()
    return z * scale.view(1, -1, 1, 1) + (net.bn.bias - net.bn.running_mean * scale).view(1, -1, 1, 1)


def _weighted_norm(net, z):
    return F.batch_norm(z, net.bn.running_mean, net.bn.running_var, F.softplus(net.a), net.bn.bias)


def _added(z):
    return z.flatten(2).transpose(1, 2)


WRITTEN = {
    "layer norm": (lambda net, z: net.ln(z.mean((2, 3))), _layer_norm),
    "frozen batch norm": (lambda net, z: net.second(net.bn(z).relu()), lambda net, z: net.second(net.frozen(z).relu())),
    "batch norm with a weight that is computed": (
        _weighted_norm,
        lambda net, z: _by_frozen(net, z, F.softplus(net.a)),
    ),
    "bias added": (
        lambda net, z: net.second(z.relu()),
        lambda net, z: F.conv2d(z.relu(), net.second.weight, padding=1) + net.second.bias.view(-1, 1, 1),
    ),
    "addmm": (
        lambda net, z: F.linear(z.mean((2, 3)), 2 * net.square.T, net.a / 2),
        lambda net, z: torch.addmm(net.a, z.mean((2, 3)), net.square, beta=0.5, alpha=2),
    ),
    "baddbmm of two": (
        lambda net, z: (_added(z) + _added(z) @ z.flatten(2)[..., :6]).mean(1),
        lambda net, z: torch.baddbmm(_added(z), _added(z), z.flatten(2)[..., :6]).mean(1),
    ),
    "gate": (
        lambda net, z: F.glu(torch.cat((z, net.second(z)), 1), 1),
        lambda net, z: z * net.second(z).sigmoid(),
    ),
    "gate of channels, by a view": (
        lambda net, z: z * net.second(z).mean((2, 3), keepdim=True).sigmoid(),
        lambda net, z: z * net.second(z).mean((2, 3)).sigmoid().view(len(z), 6, 1, 1).expand_as(z),
    ),
    "sigmoid": (
        lambda net, z: net.second(z) * z.sigmoid(),
        lambda net, z: net.second(z) * (1 / (1 + torch.exp(-z))),
    ),
    "softplus": (lambda net, z: net.second(F.softplus(z)), lambda net, z: net.second(torch.log1p(z.exp()))),
    "GELU of GPT-2": (
        lambda net, z: net.second(F.gelu(z, approximate="tanh")),
        lambda net, z: net.second(0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z.pow(3))))),
    ),
    "maximum with a number": (
        lambda net, z: z.clamp(min=0.3),
        lambda net, z: torch.maximum(z, torch.full_like(z, 0.3)),
    ),
    "softmax": (lambda net, z: _first_of(z.flatten(2).softmax(-1), z), _softmax(lambda z: z)),
    "shifted softmax": (
        lambda net, z: _first_of(z.flatten(2).softmax(-1), z),
        _softmax(lambda z: z - z.amax(-1, keepdim=True)),
    ),
    "exp of log_softmax": (
        lambda net, z: _first_of(z.flatten(2).softmax(-1), z),
        lambda net, z: _first_of(z.flatten(2).log_softmax(-1).exp(), z),
    ),
    "overwritten": (lambda net, z: z * (torch.arange(16) > 0).view(1, 1, -1, 1), lambda net, z: _overwritten(z)),
}


@pytest.mark.parametrize("function", [F.logsigmoid, F.rrelu])
def test_functions_with_a_second_result_have_a_rule(function):
    assert lrp_of(lambda net, z: net.second(function(z))).abs().sum() > 0


def _overwritten(z):
    z = z + 0.0
    z[:, :, 0] = 0
    return z


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.quick(every=2)
def test_what_is_written_out_gets_what_a_module_gets(name):
    one, other = (lrp_of(form) for form in WRITTEN[name])
    same(other, one, 1e-6)


@pytest.mark.parametrize(
    "form",
    [
        lambda net, z, sums: net.ln(sums),
        lambda net, z, sums: z * sums.sigmoid()[..., None, None],
        lambda net, z, sums: net.bn(sums[..., None, None].relu() + sums[..., None, None]),
        lambda net, z, sums: F.linear(sums.sigmoid(), net.square),
    ],
    ids=["layer norm", "squeeze and excitation", "batch norm", "sigmoid"],
)
def test_relevance_does_not_explode_where_sums_are_nearly_zero(form):
    """A sum divides its relevance by its value, so what comes back to it must be in proportion to that."""

    class Near(Forms):
        """One of the sums is as ``off`` makes it."""

        def forward(self, x):
            z = self.conv(x)
            z = self.form(self, z, z.mean((2, 3)) + self.off)
            return self.fc(z.mean((2, 3)) if z.ndim == 4 else z)

    net, batch = Near(form), images(1)
    net.register_buffer("off", torch.zeros(6, dtype=torch.float64))
    method, model, sizes = LRP(composite="epsilon", epsilon=1e-12), Classifier(net, dtype=torch.float64), []
    for near in (0.1, 1e-4, 1e-8):
        model.module.off[0] = near - net.conv(batch.x).mean((2, 3))[0, 0].detach()
        sizes.append(float(method.attribute(model, batch, {}, None)["map"].abs().sum()))
    assert max(sizes) < 20 * min(sizes)


def test_a_sum_that_is_not_conserved_is_noticed(monkeypatch):
    model, right = Classifier(cnn(), dtype=torch.float64), Propagation.relevance

    def lossy(self, x, start):
        found = right(self, x, start)
        found.relevance[0] += 1e-4
        return found

    monkeypatch.setattr(Propagation, "relevance", lossy)
    with pytest.raises(SampleError, match="0: LRP did not conserve the relevance"):
        LRP().attribute(model, images(), {}, Noise(("0", "1", "2")))


@pytest.mark.slow
def test_a_net_for_one_number_of_rows_alone():
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(len(x), 3, 16, 16))

    net, batch = Fixed(cnn()), images()
    found, other = (
        LRP().attribute(Classifier(net, dtype=torch.float64, rows=rows), batch, {}, None)["map"] for rows in (64, 2)
    )
    same(other, found)
    same(LRP().attribute(Classifier(cnn(), dtype=torch.float64), batch, {}, None)["map"], found)


@pytest.mark.parametrize("name", [*TEXT, "vit", "deit", "swin"])
@pytest.mark.quick("vit")
def test_transformers_lose_nothing(name, monkeypatch):
    """What is missing, of the most that flowed through one call: measured by what the rules say that they keep."""
    right, missing = Propagation.relevance, []

    def watched(self, x, start):
        found = right(self, x, start)
        score = start(found.logits).sum(dtype=torch.float64)
        lost = score - found.relevance.sum(dtype=torch.float64) - found.ledger.kept
        missing.append(float(lost.abs() / max(found.ledger.size, score.abs())))
        return found

    monkeypatch.setattr(Propagation, "relevance", watched)
    exact = 1e-7 if name == "llama" else 1e-9  # Llama's own norm is in float32, whatever its weights are
    for dtype, limit in ((torch.float64, exact), (torch.float32, 1e-4)):
        batch = batch_of(name).to("cpu", dtype)
        found = LRP(composite="epsilon").attribute(transformer(name, dtype), batch, {}, None)
        assert missing.pop() < limit
        scores = transformer(name, dtype).logits(batch.x).gather(1, batch.target[:, None])[:, 0]
        total = found["map"].flatten(1).sum(1) + found["bias_relevance"]
        torch.testing.assert_close(
            total, scores, rtol=0, atol=1e3 * torch.finfo(dtype).eps * float(found["map"].abs().sum())
        )


def maps_of(net: nn.Module, method: LRP, batch: Batch) -> torch.Tensor:
    return method.attribute(Classifier(net, dtype=torch.float64), batch, {}, None)["map"]


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    return sum(spearman(a.numpy(), b.numpy()) for a, b in zip(one, other)) / len(one)


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1"])
@pytest.mark.quick("epsilon")
def test_maps_depend_on_the_weights(composite):
    """Adebayo et al. (2018): from the last layer alone to all of them, new weights make other maps."""
    x = small_cnn_images("est_images")[0][:12].double()
    net, method = small_cnn().double(), LRP(composite=composite)
    batch = Batch(tuple(map(str, range(12))), x, net(x).argmax(1))
    original, layers = maps_of(net, method, batch), weighted_layers(net, x)
    assert likeness(original, maps_of(small_cnn().double(), method, batch)) > 0.999
    for count in (1, 3, len(layers)):
        new = copy.deepcopy(net)
        reinitialise(new, layers[:count], seed=0)
        assert abs(likeness(original, maps_of(new, method, batch))) < 0.5


# ---- lines, and what is refused ------------------------------------------------------------------------


def test_the_first_line_that_fits_counts():
    net, batch = cnn(), images()
    own = [{"layer": "4", "rule": "flat"}, {"layer": "Conv*", "first": True, "rule": "w_square"}]
    graph = Classifier(net, dtype=torch.float64).graph(batch.x)
    plan, composite = Plan(graph, graph.input), Composite.of("epsilon_plus", own)
    steps = [(node, step) for node, step in plan.steps.items() if step.kind == "layer"][::-1]
    rules = [type(composite.rule(node, step.first)).__name__ for node, step in steps]
    assert rules == ["WSquare", "Flat", "ZPlus", "Epsilon", "Epsilon"]
    assert [bool(step.merged) for _, step in steps] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"composite": "epsilon_plsu"}, "no composite 'epsilon_plsu'; did you mean 'epsilon_plus'"),
        ({"composite": "epsilon_gamma_box"}, "needs low and high"),
        ({"rules": [{"layer": "a"}]}, "needs a rule"),
        ({"rules": [{"rule": "zplsu"}]}, "no rule 'zplsu'; did you mean 'zplus'"),
        ({"rules": [{"rule": "gamma", "gama": 1.0}]}, "no parameter 'gama'; did you mean 'gamma'"),
        ({"rules": [{"rule": "gamma", "gamma": "a lot"}]}, "gamma"),
        ({"rules": [{"rule": "alpha_beta", "alpha": 2.0, "beta": 2.0}]}, "alpha - beta must be 1"),
        ({"rules": [{"rule": "zbox", "low": 0.0}]}, "high"),
        ({"rules": [{"rule": "flat", "first": "yes"}]}, "first is 'yes', must be true or false"),
        ({"rules": ["flat"]}, "a line of a composite"),
        ({"epsilon": -1.0}, "epsilon"),
    ],
)
def test_settings_without_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LRP(**fields)


def test_a_pixel_outside_of_the_box_is_refused():
    method = LRP(composite="epsilon_gamma_box", low=-1.0, high=1.0)
    with pytest.raises(SampleError, match="outside of the box"):
        method.attribute(Classifier(cnn(), dtype=torch.float64), images(), {}, None)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda z: torch.atan2(z[:, :3], z[:, 3:]), "atan2"),
        (lambda z: z.std(1, keepdim=True).expand(-1, 6, -1, -1), "std"),
        (lambda z: z.cumprod(1), "cumprod"),
        (lambda z: torch.fft.rfft(z).abs(), "_fft_r2c"),
        (lambda z: torch.einsum("bchw,cd->bdhw", *(t.to(z.dtype.to_complex()) for t in (z, EYE))).abs(), "reshape"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(function, name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.LazyLinear(5)

        def forward(self, x):
            return self.fc(function(self.conv(x)).mean((2, 3)))

    net = Net()
    net(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match=rf"LRP has no rule for {name} in its forward \(Net\)"):
        LRP().attribute(Classifier(net.double(), dtype=torch.float64), images(), {}, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"composite": "epsilon_plus_flat"},
        {"composite": "epsilon", "rules": [{"operation": "conv*", "rule": "w_square"}]},
        {"composite": "epsilon_gamma_box", "low": -9, "high": 9},
    ],
    ids=lambda settings: settings["composite"],
)
def test_padding_gets_nothing_from_rules_that_give_to_zeros(settings):
    """Such a rule shares out relevance among all that a convolution sees, and a text alone has no padding to see."""
    net = OwnTextCNN().double().eval()
    x = torch.tensor([[2, 7, 4, 9, 3, 5], [6, 2, 8, PAD, PAD, PAD], [3, 3, PAD, PAD, PAD, PAD]])
    batch = Batch(("a", "b", "c"), x, torch.tensor([0, 1, 2]), lengths=torch.tensor([6, 3, 2]))
    model = Classifier(net, {"embedding": "embedding"}, dtype=torch.float64)
    found = LRP(**settings).attribute(model, batch, {}, Noise(batch.uids))
    assert found["map"].shape == (3, 6)
    for i, length in enumerate(batch.lengths.tolist()):
        one = dataclasses.replace(batch[[i]], x=x[i : i + 1, :length])
        alone = LRP(**settings).attribute(model, one, {}, Noise(one.uids))
        torch.testing.assert_close(found["map"][i, :length], alone["map"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["bias_relevance"][i], alone["bias_relevance"][0], rtol=0, atol=1e-12)
        assert not found["map"][i, length:].any()
        logit = model.logits(one.x)[0, batch.target[i]]
        torch.testing.assert_close(found["map"][i].sum() + found["bias_relevance"][i], logit, rtol=0, atol=1e-10)
