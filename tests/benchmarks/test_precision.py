"""The benchmark of precisions: its measures on small exact cases, and every row of a quick run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, precision, tables
from benchmarks.precision import rank_correlation, ranks, top_overlap
from saliency_fast.graph.passes.half import OF_DEVICE


def test_ranks_of_equal_values_are_shared() -> None:
    assert ranks(torch.tensor([10.0, 20.0, 20.0, 5.0])).tolist() == [2.0, 3.5, 3.5, 1.0]
    assert ranks(torch.zeros(3)).tolist() == [2.0, 2.0, 2.0]


def test_rank_correlation() -> None:
    a = torch.tensor([0.1, 0.4, 0.2, 0.9])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    # Ranks 1 3 2 4 and 2 3 1 4: 1 - 6 * (1 + 0 + 1 + 0) / (4 * 15).
    b = torch.tensor([0.2, 0.5, 0.1, 0.6])
    assert rank_correlation(a, b) == pytest.approx(0.8)
    assert math.isnan(rank_correlation(a, torch.ones(4)))


def test_rank_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(20, (2, 300), generator=generator)
    expected = stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert rank_correlation(a.float(), b.float()) == pytest.approx(expected)


def test_top_overlap() -> None:
    a = torch.arange(200.0)
    assert top_overlap(a, a) == 1.0
    assert top_overlap(a, -a) == 0.0
    # The top two of 200 are 199 and 198; the other's are 199 and 0.
    b = a.clone()
    b[0] = 198.5
    assert top_overlap(a, b) == 0.5
    # Never of no pixel at all.
    assert top_overlap(a[:4], a[:4]) == 1.0


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick run with what GPUs offer, by way of the file that it is saved in."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OF_DEVICE, "cpu", ("float16", "bfloat16", "float32"))
        found = precision.measure(quick=True)
    end_to_end.save(found, precision.table(found), out, "precision-cpu")
    read: dict[str, Any] = json.loads((out / "precision-cpu.json").read_text())
    return read


def test_every_precision_has_a_row(document: dict[str, Any]) -> None:
    names = [
        (row["workload"], row["method"], row["precision"], row["reason"])
        for row in document["rows"]
    ]
    assert names == [
        (subject.name, method, name, None)
        for subject in precision.QUICK_SUBJECTS
        for method in precision.QUICK.methods
        for name in ("float16", "bfloat16")
    ]


def test_rows_say_how_far_maps_are_off(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        assert 0 < row["distance"] < 0.5, row
        # An estimate from three points.
        assert row["distance"] / 6 < row["told"] < 6 * row["distance"], row
        assert 0.8 < row["rank_correlation"] <= 1, row
        assert 0.5 < row["top_overlap"] <= 1, row
        assert row["own_error"] > 0
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["speed"] == row["float32_seconds"] / row["seconds"]
        assert row["auto"] in OF_DEVICE["cuda"]
    halves = zip(document["rows"][::2], document["rows"][1::2], strict=True)
    # Three more bits.
    assert all(float16["distance"] < bfloat16["distance"] for float16, bfloat16 in halves)


def test_tables(document: dict[str, Any], tmp_path: Path) -> None:
    refused = document["rows"][0] | {"reason": "no such type"}
    text = precision.table({**document, "rows": [*document["rows"], refused]})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(document["rows"]) + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "no such type" in lines[-1]
    (tmp_path / "precision-cpu.json").write_text(json.dumps(document))
    assert tables.table("precision-cpu", tmp_path) == precision.table(document)
    assert tables.table("precision-gpu", tmp_path) == tables.NOT_MEASURED + "\n"
