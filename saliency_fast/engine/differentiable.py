"""Differentiable maps: sums of gradients on autograd's graph, for losses that depend on a map.

The points, the model and the sum are plain PyTorch operations under autograd's own double backward.
No lean version, recorded program, affine prefix or kernel is involved, and memory is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from saliency_fast._types import Inputs
from saliency_fast.engine.independence import Independence, Row, RowsMeetError
from saliency_fast.engine.job import Job
from saliency_fast.engine.outcome import Outcome, average
from saliency_fast.engine.points import Itself, Line, Noise, RandomLine
from saliency_fast.engine.recipe import Method, Recipe, Rows, Source
from saliency_fast.engine.way import function_of
from saliency_fast.errors import InputError, ModelError
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.function import NO_GRADIENT, PointFunction
from saliency_fast.model.preserve import keep_graphs, uncompiled
from saliency_fast.ops.points import random_line
from saliency_fast.ops.registry import rows_of

METHODS = (
    "gradient, input_x_gradient, integrated_gradients, smoothgrad, smoothgrad_squared, vargrad, "
    "expected_gradients and gradient_shap"
)


def check_differentiable(method: Method, recipe: Recipe, *, at: object, precision: str) -> None:
    """Raises InputError where a map cannot be put on autograd's graph."""
    sums = recipe.rounds is None and recipe.rules is None and not recipe.second
    if not sums or not isinstance(recipe.family, (Itself, Line, Noise, RandomLine)):
        raise InputError(
            f"create_graph=True is for {METHODS}, with their plain fields: got {method.name}"
        )
    if recipe.tolerance is not None:
        raise InputError(
            "create_graph=True takes a fixed number of steps: got a tolerance; use steps="
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
    with _twice():
        function = function_of(EagerExecutor(_own_buffers(job.model)), job.call)
        found = [_Graph(job, function, x, baselines).outcome() for baselines in job.baselines]
    plain = [replace(one, values=tuple(v.detach() for v in one.values)) for one in found]
    parts = zip(*(one.values for one in found), strict=True)
    values = tuple(torch.stack(several).mean(0) for several in parts)
    return replace(average(plain), values=values)


@contextmanager
def _twice() -> Iterator[None]:
    """Inside, operators have second derivatives: neither fused attention nor cuDNN's recurrent
    layers do, nor what torch.compile makes.
    """
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
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


Made = TypeVar("Made")


class _Graph:
    """One baseline's run: every point, its gradient, and the sum."""

    def __init__(self, job: Job, function: PointFunction, x: Inputs, baselines: Inputs) -> None:
        self.job, self.function, self.x, self.baselines = job, function, x, baselines
        known, self.size = job.independence, job.plan.points_per_launch
        self.independence = Independence(draws=known is not None and known.draws)

    def _launched(self, count: int, launch: Callable[[slice], Made]) -> list[Made]:
        """What launches of so many points make; of one point each, where rows meet in the model."""
        while True:
            parts = (slice(n, n + self.size) for n in range(0, count, self.size))
            try:
                return [launch(part) for part in parts]
            except RowsMeetError:
                self.size = 1

    def _prove(self, points: Inputs, item: Tensor, scores: Tensor) -> None:
        """Raises RowsMeetError where one of the rows scores alone something else."""
        for number in self.independence.due(item.numel(), apart=False):
            row = Row.of(tuple(one.detach() for one in points), item, number)
            self.independence.prove(self.function, row)(scores.detach())

    def _scores(self, table: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores float64 [R, K], and classes, of the rows of a table [R, *]."""

        def launch(part: slice) -> tuple[Tensor, Tensor | None]:
            points = tuple(one[part].detach() for one in table)
            found = self.function.scores(tuple(one.clone() for one in points), item[part])
            self._prove(points, item[part], found[0])
            return found

        scores, classes = zip(*self._launched(item.numel(), launch), strict=True)
        known = [one for one in classes if one is not None]
        return torch.cat(scores).double(), torch.cat(known) if known else None

    def outcome(self) -> Outcome:
        job, recipe = self.job, self.job.recipe
        batch, device = job.call.batch, job.call.device
        everyone = torch.arange(batch, device=device)
        scores, classes = self._scores(self.x, everyone)
        if classes is not None:
            self.function.targets = replace(self.function.targets, classes=classes)
        starts = self._starts(everyone)
        (level,) = recipe.levels
        whole, gap = self._sums(level.to(device).rows(everyone, 0, level.count * batch))
        values, errors = self._multiplied(whole), self._multiplied(gap)
        shape = (batch, scores.shape[1])
        size = _norm(values).clamp_min(torch.finfo(torch.float64).tiny)
        error = torch.zeros_like(size) if recipe.at_input else _norm(errors) / size
        sums = torch.stack([one.detach().double().flatten(2).sum(2) for one in values]).sum(0)
        points = torch.full((batch,), level.count, device=device)
        return Outcome(values, scores, starts, sums, error.view(shape), points, None, classes)

    def _starts(self, everyone: Tensor) -> Tensor | None:
        """Scores at the baselines, float64 [B, K]; of a set their mean."""
        recipe, batch, rows = self.job.recipe, len(everyone), len(self.baselines[0])
        if recipe.baseline == "set" and rows <= recipe.count:
            item, row = (
                everyone.repeat_interleave(rows),
                torch.arange(rows, device="cpu").repeat(batch),
            )
            drawn = tuple(one[row.to(one.device)] for one in self.baselines)
            return self._scores(drawn, item)[0].view(batch, rows, -1).mean(1)
        if recipe.baseline != "one" or not recipe.ends:
            return None
        parts = zip(self.baselines, self.x, strict=True)
        return self._scores(tuple(one.expand_as(x) for one, x in parts), everyone)[0]

    def _sums(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """The weighted sum of all points, and what its two halves differ by: [B, K, *] each."""
        source = self.job.recipe.family.bind(tuple(one.detach() for one in self.x), self.baselines)
        parts = self._launched(
            rows.item.numel(),
            lambda part: self._gradients(rows.part(part.start, part.stop), source),
        )
        terms = [torch.cat(one) for one in zip(*parts, strict=True)]
        if self.job.recipe.reduction == "variance":
            mean = self._added(terms, rows, rows.weight)
            terms = [(one - m[rows.item]).square() for one, m in zip(terms, mean, strict=True)]
        half = [rows.weight * (rows.fold == fold) for fold in (0, 1)]
        share = [weight / weight.sum().clamp_min(1e-300) * len(self.x[0]) for weight in half]
        with torch.no_grad():
            zero, one = (self._added(terms, rows, weight) for weight in share)
            gap = [(a - b) / 2 for a, b in zip(zero, one, strict=True)]
        return self._added(terms, rows, rows.weight), gap

    def _added(self, terms: list[Tensor], rows: Rows, weight: Tensor) -> list[Tensor]:
        """For each input the weighted sums over the rows of every example, [B, K, *]."""
        return [
            one.new_zeros(len(self.x[0]), *one.shape[1:]).index_add(
                0, rows.item, rows_of(weight.to(one.dtype), one.dim()) * one
            )
            for one in terms
        ]

    def _gradients(self, rows: Rows, source: Source) -> list[Tensor]:
        """For each input the gradients of rows, reduced and times their line, [R, K, *]."""
        points = [
            self._point(number, written, rows, source)
            for number, written in enumerate(source.write(rows))
        ]
        # Copies: a model may write to its input.
        inside = self.function.taken(tuple(one.clone() for one in points))
        scores, _ = self.function.forward(list(inside), rows.item)
        self._prove(tuple(points), rows.item, scores)
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        found: list[list[Tensor]] = [[] for _ in points]
        for column in scores.unbind(1):
            grads = torch.autograd.grad(column.sum(), points, create_graph=True, allow_unused=True)
            for several, grad, point in zip(found, grads, points, strict=True):
                several.append(torch.zeros_like(point) if grad is None else grad)
        stacked = [torch.stack(several, 1) for several in found]
        recipe = self.job.recipe
        if recipe.reduction in ("square", "absolute"):
            stacked = [g.square() if recipe.reduction == "square" else g.abs() for g in stacked]
        if recipe.factor == "line":
            stacked = [g * self._line(n, rows, source)[:, None] for n, g in enumerate(stacked)]
        return stacked

    def _point(self, number: int, written: Tensor, rows: Rows, source: Source) -> Tensor:
        """A point that requires gradients, and moves with the input where that does."""
        if not self.x[number].requires_grad:
            return written.detach().requires_grad_()
        moved = self._moved(number, rows)
        family = self.job.recipe.family
        if isinstance(family, RandomLine):
            alpha = random_line(*source.lines(number, rows))[2]  # type: ignore[arg-type]
            moved = rows_of(alpha.to(moved.dtype), moved.dim()) * moved
        elif isinstance(family, Line):
            moved = rows_of(rows.place.to(moved.dtype), moved.dim()) * moved
        return written.detach() + moved

    def _moved(self, number: int, rows: Rows) -> Tensor:
        """Zeros [R, *] that depend on the input as the input itself does."""
        x = self.x[number]
        return (x - x.detach())[rows.item]

    def _line(self, number: int, rows: Rows, source: Source) -> Tensor:
        """From a random baseline to the noisy input, [R, *]."""
        start, end, _ = random_line(*source.lines(number, rows))  # type: ignore[arg-type]
        return end - start + self._moved(number, rows)

    def _multiplied(self, maps: list[Tensor]) -> Inputs:
        factor, found = self.job.recipe.factor, []
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
