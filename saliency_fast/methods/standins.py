from __future__ import annotations

import torch
from torch import Tensor


def window_points(x: Tensor, fill: Tensor, item: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    inside = torch.ones((len(item), *x.shape[1:]), dtype=torch.bool, device=x.device)
    for axis in range(1, x.dim()):
        place = torch.arange(x.shape[axis], device=x.device).view(-1, *(1,) * (x.dim() - axis - 1))
        shape = (-1, *(1,) * (x.dim() - 1))
        inside &= (place >= start[:, axis - 1].view(shape)) & (
            place < stop[:, axis - 1].view(shape)
        )
    return torch.where(inside, fill[item % len(fill)], x[item])


def segment_points(
    x: Tensor, fill: Tensor, segment: Tensor, present: Tensor, item: Tensor, place: Tensor
) -> Tensor:
    own = segment[item % len(segment)].flatten(1)
    kept = present[place].gather(1, own).view(len(item), *x.shape[1:])
    return torch.where(kept, x[item], fill[item % len(fill)])


def mask_points(x: Tensor, fill: Tensor, mask: Tensor, item: Tensor, place: Tensor) -> Tensor:
    start = fill[item % len(fill)]
    return start + mask[place].to(x.dtype).view(len(item), *_broadcast(x, mask)) * (x[item] - start)


def _broadcast(x: Tensor, mask: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:]) if mask.shape[1] == x[0].numel() else (1, *x.shape[2:])
