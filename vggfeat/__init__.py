"""Dense multi-scale VGG descriptors and linear SVMs (Simonyan & Zisserman, arXiv 1409.1556).

import vggfeat
net = vggfeat.load("D")
x = vggfeat.embed(net, ["a.jpg", pil_image, array_HWC], scales=(256, 384, 512))   # (3, 4096), L2-normalised
svm = vggfeat.LinearSVM(C=4.0).fit(X, y)
feats = vggfeat.open_features("feats.h5")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vggfeat.errors import UnreadableImage, VggfeatError
    from vggfeat.extract import embed
    from vggfeat.store import open_features
    from vggfeat.svm import LinearSVM, LinearSVMCV
    from vggfeat.weights import Network, load

# Loaded when first used: `vggfeat --help` and reading a feature file need no PyTorch.
_WHERE = {
    "Network": "weights",
    "load": "weights",
    "embed": "extract",
    "open_features": "store",
    "LinearSVM": "svm",
    "LinearSVMCV": "svm",
    "VggfeatError": "errors",
    "UnreadableImage": "errors",
}
__all__ = [
    "LinearSVM",
    "LinearSVMCV",
    "Network",
    "UnreadableImage",
    "VggfeatError",
    "embed",
    "load",
    "open_features",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"vggfeat.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'vggfeat' has no attribute {name!r}")
