"""Recurrent layers in evaluation mode, whose gradients cuDNN gives in training mode only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.graph.intercept import Calls
from saliency_fast.model.executors import Executor, OffloadedExecutor, RecordedExecutor

LAYERS = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))


class Differentiable(Calls):
    """Inside its `with`, recurrent layers run as in training, and without their dropout: the same
    numbers, of which cuDNN keeps what a gradient needs. No flag of the model or of cuDNN changes.
    """

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in LAYERS and torch.is_grad_enabled():
            args = _trained(args)
        return func(*args, **kwargs)


def _trained(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a recurrent layer in evaluation mode, with gradients to come."""
    # (input, state, ...) of a batch, (input, batch sizes, state, ...) of packed sequences.
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    dropout = 6 if packed else 5
    if args[dropout + 1]:
        return args
    return *args[:dropout], 0.0, True, *args[dropout + 2 :]


@dataclass(frozen=True)
class Recurring:
    """A route through recurrent layers on a GPU."""

    route: Executor

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        with Differentiable():
            return self.route(points, args, kwargs)


def recurring(route: Executor, device: torch.device) -> Executor:
    """The route as gradients need it."""
    return Recurring(route) if device.type == "cuda" and _recurs(route) else route


def _recurs(route: Any) -> bool:
    """Whether a route may meet recurrent layers; each call costs time where it is watched."""
    if isinstance(route, (RecordedExecutor, OffloadedExecutor)):
        return any(step.func in LAYERS for step in route.program.steps)
    if isinstance(route, nn.Module):
        return any(isinstance(one, nn.RNNBase) for one in route.modules())
    inner = [getattr(route, name, None) for name in ("route", "model", "_model")]
    return all(one is None or _recurs(one) for one in inner)
