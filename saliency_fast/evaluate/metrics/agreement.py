"""Agreement: how similar the maps of several methods are on the same inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.inputs import describe, position_sums, read_maps
from saliency_fast.evaluate.maps import is_constant, largest, overlap, rank_correlation, ssim
from saliency_fast.evaluate.outcome import plain
from saliency_fast.methods.parts import checks

COMPARISONS = ("rank_correlation", "ssim", "overlap", "sign_agreement")
EVIDENCE = ("signed", "absolute")


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """The pairwise similarities of M maps of each of B examples.

    The attributes `rank_correlation`, `ssim`, `overlap` and `sign_agreement` are means, [M, M].

    Args:
        names: The maps' names.
        per_example: By comparison, float64 [B, M, M], NaN where it is undefined:
            "rank_correlation" (Spearman) of all positions; "ssim", of maps with spatial axes;
            "overlap", the intersection over union of the top share; "sign_agreement", the share of
            the top by magnitude that both hold with the same sign (Krishna, 2022).
        share: How much of a map is its top.
        evidence: "signed" or "absolute".
        caveats: Sentences that a reader must know.
    """

    names: tuple[str, ...]
    per_example: Mapping[str, Tensor]
    share: float
    evidence: str
    caveats: tuple[str, ...] = ()

    rank_correlation = property(lambda self: self.mean("rank_correlation"))
    ssim = property(lambda self: self.mean("ssim"))
    overlap = property(lambda self: self.mean("overlap"))
    sign_agreement = property(lambda self: self.mean("sign_agreement"))

    def mean(self, comparison: str) -> Tensor:
        """The mean over the examples for which a comparison is defined, float64 [M, M]."""
        checks.choice("comparison", comparison, COMPARISONS)
        return self.per_example[comparison].nanmean(0)

    def to_dict(self) -> dict[str, Any]:
        """Names and matrices for JSON; None for what is undefined."""
        return {
            "names": list(self.names),
            "examples": len(self.per_example[COMPARISONS[0]]),
            "share": self.share,
            "evidence": self.evidence,
            "caveats": list(self.caveats),
            **{name: plain(self.mean(name).tolist()) for name in COMPARISONS},
        }

    def __repr__(self) -> str:
        """A table for each comparison, every pair once."""
        examples = len(self.per_example[COMPARISONS[0]])
        lines = [f"agreement of {len(self.names)} maps over {examples} examples"]
        wide = max(map(len, self.names))
        for comparison in COMPARISONS:
            matrix = self.mean(comparison)
            if bool(matrix.isnan().all()):
                continue
            top = "" if comparison in COMPARISONS[:2] else f" (top {self.share:.0%})"
            lines.append(f"{comparison.replace('_', ' ')}{top}")
            for number, row in enumerate(matrix.tolist()):
                cells = ("    -" if math.isnan(one) else f"{one:5.2f}" for one in row[: number + 1])
                lines.append(f"  {self.names[number]:<{wide}} {' '.join(cells)}")
        return "\n".join([*lines, *(f"  note: {one}" for one in self.caveats)])


def agreement(
    maps: Mapping[str, Tensor | Attribution],
    inputs: Tensor | None = None,
    share: float = 0.1,
    *,
    evidence: str = "signed",
) -> Agreement:
    """The pairwise similarities of maps by several methods (Krishna, 2022).

    Args:
        maps: By name, attributions or tensors like `inputs`; channels, if any, are summed.
        inputs: [B, C, *spatial] or [B, F]. Without them attributions give the axes, and tensors are
            [B, F], [B, H, W], [B, C, H, W] or [B, C, D, H, W].
        share: How much of a map is its top.
        evidence: "signed" compares values, "absolute" magnitudes, for methods without signs. Sign
            agreement is of the signed values in any case.

    Raises:
        InputError: If the maps do not fit each other, or an option is invalid.
        InputTypeError: If `maps` is no mapping.

    Example:
        >>> maps = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[1.0, 2.0, 4.0]])}
        >>> agreement(maps).overlap
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    checks.fraction("share", share)
    if share == 0:
        raise InputError("share must be above 0: got 0")
    checks.choice("evidence", evidence, EVIDENCE)
    names, sums = _read(maps, inputs)
    if len({(one.device, one.shape) for one in sums}) > 1:
        raise InputError("maps must be of the same positions on one device")
    compared = [one.abs() for one in sums] if evidence == "absolute" else sums
    structured = sums[0].dim() > 2 or (inputs is not None and inputs.dim() > 2)
    shape = (len(sums[0]), len(names), len(names))
    per_example = {
        name: sums[0].new_full(shape, math.nan, dtype=torch.float64) for name in COMPARISONS
    }
    for a, b in itertools.combinations_with_replacement(range(len(names)), 2):
        pair = compared[a], compared[b]
        values = {
            "rank_correlation": rank_correlation(*pair),
            "overlap": overlap(*pair, share),
            "sign_agreement": _sign_agreement(sums[a], sums[b], share),
        }
        if structured:
            values["ssim"] = ssim(*pair)
        for name, value in values.items():
            per_example[name][:, a, b] = per_example[name][:, b, a] = value
    constant = {name: int(is_constant(one).sum()) for name, one in zip(names, sums, strict=True)}
    caveats = tuple(
        f"{count} of {shape[0]} maps of {name!r} are constant: no correlation"
        for name, count in constant.items()
        if count
    )
    return Agreement(names, per_example, share, evidence, caveats)


def _sign_agreement(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The share of the largest magnitudes that both rows hold with the same sign, float64 [B]."""
    top = largest(a.abs(), share)
    both = top & largest(b.abs(), share) & (a.sign() == b.sign())
    return both.flatten(1).sum(1).double() / top.flatten(1).sum(1).double()


def _read(
    maps: Mapping[str, Tensor | Attribution], inputs: Tensor | None
) -> tuple[tuple[str, ...], list[Tensor]]:
    """The names, and the maps with their channels summed, [B, *spatial]."""
    if not isinstance(maps, Mapping):
        raise InputTypeError(f"maps must be a mapping from names: got {type(maps).__name__}")
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
        inputs = next(iter(values.values()))
        if not isinstance(inputs, Tensor) or not 2 <= inputs.dim() <= 5:
            got = describe(inputs) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"maps must be tensors of two to five axes: got {got}; pass inputs=")
        inputs = inputs[:, None] if inputs.dim() == 3 else inputs
    sums = []
    for name, one in values.items():
        try:
            sums.append(position_sums(read_maps(one, inputs)))
        except (InputError, InputTypeError) as error:  # noqa: PERF203
            raise type(error)(f"{name!r}: {error}") from error
    return tuple(values), sums
