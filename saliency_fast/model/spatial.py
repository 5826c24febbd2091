"""The last layer of a model whose output is spatial, found in one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from saliency_fast.errors import InputError
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.layers import module_of
from saliency_fast.model.layout import channel_axis
from saliency_fast.model.outputs import tensors_of
from saliency_fast.model.targets import read_of

_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def last_spatial(model: object, run: Callable[[], Any]) -> nn.Module:
    """The last module in order of execution with spatial output, in `run`'s one forward pass.

    Spatial is an output [R, C, *s], [R, *s, C] or of tokens [R, T, C], with more than one place
    and more than one channel. Left out are pooled maps (the paper's layer is the last
    convolution's, before its resolution is lost); modules that run more than once; those that give
    several tensors, of which the rest of the model may read another, where others are; and, where
    the model's own output is spatial (segmentation), maps of as many channels as it has. Tokens are
    taken from before the last module that mixes them (attention, a recurrence): behind it, a
    class token's head sees no other token. The first norm of a ViT's last block, therefore.

    Raises InputError where there is none, with what was found.
    """
    watch = _Watch(module_of(model))
    with torch.no_grad(), uncompiled(), watch.watching(), _Attention(watch):
        raw = run()
    explained = read_of(raw)
    return watch.last(next(iter(tensors_of(raw)), None) if explained is None else explained)


@dataclass
class _Seen:
    """A module's output: when it was ready, its shape, the axis of its channels, and whether the
    module gave nothing else.
    """

    module: nn.Module
    time: int
    shape: tuple[int, ...]
    axis: int
    alone: bool

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def tokens(self) -> bool:
        return self.axis == -1 and len(self.shape) == 3


@dataclass
class _Watch:
    """What the modules of one forward pass did, in this thread: others may share the model."""

    root: nn.Module
    stack: list[tuple[nn.Module, int]] = field(default_factory=list)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    seen: list[_Seen] = field(default_factory=list)
    shapes: dict[nn.Module, list[int]] = field(default_factory=dict)
    mixed: int | None = None
    time: int = 0
    rows: int | None = None
    pooled: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for module in self.root.modules():
                handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
                handles.append(module.register_forward_hook(self._end))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.pooled = None

    def mixes(self) -> None:
        """Tokens are mixed by the innermost module at work; a softmax module works for its own."""
        at_work = [at for at in self.stack if not isinstance(at[0], nn.Softmax)]
        if at_work:
            self.mixed = at_work[-1][1]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        # While a hook comes or goes, PyTorch calls it without keywords in other threads.
        if threading.get_ident() != self.thread:
            return
        self.time += 1
        if module is self.root and (given := tensors_of((args, kwargs))):
            self.rows = len(given[0]) if given[0].dim() else None
        self.stack.append((module, self.time))
        if isinstance(module, nn.RNNBase):
            self.mixes()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.time += 1
        self.stack.pop()
        self.calls[module] = self.calls.get(module, 0) + 1
        tensors = tensors_of(output)
        if not tensors or module is self.root:
            return
        tensor, shape = tensors[0], tuple(tensors[0].shape)
        self.shapes[module] = list(shape)
        if isinstance(module, _POOLS):
            self.pooled = tensor
        if tensor is self.pooled or len(shape) < 3 or self.rows not in (None, shape[0]):
            return
        # Behind attention, what cannot tell is taken for tokens.
        axis = channel_axis(module, shape, 1 if self.mixed is None or len(shape) > 3 else -1)
        space = shape[1:-1] if axis == -1 else shape[2:]
        if max(space) > 1 and shape[axis] > 1:
            self.seen.append(_Seen(module, self.time, shape, axis, len(tensors) == 1))

    def last(self, raw: Tensor | None) -> nn.Module:
        """The layer for `layer="auto"`, of a model that returned `raw`."""
        found = [one for one in self.seen if self.calls[one.module] == 1]
        if raw is not None and raw.dim() >= 3:
            classes = {raw.shape[1], raw.shape[-1 if raw.dim() == 3 else 1]}
            found = [one for one in found if one.channels not in classes]
        found = [one for one in found if one.alone] or found
        if not found:
            raise self._none()
        if found[-1].tokens and self.mixed is not None:
            found = [one for one in found if one.time < self.mixed] or found
        return found[-1].module

    def _none(self) -> InputError:
        names = {module: name for name, module in self.root.named_modules()}
        last = list(self.shapes.items())[-8:]
        shown = ", ".join(f"{names[module]} {shape}" for module, shape in last) or "none"
        again = {names[one.module]: None for one in self.seen if self.calls[one.module] > 1}
        more = f"; {', '.join(again)} run more than once" if again else ""
        return InputError(
            'layer="auto" found no layer with spatial output, [B, C, *spatial] or tokens '
            f"[B, T, C]: the last outputs are {shown}{more}; pass the layer itself"
        )


class _Attention(TorchFunctionMode):
    """Tells a watch when attention is computed: by its own functions, or a softmax over [T, T]."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if "attention" in name or "transformer" in name or (name == "softmax" and _square(args)):
            self._watch.mixes()
        return func(*args, **(kwargs or {}))


def _square(args: tuple[Any, ...]) -> bool:
    shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
    return len(shape) >= 3 and shape[-1] == shape[-2] > 1
