"""Tiny transformers of the Hugging Face kind, made of configurations alone, and a word list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


def _made(kind: str) -> tuple[Any, Any]:
    import transformers as hf

    image = {**SIZE, "image_size": 24, "patch_size": 8, "num_labels": 5}
    text = {key: value for key, value in SIZE.items() if key != "vocab_size"}
    made: dict[str, Any] = {
        "bert": lambda: (hf.BertModel, hf.BertConfig(**SIZE)),
        "classifier": lambda: (
            hf.BertForSequenceClassification,
            hf.BertConfig(**SIZE, num_labels=5),
        ),
        "distilbert": lambda: (
            hf.DistilBertModel,
            hf.DistilBertConfig(vocab_size=99, dim=16, n_layers=3, n_heads=4, hidden_dim=32),
        ),
        "gpt2": lambda: (
            hf.GPT2Model,
            hf.GPT2Config(
                vocab_size=99,
                n_embd=16,
                n_layer=3,
                n_head=4,
                n_positions=40,
                bos_token_id=1,
                eos_token_id=1,
            ),
        ),
        "t5": lambda: (
            hf.T5EncoderModel,
            hf.T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4),
        ),
        "llama": lambda: (
            hf.LlamaModel,
            hf.LlamaConfig(vocab_size=99, **text, num_key_value_heads=2),
        ),
        "roberta": lambda: (hf.RobertaModel, hf.RobertaConfig(**SIZE, pad_token_id=0)),
        "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**image)),
    }
    return made[kind]()


KINDS = ("bert", "classifier", "distilbert", "gpt2", "t5", "llama", "roberta", "vit")


def tiny(kind: str, form: str = "eager") -> tuple[Any, dict[str, Tensor]]:
    """A float64 model in evaluation mode, and inputs for three examples, one of them padded."""
    model_class, config = _made(kind)
    config._attn_implementation = form
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).double().eval()
        # Large enough that layers differ, and the answer depends on them.
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0, 0.3)
        if kind == "vit":
            return model, {"pixel_values": torch.randn(3, 3, 24, 24, dtype=torch.float64)}
        ids, mask = torch.randint(5, 90, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


def eager_attention(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the model itself returns of its attention, in the form that keeps it."""
    form = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found: tuple[Tensor, ...] = model(**inputs, output_attentions=True).attentions
        return found
    finally:
        model.set_attn_implementation(form)
