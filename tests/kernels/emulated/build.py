"""Compiles csrc/cuda/*.cu for the CPU with g++, against stand-ins for CUDA's headers."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = tuple(sorted((CSRC / "cuda").glob("*.cu")))
FLAGS = (
    *("-std=c++20", "-g", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas"),
)
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover", "-DEMULATOR_ADDRESS"),
    "races": ("-fsanitize=thread", "-DEMULATOR_RACES"),
}  # fmt: skip
"""Flags by the name of a build: none; AddressSanitizer and UndefinedBehaviorSanitizer, also of
misaligned vector accesses; ThreadSanitizer."""
RUNTIMES = {"plain": (), "address": ("libasan.so", "libubsan.so"), "races": ("libtsan.so",)}


@dataclass(frozen=True)
class Fault:
    """A change of a source by which its kernels are wrong: `old`, which stands there, to `new`."""

    source: str
    old: str
    new: str


def missing() -> str:
    """Why the kernels cannot be compiled here; empty where they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout
    return "" if int(version.split(".")[0]) >= 12 else f"g++ {version.strip()} has no _Float16"


def translated(source: Path, fault: Fault | None = None) -> str:
    """The source as C++: launches and shared variables are the only syntax that is CUDA's own."""
    text = source.read_text()
    if fault is not None:
        if fault.old not in text:
            raise ValueError(f"{source.name} has no {fault.old!r}: change the fault with it")
        text = text.replace(fault.old, fault.new, 1)
    text = re.sub(r"__shared__ (\w+) (\w+)((?:\[\w+\])*);",
                  r"\1 (&\2)\3 = emulator::shared<\1\3>(__COUNTER__);", text)  # fmt: skip
    text = re.sub(r"(\w+(?:<\w+>)?)<<<(.*?)>>>\(", r"emulator::launch(\1, {\2})(", text, flags=re.S)
    return f'#line 1 "{source}"\n{text}'


def build(directory: Path, sanitizer: str = "plain", fault: Fault | None = None) -> Path:
    """Makes a library in `directory`, which keeps objects for the next: the path of the library."""
    objects = [_scheduler(directory, sanitizer)]
    for source in SOURCES:
        planted = fault if fault is not None and fault.source == source.name else None
        name = f"{sanitizer}-{source.stem}{f'-{abs(hash(planted))}' if planted else ''}"
        target = directory / f"{name}.o"
        if not target.exists():
            text = directory / f"{name}.cpp"
            text.write_text(translated(source, planted))
            _compile("-O1", *SANITIZERS[sanitizer], "-c", text, "-o", target)
        objects.append(target)
    library = directory / f"{sanitizer}-{abs(hash(fault)) if fault else 'kernels'}.so"
    _compile("-shared", *SANITIZERS[sanitizer], *objects, "-o", library)
    return library


def _scheduler(directory: Path, sanitizer: str) -> Path:
    target = directory / f"{sanitizer}-scheduler.o"
    flags = [one for one in SANITIZERS[sanitizer] if one != "-fsanitize=thread"]
    if not target.exists():
        _compile("-O1", *flags, "-c", HERE / "scheduler.cpp", "-o", target)
    return target


def _compile(*arguments: object) -> None:
    command = ["g++", *FLAGS, f"-I{HERE / 'include'}", f"-I{CSRC}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def preloaded(sanitizer: str) -> dict[str, str]:
    """The environment in which Python loads such a library."""
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in RUNTIMES[sanitizer]
    ]
    found = " ".join(one.stdout.strip() for one in paths)
    # Python and PyTorch leak on purpose, and neither is built with a sanitizer.
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
    }
    return {"LD_PRELOAD": found, **options} if found else {}
