"""What one input gradient moves and computes on a GPU, counted, and what peaks allow of it.

    python -m benchmarks.gpu_model                          writes gpu-model.json and .md, and
                                                            gpu-model-switches.md; no GPU
    python -m benchmarks.gpu_model --measured FILE          compares with end-to-end-gpu.json

Each network is recorded and goes through the passes that a launch on a GPU takes: the affine prefix
once for all points, layers fused, channels last, half types. The program then runs with gradients
on shapes alone, and every operator that reaches a kernel is counted: its operations, and each
operand read and each result written once. What each further row adds is a point's; the rest, such
as weights, is a launch's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import models, tables
from benchmarks.cases import sized
from benchmarks.models import Workload
from saliency_fast.graph.autograd import convolutions
from saliency_fast.graph.passes.affine_prefix import prefix_of
from saliency_fast.graph.passes.fusion import SEPARATE, OneCall, fused
from saliency_fast.graph.passes.half import PRECISIONS, in_half_type
from saliency_fast.graph.passes.invariant import with_invariants
from saliency_fast.graph.program import Program, Step
from saliency_fast.graph.recorder import unified
from saliency_fast.model.executors import RecordingExecutor

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = "python -m benchmarks.gpu_model"
ROWS = 64
"""Points of a launch, over which weights are read once."""
REACHED_OPERATIONS, REACHED_BYTES = 0.5, 0.9
"""Shares of the published peaks that products and copies reach, assumed until measured: training
rates of ResNet-50 on H100, and a copy on H200 (4.3 of 4.8 TB/s)."""
_META = torch.device("meta")
_NEW = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
"""Operators that take memory and write nothing."""


@dataclass(frozen=True)
class Device:
    """Published peaks of a GPU: operations per second without sparsity, and bytes per second."""

    name: str
    half: float
    tf32: float
    float32: float
    bandwidth: float

    def peak(self, kind: str) -> float:
        return float(getattr(self, kind))


DEVICES = (
    Device("A100", 312e12, 156e12, 19.5e12, 2.039e12),
    Device("H100", 989e12, 495e12, 67e12, 3.35e12),
    Device("H200", 989e12, 495e12, 67e12, 4.8e12),
    Device("B200", 2250e12, 1125e12, 75e12, 8.0e12),
)
"""NVIDIA's data sheets: A100 80 GB, H100 and H200 in SXM modules, HGX B200."""
KINDS = {"float16": "half", "tf32": "tf32", "float32": "float32"}
"""The peak that holds for the products of a precision."""


@dataclass(frozen=True)
class Operator:
    """One kernel's work for a point, and what its launch adds whatever the points.

    Attributes:
        kind: The peak that holds for its operations: "half", "tf32" or "float32".
        products: Whether it is a convolution, a matrix product or attention.
    """

    name: str
    operations: float
    bytes: float
    launch_bytes: float = 0.0
    kind: str = "float32"
    products: bool = False

    def seconds(self, device: Device, rows: int, *, reached: bool) -> float:
        """A point's share of the kernel's time, at the peaks or at what is reached of them."""
        shares = (REACHED_OPERATIONS, REACHED_BYTES) if reached else (1.0, 1.0)
        moved = (self.bytes + self.launch_bytes / rows) / (shares[1] * device.bandwidth)
        return max(self.operations / (shares[0] * device.peak(self.kind)), moved)


class Counter(TorchDispatchMode):
    """Lists the operators that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operator] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name == "_unsafe_view" or name in _NEW):
            self.found.append(self._counted(func, name, (args, given), result))
        return result

    def _counted(self, func: Any, name: str, given: Any, result: Any) -> Operator:
        operands = [one for one in tree_leaves(given) if isinstance(one, Tensor)]
        results = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        arguments = zip(given[0], func._schema.arguments, strict=False)
        # Written in place, and no result of its own.
        changed = [
            value
            for value, one in arguments
            if one.alias_info is not None and one.alias_info.is_write
        ]
        results = [one for one in results if not any(one is other for other in changed)]
        moved = sum(map(touched_bytes, (*operands, *changed, *results)))
        formula = flop_registry.get(func.overloadpacket)
        operations = 0 if formula is None else formula(*given[0], **given[1], out_val=result)
        kind = "float32"
        if formula is not None and not _depthwise(name, given[0]):
            kind = "half" if operands[0].element_size() == 2 else "tf32"
        return Operator(name, operations, moved, 0.0, kind, formula is not None)

    def add(self, name: str, operations: float, tensors: Sequence[Tensor]) -> None:
        """One kernel of several operators, over these tensors."""
        kind = "half" if tensors[0].element_size() == 2 else "tf32"
        moved = sum(map(touched_bytes, tensors))
        self.found.append(Operator(name, operations, moved, 0.0, kind, True))


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; an expanded axis is read once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _depthwise(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a convolution has few channels in each group: no tensor core serves it."""
    groups = args[-1] if name == "convolution" else 1
    return bool(groups > 1 and args[1].shape[1] < 8)


class _Attention(torch.autograd.Function):
    """Attention as one kernel each way, which keeps no matrix of weights (Dao, 2022)."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.counter, ctx.work = counter, q[..., 0].numel() * k.shape[-2] * q.shape[-1]
        ctx.save_for_backward(q, k, v, out)
        # Two products; five on the way back, one of them computed again.
        counter.add("attention", 4 * ctx.work, (q, k, v, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept = ctx.saved_tensors
        grads = [torch.empty_like(one) for one in kept[:3]]
        ctx.counter.add("attention backward", 10 * ctx.work, (*kept, grad, *grads))
        return None, *grads


def recorded(model: nn.Module, x: Tensor) -> Program:
    """The model's program for any number of rows, from one and from two of x [1, *]."""
    executor, programs = RecordingExecutor(model), []
    for rows in (1, 2):
        points = torch.cat([x] * rows)
        executor([points.requires_grad_(rows == 1)], (), {})
        programs.append(executor.program)
    return unified(*programs).pruned()


def launched(
    program: Program, precision: str, *, prefix: bool = True, one_call: OneCall = SEPARATE
) -> Program:
    """The program as launches on a GPU run it; prefix: of points on lines, behind their affine
    prefix where that pays; one_call: the switches that are on.
    """
    last = any("convolution" in step.info.kind for step in program.steps if step.varying)
    found = None
    if prefix:
        found = prefix_of(program, channels_last=last, line=True, one_call=one_call)
    if found is not None:
        whole = found.rest
    else:
        whole = fused(program, one_call)
        whole = whole.with_channels_last() if last else whole
    half = PRECISIONS[precision].half
    # What is made of weights alone is made once a call.
    made = with_invariants(whole, {}) if half is None else in_half_type(whole, half)
    return made.program


def _on_meta(program: Program, counter: Counter) -> Program:
    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes = value.shape, value.stride()
            return torch.empty_strided(*sizes, dtype=value.dtype, device=_META)
        return _META if isinstance(value, torch.device) else value

    def attention(half: bool, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        given = [one.half() if half else one for one in (q, k, v)]
        return _Attention.apply(counter, *given)  # type: ignore[no-untyped-call]

    def moved(step: Step) -> Step:
        step = step.with_arguments(leaf)
        if step.name != scaled_dot_product_attention.__name__:
            return step
        return replace(step, func=partial(attention, step.func is not scaled_dot_product_attention))

    return replace(program, steps=tuple(map(moved, program.steps)))


def _run(program: Program, target: Any, rows: int) -> list[Operator]:
    """The operators of a launch of `rows`: points written, their gradients, and these added up."""
    counter = Counter()
    program, leaves = _on_meta(program, counter), []
    for number in program.inputs:
        value = program.values[number]
        sizes = [a + b * (rows - 1) for a, b in zip(value.shape, value.growth, strict=True)]
        leaves.append(torch.empty(sizes, dtype=value.dtype, device=_META).requires_grad_())
    index = (slice(None), *(target if isinstance(target, tuple) else (target,)))
    plain = convolutions._with_relu

    def one_call(*given: Any) -> Tensor:
        """One call, as of cuDNN, for those that stand for it elsewhere."""
        before = len(counter.found)
        y = plain(*given)
        first = counter.found[before]
        del counter.found[before:]
        moved = sum(touched_bytes(one) for one in (*given[:4], y) if one is not None)
        counter.found.append(replace(first, name="convolution_relu", bytes=moved))
        return y

    with counter, mock.patch.object(convolutions, "_with_relu", one_call):
        # Cloned, as the points are written: read where they come from is a launch's.
        points = [one.clone() for one in leaves]
        scores = program(points, ())[index]
        grads = torch.autograd.grad(scores.float().sum(), leaves)
    for one in grads:
        counter.found.append(Operator("accumulate", 0.0, touched_bytes(one)))
    return counter.found


def counted(program: Program, target: Any, precision: str, **options: Any) -> list[Operator]:
    """Every kernel of a launch, with what it takes for one point; options: of `launched`."""
    whole, kind = launched(program, precision, **options), KINDS[precision]
    # Single rows fit several memory formats, and copies are spared.
    two, three = (_run(whole, target, rows) for rows in (2, 3))
    return [
        replace(
            a,
            operations=b.operations - a.operations,
            bytes=b.bytes - a.bytes,
            launch_bytes=3 * a.bytes - 2 * b.bytes,
            kind="float32" if a.kind == "tf32" and kind == "float32" else a.kind,
        )
        for a, b in zip(two, three, strict=True)
    ]


SWITCHES = {
    "convolution + ReLU": OneCall(relu=True),
    "convolution + residual + ReLU": OneCall(residual_relu=True),
    "residual + LayerNorm": OneCall(layer_norm=True),
    "all of them": OneCall(relu=True, residual_relu=True, layer_norm=True),
}
SWITCHED, SWITCHED_PRECISIONS = ("ResNet-50", "ViT-B/16"), ("float16", "tf32")
NETWORKS: dict[str, Callable[[], Workload]] = {
    "ResNet-50": partial(sized, "resnet50"),
    "ViT-B/16": partial(sized, "vit_b16"),
    "3-D U-Net": partial(sized, "unet3d"),
    "ConvNeXt-T": lambda: Workload("convnext_tiny", models.convnext_t, (3, 224, 224), 283),
}


def row(name: str, workload: Workload, precision: str, operators: Sequence[Operator]) -> Any:
    """What a network takes in a precision, and what each device allows."""
    operations = sum(one.operations for one in operators)
    moved = sum(one.bytes for one in operators)
    once = sum(one.launch_bytes for one in operators)
    found: dict[str, Any] = {
        "network": name, "workload": workload.name, "shape": list(workload.shape),
        "precision": precision, "operations": operations, "bytes": moved, "launch_bytes": once,
        "kernels": len(operators), "devices": {},
    }  # fmt: skip
    for device in DEVICES:
        by_products = sum(one.operations / device.peak(one.kind) for one in operators)
        by_bytes = (moved + once / ROWS) / device.bandwidth
        one_by_one = (
            sum(one.seconds(device, ROWS, reached=reached) for one in operators)
            for reached in (False, True)
        )
        in_turn, predicted = one_by_one
        found["devices"][device.name] = {
            "limit": 1 / max(by_products, by_bytes),
            "binds": "operations" if by_products > by_bytes else "bytes",
            "in_turn": 1 / in_turn,
            "predicted": 1 / predicted,
        }
    return found


def measure() -> dict[str, Any]:
    """The document: every network in every precision, and some by the switches that are on."""
    rows, switches = [], []
    for name, make in NETWORKS.items():
        workload = make()
        program = recorded(workload.build(), workload.inputs(1))
        for precision in KINDS:
            operators = counted(program, workload.target, precision)
            rows.append(row(name, workload, precision, operators))
            if name in SWITCHED and precision in SWITCHED_PRECISIONS:
                switches.append(rows[-1] | {"switch": "off"})
                for switch, one_call in SWITCHES.items():
                    operators = counted(program, workload.target, precision, one_call=one_call)
                    found = row(name, workload, precision, operators)
                    if found["bytes"] != rows[-1]["bytes"]:
                        switches.append(found | {"switch": switch})
    about = {"command": COMMAND, "rows": ROWS, "devices": [asdict(one) for one in DEVICES],
             "reached": {"operations": REACHED_OPERATIONS, "bytes": REACHED_BYTES}}  # fmt: skip
    return {"setting": about, "rows": rows, "switches": switches}


def table(document: dict[str, Any]) -> str:
    """A line per network and precision: its work, and each device's limit and prediction."""
    names = [device["name"] for device in document["setting"]["devices"]]
    header = ", ".join(
        [
            "model",
            "method:",
            "GFLOP",
            "MB",
            "kernels",
            *(f"{name} limit, predicted" for name in names),
        ]
    ).replace("method:", "precision:")
    lines = []
    for one in document["rows"]:
        cells = [one["network"], one["precision"], f"{one['operations'] / 1e9:.1f}",
                 f"{one['bytes'] / 1e6:.0f}", str(one["kernels"])]  # fmt: skip
        for name in names:
            device = one["devices"][name]
            by = device["binds"]
            cells += [f"{device['limit']:,.0f} ({by})", f"{device['predicted']:,.0f}"]
        lines.append(cells)
    reached = document["setting"]["reached"]
    notes = (
        "Input gradients per second, counted and not measured. GFLOP and MB are those of one "
        f"point in a launch of {document['setting']['rows']}, forward and back, with each operand "
        "of each kernel read and each result written once. Limit: all operations at the published "
        "peak, or all bytes at the published bandwidth, whichever takes longer. Predicted: kernels "
        f"one after another, each at {reached['operations']:.0%} of the peak or "
        f"{reached['bytes']:.0%} of the bandwidth."
    )
    command = f"`{document['setting']['command']}`."
    return "\n".join([command, "", *tables.aligned(header, lines), "", notes]) + "\n"


def switched(document: dict[str, Any]) -> str:
    """A line per network, precision and switch: what it moves, and its gain over all being off."""
    names = [device["name"] for device in document["setting"]["devices"]]
    header = ", ".join(
        ["model", "precision:", "switch:", "MB", "kernels",
         *(f"{name} predicted, over off" for name in names)]
    )  # fmt: skip
    off, lines = {}, []
    for one in document["switches"]:
        key = one["network"], one["precision"]
        off.setdefault(key, one["devices"])
        cells = [*key, one["switch"], f"{one['bytes'] / 1e6:.0f}", str(one["kernels"])]
        for name in names:
            rate = one["devices"][name]["predicted"]
            cells += [f"{rate:,.0f}", f"{rate / off[key][name]['predicted']:.3f}"]
        lines.append(cells)
    head = f"`{document['setting']['command']}`: switches of the engine, as `gpu-model.md` counts."
    return "\n".join([head, "", *tables.aligned(header, lines)]) + "\n"


def compared(document: dict[str, Any], measured: dict[str, Any]) -> str:
    """What was measured beside what is predicted for the same device; ValueError where that is
    none of those.
    """
    name = str(measured["setting"]["device"])
    device = next((one.name for one in DEVICES if one.name in name), None)
    if device is None:
        known = ", ".join(one.name for one in DEVICES)
        raise ValueError(f"measured on {name!r}: expected one of {known}; add its peaks to DEVICES")
    best: dict[tuple[str, str], float] = {}
    for one in measured["rows"]:
        rate = one.get("gradients_per_second")
        precision = str(one.get("contender")).removeprefix(f"{tables.OURS}, ")
        if rate:
            key = one["workload"], precision
            best[key] = max(best.get(key, 0.0), rate)
    header = "model, precision:, measured, predicted, of predicted, limit, of the limit"
    lines = []
    for one in document["rows"]:
        rate, about = best.get((one["workload"], one["precision"])), one["devices"][device]
        predicted, limit = about["predicted"], about["limit"]
        shares = ["-", "-"] if rate is None else [f"{rate / n:.0%}" for n in (predicted, limit)]
        lines.append([
            one["network"], one["precision"], tables.number_text(rate), f"{predicted:,.0f}",
            shares[0], f"{limit:,.0f}", shares[1],
        ])  # fmt: skip
    return "\n".join([f"{name}:", "", *tables.aligned(header, lines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="a file that benchmarks.gpu wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    options = parser.parse_args()
    path = options.out / "gpu-model.json"
    if options.measured is not None and path.exists():
        document = json.loads(path.read_text())
    else:
        document = measure()
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(document))
        path.with_name("gpu-model-switches.md").write_text(switched(document))
    print(table(document))
    print(switched(document))
    if options.measured is not None:
        print(compared(document, json.loads(options.measured.read_text())))


if __name__ == "__main__":
    main()
