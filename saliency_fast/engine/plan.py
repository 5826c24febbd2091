"""Plan: how a call will run, as a value that prints before anything runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from saliency_fast.engine.memory import bytes_text
from saliency_fast.errors import BudgetError, InputError, InputTypeError

# Where a launch no longer gets cheaper per point. On CPUs when its largest tensor, or all of them,
# are far out of the caches; on GPUs far above what keeps the device busy.
CPU_TENSOR = 40 * 1024**2
# Without gradients a tensor is read once, right after it was written: launches stay in the caches.
CPU_SCORES = 8 * 1024**2
CPU_LAUNCH = 256 * 1024**2
GPU_LAUNCH = 8 * 1024**3
# Operators' own scratch space and the allocator's slack, on top of the tensors that are counted.
MARGIN = 1.25
DRAWS = (
    "the model draws random numbers: the map is of the draws that follow the caller's random "
    "state, and the same in every call from there"
)
"""A note of plans."""


@dataclass(frozen=True)
class Plan:
    """Points per launch and what they cost; nothing is run by looking at it.

    launch_bytes is what a launch takes: as traced where launches were, else by the tensors of one
    point. fixed_bytes is what baselines and accumulators take, finish_bytes what the result takes
    when the launches are over. seconds_per_point is what a point took in the last such call or,
    before one, on trial; None where none has run. `points` is the most that the recipe may visit
    over all examples; a tolerance may stop it earlier. lean says how points go through the model;
    of the bytes that autograd keeps of a point from forward to backward, saved_before are what the
    model as it is would take, saved_after what this plan takes, and `left` the calls that no lean
    version serves.
    prefix names the calls at the model's beginning that are taken once for all points. precision:
    of the model's products; `looked_at` points at a time are taken in float32 too.
    most: points that a launch may have where other calls fill it. graphs: whether launches are
    recorded and replayed, on devices that can. layout: of the inputs, and who says so.
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
    seconds_per_point: float | None = field(default=None, compare=False)

    @property
    def launches(self) -> int:
        return -(-self.points // self.points_per_launch)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak over what was in use before the call."""
        return self.fixed_bytes + max(self.launch_bytes, self.finish_bytes)

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
        if self.seconds is not None and self.seconds_per_point is not None:
            lines.append(f"time       {self.seconds:.3g} s: {self.seconds_per_point:.3g} s a point")
        if self.saved_before:
            lines.append(
                f"lean       {self.lean}: keeps {bytes_text(self.saved_after)} of a point from "
                f"forward to backward, as it is {bytes_text(self.saved_before)}"
            )
        if self.left:
            calls = ", ".join(f"{name} {bytes_text(size)}" for name, size in self.left[:6])
            lines.append(f"autograd's {calls}")
        if self.prefix:
            lines.append(f"prefix     {self.prefix}")
        if self.layout:
            lines.append(f"layout     {self.layout}")
        if self.graphs:
            lines.append(f"graphs     {self.graphs}")
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def point_bytes(peak: int, largest: int) -> int:
    """What a point takes at most, as the bytes of its tensors tell: those that live at once, and of
    the largest.
    """
    return max(int(MARGIN * peak), peak + largest)


def points_per_launch(
    wanted: int | None,
    bytes_of: Callable[[int], int],
    largest_tensor: int,
    fixed: int,
    finish: int,
    budget: int,
    device: str,
    *,
    gradients: bool = True,
    weights: int = 0,
) -> int:
    """The most points that fit the budget and that pay.

    bytes_of: what a launch of so many points takes; never less for more of them. gradients: or
    scores alone, for which a launch reads so many bytes of `weights`.
    """
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int)):
        raise InputTypeError(f"points_per_launch must be a whole number: got {wanted!r}")
    if wanted is not None and wanted < 1:
        raise InputError(f"points_per_launch must be at least 1: got {wanted}")
    one = max(bytes_of(1), 1)
    if fixed + max(one, finish) > budget:
        raise BudgetError(
            f"memory_budget is smaller than one point: got {bytes_text(budget)}, expected at least "
            f"{bytes_text(fixed + max(one, finish))} ({bytes_text(fixed)} for baselines and "
            f"accumulators, {bytes_text(one)} for a point, {bytes_text(finish)} for the result); "
            "explain fewer examples at once or raise the budget"
        )
    room = budget - fixed
    if wanted is None and device == "cpu":
        # Where weights are larger than what the caches hold, each launch waits for all of them.
        largest = CPU_TENSOR if gradients else min(max(CPU_SCORES, weights), CPU_TENSOR)
        wanted = max(1, largest // max(largest_tensor, 1))
        room = min(room, max(one, CPU_LAUNCH))
    elif wanted is None:
        wanted = max(1, GPU_LAUNCH // one)
    return bisect_right(range(1, wanted + 1), room, key=bytes_of)
