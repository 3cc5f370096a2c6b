"""`equal` sees every difference, and says where the first one is."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.equality import equal

NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [NAN, complex(NAN, -0.0), torch.tensor([NAN, -0.0]), np.array([NAN]), np.float32(NAN), "text", b"", None, ()],
)
def test_a_value_equals_itself(value: Any) -> None:
    assert equal({"a": [value]}, {"a": [value]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (0j, -0j),
        ([1], (1,)),
        ([1], [1, 2]),
        ({"x": 1}, OrderedDict(x=1)),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
        (torch.eye(3), torch.eye(3).t()),
        (torch.eye(3), torch.eye(3).to_sparse()),
        (torch.eye(3).to_sparse(), torch.zeros(3, 3).to_sparse()),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (np.zeros((2, 3)), np.zeros((2, 3), order="F")),
        (np.float64(1), np.float32(1)),
        (np.float64(0.0), np.float64(-0.0)),
    ],
    ids=str,
)
def test_a_difference_is_told_with_its_place(one: Any, other: Any) -> None:
    for pair in ((one, other), (other, one)):
        found = equal({"a": [0, pair[0]]}, {"a": [0, pair[1]]})
        assert not found
        assert repr(found).startswith("['a'][1]")
