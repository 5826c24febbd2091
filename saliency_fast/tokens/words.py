"""Words: which sub-words of a tokenizer belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saliency_fast.tokens.characters import SPACED as _SPACED
from saliency_fast.tokens.characters import Span, is_byte_level, parted

_BYTES = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
"""The same of byte-level BPE."""
_ENDS, _GOES_ON = "</w>", "##"


@dataclass(frozen=True)
class Word:
    """A word as it is shown, and the places of its tokens; shares: of each token's value, 1 unless
    the token has characters of several words.
    """

    text: str
    places: tuple[int, ...]
    shares: tuple[float, ...] = ()

    @property
    def tokens(self) -> list[tuple[int, float]]:
        """The place and the share of each token."""
        return list(zip(self.places, self.shares or (1.0,) * len(self.places), strict=True))


def words_of(tokenizer: Any, encoding: Any, number: int, row: Row) -> tuple[Word, ...]:
    """The words of one text, in order; each special token is one of its own.

    Pieces of SentencePiece and pieces without a fast tokenizer are told by their marks, and words
    of the others by `word_ids()`, which parts punctuation from them. Tokens that are parts of one
    character stay together, and ideographs and emoji are words of their own.
    """
    marked = any(token.startswith(_SPACED) for token in row.tokens)
    if not marked and getattr(encoding, "is_fast", False):
        begins = _by_ids(encoding.word_ids(number), encoding.sequence_ids(number))
    else:
        begins = _by_marks(row.tokens, _style(tokenizer, marked))
    begins = _by_characters(row, begins)
    groups: list[list[int]] = []
    for place, begin in enumerate(begins):
        before = place > 0 and row.special[place - 1]
        if begin or before or row.special[place] or not groups:
            groups.append([place])
        else:
            groups[-1].append(place)
    return tuple(word for places in groups for word in _apart(row, places))


def _apart(row: Row, places: list[int]) -> list[Word]:
    """A group of tokens as one word, or as several that their characters part: ideographs that
    tokens hold together. A token's value is shared equally among the words that it belongs to.
    """
    whole = Word(_text(row, places), tuple(places))
    spans = [row.spans[place] for place in places]
    first, last = spans[0], spans[-1]
    if first is None or last is None or row.special[places[0]]:
        return [whole]
    text, start, stop = row.texts[first[0]], first[1], last[2]
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    cuts = [one for one in range(start + 1, stop) if parted(text, one)]
    if not cuts:
        return [whole]
    pairs = zip([start, *cuts], [*cuts, stop], strict=True)
    bounds = [(a, b) for a, b in pairs if text[a:b].strip()]
    held = [_held(bounds, span) for span in spans]
    found = []
    for number, (a, b) in enumerate(bounds):
        own = [(p, 1.0 / len(one)) for p, one in zip(places, held, strict=True) if number in one]
        if own:
            found.append(Word(text[a:b].strip(), *map(tuple, zip(*own, strict=True))))
    return found


def _held(bounds: list[tuple[int, int]], span: Span | None) -> list[int]:
    """The words that a token has characters of; of one that is a space, the word behind it."""
    start, stop = (span or (0, 0, 0))[1:]
    within = [n for n, (a, b) in enumerate(bounds) if start < b and a < stop]
    behind = [n for n, (a, _) in enumerate(bounds) if a >= start]
    return within or (behind or [len(bounds) - 1])[:1]


@dataclass(frozen=True)
class Row:
    """A text's tokens without padding. spans: where each stands in `texts`, by (text, start, stop),
    where the tokenizer tells. shown: the tokens as they can be read.
    """

    texts: tuple[str, ...]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    spans: tuple[Span | None, ...]
    shown: tuple[str, ...] = ()


def _by_ids(words: Sequence[int | None], parts: Sequence[int | None]) -> list[bool]:
    keys = list(zip(parts, words, strict=True))
    return [place == 0 or keys[place - 1] != key for place, key in enumerate(keys)]


def _by_characters(row: Row, begins: list[bool]) -> list[bool]:
    """Where words begin, with what the characters of the text say."""
    found, end = [], (0, 0)
    for span, begin in zip(row.spans, begins, strict=True):
        if span is None:
            found.append(begin)
            continue
        part, start, stop = span
        text = row.texts[part]
        # Spaces before a word may be part of its token.
        start += len(text[start:stop]) - len(text[start:stop].lstrip())
        inside = part == end[0] and start < end[1]
        found.append(not inside and (begin or (start < stop and parted(text, start))))
        end = (part, max(stop, end[1] if part == end[0] else 0))
    return found


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
    if is_byte_level(tokenizer):
        return _BYTES
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
    return "".join(_plain((row.shown or row.tokens)[place]) for place in places)


def _plain(token: str) -> str:
    for mark in (_SPACED, _BYTES, _ENDS):
        token = token.replace(mark, "")
    return token.removeprefix(_GOES_ON)
