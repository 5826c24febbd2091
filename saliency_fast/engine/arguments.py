"""Further arguments: which tensors belong to the examples row by row, and which to all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_leaves
from saliency_fast.engine.bind import Call, Model
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.independence import numbers, scores_agree
from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.errors import InputError, SaliencyError, warn
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.preserve import restored_random_state, uncompiled


def assigned(model: Model, call: Call, cache: CalibrationCache, config: EngineConfig) -> Call:
    """The call with its further arguments assigned, to the examples or to all of them; raises
    InputError where that cannot be proved.

    An argument of the batch's length belongs to the examples if one of them, alone with its part,
    scores what it scores in the whole call; else it goes whole, if that gives the same score, and a
    warning says so where the model runs either way.
    """
    further = call.further()
    if call.batch == 1 or not any(isinstance(one, Tensor) for one in tree_leaves(further)):
        return call
    unmarked = {
        key: one
        for key, one in further
        if isinstance(one, Tensor) and one.shape[:1] == (call.batch,) and key not in call.marked
    }
    if call.marked and not unmarked:
        return call
    key = (call.shapes, tuple(unmarked), call.reading)
    whole = cache.arguments.get(key)
    if whole is None:
        meter = MemoryMeter()
        with restored_random_state(lambda: meter.drew, call.device), uncompiled(), meter:
            whole, alone = _proved(model, call, list(unmarked), config.arguments_tried)
        # An entry of its own, since rows that are all alike are proved again in every call.
        warned = (*key, "warned")
        if alone and cache.arguments.get(warned) != whole:
            cache.arguments[warned] = whole
            _warn_of_whole(whole, alone, call)
        # Rows that are all alike prove nothing for the next call.
        if not any(torch.equal(one, one[:1].expand_as(one)) for one in unmarked.values()):
            cache.arguments[key] = whole
    return replace(call, shared_arguments=call.shared_arguments | whole)


def _warn_of_whole(whole: frozenset[int | str], alone: str, call: Call) -> None:
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


def _proved(
    model: Model, call: Call, unmarked: list[int | str], tried: int
) -> tuple[frozenset[int | str], str]:
    """Which arguments go whole, by what an example scores alone and in the whole call; and what it
    scores alone with its rows of them, "" where that is the same or the model refuses them.
    """
    one, outcomes, differs = call.batch // 2, list[str](), ""
    example = torch.arange(call.batch, device=call.device)
    executor = EagerExecutor(model)
    points = tuple(x.clone() for x in call.inputs)
    together, scale = call.function(executor).scores_and_magnitude(points, example)
    for whole in _choices(unmarked, tried):
        function = replace(call, shared_arguments=call.shared_arguments | whole).function(executor)
        try:
            alone, several = (
                function.scores_and_magnitude(tuple(x[own] for x in call.inputs), own)[0]
                for own in (
                    example[one : one + 1],
                    example[one].expand(3 if call.batch == 2 else 2),
                )
            )
        except (SaliencyError, RuntimeError, LookupError, TypeError, ValueError) as error:
            outcomes.append(f"fails ({str(error).splitlines()[0] if str(error) else error!r})")
            continue
        # Beside itself, too: in launches no example has a number of rows of its own.
        same = (scores_agree(together[one], row, scale, function) for row in (*alone, *several))
        if all(same):
            return whole, differs
        outcomes.append(f"scores {numbers(alone[0])}")
        if len(outcomes) == 1:
            differs = (
                f"example {one} scores {numbers(together[one])} in this call, as it does alone "
                f"with all of it, and {numbers(alone[0])} alone with its own row of it"
            )
    also = f", and with all of it {outcomes[-1]}" if unmarked else ""
    raise InputError(
        f"forward_args: example {one} does not score alone what it scores in the whole call of "
        f"{call.batch} rows: there {numbers(together[one])}; alone, with its row of the further "
        f"arguments, it {outcomes[0]}{also}. Say whose a tensor is: sf.PerExample(tensor) belongs "
        "to the examples row by row, sf.Shared(tensor) to all of them, and so does what lies in "
        "lists and dictionaries; where the rows are parts of one input, such as the nodes of a "
        "graph, use rows='together'"
    )


def _choices(unmarked: list[int | str], tried: int) -> Iterator[frozenset[int | str]]:
    """Sets of arguments that go whole, in the order in which they are tried."""
    if len(unmarked) > tried:
        yield from (frozenset(), frozenset(unmarked))
        return
    for count in range(len(unmarked) + 1):
        yield from map(frozenset, itertools.combinations(unmarked, count))
