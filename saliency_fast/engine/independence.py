"""Proofs that the rows of a launch do not meet inside the model, and how much hangs on ties.

The map of an example is that of the model called with this example alone, point by point. Points
share launches because most models treat the rows of a batch apart. That is proved before a launch
of several rows counts: one of its rows must score alone what it scored among the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_leaves
from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ModelError
from saliency_fast.graph.passes.half import rounding_of
from saliency_fast.graph.rows import Suspicion
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.function import PointFunction
from saliency_fast.model.preserve import restored_random_state, uncompiled
from saliency_fast.model.ties import Ties, may_tie

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Of the largest output, by which a score may differ between launches of different sizes: rounding
in kernels that PyTorch chooses by size."""
ROUGH = {"tf32": 1e-2, "float16": 2e-2, "bfloat16": 8e-2}
"""The same for precisions of products."""
LAUNCHES = 2
"""Launches of several rows that are proved before others go unproved: the first one often holds an
input and its baseline alone."""
VMAP, SINGLE = "vmap", "one row a launch"
UNRECORDED = Suspicion("the model was not recorded")
_CHANCE = random.Random()
"""A generator of its own, so that neither the model's numbers nor the user's move."""


class RowsMeetError(Exception):
    """A row scored alone something else than in its launch."""


@dataclass
class Independence:
    """What is known of the rows of a model at inputs of one shape, filled as launches run.

    Args:
        suspect: Why every launch is to be proved, not the first and some later ones alone. Until a
            recording has shown that no call mixes rows, nothing is known.
        provoke: Whether the first row is proved beside extreme rows, too.
        proved: Whether enough launches were proved.
        apart: How points are kept from meeting, once rows were seen to: by `torch.func.vmap`, or
            one row a launch.
        reason: How rows were seen to meet.
        compared: Whether examples were compared with what they score together.
        draws: Whether the model draws random numbers, which are drawn again after a proof.
        paired: Whether an example and its reference have gone through the model together, and
            scored what they score alone.
    """

    suspect: Suspicion | None = UNRECORDED
    provoke: bool = True
    proved: bool = False
    apart: str | None = None
    reason: str = ""
    compared: bool = False
    draws: bool = False
    paired: bool = False
    _launches: int = 0
    _left: int = 0
    _sizes: set[int] = field(default_factory=set)
    _tied_alike: bool = False

    @property
    def unrecorded(self) -> bool:
        """Whether nothing but its launches tells of rows, and they have not been seen to meet."""
        return self.suspect is UNRECORDED and self.apart is None

    def __post_init__(self) -> None:
        self.learn(self.suspect)

    def learn(self, suspect: Suspicion | None) -> None:
        """Adds what a later look at the model, which may have changed, lets suspect."""
        if suspect is None:
            return
        self.suspect = suspect
        if not suspect.proof and (self.apart is None or not suspect.vmap):
            self.meet(suspect.reason, vmapped=not suspect.vmap)

    def renew(self, suspect: Suspicion | None, *, draws: bool, by_function: bool) -> None:
        """A call begins. draws: whether the model draws random numbers; by_function: whether a
        function of the user's reads the scores.
        """
        self.learn(suspect)
        self.draws, self.provoke = draws, suspect is not None or by_function

    def compare_once(self) -> bool:
        """Whether examples are to be compared with what they score together: once, and where no
        launch has proved anything.
        """
        due, self.compared = not (self.proved or self.compared), True
        return due

    def pair(self, model: Callable[..., Any], call: Call, baselines: Inputs) -> str | None:
        """How an example and its reference meet in the model; None where they do not."""
        number, function = call.batch // 2, call.function(EagerExecutor(model))
        example = torch.tensor([number, number], device=call.device)
        parts = zip(call.inputs, baselines, strict=True)
        points = tuple(torch.cat([x[example[:1]], b[example[:1] % len(b)]]) for x, b in parts)
        with restored_random_state(lambda: self.draws, call.device):
            reason = meeting(function, points, example, extremes=self.suspect is not None)
        self.paired = reason is None
        return reason

    def difference(self, model: Callable[..., Any], call: Call, examples: int) -> str | None:
        """How one of the first so many examples scores together with them something else than
        alone; None where none does.
        """
        if call.batch == 1:
            return None
        function = call.function(EagerExecutor(model))
        everyone = torch.arange(min(call.batch, examples), device=call.device)

        def scored(example: Tensor) -> tuple[Tensor, float]:
            return function.scores_and_magnitude(tuple(x[example] for x in call.inputs), example)

        with restored_random_state(lambda: self.draws, call.device):
            try:
                together, scale = scored(everyone)
            except (RuntimeError, MemoryError) as error:
                # A model that takes one row at a time has no score of all to tell of.
                if isinstance(error, ModelError) or is_out_of_memory(error):
                    return None
                raise
            for number in range(len(everyone)):
                alone, _ = scored(everyone[number : number + 1])
                if scores_agree(together[number], alone[0], scale, function):
                    continue
                # A model that draws random numbers scores everything anew.
                again = scored(everyone)[0][number]
                if not scores_agree(again, together[number], scale, function):
                    return None
                return (
                    f"example {number} scores {numbers(alone[0])} alone and "
                    f"{numbers(together[number])} in a batch of {len(everyone)}"
                )
        return None

    def knows(self, rows: int) -> bool:
        """Whether launches of so many rows need no proof, but for some of them at random."""
        return self.proved and rows in self._sizes

    def due(self, rows: int, *, apart: bool) -> tuple[int, ...]:
        """The rows of a launch of so many that are to be proved; raises RowsMeetError for a launch
        that does not keep apart what was seen to meet.
        """
        if rows < 2:
            return ()
        if self.apart is not None and not apart:
            raise RowsMeetError(self.reason)
        # A model may branch on the number of its rows.
        if not (self.knows(rows) or (self.proved and apart)):
            self._launches += 1
            # Of an input and its baseline the input: at zeros many models score zero, whatever they
            # do. Where scores are saturated a row tells nothing: of a suspect several are asked.
            middle = (rows - 1) // 2
            several = (middle // 2, middle, rows - 1) if self.suspect else (middle,)
            return tuple(dict.fromkeys(several))
        if self.suspect is None or apart:
            self._left -= 1
            if self._left > 0:
                return ()
            self._left = _CHANCE.randrange(64, 256)
        return (_CHANCE.randrange(rows),)

    def prove(
        self, function: PointFunction, row: Row, *, gradients: bool = False
    ) -> Callable[[Tensor], None]:
        """Runs a row alone, before its launch, so that no memory is held beside that; returns what
        compares the launch's scores [R, K] with it, and raises RowsMeetError. gradients: whether
        the launch asks for any.
        """
        with restored_random_state(lambda: self.draws, row.example.device):
            single, scale = (function.single_row or function).scores_and_magnitude(*row.alone())
            if function.single_row is not None:
                if gradients and not self._tied_alike:
                    self._at_ties(function, function.single_row, row)
            elif self.provoke and not self.proved:
                self.provoke = provoked(function, row, single, scale)
        number = row.number

        def compare(scores: Tensor) -> None:
            if not scores_agree(scores[number], single[0], scale, function):
                raise RowsMeetError(
                    f"one scores {numbers(single[0])} alone and {numbers(scores[number])} in a "
                    f"launch of {len(scores)}"
                )
            self.note(len(scores))

        return compare

    def note(self, rows: int) -> None:
        """A launch of so many rows was proved."""
        self._sizes.add(rows)
        if not self.proved and self._launches >= LAUNCHES:
            self.proved, self._left = True, _CHANCE.randrange(2, 16)

    def _at_ties(self, function: PointFunction, single_row: PointFunction, row: Row) -> None:
        """The gradients of rows of few values, whose maxima and medians several elements reach:
        under vmap PyTorch may choose among those otherwise than without, with the same scores.
        """
        points, example = row.of_few_values()
        gradients = function.gradients(tuple(one.clone() for one in points), example)[2]
        for number in range(len(example)):
            own = slice(number, number + 1)
            alone = single_row.gradients(tuple(one[own].clone() for one in points), example[own])[2]
            for several, single in zip(tree_leaves(gradients), tree_leaves(alone), strict=True):
                a, b = several[own].detach().double(), single.detach().double()
                rough = rounding_of(function.precision, single.device)
                limit = TOLERANCE.get(single.dtype, 0.0) + ROUGH.get(rough, 0.0)
                if not bool((a - b).norm() <= limit * b.norm()) and bool(b.isfinite().all()):
                    raise RowsMeetError("torch.func.vmap gives another gradient where values tie")
        self._tied_alike = True

    def meet(self, reason: str, *, vmapped: bool = False) -> None:
        """Rows were seen to meet, or `vmapped`: not to be kept apart by vmap."""
        self.apart = SINGLE if vmapped or self.apart == SINGLE else VMAP
        self.reason, self.proved, self._launches = reason, False, 0


@dataclass(frozen=True)
class Row:
    """A row of a launch, kept before the model may write to it."""

    points: Inputs
    example: Tensor
    number: int

    @classmethod
    def of(cls, points: Inputs, example: Tensor, number: int) -> Row:
        own = slice(number, number + 1)
        return cls(tuple(one[own].clone() for one in points), example[own], number)

    def alone(self) -> tuple[Inputs, Tensor]:
        return tuple(one.clone() for one in self.points), self.example

    def of_few_values(self) -> tuple[Inputs, Tensor]:
        """The row twice, rounded to three and to five values."""
        rows = tuple(torch.cat([_rounded(one, n) for n in (1, 2)]) for one in self.points)
        return rows, self.example.expand(2)

    def among_others(self) -> tuple[Inputs, Tensor]:
        """The row as the second one of five."""
        return tuple(map(_between, self.points)), self.example.expand(5)


def _rounded(row: Tensor, levels: int) -> Tensor:
    if not row.is_floating_point():
        return row
    size = row.abs().amax().clamp_min(torch.finfo(row.dtype).tiny)
    return (row / size * levels).round() * (size / levels)


def _between(row: Tensor) -> Tensor:
    if not row.is_floating_point():
        # Token ids and the like: others of the same.
        flat = row.flatten(1)
        turned = [flat.roll(number, 1) for number in (1, 2, 3)]
        return torch.cat([flat.flip(1), flat, *turned]).view(5, *row.shape[1:])
    size = row.abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    # More large ones than small ones: the row itself must not be the median.
    large = [share * row.flip(-1) + size for share in (3, 4, 5)]
    return torch.cat([large[0], row, -2 * row - size, *large[1:]])


def provoked(function: PointFunction, row: Row, single: Tensor, scale: float) -> bool:
    """Whether a row runs between rows that are far from all others: these move a maximum, a median
    or a branch that the launch's own rows may have left where it was. single: its scores alone;
    raises RowsMeetError where it has others there.
    """
    try:
        scores, _ = function.scores_and_magnitude(*row.among_others())
    except Exception:
        # Values that the model refuses. What is suspect is proved in every launch anyway.
        return False
    if not scores_agree(scores[1], single[0], scale, function):
        raise RowsMeetError(
            f"one scores {numbers(single[0])} alone and {numbers(scores[1])} among larger ones"
        )
    return True


def meeting(
    function: PointFunction, points: Inputs, example: Tensor, *, extremes: bool
) -> str | None:
    """How one of these rows scores among the others something else than alone; None where none
    does. extremes: whether each is also tried among rows that are far from all others.
    """
    together, scale = function.scores_and_magnitude(tuple(one.clone() for one in points), example)
    for number in range(len(example)):
        row = Row.of(points, example, number)
        single, _ = function.scores_and_magnitude(*row.alone())
        if not scores_agree(together[number], single[0], scale, function):
            return f"one scores {numbers(single[0])} alone and {numbers(together[number])} there"
        try:
            if extremes:
                provoked(function, row, single, scale)
        except RowsMeetError as error:
            return str(error)
    return None


def scores_agree(one: Tensor, other: Tensor, scale: float, function: PointFunction) -> bool:
    """Whether two rows of scores are equal up to rounding; scale: of the outputs behind them."""
    dtypes = function.dtypes or ()
    limit = max([TOLERANCE.get(kind, 0.0) for kind in (other.dtype, *dtypes)])
    limit = max(limit, ROUGH.get(rounding_of(function.precision, other.device), 0.0))
    a, b = one.double(), other.double()
    room = limit * torch.clamp(torch.maximum(a.abs(), b.abs()), min=scale)
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= room)
    return bool(same.all())


def numbers(scores: Tensor) -> str:
    return ", ".join(f"{float(one):.6g}" for one in scores[:3])


@dataclass(frozen=True)
class TieReport:
    """What of a call's maps hangs on values that are equal up to rounding.

    Args:
        share: float64 [B], of the gradient at a point of each example, what passes ties; NaN where
            nobody looked.
        rounded: The largest share of ties that rounding decides.
        apart: Whether points must go through the model one by one: PyTorch's kernels round rows of
            a batch otherwise than one alone, and rounding may decide, in pools as in sorts,
            rectifiers of differences and `where`.
    """

    share: Tensor
    rounded: float = 0.0
    apart: bool = False

    @classmethod
    def of_all(cls, several: list[TieReport]) -> TieReport | None:
        """The mean over several baselines."""
        if not several:
            return None
        share = torch.stack([one.share for one in several]).mean(0)
        apart = any(one.apart for one in several)
        return cls(share, max(one.rounded for one in several), apart)


def find_ties(
    model: Callable[..., Any],
    call: Call,
    recipe: Recipe,
    baselines: Inputs,
    config: EngineConfig,
    maxima: list[bool],
    *,
    few: bool = False,
) -> TieReport | None:
    """Looks at one point of some examples by the model as it is; None for methods that are no sum
    over points and where no example is looked at. maxima: whether the model takes any, empty until
    that is known; few: not to be found out now.
    """
    if not isinstance(recipe, WeightedSum) or not recipe.gradients or recipe.rules is not None:
        return None
    exact = torch.float64 in call.dtypes
    count = recipe.count * call.batch
    one = int((not maxima and not few) or count >= config.ties_least_points)
    many = call.batch if exact else max(count // config.ties_points_per_example, one)
    share = torch.full((call.batch,), math.nan, dtype=torch.float64, device="cpu")
    if maxima == [False] and not exact:
        return TieReport(share.zero_())
    if not many:
        return None
    points_of = _examined(recipe, call, baselines, exact=exact)
    largest, apart = 0.0, False
    for example in range(call.batch):
        several = points_of(example)
        tying = [may_tie(points) for points in several]
        # On the way: by pools, sorts, rectifiers of differences, where() and whatever else chooses.
        apart |= exact and tying[0]
        if not any(tying) or maxima == [False]:
            share[example] = 0.0
        elif many > 0:
            many, share[example] = many - 1, 0.0
            for number, points in enumerate(several):
                if not tying[number]:
                    continue
                row = torch.full((1,), example, device=call.device)
                tied, rounded = _tie_shares(Ties(model), call, points, row, maxima)
                apart |= exact and rounded > 0
                if number == 0:
                    share[example], largest = tied, max(largest, rounded)
    return TieReport(share, largest, apart)


def _examined(
    recipe: WeightedSum, call: Call, baselines: Inputs, *, exact: bool
) -> Callable[[int], list[Inputs]]:
    """From an example to its points that are examined for ties."""
    if recipe.at_input:
        return lambda example: [tuple(x[example : example + 1] for x in call.inputs)]
    level, source = recipe.levels[0].to(call.device), recipe.family.bind(call.inputs, baselines)
    order = level.node.argsort()
    nodes = [int(order[level.count // 2])]
    if exact and level.count > 1 and float(level.node[order[0]]) == 0.0:
        # At the baseline all may be flat.
        nodes.append(int(order[0]))

    def points_of(example: int) -> list[Inputs]:
        row = torch.full((1,), example, device=call.device)
        return [source.write(level.rows(row, node, node + 1)) for node in nodes]

    return points_of


def _tie_shares(
    ties: Ties, call: Call, points: Inputs, example: Tensor, maxima: list[bool]
) -> tuple[float, float]:
    """The shares of the gradient at a point that pass ties, and ties that rounding decides."""
    try:
        with uncompiled():
            call.function(ties).gradients(points, example)
    except (RuntimeError, MemoryError):
        # What is not known is not told; the launches say what fails.
        return math.nan, 0.0
    maxima[:] = [ties.met]
    return ties.shares()
