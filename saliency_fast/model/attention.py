"""Attention probabilities of a model that keeps none, on the autograd graph.

A function mode computes fused attention step by step, so that its probabilities exist, and
recognises attention that is written out by its calls.

Which layers attend among the tokens of the explained input is found by running the model again with
one token changed and the outputs of attention frozen: in such a layer queries and keys of that
token alone change, its row and its column of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast import _torch_compat as compat
from saliency_fast._types import Args, Function, Inputs, Kwargs
from saliency_fast.errors import ModelError, NoAttentionError
from saliency_fast.graph.gradients import differentiable
from saliency_fast.graph.intercept import Calls
from saliency_fast.model.layers import noisy
from saliency_fast.model.preserve import uncompiled, without_recomputation

LOOKED_FOR = (
    "looked for scaled_dot_product_attention, nn.MultiheadAttention, and softmax over the last "
    "axis of [B, heads, T, T] whose result is the left operand of a matrix product"
)
CURE = (
    "pass the model as it is before torch.compile, and one with FlexAttention or flash-attn "
    "kernels in its 'sdpa' or 'eager' form (attn_implementation= in transformers)"
)
OTHER = "use a method that does not read attention"
_FUSED = functional.scaled_dot_product_attention
_MULTIHEAD = functional.multi_head_attention_forward
_SOFTMAX = (torch.softmax, Tensor.softmax, torch.special.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_KEEPS = frozenset(
    "dropout alpha_dropout feature_dropout to type type_as float double half bfloat16 contiguous "
    "clone view reshape flatten unflatten squeeze unsqueeze masked_fill mul div __mul__ __rmul__ "
    "__truediv__ multiply divide nan_to_num where".split()
)
"""Calls that return probabilities again, as they were, or some of them cut or scaled."""
_OPAQUE = ("attention", "flash_attn", "attn_fwd")
_CHANGED_TOKENS = 3
"""Tokens that are changed, one at a time, to find the layers over them."""
_CHANGED_SHARE = 16
"""One in so many places of an axis is changed, in the middle."""


class AttentionTaps:
    """Taps at the probabilities of every self-attention layer, in the order in which layers run.

    Cross-attention and pooling by attention, whose maps are not square, are left out; dropout of
    fused attention is off. special: tokens beside those of the input, leading ones or, where
    negative, trailing ones. grid: of a picture's tokens, where the user gave it.
    """

    def __init__(self, special: int | None = None, grid: tuple[int, ...] | None = None) -> None:
        self._special, self._grid = special or 0, grid
        # Which layers count, once a row has been looked at.
        self._own: list[bool] | None = None

    def prepare(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Finds the layers whose queries and keys are the tokens of the explained input."""
        if self._own is not None or len(rows) != 1:
            return
        (x,) = rows
        plain, every = _AttentionMode(reading=True), list[tuple[int | None, list[Tensor]]]()
        with torch.no_grad():
            _run(plain, lambda: run((x.clone(),)))
            for points, token in _variations(x, self._grid is None):
                mode = _AttentionMode(reading=True, frozen=plain.products)
                _run(mode, partial(run, (points,)))
                if len(mode.logits) != len(plain.logits):
                    raise NoAttentionError(
                        "attention layers come and go with the input's values, so which of them "
                        f"are over its tokens is undecidable; {OTHER}"
                    )
                every.append((token, mode.logits))
        self._own = [
            _is_among(x, before, [(token, of[number]) for token, of in every], self._special)
            for number, before in enumerate(plain.logits)
        ]

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """The result of `call`, and [R, heads, T, T] of each layer on autograd's graph."""
        mode, own = _AttentionMode(), self._own
        raw = _run(mode, call)
        maps = [one for one in mode.maps if one.shape[2] == one.shape[3]]
        shapes = ", ".join(sorted({str(list(one.shape)) for one in maps or mode.maps}))
        if not maps:
            met = f"; met only {shapes}, which is not self-attention" if shapes else ""
            raise NoAttentionError(f"the model has no attention to read: {LOOKED_FOR}{met}; {CURE}")
        if own is not None and len(own) == len(mode.maps):
            maps = [one for one, is_own in zip(mode.maps, own, strict=True) if is_own]
        if not maps:
            raise NoAttentionError(
                "the model has no attention among the tokens of the explained input: queries and "
                f"keys of {shapes} are other tokens, as in a decoder or the tower of another "
                "input, or each of them depends on all tokens before any attention; explain the "
                f"part of the model that reads these tokens, or {OTHER}"
            )
        leaves = [x for x in compat.tree_leaves(raw)[:1] if isinstance(x, Tensor) and x.dim() > 0]
        for one in maps:
            if len(one) not in {mode.rows, *map(len, leaves)}:
                raise NoAttentionError(
                    "attention is over parts of an example, such as windows: got "
                    f"{list(one.shape)} for {mode.rows} examples, expected "
                    f"[{mode.rows}, heads, T, T]; {OTHER}"
                )
        if len({one.shape[2] for one in maps}) > 1:
            counts = ", ".join(str(one.shape[2]) for one in maps)
            raise NoAttentionError(
                f"attention layers are over different numbers of tokens: got {counts}, so that "
                f"one's tokens are not the next one's; {OTHER}"
            )
        return raw, maps

    def check_reached(self, reached: Sequence[bool]) -> None:
        """Raises ModelError where gradients reach none of the layers."""
        if not any(reached):
            raise ModelError(
                "the explained score does not depend on any attention of the model, or is not "
                "differentiable: use AttentionRollout, or a method that does not read attention"
            )


def _run(mode: _AttentionMode, call: Callable[[], Any]) -> Any:
    try:
        with uncompiled(), without_recomputation(), mode:
            return call()
    except Exception as error:
        # FlexAttention compiles itself, and cannot inside a function mode.
        if compat.is_compiler_error(error):
            raise NoAttentionError(f"attention inside compiled code is not seen: {CURE}") from error
        raise


class _AttentionMode(Calls):
    """Collects probabilities; reading: logits and products, too; frozen: products to use."""

    def __init__(self, *, reading: bool = False, frozen: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        # Rows that are only looked at come one by one.
        self.rows: int | None = 1 if reading else None
        self.maps, self.logits, self.products = list[Tensor](), list[Tensor](), list[Tensor]()
        self._reading, self._frozen = reading, frozen
        self._heads: int | None = None
        # Logits of probabilities, and the tensors that the model goes on with in their place.
        self._soft, self._tapped = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._heads
        if func is _MULTIHEAD:
            self._heads = (kwargs or {}).get("num_heads") or args[4]
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self._heads = before

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if self.rows is None:
            # The examples of a launch: the leading axis of the first tensor that is no weight.
            given = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
            points = [x for x in given if x.dim() > 0 and not isinstance(x, nn.Parameter)]
            self.rows = len(points[0]) if points else None
        if func is _FUSED:
            return self._fused(args, kwargs)
        if func in _PRODUCT:
            left, right, *rest = *args, *kwargs.values()
            if not rest and self._is_attention(left, right):
                return self._mixed(super().call(func, (self._tap(left), right), {}))
            return super().call(func, args, kwargs)
        if func is compat.EINSUM:
            operands = self._contracted(*args)
            result = super().call(func, (args[0], operands), kwargs)
            tapped = any(a is not b for a, b in zip(operands, args[1], strict=True))
            return self._mixed(result) if tapped else result
        name = getattr(func, "__name__", None) or str(func)
        if any(word in name for word in _OPAQUE):
            raise NoAttentionError(f"{name} keeps no attention probabilities: {LOOKED_FOR}; {CURE}")
        result = super().call(func, args, kwargs)
        if func in _SOFTMAX:
            axis = kwargs["dim"] if "dim" in kwargs else args[1]
            if result.dim() in (3, 4) and axis in (-1, result.dim() - 1):
                self._soft[result] = args[0] if args else kwargs["input"]
        elif name in _KEEPS and isinstance(result, Tensor):
            soft = (one for one in args if isinstance(one, Tensor) and one in self._soft)
            same = [x for x in soft if x.shape[-2:] == result.shape[-2:]]
            if same := [x for x in same if x.numel() == result.numel()]:
                self._soft[result] = self._soft[same[0]]
        return result

    def _mixed(self, result: Tensor) -> Tensor:
        """The output of attention, or that of the run that is frozen."""
        if not self._reading:
            return result
        number = len(self.products)
        if self._frozen is not None and number < len(self._frozen):
            kept = self._frozen[number]
            result = kept.clone() if kept.shape == result.shape else result
        self.products.append(result.detach().clone() if self._frozen is None else result)
        return result

    def _is_attention(self, left: Tensor, right: Tensor) -> bool:
        """Whether examples have values of their own: else it is a mixture of experts."""
        if not self._is_soft(left) or right.dim() != left.dim():
            return False
        pairs = zip(left.shape[:-2], right.shape[:-2], strict=True)
        return len(left) == len(right) and all(a == b or b == 1 for a, b in pairs)

    def _is_soft(self, one: Any) -> bool:
        """Whether a tensor is probabilities [B, heads, T, T] or [B * heads, T, T]."""
        if not isinstance(one, Tensor) or one not in self._soft or one.dim() not in (3, 4):
            return False
        return one.dim() == 4 or self._split(len(one)) is not None

    def _contracted(self, equation: Any, given: Any) -> list[Any]:
        """The operands of an einsum, with taps in the place of attention."""
        operands: list[Any] = list(given)
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
            return operands
        sides, out = equation.replace(" ", "").split("->")
        terms = sides.split(",")
        for number, one in enumerate(operands):
            key, other = terms[number][-1], terms[1 - number]
            if not self._is_soft(one):
                continue
            batch = terms[number][0] == other[0] and len(one) == len(operands[1 - number])
            if batch and key in other and key not in out:
                operands[number] = self._tap(one)
        return operands

    def _split(self, length: int) -> int | None:
        """The examples in the leading axis of [B * heads, T, T]."""
        if self._heads is not None:
            return length // self._heads
        return self.rows if self.rows and length % self.rows == 0 else None

    def _tap(self, weights: Tensor, logits: Tensor | None = None) -> Tensor:
        """Collects probabilities; returns the tensor that the model must go on with."""
        if weights in self._tapped:
            tapped: Tensor = self._tapped[weights]
            return tapped
        given = weights
        if self._reading:
            before = self._soft[weights] if logits is None else logits
            self.logits.append(before.detach().clone())
        if not weights.requires_grad:
            # Also where another mode runs calls that do not depend on points without autograd.
            with torch.enable_grad():
                anchor = torch.zeros((), requires_grad=True, device="cpu")
                weights = differentiable(
                    anchor, lambda _: (given.view_as(given), ()), lambda _: None
                )
        heads = weights
        if weights.dim() == 3:
            rows = self._split(len(weights)) or 1
            heads = weights.reshape(rows, -1, *weights.shape[1:])
            weights = heads.reshape(given.shape)
        self.maps.append(heads)
        self._tapped[given] = weights
        return weights

    def _fused(self, args: Args, kwargs: Kwargs) -> Tensor:
        query: Tensor = args[0] if args else kwargs["query"]
        split = query.dim() == 4 or (query.dim() == 3 and self._split(len(query)) is not None)
        if not split or query.is_nested:
            raise NoAttentionError(
                "attention must be over [B, heads, T, E]: got scaled_dot_product_attention of "
                f"{list(query.shape) if not query.is_nested else 'a nested tensor'}"
            )
        logits, value = super().call(scaled_products, args, kwargs)
        return self._mixed(self._tap(compat.softmax_of_masked(logits), logits) @ value)


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
    """The weights in `scaled_dot_product_attention`, and the values, one per head."""
    logits, value = scaled_products(*args, **kwargs)
    return compat.softmax_of_masked(logits), value


# Which layers attend among the tokens of the explained input.


def _variations(x: Tensor, sequence: bool) -> list[tuple[Tensor, int | None]]:
    """Changed copies of an input [1, *], each with the changed token of a sequence, or None."""
    changed: list[tuple[Tensor, int | None]] = []
    if sequence and x.dim() in (2, 3) and x.shape[1] > 0:
        for token in _tokens(x):
            points, own = x.clone(), x[0, token]
            if x.is_floating_point():
                points[0, token] = noisy(own)
            else:
                # Another id, of the same input where it has one.
                others = [n for n in (*_tokens(x), *range(x.shape[1])) if x[0, n] != own]
                near = own - 1 if int(own.max()) > 0 else own + 1
                points[0, token] = x[0, others[0]] if others else near
            changed.append((points, token))
    if x.is_floating_point() and x.dim() > 2:
        # Which axis holds channels is unknown: where one slice is a channel, others are places.
        several: Sequence[Sequence[int]] = ((1,), (2,)) if x.dim() == 3 else (range(2, x.dim()),)
        changed += [(_blotted(x, axes), None) for axes in several]
    return changed


def _tokens(x: Tensor) -> list[int]:
    """The tokens to change; of ids rare ones in the middle: no padding and no special tokens."""
    length = x.shape[1]
    if x.is_floating_point():
        return sorted({0, length // 2, length - 1})
    ids = x[0].tolist()
    order = sorted(range(length), key=lambda n: (ids.count(ids[n]), abs(n - length // 2)))
    return order[:_CHANGED_TOKENS]


def _blotted(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Noise in the middle of some axes."""
    part: list[slice] = [slice(None)] * x.dim()
    for axis in axes:
        size = x.shape[axis]
        width = max(1, size // _CHANGED_SHARE)
        part[axis] = slice((size - width) // 2, (size - width) // 2 + width)
    points = x.clone()
    points[tuple(part)] = noisy(points[tuple(part)])
    return points


def _is_among(
    x: Tensor, before: Tensor, after: Sequence[tuple[int | None, Tensor]], special: int
) -> bool:
    """Whether a layer's queries and keys are the tokens of x [1, *], by logits [*, heads, T, T]."""
    tokens = before.shape[-1]
    if before.shape[-2] != tokens:
        return False
    changes = [(token, _changed(before, one)) for token, one in after]
    of_tokens = [(token, changed) for token, changed in changes if token is not None]
    if of_tokens and tokens == x.shape[1] + abs(special):
        lowest = torch.finfo(before.dtype).min / 2
        is_open = (before > lowest).flatten(0, -3).all(0)
        return _each_its_own(of_tokens, is_open, max(special, 0))
    if not x.is_floating_point():
        return False
    return any(_both(changed) for token, changed in changes if token is None)


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Bool [T, T]: which logits differ in any head; NaN is equal to itself."""
    if before.shape != after.shape:
        return torch.ones(before.shape[-2:], dtype=torch.bool, device=before.device)
    differ = (before != after) & ~(before.isnan() & after.isnan())
    return differ.flatten(0, -3).any(0)


def _each_its_own(changes: Sequence[tuple[int, Tensor]], is_open: Tensor, offset: int) -> bool:
    """Whether every changed token changed its own queries and keys (and those of neighbours, where
    convolutions mix them), and not all. is_open: bool [T, T], which logits are not masked.
    """
    queries = keys = False
    for token, changed in changes:
        place = token + offset
        if len(changed) == 1:
            return bool(changed.any())
        still = is_open & ~changed
        others = torch.arange(len(changed), device=changed.device) != place
        if not bool(still[others][:, others].any()):
            # Of a mean of all tokens, or mixed before any attention.
            return False
        if bool(changed.any()) and not bool(changed[place, place] | ~is_open[place, place]):
            return False
        # A query changed where keys did not: another query sees the same logit as before.
        queries |= bool((changed[place] & still[others].any(0))[others].any())
        keys |= bool((changed[:, place] & still[:, others].any(1))[others].any())
    return queries and keys


def _both(changed: Tensor) -> bool:
    """Whether both queries and keys changed: else all queries see the same keys change."""
    if not bool(changed.any()) or bool(changed.all()):
        return bool(changed.any())
    return bool((changed != changed[:1]).any()) and bool((changed != changed[:, :1]).any())
