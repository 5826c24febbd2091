"""The loop that drives every call: evaluations over baselines, launch by launch.

`evaluate` yields what a call wants from the model next, and gets the results sent in. A call alone
(`run_alone`) and requests that share launches (`service`) drive the same steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from saliency_fast.engine.accumulate import Outcome, average
from saliency_fast.engine.adaptive import AdaptiveEvaluation
from saliency_fast.engine.arena import Arena, least_bytes
from saliency_fast.engine.evaluation import REDUCED, Evaluation, GradientEvaluation, SumEvaluation
from saliency_fast.engine.job import Job, Progress, Steps
from saliency_fast.engine.launch import EvaluationRequest, EvaluationResult, execute, wait_for
from saliency_fast.engine.memory import MALLOC_KEEPS, note_call
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.engine.rounds import RoundsEvaluation

MOST_BEGUN = 40
"""How often a call begins again: halvings of launches, and each strategy once."""
ARENA_LAUNCHES = 3
"""Launches of a call from which an arena pays."""


def evaluate(job: Job) -> Steps:
    """The steps of a call: one evaluation for each baseline, whose outcomes are averaged. They
    begin again with another plan where one turns out not to hold.
    """
    for begun in itertools.count():
        finished, evaluation = list[Outcome](), None
        try:
            for number, baselines in enumerate(job.baselines):
                error, ties = job.known_precision_error(), job.ties(number)
                report = _Report(tuple(finished), fresh=error is None)
                captured = job.capture if ties is None or not ties.apart else None
                about = (job, number, error, ties, replace(report), finished)
                if captured is not None and (yield from captured(*about)):
                    continue
                evaluation = evaluation_of(job)(job, job.call, baselines, error, ties)
                yield from evaluation.steps(report)
                # Its launches may have told what they take.
                job = evaluation.job
                if number < len(job.baselines) - 1:
                    finished.append(evaluation.outcome())
            return
        except Exception as error:
            # Out of memory, rows that meet, a strategy or a precision that does not hold.
            job = job if evaluation is None else evaluation.job
            if begun == MOST_BEGUN:
                raise
            job = job.replan(job, error)


def evaluation_of(job: Job) -> type[Evaluation]:
    """The kind of evaluation that serves a job."""
    recipe = job.recipe
    if not isinstance(recipe, WeightedSum):
        return RoundsEvaluation
    if recipe.refinement is not None:
        return AdaptiveEvaluation
    alone = recipe.at_input and recipe.reduction in REDUCED and recipe.factor in ("none", "input")
    fits = job.plan.points_per_launch >= job.call.batch and job.strategy.prefix is None
    return GradientEvaluation if alone and fits and job.strategy.precision.exact else SumEvaluation


@dataclass
class _Report:
    """Makes the progress of a call from that of an evaluation. fresh: whether that measures its
    precision itself.
    """

    finished: tuple[Outcome, ...]
    fresh: bool
    checked: bool = False

    def __call__(self, evaluation: Evaluation, done: int, of: int, maps: bool = True) -> Progress:
        if evaluation.precision_error is not None and not self.checked:
            self.checked = True
            measured = evaluation.outcome if self.fresh else None
            evaluation.job.check_precision(evaluation.precision_error, measured)
        before, several = len(self.finished), len(evaluation.job.baselines)
        # Captured launches are another call's when this one is over.
        over = evaluation.outcome() if evaluation.reused and done == of else None

        def outcome() -> Outcome:
            return average([*self.finished, over or evaluation.outcome()])

        return Progress(done + before * of, of * several, outcome, evaluation.job, maps)


def run_alone(job: Job) -> Iterator[Progress]:
    """Runs a call in launches of its own, and notes what a point takes."""
    device, seconds, last = job.call.device, 0.0, None
    measured, about = job.calibration.measured, job.plan.launch_bytes
    # Its first launch touches fresh pages, which costs more than the second one spares; malloc
    # would keep more of a large one than it needs, and much of that after the call.
    pays = job.plan.launches * len(job.baselines) >= ARENA_LAUNCHES or about >= MALLOC_KEEPS
    about = about if measured else least_bytes(job.call.inputs)
    arena = Arena(device, about=about if pays or not measured else 0)
    progress = drive(evaluate(job), arena)
    try:
        while True:
            started = time.perf_counter()
            step = next(progress, None)
            if step is None:
                wait_for(device)
            seconds += time.perf_counter() - started
            if step is None:
                break
            last = step
            yield step
    finally:
        progress.close()
        arena.close()
    if last is not None:
        note_call()
        last.job.calibration.seconds[last.job.key] = seconds / max(1, last.done)


def drive(
    steps: Generator[EvaluationRequest | Progress, Any, Any], arena: Arena
) -> Generator[Progress, None, None]:
    """The progress of steps whose launches are their own."""
    step = next(steps, None)
    while step is not None:
        if isinstance(step, Progress):
            yield step
            step = next(steps, None)
        else:
            step = resume(steps, [execute(step, step.count, arena)])


def resume(
    steps: Generator[EvaluationRequest | Progress, Any, Any],
    results: list[EvaluationResult | Exception],
) -> EvaluationRequest | Progress | None:
    """What a call wants once it has its result, the last of `results`; None where it is over."""
    # Taken out of the list: gradients must not stay alive through the next launch.
    result = results.pop()
    try:
        if isinstance(result, Exception):
            return steps.throw(result)
        return steps.send(result)
    except StopIteration:
        return None
