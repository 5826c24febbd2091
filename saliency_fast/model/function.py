"""The model as a function from points to scores and their first or second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from saliency_fast._torch_compat import ErrorText
from saliency_fast._types import Args, Function, Inputs, Kwargs
from saliency_fast.errors import ModelCallError, ModelError, UnseenInputError
from saliency_fast.graph.gradients import gradients, gradients_of_sums
from saliency_fast.graph.intercept import Calls
from saliency_fast.graph.outputs import map_tensors, rows_of
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.half import FLOAT32, Precision, arithmetic
from saliency_fast.graph.program import in_layout, tensors_among
from saliency_fast.model.attention import probabilities
from saliency_fast.model.executors import Executor
from saliency_fast.model.failures import BACKWARD, FORWARD, Failing
from saliency_fast.model.layers import Taps
from saliency_fast.model.targets import Targets, read_of, tolerance

Made = TypeVar("Made")
ScoresAndGradients = tuple[Tensor, Tensor | None, list[Inputs]]
"""Scores [R, K], classes [R, K], and for each of K targets the gradients of the points."""
Project = Callable[[Inputs, Tensor], Tensor]
"""From gradients per input [R, *] of the examples int64 [R] to M numbers [R, M], linear in them."""
CUTS = "detach(), no_grad(), .item(), NumPy or integer steps, and quantised layers (no gradient)"
OF_LAYERS = "Of layers (at=), name one that the score is made from, no auxiliary head"
NO_GRADIENT = (
    "the model is not differentiable in its input: its output carries no gradient; look for "
    f"{CUTS} inside it, or take a method that asks for scores alone, such as sf.Occlusion. "
    f"{OF_LAYERS}"
)


COPIED = 64 * 1024
"""Bytes of points up to which a copy takes less time than a function of autograd's in Python."""


class _Enter(torch.autograd.Function):
    """Makes plain points differentiable without a copy, so that a model may work in place."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(points)
        return points

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


def differentiable_points(points: Inputs) -> tuple[list[Tensor], list[GradientEdge]]:
    """Differentiable points for the model, and the edges of autograd's graph of their gradients."""
    if sum(one.nbytes for one in points) <= COPIED:
        leaves = [one.detach().requires_grad_() for one in points]
        return [one.clone() for one in leaves], [get_gradient_edge(one) for one in leaves]
    anchor = torch.zeros((), requires_grad=True, device="cpu")
    # Detached: work in place on a view would be its base's, too, and its gradient lost.
    detached = [one.detach() for one in points]
    inside = [_Enter.apply(one, anchor) for one in detached]  # type: ignore[no-untyped-call]
    return inside, [get_gradient_edge(one) for one in inside]


def _times_itself(output: Tensor) -> Tensor:
    """An output whose gradient arrives multiplied with the output, as relevance starts."""
    relevant, value = output.view_as(output), output.detach()
    if output.requires_grad:
        relevant.register_hook(lambda grad: value * grad)  # type: ignore[no-untyped-call]
    return relevant


@dataclass
class PointFunction:
    """The model, by one executor, with its further arguments and targets, on a launch's rows.

    Further arguments that are tensors with the batch's length on their first axis belong to the
    examples and follow them into the rows, but for `shared_arguments`.

    Attributes:
        executor: Of the model, or of what is downstream of the `prefix`.
        args, kwargs: Further arguments of the model.
        prefix: The affine beginning of the model, at whose end gradients are taken.
        at_prefix_end: Whether points are values at the end of the prefix already.
        scale: Factor of the cotangent, and of gradients with it, where half types underflow; a
            number, or one per row.
        dtypes: What the model takes, where points are written in other dtypes.
        kind: Equal for functions that take points through the model in the same way.
        shape: Of an example's output, after the first run.
        references: Rows [B | 1, *] that go through the model behind the points, one for each.
        relevance: Whether gradients of outputs are multiplied with the outputs.
        shared_arguments: Numbers and names of further arguments that belong to no example.
        unused: Inputs that no score depends on, whose gradients are 0.
        single_row: The function of a single row, where that is another one.
        overwrites: Whether the model overwrites saved tensors, so that copies are saved.
        channels_last: Which inputs, and so their points, have that memory format.
    """

    executor: Executor
    targets: Targets
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    prefix: Prefix | None = None
    at_prefix_end: bool = False
    precision: Precision = FLOAT32
    scale: float = 1.0
    dtypes: tuple[torch.dtype, ...] | None = None
    kind: tuple[object, ...] = ()
    shape: torch.Size | None = None
    references: Inputs | None = None
    relevance: bool = False
    shared_arguments: frozenset[int | str] = frozenset()
    unused: frozenset[int] = frozenset()
    single_row: PointFunction | None = None
    overwrites: bool = False
    channels_last: tuple[bool, ...] = ()
    _checked: bool = False
    _squeezes: bool | None = None

    def scores(self, points: Inputs, example: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] without gradients, and the classes [R, K] they belong to."""
        with torch.no_grad(), arithmetic(self.precision, example.device):
            return self.forward(self.as_model_inputs(points), example)

    def scores_and_magnitude(self, points: Inputs, example: Tensor) -> tuple[Tensor, float]:
        """Scores [R, K] without gradients, and the outputs' largest magnitude."""
        with torch.no_grad(), arithmetic(self.precision, example.device):
            raw = self._run(self.as_model_inputs(self._behind_prefix(points, example)), example)
            scores, _ = self.read(raw, example)
            output = read_of(raw)
            outputs = [scores] if output is None else [scores, output]
            finite = [one.detach().float().nan_to_num(0.0, 0.0, 0.0) for one in outputs]
            return scores, max(float(one.abs().max()) for one in finite if one.numel())

    def gradients(self, points: Inputs, example: Tensor) -> ScoresAndGradients:
        """Scores [R, K], classes [R, K], and for each of K targets the gradients of the points.

        One forward pass serves all targets; each has its own backward pass. The points are handed
        over: the model may overwrite them.
        """
        with arithmetic(self.precision, example.device):
            if not self.overwrites:
                return self._gradients(points, example)
            # PyTorch's allow_mutation_on_saved_tensors misses writes to views behind an offset.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda one: one):
                return self._gradients(points, example)

    def _gradients(self, points: Inputs, example: Tensor) -> ScoresAndGradients:
        points = self.as_model_inputs(self._behind_prefix(points, example))
        likes, (inside, edges) = _like(points), differentiable_points(points)
        del points
        scores, classes = self.forward(inside, example)
        inside.clear()
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        scale: Any = self.scale
        scaled = isinstance(scale, Tensor) or scale != 1.0
        cotangents = scores * scale if scaled else scores
        with self.failing(BACKWARD, example):
            several = gradients_of_sums(cotangents.unbind(1), edges)
        if self.prefix is None:
            _check_seen(several, self.unused, example)
        filled: list[Any] = [_filled(grads, likes) for grads in several]
        if self.prefix is not None:
            filled = [self.prefix.in_memory_order(one) for one in filled]
        return scores.detach(), classes, [tuple(g.contiguous() for g in one) for one in filled]

    def _behind_prefix(self, points: Inputs, example: Tensor) -> Inputs:
        """Points as launches write them where the executor takes them."""
        if self.prefix is None:
            return points
        if not self.at_prefix_end:
            points = self.prefix.forward(points, tensors_among(*self.rows(example)))
        return self.prefix.as_rest_inputs(points)

    def forward(self, points: Sequence[Tensor], example: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] and classes [R, K] as autograd sees them."""
        raw = self._run(points, example)
        return self.read(map_tensors(_times_itself, raw) if self.relevance else raw, example)

    def _run(self, points: Sequence[Tensor], example: Tensor) -> Any:
        """What the model returns for points where the executor takes them."""
        if self.references is None:
            return self.called(lambda: self.executor(points, *self.rows(example)), points, example)
        pairs = zip(points, self.as_model_inputs(self.references), strict=True)
        both = [torch.cat([one, rows[example % len(rows)]]) for one, rows in pairs]
        with self.failing(FORWARD, example):
            raw = self.executor(both, *self.rows(torch.cat([example, example])))
        return rows_of(raw, slice(len(example)), 2 * len(example))

    def with_saved_copies(self, call: Callable[[], Made]) -> Made:
        """The result of `call`; called again, with copies of saved tensors, if these are lost."""
        try:
            return call()
        except ModelCallError as error:
            if self.overwrites or not ErrorText.OVERWRITTEN.of(error):
                raise
        self.overwrites = True
        return call()

    def failing(self, stage: str, example: Tensor) -> Failing:
        """Inside, exceptions of the model on rows of examples `example` [R] become ModelError."""
        return Failing(stage, example.numel(), self.targets.batch)

    def called(self, call: Callable[[], Any], points: Sequence[Tensor], example: Tensor) -> Any:
        """The output of `call`, with the batch axis that a squeeze() removes from a single row."""
        one = example.numel() == 1 and self._squeezes is not False
        # Before the model may overwrite them, and once.
        spare = [x.detach().clone() for x in points] if one and self._squeezes is None else []
        with self.failing(FORWARD, example):
            raw = call()
        if spare:
            self._squeezes = self._loses_axis(raw, spare, example)
        return raw[None] if one and self._squeezes else raw

    def _loses_axis(self, raw: Any, points: list[Tensor], example: Tensor) -> bool:
        """Whether a row's output has no batch axis, and that of the row given twice has."""
        if not isinstance(raw, Tensor) or raw.shape[:1] == (1,):
            return False
        twice = [torch.cat([x, x]) for x in points]
        with suppress(Exception), torch.no_grad():
            two = self.executor(twice, *self.rows(torch.cat([example, example])))
            if not isinstance(two, Tensor) or two.shape != (2, *raw.shape):
                return False
            close = tolerance(raw.dtype)
            both = raw.expand_as(two)
            return raw.is_meta or torch.allclose(two, both, close, close, equal_nan=True)
        return False

    def read(self, raw: Any, example: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] and classes [R, K] of the model's output."""
        if not self._checked:
            self.shape, self._checked = self.targets.check(raw, example), True
        return self.targets.read(raw, example)

    def as_model_inputs(self, points: Inputs) -> Inputs:
        """The points in the types and the memory order of the model's inputs."""
        if self.dtypes is not None:
            points = tuple(one.to(dtype) for one, dtype in zip(points, self.dtypes, strict=True))
        if self.prefix is not None or not any(self.channels_last):
            return points
        return in_layout(points, self.channels_last)

    def rows(self, example: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of the rows of examples `example` [R]."""
        if not (self.args or self.kwargs):
            return (), {}
        further = dict(enumerate(self.args)) | dict(self.kwargs)
        own = {key: x[example] if self.follows(key, x) else x for key, x in further.items()}
        return tuple(own[n] for n in range(len(self.args))), {n: own[n] for n in self.kwargs}

    def follows(self, key: int | str, value: Any) -> bool:
        """Whether the further argument of that number or name belongs to the examples."""
        long = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.targets.batch
        return long and key not in self.shared_arguments


@dataclass
class TappedFunction(PointFunction):
    """A point function of the tensors at `taps` and, with `backward`, of their gradients."""

    taps: Taps | None = None
    backward: bool = True

    @classmethod
    def of(cls, function: PointFunction, taps: Taps, *, backward: bool = True) -> TappedFunction:
        """`function` with taps."""
        return cls(**vars(function), taps=taps, backward=backward)

    def _gradients(self, points: Inputs, example: Tensor) -> ScoresAndGradients:
        taps, given, tapped = self.taps, list(self.as_model_inputs(points)), list[Tensor]()
        assert taps is not None

        def one_row(rows: Inputs) -> Any:
            with self.failing(FORWARD, example[:1]):
                return self.executor(list(rows), *self.rows(example[:1]))

        def call() -> Any:
            raw, tensors = taps.run(partial(self.executor, given, *self.rows(example)))
            tapped.extend(tensors)
            return raw

        taps.prepare(one_row, tuple(one[:1] for one in given))
        with torch.set_grad_enabled(self.backward):
            scores, classes = self.read(self.called(call, given, example), example)
        if not self.backward:
            return scores, classes, [tuple(one.detach() for one in tapped)]
        several: list[tuple[Tensor | None, ...]] = [(None,) * len(tapped)] * scores.shape[1]
        if scores.requires_grad:
            with self.failing(BACKWARD, example):
                several = gradients_of_sums(scores.unbind(1), tapped)
        taps.check_reached(
            [any(one is not None for one in own) for own in zip(*several, strict=True)]
        )
        values = tuple(one.detach() for one in tapped)
        return scores.detach(), classes, [values, *(_filled(one, _like(tapped)) for one in several)]


@dataclass
class Directional(PointFunction):
    """A point function of second derivatives.

    For each of K targets it has, in the place of gradients, (p(g), p(H p'), the gradient g per
    input, the sum of H p' over its columns per input) with the linear map `project` p, its
    transpose p' and the Hessian H: [R, M], [R, M, M], [R, *].
    """

    project: Project | None = None

    @classmethod
    def of(cls, function: PointFunction, project: Project) -> Directional:
        """`function`, whose executor must leave all calls to autograd."""
        return cls(**vars(function), project=project)

    def _gradients(self, points: Inputs, example: Tensor) -> ScoresAndGradients:
        points = self.as_model_inputs(points)
        likes, (inside, edges) = _like(points), differentiable_points(points)
        del points
        with _TwiceDifferentiable():
            scores, classes = self.forward(inside, example)
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        with self.failing(BACKWARD, example):
            try:
                several = [self._twice(one, edges, likes, example) for one in scores.unbind(1)]
            except RuntimeError as error:
                if not ErrorText.NO_SECOND_DERIVATIVE.of(error):
                    raise
                raise ModelError(
                    f"the model has a call without a second derivative: {error}; use another layer "
                    "in its place, or a method of first derivatives"
                ) from error
        return scores.detach(), classes, several

    def _twice(
        self, score: Tensor, edges: list[GradientEdge], likes: list[Like], example: Tensor
    ) -> Inputs:
        assert self.project is not None

        def gradient(numbers: Tensor, *, again: bool) -> Inputs:
            """Of numbers [R], each of its own row; again: to be differentiated once more."""
            options = {"retain_graph": True, "create_graph": again, "allow_unused": True}
            return _filled(gradients(numbers, edges, torch.ones_like(numbers), **options), likes)

        first_order = gradient(score, again=True)
        first = self.project(first_order, example)
        count = first.shape[1]
        sums = [torch.zeros_like(one) for one in first_order]
        second = first.new_zeros((len(first), count, count))
        # A model that is linear in its inputs has a gradient that depends on nothing.
        for m in range(count) if first.requires_grad else ():
            products = gradient(first[:, m], again=False)
            second[:, m] = self.project(products, example)
            for total, product in zip(sums, products, strict=True):
                total += product
        return first.detach(), second, *(one.detach() for one in first_order), *sums


def summed(grads: Inputs, example: Tensor) -> Tensor:
    """The simplest `Project`: the sum of all gradients, as one number."""
    return torch.stack([one.flatten(1).sum(1) for one in grads]).sum(0)[:, None]


class _TwiceDifferentiable(Calls):
    """Runs fused attention, whose kernels can be differentiated once, by products and a softmax."""

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        weights, value = probabilities(*args, **kwargs)
        drop = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return functional.dropout(weights, drop) @ value


Like = tuple[torch.Size, torch.dtype, torch.device]


def _like(points: Sequence[Tensor]) -> list[Like]:
    """What zeros like the points need, without their memory, which must not outlive the run."""
    return [(x.shape, x.dtype, x.device) for x in points]


def _filled(grads: tuple[Tensor | None, ...], likes: Sequence[Like]) -> Inputs:
    """Zeros where a target does not depend on an input."""
    return tuple(
        torch.zeros(like[0], dtype=like[1], device=like[2]) if grad is None else grad
        for grad, like in zip(grads, likes, strict=True)
    )


def _check_seen(
    several: Sequence[tuple[Tensor | None, ...]], unused: frozenset[int], example: Tensor
) -> None:
    """An input that no target depends on is an error, unless it is in `unused`."""
    for number, grads in enumerate(zip(*several, strict=True)):
        if number not in unused and all(grad is None for grad in grads):
            error = UnseenInputError(
                f"the model is not differentiable in input {number}: no gradient of the target "
                f"reaches it; if the model uses it, look for {CUTS} on its way, or take a method "
                "that asks for scores alone, such as sf.Occlusion; if not, pass it through "
                f"forward_args. {OF_LAYERS}, and explain each by itself where one lies behind "
                "another"
            )
            error.number, error.example = number, int(example[0])
            raise error


# Points of several calls as one launch, each with the targets and arguments of its own call.


@dataclass
class Pack:
    """The targets of a launch of several functions. errors: by number, with scores of 0."""

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
