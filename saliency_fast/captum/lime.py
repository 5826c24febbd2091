"""LIME and Kernel SHAP: interpretable models of the function on perturbed inputs."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import AttributeCall, PerturbationAttribution, rows_depend
from saliency_fast.captum.perturbation import (
    Draws,
    by_rows,
    first_of,
    numbers_of_output,
    progress_of,
)
from saliency_fast.captum.shared_calls import SharedCalls, rewind_draws, together_or_apart
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Recipe
from saliency_fast.errors import ContractError
from saliency_fast.methods import coalitions
from saliency_fast.methods.coalitions import Game, fit
from saliency_fast.model.preserve import preserved

MANY_FEATURES = 10_000
"""Features that make an interpretable model slow."""
INFINITE_WEIGHT = 1e6
"""Kernel SHAP's weight for all features and for none."""
LASSO_PENALTY = 0.01


def get_exp_kernel_similarity_function(
    distance_mode: str = "cosine", kernel_width: float = 1.0
) -> Callable[..., float]:
    """A similarity function for `Lime`: exp(-d^2 / (2 kernel_width^2)) at distance d.

    Args:
        distance_mode: "cosine" or "euclidean", the distance of the perturbed from the input.
        kernel_width: of the kernel, in units of the distance.

    Returns:
        A function of (original, perturbed, interpretable sample, **kwargs).

    Example:
        >>> similarity = get_exp_kernel_similarity_function("euclidean")
        >>> similarity(torch.ones(1, 2), torch.ones(1, 2), None)
        1.0
    """
    if distance_mode not in ("cosine", "euclidean"):
        raise ContractError(
            f"distance_mode must be either cosine or euclidean. Got {distance_mode!r}"
        )

    def similarity(original: Any, perturbed: Any, _: Any, **kwargs: Any) -> float:
        one, other = (
            torch.cat([x.flatten().float() for x in forms.as_tuple(each)])
            for each in (original, perturbed)
        )
        if distance_mode == "cosine":
            distance = 1.0 - float(torch.cosine_similarity(one, other, dim=0))
        else:
            distance = float((one - other).norm())
        return math.exp(-(distance**2) / (2.0 * kernel_width**2))

    return similarity


class LimeBase(PerturbationAttribution):
    """Any interpretable model, fitted to the score at perturbed inputs (Ribeiro, 2016).

    Args:
        forward_func: see `Attribution`.
        interpretable_model: has `fit(dataloader)` and `representation()`.
        similarity_func: weighs a sample, of (original, perturbed, interpretable sample, **kwargs).
        perturb_func: of (original, **kwargs), returns a sample or is a generator function of them.
        perturb_interpretable_space: whether samples are in the interpretable space.
        from_interp_rep_transform: makes an input of such a sample, of (sample, original, **kwargs).
        to_interp_rep_transform: the reverse, for samples that are inputs.

    Example:
        >>> class Mean:
        ...     def fit(self, data):
        ...         self.mean = torch.cat([y for _, y, _ in data]).mean()
        ...
        ...     def representation(self):
        ...         return self.mean
        >>> same, constant = lambda x, *_, **__: x, lambda *_, **__: 1.0
        >>> method = LimeBase(lambda x: x.sum(1), Mean(), constant, same, False, None, same)
        >>> method.attribute(torch.tensor([[1.0, 2.0]]))
        tensor(3.)
    """

    _multiply_by_inputs = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Any,
        similarity_func: Callable[..., Any],
        perturb_func: Callable[..., Any],
        perturb_interpretable_space: bool,
        from_interp_rep_transform: Callable[..., Any] | None,
        to_interp_rep_transform: Callable[..., Any] | None,
    ) -> None:
        super().__init__(forward_func)
        self.interpretable_model, self.similarity_func = interpretable_model, similarity_func
        self.perturb_func = perturb_func
        self.perturb_interpretable_space = perturb_interpretable_space
        self.from_interp_rep_transform = from_interp_rep_transform
        self.to_interp_rep_transform = to_interp_rep_transform
        if perturb_interpretable_space and from_interp_rep_transform is None:
            raise ContractError(
                "Must provide transform from interpretable space to original input space when "
                "sampling from interpretable space."
            )
        if not perturb_interpretable_space and to_interp_rep_transform is None:
            raise ContractError(
                "Must provide transform from original input space to interpretable space"
            )

    @forms.with_parameters(
        "inputs, target=None, additional_forward_args=None, n_samples=50, "
        "perturbations_per_eval=1, show_progress=False, **kwargs"
    )
    @torch.no_grad()
    def attribute(self, args: Any) -> Any:
        """What the interpretable model's `representation` returns after its fit.

        The functions that the instance was given get `kwargs`.
        """
        inputs = forms.as_tuple(args.inputs)
        call = AttributeCall(self.forward_func, inputs, args.target, args.additional_forward_args)
        table = together_or_apart(
            lambda apart: self._samples(_sample_calls(call, apart), args),
            rewind_draws(inputs[0].device),
            apart=args.perturbations_per_eval < 2 or rows_depend(self.forward_func),
        )
        dataset = TensorDataset(*table)
        self.interpretable_model.fit(DataLoader(dataset, batch_size=len(dataset)))
        return self.interpretable_model.representation()

    def _samples(self, numbers: Callable[[list[Inputs]], Tensor], args: Any) -> Inputs:
        count, most = args.n_samples, args.perturbations_per_eval
        samples, weights, outputs = list[Tensor](), list[Tensor](), list[Tensor]()
        device = forms.as_tuple(args.inputs)[0].device
        drawn = itertools.islice(self._drawn(args.inputs, args.kwargs), count)
        words = f"{self.get_name()} attribution"
        bar = tqdm(total=-(-count // most), desc=words, disable=not args.show_progress)
        with preserved(self.forward_func), bar:
            while chunk := list(itertools.islice(drawn, most)):
                samples += [simple for simple, _, _ in chunk]
                weights += [torch.as_tensor(one, device=device).reshape(-1) for _, one, _ in chunk]
                outputs.append(numbers([point for _, _, point in chunk]).to(device))
                bar.update()
        if len(samples) < count:
            warnings.warn("Generator completed prior to given n_samples iterations!", stacklevel=2)
        return tuple(torch.cat(one).float() for one in (samples, outputs, weights))

    def _drawn(self, inputs: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Any, Inputs]]:
        """Samples in the interpretable space, each with its similarity and as inputs."""
        is_simple = self.perturb_interpretable_space
        make: Any = self.from_interp_rep_transform if is_simple else self.to_interp_rep_transform
        for sample in self._perturbed(inputs, **kwargs):
            made = make(sample, inputs, **kwargs)
            simple, point = (sample, made) if is_simple else (made, sample)
            similar = self.similarity_func(inputs, point, simple, **kwargs)
            yield simple, similar, forms.as_tuple(point)

    def _perturbed(self, inputs: Any, **kwargs: Any) -> Iterator[Any]:
        """The samples of `perturb_func`."""
        if inspect.isgeneratorfunction(self.perturb_func):
            yield from self.perturb_func(inputs, **kwargs)
            return
        while True:
            yield self.perturb_func(inputs, **kwargs)


def _sample_calls(call: AttributeCall, apart: bool) -> Callable[[list[Inputs]], Tensor]:
    """From samples to their numbers [M], by shared calls or `apart`; raises RowsMeetError."""

    def of(points: list[Inputs]) -> Tensor:
        count, rows = len(points), tuple(torch.cat(one) for one in zip(*points, strict=True))
        raw = call.forward(*rows, *forms.arguments_of(call.further, forms.tiled, count))
        result = numbers_of_output(raw, forms.tiled(call.target, count))
        if result.numel() != count:
            raise ContractError(
                "Number of outputs is not appropriate, must return one output per perturbed "
                f"input: got {result.numel()} for {count}; pass target="
            )
        return result.reshape(-1)

    shared = SharedCalls(lambda stacked: of(list(zip(*stacked, strict=True)))[:, None])

    def numbers(points: list[Inputs]) -> Tensor:
        shapes = {tuple(x.shape for x in one) for one in points}
        if len(points) == 1 or apart or len(shapes) > 1:
            return torch.cat([of([one]) for one in points])
        return shared.numbers(tuple(map(torch.stack, zip(*points, strict=True)))).flatten()

    return numbers


class _LinearModel:
    """An interpretable model: a linear one, with the methods that Captum's have."""

    def __init__(self, how: str, alpha: float) -> None:
        self.how, self.alpha = how, alpha

    def fit(self, train_data: DataLoader[Any]) -> None:
        z, y, weight = (torch.cat(one) for one in zip(*train_data, strict=True))
        # The first weights of a linear layer, which Captum's model draws here.
        nn.Linear(z.shape[1], 1)
        slopes = fit(z, y.double()[:, None], weight.double(), self.how, self.alpha)
        self.slopes = slopes.values.T.float()

    def representation(self) -> Tensor:
        """The slopes, [1, F]."""
        return self.slopes


def _from_coalition(sample: Tensor, original: Any, **kwargs: Any) -> Any:
    """The input with the features [1, F] that are present, and the others from the baselines."""
    masks, baselines = forms.as_tuple(kwargs["feature_mask"]), kwargs["baselines"]
    starts = baselines if isinstance(baselines, tuple) else (baselines,)
    points = []
    for x, mask, start in zip(forms.as_tuple(original), masks, starts, strict=True):
        present = sample[0][mask].bool()
        points.append(present.to(x.dtype) * x + (~present).to(x.dtype) * start)
    return forms.like_inputs(original, tuple(points))


def _coin_tosses(original: Any, *, num_interp_features: int, **kwargs: Any) -> Tensor:
    """A coalition int64 [1, F] that each feature is in with a chance of one half."""
    chance = torch.full((1, num_interp_features), 0.5, device="cpu")
    return torch.bernoulli(chance).to(forms.as_tuple(original)[0].device).long()


class Lime(LimeBase):
    """A linear model of the score on which features are present (Ribeiro, 2016).

    With the defaults, a lasso on coin tosses, samples of all rows run on the engine; with functions
    of the user's they run one example after another, as in `LimeBase`, which documents these.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> method = Lime(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), n_samples=50).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Any = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        args = (interpretable_model, similarity_func, perturb_func)
        super().__init__(
            forward_func,
            interpretable_model or _LinearModel("lasso", LASSO_PENALTY),
            similarity_func or get_exp_kernel_similarity_function(),
            perturb_func or _coin_tosses,
            True,
            _from_coalition,
            None,
        )
        self._is_default = args == (None, None, None)

    @forms.with_parameters(
        "inputs, baselines=None, target=None, additional_forward_args=None, feature_mask=None, "
        "n_samples=25, perturbations_per_eval=1, return_input_shape=True, show_progress=False"
    )
    def attribute(self, args: Any) -> Any:
        """Slopes in float32, of the inputs' shape or, without return_input_shape, [N, F]."""
        parts = forms.as_tuple(args.inputs)
        masks, count = _features(args.feature_mask, parts)
        call = self._call(args, features=masks)
        slopes = self._by_rows(call, count, args.n_samples)
        if slopes is None:
            is_tuple = isinstance(args.inputs, tuple)
            slopes = self._one_by_one(call, count, args.n_samples, is_tuple)
        if not args.return_input_shape:
            return slopes
        values = []
        for mask, x in zip(masks, parts, strict=True):
            if not x.numel():
                values.append(torch.zeros_like(x, dtype=torch.float))
                continue
            own = mask.expand(x.shape)[: len(slopes)].reshape(len(slopes), -1)
            values.append(slopes.gather(1, own).view(len(slopes), *x.shape[1:]))
        return forms.like_inputs(args.inputs, tuple(values))

    def _by_rows(self, call: AttributeCall, count: int, samples: int) -> Tensor | None:
        """Slopes float32 [N, F], from Captum's draws, by the engine where rows are independent."""
        if not self._is_default or call.owner is None:
            return None
        numbers = forms.numbers_of(call.features or (), call.inputs)
        draws = Draws()
        method = _Fitted(self, samples, count, numbers, draws)
        with preserved(call.forward), progress_of(method, call) as bar:
            result = by_rows(method, call, first_of(call), bar, draws.restart)
        if result is None:
            return None
        torch.set_rng_state(draws.state)
        assert result[1] is not None
        slopes = result[1].new_zeros(len(result[1]), count)
        slopes[:, numbers] = result[1]
        return slopes.float()

    def _weigh(self, game: Game, present: Tensor) -> Tensor:
        """The weights of coalitions [B, M, F], as `similarity_func` has them."""
        return torch.exp(-coalitions.distances(game, present, "cosine").square() / 2.0)

    def _one_by_one(self, call: AttributeCall, count: int, samples: int, is_tuple: bool) -> Tensor:
        """Slopes [N, F] as Captum finds them, a model for each row that has a number."""
        batch, numbers = len(call.inputs[0]), 1
        if batch > 1:
            with preserved(self.forward_func):
                numbers = first_of(call).numel()
        if numbers not in (1, batch):
            raise ContractError(
                "Invalid number of outputs, forward function should return ascalar per example or "
                "a scalar per input batch. Pass target= with an index for each axis after the batch"
            )
        if numbers == 1 < batch and call.at_once != 1:
            raise ContractError(
                "Perturbations per eval must be 1 when forward functionreturns single value per "
                "batch!"
            )
        rows = [slice(None)] if numbers == 1 else [slice(i, i + 1) for i in range(batch)]
        result = []
        for row in rows:
            own = [
                tuple(forms.row_of(one, row, batch) for one in several)
                for several in (call.inputs, call.baselines or (), call.features or ())
            ]
            inputs, starts, masks = (one if is_tuple else one[0] for one in own)
            slopes = LimeBase.attribute(
                *(self, inputs, forms.row_of(call.target, row, batch)),
                forms.arguments_of(call.further, forms.row_of, row, batch) or None,
                samples,
                call.at_once,
                bool(call.progress),
                baselines=starts,
                feature_mask=masks,
                num_interp_features=count,
            )
            result.append(slopes.reshape(1, -1))
        return torch.cat(result)


def _features(feature_mask: Any, inputs: Inputs) -> tuple[Inputs, int]:
    """Masks whose numbers begin at 0, and how many features Captum counts."""
    masks = forms.read_masks(feature_mask, inputs) or forms.default_masks(inputs)
    pairs = zip(masks, inputs, strict=True)
    masks = tuple(one[(None,) * (x.dim() - one.dim())] for one, x in pairs)
    least = min(int(one.min()) for one in masks if one.numel())
    if least != 0:
        warnings.warn(
            "Minimum element in feature mask is not 0, shifting indices to start at 0.",
            stacklevel=5,
        )
        masks = tuple(one - least for one in masks)
    count = 1 + max(int(one.max()) for one in masks if one.numel())
    if count > MANY_FEATURES:
        warnings.warn(
            "Attempting to construct interpretable model with > 10000 features.This can be very "
            "slow or lead to OOM issues. Please provide a feature mask which groups input features "
            "to reduce the number of interpretable features. ",
            stacklevel=5,
        )
    return masks, count


@dataclass(frozen=True, eq=False)
class _Fitted:
    """The linear model of a Lime on coalitions of Captum's draws, as a method of the engine."""

    lime: Lime
    samples: int
    count: int
    numbers: Tensor
    draws: Draws
    name = "lime"

    def recipe(self) -> Recipe:
        model = self.lime.interpretable_model
        fitted = self._draw, self.lime._weigh, model.how, model.alpha

        def rounds(context: engine.RoundContext) -> engine.Rounds:
            return coalitions.surrogate_rounds(context, *fitted)

        of = rounds, self.samples
        return engine.RoundsRecipe(*of, baseline="fill", gradients=False, features=True)

    def _draw(self, game: Game) -> Tensor:
        """Coalitions of each example, bool [B, M, F], as Captum draws one after another."""
        tables, host = [], torch.empty(0, device="cpu")
        with self.draws.continued():
            for _ in game.context.inputs[0]:
                drawn = self.lime._perturbed(host, num_interp_features=self.count)
                tables.append(torch.cat(list(itertools.islice(drawn, self.samples))).bool())
                # What an example's fit draws: a data loader's seed, a linear layer's weights.
                torch.empty((), dtype=torch.int64).random_()
                nn.Linear(self.count, 1)
        return torch.stack(tables).to(game.device)[..., self.numbers]


class KernelShap(Lime):
    """Shapley values by a linear model on coalitions of the Shapley kernel (Lundberg, 2017).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> method = KernelShap(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), n_samples=50).round(decimals=2)
        tensor([[ 3., -6.]])
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)
        self.interpretable_model = _LinearModel("linear", 0.0)
        self.similarity_func, self.perturb_func = self._weight, _kernel_coalitions
        self.inf_weight = INFINITE_WEIGHT

    def _weight(self, _: Any, __: Any, sample: Tensor, **kwargs: Any) -> float:
        return self.inf_weight if int(sample.sum()) in (0, sample.numel()) else 1.0

    def _weigh(self, game: Game, present: Tensor) -> Tensor:
        # The first two are all features and none.
        weight = present.new_ones(present.shape[:2], dtype=torch.float64)
        weight[:, :2] = self.inf_weight
        return weight


def _kernel_coalitions(original: Any, **kwargs: Any) -> Iterator[Tensor]:
    """All features, none, then random coalitions of the Shapley kernel: int64 [1, F] each."""
    count, device = kwargs["num_interp_features"], forms.as_tuple(original)[0].device
    yield torch.ones(1, count, dtype=torch.int64, device=device)
    yield torch.zeros(1, count, dtype=torch.int64, device=device)
    size = torch.arange(count, dtype=torch.float)
    chance = torch.tensor(count - 1) / (size * (count - size))
    chance[0] = 0.0
    while True:
        wanted = int(torch.distributions.Categorical(chance).sample())  # type: ignore[no-untyped-call]
        words = torch.randn(1, count)
        yield (words > words.kthvalue(count - wanted).values).long().to(device)
