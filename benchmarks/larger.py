"""Inputs whose gradient takes more than memory as the model is, inside a stated budget.

    python -m benchmarks.larger              three minutes, and 14 GiB
    python -m benchmarks.larger --quick      a minute; sides a quarter as long

A 16384 x 16384 picture through three convolutional stages, and a 512 x 512 x 512 volume through a
3-D U-Net: the exact gradient of each in one call, by tiles. What was planned stands beside the
resident set's high-water mark over the level before the call. Errors are those of an input a
quarter as long, in the same number of tiles, against autograd in float64: more does not fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saliency_fast as sf
from benchmarks.end_to_end import RESULTS, machine, save
from benchmarks.models import unet3d
from saliency_fast.engine.memory import bytes_text, read_budget, resident_bytes

SMALLER = 4
"""Times that a quick input's sides are shorter."""


def _stages() -> nn.Module:
    """Three stages of two convolutions, each half the size of the one before: [B, 3, H, W]."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            *(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        ]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [*stage(3, 16), *stage(16, 32), *stage(32, 64)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)]
        return nn.Sequential(*body, *head).eval()


@dataclass(frozen=True)
class Larger:
    """A model, its input [1, *shape], the target, and the budget for it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: int | tuple[int, ...]
    budget: str

    def input(self, smaller: int) -> Tensor:
        sides = [side // smaller for side in self.shape[1:]]
        return torch.rand(1, self.shape[0], *sides, generator=torch.Generator().manual_seed(1))

    def bytes_allowed(self, smaller: int) -> int:
        budget = read_budget(self.budget, torch.device("cpu"))
        # Halos do not get smaller.
        room = 1 if smaller == 1 else 2
        return room * budget // smaller ** (len(self.shape) - 1)


CASES = (
    Larger("three stages", _stages, (3, 16384, 16384), 1, "14GiB"),
    Larger("3-D U-Net", lambda: unet3d(width=8), (1, 512, 512, 512), (1,), "6GiB"),
)


def measure(case: Larger, *, quick: bool = False) -> dict[str, Any]:
    smaller = SMALLER if quick else 1
    model, x = case.build(), case.input(smaller)
    budget = case.bytes_allowed(smaller)
    engine = sf.Engine(model, sf.Gradient(), memory_budget=budget, hashes=False)
    plan = engine.plan(x, case.target)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident_bytes()[0], time.perf_counter()
    engine(x, case.target)
    seconds = time.perf_counter() - started
    return {
        "model": case.name,
        "shape": list(x.shape[1:]),
        "budget_bytes": budget,
        "planned_bytes": plan.peak_bytes,
        "peak_bytes": resident_bytes()[1] - before,
        "saved_before": plan.saved_before,
        "way": plan.lean,
        "seconds": seconds,
        "error": _error(case),
    }


def _error(case: Larger) -> float:
    """Of a smaller input, under a budget that cuts it into tiles as well."""
    model, x = case.build(), case.input(SMALLER)
    budget = case.bytes_allowed(SMALLER)
    found = sf.Engine(model, sf.Gradient(), memory_budget=budget, hashes=False)(x, case.target)
    model, wide = model.double(), x.double().requires_grad_()
    raw = model(wide)
    index = case.target if isinstance(case.target, tuple) else (case.target,)
    (expected,) = torch.autograd.grad(raw[(slice(None), *index)].sum(), wide)
    return float((found.values - expected).norm() / expected.norm())


def table(document: dict[str, Any]) -> str:
    about = document["setting"]
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}; "
        f"`python -m benchmarks.larger`.",
        "",
        "| model | input | budget | planned | measured | autograd keeps | time | error "
        "| strategy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in document["rows"]:
        sizes = ("budget_bytes", "planned_bytes", "peak_bytes", "saved_before")
        cells = [
            row["model"],
            "x".join(map(str, row["shape"])),
            *(bytes_text(row[name]) for name in sizes),
            f"{row['seconds']:.3g} s",
            f"{row['error']:.1e}",
            row["way"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "One call each. Measured is the resident set's high-water mark over the level before the "
        "call; autograd keeps, of the model as it is, is counted on shapes. Error is relative L2 "
        "against autograd in float64, of an input with sides a quarter as long.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, to see that it works")
    options = parser.parse_args()
    rows = [measure(case, quick=options.quick) for case in CASES]
    document = {"setting": machine("cpu") | {"quick": options.quick}, "rows": rows}
    if not options.quick:
        save(document, table(document), RESULTS, "larger-cpu")
    print(table(document))


if __name__ == "__main__":
    main()
