"""Half precision: convolutions and matrix products take half types and add up in float32, calls
between them keep the type that they get, and what half types cannot hold is done in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast._torch_compat import fp32_precision, set_fp32_precision
from saliency_fast.errors import InputError
from saliency_fast.graph.autograd.norms import add_layer_norm
from saliency_fast.graph.intercept import lean_call
from saliency_fast.graph.opinfo import Wrapped
from saliency_fast.graph.passes.fusion import (
    folded_weights,
    layers,
    partial_convolution,
    without_norm,
)
from saliency_fast.graph.program import Prepared, Program, Step, mapped

Tensors = tuple[Tensor, ...]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """How a launch computes its products: in the type `half`, or in float32 (None).

    tf32: products of float32 numbers are rounded to 10 bits, on GPUs. scaled: cotangents are
    multiplied with a power of two, as the type has few exponents.
    """

    name: str
    half: torch.dtype | None = None
    tf32: bool = False
    scaled: bool = False

    @property
    def exact(self) -> bool:
        return self.half is None and not self.tf32


FLOAT32 = Precision("float32")
AUTO = "auto"
PRECISIONS = {
    one.name: one
    for one in (
        FLOAT32,
        Precision("tf32", tf32=True),
        Precision("float16", torch.float16, scaled=True),
        Precision("bfloat16", torch.bfloat16),
    )
}
OF_DEVICE = {"cpu": ("bfloat16", "float32"), "cuda": ("float16", "bfloat16", "tf32", "float32")}
"""The precisions of a device, as a rule the fastest first."""

BY_DEFAULT = {"cuda": AUTO}
"""What a device takes where no precision was asked for; others take float32."""


def read_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; raises InputError where the device has none such."""
    offered = OF_DEVICE.get(device.type, ("float32",))
    if name not in offered:
        raise InputError(
            f"precision={name!r} is not offered on {device.type}: expected one of "
            f"{', '.join(offered)}, or 'auto'"
        )
    return PRECISIONS[name]


@dataclass(frozen=True)
class Cast(Wrapped):
    """A call that takes its floating-point numbers in the type `to`, where they are of `of`."""

    of: tuple[torch.dtype, ...]
    to: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return lean_call(self.func, cast(args, self.of, self.to), cast(kwargs, self.of, self.to))


@dataclass(frozen=True)
class LikeInput(Wrapped):
    """A call that takes its parameters in the type of its input, where that is a half type."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype in HALVES:
            args, kwargs = cast((args, kwargs), (torch.float32,), x.dtype)
        return lean_call(self.func, (x, *args), kwargs)


def cast(value: Any, of: tuple[torch.dtype, ...], to: torch.dtype) -> Any:
    def change(leaf: Any) -> Any:
        return leaf.to(to) if isinstance(leaf, Tensor) and leaf.dtype in of else leaf

    return mapped(change, value)


def in_half_type(program: Program, half: torch.dtype) -> Prepared:
    """The program with products in a half type, and normalisations folded in float32."""
    made, steps = list[tuple[Callable[[], Tensors], Tensors]](), list(program.steps)
    known = WeakTensorKeyDictionary()

    def copied(make: Callable[[], Tensors]) -> Tensors:
        with torch.no_grad():
            copies = tuple(one.to(half) for one in make())
        made.append((make, copies))
        return copies

    def leaf(value: Any) -> Any:
        """A float32 tensor in the half type, one of each weight that several calls share."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if value not in known:
            known[value] = copied(lambda: (value.detach(),))[0]
        return known[value]

    for layer in layers(program):
        behind = layer.norm_index
        fused = behind is None or program.steps[behind].info.kind == "rectified"
        if layer.norm is None or not fused:
            continue
        weights = copied(partial(folded_weights, layer.weight, layer.bias, layer.norm))
        args = (layer.x, *weights, *layer.options)
        steps[layer.index] = replace(steps[layer.index], func=layer.call, args=args)
        if behind is not None:
            steps[behind] = without_norm(steps[behind])
    steps = [_narrowed(program, one, half) for one in steps]
    cast_steps = (_cast(one, half, leaf) if one.varying else one for one in steps)
    return Prepared(replace(program, steps=tuple(cast_steps)), tuple(made))


def half_type_bytes(program: Program) -> int:
    products = [
        step
        for step in program.steps
        if step.varying and (step.info.half == "product" or step.info.kind == "folded convolution")
    ]
    weights = [one for step in products for one in (*step.args, *step.kwargs.values())]
    found = [one for one in weights if isinstance(one, Tensor) and one.dtype == torch.float32]
    return sum({id(one): one.nbytes // 2 for one in found}.values())


def _narrowed(program: Program, step: Step, half: torch.dtype) -> Step:
    """A fused layer normalisation that rounds its result, where only products take that."""
    if step.func is not add_layer_norm:
        return step
    users = program.uses.get(step.outputs[1], ())
    taken = [program.steps[one] for one in users if one < len(program.steps)]
    alone = all(one.info.half == "product" and not one.changed for one in taken)
    rounds = alone and 0 < len(taken) == len(users)
    return replace(step, args=(*step.args[:-1], half)) if rounds else step


def _cast(step: Step, half: torch.dtype, leaf: Callable[[Any], Any]) -> Step:
    """A step with its call in the type that suits it."""
    policy, inplace = step.info.half, bool(step.changed)
    if policy == "product" and (not inplace or step.func is partial_convolution):
        call = Cast(step.func, (torch.float32,), half)
        return replace(step.with_arguments(leaf), func=call)
    if policy == "float32" and not inplace:
        return replace(step, func=Cast(step.func, HALVES, torch.float32))
    return replace(step, func=LikeInput(step.func)) if policy == "input" else step


_TURN = threading.Condition()
_HELD: list[bool | None] = []
"""For each launch that is running: whether it wants TF32; None leaves that to the user."""
_UNDO: list[ExitStack] = []
"""What puts PyTorch's switches back as they were before the first of these launches."""
_OWN = threading.local()
_KINDS = ("matmul", "conv", "rnn")
"""Operators that may use TF32 on GPUs."""


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch uses TF32 on a GPU where the precision says so; its switches hold for all
    threads, so launches that want them otherwise wait. Afterwards they are as they were.
    """
    if device.type != "cuda":
        yield
        return
    wanted = None if users_tf32() else precision.tf32
    with _TURN:
        _TURN.wait_for(lambda: not _HELD or _HELD[0] == wanted)
        if not _HELD and wanted is not None:
            _UNDO.append(_switched(wanted))
        _HELD.append(wanted)
    try:
        yield
    finally:
        with _TURN:
            _HELD.pop()
            if not _HELD:
                for undo in _UNDO:
                    undo.close()
                _UNDO.clear()
                _TURN.notify_all()


@contextmanager
def tf32_as_set() -> Iterator[None]:
    """Inside, launches of this thread use TF32 where the user has allowed PyTorch to."""
    before, _OWN.kept = getattr(_OWN, "kept", False), True
    try:
        yield
    finally:
        _OWN.kept = before


def users_tf32() -> tuple[str, ...]:
    """What the user has set of each kind of operator, inside of `tf32_as_set`; else nothing."""
    return tuple(fp32_precision("cuda", one) for one in _KINDS if getattr(_OWN, "kept", False))


def rounding_of(precision: Precision, device: torch.device) -> str:
    """The name of the precision to which products of launches are rounded here, at most."""
    kept = device.type == "cuda" and precision.exact and "tf32" in users_tf32()
    return "tf32" if kept else precision.name


def _switched(wanted: bool) -> ExitStack:
    """Allows or forbids TF32 on GPUs; what is returned undoes that, whether the user has set
    `allow_tf32`, `set_float32_matmul_precision` or `fp32_precision`.
    """
    undo, word = ExitStack(), "tf32" if wanted else "ieee"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if fp32_precision("generic", "all") == fp32_precision("cuda", "all") == "none":
        # The older switches while they agree with the newer ones: else their getters would raise.
        with suppress(RuntimeError):
            level, before = torch.get_float32_matmul_precision(), matmul.allow_tf32
            on_cpu, own = (fp32_precision(one, "matmul") for one in ("mkldnn", "cuda"))
            if before != wanted and level != "medium" and on_cpu == "none":
                undo.callback(set_fp32_precision, "cuda", "matmul", own)
                undo.callback(setattr, matmul, "allow_tf32", before)
                matmul.allow_tf32 = wanted
        with suppress(RuntimeError):
            if (before := cudnn.allow_tf32) != wanted:
                for kind in _KINDS[1:]:
                    undo.callback(set_fp32_precision, "cuda", kind, fp32_precision("cuda", kind))
                undo.callback(setattr, cudnn, "allow_tf32", before)
                cudnn.allow_tf32 = wanted
    if all((fp32_precision("cuda", one) == "tf32") == wanted for one in _KINDS):
        return undo
    # For all kinds, which changes those with nothing of their own; the others one by one.
    undo.callback(set_fp32_precision, "cuda", "all", _own_of_cuda())
    set_fp32_precision("cuda", "all", word)
    for kind in _KINDS:
        if (own := fp32_precision("cuda", kind)) != word:
            undo.callback(set_fp32_precision, "cuda", kind, own)
            set_fp32_precision("cuda", kind, word)
    return undo


def _own_of_cuda() -> str:
    """What is set for GPUs themselves, and not for all devices."""
    everywhere, own = (fp32_precision(one, "all") for one in ("generic", "cuda"))
    if own == "none" or own != everywhere:
        return own
    set_fp32_precision("generic", "all", "none")
    try:
        return fp32_precision("cuda", "all")
    finally:
        set_fp32_precision("generic", "all", everywhere)
