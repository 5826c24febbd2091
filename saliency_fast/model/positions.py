"""Positions: places of sequences that targets name, counted among a text's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.padding import CURE, Padding

PREDICTED = "predicted"


@dataclass(frozen=True, eq=False)
class NextToken:
    """A target: what a language model says of a token that could follow, from outputs [B, T, V].

    Attributes:
        token: "predicted", the token that is most likely at the inputs; a token id; one id per
            text; [B, K] ids for K maps of each text; or, in `explain_tokens`, the token's text.
        position: Behind which of a text's tokens it would follow, an int or one per text [B].
            Padding does not count: -1 is a text's last token, 0 its first, on whichever side
            padding is.
        mask: bool, or 0 and 1, [B, T], true at a text's own tokens. None: the model's
            attention_mask, among the further arguments of the call; none there is no padding.
    """

    token: Any = PREDICTED
    position: Any = -1
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise InputTypeError(
                f"NextToken: mask must be a tensor [B, T]: got {type(self.mask).__name__}"
            )


def token_axis(padding: Padding, shape: torch.Size, index: Any) -> int | None:
    """The axis of an example's output along which positions are counted without padding; None
    where there is none, or no text has padding.

    Raises InputError where an output may or may not be a sequence, and it matters.
    """
    if padding.real is None:
        if padding.doubt and len(shape) > 1 and backward(index):
            raise InputError(f"target: {padding.doubt}; {CURE}")
        return None
    length = padding.real.shape[1]
    axes = [axis for axis, size in enumerate(shape) if size == length]
    if len(shape) > 1 and (axes[:1] == [0] or len(axes) == 1):
        return axes[0]
    left = not bool(padding.real[:, 0].all())
    if len(shape) > 1 and (backward(index) or (left and axes)):
        padding.need_length(shape[0])
    if len(shape) == 1 and axes and (left or backward(index)):
        raise InputError(
            f"target: the output has {length} numbers per example, as many as its texts have "
            "places, which may be classes or tokens: pass a class as an int, and for the number "
            "of a token a function of the output"
        )
    return None


def own_tokens(
    padding: Padding,
    output: Tensor,
    item: Tensor,
    index: tuple[Any, ...],
    axis: int,
    *,
    whole: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """The output, and the index into it, with positions along a sequence's axis counted among
    each text's own tokens. whole: a slice is of all places, since the user has weights for them.
    """
    index, length = _whole_index(index, output.dim() - 1), output.shape[axis + 1]
    part, rows = index[axis], torch.arange(len(item), device=item.device)
    assert padding.real is not None
    if isinstance(part, int):
        position = torch.full((len(padding.real),), part, device=item.device)
        place = padding.places(position, length)[item]
        output = output.movedim(axis + 1, 1)[rows, place]
        return output, (*index[:axis], *index[axis + 1 :])
    if not whole:
        # Of a slice, what is left of each text's own tokens; the others count nothing.
        kept = torch.zeros_like(padding.real)
        for text, real in enumerate(padding.real):
            kept[text, real.nonzero()[:, 0][part]] = True
        shape = [1] * output.dim()
        shape[0], shape[axis + 1] = len(item), length
        output = torch.where(kept[item].view(shape), output, 0.0)
        index = (*index[:axis], slice(None), *index[axis + 1 :])
    return output, index


def backward(index: Any) -> bool:
    """Whether positions are counted from the end."""
    if isinstance(index, Tensor):
        return bool((index < 0).any())
    parts = [one for one in index if not isinstance(one, slice)]
    parts += [end for one in index if isinstance(one, slice) for end in (one.start, one.stop)]
    return any(isinstance(one, int) and one < 0 for one in parts)


def _whole_index(index: tuple[Any, ...], axes: int) -> tuple[Any, ...]:
    """An index with a part for each axis behind the batch."""
    if len(index) - (... in index) > axes:
        raise IndexError(f"too many indices: got {len(index)} for {axes} axes")
    rest = (slice(None),) * (axes - len(index) + (... in index))
    if ... not in index:
        return (*index, *rest)
    place = index.index(...)
    return (*index[:place], *rest, *index[place + 1 :])
