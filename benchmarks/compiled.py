"""What the compilers make of the kernels: registers, local and shared memory, the widest accesses,
and how many warps a multiprocessor can then hold. Needs Triton, nvcc for csrc/cuda, and no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
ARCHES = ("80", "90")
FLAGS = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings")
ELEMENTS_OF_A_THREAD = {"masks": 8, "overlay": 16, "points": 4}
"""Of the CUDA C++ kernels, by file; of `overlay` where blocks are fewer than its limit."""
RESERVED = 1024
"""Bytes of shared memory that CUDA keeps of each block from compute capability 8.0 on."""

_SASS = re.compile(r"\b(LD|ST)G?\.E(\S*)")
_SASS_WIDTHS = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_GCN = re.compile(r"\b(?:global|flat|buffer)_(load|store)_(\w+)")
_GCN_WIDTHS = {"dword": 4, "ushort": 2, "short": 2, "sshort": 2, "ubyte": 1, "byte": 1, "sbyte": 1}
_GCN_LOCAL = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


@dataclass(frozen=True)
class Counters:
    """Of one compiled kernel.

    `registers` of a thread; `scalars` of a warp (AMD); `local` names what is kept outside of them:
    bytes of stack, which holds all spills, and of local memory, or AMD's counts; `shared` bytes of
    a program; `load` and `store` are the widest accesses of global memory in bytes.
    """

    registers: int
    scalars: int
    local: dict[str, int]
    shared: int
    load: int
    store: int


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (AMD: compute unit) holds: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared: int


# CUDA Programming Guide, technical specifications per compute capability; AMD CDNA 3 instruction
# set architecture guide, and the limit of 16 blocks of more than one warp from LLVM's AMDGPU.
LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024),
    "gfx942": Limits(32, 16, 64 * 1024),
}


def resident_warps(counters: Counters, warps: int, target: str) -> int:
    """Warps of programs of `warps` that a multiprocessor of `target` can hold at once."""
    limits = LIMITS[target]
    if target.startswith("gfx"):
        # Four SIMDs of 512 vector registers a lane and 800 scalar ones.
        by_vectors = 512 // _up(counters.registers, 8)
        by_scalars = 800 // _up(counters.scalars, 16)
        held = 4 * min(limits.warps // 4, by_vectors, by_scalars)
        shared = counters.shared
    else:
        # 65536 registers in units of 256 a warp; four schedulers share them out.
        held = min(limits.warps, 65536 // _up(32 * counters.registers, 256) // 4 * 4)
        shared = _up(counters.shared + RESERVED, 128)
    blocks = min(limits.blocks, held // warps, limits.shared // max(shared, 1))
    return blocks * warps


def _up(number: int, unit: int) -> int:
    return max(1, -(-number // unit)) * unit


def of_triton(kernel: CompiledKernel) -> Counters:
    """The counters of what Triton compiled."""
    if "amdgcn" in kernel.asm:
        return of_gcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (found,) = of_cubin(cubin).values()
    # Triton's shared memory is dynamic, which the file does not know.
    return replace(found, shared=kernel.metadata.shared)


def spills(kernel: CompiledKernel) -> dict[str, int]:
    """Only what is kept outside of registers, which is found sooner than all counters."""
    if "amdgcn" in kernel.asm:
        return of_gcn(kernel.asm["amdgcn"], kernel.metadata.shared).local
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((_, found),) = _usage(_cuobjdump("--dump-resource-usage", cubin))
    return _outside(found)


def of_gcn(text: str, shared: int) -> Counters:
    """The counters in AMD's assembly."""
    names = ("vgpr_count", "sgpr_count", *_GCN_LOCAL)
    found = {name: re.search(rf"\.{name}:\s+(\d+)", text) for name in names}
    number = {name: int(match.group(1)) for name, match in found.items() if match}
    if len(number) < len(names):
        raise ValueError(f"the counters are not where they were: {found}")
    widest = {"load": 0, "store": 0}
    for kind, name in _GCN.findall(text):
        wide = re.fullmatch(r"dwordx(\d)", name)
        width = 4 * int(wide.group(1)) if wide else _GCN_WIDTHS[re.sub("_d16.*", "", name)]
        widest[kind] = max(widest[kind], width)
    local = {name: number[name] for name in _GCN_LOCAL}
    return Counters(number["vgpr_count"], number["sgpr_count"], local, shared, **widest)


def of_cubin(cubin: Path) -> dict[str, Counters]:
    """The counters of every kernel in the file, by its mangled name."""
    text = _cuobjdump("--dump-resource-usage", "--dump-sass", cubin)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL))
    found = {}
    for name, used in _usage(text):
        widest = {"LD": 0, "ST": 0}
        for kind, suffixes in _SASS.findall(code[name]):
            widths = [width for mark, width in _SASS_WIDTHS.items() if mark in suffixes]
            widest[kind] = max(widest[kind], *(widths or [4]))
        found[name] = Counters(
            used["REG"], 0, _outside(used), used["SHARED"], widest["LD"], widest["ST"]
        )
    return found


def _usage(text: str) -> list[tuple[str, dict[str, int]]]:
    names = ("REG", "STACK", "SHARED", "LOCAL")
    pattern = r"Function (\S+):\s+" + " ".join(rf"{name}:(\d+)" for name in names)
    found = re.findall(pattern, text)
    if not found:
        raise ValueError(f"the counters are not where they were:\n{text[:500]}")
    return [(name, dict(zip(names, map(int, used), strict=True))) for name, *used in found]


def _outside(used: dict[str, int]) -> dict[str, int]:
    return {"stack": used["STACK"], "local": used["LOCAL"]}


def _cuobjdump(*arguments: object) -> str:
    """What Triton's own cuobjdump says."""
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:
        raise RuntimeError("triton is not installed, whose cuobjdump reads the counters")
    program = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvcc(*arguments: object) -> str:
    """Runs nvcc with the library's flags and returns what it says; raises with it on failure."""
    command = ["nvcc", *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def code_for(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def of_source(source: Path, arch: str) -> dict[str, Counters]:
    """The counters of every kernel in a .cu file by its name and template arguments."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "out.cubin"
        nvcc(code_for(arch), "-cubin", "-o", cubin, source)
        found = of_cubin(cubin)
    # From 9.0 on the compiler counts the reserved bytes in.
    reserved = 0 if arch.startswith("8") else RESERVED
    return {
        readable(name): replace(one, shared=max(0, one.shared - reserved))
        for name, one in found.items()
    }


def readable(name: str) -> str:
    """`noise_points<float, true>` of a mangled name; the name itself where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    affines = ("none", "one", "row", "any")
    text = re.sub(r"\(Affine\)(\d)", lambda match: affines[int(match.group(1))], text)
    return re.sub(r"\(.*", "", text).strip()


def threads_of(source: Path) -> int:
    """Threads of a block of the kernels in a .cu file."""
    found = re.search(r"constexpr int kThreads = (\d+);", source.read_text())
    if found is None:
        raise ValueError(f"{source.name} does not say kThreads")
    return int(found.group(1))
