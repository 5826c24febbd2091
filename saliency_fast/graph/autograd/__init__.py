"""Lean (memory-efficient) versions of PyTorch's calls, which keep what input gradients need.

Each file holds one family and registers its versions with `opinfo.lean`: functions of the same
arguments with the same results. A lean version may answer NotImplemented for arguments it does not
serve: autograd's own then runs, which is right for every call and lean for many (linear layers keep
their frozen weight alone, additions and shapes nothing).
"""

from saliency_fast.graph.autograd import activations, convolutions, norms, pools
from saliency_fast.graph.opinfo import LEAN

__all__ = ["LEAN", "activations", "convolutions", "norms", "pools"]
