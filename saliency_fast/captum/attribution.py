"""Base classes with Captum's names, and what their `attribute` methods share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import (
    as_args,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    check_target,
    copies,
    filled,
    for_fill,
    like_inputs,
    read_masks,
    with_parameters,
)
from saliency_fast.captum.attribute_call import AttributeCall
from saliency_fast.captum.forward import compute_gradients, run_forward
from saliency_fast.errors import ContractError
from saliency_fast.model.preserve import preserved


class Attribution:
    """An attribution method of a function of tensors, which is read anew in every call.

    `attribute` returns attributions of the inputs' shape: a tensor, or a tuple where `inputs` is
    one. Its arguments mean the same in all classes; `help` of the method lists them.

    Args:
        forward_func: (also `model`) a module or function that returns scores for its inputs.
        layer: the module of `forward_func` at which a layer class attributes; some take a list.
        device_ids: kept for code that reads it.
        multiply_by_inputs: False returns what inputs (or their difference from the baselines)
            would be multiplied by.

    Raises:
        ContractError: wrong arguments, with the leading words of Captum's AssertionError.
        ModelError: the function's output cannot be explained.
    """

    attribute: Callable[..., Any]
    compute_convergence_delta: Callable[..., Any]
    _multiply_by_inputs = False
    _has_delta = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class; where Captum is loaded, a child of it and of Captum's class of that name, so
        that Captum's own classes, which check by `isinstance`, accept these methods.
        """
        return _beside_captums(type(self))

    def __reduce__(self) -> Any:
        return _remade, (type(self),), self.__dict__

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError; some perturbation classes return attributions as futures."""
        name = type(self).__name__
        raise NotImplementedError(f"attribute_future is not implemented for {name}")

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are multiplied by the inputs or their difference from baselines."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """Whether `attribute` takes return_convergence_delta."""
        return self._has_delta

    @classmethod
    def get_name(cls) -> str:
        """The class's name in words, as in "Integrated Gradients"."""
        return re.sub(r"(?<!^)([^a-z])", r" \1", cls.__name__)


PACKAGE = "saliency_fast.captum."
_BESIDE: dict[type, type] = {}


def _beside_captums(kind: type) -> type:
    bases = sys.modules.get("captum.attr._utils.attribution")
    if bases is None:
        return kind
    if kind not in _BESIDE:
        names = [one.__name__ for one in kind.__mro__ if one.__module__.startswith(PACKAGE)]
        theirs = next(filter(None, (_named(bases.Attribution, name) for name in names)), None)
        both = (kind,) if theirs is None else (kind, theirs)
        _BESIDE[kind] = type(kind.__name__, both, {"__module__": kind.__module__})
    return _BESIDE[kind]


def _named(kind: type, name: str) -> type | None:
    """Captum's class of that name among a class and its children."""
    if kind.__name__ == name and kind.__module__.startswith("captum."):
        return kind
    children: list[type] = kind.__subclasses__()
    return next(filter(None, (_named(child, name) for child in children)), None)


def _remade(kind: Any) -> Any:
    return kind.__new__(kind)


class GradientAttribution(Attribution):
    """A method that takes gradients at the inputs.

    `gradient_func(forward_fn, inputs, target_ind, additional_forward_args)` may be assigned to an
    instance, and then takes the place of the model's gradients.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.gradient_func: Callable[..., tuple[Tensor, ...]] = compute_gradients

    def _call(self, given: Any, **fields: Any) -> AttributeCall:
        """The call of `attribute` with the arguments `given`, their baselines checked.

        Fields are the call's, instead of those that the arguments would give.
        """
        further = vars(given)
        parts = fields.pop("inputs", None) or as_tuple(given.inputs)
        if "baselines" in further:
            fields["baselines"] = as_baselines(given.baselines, parts)
            check_baselines(parts, fields["baselines"])
        return AttributeCall(
            *(self.forward_func, parts, further.get("target"), given.additional_forward_args),
            gradient_func=self.gradient_func,
            points_per_launch=further.get("internal_batch_size"),
            **fields,
        )

    def _result(self, given: Any, call: AttributeCall, maps: Inputs, result: Any = None) -> Any:
        """Maps like the inputs, or `result`, with the delta of the maps where it is wanted."""
        result = like_inputs(given.inputs, maps) if result is None else result
        if not getattr(given, "return_convergence_delta", False):
            return result
        of = call.baselines, call.inputs, call.target, call.further
        return result, self.compute_convergence_delta(maps, *of)

    @with_parameters(
        "attributions, start_point, end_point, target=None, additional_forward_args=None"
    )
    def compute_convergence_delta(self, given: Any) -> Tensor:
        """The sum of the attributions less F(end_point) - F(start_point), for each example [B]."""
        ends, maps = as_tuple(given.end_point), as_tuple(given.attributions)
        starts = filled(ends, as_baselines(given.start_point, ends))
        for one, end in zip(maps, ends, strict=False):
            if len(one) != len(end):
                raise ContractError(
                    "Attributions tensor and the end_point must match on the first dimension but "
                    f"found attribution: {len(one)} and end_point: {len(end)}"
                )
        check_baselines(ends, starts)
        target = as_target(given.target)
        check_target(target, len(ends[0]))
        further = as_args(given.additional_forward_args)
        with torch.no_grad(), preserved(self.forward_func):
            start = run_forward(self.forward_func, copies(starts), target, further)
            end = run_forward(self.forward_func, copies(ends), target, further)
            total = torch.stack([_row_sums(one) for one in maps]).sum(0)
            return total - (_row_sums(end) - _row_sums(start))


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)


class PerturbationAttribution(Attribution):
    """A method that changes inputs and compares what the function returns."""

    _multiply_by_inputs = True
    _perturbations_error = ""
    """What Captum says of a wrong perturbations_per_eval; "" where it does not check it."""

    def _call(self, given: Any, **fields: Any) -> AttributeCall:
        """The call of `attribute` with the arguments `given`, or with other fields."""
        parts, at_once = as_tuple(given.inputs), given.perturbations_per_eval
        starts = as_baselines(getattr(given, "baselines", None), parts)
        if self._perturbations_error and (not isinstance(at_once, int) or at_once < 1):
            words = self._perturbations_error
            raise ContractError(f"{words} Got {at_once!r}; pass perturbations_per_eval=1")
        own = {
            "baselines": starts,
            "features": read_masks(getattr(given, "feature_mask", None), parts),
            "at_once": at_once,
            "progress": self.get_name() if given.show_progress else "",
        }
        of = given.target, given.additional_forward_args
        return AttributeCall(self.forward_func, for_fill(parts, starts), *of, **(own | fields))


class InternalAttribution(Attribution):
    """A method at a layer of a model."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func)
        self.layer, self.device_ids = layer, device_ids


class LayerAttribution(InternalAttribution):
    """A method whose attributions have the shapes of a layer's tensors."""

    @staticmethod
    def interpolate(
        layer_attribution: Tensor,
        interpolate_dims: int | tuple[int, ...],
        interpolate_mode: str = "nearest",
    ) -> Tensor:
        """Resizes attributions.

        Args:
            layer_attribution: [B, C, *spatial].
            interpolate_dims: the new spatial size.
            interpolate_mode: of `torch.nn.functional.interpolate`.

        Returns:
            Attributions [B, C, *interpolate_dims].

        Example:
            >>> LayerAttribution.interpolate(torch.ones(1, 1, 2, 2), (4, 4)).shape
            torch.Size([1, 1, 4, 4])
        """
        return functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


class NeuronAttribution(InternalAttribution):
    """A method whose attributions are of one neuron of a layer."""


class LayerGradientAttribution(LayerAttribution, GradientAttribution):
    """A method that takes gradients at a layer."""
