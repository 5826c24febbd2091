"""Run: a facade's call on the engine.

Captum runs all rows at once and leaves the model's mode as it is. The engine is handed a function
around the user's, so that nothing is switched, and rows in whatever launches suit. Where rows are
not each their own (batch norm in training mode, one number for a whole batch, inputs of several
lengths, a gradient function of the user's), the whole batch is one example: its points hold all
rows, as Captum's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.api import Engine
from saliency_fast.captum.contract import Baselines, as_args, as_target, filled
from saliency_fast.captum.forward import (
    Neuron,
    compute_gradients,
    need_one_number,
    read_output,
    run_forward,
    selected,
)
from saliency_fast.engine.independence import TOLERANCE, CalibrationCache, Independence
from saliency_fast.engine.loop import Job, Progress, run_alone
from saliency_fast.engine.recipe import Method, Recipe, WeightedSum
from saliency_fast.errors import BudgetError, ContractError, ModelCallError, ModelError
from saliency_fast.graph.gradients import gradients
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.failures import as_well, diagnosed
from saliency_fast.model.layers import Downstream
from saliency_fast.model.state import preserved
from saliency_fast.rules.intercept import RulesExecutor

PLAIN = (torch.float32, torch.float64)
SMALL = 16 * 1024
"""Bytes of inputs up to which gradients there take one plain run of the batch."""
SMALL_MODULE = 64 * 1024**2
"""Bytes of weights up to which they do."""
SMALL_NORMED = 2 * 1024**2
"""Bytes of weights up to which they do in modules with batch norms."""


@dataclass(frozen=True)
class Asked:
    """What a call asks of the engine. gradient_func: an instance's own; whole: the batch is one
    example in any case.
    """

    forward: Callable[..., Any]
    inputs: Inputs
    target: Any = None
    further: Any = None
    baselines: Baselines | None = None
    gradient_func: Callable[..., Inputs] = compute_gradients
    points_per_launch: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))


Found = TypeVar("Found")


class _NotByRowsError(Exception):
    """Rows of a call are not each their own."""


@dataclass
class _Apart(Independence):
    """What is known of rows that are each an example, unless they are seen to meet. sizes: of
    launches that were proved; a function may branch on the number of rows, and calls ask for
    launches of other sizes.
    """

    sizes: set[int] = field(default_factory=set)

    def meet(self, reason: str, *, vmapped: bool = False) -> None:
        self.reason, self.proved = reason, False
        raise _NotByRowsError(reason)

    def due(self, rows: int, *, apart: bool) -> tuple[int, ...]:
        if self.reason:
            raise _NotByRowsError(self.reason)
        due = super().due(rows, apart=apart)
        if rows in self.sizes or rows < 2:
            return due
        self.sizes.add(rows)
        return due or ((rows - 1) // 2,)


class _Rows(dict[tuple[object, ...], Independence]):
    def setdefault(self, key: tuple[object, ...], default: Any = None) -> Independence:
        # Kept before it learns what raises: other forms of the call read it.
        found = super().setdefault(key, _Apart(None))
        found.learn(default.suspect)
        return found


def _known_rows() -> CalibrationCache:
    """A new one for a function whose rows are examples."""
    known = CalibrationCache()
    known.rows = _Rows()
    return known


class _Engine(Engine):
    """An engine that shares what points took with others of the same user's function. bar: shows
    its moments; of calls, the first of which is over.
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
        for moment in run_alone(job):
            if self._bar is not None and self._bar.total:
                share = moment.done / max(1, moment.of)
                self._bar.update(int(share * (self._bar.total - 1)) + 1 - self._bar.n)
            yield moment


def explained(method: Method, asked: Asked) -> Inputs:
    """The maps of a method, like the inputs."""
    owner, known, alone = _owner(asked.forward), _known(asked.forward), _known_whole(asked)
    with preserved(asked.forward):
        try:
            found = _explained(method, asked, owner, known, alone)
        except ModelCallError as error:
            raise _as_captums(error, asked) from error.__cause__
    if any(probe.cost.drew for probe in (*known.values(), *alone.values())):
        # The engine puts random states back: the next call must not drop out the same.
        torch.rand_like(asked.inputs[0], dtype=torch.float32)
    return found


def _explained(
    method: Method,
    asked: Asked,
    owner: nn.Module | None,
    known: CalibrationCache,
    alone: CalibrationCache,
) -> Inputs:
    if (found := _at_once(method.recipe(), asked, owner)) is not None:
        return found
    if not _is_by_rows(asked, owner):
        return _as_one(method, asked, alone)
    with suppress(_NotByRowsError):
        for target in _targets(asked.target, len(asked.inputs[0])):
            if (found := _tried(partial(_by_rows, method, asked, target, known))) is not None:
                return found
    return _as_one(method, asked, alone)


def _tried(call: Callable[[], Found]) -> Found | None:
    """None where something is wrong that another form of the call may be free of: the engine's
    targets are not all that Captum allows, and one row alone may not be what a model takes. What
    is wrong otherwise shows again, in the last form.
    """
    try:
        return call()
    except ModelCallError:
        return None
    except (ContractError, ModelError, BudgetError, _NotByRowsError):
        raise
    except Exception:
        return None


def _as_captums(error: ModelCallError, asked: Asked) -> ModelCallError:
    """What the user's function raised, also of the class that Captum lets through."""
    args, cause = as_args(asked.further), error.__cause__
    found = diagnosed(error, asked.forward, asked.inputs, args, {})
    cause = found.__cause__
    if not isinstance(cause, Exception):
        return found
    return as_well(type(cause))(str(found)).with_traceback(found.__traceback__)


def _at_once(recipe: Recipe, asked: Asked, owner: nn.Module | None) -> Inputs | None:
    """Gradients at the inputs in one run of the whole batch, where all that an engine takes care of
    costs more than it spares: of small modules at small inputs. None elsewhere, or where anything
    is wrong, which then shows again.
    """
    rules, inputs = recipe.rules, asked.inputs
    single = recipe.at_input and recipe.baseline == "none"
    usual = asked.gradient_func is compute_gradients and not (rules and rules.relevance)
    if not isinstance(recipe, WeightedSum):
        return None
    if not (single and usual and owner is not None and _is_small(owner, inputs)):
        return None
    route = EagerExecutor(asked.forward) if rules is None else RulesExecutor(asked.forward, rules)
    on = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with suppress(Exception), on[0], on[1], on[2]:
        points = [x.detach().clone().requires_grad_() for x in inputs]
        # Copies: the model may work in place, and rules take leaves for weights.
        raw = route([one.clone() for one in points], as_args(asked.further), {})
        scores = selected(read_output(raw), asked.target)
        need_one_number(scores)
        total = scores.sum()
        grads = gradients(total, points)
        if recipe.factor == "input":
            grads = tuple(one * x.detach() for one, x in zip(grads, points, strict=True))
        if math.isfinite(sum((one.sum() for one in grads), total.detach())):
            return tuple(one.abs() for one in grads) if recipe.reduction == "absolute" else grads
    return None


def _is_small(owner: nn.Module, inputs: Inputs) -> bool:
    """Whether a module and its inputs are so small; volumes, which PyTorch unfolds, never are."""
    plain = all(x.dtype in PLAIN and x.device.type == "cpu" and x.dim() < 5 for x in inputs)
    if not plain or sum(x.nbytes for x in inputs) > SMALL:
        return False
    # Without norms there is nothing to fold, which is what pays at small inputs.
    normed = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in owner.modules())
    left = SMALL_NORMED if normed else SMALL_MODULE
    for one in owner.parameters():
        left -= one.nbytes
        if left < 0:
            return False
    return True


def _is_by_rows(asked: Asked, owner: nn.Module | None) -> bool:
    mixes = owner is not None and any(map(_mixes_rows, owner.modules()))
    alike = len({x.shape[:1] for x in asked.inputs}) == 1 and asked.inputs[0].dim() > 0
    return alike and not (mixes or asked.whole) and asked.gradient_func is compute_gradients


def _mixes_rows(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return norm and (module.training or module.running_mean is None)


def _by_rows(method: Method, asked: Asked, target: Any, known: CalibrationCache) -> Inputs:
    inputs = asked.inputs
    flat = tuple(x.dim() == 1 for x in inputs)
    baselines = asked.baselines
    if baselines is not None:
        baselines = tuple(map(_deep, baselines, flat))
    model = partial(_rowwise, asked.forward, flat)
    engine = _Engine(model, method, known, points_per_launch=_points(asked))
    deep = tuple(x[:, None] if one else x for x, one in zip(inputs, flat, strict=True))
    found = engine(deep, target, baselines, forward_args=as_args(asked.further))
    return _like(found.values, inputs)


def _deep(baseline: Any, flat: bool) -> Any:
    return baseline[:, None] if flat and isinstance(baseline, Tensor) else baseline


def _rowwise(forward: Callable[..., Any], flat: tuple[bool, ...], *given: Any) -> Tensor:
    """The user's function on the rows of a launch; inputs [B] are columns to the engine."""
    count = len(flat)
    points = (x[:, 0] if one else x for x, one in zip(given[:count], flat, strict=True))
    found = read_output(forward(*points, *given[count:]))
    if found.shape[:1] != given[0].shape[:1]:
        raise _NotByRowsError
    return found


def _targets(target: Any, batch: int) -> Iterator[Any]:
    """A target as the engine takes it: by numbers, then by a function, which allows all forms but
    serves no recorded launches.
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


def _points(asked: Asked) -> int | None:
    return None if asked.points_per_launch is None else max(1, asked.points_per_launch)


def _as_one(method: Method, asked: Asked, known: CalibrationCache) -> Inputs:
    """The batch as one example, whose points are batches."""
    inputs, seed = asked.inputs, getattr(method, "seed", None)
    if isinstance(seed, tuple):
        method = replace(method, seed=seed[:1])  # type: ignore[type-var]
    most, baselines = _points(asked), None
    if asked.baselines is not None:
        baselines = tuple(one[None] for one in filled(inputs, asked.baselines))
    model = partial(_whole, asked)
    limit = None if most is None else max(1, most // len(inputs[0]))
    engine = _Engine(model, method, known, points_per_launch=limit, lean=False)
    found = engine(tuple(x[None] for x in inputs), None, baselines)
    return _like(found.values, inputs)


def _whole(asked: Asked, *points: Tensor) -> Tensor:
    """Scores of points [R, B, *]: sums over their rows; of what all have in common, shares."""
    count = len(points[0])
    rows = tuple(x.flatten(0, 1) for x in points)
    target, further = _repeated(asked.target, count), as_args(asked.further)
    further = tuple(_repeated(one, count) if isinstance(one, Tensor) else one for one in further)
    if asked.gradient_func is compute_gradients:
        scores = run_forward(asked.forward, rows, target, further)
        need_one_number(scores)
    else:
        scores = _Given.apply(asked, target, further, *rows)  # type: ignore[no-untyped-call]
    if scores.dim() and len(scores) % count == 0:
        return scores.reshape(count, -1).sum(1)
    return (scores.sum() / count).expand(count)


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, list):
        return value * count
    many = isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1
    return torch.cat([value] * count) if many else value


class _Given(torch.autograd.Function):
    """A score whose gradients a function of the user's gives."""

    @staticmethod
    def forward(ctx: Any, asked: Asked, target: Any, further: Any, *rows: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in rows)
            found = asked.gradient_func(asked.forward, leaves, target, further or None)
        ctx.save_for_backward(*(one.detach() for one in found))
        return rows[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> Any:
        return None, None, None, *(one * cotangent[0] for one in ctx.saved_tensors)


def _like(values: Tensor | Inputs, inputs: Inputs) -> Inputs:
    parts = values if isinstance(values, tuple) else (values,)
    return tuple(one.view(x.shape) for one, x in zip(parts, inputs, strict=True))


MOST_KNOWN = 256
"""Layers of a function, and shapes of whole batches with arguments, of which something is known."""
_KNOWN: WeakKeyDictionary[Any, dict[tuple[object, ...], CalibrationCache]] = WeakKeyDictionary()


def _known_whole(asked: Any) -> CalibrationCache:
    """What points took that hold the whole batch, with arguments of these shapes."""
    further = [one for one in as_args(asked.further) if isinstance(one, Tensor)]
    return _known(asked.forward, "whole", *((one.shape, one.dtype) for one in further))


def _known(forward: Callable[..., Any], *at: object) -> CalibrationCache:
    """What points of a user's function took, at its inputs or behind layers of it, for as long as
    it lives.
    """
    if isinstance(forward, Downstream):
        kind = type(forward)
        at = (*at, kind, forward.of_input, *map(id, forward.layers), *forward.counts)
        forward = forward.model
    elif isinstance(forward, Neuron):
        at = (*at, forward.of_input, id(forward.layer), forward.selector)
        forward = forward.model
    while isinstance(forward, partial):
        forward = forward.func
    owner: Any = forward
    name: object = ""
    if isinstance(forward, MethodType):
        owner, name = forward.__self__, forward.__name__
    elif isinstance(forward, FunctionType) and (module := _read_by(forward)) is not None:
        # Made anew for every call, as lambdas are, it is the same by its code: whether a recording
        # holds for what else it reads is asked before each use.
        owner, name = module, forward.__code__
    try:
        several = _KNOWN.setdefault(owner, {})
        # Shapes that are new in every call must not pile up.
        while len(several) >= MOST_KNOWN:
            several.pop(next(iter(several)), None)
        made = CalibrationCache() if at[:1] == ("whole",) else _known_rows()
        return several.setdefault((name, *at), made)
    except TypeError:
        return CalibrationCache() if at[:1] == ("whole",) else _known_rows()


def _read_by(function: FunctionType) -> nn.Module | None:
    """A module that a function closes over or reads by name."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            if isinstance(cell.cell_contents, nn.Module):
                return cell.cell_contents
    several = (function.__globals__.get(name) for name in function.__code__.co_names)
    return next((one for one in several if isinstance(one, nn.Module)), None)


def _owner(forward: Callable[..., Any]) -> nn.Module | None:
    if isinstance(forward, (Downstream, Neuron)):
        forward = forward.model
    while isinstance(forward, partial):
        forward = forward.func
    owner: Any = forward.__self__ if isinstance(forward, MethodType) else forward
    if isinstance(owner, FunctionType):
        return _read_by(owner)
    return owner if isinstance(owner, nn.Module) else None


def seen_to_meet(forward: Callable[..., Any]) -> bool:
    """Whether the engine has seen rows meet in a function, or behind layers of it."""
    owner = _owner(forward)
    several = {} if owner is None else _KNOWN.get(owner, {})
    return any(one.reason for known in several.values() for one in known.rows.values())


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers are the same but for the rounding of a batch of another size."""
    if not expected.numel():
        return True
    room = TOLERANCE.get(expected.dtype, 0.0) * float(expected.abs().amax())
    return float((found.double() - expected.double()).abs().amax()) <= room
