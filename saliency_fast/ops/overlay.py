"""Overlay: a map made visible. Percentile scale, colour and blend into uint8 frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define


def rank(count: int, percentile: float) -> int:
    """Number of the order statistic (0 the smallest) at `percentile` of `count` values."""
    return min(count - 1, math.ceil(percentile / 100.0 * (count - 1)))


def _percentile(values: Tensor, percentile: float) -> Tensor:
    ordered = values.flatten(1).abs().sort(dim=1).values
    return ordered[:, rank(ordered.shape[1], percentile)].clone()


def _percentile_samples() -> Iterator[Sample]:
    dtypes, shapes = (torch.float32, torch.float64), ((1, 1), (3, 7), (2, 64, 65), (1, 100_003))
    for dtype, shape, percentile in product(dtypes, shapes, (0.0, 50.0, 99.0, 100.0)):
        values = torch.randn(shape).to(dtype)
        yield Sample((values, percentile))
    yield Sample((torch.zeros(2, 50), 99.0))
    yield Sample((torch.randn(2, 500).round(), 90.0))


magnitude_percentile = define(
    schema="magnitude_percentile(Tensor values, float percentile) -> Tensor",
    reference=_percentile,
    fake=lambda values, percentile: values.new_empty(values.shape[0]),
    samples=_percentile_samples,
    triton="overlay",
    cuda=True,
)
"""magnitude_percentile(values [B, *], percentile in [0, 100]) -> [B]: the order statistic of
|values| at ceil(percentile / 100 (n - 1)), an element of the map itself and so equal bit for bit
on every backend."""


def _overlay(
    image: Tensor, values: Tensor, scale: Tensor, colors: Tensor, signed: bool, opacity: float
) -> Tensor:
    ratio = (values / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None]).clamp(-1.0, 1.0)
    ratio = ratio.float()
    shade = 0.5 + 0.5 * ratio if signed else ratio.abs()
    color = colors[torch.floor(shade * 255.0 + 0.5).long()].float()
    blend = (opacity * ratio.abs())[..., None]
    return torch.floor(image.float() * (1.0 - blend) + color * blend + 0.5).to(torch.uint8)


def _overlay_samples() -> Iterator[Sample]:
    colors = torch.randint(0, 256, (256, 3), dtype=torch.uint8)
    shapes, dtypes = ((1, 1), (3, 7), (2, 4099)), (torch.float32, torch.float64)
    for shape, signed, dtype in product(shapes, (False, True), dtypes):
        image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
        values = torch.randn(shape).to(dtype)
        yield Sample((image, values, values.abs().amax(1) * 0.7, colors, signed, 0.8))
    image = torch.randint(0, 256, (2, 9, 3), dtype=torch.uint8)
    yield Sample((image, torch.zeros(2, 9), torch.zeros(2), colors, True, 1.0))


overlay = define(
    schema="overlay(Tensor image, Tensor values, Tensor scale, Tensor colors, bool signed,"
    " float opacity) -> Tensor",
    reference=_overlay,
    fake=lambda image, *_: torch.empty_like(image),
    samples=_overlay_samples,
    triton="overlay",
)
"""overlay(image uint8 [B, P, 3], values [B, P], scale [B], colors uint8 [256, 3], signed, opacity
in [0, 1]) -> uint8 [B, P, 3]: colours value / scale (signed: -1 is the first colour and 1 the
last; else by magnitude) and lays it over the image the more opaquely the larger it is."""
