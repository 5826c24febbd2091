"""Every Triton kernel compiled, without a GPU, for each target: nothing spills, and data moves 16
bytes at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from saliency_fast.kernels.configurations import TABLE, Configuration  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import compiled, kernels, tuning  # noqa: E402
from benchmarks.specialisations import (  # noqa: E402
    MODULES,
    TARGETS,
    Specialisation,
    key,
    specialisations,
)

ALL = list(specialisations())
ODD_TARGETS = ("sm_90", "gfx942")
STREAMING = (".points", ".accumulate", ".finish", ".masks", ".ranks", ".segments", ".windows")
each_kernel = pytest.mark.parametrize("special", ALL, ids=lambda special: special.name)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@each_kernel
@pytest.mark.parametrize("target", TARGETS)
def test_no_register_spills(special: Specialisation, target: str):
    for odd in (False, True) if target in ODD_TARGETS else (False,):
        used = compiled.spills(special.compiled(target, odd=odd))
        # Lanes of vector registers take scalars of AMD's, and memory only where these spill.
        used.pop("sgpr_spill_count", None)
        assert not any(used.values()), f"{special.name} for {target}, odd={odd}: {used}"


@pytest.mark.parametrize(
    "special",
    # Packed masks are bytes.
    [s for s in ALL if s.kernel.__module__.endswith(STREAMING) and "pack" not in s.name],
    ids=lambda special: special.name,
)
def test_data_moves_in_16_byte_accesses(special: Specialisation):
    text = special.compiled("sm_90").asm["ptx"]
    stores = re.findall(r"st\.global\S*", text)
    wide = [store for store in stores if store in ("st.global.v4.b32", "st.global.v2.b64")]
    # One scalar may be stored beside the data: a count, a partial sum, or a byte of a mask.
    assert wide, f"{special.name} stores by {sorted(set(stores))}"
    assert len(stores) - len(wide) <= 1, f"{special.name} stores by {sorted(set(stores))}"
    assert re.search(r"ld\.global\S*\.v[24]\.b", text), f"{special.name} loads one by one"
    amd = compiled.of_triton(special.compiled("gfx942"))
    assert amd.load == amd.store == 16, f"{special.name} for gfx942: {amd}"


def test_the_table_names_every_kernel():
    """Of configurations and of specialisations. Kernels begin with an underscore; other jitted
    functions are parts of them.
    """
    jitted = {
        value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.startswith("_")
    }
    assert jitted == {special.kernel for special in ALL}
    assert {key(kernel) for kernel in jitted} == set(TABLE)
    for special in ALL:
        assert special.width in TABLE[special.key].widths, special.name


def written() -> dict:
    return json.loads((kernels.RESULTS / "kernels.json").read_text())


def test_the_results_have_every_kernel_in_its_configuration():
    """After a change of the table or of a kernel: `python -m benchmarks.kernels`."""
    sizes = ("elements", "warps", "ahead", "tiles")
    found = {
        (row["variant"], row["target"]): tuple(row[size] for size in sizes)
        for row in written()["rows"]
        if row["language"] == "Triton"
    }
    assert found == {
        (special.name, target): tuple(
            getattr(special.configuration(target), size) for size in sizes
        )
        for special in ALL
        for target in TARGETS
    }
    assert {name: one["reason"] for name, one in written()["reasons"].items()} == {
        name: one["reason"] for name, one in kernels.reasons().items()
    }


@pytest.mark.parametrize("kernel", ["points.line", "overlay.count", "masks.pack"])
def test_the_results_are_what_is_compiled(kernel: str):
    if written()["setting"]["triton"] != triton.__version__:
        pytest.skip("the results were written by another Triton")
    rows = [row for row in written()["rows"] if row["kernel"] == kernel]
    assert rows == kernels.triton_rows(kernel)


def test_candidates_that_spill_are_refused():
    assert tuning.spilling("points.line", 4, "sm_90") == ""
    with tuning.using("points.line", Configuration(4096, warps=1)):
        assert tuning.spilling("points.line", 4, "sm_90").startswith("spills: stack ")


def test_resident_warps_are_what_llvm_finds():
    """By registers; of shared memory LLVM sees none here."""
    for special in ALL[::4]:
        kernel = special.compiled("gfx942")
        waves = re.search(r"; Occupancy: (\d+)", kernel.asm["amdgcn"])
        counters = replace(compiled.of_triton(kernel), shared=0)
        assert compiled.resident_warps(counters, 4, "gfx942") == 4 * int(waves.group(1))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "target", "resident"),
    [
        (32, 0, 4, "sm_90", 64),
        (33, 0, 4, "sm_90", 48),
        (40, 0, 8, "sm_80", 48),
        (168, 0, 4, "sm_80", 12),
        (255, 0, 8, "sm_100", 8),
        (16, 0, 1, "sm_90", 32),  # as many blocks as there may be
        (32, 163 * 1024, 4, "sm_80", 4),
        (32, 48 * 1024, 4, "sm_80", 12),
    ],
)
def test_resident_warps_on_nvidia(
    registers: int, shared: int, warps: int, target: str, resident: int
):
    """As NVIDIA's occupancy calculator has them."""
    counters = compiled.Counters(registers, 0, {}, shared, 16, 16)
    assert compiled.resident_warps(counters, warps, target) == resident
