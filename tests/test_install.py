"""What `make` installs: the package index alone can resolve it under constraints.txt."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PINS = (ROOT / "constraints.txt").read_text()
PIP_FROM = "24.2"
"""Older ones download whole wheels to read what these require, 3 GB."""


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls pip as on a new machine: no configuration, no wheels on disk; it installs nothing."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    # The C++ ops are not what is asked about, and to look for their compiler imports PyTorch.
    own |= {"PIP_CONFIG_FILE": os.devnull, "SALIENCY_FAST_BUILD_EXT": "0"}
    options = ("--disable-pip-version-check", "install", "--dry-run", "--ignore-installed")
    return subprocess.run(
        [sys.executable, "-m", "pip", *options, *arguments],
        cwd=ROOT,
        env=own,
        capture_output=True,
        text=True,
        timeout=300,
    )


def installed_by_make() -> list[str]:
    """The arguments of every `pip install` of `make test`, from make itself."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "VENV=absent", "absent/test-installed"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    calls = [shlex.split(line) for line in printed.splitlines() if "pip --disable" in line]
    assert len(calls) == 3
    found: list[str] = []
    for call in calls:
        # The last takes the package with its extras, and one call may name it once.
        found = [one for one in found if one not in ("--editable", ".")]
        found += call[call.index("install") + 1 :]
    return found


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_index_alone_has_it_all() -> None:
    version = pytest.importorskip("pip", reason="pip is not installed").__version__
    if Version(version) < Version(PIP_FROM):
        pytest.skip(f"pip {version} would download what it resolves: pip install 'pip>={PIP_FROM}'")
    reached = pip("--no-deps", "--retries=0", "--timeout=5", "wheel")
    if reached.returncode:
        pytest.skip(f"no package index is reached: {reached.stderr.strip().splitlines()[-1]}")
    # Dependencies from ranges of wheels, or their metadata beside them: some megabytes.
    found = pip("--use-feature=fast-deps", "--no-cache-dir", *installed_by_make())
    assert found.returncode == 0, found.stdout + found.stderr
    (chosen,) = re.findall(r"Would install (.*)", found.stdout)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", PINS, re.MULTILINE))
    # `make test-versions` pins them elsewhere.
    for name in {"torch", "triton"} & pinned.keys():
        assert sys.platform != "linux" or f"{name}-{pinned[name]}" in chosen.split()


def test_pins_exclude_no_python() -> None:
    """PyTorch and Triton have wheels for all; other pins ask for the Python they were made for."""
    for line in PINS.splitlines():
        name = re.match(r"[\w.-]+", line)
        if name is not None and name.group() not in ("torch", "triton"):
            assert line.endswith('; python_version >= "3.11"'), line
