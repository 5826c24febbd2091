"""Trial: one point of a call taken through the model by one way or another, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.memory import Ledger, MemoryMeter
from saliency_fast.engine.recipe import Recipe
from saliency_fast.engine.way import Model, Way, function_of
from saliency_fast.errors import BudgetError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.outputs import leaves_of
from saliency_fast.graph.passes.affine_prefix import check_affine
from saliency_fast.graph.passes.float64 import wide
from saliency_fast.graph.program import Program
from saliency_fast.model.executors import Executor, OnMeta, RecordingExecutor, shapes_only
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.function import Directional, PointFunction, entered, summed
from saliency_fast.model.preserve import random_states, same_draws, uncompiled

FEW = 128
"""Points of a call up to which ways are compared at two of them, and at three above."""
OFF_TIES = 2.0**-20
"""Share of the largest number by which points are moved off ties."""
CORNER = 64
"""Sides of the images and volumes on which ways are verified that larger ones cannot afford."""


@dataclass(frozen=True)
class Cost:
    """Bytes of the tensors of a point that live at once, of the largest one, and of those that
    autograd keeps from forward to backward, by the call that asked for them. drew: whether a call
    was made that may take random numbers; random: whether it took any, which attention without
    dropout does not.
    """

    peak: int
    largest: int
    kept: Mapping[str, int]
    drew: bool = False
    random: bool = False

    @property
    def saved(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class Taken:
    """outputs: the tensors that the model returned, where gradients were taken; None for leaves
    that are none, or that a program does not make.
    """

    scores: Tensor
    grads: list[Inputs]
    cost: Cost
    outputs: list[Tensor | None] = field(default_factory=list)

    def exactly(self, other: Taken) -> bool:
        """Whether the model returned the same numbers, bit for bit."""
        pairs = zip(self.outputs, other.outputs, strict=True)
        return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)

    def gap(self, other: Taken) -> float:
        """The largest relative difference, of scores or of a gradient."""
        pairs = [(self.scores, other.scores)]
        for mine, theirs in zip(self.grads, other.grads, strict=True):
            pairs += zip(mine, theirs, strict=True)
        return max(_relative(a, b) for a, b in pairs)


def _relative(a: Tensor, b: Tensor) -> float:
    gap, scale = float((a - b).double().norm()), float(b.double().norm())
    if math.isnan(gap):
        return math.inf
    return gap / scale if scale else math.inf if gap else 0.0


def _moved(x: Tensor) -> Tensor:
    """In float64, and no two of its numbers equal."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=draw, dtype=torch.float64, device="cpu").to(x.device)
    return x.double() + OFF_TIES * (noise - 0.5) * x.abs().max().clamp_min(OFF_TIES)


@dataclass
class _Kept:
    """A route that keeps what it returned last."""

    route: Executor
    outputs: list[Tensor | None] = field(default_factory=list)

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        raw = self.route(points, args, kwargs)
        self.outputs = [None if one is None else one.detach() for one in leaves_of(raw)]
        return raw


@dataclass(frozen=True)
class Trial:
    """A point of one of a call's examples, taken by one way after another.

    foreseen: on shapes alone, for what it would cost; scores and gradients are meta tensors then.
    example, number: of the example, and of its point in the first level. metered: whether its cost
    is measured, which takes time; draws: whether the model draws random numbers, where not.
    programs: whether ways may be by a recorded program.
    """

    call: Call
    baselines: Inputs
    recipe: Recipe
    foreseen: bool = False
    example: int = 0
    number: int = 0
    metered: bool = True
    draws: bool = False
    programs: bool = True

    def elsewhere(self, *, draws: bool) -> list[Trial]:
        """Two other points at most, one where there are few: the end of the last example's path,
        and the middle of another's.

        A part of the model that is silent at one point need not be so at all of them.
        """
        level, batch = self.recipe.levels[0], self.call.batch
        order = level.place.argsort()
        spots = [(batch - 1, int(order[-1])), (batch // 2, int(order[level.count // 2]))]
        few = level.count * batch < FEW
        spots = list(dict.fromkeys(one for one in spots if one != (0, 0)))[: 1 if few else 2]
        return [
            replace(self, example=one, number=number, metered=False, draws=draws)
            for one, number in spots
        ]

    def in_float64(self) -> Trial:
        """The same point in float64, moved a little: where values tie, ways that are right to
        rounding differ.
        """
        call, wider = self.call, tuple(map(_moved, self.baselines))
        call = replace(
            call,
            inputs=tuple(map(_moved, call.inputs)),
            dtypes=(torch.float64,) * len(call.dtypes),
            args=wide(call.args),
            kwargs=wide(dict(call.kwargs)),
        )
        return replace(self, call=call, baselines=wider)

    def smaller(self) -> Trial:
        """The same call on a corner of its images or volumes."""

        def corner(x: Tensor) -> Tensor:
            keep = [slice(None), slice(None), *[slice(CORNER)] * (x.dim() - 2)]
            return x[tuple(keep)].contiguous() if x.dim() > 3 else x

        call = replace(self.call, inputs=tuple(map(corner, self.call.inputs)))
        return replace(self, call=call, baselines=tuple(map(corner, self.baselines)))

    def plain(self, route: Executor) -> Taken:
        """By the model as it is."""
        kept = _Kept(route)
        function = self._function(kept)

        def gradients() -> Any:
            return function.again(lambda: function.gradients(*self._points(1)))

        return replace(self._measured(Ledger(MemoryMeter()), gradients), outputs=kept.outputs)

    def scores(self, function: PointFunction) -> Taken:
        """Scores alone, without gradients."""

        def scores() -> Any:
            return *function.scores(*self._points(1)), []

        return self._measured(Ledger(MemoryMeter()), scores)

    def twice(self, function: PointFunction) -> Taken:
        """Second derivatives in one direction."""
        twice = Directional.of(function, summed)
        return self._measured(Ledger(MemoryMeter()), lambda: twice.gradients(*self._points(1)))

    def take(self, way: Way, model: Model) -> Taken:
        """By a lean way; raises where its prefix is not affine."""
        ledger = Ledger(MemoryMeter())
        way = way.noted(ledger)
        hoist = way.hoist(self.call, self.recipe, 1)
        behind = way.launched(model, self.call, self.recipe, self.baselines)
        if hoist is None:
            kept = _Kept(behind.route)
            behind = replace(behind, route=kept)

            def whole() -> Any:
                return behind.again(lambda: behind.gradients(*self._points(1)))

            return replace(self._measured(ledger, whole), outputs=kept.outputs)
        if not self.foreseen:
            check_affine(hoist.prefix, *hoist.first())

        with self._place():
            given, item = self._points(1)
            # Once for all points, so no part of what one costs.
            given = hoist.lift(given, item) if hoist.line else given

        def gradients() -> Any:
            return behind.gradients(tuple(one.clone() for one in given), item)

        taken = self._measured(ledger, gradients)
        if self.foreseen:
            return taken
        return replace(taken, grads=[hoist.lower(one, item) for one in taken.grads])

    def _measured(self, ledger: Ledger, gradients: Callable[[], Any]) -> Taken:
        hooks: AbstractContextManager[object] = ledger if ledger.accepted else nullcontext()
        meter: AbstractContextManager[object] = ledger.meter
        if not self.metered:
            hooks = meter = nullcontext()
        try:
            drew = same_draws(lambda: ledger.meter.drew or self.draws, self.call.device)
            with self._place(), drew, uncompiled(), meter, hooks:
                states = random_states(self.call.device)
                scores, _, grads = gradients()
                moved = not all(map(torch.equal, states, random_states(self.call.device)))
        except (RuntimeError, MemoryError) as error:
            if ledger.accepted and _refuses_hooks(error):
                # What autograd keeps of such a model is not counted; all else is.
                again = Ledger(MemoryMeter())
                again.accepted = False
                return self._measured(again, gradients)
            if not is_out_of_memory(error):
                raise
            raise BudgetError(
                f"one point alone does not fit in memory; explain a smaller input at once ({error})"
            ) from error
        counted = ledger.meter
        drawn = counted.drew, counted.drew and moved
        cost = Cost(counted.peak, counted.largest, ledger.kept, *drawn)
        return Taken(scores, grads, cost)

    def recorded(self, model: Callable[..., Any], rows: int) -> Program:
        """A recording of the model with so many rows, one of them with the graph of its gradient;
        raises NotLeanError.
        """
        recording, meter = RecordingExecutor(model), MemoryMeter()
        with self._place(), same_draws(lambda: meter.drew, self.call.device), uncompiled(), meter:
            states = random_states(self.call.device)
            function, (points, item) = self._function(recording), self._points(rows)
            taken = function.taken(points)
            function.forward(entered(taken)[0] if rows == 1 else taken, item)
            drawn = not all(map(torch.equal, states, random_states(self.call.device)))
        # Attention counts as drawing where it drops nothing out; other threads may draw, too.
        if meter.drew and drawn:
            # Other memory formats and parts taken once would draw in another order.
            raise NotLeanError("the model draws random numbers")
        return recording.program

    def _place(self) -> AbstractContextManager[object]:
        return OnMeta(self.call.device) if self.foreseen else nullcontext()

    def _function(self, route: Executor) -> PointFunction:
        return function_of(route, self.call)

    def _points(self, rows: int) -> tuple[Inputs, Tensor]:
        item = torch.full((rows,), self.example, device=self.call.device)
        if self.foreseen:
            return shapes_only(self.call.inputs, rows), item
        level = self.recipe.levels[0].to(self.call.device)
        source, start = (
            self.recipe.family.bind(self.call.inputs, self.baselines),
            self.number * rows,
        )
        return source.write(level.rows(item, start, start + rows)), item


def _refuses_hooks(error: BaseException) -> bool:
    """Whether the model uses torch.func, whose transforms take no saved-tensor hooks."""
    return "saved tensor hooks" in str(error)
