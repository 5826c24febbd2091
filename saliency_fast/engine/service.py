"""Service: requests of many threads, whose points share launches.

One thread of its own runs them: it takes in what waits, fills a launch with points of requests of
one kind, and hands out results as requests finish. Launches are led in turn by the oldest request,
so that none waits for ever, and by the one with the fewest points left, so that none waits long
for a large one. The leading request gets half of the slots, and any that are unused.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch

from saliency_fast.engine.arena import Arena
from saliency_fast.engine.job import Job, Progress, Steps
from saliency_fast.engine.launch import (
    EvaluationRequest,
    EvaluationResult,
    execute,
    execute_together,
    mark,
)
from saliency_fast.engine.loop import evaluate, resume
from saliency_fast.engine.memory import read_budget
from saliency_fast.errors import BusyError, ClosedError
from saliency_fast.graph.fingerprint import unchanging

Result = TypeVar("Result")
REFUSALS = 3
"""Times in a row that points of a kind fail together, and not alone, until they run apart."""
IDLE = 5.0
"""Seconds without a call after which the thread ends; the next call starts another."""
RESULTS = "saliency_fast_results"
"""The name of the thread that waits for GPUs, so that launches go on."""


@dataclass(frozen=True)
class Statistics:
    """What a service has done so far; read at any time, from any thread.

    finished, failed, cancelled: requests; waiting, running: now. launches: with gradients, of
    `points` in all, of the `places` that they had. queue_seconds: from being handed in until a
    launch with the request's points began, over all requests that got so far, and longest_queue.
    """

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    waiting: int = 0
    running: int = 0
    launches: int = 0
    points: int = 0
    places: int = 0
    begun: int = 0
    queue_seconds: float = 0.0
    longest_queue: float = 0.0

    @property
    def fill(self) -> float:
        """The share of the places in launches that had a point."""
        return self.points / self.places if self.places else 0.0

    @property
    def mean_queue_seconds(self) -> float:
        return self.queue_seconds / self.begun if self.begun else 0.0

    def __str__(self) -> str:
        return (
            f"requests   {self.finished} finished, {self.failed} failed, {self.cancelled} "
            f"cancelled, {self.waiting} waiting, {self.running} running\n"
            f"launches   {self.launches} of {self.points / max(1, self.launches):.1f} points on "
            f"average, {self.fill:.0%} full\n"
            f"queue      {self.mean_queue_seconds * 1e3:.1f} ms, {self.longest_queue * 1e3:.1f} ms "
            "at most"
        )


@dataclass(eq=False)
class Request(Generic[Result]):
    """A call that waits for its launches.

    Args:
        device: On which it runs.
        prepare: Makes its job.
        finish: Makes its result of the last progress.
        failed: The error that its caller gets for one.
    """

    device: torch.device
    prepare: Callable[[], Job]
    finish: Callable[[Progress], Result]
    failed: Callable[[BaseException], BaseException]
    future: Future[Result] = field(default_factory=Future)
    handed_in: float = field(default_factory=time.perf_counter)
    _job: Job | None = None
    _steps: Steps | None = None
    _wanted: EvaluationRequest | None = None
    _last: Progress | None = None
    _begun: bool = False
    left: int = 0
    """Points that it may still want."""

    @property
    def job(self) -> Job:
        assert self._job is not None
        return self._job

    @property
    def wanted(self) -> EvaluationRequest:
        """What it wants from the model next."""
        assert self._wanted is not None
        return self._wanted

    @property
    def held(self) -> int:
        """Bytes that it holds while others run."""
        plan = self.job.plan
        return plan.fixed_bytes + plan.finish_bytes

    def begin(self) -> bool:
        """Prepares it; True where it is over already."""
        self._job = self.prepare()
        self.left = self._job.plan.points * len(self._job.baselines)
        self._steps = evaluate(self._job)
        return self._noted(next(self._steps, None))

    def resume(self, results: list[EvaluationResult | Exception]) -> bool:
        """Gives it its result, the last one; True where it is over."""
        assert self._steps is not None
        return self._noted(resume(self._steps, results))

    def _noted(self, step: EvaluationRequest | Progress | None) -> bool:
        assert self._steps is not None
        while isinstance(step, Progress):
            self._last, self._job = step, step.job
            step = next(self._steps, None)
        self._wanted = step
        return step is None

    def take(self, rows: int) -> float | None:
        """Notes that a launch has so many of its points; seconds that it waited for the first."""
        if self.wanted.gradients:
            self.left -= rows
        begun, self._begun = self._begun, True
        return None if begun else time.perf_counter() - self.handed_in

    def result(self) -> Result:
        assert self._last is not None
        return self.finish(self._last)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()


def _give_after(give: Callable[[], None], request: Request[Any], end: torch.cuda.Event) -> None:
    """Gives a result out once a GPU has made it. The request, with its inputs, lives until then."""
    try:
        end.synchronize()
    except BaseException as error:
        request.future.set_exception(error)
    else:
        give()


class Service(Generic[Result]):
    """Runs requests in launches that they share.

    capacity: how many may wait. latency: seconds that a request waits, at most, for others to share
    its first launch, where nothing else is running. guard: entered while anything runs on a device.
    """

    def __init__(
        self,
        guard: Callable[[torch.device], AbstractContextManager[Any]],
        *,
        capacity: int = 1024,
        latency: float = 0.002,
        memory_budget: int | str | None = None,
    ) -> None:
        self.capacity, self.latency, self.memory_budget = capacity, latency, memory_budget
        self._guard = guard
        self._changed = threading.Condition()
        self._waiting: deque[Request[Result]] = deque()
        self._running: list[Request[Result]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._counts = Statistics()
        self._arena: Arena | None = None
        self._turn = False
        # What gives a result out, and the end of what a GPU still has to do for it.
        self._over: list[tuple[Callable[[], None], Request[Result], torch.cuda.Event | None]] = []
        self._results_of_gpus = ThreadPoolExecutor(1, RESULTS)
        # How often in a row points of a kind could not share a launch.
        self._refused: dict[tuple[object, ...], int] = {}

    def submit(
        self, request: Request[Result], *, block: bool = True, timeout: float | None = None
    ) -> Future[Result]:
        """Hands a request in; waits for a place, or raises BusyError, where too many wait."""
        with self._changed:
            if not block and self._full():
                raise BusyError(
                    f"too many requests wait: got {len(self._waiting)}, at most {self.capacity} "
                    "may; try again later, or pass a larger `waiting` to Engine"
                )
            if not self._changed.wait_for(lambda: self._closed or not self._full(), timeout):
                raise BusyError(f"no place became free within {timeout:g} s; try again later")
            if self._closed:
                raise ClosedError("the engine was closed: it takes no more requests")
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="saliency_fast", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request.future

    def close(self, *, cancel: bool = False) -> None:
        """Finishes what was handed in, or cancels it, and takes no more."""
        with self._changed:
            self._closed = True
            for request in [*self._waiting, *self._running] if cancel else ():
                request.future.cancel()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        # A result's callback may close its engine.
        self._results_of_gpus.shutdown(not threading.current_thread().name.startswith(RESULTS))

    @property
    def statistics(self) -> Statistics:
        with self._changed:
            waiting, running = len(self._waiting), len(self._running)
            return replace(self._counts, waiting=waiting, running=running)

    def _full(self) -> bool:
        return len(self._waiting) >= self.capacity

    def _run(self) -> None:
        """The thread: bursts of work until nothing came for a while."""
        while True:
            with self._changed:
                came = self._changed.wait_for(lambda: self._waiting or self._closed, IDLE)
                if not self._waiting and (self._closed or not came):
                    self._thread = None
                    return
            self._gather()
            try:
                device = self._waiting[0].device
                while self._running or self._waits(device):
                    with self._guard(device):
                        self._burst(device)
                    # Whoever has a result may change the model, which the guard would put back.
                    self._hand_out()
            except BaseException as error:
                # The guard's own, or what stops a thread: nobody may wait for ever.
                self._fail_all(error)
            finally:
                self._hand_out()
                if self._arena is not None:
                    self._arena.close()
                    self._arena = None

    def _gather(self) -> None:
        """Waits a moment for others to share the first launch."""
        deadline = self._waiting[0].handed_in + self.latency
        while (left := deadline - time.perf_counter()) > 0:
            with self._changed:
                if self._full() or self._closed:
                    return
                self._changed.wait(left)

    def _burst(self, device: torch.device) -> None:
        """Runs until a request is over, or nothing waits that runs on the device."""
        while not self._over:
            # What waits begins at one moment: the model is looked at once.
            with unchanging():
                self._admit(device)
            for request in [one for one in self._running if one.future.cancelled()]:
                self._settle(request)
            if self._running:
                self._launch()
            elif not self._waits(device):
                return

    def _waits(self, device: torch.device) -> bool:
        """Whether the request that waits longest runs on the device."""
        return bool(self._waiting) and self._waiting[0].device == device

    def _hand_out(self) -> None:
        """Gives the results of requests that are over to those who wait for them."""
        over, self._over = self._over, []
        for give, request, end in over:
            if end is None:
                give()
            else:
                self._results_of_gpus.submit(_give_after, give, request, end)

    def _admit(self, device: torch.device) -> None:
        """Prepares what waits, as much as memory allows; one at least."""
        while True:
            with self._changed:
                if not self._waiting or self._waiting[0].device != device or not self._affords():
                    return
                request = self._waiting.popleft()
                self._running.append(request)
                self._changed.notify_all()
            if request.future.cancelled():
                self._settle(request)
            else:
                self._advance(request, request.begin)

    def _affords(self) -> bool:
        """Whether one more request like the last one has room beside those that run."""
        if not self._running:
            return True
        last = self._running[-1]
        budget = read_budget(self.memory_budget, last.device)
        return self._held + last.held + last.job.plan.launch_bytes <= budget

    @property
    def _held(self) -> int:
        """What running requests take of a given budget; of what is free it is gone already."""
        if self.memory_budget is None:
            return 0
        return sum(request.held for request in self._running)

    def _launch(self) -> None:
        """One launch, of points that go together."""
        self._turn = not self._turn
        lead = self._running[0] if self._turn else min(self._running, key=lambda one: one.left)
        chosen, slots = self._chosen(lead)
        wanted = [(request.wanted, rows) for request, rows in chosen]
        self._note_launch(chosen, slots)
        if self._arena is None:
            plan = lead.job.plan
            self._arena = Arena(lead.device, about=plan.bytes_per_point * plan.most)
        results = self._results(wanted, self._arena)
        # Each is let go of before the next launch: see `resume`.
        results.reverse()
        for request, _ in chosen:
            self._advance(request, partial(request.resume, results))

    def _chosen(self, lead: Request[Result]) -> tuple[list[tuple[Request[Result], int]], int]:
        """Requests and how many of their points the next launch has, and its slots."""
        plan, kind, wanted = lead.job.plan, lead.wanted.kind, lead.wanted.count
        slots = plan.most
        if self.memory_budget is not None:
            room = read_budget(self.memory_budget, lead.device) - self._held
            slots = max(1, min(slots, room // max(1, plan.bytes_per_point)))
        if self._refused.get(kind, 0) >= REFUSALS:
            return [(lead, min(slots, wanted))], slots
        others = [one for one in self._running if one is not lead and one.wanted.kind == kind]
        own = min(wanted, slots // 2 if others and slots > 1 else slots)
        chosen, left = list[tuple[Request[Result], int]](), slots - own
        for request in sorted(others, key=lambda one: one.left):
            rows = min(left, request.wanted.count)
            if rows > 0:
                chosen.append((request, rows))
                left -= rows
        return [(lead, min(wanted, own + left)), *chosen], slots

    def _results(
        self, wanted: list[tuple[EvaluationRequest, int]], arena: Arena
    ) -> list[EvaluationResult | Exception]:
        if len(wanted) == 1:
            return [execute(*wanted[0], arena)]
        kind = wanted[0][0].kind
        try:
            results = execute_together(wanted, arena)
        except Exception:
            # Whose fault it is shows when each is on its own.
            self._refused[kind] = self._refused.get(kind, 0) + 1
            return [execute(request, rows, arena) for request, rows in wanted]
        self._refused.pop(kind, None)
        return results

    def _advance(self, request: Request[Result], step: Callable[[], bool]) -> None:
        """Runs a step of a request, and hands out its result where it is over, or its error."""
        try:
            over = step()
            result = request.result() if over else None
            end = mark(request.device, blocking=True) if over else None
        except BaseException as error:
            self._settle(request, error=error)
        else:
            if over:
                self._settle(request, result, end=end)

    def _settle(
        self,
        request: Request[Result],
        result: Result | None = None,
        error: BaseException | None = None,
        end: torch.cuda.Event | None = None,
    ) -> None:
        """Takes a request out, with its result or what went wrong, unless it was cancelled."""
        request.close()
        with self._changed:
            if request in self._running:
                self._running.remove(request)
        if not request.future.set_running_or_notify_cancel():
            self._count(cancelled=1)
        elif error is not None:
            self._count(failed=1)
            give = partial(request.future.set_exception, request.failed(error))
            self._over.append((give, request, None))
        else:
            self._count(finished=1)
            give = partial(request.future.set_result, cast(Result, result))
            self._over.append((give, request, end))

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            lost = [*self._running, *self._waiting]
            self._waiting.clear()
        for request in lost:
            with suppress(Exception):
                self._settle(request, error=error)

    def _note_launch(self, chosen: list[tuple[Request[Result], int]], slots: int) -> None:
        for request, rows in chosen:
            waited = request.take(rows)
            if waited is not None:
                self._count(begun=1, queue_seconds=waited)
                with self._changed:
                    longest = max(self._counts.longest_queue, waited)
                    self._counts = replace(self._counts, longest_queue=longest)
        if chosen[0][0].wanted.gradients:
            points = sum(rows for _, rows in chosen)
            self._count(launches=1, points=points, places=max(slots, points))

    def _count(self, **more: float) -> None:
        with self._changed:
            sums = {name: getattr(self._counts, name) + value for name, value in more.items()}
            self._counts = replace(self._counts, **sums)
