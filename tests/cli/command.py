"""Runs the command line in this process."""

from __future__ import annotations

from saliency_fast.cli import main


def run(*args: object) -> int:
    return main([str(one) for one in args])
