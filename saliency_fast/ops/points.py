"""Points: the inputs of a launch, written in one pass from the batch they explain.

A launch is a table of rows. Row r is one point of example[r]; its other columns (alpha or
sample) say which. Any rows, in any order, may share a launch: steps of one example, examples of
one batch, or requests of many callers. Points are written contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from saliency_fast.ops import philox
from saliency_fast.ops.registry import Sample, define, rows_of

_DTYPES = (torch.float32, torch.float64)
_DRAWN = (((2, 1), 0), ((2, 3, 5, 7), 2), ((2, 4099), 2**33 + 1))
"""Shapes of samples that draw, and their first element."""


def fake_points(example: int) -> Callable[..., Tensor]:
    """The fake of a points op whose argument number `example` is the column of examples."""

    def fake(*args: Tensor) -> Tensor:
        return args[0].new_empty((args[example].shape[0], *args[0].shape[1:]))

    return fake


def _line(x: Tensor, baseline: Tensor, example: Tensor, alpha: Tensor) -> Tensor:
    start = baseline[example % baseline.shape[0]]
    return (start + rows_of(alpha.to(x.dtype), x.dim()) * (x[example] - start)).contiguous()


def _line_samples() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64):
        for shape in ((1, 1), (3, 7), (2, 3, 5, 9), (2, 4099)):
            x, baseline = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            example = torch.arange(5) % shape[0]
            alpha = torch.linspace(0, 1, 5, dtype=torch.float64)
            yield Sample((x, baseline, example, alpha))
            yield Sample((x, baseline[:1], example, alpha))
    x = torch.randn(2, 6, 8, 3).permute(0, 3, 1, 2)
    yield Sample((x, x.flip(2), torch.tensor([1, 0, 1]), torch.rand(3).double()))


line_points = define(
    schema="line_points(Tensor x, Tensor baseline, Tensor example, Tensor alpha) -> Tensor",
    reference=_line,
    fake=fake_points(2),
    samples=_line_samples,
    triton="points",
)
"""line_points(x [B, *], baseline [B | 1, *], example int64 [R], alpha float64 [R]) -> [R, *]:
baseline + alpha (x - baseline), the straight line of Integrated Gradients (Sundararajan, 2017)."""


def _noise(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    example: Tensor,
    sample: Tensor,
    antithetic: bool,
    first_element: int,
) -> Tensor:
    drawn = sample // 2 if antithetic else sample
    sign = 1.0 - 2.0 * (sample % 2) if antithetic else torch.ones_like(sample).double()
    noise = philox.normals(seed[example], drawn, x[0].numel(), first_element)
    noise = noise * (sign * sigma[example])[:, None]
    return (x[example] + noise.to(x.dtype).view(-1, *x.shape[1:])).contiguous()


def _noise_samples() -> Iterator[Sample]:
    example, sample = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 5, 2**32 - 1])
    sigma, seed = torch.tensor([0.3, 2.0]).double(), torch.tensor([3, 2**40 + 1])
    for dtype, (shape, first), antithetic in product(_DTYPES, _DRAWN, (False, True)):
        yield Sample(
            (torch.randn(shape, dtype=dtype), sigma, seed, example, sample, antithetic, first)
        )


noise_points = define(
    schema="noise_points(Tensor x, Tensor sigma, Tensor seed, Tensor example, Tensor sample,"
    " bool antithetic, int first_element) -> Tensor",
    reference=_noise,
    fake=fake_points(3),
    samples=_noise_samples,
    triton="points",
    cuda=True,
)
"""noise_points(x [B, *], sigma float64 [B], seed int64 [B], example, sample int64 [R], antithetic,
first_element) -> [R, *]: x + sigma * normal, the noisy copies of SmoothGrad (Smilkov, 2017).
Antithetic samples 2s and 2s + 1 share one draw with opposite signs. `first_element` is the number
of x's first element: the inputs of a tuple are numbered on from one to the next."""


def random_line(
    x: Tensor, baselines: Tensor, sigma: Tensor, seed: Tensor, example: Tensor, *which: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The drawn line of each row: (start [R, *], noisy end [R, *], alpha float64 [R]). which:
    sample int64 [R], first_element.
    """
    sample, first_element = which
    row, alpha = philox.line_draw(seed[example], sample, baselines.shape[0])
    end = _noise(x, sigma, seed, example, sample, False, first_element)
    return baselines[row], end, alpha


def _random_line_points(x: Tensor, *line: Any) -> Tensor:
    start, end, alpha = random_line(x, *line)
    return (start + rows_of(alpha.to(x.dtype), x.dim()) * (end - start)).contiguous()


def line_elements(x: Tensor, baselines: Tensor, rows: Tensor) -> int:
    """Elements of the baselines that lines can start at, of which there may be more."""
    return min(len(baselines), len(rows)) * x[0].numel()


def random_line_samples() -> Iterator[Sample]:
    """Calls of `random_line_points`; the accumulator of the same lines is tested on them too."""
    example, sample = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 5, 2**32 - 1])
    seed = torch.tensor([3, 2**40 + 1])
    sigmas = (torch.zeros(2).double(), torch.tensor([0.3, 2.0]).double())
    for dtype, (shape, first), sigma in product(_DTYPES, _DRAWN, sigmas):
        x, baselines = (torch.randn(n, *shape[1:], dtype=dtype) for n in (2, 7))
        yield Sample((x, baselines, sigma, seed, example, sample, first))


random_line_points = define(
    schema="random_line_points(Tensor x, Tensor baselines, Tensor sigma, Tensor seed,"
    " Tensor example, Tensor sample, int first_element) -> Tensor",
    reference=_random_line_points,
    fake=fake_points(4),
    samples=random_line_samples,
    triton="points",
    least=lambda x, baselines, sigma, seed, example, *_: (
        x.element_size()
        * (x.numel() + line_elements(x, baselines, example) + len(example) * x[0].numel())
    ),
)
"""random_line_points(x [B, *], baselines [M, *], sigma float64 [B], seed int64 [B], example, sample
int64 [R], first_element) -> [R, *]: start + alpha (x + sigma * normal - start) with a random row
of the baselines as start and a random alpha, as in expected gradients (Erion, 2021). sigma = 0
adds no noise. `accumulate_random_lines` draws the same lines again."""
