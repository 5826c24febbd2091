"""Positions are counted among a text's own tokens: a text alone, and padded among others."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, SaliencyError
from saliency_fast.model.targets import read_targets

VOCABULARY, PAD = 23, 0
TEXTS = ([3, 9, 4, 11, 7], [5, 2], [8, 6, 12])


class Language(nn.Module):
    """A language model [B, T, V] of one attention; its positions do not count padding."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.tokens = nn.Embedding(VOCABULARY, 8).double()
        self.places = nn.Embedding(16, 8).double()
        self.keys, self.values = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.head = nn.Linear(8, VOCABULARY).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        place = (real.cumsum(1) - 1).clamp_min(0)
        x = self.tokens(input_ids) + self.places(place)
        seen = real[:, None, :].expand(-1, x.shape[1], -1)
        if self.causal:
            seen = seen & torch.ones_like(seen).tril()
        # A place without any token before it looks at itself.
        seen = seen | torch.eye(x.shape[1], dtype=torch.bool)
        weights = (x @ self.keys(x).mT).masked_fill(~seen, -1e9).softmax(2)
        return self.head(torch.tanh(x + weights @ self.values(x)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Language().eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, TEXTS))
    ids, mask = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.int64)
    for number, text in enumerate(TEXTS):
        start = width - len(text) if side == "left" else 0
        own = slice(start, start + len(text))
        ids[number, own], mask[number, own] = torch.tensor(text), 1
    return ids, mask


TARGETS: dict[str, Any] = {
    "the last token": (-1, 5),
    "the one before": (-2, 5),
    "the first": (0, 5),
    "the second": (1, 5),
    "the last, all of the vocabulary": (-1,),
    "the last, some of it": (-1, slice(2, 7)),
    "the last two": (slice(-2, None), 5),
    "all but the last": (slice(None, -1), 5),
    "all": (slice(None), 5),
    "all, by dots": (..., 5),
    "every other": (slice(None, None, 2), 5),
    "next": sf.NextToken(5),
    "next, of several": sf.NextToken([[5, 9]] * 3),
    "next, one each": sf.NextToken([5, 9, 2]),
    "next, the likeliest": sf.NextToken(),
    "behind the first": sf.NextToken(5, position=0),
    "behind another in each": sf.NextToken(5, position=[-1, 0, -2]),
    "predicted": "predicted",
    "a place for each": [(-1, 5), (0, 2), (-2, 7)],
}


def alone(target: Any, number: int) -> Any:
    """What a target of three texts is for one of them."""
    if isinstance(target, list):
        return target[number : number + 1]
    if isinstance(target, sf.NextToken):
        position = target.position
        token = (
            target.token[number : number + 1] if isinstance(target.token, list) else target.token
        )
        return sf.NextToken(token, [position[number]] if isinstance(position, list) else position)
    return target


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "feature_ablation"])
@pytest.mark.parametrize("how", ["kwargs", "args"])
def test_a_text_alone_and_padded(model, side: str, name: str, method: str, how: str) -> None:
    ids, mask = padded(side)
    own: dict[str, Any] = {} if method == "feature_ablation" else {"at": "embeddings"}
    further = (
        {"forward_args": mask} if how == "args" else {"forward_kwargs": {"attention_mask": mask}}
    )
    if method != "gradient":
        own["baseline"] = torch.where(mask.bool(), 1, ids)
    together = sf.explain(model, ids, target=TARGETS[name], method=method, **own, **further)
    for number, text in enumerate(TEXTS):
        one = torch.tensor([text])
        if method != "gradient":
            own["baseline"] = torch.ones_like(one)
        right = sf.explain(model, one, target=alone(TARGETS[name], number), method=method, **own)
        got, axis = together.values[number], 1 if together.many else 0
        got = got.movedim(axis, 0)[mask[number].bool()].movedim(0, axis)
        torch.testing.assert_close(got, right.values[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together.scores[number], right.scores[0], rtol=1e-9, atol=0)
        if right.classes is not None:
            assert together.classes[number].tolist() == right.classes[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_against_the_gradient_by_hand(model, side: str) -> None:
    ids, mask = padded(side)
    found = sf.explain(
        *(model, ids),
        target=sf.NextToken(),
        method="gradient",
        at="embeddings",
        forward_kwargs={"attention_mask": mask},
    )
    for number, text in enumerate(TEXTS):
        kept: list[Tensor] = []

        def keep(_: Any, __: Any, out: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(out.detach().requires_grad_())
            return kept[0]

        hook = model.tokens.register_forward_hook(keep)
        out = model(torch.tensor([text]))[0, -1]
        hook.remove()
        (right,) = torch.autograd.grad(out.max(), kept)
        torch.testing.assert_close(found.values[number][mask[number].bool()], right[0])
        assert int(found.classes[number]) == int(out.argmax())


def test_a_mask_of_the_users_own(model) -> None:
    """For models that call it something else."""
    ids, mask = padded("right")

    def named(ids: Tensor, valid: Tensor) -> Tensor:
        return model(ids, attention_mask=valid)

    own = {"method": "feature_ablation", "forward_args": mask}
    found = sf.explain(named, ids, target=sf.NextToken(5, mask=mask), **own)
    right = sf.explain(
        *(model, ids),
        target=sf.NextToken(5),
        method="feature_ablation",
        forward_kwargs={"attention_mask": mask},
    )
    torch.testing.assert_close(found.values, right.values)


def test_pytorchs_own_mask_is_true_at_padding(model) -> None:
    ids, mask = padded("left")

    class Named(nn.Module):
        def forward(self, ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return model(ids, attention_mask=~src_key_padding_mask)

    further = {"forward_kwargs": {"src_key_padding_mask": mask == 0}}
    found = sf.explain(Named(), ids, target=(-2, 5), method="feature_ablation", **further)
    further = {"forward_kwargs": {"attention_mask": mask}}
    right = sf.explain(model, ids, target=(-2, 5), method="feature_ablation", **further)
    torch.testing.assert_close(found.values, right.values)


class Encodes(nn.Module):
    """An encoder and a decoder: outputs are as long as what is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rest = nn.Embedding(VOCABULARY, 8), Language()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        held = (self.tokens(input_ids) * attention_mask[..., None]).sum(1, keepdim=True)
        return self.rest(decoder_input_ids) + held.tanh().sum(2, keepdim=True).double()


@pytest.mark.parametrize("length", [5, 3])
def test_positions_of_a_decoder_are_no_positions_of_the_encoder(length: int) -> None:
    torch.manual_seed(0)
    own, (ids, mask) = Encodes().eval(), padded("right")
    further = {"attention_mask": mask, "decoder_input_ids": torch.randint(1, 20, (3, length))}
    found = sf.explain(own, ids, target=(-1, 5), method="feature_ablation", forward_kwargs=further)
    with torch.no_grad():
        right = own(ids, **further)[:, -1, 5]
    torch.testing.assert_close(found.scores, right)


def test_what_is_no_sequence_is_left_alone() -> None:
    """Classes, heads and pixels have no padding, whatever their number."""
    ids, mask = padded("left")

    class Heads(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shape, self.table = shape, torch.randn(VOCABULARY, *shape).double()

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            keep = attention_mask.view(*ids.shape, *(1,) * len(self.shape))
            return (self.table[ids] * keep).sum(1)

    further = {"method": "feature_ablation", "forward_kwargs": {"attention_mask": mask}}
    for shape, target in (((4,), 2), ((4,), (-1,)), ((3, 4), (1, 2)), ((5,), 3)):
        one = Heads(*shape)
        found = sf.explain(one, ids, target=target, **further)
        parts = target if isinstance(target, tuple) else (target,)
        right = one(ids, mask)[(slice(None), *parts)]
        torch.testing.assert_close(found.scores, right)


def test_where_it_is_in_doubt_the_error_names_the_cure(model) -> None:
    ids, mask = padded("right")
    further = {"method": "feature_ablation"}

    def fails(words: str, model: Any, target: Any, **more: Any) -> None:
        with pytest.raises(SaliencyError, match=words):
            sf.explain(model, ids, target=target, **further, **more)

    named = nn.Embedding(VOCABULARY, 4, padding_idx=PAD).double()
    cure = r"sf\.NextToken\(token, position, mask"
    # Padding in the ids, and no mask.
    fails(f"token id 0.*{cure}", named, (-1, 2))
    fails(f"token id 0.*{cure}", named, sf.NextToken(2))
    assert sf.explain(named, ids, target=(0, 2), **further).scores.shape == (3,)
    # Masks and lengths by other names.
    fails(f"'valid_mask'.*{cure}", lambda x, valid_mask: model(x), (-1, 2), forward_args=mask)
    fails(f"'lengths'.*{cure}", lambda x, lengths: model(x), (-1, 2), forward_args=mask.sum(1))
    causal = mask[:, None, None, :].expand(-1, 1, 5, 5)
    kwargs = {"forward_kwargs": {"attention_mask": causal}}
    fails(cure, lambda x, attention_mask: model(x), (-1, 2), **kwargs)
    # Outputs longer than the mask, and as many classes as places.
    kwargs = {"forward_kwargs": {"attention_mask": mask}}

    def longer(x: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.cat([model(x, attention_mask)] * 2, 1)

    fails(f"10 places and the attention mask 5.*{cure}", longer, (-1, 2), **kwargs)

    def classes(x: Tensor, attention_mask: Tensor) -> Tensor:
        return model(x, attention_mask)[:, 0, :5]

    fails("classes or tokens", classes, (-1,), **kwargs)
    fails("example 1 has 2 tokens", model, (-3, 2), **kwargs)
    fails("example 1 has 2 tokens", model, sf.NextToken(2, position=2), **kwargs)
    fails("example 1 has 2 tokens", model, [(0, 1), (2, 1), (0, 1)], **kwargs)
    fails("expected 0 to 22", model, sf.NextToken(23), **kwargs)
    fails("returns .B, T, V.", classes, sf.NextToken(2), **kwargs)


def test_predicted_is_the_next_token_of_causal_models_alone() -> None:
    torch.manual_seed(0)
    ids, mask = padded("right")
    both = Language(causal=False).eval()
    kwargs = {"method": "feature_ablation", "forward_kwargs": {"attention_mask": mask}}
    with pytest.raises(InputError, match="NextToken"):
        sf.explain(both, ids, target="predicted", **kwargs)
    found = sf.explain(both, ids, target=sf.NextToken(), **kwargs)
    assert found.classes.tolist() == both(ids, mask)[range(3), [4, 1, 2]].argmax(1).tolist()


def test_records_of_next_tokens_are_computed_again(model, tmp_path) -> None:
    ids, mask = padded("left")
    kwargs = {"forward_kwargs": {"attention_mask": mask}}
    found = sf.explain(model, ids, target="predicted", method="feature_ablation", **kwargs)
    path = found.save(tmp_path / "found.safetensors")
    assert sf.replay(path, model, ids, **kwargs).agrees


def test_next_tokens_are_checked() -> None:
    for target, error, words in (
        (sf.NextToken("cat"), InputError, "explain_tokens"),
        (sf.NextToken(None), InputTypeError, "token must be"),
        (sf.NextToken((1, 2)), InputTypeError, "token must be"),
        (sf.NextToken(-1), InputError, "out of range"),
        (sf.NextToken(2, position="last"), InputError, "the only name"),
        (sf.NextToken(2, position=[1]), InputError, "wrong length"),
        (sf.NextToken(2, mask=torch.ones(2, 3, 4)), InputError, "mask must be bool"),
        (sf.NextToken(2, mask=torch.tensor([[0, 2], [1, 1]])), InputError, "mask must be bool"),
    ):
        with pytest.raises(error, match=words):
            read_targets(target, 2)
    with pytest.raises(InputTypeError, match="mask must be a tensor"):
        sf.NextToken(2, mask=[[1, 1]])  # type: ignore[arg-type]


def test_rows_of_ones_and_zeros_are_no_classes() -> None:
    f, x = (lambda v: v @ torch.arange(15.0).view(5, 3)), torch.randn(2, 5)
    with pytest.raises(InputTypeError, match="argmax"):
        sf.explain(f, x, target=torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    with pytest.raises(InputTypeError, match="long"):
        sf.explain(f, x, target=torch.tensor([2.0, 1.0]))
    with pytest.raises(InputError, match="one-hot"):
        sf.explain(f, x, target=torch.tensor([[0, 0, 1], [0, 1, 0]]))
    assert sf.explain(f, x, target=[[0, 1, 2]] * 2, method="gradient").values.shape == (2, 3, 5)
