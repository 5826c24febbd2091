"""Class activation maps of a call, drawn launch by launch at the layers' size, then resized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Round, RoundContext, RoundResult
from saliency_fast.errors import InputError, warn
from saliency_fast.methods.parts.maps import at_inputs, every_row
from saliency_fast.model.follow import Inside
from saliency_fast.model.layers import LayerTaps, kind_of, module_at
from saliency_fast.model.layout import Layout, Space, read_layout

Weights = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Canvas:
    """Maps of a call so far, [B, K, *s] for each layer; relu, grid and special as of `Cam`."""

    context: RoundContext
    relu: bool
    grid: tuple[int, ...] | None
    special: int | None
    maps: list[Tensor] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)
    """For each layer, its layout in the space of each input."""
    nonzero: dict[int, Tensor] = field(default_factory=dict)
    """For each layer, whether any of its gradients was not zero."""

    def round(self, weights: Weights, *, gradients: bool) -> Round:
        """A round at the inputs that draws the maps of all layers.

        Without gradients, `weights` gets activations in their place.
        """

        def each(rows: slice, result: RoundResult) -> None:
            for number, output in enumerate(self.of_layers(result)):
                activations = self.read(number, output)
                for k in range(self.context.scores.shape[1]):
                    slopes = activations
                    if gradients:
                        slopes = self.read(number, result.grads[k][number])
                        self.nonzero[number] = slopes.any() | self.nonzero.get(number, False)
                    self.draw(number, rows, k, activations, weights(activations, slopes))

        return self.inputs_round(each, gradients=gradients)

    def inputs_round(self, each: Callable[[slice, RoundResult], None], *, gradients: bool) -> Round:
        """A round at the inputs themselves."""
        example, _ = every_row(self.context, 1)
        taps = LayerTaps(self.context.layers, self.context.layer_input)
        return Round(at_inputs(self.context), example, example, gradients, taps, each=each)

    def of_layers(self, result: RoundResult) -> Inputs:
        """One tensor [R, ...] of each layer; of a single layer its first."""
        taps, layers, rows = result.taps, self.context.layers, len(result.scores)
        if len(layers) > 1 and len(taps) != len(layers):
            raise InputError(
                f"a layer gives several tensors: got {len(taps)} from {len(layers)} layers; name "
                "layers of one tensor each, or one layer, whose first tensor is taken"
            )
        for number, one in enumerate(taps[: len(layers)]):
            times = self._layouts(number, one)[0].steps_per_example if one.dim() > 2 else 1
            if one.dim() == 0 or len(one) != rows * times:
                raise InputError(
                    f"a layer must have the examples on its first axis: got {list(one.shape)} for "
                    f"{rows} examples; choose a layer before or after the one that moves them"
                )
        return taps[: len(layers)]

    @cached_property
    def _spaces(self) -> list[Space]:
        context = self.context
        inside = context.layouts.inside(context.layers, context.layer_input) or Inside()
        axes = context.layouts.needed("a class activation map")
        return [
            Space(tuple(x.shape), one, inside, number)
            for number, (x, one) in enumerate(zip(context.inputs, axes, strict=True))
        ]

    def _layouts(self, number: int, output: Tensor) -> list[Layout]:
        """The layouts of the tensors of layer `number` in the space of each input."""
        if number == len(self.layouts):
            layer, shape = module_at(self.context.layers[number]), tuple(output.shape)
            about = self.grid, self.special, self.context.model, number
            self.layouts.append([read_layout(layer, shape, x, *about) for x in self._spaces])
        return self.layouts[number]

    def read(self, number: int, output: Tensor) -> Tensor:
        """Activations of layer `number`, or gradients of it, as maps [R, C, *s]."""
        maps = self._layouts(number, output)[0].maps(output)
        return (maps if maps.dtype == torch.float64 else maps.float()).contiguous()

    def draw(self, number: int, rows: slice, k: int, activations: Tensor, weights: Tensor) -> None:
        """The maps of some examples for target `k` at layer `number`."""
        size = activations.shape[2:]
        if number == len(self.maps):
            self.maps.append(activations.new_empty((*self.context.scores.shape, *size)))
        self.maps[number][rows, k] = ops.cam(activations, weights, list(size), self.relu)

    def values(self) -> Inputs:
        """The maps at the size of each input, averaged over layers."""
        return tuple(self._of_input(number) for number in range(len(self.context.inputs)))

    def _of_input(self, number: int) -> Tensor:
        layouts = [several[number] for several in self.layouts]
        resized = [
            resize(one.flatten(0, 1), layout.size)
            for one, layout in zip(self.maps, layouts, strict=True)
        ]
        if len(resized) > 1:
            resized = [torch.stack([_to_peak(one) for one in resized]).mean(0)]
        return resized[0].view(*self.context.scores.shape, *layouts[0].shape)

    def need_gradients(self) -> None:
        """Warns of layers that the scores do not depend on, and of maps without evidence for the
        target.
        """
        for number, nonzero in self.nonzero.items():
            name = kind_of(self.context.layers[number])
            if not nonzero:
                warn(
                    f"the scores do not depend on any position of the layer {name}, so its map is "
                    "zero; choose an earlier one (of a transformer, one before its last attention)"
                )
            elif self.relu and not bool(self.maps[number].any()):
                warn(
                    f"the map of the layer {name} is zero everywhere: all of its evidence is "
                    "against the target, and negative parts are left out; pass relu=False"
                )

    def extras(self) -> dict[str, Tensor]:
        """The maps at their layers' size."""
        if len(self.maps) == 1:
            return {"layer": self.maps[0]}
        return {f"layer_{number}": one for number, one in enumerate(self.maps)}


def _to_peak(maps: Tensor) -> Tensor:
    """Maps [N, *s], each divided by its largest absolute value."""
    peak = maps.abs().flatten(1).amax(1)
    return maps / torch.where(peak == 0, 1, peak).view(-1, *(1,) * (maps.dim() - 1))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps [N, *s] at another size."""
    resized: Tensor = ops.cam(maps.unsqueeze(1), maps.new_ones(len(maps), 1), list(size), False)
    return resized
