"""What each precision costs a map and what it gains, against float32, the same points and seed.

    python -m benchmarks.precision                  some three minutes on two cores
    python -m benchmarks.precision --device cuda    tf32, float16 and bfloat16
    python -m benchmarks.precision --quick          seconds; tiny models, for tests

Two trained networks on held-out scenes, and three untrained ones of common sizes on random inputs.
Precisions take turns in one process. Writes precision-cpu or precision-gpu, JSON and Markdown,
under benchmarks/results/; docs/precision.md shows the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import saliency_fast as sf
from benchmarks import tables
from benchmarks.accuracy import distances
from benchmarks.cases import SIGMA, sized
from benchmarks.end_to_end import command, machine
from benchmarks.race import Clock
from saliency_fast import zoo
from saliency_fast.errors import SaliencyError
from saliency_fast.graph.passes.half import AUTO, FLOAT32, OF_DEVICE

SHARE = 0.01
"""Of the pixels, those that count as the top."""


@dataclass(frozen=True)
class Subject:
    """A model by name: a built-in one on held-out scenes, or a workload with inputs of `side`."""

    name: str
    examples: int = 1
    side: int | None = None

    def load(self, device: str) -> tuple[nn.Module, Tensor, Any]:
        """(model, inputs [examples, *], target)."""
        if self.name in zoo.MODELS:
            model, x = zoo.MODELS[self.name](), zoo.held_out().images[: self.examples]
            classes = model(x).argmax(1).tolist()
            return model.to(device), x.to(device), classes
        workload = sized(self.name, self.side)
        return (
            workload.build().to(device),
            workload.inputs(self.examples).to(device),
            workload.target,
        )


SUBJECTS = (
    Subject("digits", 8),
    Subject("digits-vit", 8),
    Subject("resnet50"),
    Subject("vit_b16", side=112),
    Subject("unet3d", side=32),
)
QUICK_SUBJECTS = (Subject("digits", 2), Subject("tiny-vit"), Subject("tiny-unet3d"))


@dataclass(frozen=True)
class Sizes:
    """Models, methods by their labels, and when the timed rounds of one end."""

    subjects: tuple[Subject, ...]
    methods: dict[str, Any]
    rounds: tuple[int, int]
    seconds: float


FULL = Sizes(
    SUBJECTS,
    {"IG-50": sf.IntegratedGradients(50), "SmoothGrad-32": sf.SmoothGrad(32, sigma=SIGMA)},
    rounds=(2, 15),
    seconds=8.0,
)
QUICK = Sizes(
    QUICK_SUBJECTS,
    {"IG-6": sf.IntegratedGradients(6), "SmoothGrad-4": sf.SmoothGrad(4, sigma=SIGMA)},
    rounds=(1, 2),
    seconds=0.3,
)


def ranks(values: Tensor) -> Tensor:
    """Places in ascending order from 1 on, float64 [N]; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two [N]; NaN where all values of one are equal."""
    centred = [ranks(one) - (len(one) + 1) / 2 for one in (a, b)]
    return float(centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm()))


def top_overlap(a: Tensor, b: Tensor, share: float = SHARE) -> float:
    """Share of the largest values, [N] each, that are the largest of both."""
    count = max(1, round(share * len(a)))
    tops = [set(one.topk(count).indices.tolist()) for one in (a, b)]
    return len(tops[0] & tops[1]) / count


def agreement(found: sf.Attribution, exact: sf.Attribution) -> dict[str, float]:
    """How two attributions differ: medians over their examples."""
    pairs = list(zip(found.map("l2").flatten(1), exact.map("l2").flatten(1), strict=True))
    each = {
        "distance": distances(found.values, exact.values).tolist(),
        "rank_correlation": [rank_correlation(*pair) for pair in pairs],
        "top_overlap": [top_overlap(*pair) for pair in pairs],
    }
    return {name: statistics.median(values) for name, values in each.items()}


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, and of what it has launched on a GPU."""
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def compare(
    subject: Subject, label: str, method: Any, sizes: Sizes, device: str
) -> Iterator[dict[str, Any]]:
    """A row for every precision that the device offers but float32."""
    model, x, target = subject.load(device)
    engines = {
        name: sf.Engine(model, method, precision=name, hashes=False)
        for name in (FLOAT32.name, *OF_DEVICE[device], AUTO)
    }
    chosen = engines.pop(AUTO)(x, target).provenance.precision
    first = {name: attempt(engine, x, target) for name, engine in engines.items()}
    found = {name: one for name, one in first.items() if isinstance(one, sf.Attribution)}
    exact = found[FLOAT32.name]
    running = {name: engines[name] for name in found}
    seconds = rounds_of(running, x, target, sizes, device)
    common = {
        "workload": subject.name,
        "shape": list(x.shape[1:]),
        "examples": len(x),
        "method": label,
        "own_error": float(exact.error.median()),
        "auto": chosen,
        "float32_seconds": statistics.median(seconds[FLOAT32.name]),
    }
    for name in (one for one in OF_DEVICE[device] if one != FLOAT32.name):
        if name not in found:
            yield common | {"precision": name, "reason": first[name]}
            continue
        times, lost = seconds[name], found[name].precision_error
        median = statistics.median(times)
        yield (
            common
            | agreement(found[name], exact)
            | {
                "precision": name,
                "reason": None,
                "told": float(lost.median()),
                "underflow": found[name].provenance.notes.get("underflow"),
                "seconds": median,
                "fastest": min(times),
                "slowest": max(times),
                "rounds": len(times),
                "speed": common["float32_seconds"] / median,
            }
        )


def attempt(engine: sf.Engine, x: Tensor, target: Any) -> sf.Attribution | str:
    """The engine's attribution, or why it gives none."""
    try:
        return engine(x, target)
    except SaliencyError as error:
        return str(error).splitlines()[0]


def rounds_of(
    engines: dict[str, sf.Engine], x: Tensor, target: Any, sizes: Sizes, device: str
) -> dict[str, list[float]]:
    """Seconds of each engine's calls, in turn; whoever comes first comes last in the next round."""
    least, most = sizes.rounds
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    clock, names = Clock(sizes.seconds), list(engines)
    for number in range(most):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(lambda: engines[name](x, target), device))  # noqa: B023
        if number + 1 >= least and clock.left <= 0:
            break
    return seconds


def table(document: dict[str, Any]) -> str:
    """A line for every model, method and precision."""
    header = (
        "model, method, precision:, from float32, estimated, rank correlation, top 1 % in common, "
        "float32's own error, time, float32's time, speed, auto takes:"
    )
    lines = []
    for row in document["rows"]:
        cells = [tables.model_text(row), row["method"], row["precision"]]
        if row["reason"]:
            cells += [row["reason"], *["-"] * 4]
        else:
            cells += [
                tables.error_text(row["distance"]),
                tables.error_text(row["told"]),
                f"{row['rank_correlation']:.4f}",
                f"{row['top_overlap']:.0%}",
                tables.error_text(row["own_error"]),
            ]
        cells += [
            tables.time_text(row.get("seconds")),
            tables.time_text(row["float32_seconds"]),
            tables.times_text(row.get("speed")),
            row["auto"],
        ]
        lines.append(cells)
    about = document["setting"]
    return "\n".join([tables.caption(about), "", *tables.aligned(header, lines), "", NOTES]) + "\n"


NOTES = (
    "From float32: relative L2 distance of the map from the one in float32, at the same points and "
    "with the same seed; estimated: what the library said of it without knowing that map "
    "(`precision_error`). Rank correlation is Spearman's of the pixels' magnitudes, and the top "
    "1 % are the pixels of the largest. Float32's own error is `Attribution.error` of its map: "
    "what the number of steps or samples leaves. Medians over 8 held-out scenes for the two "
    "built-in networks, which are trained; the others have random weights, which exaggerates. "
    'Times are medians of interleaved calls; auto is what `precision="auto"` took with its default '
    "tolerance."
)


def measure(
    *, device: str = "cpu", quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    clock, sizes, found = Clock(None), QUICK if quick else FULL, []
    for subject in sizes.subjects:
        for label, method in sizes.methods.items():
            found += compare(subject, label, method, sizes, device)
            say(f"{clock.spent:4.0f} s  {subject.name} {label}")
    about = machine(device) | {"quick": quick, "seconds_taken": round(clock.spent)}
    return {"setting": about, "rows": found}


def main() -> None:
    command(__doc__, "tiny models", measure, table, "precision")


if __name__ == "__main__":
    main()
