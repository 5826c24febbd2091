"""Integrals of the gradient along a path that ends at the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import square_norm
from saliency_fast.engine.layers import need_batch_first
from saliency_fast.engine.points import PADDINGS, Blur, Line
from saliency_fast.engine.recipe import (
    GROWTH,
    Level,
    Maps,
    Recipe,
    Refinement,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    WeightedSum,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import accumulators, by_example, on_lines, unknown_error
from saliency_fast.methods.parts.quadrature import NESTED, RULES, level, nested_levels
from saliency_fast.model.layers import LayerTaps
from saliency_fast.model.preserve import restored_random_state

ADAPTIVE = "adaptive"
FEWEST = 8
"""Points that lie evenly, at least, before the gradients there tell where others go."""
ROUNDS = (9, 24, 64)
"""Points from which others are placed in one, two and three rounds."""
CLOSE = 1e-9
"""Share of a path's length that counts as nothing."""
HELD = 11
"""Maps that a `_GuidedPath` holds at once."""


@dataclass(frozen=True)
class IntegratedGradients:
    """(x - x') * integral of the gradient from the baseline x' to the input x (Sundararajan, 2017).

    The path is the straight line.

    Args:
        steps: Points on the line, or the least where a tolerance is given.
        rule: "adaptive" (each example's points lie where its gradient changes, from 9 on),
            "midpoint", "trapezoid", "gauss_legendre", "left" or "right". None is "adaptive" where
            the gradients that it keeps fit into memory, else "midpoint", or "trapezoid" with a
            tolerance, since its refinement only doubles the points.
        tolerance: Relative error, under 1. Points are added until the map's estimated relative L2
            error and the completeness delta relative to the score's gain are both under it, or
            `max_steps` is reached; `Attribution.converged` tells which.
        max_steps: Most points of an example, with a tolerance.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.IntegratedGradients(steps=20)
        >>> sf.explain(lambda x: x.square().sum(1), x, method=method).values
        tensor([[1., 4.]])
    """

    steps: int = 50
    rule: str | None = None
    tolerance: float | None = None
    max_steps: int = 2048
    name = "integrated_gradients"

    def __post_init__(self) -> None:
        if self.rule is not None:
            rules = NESTED if self.tolerance else tuple(RULES)
            checks.choice("rule", self.rule, (ADAPTIVE, *rules))
        checks.fields(self, steps=RULES[self._rule].least, max_steps=1)
        checks.fields(self, tolerance=checks.optional(checks.positive))
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
        """The fixed rule."""
        if self.rule in (None, ADAPTIVE):
            return "midpoint" if self.tolerance is None else "trapezoid"
        return str(self.rule)

    def recipe(self) -> Recipe:
        rule, refinement = RULES[self._rule], None
        levels: tuple[Level, ...]
        if self.rule in (None, ADAPTIVE) and (self.steps > FEWEST or self.tolerance is not None):
            most = self.steps if self.tolerance is None else self.max_steps
            otherwise = replace(self, rule=self._rule) if self.rule is None else None
            refinement = Refinement(replace(self, rule=ADAPTIVE), otherwise, self.steps, most)
            rounds = sum(self.steps >= least for least in ROUNDS)
            first = min(self.steps, max(FEWEST, math.ceil(self.steps / GROWTH**rounds)))
            levels = (level(RULES["midpoint"], first),)
        elif self.tolerance is None:
            levels = (level(rule, self.steps),)
        else:
            levels = tuple(nested_levels(rule, self.steps, self.max_steps))
        about = (Line(), levels, "sum", "difference", self.tolerance, refinement)
        return WeightedSum(*about, baseline="one")


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

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.ones(2, 1, 5, 5), sf.BlurIG(steps=4, max_sigma=2.0)
        >>> sf.explain(torch.nn.Conv2d(1, 1, 3), x, target=(0, 1, 1), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    steps: int = 50
    max_sigma: float = 50.0
    rule: str = "midpoint"
    padding: str = "zeros"
    spacing: float = 2.0
    name = "blur_ig"

    def __post_init__(self) -> None:
        checks.fields(self, rule=tuple(RULES), padding=tuple(PADDINGS))
        checks.fields(self, steps=RULES[self.rule].least, max_sigma=checks.positive)
        checks.fields(self, spacing=checks.positive)
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

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.GuidedIG(steps=10)
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[1., 2.]])
    """

    steps: int = 200
    fraction: float = 0.25
    max_dist: float = 0.02
    name = "guided_ig"

    def __post_init__(self) -> None:
        checks.fields(self, steps=1, fraction=checks.fraction, max_dist=checks.fraction)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps, baseline="one", held=HELD)

    def _rounds(self, context: RoundContext) -> Rounds:
        path, error = _GuidedPath(context), unknown_error(context)
        launch = Round(path.write, path.example, path.target, True, each=path.keep_gradients)
        for number in range(self.steps):
            # One after another: each point follows from the gradient at the one before.
            yield launch
            path.step((number + 1) / self.steps, self.fraction, self.max_dist)
            yield Maps(path.values, error)
        return Maps(path.values, error)


@dataclass(frozen=True)
class IDGI:
    """Each step's gain on the straight path, in proportion to squared gradients (Yang, 2023).

    The sum over steps of g^2 (f' - f) / <g, g>, with gradient g and score f at the start of a step
    and f' at its end. The values meet the score's gain whatever the steps, unless a gradient
    vanishes; they have one sign where the score rises, or falls, all along the path.

    Args:
        steps: Steps on the path, of `steps` + 1 points.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.IDGI(steps=4)
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[1.5000, 1.5000]])
    """

    steps: int = 50
    name = "idgi"

    def __post_init__(self) -> None:
        checks.integer("steps", self.steps, 1)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one")

    def _rounds(self, context: RoundContext) -> Rounds:
        targets = context.scores.shape[1]
        totals = accumulators(context.inputs, context.scores.numel())
        path = _StraightPath(context, [step / self.steps for step in range(self.steps + 1)])

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

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.ones(2, 4)
        >>> sf.explain(model, x, target=1, method=sf.Conductance(), at="0").values.shape
        torch.Size([2, 3])
    """

    steps: int = 50
    rule: str = "trapezoid"
    name = "conductance"

    def __post_init__(self) -> None:
        checks.fields(self, steps=1, rule=tuple(RULES))

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one", layers="auto")

    def _rounds(self, context: RoundContext) -> Rounds:
        if len(context.layers) > 1:
            raise InputError(
                f"conductance is about one layer: got {len(context.layers)}; call once for each, "
                "since every layer's values sum to the whole gain"
            )
        targets, totals = context.scores.shape[1], list[Inputs]()
        path = _StraightPath(context, sorted(RULES[self.rule].points(self.steps + 1)[0].tolist()))

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
        """Raises InputError where one row alone, unlike a whole launch, has another first axis."""
        if self._checked:
            return
        with torch.no_grad(), restored_random_state(lambda: True, rows[0].device):
            _, tensors = self.run(lambda: run(tuple(one.clone() for one in rows)))
        need_batch_first(tensors, 1)
        self._checked.append(True)


# --- Paths ------------------------------------------------------------------------------------


class _StraightPath:
    """Points at `alphas` on straight lines, and pairs of neighbours, also across launches."""

    def __init__(self, context: RoundContext, alphas: Sequence[float]) -> None:
        x = context.inputs[0]
        self.write, self.count = on_lines(context), len(alphas)
        self.example = torch.arange(len(x), device=x.device).repeat_interleave(self.count)
        self.alpha = torch.tensor(alphas, dtype=torch.float64, device=x.device).repeat(len(x))
        self._last: RoundResult | None = None

    def pairs(
        self, rows: slice, result: RoundResult
    ) -> Iterator[tuple[Tensor, Tensor, RoundResult, RoundResult]]:
        """(example int64 [P], weight float64 [P], result at a point, result at the next point). The
        weight is 0 where the next point is the first one of another example, else 1.
        """
        if self._last is not None:
            yield *self._step(rows.start - 1, rows.start), self._last, _rows(result, 0, 1)
        if (count := rows.stop - rows.start) > 1:
            here, there = _rows(result, 0, count - 1), _rows(result, 1, count)
            yield *self._step(rows.start, rows.stop - 1), here, there
        self._last = _rows(result, count - 1, count, copied=True)

    def _step(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(start, stop, device=self.alpha.device)
        return row // self.count, ((row + 1) % self.count != 0).double()


def _rows(result: RoundResult, start: int, stop: int, *, copied: bool = False) -> RoundResult:
    def own(several: Inputs) -> Inputs:
        rows = tuple(one[start:stop] for one in several)
        return tuple(one.clone() for one in rows) if copied else rows

    (scores,) = own((result.scores,))
    return RoundResult(scores, [own(one) for one in result.grads], own(result.taps))


class _GuidedPath:
    """S = B * K paths that move first where the gradient is small (Kapishnikov, 2021). The N
    elements of all inputs are in one row. progress [S, N]: share of its own displacement that each
    element has moved; total [S, N]: sum of gradient times movement; gradient [S, N]: at the present
    points.
    """

    def __init__(self, context: RoundContext) -> None:
        self.context, self.targets = context, context.scores.shape[1]
        x = context.inputs[0]
        self.example = torch.arange(len(x), device=x.device).repeat_interleave(self.targets)
        self.target = torch.arange(self.targets, device=x.device).repeat(len(x))
        ends = zip(context.inputs, context.baselines, strict=True)
        displacements = [(one - baseline).flatten(1) for one, baseline in ends]
        self.displacement = torch.cat(displacements, 1).repeat_interleave(self.targets, dim=0)
        self.distance = self.displacement.abs()
        zeros = torch.zeros_like(self.displacement)
        self.progress, self.total, self.gradient = zeros, zeros.clone(), zeros.clone()

    def write(self, example: Tensor, target: Tensor) -> Inputs:
        shares = self._per_input(self.progress[example * self.targets + target])
        points = []
        ends = zip(self.context.inputs, self.context.baselines, shares, strict=True)
        for x, baseline, share in ends:
            start = baseline[example % len(baseline)]
            points.append(start + share.to(x.dtype) * (x[example] - start))
        return tuple(points)

    def keep_gradients(self, rows: slice, result: RoundResult) -> None:
        """Keeps the gradient of each row's own target."""
        for k, grads in enumerate(result.grads):
            own = self.target[rows] == k
            flat = torch.cat([one.flatten(1) for one in grads], 1)
            self.gradient[rows][own] = flat[own].to(self.gradient.dtype)

    def step(self, alpha: float, fraction: float, reach: float) -> None:
        """Moves on until the share 1 - `alpha` of each path's L1 length is left."""
        low, high = (
            self.displacement.new_tensor(min(max(alpha + d, 0.0), 1.0)) for d in (-reach, reach)
        )
        size = self.gradient.abs()
        length = _sum(self.distance)
        left = length * (1.0 - alpha)
        # Elements that lag behind the straight path move whatever their gradient.
        self._move(torch.maximum(self.progress, low))
        rank = math.floor(fraction * (self.displacement.shape[1] - 1)) + 1
        active = length > 0
        while True:
            room = self.distance * (high - self.progress)
            over = _sum(self.distance * (1.0 - self.progress)) - left
            ranked = torch.where(room > 0, size, torch.inf)
            chosen = (room > 0) & (ranked <= ranked.kthvalue(rank, dim=1, keepdim=True).values)
            # NaN gradients are never chosen; where nothing can move, rounding alone is left.
            active = active & (over > CLOSE * length) & chosen.any(1)
            if not bool(active.any()):
                return
            share = over / _sum(room * chosen)
            part = share.clamp_max(1.0).to(self.displacement.dtype)[:, None]
            there = torch.where(part < 1.0, self.progress.lerp(high, part), high)
            self._move(torch.where(chosen & active[:, None], there, self.progress))
            active &= share > 1.0

    def _move(self, progress: Tensor) -> None:
        self.total += self.gradient * self.displacement * (progress - self.progress)
        self.progress = progress

    @property
    def values(self) -> Inputs:
        """The maps so far: per input [B, K, *]."""
        return by_example(self._per_input(self.total), self.targets)

    def _per_input(self, rows: Tensor) -> Inputs:
        """Rows [R, N] of all elements as inputs [R, *]."""
        inputs = self.context.inputs
        parts = torch.split(rows, [x[0].numel() for x in inputs], dim=1)
        return tuple(part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, inputs, strict=True))


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(1, dtype=torch.float64)
