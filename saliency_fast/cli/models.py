"""Models from the value of `--model`, with how they take pictures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saliency_fast import zoo
from saliency_fast.cli.inputs import Form, Prepare, eight_bits
from saliency_fast.errors import InputError

FORMS = (
    "package.module:factory (a callable without arguments, or a module), hf:PATH_OR_ID, "
    "torchvision:NAME, timm:NAME"
)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, how it takes a picture, and the names of its classes."""

    spec: str
    model: Callable[..., Any]
    prepare: Prepare
    labels: Mapping[int, str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which arrays are cast to."""
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
    elif name and kind in _HUBS:
        loaded = _HUBS[kind](spec, name, weights is None)
    elif name:
        loaded = Loaded(spec, _made(spec, kind, name), Form(), {})
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


def _made(spec: str, module_name: str, attribute: str) -> Callable[..., Any]:
    """What `package.module:factory` makes; modules of the current directory can be imported."""
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


def _fetched(spec: str, extra: str, load: Callable[[], Any]) -> Any:
    """Runs `load`, which looks a model up; whatever a hub raises becomes one line."""
    try:
        return load()
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

    def load() -> tuple[Any, Any]:
        kind = transformers.AutoModelForImageClassification
        return kind.from_pretrained(name), transformers.AutoImageProcessor.from_pretrained(name)

    model, processor = _fetched(spec, "hf", load)

    def transform(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    # Models without class names carry placeholders.
    labels = {
        int(number): label
        for number, label in model.config.id2label.items()
        if label.upper() != f"LABEL_{int(number)}"
    }
    return Loaded(spec, model, _eight_bit(transform), labels)


def _torchvision(spec: str, name: str, pretrained: bool) -> Loaded:
    models = _package("torchvision.models", "torchvision", spec)

    def load() -> tuple[Any, Any]:
        chosen = models.get_model_weights(name).DEFAULT
        return models.get_model(name, weights=chosen if pretrained else None), chosen

    model, chosen = _fetched(spec, "torchvision", load)
    labels = dict(enumerate(chosen.meta.get("categories", ()))) if pretrained else {}
    return Loaded(spec, model, _eight_bit(chosen.transforms()), labels)


def _timm(spec: str, name: str, pretrained: bool) -> Loaded:
    timm, data = _package("timm", "timm", spec), _package("timm.data", "timm", spec)
    model = _fetched(spec, "timm", lambda: timm.create_model(name, pretrained=pretrained))
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
