"""Second derivatives: Hessian-vector products, and interactions of regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, ModelError, warn
from saliency_fast.methods.coalitions import features_of
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import (
    accumulators,
    at_inputs,
    by_example,
    every_row,
    on_lines,
    unknown_error,
)
from saliency_fast.methods.parts.quadrature import gauss_logarithm
from saliency_fast.model.function import Project
from saliency_fast.rules.rectifiers import Softplus

MOST_REGIONS = 256
"""Each region takes a backward pass of its own for every point."""
MOST_STEPS = 256
"""Gauss's rule of this many points is exact to rounding."""
LARGEST_GAP = 0.01
"""Share of the gain that a model without second derivatives may leave unexplained."""
FLAT = "the model has no second derivative (ReLU and max pooling have none): {}; pass softplus=10.0"


@dataclass(frozen=True)
class HessianVectorProduct:
    """Hessian of the score at the input, times the input less the baseline.

    Args:
        softplus: Steepness of the softplus functions that replace ReLUs, which have no second
            derivative; None keeps ReLUs.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.ones(2, 4), sf.HessianVectorProduct()
        >>> sf.explain(lambda x: (x**3).sum(1), x, method=method).values[0]
        tensor([6., 6., 6., 6.])
    """

    softplus: float | None = None
    name = "hessian_vector_product"

    def __post_init__(self) -> None:
        checks.fields(self, softplus=checks.optional(checks.positive))

    def recipe(self) -> RoundsRecipe:
        rules = None if self.softplus is None else Softplus(float(self.softplus))
        return RoundsRecipe(self._rounds, 1, baseline="fill", rules=rules, second=True)

    def _rounds(self, context: RoundContext) -> Rounds:
        targets, inputs = context.scores.shape[1], len(context.inputs)
        example, _ = every_row(context, 1)
        whole = tuple(torch.zeros_like(x[:1], dtype=torch.int64) for x in context.inputs)
        totals = accumulators(context.inputs, context.scores.numel())

        def each(rows: slice, result: RoundResult) -> None:
            for k, (_, _, *further) in enumerate(result.grads):
                for total, product in zip(totals, further[inputs:], strict=True):
                    total[example[rows] * targets + k] = product.to(total.dtype)

        project = _region_sums(context, whole, 1)
        yield Round(at_inputs(context), example, example, project=project, each=each)
        if not any(bool(one.any()) for one in totals):
            warn(FLAT.format("all products are zero"))
        return Maps(by_example(totals, targets))


@dataclass(frozen=True)
class IntegratedHessians:
    """Interactions of regions: Integrated Gradients of Integrated Gradients (Janizek et al., 2021).

    `extras["interactions"]` [B, R, R] for the R regions of `features=` is symmetric and sums to the
    score's gain; values are the interactions of each element with all others and itself. The double
    integral over alpha and beta depends on their product t alone, whose density is -ln t.

    Args:
        steps: Points of Gauss's rule for that density, at most 256.
        softplus: As of `HessianVectorProduct`.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.ones(1, 2), sf.IntegratedHessians(steps=4)
        >>> att = sf.explain(lambda x: 3 * x[:, 0] * x[:, 1], x, method=method)
        >>> (att.extras["interactions"][0] * 100).round() / 100
        tensor([[0.7500, 0.7500],
                [0.7500, 0.7500]], dtype=torch.float64)
    """

    steps: int = 32
    softplus: float | None = None
    name = "integrated_hessians"

    def __post_init__(self) -> None:
        checks.integer("steps", self.steps, 1, MOST_STEPS)
        checks.fields(self, softplus=checks.optional(checks.positive))

    def recipe(self) -> RoundsRecipe:
        rules = None if self.softplus is None else Softplus(float(self.softplus))
        return RoundsRecipe(
            self._rounds, self.steps, rules=rules, baseline="one", second=True, features=True
        )

    def _rounds(self, context: RoundContext) -> Rounds:
        features, count = features_of(context)
        if count > MOST_REGIONS:
            raise InputError(
                f"interactions of {count} regions are too many: expected {MOST_REGIONS} at most, "
                "since each takes a backward pass for every point; pass features='grid:8', 'slic' "
                "or numbers"
            )
        nodes, weights = (
            torch.from_numpy(one).to(context.scores.device) for one in gauss_logarithm(self.steps)
        )
        (batch, targets), inputs = context.scores.shape, len(context.inputs)
        # Sums of gradients times w and Hessian products times w t, for S = B * K maps: by region,
        # and of both element by element.
        first = context.scores.new_zeros((batch * targets, count))
        second = context.scores.new_zeros((batch * targets, count, count))
        totals = accumulators(context.inputs, batch * targets)
        example, node = every_row(context, self.steps)

        def each(rows: slice, result: RoundResult) -> None:
            weight, t = weights[node[rows]], nodes[node[rows]]
            for k, (gradient, product, *further) in enumerate(result.grads):
                slot = example[rows] * targets + k
                first.index_add_(0, slot, gradient.double() * weight[:, None])
                second.index_add_(0, slot, product.double() * (weight * t)[:, None, None])
                for number, total in enumerate(totals):
                    ops.accumulate(total, further[number], slot, weight, "sum")
                    ops.accumulate(total, further[inputs + number], slot, weight * t, "sum")

        project = _region_sums(context, features, count)
        yield Round(on_lines(context), example, nodes[node], project=project, each=each)
        pairs = second + torch.diag_embed(first)
        sums = pairs.sum((1, 2)).view(batch, targets)
        if not bool(second.any()):
            _need_explained(context, sums)
        parts = zip(totals, context.inputs, context.baselines, strict=True)
        values = tuple(ops.finish(total, x, start, "none")[0] for total, x, start in parts)
        extras = {"interactions": pairs.view(batch, targets, count, count)}
        return Maps(by_example(values, targets), unknown_error(context), sums, extras)


def _need_explained(context: RoundContext, sums: Tensor) -> None:
    """Raises where interactions are zero and first-order terms do not explain the gain."""
    assert context.baseline_scores is not None
    gain = context.scores - context.baseline_scores
    gap = float((sums - gain).abs().max() / gain.abs().max().clamp_min(1e-30))
    if gap > LARGEST_GAP:
        raise ModelError(FLAT.format(f"interactions are zero and miss {gap:.0%} of the gain"))


def _region_sums(context: RoundContext, features: Inputs, count: int) -> Project:
    """Sums over each region's elements of gradient times (input - baseline)."""
    parts = list(zip(context.inputs, context.baselines, features, strict=True))

    def project(grads: Inputs, example: Tensor) -> Tensor:
        sums = grads[0].new_zeros((len(example), count))
        for gradient, (x, start, region) in zip(grads, parts, strict=True):
            difference = x[example] - start[example % len(start)]
            rows = region[example % len(region)].expand_as(x[example]).flatten(1)
            sums = sums.scatter_add(1, rows, (gradient * difference).flatten(1).to(sums.dtype))
        return sums

    return project
