"""Nets with drawn weights, and randomised copies of them."""

from __future__ import annotations

import torch

from attrib.models import Classifier, Randomise
from attrib.models.randomise import randomised

X = torch.linspace(-1, 2, 24).reshape(4, 6).sin()


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def copy_of(net, *how, x=X):
    return randomised(Classifier(net, input_shape=tuple(x.shape[1:])), net, Randomise(*how), x)
