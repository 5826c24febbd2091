"""What a metric measured: a value for every example, with intervals, curve and parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError

RESAMPLES = 2000
"""Bootstrap samples: the ends of a 95 % interval then move by about 1 % of its width."""
_HELD = 2**22
"""Numbers of a bootstrap that are in memory at once."""


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Values of every example over a shared axis, such as the score while positions are deleted.

    Args:
        x: The axis, float64 [n], with the label `x_name`.
        y: The values, float64 [B, n], with the label `y_name`.

    Example:
        >>> Curve(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0]]), "share", "score").area()
        tensor([0.5000])
    """

    x: Tensor
    y: Tensor
    x_name: str
    y_name: str

    def area(self) -> Tensor:
        """The area under each example's curve by the trapezoid rule, float64 [B]."""
        return torch.trapezoid(self.y, self.x, dim=1)


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; NaN where there are no values.

    Args:
        mean: The mean.
        low: The interval's lower end; `high` its upper end, `confidence` its level.
        count: The number of values.

    Example:
        >>> print(Interval(0.5, 0.25, 0.75, 0.95, 20))
        0.5 [0.25, 0.75]
    """

    mean: float
    low: float
    high: float
    confidence: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, eq=False, repr=False)
class Outcome:
    """The result of a metric.

    Args:
        metric: The metric's name.
        values: One per example, float64 [B]; NaN where the metric is undefined.
        better: "higher", "lower", or "" where neither is.
        parameters: The metric's fields and all else that the values depend on.
        curve: A curve, of metrics that have one.
        passed: The verdict, of metrics that give one.
        threshold: The verdict's threshold.
        details: Further results by name.
        caveats: Sentences that a reader of the values must know.

    Example:
        >>> Outcome("deletion", torch.tensor([0.5, 0.5]), "lower", {})
        deletion: 0.5 [0.5, 0.5] over 2 examples, lower is better
    """

    metric: str
    values: Tensor
    better: str
    parameters: Mapping[str, Any]
    curve: Curve | None = None
    passed: bool | None = None
    threshold: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def mean(self, confidence: float = 0.95, *, seed: int = 0) -> Interval:
        """The mean over examples with its bootstrap interval; see `bootstrap`."""
        return bootstrap(self.values, confidence, seed=seed)

    def over(self, other: Outcome, confidence: float = 0.95, *, seed: int = 0) -> Interval:
        """The mean of the paired differences, `self` less `other`, on the same examples.

        Raises:
            InputError: If the outcomes differ in their number of examples.
        """
        if other.values.shape != self.values.shape:
            raise InputError(
                "outcomes must be of the same examples: got "
                f"{len(self.values)} and {len(other.values)}"
            )
        return bootstrap(self.values - other.values, confidence, seed=seed)

    def __repr__(self) -> str:
        verdict = "" if self.passed is None else f", {'passed' if self.passed else 'FAILED'}"
        best = f", {self.better} is better" if self.better else ""
        lines = [f"{self.metric}: {self.mean()} over {len(self.values)} examples{verdict}{best}"]
        return "\n".join([*lines, *(f"  note: {one}" for one in self.caveats)])


def bootstrap(values: Tensor, confidence: float = 0.95, *, seed: int = 0) -> Interval:
    """The mean and its percentile bootstrap interval (Efron, 1979) over resampled examples.

    Args:
        values: One per example, [B]; NaN and infinity are left out.
        confidence: The interval's level, between 0 and 1.
        seed: Of the 2000 resamples.

    Example:
        >>> print(bootstrap(torch.tensor([2.0, 2.0, 2.0])))
        2 [2, 2]
    """
    check_confidence(confidence)
    finite = values.detach().double().cpu().flatten()
    finite = finite[finite.isfinite()]
    if len(finite) == 0:
        return Interval(math.nan, math.nan, math.nan, confidence, 0)
    low, high = mean_ends(finite[:, None], confidence, seed)
    return Interval(float(finite.mean()), float(low), float(high), confidence, len(finite))


def mean_ends(rows: Tensor, confidence: float, seed: int) -> Tensor:
    """The ends of the intervals of the means of rows, float64 [N, n] to [2, n]."""
    means = [times @ rows / len(rows) for (times,) in resampled((len(rows),), seed)]
    return percentile_ends(torch.cat(means), confidence)


def percentile_ends(statistics: Tensor, confidence: float) -> Tensor:
    """The ends of the percentile interval of resampled statistics, float64 [R, *] to [2, *]."""
    tail = (1.0 - confidence) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64, device="cpu")
    return statistics.quantile(ends, dim=0)


def resampled(sizes: tuple[int, ...], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """How often members of groups are drawn, float64 [rows, size] each, `RESAMPLES` rows in all."""
    generator = torch.Generator().manual_seed(seed)
    most = max(1, _HELD // max(sizes))
    one = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for start in range(0, RESAMPLES, most):
        times = []
        for size in sizes:
            shape = (min(most, RESAMPLES - start), size)
            drawn = torch.randint(size, shape, generator=generator, device="cpu")
            times.append(one.new_zeros(shape).scatter_add_(1, drawn, one.expand(shape)))
        yield tuple(times)


def caveats_of(*pairs: tuple[object, str]) -> tuple[str, ...]:
    """The sentences of the pairs (condition, sentence) whose condition holds."""
    return tuple(sentence for holds, sentence in pairs if holds)


def check_confidence(confidence: float) -> None:
    """Raises unless it lies between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must lie between 0 and 1: got {confidence}")


def plain(value: Any, most: float = math.inf) -> Any:
    """A value as JSON holds it: infinity is None, tensors of over `most` elements are described."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        if value.numel() > most:
            return f"tensor {list(value.shape)}"
        return plain(value.detach().cpu().tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict(), most)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value, most=most)
    if isinstance(value, Mapping):
        return {str(name): plain(one, most) for name, one in value.items()}
    if isinstance(value, Iterable):
        return [plain(one, most) for one in value]
    return str(value)


def plain_fields(value: Any, *left_out: str, most: float = math.inf) -> dict[str, Any]:
    """The fields of a dataclass as JSON holds them."""
    names = [one.name for one in dataclasses.fields(value) if one.name not in left_out]
    return {name: plain(getattr(value, name), most) for name in names}
