"""LayerDeepLift, LayerDeepLiftShap: DeepLIFT from what a layer gives for inputs and baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import InternalAttribution, LayerAttribution
from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    check_baselines,
    filled,
    public,
)
from saliency_fast.captum.deep_lift import DeepLift, DeepLiftShap, Each
from saliency_fast.captum.inside import Inside


class LayerDeepLift(LayerAttribution, DeepLift):
    """(a - a') times DeepLIFT's multipliers at a layer (Shrikumar, 2017)."""

    def __init__(
        self, model: Callable[..., Any], layer: nn.Module, multiply_by_inputs: bool = True
    ) -> None:
        InternalAttribution.__init__(self, model, layer)
        # After the other, which makes it with its defaults on the way to the common base.
        DeepLift.__init__(self, model, multiply_by_inputs)

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Like the layer's tensors, and the delta of each example [B] where it is asked for.

        grad_kwargs: with `materialize_grads` a layer that the output does not use gets zeros.
        """
        parts = as_tuple(inputs)
        given = as_baselines(baselines, parts)
        check_baselines(parts, given)
        starts, further = filled(parts, given), additional_forward_args
        inside = Inside.of(self, attribute_to_layer_input)
        ends = inside.need_floats(inside.read(parts, further))
        (begins,) = inside.need_floats(inside.read(starts, further))
        asked = inside.asked(
            *(ends, parts, target, further, None), baselines=begins, whole=self._is_whole()
        )
        touched = bool((grad_kwargs or {}).get("materialize_grads"))
        asked = inside.between(asked, parts, starts, touched=touched)
        flat = self._made(asked, begins, custom_attribution_func)
        found = inside.like_layers(inside.grouped(flat, ends))
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(flat, starts, parts, target, further)


class LayerDeepLiftShap(LayerDeepLift, DeepLiftShap):
    """The mean of LayerDeepLift's maps over a set of baselines (Lundberg, 2017)."""

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
    ) -> Any:
        """Like the layer's tensors, and deltas [B * M], example-major, where they are asked for.

        baselines: of the inputs, [M, *] for each, or a function that returns them.
        """
        parts = as_tuple(inputs)
        each = Each.of(parts, parts, baselines, "LayerDeepLift")
        found = LayerDeepLift.attribute.__wrapped__(  # type: ignore[attr-defined]
            *(self, each.inputs, each.baselines, each.target(target)),
            *(each.further(additional_forward_args), return_convergence_delta),
            *(attribute_to_layer_input, custom_attribution_func),
        )
        maps, delta = found if return_convergence_delta else (found, None)
        means = each.means(maps if isinstance(maps, tuple) else (maps,))
        values = means if isinstance(maps, tuple) else means[0]
        return (values, delta) if return_convergence_delta else values
