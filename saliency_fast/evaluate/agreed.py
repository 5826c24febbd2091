"""Agreed: how alike the maps of a report are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

Agreed = Any


def agreed(maps: Mapping[str, Tensor], inputs: Tensor) -> Agreed | None:
    """The agreement between maps [B, *spatial]; None for fewer than two."""
    if len(maps) < 2 or find_spec("saliency_fast.evaluate.agreement") is None:
        return None
    return import_module("saliency_fast.evaluate.agreement").agreement(maps, inputs)
