"""Nets with the same weights that compute different things have different keys, and nets that are the same have one."""

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny import command, pictures
from torch import nn

import attrib
from attrib.methods.iba import IBA
from attrib.models.structure import own_code, structure
from attrib.running import plan


class Scaled(nn.Module):
    def __init__(self, factor=1.0, act=F.relu):
        super().__init__()
        self.conv, self.head, self.factor, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2), factor, act

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)) * self.factor)


class Doubled(Scaled):
    def forward(self, x):
        return 2 * super().forward(x)


def sequence(last=None, **conv):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **conv), last or nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def hooked():
    net = Scaled()
    net.conv.register_forward_hook(lambda module, args, output: output + 1)
    return net


def replaced():
    net = Scaled()
    net.forward = lambda x: net.head(net.conv(x).mean((2, 3)))
    return net


def encoder(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


PAIRS = {
    "a module": (sequence(), sequence(nn.Softplus())),
    "a module's field": (sequence(nn.Softplus()), sequence(nn.Softplus(beta=0.2))),
    "stride": (sequence(), sequence(stride=2)),
    "a field that is not shown": (encoder(), encoder(norm_first=True)),
    "an own field": (Scaled(), Scaled(0.5)),
    "a function": (Scaled(), Scaled(act=torch.tanh)),
    "forward": (Scaled(), Doubled()),
    "a hook": (Scaled(), hooked()),
    "forward of one object": (Scaled(), replaced()),
    "a traced graph": (torch.fx.symbolic_trace(Scaled()), torch.fx.symbolic_trace(Doubled())),
    "the order": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_what_a_net_computes_is_part_of_its_structure(pair):
    one, other = pair
    assert structure(one) != structure(other)
    assert structure(one) == structure(copy.deepcopy(one)) == structure(one.eval())


def test_a_work_directory_gives_no_other_nets_fit(tmp_path):
    torch.manual_seed(0)
    x, fit = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 8, 8)
    head = nn.Linear(4, 3)
    one, other = (nn.Sequential(*sequence(act), head) for act in (nn.ReLU(), nn.Softplus(beta=0.2)))
    other.load_state_dict(one.state_dict())

    def bits(net, **where):
        return attrib.explain(net, x, 1, "iba", fit=fit, layers="1", overrides=["method.steps=2"], **where)

    first = bits(one, root=tmp_path)
    assert torch.equal(bits(one, root=tmp_path).map, first.map)
    found, alone = bits(other, root=tmp_path), bits(other)
    torch.testing.assert_close(found.map, alone.map)
    assert found.cell.model.key != first.cell.model.key


# ---- one's own code in runs --------------------------------------------------------------------------

NET = "from torch import nn\n\nclass Mine(nn.Module):\n    def forward(self, x):\n        return {}\n"


def mine(folder, body):
    path = folder / f"mine_{len(list(folder.iterdir()))}.py"
    path.write_text(NET.format(body))
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine"] = module
    spec.loader.exec_module(module)
    return module.Mine


def test_own_code_is_what_is_written_without_comments(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    first = own_code(mine(tmp_path, "x + 1"))
    assert first is not None
    assert own_code(mine(tmp_path, "x + 1  # one more")) == first == own_code(mine(tmp_path, "x+1"), nn.Linear)
    assert own_code(mine(tmp_path, "x + 2")) != first
    # The last is made of a class of Python's own, whose code changes with Python.
    assert own_code(nn.Linear, attrib.models.LeNet, torchvision.models.ResNet, IBA) is None


def test_a_run_says_when_the_code_of_a_net_has_changed(tmp_path, capfd, caplog, monkeypatch):
    run = command(capfd)
    line = ["dataset=tiny", f"dataset.root={pictures(tmp_path, 2)}", "model=small_cnn", "method=gradient", "metric=[]"]
    line += [f"run.root={tmp_path / 'w'}", "run.progress=false"]
    assert run(*line).status == 0
    same = run(*line)
    assert "maps_present=2" in same.out
    assert "the code of" not in caplog.text
    monkeypatch.setattr(plan, "own_code", lambda *classes: "another")
    changed = run(*line)
    assert changed.status == 0
    assert "the code of the model is another one than when" in caplog.text
    assert "maps_present=2" in changed.out


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


def test_what_a_class_inherits_and_a_function_closes_over_counts():
    def of(forward):
        base = type("Middle", (Base,), {"forward": forward})
        return type("Last", (base,), {})()

    def scaled(by):
        net = Base()
        net.forward = lambda x: net.head(x) * by
        return net

    assert structure(of(lambda self, x: self.head(x).tanh())) != structure(of(lambda self, x: self.head(x).sin()))
    assert structure(scaled(2)) != structure(scaled(3))
    assert structure(scaled(2)) == structure(scaled(2))


def test_a_layer_may_be_called_spec():
    class Heard(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.spec, self.head = nn.Flatten(), nn.Linear(12, 3)

    assert attrib.explain(Heard(), torch.rand(2, 3, 2, 2), 1, "gradient").map.shape == (2, 2, 2)
