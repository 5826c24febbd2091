"""Stability: do maps stay the same where the input hardly changes and the decision does not?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.noise import NOISES, noisy
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.similarity import overlap, rank_correlation, ssim
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods.parts import checks


@dataclass(frozen=True)
class Stability(Metric):
    """How alike maps stay under small noise and small shifts of the input: the mean rank
    correlation, 1 where nothing but the shift itself happens to them.

    noise_level: of the noise, as a share of each example's own range; noise: "uniform" up to that,
    or "gaussian" with it as standard deviation. samples: noisy copies (0: none). shifts: by how
    many places copies are shifted, both ways along each axis of space, the edge repeated; their
    maps are shifted back and compared where neither edge is. An axis must keep at least half of its
    places; inputs [B, F] have no axes of space. top_share: of places, for the overlap of what is
    largest. seed: of the noise.

    Copies that the model decides otherwise are left out: there maps should change. values: the mean
    over the two kinds of copies of the mean over those of each kind; NaN where all copies of an
    example are left out. details: rank correlation, SSIM and overlap of each kind, float64 [B].
    """

    noise_level: float = 0.02
    noise: str = "gaussian"
    samples: int = 4
    shifts: tuple[int, ...] | int = (1, 2)
    top_share: float = 0.1
    seed: int = 0
    name: ClassVar[str] = "stability"
    better: ClassVar[str] = "higher"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def __post_init__(self) -> None:
        checks.positive("noise_level", self.noise_level)
        checks.choice("noise", self.noise, NOISES)
        checks.whole("samples", self.samples, 0)
        for one in self._by:
            checks.whole("shifts", one, 1)
        checks.share("top_share", self.top_share)
        if self.top_share == 0:
            raise InputError("top_share must be more than 0: got 0")
        checks.whole("seed", self.seed, 0)
        if not self.samples and not self._by:
            raise InputError("samples=0 and shifts=() leave nothing to compare: give one of them")

    def _judge(self, subject: Subject) -> Outcome:
        copies = [*self._noisy(subject), *self._shifted(subject)]
        if not copies:
            raise InputError(
                f"shifts={self.shifts} leave less than half of inputs "
                f"{list(subject.inputs.shape)}, and samples=0: use samples=4, or smaller shifts"
            )
        same = _same_decision(subject, [copy.inputs for copy in copies])
        alike = [self._alike(subject, copy) for copy in copies]
        found: dict[str, Tensor] = {}
        for kind in dict.fromkeys(copy.kind for copy in copies):
            numbers = [number for number, copy in enumerate(copies) if copy.kind == kind]
            for name in alike[0]:
                rows = torch.stack([alike[one][name] for one in numbers], 1)
                found[f"{name}_{kind}"] = rows.where(same[:, numbers], torch.nan).nanmean(1)
        ranked = [one for name, one in found.items() if name.startswith("rank_correlation")]
        values = torch.stack(ranked, 1).nanmean(1)
        parameters = {"copies": len(copies)}
        return self._outcome(
            values, details=found, parameters=parameters, caveats=_caveats(values, same)
        )

    @property
    def _by(self) -> tuple[int, ...]:
        return (self.shifts,) if isinstance(self.shifts, int) else tuple(self.shifts)

    def _noisy(self, subject: Subject) -> Iterator[_Copy]:
        x = subject.inputs
        rows = x.flatten(1).double()
        spread = self.noise_level * (rows.amax(1) - rows.amin(1))
        item = torch.arange(len(x), device=x.device)
        for sample in range(self.samples):
            number = torch.full_like(item, sample)
            yield _Copy("noise", noisy(x, spread, item, number, self.noise, self.seed))

    def _shifted(self, subject: Subject) -> Iterator[_Copy]:
        x = subject.inputs
        for axis in range(2, x.dim()):
            for by in (sign * one for one in self._by for sign in (1, -1)):
                if 4 * abs(by) <= x.shape[axis]:
                    yield _Copy("shift", shifted(x, axis, by), axis - 1, by)

    def _alike(self, subject: Subject, copy: _Copy) -> dict[str, Tensor]:
        """How alike the maps of a copy are to those of the inputs, float64 [B] by measure."""
        again = subject.explain(copy.inputs)
        a, b = subject.places, again if again.dim() == 2 else again.sum(1)
        if copy.by:
            # Place p of the input is place p + by of the copy, and the edges of both are made up.
            edge, size = abs(copy.by), a.shape[copy.axis]
            a = a.narrow(copy.axis, edge, size - 2 * edge)
            b = b.narrow(copy.axis, edge + copy.by, size - 2 * edge)
        found = {"rank_correlation": rank_correlation(a, b)}
        if subject.inputs.dim() in (3, 4, 5):
            found["ssim"] = ssim(a, b)
        found["overlap"] = overlap(a, b, self.top_share)
        return found


@dataclass(frozen=True, eq=False)
class _Copy:
    """Perturbed inputs [B, C, *spatial]; shifted: by how many places, along which axis of maps."""

    kind: str
    inputs: Tensor
    axis: int = 0
    by: int = 0


def shifted(x: Tensor, axis: int, by: int) -> Tensor:
    """What was at place p of an axis is at p + by; the edge is repeated."""
    size = x.shape[axis]
    place = (torch.arange(size, device=x.device) - by).clamp(0, size - 1)
    return x.index_select(axis, place)


def _same_decision(subject: Subject, copies: list[Tensor]) -> Tensor:
    """Whether the model decides each copy as it does the example, bool [B, copies]."""
    batch = subject.batch
    item = torch.arange(batch, device=subject.inputs.device).repeat(len(copies))
    number = torch.arange(len(copies), device=item.device).repeat_interleave(batch)
    points = torch.stack(copies)
    first, found = subject.scorer.at(lambda item, place: points[place, item], item, number)
    if first.decisions is None or found.decisions is None:
        return torch.ones(batch, len(copies), dtype=torch.bool, device=item.device)
    return (found.decisions.view(len(copies), batch) == first.decisions).T


def _caveats(values: Tensor, same: Tensor) -> tuple[str, ...]:
    caveats = []
    other, lost = int((~same).sum()), int((~same.any(1)).sum())
    if other:
        caveats.append(
            f"{other} of {same.numel()} copies are left out, and with them {lost} of {len(same)} "
            "examples: the model decides them otherwise, and their maps should change"
        )
    flat = int(values.isnan().sum()) - lost
    if flat > 0:
        caveats.append(f"{flat} examples are left out: their maps, or all of the copies', are flat")
    return tuple(caveats)
