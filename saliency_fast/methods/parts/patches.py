"""Patches: which tokens of an input are places in it, and their weights as a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.methods.parts.canvas import resize
from saliency_fast.model.layout import Space, patch_grid, tokens_at


@dataclass(frozen=True)
class Patches:
    """The tokens of inputs that lie in a `grid` over their places of `size`; of token inputs, where
    `grid` is None, every token that the input has.

    index: the token at each point, or of each token of the input; shape: of one example's map, as
    the input has its axes. pooled: whether there is no token but patches, so that the model must
    read its answer of all.
    """

    index: tuple[int, ...]
    grid: tuple[int, ...] | None
    size: tuple[int, ...]
    shape: tuple[int, ...]
    pooled: bool

    @classmethod
    def of(
        cls,
        tokens: int,
        space: Space,
        special: int | None,
        grid: tuple[int, ...] | None,
        model: object = None,
    ) -> Patches:
        """Finds the patches among so many tokens for inputs of a space."""
        size = space.size
        if len(size) == 1 and grid is None and tokens - abs(special or 0) == size[0]:
            start = max(special or 0, 0)
            index = tuple(range(start, start + size[0]))
            return cls(index, None, size, size, False)
        known = patch_grid(model, size)
        if (
            (known is not None and grid is None and special is None)
            and tokens < math.prod(known)
            and space.inside.sequence(tokens, space.axes.places, space.number) is None
        ):
            # Windows that are folded into the batch look like heads that are.
            raise InputError(
                f"attention is over {tokens} tokens, and the model cuts {math.prod(known)} "
                "patches: weights of windows have no place in the input, so use another method; "
                "if it is over all of the input, pass grid=(rows, columns)"
            )
        found = tokens_at("attention", tokens, space, grid, special, model)
        pooled = len(found.index) == tokens
        return cls(found.index, found.grid, size, space.of_map, pooled)

    def map(self, weights: Tensor) -> Tensor:
        """Weights [R, T] as [R, T'] of the input's own tokens, or as maps [R, *shape]."""
        weights = weights[:, torch.tensor(self.index, device=weights.device)]
        if self.grid is None:
            return weights
        resized = resize(weights.reshape(len(weights), *self.grid), self.size)
        return resized.reshape(len(weights), *self.shape)
