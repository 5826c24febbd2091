"""Similarity of two texts as a target of explanations."""

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
    """A target of `explain_tokens`: the cosine of a text's embedding and another text's embedding.

    The embedding of the other text is a constant.

    Args:
        to: One text, or one for each text that is explained.
        pooling: How the last hidden states [B, T, E] become embeddings [B, E]: "mean" over the
            tokens without padding, the "first" token, or a function of the model's output and a
            bool mask [B, T] that is False at padding.

    Raises:
        InputError: If `pooling` is neither a name nor a function.

    Example:
        >>> Similarity("A kitten takes a nap.", pooling="first")
        Similarity(to='A kitten takes a nap.', pooling='first')
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
        several = [self.to] if isinstance(self.to, str) else list(self.to)
        if len(several) not in (1, count):
            raise InputError(f"to must be one text, or one for each of {count}: got {len(several)}")
        return several * count if len(several) == 1 else several

    def pool(self, raw: Any, mask: Tensor) -> Tensor:
        """The embeddings [B, E] of a model's output."""
        if callable(self.pooling):
            return self.pooling(raw, mask)
        return POOLINGS[self.pooling](_hidden_states(raw), mask)


class SimilarityModel(nn.Module):
    """A model whose output is the cosine of its texts' embeddings and constant embeddings."""

    def __init__(self, model: nn.Module, similarity: Similarity) -> None:
        super().__init__()
        self.model, self.similarity = model, similarity
        # A new module is in training mode, and the model's own mode must stay.
        self.training = model.training

    def get_input_embeddings(self) -> nn.Module | None:
        result: nn.Module | None = getattr(self.model, "get_input_embeddings", lambda: None)()
        return result

    def forward(self, input_ids: Tensor, pooled: Tensor, other: Tensor, **further: Any) -> Tensor:
        embedding = self.similarity.pool(self.model(input_ids, **further), pooled)
        return functional.cosine_similarity(embedding, other, 1)

    def embedded(self, texts: Encoded) -> Tensor:
        """The embeddings [B, E] of encoded texts, without gradients."""
        with preserve_model_state(self.model, texts.ids.device), torch.no_grad():
            return self.similarity.pool(self.model(texts.ids, **texts.arguments), texts.real)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    # Padding may be on the left.
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "first": _first}


def _hidden_states(raw: Any) -> Tensor:
    result = raw if isinstance(raw, Tensor) else getattr(raw, "last_hidden_state", None)
    if result is None and isinstance(raw, (tuple, list)):
        result = raw[0]
    if not isinstance(result, Tensor) or result.dim() != 3:
        got = list(result.shape) if isinstance(result, Tensor) else type(raw).__name__
        raise ModelError(
            f"similarity needs a model of last hidden states [B, T, E]: got {got}; pass "
            "pooling=function, from what the model returns and a mask [B, T] to [B, E]"
        )
    return result
