"""Medians of functions called in turn: by CUDA events around many launches, or by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 15
QUEUED, QUEUED_EACH = 1_000_000, 200_000
"""Cycles that a GPU sleeps before launches are timed, and more for each: half a millisecond, and
100 microseconds. Meanwhile the host queues the launches, so that none of its time is measured."""

Run = Callable[[], object]
Timer = Callable[[dict[str, Run]], dict[str, float]]
"""Median seconds of each function, all of them called in turn."""


class CudaTimer:
    """By CUDA events. Before they are timed, the cache is written over.

    rounds: of each function. launches: between two events; the time is that of one of them. Where
    they are several, arguments must be larger than the cache.
    """

    def __init__(self, rounds: int = ROUNDS, launches: int = 1, device: str = "cuda") -> None:
        self.rounds, self.launches = rounds, launches
        self.others = torch.empty(4 * cache_bytes(), dtype=torch.uint8, device=device)

    def __call__(self, functions: dict[str, Run]) -> dict[str, float]:
        for run in functions.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.rounds):
            for name, run in functions.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.others.zero_()
                torch.cuda._sleep(QUEUED + QUEUED_EACH * self.launches)
                start.record()
                for _ in range(self.launches):
                    run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3 / self.launches)
        return {name: statistics.median(own) for name, own in times.items()}


class WallTimer:
    """By the host's clock, on a CPU; a function stops after two rounds once `seconds` are over."""

    def __init__(self, rounds: int = ROUNDS, seconds: float = 2.0) -> None:
        self.rounds, self.seconds = rounds, seconds

    def __call__(self, functions: dict[str, Run]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in functions}
        begun = time.perf_counter()
        for number in range(self.rounds):
            for name, run in functions.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
            if number >= 1 and time.perf_counter() - begun > self.seconds:
                break
        return {name: statistics.median(own) for name, own in times.items()}


def cache_bytes() -> int:
    """Of the current GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def timer_of(device: str, rounds: int = ROUNDS, launches: int = 1) -> Timer:
    return CudaTimer(rounds, launches) if device == "cuda" else WallTimer(rounds)
