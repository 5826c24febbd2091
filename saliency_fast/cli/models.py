"""Model specs: from a word on the command line to a model and how it wants its pictures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saliency_fast import zoo
from saliency_fast.cli.pictures import Form, eight_bits
from saliency_fast.errors import InputError

Prepare = Callable[[Image.Image], Tensor]
FORMS = (
    "package.module:factory (a callable without arguments, or a module), hf:PATH_OR_ID, "
    "torchvision:NAME, timm:NAME"
)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode. prepare: a picture to [1, C, H, W]; labels: class names."""

    spec: str
    model: Callable[..., Any]
    prepare: Prepare
    labels: Mapping[int, str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which arrays are brought to."""
        if isinstance(self.model, nn.Module):
            for weight in self.model.parameters():
                if weight.is_floating_point():
                    return weight.dtype
        return torch.float32


def load_model(
    spec: str, weights: str | None = None, form: Form | None = None, device: str = "cpu"
) -> Loaded:
    """The model that `spec` names. form: overrides how pictures are read.

    Raises InputError for an unknown or missing model, a missing package, and weights that do not
    fit, each with the cure.
    """
    check_device(device)
    kind, _, name = spec.partition(":")
    if spec in zoo.MODELS:
        labels = {number: f"digit {number}" for number in range(10)}
        found = Loaded(spec, zoo.MODELS[spec](), Form((64, 64), 1), labels)
    elif name and kind in _HUBS:
        found = _HUBS[kind](spec, name, weights is None)
    elif name:
        found = Loaded(spec, _made(spec, kind, name), Form(), {})
    else:
        raise InputError(
            f"--model {spec!r} is unknown: expected one of {', '.join(zoo.MODELS)}, or {FORMS}"
        )
    model = found.model
    if weights is not None:
        _load_weights(model, weights)
    if isinstance(model, nn.Module):
        model = model.to(device).eval()
    return Loaded(spec, model, found.prepare if form is None else form, found.labels)


def check_device(device: str) -> None:
    """Raises InputError where PyTorch cannot use `device`."""
    try:
        torch.empty(1, device=device)
    except Exception as error:
        raise InputError(
            f"--device {device!r} cannot be used: {reason(error)}; expected cpu, or cuda where "
            "PyTorch sees a GPU"
        ) from error


def reason(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _made(spec: str, module_name: str, attribute: str) -> Callable[..., Any]:
    """What `package.module:factory` makes; the current directory can be imported from."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
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
    model: Callable[..., Any] = made
    return model


def _package(name: str, extra: str, spec: str) -> ModuleType:
    """Imports an optional package; an error names the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--model {spec!r} needs {name}, which is not installed ({reason(error)}): install the "
            f"extra with pip install 'saliency-fast[{extra}]'"
        ) from error
    except Exception as error:
        raise InputError(
            f"--model {spec!r} needs {name}, which is installed but does not import "
            f"({reason(error)}): install a version that matches torch {torch.__version__}, for "
            f"example with pip install 'saliency-fast[{extra}]'"
        ) from error


def _fetched(spec: str, extra: str, load: Callable[[], Any]) -> Any:
    """Runs `load`, which looks a model up; whatever a hub raises becomes one line."""
    try:
        return load()
    except Exception as error:
        raise InputError(
            f"--model {spec!r} cannot be loaded: {reason(error)}; check the name or path, that its "
            f"files are complete, and that pip install 'saliency-fast[{extra}]' is in order"
        ) from error


def _hugging_face(spec: str, name: str, pretrained: bool) -> Loaded:
    transformers = _package("transformers", "hf", spec)

    def load() -> tuple[Any, Any]:
        kind = transformers.AutoModelForImageClassification
        return kind.from_pretrained(name), transformers.AutoImageProcessor.from_pretrained(name)

    model, processor = _fetched(spec, "hf", load)

    def prepare(picture: Image.Image) -> Tensor:
        made = processor(images=eight_bits(picture, "RGB"), return_tensors="pt")
        pixels: Tensor = made["pixel_values"]
        return pixels

    return Loaded(spec, model, prepare, _labels(model.config.id2label))


def _torchvision(spec: str, name: str, pretrained: bool) -> Loaded:
    models = _package("torchvision.models", "torchvision", spec)

    def load() -> tuple[Any, Any]:
        chosen = models.get_model_weights(name).DEFAULT
        return models.get_model(name, weights=chosen if pretrained else None), chosen

    model, chosen = _fetched(spec, "torchvision", load)
    transform = chosen.transforms()

    def prepare(picture: Image.Image) -> Tensor:
        made: Tensor = transform(eight_bits(picture, "RGB"))[None]
        return made

    names = chosen.meta.get("categories", ())
    return Loaded(spec, model, prepare, dict(enumerate(names)) if pretrained else {})


def _timm(spec: str, name: str, pretrained: bool) -> Loaded:
    timm = _package("timm", "timm", spec)
    data = _package("timm.data", "timm", spec)
    model = _fetched(spec, "timm", lambda: timm.create_model(name, pretrained=pretrained))
    settings = data.resolve_model_data_config(model)
    transform = data.create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"

    def prepare(picture: Image.Image) -> Tensor:
        made: Tensor = transform(eight_bits(picture, mode))[None]
        return made

    return Loaded(spec, model, prepare, {})


_HUBS: dict[str, Callable[[str, str, bool], Loaded]] = {
    "hf": _hugging_face,
    "torchvision": _torchvision,
    "timm": _timm,
}


def _labels(names: Mapping[Any, str]) -> dict[int, str]:
    """Class names, without the placeholders that models carry which were given none."""
    return {
        int(number): name
        for number, name in names.items()
        if name.upper() != f"LABEL_{int(number)}"
    }


def _load_weights(model: Callable[..., Any], path: str) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"--weights needs a module: the model is a {type(model).__name__}")
    state = _read_weights(Path(path))
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
            f"--weights {path} do not fit the model: {' '.join(lines[:3])[:300]}"
        ) from error


def _read_weights(path: Path) -> Any:
    """Reads tensors and nothing else: a pickle that would run code is refused."""
    if not path.is_file():
        raise InputError(f"--weights {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"--weights {path} cannot be read: {reason(error)}") from error
    except Exception as error:
        # torch.load raises many kinds, and its text explains how to switch the protection off.
        raise InputError(
            f"--weights {path} hold more than tensors or are damaged, and are refused: expected "
            ".safetensors, or a file of torch.save(model.state_dict())"
        ) from error
