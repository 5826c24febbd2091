"""Layers of a model: found by name, tapped, or answered in place of, for the time of one run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from saliency_fast._types import Inputs
from saliency_fast.errors import InputError, InputTypeError, ModelError, RepeatedLayerError
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.recomputation import without_recomputation

At = str | nn.Module | Sequence[str | nn.Module]
"""Layers: by name, or themselves."""
EMBEDDINGS = "embeddings"


@dataclass(frozen=True, eq=False)
class OneCall:
    """One of the calls of a layer that runs several times in a forward pass, counted from 0."""

    layer: nn.Module
    call: int


Layer = nn.Module | OneCall


def module_at(layer: Layer) -> nn.Module:
    """The module of a layer, or of one of its calls."""
    return layer.layer if isinstance(layer, OneCall) else layer


def kind_of(layer: Layer) -> str:
    """What messages call a layer."""
    return type(module_at(layer)).__name__


class Taps(Protocol):
    """Tensors inside of a model at which gradients are taken."""

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `call` returns, and the tapped tensors [R, *], on autograd's graph."""

    def look(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Before the first run: what runs of the model with one row tell."""

    def need(self, reached: Sequence[bool]) -> None:
        """Raises ModelError where what is asked for has no gradient; reached: of each tensor."""


def find_layers(model: object, at: At) -> tuple[Layer, ...]:
    """The layers that `at` names, in its order; raises InputError with near names.

    "name:2" is the third call of a layer that runs several times.
    """
    parts = list(at) if isinstance(at, (tuple, list)) else [at]
    if not parts:
        raise InputError("at is empty: expected a layer, its name, or several of these")
    own = tuple(one for one in parts if isinstance(one, nn.Module))
    if len(own) == len(parts) and not _is_module(model):
        # A function around a model: whether the layers run shows when it does.
        return own
    module = module_of(model)
    return tuple(_find(module, one) for one in parts)


def _is_module(model: object) -> bool:
    return isinstance(getattr(model, "_orig_mod", model), nn.Module)


def module_of(model: object) -> nn.Module:
    """The module whose layers are meant; that of `torch.compile` is the one it was made from."""
    inner: object = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise InputTypeError(
            f"at names layers of a torch.nn.Module: got {type(model).__name__}; pass the module "
            "instead of a function around it, or the layers themselves"
        )
    return inner


def names_of(model: object, layers: Sequence[Layer]) -> list[str]:
    """The names of layers, as `named_modules` has them, and the numbers of calls."""
    named = module_of(model).named_modules() if _is_module(model) else ()
    known = {id(layer): name for name, layer in named}
    found = [known.get(id(module_at(layer)), kind_of(layer)) for layer in layers]
    pairs = zip(found, layers, strict=True)
    return [f"{name}:{one.call}" if isinstance(one, OneCall) else name for name, one in pairs]


def _find(model: nn.Module, at: object) -> Layer:
    if isinstance(at, OneCall):
        return at
    if isinstance(at, nn.Module):
        layer: nn.Module = getattr(at, "_orig_mod", at)
        if not any(one is layer for one in model.modules()):
            raise InputError(
                f"at: the {type(layer).__name__} is no layer of this {type(model).__name__}; pass "
                "one of its own modules, or a name from named_modules()"
            )
        return layer
    if not isinstance(at, str):
        raise InputTypeError(
            f"at must be a layer, its name, or several of these: got {type(at).__name__}"
        )
    named = model.named_modules(remove_duplicate=False)
    layers: dict[str, nn.Module] = {name: one for name, one in named if name}
    if at in layers:
        return layers[at]
    name, colon, number = at.rpartition(":")
    if colon and name in layers and number.isdigit():
        return OneCall(layers[name], int(number))
    near = get_close_matches(at, layers, n=5, cutoff=0.4)
    ends = [name for name in layers if name.endswith(f".{at}")][:5]
    hint = (
        f"did you mean {', '.join(map(repr, ends or near))}?"
        if ends or near
        else (f"its layers are {', '.join(map(repr, list(layers)[:20]))}")
    )
    raise InputError(f"at: the model has no layer {at!r}; {hint}")


@contextmanager
def hooked(
    layers: Sequence[Layer], seen: Callable[[int, Any], Any], *, of_input: bool = False
) -> Iterator[None]:
    """Inside, `seen(number, value)` gets what each layer gives, or what it takes, and answers what
    goes on instead (None: as it is). Runs of other threads pass by; nothing stays behind.
    """
    thread, calls = threading.get_ident(), [0] * len(layers)

    def meant(number: int) -> bool:
        """Whether this call of the layer is the one that is asked for."""
        if threading.get_ident() != thread:
            return False
        calls[number] += 1
        layer = layers[number]
        return not isinstance(layer, OneCall) or calls[number] == layer.call + 1

    def after(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return seen(number, output) if meant(number) else None

        return hook

    def before(number: int) -> Callable[..., Any]:
        # While a hook comes or goes, PyTorch calls it without keywords in other threads.
        def hook(_: nn.Module, args: Any, kwargs: Any = None) -> Any:
            if not meant(number):
                return None
            if not floats_at(args):
                return seen(number, (args, kwargs))
            # What comes by name beside it is masks and the like.
            found = seen(number, args)
            return None if found is None else (found, kwargs)

        return hook

    with uncompiled(), without_recomputation(), ExitStack() as stack:
        for number, layer in enumerate(map(module_at, layers)):
            if of_input:
                handle = layer.register_forward_pre_hook(before(number), with_kwargs=True)
            else:
                handle = layer.register_forward_hook(after(number))
            stack.callback(handle.remove)
        yield


def tensors_at(value: Any) -> list[Tensor]:
    """The tensors in what a layer takes or gives: those of a tuple itself, without the states that
    recurrent layers give in a tuple of their own, or, where it has none, all within it.
    """
    parts = value if isinstance(value, (tuple, list)) else [value]
    own = [one for one in parts if isinstance(one, Tensor)]
    return own or [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]


def floats_at(value: Any) -> list[Tensor]:
    """The floating tensors in what a layer takes or gives, which points can take the place of."""
    return [one for one in tensors_at(value) if one.is_floating_point()]


def with_floats(value: Any, found: Sequence[Tensor]) -> Any:
    """`value` with those tensors replaced, in their order."""
    pairs = zip(map(id, floats_at(value)), found, strict=True)
    instead: dict[int, list[Tensor]] = {}
    for key, one in pairs:
        instead.setdefault(key, []).append(one)
    flat, tree = tree_flatten(value)
    changed = [instead[id(one)].pop(0) if instead.get(id(one)) else one for one in flat]
    return tree_unflatten(changed, tree)


@dataclass(frozen=True)
class LayerTaps:
    """What layers give, or take, as taps: one for each tensor of each layer."""

    layers: tuple[Layer, ...]
    of_input: bool = False
    counts: list[int] = field(default_factory=list, compare=False)
    """How many tensors each layer had in the last run."""

    def look(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Layers are named: nothing is to be found."""

    def need(self, reached: Sequence[bool]) -> None:
        """Raises ModelError where the score depends on none of a layer's tensors."""
        ends = [sum(self.counts[: number + 1]) for number in range(len(self.counts))]
        pairs = zip(self.counts, ends, strict=True)
        need_reached(self.layers, [any(reached[end - count : end]) for count, end in pairs])

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `call` returns, and the tensors at the layers."""
        found: dict[int, list[Tensor]] = {}

        def seen(number: int, value: Any) -> Any:
            _need_once(self.layers[number], number in found)
            # A mode may be watching the model's calls; these are none of them.
            with torch._C.DisableTorchFunction(), torch.enable_grad():
                # The first tap cuts the graph: nothing before it is kept for a way back. A later
                # one may depend on it.
                own = [
                    one if any(found.values()) and one.requires_grad else _leaf(one)
                    for one in floats_at(value)
                ]
                found[number] = own
                # The model may go on to overwrite what it gets.
                return with_floats(value, [one.clone() for one in own])

        with hooked(self.layers, seen, of_input=self.of_input):
            raw = call()
        several = [found[number] for number in _all_of(self.layers, found)]
        self.counts[:] = map(len, several)
        return raw, [one for own in several for one in own]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@dataclass(frozen=True, eq=False)
class Downstream:
    """What comes behind layers, as a model of its own: `behind(*points, *inputs, **kwargs)` is what
    the model says of its inputs with `points` in the place of what the layers give (or take).

    counts: tensors of each layer.
    """

    model: Callable[..., Any]
    layers: tuple[Layer, ...]
    of_input: bool
    counts: tuple[int, ...]

    def __call__(self, *values: Any, **kwargs: Any) -> Any:
        count = sum(self.counts)
        points, inputs = values[:count], values[count:]
        found: dict[int, bool] = {}

        def seen(number: int, value: Any) -> Any:
            _need_once(self.layers[number], number in found)
            found[number] = True
            first = sum(self.counts[:number])
            return with_floats(value, points[first : first + self.counts[number]])

        with hooked(self.layers, seen, of_input=self.of_input):
            raw = self.model(*inputs, **kwargs)
        _all_of(self.layers, found)
        return raw


@dataclass
class Read:
    """What layers gave, or took, in one run: per layer its tensors."""

    layers: tuple[Layer, ...]
    of_input: bool = False
    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def run(self, call: Callable[[], Any]) -> list[Inputs]:
        """The tensors at the layers while `call` runs, as plain copies."""

        def seen(number: int, value: Any) -> None:
            _need_once(self.layers[number], number in self.found)
            self.found[number] = [one.detach().clone() for one in floats_at(value)]

        with hooked(self.layers, seen, of_input=self.of_input), torch.no_grad():
            call()
        values = [tuple(self.found[number]) for number in _all_of(self.layers, self.found)]
        for layer, own in zip(self.layers, values, strict=True):
            if not own:
                side = "takes" if self.of_input else "gives"
                raise InputError(
                    f"at: the layer {kind_of(layer)} {side} no floating point tensor, so "
                    "nothing can be attributed to it; name a layer around it"
                )
        return values


def _all_of(layers: Sequence[Layer], found: Mapping[int, object]) -> range:
    for number, layer in enumerate(layers):
        if number not in found:
            often = " as often" if isinstance(layer, OneCall) else ""
            raise ModelError(
                f"at: the layer {kind_of(layer)} did not run{often} when the model did; name one "
                "that the model calls for these inputs"
            )
    return range(len(layers))


def _need_once(layer: Layer, again: bool) -> None:
    if again:
        raise RepeatedLayerError(
            f"at: the layer {kind_of(layer)} runs more than once for one input, so it has no "
            "single output; name a layer that runs once, such as the one around it, or one of its "
            "calls ('name:0' is the first); where it runs once for each of several inputs, explain "
            "one of these by a function of it alone, what the model makes of the others given "
            "through forward_args"
        )


def need_reached(layers: Sequence[Layer], reached: Sequence[bool]) -> None:
    """Raises ModelError where gradients reach none of a layer's tensors."""
    for layer, one in zip(layers, reached, strict=True):
        if not one:
            raise ModelError(
                f"at: the explained score does not depend on the layer {kind_of(layer)}: it "
                "ran, and no gradient reaches it, as of an auxiliary head that another output is "
                "for, or a layer whose result is detached; name one that the score is made from"
            )
