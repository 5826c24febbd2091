"""Launches: points through the model at once, of one call or of several requests of one kind."""

from __future__ import annotations

import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_iter
from saliency_fast._types import Inputs
from saliency_fast.engine.arena import LEAST_TRACED, WORTH, Arena, LaunchMemory, Trace
from saliency_fast.engine.cudagraph import launching
from saliency_fast.engine.independence import Independence, Row, scores_agree
from saliency_fast.engine.memory import Cost, Ledger
from saliency_fast.model.function import PointFunction, compatible, packed
from saliency_fast.model.preserve import random_states, uncompiled

PATIENCE = 1.0
"""Seconds after which a launch begins all the same: whoever holds a slot may wait for it."""
_SLOTS = threading.BoundedSemaphore(max(4, os.cpu_count() or 1))
"""Launches that threads run at the same time: more of them halve what a processor gets done."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What a call wants from the model next.

    Args:
        function: The model.
        count: Points, at most; a launch may have fewer.
        write: Makes the points of some rows, and their examples.
        gradients: Or scores alone.
        launches: What launches of these points are known to take.
        independence: What is known of the model's rows, where a launch of several is to be proved.
        metered: What measures the cost of the launch, if anything.
        alone: Rows that went through the model alone before: their scores [1, K], and the largest
            magnitude of the output behind them.
        traced: Bytes that it takes, about, where its memory is to be traced.
    """

    function: PointFunction
    count: int
    write: Callable[[slice], tuple[Inputs, Tensor]]
    gradients: bool = True
    launches: LaunchMemory | None = None
    independence: Independence | None = None
    metered: Ledger | None = None
    traced: int = 0
    alone: Mapping[int, tuple[Tensor, float]] = field(default_factory=dict)

    def evaluate(
        self, function: PointFunction, points: Inputs, example: Tensor
    ) -> EvaluationResult:
        """What `function` gives at points."""
        called = function.gradients if self.gradients else function.scores
        return EvaluationResult(*called(points, example))

    def prove(self, number: int) -> Callable[[Tensor], None]:
        """Runs one of its rows alone; returns what compares a launch's scores with that."""
        assert self.independence is not None
        rows, function = self.independence, self.function

        def proof(number: int) -> Callable[[Tensor], None]:
            row = Row(*self.write(slice(number, number + 1)), number)
            return rows.prove(function, row, gradients=self.gradients)

        if rows.suspect is not None or rows.provoke or not self.alone:
            return proof(number)

        def compare(scores: Tensor) -> None:
            for own, (single, scale) in self.alone.items():
                if not scores_agree(scores[own], single[0], scale, function):
                    # By another executor: it is this one's own score that tells.
                    proof(number)(scores)
            rows.note(len(scores))

        return compare

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for requests that may share a launch."""
        rows = self.independence
        # What is not proved once and for all is not put beside what others ask for.
        if rows is not None and (rows.suspect or rows.apart):
            return (id(self),)
        return self.gradients, *compatible(self.function)


@dataclass(frozen=True)
class EvaluationResult:
    """scores, classes [R, K], and for each of K targets the gradients at the points; cost,
    trace: of the launch, where they were asked for.
    """

    scores: Tensor
    classes: Tensor | None
    gradients: list[Inputs] = field(default_factory=list)
    cost: Cost | None = None
    trace: Trace | None = None


def joined(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """The result of all rows of several launches, without what they cost."""
    if len(parts) == 1:
        return parts[0]
    classes = [one.classes for one in parts if one.classes is not None]
    several = zip(*(one.gradients for one in parts), strict=True)
    return EvaluationResult(
        torch.cat([one.scores for one in parts]),
        torch.cat(classes) if classes else None,
        [tuple(map(torch.cat, zip(*one, strict=True))) for one in several],
    )


def execute(request: EvaluationRequest, count: int, arena: Arena) -> EvaluationResult | Exception:
    """One launch: the result of so many points of a request, or why there is none."""
    count = min(count, request.count)
    memory, rows = request.launches, request.independence

    def run() -> EvaluationResult:
        proofs: list[Callable[[Tensor], None]] = []
        if rows is not None:
            due = rows.due(count, apart=request.function.single_row is not None)
            if due:
                with _slot(arena.device), arena.launch():
                    proofs = [request.prove(number) for number in due]
        if request.metered is not None or request.traced:
            # What scores have taken goes back; the launches that follow are larger.
            arena.close()
            result = _examined(request, count, arena.device)
            arena.renew(0 if result.trace is None else result.trace.needed)
        else:
            with _slot(arena.device), arena.launch(memory.of(count) if memory else None):
                result = request.evaluate(request.function, *request.write(slice(0, count)))
        for compare in proofs:
            compare(result.scores)
        return result

    try:
        return request.function.with_saved_copies(run)
    except Exception as error:
        return error


def _examined(request: EvaluationRequest, count: int, device: torch.device) -> EvaluationResult:
    """A launch in an arena of its own, with a trace of what it takes, and its cost."""
    arena, ledger = Arena(device, LEAST_TRACED, max(WORTH, request.traced)), request.metered
    counted: list[AbstractContextManager[object]] = []
    if ledger is not None:
        counted = [uncompiled(), ledger.meter, *([ledger] if ledger.accepted else [])]
    states = [] if ledger is None else random_states(device)
    try:
        with _slot(arena.device), arena.launch(), ExitStack() as stack:
            points, example = request.write(slice(0, count))
            for one in counted:
                stack.enter_context(one)
            # Inside, since a point counts.
            points = points if ledger is None else tuple(one.clone() for one in points)
            result = request.evaluate(request.function, points, example)
        result = replace(result, trace=arena.trace())
        if ledger is None:
            return result
        moved = not all(map(torch.equal, states, random_states(device)))
        cost = ledger.meter.cost(ledger.kept, moved=moved).of_one(count)
        return replace(result, cost=cost)
    finally:
        # What its tensors take goes with them.
        arena.close()


def execute_together(
    requests: Sequence[tuple[EvaluationRequest, int]], arena: Arena
) -> list[EvaluationResult | Exception]:
    """One launch of so many points of each of several requests of one kind."""
    asked = [request for request, _ in requests]
    counts = [min(count, request.count) for request, count in requests]
    first = asked[0]
    expected = first.launches.of(sum(counts)) if first.launches else None
    with _slot(arena.device), arena.launch():
        proofs = [(number, asked[number].prove(row)) for number, row in _to_prove(asked, counts)]
    with _slot(arena.device), arena.launch(expected):
        parts = [one.write(slice(0, count)) for one, count in zip(asked, counts, strict=True)]
        points, items = zip(*parts, strict=True)
        functions = [request.function for request in asked]
        function, joined, example, pack = packed(functions, points, items)
        del points, parts
        whole = first.evaluate(function, joined, example)
        scores, gradients = whole.scores, whole.gradients
    results: list[EvaluationResult | Exception] = []
    shares = zip(torch.split(scores, pack.sizes), pack.classes, strict=True)
    for number, (own, classes) in enumerate(shares):
        start = sum(pack.sizes[:number])
        rows = slice(start, start + len(own))
        mine = [tuple(one[rows] for one in several) for several in gradients]
        failed = pack.errors.get(number)
        for one, compare in proofs:
            if one == number and failed is None:
                compare(own)
        results.append(failed or EvaluationResult(own, classes, mine))
    return results


def _to_prove(
    requests: Sequence[EvaluationRequest], counts: Sequence[int]
) -> list[tuple[int, int]]:
    """(request, row of its points) of a launch's rows that are to be proved: one for all requests
    of each `Independence`.
    """
    several = {id(one): one for each in requests if (one := each.independence) is not None}
    ends, chosen = list(itertools.accumulate(counts)), []
    for one in several.values():
        for row in one.due(ends[-1], apart=requests[0].function.single_row is not None):
            number = bisect_right(ends, row)
            if requests[number].independence is one:
                chosen.append((number, row - (ends[number - 1] if number else 0)))
            else:
                # Another call's row: the first one of those that this is about.
                chosen.append(([each.independence is one for each in requests].index(True), 0))
    return list(dict.fromkeys(chosen))


@contextmanager
def _slot(device: torch.device) -> Iterator[None]:
    """Waits until not too many launches run, and none is captured."""
    with launching(device):
        held = _SLOTS.acquire(timeout=PATIENCE)
        try:
            yield
        finally:
            if held:
                _SLOTS.release()


def mark(device: torch.device, **options: bool) -> torch.cuda.Event | None:
    """The end of what this thread's stream has been asked for, which GPUs do later; None for CPUs.

    options: of the event.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(**options)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(device: torch.device) -> None:
    """Until what this thread's stream has been asked for is done. Not until the device is idle:
    other threads may ask for more, and none may wait for that while one of them captures.
    """
    if (event := mark(device)) is not None:
        event.synchronize()


def lend(values: object, stream: torch.cuda.Stream | None) -> None:
    """Keeps the memory of tensors that are used on another stream until that is done with them."""
    for one in tree_iter(values):
        if stream is not None and isinstance(one, Tensor) and one.is_cuda:
            one.record_stream(stream)
