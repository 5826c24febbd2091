"""Triton kernels with a fault that a test plants, to see that it is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(file: str, old: str, new: str, directory: Path) -> ModuleType:
    """The module `file` of the kernels, in which `new` stands for `old`."""
    whole = importlib.import_module(f"saliency_fast.kernels.{file}").__file__
    text = Path(str(whole)).read_text()
    if old not in text:
        raise ValueError(f"{file}.py has no {old!r}: change the fault with it")
    path = directory / f"{file}.py"
    path.write_text(text.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(f"saliency_fast.kernels.mutant_{file}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
