"""The command line: saliency-fast explain, evaluate, verify, demo, methods, metrics, backends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from saliency_fast.cli.parser import COMMANDS, parser
from saliency_fast.errors import SaliencyError

__all__ = ["main"]
USAGE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `saliency-fast` and returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        # Each command imports what it needs, so that --help answers at once.
        module = import_module(f"{__name__}.{COMMANDS[args.command].module}")
        code: int = getattr(module, args.command)(args, given)
        return code
    except (SaliencyError, OSError) as error:
        if args.debug:
            raise
        print(f"saliency-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("saliency-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
