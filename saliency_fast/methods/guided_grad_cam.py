"""Guided GradCAM: the pixels of guided backpropagation, where GradCAM lights up."""

from __future__ import annotations

from dataclasses import replace

import torch

from saliency_fast.engine.recipe import Maps, RoundContext, RoundResult, Rounds
from saliency_fast.methods.cam import GradCAM
from saliency_fast.methods.parts.canvas import Canvas
from saliency_fast.rules import Guided


class GuidedGradCAM(GradCAM):
    """GradCAM, resized to the input, times guided backpropagation (Selvaraju, 2017); fields of
    `Cam`. Values are like the inputs.
    """

    name = "guided_grad_cam"

    def rounds(self, asked: RoundContext) -> Rounds:
        """One round at the layers, then one at the inputs under guided rules."""
        canvas = Canvas(asked, self.relu, self.grid, self.special)
        yield (first := canvas.round(self.weights, gradients=True))
        canvas.need_gradients()
        maps, many = canvas.values(), asked.scores.shape
        values = tuple(x.new_empty((*many, *x.shape[1:])) for x in asked.inputs)

        def each(rows: slice, found: RoundResult) -> None:
            for k, grads in enumerate(found.grads):
                for value, one, grad in zip(values, maps, grads, strict=True):
                    torch.mul(one[rows, k], grad, out=value[rows, k])

        yield replace(first, gradients=True, taps=None, rules=Guided(), each=each)
        return Maps(values, extras=canvas.extras())
