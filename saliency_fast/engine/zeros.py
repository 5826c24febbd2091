"""Maps that are zero everywhere, and inputs on which a score does not depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome
from saliency_fast.engine.bind import Call, Model
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import warn
from saliency_fast.model.executors import EagerExecutor

SHOWN = 8
"""Examples that a warning names."""


def unused(model: Model, call: Call, number: int, example: int = 0) -> bool:
    """Whether an example's score is the same, bit for bit, whatever stands in an input: a model
    that reads it without a gradient is another matter.
    """
    x = call.inputs[number][example : example + 1]
    others = [x.flip(-1) + 1.0, torch.zeros_like(x), 1.5 * x - 0.25]
    scores = [_score(model, call, number, one, example) for one in (x, x, *others)]
    return all(torch.equal(scores[0], one) for one in scores[1:])


def still_unused(model: Model, call: Call, earlier: set[int]) -> frozenset[int]:
    """Those of the inputs, unused in earlier calls, that are so in this one."""
    numbers = (number for number in earlier if number < len(call.inputs))
    return frozenset(number for number in numbers if unused(model, call, number))


def _score(model: Model, call: Call, number: int, instead: Tensor, index: int) -> Tensor:
    function = call.function(EagerExecutor(model))
    example = torch.full((1,), index, device=call.device)
    rows = tuple(x[index : index + 1] for x in call.inputs)
    parts = [x.clone() for x in rows]
    parts[number] = instead.clone()
    targets = function.targets
    if targets.predicted and targets.classes is None:
        _, classes = function.scores(tuple(x.clone() for x in rows), example)
        assert classes is not None
        targets = replace(targets, classes=classes.expand(call.batch, -1))
        function = replace(function, targets=targets)
    return function.scores(tuple(parts), example)[0]


def warn_of_zeros(
    outcome: Outcome, call: Call, recipe: Recipe, baselines: Sequence[Inputs]
) -> None:
    """Warns once where values are exactly zero: of an input, or of examples altogether."""
    # [inputs, B, K]
    seen = torch.stack([(one.detach() != 0).flatten(2).any(2) for one in outcome.values])
    if bool(seen.all()):
        return
    said = [_of_inputs(seen, call), _of_examples(seen, outcome, call, recipe, baselines)]
    text = "; ".join(one for one in said if one)
    if text:
        warn(text)


def _of_inputs(seen: Tensor, call: Call) -> str:
    """About inputs whose values are zero for all examples, where other inputs' are not."""
    none = [n for n, one in enumerate(seen) if not bool(one.any())]
    if not none or len(none) == len(seen):
        return ""
    names = " and ".join(f"input {n}" for n in none)
    return (
        f"all values of {names} are exactly 0: the score does not depend on it, as far as this "
        "method sees; what needs no attribution is better passed through forward_args"
    )


def _of_examples(
    seen: Tensor, outcome: Outcome, call: Call, recipe: Recipe, baselines: Sequence[Inputs]
) -> str:
    """About examples whose maps are zero in all inputs; class activation maps tell it of layers."""
    if recipe.layers is not None:
        return ""
    flat = ~seen.any(0).all(1)
    if not bool(flat.any()):
        return ""
    numbers = flat.nonzero()[:, 0].tolist()
    scores = outcome.scores[flat]
    shown = f"the map is zero everywhere for examples {numbers[:SHOWN]}"
    shown += ", ..." if len(numbers) > SHOWN else ""
    low, high = float(scores.min()), float(scores.max())
    score = f"score {low:.6g}" if low == high else f"scores {low:.6g} to {high:.6g}"
    if _at_baseline(call, recipe, baselines, flat):
        return f"{shown} ({score}): the input equals its baseline there; pass another baseline"
    if not recipe.gradients:
        return f"{shown} ({score}): the score is the same at all points; pass another baseline"
    if bool(((scores == 0) | (scores == 1)).all()):
        return (
            f"{shown} ({score}, every gradient exactly 0): a saturated softmax or sigmoid, as it "
            "seems; explain the logit, the number before it"
        )
    return (
        f"{shown} ({score}, every gradient exactly 0): rectifiers that are all off, a saturated "
        "sigmoid or softmax, or a part without gradient such as detach(), round() or argmax() on "
        "the way; explain the logit before a softmax, check the scale of the input, or take "
        "another baseline or target"
    )


def _at_baseline(call: Call, recipe: Recipe, baselines: Sequence[Inputs], flat: Tensor) -> bool:
    """Whether those examples equal all of their baselines."""
    if isinstance(recipe, WeightedSum) and recipe.factor == "input":
        return all(bool((x[flat] == 0).all()) for x in call.inputs)
    if recipe.baseline not in ("one", "fill") or not baselines:
        return False
    return all(
        bool((x[flat] == one.expand_as(x)[flat]).all())
        for several in baselines
        for x, one in zip(call.inputs, several, strict=True)
    )
