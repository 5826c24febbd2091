"""Inputs from files: pictures, arrays and tensors, alone or in folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saliency_fast._torch_compat import ErrorText
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
"""Default limit of a picture, since a small file may decompress to any size."""

Prepare = Callable[[Image.Image], Tensor]
"""From a picture to a model's input [1, C, H, W]."""


@dataclass(frozen=True)
class Read:
    """An input [B, *]: a name for the files about it, and the source that reads it again."""

    name: str
    source: str
    x: Tensor


@dataclass(frozen=True)
class Form:
    """Reads pictures to [1, C, H, W] in [0, 1]. size: (height, width); None keeps what they have.

    Pictures of 16 bits keep their depth; transparency is dropped.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        if (levels := _levels(picture)) is not None:
            picture = Image.fromarray(levels)
        channels = self.channels or (1 if picture.mode in ("1", "L", "LA", "F") else 3)
        if picture.mode == "F":
            planes = [picture] * channels
        else:
            planes = list(picture.convert("L" if channels == 1 else "RGB").split())
        if self.size is not None:
            height, width = self.size
            planes = [one.resize((width, height), Image.Resampling.BILINEAR) for one in planes]
        stacked = np.stack([np.asarray(one, dtype=np.float32) for one in planes])
        return torch.from_numpy(stacked)[None] / 255.0


def read_form(size: str | None, channels: int | None) -> Form | None:
    """A form from `--size 224` or `--size 224x320` (height x width) and `--channels`."""
    if size is None:
        return None if channels is None else Form(None, channels)
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise InputError(f"--size must be a number or HEIGHTxWIDTH such as 224x320: got {size!r}")
    return Form((int(sides[0]), int(sides[-1])), channels)


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in mode "RGB" or "L" for processors that take 8 bits: 16 bits are rounded to 8,
    which Pillow itself would clip.
    """
    if (levels := _levels(picture)) is not None:
        picture = Image.fromarray(levels.round().astype(np.uint8))
    return picture.convert(mode)


def _levels(picture: Image.Image) -> npt.NDArray[np.float32] | None:
    """Grey levels in [0, 255] of a picture of 16 bits per pixel; None for others."""
    if not picture.mode.startswith("I"):
        return None
    levels = np.asarray(picture, dtype=np.float64).clip(0.0, 65535.0) / 257.0
    return levels.astype(np.float32)


def read_inputs(
    sources: Iterable[str],
    prepare: Prepare,
    dtype: torch.dtype,
    batched: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[Read]:
    """Reads everything that `sources` name, and makes the names unique.

    Arrays are cast to `dtype` and neither scaled nor resized. An array is one example, unless
    `batched` says that its first axis is a batch axis; a picture always is one.
    """
    taken: set[str] = set()
    unique = []
    for source in sources:
        for one in _read(source, prepare, dtype, batched, max_pixels):
            name, number = one.name, 1
            while name in taken:
                number += 1
                name = f"{one.name}-{number}"
            taken.add(name)
            unique.append(replace(one, name=name))
    return unique


def _read(
    source: str, prepare: Prepare, dtype: torch.dtype, batched: bool, max_pixels: int
) -> Iterator[Read]:
    path = Path(source.partition(SEPARATOR)[0])
    suffix = path.suffix.lower()
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURES + ARRAYS)
        if not files:
            raise InputError(f"folder {source} holds no input: expected {EXPECTED}")
        for one in files:
            yield from _read(str(one), prepare, dtype, batched, max_pixels)
    elif not path.exists():
        raise InputError(f"{source} does not exist: expected {EXPECTED}")
    elif suffix in PICTURES:
        try:
            x = prepare(_picture(path, max_pixels)).to(dtype)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not ErrorText.ALLOCATION.of(error):
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


def read_tensors(source: str) -> list[tuple[str, str, Tensor]]:
    """(name, source, tensor) of an .npy file, or of each tensor of a .safetensors file."""
    file, _, wanted = source.partition(SEPARATOR)
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file} does not exist or is not a file: expected {EXPECTED}")
    try:
        if path.suffix.lower() == ".npy":
            array: Any = np.load(path, allow_pickle=False)
            return [(path.stem, source, torch.from_numpy(np.ascontiguousarray(array)))]
        with safe_open(str(path), framework="pt") as opened:
            names = sorted(opened.keys())
            if wanted and wanted not in names:
                raise InputError(
                    f"{file} has no tensor {wanted!r}: expected one of {', '.join(names)}"
                )
            found = []
            for name in [wanted] if wanted else names:
                plain = "".join(one if one.isalnum() or one in "._-" else "_" for one in name)
                again = f"{file}{SEPARATOR}{name}"
                found.append((f"{path.stem}.{plain}", again, opened.get_tensor(name)))
            return found
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, EOFError) as error:
        raise _unreadable(path, error) from error


def read_tensor(option: str, source: str) -> Tensor:
    """The one tensor that the value of an option names."""
    found = read_tensors(source)
    if len(found) > 1:
        raise InputError(f"{option} {source} holds {len(found)} tensors: name one, {found[0][1]}")
    return found[0][2]


def names_array(text: str) -> bool:
    """Whether the value of an option is the path of an array."""
    return text.partition(SEPARATOR)[0].lower().endswith(ARRAYS)


def _picture(path: Path, max_pixels: int) -> Image.Image:
    # Pillow's own limit is global and has no option; --max-pixels limits each picture instead.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise InputError(
                    f"{path} is too large: got {width} x {height} = {width * height} pixels, "
                    f"expected at most {max_pixels}; pass --max-pixels {width * height} if the "
                    "file is to be trusted and there is memory for it (and --size, as the model "
                    "wants it), or make a smaller copy"
                )
            opened.load()
            return ImageOps.exif_transpose(opened)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _unreadable(path: Path, error: Exception) -> InputError:
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(f"{path} cannot be read: {why}; expected {EXPECTED}")
