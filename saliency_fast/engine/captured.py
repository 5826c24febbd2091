"""Captured launches: an evaluation that a device records once, for every call of its kind.

Inputs, baselines, targets, seeds, nodes, weights and the number of the next row lie in memory of
its own. A call writes them and replays; nothing of them is in what was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.adaptive import AdaptiveEvaluation
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.bind import Call
from saliency_fast.engine.cudagraph import (
    DEVICES,
    RECORDERS,
    WARM_UPS,
    CannotCaptureError,
    DryRun,
    NoStreamError,
    cache_of,
)
from saliency_fast.engine.evaluation import SumEvaluation, parts_of
from saliency_fast.engine.independence import TieReport
from saliency_fast.engine.job import Job, Progress
from saliency_fast.engine.launch import EvaluationRequest, EvaluationResult, joined, wait_for
from saliency_fast.engine.loop import drive
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.points import seeds
from saliency_fast.engine.precision import PrecisionError, finite
from saliency_fast.engine.recipe import Level, Recipe, Rows, WeightedSum
from saliency_fast.errors import ModelCallError, SaliencyError
from saliency_fast.graph.passes.half import users_tf32
from saliency_fast.model.failures import is_out_of_memory, warn_of_kernel
from saliency_fast.model.layout import Layouts


class OverflowedError(Exception):
    """A half type could not hold the gradients of a captured launch."""


class NotCapturedError(Exception):
    """Launches of a kind cannot be captured."""


def refusal(job: Job) -> str | None:
    """Why launches of a call are not to be captured; None where they are."""
    strategy, targets, suspect = job.strategy, job.call.targets, job.independence.suspect
    if not isinstance(job.recipe, WeightedSum):
        return "the method looks at answers before it goes on"
    if strategy.program is None:
        return "the model was not recorded"
    if strategy.tiled is not None or strategy.offloaded:
        return "tiles and what waits in host memory follow the host"
    if targets.function is not None:
        return "the target is a function, whose tensors nobody watches"
    if targets.position is not None or targets.padding.real is not None:
        return "the target counts positions of texts"
    if suspect is not None:
        return f"every launch is to be proved: {suspect.reason}"
    return None


def _too_large(job: Job) -> str | None:
    """Why launches are not worth a capture; None where they are."""
    each, plan, config = job.calibration.seconds.get(job.key, 0.0), job.plan, job.config
    if plan.launch_bytes > config.graph_launch or _nbytes(plan) > cache_of(job.call.device).limit:
        return "launches are so large that the host's work does not count"
    if each * plan.points_per_launch > config.graph_seconds:
        return "launches take so long that the host's work does not count"
    return None


def _nbytes(plan: Plan) -> int:
    """What captured launches hold."""
    return plan.fixed_bytes + plan.finish_bytes + plan.launch_bytes


def described(job: Job, *, wanted: bool) -> str:
    """For plans: whether launches are captured, and why not; "" where the device cannot."""
    if job.call.device.type not in RECORDERS:
        return ""
    reason = refusal(job) if wanted else "not wanted"
    if reason is None:
        earlier = job.calibration.captures.get(_key(job, 0))
        reason = earlier if isinstance(earlier, str) else None if earlier else _too_large(job)
    points = job.plan.points_per_launch
    halves = ", in two halves" if len(parts_of(points, job.config)) > 1 else ""
    text = f"one for launches of {points}{halves}"
    return text if reason is None else f"off: {reason}"


def captured_steps(
    job: Job,
    number: int,
    error: PrecisionError | None,
    ties: TieReport | None,
    report: Any,
    finished: list[Outcome],
) -> Generator[EvaluationRequest | Progress, Any, bool]:
    """The steps of an evaluation by captured launches, whose outcome it adds to `finished`; False
    where there is no such evaluation, or it came to nothing.
    """
    device = job.call.device
    if device.type not in RECORDERS or refusal(job) is not None:
        return False
    owner, cache, key = job.calibration.captures, cache_of(device), _key(job, number)
    if isinstance(owner.get(key), str):
        return False
    if len(owner.calls) > job.config.most_known:
        owner.calls.clear()
    owner.calls[key] += 1
    evaluation: CapturedEvaluation | None = cache.take(owner, key)
    if evaluation is None:
        calls = owner.calls[key]
        if calls < job.config.graph_calls or _too_large(job):
            return False
        if not cache.admits(_nbytes(job.plan), calls):
            return False
        about = replace(job, strategy=replace(job.strategy), launches=None)
        assert isinstance(job.recipe, WeightedSum)
        kind = CapturedEvaluation if job.recipe.refinement is None else CapturedAdaptiveEvaluation
        evaluation = kind(about, number)
    yield from SumEvaluation(job, job.call, job.baselines[number]).prove()
    try:
        evaluation.load(job, number, error, ties)
        yield from evaluation.steps(report)
    except NotCapturedError as why:
        cause = why.__cause__
        short = isinstance(cause, NoStreamError) or (cause and is_out_of_memory(cause))
        if short and cache.give_up_one():
            # There is room for the next call's.
            return False
        lasting = ModelCallError, CannotCaptureError
        if isinstance(cause, lasting) or not isinstance(cause, SaliencyError):
            owner[key] = str(why)
        return False
    except (OverflowedError, SaliencyError) as stopped:
        evaluation.release()
        cache.put(owner, key, evaluation)
        if isinstance(stopped, OverflowedError):
            return False
        raise
    if number < len(job.baselines) - 1:
        finished.append(evaluation.outcome())
    evaluation.release()
    cache.put(owner, key, evaluation)
    return True


def _key(job: Job, number: int) -> Any:
    """Equal for calls that the same captured launches serve."""
    strategy, call, recipe = job.strategy, job.call, job.recipe
    if strategy.program is None or not isinstance(recipe, WeightedSum):
        return None
    targets, family = call.targets, _seedless(recipe).family
    baselines = job.baselines[number]
    shape = (recipe.reduction, recipe.factor, recipe.baseline, recipe.at_input)
    adaptive, kept = recipe.refinement is not None, users_tf32()
    method = (family, shape, len(recipe.levels) > 1, recipe.count if recipe.at_input else 0)
    # Whether all of a set are scored depends on how many points there are.
    scored = recipe.baseline == "set" and len(baselines[0]) <= recipe.count
    parts = (targets.classes, targets.places, targets.mask)
    # As text: slices have no hash.
    about = (_shapes(parts), repr(targets.index), targets.predicted, targets.count)
    further = tuple((name, _shape(one)) for name, one in _further(call))
    sizes = (_shapes(call.inputs), _shapes(baselines), call.dtypes, job.plan.points_per_launch)
    # Captured launches read the model's tensors where they lie.
    stem = (strategy.prefix.stem, strategy.prefix.rest) if strategy.prefix else ()
    constants = [one for program in (strategy.program, *stem) for one in program.constants]
    where = tuple(one.data_ptr() for one in constants)
    return str(strategy), sizes, about, further, method, adaptive, kept, scored, where


class CapturedEvaluation(SumEvaluation):
    """The evaluation of calls of one kind, one after another; see `_key`."""

    reused = True

    def __init__(self, job: Job, number: int) -> None:
        starts = tuple(one.clone() for one in job.baselines[number])
        super().__init__(job, _copied(job.call), starts)
        # What is proved is the call's own, and proved before.
        self.independence = None
        self.nbytes = _nbytes(self.plan)
        device = job.call.device
        self._recorder = RECORDERS[device.type](device)
        self._begin: Callable[[], None] | None = None
        self._finish: Callable[[], None] | None = None
        self._captures: dict[int, Callable[[], None]] = {}
        self._offset = torch.zeros(1, dtype=torch.int64, device=device)
        self._scale = torch.ones((), device=device)
        self._overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self._seed = _seed_of(self.recipe, self.call)
        self._table: Rows | None = None
        self._entered: tuple[Level, Tensor] | None = None
        scale: Any = self._scale
        self._inside = replace(self.function, scale=scale)

    def load(
        self, job: Job, number: int, error: PrecisionError | None, ties: TieReport | None
    ) -> None:
        """Writes another call of the same kind over the last one; raises where its target lies
        outside of the model's output.
        """
        self.job = job
        call, targets = job.call, job.call.targets
        shape = self.score_function.shape or self._inside.shape
        if shape is not None:
            targets.fit(shape)
        self._recorder.wait()
        pairs = [*zip(self.call.inputs, call.inputs, strict=True)]
        pairs += zip(self.baselines, job.baselines[number], strict=True)
        mine = self.call.targets
        pairs += [
            (own, given)
            for own, given in (
                *((mine.classes, targets.classes), (mine.places, targets.places)),
                (mine.mask, targets.mask),
                *zip(
                    (v for _, v in _further(self.call)), (v for _, v in _further(call)), strict=True
                ),
                (self._seed, _seed_of(job.recipe, call)),
            )
            if isinstance(own, Tensor)
        ]
        for own, given in pairs:
            own.copy_(given)
        assert isinstance(job.recipe, WeightedSum)
        self.recipe, self.plan, self.ties = _seedless(job.recipe), job.plan, ties
        self.precision_error, self.converged = error, None
        self.size = job.plan.points_per_launch
        self.function = replace(self.function, scale=1.0)
        self._overflowed.zero_()

    def begin(self) -> Generator[EvaluationRequest, Any, None]:
        """Replays what comes before the first point; captures all of it when it is the first."""
        if self._begin is None:
            self._begin = self._captured(self._opened)
        self._begin()
        yield from ()

    def _opened(self) -> None:
        self.strategy.refresh()
        self.points.zero_()
        # What an earlier pass has chosen is not this one's.
        self.classes = self.call.targets.classes
        self.score_function = replace(self.score_function, targets=self.call.targets)
        self.function = replace(self.function, targets=self.call.targets)
        self.exact = self.exact and replace(self.exact, targets=self.call.targets)
        for _ in drive(super().begin(), Arena(self.call.device, about=0)):
            pass
        if self._seed is not None:
            self.source = replace(self.source, seed=self._seed)  # type: ignore[type-var]

    def enter(self, level: Level, active: Tensor) -> None:
        before, self._entered = self._entered, (level, active)
        super().enter(level, active)
        self._offset.zero_()
        same = before is not None and before[0] is level and before[1] is active
        if self._table is not None and same:
            # The next call of a method with one level, for all examples: the table is the same.
            return
        count = level.count * active.numel()
        self._hold(level.rows(active, 0, count))
        sizes = {min(self.size, count), count % self.size or self.size}
        few = len(self._captures) < self.config.graph_sizes
        if few and not sizes <= self._captures.keys():
            self._capture(sizes)

    def _hold(self, rows: Rows) -> None:
        """Writes rows where captured launches read theirs, from the first one on."""
        count = rows.example.numel()
        if self._table is None or self._table.example.numel() < count:
            # What was captured reads the old one. The first point stands everywhere.
            size = max(self.config.graph_rows, count)
            columns = (getattr(rows, column.name) for column in fields(Rows))
            self._table, self._captures = Rows(*(one.new_zeros(size) for one in columns)), {}
        for column in fields(Rows):
            getattr(self._table, column.name)[:count].copy_(getattr(rows, column.name))
        self._offset.zero_()

    def _capture(self, sizes: set[int]) -> None:
        """Captures launches of these sizes; what that adds up is undone by beginning again."""
        totals, classes = self.totals, () if self.classes is None else (self.classes,)
        changing = [*totals.totals, *totals.means, *totals.counts, totals.weight]
        changing += [self.points, self.scores, *classes, self._overflowed]
        kept = [one.clone() for one in changing]
        for size in sizes - self._captures.keys():
            self._offset.zero_()
            self._captures[size] = self._captured(partial(self._launch, size))
        for one, before in zip(changing, kept, strict=True):
            one.copy_(before)
        self._offset.zero_()
        if self._finish is None and self.recipe.refinement is None:
            self._finish = self._captured(self._found)

    def _captured(self, body: Callable[[], None]) -> Callable[[], None]:
        try:
            with DEVICES.shared():
                # What is checked once for all calls is checked here, and kernels are chosen.
                for _ in range(WARM_UPS):
                    body()
                with DryRun(self.call.device):
                    body()
            return self._recorder.record(body)
        except Exception as error:
            warn_of_kernel(error)
            raise NotCapturedError(str(error).split("\n")[0] or type(error).__name__) from error

    def launch(self, start: int, stop: int) -> Generator[EvaluationRequest, Any, int]:
        if self.exact is not None and self.precision_error is None:
            yield from self.measure_precision(self.exact)
        replay = self._captures.get(stop - start)
        if replay is None:
            count = yield from super().launch(start, stop)
            self._offset += count
            return count
        self._replay(replay, last=stop == self.level.count * self.active.numel())
        return stop - start

    def _replay(self, replay: Callable[[], None], *, last: bool) -> None:
        self._scale.fill_(self.function.scale)
        replay()
        self.launched += 1
        if last and self.strategy.precision.scaled and bool(self._overflowed):
            raise OverflowedError

    def _launch(self, size: int) -> None:
        """The next rows: points, forward, vector-Jacobian product, accumulate."""
        rows, result = self._evaluated(size)
        self.add(rows, result, self._scale)
        self._offset += size

    def _evaluated(self, size: int) -> tuple[Rows, EvaluationResult]:
        """The next rows of the table, with what the model gives at their points."""
        assert self._table is not None
        at = self._offset + torch.arange(size, device=self._offset.device)
        # Warm-ups go on where the last one ended, and must not leave the table.
        at = at % self._table.example.numel()
        rows = Rows(*(getattr(self._table, column.name)[at] for column in fields(Rows)))
        self._inside = replace(self._inside, targets=self.function.targets)
        start, parts = 0, list[Callable[[], EvaluationResult]]()
        for count in parts_of(size, self.config):
            parts.append(partial(self._at, rows.part(start, start + count)))
            start += count
        result = joined(self._recorder.beside(parts))
        if self.strategy.precision.scaled:
            self._overflowed |= ~finite(result.gradients)
        return rows, result

    def _at(self, rows: Rows) -> EvaluationResult:
        """What the model gives at the points of rows."""
        points = self.source.write(rows)
        return EvaluationResult(*self._inside.gradients(points, rows.example))

    def _found(self) -> None:
        self._outcome = self.exactly()

    def outcome(self) -> Outcome:
        """The outcome so far, in memory of its own."""
        if self._finish is None:
            outcome = super().outcome()
        else:
            self._finish()
            outcome = replace(self._outcome, converged=self.converged, ties=self.ties)
            outcome = self.with_precision(outcome)
        parts = {column.name: getattr(outcome, column.name) for column in fields(Outcome)}
        return Outcome(**{name: _cloned(value) for name, value in parts.items()})

    def release(self) -> None:
        """The call is over: the next one may be another thread's. Its model is not kept alive, and
        what is given up must not be at work.
        """
        self._recorder.done()
        wait_for(self.call.device)
        del self.job


class CapturedAdaptiveEvaluation(CapturedEvaluation, AdaptiveEvaluation):
    """The same where nodes follow from earlier gradients: the host chooses them after each round,
    and captured launches end at the gradients.
    """

    def __init__(self, job: Job, number: int) -> None:
        super().__init__(job, number)
        self._results: dict[int, EvaluationResult] = {}

    def begin(self) -> Generator[EvaluationRequest, Any, None]:
        self.stale = False
        yield from super().begin()

    def launch(self, start: int, stop: int) -> Generator[EvaluationRequest, Any, int]:
        rows, size = self.rows(start, stop), stop - start
        self._hold(rows)
        # Sizes of first launches are theirs alone.
        few = len(self._captures) < self.config.graph_sizes and not self.job.first[self.launched :]
        if few and size not in self._captures:
            self._capture({size})
        if size not in self._captures or (self.exact and self.precision_error is None):
            return (yield from AdaptiveEvaluation.launch(self, start, stop))
        self._replay(self._captures[size], last=stop == len(self.nodes.alpha))
        self.add(rows, self._results[size])
        return size

    def _launch(self, size: int) -> None:
        _, self._results[size] = self._evaluated(size)


def _copied(call: Call) -> Call:
    """A call with tensors of its own."""
    targets = call.targets.to(call.device)
    if targets.mask is not None:
        targets = replace(targets, mask=targets.mask.clone())
    return replace(
        call,
        inputs=tuple(x.clone() for x in call.inputs),
        targets=targets,
        args=tuple(_cloned(one) for one in call.args),
        kwargs={name: _cloned(one) for name, one in call.kwargs.items()},
        # Layouts ask the model, which captured launches must not keep alive.
        layouts=Layouts(()),
    )


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_cloned, value)) if isinstance(value, tuple) else value


def _seedless(recipe: WeightedSum) -> WeightedSum:
    """The recipe without its seeds, which are written before its launches and not in them."""
    if not hasattr(recipe.family, "seed"):
        return recipe
    return replace(recipe, family=replace(recipe.family, seed=0))  # type: ignore[type-var]


def _seed_of(recipe: Recipe, call: Call) -> Tensor | None:
    seed = getattr(recipe.measured.family, "seed", None)
    return None if seed is None else seeds(seed, call.inputs[0])


def _further(call: Call) -> list[tuple[int | str, Any]]:
    return [*enumerate(call.args), *sorted(call.kwargs.items())]


def _shapes(parts: Any) -> tuple[Any, ...]:
    return tuple(None if one is None else (one.shape, one.dtype, one.device) for one in parts)


def _shape(value: Any) -> Any:
    return _shapes([value]) if isinstance(value, Tensor) else None
