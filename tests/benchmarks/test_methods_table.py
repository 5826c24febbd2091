"""Code written for Captum, run with either library: calls are alike, and so is the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import methods
from benchmarks.calls import CALLS, Called
from benchmarks.cases import sized
from benchmarks.contenders import CALLED, Setting
from tests.naive import relative_l2

SMALL = {"resnet50": 64, "unet3d": 16, "volume": 24}


@pytest.mark.parametrize("workload", SMALL)
def test_both_libraries_compute_the_same(workload: str) -> None:
    (case,) = (one for one in methods.CASES if one.workload == workload)
    found = sized(workload, SMALL[workload])
    model, x = found.build(), found.inputs(1)
    with torch.random.fork_rng():
        for name in case.calls:
            if name.startswith(("IntegratedGradients", "Occlusion", "FeatureAblation")):
                continue  # Long, and compared in tests/captum.
            maps = [Called(library, found, model)(x, Setting(name)) for library in CALLED]
            # Kinks of an untrained network in float32: as between any two backends.
            assert relative_l2(*maps) < 5e-2, name


def test_a_quick_run_has_a_table() -> None:
    document = methods.measure(quick=True)
    text = methods.table(document)
    assert text.count("| tiny-unet3d 1x8x8x8 |") == 2
    assert "| Saliency |" in text
    for row in document["rows"]:
        assert row["reason"] is None
        assert row["call"] in CALLS
        assert row["error"] < 1e-2
        assert row["times_captum"] == pytest.approx(row["captum_seconds"] / row["seconds"])
