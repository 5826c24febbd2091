"""Job: a call of an engine, from what is known of its model to its moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.captured import (
    CapturedRun,
    NotRecordedError,
    OverflowedError,
    kind_of,
    refusal,
)
from saliency_fast.engine.graphs import RECORDERS, cache_of
from saliency_fast.engine.independence import Independence, RowsMeetError
from saliency_fast.engine.launch import Moment, Steps, Want, alone
from saliency_fast.engine.loss import Loss
from saliency_fast.engine.outcome import Outcome, average
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.probe import Probe
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.engine.region import Part
from saliency_fast.engine.rounds import RoundsRun
from saliency_fast.engine.run import Run
from saliency_fast.engine.ties import Tied, find_ties
from saliency_fast.engine.traced import launches_of, seconds_per_point, wait_for
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import ModelCallError, SaliencyError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.model.failures import is_out_of_memory


class _CostlyError(Exception):
    """A precision costs a map more than it may."""


@dataclass
class Job:
    """A call ready to run. way, plan and launches change where a launch does what no probe did.

    otherwise: the same call in another precision, where this one costs its maps more than `limit`.
    independence: what is known of the model's rows; again: the call anew, with what is known now.
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
    graphs: bool = True
    otherwise: Callable[[str], Job] | None = None
    limit: float = math.inf
    independence: Independence | None = None
    again: Callable[[], Job] | None = None

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
        """The steps of the call, from the beginning again where its way turns out not to hold, rows
        to meet, or a precision to cost more than it may.
        """
        made = self.again
        try:
            yield from self._steps()
            return
        except NotLeanError as refusal:
            self._probed, self.plan = self._as_it_is(f"given up in a launch: {refusal}")
            self.way, self.launches = self._probed.way.of_now(), None
        except _CostlyError as found:
            assert self.otherwise is not None
            made = partial(self.otherwise, str(found))
        except Exception as error:
            rows, met = self.independence, isinstance(error, RowsMeetError)
            # Not all that models do runs under vmap; what is wrong otherwise shows again.
            if rows is None or not (met or (self.way.apart and not is_out_of_memory(error))):
                raise
            rows.meet(str(error) if met else rows.reason, vmapped=self.way.apart)
        if made is None:
            yield from self._steps()
            return
        graphs = self.graphs
        # All but the call itself: its plan and its way are others.
        self.__dict__.update(made().__dict__)
        self.graphs = graphs
        yield from self.steps()

    def _steps(self) -> Steps:
        """The steps of one run for each baseline; outcomes average over those so far."""
        finished: list[Outcome] = []
        for number in range(len(self.baselines)):
            known, tied = self._known(), self._tied(number)
            if (yield from self._captured_steps(number, known, tied, finished)):
                continue
            run = self.run(number, known)
            run.know(tied)
            yield from run.steps(partial(self._moment, run, tuple(finished), known is None))
            if number < len(self.baselines) - 1:
                finished.append(run.outcome())

    def _captured_steps(
        self, number: int, known: Loss | None, tied: Tied | None, finished: list[Outcome]
    ) -> Generator[Want | Moment, Any, bool]:
        """The steps of a run by recorded launches, whose outcome it adds to `finished`; False where
        there is no such run, or it came to nothing.
        """
        run, key = self._captured(number)
        if run is None or (tied is not None and tied.apart):
            return False
        owner, cache = self._probed.captures, cache_of(self.call.device)
        yield from self.run(number).prove()
        try:
            run.load(self.call, self.baselines[number], self.recipe, self.plan, known)
            run.tied = tied
            yield from run.steps(partial(self._moment, run, tuple(finished), known is None))
        except NotRecordedError as refusal:
            cause = refusal.__cause__
            if isinstance(cause, ModelCallError) or not isinstance(cause, SaliencyError):
                owner[key] = str(refusal)
            return False
        except OverflowedError:
            cache.put(owner, key, run)
            return False
        except SaliencyError:
            cache.put(owner, key, run)
            raise
        if number < len(self.baselines) - 1:
            finished.append(run.outcome())
        run.release()
        cache.put(owner, key, run)
        return True

    def _tied(self, number: int) -> Tied | None:
        if self._probed.cost.drew:
            # A point taken once more would move the model's random numbers.
            return None
        about = (self.call, self.recipe, self.baselines[number], self.plan)
        return find_ties(self.model, *about, self._probed.maxima)

    def _captured(self, number: int) -> tuple[CapturedRun | None, Any]:
        """A run by recorded launches that nobody else uses now, and its key."""
        if not self.graphs or self.call.device.type not in RECORDERS or self._not_captured():
            return None, None
        key, owner, device = self._capture_key(number), self._probed.captures, self.call.device
        if isinstance(owner.get(key), str):
            return None, key
        run: CapturedRun | None = cache_of(device).take(owner, key)
        if run is None:
            recorder, parts = RECORDERS[device.type](device), (self.model, self.call)
            way, baselines = self.way.of_now(), self.baselines[number]
            run = CapturedRun(way, *parts, baselines, self.recipe, self.plan, recorder)
        return run, key

    def _not_captured(self) -> str | None:
        known = self.independence
        reason = refusal(self.way, self.call, self.recipe, self.plan)
        if reason is None and known is not None and known.suspect is not None:
            return f"every launch is to be proved: {known.suspect.reason}"
        return reason

    def _capture_key(self, number: int) -> Any:
        if self.call.device.type not in RECORDERS or self.way.program is None:
            return None
        baselines = self.baselines[number]
        return str(self.way), kind_of(self.way, self.call, baselines, self.recipe, self.plan)

    def tell_graphs(self) -> None:
        """Writes into the plan whether launches are recorded."""
        if self.call.device.type not in RECORDERS:
            return
        found = self._probed.captures.get(self._capture_key(0))
        reason = self._not_captured() if self.graphs else "not wanted"
        if reason is None and isinstance(found, str):
            reason = found
        text = f"one for launches of {self.plan.points_per_launch}"
        self.plan = replace(self.plan, graphs=text if reason is None else f"off: {reason}")

    def _moment(
        self, run: Run, finished: tuple[Outcome, ...], new: bool, done: int, of: int
    ) -> Moment:
        """A moment of the call from one of a run; `new`: whether that looked at its precision."""
        if run.loss is not None and not run.judged:
            run.judged = True
            self._judge(run.outcome(), new=new)
        several, before = len(self.baselines), len(finished)
        # Recorded launches are another call's when this one is over.
        over = run.outcome() if isinstance(run, CapturedRun) and done == of else None

        def outcome() -> Outcome:
            return average([*finished, over or run.outcome()])

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
        kind = Run if self.recipe.rounds is None else RoundsRun
        parts = (way, self.model, self.call, baselines, self.recipe, plan, self.launches, known)
        run = kind(*parts)
        run.independence = self.independence
        return run

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
