"""Probe: one point taken through the model as it is and through its lean route.

Tells what a point costs either way, and lets a lean route serve only where both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from saliency_fast.engine.arena import Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.graphs import RECORDERS, Captures
from saliency_fast.engine.hoist import hoistable
from saliency_fast.engine.independence import UNRECORDED, settings
from saliency_fast.engine.loss import Losses
from saliency_fast.engine.memory import bytes_text
from saliency_fast.engine.plan import MARGIN, Plan
from saliency_fast.engine.trial import Cost, Taken, Trial
from saliency_fast.engine.way import Model, Way, function_of
from saliency_fast.errors import BudgetError, InputError, ModelError
from saliency_fast.graph.autograd.convolutions import CONVOLUTIONS
from saliency_fast.graph.fingerprint import same_model
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.passes.affine_prefix import prefix_of
from saliency_fast.graph.passes.float64 import Wider, native
from saliency_fast.graph.passes.fuse_relu import fused, with_rectifiers
from saliency_fast.graph.passes.half import Precision
from saliency_fast.graph.program import Program
from saliency_fast.graph.recorder import same_calls, unified
from saliency_fast.graph.rows import Suspicion, suspicion
from saliency_fast.model.executors import EagerExecutor, RecordingExecutor
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.layers import Downstream

NOTHING = Cost(0, 0, {})
LEAN_FROM = 256 * 1024
"""Bytes of a point from which lean pays: below, its calls cost more than what they spare."""
MOST = 512
"""Times its own bytes that a point takes as it is, at most, as a rule."""
UNSEEN = 1536 * 1024**2
"""Bytes that the model as it is might take for one point without being foreseen on shapes first."""
FREELY = 256 * 1024**2
"""Bytes that it may take where that was foreseen."""
EXACT = frozenset((torch.float64,))
"""Types of inputs for which a way repeats the model's own arithmetic, bit for bit: float64 is asked
for where rounding must not show. On flat colours, black borders and padding, values are equal that
a pool compares, or a rectifier compares with 0. Folded layers and other memory formats round them
otherwise, and a gradient goes as a whole to where the last bit says."""
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative L2 up to which two gradients or scores are equal to rounding. Beyond, a way must agree
with autograd in float64: rounding may also carry a point across kinks, which moves a gradient by as
much as what is wrong in structure may."""
EXACTLY = 1e-8
"""The same in float64, where no kink is crossed."""
SCORES = {torch.float64: 1e-6, torch.float32: 5e-2, torch.float16: 0.2, torch.bfloat16: 0.5}
"""The same of scores alone, which may be small differences of large numbers, by ways whose
gradient has agreed."""


@dataclass(frozen=True)
class Probe:
    """The way that serves, what a point costs by it, and what it costs as it is.

    exact: what a point costs in float32, where the way's precision is another one. reason: why no
    better way serves. disagreed: whether the gradient of a way was not the model's. mark: the
    model's fingerprints where a program stands for it. foreseen: on shapes alone. launches: what
    they take, and seconds: what a point takes in them, by way and size; losses: what the precision
    costs, and order: precisions, the fastest first; filled as they become known. captures: recorded
    launches by kind, or why there are none. maxima: whether the model takes any, once that is
    known. suspect: why rows may meet in the model, None where a recording shows no call that could
    let them. whole: the program as it was recorded.
    """

    way: Way
    cost: Cost
    plain: Cost
    reason: str | None = None
    mark: tuple[object, ...] | None = None
    exact: Cost | None = None
    foreseen: bool = False
    disagreed: bool = False
    launches: dict[tuple[str, int], Launches | None] = field(default_factory=dict, repr=False)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict, repr=False)
    losses: Losses = field(default_factory=Losses, repr=False)
    order: list[str] = field(default_factory=list, repr=False)
    captures: Captures = field(default_factory=Captures, repr=False)
    maxima: list[bool] = field(default_factory=list, repr=False)
    suspect: Suspicion | None = UNRECORDED
    whole: Program | None = field(default=None, repr=False)

    def holds(self, model: Callable[..., Any], call: Call) -> bool:
        """Whether the model is still the one that was probed."""
        if self.mark is None:
            return True
        return (same_model(_root(model)), settings(call)) in self.mark

    def renewed(self, model: Model, trial: Trial) -> Probe | None:
        """The same for a model that has changed since, where it still makes the recorded calls: one
        that counts its calls, and was called.
        """
        if self.whole is None:
            return None
        try:
            same = same_calls(self.whole, unified(*(trial.recorded(model, n) for n in (1, 2))))
        except Exception:
            # Whatever it is, it shows again when the model is probed.
            return None
        return replace(self, mark=_mark(model, trial.call)) if same else None

    def as_it_is(self, reason: str) -> Probe:
        """The same point through the model as it is."""
        way, exact = Way(precision=self.way.precision), self.exact and self.plain
        suspect = _reading(self.whole) or self.suspect
        return Probe(way, self.plain, self.plain, reason, exact=exact, suspect=suspect)

    def row_by_row(self) -> Probe:
        """The same point, each alone by vmap, since rows would meet."""
        return Probe(Way(apart=True), self.plain, self.plain, suspect=self.suspect)


def in_precision(probed: Probe, precision: Precision, model: Model, trial: Trial) -> Probe:
    """The same point in another precision; raises ModelError where the model does not run in it."""
    reasons = [] if probed.reason is None else [probed.reason]
    ways = [replace(probed.way, precision=precision)]
    if probed.way.program is not None and precision.half is not None:
        ways.append(Way(precision=precision))
    for way in ways:
        try:
            cost = replace(trial, foreseen=probed.foreseen).take(way, model).cost
        except BudgetError:
            raise
        except Exception as error:
            reasons.append(f"{way}: {_line(error)}")
            continue
        reason, mark = "; ".join(reasons) or None, probed.mark if way.program else None
        known = (mark, probed.cost, probed.foreseen)
        found = Probe(way, cost, probed.plain, reason, *known, suspect=probed.suspect)
        return replace(found, whole=probed.whole if way.program else None)
    raise ModelError(
        f"the model does not run in precision={precision.name!r}: {reasons[-1]}; use "
        "precision='float32'"
    )


def probe(trial: Trial, model: Model, *, lean: bool, budget: int) -> Probe:
    """Takes one point's gradient as it is and, with `lean`, by the best way that agrees.

    Where a point might take much memory as it is, that is foreseen on shapes alone first.
    """
    call, recipe = trial.call, trial.recipe
    if recipe.second:
        way = Way(rules=recipe.rules)
        cost = trial.twice(way.function(model, call)).cost
        reason = "second derivatives need all that autograd keeps"
        return Probe(way, cost, cost, reason, suspect=_suspect(model, trial))
    if recipe.rules is not None:
        return _ruled(model, trial, Way(rules=recipe.rules))
    if not recipe.gradients:
        return _scored(model, trial, lean=lean, budget=budget)
    if lean and MOST * sum(x[0].nbytes for x in call.inputs) > min(budget, UNSEEN):
        found = _foreseen(model, trial, budget)
        if found is not None:
            return found
    return _probed(model, trial, lean=lean, budget=budget)


def _ruled(model: Model, trial: Trial, way: Way) -> Probe:
    """A point under backward rules: they need every call as the model makes it."""
    cost = trial.take(way, model).cost
    reason = "backward rules look at every call"
    return Probe(way, cost, cost, reason, suspect=_suspect(model, trial))


def _suspect(
    model: Model, trial: Trial, recording: RecordingExecutor | None = None
) -> Suspicion | None:
    """Why rows may meet in the model, by what it calls with one row and with two."""
    if recording is None:
        recording = RecordingExecutor(model)
        trial.scores(function_of(recording, trial.call))
    try:
        program = _recorded(model, trial, recording)
        return suspicion(program) or _reading(program)
    except Exception as refusal:
        return _suspicion(recording, refusal)


def _recorded(model: Model, trial: Trial, recording: RecordingExecutor) -> Program:
    """The model's program, of which `recording` has one row; raises NotLeanError, _OneRowError
    where the model takes no two, and what goes wrong otherwise.
    """
    second: Program | NotLeanError
    try:
        second = trial.recorded(model, 2)
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
    try:
        return unified(first, second)
    except NotLeanError:
        # Tables that a model makes in its first run are there in the second.
        return unified(trial.recorded(model, 1), second)


class _OneRowError(Exception):
    """A model that ran with one row fails with two."""


def _suspicion(recording: RecordingExecutor, refusal: Exception) -> Suspicion:
    """What a model that could not be recorded is suspected of."""
    if isinstance(refusal, _OneRowError):
        return Suspicion(_line(refusal), proof=False, vmap=False)
    if recording.own is not None:
        # Its code may look at all rows on the way back, of which scores tell nothing.
        reason = f"the model gives gradients of its own ({recording.own})"
        return Suspicion(reason, proof=False, vmap=False)
    if recording.read is not None:
        return Suspicion(f"Python reads numbers of the points ({recording.read})", proof=False)
    return Suspicion(_line(refusal), arguments=recording.asked is not None)


def _scored(model: Model, trial: Trial, *, lean: bool, budget: int) -> Probe:
    """A point's score alone, by a lean way where the model has a gradient that proves it."""
    found = Probe(Way(), NOTHING, NOTHING, "scores alone keep nothing")
    if not (lean and all(x.is_floating_point() for x in trial.call.inputs)):
        found = replace(found, suspect=_suspect(model, trial))
    else:
        asked = replace(trial, recipe=replace(trial.recipe, gradients=True))
        with suppress(ModelError, BudgetError, InputError, RuntimeError):
            found = probe(asked, model, lean=lean, budget=budget)
    plain = trial.scores(Way().function(model, trial.call))
    if found.way.program is None:
        taken = trial.scores(found.way.function(model, trial.call))
        return replace(found, cost=taken.cost, plain=plain.cost)
    try:
        # By a copy of the way: those of weights are a call's own.
        taken = trial.scores(found.way.of_now().function(model, trial.call, trial.recipe))
        gap = taken.gap(plain)
    except BudgetError:
        raise
    except Exception as error:
        return Probe(Way(), plain.cost, plain.cost, _line(error), suspect=found.suspect)
    if gap > SCORES[trial.call.dtypes[0]]:
        reason = f"{found.way}: scores are off by {gap:.1g}"
        return Probe(Way(), plain.cost, plain.cost, reason, suspect=found.suspect)
    return replace(found, cost=taken.cost, plain=plain.cost)


def sharing(found: Probe, model: Model, trial: Trial) -> Probe:
    """The same for launches that several calls share."""
    if found.way.program is None or (trial.recipe.gradients and not found.way.settled_bytes):
        return found
    way = replace(found.way, copies=False)
    if trial.recipe.gradients:
        cost = trial.take(way, model).cost
    else:
        cost = trial.scores(way.function(model, trial.call, trial.recipe)).cost
    return replace(found, way=way, cost=cost, launches={}, seconds={})


def _probed(model: Model, trial: Trial, *, lean: bool, budget: int) -> Probe:
    recording = RecordingExecutor(model)
    plain = trial.plain(recording)
    # Recorded launches have no calls that cost time, and need a program.
    least = 0 if trial.call.device.type in RECORDERS else LEAN_FROM
    if not lean or plain.cost.peak < least:
        reason = "a point is too small for it to pay" if lean else None
        found = Probe(Way(), plain.cost, plain.cost, reason)
        return replace(found, suspect=_suspect(model, trial, recording))
    mark, reasons = _mark(model, trial.call), []
    ways = _ways(model, trial, recording)
    if ways.refusal:
        reasons.append(ways.refusal)
    judge = _Judge(model, trial, plain, ways, budget)
    for way in ways.found:
        taken, why = judge.taken(way)
        if taken is None:
            reasons.append(why)
        else:
            reason = "; ".join(reasons) or None
            found = Probe(way, taken.cost, plain.cost, reason)
            break
    else:
        found = Probe(Way(), plain.cost, plain.cost, "; ".join(reasons))
    if found.way.program is not None:
        found = replace(found, mark=mark, whole=ways.recorded)
    suspect = ways.suspect
    if found.way.program is None and suspect is None:
        suspect = _reading(ways.recorded)
    return replace(found, suspect=suspect, disagreed=judge.disagreed)


def _reading(program: Program | None) -> Suspicion | None:
    """What a model is suspected of whose Python reads numbers of further arguments, where no
    program makes sure that they are what each example alone has.
    """
    if program is None or not program.reads:
        return None
    reason = f"Python reads numbers of further arguments ({program.reads[-1].name})"
    return Suspicion(reason, arguments=True)


class _DisagreedError(Exception):
    """A way's gradient or score is not the model's."""


@dataclass
class _Judge:
    """Compares ways with the model as it is, at several points of a call.

    plain: what the model as it is gave at the first. ways: that are compared, and the program as
    it was recorded, by autograd's own calls. disagreed: whether a way has.
    """

    model: Model
    trial: Trial
    plain: Taken
    ways: _Ways
    budget: int
    disagreed: bool = False
    _others: list[tuple[Trial, Taken]] = field(default_factory=list)
    _pairs: dict[int, _Pair | None] = field(default_factory=dict)

    def taken(self, way: Way) -> tuple[Taken | None, str]:
        """The first point by a way that agrees with the model, or None and why it does not."""
        try:
            taken = self.trial.take(way, self.model)
            self._check(way, taken)
        except BudgetError:
            raise
        except _DisagreedError as found:
            return None, f"{way}: {found}"
        except Exception as error:
            # Whatever a lean version does not serve: the model itself has just run.
            return None, _line(error)
        return taken, ""

    def _check(self, way: Way, taken: Taken) -> None:
        """Raises _DisagreedError where a way, which gave `taken` at the first point, is off."""
        self._compare(way, self.trial, taken, self.plain)
        if not self._others:
            plain, draws = EagerExecutor(self.model), self.plain.cost.drew
            self._others = [(one, one.plain(plain)) for one in self.trial.elsewhere(draws=draws)]
        for trial, theirs in self._others:
            self._compare(way, trial, trial.take(way, self.model), theirs)

    def _compare(self, way: Way, trial: Trial, mine: Taken, theirs: Taken) -> None:
        if _exact(trial.call) and not mine.exactly(theirs):
            raise _DisagreedError("its arithmetic is not the model's to the last bit")
        gap = mine.gap(theirs)
        if gap <= AGREEMENT[trial.call.dtypes[0]]:
            return
        exact = self._exactly(way, trial)
        if exact is None or exact > EXACTLY:
            self.disagreed = True
            beyond = "" if exact is None else f", in float64 by {exact:.1g}"
            raise _DisagreedError(f"the gradient is off by {gap:.1g}{beyond}")

    def _exactly(self, way: Way, trial: Trial) -> float | None:
        """How far a way is off in float64, on a corner where the model takes one; None where that
        cannot be told.
        """
        if id(way) not in self._pairs:
            self._pairs[id(way)] = self._pair(way, trial.smaller())
        pair = self._pairs[id(way)]
        if pair is None:
            return None
        exact = (trial.smaller() if pair.corner else trial).in_float64()
        # What it makes in a type of its own, or does not serve in float64, tells nothing.
        with suppress(Exception):
            theirs = exact.take(pair.plain, self.model)
            return exact.take(pair.way, self.model).gap(theirs)
        return None

    def _pair(self, way: Way, small: Trial) -> _Pair | None:
        if self.ways.whole is None or way.program is None or self.trial.call.halves:
            return None
        weights = sum(one.nbytes for one in self.ways.whole.constants)
        if 2 * (weights + MARGIN * self.plain.cost.peak) > self.budget:
            return None
        wider = Wider()
        if small.call.inputs[0].shape != self.trial.call.inputs[0].shape:
            with suppress(Exception):
                recording = RecordingExecutor(self.model)
                small.plain(recording)
                ways = _ways(self.model, small, recording)
                # Another size may take another branch, or have no prefix that pays.
                if ways.whole is not None and ways.alike(self.ways):
                    place = [one is way for one in self.ways.found].index(True)
                    plain = Way(wider.program(native(ways.whole)))
                    return _Pair(True, ways.found[place].in_float64(wider), plain)
        plain = Way(wider.program(native(self.ways.whole)))
        return _Pair(False, way.in_float64(wider), plain)


@dataclass(frozen=True)
class _Pair:
    """A way and the model as it was recorded, both in float64; corner: for corners of inputs."""

    corner: bool
    way: Way
    plain: Way


def _foreseen(model: Model, trial: Trial, budget: int) -> Probe | None:
    """What shapes tell of a point that takes much as it is; None where it does not, or they fail.

    The way must have agreed with the model on a smaller input.
    """
    shapes, recording = replace(trial, foreseen=True), RecordingExecutor(model)
    try:
        plain = shapes.plain(recording)
        if MARGIN * plain.cost.peak <= min(budget, FREELY):
            return None
        ways = _ways(model, shapes, recording)
        way, suspect = ways.found[0], ways.suspect
        cost = shapes.take(way, model).cost
    except Exception:
        # Shapes alone do not carry every model: it is run for real then, at its own risk.
        return None
    note = _verified(model, trial, way, budget)
    if note is None and MARGIN * plain.cost.peak <= budget:
        return None
    if note is None:
        raise BudgetError(
            f"memory_budget is smaller than one point: got {bytes_text(budget)}, expected at least "
            f"{bytes_text(MARGIN * plain.cost.peak)}, since no way that takes less could be "
            "verified on a corner or by its scores; raise the budget or explain a smaller input"
        )
    mark = _mark(model, trial.call)
    return Probe(way, cost, plain.cost, note, mark, foreseen=True, suspect=suspect)


def _verified(model: Model, trial: Trial, way: Way, budget: int) -> str | None:
    """How a way was found to agree with a model whose gradient does not fit; None: it was not."""
    with suppress(Exception):
        small = _probed(model, trial.smaller(), lean=True, budget=budget)
        if small.disagreed:
            # Scores do not tell of gradients: they never outweigh one that is off.
            return None
        if small.way.program is not None and small.reason is None:
            return "verified on a corner: a point as it is takes much memory"
    as_it_is = Way().function(model, trial.call)
    if MARGIN * replace(trial, foreseen=True).scores(as_it_is).cost.peak <= budget:
        gap = trial.scores(way.function(model, trial.call)).gap(trial.scores(as_it_is))
        if gap <= SCORES[trial.call.dtypes[0]]:
            return "verified by its scores: a point as it is takes much memory"
    return None


def fitting(
    probed: Probe, model: Model, trial: Trial, budget: int, plan: Callable[[Probe], Plan]
) -> Iterator[tuple[Probe, Plan]]:
    """Ways that the plan can afford, from what was probed to what takes least memory; raises
    BudgetError where there is none.
    """
    try:
        first = plan(probed)
    except BudgetError as error:
        refusal: BudgetError | None = error
    else:
        refusal = None
        yield probed, first
    shapes, found = replace(trial, foreseen=True), refusal is None
    for way in probed.way.smaller(budget, trial.call.device):
        try:
            smaller = replace(probed, way=way, cost=shapes.take(way, model).cost)
            planned = plan(smaller)
        except (BudgetError, NotLeanError):
            continue
        found = True
        yield smaller, planned
    if refusal is not None and not found:
        raise refusal


@dataclass(frozen=True)
class _Ways:
    """Lean ways, the best first; why rows may meet; the program without what nothing needs, and as
    it was recorded, or why there is none.
    """

    found: list[Way]
    suspect: Suspicion | None
    whole: Program | None = None
    refusal: str | None = None
    recorded: Program | None = None

    def alike(self, other: _Ways) -> bool:
        """Whether both make the same calls by the same ways."""
        if self.whole is None or other.whole is None:
            return False
        calls = [[step.func for step in one.steps] for one in (self.whole, other.whole)]
        kinds = [[one.prefix is None for one in ways.found] for ways in (self, other)]
        return calls[0] == calls[1] and kinds[0] == kinds[1]


def _ways(model: Model, trial: Trial, recording: RecordingExecutor) -> _Ways:
    watched = Way(watched=True)
    try:
        recorded = _recorded(model, trial, recording)
        suspect, whole = suspicion(recorded), recorded.pruned()
    except Exception as refusal:
        return _Ways([watched], _suspicion(recording, refusal), None, _line(refusal))
    if not trial.programs:
        return _Ways([watched], suspect, recorded=recorded)
    if _exact(trial.call):
        return _Ways([Way(whole), watched], suspect, whole, recorded=recorded)
    program, apart, recipe = fused(whole), with_rectifiers(whole), trial.recipe
    images = any(step.varying and step.func in CONVOLUTIONS for step in whole.steps)
    ways = []
    # Views that copy must not be written through.
    for channels_last in (True, False) if images and not whole.aliased else (False,):
        ordered = program.innermost() if channels_last else program
        if hoistable(recipe) and not trial.call.halves:
            prefix = prefix_of(whole, channels_last=channels_last, line=recipe.family.straight)
            ways += [] if prefix is None else [Way(ordered, prefix=prefix, unfolded=apart)]
        ways.append(Way(ordered, unfolded=apart))
    return _Ways([*ways, watched], suspect, whole, recorded=recorded)


def _exact(call: Call) -> bool:
    return not EXACT.isdisjoint(call.dtypes)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _mark(model: Callable[..., Any], call: Call) -> tuple[object, ...]:
    """What a program depends on beside tensors: the call's other arguments and the model, as it was
    before it ran and as it is now. What it notes of itself is put back after the call, where it is
    an attribute of a module, and stays elsewhere.
    """
    root, others = _root(model), settings(call)
    return (same_model(root), others), (same_model(root, anew=True), others)


def _root(model: Callable[..., Any]) -> object:
    """The user's model, where layers of it are explained: which ones is known beside it."""
    return model.model if isinstance(model, Downstream) else model
