"""Unusual maps: their statistics, distances, p-values and ROC, against slow versions."""

import json
import math

import pytest
import torch
from torch import nn

from saliency_fast import explain, zoo
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.attacks import fgsm, pgd
from saliency_fast.evaluate.controls import edge_detector
from saliency_fast.evaluate.detection import (
    CoherenceReference,
    adversarial_score,
    attack_roc,
    coherence,
    roc,
    shrunk_correlations,
)
from saliency_fast.methods.paths import IntegratedGradients
from tests.evaluate import naive_adversarial as naive

IG = IntegratedGradients(steps=4)


@pytest.fixture(scope="module")
def digits():
    samples = zoo.held_out()
    return zoo.digits_cnn(), samples.images, samples.labels


def _maps(count: int, *spatial: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *spatial, dtype=torch.float64, generator=generator) ** 3


def test_statistics_are_the_naive_ones() -> None:
    maps = _maps(3, 7, 9)
    found = coherence(maps)
    for row, grid in enumerate(maps):
        amount = grid.abs().flatten().tolist()
        expected = {
            "gini": naive.gini(amount),
            "entropy": naive.entropy(amount),
            "top_share": max(amount) / sum(amount),
            "net": float(grid.sum()) / sum(amount),
            "scale": math.log(sum(amount) / len(amount)),
            "roughness": naive.roughness(grid),
            "roughness_of_magnitude": naive.roughness(grid.abs()),
            "smoothness": naive.smoothness(grid, 3),
            "smoothness_of_magnitude": naive.smoothness(grid.abs(), 5),
            "spread": naive.spread(grid),
        }
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("spatial", [(1,), (9,), (2, 3), (3, 4, 5), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_any_map_are_finite(spatial, dtype) -> None:
    maps = torch.cat([_maps(2, *spatial), torch.zeros(1, *spatial), torch.ones(1, *spatial)])
    found = coherence(maps.to(dtype))
    assert all(bool(one.isfinite().all()) for one in found.values())


def test_scale_alone_follows_units() -> None:
    one, two = coherence(_maps(4, 8, 8)), coherence(1000.0 * _maps(4, 8, 8))
    for name, values in one.items():
        expected = values + math.log(1000.0) if name == "scale" else values
        assert torch.allclose(two[name], expected, atol=1e-10), name


def test_score_is_the_mahalanobis_distance() -> None:
    maps, others = _maps(61, 6, 6), _maps(5, 6, 6, seed=1)
    reference = CoherenceReference.fit(maps, seed=3)
    fitted = torch.randperm(61, generator=torch.Generator().manual_seed(3))[:31]
    values = torch.stack(list(coherence(maps[fitted]).values()), 1)
    centre, deviation = values.mean(0), values.std(0)
    correlations, share = naive.shrunk_correlations((values - centre) / deviation)
    assert reference.shrinkage == pytest.approx(share, abs=1e-12)
    new = torch.stack(list(coherence(others).values()), 1)
    for row, score in zip(new, reference.score(others).tolist(), strict=True):
        away = (row - centre) / deviation
        squared = away @ torch.linalg.solve(correlations, away)
        assert score == pytest.approx(math.sqrt(float(squared) / len(away)), rel=1e-10)


def test_shrinkage_of_statistics_that_say_the_same() -> None:
    one = torch.randn(40, 1, dtype=torch.float64)
    found, share = shrunk_correlations(torch.cat([one, one], 1))
    assert share > 0
    assert bool(torch.linalg.inv(found).isfinite().all())


def test_p_values_count_the_calibrating_scores() -> None:
    reference = CoherenceReference.fit(_maps(41, 6, 6))
    known = reference.calibration
    assert len(known) == 20
    scores = torch.cat([known[:3], known.new_tensor([0.0, 1e9])])
    expected = [(1 + int((known >= one).sum())) / 21 for one in scores]
    assert reference.p_values(scores).tolist() == pytest.approx(expected)


def test_p_values_are_uniform_where_nothing_is_unusual() -> None:
    # With 19 calibrating scores p is k / 20 with equal chances, whatever the scores' distribution.
    generator, drawn = torch.Generator().manual_seed(0), []
    for seed in range(400):
        maps = torch.randn(40, 5, 5, dtype=torch.float64, generator=generator) ** 3
        reference = CoherenceReference.fit(maps[:39], seed=seed)
        drawn.append(reference.p_values(reference.score(maps[39:])))
    counts = torch.cat(drawn).mul(20).round().long().bincount(minlength=21)[1:]
    chi = float(((counts - 20.0) ** 2 / 20.0).sum())
    # Chi squared with 19 degrees of freedom passes 43.8 once in a thousand.
    assert chi < 43.8
    assert int(counts.sum()) == 400


def test_scores_of_strange_maps_are_higher() -> None:
    smooth = nn.functional.avg_pool2d(_maps(60, 1, 20, 20), 5, 1)[:, 0]
    reference = CoherenceReference.fit(smooth[:40])
    usual = reference.score(smooth[40:])
    strange = reference.score(_maps(20, 16, 16, seed=5))
    assert float(strange.min()) > float(usual.max())
    assert bool((reference.p_values(strange) == 1 / 21).all())


@pytest.mark.parametrize("seed", range(3))
def test_area_is_mann_whitney(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 8, (23,), generator=generator).double()
    attacked = torch.randint(2, 11, (17,), generator=generator).double()
    found = roc(clean, attacked)
    assert found.area.mean == pytest.approx(naive.mann_whitney(clean, attacked), abs=1e-12)
    assert float(torch.trapezoid(found.tpr, found.fpr)) == pytest.approx(found.area.mean, abs=1e-12)
    assert found.area.low <= found.area.mean <= found.area.high
    for at, fpr, tpr in zip(found.thresholds, found.fpr, found.tpr, strict=True):
        assert float(fpr) == pytest.approx(float((clean >= at).double().mean()), abs=1e-12)
        assert float(tpr) == pytest.approx(float((attacked >= at).double().mean()), abs=1e-12)
    assert found.fpr[[0, -1]].tolist() == found.tpr[[0, -1]].tolist() == [0.0, 1.0]


def test_roc_of_known_scores() -> None:
    apart = roc(torch.arange(5.0), torch.arange(5.0) + 10)
    assert (apart.area.mean, apart.area.low, apart.area.high) == (1.0, 1.0, 1.0)
    assert apart.rate_at(0.0) == 1.0
    assert roc(torch.arange(5.0) + 10, torch.arange(5.0)).area.mean == 0.0
    same = roc(torch.ones(6), torch.ones(9))
    assert same.area.mean == 0.5
    assert same.rate_at(0.5) == 0.0
    # Three of ten is what is written so.
    assert roc(torch.arange(10.0), torch.tensor([7.0])).rate_at(0.3) == 1.0


def test_interval_is_the_bootstraps() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, attacked = (torch.randn(30, generator=generator) + 0.8 * one for one in (0, 1))
    areas = []
    for _ in range(2000):
        low, high = (
            one[torch.randint(30, (30,), generator=generator)] for one in (clean, attacked)
        )
        areas.append(
            (high[:, None] > low).double().mean() + (high[:, None] == low).double().mean() / 2
        )
    ends = torch.stack(areas).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    found = roc(clean, attacked).area
    # Each end of 2000 samples is off by about 0.002.
    assert [found.low, found.high] == pytest.approx(ends.tolist(), abs=0.012)
    assert roc(clean, attacked).area == found


def test_adversarial_score_is_that_of_the_maps(digits) -> None:
    model, x, _ = digits
    found = adversarial_score(model, x[30:36], x[:30], IG)
    maps = explain(model, x[:36], method=IG, target="predicted").values.sum(1)
    reference = CoherenceReference.fit(maps[:30])
    assert torch.allclose(found.scores, reference.score(maps[30:]), rtol=1e-3)
    assert torch.allclose(found.p_values, reference.p_values(found.scores))
    again = adversarial_score(model, x[30:36], found.reference, IG)
    assert torch.allclose(again.scores, found.scores, rtol=1e-3)
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert said["parameters"]["method"] == "integrated_gradients"
    assert said["parameters"]["references"] == 30
    assert any("no proof" in one for one in said["caveats"])


def test_attacked_digits_are_unusual(digits) -> None:
    model, x, labels = digits
    found = attack_roc(model, x[50:80], labels[50:80], x[:50], IG, 0.2, steps=5)
    assert found.tried == 30
    for name, attack in (("fgsm", fgsm), ("pgd", lambda *given: pgd(*given, steps=5))):
        made = attack(model, x[50:80], labels[50:80], 0.2)
        assert found.fooled[name] == int(made.fooled.sum()) == len(found.scores[name])
        area = naive.mann_whitney(found.scores["clean"], found.scores[name])
        assert found.rocs[name].area.mean == pytest.approx(area, abs=1e-12)
        assert found.rocs[name].area.low > 0.8
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert said["parameters"]["attacks"]["pgd"]["epsilon"] == 0.2
    assert "know nothing" in " ".join(found.caveats)


def test_attacks_that_fool_nothing_have_no_roc(digits) -> None:
    model, x, labels = digits
    found = attack_roc(model, x[50:54], labels[50:54], x[:50], IG, 1e-6, attacks="fgsm")
    assert found.rocs == {"fgsm": None}
    assert "fgsm fooled no input" in found.caveats
    json.dumps(found.as_dict(), allow_nan=False)
    assert "none" in repr(found)


def test_tables_volumes_and_functions() -> None:
    torch.manual_seed(0)
    table, linear = torch.randn(50, 7), nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    found = adversarial_score(linear, table[40:], table[:40])
    assert "roughness" not in found.names
    assert bool(found.scores.isfinite().all())
    volume = torch.randn(30, 2, 4, 5, 6)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(240, 3))
    assert len(adversarial_score(wide, volume[:1], volume[1:], layout="BCDHW").scores) == 1
    signal = torch.randn(30, 2, 40)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(80, 3)).double()
    found = adversarial_score(
        flat, signal[:4].double(), signal[4:].double(), edge_detector, layout="BCT"
    )
    # A map without negative places has the same net for all.
    assert found.reference.left_out == ("net",)


def test_half_models() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)
        model = nn.Sequential(*layers).bfloat16()
        x, others = (torch.rand(count, 2, 8, 8).bfloat16() for count in (6, 40))
    found = adversarial_score(model, x, others, "gradient")
    assert bool(found.scores.isfinite().all())
    labels = model(x).argmax(1)
    measured = attack_roc(model, x, labels, others, "gradient", 0.3, steps=3)
    assert measured.tried == 6


def test_bad_references_and_maps(digits) -> None:
    model, x, labels = digits
    with pytest.raises(InputError, match="too few: got 19"):
        adversarial_score(model, x[:2], x[10:29], IG)
    with pytest.raises(InputError, match="like the others"):
        adversarial_score(model, x[:2], x[:, :, :32], IG)
    with pytest.raises(InputError, match="other inputs"):
        adversarial_score(model, x[:20], x[:20].clone(), IG)
    with pytest.raises(InputTypeError, match="one tensor"):
        adversarial_score(model, [1, 2], x, IG)
    with pytest.raises(InputError, match="all alike"):
        CoherenceReference.fit(torch.ones(20, 4, 4))
    with pytest.raises(InputError, match="finite"):
        CoherenceReference.fit(torch.full((20, 4, 4), math.nan))
    with pytest.raises(InputTypeError, match="floating"):
        CoherenceReference.fit(torch.ones(20, 4, 4, dtype=torch.int64))
    reference = CoherenceReference.fit(_maps(20, 4, 4))
    with pytest.raises(InputError, match="expected"):
        reference.score(_maps(2, 4, 5))
    with pytest.raises(InputError, match=r"\[B, \*spatial\]"):
        reference.score(_maps(3))
    with pytest.raises(InputError, match="attacks must be"):
        attack_roc(model, x, labels, x, IG, attacks=("fgsm", "cw"))
    with pytest.raises(InputError, match="right about none"):
        attack_roc(model, x[:2], (labels[:2] + 1) % 10, x[2:], IG)


def test_bad_scores() -> None:
    good = torch.arange(3.0)
    with pytest.raises(InputError, match="clean must be scores"):
        roc(good[None], good)
    with pytest.raises(InputError, match="attacked must be scores"):
        roc(good, good[:0])
    with pytest.raises(InputError, match="1 scores are NaN"):
        roc(good, torch.tensor([0.0, math.nan]))
    with pytest.raises(InputTypeError, match="tensor"):
        roc([1.0], good)
    with pytest.raises(InputError, match="confidence"):
        roc(good, good, 1.0)
    with pytest.raises(InputError, match="fpr"):
        roc(good, good).rate_at(2.0)
