"""Byte-level tokens are readable, and words are the text's, whatever its script."""

from typing import Any

import pytest

from saliency_fast.tokens.encoding import Encoded, encode
from saliency_fast.tokens.words import is_word_boundary, readable_tokens

TEXTS = (
    "the cat sat, don't you think?",
    "我喜欢猫 😀🎉 now",
    "naïve café déjà-vu Übermut",
    "👩‍🚀 and 👍🏽 and 🇩🇪🇫🇷!",
    "mixed 漢字とかな text 😀",
    "😀 🎉  two   spaces",
    "line\nbreak\tand tab",
    "Ünïcödé ≠ äscii — “quotes”",
    "हिन्दी और ไทย",
    "x",
    "🎉",
)
TRAINED = ["the cat sat", "我喜欢猫", "party 🎉", "漢字とかな", "naïve café"] * 20


def byte_level(size: int, **options: Any) -> Any:
    """GPT-2's kind, with so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.ByteLevel(**options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(TRAINED, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>", pad_token="<|end|>")


def with_fallback() -> Any:
    """Llama's kind: pieces with a mark for spaces, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *(f"<0x{one:02X}>" for one in range(256)), "▁", *"thecatsdo我猫"]
    own = Tokenizer(
        models.BPE(
            {one: n for n, one in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", pad_token="<s>")


class Slow:
    """A byte-level tokenizer that tells no offsets."""

    is_fast = False
    padding_side, all_special_ids = "right", ()
    pad_token_id = unk_token_id = mask_token_id = None
    byte_decoder: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.inner = byte_level(300)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [self.inner(one)["input_ids"] for one in texts]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


TOKENIZERS = {
    "bytes alone": lambda: byte_level(257),
    "few merges": lambda: byte_level(290),
    "many merges": lambda: byte_level(400),
    "offsets with spaces": lambda: byte_level(290, trim_offsets=False),
    "no offsets": Slow,
    "fallback": with_fallback,
}


class Ids:
    def forward(self, **_: object) -> None: ...


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: Any) -> Any:
    pytest.importorskip("transformers")
    return TOKENIZERS[request.param]()


def encoded(tokenizer: Any, text: str) -> Encoded:
    return encode(Ids(), tokenizer, [text], None, False)


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_the_texts(tokenizer: Any, text: str) -> None:
    found = encoded(tokenizer, text)
    plain = "".join(text.split())
    words = "".join("".join(word.text.split()) for word in found.words[0])
    assert words.replace("\\n", "").replace("\\t", "") == plain
    total = [0.0] * len(found.tokens[0])
    for word in found.words[0]:
        for place, share in word.tokens:
            total[place] += share
    assert total == pytest.approx([1.0] * len(total))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_can_be_read(tokenizer: Any, text: str) -> None:
    for token in encoded(tokenizer, text).tokens[0]:
        letters = token.split("[")[0].replace("▁", "").replace("\\n", "\n").replace("\\t", "\t")
        assert "<0x" not in token
        assert letters.strip() in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢猫 😀🎉 now", ["我", "喜", "欢", "猫", "😀", "🎉", "now"]),
        ("👩‍🚀 and 👍🏽 and 🇩🇪🇫🇷!", ["👩‍🚀", "and", "👍🏽", "and", "🇩🇪", "🇫🇷", "!"]),
        ("😀 🎉  two   spaces", ["😀", "🎉", "two", "spaces"]),
        ("naïve café", ["naïve", "café"]),
    ],
)
def test_which_words(tokenizer: Any, text: str, words: list[str]) -> None:
    found = [word.text for word in encoded(tokenizer, text).words[0] if word.text.strip()]
    assert [one for one in found if one] == words


def test_parts_of_a_character_say_which() -> None:
    tokens = ["ðŁ", "ĺ", "Ģ", "Ġnow"]
    found = readable_tokens(tokens, [False] * 4, byte_level=True)
    assert found == ("😀[1/3]", "😀[2/3]", "😀[3/3]", "▁now")
    # A special token keeps its name, and bytes that are no text are told.
    assert readable_tokens(["Ċ", "ĠĊ"], [True, False], byte_level=True) == ("Ċ", "▁\\n")
    assert readable_tokens(["Ģ"], [False], byte_level=True) == ("\N{REPLACEMENT CHARACTER}",)


def test_characters_that_are_words() -> None:
    cuts = [place for place in range(1, len("a我b 😀é")) if is_word_boundary("a我b 😀é", place)]
    assert cuts == [1, 2, 4, 5]
    assert not any(is_word_boundary("👍🏽", place) for place in (1,))
    assert [is_word_boundary("🇩🇪🇫🇷", place) for place in (1, 2, 3)] == [False, True, False]
