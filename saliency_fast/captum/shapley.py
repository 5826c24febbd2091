"""Shapley values in Captum's shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import PerturbationAttribution
from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    check_baselines,
    like_inputs,
    public,
)
from saliency_fast.captum.passes import Asked
from saliency_fast.captum.perturbation import (
    default_masks,
    for_fill,
    numbers_of,
    read_masks,
)
from saliency_fast.captum.perturbed import (
    Draws,
    Maps,
    check_at_once,
    perturbed,
    promised,
)
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.methods import shapley
from saliency_fast.methods.parts.coalitions import Game

AT_ONCE = "Ablations per evaluation must be at least 1."


class ShapleyValueSampling(PerturbationAttribution):
    """Mean gains of features in random orders, from PyTorch's global generator."""

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Maps in float32, [*output, *]: like the inputs where it is one number per row."""
        call = self._call(
            *(inputs, baselines, target, additional_forward_args, feature_mask),
            *(perturbations_per_eval, show_progress),
        )
        return _shaped(inputs, perturbed(*self._sampled(call, n_samples)))

    @public
    def attribute_future(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Future[Any]:
        """What `attribute` returns, as a future, for a function that returns futures."""
        call = self._call(
            *(inputs, baselines, target, additional_forward_args, feature_mask),
            *(perturbations_per_eval, show_progress),
        )
        method, asked, draws = self._sampled(call, n_samples)
        return promised(method, asked, partial(_shaped, inputs), draws)

    def _sampled(self, asked: Asked, samples: int) -> tuple[Method, Asked, Draws]:
        assert asked.features is not None
        known, count = _numbers(asked.features, asked.inputs)
        if len(known) < count:
            warnings.warn(
                "Feature mask is missing some integers between 0 and num_features, for optimal "
                "performance, make sure each consecutive integer corresponds to a feature.",
                stacklevel=4,
            )
        draws = Draws()
        return _Walked(samples, known, count, draws), asked, draws

    def _call(
        self,
        inputs: Any,
        baselines: Any,
        target: Any,
        further: Any,
        feature_mask: Any,
        at_once: int,
        shows: bool,
    ) -> Asked:
        parts = as_tuple(inputs)
        starts = as_baselines(baselines, parts)
        check_baselines(parts, starts)
        check_at_once(at_once, AT_ONCE)
        return Asked(
            *(self.forward_func, for_fill(parts, starts), target, further, starts),
            features=_masks(feature_mask, parts),
            at_once=at_once,
            progress=self.get_name() if shows else "",
        )


def _shaped(inputs: Any, found: Maps) -> Any:
    shape = found.shape or (1,)
    pairs = zip(found.values, as_tuple(inputs), strict=True)
    return like_inputs(inputs, tuple(one.float().view(*shape, *x.shape[1:]) for one, x in pairs))


class ShapleyValues(ShapleyValueSampling):
    """Exact Shapley values: 2^F points for F features, where Captum takes F times F!."""

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Maps in float32, [*output, *]: like the inputs where it is one number per row."""
        call = self._call(
            *(inputs, baselines, target, additional_forward_args, feature_mask),
            *(perturbations_per_eval, show_progress),
        )
        return _shaped(inputs, perturbed(*self._sampled(call, 0)))

    def _sampled(self, asked: Asked, samples: int) -> tuple[Method, Asked, Draws]:
        assert asked.features is not None
        if _numbers(asked.features, asked.inputs)[1] >= 10:
            warnings.warn(
                "You are attempting to compute Shapley Values with at least 10 features, which "
                "will likely be very computationally expensive.Consider using Shapley Value "
                "Sampling instead.",
                stacklevel=4,
            )
        return shapley.ShapleyValues(), asked, Draws()


def _masks(feature_mask: Any, inputs: Inputs) -> Inputs:
    return read_masks(feature_mask, inputs) or default_masks(inputs)


def _numbers(masks: Inputs, inputs: Inputs) -> tuple[list[int], int]:
    """The numbers of features that there are, in order, and how many Captum counts."""
    known = numbers_of(masks, inputs).tolist()
    return known, max(len(known), 1 + max(int(one.max()) for one in masks if one.numel()))


@dataclass(frozen=True)
class _Walked:
    """Orders of all numbers up to the largest, of which only the known ones are features."""

    orders: int
    known: list[int]
    count: int
    draws: Draws
    name = "shapley_sampling"

    def recipe(self) -> Recipe:
        points = max(1, self.orders * (len(self.known) - 1))
        return engine.RoundsRecipe(
            self._rounds, points, baseline="one", gradients=False, features=True
        )

    def _rounds(self, asked: engine.RoundContext) -> engine.Rounds:
        game = Game.of(asked)
        return (yield from shapley.walked(game, self.orders, _ranks(self, game), 1))


def _ranks(method: _Walked, game: Game) -> Callable[[int, int], Tensor]:
    known = torch.tensor(method.known, device="cpu") - min(0, method.known[0])

    def ranks(start: int, stop: int) -> Tensor:
        drawn = method.draws.kept
        if start not in drawn:
            with method.draws.taken():
                drawn[start] = torch.stack(
                    [torch.randperm(method.count, device="cpu") for _ in range(start, stop)]
                )
        place = drawn[start].argsort(dim=1)[:, known]
        return place.argsort(dim=1).argsort(dim=1)[None].to(game.device)

    return ranks
