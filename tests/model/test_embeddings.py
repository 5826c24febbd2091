"""at="embeddings": the layer that makes vectors of token ids, whatever else bears the name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saliency_fast.model.layers import find_layers
from tests.transformer_models import tiny


@pytest.mark.parametrize(
    "kind", ["bert", "classifier", "distilbert", "gpt2", "t5", "llama", "roberta"]
)
def test_the_layer_that_runs_is_found(kind: str) -> None:
    model, inputs = tiny(kind)
    (layer,) = find_layers(model, "embeddings")
    assert isinstance(layer, nn.Embedding)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], inputs["input_ids"])
