"""Class activation maps as they are drawn: in launches at a layer's size, then at the input's."""

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
from saliency_fast.model.follow import Inside
from saliency_fast.model.layers import LayerTaps, kind_of, module_at
from saliency_fast.model.layout import Layout, Space, read_layout

Weights = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Canvas:
    """The maps of a call so far, [B, K, *s] for each layer; relu, grid, special as in `cam.Cam`."""

    asked: RoundContext
    relu: bool
    grid: tuple[int, ...] | None
    special: int | None
    maps: list[Tensor] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)
    """For each layer, its layout in the space of each input."""
    felt: dict[int, Tensor] = field(default_factory=dict)
    """For each layer, whether any of its gradients was not zero."""

    def round(self, weights: Weights, *, gradients: bool) -> Round:
        """A round at the inputs, in which the maps of all layers are drawn; without gradients,
        weights get activations in their place.
        """

        def each(rows: slice, found: RoundResult) -> None:
            for number, output in enumerate(self.of_layers(found)):
                activations = self.read(number, output)
                for k in range(self.asked.scores.shape[1]):
                    slopes = activations
                    if gradients:
                        slopes = self.read(number, found.grads[k][number])
                        self.felt[number] = slopes.any() | self.felt.get(number, False)
                    self.draw(number, rows, k, activations, weights(activations, slopes))

        return self.inputs_round(each, gradients=gradients)

    def inputs_round(self, each: Callable[[slice, RoundResult], None], *, gradients: bool) -> Round:
        """A round at the inputs themselves."""
        inputs = self.asked.inputs
        item = torch.arange(len(inputs[0]), device=inputs[0].device)

        def write(item: Tensor, place: Tensor) -> Inputs:
            return tuple(x[item] for x in inputs)

        taps = LayerTaps(self.asked.layers, self.asked.layer_input)
        return Round(write, item, item, gradients, taps, each=each)

    def of_layers(self, found: RoundResult) -> Inputs:
        """One tensor [R, ...] of each layer; of a single layer its first."""
        taps, layers, rows = found.taps, self.asked.layers, len(found.scores)
        if len(layers) > 1 and len(taps) != len(layers):
            raise InputError(
                f"a layer gives several tensors: got {len(taps)} from {len(layers)} layers; name "
                "layers of one tensor each, or one layer, whose first tensor is taken"
            )
        for number, one in enumerate(taps[: len(layers)]):
            fold = self._layouts(number, one)[0].fold if one.dim() > 2 else 1
            if one.dim() == 0 or len(one) != rows * fold:
                raise InputError(
                    f"a layer must have the examples on its first axis: got {list(one.shape)} for "
                    f"{rows} examples; choose a layer before or behind the one that moves them"
                )
        return taps[: len(layers)]

    @cached_property
    def _spaces(self) -> list[Space]:
        """The spaces of the inputs."""
        asked = self.asked
        inside = asked.layouts.inside(asked.layers, asked.layer_input) or Inside()
        axes = asked.layouts.needed("a class activation map")
        return [
            Space(tuple(x.shape), one, inside, number)
            for number, (x, one) in enumerate(zip(asked.inputs, axes, strict=True))
        ]

    def _layouts(self, number: int, output: Tensor) -> list[Layout]:
        """The layouts of what layer `number` gives in the space of each input."""
        if number == len(self.layouts):
            layer, shape = module_at(self.asked.layers[number]), tuple(output.shape)
            about = self.grid, self.special, self.asked.model, number
            self.layouts.append([read_layout(layer, shape, x, *about) for x in self._spaces])
        return self.layouts[number]

    def read(self, number: int, output: Tensor) -> Tensor:
        """What layer `number` gave, or gradients of it, as maps [R, C, *s]."""
        maps = self._layouts(number, output)[0].maps(output)
        return (maps if maps.dtype == torch.float64 else maps.float()).contiguous()

    def draw(self, number: int, rows: slice, k: int, activations: Tensor, weights: Tensor) -> None:
        """The maps of some examples for target `k` at layer `number`."""
        size = activations.shape[2:]
        if number == len(self.maps):
            self.maps.append(activations.new_empty((*self.asked.scores.shape, *size)))
        self.maps[number][rows, k] = ops.cam(activations, weights, list(size), self.relu)

    def values(self) -> Inputs:
        """The maps at the size of each input, averaged over layers."""
        inputs = self.asked.inputs
        return tuple(self._of_input(number) for number in range(len(inputs)))

    def _of_input(self, number: int) -> Tensor:
        layouts = [several[number] for several in self.layouts]
        resized = [
            resize(one.flatten(0, 1), layout.size)
            for one, layout in zip(self.maps, layouts, strict=True)
        ]
        if len(resized) > 1:
            resized = [torch.stack([to_peak(one) for one in resized]).mean(0)]
        whole = resized[0]
        return whole.view(*self.asked.scores.shape, *layouts[0].shape)

    def need_gradients(self) -> None:
        """Warns of layers whose places the scores do not depend on, and of maps without evidence
        for the target.
        """
        for number, felt in self.felt.items():
            name = kind_of(self.asked.layers[number])
            if not felt:
                warn(
                    f"the scores do not depend on any place of the layer {name}, so its map is "
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


def to_peak(maps: Tensor) -> Tensor:
    """Maps [N, *s], each divided by its largest amount."""
    peak = maps.abs().flatten(1).amax(1)
    return maps / torch.where(peak == 0, 1, peak).view(-1, *(1,) * (maps.dim() - 1))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps [N, *s] at another size."""
    resized: Tensor = ops.cam(maps.unsqueeze(1), maps.new_ones(len(maps), 1), list(size), False)
    return resized
