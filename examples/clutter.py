"""Scenes of one handwritten digit hidden in clutter made of scrambled digit parts.

The digit's box is known, so the share of a saliency map that falls on it can be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from saliency_fast.zoo import Samples

CANVAS = 64
WINDOW = 32
FRAGMENT = 14
CELLS = 6
INK = 0.25


@dataclass(frozen=True)
class Glyphs:
    """Plain digits: `images` [n, 8, 8] float32 in [0, 1] and `labels` [n] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def split_glyphs(seed: int = 0, held_out: float = 0.2) -> tuple[Glyphs, Glyphs]:
    """Split scikit-learn's 1797 digits into (train, held-out), disjoint, the same share per label.

    Needs scikit-learn, which carries the UCI optical digits.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32) / 16.0
    labels = torch.from_numpy(raw.target).to(torch.int64)
    generator = torch.Generator().manual_seed(seed)
    train, rest = [], []
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(held_out * len(members))
        rest.append(members[:cut])
        train.append(members[cut:])
    kept, left = torch.cat(train), torch.cat(rest)
    return Glyphs(images[kept], labels[kept]), Glyphs(images[left], labels[left])


def hide(glyphs: Glyphs, which: Tensor, seed: int, strength: float = 1.0) -> Samples:
    """Hide `glyphs[which]`, one per scene, in clutter cut from the same set of glyphs.

    `which` is [N] int64. The same glyphs, `which` and seed give the same scenes. Clutter comes
    from `glyphs` alone, so scenes of held-out glyphs show nothing of the training glyphs.
    `strength` in [0, 1] dims the clutter; at 1 its strokes are as bright as the digit's.
    """
    generator = torch.Generator().manual_seed(seed)
    digits, boxes = _place_digits(glyphs.images[which], generator)
    clutter = strength * _clutter(glyphs.images, boxes, generator)
    images = torch.maximum(digits, clutter).unsqueeze(1)
    return Samples(images, glyphs.labels[which], boxes)


def save_samples(samples: Samples, path: Path) -> None:
    """Write `samples` as safetensors, images rounded to uint8."""
    images = (samples.images * 255.0).round().to(torch.uint8)
    save_file({"images": images, "labels": samples.labels, "boxes": samples.boxes}, path)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _affine(angle: Tensor, height: Tensor, width: Tensor, side: int) -> Tensor:
    """Sampling matrices [n, 2, 3] that draw a glyph `height` x `width` px in a `side` px square.

    `angle` (radians), `height` and `width` are [n]; a negative width mirrors the glyph.
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([cos, sin, torch.zeros_like(cos)], 1) * (side / width).unsqueeze(1)
    down = torch.stack([-sin, cos, torch.zeros_like(cos)], 1) * (side / height).unsqueeze(1)
    return torch.stack([across, down], 1)


def _draw(glyphs: Tensor, affine: Tensor, side: int) -> Tensor:
    """Enlarge [n, 8, 8] glyphs to [n, side, side], smooth strokes near full intensity."""
    grid = F.affine_grid(affine, [len(glyphs), 1, side, side], align_corners=False)
    drawn = F.grid_sample(glyphs.unsqueeze(1), grid, mode="bicubic", align_corners=False)
    # Grey fringes of an 8 x 8 scan grow wide when enlarged; the ramp narrows them again.
    return ((drawn.squeeze(1) - 0.2) / 0.6).clamp(0.0, 1.0)


def _paste(patches: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """Paste [N, K, s, s] patches at [N, K] corners, brightest wins, giving [N, 64, 64].

    Parts of a patch outside the canvas are cut off.
    """
    count, _, side, _ = patches.shape
    steps = torch.arange(side)
    rows = (tops.unsqueeze(-1) + steps).unsqueeze(-1)
    columns = (lefts.unsqueeze(-1) + steps).unsqueeze(-2)
    inside = (rows >= 0) & (rows < CANVAS) & (columns >= 0) & (columns < CANVAS)
    index = rows.clamp(0, CANVAS - 1) * CANVAS + columns.clamp(0, CANVAS - 1)
    canvas = torch.zeros(count, CANVAS * CANVAS)
    canvas.scatter_reduce_(1, index.flatten(1), (patches * inside).flatten(1), "amax")
    return canvas.view(count, CANVAS, CANVAS)


def _place_digits(glyphs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw each [N, 8, 8] glyph whole at a random place: [N, 64, 64] and its boxes [N, 4]."""
    count = len(glyphs)
    size = _uniform(generator, 20.0, 28.0, count)
    width = size * _uniform(generator, 0.9, 1.1, count)
    angle = _uniform(generator, -math.pi / 18, math.pi / 18, count)
    drawn = _draw(glyphs, _affine(angle, size, width, WINDOW), WINDOW)
    drawn = drawn * _uniform(generator, 0.7, 1.0, count, 1, 1)
    corner = torch.randint(0, CANVAS - WINDOW + 1, (2, count, 1), generator=generator)
    canvas = _paste(drawn.unsqueeze(1), corner[0], corner[1])
    return canvas, _boxes(canvas > INK)


def _boxes(ink: Tensor) -> Tensor:
    """Tight half-open boxes [N, 4] around the true pixels of [N, H, W]."""
    edges = []
    for axis in (2, 1):
        hit = ink.any(dim=axis).to(torch.int64)
        edges.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (top, bottom), (left, right) = edges
    return torch.stack([top, left, bottom, right], 1)


def _clutter(glyphs: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Scatter turned and mirrored glyph fragments over the canvas: [N, 64, 64]."""
    count, parts = len(boxes), CELLS * CELLS
    total = count * parts
    source = glyphs[torch.randint(0, len(glyphs), (total,), generator=generator)]
    turn = torch.randint(0, 4, (total,), generator=generator) * (math.pi / 2)
    mirror = torch.randint(0, 2, (total,), generator=generator) * 2 - 1
    size = _uniform(generator, 20.0, 28.0, total)
    angle = turn + _uniform(generator, -math.pi / 18, math.pi / 18, total)
    affine = _affine(angle, size, size * mirror, FRAGMENT)
    affine[:, :, 2] = _uniform(generator, -0.5, 0.5, total, 2)
    patches = _draw(source, affine, FRAGMENT) * _soft_disc(FRAGMENT)
    patches = patches * _uniform(generator, 0.7, 1.0, total, 1, 1)

    pitch = CANVAS / CELLS
    cell = torch.arange(parts)
    jitter = _uniform(generator, -0.5, 0.5, 2, count, parts)
    rows = (cell // CELLS + 0.5 + jitter[0]) * pitch
    columns = (cell % CELLS + 0.5 + jitter[1]) * pitch
    keep = _outside(rows, columns, boxes)
    patches = patches.view(count, parts, FRAGMENT, FRAGMENT) * keep[:, :, None, None]
    half = FRAGMENT / 2
    return _paste(patches, (rows - half).round().long(), (columns - half).round().long())


def _outside(rows: Tensor, columns: Tensor, boxes: Tensor) -> Tensor:
    """Which fragments, centred at [N, K] rows and columns, lie outside their scene's box.

    The digit's own ink stands in for those inside, so that the box is not crowded; fragments
    still reach half their width into it from every side.
    """
    top, left, bottom, right = boxes.unsqueeze(-1).unbind(1)
    # One pixel of grace on each side keeps the dim rim around the digit narrow.
    down = (rows > top + 1) & (rows < bottom - 1)
    across = (columns > left + 1) & (columns < right - 1)
    return ~(down & across)


def _soft_disc(side: int) -> Tensor:
    """A round window [side, side] with a soft rim, so that cut strokes end like drawn ones."""
    axis = torch.arange(side) - (side - 1) / 2
    radius = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    return (side / 2 - radius).clamp(0.0, 2.0) / 2
