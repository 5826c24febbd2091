"""Randomise: a copy of a model whose layers' parameters are drawn anew, one after another."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saliency_fast.errors import ModelError, SaliencyError

_DRAWING = threading.Lock()
"""Layers draw from the random state of the whole process: one at a time."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the copy, and the parameters that it owns itself, by their names in it."""

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def state(self) -> list[Tensor]:
        """Everything of its own that a draw may change, copied."""
        kept = [*self.parameters.values(), *self.module.buffers(recurse=False)]
        return [one.detach().clone() for one in kept]


class Randomised:
    """A copy of a model, to be drawn anew layer by layer; the model itself is never touched.

    A layer is a module that owns parameters; a parameter that several own belongs to the one that
    runs last. `reset_parameters` of a module draws as its authors meant it (normalisations:
    running statistics too). What no reset covers, such as positions or the input projection of
    nn.MultiheadAttention, is drawn from normals of its own mean and standard deviation: activations
    keep their scale, and unlike with a permutation, single numbers and constant vectors change too.

    model: the copy. layers: from the output to the input, in the order in which they run.
    """

    def __init__(self, model: Any, run: Callable[[nn.Module], object] | None = None) -> None:
        """run: calls the copy once, to see in which order its modules run; without it, or where
        it fails, they count as they are defined.
        """
        self._source, self.model = _copied(model)
        self.layers = _layers(self.model, _order(self.model, run))

    def draw(self, number: int, seed: int) -> bool:
        """Draws the layer `layers[number]` anew; whether anything changed."""
        layer = self.layers[number]
        before = layer.state()
        with torch.inference_mode(False), torch.no_grad():
            others = _others(layer)
            with _seeded(seed, layer):
                covered = _reset(layer)
                for name, parameter in layer.parameters.items():
                    if name not in covered:
                        _draw_normal(parameter)
            # A reset may reach into submodules and into tied parameters, whose turn is another.
            for table, name, tensor, value in others:
                table[name] = tensor
                tensor.copy_(value)
        return not _equal(before, layer.state())

    def restore(self, number: int) -> None:
        """Brings the layer `layers[number]` back to what the model has."""
        layer = self.layers[number]
        # Modules of torch.jit know no get_submodule, and their tables no get.
        source = dict(self._source.named_modules())[layer.name]
        buffers = dict(layer.module._buffers.items())
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in layer.parameters.items():
                parameter.copy_(source._parameters[name])
            for name, value in source._buffers.items():
                now = buffers.get(name)
                if value is not None and now is not None and now.shape == value.shape:
                    now.copy_(value)
                else:
                    layer.module._buffers[name] = None if value is None else value.clone()


def _copied(model: Any) -> tuple[nn.Module, nn.Module]:
    """The module that was meant, and a copy of it."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            "parameters cannot be drawn anew: the model must be an nn.Module, got "
            f"{type(model).__name__}; pass the module itself, not a function that calls it"
        )
    source = model
    # What torch.compile and distributed training wrap around a module is no part of it.
    for wrapper in ("_orig_mod", "module"):
        wrapped = dict(source.named_children()).get(wrapper)
        of_torch = type(source).__module__.startswith(("torch._dynamo", "torch.nn.parallel"))
        source = wrapped if of_torch and wrapped is not None else source
    for name, parameter in source.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ModelError(
                f"parameters cannot be drawn anew: {name} has no numbers yet; load them, or call "
                "the model once on an input"
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
    place, places = -1, []
    for number, (name, module) in enumerate(model.named_modules()):
        # What does not run by itself, such as a projection that another uses, is where it stands.
        place = order.get(module, place)
        places.append((place, number, name, module))
    found, taken = [], set[int]()
    for *_, name, module in sorted(places, key=lambda one: one[:2], reverse=True):
        own = {
            key: one
            for key, one in module._parameters.items()
            if one is not None and id(one) not in taken and _can_be_drawn(one)
        }
        taken |= {id(one) for one in own.values()}
        if own:
            found.append(Layer(name, module, own))
    if not found:
        kinds = sorted({str(one.dtype) for one in model.parameters()})
        got = f"they are all {', '.join(kinds)}" if kinds else "it has none"
        raise ModelError(
            f"the model has no parameters that can be drawn anew: {got}; judge the model before it "
            "was quantised or frozen, with its weights as nn.Parameter"
        )
    return tuple(found)


def _can_be_drawn(parameter: Tensor) -> bool:
    return parameter.numel() > 0 and (parameter.is_floating_point() or parameter.is_complex())


def _order(model: nn.Module, run: Callable[[nn.Module], object] | None) -> dict[nn.Module, int]:
    """When each module of the copy runs first."""
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
        # What is wrong with the model is told where it is explained.
        with suppress(SaliencyError):
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _reset(layer: Layer) -> set[str]:
    """Calls the module's own reset; which of the layer's parameters it wrote."""
    module, reset = layer.module, getattr(layer.module, "reset_parameters", None)
    if not callable(reset):
        return set()
    before = {name: (one._version, one.clone()) for name, one in layer.parameters.items()}
    try:
        reset()
    except Exception:
        # It wants arguments, or writes what cannot be written: all is drawn from normals then.
        return set()
    finally:
        made = {name: module._parameters.get(name) for name in before}
        for name, parameter in layer.parameters.items():
            module._parameters[name] = parameter
    covered = set()
    for name, parameter in layer.parameters.items():
        version, value = before[name]
        new = made[name]
        if new is not None and new is not parameter and new.shape == parameter.shape:
            parameter.copy_(new)
        # Writes through .data are not counted, and writes of the same numbers are writes too.
        if parameter._version != version or not torch.equal(parameter, value):
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
    """What lies within reach of the layer's reset and is not its own: tables, names, tensors and
    their values.
    """
    own = {id(one) for one in layer.parameters.values()}
    own |= {id(one) for one in layer.module.buffers(recurse=False)}
    return [
        (table, name, one, one.detach().clone())
        for module in layer.module.modules()
        for table in (module._parameters, module._buffers)
        for name, one in table.items()
        if one is not None and id(one) not in own
    ]


@contextmanager
def _seeded(seed: int, layer: Layer) -> Iterator[None]:
    """Random numbers by `seed` on the layer's devices; the process's random state comes back."""
    parameters = layer.parameters.values()
    devices = sorted({one.device.index or 0 for one in parameters if one.device.type == "cuda"})
    with _DRAWING, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(before, after, strict=True)
    )


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers; 32 bits, since the CPU's generator reads no more."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())
