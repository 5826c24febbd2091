"""A folder to work in, with a tiny model that can be imported from it, and pictures."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

TINY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels=1, spatial=2):
        super().__init__()
        kind = nn.Conv2d if spatial == 2 else nn.Conv3d
        self.conv, self.head, self.spatial = kind(channels, 4, 3), nn.Linear(4, 3), spatial

    def forward(self, x):
        hidden = torch.tanh(self.conv(x)).flatten(2).mean(2)
        return self.head(hidden)


def made(*args, **kwargs):
    torch.manual_seed(0)
    return Net(*args, **kwargs)


def grey():
    return made()


def colour():
    return made(3)


def volume():
    return made(1, 3)


def table():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def single():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def plain():
    return lambda x: torch.tanh(x).flatten(1)[:, :3]


class Holder:
    grey = staticmethod(grey)


instance = made()
number = lambda: 3


def broken():
    raise KeyError("no such checkpoint")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory for the test, with tiny.py in it."""
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    yield tmp_path
    sys.modules.pop("tiny", None)


@pytest.fixture
def grey_png(here: Path) -> Path:
    """A grey picture of 14 x 12 (height x width)."""
    levels = np.random.default_rng(0).integers(0, 256, (14, 12), dtype=np.uint8)
    path = here / "grey.png"
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def colour_png(here: Path) -> Path:
    levels = np.random.default_rng(1).integers(0, 256, (14, 12, 3), dtype=np.uint8)
    path = here / "colour.png"
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def clip_npy(here: Path) -> Path:
    """A volume [1, 5, 8, 6]."""
    path = here / "clip.npy"
    np.save(path, torch.rand(1, 5, 8, 6, generator=torch.Generator().manual_seed(0)).numpy())
    return path


@pytest.fixture
def tiny(here: Path) -> ModuleType:
    """tiny.py as a module, for tests that compare with the library itself."""
    spec = spec_from_file_location("tiny_apart", here / "tiny.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
