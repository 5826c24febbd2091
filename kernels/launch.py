"""What every launcher shares: its device, contiguous stand-ins of totals, and the tile's size."""

import contextlib

import torch

WARPS = 4
"""Warps of a program, of 32 threads (64 on AMD)."""


def on(tensor):
    """Makes the tensor's GPU current; on a CPU (the interpreter) there is nothing to do."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def tile(dtype, accesses):
    """Elements of a program in which each of its threads makes `accesses` of 16 bytes."""
    return WARPS * 32 * 16 * accesses // dtype.itemsize


@contextlib.contextmanager
def contiguous(*totals):
    """Yields tensors to update in place, and writes copies back where `totals` are strided."""
    copies = [total.contiguous() for total in totals]
    yield copies
    for total, copy in zip(totals, copies, strict=True):
        if copy is not total:
            total.copy_(copy)
