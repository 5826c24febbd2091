"""Execution strategies: how points go through the model, and the order in which they are tried.

`STRATEGIES` is the ordered table. The first that refuses neither by what is known of the model and
the call, nor by a measured point that differs from autograd, is taken; `print(plan)` shows it and
why none before it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import AffinePrefix
from saliency_fast.engine.bind import Call, Model
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.memory import Ledger
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import BudgetError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.opinfo import LEAN as CONVOLUTIONS
from saliency_fast.graph.passes.affine_prefix import Prefix, prefix_of
from saliency_fast.graph.passes.float64 import InFloat64
from saliency_fast.graph.passes.fusion import OneCall, fused, with_rectifiers
from saliency_fast.graph.passes.half import FLOAT32, Precision, half_type_bytes, in_half_type
from saliency_fast.graph.passes.invariant import invariant_bytes, with_invariants
from saliency_fast.graph.passes.scores_only import prepared_bytes, scoring
from saliency_fast.graph.program import Prepared, Program, Step
from saliency_fast.graph.receptive_field import Box
from saliency_fast.graph.tiling import Tiled, local_stem, tile_sizes
from saliency_fast.model.executors import (
    AutocastExecutor,
    EagerExecutor,
    Executor,
    InterceptedExecutor,
    OffloadedExecutor,
    RecordedExecutor,
    ScoresExecutor,
    VmapExecutor,
    WidenedExecutor,
    WithoutVmapTensors,
)
from saliency_fast.model.function import PointFunction
from saliency_fast.rules.intercept import Rules, RulesExecutor


@dataclass(frozen=True)
class Strategy:
    """How points go through the model: by a recorded program, else by intercepted calls in
    memory-efficient versions, else eagerly. Copies are made by `dataclasses.replace` alone.

    Args:
        program: The recorded program, with its checkpoint segments.
        intercepted: Whether calls are intercepted, where there is no program.
        prefix: The program in two, where gradients are summed behind its affine prefix.
        tiled: The program with its spatially local subgraph tile by tile.
        offloaded: Whether saved activations wait in the host's memory.
        unfolded: The program with its layers apart, for tiles.
        precision: Of the products in launches; see `graph/passes/half.py`.
        rules: Backward rules, under which calls are intercepted.
        copies: Whether copies of weights, and what is made of them alone, are kept for the time of
            a call: not for launches that calls share, of which each would make its own.
        row_by_row: Whether each row goes through the model alone, by `torch.func.vmap`, since rows
            would meet.
    """

    program: Program | None = None
    intercepted: bool = False
    prefix: Prefix | None = None
    tiled: Tiled | None = None
    offloaded: bool = False
    unfolded: Program | None = field(default=None, repr=False)
    precision: Precision = FLOAT32
    rules: Rules | None = None
    copies: bool = True
    row_by_row: bool = False

    def score_function(
        self, model: Model, call: Call, recipe: Recipe | None = None
    ) -> PointFunction:
        """From points at the inputs to scores and gradients there, in float32.

        recipe: of a call with many launches, whose copies of weights pay where it asks for scores.
        """
        if self.row_by_row:
            return self._row_by_row(model, call)
        if recipe is not None and self.program is not None and self._copies_for_scores(recipe):
            executor: Executor = ScoresExecutor(self.program, self._scoring)
            return call.function(executor, (*self._kind(model), "scores"))
        return call.function(self._executor(model), (*self._kind(model), "whole"))

    def gradient_function(
        self, model: Model, call: Call, recipe: Recipe, baselines: Inputs | None = None
    ) -> PointFunction:
        """From points as launches write them to gradients as they are summed, in the precision.

        baselines: what backward rules compare with, where they do.
        """
        if self.row_by_row:
            return self._row_by_row(model, call)
        if self.half is not None and self._in_half_type is not None:
            executor: Executor = WidenedExecutor(self._by(self._in_half_type.program))
        elif self.half is not None:
            executor = WidenedExecutor(AutocastExecutor(model, self.half))
        elif self._whole is None or self.tiled is not None or self.rules is not None:
            executor = self._executor(model)
        else:
            executor = self._by(self._whole if self._invariant is None else self._invariant.program)
        return call.function(
            *(executor, (*self._kind(model), self.precision.name)),
            prefix=self.prefix,
            at_prefix_end=self.prefix is not None and recipe.measured.family.straight,
            precision=self.precision,
            references=baselines if self.rules is not None and self.rules.references else None,
            relevance=self.rules is not None and self.rules.relevance,
        )

    def _row_by_row(self, model: Model, call: Call) -> PointFunction:
        plain = call.function(EagerExecutor(model))
        owned = frozenset(key for key, one in call.further() if plain.follows(key, one))
        # Equal to no other: such launches are a call's own.
        function = call.function(VmapExecutor(WithoutVmapTensors(model), owned), (object(),))
        return replace(function, single_row=plain)

    def _executor(self, model: Model) -> Executor:
        """From points at the inputs, in float32."""
        if self.rules is not None:
            return RulesExecutor(model, self.rules)
        if self.tiled is not None:
            return self.tiled
        if self.program is not None:
            return self._by(self._scored)
        return InterceptedExecutor(model) if self.intercepted else EagerExecutor(model)

    def _by(self, program: Program) -> Executor:
        return OffloadedExecutor(program) if self.offloaded else RecordedExecutor(program)

    def _kind(self, model: Model) -> tuple[object, ...]:
        """Equal for copies of one strategy."""
        # Rules with references belong to one call's baselines.
        rules = object() if self.rules is not None and self.rules.references else self.rules
        parts = (model, self.program, self.prefix, self.tiled, rules)
        return (*map(id, parts), self.intercepted, self.offloaded)

    @property
    def half(self) -> torch.dtype | None:
        """The type of its products, None where that is the points'; tiles keep theirs."""
        return None if self.tiled is not None else self.precision.half

    @property
    def _whole(self) -> Program | None:
        """The program of a launch, behind the prefix where there is one."""
        return self.program if self.prefix is None else self.prefix.rest

    @cached_property
    def _invariant(self) -> Prepared | None:
        """The program of which what does not depend on the points has run, where copies pay."""
        return (
            with_invariants(self._whole, self._made)
            if self._whole and self.invariant_bytes
            else None
        )

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _scored(self) -> Program:
        """The program from the inputs, with what its launches' own has made of the weights."""
        assert self.program is not None
        if self._invariant is None:
            return self.program
        same = self.prefix is None
        return (
            self._invariant.program if same else with_invariants(self.program, self._made).program
        )

    @cached_property
    def _in_half_type(self) -> Prepared | None:
        whole = self._whole
        return None if self.half is None or whole is None else in_half_type(whole, self.half)

    @cached_property
    def _scoring(self) -> Program:
        assert self.program is not None
        return scoring(self.program)

    def _copies_for_scores(self, recipe: Recipe) -> bool:
        """Whether launches are by the program, and ask for scores alone."""
        others = (self.prefix, self.tiled, self.rules)
        plain = not self.offloaded and all(one is None for one in others)
        return plain and self.copies and not recipe.gradients

    @cached_property
    def invariant_bytes(self) -> int:
        """Bytes of what is made of the weights once, for the time of a call."""
        exact = self.half is None and self.tiled is None and self.copies
        return invariant_bytes(self._whole) if self._whole is not None and exact else 0

    def copied_bytes(self, recipe: Recipe) -> tuple[int, int]:
        """Bytes of copies of weights for the time of a call: of launches, and of scores alone."""
        if self.program is None or self._whole is None:
            return 0, 0
        halves = 0 if self.half is None else half_type_bytes(self._whole)
        ready = prepared_bytes(self.program) if self._copies_for_scores(recipe) else 0
        return self.invariant_bytes + halves, ready

    def refresh(self) -> None:
        """Makes copies of weights anew, for a strategy that outlives a call."""
        if self._in_half_type is not None:
            self._in_half_type.refresh()
        if self._invariant is not None:
            self._invariant.refresh()

    def in_float64(self, wider: InFloat64) -> Strategy:
        """The same strategy in float64, for a program."""
        assert self.program is not None
        return Strategy(wider.program(self.program), prefix=wider.prefix(self.prefix))

    def affine_prefix(self, call: Call, recipe: Recipe, rows: int) -> AffinePrefix | None:
        """The prefix at work, `rows` at a time."""
        if self.prefix is None:
            return None
        return AffinePrefix(self.prefix, call, recipe.measured.family.straight, rows)

    def smaller(
        self, budget: int, device: torch.device, config: EngineConfig
    ) -> Iterator[Strategy]:
        """Strategies that take less memory and more time, in the order in which they are tried."""
        if self.program is None:
            return
        if self.invariant_bytes:
            yield replace(self, copies=False)
        if self.prefix is not None:
            yield replace(self, prefix=None)
        precision, counts = self.precision, config.segment_counts
        for count in counts:
            yield Strategy(self.program.in_segments(count), precision=precision)
        with suppress(NotLeanError, BudgetError):
            stem = local_stem(self.unfolded or self.program)
            for share in config.tile_shares:
                tiled = Tiled(stem, tile_sizes(stem, budget // share))
                yield Strategy(self.program, tiled=tiled, precision=precision)
        if device.type != "cpu":
            segments = self.program.in_segments(counts[-1])
            yield Strategy(segments, offloaded=True, precision=precision)

    def within(self, region: Box | None, share: float) -> Strategy:
        """A strategy that computes what a box of the input needs, where that takes up to `share`
        of the spatially local calls.
        """
        if region is None or self.program is None:
            return self
        try:
            stem = local_stem(self.unfolded or self.program)
        except NotLeanError:
            return self
        tile = stem.size(stem.input) if self.tiled is None else self.tiled.tile
        tiled = Tiled(stem, tile, region)
        if self.tiled is None and tiled.share >= share:
            return self
        return Strategy(self.program, tiled=tiled, precision=self.precision)

    def with_profiler(self, ledger: Ledger) -> Strategy:
        """The same strategy, which tells `ledger` which call is running."""

        def note(step: Step) -> None:
            ledger.enter_call(step.name)

        program, prefix = self.program, self.prefix
        if program is not None:
            program = replace(program, note=note)
        if prefix is not None:
            prefix = replace(prefix, rest=replace(prefix.rest, note=note))
        return replace(self, program=program, prefix=prefix)

    def __str__(self) -> str:
        if self.row_by_row:
            return "off, each row alone by vmap"
        if self.rules is not None:
            return f"off, call by call under {self.rules.name} rules"
        if self.program is None:
            named = "call by call" if self.intercepted else "off"
            return named if self.half is None else f"off, {self.precision.name} by autocast"
        order = ", channels last" if self.program.channels_last else ""
        segments = len(self.program.segments) + 1
        again = f", computed again in {segments} pieces" if segments > 1 else ""
        kind = "" if self.precision.exact else f", {self.precision.name}"
        if self.tiled is not None:
            sizes = " x ".join(map(str, self.tiled.tile))
            again, order = f", in tiles of {sizes}", ""
            kind = kind if self.precision.half is None else ", float32"
        host = ", kept in host memory" if self.offloaded else ""
        return f"recorded, {len(self.program.steps)} calls{order}{again}{host}{kind}"


@dataclass(frozen=True)
class Facts:
    """What strategies are refused by.

    Args:
        call, recipe: The call that is calibrated, and the sum whose points are measured.
        config: Thresholds.
        lean: Whether memory-efficient strategies are wanted.
        small: Whether a point is too small for them to pay.
        program: The model's program without what nothing needs, None where there is none.
        refusal: Why there is none.
    """

    call: Call
    recipe: WeightedSum
    config: EngineConfig
    lean: bool = True
    small: bool = False
    program: Program | None = None
    refusal: str = "the model was not recorded"

    @property
    def one_call(self) -> OneCall:
        config = self.config
        return OneCall(config.fused_relu, config.fused_residual_relu, config.fused_layer_norm)

    @property
    def bitwise(self) -> bool:
        """Whether a strategy must repeat the model's own arithmetic."""
        return not self.config.exact_dtypes.isdisjoint(self.call.dtypes)

    @cached_property
    def fused(self) -> tuple[Program, Program]:
        """The program with its layers fused, and with rectifiers alone."""
        assert self.program is not None
        return fused(self.program, self.one_call), with_rectifiers(self.program)

    @cached_property
    def channels_last(self) -> Program:
        return self.fused[0].with_channels_last()


@dataclass(frozen=True)
class Kind:
    """A line of `STRATEGIES`."""

    name: str
    recorded: bool = True
    channels_last: bool = False
    prefix: bool = False
    lean: bool = True

    def refuses(self, facts: Facts) -> str | None:
        """Why this strategy does not apply, in a user's words; None where it is to be measured."""
        if not self.lean:
            return None
        if not facts.lean:
            return "lean=False"
        if facts.small:
            return "a point is too small for it to pay"
        if not self.recorded:
            return None
        program = facts.program
        if program is None:
            return facts.refusal
        if facts.bitwise and (self.channels_last or self.prefix):
            return "float64 repeats the model's arithmetic to the last bit"
        if self.channels_last:
            steps = program.steps
            if not any(step.varying and step.func in CONVOLUTIONS for step in steps):
                return "the model has no convolutions"
            if program.aliased:
                # Views that copy must not be written through.
                return "the model writes through views"
        if self.prefix and (
            facts.call.halves or not facts.recipe.prefixed(facts.config.prefix_from)
        ):
            return "the method is no linear sum over enough points"
        return None

    def strategy(self, facts: Facts) -> Strategy | None:
        """The strategy for a call that it does not refuse; None where no prefix pays."""
        if not self.recorded:
            return Strategy(intercepted=self.lean)
        assert facts.program is not None
        if facts.bitwise:
            return Strategy(facts.program)
        program, unfolded = facts.fused
        if self.channels_last:
            program = facts.channels_last
        if not self.prefix:
            return Strategy(program, unfolded=unfolded)
        line, last = facts.recipe.family.straight, self.channels_last
        prefix = prefix_of(facts.program, channels_last=last, line=line, one_call=facts.one_call)
        return None if prefix is None else Strategy(program, prefix=prefix, unfolded=unfolded)


STRATEGIES = (
    Kind("recorded, channels last, affine prefix", channels_last=True, prefix=True),
    Kind("recorded, channels last", channels_last=True),
    Kind("recorded, affine prefix", prefix=True),
    Kind("recorded"),
    Kind("intercepted", recorded=False),
    Kind("eager", recorded=False, lean=False),
)
"""In the order in which they are tried. All are memory-efficient but for the last one. Rows that
meet, backward rules and second derivatives leave no choice, and where a point does not fit in
memory `Strategy.smaller` goes on from the one that was taken."""
