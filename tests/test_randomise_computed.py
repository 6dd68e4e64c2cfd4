"""Randomised layers whose weights are computed from other tensors, as by torch.nn.utils.parametrize."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from randomised_nets import X, copy_of, seeded
from torch import nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from attrib.models.randomise import reinitialise, weighted_layers
from attrib.models.variant import WeightedLayer
from attrib.types import UserError


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


class Exponential(nn.Module):
    def forward(self, w):
        return w.exp()


class Positive(Exponential):
    def right_inverse(self, w):
        return w.log()


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w

    def right_inverse(self, w):
        return w / 2


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", (torch.arange(36).reshape(6, 6) % 3 > 0).float())

    def forward(self, w):
        return w * self.mask


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Linear(6, 2, bias=False)

    def forward(self, w):
        return w + self.a @ self.b.weight


class OwnSpectral(nn.Module):
    """Divides by the norm that the power method finds in training mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("u", nn.functional.normalize(torch.randn(6), dim=0))

    def forward(self, w):
        if self.training:
            with torch.no_grad():
                self.u.copy_(nn.functional.normalize(w @ (w.mT @ self.u), dim=0))
        return w / (w.mT @ self.u).norm()


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("trained", torch.randn(6, 6))

    def forward(self, w):
        return self.trained + 0 * w


def on(layer, *chain, name="weight", unsafe=False):
    for part in chain:
        if isinstance(part, nn.Module):
            register_parametrization(layer, name, part, unsafe=unsafe)
        else:
            part(layer)
    return layer


def linear():
    return nn.Linear(6, 6)


def quiet(function):
    def called(*args):
        with warnings.catch_warnings(action="ignore"):
            return function(*args)

    return called


def orthogonal(**options):
    return lambda layer: torchs.orthogonal(layer, **options)


def plain(w, new):
    assert torch.allclose(new, w, atol=1e-6)


def norm_1(w, new):
    assert torch.linalg.matrix_norm(new.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert torch.nn.functional.cosine_similarity(new.flatten(), w.flatten(), 0) > 0.999


def basis(w, new):
    small = new if new.shape[0] <= new.shape[1] else new.mT
    assert torch.allclose(small @ small.mT, torch.eye(len(small)), atol=1e-5)


def symmetric(w, new):
    assert torch.equal(new, w.triu() + w.triu(1).mT)


# A layer, and what is said of its new weight, beside that of a plain layer there.
CHAINS = {
    "weight_norm": (lambda: on(linear(), torchs.weight_norm), plain),
    "weight_norm of all": (lambda: torchs.weight_norm(linear(), dim=None), plain),
    "weight_norm of a bias": (lambda: torchs.weight_norm(on(linear(), torchs.weight_norm), "bias", None), plain),
    "spectral_norm": (lambda: on(linear(), torchs.spectral_norm), norm_1),
    "spectral_norm, more steps": (lambda: torchs.spectral_norm(linear(), n_power_iterations=4), norm_1),
    "orthogonal": (lambda: on(linear(), torchs.orthogonal), basis),
    "orthogonal, tall": (lambda: on(nn.Linear(6, 9), torchs.orthogonal), basis),
    "orthogonal, wide": (lambda: on(nn.Linear(6, 4), torchs.orthogonal), basis),
    "cayley": (lambda: on(nn.Linear(6, 9), orthogonal(orthogonal_map="cayley")), basis),
    **{
        f"{name}, no base": (
            lambda name=name: on(nn.Linear(6, 4), orthogonal(orthogonal_map=name, use_trivialization=False)),
            basis,
        )
        for name in ("matrix_exp", "cayley", "householder")
    },
    "weight_norm, spectral_norm": (lambda: on(linear(), torchs.weight_norm, torchs.spectral_norm), norm_1),
    "spectral_norm, doubled": (
        lambda: on(linear(), torchs.spectral_norm, Doubled()),
        lambda w, new: norm_1(w, new / 2),
    ),
    "symmetric": (lambda: on(linear(), Symmetric()), symmetric),
    "symmetric, exponential": (
        lambda: on(linear(), Symmetric(), Exponential()),
        lambda w, new: plain(w.triu() + w.triu(1).mT, new.log()),
    ),
    "symmetric, spectral_norm": (
        lambda: on(linear(), Symmetric(), torchs.spectral_norm),
        lambda w, new: norm_1(w.triu() + w.triu(1).mT, new),
    ),
    "doubled twice": (lambda: on(linear(), Doubled(), Doubled()), plain),
    "masked": (lambda: on(linear(), Masked()), lambda w, new: plain(w * Masked().mask, new)),
    "spectral norm of one's own": (lambda: on(linear(), OwnSpectral()), norm_1),
    "hook: weight_norm": (lambda: on(linear(), quiet(nn.utils.weight_norm)), plain),
    "hook: spectral_norm": (lambda: on(linear(), quiet(nn.utils.spectral_norm)), norm_1),
}


def trained(build, seed):
    """A net with one such layer, whose state is far from a new one's."""
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), build()), seed).requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
        for module in net.modules():
            if isinstance(module, torchs._SpectralNorm):
                module.train()
        net(X)
    return net.eval()


@pytest.mark.parametrize("kind", CHAINS)
def test_a_computed_weight_is_that_of_a_new_layer(kind):
    build, check = CHAINS[kind]
    nets = [trained(build, seed) for seed in (1, 2)]
    assert [layer.path for layer in weighted_layers(nets[0], X)] == ["2", "0"]
    state = torch.random.get_rng_state()
    first, second = (copy_of(net, "all") for net in nets)
    assert torch.equal(torch.random.get_rng_state(), state)
    # Nothing of the trained net is left: what was another net is the same now.
    torch.testing.assert_close(first.logits(X), second.logits(X), rtol=1e-2 if "own" in kind else 1e-4, atol=1e-4)
    top = copy_of(nets[0], 1).module
    assert torch.equal(top[2].weight, first.module[2].weight)
    assert torch.equal(top[0].weight, nets[0][0].weight)
    alike = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, len(nets[0][2].weight))))
    reinitialise(alike, weighted_layers(alike, X), 0)
    check(alike[2].weight.detach(), first.module[2].weight)
    plain(alike[2].bias, first.module[2].bias)
    again = copy_of(nets[0], "all", "cascade", 1).module[2].weight
    assert not torch.allclose(again, first.module[2].weight)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Conv2d(6, 8, 3), torch.ones(1, 6, 5, 5)),
        (lambda: nn.ConvTranspose2d(6, 8, 3), torch.ones(1, 6, 5, 5)),
        (lambda: nn.Embedding(20, 8), torch.tensor([[1, 2]])),
    ],
)
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "hooks"])
def test_other_layers(layer, x, kind):
    wrap = quiet(nn.utils.spectral_norm) if kind == "hooks" else getattr(torchs, kind)
    net, alike = seeded(lambda: nn.Sequential(wrap(layer()))), seeded(lambda: nn.Sequential(layer()))
    for one in (net, alike):
        reinitialise(one, weighted_layers(one, x), 0)
    got, expected = net[0].weight.detach(), alike[0].weight.detach()
    if kind == "weight_norm":
        assert torch.allclose(got, expected, atol=1e-6)
    else:
        dim = int(isinstance(alike[0], nn.ConvTranspose2d))
        assert torch.allclose(got * (expected.norm() / got.norm()), expected, atol=1e-5)
        assert torch.linalg.matrix_norm(got.transpose(0, dim).flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("wrap", [torchs.weight_norm, quiet(nn.utils.weight_norm)], ids=["new", "hook"])
def test_recurrent_layers(wrap):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)
            wrap(self.rnn, "weight_hh_l0")

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    net, x = seeded(Last).requires_grad_(False), X.reshape(4, 2, 3)
    net(x)
    new, plain = copy_of(net, "all", x=x), nn.LSTM(3, 5)
    assert new.variant.layers == ("fc", "rnn")
    reinitialise(plain, [WeightedLayer("", ("",))], 0)
    new.logits(x)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        weight = getattr(new.module.rnn, name)
        assert weight.abs().max() <= 5**-0.5
        assert not torch.allclose(weight, getattr(net.rnn, name), atol=0.05)
        assert any(torch.equal(weight, used) for used in new.module.rnn._flat_weights)


def test_originals_that_a_new_weight_does_not_have_keep_their_scale():
    """No logarithm of a negative weight: the trained originals' mean and deviation are all that is known."""
    net = trained(lambda: on(nn.Linear(6, 30), Exponential()), 0)
    net[2].parametrizations.weight[0].__class__ = Positive  # torch itself refuses to register it on a new layer
    old, new = (n[2].parametrizations.weight.original for n in (net, copy_of(net, "all").module))
    assert not torch.equal(old, new)
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.2)
    assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.2 * old.std().item())


def test_a_parametrizations_own_parameters():
    net = trained(lambda: on(linear(), LowRank()), 0)
    assert [layer.path for layer in weighted_layers(net, X)] == ["2", "0"]
    new = copy_of(net, 1).module.state_dict()
    same = [name for name, value in new.items() if torch.equal(value, net.state_dict()[name])]
    assert same == ["0.weight", "0.bias"]
    # Also one that is itself computed, and one that computes a buffer.
    nested = on(linear(), LowRank())
    torchs.weight_norm(nested.parametrizations.weight[0].b)
    nested.register_buffer("shift", torch.randn(6, 6))
    register_parametrization(nested, "shift", LowRank())
    nested.forward = lambda x: nn.functional.linear(x, nested.weight + nested.shift, nested.bias)
    before = copy.deepcopy(nested.state_dict())
    assert [layer.path for layer in weighted_layers(nested.eval(), X)] == [""]
    reinitialise(nested, weighted_layers(nested, X), 0)
    same = [name for name, value in nested.state_dict().items() if torch.equal(value, before[name])]
    assert same == ["parametrizations.shift.original"]
    assert nested.parametrizations.weight[0].b.weight.abs().max() <= 6**-0.5


def test_a_normalisation_and_a_parameter_of_the_net_itself():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.norm = nn.Parameter(torch.randn(6)), nn.LayerNorm(6)
            register_parametrization(self, "token", Doubled())
            register_parametrization(self.norm, "weight", Doubled())

        def forward(self, x):
            return self.norm(x + self.token)

    net = seeded(Token)
    with torch.no_grad():
        net.norm.weight = torch.arange(6.0)
    new = copy_of(net, "all")
    assert new.variant.layers == ("",)
    assert torch.equal(new.module.norm.weight, torch.ones(6))
    assert not torch.equal(new.module.token, net.token)


def test_pruned_layers_stay_pruned():
    net = seeded(lambda: nn.Sequential(linear()))
    prune.l1_unstructured(net[0], "weight", 0.5)
    net.requires_grad_(False)(X)
    new = copy_of(net, "all")
    new.logits(X)
    assert torch.equal(new.module[0].weight == 0, net[0].weight_mask == 0)
    assert not torch.equal(new.module[0].weight, net[0].weight)


def test_what_takes_no_new_weight_is_refused_by_name():
    net = nn.Sequential(nn.Linear(6, 6), on(linear(), Frozen()))
    with pytest.raises(UserError, match=r"^1\.weight cannot be randomised: Frozen gives the trained weight whatever"):
        copy_of(net.eval(), 1)
    stubborn = type("Stubborn", (Doubled,), {"right_inverse": lambda self, w: [][0]})
    part = Doubled()
    net = nn.Sequential(nn.Linear(6, 6), on(linear(), part))
    part.__class__ = stubborn
    message = (
        r"^1\.weight cannot be randomised: Stubborn\.right_inverse takes no weight of a new layer \(IndexError.*\)\. "
    )
    with pytest.raises(UserError, match=message + "Make the trained weight a plain parameter"):
        copy_of(net.eval(), 1)
    exploding = nn.Sequential(on(linear(), Exponential()), on(linear(), Symmetric()))
    exploding[1].parametrizations.weight[0].forward = lambda w: w / 0
    with pytest.raises(UserError, match=r"1\.weight cannot be randomised: Symmetric gives numbers that are not finite"):
        reinitialise(exploding, [WeightedLayer("1", ("1",))], 0)
