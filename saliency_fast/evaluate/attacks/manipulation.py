"""Manipulation: how far maps can be moved while inputs look alike and decisions stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.errors import InputError, ModelError
from saliency_fast.evaluate.attacks.linf import ascent, check_seed, decisions, project, uniform
from saliency_fast.evaluate.attacks.steering import Steering, steerable
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.similarity import overlap, rank_correlation
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods import Gradient, read_method
from saliency_fast.methods.parts import checks

ATTACKS = ("gradient", "random")
FAILED = (
    "a map that was not moved may yet be: an attack that fails proves nothing; one that succeeds "
    "proves what it found"
)


@dataclass(frozen=True, eq=False)
class Manipulated:
    """What an attack on maps found: inputs [B, *] and the maps of their places, [B, *spatial],
    beside those before; similarity float64 [B]: their rank correlation; kept bool [B]: whether the
    decision is the same.
    """

    inputs: Tensor
    before: Tensor
    after: Tensor
    similarity: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Manipulation(Metric):
    """The rank correlation of maps before and after an attack that moves them as far as it can
    within a ball around the input, where the decision stays (Ghorbani, 2019; Dombrowski, 2019).

    epsilon: the ball's radius in the maximum norm, as a share of each example's own range, within
    which the attacked input stays. steps: of the attack. attack: "gradient" goes against the
    correlation by second derivatives of the model with softplus functions of that steepness in
    ReLU's place, at so many `points` of the map's own; maps that are no sums of gradients are
    attacked through the gradient's. "random" asks for maps alone: weaker, for whatever has no
    gradient. share: of the largest places, whose overlap is in the details. seed: of starts.
    """

    epsilon: float = 0.03
    steps: int = 10
    attack: str = "gradient"
    points: int = 8
    softplus: float = 10.0
    share: float = 0.1
    seed: int = 0
    name: ClassVar[str] = "manipulation"
    better: ClassVar[str] = "higher"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def __post_init__(self) -> None:
        checks.positive("epsilon", self.epsilon)
        checks.whole("steps", self.steps, 1)
        checks.choice("attack", self.attack, ATTACKS)
        checks.whole("points", self.points, 1)
        checks.positive("softplus", self.softplus)
        checks.share("share", self.share)
        check_seed(self.seed)

    def manipulate(self, subject: Subject) -> Manipulated:
        """The attack itself, for those who want to see what it made."""
        decided = subject.first.decisions
        if decided is None:
            raise InputError(
                "manipulation needs a decision to keep: the model or the target gives one number "
                "per example; use a model that returns [B, classes] and a class as target"
            )
        hunt = _Hunt(self, subject, decided)
        return hunt.random() if self.attack == "random" else hunt.steered()

    def _judge(self, subject: Subject) -> Outcome:
        found = self.manipulate(subject)
        still = (subject.inputs.flatten(1) == subject.inputs.flatten(1)[:, :1]).all(1)
        values = found.similarity.masked_fill(~found.kept | still, math.nan)
        caveats = [FAILED]
        if not bool(found.kept.all()):
            caveats.append(f"{int((~found.kept).sum())} decisions were not kept: no value there")
        if bool(still.any()):
            caveats.append(f"{int(still.sum())} inputs are constant and have no range: no value")
        if bool(found.similarity.isnan().any()):
            caveats.append("maps that are constant have no rank correlation: no value there")
        details = {
            "overlap": overlap(found.before, found.after, self.share),
            "unmoved": int((found.inputs == subject.inputs).flatten(1).all(1).sum()),
        }
        through = self._through(subject)
        if self.attack == "gradient" and through == "gradient":
            caveats.append("the attack went through the gradient's map, not through this one's")
        return self._outcome(
            values,
            details=details,
            parameters={"through": "maps" if self.attack == "random" else through},
            caveats=tuple(caveats),
        )

    def _through(self, subject: Subject) -> str:
        return "gradient" if _own_recipe(subject) is None else "itself"


class _Hunt:
    """An attack at work: the best points so far, whose decision is kept and map is farthest."""

    def __init__(self, how: Manipulation, subject: Subject, decided: Tensor) -> None:
        assert subject.model is not None
        x = subject.inputs
        self.how, self.subject, self.model = how, subject, subject.model
        self.decided = decided
        low, high = (one.view(-1, *(1,) * (x.dim() - 1)) for one in x.flatten(1).aminmax(dim=1))
        self.bounds, self.radius = (low, high), how.epsilon * (high - low)
        self.homing = subject.running.engine(subject.model, "gradient")
        self.before = self._places(x)
        self.x, self.after = x.clone(), self.before.clone()
        self.best = rank_correlation(self.before, self.before)

    def steered(self) -> Manipulated:
        """Against the correlation's gradient; back to the decision where it is lost."""
        how, origin = self.how, self.subject.inputs
        recipe, size = _own_recipe(self.subject), 2.5 * self.radius / how.steps
        x = self._within(origin + 0.5 * self.radius * uniform(origin, how.seed))
        for step in range(how.steps):
            maps, kept = self._seen(x)
            try:
                way = self._descent(x, maps, recipe, step)
                if not bool(kept.all()):
                    home = ascent(self.homing, x, self.decided, self.subject.running)
                    way = torch.where(kept.view(-1, *(1,) * (x.dim() - 1)), way, home)
            except ModelError as error:
                raise ModelError(f"{error}; or use Manipulation(attack='random')") from error
            x = self._within(x - size * way.sign())
        self._seen(x)
        return self._found()

    def random(self) -> Manipulated:
        """Random signs on random places, kept where they help; ever fewer places."""
        for step in range(self.how.steps):
            signs = uniform(self.x, self.how.seed, 2 * step).sign()
            chosen = uniform(self.x, self.how.seed, 2 * step + 1).abs()
            share = 0.5 * 0.05 ** (step / self.how.steps)
            self._seen(self._within(self.x + 2.0 * self.radius * signs * (chosen < share)))
        return self._found()

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps at x and whether decisions are kept there; x is noted where it is the best."""
        maps = self._places(x)
        kept = decisions(self.model, x, self.subject.running) == self.decided
        similar = rank_correlation(self.before, maps)
        best = kept & (similar < self.best)
        self.best = torch.where(best, similar, self.best)
        self.x = torch.where(best.view(-1, *(1,) * (x.dim() - 1)), x, self.x)
        self.after = torch.where(best.view(-1, *(1,) * (maps.dim() - 1)), maps, self.after)
        return maps, kept

    def _found(self) -> Manipulated:
        kept = decisions(self.model, self.x, self.subject.running) == self.decided
        return Manipulated(self.x, self.before, self.after, self.best, kept)

    def _within(self, x: Tensor) -> Tensor:
        return project(x, self.subject.inputs, self.radius, self.bounds)

    def _places(self, x: Tensor) -> Tensor:
        values = self.subject.explain(x)
        return values if values.dim() == 2 else values.sum(1)

    @cached_property
    def straight(self) -> Tensor:
        """The gradient's maps before the attack."""
        return self._gradient(self.subject.inputs)

    def _gradient(self, x: Tensor) -> Tensor:
        running = self.subject.running
        values = self.homing(running.cast(x), self.subject.classes, **running.arguments()).values
        assert isinstance(values, Tensor)
        values = running.standard(values)
        return values if values.dim() == 2 else values.sum(1)

    def _descent(self, x: Tensor, maps: Tensor, recipe: WeightedSum | None, step: int) -> Tensor:
        """The gradient of the maps' correlation with those before."""
        running, classes, origin = self.subject.running, self.subject.classes, self.before
        if recipe is None:
            recipe = cast(WeightedSum, Gradient().recipe())
            maps, origin = self._gradient(x), self.straight
        direction = _correlation_slope(maps, origin)
        direction = direction if x.dim() == 2 else direction[:, None]
        direction = running.back(direction)
        steering = Steering(recipe, direction, self.how.points, step, self.how.softplus)
        engine = running.engine(self.model, steering)
        baseline = None if recipe.baseline == "none" else self.subject.started
        found = engine(running.cast(x), classes, baseline, **running.arguments()).values
        assert isinstance(found, Tensor)
        return running.standard(found)


def _own_recipe(subject: Subject) -> WeightedSum | None:
    """The recipe of the subject's maps where an attack can go through it."""
    method: Any = subject.method
    if not (isinstance(method, str) or hasattr(method, "recipe")):
        return None
    recipe = read_method(method).recipe()
    return recipe if steerable(recipe) else None


def _correlation_slope(maps: Tensor, others: Tensor) -> Tensor:
    """The gradient of Pearson's correlation with respect to maps [B, *], scaled to unit length."""
    a, b = (one.flatten(1).double() for one in (maps, others))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    a, b = (one / one.norm(dim=1, keepdim=True).clamp_min(1e-300) for one in (a, b))
    slope = b - (a * b).sum(1, keepdim=True) * a
    slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-300)
    found: Tensor = slope.to(maps.dtype).view_as(maps)
    return found
