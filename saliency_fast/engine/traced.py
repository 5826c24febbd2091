"""Launches on trial: their memory, to lay it out without holes, and their time."""

from __future__ import annotations

import time
from contextlib import suppress

import torch

from saliency_fast.engine.arena import LEAST_TRACED, Arena, Launches, Trace, served
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.run import Run
from saliency_fast.model.preserve import same_draws

TRACED_FROM = 16 * 1024**2
"""Bytes of a launch from which its trace pays, which costs up to five points."""
TIMED_ROWS = 4
"""Rows of a launch that is timed; with more, a point rarely takes less than four fifths as long."""
LONG = 2.0
"""Seconds from which a launch is not run again for the time it takes when all is warm."""


def launches_of(run: Run, plan: Plan, *, draws: bool) -> Launches | None:
    """What launches up to the plan's size take; None where that cannot be told, or is little."""
    if plan.launch_bytes < TRACED_FROM or not served(run.call.device):
        return None
    # One row often goes another way through PyTorch; from two on pieces grow evenly.
    sizes = (2, 3) if plan.points_per_launch > 3 else (plan.points_per_launch,)
    known = {rows: _trace(run, rows, draws) for rows in sizes}
    found = Launches({rows: trace for rows, trace in known.items() if trace is not None})
    return found if len(found.known) == len(sizes) and found.alike else None


def seconds_per_point(run: Run, plan: Plan, *, draws: bool) -> float | None:
    """What a point takes in a launch of the plan's size, about."""
    rows, found = min(plan.points_per_launch, TIMED_ROWS), None
    arena = Arena(run.call.device, about=plan.launch_bytes)
    try:
        # As below.
        with suppress(Exception), same_draws(lambda: draws, run.call.device):
            for _ in range(2):
                started = time.perf_counter()
                run.try_launch(rows, arena)
                wait_for(run.call.device)
                found = time.perf_counter() - started
                if found > LONG:
                    break
    finally:
        arena.close()
    return None if found is None else found / rows


def wait_for(device: torch.device) -> None:
    """Until what was asked of a device is done: GPUs answer before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trace(run: Run, rows: int, draws: bool) -> Trace | None:
    """What a launch of `rows` takes, from one that is thrown away."""
    arena = Arena(run.call.device, LEAST_TRACED, run.plan.launch_bytes)
    try:
        # Whatever goes wrong here goes wrong in a launch again, and is told there.
        with suppress(Exception), same_draws(lambda: draws, run.call.device):
            run.try_launch(rows, arena)
            return arena.trace()
        return None
    finally:
        arena.close()
