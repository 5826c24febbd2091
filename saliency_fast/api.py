"""`explain`: one call from a model and inputs to maps; `Engine` serves many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Region
from saliency_fast.engine.features import Features
from saliency_fast.engine.recipe import Method
from saliency_fast.engines import Engine
from saliency_fast.model.layers import At
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import Target

__all__ = ["Engine", "explain"]


def explain(
    model: Callable[..., Any],
    inputs: Tensor | Inputs,
    *,
    target: Target = None,
    method: Method | str = "integrated_gradients",
    baseline: Baseline = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    precision: str | None = None,
    tolerance: float | None = None,
    at: At | None = None,
    layer_input: bool = False,
    memory_budget: int | str | None = None,
    points_per_launch: int | None = None,
    lean: bool = True,
    region: Region = None,
    features: Features = None,
    rows: str = "alone",
    layout: LayoutLike = None,
    progress: bool = False,
    create_graph: bool = False,
) -> Attribution:
    """Explains which parts of `inputs` a scalar of the model's output depends on.

    Args:
        model: Any callable from input tensors to an output.
        inputs: A tensor [B, *] of B examples, or a tuple of them for a model of several inputs,
            float32 or float64 (integers where the method takes no gradients at the inputs).
        target: The scalar that is explained for each example:

            - None: the model returns one number per example;
            - a class, or a tensor [B] of classes: an element of an output [B, classes];
            - "predicted": the class with the largest output at the inputs;
            - a tensor [B, K] of classes: K maps per example, from shared forward passes;
            - a tuple: an index into an example's output, summed over the elements that it selects;
              a bool mask may be its last element;
            - a list of B tuples of ints: one element of each example's output;
            - `NextToken`: a token that may follow a text;
            - a function from the outputs of R rows to [R] scores. Rows are evaluation points of the
              examples in any order and number. A second required parameter, or one named
              `example`, receives the rows' example indices, int64 [R].
        method: A name (see `saliency-fast methods`) or a method such as
            `IntegratedGradients(steps=100)`.
        baseline: What the inputs are compared with: None (zeros), a number, a tensor that
            broadcasts to the inputs, "blur", "mean", "uniform", a tuple with one per input, or a
            list of these: Integrated Gradients averages over it, Expected Gradients draws from it.
        forward_args: Further positional arguments of the model. Tensors whose first axis has
            length B belong to the examples, unless `Shared` or `PerExample` says otherwise.
        forward_kwargs: Further keyword arguments of the model, likewise.
        precision: Arithmetic of the model's convolutions and matrix products: "float32" (float64
            inputs stay float64), "bfloat16", on GPUs also "tf32" and "float16", or "auto". Its cost
            is measured and part of `Attribution.error`. None is "auto" on GPUs, else "float32".
        tolerance: Largest relative L2 error of "auto"; 0.02, or half of the method's own tolerance.
        at: Layers to explain instead of the inputs: names or modules, "embeddings", or "auto" for
            the last spatial one.
        layer_input: Whether maps are about what these layers take, instead of what they return.
        memory_budget: Bytes, or text such as "8GiB", over what is in use; 80 % of what is free.
        points_per_launch: Upper bound on the evaluation points of a launch; planned by default.
        lean: Whether memory-efficient backward passes may be used. Maps agree to rounding.
        region: The part of an input [B, C, *spatial] to explain: a bool mask [*spatial] or one
            slice per spatial axis. Values elsewhere are zero and not computed where possible.
        features: Groups of elements that perturbation methods replace together: integers [B | 1, *]
            like an input (a tuple for several inputs), "slic" or "grid:8". None: every element.
        rows: "alone": each row of the inputs is an example. "together": all rows are one input,
            such as the nodes of a graph, and the sum of their scores is explained.
        layout: One letter per axis of each input, such as "BCHW", "BTF" or "BTCHW" (B batch, C
            channels, F features, T time, D, H, W space), or a tuple of these, one per input.
            Derived from the model's first layers by default.
        progress: Whether to show a progress bar.
        create_graph: Whether the maps are part of autograd's graph, for losses that depend on them.

    Returns:
        The maps with their scores, errors and provenance.

    Raises:
        InputError: An argument has a wrong shape, value or range.
        InputTypeError: An argument has a wrong type.
        ModelError: The model's output cannot be explained, or the model or the target function
            raised, with that exception as `__cause__`.
        BudgetError: One evaluation point alone exceeds the memory budget.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Linear(4, 3)
        >>> x = torch.ones(2, 4)
        >>> attribution = sf.explain(model, x, target=1, method=sf.IntegratedGradients(steps=8))
        >>> torch.allclose(attribution.values, model.weight[1] * x)
        True
        >>> sf.explain(model, x, target=torch.tensor([[0, 1], [1, 2]])).values.shape
        torch.Size([2, 2, 4])
    """
    engine = Engine(
        model,
        method,
        precision=precision,
        tolerance=tolerance,
        at=at,
        layer_input=layer_input,
        memory_budget=memory_budget,
        points_per_launch=points_per_launch,
        lean=lean,
        progress=progress,
        rows=rows,
        create_graph=create_graph,
    )
    return engine(
        inputs,
        target,
        baseline,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
        region=region,
        features=features,
        layout=layout,
    )
