"""The options of the command line: one table, shared by the commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from saliency_fast.graph.passes.half import AUTO, PRECISIONS
from saliency_fast.version import __version__

MAX_PIXELS = 16384 * 16384
"""Default limit of a picture, since a small file may decompress to any size."""
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


def _option(help: str, metavar: str | None = None, **settings: Any) -> Settings:
    return {"help": help, **({"metavar": metavar} if metavar else {}), **settings}


def _flag(help: str) -> Settings:
    return _option(help, action="store_true")


def _repeated(help: str, metavar: str) -> Settings:
    return _option(help, metavar, action="append", default=[])


_METHOD = "a method (see saliency-fast methods); may be repeated (default: {})"
_MODEL: Mapping[str, Settings] = {
    "--model": _option("a model", "SPEC", required=True),
    "--weights": _option("weights to load: .safetensors, or a file of torch.save", "FILE"),
    "--memory-budget": _option("such as 8GiB or 500MB", "BYTES"),
    "--device": _option("such as cuda (default: cpu)", default="cpu"),
}
_OUT: Mapping[str, Settings] = {
    "--out": _option("where to write (default: out)", "DIR", default="out"),
    "--progress": _flag("show a bar"),
}
_METHODS: Mapping[str, Settings] = {
    "--method-arg": _repeated(
        "a field of the method, METHOD.FIELD=VALUE where there are several; may be repeated",
        "FIELD=VALUE",
    ),
    "--points-per-launch": _option("an upper bound", "N", type=int),
}
_READING: Mapping[str, Settings] = {
    "--size": _option("resize pictures to this, instead of the model's own processing", "H[xW]"),
    "--channels": _option("read pictures as grey (1) or colour (3)", type=int, choices=(1, 3)),
    "--batched": _flag("the first axis of arrays is a batch axis"),
    "--layout": _option(
        "what the axes of an input with its batch are, a letter each, such as BCHW, BTF or BTCHW "
        "(default: as the model's first layers determine)",
        "LETTERS",
    ),
    "--max-pixels": _option(
        f"refuse larger pictures (default: {MAX_PIXELS}, 16384 x 16384)",
        "N",
        type=int,
        default=MAX_PIXELS,
    ),
}
_EXPLAIN: Mapping[str, Settings] = {
    "input": _option("see below", "INPUT", nargs="+"),
    **_MODEL,
    "--method": _repeated(_METHOD.format("integrated_gradients"), "NAME"),
    **_METHODS,
    "--target": _option(
        "predicted (default), none (one number per example), a class, classes such as 3,5 "
        "(a map each), or a tuple such as '(1,)' into a structured output",
        default="predicted",
    ),
    "--baseline": _option(
        "none (zeros, default), a number, blur, mean, uniform, an .npy or .safetensors "
        "file, or a comma list of these",
        default="none",
    ),
    "--at": _option(
        "explain at layers instead of the input: a name, several with commas, embeddings, or auto "
        "for the last spatial one; class activation maps are always at a layer (default: auto)",
        "LAYER",
    ),
    "--features": _option(
        "what perturbation methods replace together: none (every element alone, default), "
        "grid:8, slic:50 (needs the extra 'segments'), or a file of whole numbers",
        default="none",
    ),
    "--precision": _option(
        "of the model's products (default: auto on GPUs, else float32); what another one costs is "
        "measured; auto is the fastest whose maps are off by --tolerance at most",
        choices=(*PRECISIONS, AUTO),
    ),
    "--tolerance": _option("relative L2, for --precision auto", "T", type=float),
    "--style": _option("default: both", choices=("signed", "heat")),
    "--overlay-format": _option(
        "default: png for images, gif for videos and volumes; mp4 needs the extra 'video'",
        choices=("png", "gif", "mp4"),
    ),
    **_READING,
    "--summary": _flag("say in sentences what each map holds, and test it"),
    "--animate": _flag("write a GIF of each map growing sharp, where it takes several launches"),
    **_OUT,
    "--plan": _flag("print the plan and stop"),
}
_EVALUATE: Mapping[str, Settings] = {
    "input": _option("all of one shape; see below", "INPUT", nargs="*"),
    **_MODEL,
    "--method": _repeated(_METHOD.format("gradient, smoothgrad and integrated_gradients"), "NAME"),
    **_METHODS,
    "--metric": _repeated(
        "a metric (see saliency-fast metrics); may be repeated (default: all that the given "
        "inputs, boxes and outputs allow)",
        "NAME",
    ),
    "--metric-arg": _repeated("a field of a metric; may be repeated", "NAME.FIELD=VALUE"),
    "--target": _option(
        "predicted (default for inputs), none (one number per example), a class, a tuple "
        "such as '(1,)', or an .npy or .safetensors file with a class for each input; the built-in "
        "scenes have their labels"
    ),
    "--baseline": _option("of the methods: as in saliency-fast explain", default="none"),
    "--boxes": _option(
        "where the objects are: .npy, .safetensors, .json or .csv, a box top,left,bottom,right for "
        "each input, in their order or by name",
        "FILE",
    ),
    "--substrate": _option(
        "what replaces removed elements, in all metrics: zero, mean, blur, uniform, a "
        "number, or a file (default: each metric's own)"
    ),
    "--steps": _option("of all metrics that have steps", "N", type=int),
    "--quick": _flag("fewer steps and samples, for a look"),
    "--no-controls": _flag("methods only"),
    "--confidence": _option("of the intervals (default: 0.95)", type=float, default=0.95),
    "--seed": _option("of intervals and metrics (default: 0)", type=int, default=0),
    "--examples": _option("of the built-in scenes (default: all)", "N", type=int),
    "--json": _flag("print the numbers as JSON"),
    "--check": _flag("exit code 1 where a check fails"),
    **_READING,
    **_OUT,
}
_VERIFY: Mapping[str, Settings] = {
    "record": {"metavar": "RECORD"},
    **_MODEL,
    "--model": _option("a model (default: the one that the record names)", "SPEC"),
    "--input": _option("default: the one that the record names", "INPUT"),
    "--hash-only": _flag("do not compute it again"),
}
_DEMO: Mapping[str, Settings] = {
    "--examples": _option("default: 6", "N", type=int, default=6),
    **_OUT,
}


class _Command(NamedTuple):
    """module: of `saliency_fast.cli` whose function of the command's name runs it."""

    module: str
    help: str
    options: Mapping[str, Settings]
    description: str | None = None
    epilog: str | None = None


COMMANDS = {
    "explain": _Command(
        "explain", "explain inputs: records, pictures and a page", _EXPLAIN, None, _INPUTS
    ),
    "evaluate": _Command(
        "evaluate",
        "are a model's maps any good? metrics with intervals, a page, numbers",
        _EVALUATE,
        "Evaluates methods by metrics on the same inputs, beside controls that never ask the "
        "model, and writes index.html, report.json and curves/*.png. Without inputs the built-in "
        "models are evaluated on their held-out scenes, whose labels and boxes are known. Exit "
        "code: 0; with --check 1 where a check fails; 2 usage.",
        _INPUTS,
    ),
    "verify": _Command(
        "verify",
        "check a record and compute it again",
        _VERIFY,
        "Checks a record's hash and schema; where its model and input are known, from the record "
        "or from here, computes it again and compares. Exit code: 0 agrees, 1 disagrees or broken, "
        "2 usage.",
    ),
    "demo": _Command("explain", "explain held-out digits with the shipped model", _DEMO),
    "methods": _Command("tables", "list the methods, their fields and defaults", {}),
    "metrics": _Command("tables", "list the metrics of evaluate, their fields and defaults", {}),
    "backends": _Command("tables", "which version of the kernels runs where", {}),
}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="saliency-fast",
        description="Exact attribution for PyTorch models: which parts of an input did it.",
    )
    root.add_argument("--version", action="version", version=f"saliency-fast {__version__}")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
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
