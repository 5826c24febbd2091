"""Exceptions, each also of the built-in type that plain code would catch, and warnings."""

import sys
import warnings


class SaliencyError(Exception):
    """Base of everything this library raises on purpose."""


class InputError(SaliencyError, ValueError):
    """An input, baseline, target or option has the wrong shape, value or range."""


class ContractError(InputError, AssertionError):
    """An argument that Captum refuses by an assertion, in `saliency_fast.captum`."""


class TargetRangeError(ContractError, IndexError, RuntimeError):
    """A target outside of the output, in `saliency_fast.captum`: Captum lets PyTorch raise it."""


class InputTypeError(SaliencyError, TypeError):
    """An argument has the wrong type."""


class ModelError(SaliencyError, RuntimeError):
    """The model's output cannot be explained: no tensor, not finite, or not differentiable."""


class ModelCallError(ModelError):
    """The model or the target function raised an exception, which is the `__cause__`.

    Where that exception's class is the user's own, the error is an instance of it, too, if one
    class can be both, so that code which catches it goes on to work.

    Attributes:
        stage: "forward", "backward" or "target".
        rows: Number of rows that the model was called with.
    """

    stage = "forward"
    rows = 0


class UnseenInputError(ModelError):
    """No gradient of the target reaches an input.

    Attributes:
        number: Index of the input.
        example: Index of an example whose score does not depend on it.
    """

    number = 0
    example = 0


class RepeatedLayerError(ModelError):
    """A layer that runs several times for one input has no single output."""


class NoAttentionError(ModelError):
    """The model has no attention whose probabilities could be read."""


class BudgetError(SaliencyError, RuntimeError):
    """One point alone does not fit the memory budget or the device."""


class BackendError(SaliencyError, RuntimeError):
    """A fast version of an op was requested but is not built, does not load, or fails on a GPU."""


class BusyError(SaliencyError, RuntimeError):
    """The queue of an engine's requests is full."""


class ClosedError(SaliencyError, RuntimeError):
    """A request to an engine that was closed."""


class ChoiceError(ContractError, KeyError):
    """An unknown name, in `saliency_fast.captum`: Captum raises KeyError."""

    __str__ = Exception.__str__


class RecordError(SaliencyError, ValueError):
    """An attribution record is truncated, altered, or written under another schema."""


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's code that called this library."""
    own, frame = __name__.partition(".")[0], sys._getframe(1)
    level = outermost = 2
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == own:
            outermost = level
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{own}: {text}", category, stacklevel=outermost + 1)


def warn_deprecated(old: str, new: str) -> None:
    """Warns of a name that goes."""
    warn(f"{old} is deprecated and removed in 0.3: use {new}", DeprecationWarning)
