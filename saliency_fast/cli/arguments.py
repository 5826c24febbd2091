"""From the texts of options to inputs, models, methods, targets, baselines, layers and boxes."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from saliency_fast import zoo
from saliency_fast._torch_compat import ErrorText
from saliency_fast.cli.parser import MAX_PIXELS
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError
from saliency_fast.methods import make_method
from saliency_fast.model.casts import cast

PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npy", ".safetensors")
EXPECTED = (
    "a picture (.png, .jpg, .jpeg), an array (.npy), tensors (.safetensors, or FILE::NAME for one "
    "of them), or a folder of these"
)
SEPARATOR = "::"
FORMS = (
    "package.module:factory (a callable without arguments, or a module), hf:PATH_OR_ID, "
    "torchvision:NAME, timm:NAME"
)
BOXES = (
    "an .npy or .safetensors file of whole numbers [B, 2 D] or bool masks [B, *spatial], a .json "
    "list of boxes or mapping from names of inputs to boxes, or a .csv with a box in each line "
    "and, if wanted, a name before it; a box is top,left,bottom,right, half-open, in pixels"
)

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
    """Reads pictures to [1, C, H, W] in [0, 1]. size: (height, width), None for their own."""

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
    """A picture in mode "RGB" or "L"; 16 bits are rounded to 8, which Pillow would clip."""
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
    """Reads all `sources` under unique names; arrays are one example each, unless `batched`."""
    unique: dict[str, Read] = {}
    for source in sources:
        for one in _read(source, prepare, dtype, batched, max_pixels):
            name, number = one.name, 2
            while name in unique:
                name, number = f"{one.name}-{number}", number + 1
            unique[name] = replace(one, name=name)
    return list(unique.values())


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
    file, _, tensor_name = source.partition(SEPARATOR)
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file} does not exist or is not a file: expected {EXPECTED}")
    try:
        if path.suffix.lower() == ".npy":
            array: Any = np.load(path, allow_pickle=False)
            return [(path.stem, source, torch.from_numpy(np.ascontiguousarray(array)))]
        with safe_open(str(path), framework="pt") as opened:
            names = sorted(opened.keys())
            if tensor_name and tensor_name not in names:
                raise InputError(
                    f"{file} has no tensor {tensor_name!r}: expected one of {', '.join(names)}"
                )
            found = []
            for name in [tensor_name] if tensor_name else names:
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


# --- Models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, how it takes a picture, and the names of its classes."""

    spec: str
    model: Callable[..., Any]
    prepare: Prepare
    labels: Mapping[int, str]

    @property
    def dtype(self) -> torch.dtype:
        weights = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        return next((one.dtype for one in weights if one.is_floating_point()), torch.float32)


def load_model(
    spec: str, weights: str | None = None, form: Form | None = None, device: str = "cpu"
) -> Loaded:
    """The model that `spec` names. form: how pictures are read, instead of its own processing."""
    try:
        torch.empty(1, device=device)
    except Exception as error:
        raise InputError(
            f"--device {device!r} cannot be used: {reason(error)}; expected cpu, or cuda where "
            "PyTorch sees a GPU"
        ) from error
    kind, _, name = spec.partition(":")
    if spec in zoo.MODELS:
        labels = {number: f"digit {number}" for number in range(10)}
        loaded = Loaded(spec, zoo.MODELS[spec](), Form((64, 64), 1), labels)
    elif name:
        loaded = _HUBS.get(kind, _imported)(spec, name, weights is None)
    else:
        raise InputError(
            f"--model {spec!r} is unknown: expected one of {', '.join(zoo.MODELS)}, or {FORMS}"
        )
    if weights is not None:
        _load_weights(loaded.model, weights)
    if isinstance(loaded.model, nn.Module):
        loaded = replace(loaded, model=loaded.model.to(device).eval())
    return loaded if form is None else replace(loaded, prepare=form)


def reason(error: BaseException) -> str:
    """The first line of the root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _imported(spec: str, attribute: str, pretrained: bool) -> Loaded:
    """What `package.module:factory` makes; modules of the current directory can be imported."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(spec.partition(":")[0])
        found: Any = attrgetter(attribute)(module)
        made = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise InputError(
            f"--model {spec!r} cannot be made: {reason(error)}; expected one of "
            f"{', '.join(zoo.MODELS)}, or {FORMS}"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(made):
        raise InputError(
            f"--model {spec!r} must give a model that can be called: got {type(made).__name__}"
        )
    return Loaded(spec, made, Form(), {})


def _package(name: str, extra: str, spec: str) -> ModuleType:
    """Imports an optional package; an error names the extra that installs it."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ImportError)
        state = "not installed" if missing else "installed but does not import"
        version = f"a version that matches torch {torch.__version__}, for example"
        raise InputError(
            f"--model {spec!r} needs {name}, which is {state} ({reason(error)}): install "
            f"{'the extra' if missing else version} with pip install 'saliency-fast[{extra}]'"
        ) from error


@contextmanager
def _fetching(spec: str, extra: str) -> Iterator[None]:
    """Whatever a hub raises inside becomes one line."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"--model {spec!r} cannot be loaded: {reason(error)}; check the name or path, that its "
            f"files are complete, and that pip install 'saliency-fast[{extra}]' is in order"
        ) from error


def _eight_bit(transform: Callable[[Image.Image], Tensor], mode: str = "RGB") -> Prepare:
    """Pictures by a hub's own processing, which takes 8 bits."""
    return lambda picture: transform(eight_bits(picture, mode))[None]


def _hugging_face(spec: str, name: str, pretrained: bool) -> Loaded:
    transformers = _package("transformers", "hf", spec)
    with _fetching(spec, "hf"):
        model = transformers.AutoModelForImageClassification.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)

    def transform(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    # Models without class names carry placeholders.
    known = {int(number): label for number, label in model.config.id2label.items()}
    labels = {n: label for n, label in known.items() if label.upper() != f"LABEL_{n}"}
    return Loaded(spec, model, _eight_bit(transform), labels)


def _torchvision(spec: str, name: str, pretrained: bool) -> Loaded:
    models = _package("torchvision.models", "torchvision", spec)
    with _fetching(spec, "torchvision"):
        chosen = models.get_model_weights(name).DEFAULT
        model = models.get_model(name, weights=chosen if pretrained else None)
    labels = dict(enumerate(chosen.meta.get("categories", ()))) if pretrained else {}
    return Loaded(spec, model, _eight_bit(chosen.transforms()), labels)


def _timm(spec: str, name: str, pretrained: bool) -> Loaded:
    timm, data = _package("timm", "timm", spec), _package("timm.data", "timm", spec)
    with _fetching(spec, "timm"):
        model = timm.create_model(name, pretrained=pretrained)
    settings = data.resolve_model_data_config(model)
    transform = data.create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    return Loaded(spec, model, _eight_bit(transform, mode), {})


_HUBS: dict[str, Callable[[str, str, bool], Loaded]] = {
    "hf": _hugging_face,
    "torchvision": _torchvision,
    "timm": _timm,
}


def _load_weights(model: Callable[..., Any], file: str) -> None:
    """Loads tensors and nothing else: a pickle that would run code is refused."""
    if not isinstance(model, nn.Module):
        raise InputError(f"--weights needs a module: the model is a {type(model).__name__}")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--weights {file} is not a file")
    try:
        tensors = path.suffix == ".safetensors"
        state: Any = load_file(path) if tensors else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"--weights {file} cannot be read: {reason(error)}") from error
    except Exception as error:
        # torch.load raises many kinds, and its text explains how to switch the protection off.
        raise InputError(
            f"--weights {file} hold more than tensors or are damaged, and are refused: expected "
            ".safetensors, or a file of torch.save(model.state_dict())"
        ) from error
    # Training scripts often save the weights beside an optimizer's state.
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise InputError(
            f"--weights {file} do not fit the model: {' '.join(lines[:3])[:300]}"
        ) from error


# --- Other options ----------------------------------------------------------------------------


def read_methods(names: Sequence[str], fields: Sequence[str]) -> list[Method]:
    given = read_fields("--method-arg", names, fields)
    return [make_method(name, given.get(name, {})) for name in dict.fromkeys(names)]


def read_fields(
    option: str, names: Sequence[str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The fields of each name, from NAME.FIELD=VALUE, or FIELD=VALUE where there is one name."""
    given: dict[str, dict[str, Any]] = {}
    every = ", ".join(dict.fromkeys(names))
    for text in fields:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{option} must be field=value: got {text!r}")
        owner, dot, name = key.rpartition(".")
        if dot and owner not in names:
            what = option.removeprefix("--").removesuffix("-arg")
            raise InputError(
                f"{option} {text!r} is for a {what} that is not asked for: expected one of {every}"
            )
        if not dot and len(set(names)) > 1:
            raise InputError(
                f"{option} {text!r} does not say for which of {every}: write {names[0]}.{text}"
            )
        given.setdefault(owner or names[0], {})[name] = literal(value)
    return given


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_target(text: str) -> Any:
    """none, predicted, a class, classes 3,5 (a map each; returned as a list), or a tuple "(1,)"."""
    if text.lower() in ("none", "predicted"):
        return None if text.lower() == "none" else "predicted"
    value = literal(text.strip())
    if type(value) is int:
        return value
    if isinstance(value, tuple) and value:
        if text.strip().startswith("("):
            return value
        if all(type(one) is int for one in value):
            return list(value)
    raise InputError(
        f"--target must be none, predicted, a class such as 3, classes such as 3,5 (a map each), "
        f"or a tuple such as '(1,)' into a structured output: got {text!r}"
    )


def read_one_target(text: str, count: int) -> Any:
    """A target with one class per example: as `read_target`, or a file of `count` classes."""
    if names_array(text):
        classes = read_tensor("--target", text)
        if classes.is_floating_point() or classes.shape != (count,):
            raise InputError(
                f"--target {text} must hold {count} whole numbers, a class for each example: got "
                f"{classes.dtype} {list(classes.shape)}"
            )
        return classes.long()
    found = read_target(text)
    if isinstance(found, list):
        raise InputError(
            "--target must be one class here, since one map of each example is evaluated: got "
            f"{text!r}"
        )
    return found


def read_baseline(text: str, device: str = "cpu") -> Any:
    """none, a number, a name, an .npy or .safetensors file, or a comma list of these."""

    def one(part: str) -> Any:
        if part.lower() == "none":
            return None
        if names_array(part):
            return read_tensor("--baseline", part).to(device)
        try:
            return float(part)
        except ValueError:
            # A name: the library knows which are valid.
            return part

    parts = [one(part.strip()) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def read_at(text: str | None) -> Any:
    """A layer's name, several, or None."""
    if text is None:
        return None
    names = [one.strip() for one in text.split(",")]
    if not all(names):
        raise InputError(f"--at must be names of layers with commas between them: got {text!r}")
    return names[0] if len(names) == 1 else names


def read_features(text: str, device: str = "cpu") -> Any:
    """none, a name such as grid:8, or an .npy or .safetensors file of whole numbers."""
    if text.lower() == "none":
        return None
    return read_tensor("--features", text).to(device) if names_array(text) else text


def read_boxes(text: str, names: Sequence[str]) -> Tensor:
    """Boxes of the examples called `names`, int64 [B, 2 D], or masks bool [B, *spatial]."""
    path = Path(text.partition(SEPARATOR)[0])
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        boxes = read_tensor("--boxes", text)
        return boxes if boxes.dtype == torch.bool else _whole_numbers(text, boxes)
    if not path.is_file():
        raise InputError(f"--boxes {text} does not exist or is not a file: expected {BOXES}")
    if suffix not in (".json", ".csv"):
        raise InputError(f"--boxes {text} is of no known kind: expected {BOXES}")
    try:
        rows = _rows(path)
    except (ValueError, OSError) as error:
        raise InputError(f"--boxes {text} cannot be read: {error}; expected {BOXES}") from error
    if isinstance(rows, Mapping):
        missing = [name for name in names if name not in rows]
        if missing:
            raise InputError(
                f"--boxes {text} has no box for {', '.join(missing[:4])}: it names "
                f"{', '.join(list(rows)[:4])}"
            )
        rows = [rows[name] for name in names]
    if len(rows) != len(names):
        raise InputError(
            f"--boxes {text} must hold a box for each example: got {len(rows)} for {len(names)}"
        )
    try:
        boxes = torch.tensor(rows)
    except (TypeError, ValueError) as error:
        raise InputError(f"--boxes {text} holds no boxes: expected {BOXES}") from error
    return _whole_numbers(text, boxes)


def _whole_numbers(text: str, boxes: Tensor) -> Tensor:
    if boxes.is_floating_point() and not bool((boxes == boxes.round()).all()):
        raise InputError(f"--boxes {text} must hold whole numbers: expected {BOXES}")
    return boxes.long()


def _rows(path: Path) -> Any:
    """Boxes in order, or by name where a .csv has a first column of names; headers are skipped."""
    if path.suffix.lower() == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, (list, dict)):
            raise ValueError(f"got {type(found).__name__}")
        return found
    with path.open(encoding="utf-8", newline="") as opened:
        rows = [[cell.strip() for cell in row] for row in csv.reader(opened) if row]
    if rows and not rows[0][-1].lstrip("-").isdigit():
        rows = rows[1:]
    if rows and len(rows[0]) % 2:
        return {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    return [[int(cell) for cell in row] for row in rows]
