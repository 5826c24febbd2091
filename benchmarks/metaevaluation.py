"""What the metrics say of methods and of controls on the built-in models: a meta-evaluation.

    python -m benchmarks.metaevaluation             minutes on two cores
    python -m benchmarks.metaevaluation --quick     seconds; few images, for tests

Held-out scenes with known boxes; for the pointing game, whose differences are of few scenes, also
many fresh ones of the held-out digits, which needs scikit-learn. A metric earns trust where it
tells methods from maps that know nothing of the model, and a perfect map (the box itself) from a
random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import saliency_fast as sf
from benchmarks.end_to_end import command, machine
from benchmarks.tables import aligned, caption
from examples.clutter import hide, split_glyphs
from saliency_fast import evaluate as ev
from saliency_fast.zoo import MODELS, Samples, held_out

METHODS: dict[str, Any] = {
    "gradient": "gradient",
    "input_x_gradient": "input_x_gradient",
    "smoothgrad": "smoothgrad",
    "integrated_gradients": "integrated_gradients",
    "edge_detector": ev.edge_detector,
    "centre": ev.centre_map,
    "random": ev.random_map,
}
SANITY = ("gradient", "input_x_gradient", "smoothgrad", "integrated_gradients", "edge_detector")
FRESH, FRESH_SEED = 718, 7_500_000
EPSILONS = (0.02, 0.05, 0.1, 0.2)
ATTACKED: dict[str, Any] = {
    "integrated_gradients": sf.IntegratedGradients(steps=16),
    "gradient": "gradient",
    "smoothgrad": sf.SmoothGrad(samples=8),
}


def _maps(model: Any, samples: Samples) -> dict[str, Tensor]:
    found = {}
    for name, method in METHODS.items():
        if isinstance(method, str):
            values = sf.explain(model, samples.images, target=samples.labels, method=method).values
            assert isinstance(values, Tensor)
            found[name] = values
        else:
            found[name] = method(model, samples.images, samples.labels)
    return found


def _perfect(samples: Samples) -> Tensor:
    """The box itself, and within it the brighter positions first: what a map could know at best."""
    boxes = torch.zeros_like(samples.images)
    for row, (top, left, bottom, right) in enumerate(samples.boxes.tolist()):
        boxes[row, :, top:bottom, left:right] = 1.0
    return boxes * (1.0 + samples.images)


def _row(part: str, model: str, name: str, interval: ev.Interval, **further: Any) -> dict[str, Any]:
    numbers = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {"part": part, "model": model, "name": name, **numbers, **further}


def _fresh(count: int) -> Samples:
    """New scenes of the held-out digits, of seeds that nothing else has."""
    _, glyphs = split_glyphs()
    return hide(glyphs, torch.arange(count) % len(glyphs), FRESH_SEED)


def pointing(
    name: str, samples: Samples, maps: Mapping[str, Tensor], part: str = "pointing game"
) -> list[dict[str, Any]]:
    """Accuracies, and how much they are over the plain gradient's and over the centre's, paired."""
    game = ev.PointingGame()
    found = {
        one: game(None, samples.images, values, boxes=samples.boxes) for one, values in maps.items()
    }
    rows = []
    for one, outcome in found.items():
        over = {
            other: str(outcome.over(found[other]))
            for other in ("gradient", "centre")
            if other != one
        }
        rows.append(_row(part, name, one, outcome.mean(), over=over))
    return rows


def curves(
    name: str, model: Any, samples: Samples, maps: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Areas of deletion and insertion, and how much they are over the random map's, paired."""
    rows = []
    for metric in (ev.Deletion(), ev.Insertion()):
        found = {
            one: metric(model, samples.images, values, target=samples.labels)
            for one, values in maps.items()
        }
        for one, outcome in found.items():
            over = {} if one == "random" else {"random": str(outcome.over(found["random"]))}
            rows.append(_row(metric.name, name, one, outcome.mean(), over=over))
    return rows


def sanity(name: str, model: Any, samples: Samples) -> list[dict[str, Any]]:
    """Verdicts, and what is left of each map by rank correlation when all layers are random."""
    check, rows = ev.SanityCheck(draws=2, stages=4), []
    for one in SANITY:
        method = METHODS[one]
        maps = (
            sf.explain(model, samples.images, target="predicted", method=method)
            if isinstance(method, str)
            else method(model, samples.images, None)
        )
        outcome = check(model, samples.images, maps, target="predicted", method=method)
        rows.append(_row("sanity check", name, one, outcome.mean(), passed=outcome.passed))
    return rows


def attacks(
    name: str, model: Any, samples: Samples, epsilons: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Areas under the ROC of the score of unusual maps: half are references."""
    half, rows = len(samples) // 2, []
    for one, method in ATTACKED.items():
        for epsilon in epsilons:
            found = ev.attack_roc(
                model,
                samples.images[half:],
                samples.labels[half:],
                samples.images[:half],
                method,
                epsilon,
            )
            for attack, curve in found.rocs.items():
                if curve is not None:
                    label = f"{one}, {attack}, {epsilon:g}"
                    rows.append(_row("attacks detected", name, label, curve.area))
    return rows


def measure(
    *, device: str = "cpu", quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    if device != "cpu":
        raise SystemExit("the built-in models are evaluated on the CPU")
    whole, rows = held_out(), []
    count = 8 if quick else len(whole)
    samples = Samples(whole.images[:count], whole.labels[:count], whole.boxes[:count])
    some = Samples(
        *(one[: 4 if quick else 16] for one in (samples.images, samples.labels, samples.boxes))
    )
    for name in ("digits",) if quick else tuple(MODELS):
        model = MODELS[name]()
        maps = _maps(model, samples)
        found = pointing(name, samples, maps)
        if not quick:
            fresh = _fresh(FRESH)
            part = f"pointing game, {FRESH} fresh scenes"
            found += pointing(name, fresh, _maps(model, fresh), part)
        found += curves(name, model, samples, maps | {"perfect": _perfect(samples)})
        found += sanity(name, model, some)
        if not quick:
            found += attacks(name, model, samples, EPSILONS)
        for row in found:
            say(
                f"{row['model']} {row['part']} {row['name']}: {row['mean']:.3g} "
                f"{row.get('over', '')}"
            )
        rows += found
    about = machine(device) | {"quick": quick, "quantus": version("quantus"), "examples": count}
    return {"setting": about, "rows": rows}


def table(document: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [caption(document["setting"])]
    for part in dict.fromkeys(row["part"] for row in document["rows"]):
        own = [row for row in document["rows"] if row["part"] == part]
        lines += ["", f"**{part[0].upper()}{part[1:]}**", "", *_part(part, own)]
    lines += [
        "",
        f"{document['setting']['examples']} held-out scenes; 95 % bootstrap intervals; differences "
        "are paired. Deletion and insertion are areas under softmax curves of 100 steps over "
        "black; sanity checks are of 16 scenes: the rank correlation with a map of a model of "
        "random weights. Attacks detected: area under the ROC of `attack_roc`; half of the "
        "scenes are references, and attacks are those on the other half that fool the model.",
    ]
    return "\n".join(lines) + "\n"


def _part(part: str, rows: list[dict[str, Any]]) -> list[str]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    others = list(dict.fromkeys(name for row in rows for name in row.get("over", {})))
    cells = []
    for row in rows:
        values = [
            row["model"],
            row["name"],
            f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        ]
        values += [row.get("over", {}).get(one, "") for one in others]
        if "passed" in row:
            values.append({True: "passed", False: "FAILED", None: "no verdict"}[row["passed"]])
        cells.append(values)
    heads = {"sanity check": "rank correlation, verdict", "attacks detected": "area"}
    value = heads.get(part, "area" if part in ("deletion", "insertion") else "accuracy")
    over = "".join(f", over {one}" for one in others)
    assert models
    first = "method:, " if part != "attacks detected" else "method; attack; epsilon:, "
    head = f"model, {first}{value.split(', ')[0]}{over}"
    return aligned(head + (", verdict" if part == "sanity check" else ""), cells)


if __name__ == "__main__":
    command(__doc__, "few images", measure, table, "metaevaluation")
