"""A real encoder: what makes two sentences alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import saliency_fast as sf
from tests import naive

TEXT, OTHER = "The cat is sleeping.", "A kitten takes a nap."
Encoder = tuple[Any, Any]


def embed(model: Any, vectors: Tensor, **further: Tensor) -> Tensor:
    return model(inputs_embeds=vectors, **further).last_hidden_state.mean(1)


def test_similarity_is_explained_to_its_last_digit(encoder: Encoder) -> None:
    model, tokenizer = encoder
    method = sf.IntegratedGradients(steps=64, rule="gauss_legendre")
    found = sf.explain_tokens(model, tokenizer, TEXT, target=sf.Similarity(OTHER), method=method)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    other = tokenizer(OTHER, return_tensors="pt")["input_ids"]
    layer = model.get_input_embeddings()
    with torch.no_grad():
        goal = embed(model, layer(other))
        score = functional.cosine_similarity(embed(model, layer(ids)), goal)
    assert float(found.attribution.scores[0]) == pytest.approx(float(score), abs=1e-10)
    gap = found.attribution.scores - found.attribution.baseline_scores
    assert float(gap) > 0.3
    assert float(found.values.sum() - gap) == pytest.approx(0, abs=1e-5)
    assert float(found.attribution.delta) == pytest.approx(
        float(found.values.sum() - gap), abs=1e-9
    )
    blank = torch.where(found.special | ~found.real, ids, 0)
    ends = layer(ids).detach(), layer(blank).detach()
    slow = naive.integrated_gradients(
        lambda vectors: functional.cosine_similarity(embed(model, vectors), goal),
        lambda out: out,
        ends[:1],
        ends[1:],
        "gauss_legendre",
        64,
    )
    assert naive.relative_l2(found.values, slow[0].sum(2)) < 1e-8


def test_the_noun_counts_more_than_the_article(encoder: Encoder) -> None:
    model, tokenizer = encoder
    found = sf.explain_tokens(model, tokenizer, TEXT, target=sf.Similarity(OTHER)).words()
    by = dict(zip(found.tokens[0], found.values[0].tolist(), strict=True))
    assert by["cat"] > 3 * abs(by["The"])
    assert by["cat"] > by["is"]
    assert by["sleeping"] > by["."]
    # What draws attention is no evidence: the class token has most of it, and none of the score.
    assert found.rollout is not None
    assert int(found.rollout[0].argmax()) == 0
    assert float(found.values[0, 0]) == 0


def test_padding_changes_nothing(encoder: Encoder) -> None:
    model, tokenizer = encoder
    texts = [TEXT, "Unbelievably, nobody saw the feline on that rug yesterday evening.", "Stocks"]
    others = [OTHER, OTHER, "The market fell."]
    method = sf.IntegratedGradients(steps=4)
    together = sf.explain_tokens(
        model, tokenizer, texts, target=sf.Similarity(others), method=method
    )
    for number, (text, other) in enumerate(zip(texts, others, strict=True)):
        alone = sf.explain_tokens(
            model, tokenizer, text, target=sf.Similarity(other), method=method
        )
        for name, column in alone.columns.items():
            own = together.columns[name][number]
            assert naive.relative_l2(own[together.real[number]], column[0]) < 1e-6
            assert not bool(own[~together.real[number]].any())


def test_words_add_up(encoder: Encoder) -> None:
    model, tokenizer = encoder
    text = "Unbelievably, the feline sleeps."
    found = sf.explain_tokens(
        model, tokenizer, text, target=sf.Similarity(OTHER), method="input_x_gradient"
    )
    whole = found.words()
    assert whole.tokens[0] == (
        *("[CLS]", "Unbelievably", ",", "the", "feline", "sleeps", ".", "[SEP]"),
    )
    assert len(found.tokens[0]) > len(whole.tokens[0])
    for name, column in found.columns.items():
        torch.testing.assert_close(whole.columns[name].sum(1), column.sum(1))


def test_a_function_of_the_output_is_a_target_too(encoder: Encoder) -> None:
    model, tokenizer = encoder
    ids = tokenizer(OTHER, return_tensors="pt")
    with torch.no_grad():
        goal = model(**ids).last_hidden_state[:, 0]

    def alike(out: Any) -> Tensor:
        return functional.cosine_similarity(out.last_hidden_state[:, 0], goal)

    one = sf.explain_tokens(model, tokenizer, TEXT, target=alike)
    two = sf.explain_tokens(model, tokenizer, TEXT, target=sf.Similarity(OTHER, pooling="first"))
    torch.testing.assert_close(one.values, two.values)
    assert one.attention is not None
    assert two.attention is not None
    torch.testing.assert_close(one.attention, two.attention)
