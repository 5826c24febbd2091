"""One definition per op: schema, reference, fake, samples, and where its fast versions live."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import OpOverload, OpOverloadPacket, schema_of
from saliency_fast.errors import BackendError
from saliency_fast.ops import dispatch

_LIBRARY = torch.library.Library("saliency_fast", "DEF")  # type: ignore[no-untyped-call]
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, as tests and benchmarks make it."""

    args: tuple[Any, ...]

    @property
    def note(self) -> str:
        """The arguments in a line; of tensors dtypes, shapes and strides."""
        return ", ".join(map(_noted, self.args))


@dataclass(frozen=True)
class Op:
    """An op of the library; calling it dispatches by the device of its tensors.

    Attributes:
        schema: As `torch.library` reads it.
        reference: The slow, obvious version, with which tests compare all others.
        fake: Its outputs without their numbers; None for an op that only changes arguments.
        samples: Yields calls with every awkward size.
        triton: Module of `saliency_fast.kernels` with a launcher of the op's name; without it and
            `cuda` GPUs take the reference.
        cuda: Whether `saliency_fast.ops.cuda` has such a launcher.
        least: Bytes that a perfect kernel must read and write, where `moved` would count others.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[], Iterator[Sample]]
    triton: str | None = None
    cuda: bool = False
    least: Callable[..., int] | None = None

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]

    @property
    def overload(self) -> OpOverload:
        packet: OpOverloadPacket = getattr(torch.ops.saliency_fast, self.name)
        return packet.default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def moved(self, *args: Any) -> int:
        """Bytes that a perfect kernel must read and write: each argument and result once, and what
        it changes in place twice.
        """
        if self.least is not None:
            return self.least(*args)
        found = self.fake(*(one.to("meta") if isinstance(one, Tensor) else one for one in args))
        results = found if isinstance(found, tuple) else (found,)
        about = zip(args, schema_of(self.overload).arguments, strict=False)
        changed = [value for value, one in about if one.alias_info and one.alias_info.is_write]
        tensors = [one for one in (*args, *changed, *results) if isinstance(one, Tensor)]
        return sum(one.numel() * one.element_size() for one in tensors)

    def on_gpu(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the version for the GPU of the first argument, which is imported at its first call.

        Raises:
            BackendError: Where a kernel does not compile, load or run. Arguments that it refuses
                (ValueError, TypeError) are other errors, and so are RuntimeErrors that say nothing
                of the kernel: memory that runs out, and captures of graphs that fail.
        """
        device = args[0].device
        backend = dispatch.on_device(device.index, has_cuda=self.cuda)
        try:
            return _launcher(self.name, backend)(*args, **kwargs)
        except (ValueError, TypeError, BackendError, torch.AcceleratorError):
            raise
        except Exception as error:
            if "out of memory" in str(error) or "captur" in str(error):
                raise
            text = f"{self.name} ({backend}) failed on {device}: {error}"
            raise BackendError(text) from error

    def launcher(self, backend: str) -> Callable[..., Any]:
        """The function behind `backend` ("reference", "triton" or "cuda"), imported now."""
        if backend == "reference":
            return self.reference
        kernels = self.triton and f"saliency_fast.kernels.{self.triton}"
        path = {"triton": kernels, "cuda": "saliency_fast.ops.cuda" if self.cuda else None}[backend]
        if path is None:
            raise dispatch.not_built(self.name, backend)
        found: Callable[..., Any] = getattr(importlib.import_module(path), self.name)
        return found


@cache
def _launcher(name: str, backend: str) -> Callable[..., Any]:
    return OPS[name].launcher(backend)


def define(schema: str, **fields: Any) -> Op:
    """Registers an op of these fields with PyTorch's dispatcher and returns it."""
    op = Op(schema, **fields)
    _implement: Callable[..., None] = _LIBRARY.impl
    _LIBRARY.define(op.schema)  # type: ignore[no-untyped-call]
    _implement(op.name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"saliency_fast::{op.name}", op.fake, lib=_LIBRARY)
    if dispatch.for_gpu(has_cuda=op.cuda) != "reference" and (op.triton or op.cuda):
        _implement(op.name, op.on_gpu, "CUDA")
    OPS[op.name] = op
    return op


def _noted(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    strides = "" if value.is_contiguous() else f" strides {value.stride()}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides}"


def rows_of(table: Tensor, width: int) -> Tensor:
    """Views a per-row column [R] so that it broadcasts against [R, *] of `width` dimensions."""
    return table.view(-1, *(1,) * (width - 1))
