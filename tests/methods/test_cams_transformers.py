"""Layers and grids of published networks, with weights drawn at random."""

from __future__ import annotations

import pytest
import torch

import saliency_fast as sf
from saliency_fast.methods.cam import GradCAM

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "num_labels": 5,
}
STAGES = {"depths": [1, 1, 2], "num_labels": 5}
# (kind, its configuration, the layer "auto" finds)
NETWORKS = {
    "ViTForImageClassification": (
        transformers.ViTConfig(**SMALL, patch_size=8),
        "vit.layers.1.layernorm_before",
    ),
    "Dinov2ForImageClassification": (
        transformers.Dinov2Config(**SMALL, patch_size=8),
        "dinov2.encoder.layer.1.norm1",
    ),
    "SwinForImageClassification": (
        transformers.SwinConfig(
            **STAGES, image_size=32, embed_dim=8, num_heads=[2, 2, 2], window_size=2
        ),
        "swin.encoder.layers.2.blocks.1.layernorm_before",
    ),
    "ResNetForImageClassification": (
        transformers.ResNetConfig(
            **STAGES, embedding_size=8, hidden_sizes=[8, 8, 16], layer_type="basic"
        ),
        "resnet.encoder",
    ),
    "VideoMAEForVideoClassification": (
        transformers.VideoMAEConfig(**SMALL, patch_size=8, num_frames=4, tubelet_size=2),
        "videomae.encoder.layer.1.layernorm_before",
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks(kind: str) -> None:
    config, layer = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval()
        x = torch.randn(2, *(4,) * ("Video" in kind), 3, 32, 32)
    found = sf.explain(model, x, target=1, method=GradCAM(relu=False))
    named = sf.explain(model, x, target=1, method=GradCAM(layer, relu=False))
    assert torch.equal(found.values, named.values)
    (letters,) = found.layout
    assert letters is not None
    axis = letters.index("C")
    assert axis == x.dim() - 3
    assert found.values.shape == tuple(1 if n == axis else s for n, s in enumerate(x.shape))
    assert (found.extras["layer"] != 0).all()
