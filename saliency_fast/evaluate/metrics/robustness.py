"""Robustness: how far maps move when the inputs change a little and the decision does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.controls import shifted
from saliency_fast.evaluate.inputs import EvaluationInput, position_sums
from saliency_fast.evaluate.maps import overlap, rank_correlation, ssim, value_range
from saliency_fast.evaluate.metric import ROBUSTNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome, caveats_of
from saliency_fast.methods.parts import checks
from saliency_fast.ops import noise_points, philox, random_bits

NOISES = ("uniform", "gaussian")
NORMS = ("map", "input", "none")
Copy = tuple[Tensor, int, int]
"""Perturbed inputs [B, C, *spatial], and of shifts the axis of the maps and the distance."""


def noisy(inputs: Tensor, spread: Tensor, sample: int, noise: str, seed: int) -> Tensor:
    """Copies with "uniform" noise up to `spread` [B], or "gaussian" of that standard deviation."""
    example = torch.arange(len(inputs), device=inputs.device)
    samples, seeds = torch.full_like(example, sample), torch.full_like(example, seed)
    if noise == "gaussian":
        points: Tensor = noise_points(inputs, spread, seeds, example, samples, False, 0)
        return points
    bits = random_bits(seeds, samples, inputs[0].numel(), 0, philox.NOISE)
    # The middle of one of 2 ** 24 cells: exact in float32, never the ends.
    share = ((bits >> 8).double() + 0.5) * 2.0**-23 - 1.0
    moved: Tensor = (share * spread[:, None]).to(inputs.dtype)
    return inputs + moved.view_as(inputs)


@dataclass(frozen=True)
class _Sensitivity(Metric):
    """Distances of a map from the maps of perturbed copies of its input.

    Args:
        radius: Of the perturbations, in units of the inputs.
        samples: Perturbed copies of each example.
        noise: "uniform" in the box of that radius around the input, or "gaussian" with it as
            standard deviation.
        norm: What the L2 distance of two maps is divided by: the norm of the "map" (as in Captum),
            of the "input", or nothing ("none", as in the paper).
        seed: Of the noise, which differs between samples and is the same in every batch.
    """

    radius: float = 0.02
    samples: int = 10
    noise: str = "uniform"
    norm: str = "map"
    seed: int = 0
    better = "lower"
    needs = ("model", "method")
    largest: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, radius=checks.positive, samples=1, noise=NOISES, norm=NORMS, seed=0)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x, distances = data.inputs, []
        spread = torch.full((data.batch,), self.radius, dtype=torch.float64, device=x.device)
        # One call per sample keeps every example at its index: targets, baselines and further
        # arguments stay as they are, and methods whose draws depend on the index repeat them.
        for sample in range(self.samples):
            copy = noisy(x, spread, sample, self.noise, self.seed)
            maps, again = data.values, data.explain(copy)
            if maps.shape != again.shape:
                maps, again = data.places, position_sums(again)
            distances.append(_norm(maps.double() - again.double()))
        divisor = _norm(data.values if self.norm == "map" else x)
        if self.norm == "none":
            divisor = torch.ones_like(divisor)
        zero, table = divisor == 0, torch.stack(distances, 1)
        distance = table.amax(1) if self.largest else table.mean(1)
        values = (distance / divisor).masked_fill(zero, torch.nan)
        caveat = (
            f"{int(zero.sum())} examples are left out: the {self.norm} is all zeros, and no "
            "distance is relative to that; norm='none' takes distances as they are"
        )
        return self._outcome(values, caveats=caveats_of((zero.any(), caveat)))


def _norm(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1).double(), dim=1)
    return norms


@in_suite(ROBUSTNESS, "Yeh et al., 2019", quick={"samples": 3})
class MaxSensitivity(_Sensitivity):
    """The largest distance of a map from those of perturbed copies of its input (Yeh, 2019): low
    where maps are steady; a constant map is the steadiest.

    Example:
        >>> model, x, metric = torch.nn.Linear(4, 3), torch.ones(1, 4), MaxSensitivity(samples=2)
        >>> metric(model, x, model.weight[:1], target=0, method="gradient").values
        tensor([0.], dtype=torch.float64)
    """

    name = "max_sensitivity"
    largest = True


class AvgSensitivity(_Sensitivity):
    """The mean distance of a map from those of perturbed copies of its input (Yeh, 2019; Bhatt,
    2020).

    Example:
        >>> model, x, metric = torch.nn.Linear(4, 3), torch.ones(1, 4), AvgSensitivity(samples=2)
        >>> metric(model, x, model.weight[:1], target=0, method="gradient").values
        tensor([0.], dtype=torch.float64)
    """

    name = "avg_sensitivity"


@in_suite(
    ROBUSTNESS, "after Alvarez-Melis and Jaakkola, 2018", quick={"samples": 2, "shifts": (1,)}
)
@dataclass(frozen=True)
class Stability(Metric):
    """The mean rank correlation of maps with those of slightly noisy and slightly shifted inputs: 1
    where nothing but the shift itself happens to them.

    Maps of shifted copies are shifted back and compared except at the edges. Copies that the model
    decides otherwise are left out, since their maps should change; NaN where no copy is left.
    `details`: rank correlation, SSIM and overlap by noise and by shift, float64 [B].

    Args:
        noise_level: Of the noise, as a share of each example's own range.
        noise: "uniform" up to that level, or "gaussian" with it as standard deviation.
        samples: The number of noisy copies.
        shifts: By how many positions copies are shifted, in both directions of each spatial axis,
            of which at least half must remain; the edge is repeated.
        top_share: Of the positions, for the overlap of the largest values.
        seed: Of the noise.

    Example:
        >>> model, x, metric = torch.nn.Linear(4, 3), torch.arange(4.0)[None], Stability(samples=2)
        >>> outcome = metric(model, x, model.weight[:1], target=0, method="gradient")
        >>> round(float(outcome.values), 6)
        1.0
    """

    noise_level: float = 0.02
    noise: str = "gaussian"
    samples: int = 4
    shifts: tuple[int, ...] | int = (1, 2)
    top_share: float = 0.1
    seed: int = 0
    name = "stability"
    better = "higher"
    needs = ("model", "method")

    def __post_init__(self) -> None:
        check_fields(self, noise_level=checks.positive, noise=NOISES, samples=0)
        for one in self._by:
            checks.integer("shifts", one, 1)
        check_fields(self, top_share=checks.positive_fraction, seed=0)
        if not self.samples and not self._by:
            raise InputError("samples=0 and shifts=() leave nothing to compare: give one of them")

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        copies = list(self._copies(data.inputs))
        if not copies:
            raise InputError(
                f"shifts={self.shifts} leave less than half of inputs "
                f"{list(data.inputs.shape)}, and samples=0: use samples=4, or smaller shifts"
            )
        points = torch.stack([copy for copy, *_ in copies])
        first, scores = data.scorer.grid(lambda i, n: points[n, i], len(copies))
        same = torch.ones(data.batch, len(copies), dtype=torch.bool, device=points.device)
        if first.decisions is not None and scores.decisions is not None:
            same = scores.decisions == first.decisions[:, None]
        similar = [self._similarity(data, *copy) for copy in copies]
        kinds = ["shift" if by else "noise" for *_, by in copies]
        details: dict[str, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            numbers = [number for number, one in enumerate(kinds) if one == kind]
            for name in similar[0]:
                rows = torch.stack([similar[one][name] for one in numbers], 1)
                details[f"{name}_{kind}"] = rows.where(same[:, numbers], torch.nan).nanmean(1)
        ranked = [one for name, one in details.items() if name.startswith("rank_correlation")]
        values = torch.stack(ranked, 1).nanmean(1)
        parameters, caveats = {"copies": len(copies)}, _caveats(values, same)
        return self._outcome(values, details=details, parameters=parameters, caveats=caveats)

    @property
    def _by(self) -> tuple[int, ...]:
        return (self.shifts,) if isinstance(self.shifts, int) else tuple(self.shifts)

    def _copies(self, x: Tensor) -> Iterator[Copy]:
        spread = self.noise_level * value_range(x.double())
        for sample in range(self.samples):
            yield noisy(x, spread, sample, self.noise, self.seed), 0, 0
        for axis in range(2, x.dim()):
            for by in (sign * one for one in self._by for sign in (1, -1)):
                if 4 * abs(by) <= x.shape[axis]:
                    yield shifted(x, axis, by), axis - 1, by

    def _similarity(
        self, data: EvaluationInput, copy: Tensor, axis: int, by: int
    ) -> dict[str, Tensor]:
        """The similarities of a copy's maps to those of the inputs, float64 [B] by name."""
        a, b = data.places, position_sums(data.explain(copy))
        if by:
            # Position p of the input is p + by in the copy; the edges of both were repeated.
            edge, size = abs(by), a.shape[axis]
            a = a.narrow(axis, edge, size - 2 * edge)
            b = b.narrow(axis, edge + by, size - 2 * edge)
        similar = {"rank_correlation": rank_correlation(a, b)}
        if data.inputs.dim() in (3, 4, 5):
            similar["ssim"] = ssim(a, b)
        similar["overlap"] = overlap(a, b, self.top_share)
        return similar


def _caveats(values: Tensor, same: Tensor) -> tuple[str, ...]:
    other, lost = int((~same).sum()), int((~same.any(1)).sum())
    flat = int(values.isnan().sum()) - lost
    text = (
        f"{other} of {same.numel()} copies are left out, and with them {lost} of {len(same)} "
        "examples: the model decides them otherwise, and their maps should change"
    )
    of_flat = f"{flat} examples are left out: their maps, or all of the copies', are flat"
    return caveats_of((other, text), (flat > 0, of_flat))
