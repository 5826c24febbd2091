"""Attribution: the result of a call, what it rests on, and its record on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops, record, render
from saliency_fast.errors import InputError, RecordError
from saliency_fast.model.routes import Inputs

REGION_MASK = "region.mask"
"""The name under which `kept` holds a region's mask."""


@dataclass(frozen=True)
class Provenance:
    """What an attribution rests on: enough to compute it again and to see that nothing changed.

    sha256 fields are None where hashing was turned off or the model is a plain function. peak_bytes
    is over what was in use before the call; `peak_measured` tells a measured one from the plan's.
    way: how points went through the model. region: (start, stop) per spatial axis. at: the layers
    that the map belongs to, where that is not the inputs; layer_input: at what they take.
    """

    method: str
    parameters: dict[str, Any]
    target: dict[str, Any]
    baseline: Any
    precision: str
    dtype: str
    device: str
    backend: str
    versions: dict[str, str]
    input_sha256: list[str] | None
    weights_sha256: str | None
    trained_mode: bool
    seconds: float
    peak_bytes: int
    peak_measured: bool
    points_per_launch: int
    halvings: int
    lean: bool = True
    way: str = ""
    region: list[list[int]] | None = None
    at: list[str] | None = None
    layer_input: bool = False
    rows: str = "alone"
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Maps and what is known of them.

    values: like the inputs (a tuple where they are one), with an axis K behind the batch where
    each example has several targets. scores, baseline_scores, error [B] or [B, K], float64:
    the explained scalar at x and at the baseline, and the map's estimated relative L2 error, 0 for
    exact methods and NaN where it is unknown. delta: sum of the values - (scores -
    baseline_scores), None for methods without completeness. classes int64: the explained class.
    points [B]: gradients taken. converged [B]: whether a tolerance was met, None without one.
    kept: tensors that a replay needs (baselines, masks). precision_error: what of the error is the
    precision's, as measured on some of the points; None for float32. extras: further results of
    the method by name, [B, *] or [B, K, *].
    """

    values: Tensor | Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    delta: Tensor | None
    error: Tensor
    classes: Tensor | None
    points: Tensor
    converged: Tensor | None
    provenance: Provenance
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    precision_error: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: method, shapes, and the worst that is known of the maps."""
        shapes = ", ".join(str(list(one.shape)) for one in self._parts())
        facts = [f"{self.provenance.method} {shapes}", f"error <= {float(self.error.max()):.2g}"]
        if self.delta is not None:
            facts.append(f"|delta| <= {float(self.delta.abs().max()):.2g}")
        if self.converged is not None and not bool(self.converged.all()):
            facts.append(f"{int((~self.converged).sum())} not converged")
        return f"<Attribution {'; '.join(facts)}>"

    @property
    def many(self) -> bool:
        """Whether each example has several maps."""
        return self.scores.dim() == 2

    def map(self, reduction: str = "sum", channel_axis: int = 1) -> Tensor | Inputs:
        """Values with their channels reduced: [B, *spatial], or [B, K, *spatial].

        reduction: "sum" (signed), "absmax" or "l2". channel_axis counts the batch as 0: 1 for
        images, -1 for embeddings [B, tokens, channels]. Values [B, F] are their own map.
        """
        maps = tuple(self._map(one, reduction, channel_axis) for one in self._parts())
        return maps if isinstance(self.values, tuple) else maps[0]

    def _parts(self) -> Inputs:
        return self.values if isinstance(self.values, tuple) else (self.values,)

    def _map(self, values: Tensor, reduction: str, channel_axis: int) -> Tensor:
        if reduction not in ops.REDUCTIONS[1:]:
            raise InputError(
                f"reduction must be one of {', '.join(ops.REDUCTIONS[1:])}: got {reduction!r}"
            )
        lead = 2 if self.many else 1
        if values.dim() == lead + 1:
            return values if reduction == "sum" else values.abs()
        flat = values.flatten(0, lead - 1)
        if not -flat.dim() < channel_axis < flat.dim() or channel_axis == 0:
            raise InputError(
                f"channel_axis must name an axis behind the batch of {list(flat.shape)}: got "
                f"{channel_axis}"
            )
        if values.requires_grad:
            reduced = _reduced(flat, reduction, channel_axis)
            return reduced.view(*values.shape[:lead], *reduced.shape[1:])
        moved = flat.movedim(channel_axis, 1).contiguous()
        reduced, _ = ops.finish(moved, None, None, reduction)
        result: Tensor = reduced.view(*values.shape[:lead], *reduced.shape[1:])
        return result

    def overlay(
        self,
        x: Tensor | Inputs,
        style: str = "signed",
        *,
        percentile: float = 99.0,
        opacity: float = 0.85,
    ) -> Tensor | Inputs:
        """The map over the input as uint8 frames: [B, H, W, 3] for images, [B, T, H, W, 3] for
        video, and slices [B, D, H, W, 3] for volumes; a K axis stands behind the batch.

        style: "signed" (warm for, cool against) or "heat" (magnitude). percentile: the magnitude
        drawn at full strength, per example. Inputs without two axes behind the channels have no
        picture and raise InputError.
        """
        images = x if isinstance(x, tuple) else (x,)
        maps = self.map("sum" if style == "signed" else "l2")
        parts = maps if isinstance(maps, tuple) else (maps,)
        frames = tuple(
            render.frames(image.detach(), one.detach(), style, percentile, opacity)
            for image, one in zip(images, parts, strict=True)
        )
        return frames if isinstance(self.values, tuple) else frames[0]

    def save(self, path: str | Path) -> Path:
        """Writes the record (safetensors with JSON metadata, docs/record.md); returns its path."""
        tensors = {f"values.{number}": one for number, one in enumerate(self._parts())}
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        tensors |= {f"kept.{name}": value for name, value in self.kept.items()}
        tensors |= {f"extras.{name}": value for name, value in self.extras.items()}
        metadata = {"tuple": isinstance(self.values, tuple), "provenance": asdict(self.provenance)}
        return record.write(path, tensors, metadata)


def _reduced(values: Tensor, reduction: str, axis: int) -> Tensor:
    """The same reductions on autograd's graph."""
    if reduction == "sum":
        return values.sum(axis)
    return values.abs().amax(axis) if reduction == "absmax" else values.norm(dim=axis)


_OPTIONAL = (
    "scores",
    "baseline_scores",
    "delta",
    "error",
    "classes",
    "points",
    "converged",
    "precision_error",
)


def load(path: str | Path) -> Attribution:
    """Reads a record; raises RecordError where it is truncated, altered or of another schema."""
    tensors, metadata = record.read(path)
    try:
        return _assembled(tensors, metadata)
    except (KeyError, TypeError, IndexError) as error:
        raise RecordError(f"record {path} lacks a part of its schema: {error!r}") from error


def _assembled(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Attribution:
    count = sum(name.startswith("values.") for name in tensors)
    parts = tuple(tensors[f"values.{number}"] for number in range(count))

    def under(prefix: str) -> dict[str, Tensor]:
        own = [name for name in tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensors[name] for name in own}

    return Attribution(
        values=parts if metadata["tuple"] else parts[0],
        provenance=Provenance(**metadata["provenance"]),
        kept=under("kept."),
        extras=under("extras."),
        **{name: tensors.get(name) for name in _OPTIONAL},  # type: ignore[arg-type]
    )


def relative_l2(found: Attribution, expected: Attribution) -> float:
    """Relative L2 distance of two attributions' values over all inputs."""
    pairs = [
        (a.detach(), b.detach()) for a, b in zip(found._parts(), expected._parts(), strict=True)
    ]
    gap = sum(float((a.double().cpu() - b.double().cpu()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return float(torch.tensor(gap / norm if norm else gap).sqrt())
