"""docs/from-captum.md: its code runs, and it accounts for every name of Captum's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import captum.attr
import pytest

import saliency_fast.captum as facade
from saliency_fast.captum.shared_calls import PERTURBED, SAMPLED, STEPS

PAGE = (Path(__file__).parents[2] / "docs" / "from-captum.md").read_text()


def test_its_code_runs() -> None:
    found: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "from-captum.md", "exec"), found)
    assert found["cam"].shape == (2, 1, 14, 14)  # type: ignore[attr-defined]


def test_every_name_is_there_or_said_not_to_be() -> None:
    there, missing = PAGE.split("**Not there**")
    missing = missing.partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)", there)), set(re.findall(r"`(\w+)`", missing))
    assert set(facade.__all__) <= named[0]
    assert set(captum.attr.__all__) <= named[0] | named[1]
    assert not named[1] & set(facade.__all__)


def test_names_that_only_captum_has_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in captum.attr.__all__:
        if name not in facade.__all__:
            ours, theirs = getattr(facade, name), getattr(captum.attr, name)
            # A child of some, in which copies of a batch do not meet.
            child = name in (*STEPS, *PERTURBED, *SAMPLED)
            assert ours.__bases__ == (theirs,) if child else ours is theirs
    with pytest.raises(AttributeError, match=r"no attribute 'Salience'$"):
        _ = facade.Salience
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(AttributeError, match="'NeuronGradient'; if it is Captum's, install"):
        _ = facade.NeuronGradient


@pytest.mark.parametrize("module", ["matplotlib", "captum", "sklearn", "transformers"])
def test_what_the_import_does_not_bring(module: str) -> None:
    code = f"import sys, saliency_fast.captum; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
