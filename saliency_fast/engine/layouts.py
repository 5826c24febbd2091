"""Layouts of a call's inputs: given by the caller, or found in the model when they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from saliency_fast.engine.bind import Call
from saliency_fast.engine.way import Model, function_of
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.follow import Inside, follow, follow_inside, followed
from saliency_fast.model.layers import Layer, channel_axis, module_at
from saliency_fast.model.layout import LayoutLike, Layouts
from saliency_fast.model.preserve import preserve_model_state

SERVICE = "saliency_fast"
"""The thread of the service: random states are the whole process's, and not its to put back."""


def layouts_of(model: Model, call: Call, given: LayoutLike) -> Layouts:
    """The layouts of a call's inputs; the model is looked at when they are asked for."""
    shapes, device = [tuple(x.shape) for x in call.inputs], call.device
    # Not the inputs themselves, which must not be held: the axes of any numbers are the same.
    ones = tuple(x.new_ones(()).expand(1, *x.shape[1:]) for x in call.inputs)
    about = replace(call, inputs=ones, features=(), layouts=Layouts(()))

    def ready(count: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], object]]:
        function = function_of(EagerExecutor(model), about)
        rows = [one.repeat(count, *(1,) * (one.dim() - 1)) for one in function.taken(ones)]
        item = torch.zeros(count, dtype=torch.int64, device=device)

        def run(inputs: Sequence[Tensor]) -> object:
            args, kwargs = function.rows(item)
            return function.route(inputs, args, kwargs)

        return rows, run

    def find() -> Sequence[str | None]:
        rows, run = ready(1)
        with preserve_model_state(model, device, draws=threading.current_thread().name != SERVICE):
            return follow(model, rows, run)

    def look(layers: Sequence[Layer], of_input: bool) -> Inside:
        # Two rows: where a layer folds steps into the batch, their order tells.
        rows, run = ready(2)
        with preserve_model_state(model, device, draws=threading.current_thread().name != SERVICE):
            return follow_inside(rows, run, layers, of_input)

    found = Layouts(shapes, given, find, look)
    known = followed(model, shapes, call.dtypes)
    return found if known is None else found.saying(known)


def layouts_at(
    behind: Model, call: Call, layers: Sequence[Layer], counts: Sequence[int], of_input: bool
) -> Layouts:
    """The layouts of what layers give, which are the inputs of a call that was moved to them: as a
    layer's own kind says, else what comes behind it.
    """
    found = layouts_of(behind, call, call.layout)
    owners = [
        module_at(layer) for layer, count in zip(layers, counts, strict=True) for _ in range(count)
    ]
    told = [
        letters or (None if of_input else _given_by(layer, shape))
        for layer, shape, letters in zip(owners, found.shapes, found.settled, strict=True)
    ]
    return found.knowing(told)


def _given_by(layer: nn.Module, shape: tuple[int, ...]) -> str | None:
    """The layout of what a layer gives, by the number of features that it says it has."""
    places = {3: "T", 4: "HW", 5: "DHW"}.get(len(shape))
    axis = channel_axis(layer, shape, 0)
    if places is None or axis == 0:
        return None
    return f"BC{places}" if axis == 1 else f"B{places}{'F' if len(shape) == 3 else 'C'}"
