"""Saliency and InputXGradient: the gradient at the input itself."""

from __future__ import annotations

from typing import Any

from saliency_fast.captum.attribution import GradientAttribution
from saliency_fast.captum.contract import as_tuple, like_inputs, like_types, public
from saliency_fast.captum.run import explained
from saliency_fast.methods import Gradient
from saliency_fast.methods import InputXGradient as TimesInput


class Saliency(GradientAttribution):
    """The gradient of the score at the input (Simonyan, 2013)."""

    @public
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        abs: bool = True,
        additional_forward_args: Any = None,
    ) -> Any:
        """Maps like the inputs; abs: of the gradient's size alone."""
        parts = as_tuple(inputs)
        asked = self._asked(parts, target, additional_forward_args)
        maps = explained(Gradient(absolute=bool(abs)), asked)
        return like_inputs(inputs, like_types(maps, parts))


class InputXGradient(GradientAttribution):
    """The input times the gradient there (Shrikumar, 2016)."""

    @public
    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Maps like the inputs."""
        parts = as_tuple(inputs)
        maps = explained(TimesInput(), self._asked(parts, target, additional_forward_args))
        return like_inputs(inputs, like_types(maps, parts))

    @property
    def multiplies_by_inputs(self) -> bool:
        return True
