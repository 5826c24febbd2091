"""The adapter between Captum's classes and the engine: one call of `attribute`.

Every class turns its arguments into an `AttributeCall` and a method of the engine, and `explained`
returns the maps. A call at layers or of a neuron is the same with another function: the part of the
model downstream of the layers (`layers.py`), or the model up to the neuron (`forward.Neuron`).

Captum runs all rows at once and leaves the model in its mode. The engine gets a function around the
user's, so that no mode is switched, and launches rows in numbers of its own. Where rows are not
independent (batch norm in training mode, one number for a batch, inputs of several lengths, a
gradient function of the user's) the whole batch is one example, whose points hold all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.api import Engine
from saliency_fast.captum.arguments import (
    Baselines,
    arguments_of,
    as_args,
    as_target,
    filled,
    tiled,
)
from saliency_fast.captum.forward import (
    Neuron,
    compute_gradients,
    need_one_number,
    read_output,
    run_forward,
    selected,
)
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.independence import Independence
from saliency_fast.engine.loop import Job, Progress, run_alone
from saliency_fast.engine.recipe import Method, WeightedSum
from saliency_fast.errors import BudgetError, ContractError, ModelCallError, ModelError
from saliency_fast.graph.gradients import gradients
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
ByRows = tuple[Inputs, Tensor | None]
"""Maps like the inputs, and by feature [N, F] for methods that have them."""
MOST_KNOWN = 256
"""Measurements kept for a function: one for each of its layers, and for each shape of a batch."""


@dataclass(frozen=True)
class AttributeCall:
    """What a call of `attribute` asks of the engine, with arguments in one form.

    Args:
        forward: the function to explain.
        inputs: a tensor [B, *] for each of its inputs.
        target: see `forward.selected`.
        further: `additional_forward_args`.
        baselines: a number or tensor for each input, for methods that have one.
        gradient_func: the gradients to take; another than `compute_gradients` is the user's.
        points_per_launch: the most points that run at once; None leaves it to the engine.
        whole: whether the batch is one example in any case.
        features: feature masks that broadcast to their inputs, [1 | B, *].
        at_once: perturbed batches per call of the function.
        progress: the class whose progress bar is shown; "" for none.
    """

    forward: Callable[..., Any]
    inputs: Inputs
    target: Any = None
    further: Any = None
    baselines: Baselines | None = None
    gradient_func: Callable[..., Inputs] = compute_gradients
    points_per_launch: int | None = None
    whole: bool = False
    features: Inputs | None = None
    at_once: int = 1
    progress: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))

    @cached_property
    def owner(self) -> nn.Module | None:
        """The module whose function is explained, where one is found."""
        return owner_of(self.forward)

    @property
    def may_be_by_rows(self) -> bool:
        """Whether nothing is known that makes rows of the batch depend on each other."""
        same = len({x.shape[:1] for x in self.inputs}) == 1 and self.inputs[0].dim() > 0
        mixes = self.owner is not None and any(map(_mixes_rows, self.owner.modules()))
        return same and not mixes


class _RowsDependError(Exception):
    """Rows of a call depend on each other."""


class _ProvedRows(Independence):
    """What is known of rows, each an example unless rows are seen to depend on each other."""

    def meet(self, reason: str, *, vmapped: bool = False) -> None:
        self.reason, self.proved = reason, False
        raise _RowsDependError(reason)

    def due(self, rows: int, *, apart: bool) -> tuple[int, ...]:
        if self.reason:
            raise _RowsDependError(self.reason)
        return super().due(rows, apart=apart)


class _RowsKnown(dict[tuple[object, ...], Independence]):
    def setdefault(self, key: tuple[object, ...], default: Any = None) -> Independence:
        # Kept before `learn`, which may raise: other forms of the call read the reason.
        found = super().setdefault(key, _ProvedRows(None))
        found.learn(default.suspect)
        return found


class _Engine(Engine):
    """An engine that shares measurements with others of the same function.

    Args:
        known: the measurements.
        bar: a progress bar that counts calls, the first of which is over.
    """

    zeros_of_unused = False

    def __init__(
        self,
        model: Callable[..., Any],
        method: Method,
        known: CalibrationCache,
        bar: Any = None,
        **of: Any,
    ) -> None:
        super().__init__(model, method, hashes=False, **of)
        self._location.caches, self._bar = {(): known}, bar

    def _progress(self, job: Job) -> Iterator[Progress]:
        for progress in run_alone(job):
            if self._bar is not None and self._bar.total:
                share = progress.done / max(1, progress.of)
                self._bar.update(int(share * (self._bar.total - 1)) + 1 - self._bar.n)
            yield progress


def explained(method: Method, call: AttributeCall) -> Inputs:
    """The maps of a method that takes gradients, shaped like the call's inputs."""
    with preserved(call.forward):
        if (found := _in_one_run(method, call)) is not None:
            return found
        shapes = ((x.shape, x.dtype) for x in as_args(call.further) if isinstance(x, Tensor))
        known, whole = known_points(call.forward), known_points(call.forward, "whole", *shapes)
        try:
            if call.may_be_by_rows and not call.whole and _is_usual(call):
                maps = explained_by_rows(method, call, known)
                found = None if maps is None else maps[0]
            if found is None:
                found = _as_one_example(method, call, whole)
        except ModelCallError as error:
            raise _as_captums(error, call) from error.__cause__
    if any(probe.cost.drew for probe in (*known.values(), *whole.values())):
        # The engine puts random states back: the next call must not drop out the same.
        torch.rand_like(call.inputs[0], dtype=torch.float32)
    return found


def _is_usual(call: AttributeCall) -> bool:
    return call.gradient_func is compute_gradients


def _as_captums(error: ModelCallError, call: AttributeCall) -> ModelCallError:
    """The error of the user's function, also an instance of the class that Captum lets through."""
    found = diagnosed(error, call.forward, call.inputs, as_args(call.further), {})
    cause = found.__cause__
    if not isinstance(cause, Exception):
        return found
    return as_well(type(cause))(str(found)).with_traceback(found.__traceback__)


def _in_one_run(method: Method, call: AttributeCall) -> Inputs | None:
    """Gradients at the inputs in one run of the whole batch, for small modules at small inputs, for
    which planning costs more than it saves. None elsewhere, or where anything is wrong, which the
    engine then reports.
    """
    recipe, inputs = method.recipe(), call.inputs
    if not isinstance(recipe, WeightedSum):
        return None
    rules = recipe.rules
    single = recipe.at_input and recipe.baseline == "none"
    single = single and _is_usual(call) and not (rules and rules.relevance)
    if not (single and call.owner is not None and is_small(call.owner, inputs)):
        return None
    executor = EagerExecutor(call.forward) if rules is None else RulesExecutor(call.forward, rules)
    on = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with suppress(Exception), on[0], on[1], on[2]:
        points = [x.detach().clone().requires_grad_() for x in inputs]
        # Copies: the model may work in place, and rules take leaves for weights.
        raw = executor([one.clone() for one in points], as_args(call.further), {})
        scores = selected(read_output(raw), call.target)
        need_one_number(scores)
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
    left = SMALL_NORMED if normed else SMALL_MODULE
    for one in owner.parameters():
        left -= one.nbytes
        if left < 0:
            return False
    return True


def _mixes_rows(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return norm and (module.training or module.running_mean is None)


def explained_by_rows(
    method: Method,
    call: AttributeCall,
    known: CalibrationCache,
    bar: Any = None,
    again: Callable[[], object] = lambda: None,
) -> ByRows | None:
    """The maps with rows as examples, and the values by feature; None where rows depend on each
    other, or where another form of the call may be free of what is wrong: the engine has no form
    for some of Captum's targets, and a model may not take a single row. What is wrong otherwise
    shows again in the last form.

    Args:
        method: the method of the engine.
        call: its call.
        known: what is known of the function's points.
        bar: a progress bar.
        again: called before each further try.
    """
    with suppress(_RowsDependError):
        for target in engine_targets(call.target, len(call.inputs[0])):
            found = _tried(partial(_by_rows, method, call, target, known, bar))
            if found is not None:
                return found
            again()
    again()
    return None


def _tried(explain: Callable[[], ByRows]) -> ByRows | None:
    try:
        return explain()
    except (ContractError, BudgetError, _RowsDependError):
        raise
    except Exception as error:
        if isinstance(error, ModelError) and not isinstance(error, ModelCallError):
            raise
        return None


def _by_rows(
    method: Method, call: AttributeCall, target: Any, known: CalibrationCache, bar: Any
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

    engine = _Engine(
        partial(_rowwise, call.forward, flat),
        method,
        known,
        bar,
        points_per_launch=None if most is None else max(1, most),
    )
    more = {"forward_args": as_args(call.further), "features": wide(call.features)}
    found = engine(wide(inputs), target, wide(call.baselines), **more)
    return _like(found.values, inputs), found.extras.get("features")


def _rowwise(forward: Callable[..., Any], flat: tuple[bool, ...], *given: Any) -> Tensor:
    """The user's function on the rows of a launch."""
    count = len(flat)
    points = (x[:, 0] if one else x for x, one in zip(given[:count], flat, strict=True))
    found = read_output(forward(*points, *given[count:]))
    if found.shape[:1] != given[0].shape[:1]:
        raise _RowsDependError
    return found


def engine_targets(target: Any, batch: int) -> Iterator[Any]:
    """A target in the engine's forms: as numbers, then as a function, which serves all of Captum's
    targets, but no recorded launches.
    """
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
    scores = selected(output, target)
    need_one_number(scores)
    return scores.reshape(-1)


def _as_one_example(method: Method, call: AttributeCall, known: CalibrationCache) -> Inputs:
    """The maps with the batch as one example, whose points are batches."""
    inputs, seed, most = call.inputs, getattr(method, "seed", None), call.points_per_launch
    if isinstance(seed, tuple):
        method = replace(method, seed=seed[:1])  # type: ignore[type-var]
    baselines = None
    if call.baselines is not None:
        baselines = tuple(one[None] for one in filled(inputs, call.baselines))
    limit = None if most is None else max(1, most // len(inputs[0]))
    model = partial(_summed_scores, call)
    engine = _Engine(model, method, known, points_per_launch=limit, lean=False)
    return _like(engine(tuple(x[None] for x in inputs), None, baselines).values, inputs)


def _summed_scores(call: AttributeCall, *points: Tensor) -> Tensor:
    """The scores of points [R, B, *], each the sum over its rows; of a score that all points have
    in common, equal parts.
    """
    count = len(points[0])
    rows = tuple(x.flatten(0, 1) for x in points)
    target, further = tiled(call.target, count), arguments_of(call.further, tiled, count)
    if _is_usual(call):
        scores = run_forward(call.forward, rows, target, further)
        need_one_number(scores)
    else:
        scores = _UsersGradients.apply(call, target, further, *rows)  # type: ignore[no-untyped-call]
    if scores.dim() and len(scores) % count == 0:
        return scores.reshape(count, -1).sum(1)
    return (scores.sum() / count).expand(count)


class _UsersGradients(torch.autograd.Function):
    """A score whose gradients a function of the user's returns."""

    @staticmethod
    def forward(ctx: Any, call: AttributeCall, target: Any, further: Any, *rows: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in rows)
            found = call.gradient_func(call.forward, leaves, target, further or None)
        ctx.save_for_backward(*(one.detach() for one in found))
        return rows[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> Any:
        return None, None, None, *(one * cotangent[0] for one in ctx.saved_tensors)


def _like(values: Tensor | Inputs, inputs: Inputs) -> Inputs:
    parts = values if isinstance(values, tuple) else (values,)
    return tuple(one.view(x.shape) for one, x in zip(parts, inputs, strict=True))


_KNOWN: WeakKeyDictionary[Any, dict[tuple[object, ...], CalibrationCache]] = WeakKeyDictionary()


def _unwrapped(forward: Callable[..., Any]) -> tuple[Any, tuple[object, ...]]:
    """The user's own function, and where in it a call is: at layers, at a neuron, or ()."""
    at: tuple[object, ...] = ()
    if isinstance(forward, Downstream):
        at = (type(forward), forward.of_input, *map(id, forward.layers), *forward.counts)
        forward = forward.model
    elif isinstance(forward, Neuron):
        at = (forward.of_input, id(forward.layer), forward.selector)
        forward = forward.model
    while isinstance(forward, partial):
        forward = forward.func
    return forward, at


def known_points(forward: Callable[..., Any], *about: object) -> CalibrationCache:
    """What the engine has measured of a function's points, for as long as the function lives.

    Args:
        forward: the function, the part of it downstream of layers, or a neuron of it.
        *about: "whole" and shapes, for points that hold the whole batch.
    """
    name: object = ""
    owner: Any
    owner, at = _unwrapped(forward)
    if isinstance(owner, MethodType):
        owner, name = owner.__self__, owner.__name__
    elif isinstance(owner, FunctionType) and (module := _module_read_by(owner)) is not None:
        # A lambda made anew for every call is the same by its code: before each use the engine
        # checks whether a recording holds for what else it reads.
        owner, name = module, owner.__code__
    made = CalibrationCache()
    if not about:
        made.rows = _RowsKnown()
    try:
        several = _KNOWN.setdefault(owner, {})
        # Shapes that are new in every call must not pile up.
        while len(several) >= MOST_KNOWN:
            several.pop(next(iter(several)), None)
        return several.setdefault((name, *about, *at), made)
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
    owner, _ = _unwrapped(forward)
    owner = owner.__self__ if isinstance(owner, MethodType) else owner
    if isinstance(owner, FunctionType):
        return _module_read_by(owner)
    return owner if isinstance(owner, nn.Module) else None


def rows_depend(forward: Callable[..., Any]) -> bool:
    """Whether the engine has seen rows of a function depend on each other, also downstream of its
    layers.
    """
    owner = owner_of(forward)
    several = {} if owner is None else _KNOWN.get(owner, {})
    return any(one.reason for known in several.values() for one in known.rows.values())
