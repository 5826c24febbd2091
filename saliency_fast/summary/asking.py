"""Asking: what a model says of inputs, and of them without a region, in the engine's launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.evaluate.inputs import Subject
from saliency_fast.evaluate.scores import UNTOLD, Questions, probabilities
from saliency_fast.model.targets import Targets, read_targets, tensor_of, with_padding
from saliency_fast.summary.fills import fills


@dataclass(frozen=True)
class Verdict:
    """What the model says of one point. score: the target's output. Where it tells classes apart:
    probability of the target's class, decision and runner_up as (class, probability).
    """

    score: float
    probability: float | None = None
    decision: tuple[int, float] | None = None
    runner_up: tuple[int, float] | None = None


@dataclass(frozen=True)
class Removed:
    """What the model says without a region, by the fill that took its place."""

    label: int
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Reading:
    """A target (`model.targets.Reader`): for every row its score, and where there are classes the
    probability of its own and the likeliest two with theirs; [R, 6], `UNTOLD` for the rest.
    """

    classes: Tensor | None
    targets: Targets
    count: int = 6

    def read(self, raw: Any, item: Tensor) -> Tensor:
        self.targets.check(raw, item)
        score = self.targets.read(raw, item)[0][:, :1]
        score = score if score.dtype in (torch.float32, torch.float64) else score.float()
        rest = score.new_full((len(item), 5), UNTOLD)
        if self.classes is not None:
            output = tensor_of(raw).detach()
            if output.shape[1] > 1:
                shares = probabilities(output, output.to(score.dtype))
                best = shares.topk(2, dim=1)
                own = shares.gather(1, self.classes[item][:, None])
                rest = torch.cat([own, best.indices.to(own.dtype), best.values], 1)
        return torch.cat([score, rest], 1)


def ask(subject: Subject) -> list[Verdict]:
    """What the model says of the inputs."""
    everything = torch.arange(subject.batch, device=subject.inputs.device)
    return _asked(subject, lambda item, place: subject.inputs[item], everything)[0]


def remove(subject: Subject, labels: Tensor, gone: list[int]) -> list[Removed | None]:
    """What the model says of each input without the region `gone[b]` of labels [B, *spatial], by
    either fill; None where it is 0.
    """
    device = subject.inputs.device
    item = torch.tensor([b for b, one in enumerate(gone) if one], dtype=torch.int64, device=device)
    if not len(item):
        return [None] * len(gone)
    taken = torch.tensor(gone, device=device).view(-1, *(1,) * (labels.dim() - 1))
    mask = (labels == taken) & (taken > 0)
    segment = mask.flatten(1).long()
    # Segment 1 is the region, and never present.
    present = torch.tensor([[True, False]], device=device)
    found: dict[str, list[Verdict]] = {}
    for name, fill in fills(subject.inputs, mask).items():

        def write(item: Tensor, place: Tensor, fill: Tensor = fill) -> Tensor:
            points: Tensor = ops.segment_points(
                subject.inputs, fill, segment, present, item, torch.zeros_like(item)
            )
            return points

        found[name] = _asked(subject, write, item)[1]
    result: list[Removed | None] = [None] * len(gone)
    for number, b in enumerate(item.tolist()):
        verdicts = {name: several[number] for name, several in found.items()}
        result[b] = Removed(gone[b], verdicts)
    return result


def _asked(subject: Subject, write: Any, item: Tensor) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts at the inputs, and at the points."""
    targets = read_targets(subject.classes, subject.batch).to(subject.inputs.device)
    running = subject.running
    arguments = running.arguments().values()
    inputs = running.back(subject.inputs)
    targets = with_padding(targets, subject.model, (inputs,), *arguments)  # type: ignore[arg-type]
    plain = targets.classes is not None and targets.position is None
    classes = targets.classes[:, 0] if plain else None  # type: ignore[index]
    asked = Questions(lambda item, place: running.back(write(item, place)), item, item)
    engine = running.engine(subject.model, asked)  # type: ignore[arg-type]
    engine(inputs, Reading(classes, targets), **running.arguments())
    first, points = (_verdicts(one) for one in asked.found)
    return first, points


def _verdicts(found: Tensor) -> list[Verdict]:
    rows = []
    for score, own, best, second, share, less in found.double().tolist():
        if own == UNTOLD:
            rows.append(Verdict(score))
        else:
            rows.append(Verdict(score, own, (int(best), share), (int(second), less)))
    return rows
