"""Job: a call of an engine, from what is known of its model to its moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.hoist import hoistable
from saliency_fast.engine.launch import Moment, Steps, alone
from saliency_fast.engine.loss import Loss
from saliency_fast.engine.memory import read_budget
from saliency_fast.engine.outcome import Outcome, average
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.prepare import Limits, baselines_of, make_plan
from saliency_fast.engine.probe import Probe, fitting, in_precision, probe, settings
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.engine.region import Part, Region, read_region
from saliency_fast.engine.run import Run
from saliency_fast.engine.traced import launches_of, seconds_per_point, wait_for
from saliency_fast.engine.trial import Trial
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import BudgetError, InputError, InputTypeError, ModelError
from saliency_fast.model.calls import NotLeanError
from saliency_fast.model.precision import (
    AUTO,
    FLOAT32,
    OF_DEVICE,
    PRECISIONS,
    Precision,
    read_precision,
)
from saliency_fast.model.routes import Inputs

ALLOWED = 0.01
"""Relative L2 that precision "auto" may cost a map, unless the user says otherwise."""
FASTER = 0.9
"""Of a float32 point's time, what a precision may take to count as faster."""
MOST_KNOWN = 256
"""Kinds of points that are remembered of a model."""
Known = dict[tuple[object, ...], Probe]
"""What points of a model took, by their shapes and by what they were asked for."""


class _CostlyError(Exception):
    """A precision costs a map more than it may."""


@dataclass
class Job:
    """A call ready to run. way, plan and launches change where a launch does what no probe did.

    otherwise: the same call in another precision, where this one costs its maps more than `limit`.
    """

    model: Model
    method: Method
    call: Call
    recipe: Recipe
    baselines: list[Inputs]
    part: Part | None
    way: Way
    plan: Plan
    launches: Launches | None
    _probed: Probe
    _as_it_is: Callable[[str], tuple[Probe, Plan]]
    otherwise: Callable[[str], Job] | None = None
    limit: float = math.inf

    def moments(self) -> Iterator[Moment]:
        """The moments of the call, run on its own."""
        last, seconds = None, 0.0
        arena = Arena(self.call.device, about=self.plan.launch_bytes)
        moments = alone(self.steps(), arena)
        try:
            while True:
                started = time.perf_counter()
                moment = next(moments, None)
                if moment is None:
                    wait_for(self.call.device)
                seconds += time.perf_counter() - started
                if moment is None:
                    break
                last = moment
                yield moment
        finally:
            moments.close()
            arena.close()
        if last is not None:
            self._probed.seconds[self._kind] = seconds / max(1, last.done)

    def steps(self) -> Steps:
        """The steps of the call, from the beginning again where its way turns out not to hold, or a
        precision to cost more than it may.
        """
        try:
            yield from self._steps()
        except NotLeanError as refusal:
            self._probed, self.plan = self._as_it_is(f"given up in a launch: {refusal}")
            self.way, self.launches = self._probed.way.of_now(), None
            yield from self._steps()
        except _CostlyError as found:
            assert self.otherwise is not None
            # All but the call itself: its plan and its way are another precision's.
            self.__dict__.update(self.otherwise(str(found)).__dict__)
            yield from self.steps()

    def _steps(self) -> Steps:
        """The steps of one run for each baseline; outcomes average over those so far."""
        finished: list[Outcome] = []
        for number in range(len(self.baselines)):
            known = self._known()
            run = self.run(number, known)
            yield from run.steps(partial(self._moment, run, tuple(finished), known is None))
            if number < len(self.baselines) - 1:
                finished.append(run.outcome())

    def _moment(
        self, run: Run, finished: tuple[Outcome, ...], new: bool, done: int, of: int
    ) -> Moment:
        """A moment of the call from one of a run; `new`: whether that looked at its precision."""
        if run.loss is not None and not run.judged:
            run.judged = True
            self._judge(run.outcome(), new=new)
        several, before = len(self.baselines), len(finished)

        def outcome() -> Outcome:
            return average([*finished, run.outcome()])

        return Moment(done + before * of, of * several, outcome)

    def _judge(self, outcome: Outcome, *, new: bool) -> None:
        """Takes note of what the precision costs; raises where that is more than it may."""
        assert outcome.precision_error is not None
        if new:
            self._probed.losses.note(outcome.precision_error, outcome.underflow)
        worst = float(outcome.precision_error.max())
        # Not `>`: what is not known may be anything.
        if self.otherwise is not None and not worst <= self.limit:
            name = self.way.precision.name
            raise _CostlyError(f"{name} would cost {worst:.2g}, and {self.limit:.2g} is allowed")

    def _known(self) -> Loss | None:
        """What is known of the precision's cost."""
        if self.way.precision.exact:
            return None
        maps, points = self.call.targets.count, self.plan.points
        return self._probed.losses.known(points, maps, self.call.device)

    def run(self, number: int = 0, known: Loss | None = None) -> Run:
        """A run over the baseline of that number."""
        baselines, plan, way = self.baselines[number], self.plan, self.way
        return Run(way, self.model, self.call, baselines, self.recipe, plan, self.launches, known)

    @property
    def _kind(self) -> tuple[str, int]:
        return str(self.way), self.plan.points_per_launch

    def trace(self, planned: Callable[..., Plan]) -> None:
        """Learns what launches take, once for all calls, and plans with it."""
        kind, known = self._kind, self._probed.launches
        if kind not in known:
            known[kind] = launches_of(self.run(), self.plan, draws=self._probed.cost.drew)
        self.launches = known[kind]
        if self.launches is not None:
            self.plan = planned(self._probed, launches=self.launches)

    def time(self) -> None:
        """Tells the plan what a point takes: in an earlier call, else on trial."""
        seconds = self._probed.seconds
        if self.way.tiled is not None and self._kind not in seconds:
            # To try a single tile tells nothing, and to try them all is the call itself.
            return
        if self._kind not in seconds:
            found = seconds_per_point(self.run(), self.plan, draws=self._probed.cost.drew)
            if found is None:
                return
            seconds[self._kind] = found
        self.plan = replace(self.plan, seconds_per_point=seconds[self._kind])


@dataclass(frozen=True)
class _Preparation:
    """What the jobs of one call have in common, whatever their precision."""

    model: Model
    method: Method
    recipe: Recipe
    call: Call
    baselines: list[Inputs]
    part: Part | None
    limits: Limits
    known: Known
    lean: bool

    @property
    def _key(self) -> tuple[object, ...]:
        call, recipe = self.call, self.recipe
        further = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
        tensors = (*call.inputs, *further)
        shapes = (call.dtypes, *((x.shape[1:], x.dtype, x.device) for x in tensors))
        # The prefix differs between methods whose points lie on lines and others.
        kind = (recipe.family.straight, hoistable(recipe))
        return shapes, call.targets.count, self.lean, kind, settings(call)

    @property
    def _trial(self) -> Trial:
        return Trial(self.call, self.baselines[0], self.recipe)

    def probed(self, precision: Precision) -> Probe:
        """What is known of a point, or is found out now."""
        key = (*self._key, precision.name)
        found = self.known.get(key)
        if found is not None and found.holds(self.model, self.call):
            return found
        if precision.exact:
            budget, first = read_budget(self.limits.memory_budget, self.call.device), self.baselines
            trial = (self.model, self.call, self.recipe, first[0])
            found = probe(*trial, lean=self.lean, budget=budget)
        else:
            exact = self.probed(FLOAT32)
            found = in_precision(exact, precision, self.model, self._trial)
        # Arguments that are new in every call must not pile up.
        while len(self.known) >= MOST_KNOWN:
            self.known.pop(next(iter(self.known)))
        self.known[key] = found
        return found

    def job(self, precision: Precision, said: str | None = None) -> Job:
        """A job by the first way that the plan affords; `said`: why not in another precision."""
        probed, key = self.probed(precision), (*self._key, precision.name)
        budget = read_budget(self.limits.memory_budget, self.call.device)
        planned = partial(self._planned, said)

        def as_it_is(reason: str) -> tuple[Probe, Plan]:
            self.known[key] = found = probed.as_it_is(reason)
            return found, planned(found)

        refusal: BudgetError | None = None
        for found, plan in fitting(probed, self.model, self._trial, budget, planned):
            way = (found.way if self.part is None else found.way.within(self.part.box)).of_now()
            parts = (self.call, self.recipe, self.baselines, self.part)
            job = Job(self.model, self.method, *parts, way, plan, None, found, as_it_is)
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

    def fastest(self, limit: float) -> Job:
        """A job in the fastest precision whose maps are off by `limit` at most."""
        exact = self.probed(FLOAT32)
        if not exact.order:
            exact.order.extend(self._order())
        return self._among(tuple(exact.order), limit, None)

    def _among(self, names: Sequence[str], limit: float, said: str | None) -> Job:
        job = self.job(PRECISIONS[names[0]], said)
        if len(names) > 1:
            job.limit, job.otherwise = limit, partial(self._among, names[1:], limit)
        return job

    def _order(self) -> list[str]:
        """Precisions that are faster than float32 here, the fastest first, and float32."""
        found = {}
        for name in OF_DEVICE.get(self.call.device.type, (FLOAT32.name,)):
            with suppress(ModelError, BudgetError):
                job = self.job(PRECISIONS[name])
                job.time()
                found[name] = job.plan.seconds_per_point or math.inf
        least = FASTER * found.get(FLOAT32.name, math.inf)
        faster = [name for name, seconds in found.items() if seconds <= least]
        others = sorted((one for one in faster if one != FLOAT32.name), key=lambda n: found[n])
        return [*others, FLOAT32.name]

    def _planned(self, said: str | None, probed: Probe, launches: Launches | None = None) -> Plan:
        call, recipe, limits = self.call, self.recipe, self.limits
        plan = make_plan(self.method, recipe, call, self.baselines, probed, limits, launches)
        return plan if said is None else replace(plan, notes=(*plan.notes, f"precision: {said}"))


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
    precision: str = FLOAT32.name,
    tolerance: float | None = None,
) -> Job:
    """Probes what is not known yet, and plans; raises BudgetError where one point does not fit.

    tolerance: what precision "auto" may cost a map; half of the method's own unless given.
    """
    part, baselines = read_region(region, call), baselines_of(call, recipe, baseline)
    about = _Preparation(model, method, recipe, call, baselines, part, limits, known, lean)
    if call.halves:
        _need_alike(model, call.dtypes)
    other = next((one for one in call.dtypes if one != torch.float32), None)
    if precision == AUTO:
        if other is not None:
            return about.job(FLOAT32)
        if tolerance is None:
            tolerance = ALLOWED if recipe.tolerance is None else recipe.tolerance / 2
        return about.fastest(tolerance)
    if other is not None and precision != FLOAT32.name:
        kind = str(other).removeprefix("torch.")
        raise InputError(
            f"precision={precision!r} is for float32 inputs: got {kind}; use .float() on inputs "
            f"and model, or precision='float32', which keeps {kind} as it is"
        )
    return about.job(read_precision(precision, call.device))


def _need_alike(model: Model, dtypes: Sequence[torch.dtype]) -> None:
    """Raises InputTypeError where inputs are in a half type and none of the weights are."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    kinds = {one.dtype for one in weights if one.is_floating_point()}
    if kinds and kinds.isdisjoint(dtypes):
        given, own = [str(one).removeprefix("torch.") for one in (dtypes[0], min(kinds, key=str))]
        raise InputTypeError(
            f"the input must have the type of the model's weights: got {given}, the weights are "
            f"{own}; use .float(), and precision= for the model's arithmetic"
        )
