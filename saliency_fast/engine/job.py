"""Job: a call ready to run, with its plan, and the progress of its launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.arena import LaunchMemory, Trace
from saliency_fast.engine.bind import Call, Model, Part
from saliency_fast.engine.calibrate import Calibration
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.cudagraph import RECORDERS
from saliency_fast.engine.independence import Independence, TieReport, find_ties
from saliency_fast.engine.launch import EvaluationRequest
from saliency_fast.engine.memory import Ledger
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.precision import (
    PrecisionError,
    everywhere,
)
from saliency_fast.engine.recipe import (
    Method,
    Recipe,
)
from saliency_fast.engine.strategies import Strategy
from saliency_fast.model.preserve import restored_random_state


class PrecisionCostsError(Exception):
    """A precision costs a map more than it may."""


@dataclass(frozen=True)
class Job:
    """A call ready to run.

    Args:
        model, method, call, recipe, baselines, part: What is explained, and of which part of it.
        strategy, plan, launches: How.
        calibration: What is known of a point.
        independence: What is known of the model's rows.
        config: Thresholds.
        replan: From a job and an error to the job that begins again; raises the error where no
            other plan helps.
        capture: Steps of captured launches, where the device can; see `captured`.
        first: Points of the first launches, one after another, in every call of its kind: results
            depend on the points per launch in their last digits.
        with_cost: From the cost of a point to the job that goes on, where the first launch tells
            it.
        traced: Those of the first sizes whose launches are traced; with_traces: from the traces by
            size to the job that goes on.
        limit: What the precision may cost a map, where another one is left to take its place.
        kind: Equal for calls whose points are counted together.
        ledger: What measures the first launch, where that tells what a point costs.
        verified: Keeps the calibration, once launches have agreed with autograd, and returns it.
    """

    model: Model
    method: Method
    call: Call
    recipe: Recipe
    baselines: list[Inputs]
    part: Part | None
    strategy: Strategy
    plan: Plan
    launches: LaunchMemory | None
    calibration: Calibration
    independence: Independence
    config: EngineConfig
    replan: Callable[[Job, Exception], Job]
    capture: Callable[..., Generator[EvaluationRequest | Progress, Any, bool]] | None = None
    first: tuple[int, ...] = ()
    with_cost: Callable[..., Job] | None = None
    traced: tuple[int, ...] = ()
    with_traces: Callable[[Mapping[int, Trace]], Job] | None = None
    limit: float = math.inf
    kind: tuple[object, ...] = ()
    ledger: Ledger | None = None
    verified: Callable[[], Calibration] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Of what is known of launches."""
        return str(self.strategy), self.plan.points_per_launch

    def known_precision_error(self) -> PrecisionError | None:
        """What earlier calls tell of the precision's cost; NaN where nothing can be measured."""
        if self.strategy.precision.exact:
            return None
        maps, device = self.call.targets.count, self.call.device
        about, rarely = (self.plan.points, maps, device, self.config), device.type in RECORDERS
        known = self.calibration.errors.cached(*about, rarely=rarely)
        return everywhere(math.nan, maps, device) if self.plan.looked_at == 0 else known

    def ties(self, number: int) -> TieReport | None:
        """What hangs on ties at one baseline."""
        affordable = 2 * self.config.margin * self.plan.saved_before <= self.plan.budget
        if self.calibration.cost.drew or not affordable:
            # A point taken once more would move the model's random numbers.
            return None
        about = (self.model, self.call, self.recipe, self.baselines[number], self.config)
        with restored_random_state(lambda: not self.calibration.measured, self.call.device):
            few = not self.calibration.measured
            return find_ties(*about, self.calibration.maxima, few=few)

    def check_precision(self, error: PrecisionError, outcome: Callable[[], Outcome] | None) -> None:
        """Notes what the precision costs; raises where that is more than it may. outcome: of a call
        that has measured it itself.
        """
        name, worst = self.strategy.precision.name, error.other or 0.0
        if outcome is not None:
            found = outcome()
            assert found.precision_error is not None
            self.calibration.errors.note(found.precision_error, found.underflow, self.limit)
            worst = float(found.precision_error.max())
        # Not `>`: what is not known may be anything.
        if self.limit < math.inf and not worst <= self.limit:
            raise PrecisionCostsError(
                f"{name} would cost {worst:.2g}, and {self.limit:.2g} is allowed"
            )


@dataclass(frozen=True)
class Progress:
    """A launch is done: `done` of at most `of` points; `outcome()` is the map so far, if there is
    one: `maps`. job: by which plan.
    """

    done: int
    of: int
    outcome: Callable[[], Outcome]
    job: Job
    maps: bool = True


Steps = Generator[EvaluationRequest | Progress, Any, None]
"""A call on its way: results are sent in to each request, or what went wrong is thrown."""
Report = Callable[..., Progress]
"""From an evaluation, the points done and those in all, and whether there are maps, to progress."""
