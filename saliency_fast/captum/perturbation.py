"""Classes that perturb features: ablation, occlusion, permutation and Shapley values.

Rows are examples of the engine where the function is a module's and returns one independent number
per row. Elsewhere each call of the function has the whole batch once, or `perturbations_per_eval`
times, each time perturbed differently, and there are no other calls.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future, collect_all
from tqdm.auto import tqdm

from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import (
    AttributeCall,
    Attribution,
    PerturbationAttribution,
    calibrations_of,
    explained_by_rows,
    rows_depend,
)
from saliency_fast.captum.shared_calls import SharedCalls, copies_are_apart, together_or_apart
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.features import numbered
from saliency_fast.engine.independence import TOLERANCE
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import ContractError, ModelError
from saliency_fast.methods import coalitions, perturbation
from saliency_fast.methods.coalitions import Game, feature_count
from saliency_fast.model.casts import cast
from saliency_fast.model.layout import Layouts
from saliency_fast.model.preserve import preserved, random_states, restored_random_state

Values = tuple[Inputs, Tensor | None]
"""Maps per input [N, *], for the N numbers of the function, and by feature [N, F] where known."""
Answer = Callable[[Inputs], Tensor]
"""From perturbed batches [count, B, *] of one call to the function's numbers [count, N] of each,
float64."""


class Draws:
    """Draws by number, which repeat: the engine restores PyTorch's generator after a call."""

    def __init__(self) -> None:
        self.start = self.state = torch.get_rng_state()
        self.kept: dict[int, Any] = {}

    def restart(self) -> None:
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
    """A method with its call and draws; `finish` makes the result of the maps and first numbers."""

    method: Method
    call: AttributeCall
    finish: Callable[[Inputs, Tensor], Any]
    draws: Draws | None = None

    def attributed(self) -> Any:
        call, restored = _without_empty(self.call)
        with preserved(call.forward), progress_of(self.method, call) as bar:
            first = first_of(call)
            bar.update()
            if any(x.numel() for x in call.inputs):
                of = self.method, call, first, bar, (self.draws or Draws()).restart
                values = by_rows(*of) or _call_by_call(*of)
            else:
                values = _zeros(call, first), None
            bar.update((bar.total or bar.n) - bar.n)
        self._leave_draws()
        return self.finish(restored(values[0], first), first)

    @torch.no_grad()
    def promised(self) -> Future[Any]:
        """A future of the result: all calls are made before any is waited for."""
        call, restored = _without_empty(self.call)
        made: list[_SharedCall] = []

        def numbers(points: Inputs) -> Tensor:
            shared = _SharedCall(call, points)
            if not isinstance(shared.raw, torch.Future):
                raise ContractError(
                    "when using attribute_future, initial_eval should have Future type rather than "
                    f"{type(shared.raw)}; use attribute for a function that returns tensors"
                )
            bar.update()
            made.append(shared)
            return torch.zeros(shared.count, 1, device=call.inputs[0].device)

        with preserved(call.forward), progress_of(self.method, call) as bar:
            # No call depends on the results of others, for which any number stands.
            first = numbers(forms.copies(tuple(x[None] for x in call.inputs)))
            _by_batches(self.method, call, first, numbers)
        self._leave_draws()

        @torch.no_grad()
        def answered(done: Future[Any]) -> Any:
            raws = [one.value() for one in done.value()]
            first = numbers_of_output(raws[0], call.target)
            pairs = zip(made[1:], raws[1:], strict=True)
            answers = (shared.numbers(first.shape, raw) for shared, raw in pairs)
            values, _ = _by_batches(self.method, call, first, lambda _: next(answers))
            return self.finish(restored(values, first), first)

        return collect_all([one.raw for one in made]).then(answered)

    def _leave_draws(self) -> None:
        if self.draws is not None:
            torch.set_rng_state(self.draws.state)


def both_forms(parameters: str, plan: Callable[[Any, Any], PerturbationPlan]) -> tuple[Any, Any]:
    """`attribute` and `attribute_future` with these parameters, documented as `plan` is."""

    def attribute(self: Any, args: Any) -> Any:
        return plan(self, args).attributed()

    def attribute_future(self: Any, args: Any) -> Any:
        return plan(self, args).promised()

    for one in (attribute, attribute_future):
        one.__doc__ = plan.__doc__
        one.__qualname__ = plan.__qualname__.replace("_plan", one.__name__)
    first, second = (forms.with_parameters(parameters) for _ in range(2))
    return first(attribute), second(attribute_future)


def progress_of(method: Method, call: AttributeCall) -> Any:
    """A progress bar with Captum's words for the calls of the function, where one is shown."""
    recipe, total = method.recipe(), None
    if call.progress and isinstance(recipe, engine.RoundsRecipe):
        points = recipe.points
        if callable(points):
            wide = tuple(x[None] for x in call.inputs)
            points = points(wide, _features(call, recipe), Layouts([tuple(x.shape) for x in wide]))
        # The call at the inputs is one more.
        total = 1 + (recipe.baseline == "one") - (-int(points or 0) // call.at_once)
    return tqdm(total=total, desc=f"{call.progress} attribution", disable=not call.progress)


def _without_empty(call: AttributeCall) -> tuple[AttributeCall, Callable[[Inputs, Tensor], Inputs]]:
    """A call without inputs that have no elements, and what adds their zeros to the maps."""
    full = [number for number, x in enumerate(call.inputs) if x.numel()]
    if len(full) in (0, len(call.inputs)):
        return call, lambda maps, first: maps

    def forward(*args: Any) -> Any:
        inputs = list(call.inputs)
        for number, one in zip(full, args, strict=False):
            inputs[number] = one
        return call.forward(*inputs, *args[len(full) :])

    def restored(maps: Inputs, first: Tensor) -> Inputs:
        own = iter(maps)
        zeros = enumerate(_zeros(call, first))
        return tuple(next(own) if number in full else zero for number, zero in zeros)

    def some(several: Any) -> Any:
        return several and tuple(several[number] for number in full)

    few = {name: some(getattr(call, name)) for name in ("inputs", "baselines", "features")}
    return replace(call, forward=forward, **few), restored


def _zeros(call: AttributeCall, first: Tensor) -> Inputs:
    """Maps of zeros for each of the numbers at the inputs."""
    return tuple(x.new_zeros((first.numel(), *x.shape[1:])) for x in call.inputs)


@torch.no_grad()
def first_of(call: AttributeCall) -> Tensor:
    """The target's numbers of what the function returns at the inputs."""
    return numbers_of_output(
        call.forward(*forms.copies(call.inputs), *forms.as_args(call.further)), call.target
    )


def numbers_of_output(raw: Any, target: Any) -> Tensor:
    """The numbers that a function returns; raises ModelError where one is NaN or infinite."""
    result = forms.selected(forms.read_output(raw), target)
    finite = result.isfinite()
    if not bool(finite.all()):
        raise ModelError(
            f"the model's score is not finite: got {result[~finite][0]} among the inputs, their "
            "baselines and perturbed inputs, so there is no difference to take; look at what the "
            "model returns at the baseline"
        )
    return result


def by_rows(
    method: Method, call: AttributeCall, first: Tensor, bar: Any, restart: Callable[[], object]
) -> Values | None:
    """The maps by the engine, where the function is a module's and its numbers `first` at the
    inputs each depend on their own row; None elsewhere. `restart` is called where the method starts
    over.
    """
    calibrations = calibrations_of(call.forward)
    if not _has_independent_rows(call, first):
        return None
    result = explained_by_rows(method, call, calibrations, bar, restart)
    if any(probe.cost.drew for probe in calibrations.values()):
        # The next call must not drop out the same.
        torch.rand(1)
    return result


def _has_independent_rows(call: AttributeCall, first: Tensor) -> bool:
    """Whether rows alone have the numbers that they have among others; assumed where they draw."""
    if call.owner is None or not call.may_be_by_rows:
        return False
    batch, device = len(call.inputs[0]), call.inputs[0].device
    if first.shape[:1] != (batch,) or first.numel() != batch:
        return False
    expected = first.flatten().double()
    room = TOLERANCE.get(first.dtype, 0.0) * float(expected.abs().amax()) if batch else 0.0
    # Any row may be the one that makes others what they are; of a large batch some are compared.
    for number in dict.fromkeys((batch - 1, 0, batch // 2) if batch > 1 else ()):
        own = slice(number, number + 1), batch
        rows = (forms.row_of(x, *own).clone() for x in call.inputs)
        before = random_states(device)
        with restored_random_state(lambda: True, device), torch.no_grad():
            try:
                raw = call.forward(*rows, *forms.arguments_of(call.further, forms.row_of, *own))
                alone = numbers_of_output(raw, forms.row_of(call.target, *own)).double().flatten()
            except Exception:
                return False
            if not all(map(torch.equal, before, random_states(device))):
                return True
        if len(alone) != 1 or not abs(float(alone[0] - expected[number])) <= room:
            return False
    return True


def _features(call: AttributeCall, recipe: Recipe) -> Inputs:
    """Numbers of the features from 0, int64 [1, B, *]; without masks each element is one."""
    if not recipe.features:
        return ()
    masks = numbered(None, call.inputs) if call.features is None else call.features
    pairs = zip(masks, call.inputs, strict=True)
    stacked = tuple(x[None] for x in call.inputs)
    return numbered(tuple(one.expand(x.shape)[None] for one, x in pairs), stacked)


def _by_batches(method: Method, call: AttributeCall, first: Tensor, answer: Answer) -> Values:
    """The maps of a method, with the batch as one example of the N targets in `first`."""
    recipe = method.recipe()
    stacked = tuple(x[None] for x in call.inputs)
    starts = tuple(map(torch.zeros_like, stacked))
    if call.baselines is not None:
        pairs = zip(forms.filled(call.inputs, call.baselines), call.inputs, strict=True)
        starts = tuple(cast(one, x.dtype, "baselines").expand(x.shape)[None] for one, x in pairs)
    baseline_scores = None
    if recipe.baseline == "one":
        baseline_scores = answer(forms.copies(starts))
    scores = first.reshape(1, -1).double()
    about = engine.RoundContext(
        *(stacked, starts, scores, baseline_scores, call.at_once, _features(call, recipe)),
        layouts=Layouts([tuple(x.shape) for x in stacked]),
    )
    assert isinstance(recipe, engine.RoundsRecipe)
    rounds, result = recipe.rounds(about), None
    while True:
        try:
            step = rounds.send(result)  # type: ignore[arg-type]
        except StopIteration as over:
            return _values(over.value, call, first)
        result = None
        if isinstance(step, engine.Round):
            parts = [scores.new_zeros((0, scores.shape[1]))]
            for start in range(0, step.example.numel(), call.at_once):
                rows = slice(start, min(start + call.at_once, step.example.numel()))
                numbers = answer(step.write(step.example[rows], step.node[rows]))
                if step.each is None:
                    parts.append(numbers)
                else:
                    step.each(rows, engine.RoundResult(numbers))
            result = engine.RoundResult(torch.cat(parts))


def _values(maps: engine.Maps, call: AttributeCall, first: Tensor) -> Values:
    batch, count = len(call.inputs[0]), first.numel()
    pairs = zip(call.features or (), call.inputs, strict=False)
    own = any(one.dim() == x.dim() and len(one) > 1 for one, x in pairs)
    number = torch.arange(count, device=call.inputs[0].device)
    # A feature that only some rows have counts for the numbers of these rows.
    row = number // max(1, count // batch) if own else 0 * number
    values = tuple(one[0, number, row] for one in maps.values)
    extra = maps.extras.get("features")
    return values, None if extra is None else extra[0]


class _SharedCall:
    """A call of the function for perturbed batches [count, B, *], and what it returned."""

    def __init__(self, call: AttributeCall, points: Inputs) -> None:
        self.call, self.count = call, len(points[0])
        rows = tuple(x.flatten(0, 1) for x in points)
        further = forms.as_args(call.further)
        if self.count > 1:
            further = forms.arguments_of(further, forms.tiled, self.count, len(call.inputs[0]))
        self.raw = call.forward(*rows, *further)

    def numbers(self, single: torch.Size, raw: Any = None) -> Tensor:
        """The numbers [count, N] of `raw`, the result of a future, or of the call."""
        target, batch = self.call.target, len(self.call.inputs[0])
        one = isinstance(target, Tensor) and target.numel() == 1
        if self.count > 1 and not one:
            target = forms.tiled(target, self.count, batch)
        result = numbers_of_output(self.raw if raw is None else raw, target)
        grows = single and result.dim() and len(result) == self.count * single[0]
        if self.count > 1 and not grows:
            raise ContractError(
                "When perturbations_per_eval > 1, forward_func's output should be a tensor whose "
                f"1st dim grow with the input batch size: when input batch size is {batch}, the "
                f"output shape is {single}; when input batch size is {self.count * batch}, the "
                f"output shape is {result.shape}; pass perturbations_per_eval=1"
            )
        return result.reshape(self.count, -1).double()


@torch.no_grad()
def _call_by_call(
    method: Method, call: AttributeCall, first: Tensor, bar: Any, restart: Callable[[], object]
) -> Values:
    """The maps by calls of the function, which `bar` counts; as for `by_rows`."""

    def of(points: Inputs) -> Tensor:
        return _SharedCall(call, points).numbers(first.shape)

    def run(apart: bool) -> Values:
        def answer(points: Inputs) -> Tensor:
            bar.update()
            if not apart:
                return shared.numbers(points)
            return torch.cat([of(one) for one in zip(*(x[:, None] for x in points), strict=True)])

        return _by_batches(method, call, first, answer)

    def rewind() -> None:
        restart()
        bar.reset()
        bar.update()

    shared = SharedCalls(of, independent=copies_are_apart(call.forward))
    return together_or_apart(run, rewind, apart=rows_depend(call.forward))


MANY_FEATURES = 10
"""Features whose exact Shapley values take long."""
logger = logging.getLogger(__name__)


class FeatureAblation(PerturbationAttribution):
    """What the score loses with each feature at its baseline.

    Example:
        >>> FeatureAblation(lambda x: (x**2).sum(1)).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 4.]])
    """

    _perturbations_error = "Perturbations per evaluation must be an integer and at least 1."
    use_weights = False

    def _plan(self, args: Any) -> PerturbationPlan:
        """Attributions [B, *] of the inputs' shape; [N, *] where the function returns N numbers for
        a batch. `attribute_future` returns a `torch.futures.Future` of them, for a function that
        returns futures.
        """
        finish = partial(_of_dtype, args.inputs)
        return PerturbationPlan(perturbation.FeatureAblation(), self._call(args), finish)

    attribute, attribute_future = both_forms(
        "inputs, baselines=None, target=None, additional_forward_args=None, feature_mask=None, "
        "perturbations_per_eval=1, show_progress=False, **kwargs",
        _plan,
    )


def _of_dtype(inputs: Any, maps: Inputs, first: Tensor) -> Any:
    return forms.like_inputs(inputs, tuple(one.to(first.dtype) for one in maps))


class Occlusion(FeatureAblation):
    """What the score loses where a window hides the inputs, the mean over windows (Zeiler, 2014).

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> Occlusion(lambda x: x.sum(1)).attribute(x, (2,))
        tensor([[3.0000, 4.5000, 6.0000]])
    """

    use_weights = True

    @forms.with_parameters(
        "inputs, sliding_window_shapes, strides=None, baselines=None, target=None, "
        "additional_forward_args=None, perturbations_per_eval=1, show_progress=False"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape, in float32."""
        parts = forms.as_tuple(args.inputs)
        window, stride = forms.sliding_windows(args.sliding_window_shapes, args.strides, parts)
        call = self._call(args)

        def finish(maps: Inputs, first: Tensor) -> Any:
            values = []
            for one, width, step, x in zip(maps, window, stride, parts, strict=True):
                # Captum's sums become float32 before they are divided by the number of windows.
                shape = tuple(x.shape[1:])
                grid = perturbation.Grid.of(shape or (1,), width or (1,), step or (1,))
                count = grid.covering(shape or (1,)).view(shape).to(x.device)
                values.append((one.double() * count).to(first.dtype).float() / count.float())
            return forms.like_inputs(args.inputs, tuple(values))

        return PerturbationPlan(_Occluded(window, stride), call, finish).attributed()

    attribute_future = Attribution.attribute_future


@dataclass(frozen=True)
class _Occluded:
    """Windows over the axes after the batch, also where the batch is one example."""

    window: forms.Windows
    stride: forms.Windows
    name = "occlusion"

    def recipe(self) -> Recipe:
        def rounds(context: engine.RoundContext) -> engine.Rounds:
            return perturbation.occlusion_rounds(context, self._method(context.inputs))

        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return self._method(inputs).points(inputs, features, layouts)

        return engine.RoundsRecipe(rounds, points, baseline="fill", gradients=False)

    def _method(self, inputs: Inputs) -> perturbation.Occlusion:
        window, stride = [], []
        for x, width, step in zip(inputs, self.window, self.stride, strict=True):
            # A column that stands for [B] has a window of one; a batch in one example is hidden as
            # a whole.
            before = tuple(x.shape[1 : x.dim() - len(width)])
            window.append((*before, *width))
            stride.append((*before, *step))
        return perturbation.Occlusion(tuple(window), tuple(stride))


def _permute_feature(x: Tensor, feature_mask: Tensor) -> Tensor:
    """The batch with a feature's values in another order, from PyTorch's global generator."""
    count = len(x)
    if count < 2:
        raise ContractError("cannot permute features with batch_size = 1; pass two rows or more")
    still = torch.arange(count, device="cpu")
    order = torch.randperm(count, device="cpu")
    while bool((order == still).all()):
        order = torch.randperm(count, device="cpu")
    return torch.where(feature_mask.bool(), x[order.to(x.device)], x)


class FeaturePermutation(FeatureAblation):
    """What the score loses with each feature permuted within the batch (Breiman, 2001).

    Args:
        forward_func: see `Attribution`.
        perm_func: returns a tensor [B, *] with the elements of a mask [1 | B, *] permuted.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
        >>> FeaturePermutation(lambda x: x.sum(1)).attribute(x)
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        perm_func: Callable[[Tensor, Tensor], Tensor] = _permute_feature,
    ) -> None:
        super().__init__(forward_func)
        self.perm_func = perm_func
        self._min_examples_per_batch_grouped = 2

    def _plan(self, args: Any) -> PerturbationPlan:
        """Attributions as of FeatureAblation; zeros, with a warning in the log, for features of a
        tensor with too few rows to permute.
        """
        parts, call = forms.as_tuple(args.inputs), self._call(args)
        full = tuple(x for x in parts if x.numel())
        few = self._features_of_few_rows(parts, call.features or forms.default_masks(parts))
        draws = Draws()
        method = _Permuted(self.perm_func, full, call.at_once, few, draws)
        finish = partial(_of_dtype, args.inputs)
        return PerturbationPlan(method, replace(call, baselines=None), finish, draws)

    attribute, attribute_future = both_forms(
        "inputs, target=None, additional_forward_args=None, feature_mask=None, "
        "perturbations_per_eval=1, show_progress=False, **kwargs",
        _plan,
    )

    def _features_of_few_rows(self, inputs: Inputs, masks: Inputs) -> frozenset[int]:
        """Features, counted without gaps as the engine does, that are not permuted."""
        least, few = self._min_examples_per_batch_grouped, set[int]()
        pairs = zip(inputs, masks, strict=True)
        short = [mask for x, mask in pairs if x.numel() and len(x) < least]
        numbers = forms.numbers_of(masks, inputs).tolist() if short else []
        for number in (one for mask in short for one in set(mask.flatten().tolist())):
            few.add(numbers.index(number))
            logger.warning(
                "Skipping feature group [%s] since it contains at least one input tensor with 0th "
                "dim less than %s",
                *(number, least),
            )
        return frozenset(few)


@dataclass(frozen=True, eq=False)
class _Permuted:
    """Features permuted by a function of the batch. together: features whose permutations are drawn
    one input after another, as in Captum. few: features of too few rows, which are left out.
    """

    permute: Callable[[Tensor, Tensor], Tensor]
    inputs: Inputs
    together: int
    few: frozenset[int]
    draws: Draws
    name = "feature_permutation"

    def recipe(self) -> Recipe:
        return engine.RoundsRecipe(self._rounds, feature_count, gradients=False, features=True)

    def _rounds(self, context: engine.RoundContext) -> engine.Rounds:
        game = Game.of(context)
        values = context.scores.new_zeros((*context.scores.shape, game.count))
        features = [one for one in range(game.count) if one not in self.few]
        permuted = self._permuted(game, features)

        def write(example: Tensor, node: Tensor) -> Inputs:
            several, row = torch.unique(node, return_inverse=True)
            tables = zip(*map(permuted, several.tolist()), strict=True)
            return tuple(
                torch.stack(own).view(-1, *x.shape)[row, example].contiguous()
                for x, own in zip(context.inputs, tables, strict=True)
            )

        def each(rows: slice, result: engine.RoundResult) -> None:
            own = example[rows]
            values[own, :, node[rows]] = context.scores[own] - result.scores

        batch = len(context.inputs[0])
        node = torch.tensor(features, device=game.device).repeat_interleave(batch)
        example = torch.arange(batch, device=game.device).repeat(len(features))
        yield engine.Round(write, example, node, each=each)
        return game.maps(values, None, sums=False)

    def _permuted(self, game: Game, features: list[int]) -> Callable[[int], Inputs]:
        """A function that permutes one feature; groups draw in Captum's order, once."""
        groups, states, kept = list[list[int]](), list[Tensor](), dict[int, Inputs]()
        for feature in features:
            if not groups or feature >= groups[-1][0] + self.together:
                groups.append([])
            groups[-1].append(feature)
        group_of = {one: number for number, group in enumerate(groups) for one in group}

        def draw(group: list[int]) -> None:
            kept.clear()
            with self.draws.continued():
                kept.update(zip(group, self._drawn(game, group), strict=True))

        def permuted(feature: int) -> Inputs:
            number = group_of[feature]
            if number < len(states) and feature not in kept:
                now, self.draws.state = self.draws.state, states[number]
                draw(groups[number])
                self.draws.state = now
            while number >= len(states):
                states.append(self.draws.state)
                draw(groups[len(states) - 1])
            return kept[feature]

        return permuted

    def _drawn(self, game: Game, features: list[int]) -> list[Inputs]:
        """The inputs with each of some features permuted."""
        columns = []
        for x, segment in zip(self.inputs, game.segments, strict=True):
            masks = [segment.view(-1, *x.shape[1:]) == feature for feature in features]
            some = any(bool(mask.any()) for mask in masks)
            columns.append([self.permute(x, mask) if some else x for mask in masks])
        return list(zip(*columns, strict=True))


class ShapleyValueSampling(PerturbationAttribution):
    """The mean gains of features in random orders (Castro, 2009), from PyTorch's global generator.

    Example:
        >>> method = ShapleyValueSampling(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), n_samples=2)
        tensor([[ 3., -6.]])
    """

    _perturbations_error = "Ablations per evaluation must be at least 1."

    def _plan(self, args: Any) -> PerturbationPlan:
        """Attributions in float32, [*output, *]: of the inputs' shape for one number per row.
        `attribute_future` returns a future of them, for a function that returns futures.
        """
        parts = forms.as_tuple(args.inputs)
        forms.check_baselines(parts, forms.as_baselines(args.baselines, parts))
        call = self._call(args)
        masks = call.features or forms.default_masks(parts)
        numbers = forms.numbers_of(masks, parts).tolist()
        # As many as Captum counts.
        count = max(len(numbers), 1 + max(int(one.max()) for one in masks if one.numel()))
        draws = Draws()
        method = self._method(getattr(args, "n_samples", 0), numbers, count, draws)
        finish = partial(_like_output, args.inputs)
        return PerturbationPlan(method, replace(call, features=masks), finish, draws)

    attribute, attribute_future = both_forms(
        "inputs, baselines=None, target=None, additional_forward_args=None, feature_mask=None, "
        "n_samples=25, perturbations_per_eval=1, show_progress=False",
        _plan,
    )

    def _method(self, samples: int, numbers: list[int], count: int, draws: Draws) -> Method:
        if len(numbers) < count:
            warnings.warn(
                "Feature mask is missing some integers between 0 and num_features, for optimal "
                "performance, make sure each consecutive integer corresponds to a feature.",
                stacklevel=6,
            )
        return _RandomOrders(samples, numbers, count, draws)


def _like_output(inputs: Any, maps: Inputs, first: Tensor) -> Any:
    shape = first.shape or (1,)
    pairs = zip(maps, forms.as_tuple(inputs), strict=True)
    values = tuple(one.float().view(*shape, *x.shape[1:]) for one, x in pairs)
    return forms.like_inputs(inputs, values)


class ShapleyValues(ShapleyValueSampling):
    """Exact Shapley values (Shapley, 1953), from 2^F points for F features; Captum takes F * F!.

    Example:
        >>> ShapleyValues(lambda x: x.prod(1)).attribute(torch.tensor([[1.0, 4.0]]))
        tensor([[2., 2.]])
    """

    # As in Captum `attribute_future` is inherited, and its n_samples does nothing.
    attribute, _ = both_forms(
        "inputs, baselines=None, target=None, additional_forward_args=None, feature_mask=None, "
        "perturbations_per_eval=1, show_progress=False",
        ShapleyValueSampling._plan,
    )

    def _method(self, samples: int, numbers: list[int], count: int, draws: Draws) -> Method:
        if count >= MANY_FEATURES:
            warnings.warn(
                "You are attempting to compute Shapley Values with at least 10 features, which "
                "will likely be very computationally expensive.Consider using Shapley Value "
                "Sampling instead.",
                stacklevel=6,
            )
        return coalitions.ShapleyValues()


@dataclass(frozen=True)
class _RandomOrders:
    """Orders of all numbers up to `count`, of which only some are features'."""

    orders: int
    numbers: list[int]
    count: int
    draws: Draws
    name = "shapley_sampling"

    def recipe(self) -> Recipe:
        of = self._rounds, max(1, self.orders * (len(self.numbers) - 1))
        return engine.RoundsRecipe(*of, baseline="one", gradients=False, features=True)

    def _rounds(self, context: engine.RoundContext) -> engine.Rounds:
        game, drawn = Game.of(context), self.draws.kept
        numbers = torch.tensor(self.numbers, device="cpu") - min(0, self.numbers[0])

        def order_ranks(start: int, stop: int) -> Tensor:
            if start not in drawn:
                with self.draws.continued():
                    orders = [torch.randperm(self.count, device="cpu") for _ in range(start, stop)]
                drawn[start] = torch.stack(orders)
            position = drawn[start].argsort(dim=1)[:, numbers]
            ranks: Tensor = position.argsort(dim=1).argsort(dim=1)[None].to(game.device)
            return ranks

        return coalitions.permutation_rounds(game, self.orders, order_ranks, 1)
