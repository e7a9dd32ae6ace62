"""k nearest neighbours on frozen descriptors, as DINO reports it: a scikit-learn estimator.

N training images, D descriptor length, K classes. A new image's k nearest, by cosine s, vote with
exp(s / temperature) for their classes (Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, with k
= 20 and a temperature of 0.07). Nothing is learned: the training images are kept.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vggfeat.linear import Classifier, positive
from vggfeat.matrix import Matrix, row_blocks
from vggfeat.results import K_NEAREST, TEMPERATURE


class NearestNeighbours(Classifier):
    """Weighted voting of the k nearest training images, by cosine, for classes (one label an image)
    or for each of several labels an image.

    Parameters
    ----------
    k: how many vote. temperature: of their weights exp(cosine / temperature).
    class_weight: a factor on the votes for a class, {label: factor}; "balanced": n_samples /
    (n_classes n_k). For several labels an image {1: of those that have it, -1: of the others}.

    Fitted attributes
    -----------------
    classes_: the sorted labels; for several labels an image, 0 … K-1.
    multilabel_: whether y was (N, K).
    degenerate_classes_: classes without an image; for several labels an image, without positives or
    negatives. converged_: True. n_features_in_: D.

    Notes
    -----
    Scores are shares of the votes: (N, K) of sum 1; of two classes (N,), the second's share less
    the first's; of several labels an image (N, K), the share of those that have it less the others'
    (0 where none of the k says). Deterministic: of equals the first training image is nearer.
    Memory: X as float32.
    """

    solver = "exact"
    _name = "a vote of neighbours"
    _images: NDArray[np.float32]
    _for: NDArray[np.float64]
    _against: NDArray[np.float64]

    def __init__(
        self,
        k: int = K_NEAREST,
        temperature: float = TEMPERATURE,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self.k = k
        self.temperature = temperature
        self.class_weight = class_weight

    def fit(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> NearestNeighbours:
        """Keep X (N, D) and y: (N,) labels, or (N, K) of 1 present, -1 absent, 0 unknown. Raises
        ValueError as `LinearSVM.fit`, and for a k of more images than there are.
        """
        positive("temperature", self.temperature)
        if not (isinstance(self.k, Integral) and self.k >= 1):
            raise ValueError(f"k must be a whole number from 1 up, not {self.k!r}")
        X_ND, targets_NP, weights_N, weights_NP = self._read(X, y, sample_weight)
        used = np.flatnonzero(weights_N > 0)
        if self.k > len(used):
            raise ValueError(f"k={self.k} are more than the {len(used)} training images")
        weights_NP = np.broadcast_to(weights_NP, targets_NP.shape)[used]
        targets_NP = targets_NP[used]
        self._images = _unit(np.asarray(X_ND[used], dtype=np.float32))
        # what an image says for and against each problem
        self._for = weights_NP * (targets_NP == 1)
        self._against = weights_NP * (targets_NP == -1)
        lacking = ~(targets_NP == 1).any(axis=0) | ~(targets_NP == -1).any(axis=0)
        self.degenerate_classes_ = np.flatnonzero(lacking).tolist()
        self.converged_ = True
        return self

    def _scores(self, x_nD: NDArray[Any]) -> NDArray[np.float64]:
        x_nD = _unit(np.asarray(x_nD, dtype=np.float32))
        scores = np.empty((len(x_nD), self._for.shape[1]))
        for rows in row_blocks(len(x_nD), max(len(self._images), self.k * x_nD.shape[1])):
            cosine = x_nD[rows] @ self._images.T
            nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : self.k]
            # in float64: votes don't depend on which images are asked for together
            near = (self._images[nearest].astype(np.float64) @ x_nD[rows, :, None])[:, :, 0]
            votes = np.exp((near - near[:, :1]) / self.temperature)
            yes, no = (
                np.einsum("nk,nkp->np", votes, said[nearest]) for said in (self._for, self._against)
            )
            if self.multilabel_ or len(self.classes_) == 2:
                both = yes + no
                scores[rows] = np.divide(yes - no, both, out=np.zeros_like(both), where=both > 0)
            else:
                scores[rows] = yes / yes.sum(axis=1, keepdims=True)
        return scores


def _unit(x_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; of 0 where they are 0."""
    length = np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(x_ND, length, out=np.zeros_like(x_ND), where=length > 0)
    return unit
