"""Compiles what the Triton launchers launch, for a GPU that is not here; nothing runs.

    python -m tests.kernels.specialised_checks TARGET [--every N] [--shift ELEMENTS]
        [--mutant FILE OLD NEW]

A stand-in for Triton's driver takes the launches, so that Triton specialises kernels on their very
arguments: integers that are 1 or multiples of 16, and pointers that are aligned. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from saliency_fast.kernels import configurations
from triton.runtime import driver

from benchmarks import compiled
from benchmarks.specialisations import gpu_target
from saliency_fast.ops import Op, Sample
from tests.kernels.emulated.further_cases import Case
from tests.kernels.mutants import mutant
from tests.ops.checking import every_sample

SHARED = {"sm_75": 64, "sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may have."""
MOST_ERRORS = 5


class Driver:
    """Answers as the driver of a GPU `target` and counts what it is given.

    `compilations` are kernels, `launches` their runs, `spilling` those that keep numbers outside of
    registers.
    """

    def __init__(self, target: str) -> None:
        self.target, self.utils, self.launcher_cls = target, self, lambda *_: self.launch
        self.compilations, self.launches = 0, 0
        self.spilling: list[str] = []

    def load_binary(self, name: str, binary: bytes, *_: object) -> tuple[int, ...]:
        """(module, function, registers, spills, threads that a block may have)"""
        self.compilations += 1
        if self.target.startswith("sm_"):
            used = compiled.spills(SimpleNamespace(asm={"cubin": binary}))
            if any(used.values()):
                self.spilling.append(f"{name} {used}")
        return 1, 1, 32, 0, 1024

    def launch(self, x: int, y: int, z: int, *_: object) -> None:
        self.launches += 1
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise ValueError(f"a GPU has no grid of {x}, {y}, {z} programs")

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.target] * 1024}

    def get_current_target(self) -> Any:
        return gpu_target(self.target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def samples(every: int) -> list[tuple[Op, Sample]]:
    """Every Nth sample of each op with a Triton kernel that has elements, and its first."""
    numbers: Counter[str] = Counter()
    found = []
    for parameter in every_sample():
        op, sample = parameter.values
        if op.triton and sample.args[0].numel():
            if numbers[op.name] % every == 0:
                found.append((op, sample))
            numbers[op.name] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=SHARED)
    parser.add_argument("--every", type=int, default=1, help="of the samples")
    parser.add_argument("--shift", type=int, default=0, help="of pointers, in elements")
    parser.add_argument("--mutant", nargs=3, help="a fault of a file of kernels: mutants.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stand_in, errors = Driver(options.target), []
    driver.set_active(stand_in)
    configurations.target_of = lambda _: options.target
    directory = TemporaryDirectory()
    faulty = options.mutant and mutant(*options.mutant, Path(directory.name))
    for op, sample in samples(options.every):
        launcher = getattr(faulty, op.name, op.launcher("triton"))
        try:
            launcher(*Case(op, sample.args, options.shift).placed())
        except Exception:
            errors.append(f"{op.name}({sample.note})\n{traceback.format_exc()[-4000:]}")
        if len(errors) == MOST_ERRORS:
            break
    counts = {"compilations": stand_in.compilations, "launches": stand_in.launches}
    print(json.dumps({"errors": errors, "spilling": stand_in.spilling, **counts}))


if __name__ == "__main__":
    main()
