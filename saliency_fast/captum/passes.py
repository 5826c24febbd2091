"""Passes: perturbed batches through a user's function, call by call, as Captum runs them.

One call has the whole batch once, or `perturbations_per_eval` times, each time perturbed
differently; there are no other calls. Methods are the engine's, driven without its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future, collect_all
from tqdm.auto import tqdm

from saliency_fast._types import Inputs
from saliency_fast.captum.apart import SharedCalls, calls_each
from saliency_fast.captum.contract import Baselines, as_args, as_target, copies, filled
from saliency_fast.captum.forward import read_output, selected
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.features import numbered
from saliency_fast.engine.independence import RowsMeetError
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import ContractError, ModelError
from saliency_fast.model.axes import Layouts
from saliency_fast.model.casts import cast

Values = tuple[Inputs, Tensor | None]
"""Maps per input [N, *], and by feature [N, F] where the method tells."""


@dataclass(frozen=True)
class Asked:
    """What a call asks of the engine. features: masks that broadcast to their inputs [1 | B, *];
    at_once: perturbations per call of the function; progress: the name of a class whose progress
    is shown.
    """

    forward: Callable[..., Any]
    inputs: Inputs
    target: Any = None
    further: Any = None
    baselines: Baselines | None = None
    features: Inputs | None = None
    at_once: int = 1
    progress: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))

    def shown(self, method: Method) -> Any:
        """A bar of Captum's words for the calls of the function, where there is one."""
        shows = bool(self.progress)
        total = count_of(method, self) if shows else None
        words = f"{self.progress} attribution"
        return tqdm(total=total, desc=words, disable=not shows)


@dataclass(frozen=True)
class Pass:
    """Perturbed batches for one call. write() makes them, [count, B, *] per input."""

    count: int
    write: Callable[[], Inputs]


Passes = Generator[Pass, Tensor, Values]
"""A method at work: yields passes and is sent the numbers [count, N] of each, float64."""


def count_of(method: Method, call: Asked) -> int:
    """Calls of the function that a method takes, the one at the inputs included."""
    recipe = method.recipe()
    assert isinstance(recipe, engine.RoundsRecipe)
    points = recipe.points
    if callable(points):
        wide = tuple(x[None] for x in call.inputs)
        layouts = Layouts([tuple(x.shape) for x in wide])
        points = points(wide, _features(call, recipe), layouts)
    return 1 + (recipe.baseline == "one") - (-int(points or 0) // call.at_once)


def _features(call: Asked, recipe: Recipe) -> Inputs:
    """Numbers from 0 of the features, int64 [1, B, *]: an element of every row is one, unless masks
    say otherwise.
    """
    if not recipe.features:
        return ()
    masks = numbered(None, call.inputs) if call.features is None else call.features
    pairs = zip(masks, call.inputs, strict=True)
    whole = tuple(x[None] for x in call.inputs)
    return numbered(tuple(one.expand(x.shape)[None] for one, x in pairs), whole)


def passes(method: Method, call: Asked, first: Tensor) -> Passes:
    """The batch as one example of N targets: `first` holds the N numbers at the inputs."""
    recipe = method.recipe()
    whole = tuple(x[None] for x in call.inputs)
    starts = tuple(map(torch.zeros_like, whole))
    if call.baselines is not None:
        pairs = zip(filled(call.inputs, call.baselines), call.inputs, strict=True)
        starts = tuple(cast(one, x.dtype, "baselines").expand(x.shape)[None] for one, x in pairs)
    baseline_scores = None
    if recipe.baseline == "one":
        baseline_scores = yield Pass(1, partial(copies, starts))
    scores = first.reshape(1, -1).double()
    about = engine.RoundContext(
        *(whole, starts, scores, baseline_scores, call.at_once, _features(call, recipe)),
        layouts=Layouts([tuple(x.shape) for x in whole]),
    )
    assert isinstance(recipe, engine.RoundsRecipe)
    rounds, found = recipe.rounds(about), None
    while True:
        try:
            step = next(rounds) if found is None else rounds.send(found)
        except StopIteration as over:
            return _values(over.value, call, first)
        found = None
        if isinstance(step, engine.Round):
            found = yield from _answered(step, call.at_once, scores)


def _answered(
    step: engine.Round, at_once: int, like: Tensor
) -> Generator[Pass, Tensor, engine.RoundResult]:
    """The numbers of a round, pass by pass."""
    parts = [like.new_zeros((0, like.shape[1]))]
    for start in range(0, step.item.numel(), at_once):
        rows = slice(start, min(start + at_once, step.item.numel()))
        write = partial(step.write, step.item[rows], step.place[rows])
        found = engine.RoundResult((yield Pass(rows.stop - start, write)))
        if step.each is None:
            parts.append(found.scores)
        else:
            step.each(rows, found)
    return engine.RoundResult(torch.cat(parts))


def _values(maps: engine.Maps, call: Asked, first: Tensor) -> Values:
    """A map for each of the N numbers."""
    batch, count = len(call.inputs[0]), first.numel()
    pairs = zip(call.features or (), call.inputs, strict=False)
    own = any(one.dim() == x.dim() and len(one) > 1 for one, x in pairs)
    number = torch.arange(count, device=call.inputs[0].device)
    # A feature of some rows alone counts for their numbers.
    row = number // max(1, count // batch) if own else 0 * number
    values = tuple(one[0, number, row] for one in maps.values)
    extra = maps.extras.get("features")
    return values, None if extra is None else extra[0]


def output_of(raw: Any, target: Any) -> Tensor:
    """The numbers that a function returns; raises ModelError where one is NaN or infinite."""
    found = selected(read_output(raw), target)
    finite = found.isfinite()
    if not bool(finite.all()):
        raise ModelError(
            f"the model's score is not finite: got {found[~finite][0]} among the inputs, their "
            "baselines and perturbed inputs, so there is no difference to take; look at what the "
            "model returns at the baseline"
        )
    return found


def _driven(steps: Passes, answer: Callable[[Pass], Tensor]) -> Values:
    sent: Any = None
    while True:
        try:
            step = steps.send(sent)
        except StopIteration as over:
            found: Values = over.value
            return found
        sent = answer(step)


@torch.no_grad()
def run(
    method: Method,
    call: Asked,
    first: Tensor,
    bar: Any,
    again: Callable[[], object],
    *,
    apart: bool = False,
) -> Values:
    """The maps of a method; `bar` counts the passes. apart: each perturbed batch has a call of its
    own; else the method begins anew so where they are seen to meet, once `again` was called.
    """
    calls = _Calls(call, first, apart)

    def answer(step: Pass) -> Tensor:
        scores = calls.scores(step)
        bar.update()
        return scores

    try:
        return _driven(passes(method, call, first), answer)
    except RowsMeetError:
        again()
        bar.reset()
        bar.update()
    return run(method, call, first, bar, again, apart=True)


class _Calls:
    """The calls of a function that returns tensors, with several perturbed batches each unless
    these are kept apart.
    """

    def __init__(self, call: Asked, first: Tensor, apart: bool) -> None:
        self.call, self.first, self.apart = call, first, apart
        self.shared = SharedCalls(self._of, proved=calls_each(call.forward))

    def scores(self, step: Pass) -> Tensor:
        """The numbers of a pass, float64 [count, N]; raises RowsMeetError where batches meet."""
        points = step.write()
        if step.count > 1 and not self.apart:
            return self.shared.numbers(points).double()
        rows = [self._one(tuple(x[number] for x in points)) for number in range(step.count)]
        return torch.stack(rows)

    def _one(self, inputs: Inputs) -> Tensor:
        raw = self.call.forward(*inputs, *as_args(self.call.further))
        return output_of(raw, self.call.target).reshape(-1).double()

    def _of(self, points: Inputs) -> Tensor:
        shared = Shared.of(self.call, points)
        raw = self.call.forward(*shared.rows, *shared.further)
        return shared.numbers(raw, self.first.shape)


@dataclass(frozen=True)
class Shared:
    """Arguments of one call for several perturbed batches."""

    rows: Inputs
    target: Any
    further: tuple[Any, ...]
    count: int

    @classmethod
    def of(cls, call: Asked, points: Inputs) -> Shared:
        """points: [count, B, *] per input. Targets and arguments of B rows go with each batch."""
        count, batch = len(points[0]), len(call.inputs[0])
        rows = tuple(x.flatten(0, 1) for x in points)
        target, further = call.target, as_args(call.further)
        if count > 1:
            one = isinstance(target, Tensor) and target.numel() == 1
            target = target if one else _repeated(target, count, batch)
            further = tuple(
                _repeated(one, count, batch) if isinstance(one, Tensor) else one for one in further
            )
        return cls(rows, target, further, count)

    def numbers(self, raw: Any, single: torch.Size) -> Tensor:
        """The numbers [count, N], where the inputs alone give an output of the shape `single`."""
        found = output_of(raw, self.target)
        if self.count > 1 and (
            not single or not found.dim() or len(found) != self.count * single[0]
        ):
            raise ContractError(
                "When perturbations_per_eval > 1, forward_func's output should be a tensor whose "
                f"1st dim grow with the input batch size: when input batch size is "
                f"{len(self.rows[0]) // self.count}, the output shape is {single}; when input "
                f"batch size is {len(self.rows[0])}, the output shape is {found.shape}; pass "
                "perturbations_per_eval=1"
            )
        return found.reshape(self.count, -1)


def _repeated(value: Any, count: int, batch: int) -> Any:
    if isinstance(value, list):
        return value * count
    many = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return torch.cat([value] * count) if many else value


@torch.no_grad()
def promised(
    method: Method,
    call: Asked,
    finish: Callable[[Values, Tensor], Any],
    update: Callable[[], object],
) -> Future[Any]:
    """The result of `finish`, of maps and of what the function returns at the inputs, for a
    function that returns futures: all of its calls are made before any is waited for.
    """
    made: list[tuple[Shared, Any]] = []

    def ask(step: Pass) -> Tensor:
        shared = Shared.of(call, step.write())
        raw = call.forward(*shared.rows, *shared.further)
        if not isinstance(raw, torch.Future):
            raise ContractError(
                "when using attribute_future, initial_eval should have Future type rather than "
                f"{type(raw)}; use attribute for a function that returns tensors"
            )
        update()
        made.append((shared, raw))
        return torch.zeros(step.count, 1, device=call.inputs[0].device)

    first = ask(Pass(1, partial(copies, tuple(x[None] for x in call.inputs))))
    # What is asked does not depend on the answers: any number stands for them.
    _driven(passes(method, call, first), ask)

    @torch.no_grad()
    def answered(done: Future[Any]) -> Any:
        raws = [one.value() for one in done.value()]
        first = output_of(raws[0], call.target)
        pairs = zip(made[1:], raws[1:], strict=True)
        answers = (shared.numbers(raw, first.shape).double() for (shared, _), raw in pairs)
        return finish(_driven(passes(method, call, first), lambda _: next(answers)), first)

    return collect_all([one for _, one in made]).then(answered)
