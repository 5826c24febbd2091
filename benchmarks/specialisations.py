"""Every kernel as its launcher compiles it: argument types, constants, options.

T stands for the data's type and I for the integer of its width. The integers named in DIVISIBLE
are multiples of 16 for common shapes, which Triton specialises on; odd sizes are compiled too.
Needs Triton, and no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from saliency_fast.kernels import (
    accumulate,
    cam,
    finish,
    masks,
    norms,
    overlay,
    philox,
    points,
    pools,
    ranks,
    segments,
    windows,
)
from saliency_fast.kernels.configurations import TABLE, Configuration
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

MODULES = (
    accumulate, cam, finish, masks, norms, overlay, philox, points, pools, ranks, segments, windows,
)  # fmt: skip
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {
    "float32": ("fp32", "i32"),
    "float64": ("fp64", "i64"),
    "int64": ("i64", "i64"),
    "bfloat16": ("bf16", "i16"),
    "float16": ("fp16", "i16"),
    "uint8": ("u8", "u8"),
    "bool": ("u8", "u8"),
}
DIVISIBLE = ("inner", "numel", "positions", "count", "skip")


def gpu_target(name: str) -> GPUTarget:
    """Triton's target of a name as in TARGETS; AMD's warps have 64 threads on gfx9 alone."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def key(kernel: JITFunction) -> str:
    """The kernel's name in the table of configurations: "points.line"."""
    return f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__.lstrip('_')}"


@dataclass(frozen=True)
class Specialisation:
    """One compilation: `types` are those of the arguments that are no constants, in order.

    `size` names the constants of the program's size as functions of its configuration; `width` is
    the bytes of the elements for which the launcher chooses it, `dtype`'s where not given.
    """

    kernel: JITFunction
    dtype: str
    types: str
    fixed: dict[str, Any]
    size: Callable[[Configuration], dict[str, int]]
    fused: bool = True
    given_width: int = 0

    @property
    def key(self) -> str:
        return key(self.kernel)

    @property
    def width(self) -> int:
        return self.given_width or getattr(torch, self.dtype).itemsize

    def configuration(self, target: str) -> Configuration:
        found: Configuration = TABLE[self.key].at(self.width, target)
        return found

    def constants(self, target: str) -> dict[str, Any]:
        return self.fixed | self.size(self.configuration(target))

    def compiled(self, target: str, *, odd: bool = False) -> CompiledKernel:
        """The kernel for `target` in the configuration that the table has for it."""
        options = {"num_warps": self.configuration(target).warps, "enable_fp_fusion": self.fused}
        source = self.source(target, odd=odd)
        return triton.compile(source, target=gpu_target(target), options=options)

    @property
    def name(self) -> str:
        names = ("KIND", "REDUCTION", "AFFINE", "RULE", "AXES")
        kind = [str(self.fixed[k]) for k in names if k in self.fixed]
        kind += [name.lower() for name in ("WIDE", "EACH") if self.fixed.get(name)]
        half = ["bfloat16"] if "bf16" in self.types else []
        return "-".join([self.kernel.__name__.lstrip("_"), *kind, *half, self.dtype])

    def source(self, target: str, *, odd: bool) -> ASTSource:
        """The kernel's source with its types; `odd` leaves out what is known of sizes."""
        data, integer = DTYPES[self.dtype]
        types = iter(self.types.replace("T", data).replace("I", integer).split())
        constants = self.constants(target)
        signature = {
            name: "constexpr" if name in constants else next(types)
            for name in self.kernel.arg_names
        }
        hints = {
            (position,): [["tt.divisibility", 16]]
            for position, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (name in DIVISIBLE and not odd)
        }
        return ASTSource(self.kernel, signature, constants, hints)


def _block(chosen: Configuration) -> dict[str, int]:
    return {"BLOCK": chosen.elements}


def _blocks(chosen: Configuration) -> dict[str, int]:
    """Of four elements each, as Philox draws them."""
    return {"BLOCKS": chosen.elements // 4}


def _groups(chosen: Configuration) -> dict[str, int]:
    """Of eight elements each, a byte of a mask."""
    return {"GROUPS": chosen.elements // 8}


def _rows(chosen: Configuration) -> dict[str, int]:
    return {"AHEAD": chosen.ahead, "BLOCK": chosen.elements}


def _tiles(chosen: Configuration) -> dict[str, int]:
    return {"TILES": chosen.tiles, "BLOCK": chosen.elements}


def _channels(chosen: Configuration) -> dict[str, int]:
    return {"TILES": chosen.tiles, "AHEAD": chosen.ahead, "BLOCK": chosen.elements}


def _nothing(chosen: Configuration) -> dict[str, int]:
    return {}


def specialisations() -> Iterator[Specialisation]:
    for dtype in ("float32", "float64"):
        yield from _points(dtype)
        yield from _accumulate(dtype)
        yield from _finish_and_overlay(dtype)
        yield from _cam(dtype)
        yield Specialisation(
            segments._mask, dtype, "*T *T *T *i64 *i64 *T i32 i32 i32 i32", {}, _block
        )
    for dtype in ("float32", "float64", "int64", "uint8"):
        yield from _perturbed(dtype)
    yield Specialisation(
        philox._bits, "int64", "*i64 *i64 *i64 i32 i32 i64 i32", {"STREAM": 0}, _blocks
    )
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        yield from _masks(dtype)
        yield from _pools(dtype)
        yield from _norms(dtype)
    yield Specialisation(masks._pack, "bool", "*T *u8 i32", {"WIDE": False}, _groups)


def _points(dtype: str) -> Iterator[Specialisation]:
    yield Specialisation(points._line, dtype, "*T *T *i64 *fp64 *T i32 i32 i32", {}, _block)
    yield Specialisation(
        points._noise, dtype, "*T *fp64 *i64 *i64 *i64 *T i32 i32 i64 i32",
        {"ANTITHETIC": True}, _blocks,
    )  # fmt: skip
    yield Specialisation(
        points._random_line, dtype, "*T *T *fp64 *i64 *i64 *i64 *T i32 i32 i32 i64 i32",
        {}, _blocks,
    )  # fmt: skip


def _perturbed(dtype: str) -> Iterator[Specialisation]:
    """Windows of pictures and, with 64-bit offsets, of volumes with channels and time; segments;
    ranks.
    """
    picture, volume = {"size_b": 1, "AXES": 3, "WIDE": False}, {"AXES": 5, "WIDE": True}
    types = "*T *T *i64 *i64 *i64 *T i32 i32"
    yield Specialisation(windows._window, dtype, f"{types} i32{' i32' * 3}", picture, _tiles)
    yield Specialisation(windows._window, dtype, f"{types} i64{' i32' * 4}", volume, _tiles)
    yield Specialisation(
        segments._segment, dtype, "*T *T *i64 *u8 *i64 *i64 *T i32 i32 i32 i32 i32 i32", {}, _block
    )
    yield Specialisation(
        ranks._rank, dtype, "*T *T *i32 *i64 *i64 *T i32 i32 i32 i32 i32", {}, _block
    )


def _cam(dtype: str) -> Iterator[Specialisation]:
    for each in (False, True):
        yield Specialisation(cam._weigh, dtype, "*T *T *fp64 i32 i32", {"EACH": each}, _channels)
    if dtype == "float32":
        yield Specialisation(
            cam._weigh, dtype, "*bf16 *bf16 *fp64 i32 i32", {"EACH": True}, _channels,
            given_width=2,
        )  # fmt: skip
    picture = {"in_d": 1, "out_d": 1, "AXES": 2, "RECTIFY": True, "WIDE": False}
    yield Specialisation(cam._resize, dtype, "*fp64 *T i32 i32 i32 i32 i32", picture, _block)
    volume = {"AXES": 3, "RECTIFY": True, "WIDE": True}
    yield Specialisation(cam._resize, dtype, "*fp64 *T i64" + " i32" * 6, volume, _block)


def _accumulate(dtype: str) -> Iterator[Specialisation]:
    types = "*T *T *i64 *fp64 i32 i32 i32"
    yield Specialisation(accumulate._accumulate, dtype, types, {"KIND": "square"}, _rows)
    if dtype == "float32":
        yield Specialisation(
            accumulate._accumulate, dtype, types.replace("*T *T", "*T *bf16"),
            {"KIND": "sum"}, _rows, given_width=2,
        )  # fmt: skip
    yield Specialisation(
        accumulate._moments, dtype, "*T *T *fp64 *fp64 *T *i64 i32 i32 i32", {}, _rows
    )
    yield Specialisation(
        accumulate._random_lines, dtype,
        "*T *T *i64 *fp64 *T *T *fp64 *i64 *i64 *i64 i32 i32 i32 i32 i64 i32",
        {}, _blocks,
    )  # fmt: skip


def _finish_and_overlay(dtype: str) -> Iterator[Specialisation]:
    data = getattr(torch, dtype)
    for reduction in ("none", "l2"):
        yield Specialisation(
            finish._finish, dtype, "*T *T *T *T *fp64 i32 i32 i32 i32 i32",
            {"SCALED": True, "SHIFTED": True, "REDUCTION": reduction}, _block,
        )  # fmt: skip
    magnitude = 2 ** (8 * data.itemsize - 1) - 1
    yield Specialisation(
        overlay._count, dtype, "*I *I *i64 i32 i32",
        {"SHIFT": 8, "MAGNITUDE": magnitude, "BITS": overlay.BITS}, _tiles,
    )  # fmt: skip
    yield Specialisation(overlay._narrow, dtype, "*I *i64 *i64", {"BITS": overlay.BITS}, _nothing)
    yield Specialisation(
        overlay._overlay, dtype, "*u8 *T *T *u8 *u8 i32 i32 fp32",
        {"TINY": torch.finfo(data).tiny, "SIGNED": True}, _block, fused=False,
    )  # fmt: skip


def _masks(dtype: str) -> Iterator[Specialisation]:
    offsets = " i32" * 6
    yield Specialisation(masks._pack, dtype, "*T *u8 i32", {"WIDE": False}, _groups)
    for affine, rule, wide in (
        ("one", "standard", False),
        ("row", "guided", False),
        ("any", "deconv", False),
        ("any", "guided", True),
    ):
        size = " i64" if wide else " i32"
        if dtype == "float16" and rule != "deconv":
            continue  # compiled like bfloat16
        same = {"AFFINE": affine, "SLOPE": 0.0, "WIDE": wide}
        yield Specialisation(
            masks._forward, dtype, "*T *T *T *T *T *u8" + size + offsets,
            {**same, "RESIDUAL": True, "UPPER": 6.0}, _groups, fused=False,
        )  # fmt: skip
        yield Specialisation(
            masks._backward, dtype, "*T *u8 *T *T *T" + size + offsets,
            {**same, "RULE": rule, "BOTH": True}, _groups, fused=False,
        )  # fmt: skip


def _norms(dtype: str) -> Iterator[Specialisation]:
    """Of rows of 768 numbers, as in transformers: sums of float32 and a half type, too."""
    half = {"float32": "fp16", "bfloat16": "bf16"}.get(dtype, DTYPES[dtype][0])
    wide, same = "fp64" if dtype == "float64" else "fp32", {"WEIGHTED": True, "BLOCK": 1024}
    yield Specialisation(
        norms._forward, dtype, f"*T *{half} *{wide} *{wide} *T *{half} *{wide} *{wide} i32",
        {**same, "BIASED": True, "EPS": 1e-6}, _nothing,
    )  # fmt: skip
    yield Specialisation(
        norms._backward, dtype, f"*{half} *T *T *{wide} *{wide} *{wide} *T *{half} i32",
        {**same, "PASSED": True, "BOTH": True}, _nothing,
    )  # fmt: skip


def _pools(dtype: str) -> Iterator[Specialisation]:
    """Contiguous pictures and, with 64-bit offsets, volumes with their channels last."""
    picture = {
        "inner": 1, "in_d": 1, "out_d": 1, "KERNEL": (1, 3, 3), "STRIDE": (1, 2, 2),
        "PADDING": (0, 1, 1), "DILATION": (1, 1, 1), "WIDE": False,
    }  # fmt: skip
    volume = {
        "KERNEL": (2, 2, 3), "STRIDE": (2, 2, 1), "PADDING": (0, 0, 1), "DILATION": (1, 2, 1),
        "WIDE": True,
    }  # fmt: skip
    for kernel, types in ((pools._maxpool, "*T *T *u8"), (pools._maxpool_backward, "*T *u8 *T")):
        yield Specialisation(kernel, dtype, f"{types} i32 {'i32 ' * 4}", picture, _block)
        yield Specialisation(kernel, dtype, f"{types} i64 {'i32 ' * 7}", volume, _block)
