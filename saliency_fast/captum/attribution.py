"""Base classes, as Captum has them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast.captum.contract import (
    as_args,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    check_target,
    copies,
    filled,
    public,
)
from saliency_fast.captum.forward import compute_gradients, run_forward
from saliency_fast.captum.run import Asked
from saliency_fast.errors import ContractError
from saliency_fast.model.preserve import preserved


class Attribution:
    """A method of attribution on a function of tensors, read anew at every call."""

    attribute: Callable[..., Any]
    compute_convergence_delta: Callable[..., Any]

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class; where Captum is loaded, a child of it and of Captum's class of that name, so
        that Captum's own classes, which look by `isinstance`, take these methods.
        """
        return _beside_captums(type(self))

    def __reduce__(self) -> Any:
        return _remade, (type(self),), self.__dict__

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError; some of the perturbation classes return maps as futures."""
        return not_promised(self)

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether maps are multiplied by the inputs, or their distance from a baseline."""
        return False

    def has_convergence_delta(self) -> bool:
        """Whether `attribute` takes return_convergence_delta."""
        return False

    @classmethod
    def get_name(cls) -> str:
        """The class's name in words: "Integrated Gradients"."""
        return re.sub(r"(?<!^)([^a-z])", r" \1", cls.__name__)


PACKAGE = "saliency_fast.captum."
_BESIDE: dict[type, type] = {}


def _beside_captums(kind: type) -> type:
    bases = sys.modules.get("captum.attr._utils.attribution")
    if bases is None:
        return kind
    if kind not in _BESIDE:
        names = [one.__name__ for one in kind.__mro__ if one.__module__.startswith(PACKAGE)]
        found = (_named(bases.Attribution, name) for name in names)
        theirs = next((one for one in found if one is not None), None)
        both = (kind,) if theirs is None else (kind, theirs)
        _BESIDE[kind] = type(kind.__name__, both, {"__module__": kind.__module__})
    return _BESIDE[kind]


def _named(kind: type, name: str) -> type | None:
    """Captum's class of that name among a class and its children."""
    if kind.__name__ == name and kind.__module__.startswith("captum."):
        return kind
    children: list[type] = kind.__subclasses__()
    found = (_named(child, name) for child in children)
    return next((one for one in found if one is not None), None)


def _remade(kind: Any) -> Any:
    return kind.__new__(kind)


def not_promised(method: Attribution) -> Any:
    """Raises what Captum's classes without `attribute_future` raise."""
    name = type(method).__name__
    raise NotImplementedError(f"attribute_future is not implemented for {name}")


class GradientAttribution(Attribution):
    """A method that takes gradients at the inputs.

    gradient_func(forward_fn, inputs, target_ind, additional_forward_args): an instance may be given
    another one, which then takes the place of the model's gradients.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.gradient_func: Callable[..., tuple[Tensor, ...]] = compute_gradients

    def _asked(self, inputs: tuple[Tensor, ...], target: Any, further: Any, **more: Any) -> Asked:
        return Asked(
            *(self.forward_func, inputs, target, further), gradient_func=self.gradient_func, **more
        )

    @public
    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: Any,
        end_point: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """The sum of the attributions less F(end_point) - F(start_point), for each example [B]."""
        ends, maps = as_tuple(end_point), as_tuple(attributions)
        starts = filled(ends, as_baselines(start_point, ends))
        for one, end in zip(maps, ends, strict=False):
            if len(one) != len(end):
                raise ContractError(
                    "Attributions tensor and the end_point must match on the first dimension but "
                    f"found attribution: {len(one)} and end_point: {len(end)}"
                )
        check_baselines(ends, starts)
        target = as_target(target)
        check_target(target, len(ends[0]))
        further = as_args(additional_forward_args)
        with torch.no_grad(), preserved(self.forward_func):
            start = run_forward(self.forward_func, copies(starts), target, further)
            end = run_forward(self.forward_func, copies(ends), target, further)
            total = torch.stack([_rows(one) for one in maps]).sum(0)
            return total - (_rows(end) - _rows(start))


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)


class PerturbationAttribution(Attribution):
    """A method that changes inputs and looks at what the function returns."""

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


class InternalAttribution(Attribution):
    """A method on a layer within a model; `device_ids` is kept for those who read it."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func)
        self.layer, self.device_ids = layer, device_ids


class LayerAttribution(InternalAttribution):
    """A method whose maps are like what a layer gives or takes."""

    @staticmethod
    def interpolate(
        layer_attribution: Tensor,
        interpolate_dims: int | tuple[int, ...],
        interpolate_mode: str = "nearest",
    ) -> Tensor:
        """Maps [B, C, *s] at another spatial size."""
        return functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


class NeuronAttribution(InternalAttribution):
    """A method whose maps are of a neuron within a layer."""
