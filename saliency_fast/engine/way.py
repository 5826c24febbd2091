"""Way: how the points of a call go through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.hoist import Hoist
from saliency_fast.engine.memory import Ledger
from saliency_fast.engine.recipe import Recipe
from saliency_fast.errors import BudgetError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.float64 import Wider
from saliency_fast.graph.passes.half import FLOAT32, Lowered, Precision, lowered, lowered_bytes
from saliency_fast.graph.passes.invariant import Settled, settled, settled_bytes
from saliency_fast.graph.passes.scores_only import ready_bytes, scoring
from saliency_fast.graph.program import Program, Step
from saliency_fast.graph.receptive_field import Box
from saliency_fast.graph.tiling import Tiled, local_stem, tile_sizes
from saliency_fast.model.executors import (
    AutocastExecutor,
    Confined,
    EagerExecutor,
    Executor,
    InterceptedExecutor,
    OffloadedExecutor,
    RecordedExecutor,
    ScoresExecutor,
    VmapExecutor,
    WidenedExecutor,
    recurring,
)
from saliency_fast.model.function import PointFunction
from saliency_fast.rules.intercept import Rules, RulesExecutor

Model = Callable[..., Any]


TILE_SHARES = (2, 4, 8, 16, 32)
"""Shares of the budget that a tile's working set is given, one after another."""
WORTH = 0.6
"""The share of the local calls up to which a region's own forward and backward pay."""
PIECES = (2, 4, 8, 16)
"""Numbers of pieces that are tried where a point does not fit."""


def function_of(route: Executor, call: Call, kind: tuple[object, ...] = ()) -> PointFunction:
    """A route with the arguments and targets of a call."""
    dtypes = call.dtypes if call.halves else None
    route = recurring(route, call.device)
    return PointFunction(
        *(route, call.targets, call.args, call.kwargs),
        dtypes=dtypes,
        kind=kind,
        whole=call.whole,
        unused=call.unused,
        innermost=call.innermost,
    )


@dataclass(frozen=True)
class Way:
    """By a program, else call by call in lean versions, else as it is.

    precision: of the launches; see `graph/passes/half.py`.
    prefix: the program in two, where the sum of gradients is taken behind its affine beginning.
    tiled: the program with its local beginning tile by tile. offloaded: what is kept from forward
    to backward waits in the host's memory. unfolded: the program with its layers apart, for tiles.
    rules: backward rules, under which the model runs call by call. copies: of weights, and what is
    made of them alone, where they pay: not for launches that calls share, of which each would make
    its own. apart: each row goes through the model as it is alone, by `torch.func.vmap`, since rows
    would meet.
    """

    program: Program | None = None
    watched: bool = False
    prefix: Prefix | None = None
    tiled: Tiled | None = None
    offloaded: bool = False
    unfolded: Program | None = field(default=None, repr=False)
    precision: Precision = FLOAT32
    rules: Rules | None = None
    copies: bool = True
    apart: bool = False

    def function(self, model: Model, call: Call, recipe: Recipe | None = None) -> PointFunction:
        """From points at the inputs to scores and gradients there, in float32.

        recipe: of a call with many launches, whose copies of weights pay where it asks for scores.
        """
        if recipe is not None and self.program is not None and self._scores(recipe):
            route: Executor = ScoresExecutor(self.program, self._ready)
            return function_of(route, call, (*self._kind(model), "scores"))
        if self.apart:
            return self._apart(model, call)
        return function_of(self._route(model), call, (*self._kind(model), "whole"))

    def _apart(self, model: Model, call: Call) -> PointFunction:
        plain = function_of(EagerExecutor(model), call)
        owned = frozenset(key for key, one in call.further() if plain.follows(key, one))
        # Equal to no other: such launches are a call's own.
        found = function_of(VmapExecutor(Confined(model), owned), call, (object(),))
        return replace(found, lone=plain)

    def launched(
        self, model: Model, call: Call, recipe: Recipe, baselines: Inputs | None = None
    ) -> PointFunction:
        """From points as launches write them to gradients as they sum them, in its precision.

        baselines: what backward rules compare with, where they do.
        """
        if self.apart:
            return self._apart(model, call)
        if self.half is None:
            program = None if self.tiled is not None or self.rules is not None else self._launched
            if program is None:
                route = self._route(model)
            else:
                route = OffloadedExecutor(program) if self.offloaded else RecordedExecutor(program)
        elif self._lowered is None:
            route = WidenedExecutor(AutocastExecutor(model, self.half))
        else:
            program = self._lowered.program
            route = WidenedExecutor(
                OffloadedExecutor(program) if self.offloaded else RecordedExecutor(program)
            )
        lifted = self.prefix is not None and recipe.family.straight
        found = function_of(route, call, (*self._kind(model), self.precision.name))
        found = replace(found, prefix=self.prefix, lifted=lifted, precision=self.precision)
        if self.rules is None:
            return found
        references = baselines if self.rules.references else None
        return replace(found, references=references, relevance=self.rules.relevance)

    def _kind(self, model: Model) -> tuple[object, ...]:
        """Equal for copies of one way."""
        # Rules with references belong to one call's baselines.
        rules = object() if self.rules is not None and self.rules.references else self.rules
        parts = (model, self.program, self.prefix, self.tiled, rules)
        return (*map(id, parts), self.watched, self.offloaded)

    @property
    def _whole(self) -> Program | None:
        """The program of a launch, behind the prefix where there is one."""
        return self.program if self.prefix is None else self.prefix.rest

    @property
    def _launched(self) -> Program | None:
        """The same, of which what does not depend on the points has run, where copies pay."""
        return self._whole if self._settled is None else self._settled.program

    @cached_property
    def _settled(self) -> Settled | None:
        if self._whole is None or not self.settled_bytes:
            return None
        return settled(self._whole, self._made)

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _scored(self) -> Program | None:
        """The program from the inputs, with what its launches' own has made of the weights."""
        if self.program is None or self._settled is None:
            return self.program
        same = self.prefix is None
        return self._settled.program if same else settled(self.program, self._made).program

    @cached_property
    def settled_bytes(self) -> int:
        """What is made of the weights once, for the time of a call."""
        exact = self.half is None and self.tiled is None and self.copies
        return settled_bytes(self._whole) if self._whole is not None and exact else 0

    @property
    def half(self) -> torch.dtype | None:
        """The type of its products, None where that is the points'; tiles keep theirs."""
        return None if self.tiled is not None else self.precision.half

    @property
    def lowered_bytes(self) -> int:
        """What copies of the weights in a half type take, for the time of a call."""
        whole = self._whole
        return 0 if self.half is None or whole is None else lowered_bytes(whole)

    @cached_property
    def _lowered(self) -> Lowered | None:
        whole = self._whole
        return None if self.half is None or whole is None else lowered(whole, self.half)

    def _scores(self, recipe: Recipe) -> bool:
        """Whether launches are by the program, and ask for scores alone."""
        others = (self.prefix, self.tiled, self.rules)
        plain = not self.offloaded and all(one is None for one in others)
        return plain and self.copies and not recipe.gradients

    @cached_property
    def _ready(self) -> Program:
        assert self.program is not None
        return scoring(self.program)

    def ready_bytes(self, recipe: Recipe) -> int:
        """What copies of weights for launches without gradients take, for the time of a call."""
        return 0 if self.program is None or not self._scores(recipe) else ready_bytes(self.program)

    def refresh(self) -> None:
        """Makes copies of weights anew, for a way that outlives a call."""
        if self._lowered is not None:
            self._lowered.refresh()
        if self._settled is not None:
            self._settled.refresh()

    def of_now(self) -> Way:
        """The same way for one call, with copies of weights of its own."""
        return replace(self)

    def in_float64(self, wider: Wider) -> Way:
        """The same way in float64, for a program."""
        assert self.program is not None
        return Way(wider.program(self.program), prefix=wider.prefix(self.prefix))

    def exact(self) -> Way:
        """The same way in float32."""
        return replace(self, precision=FLOAT32)

    def hoist(self, call: Call, recipe: Recipe, rows: int) -> Hoist | None:
        """The prefix at work, `rows` at a time."""
        if self.prefix is None:
            return None
        return Hoist(self.prefix, call, recipe.family.straight, rows)

    def smaller(self, budget: int, device: torch.device) -> Iterator[Way]:
        """Ways that take less memory and more time, in the order in which they are to be tried."""
        if self.program is None:
            return
        if self.settled_bytes:
            yield replace(self, copies=False)
        if self.prefix is not None:
            yield replace(self, prefix=None)
        precision = self.precision
        for count in PIECES:
            yield Way(self.program.in_pieces(count), precision=precision)
        with suppress(NotLeanError, BudgetError):
            stem = local_stem(self.unfolded or self.program)
            for share in TILE_SHARES:
                tiled = Tiled(stem, tile_sizes(stem, budget // share))
                yield Way(self.program, tiled=tiled, precision=precision)
        if device.type != "cpu":
            pieces = self.program.in_pieces(PIECES[-1])
            yield Way(pieces, offloaded=True, precision=precision)

    def within(self, region: Box | None) -> Way:
        """A way that computes what a box of the input needs, where that spares anything."""
        if region is None or self.program is None:
            return self
        try:
            stem = local_stem(self.unfolded or self.program)
        except NotLeanError:
            return self
        tile = stem.size(stem.input) if self.tiled is None else self.tiled.tile
        tiled = Tiled(stem, tile, region)
        found = Way(self.program, tiled=tiled, precision=self.precision)
        return found if self.tiled or tiled.share < WORTH else self

    def noted(self, ledger: Ledger) -> Way:
        """The same way, which tells `ledger` which call is running."""

        def note(step: Step) -> None:
            ledger.label = step.name

        prefix = self.prefix
        return replace(
            self,
            program=None if self.program is None else replace(self.program, note=note),
            prefix=None
            if prefix is None
            else replace(prefix, rest=replace(prefix.rest, note=note)),
        )

    def _route(self, model: Model) -> Executor:
        if self.rules is not None:
            return RulesExecutor(model, self.rules)
        if self.tiled is not None:
            return self.tiled
        if self._scored is not None:
            return (
                OffloadedExecutor(self._scored)
                if self.offloaded
                else RecordedExecutor(self._scored)
            )
        return InterceptedExecutor(model) if self.watched else EagerExecutor(model)

    def __str__(self) -> str:
        if self.apart:
            return "off, each row alone by vmap"
        if self.rules is not None:
            return f"off, call by call under {self.rules.name} rules"
        if self.program is None:
            named = "call by call" if self.watched else "off"
            return named if self.half is None else f"off, {self.precision.name} by autocast"
        order = ", channels last" if self.program.channels_last else ""
        pieces = len(self.program.pieces) + 1
        again = f", computed again in {pieces} pieces" if pieces > 1 else ""
        if self.tiled is not None:
            sizes = " x ".join(map(str, self.tiled.tile))
            again, order = f", in tiles of {sizes}", ""
        host = ", kept in host memory" if self.offloaded else ""
        kind = "" if self.precision.exact else f", {self.precision.name}"
        if self.tiled is not None and self.precision.half is not None:
            kind = ", float32"
        return f"recorded, {len(self.program.steps)} calls{order}{again}{host}{kind}"
