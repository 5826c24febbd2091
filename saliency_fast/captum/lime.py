"""LIME and Kernel SHAP in Captum's shape."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.captum.contract import (
    as_args,
    as_baselines,
    as_tuple,
    like_inputs,
    public,
)
from saliency_fast.captum.lime_base import (
    LimeBase,
    Linear,
    coin_tosses,
    from_coalition,
    get_exp_kernel_similarity_function,
    toss,
)
from saliency_fast.captum.passes import Asked
from saliency_fast.captum.perturbation import default_masks, for_fill, numbers_of, read_masks
from saliency_fast.captum.perturbed import Draws, by_rows, first_of
from saliency_fast.captum.run import _owner
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Recipe
from saliency_fast.errors import ContractError
from saliency_fast.methods import surrogates
from saliency_fast.methods.parts.coalitions import Game
from saliency_fast.model.state import preserved

MANY = 10_000
"""Features that make an interpretable model slow."""
INFINITE = 1e6
"""Kernel SHAP's weight for all features and for none."""


class Lime(LimeBase):
    """A linear model of the output on which features are there, a lasso unless another is given.

    With Captum's defaults samples of all rows run on the engine; with functions of a user's own
    they run one example after another, as `LimeBase` does.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Any = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        given = (interpretable_model, similarity_func, perturb_func)
        super().__init__(
            forward_func,
            interpretable_model or Linear("lasso", 0.01),
            similarity_func or get_exp_kernel_similarity_function(),
            perturb_func or coin_tosses,
            True,
            from_coalition,
            None,
        )
        self._given = any(one is not None for one in given)

    @public
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Slopes in float32: each element its feature's, or [N, F] unless return_input_shape."""
        parts = as_tuple(inputs)
        starts = as_baselines(baselines, parts)
        masks, count = _features(feature_mask, parts)
        asked = Asked(
            *(self.forward_func, for_fill(parts, starts)),
            *(target, additional_forward_args, starts, masks),
            at_once=perturbations_per_eval,
            progress=self.get_name() if show_progress else "",
        )
        slopes = self._by_rows(asked, count, n_samples)
        if slopes is None:
            slopes = self._by_hand(asked, count, n_samples, isinstance(inputs, tuple))
        if not return_input_shape:
            return slopes
        values = tuple(
            _spread(slopes, mask, x) if x.numel() else torch.zeros_like(x, dtype=torch.float)
            for mask, x in zip(masks, parts, strict=True)
        )
        return like_inputs(inputs, values)

    def _by_rows(self, asked: Asked, count: int, samples: int) -> Tensor | None:
        """Slopes float32 [N, F], from Captum's draws, by the engine where it can have the rows."""
        if self._given or _owner(asked.forward) is None:
            return None
        known = numbers_of(asked.features or (), asked.inputs)
        draws = Draws()
        method = self._method(samples, known, count, draws)
        with preserved(asked.forward), asked.shown(method) as bar:
            found = by_rows(method, asked, first_of(asked), draws, bar)
        if found is None:
            return None
        torch.set_rng_state(draws.state)
        assert found[1] is not None
        slopes = found[1].new_zeros(len(found[1]), count)
        slopes[:, known] = found[1]
        return slopes.float()

    def _method(self, samples: int, known: Tensor, count: int, draws: Draws) -> _Fitted:
        def table(device: Any) -> Tensor:
            tosses = [toss(count, device) for _ in range(samples)]
            return torch.cat(tosses).bool()

        def draw(game: Game) -> Tensor:
            with draws.taken():
                return _by_example(game, table)[..., known]

        return _Fitted(draw, _by_distance, "lasso", 0.01, samples)

    def _by_hand(self, asked: Asked, count: int, samples: int, is_tuple: bool) -> Tensor:
        """Slopes [N, F] as Captum finds them, a model for each row that has a number."""
        batch, numbers = len(asked.inputs[0]), 1
        if batch > 1:
            with preserved(self.forward_func):
                numbers = first_of(asked).numel()
        if numbers not in (1, batch):
            raise ContractError(_OUTPUTS)
        if numbers == 1 < batch and asked.at_once != 1:
            raise ContractError(
                "Perturbations per eval must be 1 when forward functionreturns single value per "
                "batch!"
            )
        rows = [slice(None)] if numbers == 1 else [slice(i, i + 1) for i in range(batch)]
        found = []
        for row in rows:
            own = [
                tuple(_row(one, row, batch) for one in several)
                for several in (asked.inputs, asked.baselines or (), asked.features or ())
            ]
            inputs, starts, masks = (one if is_tuple else one[0] for one in own)
            slopes = LimeBase.attribute.__wrapped__(  # type: ignore[attr-defined]
                *(self, inputs, _row(asked.target, row, batch)),
                tuple(_row(one, row, batch) for one in as_args(asked.further)) or None,
                samples,
                asked.at_once,
                bool(asked.progress),
                baselines=starts,
                feature_mask=masks,
                num_interp_features=count,
            )
            found.append(slopes.reshape(1, -1))
        return torch.cat(found)


def _spread(slopes: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Slopes [N, F] at the elements of x, [N, *]."""
    count = len(slopes)
    own = mask.expand(x.shape)[:count].reshape(count, -1)
    return slopes.gather(1, own).view(count, *x.shape[1:])


def _row(value: Any, row: slice, batch: int) -> Any:
    """What of an argument belongs to a row."""
    many = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[row] if many and len(value) == batch else value


_OUTPUTS = (
    "Invalid number of outputs, forward function should return ascalar per example or a scalar per "
    "input batch. Pass target= with an index for each axis behind the batch"
)


def _features(feature_mask: Any, inputs: Inputs) -> tuple[Inputs, int]:
    """Masks whose numbers begin at 0, and how many features Captum counts."""
    masks = read_masks(feature_mask, inputs) or default_masks(inputs)
    masks = tuple(
        one[(None,) * (x.dim() - one.dim())] for one, x in zip(masks, inputs, strict=True)
    )
    least = min(int(one.min()) for one in masks if one.numel())
    if least != 0:
        warnings.warn(
            "Minimum element in feature mask is not 0, shifting indices to start at 0.",
            stacklevel=4,
        )
        masks = tuple(one - least for one in masks)
    count = 1 + max(int(one.max()) for one in masks if one.numel())
    if count > MANY:
        warnings.warn(
            "Attempting to construct interpretable model with > 10000 features.This can be very "
            "slow or lead to OOM issues. Please provide a feature mask which groups input features "
            "to reduce the number of interpretable features. ",
            stacklevel=4,
        )
    return masks, count


def _by_example(game: Game, table: Callable[[Any], Tensor]) -> Tensor:
    """A table for each example, [B, M, F], as Captum draws one after another."""
    tables = []
    for _ in game.asked.inputs[0]:
        tables.append(table(game.device))
        # What each example's fit draws: a data loader's seed, a linear layer's first weights.
        torch.empty((), dtype=torch.int64).random_()
        nn.Linear(tables[-1].shape[1], 1)
    return torch.stack(tables)


def _by_distance(game: Game, present: Tensor) -> Tensor:
    distance = surrogates.distances(game, present, "cosine")
    return torch.exp(-distance.square() / 2.0)


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A surrogate on coalitions of Captum's draws."""

    draw: surrogates.Draw
    weigh: surrogates.Weigh
    how: str
    alpha: float
    samples: int
    name = "lime"

    def recipe(self) -> Recipe:
        def rounds(asked: engine.RoundContext) -> engine.Rounds:
            return surrogates.fitted(asked, self.draw, self.weigh, self.how, self.alpha)

        return engine.RoundsRecipe(
            rounds, self.samples, baseline="fill", gradients=False, features=True
        )


class KernelShap(Lime):
    """Shapley values by a linear model on coalitions drawn by the Shapley kernel."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.interpretable_model = Linear("linear", 0.0)
        self.similarity_func, self.perturb_func = self._similar, _coalitions
        self.inf_weight = INFINITE

    def _similar(self, _: Any, __: Any, sample: Tensor, **kwargs: Any) -> float:
        """The weight of a coalition [1, F]."""
        return self.inf_weight if int(sample.sum()) in (0, sample.numel()) else 1.0

    def _method(self, samples: int, known: Tensor, count: int, draws: Draws) -> _Fitted:
        def draw(game: Game) -> Tensor:
            with draws.taken():
                tables = _by_example(game, lambda _: kernel_coalitions(samples, count))
            return tables.to(game.device)[..., known]

        def weigh(game: Game, present: Tensor) -> Tensor:
            # All and none are the first two.
            weight = present.new_ones(present.shape[:2], dtype=torch.float64)
            weight[:, :2] = self.inf_weight
            return weight

        return _Fitted(draw, weigh, "linear", 0.0, samples)


def kernel_coalitions(samples: int, count: int) -> Tensor:
    """All, none, and coalitions by the Shapley kernel from PyTorch's global generator: [M, F]."""
    drawn = _coalitions(None, num_interp_features=count)
    return torch.cat(list(itertools.islice(drawn, samples))).bool()


def _coalitions(original: Any, **kwargs: Any) -> Iterator[Tensor]:
    """The same, int64 [1, F] each."""
    count = kwargs["num_interp_features"]
    device = None if original is None else as_tuple(original)[0].device
    yield torch.ones(1, count, dtype=torch.int64, device=device)
    yield torch.zeros(1, count, dtype=torch.int64, device=device)
    size = torch.arange(count, dtype=torch.float)
    chance = torch.tensor(count - 1) / (size * (count - size))
    chance[0] = 0.0
    while True:
        wanted = int(torch.distributions.Categorical(chance).sample())  # type: ignore[no-untyped-call]
        words = torch.randn(1, count)
        yield (words > words.kthvalue(count - wanted).values).long().to(device)
