"""Contract: the argument forms of Captum 0.9, validated with the words that its users know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.errors import ContractError
from saliency_fast.model.casts import cast

Method = TypeVar("Method", bound=Callable[..., Any])
Baselines = tuple[Tensor | int | float, ...]


def public(method: Method) -> Method:
    """Marks a method that others call as `method.__wrapped__(self, ...)`, as Captum's own do."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return called  # type: ignore[return-value]


def as_tuple(inputs: Any) -> Inputs:
    """Inputs as a tuple of tensors."""
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
    """A tuple where the inputs were one, also of one; else the only tensor."""
    return values if isinstance(inputs, tuple) else values[0]


def like_types(values: Inputs, inputs: Inputs) -> Inputs:
    """Values in the types of their inputs: the engine's are float32 where these are half types."""
    return tuple(one.to(x.dtype) for one, x in zip(values, inputs, strict=True))


def copies(inputs: Inputs) -> Inputs:
    """Tensors that a model may write to."""
    return tuple(x.clone() for x in inputs)


def floating(inputs: Inputs) -> Inputs:
    """Inputs that arithmetic has made floating: whole numbers in PyTorch's default type."""
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


def check_baselines(inputs: Inputs, baselines: Baselines, *, drawn: bool = False) -> None:
    """Raises where baselines do not go with their inputs. drawn: they are a set to draw from."""
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
    """A target with PyTorch's and Python's numbers in the place of NumPy's."""
    if isinstance(target, np.ndarray):
        return torch.as_tensor(target)
    if isinstance(target, np.integer):
        return int(target)
    if type(target) in (list, tuple):
        return type(target)(map(as_target, target))
    return target


def check_target(target: Any, batch: int) -> None:
    """Raises where targets are not one per example."""
    many = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
    if many and len(target) != batch:
        raise ContractError(
            f"The number of samples provied in theinput {batch} does not match with the number of "
            f"targets. {len(target)}; pass one target per example, or one int for all"
        )
