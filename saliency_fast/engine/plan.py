"""Plan: how a call will run, as a value that prints before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.engine.memory import bytes_text
from saliency_fast.errors import BudgetError, InputError, InputTypeError

# Where a launch no longer gets cheaper per point. On CPUs when its largest tensor falls out of the
# caches; on GPUs far above what keeps the device busy.
CPU_TENSOR = 20 * 1024**2
GPU_LAUNCH = 8 * 1024**3
# Operators' own scratch space and the allocator's slack, on top of the tensors that are counted.
MARGIN = 1.25


@dataclass(frozen=True)
class Plan:
    """Points per launch and what they cost; nothing is run by looking at it.

    bytes_per_point is what each point of a launch adds, from one that was probed; fixed_bytes is
    what baselines and accumulators take, finish_bytes what the result takes when the launches are
    over. `points` is the most that the recipe may visit over all examples; a tolerance may stop
    it earlier. lean says how points go through the model; of the bytes that autograd keeps of a
    point from forward to backward, saved_before are what the model as it is would take, saved_after
    what this plan takes, and `left` the calls that no lean version serves.
    prefix names the calls at the model's beginning that are taken once for all points.
    """

    method: str
    device: str
    dtype: str
    backend: str
    examples: int
    maps: int
    points: int
    points_per_launch: int
    bytes_per_point: int
    fixed_bytes: int
    finish_bytes: int
    budget: int
    lean: str = "off"
    saved_before: int = 0
    saved_after: int = 0
    left: tuple[tuple[str, int], ...] = ()
    prefix: str = ""
    notes: tuple[str, ...] = ()

    @property
    def launches(self) -> int:
        return -(-self.points // self.points_per_launch)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak over what was in use before the call."""
        launch = self.bytes_per_point * self.points_per_launch
        return self.fixed_bytes + max(launch, self.finish_bytes)

    def __str__(self) -> str:
        lines = [
            f"plan       {self.method} on {self.device}, {self.dtype}, {self.backend} kernels",
            f"work       {self.examples} examples x {self.maps} maps: up to {self.points} points "
            f"in {self.launches} launches of {self.points_per_launch}",
            f"memory     {bytes_text(self.peak_bytes)} of {bytes_text(self.budget)}: "
            f"{bytes_text(self.bytes_per_point)} a point, {bytes_text(self.fixed_bytes)} fixed",
        ]
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
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def points_per_launch(
    wanted: int | None,
    points: int,
    bytes_per_point: int,
    largest_tensor: int,
    fixed: int,
    finish: int,
    budget: int,
    device: str,
) -> int:
    """The most points that fit the budget, that pay, and that there are."""
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int)):
        raise InputTypeError(f"points_per_launch must be a whole number: got {wanted!r}")
    if wanted is not None and wanted < 1:
        raise InputError(f"points_per_launch must be at least 1: got {wanted}")
    fitting = (budget - fixed) // max(bytes_per_point, 1)
    if fitting < 1 or fixed + finish > budget:
        least = fixed + max(bytes_per_point, finish)
        raise BudgetError(
            f"memory_budget is smaller than one point: got {bytes_text(budget)}, expected at least "
            f"{bytes_text(least)} ({bytes_text(fixed)} for baselines and accumulators, "
            f"{bytes_text(bytes_per_point)} for a point, {bytes_text(finish)} for the result); "
            "explain fewer examples at once or raise the budget"
        )
    if wanted is None:
        on_cpu = CPU_TENSOR // max(largest_tensor, 1)
        wanted = max(1, on_cpu if device == "cpu" else GPU_LAUNCH // max(bytes_per_point, 1))
    return min(fitting, points, wanted)
