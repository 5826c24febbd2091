"""Class activation maps: weighted sums over the channels of a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.canvas import Canvas, resize
from saliency_fast.rules import Guided


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

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.
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
        checks.flag("relu", self.relu)
        if self.special is not None:
            checks.whole("special", self.special, -(2**31))

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Weights [R, C] or [R, C, *s] from activations [R, C, *s] and gradients of that shape."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.GradCAM(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.GradCAMPlusPlus(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.XGradCAM(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.LayerCAM(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
        torch.Size([2, 1, 5, 5])
    """

    name = "layer_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.clamp_min(0)


class HiResCAM(Cam):
    """Every activation weighted by its own gradient (Draelos, 2020).

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.HiResCAM(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.EigenCAM()
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> method = sf.ScoreCAM(relu=False)
        >>> sf.explain(model, torch.ones(2, 1, 5, 5), target=1, method=method).values.shape
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
        >>> from torch import nn
        >>> model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten())
        >>> x, method = torch.ones(2, 2, 5, 5), sf.GuidedGradCAM(relu=False)
        >>> sf.explain(model, x, target=1, method=method).values.shape
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
