"""The benchmark of samples at equal error: its fit on exact cases, and every row of a quick run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import end_to_end, smoothgrad, tables
from benchmarks.smoothgrad import constant, interval, median_ratio, misfit, rms, sample_ratio


def falling(c: float, *samples: int, images: tuple[float, ...] = (1.0, 1.0)) -> dict[int, Tensor]:
    """Errors that are c / sqrt(samples), times a factor for each image."""
    return {n: c / math.sqrt(n) * torch.tensor(images, dtype=torch.float64) for n in samples}


def test_root_mean_square() -> None:
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))


def test_the_fit() -> None:
    assert constant(falling(3.0, 16, 32, 64)) == pytest.approx(3.0)
    assert misfit(falling(3.0, 16, 32, 64)) == pytest.approx(0.0)
    # 1 / 2 and 2 / 3 of samples 4 and 9: c is 1 and 2, so sqrt(2) between them.
    crooked = {4: torch.tensor([0.5]), 9: torch.tensor([2 / 3])}
    assert constant(crooked) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert misfit(crooked) == pytest.approx(math.sqrt(2) - 1, rel=1e-5)


def test_sample_ratio() -> None:
    ours, captum = falling(1.0, 16, 32), falling(math.sqrt(2), 16, 32, 64)
    assert sample_ratio(ours, captum) == pytest.approx(2.0)
    assert sample_ratio(captum, ours) == pytest.approx(0.5)
    assert interval(ours, captum) == pytest.approx([2.0, 2.0])


def test_one_image_moves_the_mean_and_not_the_median() -> None:
    ours = falling(1.0, 16, 32, images=(1.0, 1.0, 1.0))
    captum = falling(1.0, 16, 32, images=(1.0, 1.0, 5.0))
    assert median_ratio(ours, captum) == pytest.approx(1.0)
    assert sample_ratio(ours, captum) == pytest.approx(9.0)
    low, high = interval(ours, captum)
    assert low < 9.0 < high


def test_the_verdict_names_where_half_suffices() -> None:
    row = {"model": "net", "score": "logits", "noise_level": 0.1, "ratio": 1.5, "interval": [1, 2]}
    less = row | {"noise_level": 0.3, "ratio": 1.1, "interval": [1.0, 1.2]}
    text = smoothgrad.verdict([row, row | {"score": "probabilities", "ratio": 2.5}, less])
    assert "in 1 of 3 rows (net, probabilities, 0.1)" in text
    assert "in 1 more the interval reaches two (net, logits, 0.1)" in text
    assert "1.10 to 2.50" in text
    assert "0.3" not in text
    assert "0 of 1 rows (none)" in smoothgrad.verdict([less])


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick run, by way of the file that it is saved in."""
    out, sizes = tmp_path_factory.mktemp("results"), smoothgrad.QUICK
    found = {
        "setting": smoothgrad.described(sizes, True, 0.0),
        "rows": list(smoothgrad.measure(sizes)),
    }
    end_to_end.save(found, smoothgrad.table(found), out, "smoothgrad")
    read: dict[str, Any] = json.loads((out / "smoothgrad.json").read_text())
    return read


def test_every_network_and_score_has_a_row(document: dict[str, Any]) -> None:
    names = [(row["model"], row["score"], row["noise_level"]) for row in document["rows"]]
    assert names == [
        (name, score, 0.15)
        for name in ("digits", "digits-vit")
        for score in ("logits", "probabilities")
    ]
    for row in document["rows"]:
        assert row["errors"]["ours"].keys() == {"4", "8"}
        assert row["errors"]["captum"].keys() == {"4", "8", "16"}
        # Both average towards the same map.
        assert all(0 < error < 5 for found in row["errors"].values() for error in found.values())
        assert row["interval"][0] <= row["interval"][1]


def test_tables(document: dict[str, Any], tmp_path: Path) -> None:
    text = smoothgrad.table(document)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(document["rows"]) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert f"{smoothgrad.QUICK.images} held-out images" in text
    (tmp_path / "smoothgrad.json").write_text(json.dumps(document))
    assert tables.table("smoothgrad", tmp_path) == text
