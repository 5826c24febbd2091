"""Class activation maps: weighted sums over the channels of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.layers import id_of
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, warn
from saliency_fast.graph.fingerprint import model_fingerprint
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import at_inputs, every_row
from saliency_fast.model.follow import MOST_CACHED, Inside
from saliency_fast.model.layers import LayerTaps, kind_of, module_at
from saliency_fast.model.layout import Layout, Space, read_layout
from saliency_fast.rules.rectifiers import Guided

Weights = Callable[[Tensor, Tensor], Tensor]
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[Any, tuple[object, list[Layout]]]] = WeakKeyDictionary()
"""Layouts of a model's layers by shapes, each with the fingerprint of the model: to follow inputs
to a layer takes as long as many points.
"""


@dataclass(frozen=True)
class Cam:
    """Fields of all class activation maps.

    Values are [B, 1, *spatial], resized linearly to the input; `extras["layer"]` is the map [B, *s]
    at the layer (`layer_0`, `layer_1`, ... of several layers).

    Args:
        layer: A name, several (their maps are divided by their maxima and averaged), or "auto", the
            last spatial layer. `at=` of the call wins, and takes modules too.
        relu: Whether to keep evidence for the target alone; False keeps evidence against it as
            negative values.
        grid: (rows, columns) of a transformer's tokens; None finds them by the model's patches or
            the number of tokens.
        special: Number of leading (where negative, trailing) tokens that are no patches; None finds
            it likewise.
    """

    layer: str | tuple[str, ...] = "auto"
    relu: bool = True
    grid: tuple[int, ...] | None = None
    special: int | None = None
    name = "cam"
    uses_gradients = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", checks.layers(self.layer))
        object.__setattr__(self, "grid", checks.grid(self.grid))
        checks.fields(self, relu=checks.boolean, special=checks.optional(checks.integer))

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Weights [R, C] or [R, C, *s] from activations [R, C, *s] and gradients of that shape."""
        raise NotImplementedError

    def recipe(self) -> RoundsRecipe:
        return RoundsRecipe(
            self.rounds, 1, at_input=True, layers=self.layer, gradients=self.uses_gradients
        )

    def rounds(self, context: RoundContext) -> Rounds:
        """One round, at the inputs."""
        canvas = Canvas(context, self.relu, self.grid, self.special)
        yield canvas.round(self.weights, gradients=self.uses_gradients)
        if self.uses_gradients:
            canvas.need_gradients()
        return Maps(canvas.values(), extras=canvas.extras())


class GradCAM(Cam):
    """Channels weighted by their mean gradient (Selvaraju, 2017).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.GradCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "grad_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.flatten(2).mean(2)


class GradCAMPlusPlus(Cam):
    """Channels weighted by positive gradients, each by how much it explains (Chattopadhyay, 2018).

    Higher derivatives are those of the exponential of a score that is piecewise linear, as in the
    paper, so that g^2 / (2 g^2 + sum(A) g^3) * relu(g) is relu(g) / (2 + sum(A) g).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.GradCAMPlusPlus("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "grad_cam_plus_plus"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        share = 2 + _channel_sums(activations) * gradients
        shared = torch.where(share == 0, 0, gradients.clamp_min(0) / share)
        return shared.flatten(2).sum(2)


class XGradCAM(Cam):
    """Channels weighted by the mean gradient over positions, weighted by activation (Fu, 2020).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.XGradCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "xgrad_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        total = _channel_sums(activations).flatten(1)
        weighted = (activations * gradients).flatten(2).sum(2)
        return torch.where(total == 0, 0, weighted / total)


class LayerCAM(Cam):
    """Every activation weighted by its own positive gradient (Jiang, 2021).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.LayerCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "layer_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.clamp_min(0)


class HiResCAM(Cam):
    """Every activation weighted by its own gradient (Draelos, 2020).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.HiResCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "hires_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients


class EigenCAM(Cam):
    """First principal component of the activations, not centred (Muhammad, 2020).

    It does not depend on the target. Its sign is the one for which the map's sum is positive.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.EigenCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "eigen_cam"
    uses_gradients = False

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        flat = activations.flatten(2)
        # The smaller of both Gram matrices has the same first component.
        gram = flat @ flat.mT if (narrow := flat.shape[1] <= flat.shape[2]) else flat.mT @ flat
        first = torch.linalg.eigh(gram.double())[1][..., -1:].to(flat.dtype)
        if not narrow:
            first = torch.nn.functional.normalize(flat @ first, dim=1)
        turned = (flat.sum(2, keepdim=True) * first).sum(1, keepdim=True) < 0
        return torch.where(turned, -first, first).squeeze(2)


class ScoreCAM(Cam):
    """Channels weighted by the scores of the input masked by each of them (Wang, 2020).

    A mask is a channel's activations, resized and stretched to [0, 1]; weights are the softmax of
    the scores over channels. As many forward passes as the layer has channels; no gradients.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, method = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), sf.ScoreCAM("0")
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "score_cam"
    uses_gradients = False

    def rounds(self, context: RoundContext) -> Rounds:
        """One round for the activations, then one for each layer's channels."""
        canvas = Canvas(context, self.relu, self.grid, self.special)
        kept: dict[int, list[Tensor]] = {}

        def keep(rows: slice, result: RoundResult) -> None:
            for number, output in enumerate(canvas.of_layers(result)):
                kept.setdefault(number, []).append(canvas.read(number, output))

        yield canvas.inputs_round(keep, gradients=False)
        for number, parts in kept.items():
            activations = torch.cat(parts)
            result = yield _masked_round(activations, canvas, number)
            scores = result.scores.view(*activations.shape[:2], -1)
            weights = scores.softmax(1).to(activations.dtype)
            for k in range(weights.shape[2]):
                rows = slice(0, len(activations))
                canvas.draw(number, rows, k, activations, weights[:, :, k].contiguous())
        return Maps(canvas.values(), extras=canvas.extras())


class GuidedGradCAM(GradCAM):
    """GradCAM, resized to the input, times guided backpropagation (Selvaraju, 2017).

    Values are like the inputs.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(2, 2, 3))
        >>> x, method = torch.ones(2, 2, 5, 5), sf.GuidedGradCAM("1")
        >>> sf.explain(model, x, target=(1, 0, 0), method=method).values.shape
        torch.Size([2, 2, 5, 5])
    """

    name = "guided_grad_cam"

    def rounds(self, context: RoundContext) -> Rounds:
        """One round at the layers, then one at the inputs under guided rules."""
        canvas = Canvas(context, self.relu, self.grid, self.special)
        yield (first := canvas.round(self.weights, gradients=True))
        canvas.need_gradients()
        maps, shape = canvas.values(), context.scores.shape
        values = tuple(x.new_empty((*shape, *x.shape[1:])) for x in context.inputs)

        def each(rows: slice, result: RoundResult) -> None:
            for k, grads in enumerate(result.grads):
                for value, one, grad in zip(values, maps, grads, strict=True):
                    torch.mul(one[rows, k], grad, out=value[rows, k])

        yield replace(first, gradients=True, taps=None, rules=Guided(), each=each)
        return Maps(values, extras=canvas.extras())


def _channel_sums(activations: Tensor) -> Tensor:
    """Each channel's sum over positions, [R, C, 1, ...]."""
    return activations.sum(tuple(range(2, activations.dim())), keepdim=True)


def _masked_round(activations: Tensor, canvas: Canvas, number: int) -> Round:
    """The round of each example masked by each channel of activations [B, C, *s]."""
    inputs, baselines = canvas.context.inputs, canvas.context.baselines
    rows, channels = activations.shape[:2]

    def write(example: Tensor, channel: Tensor) -> Inputs:
        own, points = activations[example, channel], []
        row = torch.arange(len(example), device=example.device)
        for x, baseline, layout in zip(inputs, baselines, canvas.layouts[number], strict=True):
            mask = _stretched(resize(own, layout.size)).to(x.dtype).view(-1, *layout.shape)
            if layout.shape[0] != 1:
                # The op repeats a mask along leading axes alone.
                mask = mask.expand(-1, *x.shape[1:])
            points.append(ops.mask_points(x, baseline, mask.flatten(1), example, row))
        return tuple(points)

    example = torch.arange(rows, device=activations.device).repeat_interleave(channels)
    return Round(write, example, torch.arange(channels, device=example.device).repeat(rows))


def _stretched(maps: Tensor) -> Tensor:
    """Maps [R, *s] on [0, 1]; constant maps are zero."""
    low, high = torch.aminmax(maps.flatten(1), dim=1)
    width = torch.where(high > low, high - low, 1)
    shape = (-1, *(1,) * (maps.dim() - 1))
    return (maps - low.view(shape)) / width.view(shape)


# --- Maps of a call ---------------------------------------------------------------------------


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
        """A round at the inputs that draws all maps; without gradients from activations alone."""

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
        example, _ = every_row(self.context, 1)
        return Round(at_inputs(self.context), example, example, gradients, self._taps, each=each)

    @cached_property
    def _taps(self) -> LayerTaps:
        return LayerTaps(self.context.layers, self.context.layer_input)

    def of_layers(self, result: RoundResult) -> Inputs:
        """One tensor [R, ...] of each layer; of a single layer its first."""
        taps, layers, rows = result.taps, self.context.layers, len(result.scores)
        if len(layers) > 1 and len(taps) != len(layers):
            raise InputError(
                f"a layer gives several tensors: got {len(taps)} from {len(layers)} layers; name "
                "layers of one tensor each, or one layer, whose first tensor is used"
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
    def _inside(self) -> Inside:
        context = self.context
        axes = context.layouts.needed("a class activation map")
        if not self._taps.moving and all(one.is_standard for one in axes):
            # To follow the elements of the inputs takes another run.
            return Inside()
        return context.layouts.inside(context.layers, context.layer_input) or Inside()

    def _layouts(self, number: int, output: Tensor) -> list[Layout]:
        """The layouts of the tensors of layer `number` in the space of each input."""
        if number < len(self.layouts):
            return self.layouts[number]
        context, shape = self.context, tuple(output.shape)
        axes = context.layouts.needed("a class activation map")
        shapes = tuple(tuple(x.shape) for x in context.inputs)
        layers = (context.layer_input, *map(id_of, context.layers))
        key = (shape, number, self.grid, self.special, axes, shapes, *layers)
        model, mark = context.model, model_fingerprint(context.model)
        known = _LAYOUTS.setdefault(model, {}) if isinstance(model, nn.Module) else {}
        if key not in known or known[key][0] != mark:
            about = self.grid, self.special, context.model, number
            layer, parts = module_at(context.layers[number]), zip(shapes, axes, strict=True)
            spaces = [Space(*part, self._inside, at) for at, part in enumerate(parts)]
            found = [read_layout(layer, shape, space, *about) for space in spaces]
            while len(known) >= MOST_CACHED:
                known.pop(next(iter(known)))
            known[key] = mark, found
        self.layouts.append(known[key][1])
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
        values = []
        for layouts in zip(*self.layouts, strict=True):
            pairs = zip(self.maps, layouts, strict=True)
            resized = [resize(one.flatten(0, 1), layout.size) for one, layout in pairs]
            if len(resized) > 1:
                resized = [torch.stack([_to_peak(one) for one in resized]).mean(0)]
            values.append(resized[0].view(*self.context.scores.shape, *layouts[0].shape))
        return tuple(values)

    def need_gradients(self) -> None:
        """Warns of layers that scores do not depend on, and of maps without evidence."""
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
        if len(self.maps) == 1:
            return {"layer": self.maps[0]}
        return {f"layer_{number}": one for number, one in enumerate(self.maps)}


def _to_peak(maps: Tensor) -> Tensor:
    """Maps [N, *s], each divided by its largest absolute value."""
    peak = maps.abs().flatten(1).amax(1)
    return maps / torch.where(peak == 0, 1, peak).view(-1, *(1,) * (maps.dim() - 1))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    resized: Tensor = ops.cam(maps.unsqueeze(1), maps.new_ones(len(maps), 1), list(size), False)
    return resized
