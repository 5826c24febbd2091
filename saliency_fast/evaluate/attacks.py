"""Adversarial attacks: on decisions (FGSM, PGD), and on maps while decisions stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine import recipe as recipes
from saliency_fast.engine.bind import read_inputs
from saliency_fast.engine.points import Line, Noise
from saliency_fast.engine.recipe import RoundContext, RoundResult, WeightedSum
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.evaluate.inputs import EvaluationInput, Model, position_sums
from saliency_fast.evaluate.maps import is_constant, overlap, rank_correlation
from saliency_fast.evaluate.metric import ROBUSTNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome, caveats_of
from saliency_fast.evaluate.scores import RunOptions, Scorer
from saliency_fast.methods.gradient import Gradient
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import PREDICTED, Reader, Target, read_targets, tensor_of
from saliency_fast.ops import philox, random_bits
from saliency_fast.rules.rectifiers import Softplus

Bounds = tuple[float | Tensor, float | Tensor] | None
"""The smallest and the largest valid input: numbers, or tensors that broadcast to the inputs."""
_ODD = 0x9E3779B97F4A7C15
STEP_SHARE = 2.5
"""The default step size times the number of steps, in radii: the ball can be crossed (Madry)."""
SEARCHES = ("gradient", "random")
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


@dataclass(frozen=True, eq=False, repr=False)
class Attacked:
    """The result of an attack on inputs.

    Args:
        inputs: The attacked inputs [B, *], within the ball and the bounds.
        classes: int64 [B], those that the attack avoids or, where `targeted`, aims at.
        before: The decisions for the original inputs, int64 [B]; `after` those for the attacked.
        targeted: Whether the attack aims at `classes`.
        parameters: All that the result depends on.
    """

    inputs: Tensor
    classes: Tensor
    before: Tensor
    after: Tensor
    targeted: bool
    parameters: Mapping[str, Any]

    @property
    def fooled(self) -> Tensor:
        """Where the decision left the class or, where targeted, reached it, bool [B]."""
        was, now = self.before == self.classes, self.after == self.classes
        return now & ~was if self.targeted else was & ~now

    def __repr__(self) -> str:
        count = int(self.fooled.sum())
        return f"<Attacked {self.parameters['attack']}: {count} of {len(self.inputs)} fooled>"


def fgsm(
    model: Model,
    x: Tensor,
    target: Target,
    epsilon: float,
    *,
    targeted: bool = False,
    bounds: Bounds = None,
    running: RunOptions | None = None,
) -> Attacked:
    """One step of size `epsilon` along the sign of the cross-entropy's gradient (Goodfellow, 2015).

    Args:
        model: Returns [B, classes].
        x: Inputs [B, *].
        target: The true classes, "predicted" for the decisions, or with `targeted` those to reach.
        epsilon: The step's size, in units of x.
        targeted: Whether to approach the target instead of leaving it.
        bounds: The smallest and largest valid input; by default those of the batch.
        running: How the model is run.

    Raises:
        InputError: If the target is no class, or the inputs leave the bounds.

    Example:
        >>> x = torch.zeros(2, 4)
        >>> fgsm(torch.nn.Linear(4, 3), x, 0, 0.1, bounds=(-1.0, 1.0)).inputs.abs().max()
        tensor(0.1000)
    """
    checks.positive("epsilon", epsilon)
    about = {"attack": "fgsm", "epsilon": epsilon}
    return _attack(model, x, target, about, targeted, bounds, running)


def pgd(
    model: Model,
    x: Tensor,
    target: Target,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int = 0,
    *,
    targeted: bool = False,
    bounds: Bounds = None,
    running: RunOptions | None = None,
) -> Attacked:
    """Projected gradient steps from a random point within `epsilon` of x (Madry, 2018).

    Args:
        model, x, target, targeted, bounds, running: As in `fgsm`; so are the errors.
        epsilon: The radius of the ball, in units of x.
        steps: The number of steps.
        step_size: In units of x; 2.5 epsilon / steps by default, so that the ball can be crossed.
        seed: Of the uniform start, which differs between examples.

    Example:
        >>> x = torch.zeros(2, 4)
        >>> pgd(torch.nn.Linear(4, 3), x, 0, 0.1, bounds=(-1.0, 1.0)).inputs.abs().max()
        tensor(0.1000)
    """
    checks.positive("epsilon", epsilon)
    checks.integer("steps", steps, 1)
    check_seed("seed", seed)
    if step_size is not None:
        checks.positive("step_size", step_size)
    size = STEP_SHARE * epsilon / steps if step_size is None else step_size
    about = {"attack": "pgd", "epsilon": epsilon, "steps": steps, "step_size": size, "seed": seed}
    return _attack(model, x, target, about, targeted, bounds, running)


def _attack(
    model: Model,
    x: Tensor,
    target: Target,
    about: Mapping[str, Any],
    targeted: bool,
    bounds: Bounds,
    running: RunOptions | None,
) -> Attacked:
    """Steps along the sign of the loss gradient, from x or, with a seed, from near it."""
    checks.boolean("targeted", targeted)
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x must be one tensor: got {type(x).__name__}")
    (x,), (dtype,) = read_inputs(x)
    running, epsilon = (running or RunOptions()).taking(dtype), about["epsilon"]
    size, seed = about.get("step_size", epsilon), about.get("seed")
    step = -size if targeted else size
    limits = _read_bounds(bounds, x)
    before = decisions(model, x, running, target)
    classes, engine = classes_of(target, before), running.engine(model, "gradient")
    moved = x if seed is None else project(x + epsilon * uniform(x, seed), x, epsilon, limits)
    for _ in range(about.get("steps", 1)):
        sign = loss_gradient(engine, moved, classes, running).sign()
        moved = project(moved + step * sign, x, epsilon, limits)
    after = decisions(model, moved, running)
    stated = [one.item() if one.numel() == 1 else list(one.shape) for one in limits]
    parameters = {**about, "targeted": targeted, "bounds": stated}
    return Attacked(running.cast(moved), classes, before, after, targeted, parameters)


def check_seed(name: str, seed: object) -> None:
    """Raises unless it is one 64-bit int."""
    if isinstance(seed, tuple):
        raise InputTypeError(f"{name} must be one 64-bit int for all examples: got {seed!r}")
    checks.seed("seed", seed)


def uniform(x: Tensor, seed: int, sample: int = 0) -> Tensor:
    """Uniform numbers in [-1, 1) like x [B, *], by the seed, the example index and the sample."""
    example = torch.arange(len(x), device=x.device)
    # Consecutive seeds must not share examples.
    key = (seed * _ODD + 2**63) % 2**64 - 2**63
    bits = random_bits(
        example + key, torch.full_like(example, sample), x[0].numel(), 0, philox.BASELINE
    )
    noise: Tensor = ((bits >> 8).double() * 2.0**-23 - 1.0).to(x.dtype).view_as(x)
    return noise


def project(x: Tensor, origin: Tensor, radius: Tensor | float, bounds: tuple[Any, Any]) -> Tensor:
    """The nearest point to x in the maximum-norm ball around its origin and in the bounds."""
    low = torch.maximum(origin - radius, torch.as_tensor(bounds[0]).to(origin))
    high = torch.minimum(origin + radius, torch.as_tensor(bounds[1]).to(origin))
    return torch.minimum(torch.maximum(x, low), high)


@dataclass(frozen=True)
class CrossEntropy(Reader):
    """A target: the cross-entropy of classes int64 [B]."""

    classes: Tensor
    count: int = 1

    def read(self, raw: Any, example: Tensor) -> Tensor:
        """Losses [R, 1]."""
        # In float32 the gradient would be zero where the model is certain.
        logarithm = tensor_of(raw).double().log_softmax(1)
        return -logarithm.gather(1, self.classes[example][:, None])


def loss_gradient(engine: Engine, x: Tensor, classes: Tensor, running: RunOptions) -> Tensor:
    """The gradient of the cross-entropy of classes int64 [B] at x [B, *]."""
    return running.standard(running.map(engine, x, CrossEntropy(classes))[:, 0])


def decisions(model: Model, x: Tensor, running: RunOptions, target: Target = PREDICTED) -> Tensor:
    """The predicted classes int64 [B]; raises where the model or the target has no classes."""
    example = torch.arange(1, device=x.device)
    first, _ = Scorer(model, x, target, running).at(lambda i, _: x[i], example, example)
    return first.decided("an attack")


def classes_of(target: Target, before: Tensor) -> Tensor:
    """The classes int64 [B] of a target; raises where it is none."""
    if isinstance(target, str) and target == PREDICTED:
        return before
    targets = read_targets(target, len(before)).to(before.device)
    structured = targets.position is not None
    if targets.classes is None or targets.classes.shape[1] != 1 or structured:
        raise InputError(
            "an attack needs one class per example: pass target=int, one int per example, or "
            "'predicted'"
        )
    return targets.classes[:, 0]


def _read_bounds(bounds: Bounds, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds as tensors that broadcast to x; raises where x does not lie in them."""
    if bounds is None:
        return x.min(), x.max()
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputTypeError(f"bounds must be two, the lowest and the highest: got {bounds!r}")
    low, high = (torch.as_tensor(one).to(x) for one in bounds)
    try:
        low.expand_as(x), high.expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"bounds must broadcast to the inputs {list(x.shape)}: got {list(low.shape)} and "
            f"{list(high.shape)}"
        ) from error
    if bool(((x < low) | (x > high)).any()):
        raise InputError(
            f"bounds do not hold the inputs: these go from {float(x.min()):.4g} to "
            f"{float(x.max()):.4g}; pass the bounds of what is valid, in the same units"
        )
    return low, high


@dataclass(frozen=True, eq=False)
class Manipulated:
    """The result of an attack on maps.

    Args:
        inputs: The attacked inputs [B, *].
        before: The maps of the original inputs, [B, *spatial]; `after` those of the attacked.
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
        >>> model, x, metric = torch.nn.Linear(4, 3), torch.arange(4.0)[None], Manipulation(steps=2)
        >>> outcome = metric(model, x, model.weight[:1], target=0, method="gradient")
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
        check_fields(self, epsilon=checks.positive, steps=1, attack=SEARCHES, points=1)
        check_fields(self, softplus=checks.positive, share=checks.fraction, seed=check_seed)

    def manipulate(self, data: EvaluationInput) -> Manipulated:
        """The attack alone, which shows the attacked inputs and maps."""
        search = _Search(self, data, data.first.decided("a decision that an attack keeps"))
        return search.random() if self.attack == "random" else search.steered()

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        found, still = self.manipulate(data), is_constant(data.inputs)
        lost, constant = int((~found.kept).sum()), int(still.sum())
        through = "itself" if steerable(data.recipe) else "gradient"
        caveats = caveats_of(
            (True, FAILED),
            (lost, f"{lost} decisions were not kept: no value there"),
            (constant, f"{constant} inputs are constant and have no range: no value"),
            (
                found.similarity.isnan().any(),
                "maps that are constant have no rank correlation: no value there",
            ),
            (
                self.attack == through,
                "the attack went through the gradient's map, not through this one's",
            ),
        )
        return self._outcome(
            found.similarity.masked_fill(~found.kept | still, math.nan),
            details={
                "overlap": overlap(found.before, found.after, self.share),
                "unmoved": int((found.inputs == data.inputs).flatten(1).all(1).sum()),
            },
            parameters={"through": "maps" if self.attack == "random" else through},
            caveats=caveats,
        )


class _Search:
    """An attack's best point of each example: its decision is kept, its map the least similar."""

    def __init__(self, how: Manipulation, data: EvaluationInput, decided: Tensor) -> None:
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
        recipe = self.data.recipe if steerable(self.data.recipe) else None
        size = STEP_SHARE * self.radius / how.steps
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


def correlation_slope(maps: Tensor, others: Tensor) -> Tensor:
    """The gradient of Pearson's correlation with respect to maps [B, *], scaled to unit length."""
    a, b = (one.flatten(1).double() for one in (maps, others))
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    a, b = (one / one.norm(dim=1, keepdim=True).clamp_min(TINY) for one in (a, b))
    slope = b - (a * b).sum(1, keepdim=True) * a
    slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(TINY)
    result: Tensor = slope.to(maps.dtype).view_as(maps)
    return result


def steerable(recipe: recipes.Recipe | None) -> TypeGuard[WeightedSum]:
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
    """A method whose map is the gradient by the input of sum(map * direction), for another map.

    of: the recipe of that map. points: how many of its points are used, others in each `turn`.
    softplus: the steepness of the softplus functions that replace ReLU (Dombrowski, 2019).
    """

    of: WeightedSum
    direction: Tensor
    points: int
    turn: int
    softplus: float
    name = "steering"

    def recipe(self) -> recipes.Recipe:
        baseline = "none" if self.of.baseline == "none" else "fill"
        rules = Softplus(self.softplus)
        return recipes.RoundsRecipe(
            self._rounds, self._count, baseline=baseline, rules=rules, second=True
        )

    @property
    def _count(self) -> int:
        return min(self.points, self.of.levels[0].count)

    def _rounds(self, context: RoundContext) -> recipes.Rounds:
        (x,), (start,) = context.inputs, context.baselines
        factor = {"none": torch.ones_like(x[:1]), "input": x, "difference": x - start}
        push = (self.direction.to(x) * factor[self.of.factor]).expand_as(x)
        source = self.of.family.bind(context.inputs, context.baselines)
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
            rows = recipes.Rows(example, level.node[at], level.weight[at], level.replicate[at])
            return source.write(rows)

        def projected(grads: Inputs, example: Tensor) -> Tensor:
            return (grads[0] * push[example]).flatten(1).sum(1, keepdim=True)

        def each(rows: slice, found: RoundResult) -> None:
            _, _, gradient, product = found.grads[0]
            for sums, parts, by in ((moved, product, follows), (total, gradient, weight)):
                scaled = parts * by[number[rows]].to(x).view(-1, *(1,) * (x.dim() - 1))
                sums.index_add_(0, example[rows], scaled.to(x))

        yield recipes.Round(write, example, number, project=projected, each=each)
        if self.of.factor != "none":
            # The factor depends on the input, too.
            moved = moved + self.direction.to(x) * total
        return recipes.Maps((moved[:, None],))
