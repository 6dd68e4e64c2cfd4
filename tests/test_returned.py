"""What a user's own method returns: whatever is no map is refused in a sentence."""

from __future__ import annotations

import re

import pytest
import torch

from attrib.methods.baselines import Gradient
from attrib.running.returned import checked
from attrib.types import Batch, UserError

X = torch.ones(2, 3, 4, 5)
BATCH = Batch(("a", "b"), X, torch.tensor([0, 1]))
WRONG = {
    "returned a NoneType; it must be a mapping with ['map']": None,
    "returned a list; it must be a mapping": [X[:, 0]],
    "returned [], but": {},
    "map is a ndarray": {"map": X[:, 0].numpy()},
    "map is complex; it must be a dense tensor of real numbers": {"map": torch.complex(X[:, 0], X[:, 0])},
    "map is of the layout torch.sparse_coo": {"map": X[:, 0].to_sparse()},
    "map has shape (4, 5) for inputs (2, 3, 4, 5); it must be (2, 4, 5)": {"map": X[0, 0]},
    "map has shape (2, 5, 4)": {"map": X[:, 0].mT},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_map_is_refused(message):
    with pytest.raises(UserError, match=re.escape(message)):
        checked(Gradient(), BATCH, WRONG[message])


def test_whole_numbers_and_gradients_are_no_matter():
    found = checked(Gradient(), BATCH, {"map": (2 * X[:, 0]).long()})["map"]
    assert (found == 2).all()
    assert (checked(Gradient(), BATCH, {"map": X[:, 0].clone().requires_grad_()})["map"] == 1).all()
