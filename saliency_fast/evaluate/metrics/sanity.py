"""The model randomisation test: whether maps change when the model is re-initialised."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saliency_fast._torch_compat import own_buffers, own_parameters, unwrapped, version_of
from saliency_fast.errors import InputError, ModelError, SaliencyError
from saliency_fast.evaluate.inputs import EvaluationInput, position_sums
from saliency_fast.evaluate.maps import is_constant, rank_correlation, rank_ssim, ssim
from saliency_fast.evaluate.metric import SANITY, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Curve, Outcome, bootstrap, caveats_of
from saliency_fast.evaluate.scores import Scorer
from saliency_fast.methods.parts import checks

ORDERS = ("cascading", "bottom_up", "independent")
HALF = math.sqrt(0.5)
"""The correlation of two maps that share half of their variance."""
UNNOTICED = 0.99
"""A map whose correlation is higher after a change does not depend on what changed."""
FEWEST_POSITIONS = 4
"""Fewer positions than this are ordered alike by chance too often for a verdict."""
_DECIDING = ("rank_correlation", "rank_ssim")
_QUICK = {"draws": 1, "stages": 4}
_DRAWING = threading.Lock()
"""Layers draw from the random state of the whole process: one at a time."""


@in_suite(
    SANITY,
    "Adebayo et al., 2018",
    asks="The similarity of maps to those of a copy of the model with one layer re-initialised: "
    "high where the map does not depend on most layers.",
    name="sanity_independent",
    quick=_QUICK,
    fields={"order": "independent", "draws": 1},
)
@in_suite(SANITY, "Adebayo et al., 2018", quick=_QUICK)
@dataclass(frozen=True)
class SanityCheck(Metric):
    """The similarity of maps to those of a copy of the model whose layers are re-initialised
    (Adebayo, 2018): a map that stays the same does not show what the model has learned.

    Values: the magnitude of the rank correlation of each example's map with that of a model whose
    layers are all re-initialised; with order="independent", its mean over layers. A map and its
    negative count as equal, since a random model decides the sign. `passed`: whether the upper ends
    of the 95 % intervals of the mean rank correlation and of the mean SSIM of ranks lie below the
    threshold; None for order="independent". Maps with correlation r share r ** 2 of their variance,
    less than half below the default sqrt(1/2); SSIM of maps with equal means and variances is r.

    `curve`: the rank correlation over stages. `details`: every similarity, float64 [B, stages];
    "layers"; "unchanged", those that a draw leaves as they are; "unnoticed", those that an
    independent order does not notice; "floor", the mean similarity of maps of different examples
    and of different random models ("ssim" of values is high there, so that it does not decide);
    "again", that of the maps with those that the model itself gives again; "final", the intervals
    of the last stage; "unmoved", the share of stages before the map moves below the threshold.

    Args:
        order: "cascading" from the output to the input, layer after layer; "bottom_up" from the
            input; "independent" each layer alone.
        draws: The number of random models that are averaged.
        stages: After how many groups of layers maps are made; None for each layer.
        threshold: Of the verdict, a correlation.
        seed: Of the draws.

    Example:
        >>> model, x = torch.nn.Linear(9, 2), torch.arange(36.0).view(4, 9)
        >>> blind = lambda model, x, target: x.abs()
        >>> SanityCheck(draws=1)(model, x, x.abs(), target=0, method=blind).passed
        False
    """

    order: str = "cascading"
    draws: int = 3
    stages: int | None = None
    threshold: float = HALF
    seed: int = 0
    name = "sanity_check"
    better = "lower"
    needs = ("model", "method")

    def __post_init__(self) -> None:
        check_fields(self, order=ORDERS, draws=1, threshold=checks.positive, seed=0)
        if self.stages is not None:
            checks.integer("stages", self.stages, 1)
        if self.threshold > 1.0:
            raise InputError(f"threshold is a correlation, up to 1: got {self.threshold}")

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        structured, maps = data.inputs.dim() > 2, data.places
        again = _similarities(maps, position_sums(data.explain(data.inputs)), structured)
        copy = Randomised(data.model, lambda model: _scores(model, data))
        unchanged = self._unchanged(copy, data)
        # Groups of layers of as equal size as possible.
        layers = len(copy.layers)
        count = min(self.stages or layers, layers)
        ends = [layers * one // count for one in range(count + 1)]
        groups = [list(range(start, stop)) for start, stop in pairwise(ends)]
        if self.order == "bottom_up":
            groups = [group[::-1] for group in reversed(groups)]
        similar: dict[str, Tensor] = {}
        final = []
        for draw in range(self.draws):
            rows = []
            for after in self._walk(data, copy, groups, draw):
                rows.append(_similarities(maps, after, structured))
            final.append(after)
            for name in again:
                share = torch.stack([one[name] for one in rows], 1) / self.draws
                similar[name] = similar.get(name, 0.0) + share
        alone = self.order == "independent"
        details = {
            **similar,
            "layers": [
                " to ".join(dict.fromkeys(copy.layers[one].name or "(model)" for one in pair))
                for pair in ((group[0], group[-1]) for group in groups)
            ],
            "unchanged": unchanged,
            "again": again,
            "floor": {
                "examples": _pairs([maps, maps.roll(1, 0)] if len(maps) > 1 else [], structured),
                "models": {} if alone else _pairs(final, structured),
            },
        }
        if alone:
            return self._independent(similar, details)
        return self._cascaded(data, similar, details, final)

    def _walk(
        self, data: EvaluationInput, copy: Randomised, groups: list[list[int]], draw: int
    ) -> Iterator[Tensor]:
        """Maps [B, *spatial] after each group of layers is re-initialised."""
        for number in range(len(copy.layers)):
            copy.restore(number)
        for group in groups:
            for number in group:
                copy.draw(number, seed_of(self.seed, draw, number))
            try:
                yield position_sums(data.explain(data.inputs, copy.model))
            except SaliencyError as error:
                raise ModelError(
                    f"maps cannot be made with {copy.layers[group[-1]].name!r} re-initialised: "
                    f"{error}; try another method, or order='independent'"
                ) from error
            if self.order == "independent":
                for number in group:
                    copy.restore(number)

    def _unchanged(self, copy: Randomised, data: EvaluationInput) -> list[str]:
        """Names of layers that a draw leaves as they are; raises where no draw has an effect."""
        numbers = range(len(copy.layers))
        changed = [copy.draw(one, seed_of(self.seed, 0, one)) for one in numbers]
        if not any(changed):
            raise ModelError(
                "re-initialising the model's layers changes none of them: their "
                "reset_parameters give the values that they have; evaluate a trained model"
            )
        try:
            scores = _scores(copy.model, data)
        except SaliencyError as error:
            raise ModelError(
                f"the model cannot be run with all its parameters re-initialised: {error}"
            ) from error
        if torch.equal(scores, data.first.scores):
            raise ModelError(
                "the model's scores stay the same when all its parameters are re-initialised: they "
                f"do not depend on its {len(numbers)} layers; keep weights in nn.Parameter, and "
                "look for a constant score"
            )
        layers = zip(copy.layers, changed, strict=True)
        return [layer.name for layer, different in layers if not different]

    def _independent(self, similar: dict[str, Tensor], details: dict[str, Any]) -> Outcome:
        """The outcome of layers re-initialised one at a time: which of them are not noticed."""
        least = torch.stack([similar[one].mean(0) for one in _DECIDING if one in similar]).amin(0)
        details["unnoticed"] = [
            name
            for name, one in zip(details["layers"], least.tolist(), strict=True)
            if one > UNNOTICED and name not in details["unchanged"]
        ]
        ranked = similar["rank_correlation"]
        number = torch.arange(ranked.shape[1], dtype=torch.float64, device=ranked.device)
        curve = Curve(number, ranked, "layer re-initialised, from the output", "rank correlation")
        caveats = caveats_of(_about_layers(details["unchanged"]))
        return self._outcome(ranked.mean(1), curve=curve, details=details, caveats=caveats)

    def _cascaded(
        self,
        data: EvaluationInput,
        similar: dict[str, Tensor],
        details: dict[str, Any],
        final: list[Tensor],
    ) -> Outcome:
        """The outcome of layers re-initialised one after another: the verdict."""
        means = {name: bootstrap(similar[name][:, -1]) for name in _DECIDING if name in similar}
        passed: bool | None = all(one.high < self.threshold for one in means.values())
        low = (similar["rank_correlation"].mean(0) < self.threshold).tolist()
        details["final"] = means
        # Most stages for guided backpropagation, few for the gradient.
        details["unmoved"] = (low.index(True) if True in low else len(low)) / len(low)
        repeatability = bootstrap(details["again"]["rank_correlation"]).mean
        positions = data.places[0].numel()
        flat = sum(int((is_constant(one) & ~is_constant(data.places)).sum()) for one in final)
        caveats = caveats_of(
            _about_layers(details["unchanged"]),
            (False, "") if passed else _about_zeros(data.places, final, self.threshold),
            (
                repeatability < UNNOTICED,
                "explained again by method=, the model itself gives other maps (rank correlation "
                f"{repeatability:.2g}): are target, baseline and method those of the maps?",
            ),
            (
                positions < FEWEST_POSITIONS,
                f"maps of {positions} positions are similar by chance: no verdict",
            ),
            (data.batch == 1, "one example has no interval: the verdict rests on its value alone"),
            (
                flat,
                f"{flat} of {len(final) * data.batch} maps of re-initialised models are "
                "constant, and count as not similar: such a model may have constant scores",
            ),
        )
        if repeatability < self.threshold or positions < FEWEST_POSITIONS:
            passed = None
        ranked = [details["again"]["rank_correlation"], *similar["rank_correlation"].T]
        y = torch.stack(ranked, 1)
        share = torch.linspace(0, 1, y.shape[1], dtype=torch.float64, device=y.device)
        return self._outcome(
            y[:, -1],
            curve=Curve(share, y, "share of layers re-initialised", "rank correlation"),
            passed=passed,
            threshold=self.threshold,
            details=details,
            caveats=caveats,
        )


def _similarities(a: Tensor, b: Tensor, structured: bool) -> dict[str, Tensor]:
    """The similarities of maps [B, *spatial], up to their sign, float64 [B] by name."""
    similar = {
        "rank_correlation": rank_correlation(a, b).abs(),
        "rank_correlation_of_magnitudes": rank_correlation(a.abs(), b.abs()),
    }
    if structured and a.dim() <= 4:
        for name, measure in (("rank_ssim", rank_ssim), ("ssim", ssim)):
            similar[name] = torch.maximum(measure(a, b), measure(a, -b))
    both = (is_constant(a) & is_constant(b)).double()
    return {name: torch.where(one.isnan(), both, one) for name, one in similar.items()}


def _scores(model: Any, data: EvaluationInput) -> Tensor:
    """Another model's scores of the inputs, float64 [B]."""
    return Scorer(model, data.inputs, data.classes, data.running).again()[0].scores


def _pairs(maps: Sequence[Tensor], structured: bool) -> dict[str, float]:
    """The mean similarity of each of several batches of maps with the next."""
    pairs = [_similarities(one, other, structured) for one, other in pairwise(maps)]
    names = pairs[0] if pairs else ()
    return {name: float(torch.stack([one[name] for one in pairs]).mean()) for name in names}


def _about_layers(names: list[str]) -> tuple[bool, str]:
    """Whether a draw leaves layers as they are, and which."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    what = "layers are the same when re-initialised, so that their stages have no effect"
    return bool(names), f"{len(names)} {what}: {shown}"


def _about_zeros(maps: Tensor, final: list[Tensor], threshold: float) -> tuple[bool, str]:
    """Whether maps are similar only because both are zero at the same positions, in words."""
    left, shares = [], []
    for other in final:
        for a, b in zip(maps.flatten(1), other.flatten(1), strict=True):
            some = (a != 0) | (b != 0)
            shares.append(1.0 - float(some.double().mean()))
            if bool(some.any()):
                left.append(rank_correlation(a[some][None], b[some][None]).abs())
    remaining = float(torch.cat(left).nanmean()) if left else 1.0
    share = sum(shares) / len(shares)
    return share > 0 and remaining < threshold, (
        f"{100 * share:.0f} % of positions are zero in both maps, before and after; the rank "
        f"correlation of the others is {remaining:.2g}: what stays is mostly where zeros are, "
        "which an input may decide without the model"
    )


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the copy, and the parameters that it owns itself, by name."""

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def write(
        self, parameters: Mapping[str, Tensor], buffers: Iterable[tuple[str, Tensor | None]]
    ) -> bool:
        """Writes new values of its parameters and buffers; returns whether anything changed."""
        changed, own = False, own_buffers(self.module)
        previous = dict(own.items())
        for name, parameter in self.parameters.items():
            changed |= not torch.equal(parameter, parameters[name])
            parameter.copy_(parameters[name])
        for name, value in buffers:
            now = previous.get(name)
            if value is None or now is None or now.shape != value.shape:
                changed |= value is not now
                own[name] = None if value is None else value.clone()
            else:
                changed |= not torch.equal(now, value)
                now.copy_(value)
        return changed


class Randomised:
    """A copy of a model that is re-initialised layer by layer; the model itself never changes.

    A layer is a module that owns parameters, ordered from the output to the input. Parameters that
    `reset_parameters` does not write are drawn from normals of their own mean and deviation:
    activations keep their scale, and unlike with a permutation, scalars change too.
    """

    def __init__(self, model: Any, run: Callable[[nn.Module], object] | None = None) -> None:
        """run: calls the copy, to record its modules' order; by default that of definition."""
        self._source, self.model = _copied(model)
        self.layers = _layers(self.model, _order(self.model, run))

    def draw(self, number: int, seed: int) -> bool:
        """Re-initialises `layers[number]`; returns whether anything changed."""
        layer = self.layers[number]
        with torch.inference_mode(False), torch.no_grad(), _seeded(seed, layer):
            return layer.write(*_drawn(layer))

    def restore(self, number: int) -> None:
        """Gives `layers[number]` the model's parameters and buffers again."""
        layer = self.layers[number]
        # Modules of torch.jit have no get_submodule, and their tables no get.
        source = dict(self._source.named_modules())[layer.name]
        with torch.inference_mode(False), torch.no_grad():
            layer.write(own_parameters(source), own_buffers(source).items())


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers; 32 bits, since the CPU's generator reads no more."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())


def _copied(model: Any) -> tuple[nn.Module, nn.Module]:
    """The module inside of wrappers, and a copy of it."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            "parameters cannot be re-initialised: the model must be an nn.Module, got "
            f"{type(model).__name__}; pass the module itself, not a function that calls it"
        )
    # Wrappers are no layers.
    source = unwrapped(model)
    for name, parameter in source.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ModelError(
                f"parameters cannot be re-initialised: {name} has no numbers yet; load them, or "
                "call the model once on an input"
            )
    try:
        with torch.inference_mode(False):
            return source, deepcopy(source)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied, and is never changed itself: copy.deepcopy gave "
            f"{type(error).__name__}: {error}; keep what cannot be copied out of the module (for "
            "weight_norm of torch.nn.utils: use that of torch.nn.utils.parametrizations)"
        ) from error


def _layers(model: nn.Module, order: Mapping[nn.Module, int]) -> tuple[Layer, ...]:
    """From the output to the input; raises where there is nothing to draw."""
    index, positions = -1, []
    for number, (name, module) in enumerate(model.named_modules()):
        # A module that never runs by itself, such as a projection that another uses, follows the
        # module that is defined before it.
        index = order.get(module, index)
        positions.append((index, number, name, module))
    layers, taken = [], set[int]()
    for *_, name, module in sorted(positions, key=lambda one: one[:2], reverse=True):
        own = {
            key: one
            for key, one in own_parameters(module).items()
            if one is not None
            and id(one) not in taken
            and one.numel() > 0
            and (one.is_floating_point() or one.is_complex())
        }
        taken |= {id(one) for one in own.values()}
        if own:
            layers.append(Layer(name, module, own))
    if not layers:
        kinds = sorted({str(one.dtype) for one in model.parameters()})
        got = f"they are all {', '.join(kinds)}" if kinds else "it has none"
        raise ModelError(
            f"the model has no parameters that can be re-initialised: {got}; evaluate the "
            "model before it was quantised or frozen, with its weights as nn.Parameter"
        )
    return tuple(layers)


def _order(model: nn.Module, run: Callable[[nn.Module], object] | None) -> dict[nn.Module, int]:
    """The order in which the modules of the copy run first."""
    order: dict[nn.Module, int] = {}
    if run is None:
        return order

    def note(module: nn.Module, _: object) -> None:
        order.setdefault(module, len(order))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        # An error of the model is raised where the model is explained.
        with suppress(SaliencyError):
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _drawn(layer: Layer) -> tuple[dict[str, Tensor], list[tuple[str, Tensor | None]]]:
    """New values of a layer's parameters, and its buffers."""
    drawn: dict[str, Tensor] = {}
    buffers = list(own_buffers(layer.module).items())
    if callable(getattr(layer.module, "reset_parameters", None)):
        # Its own reset may change submodules and tied parameters, too.
        copy: Any = deepcopy(layer.module)
        before = {name: own_parameters(copy)[name] for name in layer.parameters}
        versions = {name: version_of(one) for name, one in before.items()}
        try:
            copy.reset_parameters()
            buffers = list(own_buffers(copy).items())
        except Exception:
            # It needs arguments, or writes read-only tensors: all is drawn from normals.
            before = {}
        for name, old in before.items():
            new = own_parameters(copy).get(name)
            if new is None or new.shape != old.shape:
                continue
            # The version does not count writes through .data; the values do not show equal writes.
            written = new is not old or version_of(new) != versions[name]
            if written or not torch.equal(new, layer.parameters[name]):
                drawn[name] = new
    for name, parameter in layer.parameters.items():
        if name not in drawn:
            drawn[name] = _normal(parameter)
    return drawn, buffers


def _normal(parameter: nn.Parameter) -> Tensor:
    """A draw from the normal with the parameter's mean and deviation, like the parameter."""
    new = parameter.clone()
    whole = torch.view_as_real(new) if new.is_complex() else new
    wide = whole.float()
    mean, deviation = wide.mean(), wide.std(correction=0)
    constant = deviation == 0
    deviation = torch.where(constant, mean.abs(), deviation)
    whole.copy_(torch.randn_like(wide) * deviation + mean.masked_fill(constant, 0.0))
    return new


@contextmanager
def _seeded(seed: int, layer: Layer) -> Iterator[None]:
    """Seeds the layer's devices; the random state of the process is restored."""
    parameters = layer.parameters.values()
    devices = sorted({one.device.index or 0 for one in parameters if one.device.type == "cuda"})
    with _DRAWING, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
