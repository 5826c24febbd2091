"""Frames: a map drawn over its input, as uint8 pictures, and their files."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast import ops
from saliency_fast.errors import InputError, InputTypeError

# Colours (position, red, green, blue) between which the table is interpolated.
_ANCHORS = {
    "signed": (
        *((0.0, 20, 60, 160), (0.25, 90, 150, 230), (0.5, 245, 245, 245)),
        *((0.75, 240, 130, 80), (1.0, 170, 20, 30)),
    ),
    "heat": (
        *((0.0, 10, 5, 30), (0.3, 110, 20, 110), (0.6, 220, 70, 60)),
        *((0.85, 250, 180, 60), (1.0, 255, 250, 190)),
    ),
}
STYLES = tuple(_ANCHORS)


@cache
def colors(style: str) -> Tensor:
    """The colour table of a style, uint8 [256, 3]."""
    if style not in _ANCHORS:
        raise InputError(f"style must be one of {', '.join(STYLES)}: got {style!r}")
    anchors = np.array(_ANCHORS[style], dtype=np.float64)
    positions = np.linspace(0.0, 1.0, 256)
    table = [np.interp(positions, anchors[:, 0], anchors[:, channel]) for channel in (1, 2, 3)]
    return torch.from_numpy(np.stack(table, axis=1).round().astype(np.uint8))


def frames(
    x: Tensor,
    maps: Tensor,
    style: str,
    percentile: float,
    opacity: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Draws maps [B, *spatial] or [B, K, *spatial] over x [B, C, *spatial] as uint8 [..., 3].

    scale: the magnitude at full strength, one per map; the magnitude at `percentile` by default.
    """
    if not 0.0 <= percentile <= 100.0:
        raise InputError(f"percentile must lie in [0, 100]: got {percentile}")
    if not 0.0 <= opacity <= 1.0:
        raise InputError(f"opacity must lie in [0, 1]: got {opacity}")
    spatial = x.shape[2:]
    if len(spatial) not in (2, 3):
        raise InputError(
            f"only images, videos and volumes have a picture: got an input {list(x.shape)}; "
            "use Attribution.map()"
        )
    if maps.shape[-len(spatial) :] != spatial or len(maps) != len(x):
        raise InputError(
            f"the input is not the one explained: got {list(x.shape)} for maps {list(maps.shape)}"
        )
    lead = maps.shape[: maps.dim() - len(spatial)]
    shown = picture(x).to(maps.device)
    if len(lead) == 2:
        shown = shown.repeat_interleave(lead[1], dim=0)
    values = maps.reshape(-1, spatial.numel())
    if scale is None:
        scale = ops.magnitude_percentile(values, percentile)
    flat = shown.reshape(len(values), -1, 3)
    table = colors(style).to(maps.device)
    drawn: Tensor = ops.overlay(flat, values, scale, table, style == "signed", opacity)
    return drawn.view(*lead, *spatial, 3)


def picture(x: Tensor) -> Tensor:
    """An input [B, C, *spatial] as uint8 [B, *spatial, 3], each example scaled to its own range."""
    if x.shape[1] in (3, 4):
        channels = x[:, :3]
    else:
        channels = x[:, :1] if x.shape[1] <= 2 else x.mean(1, keepdim=True)
    low, high = torch.aminmax(channels.flatten(1), dim=1)
    shape = (-1, *(1,) * (x.dim() - 1))
    span = (high - low).clamp_min(torch.finfo(x.dtype).tiny).view(shape)
    levels = ((channels - low.view(shape)) / span * 255.0).round().to(torch.uint8)
    return levels.expand(-1, 3, *x.shape[2:]).movedim(1, -1).contiguous()


def grey(x: Tensor) -> Tensor:
    """The luma [B, 1, *] of a coloured picture: in an overlay only the map has colour."""
    if x.shape[1] not in (3, 4):
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return torch.einsum("bc...,c->b...", x[:, :3], weights)[:, None]


# --- Files: PNG, GIF, animated PNG and MP4, chosen by the extension -------------------------------

EXTENSIONS = (".png", ".gif", ".apng", ".mp4")
FRAMES_PER_SECOND = 8.0

Frames = NDArray[np.uint8]


def make_folder(path: str | Path, what: str = "folder") -> Path:
    """A folder that is made where it does not exist; what: the name of the path in errors."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be made: {error.strerror}") from error
    return folder


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
