"""Types that every layer of the package shares."""

from __future__ import annotations

from torch import Tensor

Inputs = tuple[Tensor, ...]
"""The tensors of one call, one per input of the model, each `[B, *]`."""
