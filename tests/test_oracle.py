"""The map that is right, and the one that is wrong everywhere, rank first and last under every metric of such things.

What is right is known exactly: the nets are weighted sums of what lies in the box of a digit, in the time of an
event, or of words. Every preset in configs/metric has its place here, for every modality that it says it judges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from sentences import VOCABULARY, BagOfWords, sentence, texts
from tiny import ROOT
from torch import Tensor, nn

from attrib.config.objects import build
from attrib.datasets import DigitsCanvas, ImageTransform, Tones, WaveTransform
from attrib.methods.baselines import InputXGradient
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

PRESETS = ROOT / "configs" / "metric"

# Those that claim to measure localisation or faithfulness, with what makes them cheap here.
CLAIMS: dict[str, dict[str, Any]] = {
    "degradation": {},
    "ehr": {},
    "ehr_unweighted": {},
    "eraser": {},
    "infidelity": {"samples": 100},
    "insertion_deletion": {"steps": 30},
    "insertion_deletion_windows": {},
    # Squares: superpixels that follow the strokes of a digit are so few that noise may beat the oracle by their ties.
    "irof": {"segments": 50, "compactness": 1000.0},
    "localisation": {},
    "road": {"shares": (0.1, 0.3, 0.5, 0.7, 0.9)},
    "sensitivity_n": {"points": 5, "samples": 20},
}
# The others, by name and modality, and why.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("adversarial", "*"): "measures how far maps follow an attack: a map that never changes agrees best",
    ("lipschitz", "*"): "measures how stable maps are: a map that never changes is the best",
    ("insertion_deletion_windows", "image"): "its window of 64 pixels is more than the canvas",
    ("quantus*", "*"): "the adapter's own tests take direction and order of each of quantus' metrics",
}


def preset(name: str, **changed: Any) -> Any:
    (node,) = yaml.safe_load((PRESETS / f"{name}.yaml").read_text()).values()
    return build({**node, **changed}, name)


def reason(name: str, modality: str) -> str | None:
    found = (why for (n, m), why in EXCEPTIONS.items() if fnmatch(name, n) and fnmatch(modality, m))
    return next(found, None)


CASES = [(name, kind) for name in CLAIMS for kind in preset(name).MODALITIES if reason(name, kind) is None]


class Judged(NamedTuple):
    """A sample: a net whose evidence is known, the sample once for every map, the maps."""

    model: Classifier
    batch: Batch
    maps: Tensor


class Evidence(nn.Module):
    """Class 1 is seen by how much of ``wanted`` there is; all of it is 1, and 80 % are needed."""

    def __init__(self, wanted: Tensor, gain: float = 8.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain * wanted / wanted.square().sum())
        self.needed = 0.8 * gain

    def forward(self, x: Tensor) -> Tensor:
        logit = (x * self.weight).flatten(1).sum(1) - self.needed
        return torch.stack((-logit, logit), 1)


NAMED = ("oracle", "noise 0.5", "noise 0.7", "noise 0.9", "moved", "random", "opposite")


def candidates(oracle: Tensor, uid: str, outside: Tensor, there: Tensor) -> dict[str, Tensor]:
    """All of equal length, as some metrics heed the unit; zero where nothing is ``there``."""
    stream, strength = Noise([uid], 5, dtype=torch.float64), oracle.norm() / there.sum().sqrt()

    def noisy(share: float) -> Tensor:
        return (1 - share) * oracle + share * strength * stream.normal(*oracle.shape)[0]

    found = {"oracle": oracle, **{f"noise {share}": noisy(share) for share in (0.5, 0.7, 0.9)}}
    found["moved"] = oracle.roll(oracle.shape[-1] // 6, -1)
    found["random"] = noisy(1.0)
    found["opposite"] = torch.where(outside, oracle.sum() / there.sum(), -oracle)
    return {name: map * there * (oracle.norm() / (map * there).norm()) for name, map in found.items()}


def judged(net: nn.Module, one: Batch, oracle: Tensor, outside: Tensor, there: Tensor) -> Judged:
    maps = candidates(oracle, one.uids[0], outside, there)
    assert tuple(maps) == NAMED
    roles = {"embedding": "embedding"} if one.words is not None else {}
    return Judged(Classifier(net, roles), one[[0] * len(maps)], torch.stack(list(maps.values())))


def with_evidence_in_the_region(batch: Batch) -> list[Judged]:
    """A net for every sample, which wants what lies in the region of interest; the best map is input times gradient."""
    found = []
    for i in range(len(batch)):
        one = dataclasses.replace(batch[[i]], target=torch.ones(1, dtype=torch.long))
        net = Evidence(one.x[0] * one.roi[0])
        oracle = InputXGradient().attribute(Classifier(net), one, {}, Noise(one.uids))["map"][0].double()
        found.append(judged(net, one, oracle, ~one.roi[0], torch.ones_like(oracle)))
    return found


def images() -> list[Judged]:
    data = DigitsCanvas(ImageTransform(48, (0.5,), (0.5,), resize="none"), size=48, digit=20, fragment=6)
    return with_evidence_in_the_region(data.batch(data.uids[:3]))


def waves() -> list[Judged]:
    data = Tones(WaveTransform(8000, 4096, 0.0, 0.1))
    return with_evidence_in_the_region(data.batch(data.uids[:3]))


def snippets() -> list[Judged]:
    """A net that adds up what its words are worth, of which there are good and bad ones."""
    r, net = np.random.RandomState(0), BagOfWords()
    worth = torch.tensor(r.randn(VOCABULARY) * 0.3 + 0.05)
    net.embedding.weight.data = worth[:, None].expand(-1, 6).float() / 6
    net.fc.weight.data = torch.tensor([[-1.0], [1.0]]).expand(-1, 6)
    net.fc.bias.data.zero_()
    found = []
    for i in range(6):
        words = [[int(t) for t in r.randint(4, VOCABULARY, r.randint(1, 3))] for _ in range(25)]
        one = texts([sentence(*words, special=True)], torch.ones(1, dtype=torch.long))
        one = dataclasses.replace(one, uids=(f"text {i}",))
        is_word = (one.words[0] >= 0).double()
        found.append(judged(net, one, worth[one.x[0]] * is_word, torch.zeros_like(is_word, dtype=torch.bool), is_word))
    return found


MAKERS: dict[str, Callable[[], list[Judged]]] = {"image": images, "audio": waves, "text": snippets}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Judged]]:
    return {modality: make() for modality, make in MAKERS.items()}


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_right_is_first_and_wrong_is_last(name, modality, samples):
    metric = preset(name, **CLAIMS[name])
    scores = [metric.score(model, batch, maps, Noise(batch.uids)) for model, batch, maps in samples[modality]]
    for column, direction in metric.COLUMNS.items():
        good = torch.stack([found[column] for found in scores]) * {"higher": 1, "lower": -1}[direction]
        assert good.shape == (len(scores), len(NAMED))
        mean = dict(zip(NAMED, good.mean(0).tolist(), strict=True))
        best, worst = mean["oracle"], mean["opposite"]
        assert all(best >= other - 1e-9 for other in mean.values()), (column, mean)
        assert all(worst <= other + 1e-9 for other in mean.values()), (column, mean)
        assert best > mean["random"] + 1e-3, (column, mean)
        assert (good[:, 0] > good[:, -1] + 1e-3).all(), (column, good)


def test_every_preset_says_what_it_claims():
    """A new metric goes into CLAIMS, or into EXCEPTIONS with the reason; what is gone goes from both."""
    for name in (path.stem for path in PRESETS.glob("*.yaml")):
        claims, excepted = name in CLAIMS, reason(name, "*") is not None
        assert claims != excepted, f"{name}: put it into CLAIMS or into EXCEPTIONS of tests/test_oracle.py"
        assert excepted or any(n == name for n, _ in CASES), f"{name} claims something and is not tested"
    for name, modality in EXCEPTIONS:
        assert any(fnmatch(path.stem, name) for path in PRESETS.glob("*.yaml")), f"{name} is gone"
        assert modality == "*" or modality in preset(name).MODALITIES
    assert {modality for _, modality in CASES} == MAKERS.keys()


def test_of_every_net_only_the_evidence_matters(samples):
    """Anything outside the region may change; without the region nothing is recognised."""
    for model, batch, _ in (*samples["image"], *samples["audio"]):
        one = batch[:1]
        other = torch.where(one.roi.unsqueeze(1), one.x, one.x.flip(-1) * 3 + 1)
        torch.testing.assert_close(model.logits(other), model.logits(one.x))
        assert model.logits(one.x).softmax(1)[0, 1] > 0.9  # recognised
        gone = torch.where(one.roi.unsqueeze(1), 0.0, one.x)
        assert model.logits(gone).softmax(1)[0, 1] < 0.01
