"""The last layer of a model whose output is spatial, found in one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from saliency_fast.errors import InputError
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.layers import floats_at, module_of, with_floats
from saliency_fast.model.layout import channel_axis
from saliency_fast.model.targets import read_of

Change = Callable[[Tensor], Tensor]
_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


Run = Callable[[int, Change | None], tuple[Any, Tensor]]
"""Runs the model on the example of a number, its inputs changed: what it returns, and scores."""


def last_spatial(model: object, run: Run, examples: int) -> tuple[nn.Module, bool]:
    """The last module in order of execution with spatial output that lies between the explained
    inputs and the explained score, and whether it does for every score that the output holds.

    Spatial is an output [R, C, *s], [R, *s, C] or of tokens [R, T, C], with more than one place
    and more than one channel. Left out are pooled maps (the paper's layer is the last
    convolution's, before its resolution is lost); modules that run more than once; those that give
    several tensors, of which the rest of the model may read another, where others are; and, where
    the model's own output is spatial (segmentation), maps of as many channels as it has. Tokens are
    taken from before the last module that mixes them (attention, a recurrence): behind it, a
    class token's head sees no other token. The first norm of a ViT's last block, therefore.
    Auxiliary heads and the towers of other inputs are left out by proof: a module counts if it
    gives something else for other inputs, and if scores are others where it gives something else.

    Raises InputError where there is none, with what was found.
    """
    watch = _Watch(module_of(model))
    with torch.no_grad(), uncompiled():
        with watch.watching(), _Attention(watch):
            raw, scores = run(0, None)
        before = dict(watch.digests)
        with watch.watching(only_values=True):
            run(0, noisy)
        moved = {one for one, value in watch.digests.items() if value != before.get(one)}
        shown = _shown(raw)
        found = watch.candidates(shown, moved)
        proof = _Proof(run, examples, shown, scores)
        while found:
            module = watch.last(found, moved)
            if (reached := proof.of(module)) is not None:
                return module, reached
            found = [one for one in found if one.module is not module]
    raise watch.none(tried=True)


def _shown(raw: Any) -> Tensor | None:
    """The tensor that is explained in what a model returned, as a rule."""
    explained = read_of(raw)
    return next(iter(tensors_of(raw)), None) if explained is None else explained


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers differ; what has no number differs."""
    return a.shape != b.shape or bool((a != b).all())


def noisy(x: Tensor) -> Tensor:
    """Other values of the same kind and range."""
    if x.is_floating_point() or x.is_complex():
        noise = torch.rand(x.shape, generator=_generator(), dtype=torch.float64, device="cpu")
        size = x.abs().max().nan_to_num(1.0) + 1
        return x.nan_to_num() + (noise.to(x.device, x.real.dtype) - 0.5) * size
    if x.dtype == torch.bool or x.numel() == 0:
        return ~x if x.dtype == torch.bool else x
    low, high = int(x.min()), int(x.max())
    drawn = torch.randint(low, high + 1, x.shape, generator=_generator(), device="cpu")
    return drawn.to(x.device, x.dtype)


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


@dataclass
class _Proof:
    """Shows which modules the scores depend on: they change where a module gives something else.

    shown, scores: the model's output and the score of the first example as they are.
    """

    run: Run
    examples: int
    shown: Tensor | None
    scores: Tensor

    def of(self, module: nn.Module) -> bool | None:
        """Whether every number of the output depends on a module; None where a score does not."""
        raw, scores = self._changed(module, 0)
        if not _differ(scores, self.scores):
            return None
        shown = _shown(raw)
        if shown is None or self.shown is None or _differ(shown, self.shown):
            return True
        several = range(1, self.examples)
        same = (
            (self.run(n, None)[1] for n in several),
            (self._changed(module, n)[1] for n in several),
        )
        return False if all(_differ(a, b) for a, b in zip(*same, strict=True)) else None

    def _changed(self, module: nn.Module, number: int) -> tuple[Any, Tensor]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            return with_floats(output, [noisy(one) for one in floats_at(output)])

        thread = threading.get_ident()
        handle = module.register_forward_hook(hook)
        try:
            return self.run(number, None)
        except Exception:
            # What cannot run with other values depends on them.
            return None, self.scores * torch.nan
        finally:
            handle.remove()


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
    mixing: list[tuple[int, nn.Module]] = field(default_factory=list)
    digests: dict[nn.Module, tuple[float, ...]] = field(default_factory=dict)
    time: int = 0
    rows: int | None = None
    pooled: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def watching(self, *, only_values: bool = False) -> Iterator[None]:
        """Hooks for one run. only_values: of a further one, which tells `digests` alone."""
        handles: list[RemovableHandle] = []
        try:
            for module in self.root.modules():
                if only_values:
                    handles.append(module.register_forward_hook(self._value))
                    continue
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
            self.mixing.append((at_work[-1][1], at_work[-1][0]))

    def _value(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self.thread and (tensors := tensors_of(output)):
            self.digests[module] = _digest(tensors[0])

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
        self._value(module, args, output)
        self.shapes[module] = list(shape)
        if isinstance(module, _POOLS):
            self.pooled = tensor
        if tensor is self.pooled or len(shape) < 3 or self.rows not in (None, shape[0]):
            return
        # Behind attention, what cannot tell is taken for tokens.
        axis = channel_axis(module, shape, 1 if not self.mixing or len(shape) > 3 else -1)
        space = shape[1:-1] if axis == -1 else shape[2:]
        if max(space) > 1 and shape[axis] > 1:
            self.seen.append(_Seen(module, self.time, shape, axis, len(tensors) == 1))

    def candidates(self, raw: Tensor | None, moved: Container[nn.Module]) -> list[_Seen]:
        """What may be the layer for `layer="auto"`, of a model that returned `raw`. moved: modules
        that give something else for other inputs.
        """
        found = [one for one in self.seen if self.calls[one.module] == 1]
        if raw is not None and raw.dim() >= 3:
            classes = {raw.shape[1], raw.shape[-1 if raw.dim() == 3 else 1]}
            found = [one for one in found if one.channels not in classes]
        found = [one for one in found if one.alone] or found
        if not found:
            raise self.none()
        # Inputs of which there are no others tell nothing.
        return [one for one in found if one.module in moved] or found

    def last(self, found: list[_Seen], moved: Container[nn.Module]) -> nn.Module:
        """The last of the candidates, of tokens before the last attention among those inputs."""
        mixing = [time for time, module in self.mixing if module in moved]
        if found[-1].tokens and mixing:
            found = [one for one in found if one.time < mixing[-1]] or found
        return found[-1].module

    def none(self, *, tried: bool = False) -> InputError:
        names = {module: name for name, module in self.root.named_modules()}
        last = list(self.shapes.items())[-8:]
        shown = ", ".join(f"{names[module]} {shape}" for module, shape in last) or "none"
        again = {names[one.module]: None for one in self.seen if self.calls[one.module] > 1}
        more = f"; {', '.join(again)} run more than once" if again else ""
        spatial = ", [B, C, *spatial] or tokens [B, T, C]"
        lacking = " that the explained scores depend on" if tried else spatial
        return InputError(
            f'layer="auto" found no layer with spatial output{lacking}: the last outputs are '
            f"{shown}{more}; pass the layer itself"
        )


def _digest(tensor: Tensor) -> tuple[float, ...]:
    """Numbers that differ where tensors do."""
    if tensor.numel() == 0 or tensor.is_complex():
        return ()
    flat = tensor.detach().flatten().double()
    waves = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64).cos_()
    return tuple(torch.stack([flat.sum(), flat.square().sum(), flat @ waves]).tolist())


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
