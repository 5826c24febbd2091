"""Metric: a frozen recipe that judges maps, and what all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.errors import InputError
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.scores import OUTPUTS, Running
from saliency_fast.evaluate.subject import Explainer, Model, Subject, read_subject
from saliency_fast.evaluate.substrates import named
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import Target

NEEDS = ("model", "masks", "method")
"""What a metric may need of a `Subject` beside inputs and maps."""

_CURES = {
    "model": "needs model, which it asks: got None; pass the model",
    "masks": "needs boxes or masks, which say where the object is: got None; pass boxes=",
    "method": "needs method, since it explains again: got None; pass method= a method, its name or "
    "a function (model, inputs, target) -> maps",
}


class Metric:
    """Base of the metrics: frozen dataclasses of options, called with what they judge.

    name: as tables say it. better: "higher", "lower" or "". needs: names out of `NEEDS`.
    takes_missing: whether inputs and the substrate may hold NaN, where the model takes it.
    """

    name: ClassVar[str]
    better: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    takes_missing: ClassVar[bool] = False

    def __call__(
        self,
        model: Model | None,
        inputs: Tensor,
        maps: Tensor | Attribution,
        *,
        target: Target = None,
        boxes: Any = None,
        method: Explainer | None = None,
        baseline: Baseline = None,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        memory_budget: int | str | None = None,
        points_per_launch: int | None = None,
        progress: bool = False,
        layout: LayoutLike = None,
    ) -> Outcome:
        """Judges `maps`, an attribution or a tensor, that explain what `model` says of `inputs`.

        See `read_subject` for maps, boxes, method and layout, and `Engine` for the others.
        """
        running = Running(forward_args, forward_kwargs, memory_budget, points_per_launch, progress)
        subject = read_subject(
            *(model, inputs, maps),
            target=target,
            boxes=boxes,
            method=method,
            baseline=baseline,
            running=running,
            layout=layout,
        )
        return self.judge(subject)

    def judge(self, subject: Subject) -> Outcome:
        """The outcome for what was checked already."""
        missing = self.missing(subject)
        if missing:
            raise InputError(f"{self.name} {_CURES[missing]}")
        if not self.takes_missing and not subject.finite:
            raise InputError(
                f"the input holds NaN or infinity, and {self.name} needs finite numbers; deletion, "
                "insertion, sensitivity-n and faithfulness correlation take values that are missing"
            )
        found = self._judge(subject)
        caveats = subject.caveats if "model" in self.needs else ()
        parameters = self._parameters() | dict(found.parameters)
        return dataclasses.replace(found, parameters=parameters, caveats=caveats + found.caveats)

    def missing(self, subject: Subject) -> str | None:
        """The first thing that it needs and the subject lacks."""
        return next((one for one in self.needs if getattr(subject, one) is None), None)

    def _judge(self, subject: Subject) -> Outcome:
        raise NotImplementedError

    def _parameters(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {one.name: named(getattr(self, one.name)) for one in fields}

    def _outcome(self, values: Tensor, **further: Any) -> Outcome:
        """An outcome of this metric; see `Outcome`."""
        further.setdefault("parameters", {})
        return Outcome(self.name, values.detach().double(), self.better, **further)


def check_output(output: str) -> None:
    """Raises unless it names a way to read outputs."""
    if output not in OUTPUTS:
        raise InputError(f"output must be one of {', '.join(OUTPUTS)}: got {output!r}")
