"""The model as a function from points to scores and input gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from saliency_fast._types import Inputs
from saliency_fast.errors import ModelCallError, ModelError, UnseenInputError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.outputs import map_tensors, rows_of
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.half import FLOAT32, Precision, arithmetic
from saliency_fast.graph.program import laid, tensors_among
from saliency_fast.model.executors import Executor
from saliency_fast.model.failures import BACKWARD, FORWARD, Failing, overwrites_saved
from saliency_fast.model.targets import Targets, read_of

Made = TypeVar("Made")
CUTS = "detach(), no_grad(), .item(), NumPy or integer steps, and quantised layers (no gradient)"
OF_LAYERS = "Of layers (at=), name one that the score is made from, no auxiliary head"
NO_GRADIENT = (
    "the model is not differentiable in its input: its output carries no gradient; look for "
    f"{CUTS} inside it, or take a method that asks for scores alone, such as sf.Occlusion. "
    f"{OF_LAYERS}"
)
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference up to which two outputs of the same row are the same, to rounding."""


class _Enter(torch.autograd.Function):
    """Makes plain points differentiable without a copy, so that a model may work in place."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(points)
        return points

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


class _Owing(torch.autograd.Function):
    """An output that hands back what the score owes to it, rather than its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return output * grad


def _owing(output: Tensor) -> Any:
    return _Owing.apply(output) if output.requires_grad else output  # type: ignore[no-untyped-call]


def entered(points: Inputs) -> tuple[list[Tensor], list[GradientEdge]]:
    """Points as a model may take them, and where their gradients are asked for."""
    anchor = torch.zeros((), requires_grad=True, device="cpu")
    # Detached: work in place on a view would be its base's, too, and its gradient lost.
    apart = [one.detach() for one in points]
    inside = [_Enter.apply(one, anchor) for one in apart]  # type: ignore[no-untyped-call]
    return inside, [get_gradient_edge(one) for one in inside]


@dataclass
class PointFunction:
    """The model, by one of its routes, with its further arguments and targets, on a launch's rows.

    Further arguments that are tensors with the batch's length on their first axis belong to the
    examples and follow them into the rows, but for those named in `whole`, by number or name; all
    others are passed as they are. unused: inputs that no score depends on, whose gradients are 0.
    lone: what takes a row alone, where that is not this function itself. With `prefix` the route is
    its rest, and gradients are taken at its places; `lifted`: points are places already.
    dtypes: what the model takes, where points are not written so. scale: what the cotangent is
    multiplied with, and gradients with it, where half types underflow; a number, or one per row.
    kind: equal for functions that take points through the model in the same way. shape: of an
    example's output, once it is known. references: rows [B | 1, *] that go through the model behind
    the points, one for each; relevance: outputs hand back what the score owes to them. overwrites:
    the model overwrites what autograd needs, so that copies of that are kept. innermost: which
    inputs lie with their channels innermost in memory, so that their points are to lie so.
    """

    route: Executor
    targets: Targets
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    prefix: Prefix | None = None
    lifted: bool = False
    precision: Precision = FLOAT32
    scale: float = 1.0
    dtypes: tuple[torch.dtype, ...] | None = None
    kind: tuple[object, ...] = ()
    shape: torch.Size | None = None
    references: Inputs | None = None
    relevance: bool = False
    whole: frozenset[int | str] = frozenset()
    unused: frozenset[int] = frozenset()
    lone: PointFunction | None = None
    overwrites: bool = False
    innermost: tuple[bool, ...] = ()
    _checked: bool = False
    _squeezes: bool | None = None

    def scores(self, points: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] without gradients, and the classes [R, K] they belong to."""
        with torch.no_grad(), arithmetic(self.precision, item.device):
            return self.forward(self.taken(points), item)

    def judged(self, points: Inputs, item: Tensor) -> tuple[Tensor, float]:
        """Scores [R, K] without gradients, from points as launches write them, and the largest
        magnitude of the outputs that they are read from.
        """
        with torch.no_grad(), arithmetic(self.precision, item.device):
            raw = self._run(self.taken(self._behind_prefix(points, item)), item)
            scores, _ = self.read(raw, item)
            outputs = [scores, *(one for one in (read_of(raw),) if one is not None)]
            finite = [one.detach().float().nan_to_num(0.0, 0.0, 0.0) for one in outputs]
            return scores, max(float(one.abs().max()) for one in finite if one.numel())

    def gradients(self, points: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None, list[Inputs]]:
        """Scores [R, K], classes [R, K], and for each of K targets the gradients of the points.

        One forward pass serves all targets; each has its own backward pass. The points are handed
        over: the model may overwrite them.
        """
        # PyTorch's own allow_mutation_on_saved_tensors misses writes to views behind an offset.
        copied = torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda one: one)
        with arithmetic(self.precision, item.device), copied if self.overwrites else nullcontext():
            return self._gradients(points, item)

    def _gradients(
        self, points: Inputs, item: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Inputs]]:
        points = self.taken(self._behind_prefix(points, item))
        # Shapes alone: behind a prefix points are as large as activations, and must not outlive
        # the calls that take them. A list, so that a program can let go of them for all.
        like = [torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape) for p in points]
        inside, edges = entered(points)
        del points
        scores, classes = self.forward(inside, item)
        inside.clear()
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        last = scores.shape[1] - 1
        with self.failing(BACKWARD, item):
            found = [
                # A sum: where a gradient is handed in, PyTorch imports its symbolic shapes, which
                # takes a third of a second.
                gradients(
                    *((scores[:, k] * self.scale).sum(), edges),
                    retain_graph=k < last,
                    allow_unused=True,
                )
                for k in range(scores.shape[1])
            ]
        if self.prefix is None:
            _check_seen(found, self.unused)
        grads = [_filled(one, like) for one in found]
        if self.prefix is not None:
            return scores.detach(), classes, [self.prefix.turned_back(one) for one in grads]
        return scores.detach(), classes, [tuple(g.contiguous() for g in one) for one in grads]

    def _behind_prefix(self, points: Inputs, item: Tensor) -> Inputs:
        """Points as launches write them where the route takes them."""
        if self.prefix is None:
            return points
        if not self.lifted:
            points = self.prefix.lift(points, tensors_among(*self.rows(item)))
        return self.prefix.turned(points)

    def forward(self, points: Sequence[Tensor], item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] and classes [R, K] as autograd sees them."""
        raw = self._run(points, item)
        return self.read(map_tensors(_owing, raw) if self.relevance else raw, item)

    def _run(self, points: Sequence[Tensor], item: Tensor) -> Any:
        """What the model returns for points in the place where the route takes them."""
        if self.references is None:
            return self.called(lambda: self.route(points, *self.rows(item)), points, item)
        pairs = zip(points, self.taken(self.references), strict=True)
        both = [torch.cat([one, rows[item % len(rows)]]) for one, rows in pairs]
        with self.failing(FORWARD, item):
            raw = self.route(both, *self.rows(torch.cat([item, item])))
        return rows_of(raw, slice(len(item)), 2 * len(item))

    def again(self, call: Callable[[], Made]) -> Made:
        """What `call` makes of points that it writes anew each time; once more, with copies of what
        the model overwrites, where its backward pass needs them.
        """
        try:
            return call()
        except ModelCallError as error:
            if self.overwrites or not overwrites_saved(error):
                raise
        self.overwrites = True
        return call()

    def failing(self, stage: str, item: Tensor) -> Failing:
        """Inside, what the model raises on rows of examples `item` [R] becomes a ModelError."""
        return Failing(stage, item.numel(), self.targets.batch)

    def called(self, call: Callable[[], Any], points: Sequence[Tensor], item: Tensor) -> Any:
        """What `call` returns, which takes the points through the model, with a batch axis where a
        squeeze() takes that of a single row.
        """
        one = item.numel() == 1 and self._squeezes is not False
        # Before the model may overwrite them, and once.
        spare = [x.detach().clone() for x in points] if one and self._squeezes is None else []
        with self.failing(FORWARD, item):
            raw = call()
        if spare:
            self._squeezes = self._loses_axis(raw, spare, item)
        return raw[None] if one and self._squeezes else raw

    def _loses_axis(self, raw: Any, points: list[Tensor], item: Tensor) -> bool:
        """Whether a row's output has no batch axis, and that of the row given twice has."""
        if not isinstance(raw, Tensor) or raw.shape[:1] == (1,):
            return False
        twice = [torch.cat([x, x]) for x in points]
        with suppress(Exception), torch.no_grad():
            two = self.route(twice, *self.rows(torch.cat([item, item])))
            if not isinstance(two, Tensor) or two.shape != (2, *raw.shape):
                return False
            close = CLOSE.get(raw.dtype, 1e-2)
            both = raw.expand_as(two)
            return raw.is_meta or torch.allclose(two, both, close, close, equal_nan=True)
        return False

    def read(self, raw: Any, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] and classes [R, K] of what the model returned."""
        if not self._checked:
            self.shape, self._checked = self.targets.check(raw, item), True
        return self.targets.read(raw, item)

    def taken(self, points: Inputs) -> Inputs:
        """The points in the types that the model takes, and as its inputs lie in memory."""
        if self.dtypes is not None:
            points = tuple(one.to(dtype) for one, dtype in zip(points, self.dtypes, strict=True))
        if self.prefix is not None or not any(self.innermost):
            return points
        return laid(points, self.innermost)

    def rows(self, item: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of the rows of examples `item` [R]."""

        def own(key: int | str, value: Any) -> Any:
            return value[item] if self.follows(key, value) else value

        args = tuple(own(number, value) for number, value in enumerate(self.args))
        return args, {name: own(name, value) for name, value in self.kwargs.items()}

    def follows(self, key: int | str, value: Any) -> bool:
        """Whether the further argument of that number or name belongs to the examples."""
        long = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.targets.batch
        return long and key not in self.whole


def _check_seen(found: Sequence[tuple[Tensor | None, ...]], unused: frozenset[int]) -> None:
    """An input that none of the targets sees is an error, unless it is known to be unused."""
    for number, grads in enumerate(zip(*found, strict=True)):
        if number not in unused and all(grad is None for grad in grads):
            error = UnseenInputError(
                f"the model is not differentiable in input {number}: no gradient of the target "
                f"reaches it; if the model uses it, look for {CUTS} on its way, or take a method "
                "that asks for scores alone, such as sf.Occlusion; if not, pass it through "
                f"forward_args. {OF_LAYERS}, and explain each by itself where one lies behind "
                "another"
            )
            error.number = number
            raise error


def _filled(grads: tuple[Tensor | None, ...], like: Sequence[Tensor]) -> Inputs:
    """Zeros where a target does not see an input."""
    pairs = zip(grads, like, strict=True)
    return tuple(one.new_zeros(one.shape) if grad is None else grad for grad, one in pairs)
