"""Fingerprints of models that other threads use."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from torch import nn

from saliency_fast.graph.fingerprint import fingerprint


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_hooks_that_come_and_go_meanwhile(frequent_switches: None) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(30)))
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            hooks = [part.register_forward_hook(print) for part in model for _ in range(20)]
            for hook in hooks:
                hook.remove()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(300):
            fingerprint(model)
    finally:
        over.set()
        other.join()
    assert fingerprint(model) == fingerprint(model)
