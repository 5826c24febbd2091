"""Evaluation inputs: a model's inputs with their maps, validated once for every metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import NAMED, Baseline, read_baselines
from saliency_fast.engine.bind import bind, is_finite, layouts_of, read_inputs
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.maps import spatial_shape
from saliency_fast.evaluate.scores import RunOptions, Scorer, Scores, one_target
from saliency_fast.methods import make_method, read_method
from saliency_fast.model.layout import Axes, LayoutLike, Layouts
from saliency_fast.model.targets import PREDICTED, Target
from saliency_fast.record import restore_baseline

Model = Callable[..., Any]
Explainer = Method | str | Callable[[Model, Tensor, Target], Tensor]
"""How maps are made: a method, its name, or a function (model, inputs, target) -> maps."""
Replacement = str | float | Tensor
"""What replaces removed positions: "zero", a named baseline, a number or a tensor."""
ZERO = "zero"
SAME = 1e-5
"""Rounding between two runs of a deterministic model, relative to the largest output (float32)."""
_SHOWN = 8
"""How many example indices an error lists."""


@dataclass(frozen=True, eq=False)
class EvaluationInput:
    """The input of a metric; all tensors have channels first.

    Args:
        model: The model; None for metrics that do not read its scores.
        inputs: [B, C, *spatial] or [B, F], floating; NaN is a missing value.
        values: The maps, [B, C, *spatial], or [B, 1, *spatial] with one value for all channels.
        target: int64 [B] classes, or what `explain` takes.
        masks: Where the object is, bool [B, *spatial].
        method: How the maps were made.
        baseline: The method's baseline.
        running: How the model is run.
    """

    model: Model | None
    inputs: Tensor
    values: Tensor
    target: Target = None
    masks: Tensor | None = None
    method: Explainer | None = None
    baseline: Baseline = None
    running: RunOptions = field(default_factory=RunOptions)
    # Shared by evaluation inputs that differ in their maps alone.
    _scores: list[tuple[Scores, Scores]] = field(default_factory=list, repr=False)

    @property
    def batch(self) -> int:
        """The number of examples B."""
        return len(self.inputs)

    @cached_property
    def places(self) -> Tensor:
        """The maps summed over channels, [B, *spatial] or [B, F]."""
        return position_sums(self.values)

    @cached_property
    def classes(self) -> Target:
        """The target, with "predicted" replaced by the predicted classes int64 [B]."""
        if not (isinstance(self.target, str) and self.target == PREDICTED):
            return self.target
        return self.first.decided("target='predicted'")

    @property
    def scorer(self) -> Scorer:
        """Scores points that are made of the inputs."""
        return Scorer(self._model, self.inputs, self.classes, self.running, self.finite)

    @cached_property
    def finite(self) -> bool:
        """Whether the inputs hold no NaN and no infinity."""
        return is_finite(self.inputs)

    def scorer_beside(self, fill: Tensor) -> Scorer:
        """Scores points that are made of the inputs and of `fill`, which may hold NaN."""
        return replace(self.scorer, lean=self.finite and is_finite(fill))

    @property
    def first(self) -> Scores:
        """The model's scores of the inputs."""
        return self._repeated[0]

    @cached_property
    def caveats(self) -> tuple[str, ...]:
        """A sentence where two runs of the model differ."""
        one, two = self._repeated
        scale, gap = float(one.scores.abs().max()), float((one.scores - two.scores).abs().max())
        differs = 0.0
        if one.probabilities is not None and two.probabilities is not None:
            # Probabilities depend on all outputs: they differ where the target's output happens to
            # be equal, and they give the scale where the target's output is near zero.
            share = one.probabilities.clamp_min(torch.finfo(torch.float64).tiny)
            scale = max(scale, float((one.scores - share.log()).abs().max()))
            differs = float(((one.probabilities - two.probabilities).abs() / share.max()).max())
        if gap <= SAME * scale and differs <= SAME * max(1.0, scale):
            return ()
        return (
            "the model is not deterministic: two runs of the same inputs differ by up to "
            f"{max(gap, differs):.2g} (outputs are about {scale:.2g}), and so do all numbers here",
        )

    def explain(self, inputs: Tensor, model: Model | None = None) -> Tensor:
        """Maps of other inputs of the same shape, or of another model, made as `values` were."""
        if self.method is None:
            raise InputError(
                "method is missing: this metric explains again, and needs to know how; pass "
                "method= a method, its name or a function (model, inputs, target) -> maps"
            )
        model, method = model or self._model, self.method
        if is_method(method):
            maps: object = self.attribution(read_method(method), inputs, model).values
        else:
            by_function = cast(Callable[[Model, Tensor, Target], Tensor], method)
            maps = by_function(model, self.running.cast(inputs), self.classes)
        return read_maps(maps, inputs, self.running.axes)

    def fill(self, replacement: Replacement, seed: int = 0, *, missing: bool = False) -> Tensor:
        """The replacement baseline, [B | 1, *], of a replacement in the model's layout."""
        given = _channels_first(replacement, self.inputs, self.running)
        return replacement_of(given, self.inputs, seed, missing=missing)

    def attribution(self, method: Method, inputs: Tensor, model: Model) -> Attribution:
        """The attribution by a method, from the baseline where the method takes one."""
        engine, x = self.running.engine(model, method), self.running.cast(inputs)
        baseline = None if method.recipe().baseline == "none" else self.model_baseline
        return engine(x, self.classes, baseline, **self.running.arguments())

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the method; None for functions."""
        return read_method(self.method).recipe() if is_method(self.method) else None

    @property
    def model_baseline(self) -> Baseline:
        """The baseline in the model's layout."""
        baseline: Baseline = _map_tensors(self.baseline, self.running.back)
        return baseline

    def beside(
        self, values: Tensor, method: Explainer | None, baseline: Baseline = None
    ) -> EvaluationInput:
        """The same inputs with other maps: the model is not run on them again."""
        baseline = self.baseline if baseline is None else baseline
        return replace(self, values=values, method=method, baseline=baseline, target=self.classes)

    @property
    def _model(self) -> Model:
        if self.model is None:
            raise InputError("model is missing: this metric reads its scores; pass the model")
        return self.model

    @property
    def _repeated(self) -> tuple[Scores, Scores]:
        """The scores of the inputs by two runs."""
        if not self._scores:
            scorer = Scorer(self._model, self.inputs, self.target, self.running, self.finite)
            self._scores.append(scorer.again())
        return self._scores[0]


def read_evaluation_input(
    model: Model | None,
    inputs: Tensor,
    maps: Tensor | Attribution,
    *,
    target: Target = None,
    boxes: Any = None,
    method: Explainer | None = None,
    baseline: Baseline = None,
    running: RunOptions | None = None,
    layout: LayoutLike = None,
) -> EvaluationInput:
    """Validates an evaluation input; the arguments are those of `Metric.__call__`."""
    if not isinstance(inputs, Tensor):
        raise InputTypeError(
            f"inputs must be one tensor: got {type(inputs).__name__}; pass what has no map as "
            "forward_args"
        )
    (x,), _ = read_inputs(inputs, missing=True)
    running = running or RunOptions()
    running = running.taking(inputs.dtype, _axes_of(model, inputs, running, maps, layout))
    x = running.standard(x)
    if isinstance(maps, Attribution):
        past = maps.provenance
        fields = past.parameters.items()
        options = {key: tuple(one) if isinstance(one, list) else one for key, one in fields}
        made_by = make_method(past.method, options)
        # Class activation maps have a layer and are nevertheless maps of the inputs.
        if past.at is not None and made_by.recipe().layers is None:
            raise InputError(
                f"maps must be of the inputs: got those of the layer {', '.join(past.at)}; resize "
                "them and pass the tensor"
            )
        if maps.many:
            raise InputError("maps must be one per example: got several targets; take one of them")
        target = maps.classes if target is None and maps.classes is not None else target
        method = made_by if method is None else method
        if baseline is None:
            baseline = restore_baseline(past.baseline, maps.kept, x.device)
    one_target(target, len(x))
    masks = None if boxes is None else _masks_of(boxes, x)
    if method is not None and is_method(method):
        method = read_method(method)
    baseline = _channels_first(baseline, x, running)
    values = maps.values if isinstance(maps, Attribution) else maps
    values = read_maps(values, x, running.axes)
    return EvaluationInput(model, x, values, target, masks, method, baseline, running)


def _axes_of(
    model: Model | None, x: Tensor, running: RunOptions, maps: object, layout: LayoutLike
) -> Axes:
    """The layout of inputs: as given, as an attribution states it, or as the model implies."""
    if layout is None and isinstance(maps, Attribution) and maps.layout[:1] != (None,):
        layout = maps.layout[0]
    if layout is not None or model is None:
        layouts = Layouts([tuple(x.shape)], layout)
    else:
        call = bind(x, None, running.forward_args, running.forward_kwargs, missing=True)
        layouts = layouts_of(model, call, None)
    if x.dim() == 2:
        # Tables need no layout: a function, whose layout takes a run to find, is not run for it.
        seen = layouts.letters if isinstance(model, nn.Module) else layouts.cached_letters
        return Axes(seen[0] or "BF")
    return layouts.need(0, "what a map says of places")


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A baseline with its tensors changed."""
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(one, change) for one in value)
    return change(value) if isinstance(value, Tensor) else value


def _channels_first(value: Any, x: Tensor, running: RunOptions) -> Any:
    """A baseline, or a replacement, with its tensors moved from the model's layout to that of x."""
    if running.axes is None or running.axes.is_standard:
        return value
    shape = running.back(x[:1]).shape

    def change(one: Tensor) -> Tensor:
        lead = len(one) if one.dim() == len(shape) else 1
        try:
            return running.standard(one.expand(lead, *shape[1:]))
        except RuntimeError as error:
            raise InputError(
                "baseline must match the inputs or broadcast to them: got "
                f"{list(one.shape)}, the inputs are {[len(x), *shape[1:]]}"
            ) from error

    return _map_tensors(value, change)


def read_maps(maps: Any, inputs: Tensor, axes: Axes | None = None) -> Tensor:
    """Maps of inputs [B, C, *spatial] as [B, C | 1, *spatial], from the layout `axes`."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise InputTypeError(
            f"maps must be a floating tensor or an Attribution: got {got}; use torch.as_tensor"
        )
    shape = inputs.shape
    if axes is not None and maps.dim() == len(axes.letters):
        maps = axes.standard(maps)
    if maps.shape == (shape[0], *shape[2:]) and len(shape) > 2:
        maps = maps[:, None]
    if maps.shape != shape and (len(shape) < 3 or maps.shape != (shape[0], 1, *shape[2:])):
        raise InputError(
            f"maps must match the inputs: got {list(maps.shape)}, expected {list(shape)}, or that "
            f"without channels {[shape[0], *shape[2:]]}"
        )
    if maps.device != inputs.device:
        raise InputError(
            f"maps are on another device: got {maps.device}, inputs are on {inputs.device}; move "
            "them with .to(inputs.device)"
        )
    values: Tensor = maps.detach().to(inputs.dtype)
    if not bool(values.isfinite().all()):
        rows = true_rows((~values.isfinite()).flatten(1).any(1))
        raise InputError(
            f"maps must be finite: examples {rows} hold NaN or infinity in {values.dtype}, the "
            "inputs' type"
        )
    return values


def _masks_of(boxes: Any, inputs: Tensor) -> Tensor:
    """Masks bool [B, *spatial] from masks, or from half-open boxes [B, 2 D]: starts, then stops."""
    batch, spatial = len(inputs), spatial_shape(inputs)
    whole = [batch, *spatial]
    try:
        boxes = torch.as_tensor(boxes).to(inputs.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"boxes must be a tensor of corners or masks: got {type(boxes).__name__}"
        ) from error
    is_mask = boxes.shape in ((batch, *spatial), (batch, 1, *spatial))
    if boxes.dtype == torch.bool:
        if not is_mask:
            got = list(boxes.shape)
            raise InputError(f"masks must match the inputs: got {got}, expected {whole}")
        masks: Tensor = boxes.reshape(batch, *spatial)
        empty = true_rows(~masks.flatten(1).any(1))
        if empty:
            raise InputError(f"masks must hold something: those of examples {empty} are empty")
        return masks
    if boxes.numel() and (boxes.is_floating_point() or boxes.is_complex()):
        raise InputTypeError(
            f"boxes must be whole numbers or bool masks: got {boxes.dtype}; use .long() or .bool()"
        )
    if boxes.shape != (batch, 2 * len(spatial)):
        if is_mask:
            raise InputTypeError(f"masks must be bool: got {boxes.dtype}; use .bool()")
        raise InputError(
            f"boxes must be [B, {2 * len(spatial)}], the starts and then the stops of each axis, or"
            f" masks {whole}: got {list(boxes.shape)} for {batch} inputs"
        )
    inside = torch.ones(whole, dtype=torch.bool, device=inputs.device)
    for axis, size in enumerate(spatial):
        start, stop = boxes[:, axis], boxes[:, len(spatial) + axis]
        wrong = true_rows((start < 0) | (stop > size) | (start >= stop))
        if wrong:
            raise InputError(
                f"boxes must lie inside of the image and hold something: box {wrong[0]} is "
                f"{boxes[wrong[0]].tolist()}, expected 0 <= start < stop <= {size} on axis {axis}"
            )
        position = torch.arange(size, device=inputs.device)
        within = (position >= start[:, None]) & (position < stop[:, None])
        inside &= within.view(batch, *(1,) * axis, size, *(1,) * (len(spatial) - axis - 1))
    return inside


def check_replacement(name: str, value: object, also: tuple[str, ...] = ()) -> None:
    """Raises unless the value is a number, a tensor, or one of the names."""
    valid = (*also, ZERO, *NAMED)
    expected = f"{name} must be one of {', '.join(valid)}, a number or a tensor like the inputs"
    if isinstance(value, str):
        if value not in valid:
            raise InputError(f"{expected}: got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise InputTypeError(f"{expected}: got {type(value).__name__}")


def replacement_of(
    replacement: Replacement, inputs: Tensor, seed: int = 0, *, missing: bool = False
) -> Tensor:
    """The values, [B | 1, *], that replace removed positions; `missing` ones may be NaN."""
    given = 0.0 if isinstance(replacement, str) and replacement == ZERO else replacement
    try:
        (fill,) = read_baselines(given, (inputs,), seed, missing=missing)
    except InputError as error:
        message = str(error).replace("baseline=None", "substrate='zero'")
        raise InputError(message.replace("baseline", "substrate")) from error
    return fill


def describe(value: Any) -> Any:
    """A replacement or a baseline as results and records state it: tensors by their shape."""
    if isinstance(value, (tuple, list)):
        return type(value)(describe(one) for one in value)
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else value


def position_sums(values: Tensor) -> Tensor:
    """Maps [B, C | 1, *spatial] summed over channels; maps [B, F] as they are."""
    return values if values.dim() == 2 else values.sum(1)


def true_rows(flags: Tensor) -> list[int]:
    """The first example indices at which flags bool [B] are set, for messages."""
    rows: list[int] = flags.nonzero().flatten()[:_SHOWN].tolist()
    return rows


def is_method(method: Any) -> TypeGuard[Method | str]:
    """Whether maps are made by a method of the library, rather than by a function."""
    return isinstance(method, str) or hasattr(method, "recipe")
