"""The families of points: the input itself, lines, noisy copies, random lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Rows
from saliency_fast.errors import InputError

Seed = int | tuple[int, ...]


@dataclass(frozen=True)
class Itself:
    """The input, whatever its type."""

    straight: ClassVar[bool] = False

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundItself:
        return _BoundItself(inputs)


@dataclass(frozen=True)
class _BoundItself:
    inputs: Inputs

    def write(self, rows: Rows) -> Inputs:
        return tuple(x[rows.item] for x in self.inputs)

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        raise TypeError("the input itself lies on no line")

    def direction(self, rows: Rows) -> Inputs:
        raise TypeError("the input itself lies on no path")


@dataclass(frozen=True)
class Line:
    """Points on the straight line from the baseline (alpha 0) to the input (alpha 1)."""

    straight: ClassVar[bool] = True

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundLine:
        return _BoundLine(inputs, baselines)


@dataclass(frozen=True)
class _BoundLine:
    inputs: Inputs
    baselines: Inputs

    def write(self, rows: Rows) -> Inputs:
        return tuple(
            ops.line_points(x, baseline, rows.item, rows.place)
            for x, baseline in zip(self.inputs, self.baselines, strict=True)
        )

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        raise TypeError("a straight line is not drawn at random")

    def direction(self, rows: Rows) -> Inputs:
        return tuple(
            x[rows.item] - baseline[rows.item % len(baseline)]
            for x, baseline in zip(self.inputs, self.baselines, strict=True)
        )


@dataclass(frozen=True)
class Noise:
    """Noisy copies of the input; `sigma` is absolute and wins over `noise_level`, a share of the
    example's own range. shared_axis: along which the noise is the same.
    """

    noise_level: float
    sigma: float | None
    seed: Seed
    antithetic: bool
    shared_axis: int | None = None
    straight: ClassVar[bool] = False

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundNoise:
        if self.shared_axis is not None:
            for number, x in enumerate(inputs):
                if self.shared_axis >= x.dim():
                    raise InputError(
                        f"shared_axis must be an axis behind the batch: got {self.shared_axis}, "
                        f"input {number} is {list(x.shape)}"
                    )
        return _BoundNoise(
            inputs,
            tuple(deviations(x, self.noise_level, self.sigma) for x in inputs),
            seeds(self.seed, inputs[0]),
            first_elements(inputs),
            self.antithetic,
            self.shared_axis,
        )


@dataclass(frozen=True)
class _BoundNoise:
    inputs: Inputs
    sigma: Inputs
    seed: Tensor
    first: tuple[int, ...]
    antithetic: bool
    shared_axis: int | None = None

    def write(self, rows: Rows) -> Inputs:
        triples = zip(self.inputs, self.sigma, self.first, strict=True)
        return tuple(self._noisy(x, sigma, first, rows) for x, sigma, first in triples)

    def _noisy(self, x: Tensor, sigma: Tensor, first: int, rows: Rows) -> Tensor:
        # Shared noise is one slice of it around zero, for all along the axis.
        shared = self.shared_axis
        origin = x if shared is None else torch.zeros_like(x.narrow(shared, 0, 1))
        columns = (self.seed, rows.item, rows.place, self.antithetic, first)
        points: Tensor = ops.noise_points(origin, sigma, *columns)
        return points if shared is None else x[rows.item] + points

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        raise TypeError("noise has no line")

    def direction(self, rows: Rows) -> Inputs:
        raise TypeError("noise has no path")


@dataclass(frozen=True)
class RandomLine:
    """A random point on the line from a random row of the baselines to the (noisy) input; `sigma`
    and `noise_level` as of `Noise`.
    """

    noise_level: float
    seed: Seed
    sigma: float | None = None
    straight: ClassVar[bool] = False

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundRandomLine:
        return _BoundRandomLine(
            inputs,
            baselines,
            tuple(deviations(x, self.noise_level, self.sigma) for x in inputs),
            seeds(self.seed, inputs[0]),
            first_elements(inputs),
        )


@dataclass(frozen=True)
class _BoundRandomLine:
    inputs: Inputs
    baselines: Inputs
    sigma: Inputs
    seed: Tensor
    first: tuple[int, ...]

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        return (
            self.inputs[number],
            self.baselines[number],
            self.sigma[number],
            self.seed,
            rows.item,
            rows.place,
            self.first[number],
        )

    def write(self, rows: Rows) -> Inputs:
        return tuple(
            ops.random_line_points(*self.lines(number, rows)) for number in range(len(self.inputs))
        )

    def direction(self, rows: Rows) -> Inputs:
        raise TypeError("random lines are drawn again, see `lines`")


def deviations(x: Tensor, noise_level: float, sigma: float | None) -> Tensor:
    """Standard deviation of each example's noise, float64 [B], in units of x."""
    if sigma is not None:
        return torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
    if noise_level == 0.0:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    low, high = torch.aminmax(x.flatten(1), dim=1)
    return noise_level * (high - low).double()


def seeds(seed: Seed, x: Tensor) -> Tensor:
    """One seed per example, int64 [B]."""
    if isinstance(seed, int):
        return torch.full((len(x),), seed, dtype=torch.int64, device=x.device)
    if len(seed) != len(x):
        raise InputError(
            f"seed has the wrong length: got {len(seed)}, expected one int or one for each of "
            f"{len(x)} examples"
        )
    return torch.tensor(seed, dtype=torch.int64, device=x.device)


def first_elements(inputs: Inputs) -> tuple[int, ...]:
    """Elements of a tuple of inputs are numbered on from input to input."""
    numbers, following = [], 0
    for x in inputs:
        numbers.append(following)
        following += x[0].numel()
    return tuple(numbers)
