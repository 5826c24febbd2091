"""What a report says first: sentences that hold for several methods at once, ties, and slices."""

from __future__ import annotations

import io
from base64 import b64decode

import pytest
import torch
from PIL import Image
from reporting import Known, network, pictures
from torch import nn

from saliency_fast.evaluate import PointingGame, SanityCheck
from saliency_fast.evaluate.reports.report import report
from saliency_fast.evaluate.reports.result import FEW, slice_of, spelled, verdicts
from tests.pages import Reader

BATCH = FEW + 4


def _pointing(batch: int, **methods: torch.Tensor):
    """A report on maps whose maximum is on the object, top left, or not."""
    boxes = torch.tensor([[0, 0, 4, 4]] * batch)
    return report(
        *(network(), pictures(batch)), methods=methods, metrics=[PointingGame()], boxes=boxes
    )


def _map(batch: int, top: int) -> torch.Tensor:
    maps = torch.zeros(batch, 12, 10)
    maps[:, top, 1] = 1.0
    return maps


@pytest.mark.parametrize(
    ("batch", "how"), [(BATCH, "clearly better"), (4, "better, on these few examples,")]
)
def test_methods_of_which_the_same_is_true_share_a_sentence(batch, how):
    found = _pointing(batch, mine=_map(batch, 1), my_other=_map(batch, 2), bad=_map(batch, 9))
    said = verdicts(found)
    assert ("good", f"Mine and my other are {how} than every control by pointing game.") in said
    assert ("bad", "Bad is not clearly better than any control by pointing game.") in said
    assert all(text[0].isupper() for _, text in said)


def test_methods_that_share_the_best_mean_have_no_winner():
    found = _pointing(4, one=_map(4, 1), two=_map(4, 1), three=_map(4, 9))
    assert found.best("pointing_game") is None
    assert not any(text.startswith("Best mean") for _, text in verdicts(found))
    assert "*" not in str(found).split("pointing game", 1)[1].splitlines()[0]
    assert not any(row["best"] for row in found.rows())
    other = _pointing(4, one=_map(4, 1), three=_map(4, 9))
    assert other.best("pointing_game") == "one"


def test_a_sanity_check_says_what_it_means():
    found = report(
        *(network(), pictures()),
        methods="gradient",
        metrics={"sanity_check": SanityCheck(draws=1)},
    )
    first = verdicts(found)[0][1]
    assert first == (
        "Sanity check passes for gradient: the maps depend on what the model has learned."
    )


def test_names_are_spelled_as_people_do():
    assert spelled("top_k_iou") == "top-k IoU"
    assert spelled("integrated_gradients") == "integrated gradients"
    assert spelled(spelled("sensitivity_n")) == "sensitivity-n"


def test_of_volumes_the_slice_with_most_evidence_is_shown_with_its_box():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 6 * 7, 2))
    x = torch.rand(2, 1, 5, 6, 7)
    maps = torch.zeros(2, 5, 6, 7)
    maps[0, 3, 2, 2], maps[1, 1, 0, 0], maps[1, 4, 0, 0] = 1.0, 2.0, -3.0
    boxes = torch.tensor([[2, 1, 0, 4, 4, 7]] * 2)
    found = report(
        *(model, x),
        methods={"mine": maps},
        metrics=[Known()],
        boxes=boxes,
        controls=("centre",),
        layout="BCDHW",
    )
    assert [slice_of(found, row) for row in range(2)] == [3, 4]
    page = Reader(found.html())
    shown = [one for one in page.named("img") if one.get("class") == "pixels"]
    assert len(shown) == 2 * 3
    sizes = {Image.open(io.BytesIO(b64decode(one["src"].partition(",")[2]))).size for one in shown}
    assert sizes == {(7, 6)}
    # The object lies in slices 2 and 3: the second example's slice has none of it.
    framed = [one["style"] for one in page.named("div") if one.get("class") == "box"]
    assert framed == ["left:0.000%;top:16.667%;width:100.000%;height:50.000%"] * 3
    assert "slice 4 of 5, where the maps are strongest" in page.text
