"""Calls of perturbation classes: on the engine, or call by call as in Captum.

Where the function is a module's and returns one independent number per row, rows are examples of
the engine. Elsewhere (a number for the batch, several per row, rows that depend on each other, a
function without a module) each call of the function has the whole batch once, or
`perturbations_per_eval` times, each time perturbed differently, and there are no other calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.futures import Future, collect_all
from tqdm.auto import tqdm

from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import (
    arguments_of,
    as_args,
    copies,
    filled,
    public,
    row_of,
    tiled,
)
from saliency_fast.captum.attribute_call import (
    AttributeCall,
    explained_by_rows,
    known_points,
    rows_depend,
)
from saliency_fast.captum.forward import read_output, selected
from saliency_fast.captum.shared_calls import SharedCalls, copies_are_apart, together_or_apart
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.features import numbered
from saliency_fast.engine.independence import TOLERANCE
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import ContractError, ModelError
from saliency_fast.model.casts import cast
from saliency_fast.model.layout import Layouts
from saliency_fast.model.preserve import preserved, random_states, restored_random_state

Values = tuple[Inputs, Tensor | None]
"""Maps per input [N, *], for the N numbers of the function, and by feature [N, F] where known."""
Batches = Generator[Inputs, Tensor, Values]
"""A method at work: yields perturbed batches [count, B, *] for one call, and is sent the function's
numbers [count, N] for each, float64."""
P = ParamSpec("P")


class Draws:
    """What a method draws from PyTorch's global generator, which the engine puts back after a call:
    the state that the method leaves it in, and draws by number, for those that are asked again.
    """

    def __init__(self) -> None:
        self.start = self.state = torch.get_rng_state()
        self.kept: dict[int, Any] = {}

    def again(self) -> None:
        """As if nothing had been drawn."""
        self.state = self.start
        self.kept.clear()

    @contextmanager
    def continued(self) -> Iterator[None]:
        """Inside, draws go on from where they were."""
        torch.set_rng_state(self.state)
        yield
        self.state = torch.get_rng_state()


@dataclass(frozen=True)
class PerturbationPlan:
    """What a perturbation class makes of its arguments.

    Args:
        method: of the engine.
        call: its call.
        finish: makes the result of the maps and of the numbers that the function returns at the
            inputs.
        draws: what the method draws, where it does.
    """

    method: Method
    call: AttributeCall
    finish: Callable[[Inputs, Tensor], Any]
    draws: Draws | None = None

    def attributed(self) -> Any:
        """The result."""
        call, restored = _without_empty(self.call)
        with preserved(call.forward), progress_of(self.method, call) as bar:
            first = first_of(call)
            bar.update()
            if any(x.numel() for x in call.inputs):
                again = (self.draws or Draws()).again
                values = by_rows(self.method, call, first, again, bar)
                values = values or _call_by_call(self.method, call, first, bar, again)
            else:
                values = (
                    tuple(x.new_zeros((first.numel(), *x.shape[1:])) for x in call.inputs),
                    None,
                )
            bar.update((bar.total or bar.n) - bar.n)
        self._leave_draws()
        return self.finish(restored(values[0], first), first)

    def promised(self) -> Future[Any]:
        """A future of the result, for a function that returns futures."""
        call, restored = _without_empty(self.call)

        def finish(maps: Inputs, first: Tensor) -> Any:
            return self.finish(restored(maps, first), first)

        with preserved(call.forward), progress_of(self.method, call) as bar:
            found = _promised(self.method, call, finish, bar.update)
        self._leave_draws()
        return found

    def _leave_draws(self) -> None:
        if self.draws is not None:
            torch.set_rng_state(self.draws.state)


def both_forms(
    plan: Callable[P, PerturbationPlan],
) -> tuple[Callable[P, Any], Callable[P, Future[Any]]]:
    """`attribute` and `attribute_future` of a class, which have the arguments and the documentation
    of the method that plans a call.
    """

    @wraps(plan)
    def attribute(*args: P.args, **kwargs: P.kwargs) -> Any:
        return plan(*args, **kwargs).attributed()

    @wraps(plan)
    def attribute_future(*args: P.args, **kwargs: P.kwargs) -> Future[Any]:
        return plan(*args, **kwargs).promised()

    attribute.__name__, attribute_future.__name__ = "attribute", "attribute_future"
    return public(attribute), public(attribute_future)


def progress_of(method: Method, call: AttributeCall) -> Any:
    """A progress bar with Captum's words for the calls of the function, where one is shown."""
    total = _count_of_calls(method, call) if call.progress else None
    return tqdm(total=total, desc=f"{call.progress} attribution", disable=not call.progress)


def _count_of_calls(method: Method, call: AttributeCall) -> int:
    """Calls of the function that a method makes, the one at the inputs included."""
    recipe = method.recipe()
    assert isinstance(recipe, engine.RoundsRecipe)
    points = recipe.points
    if callable(points):
        wide = tuple(x[None] for x in call.inputs)
        points = points(wide, _features(call, recipe), Layouts([tuple(x.shape) for x in wide]))
    return 1 + (recipe.baseline == "one") - (-int(points or 0) // call.at_once)


def _without_empty(call: AttributeCall) -> tuple[AttributeCall, Callable[[Inputs, Tensor], Inputs]]:
    """A call without the inputs that have no elements, which the function still gets, and what adds
    zeros for them to the maps.
    """
    full = [number for number, x in enumerate(call.inputs) if x.numel()]
    if len(full) in (0, len(call.inputs)):
        return call, lambda maps, first: maps

    def forward(*given: Any) -> Any:
        inputs = list(call.inputs)
        for number, one in zip(full, given, strict=False):
            inputs[number] = one
        return call.forward(*inputs, *given[len(full) :])

    def restored(maps: Inputs, first: Tensor) -> Inputs:
        values = [x.new_zeros((first.numel(), *x.shape[1:])) for x in call.inputs]
        for number, one in zip(full, maps, strict=True):
            values[number] = one
        return tuple(values)

    def some(several: Any) -> Any:
        return several and tuple(several[number] for number in full)

    few = {name: some(getattr(call, name)) for name in ("inputs", "baselines", "features")}
    return replace(call, forward=forward, **few), restored


@torch.no_grad()
def first_of(call: AttributeCall) -> Tensor:
    """The target's numbers of what the function returns at the inputs."""
    return numbers_of_output(
        call.forward(*copies(call.inputs), *as_args(call.further)), call.target
    )


def numbers_of_output(raw: Any, target: Any) -> Tensor:
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


def by_rows(
    method: Method, call: AttributeCall, first: Tensor, again: Callable[[], object], bar: Any
) -> Values | None:
    """The maps by the engine, where the function is a module's and the numbers `first` that it
    returns for the inputs are seen to depend each on its own row; None elsewhere. `again` is called
    where the method starts over.
    """
    known = known_points(call.forward)
    if not _has_independent_rows(call, first):
        return None
    found = explained_by_rows(method, call, known, bar, again)
    if any(probe.cost.drew for probe in known.values()):
        # The next call must not drop out the same.
        torch.rand(1)
    return found


def _has_independent_rows(call: AttributeCall, first: Tensor) -> bool:
    """Whether rows have alone the numbers that they have among the others. A function that draws is
    taken at its word.
    """
    if call.owner is None or not call.may_be_by_rows:
        return False
    batch, device = len(call.inputs[0]), call.inputs[0].device
    if first.shape[:1] != (batch,) or first.numel() != batch:
        return False
    expected = first.flatten().double()
    room = TOLERANCE.get(first.dtype, 0.0) * float(expected.abs().amax()) if batch else 0.0
    # Any row may be the one that makes others what they are; of a large batch some are asked.
    for number in dict.fromkeys((batch - 1, 0, batch // 2) if batch > 1 else ()):
        own = slice(number, number + 1), batch
        rows = (row_of(x, *own).clone() for x in call.inputs)
        before = random_states(device)
        with restored_random_state(lambda: True, device), torch.no_grad():
            try:
                raw = call.forward(*rows, *arguments_of(call.further, row_of, *own))
                alone = numbers_of_output(raw, row_of(call.target, *own)).double().flatten()
            except Exception:
                return False
            if not all(map(torch.equal, before, random_states(device))):
                return True
        if len(alone) != 1 or not abs(float(alone[0] - expected[number])) <= room:
            return False
    return True


def _features(call: AttributeCall, recipe: Recipe) -> Inputs:
    """Numbers of the features from 0, int64 [1, B, *]: without masks, one for each element of a
    row.
    """
    if not recipe.features:
        return ()
    masks = numbered(None, call.inputs) if call.features is None else call.features
    pairs = zip(masks, call.inputs, strict=True)
    whole = tuple(x[None] for x in call.inputs)
    return numbered(tuple(one.expand(x.shape)[None] for one, x in pairs), whole)


def _batches(method: Method, call: AttributeCall, first: Tensor) -> Batches:
    """The rounds of a method, with the batch as one example of N targets; `first` holds the N
    numbers at the inputs.
    """
    recipe = method.recipe()
    whole = tuple(x[None] for x in call.inputs)
    starts = tuple(map(torch.zeros_like, whole))
    if call.baselines is not None:
        pairs = zip(filled(call.inputs, call.baselines), call.inputs, strict=True)
        starts = tuple(cast(one, x.dtype, "baselines").expand(x.shape)[None] for one, x in pairs)
    baseline_scores = None
    if recipe.baseline == "one":
        baseline_scores = yield copies(starts)
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
            parts = [scores.new_zeros((0, scores.shape[1]))]
            for start in range(0, step.example.numel(), call.at_once):
                rows = slice(start, min(start + call.at_once, step.example.numel()))
                numbers = yield step.write(step.example[rows], step.node[rows])
                if step.each is None:
                    parts.append(numbers)
                else:
                    step.each(rows, engine.RoundResult(numbers))
            found = engine.RoundResult(torch.cat(parts))


def _values(maps: engine.Maps, call: AttributeCall, first: Tensor) -> Values:
    """A map for each of the N numbers."""
    batch, count = len(call.inputs[0]), first.numel()
    pairs = zip(call.features or (), call.inputs, strict=False)
    own = any(one.dim() == x.dim() and len(one) > 1 for one, x in pairs)
    number = torch.arange(count, device=call.inputs[0].device)
    # A feature that only some rows have counts for the numbers of these rows.
    row = number // max(1, count // batch) if own else 0 * number
    values = tuple(one[0, number, row] for one in maps.values)
    extra = maps.extras.get("features")
    return values, None if extra is None else extra[0]


def _driven(batches: Batches, answer: Callable[[Inputs], Tensor]) -> Values:
    """The values of a method whose perturbed batches are answered one after another."""
    sent: Any = None
    while True:
        try:
            points = batches.send(sent)
        except StopIteration as over:
            found: Values = over.value
            return found
        sent = answer(points)


@dataclass(frozen=True)
class _SharedCall:
    """A call of the function for several perturbed batches, and what it returned."""

    call: AttributeCall
    count: int
    raw: Any

    @classmethod
    def of(cls, call: AttributeCall, points: Inputs) -> _SharedCall:
        """points: [count, B, *] per input. Targets and arguments of B rows go with each batch."""
        count, batch = len(points[0]), len(call.inputs[0])
        rows = tuple(x.flatten(0, 1) for x in points)
        further = as_args(call.further)
        if count > 1:
            further = arguments_of(further, tiled, count, batch)
        return cls(call, count, call.forward(*rows, *further))

    def numbers(self, single: torch.Size, raw: Any = None) -> Tensor:
        """The numbers [count, N], where the inputs alone give an output of the shape `single`; raw:
        what became of a future.
        """
        target, batch = self.call.target, len(self.call.inputs[0])
        one = isinstance(target, Tensor) and target.numel() == 1
        if self.count > 1 and not one:
            target = tiled(target, self.count, batch)
        found = numbers_of_output(self.raw if raw is None else raw, target)
        if self.count > 1 and (
            not single or not found.dim() or len(found) != self.count * single[0]
        ):
            raise ContractError(
                "When perturbations_per_eval > 1, forward_func's output should be a tensor whose "
                f"1st dim grow with the input batch size: when input batch size is {batch}, the "
                f"output shape is {single}; when input batch size is {self.count * batch}, the "
                f"output shape is {found.shape}; pass perturbations_per_eval=1"
            )
        return found.reshape(self.count, -1).double()


@torch.no_grad()
def _call_by_call(
    method: Method, call: AttributeCall, first: Tensor, bar: Any, again: Callable[[], object]
) -> Values:
    """The maps of a method by calls of the function, which `bar` counts; `again` is called where
    the method starts over.
    """

    def of(points: Inputs) -> Tensor:
        return _SharedCall.of(call, points).numbers(first.shape)

    def run(apart: bool) -> Values:
        def answer(points: Inputs) -> Tensor:
            if apart:
                singles = zip(*(x[:, None] for x in points), strict=True)
                numbers = torch.cat(list(map(of, singles)))
            else:
                numbers = shared.numbers(points)
            bar.update()
            return numbers

        return _driven(_batches(method, call, first), answer)

    def rewind() -> None:
        again()
        bar.reset()
        bar.update()

    shared = SharedCalls(of, independent=copies_are_apart(call.forward))
    return together_or_apart(run, rewind, apart=rows_depend(call.forward))


@torch.no_grad()
def _promised(
    method: Method,
    call: AttributeCall,
    finish: Callable[[Inputs, Tensor], Any],
    update: Callable[[], object],
) -> Future[Any]:
    """A future of what `finish` makes of the maps and of the numbers at the inputs: all calls of
    the function are made before any of its futures is waited for.
    """
    made: list[_SharedCall] = []

    def ask(points: Inputs) -> Tensor:
        shared = _SharedCall.of(call, points)
        if not isinstance(shared.raw, torch.Future):
            raise ContractError(
                "when using attribute_future, initial_eval should have Future type rather than "
                f"{type(shared.raw)}; use attribute for a function that returns tensors"
            )
        update()
        made.append(shared)
        return torch.zeros(shared.count, 1, device=call.inputs[0].device)

    # What is asked does not depend on the answers: any number stands for them.
    _driven(_batches(method, call, ask(copies(tuple(x[None] for x in call.inputs)))), ask)

    @torch.no_grad()
    def answered(done: Future[Any]) -> Any:
        raws = [one.value() for one in done.value()]
        first = numbers_of_output(raws[0], call.target)
        pairs = zip(made[1:], raws[1:], strict=True)
        answers = (shared.numbers(first.shape, raw) for shared, raw in pairs)
        values, _ = _driven(_batches(method, call, first), lambda _: next(answers))
        return finish(values, first)

    return collect_all([one.raw for one in made]).then(answered)
