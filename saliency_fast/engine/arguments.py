"""Arguments: which of a model's further arguments belong to the examples, and which go whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from saliency_fast.engine.bind import Call
from saliency_fast.engine.independence import Known, about, near, numbers
from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import InputError, SaliencyError, warn
from saliency_fast.model.preserve import same_draws, uncompiled

MOST_TRIED = 4
"""Arguments of the batch's length of which all combinations are tried."""


def assigned(model: Model, call: Call, known: Known) -> Call:
    """The call with its further arguments assigned, to the examples or to all of them; raises
    InputError where that cannot be proved.

    An argument of the batch's length belongs to the examples if one of them, alone with its part,
    scores what it scores in the whole call; else it goes whole, if that gives the same score, and a
    warning says so where the model runs either way.
    """
    further = call.further()
    if call.batch == 1 or not any(isinstance(one, Tensor) for one in tree_leaves(further)):
        return call
    unsaid = {key: one for key, one in further if _unsaid(key, one, call)}
    if call.told and not unsaid:
        return call
    key = (call.shapes, tuple(unsaid), about(call))
    whole = known.arguments.get(key)
    if whole is None:
        meter = MemoryMeter()
        with same_draws(lambda: meter.drew, call.device), uncompiled(), meter:
            whole, alone = _proved(model, call, list(unsaid))
        # Of its own, since rows that are all alike are proved again in every call.
        told = (*key, "told")
        if alone and known.arguments.get(told) != whole:
            known.arguments[told] = whole
            _tell(whole, alone, call)
        # Rows that are all alike prove nothing for the next call.
        if not any(torch.equal(one, one[:1].expand_as(one)) for one in unsaid.values()):
            known.arguments[key] = whole
    return replace(call, whole=call.whole | whole)


def _unsaid(key: int | str, value: Any, call: Call) -> bool:
    """Whether an argument has the batch's length, and nobody has said whose it is."""
    long = isinstance(value, Tensor) and value.dim() > 0 and len(value) == call.batch
    return long and key not in call.told


def _tell(whole: frozenset[int | str], alone: str, call: Call) -> None:
    """Warns that arguments go whole whose rows might as well belong to the examples."""
    names = [
        f"forward_args[{one}]" if isinstance(one, int) else f"forward_kwargs[{one!r}]"
        for one in sorted(whole, key=str)
    ]
    several = len(names) > 1
    warn(
        f"{' and '.join(names)} {'have' if several else 'has'} a row for each of the {call.batch} "
        f"examples and {'go' if several else 'goes'} whole to every example: {alone}. "
        "sf.Shared(tensor) says that this is meant; if the rows belong to the examples, one to "
        "each, pass sf.PerExample(tensor)"
    )


def _proved(model: Model, call: Call, unsaid: list[int | str]) -> tuple[frozenset[int | str], str]:
    """Which arguments go whole, by what an example scores alone and in the whole call; and what it
    scores alone with its rows of them, "" where that is the same or the model refuses them.
    """
    one, found, differs = call.batch // 2, list[str](), ""
    item = torch.arange(call.batch, device=call.device)
    points = tuple(x.clone() for x in call.inputs)
    together, scale = Way().function(model, call).judged(points, item)
    for whole in _choices(unsaid):
        function = Way().function(model, replace(call, whole=call.whole | whole))
        try:
            alone, several = (
                function.judged(tuple(x[own] for x in call.inputs), own)[0]
                for own in (item[one : one + 1], item[one].expand(3 if call.batch == 2 else 2))
            )
        except (SaliencyError, RuntimeError, LookupError, TypeError, ValueError) as error:
            found.append(f"fails ({str(error).splitlines()[0] if str(error) else error!r})")
            continue
        # Beside itself, too: in launches no example has a number of rows of its own.
        if all(near(together[one], row, scale, function) for row in (*alone, *several)):
            return whole, differs
        found.append(f"scores {numbers(alone[0])}")
        if len(found) == 1:
            differs = (
                f"example {one} scores {numbers(together[one])} in this call, as it does alone "
                f"with all of it, and {numbers(alone[0])} alone with its own row of it"
            )
    also = f", and with all of it {found[-1]}" if unsaid else ""
    raise InputError(
        f"forward_args: example {one} does not score alone what it scores in the whole call of "
        f"{call.batch} rows: there {numbers(together[one])}; alone, with its row of the further "
        f"arguments, it {found[0]}{also}. Say whose a tensor is: sf.PerExample(tensor) belongs to "
        "the examples row by row, sf.Shared(tensor) to all of them, and so does what lies in lists "
        "and dictionaries; where the rows are parts of one input, such as the nodes of a graph, "
        "use rows='together'"
    )


def _choices(unsaid: list[int | str]) -> Iterator[frozenset[int | str]]:
    """Sets of arguments that go whole, in the order in which they are tried."""
    if len(unsaid) > MOST_TRIED:
        yield from (frozenset(), frozenset(unsaid))
        return
    for count in range(len(unsaid) + 1):
        yield from map(frozenset, itertools.combinations(unsaid, count))
