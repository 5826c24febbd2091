"""Calls the CUDA C++ launchers of emulated libraries (build.py) and compares with the references.

    python -m tests.kernels.emulated.checks [--seed S] [--further-every N] LIBRARY...

Prints a line of JSON for each library, which is loaded in a process of its own: what it does wrong
may end the process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import traceback
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from saliency_fast.ops import Sample, dispatch
from tests.kernels.emulated.further_cases import Case, further, racing
from tests.ops.checking import TOLERANCES, assert_close, every_sample, mutated, poisoned

MOST_FAILURES = 3


def samples() -> list[Case]:
    """Every sample of every op that has a CUDA C++ version."""
    found = [Case(*parameter.values) for parameter in every_sample()]
    return [Case(case.op, case.args.args) for case in found if case.op.cuda]


def results(case: Case, backend: str) -> list[Tensor]:
    """The outputs, then the arguments that were changed."""
    args = case.placed()
    out = case.op.launcher(backend)(*args)
    returned = [out] if isinstance(out, Tensor) else list(out)
    return returned + [args[i] for i in mutated(case.op)]


def check(case: Case, want: list[Tensor]) -> None:
    with poisoned():
        got = results(case, "cuda")
    inputs = [one for one in case.args if isinstance(one, Tensor) and one.is_floating_point()]
    for a, b, tolerance in zip(got, want, TOLERANCES[case.op.name], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape} {a.dtype}, not {b.shape}"
        assert_close(a, b, tolerance, case.op.name, inputs)


def use(library: Path, seed: int) -> None:
    """Makes the launchers of this process those of `library`, which take tensors of the CPU."""
    ctypes.CDLL(str(library)).emulator_seed(ctypes.c_uint64(seed))
    dispatch.CUDA_LIBRARY = library
    torch.cuda.device = lambda _: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)


def run(library: Path, seed: int, cases: list[tuple[Case, list[Tensor]]]) -> dict:
    """How many cases of each op were checked, up to some failures, and these."""
    use(library, seed)
    checked: Counter[str] = Counter()
    failures = []
    for case, want in cases:
        checked[case.op.name] += 1
        try:
            check(case, want)
        except Exception:
            note = f"{case.op.name}({Sample(case.args).note}), shifted by {case.shift}"
            failures.append(f"{note}\n{traceback.format_exc()}")
        if len(failures) == MOST_FAILURES:
            break
    return {"checked": checked, "failures": failures}


def in_a_child(library: Path, *arguments) -> dict:
    """`run` in a fork, which shares the cases; `ended` is its status where it did not end well."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(run(library, *arguments), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return {**(json.loads(text) if text else {"checked": {}, "failures": []}), "ended": status}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of random orders; 0: none")
    parser.add_argument("--samples-every", type=int, default=1, help="every Nth sample alone")
    parser.add_argument("--further-every", type=int, default=0, help="0: no further cases")
    parser.add_argument("--racing", action="store_true", help="and those that race most easily")
    parser.add_argument("--ops", default="", help="these alone, with commas between them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = samples()[:: options.samples_every]
    if options.further_every:
        cases += islice(further(), 0, None, options.further_every)
    cases += racing() if options.racing else []
    ops = options.ops.split(",") if options.ops else [case.op.name for case in cases]
    pairs = [(case, results(case, "reference")) for case in cases if case.op.name in ops]
    for library in options.libraries:
        print(json.dumps(in_a_child(library.resolve(), options.seed, pairs)), flush=True)


if __name__ == "__main__":
    main()
