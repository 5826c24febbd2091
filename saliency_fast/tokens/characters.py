"""Characters: byte-level tokens as readable text, and characters that are words of their own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SPACED = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark of a space before a piece."""
Span = tuple[int, int, int]
"""(text, start, stop) of a token, in characters."""
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's tokens of a single byte."""
_JOINER, _SELECTOR = "\N{ZERO WIDTH JOINER}", "\N{VARIATION SELECTOR-16}"
_SKINS = range(0x1F3FB, 0x1F400)
_FLAGS = range(0x1F1E6, 0x1F200)


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters for bytes (Radford, 2019): printable ones stand for themselves."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [one for one in range(256) if one not in kept]
    return {chr(one): one for one in kept} | {chr(256 + n): one for n, one in enumerate(others)}


_BYTES = _alphabet()


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer's tokens spell bytes in letters that stand for them."""
    if hasattr(tokenizer, "byte_decoder"):
        return True
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in str(getattr(backend, "decoder", ""))


def bytes_of(token: str, *, letters: bool) -> bytes | None:
    """The bytes that a token stands for; letters: of a byte-level tokenizer. None: its own text."""
    fallback = _FALLBACK.fullmatch(token)
    if fallback:
        return bytes([int(fallback[1], 16)])
    if letters and all(one in _BYTES for one in token):
        return bytes(_BYTES[one] for one in token)
    return None


@dataclass(frozen=True)
class _Spelled:
    """Tokens by their bytes: characters, and for each token which of them it has bytes of, as
    (first, behind the last); None where a token is its own text. split: whether it has but a part
    of one.
    """

    characters: str
    spans: tuple[tuple[int, int] | None, ...]
    split: tuple[bool, ...]


def _spelled(tokens: Sequence[str], special: Sequence[bool], *, letters: bool) -> _Spelled:
    characters: list[bytes] = []
    open_ends: list[tuple[int, int, int, int] | None] = []
    fresh = True
    for token, one in zip(tokens, special, strict=True):
        raw = None if one else bytes_of(token, letters=letters)
        if raw is None:
            open_ends.append(None)
            fresh = True
            continue
        first, offset, at = 0, 0, 0
        for number, byte in enumerate(raw):
            # Bytes that go on begin no character, unless there is none to go on with.
            if fresh or byte & 0xC0 != 0x80:
                characters.append(b"")
            fresh, at = False, len(characters) - 1
            if number == 0:
                first, offset = at, len(characters[at])
            characters[at] += bytes([byte])
        open_ends.append((first, offset, at, len(characters[at])))
    whole = "".join(one.decode(errors="replace")[:1] for one in characters)
    spans = tuple(None if end is None else (end[0], end[2] + 1) for end in open_ends)
    split = tuple(
        end is not None and (end[1] > 0 or end[3] < len(characters[end[2]])) for end in open_ends
    )
    return _Spelled(whole, spans, split)


def shown(tokens: Sequence[str], special: Sequence[bool], *, letters: bool) -> tuple[str, ...]:
    """Tokens as they can be read: a space before a token is marked as SentencePiece marks it, and
    a token that is part of a character is that character with which part it is.
    """
    by_bytes, found = _spelled(tokens, special, letters=letters), []
    for token, span, split in zip(tokens, by_bytes.spans, by_bytes.split, strict=True):
        if span is None:
            found.append(token)
            continue
        text = by_bytes.characters[slice(*span)]
        text = text.replace(" ", SPACED).replace("\n", "\\n").replace("\t", "\\t")
        if split:
            last = span[1] - 1
            own = [n for n, one in enumerate(by_bytes.spans) if one and one[0] <= last < one[1]]
            text += f"[{own.index(len(found)) + 1}/{len(own)}]"
        found.append(text)
    return tuple(found)


def spelled(
    tokens: Sequence[str], special: Sequence[bool]
) -> tuple[tuple[Span | None, ...], tuple[str]]:
    """Spans of byte-level tokens in the text that their bytes spell, and that text."""
    found = _spelled(tokens, special, letters=True)
    spans = tuple(None if span is None else (0, *span) for span in found.spans)
    return spans, (found.characters,)


def parted(text: str, place: int) -> bool:
    """Whether a word may begin at a place of a text for its characters alone: beside ideographs,
    emoji and other symbols, which are words without spaces between them.
    """
    if not 0 < place < len(text):
        return True
    before, after = text[place - 1], text[place]
    if after in (_JOINER, _SELECTOR) or before == _JOINER or ord(after) in _SKINS:
        return False
    if unicodedata.category(after).startswith("M"):
        return False
    if ord(before) in _FLAGS and ord(after) in _FLAGS:
        run = len(text[:place]) - len(text[:place].rstrip("".join(map(chr, _FLAGS))))
        return run % 2 == 0
    return _alone(before) or _alone(after)


def _alone(character: str) -> bool:
    """Whether a character is a word of its own."""
    if character in (_JOINER, _SELECTOR) or ord(character) in _SKINS:
        return True
    if unicodedata.category(character) in ("So", "Sk"):
        return True
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")
