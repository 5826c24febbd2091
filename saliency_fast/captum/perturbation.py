"""Ablation, occlusion and permutation in Captum's shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import PerturbationAttribution, not_promised
from saliency_fast.captum.contract import (
    Baselines,
    as_baselines,
    as_tuple,
    floating,
    like_inputs,
    public,
)
from saliency_fast.captum.passes import Asked
from saliency_fast.captum.perturbed import (
    Draws,
    Maps,
    check_at_once,
    perturbed,
    promised,
)
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Recipe
from saliency_fast.errors import ContractError
from saliency_fast.methods import ablation, occlusion
from saliency_fast.methods.parts.coalitions import Game, players
from saliency_fast.methods.parts.windows import read_windows
from saliency_fast.model.axes import Layouts
from saliency_fast.model.casts import cast

AT_ONCE = "Perturbations per evaluation must be an integer and at least 1."
logger = logging.getLogger(__name__)


def read_masks(feature_mask: Any, inputs: Inputs) -> Inputs | None:
    """Feature masks, one per input; raises where one does not broadcast to its input."""
    if feature_mask is None:
        return None
    masks = as_tuple(feature_mask)
    if len(masks) != len(inputs):
        raise ContractError(
            f"feature_mask must have one tensor for each of {len(inputs)} inputs: got {len(masks)}"
        )
    for number, (mask, x) in enumerate(zip(masks, inputs, strict=True)):
        pairs = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if mask.dim() > x.dim() or any(got not in (1, want) for got, want in pairs):
            raise ContractError(
                f"the shape of feature mask (index {number}) is invalid,input shape: {x.shape}, "
                f"feature mask shape {mask.shape}; give it the input's shape, or 1 on any axis"
            )
    return tuple(
        cast(mask.detach(), torch.int64, "feature_mask", "number features by whole numbers").to(
            x.device
        )
        for mask, x in zip(masks, inputs, strict=True)
    )


def default_masks(inputs: Inputs) -> Inputs:
    """A feature for each element behind the batch axis, counted over all inputs: int64 [1, *]."""
    found, count = [], 0
    for x in inputs:
        row = x[:1]
        found.append(count + torch.arange(row.numel(), device=x.device).view(row.shape))
        count += row.numel()
    return tuple(found)


def numbers_of(masks: Inputs, inputs: Inputs) -> Tensor:
    """The numbers of the features that inputs have, in order."""
    own = [mask.flatten() for mask, x in zip(masks, inputs, strict=True) if x.numel()]
    found: Tensor = torch.unique(torch.cat(own))
    return found


def for_fill(inputs: Inputs, baselines: Baselines) -> Inputs:
    """Whole-numbered inputs whose baselines are not are taken as floating."""
    return tuple(
        floating((x,))[0] if isinstance(one, float) or _floats(one) else x
        for x, one in zip(inputs, baselines, strict=True)
    )


def _floats(one: Any) -> bool:
    return isinstance(one, Tensor) and one.is_floating_point()


class FeatureAblation(PerturbationAttribution):
    """What the output loses with each feature at its baseline."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.use_weights = False

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Maps [B, *] like the inputs; [N, *] where the function returns N numbers for a batch."""
        parts = as_tuple(inputs)
        asked = self._call(
            *(parts, baselines, target, additional_forward_args, feature_mask),
            *(perturbations_per_eval, show_progress),
        )
        return like_inputs(inputs, _typed(perturbed(*self._method(parts, asked))))

    @public
    def attribute_future(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Future[Any]:
        """What `attribute` returns, as a future, for a function that returns futures."""
        parts = as_tuple(inputs)
        asked = self._call(
            *(parts, baselines, target, additional_forward_args, feature_mask),
            *(perturbations_per_eval, show_progress),
        )
        method, asked, *draws = self._method(parts, asked)
        return promised(method, asked, lambda found: like_inputs(inputs, _typed(found)), *draws)

    def _call(
        self,
        inputs: Inputs,
        baselines: Any,
        target: Any,
        further: Any,
        feature_mask: Any,
        at_once: int,
        shows: bool,
    ) -> Asked:
        starts = as_baselines(baselines, inputs)
        check_at_once(at_once, AT_ONCE)
        return Asked(
            *(self.forward_func, for_fill(inputs, starts), target, further, starts),
            features=read_masks(feature_mask, inputs),
            at_once=at_once,
            progress=self.get_name() if shows else "",
        )

    def _method(self, inputs: Inputs, asked: Asked) -> Any:
        """A method, its call, and what it draws where it does."""
        return ablation.FeatureAblation(), asked


def _typed(found: Maps) -> Inputs:
    return tuple(one.to(found.dtype) for one in found.values)


class Occlusion(FeatureAblation):
    """What the output loses where a window hides the inputs, a mean over windows."""

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
        """Maps like the inputs, in float32 whatever the model's type."""
        parts = as_tuple(inputs)
        window, stride = _read_windows(sliding_window_shapes, strides, parts)
        asked = self._call(
            *(parts, baselines, target, additional_forward_args, None),
            *(perturbations_per_eval, show_progress),
        )
        found = perturbed(_Occluded(window, stride), asked)
        values = []
        for one, width, step, x in zip(found.values, window, stride, parts, strict=True):
            # Captum's sums become float32 before they are divided by how many windows there are.
            windows = _covering(width, step, x).to(x.device)
            values.append((one.double() * windows).to(found.dtype).float() / windows.float())
        return like_inputs(inputs, tuple(values))

    def attribute_future(self) -> Any:  # type: ignore[override]
        """Raises NotImplementedError, as in Captum."""
        return not_promised(self)


def _covering(window: tuple[int, ...], stride: tuple[int, ...], x: Tensor) -> Tensor:
    """How many windows cover each element behind the batch axis, float64; one where there is none
    behind it.
    """
    shape = torch.Size((1, *x.shape[1:])) if window else torch.Size((1, 1))
    (grid,) = read_windows((window or (1,),), (stride or (1,),), Layouts([tuple(shape)]))
    return grid.covering(tuple(shape[1:])).view(x.shape[1:])


@dataclass(frozen=True)
class _Occluded:
    """Windows over the axes behind the batch, also where the batch is one example."""

    window: tuple[tuple[int, ...], ...]
    stride: tuple[tuple[int, ...], ...]
    name = "occlusion"

    def recipe(self) -> Recipe:
        return engine.RoundsRecipe(self._rounds, self._points, baseline="fill", gradients=False)

    def _rounds(self, asked: engine.RoundContext) -> engine.Rounds:
        return (yield from occlusion.occluded(asked, self._method(asked.inputs)))

    def _points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        return self._method(inputs).points(inputs, features, layouts)

    def _method(self, inputs: Inputs) -> occlusion.Occlusion:
        window, stride = [], []
        for x, width, step in zip(inputs, self.window, self.stride, strict=True):
            more = x.dim() - 1 - len(width)
            # A column that stands for [B] has a window of one; a batch in one is hidden as a whole.
            before = tuple(x.shape[1 : 1 + more])
            window.append((*before, *width))
            stride.append((*before, *step))
        return occlusion.Occlusion(tuple(window), tuple(stride))


def _read_windows(
    shapes: Any, strides: Any, inputs: Inputs
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """A window and a stride for each axis behind the batch of each input."""
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
    """What the output loses with each feature permuted within the batch."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        perm_func: Callable[[Tensor, Tensor], Tensor] = _permute_feature,
    ) -> None:
        super().__init__(forward_func)
        self.perm_func = perm_func
        self._min_examples_per_batch_grouped = 2

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Maps like the inputs; zeros, and a warning in the log, for features of a tensor with too
        few rows to permute them.
        """
        of = feature_mask, perturbations_per_eval, show_progress
        own = FeatureAblation.attribute.__wrapped__  # type: ignore[attr-defined]
        return own(self, inputs, None, target, additional_forward_args, *of)

    @public
    def attribute_future(  # type: ignore[override]
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Future[Any]:
        """What `attribute` returns, as a future, for a function that returns futures."""
        of = feature_mask, perturbations_per_eval, show_progress
        own = FeatureAblation.attribute_future.__wrapped__  # type: ignore[attr-defined]
        found: Future[Any] = own(self, inputs, None, target, additional_forward_args, *of)
        return found

    def _method(self, inputs: Inputs, asked: Asked) -> Any:
        draws, full = Draws(), [x for x in inputs if x.numel()]
        masks = asked.features or default_masks(inputs)
        own = [(x, mask) for x, mask in zip(inputs, masks, strict=True) if x.numel()]
        # The engine counts features in their order, without gaps.
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
        method = _Permuted(self.perm_func, tuple(full), asked.at_once, frozenset(few), draws)
        return method, replace(asked, baselines=None), draws


@dataclass(frozen=True, eq=False)
class _Permuted:
    """Features permuted by a function of the whole batch; few: those of tensors with too few rows,
    which cost nothing.
    """

    permute: Callable[[Tensor, Tensor], Tensor]
    inputs: Inputs
    together: int
    few: frozenset[int]
    draws: Draws
    name = "feature_permutation"

    def recipe(self) -> Recipe:
        return engine.RoundsRecipe(self._rounds, players, gradients=False, features=True)

    def _rounds(self, asked: engine.RoundContext) -> engine.Rounds:
        game = Game.of(asked)
        values = asked.scores.new_zeros((*asked.scores.shape, game.count))
        features = [one for one in range(game.count) if one not in self.few]
        kept: dict[int, Inputs] = {}
        # From a feature to the first of those that are drawn with it, and to the state before.
        groups: dict[int, tuple[int, Tensor]] = {}

        def drawn(feature: int) -> None:
            """Draws in Captum's order: so many features at once, one input after another."""
            for one in features:
                if feature in groups:
                    break
                if one not in groups:
                    before = self.draws.state
                    with self.draws.taken():
                        found = self._drawn(game, one)
                    groups.update((other, (one, before)) for other in found)
            first, before = groups[feature]
            now, self.draws.state = self.draws.state, before
            with self.draws.taken():
                found = self._drawn(game, first)
            self.draws.state = now
            kept.clear()
            kept.update(found)

        def write(item: Tensor, place: Tensor) -> Inputs:
            several, row = torch.unique(place, return_inverse=True)
            tables = []
            for feature in several.tolist():
                if feature not in kept:
                    drawn(feature)
                tables.append(kept[feature])
            found = []
            for number, x in enumerate(asked.inputs):
                own = torch.stack([table[number] for table in tables])
                whole = own.view(len(several), *x.shape)
                found.append(whole[row, item].contiguous())
            return tuple(found)

        def each(rows: slice, found: engine.RoundResult) -> None:
            own = item[rows]
            values[own, :, place[rows]] = asked.scores[own] - found.scores

        batch = len(asked.inputs[0])
        place = torch.tensor(features, device=game.device).repeat_interleave(batch)
        item = torch.arange(batch, device=game.device).repeat(len(features))
        yield engine.Round(write, item, place, each=each)
        return game.maps(values, None, sums=False)

    def _drawn(self, game: Game, first: int) -> dict[int, Inputs]:
        """The inputs with each of the next features permuted, as they are drawn together."""
        stop = min(first + self.together, game.count)
        features = [one for one in range(first, stop) if one not in self.few]
        tables: list[list[Tensor]] = [[] for _ in features]
        for x, segment in zip(self.inputs, game.segments, strict=True):
            numbers = (
                segment.view(-1, *x.shape[1:])
                if segment.numel() != x.numel()
                else segment.view(x.shape)
            )
            masks = [numbers == feature for feature in features]
            some = any(bool(mask.any()) for mask in masks)
            for table, mask in zip(tables, masks, strict=True):
                table.append(self.permute(x, mask) if some else x)
        return {feature: tuple(table) for feature, table in zip(features, tables, strict=True)}
