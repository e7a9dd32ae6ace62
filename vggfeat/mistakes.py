"""What a classifier got wrong: the scored images whose labels are known, and those of them that
were taken for something else, the worst first; on a page, or as CSV.

N images, K classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vggfeat import metrics
from vggfeat.datasets.items import known
from vggfeat.datasets.protocol import protocol_of
from vggfeat.errors import VggfeatError
from vggfeat.results import Results, Scored, part_scored
from vggfeat.store import Features

if TYPE_CHECKING:
    from vggfeat.model import Model

THRESHOLD = 0.0  # the score above which a class is named, where an image may have several
COLUMNS = ("image", "part", "label", "taken_for", "score", "label_score")


@dataclass(frozen=True)
class Ranking:
    """The scored images whose labels are known: rows of the feature file, scores (n, K), truth (n,
    K) of 1, -1, 0.

    predicted: (n,) the best-scored class; None where an image has several labels. aps: (K,) AP, of
    the protocol's kind.
    """

    rows: np.ndarray
    scores: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray | None
    aps: np.ndarray


def rankings_of(
    scored: Mapping[str, Scored], features: Features, results: Results
) -> dict[str, Ranking]:
    """By the part that was scored, in words; none of a part without a label."""
    ap = protocol_of(results.protocol).ap
    labels, K = features.labels, len(features.classes)
    out = {}
    for name, part in scored.items():
        if labels is None:
            continue
        own = labels[part.rows]
        labelled = known(own) & np.isfinite(part.scores).all(axis=1)
        if not labelled.any():
            continue
        own, scores = own[labelled], np.asarray(part.scores[labelled], np.float64)
        truth = own if own.ndim == 2 else np.where(np.arange(K) == own[:, None], 1, -1)
        predicted = None if own.ndim == 2 else scores.argmax(axis=1)
        aps = metrics.mean_average_precision(scores, truth, ap).per_class
        words = part_scored(results) if name == "validation" else name
        words = f"the test part of {name}" if name.startswith("split") else words
        out[words] = Ranking(part.rows[labelled], scores, truth, predicted, aps)
    return out


@dataclass(frozen=True)
class Mistake:
    """An image of a part that was scored, by its row in the feature file. labels: its classes.

    taken_for: the class that it was taken for and isn't of, with its score; None where a class of
    it was missed. label_score: of its own class; None where it isn't one class that was missed.
    """

    part: str
    row: int
    labels: tuple[int, ...]
    taken_for: int | None
    score: float | None
    label_score: float | None

    @property
    def margin(self) -> float:
        """By how much it is wrong: by so much the own class's score should have been higher, or the
        other one's lower.
        """
        return (self.score or 0.0) - (self.label_score or 0.0)


def mistakes_of(rankings: Mapping[str, Ranking]) -> list[Mistake]:
    """Those of all parts, the worst first. One label an image: the images whose best-scored class
    isn't theirs. Several: each class that an image is named by its score, and isn't of, and each of
    its own that it isn't named.
    """
    found: list[Mistake] = []
    for part, ranking in rankings.items():
        rows, scores, truth = ranking.rows.tolist(), ranking.scores, ranking.truth
        if ranking.predicted is not None:
            own = truth.argmax(axis=1)
            for i in np.flatnonzero(ranking.predicted != own).tolist():
                k, j = int(own[i]), int(ranking.predicted[i])
                found.append(
                    Mistake(part, rows[i], (k,), j, float(scores[i, j]), float(scores[i, k]))
                )
            continue
        wrong = np.where(scores > THRESHOLD, truth == -1, truth == 1)
        for i, k in np.argwhere(wrong).tolist():
            score, labels = float(scores[i, k]), tuple(np.flatnonzero(truth[i] == 1).tolist())
            said = score > THRESHOLD
            found.append(
                Mistake(part, rows[i], labels, k, score, None)
                if said
                else Mistake(part, rows[i], (k,), None, None, score)
            )
    return sorted(found, key=lambda mistake: (-mistake.margin, mistake.row, mistake.part))


def all_mistakes(
    results: Results | None, features: Sequence[Features], model: Model
) -> list[Mistake]:
    """The mistakes of a model's scored images. Raises VggfeatError where it has no scores, or the
    feature files no labels of them.
    """
    results = results or model.results
    if not model.scored or results is None:
        raise VggfeatError("the model file has no scores; write it again with `vggfeat svm --out`")
    rankings = rankings_of(model.scored, features[0], results)
    if not rankings:
        raise VggfeatError("the scored images have no labels: there are no mistakes to tell")
    return mistakes_of(rankings)


def as_csv(mistakes: Sequence[Mistake], features: Features) -> str:
    """A row a mistake, in their order; several labels of an image with ; between them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(cells(mistake, features) for mistake in mistakes)
    return text.getvalue()


def cells(mistake: Mistake, features: Features) -> tuple[str, ...]:
    """The values of `COLUMNS`; scores in the nine digits that a float32 has."""
    classes = features.classes
    return (
        features.names[mistake.row],
        mistake.part,
        ";".join(classes[k] for k in mistake.labels),
        "" if mistake.taken_for is None else classes[mistake.taken_for],
        "" if mistake.score is None else repr(float(f"{mistake.score:.9g}")),
        "" if mistake.label_score is None else repr(float(f"{mistake.label_score:.9g}")),
    )
