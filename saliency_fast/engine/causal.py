"""Causal: whether a model predicts the token that follows, which "predicted" then means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saliency_fast.engine.bind import Call
from saliency_fast.engine.way import Model, function_of
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.targets import read_of

_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def following(model: Model, call: Call) -> Call:
    """The call, where its target is "predicted" and the model a causal language model with the
    token that is predicted behind each text's last one as its target.
    """
    targets, ids = call.targets, call.inputs[0]
    if not targets.predicted or targets.position is not None:
        return call
    if not isinstance(model, nn.Module) or ids.is_floating_point() or ids.dim() != 2:
        return call
    known = _FOUND.setdefault(model, {})
    key = (ids.shape[1], *sorted(call.kwargs))
    if key not in known:
        known[key] = _is_causal(model, call)
    if not known[key]:
        return call
    last = torch.full((call.batch,), -1, device=ids.device)
    return replace(call, targets=replace(targets, position=last))


def _is_causal(model: nn.Module, call: Call) -> bool:
    """Whether outputs are [B, T, V] with V tokens, as tables of embeddings have, and what comes
    later changes nothing of them. Where there is but one token, that is taken for granted.
    """
    ids = call.inputs[0]
    real = call.targets.padding.real
    text = 0 if real is None else int(real.sum(1).argmax())
    row = torch.tensor([text], device=ids.device)
    output = _output(model, call, ids[row], row)
    if output is None or output.dim() != 3 or output.shape[:2] != (1, ids.shape[1]):
        return False
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    if not any(one.num_embeddings == output.shape[2] for one in tables):
        return False
    last = ids.shape[1] - 1 if real is None else int(real[text].nonzero()[-1])
    changed = ids[row].clone()
    changed[0, last] = changed[0, 0] if changed[0, 0] != changed[0, last] else _other(changed, last)
    again = _output(model, call, changed, row)
    assert again is not None
    before, after = output[0, :last].double(), again[0, :last].double()
    size = float(before.abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=0.0, atol=1e-5 * size, equal_nan=True)


def _other(ids: Tensor, place: int) -> Tensor:
    one = ids[0, place]
    return one - 1 if int(one) > 0 else one + 1


@torch.no_grad()
def _output(model: nn.Module, call: Call, ids: Tensor, row: Tensor) -> Tensor | None:
    function = function_of(EagerExecutor(model), call)
    args, kwargs = function.rows(row)
    rest: list[Any] = [x[row] for x in call.inputs[1:]]
    return read_of(function.route([ids.clone(), *rest], args, kwargs))
