"""Games of features: coalitions, Shapley values, and linear surrogates (LIME, Kernel SHAP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import is_finite
from saliency_fast.engine.features import numbered
from saliency_fast.engine.points import Seed, seeds
from saliency_fast.engine.recipe import Maps, Round, RoundContext, Rounds, RoundsRecipe
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import philox, random_bits, segment_points

PARTIAL_MAPS = 16
"""Partial maps that a call with random points yields."""
Write = Callable[[Tensor, Tensor], Inputs]
Members = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(example [R], number [R]) -> (coalitions bool [M, F] of a launch, the one of each row [R])."""


@dataclass(frozen=True)
class Game:
    """The game whose players are features. segments: each element's feature, int64 [B | 1, *]."""

    context: RoundContext
    segments: Inputs
    count: int

    @staticmethod
    def of(context: RoundContext) -> Game:
        return Game(context, *features_of(context))

    @property
    def device(self) -> torch.device:
        return self.context.scores.device

    def writer(self, members: Members) -> Write:
        """Writes the points of the coalitions that `members` gives."""

        def write(example: Tensor, number: Tensor) -> Inputs:
            present, row = members(example, number)
            parts = zip(self.context.inputs, self.context.baselines, self.segments, strict=True)
            return tuple(
                segment_points(x, baseline, segment.view(len(segment), -1), present, example, row)
                for x, baseline, segment in parts
            )

        return write

    def table(self, present: Tensor) -> Round:
        """All coalitions of a table bool [1 | B, M, F], coalitions outermost."""
        flat, count = present.flatten(0, 1), present.shape[1]
        shift = count if len(present) > 1 else 0
        write = self.writer(lambda example, number: (flat, number + shift * example))
        return Round(write, *every_row(self.context, count))

    def table_scores(self, scores: Tensor) -> Tensor:
        """The scores of `table` as [B, K, M]."""
        batch = len(self.context.inputs[0])
        return scores.view(-1, batch, scores.shape[1]).permute(1, 2, 0)

    def random_words(self, seed: Seed, draws: Tensor, count: int, stream: int) -> Tensor:
        """Random words int64 [1 | B, N, count] of the draws int64 [N]."""
        own = own_seeds(seed, self.context)
        rows = own.repeat_interleave(len(draws)), draws.repeat(len(own))
        words: Tensor = random_bits(*rows, count, 0, stream)
        return words.view(len(own), len(draws), count)

    def elements(self) -> Tensor:
        """How many elements each feature has: float64 [B | 1, F]."""
        rows = max(len(one) for one in self.segments)
        counts = torch.zeros(rows, self.count, dtype=torch.float64, device=self.device)
        for one in self.segments:
            own = one.view(len(one), -1).expand(rows, -1)
            counts.scatter_add_(1, own, torch.ones_like(own, dtype=torch.float64))
        return counts

    def maps(self, values: Tensor, variance: Tensor | None, *, sums: bool) -> Maps:
        """Maps in which every element has the value [B, K, F] of its feature. variance [B, K, F]:
        of the values' sampling errors, for the map's error; sums: whether values add up to the
        gain. The values are an extra result where the call has features.
        """
        error = None
        if variance is not None:
            weight = self.elements()[:, None]
            norm = (weight * values.square()).sum(2).clamp_min(torch.finfo(torch.float64).tiny)
            error = ((weight * variance).sum(2) / norm).sqrt()
        batch, targets, _ = values.shape
        maps = []
        for x, segment in zip(self.context.inputs, self.segments, strict=True):
            own = segment.view(len(segment), 1, -1).expand(batch, targets, -1)
            # Scores of inputs that are whole numbers keep all their digits.
            dtype = x.dtype if x.is_floating_point() else torch.float64
            maps.append(values.gather(2, own).to(dtype).view(batch, targets, *x.shape[1:]))
        extras = {"features": values} if self.context.features else {}
        return Maps(tuple(maps), error, values.sum(2) if sums else None, extras)


def features_of(context: RoundContext) -> tuple[Inputs, int]:
    """The feature of each element, int64 [B | 1, *] per input, and how many features there are."""
    segments = context.features or numbered(None, context.inputs)
    return segments, feature_count(context.inputs, segments)


def feature_count(inputs: Inputs, features: Inputs, layouts: Layouts | None = None) -> int:
    if not features:
        return sum(x[:1].numel() for x in inputs)
    return 1 + max(int(one.max()) for one in features)


def own_seeds(seed: Seed, context: RoundContext) -> Tensor:
    """int64 [1] where examples share their draws, or [B]."""
    every = seeds(seed, context.inputs[0])
    return every[:1] if isinstance(seed, int) else every


# Shapley values.


MOST = 20
"""Most features of which all coalitions are evaluated: a million points."""


@dataclass(frozen=True)
class ShapleyValues:
    """Exact Shapley values from all 2^F coalitions of at most 20 features (Shapley, 1953).

    `features=` of the call says what a feature is. Values sum to the gain over the baseline.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.ShapleyValues()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1] + x[:, 2], x, method=method).values
        tensor([[1., 1., 3.]])
    """

    name = "shapley_values"

    def recipe(self) -> RoundsRecipe:
        return RoundsRecipe(
            exact_rounds, _coalitions, baseline="one", gradients=False, features=True
        )


@dataclass(frozen=True)
class ShapleySampling:
    """Shapley values by random orders of the features (Castro, 2009).

    `features=` of the call says what a feature is. Values sum to the gain over the baseline.

    Args:
        permutations: Orders of F - 1 points each; where all 2^F coalitions are no more points,
            these are evaluated instead, and values are exact.
        antithetic: Whether every order comes with its reverse, which lowers the error for the same
            number of points (Mitchell, 2022).
        seed: An int, or one for each example.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.ShapleySampling()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1] + x[:, 2], x, method=method).values
        tensor([[1., 1., 3.]])
    """

    permutations: int = 25
    antithetic: bool = True
    seed: Seed = 0
    name = "shapley_sampling"

    def __post_init__(self) -> None:
        checks.fields(self, permutations=1, antithetic=checks.boolean, seed=checks.seed)

    def recipe(self) -> RoundsRecipe:
        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            count = feature_count(inputs, features)
            return min((1 << count) - 2, self.permutations * (count - 1))

        return RoundsRecipe(self._rounds, points, baseline="one", gradients=False, features=True)

    def _rounds(self, context: RoundContext) -> Rounds:
        game = Game.of(context)
        if 2**game.count - 2 <= self.permutations * (game.count - 1):
            return (yield from exact_rounds(context))

        def ranks(start: int, stop: int) -> Tensor:
            """Random orders; every other antithetic one is the reverse of the one before."""
            number = torch.arange(start, stop, device=game.device)
            drawn = number // 2 if self.antithetic else number
            words = game.random_words(self.seed, drawn, game.count, philox.ORDER)
            # The rank of random words is as random as an order by them.
            rank = words.argsort(dim=2, stable=True).argsort(dim=2)
            if self.antithetic:
                rank = torch.where((number % 2 == 1)[:, None], game.count - 1 - rank, rank)
            return rank

        together = 2 if self.antithetic else 1
        return (yield from permutation_rounds(game, self.permutations, ranks, together))


def _coalitions(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
    """How many coalitions there are between none and all."""
    count = feature_count(inputs, features)
    if count > MOST:
        raise InputError(
            f"exact Shapley values take 2^F points: got {count} features, expected at most "
            f"{MOST}; use ShapleySampling or KernelShap, or fewer features"
        )
    return (1 << count) - 2


def exact_rounds(context: RoundContext) -> Rounds:
    """All coalitions; the scores of the empty and of the full one are in the context."""
    game = Game.of(context)
    number = torch.arange(2**game.count, device=game.device)
    present = ((number[:, None] >> torch.arange(game.count, device=game.device)) & 1).bool()
    between = context.scores.new_zeros((*context.scores.shape, 0))
    if game.count > 1:
        result = yield game.table(present[None, 1:-1])
        between = game.table_scores(result.scores)
    worth = _with_ends(game, between)
    # A coalition of s features counts for each feature it has, and against each one it lacks.
    sizes = torch.arange(game.count + 1, dtype=torch.float64, device=game.device)
    equal = [comb(game.count, size) for size in range(game.count + 1)]
    number_of_size = torch.tensor(equal, device="cpu").to(sizes)
    gain = 1.0 / (sizes * number_of_size)
    loss = 1.0 / ((game.count - sizes) * number_of_size)
    gain[0] = loss[-1] = 0.0
    size = present.sum(1)
    both, against = worth * (gain + loss)[size], (worth * loss[size]).sum(2)
    values = [both[..., own].sum(2) - against for own in present.T]
    return game.maps(torch.stack(values, dim=2), None, sums=True)


def permutation_rounds(
    game: Game, orders: int, ranks: Callable[[int, int], Tensor], together: int
) -> Rounds:
    """Mean gains along orders of the features. ranks(start, stop): int64 [1 | B, stop - start, F],
    the position of every feature in these orders. together: orders that are one draw. With one draw
    alone the error is unknown.
    """
    total = game.context.scores.new_zeros((*game.context.scores.shape, game.count))
    mean, square, draws = total.clone(), total.clone(), 0
    step = together * -(-orders // (PARTIAL_MAPS * together))
    for start in range(0, orders, step):
        stop = min(start + step, orders)
        own = ranks(start, stop)
        result = yield _walk(game, own)
        # The gain of each feature in each order, [B, K, P, F].
        of_all = own[:, None].expand(*total.shape[:2], -1, -1)
        scores = game.table_scores(result.scores).reshape(*of_all.shape[:3], game.count - 1)
        gains = _with_ends(game, scores).diff(dim=3).gather(3, of_all)
        total += gains.sum(2)
        for one in torch.split(gains, together, dim=2):
            # Welford's mean and sum of squared deviations (1962), draw by draw.
            draws, change = draws + 1, one.mean(2) - mean
            mean += change / draws
            square += change * (one.mean(2) - mean)
        variance = square / (draws * (draws - 1)) if draws > 1 else square * torch.nan
        maps = game.maps(total / stop, variance, sums=True)
        if stop < orders:
            yield maps
    return maps


def _walk(game: Game, ranks: Tensor) -> Round:
    """The coalitions along orders int64 [1 | B, P, F], between none and all."""
    steps = game.count - 1
    flat, shift = ranks.flatten(0, 1), ranks.shape[1] if len(ranks) > 1 else 0

    def members(example: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        present = flat[number // steps + shift * example] <= (number % steps)[:, None]
        return present, torch.arange(len(number), device=number.device)

    return Round(game.writer(members), *every_row(game.context, ranks.shape[1] * steps))


def _with_ends(game: Game, scores: Tensor) -> Tensor:
    """Scores [B, K, *, M] with the empty coalition's before and the full one's behind them."""
    context, shape = game.context, (*scores.shape[:-1], 1)
    assert context.baseline_scores is not None
    begin, end = (
        one.view(*one.shape, *(1,) * (len(shape) - 2)).expand(shape)
        for one in (context.baseline_scores, context.scores)
    )
    return torch.cat((begin, scores, end), dim=-1)


# Linear surrogates.


Draw = Callable[[Game], Tensor]
"""A table of coalitions bool [1 | B, M, F] for the features of a call."""
Weigh = Callable[[Game, Tensor], Tensor]
"""The weights float64 [1 | B, M] of such a table."""
FITS = ("ridge", "lasso", "linear")


@dataclass(frozen=True)
class Lime:
    """Slopes of a linear model of the score on which features are present (Ribeiro, 2016).

    `features=` of the call says what a feature is. A coalition at distance d from the whole example
    has the weight exp(-d^2 / (2 kernel_width^2)).

    Args:
        samples: Random coalitions; each feature is present with a chance of one half.
        kernel_width: Width of the weights, in units of the distance.
        distance: "features", the cosine distance of the features that are present, or "cosine" or
            "euclidean" of the points themselves.
        fit: "ridge", "lasso" (needs scikit-learn) or "linear".
        alpha: Penalty of "ridge" and "lasso".
        seed: An int, or one for each example.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.Lime(samples=50, fit="linear")
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values.round(decimals=3)
        tensor([[1., 2., 3.]])
    """

    samples: int = 1000
    kernel_width: float = 0.25
    distance: str = "features"
    fit: str = "ridge"
    alpha: float = 1.0
    seed: Seed = 0
    name = "lime"

    def __post_init__(self) -> None:
        checks.fields(self, samples=2, distance=tuple(DISTANCES), fit=FITS, seed=checks.seed)
        checks.fields(self, kernel_width=checks.positive, alpha=checks.positive)

    def recipe(self) -> RoundsRecipe:
        def draw(game: Game) -> Tensor:
            number = torch.arange(self.samples, device=game.device)
            return game.random_words(self.seed, number, game.count, philox.COALITION) >= 2**31

        def weigh(game: Game, present: Tensor) -> Tensor:
            d = distances(game, present, self.distance)
            return torch.exp(-d.square() / (2.0 * self.kernel_width**2))

        def rounds(context: RoundContext) -> Rounds:
            return surrogate_rounds(context, draw, weigh, self.fit, self.alpha)

        return RoundsRecipe(rounds, self.samples, baseline="fill", gradients=False, features=True)


@dataclass(frozen=True)
class KernelShap:
    """Shapley values by weighted regression on random coalitions (Lundberg and Lee, 2017).

    `features=` of the call says what a feature is. Values sum to the gain over the baseline.

    Args:
        samples: Coalitions; where there are no more in all, each is evaluated once, and values are
            exact.
        paired: Whether every coalition comes with its complement, which lowers the error for the
            same number of points (Covert and Lee, 2021).
        seed: An int, or one for each example.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.KernelShap()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1] + x[:, 2], x, method=method).values
        tensor([[1., 1., 3.]])
    """

    samples: int = 2048
    paired: bool = True
    seed: Seed = 0
    name = "kernel_shap"

    def __post_init__(self) -> None:
        checks.fields(self, paired=checks.boolean, samples=2, seed=checks.seed)

    def recipe(self) -> RoundsRecipe:
        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return min((1 << feature_count(inputs, features)) - 2, self.samples)

        return RoundsRecipe(self._rounds, points, baseline="one", gradients=False, features=True)

    def _rounds(self, context: RoundContext) -> Rounds:
        game = Game.of(context)
        if 2**game.count <= self.samples + 2:
            return (yield from exact_rounds(context))
        if self.samples <= game.count:
            raise InputError(
                f"kernel_shap needs more samples than features: got {self.samples} for "
                f"{game.count}; group elements with features=, such as 'grid:8' or 'slic', or "
                "raise samples"
            )
        present = self._coalitions(game)
        result = yield game.table(present)
        assert context.baseline_scores is not None
        scores = game.table_scores(result.scores) - context.baseline_scores[..., None]
        gains = (context.scores - context.baseline_scores).reshape(len(present), -1)

        def solve(number: int, y: Tensor) -> Slopes:
            return fit_shapley(present[number], y, gains[number], paired=self.paired)

        return game.maps(*_per_table(present, scores, solve), sums=True)

    def _coalitions(self, game: Game) -> Tensor:
        """Coalitions bool [1 | B, M, F] of s features, by the Shapley kernel of all of that size.
        The chance of s is proportional to 1 / (s (F - s)). Every other paired one is the complement
        of the one before, and an odd sample is left out.
        """
        size = torch.arange(1, game.count, dtype=torch.float64, device=game.device)
        chance = 1.0 / (size * (game.count - size))
        bounds = chance.cumsum(0) / chance.sum()
        draws = torch.arange(self.samples // (2 if self.paired else 1), device=game.device)
        words = game.random_words(self.seed, draws, game.count + 1, philox.COALITION)
        share = ((words[..., 0] >> 8).double() + 0.5) * 2.0**-24
        drawn = torch.searchsorted(bounds, share.contiguous()) + 1
        rank = words[..., 1:].argsort(dim=-1, stable=True).argsort(dim=-1)
        present = rank < drawn[..., None]
        return torch.stack((present, ~present), dim=2).flatten(1, 2) if self.paired else present


def surrogate_rounds(
    context: RoundContext, draw: Draw, weigh: Weigh, how: str, alpha: float
) -> Rounds:
    """Slopes of the score on drawn coalitions with their weights."""
    game = Game.of(context)
    present = draw(game)
    weight = weigh(game, present)
    result = yield game.table(present)
    table = present.expand(max(len(present), len(weight)), -1, -1)

    def solve(number: int, y: Tensor) -> Slopes:
        return fit(table[number], y, weight[number], how, alpha)

    return game.maps(*_per_table(table, game.table_scores(result.scores), solve), sums=False)


def _per_table(
    present: Tensor, scores: Tensor, solve: Callable[[int, Tensor], Slopes]
) -> tuple[Tensor, Tensor]:
    """Slopes and variances [B, K, F] from scores [B, K, M], all examples of a table at once."""
    batch, targets, count = scores.shape
    groups = scores.reshape(len(present), -1, count)
    slopes = [solve(number, y.T) for number, y in enumerate(groups)]
    values, variance = (torch.cat([one.T for one in each]) for each in zip(*slopes, strict=True))
    return values.view(batch, targets, -1), variance.view(batch, targets, -1)


def _cosine(game: Game, present: Tensor) -> Tensor:
    """Cosine distance of points from their examples, float64 [B, M]."""
    z = present.double()
    kept = _sums(game, z, lambda x, fill: x * x)
    both = kept + _sums(game, 1 - z, lambda x, fill: x * fill)
    point = kept + _sums(game, 1 - z, lambda x, fill: fill * fill)
    whole = _sums(game, torch.ones_like(z), lambda x, fill: x * x)
    return 1.0 - both / (point.sqrt() * whole.sqrt()).clamp_min(1e-8)


def _sums(game: Game, share: Tensor, each: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sums over elements of each(x, baseline) times the feature's share [1 | B, M, F]: [B, M]."""
    context, batch = game.context, len(game.context.inputs[0])
    total = share.new_zeros(batch, game.count)
    for x, fill, segment in zip(context.inputs, context.baselines, game.segments, strict=True):
        amount = each(x.double(), fill.double()).expand_as(x).reshape(batch, -1)
        total.scatter_add_(1, segment.view(len(segment), -1).expand(batch, -1), amount)
    return (share @ total[:, :, None])[..., 0]


DISTANCES: dict[str, Callable[[Game, Tensor], Tensor]] = {
    # Of the present features from all.
    "features": lambda game, present: 1.0 - (present.double().sum(2) / game.count).sqrt(),
    "cosine": _cosine,
    "euclidean": lambda game, present: _sums(
        game, 1.0 - present.double(), lambda x, fill: (x - fill).square()
    ).sqrt(),
}


def distances(game: Game, present: Tensor, kind: str) -> Tensor:
    """Distances of coalitions from the whole example, float64 [1 | B, M]."""
    each = DISTANCES[kind](game, present)
    if not is_finite(each):
        raise InputError(
            f"distance={kind!r} is undefined for inputs or baselines that hold NaN or infinity; "
            "use distance='features'"
        )
    return each


# --- Regression -------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """values [F, N] of N regressions, and the variances of their sampling errors."""

    values: Tensor
    variance: Tensor


def fit(present: Tensor, scores: Tensor, weight: Tensor, how: str, alpha: float) -> Slopes:
    """Slopes of scores float64 [M, N] on coalitions bool [M, F], weighted [M], with an intercept.
    how: "ridge" and "lasso" penalise the slopes by `alpha`, "linear" does not, and has the solution
    of the least norm. Variances are those of heteroscedastic residuals (White, 1980), NaN where
    there are not more coalitions than features.
    """
    z, total = present.double(), weight.sum()
    if not total > 0:
        raise InputError(
            "the weights of all coalitions are zero to rounding: their distances are many times "
            "the kernel's width; pass a larger kernel_width, or distance='cosine'"
        )
    share = weight / total
    # The intercept is the weighted mean.
    z, y = z - share @ z, scores - share @ scores
    root = weight.sqrt()[:, None]
    rows, y = root * z, root * y
    if how == "lasso":
        return _lasso(rows, y, weight, alpha)
    if how == "ridge":
        gram = rows.T @ rows + alpha * torch.eye(rows.shape[1], dtype=rows.dtype, device=z.device)
        inverse = torch.linalg.solve(gram, rows.T)
    else:
        inverse = torch.linalg.pinv(rows)
    values = inverse @ y
    return Slopes(values, _variance(inverse, y - rows @ values, rows.shape[1] + 1))


def _variance(inverse: Tensor, residual: Tensor, fitted: int) -> Tensor:
    """Of slopes inverse @ y, from the residuals [M, N] of so many fitted numbers."""
    count, free = len(residual), len(residual) - fitted
    return inverse.square() @ residual.square() * (count / free if free > 0 else torch.nan)


def _lasso(rows: Tensor, y: Tensor, weight: Tensor, alpha: float) -> Slopes:
    """By scikit-learn: mean squares, weighted to a mean weight of one, and alpha * |slopes|."""
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise InputError(
            "fit='lasso' needs scikit-learn, which is not installed: use pip install "
            "'saliency-fast[surrogates]', or fit='ridge'"
        ) from error
    scale = (len(weight) / weight.sum()).sqrt()
    table, target = (scale * rows).cpu().numpy(), (scale * y).cpu().numpy()
    values = torch.zeros(rows.shape[1], y.shape[1], dtype=torch.float64, device="cpu")
    variance = torch.zeros_like(values)
    for number in range(y.shape[1]):
        solved = Lasso(alpha=alpha, fit_intercept=False).fit(table, target[:, number])
        values[:, number] = torch.from_numpy(solved.coef_)
        # Slopes at zero are assumed to stay there.
        active = values[:, number] != 0
        own = rows.cpu()[:, active]
        residual = y.cpu()[:, number : number + 1] - own @ values[active, number : number + 1]
        inverse = torch.linalg.pinv(own)
        variance[active, number] = _variance(inverse, residual, own.shape[1] + 1)[:, 0]
    return Slopes(values.to(y.device), variance.to(y.device))


def fit_shapley(present: Tensor, scores: Tensor, gain: Tensor, *, paired: bool) -> Slopes:
    """Slopes of scores float64 [M, N] on coalitions bool [M, F] that sum to `gain` [N] exactly.
    There is no intercept (Lundberg and Lee, 2017). paired: rows 2j and 2j + 1 are complements, one
    draw (Covert and Lee, 2021).
    """
    z = present.double()
    even = gain / z.shape[1]
    # Slopes are equal shares of the gain, plus slopes that sum to zero.
    rest = scores - z.sum(1, keepdim=True) * even
    rows = z - z.mean(1, keepdim=True)
    inverse = torch.linalg.pinv(rows)
    centred = inverse @ rest
    residual = rest - rows @ centred
    if paired:
        # A complement's row is the negative one, so that a pair counts by its difference.
        inverse, residual = inverse[:, ::2], residual[::2] - residual[1::2]
    variance = _variance(inverse, residual, z.shape[1] - 1)
    return Slopes(even + centred - centred.mean(0), variance)
