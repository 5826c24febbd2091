"""Prepare: from a call, a recipe and a probed point to baselines and a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Launches
from saliency_fast.engine.baselines import choices, read_baseline_set, read_baselines
from saliency_fast.engine.bind import Call
from saliency_fast.engine.folds import WORKING_COPIES
from saliency_fast.engine.loss import looked_at
from saliency_fast.engine.memory import read_budget
from saliency_fast.engine.plan import DRAWS, MARGIN, Plan, point_bytes, points_per_launch
from saliency_fast.engine.probe import Probe
from saliency_fast.engine.recipe import Method, Recipe, Starting
from saliency_fast.engine.trial import Cost
from saliency_fast.errors import InputError
from saliency_fast.graph.autograd import LEAN
from saliency_fast.graph.fused import rectified
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.tiling import tile_bytes
from saliency_fast.model.casts import cast
from saliency_fast.ops.dispatch import kernels


@dataclass(frozen=True)
class Limits:
    """What the user allows: bytes (or text), and points per launch; None leaves it to the plan."""

    memory_budget: int | str | None = None
    points_per_launch: int | None = None


def baselines_of(call: Call, recipe: Recipe, baseline: Any) -> list[Inputs]:
    """The baselines to average over, each a tensor [B | 1 | M, *] per input."""
    if recipe.baseline == "set":
        rows = read_baseline_set(baseline, call.inputs, call.layouts)
        _need_held(rows, call)
        return [rows]
    if isinstance(recipe.family, Starting):
        if baseline is not None:
            raise InputError(
                "baseline: this method's path begins where the input tells: got a baseline; leave "
                "it out, or use IntegratedGradients"
            )
        return [recipe.family.start(call.inputs)]
    if recipe.baseline in ("one", "fill"):
        several = enumerate(choices(baseline))
        found = [
            read_baselines(one, call.inputs, number, call.layouts, missing=recipe.scores_alone)
            for number, one in several
        ]
        for one in found:
            _need_held(one, call)
        return found
    if baseline is not None:
        raise InputError(
            "baseline: this method compares with nothing: got a baseline; leave it out, or use "
            "IntegratedGradients or ExpectedGradients"
        )
    # Zeros without memory: the methods that compare with nothing hardly look at them.
    return [tuple(x.new_zeros(()).expand(1, *x.shape[1:]) for x in call.inputs)]


def _need_held(baselines: Inputs, call: Call) -> None:
    """Raises where the model's half type cannot hold a baseline, which is float32 here."""
    for one, dtype in zip(baselines, call.dtypes, strict=True):
        if dtype in HALVES:
            cast(one, dtype, "the baseline", f"the model takes {dtype}")


def make_plan(
    method: Method,
    recipe: Recipe,
    call: Call,
    baselines: list[Inputs],
    probed: Probe,
    limits: Limits,
    launches: Launches | None = None,
) -> Plan:
    """Chooses the points per launch; raises BudgetError where one point does not fit.

    launches: what they take, where they were traced.
    """
    budget = read_budget(limits.memory_budget, call.device)
    maps = call.batch * call.targets.count
    size_of = call.inputs[0].element_size()
    map_bytes = sum(maps * x[0].numel() * size_of for x in call.inputs)
    if recipe.rounds is not None and recipe.held == 0:  # it asks for scores, and makes no maps
        map_bytes = 0
    # Behind a prefix, sums are held where it ends; on lines inputs and baselines are too.
    prefix = probed.way.prefix
    place = 0 if prefix is None else size_of * sum(map(math.prod, prefix.shapes))
    sum_bytes = map_bytes if prefix is None else maps * place
    copies = (1 if recipe.at_input else 2) * (2 if recipe.reduction == "variance" else 1)
    copies = copies if recipe.rounds is None else recipe.held
    # Baselines count twice: the record keeps a copy.
    held = sum(one.nbytes for several in baselines for one in several)
    fixed = copies * sum_bytes + (0 if recipe.baseline == "none" else 2 * held)
    if recipe.family.straight and prefix is not None:
        fixed += (call.batch + max(len(several[0]) for several in baselines)) * place
    if len(baselines) > 1:
        # The map of each, and the accumulators of the one before until the next has a launch.
        fixed += copies * sum_bytes + (len(baselines) - 1) * map_bytes
    # A row that is proved alone before its launch.
    fixed += sum(x[0].nbytes for x in call.inputs)
    finish = (1 if recipe.at_input else WORKING_COPIES) * map_bytes + (
        0 if prefix is None else 2 * sum_bytes
    )
    points = recipe.count * call.batch
    cost, exact = probed.cost, _each(probed.exact) if probed.exact else 0
    each, (examples, of_each) = _each(cost), looked_at(recipe, call.batch) if exact else (0, 0)
    # Copies of weights, and the maps of the points that are taken in two precisions.
    ready = probed.way.ready_bytes(recipe)
    fixed += probed.way.settled_bytes + probed.way.lowered_bytes + ready
    fixed += 3 * (sum_bytes // call.batch) * examples * of_each
    if (tiled := probed.way.tiled) is not None:
        # What operators take for themselves is at most what a tile takes, not a whole map.
        each = int(MARGIN * cost.peak) + tile_bytes(tiled.stem, tiled.tile)

    def bytes_of(rows: int) -> int:
        known = None if launches is None else launches.bytes_of(rows)
        return each * rows if known is None else known

    most = points_per_launch(
        limits.points_per_launch,
        bytes_of,
        cost.largest,
        fixed,
        finish,
        budget,
        call.device.type,
        gradients=recipe.gradients,
        weights=ready,
    )
    size = min(most, points)
    launch = bytes_of(size)
    fits = bool(exact) and fixed + max(exact, finish) <= budget
    few = min(examples * of_each, size, max(1, launch // exact)) if fits else 0
    return Plan(
        method=method.name,
        device=str(call.device),
        dtype=str(call.dtypes[0]).removeprefix("torch."),
        backend=kernels(call.device.type),
        examples=call.batch,
        maps=call.targets.count,
        points=points,
        points_per_launch=size,
        launch_bytes=max(launch, few * exact),
        fixed_bytes=fixed,
        finish_bytes=finish,
        budget=budget,
        lean=str(probed.way),
        saved_before=probed.plain.saved,
        saved_after=cost.saved,
        left=_left(cost.kept) if probed.way.program else (),
        prefix=_calls(prefix, recipe),
        precision=probed.way.precision.name,
        looked_at=few,
        most=most,
        notes=_notes(recipe, size, limits, probed),
    )


def _each(cost: Cost) -> int:
    return point_bytes(cost.peak, cost.largest)


def _calls(prefix: Prefix | None, recipe: Recipe) -> str:
    """What is taken once instead of for every point."""
    if prefix is None:
        return ""
    passes = "forward and back" if recipe.family.straight else "back"
    return f"{', '.join(dict.fromkeys(prefix.calls))}: {passes} once in all"


def _left(kept: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Calls that autograd keeps something for, the largest first."""
    mine = {call.__name__ for call in LEAN} | {rectified.__name__}
    left = [(name, size) for name, size in kept.items() if name not in mine]
    return tuple(sorted(left, key=lambda one: -one[1]))


def _notes(recipe: Recipe, size: int, limits: Limits, probed: Probe) -> tuple[str, ...]:
    notes = [] if probed.reason is None else [f"lean: {probed.reason}"]
    if probed.plain.random:
        notes.append(DRAWS)
    if recipe.tolerance is not None:
        notes.append(f"stops early where the estimated error is within {recipe.tolerance:g}")
    if limits.points_per_launch is not None and size < limits.points_per_launch:
        notes.append(f"points_per_launch={limits.points_per_launch} was lowered to {size}")
    return tuple(notes)
