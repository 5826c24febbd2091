"""The fused ops: each defined once here, dispatched by device."""

from saliency_fast.ops import dispatch as _dispatch
from saliency_fast.ops.accumulate import accumulate, accumulate_moments, accumulate_random_lines
from saliency_fast.ops.cam import cam
from saliency_fast.ops.dispatch import backends
from saliency_fast.ops.finish import REDUCTIONS, finish
from saliency_fast.ops.masks import pack_mask, relu_mask, relu_mask_, relu_mask_backward
from saliency_fast.ops.norms import add_layer_norm, add_layer_norm_backward
from saliency_fast.ops.overlay import magnitude_percentile, overlay
from saliency_fast.ops.philox import random_bits
from saliency_fast.ops.points import line_points, noise_points, random_line_points
from saliency_fast.ops.pools import maxpool_index, maxpool_index_backward
from saliency_fast.ops.ranks import rank_points
from saliency_fast.ops.registry import OPS, Op, Sample
from saliency_fast.ops.segments import mask_points, segment_points
from saliency_fast.ops.windows import window_points
from saliency_fast.ops.winograd import winograd, winograd_weights

_dispatch.load_native()

__all__ = [
    "OPS",
    "REDUCTIONS",
    "Op",
    "Sample",
    "accumulate",
    "accumulate_moments",
    "accumulate_random_lines",
    "add_layer_norm",
    "add_layer_norm_backward",
    "backends",
    "cam",
    "finish",
    "line_points",
    "magnitude_percentile",
    "mask_points",
    "maxpool_index",
    "maxpool_index_backward",
    "noise_points",
    "overlay",
    "pack_mask",
    "random_bits",
    "random_line_points",
    "rank_points",
    "relu_mask",
    "relu_mask_",
    "relu_mask_backward",
    "segment_points",
    "window_points",
    "winograd",
    "winograd_weights",
]
