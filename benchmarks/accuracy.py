"""How far maps are off, and how well `Attribution.error` tells it: `python -m benchmarks.accuracy`.

The built-in networks on their first held-out scenes, against 1024 midpoint steps and 4096 samples.
Writes benchmarks/results/accuracy.json and accuracy.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saliency_fast as sf
from saliency_fast import zoo

RULES = ("midpoint", "trapezoid", "gauss_legendre", "left", "right")
SIGMA = 0.1


def distances(found: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 distance of each example's map: [B]."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    scores: Tensor = model(x)
    return scores


def probabilities(model: torch.nn.Module, x: Tensor) -> Tensor:
    return logits(model, x).softmax(1)


def row(found: sf.Attribution, expected: Tensor, **names: Any) -> dict[str, Any]:
    """Median true error over the examples, and the range of estimated over true."""
    true = distances(found.values, expected)
    ratio = found.error / true
    return {
        **names,
        "error": float(true.median()),
        "estimate_over_error": [float(ratio.min()), float(ratio.median()), float(ratio.max())],
    }


def measure(examples: int, steps: tuple[int, ...], finest: int) -> Iterator[dict[str, Any]]:
    """Rows for every network, score, rule and number of points."""
    x = zoo.held_out().images[:examples]
    for name, build in zoo.MODELS.items():
        for score in (logits, probabilities):
            model = partial(score, build())
            classes = model(x).argmax(1)
            explain: Callable[..., sf.Attribution] = partial(sf.explain, model, x, target=classes)
            exact = explain(method=sf.IntegratedGradients(finest)).values
            for rule in RULES:
                for n in steps:
                    found = explain(method=sf.IntegratedGradients(n, rule))
                    yield row(found, exact, model=name, score=score.__name__, method=rule, points=n)
        explain = partial(sf.explain, build(), x, target=classes)
        exact = explain(method=sf.SmoothGrad(4 * finest, sigma=SIGMA, seed=1)).values
        for kind, antithetic in (("independent noise", False), ("antithetic noise", True)):
            for n in steps:
                found = explain(method=sf.SmoothGrad(n, sigma=SIGMA, antithetic=antithetic))
                yield row(found, exact, model=name, score="logits", method=kind, points=n)


def table(rows: list[dict[str, Any]]) -> str:
    """Median errors, a line for each network, score and method; then the estimates' ranges."""
    points = sorted({one["points"] for one in rows})
    head = ["model", "score", "method", *map(str, points), "estimate / error"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * 3 + "---:|" * (len(points) + 1)]
    for key in dict.fromkeys((one["model"], one["score"], one["method"]) for one in rows):
        mine = [one for one in rows if (one["model"], one["score"], one["method"]) == key]
        errors = [f"{one['error']:.3f}" for one in mine]
        low = min(one["estimate_over_error"][0] for one in mine)
        high = max(one["estimate_over_error"][2] for one in mine)
        lines.append(f"| {' | '.join([*key, *errors, f'{low:.1f} to {high:.1f}'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    options = parser.parse_args()
    sizes = (2, (4, 8), 32) if options.quick else (4, (8, 16, 32, 64, 128), 1024)
    rows = list(measure(*sizes))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (options.out / "accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
