"""Small trained models and labelled scenes, so that examples and tests need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from saliency_fast.zoo.networks import MODELS, digits_cnn, digits_vit

__all__ = ["MODELS", "Samples", "digits_cnn", "digits_vit", "held_out"]


@dataclass(frozen=True)
class Samples:
    """Cluttered scenes that each hold one whole digit.

    Attributes:
        images: float32 [N, 1, 64, 64] in [0, 1].
        labels: int64 [N].
        boxes: int64 [N, 4], the digit's ink as (top, left, bottom, right) in pixels, half-open.

    Example:
        >>> from saliency_fast import zoo
        >>> zoo.held_out().labels.dtype
        torch.int64
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def held_out() -> Samples:
    """The 100 shipped scenes of held-out digits, which neither model was trained on.

    Example:
        >>> from saliency_fast import zoo
        >>> len(zoo.held_out())
        100
    """
    stored = load_file(Path(__file__).parent / "data" / "held_out.safetensors")
    images = stored["images"].to(torch.float32) / 255.0
    return Samples(images, stored["labels"], stored["boxes"])
