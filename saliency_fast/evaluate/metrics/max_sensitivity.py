"""Sensitivity: how far maps move when the inputs move a little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.noise import NOISES, noisy
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods.parts import checks

NORMS = ("map", "input", "none")


@dataclass(frozen=True)
class _Sensitivity(Metric):
    """Fields of both.

    radius: of the perturbations, in units of the inputs. samples: perturbed copies of each example.
    noise: "uniform" in the box of that radius around the input, or "gaussian" with it as standard
    deviation. norm: what the distance of two maps (the root of the sum of squared differences) is
    divided by: the norm of the "map" (as Captum does), of the "input" or nothing ("none", as in the
    paper). seed: of the noise, which is another for each sample and the same for every batch.
    """

    radius: float = 0.02
    samples: int = 10
    noise: str = "uniform"
    norm: str = "map"
    seed: int = 0
    better: ClassVar[str] = "lower"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def __post_init__(self) -> None:
        checks.positive("radius", self.radius)
        checks.whole("samples", self.samples, 1)
        checks.choice("noise", self.noise, NOISES)
        checks.choice("norm", self.norm, NORMS)
        checks.whole("seed", self.seed, 0)

    def distances(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """How far each perturbed copy's map lies from the map, float64 [B, samples], and what that
        is divided by, float64 [B].
        """
        found = []
        item = torch.arange(subject.batch, device=subject.inputs.device)
        spread = torch.full((subject.batch,), self.radius, dtype=torch.float64, device=item.device)
        # One call per sample keeps every example at its place of the batch: targets, baselines and
        # further arguments stay as they are, and methods that draw by it draw the same again.
        for sample in range(self.samples):
            number = torch.full_like(item, sample)
            x = noisy(subject.inputs, spread, item, number, self.noise, self.seed)
            maps, again = subject.values, subject.explain(x)
            if maps.shape != again.shape:
                maps, again = subject.places, again if again.dim() == 2 else again.sum(1)
            moved = (maps.double() - again.double()).flatten(1)
            found.append(torch.linalg.vector_norm(moved, dim=1))
        return torch.stack(found, 1), self._divisor(subject)

    def _divisor(self, subject: Subject) -> Tensor:
        if self.norm == "none":
            return torch.ones(subject.batch, dtype=torch.float64, device=subject.inputs.device)
        by = subject.values if self.norm == "map" else subject.inputs
        norms: Tensor = torch.linalg.vector_norm(by.flatten(1).double(), dim=1)
        return norms

    def _told(self, found: Tensor, divisor: Tensor) -> Outcome:
        """The outcome of distances [B]; says nothing where it would divide by zero."""
        zero = divisor == 0
        values = (found / divisor).masked_fill(zero, torch.nan)
        count = int(zero.sum())
        caveats = (
            f"{count} examples are left out: the {self.norm} is all zeros, and no distance is "
            "relative to that; norm='none' takes distances as they are",
        )
        return self._outcome(values, caveats=caveats if count else ())


class MaxSensitivity(_Sensitivity):
    """The largest distance of a map from those of perturbed copies of its input (Yeh, 2019): high
    where a little noise is enough for another explanation.
    """

    name = "max_sensitivity"

    def _judge(self, subject: Subject) -> Outcome:
        distances, divisor = self.distances(subject)
        return self._told(distances.amax(1), divisor)


class AvgSensitivity(_Sensitivity):
    """The mean distance of a map from those of perturbed copies of its input (Yeh, 2019; Bhatt,
    2020).
    """

    name = "avg_sensitivity"

    def _judge(self, subject: Subject) -> Outcome:
        distances, divisor = self.distances(subject)
        return self._told(distances.mean(1), divisor)
