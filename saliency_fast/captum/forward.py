"""Forward: a user's function with its further arguments, and the number that a target picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saliency_fast.captum.contract import as_args, as_tuple
from saliency_fast.errors import ContractError, TargetRangeError
from saliency_fast.model.casts import cast
from saliency_fast.model.gradients import gradients
from saliency_fast.model.routes import Inputs
from saliency_fast.model.targets import tensor_of


def run_forward(
    forward: Callable[..., Any], inputs: Inputs, target: Any = None, further: Any = None
) -> Tensor:
    """What the function returns for all rows at once, and of that what the target picks."""
    return selected(tensor_of(forward(*inputs, *as_args(further))), target)


def selected(output: Tensor, target: Any) -> Tensor:
    """What a target picks of an output [B, *].

    None: all of it; an int, or a tensor of one: that index behind the batch axis; a tuple: several
    of them; a list of ints or a tensor [B]: one class per row; a list of tuples: one place per row.
    """
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
        return _classes(output, torch.tensor(target))
    if not isinstance(target[0], tuple):
        raise ContractError(
            f"Target element type {type(target[0])} in list is not valid; pass ints or tuples"
        )
    return torch.stack([_picked(output, (row, *place)) for row, place in enumerate(target)])


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
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= output.shape[1]:
        raise TargetRangeError(
            f"index {low if low < 0 else high} is out of bounds for dimension 1 with size "
            f"{output.shape[1]}; one class per example counts from 0"
        )
    classes = cast(classes, torch.int64, "target", "pass whole numbers").to(output.device)
    return output.gather(1, classes[:, None]).squeeze(1)


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
    """The gradients of rows' scores at inputs that require them, for methods of users' own.

    Our own methods put the engine in its place, unless an instance was given another one.
    grad_kwargs: of `torch.autograd.grad`.
    """
    leaves = as_tuple(inputs)
    with torch.enable_grad():
        scores = run_forward(forward_fn, leaves, target_ind, additional_forward_args)
        need_one_number(scores)
        found: Inputs = gradients(scores.sum(), leaves, **grad_kwargs)
    return found
