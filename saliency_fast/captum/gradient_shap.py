"""GradientShap: expected gradients by sampling, with a delta for every sample."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast.captum.attribution import GradientAttribution
from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    like_inputs,
    public,
)
from saliency_fast.captum.noise_tunnel import NoiseTunnel
from saliency_fast.captum.run import explained
from saliency_fast.errors import ContractError
from saliency_fast.methods import Gradient


class GradientShap(GradientAttribution):
    """Mean of (x - x') times the gradient at a random point between a noisy x and a random baseline
    x' (Lundberg, 2017; Erion, 2021).
    """

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Maps like the inputs, and where asked for deltas [B * n_samples], example-major.

        baselines: a set [M, *] for each input, or a function that returns them, of the inputs if
        it takes an argument. Rows and places on the lines come from NumPy's global generator.
        """
        if callable(baselines):
            baselines = baselines(inputs) if signature(baselines).parameters else baselines()
        starts = as_baselines(baselines, as_tuple(inputs))
        if not isinstance(starts[0], Tensor):
            raise ContractError(
                "Baselines distribution has to be provided in a form of a torch.Tensor "
                f"{starts[0]}; pass a tensor [M, ...] for each input"
            )
        line = _RandomLine(self.forward_func, self.multiplies_by_inputs)
        line.gradient_func = self.gradient_func
        return NoiseTunnel(line).attribute(
            inputs,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=starts,
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs


class _RandomLine(GradientAttribution):
    """(x - x') times the gradient at one random point between them."""

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        parts = as_tuple(inputs)
        drawn = torch.from_numpy(np.random.uniform(0.0, 1.0, len(parts[0])))
        points = tuple(
            torch.lerp(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand_as(x), x, share)
            for x, b in zip(parts, baselines, strict=True)
            for share in [drawn.to(x).view(-1, *(1,) * (x.dim() - 1))]
        )
        maps = explained(Gradient(), self._asked(points, target, additional_forward_args))
        if self.multiplies_by_inputs:
            maps = tuple(m * (x - b) for m, x, b in zip(maps, parts, baselines, strict=True))
        found = like_inputs(inputs, maps)
        if not return_convergence_delta:
            return found
        further = target, additional_forward_args
        return found, self.compute_convergence_delta(found, baselines, inputs, *further)

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs
