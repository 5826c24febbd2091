"""NoiseTunnel, any attribution method under noise, and GradientShap, which is a case of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import (
    arguments_of,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    floating,
    interleaved,
    like_inputs,
    public,
)
from saliency_fast.captum.attribute_call import explained, rows_depend
from saliency_fast.captum.attribution import Attribution, GradientAttribution
from saliency_fast.captum.forward import compute_gradients
from saliency_fast.captum.gradients import Saliency
from saliency_fast.captum.shared_calls import calls_of, rewind_draws, together_or_apart
from saliency_fast.engine.independence import RowsMeetError
from saliency_fast.engine.points import Noise, first_elements
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.gradient import Gradient
from saliency_fast.methods.sampling import samples_level

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")
CHUNK_BYTES = 64 * 1024**2
"""Bytes of copies of the batch that are held at once, unless the caller says how many."""


class NoiseTunnel(Attribution):
    """The mean, mean square or variance of a method's attributions of noisy copies of the inputs
    (Smilkov, 2017; Hooker, 2019; Adebayo, 2018).

    Args:
        attribution_method: an instance of a class of this package, of Captum's or of the user's.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import NoiseTunnel, Saliency
        >>> method = NoiseTunnel(Saliency(lambda x: (3 * x).sum(1)))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), nt_samples=4)
        tensor([[3., 3.]])
    """

    def __init__(self, attribution_method: Any) -> None:
        self.attribution_method = attribution_method
        self.is_delta_supported = attribution_method.has_convergence_delta()
        self._multiply_by_inputs = bool(attribution_method.multiplies_by_inputs)
        # Of whatever library the method is.
        self.is_gradient_method = hasattr(attribution_method, "gradient_func")
        super().__init__(attribution_method.forward_func)

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
        """Attributes as the method does, with noise.

        Args:
            nt_type: "smoothgrad" (mean), "smoothgrad_sq" (mean square) or "vargrad" (variance,
                E[a^2] - E[a]^2).
            nt_samples: noisy copies of each example, from seeds of PyTorch's global generator.
            nt_samples_batch_size: copies of all examples at once; None plans memory.
            stdevs: the standard deviation of the noise, or one for each input.
            draw_baseline_from_distrib: whether baselines are sets [M, *] to draw rows from.
            **kwargs: of the method's `attribute`.

        Returns:
            What the method returns, and its deltas [B * nt_samples] where kwargs ask for them.
        """
        parts = floating(as_tuple(inputs))
        if nt_type not in TYPES:
            raise ContractError(
                "Noise types must be either `smoothgrad`, `smoothgrad_sq` or `vargrad`. Given "
                f"{nt_type}"
            )
        sizes = {"nt_samples": nt_samples, "nt_samples_batch_size": nt_samples_batch_size}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ContractError(f"{name} must be 1 or more: got {value}")
        noise = _Noise(parts, _read_stdevs(stdevs, parts), _draw_seeds(len(parts[0])))
        most, method = nt_samples_batch_size, self.attribution_method
        if reduction := self._reduction(nt_type, noise.stdevs, kwargs):
            fused = _NoisyGradients(
                nt_samples, noise.stdevs[0], reduction, tuple(noise.seeds.tolist())
            )
            further = kwargs.get("target"), kwargs.get("additional_forward_args")
            limit = None if most is None else most * len(parts[0])
            call = method._call(parts, *further, points_per_launch=limit)
            return like_inputs(inputs, explained(fused, call))
        if most is None:
            # Others' methods get all samples, as they would from Captum.
            own = isinstance(method, Attribution)
            most = samples_at_once(parts, nt_samples) if own else nt_samples
        of = inputs, noise, draw_baseline_from_distrib, kwargs
        chunk = min(nt_samples, most)
        proves = chunk > 1 and isinstance(method, Attribution)
        found = together_or_apart(
            lambda apart: self._summed(nt_samples, 1 if apart else chunk, *of),
            rewind_draws(parts[0].device),
            apart=proves and rows_depend(method.forward_func),
        )
        maps = found.maps(nt_type, nt_samples)
        values = maps if found.is_tuple else maps[0]
        if not found.deltas:
            return values
        return values, found.delta(nt_samples_batch_size or nt_samples)

    def _reduction(
        self, nt_type: str, stdevs: tuple[float, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """The reduction of gradients by which the engine gets the same, where there is one."""
        method = self.attribution_method
        if type(method) is not Saliency or method.gradient_func is not compute_gradients:
            return None
        if set(kwargs) - {"target", "abs", "additional_forward_args"} or len(set(stdevs)) > 1:
            return None
        absolute = bool(kwargs.get("abs", True))
        if nt_type == "vargrad":
            return None if absolute else "variance"
        return "square" if nt_type == "smoothgrad_sq" else "absolute" if absolute else "sum"

    def _summed(
        self,
        samples: int,
        chunk: int,
        inputs: Any,
        noise: _Noise,
        draw: bool,
        kwargs: dict[str, Any],
    ) -> _Sums:
        """The sums over all samples, `chunk` at once; raises RowsMeetError where samples of a chunk
        depend on each other in the model. What others' methods call together is left to them.
        """
        method, found = self.attribution_method, _Sums()
        proves = chunk > 1 and isinstance(method, Attribution)
        layers = getattr(method, "layer", None) or ()
        several = layers if isinstance(layers, (list, tuple)) else (layers,)
        shared = calls_of(method.forward_func, kwargs.get("additional_forward_args"), *several)
        for start in range(0, samples, chunk):
            count = min(chunk, samples - start)
            with torch.no_grad():
                rows = noise.rows(start, start + count)
                if proves and shared.depend(_by_sample(rows, count)):
                    raise RowsMeetError
                own = _expanded(kwargs, noise.inputs, count, draw)
                found.add(*self._of(like_inputs(inputs, rows), own), count)
                # The engine looks at points between the samples and their baselines.
                if proves and rows_depend(method.forward_func):
                    raise RowsMeetError
        return found

    def _of(self, rows: Any, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The method's attributions of noisy rows, and its deltas."""
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


def _read_stdevs(stdevs: Any, inputs: Inputs) -> tuple[float, ...]:
    """One standard deviation per input."""
    if not isinstance(stdevs, tuple):
        if not isinstance(stdevs, float):
            raise ContractError(
                f"stdevs must be type float. Given: {type(stdevs)}; pass float(stdevs), or a tuple "
                "with one for each input"
            )
        return (stdevs,) * len(inputs)
    if len(stdevs) != len(inputs):
        raise ContractError(
            f"The number of input tensors in {len(inputs)} must be equal to the number of stdevs "
            f"values {len(stdevs)}"
        )
    return tuple(map(float, stdevs))


def _draw_seeds(batch: int) -> Tensor:
    """A seed for each example, int64 [B]: examples of one batch have noise of their own."""
    return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device="cpu")


def samples_at_once(inputs: Inputs, samples: int) -> int:
    """How many copies of the batch fit into `CHUNK_BYTES`, one at least."""
    each = sum(x.numel() * x.element_size() for x in inputs)
    return min(samples, max(1, CHUNK_BYTES // max(1, each)))


@dataclass(frozen=True)
class _Noise:
    """The noise of each example of a call."""

    inputs: Inputs
    stdevs: tuple[float, ...]
    seeds: Tensor

    def rows(self, start: int, stop: int) -> Inputs:
        """Samples `start` to `stop` of every example, [B * samples, *], example-major."""
        count, device = stop - start, self.inputs[0].device
        offsets, found = first_elements(self.inputs), []
        for x, stdev, first in zip(self.inputs, self.stdevs, offsets, strict=True):
            example = torch.arange(len(x), device=device).repeat_interleave(count)
            sample = torch.arange(start, stop, device=device).repeat(len(x))
            sigma = torch.full((len(x),), stdev, dtype=torch.float64, device=device)
            plain = x.detach().contiguous().view(len(x), -1)
            of = sigma, self.seeds.to(device), example, sample, False, first
            found.append(ops.noise_points(plain, *of).view(-1, *x.shape[1:]))
        return tuple(found)


@dataclass(frozen=True)
class _NoisyGradients:
    """Gradients of noisy copies as a method of the engine, with a seed for each example."""

    samples: int
    stdev: float
    reduction: str
    seed: tuple[int, ...]
    name = "smoothgrad"

    def recipe(self) -> Recipe:
        noise = Noise(0.0, self.stdev, self.seed, antithetic=False)
        return WeightedSum(noise, samples_level(self.samples, False), self.reduction)


@dataclass
class _Sums:
    """Sums of maps and of their squares over samples, example by example, and all deltas; in
    float64, since a variance is the small difference of two means.
    """

    dtypes: list[torch.dtype] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    is_tuple: bool = False

    def add(self, maps: Any, delta: Tensor | None, samples: int) -> None:
        self.is_tuple = isinstance(maps, tuple)
        parts = [one.detach() for one in as_tuple(maps)]
        self.dtypes = [one.dtype for one in parts]
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

    def maps(self, nt_type: str, samples: int) -> Inputs:
        means, squares = [[one / samples for one in some] for some in (self.values, self.squares)]
        found = means if nt_type == "smoothgrad" else squares
        if nt_type == "vargrad":
            found = [b - a * a for a, b in zip(means, squares, strict=True)]
        return tuple(one.to(dtype) for one, dtype in zip(found, self.dtypes, strict=True))

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
        further = kwargs["additional_forward_args"]
        found["additional_forward_args"] = arguments_of(further, interleaved, samples, 0)
    if "target" in kwargs:
        found["target"] = interleaved(as_target(kwargs["target"]), samples)
    if "baselines" in kwargs:
        baselines = as_baselines(kwargs["baselines"], inputs)
        check_baselines(inputs, baselines, drawn=draw)
        pairs = zip(inputs, baselines, strict=True)
        found["baselines"] = tuple(_baseline(x, one, samples, draw) for x, one in pairs)
    mask = kwargs.get("feature_mask")
    if mask is not None:
        several = as_tuple(mask)
        masks = (one if len(one) == 1 else interleaved(one, samples, 0) for one in several)
        found["feature_mask"] = like_inputs(mask, tuple(masks))
    return found


def _baseline(x: Tensor, baseline: Any, samples: int, draw: bool) -> Any:
    """A baseline for each sample; sets are drawn from NumPy's global generator, as in Captum."""
    if not isinstance(baseline, Tensor):
        return baseline
    if draw:
        return baseline[np.random.choice(len(baseline), samples * len(x)).tolist()]
    return interleaved(baseline, samples) if len(baseline) == len(x) > 1 else baseline


class GradientShap(GradientAttribution):
    """The mean of (x - x') times the gradient at a random point between a noisy x and a random
    baseline x' (Lundberg, 2017; Erion, 2021).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import GradientShap
        >>> method = GradientShap(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), torch.zeros(4, 2))
        tensor([[ 3., -6.]])
    """

    _has_delta = True

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            baselines: a set [M, *] for each input, or a function that returns them, of the inputs
                if it takes an argument. Rows and points come from NumPy's global generator.
            n_samples: random points of each example.
            stdevs: the standard deviation of noise on the inputs, or one for each.

        Returns:
            Attributions of the inputs' shape, or (attributions, delta) with deltas
            [B * n_samples], example-major.
        """
        if callable(baselines):
            baselines = baselines(inputs) if signature(baselines).parameters else baselines()
        starts = as_baselines(baselines, as_tuple(inputs))
        if not isinstance(starts[0], Tensor):
            raise ContractError(
                "Baselines distribution has to be provided in a form of a torch.Tensor "
                f"{starts[0]}; pass a tensor [M, ...] for each input"
            )
        return NoiseTunnel(_RandomPoint(self)).attribute(
            inputs,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=starts,
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )


class _RandomPoint(GradientAttribution):
    """(x - x') times the gradient at one random point between them, for a GradientShap."""

    _has_delta = True

    def __init__(self, method: GradientShap) -> None:
        super().__init__(method.forward_func)
        self.gradient_func = method.gradient_func
        self._multiply_by_inputs = method.multiplies_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        call = self._call(inputs, target, additional_forward_args, baselines=baselines)
        drawn = torch.from_numpy(np.random.uniform(0.0, 1.0, len(call.inputs[0])))
        pairs = list(zip(call.inputs, baselines, strict=True))
        points = tuple(
            torch.lerp(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand_as(x), x, share)
            for x, b in pairs
            for share in [drawn.to(x).view(-1, *(1,) * (x.dim() - 1))]
        )
        maps = explained(Gradient(), replace(call, inputs=points, baselines=None))
        if self.multiplies_by_inputs:
            maps = tuple(m * (x - b) for m, (x, b) in zip(maps, pairs, strict=True))
        return self._with_delta(call, maps, like_inputs(inputs, maps), return_convergence_delta)
