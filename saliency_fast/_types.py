"""Types that every layer of the package shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Inputs = tuple[Tensor, ...]
"""The tensors of one call, one per input of the model, each `[B, *]`."""

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
"""A call: the function, its arguments, and those by name."""
