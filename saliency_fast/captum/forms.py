"""The parameters, argument forms, targets and calls of Captum 0.9, with its error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import cleandoc, signature
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.errors import ContractError, ModelError, TargetRangeError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.casts import cast
from saliency_fast.model.layers import hooked, tensors_at
from saliency_fast.model.targets import read_of

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
    """`additional_forward_args` with its tensors, but not those in lists, changed by a function."""
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


# Calls of the user's function.


def run_forward(
    forward: Callable[..., Any], inputs: Inputs, target: Any = None, further: Any = None
) -> Tensor:
    """The target's elements of what the function returns for all rows at once."""
    return selected(read_output(forward(*inputs, *as_args(further))), target)


def read_output(raw: Any) -> Tensor:
    """The tensor to explain in an output: itself; a Python number as a tensor; `logits` or `out` of
    an output that has one; the first of a tuple or list; the only one of another output.
    """
    if isinstance(raw, (int, float)):
        dtype = torch.int64 if isinstance(raw, int) else torch.float64
        return torch.tensor(raw, dtype=dtype, device="cpu")
    if (result := read_of(raw)) is not None:
        return result
    if isinstance(raw, torch.Future):
        raise ContractError(
            "when using the attribute function, initial_eval should have non-Future type rather "
            f"than {type(raw)}; use attribute_future, which some of the perturbation classes have"
        )
    several = tensors_of(raw)
    if not several:
        raise ContractError(
            "the return of forward_func must be a tensor, int, or float, received: "
            f"{raw!r:.200}; return one tensor with a row for each row of the inputs"
        )
    if len(several) > 1 and not isinstance(raw, (tuple, list)):
        raise ModelError(
            f"the model returns a {type(raw).__name__} of {len(several)} tensors, of which none is "
            "named 'logits' or 'out': pass a function that returns the one to explain, such as "
            "lambda *x: model(*x)['scores']"
        )
    return several[0]


def selected(output: Tensor, target: Any) -> Tensor:
    """The elements of an output [B, *] that a target selects: None for all elements; an int, or a
    tensor of one, for that index after the batch axis; a tuple for several such indices; a list of
    ints or a tensor [B] for one class per row; a list of tuples for one index per row.
    """
    target = as_target(target)
    if target is None:
        return output
    if isinstance(target, Tensor) and target.numel() == 1 and isinstance(target.item(), int):
        target = int(target.item())
    if isinstance(target, (int, tuple)):
        return _column(output, target if isinstance(target, tuple) else (target,))
    if isinstance(target, Tensor):
        if target.dim() != 1 or target.numel() != len(output):
            raise ContractError(
                f"Tensor target dimension {target.shape} is not valid. {output.shape}; pass one "
                "integer, or one for each row of the output"
            )
        return _classes(output, target)
    if not isinstance(target, list):
        raise ContractError(
            f"Target type {type(target)} is not valid; pass an int, a tuple, a tensor or a list"
        )
    if len(target) != len(output):
        raise ContractError(
            f"Target list length does not match output! got {len(target)} targets, the output has "
            f"{len(output)} rows"
        )
    if isinstance(target[0], int):
        return _classes(output, torch.tensor(target, device="cpu"))
    if not isinstance(target[0], tuple):
        raise ContractError(
            f"Target element type {type(target[0])} in list is not valid; pass ints or tuples"
        )
    return torch.stack([_picked(output, (row, *index)) for row, index in enumerate(target)])


def _column(output: Tensor, index: tuple[Any, ...]) -> Tensor:
    if len(index) > output.dim() - 1:
        raise ContractError(
            f"Cannot choose target column with output shape {output.shape}: got {len(index)} "
            "indices; pass target=None where the model returns one number per example"
        )
    return _picked(output, (slice(None), *index))


def _picked(output: Tensor, index: tuple[Any, ...]) -> Tensor:
    try:
        return output[index]
    except IndexError as error:
        raise TargetRangeError(
            f"{error}: the output is {list(output.shape)}, and the target {index[1:]}"
        ) from error


def _classes(output: Tensor, classes: Tensor) -> Tensor:
    if output.dim() != 2:
        raise ContractError(
            f"Output must be 2D to select tensor of targets: got {list(output.shape)}; pass one "
            "tuple per example"
        )
    if classes.is_floating_point() or classes.is_complex():
        raise TargetRangeError(
            f"targets count classes: got a tensor of {classes.dtype}, expected whole numbers; use "
            "target.long() if that is what they are"
        )
    low, high = map(int, torch.aminmax(classes))
    if low < 0 or high >= output.shape[1]:
        raise TargetRangeError(
            f"index {low if low < 0 else high} is out of bounds for dimension 1 with size "
            f"{output.shape[1]}; one class per example counts from 0"
        )
    classes = cast(classes, torch.int64, "target", "pass whole numbers").to(output.device)
    return output.gather(1, classes[:, None]).squeeze(1)


def missing_layer(layer: nn.Module) -> ContractError:
    return ContractError(
        "Forward hook did not obtain any outputs for given layer: the "
        f"{type(layer).__name__} did not run; name one that the model calls"
    )


@dataclass(frozen=True)
class Neuron:
    """One neuron of a layer as a model with one number per row; of several runs the last counts."""

    model: Callable[..., Any]
    layer: nn.Module
    of_input: bool
    selector: Any

    def __call__(self, *inputs: Any) -> Tensor:
        result: list[Inputs] = []

        def seen(_: int, value: Any) -> None:
            result.append(tuple(tensors_at(value)))

        with hooked((self.layer,), seen, of_input=self.of_input):
            self.model(*inputs)
        if not result:
            raise missing_layer(self.layer)
        several = result[-1]
        if callable(self.selector):
            chosen: Tensor = self.selector(several if len(several) > 1 else several[0])
            return chosen
        if len(several) != 1:
            raise ContractError(
                "Cannot select neuron index from layer with multiple tensors,consider providing a "
                f"neuron selector function instead: got {len(several)} tensors"
            )
        index = self.selector if isinstance(self.selector, tuple) else (self.selector,)
        picked = _column(several[0], index)
        sums = any(isinstance(one, slice) for one in index)
        return picked.reshape(len(picked), -1).sum(1) if sums else picked


def need_one_number(output: Tensor) -> None:
    """Raises where rows still hold several numbers."""
    if output.dim() and output[0].numel() != 1:
        raise ContractError(
            "Target not provided when necessary, cannot take gradient with respect to multiple "
            f"outputs: got {list(output.shape[1:])} numbers per example; pass target= with an "
            "index for each of these axes"
        )


def compute_gradients(
    forward_fn: Callable[..., Any],
    inputs: Tensor | Inputs,
    target_ind: Any = None,
    additional_forward_args: Any = None,
    **grad_kwargs: Any,
) -> Inputs:
    """The gradients of the rows' scores at inputs that require them, for users' own methods.

    It is the default `gradient_func` of the gradient classes, which compute the same by the engine.

    Args:
        forward_fn: the user's function.
        inputs: tensors [B, *] that require gradients.
        target_ind: see `selected`.
        additional_forward_args: further arguments of the function.
        **grad_kwargs: of `torch.autograd.grad`.
    """
    leaves = as_tuple(inputs)
    with torch.enable_grad():
        scores = run_forward(forward_fn, leaves, target_ind, additional_forward_args)
        need_one_number(scores)
        result: Inputs = gradients(scores.sum(), leaves, **grad_kwargs)
    return result
