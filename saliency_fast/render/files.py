"""Picture files of frames: PNG, GIF, animated PNG and MP4, chosen by the extension."""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError

EXTENSIONS = (".png", ".gif", ".apng", ".mp4")
FRAMES_PER_SECOND = 8.0

Frames = NDArray[np.uint8]


def write_frames(
    frames: Tensor, path: str | Path, frames_per_second: float = FRAMES_PER_SECOND
) -> Path:
    """Writes uint8 frames [H, W, 3] or [T, H, W, 3] in the format of the path's extension."""
    path = Path(path)
    if path.suffix.lower() == ".mp4":
        _write_mp4(_checked(frames), path, frames_per_second)
    else:
        path.write_bytes(encode(frames, path.suffix, frames_per_second))
    return path


def encode(frames: Tensor, extension: str, frames_per_second: float = FRAMES_PER_SECOND) -> bytes:
    """Frames [H, W, 3] or [T, H, W, 3] as the bytes of a ".png", ".gif" or ".apng"."""
    from PIL import Image

    extension = extension.lower() or "no extension"
    if extension not in EXTENSIONS[:3]:
        raise InputError(f"pictures end in one of {', '.join(EXTENSIONS)}: got {extension!r}")
    first, *rest = [Image.fromarray(one) for one in _checked(frames)]
    buffer = BytesIO()
    if extension == ".png":
        if rest:
            raise InputError(
                f"a .png holds one frame: got {1 + len(rest)}; write a .gif or an .mp4 instead"
            )
        first.save(buffer, "PNG", optimize=True)
    else:
        kind = "GIF" if extension == ".gif" else "PNG"
        duration = round(1000.0 / frames_per_second)
        # Pillow joins equal neighbours into one longer frame, so the total time stays the same.
        first.save(buffer, kind, save_all=True, append_images=rest, duration=duration, loop=0)
    return buffer.getvalue()


def _write_mp4(frames: Frames, path: Path, frames_per_second: float) -> None:
    try:
        imageio = import_module("imageio.v2")
        import_module("imageio_ffmpeg")
    except ImportError as error:
        raise InputError(
            "writing .mp4 needs imageio and imageio-ffmpeg: install the extra with pip install "
            "'saliency-fast[video]', or write a .gif"
        ) from error
    # H.264 with 4:2:0 chroma subsampling accepts even sizes only.
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    of = {"format": "FFMPEG", "fps": frames_per_second, "macro_block_size": 2}
    with imageio.get_writer(path, **of) as writer:
        for frame in even:
            writer.append_data(frame)


def _checked(frames: Tensor) -> Frames:
    """Frames as uint8 [T, H, W, 3] on the CPU."""
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise InputTypeError(f"frames must be a uint8 tensor: got {got}; see Attribution.overlay")
    if frames.dim() not in (3, 4) or frames.shape[-1] != 3 or frames.numel() == 0:
        raise InputError(
            f"frames must be [H, W, 3] or [T, H, W, 3]: got {list(frames.shape)}; take one example "
            "of a batch"
        )
    stacked = frames if frames.dim() == 4 else frames[None]
    array: Frames = stacked.cpu().contiguous().numpy()
    return array
