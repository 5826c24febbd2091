"""Scripts as people write them for Captum: the same answers with either import."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr._utils.input_layer_wrapper import ModelInputWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering

import saliency_fast.captum as facade
from tests.captum.test_facade_gradients import agree
from tests.models import Image, Tabular, make, randn

Script = Callable[[ModuleType], Any]


class Fcn(nn.Module):
    """Scores per pixel, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.classifier(self.backbone(x))
        return OrderedDict(out=functional.interpolate(y, x.shape[-2:], mode="bilinear"))


def segmentation(library: ModuleType) -> Any:
    """Scores of a class summed where it wins, its regions as features, Grad-CAM as large as x."""
    net, x = make(Fcn), randn(1, 3, 12, 12).requires_grad_()
    winner = net(x)["out"].argmax(1, keepdim=True)

    def summed(image: Tensor) -> Tensor:
        out = net(image)["out"]
        return (out * torch.zeros_like(out[:1]).scatter_(1, winner, 1)).sum((2, 3))

    cam = library.LayerGradCam(summed, net.backbone[0]).attribute(x, target=2)
    ablation = library.FeatureAblation(summed)
    return (
        library.LayerAttribution.interpolate(cam, x.shape[2:]),
        ablation.attribute(x, feature_mask=winner, perturbations_per_eval=2, target=2),
        library.Saliency(lambda image: net(image)["out"]).attribute(x, target=(2, 5, 5)),
    )


def question_answering(library: ModuleType) -> Any:
    """A position chosen by a function, masks as further arguments, layers one and several."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, num_hidden_layers=2, attn_implementation="eager", **sizes)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config).double().eval()
    ids = torch.arange(3, 12)[None]
    kinds, places, mask = (ids > 6).long(), torch.arange(9)[None], torch.ones_like(ids)

    def score(ids: Tensor, kinds: Any, places: Any, mask: Any, position: int = 0) -> Tensor:
        out = model(ids, token_type_ids=kinds, position_ids=places, attention_mask=mask)
        return (out.start_logits, out.end_logits)[position].max(1).values

    inside, zeros = model.bert.embeddings, torch.zeros_like(ids)
    one = library.LayerIntegratedGradients(score, inside)
    layers = [inside.word_embeddings, inside.token_type_embeddings, inside.position_embeddings]
    several = library.LayerIntegratedGradients(score, layers)
    further = (kinds, places, mask, 1)
    return (
        *one.attribute(
            ids,
            zeros,
            None,
            further,
            n_steps=5,
            return_convergence_delta=True,
            internal_batch_size=2,
        ),
        *several.attribute((ids, kinds, places), (zeros,) * 3, None, (mask, 0), n_steps=5),
        library.LayerActivation(score, model.bert.encoder.layer[0]).attribute(ids, further),
        library.ShapleyValueSampling(score).attribute(ids, zeros, None, further, n_samples=2),
    )


class Vqa(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.picture = nn.Embedding(9, 6), nn.Conv2d(3, 6, 3)
        self.cells, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(12, 4)

    def forward(self, image: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        words = nn.utils.rnn.pack_padded_sequence(self.words(ids), lengths, batch_first=True)
        both = self.picture(image).relu().mean((2, 3)), self.cells(words)[1][0][-1]
        return self.head(torch.cat(both, 1))


def visual_questions(library: ModuleType) -> Any:
    """Inputs as layers by Captum's wrapper: the picture itself and an embedding."""
    wrapped = ModelInputWrapper(make(Vqa))
    x = (randn(2, 3, 8, 8), torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 3]))
    layers = [wrapped.input_maps["image"], wrapped.module.words]
    method = library.LayerIntegratedGradients(wrapped, layers)
    start = (0.0 * x[0], torch.zeros_like(x[1]), x[2])
    return method.attribute(x, start, target=[3, 1], n_steps=6)


def closures(library: ModuleType) -> Any:
    """What a function closes over, its model's weights and its layers change between calls."""
    model, x, scale, found = make(Image), randn(2, 3, 12, 12), [1.0], []
    method = library.IntegratedGradients(lambda x: model(x) * scale[0])
    cam = library.LayerGradCam(model, model[4])
    for step in range(3):
        scale[0] += 1.0
        model[0].weight.data.mul_(1.1)
        model[5] = (nn.SiLU(), nn.Tanh(), nn.Sigmoid())[step]
        found += [method.attribute(x, target=1, n_steps=3), cam.attribute(x, target=1)]
    return tuple(found)


def hooked(library: ModuleType) -> Any:
    """A user's own hooks change what goes on, and stay."""
    model, x = make(Tabular), randn(3, 7)
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    found = (
        library.Saliency(model).attribute(x, target=1),
        library.IntegratedGradients(model).attribute(x, target=1, n_steps=4),
        library.LayerGradientXActivation(model, model[1]).attribute(x, target=1),
        library.FeatureAblation(model).attribute(x, target=1),
    )
    assert len(model[0]._forward_hooks) == len(model[0]._backward_hooks) == 1
    return found


def graph_edges(library: ModuleType) -> Any:
    """A mask on edges explained, one point at a time, with the graph as further arguments."""
    first, last = make(lambda: nn.Linear(4, 6)), make(lambda: nn.Linear(6, 3))
    nodes, edges = randn(5, 4), (randn(5, 5) > 0).double()

    def score(mask: Tensor, nodes: Tensor, edges: Tensor) -> Tensor:
        return last(torch.relu((mask * edges) @ first(nodes))).mean(-2)

    method = library.IntegratedGradients(score)
    start = torch.ones(1, 5, 5, dtype=torch.float64)
    of = {"additional_forward_args": (nodes, edges), "internal_batch_size": 1}
    return (method.attribute(start, target=1, n_steps=5, **of),)


def twins(library: ModuleType) -> Any:
    """One network for both inputs, one similarity for each pair."""
    net, pair = make(Tabular), (randn(3, 7), randn(3, 7, seed=1))

    def similar(a: Tensor, b: Tensor) -> Tensor:
        return functional.cosine_similarity(net(a), net(b))

    found = library.IntegratedGradients(similar).attribute(
        pair, n_steps=5, return_convergence_delta=True
    )
    return *found[0], found[1], *library.KernelShap(similar).attribute(pair, n_samples=60)


def pictures(library: ModuleType) -> Any:
    """Occlusion from a mean colour, then two pictures of the map."""
    model, x = make(Image), randn(1, 3, 12, 12).sigmoid()
    start = x.mean((2, 3), keepdim=True)
    values = library.Occlusion(model).attribute(
        x, (3, 4, 4), strides=(3, 2, 2), baselines=start.expand_as(x), target=torch.tensor(2)
    )
    found, image = [np.transpose(one.squeeze().numpy(), (1, 2, 0)) for one in (values, x)]
    _, axes = library.visualization.visualize_image_attr_multiple(
        found, image, ["original_image", "heat_map"], ["all", "absolute_value"], use_pyplot=False
    )
    shown = [torch.as_tensor(np.asarray(one.get_array())) for a in axes for one in a.images]
    return values, *(one.double() for one in shown)


# Captum adds Shapley values up, and fits Kernel SHAP, in float32; its pictures are of 8 bits.
SCRIPTS: dict[Script, float] = {
    **dict.fromkeys((segmentation, visual_questions, closures, hooked, graph_edges), 1e-10),
    **dict.fromkeys((question_answering, twins), 1e-6),
    pictures: 1e-6,
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.__name__)
def test_the_same_answers(script: Script) -> None:
    answers = []
    for library in (captum.attr, facade):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(7)
            answers.append([script(library) for _ in range(2)])
    for again in (0, 1):
        agree(answers[1][again], answers[0][again], SCRIPTS[script], 1e-3)
