"""Dense multi-scale VGG descriptors and linear SVMs (Simonyan & Zisserman, arXiv 1409.1556).

import vggfeat

net = vggfeat.load("mini")                       # or "D", the released net, fetched when first used
X = vggfeat.embed(net, ["a.jpg", pil_image, array_HWC])     # (3, D) float32, L2-normalised

file = vggfeat.open_features("feats.h5")                    # of `vggfeat extract`
svm = vggfeat.LinearSVM(C=4.0).fit(X, ["cat", "dog", "dog"])
svm.predict(X)

model = vggfeat.open_model("model.h5")                      # of `vggfeat svm --out`
model.predict(["a.jpg", pil_image])                         # the class of each
vggfeat.predict_all(model, "photos/")                       # a row an image, as they come
vggfeat.evidence(model, ["a.jpg"])[0].on_pixels()           # (H, W): where its score comes from

index = vggfeat.open_index("feats.index")                   # of `vggfeat index`
rows, cosines = index.search(index.embed(["a.jpg"]), 10)    # the nearest images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vggfeat.versions import __version__ as __version__

if TYPE_CHECKING:  # what is public, for who reads types: the names of _WHERE
    from vggfeat.describe import embed as embed
    from vggfeat.errors import UnreadableImage as UnreadableImage
    from vggfeat.errors import VggfeatError as VggfeatError
    from vggfeat.explain import Evidence as Evidence
    from vggfeat.explain import evidence as evidence
    from vggfeat.features import open_features as open_features
    from vggfeat.featurizer import VggFeaturizer as VggFeaturizer
    from vggfeat.index import Index as Index
    from vggfeat.index import open_index as open_index
    from vggfeat.knn import NearestNeighbours as NearestNeighbours
    from vggfeat.logistic import LogisticRegression as LogisticRegression
    from vggfeat.model import Model as Model
    from vggfeat.model import open_model as open_model
    from vggfeat.predict import Prediction as Prediction
    from vggfeat.predict import predict_all as predict_all
    from vggfeat.ridge import RidgeClassifier as RidgeClassifier
    from vggfeat.sources import load as load
    from vggfeat.store import Features as Features
    from vggfeat.svm import LinearSVM as LinearSVM
    from vggfeat.svm import LinearSVMCV as LinearSVMCV
    from vggfeat.weights import Network as Network

# Loaded when first used: `vggfeat --help` and reading a feature file need no PyTorch.
_WHERE = {
    "Evidence": "explain",
    "Features": "store",
    "Index": "index",
    "LinearSVM": "svm",
    "LinearSVMCV": "svm",
    "LogisticRegression": "logistic",
    "Model": "model",
    "NearestNeighbours": "knn",
    "Network": "weights",
    "Prediction": "predict",
    "RidgeClassifier": "ridge",
    "UnreadableImage": "errors",
    "VggFeaturizer": "featurizer",
    "VggfeatError": "errors",
    "embed": "describe",
    "evidence": "explain",
    "load": "sources",
    "open_features": "features",
    "open_index": "index",
    "open_model": "model",
    "predict_all": "predict",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"vggfeat.{_WHERE[name]}"), name)
    # name and obj: Python then says which name was meant
    raise AttributeError(
        f"module 'vggfeat' has no attribute {name!r}", name=name, obj=import_module("vggfeat")
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
