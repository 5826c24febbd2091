"""Follows the axes of inputs through a model to the first layer that tells what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from saliency_fast.graph.intercept import unguarded
from saliency_fast.model.followed import (
    Followed,
    Lattice,
    by_attention,
    by_convolution,
    channel_of,
    coordinates,
    lattice_of,
    letters_of,
)
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.layers import Layer, floats_at, hooked

PATIENCE = 200
"""Calls that touch nothing followed, behind which nothing is expected any more."""

_MOVES = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis t view reshape view_as reshape_as "
    "flatten ravel unflatten unsqueeze squeeze expand expand_as repeat tile repeat_interleave flip "
    "fliplr flipud roll narrow __getitem__ select index_select chunk split split_with_sizes unbind "
    "tensor_split unfold pixel_unshuffle pixel_shuffle channel_shuffle cat concat concatenate "
    "stack hstack vstack unsqueeze_ squeeze_ transpose_ t_ T mT rot90 swapaxes_ swapdims_ "
    "broadcast_to atleast_3d".split()
)
_RESIZES = frozenset(
    "interpolate upsample avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
_MIXES = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm einsum addmm baddbmm addbmm bilinear tensordot "
    "scatter gather sort argsort topk conv_tbc stft istft cdist kron outer".split()
)
_ARITHMETIC = frozenset("add sub subtract mul multiply div divide truediv".split())
_JOINS = frozenset("cat concat concatenate stack hstack vstack".split())
_PRODUCTS = frozenset("matmul __matmul__ bmm".split())
_CONVOLUTIONS = {f"conv{more}{n}d": n for n in (1, 2, 3) for more in ("", "_transpose")}
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
_CELLS = frozenset("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())


class _Told(BaseException):
    """All that is wanted is known: the model need not go on."""


class _Follow(TorchFunctionMode):
    """Inside its `with`, follows inputs; `told` has the letters of each, once a layer tells."""

    def __init__(self, inputs: Sequence[Tensor], *, through: bool = False) -> None:
        super().__init__()
        # Through the layers that tell, to others inside of the model.
        self.through = through
        self.tokens: dict[int, list[Followed]] = {}
        self.shapes = [tuple(x.shape) for x in inputs]
        self.told: dict[int, str] = {}
        self.closed: set[int] = set()
        self._idle = 0
        # Tensors are held, so that no other one gets the name of one that is gone.
        self._known: dict[tuple[int, int], tuple[Tensor, Followed]] = {}
        # A tensor may be made of several inputs: they are followed one by one.
        self._number = 0
        for number, x in enumerate(inputs):
            self._keep(x, Followed(number, coordinates(x)))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        found = self._among((args, dict(kwargs)))
        self._idle = 0 if found else self._idle + 1
        if self._idle > PATIENCE and not self.through:
            raise _Told
        for number in found if not self.through else ():
            self._number = number
            self._ask(name, args, kwargs)
        body = unguarded(func) if isinstance(func, FunctionType) and not _as_one(name) else None
        if body is not None:
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        for number, tensors in found.items():
            self._number = number
            # What a call makes of tensors that are followed in a way unknown is not followed.
            with suppress(Exception), torch._C.DisableTorchFunction(), torch.no_grad():
                self._after(func, name, args, kwargs, tensors, result)
        return result

    def _among(self, values: Any) -> dict[int, list[Tensor]]:
        """The tensors that are followed, by the number of the input."""
        flat = [one for one in tree_flatten(values)[0] if isinstance(one, Tensor)]
        found = {
            number: [one for one in flat if (id(one), number) in self._known]
            for number in range(len(self.shapes))
        }
        return {number: several for number, several in found.items() if several}

    def at(self, value: Any) -> list[Followed | None]:
        """What is known of a tensor, for each of the inputs."""
        return [
            self._known.get((id(value), number), (None, None))[1]
            for number in range(len(self.shapes))
        ]

    def of(self, value: Any) -> Followed | None:
        key = id(value), self._number
        known = self._known.get(key) if isinstance(value, Tensor) else None
        return None if known is None else known[1]

    def _keep(self, tensor: Any, followed: Followed) -> None:
        if isinstance(tensor, Tensor) and tensor.shape == followed.where[0].shape:
            self._known[id(tensor), followed.number] = tensor, followed
            if self.through and tensor.dim() == 3:
                self.tokens.setdefault(tensor.shape[1], []).append(followed)

    def _after(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        found: list[Tensor],
        result: Any,
    ) -> None:
        """Follows what a call made of tensors that are followed."""
        made = [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
        first = self.of(found[0])
        assert first is not None
        if not made:
            return
        if name == "linear":
            self._linear(first, found[0] is args[0] if args else True, made[0])
        elif name in _MOVES or name in ("pad", "im2col"):
            self._moved(func, name, args, kwargs, first, made)
        elif name in _RESIZES:
            size = made[0].shape[2:]
            if made[0].dim() == first.where[0].dim() in (3, 4, 5):
                self._put(made, first.moved(lambda one: _nearest(one, size)))
        elif name in _CONVOLUTIONS:
            size = made[0].shape[2:]
            where = [_nearest(one[:, :1], size).expand(made[0].shape) for one in first.where]
            if found[0] is args[0] and made[0].dim() == first.where[0].dim():
                self._keep(made[0], replace(first, where=tuple(where)))
        elif name not in _MIXES:
            self._kept(name, found, made)

    def _kept(self, name: str, found: list[Tensor], made: list[Tensor]) -> None:
        """A call that keeps the order of elements, or one that is spread by broadcasting."""
        for one in found:
            own = self.of(one)
            assert own is not None
            shape = made[0].shape
            if shape == one.shape:
                self._keep(made[0], own)
                return
        own = self.of(found[0])
        if own is not None and len(made) == 1 and made[0].dim() >= found[0].dim():
            pairs = zip(_right(found[0].shape, shape), shape, strict=True)
            if name.strip("_").lstrip("ri") in _ARITHMETIC and all(a in (1, b) for a, b in pairs):
                self._put(made, own.moved(lambda where: where.expand(shape)))

    def _moved(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        first: Followed,
        made: list[Tensor],
    ) -> None:
        """A call that moves elements about: the same with their coordinates."""

        def change(number: int) -> list[Tensor]:
            def instead(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                own = self.of(value)
                if own is None:
                    # Of a list that is put together, what is no input; an index stays as it is.
                    return _nowhere(value) if name in _JOINS else value
                return own.where[number]

            changed, named = tree_map(instead, args), tree_map(instead, dict(kwargs))
            if name == "pad":
                changed, named = _padded(changed, named)
            return [
                one for one in tree_flatten(func(*changed, **named))[0] if isinstance(one, Tensor)
            ]

        if name in ("view", "view_as"):
            # Coordinates are laid out in another way than what they belong to.
            func = Tensor.reshape if name == "view" else Tensor.reshape_as
        parts = [change(number) for number in range(len(first.where))]
        self._put(made, [replace(first, where=one) for one in zip(*parts, strict=True)])

    def _put(self, made: Sequence[Tensor], followed: Sequence[Followed]) -> None:
        for tensor, one in zip(made, followed, strict=False):
            self._keep(tensor, one)

    def _linear(self, first: Followed, taken: bool, made: Tensor) -> None:
        """A product over the last axis: the input's axes along it are mixed."""
        if taken and made.dim() == first.where[0].dim():
            mixed = first.mixed | first.along(-1)
            where = tuple(one[..., :1].expand(made.shape) for one in first.where)
            self._keep(made, replace(first, where=where, mixed=mixed))

    def _ask(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Looks whether a call tells what the axes of an input are, before it runs."""
        values = [*args, *kwargs.values()]
        taken = kwargs.get("input", kwargs.get("query", values[0] if values else None))
        own = self.of(taken)
        if own is None or own.number in self.told or own.number in self.closed:
            return
        rank, shape = len(own.where), self.shapes[own.number]
        if name in _CONVOLUTIONS and taken.dim() == _CONVOLUTIONS[name] + 2:
            self._tell(own, by_convolution(own, taken, values, kwargs, shape), _CONVOLUTIONS[name])
        elif name in _RECURRENT:
            packed = isinstance(values[1], Tensor) and not values[1].is_floating_point()
            if not packed:
                self._tell(own, channel_of(own, {-1}, {0, 1}, shape, taken), 0)
        elif name == "_pack_padded_sequence":
            self._tell(own, channel_of(own, {-1}, {0, 1}, shape, taken), 0)
        elif name in _CELLS and taken.dim() == 2:
            self._tell(own, channel_of(own, {-1}, {0}, shape, taken), 0)
        elif name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            tokens = 0 if name.startswith("multi") else -2
            self._tell(own, by_attention(own, taken, tokens, shape), 0)
        elif name == "_transformer_encoder_layer_fwd" and taken.dim() == 3:
            self._tell(own, by_attention(own, taken, 1, shape), 0)
        elif name in _PRODUCTS and len(values) > 1 and (other := self.of(values[1])) is not None:
            queries, keys = own.along(-2), other.along(-1)
            if queries and queries == keys and rank > 2 and own.mixed:
                self._tell(own, by_attention(own, taken, -2, shape), 0)

    def _tell(self, own: Followed, channel: int | bool | None, kernel: int) -> None:
        """Notes the layout of an input; False: this layer has a say, and does not tell."""
        if channel is False:
            self.closed.add(own.number)
        else:
            axis = None if channel is None else int(channel)
            letters = letters_of(len(self.shapes[own.number]), axis, kernel)
            if letters is None:
                self.closed.add(own.number)
            else:
                self.told[own.number] = letters
        if len(self.told) + len(self.closed) == len(self.shapes):
            raise _Told


def _as_one(name: str) -> bool:
    """Whether a call of PyTorch's Python is followed as one, and not by what it is made of."""
    return name in _RESIZES or name in _MOVES or name in ("pad", "linear")


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        # A property, as of `x.T`.
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return str(name)


def _nearest(where: Tensor, size: torch.Size) -> Tensor:
    with torch._C.DisableTorchFunction():
        return functional.interpolate(where, size=tuple(size), mode="nearest")


def _nowhere(value: Tensor) -> Tensor:
    return value.new_full((), -1.0, dtype=torch.float32).expand(value.shape)


def _padded(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a padding, with -1 in the place of a constant."""
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    kwargs.pop("value", None)
    if mode == "constant":
        return args[:2], {**kwargs, "mode": "constant", "value": -1.0}
    return args[:3], kwargs


def _right(shape: torch.Size, like: torch.Size) -> tuple[int, ...]:
    return (1,) * (len(like) - len(shape)) + tuple(shape)


_FOUND: WeakKeyDictionary[Any, dict[Any, tuple[str | None, ...]]] = WeakKeyDictionary()
MOST_FOUND = 64


def follow(
    model: Callable[..., Any], inputs: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Any]
) -> tuple[str | None, ...]:
    """The letters of each input of a model, None where it does not tell; kept for
    `followed`.

    inputs: one row [1, *] of each; run: takes them through the model, which is stopped where all
    is told.
    """
    key = tuple((tuple(x.shape[1:]), x.dtype) for x in inputs)
    known = _FOUND.setdefault(model, {}) if isinstance(model, nn.Module) else {}
    watch = _Follow(inputs)
    try:
        with torch.no_grad(), uncompiled(), watch:
            run(inputs)
    except _Told:
        pass
    except Exception:
        # What is wrong with the call is told where it runs.
        return tuple(watch.told.get(number) for number in range(len(inputs)))
    while len(known) >= MOST_FOUND:
        known.pop(next(iter(known)))
    known[key] = tuple(watch.told.get(number) for number in range(len(inputs)))
    return known[key]


def followed(
    model: object, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> tuple[str | None, ...] | None:
    """What `follow` found before for a module and inputs of these shapes and types."""
    if not isinstance(model, nn.Module):
        return None
    key = tuple((shape[1:], kind) for shape, kind in zip(shapes, dtypes, strict=True))
    return _FOUND.get(model, {}).get(key)


@dataclass(frozen=True)
class Inside:
    """Where the elements lie of what layers of a model give, or take: their first tensors, for each
    input, None where that was lost; and of all tensors [R, T, C] on the way, by T.
    """

    layers: tuple[tuple[Followed | None, ...], ...] = ()
    tokens: Mapping[int, Sequence[Followed]] = field(default_factory=dict)

    def of(self, layer: int, number: int) -> Followed | None:
        """Of a layer, as it was made of input `number`."""
        found = self.layers[layer] if layer < len(self.layers) else ()
        return found[number] if number < len(found) else None

    def sequence(self, count: int, places: Sequence[int], number: int) -> Lattice | None:
        """The lattice of the so many tokens that a model has; None where there are none, or
        several.
        """
        several = [one for one in self.tokens.get(count, ()) if one.number == number]
        found = {lattice_of(one, places) for one in several}
        known = [one for one in found if one is not None]
        return known[0] if len(known) == 1 else None


def follow_inside(
    inputs: Sequence[Tensor],
    run: Callable[[Sequence[Tensor]], Any],
    layers: Sequence[Layer],
    of_input: bool,
) -> Inside:
    """Follows inputs [R, *] to layers; takes a whole run."""
    watch = _Follow(inputs, through=True)
    found: dict[int, list[Followed | None]] = {}

    def seen(number: int, value: Any) -> None:
        with torch._C.DisableTorchFunction():
            own = floats_at(value)
        found[number] = watch.at(own[0]) if own else []

    hooks = hooked(tuple(layers), seen, of_input=of_input)
    with torch.no_grad(), uncompiled(), suppress(Exception), watch, hooks:
        run(inputs)
    return Inside(tuple(tuple(found.get(at, ())) for at in range(len(layers))), watch.tokens)
