"""A scikit-learn transformer: a column of images, or of paths to them, -> descriptors, for
pipelines that end in `LinearSVM`, or in any other estimator of numbers.

    make_pipeline(VggFeaturizer("mini"), LinearSVM()).fit(paths, labels)

N images, D length of a row, Q scales.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from vggfeat import sources
from vggfeat.aggregate import aggregate, pooled_length
from vggfeat.checked import shown
from vggfeat.describe import (
    described,
    description_of_one,
    list_of_images,
    network_of,
    refuse_pool,
)
from vggfeat.errors import VggfeatError
from vggfeat.machine import CORES
from vggfeat.store import Description
from vggfeat.weights import Network

ON_ERROR = ("raise", "nan")


class VggFeaturizer(TransformerMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]
    """Images -> the descriptors of `vggfeat.embed`, (N, D) float32, L2-normalised.

    Parameters
    ----------
    weights: what `vggfeat.load` takes: "mini", "D", a file.
    layer, scales, mirror, pool, batch_size: as of `vggfeat.embed`; layer and scales None are the
    network's own.
    device: where the network runs, as of `vggfeat.load`.
    workers: threads that decode and rescale; None: one a core.
    on_error: "raise", an image that can't be read raises UnreadableImage, which names its row;
    "nan", its row is NaN, which `LinearSVM` and most other estimators refuse: leave such rows out,
    or impute them.

    Fitted attributes
    -----------------
    description_: how images are described (`store.Description`), the weights' fingerprint with it.
    pool_: over the scales. n_features_in_: 1, a column. n_features_out_: D.

    Notes
    -----
    X is a column of paths (a list, an array (N,) or (N, 1), a pandas Series, a DataFrame of one
    column), or whatever images `vggfeat.embed` takes.

    Nothing is learned: `fit` loads the network, and opens no image. So descriptors needn't be made
    anew in each fold: `cross_val_score` of a pipeline describes every image once a fold,
    `vggfeat.embed` and then `cross_val_score` of the classifier once in all.

    A pickle has the weights' fingerprint and not the weights: they are loaded again when they are
    first needed, in the same precision, and refused where they are others. Where they have moved,
    `set_params(weights=...)` says where to.
    """

    description_: Description
    pool_: str
    n_features_in_: int
    n_features_out_: int

    def __init__(
        self,
        weights: str | os.PathLike[str] = "D",
        layer: str | None = None,
        scales: Sequence[int] | None = None,
        mirror: bool = True,
        pool: str = "average",
        device: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        on_error: str = "raise",
    ) -> None:
        self.weights = weights
        self.layer = layer
        self.scales = scales
        self.mirror = mirror
        self.pool = pool
        self.device = device
        self.batch_size = batch_size
        self.workers = workers
        self.on_error = on_error

    def fit(self, X: Any, y: Any = None) -> VggFeaturizer:
        """Load the network; y is ignored.

        Raises VggfeatError for an X that is no column of images, for settings that don't fit the
        network, and as `vggfeat.load` does.
        """
        refuse_pool(self.pool)
        if self.on_error not in ON_ERROR:
            raise VggfeatError(
                f"`on_error` must be {' or '.join(ON_ERROR)}, not {shown(self.on_error)}"
            )
        _images(X)
        network = sources.load(self.weights, device=self.device)
        how = description_of_one(network, self.layer, self.scales, self.mirror)
        self._network: Network = network
        self.description_, self.pool_, self.n_features_in_ = how, self.pool, 1
        self.n_features_out_ = pooled_length(self.pool, len(how.scales), network.dim(how.layer))
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Descriptors (N, D) of X.

        Raises UnreadableImage, with the row and the path, for the first image that can't be read,
        unless `on_error` is "nan"; VggfeatError for an X that is no column of images, and where the
        weights are no longer those of `fit`.
        """
        check_is_fitted(self)
        images = _images(X)
        if not hasattr(self, "_network"):  # unpickled
            self._network = network_of(self.description_, self.weights, self.device)
        raw_NQD, _ = described(
            self._network,
            images,
            self.description_,
            self.batch_size,
            CORES if self.workers is None else self.workers,
            progress=False,
            keep_going=self.on_error == "nan",
            name=lambda i: _name(i, images[i]),
        )
        return aggregate(raw_NQD, self.pool_)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """(D,) names of the values: fc7_0, …; where the scales are stacked fc7_256_0, ….

        input_features is ignored.
        """
        check_is_fitted(self)
        how = self.description_
        parts = [how.layer]
        if self.pool_ == "stack":
            parts = [f"{how.layer}_{Q}" for Q in how.scales]
        length = self.n_features_out_ // len(parts)
        return np.array([f"{part}_{d}" for part in parts for d in range(length)], dtype=object)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_network", None)
        return state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []  # float32, always
        return tags


def _images(X: Any) -> list[Any]:
    """A column as a list. Raises VggfeatError for several columns, and as `list_of_images`."""
    if hasattr(X, "to_numpy"):  # of pandas, which needn't be there
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.ndim == 2:
        if X.shape[1] != 1:
            raise VggfeatError(
                f"X has {X.shape[1]} columns: give the one with the paths, or the images, alone"
            )
        X = X[:, 0]
    elif isinstance(X, list | tuple) and all(
        isinstance(row, list | tuple) and len(row) == 1 for row in X
    ):
        X = [image for (image,) in X]
    return list_of_images(X, "X")


def _name(row: int, image: Any) -> str:
    path = f", {os.fspath(image)}" if isinstance(image, str | os.PathLike) else ""
    return f"row {row} of X{path}"
