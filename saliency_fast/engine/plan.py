"""Plan: how a call will run, as a value that prints before anything runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import WORKING_COPIES
from saliency_fast.engine.arena import LaunchMemory
from saliency_fast.engine.baselines import choices, read_baseline_set, read_baselines
from saliency_fast.engine.bind import Call
from saliency_fast.engine.calibrate import Calibration
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.memory import Cost, bytes_text, read_budget
from saliency_fast.engine.precision import measured_points
from saliency_fast.engine.recipe import (
    Method,
    Recipe,
    Refinement,
    RoundsRecipe,
    Starting,
    WeightedSum,
)
from saliency_fast.errors import BudgetError, InputError, InputTypeError
from saliency_fast.graph.autograd import LEAN
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.fusion import rectified
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.tiling import tile_bytes
from saliency_fast.model.casts import cast
from saliency_fast.ops.dispatch import kernels

DRAWS = (
    "the model draws random numbers: the map is of the draws that follow the caller's random "
    "state, and the same in every call from there"
)
"""A note of plans."""


def kept_bytes(refinement: Refinement, call: Call) -> int:
    """What the gradients take that are kept of an example."""
    size = sum(x[0].numel() * x.element_size() for x in call.inputs)
    return refinement.kept * call.targets.count * size


@dataclass(frozen=True)
class Limits:
    """What the user allows: bytes (or text), and points per launch; None leaves it to the plan."""

    memory_budget: int | str | None = None
    points_per_launch: int | None = None


@dataclass(frozen=True)
class Plan:
    """Points per launch and what they cost; nothing is run by looking at it.

    Args:
        method, device, dtype, backend: Of the call, and whose kernels serve it.
        examples, maps: How many, and maps of each.
        points: The most that the method may visit over all examples; a tolerance may stop earlier.
        points_per_launch: How many of them share a launch.
        launch_bytes: What a launch takes: as traced where launches were, else by the tensors of one
            point.
        fixed_bytes: What baselines and accumulators take.
        finish_bytes: What the result takes when the launches are over.
        budget: Bytes that the call may take.
        lean: The execution strategy, as text.
        saved_before, saved_after: Bytes that autograd keeps of a point from forward to backward:
            eagerly, and by this plan.
        left: Calls that no memory-efficient version serves, with what autograd keeps for them.
        prefix: The leading affine calls that are applied once for all points.
        precision: Of the model's products; `looked_at` points at a time are taken in float32 too.
        most: Points that a launch may have where other calls fill it.
        graphs: Whether launches are captured and replayed, on devices that can.
        layout: Of the inputs, and who says so.
        notes: What else is to be known.
        strategies: (strategy, why not) of those that come before the one that was taken.
        halvings: How often the points per launch were halved, out of memory.
        library_bytes: What PyTorch and its libraries take when a process first uses them, where
            this call is its first.
        resident: Bytes that stay in use after the call, by name; `Engine.close` gives back all but
            the libraries'.
        seconds_per_point: Of the last such call or, before one, measured; None where none has run.

    Example:
        >>> import torch, saliency_fast as sf
        >>> plan = sf.Engine(torch.nn.Linear(4, 3), points_per_launch=20).plan(torch.ones(1, 4), 1)
        >>> plan.points, plan.launches
        (50, 3)
    """

    method: str
    device: str
    dtype: str
    backend: str
    examples: int
    maps: int
    points: int
    points_per_launch: int
    launch_bytes: int
    fixed_bytes: int
    finish_bytes: int
    budget: int
    lean: str = "off"
    saved_before: int = 0
    saved_after: int = 0
    left: tuple[tuple[str, int], ...] = ()
    prefix: str = ""
    precision: str = "float32"
    looked_at: int = 0
    most: int = 0
    graphs: str = ""
    layout: str = ""
    notes: tuple[str, ...] = ()
    strategies: tuple[tuple[str, str], ...] = ()
    halvings: int = 0
    library_bytes: int = field(default=0, compare=False)
    resident: Mapping[str, int] = field(default_factory=dict, compare=False)
    seconds_per_point: float | None = field(default=None, compare=False)

    @property
    def launches(self) -> int:
        return -(-self.points // self.points_per_launch)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak over what was in use before the call."""
        return self.library_bytes + self.fixed_bytes + max(self.launch_bytes, self.finish_bytes)

    @property
    def bytes_per_point(self) -> int:
        return -(-self.launch_bytes // self.points_per_launch)

    @property
    def seconds(self) -> float | None:
        """Predicted time of the launches, where every point is visited."""
        each = self.seconds_per_point
        return None if each is None else each * self.points

    def __str__(self) -> str:
        kind = self.dtype if self.precision == "float32" else f"{self.dtype} by {self.precision}"
        lines = [
            f"plan       {self.method} on {self.device}, {kind}, {self.backend} kernels",
            f"work       {self.examples} examples x {self.maps} maps: up to {self.points} points "
            f"in {self.launches} launches of {self.points_per_launch}",
            f"memory     {bytes_text(self.peak_bytes)} of {bytes_text(self.budget)}: "
            f"{bytes_text(self.launch_bytes)} a launch, {bytes_text(self.fixed_bytes)} fixed",
        ]
        if self.library_bytes:
            lines[-1] += f", {bytes_text(self.library_bytes)} of libraries"
        if self.resident:
            kept = ", ".join(f"{name} {bytes_text(size)}" for name, size in self.resident.items())
            lines.append(f"resident   {kept}")
        if self.seconds is not None and self.seconds_per_point is not None:
            lines.append(f"time       {self.seconds:.3g} s: {self.seconds_per_point:.3g} s a point")
        lines += [f"refused    {name}: {reason}" for name, reason in self.strategies]
        taken = {"off": "eager", "call by call": "intercepted"}.get(self.lean, self.lean)
        lines.append(f"strategy   {taken}: {bytes_text(self.bytes_per_point)} a point")
        if self.saved_before:
            lines.append(
                f"lean       {self.lean}: keeps {bytes_text(self.saved_after)} of a point from "
                f"forward to backward, as it is {bytes_text(self.saved_before)}"
            )
        if self.left:
            calls = ", ".join(f"{name} {bytes_text(size)}" for name, size in self.left[:6])
            lines.append(f"autograd's {calls}")
        several = {"prefix": self.prefix, "layout": self.layout, "graphs": self.graphs}
        lines += [f"{name:<10} {text}" for name, text in several.items() if text]
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def baselines_of(call: Call, recipe: Recipe, baseline: Any) -> list[Inputs]:
    """The baselines to average over, each a tensor [B | 1 | M, *] per input."""
    if isinstance(recipe, WeightedSum) and isinstance(recipe.family, Starting):
        if baseline is not None:
            raise InputError(
                "baseline: this method's path begins where the input tells: got a baseline; leave "
                "it out, or use IntegratedGradients"
            )
        return [recipe.family.start(call.inputs)]
    if recipe.baseline == "none":
        if baseline is not None:
            raise InputError(
                "baseline: this method compares with nothing: got a baseline; leave it out, or use "
                "IntegratedGradients or ExpectedGradients"
            )
        # Zeros without memory: the methods that compare with nothing hardly look at them.
        return [tuple(x.new_zeros(()).expand(1, *x.shape[1:]) for x in call.inputs)]
    if recipe.baseline == "set":
        several = [read_baseline_set(baseline, call.inputs, call.layouts)]
    else:
        several = [
            read_baselines(one, call.inputs, number, call.layouts, missing=recipe.scores_alone)
            for number, one in enumerate(choices(baseline))
        ]
    for parts in several:
        for one, dtype in zip(parts, call.dtypes, strict=True):
            if dtype in HALVES:
                # The model's half type must hold what is float32 here.
                cast(one, dtype, "the baseline", f"the model takes {dtype}")
    return several


@dataclass(frozen=True)
class _Bytes:
    """What a call takes beside its launches. replicas: of the accumulators."""

    fixed: int
    finish: int
    sums: int
    scores_weights: int

    @classmethod
    def of(
        cls,
        call: Call,
        recipe: Recipe,
        baselines: list[Inputs],
        calibration: Calibration,
        config: EngineConfig,
    ) -> _Bytes:
        size_of, maps = call.inputs[0].element_size(), call.batch * call.targets.count
        map_bytes = sum(maps * x[0].numel() * size_of for x in call.inputs)
        if isinstance(recipe, WeightedSum):
            moments = recipe.reduction == "variance"
            copies = (1 if recipe.at_input else 2) * (2 if moments else 1)
        else:
            copies = recipe.held if isinstance(recipe, RoundsRecipe) else 0
            # It asks for scores, and makes no maps.
            map_bytes = map_bytes if copies else 0
        # Behind a prefix, sums are held where it ends; on lines inputs and baselines are too.
        prefix = calibration.strategy.prefix
        stem = 0 if prefix is None else size_of * sum(map(math.prod, prefix.shapes))
        sums = map_bytes if prefix is None else maps * stem
        # Baselines count twice: the record keeps a copy.
        held = sum(one.nbytes for several in baselines for one in several)
        fixed = copies * sums + (0 if recipe.baseline == "none" else 2 * held)
        if prefix is not None and recipe.measured.family.straight:
            fixed += (call.batch + max(len(several[0]) for several in baselines)) * stem
        if len(baselines) > 1:
            # The map of each, and the accumulators of the one before until the next has a launch.
            fixed += copies * sums + (len(baselines) - 1) * map_bytes
        if isinstance(recipe, WeightedSum) and recipe.refinement is not None:
            each = kept_bytes(recipe.refinement, call)
            fixed += min(call.batch * each, max(each, config.kept_bytes))
        # A row that is proved alone before its launch, and copies of weights.
        weights, ready = calibration.strategy.copied_bytes(recipe)
        fixed += sum(x[0].nbytes for x in call.inputs) + weights + ready
        finish = (1 if recipe.at_input else WORKING_COPIES) * map_bytes
        return cls(fixed, finish + (0 if prefix is None else 2 * sums), sums, ready)


def make_plan(
    method: Method,
    recipe: Recipe,
    call: Call,
    baselines: list[Inputs],
    calibration: Calibration,
    limits: Limits,
    config: EngineConfig,
    launches: LaunchMemory | None = None,
) -> Plan:
    """Chooses the points per launch; raises BudgetError where one point does not fit. launches:
    what they take, where they were traced.
    """
    budget = read_budget(limits.memory_budget, call.device)
    cost, strategy = calibration.cost, calibration.strategy
    needed = _Bytes.of(call, recipe, baselines, calibration, config)
    each = _point(calibration, config)
    exact = 0 if calibration.exact is None else point_bytes(calibration.exact, config)
    # The maps of the points that are taken in two precisions.
    measured = math.prod(measured_points(recipe, call.batch, config)) if exact else 0
    fixed = needed.fixed + 3 * (needed.sums // call.batch) * measured

    def bytes_of(rows: int) -> int:
        traced = None if launches is None else launches.bytes_of(rows)
        return each * rows if traced is None else traced

    # Where weights are larger than what the caches hold, each launch waits for all of them.
    largest = max(config.cpu_scores, needed.scores_weights)
    largest = config.cpu_tensor if recipe.gradients else min(largest, config.cpu_tensor)
    pays = max(1, largest // max(cost.largest, 1)) if call.device.type == "cpu" else None
    room = budget, fixed, needed.finish
    bounds = _bounds(config, bytes_of, recorded=calibration.recorded)
    most = points_per_launch(limits.points_per_launch, bytes_of, pays, room, bounds)
    size = min(most, points := recipe.count * call.batch)
    launch, fits = bytes_of(size), fixed + max(exact, needed.finish) <= budget
    few = min(measured, size, max(1, launch // exact)) if exact and fits else 0
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
        finish_bytes=needed.finish,
        budget=budget,
        lean=str(strategy),
        saved_before=calibration.eager.saved,
        saved_after=cost.saved,
        left=_left(cost) if strategy.program else (),
        prefix="" if strategy.prefix is None else _prefix(strategy.prefix, recipe),
        precision=strategy.precision.name,
        looked_at=few,
        most=most,
        notes=_notes(recipe, size, limits, calibration),
        strategies=calibration.refusals,
    )


def _bounds(
    config: EngineConfig, bytes_of: Callable[[int], int], *, recorded: bool
) -> EngineConfig:
    """With more bytes where so few would hold few points. Autograd keeps more of a point: more than
    two would take much memory for little time.
    """
    pair, several = bytes_of(2), min(bytes_of(config.cpu_rows), config.cpu_most) if recorded else 0
    two = pair if pair <= (config.cpu_pair if recorded else config.cpu_most) else 0
    return replace(config, cpu_launch=max(config.cpu_launch, several, two))


def _point(calibration: Calibration, config: EngineConfig) -> int:
    """Bytes of a point; of one in tiles, what operators take for themselves is a tile's."""
    tiled, cost = calibration.strategy.tiled, calibration.cost
    if tiled is None:
        return point_bytes(cost, config)
    return int(config.margin * cost.peak) + tile_bytes(tiled.stem, tiled.tile)


def point_bytes(cost: Cost, config: EngineConfig) -> int:
    """What a point takes at most, as the bytes of its tensors tell."""
    return max(int(config.margin * cost.peak), cost.peak + cost.largest)


def points_per_launch(
    wanted: int | None,
    bytes_of: Callable[[int], int],
    pays: int | None,
    room: tuple[int, int, int],
    config: EngineConfig,
) -> int:
    """The most points that fit the budget and that pay.

    Args:
        wanted: The user's bound.
        bytes_of: What a launch of so many points takes; never less for more of them.
        pays: Points from which a launch on a CPU gets no cheaper per point; None on GPUs.
        room: Bytes of the budget, fixed, and of the result when the launches are over.
        config: Thresholds.
    """
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int)):
        raise InputTypeError(f"points_per_launch must be a whole number: got {wanted!r}")
    if wanted is not None and wanted < 1:
        raise InputError(f"points_per_launch must be at least 1: got {wanted}")
    budget, fixed, finish = room
    one = max(bytes_of(1), 1)
    if fixed + max(one, finish) > budget:
        raise BudgetError(
            f"memory_budget is smaller than one point: got {bytes_text(budget)}, expected at least "
            f"{bytes_text(fixed + max(one, finish))} ({bytes_text(fixed)} for baselines and "
            f"accumulators, {bytes_text(one)} for a point, {bytes_text(finish)} for the result); "
            "explain fewer examples at once or raise the budget"
        )
    left = budget - fixed
    if wanted is None and pays is not None:
        wanted, left = pays, min(left, max(one, config.cpu_launch))
    elif wanted is None:
        wanted = max(1, config.gpu_launch // one)
    return bisect_right(range(1, wanted + 1), left, key=bytes_of)


def _prefix(prefix: Prefix, recipe: Recipe) -> str:
    """What is applied once instead of for every point."""
    passes = "forward and back" if recipe.measured.family.straight else "back"
    return f"{', '.join(dict.fromkeys(prefix.calls))}: {passes} once in all"


def _left(cost: Cost) -> tuple[tuple[str, int], ...]:
    """Calls that autograd keeps something for, the largest first."""
    mine = {call.__name__ for call in LEAN} | {rectified.__name__}
    left = [(name, size) for name, size in cost.kept.items() if name not in mine]
    return tuple(sorted(left, key=lambda one: -one[1]))


def _notes(recipe: Recipe, size: int, limits: Limits, calibration: Calibration) -> tuple[str, ...]:
    notes = [] if calibration.reason is None else [f"lean: {calibration.reason}"]
    if calibration.eager.random:
        notes.append(DRAWS)
    if isinstance(recipe, WeightedSum) and recipe.refinement is not None:
        first = recipe.levels[0].count
        notes.append(f"{first} points lie evenly, then more where the gradient changes")
    if isinstance(recipe, WeightedSum) and recipe.tolerance is not None:
        notes.append(f"stops early where the estimated error is within {recipe.tolerance:g}")
    if limits.points_per_launch is not None and size < limits.points_per_launch:
        notes.append(f"points_per_launch={limits.points_per_launch} was lowered to {size}")
    return tuple(notes)
