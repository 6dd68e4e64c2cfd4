"""How the logits come out of what a net returns, and probabilities out of logits."""

from __future__ import annotations

import collections
import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

from attrib.config.objects import classifier
from attrib.methods.baselines import Gradient
from attrib.methods.cam import GradCAM
from attrib.methods.parts.losses import target_loss
from attrib.metrics import InsertionDeletion
from attrib.models import Classifier, Output, probabilities
from attrib.models.randomise import randomised
from attrib.models.split import GraphSplit
from attrib.models.variant import Randomise
from attrib.noise import Noise
from attrib.running.options import Options
from attrib.types import Batch, UserError

SHAPE = (1, 6, 6)
Named = collections.namedtuple("Named", ["aux", "logits"])


@dataclasses.dataclass
class Returned:
    logits: Tensor
    loss: Tensor | None = None


class Odd(nn.Module):
    def __init__(self, give, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, classes)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(Noise([name]).normal(*parameter.shape)[0])
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.head(self.conv(x).relu().mean((2, 3))))


def same(y: Tensor) -> Tensor:
    return y


def second(raw):
    return raw[1]["scores"]


def item(raw, at: int):
    return raw[at]


def pictures(n: int = 2) -> Batch:
    uids = tuple(f"p{i}" for i in range(n))
    return Batch(uids, Noise(uids, dtype=torch.float64).normal(*SHAPE), torch.arange(n) % 2)


FORMS = [
    (lambda y: {"logits": y, "loss": y.mean()}, "logits"),
    (lambda y: Returned(y), "logits"),
    (lambda y: Named(y * 2, y), "logits"),
    (lambda y: Named(y * 2, y), 1),
    (lambda y: (y, y * 2), 0),
    (lambda y: [y * 2, y], -1),
    (lambda y: (y * 2, {"scores": y}), second),
    (lambda y: y[..., None, None], lambda raw: raw[..., 0, 0]),
    (lambda y: (y * 2, y), functools.partial(item, at=1)),
]


@pytest.mark.parametrize(("give", "output"), FORMS)
@pytest.mark.parametrize("shape", [SHAPE, None])
def test_a_net_that_returns_something_else_has_the_same_numbers(give, output, shape):
    batch, right = pictures(), Classifier(Odd(same), {"cam": "conv"}, dtype=torch.float64)
    net = Odd(give)
    for model in (
        Classifier(net, {"cam": "conv"}, dtype=torch.float64, input_shape=shape, output=output),
        Classifier(net, {"cam": "conv"}, dtype=torch.float64, input_shape=shape, output={"take": output}),
    ):
        assert torch.equal(model.logits(batch.x), right.logits(batch.x))
        z, rest = model.until("cam", batch.x)
        assert isinstance(model._split("cam"), GraphSplit)
        assert torch.equal(model.after("cam", z, rest), right.logits(batch.x))
        for method in (Gradient(), GradCAM()):
            found, wanted = (method.attribute(m, batch, {}, Noise(batch.uids))["map"] for m in (model, right))
            assert torch.equal(found, wanted)
        assert model.key != right.key
    assert type(net) is Odd
    assert not isinstance(net(batch.x.float()), Tensor) or net(batch.x.float()).ndim == 4


@pytest.mark.parametrize(
    ("give", "output", "why"),
    [
        (lambda y: {"logits": y}, None, "a dict with logits .*model.output to the field of the logits: logits"),
        (lambda y: Returned(y), None, "a Returned with logits .*the field of the logits: logits"),
        (lambda y: (y, y), None, "a tuple of 2 .*the index of the logits, 0 to 1"),
        (lambda y: [y], None, "a list of 1 "),
        (lambda y: y[..., None], None, r"\(1, 3, 1\) for 1 rows.*a function"),
        (lambda y: y[:, 0], None, "one number a row.*{read: sigmoid}"),
        (lambda y: y.argmax(1, keepdim=True).expand(-1, 3), None, "torch.int64"),
        (lambda y: {"logits": y}, "logit", r"no field 'logit'.*logits.*fields: logits"),
        (lambda y: y, "logits", "a tensor .* no field 'logits'"),
        (lambda y: (y, y), 2, "a tuple of 2 .* no item 2"),
        (lambda y: y, 0, "a tensor .* no item 0"),
        (lambda y: y, {"read": "sigmoid"}, r"\(3, 2\) for 1 rows"),
        (
            lambda y: y,
            {"read": "tanh"},
            "read must be classes, probabilities, sigmoid, value, region, similarity or next_token",
        ),
        (lambda y: y, {"field": "x"}, "no field 'field'"),
        (lambda y: y, 1.5, "a field, an index or a function"),
    ],
)
def test_what_is_no_logits_is_refused(give, output, why):
    with pytest.raises(UserError, match=why):
        Classifier(Odd(give), input_shape=SHAPE, output=output)
    with pytest.raises(UserError, match=why):
        Classifier(Odd(give), output=output).logits(pictures().x.float())


@pytest.mark.parametrize("give", [same, lambda y: y[:, 0]])
@pytest.mark.parametrize("shape", [SHAPE, None])
def test_one_logit_is_read_as_two_classes(give, shape):
    net, batch = Odd(give, classes=1).double(), pictures(4)
    model = Classifier(net, {"bottleneck": "conv"}, dtype=torch.float64, input_shape=shape, output={"read": "sigmoid"})
    x = batch.x.clone().requires_grad_()
    s = net(x).reshape(-1)
    p = torch.stack((1 - s.sigmoid(), s.sigmoid()), 1).detach()
    logits = model.logits(batch.x)
    torch.testing.assert_close(probabilities(logits), p)
    torch.testing.assert_close(target_loss(logits, batch.target), -p[range(4), batch.target].log())
    (grad,) = torch.autograd.grad((s * (batch.target - 0.5)).sum(), x)
    found = Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"]
    torch.testing.assert_close(found, grad.sum(1))
    curves = InsertionDeletion().score(model, batch, found, Noise(batch.uids, dtype=torch.float64))
    whole = p[range(4), batch.target]
    torch.testing.assert_close(curves["deletion_curve"][:, 0].double(), whole)
    torch.testing.assert_close(curves["insertion_curve"][:, -1].double(), whole)
    assert (curves["insertion"] - curves["deletion"]).abs().min() > 1e-6


def test_several_labels_are_sigmoids():
    logits = Noise(["l"]).normal(5, 3)[0]
    torch.testing.assert_close(probabilities(logits, several=True), 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(probabilities(logits), logits.exp() / logits.exp().sum(1, keepdim=True))


def test_keys_tell_outputs_apart():
    def key(output) -> str:
        return Classifier(Odd(same), output=output).key

    plain = key(None)
    assert plain == key(Output()) == key({"read": "classes"})
    others = ["logits", "aux", 0, 1, {"read": "sigmoid"}, second, item, lambda raw: raw[0], lambda raw: raw[1]]
    others += [functools.partial(item, at=1), functools.partial(item, at=2), Output("logits", "sigmoid")]
    assert len({plain, *map(key, others)}) == 1 + len(others)
    assert key(second) == key(second)


def test_a_randomised_copy_reads_its_output_alike():
    net = Odd(lambda y: {"logits": y})
    model = Classifier(net, dtype=torch.float64, output="logits")
    copy = randomised(model, net, Randomise("all"), pictures().x)
    assert copy.logits(pictures().x).shape == (2, 3)


def test_a_traced_graph_cannot_be_read_differently():
    graph = torch.fx.symbolic_trace(Odd(lambda y: (y, y)))
    with pytest.raises(UserError, match=r"torch\.fx graph"):
        Classifier(graph, output=0)


def test_from_a_configuration():
    node = {
        "_target_": "test_output.Odd",
        "give": {"_target_": "hydra.utils.get_method", "path": "test_output.same"},
        "classes": 1,
        "input": {"size": 6, "mean": [0.0], "std": [1.0]},
    }
    with pytest.raises(UserError, match="one number a row"):
        classifier(node, Options(device="cpu"))
    made = classifier({**node, "output": {"read": "sigmoid"}}, Options(device="cpu"))
    assert made.logits(pictures().x.float()).shape == (2, 2)
    take = {"_target_": "hydra.utils.get_method", "path": "test_output.same"}
    for output in (take, {"take": take}):
        made = classifier({**node, "classes": 3, "output": output}, Options(device="cpu"))
        assert made.output.take is same or made.output.take.__name__ == "same"
