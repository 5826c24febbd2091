"""Targets: which scalar of the model's output is explained, per example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.model.casts import cast
from saliency_fast.model.failures import BY_ARGUMENT, BY_EXAMPLE, TARGET, Failing
from saliency_fast.model.padding import Padding, padding_of, read_mask
from saliency_fast.model.positions import PREDICTED as PREDICTED
from saliency_fast.model.positions import NextToken, own_tokens, token_axis


@runtime_checkable
class Reader(Protocol):
    """A target that reads `count` numbers of every row, which may depend on the row's example."""

    @property
    def count(self) -> int: ...

    def read(self, raw: Any, item: Tensor) -> Tensor:
        """Scores [R, count] of the rows of examples `item` [R], from what the model returned."""


Target = (
    NextToken
    | int
    | str
    | Tensor
    | np.ndarray[Any, Any]
    | np.generic
    | Sequence[Any]
    | tuple[Any, ...]
    | Callable[..., Tensor]
    | Reader
    | None
)
NAME, POSITION = "example", "position"
"""How a target function takes the indices of the rows' examples."""
PLACES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference up to which scores of equal rows are equal, to rounding; 1e-2 in half types.
"""

_EACH = (
    "read each row of the output by itself, such as target=lambda output: output[:, 1], without a "
    "sum or a mean over the rows"
)
_PARTS = (
    "; one result of the whole batch cannot be explained row by row: where the rows are parts of "
    "one input, such as the nodes of a graph, use rows='together' and a target function that reads "
    "one number, such as target=lambda output: output[0, 1]"
)


@dataclass(frozen=True)
class Targets:
    """K scalars per example, read from the output of a batch of points.

    `classes` int64 [B, K] names columns of an output [R, C]; `places` int64 [B, D] names one
    element of an output [R, ...] per example; `index` is a tuple into the output behind its batch
    axis, summed over what it leaves; `mask` weights what `index` leaves; `function` is the user's
    own, called with the output and, where `example` says how, the indices int64 [R] of the examples
    that the rows belong to. All of them None is the scalar output. `predicted` waits for the first
    forward pass at the inputs. `position` int64 [B]: which place of an output [R, T, V] is read as
    one [R, V]; negative from the last. Positions are counted among tokens that are no padding,
    which `padding` tells of; `masked`: by the user's own mask.
    """

    batch: int
    classes: Tensor | None = None
    places: Tensor | None = None
    index: tuple[Any, ...] | None = None
    mask: Tensor | None = None
    function: Callable[..., Tensor] | Reader | None = None
    example: str = ""
    predicted: bool = False
    many: bool = False
    position: Tensor | None = None
    padding: Padding = field(default_factory=Padding)
    masked: bool = False

    @property
    def count(self) -> int:
        """K, the number of maps per example."""
        if isinstance(self.function, Reader):
            return self.function.count
        return 1 if self.classes is None else self.classes.shape[1]

    def to(self, device: torch.device) -> Targets:
        """Copies on `device`, apart from the user's own tensors."""
        moved = {
            name: value.to(device, copy=True)
            for name in ("classes", "places", "mask", "position")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved, padding=self.padding.to(device))

    @property
    def counts(self) -> bool:
        """Whether it names places of a sequence, so that padding matters."""
        return self.position is not None or self.places is not None or bool(self.index)

    def read(self, raw: Any, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] of the rows of examples `item` [R], and the classes [R, K] chosen."""
        if self.function is not None:
            return self._call(raw, item), None
        output = tensor_of(raw)
        if output.dim() == 0 or output.shape[0] != item.numel():
            raise self._wrong_rows(output, item.numel())
        if self.position is not None:
            output = self._after(output, item)
        if self.predicted and self.classes is None:
            _need_matrix(output, "target='predicted'")
            classes = output.detach().argmax(1, keepdim=True)
            return output.gather(1, classes), classes
        if self.classes is not None:
            _need_matrix(output, "an integer target")
            classes = self.classes[item]
            return output.gather(1, classes), classes
        return self._structured(output, item)[:, None], None

    def check(self, raw: Any, item: Tensor) -> torch.Size | None:
        """Raises where classes or indices lie outside the output, or a function depends on where a
        row stands; once, on the first output, of the rows of examples `item` [R].

        Returns the shape of an example's output, for `fit`; None where a function reads it.
        """
        if self.function is not None:
            self._need_any_place(raw, item)
            return None
        shape = tensor_of(raw).shape[1:]
        self.fit(shape)
        return shape

    def fit(self, shape: torch.Size) -> None:
        """Raises where classes or indices lie outside an example's output of that shape."""
        if self.position is not None:
            _need_sequence(shape)
            self.padding.places(self.position, shape[0])
            shape = shape[1:]
        if self.classes is not None and len(shape) == 1:
            _in_range(self.classes, shape[0])
        if self.places is not None:
            if self.places.shape[1] != len(shape):
                raise InputError(
                    f"target: each tuple must index the whole output {list(shape)} of an example: "
                    f"got {self.places.shape[1]} numbers, expected {len(shape)}"
                )
            self._placed(shape)

    def _after(self, output: Tensor, item: Tensor) -> Tensor:
        """The outputs [R, V] at the position of each row's example."""
        assert self.position is not None
        _need_sequence(output.shape[1:])
        place = self.padding.places(self.position, output.shape[1])
        return output[torch.arange(len(item), device=item.device), place[item]]

    def _placed(self, shape: torch.Size) -> Tensor:
        """`places` of outputs of that shape, int64 [B, D] from 0."""
        assert self.places is not None
        axis, found = token_axis(self.padding, shape, self.places), []
        for number, size in enumerate(shape):
            column = self.places[:, number]
            if number == axis:
                found.append(self.padding.places(column, size))
                continue
            _in_range(column, size)
            found.append(torch.where(column < 0, column + size, column))
        return torch.stack(found, 1)

    def _structured(self, output: Tensor, item: Tensor) -> Tensor:
        if self.places is not None:
            rows = torch.arange(len(item), device=item.device)
            places = (
                self._placed(output.shape[1:]) if self.padding.real is not None else self.places
            )
            # Negative ones count from the last by themselves: recorded launches read no numbers.
            return output[(rows, *places[item].unbind(1))]
        if self.index is None:
            if output[0].numel() != 1:
                raise InputError(
                    "target is missing: the model returns "
                    f"{list(output.shape[1:])} numbers per example, expected one; pass target=int, "
                    "one int per example, a tuple index, 'predicted', or a function of the output"
                )
            return output.reshape(-1)
        index = self.index
        try:
            axis = token_axis(self.padding, output.shape[1:], index)
            if axis is not None:
                whole = self.mask is not None
                output, index = own_tokens(self.padding, output, item, index, axis, whole=whole)
            picked = output[(slice(None), *index)]
        except IndexError as error:
            raise InputError(
                f"target {self.index!r} does not index an output of shape "
                f"{list(output.shape[1:])} per example: {error}"
            ) from error
        if self.mask is not None:
            shape = picked.shape[1:]
            if self.mask.shape not in (shape, (self.batch, *shape)):
                raise InputError(
                    f"target's mask must match what the index leaves: got {list(self.mask.shape)}, "
                    f"expected {list(shape)}, or that with a leading batch axis of {self.batch}"
                )
            picked = picked * (self.mask if self.mask.shape == shape else self.mask[item])
        return picked.reshape(len(item), -1).sum(1)

    def _call(self, raw: Any, item: Tensor) -> Tensor:
        assert self.function is not None
        if isinstance(self.function, Reader):
            return self.function.read(raw, item)
        with Failing(TARGET, item.numel(), self.batch):
            args, kwargs = (item,) * (self.example == POSITION), {NAME: item}
            scores = self.function(raw, *args, **(kwargs if self.example == NAME else {}))
        if not isinstance(scores, Tensor) or scores.shape != item.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"target: a function of the output must return one score per row: got {got}, "
                f"expected [{item.numel()}]{self._cure(got, item.numel())}"
            )
        return scores[:, None]

    def _cure(self, got: object, rows: int) -> str:
        """The cure of a function that returns something else than a score per row."""
        several = f", of inputs with {self.batch} examples" if self.batch != rows else ""
        return self._held(got, rows, BY_EXAMPLE) or f"{several}; {_EACH}"

    def _held(self, got: object, rows: int, cure: str) -> str:
        """The cure where an output has as many rows as there are examples, whatever was given."""
        several = isinstance(got, list) and got[:1] == [self.batch] != [rows]
        return f", of inputs with {self.batch} examples; {cure}" if several else ""

    def _wrong_rows(self, output: Tensor, rows: int) -> ModelError:
        got = list(output.shape)
        held = self._held(got, rows, BY_ARGUMENT)
        return ModelError(
            f"the model must return one row per input row: got {got} for a batch of {rows}"
            f"{held or _PARTS}"
        )

    def _need_any_place(self, raw: Any, item: Tensor) -> None:
        """Raises where a function scores equal rows differently: it holds something of the batch,
        which it takes by the places of rows. As many rows are tried as there are examples.
        """
        if isinstance(self.function, Reader) or self.batch == 1 or not _has_rows(raw, item):
            return
        raw, many = raw.detach(), [self.batch] + [-1] * (raw.dim() - 1)
        with torch.no_grad():
            # Copies: the function may write to what it gets.
            one = self._call(raw[:1].clone(), item[:1])
            all_of = self._call(raw[:1].expand(many).clone(), item[:1].expand(self.batch))
        if raw.is_meta:
            return
        size = PLACES.get(one.dtype, 1e-2) * max(float(one.abs().max()), float(raw[0].abs().max()))
        if not torch.allclose(all_of, one.expand_as(all_of), 0.0, size, equal_nan=True):
            raise InputError(
                "target: the function scores equal rows of the output differently: "
                f"{all_of.flatten()[:4].tolist()}. Rows are points made of the examples in any "
                f"order and number; {BY_EXAMPLE}"
            )


def _has_rows(raw: Any, item: Tensor) -> bool:
    return isinstance(raw, Tensor) and raw.shape[:1] == item.shape and raw.is_floating_point()


def _example_of(function: Callable[..., Any]) -> str:
    """How a function of the output takes the examples' indices, by its signature: `NAME` where it
    has a parameter of that name, `POSITION` where exactly two positional parameters have no
    default, "" where it takes none.
    """
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(one.name == NAME and one.kind is not one.POSITIONAL_ONLY for one in given):
        return NAME
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in given if one.kind in positional and one.default is one.empty]
    return POSITION if len(required) == 2 else ""


def read_of(raw: Any) -> Tensor | None:
    """The tensor to explain in a model's output, itself, or its `logits` or `out`; or None."""
    if isinstance(raw, Tensor):
        return raw
    for name in ("logits", "out"):
        found = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
        if isinstance(found, Tensor):
            return found
    return None


def tensor_of(raw: Any) -> Tensor:
    """The same; raises ModelError where there is none."""
    if (found := read_of(raw)) is not None:
        return found
    raise ModelError(
        f"the model must return a tensor (or an output with .logits): got {type(raw).__name__}; "
        "pass target=function to pick one from a structured output"
    )


def read_targets(target: Target, batch: int, *, signed: bool = False) -> Targets:
    """Validates `target` for a batch; raises InputError or InputTypeError with the cure.

    signed: whether ints may be negative, where they are positions.
    """
    if target is None:
        return Targets(batch)
    if isinstance(target, NextToken):
        return _next(target, batch)
    if isinstance(target, str):
        if target != PREDICTED:
            raise InputError(f"target: the only name is 'predicted': got {target!r}")
        return Targets(batch, predicted=True)
    if isinstance(target, Reader):
        return Targets(batch, function=target, many=True)
    if isinstance(target, bool):
        raise InputTypeError("target must be an int, a sequence, a tuple or a function: got bool")
    if isinstance(target, (np.ndarray, np.generic)):
        return read_targets(target.tolist(), batch, signed=signed)
    if isinstance(target, int):
        return Targets(
            batch, classes=_classes(torch.full((batch, 1), target, device="cpu"), signed)
        )
    if isinstance(target, Tensor):
        return _per_example(target, batch, signed)
    if isinstance(target, tuple):
        return _index(target, batch)
    if callable(target):
        return Targets(batch, function=target, example=_example_of(target))
    if isinstance(target, Sequence):
        return _sequence(target, batch, signed)
    raise InputTypeError(
        "target must be None, an int, one int per example, a tuple, 'predicted' or a function: "
        f"got {type(target).__name__}"
    )


def _next(target: NextToken, batch: int) -> Targets:
    """The targets of the tokens that follow."""
    token = target.token
    if isinstance(token, str) and token != PREDICTED:
        raise InputError(
            f"NextToken: the text {token!r} has an id only where a tokenizer is at hand: use "
            "explain_tokens, or pass the id"
        )
    if token is None or isinstance(token, (tuple, NextToken)) or callable(token):
        raise InputTypeError(
            "NextToken: token must be 'predicted', an id, one id per text or [B, K] ids: got "
            f"{type(token).__name__}"
        )
    position = read_targets(target.position, batch, signed=True).classes
    if position is None or position.shape[1] != 1:
        raise InputError(
            f"NextToken: position must be an int, or one per text: got {target.position!r}"
        )
    mask = target.mask
    padding = Padding() if mask is None else read_mask(mask, batch)
    found = read_targets(token, batch)
    return replace(found, position=position[:, 0], padding=padding, masked=mask is not None)


def with_padding(
    targets: Targets,
    model: Callable[..., Any],
    inputs: Sequence[Tensor],
    args: Any,
    kwargs: Mapping[str, Any] | None,
) -> Targets:
    """Targets that know of the padding which a call's further arguments tell of."""
    if targets.masked or not (targets.counts or targets.predicted):
        return targets
    args = args if isinstance(args, tuple) else (args,)
    return replace(targets, padding=padding_of(model, inputs, args, kwargs or {}))


def _sequence(target: Sequence[Any], batch: int, signed: bool) -> Targets:
    if target and all(isinstance(one, tuple) for one in target):
        _need_length(len(target), batch)
        if len({len(one) for one in target}) != 1:
            raise InputError("target: the tuples of a list must have one length")
        return Targets(batch, places=_classes(torch.tensor(target, device="cpu"), signed=True))
    try:
        with torch.device("cpu"):
            numbers = torch.as_tensor(target)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"target: a list must hold one int per example, or K ints for each: {error}"
        ) from error
    return _per_example(numbers, batch, signed)


def _per_example(target: Tensor, batch: int, signed: bool) -> Targets:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        cure = (
            "target.argmax(1) of probabilities or one-hot rows" if target.dim() > 1 else ".long()"
        )
        raise InputTypeError(
            f"target: a tensor must hold integers: got {target.dtype} {list(target.shape)}; use "
            f"{cure}, where these are classes"
        )
    if target.dim() == 0:
        target = target.expand(batch)
    _need_length(len(target), batch)
    if target.dim() > 2 or target.numel() == 0:
        raise InputError(
            f"target: a tensor must be [B] or [B, K]: got {list(target.shape)} for B = {batch}"
        )
    many = target.dim() == 2
    ones, zeros = (target == 1).sum(-1), (target == 0).sum(-1)
    if (
        many
        and target.shape[1] > 2
        and bool((ones == 1).all() & (zeros == target.shape[1] - 1).all())
    ):
        raise InputError(
            f"target: rows {list(target.shape)} of one 1 among zeros are one-hot, and [B, K] "
            "holds K classes of each example: use target.argmax(1)"
        )
    return Targets(batch, classes=_classes(target.reshape(batch, -1), signed), many=many)


def _index(target: tuple[Any, ...], batch: int) -> Targets:
    target = tuple(one.item() if isinstance(one, np.generic) else one for one in target)
    mask = target[-1] if target and isinstance(target[-1], Tensor) else None
    index = target if mask is None else target[:-1]
    for part in index:
        if isinstance(part, bool) or not isinstance(part, (int, slice, type(Ellipsis))):
            raise InputTypeError(
                "target: a tuple holds ints, slices and ... behind the batch axis, and last a "
                f"mask: got {type(part).__name__}"
            )
    return Targets(batch, index=tuple(index), mask=mask)


def _need_sequence(shape: torch.Size) -> None:
    if len(shape) != 2:
        raise InputError(
            f"NextToken needs a model that returns [B, T, V], a number for each token that could "
            f"follow each place: got {['B', *shape]}"
        )


def _classes(target: Tensor, signed: bool = False) -> Tensor:
    if not signed and bool((target < 0).any()):
        raise InputError(
            f"target out of range: got {int(target.min())}, expected 0 or more; count from the "
            "front"
        )
    return cast(target, torch.int64, "target").contiguous()


def _in_range(classes: Tensor, size: int) -> None:
    largest, least = int(classes.max()), int(classes.min())
    if largest >= size or least < -size:
        got = largest if largest >= size else least
        raise InputError(f"target out of range: got {got}, expected 0 to {size - 1}")


def _need_length(length: int, batch: int) -> None:
    if length != batch:
        cure = "; for several maps of one example pass [[...]]" if batch == 1 else ""
        raise InputError(
            f"target has the wrong length: got {length}, expected one for each of {batch} "
            f"examples{cure}"
        )


def _need_matrix(output: Tensor, what: str) -> None:
    if output.dim() == 1:
        raise InputError(
            f"{what} needs classes, and the model returns one number per example; pass target=None"
        )
    if output.dim() != 2:
        raise InputError(
            f"{what} needs an output [B, classes]: got {list(output.shape)}; pass a tuple such as "
            "(class,), which sums over the other axes, or (class, mask), and for language models "
            "sf.NextToken(token)"
        )
