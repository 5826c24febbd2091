"""Small tokenizers of every style, made of word lists."""

from __future__ import annotations

from typing import Any

PIECES = ["the", "cat", "cats", "sat", "un", "happy", "on", "a", "mat", "dog", "and", "sleeps", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(**options: Any) -> Any:
    """BERT's style: ## goes on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *PIECES, "##happy", "##s"]
    own = Tokenizer(models.WordPiece({one: n for n, one in enumerate(pieces)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": one for name, one in named.items()} | options
    return PreTrainedTokenizerFast(tokenizer_object=own, **tokens)


class Marked:
    """A tokenizer without word_ids(), whose pieces bear marks: G with a dot, a low block, </w> or
    ##. Vocabulary: what it was given.
    """

    is_fast = False
    padding_side = "right"
    pad_token_id, unk_token_id, mask_token_id = 0, None, None
    all_special_ids = (1,)

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *range(2, 2 + len(self.pieces))] for _ in texts]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" if one == 1 else self.pieces[one - 2] for one in ids]

    def get_vocab(self) -> dict[str, int]:
        return {one: n for n, one in enumerate(self.pieces)}
