"""Patches: which tokens of an input are places in it, and their weights as a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.methods.parts.canvas import resize
from saliency_fast.model.layout import input_axis, patch_grid, token_grid


@dataclass(frozen=True)
class Patches:
    """The tokens of inputs [B, C, *size] that lie in a `grid`; of token inputs, where `grid` is
    None, every token that the input has.

    special: so many leading tokens are no patches, or trailing ones where negative.
    """

    special: int
    grid: tuple[int, ...] | None
    size: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokens: int,
        shape: tuple[int, ...],
        special: int | None,
        grid: tuple[int, ...] | None,
        model: object = None,
    ) -> Patches:
        """Finds the patches among so many tokens for an input of `shape` [B, ...]."""
        if len(shape) <= 3 and grid is None and tokens - abs(special or 0) == shape[1]:
            return cls(special or 0, None, ())
        axis = input_axis(model, shape)
        size = tuple(one for number, one in enumerate(shape) if number not in (0, axis))
        if len(size) > 3:
            raise InputError(
                f"tokens make a map over up to 3 spatial axes: got an input {list(shape)}"
            )
        known = patch_grid(model, size)
        if known is not None and grid is None and tokens < math.prod(known):
            # Windows that are folded into the batch look like heads that are.
            raise InputError(
                f"attention is over {tokens} tokens, and the model cuts {math.prod(known)} "
                "patches: weights of windows have no place in the input, so use another method; "
                "if it is over all of the input, pass grid=(rows, columns)"
            )
        return cls(*token_grid("attention", tokens, size, grid, special, known), size)

    @property
    def pooled(self) -> bool:
        """Whether there is no token but patches, so that the model must read its answer of all."""
        return self.grid is not None and self.special == 0

    def map(self, weights: Tensor) -> Tensor:
        """Weights [R, T] as [R, T'] of the input's own tokens, or as a map [R, 1, *size]."""
        if self.special > 0:
            weights = weights[:, self.special :]
        elif self.special < 0:
            weights = weights[:, : self.special]
        if self.grid is None:
            return weights
        return resize(weights.reshape(len(weights), *self.grid), self.size)[:, None]
