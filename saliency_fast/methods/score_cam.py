"""Score-CAM: channels weighted by what the model says of the input seen through each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds
from saliency_fast.methods.cam import Cam
from saliency_fast.methods.parts.canvas import Canvas, resize


class ScoreCAM(Cam):
    """Channels weighted by the softmax, over channels, of the scores of the input times each
    channel's activations, resized and stretched to [0, 1] (Wang, 2020); fields of `Cam`.

    As many forward passes as the layer has channels; no gradients.
    """

    name = "score_cam"
    uses_gradients = False

    def rounds(self, asked: RoundContext) -> Rounds:
        """One round for the activations, then one for each layer's channels."""
        canvas = Canvas(asked, self.relu, self.grid, self.special)
        kept: dict[int, list[Tensor]] = {}

        def keep(rows: slice, found: RoundResult) -> None:
            for number, output in enumerate(canvas.of_layers(found)):
                kept.setdefault(number, []).append(canvas.read(number, output))

        yield canvas.inputs_round(keep, gradients=False)
        for number, parts in kept.items():
            activations = torch.cat(parts)
            found = yield seen_through(activations, canvas, number)
            scores = found.scores.view(*activations.shape[:2], -1)
            weights = scores.softmax(1).to(activations.dtype)
            for k in range(weights.shape[2]):
                rows = slice(0, len(activations))
                canvas.draw(number, rows, k, activations, weights[:, :, k].contiguous())
        return Maps(canvas.values(), extras=canvas.extras())


def seen_through(activations: Tensor, canvas: Canvas, number: int) -> Round:
    """The round of each example seen through each channel of activations [B, C, *s]."""
    inputs, fills = canvas.asked.inputs, canvas.asked.baselines
    rows, channels = activations.shape[:2]

    def write(item: Tensor, place: Tensor) -> Inputs:
        own, written = activations[item, place], []
        row = torch.arange(len(item), device=item.device)
        for x, fill, layout in zip(inputs, fills, canvas.layouts[number], strict=True):
            mask = stretched(resize(own, layout.size)).to(x.dtype).view(-1, *layout.shape)
            if layout.shape[0] != 1:
                # A mask repeats along leading axes alone.
                mask = mask.expand(-1, *x.shape[1:])
            written.append(ops.mask_points(x, fill, mask.flatten(1), item, row))
        return tuple(written)

    item = torch.arange(rows, device=activations.device).repeat_interleave(channels)
    return Round(write, item, torch.arange(channels, device=item.device).repeat(rows))


def stretched(maps: Tensor) -> Tensor:
    """Maps [R, *s] on [0, 1]; constant ones are zero."""
    low, high = torch.aminmax(maps.flatten(1), dim=1)
    width = torch.where(high > low, high - low, 1)
    shape = (-1, *(1,) * (maps.dim() - 1))
    return (maps - low.view(shape)) / width.view(shape)
