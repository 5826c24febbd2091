"""Substrates: what stands in the place of what is taken away from an input."""

from __future__ import annotations

from torch import Tensor

from saliency_fast.engine.baselines import NAMED, read_baselines
from saliency_fast.errors import InputError, InputTypeError

Substrate = str | float | Tensor
ZERO = "zero"


def check_substrate(substrate: object) -> None:
    """Raises unless it is a number, a tensor or one of the names."""
    names = (ZERO, *NAMED)
    if isinstance(substrate, str):
        if substrate not in names:
            raise InputError(
                f"substrate must be one of {', '.join(names)}, a number or a tensor: got "
                f"{substrate!r}"
            )
    elif isinstance(substrate, bool) or not isinstance(substrate, (int, float, Tensor)):
        raise InputTypeError(
            f"substrate must be one of {', '.join(names)}, a number or a tensor like the inputs: "
            f"got {type(substrate).__name__}"
        )


def substrate_of(
    substrate: Substrate, inputs: Tensor, seed: int = 0, *, missing: bool = False
) -> Tensor:
    """The substrate of inputs [B, *], as [B | 1, *]: "zero", "mean" (of each channel), "blur"
    (Gaussian, 5 % of each axis), "uniform" (noise within each example's range, by `seed`), a
    number, or a tensor that broadcasts to the inputs. missing: whether it may hold NaN.
    """
    given = 0.0 if isinstance(substrate, str) and substrate == ZERO else substrate
    try:
        (found,) = read_baselines(given, (inputs,), seed, missing=missing)
    except InputError as error:
        told = str(error).replace("baseline=None", "substrate='zero'")
        raise InputError(told.replace("baseline", "substrate")) from error
    return found


def named(substrate: Substrate) -> object:
    """A substrate as results state it."""
    return f"tensor {list(substrate.shape)}" if isinstance(substrate, Tensor) else substrate
