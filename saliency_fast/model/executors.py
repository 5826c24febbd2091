"""Routes: the ways in which a launch's points go through the model, all with the same answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from saliency_fast.graph.intercept import Calls, NotLeanError
from saliency_fast.graph.outputs import map_tensors
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.program import Program, tensors_among
from saliency_fast.graph.recorder import Recorder, own_gradient
from saliency_fast.model.recomputation import without_recomputation
from saliency_fast.model.state import rewind


class Executor(Protocol):
    """What the model returns for the points of a launch and its further arguments.

    Points in a list may be let go of, and the list be empty afterwards.
    """

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any: ...


@dataclass(frozen=True)
class EagerExecutor:
    """The model as it is; autograd keeps what it keeps."""

    model: Callable[..., Any]

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class VmapExecutor:
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
class InterceptedExecutor:
    """The model as it is, call by call in lean versions: for models that cannot be recorded."""

    model: Callable[..., Any]

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        with without_recomputation(), Calls():
            return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class RecordedExecutor:
    """The model's program, fused; the model's Python does not run."""

    program: Program

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return self.program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class ScoresExecutor:
    """The same, where scores alone are asked for as a rule: by `ready`, from `scoring`."""

    program: Program
    ready: Program

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        program = self.program if torch.is_grad_enabled() else self.ready
        return program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class AutocastExecutor:
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
class WidenedExecutor:
    """A route of which what it returns in half types is float32, for targets to be read from."""

    route: Executor

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return map_tensors(_widened, self.route(points, args, kwargs))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


@dataclass(frozen=True)
class OffloadedExecutor:
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


class RecordingExecutor:
    """A route that runs the model as it is and records it. read: the first call, if any, by which
    Python learns numbers that depend on the points, and asked: on further arguments; own: what
    gives gradients of its own.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._found: Program | str = "the model has not run"
        self.read: str | None = None
        self.own: str | None = None
        self.asked: str | None = None

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        recorder = Recorder(points, tensors_among(args, kwargs))
        with recorder:
            raw = self._model(*points, *args, **kwargs)
        self.read, self.own, self.asked = recorder.read, recorder.own, recorder.asked
        if torch.is_grad_enabled():
            leaves = [one for one in tree_leaves(raw) if isinstance(one, Tensor)]
            self.own = self.own or own_gradient(tree_leaves, leaves, None)
        try:
            self._found = recorder.program(raw)
        except NotLeanError as refusal:
            self._found = str(refusal)
        return raw

    @property
    def program(self) -> Program:
        """What the last run recorded; raises NotLeanError where it could not be."""
        if isinstance(self._found, str):
            raise NotLeanError(self._found)
        return self._found
