"""Fills: what stands where a region was, made of the input itself, in two ways."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast.evaluate.inputs import substrate_of
from saliency_fast.evaluate.metrics.inpaint import inpaint

BLURRED, INPAINTED = "blurred", "inpainted"
AVERAGED, ZEROED = "set to the mean", "set to zero"


def fills(inputs: Tensor, gone: Tensor) -> dict[str, Tensor]:
    """Two inputs [B, C, *spatial] by name that know little, or nothing, of the places `gone`, bool
    [B, *spatial]: for spaces "blurred" (5 % of each axis) and "inpainted" (Rong, 2022), for
    features "set to the mean" (each example's own) and "set to zero".
    """
    if inputs.dim() == 2:
        mean = substrate_of("mean", inputs).expand_as(inputs)
        return {AVERAGED: mean.contiguous(), ZEROED: torch.zeros_like(inputs)}
    return {BLURRED: substrate_of("blur", inputs), INPAINTED: inpaint(inputs, gone)}
