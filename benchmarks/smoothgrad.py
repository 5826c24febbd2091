"""How many samples Captum's SmoothGrad takes for the error of ours.

    python -m benchmarks.smoothgrad             some twenty minutes on two cores
    python -m benchmarks.smoothgrad --quick     seconds; few images and samples, for tests

Ours draws pairs of opposite noise, Captum's NoiseTunnel over Saliency independent samples. Both
explain the built-in networks on held-out scenes, with the same noise, and are held against many
more samples. Nothing is timed. Writes benchmarks/results/smoothgrad.json and smoothgrad.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import NoiseTunnel, Saliency
from torch import Tensor

import saliency_fast as sf
from benchmarks.accuracy import distances, logits, probabilities
from benchmarks.end_to_end import RESULTS, machine, save
from benchmarks.race import Clock
from benchmarks.tables import caption
from saliency_fast import zoo

SCORES = {"logits": logits, "probabilities": probabilities}
REFERENCE_SEED = 10**6
RESAMPLINGS = 500


@dataclass(frozen=True)
class Sizes:
    """Held-out images, noise levels (shares of an image's range), samples of maps and reference."""

    images: int = 32
    levels: tuple[float, ...] = (0.05, 0.1, 0.15, 0.25)
    samples: tuple[int, ...] = (16, 32, 64)
    reference: int = 2048


QUICK = Sizes(images=4, levels=(0.15,), samples=(4, 8), reference=64)
Errors = Mapping[int, Tensor]
"""For each number of samples the relative L2 error of every image, [images]."""


def rms(errors: Tensor) -> float:
    """Root of the mean square."""
    return float(errors.double().square().mean().sqrt())


def constant(errors: Errors) -> float:
    """The c of the fit error = c / sqrt(samples), in logarithms."""
    logs = [math.log(rms(found) * math.sqrt(samples)) for samples, found in errors.items()]
    return math.exp(sum(logs) / len(logs))


def sample_ratio(ours: Errors, captum: Errors) -> float:
    """Samples that Captum takes for each of ours, at equal error, by the fit of both."""
    return (constant(captum) / constant(ours)) ** 2


def median_ratio(ours: Errors, captum: Errors) -> float:
    """The ratio of the median image, which a few images of large errors do not move."""
    count = len(next(iter(ours.values())))
    each = [
        sample_ratio(*({n: found[i] for n, found in one.items()} for one in (ours, captum)))
        for i in range(count)
    ]
    return statistics.median(each)


def misfit(errors: Errors) -> float:
    """The most that errors differ from the fit, relative to it."""
    fit = constant(errors)
    return max(abs(rms(one) * math.sqrt(n) / fit - 1.0) for n, one in errors.items())


def interval(ours: Errors, captum: Errors) -> list[float]:
    """Where the ratio lies in nine of ten resamplings of the images."""
    (count,) = {len(found) for found in (*ours.values(), *captum.values())}
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(RESAMPLINGS):
        chosen = torch.randint(count, (count,), generator=generator)
        resampled = ({n: found[chosen] for n, found in one.items()} for one in (ours, captum))
        ratios.append(sample_ratio(*resampled))
    ends = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95]).double())
    return [float(end) for end in ends]


def our_maps(
    model: Any, x: Tensor, classes: Tensor, level: float, samples: int, seed: int
) -> Tensor:
    """Maps of antithetic samples; every image has a seed of its own."""
    seeds = tuple(range(seed, seed + len(x)))
    method = sf.SmoothGrad(samples, level, seed=seeds)
    values: Tensor = sf.Engine(model, method, hashes=False)(x, classes).values
    return values


def captum_maps(
    model: Any, x: Tensor, classes: Tensor, level: float, samples: int, seed: int
) -> Tensor:
    """Maps of NoiseTunnel, signed; one image at a time, since its deviation is not a share."""
    torch.manual_seed(seed)
    tunnel, maps = NoiseTunnel(Saliency(model)), []
    for image, target in zip(x, classes.tolist(), strict=True):
        deviation = level * float(image.max() - image.min())
        maps.append(
            tunnel.attribute(
                image[None],
                nt_type="smoothgrad",
                nt_samples=samples,
                stdevs=deviation,
                target=target,
                abs=False,
            )
        )
    return torch.cat(maps)


def compare(name: str, score: str, level: float, sizes: Sizes) -> dict[str, Any]:
    """The row of a network, a score and a noise level."""
    network, x = zoo.MODELS[name](), zoo.held_out().images[: sizes.images]
    # What is read here are gradients of the input alone.
    network.requires_grad_(False)
    model = partial(SCORES[score], network)
    classes = model(x).argmax(1)
    expected = our_maps(model, x, classes, level, sizes.reference, REFERENCE_SEED)
    errors: dict[str, dict[int, Tensor]] = {"ours": {}, "captum": {}}
    for n in sizes.samples:
        # Seeds of their own: samples of a larger number would begin with those of a smaller.
        found = our_maps(model, x, classes, level, n, n * 1000)
        errors["ours"][n] = distances(found, expected)
    for n in sorted({*sizes.samples, *(2 * n for n in sizes.samples)}):
        errors["captum"][n] = distances(captum_maps(model, x, classes, level, n, n), expected)
    measured = {
        who: {str(n): rms(one) for n, one in found.items()} for who, found in errors.items()
    }
    return {
        "model": name,
        "score": score,
        "noise_level": level,
        "errors": measured,
        "ratio": sample_ratio(errors["ours"], errors["captum"]),
        "median_ratio": median_ratio(errors["ours"], errors["captum"]),
        "interval": interval(errors["ours"], errors["captum"]),
        "misfit": max(misfit(found) for found in errors.values()),
    }


def measure(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """A row for every network, score and noise level."""
    warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
    for name in zoo.MODELS:
        for score in SCORES:
            for level in sizes.levels:
                yield compare(name, score, level, sizes)


def table(document: dict[str, Any]) -> str:
    """Errors of both side by side, the ratio of samples, and for which rows it is two."""
    about, rows = document["setting"], document["rows"]
    counts = sorted({int(n) for row in rows for n in row["errors"]["ours"]})
    head = ["model", "score", "noise"]
    for n in counts:
        head += [f"ours, {n}", f"Captum, {n}", f"Captum, {2 * n}"]
    head += [
        "Captum's samples for one of ours",
        "nine of ten resamplings",
        "median image",
        "fit within",
    ]
    lines = [caption(about), "", f"| {' | '.join(head)} |"]
    lines.append("|---|---|" + "---:|" * (len(head) - 2))
    for row in rows:
        mine, theirs = row["errors"]["ours"], row["errors"]["captum"]
        cells = [row["model"], row["score"], f"{row['noise_level']:g}"]
        for n in counts:
            found = (mine[str(n)], theirs[str(n)], theirs[str(2 * n)])
            cells += [f"{error:.3f}" for error in found]
        low, high = row["interval"]
        cells += [
            f"{row['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['median_ratio']:.2f}",
            f"{row['misfit']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", verdict(rows), "", EXPLAINED.format(**about)]) + "\n"


EXPLAINED = (
    "Errors are relative L2, root mean square over {images} held-out images, against {reference} "
    "samples of ours with other seeds, whose own error is not subtracted. Noise is a share of each "
    "image's range. The samples that Captum (NoiseTunnel over Saliency, signed) takes for each of "
    "ours at equal error are the squared ratio of c in error = c / sqrt(samples), fitted to each; "
    "the last column says how far errors are off that fit."
)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Where Captum takes twice as many samples, where that is in doubt, and where not."""
    ratios = [row["ratio"] for row in rows]
    enough = [row for row in rows if row["ratio"] >= 2.0]
    doubtful = [row for row in rows if row["ratio"] < 2.0 <= row["interval"][1]]
    return (
        f"Half of Captum's samples suffice in {len(enough)} of {len(rows)} rows ({_named(enough)})"
        f", and in {len(doubtful)} more the interval reaches two ({_named(doubtful)}). Captum "
        f"takes {min(ratios):.2f} to {max(ratios):.2f} samples for one of ours, "
        f"{statistics.median(ratios):.2f} in the median."
    )


def _named(rows: list[dict[str, Any]]) -> str:
    names = (f"{row['model']}, {row['score']}, {row['noise_level']:g}" for row in rows)
    return "; ".join(names) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--out", type=Path, help="a directory; without one, --quick writes nothing")
    options = parser.parse_args()
    sizes, clock, rows = QUICK if options.quick else Sizes(), Clock(None), []
    for row in measure(sizes):
        rows.append(row)
        print(
            f"{clock.spent:4.0f} s  {row['model']} {row['score']} {row['noise_level']}: "
            f"{row['ratio']:.2f}",
            flush=True,
        )
    document = {"setting": described(sizes, options.quick, clock.spent), "rows": rows}
    out = options.out or (None if options.quick else RESULTS)
    text = table(document)
    if out is not None:
        save(document, text, out, "smoothgrad")
    print(text)


def described(sizes: Sizes, quick: bool, seconds: float) -> dict[str, Any]:
    """What the numbers depend on."""
    about = machine("cpu") | {"quick": quick, "seconds_taken": round(seconds)}
    return about | {"images": sizes.images, "reference": sizes.reference}


if __name__ == "__main__":
    main()
