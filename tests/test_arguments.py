"""Further arguments of a model: whose they are is proved, not read from their length."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_rows import TIGHT, gap
from torch import Tensor, nn

import saliency_fast as sf

METHOD = sf.IntegratedGradients(steps=12, rule="midpoint")


def naive(model: Any, x: Tensor, parts: Any) -> Tensor:
    """Integrated gradients of score 1; parts(row): the further arguments of an example alone."""
    total = torch.zeros_like(x)
    for row in range(len(x)):
        for number in range(12):
            point = ((number + 0.5) / 12 * x[row : row + 1]).requires_grad_()
            (grad,) = torch.autograd.grad(model(point, *parts(row))[0, 1], point)
            total[row] += grad[0] / 12 * x[row]
    return total


class Prompts(nn.Module):
    """Pictures against prompts: [B, P] from [B, F] and [P, F]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 5)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        return torch.tanh(self.net(x)) @ prompts.T


class Adjacency(nn.Module):
    """Graphs [B, N, F] that share an adjacency [N, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.b(torch.tanh(edges @ self.a(x)).mean(1))


class Masked(nn.Module):
    """Sequences [B, T, F] with a mask [B, T] each, and a table [T, F] that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        return (torch.tanh(self.a(x + table)) * mask[..., None]).sum(1)


def whose(seen: Any) -> list[str]:
    """Warnings of arguments that go whole."""
    return [text for one in seen if "sf.PerExample(" in (text := str(one.message))]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("by_name", [False, True])
def test_prompts_that_all_examples_share(rows: int, by_name: bool) -> None:
    model, x = Prompts().double(), torch.randn(rows, 5).double()
    prompts = torch.randn(3, 5).double()
    given: Any = {"forward_kwargs": {"prompts": prompts}} if by_name else {"forward_args": prompts}
    found = sf.explain(model, x, target=1, method=METHOD, **given)
    assert gap(found.values, naive(model, x, lambda row: (prompts,))) < TIGHT


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_an_adjacency_of_as_many_nodes_as_examples(rows: int) -> None:
    model, x = Adjacency().double(), torch.randn(rows, 4, 5).double()
    edges = torch.rand(4, 4).double()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = sf.explain(model, x, target=1, method=METHOD, forward_args=(edges,))
    assert gap(found.values, naive(model, x, lambda row: (edges,))) < TIGHT
    # One row of them is a graph, too, and gives another score.
    assert len(whose(seen)) == (rows == 4)


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_one_argument_of_each_kind(rows: int) -> None:
    model, x = Masked().double(), torch.randn(rows, 4, 5).double()
    mask, table = (torch.rand(rows, 4) > 0.3).double(), torch.randn(4, 5).double()
    found = sf.explain(model, x, target=1, method=METHOD, forward_args=(mask, table))
    expected = naive(model, x, lambda row: (mask[row : row + 1], table))
    assert gap(found.values, expected) < TIGHT


def test_rows_that_are_alike_prove_nothing_for_the_next_call() -> None:
    model, x = Masked().double(), torch.randn(4, 4, 5).double()
    engine, table = sf.Engine(model, METHOD), torch.randn(4, 5).double()
    engine(x, 1, forward_args=(torch.ones(4, 4).double(), table * 0))
    mask = (torch.rand(4, 4) > 0.3).double()
    found = engine(x, 1, forward_args=(mask, table))
    expected = naive(model, x, lambda row: (mask[row : row + 1], table))
    assert gap(found.values, expected) < TIGHT


def test_marks_are_believed_and_checked() -> None:
    model, x = Prompts().double(), torch.randn(3, 5).double()
    prompts = torch.randn(3, 5).double()
    found = sf.explain(model, x, target=1, method=METHOD, forward_args=(sf.Shared(prompts),))
    assert gap(found.values, naive(model, x, lambda row: (prompts,))) < TIGHT
    with pytest.raises(sf.errors.InputError, match="a row for each of the 3 examples"):
        sf.explain(model, x, target=1, forward_args=(sf.PerExample(prompts[:2]),))
    with pytest.raises(sf.errors.InputTypeError, match="marks a tensor"):
        sf.Shared([1, 2, 3])  # type: ignore[arg-type]


def test_marks_of_one_example() -> None:
    model, x = Adjacency().double(), torch.randn(1, 4, 5).double()
    edges = torch.rand(1, 4, 4).double()
    for given in (edges, sf.Shared(edges), sf.PerExample(edges)):
        found = sf.explain(model, x, target=1, method=METHOD, forward_args=(given,))
        assert gap(found.values, naive(model, x, lambda row: (edges,))) < TIGHT


def test_what_cannot_be_proved_is_an_error_with_its_cure() -> None:
    def model(x: Tensor, pairs: list[Tensor]) -> Tensor:
        return x * pairs[0]

    x, pairs = torch.randn(3, 4), [torch.randn(3, 4)]
    with pytest.raises(sf.errors.InputError, match="PerExample"):
        sf.explain(model, x, target=1, forward_args=(pairs,))


@pytest.mark.parametrize("rows", [1, 3])
def test_requests_get_their_own_arguments(rows: int) -> None:
    model = Prompts().double()
    asked = [
        {"inputs": torch.randn(rows, 5).double(), "target": 1, "forward_args": (one,)}
        for one in torch.randn(4, 3, 5).double().unbind()
    ]
    with sf.Engine(model, METHOD, latency=0.05) as engine:
        answers = engine.explain_many(asked)
    for one, answer in zip(asked, answers, strict=True):
        prompts = one["forward_args"][0]
        expected = naive(model, one["inputs"], lambda row, prompts=prompts: (prompts,))
        assert gap(answer.values, expected) < TIGHT


def test_at_layers_arguments_go_where_they_belong() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(self.a(x)))) @ prompts.T

    model, x, prompts = Inside().double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    found = sf.explain(model, x, target=1, method=METHOD, at="a", forward_args=(prompts,))

    def behind(hidden: Tensor, prompts: Tensor) -> Tensor:
        return torch.tanh(model.b(torch.tanh(hidden))) @ prompts.T

    base, hidden = model.a(torch.zeros(1, 5).double()), model.a(x).detach()
    shifted = naive(
        lambda p, q: behind(p + base.detach(), q), hidden - base.detach(), lambda row: (prompts,)
    )
    assert gap(found.values, shifted) < TIGHT


class Trimmed(nn.Module):
    """The mean over as many steps as the longest of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x[:, : int(lengths.max())])).mean(1))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_choice_between_two_numbers_is_told_once(by_name: bool) -> None:
    model, x = Trimmed().double(), torch.randn(3, 5, 4).double()
    lengths = torch.tensor([5, 3, 2])

    def given(value: Any) -> dict[str, Any]:
        return {"forward_kwargs": {"lengths": value}} if by_name else {"forward_args": (value,)}

    engine = sf.Engine(model, METHOD)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine(x, 1, **given(lengths))
        engine(x, 1, **given(lengths))
    (text,) = whose(seen)
    assert "goes whole to every example" in text
    single_row, whole = float(model(x[1:2], lengths[1:2])[0, 1]), float(model(x, lengths)[1, 1])
    name = "forward_kwargs['lengths']" if by_name else "forward_args[0]"
    for words in (name, f"{single_row:.6g}", f"{whole:.6g}", "sf.Shared(tensor)", "sf.PerExample("):
        assert words in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = engine(x, 1, **given(sf.Shared(lengths)))
    assert gap(shared.values, naive(model, x, lambda row: (lengths,))) < TIGHT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = engine(x, 1, **given(sf.PerExample(lengths)))
    assert gap(own.values, naive(model, x, lambda row: (lengths[row : row + 1],))) < TIGHT


def test_rows_that_are_alike_are_told_of_once() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return torch.tanh(x) * weights.sum()

    engine, x = sf.Engine(Sum().double(), METHOD), torch.randn(3, 4).double()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            engine(x, 1, forward_args=(torch.ones(3).double(),))
    assert len(whose(seen)) == 1


def test_where_one_choice_alone_runs_there_is_nothing_to_tell() -> None:
    model, x = Prompts().double(), torch.randn(3, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.explain(model, x, target=1, method=METHOD, forward_args=(torch.randn(3, 5).double(),))
