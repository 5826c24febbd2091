"""Calls of the user's function: its output, the score that a target selects, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.errors import ContractError, ModelError, TargetRangeError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.casts import cast
from saliency_fast.model.layers import hooked, tensors_at
from saliency_fast.model.targets import read_of


def run_forward(
    forward: Callable[..., Any], inputs: Inputs, target: Any = None, further: Any = None
) -> Tensor:
    """The target's elements of what the function returns for all rows at once."""
    return selected(read_output(forward(*inputs, *forms.as_args(further))), target)


def read_output(raw: Any) -> Tensor:
    """The tensor to explain in what a function returns: the tensor itself; a Python number as a
    tensor; `logits` or `out` of an output that has one; the first tensor of a tuple or list; the
    only tensor of another output.
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
    target = forms.as_target(target)
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
    """One neuron of a layer as a model of its own, with one number per row; of a layer that runs
    several times the last run counts. selector: see `ARGUMENTS["neuron_selector"]`; a function gets
    a tuple where the layer has several tensors.
    """

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
    leaves = forms.as_tuple(inputs)
    with torch.enable_grad():
        scores = run_forward(forward_fn, leaves, target_ind, additional_forward_args)
        need_one_number(scores)
        result: Inputs = gradients(scores.sum(), leaves, **grad_kwargs)
    return result
