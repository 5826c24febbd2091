"""LIME by functions of a user's own, in Captum's shape."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from saliency_fast._types import Inputs
from saliency_fast.captum.apart import SharedCalls, drawn_again
from saliency_fast.captum.attribution import PerturbationAttribution
from saliency_fast.captum.contract import (
    as_args,
    as_target,
    as_tuple,
    like_inputs,
    public,
)
from saliency_fast.captum.passes import output_of
from saliency_fast.captum.run import _repeated, seen_to_meet
from saliency_fast.engine.independence import RowsMeetError
from saliency_fast.errors import ContractError
from saliency_fast.methods.parts.regression import fit
from saliency_fast.model.preserve import preserved


class LimeBase(PerturbationAttribution):
    """An interpretable model, of anyone's making, of the output on perturbed inputs.

    interpretable_model: has fit(dataloader) and representation(). similarity_func(original,
    perturbed, interpretable, **kwargs) weighs a sample. perturb_func(original, **kwargs) makes one
    or is a generator function of them, in the interpretable space where
    perturb_interpretable_space.
    """

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

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    @public
    @torch.no_grad()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        n_samples: int = 50,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """What the interpretable model's `representation` returns after its fit."""
        further = as_target(target), as_args(additional_forward_args)
        of = inputs, n_samples, perturbations_per_eval, show_progress, kwargs
        again = drawn_again(as_tuple(inputs)[0].device)
        apart = perturbations_per_eval < 2 or seen_to_meet(self.forward_func)
        try:
            table = self._sampled(_Calls(self.forward_func, *further, apart=apart), *of)
        except RowsMeetError:
            # Anew with the same draws: samples that shared a call before may have met, too.
            again()
            table = self._sampled(_Calls(self.forward_func, *further, apart=True), *of)
        dataset = TensorDataset(*table)
        self.interpretable_model.fit(DataLoader(dataset, batch_size=len(dataset)))
        found: Tensor = self.interpretable_model.representation()
        return found

    def _sampled(
        self,
        calls: _Calls,
        inputs: Any,
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
        kwargs: dict[str, Any],
    ) -> Inputs:
        """Samples, their numbers and their weights; raises RowsMeetError where samples meet."""
        device = as_tuple(inputs)[0].device
        samples, weights, outputs, waiting = [], [], [], list[Inputs]()
        drawn = self._samples(inputs, kwargs)
        total = -(-n_samples // perturbations_per_eval)
        words = f"{self.get_name()} attribution"
        bar = tqdm(total=total, desc=words, disable=not show_progress)
        with preserved(self.forward_func), bar:
            for _ in range(n_samples):
                try:
                    simple, point = drawn()
                except StopIteration:
                    warnings.warn(
                        "Generator completed prior to given n_samples iterations!", stacklevel=2
                    )
                    break
                similar = self.similarity_func(inputs, point, simple, **kwargs)
                samples.append(simple)
                weights.append(torch.as_tensor(similar, device=device).reshape(-1))
                waiting.append(as_tuple(point))
                if len(waiting) == perturbations_per_eval:
                    outputs.append(calls.numbers(waiting).to(device))
                    bar.update()
                    waiting.clear()
            if waiting:
                outputs.append(calls.numbers(waiting).to(device))
                bar.update()
        return tuple(torch.cat(one).float() for one in (samples, outputs, weights))

    def _samples(self, inputs: Any, more: dict[str, Any]) -> Callable[[], tuple[Any, Any]]:
        """Draws a sample: what it is in the interpretable space, and as an input."""
        generator = inspect.isgeneratorfunction(self.perturb_func)
        several = self.perturb_func(inputs, **more) if generator else None

        def drawn() -> tuple[Any, Any]:
            sample = self.perturb_func(inputs, **more) if several is None else next(several)
            if self.perturb_interpretable_space:
                assert self.from_interp_rep_transform is not None
                return sample, self.from_interp_rep_transform(sample, inputs, **more)
            assert self.to_interp_rep_transform is not None
            return self.to_interp_rep_transform(sample, inputs, **more), sample

        return drawn


class _Calls:
    """The calls of a function, one number for each point; several points share a call unless they
    are kept apart.
    """

    def __init__(
        self, forward: Callable[..., Any], target: Any, further: tuple[Any, ...], *, apart: bool
    ) -> None:
        self.forward, self.target, self.further = forward, target, further
        self.apart, self.shared = apart, SharedCalls(self._together)

    def numbers(self, points: list[Inputs]) -> Tensor:
        """The numbers [M] of points; raises RowsMeetError where they meet."""
        like = {tuple(x.shape for x in one) for one in points}
        if len(points) == 1 or self.apart or len(like) > 1:
            return torch.cat([self._of([one]) for one in points])
        stacked = tuple(torch.stack(one) for one in zip(*points, strict=True))
        return self.shared.numbers(stacked).flatten()

    def _together(self, points: Inputs) -> Tensor:
        """The numbers [M, 1] of points [M, B, *]."""
        several = [tuple(x[number] for x in points) for number in range(len(points[0]))]
        return self._of(several)[:, None]

    def _of(self, points: list[Inputs]) -> Tensor:
        count = len(points)
        rows = tuple(torch.cat(one) for one in zip(*points, strict=True))
        further = tuple(_repeated(one, count) for one in self.further)
        found = output_of(self.forward(*rows, *further), _repeated(self.target, count))
        if found.numel() != count:
            raise ContractError(
                "Number of outputs is not appropriate, must return one output per perturbed "
                f"input: got {found.numel()} for {count}; pass target="
            )
        return found.reshape(-1)


class Linear:
    """An interpretable model: a linear one, with Captum's two names."""

    def __init__(self, how: str, alpha: float) -> None:
        self.how, self.alpha = how, alpha

    def fit(self, train_data: DataLoader[Any]) -> None:
        """Fits the slopes to samples, outputs and weights."""
        z, y, weight = (torch.cat(one) for one in zip(*train_data, strict=True))
        # A linear layer's first weights, which Captum's model draws here.
        nn.Linear(z.shape[1], 1)
        slopes = fit(z, y.double()[:, None], weight.double(), self.how, self.alpha)
        self.slopes = slopes.values.T.float()

    def representation(self) -> Tensor:
        """The slopes, [1, F]."""
        return self.slopes


def from_coalition(sample: Tensor, original: Any, **kwargs: Any) -> Any:
    """The input with the features [1, F] that are there, and the others from the baselines."""
    masks, baselines = as_tuple(kwargs["feature_mask"]), kwargs["baselines"]
    starts = baselines if isinstance(baselines, tuple) else (baselines,)
    points = []
    for x, mask, start in zip(as_tuple(original), masks, starts, strict=True):
        there = sample[0][mask].bool()
        points.append(there.to(x.dtype) * x + (~there).to(x.dtype) * start)
    return like_inputs(original, tuple(points))


def get_exp_kernel_similarity_function(
    distance_mode: str = "cosine", kernel_width: float = 1.0
) -> Callable[..., float]:
    """exp(-d^2 / (2 width^2)) of the distance between an input and a perturbed one."""
    if distance_mode not in ("cosine", "euclidean"):
        raise ContractError(
            f"distance_mode must be either cosine or euclidean. Got {distance_mode!r}"
        )

    def similarity(original: Any, perturbed: Any, _: Any, **kwargs: Any) -> float:
        pair = (
            torch.cat([x.flatten().float() for x in as_tuple(one)]) for one in (original, perturbed)
        )
        one, other = pair
        if distance_mode == "cosine":
            distance = 1.0 - float(torch.cosine_similarity(one, other, dim=0))
        else:
            distance = float((one - other).norm())
        return math.exp(-(distance**2) / (2.0 * kernel_width**2))

    return similarity


def coin_tosses(original: Any, **kwargs: Any) -> Tensor:
    """A coalition [1, F] of features that are there with a chance of one half."""
    return toss(kwargs["num_interp_features"], as_tuple(original)[0].device)


def toss(count: int, device: torch.device) -> Tensor:
    """So many coins from PyTorch's global generator, int64 [1, F]."""
    return torch.bernoulli(torch.full((1, count), 0.5, device="cpu")).to(device).long()
