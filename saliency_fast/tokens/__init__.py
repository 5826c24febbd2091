"""Texts: attributions of tokens and words, beside attention to the same tokens."""

from saliency_fast.tokens.explain import Similarity, explain_tokens
from saliency_fast.tokens.result import TokenAttribution

__all__ = ["Similarity", "TokenAttribution", "explain_tokens"]
