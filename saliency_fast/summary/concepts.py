"""Concepts: directions of a layer's channels that recur in the evidence of many inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine import recipe as engine
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.cam import Canvas, resize
from saliency_fast.methods.parts import checks
from saliency_fast.model.layers import At
from saliency_fast.model.targets import PREDICTED, Target
from saliency_fast.summary.regions import connected

NMF, KMEANS, AUTO = "nmf", "kmeans", "auto"
METHODS = (AUTO, NMF, KMEANS)
PROTOTYPES = 3
"""Examples that stand for a concept."""
HALF = 0.5
"""The share of a map's peak that bounds the box of a prototype."""
ROWS = 20_000
"""Positions that directions are learned from, at most; those with the largest weight."""
SWEEPS, RESIDUAL = 1000, 1e-12
"""Sweeps of coordinate descent at most, and the relative change at which it ends."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerEvidence:
    """A method: a layer's activations and gradients as `extras` [B, C, *s], and their product."""

    layer: str = "auto"
    grid: tuple[int, ...] | None = None
    special: int | None = None
    name = "layer_evidence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checks.grid(self.grid))

    def recipe(self) -> engine.Recipe:
        return engine.RoundsRecipe(self._rounds, 1, at_input=True, layers=self.layer)

    def _rounds(self, context: engine.RoundContext) -> engine.Rounds:
        if context.scores.shape[1] > 1:
            raise InputError("target must be one per example: got several; take one of them")
        canvas = Canvas(context, False, self.grid, self.special)
        parts: dict[str, list[Tensor]] = {"activations": [], "gradients": []}

        def each(rows: slice, result: engine.RoundResult) -> None:
            (output, *_) = canvas.of_layers(result)
            parts["activations"].append(canvas.read(0, output).detach())
            parts["gradients"].append(canvas.read(0, result.grads[0][0]).detach())

        yield canvas.inputs_round(each, gradients=True)
        extras = {name: torch.cat(several)[:, None] for name, several in parts.items()}
        evidence = (extras["activations"] * extras["gradients"]).sum(2)
        return engine.Maps((evidence,), extras=extras)


@dataclass(frozen=True)
class Prototype:
    """An example in which a concept is strong.

    Attributes:
        example: The index of the example.
        box: The half-open corners, starts and then stops, of the connected positions around the
            concept's peak that are above half of it.
        share: The concept's share of the evidence, as in `Concepts.shares`.
    """

    example: int
    box: tuple[int, ...]
    share: float


@dataclass(frozen=True, eq=False)
class Concepts:
    """K directions in a layer's channels and their shares of the evidence of B examples.

    Evidence is activations times the score's gradients. All tensors are float64 on the CPU.

    Attributes:
        directions: [K, C], of length 1, the concept with the largest share first.
        maps: Each concept's evidence [B, K, *spatial], resized linearly to the input.
        shares: The signed sum of each concept's evidence, divided by the magnitude of all [B, K].
        rest: The share of the evidence that no concept holds [B].
        explained: 1 - the magnitude of the evidence that the concepts miss, position by position,
            divided by the magnitude of all [B]: 1 is everything, below 0 is worse than nothing.
        prototypes: The examples in which each concept is strongest.
        classes: The explained classes, int64 [B], or None.
        layer: The name of the layer.
        method: "nmf" or "kmeans".
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
        """The share of evidence for less evidence against the target, [B]."""
        return self.shares.sum(1) + self.rest

    def by_class(self) -> dict[int, Tensor]:
        """The mean share [K] of each concept by class; InputError if the target is no class."""
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
    """Finds concepts of a layer in the evidence for the target (Fel, 2023; Ghorbani, 2019).

    The channel vectors of all positions of all inputs, weighted by the positive part of their
    evidence, are factorised or clustered. A concept has no name: look at its prototypes. Where
    `explained` is low, activations are no sums of few directions, and shares mean little. Needs the
    extra 'concepts' (scikit-learn).

    Args:
        model: The model.
        inputs: The inputs [B, C, *spatial].
        at: A layer or its name; "auto" is the last spatial one.
        count: The number K of concepts.
        method: "nmf" where no activation is negative, "kmeans" for clusters, or "auto".
        seed: The same seed gives the same concepts.
        grid, special: A transformer's grid and number of special tokens, as in `GradCAM`.
        target, forward_args, forward_kwargs: As in `explain`.
        memory_budget: As in `Engine`.

    Returns:
        The concepts, their maps and shares.

    Raises:
        InputError: For more concepts than the activations hold, and for unknown arguments.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 1)
        ... )
        >>> for weight in model.parameters():
        ...     _ = torch.nn.init.constant_(weight, 1.0)
        >>> found = concepts(model, torch.ones(3, 1, 2, 2), None, count=1)
        >>> found.shares.shape, found.maps.shape, float(found.explained.mean().round(decimals=3))
        (torch.Size([3, 1]), torch.Size([3, 1, 2, 2]), 1.0)
    """
    checks.integer("count", count, 1)
    checks.choice("method", method, METHODS)
    checks.integer("seed", seed, 0)
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    evidence = LayerEvidence(grid=grid, special=special)
    explain = Engine(model, evidence, at=at, memory_budget=memory_budget, hashes=False)
    result = explain(inputs, target, forward_args=forward_args, forward_kwargs=forward_kwargs)
    axes = result.axes()
    size = inputs.shape[1:] if axes is None else axes.size(inputs.shape)
    return _concepts(result, tuple(size), count, method, seed)


def _concepts(
    result: Attribution, size: tuple[int, ...], count: int, method: str, seed: int
) -> Concepts:
    """The concepts of a layer's activations and gradients, for inputs of a spatial size."""
    activations, gradients = result.extras["activations"], result.extras["gradients"]
    vectors, slopes = _vectors(activations), _vectors(gradients)
    evidence = (vectors * slopes).sum(1)
    if method == AUTO:
        method = NMF if vectors.min() >= 0 else KMEANS
    elif method == NMF and vectors.min() < 0:
        raise InputError(
            "method='nmf' needs activations that are not negative, and this layer's are: name one "
            "behind a ReLU, or use 'kmeans'"
        )
    units = directions(vectors, np.maximum(evidence, 0.0), count, method, seed)
    # Where activations are sums of concepts and a remainder, so is the evidence.
    parts = amounts(vectors, units, method) * (slopes @ units.T)
    order = np.argsort(-parts.sum(0), kind="stable")
    shape = (len(activations), *activations.shape[2:])
    maps = torch.from_numpy(parts[:, order]).view(*shape, count).movedim(-1, 1)
    whole = torch.from_numpy(evidence).view(shape)
    amount = whole.abs().flatten(1).sum(1)
    scale = torch.where(amount > 0, amount, 1.0)
    shares = maps.flatten(2).sum(2) / scale[:, None]
    missed = (whole - maps.sum(1)).abs().flatten(1).sum(1)
    large = resize(maps.flatten(0, 1).contiguous(), size).view(len(whole), count, *size)
    return Concepts(
        directions=torch.from_numpy(units[order]),
        maps=large,
        shares=shares,
        rest=whole.flatten(1).sum(1) / scale - shares.sum(1),
        explained=torch.where(amount > 0, 1.0 - missed / scale, torch.nan),
        prototypes=tuple(_prototypes(large[:, k], shares[:, k]) for k in range(count)),
        classes=None if result.classes is None else result.classes.cpu(),
        layer=", ".join(result.provenance.at or ()),
        method=method,
    )


def _vectors(maps: Tensor) -> Array:
    """Maps [B, C, *s] as vectors [B * positions, C]."""
    rows: Array = maps.double().cpu().flatten(2).mT.reshape(-1, maps.shape[1]).numpy()
    return rows


def _prototypes(maps: Tensor, shares: Tensor) -> tuple[Prototype, ...]:
    """The examples in which one concept [B, *spatial] has its largest share."""
    result = []
    for b in shares.argsort(descending=True, stable=True)[:PROTOTYPES].tolist():
        one = maps[b].numpy()
        if one.max() <= 0:
            continue
        label = connected(one >= HALF * one.max())
        own = np.argwhere(label == label.flat[one.argmax()])
        box = (*own.min(0).tolist(), *(own.max(0) + 1).tolist())
        result.append(Prototype(b, box, float(shares[b])))
    return tuple(result)


def directions(vectors: Array, weights: Array, count: int, method: str, seed: int) -> Array:
    """Unit directions [K, C]: additive parts (Lee and Seung, 1999) or centres of clusters."""
    kept = weights > 0
    if int(kept.sum()) < count:
        raise InputError(
            f"count must be at most the positions with evidence for the target: got {count}, and "
            f"there are {int(kept.sum())}; use fewer concepts or more inputs"
        )
    order = np.argsort(-weights, kind="stable")[:ROWS]
    order = order[kept[order]]
    vectors, weights = vectors[order], weights[order] / weights[order].max()
    if method == NMF:
        units = _unit(_nmf(vectors, weights, count, seed))
    else:
        learner = _learn("cluster").KMeans(count, n_init=10, random_state=seed)
        learner.fit(_unit(vectors), sample_weight=weights)
        units = _unit(learner.cluster_centers_.astype(np.float64))
    several = len(np.unique(units[units.any(1)].round(9), axis=0))
    if several < count:
        raise InputError(
            f"count must be at most the different directions of the activations: got {count}, and "
            f"there are {several}; use count={max(1, several)} or more inputs"
        )
    return units


def amounts(vectors: Array, units: Array, method: str) -> Array:
    """The amounts [N, K] of directions: non-negative least squares, or of the nearest centre."""
    if method == NMF:
        factorization = _learn("decomposition").non_negative_factorization
        of = {"H": units, "n_components": len(units), "update_H": False}
        result: Array = factorization(vectors, **of, tol=RESIDUAL, max_iter=SWEEPS)[0]
        return result
    along = vectors @ units.T
    is_nearest = np.arange(len(units)) == along.argmax(1)[:, None]
    return np.where(is_nearest, np.maximum(along, 0.0), 0.0)


def _unit(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Array = vectors / np.where(length > 0, length, 1.0)
    return units


def _nmf(vectors: Array, weights: Array, count: int, seed: int) -> Array:
    if count > min(vectors.shape):
        raise InputError(
            f"count must be at most the layer's channels, {vectors.shape[1]}, and the positions "
            f"with evidence for the target, {len(vectors)}: got {count}; use fewer concepts"
        )
    of = {"init": "nndsvda", "max_iter": 2000, "tol": 1e-5}
    learner = _learn("decomposition").NMF(count, random_state=seed, **of)
    # A row times the root of its weight has that weight in the squared error.
    parts: Array = learner.fit(vectors * np.sqrt(weights)[:, None]).components_
    return parts.astype(np.float64)


def _learn(module: str) -> ModuleType:
    """A module of scikit-learn, which is an extra."""
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise InputError(
            "concepts need scikit-learn, which is not installed: use pip install "
            "'saliency-fast[concepts]'"
        ) from error
