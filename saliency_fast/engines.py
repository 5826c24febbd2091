"""Engine: a model and a method, ready to explain many inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from saliency_fast import record
from saliency_fast._types import Inputs
from saliency_fast.attribution import Attribution
from saliency_fast.engine.arguments import assigned
from saliency_fast.engine.at import Place
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call, bind
from saliency_fast.engine.causal import following
from saliency_fast.engine.choose import prepare
from saliency_fast.engine.differentiable import check_differentiable, differentiable
from saliency_fast.engine.features import Features, read_features
from saliency_fast.engine.independence import Known
from saliency_fast.engine.job import Job
from saliency_fast.engine.launch import Moment
from saliency_fast.engine.layouts import layouts_of
from saliency_fast.engine.outcome import Outcome, need_finite
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.prepare import Limits
from saliency_fast.engine.recipe import Method, Recipe
from saliency_fast.engine.region import Region
from saliency_fast.engine.service import Request, Service, Statistics
from saliency_fast.engine.traced import wait_for
from saliency_fast.engine.zeros import still_unused, unused, warn_of_zeros
from saliency_fast.errors import (
    InputError,
    InputTypeError,
    ModelCallError,
    SaliencyError,
    UnseenInputError,
)
from saliency_fast.graph.fingerprint import same_model, unchanging
from saliency_fast.graph.passes.half import AUTO, PRECISIONS
from saliency_fast.methods import read_method
from saliency_fast.model.failures import diagnosed
from saliency_fast.model.layers import At, names_of
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.preserve import preserve_model_state, uncaptured, uncompiled
from saliency_fast.model.targets import Target, with_padding
from saliency_fast.result import attribution, resident_before, usage_of
from saliency_fast.together import Together, Whole, in_rows, layout_together, whole_call


class Engine:
    """A model and a method, ready to explain many inputs from many threads.

    model: any callable from input tensors to an output. method: a name or a method. precision: of
    the model's convolutions and matrix products: "float32" (float64 inputs stay float64),
    "bfloat16" and, on GPUs, "tf32" or "float16"; what it costs a map is measured on some of its
    points and part of `Attribution.error`. "auto" is the fastest that costs no more than
    `tolerance`, relative L2: .02, or half of the method's own tolerance, unless given. at: layers
    to explain instead of the inputs, by name or themselves; "embeddings" are the tables that make
    vectors of ids, "auto" the last spatial one. Values are like what they give or, with
    `layer_input`, take; baselines are still the inputs' (of integers: token ids, or the layer's).
    memory_budget: bytes or text such as "8GiB" over what is in use, 80 % of what is free unless
    given. points_per_launch: an upper bound, for those who know better than the plan. lean: whether
    points keep only what their gradients need from forward to backward, with the same maps to
    rounding. progress: shows a bar. hashes: whether results carry SHA-256 of inputs and weights,
    which reads both once. graphs: whether launches are recorded and replayed on GPUs. compile:
    whether `torch.compile` makes the model's kernels, instead of the lean way; "auto" does where
    measurements say that it pays, which is nowhere so far (docs/precision.md). layout: of the
    inputs, at layers of what these give, unless the call says it; see `explain`. waiting: how many
    requests `submit` takes in before it blocks. latency: seconds that the first of them waits,
    at most, for others to share its launch. rows: "alone" explains every row of the inputs as the
    model scores it alone; "together" takes all rows for one input, such as the nodes of a graph,
    and explains the sum of their scores: values are like the inputs, `delta` and `error` are those
    of the whole. create_graph: whether values are on autograd's graph, so that a loss may depend on
    a map: they can be differentiated by the model's parameters, by inputs that require gradients
    and by further arguments. For sums of gradients alone (gradients, paths, noise), without a lean
    way, in autograd's memory, and in evaluation mode.

    The model is explained in evaluation mode and left as it was, whatever happens.
    """

    zeros_of_unused = True
    """Whether inputs that no score depends on have zeros, and a warning, instead of an error."""

    def __init__(
        self,
        model: Callable[..., Any],
        method: Method | str = "integrated_gradients",
        *,
        precision: str = "float32",
        tolerance: float | None = None,
        at: At | None = None,
        layer_input: bool = False,
        memory_budget: int | str | None = None,
        points_per_launch: int | None = None,
        lean: bool = True,
        progress: bool = False,
        hashes: bool = True,
        graphs: bool = True,
        compile: bool | str = "auto",
        layout: LayoutLike = None,
        waiting: int = 1024,
        latency: float = 0.002,
        rows: str = "alone",
        create_graph: bool = False,
    ) -> None:
        if not callable(model):
            raise InputTypeError(f"model must be callable: got {type(model).__name__}")
        if precision not in (*PRECISIONS, AUTO):
            names = ", ".join((*PRECISIONS, AUTO))
            raise InputError(f"precision must be one of {names}: got {precision!r}")
        if isinstance(waiting, bool) or not isinstance(waiting, int) or waiting < 1:
            raise InputError(f"waiting must be a whole number, 1 or more: got {waiting!r}")
        if not 0.0 <= latency < math.inf:
            raise InputError(f"latency must be seconds, 0 or more: got {latency!r}")
        if tolerance is not None and not 0.0 < tolerance < math.inf:
            raise InputError(f"tolerance must be a positive number: got {tolerance!r}")
        if compile not in (True, False, "auto"):
            raise InputError(f"compile must be True, False or 'auto': got {compile!r}")
        self.model, self.method = model, read_method(method)
        self.compile = compile is True
        if rows not in ("alone", "together"):
            raise InputError(f"rows must be 'alone' or 'together': got {rows!r}")
        if rows == "together" and (at is not None or self.method.recipe().layers is not None):
            raise InputError(
                "rows='together' explains the inputs: got a method or `at` that is about layers; "
                "explain a function of x[None] around the model instead"
            )
        # A wrapper: the user's model stays as it is.
        self._called: Callable[..., Any] = torch.compile(model) if self.compile else model
        self.precision, self.tolerance, self.lean = precision, tolerance, lean
        self.progress, self.hashes, self.graphs = progress, hashes, graphs
        self.layout = layout
        self.limits = Limits(memory_budget, points_per_launch)
        self.rows, self._wholes = rows, dict[int, Engine]()
        self._recipe = self.method.recipe()
        self.create_graph = create_graph
        # Metrics, which explain many inputs and models, judge maps of zeros themselves.
        self.tells_zeros = True
        if create_graph:
            check_differentiable(self.method, self._recipe, at=at, precision=precision)
            if rows == "together":
                raise InputError("create_graph=True is for rows='alone': got rows='together'")
            # Neither leaves a graph behind.
            self.lean = self.graphs = False
        self._place = Place(self._called, at, layer_input, _probes_of(self._called))
        self._service: Service[Attribution] = Service(
            partial(preserve_model_state, model, draws=False),
            capacity=waiting,
            latency=latency,
            memory_budget=memory_budget,
        )

    @uncaptured
    def plan(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
        features: Features = None,
        layout: LayoutLike = None,
    ) -> Plan:
        """How a call would run, with the memory and the time that it would take.

        Takes a few points' gradients to learn that, once for all calls with inputs of one shape.
        """
        if self.rows == "together":
            about = (inputs, target, baseline, forward_args, forward_kwargs, features)
            laid = layout_together(self.layout if layout is None else layout)
            with self._whole(*about, region=region) as (engine, whole, given):
                return engine.plan(*given, layout=laid, **whole.further)
        call = self._bound(inputs, target, forward_args, forward_kwargs, features, layout)
        with preserve_model_state(self.model, call.device), self._diagnosing(call):
            job, _ = self._prepare(call, baseline, region)
            job.time()
            job.tell_graphs()
            return replace(job.plan, layout=job.call.layouts.told)

    @uncaptured
    def __call__(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
        features: Features = None,
        layout: LayoutLike = None,
    ) -> Attribution:
        """Explains `inputs`; see `explain` for the arguments."""
        if self.rows == "together":
            about = (inputs, target, baseline, forward_args, forward_kwargs, features)
            laid = layout_together(self.layout if layout is None else layout)
            with self._whole(*about, region=region) as (engine, whole, given):
                found = engine(*given, layout=laid, **whole.further)
                return self._in_rows(found, whole, baseline)
        started = time.perf_counter()
        call = self._bound(inputs, target, forward_args, forward_kwargs, features, layout)
        resident = resident_before(call)
        with preserve_model_state(self.model, call.device) as training, self._diagnosing(call):
            job, at = self._prepare(call, baseline, region)
            if self.create_graph:
                outcome = self._differentiable(job, inputs)
            else:
                for moment in self._shown(job):
                    last = moment
                outcome = last.outcome()
            self._look_at(job, outcome)
            usage = usage_of(job.plan, resident, time.perf_counter() - started)
        # Of the weights as they are outside of the call, whatever the model does to them inside.
        facts = usage | self._hashes(call)
        return self._attribution(job, outcome, baseline, training, facts, at)

    def stream(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
        features: Features = None,
        layout: LayoutLike = None,
    ) -> Iterator[Attribution]:
        """Yields the map after every launch, each with its estimated error; the last is the answer.

        Points are visited so that any beginning of them is spread over the path or the noise.
        """
        self._need_call("stream")
        if self.rows == "together":
            about = (inputs, target, baseline, forward_args, forward_kwargs, features)
            laid = layout_together(self.layout if layout is None else layout)
            with self._whole(*about, region=region) as (engine, whole, given):
                partials = engine.stream(*given, layout=laid, **whole.further)
            while True:
                with preserve_model_state(self.model, whole.rows.device):
                    found = next(partials, None)
                    if found is None:
                        return
                    shown = self._in_rows(found, whole, baseline)
                yield shown
        started = time.perf_counter()
        call = self._bound(inputs, target, forward_args, forward_kwargs, features, layout)
        resident = resident_before(call)
        with preserve_model_state(self.model, call.device), self._diagnosing(call):
            job, at = self._prepare(call, baseline, region)
        hashes = self._hashes(call)
        moments = job.moments()
        while True:
            # The guard is entered anew for each launch: nothing is held while the caller works.
            with preserve_model_state(self.model, call.device) as training, self._diagnosing(call):
                moment = next(moments, None)
                if moment is None:
                    return
                if not moment.maps:
                    continue
                outcome = moment.outcome()
                if moment.done == moment.of:
                    self._look_at(job, outcome)
                usage = usage_of(job.plan, resident, time.perf_counter() - started)
                facts = usage | hashes
                partial = self._attribution(job, outcome, baseline, training, facts, at)
            yield partial

    def submit(
        self,
        inputs: Tensor | Inputs,
        target: Target = None,
        baseline: Baseline = None,
        *,
        method: Method | str | None = None,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        region: Region = None,
        features: Features = None,
        layout: LayoutLike = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> Future[Attribution]:
        """Hands a call in, from any thread, and returns at once: its future has the `Attribution`.

        Points of all that is handed in share launches where models take them alike, whatever their
        targets, baselines, seeds, steps and tolerances; every answer is the one that the call alone
        gives, to rounding. method: another one than the engine's. A future may be cancelled until
        it is done. block: whether to wait, for `timeout` seconds at most, where too many wait.

        Raises BusyError where there is no place, ClosedError after `close`, and what is wrong with
        the arguments; what goes wrong later is the future's.
        """
        self._need_call("submit")
        if self.rows == "together":
            raise InputError(
                "submit packs rows of several requests: got an engine with rows='together'; call "
                "the engine itself"
            )
        started = time.perf_counter()
        chosen = self.method if method is None else read_method(method)
        recipe = self._recipe if method is None else chosen.recipe()
        bound = inputs, target, forward_args, forward_kwargs, features, layout
        call = self._bound(*bound, recipe)
        training = isinstance(self.model, nn.Module) and getattr(self.model, "training", False)
        ready, at = _ready(call.device), list[str]()

        def job() -> Job:
            ready()
            job, names = self._prepare(call, baseline, region, chosen, recipe, alone=False)
            at.extend(names or ())
            # Recorded launches are one call's alone.
            job.graphs = False
            return job

        def finish(job: Job, last: Moment) -> Attribution:
            outcome = last.outcome()
            self._look_at(job, outcome)
            # Others use memory at the same time, so that its peak tells nothing.
            usage = usage_of(job.plan, None, time.perf_counter() - started)
            facts = usage | self._hashes(call)
            found = self._attribution(job, outcome, baseline, training, facts, at or None)
            wait_for(call.device)
            return found

        def failed(error: BaseException) -> BaseException:
            return self._diagnosed(call, error) if isinstance(error, ModelCallError) else error

        request = Request(call.device, job, finish, failed)
        return self._service.submit(request, block=block, timeout=timeout)

    def explain_many(
        self, requests: Iterable[Asked], *, return_exceptions: bool = False
    ) -> list[Attribution | BaseException]:
        """Explains many calls at once, in launches that they share; answers in their order.

        requests: inputs alone, or mappings of the arguments of `submit` by name. The first error is
        raised, and what has not begun is cancelled; with `return_exceptions` errors stand in the
        place of answers, and the others are finished.
        """
        futures: list[Future[Attribution]] = []
        try:
            futures.extend(self._submitted(one, return_exceptions) for one in requests)
            if return_exceptions:
                return [future.exception() or future.result() for future in futures]
            return [future.result() for future in futures]
        finally:
            # Also where Ctrl-C came while it waited.
            for future in futures:
                future.cancel()

    def _submitted(self, asked: Asked, keep_error: bool) -> Future[Attribution]:
        try:
            return self.submit(**asked) if isinstance(asked, Mapping) else self.submit(asked)
        except (SaliencyError, TypeError) as error:
            if not keep_error:
                raise
            failed: Future[Attribution] = Future()
            failed.set_exception(error)
            return failed

    @property
    def statistics(self) -> Statistics:
        """What `submit` and `explain_many` have done so far."""
        return self._service.statistics

    def close(self, *, cancel: bool = False) -> None:
        """Finishes what was handed in, or cancels it, and takes no more requests; calls alone still
        run.
        """
        self._service.close(cancel=cancel)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _look_at(self, job: Job, outcome: Outcome) -> None:
        """Raises for a whole map that is not finite, and warns of one that is zero."""
        need_finite(outcome, job.plan.precision)
        if self.tells_zeros:
            warn_of_zeros(outcome, job.call, job.recipe, job.baselines)

    @contextmanager
    def _diagnosing(self, call: Call) -> Iterator[None]:
        """Finds the cure of what the model raises inside."""
        try:
            yield
        except ModelCallError as error:
            raise self._diagnosed(call, error) from error.__cause__

    def _diagnosed(self, call: Call, error: ModelCallError) -> ModelCallError:
        inputs = [x.to(dtype) for x, dtype in zip(call.inputs, call.dtypes, strict=True)]
        with uncompiled():
            return diagnosed(error, self.model, inputs, call.args, call.kwargs)

    @contextmanager
    def _whole(
        self,
        inputs: Tensor | Inputs,
        target: Target,
        baseline: Baseline,
        args: Any,
        kwargs: Mapping[str, Any] | None,
        features: Features,
        *,
        region: Region,
    ) -> Iterator[tuple[Engine, Whole, tuple[Any, ...]]]:
        """(engine, call, its arguments) of a call whose rows are one example."""
        if region is not None:
            raise InputError("region is of pictures and volumes, each an example: leave it out")
        count = len(inputs) if isinstance(inputs, (tuple, list)) else 1
        if count not in self._wholes:
            self._wholes[count] = Engine(
                Together(self._called, count),
                self.method,
                precision=self.precision,
                tolerance=self.tolerance,
                memory_budget=self.limits.memory_budget,
                points_per_launch=self.limits.points_per_launch,
                lean=self.lean,
                progress=self.progress,
                hashes=False,
                graphs=False,
            )
        first = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        with preserve_model_state(self.model, device):
            whole = whole_call(self._called, inputs, target, baseline, args, kwargs, features)
            yield self._wholes[count], whole, (whole.inputs, whole.target, whole.baseline)

    def _in_rows(self, found: Attribution, whole: Whole, baseline: Baseline) -> Attribution:
        rows = in_rows(found, whole, self._called, baseline, self._recipe.baseline)
        return replace(rows, provenance=replace(rows.provenance, **self._hashes(whole.rows)))

    def _prepare(
        self,
        call: Call,
        baseline: Baseline,
        region: Region,
        method: Method | None = None,
        recipe: Recipe | None = None,
        *,
        alone: bool = True,
    ) -> tuple[Job, list[str] | None]:
        """A job, and the names of the layers that it is about."""
        # Recordings stand for the model as calls find it; to look takes time where there are none.
        known = [probe for one in list(self._place.knowns.values()) for probe in list(one.values())]
        looked = not known or any(probe.mark is not None for probe in known)
        with unchanging():
            if looked:
                same_model(self._called)
            return self._prepared(call, baseline, region, method, recipe, alone)

    def _prepared(
        self,
        call: Call,
        baseline: Baseline,
        region: Region,
        method: Method | None,
        recipe: Recipe | None,
        alone: bool,
    ) -> tuple[Job, list[str] | None]:
        recipe, method = recipe or self._recipe, method or self.method
        call = assigned(self._called, following(self.model, call), self._place.known)
        known_unused = self._place.known.unused
        if known_unused:
            call = replace(call, unused=still_unused(self._called, call, known_unused))
        planned = partial(self._planned, baseline, region, method, recipe, alone=alone)
        try:
            return planned(call)
        except UnseenInputError as error:
            # Several may be unused: the same again until all are known.
            number = error.number
            seen = self._place.at is not None or number in call.unused
            if seen or not self.zeros_of_unused or not unused(self._called, call, number):
                raise
        known_unused.add(number)
        return self._prepare(call, baseline, region, method, recipe, alone=alone)

    def _planned(
        self,
        baseline: Baseline,
        region: Region,
        method: Method,
        recipe: Recipe,
        call: Call,
        *,
        alone: bool,
    ) -> tuple[Job, list[str] | None]:
        model, call, start, known, layers = self._place.taken(call, recipe, baseline)
        if self._place.at is not None:
            found = read_features(call.features, call.inputs, call.layouts)
            call = replace(call, features=found)
        if layers and region is not None:
            raise InputError("region is of the inputs, and this map is a layer's: leave it out")
        job = prepare(
            *(model, method, recipe, call, start, region, self.limits, known),
            lean=self.lean and not self.compile,
            precision=self.precision,
            tolerance=self.tolerance,
            alone=alone,
        )
        job.graphs = self.graphs
        return job, names_of(self.model, layers) if layers else None

    def _bound(
        self,
        inputs: Tensor | Inputs,
        target: Target,
        args: Any,
        kwargs: Mapping[str, Any] | None,
        features: Features,
        layout: LayoutLike,
        recipe: Recipe | None = None,
    ) -> Call:
        recipe = recipe or self._recipe
        if features is not None and not recipe.features:
            raise InputError(
                "features: this method does not ask which elements go together: leave them out, or "
                "use one that takes features away, such as FeatureAblation or KernelShap"
            )
        integers = recipe.layers is None and (not recipe.gradients or self._place.at is not None)
        missing = recipe.scores_alone and self._place.at is None
        call = bind(inputs, target, args, kwargs, integers=integers, missing=missing)
        about = (self.model, call.inputs, call.args, call.kwargs)
        call = replace(call, targets=with_padding(call.targets, *about))
        layout = self.layout if layout is None else layout
        # At layers features and layout are of what these give, which is not known yet.
        inside = self._place.at is not None and recipe.layers is None
        layouts = layouts_of(self.model, call, None if inside else layout)
        call = replace(call, layout=layout, layouts=layouts)
        if self._place.at is None:
            features = read_features(features, call.inputs, layouts)
        return replace(call, features=features)

    def _differentiable(self, job: Job, inputs: Tensor | Inputs) -> Outcome:
        if job.part is not None:
            raise InputError("create_graph=True is for whole maps: leave region= out")
        return differentiable(job, (inputs,) if isinstance(inputs, Tensor) else tuple(inputs))

    def _need_call(self, name: str) -> None:
        if self.create_graph:
            raise InputError(f"create_graph=True is for engine(inputs): got engine.{name}")

    def _attribution(
        self,
        job: Job,
        outcome: Outcome,
        baseline: Baseline,
        training: bool,
        facts: dict[str, Any],
        at: list[str] | None,
    ) -> Attribution:
        return attribution(
            *(job, outcome, baseline),
            training=training,
            lean=self.lean,
            facts=facts,
            at=at,
            layer_input=self._place.of_input,
        )

    def _hashes(self, call: Call) -> dict[str, Any]:
        wanted = self.hashes
        return {
            "input_sha256": [record.tensor_sha256(x) for x in call.inputs] if wanted else None,
            "weights_sha256": record.weights_sha256(self.model) if wanted else None,
        }

    def _shown(self, job: Job) -> Iterator[Moment]:
        """The moments, with a bar beside them where one is wanted."""
        if not self.progress:
            yield from job.moments()
            return
        total = job.plan.points * len(job.baselines)
        with tqdm(total=total, desc=self.method.name, unit="point") as bar:
            for moment in job.moments():
                bar.update(moment.done - bar.n)
                yield moment


Asked = Tensor | Inputs | Mapping[str, Any]
"""A request of `explain_many`."""


def _ready(device: torch.device) -> Callable[[], None]:
    """Waits, on another thread's stream, for what this thread has asked of a GPU so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return lambda: torch.cuda.current_stream(device).wait_event(event)


_PROBED: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Known]] = WeakKeyDictionary()


def _probes_of(model: Callable[..., Any]) -> dict[tuple[object, ...], Known]:
    """What points of a model took, by where they are; engines of one module share it."""
    return _PROBED.setdefault(model, {}) if isinstance(model, nn.Module) else {}
