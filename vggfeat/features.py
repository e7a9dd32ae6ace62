"""What was described, opened: a feature file (`store`), or a set of shards as if it were one."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vggfeat.checked import path_of
from vggfeat.place import is_url
from vggfeat.store import Features, open_feature_file, open_file_layers


def open_features(path: str | os.PathLike[str], layer: str | None = None) -> Features:
    """Open a feature file, or a sealed set of shards: a folder, or a URL. layer: which one to read
    of several.

    Raises VggfeatError when it is neither, is damaged or half-written, or doesn't have the layer.
    """
    if _is_set(path):
        from vggfeat.shards.sharded import open_set  # which takes pyarrow

        return open_set(path, layer)
    return open_feature_file(path_of(path, "a feature file"), layer)


def open_layers(path: str | os.PathLike[str]) -> Sequence[Features]:
    """As `open_features`, once for each layer that is there, in their order. Raises
    VggfeatError.
    """
    if _is_set(path):
        from vggfeat.shards.sharded import open_set_layers

        return open_set_layers(path)
    return open_file_layers(path_of(path, "a feature file"))


def _is_set(path: str | os.PathLike[str]) -> bool:
    return isinstance(path, str | os.PathLike) and (is_url(path) or os.path.isdir(path))
