"""Every Triton kernel compiled, without a GPU, for each target: nothing spills, and data moves 16
bytes at a time.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from specialisations import MODULES, TARGETS, Specialisation, specialisations  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ALL = list(specialisations())
ODD_TARGETS = ("sm_90", "gfx942")
STREAMING = (".points", ".accumulate", ".finish", ".masks")
each_kernel = pytest.mark.parametrize("special", ALL, ids=lambda special: special.name)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(special: Specialisation, target: str, *, odd: bool = False):
    source = special.source(odd=odd)
    return triton.compile(source, target=TARGETS[target], options=special.options)


def local_memory(kernel, target: str, directory: Path) -> dict[str, int]:
    """What the compiler keeps in local memory instead of registers, by its own counters."""
    if "amdgcn" in kernel.asm:
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        found = {n: re.search(rf"\.{n}:\s+(\d+)", kernel.asm["amdgcn"]) for n in names}
    else:
        cubin = directory / f"{target}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # The stack holds the spills, so it bounds them.
        found = {name: re.search(rf"\b{name}:(\d+)", usage) for name in ("STACK", "LOCAL")}
    assert all(found.values()), f"the counters are not where they were: {found}"
    return {name: int(match.group(1)) for name, match in found.items()}


@each_kernel
@pytest.mark.parametrize("target", TARGETS)
def test_no_register_spills(special: Specialisation, target: str, tmp_path: Path):
    for odd in (False, True) if target in ODD_TARGETS else (False,):
        used = local_memory(compiled(special, target, odd=odd), target, tmp_path)
        assert not any(used.values()), f"{special.name} for {target}, odd={odd}: {used}"


@pytest.mark.parametrize(
    "special",
    [s for s in ALL if s.kernel.__module__.endswith(STREAMING) and s.dtype != "bool"],
    ids=lambda special: special.name,
)
def test_data_moves_in_16_byte_accesses(special: Specialisation):
    text = compiled(special, "sm_90").asm["ptx"]
    stores = re.findall(r"st\.global\S*", text)
    wide = [store for store in stores if store in ("st.global.v4.b32", "st.global.v2.b64")]
    # One scalar may be stored beside the data: a count, a partial sum, or a byte of a mask.
    assert wide, f"{special.name} stores by {sorted(set(stores))}"
    assert len(stores) - len(wide) <= 1, f"{special.name} stores by {sorted(set(stores))}"
    assert re.search(r"ld\.global\S*\.v[24]\.b", text), f"{special.name} loads one by one"


def test_the_table_names_every_kernel():
    """Kernels begin with an underscore; other jitted functions are parts of them."""
    kernels = {
        value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.startswith("_")
    }
    assert kernels == {special.kernel for special in ALL}
