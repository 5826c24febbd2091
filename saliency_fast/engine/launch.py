"""Launch: points through the model at once, of one call or of several that want them alike."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.model.function import PointFunction
from saliency_fast.model.pack import alike, packed
from saliency_fast.model.routes import Inputs

AT_ONCE = max(4, os.cpu_count() or 1)
"""Launches that threads run at the same time: more of them halve what a processor gets done."""
PATIENCE = 1.0
"""Seconds after which a launch begins all the same: whoever holds a place may wait for it."""
_PLACES = threading.BoundedSemaphore(AT_ONCE)


@contextmanager
def _turn() -> Iterator[None]:
    """Waits until not too many launches run."""
    held = _PLACES.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        if held:
            _PLACES.release()


@dataclass
class Want:
    """What a call wants from the model next: `rows` points at most.

    write: makes the first so many points, and their examples. gradients: or scores alone.
    launches: what their memory is known to be. taken: how many points the launch had.
    """

    function: PointFunction
    rows: int
    write: Callable[[int], tuple[Inputs, Tensor]]
    gradients: bool = True
    launches: Launches | None = None
    taken: int = 0

    def take(self, rows: int) -> tuple[Inputs, Tensor]:
        self.taken = min(rows, self.rows)
        return self.write(self.taken)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for wants that may share a launch."""
        return self.gradients, *alike(self.function)


@dataclass(frozen=True)
class Answer:
    """scores, classes [R, K], and for each of K targets the gradients of the points."""

    scores: Tensor
    classes: Tensor | None
    grads: list[Inputs] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """A launch is done: `done` of at most `of` points; `outcome()` is the map so far, if there is
    one: `maps`.
    """

    done: int
    of: int
    outcome: Callable[[], Any]
    maps: bool = True


Steps = Generator[Want | Moment, Any, None]
"""A call on its way: answers are sent in to each `Want`, or what went wrong is thrown."""


def alone(steps: Steps, arena: Arena) -> Generator[Moment, None, None]:
    """The moments of a call, with launches of its own."""
    step = next(steps, None)
    while step is not None:
        if isinstance(step, Moment):
            yield step
            step = next(steps, None)
        else:
            step = answered(steps, [launch(step, step.rows, arena)])


def answered(steps: Steps, answers: list[Answer | Exception]) -> Want | Moment | None:
    """What a call wants once it has its answer, the last of `answers`; None where it is over."""
    # Taken out of the list: gradients must not stay alive through the next launch.
    answer = answers.pop()
    try:
        if isinstance(answer, Exception):
            return steps.throw(answer)
        return steps.send(answer)
    except StopIteration:
        return None


def launch(want: Want, rows: int, arena: Arena) -> Answer | Exception:
    """The answer to a want, for so many of its points, or why there is none."""

    def answer() -> Answer:
        expected = want.launches.of(min(rows, want.rows)) if want.launches else None
        with _turn(), arena.launch(expected):
            points, item = want.take(rows)
            if not want.gradients:
                return Answer(*want.function.scores(points, item))
            return Answer(*want.function.gradients(points, item))

    try:
        return want.function.again(answer)
    except Exception as error:
        return error


def together(wants: Sequence[tuple[Want, int]], arena: Arena) -> list[Answer | Exception]:
    """The answers to wants of one kind, so many points of each, by one launch."""
    first = wants[0][0]
    total = sum(min(rows, want.rows) for want, rows in wants)
    expected = first.launches.of(total) if first.launches else None
    with _turn(), arena.launch(expected):
        points, items = zip(*(want.take(rows) for want, rows in wants), strict=True)
        functions = [want.function for want, _ in wants]
        function, joined, item, pack = packed(functions, points, items)
        del points
        if first.gradients:
            scores, _, grads = function.gradients(joined, item)
        else:
            (scores, _), grads = function.scores(joined, item), []
    answers: list[Answer | Exception] = []
    parts = zip(torch.split(scores, pack.sizes), pack.classes, strict=True)
    for number, (own, classes) in enumerate(parts):
        start = sum(pack.sizes[:number])
        rows = slice(start, start + len(own))
        mine = [tuple(one[rows] for one in several) for several in grads]
        failed = pack.errors.get(number)
        answers.append(Answer(own, classes, mine) if failed is None else failed)
    return answers
