"""Attention as a map: weights of one layer, rollout, and gradient-weighted attention.

All three send one example's weight back through the layers, from the token that the model reads
its answer from to the tokens that went in: a row times a matrix per layer, never their product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.patches import Patches
from saliency_fast.model.attention import AttentionTaps
from saliency_fast.model.follow import Inside
from saliency_fast.model.layout import Space

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(1),
    "max": lambda heads: heads.amax(1),
    "min": lambda heads: heads.amin(1),
}
Layers = Sequence[Tensor]
"""[R, heads, T, T] of each layer, first to last."""


def last_row(start: Tensor, layers: Layers, layer: int) -> Tensor:
    """What the tokens weighed by `start` [R, T] attend to in one layer, mean over heads."""
    if not -len(layers) <= layer < len(layers):
        raise InputError(
            f"layer out of range: got {layer}, the model has {len(layers)} layers of attention; "
            f"expected {-len(layers)} to {len(layers) - 1}"
        )
    return _times(start, FUSIONS["mean"](layers[layer]))


def rollout(start: Tensor, layers: Layers, residual: float, fusion: str, discard: float) -> Tensor:
    """`start` [R, T] through all layers, each mixed with `residual` of the identity."""
    for heads in reversed(layers):
        attention = FUSIONS[fusion](heads)
        if discard:
            flat = attention.flatten(1)
            lowest = flat.topk(int(discard * flat.shape[1]), 1, largest=False).indices
            attention = flat.scatter(1, lowest, 0.0).view_as(attention)
        mixed = (1 - residual) * attention
        mixed.diagonal(dim1=1, dim2=2).add_(residual)
        # Whatever fusion and discarding left: rows of a mixture sum to one.
        start = _times(start, mixed / mixed.sum(2, keepdim=True))
    return start


def weighted_by_gradient(start: Tensor, layers: Layers, gradients: Layers) -> Tensor:
    """`start` [R, T] through I + mean over heads of relu(gradient * attention) of all layers."""
    for heads, gradient in zip(reversed(layers), reversed(gradients), strict=True):
        start = start + _times(start, (gradient * heads).clamp_min(0).mean(1))
    return start


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    return (row[:, None].to(matrix.dtype) @ matrix)[:, 0]


@dataclass(frozen=True)
class _OverTokens:
    """What methods over tokens share: which token is asked, and where patches lie.

    query: the token whose attention is read: its number, "mean" of all, or "auto", which is the
    class token, the first one; the last one where tokens see only what is before them; and the
    mean where an image has no special tokens. special, grid: of patches, where their number
    does not tell: leading tokens that are none (trailing ones where negative), rows and columns.
    """

    query: int | str = field(default="auto", kw_only=True)
    special: int | None = field(default=None, kw_only=True)
    grid: tuple[int, ...] | None = field(default=None, kw_only=True)
    _gradients = False

    def __post_init__(self) -> None:
        if isinstance(self.query, str):
            checks.choice("query", self.query, ("auto", "mean"))
        elif isinstance(self.query, bool) or not isinstance(self.query, int):
            raise InputTypeError(f"query must be a whole number or a name: got {self.query!r}")
        if self.special is not None and (
            isinstance(self.special, bool) or not isinstance(self.special, int)
        ):
            raise InputTypeError(f"special must be a whole number: got {self.special!r}")
        object.__setattr__(self, "grid", checks.grid(self.grid))

    def recipe(self) -> Recipe:
        # Probabilities are there on the way to the scores, also where token ids go in.
        return RoundsRecipe(self._rounds, 1, at_input=True, gradients=self._gradients)

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        """Per target (or once for all) the weights [R, T] that `start` has at the input."""
        raise NotImplementedError

    def _rounds(self, asked: RoundContext) -> Rounds:
        if len(asked.inputs) != 1:
            raise InputError(
                f"attention belongs to one sequence: got {len(asked.inputs)} inputs; pass the "
                "others through forward_args"
            )
        (x,), targets = asked.inputs, asked.scores.shape[1]
        maps: list[Tensor] = []
        axes = asked.layouts.need(0, "a map of tokens")
        space = Space(tuple(x.shape), axes, asked.layouts.inside() or Inside())

        def each(rows: slice, found: RoundResult) -> None:
            layers = wide(found.taps)
            patches = Patches.of(layers[0].shape[2], space, self.special, self.grid, asked.model)
            start = start_of(self.query, layers, pooled=patches.pooled)
            read = self._read(start, layers, [wide(one) for one in found.grads])
            shown = torch.stack([patches.map(one) for one in read], 1)
            maps.append(shown.expand(-1, targets, *shown.shape[2:]))

        item = torch.arange(len(x), device=x.device)
        taps, gradients = AttentionTaps(self.special, self.grid), self._gradients
        yield Round(lambda item, _: (x[item],), item, item, gradients, taps, each=each)
        return Maps((torch.cat(maps),))


def wide(layers: Sequence[Tensor]) -> list[Tensor]:
    """Layers in float32 at least."""
    return [one if one.dtype == torch.float64 else one.float() for one in layers]


def start_of(query: int | str, layers: Layers, *, pooled: bool = False) -> Tensor:
    """The weight [R, T] of each token in what the model reads. pooled: from all of them."""
    last = layers[-1]
    start = last.new_zeros(len(last), last.shape[2])
    if query == "auto":
        query = "mean" if pooled else (-1 if is_causal(layers[0]) else 0)
    if query == "mean":
        return start.fill_(1 / last.shape[2])
    if not isinstance(query, int) or not -start.shape[1] <= query < start.shape[1]:
        raise InputError(
            f"query out of range: got {query}, expected a token of {start.shape[1]}, or 'mean'"
        )
    start[:, query] = 1
    return start


def is_causal(heads: Tensor, real: Tensor | None = None) -> bool:
    """Whether tokens see only themselves and what is before them. real: bool [R, T]; padding may
    see anything.
    """
    if real is not None:
        heads = heads.masked_fill(~(real[:, None, :, None] & real[:, None, None, :]), 0.0)
    return heads.shape[2] > 1 and not bool(heads.triu(1).any())


@dataclass(frozen=True)
class AttentionWeights(_OverTokens):
    """The attention of one layer, mean over its heads, from one token to all.

    Not an attribution: it says where one layer looked, for every target alike. layer: counted in
    the order in which layers run, from the end where negative.
    """

    layer: int = -1
    name = "attention_weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise InputTypeError(f"layer must be a whole number: got {self.layer!r}")

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [last_row(start, layers, self.layer)]


@dataclass(frozen=True)
class AttentionRollout(_OverTokens):
    """Attention multiplied through all layers, the residual stream as identity (Abnar, Zuidema,
    2020); the same for every target.

    residual: the share of the identity in each layer. fusion: of heads, "mean", "max" or "min".
    discard: the share of each layer's weights, the lowest of an example, that is left out.
    """

    residual: float = 0.5
    fusion: str = "mean"
    discard: float = 0.0
    name = "attention_rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("fusion", self.fusion, tuple(FUSIONS))
        for what in ("residual", "discard"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputTypeError(f"{what} must be a number: got {value!r}")
            if not 0 <= value < 1:
                raise InputError(f"{what} must be a share from 0 to below 1: got {value}")

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [rollout(start, layers, self.residual, self.fusion, self.discard)]


@dataclass(frozen=True)
class GradientAttention(_OverTokens):
    """Attention weighed by its gradient, through all layers: R += mean_h(relu(grad * A)) R, for
    self-attention (Chefer, Gur, Wolf, 2021).
    """

    name = "gradient_attention"
    _gradients = True

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [weighted_by_gradient(start, layers, one) for one in gradients]
