"""Gradients at the inputs in one launch, by what an earlier call of the same kind has prepared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.attribution import Attribution, origin_of, resident_before, usage_of
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.bind import Call, Model, is_finite
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.evaluation import REDUCED, GradientEvaluation
from saliency_fast.engine.job import Job
from saliency_fast.engine.launch import EvaluationRequest, execute
from saliency_fast.engine.loop import evaluation_of
from saliency_fast.engine.memory import read_budget
from saliency_fast.engine.planner import eager_serves
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.graph.program import is_channels_last
from saliency_fast.model.layout import Layouts
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import Target, Targets
from saliency_fast.model.ties import may_tie


@dataclass(frozen=True)
class Repeat:
    """What is the same in all calls of a kind; it holds neither the model nor a call's tensors."""

    job: Job
    recipe: WeightedSum
    key: tuple[str, int]
    layouts: Layouts
    origin: partial[Any]

    @classmethod
    def of(cls, job: Job, layouts: Layouts | None) -> Repeat | None:
        """From a call that is over; None where calls of its kind may differ beyond numbers."""
        call, known, program = job.call, job.calibration, job.strategy.program
        one = len(call.inputs) == 1 and not (call.is_tuple or call.args or call.kwargs)
        plain = not (call.unused or call.layers or job.part or job.launches or job.first)
        told = known.measured and not known.cost.drew
        reads = program is not None and bool(program.reads)
        # Of many examples, and in float64, some are examined for ties in every call.
        many = call.batch >= job.config.ties_least_points and known.maxima != [False]
        usual = call.dtypes == (torch.float32,) and call.device.type == "cpu"
        if not (one and plain and told and usual) or reads or many or layouts is None:
            return None
        if evaluation_of(job) is not GradientEvaluation or job.strategy.rules is not None:
            return None
        assert isinstance(job.recipe, WeightedSum)
        nothing: Any = None
        bare = Call((), call.dtypes, False, Targets(call.batch), (), {})
        kept = replace(job, model=nothing, replan=nothing, with_cost=None, baselines=[], call=bare)
        return cls(kept, job.recipe, job.key, layouts, origin_of(job, {}))

    def holds(self, model: Model, call: Call, cache: CalibrationCache) -> bool:
        """Whether all that it rests on is as it was; see `Planner.earlier`."""
        job, rows = self.job, self.job.independence
        if rows.apart is not None or not any(one is job.calibration for one in cache.values()):
            return False
        if rows.suspect is not None and not (rows.unrecorded and call.batch == 1):
            return False
        if 2 * job.plan.peak_bytes > read_budget(None, call.device):
            return False
        if not job.calibration.recorded:
            earlier = cache.points.get(job.kind, 0)
            if not eager_serves(job.calibration, call.batch, earlier, job.config):
                return False
            cache.points[job.kind] = earlier + call.batch
        return job.calibration.holds(model, call)

    def run(
        self,
        model: Model,
        x: Tensor,
        target: Target,
        cache: CalibrationCache,
        hashes: Callable[[Call], dict[str, Any]],
    ) -> Attribution | None:
        """The result of a call; None where planning it as usual tells what is wrong."""
        started, job, batch = time.perf_counter(), self.job, len(x)
        classes = _classes_of(target, batch)
        maxima = job.calibration.maxima
        if classes is None or not is_finite(x) or (not maxima and may_tie((x.detach(),))):
            return None
        inputs, targets = (x.detach().contiguous(),), Targets(batch, classes=classes)
        call = Call(
            *(inputs, job.call.dtypes, False, targets, (), {}), channels_last=(is_channels_last(x),)
        )
        resident = resident_before(call)
        everyone = torch.arange(batch, device="cpu")

        def write(own: slice) -> tuple[tuple[Tensor], Tensor]:
            return (inputs[0][own].clone(),), everyone[own]

        with preserve_model_state(model, call.device) as training:
            if not self.holds(model, call, cache):
                return None
            # A copy: copies of weights are a call's own.
            strategy = job.strategy if job.strategy.program is None else replace(job.strategy)
            function = strategy.gradient_function(model, call, job.recipe)
            job.independence.renew(job.independence.suspect, draws=False, by_function=False)
            request = EvaluationRequest(function, batch, write, independence=job.independence)
            result = execute(request, batch, Arena(call.device, about=0))
            if isinstance(result, Exception):
                return None
            maps = REDUCED[self.recipe.reduction](result.gradients[0][0].to(x.dtype))
            factor = inputs[0] if self.recipe.factor == "input" else None
            values, sums = ops.finish(maps, factor, None, "none")
            scores, numbers = result.scores.double()[:, 0], sums.tolist()
            # Of maps that are zero a warning says why, and an error of those that are not finite.
            if not all(numbers) or not all(map(math.isfinite, numbers + scores.tolist())):
                return None
            seconds = time.perf_counter() - started
            usage = usage_of(job.plan, resident, seconds)
            job.calibration.seconds[self.key] = seconds / batch
        facts = usage | hashes(call) | {"trained_mode": training}
        return self._attribution(values, scores, classes[:, 0], facts)

    def _attribution(
        self, values: Tensor, scores: Tensor, classes: Tensor, facts: dict[str, Any]
    ) -> Attribution:
        letters, batch, tied = self.layouts.cached_letters, len(scores), None
        layout = list(letters) if any(letters) else None
        error = torch.zeros(batch, dtype=torch.float64, device="cpu")
        if True not in self.job.calibration.maxima:
            tied = torch.zeros_like(error)
        about = facts | {"target": {"kind": "classes"}, "baseline": None, "layout": layout}
        return Attribution(
            values=values,
            scores=scores,
            baseline_scores=None,
            delta=None,
            error=error,
            classes=classes,
            points=torch.ones(batch, dtype=torch.int64, device="cpu"),
            converged=None,
            provenance=partial(self.origin, **about),
            layouts=self.layouts,
            tie_share=tied,
        )


def _classes_of(target: Target, batch: int) -> Tensor | None:
    """The classes [B, 1] that a target names, one for each example; None of other targets."""
    if type(target) is int:
        classes = torch.full((batch, 1), target, dtype=torch.int64, device="cpu")
        return classes if target >= 0 else None
    if type(target) is not Tensor or target.shape != (batch,) or target.dtype != torch.int64:
        return None
    if target.device.type != "cpu" or min(target.tolist()) < 0:
        return None
    return target.to(torch.int64, copy=True).view(batch, 1)
