"""Second order: Hessian-vector products, and how much of a score regions make together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError, ModelError, warn
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.neighbours import maps_of, totals_like, unknown
from saliency_fast.methods.parts.quadrature import gauss_logarithm
from saliency_fast.model.directional import Project
from saliency_fast.rules import Softplus
from saliency_fast.rules.intercept import Rules

MOST_REGIONS = 256
"""Each takes a backward pass of its own for every point."""
FLAT = "the model has no second derivative (ReLU and max pooling have none): {}; pass softplus=10.0"


@dataclass(frozen=True)
class HessianVectorProduct:
    """The Hessian of the score at the input, times the input less the baseline.

    softplus: the steepness of softplus functions that take the place of ReLU, None for none.
    """

    softplus: float | None = None
    name = "hessian_vector_product"

    def __post_init__(self) -> None:
        _check(self.softplus)

    def recipe(self) -> Recipe:
        rules = _smooth(self.softplus)
        return RoundsRecipe(self._rounds, 1, baseline="fill", rules=rules, second=True)

    def _rounds(self, asked: RoundContext) -> Rounds:
        maps, inputs = asked.scores.shape[1], len(asked.inputs)
        item = torch.arange(len(asked.scores), device=asked.scores.device)
        whole = tuple(torch.zeros_like(x[:1], dtype=torch.int64) for x in asked.inputs)
        totals = totals_like(asked.inputs, asked.scores.numel())

        def write(item: Tensor, place: Tensor) -> Inputs:
            return tuple(x[item] for x in asked.inputs)

        def each(rows: slice, found: RoundResult) -> None:
            for k, (_, _, *further) in enumerate(found.grads):
                for total, product in zip(totals, further[inputs:], strict=True):
                    total[item[rows] * maps + k] = product.to(total.dtype)

        project = _regions(asked, whole, 1)
        yield Round(write, item, item, project=project, each=each)
        if not any(bool(one.any()) for one in totals):
            warn(FLAT.format("all products are zero"))
        return Maps(maps_of(totals, maps))


@dataclass(frozen=True)
class IntegratedHessians:
    """Interactions of regions by Integrated Gradients of Integrated Gradients (Janizek, Sturmfels
    & Lee, 2021): `extras["interactions"]` [B, R, R], symmetric, sums to the score's gain.

    features: R regions. Values are what each element makes with all others and alone. The double
    integral over alpha and beta depends on their product t alone, whose density is -ln t: `steps`
    points of Gauss's rule for it. softplus: as of HessianVectorProduct.
    """

    steps: int = 32
    softplus: float | None = None
    name = "integrated_hessians"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        if self.steps > 256:
            raise InputError(f"steps must be at most 256, which is exact to rounding: {self.steps}")
        _check(self.softplus)

    def recipe(self) -> Recipe:
        rules = _smooth(self.softplus)
        return RoundsRecipe(
            self._rounds, self.steps, rules=rules, baseline="one", second=True, features=True
        )

    def _rounds(self, asked: RoundContext) -> Rounds:
        features, count = _features(asked)
        device, batch = asked.scores.device, len(asked.scores)
        nodes, weights = (torch.from_numpy(one).to(device) for one in gauss_logarithm(self.steps))
        item = torch.arange(batch, device=device).repeat(self.steps)
        place = torch.arange(self.steps, device=device).repeat_interleave(batch)
        sums = _Sums(asked, count)

        def write(item: Tensor, place: Tensor) -> Inputs:
            both = zip(asked.inputs, asked.baselines, strict=True)
            return tuple(ops.line_points(x, start, item, nodes[place]) for x, start in both)

        def each(rows: slice, found: RoundResult) -> None:
            sums.add(item[rows], weights[place[rows]], nodes[place[rows]], found)

        yield Round(write, item, place, project=_regions(asked, features, count), each=each)
        return sums.maps()


class _Sums:
    """Sums over points, for S = B * K maps: of gradients weighted by w and Hessian products by w t.

    alone [S, R]: first-order terms of regions; pairs [S, R, R]: second-order terms; totals [S, *]:
    both, element by element.
    """

    def __init__(self, asked: RoundContext, count: int) -> None:
        self.asked, slots = asked, asked.scores.numel()
        self.totals = totals_like(asked.inputs, slots)
        self.alone = asked.scores.new_zeros((slots, count))
        self.pairs = asked.scores.new_zeros((slots, count, count))

    def add(self, item: Tensor, weight: Tensor, t: Tensor, found: RoundResult) -> None:
        """Adds the answers of points t of the examples `item`."""
        maps, inputs = self.asked.scores.shape[1], len(self.totals)
        for k, (first, second, *further) in enumerate(found.grads):
            slot = item * maps + k
            self.alone.index_add_(0, slot, first.double() * weight[:, None])
            self.pairs.index_add_(0, slot, second.double() * (weight * t)[:, None, None])
            for number, total in enumerate(self.totals):
                ops.accumulate(total, further[number], slot, weight, "sum")
                ops.accumulate(total, further[inputs + number], slot, weight * t, "sum")

    def maps(self) -> Maps:
        """The maps; raises ModelError where interactions are zero and that cannot be all."""
        asked, (batch, maps) = self.asked, self.asked.scores.shape
        pairs = self.pairs + torch.diag_embed(self.alone)
        sums = pairs.sum((1, 2)).view(batch, maps)
        if not bool(self.pairs.any()):
            _need_linear(asked, sums)
        found = zip(self.totals, asked.inputs, asked.baselines, strict=True)
        values = tuple(ops.finish(total, x, start, "none")[0] for total, x, start in found)
        interactions = pairs.view(batch, maps, *pairs.shape[1:])
        extras = {"interactions": interactions}
        return Maps(maps_of(values, maps), unknown(asked), sums, extras)


def _regions(asked: RoundContext, features: Inputs, count: int) -> Project:
    """For each region the sum of gradient times way over its elements."""

    def project(grads: Inputs, item: Tensor) -> Tensor:
        found = grads[0].new_zeros((len(item), count))
        parts = zip(grads, asked.inputs, asked.baselines, features, strict=True)
        for gradient, x, start, region in parts:
            way = x[item] - start[item % len(start)]
            rows = region[item % len(region)].expand_as(x[item]).flatten(1)
            found = found.scatter_add(1, rows, (gradient * way).flatten(1).to(found.dtype))
        return found

    return project


def _features(asked: RoundContext) -> tuple[Inputs, int]:
    """Numbers of regions [B | 1, *] per input, and how many there are."""
    features, first = asked.features, 0
    if not features:
        parts = []
        for x in asked.inputs:
            number = torch.arange(first, first + x[0].numel(), device=x.device)
            parts.append(number.view(1, *x.shape[1:]))
            first += x[0].numel()
        features = tuple(parts)
    count = 1 + max(int(one.max()) for one in features)
    if count > MOST_REGIONS:
        raise InputError(
            f"interactions of {count} regions are too many: expected {MOST_REGIONS} at most, since "
            "each takes a backward pass for every point; pass features='grid:8', 'slic' or numbers"
        )
    return features, count


def _need_linear(asked: RoundContext, sums: Tensor) -> None:
    """Without second derivatives the rest must explain the gain, as it does for linear models."""
    assert asked.baseline_scores is not None
    gain = asked.scores - asked.baseline_scores
    gap = float((sums - gain).abs().max() / gain.abs().max().clamp_min(1e-30))
    if gap > 0.01:
        raise ModelError(FLAT.format(f"interactions are zero and miss {gap:.0%} of the gain"))


def _smooth(softplus: float | None) -> Rules | None:
    return None if softplus is None else Softplus(float(softplus))


def _check(softplus: object) -> None:
    if softplus is not None:
        checks.positive("softplus", softplus)
