"""Similarity of two texts, as something to explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast.errors import InputError, ModelError
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.tokens.encoding import Encoded


@dataclass(frozen=True)
class Similarity:
    """A target: the cosine of a text's embedding with another text's, which stays as it is.

    to: one text, or one for each. pooling: "mean" of the last layer's tokens without padding,
    "first" token's, or a function of what the model returns and a bool mask [R, T], false at
    padding, to [R, E].
    """

    to: str | Sequence[str]
    pooling: str | Callable[[Any, Tensor], Tensor] = "mean"

    def __post_init__(self) -> None:
        if not callable(self.pooling) and self.pooling not in POOLINGS:
            raise InputError(
                f"pooling must be {', '.join(map(repr, POOLINGS))} or a function: got "
                f"{self.pooling!r}"
            )

    def texts(self, count: int) -> list[str]:
        """One for each of so many."""
        several = [self.to] if isinstance(self.to, str) else list(self.to)
        if len(several) not in (1, count):
            raise InputError(f"to must be one text, or one for each of {count}: got {len(several)}")
        return several * count if len(several) == 1 else several

    def pool(self, raw: Any, mask: Tensor) -> Tensor:
        """Embeddings [R, E] of what a model returned."""
        pooled = self.pooling(raw, mask) if callable(self.pooling) else None
        return POOLINGS[str(self.pooling)](_hidden(raw), mask) if pooled is None else pooled


class Compared(nn.Module):
    """A model that returns how similar its texts are to others, of known embeddings."""

    def __init__(self, model: nn.Module, by: Similarity) -> None:
        super().__init__()
        self.model, self.by = model, by
        # As the model is, so that nothing is switched but what it switches itself.
        self.training = model.training

    def get_input_embeddings(self) -> nn.Module | None:
        found: nn.Module | None = getattr(self.model, "get_input_embeddings", lambda: None)()
        return found

    def forward(self, input_ids: Tensor, pooled: Tensor, other: Tensor, **further: Any) -> Tensor:
        found = self.by.pool(self.model(input_ids, **further), pooled)
        return functional.cosine_similarity(found, other, 1)

    def embedded(self, texts: Encoded) -> Tensor:
        """Embeddings [B, E] of encoded texts, without gradients."""
        with preserve_model_state(self.model, texts.ids.device), torch.no_grad():
            return self.by.pool(self.model(texts.ids, **texts.further), texts.real)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    # With padding on the left, the first token that is none.
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "first": _first}


def _hidden(raw: Any) -> Tensor:
    found = raw if isinstance(raw, Tensor) else getattr(raw, "last_hidden_state", None)
    if found is None and isinstance(raw, (tuple, list)):
        found = raw[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        got = list(found.shape) if isinstance(found, Tensor) else type(raw).__name__
        raise ModelError(
            f"similarity needs a model of last hidden states [B, T, E]: got {got}; pass "
            "pooling=function, from what the model returns and a mask [B, T] to [B, E]"
        )
    return found
