"""The model's scores of many points made of a batch of inputs, in the engine's launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine import recipe as recipes
from saliency_fast.engine.recipe import Round, RoundContext, RoundResult
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.model import targets as model_targets
from saliency_fast.model.layout import Axes
from saliency_fast.model.targets import PREDICTED, Target, Targets

OUTPUTS = ("softmax", "logit")
SUMS = 1e-4
"""How far outputs may sum from one and still count as probabilities, in float32."""
NO_CLASS = -1.0
"""Stands for a missing probability or class, since the engine refuses NaN."""
Write = Callable[[Tensor, Tensor], Tensor]
"""(example int64 [R], number int64 [R]) -> points [R, *] in fresh memory."""


class _MetricEngine(Engine):
    """An engine of many maps, which metrics judge."""

    warns_of_zeros = False


@dataclass(frozen=True)
class RunOptions:
    """How a model is run: further arguments, the options of `Engine`, half `dtype` and layout."""

    forward_args: Any = ()
    forward_kwargs: Mapping[str, Any] | None = None
    memory_budget: int | str | None = None
    points_per_launch: int | None = None
    progress: bool = False
    dtype: torch.dtype | None = None
    axes: Axes | None = None

    def engine(self, model: Callable[..., Any], method: Any, *, lean: bool = True) -> Engine:
        return _MetricEngine(
            *(model, method),
            lean=lean,
            memory_budget=self.memory_budget,
            points_per_launch=self.points_per_launch,
            progress=self.progress,
            hashes=False,
            layout=self.letters,
        )

    @property
    def letters(self) -> str | None:
        """The model's layout, where it is known."""
        return None if self.axes is None else self.axes.letters

    def cast(self, inputs: Tensor) -> Tensor:
        """Inputs in the model's layout and dtype."""
        laid_out = self.back(inputs)
        return laid_out if self.dtype is None else laid_out.to(self.dtype)

    def back(self, values: Tensor) -> Tensor:
        """Inputs, points or maps of their shape from channels first to the model's layout."""
        if self.axes is None or self.axes.is_standard:
            return values
        return self.axes.back(values).contiguous()

    def standard(self, values: Tensor) -> Tensor:
        """The reverse of `back`."""
        if self.axes is None or self.axes.is_standard:
            return values
        return self.axes.standard(values).contiguous()

    def taking(self, dtype: torch.dtype, axes: Axes | None = None) -> RunOptions:
        """The same for a model with inputs of that dtype and layout."""
        changed = replace(self, dtype=dtype) if dtype in HALVES else self
        return changed if axes is None else replace(changed, axes=axes)

    def map(self, engine: Engine, x: Tensor, target: Any, baseline: Any = None) -> Tensor:
        """The map of inputs [B, *] by an engine, in the model's layout."""
        values = engine(self.cast(x), target, baseline, **self.arguments()).values
        assert isinstance(values, Tensor)
        return values

    def arguments(self) -> dict[str, Any]:
        """The model's further arguments, as an engine's call takes them."""
        return {"forward_args": self.forward_args, "forward_kwargs": self.forward_kwargs}


@dataclass(frozen=True)
class Scores:
    """The scores of R points, float64 [R]; of classes also probabilities and decisions."""

    scores: Tensor
    probabilities: Tensor | None
    decisions: Tensor | None

    def of(self, output: str) -> Tensor:
        """The target's "logit" or "softmax" probability, float64 [R]."""
        if output == "logit":
            return self.scores
        return _need_classes("output='softmax'", self.probabilities)

    def decided(self, what: str) -> Tensor:
        """The predicted classes; raises that `what` needs them."""
        return _need_classes(what, self.decisions)


def _need_classes(what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise InputError(
            f"{what} needs several classes: the model or the target gives one number per example; "
            "use a model that returns [B, classes] and a class as target, or output='logit' and "
            "target=None"
        )
    return value


@dataclass(frozen=True)
class Reading(model_targets.Reader):
    """A target of a score, a probability and a decision. classes: int64 [B], None if predicted."""

    classes: Tensor | None
    targets: Targets | None = None
    count: int = 3

    def read(self, raw: Any, example: Tensor) -> Tensor:
        """Scores [R, 3]; `NO_CLASS` for what the output does not hold."""
        if self.targets is not None:
            self.targets.check(raw, example)
            return self._score_only(self.targets.read(raw, example)[0][:, :1])
        output = model_targets.tensor_of(raw)
        if output.dim() != 2 or len(output) != len(example):
            raise InputError(
                "target as a class needs a model that returns [B, classes]: got "
                f"{list(output.shape)} for {len(example)} inputs; pass another target"
            )
        decision = output.detach().argmax(1, keepdim=True)
        classes = decision if self.classes is None else self.classes[example][:, None]
        for one in (int(classes.max()), int(classes.min())):
            if not 0 <= one < output.shape[1]:
                raise InputError(
                    f"target must lie in the model's {output.shape[1]} classes: got {one}, "
                    f"expected 0 to {output.shape[1] - 1}"
                )
        # Class indices are exact up to 2 ** 24 in float32, but not in half types.
        wide = output if output.dtype in (torch.float32, torch.float64) else output.float()
        score = wide.gather(1, classes)
        if output.shape[1] == 1:
            return self._score_only(score)
        shares = probabilities(output, wide)
        return torch.cat([score, shares.gather(1, classes), self.decided(decision, shares)], 1)

    def decided(self, decision: Tensor, shares: Tensor) -> Tensor:
        """The further columns, of the decision [R, 1] and the probabilities [R, C]."""
        return decision.to(shares.dtype)

    def _score_only(self, score: Tensor) -> Tensor:
        """Scores [R, 1] of outputs that are no classes, as [R, count]."""
        rest = score.detach().new_full((len(score), self.count - 1), NO_CLASS)
        return torch.cat([score, rest], 1)


def probabilities(output: Tensor, wide: Tensor) -> Tensor:
    """Softmax of outputs [R, C], `wide` in the result's dtype; probabilities stay as they are."""
    slack = max(SUMS, torch.finfo(output.dtype).eps) if output.is_floating_point() else SUMS
    already = (wide >= 0).all(1) & ((wide.sum(1) - 1.0).abs() < slack)
    return torch.where(already[:, None], wide, wide.softmax(1))


@dataclass(frozen=True, eq=False)
class ScoreQuery:
    """A method that only reads scores, of the inputs and of points: `found` after a run."""

    write: Write
    example: Tensor
    node: Tensor
    found: list[Tensor] = field(default_factory=list)
    name = "evaluation"

    def recipe(self) -> recipes.Recipe:
        points = max(1, -(-len(self.example) // max(1, int(self.example.max()) + 1)))
        return recipes.RoundsRecipe(self.rounds, points, gradients=False, held=0)

    def rounds(self, context: RoundContext) -> recipes.Rounds:
        """One round; the scores at the inputs come first."""
        # A run may begin again.
        self.found.clear()
        self.found.append(context.scores)
        scores = context.scores.new_empty((len(self.example), context.scores.shape[1]))

        def each(rows: slice, result: RoundResult) -> None:
            scores[rows] = result.scores

        yield Round(lambda i, p: (self.write(i, p),), self.example, self.node, each=each)
        self.found.append(scores)
        return recipes.Maps((context.scores.new_zeros((*context.scores.shape, 1)),))


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model with the target of each input [B, *]. lean: False where points may hold NaN."""

    model: Callable[..., Any]
    inputs: Tensor
    target: Target
    running: RunOptions
    lean: bool = True

    def at(self, write: Write, example: Tensor, number: Tensor) -> tuple[Scores, Scores]:
        """Scores at the inputs [B], and at the R points that `write(example, number)` makes."""
        first, points = self.columns(write, example, number)
        wrong = sorted(set(example[~points.isfinite().all(1)].tolist()))
        if wrong:
            raise ModelError(
                f"the model gives NaN or infinite scores for points made of examples {wrong[:8]}: "
                "expected finite numbers; check the model there, or take another substrate"
            )
        return _split(first), _split(points)

    def columns(
        self, write: Write, example: Tensor, number: Tensor, kind: type[Reading] = Reading
    ) -> tuple[Tensor, Tensor]:
        """What a kind of reading reads at the inputs and at the points, float64."""
        query = ScoreQuery(lambda i, n: self.running.back(write(i, n)), example, number)
        engine = self.running.engine(self.model, query, lean=self.lean)
        engine(self.running.cast(self.inputs), self._reading(kind), **self.running.arguments())
        first, points = query.found
        return first, points

    def grid(self, write: Write, count: int) -> tuple[Scores, Scores]:
        """Scores at the inputs [B], and at `count` points of each example [B, count]."""
        batch, device = len(self.inputs), self.inputs.device
        example = torch.arange(batch, device=device).repeat(count)
        number = torch.arange(count, device=device).repeat_interleave(batch)
        first, points = self.at(write, example, number)
        found = points.scores, points.probabilities, points.decisions
        scores, *further = (None if one is None else one.view(count, batch).T for one in found)
        assert scores is not None
        return first, Scores(scores, *further)

    def again(self) -> tuple[Scores, Scores]:
        """Scores at the inputs by two runs, which are equal if the model is deterministic."""
        example = torch.arange(len(self.inputs), device=self.inputs.device)
        return self.at(lambda i, _: self.inputs[i], example, example)

    def _reading(self, kind: type[Reading]) -> Reading:
        if isinstance(self.target, str) and self.target == PREDICTED:
            return kind(None)
        targets = one_target(self.target, len(self.inputs)).to(self.inputs.device)
        about = (self.model, (self.running.back(self.inputs),), *self.running.arguments().values())
        targets = model_targets.with_padding(targets, *about)
        if targets.classes is None or targets.position is not None:
            return kind(None, targets)
        return kind(targets.classes[:, 0])


def one_target(target: Target, batch: int) -> Targets:
    """The target of a batch; raises where it is invalid, or several of each example."""
    targets = model_targets.read_targets(target, batch)
    if targets.count > 1:
        raise InputError(
            f"target must be one per example, as maps are: got {targets.count} of each; evaluate "
            "the maps of one target at a time"
        )
    if targets.position is not None and targets.predicted:
        raise InputError(
            "target: name the token of NextToken, such as the attribution's classes: the likeliest "
            "one may be another at every point"
        )
    return targets


def _split(rows: Tensor) -> Scores:
    score, share, decision = rows.unbind(1)
    if bool((decision == NO_CLASS).all()):
        return Scores(score, None, None)
    return Scores(score, share, decision.long())
