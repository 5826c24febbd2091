"""Networks written by others: the table of them, what is computed of rows, and one of them run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import real_models, tables
from benchmarks.end_to_end import machine, save
from benchmarks.fresh import CAPTUM, OURS
from benchmarks.real_models import FEW, STEPS, summary, table
from benchmarks.real_networks import NETWORKS, sized


def test_there_are_sixty_networks_of_five_libraries() -> None:
    assert len(NETWORKS) == 60
    assert {name.split()[0] for name in NETWORKS} == {
        "torchvision", "timm", "transformers", "monai", "smp"
    }  # fmt: skip


def row(name: str, steady: float, **more: Any) -> dict[str, Any]:
    def about(seconds: float) -> dict[str, Any]:
        return {
            "reason": None, "first": 2.0, "steady": seconds, "peak_bytes": 2**20,
            "resident_bytes": 0, "error": 1e-4, "strategy": "eager",
        }  # fmt: skip

    contenders = {OURS: about(1.0), FEW: about(steady), CAPTUM: about(4.0)}
    return {
        "network": name, "shape": [3, 8, 8], "contenders": contenders, "map_error": 1e-4,
        "float64_error": 1e-15, "strategy": "eager",
    } | more  # fmt: skip


def test_the_table_and_those_that_are_behind(tmp_path) -> None:
    failed = row("third", 1.0)
    failed["contenders"][OURS] |= {"reason": "killed: out of memory", "steady": None}
    rows = [
        row("first", 4.0, equal_error={"times": 3.0}),
        row("second", 0.25, float64_error=1e-3, equal_error={"reason": "none"}),
        failed,
    ]
    document = {"setting": machine("cpu"), "rows": rows}
    text = summary(document)
    assert "| steady, 4 at a time | 2 | 1.00 [" in text
    assert "| 0.25 | 0.95 | 1 | 1 | second 0.25 |" in text
    assert "| equal map error | 1 | 3.00 | 2.5 | 3.00 | 0.9 | 0 | 0 | - |" in text
    assert "- third, saliency_fast: killed: out of memory" in text
    assert "- second: float64 error 1.0e-03" in text
    save(document, table(document), tmp_path, "real-models-cpu")
    assert tables.table("real-models-cpu", tmp_path) == table(document)
    assert tables.table("real-models-cpu-summary", tmp_path) == text
    assert "| second 3x8x8 |" in table(document)


@pytest.mark.slow
def test_a_network_is_measured() -> None:
    pytest.importorskip("transformers")
    document = real_models.measure(only="distilbert", threads=1, equal_error=False)
    (found,) = document["rows"]
    assert found["network"] == "transformers distilbert"
    assert found["shape"] == list(sized("transformers distilbert").shape)
    assert found["map_error"] < 1e-4
    assert found["float64_error"] < 1e-12
    assert found["contenders"][CAPTUM]["steady"] > 0
    assert STEPS == 32
    assert found["strategy"]
