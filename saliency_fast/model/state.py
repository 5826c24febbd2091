"""State: what a model changes of itself while it runs, put back afterwards.

A model may keep its last input, count its calls, cache masks by batch size or update a moving
average. While it is explained it runs on points, which its user never gave it. So attributes,
buffers, parameters and submodules of its modules come back as they were: attributes by identity,
lists, dictionaries and sets by their entries, tensors by PyTorch's count of in-place writes. Before
each run it comes back, too: a point's score is what the model says as the caller handed it over,
whatever ran before.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter, is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.errors import warn

COPIED = 64 * 1024**2
"""Bytes of buffers that are copied before a model's first call, in case it overwrites them."""
LONG = 100_000
"""Entries of a container above which only its length is compared."""
NESTED = 1000
"""Entries of a container up to which what it holds counts, too."""
_TABLES = ("_parameters", "_buffers", "_modules")
_BASE = frozenset(vars(nn.Module()))
"""Attributes of every module: modes, tables and hooks, which are put back elsewhere."""
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
_CONTAINERS = (OrderedDict, dict, list, set, deque)
_versions = attrgetter("_version")
_LOCK = threading.Lock()


class _Kept:
    """A module as it was before the first of the calls that hold it.

    overwritten: names of the tensors that it is known to write to, None before its first call.
    room: bytes of tensors that may be copied. thread: the one that all calls are of, None for
    several. moved: whether `restore` last found anything changed.
    """

    __slots__ = (
        "attributes", "containers", "copies", "holders", "inference", "module", "moved", "names",
        "tables", "tensors", "thread", "transient", "versions",
    )  # fmt: skip

    def __init__(self, module: nn.Module, overwritten: set[str] | None, room: int) -> None:
        own = vars(module)
        self.module, self.holders, self.inference = module, 0, False
        self.thread: int | None = threading.get_ident()
        self.moved = False
        self.attributes = own.copy()
        self.tables = [own[name].copy() for name in _TABLES]
        self.transient = own["_non_persistent_buffers_set"].copy()
        self.containers: list[_Container] = []
        parameters, buffers, _ = self.tables
        self.names, self.tensors = list(parameters), list(parameters.values())
        for name, value in buffers.items():
            self._add(name, value)
        if len(own) > len(_BASE):
            for name, value in own.items():
                if type(value) not in _PLAIN and name not in _BASE:
                    self._gather(name, value, set(), NESTED)
        try:
            self.versions = list(map(_versions, self.tensors))
        except (RuntimeError, AttributeError):
            # Inference tensors count no writes, and take none outside of their mode.
            self.inference = True
            pairs = zip(self.names, self.tensors, strict=True)
            several = [(n, t) for n, t in pairs if isinstance(t, Tensor) and not t.is_inference()]
            self.names, self.tensors = [n for n, _ in several], [t for _, t in several]
            self.versions = list(map(_versions, self.tensors))
        self.copies = self._copied(parameters, overwritten, room)

    def _add(self, name: str, value: Any) -> None:
        self.names.append(name)
        self.tensors.append(value)

    def _gather(self, name: str, value: Any, seen: set[int], most: int) -> None:
        """Notes the containers and tensors in an attribute."""
        if isinstance(value, Tensor):
            self._add(name, value)
        elif isinstance(value, (*_CONTAINERS, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if not isinstance(value, tuple):
                self.containers.append(_Container(name, value))
            if len(value) <= most:
                for one in list(value.values() if isinstance(value, dict) else value):
                    if type(one) not in _PLAIN:
                        self._gather(name, one, seen, most)

    def _copied(
        self, parameters: dict[str, Any], overwritten: set[str] | None, room: int
    ) -> dict[int, Tensor]:
        """Copies of tensors that may be overwritten: at first all but parameters."""
        if self.module.training:
            # As batch normalisation does.
            overwritten = None
        if overwritten is not None and not overwritten:
            return {}
        copies: dict[int, Tensor] = {}
        for number, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True)):
            wanted = name not in parameters and (overwritten is None or name in overwritten)
            # Layouts of their own, such as sparse ones, can be told by their versions alone.
            plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
            if wanted and plain and tensor.nbytes <= room:
                copies[number] = tensor.detach().clone()
                room -= tensor.nbytes
        return copies

    def restore(self, *, graphs: bool = False) -> tuple[list[str], list[str]]:
        """Puts the module back; names of the tensors that it wrote to, and of what is lost.
        graphs: whether graphs of its runs live on, which are to know that it was written to.
        """
        own, self.moved = vars(self.module), False
        for name, before in zip(_TABLES, self.tables, strict=True):
            if not _same(before, own[name]):
                self.moved = True
                own[name].clear()
                own[name].update(before)
        if (transient := own["_non_persistent_buffers_set"]) != self.transient:
            transient.clear()
            transient.update(self.transient)
        if not _same(self.attributes, own):
            self._attributes(own)
        changed = [one for one in self.containers if one.changed()]
        lost = [one.name for one in changed if not one.restore()]
        now = list(map(_versions, self.tensors))
        wrote = [n for n, was in enumerate(self.versions) if now[n] != was]
        # Batch normalisation writes to its statistics without counting.
        wrote += [n for n, copy in self.copies.items() if not torch.equal(copy, self.tensors[n])]
        self.moved |= bool(changed or wrote)
        written = [self.names[n] for n in dict.fromkeys(wrote)]
        left = [n for n in dict.fromkeys(wrote) if not self._rewritten(n, graphs=graphs)]
        lost += [self.names[n] for n in left]
        return written, lost

    def replace_inference(self, made: dict[int, Tensor]) -> None:
        """Puts copies in the place of parameters and buffers that were made in inference mode, and
        cannot take part in gradients; `made`: those of the tensors that modules share.
        """
        for name in ("_parameters", "_buffers"):
            table = vars(self.module)[name]
            for key, one in table.items():
                if isinstance(one, Tensor) and one.is_inference():
                    if id(one) not in made:
                        copy = one.clone()
                        wanted = one.requires_grad
                        is_parameter = isinstance(one, nn.Parameter)
                        made[id(one)] = nn.Parameter(copy, wanted) if is_parameter else copy
                    table[key] = made[id(one)]

    def _attributes(self, own: dict[str, Any]) -> None:
        for name in [one for one in own if one not in self.attributes and one not in _BASE]:
            self.moved = True
            del own[name]
        for name, value in self.attributes.items():
            if name not in _BASE and own.get(name, own) is not value:
                self.moved = True
                own[name] = value
        if list(own) != list(self.attributes):
            for name in self.attributes:
                own[name] = own.pop(name)

    def _rewritten(self, number: int, *, graphs: bool) -> bool:
        tensor, copy = self.tensors[number], self.copies.get(number)
        if copy is None:
            return False
        with suppress(RuntimeError), torch.no_grad(), torch.inference_mode(False):
            tensor.copy_(copy)
            if graphs:
                return True
            # As if it had never been written to, for graphs that the user holds from before.
            with suppress(Exception):
                was = (self.versions[number],)
                torch._C._autograd._unsafe_set_version_counter((tensor,), was)
            return True
        return False


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


def _same(before: dict[Any, Any], now: dict[Any, Any]) -> bool:
    """Whether a dictionary has the same keys in the same order, and the very same values."""
    alike = len(before) == len(now) and all(map(is_, before.values(), now.values()))
    return alike and list(before) == list(now)


_KEPT: dict[int, _Kept] = {}
"""Modules that calls hold, by their ids."""
_OVERWRITTEN: dict[int, tuple[weakref.ref[nn.Module], set[str]]] = {}
"""Names of the tensors that modules write to, of every module that was held once."""


_MOVING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that were seen to change when they run."""


class _Hold:
    """What a call holds. runs: of the model so far; moving: modules that change when it runs;
    graphs: whether graphs of its runs live on. rewinds: whether its runs begin with the state as it
    was held, not where a user may change the model meanwhile.
    """

    def __init__(self, kept: list[_Kept], rewinds: bool) -> None:
        self.kept, self.runs, self.graphs, self.rewinds = kept, 0, False, rewinds
        self.moving = [one for one in kept if one.module in _MOVING] if _MOVING else []


class _Holds(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Hold] = []


_HOLDS = _Holds()
"""What this thread's calls hold, the innermost last."""


def rewind(*, counts: bool = True) -> None:
    """Puts the state back that earlier runs of the innermost call changed; to be called before each
    run of its model. The second run tells which modules change. Calls of several threads at once
    leave it as it is. counts: whether the run leaves its changes to be seen by the next.
    """
    if not _HOLDS.stack or not _HOLDS.stack[-1].rewinds:
        return
    hold = _HOLDS.stack[-1]
    hold.runs += counts
    several = hold.kept if counts and hold.runs <= 2 else hold.moving
    if not several:
        return
    with _LOCK:
        for kept in several:
            if kept.thread is None or kept.inference:
                continue
            written, _ = kept.restore(graphs=hold.graphs)
            _note(kept.module, written)
            if kept.moved and kept not in hold.moving:
                _MOVING.add(kept.module)
                hold.moving = [*hold.moving, kept]


def keep_graphs() -> None:
    """Graphs of the innermost call's runs live on: where its model writes to what they keep,
    PyTorch is to say so on the way back.
    """
    if _HOLDS.stack:
        _HOLDS.stack[-1].graphs = True


@contextmanager
def preserved(model: object, *, rewinds: bool = True) -> Iterator[None]:
    """Runs its body; puts back what the model's modules change of themselves meanwhile.

    Of a plain function, the modules that it closes over, reads by name or is bound to. Several
    calls may hold a module at once: it comes back when the last of them leaves. Warns of what
    cannot be put back, by name.
    """
    held: list[_Kept] = []
    room, made = COPIED, dict[int, Tensor]()
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        for module in modules_of(model):
            kept = _KEPT.get(id(module))
            if kept is None:
                kept = _KEPT[id(module)] = _Kept(module, _overwritten(module), room)
                if kept.inference:
                    kept.replace_inference(made)
                if kept.copies:
                    room -= sum(one.nbytes for one in kept.copies.values())
            elif kept.thread != threading.get_ident():
                kept.thread = None
            kept.holders += 1
            held.append(kept)
    lost: list[tuple[nn.Module, str]] = []
    hold = _Hold(held, rewinds)
    _HOLDS.stack.append(hold)
    try:
        yield
    finally:
        _HOLDS.stack.remove(hold)
        with _LOCK:
            for kept in held:
                kept.holders -= 1
                if kept.holders == 0:
                    del _KEPT[id(kept.module)]
                    written, gone = kept.restore(graphs=hold.graphs)
                    _note(kept.module, written)
                    if kept.moved:
                        _MOVING.add(kept.module)
                    lost += [(kept.module, name) for name in gone]
        if lost:
            _tell(held, lost)


def _overwritten(module: nn.Module) -> set[str] | None:
    known = _OVERWRITTEN.get(id(module))
    return known[1] if known is not None and known[0]() is module else None


def _note(module: nn.Module, written: list[str]) -> None:
    known = _overwritten(module)
    if known is None:
        key = id(module)
        reference = weakref.ref(module, lambda _: _OVERWRITTEN.pop(key, None))
        _OVERWRITTEN[key] = reference, set(written)
    elif written:
        known.update(written)


def modules_of(model: object) -> list[nn.Module]:
    """The modules that a model is made of, apart from those that keep their state elsewhere:
    compiled scripts, and lazy modules, whose parameters are made by their first call.
    """
    found: dict[int, nn.Module] = {}
    left = list(_roots(model))
    while left:
        module = left.pop()
        if id(module) in found or module is None:
            continue
        found[id(module)] = module
        left.extend(module._modules.values())  # type: ignore[arg-type]
    return [one for one in found.values() if _is_plain(one)]


def _is_plain(module: nn.Module) -> bool:
    lazy = getattr(type(module), "has_uninitialized_params", None)
    return not isinstance(module, torch.jit.ScriptModule) and not (lazy and lazy(module))


def _roots(model: object, depth: int = 3) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield model
    elif depth and isinstance(model, functools.partial):
        for one in (model.func, *model.args, *model.keywords.values()):
            yield from _roots(one, depth - 1)
    elif depth and isinstance(model, MethodType):
        yield from _roots(model.__self__, depth - 1)
    elif depth and isinstance(model, FunctionType):
        for cell in model.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                yield from _roots(cell.cell_contents, depth - 1)
        for name in model.__code__.co_names:
            if isinstance(one := model.__globals__.get(name), nn.Module):
                yield one
    elif depth and not isinstance(model, type):
        for one in getattr(model, "__dict__", {}).values():
            yield from _roots(one, depth - 1)


def _tell(held: list[_Kept], lost: list[tuple[nn.Module, str]]) -> None:
    names: dict[int, str] = {}
    for kept in held:
        for name, one in kept.module.named_modules():
            names.setdefault(id(one), name)
    shown = [f"{names[id(one)]}.{name}".lstrip(".") for one, name in lost]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    warn(
        f"the model changed {', '.join(shown[:8])}{more} while it was explained, and that could "
        "not be put back: look whether its forward() writes to it"
    )
