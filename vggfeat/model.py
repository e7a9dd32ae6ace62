"""A saved classifier: a linear one with everything needed to use it on new images. No pickle.

K classes, D length of the aggregated descriptor, N images. The layout of the file is in
`docs/formats.md`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, overload

import numpy as np
import torch

from vggfeat.aggregate import POOLINGS, aggregate, fuse, pooled_length
from vggfeat.checked import OneOf, Several, first_few, path_of, shown
from vggfeat.describe import described, list_of_images, network_of
from vggfeat.devices import resolve_device
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import Damaged, File, column, damaged, document, open_file, write_file
from vggfeat.hub import Named, beside, fetched, on_hub, there
from vggfeat.machine import CORES
from vggfeat.notebook import Displayed, Table
from vggfeat.results import (
    HEAD_NAMES,
    Results,
    Scored,
    figure_rows,
    results_from,
    scored_on,
    title,
    trained_on,
)
from vggfeat.store import Description
from vggfeat.weights import Network

if TYPE_CHECKING:
    from vggfeat.protocols import Outcome

FORMAT = "vggfeat-model"
FORMAT_VERSION = 2
MAX_PARTS = 64


class Facts(TypedDict):
    """What is used of a model file's facts."""

    pool: Annotated[str, OneOf(POOLINGS)]
    multi_label: bool
    descriptions: Annotated[tuple[Description, ...], Several(MAX_PARTS)]
    results: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Model(Displayed):
    """coef_KD, intercept_K: scores are x @ coef.T + intercept; positive means present.

    parts: how images are described, one a network (several were fused by stacking). pool: over the
    scales. multi_label: several classes an image (VOC), or exactly one. results: of the protocol
    that trained it; None: a file without. scored: the rows of the feature file that its figures
    were computed from, with the scores; see `protocols.Outcome`. weights: where the weights of
    parts lie now; device: where the networks run.
    """

    classes: list[str]
    coef_KD: np.ndarray
    intercept_K: np.ndarray
    parts: tuple[Description, ...]
    pool: str
    multi_label: bool
    results: Results | None
    scored: dict[str, Scored] = field(default_factory=dict)
    weights: tuple[str | os.PathLike[str], ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _title(self) -> str:
        kind = HEAD_NAMES[self.head]
        return f"Classifier of {title(self.results)}" if self.results else f"Classifier: {kind}"

    def _rows(self) -> list[tuple[str, str]]:
        results = self.results
        kind = "several an image" if self.multi_label else "one an image"
        rows = [("classes", f"{len(self.classes):,}, {kind}: {first_few(self.classes)}")]
        if results:
            rows += figure_rows(results)
            rows += [("scored on", scored_on(results)), ("trained on", trained_on(results))]
        length = self.coef_KD.shape[1]
        rows.append(("descriptor", f"{length:,} values, {self.pool} over the scales"))
        for part in self.parts:
            mirror = "with" if part.mirror else "without"
            scales = ", ".join(map(str, part.scales))
            words = f"{part.layer} of net {part.net}, {part.weights}"
            rows.append(("described by", f"{words}: Q = {scales}, {mirror} mirror images"))
        return rows

    def _folded(self) -> list[Table]:
        return self.results._folded() if self.results else []

    def decision_function(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, K) scores of aggregated descriptors (N, D), or (K,) of one (D,). Raises VggfeatError
        for another D.
        """
        x_ND = np.asarray(x_ND)
        length = self.coef_KD.shape[1]
        if x_ND.ndim not in (1, 2) or x_ND.shape[-1] != length:
            raise VggfeatError(
                f"descriptors have shape {x_ND.shape}; the model needs (N, {length}), aggregated by"
                f" {self.pool} over the scales (`vggfeat.aggregate`)"
            )
        scores: np.ndarray = x_ND @ self.coef_KD.T + self.intercept_K
        return scores

    @property
    def head(self) -> str:
        """The classifier, of `results.HEAD_NAMES`."""
        return self.results.head if self.results else "svm"

    @property
    def has_probabilities(self) -> bool:
        """Whether its scores are log odds, as those of logistic regression are."""
        return self.head == "logistic"

    def probabilities(self, scores_NK: np.ndarray) -> np.ndarray:
        """(N, K) of scores (N, K) of logistic regression: of the classes, with the sum 1; of
        several labels an image, of each by itself. Raises VggfeatError for another classifier.
        """
        if not self.has_probabilities:
            raise VggfeatError(
                f"a classifier by {HEAD_NAMES[self.head]} has no probabilities: train one by"
                " `vggfeat classify --head logistic`"
            )
        from scipy.special import expit, softmax

        # of two classes one's score is minus the other's
        each = self.multi_label or np.shape(scores_NK)[-1] == 2
        return np.asarray(expit(scores_NK) if each else softmax(scores_NK, axis=-1))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides a score: classes, weights of the SVM, how images are
        described; not where a net's weights lie.
        """
        parts = [{**part.to_dict(), "weights": ""} for part in self.parts]
        facts = [self.classes, self.pool, self.multi_label, parts]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.coef_KD, "<f8").data)
        digest.update(np.ascontiguousarray(self.intercept_K, "<f8").data)
        return digest.hexdigest()

    @cached_property
    def networks(self) -> list[Network]:
        """The networks of `parts`, in the precision of the training images' descriptors; loaded
        when first used.

        Raises VggfeatError when weights are missing or are not those that described the training
        images.
        """
        sources = self.weights or [part.weights for part in self.parts]
        networks = [
            network_of(part, spec, self.device)
            for part, spec in zip(self.parts, sources, strict=True)
        ]
        length = sum(
            pooled_length(self.pool, len(part.scales), network.dim(part.layer), len(part.regions))
            for network, part in zip(networks, self.parts, strict=True)
        )
        if self.coef_KD.shape[1] != length:
            raise VggfeatError(
                f"the model is damaged: it weighs {self.coef_KD.shape[1]} values, its descriptors"
                f" have {length}"
            )
        return networks

    @overload
    def scores(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: Literal[False] = False,
    ) -> np.ndarray: ...

    @overload
    def scores(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: Literal[True],
    ) -> tuple[np.ndarray, dict[int, str]]: ...

    def scores(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, dict[int, str]]:
        """Scores (N, K) float64 of images, which are described exactly as the training images were.

        All is as of `vggfeat.embed`: what images may be, and the rows of NaN where
        return_unreadable asks for the reasons, too. Raises also what `networks` does.
        """
        scores_NK, unreadable = self._scores(
            images, batch_size, workers, progress, return_unreadable
        )
        return (scores_NK, unreadable) if return_unreadable else scores_NK

    @overload
    def predict(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: Literal[False] = False,
    ) -> list[Any]: ...

    @overload
    def predict(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: Literal[True],
    ) -> tuple[list[Any], dict[int, str]]: ...

    def predict(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        workers: int = CORES,
        progress: bool = False,
        return_unreadable: bool = False,
    ) -> list[Any] | tuple[list[Any], dict[int, str]]:
        """The class of each image, by its name; of a multi-label model a list of those present, the
        surest first.

        None for an image that is unreadable, where return_unreadable asks for the reasons, too. The
        rest as `scores`.
        """
        scores_NK, unreadable = self._scores(
            images, batch_size, workers, progress, return_unreadable
        )
        names: list[Any] = []
        for i, scores_K in enumerate(scores_NK):
            surest = [
                self.classes[k] for k in (-scores_K).argsort(kind="stable") if scores_K[k] > 0
            ]
            best = surest if self.multi_label else self.classes[int(scores_K.argmax())]
            names.append(None if i in unreadable else best)
        return (names, unreadable) if return_unreadable else names

    def _scores(
        self,
        images: Iterable[Any],
        batch_size: int | None,
        workers: int,
        progress: bool,
        keep_going: bool,
    ) -> tuple[np.ndarray, dict[int, str]]:
        listed = list_of_images(images)
        return self.scores_by(
            lambda network, part: described(
                network, listed, part, batch_size, workers, progress, keep_going
            )
        )

    def refuse_images(self) -> None:
        """Raise VggfeatError where it takes more than an image to describe it as the training
        images were.
        """
        if any(part.of_boxes for part in self.parts):
            raise VggfeatError(
                "the classifier was learned from boxes in images, and nothing tells where a new"
                " image's is: cut the images there, and learn from the cut ones, or with `regions`"
                " image"
            )

    def scores_by(
        self, describe: Callable[[Network, Description], tuple[np.ndarray, dict[int, str]]]
    ) -> tuple[np.ndarray, dict[int, str]]:
        """(N, K) scores and index -> reason, of images by what describes them for each net:
        descriptors (N, Q, D), NaN where unreadable, and those reasons. Raises what it and
        `networks` do.
        """
        self.refuse_images()
        parts: list[np.ndarray] = []
        unreadable: dict[int, str] = {}
        for network, part in zip(self.networks, self.parts, strict=True):
            raw_NQD, bad = describe(network, part)
            parts.append(aggregate(raw_NQD, self.pool))
            unreadable |= bad
        return self.decision_function(fuse(parts)), dict(sorted(unreadable.items()))


def model_from(
    outcome: Outcome,
    classes: list[str],
    parts: tuple[Description, ...],
    results: Results,
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
    return Model(
        classes, coef_KD, intercept_K, parts, results.pool, svm.multilabel_, results, outcome.scored
    )


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Write model as one HDF5 file; it appears whole or not at all. VggfeatError where it can't be
    written.
    """
    facts = {
        "pool": model.pool,
        "multi_label": model.multi_label,
        "descriptions": [part.to_dict() for part in model.parts],
        "results": model.results.to_json() if model.results else {},
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


def open_model(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    device: str | torch.device = "auto",
) -> Model:
    """A classifier that `vggfeat svm --out` has saved, ready to score images.

    weights: where its networks' weights lie now, in its order, if they moved; they are loaded when
    first used. device: where the networks run, as of `vggfeat.load`; their precision is that of the
    training images' descriptors. path: also `hf:OWNER/NAME[/FILE][@REVISION]`, a file on the hub;
    weights that lay in a local file are there beside it. Raises VggfeatError when it isn't a model
    file, or is damaged; also what `hub.fetched` does.
    """
    path = path_of(path, "a model file")
    if on_hub(path):
        found = fetched(os.fspath(path), "classifier")
        with found.called():
            model = open_model(found.path, weights=weights, device=device)
        return model if weights else replace(model, weights=_on_hub(model.parts, found.name))
    if not isinstance(weights, str | os.PathLike | Sequence):
        raise VggfeatError(
            f"`weights` must be where they lie, one place or a list, not {shown(weights)}"
        )
    sources = (weights,) if isinstance(weights, str | os.PathLike) else tuple(weights)
    place = resolve_device(device)
    with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
        facts: Facts = file.document("facts", Facts)
        classes = file.texts("classes")
        K = len(classes)
        needed = len(facts["descriptions"])
        for number, part in enumerate(facts["descriptions"]):
            if part.further:  # of a job, not of what was learned from
                raise Damaged(f"facts: descriptions[{number}] has further layers")
        if sources and len(sources) != needed:
            raise VggfeatError(
                f"{path} needs {needed} `weights`, in its order; {len(sources)} given"
            )
        return Model(
            classes=classes,
            coef_KD=_finite(file, "coef", (K, None)),
            intercept_K=_finite(file, "intercept", (K,)),
            parts=facts["descriptions"],
            pool=facts["pool"],
            multi_label=facts["multi_label"],
            results=results_from(facts["results"], path) if facts["results"] else None,
            scored={
                name.removesuffix("/rows"): _scored(file, f"scored/{name.removesuffix('/rows')}", K)
                for name in file.under("scored/")
                if name.endswith("/rows")
            },
            weights=sources,
            device=place,
        )


def _on_hub(parts: Sequence[Description], name: Named) -> tuple[str, ...]:
    """Where the weights lie for who has a classifier of that name on the hub."""
    files = [beside(part.weights, i, len(parts)) for i, part in enumerate(parts)]
    return tuple(
        there(part.weights, replace(name, file=file)) if file else part.weights
        for part, file in zip(parts, files, strict=True)
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
