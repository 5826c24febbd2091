"""Rounds: methods that look at answers before they go on, run by the same launches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.launch import Answer, Moment, Steps, Want
from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.engine.outcome import Outcome
from saliency_fast.engine.plan import point_bytes
from saliency_fast.engine.points import Itself
from saliency_fast.engine.recipe import Level, Points, Recipe
from saliency_fast.engine.run import Run
from saliency_fast.engine.way import Model, Way, function_of
from saliency_fast.model.executors import EagerExecutor, Executor, InterceptedExecutor
from saliency_fast.model.function import Directional, PointFunction, Project, TappedFunction, summed
from saliency_fast.model.layers import Layer, Taps
from saliency_fast.model.layout import Layouts
from saliency_fast.model.preserve import same_draws, uncompiled
from saliency_fast.rules.intercept import Rules, RulesExecutor

SCARCE = 32
"""Launches of the plan's size that must fit for memory not to be scarce."""


@dataclass(frozen=True)
class RoundContext:
    """What rounds are given.

    inputs [B, *] and baselines [B | 1 | M, *] of the call (zeros where it has none); scores at the
    inputs, float64 [B, K], NaN where the recipe is `at_input` and the first round brings them;
    baseline_scores at the baselines, where they are one per example. size: points of a launch.
    features: int64 [B | 1, *] per input, numbers of segments counted over all inputs; layers:
    those that `at` or the recipe names, and model: whose layers they are; layer_input: whether what
    they take is meant. layouts: of the inputs.
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
    """The answers to a round: scores float64 [R, K]; for each of K targets the gradients [R, *] at
    the inputs, or at the taps, whose activations [R, *] are `taps`.
    """

    scores: Tensor
    grads: list[Inputs] = field(default_factory=list)
    taps: Inputs = ()


@dataclass(frozen=True)
class Round:
    """Points that a method wants answered before it goes on.

    write(item [R'], place [R']) makes the points of some rows, in fresh memory; item int64 [R]: the
    example of each row; place [R]: whatever `write` wants to know of it. gradients: or scores
    alone; None is scores, and gradients where there are taps. taps: tensors inside of the model,
    which are told with the gradients there instead of at the inputs. rules: backward rules.
    project: second derivatives in the place of gradients; see `model/directional.py`.
    each(rows, found) takes the answers of a launch's rows as they come; without it all of them are
    sent back in one `Found`.
    """

    write: Callable[[Tensor, Tensor], Inputs]
    item: Tensor
    place: Tensor
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
"""A method at work: yields rounds and gets what was found; may yield maps so far on the way."""


def in_rounds(
    rounds: Callable[[RoundContext], Rounds], points: int | Points | None, **fields: Any
) -> Recipe:
    """The recipe of a method that asks in rounds, for about so many points of each example.

    fields: further ones of a `Recipe`, such as `baseline` and `gradients`.
    """
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    level = Level(one, one, torch.zeros(1, dtype=torch.int64, device="cpu"))
    return Recipe(Itself(), (level,), rounds=rounds, points=points, **fields)


class RoundsRun(Run):
    """A run of a recipe whose points follow from earlier answers."""

    maps: Maps
    _moment: Callable[[int, int], Moment]

    def __init__(self, way: Way, model: Model, *about: Any) -> None:
        super().__init__(way, model, *about)
        self.model = model

    def steps(self, moment: Callable[[int, int], Moment]) -> Steps:
        """Answers one round after another, with a moment for every map on the way and the last."""
        yield from self._ends()
        assert self.recipe.rounds is not None
        self._moment = moment
        rounds = self.recipe.rounds(self._asked())
        of, found = self.recipe.count * self.call.batch, None
        while True:
            try:
                step = next(rounds) if found is None else rounds.send(found)
            except StopIteration as over:
                self.maps = over.value
                break
            if isinstance(step, Maps):
                self.maps, found = step, None
                yield replace(self._launched(), maps=True)
            else:
                found = yield from self._answered(step)
        yield moment(of, of)

    def _asked(self) -> RoundContext:
        call = self.call
        return RoundContext(
            call.inputs,
            self.baselines,
            self.scores,
            self.baseline_scores,
            self.size,
            call.features,
            call.layers,
            self.model,
            call.layer_input,
            call.layouts,
        )

    def _launched(self) -> Moment:
        """A moment without maps: points were answered."""
        of = self.recipe.count * self.call.batch
        return replace(self._moment(min(int(self.points.sum()), of - 1), of), maps=False)

    def _answered(self, step: Round) -> Generator[Want | Moment, Any, RoundResult]:
        """The answers to a round, launch by launch."""
        function, start, parts = self._function(step), 0, []
        # What is not the plan's function does not keep rows apart.
        size = 1 if self.way.apart and function is not self.function else self._size(step, function)
        alone = step.taps is None and step.project is None and not step.gradients
        while start < step.item.numel():

            def write(own: slice, start: int = start) -> tuple[Inputs, Tensor]:
                part = slice(start + own.start, start + own.stop)
                return step.write(step.item[part], step.place[part]), step.item[part]

            rows = min(size, self.size, step.item.numel() - start)
            want = Want(function, rows, write, gradients=not alone)
            want.independence = self.independence
            try:
                answer = yield want
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            own = slice(start, start + want.taken)
            item, start = step.item[own], own.stop
            self._noted(item, answer)
            found = _found(answer, tapped=step.taps is not None)
            del answer
            if step.each is None:
                parts.append(found)
            else:
                step.each(own, found)
            # Not beside the next launch.
            del found
            yield self._launched()
        if len(parts) == 1:
            return parts[0]
        return _together(parts, self.scores)

    def _size(self, step: Round, function: PointFunction) -> int:
        """Points per launch of a round. What is not the plan's function may take more memory than
        the plan knows of, and where that is scarce one point tells.
        """
        room = self.plan.budget - self.plan.fixed_bytes
        rows = min(self.size, step.item.numel())
        if function is self.function or rows == 1 or SCARCE * self.plan.launch_bytes <= room:
            return self.size
        item, meter = step.item[:1], MemoryMeter()
        with same_draws(lambda: meter.drew, item.device), uncompiled(), meter:
            grads = function.again(
                lambda: function.gradients(step.write(item, step.place[:1]), item)[2]
            )
        # What is found is folded in before it is let go of, by products of its size.
        held = sum(one.nbytes for several in grads for one in several)
        return max(1, min(self.size, room // (point_bytes(meter.peak, meter.largest) + held)))

    def _noted(self, item: Tensor, answer: Answer) -> None:
        if self.recipe.at_input and not bool(self.scores.isfinite().all()):
            # The first round of such a recipe is at the inputs, and chooses the classes.
            self._note_scores(item, answer.scores, answer.classes)
            if self.classes is not None and bool(self.scores.isfinite().all()):
                targets = replace(self.function.targets, classes=self.classes)
                self.function.targets = targets
        self.points.index_add_(0, item, torch.ones_like(item))

    def _function(self, step: Round) -> PointFunction:
        """The model as a round wants it."""
        if step.project is not None:
            # No lean way: those can be differentiated but once.
            alone = Way(rules=self.way.rules).function(self.model, self.call)
            alone = replace(alone, targets=self.function.targets, kind=(id(step),))
            return Directional.of(alone, step.project)
        if step.taps is None and step.rules is None:
            return self.function
        lean = self.way.program is not None or self.way.watched
        route: Executor = InterceptedExecutor(self.model) if lean else EagerExecutor(self.model)
        if step.rules is not None:
            route = RulesExecutor(self.model, step.rules)
        function = replace(function_of(route, self.call), targets=self.function.targets)
        if step.taps is not None:
            function = TappedFunction.of(function, step.taps, backward=step.gradients is not False)
        # Equal to no other: such launches are a call's own.
        return replace(function, kind=(id(function), id(step)))

    def try_launch(self, rows: int, arena: Arena) -> None:
        """A launch of the first example, `rows` times, in `arena`; nothing is kept of it."""
        item = torch.zeros(rows, dtype=torch.int64, device=self.call.device)
        with arena.launch():
            # Inside, as launches write theirs: what is laid out holds them.
            points = tuple(x[item] for x in self.call.inputs)
            if self.recipe.second:
                Directional.of(self.function, summed).gradients(points, item)
            elif self.recipe.gradients and self.recipe.rules is None:
                self.function.gradients(points, item)
            else:
                self.function.scores(points, item)

    def outcome(self) -> Outcome:
        """The answer from the maps so far."""
        maps = self.maps
        sums = maps.sums
        if sums is None:
            sums = torch.stack([one.double().flatten(2).sum(2) for one in maps.values]).sum(0)
        exact = torch.zeros_like(self.scores)
        return Outcome(
            maps.values,
            self.scores.clone(),
            self.baseline_scores,
            sums,
            exact if maps.error is None else maps.error,
            self.points.clone(),
            None,
            self.classes,
            self.halvings,
            extras=maps.extras,
        )


def _found(answer: Answer, *, tapped: bool) -> RoundResult:
    scores, grads = answer.scores.double(), answer.grads
    return RoundResult(scores, grads[1:], grads[0]) if tapped else RoundResult(scores, grads)


def _together(parts: list[RoundResult], like: Tensor) -> RoundResult:
    """The answers of all launches in the order of their rows."""
    if not parts:
        return RoundResult(like.new_zeros((0, like.shape[1])))

    def joined(several: Any) -> Inputs:
        return tuple(torch.cat(one) for one in zip(*several, strict=True))

    grads = zip(*(one.grads for one in parts), strict=True)
    return RoundResult(
        torch.cat([one.scores for one in parts]),
        [joined(one) for one in grads],
        joined([one.taps for one in parts]),
    )
