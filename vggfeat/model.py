"""A saved classifier: a linear SVM with everything needed to use it on new images. No pickle.

K classes, D length of the aggregated descriptor, N images. The layout of the file is in `docs/formats.md`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from vggfeat.aggregate import POOLINGS, aggregate, fuse
from vggfeat.checked import OneOf, Several
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.extract import describe_all, network_of
from vggfeat.hdf5 import Damaged, File, column, damaged, document, open_file, write_file
from vggfeat.protocols import Outcome, Scored
from vggfeat.store import Description
from vggfeat.weights import Network

FORMAT = "vggfeat-model"
FORMAT_VERSION = 2
MAX_PARTS = 64


class Facts(TypedDict):
    """What is used of a model file's facts."""

    pool: Annotated[str, OneOf(POOLINGS)]
    multi_label: bool
    descriptions: Annotated[tuple[Description, ...], Several(MAX_PARTS)]
    results: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """coef_KD, intercept_K: scores are x @ coef.T + intercept; positive means present.

    parts: how images are described, one a network (several were fused by stacking). pool: over the scales.
    multi_label: several classes an image (VOC), or exactly one. results: of the protocol that trained it.
    scored: the rows of the feature file that its figures were computed from, with the scores; see `protocols.Outcome`.
    """

    classes: list[str]
    coef_KD: np.ndarray
    intercept_K: np.ndarray
    parts: tuple[Description, ...]
    pool: str
    multi_label: bool
    results: dict[str, Any]
    scored: dict[str, Scored] = field(default_factory=dict)

    def scores(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, K) scores of aggregated descriptors."""
        return x_ND @ self.coef_KD.T + self.intercept_K

    def load_networks(self, specs: Sequence[str] = (), device: str = "auto") -> list[Network]:
        """The networks of `parts`, in their precision; specs replace where the weights lie (moved files).

        Raises VggfeatError when weights are missing or are not those that described the training images.
        """
        if specs and len(specs) != len(self.parts):
            raise VggfeatError(
                f"the model needs {len(self.parts)} --weights, in its order; {len(specs)} given"
            )
        sources = specs or [part.weights for part in self.parts]
        networks = [network_of(part, spec, device) for part, spec in zip(self.parts, sources, strict=True)]
        length = sum(
            network.dim(part.layer) * (len(part.scales) if self.pool == "stack" else 1)
            for network, part in zip(networks, self.parts, strict=True)
        )
        if self.coef_KD.shape[1] != length:
            raise VggfeatError(
                f"the model is damaged: it weighs {self.coef_KD.shape[1]} values, its descriptors have {length}"
            )
        return networks

    def predict(
        self,
        networks: Sequence[Network],
        images: Sequence[Any],
        batch_size: int | None = None,
        workers: int = 2,
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Scores (N, K) of images described exactly as the training images were, NaN rows where unreadable.

        Returns also index -> reason of the unreadable ones.
        """
        unreadable: dict[int, str] = {}
        parts = []
        for network, part in zip(networks, self.parts, strict=True):
            raw = np.full((len(images), len(part.scales), network.dim(part.layer)), np.nan, np.float32)
            for i, result in describe_all(network, images, part, batch_size=batch_size, workers=workers):
                if isinstance(result, UnreadableImage):
                    unreadable[i] = str(result)
                else:
                    raw[i] = result
            parts.append(aggregate(raw, self.pool))
        return self.scores(fuse(parts)), unreadable


def model_from(
    outcome: Outcome, classes: list[str], parts: tuple[Description, ...], pool: str, results: dict[str, Any]
) -> Model:
    """A Model of a protocol's classifier, whose classes are 0 … K-1."""
    svm = outcome.model
    coef_KD, intercept_K = svm.coef_, svm.intercept_
    if len(coef_KD) == 1 and len(classes) == 2:
        # scikit-learn keeps one hyperplane for two classes; here each class has its score
        coef_KD, intercept_K = (
            np.concatenate([-coef_KD, coef_KD]),
            np.concatenate([-intercept_K, intercept_K]),
        )
    return Model(classes, coef_KD, intercept_K, parts, pool, svm.multilabel_, results, outcome.scored)


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Write model as one HDF5 file; it appears whole or not at all. VggfeatError where it can't be written."""
    facts = {
        "pool": model.pool,
        "multi_label": model.multi_label,
        "descriptions": [part.to_dict() for part in model.parts],
        "results": model.results,
    }
    arrays = {
        "facts": document(facts),
        **column("classes", model.classes),
        "coef": np.asarray(model.coef_KD, np.float64),
        "intercept": np.asarray(model.intercept_K, np.float64),
    }
    for name, scored in model.scored.items():
        arrays[f"scored/{name}/rows"] = np.asarray(scored.rows, np.int64)
        arrays[f"scored/{name}/scores"] = np.asarray(scored.scores, np.float32)
    write_file(Path(path), FORMAT, FORMAT_VERSION, arrays)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file. Raises VggfeatError when it isn't one, or is damaged."""
    path = Path(path)
    with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
        facts: Facts = file.document("facts", Facts)
        classes = file.texts("classes")
        K = len(classes)
        return Model(
            classes=classes,
            coef_KD=_finite(file, "coef", (K, None)),
            intercept_K=_finite(file, "intercept", (K,)),
            parts=facts["descriptions"],
            pool=facts["pool"],
            multi_label=facts["multi_label"],
            results=facts["results"],
            scored={
                name.removesuffix("/rows"): _scored(file, f"scored/{name.removesuffix('/rows')}", K)
                for name in file.under("scored/")
                if name.endswith("/rows")
            },
        )


def _finite(file: File, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    values = file.array(name, "f", shape)
    if not np.isfinite(values).all():
        raise Damaged(f"{name} has values that are not finite")
    return values


def _scored(file: File, name: str, K: int) -> Scored:
    rows = file.array(f"{name}/rows", "i", (None,))
    if rows.size and rows.min() < 0:
        raise Damaged(f"{name}/rows has the row {rows.min()}")
    return Scored(rows, _finite(file, f"{name}/scores", (len(rows), K)))
