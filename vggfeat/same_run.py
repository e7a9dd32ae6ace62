"""Whether results, a model and feature files are of one run: figures of one beside curves of
another would be a lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vggfeat.classify import refuse_other_rows
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.results import Part, Results, refuse_other_run
from vggfeat.store import REGIONS, Description, Features

if TYPE_CHECKING:
    from vggfeat.model import Model


def refuse_others(results: Results, features: Sequence[Features], model: Model | None) -> list[str]:
    """A line for each thing that can't be checked. Raises VggfeatError where they are of two
    runs.
    """
    if model is not None:
        if model.results is None:
            raise VggfeatError("the results and the model are of two runs: the model has none")
        refuse_other_run(results, model.results)
    for file in features:
        if file.attributes.get("dataset") != results.dataset:
            raise VggfeatError(
                f"{file.path} is of {file.attributes.get('dataset')}, the results are of"
                f" {results.dataset}"
            )
    if not features:
        return []
    refuse_other_rows(features)
    parts = results.made.features
    if parts and len(parts) != len(features):
        raise VggfeatError(f"the results are of {len(parts)} feature files; {len(features)} given")
    for file, part in zip(features, parts, strict=False):  # results may lack them
        _refuse_other_file(file, part)
    if model is not None:
        _refuse_other_model(model, features)
    unknown = [file for i, file in enumerate(features) if i >= len(parts) or parts[i].rows is None]
    return [
        f"the check that {file.path} has the images that these results are of: they are an older"
        " version's and don't say; `vggfeat svm` makes them anew"
        for file in unknown
    ]


def open_described(
    paths: Sequence[str | Path], results: Results | None, model: Model | None
) -> list[Features]:
    """The feature files of results, or of a model, each with the layer that was learned from.

    Raises VggfeatError: see `open_features`; one file twice, with the same layer.
    """
    parts: Sequence[Part | Description] = results.made.features if results else ()
    parts = parts or (model.parts if model else ())
    layers: list[str | None] = [part.layer for part in parts] or [None] * len(paths)
    if len(layers) != len(paths):
        raise VggfeatError(f"the results are of {len(layers)} feature files; {len(paths)} given")
    given = list(zip(map(str, paths), layers, strict=True))
    for i, (path, layer) in enumerate(given):
        if (path, layer) in given[:i]:
            raise VggfeatError(f"`features` {path} is given twice")
    return [open_features(path, layer) for path, layer in given]


def _refuse_other_file(file: Features, part: Part) -> None:
    own = file.description
    if (own.fingerprint, own.layer) != (part.fingerprint, part.layer):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it holds {own.layer} of net"
            f" {own.net} ({own.fingerprint[:12]}), they are of {part.layer} of net"
            f" {part.net} ({str(part.fingerprint)[:12]})"
        )
    if own.regions != (regions := tuple(part.regions) or REGIONS[:1]):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it describes"
            f" {' and '.join(own.regions)}, they are of {' and '.join(regions)}"
        )
    if part.rows not in (None, file.rows_digest):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it has other images, labels"
            " or splits; give the one that they were made of, or train again with this one"
        )


def _refuse_other_model(model: Model, features: Sequence[Features]) -> None:
    first = features[0]
    if len(model.parts) != len(features):
        raise VggfeatError(
            f"the model is of {len(model.parts)} feature files; {len(features)} given"
        )
    if model.classes != first.classes:
        raise VggfeatError(f"{first.path} has other classes than the model")
    for name, scored in model.scored.items():
        rows = scored.rows
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(first.names):
            raise VggfeatError(f"the model's {name} has rows that {first.path} hasn't")
