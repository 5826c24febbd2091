"""ROAD: does the decision stand while places are imputed in the order of a map?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.inpaint import inpaint, need_axes
from saliency_fast.evaluate.metrics.sensitivity_n import check_shares
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.ranking import ORDERS, ranking
from saliency_fast.evaluate.scores import OUTPUTS
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import read_targets
from saliency_fast.ops import noise_points

ACCURACY = "accuracy"
NAMES = {
    ACCURACY: "share decided as the target",
    "softmax": "probability of the target",
    "logit": "output of the target",
}


@dataclass(frozen=True)
class Road(Metric):
    """What is left of the target while the places that a map ranks highest are imputed from their
    neighbours, with some noise, so that nothing but their content is gone (Rong, 2022): low where
    the map knows what matters; averaged over shares.

    shares: of the places that are imputed, rounded down to whole places. order: "most_first", or
    "least_first", for which high is better. output: "accuracy", whether the decision is the
    target; "softmax" or "logit". noise: standard deviation as a share of each example's range.
    seed: of the noise.
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    order: str = "most_first"
    output: str = ACCURACY
    noise: float = 0.01
    seed: int = 0
    name = "ROAD"
    better = "lower"
    needs: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        check_shares(self.shares)
        checks.choice("order", self.order, ORDERS)
        checks.choice("output", self.output, (ACCURACY, *OUTPUTS))
        if self.noise != 0:
            checks.positive("noise", self.noise)
        checks.whole("seed", self.seed, 0)

    def _judge(self, subject: Subject) -> Outcome:
        x, batch = subject.inputs, subject.batch
        need_axes(x)
        classes = classes_of(subject) if self.output == ACCURACY else None
        rank, _ = ranking(subject.values, x, "place", self.order)
        places = rank.shape[1]
        # A share such as .29 of 100 places is 29 of them, whatever its last digit.
        counts = [math.floor(share * places + 1e-9) for share in self.shares]
        ends = torch.tensor(counts, device=x.device)
        low, high = torch.aminmax(x.flatten(1), dim=1)
        sigma = self.noise * (high - low).double()

        def write(item: Tensor, place: Tensor) -> Tensor:
            missing = (rank[item] < ends[place, None]).view(-1, *x.shape[2:])
            found = inpaint(x[item], missing)
            if self.noise == 0:
                return found
            row, seed = torch.arange(len(item), device=x.device), torch.full_like(item, self.seed)
            noisy = noise_points(found, sigma[item], seed, row, place, False, 0)
            return torch.where(missing[:, None], noisy, found)

        place = torch.arange(len(counts), device=x.device)
        item = torch.arange(batch, device=x.device).repeat_interleave(len(counts))
        _, points = subject.scorer.at(write, item, place.repeat(batch))
        if classes is None:
            found = points.of(self.output)
        else:
            assert points.decisions is not None
            found = (points.decisions == classes[item]).double()
        share, found = ends.double() / places, found.view(batch, -1)
        curve = Curve(share, found, "share imputed", NAMES[self.output])
        outcome = self._outcome(found.mean(1), curve=curve)
        better = "lower" if self.order == "most_first" else "higher"
        return dataclasses.replace(outcome, better=better)


def classes_of(subject: Subject) -> Tensor:
    """The target as one class per example, int64 [B]; raises where it is none."""
    targets = read_targets(subject.classes, subject.batch)
    classes = None if targets.position is not None else targets.classes
    if classes is None or subject.first.decisions is None:
        raise InputError(
            "decisions need a target that is a class of several: the model or the target gives one "
            "number per example; use output='logit' where there is one"
        )
    return classes[:, 0].to(subject.inputs.device)
