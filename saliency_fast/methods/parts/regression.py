"""Weighted linear regression of scores on coalitions, with the sampling errors of its slopes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saliency_fast.errors import InputError

FITS = ("ridge", "lasso", "linear")


class Slopes(NamedTuple):
    """values [F, N] of N regressions, and the variances of their sampling errors."""

    values: Tensor
    variance: Tensor


def fit(present: Tensor, answers: Tensor, weight: Tensor, how: str, alpha: float) -> Slopes:
    """Slopes of answers float64 [M, N] on coalitions bool [M, F], weighted [M], with an intercept.

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
    z, y = z - share @ z, answers - share @ answers
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
    table, wanted = (scale * rows).cpu().numpy(), (scale * y).cpu().numpy()
    values = torch.zeros(rows.shape[1], y.shape[1], dtype=torch.float64, device="cpu")
    variance = torch.zeros_like(values)
    for number in range(y.shape[1]):
        solved = Lasso(alpha=alpha, fit_intercept=False).fit(table, wanted[:, number])
        values[:, number] = torch.from_numpy(solved.coef_)
        # Slopes at zero are taken to stay there.
        active = values[:, number] != 0
        own = rows.cpu()[:, active]
        residual = y.cpu()[:, number : number + 1] - own @ values[active, number : number + 1]
        inverse = torch.linalg.pinv(own)
        variance[active, number] = _variance(inverse, residual, own.shape[1] + 1)[:, 0]
    return Slopes(values.to(y.device), variance.to(y.device))


def fit_shapley(present: Tensor, answers: Tensor, gain: Tensor, *, paired: bool) -> Slopes:
    """Slopes of answers float64 [M, N] on coalitions bool [M, F] that sum to `gain` [N] exactly.

    There is no intercept (Lundberg and Lee, 2017). paired: rows 2j and 2j + 1 are complements, one
    draw (Covert and Lee, 2021).
    """
    z = present.double()
    even = gain / z.shape[1]
    # Slopes are equal shares of the gain, plus slopes that sum to zero.
    rest = answers - z.sum(1, keepdim=True) * even
    rows = z - z.mean(1, keepdim=True)
    inverse = torch.linalg.pinv(rows)
    centred = inverse @ rest
    residual = rest - rows @ centred
    if paired:
        # A complement's row is the negative one, so that a pair counts by its difference.
        inverse, residual = inverse[:, ::2], residual[::2] - residual[1::2]
    variance = _variance(inverse, residual, z.shape[1] - 1)
    return Slopes(even + centred - centred.mean(0), variance)
