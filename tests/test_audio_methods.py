"""Methods on sounds: a sound is an image of a single row, and every number is the same."""

from __future__ import annotations

import math

import pytest
import torch
from audio_nets import L, RowNet, as_rows, audio_classifier, sounds
from torch import Tensor, nn

from attrib.methods.baselines import Gradient, InputXGradient, IntegratedGradients, Occlusion, Random, SmoothGrad
from attrib.methods.iba import IBA
from attrib.methods.parts.layout import Layout, SoundLayout, TextLayout, places
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

METHODS = [
    Random(), Gradient(), Gradient("abs_max"), InputXGradient(), IntegratedGradients(steps=5),
    IntegratedGradients(steps=5, baseline=0.3), SmoothGrad(samples=3, reduce="abs_sum"),
    IBA(steps=3, batch=2), IBA(steps=3, batch=2, sigma=None, relu=True),
]  # fmt: skip


def explain(method, model, batch: Batch) -> dict[str, Tensor]:
    state = {}
    if method.fit is not None:
        z = model.until("bottleneck", batch.x).z
        state = {"mean": z.mean(0), "std": z.std(0), "active": torch.ones_like(z[0])}
    return dict(method.attribute(model, batch, state, Noise(batch.uids, 3, dtype=torch.float64)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_same_as_on_images_of_one_row(method):
    batch = sounds(4)
    found = explain(method, audio_classifier()(), batch)
    expected = explain(method, audio_classifier(net=RowNet)(), as_rows(batch))
    assert found["map"].shape == (4, L)
    for name in found:
        wanted = expected[name].view(found[name].shape)
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_integrated_gradients_are_complete():
    found = explain(IntegratedGradients(steps=200), audio_classifier()(), sounds(4))
    assert found["delta"].abs().max() < 1e-2 * found["map"].abs().sum(1).max()


def test_occlusion_covers_stretches_of_time():
    """By hand: windows at 0, 3, 6 ..., the mean over those on a sample."""
    model, batch = audio_classifier()(), sounds(3)
    found = explain(Occlusion(window=6, stride=3), model, batch)["map"]
    logit = lambda x: model.logits(x).gather(1, batch.target[:, None])[:, 0]  # noqa: E731
    total, count = torch.zeros(3, L, dtype=torch.float64), torch.zeros(L)
    for start in range(0, L - 3, 3):
        x = batch.x.clone()
        x[:, :, start : start + 6] = 0
        total[:, start : start + 6] += (logit(batch.x) - logit(x))[:, None]
        count[start : start + 6] += 1
    torch.testing.assert_close(found.double(), total / count, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"Occlusion\.window is 30, must not be larger than the input"):
        explain(Occlusion(window=30, stride=3), model, batch)


# ---- layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "name"), [((6, 12), "channels_first"), ((12, 6), "tokens"), ((6,), "auto")])
def test_places_in_time(shape, name):
    z = torch.arange(2 * math.prod(shape)).double().sin().view(2, *shape)
    layout = SoundLayout.of(z, L, name)
    assert isinstance(layout, SoundLayout)
    bits = layout.bits(z.abs())
    channels = 2 if name == "tokens" else 1
    wanted = z.abs().sum(channels) if len(shape) == 2 else z.abs().sum(1, keepdim=True)
    torch.testing.assert_close(bits * math.log(2), wanted)
    spread = layout.spread(torch.ones_like(bits))
    torch.testing.assert_close(spread, torch.full((2, L), bits.shape[1] / L, dtype=torch.float64))
    assert layout.smooth(z, 1.0).shape == z.shape


def test_smoothing_is_over_time_alone():
    z = torch.zeros(1, 3, 9, dtype=torch.float64)
    z[0, 1, 4] = 1
    smooth = SoundLayout.of(z, 36, "channels_first").smooth(z, 1.0)
    assert smooth[0, [0, 2]].abs().max() == 0
    torch.testing.assert_close(smooth.sum(), torch.tensor(1.0, dtype=torch.float64))
    wanted = torch.exp(-0.5 * torch.arange(-2, 3).double() ** 2)
    torch.testing.assert_close(smooth[0, 1, 2:7], wanted / wanted.sum())
    row = Layout.of(z.unsqueeze(2), (1, 36), "channels_first").smooth(z.unsqueeze(2), 1.0)
    assert torch.equal(smooth, row.squeeze(2))
    tokens = SoundLayout.of(z.mT, 36, "tokens").smooth(z.mT, 1.0)
    assert torch.equal(tokens.mT, smooth)


def test_a_layer_of_another_shape_is_refused():
    for shape, name in (((2, 3, 4, 5), "auto"), ((2, 3), "channels_first"), ((2, 3, 4), "vector")):
        with pytest.raises(UserError, match="on a sound"):
            SoundLayout.of(torch.zeros(shape), L, name)


class Moments(nn.Module):
    """A layer of a place per moment, channels first or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.turn, self.head, self.last = nn.Conv1d(2, 9, 4, 4), nn.Identity(), nn.Linear(9, 3), last

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.head(self.turn(z.mT).mean(1) if self.last else self.turn(z).mean(2))


@pytest.mark.parametrize("last", [False, True])
def test_which_axis_is_time_is_found_out(last):
    torch.manual_seed(0)
    model = Classifier(Moments(last).double(), {"layer": "turn"}, dtype=torch.float64)
    batch = sounds(2)
    z = model.until("layer", batch.x).z
    found = places(model, "layer", batch, z)
    assert isinstance(found, SoundLayout)
    assert found.last == last
    assert found.bits(z.abs()).shape == (2, L // 4)


def test_texts_and_images_keep_their_layouts():
    model = Classifier(nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.Flatten(), nn.Linear(80, 2)), {"layer": "0"})
    image = Batch(("a",), torch.zeros(1, 3, 8, 8), torch.zeros(1))
    text = Batch(("a",), torch.zeros(1, 4), torch.zeros(1), lengths=torch.tensor([4]))
    assert isinstance(places(model, "layer", image, torch.zeros(1, 5, 4, 4)), Layout)
    assert isinstance(places(model, "layer", text, torch.zeros(1, 4, 5)), TextLayout)
