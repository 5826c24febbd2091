"""Pictures as tensors: PNG and JPEG to [1, C, H, W] in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from saliency_fast.errors import InputError


@dataclass(frozen=True)
class Form:
    """How a picture is read: size (height, width), None as it is; channels 1 or 3, None as it is.

    Pictures of 16 bits keep their depth; transparency is dropped.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        grey = picture.mode in ("1", "L", "LA", "F") or _deep(picture)
        if _deep(picture):
            picture = Image.fromarray(_levels(picture))
        channels = self.channels or (1 if grey else 3)
        if channels == 3 and picture.mode == "F":
            parts = [picture] * 3
        elif picture.mode == "F":
            parts = [picture]
        else:
            parts = list(picture.convert("L" if channels == 1 else "RGB").split())
        if self.size is not None:
            height, width = self.size
            parts = [one.resize((width, height), Image.Resampling.BILINEAR) for one in parts]
        planes = np.stack([np.asarray(one, dtype=np.float32) for one in parts])
        return torch.from_numpy(planes)[None] / 255.0


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in mode "RGB" or "L", for processors that take 8 bits: 16 bits are rounded to 8.
    Pillow itself would cut all but the darkest 256th to white.
    """
    if _deep(picture):
        picture = Image.fromarray(_levels(picture).round().astype(np.uint8))
    return picture.convert(mode)


def _deep(picture: Image.Image) -> bool:
    """Whether a picture has 16 bits a pixel."""
    return picture.mode.startswith("I")


def _levels(picture: Image.Image) -> npt.NDArray[np.float32]:
    """Grey levels of 16 bits, from 0 to 255."""
    levels = np.asarray(picture, dtype=np.float64).clip(0.0, 65535.0) / 257.0
    return levels.astype(np.float32)


def read_form(size: str | None, channels: int | None) -> Form | None:
    """A form from `--size 224` or `--size 224x320` (height x width) and `--channels`."""
    if size is None and channels is None:
        return None
    if size is None:
        return Form(None, channels)
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise InputError(f"--size must be a number or HEIGHTxWIDTH such as 224x320: got {size!r}")
    return Form((int(sides[0]), int(sides[-1])), channels)
