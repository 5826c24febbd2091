"""What a first call of a process imports: nothing that takes longer than the call."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
import saliency_fast as sf

net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
net = nn.Sequential(net, nn.Flatten(), nn.Linear(8 * 62 * 62, 5)).eval()
x = torch.randn(1, 3, 64, 64)
assert "sympy" not in sys.modules, "imported with PyTorch"
found = sf.explain(net, x, target=3, method={method!r})
assert "sympy" not in sys.modules, "imported by the call"
"""


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smoothgrad", "grad_cam"])
def test_symbolic_shapes_are_not_imported(method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(method=method)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
