"""Padding: which places of a sequence are a text's own, and positions counted among these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.errors import InputError

REAL = ("decoder_attention_mask", "attention_mask")
"""Arguments [B, T] that are true, or 1, at a text's own tokens."""
ABSENT = ("key_padding_mask", "src_key_padding_mask")
"""PyTorch's own, which are true at padding."""
DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
"""With these, the output's sequence is the decoder's and not that of the inputs."""
CURE = (
    "pass the mask, 1 at a text's own tokens and 0 at padding, as "
    "forward_kwargs={'attention_mask': ...}, or as sf.NextToken(token, position, mask=...)"
)


@dataclass(frozen=True)
class Padding:
    """What a call says of padding in its sequences.

    Attributes:
        real: bool [B, T], true at a text's own tokens; None where no text has padding.
        doubt: Why it is not known where texts end; "" where it is.
    """

    real: Tensor | None = None
    doubt: str = ""
    _places: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def to(self, device: torch.device) -> Padding:
        """The same on a device."""
        return self if self.real is None else Padding(self.real.to(device), self.doubt)

    def places(self, position: Tensor, length: int) -> Tensor:
        """Where positions stand in sequences of `length` places.

        Args:
            position: int64 [B], counted among each text's own tokens; negative from the last.
            length: T, of the output.

        Returns:
            int64 [B], from 0 to length - 1.

        Raises:
            InputError: Where a text is too short, or padding is not known and matters.
        """
        if self.real is None:
            if self.doubt and bool((position < 0).any()):
                raise InputError(f"target: {self.doubt}; {CURE}")
            found = torch.where(position < 0, position + length, position)
            counts = torch.full_like(position, length)
        else:
            self.need_length(length)
            counts = self.real.sum(1)
            wanted = torch.where(position < 0, position + counts, position)
            at = self.real & (self.real.cumsum(1) == wanted[:, None] + 1)
            found = torch.where(at.any(1), at.int().argmax(1), -1)
        outside = (found < 0) | (found >= length)
        if bool(outside.any()):
            text = int(outside.nonzero()[0])
            raise InputError(
                f"target out of range: got position {int(position[text])}, and example {text} has "
                f"{int(counts[text])} tokens"
            )
        return found

    def need_length(self, length: int) -> None:
        """Raises InputError where the output's sequences are not those that the mask is of."""
        if self.real is not None and self.real.shape[1] != length:
            raise InputError(
                f"target: the output has {length} places and the attention mask "
                f"{self.real.shape[1]}, so that it is not known where texts end in the output; "
                "pass sf.NextToken(token, position, mask=...) with a mask of the output's length"
            )


def padding_of(
    model: Callable[..., Any],
    inputs: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Padding:
    """What a call's arguments say of padding, by their names in the model's signature."""
    named = _named(model, inputs, args, kwargs)
    batch = len(inputs[0])
    decoded = any(named.get(name) is not None for name in DECODED)
    for name in REAL[:1] if decoded else REAL[1:] + ABSENT:
        mask = named.get(name)
        if isinstance(mask, Tensor):
            return _read_mask(name, mask, batch)
    for name, value in named.items():
        if not decoded and isinstance(value, Tensor) and _may_tell(name, value, batch):
            return Padding(
                doubt=f"position -1 may be padding, which the argument {name!r} may tell of"
            )
    ids = named.get("decoder_input_ids") if decoded else inputs[0]
    if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        for pad in _pad_ids(model):
            if _ends_in(ids == pad):
                return Padding(
                    doubt=f"position -1 of some examples seems to be padding (token id {pad}), and "
                    "no attention mask says where texts end"
                )
    return Padding()


def read_mask(mask: Tensor, batch: int) -> Padding:
    """Padding by a mask [B, T] that is true, or 1, at a text's own tokens.

    Raises:
        InputError: Where the mask is of another form, or a text has no token.
    """
    if mask.dim() != 2 or len(mask) not in (1, batch) or not _flags(mask):
        raise InputError(
            f"target: mask must be bool, or 0 and 1, [B, T] with B = {batch}: got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    return _read_mask("mask", mask, batch)


def _read_mask(name: str, mask: Tensor, batch: int) -> Padding:
    if mask.dim() != 2 or len(mask) not in (1, batch) or not _flags(mask):
        doubt = f"position -1 may be padding, and the {name} {list(mask.shape)} is none of [B, T]"
        return Padding(doubt=f"{doubt} with 0 and 1")
    real = mask.detach().bool().expand(batch, -1)
    real = ~real if name in ABSENT else real
    return Padding() if bool(real.all()) else Padding(real.contiguous())


def _flags(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def _may_tell(name: str, value: Tensor, batch: int) -> bool:
    """Whether an argument looks like a mask of padding, or like lengths that differ."""
    if "mask" in name.lower():
        matrix = value.dim() == 2 and len(value) == batch and _flags(value)
        return matrix and not bool((value == value.flatten()[0]).all())
    lengths = "len" in name.lower() and value.shape == (batch,) and not value.is_floating_point()
    return lengths and not bool((value == value[0]).all())


def _named(
    model: Callable[..., Any],
    inputs: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments by name: those by position have the names that the model gives them."""
    if not any(isinstance(one, Tensor) for one in args):
        return dict(kwargs)
    forward = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(forward).bind_partial(*inputs, *args)
    except (TypeError, ValueError):
        return dict(kwargs)
    own = {name: value for name, value in bound.arguments.items() if not isinstance(value, tuple)}
    given = {id(one) for one in inputs}
    return {name: value for name, value in own.items() if id(value) not in given} | dict(kwargs)


def _pad_ids(model: object) -> Iterator[int]:
    """Ids that models use for padding."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(pad, int):
        yield pad
    for layer in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            yield layer.padding_idx % layer.num_embeddings


def _ends_in(pad: Tensor) -> bool:
    """Whether rows of ids bool [B, T] begin or end in runs of padding: of several lengths, or of
    two and more tokens, since a single one may close every text.
    """
    for rows in (pad, pad.flip(1)):
        runs = rows.int().cumprod(1).sum(1)
        if int(runs.max()) > 0 and (int(runs.min()) != int(runs.max()) or int(runs.min()) > 1):
            return True
    return False
