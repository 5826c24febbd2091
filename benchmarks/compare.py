"""Two revisions of the library against each other: `python -m benchmarks.compare REVISION`.

For each workload and setting, fresh processes of REVISION and of the working tree take turns: the
first call (the import excluded), the median of later calls, the peak of resident memory, and how
far the maps of the two differ. Writes `--out FILE.md`, or prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = {"mlp": None, "digits": None, "resnet50": 224, "vit_b16": 224, "unet3d": 48}
"""Names in `benchmarks.models.WORKLOADS`, and the side of their inputs."""
SETTINGS = ("gradient", "integrated_gradients", "smoothgrad", "grad_cam", "occlusion")
SKIPPED = {(name, method) for name in ("mlp", "vit_b16") for method in ("grad_cam", "occlusion")}
LATER_SECONDS, LATER_CALLS = 4.0, 20
"""Later calls are repeated for so many seconds, at most so many times, and at least twice."""


def child(workload: str, method: str, values: Path) -> dict[str, float]:
    """The measurements of one process; its map is saved to `values`."""
    import saliency_fast as sf
    from benchmarks.cases import sized

    load = sized(workload, WORKLOADS[workload])
    model, x = load.build().eval(), load.inputs(1)
    target = load.target
    before = _peak_bytes()
    engine = sf.Engine(model, method, hashes=False)
    begun = time.perf_counter()
    attribution = engine(x, target)
    first, later = time.perf_counter() - begun, list[float]()
    begun = time.perf_counter()
    while len(later) < 2 or (
        len(later) < LATER_CALLS and time.perf_counter() - begun < LATER_SECONDS
    ):
        started = time.perf_counter()
        engine(x, target)
        later.append(time.perf_counter() - started)
    torch.save(attribution.values, values)
    peak = _peak_bytes() - before
    return {"first": first, "later": statistics.median(later), "peak": float(peak)}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A directory with `revision`, with its C++ ops built."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        path.mkdir()
        archive = subprocess.run(
            ["git", "archive", revision], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-xf", "-"], cwd=path, input=archive.stdout, check=True)
        same = not subprocess.run(
            ["git", "diff", "--quiet", revision, "--", "csrc", "setup.py"], cwd=ROOT, check=False
        ).returncode
        if same:
            for library in (ROOT / "saliency_fast").glob("*.so"):
                shutil.copy(library, path / "saliency_fast")
        else:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=path, check=True, capture_output=True)
        link = path / "saliency_fast" / "kernels"
        if not link.exists():
            link.symlink_to(path / "kernels")
        # The child of this file, whatever the revision has.
        shutil.copy(__file__, path / "benchmarks" / Path(__file__).name)
        yield path


def measured(root: Path, workload: str, method: str, values: Path) -> dict[str, float]:
    """One process of the checkout at `root`."""
    command = [sys.executable, "-m", "benchmarks.compare", "--child", workload, method, str(values)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(revision: str, rounds: int, only: str | None) -> Iterator[dict[str, Any]]:
    """One row per workload and setting: medians over `rounds` processes of each revision."""
    with checkout(revision) as before, tempfile.TemporaryDirectory() as folder:
        roots = {"before": before, "after": ROOT}
        for workload in WORKLOADS:
            for method in SETTINGS:
                if (workload, method) in SKIPPED or only not in (None, workload):
                    continue
                found: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
                for number in range(rounds):
                    for name in sorted(roots, reverse=bool(number % 2)):
                        values = Path(folder) / name
                        found[name].append(measured(roots[name], workload, method, values))
                one, two = (torch.load(Path(folder) / name) for name in roots)
                difference = float((two - one).norm() / one.norm().clamp_min(1e-30))
                row: dict[str, Any] = {"workload": workload, "method": method}
                for name, several in found.items():
                    for key in several[0]:
                        row[f"{name} {key}"] = statistics.median(each[key] for each in several)
                yield row | {"difference": difference}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | method | first call, s | before | later calls, s | before | peak, MiB | before "
        "| relative L2 difference of the maps |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        cells = [row["workload"], row["method"]]
        for key, scale in (("first", 1.0), ("later", 1.0), ("peak", 2.0**-20)):
            cells += [f"{row[f'{name} {key}'] * scale:.3g}" for name in ("after", "before")]
        lines.append("| " + " | ".join([*cells, f"{row['difference']:.1g}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:4], Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="a commit to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each (default: 3)")
    parser.add_argument("--only", choices=tuple(WORKLOADS), help="one workload")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args()
    found = []
    for row in rows(options.revision, options.rounds, options.only):
        print(table([row]).splitlines()[-1], flush=True)
        found.append(row)
    if options.out is not None:
        options.out.write_text(table(found))


if __name__ == "__main__":
    main()
