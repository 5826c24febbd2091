"""Encoding: texts as padded token ids, with the model's further arguments and the words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from saliency_fast.errors import InputError, InputTypeError, warn
from saliency_fast.tokens.words import (
    Span,
    TokenizedText,
    Word,
    is_byte_level,
    readable_tokens,
    spell,
    words_of,
)

Text = str | tuple[str, str]
"""A text, or two for models that take pairs."""
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "position_embedding")
_UNLIMITED = 10**6
"""Tokenizers without a limit state a larger number."""
BASELINE_TOKENS = ("pad", "mask", "unk")


@dataclass(frozen=True)
class Encoded:
    """Texts as padded ids [B, T], the model's arguments, tokens, words, and two masks [B, T]."""

    ids: Tensor
    arguments: dict[str, Tensor]
    tokens: tuple[tuple[str, ...], ...]
    words: tuple[tuple[Word, ...], ...]
    real: Tensor
    special: Tensor

    @property
    def content(self) -> Tensor:
        """Which tokens are neither padding nor special, bool [B, T]."""
        return self.real & ~self.special


def encode(
    model: object, tokenizer: Any, texts: Sequence[Text], max_length: int | None, truncate: bool
) -> Encoded:
    """Encodes texts with a model's own tokenizer; raises InputError where they are too long."""
    pairs = [(one,) if isinstance(one, str) else tuple(one) for one in texts]
    if len({len(one) for one in pairs}) != 1:
        raise InputError("texts must be all single or all pairs: got both")
    encoding = _tokenized(tokenizer, pairs)
    limit = _limit(model, tokenizer) if max_length is None else max_length
    lengths = enumerate(len(ids) for ids in encoding["input_ids"])
    if limit is not None and (long := [one for one in lengths if one[1] > limit]):
        shown = ", ".join(f"text {number} has {length} tokens" for number, length in long[:5])
        if not truncate:
            raise InputError(
                f"texts are longer than the model takes: {shown}, expected at most {limit}; "
                "shorten or split them, or pass truncate=True to cut them"
            )
        warn(f"texts are cut to {limit} tokens: {shown}")
        encoding = _tokenized(tokenizer, pairs, truncation=True, max_length=limit)
    if empty := [number for number, ids in enumerate(encoding["input_ids"]) if not ids]:
        raise InputError(f"texts have no tokens: got {empty}; leave empty texts out")
    encoded = _padded(tokenizer, encoding, pairs, _device(model))
    arguments = _accepted(model, encoded) | _position_ids(model, encoded)
    return replace(encoded, arguments=arguments)


def _tokenized(tokenizer: Any, pairs: list[tuple[str, ...]], **options: Any) -> Any:
    if getattr(tokenizer, "is_fast", False):
        options["return_offsets_mapping"] = True
    columns = [list(one) for one in zip(*pairs, strict=True)]
    return tokenizer(*columns, return_special_tokens_mask=True, verbose=False, **options)


def _limit(model: object, tokenizer: Any) -> int | None:
    """The largest number of tokens that a model has positions for; None where it is unknown."""
    limits = [getattr(tokenizer, "model_max_length", None)]
    limits.append(getattr(getattr(model, "config", None), "max_position_embeddings", None))
    for table in _position_tables(model):
        # A table that keeps a row for padding counts positions from behind it.
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        limits.append(table.num_embeddings - first)
    return min((n for n in limits if isinstance(n, int) and 0 < n < _UNLIMITED), default=None)


def _position_tables(model: object) -> list[nn.Embedding]:
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    return [
        layer
        for name, layer in named
        if isinstance(layer, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]


def _parameters(model: object) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(model, "forward", model)).parameters  # type: ignore[arg-type]


def _device(model: object) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((one.device for one in parameters), torch.device("cpu"))


def _accepted(model: object, encoded: Encoded) -> dict[str, Tensor]:
    """The arguments that the model's signature accepts."""
    names = _parameters(model)
    if any(one.kind is one.VAR_KEYWORD for one in names.values()):
        return encoded.arguments
    if "attention_mask" not in names and not bool(encoded.real.all()):
        raise InputError(
            "texts of several lengths need a model that takes an attention_mask, which leaves "
            f"padding out: got {type(model).__name__}; explain them one by one"
        )
    return {name: value for name, value in encoded.arguments.items() if name in names}


def _position_ids(model: object, encoded: Encoded) -> dict[str, Tensor]:
    """Positions that skip padding on the left, where the model accepts any."""
    tables = _position_tables(model)
    # Tables that keep a row for padding belong to models that skip it themselves.
    if bool(encoded.real[:, 0].all()) or any(one.padding_idx is not None for one in tables):
        return {}
    if "position_ids" in _parameters(model):
        return {"position_ids": (encoded.real.cumsum(1) - 1).clamp_min(0)}
    if tables:
        warn(
            "texts are padded on the left, and the model counts positions from there, so that a "
            "text gets another map than alone: use tokenizer.padding_side = 'right', or one text "
            "at a time"
        )
    return {}


def _padded(
    tokenizer: Any, encoding: Any, pairs: list[tuple[str, ...]], device: torch.device
) -> Encoded:
    lengths = [len(ids) for ids in encoding["input_ids"]]
    side = getattr(tokenizer, "padding_side", "right")

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, device=device) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    rows = [_row(tokenizer, encoding, number, pair) for number, pair in enumerate(pairs)]
    words = [words_of(tokenizer, encoding, number, row) for number, row in enumerate(rows)]
    arguments = {"attention_mask": filled([[1] * n for n in lengths], 0)}
    if "token_type_ids" in encoding:
        fill = getattr(tokenizer, "pad_token_type_id", 0)
        arguments["token_type_ids"] = filled(encoding["token_type_ids"], fill)
    pad = getattr(tokenizer, "pad_token_id", None)
    return Encoded(
        filled(encoding["input_ids"], 0 if pad is None else pad),
        arguments,
        tuple(row.readable for row in rows),
        tuple(words),
        arguments["attention_mask"].bool(),
        filled([[int(one) for one in row.special] for row in rows], 0).bool(),
    )


def _row(tokenizer: Any, encoding: Any, number: int, texts: tuple[str, ...]) -> TokenizedText:
    ids = encoding["input_ids"][number]
    special_ids = set(getattr(tokenizer, "all_special_ids", ()))
    special = tuple(one in special_ids for one in ids)
    if isinstance(encoding, Mapping) and encoding.get("special_tokens_mask") is not None:
        special = tuple(map(bool, encoding["special_tokens_mask"][number]))
    tokens = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
    spans: tuple[Span | None, ...] = (None,) * len(ids)
    byte_level = is_byte_level(tokenizer)
    if "offset_mapping" in encoding:
        parts, offsets = encoding.sequence_ids(number), encoding["offset_mapping"][number]
        spans = tuple(
            None if part is None else (part, int(start), int(stop))
            for part, (start, stop) in zip(parts, offsets, strict=True)
        )
    if byte_level and not any(spans):
        text, ranges = spell(tokens, special, byte_level=True)
        texts, spans = (text,), tuple(None if one is None else (0, *one) for one in ranges)
    readable = readable_tokens(tokens, special, byte_level=byte_level)
    return TokenizedText(texts, tokens, special, spans, readable)


def baseline_id(tokenizer: Any, baseline: str | int) -> int:
    """The id of the token that stands for no information."""
    if isinstance(baseline, bool) or not isinstance(baseline, (str, int)):
        raise InputTypeError(f"baseline must be a name or a token id: got {baseline!r}")
    if isinstance(baseline, int):
        return baseline
    ids: dict[str, Any] = {n: getattr(tokenizer, f"{n}_token_id", None) for n in BASELINE_TOKENS}
    if ids.get(baseline) is None:
        names = [*(name for name, value in ids.items() if value is not None), "zero"]
        raise InputError(
            f"baseline must be {', '.join(map(repr, names))} or a token id with this tokenizer: "
            f"got {baseline!r}"
        )
    return int(ids[baseline])


def id_of(tokenizer: Any, token: str) -> int:
    """The id of a token by its text or its name in the vocabulary."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    named = ids[0] if len(ids) == 1 else tokenizer.get_vocab().get(token)
    if named is not None:
        return int(named)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    raise InputError(
        f"NextToken: {token!r} is {len(ids)} tokens, expected one: got {pieces}; pass the first of "
        "them or an id, with a space before it where a word begins"
    )
