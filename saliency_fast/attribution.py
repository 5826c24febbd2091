"""Attribution: the result of a call, what it rests on, and its record on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops, record, render, schema
from saliency_fast._types import Inputs
from saliency_fast.errors import InputError
from saliency_fast.model.layout import Axes, Layouts

_USUAL = {3: "BCT", 4: "BCHW", 5: "BCDHW"}
"""Of records that state no layout."""
TOLD = 0.01
"""Share of a map from which its line tells what decides it."""
REGION_MASK = "region.mask"
"""The name under which `kept` holds a region's mask."""


@dataclass(frozen=True)
class Provenance:
    """What an attribution rests on: enough to compute it again and to see that nothing changed.

    sha256 fields are None where hashing was turned off or the model is a plain function. peak_bytes
    is over what was in use before the call; `peak_measured` tells a measured one from the plan's.
    way: how points went through the model. region: (start, stop) per spatial axis. at: the layers
    that the map belongs to, where that is not the inputs; layer_input: at what they take. layout:
    one letter per axis of each input, where known (`Attribution.layout` finds it).
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
    layout: list[str | None] | None = None
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
    precision's, as measured on some of the points; None for float32. tie_share [B], float64: the
    share of the gradient, at one point, that goes through maxima which several places reach, up to
    rounding, so that the first of them has it all; NaN for examples at which nobody looked,
    None where those are all. extras: further results of the method by name, [B, *] or [B, K, *].
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
    layouts: Layouts | None = None
    tie_share: Tensor | None = None

    def __repr__(self) -> str:
        """One line: method, shapes, and the worst that is known of the maps."""
        shapes = ", ".join(str(list(one.shape)) for one in self._parts())
        facts = [f"{self.provenance.method} {shapes}", f"error <= {float(self.error.max()):.2g}"]
        if self.delta is not None:
            facts.append(f"|delta| <= {float(self.delta.abs().max()):.2g}")
        if self.converged is not None and not bool(self.converged.all()):
            facts.append(f"{int((~self.converged).sum())} not converged")
        if (
            self.tie_share is not None
            and (tied := float(self.tie_share.nan_to_num().max())) >= TOLD
        ):
            facts.append(f"ties decide {tied:.0%}")
        return f"<Attribution {'; '.join(facts)}>"

    @property
    def many(self) -> bool:
        """Whether each example has several maps."""
        return self.scores.dim() == 2

    @property
    def layout(self) -> tuple[str | None, ...]:
        """One letter per axis of each input (see `explain`), None where neither the call nor the
        model tells.
        """
        return self._layouts.letters

    def axes(self, number: int = 0) -> Axes | None:
        """The layout of an input as its axes; [B, C, H, W] of pictures where it is not known."""
        return self._layouts.usual(number)

    @property
    def _layouts(self) -> Layouts:
        """Those of the call; of a record those that it states."""
        if self.layouts is not None:
            return self.layouts
        lead = 2 if self.many else 1
        shapes = [(len(one), *one.shape[lead:]) for one in self._parts()]
        stated = self.provenance.layout
        usual = [_USUAL.get(len(shape)) for shape in shapes] if stated is None else stated
        return Layouts(shapes, tuple(usual))

    def map(self, reduction: str = "sum", channel_axis: int | None = None) -> Tensor | Inputs:
        """Values with their channels reduced: [B, *spatial], or [B, K, *spatial].

        reduction: "sum" (signed), "absmax" or "l2". channel_axis counts the batch as 0, such as 1
        of images; None is the one of the layout. Values [B, F] are their own map.

        Raises InputError where the layout is not known and matters.
        """
        maps = tuple(
            self._map(one, reduction, number, channel_axis)
            for number, one in enumerate(self._parts())
        )
        return maps if isinstance(self.values, tuple) else maps[0]

    def _parts(self) -> Inputs:
        return self.values if isinstance(self.values, tuple) else (self.values,)

    def _map(self, values: Tensor, reduction: str, number: int, channel_axis: int | None) -> Tensor:
        if reduction not in ops.REDUCTIONS[1:]:
            raise InputError(
                f"reduction must be one of {', '.join(ops.REDUCTIONS[1:])}: got {reduction!r}"
            )
        lead = 2 if self.many else 1
        if values.dim() == lead + 1:
            return values if reduction == "sum" else values.abs()
        if channel_axis is None:
            channel_axis = self._layouts.need(number, "map()").channel
        if channel_axis is None:
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
        input: int | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """The map over the input as uint8 frames: [B, H, W, 3] for images, [B, T, H, W, 3] for
        video, and slices [B, D, H, W, 3] for volumes; a K axis stands behind the batch.

        style: "signed" (warm for, cool against) or "heat" (magnitude). percentile: the magnitude
        drawn at full strength, per example. input: the number of one of several inputs; without it
        all are drawn, and those that have no picture (tables, series) are None in the tuple. Raises
        InputError where there is no picture.
        """
        images = tuple(x) if isinstance(x, (tuple, list)) else (x,)
        if len(images) != len(self._parts()):
            raise InputError(
                f"overlay needs the inputs that were explained: got {len(images)}, expected "
                f"{len(self._parts())}; pass them as a tuple, as to explain"
            )
        if input is not None:
            if not -len(images) <= input < len(images):
                raise InputError(
                    f"input must be the number of one of {len(images)} inputs: got {input}"
                )
            return self._overlaid(images[input], input % len(images), style, percentile, opacity)
        kinds = [image.dim() in (4, 5) for image in images]
        several = isinstance(self.values, tuple)
        if several and not any(kinds):
            shapes = ", ".join(str(list(one.shape)) for one in images)
            raise InputError(
                "only images, videos and volumes have a picture: none of the inputs is one, "
                f"{shapes}; use Attribution.map()"
            )
        if not several:
            return self._overlaid(images[0], 0, style, percentile, opacity)
        return tuple(
            self._overlaid(image, number, style, percentile, opacity) if kind else None
            for number, (image, kind) in enumerate(zip(images, kinds, strict=True))
        )

    def _overlaid(
        self, image: Tensor, number: int, style: str, percentile: float, opacity: float
    ) -> Tensor:
        """The map of one input over it."""
        layouts, lead = self._layouts, 2 if self.many else 1
        reduction = "sum" if style == "signed" else "l2"
        if image.dim() not in (4, 5):
            axes = layouts.of(number)
            # A picture without a channel axis.
            if axes is None or image.dim() != 3 or axes.channel is not None:
                what = "the input" if len(layouts) == 1 else f"input {number}"
                raise InputError(
                    f"only images, videos and volumes have a picture: got {what} "
                    f"{list(image.shape)}; use Attribution.map()"
                )
        values = self._parts()[number]
        if values.dim() - lead + 1 != image.dim():
            raise InputError(
                f"the input is not the one explained: got {list(image.shape)} for values "
                f"{list(values.shape)}"
            )
        maps = self._map(values, reduction, number, None)
        shown = layouts.need(number, "overlay()").standard(image)
        return render.frames(shown.detach(), maps.detach(), style, percentile, opacity)

    def save(self, path: str | Path) -> Path:
        """Writes the record (safetensors with JSON metadata, docs/record.md); returns its path."""
        tensors = {f"values.{number}": one for number, one in enumerate(self._parts())}
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        tensors |= {f"kept.{name}": value for name, value in self.kept.items()}
        tensors |= {f"extras.{name}": value for name, value in self.extras.items()}
        layout = list(self.layout) if any(self.layout) else None
        provenance = asdict(replace(self.provenance, layout=layout))
        metadata = {"tuple": isinstance(self.values, tuple), "provenance": provenance}
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
    "tie_share",
)


def load(path: str | Path) -> Attribution:
    """Reads a record; raises RecordError where it is truncated, altered, of another schema, or
    holds what no attribution does (docs/record.md).
    """
    tensors, metadata = record.read(path)
    schema.check(path, tensors, metadata)
    return _assembled(tensors, metadata)


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
    return float(torch.tensor(gap / norm if norm else gap, device="cpu").sqrt())
