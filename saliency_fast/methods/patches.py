"""Patches: which tokens of an input are places in it, and their weights as a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError

MOST = 16
"""The most leading tokens without a place that are looked for."""
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


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
    ) -> Patches:
        """Finds the patches among so many tokens for an input of `shape` [B, ...]."""
        if len(shape) <= 3 and grid is None and tokens - abs(special or 0) == shape[1]:
            return cls(special or 0, None, ())
        size = shape[2:] if len(shape) > 2 else shape[1:]
        if len(size) > 3:
            raise InputError(
                f"tokens make a map over up to 3 spatial axes: got an input {list(shape)}"
            )
        tried = range(min(MOST + 1, tokens)) if special is None else (special,)
        for count in tried:
            rest = tokens - abs(count)
            if grid is not None and math.prod(grid) == rest and len(grid) == len(size):
                return cls(count, grid, size)
            if grid is None and (found := _grid(rest, size)):
                return cls(count, found, size)
        given = f" with grid={grid} and special={special}" if grid or special is not None else ""
        raise InputError(
            f"{tokens} tokens make no grid over an input {list(shape)}{given}: expected square "
            f"patches and up to {MOST} leading special tokens; pass grid=(rows, columns), whose "
            "product and special= must make that number"
        )

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
        places = weights.reshape(len(weights), 1, *self.grid)
        mode = _MODES[len(self.grid)]
        return functional.interpolate(places, self.size, mode=mode, align_corners=False)


def _grid(tokens: int, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of so many patches of one width on all axes."""
    if len(size) == 1:
        return (tokens,)
    for patch in range(1, min(size) + 1):
        grid = tuple(one // patch for one in size)
        if math.prod(grid) == tokens:
            return grid
    return None
