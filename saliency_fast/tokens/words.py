"""Words: tokens as readable text, and the sub-words of a tokenizer grouped into words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SPACED = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark of a space before a piece."""
_BYTE_SPACED = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
"""The same mark of byte-level BPE."""
_ENDS, _CONTINUES = "</w>", "##"
"""Marks of BPE (behind the last piece of a word) and WordPiece (before all but the first)."""
_SINGLE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's tokens of a single byte."""
_JOINER, _SELECTOR = "\N{ZERO WIDTH JOINER}", "\N{VARIATION SELECTOR-16}"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))

Span = tuple[int, int, int]
"""(text, start, stop) of a token, in characters."""


@dataclass(frozen=True)
class Word:
    """A word, its tokens' indices, and its share of each token's value (1 if empty)."""

    text: str
    indices: tuple[int, ...]
    shares: tuple[float, ...] = ()

    @property
    def tokens(self) -> list[tuple[int, float]]:
        """The index and the share of each token."""
        return list(zip(self.indices, self.shares or (1.0,) * len(self.indices), strict=True))


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens without padding, and the span of each in `texts`, where it is known."""

    texts: tuple[str, ...]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    spans: tuple[Span | None, ...]
    readable: tuple[str, ...]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letter of each byte (Radford, 2019): printable bytes stay as they are."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [one for one in range(256) if one not in kept]
    return {chr(one): one for one in kept} | {chr(256 + n): one for n, one in enumerate(others)}


_BYTES = _byte_alphabet()


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer's tokens spell bytes in letters of `_BYTES`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hasattr(tokenizer, "byte_decoder") or "ByteLevel" in str(getattr(backend, "decoder", ""))


def _bytes_of(token: str, byte_level: bool) -> bytes | None:
    """The bytes that a token spells; None where the token is its own text."""
    single = _SINGLE_BYTE.fullmatch(token)
    if single:
        return bytes([int(single[1], 16)])
    if byte_level and all(one in _BYTES for one in token):
        return bytes(_BYTES[one] for one in token)
    return None


def spell(
    tokens: Sequence[str], special: Sequence[bool], *, byte_level: bool
) -> tuple[str, list[tuple[int, int] | None]]:
    """The text of the tokens' bytes, and the range of each token that spells bytes in it."""
    characters: list[bytes] = []
    spans: list[tuple[int, int] | None] = []
    # Continuation bytes begin a character only where there is none to continue.
    open_character = False
    for token, is_special in zip(tokens, special, strict=True):
        raw = None if is_special else _bytes_of(token, byte_level)
        if raw is None:
            spans.append(None)
            open_character = False
            continue
        continues = open_character and raw != b"" and raw[0] & 0xC0 == 0x80
        start = len(characters) - int(continues)
        for byte in raw:
            if not open_character or byte & 0xC0 != 0x80:
                characters.append(b"")
            open_character = True
            characters[-1] += bytes([byte])
        spans.append((start, len(characters)))
    return "".join(one.decode(errors="replace")[:1] for one in characters), spans


def readable_tokens(
    tokens: Sequence[str], special: Sequence[bool], *, byte_level: bool
) -> tuple[str, ...]:
    """Tokens as readable text; a part of a character is that character with a number."""
    characters, spans = spell(tokens, special, byte_level=byte_level)
    holders: dict[int, list[int]] = {}
    for number, span in enumerate(spans):
        for character in range(*(span or (0, 0))):
            holders.setdefault(character, []).append(number)
    result = []
    for number, (token, span) in enumerate(zip(tokens, spans, strict=True)):
        if span is None:
            result.append(token)
            continue
        text = characters[slice(*span)]
        text = text.replace(" ", SPACED).replace("\n", "\\n").replace("\t", "\\t")
        if any(len(holders[character]) > 1 for character in range(*span)):
            parts = holders[span[1] - 1]
            text += f"[{parts.index(number) + 1}/{len(parts)}]"
        result.append(text)
    return tuple(result)


def is_word_boundary(text: str, index: int) -> bool:
    """Whether the characters around an index alone let a word begin there, as ideographs do."""
    if not 0 < index < len(text):
        return True
    before, after = text[index - 1], text[index]
    if after in (_JOINER, _SELECTOR) or before == _JOINER or ord(after) in _SKIN_TONES:
        return False
    if unicodedata.category(after).startswith("M"):
        return False
    if before in _FLAG_LETTERS and after in _FLAG_LETTERS:
        # Two letters make a flag.
        return (index - len(text[:index].rstrip(_FLAG_LETTERS))) % 2 == 0
    return _is_word(before) or _is_word(after)


def _is_word(character: str) -> bool:
    """Whether a character is a word of its own."""
    if character in (_JOINER, _SELECTOR) or ord(character) in _SKIN_TONES:
        return True
    if unicodedata.category(character) in ("So", "Sk"):
        return True
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")


def words_of(tokenizer: Any, encoding: Any, number: int, row: TokenizedText) -> tuple[Word, ...]:
    """The words of text `number`, in order; each special token is a word of its own.

    Pieces of SentencePiece and of slow tokenizers are grouped by their marks, those of other fast
    tokenizers by `word_ids()`. Parts of one character stay together; ideographs are words.
    """
    groups: list[list[int]] = []
    starts = _starts_in_text(row, _starts_of_pieces(tokenizer, encoding, number, row.tokens))
    for index, starts_word in enumerate(starts):
        if index == 0 or starts_word or row.special[index - 1] or row.special[index]:
            groups.append([])
        groups[-1].append(index)
    return tuple(word for indices in groups for word in _split(row, indices))


def _starts_of_pieces(
    tokenizer: Any, encoding: Any, number: int, tokens: Sequence[str]
) -> list[bool]:
    """Which tokens begin a word by the tokenizer's own account."""
    spaced = any(token.startswith(SPACED) for token in tokens)
    if not spaced and getattr(encoding, "is_fast", False):
        keys = list(zip(encoding.sequence_ids(number), encoding.word_ids(number), strict=True))
        return [index == 0 or keys[index - 1] != key for index, key in enumerate(keys)]
    mark = SPACED if spaced else _mark_of(tokenizer)
    if mark == _CONTINUES:
        return [not token.startswith(mark) for token in tokens]
    if mark == _ENDS:
        return [index == 0 or tokens[index - 1].endswith(mark) for index in range(len(tokens))]
    return [token.startswith(mark) for token in tokens]


def _mark_of(tokenizer: Any) -> str:
    """The mark of words of a slow tokenizer, by common words in its vocabulary."""
    if is_byte_level(tokenizer):
        return _BYTE_SPACED
    vocabulary = tokenizer.get_vocab()
    if f"{_BYTE_SPACED}the" in vocabulary or f"{_BYTE_SPACED}a" in vocabulary:
        return _BYTE_SPACED
    return _ENDS if f"the{_ENDS}" in vocabulary or f"a{_ENDS}" in vocabulary else _CONTINUES


def _starts_in_text(row: TokenizedText, starts: list[bool]) -> list[bool]:
    """Word starts corrected by the characters of the text."""
    result, part_before, end = [], 0, 0
    for span, starts_word in zip(row.spans, starts, strict=True):
        if span is None:
            result.append(starts_word)
            continue
        part, start, stop = span
        text = row.texts[part]
        start = _skip_spaces(text, start, stop)
        inside = part == part_before and start < end
        boundary = start < stop and is_word_boundary(text, start)
        result.append(not inside and (starts_word or boundary))
        part_before, end = part, max(stop, end if part == part_before else 0)
    return result


def _skip_spaces(text: str, start: int, stop: int) -> int:
    """The start without the spaces before a word, which may be part of its token."""
    return start + len(text[start:stop]) - len(text[start:stop].lstrip())


def _split(row: TokenizedText, indices: list[int]) -> list[Word]:
    """A group of tokens as one word, or as several, which share a token's value equally."""
    spans = [row.spans[index] for index in indices]
    first, last = spans[0], spans[-1]
    if first is None or last is None or row.special[indices[0]]:
        return [Word(_plain(row, indices), tuple(indices))]
    text, start, stop = row.texts[first[0]], first[1], last[2]
    start = _skip_spaces(text, start, stop)
    cuts = [one for one in range(start + 1, stop) if is_word_boundary(text, one)]
    if not cuts:
        return [Word(text[start:stop].strip() or _plain(row, indices), tuple(indices))]
    pairs = zip([start, *cuts], [*cuts, stop], strict=True)
    bounds = [(a, b) for a, b in pairs if text[a:b].strip()]
    held = []
    for span in spans:
        # The words that a token has characters of; for spaces alone, the word behind them.
        begin, end = (span or (0, 0, 0))[1:]
        within = [n for n, (a, b) in enumerate(bounds) if begin < b and a < end]
        behind = [n for n, (a, _) in enumerate(bounds) if a >= begin]
        held.append(within or (behind or [len(bounds) - 1])[:1])
    result = []
    for number, (a, b) in enumerate(bounds):
        own = [
            (index, 1.0 / len(words))
            for index, words in zip(indices, held, strict=True)
            if number in words
        ]
        if own:
            result.append(Word(text[a:b].strip(), *map(tuple, zip(*own, strict=True))))
    return result


def _plain(row: TokenizedText, indices: Sequence[int]) -> str:
    """The word as its pieces spell it, without their marks."""
    pieces = [row.readable[index] for index in indices]
    for mark in (SPACED, _BYTE_SPACED, _ENDS):
        pieces = [piece.replace(mark, "") for piece in pieces]
    return "".join(piece.removeprefix(_CONTINUES) for piece in pieces)
