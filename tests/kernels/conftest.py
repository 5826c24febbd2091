"""Lets these tests import `checking`, the judge shared with tests/ops."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))
