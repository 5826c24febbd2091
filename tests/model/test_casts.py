"""Casts keep numbers: every pair of dtypes, and every argument that takes values."""

import itertools

import numpy as np
import pytest
import torch

import saliency_fast as sf
import saliency_fast.captum as captum
import saliency_fast.evaluate as ev
from saliency_fast.cli.arguments import read_inputs
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.casts import cast

MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64)
NUMBERS = (
    *(0, 1, 2, -1, 0.5, -0.5, 1.5, 127, 128, -128, -129, 200, 255, 256, 300, 65504, 70000),
    *(2**15, 2**24, 2**24 + 1, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**62, 2**63 - 1, -(2**63)),
    *(1e-3, 3.14159, 1e5, 1e30, -1e30, 1e39, 1e300, float("inf"), float("-inf"), float("nan")),
)


def holds(number: float, dtype: torch.dtype, of: torch.dtype) -> bool:
    """Whether a cast may take a number: by Python's own arithmetic."""
    if dtype in MANTISSA:
        if of in MANTISSA:
            return not np.isfinite(number) or not torch.tensor(number).double().to(dtype).isinf()
        odd = abs(int(number))
        while odd and odd % 2 == 0:
            odd //= 2
        return odd.bit_length() <= MANTISSA[dtype] and abs(number) <= torch.finfo(dtype).max
    if not np.isfinite(number) or number != int(number):
        return False
    if dtype == torch.bool:
        return number in (0, 1)
    return torch.iinfo(dtype).min <= int(number) <= torch.iinfo(dtype).max


@pytest.mark.parametrize(("of", "dtype"), list(itertools.product((*WHOLE, *MANTISSA), repeat=2)))
def test_a_cast_keeps_the_number_or_raises(of: torch.dtype, dtype: torch.dtype) -> None:
    for given in NUMBERS:
        if of not in MANTISSA and not holds(given, of, of):
            continue
        number = given if of in MANTISSA else int(given)
        value = torch.tensor([number], dtype=torch.float64 if of in MANTISSA else of).to(of)
        number = value.item()
        if dtype == of or holds(number, dtype, of):
            found = cast(value, dtype, "x")
            assert found.dtype == dtype
            torch.testing.assert_close(found, value.to(dtype), rtol=0, atol=0, equal_nan=True)
        else:
            with pytest.raises(InputError, match="would change"):
                cast(value, dtype, "x")


def test_complex_numbers_lose_no_half() -> None:
    with pytest.raises(InputTypeError, match="view_as_real"):
        cast(torch.ones(1, dtype=torch.complex64), torch.float32, "x")


ids, flags = torch.tensor([[1, 4, 2]]), torch.tensor([[True, False, True]])
pixels = torch.arange(300).remainder(256).to(torch.uint8).view(1, 1, 15, 20)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.double().flatten(1).sum(1)


CHANGED = {
    "a fraction for ids": (ids, 0.5),
    "a fraction for flags": (flags, 0.5),
    "a fraction in a tensor": (ids, torch.tensor([0.5, 1.0, 2.0])),
    "two for flags": (flags, 2),
    "below zero for bytes": (pixels, -1),
    "above 255 for bytes": (pixels, torch.full((1, 15, 20), 300)),
    "beyond int32": (ids.int(), 2**40),
    "infinity for ids": (ids, float("inf")),
    "NaN for ids": (ids, float("nan")),
    "the mean of ids": (ids, "mean"),
    "the mean of flags": (flags, "mean"),
    "a blur of bytes": (pixels, "blur"),
    "noise of ids": (ids, "uniform"),
    "float64 beyond float32": (torch.ones(1, 3), torch.full((3,), 1e39, dtype=torch.float64)),
    "a number beyond float32": (torch.ones(1, 3), 1e39),
    "a whole number that float32 rounds": (torch.ones(1, 3), 2**24 + 1),
    "float32 beyond float16": (torch.ones(1, 3).half(), 1e6),
    "imaginary": (torch.ones(1, 3), torch.full((3,), 1j)),
    "among several": (ids, [0, 0.5]),
    "one of a tuple": ((ids, flags), (0, 0.5)),
}
SCORES = ("feature_ablation", sf.ShapleySampling(4), "occlusion", sf.Lime(400))


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("name", CHANGED)
def test_baselines_that_would_change_are_refused(name: str, method: str) -> None:
    x, baseline = CHANGED[name]
    with pytest.raises((InputError, InputTypeError), match="baseline"):
        sf.explain(lambda *x: sum(map(total, x)), x, method=method, baseline=baseline)


@pytest.mark.parametrize("method", ["integrated_gradients", "expected_gradients", "deeplift"])
def test_baselines_of_gradient_methods_too(method: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 1))
    for baseline in (1e39, torch.full((1, 3), 1e39, dtype=torch.float64), 2**24 + 1):
        with pytest.raises(InputError, match="the baseline would change"):
            sf.explain(model, torch.ones(1, 3), method=method, baseline=baseline)


def test_baselines_that_fit_are_taken_as_they_are() -> None:
    for x, baseline, right in (
        (ids, 2.0, [[-1.0, 2.0, 0.0]]),
        (ids, torch.tensor([1.0, 0.0, 2.0]), [[0.0, 4.0, 0.0]]),
        (ids, np.array([1, 0, 2]), [[0.0, 4.0, 0.0]]),
        (flags, True, [[0.0, -1.0, 0.0]]),
        (flags, 1, [[0.0, -1.0, 0.0]]),
        (torch.tensor([[2, 2]]), "mean", [[0.0, 0.0]]),
        (ids.float(), 0.5, [[0.5, 3.5, 1.5]]),
    ):
        found = sf.explain(total, x, method="feature_ablation", baseline=baseline)
        assert found.values.tolist() == right


def test_features_keep_their_numbers() -> None:
    with pytest.raises(InputTypeError, match="whole numbers"):
        sf.explain(total, ids, method="feature_ablation", features=torch.tensor([[0.0, 0.5, 1.0]]))
    with pytest.raises(InputError, match="feature_mask"):
        captum.FeatureAblation(total).attribute(ids, feature_mask=torch.tensor([[0.0, 0.5, 1.0]]))


def test_substrates_keep_their_numbers() -> None:
    x, maps = torch.rand(2, 4), torch.rand(2, 4)
    model = torch.nn.Linear(4, 3)
    for metric in (ev.Deletion, ev.Insertion, ev.SensitivityN, ev.FaithfulnessCorrelation):
        with pytest.raises(InputError, match="substrate"):
            metric(substrate=1e39)(model, x, maps, target=1)


def test_targets_of_the_facade_keep_their_numbers() -> None:
    with pytest.raises(InputError, match="target"):
        captum.Saliency(torch.nn.Linear(3, 4)).attribute(
            torch.rand(2, 3), target=torch.tensor([1.7, 2.0])
        )


def test_arrays_on_the_command_line_keep_their_numbers(tmp_path) -> None:
    def read(array: np.ndarray) -> torch.Tensor:
        np.save(tmp_path / "x.npy", array)
        return read_inputs([str(tmp_path / "x.npy")], None, torch.float32)[0].x

    assert read(np.array([0.1, 3.0])).tolist() == [[torch.tensor(0.1).item(), 3.0]]
    assert read(np.array([200], np.uint8)).tolist() == [[200.0]]
    for lost in (np.array([1e39]), np.array([2**24 + 1]), np.array([2**63 - 1])):
        with pytest.raises(InputError, match="would change"):
            read(lost)
    with pytest.raises(InputTypeError, match="view_as_real"):
        read(np.array([1j]))
