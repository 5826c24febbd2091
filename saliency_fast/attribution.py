"""Attribution: the result of a call, its provenance, and how it is built and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from saliency_fast import ops, record, render
from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call
from saliency_fast.engine.independence import TieReport
from saliency_fast.engine.job import Job
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.engine.plan import DRAWS, Plan
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, warn, warn_deprecated
from saliency_fast.graph.receptive_field import Box
from saliency_fast.model.layout import Axes, Layouts
from saliency_fast.record import WeightsHash

_USUAL_LAYOUTS = {3: "BCT", 4: "BCHW", 5: "BCDHW"}
"""Layouts that are assumed, by the number of axes, for records that state none."""
_REPORTED_TIES = 0.01
"""Share of a map that ties decide from which it is reported."""
_MEASURED_FROM = 64 * 1024
"""Bytes of inputs from which memory is measured; for less, asking the system takes too long."""
REGION_MASK = "region.mask"
"""The name under which `Attribution.kept` holds a region's mask."""


Value = TypeVar("Value")


class _OnRead(Generic[Value]):
    """A field that may be given as a function, which makes its value when that is first read."""

    def __init__(self, *default: Value) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, one: Any, owner: type) -> Value:
        if one is None:
            if not self.default:
                raise AttributeError(self.name)
            return self.default[0]
        value: Any = one.__dict__[self.name]
        if isinstance(value, WeightsHash):
            value, changed = value()
            if changed:
                one.notes[self.name] = changed
        elif callable(value):
            value = value()
        one.__dict__[self.name] = value
        made: Value = value
        return made

    def __set__(self, one: Any, value: Value | Callable[[], Any] | None) -> None:
        one.__dict__[self.name] = value


@dataclass(frozen=True)
class Provenance:
    """What an attribution rests on: enough to compute it again and to detect changes.

    Attributes:
        method, parameters: Name and all fields of the method, its seed among them.
        target: Kind of the target and what belongs to it, as JSON.
        baseline: As it was passed; tensors as `{"tensor": name}` of one in `Attribution.kept`.
        precision: Arithmetic of the model: "float32", "bfloat16", "tf32" or "float16".
        dtype, device: Of the inputs, such as "float32" and "cpu".
        backend, versions: The kernels that ran; versions of saliency_fast, torch and Python.
        input_sha256: A hash per input; None where hashing was turned off.
        weights_sha256: Hash of parameters and buffers, computed when it is first read or saved;
            None where hashing was turned off and for plain functions. Where weights have changed
            since the call, `notes` says so.
        trained_mode: Whether the model was passed in training mode, in which it is not explained.
        seconds, peak_bytes: Wall time, and peak memory over what was in use before the call.
        peak_measured: Whether `peak_bytes` was measured; else it is the plan's estimate.
        points_per_launch: Evaluation points per launch.
        halvings: How often a launch ran out of memory and was halved.
        lean, rows, layer_input: As in `explain`.
        strategy: The execution strategy that was chosen.
        region: (start, stop) per spatial axis of the requested region.
        at: Names of the layers that the maps belong to; None for the inputs.
        layout: One letter per axis of each input, None where unknown.
        notes: Free. The command line stores the model's and the input's name here.
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
    trained_mode: bool
    seconds: float
    peak_bytes: int
    peak_measured: bool
    points_per_launch: int
    halvings: int
    lean: bool = True
    strategy: str = ""
    region: list[list[int]] | None = None
    at: list[str] | None = None
    layer_input: bool = False
    rows: str = "alone"
    layout: list[str | None] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    input_sha256: _OnRead[list[str] | None] = _OnRead(None)
    weights_sha256: _OnRead[str | None] = _OnRead(None)

    @property
    def way(self) -> str:
        """Deprecated alias of `strategy`."""
        warn_deprecated("Provenance.way", "Provenance.strategy")
        return self.strategy

    def __getstate__(self) -> dict[str, Any]:
        # Whoever copies it gets the hash, and not the model.
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Maps of a batch of inputs, their errors and their provenance.

    B is the number of examples. K targets per example add an axis K behind the batch axis.

    Attributes:
        values: The maps, [B, *] like the inputs or [B, K, *]; a tuple where the inputs are one.
            float32, or float64 for float64 inputs.
        scores: The explained scalar at the inputs, float64 [B] or [B, K].
        baseline_scores: The same at the baseline; None for methods without one.
        delta: Completeness residual, like `scores`: sum of the values less (scores -
            baseline_scores). None for methods without completeness.
        error: Estimated relative L2 error, like `scores`; 0 for exact methods, NaN if unknown.
        classes: The explained classes, int64 like `scores`; None where targets are no classes.
        points: Number of evaluation points of each example, int64 [B].
        converged: Whether each example met the method's tolerance, bool [B]; None without one.
        provenance: What the maps rest on.
        kept: Tensors that a replay needs, such as baselines and masks.
        precision_error: The part of `error` due to the precision, measured; None for float32.
        extras: Further results of the method by name, [B, *] or [B, K, *].
        layouts: Layouts of the inputs as the call found them; None for records.
        tie_share: Share of the gradient at one point, float64 [B], that passes maxima which
            several elements reach up to rounding, of which the first receives all of it. NaN for
            examples that were not examined; None where none was.

    Example:
        >>> import torch, saliency_fast as sf
        >>> sf.explain(torch.nn.Linear(4, 3), torch.ones(2, 4), target=1, method="gradient")
        <Attribution gradient [2, 4]; error <= 0>
    """

    values: Tensor | Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    delta: Tensor | None
    error: Tensor
    classes: Tensor | None
    points: Tensor
    converged: Tensor | None
    provenance: _OnRead[Provenance] = _OnRead()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    precision_error: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    layouts: Layouts | None = None
    tie_share: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __repr__(self) -> str:
        """One line: method, shapes and the largest errors."""
        shapes = ", ".join(str(list(one.shape)) for one in maps_of(self))
        facts = [f"{self.provenance.method} {shapes}", f"error <= {float(self.error.max()):.2g}"]
        if self.delta is not None:
            facts.append(f"|delta| <= {float(self.delta.abs().max()):.2g}")
        if self.converged is not None and not bool(self.converged.all()):
            facts.append(f"{int((~self.converged).sum())} not converged")
        tied = 0.0 if self.tie_share is None else float(self.tie_share.nan_to_num().max())
        if tied >= _REPORTED_TIES:
            facts.append(f"ties decide {tied:.0%}")
        return f"<Attribution {'; '.join(facts)}>"

    @property
    def many(self) -> bool:
        """Whether each example has K maps.

        Example:
            >>> import torch, saliency_fast as sf
            >>> sf.explain(torch.nn.Linear(4, 3), torch.ones(1, 4), target=[[0, 2]]).many
            True
        """
        return self.scores.dim() == 2

    @property
    def layout(self) -> tuple[str | None, ...]:
        """One letter per axis of each input (see `explain`), None where it is unknown.

        Example:
            >>> import torch, saliency_fast as sf
            >>> model, x = torch.nn.Conv2d(1, 1, 3), torch.ones(1, 1, 3, 3)
            >>> sf.explain(model, x, target=(0, 0, 0)).layout
            ('BCHW',)
        """
        return self._layouts.letters

    def axes(self, number: int = 0) -> Axes | None:
        """The layout of an input as its axes.

        Args:
            number: Index of the input.

        Returns:
            The axes; [B, C, H, W] is assumed for unknown layouts of 4 axes, None for others.

        Example:
            >>> import torch, saliency_fast as sf
            >>> model, x = torch.nn.Conv2d(1, 1, 3), torch.ones(1, 1, 3, 3)
            >>> sf.explain(model, x, target=(0, 0, 0)).axes().channel
            1
        """
        return self._layouts.or_conventional(number)

    @property
    def _layouts(self) -> Layouts:
        if self.layouts is not None:
            return self.layouts
        lead = 2 if self.many else 1
        shapes = [(len(one), *one.shape[lead:]) for one in maps_of(self)]
        stated = self.provenance.layout
        usual = [_USUAL_LAYOUTS.get(len(shape)) for shape in shapes] if stated is None else stated
        return Layouts(shapes, tuple(usual))

    def map(self, reduction: str = "sum", channel_axis: int | None = None) -> Tensor | Inputs:
        """Reduces the values over their channels.

        Args:
            reduction: "sum" (signed), "absmax" or "l2".
            channel_axis: The axis of the channels, where the batch is 0; the layout's if None.

        Returns:
            [B, *spatial] or [B, K, *spatial], a tuple for several inputs. Values [B, F] have no
            channels and are returned as they are, or their magnitudes.

        Raises:
            InputError: The reduction or the axis does not exist, or the layout is unknown.

        Example:
            >>> import torch, saliency_fast as sf
            >>> model, x = torch.nn.Conv2d(3, 2, 8), torch.ones(2, 3, 8, 8)
            >>> sf.explain(model, x, target=(1, 0, 0)).map("l2").shape
            torch.Size([2, 8, 8])
        """
        if reduction not in ops.REDUCTIONS[1:]:
            raise InputError(
                f"reduction must be one of {', '.join(ops.REDUCTIONS[1:])}: got {reduction!r}"
            )
        parts = enumerate(maps_of(self))
        maps = tuple(self._map(one, reduction, number, channel_axis) for number, one in parts)
        return maps if isinstance(self.values, tuple) else maps[0]

    def _map(self, values: Tensor, reduction: str, number: int, channel_axis: int | None) -> Tensor:
        lead = 2 if self.many else 1
        if channel_axis is None and values.dim() > lead + 1:
            channel_axis = self._layouts.need(number, "map()").channel
        if channel_axis is None or values.dim() == lead + 1:
            return values if reduction == "sum" else values.abs()
        flat = values.flatten(0, lead - 1)
        if not -flat.dim() < channel_axis < flat.dim() or channel_axis == 0:
            raise InputError(
                f"channel_axis must name an axis behind the batch of {list(flat.shape)}: got "
                f"{channel_axis}"
            )
        flat = flat.movedim(channel_axis, 1)
        if values.requires_grad:
            differentiable = {"sum": flat.sum, "absmax": flat.abs().amax, "l2": flat.norm}
            reduced: Tensor = differentiable[reduction](dim=1)  # type: ignore[operator]
        else:
            reduced, _ = ops.finish(flat.contiguous(), None, None, reduction)
        return reduced.view(*values.shape[:lead], *reduced.shape[1:])

    def overlay(
        self,
        x: Tensor | Inputs,
        style: str = "signed",
        *,
        percentile: float = 99.0,
        opacity: float = 0.85,
        input: int | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Draws the maps over the inputs.

        Args:
            x: The inputs that were explained.
            style: "signed" (warm for the target, cool against it) or "heat" (magnitude).
            percentile: Percentile of the magnitudes that is drawn at full strength, per example.
            opacity: Of the map at full strength, in [0, 1].
            input: Index of one of several inputs; all by default.

        Returns:
            uint8 frames: [B, H, W, 3] of images, [B, T, H, W, 3] of videos and [B, D, H, W, 3] of
            volumes, with an axis K after the batch for several targets. For several inputs a
            tuple, with None for tables and series.

        Raises:
            InputError: No input has a picture, or `x` does not fit the maps.

        Example:
            >>> import torch, saliency_fast as sf
            >>> model, x = torch.nn.Conv2d(3, 2, 8), torch.ones(2, 3, 8, 8)
            >>> sf.explain(model, x, target=(1, 0, 0)).overlay(x, "heat").shape
            torch.Size([2, 8, 8, 3])
        """
        images = tuple(x) if isinstance(x, (tuple, list)) else (x,)
        count = len(maps_of(self))
        if len(images) != count:
            raise InputError(
                f"overlay needs the inputs that were explained: got {len(images)}, expected "
                f"{count}; pass them as a tuple, as to explain"
            )
        drawn = style, percentile, opacity
        if input is not None and not -count <= input < count:
            raise InputError(f"input must be the number of one of {count} inputs: got {input}")
        if input is not None or not isinstance(self.values, tuple):
            number = (input or 0) % count
            return self._overlaid(images[number], number, *drawn)
        if not any(_is_picture(image) for image in images):
            shapes = ", ".join(str(list(one.shape)) for one in images)
            raise InputError(
                "only images, videos and volumes have a picture: none of the inputs is one, "
                f"{shapes}; use Attribution.map()"
            )
        return tuple(
            self._overlaid(image, number, *drawn) if _is_picture(image) else None
            for number, image in enumerate(images)
        )

    def _overlaid(
        self, image: Tensor, number: int, style: str, percentile: float, opacity: float
    ) -> Tensor:
        layouts, values = self._layouts, maps_of(self)[number]
        axes = layouts.of(number)
        grey = axes is not None and image.dim() == 3 and axes.channel is None
        if not _is_picture(image) and not grey:
            what = "the input" if len(layouts) == 1 else f"input {number}"
            raise InputError(
                f"only images, videos and volumes have a picture: got {what} "
                f"{list(image.shape)}; use Attribution.map()"
            )
        if values.dim() - self.many != image.dim():
            raise InputError(
                f"the input is not the one explained: got {list(image.shape)} for values "
                f"{list(values.shape)}"
            )
        maps = self._map(values, "sum" if style == "signed" else "l2", number, None)
        shown = layouts.need(number, "overlay()").standard(image)
        return render.frames(shown.detach(), maps.detach(), style, percentile, opacity)

    def save(self, path: str | Path) -> Path:
        """Writes a record: safetensors with JSON metadata (docs/record.md).

        Args:
            path: The file, which is replaced where it exists.

        Returns:
            The path.

        Example:
            >>> import tempfile, torch, saliency_fast as sf
            >>> attribution = sf.explain(torch.nn.Linear(4, 3), torch.ones(2, 4), target=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     attribution.save(f"{folder}/map.safetensors").name
            'map.safetensors'
        """
        tensors = {f"values.{number}": one for number, one in enumerate(maps_of(self))}
        fields = {name: getattr(self, name) for name in record.TENSORS}
        tensors |= {name: value for name, value in fields.items() if value is not None}
        tensors |= {f"kept.{name}": value for name, value in self.kept.items()}
        tensors |= {f"extras.{name}": value for name, value in self.extras.items()}
        provenance = asdict(self.provenance)
        provenance[record.STRATEGY] = provenance.pop("strategy")
        if self.layouts is not None:
            provenance["layout"] = list(self.layout) if any(self.layout) else None
        metadata = {"tuple": isinstance(self.values, tuple), "provenance": provenance}
        return record.write(path, tensors, metadata)


def maps_of(attribution: Attribution) -> Inputs:
    """The maps, one per input."""
    values = attribution.values
    return values if isinstance(values, tuple) else (values,)


def _is_picture(image: Tensor) -> bool:
    return image.dim() in (4, 5)


def load(path: str | Path) -> Attribution:
    """Reads a record that `Attribution.save` wrote.

    Args:
        path: The file.

    Returns:
        The attribution, with its tensors on the CPU.

    Raises:
        RecordError: The file is truncated, altered, of another schema, or holds something else.

    Example:
        >>> import tempfile, torch, saliency_fast as sf
        >>> attribution = sf.explain(torch.nn.Linear(4, 3), torch.ones(2, 4), target=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sf.load(attribution.save(f"{folder}/map.safetensors")).provenance.method
        'integrated_gradients'
    """
    tensors, metadata = record.read(path)
    groups: dict[str, dict[str, Tensor]] = {"values": {}, "kept": {}, "extras": {}}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if rest:
            groups[prefix][rest] = tensor
    maps = tuple(groups["values"][str(number)] for number in range(len(groups["values"])))
    provenance = dict(metadata["provenance"])
    provenance["strategy"] = provenance.pop(record.STRATEGY, "")
    return Attribution(
        values=maps if metadata["tuple"] else maps[0],
        provenance=Provenance(**provenance),
        kept=groups["kept"],
        extras=groups["extras"],
        **{name: tensors.get(name) for name in record.TENSORS},  # type: ignore[arg-type]
    )


# --- From a job to its attribution ------------------------------------------------------------


def attribution(job: Job, outcome: Outcome, baseline: Baseline, **facts: Any) -> Attribution:
    """The attribution of a job's outcome, which has an axis K. facts: of the provenance."""
    call, part = job.call, job.part
    target, kept = record.describe_target(call.targets)
    baseline_spec, baseline_kept = record.describe_baseline(baseline)
    kept = kept | baseline_kept
    if part is not None and part.mask is not None:
        kept[REGION_MASK] = part.mask
    kept |= {f"features.{number}": one for number, one in enumerate(call.features)}
    layouts = call.layouts.released()
    if isinstance(job.model, nn.Module):
        # Derived once for all calls with inputs of one shape; for functions only when it is read.
        layouts.letters  # noqa: B018
    facts |= {"target": target, "baseline": baseline_spec}
    facts["layout"] = list(layouts.cached_letters) if any(layouts.cached_letters) else None

    def column(found: Any) -> Any:
        """Without the axis K where the call named one target."""
        return found if found is None or call.targets.many else found[:, 0]

    values = tuple(column(one if part is None else part.kept(one)) for one in outcome.values)
    return Attribution(
        values=values if call.is_tuple or len(values) > 1 else values[0],
        scores=column(outcome.scores),
        baseline_scores=column(outcome.baseline_scores),
        # The values of a region do not add up to the score.
        delta=column(outcome.delta) if part is None else None,
        error=column(outcome.error),
        precision_error=column(outcome.precision_error),
        classes=column(outcome.classes),
        points=outcome.points,
        converged=outcome.converged,
        provenance=partial(origin_of(job, _notes(job.plan, outcome)), **facts),
        kept=kept,
        extras={name: column(one) for name, one in outcome.extras.items()},
        layouts=layouts,
        tie_share=_tie_share(outcome.ties),
    )


def origin_of(job: Job, notes: dict[str, Any]) -> partial[Provenance]:
    """Makes the provenance of a job from further facts; it holds neither the model nor tensors."""
    box = None if job.part is None else job.part.box
    return partial(_provenance, job.method, job.plan, str(job.strategy), box, notes)


def _provenance(
    method: Method, plan: Plan, way: str, box: Box | None, notes: dict[str, Any], **facts: Any
) -> Provenance:
    return Provenance(
        method=method.name,
        parameters=_parameters(method),
        precision=plan.precision,
        dtype=plan.dtype,
        device=plan.device,
        backend=plan.backend,
        versions=record.versions(),
        points_per_launch=plan.points_per_launch,
        halvings=plan.halvings,
        strategy=way,
        region=None if box is None else [list(span) for span in box],
        notes=dict(notes),
        **facts,
    )


def _notes(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    notes: dict[str, Any] = {"draws": DRAWS} if DRAWS in plan.notes else {}
    if outcome.precision_error is not None:
        notes["underflow"] = outcome.underflow
    if outcome.ties is not None and outcome.ties.rounded:
        notes["rounded_ties"] = outcome.ties.rounded
    return notes


def _tie_share(ties: TieReport | None) -> Tensor | None:
    """The share of the gradient that passes ties, with a warning where rounding breaks them."""
    if ties is not None and ties.rounded >= _REPORTED_TIES:
        warn(
            f"up to {ties.rounded:.0%} of a map hangs on ties within rounding: the model takes "
            "maxima of values that are equal but for the last digits, and the gradient goes to one "
            "position of several. Other versions of PyTorch, processors and batch sizes give "
            "another map; see Attribution.tie_share"
        )
    return None if ties is None else ties.share


def _parameters(method: Any) -> dict[str, Any]:
    """The fields of a method; methods among them by name and fields, as `make_method` reads."""
    found = {}
    for name in getattr(method, "__dataclass_fields__", {}):
        value = getattr(method, name)
        if not isinstance(value, type) and callable(getattr(value, "recipe", None)):
            value = {"method": value.name, "parameters": _parameters(value)}
        found[name] = value
    return found


def resident_before(call: Call) -> tuple[int, int] | None:
    """Resident bytes before a call and their high-water mark, where memory is measured."""
    large = sum(x[0].nbytes for x in call.inputs) >= _MEASURED_FROM
    return resident_bytes() if call.device.type == "cpu" and large else None


def usage_of(plan: Plan, resident: tuple[int, int] | None, seconds: float) -> dict[str, Any]:
    """Wall time and peak memory; the plan's estimate where the high-water mark did not rise."""
    peak = resident_bytes()[1] if resident is not None else 0
    measured = resident is not None and peak > resident[1]
    return {
        "seconds": seconds,
        "peak_bytes": peak - resident[0] if resident and measured else plan.peak_bytes,
        "peak_measured": measured,
    }
