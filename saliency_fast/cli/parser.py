"""The options of the command line: one table, shared by the commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from saliency_fast.cli.inputs import MAX_PIXELS
from saliency_fast.graph.passes.half import AUTO, PRECISIONS
from saliency_fast.version import __version__

Settings = Mapping[str, Any]
"""Arguments of `ArgumentParser.add_argument`."""

_INPUTS = """\
inputs:
  a .png or .jpg, read into [0, 1] and resized where the model's size is known; an .npy array; a
  .safetensors file (each of its tensors, or FILE::NAME for one); or a folder of these. An array
  is one example and gets a batch axis, unless --batched says that its first axis is one. Arrays
  are taken as they are: nothing is scaled or resized.

models:
  digits, digits-vit          the small trained models that come with the package
  package.module:factory      a callable without arguments that makes the model, or a module; the
                              current directory can be imported from
  hf:PATH_OR_ID               transformers' AutoModelForImageClassification and its processor
  torchvision:NAME, timm:NAME pretrained, unless --weights are given
"""


def _text(metavar: str, help: str, **settings: Any) -> Settings:
    return {"metavar": metavar, "help": help, **settings}


def _flag(help: str) -> Settings:
    return {"help": help, "action": "store_true"}


def _repeated(metavar: str, help: str) -> Settings:
    return {"metavar": metavar, "help": help, "action": "append", "default": []}


_METHOD = "a method (see saliency-fast methods); may be repeated (default: {})"
_MODEL: Mapping[str, Settings] = {
    "--model": _text("SPEC", "a model", required=True),
    "--weights": _text("FILE", "weights to load: .safetensors, or a file of torch.save"),
    "--memory-budget": _text("BYTES", "such as 8GiB or 500MB"),
    "--device": {"default": "cpu", "help": "such as cuda (default: cpu)"},
}
_OUT: Mapping[str, Settings] = {
    "--out": _text("DIR", "where to write (default: out)", default="out"),
    "--progress": _flag("show a bar"),
}
_METHODS: Mapping[str, Settings] = {
    "--method-arg": _repeated(
        "FIELD=VALUE",
        "a field of the method, METHOD.FIELD=VALUE where there are several; may be repeated",
    ),
    "--points-per-launch": _text("N", "an upper bound", type=int),
}
_READING: Mapping[str, Settings] = {
    "--size": _text("H[xW]", "resize pictures to this, instead of the model's own processing"),
    "--channels": {
        "type": int,
        "choices": (1, 3),
        "help": "read pictures as grey (1) or colour (3)",
    },
    "--batched": _flag("the first axis of arrays is a batch axis"),
    "--layout": _text(
        "LETTERS",
        "what the axes of an input with its batch are, a letter each, such as BCHW, BTF or BTCHW "
        "(default: as the model's first layers determine)",
    ),
    "--max-pixels": _text(
        "N",
        f"refuse larger pictures (default: {MAX_PIXELS}, 16384 x 16384)",
        type=int,
        default=MAX_PIXELS,
    ),
}
_EXPLAIN: Mapping[str, Settings] = {
    "input": _text("INPUT", "see below", nargs="+"),
    **_MODEL,
    "--method": _repeated("NAME", _METHOD.format("integrated_gradients")),
    **_METHODS,
    "--target": {
        "default": "predicted",
        "help": "predicted (default), none (one number per example), a class, classes such as 3,5 "
        "(a map each), or a tuple such as '(1,)' into a structured output",
    },
    "--baseline": {
        "default": "none",
        "help": "none (zeros, default), a number, blur, mean, uniform, an .npy or .safetensors "
        "file, or a comma list of these",
    },
    "--at": _text(
        "LAYER",
        "explain at layers instead of the input: a name, several with commas, embeddings, or auto "
        "for the last spatial one; class activation maps are always at a layer (default: auto)",
    ),
    "--features": {
        "default": "none",
        "help": "what perturbation methods replace together: none (every element alone, default), "
        "grid:8, slic:50 (needs the extra 'segments'), or a file of whole numbers",
    },
    "--precision": {
        "default": "float32",
        "choices": (*PRECISIONS, AUTO),
        "help": "of the model's products (default: float32); what another one costs is measured; "
        "auto is the fastest whose maps are off by --tolerance at most",
    },
    "--tolerance": _text("T", "relative L2, for --precision auto", type=float),
    "--style": {"choices": ("signed", "heat"), "help": "default: both"},
    "--overlay-format": {
        "choices": ("png", "gif", "mp4"),
        "help": "default: png for images, gif for videos and volumes; mp4 needs the extra 'video'",
    },
    **_READING,
    "--summary": _flag("say in sentences what each map holds, and test it"),
    "--animate": _flag("write a GIF of each map growing sharp, where it takes several launches"),
    **_OUT,
    "--plan": _flag("print the plan and stop"),
}
_EVALUATE: Mapping[str, Settings] = {
    "input": _text("INPUT", "all of one shape; see below", nargs="*"),
    **_MODEL,
    "--method": _repeated("NAME", _METHOD.format("gradient, smoothgrad and integrated_gradients")),
    **_METHODS,
    "--metric": _repeated(
        "NAME",
        "a metric (see saliency-fast metrics); may be repeated (default: all that the given "
        "inputs, boxes and outputs allow)",
    ),
    "--metric-arg": _repeated("NAME.FIELD=VALUE", "a field of a metric; may be repeated"),
    "--target": {
        "help": "predicted (default for inputs), none (one number per example), a class, a tuple "
        "such as '(1,)', or an .npy or .safetensors file with a class for each input; the built-in "
        "scenes have their labels"
    },
    "--baseline": {"default": "none", "help": "of the methods: as in saliency-fast explain"},
    "--boxes": _text(
        "FILE",
        "where the objects are: .npy, .safetensors, .json or .csv, a box top,left,bottom,right for "
        "each input, in their order or by name",
    ),
    "--substrate": {
        "help": "what replaces removed elements, in all metrics: zero, mean, blur, uniform, a "
        "number, or a file (default: each metric's own)"
    },
    "--steps": _text("N", "of all metrics that have steps", type=int),
    "--quick": _flag("fewer steps and samples, for a look"),
    "--no-controls": _flag("methods only"),
    "--confidence": {
        "type": float,
        "default": 0.95,
        "help": "of the intervals (default: 0.95)",
    },
    "--seed": {"type": int, "default": 0, "help": "of intervals and metrics (default: 0)"},
    "--examples": _text("N", "of the built-in scenes (default: all)", type=int),
    "--json": _flag("print the numbers as JSON"),
    "--check": _flag("exit code 1 where a check fails"),
    **_READING,
    **_OUT,
}
_VERIFY: Mapping[str, Settings] = {
    "record": {"metavar": "RECORD"},
    **_MODEL,
    "--model": _text("SPEC", "a model (default: the one that the record names)"),
    "--input": _text("INPUT", "default: the one that the record names"),
    "--hash-only": _flag("do not compute it again"),
}
_DEMO: Mapping[str, Settings] = {
    "--examples": _text("N", "default: 6", type=int, default=6),
    **_OUT,
}


class _Command(NamedTuple):
    help: str
    options: Mapping[str, Settings]
    description: str | None = None
    epilog: str | None = None


_COMMANDS = {
    "explain": _Command("explain inputs: records, pictures and a page", _EXPLAIN, None, _INPUTS),
    "evaluate": _Command(
        "are a model's maps any good? metrics with intervals, a page, numbers",
        _EVALUATE,
        "Evaluates methods by metrics on the same inputs, beside controls that never ask the "
        "model, and writes index.html, report.json and curves/*.png. Without inputs the built-in "
        "models are evaluated on their held-out scenes, whose labels and boxes are known. Exit "
        "code: 0; with --check 1 where a check fails; 2 usage.",
        _INPUTS,
    ),
    "verify": _Command(
        "check a record and compute it again",
        _VERIFY,
        "Checks a record's hash and schema; where its model and input are known, from the record "
        "or from here, computes it again and compares. Exit code: 0 agrees, 1 disagrees or broken, "
        "2 usage.",
    ),
    "demo": _Command("explain held-out digits with the shipped model", _DEMO),
    "methods": _Command("list the methods, their fields and defaults", {}),
    "metrics": _Command("list the metrics of evaluate, their fields and defaults", {}),
    "backends": _Command("which version of the kernels runs where", {}),
}


def parser() -> argparse.ArgumentParser:
    """The parser of `saliency-fast`."""
    root = argparse.ArgumentParser(
        prog="saliency-fast",
        description="Exact attribution for PyTorch models: which parts of an input did it.",
    )
    root.add_argument("--version", action="version", version=f"saliency-fast {__version__}")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        one = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=raw if command.epilog else argparse.HelpFormatter,
        )
        for option, settings in command.options.items():
            one.add_argument(option, **settings)
    return root
