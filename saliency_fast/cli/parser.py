"""The command line's grammar."""

from __future__ import annotations

import argparse

from saliency_fast.cli.inputs import MAX_PIXELS
from saliency_fast.graph.passes.half import AUTO, PRECISIONS
from saliency_fast.version import __version__

_INPUT = """\
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


def parser() -> argparse.ArgumentParser:
    """The parser of `saliency-fast`."""
    root = argparse.ArgumentParser(
        prog="saliency-fast",
        description="Exact attribution for PyTorch models: which parts of an input did it.",
    )
    root.add_argument("--version", action="version", version=f"saliency-fast {__version__}")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _explain(commands)
    _evaluate(commands)
    _verify(commands)
    demo = commands.add_parser("demo", help="explain held-out digits with the shipped model")
    demo.add_argument("--out", default="out", metavar="DIR", help="where to write (default: out)")
    demo.add_argument("--examples", type=int, default=6, metavar="N", help="default: 6")
    demo.add_argument("--progress", action="store_true", help="show a bar")
    commands.add_parser("methods", help="list the methods, their fields and defaults")
    commands.add_parser("metrics", help="list the metrics of evaluate, their fields and defaults")
    commands.add_parser("backends", help="which version of the kernels runs where")
    return root


def _explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "explain",
        help="explain inputs: records, pictures and a page",
        epilog=_INPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("input", nargs="+", metavar="INPUT", help="see below")
    _model(one, required=True)
    _methods(one, "integrated_gradients")
    one.add_argument(
        "--target",
        default="predicted",
        help="predicted (default), none (one number per example), a class, classes such as 3,5 "
        "(a map each), or a tuple such as '(1,)' into a structured output",
    )
    one.add_argument(
        "--baseline",
        default="none",
        help="none (zeros, default), a number, blur, mean, uniform, an .npy or .safetensors file, "
        "or a comma list of these",
    )
    one.add_argument(
        "--at",
        metavar="LAYER",
        help="explain at layers instead of the input: a name, several with commas, embeddings, or "
        "auto for the last spatial one; class activation maps are always at a layer (default: "
        "auto)",
    )
    one.add_argument(
        "--features",
        default="none",
        help="what perturbation methods take away together: none (every element alone, default), "
        "grid:8, slic:50 (needs the extra 'segments'), or a file of whole numbers",
    )
    one.add_argument("--out", default="out", metavar="DIR", help="where to write (default: out)")
    one.add_argument("--points-per-launch", type=int, metavar="N", help="an upper bound")
    one.add_argument(
        "--precision",
        default="float32",
        choices=(*PRECISIONS, AUTO),
        help="of the model's products (default: float32); what another one costs is measured; auto "
        "is the fastest whose maps are off by --tolerance at most",
    )
    one.add_argument(
        "--tolerance", type=float, metavar="T", help="relative L2, for --precision auto"
    )
    one.add_argument("--style", choices=("signed", "heat"), help="default: both")
    one.add_argument(
        "--overlay-format",
        choices=("png", "gif", "mp4"),
        help="default: png for images, gif for videos and volumes; mp4 needs the extra 'video'",
    )
    _reading(one)
    one.add_argument(
        "--summary", action="store_true", help="say in sentences what each map holds, and test it"
    )
    one.add_argument(
        "--animate",
        action="store_true",
        help="write a GIF of each map growing sharp, where it comes in several launches",
    )
    one.add_argument("--progress", action="store_true", help="show a bar")
    one.add_argument("--plan", action="store_true", help="print the plan and stop")


def _evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "evaluate",
        help="are a model's maps any good? metrics with intervals, a page, numbers",
        description="Judges methods by metrics on the same inputs, beside controls that never ask "
        "the model, and writes index.html, report.json and curves/*.png. Without inputs the "
        "built-in models are judged on their held-out scenes, whose labels and boxes are known. "
        "Exit code: 0; with --check 1 where a check fails; 2 usage.",
        epilog=_INPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("input", nargs="*", metavar="INPUT", help="all of one shape; see below")
    _model(one, required=True)
    _methods(one, "gradient, smoothgrad and integrated_gradients")
    one.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric (see saliency-fast metrics); may be repeated (default: all that what is "
        "given allows)",
    )
    one.add_argument(
        "--metric-arg",
        action="append",
        default=[],
        metavar="NAME.FIELD=VALUE",
        help="a field of a metric; may be repeated",
    )
    one.add_argument(
        "--target",
        help="predicted (default for inputs), none (one number per example), a class, a tuple such "
        "as '(1,)', or an .npy or .safetensors file with a class for each input; the built-in "
        "scenes have their labels",
    )
    one.add_argument(
        "--baseline", default="none", help="of the methods: as in saliency-fast explain"
    )
    one.add_argument(
        "--boxes",
        metavar="FILE",
        help="where the objects are: .npy, .safetensors, .json or .csv, a box "
        "top,left,bottom,right for each input, in their order or by name",
    )
    one.add_argument(
        "--substrate",
        help="what stands for what is taken away, in all metrics: zero, mean, blur, uniform, a "
        "number, or a file (default: each metric's own)",
    )
    one.add_argument("--steps", type=int, metavar="N", help="of all metrics that have steps")
    one.add_argument("--quick", action="store_true", help="fewer steps and samples, for a look")
    one.add_argument("--no-controls", action="store_true", help="methods only")
    one.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)"
    )
    one.add_argument("--seed", type=int, default=0, help="of intervals and metrics (default: 0)")
    one.add_argument(
        "--examples", type=int, metavar="N", help="of the built-in scenes (default: all)"
    )
    one.add_argument("--out", default="out", metavar="DIR", help="where to write (default: out)")
    one.add_argument("--json", action="store_true", help="print the numbers as JSON")
    one.add_argument("--check", action="store_true", help="exit code 1 where a check fails")
    one.add_argument("--points-per-launch", type=int, metavar="N", help="an upper bound")
    _reading(one)
    one.add_argument("--progress", action="store_true", help="show a bar")


def _methods(one: argparse.ArgumentParser, default: str) -> None:
    one.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help=f"a method (see saliency-fast methods); may be repeated (default: {default})",
    )
    one.add_argument(
        "--method-arg",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method, METHOD.FIELD=VALUE where there are several; may be repeated",
    )


def _reading(one: argparse.ArgumentParser) -> None:
    """How inputs are read."""
    one.add_argument(
        "--size", metavar="H[xW]", help="resize pictures to this, instead of the model's own way"
    )
    one.add_argument(
        "--channels", type=int, choices=(1, 3), help="read pictures as grey (1) or colour (3)"
    )
    one.add_argument(
        "--batched", action="store_true", help="the first axis of arrays is a batch axis"
    )
    one.add_argument(
        "--layout",
        metavar="LETTERS",
        help="what the axes of an input with its batch are, a letter each, such as BCHW, BTF or "
        "BTCHW (default: as the model's first layers tell)",
    )
    one.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger pictures (default: {MAX_PIXELS}, 16384 x 16384)",
    )


def _verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser(
        "verify",
        help="check a record and compute it again",
        description="Checks a record's hash and schema; where its model and input are known, from "
        "the record or from here, computes it again and compares. Exit code: 0 agrees, 1 disagrees "
        "or broken, 2 usage.",
    )
    one.add_argument("record", metavar="RECORD")
    _model(one, required=False)
    one.add_argument("--input", metavar="INPUT", help="default: the one that the record names")
    one.add_argument("--hash-only", action="store_true", help="do not compute it again")


def _model(one: argparse.ArgumentParser, required: bool) -> None:
    default = "" if required else " (default: the one that the record names)"
    one.add_argument("--model", required=required, metavar="SPEC", help=f"a model{default}")
    one.add_argument(
        "--weights", metavar="FILE", help="weights to load: .safetensors, or a file of torch.save"
    )
    one.add_argument("--memory-budget", metavar="BYTES", help="such as 8GiB or 500MB")
    one.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
