"""LayerIntegratedGradients: the line between what layers give for baselines and for inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    check_baselines,
    filled,
    public,
)
from saliency_fast.captum.inside import Inside
from saliency_fast.captum.integrated_gradients import (
    IntegratedGradients,
    Steps,
    check_steps,
    integrated,
)
from saliency_fast.captum.layer import LayerGradientAttribution, Layers


class LayerIntegratedGradients(LayerGradientAttribution):
    """Integrated Gradients at a layer, or at several at once (Sundararajan, 2017)."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.ig = IntegratedGradients(forward_func, multiply_by_inputs)

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Like the layer's tensors, and the delta of each example [B] where it is asked for.

        baselines: of the inputs; they go through the model to the layer.
        """
        parts = as_tuple(inputs)
        starts = as_baselines(baselines, parts)
        check_baselines(parts, starts)
        check_steps(n_steps, method)
        starts, further = filled(parts, starts), additional_forward_args
        inside = Inside.of(self, attribute_to_layer_input)
        ends = inside.need_floats(inside.read(parts, further))
        begins = inside.need_floats(inside.read(starts, further))
        asked = inside.asked(
            *(ends, parts, target, further, grad_kwargs),
            baselines=tuple(one for several in begins for one in several),
            points_per_launch=internal_batch_size,
        )
        flat = integrated(Steps(method, n_steps, self.multiplies_by_inputs), asked)
        found = inside.like_layers(inside.grouped(flat, ends))
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(flat, starts, parts, target, further)

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.ig.multiplies_by_inputs
