"""Planner: from a bound call to a job, and to another job where a plan turns out not to hold."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import LaunchMemory, Trace, lent
from saliency_fast.engine.bind import Call, Model, Part, Region, is_finite, read_region
from saliency_fast.engine.calibrate import (
    NOTHING,
    Calibration,
    CalibrationCache,
    UnverifiedError,
    calibrated,
    in_precision,
    sharing,
)
from saliency_fast.engine.captured import captured_steps
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.independence import (
    SINGLE,
    UNRECORDED,
    VMAP,
    Independence,
    RowsMeetError,
)
from saliency_fast.engine.job import Job, PrecisionCostsError
from saliency_fast.engine.measure import FIRST_ROWS, Measurement
from saliency_fast.engine.memory import (
    Cost,
    Ledger,
    MemoryMeter,
    bytes_text,
    read_budget,
)
from saliency_fast.engine.plan import Limits, Plan, baselines_of, kept_bytes, make_plan
from saliency_fast.engine.recipe import Method, Recipe, WeightedSum
from saliency_fast.engine.strategies import STRATEGIES, Strategy
from saliency_fast.engine.trials import launches_of, timed, traced_sizes
from saliency_fast.errors import BudgetError, InputError, InputTypeError, ModelError, warn
from saliency_fast.graph.fingerprint import unchanging
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.passes.half import (
    AUTO,
    BY_DEFAULT,
    FLOAT32,
    OF_DEVICE,
    PRECISIONS,
    Precision,
    read_precision,
)
from saliency_fast.graph.program import tensors_among
from saliency_fast.model.failures import is_out_of_memory, warn_of_kernel
from saliency_fast.model.layers import Downstream
from saliency_fast.rules.intercept import Rules


@dataclass(frozen=True)
class _Attempt:
    """What made a job: its precision, why not another one, those that are left, limits and notes of
    its plan, and the key of its calibration.
    """

    precision: Precision
    reason: str | None
    others: tuple[str, ...]
    limits: Limits
    notes: tuple[str, ...]
    key: tuple[object, ...]


@dataclass(frozen=True)
class Prepared:
    """What of a job is the same for all calls of one kind."""

    attempt: _Attempt
    strategy: Strategy
    plan: Plan
    launches: LaunchMemory | None
    calibration: Calibration
    independence: Independence
    first: tuple[int, ...] = ()


@dataclass(frozen=True)
class Planner:
    """Makes the jobs of one call, whatever their precision.

    Args:
        model, method, recipe, call, baselines, part: What is explained.
        limits: What the user allows.
        cache: Calibrations of the model.
        config: Thresholds.
        lean: Whether memory-efficient strategies are wanted.
        alone: Whether launches are the call's own, or shared with other requests.
        graphs: Whether launches may be captured.
        direct: Whether calls of few points may do without a recording.
        deferred: Whether launches of a strategy may be compared with autograd, and not it before.
        used: By precision: what was found in this call, and its key; a call looks at its model
            once.
    """

    model: Model
    method: Method
    recipe: Recipe
    call: Call
    baselines: list[Inputs]
    part: Part | None
    limits: Limits
    cache: CalibrationCache
    config: EngineConfig
    lean: bool
    alone: bool
    graphs: bool
    direct: bool = False
    deferred: bool = True
    used: dict[str, tuple[tuple[object, ...], Calibration]] = field(default_factory=dict)
    _warned: list[bool] = field(default_factory=list)
    _seen: dict[int, tuple[object, ...]] = field(default_factory=dict)

    @cached_property
    def _key(self) -> tuple[object, ...]:
        call, recipe = self.call, self.recipe
        # The prefix differs between methods whose points lie on lines and others.
        measured = recipe.measured
        prefixed = measured.prefixed(self.config.prefix_from)
        kind = (measured.family.straight, prefixed, recipe.gradients, repr(recipe.rules))
        about = (call.shapes, call.targets.count, self.config, self.lean, self.alone)
        return *about, kind, call.settings

    @cached_property
    def _point(self) -> Measurement:
        about = (self.model, self.call, self.baselines[0], self.recipe.measured, self.config)
        single = self._single_example
        return Measurement(*about, single=single, deferred=self.deferred and single)

    @property
    def _single_example(self) -> bool:
        """Whether the call is a sum of gradients over so few points of one example that a first
        launch of one point, and comparisons with autograd at launches that count, pay.
        """
        recipe, call, limits, config = self.recipe, self.call, self.limits, self.config
        if not (isinstance(recipe, WeightedSum) and self.alone and self.lean) or recipe.at_input:
            return False
        plain = recipe.gradients and recipe.rules is None and not recipe.second
        own = self.part is None and limits.memory_budget is None and len(self.baselines) == 1
        kinds = not call.halves and config.exact_dtypes.isdisjoint(call.dtypes)
        few = recipe.levels[0].count > FIRST_ROWS and recipe.count < config.compared_at_three_from
        one = call.batch == 1 and call.device.type == "cpu" and not call.targets.predicted
        return plain and own and kinds and few and one

    def calibration(self, precision: Precision) -> Calibration:
        """What is known of a point, or is measured now."""
        if precision.name not in self.used:
            # Of the model as the call found it, also where the call begins anew.
            with unchanging(self._seen):
                self.used[precision.name] = self._calibrated(precision)
        return self.used[precision.name][1]

    def _keep(
        self, key: tuple[object, ...], precision: Precision, calibration: Calibration
    ) -> Calibration:
        # Arguments that are new in every call must not pile up.
        while len(self.cache) >= self.config.most_known:
            self.cache.pop(next(iter(self.cache)))
        if calibration.verification is None:
            self.cache[key] = calibration
        self.used[precision.name] = key, calibration
        return calibration

    def _calibrated(self, precision: Precision) -> tuple[tuple[object, ...], Calibration]:
        key = (*self._key, precision.name)
        if (eager := self._eager(key, precision)) is not None:
            return key, eager
        calibration = self._found(key, precision, self._point)
        if (read := self._reads(calibration)) is None:
            return key, calibration
        # Further arguments by which the model's Python goes another way; where there are many such
        # ways, or examples go several of them, no program serves.
        key, kinds = (*key, read), sum(one[: len(key)] == key for one in self.cache)
        if kinds < self.config.most_read:
            calibration = self._found(key, precision, self._point)
            if self._reads(calibration) is None:
                return key, calibration
        else:
            key = (*key[:-1], "others")
        return key, self._found(key, precision, replace(self._point, programs=False))

    def _found(
        self, key: tuple[object, ...], precision: Precision, point: Measurement
    ) -> Calibration:
        calibration = self.cache.get(key)
        if calibration is not None and not self._serves(calibration):
            calibration = None
        if calibration is not None and (point.programs or calibration.strategy.program is None):
            if calibration.holds(self.model, self.call):
                return calibration
            if (again := calibration.renewed(point)) is not None:
                return self._keep(key, precision, again)
            # Another model than the one whose rows were proved.
            self.cache.rows.clear()
        if precision.exact:
            budget = read_budget(self.limits.memory_budget, self.call.device)
            with lent(self.call.device, self.call.inputs):
                calibration = calibrated(point, lean=self.lean, budget=budget)
                calibration = calibration if self.alone else sharing(calibration, point)
        else:
            calibration = in_precision(self.calibration(FLOAT32), precision, point)
        return self._keep(key, precision, calibration)

    def _serves(self, calibration: Calibration) -> bool:
        """Whether there are not so many points by now that a recording repays."""
        if calibration.recorded:
            return True
        if not (self.direct and self.alone and self.part is None):
            return False
        points = self.recipe.count * self.call.batch
        return eager_serves(calibration, points, self.cache.points.get(self._key, 0), self.config)

    def _eager(self, key: tuple[object, ...], precision: Precision) -> Calibration | None:
        """For few points: that they run eagerly; the first launch tells what a point costs."""
        earlier = self.cache.get(key)
        if not precision.exact:
            return None
        if earlier is not None and (earlier.recorded or not self._serves(earlier)):
            return None
        eager = self._first_eager() if earlier is None else earlier
        if eager is None or not self._serves(eager):
            return None
        if not self._single and (eager.mark is None or not eager.holds(self.model, self.call)):
            eager = eager.renewed(self._point) or eager
        return eager if eager is earlier else self._keep(key, precision, eager)

    @property
    def _single(self) -> bool:
        """Whether launches of a model of which nothing is known have one point: to prove of few
        rows that they do not meet takes longer.
        """
        return self.recipe.count * self.call.batch <= self.config.single_points

    def _first_eager(self) -> Calibration | None:
        """Eager points, before any was run; None where that may take too much."""
        config, recipe, rules = self.config, self.recipe, self.recipe.rules
        each = sum(x[0].nbytes for x in self.call.inputs)
        # Rules with references take each example through the model together with another row.
        paired = _pairs(rules)
        limited = self.limits.memory_budget is not None
        if limited or paired or config.usual_ratio * each > config.unforeseen_bytes:
            return None
        weights = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        small = each + sum(one.nbytes for one in weights) <= config.small_bytes
        reason = "so few points do not repay a recording" if self.lean else "lean=False"
        # Its versions have each their gradient from PyTorch's definition; where one is not served,
        # or the call is about more than its inputs' gradients, autograd takes over.
        single = set(self.call.dtypes) == {torch.float32} and rules is None and not recipe.second
        inside = self.call.layers or isinstance(self.model, Downstream)
        lean = self.lean and recipe.gradients and single and not inside
        strategy = Strategy(rules=rules, intercepted=lean and each >= config.direct_lean_from)
        refused = [
            one for one in STRATEGIES if one.lean and (one.recorded or not strategy.intercepted)
        ]
        refusals = tuple((one.name, reason) for one in refused)
        about = (strategy, NOTHING, NOTHING, None, refusals)
        return Calibration(*about, most=config.direct_points, small=small)

    def _reads(self, calibration: Calibration) -> tuple[object, ...] | None:
        """What the model's Python reads of each example's further arguments, and of all; None where
        that is what it read when it was recorded.
        """
        program = calibration.strategy.program
        if program is None or not program.reads:
            return None
        function = calibration.strategy.score_function(self.model, self.call)
        everyone, values, same = range(self.call.batch), list[object](), True
        for rows in (*([one] for one in everyone), list(everyone)):
            example = torch.tensor(rows, device=self.call.device)
            for read, value in program.reading(tensors_among(*function.rows(example)), len(rows)):
                values.append((type(value), repr(value)))
                same = same and read.holds(value)
        return None if same else tuple(values)

    @cached_property
    def _rows_key(self) -> tuple[object, ...]:
        """Equal for calls whose rows are proved together."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        return self.call.shapes, self.call.reading, *map(id, modules)

    def independence(self, calibration: Calibration) -> Independence:
        """What is known of the model's rows."""
        key, several, suspect = self._rows_key, self.cache.rows, calibration.suspect
        while len(several) >= self.config.most_known:
            several.pop(next(iter(several)))
        if key in several and suspect is not UNRECORDED and several[key].unrecorded:
            del several[key]
        rows = several.setdefault(key, Independence(suspect))
        by_function = self.call.targets.function is not None
        draws = calibration.cost.drew or not calibration.measured
        rows.renew(suspect, draws=draws, by_function=by_function)
        if suspect is not None and suspect.arguments and rows.apart is None:
            # Which way Python goes depends on the examples of a launch, not on its points.
            how = rows.difference(self.model, self.call, self.call.batch)
            if how is not None:
                rows.meet(how)
        return rows

    def _kind(
        self, precision: Precision, others: tuple[str, ...] = ()
    ) -> tuple[object, ...] | None:
        """Equal for calls that one `Prepared` serves; None where none does."""
        if self.part is not None or self.call.halves:
            return None
        sizes = (self.call.batch, self.recipe.count, *(len(one[0]) for one in self.baselines))
        about = (self.method, self.limits, self.graphs, precision.name, others)
        return *self._key, *sizes, *about, self._rows_key

    def earlier(self, precision: Precision, others: tuple[str, ...] = ()) -> Job | None:
        """The job of an earlier call of the same kind with this call's tensors; None where there
        was none, or what it rests on may have changed.
        """
        try:
            prepared: Prepared | None = self.cache.prepared.get(self._kind(precision, others))
        except TypeError:
            # A method with a parameter that has no hash.
            return None
        if prepared is None or not prepared.calibration.holds(self.model, self.call):
            return None
        rows, plan, calibration = prepared.independence, prepared.plan, prepared.calibration
        # Given up in a launch, or not enough any more.
        known = self.cache.get(prepared.attempt.key)
        if known is not calibration or not self._serves(calibration):
            return None
        alone = rows.unrecorded and plan.points_per_launch == 1
        if rows.apart is not None or not (rows.suspect is None or alone):
            return None
        if self._tight(plan) or self._reads(prepared.calibration) is not None:
            return None
        by_function = self.call.targets.function is not None
        rows.renew(rows.suspect, draws=prepared.calibration.cost.drew, by_function=by_function)
        self._count()
        return self._job(prepared)

    def _count(self) -> None:
        """Counts the points of this call."""
        points = self.cache.points
        while len(points) >= self.config.most_known:
            points.pop(next(iter(points)))
        points[self._key] = points.get(self._key, 0) + self.recipe.count * self.call.batch

    def _tight(self, plan: Plan) -> bool:
        """Whether another amount of free memory might give another plan."""
        free = self.limits.memory_budget is None
        return free and 2 * plan.peak_bytes > read_budget(None, self.call.device)

    def _job(self, prepared: Prepared) -> Job:
        """The job of this call by what was prepared for its kind."""
        calibration = prepared.calibration
        known = calibration.measured and not calibration.estimated
        ledger = None if known else Ledger(MemoryMeter(), accepted=calibration.recorded)
        pending, recorded = calibration.verification is not None, calibration.recorded
        return Job(
            *(self.model, self.method, self.call, self.recipe, self.baselines, self.part),
            # A copy: copies of weights are a call's own.
            strategy=prepared.strategy.with_profiler(ledger)
            if ledger is not None and recorded
            else replace(prepared.strategy),
            plan=prepared.plan,
            launches=prepared.launches,
            calibration=prepared.calibration,
            independence=prepared.independence,
            config=self.config,
            replan=partial(self._replanned, prepared.attempt),
            capture=captured_steps if self.graphs else None,
            first=prepared.first,
            with_cost=None if known else partial(self._with_cost, prepared),
            kind=self._key,
            ledger=ledger,
            verified=partial(self._verified, prepared) if pending else None,
        )

    def _verified(self, prepared: Prepared) -> Calibration:
        """Keeps a calibration whose strategy has agreed with autograd."""
        attempt = prepared.attempt
        # As it was measured: a strategy that takes less memory is this call's own.
        calibration = replace(self.used[attempt.precision.name][1], verification=None)
        return self._keep(attempt.key, attempt.precision, calibration)

    def _with_cost(self, prepared: Prepared, cost: Cost, *, keep: bool = True) -> Job:
        """The job that goes on once its first launch has told what a point costs, which is kept for
        later calls.
        """
        attempt = prepared.attempt
        calibration = replace(prepared.calibration, cost=cost, launches={}, seconds={})
        if not calibration.recorded:
            calibration = replace(calibration, eager=cost)
        if keep:
            self._keep(attempt.key, attempt.precision, calibration)
        if cost.random:
            attempt = replace(attempt, limits=replace(attempt.limits, points_per_launch=1))
        plan = self._plan(calibration, attempt)
        return self._traced(calibration, plan, attempt, prepared.independence)

    def job(
        self,
        precision: Precision,
        reason: str | None = None,
        others: Sequence[str] = (),
        limit: float = math.inf,
    ) -> Job:
        """A job by the first strategy that memory affords.

        reason: why not in another precision. others: precisions that may take this one's place,
        where it costs a map more than `limit`.
        """
        calibration, key = self.calibration(precision), self.used[precision.name][0]
        rows, limits, notes = self.independence(calibration), self.limits, list[str]()
        if reason is not None:
            notes.append(f"precision: {reason}")
        if rows.apart is not None:
            # Rules and what looks inside of the model do not go with vmap.
            recipe = self.recipe
            inside = self.call.layers or isinstance(self.model, Downstream) or self.call.halves
            plain = not (inside or recipe.second or recipe.rules is not None)
            vmapped = rows.apart == VMAP and plain and precision.exact
            how = f"by {VMAP}" if vmapped else SINGLE
            notes.append(f"rows may depend on each other ({rows.reason}): each is run alone, {how}")
            if vmapped:
                calibration = calibration.row_by_row()
            else:
                limits = replace(limits, points_per_launch=1)
            self._warn_of_dependence(self.call.batch, rows)
        if not calibration.recorded and (self._single or calibration.cost.random):
            # A model that draws is to draw in every call as in the first.
            limits = replace(limits, points_per_launch=1)
        rules = self.recipe.rules
        # Captum's version takes the whole batch and its baselines through the model as they are.
        if _pairs(rules):
            self._need_pairs(rows)
        attempt = _Attempt(precision, reason, tuple(others), limits, tuple(notes), key)
        job = self._fitting(calibration, attempt, rows)
        self._count()
        job = replace(job, limit=limit if others else math.inf)
        if job.plan.points_per_launch == 1 and rows.compare_once():
            # No launch will tell. Two of them, since memory may be why there is one.
            self._warn_of_dependence(2, rows)
        return job

    def _fitting(self, calibration: Calibration, attempt: _Attempt, rows: Independence) -> Job:
        """A job by what was calibrated or the first smaller strategy whose plan fits in memory;
        raises BudgetError where there is none.
        """
        budget = read_budget(self.limits.memory_budget, self.call.device)
        shapes, refusal, last = replace(self._point, on_meta=True), None, None
        smaller = calibration.strategy.smaller(budget, self.call.device, self.config)
        for strategy in itertools.chain([None], smaller):
            try:
                one = calibration
                if strategy is not None:
                    one = calibration.smaller(strategy, shapes.by(strategy).cost)
                plan = self._plan(one, attempt)
            except NotLeanError:
                continue
            except BudgetError as error:
                refusal = refusal or error
                continue
            try:
                return self._traced(one, plan, attempt, rows)
            except BudgetError as error:
                # Its launches take more than its tensors told.
                last = error
        final = last or refusal
        assert final is not None
        raise final

    def _plan(
        self, calibration: Calibration, attempt: _Attempt, launches: LaunchMemory | None = None
    ) -> Plan:
        about = (self.method, self.recipe, self.call, self.baselines)
        plan = make_plan(*about, calibration, attempt.limits, self.config, launches)
        return replace(plan, notes=(*plan.notes, *attempt.notes))

    def _traced(
        self, calibration: Calibration, plan: Plan, attempt: _Attempt, rows: Independence
    ) -> Job:
        """A job whose launches are traced, once for all calls."""
        part, strategy = self.part, calibration.strategy
        if part is not None and part.first:
            strategy = strategy.within(part.box, self.config.region_share)
        if calibration.estimated and attempt.limits.points_per_launch != 1:
            # The launch that follows the first one tells how large the others are.
            plan = replace(plan, points_per_launch=max(plan.points_per_launch, 2))
        # As much memory as autograd takes for the call itself.
        small = self.recipe.at_input and calibration.small
        alone = calibration.alone_first or not (calibration.recorded or small)
        first = (1,) * (alone and plan.points_per_launch > 1)
        prepared = Prepared(attempt, strategy, plan, None, calibration, rows, first)
        job = self._job(prepared)
        if calibration.estimated:
            return job
        # Tiles are laid out by a budget of their own.
        sizes = () if strategy.tiled is not None else traced_sizes(job)
        # Other sizes of launches would draw other random numbers.
        own = isinstance(self.recipe, WeightedSum) and not calibration.cost.random and self.alone
        first = (*prepared.first, *sizes)
        if sizes and own and sum(first) < plan.points:
            # No launch has more points than are left then.
            most = max(plan.points - sum(first), *first)
            if most < plan.points_per_launch:
                limits = replace(attempt.limits, points_per_launch=most)
                attempt = replace(attempt, limits=limits)
                plan = self._plan(calibration, attempt)
                prepared = replace(prepared, attempt=attempt, plan=plan)
            prepared = replace(prepared, first=first)
            if job.key not in calibration.launches:
                go_on = partial(self._with_traces, prepared, job.key)
                return replace(self._job(prepared), traced=sizes, with_traces=go_on)
        if strategy.tiled is None:
            if job.key not in calibration.launches:
                # A trial takes as long as the few points of a call that runs eagerly.
                launches = launches_of(job) if calibration.recorded else None
                calibration.launches[job.key] = launches
            if (launches := calibration.launches[job.key]) is not None:
                plan = self._plan(calibration, attempt, launches)
                prepared = replace(prepared, plan=plan, launches=launches)
            job = self._job(prepared)
        settled = calibration.measured and calibration.verification is None
        if settled and not self._tight(plan):
            self._remember(prepared)
        return job

    def _with_traces(
        self, prepared: Prepared, key: tuple[str, int], traces: Mapping[int, Trace]
    ) -> Job:
        """The job that goes on once its first launches have told what launches take; raises
        BudgetError where that is more than the budget.
        """
        calibration, memory = prepared.calibration, LaunchMemory(dict(traces))
        calibration.launches[key] = memory if memory.consistent else None
        if memory.consistent:
            plan = self._plan(calibration, prepared.attempt, memory)
            prepared = replace(prepared, plan=plan, launches=memory)
        return self._job(prepared)

    def _remember(self, prepared: Prepared) -> None:
        """Keeps what was prepared for later calls of the same kind."""
        known = self.cache.prepared
        while len(known) >= self.config.most_known:
            known.pop(next(iter(known)))
        with suppress(TypeError):
            attempt = prepared.attempt
            if (kind := self._kind(attempt.precision, attempt.others)) is not None:
                known[kind] = prepared

    def fastest(self, limit: float) -> Job:
        """A job in the fastest precision whose maps are off by `limit` at most."""
        exact = self.calibration(FLOAT32)
        if not exact.recorded:
            # So few points repay neither a recording nor the choice.
            return self.earlier(FLOAT32) or self.job(FLOAT32)
        if not exact.order:
            exact.order.extend(self._order())
        precision, others = PRECISIONS[exact.order[0]], tuple(exact.order[1:])
        reason = f"{precision.name} by 'auto': the fastest here that may cost {limit:.2g}"
        earlier = self.earlier(precision, others)
        if earlier is not None:
            return replace(earlier, limit=limit if others else math.inf)
        return self.job(precision, reason, others, limit)

    def _order(self) -> list[str]:
        """Precisions that are faster than float32 here, the fastest first, and float32."""
        seconds = {}
        for name in OF_DEVICE.get(self.call.device.type, (FLOAT32.name,)):
            with suppress(ModelError, BudgetError):
                plan = timed(self.job(PRECISIONS[name])).plan
                seconds[name] = plan.seconds_per_point or math.inf
        least = self.config.faster * seconds.get(FLOAT32.name, math.inf)
        faster = [name for name, each in seconds.items() if each <= least]
        others = sorted((one for one in faster if one != FLOAT32.name), key=lambda n: seconds[n])
        return [*others, FLOAT32.name]

    def _replanned(self, attempt: _Attempt, job: Job, error: Exception) -> Job:
        """The job that begins again after an error; raises the error where no other plan helps."""
        others, rows, strategy = attempt.others, job.independence, job.strategy
        if isinstance(error, UnverifiedError):
            self.used.clear()
            return replace(self, deferred=False).job(attempt.precision, attempt.reason, others)
        if isinstance(error, PrecisionCostsError):
            return self.job(PRECISIONS[others[0]], str(error), others[1:], job.limit)
        short = is_out_of_memory(error) or isinstance(error, BudgetError)
        met = isinstance(error, RowsMeetError)
        if strategy.intercepted and not job.calibration.recorded and not (short or met):
            # Nothing was tried before the call: where the model is wrong, it says so again.
            warn_of_kernel(error)
            eager = job.calibration.given_up(f"given up in a launch: {error}")
            self._keep(attempt.key, attempt.precision, eager)
            return self.job(attempt.precision, attempt.reason, others, job.limit)
        lean = strategy.program is not None or strategy.intercepted
        if isinstance(error, NotLeanError) and lean:
            why = f"given up in a launch: {error}"
            calibration = self._keep(
                attempt.key, attempt.precision, job.calibration.by_autograd(why)
            )
            self.independence(calibration)
            plan, strategy = self._plan(calibration, attempt), calibration.strategy
            return replace(
                job, calibration=calibration, plan=plan, strategy=strategy, launches=None
            )
        if short and not job.calibration.recorded and job.plan.points_per_launch == 1:
            self.used.clear()
            return replace(self, direct=False).job(attempt.precision)
        if isinstance(error, BudgetError) and job.traced:
            # Its launches take more than its tensors told.
            return self.job(attempt.precision, attempt.reason, others, job.limit)
        if is_out_of_memory(error):
            return _halved(job, error)
        # Not all that models do runs under vmap; what is wrong otherwise shows again.
        if not (met or strategy.row_by_row):
            raise error
        rows.meet(str(error) if met else rows.reason, vmapped=strategy.row_by_row)
        return self.job(attempt.precision, attempt.reason, others, job.limit)

    def _need_pairs(self, rows: Independence) -> None:
        """Raises ModelError where an example and its reference, which rules take through the model
        together, depend on each other.
        """
        reason = None if rows.paired else rows.pair(self.model, self.call, self.baselines[0])
        if reason is not None:
            raise ModelError(
                f"{self.method.name} takes each example through the model together with its "
                f"reference, and the model lets rows depend on each other ({reason}): its rules "
                "would compare something else than this example and this reference; use "
                "'integrated_gradients', or a model without what joins its rows"
            )

    def _warn_of_dependence(self, examples: int, rows: Independence) -> None:
        """Warns, once, where one of the first so many examples of the call scores together with
        them something else than alone.
        """
        if self._warned or self.call.batch == 1:
            return
        self._warned.append(True)
        if (how := rows.difference(self.model, self.call, examples)) is not None:
            warn(
                f"the examples of this call depend on each other: {how}. Each is explained as it "
                "is alone; where the rows are parts of one input, such as the nodes of a graph, "
                "use rows='together'"
            )


def _halved(job: Job, error: Exception) -> Job:
    """The job with launches of half the size, out of memory."""
    plan = job.plan
    if plan.points_per_launch == 1:
        raise BudgetError(
            f"one point alone does not fit in memory: the plan expected "
            f"{bytes_text(plan.bytes_per_point)} a point; explain fewer examples or a "
            f"smaller input at once ({error})"
        ) from error
    if job.call.device.type == "cuda":
        # The failed launch lives on in the frames that the error holds.
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
    size = (plan.points_per_launch + 1) // 2
    note = f"out of memory: launches have {size} points instead of {plan.points_per_launch}"
    each = plan.bytes_per_point
    plan = replace(
        plan,
        points_per_launch=size,
        launch_bytes=size * each,
        halvings=plan.halvings + 1,
        notes=(*plan.notes, note),
    )
    return replace(job, plan=plan, traced=())


def prepare(
    model: Model,
    method: Method,
    recipe: Recipe,
    call: Call,
    baseline: Any,
    region: Region,
    limits: Limits,
    cache: CalibrationCache,
    config: EngineConfig,
    *,
    lean: bool,
    precision: str | None = FLOAT32.name,
    tolerance: float | None = None,
    alone: bool = True,
    graphs: bool = True,
) -> Job:
    """Measures what is not known yet, and plans; raises BudgetError where one point does not fit.

    precision: None is what `BY_DEFAULT` says. tolerance: what precision "auto" may cost a map; half
    of the method's own unless given. alone: its launches are its own. graphs: they may be captured.
    """
    method, recipe = _with_rule(method, recipe, call, region, limits, config)
    recipe = recipe.of(call.inputs, call.features, call.layouts)
    part, baselines = read_region(region, call), baselines_of(call, recipe, baseline)
    if recipe.scores_alone and lean:
        # What our versions of a call make of NaN need not be what the model makes of it.
        lean = call.finite and all(is_finite(one) for several in baselines for one in several)
    about = (model, method, recipe, call, baselines, part, limits, cache, config)
    direct = precision in (None, FLOAT32.name)
    precision = precision or BY_DEFAULT.get(call.device.type, FLOAT32.name)
    plain = precision == FLOAT32.name
    planner = Planner(*about, lean, alone, graphs, direct=direct, deferred=plain)
    if call.halves:
        _need_alike(model, call.dtypes)
    other = next((one for one in call.dtypes if one != torch.float32), None)
    if not isinstance(recipe, WeightedSum) or recipe.rules is not None:
        if precision not in (AUTO, FLOAT32.name):
            raise InputError(
                f"precision={precision!r} is for sums of gradients, whose error can be measured: "
                f"got the method {method.name}; use precision='float32'"
            )
        return planner.earlier(FLOAT32) or planner.job(FLOAT32)
    if precision == AUTO:
        if other is not None:
            return planner.earlier(FLOAT32) or planner.job(FLOAT32)
        if tolerance is None:
            half = None if recipe.tolerance is None else recipe.tolerance / 2
            tolerance = config.precision_tolerance if half is None else half
        return planner.fastest(tolerance)
    if other is not None and precision != FLOAT32.name:
        kind = str(other).removeprefix("torch.")
        raise InputError(
            f"precision={precision!r} is for float32 inputs: got {kind}; use .float() on inputs "
            f"and model, or precision='float32', which keeps {kind} as it is"
        )
    asked = read_precision(precision, call.device)
    return planner.earlier(asked) or planner.job(asked)


def _with_rule(
    method: Method,
    recipe: Recipe,
    call: Call,
    region: Region,
    limits: Limits,
    config: EngineConfig,
) -> tuple[Method, Recipe]:
    """The method with the rule that serves the call, and its recipe: nodes of each example's own
    unless the gradients that they keep do not fit.
    """
    refinement = recipe.refinement if isinstance(recipe, WeightedSum) else None
    if refinement is None:
        return method, recipe
    assert isinstance(recipe, WeightedSum)
    if refinement.otherwise is not None:
        kept, most = kept_bytes(refinement, call), config.kept_most
        if limits.memory_budget is not None:
            most = min(most, read_budget(limits.memory_budget, call.device) // 4)
        if region is not None or kept > most:
            return refinement.otherwise, refinement.otherwise.recipe()
    return refinement.method, recipe


def eager_serves(calibration: Calibration, points: int, earlier: int, config: EngineConfig) -> bool:
    """Whether an eager calibration serves a call of so many points, after `earlier` ones of its
    kind: there are not so many that a recording repays.
    """
    # Another order of launches would draw other random numbers in later calls.
    if points > calibration.most:
        return False
    if points == 1 and calibration.small:
        # A program's own calls take longer than what it spares of a single small point.
        return True
    most = max(calibration.most, config.direct_calls * points)
    return calibration.cost.random or earlier + points <= most


def _pairs(rules: Rules | None) -> bool:
    """Whether an example goes through the model with its reference, and with nothing else."""
    return rules is not None and rules.references and not getattr(rules, "captum", False)


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
