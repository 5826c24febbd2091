"""Metrics of maps, by `saliency_fast.evaluate` and by Quantus, on the same maps and protocol.

    python -m benchmarks.evaluation             minutes on two cores
    python -m benchmarks.evaluation --quick     seconds; few images and steps, for tests

Both take turns in one process, each as documented: Quantus with its default batch of 64. The gap is
the largest between the numbers of both: of curves at every step, of other metrics per example.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from benchmarks.end_to_end import command, machine
from benchmarks.models import resnet50
from benchmarks.tables import aligned, caption, error_text, time_text, times_text
from saliency_fast import evaluate as ev
from saliency_fast.zoo import digits_cnn, held_out

ROUNDS = 5
PATIENCE = 20.0
"""Seconds of one round from which one more is enough."""
GREY = 0.5


@dataclass(frozen=True)
class Task:
    """A model, its inputs with their targets, and maps of them."""

    name: str
    model: nn.Module
    x: Tensor
    target: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Pair:
    """A metric, by us and by Quantus; both give an array of the same shape."""

    name: str
    ours: Callable[[Task], np.ndarray]
    theirs: Callable[[Task], np.ndarray]


def _quantus(metric: Any, task: Task, x: np.ndarray, **further: Any) -> Any:
    return metric(
        model=task.model,
        x_batch=x,
        y_batch=task.target.numpy(),
        a_batch=task.maps.numpy(),
        device="cpu",
        **further,
    )


_PLAIN: dict[str, Any] = {
    "abs": False,
    "normalise": False,
    "disable_warnings": True,
    "display_progressbar": False,
}


def deletion(size: int, substrate: float) -> Pair:
    """Deletion in steps of so many positions; Quantus calls it pixel flipping."""

    def ours(task: Task) -> np.ndarray:
        metric = ev.Deletion(substrate=substrate, step_size=size, per="element")
        return metric(task.model, task.x, task.maps, target=task.target).curve.y[:, 1:].numpy()

    def theirs(task: Task) -> np.ndarray:
        import quantus

        metric = quantus.PixelFlipping(features_in_step=size, perturb_baseline=substrate, **_PLAIN)
        return np.array(_quantus(metric, task, task.x.numpy(), softmax=True))

    return Pair(f"deletion, {substrate:g}", ours, theirs)


def insertion(size: int, substrate: float) -> Pair:
    """Insertion; with Quantus by a perturbation that restores positions."""

    def ours(task: Task) -> np.ndarray:
        metric = ev.Insertion(substrate=substrate, step_size=size, per="element")
        return metric(task.model, task.x, task.maps, target=task.target).curve.y[:, 1:].numpy()

    def theirs(task: Task) -> np.ndarray:
        import quantus

        whole = task.x.flatten(1).numpy()

        def put_back(arr: np.ndarray, indices: np.ndarray, **_: Any) -> np.ndarray:
            found, rows = arr.copy(), np.arange(len(arr))[:, None]
            found[rows, indices] = whole[rows, indices]
            return found

        metric = quantus.PixelFlipping(features_in_step=size, perturb_func=put_back, **_PLAIN)
        blank = np.full_like(task.x.numpy(), substrate)
        return np.array(_quantus(metric, task, blank, softmax=True))

    return Pair(f"insertion, {substrate:g}", ours, theirs)


def digits(count: int, side: int, method: str) -> Task:
    """Held-out digits, drawn anew at `side` pixels, with the maps of a method."""
    model, samples = digits_cnn(), held_out()
    x = functional.interpolate(samples.images[:count], size=(side, side), mode="nearest")
    target = samples.labels[:count]
    found = sf.explain(model, x, target=target, method=method).values
    assert isinstance(found, Tensor)
    maps = _untied(found)
    return Task(f"digits CNN, {count} x 1x{side}x{side}, {method}", model, x, target, maps)


def _untied(maps: Tensor) -> Tensor:
    """The rank of every element, equal ones in the order of their position: Quantus has another
    order for them, so that the steps in which they are replaced would differ.
    """
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = -torch.arange(order.shape[1], dtype=maps.dtype).expand(order.shape)
    return torch.zeros_like(rank).scatter(1, order, rank).view_as(maps)


def resnet(count: int) -> Task:
    """A ResNet-50 of random weights at 224 pixels, whose maps are noise without ties."""
    generator = torch.Generator().manual_seed(0)
    model, x = resnet50().eval(), torch.rand(count, 3, 224, 224, generator=generator)
    with torch.no_grad():
        target = model(x).argmax(1)
    maps = torch.rand(x.shape, generator=generator)
    return Task(f"ResNet-50, {count} x 3x224x224", model, x, target, maps)


def measure(
    *, device: str = "cpu", quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    if device != "cpu":
        raise SystemExit("evaluation is compared with Quantus on the CPU")
    found = []
    for make, pairs in _cases(quick):
        task = make()
        for pair in pairs:
            row = {"work": task.name, "metric": pair.name, **_race(pair, task, quick=quick)}
            say(f"{row['work']}, {row['metric']}: {row['times_quantus']:.2f}x, {row['gap']:.1g}")
            found.append(row)
    about = machine(device) | {"quick": quick, "quantus": version("quantus")}
    return {"setting": about, "rows": found}


def _cases(quick: bool) -> list[tuple[Callable[[], Task], list[Pair]]]:
    if quick:
        return [(lambda: digits(2, 64, "smoothgrad"), [deletion(1024, 0.0), insertion(1024, GREY)])]
    both = [make(64, fill) for fill in (0.0, GREY) for make in (deletion, insertion)]
    # Small ones first: see the note below.
    return [
        # 128 steps, of the size that the network was trained on.
        (lambda: digits(64, 64, "smoothgrad"), [deletion(32, 0.0), insertion(32, 0.0)]),
        # 100 steps of 64 positions.
        (lambda: digits(64, 80, "smoothgrad"), both),
        (lambda: digits(64, 80, "integrated_gradients"), both[:2]),
        # 96 steps.
        (lambda: resnet(2), [deletion(1568, 0.0), insertion(1568, 0.0)]),
    ]


def _race(pair: Pair, task: Task, *, quick: bool) -> dict[str, Any]:
    """Medians of calls in turn; the first ones only warm up, and give the numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        ours, theirs = pair.ours(task), pair.theirs(task)
        took = time.perf_counter() - started
        rounds = 1 if quick or took > PATIENCE else ROUNDS
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for run, times in zip((pair.ours, pair.theirs), seconds, strict=True):
                started = time.perf_counter()
                run(task)
                times.append(time.perf_counter() - started)
    mine, other = (statistics.median(one) for one in seconds)
    return {
        "seconds": mine,
        "quantus_seconds": other,
        "times_quantus": other / mine,
        "slowest": min(b for b in seconds[1]) / max(a for a in seconds[0]),
        "gap": float(np.abs(ours - theirs).max()),
        "rounds": rounds,
    }


def table(document: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = [
        [
            row["work"],
            row["metric"],
            time_text(row["seconds"]),
            time_text(row["quantus_seconds"]),
            times_text(row["times_quantus"]),
            error_text(row["gap"]),
        ]
        for row in document["rows"]
    ]
    setting = document["setting"]
    lines = [
        caption(setting),
        "",
        *aligned("work:, metric:, ours, Quantus, times faster, largest gap", rows),
        "",
        f"Against Quantus {setting['quantus']}, the same maps and protocol, in turn in one "
        "process; medians. The gap is the largest between both, of softmax probabilities at any "
        "step of any curve. Small inputs come first: in a process that has held larger tensors, "
        "memory for a batch of 64 is not allocated anew, and Quantus takes less time.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(__doc__, "few images and steps", measure, table, "evaluation")
