"""What is learned and counted, against arithmetic worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.boxes import encoded, iou
from pretrain.objective import Classes, TrueBox, objective_of
from pretrain.recipe import chain, read_recipe

CROP, UNIT = 96, 0.1
LABELS = torch.tensor([0, 2])
SAID = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 5.0]])
WANTED = torch.tensor([[[1.0, 2.0, 3.0, 3.0]], [[2.0, 0.0, 5.0, 4.0]]])  # one box an image


def test_euclidean_loss_by_hand() -> None:
    # half of 0 + 0 + 0 + 1; half of 4 + 0 + 0 + 1
    shared = TrueBox("scr", UNIT, CROP)
    assert shared.losses(SAID, LABELS, WANTED).tolist() == [0.5, 2.5]


def test_per_class_only_the_images_own_class_is_held_against_the_box() -> None:
    own = TrueBox("pcr", UNIT, CROP)
    outputs = torch.full((2, 3, 4), 9.0)
    outputs[0, 0], outputs[1, 2] = SAID
    outputs = outputs.flatten(1).requires_grad_()
    losses = own.losses(outputs, LABELS, WANTED)
    assert losses.tolist() == [0.5, 2.5]
    losses.sum().backward()
    assert outputs.grad is not None
    reached = outputs.grad.view(2, 3, 4).abs().sum(2) > 0
    assert reached.tolist() == [[True, False, False], [False, False, True]]


def corners_as_said(*corners: float) -> torch.Tensor:
    return torch.from_numpy(encoded(np.array([corners]), CROP, UNIT))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ((10.0, 10.0, 50.0, 50.0), True),
        ((10.0, 10.0, 50.0, 30.5), True),  # 20.5 of 40 rows
        ((10.0, 10.0, 50.0, 30.0), False),  # a half is not above a half
        ((60.0, 60.0, 90.0, 90.0), True),  # the other of the true boxes
        ((50.0, 10.0, 90.0, 50.0), False),
    ],
)
def test_right_is_above_a_half_with_one_of_the_true_boxes(
    said: tuple[float, ...], right: bool
) -> None:
    nothing = [math.nan] * 4
    boxes = torch.tensor([[[0.0, 0, 96, 96], [10, 10, 50, 50], [60, 60, 90, 90], nothing]])
    found = TrueBox("scr", UNIT, CROP).right(corners_as_said(*said), torch.tensor([0]), boxes)
    assert found.tolist() == [[right, right]]


def test_what_is_said_beyond_the_image_is_cut_off() -> None:
    """30 x 40 are left of 90 x 40; whole, it would have 1,200 of 3,600 in common."""
    boxes = torch.tensor([[[0.0, 0, 96, 96], [0, 0, 30, 40]]])
    out = corners_as_said(-60.0, 0.0, 30.0, 40.0)
    assert TrueBox("scr", UNIT, CROP).right(out, torch.tensor([0]), boxes)[0, 0]
    assert iou(np.array([[-60.0, 0, 30, 40]]), boxes[0, 1:].numpy())[0, 0] < 0.5


def test_classes_are_counted_as_top_1_and_top_5() -> None:
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    right = Classes(6).right(scores, torch.tensor([0, 4, 5]), torch.zeros(3, 0, 4))
    assert right.tolist() == [[True, True], [False, True], [False, False]]
    assert Classes(6).errors([1.0, 2.0], 4) == (75.0, 50.0)
    assert Classes(5).errors([1.0, 2.0], 4) == (75.0, None)  # among five it tells nothing
    assert TrueBox("scr", UNIT, CROP).errors([1.0, 1.0], 4) == (75.0, None)


def test_a_stage_has_its_own() -> None:
    recipe = chain(read_recipe("mini", [], "D", "pcr"), "D", "A", "localisation", "pcr")
    found = [objective_of(stage, recipe, 10) for stage in recipe.stages]
    assert [type(each) for each in found] == [Classes, Classes, Classes, TrueBox]
    assert found[0].told((30.0, None)) == {"top1_error": 30.0, "top5_error": None}
    assert found[-1].told((30.0, None)) == {"localisation_error": 30.0}
    assert found[-1].in_words((30.0, None)) == "localisation error 30.00 %, of the true class's box"
