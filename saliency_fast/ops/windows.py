"""Windows: points of which a box is taken from elsewhere, as a window slides over an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saliency_fast.ops.points import fake_points
from saliency_fast.ops.registry import Sample, define


def _windows(x: Tensor, fill: Tensor, example: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    axes = x.dim() - 1
    covered = torch.ones((len(example), *(1,) * axes), dtype=torch.bool, device=x.device)
    for axis, size in enumerate(x.shape[1:]):
        position = torch.arange(size, device=x.device)
        within = (position >= start[:, axis, None]) & (position < stop[:, axis, None])
        covered = covered & within.view(len(example), *(1,) * axis, size, *(1,) * (axes - axis - 1))
    return torch.where(covered, fill[example % len(fill)], x[example]).contiguous()


def _boxes(shape: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Windows (start, stop) [rows, D]: all, nothing, beyond an edge, reversed, whole along all
    axes but the first or the last, then any.
    """
    size = torch.tensor(shape)
    start = (torch.rand(rows, len(shape)) * (size + 2)).long() - 2
    stop = start + 1 + (torch.rand(rows, len(shape)) * size).long()
    edges = [(0 * size, size), (size // 2, size // 2), (-size - 3, size * 0 + 1)]
    edges += [(size - 1, 2 * size + 5), (size, size * 0)]
    one = torch.arange(len(shape))
    edges += [(torch.where(one == axis, size // 3, 0), torch.where(one == axis, size - 1, size))
              for axis in (0, len(shape) - 1)]  # fmt: skip
    for row, (first, last) in enumerate(edges):
        start[row], stop[row] = first, last
    return start, stop


def _samples() -> Iterator[Sample]:
    shapes = ((1, 1), (3, 7), (2, 4099), (2, 3, 5, 9), (2, 5, 1, 3), (1, 2, 5, 37, 33))
    for dtype in (torch.float32, torch.float64, torch.int64):
        for shape in (*shapes, (2, 2, 3, 1, 4, 5)):
            x = (100 * torch.randn(shape)).to(dtype)
            example = torch.arange(12) % len(x)
            start, stop = _boxes(shape[1:], 12)
            yield Sample((x, -x.flip(0), example, start, stop))
            yield Sample((x, -x[:1], example, start, stop))
    x = torch.randn(2, 6, 67, 5, dtype=torch.float64)
    example = torch.arange(201) % 2
    yield Sample((x, -x, example, *_boxes(x.shape[1:], 201)))
    x = torch.randn(2, 6, 8, 3).permute(0, 3, 1, 2)
    start, stop = _boxes(x.shape[1:], 8)
    example = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0])
    strided = start.T.contiguous().T
    yield Sample((x, x.flip(2)[:1], example, strided, stop))
    half = torch.randn(2, 3, 17).bfloat16()
    yield Sample((half, -half, example, *_boxes((3, 17), 8)))
    bits = torch.randint(0, 256, (2, 3, 17), dtype=torch.uint8)
    yield Sample((bits, ~bits, example, *_boxes((3, 17), 8)))


window_points = define(
    schema="window_points(Tensor x, Tensor fill, Tensor example, Tensor start, Tensor stop)"
    " -> Tensor",
    reference=_windows,
    fake=fake_points(2),
    samples=_samples,
    triton="windows",
)
"""window_points(x [B, *], fill [B | 1, *], example int64 [R], start, stop int64 [R, D]) -> [R, *]:
example[r] with the elements from start[r] to before stop[r] along its D axes (1 to 5) taken
from the fill, as an occlusion slides its window (Zeiler and Fergus, 2013). Windows are cut at the
edges. x and fill have one type, of any kind: elements are copied."""
