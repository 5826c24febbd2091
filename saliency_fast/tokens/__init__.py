"""Texts: attributions of tokens and words, beside attention to the same tokens."""

from saliency_fast.tokens.explain import explain_tokens
from saliency_fast.tokens.result import TokenAttribution
from saliency_fast.tokens.similarity import Similarity

__all__ = ["Similarity", "TokenAttribution", "explain_tokens"]
