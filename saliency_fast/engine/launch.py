"""Launch: points through the model at once, of one call or of several that want them alike."""

from __future__ import annotations

import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.engine.independence import Independence, Row
from saliency_fast.model.function import PointFunction
from saliency_fast.model.pack import alike, packed

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

    write: makes the points of some rows, and their examples. gradients: or scores alone.
    launches: what their memory is known to be. independence: what is known of the model's rows,
    where a launch of several is to be proved. taken: how many points the launch had.
    """

    function: PointFunction
    rows: int
    write: Callable[[slice], tuple[Inputs, Tensor]]
    gradients: bool = True
    launches: Launches | None = None
    independence: Independence | None = None
    taken: int = 0

    def take(self, rows: int) -> tuple[Inputs, Tensor]:
        self.taken = min(rows, self.rows)
        return self.write(slice(0, self.taken))

    def answer(self, function: PointFunction, points: Inputs, item: Tensor) -> Answer:
        """What `function` says of points."""
        if not self.gradients:
            return Answer(*function.scores(points, item))
        return Answer(*function.gradients(points, item))

    def prove(self, number: int) -> Callable[[Tensor], None]:
        """Runs one of its rows alone; returns what compares a launch's scores with that."""
        assert self.independence is not None
        row = Row(*self.write(slice(number, number + 1)), number)
        return self.independence.prove(self.function, row, gradients=self.gradients)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for wants that may share a launch."""
        known = self.independence
        # What is not proved once and for all is not put beside what others ask for.
        if known is not None and (known.suspect or known.apart):
            return (id(self),)
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
        count = min(rows, want.rows)
        expected = want.launches.of(count) if want.launches else None
        with _turn(), arena.launch():
            proofs = [want.prove(row) for _, row in _to_prove([want], [count])]
        with _turn(), arena.launch(expected):
            found = want.answer(want.function, *want.take(count))
        for compare in proofs:
            compare(found.scores)
        return found

    try:
        return want.function.again(answer)
    except Exception as error:
        return error


def _to_prove(wants: Sequence[Want], counts: Sequence[int]) -> list[tuple[int, int]]:
    """(want, row of its points) of a launch's rows that are to be proved: one for all that know of
    each other.
    """
    several = {id(one): one for want in wants if (one := want.independence) is not None}
    ends, found = list(itertools.accumulate(counts)), []
    for one in several.values():
        for row in one.due(ends[-1], apart=wants[0].function.lone is not None):
            number = bisect_right(ends, row)
            if wants[number].independence is one:
                found.append((number, row - (ends[number - 1] if number else 0)))
            else:
                # Another call's row: the first one of those that this is about.
                found.append(([want.independence is one for want in wants].index(True), 0))
    return list(dict.fromkeys(found))


def together(wants: Sequence[tuple[Want, int]], arena: Arena) -> list[Answer | Exception]:
    """The answers to wants of one kind, so many points of each, by one launch."""
    first = wants[0][0]
    asked, counts = zip(*((want, min(rows, want.rows)) for want, rows in wants), strict=True)
    expected = first.launches.of(sum(counts)) if first.launches else None
    with _turn(), arena.launch():
        proofs = [(number, asked[number].prove(row)) for number, row in _to_prove(asked, counts)]
    with _turn(), arena.launch(expected):
        parts = [want.take(count) for want, count in zip(asked, counts, strict=True)]
        points, items = zip(*parts, strict=True)
        functions = [want.function for want in asked]
        function, joined, item, pack = packed(functions, points, items)
        del points, parts
        found = first.answer(function, joined, item)
        scores, grads = found.scores, found.grads
    answers: list[Answer | Exception] = []
    shares = zip(torch.split(scores, pack.sizes), pack.classes, strict=True)
    for number, (own, classes) in enumerate(shares):
        start = sum(pack.sizes[:number])
        rows = slice(start, start + len(own))
        mine = [tuple(one[rows] for one in several) for several in grads]
        failed = pack.errors.get(number)
        for one, compare in proofs:
            if one == number and failed is None:
                compare(own)
        answers.append(Answer(own, classes, mine) if failed is None else failed)
    return answers
