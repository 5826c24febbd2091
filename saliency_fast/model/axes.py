"""Layouts of inputs: which axis holds channels and which are places, by letters such as "BTCHW"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError, warn

LETTERS = "BCFTDHW"
LayoutLike = str | Sequence[str | None] | None
"""One letter per axis of an input, or a tuple of such strings, one per input (None: found)."""

_CANDIDATES = {
    3: "'BCT' (channels first, as torch.nn.Conv1d takes them), 'BTF' (steps first, features last) "
    "or 'BHW' (a picture without a channel axis)",
    4: "'BCHW' (channels first) or 'BHWC' (channels last)",
    5: "'BCDHW' (a volume), 'BCTHW' or 'BTCHW' (a clip)",
}
_CONVENTION = {4: "BCHW"}
"""Where neither the caller nor the model tells: as PyTorch takes pictures, with a warning."""


class LayoutWarning(UserWarning):
    """A layout was taken by convention, which neither the caller nor the model tells."""


@dataclass(frozen=True)
class Axes:
    """The layout of an input: one letter for each axis.

    B is the batch, C channels, F features, T time, D, H and W space. Channels are C, or F where
    there is no C; all further axes behind the batch are places. Inputs [B, F] and [B, T] are places
    alone. The standard form is [B, C, *places], with one channel where there is none, and [B, F]
    of tables.
    """

    letters: str

    @cached_property
    def channel(self) -> int | None:
        """The axis of the channels, None where each place has one number."""
        if len(self.letters) == 2:
            return None
        found = max(self.letters.find("C"), -1)
        found = self.letters.find("F") if found < 0 else found
        return None if found < 0 else found

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The axes behind the batch that are no channels, in their order."""
        return tuple(axis for axis in range(1, len(self.letters)) if axis != self.channel)

    @property
    def spatial(self) -> bool:
        """Whether neighbours on its places are neighbours in time or space: not so of tables."""
        return len(self.letters) > 2 or self.letters == "BT"

    @property
    def is_standard(self) -> bool:
        """Whether the standard form is this one."""
        return self.channel == 1 or not self.spatial

    def standard(self, x: Tensor, lead: int = 1) -> Tensor:
        """`x`, laid out so behind its `lead` axes, as a view [*lead, C, *places]."""
        if not self.spatial:
            return x
        if self.channel is None:
            return x.unsqueeze(lead)
        return x.movedim(self.channel - 1 + lead, lead)

    def back(self, x: Tensor, lead: int = 1) -> Tensor:
        """The reverse of `standard`; [*lead, 1, *places] where channels were summed."""
        if not self.spatial:
            return x
        if self.channel is None:
            return x.squeeze(lead)
        return x.movedim(lead, self.channel - 1 + lead)

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the places of an input of `shape` [B, ...]."""
        return tuple(shape[axis] for axis in self.places)


class Layouts:
    """The layouts of a call's inputs: those that were given, and others when they are asked for.

    find: from nothing to the letters of each input, None where the model does not tell;
    look(layers, of_input): to where the elements of layers lie in the inputs.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        given: LayoutLike = None,
        find: Callable[[], Sequence[str | None]] | None = None,
        look: Callable[..., Any] | None = None,
    ) -> None:
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self._letters = _read(given, self.shapes)
        self.given = tuple(one is not None for one in self._letters)
        self._find, self._look = find, look
        self._warned = False

    @property
    def letters(self) -> tuple[str | None, ...]:
        """Of each input, None where neither the caller nor the model tells."""
        if None in self._letters and self._find is not None:
            find, self._find = self._find, None
            pairs = zip(self._letters, find(), strict=True)
            self._letters = tuple(one or other for one, other in pairs)
        return self._letters

    def saying(self, letters: Sequence[str | None]) -> Layouts:
        """The same with what the model says of its inputs."""
        found = Layouts(self.shapes, None, None, self._look)
        pairs = zip(self._letters, letters, strict=True)
        found._letters, found.given = tuple(one or other for one, other in pairs), self.given
        return found

    def knowing(self, letters: Sequence[str | None]) -> Layouts:
        """The same with the layouts of some inputs known; the others are still looked for."""
        found = self.saying(letters)
        found._find = self._find
        return found

    def released(self) -> Layouts:
        """The same for a result, which holds no more of the model than is needed to find them."""
        found = Layouts(self.shapes, None, self._find)
        found._letters, found.given = self._letters, self.given
        return found

    def inside(self, layers: Sequence[Any] = (), of_input: bool = False) -> Any:
        """Where the elements of layers lie, `follow.Inside`; None where that cannot be told."""
        return None if self._look is None else self._look(layers, of_input)

    @property
    def settled(self) -> tuple[str | None, ...]:
        """The same, without looking at the model."""
        return self._letters

    @property
    def told(self) -> str:
        """The layouts in words, with who says so."""
        parts = []
        for number, shape in enumerate(self.shapes):
            found = self.of(number)
            if self.given[number]:
                parts.append(f"{self._letters[number]}, as given")
            elif self.letters[number] is not None:
                parts.append(f"{self.letters[number]}, by the model's first layer that tells")
            elif found is None:
                parts.append(f"not known of {list(shape)}: pass layout= where it matters")
        return "; ".join(parts)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getstate__(self) -> dict[str, Any]:
        # What finds them holds the model.
        return {**self.released().__dict__, "_letters": self.letters, "_find": None}

    def of(self, number: int) -> Axes | None:
        """The layout of an input, None where it is not known."""
        if len(self.shapes[number]) == 2 and self._letters[number] is None:
            return Axes("BF")
        found = self.letters[number]
        return None if found is None else Axes(found)

    def need(self, number: int, what: str) -> Axes:
        """The layout of an input; raises an InputError that asks for it, on behalf of `what`."""
        found = self.of(number)
        if found is not None:
            return found
        shape = self.shapes[number]
        letters = _CONVENTION.get(len(shape))
        name = f"input {number}" if len(self) > 1 else "the input"
        if letters is None:
            such = _CANDIDATES.get(len(shape), "one of B, C, F, T, D, H, W for each axis")
            raise InputError(
                f"{what} depends on which axis of {name} {list(shape)} holds its channels, and the "
                "model does not tell (no convolution or recurrent layer that the input reaches by "
                f"moved axes alone): pass layout=, such as {such}"
            )
        if not self._warned:
            self._warned = True
            warn(
                f"{what} depends on which axis of {name} {list(shape)} holds its "
                f"channels, and the model does not tell: taken as layout={letters!r}, channels "
                "first; pass layout= to say so, or 'BHWC' for channels last",
                LayoutWarning,
            )
        return Axes(letters)

    def spatial(self, number: int, what: str) -> Axes:
        """The same, of an input whose neighbouring places are neighbours in time or space."""
        if len(self.shapes[number]) > 2:
            return self.need(number, what)
        found = self.letters[number]
        if found is None or not (axes := Axes(found)).spatial:
            name = f"input {number} " if len(self) > 1 else ""
            raise InputError(
                f"{what} needs axes of time or space: got {name}{list(self.shapes[number])}; pass "
                "layout='BT' if its second axis is time, or a baseline that is a number, a tensor "
                "or 'mean'"
            )
        return axes

    def usual(self, number: int) -> Axes | None:
        """The layout of an input, by convention where it is not known."""
        letters = _CONVENTION.get(len(self.shapes[number]))
        return self.of(number) or (None if letters is None else Axes(letters))

    def needed(self, what: str) -> tuple[Axes, ...]:
        return tuple(self.need(number, what) for number in range(len(self)))


def standard_layouts(inputs: Sequence[Tensor]) -> Layouts:
    """The layouts of inputs that are in their standard form."""
    names = {2: "BF", 3: "BCT", 4: "BCHW", 5: "BCDHW", 6: "BCTDHW"}
    return Layouts([x.shape for x in inputs], tuple(names.get(x.dim()) for x in inputs))


def _read(given: LayoutLike, shapes: tuple[tuple[int, ...], ...]) -> tuple[str | None, ...]:
    """What the caller said of each input; raises InputError or InputTypeError with the cure."""
    if given is None:
        return (None,) * len(shapes)
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, (tuple, list)):
        raise InputTypeError(
            "layout must be a string with one letter per axis, such as 'BTF', or a tuple of them, "
            f"one per input: got {type(given).__name__}"
        )
    if len(parts) != len(shapes):
        raise InputError(
            f"layout: expected one for each of {len(shapes)} inputs: got {given!r}; pass a tuple, "
            "with None where the model tells"
        )
    return tuple(_letters(one, shape) for one, shape in zip(parts, shapes, strict=True))


def _letters(given: Any, shape: tuple[int, ...]) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise InputTypeError(f"layout must be a string such as 'BTF': got {given!r}")
    letters = given.upper()
    known = set(letters) <= set(LETTERS) and len(set(letters)) == len(letters)
    if not known or not letters.startswith("B"):
        raise InputError(
            f"layout has one letter per axis, each once, and B, the batch, first: got {given!r}; "
            "C is channels, F features, T time, D, H and W space, as in 'BCHW' or 'BTF'"
        )
    if len(letters) != len(shape):
        raise InputError(
            f"layout must have one letter for each axis of the input {list(shape)}: got {given!r}, "
            f"expected {len(shape)} letters, such as {_CANDIDATES.get(len(shape), 'BF')}"
        )
    return letters
