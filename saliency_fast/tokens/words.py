"""Words: which sub-words of a tokenizer belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SPACED = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark of a word's first piece."""
_BYTES = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
"""The same of byte-level BPE."""
_ENDS, _GOES_ON = "</w>", "##"


@dataclass(frozen=True)
class Word:
    """A word as it is shown, and the places of its tokens."""

    text: str
    places: tuple[int, ...]


def words_of(tokenizer: Any, encoding: Any, number: int, row: Row) -> tuple[Word, ...]:
    """The words of one text, in order; each special token is one of its own.

    Pieces of SentencePiece and pieces without a fast tokenizer are told by their marks, and words
    of the others by `word_ids()`, which parts punctuation from them.
    """
    marked = any(token.startswith(_SPACED) for token in row.tokens)
    if not marked and getattr(encoding, "is_fast", False):
        begins = _by_ids(encoding.word_ids(number), encoding.sequence_ids(number))
    else:
        begins = _by_marks(row.tokens, _style(tokenizer, marked))
    groups: list[list[int]] = []
    for place, begin in enumerate(begins):
        before = place > 0 and row.special[place - 1]
        if begin or before or row.special[place] or not groups:
            groups.append([place])
        else:
            groups[-1].append(place)
    return tuple(Word(_text(row, places), tuple(places)) for places in groups)


@dataclass(frozen=True)
class Row:
    """A text's tokens without padding. spans: where each stands in `texts`, by (text, start, stop),
    where the tokenizer tells.
    """

    texts: tuple[str, ...]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    spans: tuple[tuple[int, int, int] | None, ...]


def _by_ids(words: Sequence[int | None], parts: Sequence[int | None]) -> list[bool]:
    keys = list(zip(parts, words, strict=True))
    return [place == 0 or keys[place - 1] != key for place, key in enumerate(keys)]


def _by_marks(tokens: Sequence[str], style: str) -> list[bool]:
    if style == _GOES_ON:
        return [not token.startswith(_GOES_ON) for token in tokens]
    if style == _ENDS:
        return [place == 0 or tokens[place - 1].endswith(_ENDS) for place in range(len(tokens))]
    return [token.startswith(style) for token in tokens]


def _style(tokenizer: Any, spaced: bool) -> str:
    """How a tokenizer marks words, by its commonest."""
    if spaced:
        return _SPACED
    vocabulary = tokenizer.get_vocab()
    if f"{_BYTES}the" in vocabulary or f"{_BYTES}a" in vocabulary:
        return _BYTES
    return _ENDS if f"the{_ENDS}" in vocabulary or f"a{_ENDS}" in vocabulary else _GOES_ON


def _text(row: Row, places: Sequence[int]) -> str:
    """The word as the text has it, or as its pieces spell it."""
    spans = [row.spans[place] for place in places]
    first, last = spans[0], spans[-1]
    if first is not None and last is not None and not row.special[places[0]]:
        written = row.texts[first[0]][first[1] : last[2]].strip()
        if written:
            return written
    return "".join(_plain(row.tokens[place]) for place in places)


def _plain(token: str) -> str:
    for mark in (_SPACED, _BYTES, _ENDS):
        token = token.replace(mark, "")
    return token.removeprefix(_GOES_ON)
