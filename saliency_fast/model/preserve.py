"""Leaves a model as it was: modes, attributes, buffers, random numbers and checkpoints.

Attributes are restored by identity, containers by their entries, tensors by PyTorch's count of
in-place writes; before each run, too, since a point's score depends on the model as the caller
passed it, not on earlier runs.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, wraps
from itertools import chain, islice
from operator import is_, itemgetter, methodcaller
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint

from saliency_fast import _torch_compat as compat
from saliency_fast.errors import warn

COPIED = 64 * 1024**2
"""Bytes of buffers that are copied before a model's first call, in case it overwrites them."""
LONG = 100_000
"""Entries of a container above which only its length is compared."""
NESTED = 1000
"""Entries of a container up to which the containers and tensors among them are restored, too."""
_NAMED = 8
"""Tensors that a warning names."""
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
_CONTAINERS = (OrderedDict, dict, list, set, deque)
_BASE = frozenset(vars(nn.Module()))
"""Attributes of every module: modes, tables and hooks, which are restored elsewhere."""
_tables_of = itemgetter(*compat.TABLES)
Held = TypeVar("Held")
Called = TypeVar("Called", bound=Callable[..., Any])


class SharedSwitch(Generic[Held]):
    """What threads share: a key's first user turns it on, its last one off."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: dict[object, tuple[int, Held]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def acquire(self, key: object, turn_on: Callable[[], Held]) -> Held:
        """What `turn_on` returned to the first user of `key`."""
        with self.lock:
            users, held = self._held.get(key) or (0, turn_on())
            self._held[key] = users + 1, held
            return held

    def release(self, key: object, turn_off: Callable[[Held], object]) -> None:
        """Ends a use of `key`."""
        with self.lock:
            users, held = self._held.pop(key)
            if users > 1:
                self._held[key] = users - 1, held
            else:
                turn_off(held)

    @contextmanager
    def on(self, turn_on: Callable[[], Held], turn_off: Callable[[Held], object]) -> Iterator[None]:
        """A use of the only key, for the time of a `with`."""
        self.acquire(None, turn_on)
        try:
            yield
        finally:
            self.release(None, turn_off)


class _Local(threading.local):
    """What this thread's calls hold, the innermost last, and how its checkpoints run."""

    def __init__(self) -> None:
        self.holds: list[_Hold] = []
        self.once: bool | None = None


_LOCAL = _Local()
_MODES: SharedSwitch[bool] = SharedSwitch()
_SNAPSHOTS: dict[nn.Module, _Snapshot] = {}
"""Of the modules that calls hold now, which share them."""
_GLANCED: list[_Hold] = []
"""Calls whose models have no snapshots yet, since nobody else holds one."""
_OUTLINES: WeakKeyDictionary[nn.Module, _Outline] = WeakKeyDictionary()
"""Of models that the last call has left as they were, by their first modules."""
_LOCK = threading.RLock()
"""Of snapshots, which threads share."""
_STANCE: SharedSwitch[Any] = SharedSwitch()
_CHECKPOINTS: SharedSwitch[None] = SharedSwitch()
_OVERWRITTEN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Names of the tensors that modules write to, of every module that was held once."""
_CHANGING: WeakSet[nn.Module] = WeakSet()
"""Modules that were seen to change when they run."""


@contextmanager
def preserve_model_state(
    model: Callable[..., Any], device: torch.device, *, draws: bool = True
) -> Iterator[bool]:
    """Inside, the model is in evaluation mode; yields whether it was in training mode.

    Modes, random states and the model's own state are restored also after an exception or Ctrl-C,
    modes of shared models when the last thread leaves. draws: whether random states are restored,
    which are the process's: not where other threads go on working.
    """
    # Contexts of PyTorch's take longer than to ask whether they would change anything.
    nothing, glanced = nullcontext(), _Hold.glanced(model, rewinds=draws)
    with (
        glanced or nothing,
        restored_random_state(lambda: True, device) if draws else nothing,
        compat.outside_transforms(),
        nullcontext(False) if glanced else _evaluating(model) as was_training,
        nothing if glanced else preserved(model, rewinds=draws),
        torch.inference_mode(False) if torch.is_inference_mode_enabled() else nothing,
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else nothing,
        without_recomputation(once=False),
    ):
        yield was_training


@contextmanager
def restored_random_state(drew: Callable[[], bool], device: torch.device) -> Iterator[None]:
    """Restores random states, which threads share, if `drew()` says that they changed."""
    before = random_states(device)
    try:
        yield
    finally:
        # A model that draws nothing leaves the states alone, and so do we.
        if drew() and not all(map(torch.equal, before, random_states(device))):
            draw_again(before, device)


def random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a model on the device draws from."""
    states = [torch.random.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def draw_again(states: list[Tensor], device: torch.device) -> None:
    """Puts generators back to what `random_states` gave."""
    torch.random.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[bool]:
    """Inside, all modules of a model are in evaluation mode; yields whether one was not."""
    held: list[nn.Module] = []
    with _MODES.lock:
        others = len(_MODES) > 0
        for module in below([model]) if isinstance(model, nn.Module) else ():
            # Frozen TorchScript has no mode any more.
            training = getattr(module, "training", None)
            if training or (others and training is not None and module in _MODES):
                _MODES.acquire(module, lambda: True)
                module.training = False
                held.append(module)
    try:
        yield bool(held)
    finally:
        with _MODES.lock:
            for module in held:
                _MODES.release(module, partial(setattr, module, "training"))


# Compilation and checkpoints.


def uncaptured(function: Called) -> Called:
    """The function outside of torch.compile, which would compile our own frames one by one."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not compat.dynamo_loaded():
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]

    return cast(Called, called)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, models of torch.compile run eagerly: it cannot compile hooks and modes."""
    with ExitStack() as stack:
        # Refused in a function that is being compiled, where the model is no frame of its own.
        with suppress(RuntimeError):
            if compat.dynamo_loaded():
                set_stance = partial(torch.compiler.set_stance, "force_eager")
                unset = methodcaller("__exit__", None, None, None)
                stack.enter_context(_STANCE.on(set_stance, unset))
        yield


@contextmanager
def without_recomputation(*, once: bool = True) -> Iterator[None]:
    """Inside, torch.utils.checkpoint runs its functions once in this thread, as plain calls: hooks
    and function modes do not hold for a checkpoint's second run. once: False leaves checkpoints
    with use_reentrant=False as they are, and runs the other kind, which refuses
    torch.autograd.grad, as if it were that one.
    """
    before = _LOCAL.once
    with _CHECKPOINTS.on(_patch_checkpoints, _unpatch_checkpoints):
        # The stricter of nested ones holds.
        _LOCAL.once = once or bool(before)
        try:
            yield
        finally:
            _LOCAL.once = before


def _patch_checkpoints() -> None:
    # All hide inherited methods, which other threads go on to.
    compat.ReentrantCheckpoint.apply = staticmethod(_apply)
    compat.CheckpointHook.__enter__, compat.CheckpointHook.__exit__ = _enter, _leave


def _unpatch_checkpoints(_: None) -> None:
    hook = compat.CheckpointHook
    del compat.ReentrantCheckpoint.apply, hook.__enter__, hook.__exit__


def _apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    if _LOCAL.once is None:
        kind = compat.ReentrantCheckpoint
        return super(kind, kind).apply(function, preserve, *args)
    if _LOCAL.once:
        return function(*args)
    return torch_checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=preserve
    )


def _enter(hook: Any) -> None:
    # Without its hooks, tensors that a checkpoint's function saves are kept as anywhere else.
    hook.skipped = bool(_LOCAL.once)
    if not hook.skipped:
        saved_tensors_hooks.__enter__(hook)


def _leave(hook: Any, *error: Any) -> None:
    # Entered before `_enter` was there, where another thread put it there meanwhile.
    if not getattr(hook, "skipped", False):
        saved_tensors_hooks.__exit__(hook, *error)


# The state of modules.


class _Snapshot:
    """A module as it was before the first of the calls that hold it.

    room: bytes of tensors that may be copied. users: calls that hold it. thread: the one of all
    calls, None for several. changed: whether the last `restore` restored something. inference:
    whether it has tensors of inference mode.
    """

    def __init__(self, module: nn.Module, sizes: list[int], entries: list[Any]) -> None:
        """sizes, entries: of the module's attributes and tables, as `_entries` has them."""
        self.module, self.inference, self.changed, self.users = module, False, False, 0
        self.thread: int | None = threading.get_ident()
        self.sizes, self.entries, self.containers = sizes, entries, list[_Container]()
        self.transient, self.copies = set[str](), dict[int, Tensor]()
        # Parameters and buffers. A layer without a bias has a parameter that is None.
        start, half = sizes[0], len(entries) // 2
        pairs = zip(*(entries[at + start : at + sum(sizes[:3])] for at in (0, half)), strict=True)
        self.tensors = [(name, one) for name, one in pairs if one is not None]
        self.versions, self.overwritten = list[int](), None if self.tensors else set[str]()

    @classmethod
    def of(cls, module: nn.Module, room: int) -> _Snapshot:
        """Of a module as it is now."""
        own = vars(module)
        one = cls(module, *_entries(own))
        one.transient = set(own[compat.TRANSIENT])
        for name in own if len(own) > len(_BASE) else ():
            if name not in _BASE and not _is_plain(own[name]):
                one._gather(name, own[name], set())
        if any(tensor.is_inference() for _, tensor in one.tensors):
            # They count no writes, and take none outside of their mode.
            one.inference = True
            one.tensors = [pair for pair in one.tensors if not pair[1].is_inference()]
        one.versions = [compat.version_of(tensor) for _, tensor in one.tensors]
        if one.tensors:
            one.overwritten = _OVERWRITTEN.get(module)
            one.copies = one._copied(own[compat.PARAMETERS], room)
        return one

    def _gather(self, name: str, value: Any, seen: set[int]) -> None:
        """Adds the containers and tensors in an attribute."""
        if isinstance(value, Tensor):
            self.tensors.append((name, value))
        elif isinstance(value, (*_CONTAINERS, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if not isinstance(value, tuple):
                self.containers.append(_Container(name, value))
            if len(value) <= NESTED:
                for one in list(value.values() if isinstance(value, dict) else value):
                    if type(one) not in _PLAIN:
                        self._gather(name, one, seen)

    def _copied(self, parameters: dict[str, Any], room: int) -> dict[int, Tensor]:
        """Copies of tensors that may be overwritten: at first all but parameters."""
        # In training mode, batch normalisation writes to its statistics.
        overwritten = None if self.module.training else self.overwritten
        copies: dict[int, Tensor] = {}
        for number, (name, tensor) in enumerate(() if overwritten == set() else self.tensors):
            wanted = name not in parameters and (overwritten is None or name in overwritten)
            # Writes to other layouts, such as sparse ones, show in their versions alone.
            plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
            if wanted and plain and tensor.nbytes <= room:
                copies[number] = tensor.detach().clone()
                room -= tensor.nbytes
        return copies

    def restore(self, *, graphs: bool) -> list[str]:
        """Restores the module; returns the names of tensors and containers that stay changed.
        graphs: graphs of its runs live on, whose backward pass fails where tensors were written to.
        """
        own, self.changed = vars(self.module), False
        sizes, entries = _entries(own)
        if sizes != self.sizes or not all(map(is_, entries, self.entries)):
            self._restore_entries(own)
        if own[compat.TRANSIENT] != self.transient:
            own[compat.TRANSIENT].clear()
            own[compat.TRANSIENT].update(self.transient)
        if not (self.tensors or self.containers or self.changed):
            return []
        containers = [one for one in self.containers if one.changed()]
        lost = [one.name for one in containers if not one.restore()]
        now, written = [compat.version_of(tensor) for _, tensor in self.tensors], list[int]()
        if now != self.versions:
            written = [n for n, was in enumerate(self.versions) if now[n] != was]
        # Batch normalisation writes to its statistics without counting.
        for n, one in self.copies.items():
            if n not in written and not torch.equal(one, self.tensors[n][1]):
                written.append(n)
        if containers or written:
            self.changed = True
            names = [self.tensors[n][0] for n in written]
            pairs = zip(written, names, strict=True)
            lost += [name for n, name in pairs if not self._rewritten(n, graphs)]
        if self.changed:
            _CHANGING.add(self.module)
            _OUTLINES.clear()
        if self.overwritten is None or written:
            self.overwritten = (self.overwritten or set()).union(
                self.tensors[n][0] for n in written
            )
            _OVERWRITTEN[self.module] = self.overwritten
            if written:
                _OUTLINES.clear()
        return lost

    def _restore_entries(self, own: dict[str, Any]) -> None:
        """Restores tables and attributes, in the order that they had."""
        half, before = len(self.entries) // 2, list[dict[str, Any]]()
        names, values = iter(self.entries[:half]), iter(self.entries[half:])
        for size in self.sizes:
            before.append(dict(zip(islice(names, size), islice(values, size), strict=True)))
        attributes, *tables = before
        for name, table in zip(compat.TABLES, tables, strict=True):
            if not _same(table, own[name]):
                self.changed = True
                own[name].clear()
                own[name].update(table)
        for name in [one for one in own if one not in attributes and one not in _BASE]:
            self.changed = True
            del own[name]
        for name, value in attributes.items():
            if name not in _BASE and own.get(name, own) is not value:
                self.changed = True
                own[name] = value
        if list(own) != list(attributes):
            for name in attributes:
                own[name] = own.pop(name)

    def _rewritten(self, number: int, graphs: bool) -> bool:
        """Whether a tensor that was written to has its numbers again."""
        tensor, copy = self.tensors[number][1], self.copies.get(number)
        if copy is None:
            return False
        with suppress(RuntimeError), torch.no_grad(), torch.inference_mode(False):
            tensor.copy_(copy)
            if not graphs:
                # As if it had never been written to, for graphs that the user holds from before.
                with suppress(Exception):
                    compat.set_version(tensor, self.versions[number])
            return True
        return False

    def replace_inference(self, made: dict[int, Tensor]) -> None:
        """Replaces tensors of inference mode, which have no gradients, by copies, `made` so far."""
        for name in compat.TABLES[:2]:
            table = vars(self.module)[name]
            for key, one in table.items():
                if isinstance(one, Tensor) and one.is_inference():
                    if id(one) not in made:
                        copy, wanted = one.clone(), one.requires_grad
                        is_parameter = isinstance(one, nn.Parameter)
                        made[id(one)] = nn.Parameter(copy, wanted) if is_parameter else copy
                    table[key] = made[id(one)]


def _is_plain(value: object) -> bool:
    """A number, text or such, or several, as the sizes of a convolution's kernel are."""
    if type(value) is tuple:
        return _PLAIN.issuperset(map(type, value))
    return type(value) in _PLAIN


class _Container:
    """A container of a module's, and its entries as they were; None where there are too many."""

    __slots__ = ("before", "length", "name", "now")

    def __init__(self, name: str, now: Any) -> None:
        self.name, self.now, self.length = name, now, len(now)
        copied = dict if isinstance(now, dict) else list
        self.before: Any = copied(now) if self.length <= LONG else None

    def changed(self) -> bool:
        if self.before is None or len(self.now) != self.length:
            return len(self.now) != self.length
        if isinstance(self.now, dict):
            return not _same(self.before, self.now)
        if isinstance(self.now, set):
            return set(map(id, self.now)) != set(map(id, self.before))
        return not all(map(is_, self.before, self.now))

    def restore(self) -> bool:
        if self.before is None:
            return False
        # Of subclasses, too, without what they do when they are written to.
        kind = next(one for one in _CONTAINERS if isinstance(self.now, one))
        kind.clear(self.now)
        add: Any = list.extend if kind is list else getattr(kind, "update", deque.extend)
        add(self.now, self.before)
        return True


def _entries(own: dict[str, Any]) -> tuple[list[int], list[Any]]:
    """The sizes of a module's attributes and tables, and all of their names and values."""
    parts = own, *_tables_of(own)
    values = chain.from_iterable([one.values() for one in parts])
    return [len(one) for one in parts], [*chain.from_iterable(parts), *values]


def _same(before: dict[Any, Any], now: dict[Any, Any]) -> bool:
    """Whether a dictionary has the same keys in the same order, and the very same values."""
    if not now:
        return not before
    same = len(before) == len(now) and all(map(is_, before.values(), now.values()))
    return same and list(before) == list(now)


class _Outline:
    """What the modules of a model hold, by name, where no call has to copy or to restore any of it.

    names: of their attributes, tables' entries and unsaved buffers. tensors, settings, others:
    where parameters and buffers, numbers and text, and other attributes of the modules' own are
    among the values. plain: the settings; kinds: types of the others, which may hold the model.
    sizes, transient: by module, as snapshots have them.
    """

    def __init__(self, snapshots: Sequence[_Snapshot]) -> None:
        names, values, own = list[str](), list[Any](), list[int]()
        self.tensors = list[int]()
        for one in snapshots:
            start, half, size = len(names), len(one.entries) // 2, one.sizes[0]
            own += [start + n for n, name in enumerate(one.entries[:size]) if name not in _BASE]
            self.tensors += range(start + size, start + sum(one.sizes[:3]))
            names += one.entries[:half]
            values += one.entries[half:]
        self.names = [*names, *chain.from_iterable(one.transient for one in snapshots)]
        self.settings = [n for n in own if _is_plain(values[n])]
        self.plain = [values[n] for n in self.settings]
        self.others = [n for n in own if not _is_plain(values[n])]
        self.kinds = [type(values[n]) for n in self.others]
        self.sizes = [one.sizes for one in snapshots]
        self.transient = [one.transient for one in snapshots]

    @classmethod
    def of(cls, snapshots: Sequence[_Snapshot]) -> _Outline | None:
        """Of a model that a call has left; None where the next one may have to copy or restore."""
        for one in snapshots:
            tables = one.entries[len(one.entries) // 2 + one.sizes[0] :]
            held = sum(value is not None for value in tables[: sum(one.sizes[1:3])])
            if one.inference or one.containers or one.changed or one.overwritten:
                return None
            if one.overwritten is None or len(one.tensors) != held or one.module in _CHANGING:
                return None
        return cls(snapshots)

    def fits(self, names: list[str], values: list[Any]) -> bool:
        """Whether modules hold what it says, but for the numbers in their tensors."""
        if names != self.names or [type(values[n]) for n in self.others] != self.kinds:
            return False
        return all(map(is_, [values[n] for n in self.settings], self.plain))


class _Glance:
    """A model as it was, without snapshots of its modules, which are made where they are needed."""

    def __init__(self, modules: list[nn.Module], outline: _Outline) -> None:
        self.modules, self.outline = modules, outline
        names, self.values = _listed(modules)
        self.versions = self._versions(self.values) if outline.fits(names, self.values) else None

    def _versions(self, values: list[Any]) -> list[int | None] | None:
        """How often each tensor was written to; None where that is not counted."""
        tensors = [values[n] for n in self.outline.tensors]
        try:
            return [None if one is None else compat.version_of(one) for one in tensors]
        except (AttributeError, RuntimeError):
            return None

    def unchanged(self) -> bool:
        names, values = _listed(self.modules)
        same = len(values) == len(self.values) and all(map(is_, values, self.values))
        return same and names == self.outline.names and self._versions(values) == self.versions

    def snapshots(self) -> list[_Snapshot]:
        """Of the modules, as they were."""
        outline, found, start = self.outline, list[_Snapshot](), 0
        assert self.versions is not None
        versions = iter([one for one in self.versions if one is not None])
        for n, module in enumerate(self.modules):
            end = start + sum(outline.sizes[n])
            entries = [*outline.names[start:end], *self.values[start:end]]
            one = _Snapshot(module, outline.sizes[n], entries)
            one.versions = [*islice(versions, len(one.tensors))]
            one.transient, one.overwritten, start = outline.transient[n], set(), end
            found.append(one)
        return found


def _listed(modules: Iterable[nn.Module]) -> tuple[list[str], list[Any]]:
    """The names of all that modules hold, and the values."""
    parts, unsaved = list[dict[str, Any]](), list[set[str]]()
    for one in modules:
        own = vars(one)
        parts += (own, *_tables_of(own))
        unsaved.append(own[compat.TRANSIENT])
    values = chain.from_iterable([one.values() for one in parts])
    return [*chain.from_iterable(parts), *chain.from_iterable(unsaved)], [*values]


class _Hold:
    """What a call holds. runs: of the model so far; changing: modules that change when it runs;
    graphs: whether graphs of its runs live on; rewinds: whether its runs begin with the held state.
    """

    def __init__(self, held: list[_Snapshot] | _Glance, rewinds: bool) -> None:
        self.glance = held if isinstance(held, _Glance) else None
        self.snapshots = [] if isinstance(held, _Glance) else held
        self.rewinds, self.runs, self.graphs = rewinds, 0, False
        self.thread = threading.get_ident()
        known = self.snapshots if _CHANGING else ()
        self.changing = [one for one in known if one.module in _CHANGING]

    @classmethod
    def glanced(cls, model: object, *, rewinds: bool) -> _Hold | None:
        """A call's hold of a model that looks as the last call has left it, in evaluation mode,
        where nobody else holds any.
        """
        with _LOCK:
            if _SNAPSHOTS or _GLANCED or _MODES or not isinstance(model, nn.Module):
                return None
            outline = _OUTLINES.get(model)
            if outline is None:
                return None
            glance = _Glance(modules_of(model), outline)
            if glance.versions is None:
                # The next call makes another.
                del _OUTLINES[model]
            if glance.versions is None or any(one.training for one in glance.modules):
                return None
            hold = cls(glance, rewinds)
            _GLANCED.append(hold)
            return hold

    def __enter__(self) -> _Hold:
        _LOCAL.holds.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _LOCAL.holds.remove(self)
        with _LOCK:
            if self.glance is not None and self.glance.unchanged():
                _GLANCED.remove(self)
                return
            self.expand()
            lost = self._leave()
        if lost:
            paths = [path for one in self.snapshots for path in one.module.named_modules()]
            names = {id(one): path for path, one in reversed(paths)}
            shown = [f"{names[id(one)]}.{name}".lstrip(".") for one, name in lost]
            more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
            warn(
                f"the model changed {', '.join(shown[:_NAMED])}{more} while it was explained, and "
                "that could not be put back: look whether its forward() writes to it"
            )

    def expand(self) -> None:
        """Snapshots in the place of a glance."""
        if self.glance is not None:
            self.snapshots, self.glance = self.glance.snapshots(), None
            _GLANCED.remove(self)
            for one in self.snapshots:
                one.users, one.thread = 1, self.thread
                _SNAPSHOTS[one.module] = one

    def _leave(self) -> list[tuple[nn.Module, str]]:
        """Restores the modules that no other call holds; returns what could not be restored."""
        lost, left = list[tuple[nn.Module, str]](), list[_Snapshot]()
        for one in self.snapshots:
            one.users -= 1
            if not one.users:
                del _SNAPSHOTS[one.module]
                lost += [(one.module, name) for name in one.restore(graphs=self.graphs)]
                left.append(one)
        whole = bool(left) and len(left) == len(self.snapshots)
        if whole and left[0].module not in _OUTLINES and (outline := _Outline.of(left)):
            _OUTLINES[left[0].module] = outline
        return lost


def rewind(*, counts: bool = True) -> None:
    """Restores the state that earlier runs of the innermost call changed, unless threads share it.
    counts: whether the run leaves its changes for the next one to restore.
    """
    if not _LOCAL.holds or not _LOCAL.holds[-1].rewinds:
        return
    hold = _LOCAL.holds[-1]
    hold.runs += counts
    second = counts and hold.runs == 2
    if not second and not hold.changing:
        return
    with _LOCK:
        if hold.glance is not None and hold.glance.unchanged():
            return
        hold.expand()
        for one in hold.snapshots if second else hold.changing:
            if one.thread is not None and not one.inference:
                one.restore(graphs=hold.graphs)
                if one.changed and one not in hold.changing:
                    hold.changing = [*hold.changing, one]


def keep_graphs() -> None:
    """Graphs of the innermost call's runs live on: their overwritten tensors are to fail."""
    if _LOCAL.holds:
        _LOCAL.holds[-1].graphs = True


@contextmanager
def preserved(model: object, *, rewinds: bool = True) -> Iterator[None]:
    """Restores what the model's modules (of a function those it reads or holds) change inside, when
    the last call that holds them leaves. Warns, by name, of what stays changed.
    """
    held, room, made = list[_Snapshot](), COPIED, dict[int, Tensor]()
    inside = torch.is_inference_mode_enabled()
    with _LOCK, torch.inference_mode(False) if inside else nullcontext(), torch.no_grad():
        for other in [*_GLANCED]:
            other.expand()
        thread = threading.get_ident()
        for module in modules_of(model):
            one = _SNAPSHOTS.get(module)
            if one is None:
                one = _SNAPSHOTS[module] = _Snapshot.of(module, room)
                if one.inference:
                    one.replace_inference(made)
                if one.copies:
                    room -= sum(copy.nbytes for copy in one.copies.values())
            elif one.thread != thread:
                one.thread = None
            one.users += 1
            held.append(one)
    with _Hold(held, rewinds):
        yield


def modules_of(model: object) -> list[nn.Module]:
    """The modules of a model but for compiled scripts and lazy modules without parameters."""
    several = []
    for one in below(_roots(model)):
        lazy = getattr(type(one), "has_uninitialized_params", None)
        if not isinstance(one, torch.jit.ScriptModule) and not (lazy and lazy(one)):
            several.append(one)
    return several


def below(roots: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """Modules and all inside of them, each once."""
    modules, left = dict[int, nn.Module](), list(roots)
    while left:
        module = left.pop()
        if id(module) not in modules:
            modules[id(module)] = module
            # As `children()`, which is slow where many are asked.
            left += [one for _, one in compat.own_modules(module).items() if one is not None]
    return modules.values()


def _roots(model: object, depth: int = 3) -> Iterator[nn.Module]:
    inside: list[object] = []
    if isinstance(model, nn.Module):
        yield model
    elif isinstance(model, functools.partial):
        inside += [model.func, *model.args, *model.keywords.values()]
    elif isinstance(model, MethodType):
        inside.append(model.__self__)
    elif isinstance(model, FunctionType):
        for cell in model.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                inside.append(cell.cell_contents)
        read = (model.__globals__.get(name) for name in model.__code__.co_names)
        inside += [one for one in read if isinstance(one, nn.Module)]
    elif not isinstance(model, type):
        inside += getattr(model, "__dict__", {}).values()
    for one in inside if depth else ():
        yield from _roots(one, depth - 1)
