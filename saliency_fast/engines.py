"""Engine: a model and a method, ready to explain many inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from saliency_fast import record
from saliency_fast._types import Inputs
from saliency_fast.attribution import Attribution, attribution, resident_before, usage_of
from saliency_fast.engine import config as configs
from saliency_fast.engine.accumulate import Outcome, need_finite
from saliency_fast.engine.arguments import assigned
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import Call, Region, bind, layouts_of, with_next_token
from saliency_fast.engine.calibrate import CalibrationCache
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.features import Features, read_features
from saliency_fast.engine.job import Job, Progress
from saliency_fast.engine.launch import lend, mark
from saliency_fast.engine.layers import LayerLocation
from saliency_fast.engine.loop import run_alone
from saliency_fast.engine.memory import give_back
from saliency_fast.engine.plan import Limits, Plan
from saliency_fast.engine.planner import prepare
from saliency_fast.engine.recipe import Method, Recipe, WeightedSum, with_fixed_nodes
from saliency_fast.engine.trials import shown
from saliency_fast.engine.zeros import still_unused, unused, warn_of_zeros
from saliency_fast.errors import (
    InputError,
    InputTypeError,
    ModelCallError,
    SaliencyError,
    UnseenInputError,
)
from saliency_fast.graph.fingerprint import model_fingerprint, unchanging
from saliency_fast.graph.passes.half import AUTO, FLOAT32, PRECISIONS
from saliency_fast.methods import read_method
from saliency_fast.model.failures import diagnosed
from saliency_fast.model.layers import At, names_of
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.preserve import preserve_model_state, uncaptured, uncompiled
from saliency_fast.model.targets import Target, with_padding
from saliency_fast.repeated import Repeat
from saliency_fast.together import Arguments, WholeInputCall, WholeInputModel, as_rows, whole_call

if TYPE_CHECKING:
    # Imported when they are first used: most programs need none of them.
    from saliency_fast.engine.service import Request, Service, Statistics


class Engine:
    """A model and a method, ready to explain many inputs from many threads.

    The model is explained in evaluation mode and left as it was, whatever happens.

    Args:
        model: Any callable from input tensors to an output.
        method: A method, or its name.
        precision: Of the model's convolutions and matrix products: "float32" (float64 inputs stay
            float64), "bfloat16" and, on GPUs, "tf32" or "float16"; what it costs a map is measured
            on some of its points and part of `Attribution.error`. "auto" is the fastest that costs
            no more than `tolerance`. None is "auto" on GPUs, but for few points and methods without
            a sum of gradients, and "float32" elsewhere.
        tolerance: Relative L2 that precision "auto" may cost; .02, or half of the method's own.
        at: Layers to explain instead of the inputs, by name or themselves; "embeddings" are the
            tables that make vectors of ids, "auto" the last spatial layer. Values are like what
            they give or, with `layer_input`, take; baselines are still the inputs' (of integers:
            token ids, or the layer's).
        layer_input: Whether `at` means what the layers take.
        memory_budget: Bytes, or text such as "8GiB", over what is in use; 80 % of what is free.
        points_per_launch: An upper bound, for those who know better than the plan.
        lean: Whether points keep only what their gradients need; maps are the same to rounding.
        progress: Whether to show a bar.
        hashes: Whether results carry SHA-256 of inputs and weights, which reads both once.
        graphs: Whether launches are captured and replayed on GPUs.
        compile: Whether `torch.compile` makes the model's kernels, instead of `lean`; "auto" does
            where measurements say that it pays, which is nowhere so far (docs/precision.md).
        layout: Of the inputs, at layers of what these give, unless the call says it; see `explain`.
        waiting: Requests that `submit` takes in before it blocks.
        latency: Seconds that the first of them waits, at most, for others to share its launch.
        rows: "alone" explains every row of the inputs as the model scores it alone; "together"
            takes all rows for one input, such as the nodes of a graph, and explains the sum of
            their scores: values are like the inputs, `delta` and `error` are those of the whole.
        create_graph: Whether values are on autograd's graph, so that a loss may depend on a map:
            they can be differentiated by the model's parameters, by inputs that require gradients
            and by further arguments. For sums of gradients alone (gradients, paths, noise),
            without `lean`, in autograd's memory, and in evaluation mode.
        config: Thresholds of the engine; `saliency_fast.engine.config.DEFAULT` unless given.

    Raises:
        InputError: An argument has a value that is not allowed.
        InputTypeError: An argument has another type than expected.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> engine = sf.Engine(model, "integrated_gradients")
        >>> engine(torch.tensor([[1.0, 2.0]]), target=0).values.round(decimals=3)
        tensor([[3., 6.]])
    """

    zeros_of_unused = True
    """Whether inputs that no score depends on have zeros, and a warning, instead of an error."""
    warns_of_zeros = True
    """Whether maps of zeros bring a warning."""

    def __init__(
        self,
        model: Callable[..., Any],
        method: Method | str = "integrated_gradients",
        *,
        precision: str | None = None,
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
        config: EngineConfig | None = None,
    ) -> None:
        _check_options(model, precision, waiting, latency, tolerance, compile, rows)
        self.model, self.compile = model, compile is True
        if isinstance(method, str):
            self.method, self._recipe = _named(method)
        else:
            self.method = read_method(method)
            self._recipe = self.method.recipe()
        if rows == "together" and (at is not None or self._recipe.layers is not None):
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
        self.create_graph = create_graph
        self.config = configs.DEFAULT if config is None else config
        if create_graph:
            from saliency_fast.engine.differentiable import check_differentiable

            self.method = with_fixed_nodes(self.method)
            self._recipe = self.method.recipe()
            self.precision = precision or FLOAT32.name
            check_differentiable(self.method, self._recipe, at=at, precision=self.precision)
            if rows == "together":
                raise InputError("create_graph=True is for rows='alone': got rows='together'")
            # Neither leaves a graph behind.
            self.lean = self.graphs = False
        self._location = LayerLocation(self._called, at, layer_input, self._caches())
        self._repeats = self._repeated_options()
        self._waiting, self._latency = waiting, latency

    def _repeated_options(self) -> tuple[object, ...]:
        """What tells engines apart whose calls a `Repeat` may serve; () where it serves none."""
        location, limits = self._location, self.limits
        usual = location.at is None and not (location.of_input or self.progress or self.compile)
        usual = usual and not self.create_graph and self.rows == "alone" and self.layout is None
        sums = isinstance(self._recipe, WeightedSum) and self._recipe.at_input
        if not (usual and sums and self.precision in (None, FLOAT32.name)) or limits.memory_budget:
            return ()
        return self.method, limits.points_per_launch, self.lean, self.graphs, self.config

    @cached_property
    def _service(self) -> Service[Attribution]:
        from saliency_fast.engine.service import Service

        return Service(
            partial(preserve_model_state, self.model, draws=False),
            capacity=self._waiting,
            latency=self._latency,
            memory_budget=self.limits.memory_budget,
        )

    def _caches(self) -> dict[tuple[object, ...], CalibrationCache]:
        """Calibrations, which engines of one module share."""
        model = self._called
        return _CALIBRATED.setdefault(model, {}) if isinstance(model, nn.Module) else {}

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

        Args: those of a call; see `explain`.

        Returns:
            The plan, a value that prints.

        Raises:
            BudgetError: One point alone does not fit the memory budget.

        Example:
            >>> import torch, saliency_fast as sf
            >>> engine = sf.Engine(torch.nn.Linear(4, 3), sf.SmoothGrad(samples=8))
            >>> engine.plan(torch.ones(2, 4), target=1).points
            16
        """
        about = (forward_args, forward_kwargs, region, features, layout)
        given = Arguments(inputs, target, baseline, *about)
        if self.rows == "together":
            with self._whole(given) as (engine, whole):
                return engine.plan(**whole.arguments)
        call = self._bound(given)
        with preserve_model_state(self.model, call.device), self._diagnosing(call):
            job, _ = self._prepare(call, given)
            return shown(job, self.graphs, job.call.layouts.described)

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
        """Explains `inputs`.

        Args: those of `explain`, but for the engine's own.

        Returns:
            The attribution; its values are like the inputs.

        Raises:
            InputError, InputTypeError: What was passed cannot be explained.
            ModelError: The model raised, or gave NaN; its exception is the `__cause__`.
            BudgetError: One point alone does not fit the memory budget.

        Example:
            >>> import torch, saliency_fast as sf
            >>> engine = sf.Engine(lambda x: x**2, "gradient")
            >>> engine(torch.tensor([[3.0]]), target=0).values
            tensor([[6.]])
        """
        about = (forward_args, forward_kwargs, region, features, layout)
        cache, kind = self._location.cache, self._kind(inputs, baseline, about)
        if (repeat := cache.repeats.get(kind)) is not None and not cache.unused:
            again = repeat.run(self.model, inputs, target, cache, self._hashes)
            if again is not None:
                result: Attribution = again
                return result
        given = Arguments(inputs, target, baseline, *about)
        if self.rows == "together":
            with self._whole(given) as (engine, whole):
                return self._as_rows(engine(**whole.arguments), whole, baseline)
        started, call = time.perf_counter(), self._bound(given)
        resident = resident_before(call)
        with preserve_model_state(self.model, call.device) as training, self._diagnosing(call):
            job, at = self._prepare(call, given)
            if self.create_graph:
                outcome = self._differentiable(job, inputs)
            else:
                for progress in self._progress(job):
                    last = progress
                job, outcome = last.job, last.outcome()
            self._check(job, outcome)
            usage = usage_of(job.plan, resident, time.perf_counter() - started)
        # Of the weights as they are outside of the call, whatever the model does to them inside.
        facts = usage | self._hashes(call)
        found = self._attribution(job, outcome, baseline, training, facts, at)
        if kind is not None and (made := Repeat.of(job, found.layouts)) is not None:
            while len(cache.repeats) >= self.config.most_known:
                cache.repeats.pop(next(iter(cache.repeats)))
            cache.repeats[kind] = made
        return found

    def _kind(
        self, inputs: Tensor | Inputs, baseline: Baseline, about: tuple[object, ...]
    ) -> tuple[object, ...] | None:
        """Equal for calls that one `Repeat` may serve; None where none does."""
        if not isinstance(inputs, Tensor) or type(inputs) is not Tensor or baseline is not None:
            return None
        if not self._repeats or any(map(_given, about)):
            return None
        # Inference tensors are copied first.
        if inputs.is_inference() or torch.is_inference_mode_enabled():
            return None
        return *self._repeats, inputs.shape, inputs.stride(), inputs.dtype, inputs.device

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

        Args: those of a call; see `explain`.

        Yields:
            Attributions, the last of which is that of a call.

        Example:
            >>> import torch, saliency_fast as sf
            >>> engine = sf.Engine(torch.nn.Linear(4, 3), points_per_launch=25)
            >>> [int(one.points) for one in engine.stream(torch.ones(1, 4), target=1)]
            [20, 32, 50]
        """
        self._need_call("stream")
        about = (forward_args, forward_kwargs, region, features, layout)
        given = Arguments(inputs, target, baseline, *about)
        if self.rows == "together":
            with self._whole(given) as (engine, whole):
                partials = engine.stream(**whole.arguments)
            while True:
                with preserve_model_state(self.model, whole.rows.device):
                    one = next(partials, None)
                    if one is None:
                        return
                    shown_so_far = self._as_rows(one, whole, baseline)
                yield shown_so_far
        started, call = time.perf_counter(), self._bound(given)
        resident = resident_before(call)
        with preserve_model_state(self.model, call.device), self._diagnosing(call):
            job, at = self._prepare(call, given)
        hashes, steps = self._hashes(call), run_alone(job)
        while True:
            # The guard is entered anew for each launch: nothing is held while the caller works.
            with preserve_model_state(self.model, call.device) as training, self._diagnosing(call):
                progress = next(steps, None)
                if progress is None:
                    return
                if not progress.maps:
                    continue
                outcome = progress.outcome()
                if progress.done == progress.of:
                    self._check(progress.job, outcome)
                usage = usage_of(progress.job.plan, resident, time.perf_counter() - started)
                facts = usage | hashes
                so_far = self._attribution(progress.job, outcome, baseline, training, facts, at)
            yield so_far

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
        """Hands a call in, from any thread, and returns at once.

        Points of all requests share launches where the model takes them alike, whatever their
        targets, baselines, seeds, steps and tolerances; every result is the one that the call alone
        gives, to rounding. What goes wrong after this call is the future's.

        Args: those of a call, see `explain`, and
            method: Another one than the engine's.
            block: Whether to wait, for `timeout` seconds at most, where too many wait.

        Returns:
            A future of the attribution, which may be cancelled until it is done.

        Raises:
            BusyError: Too many requests wait.
            ClosedError: After `close`.

        Example:
            >>> import torch, saliency_fast as sf
            >>> with sf.Engine(torch.nn.Linear(4, 3)) as engine:
            ...     futures = [engine.submit(torch.ones(1, 4), target) for target in range(3)]
            ...     [list(one.result().values.shape) for one in futures]
            [[1, 4], [1, 4], [1, 4]]
        """
        self._need_call("submit")
        if self.rows == "together":
            raise InputError(
                "submit packs rows of several requests: got an engine with rows='together'; call "
                "the engine itself"
            )
        about = (forward_args, forward_kwargs, region, features, layout)
        given = Arguments(inputs, target, baseline, *about)
        chosen = self.method if method is None else read_method(method)
        recipe = self._recipe if method is None else chosen.recipe()
        request = self._request(self._bound(given, recipe), given, chosen, recipe)
        return self._service.submit(request, block=block, timeout=timeout)

    def _request(
        self, call: Call, given: Arguments, method: Method, recipe: Recipe
    ) -> Request[Attribution]:
        """A call for the service."""
        from saliency_fast.engine.service import Request

        started, at = time.perf_counter(), list[str]()
        # The service has a stream of its own.
        given_at = mark(call.device)
        caller = None if given_at is None else torch.cuda.current_stream(call.device)
        training = isinstance(self.model, nn.Module) and getattr(self.model, "training", False)

        def prepare_job() -> Job:
            if given_at is not None:
                torch.cuda.current_stream(call.device).wait_event(given_at)
            job, names = self._prepare(call, given, method, recipe, alone=False)
            at.extend(names or ())
            return job

        def finish(last: Progress) -> Attribution:
            job, outcome = last.job, last.outcome()
            self._check(job, outcome)
            # Others use memory at the same time, so that its peak tells nothing.
            usage = usage_of(job.plan, None, time.perf_counter() - started)
            facts = usage | self._hashes(call)
            about = (job, outcome, given.baseline, training, facts, at or None)
            result = self._attribution(*about)
            lend(vars(result), caller)
            return result

        def failed(error: BaseException) -> BaseException:
            return self._diagnosed(call, error) if isinstance(error, ModelCallError) else error

        return Request(call.device, prepare_job, finish, failed)

    def explain_many(
        self, requests: Iterable[RequestLike], *, return_exceptions: bool = False
    ) -> list[Attribution | BaseException]:
        """Explains many calls at once, in launches that they share; results in their order.

        Args:
            requests: Inputs alone, or mappings of the arguments of `submit` by name.
            return_exceptions: Whether errors stand in the place of results, and all others are
                finished; else the first error is raised, and what has not begun is cancelled.

        Returns:
            One attribution per request.

        Example:
            >>> import torch, saliency_fast as sf
            >>> with sf.Engine(torch.nn.Linear(4, 3), "gradient") as engine:
            ...     found = engine.explain_many([{"inputs": torch.ones(1, 4), "target": 2}])
            >>> len(found)
            1
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

    def _submitted(self, request: RequestLike, keep_error: bool) -> Future[Attribution]:
        try:
            return self.submit(**request) if isinstance(request, Mapping) else self.submit(request)
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
        """Finishes what was handed in, or cancels it, takes no more requests, and gives back the
        memory that stays after calls (`Plan.resident`): what was found out about the model, also
        by its other engines, and what malloc keeps. Calls alone still run, and prepare again.
        """
        self._service.close(cancel=cancel)
        wholes = list(self._wholes.values())
        self._wholes.clear()
        for one in wholes:
            one.close()
        self._location.forget()
        give_back()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _check(self, job: Job, outcome: Outcome) -> None:
        """Raises for a whole map that is not finite, and warns of one that is zero."""
        need_finite(outcome, job.plan.precision)
        if self.warns_of_zeros:
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
    def _whole(self, given: Arguments) -> Iterator[tuple[Engine, WholeInputCall]]:
        """(engine, call) of a call whose rows are one example."""
        if given.region is not None:
            raise InputError("region is of pictures and volumes, each an example: leave it out")
        inputs = given.inputs
        count = len(inputs) if isinstance(inputs, (tuple, list)) else 1
        if count not in self._wholes:
            model = WholeInputModel(self._called, count)
            self._wholes[count] = engine_like(self, model, graphs=False, layout=None)
        first = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        with preserve_model_state(self.model, device):
            yield self._wholes[count], whole_call(self._called, given, self.layout)

    def _as_rows(
        self, found: Attribution, whole: WholeInputCall, baseline: Baseline
    ) -> Attribution:
        rows = as_rows(found, whole, self._called, baseline, self._recipe.baseline)
        return replace(rows, provenance=replace(rows.provenance, **self._hashes(whole.rows)))

    def _prepare(
        self,
        call: Call,
        given: Arguments,
        method: Method | None = None,
        recipe: Recipe | None = None,
        *,
        alone: bool = True,
    ) -> tuple[Job, list[str] | None]:
        """A job, and the names of the layers that it is about. alone: or with other requests."""
        recipe, method = recipe or self._recipe, method or self.method
        location, model = self._location, self._called
        # Recordings stand for the model as calls find it; to look takes time where there are none.
        several = [one for cache in list(location.caches.values()) for one in list(cache.values())]
        cache = location.cache
        with unchanging():
            if not several or any(one.mark is not None for one in several):
                model_fingerprint(model)
            call = assigned(model, with_next_token(self.model, call), cache, self.config)

            return self._without_unused(call, given, method, recipe, alone, frozenset())

    def _without_unused(
        self,
        call: Call,
        given: Arguments,
        method: Method,
        recipe: Recipe,
        alone: bool,
        seen: frozenset[int],
    ) -> tuple[Job, list[str] | None]:
        """The job of a call, with zeros for inputs that are unused. seen: those that are known."""
        location, about = self._location, (given, method, recipe, alone)
        cache, model = location.cache, self._called
        if cache.unused:
            seen = seen | still_unused(model, call, cache.unused - seen)

        def without(error: UnseenInputError) -> tuple[Job, list[str] | None]:
            number, known = error.number, location.at is not None or error.number in seen
            if known or not self.zeros_of_unused:
                raise error
            if not unused(model, call, number, error.example):
                raise error
            cache.unused.add(number)
            # Several may be unused: the same again until all are known.
            return self._without_unused(call, *about, seen | {number})

        try:
            job, names = self._planned(replace(call, unused=seen), *about)
        except UnseenInputError as error:
            return without(error)
        replan = job.replan

        def again(job: Job, error: Exception) -> Job:
            return without(error)[0] if isinstance(error, UnseenInputError) else replan(job, error)

        return replace(job, replan=again), names

    def _planned(
        self, call: Call, given: Arguments, method: Method, recipe: Recipe, alone: bool
    ) -> tuple[Job, list[str] | None]:
        model, call, start, cache, layers = self._location.moved(call, recipe, given.baseline)
        if self._location.at is not None:
            features = read_features(call.features, call.inputs, call.layouts)
            call = replace(call, features=features)
        if layers and given.region is not None:
            raise InputError("region is of the inputs, and this map is a layer's: leave it out")
        job = prepare(
            *(model, method, recipe, call, start, given.region, self.limits, cache, self.config),
            lean=self.lean and not self.compile,
            precision=self.precision,
            tolerance=self.tolerance,
            alone=alone,
            # Captured launches are one call's alone.
            graphs=self.graphs and alone,
        )
        return job, names_of(self.model, layers) if layers else None

    def _bound(self, given: Arguments, recipe: Recipe | None = None) -> Call:
        recipe = recipe or self._recipe
        if given.features is not None and not recipe.features:
            raise InputError(
                "features: this method does not ask which elements go together: leave them out, or "
                "use one that takes features away, such as FeatureAblation or KernelShap"
            )
        inside = self._location.at is not None
        integers = recipe.layers is None and (not recipe.gradients or inside)
        missing = recipe.scores_alone and not inside
        about = (given.inputs, given.target, given.forward_args, given.forward_kwargs)
        call = bind(*about, integers=integers, missing=missing)
        targets = with_padding(call.targets, self.model, call.inputs, call.args, call.kwargs)
        call = replace(call, targets=targets)
        # At layers features and layout are of what these give, which is not known yet.
        later = inside and recipe.layers is None
        layout = self.layout if given.layout is None else given.layout
        layouts = layouts_of(self.model, call, None if later else layout)
        features = given.features
        if not inside:
            features = read_features(features, call.inputs, layouts)
        return replace(call, layout=layout, layouts=layouts, features=features)

    def _differentiable(self, job: Job, inputs: Tensor | Inputs) -> Outcome:
        from saliency_fast.engine.differentiable import differentiable

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
        about = {"lean": self.lean, "at": at, "layer_input": self._location.of_input}
        return attribution(job, outcome, baseline, trained_mode=training, **about, **facts)

    def _hashes(self, call: Call) -> dict[str, Any]:
        wanted = self.hashes
        return {
            "input_sha256": record.input_hashes(call.inputs) if wanted else None,
            "weights_sha256": record.weights_hash(self.model) if wanted else None,
        }

    def _progress(self, job: Job) -> Iterator[Progress]:
        """The progress of a call, with a bar beside it where one is wanted."""
        if not self.progress:
            yield from run_alone(job)
            return
        total = job.plan.points * len(job.baselines)
        with tqdm(total=total, desc=self.method.name, unit="point") as bar:
            for progress in run_alone(job):
                bar.update(progress.done - bar.n)
                yield progress


def engine_like(engine: Engine, model: Callable[..., Any], **changes: Any) -> Engine:
    """An engine of a model with the method and the options of another engine, without hashes."""
    names = ("precision", "tolerance", "lean", "progress", "graphs", "layout", "config")
    options = {name: getattr(engine, name) for name in names} | {
        "memory_budget": engine.limits.memory_budget,
        "points_per_launch": engine.limits.points_per_launch,
    }
    return Engine(model, engine.method, hashes=False, **options | changes)


def _check_options(
    model: object,
    precision: str | None,
    waiting: int,
    latency: float,
    tolerance: float | None,
    compile: bool | str,
    rows: str,
) -> None:
    """Raises InputError or InputTypeError for options of an engine that are not allowed."""
    if not callable(model):
        raise InputTypeError(f"model must be callable: got {type(model).__name__}")
    if precision not in (None, *PRECISIONS, AUTO):
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
    if rows not in ("alone", "together"):
        raise InputError(f"rows must be 'alone' or 'together': got {rows!r}")


@lru_cache(maxsize=64)
def _named(method: str) -> tuple[Method, Recipe]:
    """A method by its name, and its recipe, which takes longer to make than a small gradient."""
    found = read_method(method)
    return found, found.recipe()


def _given(argument: object) -> bool:
    return argument is not None and argument != () and argument != {}


RequestLike = Tensor | Inputs | Mapping[str, Any]
"""A request of `explain_many`."""


_CALIBRATED: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], CalibrationCache]]
_CALIBRATED = WeakKeyDictionary()
"""Calibrations of a module, by where it is explained; its engines share them."""
