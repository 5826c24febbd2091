"""The reference: slow, obvious float64 attribution, kept in a cache since it takes minutes.

    python -m benchmarks.reference          fills the cache for `python -m benchmarks.end_to_end`

Integrated Gradients are held against the same quadrature in float64, so their error is rounding
alone. SmoothGrad is held against the mean of many more samples (of pairs x + e, x - e, drawn from
a generator of their own), so its error is the sampling error.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import CPU_CASES, SETTINGS, Setting
from benchmarks.models import Workload

CACHE = Path(__file__).parent / "results" / ".cache"
SEED = 20_240_607
"""Far from the contenders' seeds."""


def gradient(model: nn.Module, point: Tensor, target: int | tuple[int, ...]) -> Tensor:
    """The gradient of the summed scores of a batch of points [B, *]."""
    point = point.detach().requires_grad_()
    index = (slice(None), *(target if isinstance(target, tuple) else (target,)))
    return torch.autograd.grad(model(point)[index].sum(), point)[0]


def integrated_gradients(
    model: nn.Module, x: Tensor, target: int | tuple[int, ...], steps: int
) -> Tensor:
    """The mean gradient between zero and x, times x, by the Gauss-Legendre rule of `steps`."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        total += 0.5 * weight * gradient(model, 0.5 * (node + 1.0) * x, target)
    return x * total


def smoothgrad(
    model: nn.Module, x: Tensor, target: int | tuple[int, ...], sigma: float, samples: int
) -> Tensor:
    """The mean gradient of `samples` noisy copies in pairs of opposite noise."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    total = torch.zeros_like(x)
    for _ in range(samples // 2):
        noise = sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for step in (noise.to(x.device), -noise.to(x.device)):
            total += gradient(model, x + step, target)
    return total / (samples // 2 * 2)


def attribution(
    workload: Workload,
    setting: Setting,
    *,
    examples: int,
    samples: int,
    device: str = "cpu",
    cache: Path = CACHE,
) -> Tensor:
    """The reference of the first `examples` inputs, float64 on the CPU, cached where it can.

    samples: the noisy copies that a SmoothGrad reference takes.
    """
    model = workload.build()
    key = _key(workload, model, setting, examples, samples)
    path = cache / f"{workload.name}-{setting.label}-{key}.pt"
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    model = model.double().to(device)
    x = workload.inputs(examples).double().to(device)
    if setting.method == "gradient":
        found = gradient(model, x, workload.target)
    elif setting.method == "integrated_gradients":
        found = integrated_gradients(model, x, workload.target, setting.points)
    else:
        found = smoothgrad(model, x, workload.target, setting.sigma, samples)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    torch.save(found.cpu(), path)
    return found.cpu()


def _key(
    workload: Workload, model: nn.Module, setting: Setting, examples: int, samples: int
) -> str:
    """Changes with the weights and with everything else that the reference depends on."""
    digest = hashlib.sha256()
    count = samples if setting.method == "smoothgrad" else 0
    digest.update(repr((workload.shape, workload.target, setting, examples, count, SEED)).encode())
    for value in model.state_dict().values():
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Relative L2 over all examples of `reference`, of which `found` may hold more."""
    found = found[: len(reference)].double()
    return float(torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for case in CPU_CASES:
        for batch in case.batches:
            for setting in SETTINGS:
                begun = time.perf_counter()
                examples = case.examples(batch)
                attribution(case.found(), setting, examples=examples, samples=case.samples)
                seconds = time.perf_counter() - begun
                print(f"{case.label} batch {batch} {setting.label}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
