"""Captum's own classes, which look by `isinstance`, take methods of the facade for their own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.captum.test_facade_gradients import agree
from tests.models import Tabular, make, randn

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


class Tokens:
    """A tokenizer of eight letters."""

    pad_token_id = 0
    eos_token_id = 7

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [WORDS.index(one) for one in text.split()]
        return torch.tensor([ids]) if "return_tensors" in _ else ids

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(WORDS[int(one)] for one in torch.as_tensor(ids).flatten())

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return [WORDS[int(one)] for one in torch.as_tensor(ids).flatten()]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return [WORDS.index(one) for one in tokens]

    def __call__(self, text: str, **_: Any) -> Any:
        ids = self.encode(text)
        return {"input_ids": ids, "offset_mapping": [(2 * i, 2 * i + 1) for i in range(len(ids))]}


class Language(nn.Module):
    """A language model of one causal layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 6), nn.Linear(6, 8)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        y = self.head((self.table(input_ids).cumsum(1) / count).tanh())
        return type("Output", (), {"logits": y, "past_key_values": None})()


def language() -> Language:
    torch.manual_seed(0)
    return Language()


def answered(library: Any, name: str, **of: Any) -> Any:
    torch.manual_seed(1)
    method = getattr(library, name)(language())
    llm = captum.attr.LLMAttribution(method, Tokens())
    inputs = captum.attr.TextTokenInput("a b c d", Tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = llm.attribute(inputs, "e f", use_cached_outputs=False, **of)
    return found.seq_attr, found.token_attr


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("FeatureAblation", {}),
        ("ShapleyValueSampling", {"n_samples": 4}),
        ("ShapleyValues", {}),
        ("Lime", {"n_samples": 60}),
        ("KernelShap", {"n_samples": 60}),
    ],
)
def test_language_models_by_perturbation(name: str, of: Any) -> None:
    expected, found = (answered(one, name, **of) for one in (captum.attr, facade))
    tolerance = 1e-3 if name in ("Lime", "KernelShap") else 1e-5
    agree(found[0], expected[0], tolerance)
    if expected[1] is None:
        assert found[1] is None
    else:
        agree(found[1], expected[1], tolerance)


def test_language_models_by_gradients() -> None:
    answers = []
    for library in (captum.attr, facade):
        model = language()
        method = library.LayerIntegratedGradients(model, model.table)
        llm = captum.attr.LLMGradientAttribution(method, Tokens())
        inputs = captum.attr.TextTokenInput("a b c d", Tokens())
        found = llm.attribute(inputs, "e f", n_steps=8)
        answers.append((found.seq_attr.detach(), found.token_attr.detach()))
    agree(answers[1], answers[0], 1e-4)


def test_methods_that_are_refused_stay_so() -> None:
    for library in (captum.attr, facade):
        with pytest.raises(AssertionError, match="does not support"):
            captum.attr.LLMAttribution(library.Saliency(language()), Tokens())


class Own(facade.FeatureAblation):
    pass


@pytest.mark.parametrize(
    "name", [name for name in facade.__all__ if isinstance(getattr(captum.attr, name, None), type)]
)
def test_instances_are_of_both_classes(name: str) -> None:
    ours, theirs = getattr(facade, name), getattr(captum.attr, name)
    if not issubclass(ours, facade.Attribution):
        return
    method = ours.__new__(ours)
    assert isinstance(method, ours)
    assert isinstance(method, theirs)
    assert type(method) is ours


def test_children_copies_and_pickles() -> None:
    method = Own(make(Tabular))
    assert isinstance(method, captum.attr.FeatureAblation)
    assert not isinstance(method, captum.attr.Occlusion)
    x = randn(2, 7)
    for one in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert type(one) is Own
        assert torch.equal(one.attribute(x, target=1), method.attribute(x, target=1))


def test_captum_is_not_imported() -> None:
    code = (
        "import sys, torch, saliency_fast.captum as c\n"
        "m = c.Saliency(lambda x: x.sum(1))\n"
        "assert isinstance(m, c.Attribution) and not isinstance(m, dict)\n"
        "assert m.__class__ is c.Saliency and 'captum' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
