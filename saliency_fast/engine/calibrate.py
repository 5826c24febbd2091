"""Calibration: by which strategy points run, and what a point costs.

A strategy serves only where it agrees with autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from saliency_fast.engine.arena import LaunchMemory
from saliency_fast.engine.bind import Call
from saliency_fast.engine.cudagraph import RECORDERS, Captures
from saliency_fast.engine.independence import UNRECORDED, Independence
from saliency_fast.engine.measure import FIRST_ROWS, Measured, Measurement, does_not_fit
from saliency_fast.engine.memory import Cost, bytes_text
from saliency_fast.engine.precision import PrecisionErrors
from saliency_fast.engine.strategies import STRATEGIES, Facts, Kind, Strategy
from saliency_fast.errors import BudgetError, InputError, ModelError
from saliency_fast.graph.fingerprint import model_fingerprint
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.passes.affine_prefix import check_affine
from saliency_fast.graph.passes.float64 import InFloat64, native
from saliency_fast.graph.passes.half import Precision
from saliency_fast.graph.program import Program
from saliency_fast.graph.recorder import same_calls, unified
from saliency_fast.graph.rows import Suspicion, suspicion
from saliency_fast.model.executors import (
    EagerExecutor,
    RecordingExecutor,
)
from saliency_fast.model.failures import is_out_of_memory, warn_of_kernel
from saliency_fast.model.layers import Downstream

OTHER_NUMBERS = "the model reads other numbers of its further arguments than when it was recorded"


NOTHING = Cost(0, 0)


class UnverifiedError(Exception):
    """A launch by a strategy that was not compared before differs from autograd."""


@dataclass(frozen=True)
class Calibration:
    """The strategy that serves, what a point costs by it, and what it costs eagerly.

    Args:
        strategy, cost: What serves, and its cost.
        eager: The cost by autograd.
        reason: Why no better strategy serves.
        refusals: (strategy, why not) of those that come before it in `STRATEGIES`.
        mark: The fingerprints of the model whose program, or whose rows, this is about.
        exact: What a point costs in float32, where the strategy's precision is another one.
        foreseen: Whether measured on shapes alone.
        disagreed: Whether the gradient of a strategy was not the model's.
        suspect: Why rows may meet in the model, None where a recording shows no call that could
            let them.
        whole: The program as it was recorded.
        launches, seconds: Caches of what launches take, and of seconds per point, by strategy and
            size.
        errors: A cache of what the precision costs.
        order: Precisions, the fastest first, once they were timed.
        captures: Captured launches by kind, or why there are none.
        maxima: Whether the model takes any, once that is known.
        most: Points of one call that this serves, without a recording, and of several of its kind;
            there is no such limit where a recording was tried.
        small: Whether a program's own calls take longer than what it spares of a single point.
        alone_first: Whether the first launch of every call has one point.
        ends: The program as it was recorded, where it scores the input and the baseline together.
        verification: What the launches of this call are compared with, where nothing was before.
    """

    strategy: Strategy
    cost: Cost
    eager: Cost
    reason: str | None = None
    refusals: tuple[tuple[str, str], ...] = ()
    mark: tuple[object, ...] | None = None
    exact: Cost | None = None
    foreseen: bool = False
    disagreed: bool = False
    suspect: Suspicion | None = UNRECORDED
    whole: Program | None = field(default=None, repr=False)
    launches: dict[tuple[str, int], LaunchMemory | None] = field(default_factory=dict, repr=False)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict, repr=False)
    errors: PrecisionErrors = field(default_factory=PrecisionErrors, repr=False)
    order: list[str] = field(default_factory=list, repr=False)
    captures: Captures = field(default_factory=Captures, repr=False)
    maxima: list[bool] = field(default_factory=list, repr=False)
    most: float = math.inf
    small: bool = False
    alone_first: bool = False
    ends: Program | None = field(default=None, repr=False)
    verification: Verification | None = field(default=None, repr=False)

    @property
    def estimated(self) -> bool:
        """Whether the first launch is to tell what a point costs: until then autograd's."""
        return self.verification is not None and self.cost is self.eager

    @property
    def measured(self) -> bool:
        """Whether the cost of a point is known."""
        return self.cost is not NOTHING

    @property
    def recorded(self) -> bool:
        """Whether a recording was tried."""
        return self.most == math.inf

    def holds(self, model: Callable[..., Any], call: Call) -> bool:
        """Whether the model is still the one that was calibrated."""
        return self.mark is None or (model_fingerprint(_root(model)), call.settings) in self.mark

    def renewed(self, point: Measurement) -> Calibration | None:
        """The same for a model that has changed since, where it still makes the recorded calls: one
        that counts its calls, and was called.
        """
        if self.whole is None:
            # Rows may meet in it now; what a point costs is about the same.
            return replace(self, suspect=suspected(point), mark=_mark(point))
        try:
            same = same_calls(self.whole, unified(*(point.recorded(rows)[0] for rows in (1, 2))))
        except Exception:
            # Whatever it is, it shows again when the model is calibrated.
            return None
        return replace(self, mark=_mark(point)) if same else None

    def by_autograd(self, reason: str) -> Calibration:
        """The same point eagerly, since its strategy does not hold."""
        refusals = (*self.refusals, (str(self.strategy), reason))
        return Calibration(
            *(Strategy(precision=self.strategy.precision), self.eager, self.eager),
            *(reason, refusals),
            mark=self.mark,
            exact=self.exact and self.eager,
            suspect=_reads_arguments(self.whole) or self.suspect,
        )

    def given_up(self, reason: str) -> Calibration:
        """The same few points by autograd, whose cost the next launch tells."""
        refusals = (*self.refusals, (str(self.strategy), reason))
        about = (Strategy(), NOTHING, NOTHING, None, refusals)
        return Calibration(*about, most=self.most, small=self.small)

    def row_by_row(self) -> Calibration:
        """The same point, each alone by vmap, since rows would meet."""
        alone = Strategy(row_by_row=True)
        refusals = (*self.refusals, (str(self.strategy), "rows may depend on each other"))
        about = (self.eager, self.eager, None, refusals)
        return Calibration(alone, *about, suspect=self.suspect)

    def smaller(self, strategy: Strategy, cost: Cost) -> Calibration:
        """The same point by a strategy that takes less memory."""
        why = (str(self.strategy), "one point does not fit the memory budget")
        return replace(self, strategy=strategy, cost=cost, refusals=(*self.refusals, why))


class _DisagreedError(Exception):
    """A strategy's gradient or score is not the model's."""


class _OneRowError(Exception):
    """A model that ran with one row fails with two."""


@dataclass(frozen=True)
class _Recorded:
    """What a recording tells: facts for strategies, why rows may meet, the program as it was
    recorded, and the scores of its two rows.
    """

    facts: Facts
    suspect: Suspicion | None
    program: Program | None = None
    scores: Tensor | None = None

    def candidates(self) -> Iterator[tuple[Kind, Strategy | None, str]]:
        """Every memory-efficient strategy in order, or why it does not apply."""
        for kind in STRATEGIES:
            if kind.lean:
                reason = kind.refuses(self.facts)
                strategy = None if reason else kind.strategy(self.facts)
                yield kind, strategy, reason or "the affine prefix does not pay"


def calibrated(point: Measurement, *, lean: bool, budget: int) -> Calibration:
    """Measures one point eagerly and, with `lean`, by the first strategy that agrees.

    Where a point might take much memory eagerly, that is foreseen on shapes alone first.
    """
    calibration = _calibrated(point, lean=lean, budget=budget)
    return calibration if calibration.mark else replace(calibration, mark=_mark(point))


def _calibrated(point: Measurement, *, lean: bool, budget: int) -> Calibration:
    call, recipe = point.call, point.recipe
    eager = Strategy(rules=recipe.rules)
    if recipe.second:
        cost = point.twice(eager.score_function(point.model, call)).cost
        reason = "second derivatives need all that autograd keeps"
        return Calibration(eager, cost, cost, reason, suspect=suspected(point))
    if recipe.rules is not None:
        cost = point.by(eager).cost
        reason = "backward rules look at every call"
        return Calibration(eager, cost, cost, reason, suspect=suspected(point))
    if not recipe.gradients:
        return _for_scores(point, lean=lean, budget=budget)
    config = point.config
    usual = config.usual_ratio * sum(x[0].nbytes for x in call.inputs)
    if lean and usual > min(budget, config.unforeseen_bytes):
        foreseen = _foreseen(point, budget)
        if foreseen is not None:
            return foreseen
    return _measured(point, lean=lean, budget=budget)


def _measured(point: Measurement, *, lean: bool, budget: int) -> Calibration:
    config, recording = point.config, RecordingExecutor(point.model)
    eager = point.eager(recording)
    # Captured launches have no calls that cost time, and need a program.
    least = 0 if point.call.device.type in RECORDERS else config.lean_from
    small = eager.cost.peak < least
    if not lean or small:
        facts = Facts(point.call, point.recipe, config, lean, small)
        why_not = tuple((one.name, one.refuses(facts) or "") for one in STRATEGIES if one.lean)
        reason = "a point is too small for it to pay" if lean else None
        calibration = Calibration(Strategy(), eager.cost, eager.cost, reason, why_not)
        return replace(calibration, suspect=suspected(point, recording))
    mark, recorded = _mark(point), _recorded(point, recording)
    reasons = [recorded.facts.refusal] if recorded.program is None else []
    refusals, comparison = list[tuple[str, str]](), _Comparison(point, eager, recorded, budget)
    serving, cost, verification = Strategy(), eager.cost, None
    for kind, strategy, why in recorded.candidates():
        measured = None
        if strategy is not None and _defers(point, recorded, strategy, eager, budget):
            verification = Verification(
                comparison, kind, strategy, comparison.others(), recorded.scores
            )
            serving = strategy
            break
        if strategy is not None:
            measured, why = comparison.measured(kind, strategy)
            reasons += [] if measured else [why]
        if strategy is not None and measured is not None:
            serving, cost = strategy, measured.cost
            break
        refusals.append((kind.name, why))
    suspect = recorded.suspect
    calibration = Calibration(
        serving, cost, eager.cost, "; ".join(reasons) or None, tuple(refusals)
    )
    calibration = replace(calibration, disagreed=comparison.disagreed, verification=verification)
    if serving.program is not None:
        program, alone = recorded.program, point.single and suspect is None
        ends = None
        if alone and point.scores_ends and program is not None:
            # Detached: by the model's own calls, with the same bits as in the recording.
            steps = tuple(replace(step, detached=True) for step in program.pruned().steps)
            ends = replace(program.pruned(), steps=steps)
        calibration = replace(calibration, alone_first=alone, ends=ends)
        return replace(calibration, mark=mark, whole=program, suspect=suspect)
    return replace(calibration, suspect=suspect or _reads_arguments(recorded.program))


def _for_scores(point: Measurement, *, lean: bool, budget: int) -> Calibration:
    """A point's score alone, by a strategy where the model has a gradient that proves it."""
    calibration = Calibration(Strategy(), NOTHING, NOTHING, "scores alone keep nothing")
    if not (lean and all(x.is_floating_point() for x in point.call.inputs)):
        calibration = replace(calibration, suspect=suspected(point))
    else:
        asked = replace(point, recipe=replace(point.recipe, gradients=True))
        try:
            calibration = calibrated(asked, lean=lean, budget=budget)
        except (InputError, RuntimeError) as error:
            warn_of_kernel(error)
    model, call = point.model, point.call
    eager = point.scores(Strategy().score_function(model, call))
    if calibration.strategy.program is None:
        cost = point.scores(calibration.strategy.score_function(model, call)).cost
        return replace(calibration, cost=cost, eager=eager.cost)
    by_autograd = Calibration(Strategy(), eager.cost, eager.cost, suspect=calibration.suspect)
    try:
        # By a copy of the strategy: those of weights are a call's own.
        function = replace(calibration.strategy).score_function(model, call, point.recipe)
        measured = point.scores(function)
        gap = measured.gap(eager)
    except BudgetError:
        raise
    except Exception as error:
        warn_of_kernel(error)
        return replace(by_autograd, reason=_line(error))
    if gap > point.config.scores_agreement[call.dtypes[0]]:
        reason = f"{calibration.strategy}: scores are off by {gap:.1g}"
        return replace(by_autograd, reason=reason)
    return replace(calibration, cost=measured.cost, eager=eager.cost)


def in_precision(calibration: Calibration, precision: Precision, point: Measurement) -> Calibration:
    """The same point in another precision; raises ModelError where the model does not run in it."""
    reasons = [] if calibration.reason is None else [calibration.reason]
    strategies = [replace(calibration.strategy, precision=precision)]
    if calibration.strategy.program is not None and precision.half is not None:
        strategies.append(Strategy(precision=precision))
    for strategy in strategies:
        try:
            cost = replace(point, on_meta=calibration.foreseen).by(strategy).cost
        except BudgetError:
            raise
        except Exception as error:
            warn_of_kernel(error)
            reasons.append(f"{strategy}: {_line(error)}")
            continue
        recorded = strategy.program is not None
        return Calibration(
            *(strategy, cost, calibration.eager, "; ".join(reasons) or None, calibration.refusals),
            mark=calibration.mark,
            exact=calibration.cost,
            foreseen=calibration.foreseen,
            suspect=calibration.suspect,
            whole=calibration.whole if recorded else None,
        )
    raise ModelError(
        f"the model does not run in precision={precision.name!r}: {reasons[-1]}; use "
        "precision='float32'"
    )


def sharing(calibration: Calibration, point: Measurement) -> Calibration:
    """The same for launches that several calls share."""
    strategy, gradients = calibration.strategy, point.recipe.gradients
    if strategy.program is None or (gradients and not strategy.invariant_bytes):
        return calibration
    strategy = replace(strategy, copies=False)
    if gradients:
        cost = point.by(strategy).cost
    else:
        cost = point.scores(strategy.score_function(point.model, point.call, point.recipe)).cost
    return replace(calibration, strategy=strategy, cost=cost, launches={}, seconds={})


def _foreseen(point: Measurement, budget: int) -> Calibration | None:
    """What shapes tell of a point that takes much eagerly; None where it does not, or they fail.

    The strategy must have agreed with the model on a smaller input.
    """
    shapes, recording = replace(point, on_meta=True), RecordingExecutor(point.model)
    config = point.config
    try:
        eager = shapes.eager(recording).cost
        needed = config.margin * eager.peak
        if needed <= min(budget, config.foreseen_bytes):
            return None
        recorded = _recorded(shapes, recording)
        strategy = next(one for _, one, _ in recorded.candidates() if one is not None)
        cost = shapes.by(strategy).cost
    except Exception:
        # Shapes alone do not carry every model: it is run for real then, at its own risk.
        return None
    note = _verified(point, strategy, budget)
    if note is None and needed <= budget:
        return None
    if note is None:
        raise BudgetError(
            f"memory_budget is smaller than one point: got {bytes_text(budget)}, expected at least "
            f"{bytes_text(needed)}, since no way that takes less could be verified on a corner or "
            "by its scores; raise the budget or explain a smaller input"
        )
    return Calibration(
        *(strategy, cost, eager, note),
        mark=_mark(point),
        foreseen=True,
        suspect=recorded.suspect,
    )


def _verified(point: Measurement, strategy: Strategy, budget: int) -> str | None:
    """How a strategy was found to agree with a model whose gradient does not fit; None: it was
    not.
    """
    with suppress(Exception):
        corner = replace(point.smaller(), deferred=False)
        small = _measured(corner, lean=True, budget=budget)
        if small.disagreed:
            # Scores do not tell of gradients: they never outweigh one that is off.
            return None
        if small.strategy.program is not None and small.reason is None:
            return "verified on a corner: a point as it is takes much memory"
    eager = Strategy().score_function(point.model, point.call)
    cost = replace(point, on_meta=True).scores(eager).cost
    if point.config.margin * cost.peak <= budget:
        function = strategy.score_function(point.model, point.call)
        gap = point.scores(function).gap(point.scores(eager))
        if gap <= point.config.scores_agreement[point.call.dtypes[0]]:
            return "verified by its scores: a point as it is takes much memory"
    return None


@dataclass
class _Comparison:
    """Compares strategies with autograd at several points of a call.

    eager: what autograd gave at the first. recorded: by which facts they were made. disagreed:
    whether the gradient of one was off.
    """

    point: Measurement
    eager: Measured
    recorded: _Recorded
    budget: int
    disagreed: bool = False
    _others: list[tuple[Measurement, Measured]] = field(default_factory=list)
    _corners: dict[str, tuple[Strategy, Program] | None] = field(default_factory=dict)

    def measured(self, kind: Kind, strategy: Strategy) -> tuple[Measured | None, str]:
        """The first point by a strategy that agrees with autograd, or None and why it does not."""
        try:
            measured = self.point.by(strategy)
            self.compare(kind, strategy, self.point, measured, self.eager)
            for point, theirs in self.others():
                self.compare(kind, strategy, point, point.by(strategy), theirs)
        except BudgetError:
            raise
        except _DisagreedError as difference:
            return None, f"{strategy}: {difference}"
        except Exception as error:
            # Whatever a lean version does not serve: the model itself has just run.
            warn_of_kernel(error)
            return None, _line(error)
        return measured, ""

    def others(self) -> list[tuple[Measurement, Measured]]:
        """The other points, and what autograd gives there."""
        if not self._others:
            executor, draws = EagerExecutor(self.point.model), self.eager.cost.drew
            others = self.point.elsewhere(draws=draws)
            self._others = [(one, one.eager(executor)) for one in others]
        return self._others

    def compare(
        self, kind: Kind, strategy: Strategy, point: Measurement, mine: Measured, theirs: Measured
    ) -> None:
        """Raises _DisagreedError where a strategy is off."""
        if self.recorded.facts.bitwise and not mine.exactly(theirs):
            raise _DisagreedError("its arithmetic is not the model's to the last bit")
        gap = mine.gap(theirs)
        if gap <= point.config.agreement[point.call.dtypes[0]]:
            return
        exact = self._exactly(kind, strategy, point)
        if exact is None or exact > point.config.agreement_in_float64:
            self.disagreed = True
            beyond = "" if exact is None else f", in float64 by {exact:.1g}"
            raise _DisagreedError(f"the gradient is off by {gap:.1g}{beyond}")

    def _exactly(self, kind: Kind, strategy: Strategy, point: Measurement) -> float | None:
        """How far a strategy is off in float64, on a corner where the model takes one; None where
        that cannot be told.
        """
        whole = self.recorded.facts.program
        if whole is None or strategy.program is None or point.call.halves:
            return None
        weights = sum(one.nbytes for one in whole.constants)
        if 2 * (weights + point.config.margin * self.eager.cost.peak) > self.budget:
            return None
        small = point.smaller()
        if kind.name not in self._corners:
            self._corners[kind.name] = self._on_corner(kind, small)
        corner = self._corners[kind.name]
        wider = InFloat64()
        strategy, program = corner or (strategy, whole)
        exact = (point if corner is None else small).in_float64()
        # What it makes in a type of its own, or does not serve in float64, tells nothing.
        with suppress(Exception):
            theirs = exact.by(Strategy(wider.program(native(program))))
            return exact.by(strategy.in_float64(wider)).gap(theirs)
        return None

    def _on_corner(self, kind: Kind, small: Measurement) -> tuple[Strategy, Program] | None:
        """The same strategy and the program on a corner; another size may take another branch, or
        have no prefix that pays.
        """
        if small.call.inputs[0].shape == self.point.call.inputs[0].shape:
            return None
        with suppress(Exception):
            recording = RecordingExecutor(small.model)
            small.eager(recording)
            facts = _recorded(small, recording).facts
            whole, program = self.recorded.facts.program, facts.program
            calls = [[s.func for s in one.steps] for one in (whole, program) if one is not None]
            mine = None if kind.refuses(facts) else kind.strategy(facts)
            if mine is not None and program is not None and calls[0] == calls[1]:
                return mine, program
        return None


@dataclass(frozen=True)
class Verification:
    """Two points of a call as autograd took them, with which launches by a strategy are compared.

    scores: [2, K] of the input and the baseline, which were recorded.
    """

    comparison: _Comparison
    kind: Kind
    strategy: Strategy
    others: list[tuple[Measurement, Measured]]
    scores: Tensor | None

    @cached_property
    def rows(self) -> dict[int, Measured]:
        """What autograd gave, by the row of the first level."""
        first = (self.comparison.point, self.comparison.eager)
        return {point.number: measured for point, measured in (first, *self.others)}

    def compare(self, row: int, mine: Measured) -> None:
        """Raises UnverifiedError where a row of a launch is not what autograd gave."""
        points = (self.comparison.point, *(one for one, _ in self.others))
        (point,) = (one for one in points if one.number == row)
        try:
            self.comparison.compare(self.kind, self.strategy, point, mine, self.rows[row])
        except _DisagreedError as difference:
            raise UnverifiedError(f"{self.strategy}: {difference}") from difference

    def settled(self) -> Cost:
        """What a point costs, which is compared now; raises UnverifiedError."""
        measured, why = self.comparison.measured(self.kind, self.strategy)
        if measured is None:
            raise UnverifiedError(why)
        return measured.cost


def _defers(
    point: Measurement, recorded: _Recorded, strategy: Strategy, eager: Measured, budget: int
) -> bool:
    """Whether a strategy is compared with autograd by launches that count. Not where rows may meet,
    or where its first launches might not fit in memory.
    """
    plain = strategy.program is not None and recorded.suspect is None
    room = FIRST_ROWS * point.config.margin * eager.cost.peak <= budget
    if not (point.deferred and plain and room and not recorded.facts.bitwise):
        return False
    try:
        prefix = strategy.affine_prefix(point.call, point.recipe, 1)
        if prefix is not None:
            check_affine(prefix.prefix, *prefix.first())
    except Exception:
        # What is wrong is told where it is compared at once.
        return False
    return True


def _recorded(point: Measurement, recording: RecordingExecutor) -> _Recorded:
    """What is known of strategies once `recording` has one row of the model."""
    facts = Facts(point.call, point.recipe, point.config)
    try:
        program, scores = _program(point, recording)
        suspect, pruned = suspicion(program), program.pruned()
    except Exception as refusal:
        warn_of_kernel(refusal)
        facts = replace(facts, refusal=_line(refusal))
        return _Recorded(facts, _suspicion(recording, refusal))
    if not point.programs:
        return _Recorded(replace(facts, refusal=OTHER_NUMBERS), suspect, program)
    return _Recorded(replace(facts, program=pruned), suspect, program, scores)


def _program(point: Measurement, recording: RecordingExecutor) -> tuple[Program, Tensor]:
    """The model's program, of which `recording` has one row, and the scores of the two others;
    raises NotLeanError, _OneRowError where the model takes no two, and what goes wrong otherwise.
    """
    second: tuple[Program, Tensor] | NotLeanError
    try:
        second = point.recorded(2)
    except NotLeanError as refusal:
        second = refusal
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _OneRowError(f"the model takes one row at a time: {_line(error)}") from error
    # Its own refusal comes first: the run with one row has the gradients, and tells more.
    first = recording.program
    if isinstance(second, NotLeanError):
        raise second
    program, scores = second
    try:
        return unified(first, program), scores
    except NotLeanError:
        # Tables that a model makes in its first run are there in the second.
        return unified(point.recorded(1)[0], program), scores


def suspected(point: Measurement, recording: RecordingExecutor | None = None) -> Suspicion | None:
    """Why rows may meet in the model, by what it calls with one row and with two."""
    if recording is None:
        recording = RecordingExecutor(point.model)
        # As with two rows, where gradients are enabled, too.
        try:
            point.recorded(1, recording)
        except NotLeanError:
            pass
        except (RuntimeError, MemoryError) as error:
            if (short := does_not_fit(error)) is None:
                raise
            raise short from error
    try:
        program, _ = _program(point, recording)
        return suspicion(program) or _reads_arguments(program)
    except Exception as refusal:
        return _suspicion(recording, refusal)


def _suspicion(recording: RecordingExecutor, refusal: Exception) -> Suspicion:
    """What a model that could not be recorded is suspected of."""
    if isinstance(refusal, _OneRowError):
        return Suspicion(_line(refusal), proof=False, vmap=False)
    if recording.custom_gradient is not None:
        # Its code may look at all rows on the way back, of which scores tell nothing.
        reason = f"the model gives gradients of its own ({recording.custom_gradient})"
        return Suspicion(reason, proof=False, vmap=False)
    if recording.first_read_of_points is not None:
        return Suspicion(
            f"Python reads numbers of the points ({recording.first_read_of_points})", proof=False
        )
    return Suspicion(_line(refusal), arguments=recording.first_read_of_arguments is not None)


def _reads_arguments(program: Program | None) -> Suspicion | None:
    """What a model is suspected of whose Python reads numbers of further arguments, where no
    program makes sure that they are what each example alone has.
    """
    if program is None or not program.reads:
        return None
    reason = f"Python reads numbers of further arguments ({program.reads[-1].name})"
    return Suspicion(reason, arguments=True)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _mark(point: Measurement) -> tuple[object, ...]:
    """What a program depends on beside tensors: the call's other arguments and the model, as it was
    before it ran and as it is now. What it notes of itself is put back after the call, where it is
    an attribute of a module, and stays elsewhere.
    """
    root, others = _root(point.model), point.call.settings
    return (model_fingerprint(root), others), (model_fingerprint(root, anew=True), others)


def _root(model: Callable[..., Any]) -> object:
    """The user's model, where layers of it are explained: which ones is known beside it."""
    return model.model if isinstance(model, Downstream) else model


class CalibrationCache(dict[tuple[object, ...], Calibration]):
    """Calibrations of a model by shapes and by what was asked for.

    rows: what is known of its rows; arguments: which of its further arguments go whole, by shapes;
    unused: inputs that no score depended on; prepared: jobs of earlier calls, without tensors;
    layers: those that `at="auto"` and the like mean, by what they were asked for, with the
    fingerprint of the model; repeats: those of gradients in one launch; points: of the calls of
    each kind so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[object, ...], Independence] = {}
        self.arguments: dict[tuple[object, ...], frozenset[int | str]] = {}
        self.unused: set[int] = set()
        self.layers: dict[tuple[object, ...], tuple[object, tuple[Any, ...]]] = {}
        self.prepared: dict[Any, Any] = {}
        self.repeats: dict[Any, Any] = {}
        self.points: dict[tuple[object, ...], int] = {}
