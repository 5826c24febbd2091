"""Executors: how the points of a launch go through the model, all with the same result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast import _torch_compat as compat
from saliency_fast._types import Args, Function, Inputs, Kwargs
from saliency_fast.graph.intercept import Calls, FunctionMode, NotLeanError
from saliency_fast.graph.outputs import map_tensors
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.program import Program, tensors_among
from saliency_fast.graph.recorder import Recorder, own_gradient
from saliency_fast.model.preserve import SharedSwitch, modules_of, rewind, without_recomputation

LAYERS = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))
"""Recurrent layers, whose gradients cuDNN has in training mode only."""
_META = torch.device("meta")
_VMAP_WARNINGS: SharedSwitch[None] = SharedSwitch()


Executor = Callable[[Sequence[Tensor], Args, Kwargs], Any]
"""The model's output for the points of a launch, a list that may be emptied, and its arguments."""


@dataclass(frozen=True)
class EagerExecutor:
    """The model as it is, with autograd's own memory."""

    model: Function

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class InterceptedExecutor:
    """The model, call by call in memory-efficient versions, where it cannot be recorded."""

    model: Callable[..., Any]

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        with without_recomputation(), Calls():
            return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class AutocastExecutor:
    """The model as it is, with products in a half type by PyTorch's autocast."""

    model: Callable[..., Any]
    half: torch.dtype

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        with torch.autocast(points[0].device.type, self.half):
            return self.model(*points, *args, **kwargs)


@dataclass(frozen=True)
class RecordedExecutor:
    """The model's program, fused; the model's Python does not run."""

    program: Program

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        return self.program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class ScoresExecutor:
    """The model's program, and `ready`, the one for scores without gradients."""

    program: Program
    ready: Program

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        program = self.program if torch.is_grad_enabled() else self.ready
        return program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class OffloadedExecutor:
    """A program whose activations for the backward pass wait in the host's memory."""

    program: Program

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        weights = self.program.memories

        def to_host(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
            if tensor.untyped_storage().data_ptr() in weights:
                return None, tensor
            pinned = tensor.is_cuda
            host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            return tensor.device, host.copy_(tensor, non_blocking=pinned)

        def from_host(kept: tuple[torch.device | None, Tensor]) -> Tensor:
            device, host = kept
            return host if device is None else host.to(device, non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
            return self.program(points, tensors_among(args, kwargs))


@dataclass(frozen=True)
class WidenedExecutor:
    """An executor whose outputs in half types become float32, for targets to be read from."""

    executor: Executor

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        raw = self.executor(points, args, kwargs)
        return map_tensors(lambda one: one.float() if one.dtype in HALVES else one, raw)


class RecordingExecutor:
    """The model as it is, which it records; its public attributes are those of `Recorder`."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self._recorded: Program | str = "the model has not run"
        self.first_read_of_points: str | None = None
        self.first_read_of_arguments: str | None = None
        self.custom_gradient: str | None = None

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        recorder = Recorder(points, tensors_among(args, kwargs))
        with recorder:
            raw = self.model(*points, *args, **kwargs)
        self.first_read_of_points = recorder.first_read_of_points
        self.first_read_of_arguments = recorder.first_read_of_arguments
        self.custom_gradient = recorder.custom_gradient
        if torch.is_grad_enabled():
            leaves = [one for one in compat.tree_leaves(raw) if isinstance(one, Tensor)]
            self.custom_gradient = self.custom_gradient or own_gradient(
                compat.tree_leaves, leaves, None
            )
        try:
            self._recorded = recorder.program(raw)
        except NotLeanError as refusal:
            self._recorded = str(refusal)
        return raw

    @property
    def program(self) -> Program:
        """What the last run recorded; raises NotLeanError where it could not be."""
        if isinstance(self._recorded, str):
            raise NotLeanError(self._recorded)
        return self._recorded


# Each row alone, by vmap.


@dataclass(frozen=True)
class VmapExecutor:
    """The model for each row alone, by vmap. owned: further arguments with a row for each point."""

    model: Callable[..., Any]
    owned: frozenset[int | str]

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        # Under vmap the model keeps nothing.
        rewind(counts=len(points[0]) == 1)
        if len(points[0]) == 1:
            return self.model(*points, *args, **kwargs)
        further = dict(enumerate(args)) | dict(kwargs)
        own = {key: one for key, one in further.items() if key in self.owned}
        outputs: list[Any] = []

        def alone(rows: Sequence[Tensor], own: Mapping[Any, Tensor]) -> list[Tensor]:
            given = further | {key: one[None] for key, one in own.items()}
            numbered, named = [given[n] for n in range(len(args))], {n: given[n] for n in kwargs}
            outputs[:] = compat.tree_flatten(
                self.model(*(one[None] for one in rows), *numbered, **named)
            )
            return [one for one in outputs[0] if isinstance(one, Tensor)]

        tensors = iter(torch.func.vmap(alone, randomness="error")(list(points), own))
        leaves, tree = outputs
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                one = next(tensors)
                # One row of one example each: [R, 1, *], or [R] where it is a single number.
                leaves[number] = one.flatten(0, 1) if one.dim() > 1 else one
        return compat.tree_unflatten(leaves, tree)


@dataclass(frozen=True)
class WithoutVmapTensors:
    """A model for `torch.func.vmap` that keeps none of its tensors, but what it kept before."""

    model: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tables = [(table, table.copy()) for one in modules_of(self.model) for table in _tables(one)]
        # PyTorch would ask to file an issue for each operator that it runs row by row: the caller
        # has not chosen vmap, and to run all rows one by one would take longer.
        quiet = (
            partial(compat.warn_of_vmap_fallbacks, False),
            lambda _: compat.warn_of_vmap_fallbacks(True),
        )
        try:
            with _VMAP_WARNINGS.on(*quiet):
                return self.model(*args, **kwargs)
        finally:
            for now, before in tables:
                if isinstance(now, list):
                    if any(map(_holds_vmapped, now)):
                        now[:] = before
                    continue
                for name in [name for name, value in now.items() if _holds_vmapped(value)]:
                    if name in before:
                        now[name] = before[name]
                    else:
                        del now[name]


def _tables(module: nn.Module) -> list[Any]:
    """Where a module keeps tensors: its attributes, its buffers, its lists and dictionaries."""
    own = vars(module)
    public = [value for name, value in own.items() if not name.startswith("_")]
    return [own, own[compat.BUFFERS], *(one for one in public if isinstance(one, (dict, list)))]


def _holds_vmapped(value: Any) -> bool:
    leaves = compat.tree_leaves(value) if isinstance(value, (tuple, list, dict)) else (value,)
    return any(compat.is_of_transform(one) for one in leaves if isinstance(one, Tensor))


# Recurrent layers on GPUs.


class Differentiable(Calls):
    """Runs recurrent layers as in training without dropout: cuDNN keeps what gradients need."""

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if func in LAYERS and torch.is_grad_enabled():
            # (input, state, ...) of a batch, (input, batch sizes, state, ...) of packed sequences.
            packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
            dropout = 6 if packed else 5
            if not args[dropout + 1]:
                args = (*args[:dropout], 0.0, True, *args[dropout + 2 :])
        return func(*args, **kwargs)


def for_recurrent_layers(executor: Executor, device: torch.device) -> Executor:
    """The executor as gradients of recurrent layers on a GPU need it."""

    def run(points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        with Differentiable():
            return executor(points, args, kwargs)

    return run if device.type == "cuda" and _recurs(executor) else executor


def _recurs(executor: Any) -> bool:
    """Whether an executor may run recurrent layers; interception costs time in each call."""
    if isinstance(executor, (RecordedExecutor, OffloadedExecutor)):
        return any(step.func in LAYERS for step in executor.program.steps)
    if isinstance(executor, nn.Module):
        return any(isinstance(one, nn.RNNBase) for one in executor.modules())
    inner = [getattr(executor, name, None) for name in ("executor", "model")]
    return all(one is None or _recurs(one) for one in inner)


# Shapes alone: the cost of a call, without its arithmetic or its memory.


class MetaTensors(FunctionMode):
    """Calls with a meta tensor take all others as meta tensors; all seem to be on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._twins = WeakTensorKeyDictionary()

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if not compat.tree_any(lambda x: isinstance(x, Tensor) and x.is_meta, (args, dict(kwargs))):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "device":
                return self._device
            if name in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu"):
                return name == f"is_{self._device.type}"
        if func in (Tensor.cpu, Tensor.cuda, Tensor.get_device):
            raise NotLeanError("the model moves tensors between devices")
        args, named = compat.tree_map(self._moved, (args, dict(kwargs)))
        if func is scaled_dot_product_attention and self._device.type == "cpu":
            return compat.cpu_attention(*args, **named)
        return func(*args, **named)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == self._device.type:
            return _META
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        if value not in self._twins:
            sizes = value.shape, value.stride()
            # Weights are there already: a mode that counts memory is not to see their twins made.
            with compat.without_dispatch_modes():
                twin = torch.empty_strided(*sizes, dtype=value.dtype, device=_META)
            # A leaf like a weight, so that calls save the same tensors for it.
            self._twins[value] = twin.requires_grad_(value.requires_grad)
        return self._twins[value]


def shapes_only(inputs: Inputs, rows: int) -> Inputs:
    """Points of `rows` rows like `inputs`, without their numbers."""
    return tuple(torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=_META) for x in inputs)
