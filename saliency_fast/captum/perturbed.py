"""Perturbed: a facade's call of a method that changes inputs, on the engine.

Where the function returns a number per row, rows are examples. Where it returns a number for the
whole batch, several per row, or rows that depend on each other, and where it is no module's, it is
called as Captum calls it (`passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from saliency_fast._types import Inputs
from saliency_fast.captum import passes
from saliency_fast.captum.contract import as_args, copies
from saliency_fast.captum.passes import Asked
from saliency_fast.captum.run import (
    _deep,
    _Engine,
    _known,
    _mixes_rows,
    _NotByRowsError,
    _owner,
    _rowwise,
    _targets,
    _tried,
    alike,
    seen_to_meet,
)
from saliency_fast.engine.independence import CalibrationCache
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import ContractError
from saliency_fast.model.state import preserved


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
    the state that the method leaves it in, and draws by number, for those that are asked again.
    """

    def __init__(self) -> None:
        self.start = self.state = torch.get_rng_state()
        self.kept: dict[int, Tensor] = {}

    def again(self) -> None:
        """As if nothing had been drawn."""
        self.state = self.start
        self.kept.clear()

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
    """The maps of a method, by rows where that can be; `asked.at_once` then only bounds what is
    held at once.
    """
    full = [number for number, x in enumerate(asked.inputs) if x.numel()]
    inner, restored = _full_alone(asked, full)
    with preserved(asked.forward), asked.shown(method) as bar:
        first = first_of(inner)
        bar.update()
        if full:
            found = by_rows(method, inner, first, draws, bar)
            apart, again = seen_to_meet(inner.forward), (draws or Draws()).again
            found = found or passes.run(method, inner, first, bar, again, apart=apart)
        else:
            found = tuple(x.new_zeros((first.numel(), *x.shape[1:])) for x in asked.inputs), None
        bar.update((bar.total or bar.n) - bar.n)
    if draws is not None:
        torch.set_rng_state(draws.state)
    return restored(Maps(*found, first.shape, first.dtype))


def by_rows(
    method: Method, asked: Asked, first: Tensor, draws: Draws | None, bar: Any
) -> passes.Values | None:
    """The maps by the engine, whose examples are rows, where the function is a module's and rows
    are seen not to depend on each other: `first` is what it returns for all of them.
    """
    if not _has_rows(asked, first):
        return None
    found, known = None, _known(asked.forward)
    for target in _targets(asked.target, len(asked.inputs[0])):
        with suppress(_NotByRowsError):
            found = found or _tried(partial(_by_rows, method, asked, target, known, bar))
        if found is None and draws is not None:
            draws.again()
    if any(probe.cost.drew for probe in known.values()):
        # The next call must not drop out the same.
        torch.rand(1)
    return found


def promised(
    method: Method, asked: Asked, finish: Callable[[Maps], Any], draws: Draws | None = None
) -> Future[Any]:
    """A future of what `finish` makes of the maps, for a function that returns futures."""
    full = [number for number, x in enumerate(asked.inputs) if x.numel()]
    asked, restored = _full_alone(asked, full)

    def over(values: passes.Values, first: Tensor) -> Any:
        return finish(restored(Maps(*values, first.shape, first.dtype)))

    with preserved(asked.forward), asked.shown(method) as bar:
        found = passes.promised(method, asked, over, bar.update)
    if draws is not None:
        torch.set_rng_state(draws.state)
    return found


def _has_rows(asked: Asked, first: Tensor) -> bool:
    """Whether a module's function has a number for each row that depends on this row alone."""
    owner, batch = _owner(asked.forward), asked.inputs[0].shape[:1]
    same = len({x.shape[:1] for x in asked.inputs}) == 1 and len(batch) == 1
    if owner is None or not same or first.shape[:1] != batch or first.numel() != len(first):
        return False
    return not any(map(_mixes_rows, owner.modules())) and _is_by_rows(asked, first)


def _full_alone(asked: Asked, full: list[int]) -> tuple[Asked, Callable[[Maps], Maps]]:
    """A call without the inputs that have no elements, which go along in the function, and what
    gives them maps of zeros.
    """
    if len(full) in (0, len(asked.inputs)):
        return asked, lambda found: found

    def forward(*given: Any) -> Any:
        inputs = list(asked.inputs)
        for number, one in zip(full, given, strict=False):
            inputs[number] = one
        return asked.forward(*inputs, *given[len(full) :])

    def some(several: Any) -> Any:
        return None if several is None else tuple(several[number] for number in full)

    def restored(found: Maps) -> Maps:
        values = [x.new_zeros((found.shape.numel(), *x.shape[1:])) for x in asked.inputs]
        for number, one in zip(full, found.values, strict=True):
            values[number] = one
        return replace(found, values=tuple(values))

    inner = replace(
        asked,
        forward=forward,
        inputs=some(asked.inputs),
        baselines=some(asked.baselines),
        features=some(asked.features),
    )
    return inner, restored


@torch.no_grad()
def first_of(asked: Asked) -> Tensor:
    """What the target picks of what the function returns at the inputs."""
    raw = asked.forward(*copies(asked.inputs), *as_args(asked.further))
    return passes.output_of(raw, asked.target)


def _is_by_rows(asked: Asked, first: Tensor) -> bool:
    """Whether rows alone give what they give among the others: arguments may count rows, and rows
    depend on each other. A function that draws is taken at its word.
    """
    batch, device = len(first), asked.inputs[0].device
    rows, gpu = first.flatten(), [device] if device.type == "cuda" else []
    # Any row may be the one that makes others what they are; of a large batch some are asked.
    for number in dict.fromkeys((batch - 1, 0, batch // 2) if batch > 1 else ()):
        own = partial(_of_row, row=number, batch=batch)
        further = (own(one) if isinstance(one, Tensor) else one for one in as_args(asked.further))
        with torch.random.fork_rng(gpu), torch.no_grad():
            before = torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpu)
            try:
                raw = asked.forward(*(own(x).clone() for x in asked.inputs), *further)
                alone = passes.output_of(raw, own(asked.target)).double().flatten()
            except Exception:
                return False
            after = torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpu)
        if any(not torch.equal(*pair) for pair in zip(before, after, strict=True)):
            return True
        if len(alone) != 1:
            return False
        same = rows.double().clone()
        same[number] = alone[0]
        # The largest of all rows is what they are compared with.
        if not alike(same, rows):
            return False
    return True


def _of_row(value: Any, row: int, batch: int) -> Any:
    """What of an argument belongs to a row."""
    several = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[row : row + 1] if several and len(value) == batch else value


def _by_rows(
    method: Method, asked: Asked, target: Any, known: CalibrationCache, bar: Any
) -> passes.Values:
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
        bar=bar,
    )
    deep = tuple(x[:, None] if one else x for x, one in zip(inputs, flat, strict=True))
    found = engine(deep, target, baselines, forward_args=as_args(asked.further), features=features)
    values = found.values if isinstance(found.values, tuple) else (found.values,)
    same = tuple(one.view(x.shape) for one, x in zip(values, inputs, strict=True))
    return same, found.extras.get("features")
