"""Calls of `attribute` at layers of the user's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs, Kwargs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import AttributeCall, InternalAttribution, explained
from saliency_fast.errors import ModelError, RepeatedLayerError
from saliency_fast.graph.gradients import gradients
from saliency_fast.methods.gradient import Gradient
from saliency_fast.model.casts import cast
from saliency_fast.model.layers import Downstream, floats_at, hooked, tensors_at, with_floats
from saliency_fast.model.preserve import preserved

SMALL_GRAPH = 512 * 1024
"""Bytes of inputs and a layer's tensors up to which autograd's graph of one run is small."""


class _StopRunError(BaseException):
    """All layers were read, or the graph grows too large: the run of the model ends here."""


@dataclass(frozen=True)
class _Downstream(Downstream):
    """The model downstream of layers, whose further inputs, of these dtypes, are points of a path,
    too. materialize: whether a layer that the output does not use has zeros for gradients.
    """

    kinds: tuple[torch.dtype, ...]
    materialize: bool

    def __call__(self, *values: Any, **kwargs: Any) -> Tensor:
        count, stop = sum(self.counts), sum(self.counts) + len(self.kinds)
        carried = values[count:stop]
        pairs = zip(carried, self.kinds, strict=True)
        inputs = (one.detach().to(kind, copy=True) for one, kind in pairs)
        raw = super().__call__(*values[:count], *inputs, *values[stop:], **kwargs)
        result = forms.read_output(raw)
        # The engine needs scores that depend on all points: those without gradients count zero.
        for one in values[0 if self.materialize else count : stop]:
            zero = (one * 0).reshape(len(one), -1).sum(1)
            same = len(zero) == len(result) if result.dim() else False
            result = result + (zero.view(-1, *(1,) * (result.dim() - 1)) if same else zero.sum())
        return result


@dataclass(frozen=True)
class Layers:
    """Layers at which a class attributes, at their outputs or inputs. listed: results in a list."""

    forward: Callable[..., Any]
    layers: tuple[nn.Module, ...]
    of_input: bool
    listed: bool
    grad_kwargs: Kwargs

    @classmethod
    def of(cls, method: InternalAttribution, of_input: bool, grad_kwargs: Any = None) -> Layers:
        single = isinstance(layer := method.layer, nn.Module)
        layers = (layer,) if isinstance(layer, nn.Module) else tuple(layer)
        return cls(method.forward_func, layers, of_input, not single, grad_kwargs or {})

    @torch.no_grad()
    def read(self, inputs: Inputs, further: Any, *, to_end: bool = False) -> list[Inputs]:
        """The tensors of each layer in one run; `to_end`: of the last run of each layer."""
        result: dict[int, Inputs] = {}

        def seen(number: int, value: Any) -> None:
            result[number] = tuple(one.detach().clone() for one in tensors_at(value))
            if len(result) == len(self.layers) and not to_end:
                raise _StopRunError

        hooks = hooked(self.layers, seen, of_input=self.of_input)
        with suppress(_StopRunError), preserved(self.forward), hooks:
            self.forward(*forms.copies(inputs), *forms.as_args(further))
        for number, layer in enumerate(self.layers):
            if number not in result:
                raise forms.missing_layer(layer)
        return [result[number] for number in range(len(self.layers))]

    def floats(self, values: list[Inputs]) -> list[Inputs]:
        """The floating point tensors of each layer; raises ModelError where a layer has none."""
        result = [tuple(one for one in several if one.is_floating_point()) for several in values]
        for layer, own in zip(self.layers, result, strict=True):
            if not own:
                side = "takes" if self.of_input else "gives"
                raise ModelError(
                    f"the layer {type(layer).__name__} {side} no floating point tensor, so it has "
                    "no gradient; name a later layer, or set attribute_to_layer_input=False"
                )
        return result

    def formatted(self, values: list[Inputs]) -> Any:
        """A tensor, or a tuple of several, for each layer; in a list where layers came in one."""
        result = [one if len(one) > 1 else one[0] for one in values]
        return result if self.listed else result[0]

    def grouped(self, flat: Inputs, counts: Sequence[int]) -> list[Inputs]:
        """A flat tuple of values as a tuple per layer."""
        rest = iter(flat)
        return [tuple(islice(rest, count)) for count in counts]

    def at(self, call: AttributeCall, values: list[Inputs]) -> AttributeCall:
        """The call with the layers' values for inputs, and the model's inputs as arguments."""
        usual, own = forms.compute_gradients, self.grad_kwargs
        return replace(
            call,
            forward=Downstream(self.forward, self.layers, self.of_input, tuple(map(len, values))),
            inputs=tuple(chain(*values)),
            further=(*(x.detach() for x in call.inputs), *forms.as_args(call.further)),
            gradient_func=partial(usual, **own) if own else usual,
        )

    def path(self, call: AttributeCall) -> tuple[AttributeCall, list[int]]:
        """The call from layers' tensors for baselines to those for inputs, and their numbers."""
        starts = forms.filled(call.inputs, call.baselines or ())
        ends = self.floats(self.read(call.inputs, call.further))
        begins = self.floats(self.read(starts, call.further))
        return replace(self.at(call, ends), baselines=tuple(chain(*begins))), list(map(len, ends))

    def with_inputs(self, at: AttributeCall, call: AttributeCall, zeros: bool) -> AttributeCall:
        """The call `at` for DeepLIFT: what does not come through the layers differs as well."""
        assert isinstance(at.forward, Downstream)
        assert at.baselines is not None
        kind, kinds = at.inputs[0].dtype, tuple(x.dtype for x in call.inputs)
        own = at.forward
        about = own.model, own.layers, own.of_input, own.counts

        def carried(x: Tensor) -> Tensor:
            return x.detach() if x.is_floating_point() else cast(x, kind, "inputs")

        starts = forms.filled(call.inputs, call.baselines or ())
        return replace(
            at,
            forward=_Downstream(*about, kinds, zeros),
            inputs=(*at.inputs, *map(carried, call.inputs)),
            baselines=(*at.baselines, *map(carried, starts)),
            further=forms.as_args(call.further),
        )

    def gradients(self, call: AttributeCall) -> tuple[list[Inputs], list[Inputs]]:
        """The tensors of each layer, and the gradients of the scores at them."""
        if self.of_input:
            return self._in_one_run(call)
        size = sum(x.nbytes for x in call.inputs)
        if len(self.layers) == 1 and not self.grad_kwargs and size <= SMALL_GRAPH:
            # What is wrong shows in the engine's calls, too.
            with suppress(Exception, _StopRunError):
                return self._in_one_run(call, room=SMALL_GRAPH - size)
        values, result = self.floats(self.read(call.inputs, call.further)), list[Inputs]()
        try:
            # One by one: where one layer follows another, gradients of the first go through both.
            for layer, own in zip(self.layers, values, strict=True):
                alone = replace(self, layers=(layer,)).at(call, [own])
                result.append(forms.like_types(explained(Gradient(), alone), own))
            return values, result
        except RepeatedLayerError:
            return self._in_one_run(call)

    def _in_one_run(
        self, call: AttributeCall, room: int | None = None
    ) -> tuple[list[Inputs], list[Inputs]]:
        """As in Captum, with the whole batch and autograd's graph at once: gradients at a layer's
        input go through all that uses the tensor, and of several runs of a layer the last counts.

        room: bytes of the layer's tensors, with which the graph begins; else the run stops.
        """
        result, turned = dict[int, Inputs](), list[Tensor]()

        def seen(number: int, value: Any) -> Any:
            own = tuple(floats_at(value))
            if room is not None:
                if result or sum(one.nbytes for one in own) > room:
                    raise _StopRunError
                own = tuple(one.detach().clone().requires_grad_() for one in own)
            turned.extend(one.requires_grad_() for one in own if not one.requires_grad)
            result[number] = own
            # The layer and the model may work in place.
            return with_floats(value, [one.clone() for one in own])

        hooks = hooked(self.layers, seen, of_input=self.of_input)
        on = torch.inference_mode(False), torch.enable_grad()
        try:
            with on[0], on[1], preserved(self.forward), hooks:
                rows = tuple(x.detach().clone() for x in call.inputs)
                scores = forms.run_forward(self.forward, rows, call.target, call.further)
                forms.need_one_number(scores)
                values = self.floats([result.get(n, ()) for n in range(len(self.layers))])
                grads = gradients(scores.sum(), [*chain(*values)], **self.grad_kwargs)
        finally:
            # A layer may return a buffer of the model's.
            for one in turned:
                one.requires_grad_(False)
        detached = [tuple(one.detach() for one in several) for several in values]
        return detached, self.grouped(tuple(one.detach() for one in grads), [*map(len, values)])
