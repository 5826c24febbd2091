"""What every launcher shares: its device, and contiguous stand-ins of totals."""

import contextlib

import torch


def on(tensor):
    """Makes the tensor's GPU current; on a CPU (the interpreter) there is nothing to do."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def contiguous(*totals):
    """Yields tensors to update in place, and writes copies back where `totals` are strided."""
    copies = [total.contiguous() for total in totals]
    yield copies
    for total, copy in zip(totals, copies, strict=True):
        if copy is not total:
            total.copy_(copy)
