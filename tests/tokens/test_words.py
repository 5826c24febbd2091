"""Words out of sub-words, in every style of marks and by word_ids()."""

from __future__ import annotations

import pytest

from saliency_fast.tokens.encoding import encode
from tests.word_lists import Marked, wordpiece


class Ids:
    """A model of any arguments."""

    def forward(self, **_: object) -> None: ...


def words(tokenizer: object, text: object = "") -> list[tuple[str, tuple[int, ...]]]:
    found = encode(Ids(), tokenizer, [text], None, False)  # type: ignore[list-item]
    return [(one.text, one.indices) for one in found.words[0]]


G, S = "\u0120", "\u2581"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("un", "##happy", "cat", "##s"), ["unhappy", "cats"]),
        (("The", f"{G}un", "happy", f"{G}the"), ["The", "unhappy", "the"]),
        ((f"{S}un", "happy", f"{S}", "cat"), ["unhappy", "cat"]),
        (("un", "happy</w>", "the</w>", "cat"), ["unhappy", "the", "cat"]),
        (("cat",), ["cat"]),
    ],
    ids=["WordPiece", "BPE", "SentencePiece", "BPE, ends", "one"],
)
def test_marks(pieces: tuple[str, ...], expected: list[str]) -> None:
    found = words(Marked(*pieces))
    assert [text for text, _ in found] == ["<s>", *expected]
    places = [place for _, several in found for place in several]
    assert places == list(range(1 + len(pieces)))


def test_fast_tokenizers_know_their_words() -> None:
    assert words(wordpiece(), "the unhappy cats.") == [
        ("[CLS]", (0,)),
        ("the", (1,)),
        ("unhappy", (2, 3)),
        ("cats", (4,)),
        (".", (5,)),
        ("[SEP]", (6,)),
    ]
    # Unknown words are shown as they were written, and pairs do not run together.
    assert words(wordpiece(), ("a zebra", "dog")) == [
        ("[CLS]", (0,)),
        ("a", (1,)),
        ("zebra", (2,)),
        ("[SEP]", (3,)),
        ("dog", (4,)),
        ("[SEP]", (5,)),
    ]
