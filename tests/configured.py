"""Engines under other thresholds than the default ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from saliency_fast.engine import config

RECORDED = {"direct_points": 0}
"""Also calls of few points are recorded, which does not repay."""
ALWAYS_LEAN = {"lean_from": 0, "exact_dtypes": frozenset(), **RECORDED}
"""Memory-efficient also where points are so small that it does not pay, and in float64, whose
rounding tells wrong gradients from right ones."""


def configure(patch: pytest.MonkeyPatch, **thresholds: Any) -> None:
    """Sets thresholds of all engines that are made while `patch` holds."""
    patch.setattr(config, "DEFAULT", replace(config.DEFAULT, **thresholds))
