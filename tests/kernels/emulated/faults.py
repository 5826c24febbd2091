"""Faults that kernels could have: the checks must find each of them, or they prove nothing."""

from __future__ import annotations

from tests.kernels.emulated.build import Fault

OPS_OF = {
    "masks.cu": "relu_mask,relu_mask_,relu_mask_backward,pack_mask",
    "overlay.cu": "magnitude_percentile",
    "points.cu": "noise_points",
}

VALUES = (
    Fault("overlay.cu", "== __ffs(lanes) - 1", "== 0"),
    Fault("overlay.cu", "if (!last) return;", "if (!last && threadIdx.x > 0) return;"),
    Fault("overlay.cu", "      atomicExch(&row.ticket, Count{0});", ""),
    Fault("overlay.cu", "static_cast<unsigned>(__popc(lanes))", "32u"),
    Fault("overlay.cu", "sums[threadIdx.x] = sum;\n  __syncthreads();", "sums[threadIdx.x] = sum;"),
    Fault("overlay.cu", "    count = 0;\n", ""),
    Fault("masks.cu", "&& i < count ? 1u : 0u", "? 1u : 0u"),
    Fault("masks.cu", "if (++before == planes.inner) {", "if (before++ == planes.inner) {"),
    Fault("points.cu", "int64_t at = 4 * quad - first_element % 4;", "int64_t at = 4 * quad;"),
    Fault("points.cu", "first_element % 4 == 0 && numel % 4 == 0", "first_element % 4 == 0"),
)  # fmt: skip
"""Results are wrong, or a process ends by itself, in any build."""

ADDRESSES = (
    Fault("masks.cu", "if (i < count) narrow(from[i], to[i]);", "narrow(from[i], to[i]);"),
    Fault("masks.cu", "i < count ? widen(from[i]) : Wide<T>{0};", "widen(from[i]);"),
    Fault("masks.cu", "if (at >= planes.numel) return;", ""),
    Fault("masks.cu", "reinterpret_cast<uintptr_t>(pointer) % 16 == 0", "true"),
    Fault("masks.cu", "whole = aligned && count == kGroup;", "whole = aligned;"),
    Fault("masks.cu", "if (++channel == planes.channels) channel = 0;", "++channel;"),
    Fault("points.cu", "at + i >= 0 && at + i < numel", "at + i < numel"),
    Fault("points.cu", "at + i >= 0 && at + i < numel", "at + i >= 0 && at + i <= numel"),
    Fault("points.cu", "reinterpret_cast<uintptr_t>(pointer) % 16 == 0", "true"),
    Fault("overlay.cu", "unsigned count[kBins];", "unsigned count[kThreads];"),
    Fault("overlay.cu", "at < numel; at += ", "at <= numel; at += "),
)  # fmt: skip
"""Accesses outside of what a launch was given, or misaligned: found by AddressSanitizer and
UndefinedBehaviorSanitizer."""

RACES = (
    Fault("overlay.cu", "count[i] = 0;\n  __syncthreads();", "count[i] = 0;"),
    Fault("overlay.cu", "sums[threadIdx.x] = sum;\n  __syncthreads();", "sums[threadIdx.x] = sum;"),
    Fault("overlay.cu", ": 0;\n    __syncthreads();", ": 0;"),
    Fault("overlay.cu", "+= before;\n    __syncthreads();", "+= before;"),
    Fault("overlay.cu", "atomicAdd(count + digit, 1u);", "count[digit] += 1u;"),
    Fault("overlay.cu", "  }\n  __syncthreads();\n  for", "  }\n  for"),
    Fault("overlay.cu", "  }\n  __threadfence();\n  __syncthreads();", "  }\n  __syncthreads();"),
    Fault("overlay.cu", "__threadfence();\n  __syncthreads();", "__threadfence();"),
    Fault("overlay.cu", "if (!last) return;\n  __threadfence();", "if (!last) return;"),
    Fault("overlay.cu", "parts - 1;\n  __syncthreads();", "parts - 1;"),
    Fault("masks.cu", "mask[group] = ", "mask[group / 2] = "),
    Fault("points.cu", "to[i] = from[i] + width", "(i > 0 ? to : out)[i] = from[i] + width"),
)  # fmt: skip
"""Accesses that nothing orders: found by ThreadSanitizer."""

FAULTS = {"plain": VALUES, "address": ADDRESSES, "races": RACES}
