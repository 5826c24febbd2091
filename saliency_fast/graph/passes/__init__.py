"""Passes over a recorded program: each takes a program and returns an equal one.

`pipeline` lists the passes of a launch in their order, `listing` prints what each of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from saliency_fast.graph.passes.affine_prefix import behind_prefix
from saliency_fast.graph.passes.fusion import folded, with_rectifiers
from saliency_fast.graph.passes.half import in_half_type
from saliency_fast.graph.passes.invariant import with_invariants
from saliency_fast.graph.passes.scores_only import scoring
from saliency_fast.graph.program import Program


@dataclass(frozen=True)
class Pass:
    """A named function from a program to an equal one."""

    name: str
    apply: Callable[[Program], Program]


def pipeline(
    *,
    line: bool | None = None,
    channels_last: bool = False,
    segments: int = 1,
    half: torch.dtype | None = None,
    scores: bool = False,
) -> tuple[Pass, ...]:
    """The passes from a recorded program to the program of a launch, in order.

    line: whether points lie on straight lines, for the affine prefix; None leaves it out.
    scores: launches ask for scores alone.

    Example:
        >>> [one.name for one in pipeline(half=torch.bfloat16)]
        ['fold_norm', 'fuse_relu', 'half']
    """
    found = [] if line is None else [Pass("affine_prefix", lambda p: behind_prefix(p, line) or p)]
    found += [Pass("fold_norm", folded), Pass("fuse_relu", with_rectifiers)]
    if channels_last:
        found.append(Pass("channels_last", Program.with_channels_last))
    if segments > 1:
        found.append(Pass("checkpoint", lambda program: program.in_segments(segments)))
    if half is not None:
        found.append(Pass("half", lambda program: in_half_type(program, half).program))
    elif scores:
        found.append(Pass("scores_only", scoring))
    else:
        found.append(Pass("invariant", lambda program: with_invariants(program).program))
    return tuple(found)


def listing(program: Program, passes: Iterable[Pass]) -> str:
    """The program as it was recorded and after each pass, as text."""
    parts = [f"recorded\n{program}"]
    for one in passes:
        before, program = str(program), one.apply(program)
        parts.append(f"{one.name}\n{program if str(program) != before else '  (unchanged)'}")
    return "\n\n".join(parts)
