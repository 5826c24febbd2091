"""Concepts: what a layer sees again and again where it speaks for the target, over many inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts.canvas import resize
from saliency_fast.model.layers import At
from saliency_fast.model.targets import PREDICTED, Target
from saliency_fast.summary.factors import AUTO, KMEANS, METHODS, NMF, Array, amounts, directions
from saliency_fast.summary.grouping import connected
from saliency_fast.summary.sight import LayerSight

SHOWN = 3
"""Examples that stand for a concept."""
HALF = 0.5
"""Of a map's peak, where the box of a concept ends."""


@dataclass(frozen=True)
class Prototype:
    """An example in which a concept is strong; box: of the connected places around its peak above
    half of it, starts and then stops, half-open. share: as in `Concepts.shares`.
    """

    example: int
    box: tuple[int, ...]
    share: float


@dataclass(frozen=True, eq=False)
class Concepts:
    """Directions in a layer's channels and what they account for.

    The evidence of a place is its activations times the score's gradients there. Where activations
    are sums of concepts and a remainder, so is the evidence.

    Tensors are on the CPU. directions: float64 [K, C], of length 1, the concept with the largest
    share first. maps: float64 [B, K, *spatial], each concept's evidence, resized linearly to the
    input. shares: float64
    [B, K], its sum over the places, of the sum of the evidence's amounts; signed. rest: float64
    [B], the remainder's. total: float64 [B], their sum, of all evidence for and against. explained:
    float64 [B], 1 - what the concepts miss of the evidence, place by place: 1 is all, and under 0
    is worse than nothing. prototypes: for each concept, where it is strongest. classes: the
    explained ones, int64 [B], or None. layer: its name.
    """

    directions: Tensor
    maps: Tensor
    shares: Tensor
    rest: Tensor
    explained: Tensor
    prototypes: tuple[tuple[Prototype, ...], ...]
    classes: Tensor | None
    layer: str
    method: str

    @property
    def total(self) -> Tensor:
        return self.shares.sum(1) + self.rest

    def by_class(self) -> dict[int, Tensor]:
        """The mean share [K] of each concept in the examples of each class."""
        if self.classes is None:
            raise InputError("classes are unknown: the target is no class; see `shares`")
        numbers = torch.unique(self.classes).tolist()
        return {one: self.shares[self.classes == one].mean(0) for one in numbers}

    def __repr__(self) -> str:
        mean = ", ".join(f"{one:.0%}" for one in self.shares.mean(0).tolist())
        return (
            f"<Concepts {self.method} at {self.layer}: shares {mean}; explained "
            f"{float(self.explained.mean()):.0%}>"
        )


def concepts(
    model: Callable[..., Any],
    inputs: Tensor,
    target: Target = PREDICTED,
    *,
    at: At = "auto",
    count: int = 5,
    method: str = AUTO,
    seed: int = 0,
    grid: tuple[int, ...] | None = None,
    special: int | None = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    memory_budget: int | str | None = None,
) -> Concepts:
    """Finds `count` concepts of a layer in what speaks for the target, after CRAFT (Fel, 2023) and
    ACE (Ghorbani, 2019); needs the extra 'concepts' (scikit-learn).

    at: a layer or its name, "auto" for the last spatial one. The channel vectors of all places of
    all inputs, weighted by the positive part of their evidence, are factorised by "nmf" (where no
    activation is negative, "auto" takes it) or their directions clustered by "kmeans". The same
    seed gives the same concepts. grid, special: of a transformer's tokens, as in `GradCAM`.

    A concept has no name: look at its prototypes. Where activations are no sums of few directions,
    `explained` is low, and shares mean little.
    """
    _check(count, method, seed)
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    sight = LayerSight(grid=grid, special=special)
    engine = Engine(model, sight, at=at, memory_budget=memory_budget, hashes=False)
    found = engine(inputs, target, forward_args=forward_args, forward_kwargs=forward_kwargs)
    axes = found.axes()
    size = inputs.shape[1:] if axes is None else axes.size(inputs.shape)
    return _found(found, tuple(size), count, method, seed)


def _found(
    found: Attribution, size: tuple[int, ...], count: int, method: str, seed: int
) -> Concepts:
    """The concepts of a layer's activations and gradients, for inputs of a spatial size."""
    activations, gradients = found.extras["activations"], found.extras["gradients"]
    vectors, slopes = _rows(activations), _rows(gradients)
    evidence = (vectors * slopes).sum(1)
    if method == AUTO:
        method = NMF if vectors.min() >= 0 else KMEANS
    elif method == NMF and vectors.min() < 0:
        raise InputError(
            "method='nmf' needs activations that are not negative, and this layer's are: name one "
            "behind a ReLU, or use 'kmeans'"
        )
    units = directions(vectors, np.maximum(evidence, 0.0), count, method, seed)
    # What each concept gives to each place; the largest sum first.
    parts = amounts(vectors, units, method) * (slopes @ units.T)
    order = np.argsort(-parts.sum(0), kind="stable")
    places = (len(activations), *activations.shape[2:])
    maps = torch.from_numpy(parts[:, order]).view(*places, count).movedim(-1, 1)
    whole = torch.from_numpy(evidence).view(places)
    return _concepts(
        maps,
        whole,
        size,
        directions=torch.from_numpy(units[order]),
        classes=None if found.classes is None else found.classes.cpu(),
        layer=", ".join(found.provenance.at or ()),
        method=method,
    )


def _concepts(maps: Tensor, whole: Tensor, size: tuple[int, ...], **about: Any) -> Concepts:
    """Concepts with maps [B, K, *s] at a layer whose evidence is `whole` [B, *s]."""
    batch, count = maps.shape[:2]
    large = resize(maps.flatten(0, 1).contiguous(), size).view(batch, count, *size)
    amount = whole.abs().flatten(1).sum(1)
    scale = torch.where(amount > 0, amount, 1.0)
    shares = maps.flatten(2).sum(2) / scale[:, None]
    missed = (whole - maps.sum(1)).abs().flatten(1).sum(1)
    return Concepts(
        maps=large,
        shares=shares,
        rest=whole.flatten(1).sum(1) / scale - shares.sum(1),
        explained=torch.where(amount > 0, 1.0 - missed / scale, torch.nan),
        prototypes=tuple(_prototypes(large[:, k], shares[:, k]) for k in range(count)),
        **about,
    )


def _check(count: object, method: object, seed: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count must be a whole number, 1 or more: got {count!r}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number, 0 or more: got {seed!r}")


def _rows(maps: Tensor) -> Array:
    """Maps [B, C, *s] as vectors [B * places, C]."""
    rows: Array = maps.double().cpu().flatten(2).mT.reshape(-1, maps.shape[1]).numpy()
    return rows


def _prototypes(maps: Tensor, shares: Tensor) -> tuple[Prototype, ...]:
    """The examples in which one concept [B, *spatial] has its largest share."""
    found = []
    for b in shares.argsort(descending=True, stable=True)[:SHOWN].tolist():
        peak = maps[b].max()
        if not bool(peak > 0):
            continue
        number = connected((maps[b] >= HALF * peak)[None])[0]
        own = (number == number.flatten()[maps[b].argmax()]).nonzero()
        box = (*own.amin(0).tolist(), *(own.amax(0) + 1).tolist())
        found.append(Prototype(b, box, float(shares[b])))
    return tuple(found)
