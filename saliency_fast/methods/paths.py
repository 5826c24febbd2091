"""Integrals of the gradient along a path that ends at the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import square_norm
from saliency_fast.engine.layers import need_batch_first
from saliency_fast.engine.points import PADDINGS, Blur, Line
from saliency_fast.engine.recipe import (
    Level,
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    WeightedSum,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import accumulators, by_example, unknown_error
from saliency_fast.methods.parts.paths import HELD, GuidedPath, StraightPath
from saliency_fast.methods.parts.quadrature import NESTED, RULES, level, nested_levels
from saliency_fast.model.layers import LayerTaps
from saliency_fast.model.preserve import restored_random_state


@dataclass(frozen=True)
class IntegratedGradients:
    """(x - x') * integral of the gradient from the baseline x' to the input x (Sundararajan, 2017).

    The path is the straight line.

    Args:
        steps: Points on the line, or of the first level where a tolerance is given.
        rule: "midpoint", "trapezoid", "gauss_legendre", "left" or "right". None is "midpoint", or
            "trapezoid" with a tolerance, since its refinement only doubles the points.
        tolerance: Relative error, under 1. Points are added until the map's estimated relative L2
            error and the completeness delta relative to the score's gain are both under it, or
            `max_steps` is reached; `Attribution.converged` tells which.
        max_steps: Most points of an example, with a tolerance.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> method = sf.IntegratedGradients(steps=20)
        >>> att = sf.explain(model, torch.ones(2, 4), target=1, method=method)
        >>> bool((att.delta.abs() < 1e-3).all())
        True
    """

    steps: int = 50
    rule: str | None = None
    tolerance: float | None = None
    max_steps: int = 2048
    name = "integrated_gradients"

    def __post_init__(self) -> None:
        if self.rule is not None:
            checks.choice("rule", self.rule, NESTED if self.tolerance else tuple(RULES))
        checks.whole("steps", self.steps, RULES[self._rule].least)
        checks.whole("max_steps", self.max_steps, 1)
        checks.positive("tolerance", self.tolerance, optional=True)
        if self.tolerance is not None:
            if self.tolerance >= 1:
                raise InputError(f"tolerance is a relative error under 1: got {self.tolerance}")
            refine = RULES[self._rule].refined
            if refine and self.max_steps < (needed := refine(self.steps)):
                raise InputError(
                    f"max_steps leaves no room to refine {self.steps} steps: got {self.max_steps}, "
                    f"expected at least {needed}"
                )

    @property
    def _rule(self) -> str:
        return self.rule or ("midpoint" if self.tolerance is None else "trapezoid")

    def recipe(self) -> Recipe:
        rule = RULES[self._rule]
        if self.tolerance is None:
            levels: tuple[Level, ...] = (level(rule, self.steps),)
        else:
            levels = tuple(nested_levels(rule, self.steps, self.max_steps))
        return WeightedSum(
            Line(), levels, factor="difference", baseline="one", tolerance=self.tolerance
        )


@dataclass(frozen=True)
class BlurIG:
    """Integral of the gradient along ever sharper blurs of the input (Xu et al., 2020).

    There is no baseline: the path starts at a blur of `max_sigma`. Blurs the one to three axes
    behind the channels. The change along the path is the blur's exact derivative, so that values
    sum to the score's gain over the most blurred input.

    Args:
        steps, rule: As of `IntegratedGradients`.
        max_sigma: Standard deviation of the first blur, in pixels.
        padding: What is beyond the edges: "zeros" or "replicate".
        spacing: The blur falls like (1 - alpha)^spacing; 1 is the published spacing, 2 has more
            points where detail appears, for the same integral.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> x, method = torch.ones(2, 1, 5, 5), sf.BlurIG(steps=4, max_sigma=2.0)
        >>> sf.explain(model, x, target=1, method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    steps: int = 50
    max_sigma: float = 50.0
    rule: str = "midpoint"
    padding: str = "zeros"
    spacing: float = 2.0
    name = "blur_ig"

    def __post_init__(self) -> None:
        checks.choice("rule", self.rule, tuple(RULES))
        checks.whole("steps", self.steps, RULES[self.rule].least)
        checks.positive("max_sigma", self.max_sigma)
        checks.choice("padding", self.padding, tuple(PADDINGS))
        checks.positive("spacing", self.spacing)
        if self.spacing < 1:
            raise InputError(f"spacing must be at least 1: got {self.spacing}")

    def recipe(self) -> Recipe:
        blurs = Blur(float(self.max_sigma), self.padding, float(self.spacing))
        points = (level(RULES[self.rule], self.steps),)
        return WeightedSum(blurs, points, factor="path", baseline="one")


@dataclass(frozen=True)
class GuidedIG:
    """Integrated Gradients on a path that avoids large gradients (Kapishnikov, 2021).

    Elements with small gradients move first. Each step covers 1/steps of the L1 distance to the
    input; points are evaluated one after another.

    Args:
        steps: Points of each path; each target has its own path.
        fraction: Share of elements, those with the smallest gradients, that move first.
        max_dist: Share of its own displacement by which an element may leave the line, from 0 (the
            straight path) to 1 (free).

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> method = sf.GuidedIG(steps=10)
        >>> sf.explain(model, torch.ones(2, 4), target=1, method=method).values.shape
        torch.Size([2, 4])
    """

    steps: int = 200
    fraction: float = 0.25
    max_dist: float = 0.02
    name = "guided_ig"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.share("fraction", self.fraction)
        checks.share("max_dist", self.max_dist)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps, baseline="one", held=HELD)

    def _rounds(self, context: RoundContext) -> Rounds:
        path = GuidedPath(context)
        for number in range(self.steps):
            # One after another: each point follows from the gradient at the one before.
            yield Round(
                path.write, path.example, path.target, gradients=True, each=path.keep_gradients
            )
            path.step((number + 1) / self.steps, self.fraction, self.max_dist)
            yield Maps(path.values, unknown_error(context))
        return Maps(path.values, unknown_error(context))


@dataclass(frozen=True)
class IDGI:
    """Each step's gain on the straight path, in proportion to squared gradients (Yang, 2023).

    The sum over steps of g^2 (f' - f) / <g, g>, with gradient g and score f at the start of a step
    and f' at its end. The values meet the score's gain whatever the steps, unless a gradient
    vanishes; they have one sign where the score rises, or falls, all along the path.

    Args:
        steps: Steps on the path, of `steps` + 1 points.

    Raises:
        InputError, InputTypeError: `steps` is no positive int.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> att = sf.explain(model, torch.ones(2, 4), target=1, method=sf.IDGI(steps=5))
        >>> bool((att.delta.abs() < 1e-5).all())
        True
    """

    steps: int = 50
    name = "idgi"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one")

    def _rounds(self, context: RoundContext) -> Rounds:
        targets = context.scores.shape[1]
        totals = accumulators(context.inputs, context.scores.numel())
        path = StraightPath(context, [step / self.steps for step in range(self.steps + 1)])

        def each(rows: slice, result: RoundResult) -> None:
            for example, weight, here, there in path.pairs(rows, result):
                gain = (there.scores - here.scores) * weight[:, None]
                for k, grads in enumerate(here.grads):
                    norm = torch.stack([square_norm(one) for one in grads]).sum(0)
                    share = torch.where(norm > 0, gain[:, k] / norm, 0.0)
                    for total, gradient in zip(totals, grads, strict=True):
                        ops.accumulate(total, gradient, example * targets + k, share, "square")

        yield Round(path.write, path.example, path.alpha, gradients=True, each=each)
        return Maps(by_example(totals, targets), unknown_error(context))


@dataclass(frozen=True)
class Conductance:
    """Integral of a layer's gradient times its change along the straight path (Dhamdhere, 2018).

    The path is in the input; the call's `at` names the layer, by default the last spatial one. The
    integral is a sum over steps of the gradient at the start of each times the layer's change.

    Args:
        steps: Steps on the path, of `steps` + 1 points.
        rule: Where the points are, as of `IntegratedGradients`; "trapezoid" reaches both ends.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> att = sf.explain(model, torch.ones(2, 4), target=1, method=sf.Conductance(), at="0")
        >>> att.values.shape
        torch.Size([2, 3])
    """

    steps: int = 50
    rule: str = "trapezoid"
    name = "conductance"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.choice("rule", self.rule, tuple(RULES))

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one", layers="auto")

    def _rounds(self, context: RoundContext) -> Rounds:
        if len(context.layers) > 1:
            raise InputError(
                f"conductance is about one layer: got {len(context.layers)}; call once for each, "
                "since every layer's values sum to the whole gain"
            )
        targets, totals = context.scores.shape[1], list[Inputs]()
        path = StraightPath(context, sorted(RULES[self.rule].points(self.steps + 1)[0].tolist()))

        def each(rows: slice, result: RoundResult) -> None:
            need_batch_first(result.taps, rows.stop - rows.start)
            totals[:] = totals or [accumulators(result.taps, context.scores.numel())]
            for example, weight, here, there in path.pairs(rows, result):
                changes = [b - a for a, b in zip(here.taps, there.taps, strict=True)]
                for k, grads in enumerate(here.grads):
                    for total, gradient, change in zip(totals[0], grads, changes, strict=True):
                        slot = example * targets + k
                        ops.accumulate(total, gradient * change, slot, weight, "sum")

        taps = _BatchFirst(context.layers, context.layer_input)
        yield Round(path.write, path.example, path.alpha, taps=taps, each=each)
        return Maps(by_example(totals[0], targets), unknown_error(context))


@dataclass(frozen=True)
class _BatchFirst(LayerTaps):
    """Taps at layers whose tensors have the batch on their first axis, which is checked once."""

    _checked: list[bool] = field(default_factory=list, compare=False)

    def prepare(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Raises InputError where one row alone has another first axis.

        A launch of as many rows as there are steps may hide it.
        """
        if self._checked:
            return
        with torch.no_grad(), restored_random_state(lambda: True, rows[0].device):
            _, tensors = self.run(lambda: run(tuple(one.clone() for one in rows)))
        need_batch_first(tensors, 1)
        self._checked.append(True)
