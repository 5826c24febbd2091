"""Every Triton launcher under Triton's interpreter, on the CPU, against the reference.

One child process runs every sample (interpreted_checks.py); here each op has its own outcome.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from saliency_fast.ops import OPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CHECKS = Path(__file__).with_name("interpreted_checks.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str | None]:
    """Each check of the child process by its id: None where it passed, else what it printed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(CHECKS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert report.exists(), child.stdout + child.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next((case.find(kind) for kind in ("failure", "error", "skipped")
                        if case.find(kind) is not None), None)  # fmt: skip
        found[case.get("name", "")] = None if failure is None else failure.text or "failed"
    return found


def judged(outcomes: dict[str, str | None], beginning: str) -> int:
    """How many checks' ids begin so; fails with the text of those that are red."""
    chosen = {name: text for name, text in outcomes.items() if name.startswith(beginning)}
    red = [f"{name}\n{text}" for name, text in chosen.items() if text is not None]
    assert not red, f"{len(red)} of {len(chosen)} are red:\n\n" + "\n\n".join(red[:3])
    return len(chosen)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.triton])
def test_every_sample_of(name: str, outcomes: dict[str, str | None]):
    # interpreted_checks.small_enough leaves out the largest maps.
    left_out = 7 if name == "magnitude_percentile" else 0
    assert judged(outcomes, f"test_sample[{name}-") == len(list(OPS[name].samples())) - left_out


def test_everything_else(outcomes: dict[str, str | None]):
    others = {name: text for name, text in outcomes.items() if not name.startswith("test_sample[")}
    assert judged(others, "") >= 6
