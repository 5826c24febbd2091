"""Inside: a facade's call moved to layers of the user's model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import InternalAttribution
from saliency_fast.captum.contract import as_args, copies, like_types
from saliency_fast.captum.forward import (
    compute_gradients,
    need_one_number,
    read_output,
    run_forward,
)
from saliency_fast.captum.run import Asked, explained
from saliency_fast.errors import ContractError, ModelError, RepeatedLayerError
from saliency_fast.graph.gradients import gradients
from saliency_fast.methods import Gradient
from saliency_fast.model.casts import cast
from saliency_fast.model.layers import Downstream, floats_at, hooked, tensors_at, with_floats
from saliency_fast.model.preserve import preserved

LITTLE = 512 * 1024
"""Bytes of inputs and a layer's tensors up to which all that autograd keeps behind is little."""


class _Enough(BaseException):
    """All layers were read: what comes behind them has no need to run."""


@dataclass(frozen=True)
class _Between(Downstream):
    """The rest of a model, whose inputs, of these dtypes, are points as the layers' values are."""

    kinds: tuple[torch.dtype, ...]
    touched: bool

    def __call__(self, *values: Any, **kwargs: Any) -> Tensor:
        count, stop = sum(self.counts), sum(self.counts) + len(self.kinds)
        carried = values[count:stop]
        pairs = zip(carried, self.kinds, strict=True)
        inputs = (one.detach().to(kind, copy=True) for one, kind in pairs)
        raw = super().__call__(*values[:count], *inputs, *values[stop:], **kwargs)
        found = read_output(raw)
        # It depends on what has no gradient, too, if only by zero times it.
        for one in values[0 if self.touched else count : stop]:
            zero = (one * 0).reshape(len(one), -1).sum(1)
            same = len(zero) == len(found) if found.dim() else False
            found = found + (zero.view(-1, *(1,) * (found.dim() - 1)) if same else zero.sum())
        return found


def _carried(x: Tensor, kind: torch.dtype) -> Tensor:
    """Inputs as numbers of a floating type, which holds them."""
    return x.detach() if x.is_floating_point() else cast(x, kind, "inputs")


@dataclass(frozen=True)
class Inside:
    """Layers of a method, at what they give or, with `of_input`, take by position."""

    forward: Callable[..., Any]
    layers: tuple[nn.Module, ...]
    of_input: bool
    listed: bool

    @classmethod
    def of(cls, method: InternalAttribution, of_input: bool) -> Inside:
        """Of a layer, or of a list of them."""
        layer = method.layer
        if isinstance(layer, nn.Module):
            return cls(method.forward_func, (layer,), of_input, False)
        return cls(method.forward_func, tuple(layer), of_input, True)

    @torch.no_grad()
    def read(self, inputs: Inputs, further: Any, *, whole: bool = False) -> list[Inputs]:
        """Per layer the tensors there, in one run of the whole batch. whole: to its end, so that of
        a layer that runs several times the last is read.
        """
        found: dict[int, Inputs] = {}

        def seen(number: int, value: Any) -> None:
            found[number] = tuple(one.detach().clone() for one in tensors_at(value))
            if len(found) == len(self.layers) and not whole:
                raise _Enough

        hooks = hooked(self.layers, seen, of_input=self.of_input)
        with suppress(_Enough), preserved(self.forward), hooks:
            self.forward(*copies(inputs), *as_args(further))
        for number, layer in enumerate(self.layers):
            if number not in found:
                raise ContractError(
                    "Forward hook did not obtain any outputs for given layer: the "
                    f"{type(layer).__name__} did not run; name one that the model calls"
                )
        return [found[number] for number in range(len(self.layers))]

    def like_layers(self, values: list[Inputs]) -> Any:
        """A tensor, or a tuple of several, for each layer; in a list where layers came in one."""
        found = [one if len(one) > 1 else one[0] for one in values]
        return found if self.listed else found[0]

    def asked(
        self,
        values: list[Inputs],
        inputs: Inputs,
        target: Any,
        further: Any,
        grad_kwargs: dict[str, Any] | None,
        **more: Any,
    ) -> Asked:
        """The call with layers' values as inputs; the model's own follow as arguments."""
        counts = tuple(map(len, values))
        behind = Downstream(self.forward, self.layers, self.of_input, counts)
        rest = (*(x.detach() for x in inputs), *as_args(further))
        gradient_func = compute_gradients
        if grad_kwargs:
            gradient_func = partial(compute_gradients, **grad_kwargs)
        flat = tuple(one for several in values for one in several)
        return Asked(behind, flat, target, rest, gradient_func=gradient_func, **more)

    def between(self, asked: Asked, inputs: Inputs, starts: Inputs, *, touched: bool) -> Asked:
        """The same call for a method that compares the model at inputs and at baselines: what does
        not come through the layers differs between the two as well. touched: layers that the
        output does not use have zeros for gradients.
        """
        assert isinstance(asked.forward, Downstream)
        assert asked.baselines is not None
        kind = asked.inputs[0].dtype
        kinds = tuple(x.dtype for x in inputs)
        behind = asked.forward
        about = behind.model, behind.layers, behind.of_input, behind.counts
        ends, begins = (tuple(_carried(x, kind) for x in rows) for rows in (inputs, starts))
        return replace(
            asked,
            forward=_Between(*about, kinds, touched),
            inputs=(*asked.inputs, *ends),
            baselines=(*asked.baselines, *begins),
            further=as_args(asked.further)[len(inputs) :],
        )

    def grouped(self, flat: Inputs, like: list[Inputs]) -> list[Inputs]:
        """Values per layer."""
        rest = iter(flat)
        return [tuple(next(rest) for _ in several) for several in like]

    def gradients(
        self, inputs: Inputs, target: Any, further: Any, grad_kwargs: dict[str, Any] | None
    ) -> tuple[list[Inputs], list[Inputs]]:
        """Per layer the tensors there, and the gradients of the scores at them."""
        if self.of_input:
            return self._in_one_run(inputs, target, further, grad_kwargs or {})
        if len(self.layers) == 1 and not grad_kwargs:
            own, gradients = self._at_once(inputs, target, further)
            if gradients:
                return [own], [gradients]
        values = self.need_floats(self.read(inputs, further))
        try:
            return values, self._behind(values, inputs, target, further, grad_kwargs)
        except RepeatedLayerError:
            return self._in_one_run(inputs, target, further, grad_kwargs or {})

    def _behind(self, values: list[Inputs], *call: Any) -> list[Inputs]:
        found = []
        # Each on its own: where one layer follows another, gradients of the first go through both.
        for layer, own in zip(self.layers, values, strict=True):
            alone = replace(self, layers=(layer,))
            asked = alone.asked([own], *call)
            found.append(like_types(explained(Gradient(), asked), own))
        return found

    def _at_once(self, inputs: Inputs, target: Any, further: Any) -> tuple[Inputs, Inputs]:
        """A layer's tensors and the gradients there in one run of the batch, where autograd's graph
        is small; nothing elsewhere, or where anything is wrong, which then shows again.
        """
        size, own = sum(x.nbytes for x in inputs), list[Tensor]()
        grads: Inputs = ()
        if size > LITTLE:
            return (), ()

        def seen(_: int, value: Any) -> Any:
            here = floats_at(value)
            if own or size + sum(one.nbytes for one in here) > LITTLE:
                raise _Enough
            own.extend(one.detach().clone().requires_grad_() for one in here)
            # The model may go on to overwrite what it gets.
            return with_floats(value, [one.clone() for one in own])

        on = torch.inference_mode(False), torch.enable_grad()
        hooks = hooked(self.layers, seen)
        with suppress(Exception, _Enough), on[0], on[1], preserved(self.forward), hooks:
            rows = tuple(x.detach().clone() for x in inputs)
            scores = run_forward(self.forward, rows, target, further)
            need_one_number(scores)
            grads = gradients(scores.sum(), own)
        return tuple(one.detach() for one in own), tuple(one.detach() for one in grads)

    def _in_one_run(
        self, inputs: Inputs, target: Any, further: Any, grad_kwargs: dict[str, Any]
    ) -> tuple[list[Inputs], list[Inputs]]:
        """As in Captum gradients at what a layer takes go through all that takes it, such as a skip
        connection around the layer, and of a layer that runs several times the last run counts: the
        whole batch at once, with all of autograd's graph.
        """
        found: dict[int, Inputs] = {}
        turned: list[Tensor] = []

        def seen(number: int, value: Any) -> Any:
            found[number] = own = tuple(floats_at(value))
            turned.extend(one.requires_grad_() for one in own if not one.requires_grad)
            # The layer may work in place.
            return with_floats(value, [one.clone() for one in own])

        hooks = hooked(self.layers, seen, of_input=self.of_input)
        on = torch.inference_mode(False), torch.enable_grad()
        try:
            with on[0], on[1], preserved(self.forward), hooks:
                rows = tuple(x.detach().clone() for x in inputs)
                scores = run_forward(self.forward, rows, target, further)
                need_one_number(scores)
                values = self.need_floats([found.get(n, ()) for n in range(len(self.layers))])
                flat = [one for several in values for one in several]
                grads = gradients(scores.sum(), flat, **grad_kwargs)
        finally:
            # It may be a buffer of the model's.
            for one in turned:
                one.requires_grad_(False)
        detached = [tuple(one.detach() for one in several) for several in values]
        return detached, self.grouped(tuple(one.detach() for one in grads), values)

    def need_floats(self, values: list[Inputs]) -> list[Inputs]:
        """The floating tensors of each layer."""
        found = [tuple(one for one in several if one.is_floating_point()) for several in values]
        for layer, own in zip(self.layers, found, strict=True):
            if not own:
                side = "takes" if self.of_input else "gives"
                raise ModelError(
                    f"the layer {type(layer).__name__} {side} no floating point tensor, so it has "
                    "no gradient; name a layer behind it, or set attribute_to_layer_input=False"
                )
        return found
