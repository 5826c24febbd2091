"""Runs a model on shapes alone: what a call would cost, without its arithmetic or its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_map

from saliency_fast._types import Inputs
from saliency_fast.graph.intercept import NotLeanError, unguarded

_META = torch.device("meta")


class OnMeta(TorchFunctionMode):
    """Inside its `with`, calls that take meta tensors take all others as meta tensors too.

    To the model all tensors stand on `device`, so that it takes the way it would take there.
    Calls without any meta tensor run as they are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        # Held with their originals, whose names they go by.
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        body = unguarded(func) if isinstance(func, FunctionType) else None
        if body is not None:
            # Backward passes among them, whose calls must be seen as well.
            with self:
                return body(*args, **(kwargs or {}))
        given = (args, dict(kwargs or {}))
        if not tree_any(_is_meta, given):
            return func(*args, **given[1])
        answer = self._answer(func)
        if answer is not None:
            return answer
        args, named = tree_map(self._moved, given)
        if func is scaled_dot_product_attention and self._device.type == "cpu":
            return _attention(*args, **named)
        return func(*args, **named)

    def _answer(self, func: Callable[..., Any]) -> Any:
        """What a question for the place of a meta tensor is answered."""
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        asked = asked if getattr(func, "__name__", "") == "__get__" else ""
        if asked == "device":
            return self._device
        if asked in ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu"):
            return asked == f"is_{self._device.type}"
        if func in (Tensor.cpu, Tensor.cuda, Tensor.get_device):
            raise NotLeanError("the model moves tensors between devices")
        return None

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.is_meta else self._twin(value)
        if isinstance(value, torch.device) and value.type == self._device.type:
            return _META
        return value

    def _twin(self, tensor: Tensor) -> Tensor:
        found = self._twins.get(id(tensor))
        if found is None:
            # Weights are there already: whoever counts memory is not to see their twins made.
            with _disable_current_modes():
                twin = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META
                )
            # A leaf as weights are: what takes it keeps what it would keep for them.
            found = self._twins[id(tensor)] = tensor, twin.requires_grad_(tensor.requires_grad)
        return found[1]


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As CPUs run it; shapes alone would be served by another kernel, that keeps more."""
    if query.dim() != 4 or dropout_p or enable_gqa:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found


def shapes_only(inputs: Inputs, rows: int) -> Inputs:
    """Points of `rows` rows like `inputs`, without their numbers."""
    return tuple(torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=_META) for x in inputs)
