"""report: the same numbers as the metrics alone, names, comparisons, and what cannot be said."""

from __future__ import annotations

import json
import math

import pytest
import torch
from reporting import Again, Check, Known, network, pictures
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate import Deletion, Insertion, Sparseness, bootstrap
from saliency_fast.evaluate.inputs import read_evaluation_input
from saliency_fast.evaluate.metric import (
    ENTRIES,
    GROUPS,
    METRICS,
    Suite,
    fields_of,
    make_metric,
    plain_name,
)
from saliency_fast.evaluate.reports.report import report

QUICK = (Deletion(steps=4), Insertion(steps=4))


@pytest.fixture(scope="module")
def small():
    """A report of two methods and maps of its own by all kinds of metrics."""
    maps = torch.linspace(-1.0, 1.0, 4 * 120).view(4, 12, 10)
    methods = {"gradient": "gradient", "ig": sf.IntegratedGradients(steps=3), "mine": maps}
    return report(
        network(), pictures(), methods=methods, metrics=(*QUICK, Known(), Check(), Again())
    )


def test_numbers_are_those_of_the_metrics_alone(small):
    model, x = network(), pictures()
    att = sf.explain(model, x, target="predicted", method=sf.IntegratedGradients(steps=3))
    for metric in QUICK:
        alone = metric(model, x, att, target=att.classes)
        there = small.outcomes["ig"][metric.name]
        assert torch.equal(alone.values, there.values)
        assert torch.equal(alone.curve.y, there.curve.y)
        assert small.interval("ig", metric.name) == alone.mean()


def test_names_are_in_the_order_given(small):
    assert small.methods == ("gradient", "ig", "mine")
    assert small.controls == ("edge_detector", "random", "centre")
    assert small.names == small.methods + small.controls
    assert list(small.metrics) == ["deletion", "insertion", "known", "has_signs", "again"]


def test_the_best_is_the_best_mean_of_methods_alone(small):
    means = {name: small.interval(name, "deletion").mean for name in small.methods}
    assert small.best("deletion") == min(means, key=means.get)
    means = {name: small.interval(name, "known").mean for name in small.methods}
    assert small.best("known") == max(means, key=means.get)
    # Neither direction is better.
    assert small.best("again") is None


def test_comparisons_are_paired(small):
    gaps = small.comparisons()
    assert list(gaps) == ["ig", "mine"]
    one, two = (small.outcomes[name]["insertion"].values for name in ("ig", "gradient"))
    assert gaps["ig"]["insertion"] == bootstrap(one - two)
    assert list(small.comparisons("mine")) == ["gradient", "ig"]
    assert small.gap("mine", "random", "insertion").mean == pytest.approx(
        small.interval("mine", "insertion").mean - small.interval("random", "insertion").mean
    )


def test_what_cannot_be_measured_is_told_with_its_reason(small):
    assert [(one.method, one.metric) for one in small.unmeasured] == [("mine", "again")]
    assert "explains again" in small.unmeasured[0].why
    assert small.interval("mine", "again") is None


def test_rows_are_one_for_each_cell(small):
    rows = small.rows()
    assert len(rows) == 6 * 5 - 1
    row = next(row for row in rows if (row["method"], row["metric"]) == ("mine", "has_signs"))
    assert (row["control"], row["passed"]) == (False, False)
    assert row["best"] == (small.best("has_signs") == "mine")


def test_the_verdict_is_of_methods_alone(small):
    assert small.passed is False
    signed = {"a": -torch.ones(4, 12, 10), "b": -torch.ones(4, 12, 10)}
    assert report(network(), pictures(), methods=signed, metrics=[Check()]).passed is True
    assert report(network(), pictures(), methods=signed, metrics=[Known()]).passed is None


def test_json_holds_everything_and_no_nan(small):
    found = json.loads(small.json(), parse_constant=pytest.fail)
    assert found["schema"] == 1
    cell = found["outcomes"]["mine"]["known"]
    assert cell["values"][0] is None
    assert cell["values"][1:] == small.outcomes["mine"]["known"].values[1:].tolist()
    assert cell["curve"]["y"][1] == small.outcomes["mine"]["known"].curve.y[1].tolist()
    assert cell["mean"]["mean"] == pytest.approx(small.interval("mine", "known").mean)
    assert cell["mean"]["count"] == 3
    deletion = found["outcomes"]["gradient"]["deletion"]
    assert deletion["parameters"]["substrate"] == "zero"
    assert found["provenance"]["classes"] == small.classes.tolist()
    assert found["provenance"]["methods"]["ig"]["parameters"]["steps"] == 3
    assert found["unmeasured"][0]["metric"] == "again"
    assert (
        found["comparisons"]["ig"]["insertion"]["mean"]
        == small.gap("ig", "gradient", "insertion").mean
    )


def test_targets_are_looked_up_once_and_shared():
    model, x = network(), pictures()
    found = report(model, x, methods="gradient", metrics=[Known()], controls=())
    assert torch.equal(found.classes, model(x).argmax(1))


def test_nothing_is_left_behind():
    model = network().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = report(model, pictures(2), metrics=(*QUICK, Again()))
    assert model.training
    assert any("training mode" in one for one in found.caveats)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("model", "x", "target"),
    [
        (nn.Linear(5, 3), torch.rand(3, 5), "predicted"),
        (nn.Linear(5, 1), torch.rand(3, 5), None),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten()), torch.rand(1, 2, 9), "predicted"),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten()), torch.rand(2, 1, 4, 4, 5), 3),
        (network(1, dtype=torch.float64), pictures(2, 1, torch.float64), [0, 2]),
        (nn.Sequential(network(), nn.Softmax(1)), pictures(2), "predicted"),
    ],
)
def test_any_model_and_shape(model, x, target):
    found = report(model.eval(), x, target=target, metrics=Suite(("deletion", "insertion"), True))
    assert found.unmeasured == ()
    assert len(found.rows()) == 12
    json.loads(found.json(), parse_constant=pytest.fail)
    assert found.html().startswith("<!DOCTYPE html>")
    assert "deletion" in str(found)


def test_one_number_is_read_as_it_is_and_probabilities_too():
    single = report(nn.Linear(5, 1), torch.rand(3, 5), target=None, metrics=Suite(["deletion"]))
    assert single.outcomes["gradient"]["deletion"].parameters["output"] == "logit"
    model = nn.Sequential(network(), nn.Softmax(1))
    shares = report(model, pictures(), methods="gradient", metrics=QUICK)
    assert any("probabilities already" in one for one in shares.caveats)
    curve = shares.outcomes["gradient"]["deletion"].curve
    assert torch.allclose(curve.y[:, 0].float(), model(pictures()).amax(1), atol=1e-6)


def test_methods_that_fail_are_told_and_stop_nothing():
    def broken(model, inputs, target):
        raise KeyError("no such layer")

    methods = {"broken": broken, "nan": torch.full((4, 12, 10), math.nan), "gradient": "gradient"}
    found = report(network(), pictures(), methods=methods, metrics=QUICK)
    assert {one.method: one.metric for one in found.unmeasured} == {"broken": "maps", "nan": "maps"}
    assert "KeyError: 'no such layer'" in found.unmeasured[0].why
    assert set(found.outcomes["gradient"]) == {"deletion", "insertion"}
    assert "not measured" in str(found)


def test_where_nothing_can_be_measured_the_first_error_is_raised():
    with pytest.raises(InputError, match="must match the inputs"):
        report(
            network(), pictures(), methods={"a": torch.rand(4, 3, 3)}, controls=(), metrics=QUICK
        )


def test_maps_without_a_method_alone_cannot_be_explained_again():
    maps = {"a": torch.rand(4, 12, 10)}
    with pytest.raises(InputError, match="again needs method, since it explains again"):
        report(network(), pictures(), methods=maps, controls=(), metrics=[Again()])


def test_attributions_bring_their_baseline_and_must_explain_the_same():
    model, x = network(), pictures()
    method = sf.IntegratedGradients(steps=4)
    att = sf.explain(model, x, target=1, method=method, baseline="blur")
    again = report(model, x, methods={"ig": att}, target=1, metrics=[Again()], controls=())
    # Explained again from the blurred input; from zeros the maps would differ.
    assert float(again.outcomes["ig"]["again"].values.max()) == 0.0
    with pytest.raises(InputError, match="explains other classes"):
        report(model, x, methods={"ig": att}, target=2, metrics=[Again()], controls=())


def test_a_baseline_goes_to_the_methods_that_take_one():
    found = report(
        *(network(), pictures()),
        methods=("gradient", "integrated_gradients"),
        baseline="blur",
        metrics=[Again()],
        controls=(),
    )
    assert found.unmeasured == ()
    made = found.provenance["methods"]
    assert (made["gradient"]["baseline"], made["integrated_gradients"]["baseline"]) == (
        None,
        "blur",
    )


def test_the_same_method_twice_is_told_apart_by_its_fields():
    methods = (sf.SmoothGrad(samples=4), sf.SmoothGrad(samples=6))
    found = report(network(), pictures(2), methods=methods, metrics=[Known()], controls=())
    assert found.names == ("smoothgrad", "smoothgrad(samples=6)")


def test_a_random_model_is_noticed():
    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + torch.randn(len(x), 3)

    found = report(Noisy(), pictures(), methods="gradient", metrics=[Known()], controls=())
    assert any("not deterministic" in one for one in found.caveats)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"methods": "magic"}, InputError, "method must be one of"),
        ({"methods": ()}, InputError, "methods must hold one at least"),
        ({"methods": torch.rand(4, 12, 10)}, InputTypeError, "must be named"),
        ({"methods": [torch.rand(4, 12, 10)]}, InputTypeError, "must be named"),
        ({"methods": {"a": 3}}, InputTypeError, "a must be a method"),
        ({"methods": [sf.Gradient]}, InputTypeError, "method must be a method itself"),
        ({"methods": ["gradient", "gradient"]}, InputError, "gradient is there twice"),
        ({"methods": {"random": "gradient"}}, InputError, "random is there twice"),
        ({"controls": ["edges"]}, InputError, "controls must be of edge_detector"),
        ({"metrics": ["deletio"]}, InputError, "did you mean 'deletion'"),
        ({"metrics": [Deletion]}, InputTypeError, r"make one with Deletion\(\)"),
        ({"metrics": 3}, InputTypeError, "metrics must be metrics"),
        ({"metrics": ()}, InputError, "metrics must hold one at least"),
        ({"metrics": [Deletion(), Deletion(steps=2)]}, InputError, "deletion is there twice"),
        ({"confidence": 95}, InputError, "confidence must lie between 0 and 1"),
        ({"target": 9}, InputError, "target must lie in the model's 3 classes"),
        ({"boxes": [[0, 0, 99, 5]] * 4}, InputError, "boxes must lie inside"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        report(network(), pictures(), **options)


@pytest.mark.parametrize(
    "x", [pictures(0), pictures() * math.nan, (pictures() * 9).int(), "cat.png"]
)
def test_wrong_inputs(x):
    with pytest.raises((InputError, InputTypeError)):
        report(network(), x)


def test_unknown_names_of_a_report(small):
    with pytest.raises(InputError, match="method must be one of gradient, ig"):
        small.interval("vargrad", "deletion")
    with pytest.raises(InputError, match="metric must be one of deletion"):
        small.best("road")


def test_a_suite_passes_options_to_the_metrics_that_have_them():
    suite = Suite(substrate="blur", steps=7, seed=3, fields={"insertion": {"steps": 9}})
    found = suite.metrics(False)
    assert (found["deletion"].substrate, found["deletion"].steps) == ("blur", 7)
    assert (found["insertion"].steps, found["insertion"].output) == (9, "logit")
    assert found["deletion"].seed == 3
    assert Suite(quick=True).metrics()["deletion"].steps < Suite().metrics()["deletion"].steps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": "deletion"}, "names must be several"),
        ({"names": ["magic"]}, "metric must be one of"),
        ({"fields": {"magic": {}}}, "not asked for"),
        ({"fields": {"deletion": {"pace": 3}}}, "deletion has no field 'pace'"),
        ({"substrate": "noise"}, "substrate must be one of"),
        ({"steps": 0}, "steps must be a whole number"),
    ],
)
def test_wrong_suites(options, text):
    with pytest.raises(InputError, match=text):
        Suite(**options)


def test_the_old_name_of_evaluate_warns():
    maps = torch.rand(2, 5)
    data = read_evaluation_input(None, maps, maps)
    with pytest.deprecated_call(match=r"use Metric\.evaluate"):
        old = Sparseness().judge(data)
    assert torch.equal(old.values, Sparseness().evaluate(data).values)


def test_metrics_register_in_the_order_of_a_report():
    groups = [entry.group for entry in ENTRIES.values()]
    assert groups == sorted(groups, key=list(GROUPS).index)
    assert list(METRICS)[-3:] == ["manipulation", "sparseness", "complexity"]


@pytest.mark.parametrize("name", list(ENTRIES))
def test_every_metric_of_the_suite_is_made_by_its_name_and_says_what_it_asks(name):
    metric = make_metric(name, dict(ENTRIES[name].quick))
    assert type(metric) is METRICS[name]
    assert ENTRIES[name].fields or plain_name(metric.name) == name
    assert ENTRIES[name].asks.endswith(".")
    assert ENTRIES[name].paper
    assert set(ENTRIES[name].quick) <= set(fields_of(type(metric)))
