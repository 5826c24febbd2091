"""What a method hands the engine: where the points lie, what they weigh, how they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.model.layout import Layouts
from saliency_fast.rules.intercept import Rules


@dataclass(frozen=True)
class Rows:
    """The table of a launch: one row per point.

    item int64 [R]: the example; place [R]: float64 alpha on a line or int64 number of a sample;
    weight float64 [R]; fold int64 [R]: 0 or 1.
    """

    item: Tensor
    place: Tensor
    weight: Tensor
    fold: Tensor

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        own = slice(start, stop)
        return Rows(self.item[own], self.place[own], self.weight[own], self.fold[own])

    def first(self, count: int) -> Rows:
        """The first so many rows; all of them as they are."""
        return self if count >= self.item.numel() else self.part(0, count)


class Source(Protocol):
    """A family of points bound to the inputs of a call."""

    def write(self, rows: Rows) -> Inputs:
        """The points of `rows`: for each input a fresh tensor [R, *]."""

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        """The arguments that draw the rows' random lines of input `number` again."""

    def direction(self, rows: Rows) -> Inputs:
        """How the points of `rows` move with alpha along their path: for each input [R, *]."""


class Family(Protocol):
    """A family of points, as a method names it: data, bound to tensors by the engine.

    straight: every point is a weighted mean of the input and its baseline.
    """

    @property
    def straight(self) -> bool: ...

    def bind(self, inputs: Inputs, baselines: Inputs) -> Source: ...


@runtime_checkable
class Starting(Protocol):
    """A family whose path begins at points of its own, where others begin at the baseline."""

    def start(self, inputs: Inputs) -> Inputs:
        """For each input the points [B, *] at alpha 0."""

    def laid(self, layouts: Layouts) -> Family:
        """The family for inputs of these layouts."""


@dataclass(frozen=True)
class Level:
    """Points that every example gets in one go: place [P], weight float64 [P], fold int64 [P].

    `keep` is the share of the earlier levels' sum in the new one: a nested rule that doubles its
    points keeps half. Places are in the order in which they are visited.
    """

    place: Tensor
    weight: Tensor
    fold: Tensor
    keep: float = 0.0
    _elsewhere: dict[torch.device, Level] = field(default_factory=dict, compare=False, repr=False)

    @property
    def count(self) -> int:
        return self.place.numel()

    def to(self, device: torch.device) -> Level:
        """The level on a device; the same object every time."""
        if self.place.device == device:
            return self
        if device not in self._elsewhere:
            place, weight, fold = (one.to(device) for one in (self.place, self.weight, self.fold))
            self._elsewhere[device] = Level(place, weight, fold, self.keep)
        return self._elsewhere[device]

    def rows(self, active: Tensor, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of this level for the examples `active`, points outermost."""
        row = torch.arange(start, stop, device=active.device)
        point = torch.div(row, active.numel(), rounding_mode="floor")
        return Rows(
            active[row % active.numel()], self.place[point], self.weight[point], self.fold[point]
        )


Points = Callable[[Inputs, Inputs, Layouts], int]
"""From inputs, features and layouts to about how many points each example gets."""


@dataclass(frozen=True)
class Recipe:
    """A method as data: factor * reduction of the weighted gradients of its levels.

    reduction: "sum", "square" (of the gradients), "absolute" or "variance". factor: "none",
    "input", "difference" (input - baseline), "line" (each row's own random line) or "path" (each
    row's own direction). baseline: "none", "one" (a path's start), "fill" (what comes where
    something is taken away; its score is not asked for) or "set" (rows to draw from). A level's
    weights, with what it keeps, sum to one. With one level the map's error is estimated from its
    two folds, rules of their own; with several from what each level changed, and an example stops
    when that and its completeness are within `tolerance`. `at_input`: the only point is the input
    itself. ends: False where nothing is to add up to what the score gains over the baseline's.

    rules: the backward rules that the model runs under. rounds: for methods that are no such sum:
    they ask for points, look at the answers and go on (`in_rounds` in `engine/rounds.py` makes
    such recipes); gradients: whether any of them asks for more than scores; points: how many an
    example gets, about, or what tells it of a call's inputs and features; layers: where they look
    inside of the model, "auto" for its last spatial layer; second: whether any of them asks for
    second derivatives; features: whether they look at which elements go together; held: maps that
    they hold at once, 0 where none comes of them.
    """

    family: Family
    levels: Sequence[Level]
    reduction: str = "sum"
    factor: str = "none"
    baseline: str = "none"
    tolerance: float | None = None
    at_input: bool = False
    ends: bool = True
    rules: Rules | None = None
    rounds: Callable[[Any], Generator[Any, Any, Any]] | None = None
    gradients: bool = True
    points: int | Points | None = None
    layers: str | tuple[str, ...] | None = None
    second: bool = False
    features: bool = False
    held: int = 2

    @property
    def scores_alone(self) -> bool:
        """Whether the method reads nothing but scores of the model, at points that select between
        the input and its baseline. Such methods take NaN and infinity for values that are missing.
        """
        looks = self.gradients or self.at_input or self.layers is not None
        return self.rounds is not None and not looks

    @property
    def count(self) -> int:
        """The most points that one example may get."""
        if self.points is None:
            return sum(level.count for level in self.levels)
        assert isinstance(self.points, int), "the recipe of a call knows its points"
        return self.points

    def of(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> Recipe:
        """The recipe of a call, which knows how many points there are, and where they lie."""
        family = self.family
        laid = family.laid(layouts) if isinstance(family, Starting) else family
        if self.points is None or isinstance(self.points, int):
            return self if laid is family else replace(self, family=laid)
        points = max(1, self.points(inputs, features, layouts))
        return replace(self, family=laid, points=points)


class Method(Protocol):
    """What the engine knows of a method: its recipe and the name it prints."""

    @property
    def name(self) -> str: ...

    def recipe(self) -> Recipe: ...
