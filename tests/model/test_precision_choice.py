"""Which precision a call takes, and what it may ask for."""

from __future__ import annotations

import copy
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast._torch_compat import fp32_precision
from saliency_fast.captum import IntegratedGradients
from saliency_fast.engine import planner
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.passes import half
from saliency_fast.graph.passes.half import FLOAT32, PRECISIONS, arithmetic
from tests.configured import configure
from tests.models import Image, Tabular

IMAGE = (Image, (3, 9, 9))


def seeded(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int = 3
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(batch, *shape)


class TestAuto:
    def test_takes_the_fastest_that_is_allowed(self, monkeypatch):
        net, x = seeded(*IMAGE)
        monkeypatch.setattr(planner.Planner, "_order", lambda _: ["bfloat16", "float32"])
        free = sf.explain(net, x, target=1, precision="auto", tolerance=0.5)
        assert free.provenance.precision == "bfloat16"
        strict = sf.Engine(net, precision="auto", tolerance=1e-6)
        found = strict(x, 1)
        assert found.provenance.precision == "float32"
        assert found.precision_error is None
        assert torch.equal(found.values, sf.explain(net, x, target=1).values)

    def test_the_methods_tolerance_counts(self, monkeypatch):
        net, x = seeded(*IMAGE)
        monkeypatch.setattr(planner.Planner, "_order", lambda _: ["bfloat16", "float32"])
        for tolerance, name in ((0.5, "bfloat16"), (1e-5, "float32")):
            method = sf.IntegratedGradients(tolerance=tolerance, max_steps=200)
            found = sf.explain(net, x, target=1, method=method, precision="auto")
            assert found.provenance.precision == name

    def test_what_is_slower_is_not_tried(self, monkeypatch):
        net, x = seeded(*IMAGE)
        seconds = {"bfloat16": 1.0, "float32": 1.05}

        def timed(job: Any) -> Any:
            each = seconds[job.plan.precision]
            return replace(job, plan=replace(job.plan, seconds_per_point=each))

        monkeypatch.setattr(planner, "timed", timed)
        engine = sf.Engine(net, precision="auto", tolerance=0.9)
        assert engine(x, 1).provenance.precision == "float32"
        seconds["bfloat16"] = 0.5
        other = sf.Engine(copy.deepcopy(net), precision="auto", tolerance=0.9)
        assert other(x, 1).provenance.precision == "bfloat16"

    def test_the_choice_holds_for_later_calls(self, monkeypatch):
        net, x = seeded(*IMAGE)
        orders = iter((["bfloat16", "float32"], ["float32"]))
        monkeypatch.setattr(planner.Planner, "_order", lambda _: next(orders))
        engine = sf.Engine(net, precision="auto", tolerance=0.9)
        assert {engine(x, k).provenance.precision for k in range(3)} == {"bfloat16"}

    def test_float64_stays(self):
        net, x = seeded(*IMAGE)
        found = sf.explain(net.double(), x.double(), target=1, precision="auto")
        assert (found.provenance.precision, found.values.dtype) == ("float32", torch.float64)

    def test_streams_begin_again(self, monkeypatch):
        net, x = seeded(*IMAGE)
        monkeypatch.setattr(planner.Planner, "_order", lambda _: ["bfloat16", "float32"])
        engine = sf.Engine(net, precision="auto", tolerance=1e-6, points_per_launch=40)
        parts = list(engine.stream(x, 1))
        assert {part.provenance.precision for part in parts} == {"float32"}
        assert torch.equal(parts[-1].values, sf.explain(net, x, target=1).values)


class TestDefault:
    """On GPUs, for which the CPU stands in: the fastest that is exact enough."""

    @pytest.fixture(autouse=True)
    def _of_gpus(self, monkeypatch):
        monkeypatch.setitem(half.BY_DEFAULT, "cpu", half.BY_DEFAULT["cuda"])
        monkeypatch.setattr(planner.Planner, "_order", lambda _: ["bfloat16", "float32"])

    def test_plans_and_records_name_it(self):
        net, x = seeded(*IMAGE)
        engine = sf.Engine(net, tolerance=0.5)
        assert engine(x, 1).provenance.precision == "bfloat16"
        plan = engine.plan(x, 1)
        assert plan.precision == "bfloat16"
        assert "precision: bfloat16 by 'auto': the fastest here that may cost 0.5" in plan.notes

    def test_two_hundredths_are_allowed(self, monkeypatch):
        net, x = seeded(*IMAGE)
        limits = []
        fastest = planner.Planner.fastest
        monkeypatch.setattr(
            planner.Planner,
            "fastest",
            lambda self, most: limits.append(most) or fastest(self, most),
        )
        sf.explain(net, x, target=1)
        assert limits == [0.02]

    def test_later_calls_are_prepared(self, monkeypatch):
        net, x = seeded(*IMAGE)
        engine, job, made = sf.Engine(net, tolerance=0.5), planner.Planner.job, []
        for _ in range(2):
            engine(x, 1)
        monkeypatch.setattr(
            planner.Planner, "job", lambda self, *about: made.append(1) or job(self, *about)
        )
        found = engine(x, 1)
        assert (found.provenance.precision, made) == ("bfloat16", [])
        # What it may cost is asked in each call.
        assert sf.Engine(net, tolerance=1e-6)(x, 1).provenance.precision == "float32"

    def test_who_asks_for_float32_has_it(self):
        net, x = seeded(*IMAGE)
        found = sf.explain(net, x, target=1, precision="float32")
        assert (found.provenance.precision, found.precision_error) == ("float32", None)

    @pytest.mark.parametrize(
        "method", ["gradient", sf.IntegratedGradients(4), sf.Occlusion((1, 3, 3)), "deconvolution"]
    )
    def test_few_points_and_other_methods_stay_in_float32(self, monkeypatch, method: Any):
        configure(monkeypatch, direct_points=256)
        net, x = seeded(*IMAGE)
        assert sf.explain(net, x[:1], target=1, method=method).provenance.precision == "float32"

    def test_maps_on_autograds_graph_too(self):
        net, x = seeded(*IMAGE)
        found = sf.explain(net, x[:1], target=1, create_graph=True)
        assert found.provenance.precision == "float32"

    def test_the_facade_keeps_pytorchs_settings(self):
        seen = []

        class Net(Tabular):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(half.users_tf32())
                return super().forward(x)

        net, x = Net().eval(), torch.randn(2, 7)
        IntegratedGradients(net).attribute(x, target=1)
        assert set(seen) == {tuple(fp32_precision("cuda", one) for one in half._KINDS)}
        seen.clear()
        sf.explain(net, x, target=1)
        assert set(seen) == {()}

    def test_where_these_are_coarse_so_is_what_counts_as_rounding(self):
        gpu, cpu = torch.device("cuda"), torch.device("cpu")
        assert half.rounding_of(FLOAT32, gpu) == "float32"
        with half.tf32_as_set():
            # PyTorch's default for convolutions.
            assert half.rounding_of(FLOAT32, gpu) == "tf32"
            assert half.rounding_of(FLOAT32, cpu) == "float32"
            assert half.rounding_of(PRECISIONS["bfloat16"], gpu) == "bfloat16"


def test_cpus_take_float32():
    net, x = seeded(*IMAGE)
    assert sf.explain(net, x, target=1).provenance.precision == "float32"


class TestBadInput:
    def test_names(self):
        with pytest.raises(InputError, match=r"must be one of float32, tf32, .*got 'float8'"):
            sf.Engine(Tabular(), precision="float8")

    @pytest.mark.parametrize("name", ["float16", "tf32"])
    def test_what_the_device_does_not_offer(self, name: str):
        with pytest.raises(InputError, match=r"not offered on cpu: expected one of bfloat16"):
            sf.explain(Tabular().eval(), torch.randn(2, 7), target=1, precision=name)

    def test_float64(self):
        with pytest.raises(InputError, match=r"got float64; use .float\(\)"):
            sf.explain(
                Tabular().double(), torch.randn(2, 7).double(), target=1, precision="bfloat16"
            )

    @pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf")])
    def test_tolerances(self, tolerance: float):
        with pytest.raises(InputError, match="tolerance must be a positive number"):
            sf.Engine(Tabular(), precision="auto", tolerance=tolerance)

    def test_models_that_do_not_run_in_it(self, monkeypatch):
        class Picky(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if torch.is_autocast_enabled("cpu"):
                    raise RuntimeError("this layer has no half version")
                return x.tanh().sum(1)

        with pytest.raises(ModelError, match=r"no half version; use precision='float32'"):
            sf.explain(Picky(), torch.randn(2, 7), precision="bfloat16")


class TestSwitches:
    """TF32 is allowed by switches that hold for a whole process."""

    GPU = torch.device("cuda")

    def allowed(self) -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def test_are_set_and_come_back(self):
        before = self.allowed()
        with arithmetic(PRECISIONS["tf32"], self.GPU):
            assert self.allowed() == (True, True)
            with arithmetic(PRECISIONS["tf32"], self.GPU):
                pass
            assert self.allowed() == (True, True)
        assert self.allowed() == before
        with arithmetic(FLOAT32, self.GPU):
            assert self.allowed() == (False, False)
        with suppress(KeyError), arithmetic(PRECISIONS["tf32"], self.GPU):
            raise KeyError
        assert self.allowed() == before

    def test_threads_that_want_others_wait(self):
        before, seen = self.allowed(), []

        def work(name: str) -> None:
            wanted = PRECISIONS[name]
            for _ in range(200):
                with arithmetic(wanted, self.GPU):
                    seen.append(self.allowed() == (wanted.tf32, wanted.tf32))

        threads = [threading.Thread(target=work, args=(n,)) for n in ("tf32", "float32") * 4]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(seen) == 1600
        assert all(seen)
        assert self.allowed() == before
