"""What a method hands the engine: a weighted sum of gradients, or rounds of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.model.function import Project
from saliency_fast.model.layers import Layer, Taps
from saliency_fast.model.layout import Layouts
from saliency_fast.rules.intercept import Rules


@dataclass(frozen=True)
class Rows:
    """The table of a launch, one row per point.

    Args:
        example: int64 [R], the example index.
        node: [R], the node: float64 alpha on a line, or the int64 number of a sample.
        weight: float64 [R], the quadrature or averaging weight.
        replicate: int64 [R], 0 or 1: the half of the points that it belongs to.
    """

    example: Tensor
    node: Tensor
    weight: Tensor
    replicate: Tensor

    def part(self, start: int, stop: int) -> Rows:
        own = slice(start, stop)
        return Rows(self.example[own], self.node[own], self.weight[own], self.replicate[own])

    def first(self, count: int) -> Rows:
        """The first `count` rows; the table itself where it has no more."""
        return self if count >= self.example.numel() else self.part(0, count)


class Source:
    """A family of points bound to the inputs of a call."""

    def write(self, rows: Rows) -> Inputs:
        """The points of `rows`, for each input [R, *], in fresh memory."""
        raise NotImplementedError

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        """What `ops.accumulate_random_lines` needs of input `number` for factor "line"."""
        raise TypeError(f"{type(self).__name__}: points lie on no random line")

    def direction(self, rows: Rows) -> Inputs:
        """The derivative of the points of `rows` by alpha along their path, [R, *] per input."""
        raise TypeError(f"{type(self).__name__}: points lie on no path")


class Family(Protocol):
    """A family of points as a method names it: data, which `bind` joins with tensors.

    straight: every point is a weighted mean of the input and its baseline.
    """

    @property
    def straight(self) -> bool: ...

    def bind(self, inputs: Inputs, baselines: Inputs) -> Source: ...


class Starting:
    """A family whose path begins at points of its own instead of the baseline."""

    def start(self, inputs: Inputs) -> Inputs:
        """For each input the points [B, *] at alpha 0."""
        raise NotImplementedError

    def laid(self, layouts: Layouts) -> Family:
        """The family for inputs of these layouts."""
        raise NotImplementedError


@dataclass(frozen=True)
class Itself:
    """The family whose only point is the input, whatever its type."""

    straight = False

    def bind(self, inputs: Inputs, baselines: Inputs) -> Source:
        return _BoundItself(inputs)


@dataclass(frozen=True)
class _BoundItself(Source):
    inputs: Inputs

    def write(self, rows: Rows) -> Inputs:
        return tuple(x[rows.example] for x in self.inputs)


@dataclass(frozen=True)
class Level:
    """Points that every example gets in one go, in the order in which they are visited.

    Args:
        node: [P], the nodes.
        weight: float64 [P].
        replicate: int64 [P], the replicate of each point.
        keep: Share of the sum of earlier levels in this one's: a nested rule that doubles its
            points keeps half.
    """

    node: Tensor
    weight: Tensor
    replicate: Tensor
    keep: float = 0.0
    _elsewhere: dict[torch.device, Level] = field(default_factory=dict, compare=False, repr=False)

    @property
    def count(self) -> int:
        return self.node.numel()

    def to(self, device: torch.device) -> Level:
        """The level on a device; the same object every time."""
        if self.node.device == device:
            return self
        if device not in self._elsewhere:
            node, weight, replicate = (
                one.to(device) for one in (self.node, self.weight, self.replicate)
            )
            self._elsewhere[device] = Level(node, weight, replicate, self.keep)
        return self._elsewhere[device]

    def rows(self, active: Tensor, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of this level for the examples `active`, points outermost."""
        row = torch.arange(start, stop, device=active.device)
        point = torch.div(row, active.numel(), rounding_mode="floor")
        example = active[row % active.numel()]
        return Rows(example, self.node[point], self.weight[point], self.replicate[point])


Points = Callable[[Inputs, Inputs, Layouts], int]
"""From inputs, features and layouts to about how many points each example gets."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What weighted sums and rounds have in common.

    Args:
        baseline: "none", "one" (the start of a path), "fill" (replaces what is taken away; its
            score is not asked for) or "set" (rows to draw from).
        at_input: Whether the only point is the input itself; of rounds, whether their first round
            is at the inputs and chooses the classes.
        rules: Backward rules that the model runs under.
        gradients: Whether gradients are needed anywhere, or scores alone.
        layers: Where the method looks inside of the model, "auto" for its last spatial layer.
        second: Whether second derivatives are asked for.
        features: Whether the method asks which elements of the inputs go together.
        ends: False where values do not add up to what the score gains over the baseline's.
    """

    baseline: str = "none"
    at_input: bool = False
    rules: Rules | None = None
    gradients: bool = True
    layers: str | tuple[str, ...] | None = None
    second: bool = False
    features: bool = False
    ends: bool = True

    @property
    def count(self) -> int:
        """The most points that one example may get."""
        raise NotImplementedError

    @property
    def measured(self) -> WeightedSum:
        """The weighted sum whose points are measured for the plan."""
        raise NotImplementedError

    @property
    def scores_alone(self) -> bool:
        """Whether the method reads nothing but scores, at points that select between the input and
        its baseline. Such methods take NaN and infinity for values that are missing.
        """
        return False

    def of(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> Recipe:
        """The recipe of a call, which knows how many points there are, and where they lie."""
        raise NotImplementedError


GROWTH = 1.6
"""How many times as many nodes there are after each round of a refinement."""


@dataclass(frozen=True)
class Refinement:
    """Nodes of each example's own: those of the only level, then more where the gradient changes.

    Args:
        method: The method, with this rule named.
        otherwise: The same with a fixed rule, for calls that this does not fit; None where it was
            asked for by name.
        steps: Nodes of each example in all, or before its error is first compared with a tolerance.
        most: Nodes of an example at most.
    """

    method: Method
    otherwise: Method | None
    steps: int
    most: int

    @property
    def kept(self) -> int:
        """Nodes of an example whose gradients are kept; with a tolerance about so many."""
        if self.steps == self.most:
            return math.ceil(self.steps / GROWTH)
        return min(self.most, math.ceil(self.steps * GROWTH**2))


@dataclass(frozen=True)
class WeightedSum(Recipe):
    """factor * reduction of the weighted gradients at the points of all levels.

    A level's weights, with what it keeps, sum to one. With one level the error of the map is
    estimated from its two replicates, quadrature rules of their own; with several from what each
    level changed, and an example stops when that and its completeness are within `tolerance`.

    Args:
        family: Where the points lie.
        levels: Nodes, weights and replicates.
        reduction: "sum", "square" (of the gradients), "absolute" or "variance".
        factor: "none", "input", "difference" (input - baseline), "line" (each row's own random
            line) or "path" (each row's own direction).
        tolerance: Relative L2 error at which an example stops.
        refinement: Nodes of each example's own, behind those of the only level.
    """

    family: Family
    levels: Sequence[Level]
    reduction: str = "sum"
    factor: str = "none"
    tolerance: float | None = None
    refinement: Refinement | None = None

    @property
    def count(self) -> int:
        if self.refinement is not None:
            return self.refinement.most
        return sum(level.count for level in self.levels)

    @property
    def measured(self) -> WeightedSum:
        return self

    def of(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> WeightedSum:
        family = self.family
        return replace(self, family=family.laid(layouts)) if isinstance(family, Starting) else self

    def prefixed(self, least: int) -> bool:
        """Whether the sum may be taken behind a linear map, and has the `least` points per example
        from which two forwards and two transposes of that map pay.
        """
        # The gradients of a refinement are kept and compared: behind the map they may be larger.
        linear = self.reduction == "sum" and self.factor not in ("line", "path")
        linear = linear and self.refinement is None
        return linear and self.rules is None and self.gradients and self.count >= least


def _one_point() -> Level:
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    return Level(zero, torch.ones(1, dtype=torch.float64, device="cpu"), zero)


@dataclass(frozen=True)
class RoundsRecipe(Recipe):
    """A method that asks for points, looks at what the model gives there and goes on.

    Args:
        rounds: From a `RoundContext` to the generator that yields rounds and returns maps.
        points: How many points an example gets, about, or what tells it of a call.
        held: Maps that the rounds hold at once, 0 where they make none.
    """

    rounds: Callable[[RoundContext], Rounds]
    points: int | Points
    held: int = 2

    @property
    def count(self) -> int:
        assert isinstance(self.points, int), "the recipe of a call knows its points"
        return self.points

    @property
    def measured(self) -> WeightedSum:
        return WeightedSum(
            *(Itself(), (_one_point(),)),
            rules=self.rules,
            gradients=self.gradients,
            second=self.second,
        )

    @property
    def scores_alone(self) -> bool:
        return not (self.gradients or self.at_input or self.layers is not None)

    def of(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> RoundsRecipe:
        if isinstance(self.points, int):
            return self
        return replace(self, points=max(1, self.points(inputs, features, layouts)))


class Method(Protocol):
    """What the engine knows of a method: its recipe and the name it prints."""

    @property
    def name(self) -> str: ...

    def recipe(self) -> Recipe: ...


def with_fixed_nodes(method: Method) -> Method:
    """The method, with the fixed rule where it is left to the call whether nodes are fixed."""
    recipe = method.recipe()
    refinement = recipe.refinement if isinstance(recipe, WeightedSum) else None
    return method if refinement is None or refinement.otherwise is None else refinement.otherwise


@dataclass(frozen=True)
class RoundContext:
    """What rounds are given.

    Args:
        inputs: Those of the call, [B, *] each.
        baselines: [B | 1 | M, *] each; zeros where the recipe has none.
        scores: float64 [B, K] at the inputs, NaN where the recipe is `at_input` and the first round
            brings them.
        baseline_scores: float64 [B, K], where there is one baseline per example.
        size: Points of a launch.
        features: int64 [B | 1, *] per input, numbers of segments counted over all inputs.
        layers: Those that `at` or the recipe names, with `layer_input` for what they take.
        model: The model whose layers they are.
        layouts: Those of the inputs.
    """

    inputs: Inputs
    baselines: Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    size: int
    features: Inputs = ()
    layers: tuple[Layer, ...] = ()
    model: object = None
    layer_input: bool = False
    layouts: Layouts = field(default_factory=lambda: Layouts(()))


@dataclass(frozen=True)
class RoundResult:
    """What the model gave for a round: scores float64 [R, K]; for each of K targets the gradients
    [R, *] at the inputs, or at the taps, whose activations [R, *] are `taps`.
    """

    scores: Tensor
    grads: list[Inputs] = field(default_factory=list)
    taps: Inputs = ()


@dataclass(frozen=True)
class Round:
    """Points that a method wants evaluated before it goes on.

    Args:
        write: From `example` [R'] and `node` [R'] of some rows to their points, in fresh memory.
        example: int64 [R], the example of each row.
        node: [R], whatever `write` wants to know of each row.
        gradients: Or scores alone; None is scores, and gradients where there are taps.
        taps: Tensors inside of the model that are returned, with the gradients there instead of at
            the inputs.
        rules: Backward rules of this round.
        project: Second derivatives instead of gradients; see `model/directional.py`.
        each: Called with the rows and results of each launch; without it all results are sent back
            as one `RoundResult`.
    """

    write: Callable[[Tensor, Tensor], Inputs]
    example: Tensor
    node: Tensor
    gradients: bool | None = None
    taps: Taps | None = None
    rules: Rules | None = None
    project: Project | None = None
    each: Callable[[slice, RoundResult], None] | None = None


@dataclass(frozen=True)
class Maps:
    """The maps that rounds end with, or have so far: per input [B, K, *].

    error: relative L2, estimated [B, K]; None is exact. sums [B, K]: what counts for completeness
    where values repeat. extras: further results [B, K, *] by name.
    """

    values: Inputs
    error: Tensor | None = None
    sums: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


Rounds = Generator[Round | Maps, RoundResult, Maps]
"""A method at work: yields rounds and gets their results; may yield maps so far on the way."""
