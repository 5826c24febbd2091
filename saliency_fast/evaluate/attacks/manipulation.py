"""Attacks on maps: how far maps can be moved while inputs change little and decisions stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.points import Line, Noise
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    Rows,
    WeightedSum,
)
from saliency_fast.errors import InputError, ModelError
from saliency_fast.evaluate.attacks.adversarial import (
    STEP_SHARE,
    check_seed,
    decisions,
    loss_gradient,
    project,
    uniform,
)
from saliency_fast.evaluate.inputs import Subject, is_method, position_sums
from saliency_fast.evaluate.metric import ROBUSTNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.similarity import is_constant, overlap, rank_correlation
from saliency_fast.methods import read_method
from saliency_fast.methods.gradient import Gradient
from saliency_fast.methods.parts import checks
from saliency_fast.rules import Softplus

ATTACKS = ("gradient", "random")
FAILED = (
    "a map that was not moved may yet be: an attack that fails proves nothing; one that succeeds "
    "proves what it found"
)
TINY = 1e-300
"""Keeps the norm of a zero map from dividing by zero."""
FIRST_SHARE, DECAY = 0.5, 0.05
"""Of random search: the share of positions that change at first, and its decay over all steps."""
GOLDEN = 0.6180339887498949
"""Its multiples modulo 1 are evenly spread for any count (golden ratio)."""


@dataclass(frozen=True, eq=False)
class Manipulated:
    """The result of an attack on maps.

    Args:
        inputs: The attacked inputs [B, *].
        before: The maps of the original inputs, [B, *spatial].
        after: The maps of the attacked inputs, [B, *spatial].
        similarity: The rank correlation of both, float64 [B].
        kept: Whether the decision is the same, bool [B].
    """

    inputs: Tensor
    before: Tensor
    after: Tensor
    similarity: Tensor
    kept: Tensor


@in_suite(ROBUSTNESS, "Ghorbani et al., 2019; Dombrowski et al., 2019", quick={"steps": 5})
@dataclass(frozen=True)
class Manipulation(Metric):
    """The rank correlation of maps before and after an attack that moves them as far as it can
    within a ball around the input, where the decision stays (Ghorbani, 2019; Dombrowski, 2019).

    `details`: `overlap` of the largest values, float64 [B], and `unmoved`, how many inputs the
    attack did not change.

    Args:
        epsilon: The ball's radius in the maximum norm, as a share of each example's own range,
            which the attacked input does not leave.
        steps: Of the attack.
        attack: "gradient" descends the correlation by second derivatives of the model; maps that
            are no sums of gradients are attacked through the map of the gradient. "random" only
            explains: weaker, for methods and models without second derivatives.
        points: How many of the map's own points a step of the gradient attack uses.
        softplus: The steepness of the softplus functions that replace ReLU, whose second
            derivative is zero.
        share: Of the positions, for the overlap of the largest values.
        seed: Of the starts.

    Example:
        >>> model, x = torch.nn.Linear(4, 3), torch.arange(4.0)[None]
        >>> maps = model.weight[:1]
        >>> outcome = Manipulation(steps=2)(model, x, maps, target=0, method="gradient")
        >>> round(float(outcome.values), 6)
        1.0
    """

    epsilon: float = 0.03
    steps: int = 10
    attack: str = "gradient"
    points: int = 8
    softplus: float = 10.0
    share: float = 0.1
    seed: int = 0
    name = "manipulation"
    better = "higher"
    needs = ("model", "method")

    def __post_init__(self) -> None:
        check_fields(self, epsilon=checks.positive, steps=1, attack=ATTACKS, points=1)
        check_fields(self, softplus=checks.positive, share=checks.fraction, seed=check_seed)

    def manipulate(self, data: Subject) -> Manipulated:
        """The attack alone, which shows the attacked inputs and maps."""
        decided = data.first.decisions
        if decided is None:
            raise InputError(
                "manipulation needs a decision to keep: the model or the target gives one number "
                "per example; use a model that returns [B, classes] and a class as target"
            )
        search = _Search(self, data, decided)
        return search.random() if self.attack == "random" else search.steered()

    def _evaluate(self, data: Subject) -> Outcome:
        found = self.manipulate(data)
        still = is_constant(data.inputs)
        caveats = [FAILED]
        if not bool(found.kept.all()):
            caveats.append(f"{int((~found.kept).sum())} decisions were not kept: no value there")
        if bool(still.any()):
            caveats.append(f"{int(still.sum())} inputs are constant and have no range: no value")
        if bool(found.similarity.isnan().any()):
            caveats.append("maps that are constant have no rank correlation: no value there")
        through = "gradient" if _own_recipe(data) is None else "itself"
        if self.attack == "gradient" and through == "gradient":
            caveats.append("the attack went through the gradient's map, not through this one's")
        return self._outcome(
            found.similarity.masked_fill(~found.kept | still, math.nan),
            details={
                "overlap": overlap(found.before, found.after, self.share),
                "unmoved": int((found.inputs == data.inputs).flatten(1).all(1).sum()),
            },
            parameters={"through": "maps" if self.attack == "random" else through},
            caveats=tuple(caveats),
        )


class _Search:
    """The state of an attack: of each example the point whose decision is kept and whose map is the
    least similar.
    """

    def __init__(self, how: Manipulation, data: Subject, decided: Tensor) -> None:
        assert data.model is not None
        x = data.inputs
        self.how, self.data, self.model = how, data, data.model
        self.decided = decided
        low, high = (_over(one, x) for one in x.flatten(1).aminmax(dim=1))
        self.bounds, self.radius = (low, high), how.epsilon * (high - low)
        self.gradient = data.running.engine(data.model, "gradient")
        self.before = position_sums(data.explain(x))
        self.x, self.after = x.clone(), self.before.clone()
        self.best = rank_correlation(self.before, self.before)

    def steered(self) -> Manipulated:
        """Descends the correlation; where a decision is lost, a step leads back to it."""
        how, origin = self.how, self.data.inputs
        recipe, size = _own_recipe(self.data), STEP_SHARE * self.radius / how.steps
        x = self._within(origin + 0.5 * self.radius * uniform(origin, how.seed))
        for step in range(how.steps):
            maps, kept = self._visit(x)
            try:
                direction = self._descent(x, maps, recipe, step)
                if not bool(kept.all()):
                    back = loss_gradient(self.gradient, x, self.decided, self.data.running)
                    direction = torch.where(_over(kept, x), direction, back)
            except ModelError as error:
                raise ModelError(f"{error}; or use Manipulation(attack='random')") from error
            x = self._within(x - size * direction.sign())
        self._visit(x)
        return self._result()

    def random(self) -> Manipulated:
        """Random signs at random positions, kept where they help; ever fewer positions."""
        for step in range(self.how.steps):
            signs = uniform(self.x, self.how.seed, 2 * step).sign()
            chosen = uniform(self.x, self.how.seed, 2 * step + 1).abs()
            share = FIRST_SHARE * DECAY ** (step / self.how.steps)
            self._visit(self._within(self.x + 2.0 * self.radius * signs * (chosen < share)))
        return self._result()

    def _visit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps at x and whether decisions are kept there; keeps x where it is the best."""
        maps = position_sums(self.data.explain(x))
        kept = decisions(self.model, x, self.data.running) == self.decided
        similar = rank_correlation(self.before, maps)
        best = kept & (similar < self.best)
        self.best = torch.where(best, similar, self.best)
        self.x = torch.where(_over(best, x), x, self.x)
        self.after = torch.where(_over(best, maps), maps, self.after)
        return maps, kept

    def _result(self) -> Manipulated:
        kept = decisions(self.model, self.x, self.data.running) == self.decided
        return Manipulated(self.x, self.before, self.after, self.best, kept)

    def _within(self, x: Tensor) -> Tensor:
        return project(x, self.data.inputs, self.radius, self.bounds)

    @cached_property
    def gradient_before(self) -> Tensor:
        """The gradient's maps before the attack."""
        return self._gradient(self.data.inputs)

    def _gradient(self, x: Tensor) -> Tensor:
        running = self.data.running
        return position_sums(running.standard(running.map(self.gradient, x, self.data.classes)))

    def _descent(self, x: Tensor, maps: Tensor, recipe: WeightedSum | None, step: int) -> Tensor:
        """The gradient of the maps' correlation with those before, at x."""
        running, origin = self.data.running, self.before
        if recipe is None:
            recipe = Gradient().recipe()
            maps, origin = self._gradient(x), self.gradient_before
        direction = correlation_slope(maps, origin)
        direction = running.back(direction if x.dim() == 2 else direction[:, None])
        steering = Steering(recipe, direction, self.how.points, step, self.how.softplus)
        engine = running.engine(self.model, steering)
        baseline = None if recipe.baseline == "none" else self.data.model_baseline
        return running.standard(running.map(engine, x, self.data.classes, baseline))


def _over(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [B] that broadcast to a tensor [B, *]."""
    return rows.view(-1, *(1,) * (like.dim() - 1))


def _own_recipe(data: Subject) -> WeightedSum | None:
    """The recipe of the maps, where an attack can differentiate it."""
    if not is_method(data.method):
        return None
    recipe = read_method(data.method).recipe()
    return recipe if steerable(recipe) else None


def correlation_slope(maps: Tensor, others: Tensor) -> Tensor:
    """The gradient of Pearson's correlation with respect to maps [B, *], scaled to unit length."""
    a, b = (one.flatten(1).double() for one in (maps, others))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    a, b = (one / one.norm(dim=1, keepdim=True).clamp_min(TINY) for one in (a, b))
    slope = b - (a * b).sum(1, keepdim=True) * a
    slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(TINY)
    result: Tensor = slope.to(maps.dtype).view_as(maps)
    return result


def steerable(recipe: Recipe) -> TypeGuard[WeightedSum]:
    """Whether maps are sums of gradients at points with a known derivative by the input."""
    return (
        isinstance(recipe, WeightedSum)
        and recipe.rules is None
        and recipe.reduction == "sum"
        and recipe.factor in ("none", "input", "difference")
        and isinstance(recipe.family, (Line, Noise))
    )


@dataclass(frozen=True, eq=False)
class Steering:
    """A method whose map is the gradient by the input of sum(map * direction), for the map of
    another method.

    of: the recipe of that map, which must be `steerable`. direction: [B, C | 1, *]. points: how
    many of the recipe's points are used, others in each `turn`. softplus: the steepness of the
    softplus functions that replace ReLU (Dombrowski, 2019).
    """

    of: WeightedSum
    direction: Tensor
    points: int
    turn: int
    softplus: float
    name = "steering"

    def recipe(self) -> Recipe:
        baseline = "none" if self.of.baseline == "none" else "fill"
        rules = Softplus(self.softplus)
        return RoundsRecipe(self._rounds, self._count, baseline=baseline, rules=rules, second=True)

    @property
    def _count(self) -> int:
        return min(self.points, self.of.levels[0].count)

    def _rounds(self, asked: RoundContext) -> Rounds:
        (x,), (start,) = asked.inputs, asked.baselines
        factor = {"none": torch.ones_like(x[:1]), "input": x, "difference": x - start}
        push = (self.direction.to(x) * factor[self.of.factor]).expand_as(x)
        source = self.of.family.bind(asked.inputs, asked.baselines)
        level = self.of.levels[0].to(x.device)
        spread = torch.arange(self._count, device=x.device) + (self.turn * GOLDEN) % 1.0
        chosen = (spread * (level.count / self._count)).long().clamp_max(level.count - 1)
        weight = level.weight[chosen] / level.weight[chosen].sum()
        # The derivative by the input is alpha for a point on the line, and 1 for a noisy copy.
        follows = weight * level.node[chosen] if self.of.family.straight else weight
        moved, total = torch.zeros_like(x), torch.zeros_like(x)
        example = torch.arange(len(x), device=x.device).repeat(self._count)
        number = torch.arange(self._count, device=x.device).repeat_interleave(len(x))

        def write(example: Tensor, number: Tensor) -> Inputs:
            at = chosen[number]
            return source.write(
                Rows(example, level.node[at], level.weight[at], level.replicate[at])
            )

        def projected(grads: Inputs, example: Tensor) -> Tensor:
            return (grads[0] * push[example]).flatten(1).sum(1, keepdim=True)

        def each(rows: slice, found: RoundResult) -> None:
            _, _, gradient, product = found.grads[0]
            for sums, parts, by in ((moved, product, follows), (total, gradient, weight)):
                scaled = parts * by[number[rows]].to(x).view(-1, *(1,) * (x.dim() - 1))
                sums.index_add_(0, example[rows], scaled.to(x))

        yield Round(write, example, number, project=projected, each=each)
        if self.of.factor != "none":
            # The factor depends on the input, too.
            moved = moved + self.direction.to(x) * total
        return Maps((moved[:, None],))
