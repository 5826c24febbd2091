"""Lean (memory-efficient) versions of PyTorch's calls, which keep what input gradients need.

Each file registers one family with `opinfo.lean`: functions of the same arguments with the same
results, or NotImplemented where autograd's own version is to run.
"""

from saliency_fast.graph.autograd import activations, convolutions, norms, pools
from saliency_fast.graph.opinfo import LEAN

__all__ = ["LEAN", "activations", "convolutions", "norms", "pools"]
