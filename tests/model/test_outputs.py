"""Models that return objects of their own: rows are taken of whatever holds the logits."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from tests.naive import relative_l2


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    loss: Tensor
    states: tuple[Tensor, ...] = ()


class Mapped(dict[str, Any]):
    """A dict of its own, as transformers' outputs are."""


class EagerExecutor:
    def __init__(self, logits: Tensor, loss: Tensor, states: Any) -> None:
        self.logits, self.loss, self.states = logits, loss, states


class Slotted:
    __slots__ = ("logits", "loss")

    def __init__(self, logits: Tensor, loss: Tensor, states: Any) -> None:
        self.logits, self.loss = logits, loss


Named = namedtuple("Named", "loss logits states")
FORMS = {
    "dict": lambda logits, loss, states: {"loss": loss, "logits": logits, "states": states},
    "dict subclass": lambda logits, loss, states: Mapped(states=states, logits=logits, loss=loss),
    "dataclass": Frozen,
    "namedtuple": lambda logits, loss, states: Named(loss, logits, states),
    "namespace": lambda logits, loss, states: SimpleNamespace(
        states=states, logits=logits, loss=loss
    ),
    "object": EagerExecutor,
    "slots": Slotted,
}


class Net(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.form = nn.Conv2d(2, 4, 3), nn.Linear(4, 3), form
        self.double()

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.conv(x))
        logits = self.head(y.mean((2, 3)))
        return logits if self.form is None else self.form(logits, logits.mean(), (y,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["integrated_gradients", "deeplift", "occlusion", "grad_cam"])
def test_answers_are_those_of_the_logits(form: str, method: str) -> None:
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    expected = sf.explain(Net(None), x, target=1, method=method).values
    with sf.Engine(Net(FORMS[form]), method) as engine:
        assert relative_l2(engine(x, 1).values, expected) < 1e-10
        asked = [{"inputs": one, "target": 1} for one in x.split(1)]
        many = torch.cat([one.values for one in engine.explain_many(asked)])
    assert relative_l2(many, expected) < 1e-10
