"""Points of several calls as one launch, each with the targets and arguments of its own call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.errors import ModelError
from saliency_fast.graph.outputs import rows_of
from saliency_fast.model.function import NO_GRADIENT, PointFunction


@dataclass
class Pack:
    """The targets of a launch whose rows belong to several functions: each reads its own rows.

    errors: exceptions by the number of their function, whose rows have scores 0.
    """

    functions: Sequence[PointFunction]
    items: Sequence[Tensor]
    classes: list[Tensor | None] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> list[int]:
        return [example.numel() for example in self.items]

    @cached_property
    def batch(self) -> int:
        """The number of rows: each is an example of its own."""
        return sum(self.sizes)

    def check(self, raw: Any, example: Tensor) -> torch.Size | None:
        """Does nothing: each function checks its own rows, in `read`."""
        return None

    def read(self, raw: Any, example: Tensor) -> tuple[Tensor, None]:
        """Scores [R, K] of all rows."""
        several, start = [], 0
        for number, (function, own) in enumerate(zip(self.functions, self.items, strict=True)):
            part = slice(start, start + own.numel())
            start = part.stop
            try:
                scores, classes = function.read(rows_of(raw, part, self.batch), own)
                if torch.is_grad_enabled() and not scores.requires_grad:
                    raise ModelError(NO_GRADIENT)
            except Exception as error:
                self.errors[number] = error
                count = self.functions[0].targets.count
                scores, classes = torch.zeros(own.numel(), count, device=own.device), None
            several.append(scores)
            self.classes.append(classes)
        return torch.cat(several), None


def packed(
    functions: Sequence[PointFunction], points: Sequence[Inputs], items: Sequence[Tensor]
) -> tuple[PointFunction, Inputs, Tensor, Pack]:
    """(function, points, example, pack): several functions of one kind as one, on all points."""
    first, pack = functions[0], Pack(functions, items)
    rows = [function.rows(example) for function, example in zip(functions, items, strict=True)]

    def joined(key: int | str, value: Any, parts: list[Any]) -> Any:
        return torch.cat(parts) if first.follows(key, value) else value

    args = tuple(joined(n, one, [own[n] for own, _ in rows]) for n, one in enumerate(first.args))
    kwargs = {n: joined(n, one, [own[n] for _, own in rows]) for n, one in first.kwargs.items()}
    scale: Any = 1.0
    if any(function.scale != 1.0 for function in functions):
        pairs = zip(functions, pack.sizes, strict=True)
        scales = [torch.full((size,), one.scale, device="cpu") for one, size in pairs]
        scale = torch.cat(scales).to(items[0].device)
    # A pack reads its rows as targets do.
    targets: Any = pack
    together = replace(first, targets=targets, args=args, kwargs=kwargs, scale=scale)
    several = tuple(torch.cat(parts) for parts in zip(*points, strict=True))
    return together, several, torch.arange(pack.batch, device=items[0].device), pack


def compatible(function: PointFunction) -> tuple[object, ...]:
    """Equal for functions whose points may share a launch."""

    def kind(key: int | str, value: Any) -> object:
        if function.follows(key, value):
            return "rows", value.shape[1:], value.dtype
        plain = isinstance(value, (int, float, str, bool, type(None)))
        return (type(value), value) if plain else id(value)

    further: list[tuple[int | str, Any]] = [*enumerate(function.args)]
    further += sorted(function.kwargs.items())
    shared = tuple((key, kind(key, value)) for key, value in further)
    dtypes, count = function.dtypes, function.targets.count
    return (function.kind, function.at_prefix_end, count, dtypes, function.channels_last, shared)
