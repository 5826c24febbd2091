"""Class activation maps: a layer's channels, added up with weights: one function each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.engine.recipe import Maps, Recipe, RoundContext, Rounds, RoundsRecipe
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.canvas import Canvas


@dataclass(frozen=True)
class Cam:
    """What all class activation maps have in common.

    layer: a name, several (their maps are scaled to a maximum of one and averaged), or "auto", the
    last spatial layer; `explain`'s `at` wins, and takes modules too. relu: evidence for the target
    alone; without it, evidence against is negative. grid: (rows, columns) of a transformer's
    tokens, special: how many leading (where negative, trailing) tokens have no place in it; None
    reads both off the model's patches, or the tokens' number.

    Values are [B, 1, *spatial], resized linearly; `extras["layer"]` is the map as the layer has it
    [B, *s] (`layer_0`, `layer_1`, ... of several).
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
        """Weights [R, C], or [R, C, *s], of activations [R, C, *s] with gradients of that shape."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
        return RoundsRecipe(
            self.rounds, 1, at_input=True, layers=self.layer, gradients=self.uses_gradients
        )

    def rounds(self, asked: RoundContext) -> Rounds:
        """One round, at the inputs."""
        canvas = Canvas(asked, self.relu, self.grid, self.special)
        yield canvas.round(self.weights, gradients=self.uses_gradients)
        if self.uses_gradients:
            canvas.need_gradients()
        return Maps(canvas.values(), extras=canvas.extras())


class GradCAM(Cam):
    """Channels weighted by their mean gradient (Selvaraju, 2017); fields of `Cam`."""

    name = "grad_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.flatten(2).mean(2)


class GradCAMPlusPlus(Cam):
    """Channels weighted by their positive gradients, each by how much it alone explains
    (Chattopadhyay, 2018); fields of `Cam`.

    Higher derivatives are those of the exponential of a score that is piecewise linear, as in the
    paper, so that g^2 / (2 g^2 + sum(A) g^3) * relu(g) is relu(g) / (2 + sum(A) g).
    """

    name = "grad_cam_plus_plus"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        share = 2 + channel_sums(activations) * gradients
        shared = torch.where(share == 0, 0, gradients.clamp_min(0) / share)
        return shared.flatten(2).sum(2)


class XGradCAM(Cam):
    """Channels weighted by their mean gradient over places, each by its share of the channel's
    activation (Fu, 2020); fields of `Cam`.
    """

    name = "xgrad_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        total = channel_sums(activations).flatten(1)
        pulled = (activations * gradients).flatten(2).sum(2)
        return torch.where(total == 0, 0, pulled / total)


class LayerCAM(Cam):
    """Every activation weighted by its own positive gradient (Jiang, 2021); fields of `Cam`."""

    name = "layer_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.clamp_min(0)


class HiResCAM(Cam):
    """Every activation weighted by its own gradient (Draelos, 2020); fields of `Cam`."""

    name = "hires_cam"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients


class EigenCAM(Cam):
    """The activations' first principal component, not centred (Muhammad, 2020); fields of `Cam`.

    It does not look at the target. Its sign is the one in which the map's sum is positive.
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


def channel_sums(activations: Tensor) -> Tensor:
    """Each channel's sum over places, [R, C, 1, ...]."""
    places = tuple(range(2, activations.dim()))
    return activations.sum(places, keepdim=True)
