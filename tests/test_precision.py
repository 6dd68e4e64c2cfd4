"""``precision``: the net in another arithmetic, as a declared part of what is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import command, pictures
from torch import nn

from attrib.methods.baselines import DeepLiftShap, Gradient, IntegratedGradients
from attrib.methods.cam import GradCAM
from attrib.methods.captum import Captum
from attrib.models import Classifier
from attrib.models.precision import Precision, check
from attrib.noise import Noise
from attrib.store.cell import cells
from attrib.types import Batch, UserError


class Net(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.fc, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x)
        return self.fc((z.relu() + z).mean((2, 3))) * self.scale


def model(scale: float = 1.0, **more: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Net(scale), {"cam": "conv"}, input_shape=(3, 8, 8), **more)


def samples(n: int = 3) -> Batch:
    x = Noise([str(i) for i in range(n)]).normal(3, 8, 8)
    return Batch(tuple(map(str, range(n))), x, torch.arange(n))


def by_hand(net: Net, x: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """The net with inputs and weights of its products rounded, and their results too."""
    z = F.conv2d(x.to(half), net.conv.weight.to(half), net.conv.bias.to(half), padding=1)
    pooled = (z.relu() + z).mean((2, 3))
    return (F.linear(pooled, net.fc.weight.to(half), net.fc.bias.to(half)) * net.scale).float()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_products_are_computed_in_half_the_bits_and_all_else_is_as_it_was(name):
    fine = model()
    coarse, batch = fine.with_precision(name), samples()
    logits = coarse.logits(batch.x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, by_hand(fine.module, batch.x, getattr(torch, name)), rtol=1e-2, atol=1e-3)
    assert not torch.equal(logits, fine.logits(batch.x))
    front = coarse.until("cam", batch.x)
    assert front.z.dtype == torch.float32
    torch.testing.assert_close(coarse.after("cam", front.z, front.rest), logits, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(coarse.record(["cam"], batch.x)["cam"], front.z)
    z, back = coarse.vjp("cam", batch.x)
    torch.testing.assert_close(z, front.z)
    assert back(torch.ones_like(z)).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in coarse.module.parameters())


@pytest.mark.parametrize("method", [Gradient(), IntegratedGradients(steps=4), GradCAM(), Captum("Saliency")])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_maps_are_those_of_float32_but_for_rounding(method, name):
    fine, batch = model(), samples()
    expected = method.attribute(fine, batch, {}, Noise(batch.uids))["map"]
    found = method.attribute(fine.with_precision(name), batch, {}, Noise(batch.uids))["map"]
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_small_gradients_do_not_vanish_in_float16():
    """A gradient of about 1e-7 is 0 among float16's numbers; it is computed larger."""
    fine, batch = model(scale=1e-5), samples()
    expected = Gradient().attribute(fine, batch, {}, Noise(batch.uids))["map"]
    assert 0 < expected.abs().max() < 1e-5
    found = Gradient().attribute(fine.with_precision("float16"), batch, {}, Noise(batch.uids))["map"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e5, 1e30])
def test_how_large_a_gradient_is_behind_the_net_does_not_matter_in_float16(size):
    """Gradients of probabilities are tiny where the net is sure; rows of one batch may differ by any factor."""
    fine, x = model(), samples().x
    factor = torch.full((len(x),), size)
    factor[0] = 0

    def objective(logits, rows):
        return logits[:, 0] * factor[rows]

    _, expected = fine.gradient(x, objective)
    _, found = fine.with_precision("float16").gradient(x, objective)
    assert not found[0].any()
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=0.05 * float(expected.abs().max() / size))
    torch.testing.assert_close(
        found / size, fine.with_precision("float16").gradient(x, _first)[1] * (factor / size).view(-1, 1, 1, 1)
    )


def _first(logits, _rows):
    return logits[:, 0]


def test_the_key_says_it_and_decisions_are_those_of_float32():
    fine = model()
    coarse = fine.with_precision("bfloat16")
    assert coarse.key != fine.key
    assert fine.with_precision("float32") is fine
    assert coarse.original is fine
    assert fine.precision == "float32"


def test_methods_that_compute_the_net_in_their_own_way_are_refused():
    coarse, batch = model().with_precision("bfloat16"), samples()
    for method in (DeepLiftShap(samples=1), Captum("DeepLift")):
        with pytest.raises(UserError, match=r"in float32 only; set precision.explain=float32"):
            method.attribute(coarse, batch, {}, Noise(batch.uids))


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="precision must be one of float32, tf32, bfloat16, float16, not 'bf16'"):
        Precision.of("bf16")
    with pytest.raises(UserError, match=r"precision.score must be one of"):
        Precision.of({"score": "half"})
    with pytest.raises(UserError, match="has the fields explain and score, not metric"):
        Precision.of({"metric": "float32"})
    with pytest.raises(UserError, match=r"precision=tf32 is arithmetic of NVIDIA's GPUs, and run.device is cpu"):
        model().with_precision("tf32")
    with pytest.raises(UserError, match=r"precision=bfloat16 contradicts run.dtype=float64"):
        check("bfloat16", torch.device("cpu"), torch.float64)
    assert Precision.of({"explain": "bfloat16"}) == Precision("bfloat16", "float32")
    assert Precision.of(None) == Precision()


class Picky(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive.")
        return super().forward(x)


def test_a_net_that_torch_computes_in_float32_only_is_refused():
    with pytest.raises(UserError, match=r"cannot be computed in float16 on cpu: .* primitive. Set precision=float32"):
        Classifier(Picky()).with_precision("float16").logits(samples().x)
    with pytest.raises(RuntimeError, match=r"size mismatch|expected input"):  # of the net itself
        model().with_precision("bfloat16")(torch.zeros(1, 2, 8, 8))


def test_the_command_computes_both_and_says_what_changes(capfd, tmp_path):
    images = pictures(tmp_path, 3)
    common = (
        "dataset=tiny", "model=small_cnn", "run.progress=false", "run.device=cpu", "method=gradient",
        "metric=[insertion_deletion]", "metric.insertion_deletion.steps=3",
        f"dataset.root={images}", f"run.root={tmp_path / 'work'}",
    )  # fmt: skip
    refused = command(capfd, "precision")(*common)
    assert refused.status == 2
    assert "set precision=bfloat16" in refused.err
    done = command(capfd, "precision")(*common, "precision={explain: float32, score: bfloat16}")
    assert done.status == 0, done.err
    assert "scored in bfloat16" in done.out
    assert "explained in" not in done.out
    (only,) = cells(tmp_path / "work")  # the same maps, scored twice
    assert len(only.metrics()) == 2
    done = command(capfd, "precision")(*common, "precision=bfloat16")
    assert done.status == 0, done.err
    assert "maps_computed=3 maps_present=0" in done.out
    assert "explained in bfloat16, scored in bfloat16" in done.out
    (line,) = (line for line in done.out.splitlines() if line.strip().startswith("rank correlation"))
    assert line.split()[2] == "3"
    assert 0.9 < float(line.split()[3]) < 1
    assert "insertion_deletion: deletion" in done.out
    (seconds,) = (line for line in done.out.splitlines() if line.strip().startswith("seconds per sample"))
    assert seconds.split()[3] == "3"
    assert "[" not in seconds  # the samples of a batch share its time
    assert "[" in line
    precisions = {cell.spec.get("precision", "float32") for cell in cells(tmp_path / "work")}
    assert precisions == {"float32", "bfloat16"}
    table = command(capfd, "table")(str(tmp_path / "work"))
    assert "small_cnn (precision=bfloat16)" in table.out
    assert "insertion_deletion (precision=bfloat16)" in table.out


def test_gradients_of_gradients_are_refused_in_float16():
    """They were far too small: divided in front of the net by what multiplies only those of first order behind it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2))
    model = Classifier(net, input_shape=(3, 2, 2)).with_precision("float16")
    leaf = torch.rand(2, 3, 2, 2, requires_grad=True)
    score = model(leaf)[:, 0].sum()
    with pytest.raises(UserError, match=r"gradients of gradients .* float16; set precision=float32"):
        torch.autograd.grad(score, leaf, create_graph=True)
    assert torch.autograd.grad(score, leaf)[0].isfinite().all()
