"""Runs blocks under torch.utils.checkpoint once, where hooks and modes of ours must see them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint

# Both are what every kind of checkpoint of PyTorch goes through, under whatever name it was
# imported: `checkpoint`, `checkpoint_sequential`, wrappers of other libraries.
_Reentrant: Any = torch_checkpoint.CheckpointFunction
_Hook: Any = torch_checkpoint._checkpoint_hook
_LOCK = threading.Lock()
_LOCAL = threading.local()
_USERS = [0]


@contextmanager
def without_recomputation(*, once: bool = True) -> Iterator[None]:
    """Inside, torch.utils.checkpoint runs its functions once in this thread, as plain calls.

    Hooks and function modes hold for one forward pass: what a checkpoint computes again on the way
    back would run without them, in one of autograd's threads. Activations are kept instead, and
    counted as such. once: False leaves checkpoints with use_reentrant=False as they are, and takes
    that kind in the place of the other one, which refuses torch.autograd.grad.
    """
    before = getattr(_LOCAL, "once", None)
    _install()
    # The stricter of nested ones holds.
    _LOCAL.once = once or bool(before)
    try:
        yield
    finally:
        _LOCAL.once = before
        _uninstall()


def _install() -> None:
    with _LOCK:
        _USERS[0] += 1
        if _USERS[0] == 1:
            # Both hide inherited methods, which other threads go on to.
            _Reentrant.apply = staticmethod(_apply)
            _Hook.__enter__, _Hook.__exit__ = _enter, _leave


def _uninstall() -> None:
    with _LOCK:
        _USERS[0] -= 1
        if _USERS[0] == 0:
            del _Reentrant.apply, _Hook.__enter__, _Hook.__exit__


def _apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    once = getattr(_LOCAL, "once", None)
    if once is None:
        return super(_Reentrant, _Reentrant).apply(function, preserve, *args)
    if once:
        return function(*args)
    return torch_checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=preserve
    )


def _enter(hook: Any) -> None:
    # Without its hooks, what a checkpoint's function saves is kept as anywhere else.
    hook.skipped = bool(getattr(_LOCAL, "once", None))
    if not hook.skipped:
        saved_tensors_hooks.__enter__(hook)


def _leave(hook: Any, *error: Any) -> None:
    # Entered before `_enter` was there, where another thread put it there meanwhile.
    if not getattr(hook, "skipped", False):
        saved_tensors_hooks.__exit__(hook, *error)
