"""Every kernel as its launcher compiles it: argument types, constants, options.

T stands for the data's type and I for the integer of its width. The integers named in DIVISIBLE
are multiples of 16 for common shapes, which Triton specialises on; odd sizes are compiled too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from saliency_fast.kernels import accumulate, finish, masks, overlay, philox, points, pools
from saliency_fast.kernels.launch import WARPS, tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

MODULES = (accumulate, finish, masks, overlay, philox, points, pools)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "float32": ("fp32", "i32"),
    "float64": ("fp64", "i64"),
    "int64": ("i64", "i64"),
    "bfloat16": ("bf16", "i16"),
    "float16": ("fp16", "i16"),
    "bool": ("u8", "u8"),
}
DIVISIBLE = ("inner", "numel", "positions", "count", "skip")


@dataclass(frozen=True)
class Specialisation:
    """One compilation: `types` are those of the arguments that are no constants, in order."""

    kernel: JITFunction
    dtype: str
    types: str
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": WARPS})

    @property
    def name(self) -> str:
        names = ("KIND", "REDUCTION", "AFFINE", "RULE")
        kind = [str(self.constants[k]) for k in names if k in self.constants]
        kind += ["wide"] if self.constants.get("WIDE") else []
        half = ["bfloat16"] if "bf16" in self.types else []
        return "-".join([self.kernel.__name__.lstrip("_"), *kind, *half, self.dtype])

    def source(self, *, odd: bool) -> ASTSource:
        """The kernel's source with its types; `odd` leaves out what is known of sizes."""
        data, integer = DTYPES[self.dtype]
        types = iter(self.types.replace("T", data).replace("I", integer).split())
        signature = {
            name: "constexpr" if name in self.constants else next(types)
            for name in self.kernel.arg_names
        }
        hints = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (name in DIVISIBLE and not odd)
        }
        return ASTSource(self.kernel, signature, self.constants, hints)


def specialisations() -> Iterator[Specialisation]:
    for dtype in ("float32", "float64"):
        yield from _points(dtype)
        yield from _accumulate(dtype)
        yield from _finish_and_overlay(dtype)
    yield Specialisation(
        philox._bits, "int64", "*i64 *i64 *i64 i32 i32 i64 i32",
        {"STREAM": 0, "BLOCKS": WARPS * 32},
    )  # fmt: skip
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        yield from _masks(dtype)
        yield from _pools(dtype)
    yield Specialisation(
        masks._pack, "bool", "*T *T i32", {"WIDE": False, "GROUPS": masks.FLAG_GROUPS}
    )


def _points(dtype: str) -> Iterator[Specialisation]:
    block = tile(getattr(torch, dtype), points.ACCESSES)
    yield Specialisation(points._line, dtype, "*T *T *i64 *fp64 *T i32 i32 i32", {"BLOCK": block})
    yield Specialisation(
        points._noise, dtype, "*T *fp64 *i64 *i64 *i64 *T i32 i32 i64 i32",
        {"ANTITHETIC": True, "BLOCKS": block // 4},
    )  # fmt: skip
    yield Specialisation(
        points._random_line, dtype, "*T *T *fp64 *i64 *i64 *i64 *T i32 i32 i32 i64 i32",
        {"BLOCKS": block // 4},
    )  # fmt: skip


def _accumulate(dtype: str) -> Iterator[Specialisation]:
    block, ahead = tile(getattr(torch, dtype), 1), accumulate.AHEAD
    types = "*T *T *i64 *fp64 i32 i32 i32"
    yield Specialisation(
        accumulate._accumulate, dtype, types, {"KIND": "square", "AHEAD": ahead, "BLOCK": block}
    )
    if dtype == "float32":
        yield Specialisation(
            accumulate._accumulate, dtype, types.replace("*T *T", "*T *bf16"),
            {"KIND": "sum", "AHEAD": ahead, "BLOCK": tile(torch.bfloat16, 1)},
        )  # fmt: skip
    yield Specialisation(
        accumulate._moments, dtype, "*T *T *fp64 *fp64 *T *i64 i32 i32 i32",
        {"AHEAD": ahead, "BLOCK": block},
    )  # fmt: skip
    yield Specialisation(
        accumulate._random_lines, dtype,
        "*T *T *i64 *fp64 *T *T *fp64 *i64 *i64 *i64 i32 i32 i32 i32 i64 i32",
        {"BLOCKS": block // 4},
    )  # fmt: skip


def _finish_and_overlay(dtype: str) -> Iterator[Specialisation]:
    data = getattr(torch, dtype)
    for reduction in ("none", "l2"):
        yield Specialisation(
            finish._finish, dtype, "*T *T *T *T *fp64 i32 i32 i32 i32 i32",
            {"SCALED": True, "SHIFTED": True, "REDUCTION": reduction,
             "BLOCK": tile(data, finish.ACCESSES)},
        )  # fmt: skip
    bits = 8 * data.itemsize
    yield Specialisation(
        overlay._count, dtype, "*I *I *i64 i32 i32",
        {"SHIFT": 8, "MAGNITUDE": 2 ** (bits - 1) - 1, "BITS": overlay.BITS,
         "TILES": overlay.TILES, "BLOCK": tile(data, overlay.ACCESSES)},
    )  # fmt: skip
    yield Specialisation(overlay._narrow, dtype, "*I *i64 *i64", {"BITS": overlay.BITS})
    yield Specialisation(
        overlay._overlay, dtype, "*u8 *T *T *u8 *u8 i32 i32 fp32",
        {"TINY": torch.finfo(data).tiny, "SIGNED": True, "BLOCK": tile(torch.float32, 1)},
        {"num_warps": WARPS, "enable_fp_fusion": False},
    )  # fmt: skip


def _masks(dtype: str) -> Iterator[Specialisation]:
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    places = " i32" * 6
    for affine, rule, wide in (
        ("one", "standard", False),
        ("row", "guided", False),
        ("any", "deconv", False),
        ("any", "guided", True),
    ):
        size = " i64" if wide else " i32"
        if dtype == "float16" and rule != "deconv":
            continue  # compiled like bfloat16
        same = {"AFFINE": affine, "SLOPE": 0.0, "WIDE": wide, "GROUPS": masks.GROUPS}
        yield Specialisation(
            masks._forward, dtype, "*T *T *T *T *T *u8" + size + places,
            {**same, "RESIDUAL": True, "UPPER": 6.0}, options,
        )  # fmt: skip
        yield Specialisation(
            masks._backward, dtype, "*T *u8 *T *T *T" + size + places,
            {**same, "RULE": rule, "BOTH": True}, options,
        )  # fmt: skip


def _pools(dtype: str) -> Iterator[Specialisation]:
    """Contiguous pictures and, with 64-bit places, volumes with their channels last."""
    picture = {
        "inner": 1, "in_d": 1, "out_d": 1, "KERNEL": (1, 3, 3), "STRIDE": (1, 2, 2),
        "PADDING": (0, 1, 1), "DILATION": (1, 1, 1), "WIDE": False, "BLOCK": pools.BLOCK,
    }  # fmt: skip
    volume = {
        "KERNEL": (2, 2, 3), "STRIDE": (2, 2, 1), "PADDING": (0, 0, 1), "DILATION": (1, 2, 1),
        "WIDE": True, "BLOCK": pools.BLOCK,
    }  # fmt: skip
    for kernel, types in ((pools._maxpool, "*T *T *u8"), (pools._maxpool_backward, "*T *u8 *T")):
        yield Specialisation(kernel, dtype, f"{types} i32 {'i32 ' * 4}", picture)
        yield Specialisation(kernel, dtype, f"{types} i64 {'i32 ' * 7}", volume)
