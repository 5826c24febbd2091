"""Examples in docstrings: they run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import math
import pkgutil
import re
from types import ModuleType

import pytest
import torch

import saliency_fast as sf

WITHOUT_EXAMPLE = set(
    """
    AttentionRollout AttentionWeights BlurIG Clip Conductance Deconvolution DeepLift
    EigenCAM Engine ExpectedGradients FeatureAblation FeaturePermutation GradCAM
    GradCAMPlusPlus Gradient GradientAttention GradientShap GuidedBackprop GuidedGradCAM
    GuidedIG HessianVectorProduct HiResCAM IDGI InputXGradient IntegratedGradients
    IntegratedHessians KernelShap LRP LayerCAM Lime NextToken Occlusion PerExample Plan Rise
    ScoreCAM ShapleySampling ShapleyValues Shared Similarity SmoothGrad SmoothGradSquared
    TemporalRescaling TokenAttribution VarGrad XGradCAM backends explain_tokens
    explain_video
    """.split()
)
"""Public names that have no `Example:` yet. The list may only get shorter."""

NUMBER = re.compile(r"-?\d+\.\d*(?:e-?\d+)?")


class Rounding(doctest.OutputChecker):
    """Compares numbers up to rounding, which differs between processors, and other text exactly."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got), strict=False)
        close = all(math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=1e-6) for a, b in pairs)
        text = (NUMBER.sub("#", want), NUMBER.sub("#", got))
        return close and super().check_output(*text, optionflags)


def modules() -> list[str]:
    """All modules but the GPU kernels, which need Triton."""
    found = pkgutil.walk_packages(sf.__path__, f"{sf.__name__}.")
    return [sf.__name__, *(one.name for one in found if ".kernels" not in one.name)]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [one for one in finder.find(module, module.__name__) if one.examples]


def with_examples() -> list[str]:
    """Modules whose source holds a prompt: the others are not imported."""
    found = []
    for name in modules():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            with open(spec.origin, encoding="utf-8") as file:
                if ">>> " in file.read():
                    found.append(name)
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs a package that is not installed: {error}")
    tests = examples(module)
    assert tests
    for one in tests:
        torch.manual_seed(0)
        text: list[str] = []
        runner = doctest.DocTestRunner(Rounding(), optionflags=doctest.NORMALIZE_WHITESPACE)
        result = runner.run(one, out=text.append)
        if "ModuleNotFoundError" in "".join(text):
            pytest.skip(f"{one.name} needs a package that is not installed")
        assert not result.failed, "".join(text)


def test_every_public_name_has_an_example() -> None:
    names = [name for name in sf.__all__ if not name.startswith("__")]
    without = {
        name for name in names if "Example:" not in (inspect.getdoc(getattr(sf, name)) or "")
    }
    assert not without, f"add an Example: to {sorted(without)}"
