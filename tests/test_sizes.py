"""``run.rows=auto``: as many rows as suit the net's layers and the device."""

from __future__ import annotations

import pytest
import torch
from nets import small_cnn
from torch import nn

from attrib.models import Classifier
from attrib.models.sizes import CACHED, FEWEST, MOST, START, fitting_rows, gpu_rows
from attrib.running.options import Options
from attrib.types import UserError


def wide(channels: int) -> nn.Module:
    """Its largest output takes 4 * channels * 64 * 64 bytes a row; its weights take more."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 20_000),
        nn.Linear(20_000, 2),
    )


@pytest.mark.parametrize(("channels", "expected"), [(1, START), (128, CACHED // (4 * 128 * 64 * 64)), (1024, FEWEST)])
def test_on_a_cpu_the_largest_output_decides(channels, expected):
    assert fitting_rows(wide(channels), torch.ones(1, 1, 64, 64)) == expected


def test_on_a_gpu_the_free_memory_decides():
    assert [gpu_rows(2**22, free) for free in (0, 2**31, 2**33, 2**50, None)] == [START, 64, 256, MOST, START]


def test_it_is_decided_once_and_a_number_stays_what_it_is():
    x = torch.randn(2, 1, 64, 64)
    assert Classifier(wide(1024), rows="auto", input_shape=(1, 64, 64)).rows == FEWEST
    later = Classifier(wide(1024), rows="auto")
    assert later.rows == START
    later.logits(x)
    assert later.rows == FEWEST
    later.rows = 3  # memory ran out
    later.logits(x)
    assert later.rows == 3
    given = Classifier(wide(1024), rows=40, input_shape=(1, 64, 64))
    given.logits(x)
    assert given.rows == 40
    with pytest.raises(UserError, match=r"run\.rows must be at least 1"):
        Classifier(small_cnn(), rows=0)
    assert Options().rows == "auto"
