"""The code base: public surface, imports of kernels, light imports, short functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import saliency_fast as sf
from saliency_fast.methods import METHODS

ROOT = Path(__file__).parent.parent
PUBLIC = [
    "IDGI",
    "LRP",
    "AttentionRollout",
    "AttentionWeights",
    "Attribution",
    "BlurIG",
    "Clip",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "EigenCAM",
    "Engine",
    "ExpectedGradients",
    "FeatureAblation",
    "FeaturePermutation",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientAttention",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCAM",
    "GuidedIG",
    "HessianVectorProduct",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "IntegratedHessians",
    "KernelShap",
    "LayerCAM",
    "Lime",
    "NextToken",
    "Occlusion",
    "PerExample",
    "Plan",
    "Replay",
    "Rise",
    "ScoreCAM",
    "ShapleySampling",
    "ShapleyValues",
    "Shared",
    "Similarity",
    "SmoothGrad",
    "SmoothGradSquared",
    "TemporalRescaling",
    "TokenAttribution",
    "VarGrad",
    "XGradCAM",
    "__version__",
    "backends",
    "explain",
    "explain_tokens",
    "explain_video",
    "load",
    "replay",
]


def test_public_surface() -> None:
    assert sf.__all__ == PUBLIC
    assert all(hasattr(sf, name) for name in PUBLIC)
    assert {method.__name__ for method in METHODS.values()} <= set(PUBLIC)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        else:
            continue
        for name in names:
            root = name.split(".")[0]
            assert root in {"torch", "triton"} or root in sys.stdlib_module_names


def test_importing_needs_no_triton_compiler_or_heavy_library() -> None:
    heavy = (
        "triton",
        "torch._dynamo",
        "transformers",
        "PIL",
        "rich",
        "matplotlib",
        "captum",
        "sklearn",
    )
    code = f"""
import sys, torch
before = set(sys.modules)
import saliency_fast as sf
sf.explain(torch.nn.Linear(3, 2), torch.ones(2, 3), target=0)
print([name for name in {heavy!r} if name in sys.modules and name not in before])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_methods_are_imported_when_they_are_asked_for() -> None:
    code = """
import sys
import saliency_fast as sf
before = "saliency_fast.methods.cam" in sys.modules
assert sf.GradCAM is sf.methods.METHODS["grad_cam"]
print(before, [name for name, kind in sf.methods.METHODS.items() if kind.name != name])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False []"


LONGEST = 60
"""Lines of a function at most, its docstring aside."""


def lines_of_functions(path: Path) -> Iterator[tuple[str, int]]:
    """(qualified name, lines without the docstring) of every function in a file."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for one in ast.iter_child_nodes(node):
            if not isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from walk(one, prefix)
                continue
            if not isinstance(one, ast.ClassDef):
                first = one.body[0]
                documented = ast.get_docstring(one, clean=False) is not None
                docstring = first.end_lineno - first.lineno + 1 if documented else 0
                yield prefix + one.name, one.end_lineno - one.lineno + 1 - docstring
            yield from walk(one, f"{prefix}{one.name}.")

    yield from walk(ast.parse(path.read_text()), "")


def test_functions_stay_short() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    long = {
        f"{file} {name}"
        for file in tracked
        for name, lines in lines_of_functions(ROOT / file)
        if lines > LONGEST
    }
    assert not long, f"split these functions: {sorted(long)}"


def test_files_of_tests_have_names_of_their_own() -> None:
    # Two of one name stop pytest where both are collected: they are one module for it.
    names = Counter(path.name for path in ROOT.glob("tests/**/test_*.py"))
    names.update(path.name for path in ROOT.glob("benchmarks/**/test_*.py"))
    assert len(names) > 100
    assert [name for name, times in names.items() if times > 1] == []


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert pages
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text()
    for page in folder.glob("0*.md"):
        assert f"({page.name})" in index
