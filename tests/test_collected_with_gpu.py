"""Every test is collected where PyTorch sees a GPU, also those that are skipped elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLLECT = """
import sys, torch, pytest
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
options = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, "tests", "benchmarks"]))
"""


def test_a_gpu_stops_no_collection() -> None:
    skipped = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("tests/**/test_*.py")
        if "cuda.is_available()" in (text := path.read_text()) and "allow_module_level" in text
    ]
    assert len(skipped) >= 2
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:]
    for path in skipped:
        assert re.search(rf"^{re.escape(path)}: [1-9]|^{re.escape(path)}::", done.stdout, re.M), (
            path
        )
