"""Families of points: straight lines, noisy copies, random lines and paths of blurs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Rows, Source, Starting
from saliency_fast.errors import InputError
from saliency_fast.graph.passes.half import FLOAT32, arithmetic
from saliency_fast.model.layout import Axes, Layouts

Seed = int | tuple[int, ...]
REACH = 4.0
"""Standard deviations behind which a kernel ends."""
BLOCK = 1024
"""Longest axis, or piece of one, that is blurred by one matrix."""
LEAST_SIGMA = 1e-3
"""Below, a kernel is the identity to the last bit, and its derivative zero."""
AT_ONCE = 16
"""Examples whose most blurred copies are made at a time."""
PADDINGS = {"zeros": "constant", "replicate": "replicate"}


@dataclass(frozen=True)
class Line:
    """Points on the straight line from the baseline (alpha 0) to the input (alpha 1)."""

    straight: ClassVar[bool] = True

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundLine:
        return _BoundLine(inputs, baselines)


@dataclass(frozen=True)
class _BoundLine(Source):
    inputs: Inputs
    baselines: Inputs

    def write(self, rows: Rows) -> Inputs:
        return tuple(
            ops.line_points(x, baseline, rows.example, rows.node)
            for x, baseline in zip(self.inputs, self.baselines, strict=True)
        )

    def direction(self, rows: Rows) -> Inputs:
        return tuple(
            x[rows.example] - baseline[rows.example % len(baseline)]
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
        deviation = tuple(deviations(x, self.noise_level, self.sigma) for x in inputs)
        seed, first = seeds(self.seed, inputs[0]), first_elements(inputs)
        return _BoundNoise(inputs, deviation, seed, first, self.antithetic, self.shared_axis)


@dataclass(frozen=True)
class _BoundNoise(Source):
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
        columns = (self.seed, rows.example, rows.node, self.antithetic, first)
        points: Tensor = ops.noise_points(origin, sigma, *columns)
        return points if shared is None else x[rows.example] + points


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
        deviation = tuple(deviations(x, self.noise_level, self.sigma) for x in inputs)
        seed, first = seeds(self.seed, inputs[0]), first_elements(inputs)
        return _BoundRandomLine(inputs, baselines, deviation, seed, first)


@dataclass(frozen=True)
class _BoundRandomLine(Source):
    inputs: Inputs
    baselines: Inputs
    sigma: Inputs
    seed: Tensor
    first: tuple[int, ...]

    def lines(self, number: int, rows: Rows) -> tuple[Tensor | int, ...]:
        line = self.inputs[number], self.baselines[number], self.sigma[number]
        return *line, self.seed, rows.example, rows.node, self.first[number]

    def write(self, rows: Rows) -> Inputs:
        return tuple(
            ops.random_line_points(*self.lines(number, rows)) for number in range(len(self.inputs))
        )


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


@dataclass(frozen=True)
class Blur(Starting):
    """Gaussian blurs of the input, from `max_sigma` pixels (alpha 0) down to none (alpha 1), by
    `max_sigma` (1 - alpha)^spacing.

    Blurs the places of the inputs, one to three axes; behind the channels, where there are no
    `layouts`. The kernel ends at four times
    `max_sigma` for every alpha, so that points and their derivative are smooth in alpha.
    """

    max_sigma: float
    padding: str = "zeros"
    spacing: float = 1.0
    layouts: tuple[Axes, ...] = ()
    straight: ClassVar[bool] = False

    def laid(self, layouts: Layouts) -> Blur:
        """The same over the places of inputs of these layouts."""
        axes = (layouts.spatial(number, "a path of blurs") for number in range(len(layouts)))
        return replace(self, layouts=tuple(axes))

    def bind(self, inputs: Inputs, baselines: Inputs) -> _BoundBlur:
        axes = tuple(one.places for one in self.layouts)
        axes = axes or tuple(tuple(range(2, x.dim())) for x in inputs)
        return _BoundBlur(inputs, self.max_sigma, self.padding, self.spacing, axes)

    def start(self, inputs: Inputs) -> Inputs:
        """The most blurred inputs, where the path begins."""
        example = torch.arange(len(inputs[0]), device=inputs[0].device)
        source = self.bind(inputs, ())
        for number, (x, axes) in enumerate(zip(inputs, source.axes, strict=True)):
            if not 1 <= len(axes) <= 3:
                raise InputError(
                    f"a path of blurs needs one to three axes behind the channels: input {number} "
                    f"is {list(x.shape)}; use a path on straight lines, such as "
                    "IntegratedGradients, or pass it through forward_args"
                )
        zero = torch.zeros(len(example), dtype=torch.float64, device=example.device)
        rows = Rows(example, zero, zero, torch.zeros_like(example))
        # A few at a time: their padded copies and kernels are larger than what comes of them.
        parts = [source.write(rows.part(i, i + AT_ONCE)) for i in range(0, len(example), AT_ONCE)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class _BoundBlur(Source):
    inputs: Inputs
    max_sigma: float
    padding: str
    spacing: float
    axes: tuple[tuple[int, ...], ...]

    def write(self, rows: Rows) -> Inputs:
        return self._each(rows, slope=False)

    def direction(self, rows: Rows) -> Inputs:
        return self._each(rows, slope=True)

    def _each(self, rows: Rows, *, slope: bool) -> Inputs:
        pairs = zip(self.inputs, self.axes, strict=True)
        return tuple(self._blurred(x, axes, rows, slope=slope) for x, axes in pairs)

    def _blurred(self, x: Tensor, axes: tuple[int, ...], rows: Rows, *, slope: bool) -> Tensor:
        """The points of rows, or their derivative by alpha, by the product rule over the axes."""
        left, power = 1.0 - rows.node, self.spacing
        kernel, change = kernels(self.max_sigma * left**power, math.ceil(REACH * self.max_sigma))
        change = change * (-self.max_sigma * power * left ** (power - 1.0))[:, None]
        blurred = x[rows.example]
        slopes = torch.zeros_like(blurred)
        for axis in axes:
            if slope:
                slopes = along(blurred, axis, change, self.padding) + (
                    along(slopes, axis, kernel, self.padding) if axis > axes[0] else 0.0
                )
            if not slope or axis < axes[-1]:
                blurred = along(blurred, axis, kernel, self.padding)
        return slopes if slope else blurred


def kernels(sigma: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Normalised Gaussian kernels float64 [R, 2 * reach + 1] and their derivative by sigma [R]."""
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64, device=sigma.device)
    width = sigma.clamp_min(LEAST_SIGMA)[:, None]
    kernel = torch.softmax(-0.5 * (offset / width) ** 2, 1)
    square = offset**2
    spread = (kernel * square).sum(1, keepdim=True)
    return kernel, kernel * (square - spread) / width**3


def along(x: Tensor, axis: int, kernel: Tensor, padding: str) -> Tensor:
    """Each row of x [R, C, *] convolved along an axis with its own symmetric kernel [R, 2r + 1].

    By matrix products, which no library's convolution matches for kernels as long as images; a long
    axis in blocks of one matrix.
    """
    size = x.shape[axis]
    kernel = _within(kernel, size, padding).to(x.dtype)
    lanes = x.movedim(axis, -1)
    flat = lanes.reshape(len(x), -1, size)
    with arithmetic(FLOAT32, x.device):
        if size <= max(BLOCK, kernel.shape[1]):
            blurred = flat @ _whole(kernel, size, padding)
        else:
            blurred = _in_blocks(flat, kernel, padding)
    return blurred.reshape(lanes.shape).movedim(-1, axis).contiguous()


def _whole(kernel: Tensor, size: int, padding: str) -> Tensor:
    """Matrices [R, size, size] that convolve a whole axis, with its ends by their padding."""
    reach = kernel.shape[1] // 2
    bands = _bands(kernel, size)
    matrices = bands[:, reach : reach + size].clone()
    if padding == "replicate":
        matrices[:, 0] += bands[:, :reach].sum(1)
        matrices[:, -1] += bands[:, reach + size :].sum(1)
    return matrices


def _in_blocks(flat: Tensor, kernel: Tensor, padding: str) -> Tensor:
    """Lanes [R, L, size] convolved block by block."""
    size, reach = flat.shape[2], kernel.shape[1] // 2
    block = max(BLOCK, 2 * reach)
    blocks = -(-size // block)
    flat = functional.pad(flat, (reach, reach), PADDINGS[padding])
    # What fills the last block is cut off again.
    flat = functional.pad(flat, (0, blocks * block - size))
    windows = flat.unfold(2, block + 2 * reach, block)
    blurred = windows.flatten(1, 2) @ _bands(kernel, block)
    return blurred.reshape(len(flat), -1, blocks * block)[..., :size]


def _within(kernel: Tensor, size: int, padding: str) -> Tensor:
    """The kernel without taps that only ever meet the padding; their sum where it repeats."""
    reach = kernel.shape[1] // 2
    over = reach - (size - 1)
    if over <= 0:
        return kernel
    inner = kernel[:, over : kernel.shape[1] - over].clone()
    if padding == "replicate":
        inner[:, 0] += kernel[:, :over].sum(1)
        inner[:, -1] += kernel[:, kernel.shape[1] - over :].sum(1)
    return inner


def _bands(kernel: Tensor, block: int) -> Tensor:
    """Matrices [R, block + 2r, block] that convolve a padded block with each kernel [R, 2r + 1]."""
    count = kernel.shape[1]
    place = torch.arange(block + count - 1, device=kernel.device)[:, None]
    tap = place - torch.arange(block, device=kernel.device)
    inside = (tap >= 0) & (tap < count)
    bands: Tensor = kernel[:, tap.clamp(0, count - 1)] * inside
    return bands
