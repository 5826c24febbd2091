"""Evaluation of methods whose points follow from earlier results."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.bind import Call
from saliency_fast.engine.evaluation import Evaluation
from saliency_fast.engine.job import Job, Progress, Report, Steps
from saliency_fast.engine.launch import EvaluationResult
from saliency_fast.engine.memory import Cost, MemoryMeter
from saliency_fast.engine.plan import point_bytes
from saliency_fast.engine.recipe import (
    Maps,
    Round,
    RoundContext,
    RoundResult,
    RoundsRecipe,
)
from saliency_fast.engine.strategies import Strategy
from saliency_fast.model.executors import EagerExecutor, Executor, InterceptedExecutor
from saliency_fast.model.function import Directional, PointFunction, TappedFunction, summed
from saliency_fast.model.preserve import restored_random_state, uncompiled
from saliency_fast.rules.intercept import RulesExecutor


class RoundsEvaluation(Evaluation):
    """The evaluation of a method whose points follow from earlier results."""

    recipe: RoundsRecipe
    maps: Maps

    def __init__(self, job: Job, call: Call, baselines: Inputs, *about: Any) -> None:
        super().__init__(job, call, baselines, *about)
        # Counted by the host, which would wait for a GPU's numbers after each launch.
        self.visited = 0

    def steps(self, report: Report) -> Steps:
        """Evaluates one round after another, and reports every map on the way and the last."""
        yield from self.score_ends()
        call, scores = self.call, (self.scores, self.baseline_scores)
        context = RoundContext(
            *(call.inputs, self.baselines, *scores, self.size, call.features, call.layers),
            *(self.job.model, call.layer_input, call.layouts),
        )
        rounds, result = self.recipe.rounds(context), None
        of = self.recipe.count * call.batch
        while True:
            try:
                step = next(rounds) if result is None else rounds.send(result)
            except StopIteration as over:
                self.maps = over.value
                break
            if isinstance(step, Maps):
                self.maps, result = step, None
                yield self._reported(report, maps=True)
            else:
                result = yield from self._round(step, report)
        yield report(self, of, of)

    def _reported(self, report: Report, *, maps: bool) -> Progress:
        of = self.recipe.count * self.call.batch
        return report(self, min(self.visited, of - 1), of, maps)

    def _round(self, step: Round, report: Report) -> Generator[Any, Any, RoundResult]:
        """The results of a round, launch by launch."""
        function, start, parts = self._function(step), 0, list[RoundResult]()
        # What is not the plan's function does not keep rows apart.
        mixed = self.strategy.row_by_row and function is not self.score_function
        size = 1 if mixed else self._size(step, function)
        gradients = not (step.taps is None and step.project is None and not step.gradients)
        while start < step.example.numel():

            def write(own: slice, start: int = start) -> tuple[Inputs, Tensor]:
                part = slice(start + own.start, start + own.stop)
                return step.write(step.example[part], step.node[part]), step.example[part]

            count = min(size, self.next_size, step.example.numel() - start)
            result = yield self.request(function, count, write, gradients)
            self.note(result)
            own = slice(start, start + len(result.scores))
            example, start = step.example[own], own.stop
            self._note(example, result)
            scores, several = result.scores.double(), result.gradients
            tapped = (several[1:], several[0]) if step.taps is not None else (several, ())
            part = RoundResult(scores, *tapped)
            del result, several, tapped
            if step.each is None:
                parts.append(part)
            else:
                step.each(own, part)
            # Not beside the next launch.
            del part
            yield self._reported(report, maps=False)
        return parts[0] if len(parts) == 1 else _joined(parts, self.scores)

    def _size(self, step: Round, function: PointFunction) -> int:
        """Points per launch of a round. What is not the plan's function may take more memory than
        the plan knows of, and where that is scarce one point tells.
        """
        plan, config, rows = self.plan, self.config, min(self.size, step.example.numel())
        room = plan.budget - plan.fixed_bytes
        plenty = config.scarce * plan.launch_bytes <= room
        if function is self.score_function or rows == 1 or plenty:
            return self.size
        example, meter = step.example[:1], MemoryMeter()
        with restored_random_state(lambda: meter.drew, example.device), uncompiled(), meter:
            gradients = function.with_saved_copies(
                lambda: function.gradients(step.write(example, step.node[:1]), example)[2]
            )
        # What is found is added up before it is let go of, by products of its size.
        held = sum(one.nbytes for several in gradients for one in several)
        each = point_bytes(Cost(meter.peak, meter.largest), config)
        return max(1, min(self.size, room // (each + held)))

    def _note(self, example: Tensor, result: EvaluationResult) -> None:
        if self.recipe.at_input and self.visited < self.call.batch:
            # The first round of such a recipe is at the inputs, and chooses the classes.
            self.note_scores(example, result.scores, result.classes)
            if self.classes is not None and self.visited + len(example) >= self.call.batch:
                self.set_classes(self.classes)
        self.visited += len(example)
        self.points.index_add_(0, example, torch.ones_like(example))

    def _function(self, step: Round) -> PointFunction:
        """The model as a round wants it."""
        targets, strategy = self.score_function.targets, self.strategy
        if step.project is not None:
            # By autograd: memory-efficient versions can be differentiated but once.
            plain = Strategy(rules=strategy.rules).score_function(self.job.model, self.call)
            plain = replace(plain, targets=targets, kind=(id(step),))
            return Directional.of(plain, step.project)
        if step.taps is None and step.rules is None:
            return self.score_function
        lean = strategy.program is not None or strategy.intercepted
        executor: Executor = (InterceptedExecutor if lean else EagerExecutor)(self.job.model)
        if step.rules is not None:
            executor = RulesExecutor(self.job.model, step.rules)
        function = replace(self.call.function(executor), targets=targets)
        if step.taps is not None:
            function = TappedFunction.of(function, step.taps, backward=step.gradients is not False)
        # Equal to no other: such launches are a call's own.
        return replace(function, kind=(id(function), id(step)))

    def trial(self, rows: int, arena: Arena) -> None:
        example = torch.zeros(rows, dtype=torch.int64, device=self.call.device)
        with arena.launch():
            # Inside, as launches write theirs: what is laid out holds them.
            points = tuple(x[example] for x in self.call.inputs)
            if self.recipe.second:
                Directional.of(self.score_function, summed).gradients(points, example)
            elif self.recipe.gradients and self.recipe.rules is None:
                self.score_function.gradients(points, example)
            else:
                self.score_function.scores(points, example)

    def outcome(self) -> Outcome:
        maps, sums = self.maps, self.maps.sums
        if sums is None:
            sums = torch.stack([one.double().flatten(2).sum(2) for one in maps.values]).sum(0)
        error = torch.zeros_like(self.scores) if maps.error is None else maps.error
        scores, points = self.scores.clone(), self.points.clone()
        about = (maps.values, scores, self.baseline_scores, sums, error, points, None)
        return Outcome(*about, self.classes, extras=maps.extras)


def _joined(parts: list[RoundResult], like: Tensor) -> RoundResult:
    """The results of all launches in the order of their rows."""
    if not parts:
        return RoundResult(like.new_zeros((0, like.shape[1])))

    def joined(several: Any) -> Inputs:
        return tuple(torch.cat(one) for one in zip(*several, strict=True))

    gradients = zip(*(one.grads for one in parts), strict=True)
    return RoundResult(
        torch.cat([one.scores for one in parts]),
        [joined(one) for one in gradients],
        joined([one.taps for one in parts]),
    )
