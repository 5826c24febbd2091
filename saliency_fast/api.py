"""The public face: `explain` for one call, `Engine` for many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Region
from saliency_fast.engine.features import Features
from saliency_fast.engine.recipe import Method
from saliency_fast.engines import Engine
from saliency_fast.model.axes import LayoutLike
from saliency_fast.model.layers import At
from saliency_fast.model.targets import Target

__all__ = ["Engine", "explain"]


def explain(
    model: Callable[..., Any],
    inputs: Tensor | Inputs,
    *,
    target: Target = None,
    method: Method | str = "integrated_gradients",
    baseline: Baseline = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    precision: str = "float32",
    tolerance: float | None = None,
    at: At | None = None,
    layer_input: bool = False,
    memory_budget: int | str | None = None,
    points_per_launch: int | None = None,
    lean: bool = True,
    region: Region = None,
    features: Features = None,
    rows: str = "alone",
    layout: LayoutLike = None,
    progress: bool = False,
    create_graph: bool = False,
) -> Attribution:
    """Explains what `model` says of `inputs`.

    inputs: a tensor [B, *] of float32 or float64, or a tuple of them for a model of several inputs.
    target: None (the model gives one number per example), a class, one class per example,
    [B, K] classes (K maps per example from shared forward passes), a tuple index into the output
    behind its batch axis, summed over what it leaves, with a mask as its last element if wanted,
    one tuple of ints per example in a list, "predicted", or a function `outputs -> [R]` of the
    outputs of R rows, points made of the examples in any order and number; with two required
    parameters, or one named `example`, it also gets int64 [R], the indices of the rows' examples.
    baseline: None (zeros), a number, a tensor that broadcasts, "blur", "mean", "uniform", a tuple
    (one per input), or a list of these: Integrated Gradients averages over it, expected gradients
    draw from it. forward_args, forward_kwargs: further arguments of the model; tensors with the
    batch's length belong to the examples. region: the part of an input [B, C, *spatial] that is
    asked about, as a bool mask [*spatial] or one slice per spatial axis; values are zero elsewhere,
    and what they do not need is not computed. features: segments for methods that take features
    away together: numbers [B | 1, *] like an input (any integers, equal ones belong together; for
    several inputs a tuple), "slic" or "grid:8"; None: every element is one. layout: one letter for
    each axis of an input, such as "BCHW", "BTF" or "BTCHW" (B batch, C channels, F features, T
    time, D, H, W space), or a tuple of them, one per input; found from the model's first
    convolution, recurrence or attention unless given, and asked for where that does not tell and it
    matters.
    Other arguments: see `Engine`.

    Raises InputError, InputTypeError, ModelError or BudgetError with what was got, what is
    expected and the cure. What the model or a target function raises becomes a ModelError, with
    the exception as its `__cause__`.
    """
    engine = Engine(
        model,
        method,
        precision=precision,
        tolerance=tolerance,
        at=at,
        layer_input=layer_input,
        memory_budget=memory_budget,
        points_per_launch=points_per_launch,
        lean=lean,
        progress=progress,
        rows=rows,
        create_graph=create_graph,
    )
    return engine(
        inputs,
        target,
        baseline,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
        region=region,
        features=features,
        layout=layout,
    )
