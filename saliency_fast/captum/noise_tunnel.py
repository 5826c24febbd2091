"""NoiseTunnel: any attribution method, ours, Captum's or a user's own, under noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.captum.apart import calls_of, drawn_again
from saliency_fast.captum.attribution import Attribution
from saliency_fast.captum.contract import (
    as_args,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    floating,
    like_inputs,
    public,
)
from saliency_fast.captum.forward import compute_gradients
from saliency_fast.captum.gradient import Saliency
from saliency_fast.captum.noise import Sampled, draw_seeds, noisy, read_stdevs, samples_at_once
from saliency_fast.captum.run import explained, seen_to_meet
from saliency_fast.errors import ContractError

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class NoiseTunnel(Attribution):
    """Mean, mean square or variance of a method's maps of noisy copies of the input (Smilkov, 2017;
    Hooker, 2019; Adebayo, 2018).
    """

    def __init__(self, attribution_method: Any) -> None:
        self.attribution_method = attribution_method
        self.is_delta_supported = attribution_method.has_convergence_delta()
        self._multiply_by_inputs = attribution_method.multiplies_by_inputs
        # Of whatever library the method is.
        self.is_gradient_method = hasattr(attribution_method, "gradient_func")
        super().__init__(attribution_method.forward_func)

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self._multiply_by_inputs)

    def has_convergence_delta(self) -> bool:
        return bool(self.is_delta_supported)

    @public
    def attribute(
        self,
        inputs: Any,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Maps like the method's own, and its deltas [B * nt_samples] where kwargs ask for them.

        The variance is E[a^2] - E[a]^2. nt_samples_batch_size: samples of all examples at once.
        kwargs: the method's.
        """
        parts = floating(as_tuple(inputs))
        if nt_type not in TYPES:
            raise ContractError(
                "Noise types must be either `smoothgrad`, `smoothgrad_sq` or `vargrad`. Given "
                f"{nt_type}"
            )
        for name, value in (
            ("nt_samples", nt_samples),
            ("nt_samples_batch_size", nt_samples_batch_size),
        ):
            if value is not None and value < 1:
                raise ContractError(f"{name} must be 1 or more: got {value}")
        deviations = read_stdevs(stdevs, parts)
        seeds = draw_seeds(len(parts[0]))
        if reduction := self._fused(nt_type, deviations, kwargs):
            tunnel = Sampled(nt_samples, deviations[0], reduction, tuple(seeds.tolist()))
            return self._in_one(tunnel, inputs, parts, nt_samples_batch_size, kwargs)
        chunk = self._chunk(parts, nt_samples, nt_samples_batch_size)
        of = inputs, parts, deviations, seeds, draw_baseline_from_distrib, kwargs
        again = drawn_again(parts[0].device)
        found = self._summed(nt_samples, chunk, *of)
        if found is None:
            # Anew with the same draws: samples that shared a call before may have met, too.
            again()
            found = self._summed(nt_samples, 1, *of)
        assert found is not None
        maps = found.maps(nt_type, nt_samples)
        values = like_inputs(() if found.is_tuple else None, maps)
        if not found.deltas:
            return values
        return values, found.delta(nt_samples_batch_size or nt_samples)

    def _fused(self, nt_type: str, stdevs: tuple[float, ...], kwargs: dict[str, Any]) -> str | None:
        """The reduction of gradients that comes to the same, where there is one."""
        method = self.attribution_method
        if type(method) is not Saliency or method.gradient_func is not compute_gradients:
            return None
        if set(kwargs) - {"target", "abs", "additional_forward_args"} or len(set(stdevs)) > 1:
            return None
        size = bool(kwargs.get("abs", True))
        if nt_type == "vargrad":
            return None if size else "variance"
        return "square" if nt_type == "smoothgrad_sq" else "absolute" if size else "sum"

    def _in_one(
        self,
        tunnel: Sampled,
        inputs: Any,
        parts: Inputs,
        at_once: int | None,
        kwargs: dict[str, Any],
    ) -> Any:
        target, further = kwargs.get("target"), kwargs.get("additional_forward_args")
        most = None if at_once is None else at_once * len(parts[0])
        asked = self.attribution_method._asked(parts, target, further, points_per_launch=most)
        return like_inputs(inputs, explained(tunnel, asked))

    def _chunk(self, parts: Inputs, samples: int, at_once: int | None) -> int:
        """Samples at once; others' methods get all of them, as they would from Captum."""
        if at_once is not None:
            return min(samples, at_once)
        ours = isinstance(self.attribution_method, Attribution)
        return samples_at_once(parts, samples) if ours else samples

    def _summed(
        self,
        samples: int,
        chunk: int,
        inputs: Any,
        parts: Inputs,
        stdevs: tuple[float, ...],
        seeds: Tensor,
        draw: bool,
        kwargs: dict[str, Any],
    ) -> _Sums | None:
        """The maps of all samples, `chunk` at once; None where those of a chunk meet in the model.
        What others' methods call together is theirs.
        """
        method, found = self.attribution_method, _Sums()
        proves = chunk > 1 and isinstance(method, Attribution)
        if proves and seen_to_meet(method.forward_func):
            return None
        layers = getattr(method, "layer", None) or ()
        several = layers if isinstance(layers, (list, tuple)) else (layers,)
        shared = calls_of(method.forward_func, kwargs.get("additional_forward_args"), *several)
        for start in range(0, samples, chunk):
            stop = min(start + chunk, samples)
            with torch.no_grad():
                rows = noisy(parts, stdevs, seeds, start, stop)
                if proves and shared.meet(_by_sample(rows, stop - start)):
                    return None
                own = _expanded(kwargs, parts, stop - start, draw)
                found.add(*self._of(like_inputs(inputs, rows), own), stop - start)
                # What the engine has seen of points between the samples and their baselines.
                if proves and seen_to_meet(method.forward_func):
                    return None
        return found

    def _of(self, rows: Any, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The method's maps of noisy rows, and its deltas."""
        method = self.attribution_method
        if self.is_gradient_method:
            for one in as_tuple(rows):
                one.requires_grad_()
        unwrapped = getattr(method.attribute, "__wrapped__", None)
        if unwrapped is None:
            found = method.attribute(rows, **kwargs)
        else:
            found = unwrapped(method, rows, **kwargs)
        if self.is_delta_supported and kwargs.get("return_convergence_delta"):
            maps, delta = found
            return maps, delta
        return found, None


@dataclass
class _Sums:
    """Sums of maps and of their squares over samples, example by example, and all deltas; in
    float64, since a variance is the small difference of two means.
    """

    kinds: list[torch.dtype] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    is_tuple: bool = False

    def add(self, maps: Any, delta: Tensor | None, samples: int) -> None:
        self.is_tuple = isinstance(maps, tuple)
        parts = [one.detach() for one in as_tuple(maps)]
        self.kinds = [one.dtype for one in parts]
        grouped = [one.double().reshape(-1, samples, *one.shape[1:]) for one in parts]
        sums = [one.sum(1) for one in grouped]
        squares = [one.square().sum(1) for one in grouped]
        if not self.values:
            self.values, self.squares = sums, squares
        else:
            for total, more in zip(self.values + self.squares, sums + squares, strict=True):
                total += more
        if delta is not None:
            self.deltas.append(delta.detach().view(-1, samples))

    def maps(self, kind: str, samples: int) -> Inputs:
        means, squares = [[one / samples for one in some] for some in (self.values, self.squares)]
        found = means if kind == "smoothgrad" else squares
        if kind == "vargrad":
            found = [b - a * a for a, b in zip(means, squares, strict=True)]
        return tuple(one.to(kept) for one, kept in zip(found, self.kinds, strict=True))

    def delta(self, chunk: int) -> Tensor:
        """Example-major within each chunk of samples that the caller has asked for."""
        parts = torch.split(torch.cat(self.deltas, 1), chunk, 1)
        return torch.cat([one.flatten() for one in parts])


def _by_sample(rows: Inputs, samples: int) -> Inputs:
    """Example-major rows [B * samples, *] as copies of the batch [samples, B, *]."""
    return tuple(x.view(-1, samples, *x.shape[1:]).transpose(0, 1) for x in rows)


def _expanded(kwargs: dict[str, Any], inputs: Inputs, samples: int, draw: bool) -> dict[str, Any]:
    """A method's arguments for so many samples of every example, example-major."""
    found = dict(kwargs)
    if kwargs.get("additional_forward_args") is not None:
        further = as_args(kwargs["additional_forward_args"])
        found["additional_forward_args"] = tuple(_repeated(one, samples, 1) for one in further)
    target = as_target(kwargs.get("target"))
    if isinstance(target, list):
        found["target"] = [one for one in target for _ in range(samples)]
    elif isinstance(target, Tensor) and target.numel() > 1:
        found["target"] = _repeated(target, samples, 1)
    if "baselines" in kwargs:
        baselines = as_baselines(kwargs["baselines"], inputs)
        check_baselines(inputs, baselines, drawn=draw)
        pairs = zip(inputs, baselines, strict=True)
        found["baselines"] = tuple(_baseline(x, one, samples, draw) for x, one in pairs)
    mask = kwargs.get("feature_mask")
    if mask is not None:
        masks = tuple(
            one if len(one) == 1 else _repeated(one, samples, 1) for one in as_tuple(mask)
        )
        found["feature_mask"] = like_inputs(mask, masks)
    return found


def _baseline(x: Tensor, baseline: Any, samples: int, draw: bool) -> Any:
    if not isinstance(baseline, Tensor):
        return baseline
    if draw:
        return baseline[draw_rows(len(baseline), samples * len(x))]
    return _repeated(baseline, samples, 2) if len(baseline) == len(x) > 1 else baseline


def draw_rows(count: int, rows: int) -> list[int]:
    """Rows of a set of baselines, from NumPy's global generator as in Captum."""
    found: list[int] = np.random.choice(count, rows).tolist()
    return found


def _repeated(value: Any, samples: int, least: int) -> Any:
    """Tensors with an axis of examples, of `least` at least, with so many rows of each."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) < least:
        return value
    return value.repeat_interleave(samples, 0)
