"""Result: from a job's outcome to an attribution with what it rests on."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.attribution import REGION_MASK, TOLD, Attribution, Provenance
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call
from saliency_fast.engine.job import Job
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.engine.outcome import Outcome
from saliency_fast.engine.plan import DRAWS, Plan
from saliency_fast.engine.recipe import Method
from saliency_fast.engine.region import Part
from saliency_fast.engine.ties import Tied
from saliency_fast.errors import warn
from saliency_fast.specs import describe_baseline, describe_features, describe_target
from saliency_fast.version import __version__


def attribution(
    job: Job,
    outcome: Outcome,
    baseline: Baseline,
    *,
    training: bool,
    lean: bool,
    facts: dict[str, Any],
    at: list[str] | None = None,
    layer_input: bool = False,
) -> Attribution:
    """The attribution of a job. training: whether the model was in training mode; facts: what else
    its provenance says; at: names of the layers that it is about.
    """
    call, squeeze, lost = job.call, not job.call.targets.many, outcome.precision_error
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
        precision=job.plan.precision,
        dtype=job.plan.dtype,
        device=job.plan.device,
        backend=job.plan.backend,
        versions=_versions(),
        trained_mode=training,
        points_per_launch=job.plan.points_per_launch,
        halvings=outcome.halvings,
        lean=lean,
        way=str(job.way),
        region=None if job.part is None else [list(span) for span in job.part.box],
        at=at,
        layer_input=layer_input,
        layout=list(layouts.settled) if any(layouts.settled) else None,
        notes=_notes(outcome, job.plan),
        **facts,
    )
    whole = outcome.values if job.part is None else tuple(map(job.part.kept, outcome.values))
    values = tuple(one[:, 0] if squeeze else one for one in whole)
    return Attribution(
        values=values if call.is_tuple or len(values) > 1 else values[0],
        scores=_column(outcome.scores, squeeze),
        baseline_scores=_column(outcome.baseline_scores, squeeze),
        # Of a part, the values do not add up to the score.
        delta=_column(outcome.delta, squeeze) if job.part is None else None,
        error=_column(outcome.error, squeeze),
        precision_error=_column(lost, squeeze),
        classes=_column(outcome.classes, squeeze),
        points=outcome.points,
        converged=outcome.converged,
        provenance=provenance,
        kept=kept | baseline_kept | _mask(job.part) | describe_features(call.features),
        extras={name: _column(one, squeeze) for name, one in outcome.extras.items()},
        layouts=layouts,
        tie_share=_share(outcome.tied),
    )


def _notes(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    notes: dict[str, Any] = {"draws": DRAWS} if DRAWS in plan.notes else {}
    if outcome.precision_error is not None:
        notes["underflow"] = outcome.underflow
    rounded = 0.0 if outcome.tied is None else outcome.tied.rounded
    return notes | ({"rounded_ties": rounded} if rounded else {})


def _share(tied: Tied | None) -> Tensor | None:
    """The share of the gradient that passes ties, where anybody looked."""
    if tied is not None and tied.rounded >= TOLD:
        warn(
            f"up to {tied.rounded:.0%} of a map hangs on ties within rounding: the "
            "model takes maxima of values that are equal but for the last digits, and the gradient "
            "goes to one place of several. Other versions of PyTorch, processors and batch sizes "
            "give another map; see Attribution.tie_share"
        )
    return None if tied is None else tied.share


def _mask(part: Part | None) -> dict[str, Tensor]:
    """What a record keeps of a region beside its box."""
    return {} if part is None or part.mask is None else {REGION_MASK: part.mask}


def _column(found: Any, squeeze: bool) -> Any:
    return found[:, 0] if squeeze and found is not None else found


def _parameters(method: Method) -> dict[str, Any]:
    fields = getattr(method, "__dataclass_fields__", {})
    return {name: _parameter(getattr(method, name)) for name in fields}


def _parameter(value: Any) -> Any:
    """A method within a method by its name and fields; `make_method` makes it again."""
    if isinstance(value, type) or not callable(getattr(value, "recipe", None)):
        return value
    return {"method": value.name, "parameters": _parameters(value)}


def _versions() -> dict[str, str]:
    return {
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
