"""The token that follows each text, in batches with padding on either side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError
from tests.word_lists import wordpiece

TEXTS = ["the cats sat on a mat.", "a dog", "unhappy cat and dog"]


def language(kind: str) -> Any:
    import transformers as hf

    size = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=4, n_positions=40)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**size, intermediate_size=32)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**size, intermediate_size=32)),
    }
    torch.manual_seed(0)
    return made[kind]().double().eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["input_x_gradient", "feature_ablation"])
@pytest.mark.parametrize(
    "target",
    ["predicted", sf.NextToken("cat"), sf.NextToken(["cat", "dog", "on"]), (-1, 5), (-2, 7)],
    ids=str,
)
def test_texts_alone_and_padded(kind: str, side: str, method: str, target: Any) -> None:
    model, tokenizer = language(kind), wordpiece(padding_side=side)
    together = sf.explain_tokens(model, tokenizer, TEXTS, target=target, method=method)
    for number, text in enumerate(TEXTS):
        own = target
        if isinstance(target, sf.NextToken) and isinstance(target.token, list):
            own = sf.NextToken(target.token[number])
        alone = sf.explain_tokens(model, tokenizer, text, target=own, method=method)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            score = model(ids).logits[0, target[0] if isinstance(target, tuple) else -1]
        chosen = alone.attribution.classes
        wanted = target[1] if chosen is None else int(chosen[0])
        assert target != "predicted" or wanted == int(score.argmax())
        torch.testing.assert_close(float(alone.attribution.scores[0]), float(score[wanted]))
        for name, column in alone.columns.items():
            got = together.columns[name][number][together.real[number]]
            torch.testing.assert_close(got, column[0], rtol=1e-9, atol=1e-12)


def test_tokens_by_their_text() -> None:
    model, tokenizer = language("gpt2"), wordpiece()
    found = sf.explain_tokens(
        *(model, tokenizer, "a dog"), target=sf.NextToken("cat"), method="gradient"
    )
    assert found.attribution.classes.tolist() == [tokenizer.get_vocab()["cat"]]
    named = sf.NextToken("##happy")
    found = sf.explain_tokens(model, tokenizer, "a dog", target=named, method="gradient")
    assert found.attribution.classes.tolist() == [tokenizer.get_vocab()["##happy"]]
    with pytest.raises(InputError, match=r"'unhappy' is 2 tokens.*'un', '##happy'"):
        sf.explain_tokens(model, tokenizer, "a dog", target=sf.NextToken("unhappy"))


def test_masked_models_do_not_predict_what_follows() -> None:
    with pytest.raises(InputError, match="NextToken"):
        sf.explain_tokens(language("bert"), wordpiece(), TEXTS, target="predicted")


def test_attention_is_read_where_the_token_follows() -> None:
    model, tokenizer = language("gpt2"), wordpiece()
    own = {"target": sf.NextToken(5, position=2), "method": "gradient"}
    found = sf.explain_tokens(model, tokenizer, TEXTS[0], **own)
    assert float(found.attention[0, 3:].abs().max()) == 0 < float(found.attention[0, 2])
    named = sf.explain_tokens(model, tokenizer, TEXTS[0], **own, query=2)
    torch.testing.assert_close(found.attention, named.attention)


class Counting(nn.Module):
    """A model whose positions count padding, and which takes no others."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(99, 4), nn.Embedding(40, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        return (x.tanh() * attention_mask[..., None]).sum((1, 2))


def test_positions_that_count_padding_are_told() -> None:
    with pytest.warns(UserWarning, match=r"padded on the left.*padding_side = 'right'"):
        sf.explain_tokens(
            Counting(), wordpiece(padding_side="left"), TEXTS, method="gradient", attention=False
        )
