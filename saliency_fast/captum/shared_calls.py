"""Calls of the user's function that copies of the batch share, and the proof that copies are apart.

A copy is the batch at one step of a path, with one sample of noise or with one perturbation. A copy
alone must have the numbers that it has in the shared call, and among extreme copies (the proof of
`engine/independence.py`); else each copy has a call of its own, also of classes that only Captum
has. Examples of one batch may depend on each other, as they do in Captum.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_map
from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import rows_depend
from saliency_fast.engine.independence import Row, RowsMeetError, provoked, scores_agree
from saliency_fast.errors import ContractError
from saliency_fast.graph.passes.half import FLOAT32
from saliency_fast.model.layers import hooked, tensors_at
from saliency_fast.model.preserve import draw_again, preserved, random_states, restored_random_state

MOST_PROVED = 4
"""Copies in the first call of a size that are proved one by one; of more, the first, the last, the
middle one and the one farthest from the others."""
CHUNK_BYTES = 64 * 1024**2
"""Bytes of copies of the batch that are held at once, unless the caller says how many."""
Result = TypeVar("Result")


class SharedCalls:
    """Calls of `of`, from copies [count, B, *] to numbers [count, N]; independent: unproved."""

    # The engine's proof reads these of the function that it calls.
    precision = FLOAT32
    dtypes: tuple[torch.dtype, ...] | None = None

    def __init__(self, of: Callable[[Inputs], Tensor], *, independent: bool = False) -> None:
        self.of, self.independent = of, independent
        self._sizes = set[int]()

    def numbers(self, points: Inputs) -> Tensor:
        """The numbers [count, N] of copies; raises RowsMeetError where copies change them."""
        count = len(points[0])
        if self.independent or count < 2:
            return self.of(points)
        # The function may work in place.
        kept = tuple(x.clone() for x in points)
        results = self.of(points)
        self.dtypes = (results.dtype,) if results.dtype.is_floating_point else None
        self._prove(kept, results)
        return results

    def _prove(self, points: Inputs, results: Tensor) -> None:
        """Compares some copies with the same copies alone: more of each new size, since a function
        may branch on it, and one in later calls.
        """
        count, numbers = len(results), results.detach().double().nan_to_num()
        # Numbers far from the others: those of a saturated function prove nothing.
        farthest = int((numbers - numbers.median(0).values).abs().sum(1).argmax())
        middle, due = (count - 1) // 2, [farthest]
        if count not in self._sizes:
            self._sizes.add(count)
            due = [*range(count)] if count <= MOST_PROVED else [middle, farthest, count - 1, 0]
        example = torch.zeros(count, dtype=torch.int64, device=points[0].device)
        for number in dict.fromkeys(due):
            row = Row.of(points, example, number)
            with restored_random_state(lambda: True, example.device):
                alone, scale = self.scores_and_magnitude(*row.alone())
                # The first and the last are often an input and its baseline, at which functions
                # are saturated.
                if len(due) > 1 and number in (middle, farthest):
                    provoked(self, row, alone, scale)  # type: ignore[arg-type]
            if not scores_agree(results[number], alone[0], scale, self):  # type: ignore[arg-type]
                raise RowsMeetError(f"copy {number} of {count} has other numbers alone")

    @torch.no_grad()
    def scores_and_magnitude(self, points: Inputs, example: Tensor) -> tuple[Tensor, float]:
        """The numbers of copies and the largest of them, as the engine's proof reads them."""
        results = self.of(points)
        size = results.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
        return results, float(size.max()) if size.numel() else 0.0

    def depend(self, points: Inputs) -> bool:
        """Whether copies that are to share a call change each other's numbers."""
        if len(points[0]) < 2:
            return False
        try:
            with restored_random_state(lambda: True, points[0].device):
                self.numbers(points)
        except Exception:
            # A function that fails on several copies is called with one, which raises its error.
            return True
        return False


def samples_at_once(inputs: Inputs, samples: int) -> int:
    """How many copies of the batch fit into `CHUNK_BYTES`, one at least."""
    each = sum(x.numel() * x.element_size() for x in inputs)
    return min(samples, max(1, CHUNK_BYTES // max(1, each)))


def together_or_apart(
    run: Callable[[bool], Result], rewind: Callable[[], object], *, apart: bool
) -> Result:
    """`run(False)`, whose copies share calls; or, after `rewind`, `run(True)`, whose copies are
    apart, where `apart` says so or copies are seen to depend on each other.
    """
    if not apart:
        with suppress(RowsMeetError):
            return run(False)
        rewind()
    return run(True)


def calls_of(forward: Callable[..., Any], further: Any, *layers: Any) -> SharedCalls:
    """Shared calls whose numbers are all that a function returns and what `layers` return."""

    def of(points: Inputs) -> Tensor:
        count, seen = len(points[0]), list[Tensor]()
        rows = tuple(x.flatten(0, 1) for x in points)

        def keep(_: int, value: Any) -> None:
            seen.extend(one.clone() for one in tensors_at(value) if one.is_floating_point())

        with torch.no_grad(), preserved(forward), hooked(layers, keep):
            output = forms.read_output(
                forward(*rows, *forms.arguments_of(further, forms.tiled, count))
            )
        if not output.dim() or len(output) % count:
            raise ContractError("outputs do not grow with the batch; pass one batch a call")
        # Tensors without a row for each row of the inputs are in no known order.
        several = [output, *(one for one in seen if one.dim() and len(one) == len(rows[0]))]
        return torch.cat([one.detach().reshape(count, -1) for one in several], 1)

    return SharedCalls(of)


def copies_are_apart(forward: Callable[..., Any]) -> bool:
    """Whether a function calls the model for each copy, as Captum's DataLoaderAttribution does."""
    while isinstance(forward, partial):
        forward = forward.func
    kinds = type(getattr(forward, "__self__", None)).__mro__
    captums = (one for one in kinds if one.__module__.startswith("captum."))
    return any(one.__name__ == "DataLoaderAttribution" for one in captums)


def rewind_draws(device: torch.device) -> Callable[[], None]:
    """Returns a function that restores the generators of PyTorch, NumPy and Python."""
    states = random_states(device)
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def rewind() -> None:
        draw_again(states, device)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return rewind


STEPS = ("InternalInfluence", "NeuronConductance", "NeuronIntegratedGradients")
PERTURBED = ("LayerFeatureAblation", "LayerFeaturePermutation", "NeuronFeatureAblation")
SAMPLED = ("LayerGradientShap", "NeuronGradientShap")


@functools.cache
def kept_apart(theirs: Any) -> Any:
    """A child of a Captum class with copies apart where they must be; other names as they are."""
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
            call.arguments["internal_batch_size"] = len(forms.as_tuple(call.arguments["inputs"])[0])
        else:
            call.arguments["perturbations_per_eval"] = 1
        return theirs.attribute(*call.args, **call.kwargs)

    own = {"attribute": forms.public(attribute), "__module__": __package__}
    return type(theirs)(theirs.__name__, (theirs,), own | {"__doc__": theirs.__doc__})


def _depend(method: Any, name: str, args: dict[str, Any]) -> bool:
    """Whether copies of the batch that are to share a call depend on each other in the model."""
    inputs, sizes = forms.as_tuple(args["inputs"]), _sizes(name, args)
    if not sizes or not inputs[0].dim():
        return False
    if rows_depend(method.forward_func):
        return True
    layers = method.layer if isinstance(method.layer, (list, tuple)) else (method.layer,)
    shared = calls_of(method.forward_func, args["additional_forward_args"], *layers)
    starts = _starts(inputs, args.get("baselines"))
    return any(shared.depend(_between(inputs, starts, size)) for size in sizes)


def _sizes(name: str, args: dict[str, Any]) -> list[int]:
    """The numbers of copies in a call, as a model may branch on them."""
    batch = max(1, len(forms.as_tuple(args["inputs"])[0]))
    if name in SAMPLED:
        sizes = [args["n_samples"]]
    elif name in STEPS:
        steps, most = args["n_steps"], args["internal_batch_size"]
        each = steps if most is None else min(steps, max(1, most // batch))
        sizes = [each, steps % max(1, each)]
    else:
        # Of how many features there are, and so of the last call, the layer decides.
        sizes = list(range(args["perturbations_per_eval"], 1, -1))
    return [one for one in dict.fromkeys(sizes) if one > 1]


def _starts(inputs: Inputs, baselines: Any) -> list[Any]:
    """Where lines to the inputs begin: at baselines that fit them, else at zeros."""
    several = baselines if isinstance(baselines, tuple) else (baselines,) * len(inputs)
    starts = []
    for x, one in zip(inputs, several, strict=False):
        fits = isinstance(one, (int, float)) or (isinstance(one, Tensor) and one.dim() == x.dim())
        start = torch.as_tensor(one if fits else 0, dtype=x.dtype, device=x.device)
        starts.append(start[:1] if start.dim() and len(start) != len(x) else start)
    return starts


def _between(inputs: Inputs, starts: list[Any], count: int) -> Inputs:
    """Copies [count, B, *] on the lines to the inputs; of whole numbers in other orders."""
    result = []
    for x, start in zip(inputs, starts, strict=True):
        if not x.is_floating_point():
            result.append(torch.stack([x.roll(number, -1) for number in range(count)]))
            continue
        share = torch.linspace(0, 1, count, dtype=x.dtype, device=x.device)
        line = share.view(-1, *(1,) * x.dim())
        result.append((start + line * (x - start)).detach())
    return tuple(result)


def _sample_by_sample(theirs: Any, call: Any) -> Any:
    """The mean of maps of one sample each, and the deltas of all [B * samples], example-major."""
    count, deltas, maps = call.arguments["n_samples"], list[Tensor](), list[Any]()
    call.arguments["n_samples"] = 1
    for _ in range(count):
        result = theirs.attribute(*call.args, **call.kwargs)
        if call.arguments.get("return_convergence_delta"):
            result, delta = result
            deltas.append(delta)
        maps = [result if not maps else tree_map(torch.add, maps[0], result)]
    mean = tree_map(lambda one: one / count, maps[0])
    return (mean, torch.stack(deltas, 1).flatten()) if deltas else mean
