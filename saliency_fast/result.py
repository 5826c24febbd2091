"""From a job's outcome to an attribution with its provenance."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import nn

from saliency_fast.attribution import REGION_MASK, TOLD, Attribution, Provenance
from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call
from saliency_fast.engine.loop import Job
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.engine.plan import DRAWS, Plan
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import warn
from saliency_fast.specs import describe_baseline, describe_features, describe_target
from saliency_fast.version import __version__


def attribution(job: Job, outcome: Outcome, baseline: Baseline, **facts: Any) -> Attribution:
    """The attribution of a job. facts: what else its provenance says."""
    call, plan, part = job.call, job.plan, job.part

    def of(found: Any) -> Any:
        """Without the axis of several targets, where there is but one."""
        return found[:, 0] if found is not None and not call.targets.many else found

    target, kept = describe_target(call.targets)
    baseline_spec, baseline_kept = describe_baseline(baseline)
    layouts = call.layouts.released()
    if isinstance(job.model, nn.Module):
        # Found once for all calls with inputs of one shape; functions are asked when it matters.
        layouts.letters  # noqa: B018
    provenance = Provenance(
        method=job.method.name,
        parameters=_parameters(job.method),
        target=target,
        baseline=baseline_spec,
        precision=plan.precision,
        dtype=plan.dtype,
        device=plan.device,
        backend=plan.backend,
        versions=dict(_VERSIONS),
        points_per_launch=plan.points_per_launch,
        halvings=plan.halvings,
        way=str(job.strategy),
        region=None if part is None else [list(span) for span in part.box],
        layout=list(layouts.settled) if any(layouts.settled) else None,
        notes=_notes(outcome, plan),
        **facts,
    )
    mask = {} if part is None or part.mask is None else {REGION_MASK: part.mask}
    whole = outcome.values if part is None else tuple(map(part.kept, outcome.values))
    values = tuple(map(of, whole))
    return Attribution(
        values=values if call.is_tuple or len(values) > 1 else values[0],
        scores=of(outcome.scores),
        baseline_scores=of(outcome.baseline_scores),
        # Of a part, the values do not add up to the score.
        delta=of(outcome.delta) if part is None else None,
        error=of(outcome.error),
        precision_error=of(outcome.precision_error),
        classes=of(outcome.classes),
        points=outcome.points,
        converged=outcome.converged,
        provenance=provenance,
        kept=kept | baseline_kept | mask | describe_features(call.features),
        extras={name: of(one) for name, one in outcome.extras.items()},
        layouts=layouts,
        tie_share=None if outcome.ties is None else outcome.ties.share,
    )


def _notes(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    notes: dict[str, Any] = {"draws": DRAWS} if DRAWS in plan.notes else {}
    if outcome.precision_error is not None:
        notes["underflow"] = outcome.underflow
    rounded = 0.0 if outcome.ties is None else outcome.ties.rounded
    if rounded >= TOLD:
        warn(
            f"up to {rounded:.0%} of a map hangs on ties within rounding: the "
            "model takes maxima of values that are equal but for the last digits, and the gradient "
            "goes to one place of several. Other versions of PyTorch, processors and batch sizes "
            "give another map; see Attribution.tie_share"
        )
    return notes | ({"rounded_ties": rounded} if rounded else {})


def _parameters(method: Method) -> dict[str, Any]:
    fields = getattr(method, "__dataclass_fields__", {})
    return {name: _parameter(getattr(method, name)) for name in fields}


def _parameter(value: Any) -> Any:
    """A method within a method by its name and fields; `make_method` makes it again."""
    if isinstance(value, type) or not callable(getattr(value, "recipe", None)):
        return value
    return {"method": value.name, "parameters": _parameters(value)}


_VERSIONS = {
    "saliency_fast": __version__,
    "torch": str(torch.__version__),
    "python": platform.python_version(),
}
MEASURED = 64 * 1024
"""Bytes of an input from which memory is measured: below, to ask the system takes too long."""


def resident_before(call: Call) -> tuple[int, int] | None:
    """Resident bytes before a call and their high-water mark, where they are to be measured."""
    worth = call.device.type == "cpu" and sum(x[0].nbytes for x in call.inputs) >= MEASURED
    return resident_bytes() if worth else None


def usage_of(plan: Plan, resident: tuple[int, int] | None, seconds: float) -> dict[str, Any]:
    """Wall time and peak memory; the plan's where the high-water mark did not rise."""
    peak = resident_bytes()[1] if resident is not None else 0
    measured = resident is not None and peak > resident[1]
    return {
        "seconds": seconds,
        "peak_bytes": peak - resident[0] if resident and measured else plan.peak_bytes,
        "peak_measured": measured,
    }
