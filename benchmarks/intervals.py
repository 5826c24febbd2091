"""How often the intervals of noisy methods hold the truth: `python -m benchmarks.intervals`.

Pixels whose gradient under normal noise has a known mean and variance, 8000 of each kind. Writes
benchmarks/results/intervals.json and intervals.md in seconds; nothing in it is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saliency_fast as sf
from saliency_fast.methods.sampling import GROUPS, student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Kind:
    """A function of one normal number, and the mean and variance of its derivative."""

    name: str
    of: Callable[[Tensor], Tensor]
    mean: float
    variance: float


def _uniform(z: Tensor) -> Tensor:
    """Its derivative is uniform on (-1, 1)."""
    return z * torch.erf(z / 2**0.5) + (2 / torch.pi) ** 0.5 * torch.exp(-(z**2) / 2)


KINDS = (
    Kind("normal", lambda z: z**2 / 2, 0.0, 1.0),
    Kind("uniform", _uniform, 0.0, 1 / 3),
    Kind("squared normal", lambda z: z**3 / 3, 1.0, 2.0),
    Kind("on or off (a kink)", lambda z: z.relu(), 0.5, 0.25),
)


def measure(samples: tuple[int, ...], pixels: int) -> Iterator[dict[str, Any]]:
    """A row for every kind of gradient and number of samples."""
    from scipy import stats

    x = torch.zeros(1, pixels, dtype=torch.float64)
    for kind in KINDS:
        for n in samples:
            fields: dict[str, Any] = {"samples": n, "sigma": 1.0, "seed": 7}

            def model(z: Tensor, kind: Kind = kind) -> Tensor:
                return kind.of(z).sum(1)

            method: Any = sf.SmoothGrad(**fields, antithetic=False, standard_error=True)
            mean = sf.explain(model, x, method=method)
            reach = student(CONFIDENCE, GROUPS - 1) * mean.extras["standard_error"]
            method = sf.VarGrad(**fields, confidence=CONFIDENCE)
            spread = sf.explain(model, x, method=method)
            low, high = spread.extras["interval_low"], spread.extras["interval_high"]
            # What holds for normal gradients: the sum of squares over its quantiles.
            total = spread.values * n
            tail = (1 - CONFIDENCE) / 2
            least, most = (total / stats.chi2.ppf(p, n - 1) for p in (1 - tail, tail))
            yield {
                "gradient": kind.name,
                "samples": n,
                "mean": _share((mean.values - kind.mean).abs() <= reach),
                "variance": _share((low <= kind.variance) & (kind.variance <= high)),
                "chi_square": _share((least <= kind.variance) & (kind.variance <= most)),
            }


def _share(held: Tensor) -> float:
    return float(held.double().mean())


def table(document: dict[str, Any]) -> str:
    """A line for each kind of gradient and number of samples."""
    heads = ["gradient", "samples", "SmoothGrad's mean", "VarGrad's interval", "chi-square"]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|"]
    for row in document["rows"]:
        shares = [f"{row[name]:.1%}" for name in ("mean", "variance", "chi_square")]
        lines.append(f"| {' | '.join([row['gradient'], str(row['samples']), *shares])} |")
    about = f"{document['pixels']} pixels each, nominal {CONFIDENCE:.0%}"
    return f"{about}; `python -m benchmarks.intervals`.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    options = parser.parse_args()
    samples, pixels = ((16,), 50) if options.quick else ((16, 32, 64, 256), 8000)
    document = {"pixels": pixels, "rows": list(measure(samples, pixels))}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "intervals.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "intervals.md").write_text(table(document))
    print(table(document))


if __name__ == "__main__":
    main()
