"""Choose: a call's job, by the way and in the precision that suit it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Launches
from saliency_fast.engine.bind import Call, is_finite
from saliency_fast.engine.hoist import hoistable
from saliency_fast.engine.independence import (
    SINGLE,
    VMAP,
    Independence,
    Known,
    about,
    meeting,
    near,
    numbers,
    settings,
)
from saliency_fast.engine.job import Job
from saliency_fast.engine.memory import read_budget
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.prepare import Limits, baselines_of, make_plan
from saliency_fast.engine.probe import Probe, fitting, in_precision, probe, sharing
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.engine.region import Part, Region, read_region
from saliency_fast.engine.trial import Trial
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import BudgetError, InputError, InputTypeError, ModelError, warn
from saliency_fast.graph.fingerprint import unchanging
from saliency_fast.graph.passes.half import (
    AUTO,
    FLOAT32,
    OF_DEVICE,
    PRECISIONS,
    Precision,
    read_precision,
)
from saliency_fast.graph.program import tensors_among
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.layers import Downstream
from saliency_fast.model.preserve import same_draws
from saliency_fast.rules.deeplift import Rescale

ALLOWED = 0.02
"""Relative L2 that precision "auto" may cost a map, unless the user says otherwise."""
FASTER = 0.9
"""Of a float32 point's time, what a precision may take to count as faster."""
MOST_READ = 8
"""Kinds of further arguments, by what the model's Python reads of them, that have programs."""
OTHERS = "the model reads other numbers of its further arguments in every call"
MOST_KNOWN = 256
"""Kinds of points that are remembered of a model."""


@dataclass(frozen=True)
class Choice:
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
    alone: bool
    told: list[bool] = field(default_factory=list)
    _seen: dict[int, tuple[object, ...]] = field(default_factory=dict)
    used: dict[str, tuple[tuple[object, ...], Probe]] = field(default_factory=dict)
    """By precision: what was found in this call, and its key; a call looks at its model once."""

    @cached_property
    def _key(self) -> tuple[object, ...]:
        call, recipe = self.call, self.recipe
        # The prefix differs between methods whose points lie on lines and others.
        kind = (recipe.family.straight, hoistable(recipe), recipe.gradients, repr(recipe.rules))
        return call.shapes, call.targets.count, self.lean, self.alone, kind, settings(call)

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self.call, self.baselines[0], self.recipe)

    def probed(self, precision: Precision) -> Probe:
        """What is known of a point, or is found out now."""
        if precision.name not in self.used:
            # Of the model as the call found it, also where the call begins anew.
            with unchanging(self._seen):
                self.used[precision.name] = self._probed(precision)
        return self.used[precision.name][1]

    def _keep(self, key: tuple[object, ...], precision: Precision, found: Probe) -> Probe:
        # Arguments that are new in every call must not pile up.
        while len(self.known) >= MOST_KNOWN:
            self.known.pop(next(iter(self.known)))
        self.known[key] = found
        self.used[precision.name] = key, found
        return found

    def _probed(self, precision: Precision) -> tuple[tuple[object, ...], Probe]:
        key = (*self._key, precision.name)
        found = self._found(key, precision, self._trial)
        if (read := self._read(found)) is None:
            return key, found
        # Further arguments by which the model's Python goes another way; where there are many such
        # ways, or examples go several of them, no program serves.
        key, kinds = (*key, read), sum(one[: len(key)] == key for one in self.known)
        if kinds < MOST_READ:
            found = self._found(key, precision, self._trial)
            if self._read(found) is None:
                return key, found
        else:
            key = (*key[:-1], "others")
        found = self._found(key, precision, replace(self._trial, programs=False))
        return key, found

    def _found(self, key: tuple[object, ...], precision: Precision, trial: Trial) -> Probe:
        found = self.known.get(key)
        if found is not None and not (trial.programs or found.way.program is None):
            found = None
        if found is not None:
            if found.holds(self.model, self.call):
                return found
            if (again := found.renewed(self.model, trial)) is not None:
                return self._keep(key, precision, again)
            # Another model than the one whose rows were proved.
            self.known.rows.clear()
        if precision.exact:
            budget = read_budget(self.limits.memory_budget, self.call.device)
            found = probe(trial, self.model, lean=self.lean, budget=budget)
            found = found if self.alone else sharing(found, self.model, trial)
        else:
            found = in_precision(self.probed(FLOAT32), precision, self.model, trial)
        return self._keep(key, precision, found)

    def _read(self, known: Probe) -> tuple[object, ...] | None:
        """What the model's Python reads of each example's further arguments, and of all; None where
        that is what it read when it was recorded.
        """
        program = known.way.program
        if program is None or not program.reads:
            return None
        function, everyone = known.way.function(self.model, self.call), range(self.call.batch)
        found, same = list[object](), True
        for rows in (*([one] for one in everyone), list(everyone)):
            item = torch.tensor(rows, device=self.call.device)
            for read, value in program.reading(tensors_among(*function.rows(item)), len(rows)):
                found.append((type(value), repr(value)))
                same = same and read.holds(value)
        return None if same else tuple(found)

    def independence(self, probed: Probe) -> Independence:
        """What is known of the model's rows."""
        key = (self.call.shapes, about(self.call), *self._modules)
        several = self.known.rows
        while len(several) >= MOST_KNOWN:
            several.pop(next(iter(several)))
        found = several.setdefault(key, Independence(probed.suspect))
        found.learn(probed.suspect)
        found.draws = probed.cost.drew
        if probed.suspect is not None and probed.suspect.arguments and found.apart is None:
            # Which way Python goes depends on the examples of a launch, not on its points.
            how = self._differing(self.call.batch, found) if self.call.batch > 1 else None
            if how is not None:
                found.meet(how)
        found.provoke = probed.suspect is not None or self.call.targets.function is not None
        return found

    @cached_property
    def _modules(self) -> tuple[int, ...]:
        return tuple(map(id, self.model.modules())) if isinstance(self.model, nn.Module) else ()

    @property
    def _vmaps(self) -> bool:
        """Whether vmap may keep points apart: rules and what looks inside do not go with it."""
        recipe, inside = self.recipe, self.call.layers or isinstance(self.model, Downstream)
        return not (inside or recipe.second or recipe.rules is not None or self.call.halves)

    def job(self, precision: Precision, said: str | None = None) -> Job:
        """A job by the first way that the plan affords; `said`: why not in another precision."""
        probed, key = self.probed(precision), self.used[precision.name][0]
        budget = read_budget(self.limits.memory_budget, self.call.device)
        rows, limits, notes = self.independence(probed), self.limits, list[str]()
        if said is not None:
            notes.append(f"precision: {said}")
        if rows.apart is not None:
            vmapped = rows.apart == VMAP and self._vmaps and precision.exact
            how = f"by {VMAP}" if vmapped else SINGLE
            notes.append(f"rows may depend on each other ({rows.reason}): each is run alone, {how}")
            if vmapped:
                probed = probed.row_by_row()
            else:
                limits = replace(limits, points_per_launch=1)
            self._tell(self.call.batch, rows)
        rules = self.recipe.rules
        # Captum's way takes the whole batch and its baselines through the model as they are.
        if isinstance(rules, Rescale) and not rules.captum:
            self._need_pairs(rows)
        planned = partial(self._planned, tuple(notes), limits)

        def as_it_is(reason: str) -> tuple[Probe, Plan]:
            found = self._keep(key, precision, probed.as_it_is(reason))
            self.independence(found)
            return found, planned(found)

        refusal: BudgetError | None = None
        for found, plan in fitting(probed, self.model, self._trial, budget, planned):
            part = self.part
            near = part is not None and part.first
            way = (found.way.within(part.box) if part and near else found.way).of_now()
            parts = (self.call, self.recipe, self.baselines, self.part)
            job = Job(self.model, self.method, *parts, way, plan, None, found, as_it_is)
            job.independence, job.again = rows, partial(self.job, precision, said)
            try:
                # Tiles are laid out by a budget of their own.
                if way.tiled is None:
                    job.trace(planned)
            except BudgetError as error:
                # Its launches take more than its tensors told.
                refusal = error
            else:
                if plan.points_per_launch == 1 and not (rows.proved or rows.compared):
                    # No launch will tell. Two of them, since memory may be why there is one.
                    rows.compared = True
                    self._tell(2, rows)
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
            job.again = partial(self._among, names, limit, said)
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

    def _planned(
        self,
        notes: tuple[str, ...],
        limits: Limits,
        probed: Probe,
        launches: Launches | None = None,
    ) -> Plan:
        about = (self.recipe, self.call, self.baselines)
        plan = make_plan(self.method, *about, probed, limits, launches)
        return replace(plan, notes=(*plan.notes, *notes))

    def _need_pairs(self, rows: Independence) -> None:
        """Raises ModelError where an example and its reference, which rules take through the model
        together, depend on each other.
        """
        number = self.call.batch // 2
        if not rows.paired:
            item = torch.tensor([number, number], device=self.call.device)
            parts = zip(self.call.inputs, self.baselines[0], strict=True)
            points = tuple(torch.cat([x[item[:1]], b[item[:1] % len(b)]]) for x, b in parts)
            function = Way().function(self.model, self.call)
            with same_draws(lambda: rows.draws, self.call.device):
                reason = meeting(function, points, item, extremes=rows.suspect is not None)
            rows.paired = reason is None
        if not rows.paired:
            raise ModelError(
                f"{self.method.name} takes each example through the model together with its "
                f"reference, and the model lets rows depend on each other ({reason}): its rules "
                "would compare something else than this example and this reference; use "
                "'integrated_gradients', or a model without what joins its rows"
            )

    def _tell(self, examples: int, rows: Independence) -> None:
        """Warns, once, where one of the first so many examples of the call scores together with
        them something else than alone.
        """
        if self.told or self.call.batch == 1:
            return
        self.told.append(True)
        if (found := self._differing(examples, rows)) is not None:
            warn(
                f"the examples of this call depend on each other: {found}. Each is explained as it "
                "is alone; where the rows are parts of one input, such as the nodes of a graph, "
                "use rows='together'"
            )

    def _differing(self, examples: int, rows: Independence) -> str | None:
        """How one of the first so many examples scores together with them something else than
        alone; None where none does.
        """
        with same_draws(lambda: rows.draws, self.call.device):
            return self._compared(examples)

    def _compared(self, examples: int) -> str | None:
        call, function = self.call, Way().function(self.model, self.call)
        everyone = torch.arange(min(call.batch, examples), device=call.device)
        try:
            together, scale = function.judged(tuple(x[everyone] for x in call.inputs), everyone)
        except (RuntimeError, MemoryError) as error:
            # A model that takes one row at a time has no score of all to tell of.
            if isinstance(error, ModelError) or is_out_of_memory(error):
                return None
            raise
        for number in range(len(everyone)):
            one = everyone[number : number + 1]
            alone, _ = function.judged(tuple(x[one] for x in call.inputs), one)
            if near(together[number], alone[0], scale, function):
                continue
            again, _ = function.judged(tuple(x[everyone] for x in call.inputs), everyone)
            # A model that draws random numbers scores everything anew.
            if near(again[number], together[number], scale, function):
                return (
                    f"example {number} scores {numbers(alone[0])} alone and "
                    f"{numbers(together[number])} in a batch of {len(everyone)}"
                )
            return None
        return None


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
    alone: bool = True,
) -> Job:
    """Probes what is not known yet, and plans; raises BudgetError where one point does not fit.

    tolerance: what precision "auto" may cost a map; half of the method's own unless given. alone:
    its launches are its own.
    """
    recipe = recipe.of(call.inputs, call.features, call.layouts)
    part, baselines = read_region(region, call), baselines_of(call, recipe, baseline)
    if recipe.scores_alone and lean:
        # What our versions of a call make of NaN need not be what the model makes of it.
        lean = call.finite and all(is_finite(one) for several in baselines for one in several)
    about = Choice(model, method, recipe, call, baselines, part, limits, known, lean, alone)
    if call.halves:
        _need_alike(model, call.dtypes)
    other = next((one for one in call.dtypes if one != torch.float32), None)
    if recipe.rounds is not None or recipe.rules is not None:
        if precision not in (AUTO, FLOAT32.name):
            raise InputError(
                f"precision={precision!r} is for sums of gradients, whose error can be measured: "
                f"got the method {method.name}; use precision='float32'"
            )
        return about.job(FLOAT32)
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
