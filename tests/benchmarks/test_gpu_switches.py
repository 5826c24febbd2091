"""The stage that decides switches: what is taken, refused and left."""

from __future__ import annotations

import math
import time
from dataclasses import fields
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_switches
from benchmarks.stages import Report
from saliency_fast.engine.config import EngineConfig

OPTIONS = {"device": "cpu", "quick": True}


def rows_of(name: str, refused: dict[str, str] | None = None) -> list[dict[str, Any]]:
    report = Report(lambda message: None, refused or {}, time.perf_counter() + 60)
    (unit,) = (one for one in gpu_switches.units(OPTIONS) if one.name.startswith(name))
    return list(unit.run(report))


def test_switches_are_fields_that_are_off() -> None:
    known = {field.name: field.default for field in fields(EngineConfig)}
    for own in gpu_switches.SWITCHES.values():
        assert own
        assert all(known[name] is False and value is True for name, value in own.items())


@pytest.mark.parametrize(
    ("off", "on", "found", "take", "slower", "reason"),
    [
        (1.0, 0.9, 1.001, True, False, None),
        (1.0, 0.99, 1.0, False, False, None),
        (1.0, 1.1, 1.0, False, True, None),
        (1.0, 0.5, 1.1, False, False, "maps differ by 1.0e-01"),
        (1.0, 0.5, math.nan, False, False, "maps differ by nan"),
    ],
)
def test_a_switch_is_judged_by_time_and_map(
    off: float, on: float, found: float, take: bool, slower: bool, reason: str | None
) -> None:
    row = gpu_switches.judged(off, on, torch.ones(3), torch.full((3,), found))
    assert (row["take"], row["slower"]) == (take, slower)
    assert row["reason"] is None if reason is None else row["reason"].startswith(reason)


def test_the_verdict() -> None:
    def row(switch: str, workload: str, **more: Any) -> dict[str, Any]:
        return {"switch": switch, "workload": workload, "failed": False} | more

    lines = gpu.verdict([
        {"unit": "calls", "call": "a", "failed": True},
        row("off", "resnet50"), row("off", "vit_b16"),
        row("a", "resnet50", take=True), row("a", "vit_b16", take=False, slower=False),
        row("b", "resnet50", take=True), row("b", "vit_b16", take=False, slower=True),
        row("c", "resnet50", take=False), row("d", "resnet50", take=True, failed=True),
    ])  # fmt: skip
    assert lines == [
        "- a: take it, for resnet50",
        "- b: leave it off; against it: vit_b16",
        "- c: leave it off",
        "- d: leave it off; against it: resnet50",
    ]


def test_networks_with_each_switch() -> None:
    rows = rows_of("tiny-vit", {"tiny-vit 3x32x32: convolution + ReLU": "signal SIGSEGV"})
    names = [gpu_switches.OFF, *gpu_switches.SWITCHES, gpu_switches.ALL]
    assert [row["switch"] for row in rows] == names
    by = {row["switch"]: row for row in rows}
    assert by["convolution + ReLU"]["reason"] == "signal SIGSEGV"
    fused = by["residual + LayerNorm"]
    assert not fused["failed"]
    assert fused["gap"] < 0.01
    assert fused["strategy"] != by["off"]["strategy"]


def test_a_map_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_switches.convolutions._with_relu
    rows = rows_of("calls")
    assert [row["failed"] for row in rows] == [False, False]
    monkeypatch.setattr(
        gpu_switches.convolutions, "_with_relu", lambda *given: real(*given) * math.nan
    )
    assert [row["failed"] for row in rows_of("calls")] == [True, True]
