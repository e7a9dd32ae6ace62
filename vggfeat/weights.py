"""A name or a path -> a ready network: its weights, the preprocessing that belongs to them, a
fingerprint.

`SOURCES` lists the names. What a file says of itself, by its metadata or by the names in it, is
believed: a source that says otherwise (`torchvision:vgg16@FILE`) is refused. Names, types and
shapes are compared with the net's before a value is used (`tensors` reads them), and a net has at
most `vgg.MOST_PARAMETERS` parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor, nn

from vggfeat import __version__
from vggfeat.checked import fitted, parse_json, shown
from vggfeat.errors import VggfeatError, WrongUsage, reason
from vggfeat.files import whole
from vggfeat.images import CAFFE, CAFFE_MEAN_BGR, Preprocessing, said
from vggfeat.tensors import ENDINGS, bare, read
from vggfeat.vgg import FC_LAYERS, NETS, TABLE_1, VGG, layer_keys

# Conversions of the authors' Caffe files; the digits in a name are the first of its sha256.
OXFORD = {
    "D": "https://web.eecs.umich.edu/~justincj/models/vgg16-00b39a1b.pth",
    "E": "https://web.eecs.umich.edu/~justincj/models/vgg19-d01eb7cb.pth",
}
# sha1 of the authors' own files, VGG_ILSVRC_16_layers.caffemodel and that of 19 layers, as Caffe's
# model zoo has them
CAFFEMODELS = {
    "D": "9363e1f6d65f7dba68c4f27a1e62105cdf6c4e24",
    "E": "239785e7862442717d831f682bb824055e51e9ba",
}
TORCHVISION_NETS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
MINI = {net: Path(__file__).parent / "assets" / f"mini-{net}.safetensors" for net in ("A", "D")}
WHOLE = {"width": "1", "crop": "224"}  # of a released net
MINI_WORKS = "without a network `weights` mini works"
SOURCES = [
    ("mini, mini:A", "small nets D and A that come with the package, 5 MB each: for trying things"),
    ("oxford:D", "the authors' released net D (default); BGR 0-255 minus the mean, ceil pooling"),
    ("oxford:E", "the authors' released net E"),
    ("oxford:D@FILE", "the same from a local file: their conversion, or the authors' .caffemodel"),
    ("torchvision:vgg16", "torchvision's own VGG (vgg11, vgg13, vgg16, vgg19); also @FILE"),
    (
        "torchvision:vgg16.IMAGENET1K_FEATURES",
        "the released convolutions without FC layers; also @FILE",
    ),
    ("timm:NAME", "any timm backbone that takes images of any size; also @FILE"),
    ("random:NET,width=W,crop=C,seed=S,classes=K", "an untrained net: the floor of a comparison"),
    ("FILE.safetensors", "a weights file with its metadata (net, mean, channel order, ...)"),
    ("FILE.pth", "PyTorch's file of a conversion of the authors' net, known by its names"),
    ("FILE.caffemodel", "Caffe's file of a net of Table 1, as the authors released theirs"),
]


@dataclass
class Network:
    """A network, what its input must look like, and which weights it has.

    spec: what loads the same weights again.
    module: a VGG, or a timm backbone in the same clothes.
    fingerprint: sha256 of the tensors (names, types, shapes, bytes) as they were read.
    metadata: the strings of the weights file (contract: net, mean, channel_order, pool, …).
    classes: names of fc8's outputs, where they are known.
    """

    spec: str
    module: Any
    preprocessing: Preprocessing
    fingerprint: str
    metadata: dict[str, str]
    classes: list[str] | None = None
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def name(self) -> str:
        return self.metadata["net"]

    @property
    def layers(self) -> list[str]:
        """Layers that these weights reach, first to last."""
        return self.module.layers

    @property
    def default_layer(self) -> str:
        """fc7, the paper's descriptor (Appendix B); the deepest layer of weights that stop before
        it.
        """
        return "fc7" if "fc7" in self.layers else self.layers[-1]

    @property
    def default_scales(self) -> tuple[int, ...]:
        """Smallest sides Q in pixels: the S that the weights learned at; of a range its ends and
        its middle.

        The paper's 256, 384, 512 (Appendix B), which its nets learned at, where the weights don't
        tell.
        """
        low, high = train_scale(self.metadata.get("train_scale", "")) or (256, 512)
        return (low,) if low == high else (low, (low + high) // 2, high)

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
        return self.module(x_NCHW.to(DTYPES[self.precision]), layer)

    def crop_scores(self, x_NCHW: Tensor) -> Tensor:
        """Scores (N, K) of preprocessed float32 crops, FC layers as matrices, in the network's
        precision.
        """
        self.require("fc8")
        return self.module.crop_scores(x_NCHW.to(DTYPES[self.precision]))

    def scores(self, fc7_ND: Tensor) -> Tensor:
        """fc8 of fc7 descriptors: (N, K) float32. Of a mean descriptor it is the mean score map
        (fc8 is linear).
        """
        self.require("fc8")
        fc8 = self.module.classifier[-1]
        return nn.functional.linear(fc7_ND.float(), fc8.weight.float(), fc8.bias.float())

    def set_pool(self, pool: str) -> Network:
        """Max-pooling of odd sides by "floor" or "ceil" instead of the weights' own; changes and
        returns this.

        Raises VggfeatError for a timm backbone, whose pooling is its own.
        """
        if not isinstance(self.module, VGG):
            raise VggfeatError(f"{self.spec} is no net of Table 1: its pooling can't be set")
        self.module.set_pool(pool)
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
            device=self.device, dtype=DTYPES[self.precision], memory_format=torch.channels_last
        )
        return self


def train_scale(text: str) -> tuple[int, int] | None:
    """The ends of the metadata's train_scale, S in pixels: "256" or "256-512"; None where it isn't
    told.
    """
    low, _, high = text.partition("-")
    return (int(low), int(high or low)) if text else None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> "bfloat16" where the hardware multiplies bfloat16, else "float32"; other names
    unchanged.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # bfloat16 without these instructions is emulated: slower than float32, and no better
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    if not isinstance(precision, str) or precision not in DTYPES:
        raise VggfeatError(f"precision {shown(precision)} is not one of auto, {', '.join(DTYPES)}")
    return precision


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" -> the first GPU, or the CPU; a GPU that isn't there raises VggfeatError."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise WrongUsage(
            f"there is no device {shown(device)}; give auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise WrongUsage(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise VggfeatError(
            f"device {device!r} is not there: PyTorch sees {count} GPUs; give `device` cpu"
        )
    return resolved


def load(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Network:
    """A ready network, in evaluation mode, on the hardware's device in its precision, as the
    commands have it.

    name: a spec (see `SOURCES`), a path, or a net of Table 1 ("D", "E": the released weights).
    weights: a spec or path; `name` must then be the net that it holds.
    device: "auto", the first GPU or else the CPU; "cpu", "cuda", "cuda:N".
    precision: "auto", bfloat16 where the device multiplies it, else float32; "float32", "bfloat16".
    Raises VggfeatError: unknown name, missing or unfit file, wrong checksum, no network, no such
    device.
    """
    for what, given in (("name", name), ("weights", name if weights is None else weights)):
        if not isinstance(given, str | os.PathLike):
            raise VggfeatError(
                f"`{what}` must be a source of weights, as 'mini' or 'oxford:D', or a path, not"
                f" {shown(given)}"
            )
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    name = os.fspath(name)
    if weights is not None:
        spec = f"mini:{name}" if weights == "mini" else weights
        network = load(spec, device=device, precision=precision)
        if name != network.name:
            raise VggfeatError(
                f"weights {weights} hold net {network.name}, not {name}: give that net, or the"
                " weights alone"
            )
        return network
    if name in NETS:
        if name not in OXFORD:
            raise WrongUsage(
                f"no weights were released for net {name} (but for D and E): give a file as"
                " `weights`"
            )
        name = f"oxford:{name}"
    if name == "mini":
        name = "mini:D"
    if "\0" in name:
        raise VggfeatError(f"weights {name!r} can't be: no name has a zero byte")
    source, _, rest = name.partition(":")
    if rest and source in _LOADERS:
        what, _, file = rest.partition("@")
        network = _LOADERS[source](what, Path(os.path.realpath(file)) if file else None)
    elif Path(name).suffix in ENDINGS or os.path.lexists(name):
        network = _load_file(Path(name))
    else:
        raise WrongUsage(
            f"weights {shown(name)} are not known: there is no such file, and no such source; give"
            " a file, or one of mini, oxford:D, torchvision:vgg16, timm:NAME, random:A (see"
            " `vggfeat weights`)"
        )
    network.module.eval().requires_grad_(False)
    return network.to(device, precision)


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
) -> None:
    """Write a VGG with its preprocessing as one .safetensors file; it appears whole or not at
    all.
    """
    metadata = {
        **_vgg_metadata(module, preprocessing),
        "classes": json.dumps(classes or []),
        "train_scale": train_scale,
        "source": source,
        "epoch": epoch,
        "recipe": recipe,
        "history": history,
        "errors": errors,
        "version": __version__,
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


def _vgg_metadata(module: VGG, preprocessing: Preprocessing) -> dict[str, str]:
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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
            f"give timm:{_torchvisions(tensors)}_bn@{path}"
        )
    return tensors, said(metadata)


def _torchvisions(tensors: Mapping[str, Tensor]) -> str:
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
    def of(cls, metadata: Mapping[str, str], where: Any) -> _Facts:
        try:
            names = metadata.get("classes") or "[]"
            classes = fitted(parse_json(names, "classes"), list[str], "classes") or None
            num_classes = len(classes) if classes else None
            if "num_classes" in metadata:
                num_classes = int(metadata["num_classes"])
            facts = cls(
                metadata["net"],
                Preprocessing.from_metadata(metadata),
                float(metadata.get("width", "1")),
                int(metadata.get("crop", "224")),
                metadata.get("pool", "floor"),
                num_classes,
                classes,
            )
        except (ValueError, VggfeatError) as error:
            raise VggfeatError(f"{where} has unusable metadata: {error}") from error
        if classes and len(classes) != num_classes:
            raise VggfeatError(
                f"{where} has unusable metadata: {len(classes)} names for {num_classes} classes"
            )
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
    theirs = _Facts.of(release, source)
    told = metadata.get("num_classes", "") if outputs is None else str(outputs)
    if theirs.classes and told not in (
        "",
        str(len(theirs.classes)),
    ):  # trained further, on other classes
        release = {key: value for key, value in release.items() if key != "classes"}
    agreed = {**release, **metadata}
    ours = _Facts.of(agreed, file)
    differs = {
        "net": ours.net != theirs.net,
        **dict.fromkeys(
            ("channel_order", "input_range", "mean", "std"),
            not ours.preprocessing.same(theirs.preprocessing),
        ),
        "pool": ours.pool != theirs.pool,
        "width": ours.width != theirs.width,
        "crop": ours.crop != theirs.crop,
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
    return agreed


def _load_file(path: Path) -> Network:
    tensors, metadata = _read(path)
    place = os.path.realpath(
        path
    )  # kept in feature files and models, which are used from other folders
    if "net" in metadata and "mean" in metadata:
        return _vgg_network(place, tensors, metadata)
    if "classifier.1.weight" in tensors and "mean" not in metadata:
        network = _oxford(_net_by_convolutions(tensors, path), Path(place))
        network.spec = place  # by its names alone it is nobody's
        return network
    sources = [f"timm:NAME@{path}"]
    if any(key.startswith(("features.", "conv")) for key in tensors):
        sources = [f"torchvision:{_torchvisions(tensors)}@{path}"]
        if "classifier.0.weight" not in tensors:
            sources += [
                f"oxford:{net}@{path}"
                for net in OXFORD
                if TORCHVISION_NETS[_torchvisions(tensors)] == net
            ]
    raise VggfeatError(
        f"{path} doesn't say which preprocessing its weights need; name the source, as in"
        f" {' or '.join(sources)}, or make a .safetensors file whose metadata tell it"
        " (docs/formats.md)"
    )


def _net_by_convolutions(tensors: Mapping[str, Tensor], path: Path) -> str:
    count = sum(v.ndim == 4 for v in tensors.values())
    for net in OXFORD:
        if count == sum(len(stage) for stage in TABLE_1[net]):
            return net
    raise VggfeatError(f"{path} has {count} convolutions; the released nets have 13 (D) or 16 (E)")


def _vgg_network(spec: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Network:
    """A Network from a state dict and the facts about it; it reaches as far as the weights do.
    Empties `tensors`.
    """
    facts = _Facts.of(metadata, spec)
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
    own = {"source": spec, **metadata, **_vgg_metadata(module, facts.preprocessing)}
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


# --- sources --------------------------------------------------------------------------------------


def _of_source(
    source: str, file: Path | None, url: str, release: Mapping[str, str], caffemodel: str = ""
) -> Network:
    """The net of a release: downloaded, or from a file that doesn't contradict what the release is.

    Of another file than the released one, byte for byte, nothing is known of who trained it, and at
    which S. caffemodel: sha1 of another file of the same release.
    """
    path = _downloaded(url, source) if file is None else file
    tensors, metadata = _read(path)
    names_tell = any(key.startswith(("classifier.", "fc")) for key in tensors)
    if file is None:
        if not _checksum(path, "sha256").startswith(_digits(url)):
            raise VggfeatError(
                f"{path} is not the released file: its sha256 doesn't begin with {_digits(url)};"
                f" move it away, and the released one is fetched, or give {source}@FILE"
            )
        return _vgg_network(source, tensors, release)
    if "mean" not in metadata:
        refuse_other_release(source, file, tensors)
    fc8 = tensors.get("classifier.6.weight", tensors.get("fc8.weight"))
    outputs = len(fc8) if fc8 is not None and fc8.ndim else None
    facts = agreed(source, file, release, metadata, outputs)
    if (
        not _checksum(file, "sha256").startswith(_digits(url))
        and _checksum(file, "sha1") != caffemodel
    ):
        name = url.rpartition("/")[2]
        told = (
            "" if names_tell or "mean" in metadata else f"; preprocessing as of {source}, as asked"
        )
        claims = {"train_scale": "", "source": f"{file}, which is not the released {name}{told}"}
        facts |= {key: metadata.get(key, value) for key, value in claims.items() if key in release}
    return _vgg_network(f"{source}@{file}", tensors, facts)


def _checksum(path: Path, kind: str) -> str:
    """Of a file's bytes, as hex; kind: as hashlib calls it."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error


def _digits(url: str) -> str:
    """The first digits of a released file's sha256, which its name ends with."""
    found = re.search(r"-([0-9a-f]{8,})\.", url.rpartition("/")[2])
    return found[1] if found else ""


def refuse_other_release(source: str, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise VggfeatError where the names, or FC layers of NaN, tell that a file is another
    release's.
    """
    conversion = "classifier.1.weight" in tensors or "classifier.4.weight" in tensors
    torchvisions = "classifier.0.weight" in tensors or "classifier.3.weight" in tensors
    if conversion and source.startswith("torchvision"):
        raise VggfeatError(
            f"{file} has the names of the conversion of the authors' nets (classifier.1), not"
            f" torchvision's: give {file} alone"
        )
    if torchvisions and source.startswith("oxford"):
        raise VggfeatError(
            f"{file} has torchvision's names (classifier.0), not those of the conversion of the"
            f" authors' nets: give torchvision:{_torchvisions(tensors)}@{file}, or a file whose"
            " metadata say what it is"
        )
    features = "torchvision:vgg16.IMAGENET1K_FEATURES"
    fc6 = tensors.get("classifier.0.weight")
    if (
        source.startswith("torchvision:vgg16")
        and fc6 is not None
        and fc6.numel()
        and fc6.is_floating_point()
    ):
        empty = bool(
            torch.isnan(fc6[0]).all()
        )  # that release has no FC layers, and its file NaN for them
        if empty != (source == features):
            told = "has NaN for its FC layers, as" if empty else "has FC layers, unlike"
            other = features if empty else "torchvision:vgg16"
            raise VggfeatError(f"{file} {told} {features}: give {other}@{file}")


def _oxford(net: str, file: Path | None) -> Network:
    if net not in OXFORD:
        raise WrongUsage(
            f"no weights were released for net {net!r}; there are oxford:D and oxford:E"
        )
    release = {
        "net": net,
        **CAFFE.to_metadata(),
        **WHOLE,
        "pool": "ceil",
        "classes": json.dumps(_imagenet_categories()),
        "train_scale": "256-512",
        "source": OXFORD[net],
    }
    return _of_source(f"oxford:{net}", file, OXFORD[net], release, CAFFEMODELS[net])


def _mini(net: str, file: Path | None) -> Network:
    if net not in MINI or file is not None:
        raise VggfeatError(
            f"there are no mini weights {net!r}: give {' or '.join(f'mini:{n}' for n in MINI)}"
        )
    network = _load_file(MINI[net])
    network.spec = f"mini:{net}"  # wherever the package lies
    return network


def _imagenet_categories() -> list[str]:
    """Names of the 1,000 ILSVRC classes in synset order, which is the released nets' (Caffe's)
    too.
    """
    from torchvision.models import VGG16_Weights

    return list(VGG16_Weights.IMAGENET1K_V1.meta["categories"])


def _downloaded(url: str, spec: str) -> Path:
    """The file of a release in PyTorch's cache, fetched into it where it isn't there. Raises
    VggfeatError.
    """
    name = url.rpartition("/")[2]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    digits = _digits(url)
    path = folder / name
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, os.fspath(path), hash_prefix=digits)
    except (URLError, HTTPException, OSError, RuntimeError) as error:
        raise VggfeatError(
            f"could not get {url}: {reason(error)}; fetch it by hand (its sha256 begins with"
            f" {digits}), and give {spec}@FILE or put it into {folder}; {MINI_WORKS}; a file of the"
            " convolutions alone does for `layer` pool5 and those before it: extract, and all that"
            " reads its feature file"
        ) from error
    return path


def _torchvision(what: str, file: Path | None) -> Network:
    from torchvision.models import get_model_weights

    architecture, _, entry = what.partition(".")
    if architecture not in TORCHVISION_NETS:
        raise VggfeatError(
            f"torchvision:{shown(architecture)[1:-1]} is not a net of Table 1; there are "
            f"{', '.join(TORCHVISION_NETS)} (for other models: timm:NAME)"
        )
    enum = get_model_weights(architecture)
    entries = list(enum.__members__)
    if entry and entry not in entries:
        raise VggfeatError(
            f"torchvision:{architecture} has no weights {entry!r}; there are {', '.join(entries)}"
        )
    weights = enum[entry] if entry else enum["IMAGENET1K_V1"]
    # the enum's own transform: the preprocessing comes with the weights
    transform = weights.transforms()
    preprocessing = Preprocessing(
        mean=tuple(transform.mean), std=tuple(transform.std), channel_order="RGB", input_range=1.0
    )
    release = {
        "net": TORCHVISION_NETS[architecture],
        **preprocessing.to_metadata(),
        **WHOLE,
        # the released convolutions, trained in Caffe; torchvision's own training rounded down
        "pool": "ceil" if entry == "IMAGENET1K_FEATURES" else "floor",
        "classes": json.dumps(list(weights.meta.get("categories") or [])),
        "source": weights.url,
    }
    return _of_source(f"torchvision:{what}", file, weights.url, release)


def _random(what: str, file: Path | None) -> Network:
    """An untrained net: He's normal initialisation (fan-in), zero biases, from an explicit seed."""
    net, *settings = what.split(",")
    values: dict[str, float] = {"width": 1.0, "crop": 224, "seed": 0, "classes": 1000}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            if key not in values:
                raise ValueError(key)
            values[key] = float(value) if key == "width" else int(value)
            if key == "seed" and not 0 <= values[key] < 2**63:
                raise ValueError(value)
        except ValueError as error:
            raise WrongUsage(
                f"random:{what} has a setting {setting!r}; write"
                " random:NET,width=0.25,crop=64,seed=0,classes=10"
            ) from error
    if file is not None:
        raise WrongUsage("random: weights come from a seed, not from a file")
    try:
        with torch.device("meta"):  # nothing too large
            module = VGG(net, int(values["classes"]), values["width"], int(values["crop"]))
    except VggfeatError as error:  # all of it was typed
        raise WrongUsage(str(error)) from error
    generator = torch.Generator().manual_seed(int(values["seed"]))
    tensors = {}
    for key, shape in ((k, v.shape) for k, v in module.state_dict().items()):
        if key.endswith("bias"):
            tensors[key] = torch.zeros(shape)
        else:
            std = (2.0 / shape[1:].numel()) ** 0.5
            tensors[key] = torch.empty(shape).normal_(0.0, std, generator=generator)
    preprocessing = Preprocessing(
        mean=CAFFE_MEAN_BGR[::-1], std=(1.0, 1.0, 1.0), channel_order="RGB", input_range=255.0
    )
    return _vgg_network(f"random:{what}", tensors, _vgg_metadata(module, preprocessing))


def _timm(what: str, file: Path | None) -> Network:
    from vggfeat.backbones import load_timm  # which builds on this module

    return load_timm(what, file)


_LOADERS = {
    "mini": _mini,
    "oxford": _oxford,
    "torchvision": _torchvision,
    "random": _random,
    "timm": _timm,
}
