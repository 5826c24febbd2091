"""Targets: which number of an example's output is explained. Positions do not count padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.model.casts import cast
from saliency_fast.model.failures import BY_ARGUMENT, BY_EXAMPLE, TARGET, Failing

PREDICTED = "predicted"
NAME, POSITION = "example", "position"
"""How a target function takes the indices of the rows' examples."""
REAL = ("decoder_attention_mask", "attention_mask")
"""Arguments [B, T] that are true, or 1, at a text's own tokens."""
ABSENT = ("key_padding_mask", "src_key_padding_mask")
"""PyTorch's own, which are true at padding."""
DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
"""With these, the output's sequence is the decoder's and not that of the inputs."""
CURE = (
    "pass the mask, 1 at a text's own tokens and 0 at padding, as "
    "forward_kwargs={'attention_mask': ...}, or as sf.NextToken(token, position, mask=...)"
)
_EACH = (
    "read each row of the output by itself, such as target=lambda output: output[:, 1], without a "
    "sum or a mean over the rows"
)
_PARTS = (
    "; one result of the whole batch cannot be explained row by row: where the rows are parts of "
    "one input, such as the nodes of a graph, use rows='together' and a target function that reads "
    "one number, such as target=lambda output: output[0, 1]"
)


@dataclass(frozen=True, eq=False)
class NextToken:
    """A target: the score that a language model gives to the next token, from outputs [B, T, V].

    Args:
        token: "predicted", the token that is most likely at the inputs; a token id; one id per
            text; [B, K] ids for K maps of each text; or, in `explain_tokens`, the token's text.
        position: Behind which of a text's tokens it would follow, an int or one per text [B].
            Padding does not count: -1 is a text's last token, 0 its first, on whichever side
            padding is.
        mask: bool, or 0 and 1, [B, T], true at a text's own tokens. None: the model's
            attention_mask, among the further arguments of the call; none there is no padding.

    Raises:
        InputTypeError: If mask is no tensor.

    Example:
        >>> import torch
        >>> import saliency_fast as sf
        >>> model, ids = torch.nn.Embedding(9, 9), torch.tensor([[1, 2, 4]])
        >>> found = sf.explain(model, ids, target=sf.NextToken(7), method="feature_ablation")
        >>> found.values.shape
        torch.Size([1, 3])
    """

    token: Any = PREDICTED
    position: Any = -1
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise InputTypeError(
                f"NextToken: mask must be a tensor [B, T]: got {type(self.mask).__name__}"
            )


class Reader:
    """A target that reads `count` numbers of every row, which may depend on the row's example."""

    @property
    def count(self) -> int:
        raise NotImplementedError

    def read(self, raw: Any, example: Tensor) -> Tensor:
        """Scores [R, count] of the rows of examples `example` [R], from the model's output."""
        raise NotImplementedError


Numbers = Tensor | np.ndarray[Any, Any] | np.generic
Target = NextToken | int | str | Numbers | Sequence[Any] | Callable[..., Tensor] | Reader | None


@dataclass(frozen=True)
class Padding:
    """Which tokens of a call's sequences are padding.

    real: bool [B, T], true at a text's own tokens; None where no text has padding. doubt: why it is
    unknown where texts end, or "".
    """

    real: Tensor | None = None
    doubt: str = ""

    def to(self, device: torch.device) -> Padding:
        return self if self.real is None else Padding(self.real.to(device), self.doubt)

    def places(self, position: Tensor, length: int) -> Tensor:
        """Indices int64 [B] in outputs of `length` tokens of positions in each text."""
        if self.real is None and self.doubt and bool((position < 0).any()):
            raise InputError(f"target: {self.doubt}; {CURE}")
        self.need_length(length)
        counts = torch.full_like(position, length) if self.real is None else self.real.sum(1)
        index = torch.where(position < 0, position + counts, position)
        if self.real is not None:
            at = self.real & (self.real.cumsum(1) == index[:, None] + 1)
            index = torch.where(at.any(1), at.int().argmax(1), -1)
        outside = (index < 0) | (index >= length)
        if bool(outside.any()):
            text = int(outside.nonzero()[0])
            raise InputError(
                f"target out of range: got position {int(position[text])}, and example {text} has "
                f"{int(counts[text])} tokens"
            )
        return index

    def need_length(self, length: int) -> None:
        if self.real is not None and self.real.shape[1] != length:
            raise InputError(
                f"target: the output has {length} places and the attention mask "
                f"{self.real.shape[1]}, so that it is not known where texts end in the output; "
                "pass sf.NextToken(token, position, mask=...) with a mask of the output's length"
            )

    def axis(self, shape: torch.Size, index: Any) -> int | None:
        """The axis of an example's output along which positions are counted without padding, or
        None. Raises InputError where an output may or may not be a sequence, and it matters.
        """
        if self.real is None:
            if self.doubt and len(shape) > 1 and _from_the_end(index):
                raise InputError(f"target: {self.doubt}; {CURE}")
            return None
        length = self.real.shape[1]
        axes = [axis for axis, size in enumerate(shape) if size == length]
        if len(shape) > 1 and (axes[:1] == [0] or len(axes) == 1):
            return axes[0]
        left = not bool(self.real[:, 0].all())
        if len(shape) > 1 and (_from_the_end(index) or (left and axes)):
            self.need_length(shape[0])
        if len(shape) == 1 and axes and (left or _from_the_end(index)):
            raise InputError(
                f"target: the output has {length} numbers per example, as many as its texts have "
                "places, which may be classes or tokens: pass a class as an int, and for the "
                "number of a token a function of the output"
            )
        return None


@dataclass(frozen=True)
class Targets:
    """K scalars per example of `batch`, read from the output; by default the scalar output.

    Attributes:
        classes: int64 [B, K], columns of an output [R, C].
        places: int64 [B, D], one element of an output [R, ...] per example.
        index: A tuple into the output behind its batch axis; the rest is summed.
        mask: Weights of what `index` selects.
        function: The user's own, called with the output and, as `example` says, with the indices
            int64 [R] of the examples that the rows belong to.
        example: `NAME`, `POSITION` or "".
        predicted: Whether classes wait for the first forward pass at the inputs.
        many: Whether K is an axis of the result.
        position: int64 [B], the token of an output [R, T, V] that is read as one [R, V]; negative
            from the last.
        padding: What positions are counted without.
        masked: Whether the user gave the mask of the padding.
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

    def read(self, raw: Any, example: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] of the rows of examples `example` [R], and the classes [R, K] chosen."""
        if self.function is not None:
            return self._call(raw, example), None
        output = tensor_of(raw)
        if output.dim() == 0 or output.shape[0] != example.numel():
            got = list(output.shape)
            raise ModelError(
                f"the model must return one row per input row: got {got} for a batch of "
                f"{example.numel()}{self._cure(got, example.numel(), BY_ARGUMENT) or _PARTS}"
            )
        if self.position is not None:
            _need_sequence(output.shape[1:])
            token = self.padding.places(self.position, output.shape[1])
            output = output[torch.arange(len(example), device=example.device), token[example]]
        classes = None if self.classes is None else self.classes[example]
        if self.predicted or classes is not None:
            what = "target='predicted'" if classes is None else "an integer target"
            _need_matrix(output, what)
            classes = output.detach().argmax(1, keepdim=True) if classes is None else classes
            return output.gather(1, classes), classes
        if self.places is not None:
            rows = torch.arange(len(example), device=example.device)
            # Negative ones count from the last by themselves: recorded launches read no numbers.
            padded = self.padding.real is not None
            places = self._placed(output.shape[1:]) if padded else self.places
            return output[(rows, *places[example].unbind(1))][:, None], None
        return self._indexed(output, example)[:, None], None

    def check(self, raw: Any, example: Tensor) -> torch.Size | None:
        """Raises where classes or indices lie outside of the first output, or a function depends on
        the order of rows. Returns the shape of an example's output; None where a function reads it.
        """
        if self.function is not None:
            self._need_any_row(raw, example)
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

    def _placed(self, shape: torch.Size) -> Tensor:
        """`places` of outputs of that shape, int64 [B, D] from 0."""
        assert self.places is not None
        axis, columns = self.padding.axis(shape, self.places), []
        for number, (column, size) in enumerate(zip(self.places.unbind(1), shape, strict=True)):
            if number == axis:
                columns.append(self.padding.places(column, size))
            else:
                _in_range(column, size)
                columns.append(torch.where(column < 0, column + size, column))
        return torch.stack(columns, 1)

    def _indexed(self, output: Tensor, example: Tensor) -> Tensor:
        """Sums [R] of what `index` selects."""
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
            axis = self.padding.axis(output.shape[1:], index)
            if axis is not None:
                output, index = self._own_tokens(output, example, axis)
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
            picked = picked * (self.mask if self.mask.shape == shape else self.mask[example])
        return picked.reshape(len(example), -1).sum(1)

    def _own_tokens(
        self, output: Tensor, example: Tensor, axis: int
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The output, and the index into it, with positions along a sequence's axis counted among
        each text's own tokens. With a mask a slice is of all tokens: the user weights padding, too.
        """
        real, axes, length = self.padding.real, output.dim() - 1, output.shape[axis + 1]
        assert self.index is not None
        assert real is not None
        index = self.index
        if len(index) - (... in index) > axes:
            raise IndexError(f"too many indices: got {len(index)} for {axes} axes")
        start = index.index(...) if ... in index else len(index)
        rest = (slice(None),) * (axes - len(index) + (... in index))
        index = (*index[:start], *rest, *index[start + 1 :])
        part = index[axis]
        if isinstance(part, int):
            position = torch.full((len(real),), part, device=example.device)
            token = self.padding.places(position, length)[example]
            rows = torch.arange(len(example), device=example.device)
            return output.movedim(axis + 1, 1)[rows, token], (*index[:axis], *index[axis + 1 :])
        if self.mask is None:
            # A slice of each text's own tokens; the others count nothing.
            kept = torch.zeros_like(real)
            for text, own in enumerate(real):
                kept[text, own.nonzero()[:, 0][part]] = True
            shape = [1] * output.dim()
            shape[0], shape[axis + 1] = len(example), length
            output = torch.where(kept[example].view(shape), output, 0.0)
            index = (*index[:axis], slice(None), *index[axis + 1 :])
        return output, index

    def _call(self, raw: Any, example: Tensor) -> Tensor:
        """Scores [R, K] by the user's function."""
        assert self.function is not None
        if isinstance(self.function, Reader):
            return self.function.read(raw, example)
        with Failing(TARGET, example.numel(), self.batch):
            args, kwargs = (example,) * (self.example == POSITION), {NAME: example}
            scores = self.function(raw, *args, **(kwargs if self.example == NAME else {}))
        if not isinstance(scores, Tensor) or scores.shape != example.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            rows = example.numel()
            several = f", of inputs with {self.batch} examples" if self.batch != rows else ""
            raise InputError(
                f"target: a function of the output must return one score per row: got {got}, "
                f"expected [{rows}]{self._cure(got, rows, BY_EXAMPLE) or f'{several}; {_EACH}'}"
            )
        return scores[:, None]

    def _cure(self, got: object, rows: int, cure: str) -> str:
        """The cure where an output has as many rows as there are examples, whatever was passed."""
        several = isinstance(got, list) and got[:1] == [self.batch] != [rows]
        return f", of inputs with {self.batch} examples; {cure}" if several else ""

    def _need_any_row(self, raw: Any, example: Tensor) -> None:
        """Raises where a function scores equal rows differently: it holds a tensor of the batch,
        which it reads by the number of a row. As many rows are tried as there are examples.
        """
        is_tensor = isinstance(raw, Tensor) and raw.is_floating_point()
        if isinstance(self.function, Reader) or self.batch == 1 or not is_tensor:
            return
        if raw.shape[:1] != example.shape:
            return
        raw, many = raw.detach(), [self.batch] + [-1] * (raw.dim() - 1)
        with torch.no_grad():
            # Copies: the function may write to its argument.
            one = self._call(raw[:1].clone(), example[:1])
            all_of = self._call(raw[:1].expand(many).clone(), example[:1].expand(self.batch))
        if raw.is_meta:
            return
        size = tolerance(one.dtype) * max(float(one.abs().max()), float(raw[0].abs().max()))
        if not torch.allclose(all_of, one.expand_as(all_of), 0.0, size, equal_nan=True):
            raise InputError(
                "target: the function scores equal rows of the output differently: "
                f"{all_of.flatten()[:4].tolist()}. Rows are points made of the examples in any "
                f"order and number; {BY_EXAMPLE}"
            )


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference up to which outputs of equal rows are equal, to rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-2)


def read_of(raw: Any) -> Tensor | None:
    """The tensor to explain in a model's output, itself, or its `logits` or `out`; or None."""
    if isinstance(raw, Tensor):
        return raw
    for name in ("logits", "out"):
        tensor = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    return None


def tensor_of(raw: Any) -> Tensor:
    """The same; raises ModelError where there is none."""
    if (tensor := read_of(raw)) is not None:
        return tensor
    raise ModelError(
        f"the model must return a tensor (or an output with .logits): got {type(raw).__name__}; "
        "pass target=function to pick one from a structured output"
    )


def read_targets(target: Target, batch: int, *, signed: bool = False) -> Targets:
    """Validates `target` for a batch; signed: ints are positions, which may be negative."""
    if isinstance(target, (np.ndarray, np.generic)):
        target = target.tolist()
    if target is None:
        return Targets(batch)
    if isinstance(target, NextToken):
        return _next_token(target, batch)
    if isinstance(target, str):
        if target != PREDICTED:
            raise InputError(f"target: the only name is 'predicted': got {target!r}")
        return Targets(batch, predicted=True)
    if isinstance(target, Reader):
        return Targets(batch, function=target, many=True)
    if isinstance(target, bool):
        raise InputTypeError("target must be an int, a sequence, a tuple or a function: got bool")
    if isinstance(target, (int, Tensor)):
        numbers = torch.tensor(target, device="cpu") if isinstance(target, int) else target
        return _per_example(numbers, batch, signed)
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


def _example_of(function: Callable[..., Any]) -> str:
    """How a function takes examples: by the name `NAME`, as the second of two arguments, or ""."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(one.name == NAME and one.kind is not one.POSITIONAL_ONLY for one in parameters):
        return NAME
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in parameters if one.kind in positional and one.default is one.empty]
    return POSITION if len(required) == 2 else ""


def _next_token(target: NextToken, batch: int) -> Targets:
    token, mask = target.token, target.mask
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
    if mask is not None and not _is_mask(mask, batch):
        raise InputError(
            f"target: mask must be bool, or 0 and 1, [B, T] with B = {batch}: got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    padding = Padding() if mask is None else _padding_by("mask", mask, batch)
    classes = read_targets(token, batch)
    return replace(classes, position=position[:, 0], padding=padding, masked=mask is not None)


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
        several = "target.argmax(1) of probabilities or one-hot rows"
        raise InputTypeError(
            f"target: a tensor must hold integers: got {target.dtype} {list(target.shape)}; use "
            f"{several if target.dim() > 1 else '.long()'}, where these are classes"
        )
    if target.dim() == 0:
        target = target.expand(batch)
    _need_length(len(target), batch)
    if target.dim() > 2 or target.numel() == 0:
        raise InputError(
            f"target: a tensor must be [B] or [B, K]: got {list(target.shape)} for B = {batch}"
        )
    many, width = target.dim() == 2, target.shape[-1]
    one_hot = ((target == 1).sum(-1) == 1) & ((target == 0).sum(-1) == width - 1)
    if many and width > 2 and bool(one_hot.all()):
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


def _need_sequence(shape: torch.Size) -> None:
    if len(shape) != 2:
        raise InputError(
            f"NextToken needs a model that returns [B, T, V], a number for each token that could "
            f"follow each place: got {['B', *shape]}"
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


def _from_the_end(index: Any) -> bool:
    """Whether positions are counted from the end."""
    if isinstance(index, Tensor):
        return bool((index < 0).any())
    parts = [one for one in index if not isinstance(one, slice)]
    parts += [end for one in index if isinstance(one, slice) for end in (one.start, one.stop)]
    return any(isinstance(one, int) and one < 0 for one in parts)


# Padding, by the arguments of a call.


def with_padding(
    targets: Targets, model: Function, inputs: Sequence[Tensor], args: Any, kwargs: Kwargs | None
) -> Targets:
    """Targets with the padding that a call's further arguments describe."""
    positions = targets.position is not None or targets.places is not None or targets.index
    if targets.masked or not (positions or targets.predicted):
        return targets
    args = args if isinstance(args, tuple) else (args,)
    return replace(targets, padding=_padding_of(model, inputs, args, kwargs or {}))


def _padding_of(model: Function, inputs: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Padding:
    """The padding by a call's arguments, by their names in the model's signature."""
    named, batch = _by_name(model, inputs, args, kwargs), len(inputs[0])
    decoded = any(named.get(name) is not None for name in DECODED)
    for name in REAL[:1] if decoded else REAL[1:] + ABSENT:
        if isinstance(mask := named.get(name), Tensor):
            return _padding_by(name, mask, batch)
    for name, value in named.items():
        if not decoded and isinstance(value, Tensor) and _may_mask(name, value, batch):
            doubt = f"position -1 may be padding, which the argument {name!r} may tell of"
            return Padding(doubt=doubt)
    ids = named.get("decoder_input_ids") if decoded else inputs[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return Padding()
    modules = model.modules() if isinstance(model, nn.Module) else ()
    tables = [one for one in modules if isinstance(one, nn.Embedding)]
    own = [getattr(getattr(model, "config", None), "pad_token_id", None)]
    own += [t.padding_idx % t.num_embeddings for t in tables if t.padding_idx is not None]
    for pad in own:
        for rows in (ids == pad, (ids == pad).flip(1)) if isinstance(pad, int) else ():
            # Runs of padding of several lengths, or of two tokens: one alone may close every text.
            runs = rows.int().cumprod(1).sum(1)
            least, most = int(runs.min()), int(runs.max())
            if most > 0 and (least != most or least > 1):
                return Padding(
                    doubt=f"position -1 of some examples seems to be padding (token id {pad}), and "
                    "no attention mask says where texts end"
                )
    return Padding()


def _padding_by(name: str, mask: Tensor, batch: int) -> Padding:
    if not _is_mask(mask, batch):
        doubt = f"position -1 may be padding, and the {name} {list(mask.shape)} is none of [B, T]"
        return Padding(doubt=f"{doubt} with 0 and 1")
    real = mask.detach().bool().expand(batch, -1)
    real = ~real if name in ABSENT else real
    return Padding() if bool(real.all()) else Padding(real.contiguous())


def _is_mask(mask: Tensor, batch: int) -> bool:
    flags = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
    return flags and mask.dim() == 2 and len(mask) in (1, batch)


def _may_mask(name: str, value: Tensor, batch: int) -> bool:
    """Whether an argument looks like a mask of padding, or like lengths that differ."""
    if "mask" in name.lower():
        flags = _is_mask(value, batch) and len(value) == batch
    else:
        integers = value.shape == (batch,) and not value.is_floating_point()
        flags = "len" in name.lower() and integers
    return flags and not bool((value == value.flatten()[0]).all())


def _by_name(
    model: Function, inputs: Sequence[Tensor], args: Args, kwargs: Kwargs
) -> dict[str, Any]:
    """Arguments by name: those by position have the names that the model gives them."""
    if not any(isinstance(one, Tensor) for one in args):
        return dict(kwargs)
    forward = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(forward).bind_partial(*inputs, *args)
    except (TypeError, ValueError):
        return dict(kwargs)
    own = {name: value for name, value in bound.arguments.items() if not isinstance(value, tuple)}
    given = {id(one) for one in inputs}
    return {name: value for name, value in own.items() if id(value) not in given} | dict(kwargs)
