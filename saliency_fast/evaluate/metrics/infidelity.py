"""Infidelity: how far a map's prediction of what a perturbation does is from what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric, check_output
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.substrates import Substrate, check_substrate
from saliency_fast.methods.parts import checks
from saliency_fast.ops import noise_points, philox, random_bits, rank_points, window_points

PERTURBATIONS = ("gaussian", "patches", "squares")
ELEMENTS = 2**22
"""Elements whose products with a map are summed at once."""
Write = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Infidelity(Metric):
    """The mean over perturbations I of (sum(I * map) - (f(x) - f(x - I)))^2 (Yeh, 2019): low where
    the map tells what a perturbation does to the output.

    perturbation: "gaussian", noise of `sigma` as a share of each example's range; "squares", boxes
    of `patch` places along each axis at random positions, which the substrate replaces; "patches",
    all boxes of a grid of them, once each (`samples` says nothing then). cumulative: patches stay
    replaced while the next ones are, in reading order. patch: one size or several, to average over.
    contributions: the map's values say what each place adds to the output where it differs from the
    substrate, as those of integrated gradients or Shapley values do, rather than the output's
    change per unit of the input, as gradients: they are divided by x - substrate first. A map of
    one number for all channels counts for each of them, or as their sum where it contributes.
    scaled: the map is multiplied by the factor that suits it best first. output: "logit" or
    "softmax". seed: of the noise and the positions, the same for all examples.
    """

    perturbation: str = "gaussian"
    samples: int = 100
    sigma: float = 0.1
    patch: int | tuple[int, ...] = 4
    substrate: Substrate = "zero"
    cumulative: bool = False
    contributions: bool = False
    scaled: bool = False
    output: str = "logit"
    seed: int = 0
    name = "infidelity"
    better = "lower"
    needs: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        checks.choice("perturbation", self.perturbation, PERTURBATIONS)
        checks.whole("samples", self.samples, 1)
        checks.positive("sigma", self.sigma)
        if isinstance(self.patch, tuple) and not self.patch:
            raise InputError("patch is an empty tuple: pass at least one size")
        for size in self._sizes():
            checks.whole("patch", size, 1)
        for name in ("cumulative", "contributions", "scaled"):
            checks.flag(name, getattr(self, name))
        if self.cumulative and self.perturbation != "patches":
            raise InputError(
                f"cumulative is of perturbation='patches': got {self.perturbation!r}; leave it out"
            )
        check_substrate(self.substrate)
        check_output(self.output)
        checks.whole("seed", self.seed, 0)

    def _judge(self, subject: Subject) -> Outcome:
        x = subject.inputs
        fill = subject.fill(self.substrate, self.seed)
        slope = _per_unit(subject.values, x, fill) if self.contributions else subject.values
        sizes = (0,) if self.perturbation == "gaussian" else self._sizes()
        told, done, weight = [], [], []
        for number, size in enumerate(sizes):
            count, write = self._family(x, fill, size, number)
            products, drops = _both(subject, slope, count, write, self.output)
            told.append(products)
            done.append(drops)
            weight.append(drops.new_full((count, 1), 1.0 / (count * len(sizes))))
        a, b, share = torch.cat(told), torch.cat(done), torch.cat(weight)
        details = {"of_zero_map": (share * b * b).sum(0)}
        if self.scaled:
            below = (share * a * a).sum(0)
            factor = torch.where(below > 0, (share * a * b).sum(0) / below, 0.0)
            a, details["factor"] = factor * a, factor
        values = (share * (a - b) ** 2).sum(0)
        still = self._still(x, fill)
        caveats: tuple[str, ...] = ()
        if bool(still.any()):
            rows = still.nonzero().flatten().tolist()
            caveats = (f"no perturbation changes examples {rows[:8]}: no infidelity is told",)
        values = values.masked_fill(still, math.nan)
        return self._outcome(values, details=details, caveats=caveats)

    def _sizes(self) -> tuple[int, ...]:
        return self.patch if isinstance(self.patch, tuple) else (self.patch,)

    def _still(self, x: Tensor, fill: Tensor) -> Tensor:
        """Which examples cannot be perturbed, bool [B]."""
        if self.perturbation == "gaussian":
            return _span(x) == 0
        return (x == fill).flatten(1).all(1)

    def _family(self, x: Tensor, fill: Tensor, size: int, number: int) -> tuple[int, Write]:
        """How many perturbations there are, and write(item, place) of them."""
        if self.perturbation == "gaussian":
            sigma, seed = self.sigma * _span(x), torch.full((len(x),), self.seed, device=x.device)
            return self.samples, lambda item, place: noise_points(
                x, sigma, seed, item, place, False, 0
            )
        spatial = x.shape[2:] if x.dim() > 2 else x.shape[1:]
        edge = torch.tensor([min(size, one) for one in spatial], device=x.device)
        if self.perturbation == "squares":
            sample = torch.arange(self.samples, device=x.device) + number * self.samples
            seed = torch.full_like(sample, self.seed)
            words = random_bits(seed, sample, len(spatial), 0, philox.MASK)
            room = torch.tensor(spatial, device=x.device) - edge + 1
            start = (words * room) >> 32
        else:
            ticks = [torch.arange(0, one, size, device=x.device) for one in spatial]
            start = torch.cartesian_prod(*ticks).view(-1, len(spatial))
        if self.cumulative:
            rank = blocks(spatial, size, x.device)
            return len(start), lambda item, place: rank_points(x, fill, rank, item, place + 1)
        stop = start + edge
        if x.dim() > 2:  # all channels
            start = functional.pad(start, (1, 0))
            stop = functional.pad(stop, (1, 0), value=x.shape[1])
        return len(start), lambda item, place: window_points(
            x, fill, item, start[place], stop[place]
        )


def _both(
    subject: Subject, slope: Tensor, count: int, write: Write, output: str
) -> tuple[Tensor, Tensor]:
    """What the map says of each perturbation and what it does, float64 [count, B] each."""
    x, batch = subject.inputs, subject.batch
    number = torch.arange(count * batch, device=x.device)
    products = torch.zeros(count * batch, dtype=torch.float64, device=x.device)

    def noted(item: Tensor, number: Tensor) -> Tensor:
        points = write(item, number // batch)
        products[number] = _products(x, slope, points, item)
        return points

    first, found = subject.scorer.at(noted, number % batch, number)
    drops = first.of(output) - found.of(output).view(count, batch)
    return products.view(count, batch), drops


def _products(x: Tensor, slope: Tensor, points: Tensor, item: Tensor) -> Tensor:
    """sum((x - point) * slope) of every row, float64 [R]."""
    rows = max(1, ELEMENTS // max(1, x[0].numel()))
    found = []
    for start in range(0, len(item), rows):
        own = item[start : start + rows]
        change = x[own].sub_(points[start : start + rows]).mul_(slope[own])
        found.append(change.flatten(1).sum(1, dtype=torch.float64))
    return torch.cat(found)


def _per_unit(values: Tensor, x: Tensor, fill: Tensor) -> Tensor:
    """Contributions divided by x - fill; as they are where that is zero."""
    gap = x - fill
    apart = gap != 0
    if values.shape != x.shape:
        # One number for all channels is shared by those that change.
        changing = apart.sum(1, keepdim=True)
        values = values / torch.where(changing == 0, x.shape[1], changing)
    return values / torch.where(apart, gap, 1.0)


def _span(x: Tensor) -> Tensor:
    """The range of each example, float64 [B]."""
    low, high = torch.aminmax(x.flatten(1), dim=1)
    return (high - low).double()


def blocks(spatial: torch.Size, size: int, device: torch.device) -> Tensor:
    """The number of the box in which each place lies, in reading order, int32 [1, P]."""
    number = torch.zeros((), dtype=torch.int64, device=device)
    for one in spatial:
        own = torch.arange(one, device=device) // size
        number = number[..., None] * -(-one // size) + own
    return number.flatten()[None].int()
