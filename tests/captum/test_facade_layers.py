"""Layer methods and methods by rules give Captum's numbers, shapes and types."""

from __future__ import annotations

import captum.attr
import pytest
import torch

import saliency_fast.captum as facade
from tests.captum.facade_calls import Call
from tests.captum.layer_calls import CALLS
from tests.captum.test_facade_gradients import TOLERANCE, agree, quiet, scale_of


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_layers_as_in_captum(call: Call, dtype: torch.dtype) -> None:
    expected, found = (quiet(call, one, dtype) for one in (captum.attr, facade))
    if call.of.get("return_convergence_delta"):
        agree(found[1], expected[1], TOLERANCE[dtype], scale_of(expected))
        found, expected = found[0], expected[0]
    agree(found, expected, TOLERANCE[dtype], 1e-30)
