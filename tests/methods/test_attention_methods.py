"""Attention weights, rollout and gradient-weighted attention against the papers, slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, NoAttentionError
from saliency_fast.methods.attention import Patches, is_causal
from saliency_fast.model.layout import Axes, Space
from tests import naive_attention
from tests.models import Tokens, make, randn
from tests.transformer_models import eager_attention, tiny

# Rounding of float64 sums; transformers' own softmax is float32 in some models.
FLOAT64, SOFTMAX32 = 1e-10, 1e-5


def near(found: object, expected: Tensor, tolerance: float = FLOAT64) -> None:
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module, inputs: dict[str, Tensor], target: int) -> list[Tensor]:
    """Of the eager model's own attention, by autograd."""
    with torch.enable_grad():
        out = model(**inputs, output_attentions=True)
        score = out[0] if out[0].dim() == 2 else out[0][:, 0]
        return list(torch.autograd.grad(score[:, target].sum(), out.attentions))


def explain(model: nn.Module, inputs: dict[str, Tensor], method: object, target: int = 2) -> Tensor:
    ids, *_ = inputs.values()
    further = {name: value for name, value in inputs.items() if name == "attention_mask"}

    def score(out: object) -> Tensor:
        return (out[0] if out[0].dim() == 2 else out[0][:, 0])[:, target]

    at = None if ids.is_floating_point() else "embeddings"
    return sf.explain(model, ids, target=score, method=method, at=at, forward_kwargs=further).values


@pytest.mark.parametrize("form", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5", "llama"])
def test_tokens_against_the_papers(kind: str, form: str) -> None:
    model, inputs = tiny(kind, form)
    layers = [one.detach() for one in eager_attention(model, inputs)]
    for query, row in ((1, 1), (-1, 8)):
        mean = layers[1].mean(1)[:, row]
        near(explain(model, inputs, sf.AttentionWeights(layer=1, query=query)), mean, SOFTMAX32)
        rolled = naive_attention.rollout(layers)[:, row]
        near(explain(model, inputs, sf.AttentionRollout(query=query)), rolled, SOFTMAX32)
    model.set_attn_implementation("eager")
    expected = naive_attention.relevance(layers, gradients(model, inputs, 2))
    model.set_attn_implementation(form)
    near(explain(model, inputs, sf.GradientAttention(query=0)), expected[:, 0], SOFTMAX32)
    found = explain(model, inputs, sf.GradientAttention(query="mean"))
    near(found, expected.mean(1), SOFTMAX32)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.4])
@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_rollout_options(fusion: str, discard: float, residual: float) -> None:
    model, inputs = tiny("bert")
    layers = [one.detach() for one in eager_attention(model, inputs)]
    expected = naive_attention.rollout(layers, residual, fusion, discard)[:, 0]
    method = sf.AttentionRollout(residual=residual, fusion=fusion, discard=discard)
    # No rows of nothing: their mean is not defined.
    keep = expected.isfinite().all(1)
    near(explain(model, inputs, method)[keep], expected[keep])


def test_float_tokens_and_targets() -> None:
    model, x = make(Tokens), randn(3, 6, 8)
    y = model.norm(x)
    _, weights = model.attention(y, y, y, average_attn_weights=False)
    found = sf.explain(model, x, target=[0, 3, 1], method="attention_weights")
    near(found.values, weights.mean(1)[:, 0])
    assert found.delta is None
    assert found.error.tolist() == [0, 0, 0]
    # Two targets of each example, of one forward pass.
    both = sf.explain(model, x, target=[[0, 1]] * 3, method="gradient_attention").values
    for place, target in enumerate((0, 1)):
        one = sf.explain(model, x, target=target, method="gradient_attention").values
        near(both[:, place], one)
    (grad,) = torch.autograd.grad(reach(model, x, weights.detach().requires_grad_()), LEAVES)
    expected = naive_attention.relevance([weights.detach()], [grad])[:, 0]
    near(both[:, 0], expected)


LEAVES: list[Tensor] = []


def reach(model: Tokens, x: Tensor, weights: Tensor) -> Tensor:
    """The first class's score from attention on."""
    LEAVES[:] = [weights]
    y = model.norm(x)
    layer = model.attention
    width = y.shape[2]
    v = functional.linear(y, layer.in_proj_weight[2 * width :], layer.in_proj_bias[2 * width :])
    heads = v.view(*v.shape[:2], 2, -1).transpose(1, 2)
    y = layer.out_proj((weights @ heads).transpose(1, 2).flatten(2))
    return model.head((x + y).mean(1))[:, 0].sum()


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_images_get_maps_of_their_size(form: str) -> None:
    model, inputs = tiny("vit", form)
    layers = [one.detach() for one in eager_attention(model, inputs)]
    rolled = naive_attention.rollout(layers)[:, 0, 1:].view(3, 1, 3, 3)
    found = explain(model, inputs, "attention_rollout")
    assert found.shape == (3, 1, 24, 24)
    near(found, functional.interpolate(rolled, (24, 24), mode="bilinear"), SOFTMAX32)
    model.set_attn_implementation("eager")
    expected = naive_attention.relevance(layers, gradients(model, inputs, 2))[:, 0, 1:]
    model.set_attn_implementation(form)
    shown = functional.interpolate(expected.view(3, 1, 3, 3), (24, 24), mode="bilinear")
    near(explain(model, inputs, "gradient_attention"), shown, SOFTMAX32)


@pytest.mark.parametrize(
    ("tokens", "shape", "special", "grid"),
    [
        (197, (2, 3, 224, 224), 1, (14, 14)),
        (198, (2, 3, 224, 224), 2, (14, 14)),
        (201, (2, 3, 224, 224), 5, (14, 14)),
        (196, (2, 3, 224, 224), 0, (14, 14)),
        (197, (2, 3, 230, 230), 1, (14, 14)),
        (393, (2, 3, 224, 448), 1, (14, 28)),
        (28, (2, 1, 48, 48, 48), 1, (3, 3, 3)),
        (6, (2, 6, 8), 0, None),
        (1000, (2, 1, 16000), 0, (1000,)),
    ],
)
def test_patches_are_found(
    tokens: int, shape: tuple[int, ...], special: int, grid: tuple[int, ...] | None
) -> None:
    kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    model, letters = kinds[len(shape)](3, 6, 16, 16), {3: "BTF", 4: "BCHW", 5: "BCDHW"}[len(shape)]
    letters = "BCT" if grid == (1000,) else letters
    found = Patches.of(tokens, Space(shape, Axes(letters)), None, None, model)
    assert found.grid == grid
    assert found.index == tuple(range(special, tokens))


def test_patches_by_hand() -> None:
    weights = torch.arange(9.0).view(1, 9)
    found = Patches.of(9, Space((1, 3, 2, 4), Axes("BCHW")), -1, (2, 4)).map(weights)
    assert found.tolist() == [[[[0, 1, 2, 3], [4, 5, 6, 7]]]]
    assert Patches.of(9, Space((1, 8, 5), Axes("BTF")), 1, None).map(weights).tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8]
    ]
    for grid, special in (((3, 3), 1), ((2, 2), 1), (None, 2)):
        with pytest.raises(InputError, match=r"(9 tokens of|grid does not fit) attention"):
            Patches.of(9, Space((1, 3, 8, 8), Axes("BCHW")), special, grid)


class Pooled(nn.Module):
    """Patches without a class token, mean over all."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        return self.attention(y, y, y, need_weights=False)[0].mean(1)


def test_without_a_class_token_all_tokens_are_asked() -> None:
    model, x = Pooled().double().eval(), randn(2, 3, 8, 12)
    y = model.patches(x).flatten(2).transpose(1, 2)
    weights = model.attention(y, y, y)[1].mean(1).view(2, 1, 2, 3)
    found = sf.explain(model, x, target=1, method=sf.AttentionWeights()).values
    near(found, functional.interpolate(weights.detach(), (8, 12), mode="bilinear"))


def test_causal_models_are_asked_at_their_last_token() -> None:
    model, inputs = tiny("gpt2", "sdpa")
    del inputs["attention_mask"]
    found = explain(model, inputs, sf.AttentionWeights())
    near(found, eager_attention(model, inputs)[-1].detach().mean(1)[:, -1], SOFTMAX32)


def test_what_padding_sees_does_not_matter() -> None:
    heads = torch.full((1, 2, 4, 4), 0.25)
    heads[:, :, 2:] = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    real = torch.tensor([[False, False, True, True]])
    assert not is_causal(heads)
    assert is_causal(heads, real)
    assert not is_causal(heads, ~real)


def test_token_ids_need_no_embeddings_where_no_gradient_is_taken() -> None:
    model, inputs = tiny("bert", "sdpa")
    further = {"attention_mask": inputs["attention_mask"]}

    def rolled(at: str | None) -> Tensor:
        return sf.explain(
            model,
            inputs["input_ids"],
            target=lambda out: out[0][:, 0, 0],
            method="attention_rollout",
            at=at,
            forward_kwargs=further,
        ).values

    near(rolled(None), rolled("embeddings"))


def test_batches_and_launches_do_not_matter() -> None:
    model, inputs = tiny("vit", "sdpa")
    x = inputs["pixel_values"]
    for method in ("attention_rollout", "gradient_attention"):
        whole = sf.explain(model, x, target=1, method=method).values
        cut = sf.explain(model, x, target=1, method=method, points_per_launch=2).values
        near(cut, whole)
        near(sf.explain(model, x[1:2], target=1, method=method).values, whole[1:2])


def test_the_model_is_as_it_was() -> None:
    model, inputs = tiny("vit", "sdpa")
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(InputError, match="query out of range"):
        explain(model, inputs, sf.GradientAttention(query=77))
    explain(model, inputs, "gradient_attention")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors() -> None:
    linear = nn.Linear(8, 2).double()
    with pytest.raises(NoAttentionError, match="no attention to read"):
        sf.explain(linear, randn(2, 8), target=0, method="attention_rollout")
    model, x = make(Tokens), randn(3, 6, 8)
    with pytest.raises(InputError, match=r"layer out of range: got 1, .* 1 layers"):
        sf.explain(model, x, target=0, method=sf.AttentionWeights(layer=1))
    with pytest.raises(InputError, match="one sequence: got 2 inputs"):
        sf.explain(lambda a, b: model(a), (x, x), target=0, method=sf.AttentionRollout())
    for wrong, match in (
        ({"query": "class"}, "query must be one of auto, mean"),
        ({"fusion": "sum"}, "fusion must be one of mean, max, min"),
        ({"residual": 1.0}, "residual must be a share"),
        ({"discard": -0.1}, "discard must be a share"),
        ({"grid": (0, 3)}, "grid must be at least 1"),
    ):
        with pytest.raises(InputError, match=match):
            sf.AttentionRollout(**wrong)
    for wrong in ({"query": 1.5}, {"special": 0.5}, {"discard": "much"}):
        with pytest.raises(InputTypeError):
            sf.AttentionRollout(**wrong)
    with pytest.raises(InputTypeError, match="layer must be a whole number"):
        sf.AttentionWeights(layer="last")


class Windows(nn.Module):
    """Attention of one head within windows of four by four patches."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cut(x).unflatten(3, (-1, 4)).unflatten(2, (-1, 4))
        windows = y.permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        q, k, v = self.mix(windows).chunk(3, -1)
        y = windows + (q @ k.mT).softmax(-1) @ v
        out: Tensor = self.head(y.view(len(x), -1, 8).mean(1))
        return out


@pytest.mark.parametrize("method", ["attention_weights", "attention_rollout", "gradient_attention"])
def test_windows_in_the_batch_are_not_taken_for_heads(method: str) -> None:
    with pytest.raises(InputError, match="over 16 tokens, and the model cuts 64 patches"):
        sf.explain(Windows(), torch.rand(2, 3, 16, 16), target=1, method=method)
    # As large as a window, all is one.
    found = sf.explain(Windows(), torch.rand(2, 3, 8, 8), target=1, method=method)
    assert found.values.shape == (2, 1, 8, 8)
