"""Perturbed: a facade's call of a method that changes inputs, on the engine.

Where the function returns a number per row, rows are examples. Where it returns a number for the
whole batch, several per row, or rows that depend on each other, the whole batch is one example and
each number that comes back is one of its targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast.captum.contract import Baselines, as_args, copies, filled
from saliency_fast.captum.forward import selected
from saliency_fast.captum.run import (
    _deep,
    _Engine,
    _known,
    _known_whole,
    _mixes_rows,
    _owner,
    _rowwise,
    _targets,
    _tried,
    kept,
)
from saliency_fast.engine.features import numbered
from saliency_fast.engine.independence import Known
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import ContractError
from saliency_fast.model.routes import Inputs

ALIKE = 0.02
"""Of the largest score: more than half types lose where rows run in batches of another size."""


@dataclass(frozen=True)
class Asked:
    """What a call asks of the engine. features: masks that broadcast to their inputs [1 | B, *];
    at_once: perturbations per call of the function.
    """

    forward: Any
    inputs: Inputs
    target: Any = None
    further: Any = None
    baselines: Baselines | None = None
    features: Inputs | None = None
    at_once: int = 1
    progress: bool = False


@dataclass(frozen=True)
class Maps:
    """values: per input [N, *], one for each number that the function returns at the inputs; these
    are of `shape` and `dtype`. features: the same by feature, [N, F].
    """

    values: Inputs
    features: Tensor | None
    shape: torch.Size
    dtype: torch.dtype


class Draws:
    """What a method draws from PyTorch's global generator, which the engine puts back after a call:
    the state that the method leaves it in.
    """

    def __init__(self) -> None:
        self.start = self.state = torch.get_rng_state()

    def again(self) -> None:
        """As if nothing had been drawn."""
        self.state = self.start

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Draws go on from where they were."""
        torch.set_rng_state(self.state)
        yield
        self.state = torch.get_rng_state()


def check_at_once(count: Any, words: str) -> None:
    """Raises where perturbations_per_eval is no positive whole number."""
    if not isinstance(count, int) or count < 1:
        raise ContractError(f"{words} Got {count!r}; pass perturbations_per_eval=1")


def perturbed(method: Method, asked: Asked, draws: Draws | None = None) -> Maps:
    """The maps of a method; `asked.at_once` only bounds what is held at once."""
    full = [number for number, x in enumerate(asked.inputs) if x.numel()]
    if 0 < len(full) < len(asked.inputs):
        return _without_empty(method, asked, draws, full)
    owner, known, alone = _owner(asked.forward), _known(asked.forward), _known_whole(asked)
    with kept(asked.forward):
        first = _first(asked)
        batch = asked.inputs[0].shape[:1]
        alike = len({x.shape[:1] for x in asked.inputs}) == 1 and len(batch) == 1
        single = first.shape[:1] == batch and first.numel() == len(first)
        mixes = owner is not None and any(map(_mixes_rows, owner.modules()))
        calls = []
        if alike and single and not mixes and _is_by_rows(asked, first):
            targets = _targets(asked.target, len(asked.inputs[0]))
            calls = [partial(_by_rows, method, asked, one, known) for one in targets]
        found = None
        for call in calls:
            found = found or _tried(call)
            if found is None and draws is not None:
                draws.again()
        values, features = found or _as_one(method, asked, first, alone)
    if draws is not None:
        torch.set_rng_state(draws.state)
    if any(probe.cost.drew for probe in (*known.values(), *alone.values())):
        # The next call must not drop out the same.
        torch.rand(1)
    return Maps(values, features, first.shape, first.dtype)


def _without_empty(method: Method, asked: Asked, draws: Draws | None, full: list[int]) -> Maps:
    """Maps where some inputs have no elements: they go along, and their maps are zeros."""

    def forward(*given: Any) -> Any:
        inputs = list(asked.inputs)
        for number, one in zip(full, given, strict=False):
            inputs[number] = one
        return asked.forward(*inputs, *given[len(full) :])

    def some(several: Any) -> Any:
        return None if several is None else tuple(several[number] for number in full)

    inner = replace(
        asked,
        forward=forward,
        inputs=some(asked.inputs),
        baselines=some(asked.baselines),
        features=some(asked.features),
    )
    with kept(asked.forward):
        found = perturbed(method, inner, draws)
    count = max(1, found.shape.numel())
    values = [x.new_zeros((count, *x.shape[1:])) for x in asked.inputs]
    for number, one in zip(full, found.values, strict=True):
        values[number] = one
    return replace(found, values=tuple(values))


def parsed(raw: Any, target: Any) -> Tensor:
    """What a function returns, as a tensor: numbers of Python's are tensors of their type."""
    if isinstance(raw, (int, float)):
        return torch.tensor(raw, dtype=torch.int64 if isinstance(raw, int) else torch.float64)
    if not isinstance(raw, Tensor):
        raise ContractError(
            "the return of forward_func must be a tensor, int, or float, received: "
            f"{raw}; return one number per row"
        )
    return selected(raw, target)


@torch.no_grad()
def _first(asked: Asked) -> Tensor:
    raw = asked.forward(*copies(asked.inputs), *as_args(asked.further))
    return parsed(raw, asked.target)


def _is_by_rows(asked: Asked, first: Tensor) -> bool:
    """Whether the last row alone gives what it gives among the others: arguments may count rows,
    and rows depend on each other. A function that draws is taken at its word.
    """
    batch, device = len(first), asked.inputs[0].device
    if batch == 1:
        return True
    last = partial(_last, batch=batch)
    further = (last(one) if isinstance(one, Tensor) else one for one in as_args(asked.further))
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu), torch.no_grad():
        before = torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpu)
        try:
            raw = asked.forward(*(last(x).clone() for x in asked.inputs), *further)
            alone = parsed(raw, last(asked.target)).double().flatten()
        except Exception:
            return False
        after = torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpu)
    if any(not torch.equal(*pair) for pair in zip(before, after, strict=True)):
        return True
    rows = first.double().flatten()
    return len(alone) == 1 and float((alone - rows[-1:]).abs()) <= ALIKE * float(rows.abs().max())


def _last(value: Any, batch: int) -> Any:
    """What of an argument belongs to the last row."""
    several = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[-1:] if several and len(value) == batch else value


def _by_rows(
    method: Method, asked: Asked, target: Any, known: Known
) -> tuple[Inputs, Tensor | None]:
    """Maps by rows."""
    inputs, flat = asked.inputs, tuple(x.dim() == 1 for x in asked.inputs)
    baselines, features = asked.baselines, asked.features
    if baselines is not None:
        baselines = tuple(map(_deep, baselines, flat))
    if features is not None:
        features = tuple(
            one[..., None] if deep else one for one, deep in zip(features, flat, strict=True)
        )
    engine = _Engine(
        partial(_rowwise, asked.forward, flat),
        method,
        known,
        points_per_launch=None if asked.at_once == 1 else asked.at_once * len(inputs[0]),
        progress=asked.progress,
    )
    deep = tuple(x[:, None] if one else x for x, one in zip(inputs, flat, strict=True))
    found = engine(deep, target, baselines, forward_args=as_args(asked.further), features=features)
    values = found.values if isinstance(found.values, tuple) else (found.values,)
    same = tuple(one.view(x.shape) for one, x in zip(values, inputs, strict=True))
    return same, found.extras.get("features")


def _as_one(
    method: Method, asked: Asked, first: Tensor, known: Known
) -> tuple[Inputs, Tensor | None]:
    """The batch as one example, whose points are batches: one call of the function for each."""
    inputs, baselines = asked.inputs, None
    batch = len(inputs[0])
    if asked.at_once > 1 and first.shape[:1] != (batch,):
        raise ContractError(
            "When perturbations_per_eval > 1, forward_func's output should be a tensor whose 1st "
            "dim grow with the input batch size: when input batch size is "
            f"{batch}, the output shape is {first.shape}; pass perturbations_per_eval=1"
        )
    if asked.baselines is not None:
        baselines = tuple(one[None] for one in filled(inputs, asked.baselines))
    # An element of every row is a feature, unless masks say otherwise.
    masks = numbered(None, inputs) if asked.features is None else asked.features
    pairs = list(zip(masks, inputs, strict=True))
    own = any(one.dim() == x.dim() and len(one) > 1 for one, x in pairs)
    features = tuple(one.expand(x.shape)[None] for one, x in pairs)
    engine = _Engine(
        *(partial(_whole, asked), method, known),
        points_per_launch=1,
        lean=False,
        progress=asked.progress,
    )
    count = first.numel()
    target = torch.arange(count, device=inputs[0].device)[None]
    asks = features if method.recipe().features else None
    found = engine(tuple(x[None] for x in inputs), target, baselines, features=asks)
    assert isinstance(found.values, tuple)
    number = torch.arange(count, device=inputs[0].device)
    # A feature of some rows alone counts for their numbers.
    row = number // max(1, count // batch) if own else 0 * number
    values = tuple(one[0, number, row] for one in found.values)
    extra = found.extras.get("features")
    return values, None if extra is None else extra[0]


def _whole(asked: Asked, *points: Tensor) -> Tensor:
    """All numbers that the function returns for each of the points [R, B, *]: float64 [R, N]."""
    found = []
    for rows in zip(*points, strict=True):
        raw = asked.forward(*rows, *as_args(asked.further))
        found.append(parsed(raw, asked.target).reshape(-1).double())
    return torch.stack(found)
