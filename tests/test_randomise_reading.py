"""Randomised layers, however the net reads its parameters: each gets new values, or the net is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from randomised_nets import X, copy_of, seeded
from torch import nn
from torch.func import functional_call, stack_module_state

from attrib.models import Classifier
from attrib.models.randomise import weighted_layers
from attrib.types import UserError


class Reads(nn.Module):
    """x W.T by one of ``READINGS``; W is its only parameter."""

    def __init__(self, reading):
        super().__init__()
        self.weight, self.reading = nn.Parameter(torch.randn(6, 6)), reading

    def forward(self, x):
        return READINGS[self.reading](x, self.weight)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return x @ w.mT

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def product(x, w):
    return torch.matmul(x, w.t())


with warnings.catch_warnings(action="ignore"):  # torch says that it is a thing of the past
    scripted = torch.jit.script(product)


READINGS = {
    "@": lambda x, w: (w @ x.mT).mT,
    "F.linear": nn.functional.linear,
    ".T": lambda x, w: x @ w.T,
    ".mT": lambda x, w: x @ w.mT,
    ".H": lambda x, w: x @ w.H,
    ".mT.mT": lambda x, w: nn.functional.linear(x, w.mT.mT),
    ".data": lambda x, w: x @ w.data.T,
    ".real": lambda x, w: x @ w.real.mT,
    ".t()": lambda x, w: x @ w.t(),
    "transpose": lambda x, w: x @ w.transpose(0, 1),
    "detach": lambda x, w: x @ w.detach().T,
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "[i]": lambda x, w: torch.stack([x @ w[i] for i in range(len(w))], 1),
    "iteration": lambda x, w: torch.stack([x @ row for row in w], 1),
    "a view of all": lambda x, w: x @ w.view(-1).reshape(6, 6).T,
    "vmap": lambda x, w: torch.vmap(lambda row: x @ row, out_dims=1)(w),
    "torch.func": lambda x, w: torch.func.vjp(lambda w: x @ w.T, w)[0],
    "torch.jit.script": scripted,
    "autograd.Function": Product.apply,
    "torch.ops": lambda x, w: torch.ops.aten.mm(x, torch.ops.aten.t.default(w)),
    "item": lambda x, w: x @ torch.tensor([[w[i, j].item() for i in range(6)] for j in range(6)], dtype=x.dtype),
    "tolist": lambda x, w: x @ torch.tensor(w.tolist(), dtype=x.dtype).T,
    "numpy": lambda x, w: x @ torch.tensor(w.detach().numpy().copy()).T,
    "autocast": lambda x, w: nn.functional.linear(x.bfloat16(), w.bfloat16()).float(),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_parameter_is_randomised_however_it_is_read(reading):
    net = seeded(lambda: nn.Sequential(Reads(reading), nn.ReLU(), Reads(reading), nn.Linear(6, 3)))
    new = copy_of(net, "all")
    assert new.variant.layers == ("3", "2", "0")
    assert not any(torch.equal(value, net.state_dict()[name]) for name, value in new.module.state_dict().items())
    one = copy_of(net, 2).module.state_dict()
    assert [name for name in one if torch.equal(one[name], net.state_dict()[name])] == ["0.weight"]
    alone = nn.Sequential(Reads(reading), nn.ReLU(), Reads(reading)).eval()
    assert not torch.allclose(copy_of(alone, "all").logits(X), Classifier(alone).logits(X), rtol=0.1)


def test_what_does_not_read_a_parameters_values_does_not_count():
    class Asks(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.aside = nn.Linear(6, 6)

        def forward(self, x):
            w = self.aside.weight
            return super().forward(x.to(w.dtype).to(w.data.device)) * (w.shape[0] + w.T.ndim + w.numel() > 0)

    assert [layer.path for layer in weighted_layers(Asks().eval(), X)] == [""]


def test_functional_calls_and_ensembles():
    class Functional(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.inner, self.twice = nn.Linear(6, 6), twice

        def forward(self, x):
            return functional_call(self.inner, {k: v * 2 if self.twice else v for k, v in self.named_items()}, (x,))

        def named_items(self):
            return self.inner.named_parameters()

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            members = [nn.Linear(6, 3) for _ in range(4)]
            self.stacked = nn.ParameterDict(stack_module_state(members)[0])
            self.member = [copy.deepcopy(members[0]).to("meta")]

        def forward(self, x):
            each = torch.vmap(lambda values: functional_call(self.member[0], values, (x,)))(dict(self.stacked))
            return each.mean(0)

    net = seeded(lambda: nn.Sequential(Functional(False), Functional(True), Ensemble()))
    new = copy_of(net, "all")
    assert new.variant.layers == ("2.stacked", "1.inner", "0.inner")
    assert not any(torch.equal(value, net.state_dict()[name]) for name, value in new.module.state_dict().items())


class Tied(nn.Module):
    def __init__(self, transposed, bias):
        super().__init__()
        self.first, self.last, self.transposed = nn.Linear(6, 6), nn.Linear(6, 6, bias=bias), transposed
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.first(x).relu()
        return x @ self.last.weight.T if self.transposed else self.last(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tied_weights_stay_tied(transposed, bias):
    net = seeded(lambda: Tied(transposed, bias))
    new = copy_of(net, "all").module
    assert new.last.weight is new.first.weight
    used = new.first.state_dict() if transposed else new.state_dict()
    before = net.first.state_dict() if transposed else net.state_dict()
    assert not any(torch.equal(used[name], before[name]) for name in used)


def test_views_that_were_made_before():
    class Ahead(nn.Linear):
        def __init__(self):
            super().__init__(6, 6, bias=False)
            self.views = [self.weight.detach().T]

        def forward(self, x):
            return x @ self.views[0]

    net = seeded(lambda: nn.Sequential(nn.Linear(6, 6), Ahead()))
    with pytest.raises(UserError, match=r"^1\.views of Sequential is a view of the parameter 1\.weight: in a .* copy"):
        copy_of(net, 1)
    assert [layer.path for layer in weighted_layers(net, X)] == ["1", "0"]
    # Parameters that are parts of one vector are told apart, even if one is not used.
    flat = seeded(lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)))
    flat.unused = nn.Module()
    flat.unused.weight, flat.forward = nn.Parameter(torch.ones(6, 6)), lambda x: flat[1](x @ flat[0].weight.T)
    nn.utils.vector_to_parameters(torch.arange(108.0), flat.parameters())
    assert [layer.path for layer in weighted_layers(flat, X)] == ["1", "0"]


def test_what_a_net_keeps_of_its_parameters_in_eval_mode_is_forgotten():
    class Keeps(nn.Linear):
        kept = None

        def train(self, mode=True):
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, x):
            self.kept = self.weight * 2 if self.kept is None else self.kept
            return x @ self.kept.T

    net = seeded(lambda: nn.Sequential(Keeps(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))).requires_grad_(False)
    net(X)
    new = copy_of(net, "all")
    assert new.variant.layers == ("2", "0")
    new.logits(X)
    assert torch.equal(new.module[0].kept, new.module[0].weight * 2)
    assert not torch.equal(new.module[0].weight, net[0].weight)


def test_hidden_parameters_are_refused_by_name():
    class Hides(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.fc, self.hidden = nn.Linear(6, 3), hidden

        def forward(self, x):
            first = self.hidden[0] if isinstance(self.hidden, list) else self.hidden["one"]
            return self.fc(first(x) if isinstance(first, nn.Module) else x @ first.T)

    for hidden in ([nn.Parameter(torch.eye(6))], [nn.Linear(6, 6)], {"one": nn.Parameter(torch.eye(6))}):
        net = nn.Sequential(Hides(hidden)).eval()
        with pytest.raises(UserError, match=r"^0\.hidden of Sequential is read .* nn\.ParameterList"):
            weighted_layers(net, X)

    # One that is made in the pass, or that is a buffer, is none.
    class Makes(Hides):
        def forward(self, x):
            return self.fc(nn.functional.linear(x, nn.Parameter(self.hidden[0] * 2)))

    net = Makes([torch.eye(6)])
    net.register_buffer("of_a_buffer", nn.Parameter(torch.ones(6)))
    net.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] * net.of_a_buffer,))
    assert [layer.path for layer in weighted_layers(net.eval(), X)] == ["fc"]


def test_a_net_without_parameters_is_refused():
    with pytest.raises(UserError, match="Tanh reads no parameters in a forward pass: there is nothing to randomise"):
        copy_of(nn.Tanh(), "all")


def test_a_wrapped_net():
    net = nn.DataParallel(seeded(lambda: nn.Sequential(nn.Linear(6, 3))))
    assert not torch.equal(copy_of(net, "all").module[0].weight, net.module[0].weight)


def test_nets_through_which_no_mode_of_torch_sees(monkeypatch):
    """As flex_attention is. What the functions show counts then; what they do not show is refused, not kept."""

    def refuses(self, *args, **kwargs):
        raise NotImplementedError("There was no rule registered for HigherOrderOperator")

    monkeypatch.setattr("attrib.models.randomise._Reads.__torch_dispatch__", refuses)
    net = seeded(lambda: nn.Sequential(Reads("F.linear"), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    net[1].unused = nn.Linear(6, 6)
    assert [layer.path for layer in weighted_layers(net, X)] == ["2", "0"]
    with pytest.raises(UserError, match=r"^1: its parameters are read in a way that cannot be followed"):
        weighted_layers(seeded(lambda: nn.Sequential(nn.Linear(6, 6), Reads(".T"), nn.Linear(6, 3))), X)
