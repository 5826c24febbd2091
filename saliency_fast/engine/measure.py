"""Measurement: one point of a call through the model, with its gradients and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import ErrorText
from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call, Model
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.cudagraph import launching
from saliency_fast.engine.memory import Cost, Ledger, MemoryMeter
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.engine.strategies import Strategy
from saliency_fast.errors import BudgetError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.outputs import leaves_of
from saliency_fast.graph.passes.affine_prefix import check_affine
from saliency_fast.graph.passes.float64 import wide
from saliency_fast.graph.program import Program
from saliency_fast.model.executors import (
    Executor,
    MetaTensors,
    RecordingExecutor,
    shapes_only,
)
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.function import Directional, PointFunction, differentiable_points, summed
from saliency_fast.model.preserve import random_states, restored_random_state, uncompiled

FIRST_ROWS = 6
"""Points of the first launches, of one, two and three of them, that tell what launches take."""
OFF_TIES = 2.0**-20
"""Share of the largest number by which points are moved off ties."""


@dataclass(frozen=True)
class Measured:
    """What a point gave, and its cost. outputs: the tensors that the model returned, where
    gradients were taken; None for leaves that are none, or that a program does not make.
    """

    scores: Tensor
    gradients: list[Inputs]
    cost: Cost
    outputs: list[Tensor | None] = field(default_factory=list)

    def exactly(self, other: Measured) -> bool:
        """Whether the model returned the same numbers, bit for bit."""
        pairs = zip(self.outputs, other.outputs, strict=True)
        return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)

    @property
    def magnitude(self) -> float:
        """The largest magnitude of the scores and of what the model returned."""
        numbers = [one.detach().float() for one in (self.scores, *self.outputs) if one is not None]
        finite = [one.nan_to_num(0.0, 0.0, 0.0).abs() for one in numbers if one.numel()]
        return max(float(one.max()) for one in finite)

    def gap(self, other: Measured) -> float:
        """The largest relative difference, of scores or of a gradient."""
        pairs = [(self.scores, other.scores)]
        for mine, theirs in zip(self.gradients, other.gradients, strict=True):
            pairs += zip(mine, theirs, strict=True)
        return max(_relative(a, b) for a, b in pairs)


def does_not_fit(error: Exception) -> BudgetError | None:
    """What is raised where a point runs out of memory; None for other errors."""
    text = f"one point alone does not fit in memory; explain a smaller input at once ({error})"
    return BudgetError(text) if is_out_of_memory(error) else None


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
class _KeepsOutputs:
    """An executor that keeps what it returned last."""

    executor: Executor
    outputs: list[Tensor | None] = field(default_factory=list)

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        raw = self.executor(points, args, kwargs)
        self.outputs = [None if one is None else one.detach() for one in leaves_of(raw)]
        return raw


@dataclass(frozen=True)
class Measurement:
    """A point of one of a call's examples, measured by one strategy after another.

    Args:
        model, call, baselines, recipe: What the point is of.
        config: Thresholds.
        on_meta: Whether on shapes alone, for the cost; scores and gradients are meta tensors then.
        example, number: Of the example, and of its point in the first level.
        metered: Whether the cost is measured, which takes time.
        draws: Whether the model draws random numbers, where the cost is not measured.
        programs: Whether strategies may be by a recorded program.
        single: Whether calls of this kind have one example and few points, of which the first has
            a launch of its own.
        deferred: Whether launches, which count, are compared with autograd, and not points that
            are taken once more by the strategy.
    """

    model: Model
    call: Call
    baselines: Inputs
    recipe: WeightedSum
    config: EngineConfig
    on_meta: bool = False
    example: int = 0
    number: int = 0
    metered: bool = True
    draws: bool = False
    programs: bool = True
    single: bool = False
    deferred: bool = False

    @property
    def scores_ends(self) -> bool:
        """Whether a recording with two rows scores the input and the baseline."""
        return self.single and self.recipe.baseline == "one" and self.recipe.ends

    def elsewhere(self, *, draws: bool) -> list[Measurement]:
        """Two other points at most, one where there are few: the end of the last example's path,
        and the middle of another's: a part of the model may be silent at one point alone.
        """
        level, batch = self.recipe.levels[0], self.call.batch
        order = level.node.argsort()
        if self.single:
            # Behind the first launches, from which a plan is made.
            order = order[order >= FIRST_ROWS]
            number = int(order[-1])
            return [replace(self, number=number, metered=False, draws=draws)]
        nodes = [(batch - 1, int(order[-1])), (batch // 2, int(order[level.count // 2]))]
        few = level.count * batch < self.config.compared_at_three_from
        nodes = list(dict.fromkeys(one for one in nodes if one != (0, 0)))[: 1 if few else 2]
        return [
            replace(self, example=one, number=number, metered=False, draws=draws)
            for one, number in nodes
        ]

    def in_float64(self) -> Measurement:
        """The same point in float64, moved a little: where values tie, strategies that are right to
        rounding differ.
        """
        call = replace(
            self.call,
            inputs=tuple(map(_moved, self.call.inputs)),
            dtypes=(torch.float64,) * len(self.call.dtypes),
            args=wide(self.call.args),
            kwargs=wide(dict(self.call.kwargs)),
        )
        return replace(self, call=call, baselines=tuple(map(_moved, self.baselines)))

    def smaller(self) -> Measurement:
        """The same point on a corner of images and volumes."""

        def corner(x: Tensor) -> Tensor:
            keep = [slice(None), slice(None), *[slice(self.config.corner)] * (x.dim() - 2)]
            return x[tuple(keep)].contiguous() if x.dim() > 3 else x

        call = replace(self.call, inputs=tuple(map(corner, self.call.inputs)))
        return replace(self, call=call, baselines=tuple(map(corner, self.baselines)))

    def eager(self, executor: Executor) -> Measured:
        """By the model itself."""
        return self._gradients(self.call.function(executor), Ledger(MemoryMeter()))

    def scores(self, function: PointFunction) -> Measured:
        """Scores alone, without gradients."""
        return self._metered(
            Ledger(MemoryMeter()), lambda: (*function.scores(*self._points(1)), [])
        )

    def forward(self, strategy: Strategy) -> Measured:
        """A forward pass alone, with the graph of its gradient where one is asked for."""
        about = (self.model, self.call, self.recipe, self.baselines)
        if not self.recipe.gradients:
            return self.scores(strategy.score_function(*about[:2]))
        function = strategy.gradient_function(*about)

        def call() -> tuple[Tensor, Tensor | None, list[Inputs]]:
            points, example = self._points(1)
            points = function.as_model_inputs(points)
            return *function.forward(differentiable_points(points)[0], example), []

        # Gradients take about what the plan adds to a point, the largest tensor at least.
        return self._metered(Ledger(MemoryMeter()), call)

    def twice(self, function: PointFunction) -> Measured:
        """Second derivatives in one direction."""
        twice = Directional.of(function, summed)
        return self._metered(Ledger(MemoryMeter()), lambda: twice.gradients(*self._points(1)))

    def by(self, strategy: Strategy) -> Measured:
        """By a strategy; raises where its prefix is not affine."""
        ledger = Ledger(MemoryMeter())
        strategy = strategy.with_profiler(ledger)
        prefix = strategy.affine_prefix(self.call, self.recipe, 1)
        about = (self.model, self.call, self.recipe, self.baselines)
        function = strategy.gradient_function(*about)
        if prefix is None:
            return self._gradients(function, ledger)
        if not self.on_meta:
            check_affine(prefix.prefix, *prefix.first())
        with self._device():
            points, example = self._points(1)
            # Once for all points, so no part of what one costs.
            points = prefix.forward(points, example) if prefix.line else points
        measured = self._metered(
            ledger, lambda: function.gradients(tuple(one.clone() for one in points), example)
        )
        if self.on_meta:
            return measured
        return replace(measured, gradients=[prefix.vjp(one, example) for one in measured.gradients])

    def _gradients(self, function: PointFunction, ledger: Ledger) -> Measured:
        keeps = _KeepsOutputs(function.executor)
        function = replace(function, executor=keeps)
        measured = self._metered(
            ledger, lambda: function.with_saved_copies(lambda: function.gradients(*self._points(1)))
        )
        return replace(measured, outputs=keeps.outputs)

    def _metered(self, ledger: Ledger, call: Callable[[], Any]) -> Measured:
        hooks: AbstractContextManager[object] = ledger if ledger.accepted else nullcontext()
        meter: AbstractContextManager[object] = ledger.meter
        if not self.metered:
            hooks = meter = nullcontext()
        try:
            drew = restored_random_state(lambda: ledger.meter.drew or self.draws, self.call.device)
            with self._device(), drew, uncompiled(), meter, hooks:
                states = random_states(self.call.device)
                scores, _, gradients = call()
                moved = not all(map(torch.equal, states, random_states(self.call.device)))
        except (RuntimeError, MemoryError) as error:
            # Transforms of torch.func take no hooks: what autograd keeps of such a model is not
            # counted; all else is.
            if ledger.accepted and ErrorText.SAVED_TENSOR_HOOKS.of(error):
                return self._metered(Ledger(MemoryMeter(), accepted=False), call)
            if (short := does_not_fit(error)) is None:
                raise
            raise short from error
        counted = ledger.meter
        return Measured(scores, gradients, counted.cost(ledger.kept, moved=moved))

    def recorded(
        self, rows: int, recording: RecordingExecutor | None = None
    ) -> tuple[Program, Tensor]:
        """A recording of the model with so many rows, one of them with the graph of its gradient,
        and their scores; raises NotLeanError.
        """
        recording, meter = recording or RecordingExecutor(self.model), MemoryMeter()
        with (
            self._device(),
            restored_random_state(lambda: meter.drew, self.call.device),
            uncompiled(),
            meter,
        ):
            states = random_states(self.call.device)
            function, (points, example) = self.call.function(recording), self._points(rows)
            if rows == 2 and self.scores_ends and not self.on_meta:
                pairs = zip(self.call.inputs, self.baselines, strict=True)
                points = tuple(torch.cat([x, one]) for x, one in pairs)
            points = function.as_model_inputs(points)
            if rows == 1 and self.recipe.gradients:
                points = tuple(differentiable_points(points)[0])
            scores, _ = function.forward(points, example)
            drawn = not all(map(torch.equal, states, random_states(self.call.device)))
        # Attention counts as drawing where it drops nothing out; other threads may draw, too.
        if meter.drew and drawn:
            # Other memory formats and parts taken once would draw in another order.
            raise NotLeanError("the model draws random numbers")
        return recording.program, scores.detach()

    def _device(self) -> AbstractContextManager[object]:
        return MetaTensors(self.call.device) if self.on_meta else launching(self.call.device)

    def _points(self, rows: int) -> tuple[Inputs, Tensor]:
        example = torch.full((rows,), self.example, device=self.call.device)
        if self.on_meta:
            return shapes_only(self.call.inputs, rows), example
        level = self.recipe.levels[0].to(self.call.device)
        source = self.recipe.family.bind(self.call.inputs, self.baselines)
        start = self.number * rows
        return source.write(level.rows(example, start, start + rows)), example
