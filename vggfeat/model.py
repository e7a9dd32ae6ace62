"""A saved classifier: a linear SVM with everything needed to use it on new images. No pickle.

K classes, D length of the aggregated descriptor, N images. The layout of the file is in `docs/formats.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vggfeat.aggregate import aggregate, fuse
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.extract import describe_all, network_of
from vggfeat.files import whole
from vggfeat.protocols import Outcome, Scored
from vggfeat.store import TEXT, Description, create_hdf5, encode, open_hdf5, texts
from vggfeat.weights import Network

FORMAT = "vggfeat-model"
FORMAT_VERSION = 1


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
        return [network_of(part, spec, device) for part, spec in zip(self.parts, sources, strict=True)]

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
    """Write model as one HDF5 file; it appears whole or not at all."""
    target = Path(path)
    if not target.parent.is_dir():
        raise VggfeatError(f"there is no folder {target.parent} to write {target.name} in")
    try:
        with whole(target) as partial, create_hdf5(partial) as file:
            file.attrs["format"] = FORMAT
            file.attrs["format_version"] = FORMAT_VERSION
            file.attrs["pool"] = model.pool
            file.attrs["multi_label"] = model.multi_label
            file.create_dataset("coef", data=model.coef_KD)
            file.create_dataset("intercept", data=model.intercept_K)
            file.create_dataset("classes", data=[encode(c) for c in model.classes], dtype=TEXT)
            file.create_dataset("descriptions", data=[p.to_json().encode() for p in model.parts], dtype=TEXT)
            # a dataset, not an attribute: HDF5 bounds attributes at 64 KiB
            file.create_dataset("results", data=json.dumps(model.results), dtype=TEXT)
            for name, scored in model.scored.items():
                file.create_dataset(f"scored/{name}/rows", data=scored.rows)
                file.create_dataset(f"scored/{name}/scores", data=scored.scores.astype(np.float32))
    except OSError as error:
        raise VggfeatError(f"can't write {target}: {error}") from error


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file. Raises VggfeatError when it isn't one, or is damaged."""
    path = Path(path)
    with open_hdf5(path, FORMAT, FORMAT_VERSION) as file:
        try:
            parts = tuple(Description.from_json(text) for text in texts(file["descriptions"]))
            model = Model(
                classes=texts(file["classes"]),
                coef_KD=file["coef"][:],
                intercept_K=file["intercept"][:],
                parts=parts,
                pool=str(file.attrs["pool"]),
                multi_label=bool(file.attrs["multi_label"]),
                results=json.loads(file["results"][()]),
                scored={
                    name: Scored(part["rows"][:], part["scores"][:])
                    for name, part in file.get("scored", {}).items()
                },
            )
        except Exception as error:  # h5py meets damage in many ways
            raise VggfeatError(f"{path} is damaged: {error}") from error
    K = len(model.classes)
    if (
        model.coef_KD.ndim != 2
        or model.intercept_K.shape != (K,)
        or not parts
        or any(
            part.scores.shape != (len(part.rows), K) or part.rows.dtype.kind != "i"
            for part in model.scored.values()
        )
    ):
        raise VggfeatError(f"{path} is damaged: its parts have different lengths")
    return model
