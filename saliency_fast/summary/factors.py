"""Factors: directions of a layer's channels that many places share, by scikit-learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saliency_fast.errors import InputError

NMF, KMEANS, AUTO = "nmf", "kmeans", "auto"
METHODS = (AUTO, NMF, KMEANS)
ROWS = 20_000
"""Places that directions are learned from, at most; those that weigh most."""
SWEEPS = 1000
"""Turns of the descent, at most."""

Array = NDArray[np.float64]


def directions(vectors: Array, weights: Array, count: int, method: str, seed: int) -> Array:
    """Unit directions [K, C] of vectors [N, C] that weigh [N]: parts that add up (NMF; Lee and
    Seung, 1999), or the centres of clusters of their directions (k-means).
    """
    kept = weights > 0
    if int(kept.sum()) < count:
        raise InputError(
            f"count must be at most the places that speak for the target: got {count}, and "
            f"{int(kept.sum())} do; use fewer concepts or more inputs"
        )
    order = np.argsort(-weights, kind="stable")[:ROWS]
    order = order[kept[order]]
    vectors, weights = vectors[order], weights[order] / weights[order].max()
    found = (_parts if method == NMF else _clusters)(vectors, weights, count, seed)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    units: Array = found / np.where(length > 0, length, 1.0)
    several = len(np.unique(units[length[:, 0] > 0].round(9), axis=0))
    if several < count:
        raise InputError(
            f"count asks for more concepts than the activations hold: got {count}, and only "
            f"{several} directions differ; use count={max(1, several)} or more inputs"
        )
    return units


def amounts(vectors: Array, units: Array, method: str) -> Array:
    """How much of each direction [K, C] is in each vector [N, C]: [N, K], none of it negative. Of
    clusters, only the nearest has any.
    """
    if method == NMF:
        return _non_negative(vectors, units)
    along = vectors @ units.T
    nearest = np.zeros_like(along)
    best = along.argmax(1)
    rows = np.arange(len(along))
    nearest[rows, best] = np.maximum(along[rows, best], 0.0)
    return nearest


def _parts(vectors: Array, weights: Array, count: int, seed: int) -> Array:
    if count > min(vectors.shape):
        raise InputError(
            f"count must be at most the layer's channels, {vectors.shape[1]}, and the places that "
            f"speak for the target, {len(vectors)}: got {count}; use fewer concepts"
        )
    learner = _learner("decomposition", "NMF")(
        count, init="nndsvda", max_iter=2000, tol=1e-5, random_state=seed
    )
    # A row times the root of its weight counts that much in the squared error.
    learner.fit(vectors * np.sqrt(weights)[:, None])
    parts: Array = learner.components_.astype(np.float64)
    return parts


def _clusters(vectors: Array, weights: Array, count: int, seed: int) -> Array:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    learner = _learner("cluster", "KMeans")(count, n_init=10, random_state=seed)
    learner.fit(vectors / np.where(length > 0, length, 1.0), sample_weight=weights)
    centres: Array = learner.cluster_centers_.astype(np.float64)
    return centres


def _non_negative(vectors: Array, units: Array) -> Array:
    """Non-negative least squares of all rows at once, one direction after another (coordinate
    descent), until nothing moves.
    """
    gram, along = units @ units.T, vectors @ units.T
    found = np.zeros_like(along)
    for _ in range(SWEEPS):
        moved = 0.0
        for k in range(len(units)):
            if gram[k, k] == 0:
                continue
            step = (along[:, k] - found @ gram[:, k]) / gram[k, k]
            new = np.maximum(found[:, k] + step, 0.0)
            moved = max(moved, float(np.abs(new - found[:, k]).max()))
            found[:, k] = new
        if moved <= 1e-12 * float(np.abs(along).max()):
            break
    return found


def _learner(module: str, name: str) -> type:
    from importlib import import_module

    try:
        found: type = getattr(import_module(f"sklearn.{module}"), name)
    except ImportError as error:
        raise InputError(
            "concepts need scikit-learn, which is not installed: use pip install "
            "'saliency-fast[concepts]'"
        ) from error
    return found
