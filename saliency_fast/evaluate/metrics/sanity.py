"""The model randomisation test (Adebayo, 2018): whether a map changes when the model's layers are
re-initialised.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from saliency_fast.evaluate.inputs import Subject, position_sums
from saliency_fast.evaluate.metric import SANITY, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Curve, Outcome, bootstrap
from saliency_fast.evaluate.scores import Scorer
from saliency_fast.evaluate.similarity import is_constant, rank_correlation, rank_ssim, ssim
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
    negative count as equal, since a random model decides the sign.

    The default threshold: maps with correlation r share r ** 2 of their variance. Below sqrt(1/2)
    that is less than half, so that most of the map is not in the map of a random model. SSIM of
    maps with equal means and variances is 2 cov / (var + var) = r, so that the same threshold holds
    for both. `passed`: whether the upper ends of the 95 % intervals of the mean rank correlation
    and of the mean SSIM of ranks lie below it; None for order="independent".

    `curve`: the rank correlation over stages. `details`: every similarity, float64 [B, stages];
    "layers"; "unnoticed", the layers that an independent order does not notice; "floor", the mean
    similarity of maps of different examples and of different random models ("ssim" of values is
    high there, so that it does not decide); "again", that of the maps with those that the model
    itself gives again; "final", the intervals of the last stage; "unmoved", the share of stages
    before the map moves below the threshold.

    Args:
        order: "cascading" from the output to the input, layer after layer; "bottom_up" from the
            input; "independent" each layer alone.
        draws: The number of random models that are averaged.
        stages: After how many groups of layers maps are made; None for each layer.
        threshold: Of the verdict, a correlation.
        seed: Of the draws.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(9, 2)
        >>> x = torch.randn(4, 9)
        >>> check = SanityCheck(draws=1)
        >>> edges = check(model, x, x.abs(), target=0, method=lambda model, x, target: x.abs())
        >>> edges.passed
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

    def _evaluate(self, data: Subject) -> Outcome:
        structured = data.inputs.dim() > 2
        maps = data.places
        again = _similarities(maps, position_sums(data.explain(data.inputs)), structured)
        copy = Randomised(data.model, lambda model: _scores(model, data))
        unchanged = self._unchanged(copy, data)
        groups = _groups(len(copy.layers), self.stages)
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
            "layers": [_joined([copy.layers[one].name for one in group]) for group in groups],
            "unchanged": unchanged,
            "again": again,
            "floor": {
                "examples": _pairs([maps, maps.roll(1, 0)] if len(maps) > 1 else [], structured),
                "models": {} if alone else _pairs(final, structured),
            },
        }
        outcome = self._independent if alone else self._cascaded
        return outcome(data, similar, details, final)

    def _walk(
        self, data: Subject, copy: Randomised, groups: list[list[int]], draw: int
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

    def _unchanged(self, copy: Randomised, data: Subject) -> list[str]:
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

    def _independent(
        self, data: Subject, similar: dict[str, Tensor], details: dict[str, Any], _: list[Tensor]
    ) -> Outcome:
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
        caveats = tuple(_about_layers(details["unchanged"]))
        return self._outcome(ranked.mean(1), curve=curve, details=details, caveats=caveats)

    def _cascaded(
        self,
        data: Subject,
        similar: dict[str, Tensor],
        details: dict[str, Any],
        final: list[Tensor],
    ) -> Outcome:
        """The outcome of layers re-initialised one after another: the verdict."""
        caveats = _about_layers(details["unchanged"])
        means = {name: bootstrap(similar[name][:, -1]) for name in _DECIDING if name in similar}
        passed: bool | None = all(one.high < self.threshold for one in means.values())
        low = (similar["rank_correlation"].mean(0) < self.threshold).tolist()
        details["final"] = means
        # Most stages for guided backpropagation, few for the gradient.
        details["unmoved"] = (low.index(True) if True in low else len(low)) / len(low)
        if not passed:
            caveats += _about_zeros(data.places, final, self.threshold)
        known = bootstrap(details["again"]["rank_correlation"]).mean
        if known < UNNOTICED:
            caveats.append(
                "explained again by method=, the model itself gives other maps (rank correlation "
                f"{known:.2g}): are target, baseline and method those of the maps?"
            )
        positions = data.places[0].numel()
        if positions < FEWEST_POSITIONS:
            caveats.append(f"maps of {positions} positions are similar by chance: no verdict")
        if known < self.threshold or positions < FEWEST_POSITIONS:
            passed = None
        if data.batch == 1:
            caveats.append("one example has no interval: the verdict rests on its value alone")
        flat = sum(int((is_constant(one) & ~is_constant(data.places)).sum()) for one in final)
        if flat:
            caveats.append(
                f"{flat} of {len(final) * data.batch} maps of re-initialised models are "
                "constant, and count as not similar: such a model may have constant scores"
            )
        ranked = [details["again"]["rank_correlation"], *similar["rank_correlation"].T]
        y = torch.stack(ranked, 1)
        share = torch.linspace(0, 1, y.shape[1], dtype=torch.float64, device=y.device)
        return self._outcome(
            y[:, -1],
            curve=Curve(share, y, "share of layers re-initialised", "rank correlation"),
            passed=passed,
            threshold=self.threshold,
            details=details,
            caveats=tuple(caveats),
        )


def _similarities(a: Tensor, b: Tensor, structured: bool) -> dict[str, Tensor]:
    """The similarities of maps [B, *spatial], up to their sign, float64 [B] by name.

    structured: whether positions have neighbours, unlike the features of a table. Where one map is
    constant, the similarity is whether the other is, too.
    """
    similar = {
        "rank_correlation": rank_correlation(a, b).abs(),
        "rank_correlation_of_magnitudes": rank_correlation(a.abs(), b.abs()),
    }
    if structured and a.dim() <= 4:
        for name, measure in (("rank_ssim", rank_ssim), ("ssim", ssim)):
            similar[name] = torch.maximum(measure(a, b), measure(a, -b))
    both = (is_constant(a) & is_constant(b)).double()
    return {name: torch.where(one.isnan(), both, one) for name, one in similar.items()}


def _scores(model: Any, data: Subject) -> Tensor:
    """Another model's scores of the inputs, float64 [B]."""
    return Scorer(model, data.inputs, data.classes, data.running).again()[0].scores


def _groups(layers: int, stages: int | None) -> list[list[int]]:
    """Layer numbers in groups of as equal size as possible."""
    count = layers if stages is None else min(stages, layers)
    ends = [layers * one // count for one in range(count + 1)]
    return [list(range(start, stop)) for start, stop in pairwise(ends)]


def _joined(names: list[str]) -> str:
    names = [name or "(model)" for name in names]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _pairs(maps: Sequence[Tensor], structured: bool) -> dict[str, float]:
    """The mean similarity of each of several batches of maps with the next."""
    pairs = [_similarities(one, other, structured) for one, other in pairwise(maps)]
    names = pairs[0] if pairs else ()
    return {name: float(torch.stack([one[name] for one in pairs]).mean()) for name in names}


def _about_layers(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} layers are the same when re-initialised, so that their stages have no "
        "effect: " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    ]


def _about_zeros(maps: Tensor, final: list[Tensor], threshold: float) -> list[str]:
    """A caveat where maps are similar only because both are zero at the same positions."""
    left, shares = [], []
    for other in final:
        for a, b in zip(maps.flatten(1), other.flatten(1), strict=True):
            some = (a != 0) | (b != 0)
            shares.append(1.0 - float(some.double().mean()))
            if bool(some.any()):
                left.append(rank_correlation(a[some][None], b[some][None]).abs())
    known = float(torch.cat(left).nanmean()) if left else 1.0
    share = sum(shares) / len(shares)
    if share == 0 or not known < threshold:
        return []
    return [
        f"{100 * share:.0f} % of positions are zero in both maps, before and after; the rank "
        f"correlation of the others is {known:.2g}: what stays is mostly where zeros are, "
        "which an input may decide without the model"
    ]


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the copy, and the parameters that it owns itself, by name."""

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def state(self) -> list[Tensor]:
        """Copies of its own parameters and buffers."""
        kept = [*self.parameters.values(), *self.module.buffers(recurse=False)]
        return [one.detach().clone() for one in kept]


class Randomised:
    """A copy of a model that is re-initialised layer by layer; the model itself never changes.

    A layer is a module that owns parameters; a shared parameter belongs to the module that runs
    last. `reset_parameters` of a module re-initialises as its authors meant it (for normalisations
    with the running statistics). Other parameters, such as position embeddings or the input
    projection of nn.MultiheadAttention, are drawn from normals of their own mean and standard
    deviation: activations keep their scale, and unlike with a permutation, scalars and constant
    vectors change too.

    model: the copy. layers: from the output to the input, in the order in which they run.
    """

    def __init__(self, model: Any, run: Callable[[nn.Module], object] | None = None) -> None:
        """run: calls the copy once, to record the order of its modules; without it, or where it
        fails, they count in the order of their definition.
        """
        self._source, self.model = _copied(model)
        self.layers = _layers(self.model, _order(self.model, run))

    def draw(self, number: int, seed: int) -> bool:
        """Re-initialises `layers[number]`; returns whether anything changed."""
        layer = self.layers[number]
        before = layer.state()
        with torch.inference_mode(False), torch.no_grad():
            others = _others(layer)
            with _seeded(seed, layer):
                covered = _reset(layer)
                for name, parameter in layer.parameters.items():
                    if name not in covered:
                        _draw_normal(parameter)
            # A reset may change submodules and tied parameters, which belong to other layers.
            for table, name, tensor, value in others:
                table[name] = tensor
                tensor.copy_(value)
        after = layer.state()
        return len(before) != len(after) or any(
            one.shape != other.shape or not torch.equal(one, other)
            for one, other in zip(before, after, strict=True)
        )

    def restore(self, number: int) -> None:
        """Gives `layers[number]` the model's parameters and buffers again."""
        layer = self.layers[number]
        # Modules of torch.jit have no get_submodule, and their tables no get.
        source = dict(self._source.named_modules())[layer.name]
        buffers = dict(own_buffers(layer.module).items())
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in layer.parameters.items():
                parameter.copy_(own_parameters(source)[name])
            for name, value in own_buffers(source).items():
                now = buffers.get(name)
                if value is not None and now is not None and now.shape == value.shape:
                    now.copy_(value)
                else:
                    own_buffers(layer.module)[name] = None if value is None else value.clone()


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
            if one is not None and id(one) not in taken and _can_be_drawn(one)
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


def _can_be_drawn(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and (parameter.is_floating_point() or parameter.is_complex())


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


def _reset(layer: Layer) -> set[str]:
    """Calls the module's own reset; returns which of the layer's parameters it wrote."""
    module, reset = layer.module, getattr(layer.module, "reset_parameters", None)
    if not callable(reset):
        return set()
    before = {name: (version_of(one), one.clone()) for name, one in layer.parameters.items()}
    try:
        reset()
    except Exception:
        # It needs arguments, or writes read-only tensors: all is drawn from normals then.
        return set()
    finally:
        made = {name: own_parameters(module).get(name) for name in before}
        for name, parameter in layer.parameters.items():
            own_parameters(module)[name] = parameter
    covered = set()
    for name, parameter in layer.parameters.items():
        version, value = before[name]
        new = made[name]
        if new is not None and new is not parameter and new.shape == parameter.shape:
            parameter.copy_(new)
        # The version does not count writes through .data; the values do not show equal writes.
        if version_of(parameter) != version or not torch.equal(parameter, value):
            covered.add(name)
    return covered


def _draw_normal(parameter: nn.Parameter) -> None:
    whole = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    wide = whole.detach().float()
    mean, deviation = wide.mean(), wide.std(correction=0)
    constant = deviation == 0
    deviation = torch.where(constant, mean.abs(), deviation)
    whole.copy_(torch.randn_like(wide) * deviation + mean.masked_fill(constant, 0.0))


def _others(layer: Layer) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Tensors of submodules that the layer's reset may change and does not own: tables, names,
    tensors and their values.
    """
    own = {id(one) for one in layer.parameters.values()}
    own |= {id(one) for one in layer.module.buffers(recurse=False)}
    return [
        (table, name, one, one.detach().clone())
        for module in layer.module.modules()
        for table in (own_parameters(module), own_buffers(module))
        for name, one in table.items()
        if one is not None and id(one) not in own
    ]


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
