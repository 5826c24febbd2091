"""The parameters and argument forms of Captum 0.9, with the error messages that its users know."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import cleandoc, signature
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.errors import ContractError
from saliency_fast.model.casts import cast

Method = TypeVar("Method", bound=Callable[..., Any])
Baselines = tuple[Tensor | int | float, ...]
Windows = tuple[tuple[int, ...], ...]

ARGUMENTS = {
    "inputs": "a tensor [B, *], or a tuple of them, which the function takes first.",
    "baselines": "inputs that stand for no information: a number, a tensor of the inputs' shape or "
    "[1, *], or a tuple with one for each input; None is 0. Of classes that average over baselines "
    "(`GradientShap`, `DeepLiftShap` and its kin) a set [M, *] for each input, or a function that "
    "returns the sets, of the inputs if it takes an argument.",
    "target": "the element of the output that is explained: an int, a tuple of indices after the "
    "batch axis, a list or tensor with one int for each example, or a list of tuples; None where "
    "the function returns one number per example.",
    "additional_forward_args": "further arguments of the function, without attributions: a tuple "
    "of any types, or a single argument.",
    "return_convergence_delta": "whether the result is (attributions, delta): for each example the "
    "sum of the attributions less what the score gains over the baselines, [B]; [B * samples], "
    "example-major, where attributions are means over samples or baselines.",
    "attribute_to_layer_input": "whether the layer's input counts instead of its output.",
    "attribute_to_neuron_input": "whether the neuron is in the layer's input.",
    "neuron_selector": "an index after the batch axis; a tuple of indices and slices, over which "
    "is summed; or a function of the layer's tensor that returns one number per row.",
    "grad_kwargs": "arguments of `torch.autograd.grad`; with them the batch runs at once.",
    "feature_mask": "integers that broadcast to the inputs [1 | B, *], the same for elements that "
    "are one feature; a tuple for a tuple of inputs; None: every element is a feature.",
    "perturbations_per_eval": "perturbed batches in one call of the function.",
    "show_progress": "whether a progress bar counts those calls.",
    "abs": "whether the gradients' absolute values are returned.",
    "n_steps": "points of the path.",
    "method": "the quadrature rule: 'riemann_left', 'riemann_right', 'riemann_middle', "
    "'riemann_trapezoid' or 'gausslegendre'.",
    "internal_batch_size": "the most points at once; None plans memory.",
    "relu_attributions": "whether negative attributions are set to zero.",
    "attr_dim_summation": "whether channels are summed.",
    "interpolate_mode": "the mode in which Grad-CAM's map is resized to the inputs.",
    "custom_attribution_func": "makes attributions of the multipliers, or of multipliers, inputs "
    "and baselines, each a tuple of tensors.",
    "verbose": "whether the rule of each layer is printed.",
    "n_samples": "random samples of each example: points, orders of features, or coalitions.",
    "nt_type": "'smoothgrad' (mean), 'smoothgrad_sq' (mean square) or 'vargrad' (variance).",
    "nt_samples": "noisy copies of each example, from seeds of PyTorch's global generator.",
    "nt_samples_batch_size": "copies of all examples at once; None plans memory.",
    "stdevs": "the standard deviation of noise on the inputs, or one for each input.",
    "draw_baseline_from_distrib": "whether baselines are sets [M, *] to draw rows from.",
    "sliding_window_shapes": "the window's size on each axis after the batch; a tuple of such "
    "tuples for a tuple of inputs.",
    "strides": "the step of the window, a number or one for each axis; a tuple of them for a tuple "
    "of inputs; None is 1.",
    "return_input_shape": "whether elements get their feature's slope.",
    "attributions": "those of each input or layer tensor, [B, *].",
    "start_point": "the baselines.",
    "end_point": "the inputs.",
}
"""The arguments of `attribute`, which mean the same in all classes."""


def public(method: Method) -> Method:
    """Adds `__wrapped__` to a method, by which Captum's classes call the methods they hold."""

    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return called  # type: ignore[return-value]


def with_parameters(parameters: str) -> Callable[[Callable[[Any, Any], Any]], Any]:
    """Gives a method (self, args) the parameters of Captum's method of that name.

    Args:
        parameters: Those after `self`, as in Python: "inputs, target=None".

    Returns:
        A decorator. The method gets its arguments, defaults included, as attributes of `args`, and
        its documentation a section on each of them.
    """
    # As in `collections.namedtuple`: `Signature.bind` takes as long as a layer of a small model.
    bind = eval(f"lambda self, {parameters}: locals()")

    def decorate(method: Callable[[Any, Any], Any]) -> Any:
        @wraps(method)
        def attribute(*args: Any, **kwargs: Any) -> Any:
            bound = bind(*args, **kwargs)
            return method(bound.pop("self"), SimpleNamespace(**bound))

        own = signature(bind)
        lines = [f"    {name}: {ARGUMENTS[name]}" for name in own.parameters if name in ARGUMENTS]
        attribute.__doc__ = "\n".join([cleandoc(method.__doc__ or ""), "", "Args:", *lines])
        attribute.__signature__ = own  # type: ignore[attr-defined]
        bind.__qualname__ = method.__qualname__
        return public(attribute)

    return decorate


def as_tuple(inputs: Any) -> Inputs:
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    if not isinstance(inputs, (tuple, Tensor)):
        raise ContractError(
            "`inputs` must be a torch.Tensor or a tuple[torch.Tensor] but found: "
            f"{type(inputs)}; use torch.as_tensor(inputs), or tuple(inputs) for several"
        )
    for number, one in enumerate(parts):
        if not isinstance(one, Tensor):
            raise ContractError(
                f"Given input is not a torch.Tensor: input {number} is {type(one)}; use "
                "torch.as_tensor"
            )
    return parts


def like_inputs(inputs: Any, values: Inputs) -> Any:
    """A tuple where the inputs were a tuple, also of one; else the only tensor."""
    return values if isinstance(inputs, tuple) else values[0]


def like_types(values: Inputs, inputs: Inputs) -> Inputs:
    """Values in the dtypes of their inputs: of half types the engine returns float32."""
    return tuple(one.to(x.dtype) for one, x in zip(values, inputs, strict=True))


def copies(inputs: Inputs) -> Inputs:
    """Clones, which a model may overwrite."""
    return tuple(x.clone() for x in inputs)


def floating(inputs: Inputs) -> Inputs:
    """Inputs whose whole numbers are promoted to PyTorch's default floating dtype."""
    kind = torch.get_default_dtype()
    return tuple(x if x.is_floating_point() else x.to(kind) for x in inputs)


def as_args(further: Any) -> tuple[Any, ...]:
    """`additional_forward_args` as a tuple; a list is one argument."""
    if further is None:
        return ()
    return further if isinstance(further, tuple) else (further,)


def as_baselines(baselines: Any, inputs: Inputs) -> Baselines:
    """Baselines as a tuple; zeros where there are none, of bool inputs False."""
    if baselines is None:
        return tuple(False if x.dtype == torch.bool else 0 for x in inputs)
    parts = baselines if isinstance(baselines, tuple) else (baselines,)
    for one in parts:
        if not isinstance(one, (Tensor, int, float)):
            raise ContractError(
                "baseline input argument must be either a torch.Tensor or a number             "
                f"however {type(one)} detected; use torch.as_tensor"
            )
    return parts


def drawn_from(baselines: Any, inputs: Any) -> Any:
    """Sets of baselines, which a function of the inputs, or without arguments, may return."""
    if not callable(baselines):
        return baselines
    return baselines(inputs) if signature(baselines).parameters else baselines()


def check_baselines(inputs: Inputs, baselines: Baselines, *, drawn: bool = False) -> None:
    """Raises where the shapes of baselines and inputs differ.

    Args:
        inputs: tensors [B, *].
        baselines: one for each input.
        drawn: whether a baseline is a set [M, *] to draw rows from.
    """
    if len(inputs) != len(baselines):
        raise ContractError(
            "Input and baseline must have the same dimensions, baseline has "
            f"{len(baselines)} features whereas input has {len(inputs)}; pass a tuple with one "
            "baseline per input"
        )
    for x, one in zip(inputs, baselines, strict=True):
        if not isinstance(one, Tensor):
            continue
        if drawn and x.shape[1:] != one.shape[1:]:
            raise ContractError(
                "The samples in input and baseline batches must have the same shape or the "
                "baseline corresponding to the input tensor must be a scalar. Found baseline: "
                f"{list(one.shape)} and input: {list(x.shape)}"
            )
        if not drawn and x.shape != one.shape and one.shape[:1] != (1,):
            raise ContractError(
                "Baseline can be provided as a tensor for just one input and broadcasted to the "
                "batch or input and baseline must have the same shape or the baseline "
                "corresponding to each input tensor must be a scalar. Found baseline: "
                f"{list(one.shape)} and input: {list(x.shape)}"
            )


def filled(inputs: Inputs, baselines: Baselines) -> Inputs:
    """Baselines as tensors with the batch of their inputs."""
    return tuple(
        (torch.full_like(x, one) if x.is_floating_point() else _full(x, one))
        if not isinstance(one, Tensor)
        else torch.cat([one] * len(x))
        if len(x) > len(one) == 1
        else one
        for x, one in zip(inputs, baselines, strict=True)
    )


def _full(x: Tensor, number: float) -> Tensor:
    kept = cast(torch.tensor(number, device=x.device), x.dtype, "baselines", "use x.float()")
    return kept.expand_as(x).clone()


def as_target(target: Any) -> Any:
    """A target whose NumPy numbers and arrays are Python's numbers and tensors."""
    if isinstance(target, np.ndarray):
        return torch.as_tensor(target)
    if isinstance(target, np.integer):
        return int(target)
    if type(target) in (list, tuple):
        return type(target)(map(as_target, target))
    return target


def check_target(target: Any, batch: int) -> None:
    many = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
    if many and len(target) != batch:
        raise ContractError(
            f"The number of samples provied in theinput {batch} does not match with the number of "
            f"targets. {len(target)}; pass one target per example, or one int for all"
        )


def has_rows(value: Any, least: int = 0) -> bool:
    """Whether a value is a list, or a tensor with a batch axis and at least so many elements."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.numel() >= least
    return isinstance(value, list)


def tiled(value: Any, count: int, batch: int | None = None) -> Any:
    """A target or argument for `count` copies of the batch, one batch after another.

    Args:
        value: a list or tensor with a row for each example; anything else is returned as it is.
        count: copies of the batch.
        batch: the length of tensors that are repeated; None: all of two elements or more are.
    """
    if not has_rows(value, 2 if batch is None else 0):
        return value
    if isinstance(value, list):
        return value * count
    return torch.cat([value] * count) if batch in (None, len(value)) else value


def interleaved(value: Any, count: int, least: int = 2) -> Any:
    """A target or argument with each example's row `count` times in succession."""
    if not has_rows(value, least):
        return value
    if isinstance(value, list):
        return [one for one in value for _ in range(count)]
    return value.repeat_interleave(count, 0)


def row_of(value: Any, row: slice, batch: int) -> Any:
    """The rows of a target or argument that has one for each example of the batch."""
    return value[row] if has_rows(value) and len(value) == batch else value


def arguments_of(further: Any, change: Callable[..., Any], *how: Any) -> tuple[Any, ...]:
    """`additional_forward_args` with its tensors changed by one of the functions above; lists are
    single arguments and stay.
    """
    return tuple(change(one, *how) if isinstance(one, Tensor) else one for one in as_args(further))


def read_masks(feature_mask: Any, inputs: Inputs) -> Inputs | None:
    """Feature masks, one per input; raises where one does not broadcast to its input."""
    if feature_mask is None:
        return None
    masks, result = as_tuple(feature_mask), []
    if len(masks) != len(inputs):
        raise ContractError(
            f"feature_mask must have one tensor for each of {len(inputs)} inputs: got {len(masks)}"
        )
    for number, (mask, x) in enumerate(zip(masks, inputs, strict=True)):
        pairs = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if mask.dim() > x.dim() or any(got not in (1, want) for got, want in pairs):
            raise ContractError(
                f"the shape of feature mask (index {number}) is invalid,input shape: {x.shape}, "
                f"feature mask shape {mask.shape}; give it the input's shape, or 1 on any axis"
            )
        cure = "number features by whole numbers"
        result.append(cast(mask.detach(), torch.int64, "feature_mask", cure).to(x.device))
    return tuple(result)


def default_masks(inputs: Inputs) -> Inputs:
    """A feature for each element after the batch axis, counted over all inputs: int64 [1, *]."""
    result, count = [], 0
    for x in inputs:
        row = x[:1]
        result.append(count + torch.arange(row.numel(), device=x.device).view(row.shape))
        count += row.numel()
    return tuple(result)


def numbers_of(masks: Inputs, inputs: Inputs) -> Tensor:
    """The numbers of the features that inputs have, in order."""
    own = [mask.flatten() for mask, x in zip(masks, inputs, strict=True) if x.numel()]
    result: Tensor = torch.unique(torch.cat(own))
    return result


def for_fill(inputs: Inputs, baselines: Baselines) -> Inputs:
    """Inputs of whole numbers are promoted where their baselines are floating."""

    def is_floating(one: Any) -> bool:
        return isinstance(one, float) or (isinstance(one, Tensor) and one.is_floating_point())

    pairs = zip(inputs, baselines, strict=True)
    return tuple(floating((x,))[0] if is_floating(one) else x for x, one in pairs)


def sliding_windows(shapes: Any, strides: Any, inputs: Inputs) -> tuple[Windows, Windows]:
    """A window and a stride for each axis after the batch axis of each input."""
    steps = (1,) * len(inputs) if strides is None else strides
    if len(inputs) == 1 and not (isinstance(steps, tuple) and len(steps) == 1):
        steps = (steps,)
    if not isinstance(steps, tuple) or len(steps) != len(inputs):
        raise ContractError(
            f"Strides must be provided for each input tensor. Got {strides!r} for {len(inputs)} "
            "inputs; pass a tuple with an entry per input"
        )
    for number, (step, x) in enumerate(zip(steps, inputs, strict=True)):
        if not isinstance(step, int) and not (isinstance(step, tuple) and len(step) == x.dim() - 1):
            raise ContractError(
                f"Stride for input index {number} is {step}, which is invalid for input with shape "
                f"{x.shape}. It must be either an int or a tuple with length equal to "
                "len(input_shape) - 1."
            )
    if len(shapes) and isinstance(shapes[0], int):
        shapes = (shapes,)
    if len(shapes) != len(inputs):
        raise ContractError(
            "Must provide sliding window dimensions for each input tensor. Got "
            f"{shapes!r} for {len(inputs)} inputs; pass a tuple with a tuple per input"
        )
    wide = []
    for number, (shape, step, x) in enumerate(zip(shapes, steps, inputs, strict=True)):
        if not isinstance(shape, tuple) or len(shape) != x.dim() - 1:
            raise ContractError(
                f"Occlusion shape for input index {number} is {shape} but should be a tuple with "
                f"{x.dim()} dimensions. Leave out the batch: {x.dim() - 1} numbers"
            )
        wide.append(step if isinstance(step, tuple) else (step,) * len(shape))
        _check_window(shape, wide[-1], tuple(x.shape[1:]))
    return tuple(shapes), tuple(wide)


def _check_window(shape: tuple[int, ...], step: tuple[int, ...], size: tuple[int, ...]) -> None:
    if any(width > most for width, most in zip(shape, size, strict=True)):
        raise ContractError(
            f"Sliding window dimensions {shape} cannot exceed input dimensions{size}. Use a "
            "smaller window"
        )
    if any(one < 1 for one in (*shape, *step)):
        raise ContractError(
            f"Sliding windows and strides must be at least 1: got {shape} and {step}"
        )
    if any(s > w and w < n for s, w, n in zip(step, shape, size, strict=True)):
        raise ContractError(
            f"Stride dimension {step} cannot be larger than sliding window shape dimension "
            f"{shape}. Use a smaller stride"
        )
