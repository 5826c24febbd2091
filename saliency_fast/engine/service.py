"""Service: calls of many threads, whose points share launches.

One thread of its own runs them: it takes in what waits, fills a launch with points of calls that go
together, and hands out answers as calls finish. Launches are led in turn by the oldest call, so
that none waits for ever, and by the one with the fewest points left, so that none waits long for
a large one. Who leads gets half of the places, and what others leave.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from saliency_fast.engine.arena import Arena
from saliency_fast.engine.job import Job
from saliency_fast.engine.launch import Answer, Moment, Steps, Want, answered, launch, together
from saliency_fast.engine.memory import read_budget
from saliency_fast.errors import BusyError, ClosedError
from saliency_fast.graph.fingerprint import unchanging

Result = TypeVar("Result")
REFUSALS = 3
"""Times in a row that points of a kind fail together, and not alone, until they run apart."""
IDLE = 5.0
"""Seconds without a call after which the thread ends; the next call starts another."""


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
    """A call that waits for its launches. prepare: makes its job; finish: its result; failed: the
    error that its caller gets for one. left: points that it may still want.
    """

    device: torch.device
    prepare: Callable[[], Job]
    finish: Callable[[Job, Moment], Result]
    failed: Callable[[BaseException], BaseException]
    future: Future[Result] = field(default_factory=Future)
    handed_in: float = field(default_factory=time.perf_counter)
    job: Job | None = None
    steps: Steps | None = None
    want: Want | None = None
    last: Moment | None = None
    begun: bool = False
    left: int = 0

    @property
    def held(self) -> int:
        """Bytes that it holds while others run."""
        plan = _job(self).plan
        return plan.fixed_bytes + plan.finish_bytes


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
        self._counts: dict[str, float] = dict.fromkeys(Statistics.__dataclass_fields__, 0)
        self._arena: Arena | None = None
        self._turn = False
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

    @property
    def statistics(self) -> Statistics:
        with self._changed:
            counts = self._counts | {
                "waiting": len(self._waiting),
                "running": len(self._running),
            }
        whole = {n: v if n.endswith(("seconds", "queue")) else int(v) for n, v in counts.items()}
        return Statistics(**whole)  # type: ignore[arg-type]

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
                with self._guard(device):
                    self._burst(device)
            except BaseException as error:
                # The guard's own, or what stops a thread: nobody may wait for ever.
                self._fail_all(error)
            finally:
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
        """Runs until nothing waits that runs on the device, and nothing runs."""
        while True:
            # What waits begins at one moment: the model is looked at once.
            with unchanging():
                self._admit(device)
            self._drop_cancelled()
            if self._running:
                self._launch()
            elif not self._waiting or self._waiting[0].device != device:
                return

    def _admit(self, device: torch.device) -> None:
        """Prepares what waits, as much as memory allows; one at least."""
        while True:
            with self._changed:
                if not self._waiting or self._waiting[0].device != device or not self._affords():
                    return
                request = self._waiting.popleft()
                self._changed.notify_all()
            if request.future.cancelled():
                self._count(cancelled=1)
                continue
            try:
                job = request.job = request.prepare()
                request.left = job.plan.points * len(job.baselines)
                request.steps = job.steps()
                step = next(request.steps, None)
            except BaseException as error:
                self._fail(request, error)
                continue
            with self._changed:
                self._running.append(request)
            self._on(request, step)

    def _drop_cancelled(self) -> None:
        for request in [one for one in self._running if one.future.cancelled()]:
            self._gone(request)
            self._count(cancelled=1)

    def _affords(self) -> bool:
        """Whether one more request like the last one has room beside those that run."""
        if not self._running:
            return True
        last = self._running[-1]
        assert last.job is not None
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
        chosen, places = self._chosen(lead)
        self._note_launch(chosen, places)
        wants = [(request.want, rows) for request, rows in chosen if request.want is not None]
        if self._arena is None:
            plan = _job(chosen[0][0]).plan
            about = plan.bytes_per_point * plan.most
            self._arena = Arena(chosen[0][0].device, about=about)
        answers = self._answers(wants, self._arena)
        # Each is let go of before the next launch: see `answered`.
        answers.reverse()
        for request, _ in chosen:
            self._take_on(request, answers)

    def _take_on(self, request: Request[Result], answers: list[Answer | Exception]) -> None:
        """Gives a request its answer, the last one."""
        try:
            assert request.steps is not None
            step = answered(request.steps, answers)
        except BaseException as error:
            self._fail(request, error)
        else:
            self._on(request, step)

    def _chosen(self, lead: Request[Result]) -> tuple[list[tuple[Request[Result], int]], int]:
        """Requests and how many of their points the next launch has, and its places."""
        plan, kind = _job(lead).plan, _want(lead).kind
        places = plan.most
        if self.memory_budget is not None:
            room = read_budget(self.memory_budget, lead.device) - self._held
            places = max(1, min(places, room // max(1, plan.bytes_per_point)))
        wanted = _want(lead).rows
        if self._refused.get(kind, 0) >= REFUSALS:
            return [(lead, min(places, wanted))], places
        others = [one for one in self._running if one is not lead and _want(one).kind == kind]
        own = min(wanted, places // 2 if others and places > 1 else places)
        chosen, left = list[tuple[Request[Result], int]](), places - own
        for request in sorted(others, key=lambda one: one.left):
            rows = min(left, _want(request).rows)
            if rows > 0:
                chosen.append((request, rows))
                left -= rows
        return [(lead, min(wanted, own + left)), *chosen], places

    def _answers(self, wants: list[tuple[Want, int]], arena: Arena) -> list[Answer | Exception]:
        if len(wants) == 1:
            return [launch(*wants[0], arena)]
        kind = wants[0][0].kind
        try:
            answers = together(wants, arena)
        except Exception:
            # Whose fault it is shows when each is on its own.
            self._refused[kind] = self._refused.get(kind, 0) + 1
            return [launch(want, rows, arena) for want, rows in wants]
        self._refused.pop(kind, None)
        return answers

    def _on(self, request: Request[Result], step: Want | Moment | None) -> None:
        """Notes what a request wants next, or finishes it."""
        assert request.steps is not None
        try:
            while isinstance(step, Moment):
                request.last = step
                step = next(request.steps, None)
            request.want = step
            if step is not None:
                return
            assert request.last is not None
            result = request.finish(_job(request), request.last)
        except BaseException as error:
            self._fail(request, error)
            return
        self._gone(request)
        taken = request.future.set_running_or_notify_cancel()
        self._count(**{"finished" if taken else "cancelled": 1})
        if taken:
            request.future.set_result(result)

    def _fail(self, request: Request[Result], error: BaseException) -> None:
        self._gone(request)
        taken = request.future.set_running_or_notify_cancel()
        self._count(**{"failed" if taken else "cancelled": 1})
        if taken:
            request.future.set_exception(request.failed(error))

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            lost = [*self._running, *self._waiting]
            self._waiting.clear()
        for request in lost:
            with suppress(Exception):
                self._fail(request, error)

    def _gone(self, request: Request[Result]) -> None:
        if request.steps is not None:
            request.steps.close()
        with self._changed:
            if request in self._running:
                self._running.remove(request)

    def _note_launch(self, chosen: list[tuple[Request[Result], int]], places: int) -> None:
        now = time.perf_counter()
        for request, _ in chosen:
            if not request.begun:
                request.begun = True
                waited = now - request.handed_in
                self._count(begun=1, queue_seconds=waited)
                self._counts["longest_queue"] = max(self._counts["longest_queue"], waited)
        first = chosen[0][0].want
        if first is not None and first.gradients:
            for request, rows in chosen:
                request.left -= rows
            points = sum(rows for _, rows in chosen)
            self._count(launches=1, points=points, places=max(places, points))

    def _count(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                self._counts[name] += value


def _want(request: Request[Any]) -> Want:
    assert request.want is not None
    return request.want


def _job(request: Request[Any]) -> Job:
    assert request.job is not None
    return request.job
