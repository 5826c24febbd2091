"""Layers: a call moved from the inputs of a model to layers inside of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.baselines import choices, read_baseline_set, read_baselines
from saliency_fast.engine.bind import Call, Model, layouts_at, read_inputs
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.recipe import Recipe, Starting, WeightedSum
from saliency_fast.errors import InputError, ModelError, warn
from saliency_fast.graph.fingerprint import model_fingerprint
from saliency_fast.graph.program import in_layout, is_channels_last
from saliency_fast.model.executors import EagerExecutor
from saliency_fast.model.failures import FORWARD
from saliency_fast.model.function import PointFunction
from saliency_fast.model.layers import (
    EMBEDDINGS,
    At,
    Change,
    Downstream,
    Layer,
    OneCall,
    Read,
    embeddings,
    find_layers,
    last_spatial,
    last_spatial_by_gradient,
    module_at,
    names_of,
)

AUTO = "auto"
MOST_CACHED = 64
"""Kinds of inputs and targets whose layers are cached for each model."""
SMALL = 3 * 1024**2
"""Bytes of inputs up to which a layer is found by a run that autograd keeps: 512 times as much."""


@dataclass
class LayerLocation:
    """Where an engine explains: at a model's inputs, or `at` layers: what they give or, with
    `of_input`, what they take. caches: calibrations, at the inputs under (), at layers by their
    ids; engines of one model share them.
    """

    model: Model
    at: At | None
    of_input: bool
    caches: dict[tuple[object, ...], CalibrationCache]
    _downstream: dict[tuple[object, ...], Downstream] = field(default_factory=dict)

    @property
    def cache(self) -> CalibrationCache:
        """Calibrations at the inputs."""
        # Another thread may forget all at any time.
        found = self.caches.get(())
        return self.caches.setdefault((), CalibrationCache()) if found is None else found

    def forget(self) -> None:
        """Lets go of all that was found out about the model, for all of its engines."""
        for known in (self.caches, self._downstream):
            known.clear()

    def moved(
        self, call: Call, recipe: Recipe, baseline: Any
    ) -> tuple[Model, Call, Any, CalibrationCache, tuple[Layer, ...]]:
        """(model, call, baseline, calibrations, layers) to run instead of a call."""
        at = recipe.layers if self.at is None else self.at
        if at is None and self.of_input:
            raise InputError("layer_input is about a layer: name it with at=, or leave it out")
        if at is None:
            return self.model, call, baseline, self.cache, ()
        layers = self._layers(at, call)
        if recipe.layers is not None:
            call = replace(call, layers=layers, layer_input=self.of_input)
            return self.model, call, baseline, self.cache, layers
        everyone = torch.arange(call.batch, device="cpu")
        values, counts = self._values(call.inputs, call, layers, everyone)
        key = (self.of_input, *map(id_of, layers), *counts)
        if key not in self._downstream:
            self._need_batch_first(call, layers)
            self._downstream[key] = Downstream(self.model, layers, self.of_input, counts)
        downstream = self._downstream[key]
        cache = self.caches.setdefault(key, CalibrationCache())
        # A baseline that the method has no use for is refused where others are.
        own = isinstance(recipe, WeightedSum) and isinstance(recipe.family, Starting)
        if recipe.baseline != "none" and not own:
            baseline = self._baseline(baseline, call, layers, recipe, values)
        moved = _moved(call, values)
        layouts = layouts_at(downstream, moved, layers, counts, self.of_input)
        return downstream, replace(moved, layouts=layouts), baseline, cache, layers

    def _layers(self, at: At, call: Call) -> tuple[Layer, ...]:
        if not isinstance(at, str) or at not in (AUTO, EMBEDDINGS):
            return find_layers(self.model, at)
        # By what it is called with: to look takes a run.
        key, targets = (at, *((x.shape[1:], x.dtype) for x in call.inputs)), call.targets
        own = (*key, *map(repr, (targets.classes, targets.places, targets.index)))
        known, mark = self.cache.layers, model_fingerprint(self.model)
        for one in (own, key):
            if one in known and known[one][0] == mark:
                several = [(number, refer()) for number, refer in known[one][1]]
                return tuple(
                    layer if number is None else OneCall(layer, number)
                    for number, layer in several
                    if layer is not None
                )
        function = call.function(EagerExecutor(self.model))

        def found(*layers: Layer, of: tuple[object, ...]) -> tuple[Layer, ...]:
            while len(known) >= MOST_CACHED:
                known.pop(next(iter(known)))
            # What remembers layers must not hold the model.
            known[of] = (
                mark,
                tuple(
                    (one.call if isinstance(one, OneCall) else None, weakref.ref(module_at(one)))
                    for one in layers
                ),
            )
            return layers

        if at == EMBEDDINGS:
            first = torch.zeros(1, dtype=torch.int64, device=call.device)
            rows = tuple(x[:1] for x in call.inputs)
            return found(*embeddings(self.model, _forward(function, rows, first), rows), of=key)

        def run(number: int, change: Change | None) -> tuple[Any, Tensor]:
            example = torch.tensor([number], device=call.device)
            rows = tuple(x[number : number + 1] for x in call.inputs)
            rows = rows if change is None else tuple(map(change, rows))
            raw = _forward(function, rows, example)()
            return raw, function.read(raw, example)[0]

        # A function may read what the output holds beside.
        fixed = targets.function is None
        cheap = fixed and not targets.predicted and call.batch == 1
        unknown = not any(one[: len(key)] == key for one in known)
        if cheap and unknown and sum(x.nbytes for x in call.inputs) <= SMALL:
            proved = last_spatial_by_gradient(self.model, run)
            if proved is not None:
                return found(proved, of=own)
        layer, general = last_spatial(self.model, run, call.batch)
        return found(layer, of=key) if general and fixed else (layer,)

    def _values(
        self, rows: Inputs, call: Call, layers: tuple[Layer, ...], example: Tensor
    ) -> tuple[Inputs, tuple[int, ...]]:
        """What the layers give for `rows` of the inputs, with the arguments of the examples, and
        how many tensors each layer gives.
        """
        parts, counts, example = list[list[Tensor]](), tuple[int, ...](), example.to(call.device)
        # One by one: before the layers rows may meet, and no later proof would see it.
        for number in range(len(example)):
            own = slice(number, number + 1)
            flat, counts = self._read(layers, call, tuple(one[own] for one in rows), example[own])
            need_batch_first(flat, 1)
            parts.append(flat)
        return tuple(map(torch.cat, zip(*parts, strict=True))), counts

    def _need_batch_first(self, call: Call, layers: tuple[Layer, ...]) -> None:
        """Raises InputError where what the layers give for two rows has another axis first: it may
        be as long as the batch.
        """
        example = torch.zeros(2, dtype=torch.int64, device=call.device)
        try:
            flat, _ = self._read(layers, call, tuple(x[example] for x in call.inputs), example)
        except ModelError:
            # A model of one row at a time.
            return
        need_batch_first(flat, 2)

    def _read(
        self, layers: tuple[Layer, ...], call: Call, rows: Inputs, example: Tensor
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """The tensors that the layers give for some rows, and how many each of them gives."""
        function = call.function(EagerExecutor(self.model))
        several = Read(layers, self.of_input).run(_forward(function, rows, example))
        return [one for parts in several for one in parts], tuple(map(len, several))

    def _baseline(
        self,
        baseline: Any,
        call: Call,
        layers: tuple[Layer, ...],
        recipe: Recipe,
        values: Inputs,
    ) -> Any:
        """A baseline of the inputs as the layers give it; one of the layers as it is."""
        if isinstance(baseline, list) and recipe.baseline in ("one", "fill"):
            several = choices(baseline)
            return [self._baseline(one, call, layers, recipe, values) for one in several]
        if not _of_inputs(baseline, call.inputs):
            return baseline
        if recipe.baseline == "set":
            rows = read_baseline_set(baseline, call.inputs, call.layouts)
        else:
            rows = read_baselines(baseline, call.inputs, layouts=call.layouts)
        function = call.function(EagerExecutor(self.model))
        example = torch.zeros(len(rows[0]), dtype=torch.int64, device="cpu")
        if any(function.follows(key, one) for key, one in call.further()):
            if recipe.baseline == "set":
                raise InputError(
                    "baseline: a set is shared by the examples, and further arguments of the model "
                    "are each example's own: explain one example at a time"
                )
            rows = tuple(one.expand(call.batch, *one.shape[1:]) for one in rows)
            example = torch.arange(call.batch, device="cpu")
        moved = self._values(rows, call, layers, example)[0]
        pairs = zip(moved, values, strict=True)
        if recipe.baseline != "set" and all(bool((own == x).all()) for own, x in pairs):
            self._warn_of_no_change(call, rows, layers)
        return moved

    def _warn_of_no_change(self, call: Call, rows: Inputs, layers: tuple[Layer, ...]) -> None:
        """Warns where a baseline changes the scores past the layers."""
        example = torch.arange(call.batch, device=call.device)
        function = call.function(EagerExecutor(self.model))
        ends = (call.inputs, tuple(one.expand(call.batch, *one.shape[1:]) for one in rows))
        scores, others = (
            function.scores(tuple(x.clone() for x in end), example)[0] for end in ends
        )
        if not torch.equal(scores, others):
            names = ", ".join(names_of(self.model, layers))
            warn(
                f"the baseline changes the score and not what {names} gives, so the "
                "map is zero and tells nothing of the difference: the score depends on the input "
                "past this layer; name the layer that the change goes through"
            )


def need_batch_first(tensors: Sequence[Tensor], rows: int) -> None:
    """Raises InputError where what layers give for so many rows has another axis in front."""
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) != rows:
            raise InputError(
                f"at: the layer's tensor must have the batch on its first axis: got "
                f"{list(tensor.shape)} for {rows} example{'s' * (rows != 1)}; name another layer"
            )


def id_of(layer: Layer) -> tuple[int, int]:
    """Equal for the same layer, or the same of its calls."""
    return id(module_at(layer)), layer.call if isinstance(layer, OneCall) else -1


def _of_inputs(baseline: Any, inputs: Inputs) -> bool:
    """Whether a baseline is one of the model's inputs, and not of what layers give: integers, such
    as token ids, have no zero to compare with, so that numbers are the layer's there.
    """
    if all(x.is_floating_point() for x in inputs):
        return True
    parts = baseline if isinstance(baseline, tuple) else (baseline,)
    return all(isinstance(one, Tensor) and not one.is_floating_point() for one in parts)


def _moved(call: Call, values: Inputs) -> Call:
    """The call with layers' values as inputs; the model's own inputs follow as arguments."""
    inputs, dtypes = read_inputs(values)
    own = [x.to(dtype) for x, dtype in zip(call.inputs, call.dtypes, strict=True)]
    args, count = (*in_layout(own, call.channels_last), *call.args), len(own)

    def moved(keys: frozenset[int | str]) -> frozenset[int | str]:
        return frozenset(key + count if isinstance(key, int) else key for key in keys)

    return replace(
        call,
        inputs=inputs,
        dtypes=dtypes,
        is_tuple=len(values) > 1,
        args=args,
        shared_arguments=moved(call.shared_arguments),
        marked=moved(call.marked) | frozenset(range(count)),
        channels_last=tuple(map(is_channels_last, values)),
    )


def _forward(function: PointFunction, rows: Inputs, example: Tensor) -> Callable[[], Any]:
    """A run of the model on rows of its inputs."""

    def run() -> Any:
        # Copies: a model may work in place.
        points = [one.clone() for one in function.as_model_inputs(rows)]
        with function.failing(FORWARD, example):
            return function.executor(points, *function.rows(example))

    return run
