"""The public face: `explain` for one call, `Engine` for many."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from saliency_fast import record
from saliency_fast.attribution import REGION_MASK, Attribution, Provenance
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call, bind
from saliency_fast.engine.job import Job, Known, prepare
from saliency_fast.engine.launch import Moment
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.engine.outcome import Outcome, need_finite
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.prepare import Limits
from saliency_fast.engine.recipe import Method
from saliency_fast.engine.region import Part, Region
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods import read_method
from saliency_fast.model.guard import untouched
from saliency_fast.model.precision import AUTO, PRECISIONS
from saliency_fast.model.routes import Inputs
from saliency_fast.model.targets import Target
from saliency_fast.specs import describe_baseline, describe_target
from saliency_fast.version import __version__


class Engine:
    """A model and a method, ready to explain many inputs from many threads.

    model: any callable from input tensors to an output. method: a name or a method. precision: of
    the model's convolutions and matrix products: "float32" (float64 inputs stay float64),
    "bfloat16" and, on GPUs, "tf32" or "float16"; what it costs a map is measured on some of its
    points and part of `Attribution.error`. "auto" is the fastest that costs no more than
    `tolerance`, relative L2: .01, or half of the method's own tolerance, unless given.
    memory_budget: bytes or text
    such as "8GiB" over what is in use, 80 % of what is free unless given. points_per_launch: an
    upper bound, for those who know better than the plan. lean: whether points keep only what their
    gradients need from forward to backward, with the same maps to rounding. progress: shows a
    bar. hashes: whether results carry SHA-256 of inputs and weights, which reads both once.

    The model is explained in evaluation mode and left as it was, whatever happens.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        method: Method | str = "integrated_gradients",
        *,
        precision: str = "float32",
        tolerance: float | None = None,
        memory_budget: int | str | None = None,
        points_per_launch: int | None = None,
        lean: bool = True,
        progress: bool = False,
        hashes: bool = True,
    ) -> None:
        if not callable(model):
            raise InputTypeError(f"model must be callable: got {type(model).__name__}")
        if precision not in (*PRECISIONS, AUTO):
            names = ", ".join((*PRECISIONS, AUTO))
            raise InputError(f"precision must be one of {names}: got {precision!r}")
        if tolerance is not None and not 0.0 < tolerance < math.inf:
            raise InputError(f"tolerance must be a positive number: got {tolerance!r}")
        self.model, self.method = model, read_method(method)
        self.precision, self.tolerance, self.lean = precision, tolerance, lean
        self.progress, self.hashes = progress, hashes
        self.limits = Limits(memory_budget, points_per_launch)
        self._recipe = self.method.recipe()
        self._probed = _probes_of(model)

    def plan(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
    ) -> Plan:
        """How a call would run, with the memory and the time that it would take.

        Takes a few points' gradients to learn that, once for all calls with inputs of one shape.
        """
        call = bind(inputs, target, forward_args, forward_kwargs)
        with untouched(self.model, call.device):
            job = self._prepare(call, baseline, region)
            job.time()
            return job.plan

    def __call__(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
    ) -> Attribution:
        """Explains `inputs`; see `explain` for the arguments."""
        started, resident = time.perf_counter(), resident_bytes()
        call = bind(inputs, target, forward_args, forward_kwargs)
        with untouched(self.model, call.device) as training:
            job = self._prepare(call, baseline, region)
            for moment in self._shown(job):
                last = moment
            outcome = last.outcome()
            need_finite(outcome)
            usage = _usage(job.plan, resident, time.perf_counter() - started)
            facts = usage | self._hashes(call)
            return self._attribution(job, outcome, baseline, training, facts)

    def stream(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
    ) -> Iterator[Attribution]:
        """Yields the map after every launch, each with its estimated error; the last is the answer.

        Points are visited so that any beginning of them is spread over the path or the noise.
        """
        started, resident = time.perf_counter(), resident_bytes()
        call = bind(inputs, target, forward_args, forward_kwargs)
        with untouched(self.model, call.device):
            job = self._prepare(call, baseline, region)
            hashes = self._hashes(call)
        moments = job.moments()
        while True:
            # The guard is entered anew for each launch: nothing is held while the caller works.
            with untouched(self.model, call.device) as training:
                moment = next(moments, None)
                if moment is None:
                    return
                outcome = moment.outcome()
                if moment.done == moment.of:
                    need_finite(outcome)
                usage = _usage(job.plan, resident, time.perf_counter() - started)
                facts = usage | hashes
                partial = self._attribution(job, outcome, baseline, training, facts)
            yield partial

    def _prepare(self, call: Call, baseline: Baseline, region: Region) -> Job:
        recipe, limits, known = self._recipe, self.limits, self._probed
        return prepare(
            *(self.model, self.method, recipe, call, baseline, region, limits, known),
            lean=self.lean,
            precision=self.precision,
            tolerance=self.tolerance,
        )

    def _hashes(self, call: Call) -> dict[str, Any]:
        wanted = self.hashes
        return {
            "input_sha256": [record.tensor_sha256(x) for x in call.inputs] if wanted else None,
            "weights_sha256": record.weights_sha256(self.model) if wanted else None,
        }

    def _shown(self, job: Job) -> Iterator[Moment]:
        """The moments, with a bar beside them where one is wanted."""
        if not self.progress:
            yield from job.moments()
            return
        total = job.plan.points * len(job.baselines)
        with tqdm(total=total, desc=self.method.name, unit="point") as bar:
            for moment in job.moments():
                bar.update(moment.done - bar.n)
                yield moment

    def _attribution(
        self, job: Job, outcome: Outcome, baseline: Baseline, training: bool, facts: dict[str, Any]
    ) -> Attribution:
        call, squeeze, lost = job.call, not job.call.targets.many, outcome.precision_error
        target, kept = describe_target(call.targets)
        baseline_spec, baseline_kept = describe_baseline(baseline)
        provenance = Provenance(
            method=self.method.name,
            parameters=_parameters(self.method),
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
            lean=self.lean,
            way=str(job.way),
            region=None if job.part is None else [list(span) for span in job.part.box],
            notes={} if lost is None else {"underflow": outcome.underflow},
            **facts,
        )
        whole = outcome.values if job.part is None else tuple(map(job.part.kept, outcome.values))
        values = tuple(one[:, 0] if squeeze else one for one in whole)
        return Attribution(
            values=values if call.is_tuple else values[0],
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
            kept=kept | baseline_kept | _mask(job.part),
        )


_PROBED: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def _probes_of(model: Callable[..., Any]) -> Known:
    """What points of a model took, by their shapes; engines of one module share it."""
    return _PROBED.setdefault(model, {}) if isinstance(model, nn.Module) else {}


def explain(
    model: Callable[..., Any],
    inputs: Tensor | Inputs,
    *,
    target: Target = None,
    method: Method | str = "integrated_gradients",
    baseline: Baseline = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    precision: str = "float32",
    tolerance: float | None = None,
    memory_budget: int | str | None = None,
    points_per_launch: int | None = None,
    lean: bool = True,
    region: Region = None,
    progress: bool = False,
) -> Attribution:
    """Explains what `model` says of `inputs`.

    inputs: a tensor [B, *] of float32 or float64, or a tuple of them for a model of several inputs.
    target: None (the model gives one number per example), a class, one class per example,
    [B, K] classes (K maps per example from shared forward passes), a tuple index into the output
    behind its batch axis, summed over what it leaves, with a mask as its last element if wanted,
    one tuple of ints per example in a list, "predicted", or a function `outputs -> [B]`.
    baseline: None (zeros), a number, a tensor that broadcasts, "blur", "mean", "uniform", a tuple
    (one per input), or a list of these: Integrated Gradients averages over it, expected gradients
    draw from it. forward_args, forward_kwargs: further arguments of the model; tensors with the
    batch's length belong to the examples. region: the part of an input [B, C, *spatial] that is
    asked about, as a bool mask [*spatial] or one slice per spatial axis; values are zero elsewhere,
    and what they do not need is not computed. Other arguments: see `Engine`.

    Raises InputError, InputTypeError, ModelError or BudgetError with what was got, what is
    expected and the cure.
    """
    engine = Engine(
        model,
        method,
        precision=precision,
        tolerance=tolerance,
        memory_budget=memory_budget,
        points_per_launch=points_per_launch,
        lean=lean,
        progress=progress,
    )
    return engine(
        inputs,
        target,
        baseline,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
        region=region,
    )


def _mask(part: Part | None) -> dict[str, Tensor]:
    """What a record keeps of a region beside its box."""
    return {} if part is None or part.mask is None else {REGION_MASK: part.mask}


def _column(found: Any, squeeze: bool) -> Any:
    return found[:, 0] if squeeze and found is not None else found


def _parameters(method: Method) -> dict[str, Any]:
    return {name: getattr(method, name) for name in getattr(method, "__dataclass_fields__", {})}


def _versions() -> dict[str, str]:
    return {
        "saliency_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _usage(plan: Plan, resident: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Wall time and peak memory; the plan's where the high-water mark did not rise."""
    peak = resident_bytes()[1]
    measured = plan.device == "cpu" and peak > resident[1]
    return {
        "seconds": seconds,
        "peak_bytes": peak - resident[0] if measured else plan.peak_bytes,
        "peak_measured": measured,
    }
