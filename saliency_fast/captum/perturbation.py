"""Classes that perturb the inputs feature by feature: ablation, occlusion, permutation and Shapley
values.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import (
    as_baselines,
    as_tuple,
    check_baselines,
    default_masks,
    like_inputs,
    numbers_of,
    public,
)
from saliency_fast.captum.attribution import Attribution, PerturbationAttribution
from saliency_fast.captum.perturbed import Draws, PerturbationPlan, both_forms
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.errors import ContractError
from saliency_fast.methods import ablation, occlusion, shapley
from saliency_fast.methods.occlusion import read_windows
from saliency_fast.methods.parts.coalitions import Game, feature_count
from saliency_fast.model.layout import Layouts

MANY_FEATURES = 10
"""Features whose exact Shapley values take long."""
Windows = tuple[tuple[int, ...], ...]
logger = logging.getLogger(__name__)


class FeatureAblation(PerturbationAttribution):
    """What the score loses with each feature at its baseline.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import FeatureAblation
        >>> FeatureAblation(lambda x: (x**2).sum(1)).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 4.]])
    """

    _perturbations_error = "Perturbations per evaluation must be an integer and at least 1."

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.use_weights = False

    def _plan(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> PerturbationPlan:
        """Attributes to the inputs; see `Attribution` for the arguments.

        Returns:
            Attributions [B, *] of the inputs' shape; [N, *] where the function returns N numbers
            for a batch. `attribute_future` returns a `torch.futures.Future` of them, for a function
            that returns futures.
        """
        of = inputs, baselines, target, additional_forward_args, feature_mask
        call = self._call(*of, perturbations_per_eval, show_progress)
        return PerturbationPlan(ablation.FeatureAblation(), call, partial(_of_dtype, inputs))

    attribute, attribute_future = both_forms(_plan)


def _of_dtype(inputs: Any, maps: Inputs, first: Tensor) -> Any:
    return like_inputs(inputs, tuple(one.to(first.dtype) for one in maps))


class Occlusion(FeatureAblation):
    """What the score loses where a window hides the inputs, the mean over windows (Zeiler, 2014).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import Occlusion
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> Occlusion(lambda x: x.sum(1)).attribute(x, (2,))
        tensor([[3.0000, 4.5000, 6.0000]])
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.use_weights = True

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        sliding_window_shapes: Any,
        strides: Any = None,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            sliding_window_shapes: the window's size on each axis after the batch; a tuple of such
                tuples for a tuple of inputs.
            strides: the step of the window, a number or one for each axis (None: 1); a tuple of
                them for a tuple of inputs.

        Returns:
            Attributions of the inputs' shape, in float32.
        """
        parts = as_tuple(inputs)
        window, stride = _read_windows(sliding_window_shapes, strides, parts)
        of = parts, baselines, target, additional_forward_args, None
        call = self._call(*of, perturbations_per_eval, show_progress)

        def finish(maps: Inputs, first: Tensor) -> Any:
            values = []
            for one, width, step, x in zip(maps, window, stride, parts, strict=True):
                # Captum's sums become float32 before they are divided by the number of windows.
                count = _windows_at(width, step, x).to(x.device)
                values.append((one.double() * count).to(first.dtype).float() / count.float())
            return like_inputs(inputs, tuple(values))

        return PerturbationPlan(_Occluded(window, stride), call, finish).attributed()

    attribute_future = Attribution.attribute_future


def _windows_at(window: tuple[int, ...], stride: tuple[int, ...], x: Tensor) -> Tensor:
    """How many windows cover each element after the batch axis, float64; 1 where there is none
    after it.
    """
    shape = torch.Size((1, *x.shape[1:])) if window else torch.Size((1, 1))
    (grid,) = read_windows((window or (1,),), (stride or (1,),), Layouts([tuple(shape)]))
    return grid.covering(tuple(shape[1:])).view(x.shape[1:])


@dataclass(frozen=True)
class _Occluded:
    """Windows over the axes after the batch, also where the batch is one example."""

    window: Windows
    stride: Windows
    name = "occlusion"

    def recipe(self) -> Recipe:
        def rounds(asked: engine.RoundContext) -> engine.Rounds:
            return occlusion.occlusion_rounds(asked, self._method(asked.inputs))

        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return self._method(inputs).points(inputs, features, layouts)

        return engine.RoundsRecipe(rounds, points, baseline="fill", gradients=False)

    def _method(self, inputs: Inputs) -> occlusion.Occlusion:
        window, stride = [], []
        for x, width, step in zip(inputs, self.window, self.stride, strict=True):
            # A column that stands for [B] has a window of one; a batch in one example is hidden as
            # a whole.
            before = tuple(x.shape[1 : x.dim() - len(width)])
            window.append((*before, *width))
            stride.append((*before, *step))
        return occlusion.Occlusion(tuple(window), tuple(stride))


def _read_windows(shapes: Any, strides: Any, inputs: Inputs) -> tuple[Windows, Windows]:
    """A window and a stride for each axis after the batch axis of each input."""
    steps = (1,) * len(inputs) if strides is None else strides
    if len(inputs) == 1 and not (isinstance(steps, tuple) and len(steps) == 1):
        steps = (steps,)
    if not isinstance(steps, tuple) or len(steps) != len(inputs):
        raise ContractError(
            f"Strides must be provided for each input tensor. Got {strides!r} for {len(inputs)} "
            "inputs; pass a tuple with an entry per input"
        )
    for number, (step, x) in enumerate(zip(steps, inputs, strict=True)):
        if not isinstance(step, int) and not (isinstance(step, tuple) and len(step) == x.dim() - 1):
            raise ContractError(
                f"Stride for input index {number} is {step}, which is invalid for input with shape "
                f"{x.shape}. It must be either an int or a tuple with length equal to "
                "len(input_shape) - 1."
            )
    if len(shapes) and isinstance(shapes[0], int):
        shapes = (shapes,)
    if len(shapes) != len(inputs):
        raise ContractError(
            "Must provide sliding window dimensions for each input tensor. Got "
            f"{shapes!r} for {len(inputs)} inputs; pass a tuple with a tuple per input"
        )
    wide = []
    for number, (shape, step, x) in enumerate(zip(shapes, steps, inputs, strict=True)):
        if not isinstance(shape, tuple) or len(shape) != x.dim() - 1:
            raise ContractError(
                f"Occlusion shape for input index {number} is {shape} but should be a tuple with "
                f"{x.dim()} dimensions. Leave out the batch: {x.dim() - 1} numbers"
            )
        wide.append(step if isinstance(step, tuple) else (step,) * len(shape))
        _check_window(shape, wide[-1], tuple(x.shape[1:]))
    return tuple(shapes), tuple(wide)


def _check_window(shape: tuple[int, ...], step: tuple[int, ...], size: tuple[int, ...]) -> None:
    if any(width > most for width, most in zip(shape, size, strict=True)):
        raise ContractError(
            f"Sliding window dimensions {shape} cannot exceed input dimensions{size}. Use a "
            "smaller window"
        )
    if any(one < 1 for one in (*shape, *step)):
        raise ContractError(
            f"Sliding windows and strides must be at least 1: got {shape} and {step}"
        )
    if any(s > w and w < n for s, w, n in zip(step, shape, size, strict=True)):
        raise ContractError(
            f"Stride dimension {step} cannot be larger than sliding window shape dimension "
            f"{shape}. Use a smaller stride"
        )


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
        >>> import torch
        >>> from saliency_fast.captum import FeaturePermutation
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

    def _plan(  # type: ignore[override]
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> PerturbationPlan:
        """Attributes to the inputs; see `Attribution` for the arguments.

        Returns:
            Attributions as of FeatureAblation; zeros, with a warning in the log, for features of a
            tensor with too few rows to permute.
        """
        parts = as_tuple(inputs)
        of = parts, None, target, additional_forward_args, feature_mask
        call = self._call(*of, perturbations_per_eval, show_progress)
        full = tuple(x for x in parts if x.numel())
        few = self._features_of_few_rows(parts, call.features or default_masks(parts))
        draws = Draws()
        method = _Permuted(self.perm_func, full, call.at_once, few, draws)
        return PerturbationPlan(
            method, replace(call, baselines=None), partial(_of_dtype, inputs), draws
        )

    attribute, attribute_future = both_forms(_plan)  # type: ignore[assignment]

    def _features_of_few_rows(self, inputs: Inputs, masks: Inputs) -> frozenset[int]:
        """Features, counted without gaps as the engine does, that are not permuted."""
        own = [(x, mask) for x, mask in zip(inputs, masks, strict=True) if x.numel()]
        numbers = numbers_of(masks, inputs).tolist() if own else []
        few, least = set[int](), self._min_examples_per_batch_grouped
        for number in (
            one for x, mask in own if len(x) < least for one in set(mask.flatten().tolist())
        ):
            few.add(numbers.index(number))
            logger.warning(
                "Skipping feature group [%s] since it contains at least one input tensor with 0th "
                "dim less than %s",
                *(number, least),
            )
        return frozenset(few)


@dataclass(frozen=True, eq=False)
class _Permuted:
    """Features permuted by a function of the whole batch, as a method of the engine.

    Args:
        permute: the function.
        inputs: the whole batch.
        together: features whose permutations are drawn one input after another, as Captum does.
        few: features of tensors with too few rows, which are left out.
        draws: the generator's states.
    """

    permute: Callable[[Tensor, Tensor], Tensor]
    inputs: Inputs
    together: int
    few: frozenset[int]
    draws: Draws
    name = "feature_permutation"

    def recipe(self) -> Recipe:
        return engine.RoundsRecipe(self._rounds, feature_count, gradients=False, features=True)

    def _rounds(self, asked: engine.RoundContext) -> engine.Rounds:
        game = Game.of(asked)
        values = asked.scores.new_zeros((*asked.scores.shape, game.count))
        features = [one for one in range(game.count) if one not in self.few]
        permuted = self._permuted(game, features)

        def write(example: Tensor, place: Tensor) -> Inputs:
            several, row = torch.unique(place, return_inverse=True)
            tables = [permuted(feature) for feature in several.tolist()]
            found = []
            for x, own in zip(asked.inputs, zip(*tables, strict=True), strict=True):
                found.append(torch.stack(own).view(-1, *x.shape)[row, example].contiguous())
            return tuple(found)

        def each(rows: slice, found: engine.RoundResult) -> None:
            own = example[rows]
            values[own, :, place[rows]] = asked.scores[own] - found.scores

        batch = len(asked.inputs[0])
        place = torch.tensor(features, device=game.device).repeat_interleave(batch)
        example = torch.arange(batch, device=game.device).repeat(len(features))
        yield engine.Round(write, example, place, each=each)
        return game.maps(values, None, sums=False)

    def _permuted(self, game: Game, features: list[int]) -> Callable[[int], Inputs]:
        """A function that returns the inputs with a feature permuted: groups of features draw in
        Captum's order, and a group that is asked for again draws the same.
        """
        groups, states, kept = list[list[int]](), list[Tensor](), dict[int, Inputs]()
        for feature in features:
            if not groups or feature >= groups[-1][0] + self.together:
                groups.append([])
            groups[-1].append(feature)
        group_of = {one: number for number, group in enumerate(groups) for one in group}

        def draw(group: list[int]) -> None:
            with self.draws.continued():
                found = self._drawn(game, group)
            kept.clear()
            kept.update(zip(group, found, strict=True))

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
        tables: list[list[Tensor]] = [[] for _ in features]
        for x, segment in zip(self.inputs, game.segments, strict=True):
            masks = [segment.view(-1, *x.shape[1:]) == feature for feature in features]
            some = any(bool(mask.any()) for mask in masks)
            for table, mask in zip(tables, masks, strict=True):
                table.append(self.permute(x, mask) if some else x)
        return list(map(tuple, tables))


class ShapleyValueSampling(PerturbationAttribution):
    """The mean gains of features in random orders (Castro, 2009), from PyTorch's global generator.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import ShapleyValueSampling
        >>> method = ShapleyValueSampling(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), n_samples=2)
        tensor([[ 3., -6.]])
    """

    _perturbations_error = "Ablations per evaluation must be at least 1."

    def _plan(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> PerturbationPlan:
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            n_samples: random orders of the features.

        Returns:
            Attributions in float32, [*output, *]: of the inputs' shape for one number per row.
            `attribute_future` returns a future of them, for a function that returns futures.
        """
        parts = as_tuple(inputs)
        check_baselines(parts, as_baselines(baselines, parts))
        of = parts, baselines, target, additional_forward_args, feature_mask
        call = self._call(*of, perturbations_per_eval, show_progress)
        masks = call.features or default_masks(parts)
        known = numbers_of(masks, parts).tolist()
        # As many as Captum counts.
        count = max(len(known), 1 + max(int(one.max()) for one in masks if one.numel()))
        draws = Draws()
        method = self._method(n_samples, known, count, draws)
        finish = partial(_like_output, inputs)
        return PerturbationPlan(method, replace(call, features=masks), finish, draws)

    attribute, attribute_future = both_forms(_plan)

    def _method(self, samples: int, known: list[int], count: int, draws: Draws) -> Method:
        if len(known) < count:
            warnings.warn(
                "Feature mask is missing some integers between 0 and num_features, for optimal "
                "performance, make sure each consecutive integer corresponds to a feature.",
                stacklevel=5,
            )
        return _RandomOrders(samples, known, count, draws)


def _like_output(inputs: Any, maps: Inputs, first: Tensor) -> Any:
    shape = first.shape or (1,)
    pairs = zip(maps, as_tuple(inputs), strict=True)
    return like_inputs(inputs, tuple(one.float().view(*shape, *x.shape[1:]) for one, x in pairs))


class ShapleyValues(ShapleyValueSampling):
    """Exact Shapley values (Shapley, 1953), from 2^F points for F features; Captum takes F * F!.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import ShapleyValues
        >>> ShapleyValues(lambda x: x.prod(1)).attribute(torch.tensor([[1.0, 4.0]]))
        tensor([[2., 2.]])
    """

    def _exact_plan(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> PerturbationPlan:
        """Attributes to the inputs; arguments and result as in `ShapleyValueSampling.attribute`."""
        of = inputs, baselines, target, additional_forward_args, feature_mask
        return self._plan(*of, 0, perturbations_per_eval, show_progress)

    # As in Captum `attribute_future` is inherited, and its n_samples does nothing.
    attribute, _ = both_forms(_exact_plan)  # type: ignore[assignment]

    def _method(self, samples: int, known: list[int], count: int, draws: Draws) -> Method:
        if count >= MANY_FEATURES:
            warnings.warn(
                "You are attempting to compute Shapley Values with at least 10 features, which "
                "will likely be very computationally expensive.Consider using Shapley Value "
                "Sampling instead.",
                stacklevel=6,
            )
        return shapley.ShapleyValues()


@dataclass(frozen=True)
class _RandomOrders:
    """Orders of all numbers up to `count`, of which only the known ones are features."""

    orders: int
    known: list[int]
    count: int
    draws: Draws
    name = "shapley_sampling"

    def recipe(self) -> Recipe:
        points = max(1, self.orders * (len(self.known) - 1))
        return engine.RoundsRecipe(
            self._rounds, points, baseline="one", gradients=False, features=True
        )

    def _rounds(self, asked: engine.RoundContext) -> engine.Rounds:
        game, drawn = Game.of(asked), self.draws.kept
        known = torch.tensor(self.known, device="cpu") - min(0, self.known[0])

        def ranks(start: int, stop: int) -> Tensor:
            if start not in drawn:
                with self.draws.continued():
                    orders = [torch.randperm(self.count, device="cpu") for _ in range(start, stop)]
                drawn[start] = torch.stack(orders)
            place = drawn[start].argsort(dim=1)[:, known]
            found: Tensor = place.argsort(dim=1).argsort(dim=1)[None].to(game.device)
            return found

        return shapley.permutation_rounds(game, self.orders, ranks, 1)
