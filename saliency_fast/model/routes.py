"""Routes: the ways in which a launch's points go through the model, all with the same answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from saliency_fast.errors import warn
from saliency_fast.model.calls import Calls
from saliency_fast.model.outputs import map_tensors
from saliency_fast.model.precision import HALVES
from saliency_fast.model.program import Program
from saliency_fast.model.recomputation import without_recomputation
from saliency_fast.model.rules.base import Ruling
from saliency_fast.model.state import rewind

Inputs = tuple[Tensor, ...]


class Route(Protocol):
    """What the model returns for the points of a launch and its further arguments.

    Points in a list may be let go of, and the list be empty afterwards.
    """

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any: ...


@dataclass(frozen=True)
class Plain:
    """The model as it is; autograd keeps what it keeps."""

    model: Callable[..., Any]

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class Vmapped:
    """The model as it is for each row alone, all at once by `torch.func.vmap`: rows cannot meet.

    owned: the further arguments, by number or name, that come with a row for each point.
    """

    model: Callable[..., Any]
    owned: frozenset[int | str]

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # Under vmap the model keeps nothing.
        rewind(counts=len(points[0]) == 1)
        if len(points[0]) == 1:
            return self.model(*points, *args, **kwargs)
        further = dict(enumerate(args)) | dict(kwargs)
        own = {key: one for key, one in further.items() if key in self.owned}
        seen: list[Any] = []

        def alone(rows: Sequence[Tensor], own: Mapping[Any, Tensor]) -> list[Tensor]:
            given = further | {key: one[None] for key, one in own.items()}
            numbered = [given[number] for number in range(len(args))]
            raw = self.model(
                *(one[None] for one in rows), *numbered, **{name: given[name] for name in kwargs}
            )
            seen[:] = tree_flatten(raw)
            return [one for one in seen[0] if isinstance(one, Tensor)]

        found = iter(torch.func.vmap(alone, randomness="error")(list(points), own))
        leaves, tree = seen
        parts = [next(found) if isinstance(one, Tensor) else one for one in leaves]
        # One row of one example each: [R, 1, *], or [R] where it returns a single number.
        rows = [
            one.flatten(0, 1) if isinstance(one, Tensor) and one.dim() > 1 else one for one in parts
        ]
        return tree_unflatten(rows, tree)


@dataclass(frozen=True)
class Watched:
    """The model as it is, call by call in lean versions: for models that cannot be recorded."""

    model: Callable[..., Any]

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        with without_recomputation(), Calls():
            return self.model(*points, *args, **kwargs)


class Rules(Protocol):
    """Backward rules that a model runs under, instead of the chain rule; see `model/rules`.

    references: points are followed by a row of the baseline for each; relevance: what flows back
    is what the score owes to an output, its own for a single one, not its derivative. unmet: what
    to warn of where a run made no call that has a rule; "" for nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def references(self) -> bool: ...

    @property
    def relevance(self) -> bool: ...

    @property
    def unmet(self) -> str: ...

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling: ...


@dataclass(frozen=True)
class Ruled:
    """The model as it is, call by call under backward rules.

    Where `rules.references`, points and arguments come with their references behind them, and so
    do outputs.
    """

    model: Callable[..., Any]
    rules: Rules

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        calls = self.rules.calls(self.model)
        raw = calls.run(self.model, points, args, kwargs)
        # Without gradients no call needs a rule.
        if calls.met == 0 and self.rules.unmet and torch.is_grad_enabled():
            warn(self.rules.unmet)
        return raw


@dataclass(frozen=True)
class Recorded:
    """The model's program, fused; the model's Python does not run."""

    program: Program

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return self.program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class Scored:
    """The same, where scores alone are asked for as a rule: by `ready`, from `scoring`."""

    program: Program
    ready: Program

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        program = self.program if torch.is_grad_enabled() else self.ready
        return program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class Autocast:
    """The model as it is, with products in a half type as PyTorch's autocast has them."""

    model: Callable[..., Any]
    half: torch.dtype

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        with torch.autocast(points[0].device.type, self.half):
            return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class Widened:
    """A route of which what it returns in half types is float32, for targets to be read from."""

    route: Route

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return map_tensors(_widened, self.route(points, args, kwargs))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


@dataclass(frozen=True)
class Offloaded:
    """A program of which what autograd keeps waits in the host's memory, apart from weights."""

    program: Program

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        weights = self.program.memories
        with torch.autograd.graph.saved_tensors_hooks(partial(_to_host, weights), _from_host):
            return self.program(points, tensors_among(args, kwargs))


def _to_host(weights: frozenset[int], tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if tensor.untyped_storage().data_ptr() in weights:
        return tensor
    pinned = tensor.is_cuda
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return tensor.device, host.copy_(tensor, non_blocking=pinned)


def _from_host(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)


def tensors_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among further arguments, as programs number them."""
    return [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
