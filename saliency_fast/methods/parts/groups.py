"""Groups of noisy samples, whose differences estimate the standard error of every element."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.points import Noise
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, Rows
from saliency_fast.methods.parts.maps import accumulators, by_example, every_row

GROUPS = 8
"""More groups narrow the interval by a tenth at most, and each costs the memory of maps."""
LEAST_SHARE = 1e-6
"""Least share of a variance that is left without one group, so that it has a logarithm."""


class Groups:
    """Noisy samples 0 to n - 1 of every input, dealt to the groups in turn.

    A pair of opposite noise is in one group. Each group has a mean, and with `moments` a sum of
    squared deviations, for every map.
    """

    def __init__(self, context: RoundContext, noise: Noise, samples: int, *, moments: bool) -> None:
        self.context, self.samples, self.moments = context, samples, moments
        self.together = 2 if noise.antithetic else 1
        self.count = min(GROUPS, samples // (2 if moments else self.together))
        self.source = noise.bind(context.inputs, context.baselines)
        slots = context.scores.numel() * self.count
        self.means = accumulators(context.inputs, slots)
        self.squares = accumulators(context.inputs, slots) if moments else ()
        number = torch.arange(samples, device=context.scores.device)
        self.sizes = torch.bincount(self._group(number), minlength=self.count).double()

    def _group(self, sample: Tensor) -> Tensor:
        return sample // self.together % self.count

    def round(self) -> Round:
        """All samples of all examples, samples outermost."""
        example, sample = every_row(self.context, self.samples)
        targets = self.context.scores.shape[1]
        seen = [self.sizes.new_zeros(len(one)) for one in self.squares]

        def write(example: Tensor, sample: Tensor) -> Inputs:
            return self.source.write(Rows(example, sample, sample.double(), example))

        def each(rows: slice, result: RoundResult) -> None:
            group = self._group(sample[rows])
            for k, grads in enumerate(result.grads):
                slot = (example[rows] * targets + k) * self.count + group
                for number, gradient in enumerate(grads):
                    if self.moments:
                        state = self.means[number], self.squares[number], seen[number]
                        ops.accumulate_moments(*state, gradient, slot)
                    else:
                        weight = 1.0 / self.sizes[group]
                        ops.accumulate(self.means[number], gradient, slot, weight, "sum")

        return Round(write, example, sample, gradients=True, each=each)

    def grouped(self, totals: Inputs) -> list[tuple[Tensor, Tensor]]:
        """For each input its accumulators [S, G, *], and the groups' sizes [G, 1, ...]."""
        return [
            (
                one.view(-1, self.count, *one.shape[1:]),
                self.sizes.to(one.dtype).view(-1, *(1,) * (one.dim() - 1)),
            )
            for one in totals
        ]


def smooth_rounds(context: RoundContext, noise: Noise, samples: int) -> Rounds:
    """Mean gradients, with standard errors from the differences of the groups' means."""
    groups = Groups(context, noise, samples, moments=False)
    yield groups.round()
    values, errors = [], []
    for means, size in groups.grouped(groups.means):
        share = size / samples
        mean = (share * means).sum(1)
        square = (share * (means - mean[:, None])).square_().sum(1)
        values.append(mean)
        errors.append(square.mul_(groups.count / (groups.count - 1)).sqrt_())
    return _maps(context, values, errors, {"standard_error": errors})


def variance_rounds(context: RoundContext, noise: Noise, samples: int, confidence: float) -> Rounds:
    """Variances of gradients, with intervals by the jackknife over groups (Miller, 1974).

    The jackknife is of the logarithm, the scale on which a variance is closest to normal.
    """
    groups = Groups(context, noise, samples, moments=True)
    yield groups.round()
    values, errors, lows, highs = [], [], [], []
    pairs = zip(groups.grouped(groups.means), groups.grouped(groups.squares), strict=True)
    reach = student(confidence, groups.count - 1)
    for (means, size), (squares, _) in pairs:
        total, left = _without_each_group(means, squares, size, samples)
        values.append(total / samples)
        whole = (total / (samples - 1)).clamp_min(torch.finfo(total.dtype).tiny)
        others = (left / (samples - size - 1)).maximum(LEAST_SHARE * whole[:, None]).log_()
        pseudo = groups.count * whole.log()[:, None] - (groups.count - 1) * others
        middle = pseudo.mean(1)
        deviation = pseudo.var(1).div_(groups.count).sqrt_()
        lows.append((middle - reach * deviation).exp_().masked_fill_(total == 0, 0.0))
        highs.append((middle + reach * deviation).exp_().masked_fill_(total == 0, 0.0))
        errors.append(deviation * values[-1])
    return _maps(context, values, errors, {"interval_low": lows, "interval_high": highs})


def _without_each_group(
    means: Tensor, squares: Tensor, size: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Sums of squared deviations [S, *] of all samples, and [S, G, *] without each group."""
    mean = (size * means).sum(1, keepdim=True) / samples
    away = (means - mean).square_()
    total = (squares + size * away).sum(1)
    # Chan's merge (1983), solved for what is left when a group is taken out.
    left = total[:, None] - squares - away * (size * samples / (samples - size))
    return total, left.clamp_min_(0.0)


def _maps(
    context: RoundContext,
    values: list[Tensor],
    errors: list[Tensor],
    extras: dict[str, list[Tensor]],
) -> Maps:
    targets = context.scores.shape[1]
    norms = [
        torch.stack([one.double().flatten(1).square().sum(1) for one in parts]).sum(0).sqrt()
        for parts in (errors, values)
    ]
    error = norms[0] / norms[1].clamp_min(torch.finfo(torch.float64).tiny)
    named = {
        name if len(parts) == 1 else f"{name}.{number}": one
        for name, parts in extras.items()
        for number, one in enumerate(by_example(tuple(parts), targets))
    }
    return Maps(by_example(tuple(values), targets), error.view_as(context.scores), extras=named)


def student(confidence: float, freedom: int) -> float:
    """How many standard errors a two-sided interval reaches, by Student's distribution."""
    # Imported here, since the import of scipy.special takes longer than that of this package.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))
