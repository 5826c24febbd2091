"""Prepare: from a call and a recipe to baselines, one probed point and a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saliency_fast.engine.baselines import choices, read_baseline_set, read_baselines
from saliency_fast.engine.bind import Call
from saliency_fast.engine.folds import WORKING_COPIES
from saliency_fast.engine.memory import MemoryMeter, is_out_of_memory, read_budget
from saliency_fast.engine.plan import MARGIN, Plan, points_per_launch
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import BudgetError, InputError
from saliency_fast.model.function import Inputs, PointFunction
from saliency_fast.ops.dispatch import kernels


@dataclass(frozen=True)
class Probe:
    """What one point took: bytes of tensors that lived at once, and of the largest one."""

    peak: int
    largest: int


@dataclass(frozen=True)
class Limits:
    """What the user allows: bytes (or text), and points per launch; None leaves it to the plan."""

    memory_budget: int | str | None = None
    points_per_launch: int | None = None


def baselines_of(call: Call, recipe: Recipe, baseline: Any) -> list[Inputs]:
    """The baselines to average over, each a tensor [B | 1 | M, *] per input."""
    if recipe.baseline == "set":
        return [read_baseline_set(baseline, call.inputs)]
    if recipe.baseline == "one":
        several = enumerate(choices(baseline))
        return [read_baselines(one, call.inputs, number) for number, one in several]
    if baseline is not None:
        raise InputError(
            "baseline: this method compares with nothing: got a baseline; leave it out, or use "
            "IntegratedGradients or ExpectedGradients"
        )
    # Zeros without memory: the methods that compare with nothing hardly look at them.
    return [tuple(x.new_zeros(()).expand(1, *x.shape[1:]) for x in call.inputs)]


def probe(function: PointFunction, call: Call, recipe: Recipe, baselines: Inputs) -> Probe:
    """Takes one point's gradient under a meter."""
    source = recipe.family.bind(call.inputs, baselines)
    item = torch.zeros(1, dtype=torch.int64, device=call.device)
    rows = recipe.levels[0].to(call.device).rows(item, 0, 1)
    try:
        with MemoryMeter() as meter:
            function.gradients(source.write(rows), item)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"one point alone does not fit in memory; explain a smaller input at once ({error})"
        ) from error
    return Probe(meter.peak, meter.largest)


def make_plan(
    method: Method,
    recipe: Recipe,
    call: Call,
    baselines: list[Inputs],
    probed: Probe,
    limits: Limits,
) -> Plan:
    """Chooses the points per launch; raises BudgetError where one point does not fit."""
    budget = read_budget(limits.memory_budget, call.device)
    maps = call.batch * call.targets.count
    map_bytes = sum(maps * x[0].numel() * x.element_size() for x in call.inputs)
    copies = (1 if recipe.at_input else 2) * (2 if recipe.reduction == "variance" else 1)
    # Baselines count twice: the record keeps a copy.
    held = sum(one.nbytes for several in baselines for one in several)
    fixed = copies * map_bytes + (0 if recipe.baseline == "none" else 2 * held)
    if len(baselines) > 1:
        # The map of each, and the accumulators of the one before until the next has a launch.
        fixed += (copies + len(baselines) - 1) * map_bytes
    finish = WORKING_COPIES * map_bytes
    points = recipe.count * call.batch
    # Convolutions of volumes copy their largest operand while they run.
    each = max(int(MARGIN * probed.peak), probed.peak + probed.largest)
    size = points_per_launch(
        limits.points_per_launch,
        points,
        each,
        probed.largest,
        fixed,
        finish,
        budget,
        call.device.type,
    )
    return Plan(
        method=method.name,
        device=str(call.device),
        dtype=str(call.inputs[0].dtype).removeprefix("torch."),
        backend=kernels(call.device.type),
        examples=call.batch,
        maps=call.targets.count,
        points=points,
        points_per_launch=size,
        bytes_per_point=each,
        fixed_bytes=fixed,
        finish_bytes=finish,
        budget=budget,
        notes=_notes(recipe, size, limits),
    )


def _notes(recipe: Recipe, size: int, limits: Limits) -> tuple[str, ...]:
    notes = []
    if recipe.tolerance is not None:
        notes.append(f"stops early where the estimated error is within {recipe.tolerance:g}")
    if limits.points_per_launch is not None and size < limits.points_per_launch:
        notes.append(f"points_per_launch={limits.points_per_launch} was lowered to {size}")
    return tuple(notes)
