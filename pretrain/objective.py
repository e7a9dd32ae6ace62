"""What a stage learns, and how it is checked: classes by multinomial logistic regression (Sect.
3.1), or boxes by a Euclidean loss (Appendix A).

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pretrain.boxes import CORRECT, decoded, iou
from pretrain.recipe import LOCALISATION, Recipe, Stage
from vggfeat.metrics import error_text, tells

Errors = tuple[float, float | None]
"""Of classes, top-1 and top-5 error, the latter None where it tells nothing (`metrics.tells`); of
boxes, the share that is wrong, and None. Per cent.
"""


class Objective(Protocol):
    """What is learned from the net's outputs (N, outputs), the labels (N,) and boxes as of
    `readers.Batch`.
    """

    def losses(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """(N,), of which a step's loss is the mean."""

    def right(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """(N, 2) bool: what `errors` counts, of central crops."""

    def errors(self, right: Sequence[float], images: int) -> Errors:
        """From how many images are right, in either way."""

    def told(self, errors: Errors) -> dict[str, float | None]:
        """The errors by their names in a log and a weights file."""

    def in_words(self, errors: Errors) -> str: ...


class Classes:
    """The class of the image."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def losses(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    def right(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        guesses = outputs.float().topk(min(5, outputs.shape[1])).indices
        hits = guesses == labels[:, None]
        return torch.stack([hits[:, 0], hits.any(1)], 1)

    def errors(self, right: Sequence[float], images: int) -> Errors:
        top1, top5 = (100 * (1 - n / images) for n in right)
        return top1, top5 if tells(5, self.classes) else None

    def told(self, errors: Errors) -> dict[str, float | None]:
        return {"top1_error": errors[0], "top5_error": errors[1]}

    def in_words(self, errors: Errors) -> str:
        return f"error {error_text(errors[0])} % top-1, {error_text(errors[1])} % top-5"


class TrueBox:
    """The box of the image's class, which is given: four outputs, shared by all classes (boxes
    "scr") or its own ("pcr").
    """

    def __init__(self, boxes: str, unit: float, crop: int) -> None:
        self.per_class, self.unit, self.crop = boxes == "pcr", unit, crop

    def of_class(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(N, 4): what is said of each image's class."""
        if not self.per_class:
            return outputs
        rows = torch.arange(len(labels), device=labels.device)
        return outputs.view(len(labels), -1, 4)[rows, labels]

    def losses(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Half the squared distance, as Caffe's Euclidean loss is (Sect. 3.3 names Caffe)."""
        wanted = boxes[:, 0].to(outputs.dtype)
        return (self.of_class(outputs, labels) - wanted).square().sum(1) / 2

    def right(self, outputs: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """That the IoU with one of the true boxes is above `CORRECT`, in both columns."""
        said_N4 = self.of_class(outputs, labels).double().cpu().numpy()
        frame_N14, true_NM4 = np.split(boxes.double().cpu().numpy(), [1], axis=1)
        corners_N14 = decoded(said_N4, self.crop, self.unit)[:, None]
        # nothing is beyond the image
        low, high = np.tile(frame_N14[..., :2], 2), np.tile(frame_N14[..., 2:], 2)
        inside_N14 = np.clip(corners_N14, low, high)
        # NaN, which is no box, is like none
        hit = torch.from_numpy((iou(inside_N14, true_NM4)[:, 0] > CORRECT).any(1))
        hit = hit.to(labels.device)
        return torch.stack([hit, hit], 1)

    def errors(self, right: Sequence[float], images: int) -> Errors:
        return 100 * (1 - right[0] / images), None

    def told(self, errors: Errors) -> dict[str, float | None]:
        return {"localisation_error": errors[0]}

    def in_words(self, errors: Errors) -> str:
        return f"localisation error {error_text(errors[0])} %, of the true class's box"


def objective_of(stage: Stage, recipe: Recipe, classes: int) -> Objective:
    """What the stage learns."""
    if stage.task == LOCALISATION:
        return TrueBox(stage.boxes, recipe.box_unit, recipe.crop)
    return Classes(classes)
