"""Thresholds of the engine in one immutable object, which tests and benchmarks may replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

MiB, GiB = 1024**2, 1024**3


def _by_dtype(
    double: float, single: float, half: float, brain: float
) -> Mapping[torch.dtype, float]:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return dict(zip(kinds, (double, single, half, brain), strict=True))


# Equal by identity: calibrations are cached by the configuration they were made under.
@dataclass(frozen=True, eq=False)
class EngineConfig:
    """What the engine decides by. Pass one as `Engine(..., config=...)`; see `DEFAULT`.

    Strategies:
        lean_from: Bytes of a point from which memory-efficient strategies pay; below, their calls
            cost more than what they spare.
        prefix_from: Points per example from which two forwards and two transposes of the affine
            prefix pay.
        exact_dtypes: Types of inputs for which a strategy must repeat the model's arithmetic bit
            for bit. float64 is asked for where rounding must not show: on flat colours, borders
            and padding, values are equal that a pool compares, or a rectifier compares with 0, and
            a gradient goes as a whole to where the last bit says.
        agreement: Relative L2 up to which two gradients or scores are equal to rounding, by the
            inputs' type. Beyond, a strategy must agree with autograd in float64: rounding may also
            carry a point across kinks, which moves a gradient as much as a wrong structure does.
        agreement_in_float64: The same in float64, where no kink is crossed.
        scores_agreement: The same of scores alone, which may be small differences of large
            numbers, by strategies whose gradient has agreed.
        direct_points: Points of calls of one kind up to which they run eagerly, without anything
            measured or recorded before them.
        direct_calls: Calls of one kind, at least, before a recording serves later ones: their maps
            may differ in the last digits.
        direct_lean_from: Bytes of one example of the inputs from which their model's calls are
            intercepted by memory-efficient versions.
        single_points: Points of a call, of whose model nothing is known, up to which launches have
            one point each, so that no proof is needed that rows do not meet.
        small_bytes: Bytes of weights and of one example of the inputs up to which single gradients
            run eagerly however many there are.
        compared_at_three_from: Points of a call from which strategies are compared at three of
            them, and at two below.
        corner: Side of the images and volumes on which strategies are verified that larger ones
            cannot afford.
        segment_counts: Numbers of checkpoint segments that are tried where a point does not fit.
        tile_shares: Shares of the budget that a tile's working set is given, one after another.
        region_share: The share of the spatially local calls up to which a region's own forward and
            backward pay.

    Memory:
        margin: Operators' own scratch space and the allocator's slack, over the tensors counted.
        usual_ratio: Times its own bytes that a point takes by autograd, at most, as a rule.
        unforeseen_bytes: Bytes that autograd might take for one point without being foreseen on
            shapes first.
        foreseen_bytes: Bytes that it may take where that was foreseen.
        traced_from: Bytes of a launch from which its trace pays, which costs up to five points.
        cpu_tensor, cpu_launch: Bytes of the largest tensor, and of all tensors of a launch, from
            which launches on CPUs get cheaper per point by a tenth at most, in twice the memory.
        cpu_rows, cpu_most: Points that launches have where so many bytes hold them; two where they
            run eagerly, since of one row PyTorch convolves small volumes ten times as slowly.
        cpu_pair: Bytes up to which launches have two points: of one, products leave threads idle.
        cpu_scores: The same of the largest tensor for scores alone: each is read once, right after
            it was written, so that launches stay in the caches.
        gpu_launch: Bytes of a launch on GPUs, far above what keeps the device busy.
        kept_bytes: Bytes of the gradients that are kept of examples at a time, where each example
            has nodes of its own.
        kept_most: The same of one example, above which fixed nodes are taken.
        scarce: Launches of the plan's size that must fit for memory not to be scarce in rounds.

    Time:
        timed_rows: Rows of a launch that is timed; with more, a point rarely takes less than four
            fifths as long on CPUs.
        timed_rows_on_gpus: The same on GPUs, which fewer rows keep waiting for the host.
        long_seconds: Seconds from which a launch is not run again to be timed warm.

    Precision:
        precision_tolerance: Relative L2 that precision "auto" may cost a map.
        faster: Of a float32 point's time, what a precision may take to count as faster.
        precision_nodes: Points of an example that are taken in float32 too.
        precision_every: Points of a call for each example whose precision error is measured.
        precision_rarely: Points of all calls after which it is measured again where launches are
            captured and it stays the same.
        precision_alone: Points of a call from which it measures, and does not rely on others.

    Ties:
        ties_points_per_example: Points of a call for each example that is examined for ties.
        ties_least_points: Points of a call from which one example is. A point by autograd takes as
            long as three or four in a launch. In float64 all examples are examined.

    Caches:
        most_read: Kinds of further arguments, by what the model's Python reads of them, that have
            programs.
        most_known: Calibrations that are remembered of a model.
        arguments_tried: Arguments of the batch's length of which all combinations are tried.

    CUDA graphs:
        graph_calls: Calls of a kind from which on its launches are captured.
        graph_launch, graph_seconds: Bytes and seconds of a launch from which the host's work no
            longer counts.
        graph_rows: Rows of a table of points, at least.
        graph_sizes: Sizes of launches that are captured of one kind; others run eagerly.

    Switches, which the stage "switches" of `make bench-gpu` decides; off until it has:
        fused_relu: Convolutions with the ReLU behind them in one call of cuDNN's.
        fused_residual_relu: The same with a residual addition before the ReLU.
        fused_layer_norm: Residual additions with the layer normalisation behind them in one pass.
        graph_halves: Whether the two halves of a captured launch run beside one another, so that
            what waits for memory in one runs while the other computes.
    """

    lean_from: int = 256 * 1024
    prefix_from: int = 4
    exact_dtypes: frozenset[torch.dtype] = frozenset((torch.float64,))
    agreement: Mapping[torch.dtype, float] = field(
        default_factory=lambda: _by_dtype(1e-8, 1e-4, 1e-3, 1e-2)
    )
    agreement_in_float64: float = 1e-8
    scores_agreement: Mapping[torch.dtype, float] = field(
        default_factory=lambda: _by_dtype(1e-6, 5e-2, 0.2, 0.5)
    )
    direct_points: int = 16
    direct_calls: int = 4
    direct_lean_from: int = 1 * MiB
    single_points: int = 8
    small_bytes: int = 4 * MiB
    compared_at_three_from: int = 128
    corner: int = 64
    segment_counts: tuple[int, ...] = (2, 4, 8, 16)
    tile_shares: tuple[int, ...] = (2, 4, 8, 16, 32)
    region_share: float = 0.6
    margin: float = 1.25
    usual_ratio: int = 512
    unforeseen_bytes: int = 1536 * MiB
    foreseen_bytes: int = 256 * MiB
    traced_from: int = 160 * MiB
    cpu_tensor: int = 40 * MiB
    cpu_scores: int = 8 * MiB
    cpu_launch: int = 64 * MiB
    cpu_rows: int = 16
    cpu_most: int = 160 * MiB
    cpu_pair: int = 256 * MiB
    gpu_launch: int = 8 * GiB
    kept_bytes: int = 256 * MiB
    kept_most: int = 1 * GiB
    scarce: int = 32
    timed_rows: int = 4
    timed_rows_on_gpus: int = 128
    long_seconds: float = 2.0
    precision_tolerance: float = 0.02
    faster: float = 0.9
    precision_nodes: int = 3
    precision_every: int = 128
    precision_rarely: int = 1024
    precision_alone: int = 16
    ties_points_per_example: int = 128
    ties_least_points: int = 32
    most_read: int = 8
    most_known: int = 256
    arguments_tried: int = 4
    graph_calls: int = 2
    graph_launch: int = 8 * GiB
    graph_seconds: float = 0.1
    graph_rows: int = 4096
    graph_sizes: int = 4
    fused_relu: bool = False
    fused_residual_relu: bool = False
    fused_layer_norm: bool = False
    graph_halves: bool = False


DEFAULT = EngineConfig()
"""The configuration of engines that are given none; read when an engine is made."""
