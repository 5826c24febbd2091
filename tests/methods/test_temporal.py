"""Temporal saliency rescaling against the paper's loop, over several base methods."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError
from tests import naive_paths
from tests.models import Image, make, randn
from tests.naive import relative_l2

BASES = (
    "gradient",
    sf.InputXGradient(),
    sf.IntegratedGradients(5),
    sf.SmoothGrad(6, sigma=0.3, seed=2),
    sf.VarGrad(6, sigma=0.3, seed=2),
)


class Last(nn.Module):
    """A series [B, T, 3] to classes by an LSTM's last step."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("above", [0.55, 0.2])
def test_the_papers_loop(base: object, above: float) -> None:
    model, x, start = make(Last), randn(2, 6, 3), randn(2, 6, 3, seed=1)
    target = [[0, 1], [4, 2]]
    method = sf.TemporalRescaling(base, above=above)
    for size in (4, None):
        found = sf.explain(
            model, x, target=target, method=method, baseline=start, points_per_launch=size
        )
        for i in range(2):
            for k, c in enumerate(target[i]):
                origin = start[i] if isinstance(base, sf.IntegratedGradients) else None

                def of(z: Tensor, c: int = c, origin: Tensor | None = origin) -> Tensor:
                    return sf.explain(
                        model, z[None], target=c, method=base, baseline=origin
                    ).values[0]

                expected = naive_paths.temporal_rescaling(of, x[i], start[i], above)
                assert relative_l2(found.values[i, k], expected) < 1e-11
    assert found.delta is None


def test_time_may_be_the_last_axis() -> None:
    model, x = make(Last), randn(2, 6, 3)
    found = sf.explain(model, x, target=1, method=sf.TemporalRescaling(above=0.0))
    turned = sf.explain(
        lambda z: model(z.mT), x.mT, target=1, method=sf.TemporalRescaling(axis=2, above=0.0)
    )
    assert relative_l2(turned.values.mT, found.values) < 1e-12
    assert bool((found.values > 0).all())


def test_a_record_holds_the_base(tmp_path: Path) -> None:
    model, x = make(Last), randn(2, 6, 3)
    method = sf.TemporalRescaling(sf.IntegratedGradients(3), above=0.3)
    found = sf.explain(model, x, target=1, method=method)
    loaded = sf.load(found.save(tmp_path / "rescaled.safetensors"))
    again = sf.replay(loaded, model, x)
    assert again
    assert again.again.provenance.parameters == found.provenance.parameters


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="base must be a gradient"):
        sf.TemporalRescaling("expected_gradients")
    with pytest.raises(InputError, match="base must be a gradient"):
        sf.TemporalRescaling(sf.IntegratedGradients(5, tolerance=0.1))
    with pytest.raises(InputError, match="axis must be 1 or 2"):
        sf.TemporalRescaling(axis=0)
    with pytest.raises(InputError, match=r"takes one series \[B, T, F\]: got \[2, 7\]"):
        sf.explain(lambda z: z.sum(1), randn(2, 7), method=sf.TemporalRescaling(axis=2))
    with pytest.raises(InputError, match="takes one series"):
        sf.explain(make(Image), randn(1, 3, 12, 12), target=1, method="temporal_rescaling")
