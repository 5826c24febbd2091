"""Subject: what is judged, a model's inputs with their maps, checked once for every metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import bind, is_finite, layouts_of, read_inputs
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.boxes import masks_of
from saliency_fast.evaluate.scores import Running, Scorer, Scores, one_target
from saliency_fast.evaluate.substrates import Substrate, substrate_of
from saliency_fast.methods import make_method, read_method
from saliency_fast.model.axes import Axes, LayoutLike, Layouts
from saliency_fast.model.targets import PREDICTED, Target
from saliency_fast.specs import restore_baseline

Model = Callable[..., Any]
Explainer = Method | str | Callable[[Model, Tensor, Target], Tensor]
"""How maps are made: a method, its name, or a function (model, inputs, target) -> maps."""
SAME = 1e-5
"""Of the largest output, how far two runs may be apart by rounding alone (float32, GPU atomics)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is judged.

    inputs [B, C, *spatial] (or [B, F]): floating; NaN is a missing value. They are in the standard
    layout whatever the model's (`running.axes`), and so are values, masks and baseline.
    values: their maps, [B, C, *spatial] or, one number for all channels of a place,
    [B, 1, *spatial]. target: int64 [B] classes, or what `explain` takes as one. masks bool
    [B, *spatial]: where the object is. method and baseline: how the maps were made.
    """

    model: Model | None
    inputs: Tensor
    values: Tensor
    target: Target = None
    masks: Tensor | None = None
    method: Explainer | None = None
    baseline: Baseline = None
    running: Running = field(default_factory=Running)

    @property
    def batch(self) -> int:
        return len(self.inputs)

    @cached_property
    def places(self) -> Tensor:
        """The maps with their channels summed, [B, *spatial]; inputs [B, F] are places alone."""
        return self.values if self.values.dim() == 2 else self.values.sum(1)

    @cached_property
    def classes(self) -> Target:
        """The target with "predicted" looked up: the classes int64 [B] that are largest."""
        if not (isinstance(self.target, str) and self.target == PREDICTED):
            return self.target
        decisions = self._twice[0].decisions
        if decisions is None:
            raise InputError(
                "target='predicted' needs several classes: the model gives one number per example;"
                " use target=None"
            )
        return decisions

    @property
    def scorer(self) -> Scorer:
        """Scores at points made of the inputs."""
        return Scorer(self._model, self.inputs, self.classes, self.running, lean=self.finite)

    @cached_property
    def finite(self) -> bool:
        """Whether the inputs hold no NaN and no infinity."""
        return is_finite(self.inputs)

    def scorer_beside(self, fill: Tensor) -> Scorer:
        """Scores at points made of the inputs and of `fill`, which may hold NaN."""
        return replace(self.scorer, lean=self.finite and is_finite(fill))

    @property
    def first(self) -> Scores:
        """What the model says of the inputs."""
        return self._twice[0]

    @cached_property
    def caveats(self) -> tuple[str, ...]:
        """What is wrong with the model itself: two runs that differ."""
        one, two = self._twice
        scale, gap = float(one.scores.abs().max()), float((one.scores - two.scores).abs().max())
        differs = 0.0
        if one.probabilities is not None and two.probabilities is not None:
            # These depend on all outputs, where the target's may happen to be the same, and tell
            # how large those are where the target's happens to be near zero.
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
        """Maps like `values` of other inputs of the same shape, or of another model."""
        if self.method is None:
            raise InputError(
                "method is missing: this metric explains again, and needs to know how; pass "
                "method= a method, its name or a function (model, inputs, target) -> maps"
            )
        model, method = model or self._model, self.method
        if _is_method(method):
            found = self.attribution(read_method(method), inputs, model)
            return self.read(found.values, inputs)
        by_function = cast(Callable[[Model, Tensor, Target], Tensor], method)
        return self.read(by_function(model, self.running.cast(inputs), self.classes), inputs)

    def read(self, maps: Any, inputs: Tensor | None = None) -> Tensor:
        """Maps in the model's layout, or without its channels, as `values`."""
        return read_maps(maps, self.inputs if inputs is None else inputs, self.running.axes)

    def fill(self, substrate: Substrate, seed: int = 0, *, missing: bool = False) -> Tensor:
        """What stands in the place of what is gone, [B | 1, *] like the inputs; see
        `substrate_of`. Tensors are in the model's layout.
        """
        given = _standard(substrate, self.inputs, self.running)
        return substrate_of(given, self.inputs, seed, missing=missing)

    def attribution(self, method: Method, inputs: Tensor, model: Model) -> Attribution:
        """What a method says, from the baseline where it takes one."""
        engine, x = self.running.engine(model, method), self.running.cast(inputs)
        baseline = None if method.recipe().baseline == "none" else self.started
        return engine(x, self.classes, baseline, **self.running.arguments())

    @property
    def started(self) -> Baseline:
        """The baseline as the model takes it."""
        found: Baseline = _each(self.baseline, self.running.back)
        return found

    def of(self, inputs: Tensor, values: Tensor) -> Subject:
        """The same with other inputs and maps, for targets that are looked up already."""
        return replace(self, inputs=inputs, values=values, target=self.classes)

    def beside(
        self, values: Tensor, method: Explainer | None, baseline: Baseline = None
    ) -> Subject:
        """The same inputs with other maps: what the model says of them is not asked again."""
        baseline = self.baseline if baseline is None else baseline
        other = replace(self, values=values, method=method, baseline=baseline, target=self.classes)
        other.__dict__["_twice"] = self._twice
        return other

    @property
    def _model(self) -> Model:
        if self.model is None:
            raise InputError("model is missing: this metric asks it; pass the model")
        return self.model

    @cached_property
    def _twice(self) -> tuple[Scores, Scores]:
        scorer = Scorer(self._model, self.inputs, self.target, self.running, lean=self.finite)
        return scorer.again()


def read_subject(
    model: Model | None,
    inputs: Tensor,
    maps: Tensor | Attribution,
    *,
    target: Target = None,
    boxes: Any = None,
    method: Explainer | None = None,
    baseline: Baseline = None,
    running: Running | None = None,
    layout: LayoutLike = None,
) -> Subject:
    """Validates what is judged; raises InputError or InputTypeError with the cure.

    maps: an `Attribution`, whose target, method and baseline count where they are not given, or a
    tensor [B, C, *spatial], [B, 1, *spatial] or [B, *spatial]. boxes: [B, 2 D] as (top, left,
    bottom, right), half-open, for D spatial axes, or masks bool [B, *spatial]. layout: of the
    inputs, one letter per axis, as in `explain`; found in the maps' attribution or in the model.
    """
    if not isinstance(inputs, Tensor):
        raise InputTypeError(
            f"inputs must be one tensor: got {type(inputs).__name__}; pass what is not judged as "
            "forward_args"
        )
    (x,), _ = read_inputs(inputs, missing=True)
    running = running or Running()
    axes = axes_of(model, inputs, running, maps, layout)
    running = running.taking(inputs.dtype, axes)
    x = running.standard(x)
    if isinstance(maps, Attribution):
        past = maps.provenance
        # Class activation maps look at a layer, and are of the inputs.
        if past.at is not None and _method_of(maps).recipe().layers is None:
            raise InputError(
                f"maps must be of the inputs: got those of the layer {', '.join(past.at)}; resize "
                "them and pass the tensor"
            )
        if maps.many:
            raise InputError("maps must be one per example: got several targets; take one of them")
        target = maps.classes if target is None and maps.classes is not None else target
        method = _method_of(maps) if method is None else method
        baseline = (
            restore_baseline(past.baseline, maps.kept, x.device) if baseline is None else baseline
        )
    one_target(target, len(x))
    values = maps.values if isinstance(maps, Attribution) else maps
    masks = None if boxes is None else masks_of(boxes, x)
    if method is not None and _is_method(method):
        method = read_method(method)
    baseline = _standard(baseline, x, running)
    values = read_maps(values, x, running.axes)
    return Subject(model, x, values, target, masks, method, baseline, running)


def axes_of(
    model: Model | None,
    x: Tensor,
    running: Running,
    maps: object = None,
    layout: LayoutLike = None,
) -> Axes:
    """The layout of inputs `x`: as given, as an attribution states it, or as the model tells."""
    if layout is None and isinstance(maps, Attribution) and maps.layout[:1] != (None,):
        layout = maps.layout[0]
    if layout is not None or model is None:
        layouts = Layouts([tuple(x.shape)], layout)
    else:
        call = bind(x, None, running.forward_args, running.forward_kwargs, missing=True)
        layouts = layouts_of(model, call, None)
    if x.dim() == 2:
        # Tables need no layout, so that functions, which are looked at anew, are not run for it.
        seen = layouts.letters if isinstance(model, nn.Module) else layouts.settled
        return Axes(seen[0] or "BF")
    return layouts.need(0, "what a map says of places")


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A baseline with its tensors changed."""
    if isinstance(value, (tuple, list)):
        return type(value)(_each(one, change) for one in value)
    return change(value) if isinstance(value, Tensor) else value


def _standard(value: Any, x: Tensor, running: Running) -> Any:
    """A baseline, or a substrate, whose tensors are in the model's layout, in the standard one.

    x: the inputs in the standard one.
    """
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

    return _each(value, change)


def read_maps(maps: Any, inputs: Tensor, axes: Axes | None = None) -> Tensor:
    """Maps [B, C | 1, *spatial] of inputs [B, C, *spatial]; raises where they cannot be.

    axes: the layout of the maps, where it is not the standard one, in which the inputs are.
    """
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
    whole = maps.shape == shape or (len(shape) > 2 and maps.shape == (shape[0], 1, *shape[2:]))
    if not whole:
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
        rows = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise InputError(
            f"maps must be finite: examples {rows[:8]} hold NaN or infinity in {values.dtype}, the "
            "inputs' type"
        )
    return values


def _is_method(method: Explainer) -> TypeGuard[Method | str]:
    return isinstance(method, str) or hasattr(method, "recipe")


def _method_of(found: Attribution) -> Method:
    """The method that a record names, with its fields."""
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.provenance.parameters.items()
    }
    return make_method(found.provenance.method, fields)
