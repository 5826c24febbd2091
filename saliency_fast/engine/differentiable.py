"""Differentiable maps: sums of gradients on autograd's graph, for losses that depend on a map.

The points, the model and the sum are plain PyTorch operations under autograd's own double backward.
No lean version, recorded program, affine prefix or kernel is involved, and memory is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome, average
from saliency_fast.engine.arena import Arena
from saliency_fast.engine.evaluation import SumEvaluation
from saliency_fast.engine.independence import Independence, Row, RowsMeetError
from saliency_fast.engine.job import Job
from saliency_fast.engine.loop import drive
from saliency_fast.engine.points import Line, Noise, RandomLine
from saliency_fast.engine.recipe import Itself, Method, Recipe, Rows, WeightedSum
from saliency_fast.engine.strategies import Strategy
from saliency_fast.errors import InputError, ModelError
from saliency_fast.model.function import NO_GRADIENT
from saliency_fast.model.preserve import keep_graphs, uncompiled
from saliency_fast.ops.points import random_line
from saliency_fast.ops.registry import rows_of

METHODS = (
    "gradient, input_x_gradient, integrated_gradients, smoothgrad, smoothgrad_squared, vargrad, "
    "expected_gradients and gradient_shap"
)


def check_differentiable(method: Method, recipe: Recipe, *, at: object, precision: str) -> None:
    """Raises InputError where a map cannot be put on autograd's graph."""
    families = (Itself, Line, Noise, RandomLine)
    plain = isinstance(recipe, WeightedSum) and isinstance(recipe.family, families)
    if not plain or recipe.rules is not None:
        raise InputError(
            f"create_graph=True is for {METHODS}, with their plain fields: got {method.name}"
        )
    if isinstance(recipe, WeightedSum) and recipe.tolerance is not None:
        raise InputError(
            "create_graph=True takes a fixed number of steps: got a tolerance; use steps="
        )
    if isinstance(recipe, WeightedSum) and recipe.refinement is not None:
        raise InputError(
            "create_graph=True takes points that do not follow from gradients: got "
            "rule='adaptive'; use another rule, such as 'midpoint'"
        )
    if at is not None:
        raise InputError(
            "create_graph=True is for maps of the inputs: got at=; pass what the layer gives as "
            "the input of a function of the rest of the model"
        )
    if precision != "float32":
        raise InputError(
            f"create_graph=True runs the model as it is: got precision={precision!r}; convert the "
            "model and the input instead"
        )


def differentiable(job: Job, inputs: Inputs) -> Outcome:
    """The outcome of a job, whose values are on autograd's graph.

    Args:
        job: Of a method that `check_differentiable` lets pass.
        inputs: As the user gave them. Values depend on those that require gradients.

    Returns:
        The outcome. Scores and errors are plain numbers.
    """
    x = tuple(
        given.to(own.dtype) if given.requires_grad else own
        for given, own in zip(inputs, job.call.inputs, strict=True)
    )
    keep_graphs()
    # Nothing is proved or measured for other calls.
    rows = Independence(draws=job.independence.draws)
    job = replace(job, model=_own_buffers(job.model), strategy=Strategy(), launches=None)
    job = replace(job, independence=rows)
    with _twice():
        outcomes = [_outcome(job, baselines, x) for baselines in job.baselines]
    plain = [replace(one, values=tuple(v.detach() for v in one.values)) for one in outcomes]
    parts = zip(*(one.values for one in outcomes), strict=True)
    values = tuple(torch.stack(several).mean(0) for several in parts)
    return replace(average(plain), values=values)


def _outcome(job: Job, baselines: Inputs, x: Inputs) -> Outcome:
    """One baseline's outcome, in launches of one point each where rows meet in the model."""
    try:
        return _Graph(job, job.call, baselines, x).graph_outcome()
    except RowsMeetError:
        job = replace(job, plan=replace(job.plan, points_per_launch=1))
        return _Graph(job, job.call, baselines, x).graph_outcome()


@contextmanager
def _twice() -> Iterator[None]:
    """Inside, operators have second derivatives: neither fused attention nor cuDNN's recurrent
    layers do, nor what torch.compile makes.
    """
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Not `cudnn.flags`, which raises where the user has set `fp32_precision`, and sets it.
        stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False
        yield


def _own_buffers(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with copies of its buffers in each run: what a later one, or a later call in
    training mode, writes to the model's own must not spoil the backward pass still to come.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return model
    if next(model.buffers(), None) is None:
        return model

    def call(*args: Any, **kwargs: Any) -> Any:
        own = model.named_buffers(remove_duplicate=False)
        copies = {name: one.clone() for name, one in own}
        return functional_call(model, copies, args, kwargs, tie_weights=False)

    return call


class _Graph(SumEvaluation):
    """An evaluation whose points, gradients and sum are on autograd's graph."""

    def __init__(self, job: Job, call: Any, baselines: Inputs, x: Inputs) -> None:
        super().__init__(job, call, baselines)
        self.x = x

    def graph_outcome(self) -> Outcome:
        recipe, batch, device = self.recipe, self.call.batch, self.call.device
        for _ in drive(self.score_ends(), Arena(device, about=0)):
            pass
        self.source = recipe.family.bind(self.call.inputs, self.baselines)
        (level,) = recipe.levels
        whole, gap = self._sums(level.to(device).rows(self.everyone, 0, level.count * batch))
        values, errors = self._multiplied(whole), self._multiplied(gap)
        shape = self.scores.shape
        size = _norm(values).clamp_min(torch.finfo(torch.float64).tiny)
        error = torch.zeros_like(size) if recipe.at_input else _norm(errors) / size
        sums = torch.stack([one.detach().double().flatten(2).sum(2) for one in values]).sum(0)
        points = torch.full((batch,), level.count, device=device)
        about = (values, self.scores, self.baseline_scores, sums, error.view(shape), points)
        return Outcome(*about, None, self.classes)

    def _sums(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """The weighted sum of all points, and what its two halves differ by: [B, K, *] each."""
        count = rows.example.numel()
        starts = range(0, count, self.size)
        parts = [self._gradients(rows.part(n, min(n + self.size, count))) for n in starts]
        terms = [torch.cat(one) for one in zip(*parts, strict=True)]
        if self.recipe.reduction == "variance":
            mean = self._added(terms, rows, rows.weight)
            terms = [(one - m[rows.example]).square() for one, m in zip(terms, mean, strict=True)]
        half = [rows.weight * (rows.replicate == number) for number in (0, 1)]
        share = [weight / weight.sum().clamp_min(1e-300) * len(self.x[0]) for weight in half]
        with torch.no_grad():
            zero, one = (self._added(terms, rows, weight) for weight in share)
            gap = [(a - b) / 2 for a, b in zip(zero, one, strict=True)]
        return self._added(terms, rows, rows.weight), gap

    def _added(self, terms: list[Tensor], rows: Rows, weight: Tensor) -> list[Tensor]:
        """For each input the weighted sums over the rows of every example, [B, K, *]."""
        return [
            one.new_zeros(len(self.x[0]), *one.shape[1:]).index_add(
                0, rows.example, rows_of(weight.to(one.dtype), one.dim()) * one
            )
            for one in terms
        ]

    def _gradients(self, rows: Rows) -> list[Tensor]:
        """For each input the gradients of rows, reduced and times their line, [R, K, *]."""
        written = self.source.write(rows)
        points = [self._point(number, one, rows) for number, one in enumerate(written)]
        # Copies: a model may write to its input.
        inside = self.function.as_model_inputs(tuple(one.clone() for one in points))
        scores, classes = self.function.forward(list(inside), rows.example)
        assert self.independence is not None
        for number in self.independence.due(rows.example.numel(), apart=False):
            row = Row.of(tuple(one.detach() for one in points), rows.example, number)
            self.independence.prove(self.function, row)(scores.detach())
        if self.recipe.at_input:
            self.note_scores(rows.example, scores.detach(), classes)
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        found: list[list[Tensor]] = [[] for _ in points]
        for column in scores.unbind(1):
            grads = torch.autograd.grad(column.sum(), points, create_graph=True, allow_unused=True)
            for several, grad, point in zip(found, grads, points, strict=True):
                several.append(torch.zeros_like(point) if grad is None else grad)
        stacked = [torch.stack(several, 1) for several in found]
        recipe = self.recipe
        if recipe.reduction in ("square", "absolute"):
            stacked = [g.square() if recipe.reduction == "square" else g.abs() for g in stacked]
        if recipe.factor == "line":
            stacked = [g * self._line(n, rows)[:, None] for n, g in enumerate(stacked)]
        return stacked

    def _point(self, number: int, written: Tensor, rows: Rows) -> Tensor:
        """A point that requires gradients, and moves with the input where that does."""
        if not self.x[number].requires_grad:
            return written.detach().requires_grad_()
        moved = self._moved(number, rows)
        family = self.recipe.family
        if isinstance(family, RandomLine):
            alpha = random_line(*self.source.lines(number, rows))[2]  # type: ignore[arg-type]
            moved = rows_of(alpha.to(moved.dtype), moved.dim()) * moved
        elif isinstance(family, Line):
            moved = rows_of(rows.node.to(moved.dtype), moved.dim()) * moved
        return written.detach() + moved

    def _moved(self, number: int, rows: Rows) -> Tensor:
        """Zeros [R, *] that depend on the input as the input itself does."""
        x = self.x[number]
        return (x - x.detach())[rows.example]

    def _line(self, number: int, rows: Rows) -> Tensor:
        """From a random baseline to the noisy input, [R, *]."""
        start, end, _ = random_line(*self.source.lines(number, rows))  # type: ignore[arg-type]
        return end - start + self._moved(number, rows)

    def _multiplied(self, maps: list[Tensor]) -> Inputs:
        factor, found = self.recipe.factor, []
        for one, x, baseline in zip(maps, self.x, self.baselines, strict=True):
            if factor == "input":
                one = one * x[:, None]
            elif factor == "difference":
                one = one * (x - baseline)[:, None]
            found.append(one)
        return tuple(found)


def _norm(maps: Inputs) -> Tensor:
    """L2 norm over all inputs, float64 [B, K]."""
    squares = [one.detach().double().flatten(2).square().sum(2) for one in maps]
    return torch.stack(squares).sum(0).sqrt()
