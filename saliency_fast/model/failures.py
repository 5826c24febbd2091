"""Exceptions that a model or a target function raises become `ModelCallError`, with the cure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast._torch_compat import ErrorText
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import BackendError, ModelCallError, SaliencyError, warn
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.preserve import rewind

FORWARD, BACKWARD, TARGET = "forward", "backward", "target"
_WHO = {FORWARD: "the model", BACKWARD: "the model's backward pass", TARGET: "the target function"}
BY_EXAMPLE = (
    "a target function that needs something of each example, such as its label, takes the "
    "examples' indices as its second argument: target=lambda outputs, example: outputs.gather(1, "
    "labels[example][:, None])[:, 0]"
)
BY_ARGUMENT = (
    "tensors of the batch inside the model, such as a mask, are passed through forward_args or "
    "forward_kwargs, which follow their examples into the rows"
)
_CURES = {
    ErrorText.IN_PLACE: "the model overwrites what autograd needs: write y = y * 2 instead of "
    "y *= 2 or y[...] = ..., or overwrite a clone()",
    ErrorText.NO_DERIVATIVE: "replace the call that has no gradient, or take a method that asks "
    "for scores alone, such as sf.Occlusion",
    ErrorText.INFERENCE_TENSOR: "make the model and its tensors outside of torch.inference_mode(), "
    "or clone() them there",
    ErrorText.NO_GRADIENT: "look for detach(), no_grad(), .item(), NumPy or integer steps inside "
    "the model",
}
"""Texts of PyTorch's errors, and the cure."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocator's, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ErrorText.OUT_OF_MEMORY.of(error)


def warn_of_kernel(error: BaseException) -> None:
    """Warns where a kernel failed in a call that goes on without it, slower."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    for one in causes:
        if isinstance(one, BackendError) or (_on_device(one) and not is_out_of_memory(one)):
            line = f"{type(one).__name__}: {one}".partition("\n")[0]
            warn(f"a kernel failed, and calls go on without it, slower ({line})")
            return


def _on_device(error: BaseException) -> bool:
    """Whether an error comes from a device, or from Triton, which raises common ones, too."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = {frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames}
    return isinstance(error, torch.AcceleratorError) or "triton" in modules


@dataclass
class Failing:
    """Turns exceptions inside, but for ours and of allocators, into `ModelCallError`."""

    stage: str
    rows: int
    batch: int

    def __enter__(self) -> None:
        return None

    # No generator: those pass a StopIteration on.
    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, SaliencyError):
            return
        if not is_out_of_memory(error):
            cure = _cure(error, self.stage)
            raise _made(error, self.stage, self.rows, self.batch, cure) from error


def diagnosed(
    error: ModelCallError, model: Function, inputs: Sequence[Tensor], args: Args, kwargs: Kwargs
) -> ModelCallError:
    """The failure with its cure, found by calling the model on the inputs [B, *]."""
    cause = error.__cause__
    # An exception of the user's own is meant, and needs no diagnosis.
    if error.stage == TARGET or not isinstance(cause, Exception) or not _is_common(type(cause)):
        return error
    tried = _Calling(model, inputs, args, kwargs, error.stage == BACKWARD)
    batch, whole = len(inputs[0]), tried.failure()
    if whole is None:
        return error
    if isinstance(whole, Exception):
        where = f"the model itself fails on these inputs, {tried}: "
        return _made(whole, error.stage, error.rows, batch, where + _unfit(tried, whole))
    cure = _cure(cause, error.stage) or _rows(tried, error.rows)
    return _made(cause, error.stage, error.rows, batch, f"{tried} works by itself: {cure}")


def _made(error: Exception, stage: str, rows: int, batch: int, cure: str) -> ModelCallError:
    """The error that reports `error`, and is of its class, too, where that is the user's own."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    of = f"{rows} row{'s' * (rows != 1)} made of {batch} example{'s' * (batch != 1)}"
    text = f"{_WHO[stage]} failed on {of}. {said.rstrip('.')}"
    kind = ModelCallError if _is_common(type(error)) else as_well(type(error))
    made = kind(f"{text}; {cure}" if cure else text)
    with suppress(AttributeError):
        vars(made).update(vars(error))
    made.stage, made.rows, made.__cause__ = stage, rows, error
    return made


def _is_common(kind: type) -> bool:
    """Whether an exception is Python's or PyTorch's."""
    return kind.__module__.partition(".")[0] in ("builtins", "torch")


def as_well(cause: type[Exception]) -> type[ModelCallError]:
    """A `ModelCallError` that is a `cause`, too, where one class can be both."""
    # A StopIteration would end the generators that it passes.
    if issubclass(ModelCallError, cause) or issubclass(cause, (StopIteration, StopAsyncIteration)):
        return ModelCallError
    own = {
        "__init__": Exception.__init__,
        "__str__": Exception.__str__,
        # For pickle, which finds classes by name.
        "__reduce__": lambda error: (ModelCallError, (str(error),)),
        "__module__": ModelCallError.__module__,
        "__doc__": ModelCallError.__doc__,
    }
    with suppress(TypeError):
        kind: type[ModelCallError] = type("ModelCallError", (ModelCallError, cause), own)
        kind("made as any exception is")
        return kind
    return ModelCallError


def _cure(error: BaseException, stage: str) -> str:
    if stage == TARGET:
        return f"it is called with the outputs of any number of rows; {BY_EXAMPLE}"
    return next((cure for text, cure in _CURES.items() if text.of(error)), "")


@dataclass(frozen=True)
class _Calling:
    """The model called as its user would; `backward`: with a backward pass."""

    model: Callable[..., Any]
    inputs: Sequence[Tensor]
    args: Args
    kwargs: Kwargs
    backward: bool = False

    def __str__(self) -> str:
        shown = [_shown(one) for one in (*self.inputs, *self.args)]
        named = [f"{name}={_shown(one)}" for name, one in self.kwargs.items()]
        return f"model({', '.join([*shown, *named])})"

    def failure(
        self,
        change: Callable[[Tensor], Tensor] = Tensor.clone,
        further: Callable[[Any], Any] = lambda one: one,
    ) -> Exception | bool | None:
        """What it raises; False where it works, None where memory does not suffice."""
        rewind()
        try:
            points = [change(one).detach() for one in self.inputs]
            args = [further(one) for one in self.args]
            kwargs = {name: further(one) for name, one in self.kwargs.items()}
            if not self.backward:
                with torch.no_grad():
                    self.model(*points, *args, **kwargs)
                return False
            leaves = [one.requires_grad_() for one in points if one.is_floating_point()]
            # Clones: leaves that ask for gradients cannot be overwritten.
            raw = self.model(*(one.clone() for one in points), *args, **kwargs)
            total = sum(one.sum() for one in tensors_of(raw) if one.requires_grad)
            torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
        except Exception as error:
            return None if is_out_of_memory(error) else error
        return False

    def rows(self, count: int) -> Exception | bool | None:
        """The same for the first example, `count` times."""
        batch = len(self.inputs[0])

        def first(one: Any) -> Any:
            follows = isinstance(one, Tensor) and one.dim() > 0 and len(one) == batch
            return one[:1].repeat(count, *[1] * (one.dim() - 1)) if follows else one

        return self.failure(first, first)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _unfit(tried: _Calling, error: Exception) -> str:
    """The cure for a model that does not run on its inputs."""
    text, inputs = str(error), tried.inputs
    weights = list(tried.model.parameters()) if isinstance(tried.model, nn.Module) else []
    floats = {one.dtype for one in weights if one.is_floating_point()}
    given = {one.dtype for one in inputs if one.is_floating_point()}
    if floats and given and floats.isdisjoint(given):
        own, other = (str(next(iter(one))).removeprefix("torch.") for one in (floats, given))
        double = " or model.double()" if other == "float64" else ""
        cast = "x.float()" if own == "float32" else f"x.to(torch.{own})"
        return f"the input is {other} and the model's weights are {own}: use {cast}{double}"
    devices = {one.device for one in weights}
    if devices and devices.isdisjoint(one.device for one in inputs):
        own = str(next(iter(devices)))
        return f"the input is on {inputs[0].device} and the model on {own}: use x.to({own!r})"
    if isinstance(error, TypeError) and "argument" in text:
        return (
            "pass the inputs of a model of several as a tuple, and what needs no attribution "
            "through forward_args or forward_kwargs"
        )
    if "indices" in text and ("Long" in text or "Int" in text):
        return "token ids are integers: pass them as they are, with at='embeddings'"
    if tried.failure(lambda one: one[None]) is False:
        return "the inputs lack a batch axis: with x[None] it works"
    if tried.failure(lambda one: one.movedim(-1, 1)) is False:
        return "channels come before the spatial axes: with x.movedim(-1, 1) it works"
    return _cure(error, FORWARD) or "call the model by hand until it runs"


def _rows(tried: _Calling, rows: int) -> str:
    """The cure for a model that runs on its inputs, and did not run on `rows` rows."""
    batch = len(tried.inputs[0])
    if isinstance(tried.rows(1), Exception):
        return (
            f"it takes {batch} rows and no other number, but rows are examples here, and run in "
            f"any number. {BY_ARGUMENT}. If the whole input is one example, such as the nodes of "
            "a graph, give it a batch axis: pass x[None], and lambda x: torch.stack([model(one) "
            "for one in x]) as the model"
        )
    if rows > 1 and isinstance(tried.rows(rows), Exception):
        return "it takes one row at a time: pass points_per_launch=1"
    return (
        "it fails at points that the method makes of the inputs: look at the baseline and the "
        "range of noise, or, where lean=False helps, report the model"
    )
