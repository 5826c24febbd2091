"""Classes that only Captum has, with the copies of a batch kept apart that depend on each other.

They are Captum's own, and call the model as they do there: with all steps, perturbations or samples
that were asked for. Where copies of the batch are seen to depend on each other, each has a call of
its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_map
from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import as_tuple, public
from saliency_fast.captum.attribute_call import rows_depend
from saliency_fast.captum.shared_calls import calls_of

STEPS = ("InternalInfluence", "NeuronConductance", "NeuronIntegratedGradients")
PERTURBED = ("LayerFeatureAblation", "LayerFeaturePermutation", "NeuronFeatureAblation")
SAMPLED = ("LayerGradientShap", "NeuronGradientShap")


@functools.cache
def kept_apart(theirs: Any) -> Any:
    """A subclass of one of Captum's classes whose calls several copies of a batch share; any other
    name of Captum's as it is.
    """
    if getattr(theirs, "__name__", "") not in (*STEPS, *PERTURBED, *SAMPLED):
        return theirs
    signature = inspect.signature(theirs.attribute)

    @functools.wraps(theirs.attribute)
    def attribute(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if not _depend(self, theirs.__name__, call.arguments):
            return theirs.attribute(self, *args, **kwargs)
        if theirs.__name__ in SAMPLED:
            return _sample_by_sample(theirs, call)
        if theirs.__name__ in STEPS:
            call.arguments["internal_batch_size"] = len(as_tuple(call.arguments["inputs"])[0])
        else:
            call.arguments["perturbations_per_eval"] = 1
        return theirs.attribute(*call.args, **call.kwargs)

    return type(theirs)(
        theirs.__name__,
        (theirs,),
        {"attribute": public(attribute), "__module__": __package__, "__doc__": theirs.__doc__},
    )


def _depend(method: Any, name: str, given: dict[str, Any]) -> bool:
    """Whether copies of the batch that are to share a call depend on each other in the model."""
    inputs, sizes = as_tuple(given["inputs"]), _sizes(name, given)
    if not sizes or not inputs[0].dim():
        return False
    if rows_depend(method.forward_func):
        return True
    layers = method.layer if isinstance(method.layer, (list, tuple)) else (method.layer,)
    shared = calls_of(method.forward_func, given["additional_forward_args"], *layers)
    starts = _starts(inputs, given.get("baselines"))
    return any(shared.depend(_between(inputs, starts, size)) for size in sizes)


def _sizes(name: str, given: dict[str, Any]) -> list[int]:
    """The numbers of copies in a call, as a model may branch on them."""
    batch = max(1, len(as_tuple(given["inputs"])[0]))
    if name in SAMPLED:
        found = [given["n_samples"]]
    elif name in STEPS:
        steps, most = given["n_steps"], given["internal_batch_size"]
        each = steps if most is None else min(steps, max(1, most // batch))
        found = [each, steps % max(1, each)]
    else:
        # Of how many features there are, and so of the last call, the layer decides.
        found = list(range(given["perturbations_per_eval"], 1, -1))
    return [one for one in dict.fromkeys(found) if one > 1]


def _starts(inputs: Inputs, baselines: Any) -> list[Any]:
    """Where lines to the inputs begin: at baselines that fit them, else at zeros."""
    several = baselines if isinstance(baselines, tuple) else (baselines,) * len(inputs)
    found = []
    for x, one in zip(inputs, several, strict=False):
        fits = isinstance(one, (int, float)) or (isinstance(one, Tensor) and one.dim() == x.dim())
        start = torch.as_tensor(one if fits else 0, dtype=x.dtype, device=x.device)
        found.append(start[:1] if start.dim() and len(start) != len(x) else start)
    return found


def _between(inputs: Inputs, starts: list[Any], count: int) -> Inputs:
    """Copies [count, B, *] on the lines to the inputs; of whole numbers in other orders."""
    found = []
    for x, start in zip(inputs, starts, strict=True):
        if not x.is_floating_point():
            found.append(torch.stack([x.roll(number, -1) for number in range(count)]))
            continue
        share = torch.linspace(0, 1, count, dtype=x.dtype, device=x.device)
        line = share.view(-1, *(1,) * x.dim())
        found.append((start + line * (x - start)).detach())
    return tuple(found)


def _sample_by_sample(theirs: Any, call: Any) -> Any:
    """The mean of maps of one sample each, and the deltas of all [B * samples], example-major."""
    count, deltas, maps = call.arguments["n_samples"], list[Tensor](), list[Any]()
    call.arguments["n_samples"] = 1
    for _ in range(count):
        found = theirs.attribute(*call.args, **call.kwargs)
        if call.arguments.get("return_convergence_delta"):
            found, delta = found
            deltas.append(delta)
        maps = [found if not maps else tree_map(torch.add, maps[0], found)]
    mean = tree_map(lambda one: one / count, maps[0])
    return (mean, torch.stack(deltas, 1).flatten()) if deltas else mean
