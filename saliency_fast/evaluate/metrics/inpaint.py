"""Inpainting: missing places as the weighted means of their neighbours."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError, InputTypeError

TOLERANCE = 1e-8
"""Relative residual of the linear system at which a solution stands."""
SWEEPS = 200
"""Iterations at most; 10 to 30 are usual, whatever the size of the holes."""
ELEMENTS = {"cpu": 2**19, "cuda": 2**23}
"""Elements that are solved at once: about 100 bytes each, in the cache's reach on a CPU."""


def inpaint(x: Tensor, missing: Tensor) -> Tensor:
    """Fills the `missing` places, bool [N | 1, *spatial], of x [N, C, *spatial].

    Each missing place is the weighted mean of its neighbours, missing or not, all channels alike:
    the linear system of noisy linear imputation (Rong, 2022), without its noise. Weights fall by
    half for each axis along which a neighbour lies off: 1/6 for direct and 1/12 for diagonal
    neighbours of a pixel, 1/2 in 1-D, 1/14, 1/28 and 1/56 in a volume; neighbours outside of the
    image do not count. Where everything is missing, it is the channel's mean. Solved in float64
    by conjugate gradients with a multigrid cycle as preconditioner.
    """
    _check(x, missing)
    rows = max(1, ELEMENTS.get(x.device.type, 2**19) // max(1, x[0].numel()))
    parts = []
    for start in range(0, len(x), rows):
        own = slice(start, start + rows)
        parts.append(_filled(x[own], missing if len(missing) == 1 else missing[own]))
    return torch.cat(parts)


def need_axes(x: Tensor) -> None:
    """Raises where places have no neighbours."""
    if x.dim() < 3:
        raise InputError(
            f"inpainting needs axes behind the channels, whose places have neighbours: got "
            f"{list(x.shape)}; replace places by a substrate, or pass layout='BT' where they are "
            "steps of time"
        )


def _check(x: Tensor, missing: Tensor) -> None:
    if not x.is_floating_point() or missing.dtype != torch.bool:
        raise InputTypeError(
            f"x must be floating and missing bool: got {x.dtype} and {missing.dtype}"
        )
    need_axes(x)
    fits = missing.shape[1:] == x.shape[2:] and len(missing) in (1, len(x))
    if not fits or len(x) == 0:
        raise InputError(
            f"missing must be {[len(x), *x.shape[2:]]}: got {list(missing.shape)} for x "
            f"{list(x.shape)}"
        )


def _filled(x: Tensor, missing: Tensor) -> Tensor:
    hole = missing[:, None]
    wide, axes = x.double(), tuple(range(2, x.dim()))
    count = (~hole).sum(axes, keepdim=True)
    known = wide.masked_fill(hole, 0.0).sum(axes, keepdim=True) / count.clamp(min=1)
    # The system is linear and does not see a constant that is added: in units of the known values'
    # own range, nothing is lost in rounding.
    mean = torch.where(count > 0, known, wide.mean(axes, keepdim=True))
    known = (wide - mean).masked_fill(hole, 0.0)
    unit = known.abs().amax(axes, keepdim=True)
    known = known / torch.where(unit == 0, 1.0, unit)
    right = _binomial(known).masked_fill_(~hole, 0.0)
    found = _solved(_levels(hole), right) * unit + mean
    return torch.where(hole, found.to(x.dtype), x)


def _solved(levels: list[_Level], right: Tensor) -> Tensor:
    """The solution of each system of `right` [N, C, *], by conjugate gradients.

    Systems that are done stand still, so that none depends on its neighbours in the batch.
    """
    found, rest = torch.zeros_like(right), right
    least = TOLERANCE * _dot(right, right).sqrt()
    way = ahead = _cycle(levels, rest)
    slope = _dot(rest, ahead)
    for _ in range(SWEEPS):
        active = _dot(rest, rest).sqrt() > least
        if not bool(active.any()):
            return found
        along = levels[0].apply(way)
        step = torch.where(active, slope / _dot(way, along), 0.0)
        found, before, rest = found + step * way, rest, rest - step * along
        ahead = _cycle(levels, rest)
        # The cycle is float32, and so not quite the same each time: Polak and Ribiere's form.
        turn = torch.where(active, _dot(ahead, rest - before) / slope, 0.0)
        way, slope = ahead + turn * way, torch.where(active, _dot(rest, ahead), 1.0)
    raise RuntimeError(f"inpainting did not converge in {SWEEPS} iterations")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of fields [N, C, *] as [N, C, 1, ...]."""
    return (a * b).sum(tuple(range(2, a.dim())), keepdim=True)


@dataclass(frozen=True, eq=False)
class _Level:
    """One grid of the multigrid cycle: float32, for fields [N, C, *size].

    inside [N, 1, *size]: 1 at unknowns; degree [1, 1, *size]: the weight of all neighbours, of the
    finest grid; stencil [N, 3 ** D, *size]: what each neighbour counts, of coarser ones. smooth:
    the inverse of the diagonal, damped where neighbours weigh as much, zero where there is nothing.
    """

    inside: Tensor | None
    degree: Tensor | None
    stencil: Tensor | None
    smooth: Tensor

    def apply(self, u: Tensor) -> Tensor:
        """The system's left side; u is zero outside of the unknowns."""
        if self.inside is not None and self.degree is not None:
            return (self.degree * u - _binomial(u)) * self.inside
        assert self.stencil is not None
        total = torch.zeros_like(u)
        for number, near in enumerate(_neighbours(u)):
            total.addcmul_(self.stencil[:, number : number + 1].expand_as(u), near)
        return total

    def within(self, u: Tensor) -> Tensor:
        return u if self.inside is None else u * self.inside


def _levels(hole: Tensor) -> list[_Level]:
    """Grids from that of `hole` [N, 1, *] down to one place, each half as fine as the last."""
    inside, centre = hole.float(), float(2 ** (hole.dim() - 2))
    degree = _binomial(torch.ones_like(inside[:1]))
    own = (degree - centre) * inside
    levels = [_Level(inside, degree, None, _damped(own, (_binomial(inside) - centre) * inside))]
    size = hole.shape[2:]
    while max(size) > 1:
        stencil = _coarser(levels[-1], len(hole), size)
        size = stencil.shape[2:]
        middle = stencil.shape[1] // 2
        own = stencil[:, middle : middle + 1]
        others = stencil.abs().sum(1, keepdim=True) - own.abs()
        levels.append(_Level(None, None, stencil, _damped(own, others)))
    return levels


def _damped(own: Tensor, others: Tensor) -> Tensor:
    """1 / diagonal, damped so that no error grows by a sweep (Gershgorin's bound is 5/3)."""
    weight = torch.maximum(own, 0.6 * (own + others))
    return torch.where(own > 0, 1.0 / weight, 0.0)


def _coarser(level: _Level, rows: int, size: torch.Size) -> Tensor:
    """The stencil [N, 3 ** D, *] of the grid half as fine, by Galerkin's product: what the finer
    grid answers to every third coarse place in turn, whose answers do not meet.
    """
    coarse, device = tuple((one + 1) // 2 for one in size), level.smooth.device
    dims = len(size)
    place = torch.meshgrid(*(torch.arange(one, device=device) for one in coarse), indexing="ij")
    stencil = torch.zeros((rows, 3**dims, *coarse), device=device)
    for colour in itertools.product(range(3), repeat=dims):
        hit = torch.ones(coarse, dtype=torch.bool, device=device)
        number = torch.zeros(coarse, dtype=torch.int64, device=device)
        for own, at in zip(colour, place, strict=True):
            hit &= at % 3 == own
            number = 3 * number + (own - at + 1) % 3
        probe = _longer(hit.float()[None, None], size).expand(rows, 1, *size)
        answer = _shorter(level.apply(level.within(probe)))
        stencil.scatter_(1, number.expand(rows, 1, *coarse), answer)
    return stencil


def _cycle(levels: list[_Level], right: Tensor) -> Tensor:
    """About the solution for `right`, by one multigrid cycle in float32; float64 as it is."""
    return _descended(levels, right.float()).to(right.dtype)


def _descended(levels: list[_Level], right: Tensor) -> Tensor:
    level, size = levels[0], right.shape[2:]
    found = level.smooth * right
    if len(levels) == 1:
        return found
    rest = right - level.apply(found)
    below = _descended(levels[1:], _shorter(rest))
    found = found + level.within(_longer(below, size))
    return found + level.smooth * (right - level.apply(found))


def _binomial(u: Tensor) -> Tensor:
    """Sums of neighbours by the weights 1, 2, 1 along every axis, and of nothing outside."""
    for axis in range(2, u.dim()):
        total = 2.0 * u
        length = u.shape[axis] - 1
        if length > 0:
            total.narrow(axis, 0, length).add_(u.narrow(axis, 1, length))
            total.narrow(axis, 1, length).add_(u.narrow(axis, 0, length))
        u = total
    return u


def _neighbours(u: Tensor) -> list[Tensor]:
    """Views of u [N, C, *] moved by -1, 0 and 1 along every axis, zero outside: 3 ** D of them."""
    wide, size = functional.pad(u, (1, 1) * (u.dim() - 2)), u.shape[2:]
    steps = itertools.product(range(3), repeat=len(size))
    rest = (slice(None), slice(None))
    cuts = (tuple(slice(s, s + n) for s, n in zip(step, size, strict=True)) for step in steps)
    return [wide[rest + cut] for cut in cuts]


def _longer(coarse: Tensor, size: tuple[int, ...]) -> Tensor:
    """A field of the coarse grid on the fine one, linear between its places."""
    for axis, length in enumerate(size, start=2):
        if length == 1:
            continue
        odd = length // 2
        after = coarse.narrow(axis, 1, coarse.shape[axis] - 1)
        if length % 2 == 0:
            after = torch.cat([after, coarse.narrow(axis, coarse.shape[axis] - 1, 1)], axis)
        between = (coarse.narrow(axis, 0, odd) + after) / 2.0
        shape = (*coarse.shape[:axis], length, *coarse.shape[axis + 1 :])
        fine = coarse.new_empty(shape)
        fine[_every_second(axis, 0)] = coarse
        fine[_every_second(axis, 1)] = between
        coarse = fine
    return coarse


def _shorter(fine: Tensor) -> Tensor:
    """A field of the fine grid gathered on the coarse one: the transpose of `_longer`."""
    for axis in range(2, fine.dim()):
        length = fine.shape[axis]
        if length == 1:
            continue
        coarse, half = fine[_every_second(axis, 0)].clone(), fine[_every_second(axis, 1)] / 2.0
        odd, last = length // 2, coarse.shape[axis] - 1
        coarse.narrow(axis, 0, odd).add_(half)
        coarse.narrow(axis, 1, last).add_(half.narrow(axis, 0, last))
        if length % 2 == 0:
            coarse.narrow(axis, last, 1).add_(half.narrow(axis, odd - 1, 1))
        fine = coarse
    return fine


def _every_second(axis: int, first: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(first, None, 2))
