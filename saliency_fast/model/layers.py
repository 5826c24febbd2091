"""Layers of a model, by name or by their function, and the tensors at them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from itertools import islice
from types import FunctionType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast import _torch_compat as compat
from saliency_fast._types import Args, Function, Inputs, Kwargs
from saliency_fast.errors import InputError, InputTypeError, ModelError, RepeatedLayerError
from saliency_fast.graph.gradients import gradients, nodes_made_of
from saliency_fast.graph.intercept import FunctionMode
from saliency_fast.graph.opinfo import info
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.preserve import uncompiled, without_recomputation
from saliency_fast.model.targets import read_of

T = TypeVar("T")
At = str | nn.Module | Sequence[str | nn.Module]
"""Layers: by name, or themselves."""
EMBEDDINGS = "embeddings"
_NEAR, _LISTED, _OUTPUTS = 5, 20, 8
"""How many near names, names of layers and outputs of layers a message shows."""
Change = Callable[[Tensor], Tensor]
Run = Callable[[int, Change | None], tuple[Any, Tensor]]
"""Runs the model on the example of a number, its inputs changed: its output, and scores."""
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{axes}d")
    for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax")
    for axes in (1, 2, 3)
)
_FIRST = frozenset("expand_as view_as reshape_as type_as to".split())
"""Calls whose other arguments give a shape or a type alone."""
_SHAPES = ("_like", "new_")
"""Calls that make new numbers in the shape of an argument."""


@dataclass(frozen=True, eq=False)
class OneCall:
    """One of the calls of a layer that runs several times in a forward pass, counted from 0."""

    layer: nn.Module
    call: int


Layer = nn.Module | OneCall


def module_at(layer: Layer) -> nn.Module:
    """The module of a layer, or of one of its calls."""
    return layer.layer if isinstance(layer, OneCall) else layer


def kind_of(layer: Layer) -> str:
    """What messages call a layer."""
    return type(module_at(layer)).__name__


def find_layers(model: object, at: At) -> tuple[Layer, ...]:
    """The layers that `at` names, such as "name:2", the third call of one; or an InputError."""
    parts = list(at) if isinstance(at, (tuple, list)) else [at]
    if not parts:
        raise InputError("at is empty: expected a layer, its name, or several of these")
    own = tuple(one for one in parts if isinstance(one, nn.Module))
    if len(own) == len(parts) and not isinstance(compat.eager_module(model), nn.Module):
        # A function around a model: whether the layers run shows when it does.
        return own
    module = module_of(model)
    return tuple(_find(module, one) for one in parts)


def module_of(model: object) -> nn.Module:
    """The module whose layers are meant, without `torch.compile` around it."""
    inner = compat.eager_module(model)
    if not isinstance(inner, nn.Module):
        raise InputTypeError(
            f"at names layers of a torch.nn.Module: got {type(model).__name__}; pass the module "
            "instead of a function around it, or the layers themselves"
        )
    return inner


def names_of(model: object, layers: Sequence[Layer]) -> list[str]:
    """The names of layers in `named_modules`, with the numbers of calls."""
    inner = compat.eager_module(model)
    named = inner.named_modules() if isinstance(inner, nn.Module) else ()
    names = {id(layer): name for name, layer in named}
    shown = [(names.get(id(module_at(one)), kind_of(one)), one) for one in layers]
    return [f"{name}:{one.call}" if isinstance(one, OneCall) else name for name, one in shown]


def _find(model: nn.Module, at: object) -> Layer:
    if isinstance(at, OneCall):
        return at
    if isinstance(at, nn.Module):
        layer = compat.eager_module(at)
        assert isinstance(layer, nn.Module)
        if not any(one is layer for one in model.modules()):
            raise InputError(
                f"at: the {type(layer).__name__} is no layer of this {type(model).__name__}; pass "
                "one of its own modules, or a name from named_modules()"
            )
        return layer
    if not isinstance(at, str):
        raise InputTypeError(
            f"at must be a layer, its name, or several of these: got {type(at).__name__}"
        )
    named = model.named_modules(remove_duplicate=False)
    layers: dict[str, nn.Module] = {name: one for name, one in named if name}
    if at in layers:
        return layers[at]
    name, colon, number = at.rpartition(":")
    if colon and name in layers and number.isdigit():
        return OneCall(layers[name], int(number))
    ends = [name for name in layers if name.endswith(f".{at}")][:_NEAR]
    near = ends or get_close_matches(at, layers, n=_NEAR, cutoff=0.4)
    hint = f"did you mean {', '.join(map(repr, near))}?"
    listed = f"its layers are {', '.join(map(repr, list(layers)[:_LISTED]))}"
    raise InputError(f"at: the model has no layer {at!r}; {hint if near else listed}")


def channel_axis(layer: nn.Module, shape: tuple[int, ...], default: int = 1) -> int:
    """1 or -1: the axis of channels in a layer's output [R, ...], by the number of features of its
    last part that has one; 1 of convolutions and batch norms where both fit.
    """

    def number(part: nn.Module, names: str) -> int | None:
        values = [getattr(part, name, None) for name in names.split()]
        return next((one for one in values if isinstance(one, int)), None)

    for part in reversed(list(layer.modules())):
        early = number(part, "out_channels num_channels num_features")
        late = number(part, "out_features embed_dim embedding_dim hidden_size")
        if late is None and isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1:
            late = part.normalized_shape[0]
        features = early if late is None else late
        fits = [axis for axis in (1, -1) if shape[axis] == features]
        if fits:
            return fits[0] if early is not None else fits[-1]
    return default


# Values at layers, by hooks.


@contextmanager
def hooked(
    layers: Sequence[Layer], seen: Callable[[int, Any], Any], *, of_input: bool = False
) -> Iterator[None]:
    """Inside, `seen(number, value)` gets the output of each layer, or its input, and returns the
    value to go on with (None: as it is). Runs of other threads pass by; nothing stays behind.
    """
    thread, calls = threading.get_ident(), [0] * len(layers)

    def applies(number: int) -> bool:
        """Whether this call of the layer is the one that is asked for."""
        if threading.get_ident() != thread:
            return False
        calls[number] += 1
        layer = layers[number]
        return not isinstance(layer, OneCall) or calls[number] == layer.call + 1

    def after(number: int, _: nn.Module, __: Any, output: Any) -> Any:
        return seen(number, output) if applies(number) else None

    # While a hook comes or goes, PyTorch calls it without keywords in other threads.
    def before(number: int, _: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if not applies(number):
            return None
        if not floats_at(args):
            return seen(number, (args, kwargs))
        # Keyword arguments beside it are masks and the like.
        changed = seen(number, args)
        return None if changed is None else (changed, kwargs)

    with uncompiled(), without_recomputation(), ExitStack() as stack:
        for number, layer in enumerate(map(module_at, layers)):
            if of_input:
                hook = partial(before, number)
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = layer.register_forward_hook(partial(after, number))
            stack.callback(handle.remove)
        yield


def _hooked_once(
    layers: Sequence[Layer], seen: Callable[[int, Any], Any], of_input: bool, call: Callable[[], T]
) -> T:
    """The result of `call`, in which each layer runs once; `seen` as in `hooked`."""
    ran: set[int] = set()

    def once(number: int, value: Any) -> Any:
        if number in ran:
            raise RepeatedLayerError(
                f"at: the layer {kind_of(layers[number])} runs more than once for one input, so it "
                "has no single output; name a layer that runs once, such as the one around it, or "
                "one of its calls ('name:0' is the first); where it runs once for each of several "
                "inputs, explain one of these by a function of it alone, what the model makes of "
                "the others given through forward_args"
            )
        ran.add(number)
        return seen(number, value)

    with hooked(layers, once, of_input=of_input):
        raw = call()
    for number, layer in enumerate(layers):
        if number not in ran:
            often = " as often" if isinstance(layer, OneCall) else ""
            raise ModelError(
                f"at: the layer {kind_of(layer)} did not run{often} when the model did; name one "
                "that the model calls for these inputs"
            )
    return raw


def tree_tensors(value: Any) -> list[Tensor]:
    return [one for one in compat.tree_leaves(value) if isinstance(one, Tensor)]


def tensors_at(value: Any) -> list[Tensor]:
    """The tensors of a value: those directly in a tuple, without states, or else all."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    own = [one for one in parts if isinstance(one, Tensor)]
    return own or tree_tensors(value)


def floats_at(value: Any) -> list[Tensor]:
    """The floating tensors in a layer's input or output, which points can take the place of."""
    return [one for one in tensors_at(value) if one.is_floating_point()]


def with_floats(value: Any, others: Sequence[Tensor]) -> Any:
    """`value` with those tensors replaced, in their order."""
    instead: dict[int, list[Tensor]] = {}
    for one, other in zip(floats_at(value), others, strict=True):
        instead.setdefault(id(one), []).append(other)
    return compat.tree_map(
        lambda one: instead[id(one)].pop(0) if instead.get(id(one)) else one, value
    )


class Taps(Protocol):
    """Tensors inside of a model at which gradients are taken."""

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `call` returns, and the tapped tensors [R, *], on autograd's graph."""

    def prepare(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Before the first run: finds what to tap, by runs of the model with one row."""

    def check_reached(self, reached: Sequence[bool]) -> None:
        """Raises ModelError where a tap has no gradient; reached: of each tensor."""


@dataclass(frozen=True)
class LayerTaps:
    """The outputs or inputs of layers as taps. counts: of tensors, in the last run; moving: calls
    before the layers, in the last run, after which elements may lie elsewhere than in the input.
    """

    layers: tuple[Layer, ...]
    of_input: bool = False
    counts: list[int] = field(default_factory=list, compare=False)
    moving: list[str] = field(default_factory=list, compare=False)

    def prepare(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Layers are named: there is nothing to find."""

    def check_reached(self, reached: Sequence[bool]) -> None:
        of_each = iter(reached)
        for layer, count in zip(self.layers, self.counts, strict=True):
            if not any(list(islice(of_each, count))):
                raise ModelError(
                    f"at: the explained score does not depend on the layer {kind_of(layer)}: it "
                    "ran, and no gradient reaches it, as of an auxiliary head that another output "
                    "is for, or a layer whose result is cut off by detach() or no_grad(); name one "
                    "that the score is made from"
                )

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `call` returns, and the tensors at the layers."""
        tapped, moves = dict[int, list[Tensor]](), _Moves()
        differentiable = torch.is_grad_enabled()

        def seen(number: int, value: Any) -> Any:
            self.moving[:] = moves.names
            # A tap is differentiable, and would give a layer gradients that the input has not.
            if differentiable and not torch.is_grad_enabled():
                raise ModelError(
                    "at: the model is not differentiable in its input: the layer "
                    f"{kind_of(self.layers[number])} runs under no_grad(); take that out of the "
                    "model, or explain by a method that asks for scores alone, such as sf.Occlusion"
                )
            # These calls are not the model's, for whichever mode follows its calls.
            with compat.WithoutFunctionModes(), torch.enable_grad():
                # The first tap cuts the graph: nothing before it is kept for the backward pass. A
                # later one may depend on it.
                later = any(tapped.values())
                tapped[number] = [
                    one if later and one.requires_grad else one.detach().clone().requires_grad_()
                    for one in floats_at(value)
                ]
                # The model may go on to overwrite its tensors.
                return with_floats(value, [one.clone() for one in tapped[number]])

        with moves:
            raw = _hooked_once(self.layers, seen, self.of_input, call)
        several = [tapped[number] for number in range(len(self.layers))]
        self.counts[:] = map(len, several)
        return raw, [one for own in several for one in own]


_STAYS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm "
    "instance_norm group_norm local_response_norm relu relu_ relu6 leaky_relu leaky_relu_ elu "
    "elu_ celu selu gelu silu mish hardswish hardtanh hardtanh_ hardsigmoid sigmoid sigmoid_ tanh "
    "tanh_ softplus clamp clamp_ prelu dropout dropout1d dropout2d dropout3d feature_dropout "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d boolean_dispatch fn add "
    "add_ __add__ __radd__ __iadd__ sub __sub__ mul mul_ __mul__ __rmul__ __imul__ div "
    "__truediv__ contiguous clone to float".split()
)
"""Calls whose results have the rows, the channels and the axes of space where their inputs do."""


class _Moves(FunctionMode):
    """Notes the calls that may move elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def opens(self, func: FunctionType) -> bool:
        return False

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        # Channels beside channels.
        joins = name == "cat" and 1 in (*args[1:], kwargs.get("dim"))
        stays = name in _STAYS or joins or info(func).metadata
        if not stays and tree_tensors(result):
            self.names.append(name)
        return result


@dataclass(frozen=True, eq=False)
class Downstream:
    """The function downstream of layers: `downstream(*points, *inputs, **kwargs)` is the model's
    output for its inputs, with `points` as the layers' outputs (or inputs), `counts` of each.
    """

    model: Callable[..., Any]
    layers: tuple[Layer, ...]
    of_input: bool
    counts: tuple[int, ...]

    def __call__(self, *values: Any, **kwargs: Any) -> Any:
        count = sum(self.counts)
        points, inputs = values[:count], values[count:]

        def seen(number: int, value: Any) -> Any:
            first = sum(self.counts[:number])
            return with_floats(value, points[first : first + self.counts[number]])

        run = partial(self.model, *inputs, **kwargs)
        return _hooked_once(self.layers, seen, self.of_input, run)


@dataclass
class Read:
    """The outputs of layers, or their inputs, in one run."""

    layers: tuple[Layer, ...]
    of_input: bool = False

    def run(self, call: Callable[[], Any]) -> list[Inputs]:
        """Plain copies of the tensors at each layer while `call` runs."""
        values: list[Inputs] = [()] * len(self.layers)

        def seen(number: int, value: Any) -> None:
            values[number] = tuple(one.detach().clone() for one in floats_at(value))

        with torch.no_grad():
            _hooked_once(self.layers, seen, self.of_input, call)
        for layer, own in zip(self.layers, values, strict=True):
            if not own:
                side = "takes" if self.of_input else "gives"
                raise InputError(
                    f"at: the layer {kind_of(layer)} {side} no floating point tensor, so "
                    "nothing can be attributed to it; name a layer around it"
                )
        return values


# The tables of the explained tokens.


@dataclass(frozen=True)
class Lookup:
    """An embedding table, or one of its calls, and the ids of the explained input that it gets."""

    layer: Layer
    ids: Tensor

    @property
    def table(self) -> nn.Module:
        return module_at(self.layer)


def lookups(model: object, run: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Lookup]:
    """The calls of embedding tables whose ids are numbers of `inputs`, however moved or cast; not
    of tables of positions or types. Raises InputError where there is none.
    """
    module = module_of(model)
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables: list[nn.Module] = [one for one in module.modules() if isinstance(one, kinds)]
    named = getattr(module, "get_input_embeddings", None)
    own = named() if callable(named) else None
    if isinstance(own, nn.Module) and not any(one is own for one in tables):
        tables.append(own)
    if not tables:
        raise InputError(
            "at='embeddings': the model has no torch.nn.Embedding and no get_input_embeddings(); "
            "name the layer that makes vectors of tokens"
        )
    mode, calls, counts = _FollowIds(inputs), list[tuple[int, int, Tensor]](), [0] * len(tables)

    def before(number: int, given: Any) -> None:
        mode.given.append(tree_tensors(given)[:1])
        mode.looked_up.append([])

    def after(number: int, _: Any) -> None:
        # Tables of positions may be passed the tokens for the sake of their number.
        given, ids = mode.given.pop(), mode.looked_up.pop()
        own = [one for one in ids or given if mode.follows(one)]
        calls.extend((number, counts[number], one.detach()) for one in own[:1])
        counts[number] += 1

    with torch.no_grad(), hooked(tables, before, of_input=True), hooked(tables, after), mode:
        run()
    if not calls:
        names = ", ".join(map(repr, names_of(model, tables)))
        raise InputError(
            f"at='embeddings': no table of the model gets ids from the explained input: it has "
            f"{names}; name the layer that makes vectors of the input"
        )
    once = [count == 1 for count in counts]
    return [Lookup(tables[n] if once[n] else OneCall(tables[n], k), ids) for n, k, ids in calls]


def embeddings(model: object, run: Callable[[], Any], inputs: Inputs) -> tuple[Layer, ...]:
    """The layers that `at="embeddings"` means, in the order in which they run."""
    return tuple(one.layer for one in lookups(model, run, inputs))


class _FollowIds(FunctionMode):
    """Follows ids through calls. given, looked_up: tensors and ids of each table at work."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.given: list[list[Tensor]] = []
        self.looked_up: list[list[Tensor]] = []
        self._followed = WeakTensorKeyDictionary(dict.fromkeys(inputs))

    def opens(self, func: FunctionType) -> bool:
        return False

    def follows(self, value: object) -> bool:
        """Whether a tensor holds numbers of the inputs, or numbers made from them."""
        return isinstance(value, Tensor) and value in self._followed

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("embedding", "embedding_bag") and self.looked_up:
            given = tree_tensors((args, kwargs))
            self.looked_up[-1] += [one for one in given if not one.is_floating_point()]
        result = func(*args, **kwargs)
        sources = args[:1] if name in _FIRST else (args, kwargs)
        if any(part in name for part in _SHAPES) or not any(
            map(self.follows, tree_tensors(sources))
        ):
            return result
        made = tree_tensors(result)
        if name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__")):
            made += [one for one in args[:1] if isinstance(one, Tensor)]
        # The result of a comparison is no number of the input's any more.
        self._followed.update({one: None for one in made if one.dtype != torch.bool})
        return result


# The last layer with spatial output.


def last_spatial(model: object, run: Run, examples: int) -> tuple[nn.Module, bool]:
    """The last module in order of execution with spatial output that lies between the explained
    inputs and the explained score, and whether it does for every score that the output holds.

    Spatial is an output [R, C, *s], [R, *s, C] or of tokens [R, T, C], with more than one position
    and channel. Left out are pooled maps (Grad-CAM's layer is the last convolution); modules that
    run more than once; modules that return several tensors, where others do not; and, of a spatial
    model output (segmentation), maps of as many channels. Tokens are taken from before the last
    module that mixes them (attention, a recurrence), since the head of a class token reads no other
    token after it: in a ViT the first norm of the last block. Auxiliary heads and towers of other
    inputs are left out by proof: a module's output must differ for other inputs, and scores must
    differ where it is changed.

    Raises InputError where there is none, with the last outputs that there are.
    """
    trace = _ModuleTrace(module_of(model))
    modules = trace.modules
    with torch.no_grad():
        begin = hooked(modules, trace.begin, of_input=True)
        with begin, hooked(modules, trace.end), trace:
            raw, scores = run(0, None)
        before = trace.digests.copy()
        with hooked(modules, trace.digest):
            run(0, noisy)
        varying = {one for one, value in trace.digests.items() if value != before.get(one)}
        shown = _shown(raw)
        candidates = trace.candidates(shown, varying)
        while candidates:
            module = trace.last(candidates, varying)
            if (reached := _reached(module, run, examples, shown, scores)) is not None:
                return module, reached
            candidates = [one for one in candidates if one.module is not module]
    raise trace.none(tried=True)


def last_spatial_by_gradient(model: object, run: Run) -> nn.Module | None:
    """The same module, where one run with a gradient proves it; None proves nothing."""
    trace, leaves = _ModuleTrace(module_of(model)), list[Tensor]()
    edges = dict[nn.Module, GradientEdge]()

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_(x.is_floating_point()))
        return leaves[-1]

    def end(number: int, output: Any) -> None:
        trace.end(number, output, digest=False)
        tensors = tensors_of(output)
        if tensors and tensors[0].requires_grad:
            edges[trace.modules[number]] = get_gradient_edge(tensors[0])

    begin = hooked(trace.modules, trace.begin, of_input=True)
    try:
        with torch.enable_grad(), begin, hooked(trace.modules, end), trace:
            raw, scores = run(0, leaf)
        starts = [get_gradient_edge(one).node for one in leaves if one.requires_grad]
        made = nodes_made_of(starts, scores)
        varying = {module for module, edge in edges.items() if edge.node in made}
        candidates = [one for one in trace.candidates(_shown(raw), varying) if one.alone]
        module = trace.last([one for one in candidates if one.module in varying], varying)
        (found,) = gradients(scores.sum(), [edges[module]], allow_unused=True)
        return module if found is not None and bool(found.any()) else None
    except Exception:
        # Whatever it is, the search without gradients tells.
        return None


def _shown(raw: Any) -> Tensor | None:
    """The tensor that is explained in a model's output, as a rule."""
    return next((one for one in (read_of(raw), *tensors_of(raw)) if one is not None), None)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers differ; NaN differs."""
    return a.shape != b.shape or bool((a != b).all())


def noisy(x: Tensor) -> Tensor:
    """Other values of the same kind and range."""
    generator = torch.Generator("cpu").manual_seed(0)
    if x.is_floating_point() or x.is_complex():
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu")
        size = x.abs().max().nan_to_num(1.0) + 1
        return x.nan_to_num() + (noise.to(x.device, x.real.dtype) - 0.5) * size
    if x.dtype == torch.bool or x.numel() == 0:
        return ~x if x.dtype == torch.bool else x
    low, high = int(x.min()), int(x.max())
    drawn = torch.randint(low, high + 1, x.shape, generator=generator, device="cpu")
    return drawn.to(x.device, x.dtype)


def _reached(
    module: nn.Module, run: Run, examples: int, shown: Tensor | None, scores: Tensor
) -> bool | None:
    """Whether all of `shown` depends on a module; None where a score does not."""

    def change(_: int, output: Any) -> Any:
        return with_floats(output, [noisy(one) for one in floats_at(output)])

    def changed(number: int) -> tuple[Any, Tensor]:
        try:
            with hooked((module,), change):
                return run(number, None)
        except Exception:
            # A model that cannot run with other values depends on them.
            return None, scores * torch.nan

    raw, others = changed(0)
    if not _differ(others, scores):
        return None
    explained = _shown(raw)
    if explained is None or shown is None or _differ(explained, shown):
        return True
    pairs = ((run(number, None)[1], changed(number)[1]) for number in range(1, examples))
    return False if all(_differ(*pair) for pair in pairs) else None


@dataclass
class _Output:
    """An output: when it was ready, its shape and channel axis, whether it is alone."""

    module: nn.Module
    time: int
    shape: tuple[int, ...]
    axis: int
    alone: bool


class _ModuleTrace(FunctionMode):
    """Records what the modules of a forward pass do, by hooks, and attention by its calls.

    stack: modules at work, and since when; mixing: when which module mixed tokens; digests: numbers
    that differ where outputs do; rows: of the model's input; pooled: the last pooled map.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root, self.modules = root, list(root.modules())
        self.stack, self.mixing = list[tuple[nn.Module, int]](), list[tuple[int, nn.Module]]()
        self.calls, self.shapes = dict[nn.Module, int](), dict[nn.Module, list[int]]()
        self.outputs, self.time = list[_Output](), 0
        self.digests: dict[nn.Module, tuple[float, ...]] = {}
        self.rows: int | None = None
        self.pooled: Tensor | None = None

    def opens(self, func: FunctionType) -> bool:
        return False

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        name = getattr(func, "__name__", "")
        shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
        square = len(shape) >= 3 and shape[-1] == shape[-2] > 1
        if "attention" in name or "transformer" in name or (name == "softmax" and square):
            self.mixes()
        return func(*args, **kwargs)

    def mixes(self) -> None:
        """Tokens are mixed by the innermost module at work that is no softmax."""
        at_work = [at for at in self.stack if not isinstance(at[0], nn.Softmax)]
        if at_work:
            self.mixing.append((at_work[-1][1], at_work[-1][0]))

    def digest(self, number: int, output: Any) -> None:
        """Hook of a module's output: keeps numbers that differ where outputs do."""
        tensors = tensors_of(output)
        if not tensors:
            return
        flat, digest = tensors[0].detach().flatten(), tuple[float, ...]()
        if flat.numel() and not flat.is_complex():
            flat = flat.double()
            waves = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64).cos_()
            digest = tuple(torch.stack([flat.sum(), flat.square().sum(), flat @ waves]).tolist())
        self.digests[self.modules[number]] = digest

    def begin(self, number: int, given: Any) -> None:
        module, self.time = self.modules[number], self.time + 1
        if module is self.root and (tensors := tensors_of(given)):
            self.rows = len(tensors[0]) if tensors[0].dim() else None
        self.stack.append((module, self.time))
        if isinstance(module, nn.RNNBase):
            self.mixes()

    def end(self, number: int, output: Any, digest: bool = True) -> None:
        module, self.time = self.modules[number], self.time + 1
        self.stack.pop()
        self.calls[module] = self.calls.get(module, 0) + 1
        tensors = tensors_of(output)
        if not tensors or module is self.root:
            return
        tensor, shape = tensors[0], tuple(tensors[0].shape)
        if digest:
            self.digest(number, output)
        self.shapes[module] = list(shape)
        if isinstance(module, _POOLS):
            self.pooled = tensor
        if tensor is self.pooled or len(shape) < 3 or self.rows not in (None, shape[0]):
            return
        # After attention, an output that fits both layouts is taken for tokens.
        axis = channel_axis(module, shape, 1 if not self.mixing or len(shape) > 3 else -1)
        space = shape[1:-1] if axis == -1 else shape[2:]
        if max(space) > 1 and shape[axis] > 1:
            self.outputs.append(_Output(module, self.time, shape, axis, len(tensors) == 1))

    def candidates(self, raw: Tensor | None, varying: Collection[nn.Module]) -> list[_Output]:
        """Outputs that `layer="auto"` may mean; varying: those that differ with inputs."""
        outputs = [one for one in self.outputs if self.calls[one.module] == 1]
        if raw is not None and raw.dim() >= 3:
            classes = {raw.shape[1], raw.shape[-1 if raw.dim() == 3 else 1]}
            outputs = [one for one in outputs if one.shape[one.axis] not in classes]
        outputs = [one for one in outputs if one.alone] or outputs
        if not outputs:
            raise self.none()
        # Inputs with one possible value show nothing.
        return [one for one in outputs if one.module in varying] or outputs

    def last(self, outputs: list[_Output], varying: Collection[nn.Module]) -> nn.Module:
        """The last of the candidates, of tokens before the last attention among those inputs."""
        mixing = [time for time, module in self.mixing if module in varying]
        if outputs[-1].axis == -1 and len(outputs[-1].shape) == 3 and mixing:
            outputs = [one for one in outputs if one.time < mixing[-1]] or outputs
        return outputs[-1].module

    def none(self, *, tried: bool = False) -> InputError:
        """The error where no module will do."""
        names = {module: name for name, module in self.root.named_modules()}
        last = list(self.shapes.items())[-_OUTPUTS:]
        shown = ", ".join(f"{names[module]} {shape}" for module, shape in last) or "none"
        again = {names[one.module]: None for one in self.outputs if self.calls[one.module] > 1}
        more = f"; {', '.join(again)} run more than once" if again else ""
        spatial = ", [B, C, *spatial] or tokens [B, T, C]"
        lacking = " that the explained scores depend on" if tried else spatial
        return InputError(
            f'layer="auto" found no layer with spatial output{lacking}: the last outputs are '
            f"{shown}{more}; pass the layer itself"
        )
