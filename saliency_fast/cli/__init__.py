"""The command line: saliency-fast explain, evaluate, verify, demo, methods, metrics, backends."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from saliency_fast.cli.parser import parser
from saliency_fast.errors import SaliencyError

USAGE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `saliency-fast` and returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        return _run(args.command, args, given)
    except (SaliencyError, OSError) as error:
        if args.debug:
            raise
        print(f"saliency-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("saliency-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: str, args: Namespace, given: Sequence[str]) -> int:
    # Each command imports what it needs, so that --help answers at once.
    if command in ("explain", "demo"):
        from saliency_fast.cli.explain import demo, explain

        return (explain if command == "explain" else demo)(args, given)
    if command == "evaluate":
        from saliency_fast.cli.evaluate import evaluate

        return evaluate(args, given)
    if command == "verify":
        from saliency_fast.cli.verify import verify

        return verify(args)
    from saliency_fast.cli.tables import LISTS

    LISTS[command]()
    return 0


__all__ = ["main"]
