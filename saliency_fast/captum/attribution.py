"""Base classes with Captum's names, and the adapter to the engine that all classes share.

Every class turns its arguments into an `AttributeCall` and a method of the engine, and `explained`
returns the maps. A call at layers or of a neuron has another function: the part of the model
downstream of the layers, or the model up to the neuron.

No mode of the model is switched, as in Captum: the engine gets a function around the user's. Where
rows are not independent (batch norm in training mode, one number for a batch, inputs of several
lengths, a gradient function of the user's) the whole batch is one example, whose points hold all
rows.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast._types import Inputs
from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution as EngineResult
from saliency_fast.captum import forms
from saliency_fast.engine import config as configs
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.independence import Independence
from saliency_fast.engine.job import Job, Progress
from saliency_fast.engine.loop import run_alone
from saliency_fast.engine.recipe import Method, WeightedSum
from saliency_fast.errors import BudgetError, ContractError, ModelCallError, ModelError
from saliency_fast.graph.gradients import differentiable, gradients
from saliency_fast.graph.passes.half import FLOAT32, tf32_as_set
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.failures import as_well, diagnosed
from saliency_fast.model.layers import Downstream
from saliency_fast.model.preserve import preserved
from saliency_fast.rules.intercept import RulesExecutor

SMALL_INPUTS = 16 * 1024
"""Bytes of inputs up to which one plain run of the batch is faster than planned launches."""
SMALL_MODULE = 64 * 1024**2
"""Bytes of weights up to which it is."""
SMALL_NORMED = 2 * 1024**2
"""Bytes of weights up to which it is for modules with batch norms, which the engine folds."""
MOST_CALIBRATIONS = 256
"""Calibrations kept for a function: one for each of its layers, and for each shape of a batch."""
Calibrations = dict[tuple[object, ...], CalibrationCache]
ByRows = tuple[Inputs, Tensor | None]
"""Maps like the inputs, and by feature [N, F] for methods that have them."""


@dataclass(frozen=True)
class AttributeCall:
    """What a call of `attribute` asks of the engine, with arguments in one form.

    gradient_func: another than `compute_gradients` is the user's. one_example: whether the batch is
    one in any case. features: masks that broadcast to their inputs, [1 | B, *]. at_once: perturbed
    batches per call of the function. progress: the class whose bar is shown; "" for none.
    """

    forward: Callable[..., Any]
    inputs: Inputs
    target: Any = None
    further: Any = None
    baselines: forms.Baselines | None = None
    gradient_func: Callable[..., Inputs] = forms.compute_gradients
    points_per_launch: int | None = None
    one_example: bool = False
    features: Inputs | None = None
    at_once: int = 1
    progress: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", forms.as_target(self.target))

    @cached_property
    def owner(self) -> nn.Module | None:
        """The module whose function is explained, where one is found."""
        return owner_of(self.forward)

    @property
    def is_usual(self) -> bool:
        """Whether gradients are the model's own."""
        return self.gradient_func is forms.compute_gradients

    @property
    def may_be_by_rows(self) -> bool:
        """Whether rows of the batch may be independent."""
        same = len({x.shape[:1] for x in self.inputs}) == 1 and self.inputs[0].dim() > 0
        modules = () if self.owner is None else self.owner.modules()
        norms = (one for one in modules if isinstance(one, nn.modules.batchnorm._BatchNorm))
        return same and not any(one.training or one.running_mean is None for one in norms)


class _RowsDependError(Exception):
    """Rows of a call depend on each other."""


class _ProvedRows(Independence):
    """The proof of rows, each an example unless rows are seen to depend on each other."""

    def meet(self, reason: str, *, vmapped: bool = False) -> None:
        self.reason, self.proved = reason, False
        raise _RowsDependError(reason)

    def due(self, rows: int, *, apart: bool) -> tuple[int, ...]:
        if self.reason:
            raise _RowsDependError(self.reason)
        return super().due(rows, apart=apart)


class _RowProofs(dict[tuple[object, ...], Independence]):
    def setdefault(self, key: tuple[object, ...], default: Any = None) -> Independence:
        # Kept before `learn`, which may raise: other forms of the call read the reason.
        proof = super().setdefault(key, _ProvedRows(None))
        proof.learn(default.suspect)
        return proof


@lru_cache
def _proving(config: EngineConfig) -> EngineConfig:
    """The same without launches of single points: that rows depend on each other is to be seen."""
    return replace(config, single_points=0)


class _Engine(Engine):
    """An engine with calibrations of its own; its progress bar counts calls after the first."""

    zeros_of_unused = False

    def __init__(
        self,
        model: Callable[..., Any],
        method: Method,
        calibrations: CalibrationCache,
        bar: Any = None,
        **of: Any,
    ) -> None:
        self._calibrations, self._bar = calibrations, bar
        config = _proving(configs.DEFAULT)
        of |= {"precision": FLOAT32.name, "hashes": False, "config": config}
        super().__init__(model, method, **of)

    def __call__(self, *args: Any, **kwargs: Any) -> EngineResult:
        # Captum leaves PyTorch's switches alone, by which convolutions use TF32.
        with tf32_as_set():
            return super().__call__(*args, **kwargs)

    def _caches(self) -> Calibrations:
        return {(): self._calibrations}

    def _progress(self, job: Job) -> Iterator[Progress]:
        for progress in run_alone(job):
            if self._bar is not None and self._bar.total:
                share = progress.done / max(1, progress.of)
                self._bar.update(int(share * (self._bar.total - 1)) + 1 - self._bar.n)
            yield progress


def explained(method: Method, call: AttributeCall) -> Inputs:
    """The maps of a method that takes gradients, shaped like the call's inputs."""
    with preserved(call.forward):
        if (result := _in_one_run(method, call)) is not None:
            return result
        further = forms.as_args(call.further)
        shapes = ((x.shape, x.dtype) for x in further if isinstance(x, Tensor))
        of_rows = calibrations_of(call.forward)
        of_batch = calibrations_of(call.forward, "batch", *shapes)
        try:
            if call.may_be_by_rows and not call.one_example and call.is_usual:
                maps = explained_by_rows(method, call, of_rows)
                result = None if maps is None else maps[0]
            if result is None:
                result = _as_one_example(method, call, of_batch)
        except ModelCallError as error:
            raise _as_captums(error, call) from error.__cause__
    if any(probe.cost.drew for probe in (*of_rows.values(), *of_batch.values())):
        # The engine puts random states back: the next call must not drop out the same.
        torch.rand_like(call.inputs[0], dtype=torch.float32)
    return result


def _as_captums(error: ModelCallError, call: AttributeCall) -> ModelCallError:
    """The error of the user's function, also an instance of the class that Captum lets through."""
    result = diagnosed(error, call.forward, call.inputs, forms.as_args(call.further), {})
    kind = as_well(type(result.__cause__))  # type: ignore[arg-type]
    return kind(str(result)).with_traceback(result.__traceback__)


def _in_one_run(method: Method, call: AttributeCall) -> Inputs | None:
    """Gradients in one run of the batch, where that takes less than planning; None elsewhere, or
    where anything is wrong, which the engine then reports.
    """
    recipe, inputs = method.recipe(), call.inputs
    assert isinstance(recipe, WeightedSum)
    rules = recipe.rules
    single = recipe.at_input and recipe.baseline == "none"
    single = single and call.is_usual and not (rules and rules.relevance)
    if not (single and call.owner is not None and is_small(call.owner, inputs)):
        return None
    executor = EagerExecutor(call.forward) if rules is None else RulesExecutor(call.forward, rules)
    on = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with suppress(Exception), on[0], on[1], on[2]:
        points = [x.detach().clone().requires_grad_() for x in inputs]
        # Copies: the model may work in place, and rules take leaves for weights.
        raw = executor([one.clone() for one in points], forms.as_args(call.further), {})
        scores = forms.selected(forms.read_output(raw), call.target)
        forms.need_one_number(scores)
        total = scores.sum()
        grads = gradients(total, points)
        if recipe.factor == "input":
            grads = tuple(one * x.detach() for one, x in zip(grads, points, strict=True))
        if math.isfinite(sum((one.sum() for one in grads), total.detach())):
            return tuple(one.abs() for one in grads) if recipe.reduction == "absolute" else grads
    return None


def is_small(owner: nn.Module, inputs: Inputs) -> bool:
    """Whether a module and its inputs are small; volumes, which PyTorch unfolds, never are."""
    kinds = (torch.float32, torch.float64)
    plain = all(x.dtype in kinds and x.device.type == "cpu" and x.dim() < 5 for x in inputs)
    if not plain or sum(x.nbytes for x in inputs) > SMALL_INPUTS:
        return False
    normed = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in owner.modules())
    size = sum(one.nbytes for one in owner.parameters())
    return size <= (SMALL_NORMED if normed else SMALL_MODULE)


def explained_by_rows(
    method: Method,
    call: AttributeCall,
    calibrations: CalibrationCache,
    bar: Any = None,
    restart: Callable[[], object] = lambda: None,
) -> ByRows | None:
    """The maps with rows as examples, and the values by feature; None where rows depend on each
    other or no form of the target works. `restart` is called before each further form.
    """
    with suppress(_RowsDependError):
        for target in engine_targets(call.target, len(call.inputs[0])):
            try:
                return _by_rows(method, call, target, calibrations, bar)
            except (ContractError, BudgetError, _RowsDependError):
                raise
            except Exception as error:
                if isinstance(error, ModelError) and not isinstance(error, ModelCallError):
                    raise
            restart()
    restart()
    return None


def _by_rows(
    method: Method, call: AttributeCall, target: Any, calibrations: CalibrationCache, bar: Any
) -> ByRows:
    inputs, most = call.inputs, call.points_per_launch
    if call.at_once > 1:
        most = call.at_once * len(inputs[0])
    # Inputs [B] are columns [B, 1] to the engine.
    flat = tuple(x.dim() == 1 for x in inputs)

    def wide(several: Any) -> Any:
        pairs = zip(several or (), flat, strict=False)
        deep = (x[..., None] if is_flat and isinstance(x, Tensor) else x for x, is_flat in pairs)
        return None if several is None else tuple(deep)

    rowwise, most = partial(_rowwise, call.forward, flat), None if most is None else max(1, most)
    engine = _Engine(rowwise, method, calibrations, bar, points_per_launch=most)
    more = {"forward_args": forms.as_args(call.further), "features": wide(call.features)}
    result = engine(wide(inputs), target, wide(call.baselines), **more)
    return _like(result.values, inputs), result.extras.get("features")


def _rowwise(forward: Callable[..., Any], flat: tuple[bool, ...], *args: Any) -> Tensor:
    count = len(flat)
    points = (x[:, 0] if one else x for x, one in zip(args[:count], flat, strict=True))
    result = forms.read_output(forward(*points, *args[count:]))
    if result.shape[:1] != args[0].shape[:1]:
        raise _RowsDependError
    return result


def engine_targets(target: Any, batch: int) -> Iterator[Any]:
    """A target in the engine's forms; as a function last, of which no launch is recorded."""
    if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1):
        if len(target) == batch:
            yield target
        return
    if isinstance(target, Tensor) and isinstance(target.item(), int):
        target = int(target.item())
    index = target if isinstance(target, tuple) else (target,)
    if target is None:
        yield None
    elif all(isinstance(one, int) and one >= 0 for one in index):
        yield int(target) if isinstance(target, int) else [target] * batch
    yield partial(_scores, target)


def _scores(target: Any, output: Tensor) -> Tensor:
    scores = forms.selected(output, target)
    forms.need_one_number(scores)
    return scores.reshape(-1)


def _as_one_example(method: Method, call: AttributeCall, calibrations: CalibrationCache) -> Inputs:
    """The maps with the batch as one example, whose points are batches."""
    inputs, seed, most = call.inputs, getattr(method, "seed", None), call.points_per_launch
    if isinstance(seed, tuple):
        method = replace(method, seed=seed[:1])  # type: ignore[type-var]
    baselines = None
    if call.baselines is not None:
        baselines = tuple(one[None] for one in forms.filled(inputs, call.baselines))
    limit = None if most is None else max(1, most // len(inputs[0]))
    model = partial(_summed_scores, call)
    engine = _Engine(model, method, calibrations, points_per_launch=limit, lean=False)
    return _like(engine(tuple(x[None] for x in inputs), None, baselines).values, inputs)


def _summed_scores(call: AttributeCall, *points: Tensor) -> Tensor:
    """Scores of points [R, B, *], summed over rows; of a score common to all, equal parts."""
    count = len(points[0])
    rows = tuple(x.flatten(0, 1) for x in points)
    target = forms.tiled(call.target, count)
    further = forms.arguments_of(call.further, forms.tiled, count)
    if call.is_usual:
        scores = forms.run_forward(call.forward, rows, target, further)
        forms.need_one_number(scores)
    else:
        scores = differentiable(
            rows[0],
            lambda *rows: (rows[0].new_zeros(()), _users_gradients(call, rows, target, further)),
            lambda grad, *kept: tuple(one * grad for one in kept),
            *rows[1:],
        )
    if scores.dim() and len(scores) % count == 0:
        return scores.reshape(count, -1).sum(1)
    return (scores.sum() / count).expand(count)


@torch.enable_grad()
def _users_gradients(call: AttributeCall, rows: Inputs, target: Any, further: Any) -> Inputs:
    leaves = tuple(x.detach().requires_grad_() for x in rows)
    result = call.gradient_func(call.forward, leaves, target, further or None)
    return tuple(one.detach() for one in result)


def _like(values: Tensor | Inputs, inputs: Inputs) -> Inputs:
    parts = values if isinstance(values, tuple) else (values,)
    return tuple(one.view(x.shape) for one, x in zip(parts, inputs, strict=True))


_CALIBRATIONS: WeakKeyDictionary[Any, Calibrations] = WeakKeyDictionary()


def _owner(forward: Callable[..., Any]) -> tuple[Any, tuple[object, ...]]:
    """What a function is, belongs to or reads (else the function), and a key for it and for where
    in it a call is: at layers, at a neuron, or all of it.
    """
    at: tuple[object, ...] = ()
    if isinstance(forward, Downstream):
        at = (type(forward), forward.of_input, *map(id, forward.layers), *forward.counts)
        forward = forward.model
    elif isinstance(forward, forms.Neuron):
        at = (forward.of_input, id(forward.layer), forward.selector)
        forward = forward.model
    while isinstance(forward, partial):
        forward = forward.func
    if isinstance(forward, MethodType):
        return forward.__self__, (forward.__name__, *at)
    if isinstance(forward, FunctionType) and (module := _module_read_by(forward)) is not None:
        # A lambda made anew for every call is the same by its code: before each use the engine
        # checks whether a recording holds for what else it reads.
        return module, (forward.__code__, *at)
    return forward, ("", *at)


def calibrations_of(forward: Callable[..., Any], *about: object) -> CalibrationCache:
    """The calibrations of a function, as long as it lives. about: "batch" and its shapes."""
    owner, key = _owner(forward)
    made = CalibrationCache()
    if not about:
        made.rows = _RowProofs()
    try:
        several = _CALIBRATIONS.setdefault(owner, {})
        # Shapes that are new in every call must not pile up.
        while len(several) >= MOST_CALIBRATIONS:
            several.pop(next(iter(several)), None)
        return several.setdefault((*about, *key), made)
    except TypeError:
        return made


def _module_read_by(function: FunctionType) -> nn.Module | None:
    """A module that a function closes over or reads by name."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            if isinstance(cell.cell_contents, nn.Module):
                return cell.cell_contents
    several = (function.__globals__.get(name) for name in function.__code__.co_names)
    return next((one for one in several if isinstance(one, nn.Module)), None)


def owner_of(forward: Callable[..., Any]) -> nn.Module | None:
    """The module that a function is, belongs to or reads."""
    owner, _ = _owner(forward)
    return owner if isinstance(owner, nn.Module) else None


def rows_depend(forward: Callable[..., Any]) -> bool:
    """Whether rows of a function, or of its part downstream of layers, have depended on others."""
    owner = owner_of(forward)
    several = {} if owner is None else _CALIBRATIONS.get(owner, {})
    return any(proof.reason for one in several.values() for proof in one.rows.values())


class Attribution:
    """An attribution method of a function of tensors, which is read anew in every call.

    `attribute` returns attributions of the inputs' shape: a tensor, or a tuple where `inputs` is
    one. Its arguments mean the same in all classes; `help` of the method lists them.

    Args:
        forward_func: (also `model`) a module or function that returns scores for its inputs.
        layer: the module of `forward_func` at which a layer class attributes; some take a list.
        device_ids: kept for code that reads it.
        multiply_by_inputs: False returns what inputs (or their difference from the baselines)
            would be multiplied by.

    Raises:
        ContractError: wrong arguments, with the leading words of Captum's AssertionError.
        ModelError: the function's output cannot be explained.
    """

    attribute: Callable[..., Any]
    compute_convergence_delta: Callable[..., Any]
    _multiply_by_inputs = False
    _has_delta = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class; where Captum is loaded, a child of Captum's too, for its `isinstance`."""
        return _beside_captums(type(self))

    def __reduce__(self) -> Any:
        return object.__new__, (type(self),), self.__dict__

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError; some perturbation classes return attributions as futures."""
        name = type(self).__name__
        raise NotImplementedError(f"attribute_future is not implemented for {name}")

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are multiplied by the inputs or their difference from baselines."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        return self._has_delta

    @classmethod
    def get_name(cls) -> str:
        """The class's name in words, as in "Integrated Gradients"."""
        return re.sub(r"(?<!^)([^a-z])", r" \1", cls.__name__)


_BESIDE: dict[type, type] = {}


def _beside_captums(kind: type) -> type:
    captums = sys.modules.get("captum.attr")
    # While it is imported, its names are not there yet.
    if captums is None or not hasattr(captums, "__all__"):
        return kind
    if kind not in _BESIDE:
        own = (one.__name__ for one in kind.__mro__ if one.__module__.startswith(__package__))
        theirs = [getattr(captums, name) for name in own if name in captums.__all__]
        _BESIDE[kind] = type(kind.__name__, (kind, *theirs[:1]), {"__module__": kind.__module__})
    return _BESIDE[kind]


class GradientAttribution(Attribution):
    """A method that takes gradients at the inputs.

    `gradient_func(forward_fn, inputs, target_ind, additional_forward_args)` may be assigned to an
    instance, and then takes the place of the model's gradients.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.gradient_func: Callable[..., tuple[Tensor, ...]] = forms.compute_gradients

    def _call(self, args: Any, **fields: Any) -> AttributeCall:
        """The call of `attribute` with these arguments; `fields` win over the arguments'."""
        further = vars(args)
        parts = fields.pop("inputs", None) or forms.as_tuple(args.inputs)
        if "baselines" in further:
            fields["baselines"] = forms.as_baselines(args.baselines, parts)
            forms.check_baselines(parts, fields["baselines"])
        return AttributeCall(
            *(self.forward_func, parts, further.get("target"), args.additional_forward_args),
            gradient_func=self.gradient_func,
            points_per_launch=further.get("internal_batch_size"),
            **fields,
        )

    def _result(self, args: Any, call: AttributeCall, maps: Inputs, result: Any = None) -> Any:
        """Maps like the inputs, or `result`, with the delta of the maps where it is wanted."""
        result = forms.like_inputs(args.inputs, maps) if result is None else result
        if not getattr(args, "return_convergence_delta", False):
            return result
        of = call.baselines, call.inputs, call.target, call.further
        return result, self.compute_convergence_delta(maps, *of)

    @forms.with_parameters(
        "attributions, start_point, end_point, target=None, additional_forward_args=None"
    )
    def compute_convergence_delta(self, args: Any) -> Tensor:
        """The sum of the attributions less F(end_point) - F(start_point), for each example [B]."""
        ends, maps = forms.as_tuple(args.end_point), forms.as_tuple(args.attributions)
        starts = forms.filled(ends, forms.as_baselines(args.start_point, ends))
        for one, end in zip(maps, ends, strict=False):
            if len(one) != len(end):
                raise ContractError(
                    "Attributions tensor and the end_point must match on the first dimension but "
                    f"found attribution: {len(one)} and end_point: {len(end)}"
                )
        forms.check_baselines(ends, starts)
        target = forms.as_target(args.target)
        forms.check_target(target, len(ends[0]))
        further = forms.as_args(args.additional_forward_args)
        with torch.no_grad(), preserved(self.forward_func):
            start = forms.run_forward(self.forward_func, forms.copies(starts), target, further)
            end = forms.run_forward(self.forward_func, forms.copies(ends), target, further)
            total = torch.stack([_row_sums(one) for one in maps]).sum(0)
            return total - (_row_sums(end) - _row_sums(start))


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)


class PerturbationAttribution(Attribution):
    """A method that changes inputs and compares what the function returns."""

    _multiply_by_inputs = True
    _perturbations_error = ""
    """What Captum says of a wrong perturbations_per_eval; "" where it does not check it."""

    def _call(self, args: Any, **fields: Any) -> AttributeCall:
        """The call of `attribute` with the arguments `args`, or with other fields."""
        parts, at_once = forms.as_tuple(args.inputs), args.perturbations_per_eval
        starts = forms.as_baselines(getattr(args, "baselines", None), parts)
        if self._perturbations_error and (not isinstance(at_once, int) or at_once < 1):
            words = self._perturbations_error
            raise ContractError(f"{words} Got {at_once!r}; pass perturbations_per_eval=1")
        own = {
            "baselines": starts,
            "features": forms.read_masks(getattr(args, "feature_mask", None), parts),
            "at_once": at_once,
            "progress": self.get_name() if args.show_progress else "",
        }
        of = forms.for_fill(parts, starts), args.target, args.additional_forward_args
        return AttributeCall(self.forward_func, *of, **(own | fields))


class InternalAttribution(Attribution):
    """A method at a layer of a model."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
    ) -> None:
        super().__init__(forward_func)
        self.layer, self.device_ids = layer, device_ids


class LayerAttribution(InternalAttribution):
    """A method whose attributions have the shapes of a layer's tensors."""

    @staticmethod
    def interpolate(
        layer_attribution: Tensor,
        interpolate_dims: int | tuple[int, ...],
        interpolate_mode: str = "nearest",
    ) -> Tensor:
        """Resizes attributions.

        Args:
            layer_attribution: [B, C, *spatial].
            interpolate_dims: the new spatial size.
            interpolate_mode: of `torch.nn.functional.interpolate`.

        Returns:
            Attributions [B, C, *interpolate_dims].

        Example:
            >>> LayerAttribution.interpolate(torch.ones(1, 1, 2, 2), (4, 4)).shape
            torch.Size([1, 1, 4, 4])
        """
        return functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


class NeuronAttribution(InternalAttribution):
    """A method whose attributions are of one neuron of a layer."""


class LayerGradientAttribution(LayerAttribution, GradientAttribution):
    """A method that takes gradients at a layer."""
