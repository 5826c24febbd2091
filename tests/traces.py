"""What a call may not change: everything about a model, its inputs and the process, compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Notes(SimpleNamespace):
    """What a model notes of its calls; lists and numbers of a module itself would come back."""


class Net(nn.Module):
    """Images [B, 3, 9, 9] to `after(scores [B, 5])`, with everything that a call could upset.

    It stands in training mode but for one frozen module, has a frozen parameter and one whose
    .grad is set.
    """

    def __init__(self, after: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            self.norm, self.drop, self.head = nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 5)
            self.body[1].running_var.uniform_(0.5, 2.0)
        self.after = after
        self.train()
        self.norm.eval()
        self.body[0].weight.requires_grad_(False)
        self.head.bias.grad = torch.ones(5)
        self.head.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor, *more: Any) -> Any:
        scores = self.head(self.drop(self.norm(self.body(x)).mean((2, 3))))
        return scores if self.after is None else self.after(scores)


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny models: waiting for a second thread would take most of their time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unchanged(model: Any, *tensors: Tensor) -> Iterator[None]:
    """Asserts that its body changes nothing of `model`, of `tensors` or of the process."""
    before = _picture(model, tensors)
    yield
    after = _picture(model, tensors)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"changed: {', '.join(changed)}"


def _picture(model: Any, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    found = _process()
    for number, tensor in enumerate(tensors):
        found |= _tensor(f"tensor {number}", tensor)
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            found[f"{name}.training"] = module.training
            found[f"{name} attributes"] = sorted(vars(module))
            for hooks in (one for one in vars(module) if one.endswith("hooks")):
                found[f"{name}.{hooks}"] = list(getattr(module, hooks) or ())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            found |= _tensor(name, tensor)
        found["state_dict"] = list(model.state_dict())
    return found


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    grad = tensor.grad if tensor.is_leaf else None
    return {
        f"{name} contents": _bytes(tensor),
        f"{name}.grad": None if grad is None else _bytes(grad),
        f"{name}.requires_grad": tensor.requires_grad,
        f"{name} hooks": list(tensor._backward_hooks or ()),
        f"{name} identity": (id(tensor), tensor.data_ptr(), tensor.shape, tensor.stride()),
        # Inference tensors count no writes; their contents must do.
        f"{name} writes": None if tensor.is_inference() else tensor._version,
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _process() -> dict[str, Any]:
    shared = torch.nn.modules.module
    return {
        "torch random state": _bytes(torch.random.get_rng_state()),
        "python random state": random.getstate(),
        "numpy random state": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "global hooks": [
            len(getattr(shared, name)) for name in sorted(vars(shared)) if name.endswith("_hooks")
        ],
    }
