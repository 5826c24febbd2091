"""Attention weights, rollout and gradient-weighted attention of the tokens that are explained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.engine import recipe as engine
from saliency_fast.errors import InputError, InputTypeError, NoAttentionError
from saliency_fast.methods.attention import (
    Layers,
    is_causal,
    last_row,
    rollout,
    weighted_by_gradient,
    wide,
)
from saliency_fast.methods.parts import checks
from saliency_fast.model.attention import AttentionTaps


@dataclass(frozen=True, eq=False)
class AttentionColumns:
    """A method: all three kinds of attention from one forward and one backward pass.

    real: bool [B, T]; padding is left out of means. query: the token whose attention is read:
    "first", "last", "mean", an index, or "auto": the last one of causal models, else the first.
    layer: the one whose weights are read.
    """

    real: Tensor
    query: str | int
    layer: int
    name = "attention"

    def __post_init__(self) -> None:
        if isinstance(self.query, str):
            checks.choice("query", self.query, ("auto", "first", "last", "mean"))
        elif isinstance(self.query, bool) or not isinstance(self.query, int):
            raise InputTypeError(f"query must be a whole number or a name: got {self.query!r}")

    def recipe(self) -> engine.Recipe:
        return engine.RoundsRecipe(self._rounds, 1, at_input=True)

    def _rounds(self, context: engine.RoundContext) -> engine.Rounds:
        (x,) = context.inputs
        parts: list[tuple[Tensor, Tensor, Tensor]] = []

        def each(rows: slice, result: engine.RoundResult) -> None:
            layers, real = wide(result.taps), self.real[rows]
            if layers[0].shape[2] != real.shape[1]:
                raise NoAttentionError(
                    f"attention is over {layers[0].shape[2]} tokens, and the tokenizer gives "
                    f"{real.shape[1]}; pass attention=False"
                )
            start = self._start(real, layers)
            weights = last_row(start, layers, self.layer)
            rolled = rollout(start, layers, 0.5, "mean", 0.0)
            # The identity, which every token has of itself, is no evidence.
            weighted = weighted_by_gradient(start, layers, wide(result.grads[0])) - start
            parts.append((weights, rolled, weighted))

        example = torch.arange(len(x), device=x.device)
        yield engine.Round(
            lambda example, _: (x[example],), example, example, taps=AttentionTaps(), each=each
        )
        weights, rolled, weighted = (torch.cat(one)[:, None] for one in zip(*parts, strict=True))
        return engine.Maps((weighted,), extras={"attention": weights, "rollout": rolled})

    def _start(self, real: Tensor, layers: Layers) -> Tensor:
        """The weight of each token as a query [R, T]."""
        start = real.to(layers[0].dtype)
        if self.query == "mean":
            return start / start.sum(1, keepdim=True)
        query = self.query
        if query == "auto":
            query = "last" if is_causal(layers[0], real) else "first"
        index = {"first": 0, "last": -1}[query] if isinstance(query, str) else query
        count = real.sum(1)
        wanted = torch.full_like(count, index) + (count if index < 0 else 0)
        if bool(((wanted < 0) | (wanted >= count)).any()):
            raise InputError(
                f"query out of range: got {index}, and a text has {int(count.min())} tokens"
            )
        # The index counts real tokens, on whichever side padding is.
        return start * (real.cumsum(1) == wanted[:, None] + 1)
