"""DeepLift and DeepLiftShap: differences from baselines, shared out layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import GradientAttribution
from saliency_fast.captum.contract import (
    as_args,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    filled,
    like_inputs,
    like_types,
    public,
)
from saliency_fast.captum.forward import Neuron
from saliency_fast.captum.run import Asked, explained
from saliency_fast.errors import ContractError
from saliency_fast.methods import DeepLift as Rescaled


class DeepLift(GradientAttribution):
    """(x - x') times DeepLIFT's multipliers by the rescale rule (Shrikumar, 2017)."""

    def __init__(
        self, model: Callable[..., Any], multiply_by_inputs: bool = True, eps: float = 1e-10
    ) -> None:
        super().__init__(model)
        self.model, self.eps = model, eps
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
    ) -> Any:
        """Maps like the inputs, and the delta of each example [B] where it is asked for.

        custom_attribution_func(multipliers), or with inputs, or also with baselines: what maps are
        made of these tuples instead.
        """
        parts = as_tuple(inputs)
        given = as_baselines(baselines, parts)
        check_baselines(parts, given)
        starts, further = filled(parts, given), additional_forward_args
        asked = self._asked(parts, target, further, baselines=starts, whole=self._is_whole())
        maps = self._made(asked, starts, custom_attribution_func)
        found = like_inputs(inputs, maps)
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(found, starts, parts, target, further)

    def _made(self, asked: Asked, starts: Inputs, custom: Callable[..., Inputs] | None) -> Inputs:
        """Maps by the multipliers of a call, of as many of its inputs as there are starts."""
        found = explained(Rescaled(self.eps, multiply=False, captum=True), asked)[: len(starts)]
        parts = tuple(x.detach() for x in asked.inputs[: len(starts)])
        multipliers = like_types(found, parts)
        starts = tuple(one.detach() for one in starts)
        if custom is not None:
            return _custom(custom, multipliers, parts, starts)
        if not self.multiplies_by_inputs:
            return multipliers
        both = zip(multipliers, parts, starts, strict=True)
        return tuple((x - start) * one for one, x, start in both)

    def _is_whole(self) -> bool:
        """Captum takes the mean of softmax's multipliers over the whole batch."""
        model = self.forward_func
        model = model.model if isinstance(model, Neuron) else model
        modules = model.modules() if isinstance(model, nn.Module) else ()
        return any(type(one) is nn.Softmax for one in modules)

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs


def _custom(
    function: Callable[..., Inputs], multipliers: Inputs, inputs: Inputs, baselines: Inputs
) -> Inputs:
    if not callable(function):
        raise ContractError(
            f"`custom_attribution_func` must be a callable function but {type(function)} provided"
        )
    count = len(signature(function).parameters)
    if not 1 <= count <= 3:
        raise ContractError(
            "`custom_attribution_func` must take at least one and at most 3 arguments: got "
            f"{count}; they are the multipliers, inputs and baselines"
        )
    return function(*(multipliers, inputs, baselines)[:count])


class DeepLiftShap(DeepLift):
    """The mean of DeepLift's maps over a set of baselines (Lundberg, 2017)."""

    def __init__(self, model: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs)

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
    ) -> Any:
        """Maps like the inputs, and deltas [B * M], example-major, where they are asked for.

        baselines: [M, *] for each input, or a function that returns them, of the inputs if it takes
        an argument.
        """
        parts = as_tuple(inputs)
        each = Each.of(parts, inputs, baselines, "DeepLift")
        found = super().attribute(
            *(each.inputs, each.baselines, each.target(target)),
            *(each.further(additional_forward_args), return_convergence_delta),
            custom_attribution_func,
        )
        maps, delta = found if return_convergence_delta else (found, None)
        values = like_inputs(inputs, each.means(maps))
        return (values, delta) if return_convergence_delta else values


@dataclass(frozen=True)
class Each:
    """Every example with every row of a set of baselines, example-major: [B * M, *] per input."""

    inputs: Inputs
    baselines: Inputs
    count: int

    @classmethod
    def of(cls, parts: Inputs, inputs: Any, baselines: Any, single: str) -> Each:
        """baselines: a set for each input, or a function that returns them; single: the class for
        one baseline.
        """
        if callable(baselines):
            baselines = baselines(inputs) if signature(baselines).parameters else baselines()
        rows = as_baselines(baselines, parts)
        first = rows[0]
        if not isinstance(first, Tensor) or len(first) < 2:
            raise ContractError(
                "Baselines distribution has to be provided in form of a torch.Tensor with more "
                f"than one example but found: {first}. If baselines are provided in shape of "
                f"scalars or with a single baseline example, `{single}` approach can be used "
                "instead."
            )
        batch, count = len(parts[0]), len(first)
        return cls(
            tuple(x.detach().repeat_interleave(count, 0) for x in parts),
            tuple(one.repeat(batch, *(1,) * (one.dim() - 1)) for one in map(_tensor, rows)),
            count,
        )

    def target(self, target: Any) -> Any:
        """An example's target for each of its rows."""
        return _repeated(as_target(target), self.count)

    def further(self, further: Any) -> tuple[Any, ...] | None:
        """An example's arguments for each of its rows."""
        return tuple(_repeated(one, self.count) for one in as_args(further)) or None

    def means(self, maps: Inputs) -> Inputs:
        """The mean over the baselines of every example."""
        return tuple(one.view(-1, self.count, *one.shape[1:]).mean(1) for one in maps)


def _tensor(rows: Tensor | float) -> Tensor:
    if not isinstance(rows, Tensor):
        raise ContractError(
            f"Baselines distribution has to be provided in form of a torch.Tensor: got {rows}; "
            "pass a tensor [M, ...] for each input"
        )
    return rows


def _repeated(value: Any, count: int) -> Any:
    """An example's value for each of its baselines."""
    if isinstance(value, list):
        return [one for one in value for _ in range(count)]
    many = isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1
    return value.repeat_interleave(count, 0) if many else value
