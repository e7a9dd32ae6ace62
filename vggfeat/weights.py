"""A network: a net with its weights, the preprocessing that belongs to them, and a fingerprint; and
the file of one, read and written.

Names, types and shapes are compared with the net's before a value is used (`tensors` reads them),
and a net has at most `table1.MOST_PARAMETERS` parameters. `sources` knows where weights come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vggfeat.checked import first_few, fitted, parse_json, shown
from vggfeat.devices import dtype_of, resolve_device, resolve_precision
from vggfeat.errors import VggfeatError
from vggfeat.files import whole
from vggfeat.images import BILINEAR, FILTERS, Preprocessing, said
from vggfeat.notebook import Displayed
from vggfeat.table1 import FC_LAYERS, NETS, layer_keys
from vggfeat.tensors import bare, read
from vggfeat.versions import __version__
from vggfeat.vgg import VGG

Convention = Literal["authors", "torchvision"]
"""Of a release's names of layers: the conversion of the authors' nets counts one module more."""
TORCHVISION_NETS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
WHOLE = {"width": "1", "crop": "224"}  # of a released net
BOXES = ("scr", "pcr")
"""What the last layer of a localisation net says (Appendix A): four numbers of a box, shared by all
classes, or four of each class.
"""
MINI_WORKS = "without a network `weights` mini works"
OWN_POOLING = "its pooling can't be set"


class Outline(Protocol):
    """What of a net needs no weights, so that a module on PyTorch's meta device has it, too.

    layers: names, first to last.
    """

    @property
    def layers(self) -> list[str]: ...

    def min_side(self, layer: str) -> int:
        """Smallest image side in pixels that the layer can be computed on."""


class Backbone(Outline, Protocol):
    """What a Network asks of its module, an nn.Module: a VGG, a timm model, or another such one.

    channels: layer -> length D of its descriptor.
    """

    channels: dict[str, int]

    def __call__(self, x_NCHW: Tensor, layer: str) -> Tensor:
        """The layer's map (N, D, h, w) of preprocessed images, all of one size."""

    def maps(self, x_NCHW: Tensor, layers: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The same of several layers, in one pass: (layer, map) in any order."""

    def pooled(self, map_NDHW: Tensor, layer: str) -> Tensor:
        """Descriptors (N, D) float32 of such a map: the mean over positions, and what the net's own
        head does to it before it classifies.
        """

    def linear_pooled(
        self, coef_KD: np.ndarray, mean_D: np.ndarray, layer: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(K, D) weights and (K,) offsets, float64: the weights on the mean over positions, and the
        offsets, are what `coef_KD` is on `pooled`. The deviations that a norm divides by are taken
        as constants of the image.
        """

    def looks_at(
        self, layer: str, grid: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Where each position of a map (h, w) looks at an image (H, W): (h, 2) and (w, 2), from and
        to as fractions of its height and of its width, the pixels that are this position's and no
        other's, or what its window covers; and the side in pixels of all that it sees, its
        receptive field, None where that isn't told.
        """

    # as every nn.Module has them

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def state_dict(self) -> dict[str, Any]: ...

    @property
    def to(self) -> Callable[..., Self]: ...


@dataclass(frozen=True)
class Told:
    """What the words of a source alone tell of its weights, which need not be at hand.

    net: as `Network.name` will have it. outline: with all layers that the weights can reach.
    """

    net: str
    outline: Outline


@dataclass(repr=False)
class Network(Displayed):
    """A network, what its input must look like, and which weights it has.

    spec: what loads the same weights again.
    fingerprint: sha256 of the tensors (names, types, shapes, bytes) as they were read.
    metadata: the strings of the weights file (net, mean, channel_order, pool, …:
    docs/formats.md).
    classes: names of fc8's outputs, where they are known.
    """

    spec: str
    module: Backbone
    preprocessing: Preprocessing
    fingerprint: str
    metadata: dict[str, str]
    classes: list[str] | None = None
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _title(self) -> str:
        return f"Net {self.name}"

    def _rows(self) -> list[tuple[str, str]]:
        layer, scales = self.default_layer, ", ".join(map(str, self.default_scales))
        known, trained = self.classes or [], self.metadata.get("train_scale")
        return [
            ("descriptor", f"{layer}, {self.dim(layer):,} values at each of Q = {scales}"),
            ("weights", f"{self.spec}, sha256 {self.fingerprint[:12]}"),
            ("on", f"{self.device} in {self.precision}"),
            ("layers", f"{self.layers[0]} to {self.layers[-1]}"),
            *([("trained at S", trained)] if trained else []),
            *([("classes", f"{len(known):,}: {first_few(known, 3)}")] if known else []),
        ]

    @property
    def name(self) -> str:
        return self.metadata["net"]

    @property
    def layers(self) -> list[str]:
        """Layers that these weights reach, first to last."""
        return self.module.layers

    @property
    def boxes(self) -> str:
        """Which of `BOXES` its last layer says; "" of a net that says classes."""
        return self.metadata.get("boxes", "")

    @property
    def default_layer(self) -> str:
        """See `describing`."""
        return describing(self.layers)

    @property
    def default_scales(self) -> tuple[int, ...]:
        """Smallest sides Q in pixels: the S that the weights learned at; of a range its ends and
        its middle.

        The paper's 256, 384, 512 (Appendix B), which its nets learned at, where the weights don't
        tell.
        """
        low, high = trained_at(self.metadata.get("train_scale", "")) or (256, 512)
        return (low,) if low == high else (low, (low + high) // 2, high)

    @property
    def filter(self) -> str:
        """How images are rescaled for it, of `images.FILTERS`; the paper's nets' unless told."""
        return self.metadata.get("filter", BILINEAR)

    def vgg(self, need: str = "give weights of one") -> VGG:
        """The module as a net of Table 1. Raises VggfeatError where it is another, and tells the
        need.
        """
        return as_vgg(self.module, self.spec, need)

    def require(self, layer: str) -> None:
        """Raise VggfeatError unless the weights reach `layer`."""
        if layer not in self.layers:
            raise VggfeatError(
                f"weights {self.spec} have no layer {layer!r}: they reach {self.layers[-1]}; "
                f"give `layer` one of {', '.join(self.layers)}"
            )

    def dim(self, layer: str) -> int:
        """Length D of the layer's descriptor."""
        self.require(layer)
        return self.module.channels[layer]

    def min_side(self, layer: str) -> int:
        """Smallest image side in pixels that the layer can be computed on."""
        self.require(layer)
        return self.module.min_side(layer)

    def maps(self, x_NCHW: Tensor, layer: str) -> Tensor:
        """The layer's map (N, D, h, w) of preprocessed float32 images, in the network's
        precision.
        """
        self.require(layer)
        return self.module(x_NCHW.to(dtype_of(self.precision)), layer)

    def maps_of(self, images_NHWC: Tensor, layer: str) -> Tensor:
        """`maps` of uint8 RGB images, which a net of Table 1 on a GPU reads as they are."""
        ((_, map_NDHW),) = self.each_map_of(images_NHWC, (layer,))
        return map_NDHW

    def each_map_of(
        self, images_NHWC: Tensor, layers: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """(layer, its map) of uint8 RGB images, as one pass of the net comes to it."""
        for layer in layers:
            self.require(layer)
        if isinstance(self.module, VGG):
            return self.module.maps(images_NHWC, layers, self.preprocessing)
        x_NCHW = self.preprocessing(images_NHWC).to(dtype_of(self.precision))
        return self.module.maps(x_NCHW, layers)

    def crop_scores(self, x_NCHW: Tensor) -> Tensor:
        """Scores (N, K) of preprocessed float32 crops, FC layers as matrices, in the network's
        precision.
        """
        self.require("fc8")
        return self.vgg().crop_scores(x_NCHW.to(dtype_of(self.precision)))

    def crop_scores_of(self, crops_NHWC: Tensor) -> Tensor:
        """`crop_scores` of uint8 RGB crops, which a GPU reads as they are."""
        self.require("fc8")
        return self.vgg().crop_scores(crops_NHWC, self.preprocessing)

    def scores(self, fc7_ND: Tensor) -> Tensor:
        """fc8 of fc7 descriptors: (N, K) float32. Of a mean descriptor it is the mean score map
        (fc8 is linear).
        """
        fc8 = self.fc8()
        return nn.functional.linear(fc7_ND.float(), fc8.weight.float(), fc8.bias.float())

    def fc8(self) -> nn.Linear:
        """What says classes, or boxes, of fc7. Raises VggfeatError where the weights don't reach
        it.
        """
        self.require("fc8")
        return cast(nn.Linear, self.vgg().classifier[-1])

    def set_pool(self, pool: str) -> Network:
        """Max-pooling of odd sides by "floor" or "ceil" instead of the weights' own; changes and
        returns this.

        Raises VggfeatError for a timm backbone, whose pooling is its own.
        """
        self.vgg(OWN_POOLING).set_pool(pool)
        self.metadata["pool"] = pool
        return self

    def to(self, device: str | torch.device = "auto", precision: str = "auto") -> Network:
        """Move to a device, in a precision; changes this object and returns it. See `load`.

        Raises VggfeatError: no such device; float32 of weights that have been rounded to bfloat16.
        """
        place = resolve_device(device)
        wanted = resolve_precision(precision, place)
        if (self.precision, wanted) == ("bfloat16", "float32"):
            raise VggfeatError(
                f"weights {self.spec} were rounded to bfloat16: load them again with `precision`"
                " float32"
            )
        self.device, self.precision = place, wanted
        self.module.to(
            device=self.device, dtype=dtype_of(self.precision), memory_format=torch.channels_last
        )
        return self


def outputs(boxes: str, classes: int) -> int:
    """Of the last layer: a score a class where boxes is "", else four numbers, of a class each or
    of all (`BOXES`).
    """
    return {"": classes, "scr": 4, "pcr": 4 * classes}[boxes]


def describing(layers: Sequence[str]) -> str:
    """The layer that describes by default: fc7, the paper's descriptor (Appendix B); the deepest
    of weights that stop before it.
    """
    return "fc7" if "fc7" in layers else layers[-1]


def as_vgg(outline: Outline, spec: str, need: str) -> VGG:
    """It, where it is a net of Table 1. Raises VggfeatError where it is another, and tells the
    need.
    """
    if not isinstance(outline, VGG):
        raise VggfeatError(f"{spec} is no net of Table 1: {need}")
    return outline


def refuse_small(scales: Sequence[int], net: str, outline: Outline, layer: str) -> None:
    """Raise VggfeatError where a scale Q is smaller than the side that the layer needs."""
    smallest = outline.min_side(layer)
    if min(scales) < smallest:
        raise VggfeatError(
            f"scale {min(scales)} is too small: {layer} of net {net} needs at least {smallest}"
        )


def trained_at(text: str) -> tuple[int, int] | None:
    """The ends of the metadata's train_scale, S in pixels: "256" or "256-512"; None where it isn't
    told.
    """
    low, _, high = text.partition("-")
    return (int(low), int(high or low)) if text else None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(
    path: str | os.PathLike[str],
    module: VGG,
    preprocessing: Preprocessing,
    *,
    classes: list[str] | None = None,
    train_scale: str = "",
    source: str = "",
    epoch: str = "",
    recipe: str = "",
    history: str = "",
    errors: str = "",
    boxes: str = "",
    box_unit: float = 0.0,
) -> None:
    """Write a VGG with its preprocessing as one .safetensors file; it appears whole or not at
    all. boxes, box_unit: of a localisation net.
    """
    metadata = {
        **vgg_metadata(module, preprocessing),
        "classes": json.dumps(classes or []),
        "train_scale": train_scale,
        "source": source,
        "epoch": epoch,
        "recipe": recipe,
        "history": history,
        "errors": errors,
        "version": __version__,
        **({"boxes": boxes, "box_unit": repr(box_unit)} if boxes else {}),
    }
    write_tensors(path, module.state_dict(), metadata)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a .safetensors file; it appears whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # a path in them need not be Unicode, and JSON must be
    metadata = {k: v.encode("utf-8", "backslashreplace").decode() for k, v in metadata.items()}
    with whole(Path(path)) as partial:
        safetensors.torch.save_file(tensors, partial, metadata=metadata)


def vgg_metadata(module: VGG, preprocessing: Preprocessing) -> dict[str, str]:
    return {
        "net": module.net,
        "num_classes": str(module.num_classes),
        "width": repr(module.width),
        "crop": str(module.crop),
        "pool": module.pool,
        **preprocessing.to_metadata(),
    }


# --- building -------------------------------------------------------------------------------------

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Layers' names in others' files -> torchvision's. The authors' nets' conversions count one module
# more.
AUTHORS_FC = {"classifier.1": "classifier.0", "classifier.4": "classifier.3"}
TIMM_FC = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


# What people put in fc8's place, or behind it, to train a net further on classes of their own
_OTHER_HEAD = re.compile(r"(classifier\.(6\.(?!weight$|bias$)|[7-9]\.|[1-9][0-9]+\.)|head\.|fc\.)")


def read_net(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a net of Table 1 by their names, in whose convention ever, and what the file says
    of itself.
    """
    found = [[f"{layer}.weight", f"{layer}.bias"] for layer in ("features.0", "conv1_1")]
    tensors, metadata = bare(*read(path), found, path)
    if normed := [
        key for key in tensors if key.startswith("features.") and key.endswith(".running_mean")
    ]:
        raise VggfeatError(
            f"{path} has batch normalisation ({shown(normed[0])}), which no net of Table 1 has: "
            f"give timm:{torchvisions_name(tensors)}_bn@{path}"
        )
    return tensors, said(metadata)


def torchvisions_name(tensors: Mapping[str, Tensor]) -> str:
    """torchvision's name of a net with so many convolutions."""
    count = sum(v.ndim == 4 and key.startswith(("features", "conv")) for key, v in tensors.items())
    by_count = {8: "vgg11", 10: "vgg13", 13: "vgg16", 16: "vgg19"}
    return by_count.get(count, "vgg16")


@dataclass(frozen=True)
class _Facts:
    """What metadata tell of a net. Raises VggfeatError, which begins with `where`."""

    net: str
    preprocessing: Preprocessing
    width: float
    crop: int
    pool: str
    num_classes: int | None
    classes: list[str] | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: Any) -> _Facts:
        try:
            names = metadata.get("classes") or "[]"
            classes = fitted(parse_json(names, "classes"), list[str], "classes") or None
            boxes, unit = metadata.get("boxes", ""), metadata.get("box_unit", "")
            if (rescale := metadata.get("filter", BILINEAR)) not in FILTERS:
                raise ValueError(f"filter {shown(rescale)}, not one of {'; '.join(FILTERS)}")
            if boxes and (boxes not in BOXES or not 0 < float(unit) < 1e6):
                raise ValueError(f"boxes {shown(boxes)} with box_unit {shown(unit)}")
            due = outputs(boxes, len(classes)) if classes else None
            told = int(metadata["num_classes"]) if "num_classes" in metadata else due
            if classes and told != due:
                kind = "outputs" if boxes else "classes"
                raise ValueError(f"{len(classes)} names for {told} {kind}")
            facts = cls(
                metadata["net"],
                Preprocessing.from_metadata(metadata),
                float(metadata.get("width", "1")),
                int(metadata.get("crop", "224")),
                metadata.get("pool", "floor"),
                told,
                classes,
            )
        except (ValueError, VggfeatError) as error:
            raise VggfeatError(f"{where} has unusable metadata: {error}") from error
        return facts


def agreed(
    source: str,
    file: Path,
    release: Mapping[str, str],
    metadata: Mapping[str, str],
    outputs: int | None,
) -> dict[str, str]:
    """What a file says of itself, and for the rest what the source named has of it.

    outputs: of the file's fc8. Raises VggfeatError where file and source contradict each other.
    """
    theirs = _Facts.from_metadata(release, source)
    told = metadata.get("num_classes", "") if outputs is None else str(outputs)
    # trained further, on other classes
    if theirs.classes and told not in (
        "",
        str(len(theirs.classes)),
    ):
        release = {key: value for key, value in release.items() if key != "classes"}
    together = {**release, **metadata}
    ours = _Facts.from_metadata(together, file)
    differs = {
        "net": ours.net != theirs.net,
        **dict.fromkeys(
            ("channel_order", "input_range", "mean", "std"),
            not ours.preprocessing.same(theirs.preprocessing),
        ),
        "pool": ours.pool != theirs.pool,
        "width": ours.width != theirs.width,
        "crop": ours.crop != theirs.crop,
        "filter": True,
        "train_scale": True,
        "classes": ours.classes != theirs.classes,
    }
    for key, other in differs.items():
        if other and key in metadata and key in release and metadata[key] != release[key]:
            complete = (
                ours.net in NETS
                and {"net", "mean", "channel_order", "input_range"} <= metadata.keys()
            )
            raise VggfeatError(
                f"{file} says of itself {key} {shown(metadata[key])}, and {source} has"
                f" {shown(release[key])}: "
                + (
                    f"give {file} alone"
                    if complete
                    else "name the source that it is of, or correct what it says"
                )
            )
    return together


def vgg_network(spec: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Network:
    """A Network from a state dict and the facts about it; it reaches as far as the weights do.
    Empties `tensors`.
    """
    facts = _Facts.from_metadata(metadata, spec)
    net, num_classes, pool = facts.net, facts.num_classes, facts.pool
    width, crop = facts.width, facts.crop
    try:
        names = layer_keys(net) | AUTHORS_FC | TIMM_FC
    except VggfeatError as error:
        raise VggfeatError(f"{spec} can't be a net: {error}") from error
    for key in list(tensors):
        layer, _, kind = key.rpartition(".")
        ours = f"{names.get(layer)}.{kind}"
        if layer in names and ours not in tensors:
            value = tensors.pop(key)
            if (
                value.ndim == 4
                and ours.startswith("classifier")
                and value.is_contiguous()
                and len(value)
            ):
                value = value.view(len(value), -1)  # FC layers as convolutions
            tensors[ours] = value
    metadata = _without_other_head(tensors, metadata)
    if num_classes is None:
        fc8 = tensors.get("classifier.6.weight")
        num_classes = len(fc8) if fc8 is not None and fc8.ndim == 2 else 1000
    with torch.device("meta"):
        try:
            full = VGG(net, num_classes, width, crop, pool)
        except VggfeatError as error:
            raise VggfeatError(f"{spec} can't be a net: {error}") from error
    expected = full.state_dict()
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise VggfeatError(
            f"{spec} doesn't fit net {net}: it has {shown(unknown[0])}, which the net doesn't"
        )
    refuse_unfit(tensors, expected, f"{spec} doesn't fit net {net} (width {width:g}, crop {crop})")
    reach, hole = None, ""
    start = 0
    for layer in full.layers:
        if layer in FC_LAYERS:
            prefixes = [f"classifier.{3 * FC_LAYERS.index(layer)}."]
        else:
            prefixes = [f"features.{i}." for i in range(start, full.ends[layer])]
            start = full.ends[layer]
        keys = [k for k in expected if k.startswith(tuple(prefixes))]
        # Weights may end early; and torchvision's IMAGENET1K_FEATURES fills the FC layers with NaN.
        lacking = [k for k in keys if k not in tensors or not finite(tensors[k])]
        if lacking and not hole:
            state = "not finite" if lacking[0] in tensors else "missing"
            hole = f"{lacking[0]} of {layer} is {state}"
        if hole and len(lacking) < len(keys):
            raise VggfeatError(
                f"{spec} is damaged: {hole}, and it has {next(k for k in keys if k not in lacking)}"
                f" of {layer}; get it again, or save it without the layers from there on"
            )
        if not hole:
            reach = layer
    if reach is None:
        raise VggfeatError(
            f"{spec} has no usable weights of net {net}: conv1_1 is missing or not finite"
        )
    with torch.device("meta"):
        module = VGG(net, num_classes, width, crop, pool, until=reach)
    own = {"source": spec, **metadata, **vgg_metadata(module, facts.preprocessing)}
    sha256 = fingerprint(tensors)
    # copied, as a file that is only mapped may change, or shrink under the process; one by one, as
    # they may be large
    kept = {
        k: tensors.pop(k).to(torch.float32, copy=True).contiguous() for k in module.state_dict()
    }
    module.load_state_dict(kept, assign=True)
    return Network(spec, module, facts.preprocessing, sha256, own, facts.classes)


def _without_other_head(
    tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> Mapping[str, str]:
    """Take another head than fc8, and an fc8 before it, out of `tensors`: such weights reach fc7.
    Metadata tell.
    """
    other = [key for key in tensors if _OTHER_HEAD.match(key)]
    if not other:
        return metadata
    for key in [*other, "classifier.6.weight", "classifier.6.bias"]:
        if tensors.pop(key, None) is not None and key not in other:
            other.append(key)
    layers = dict.fromkeys(key.rpartition(".")[0] for key in sorted(other))
    left_out = f"left out: {', '.join(layers)}"[:100]
    told = [metadata["unwrapped"]] if "unwrapped" in metadata else []
    return {**metadata, "unwrapped": ", ".join([*told, left_out])}


def refuse_unfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise VggfeatError where a tensor that is expected has another shape or kind of number; no
    value is read.
    """
    for key, wanted in expected.items():
        if key not in tensors:
            continue
        tensor = tensors[key]
        if tensor.shape != wanted.shape:
            raise VggfeatError(
                f"{what}: {key} has shape {tuple(tensor.shape)}, the net's is {tuple(wanted.shape)}"
            )
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.dtype not in (
            FLOATS if wanted.is_floating_point() else (wanted.dtype,)
        ):
            kind = str(tensor.dtype).removeprefix("torch.") if dense else "not dense"
            raise VggfeatError(
                f"{what}: {key} is {kind}, not {str(wanted.dtype).removeprefix('torch.')}"
            )


def finite(tensor: Tensor) -> bool:
    """Whether all values are; without a mask of them, which may be large."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def refuse_other_names(file: Path, tensors: Mapping[str, Tensor], convention: Convention) -> None:
    """Raise VggfeatError where the names tell that a file is of a release of the other
    convention.
    """
    conversion = "classifier.1.weight" in tensors or "classifier.4.weight" in tensors
    torchvisions = "classifier.0.weight" in tensors or "classifier.3.weight" in tensors
    if conversion and convention == "torchvision":
        raise VggfeatError(
            f"{file} has the names of the conversion of the authors' nets (classifier.1), not"
            f" torchvision's: give {file} alone"
        )
    if torchvisions and convention == "authors":
        raise VggfeatError(
            f"{file} has torchvision's names (classifier.0), not those of the conversion of the"
            f" authors' nets: give torchvision:{torchvisions_name(tensors)}@{file}, or a file whose"
            " metadata say what it is"
        )
