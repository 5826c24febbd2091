"""Token attributions on tiny transformers: padding, special tokens, baselines, targets, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, ModelError, NoAttentionError
from saliency_fast.methods import METHODS
from tests import naive, naive_attention
from tests.transformer_models import eager_attention, tiny
from tests.word_lists import wordpiece

TEXTS = ["the cats sat on a mat.", "a dog", "unhappy cat and dog"]
# Rounding of float64 sums, behind softmaxes of which some are float32.
NEAR = 1e-6
STEPS = sf.IntegratedGradients(steps=8)


def classifier() -> tuple[Any, Any]:
    model, _ = tiny("classifier", "sdpa")
    return model, wordpiece()


def near(found: Tensor, expected: Tensor, tolerance: float = NEAR) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


def test_against_captum_and_the_naive_loop() -> None:
    from captum.attr import LayerIntegratedGradients

    model, tokenizer = classifier()
    found = sf.explain_tokens(model, tokenizer, TEXTS, target=2, method=STEPS)
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        blank = torch.where(ids < 5, ids, 0)
        layer = model.get_input_embeddings()
        ends = layer(ids).detach(), layer(blank).detach()

        def head(vectors: Tensor) -> Tensor:
            return model(inputs_embeds=vectors).logits

        slow = naive.integrated_gradients(
            head, lambda out: out[:, 2], ends[:1], ends[1:], "midpoint", 8
        )
        values = found.values[number][found.real[number]]
        near(values, slow[0].sum(2)[0], 1e-10)
        # Captum runs the same rule through the layer.
        peer = LayerIntegratedGradients(lambda one: model(one).logits, layer).attribute(
            ids, baselines=blank, target=2, n_steps=8, method="riemann_middle"
        )
        near(values, peer.sum(2)[0], 1e-7)


@pytest.mark.parametrize("kind", ["classifier", "distilbert", "gpt2", "t5", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_with_padding_equal_singles(kind: str, side: str) -> None:
    if side == "left" and kind == "classifier":
        pytest.skip("it reads its first place, which is padding then")
    model, _ = tiny(kind, "sdpa")
    tokenizer = wordpiece(padding_side=side)

    def target(out: Any) -> Tensor:
        return out[0][:, 1] if out[0].dim() == 2 else out[0][:, -1 if side == "left" else 0, 1]

    together = sf.explain_tokens(model, tokenizer, TEXTS, target=target, method=STEPS)
    for number, text in enumerate(TEXTS):
        alone = sf.explain_tokens(model, tokenizer, text, target=target, method=STEPS)
        for name, column in alone.columns.items():
            own = together.columns[name][number]
            near(own[together.real[number]], column[0], 1e-5)
            assert not bool(own[~together.real[number]].any())
        assert together.tokens[number] == alone.tokens[0]


@pytest.mark.skipif("feature_ablation" not in METHODS, reason="no such method yet")
def test_tokens_are_taken_away_whole() -> None:
    model, tokenizer = classifier()
    found = sf.explain_tokens(
        model, tokenizer, TEXTS, target=1, baseline="mask", method="feature_ablation"
    )
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            score = model(ids).logits[0, 1]
            for place in range(ids.shape[1]):
                without = ids.clone()
                if ids[0, place] > 4:
                    without[0, place] = tokenizer.mask_token_id
                lost = score - model(without).logits[0, 1]
                assert float(found.values[number, place]) == pytest.approx(float(lost), abs=1e-6)
    assert found.rollout is not None
    with pytest.raises(InputError, match="this method exchanges tokens"):
        sf.explain_tokens(
            model, tokenizer, TEXTS, target=1, baseline="zero", method="feature_ablation"
        )


def test_special_tokens_keep_their_place_in_the_baseline() -> None:
    model, tokenizer = classifier()
    for baseline in ("pad", "mask", "unk", "zero", 98):
        found = sf.explain_tokens(
            model, tokenizer, TEXTS, target=1, baseline=baseline, method=STEPS
        )
        assert not bool(found.values[found.special].any())
        assert bool(found.values[found.real & ~found.special].all())
        gap = found.attribution.scores - found.attribution.baseline_scores
        near(found.values.sum(1) - gap, found.attribution.delta, 1e-10)


def test_attention_stands_beside() -> None:
    model, tokenizer = classifier()
    text = "the cats sat on a mat."
    found = sf.explain_tokens(model, tokenizer, text, target=3, method="gradient", layer=1)
    encoded = dict(tokenizer(text, return_tensors="pt"))
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    layers = eager_attention(model, inputs)
    assert found.attention is not None
    assert found.rollout is not None
    assert found.gradient_attention is not None
    near(found.attention[0], layers[1][0].mean(0)[0].detach())
    rolled = naive_attention.rollout([one.detach() for one in layers])
    near(found.rollout[0], rolled[0, 0])
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    grads = torch.autograd.grad(out.logits[0, 3], out.attentions)
    expected = naive_attention.relevance([one.detach() for one in out.attentions], list(grads))[
        0, 0
    ]
    expected[0] -= 1
    near(found.gradient_attention[0], expected)
    means = sf.explain_tokens(model, tokenizer, text, target=3, method="gradient", query="mean")
    assert means.rollout is not None
    near(means.rollout[0], rolled[0].mean(0))


def test_causal_models_are_asked_at_the_last_token_of_each_text() -> None:
    model, _ = tiny("gpt2", "sdpa")
    tokenizer = wordpiece()
    found = sf.explain_tokens(
        model, tokenizer, TEXTS, target=lambda out: out[0][:, 2, 0], method="gradient"
    )
    assert found.attention is not None
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        last = eager_attention(model, {"input_ids": ids})[-1][0].mean(0)[-1]
        near(found.attention[number][found.real[number]], last.detach())


def test_gradients_alone_are_shown_by_their_norm() -> None:
    model, tokenizer = classifier()
    found = sf.explain_tokens(model, tokenizer, TEXTS[1], target=1, method="gradient")
    whole = found.attribution.values
    assert isinstance(whole, Tensor)
    near(found.values, whole.norm(dim=2))
    found = sf.explain_tokens(
        model, tokenizer, TEXTS[1], target=1, method="gradient", reduction="sum"
    )
    near(found.values, torch.zeros(1, 4), 1e-10)


def test_precision_is_the_attributions_alone() -> None:
    model, tokenizer = classifier()
    half = sf.explain_tokens(
        model.float(), tokenizer, TEXTS, target=1, precision="bfloat16", points_per_launch=2
    )
    full = sf.explain_tokens(model, tokenizer, TEXTS, target=1)
    assert half.attribution.provenance.precision == "bfloat16"
    # 2**-8 an operation, and some dozen of them one after another.
    assert naive.relative_l2(half.values, full.values) < 0.1
    assert half.rollout is not None
    assert full.rollout is not None
    near(half.rollout, full.rollout)


def test_predicted_and_pairs_and_words() -> None:
    model, tokenizer = classifier()
    pair = ("unhappy cats", "the dog sleeps")
    found = sf.explain_tokens(model, tokenizer, pair, target="predicted", method=STEPS)
    assert found.tokens == (
        ("[CLS]", "un", "##happy", "cats", "[SEP]", "the", "dog", "sleeps", "[SEP]"),
    )
    whole = found.words()
    assert whole.tokens == (("[CLS]", "unhappy", "cats", "[SEP]", "the", "dog", "sleeps", "[SEP]"),)
    for name, column in found.columns.items():
        near(whole.columns[name].sum(1), column.sum(1), 1e-10)
        near(whole.columns[name][0, 1], column[0, 1] + column[0, 2], 1e-10)
    assert whole.special[0].tolist() == [True, False, False, True, False, False, False, True]
    best = found.attribution.classes
    again = sf.explain_tokens(model, tokenizer, pair, target=best, method=STEPS)
    near(again.values, found.values, 1e-10)


def test_correlation_is_spearman() -> None:
    from scipy.stats import spearmanr

    model, tokenizer = classifier()
    found = sf.explain_tokens(model, tokenizer, TEXTS, target=0, method=STEPS)
    content = found.real & ~found.special
    for name, ranks in found.correlation.items():
        for number in (0, 2):
            own = content[number]
            x, y = found.values[number][own].abs(), found.columns[name][number][own]
            assert float(ranks[number]) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert ranks[1].isnan()


def test_what_is_shown() -> None:
    model, tokenizer = classifier()
    found = sf.explain_tokens(model, tokenizer, ["the cat sat.", "a dog"], target=0, method=STEPS)
    shown = str(found)
    assert shown == found.table(0) + "\n\n" + found.table(1)
    head = found.table(0).splitlines()[1].split()
    assert head == ["token", "attribution", "attention", "rollout", "grad.", "attention"]
    assert "([CLS])" in shown
    assert "rank correlation with |attribution|: attention" in shown
    page = found.html()
    assert page.count("<table>") == 2
    assert page.count(">cat</span>") == 4
    assert "<script" not in page
    assert repr(found) == "<TokenAttribution integrated_gradients; tokens: 6, 4>"
    with pytest.raises(InputError, match="text out of range: got 2, there are 2"):
        found.table(2)


class Recurrent(nn.Module):
    """No attention, no attention mask; classes of texts of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(99, 6)
        self.cells = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cells(self.words(ids))[0][:, -1])


def test_models_without_attention() -> None:
    model, tokenizer = Recurrent().double(), wordpiece()
    found = sf.explain_tokens(model, tokenizer, "the cat sat", target=1, method=STEPS)
    assert list(found.columns) == ["attribution"]
    assert found.correlation == {}
    assert "rollout" not in str(found)
    assert "no attention: the model has no attention to read" in str(found)
    with pytest.raises(NoAttentionError, match="no attention to read"):
        sf.explain_tokens(model, tokenizer, "the cat", target=1, attention=True)
    with pytest.raises(InputError, match="need a model that takes an attention_mask"):
        sf.explain_tokens(model, tokenizer, ["the cat", "dog"], target=1)


def test_long_texts() -> None:
    model, tokenizer = classifier()
    text = "the cat " * 25
    with pytest.raises(InputError, match=r"text 1 has 52 tokens, expected at most 40; .*truncate"):
        sf.explain_tokens(model, tokenizer, ["dog", text], target=1)
    with pytest.warns(UserWarning, match="cut to 40 tokens: text 1 has 52 tokens"):
        found = sf.explain_tokens(
            model, tokenizer, ["dog", text], target=1, truncate=True, method="gradient"
        )
    assert [len(one) for one in found.tokens] == [3, 40]
    assert found.tokens[1][-1] == "[SEP]"
    places, _ = tiny("roberta", "sdpa")
    with pytest.raises(InputError, match="text 0 has 52 tokens, expected at most 39"):
        sf.explain_tokens(places, tokenizer, text, target=1)
    with pytest.raises(InputError, match="expected at most 4"):
        sf.explain_tokens(model, tokenizer, "the cat sat", target=1, max_length=4)


def test_errors() -> None:
    model, tokenizer = classifier()
    explain = sf.explain_tokens
    with pytest.raises(InputError, match="texts is empty"):
        explain(model, tokenizer, [], target=1)
    with pytest.raises(InputTypeError, match="texts must be strings or pairs"):
        explain(model, tokenizer, [3], target=1)  # type: ignore[list-item]
    with pytest.raises(InputError, match="all single or all pairs"):
        explain(model, tokenizer, ["a", ("a", "b")], target=1)
    with pytest.raises(InputTypeError, match="tokenizer must be callable: got str"):
        explain(model, "bert-base", "a", target=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="target must be one per text: got 2"):
        explain(model, tokenizer, "a", target=[[0, 1]])
    with pytest.raises(InputError, match="baseline must be 'pad', 'mask', 'unk', 'zero' or a"):
        explain(model, tokenizer, "a", target=1, baseline="blank")
    with pytest.raises(InputError, match="query out of range: got 3"):
        explain(model, tokenizer, "a", target=1, query=3)
    with pytest.raises(InputError, match="query must be"):
        explain(model, tokenizer, "a", target=1, query="class")
    bare = wordpiece(pad_token=None)
    with pytest.raises(InputError, match="baseline must be 'mask', 'unk', 'zero' or a token id"):
        explain(model, bare, "a", target=1)
    with pytest.raises(ModelError, match="last hidden states"):
        explain(model, tokenizer, "a cat", target=sf.Similarity("a dog"))


def test_the_model_is_as_it_was() -> None:
    model, tokenizer = classifier()
    model.train()
    sf.explain_tokens(model, tokenizer, TEXTS, target=1, method="gradient")
    with pytest.raises(InputError):
        sf.explain_tokens(model, tokenizer, TEXTS, target=77)
    assert all(module.training for module in model.modules())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
