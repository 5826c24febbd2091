"""Trials: launches that count for nothing, and tell people and plans what others will take."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

from torch import nn

from saliency_fast._torch_compat import storage_id
from saliency_fast.engine.arena import LEAST_TRACED, Arena, LaunchMemory, Trace, lent, served
from saliency_fast.engine.calibrate import UnverifiedError
from saliency_fast.engine.captured import described
from saliency_fast.engine.cudagraph import RECORDERS, cache_of, launching
from saliency_fast.engine.evaluation import Evaluation
from saliency_fast.engine.job import Job
from saliency_fast.engine.launch import mark
from saliency_fast.engine.loop import evaluation_of
from saliency_fast.engine.measure import Measurement
from saliency_fast.engine.memory import MALLOC_KEEPS, first_of_process, library_bytes
from saliency_fast.engine.plan import Plan
from saliency_fast.model.failures import warn_of_kernel
from saliency_fast.model.layers import Downstream
from saliency_fast.model.preserve import restored_random_state


def timed(job: Job) -> Job:
    """The job, whose plan tells what a point takes: in an earlier call, else measured."""
    seconds = job.calibration.seconds
    if job.key not in seconds:
        if job.strategy.tiled is not None or not job.calibration.recorded:
            # To try a single tile, or one of few points, is the call itself.
            return job
        each = _seconds_per_point(job)
        if each is None:
            return job
        seconds[job.key] = each
    return replace(job, plan=replace(job.plan, seconds_per_point=seconds[job.key]))


def shown(job: Job, graphs: bool, layout: str) -> Plan:
    """The plan of a job for people, with times, captures and layout."""
    if (verification := job.calibration.verification) is not None:
        try:
            cost = verification.settled()
        except UnverifiedError as error:
            return shown(job.replan(job, error), graphs, layout)
        assert job.with_cost is not None
        job = job.with_cost(cost)
        assert job.verified is not None
        job = replace(job, calibration=job.verified())
    elif job.with_cost is not None:
        about = (job.model, job.call, job.baselines[0], job.recipe.measured, job.config)
        with lent(job.call.device, job.call.inputs):
            cost = Measurement(*about).forward(job.strategy).cost
        job = job.with_cost(cost, keep=False)
    if job.traced and job.with_traces is not None and (launches := launches_of(job)) is not None:
        job = job.with_traces(launches.known)
    resident = _resident(job)
    return replace(
        timed(job).plan,
        graphs=described(job, wanted=graphs),
        layout=layout,
        library_bytes=resident.get("libraries", 0) if first_of_process() else 0,
        resident=resident,
    )


def _resident(job: Job) -> dict[str, int]:
    """Bytes that stay in use after a call, by name."""
    device, programs = job.call.device, (job.strategy.program, job.calibration.whole)
    model = job.model.model if isinstance(job.model, Downstream) else job.model
    state = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    own, theirs = dict[int, int](), {storage_id(one) for one in state}
    for one in (one for program in programs if program for one in program.constants):
        if storage_id(one) not in theirs:
            own[storage_id(one)] = one.untyped_storage().nbytes()
    found = {"recorded program": sum(own.values())}
    if device.type == "cpu":
        freed = min(job.plan.launch_bytes + job.plan.fixed_bytes, MALLOC_KEEPS)
        libraries = library_bytes(recorded=job.strategy.program is not None)
        found |= {"freed memory that malloc keeps": freed, "libraries": libraries}
    elif device.type in RECORDERS:
        found["captured launches"] = cache_of(device).nbytes
    return {name: size for name, size in found.items() if size}


def traced_sizes(job: Job) -> tuple[int, ...]:
    """Points of launches whose traces tell what all launches take; none where that is little."""
    plan = job.plan
    if plan.launch_bytes < job.config.traced_from or not served(job.call.device):
        return ()
    # One row often goes another way through PyTorch; from two on pieces grow evenly.
    return (2, 3) if plan.points_per_launch > 3 else (plan.points_per_launch,)


def launches_of(job: Job) -> LaunchMemory | None:
    """What launches up to the plan's size take; None where that cannot be told, or is little."""
    plan, device, sizes = job.plan, job.call.device, traced_sizes(job)
    if not sizes:
        return None
    evaluation, traces = _trial(job), dict[int, Trace]()
    for rows in sizes:
        arena = Arena(device, LEAST_TRACED, plan.launch_bytes)
        try:
            # Whatever goes wrong here goes wrong in a launch again, and is told there.
            with (
                suppress(Exception),
                restored_random_state(lambda: job.calibration.cost.drew, device),
                launching(device),
            ):
                evaluation.trial(rows, arena)
                trace = arena.trace()
                traces |= {} if trace is None else {rows: trace}
        finally:
            arena.close()
    memory = LaunchMemory(traces)
    return memory if len(traces) == len(sizes) and memory.consistent else None


def _seconds_per_point(job: Job) -> float | None:
    """What a point takes in a launch of the plan's size, about."""
    device, config = job.call.device, job.config
    # GPUs take as long for a few rows as for one, which is the host's time in all precisions.
    rows = config.timed_rows if device.type == "cpu" else config.timed_rows_on_gpus
    rows, seconds = min(job.plan.points_per_launch, rows), None
    evaluation, arena = _trial(job), Arena(device, about=job.plan.launch_bytes)
    try:
        drew = restored_random_state(lambda: job.calibration.cost.drew, device)
        with drew, launching(device):
            for _ in range(2):
                started, begun = time.perf_counter(), mark(device, enable_timing=True)
                evaluation.trial(rows, arena)
                ended = mark(device, enable_timing=True)
                if begun is not None and ended is not None:
                    ended.synchronize()
                    seconds = begun.elapsed_time(ended) / 1e3
                else:
                    seconds = time.perf_counter() - started
                if seconds > config.long_seconds:
                    break
    except Exception as error:
        # Whatever goes wrong goes wrong in a launch again, unless another precision is taken.
        warn_of_kernel(error)
    finally:
        arena.close()
    return None if seconds is None else seconds / rows


def _trial(job: Job) -> Evaluation:
    return evaluation_of(job)(job, job.call, job.baselines[0])
