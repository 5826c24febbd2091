"""Private interfaces of PyTorch: all are there in the release that the tests run on, and fallbacks
give the same numbers.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from saliency_fast import _torch_compat as compat
from saliency_fast.engine.memory import MemoryMeter


def test_every_interface_is_there() -> None:
    optional = [name for name in vars(compat) if name.startswith("_") and name[1:2].islower()]
    names = {"_safe_softmax", "_cpu_attention", "_set_versions", "_is_wrapped", "_interpreter"}
    assert names < set(optional)
    assert all(getattr(compat, name) is not None for name in names | {"_clear"})
    own = vars(nn.Linear(2, 1))
    assert all(name in own for name in (*compat.TABLES, compat.TRANSIENT))
    assert compat.HAS_ONEDNN
    assert compat.HAS_ONEDNN_ORDERS
    assert compat.onednn_enabled()
    assert len(compat.HOOKS_OF_ALL_MODULES) > 4


def test_versions_can_be_set() -> None:
    x = torch.zeros(2)
    x += 1
    assert compat.version_of(x) == 1
    compat.set_version(x, 0)
    assert compat.version_of(x) == 0


def test_softmax_without_the_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 1], logits[1, 2, :2] = -torch.inf, -torch.inf
    expected = compat.softmax_of_masked(logits)
    monkeypatch.setattr(compat, "_safe_softmax", None)
    assert torch.allclose(compat.softmax_of_masked(logits), expected, rtol=1e-15)
    assert not expected[0, 1].any()


def test_attention_without_the_kernel_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = compat.cpu_attention(x, x, x, is_causal=True)
    monkeypatch.setattr(compat, "_cpu_attention", None)
    assert torch.allclose(compat.cpu_attention(x, x, x, is_causal=True), expected, rtol=1e-12)


def test_transforms_are_left() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        assert compat.is_of_transform(x)
        with compat.outside_transforms():
            assert not compat.is_of_transform(torch.ones(2))
        return x * 2

    assert torch.equal(torch.func.vmap(doubled)(torch.ones(3, 2)), torch.full((3, 2), 2.0))


def test_error_texts() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    assert compat.ErrorText.OVERWRITTEN.of(caught.value)
    assert compat.ErrorText.IN_PLACE.of(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2).sum().backward()
    assert compat.ErrorText.NO_GRADIENT.of(caught.value)


PRIVATE = re.compile(
    r"torch\._[A-Za-z]|torch\.utils\._|\b_C\b(?!\*)|torch\.ops\.(?:aten|mkldnn)"
    r"|\._(?:version|cdata|sequence_nr|parameters|buffers|modules|orig_mod|schema)\b"
    r"|\._(?:forward_cls|current_level|save_to_state_dict|[a-z_]*_hooks)\b"
)
"""How private interfaces of PyTorch are spelled."""
# Not moved yet; a file that has none any more leaves the list.


def test_private_interfaces_are_used_in_one_file_alone() -> None:
    root = Path(compat.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    found = {
        name
        for name, path in files.items()
        if not name.startswith("kernels/") and name != "_torch_compat.py"
        if PRIVATE.search(path.read_text())
    }
    assert not found


def test_operators_of_gradients() -> None:
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    functional.avg_pool2d(x, 2).sum().backward()
    back = compat.backward_operator("avg_pool2d")
    ones = torch.ones(1, 2, 2, 2)
    assert x.grad is not None
    assert torch.equal(back(ones, x.detach(), [2, 2], [2, 2], [0, 0], False, True, None), x.grad)


def test_steps_of_autograd() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    assert compat.custom_function(Doubled.apply(x).grad_fn) is Doubled  # type: ignore[no-untyped-call]
    assert compat.custom_function(x.exp().grad_fn) is None
    model = nn.Linear(2, 1)
    model.register_full_backward_hook(lambda *_: None)
    assert compat.is_module_hook(model(x).grad_fn)
    assert not compat.is_module_hook(x.exp().grad_fn)
    first, second = x.exp().grad_fn, x.exp().grad_fn
    assert compat.sequence_number(first) < compat.sequence_number(second)


def test_modes_are_seen() -> None:
    inside: list[bool] = []
    torch.func.vmap(lambda x: (inside.append(compat.inside_transform()), x)[1])(torch.ones(2))
    assert (*inside, compat.inside_transform()) == (True, False)
    with torch.autograd.forward_ad.dual_level():
        assert compat.inside_dual_level()
    assert not compat.inside_dual_level()
    with torch.autograd.graph.saved_tensors_hooks(abs, abs):
        assert compat.saved_tensors_hooks() == (abs, abs)
    assert compat.saved_tensors_hooks() == (None, None)


def test_dispatch_modes_of_threads_that_overlap_leave_compilation_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other modes, of tests before this one, may have left it on.
    for name in compat._FLAGS:
        monkeypatch.setattr(torch.utils._python_dispatch, name, False)
    entered, left = threading.Event(), threading.Event()

    def longer() -> None:
        with MemoryMeter():
            entered.set()
            assert left.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with MemoryMeter():
            task = pool.submit(longer)
            assert entered.wait(30)
        left.set()
        task.result()
    graphs = []

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(nn.Linear(2, 1), backend=noted)(torch.ones(1, 2))
    assert graphs
    with MemoryMeter() as meter, MemoryMeter():
        assert meter is not None
        assert torch.utils._python_dispatch.is_in_torch_dispatch_mode()
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def test_functions_without_their_check_for_modes() -> None:
    copy = compat.unguarded(functional.softmin)
    assert copy is not None
    x = torch.ones(2)
    assert copy.__code__ is functional.softmin.__code__
    assert torch.equal(copy(x, 0), functional.softmin(x, 0))
    assert compat.unguarded(torch.Tensor.backward) is None


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(2, 1)
    assert compat.unwrapped(torch.compile(model)) is model
    assert compat.unwrapped(nn.DataParallel(model)) is model
    assert compat.unwrapped(model) is model


def test_what_modules_save_by_their_own_code() -> None:
    class Own(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return self.weight

    model = Own(2, 1)
    state = compat.own_state(model, "a.")
    assert state is not None
    assert state["a.weight"] is model.weight
    assert compat.own_state(nn.Linear(2, 1), "a.") is None
