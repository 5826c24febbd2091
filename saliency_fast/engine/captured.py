"""Captured: a run whose launches are recorded once, for every call of its kind.

Inputs, baselines, targets, seeds, places, weights and the number of the next row lie in memory of
its own. A call writes them and replays; nothing of them is in what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.bind import Call
from saliency_fast.engine.graphs import RECORDING, Recorder
from saliency_fast.engine.launch import Answer, Want, alone
from saliency_fast.engine.loss import Loss
from saliency_fast.engine.outcome import Outcome
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.points import seeds
from saliency_fast.engine.recipe import Level, Recipe, Rows
from saliency_fast.engine.run import Run
from saliency_fast.engine.way import Model, Way
from saliency_fast.model.layout import Layouts

LARGE = 2 * 1024**3
"""Bytes of a launch from which the host's work no longer counts beside the device's."""


ROOM = 4096
"""Rows of a table, at least."""


class OverflowedError(Exception):
    """A half type could not hold the gradients of a recorded launch."""


class NotRecordedError(Exception):
    """Launches of a kind cannot be recorded."""


def refusal(way: Way, call: Call, recipe: Recipe, plan: Plan) -> str | None:
    """Why launches of a call are not to be recorded; None where they are."""
    if recipe.rounds is not None:
        return "the method looks at answers before it goes on"
    if way.program is None:
        return "the model was not recorded"
    if way.tiled is not None or way.offloaded:
        return "tiles and what waits in host memory follow the host"
    if call.targets.function is not None:
        return "the target is a function, whose tensors nobody watches"
    if call.targets.position is not None or call.targets.padding.real is not None:
        return "the target counts positions of texts"
    if plan.launch_bytes > LARGE:
        return "launches are so large that the host's work does not count"
    return None


def kind_of(way: Way, call: Call, baselines: Inputs, recipe: Recipe, plan: Plan) -> Any:
    """Equal for calls that the same recorded launches serve."""
    targets, family = call.targets, recipe.family
    if hasattr(family, "seed"):
        family = replace(family, seed=0)  # type: ignore[type-var]
    shape = (recipe.reduction, recipe.factor, recipe.baseline, recipe.at_input)
    method = (family, shape, len(recipe.levels) > 1, recipe.count if recipe.at_input else 0)
    if recipe.baseline == "set":
        # Whether all of a set are scored depends on how many points there are.
        method = (*method, len(baselines[0]) <= recipe.count)  # type: ignore[assignment]
    parts = (targets.classes, targets.places, targets.mask)
    # As text: slices have no hash.
    about = (_shapes(parts), repr(targets.index), targets.predicted, targets.count)
    further = tuple((name, _like(one)) for name, one in _arguments(call))
    sizes = (_shapes(call.inputs), _shapes(baselines), call.dtypes, plan.points_per_launch)
    return sizes, about, further, method, pointers(way)


def pointers(way: Way) -> tuple[int, ...]:
    """Where the model's tensors lie: recorded launches read them there."""
    programs = [way.program, *((way.prefix.stem, way.prefix.rest) if way.prefix else ())]
    found = [one for program in programs if program is not None for one in program.constants]
    return tuple(one.data_ptr() for one in found)


class CapturedRun(Run):
    """A run of calls of one kind, one after another; see `kind_of`."""

    def __init__(
        self,
        way: Way,
        model: Model,
        call: Call,
        baselines: Inputs,
        recipe: Recipe,
        plan: Plan,
        recorder: Recorder,
    ) -> None:
        own, starts = _copied(call), tuple(one.clone() for one in baselines)
        super().__init__(way, model, own, starts, recipe, plan)
        self.nbytes = plan.fixed_bytes + plan.finish_bytes + plan.launch_bytes
        self._recorder = recorder
        self._begin: Callable[[], None] | None = None
        self._finish: Callable[[], None] | None = None
        self._launches: dict[int, Callable[[], None]] = {}
        device = call.device
        self._offset = torch.zeros(1, dtype=torch.int64, device=device)
        self._scale = torch.ones((), device=device)
        self._overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self._seed = _seed_of(recipe, own)
        self._table: Rows | None = None
        scale: Any = self._scale
        self._inside = replace(self.behind, scale=scale)

    def load(
        self, call: Call, baselines: Inputs, recipe: Recipe, plan: Plan, known: Loss | None
    ) -> None:
        """Writes another call of the same kind over the last one; raises where its target lies
        outside of the model's output.
        """
        shape = self.function.shape or self._inside.shape
        if shape is not None:
            call.targets.fit(shape)
        self._recorder.wait()
        for mine, theirs in zip(self.call.inputs, call.inputs, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.baselines, baselines, strict=True):
            mine.copy_(theirs)
        _write(self.call.targets, call.targets)
        for (_, mine), (_, theirs) in zip(_arguments(self.call), _arguments(call), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)
        if (seed := _seed_of(recipe, call)) is not None and self._seed is not None:
            self._seed.copy_(seed)
        self.recipe, self.plan, self.loss, self.judged = recipe, plan, known, False
        self.size, self.halvings, self.converged = plan.points_per_launch, 0, None
        self.behind.scale = 1.0
        self._overflowed.zero_()
        if self._begin is not None:
            self.folds.recipe = recipe

    def begin(self) -> Generator[Want, Answer, None]:
        """Replays what comes before the first point; records all of it when it is the first."""
        if self._begin is None:
            self._begin = self._recorded(self._opened)
        self._begin()
        yield from ()

    def _opened(self) -> None:
        self.way.refresh()
        self.points.zero_()
        # What an earlier pass has chosen is not this one's.
        self.classes = self.call.targets.classes
        for function in (self.function, self.behind, self.exact):
            if function is not None:
                function.targets = self.call.targets
        for _ in alone(super().begin(), Arena(self.call.device, about=0)):
            pass
        if self._seed is not None:
            self.source = replace(self.source, seed=self._seed)  # type: ignore[type-var]

    def enter(self, level: Level, active: Tensor) -> None:
        before = getattr(self, "level", None), getattr(self, "active", None)
        super().enter(level, active)
        self._offset.zero_()
        if self._table is not None and before[0] is level and before[1] is active:
            # The next call of a method with one level, for all examples: the table is the same.
            return
        rows = level.rows(active, 0, level.count * active.numel())
        if self._table is None or self._table.item.numel() < rows.item.numel():
            # What was recorded reads the old one.
            self._table, self._launches = _table_for(rows), {}
        for column in fields(Rows):
            mine, theirs = getattr(self._table, column.name), getattr(rows, column.name)
            mine[: len(theirs)].copy_(theirs)
        sizes = {min(self.size, rows.item.numel()), rows.item.numel() % self.size or self.size}
        if not sizes <= self._launches.keys() and len(self._launches) < MOST_SIZES:
            self._record(sizes)
            self._offset.zero_()

    def _record(self, sizes: set[int]) -> None:
        """Records launches of these sizes; what that adds up is undone by beginning again."""
        kept = [one.clone() for one in self._changing()]
        for size in sizes - self._launches.keys():
            self._offset.zero_()
            self._launches[size] = self._recorded(partial(self._launch, size))
        for one, before in zip(self._changing(), kept, strict=True):
            one.copy_(before)
        if self._finish is None:
            self._finish = self._recorded(self._found)

    def _recorded(self, body: Callable[[], None]) -> Callable[[], None]:
        try:
            with RECORDING:
                return self._recorder.record(body)
        except Exception as error:
            raise NotRecordedError(str(error).split("\n")[0] or type(error).__name__) from error

    def _changing(self) -> list[Tensor]:
        """What launches add to."""
        folds = self.folds
        found = [*folds.totals, *folds.means, *folds.counts, folds.weight, self.points, self.scores]
        return [*found, *(() if self.classes is None else (self.classes,)), self._overflowed]

    def launch(self, start: int, stop: int) -> Generator[Want, Answer, int]:
        if self.exact is not None and self.loss is None:
            yield from self.look(self.exact)
        replay = self._launches.get(stop - start)
        if replay is None:
            count = yield from super().launch(start, stop)
            self._offset += count
            return count
        self._scale.fill_(self.behind.scale)
        replay()
        if stop == self.level.count * self.active.numel() and self.way.precision.scaled:
            self._need_held()
        return stop - start

    def _launch(self, size: int) -> None:
        """The next rows: points, forward, vector-Jacobian product, accumulate."""
        assert self._table is not None
        at = self._offset + torch.arange(size, device=self._offset.device)
        # Warm-ups go on where the last one ended, and must not leave the table.
        at = at % self._table.item.numel()
        columns = (getattr(self._table, column.name)[at] for column in fields(Rows))
        rows = Rows(*columns)
        self._inside.targets = self.behind.targets
        answer = Answer(*self._inside.gradients(self.source.write(rows), rows.item))
        if self.way.precision.scaled:
            sums = [one.sum(dtype=torch.float32) for part in answer.grads for one in part]
            self._overflowed |= ~torch.stack(sums).isfinite().all()
        self.fold_in(rows, answer, self._scale)
        self._offset += size

    def _need_held(self) -> None:
        if bool(self._overflowed):
            raise OverflowedError

    def _found(self) -> None:
        self._outcome = super().outcome()

    def outcome(self) -> Outcome:
        """The answer so far, in memory of its own."""
        if self._finish is None or self.loss is not None:
            found = super().outcome()
        else:
            self._finish()
            found = replace(self._outcome, converged=self.converged, halvings=self.halvings)
            found = replace(found, tied=self.tied)
        parts = {column.name: getattr(found, column.name) for column in fields(Outcome)}
        copies = {name: _cloned(value) for name, value in parts.items()}
        return Outcome(**copies)

    def release(self) -> None:
        """The call is over: the next one may be another thread's."""
        self._recorder.done()


MOST_SIZES = 4
"""Sizes of launches that are recorded of one kind; others run as they are."""


def _copied(call: Call) -> Call:
    """A call with tensors of its own."""
    inputs = tuple(x.clone() for x in call.inputs)
    targets = call.targets.to(call.device)
    args = tuple(_cloned(one) for one in call.args)
    kwargs = {name: _cloned(one) for name, one in call.kwargs.items()}
    if targets.mask is not None:
        targets = replace(targets, mask=targets.mask.clone())
    # Layouts ask the model, which recorded launches must not keep alive.
    layouts = Layouts(())
    return replace(call, inputs=inputs, targets=targets, args=args, kwargs=kwargs, layouts=layouts)


def _write(mine: Any, theirs: Any) -> None:
    for name in ("classes", "places", "mask"):
        if (one := getattr(mine, name)) is not None:
            one.copy_(getattr(theirs, name))


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_cloned, value)) if isinstance(value, tuple) else value


def _seed_of(recipe: Recipe, call: Call) -> Tensor | None:
    seed = getattr(recipe.family, "seed", None)
    return None if seed is None else seeds(seed, call.inputs[0])


def _table_for(rows: Rows) -> Rows:
    """Room for these rows, or for as many as most levels have; the first point everywhere."""
    columns = [getattr(rows, column.name) for column in fields(Rows)]
    size = max(ROOM, rows.item.numel())
    return Rows(*(one.new_zeros(size) for one in columns))


def _arguments(call: Call) -> list[tuple[Any, Any]]:
    return [*enumerate(call.args), *sorted(call.kwargs.items())]


def _shapes(parts: Any) -> tuple[Any, ...]:
    return tuple(None if one is None else (one.shape, one.dtype, one.device) for one in parts)


def _like(value: Any) -> Any:
    return _shapes([value]) if isinstance(value, Tensor) else None
