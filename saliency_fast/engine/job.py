"""Job: a call of an engine, from what is known of its model to its moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from saliency_fast.engine.arena import Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.hoist import hoistable
from saliency_fast.engine.memory import read_budget
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.prepare import Limits, baselines_of, make_plan
from saliency_fast.engine.probe import Probe, fitting, probe
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.engine.region import Part, Region, read_region
from saliency_fast.engine.run import Moment, Outcome, Run, average
from saliency_fast.engine.traced import launches_of, seconds_per_point, wait_for
from saliency_fast.engine.trial import Trial
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import BudgetError
from saliency_fast.model.calls import NotLeanError
from saliency_fast.model.routes import Inputs

Known = dict[tuple[object, ...], Probe]
"""What points of a model took, by their shapes and by what they were asked for."""


@dataclass
class Job:
    """A call ready to run. way, plan and launches change where a launch does what no probe did."""

    model: Model
    call: Call
    recipe: Recipe
    baselines: list[Inputs]
    part: Part | None
    way: Way
    plan: Plan
    launches: Launches | None
    _probed: Probe
    _as_it_is: Callable[[str], tuple[Probe, Plan]]

    def moments(self) -> Iterator[Moment]:
        """The moments of the call, from the beginning again where its way turns out not to hold."""
        try:
            yield from self._moments()
        except NotLeanError as refusal:
            self._probed, self.plan = self._as_it_is(f"given up in a launch: {refusal}")
            self.way, self.launches = self._probed.way, None
            yield from self._moments()

    def _moments(self) -> Iterator[Moment]:
        """The moments of one run for each baseline; outcomes average over those so far."""
        finished: list[Outcome] = []
        for number in range(len(self.baselines)):
            run, last, seconds = self.run(number), None, 0.0
            moments = run.moments()
            while True:
                started = time.perf_counter()
                moment = next(moments, None)
                if moment is None:
                    wait_for(self.call.device)
                seconds += time.perf_counter() - started
                if moment is None:
                    break
                last, before = moment, tuple(finished)
                yield Moment(
                    last.done + number * last.of,
                    last.of * len(self.baselines),
                    lambda last=last, before=before: average([*before, last.outcome()]),  # type: ignore[misc]
                )
            if last is not None:
                self._probed.seconds[self._kind] = seconds / max(1, last.done)
                finished.append(last.outcome())

    def run(self, number: int = 0) -> Run:
        """A run over the baseline of that number."""
        baselines, plan = self.baselines[number], self.plan
        return Run(self.way, self.model, self.call, baselines, self.recipe, plan, self.launches)

    @property
    def _kind(self) -> tuple[str, int]:
        return str(self.way), self.plan.points_per_launch

    def trace(self, planned: Callable[..., Plan]) -> None:
        """Learns what launches take, once for all calls, and plans with it."""
        kind, known = self._kind, self._probed.launches
        if kind not in known:
            known[kind] = launches_of(self.run(), self.plan)
        self.launches = known[kind]
        self.plan = planned(self._probed, launches=self.launches)

    def time(self) -> None:
        """Tells the plan what a point takes: in an earlier call, else on trial."""
        seconds = self._probed.seconds
        if self.way.tiled is not None and self._kind not in seconds:
            # To try a single tile tells nothing, and to try them all is the call itself.
            return
        if self._kind not in seconds:
            found = seconds_per_point(self.run(), self.plan)
            if found is None:
                return
            seconds[self._kind] = found
        self.plan = replace(self.plan, seconds_per_point=seconds[self._kind])


def prepare(
    model: Model,
    method: Method,
    recipe: Recipe,
    call: Call,
    baseline: Any,
    region: Region,
    limits: Limits,
    known: Known,
    *,
    lean: bool,
) -> Job:
    """Probes what is not known yet, and plans; raises BudgetError where one point does not fit."""
    part, baselines = read_region(region, call), baselines_of(call, recipe, baseline)
    further = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
    shapes = tuple((x.shape[1:], x.dtype, x.device) for x in (*call.inputs, *further))
    # The prefix differs between methods whose points lie on lines and others.
    kind = (recipe.family.straight, hoistable(recipe))
    key = (shapes, call.targets.count, lean, kind)
    probed, budget = known.get(key), read_budget(limits.memory_budget, call.device)
    if probed is None or not probed.holds(model, call):
        probed = probe(model, call, recipe, baselines[0], lean=lean, budget=budget)
        known[key] = probed
    planned = partial(make_plan, method, recipe, call, baselines, limits=limits)

    def as_it_is(reason: str) -> tuple[Probe, Plan]:
        known[key] = known[key].as_it_is(reason)
        return known[key], planned(known[key])

    refusal: BudgetError | None = None
    trial = Trial(call, baselines[0], recipe)
    for found, plan in fitting(probed, model, trial, budget, planned):
        way = found.way if part is None else found.way.within(part.box)
        job = Job(model, call, recipe, baselines, part, way, plan, None, found, as_it_is)
        try:
            # Tiles are laid out by a budget of their own.
            if way.tiled is None:
                job.trace(planned)
        except BudgetError as error:
            # Its launches take more than its tensors told.
            refusal = error
        else:
            return job
    assert refusal is not None
    raise refusal
