"""Inpainting: missing positions as weighted means of their neighbours (Rong, 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError, InputTypeError

TOLERANCE = 1e-8
"""The relative residual of the linear system at which the iteration stops."""
SWEEPS = 200
"""The most iterations; 10 to 30 are usual, whatever the size of the holes."""
ELEMENTS = {"cpu": 2**19, "cuda": 2**23}
"""Elements that are solved at once, with about 100 bytes each: those of a CPU fit its cache."""


def inpaint(x: Tensor, missing: Tensor) -> Tensor:
    """Fills the `missing` positions, bool [N | 1, *spatial], of x [N, C, *spatial].

    Each missing position is the weighted mean of its neighbours, missing or not: the linear system
    of noisy linear imputation (Rong, 2022), without its noise. A weight halves for each axis along
    which the neighbour differs: 1/6 for direct and 1/12 for diagonal neighbours of a pixel. Where
    everything is missing, it is the channel's mean. Solved in float64 by conjugate gradients with a
    multigrid cycle as preconditioner: other solvers are several times slower for large holes.
    """
    if not x.is_floating_point() or missing.dtype != torch.bool:
        raise InputTypeError(
            f"x must be floating and missing bool: got {x.dtype} and {missing.dtype}"
        )
    if x.dim() < 3:
        raise InputError(
            "inpainting needs axes behind the channels, whose positions have neighbours: got "
            f"{list(x.shape)}; use a replacement such as 'mean', or layout='BT' for time series"
        )
    if missing.shape[1:] != x.shape[2:] or len(missing) not in (1, len(x)) or len(x) == 0:
        raise InputError(
            f"missing must be {[len(x), *x.shape[2:]]}: got {list(missing.shape)} for x "
            f"{list(x.shape)}"
        )
    rows = max(1, ELEMENTS.get(x.device.type, 2**19) // max(1, x[0].numel()))
    parts = []
    for start in range(0, len(x), rows):
        own = slice(start, start + rows)
        parts.append(_filled(x[own], missing if len(missing) == 1 else missing[own]))
    return torch.cat(parts)


def _filled(x: Tensor, missing: Tensor) -> Tensor:
    hole = missing[:, None]
    wide, axes = x.double(), tuple(range(2, x.dim()))
    count = (~hole).sum(axes, keepdim=True)
    observed = wide.masked_fill(hole, 0.0).sum(axes, keepdim=True) / count.clamp(min=1)
    # The system is linear and ignores an added constant: the solution in units of the range of the
    # observed values, less their mean, avoids rounding errors.
    mean = torch.where(count > 0, observed, wide.mean(axes, keepdim=True))
    observed = (wide - mean).masked_fill(hole, 0.0)
    unit = observed.abs().amax(axes, keepdim=True)
    observed = observed / torch.where(unit == 0, 1.0, unit)
    right = _binomial(observed).masked_fill_(~hole, 0.0)
    filled = _solved(_levels(hole), right) * unit + mean
    return torch.where(hole, filled.to(x.dtype), x)


def _solved(levels: list[_Level], right: Tensor) -> Tensor:
    """The solutions for `right` [N, C, *], none of which depends on the rest of the batch."""
    solution, residual = torch.zeros_like(right), right
    least = TOLERANCE * _dot(right, right).sqrt()
    direction = preconditioned = _cycle(levels, residual.float()).double()
    slope = _dot(residual, preconditioned)
    for _ in range(SWEEPS):
        active = _dot(residual, residual).sqrt() > least
        if not bool(active.any()):
            return solution
        product = levels[0].apply(direction)
        step = torch.where(active, slope / _dot(direction, product), 0.0)
        solution, before = solution + step * direction, residual
        residual = residual - step * product
        preconditioned = _cycle(levels, residual.float()).double()
        # Polak and Ribiere's form, since the float32 cycle differs a little between iterations.
        beta = torch.where(active, _dot(preconditioned, residual - before) / slope, 0.0)
        direction = preconditioned + beta * direction
        slope = torch.where(active, _dot(residual, preconditioned), 1.0)
    raise RuntimeError(f"inpainting did not converge in {SWEEPS} iterations")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of fields [N, C, *] as [N, C, 1, ...]."""
    return (a * b).sum(tuple(range(2, a.dim())), keepdim=True)


@dataclass(frozen=True, eq=False)
class _Level:
    """One grid of the multigrid cycle, float32: the product of the system's matrix with fields
    [N, C, *size], the damped inverse of its diagonal, and 1 at unknowns, 0 elsewhere.
    """

    apply: Callable[[Tensor], Tensor]
    smooth: Tensor
    inside: Tensor | float = 1.0


def _levels(hole: Tensor) -> list[_Level]:
    """Grids from that of `hole` [N, 1, *] to a single position, each half as fine as the last."""
    inside, centre = hole.float(), float(2 ** (hole.dim() - 2))
    degree = _binomial(torch.ones_like(inside[:1]))
    smooth = _damped((degree - centre) * inside, (_binomial(inside) - centre) * inside)
    levels = [_Level(lambda u: (degree * u - _binomial(u)) * inside, smooth, inside)]
    size = hole.shape[2:]
    while max(size) > 1:
        stencil = _coarser(levels[-1], len(hole), size)
        size = stencil.shape[2:]
        middle = stencil.shape[1] // 2
        own = stencil[:, middle : middle + 1]
        others = stencil.abs().sum(1, keepdim=True) - own.abs()
        levels.append(_Level(partial(_stencilled, stencil), _damped(own, others)))
    return levels


def _stencilled(stencil: Tensor, u: Tensor) -> Tensor:
    """Sums of the 3 ** D neighbours, weighted by the stencil [N, 3 ** D, *size], zero outside."""
    total, dims = torch.zeros_like(u), u.dim() - 2
    windows = functional.pad(u, (1, 1) * dims)
    for axis in range(2, u.dim()):
        windows = windows.unfold(axis, 3, 1)
    for number, step in enumerate(itertools.product(range(3), repeat=dims)):
        near = windows
        for at in step:
            near = near.select(u.dim(), at)
        total.addcmul_(stencil[:, number : number + 1].expand_as(u), near)
    return total


def _damped(own: Tensor, others: Tensor) -> Tensor:
    """1 / diagonal, damped so that a sweep amplifies no error (Gershgorin's bound is 5/3)."""
    weight = torch.maximum(own, 0.6 * (own + others))
    return torch.where(own > 0, 1.0 / weight, 0.0)


def _coarser(level: _Level, rows: int, size: torch.Size) -> Tensor:
    """The stencil [N, 3 ** D, *] of the grid half as fine, by Galerkin's product."""
    coarse, device = tuple((one + 1) // 2 for one in size), level.smooth.device
    dims = len(size)
    grid = torch.meshgrid(*(torch.arange(one, device=device) for one in coarse), indexing="ij")
    stencil = torch.zeros((rows, 3**dims, *coarse), device=device)
    for colour in itertools.product(range(3), repeat=dims):
        hit = torch.ones(coarse, dtype=torch.bool, device=device)
        number = torch.zeros(coarse, dtype=torch.int64, device=device)
        for own, at in zip(colour, grid, strict=True):
            hit &= at % 3 == own
            number = 3 * number + (own - at + 1) % 3
        unit = _longer(hit.float()[None, None], size).expand(rows, 1, *size)
        response = _shorter(level.apply(unit * level.inside))
        stencil.scatter_(1, number.expand(rows, 1, *coarse), response)
    return stencil


def _cycle(levels: list[_Level], right: Tensor) -> Tensor:
    """An approximate solution for `right`, float32, by one multigrid cycle."""
    level, size = levels[0], right.shape[2:]
    u = level.smooth * right
    if len(levels) == 1:
        return u
    below = _cycle(levels[1:], _shorter(right - level.apply(u)))
    u = u + _longer(below, size) * level.inside
    return u + level.smooth * (right - level.apply(u))


def _binomial(u: Tensor) -> Tensor:
    """Sums of neighbours by the weights 1, 2, 1 along every axis, zero outside."""
    for axis in range(2, u.dim()):
        total = 2.0 * u
        length = u.shape[axis] - 1
        if length > 0:
            total.narrow(axis, 0, length).add_(u.narrow(axis, 1, length))
            total.narrow(axis, 1, length).add_(u.narrow(axis, 0, length))
        u = total
    return u


def _longer(coarse: Tensor, size: tuple[int, ...]) -> Tensor:
    """A field of the coarse grid interpolated linearly on the fine one."""
    for axis, length in enumerate(size, start=2):
        between, last = coarse.clone(), coarse.shape[axis] - 1
        between.narrow(axis, 0, last).add_(coarse.narrow(axis, 1, last)).mul_(0.5)
        pairs = torch.stack([coarse, between], axis + 1)
        coarse = pairs.flatten(axis, axis + 1).narrow(axis, 0, length)
    return coarse


def _shorter(fine: Tensor) -> Tensor:
    """A field of the fine grid restricted to the coarse one: the transpose of `_longer`."""
    for axis in range(2, fine.dim()):
        if fine.shape[axis] % 2:
            fine = functional.pad(fine, (0, 0) * (fine.dim() - 1 - axis) + (0, 1))
        even, odd = fine.unfold(axis, 2, 2).unbind(-1)
        half, last = odd / 2.0, odd.shape[axis] - 1
        fine = even + half
        fine.narrow(axis, 1, last).add_(half.narrow(axis, 0, last))
        fine.narrow(axis, last, 1).add_(half.narrow(axis, last, 1))
    return fine
