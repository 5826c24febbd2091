"""Leaves no trace: evaluation mode, random state, autograd modes and what a model changes of itself
come back in any event.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from saliency_fast.model.recomputation import without_recomputation
from saliency_fast.model.state import preserved

_LOCK = threading.Lock()
_HELD: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many calls hold each module that stands in training mode outside of them."""


@contextmanager
def preserve_model_state(
    model: Callable[..., Any], device: torch.device, *, draws: bool = True
) -> Iterator[bool]:
    """Runs its body with the model in evaluation mode; yields whether it was in training mode.

    Restores modes, random states and what the model changed of itself on the way out, also after an
    exception or Ctrl-C. Threads may share a model, or parts of one: modes come back when the last
    of them leaves. draws: whether random states are restored, which are the whole process's: not
    where other threads work on.
    """
    if not draws:
        with _quiet(model, device, rewinds=False) as was_training:
            yield was_training
        return
    with same_draws(lambda: True, device), _quiet(model, device) as was_training:
        yield was_training


@contextmanager
def same_draws(drew: Callable[[], bool], device: torch.device) -> Iterator[None]:
    """Whatever a model draws inside, it draws again afterwards. drew: whether it did; else random
    numbers are other threads' business, since the state is the whole process's.
    """
    before = random_states(device)
    try:
        yield
    finally:
        # A model that draws nothing leaves the states alone, and so do we.
        if drew() and not all(map(torch.equal, before, random_states(device))):
            draw_again(before, device)


def random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a model on the device draws from."""
    states = [torch.random.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def draw_again(states: list[Tensor], device: torch.device) -> None:
    """Puts generators back to what `random_states` gave."""
    torch.random.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _quiet(
    model: Callable[..., Any], device: torch.device, *, rewinds: bool = True
) -> Iterator[bool]:
    with (
        _outside_transforms(),
        _evaluating(model) as was_training,
        preserved(model, rewinds=rewinds),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        without_recomputation(once=False),
    ):
        yield was_training


def _outside_transforms() -> AbstractContextManager[object]:
    """Inside, transforms of torch.func that the caller is in do not see what runs."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[bool]:
    if not isinstance(model, nn.Module):
        yield False
        return
    with _LOCK:
        # Frozen TorchScript has no mode any more.
        modules = [module for module in model.modules() if hasattr(module, "training")]
        held = [module for module in modules if module.training or module in _HELD]
        for module in held:
            _HELD[module] = _HELD.get(module, 0) + 1
            module.training = False
    try:
        yield bool(held)
    finally:
        with _LOCK:
            for module in held:
                count = _HELD.pop(module)
                if count > 1:
                    _HELD[module] = count - 1
                else:
                    module.training = True


_EAGER = threading.Lock()
Called = TypeVar("Called", bound=Callable[..., Any])


def uncaptured(function: Called) -> Called:
    """The function, which torch.compile leaves as it is with all that it calls: in a function that
    is being compiled, it would compile our own frames one by one.
    """

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]

    return cast(Called, called)


_STANCES: list[Any] = []
"""PyTorch's stance, which is the whole process's, once for every thread inside `uncompiled`."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, models of torch.compile run as they are: it would try to compile what watches
    them, and give up the model for good.
    """
    # What was never imported has compiled nothing, and takes a second to import.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    held = False
    # Refused inside of a function that is being compiled, where the model is no frame of its own.
    with _EAGER, suppress(RuntimeError):
        # Set by being made; each alone would bring back what the others have set.
        _STANCES.append(_STANCES[0] if _STANCES else torch.compiler.set_stance("force_eager"))
        held = True
    try:
        yield
    finally:
        with _EAGER:
            last = _STANCES.pop() if held else None
            if last is not None and not _STANCES:
                last.__exit__(None, None, None)
