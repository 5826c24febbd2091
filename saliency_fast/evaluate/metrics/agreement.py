"""Agreement: how much several methods say the same of the same inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.similarity import largest, overlap, rank_correlation, ssim
from saliency_fast.evaluate.subject import read_maps
from saliency_fast.methods.parts import checks

COMPARISONS = ("rank_correlation", "ssim", "overlap", "sign_agreement")
EVIDENCE = ("signed", "absolute")


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """How much M maps of each of B examples agree, pair by pair.

    per_example: by comparison, float64 [B, M, M], NaN where it says nothing: "rank_correlation"
    (Spearman) of all places; "ssim", of maps with spatial axes; "overlap", the intersection over
    union of the top share; "sign_agreement", the share of the top by magnitude that both have with
    the same sign (Krishna, 2022). caveats: what a reader must know.
    """

    names: tuple[str, ...]
    per_example: Mapping[str, Tensor]
    share: float
    evidence: str
    caveats: tuple[str, ...] = ()

    @property
    def rank_correlation(self) -> Tensor:
        """Means over examples, float64 [M, M]."""
        return self.mean("rank_correlation")

    @property
    def ssim(self) -> Tensor:
        """Means over examples, float64 [M, M]; NaN for maps without spatial axes."""
        return self.mean("ssim")

    @property
    def overlap(self) -> Tensor:
        """Means over examples, float64 [M, M]."""
        return self.mean("overlap")

    @property
    def sign_agreement(self) -> Tensor:
        """Means over examples, float64 [M, M]."""
        return self.mean("sign_agreement")

    def mean(self, comparison: str) -> Tensor:
        """The mean over the examples of which it says something, float64 [M, M]."""
        checks.choice("comparison", comparison, COMPARISONS)
        return self.per_example[comparison].nanmean(0)

    def to_dict(self) -> dict[str, Any]:
        """Names and matrices as JSON takes them; None for what is not known."""
        found = {
            one: [[_plain(cell) for cell in row] for row in self.mean(one).tolist()]
            for one in COMPARISONS
        }
        return {
            "names": list(self.names),
            "examples": len(self.per_example[COMPARISONS[0]]),
            "share": self.share,
            "evidence": self.evidence,
            "caveats": list(self.caveats),
            **found,
        }

    def __repr__(self) -> str:
        """A table for each comparison, every pair once."""
        examples = len(self.per_example[COMPARISONS[0]])
        lines = [f"agreement of {len(self.names)} maps over {examples} examples"]
        wide = max(len(one) for one in self.names)
        for comparison in COMPARISONS:
            matrix = self.mean(comparison)
            if bool(matrix.isnan().all()):
                continue
            top = "" if comparison in COMPARISONS[:2] else f" (top {self.share:.0%})"
            lines.append(f"{comparison.replace('_', ' ')}{top}")
            for number, row in enumerate(matrix.tolist()):
                cells = " ".join(_cell(one) for one in row[: number + 1])
                lines.append(f"  {self.names[number]:<{wide}} {cells}")
        return "\n".join([*lines, *(f"  note: {one}" for one in self.caveats)])


def agreement(
    maps: Mapping[str, Tensor | Attribution],
    inputs: Tensor | None = None,
    share: float = 0.1,
    *,
    evidence: str = "signed",
) -> Agreement:
    """How much maps by several methods agree with each other (Krishna, 2022).

    maps: by name, attributions or tensors like `inputs` [B, C, *spatial] or [B, F], or without
    their channels; what stands for the channels of a place is summed. Without inputs attributions
    tell the axes, and tensors alone are [B, F], [B, H, W], [B, C, H, W] or [B, C, D, H, W].
    share: how much of a map is its top. evidence: "signed" compares values, "absolute" magnitudes,
    as for methods that know no signs. Sign agreement is of the signed values in any case.
    """
    checks.share("share", share)
    if share == 0:
        raise InputError("share must be above 0: got 0")
    checks.choice("evidence", evidence, EVIDENCE)
    names, places = _read(maps, inputs)
    if len({one.device for one in places}) > 1 or len({one.shape for one in places}) > 1:
        raise InputError("maps must be of the same places on one device")
    seen = [one.abs() for one in places] if evidence == "absolute" else places
    spatial = places[0].dim() > 2 or (inputs is not None and inputs.dim() > 2)
    compare: dict[str, Callable[[int, int], Tensor]] = {
        "rank_correlation": lambda a, b: rank_correlation(seen[a], seen[b]),
        "overlap": lambda a, b: overlap(seen[a], seen[b], share),
        "sign_agreement": lambda a, b: sign_agreement(places[a], places[b], share),
    }
    if spatial:
        compare["ssim"] = lambda a, b: ssim(seen[a], seen[b])
    found = {}
    shape = (len(places[0]), len(names), len(names))
    for comparison in COMPARISONS:
        matrix = places[0].new_full(shape, math.nan, dtype=torch.float64)
        if comparison in compare:
            for a, b in itertools.combinations_with_replacement(range(len(names)), 2):
                matrix[:, a, b] = matrix[:, b, a] = compare[comparison](a, b)
        found[comparison] = matrix
    return Agreement(names, found, share, evidence, _caveats(names, places))


def sign_agreement(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The share of the largest magnitudes of rows [B, *] that both have, with the same sign;
    float64 [B].
    """
    both = largest(a.abs(), share) & largest(b.abs(), share) & (a.sign() == b.sign())
    count = largest(a.abs(), share).flatten(1).sum(1)
    return both.flatten(1).sum(1).double() / count.double()


def _read(
    maps: Mapping[str, Tensor | Attribution], inputs: Tensor | None
) -> tuple[tuple[str, ...], list[Tensor]]:
    """The names, and the maps with their channels summed, [B, *spatial]."""
    if not isinstance(maps, Mapping):
        raise InputTypeError(
            f'maps must be a mapping such as {{"ig": ig, "rise": rise}}: got {type(maps).__name__}'
        )
    if len(maps) < 2:
        raise InputError(f"maps must be two or more, to agree with each other: got {len(maps)}")
    values: dict[str, Any] = {}
    for name, one in maps.items():
        if isinstance(one, Attribution):
            if one.many or not isinstance(one.values, Tensor):
                what = "several targets" if one.many else "several inputs"
                raise InputError(f"maps of {name!r} are of {what}: pass the tensor of one of them")
            if inputs is None:
                inputs = one.values
        values[str(name)] = one.values if isinstance(one, Attribution) else one
    if inputs is None:
        inputs = _laid_out(next(iter(values.values())))
    places = []
    for name, one in values.items():
        try:
            read = read_maps(one, inputs)
        except (InputError, InputTypeError) as error:
            raise type(error)(f"{name!r}: {error}") from error
        places.append(read if read.dim() == 2 else read.sum(1))
    return tuple(values), places


def _laid_out(maps: Any) -> Tensor:
    """Maps alone with an axis of channels where they have none."""
    if not isinstance(maps, Tensor) or not 2 <= maps.dim() <= 5:
        got = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"maps must be tensors of two to five axes: got {got}; pass inputs=")
    return maps[:, None] if maps.dim() == 3 else maps


def _caveats(names: tuple[str, ...], places: list[Tensor]) -> tuple[str, ...]:
    told = []
    for name, one in zip(names, places, strict=True):
        flat = one.flatten(1)
        constant = int((flat.amax(1) == flat.amin(1)).sum())
        if constant:
            told.append(f"{constant} of {len(one)} maps of {name!r} are constant: no correlation")
    return tuple(told)


def _plain(cell: float) -> float | None:
    return cell if math.isfinite(cell) else None


def _cell(cell: float) -> str:
    return "    -" if math.isnan(cell) else f"{cell:5.2f}"
