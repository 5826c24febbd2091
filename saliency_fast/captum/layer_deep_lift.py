"""LayerDeepLift: DeepLIFT from what a layer gives for inputs and baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from saliency_fast.captum.attribution import InternalAttribution, LayerAttribution
from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    check_baselines,
    filled,
    public,
)
from saliency_fast.captum.deep_lift import DeepLift
from saliency_fast.captum.inside import Inside
from saliency_fast.model.routes import Inputs


class LayerDeepLift(LayerAttribution, DeepLift):
    """(a - a') times DeepLIFT's multipliers at a layer (Shrikumar, 2017)."""

    def __init__(
        self, model: Callable[..., Any], layer: nn.Module, multiply_by_inputs: bool = True
    ) -> None:
        DeepLift.__init__(self, model, multiply_by_inputs)
        InternalAttribution.__init__(self, model, layer)

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
        """Like the layer's tensors, and the delta of each example [B] where it is asked for."""
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
        flat = self._made(asked, begins, custom_attribution_func)
        found = inside.like_layers(inside.grouped(flat, ends))
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(flat, starts, parts, target, further)
