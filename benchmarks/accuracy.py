"""How far maps are off, and how well `Attribution.error` tells it: `python -m benchmarks.accuracy`.

Integrated Gradients by every rule on eight networks, logits and probabilities, three baselines
each, against 1536 midpoint steps; noise on the built-in networks, against 6144 samples. Writes
benchmarks/results/accuracy.json and accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import saliency_fast as sf
from benchmarks.networks import NETWORKS, build
from saliency_fast import evaluate as ev
from saliency_fast import zoo

FIXED = ("midpoint", "trapezoid", "gauss_legendre", "left", "right")
RULES = ("adaptive", *FIXED)
SIGMA = 0.1
NOTHING = 0.002
"""Errors below are no errors, where rules are compared."""
EXACT = 1e-5
"""Errors of maps below which the reference itself may be off."""


def distances(found: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 distance of each example's map: [B]."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    scores: Tensor = model(x)
    return scores


def probabilities(model: torch.nn.Module, x: Tensor) -> Tensor:
    return logits(model, x).softmax(1)


def row(found: sf.Attribution, expected: Tensor, **names: Any) -> dict[str, Any]:
    """True and estimated errors of the examples."""
    true = distances(found.values, expected)
    return {**names, "errors": true.tolist(), "estimates": found.error.tolist()}


def measure_paths(
    names: Sequence[str], examples: int, steps: tuple[int, ...], finest: int
) -> Iterator[dict[str, Any]]:
    """Rows for every network, score, baseline, rule and number of points."""
    for name in names:
        network = build(name)
        x, rows = network.x[:examples], 16 if name in ("resnet50", "unet3d") else None
        for score in (logits, probabilities):
            model = partial(score, network.model)
            classes = model(x).argmax(1)
            for start, baseline in network.baselines.items():
                about = {"target": classes, "points_per_launch": rows}
                about["baseline"] = baseline[:examples]
                explain: Callable[..., sf.Attribution] = partial(sf.explain, model, x, **about)
                exact = explain(method=sf.IntegratedGradients(finest, "midpoint")).values
                for rule in RULES:
                    for n in steps:
                        found = explain(method=sf.IntegratedGradients(n, rule))
                        where = {"model": name, "score": score.__name__, "baseline": start}
                        yield row(found, exact, **where, method=rule, points=n)


def measure_noise(examples: int, steps: tuple[int, ...], finest: int) -> Iterator[dict[str, Any]]:
    """Rows for the built-in networks and both kinds of noise."""
    x = zoo.held_out().images[:examples]
    for name, make in zoo.MODELS.items():
        model = make()
        explain = partial(sf.explain, model, x, target=model(x).argmax(1))
        exact = explain(method=sf.SmoothGrad(finest, sigma=SIGMA, seed=1)).values
        for kind, antithetic in (("independent noise", False), ("antithetic noise", True)):
            for n in steps:
                found = explain(method=sf.SmoothGrad(n, sigma=SIGMA, antithetic=antithetic))
                yield row(found, exact, model=name, score="logits", method=kind, points=n)


def measure_metrics(examples: int, finest: int) -> Iterator[str]:
    """How far metrics of the default map are from those of a converged one: a table's lines."""
    held, model = zoo.held_out(), zoo.MODELS["digits"]()
    x, boxes = held.images[:examples], held.boxes[:examples]
    target = model(x).argmax(1)
    converged = sf.IntegratedGradients(finest, "midpoint")
    exact = sf.explain(model, x, target=target, method=converged).values
    metrics = (ev.Deletion(), ev.Insertion(), ev.EnergyInBox())
    yield f"| method, {examples} digits | {' | '.join(type(one).__name__ for one in metrics)} |"
    yield "|---|" + "---:|" * len(metrics)
    methods = sf.IntegratedGradients(), sf.IntegratedGradients(tolerance=0.02)
    for method in (*methods, sf.IntegratedGradients(rule="midpoint")):
        maps, cells = sf.explain(model, x, target=target, method=method).values, list[str]()
        for metric in metrics:
            about = {"boxes": boxes} if isinstance(metric, ev.EnergyInBox) else {}
            own, other = (
                metric(model, x, one, target=target, **about).values for one in (maps, exact)
            )
            cells.append(f"{(own - other).mean():+.4f}, {(own - other).abs().max():.4f}")
        yield f"| {method} | {' | '.join(cells)} |"


def table(rows: list[dict[str, Any]]) -> str:
    """Median errors over baselines and examples, a line for each network, score and method; then
    how the adaptive rule compares, and how its errors are estimated.
    """
    points = sorted({one["points"] for one in rows})
    head = ["model", "score", "method", *map(str, points), "estimate / error"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * 3 + "---:|" * (len(points) + 1)]
    for key in dict.fromkeys((one["model"], one["score"], one["method"]) for one in rows):
        mine = [one for one in rows if (one["model"], one["score"], one["method"]) == key]
        cells = [
            f"{median(e for one in mine if one['points'] == n for e in one['errors']):.3f}"
            for n in points
        ]
        pairs = [pair for one in mine for pair in zip(one["estimates"], one["errors"], strict=True)]
        ratios = [estimate / error for estimate, error in pairs if error > EXACT]
        low, high = min(ratios, default=math.nan), max(ratios, default=math.nan)
        lines.append(f"| {' | '.join([*key, *cells, f'{low:.1f} to {high:.1f}'])} |")
    return "\n".join([*lines, "", *compared(rows)]) + "\n"


def compared(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The adaptive rule against the best of the fixed ones: median errors over the examples of each
    network, score and baseline, those under `NOTHING` counted as that.
    """
    head = ("points", "adaptive / best fixed rule", "worst", "over 1.25", "adaptive / midpoint")
    yield f"| {' | '.join(head)} |"
    yield "|---:|---:|---:|---:|---:|"
    medians: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in rows:
        if "baseline" in one:
            key = one["points"], one["model"], one["score"], one["baseline"]
            error = max(NOTHING, median(one["errors"]))
            medians.setdefault(key, {})[one["method"]] = error
    for n in sorted({key[0] for key in medians}):
        mine = [errors for key, errors in medians.items() if key[0] == n]
        best = [one["adaptive"] / min(one[rule] for rule in FIXED) for one in mine]
        usual = [one["adaptive"] / one["midpoint"] for one in mine]
        over = f"{sum(ratio > 1.25 for ratio in best)} of {len(best)}"
        yield f"| {n} | {_mean(best):.2f} | {max(best):.2f} | {over} | {_mean(usual):.2f} |"
    ratios = [
        estimate / error
        for one in rows
        if one["method"] == "adaptive" and one["points"] > 8
        for estimate, error in zip(one["estimates"], one["errors"], strict=True)
        if error > EXACT
    ]
    covered = sum(ratio >= 1 for ratio in ratios) / max(1, len(ratios))
    middle = median(ratios) if ratios else math.nan
    yield ""
    yield (
        f"The adaptive rule's estimate is no less than the error in {covered:.1%} of {len(ratios)} "
        f"maps, and {middle:.1f} times it in the median."
    )


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--only", default="", metavar="PATTERN", help="networks that match")
    options = parser.parse_args()
    names = [name for name in NETWORKS if re.search(options.only, name)]
    sizes: Any = (4, (8, 16, 24, 32, 50, 64, 128), 1536)
    if options.quick:
        names, sizes = ["table", "digits"], (2, (8, 16), 64)
    rows = [*measure_paths(names, *sizes), *measure_noise(*sizes[:2], 4 * sizes[2])]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    few = (4, 64) if options.quick else (24, 3000)
    text = table(rows) + "\nMean and largest difference to a converged map's metrics.\n\n"
    text += "\n".join(measure_metrics(*few)) + "\n"
    (options.out / "accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
