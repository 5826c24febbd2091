"""The benchmark of inputs larger than memory: what it states fits, and its table."""

from __future__ import annotations

import torch

from benchmarks.larger import CASES, SMALLER, table


def test_cases_are_larger_than_their_budgets() -> None:
    for case in CASES:
        x = case.input(64)
        assert x.shape[1] == case.shape[0]
        assert x.shape[2] == case.shape[1] // 64
        assert case.bytes_allowed(SMALLER) < case.bytes_allowed(1)
        with torch.no_grad():
            raw = case.build()(x)
        index = case.target if isinstance(case.target, tuple) else (case.target,)
        assert raw[(0, *index)].numel() > 0


def test_the_table() -> None:
    row = {
        "model": "net",
        "shape": [3, 8, 8],
        "budget_bytes": 2**20,
        "planned_bytes": 2**19,
        "peak_bytes": 2**18,
        "saved_before": 2**30,
        "way": "recorded, in tiles of 4 x 8",
        "seconds": 1.234,
        "error": 1e-7,
    }
    about = {"device": "a machine", "threads": 2, "torch": "2"}
    text = table({"setting": about, "rows": [row]})
    assert (
        "| net | 3x8x8 | 1.0 MiB | 512.0 KiB | 256.0 KiB | 1.0 GiB | 1.23 s | 1.0e-07 "
        "| recorded, in tiles of 4 x 8 |" in text
    )
