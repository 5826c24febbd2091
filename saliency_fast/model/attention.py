"""Attention probabilities of a model that keeps none, on the autograd graph.

A function mode sees each call while the model runs: fused attention is computed step by step, so
that its probabilities exist, and attention that is written out is found by what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from saliency_fast.errors import ModelError, NoAttentionError
from saliency_fast.graph.intercept import Calls
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.provenance import Variation, among, variations
from saliency_fast.model.recomputation import without_recomputation

LOOKED_FOR = (
    "looked for scaled_dot_product_attention, nn.MultiheadAttention, and softmax over the last "
    "axis of [B, heads, T, T] whose result is the left operand of a matrix product"
)
CURE = (
    "pass the model as it is before torch.compile, and one with FlexAttention or flash-attn "
    "kernels in its 'sdpa' or 'eager' form (attn_implementation= in transformers)"
)

_FUSED = functional.scaled_dot_product_attention
_MULTIHEAD = functional.multi_head_attention_forward
_SOFTMAX = (torch.softmax, Tensor.softmax, torch.special.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_EINSUM = torch._VF.einsum  # type: ignore[attr-defined]
_KEEPS = frozenset(
    "dropout alpha_dropout feature_dropout to type type_as float double half bfloat16 contiguous "
    "clone view reshape flatten unflatten squeeze unsqueeze masked_fill mul div __mul__ __rmul__ "
    "__truediv__ multiply divide nan_to_num where".split()
)
"""Calls that give probabilities again, as they were, or some of them cut or scaled."""
_OPAQUE = ("attention", "flash_attn", "attn_fwd")


class AttentionTaps:
    """Takes the probabilities of every self-attention layer while a model runs.

    Layers count in the order in which they run. Cross-attention and pooling by attention, whose
    maps are not square, are passed over; dropout of fused attention is off.

    Args:
        special: Tokens beside those of the input, leading ones or, where negative, trailing ones.
        grid: The rows and columns of a picture's tokens, where they are told.
    """

    def __init__(self, special: int | None = None, grid: tuple[int, ...] | None = None) -> None:
        self._special, self._grid = special or 0, grid
        # Which layers count, once a row has been looked at.
        self._own: list[bool] | None = None

    def look(self, run: Callable[[tuple[Tensor, ...]], Any], rows: tuple[Tensor, ...]) -> None:
        """Finds the layers whose queries and keys are the tokens of the explained input, from runs
        with one row: `rows`, and others.
        """
        if self._own is not None or len(rows) != 1:
            return
        (x,) = rows
        plain, every = _Watched(reading=True), list[tuple[Variation, list[Tensor]]]()
        with torch.no_grad():
            _run(plain, lambda: run((x.clone(),)))
            for change in variations(x, self._grid is None):
                mode = _Watched(reading=True, frozen=plain.products)
                _run(mode, lambda points=change.points: run((points,)))  # type: ignore[misc]
                if len(mode.logits) != len(plain.logits):
                    raise NoAttentionError(
                        "attention layers come and go with the input's values, so which of them "
                        "are over its tokens cannot be told; use a method that does not read "
                        "attention"
                    )
                every.append((change, mode.logits))
        found = []
        for number, before in enumerate(plain.logits):
            own = [(change, several[number]) for change, several in every]
            found.append(among(x, before, own, self._special))
        self._own = found

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `call` returns, and [R, heads, T, T] of each layer, where gradients can be taken.

        Raises NoAttentionError where no self-attention is met, one that is not over all of an
        example's tokens, or none that is over those of the explained input.
        """
        mode = _Watched()
        raw = _run(mode, call)
        return raw, _square(mode, raw, self._own)

    def need(self, reached: Sequence[bool]) -> None:
        """Raises ModelError where gradients reach none of the layers."""
        if not any(reached):
            raise ModelError(
                "the explained score does not depend on any attention of the model, or is not "
                "differentiable: use AttentionRollout, or a method that does not read attention"
            )


def _run(mode: _Watched, call: Callable[[], Any]) -> Any:
    try:
        with uncompiled(), without_recomputation(), mode:
            return call()
    except Exception as error:
        # FlexAttention compiles itself, and cannot with a mode that watches.
        if type(error).__module__.startswith("torch._dynamo"):
            raise NoAttentionError(f"attention inside compiled code is not seen: {CURE}") from error
        raise


def _square(mode: _Watched, raw: Any, own: Sequence[bool] | None) -> list[Tensor]:
    found = [one for one in mode.found if one.shape[2] == one.shape[3]]
    if not found:
        shapes = sorted({str(list(one.shape)) for one in mode.found})
        met = f"; met only {', '.join(shapes)}, which is not self-attention" if shapes else ""
        raise NoAttentionError(f"the model has no attention to read: {LOOKED_FOR}{met}; {CURE}")
    if own is not None and len(own) == len(mode.found):
        kept = [one for one, mine in zip(mode.found, own, strict=True) if mine]
        if not kept:
            shapes = sorted({str(list(one.shape)) for one in found})
            raise NoAttentionError(
                "the model has no attention among the tokens of the explained input: queries and "
                f"keys of {', '.join(shapes)} are other tokens, as in a decoder or the tower of "
                "another input, or each of them depends on all tokens before any attention; "
                "explain the part of the model that reads these tokens, or use a method that does "
                "not read attention"
            )
        found = kept
    for one in found:
        rows = {mode.rows, *(len(x) for x in tree_leaves(raw)[:1] if _has_rows(x))}
        if len(one) not in rows:
            raise NoAttentionError(
                f"attention is over parts of an example, such as windows: got {list(one.shape)} "
                f"for {mode.rows} examples, expected [{mode.rows}, heads, T, T]; use a method "
                "that does not read attention"
            )
    if len({one.shape[2] for one in found}) > 1:
        counts = ", ".join(str(one.shape[2]) for one in found)
        raise NoAttentionError(
            f"attention layers are over different numbers of tokens: got {counts}, so that one's "
            "tokens are not the next one's; use a method that does not read attention"
        )
    return found


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


class _Watched(Calls):
    """Notes attention probabilities as the model's calls go by."""

    def __init__(self, *, reading: bool = False, frozen: Sequence[Tensor] | None = None) -> None:
        """reading: notes `logits` before the softmax of each layer, and `products` of probabilities
        and values; frozen: products of another run, which stand in the place of this one's.
        """
        super().__init__()
        # Those that are looked at come one by one.
        self.rows: int | None = 1 if reading else None
        self.found: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.products: list[Tensor] = []
        self._reading, self._frozen = reading, frozen
        self._heads: int | None = None
        # By identity, with the tensors themselves, so that no number is used twice.
        self._soft: dict[int, tuple[Tensor, Tensor]] = {}
        self._tapped: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not _MULTIHEAD:
            return super().__torch_function__(func, types, args, kwargs)
        before, self._heads = self._heads, (kwargs or {}).get("num_heads") or args[4]
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self._heads = before

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if self.rows is None:
            self.rows = _rows((*args, *kwargs.values()))
        if func is _FUSED:
            return self._fused(args, kwargs)
        if func in _PRODUCT:
            left, right, *rest = *args, *kwargs.values()
            if not rest and self._is_attention(left, right):
                return self._mixed(super().call(func, (self._tap(left), right), {}))
            return super().call(func, args, kwargs)
        if func is _EINSUM:
            operands = self._contracted(*args)
            result = super().call(func, (args[0], operands), kwargs)
            tapped = any(a is not b for a, b in zip(operands, args[1], strict=True))
            return self._mixed(result) if tapped else result
        name = getattr(func, "__name__", None) or str(func)
        if any(word in name for word in _OPAQUE):
            raise NoAttentionError(f"{name} keeps no attention probabilities: {LOOKED_FOR}; {CURE}")
        result = super().call(func, args, kwargs)
        if func in _SOFTMAX:
            given = args[0] if args else kwargs["input"]
            self._note(result, given, kwargs["dim"] if "dim" in kwargs else args[1])
        elif name in _KEEPS and isinstance(result, Tensor):
            before = self._before(args, result)
            if before is not None:
                self._soft[id(result)] = result, before
        return result

    def _mixed(self, result: Tensor) -> Tensor:
        """What attention hands on, or what it handed on in the run that is frozen."""
        if not self._reading:
            return result
        number = len(self.products)
        if self._frozen is not None and number < len(self._frozen):
            kept = self._frozen[number]
            result = kept.clone() if kept.shape == result.shape else result
        self.products.append(result.detach().clone() if self._frozen is None else result)
        return result

    def _note(self, result: Tensor, logits: Tensor, axis: object) -> None:
        """Remembers what may turn out as attention."""
        if result.dim() in (3, 4) and axis in (-1, result.dim() - 1):
            self._soft[id(result)] = result, logits

    def _before(self, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        """The logits of the probabilities among the arguments, if a result is these again."""
        for one in args:
            if (
                id(one) in self._soft
                and one.shape[-2:] == result.shape[-2:]
                and one.numel() == result.numel()
            ):
                return self._soft[id(one)][1]
        return None

    def _is_attention(self, left: Tensor, right: Tensor) -> bool:
        """Whether probabilities weigh values that each example has of its own.

        Else it is a mixture of prototypes or experts: weights have no batch axis.
        """
        if id(left) not in self._soft or left.dim() not in (3, 4) or right.dim() != left.dim():
            return False
        pairs = zip(left.shape[:-2], right.shape[:-2], strict=True)
        if any(a != b and b != 1 for a, b in pairs) or len(left) != len(right):
            return False
        return left.dim() == 4 or self._split(len(left)) is not None

    def _contracted(self, equation: Any, given: Any) -> list[Any]:
        """The operands of an einsum, those that are attention in it as noted."""
        operands: list[Any] = list(given)
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
            return operands
        sides, out = equation.replace(" ", "").split("->")
        terms = sides.split(",")
        for number, one in enumerate(operands):
            key, other = terms[number][-1], terms[1 - number]
            if id(one) not in self._soft or one.dim() not in (3, 4):
                continue
            batch = terms[number][0] == other[0] and len(one) == len(operands[1 - number])
            whole = one.dim() == 4 or self._split(len(one)) is not None
            if batch and whole and key in other and key not in out:
                operands[number] = self._tap(one)
        return operands

    def _split(self, length: int) -> int | None:
        """The examples in the leading axis of [B * heads, T, T]."""
        if self._heads is not None:
            return length // self._heads
        return self.rows if self.rows and length % self.rows == 0 else None

    def _tap(self, weights: Tensor, logits: Tensor | None = None) -> Tensor:
        """Notes probabilities; returns the tensor that the model must go on with."""
        if id(weights) in self._tapped:
            return self._tapped[id(weights)][1]
        given = weights
        if self._reading:
            before = self._soft[id(weights)][1] if logits is None else logits
            self.logits.append(before.detach().clone())
        if not weights.requires_grad:
            # Also where another mode runs what does not depend on points without autograd.
            with torch.enable_grad():
                anchor = torch.zeros((), requires_grad=True, device="cpu")
                weights = _OnGraph.apply(weights, anchor)  # type: ignore[no-untyped-call]
        if weights.dim() == 4:
            self.found.append(weights)
        else:
            rows = self._split(len(weights)) or 1
            heads = weights.reshape(rows, -1, *weights.shape[1:])
            self.found.append(heads)
            weights = heads.reshape(given.shape)
        self._tapped[id(given)] = given, weights
        return weights

    def _fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        query: Tensor = args[0] if args else kwargs["query"]
        known = query.dim() == 4 or (query.dim() == 3 and self._split(len(query)) is not None)
        if not known or query.is_nested:
            raise NoAttentionError(
                "attention must be over [B, heads, T, E]: got scaled_dot_product_attention of "
                f"{list(query.shape) if not query.is_nested else 'a nested tensor'}"
            )
        logits, value = super().call(scaled_products, args, kwargs)
        weights = torch._safe_softmax(logits, -1, dtype=logits.dtype)
        return self._mixed(self._tap(weights, logits) @ value)


class _OnGraph(torch.autograd.Function):
    """Lets a gradient be taken of what depends on nothing that asks for one."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, anchor: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


def scaled_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The logits of `scaled_dot_product_attention`, masked, and its values, one per head."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(times, -3) for one in (key, value))
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return scores, value


def probabilities(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` weighs values with, and those values, one per head.

    Rows that may attend to nothing are zero, as they are there.
    """
    logits, value = scaled_products(*args, **kwargs)
    return torch._safe_softmax(logits, -1, dtype=logits.dtype), value


def _rows(values: tuple[Any, ...]) -> int | None:
    """The examples of a launch: the leading axis of the first tensor met that is no weight."""
    for one in values:
        if isinstance(one, Tensor) and not isinstance(one, nn.Parameter) and one.dim() > 0:
            return len(one)
    return None
