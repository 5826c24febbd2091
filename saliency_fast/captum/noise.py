"""NoiseTunnel, any attribution method under noise, and GradientShap, which is a case of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import (
    Attribution,
    GradientAttribution,
    explained,
    rows_depend,
)
from saliency_fast.captum.gradients import Saliency
from saliency_fast.captum.shared_calls import (
    calls_of,
    rewind_draws,
    samples_at_once,
    together_or_apart,
)
from saliency_fast.engine.independence import RowsMeetError
from saliency_fast.engine.points import Noise, first_elements
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.gradient import Gradient
from saliency_fast.methods.sampling import samples_level

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class NoiseTunnel(Attribution):
    """The mean, mean square or variance of a method's attributions of noisy copies of the inputs
    (Smilkov, 2017; Hooker, 2019; Adebayo, 2018).

    Args:
        attribution_method: an instance of a class of this package, of Captum's or of the user's.

    Example:
        >>> method = NoiseTunnel(Saliency(lambda x: (3 * x).sum(1)))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), nt_samples=4)
        tensor([[3., 3.]])
    """

    def __init__(self, attribution_method: Any) -> None:
        self.attribution_method = attribution_method
        self.is_delta_supported = self._has_delta = bool(attribution_method.has_convergence_delta())
        self._multiply_by_inputs = bool(attribution_method.multiplies_by_inputs)
        # Of whatever library the method is.
        self.is_gradient_method = hasattr(attribution_method, "gradient_func")
        super().__init__(attribution_method.forward_func)

    @forms.with_parameters(
        "inputs, nt_type='smoothgrad', nt_samples=5, nt_samples_batch_size=None, stdevs=1.0, "
        "draw_baseline_from_distrib=False, **kwargs"
    )
    def attribute(self, args: Any) -> Any:
        """What the method returns for its arguments `kwargs`, and its deltas where they ask."""
        parts, kwargs = forms.floating(forms.as_tuple(args.inputs)), args.kwargs
        nt_type, samples, most = args.nt_type, args.nt_samples, args.nt_samples_batch_size
        if nt_type not in TYPES:
            raise ContractError(
                "Noise types must be either `smoothgrad`, `smoothgrad_sq` or `vargrad`. Given "
                f"{nt_type}"
            )
        for name, value in {"nt_samples": samples, "nt_samples_batch_size": most}.items():
            if value is not None and value < 1:
                raise ContractError(f"{name} must be 1 or more: got {value}")
        stdevs = _read_stdevs(args.stdevs, parts)
        # A seed for each example: examples of one batch have noise of their own.
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(parts[0]),), device="cpu")
        method = self.attribution_method
        if reduction := self._reduction(nt_type, stdevs, kwargs):
            fused = _NoisyGradients(samples, stdevs[0], reduction, tuple(seeds.tolist()))
            of = {"target": None, "additional_forward_args": None, **kwargs}
            limit = None if most is None else most * len(parts[0])
            call = method._call(SimpleNamespace(inputs=parts, internal_batch_size=limit, **of))
            return forms.like_inputs(args.inputs, explained(fused, call))
        # Others' methods get all samples, as they would from Captum.
        own = isinstance(method, Attribution)
        if most is None:
            most = samples_at_once(parts, samples) if own else samples
        result = together_or_apart(
            lambda apart: self._summed(args, _Noise(parts, stdevs, seeds), 1 if apart else most),
            rewind_draws(parts[0].device),
            apart=own and min(samples, most) > 1 and rows_depend(method.forward_func),
        )
        maps = result.maps(nt_type, samples)
        values = maps if result.is_tuple else maps[0]
        if not result.deltas:
            return values
        return values, result.delta(args.nt_samples_batch_size or samples)

    def _reduction(
        self, nt_type: str, stdevs: tuple[float, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """The reduction of gradients by which the engine gets the same, where there is one."""
        method = self.attribution_method
        if type(method) is not Saliency or method.gradient_func is not forms.compute_gradients:
            return None
        if set(kwargs) - {"target", "abs", "additional_forward_args"} or len(set(stdevs)) > 1:
            return None
        absolute = bool(kwargs.get("abs", True))
        if nt_type == "vargrad":
            return None if absolute else "variance"
        return "square" if nt_type == "smoothgrad_sq" else "absolute" if absolute else "sum"

    def _summed(self, args: Any, noise: _Noise, most: int) -> _Sums:
        """The sums over all samples, `most` at once; raises RowsMeetError where samples of a call
        depend on each other in the model.
        """
        method, result, samples = self.attribution_method, _Sums(), args.nt_samples
        proves = min(samples, most) > 1 and isinstance(method, Attribution)
        layers = getattr(method, "layer", None) or ()
        several = layers if isinstance(layers, (list, tuple)) else (layers,)
        further = args.kwargs.get("additional_forward_args")
        shared = calls_of(method.forward_func, further, *several)
        for start in range(0, samples, most):
            count = min(most, samples - start)
            with torch.no_grad():
                rows = noise.rows(start, start + count)
                copies = (x.view(-1, count, *x.shape[1:]).transpose(0, 1) for x in rows)
                if proves and shared.depend(tuple(copies)):
                    raise RowsMeetError
                own, delta = _expanded(args, noise.inputs, count), None
                for one in rows if self.is_gradient_method else ():
                    one.requires_grad_()
                maps = method.attribute(forms.like_inputs(args.inputs, rows), **own)
                if self.is_delta_supported and own.get("return_convergence_delta"):
                    maps, delta = maps
                result.add(maps, delta, count)
                # The engine looks at points between the samples and their baselines.
                if proves and rows_depend(method.forward_func):
                    raise RowsMeetError
        return result


def _read_stdevs(stdevs: Any, inputs: Inputs) -> tuple[float, ...]:
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


@dataclass(frozen=True)
class _Noise:
    """The noise of each example of a call."""

    inputs: Inputs
    stdevs: tuple[float, ...]
    seeds: Tensor

    def rows(self, start: int, stop: int) -> Inputs:
        """Samples `start` to `stop` of every example, [B * samples, *], example-major."""
        count, device = stop - start, self.inputs[0].device
        offsets, result = first_elements(self.inputs), []
        for x, stdev, first in zip(self.inputs, self.stdevs, offsets, strict=True):
            example = torch.arange(len(x), device=device).repeat_interleave(count)
            sample = torch.arange(start, stop, device=device).repeat(len(x))
            sigma = torch.full((len(x),), stdev, dtype=torch.float64, device=device)
            plain = x.detach().contiguous().view(len(x), -1)
            of = sigma, self.seeds.to(device), example, sample, False, first
            result.append(ops.noise_points(plain, *of).view(-1, *x.shape[1:]))
        return tuple(result)


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
    """Float64 sums of maps and of their squares over samples, example by example, and deltas."""

    dtypes: list[torch.dtype] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    is_tuple: bool = False

    def add(self, maps: Any, delta: Tensor | None, samples: int) -> None:
        self.is_tuple = isinstance(maps, tuple)
        parts = [one.detach() for one in forms.as_tuple(maps)]
        self.dtypes = [one.dtype for one in parts]
        grouped = [one.double().reshape(-1, samples, *one.shape[1:]) for one in parts]
        sums = [of.sum(1) for one in grouped for of in (one, one.square())]
        pairs = zip(self.sums or map(torch.zeros_like, sums), sums, strict=True)
        self.sums = [total.add_(more) for total, more in pairs]
        if delta is not None:
            self.deltas.append(delta.detach().view(-1, samples))

    def maps(self, nt_type: str, samples: int) -> Inputs:
        means = [one / samples for one in self.sums]
        result = means[0::2] if nt_type == "smoothgrad" else means[1::2]
        if nt_type == "vargrad":
            result = [b - a * a for a, b in zip(means[0::2], means[1::2], strict=True)]
        return tuple(one.to(dtype) for one, dtype in zip(result, self.dtypes, strict=True))

    def delta(self, chunk: int) -> Tensor:
        """Example-major within each chunk of samples that the caller has asked for."""
        parts = torch.split(torch.cat(self.deltas, 1), chunk, 1)
        return torch.cat([one.flatten() for one in parts])


def _expanded(args: Any, inputs: Inputs, samples: int) -> dict[str, Any]:
    """A method's arguments for so many samples of every example, example-major."""
    result, draw = dict(args.kwargs), args.draw_baseline_from_distrib
    if (further := result.get("additional_forward_args")) is not None:
        further = forms.arguments_of(further, forms.interleaved, samples, 0)
        result["additional_forward_args"] = further
    if "target" in result:
        result["target"] = forms.interleaved(forms.as_target(result["target"]), samples)
    if "baselines" in result:
        baselines = forms.as_baselines(result["baselines"], inputs)
        forms.check_baselines(inputs, baselines, drawn=draw)
        pairs = zip(inputs, baselines, strict=True)
        result["baselines"] = tuple(_baseline(x, one, samples, draw) for x, one in pairs)
    if (mask := result.get("feature_mask")) is not None:
        several = forms.as_tuple(mask)
        masks = (one if len(one) == 1 else forms.interleaved(one, samples, 0) for one in several)
        result["feature_mask"] = forms.like_inputs(mask, tuple(masks))
    return result


def _baseline(x: Tensor, baseline: Any, samples: int, draw: bool) -> Any:
    """A baseline for each sample; sets are drawn from NumPy's global generator, as in Captum."""
    if not isinstance(baseline, Tensor):
        return baseline
    if draw:
        return baseline[np.random.choice(len(baseline), samples * len(x)).tolist()]
    return forms.interleaved(baseline, samples) if len(baseline) == len(x) > 1 else baseline


class GradientShap(GradientAttribution):
    """The mean of (x - x') times the gradient at a random point between a noisy x and a random
    baseline x' (Lundberg, 2017; Erion, 2021).

    Example:
        >>> method = GradientShap(lambda x: (3 * x).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]]), torch.zeros(4, 2))
        tensor([[ 3., -6.]])
    """

    _has_delta = True

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @forms.with_parameters(
        "inputs, baselines, n_samples=5, stdevs=0.0, target=None, additional_forward_args=None, "
        "return_convergence_delta=False"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape, or (attributions, delta).

        Rows of the baselines and points come from NumPy's global generator.
        """
        sets = forms.drawn_from(args.baselines, args.inputs)
        starts = forms.as_baselines(sets, forms.as_tuple(args.inputs))
        if not isinstance(starts[0], Tensor):
            raise ContractError(
                "Baselines distribution has to be provided in a form of a torch.Tensor "
                f"{starts[0]}; pass a tensor [M, ...] for each input"
            )
        of = {**vars(args), "baselines": starts, "nt_samples": args.n_samples}
        of.pop("n_samples")
        tunnel = NoiseTunnel(_RandomPoint(self))
        return tunnel.attribute(**of, draw_baseline_from_distrib=True)


class _RandomPoint(GradientAttribution):
    """(x - x') times the gradient at one random point between them, for a GradientShap."""

    _has_delta = True

    def __init__(self, method: GradientShap) -> None:
        super().__init__(method.forward_func)
        self.gradient_func = method.gradient_func
        self._multiply_by_inputs = method.multiplies_by_inputs

    @forms.with_parameters(
        "inputs, baselines, target=None, additional_forward_args=None, "
        "return_convergence_delta=False"
    )
    def attribute(self, args: Any) -> Any:
        call = self._call(args)
        drawn = torch.from_numpy(np.random.uniform(0.0, 1.0, len(call.inputs[0])))
        pairs = list(zip(call.inputs, args.baselines, strict=True))
        points = tuple(
            torch.lerp(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand_as(x), x, share)
            for x, b in pairs
            for share in [drawn.to(x).view(-1, *(1,) * (x.dim() - 1))]
        )
        maps = explained(Gradient(), replace(call, inputs=points, baselines=None))
        if self.multiplies_by_inputs:
            maps = tuple(m * (x - b) for m, (x, b) in zip(maps, pairs, strict=True))
        return self._result(args, call, maps)
