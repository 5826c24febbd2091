"""How long `import saliency_fast` takes beyond `import torch`: `python -m benchmarks.startup`.

Fresh processes take turns, some with PyTorch alone. Writes benchmarks/results/startup.json and
startup.md; takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import RESULTS, machine, save
from benchmarks.tables import caption

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 11
"""Of each kind."""
_TIMED = """
from time import {clock} as clock
begun = clock()
{imports}
print(clock() - begun)
"""
KINDS = {
    "import torch": "import torch",
    "import torch, saliency_fast": "import torch; import saliency_fast",
}


def seconds_of(imports: str, clock: str = "perf_counter") -> float:
    """Seconds that a fresh process takes for these imports, by a clock of the module `time`."""
    command = [sys.executable, "-c", _TIMED.format(imports=imports, clock=clock)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure(processes: int = PROCESSES) -> dict[str, Any]:
    """Medians over so many processes of each kind, and what is added."""
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    # Once untimed, so that neither kind pays for files that are not in memory yet.
    for imports in KINDS.values():
        seconds_of(imports)
    for _ in range(processes):
        for name, imports in KINDS.items():
            seconds[name].append(seconds_of(imports))
    rows = [
        {
            "imports": name,
            "seconds": statistics.median(found),
            "fastest": min(found),
            "slowest": max(found),
            "processes": processes,
        }
        for name, found in seconds.items()
    ]
    # Of neighbours in time, so that drifts of the machine hit both.
    pairs = zip(*seconds.values(), strict=True)
    added = statistics.median(both - alone for alone, both in pairs)
    return {"setting": machine("cpu"), "rows": rows, "added_seconds": added}


def table(document: dict[str, Any]) -> str:
    """Seconds of each kind, and the difference."""
    lines = [
        caption(document["setting"]),
        "",
        "| in a fresh process | seconds | fastest | slowest |",
        "|---|---:|---:|---:|",
    ]
    for row in document["rows"]:
        found = (f"{row[name]:.3f}" for name in ("seconds", "fastest", "slowest"))
        lines.append(f"| `{row['imports']}` | {' | '.join(found)} |")
    lines += [
        f"| added by `saliency_fast` | {document['added_seconds']:.3f} | | |",
        "",
        f"Medians over {document['rows'][0]['processes']} processes of each kind, which take "
        "turns; what is added is the median difference of neighbours.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few processes, for tests")
    parser.add_argument("--out", type=Path, help="a directory; without one, --quick writes nothing")
    options = parser.parse_args()
    document = measure(2 if options.quick else PROCESSES)
    out = options.out or (None if options.quick else RESULTS)
    text = table(document)
    if out is not None:
        save(document, text, out, "startup")
    print(text)


if __name__ == "__main__":
    main()
