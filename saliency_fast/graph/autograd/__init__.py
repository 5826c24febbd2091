"""Lean versions of PyTorch's calls: the same results, keeping only what input gradients need.

Each file holds one family and adds to `LEAN`, which maps a call as PyTorch names it to a function
of the same arguments. A lean version may answer NotImplemented for arguments it does not serve:
autograd's own then runs, which is right for every call and lean for many (linear layers keep
their frozen weight alone, additions and shapes nothing).
"""

from saliency_fast.graph.autograd import activations, convolutions, norms, pads, pools

LEAN = {**activations.LEAN, **convolutions.LEAN, **norms.LEAN, **pads.LEAN, **pools.LEAN}

__all__ = ["LEAN"]
