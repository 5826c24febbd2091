"""at="embeddings": the tables whose ids come from the explained input, whatever bears the name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, ModelError
from saliency_fast.model.layers import embeddings
from tests.transformer_models import tiny


@pytest.mark.parametrize(
    "kind", ["bert", "classifier", "distilbert", "gpt2", "t5", "llama", "roberta"]
)
def test_the_layer_that_runs_is_found(kind: str) -> None:
    model, inputs = tiny(kind)
    (layer,) = embeddings(model, lambda: model(**inputs), (inputs["input_ids"],))
    assert isinstance(layer, nn.Embedding)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], inputs["input_ids"])


class Places(nn.Embedding):
    """A table of positions that is given the tokens themselves, as BART's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))


class Tables(nn.Module):
    """Tables of positions and of types first, then whatever a case looks up."""

    def __init__(self, forward: Callable[[Tables, Tensor], Tensor]) -> None:
        super().__init__()
        self.positions, self.types = nn.Embedding(12, 4), nn.Embedding(12, 4)
        self.places = Places(12, 4)
        self.words, self.more = nn.Embedding(30, 4), nn.Embedding(30, 2)
        self.bag, self.cell = nn.EmbeddingBag(30, 4), nn.RNNCell(4, 4)
        self.own, self.head = forward, nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.own(self, ids).tanh())


def _placed(model: Tables, ids: Tensor) -> Tensor:
    """The positions and types of tokens, which follow from shapes and from what is padding."""
    real = ids.ne(0).long()
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    kinds = model.types(torch.zeros_like(ids)) + model.types((ids > 5).long())
    return (
        model.places(ids) + model.positions(places) + model.positions(real.cumsum(1) * real) + kinds
    )


def _one(change: Callable[[Tensor], Tensor]) -> Callable[[Tables, Tensor], Tensor]:
    return lambda model, ids: (_placed(model, ids) + model.words(change(ids))).mean(1)


def _written(ids: Tensor) -> Tensor:
    shifted = torch.zeros_like(ids)
    shifted[:, 1:] = ids[:, :-1]
    return shifted


WORDS = ["words"]
CASES: dict[str, tuple[Callable[[Tables, Tensor], Tensor], list[str]]] = {
    "as they are": (_one(lambda ids: ids), WORDS),
    "moved": (_one(lambda ids: ids.T.contiguous().T.flip(1)), WORDS),
    "with an offset": (_one(lambda ids: ids + torch.arange(ids.shape[1])), WORDS),
    "written": (_one(_written), WORDS),
    "masked": (_one(lambda ids: torch.where(ids == 3, torch.zeros_like(ids), ids)), WORDS),
    "cast": (_one(lambda ids: ids.float().int().long()), WORDS),
    "a bag": (lambda model, ids: model.bag(ids), ["bag"]),
    "two tables": (
        lambda model, ids: model.words(ids).mean(1) + model.more(ids).sum((1, 2))[:, None],
        ["words", "more"],
    ),
    "columns": (
        lambda model, ids: (
            torch.cat([model.more(ids[:, 0]), model.more(ids[:, 2])], 1) * model.words(ids[:, 1])
        ),
        ["more:0", "more:1", "words"],
    ),
    "one of two calls": (
        lambda model, ids: model.words(ids).mean(1) * model.words(torch.ones_like(ids)).mean(1),
        ["words:0"],
    ),
    "the other of two calls": (
        lambda model, ids: model.words(torch.ones_like(ids)).mean(1) * model.words(ids).mean(1),
        ["words:1"],
    ),
}


def _made(case: str) -> Tables:
    torch.manual_seed(0)
    return Tables(CASES[case][0]).eval().double()


def _ids() -> Tensor:
    return torch.tensor([[4, 7, 2, 9, 0], [1, 8, 6, 3, 3]])


@pytest.mark.parametrize("case", CASES)
def test_tables_of_the_explained_input(case: str) -> None:
    model, ids, steps = _made(case), _ids(), 8
    method = sf.IntegratedGradients(steps=steps, rule="midpoint")
    found = sf.explain(model, ids, target=1, method=method, at="embeddings", baseline=ids * 0 + 5)
    assert found.provenance.at == CASES[case][1]
    values = found.values if isinstance(found.values, tuple) else (found.values,)
    for one, expected in zip(values, _by_hand(model, ids, ids * 0 + 5, case, steps), strict=True):
        assert float((one - expected).norm()) <= 1e-9 * float(expected.norm())
    # The names in a record find the same layers.
    again = sf.explain(
        model, ids, target=1, method=method, at=found.provenance.at, baseline=ids * 0 + 5
    )
    pairs = zip(values, again.values if len(values) > 1 else (again.values,), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def _by_hand(model: Tables, ids: Tensor, start: Tensor, case: str, steps: int) -> list[Tensor]:
    """Integrated gradients with the lookups of a case answered from lists."""
    wanted = [one.partition(":")[::2] for one in CASES[case][1]]

    def run(given: Tensor, instead: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        seen: dict[int, Tensor] = {}
        counts: dict[str, int] = {}

        def hooked(name: str) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Any:
                call = counts[name] = counts.get(name, -1) + 1
                for number, (own, which) in enumerate(wanted):
                    if own == name and which in ("", str(call)):
                        seen[number] = output
                        return None if instead is None else instead[number]
                return None

            return hook

        names = {own for own, _ in wanted}
        handles = [getattr(model, name).register_forward_hook(hooked(name)) for name in names]
        raw = model(given)
        for one in handles:
            one.remove()
        return raw, [seen[number].detach() for number in range(len(wanted))]

    (_, ends), (_, starts) = run(ids, None), run(start, None)
    total = [torch.zeros_like(one) for one in ends]
    for step in range(steps):
        share = (step + 0.5) / steps
        points = [(b + share * (a - b)).requires_grad_() for a, b in zip(ends, starts, strict=True)]
        grads = torch.autograd.grad(run(ids, points)[0][:, 1].sum(), points)
        total = [a + b / steps for a, b in zip(total, grads, strict=True)]
    return [t * (a - b) for t, a, b in zip(total, ends, starts, strict=True)]


def test_two_texts_through_one_encoder() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = _made("as they are")

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cosine_similarity(self.encoder(a), self.encoder(b))

    model, a, b = Two().double().eval(), _ids(), _ids()[:, :3] + 4
    method = sf.IntegratedGradients(steps=256)
    found = sf.explain(model, (a, b), method=method, at="embeddings", baseline=(a * 0, b * 0))
    assert found.provenance.at == ["encoder.words:0", "encoder.words:1"]
    assert [one.shape for one in found.values] == [(2, 5, 4), (2, 3, 4)]
    assert float(found.delta.abs().max()) < 1e-4
    # One text by the number of its call.
    alone = sf.explain(model, (a, b), method=method, at="encoder.words:1", baseline=(a * 0, b * 0))
    assert alone.values.shape == (2, 3, 4)


def test_no_table_of_the_input() -> None:
    torch.manual_seed(0)
    model = Tables(lambda model, ids: _placed(model, ids).mean(1)).eval().double()
    with pytest.raises(InputError, match="gets ids from the explained input: it has 'positions'"):
        sf.explain(model, _ids(), target=1, at="embeddings", baseline=0)


def test_a_baseline_that_goes_past_the_layer() -> None:
    model, ids = _made("as they are"), _ids()
    with pytest.warns(UserWarning, match="changes the score and not what types:0 gives"):
        sf.explain(model, ids, target=1, at="types:0", baseline=ids + 6)


def test_a_call_that_does_not_come() -> None:
    with pytest.raises(ModelError, match="did not run as often"):
        sf.explain(_made("as they are"), _ids(), target=1, at="words:3", baseline=_ids() + 1)
