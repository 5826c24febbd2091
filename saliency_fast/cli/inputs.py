"""Inputs: pictures, arrays and tensors from files and folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saliency_fast.cli.models import Prepare
from saliency_fast.errors import InputError
from saliency_fast.model.casts import cast

PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npy", ".safetensors")
EXPECTED = (
    "a picture (.png, .jpg, .jpeg), an array (.npy), tensors (.safetensors, or FILE::NAME for one "
    "of them), or a folder of these"
)
SEPARATOR = "::"
MAX_PIXELS = 16384 * 16384
"""Of a picture, unless the caller allows more: a small file may hold any number."""


@dataclass(frozen=True)
class Read:
    """One input [B, *]: a name for its files, and the source that reads it again."""

    name: str
    source: str
    x: Tensor


def read_inputs(
    sources: Iterable[str],
    prepare: Prepare,
    dtype: torch.dtype,
    batched: bool = False,
    most: int = MAX_PIXELS,
) -> list[Read]:
    """Everything that `sources` name, with names made unique.

    Arrays are one example each and get a batch axis, unless `batched` says that their first axis
    is one; pictures are always one example. Arrays are brought to `dtype` as they are: nothing is
    scaled or resized. most: pixels that a picture may have. Raises InputError with the file and
    what was expected.
    """
    found = [one for source in sources for one in _read(source, prepare, dtype, batched, most)]
    taken: set[str] = set()
    unique = []
    for one in found:
        name, number = one.name, 1
        while name in taken:
            number += 1
            name = f"{one.name}-{number}"
        taken.add(name)
        unique.append(replace(one, name=name))
    return unique


def read_tensors(source: str) -> list[tuple[str, str, Tensor]]:
    """(name, source, tensor) of an .npy file, or of each tensor of a .safetensors file."""
    file, _, wanted = source.partition(SEPARATOR)
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file} does not exist or is not a file: expected {EXPECTED}")
    if path.suffix.lower() == ".npy":
        return [(path.stem, source, _array(path))]
    try:
        with safe_open(str(path), framework="pt") as opened:
            names = sorted(opened.keys())
            if wanted and wanted not in names:
                raise InputError(
                    f"{file} has no tensor {wanted!r}: expected one of {', '.join(names)}"
                )
            chosen = [wanted] if wanted else names
            return [
                (f"{path.stem}.{_plain(one)}", f"{file}{SEPARATOR}{one}", opened.get_tensor(one))
                for one in chosen
            ]
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read(
    source: str, prepare: Prepare, dtype: torch.dtype, batched: bool, most: int
) -> Iterator[Read]:
    path = Path(source.partition(SEPARATOR)[0])
    suffix = path.suffix.lower()
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURES + ARRAYS)
        if not files:
            raise InputError(f"folder {source} holds no input: expected {EXPECTED}")
        for one in files:
            yield from _read(str(one), prepare, dtype, batched, most)
    elif not path.exists():
        raise InputError(f"{source} does not exist: expected {EXPECTED}")
    elif suffix in PICTURES:
        try:
            x = prepare(_picture(path, most)).to(dtype)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "alloc" not in str(error):
                raise
            raise InputError(
                f"{path} does not fit the memory, as its pixels or as numbers: make a smaller copy "
                "of it, cut out the part that matters, or pass --size"
            ) from error
        yield Read(path.stem, source, x)
    elif suffix in ARRAYS:
        for name, again, tensor in read_tensors(source):
            whole = cast(tensor, dtype, name, f"the model takes {dtype}: scale or round it first")
            yield Read(name, again, whole if batched else whole[None])
    else:
        raise InputError(f"{source} is of no known kind: got {suffix!r}, expected {EXPECTED}")


def _picture(path: Path, most: int) -> Image.Image:
    try:
        with _unlimited(), Image.open(path, formats=("PNG", "JPEG")) as opened:
            width, height = opened.size
            if width * height > most:
                raise InputError(
                    f"{path} is too large: got {width} x {height} = {width * height} pixels, "
                    f"expected at most {most}; pass --max-pixels {width * height} if the file "
                    "is to be trusted and there is memory for it (and --size, as the model wants "
                    "it), or make a smaller copy"
                )
            opened.load()
            return ImageOps.exif_transpose(opened)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _unlimited() -> Iterator[None]:
    """Without Pillow's own limit, which knows no option: the number of pixels is ours to check."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _array(path: Path) -> Tensor:
    try:
        array: Any = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    lines = str(error).splitlines()
    why = lines[0] if lines else type(error).__name__
    return InputError(f"{path} cannot be read: {why}; expected {EXPECTED}")


def _plain(name: str) -> str:
    """A tensor's name as part of a file name."""
    return "".join(one if one.isalnum() or one in "._-" else "_" for one in name)
