"""Metrics against Quantus, and metrics of the built-in models: quick runs have tables."""

from __future__ import annotations

import math

import pytest

from benchmarks import evaluation, metaevaluation


def test_curves_race_quantus_and_agree() -> None:
    document = evaluation.measure(quick=True)
    text = evaluation.table(document)
    assert [row["metric"] for row in document["rows"]] == ["deletion, 0", "insertion, 0.5"]
    for row in document["rows"]:
        # Softmax probabilities in float32, through eight layers.
        assert row["gap"] < 1e-5
        ratio = row["quantus_seconds"] / row["seconds"]
        assert row["times_quantus"] == pytest.approx(ratio)
        assert row["work"] in text


def test_verdicts_and_orders_are_reported() -> None:
    document = metaevaluation.measure(quick=True)
    rows = {(row["part"], row["name"]): row for row in document["rows"]}
    assert rows["sanity check", "edge_detector"]["passed"] is False
    for method in metaevaluation.SANITY[:-1]:
        assert rows["sanity check", method]["passed"] is True
    for part in ("deletion", "insertion", "pointing game"):
        assert all(math.isfinite(row["mean"]) for row in document["rows"] if row["part"] == part)
    assert rows["deletion", "perfect"]["high"] < rows["deletion", "random"]["low"]
    assert rows["insertion", "perfect"]["low"] > rows["insertion", "random"]["high"]
    text = metaevaluation.table(document)
    assert "| digits | edge_detector | 1.000 [1.000, 1.000] | FAILED |" in text
