"""Scores: what a model says of many points made of a batch of inputs, in the engine's launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.model.axes import Axes
from saliency_fast.model.targets import (
    PREDICTED,
    Target,
    Targets,
    read_targets,
    tensor_of,
    with_padding,
)

OUTPUTS = ("softmax", "logit")
SUMS = 1e-4
"""How far the sum of outputs may be from one for them to be probabilities already, in float32."""
UNTOLD = -1.0
"""What is neither a probability nor a class; the engine refuses NaN."""


@dataclass(frozen=True)
class Running:
    """How a model is run: further arguments, and what `Engine` takes; dtype: what the model takes,
    where that is a half type and inputs are read as float32. axes: the layout that it takes;
    inputs are judged in the standard one, [B, C, *places].
    """

    forward_args: Any = ()
    forward_kwargs: Mapping[str, Any] | None = None
    memory_budget: int | str | None = None
    points_per_launch: int | None = None
    progress: bool = False
    dtype: torch.dtype | None = None
    axes: Axes | None = None

    def engine(self, model: Callable[..., Any], method: Any, *, lean: bool = True) -> Engine:
        engine = Engine(
            model,
            method,
            lean=lean,
            memory_budget=self.memory_budget,
            points_per_launch=self.points_per_launch,
            progress=self.progress,
            hashes=False,
            layout=self.letters,
        )
        engine.tells_zeros = False
        return engine

    @property
    def letters(self) -> str | None:
        """The layout that the model takes, where it is known."""
        return None if self.axes is None else self.axes.letters

    def cast(self, inputs: Tensor) -> Tensor:
        """Inputs as the model takes them."""
        laid = self.back(inputs)
        return laid if self.dtype is None else laid.to(self.dtype)

    def back(self, values: Tensor) -> Tensor:
        """Inputs, points, or maps of their shape as the model has its axes."""
        if self.axes is None or self.axes.is_standard:
            return values
        return self.axes.back(values).contiguous()

    def standard(self, values: Tensor) -> Tensor:
        """The reverse: values of a model in the standard layout."""
        if self.axes is None or self.axes.is_standard:
            return values
        return self.axes.standard(values).contiguous()

    def taking(self, dtype: torch.dtype, axes: Axes | None = None) -> Running:
        """The same for a model that takes inputs of that type and layout."""
        found = replace(self, dtype=dtype) if dtype in HALVES else self
        return found if axes is None else replace(found, axes=axes)

    def arguments(self) -> dict[str, Any]:
        """What calls of an engine take."""
        return {"forward_args": self.forward_args, "forward_kwargs": self.forward_kwargs}


@dataclass(frozen=True)
class Scores:
    """What the model says of points. scores float64 [R]: the target's output; where the model tells
    classes apart, also its probability, float64 [R], by softmax unless the outputs are
    probabilities, and the class that is largest, int64 [R].
    """

    scores: Tensor
    probabilities: Tensor | None
    decisions: Tensor | None

    def of(self, output: str) -> Tensor:
        """The scores as "logit", the output as it is, or as "softmax"; float64 [R]."""
        if output == "logit":
            return self.scores
        if self.probabilities is None:
            raise InputError(
                "output='softmax' needs several classes: the model or the target gives one number "
                "per example; use output='logit'"
            )
        return self.probabilities


@dataclass(frozen=True)
class Reading:
    """A target (`model.targets.Reader`): its score, its probability and the decision of each row.

    classes int64 [B], or None for the class that is largest; targets: any other target.
    """

    classes: Tensor | None
    targets: Targets | None = None
    count: int = 3

    def read(self, raw: Any, item: Tensor) -> Tensor:
        """Scores [R, 3]; `UNTOLD` for what the output does not tell."""
        if self.targets is not None:
            self.targets.check(raw, item)
            return _alone(self.targets.read(raw, item)[0][:, :1])
        output = tensor_of(raw)
        if output.dim() != 2 or len(output) != len(item):
            raise InputError(
                "target as a class needs a model that returns [B, classes]: got "
                f"{list(output.shape)} for {len(item)} inputs; pass another target"
            )
        decision = output.detach().argmax(1, keepdim=True)
        classes = decision if self.classes is None else self.classes[item][:, None]
        _need_classes(classes, output.shape[1])
        # The numbers of classes are exact up to 2 ** 24, but not in half types.
        wide = output if output.dtype in (torch.float32, torch.float64) else output.float()
        score = wide.gather(1, classes)
        if output.shape[1] == 1:
            return _alone(score)
        return torch.cat(
            [score, probabilities(output, wide).gather(1, classes), decision.to(wide.dtype)], 1
        )


def probabilities(output: Tensor, wide: Tensor) -> Tensor:
    """Softmax of outputs [R, C]; rows that are probabilities already stay as they are.

    wide: the outputs in the type of the result. Half types round probabilities, and their sum.
    """
    slack = max(SUMS, torch.finfo(output.dtype).eps) if output.is_floating_point() else SUMS
    told = (wide >= 0).all(1) & ((wide.sum(1) - 1.0).abs() < slack)
    return torch.where(told[:, None], wide, wide.softmax(1))


def _alone(score: Tensor) -> Tensor:
    """Scores [R, 1] of outputs that tell no classes apart."""
    return torch.cat([score, score.detach().new_full((len(score), 2), UNTOLD)], 1)


@dataclass(frozen=True, eq=False)
class Questions:
    """A method that only asks: points written as `Round.write` says, answered into `found`."""

    write: Callable[[Tensor, Tensor], Tensor]
    item: Tensor
    place: Tensor
    found: list[Tensor] = field(default_factory=list)
    name = "evaluation"

    def recipe(self) -> Recipe:
        points = max(1, -(-len(self.item) // max(1, int(self.item.max()) + 1)))
        return RoundsRecipe(self.rounds, points, gradients=False, held=0)

    def rounds(self, asked: RoundContext) -> Rounds:
        """One round; the scores at the inputs come first."""
        # A run may begin again.
        self.found.clear()
        self.found.append(asked.scores)
        answers = asked.scores.new_empty((len(self.item), asked.scores.shape[1]))

        def each(rows: slice, found: RoundResult) -> None:
            answers[rows] = found.scores

        yield Round(lambda i, p: (self.write(i, p),), self.item, self.place, each=each)
        self.found.append(answers)
        return Maps((asked.scores.new_zeros((*asked.scores.shape, 1)),))


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model with the target of each of its inputs [B, *]: int64 [B], or None for one number.

    lean: False where points may hold NaN, which the model itself is to read.
    """

    model: Callable[..., Any]
    inputs: Tensor
    target: Target
    running: Running
    lean: bool = True

    def at(
        self, write: Callable[[Tensor, Tensor], Tensor], item: Tensor, place: Tensor
    ) -> tuple[Scores, Scores]:
        """Scores at the inputs [B], and at the points [R] that `write(item, place)` makes in fresh
        memory; item int64 [R]: the example of each point.
        """

        def laid(item: Tensor, place: Tensor) -> Tensor:
            return self.running.back(write(item, place))

        asked = Questions(laid, item, place)
        engine = self.running.engine(self.model, asked, lean=self.lean)
        engine(self.running.cast(self.inputs), self._reading(), **self.running.arguments())
        _need_finite(asked.found[1], item)
        return _read(asked.found[0]), _read(asked.found[1])

    def again(self) -> tuple[Scores, Scores]:
        """Scores at the inputs, twice: a model that is deterministic says the same."""
        item = torch.arange(len(self.inputs), device=self.inputs.device)
        return self.at(lambda item, place: self.inputs[item], item, item)

    def _reading(self) -> Reading:
        if isinstance(self.target, str) and self.target == PREDICTED:
            return Reading(None)
        targets = one_target(self.target, len(self.inputs)).to(self.inputs.device)
        about = (self.model, (self.running.back(self.inputs),), *self.running.arguments().values())
        targets = with_padding(targets, *about)
        if targets.classes is None or targets.position is not None:
            return Reading(None, targets)
        return Reading(targets.classes[:, 0])


def one_target(target: Target, batch: int) -> Targets:
    """The target read; raises where it is wrong, or several of each example."""
    targets = read_targets(target, batch)
    if targets.count > 1:
        raise InputError(
            f"target must be one per example, as maps are: got {targets.count} of each; judge the "
            "maps of one target at a time"
        )
    if targets.position is not None and targets.predicted:
        raise InputError(
            "target: name the token of NextToken, such as the attribution's classes: the likeliest "
            "one may be another at every point"
        )
    return targets


def _read(found: Tensor) -> Scores:
    score, share, decision = found.unbind(1)
    if bool((decision == UNTOLD).all()):
        return Scores(score, None, None)
    return Scores(score, share, decision.long())


def _need_finite(found: Tensor, item: Tensor) -> None:
    wrong = sorted(set(item[~found.isfinite().all(1)].tolist()))
    if wrong:
        raise ModelError(
            f"the model gives NaN or infinite scores for points made of examples {wrong[:8]}: "
            "expected finite numbers; check the model there, or take another substrate"
        )


def _need_classes(classes: Tensor, count: int) -> None:
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= count:
        raise InputError(
            f"target must lie in the model's {count} classes: got {high if high >= count else low},"
            f" expected 0 to {count - 1}"
        )
