"""A saved classifier for other programs: its arrays as .npz, or all from pixels to scores as one
ONNX graph.

N images, H, W height and width, Q smallest side in pixels, D descriptor length, K classes. The keys
of both files are in `docs/formats.md`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vggfeat.errors import VggfeatError
from vggfeat.files import whole
from vggfeat.images import Preprocessing
from vggfeat.model import Model
from vggfeat.store import Description
from vggfeat.versions import __version__
from vggfeat.weights import Network

TOLERANCE = 1e-3
"""Of the largest score: a sum in which much cancels out, by another library's convolutions."""
INSTALL = "pip install 'vggfeat[export]'"
MOST_BYTES = 2_000_000_000  # a file is one message of protobuf, which ends at 2 GiB


@dataclass(frozen=True)
class Differences:
    """Largest differences of a graph's scores, as shares of the largest score; None: not computed.

    float32: from the model's in float32, which the graph computes in. own: from the model's own,
    where it describes images in bfloat16.
    """

    float32: float | None = None
    own: float | None = None


def write_npz(path: str | os.PathLike[str], model: Model) -> None:
    """Write the arrays of a model of whatever nets and scales, which NumPy reads without pickles.
    The file appears whole or not at all. Raises CantWrite where it can't be written.

    An image's scores are coef @ x + intercept, of its descriptor x as `descriptions` and `pool`
    have it (`aggregate`, and `fuse` of several nets).
    """
    arrays: dict[str, Any] = {
        "coef": np.asarray(model.coef_KD, np.float64),
        "intercept": np.asarray(model.intercept_K, np.float64),
        "classes": np.array(model.classes, np.str_),
        "multi_label": np.array(model.multi_label),
        "descriptions": np.array(json.dumps([part.to_dict() for part in model.parts])),
        "pool": np.array(model.pool),
        "version": np.array(__version__),
    }
    with whole(Path(path)) as partial:
        np.savez(partial, **arrays)


def write_onnx(path: str | os.PathLike[str], model: Model) -> Differences:
    """Write a model of one net of Table 1 at one scale as a graph from `images`, uint8 RGB (N, H,
    W, 3) whose smallest side is Q, to `scores` (N, K) float32. The file appears whole or not at
    all.

    It computes in float32, by the weights as they were read. Its scores of a few made images are
    compared with the model's, where onnxruntime is there. Raises VggfeatError: a model of several
    nets or scales, of boxes or of another net; weights that are missing or are others; no package
    for ONNX; scores that differ by more than TOLERANCE; CantWrite.
    """
    part = _only_part(model)
    exact = replace(model, parts=(replace(part, precision="float32"),), device=torch.device("cpu"))
    [network] = exact.networks
    graph = _Classifier(exact, network, part)
    if (size := sum(tensor.nbytes for tensor in graph.state_dict().values())) > MOST_BYTES:
        raise VggfeatError(f"a graph can't hold {size / 1e9:.1f} GB: give `to` npz")
    (Q,) = part.scales
    facts = {
        "classes": json.dumps(model.classes),
        "multi_label": json.dumps(model.multi_label),
        "Q": str(Q),
        "filter": part.filter,
        "layer": part.layer,
        "description": json.dumps(part.to_dict()),
        "version": __version__,
    }
    sides = {1: torch.export.Dim("H", min=Q), 2: torch.export.Dim("W", min=Q)}
    example = torch.zeros(2, Q + 9, Q + 30, 3, dtype=torch.uint8)
    with whole(Path(path)) as partial:
        write_graph(partial, graph, example, sides, facts)
        session = session_of(partial)
        if session is None:
            return Differences()
        batches = _made_images(Q)
        theirs = np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])
        images = [image for batch in batches for image in batch]
        difference = _difference(theirs, exact.scores(images))
        if not difference <= TOLERANCE:
            raise VggfeatError(
                "onnxruntime gives other scores than the classifier"
                f" ({difference:.1e} of the largest): not written"
            )
        own = None if part.precision == "float32" else _difference(theirs, model.scores(images))
    return Differences(difference, own)


def _only_part(model: Model) -> Description:
    """Raises VggfeatError where a model has more to it than a graph."""
    if len(model.parts) != 1:
        raise VggfeatError(
            f"the classifier is of {len(model.parts)} nets, and a graph of one: give `to` npz"
        )
    (part,) = model.parts
    if part.of_boxes:
        raise VggfeatError(
            "the classifier was learned from boxes in images, which a graph isn't told: give `to`"
            " npz"
        )
    if len(part.scales) != 1:
        raise VggfeatError(
            f"the classifier is of {len(part.scales)} scales,"
            f" {', '.join(map(str, part.scales))}, and a graph of one: give `to` npz, or a"
            " classifier of one of them (`vggfeat svm --scales Q`)"
        )
    return part


class _Classifier(nn.Module):
    """Images (N, H, W, 3) uint8 RGB -> scores (N, K): `describe.describe`, `aggregate.aggregate` of
    one scale, by whatever pooling, and the SVMs, in operations that a graph has.
    """

    coef: Tensor
    intercept: Tensor

    def __init__(self, model: Model, network: Network, part: Description) -> None:
        super().__init__()
        self.prepared = Prepared(network.preprocessing)
        self.net, self.layer = network.vgg("give `to` npz"), part.layer
        self.mirror = part.mirror
        self.register_buffer("coef", torch.from_numpy(model.coef_KD).float())
        self.register_buffer("intercept", torch.from_numpy(model.intercept_K).float())

    def forward(self, images_NHWC: Tensor) -> Tensor:
        x_NCHW = self.prepared(images_NHWC.permute(0, 3, 1, 2).float())
        x_ND = self._mean(x_NCHW)
        if self.mirror:
            x_ND = (x_ND + self._mean(x_NCHW.flip(-1))) / 2
        return nn.functional.linear(_unit(x_ND), self.coef, self.intercept)

    def _mean(self, x_NCHW: Tensor) -> Tensor:
        return self.net(x_NCHW, self.layer).mean(dim=(2, 3))  # type: ignore[no-any-return]


def _unit(x_ND: Tensor) -> Tensor:
    """As `aggregate` has it: squares of values of at most 1 neither under- nor overflow."""
    peak = x_ND.abs().amax(1, keepdim=True)
    x_ND = x_ND / torch.where(peak == 0, 1.0, peak)
    norm = x_ND.square().sum(1, keepdim=True).sqrt()
    return x_ND / torch.where(norm == 0, 1.0, norm)


def _made_images(Q: int) -> list[np.ndarray]:
    """Batches of (n, H, W, 3) uint8, upright, lying and square, whose smallest side is Q."""
    rng = np.random.default_rng(0)
    batches = []
    more = min(Q // 3, 64) + 1
    for n, height, width in ((1, Q, Q), (2, Q, Q + more), (1, Q + more, Q)):
        coarse = rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8)
        smooth = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            for image in coarse
        ]
        rough = rng.integers(-20, 21, (n, height, width, 3))
        batches.append(np.clip(np.stack(smooth) + rough, 0, 255).astype(np.uint8))
    return batches


def _difference(theirs_NK: np.ndarray, ours_NK: np.ndarray) -> float:
    largest = np.abs(ours_NK).max()
    return float(np.abs(theirs_NK - ours_NK).max() / (largest if largest else 1))


# --- graphs ---------------------------------------------------------------------------------------


class Prepared(nn.Module):
    """A net's preprocessing in a graph, which so can't be used without it: RGB in 0..255, float32
    (N, 3, H, W), as `Preprocessing` makes it of uint8.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name))
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.preprocessing.channel_order == "BGR":
            x_NCHW = x_NCHW.flip(1)
        x_NCHW = x_NCHW * (self.preprocessing.input_range / 255)
        return (x_NCHW - self.mean) / self.std


def write_graph(
    path: Path,
    module: nn.Module,
    images: Tensor,
    sides: Mapping[int, Any] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a module of `images` -> `scores` as an ONNX file; N, the first axis, is any.

    images: an example. sides: further axes of any length, as torch.export's Dim. facts: what the
    file says of itself. Raises VggfeatError where a package for ONNX isn't there, or PyTorch's
    exporter fails.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise VggfeatError(f"ONNX needs the package {error.name}: {INSTALL}") from error
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # of each way that PyTorch tries, a page where it can't be
    try:
        program = torch.onnx.export(
            module.eval(),
            (images,),
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1), **(sides or {})},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise VggfeatError(
            f"PyTorch {torch.__version__} can't make a graph of this net: another version may"
        ) from error
    finally:
        logging.disable(before)
    assert program is not None
    program.model.metadata_props.update(facts or {})
    program.save(str(path), external_data=False)


def session_of(path: Path) -> Any:
    """onnxruntime's, on the CPU; None where it isn't installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
