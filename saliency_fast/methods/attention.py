"""Attention as a map: weights of one layer, rollout, and gradient-weighted attention.

All three multiply the weights of the tokens that the model reads its output from with one matrix
per layer, from the last layer to the input; matrices are never multiplied with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError
from saliency_fast.methods.cam import resize
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import at_inputs, every_row
from saliency_fast.model.attention import AttentionTaps
from saliency_fast.model.follow import Inside
from saliency_fast.model.layout import Space, patch_grid, tokens_at

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(1),
    "max": lambda heads: heads.amax(1),
    "min": lambda heads: heads.amin(1),
}
Layers = Sequence[Tensor]
"""[R, heads, T, T] of each layer, first to last."""


def last_row(start: Tensor, layers: Layers, layer: int) -> Tensor:
    """The weights [R, T] that tokens of weights `start` [R, T] attend with in one layer."""
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
        # Rows sum to one again, whatever fusion and discarding removed.
        start = _times(start, mixed / mixed.sum(2, keepdim=True))
    return start


def weighted_by_gradient(start: Tensor, layers: Layers, gradients: Layers) -> Tensor:
    """`start` [R, T] through I + mean over heads of relu(gradient * attention) of all layers."""
    for heads, gradient in zip(reversed(layers), reversed(gradients), strict=True):
        start = start + _times(start, (gradient * heads).clamp_min(0).mean(1))
    return start


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    return (row[:, None].to(matrix.dtype) @ matrix)[:, 0]


def wide(layers: Sequence[Tensor]) -> list[Tensor]:
    return [one if one.dtype == torch.float64 else one.float() for one in layers]


def is_causal(heads: Tensor, real: Tensor | None = None) -> bool:
    """Whether tokens, other than padding by `real` [R, T], attend to none after themselves."""
    if real is not None:
        heads = heads.masked_fill(~(real[:, None, :, None] & real[:, None, None, :]), 0.0)
    return heads.shape[2] > 1 and not bool(heads.triu(1).any())


def _start(query: int | str, layers: Layers, *, pooled: bool) -> Tensor:
    """Weights [R, T] of the tokens that the model reads its output from; pooled: from all."""
    start = layers[-1].new_zeros(len(layers[-1]), layers[-1].shape[2])
    if query == "auto":
        query = "mean" if pooled else (-1 if is_causal(layers[0]) else 0)
    if query == "mean":
        return start.fill_(1 / start.shape[1])
    if not isinstance(query, int) or not -start.shape[1] <= query < start.shape[1]:
        raise InputError(
            f"query out of range: got {query}, expected a token of {start.shape[1]}, or 'mean'"
        )
    start[:, query] = 1
    return start


@dataclass(frozen=True)
class Patches:
    """The tokens that are patches: in a `grid` over the input's spatial axes of `size`. index: of
    these tokens; shape: of one example's map, axes as in the input; pooled: whether all tokens are
    patches, so that the model must read its output from all. Without a grid (of token inputs) they
    are the input's own tokens.
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
            return cls(tuple(range(start, start + size[0])), None, size, size, False)
        known = patch_grid(model, size)
        if (
            (known is not None and grid is None and special is None)
            and tokens < math.prod(known)
            and space.inside.sequence(tokens, space.axes.places, space.number) is None
        ):
            # Windows that are folded into the batch look like heads that are.
            raise InputError(
                f"attention is over {tokens} tokens, and the model cuts {math.prod(known)} "
                "patches: weights of windows have no position in the input, so use another method; "
                "if it is over all of the input, pass grid=(rows, columns)"
            )
        found = tokens_at("attention", tokens, space, grid, special, model)
        return cls(found.index, found.grid, size, space.of_map, len(found.index) == tokens)

    def map(self, weights: Tensor) -> Tensor:
        """Weights [R, T] as [R, T'] of the input's own tokens, or as maps [R, *shape]."""
        weights = weights[:, list(self.index)]
        if self.grid is None:
            return weights
        resized = resize(weights.reshape(len(weights), *self.grid), self.size)
        return resized.reshape(len(weights), *self.shape)


@dataclass(frozen=True)
class _OverTokens:
    """Fields of all methods over tokens, see `AttentionWeights`."""

    query: int | str = field(default="auto", kw_only=True)
    special: int | None = field(default=None, kw_only=True)
    grid: tuple[int, ...] | None = field(default=None, kw_only=True)
    _gradients = False

    def __post_init__(self) -> None:
        names = isinstance(self.query, str)
        checks.fields(self, query=("auto", "mean") if names else checks.integer)
        checks.fields(self, special=checks.optional(checks.integer))
        object.__setattr__(self, "grid", checks.grid(self.grid))

    def recipe(self) -> RoundsRecipe:
        # Probabilities are computed for the scores, also where token ids go in.
        return RoundsRecipe(self._rounds, 1, at_input=True, gradients=self._gradients)

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        """Per target (or once for all) the weights [R, T] that `start` has at the input."""
        raise NotImplementedError

    def _rounds(self, context: RoundContext) -> Rounds:
        if len(context.inputs) != 1:
            raise InputError(
                f"attention belongs to one sequence: got {len(context.inputs)} inputs; pass the "
                "others through forward_args"
            )
        (x,), targets = context.inputs, context.scores.shape[1]
        maps: list[Tensor] = []
        axes = context.layouts.need(0, "a map of tokens")
        space = Space(tuple(x.shape), axes, context.layouts.inside() or Inside())

        def each(rows: slice, result: RoundResult) -> None:
            layers = wide(result.taps)
            tokens = layers[0].shape[2]
            patches = Patches.of(tokens, space, self.special, self.grid, context.model)
            start = _start(self.query, layers, pooled=patches.pooled)
            weights = self._read(start, layers, [wide(one) for one in result.grads])
            shown = torch.stack([patches.map(one) for one in weights], 1)
            maps.append(shown.expand(-1, targets, *shown.shape[2:]))

        example, _ = every_row(context, 1)
        taps, gradients = AttentionTaps(self.special, self.grid), self._gradients
        yield Round(at_inputs(context), example, example, gradients, taps, each=each)
        return Maps((torch.cat(maps),))


@dataclass(frozen=True)
class AttentionWeights(_OverTokens):
    """Attention of one layer from one token to all, mean over heads.

    It is no attribution: it is the same for every target, and of one layer.

    Args:
        layer: Number of the attention layer in the order in which layers run; negative from the
            end.
        query: The token whose attention is read: its number, "mean" of all, or "auto": the class
            token, the first one; the last one where attention is causal; the mean where all tokens
            are patches.
        special: Number of leading (where negative, trailing) tokens that are no patches; None finds
            it by the model's patches or the number of tokens.
        grid: (rows, columns) of the patches; None finds it likewise.

    Example:
        >>> import torch, saliency_fast as sf
        >>> from torch.nn.functional import scaled_dot_product_attention as attention
        >>> model = lambda x: attention(x, x, x).sum(1)
        >>> x, method = torch.ones(2, 5, 4), sf.AttentionWeights()
        >>> sf.explain(model, x, target=1, method=method, layout="BTF").values.shape
        torch.Size([2, 5])
    """

    layer: int = -1
    name = "attention_weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("layer", self.layer)

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [last_row(start, layers, self.layer)]


@dataclass(frozen=True)
class AttentionRollout(_OverTokens):
    """Product of the attention of all layers, each mixed with the identity (Abnar & Zuidema, 2020).

    It is the same for every target.

    Args:
        residual: Share of the identity, which stands for the residual stream, in each layer.
        fusion: How heads are joined: "mean", "max" or "min".
        discard: Share of each layer's weights, the lowest of an example, that is set to zero.
        query, special, grid: As of `AttentionWeights`.

    Example:
        >>> import torch, saliency_fast as sf
        >>> from torch.nn.functional import scaled_dot_product_attention as attention
        >>> x, method = torch.ones(1, 4, 2), sf.AttentionRollout(query="mean")
        >>> model = lambda x: attention(x, x, x).sum(1)
        >>> sf.explain(model, x, target=1, method=method, layout="BTF").values
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    residual: float = 0.5
    fusion: str = "mean"
    discard: float = 0.0
    name = "attention_rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("fusion", self.fusion, tuple(FUSIONS))
        for what in ("residual", "discard"):
            if not 0 <= (value := checks.number(what, getattr(self, what))) < 1:
                raise InputError(f"{what} must be a share from 0 to below 1: got {value}")

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [rollout(start, layers, self.residual, self.fusion, self.discard)]


@dataclass(frozen=True)
class GradientAttention(_OverTokens):
    """Attention times its gradient through all self-attention layers (Chefer, Gur & Wolf, 2021).

    The relevance R of the tokens is R + mean over heads of relu(gradient * attention) R, layer by
    layer.

    Args:
        query, special, grid: As of `AttentionWeights`.

    Example:
        >>> import torch, saliency_fast as sf
        >>> from torch.nn.functional import scaled_dot_product_attention as attention
        >>> model = lambda x: attention(x, x, x).sum(1)
        >>> x, method = torch.ones(2, 5, 4), sf.GradientAttention()
        >>> sf.explain(model, x, target=1, method=method, layout="BTF").values.shape
        torch.Size([2, 5])
    """

    name = "gradient_attention"
    _gradients = True

    def _read(self, start: Tensor, layers: Layers, gradients: list[Layers]) -> list[Tensor]:
        return [weighted_by_gradient(start, layers, one) for one in gradients]
