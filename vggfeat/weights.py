"""A name or a path -> a ready network: its weights, the preprocessing that belongs to them, a fingerprint.

| spec | what it is |
|---|---|
| `mini`, `mini:D`, `mini:A` | small nets that come with the package, trained on ten classes: for trying things |
| `oxford:D`, `oxford:E` | the authors' released nets (scale-jittered), downloaded with a checksum |
| `oxford:D@FILE` | the same from a local file |
| `torchvision:vgg16`, `torchvision:vgg16.IMAGENET1K_FEATURES` | torchvision's enums; `@FILE` for a local file |
| `timm:NAME` | any timm backbone, its dense features; `@FILE` for a local file |
| `random:A,width=0.25,crop=64,seed=0` | an untrained net of Table 1 (He's initialisation): the floor of a comparison |
| `FILE.safetensors` | a file whose metadata name the net and its preprocessing |
| `FILE.pth` | a released-net conversion (keys `classifier.1|4|6`), recognised by its keys |

No code of a file is ever run: safetensors, or a pickle that names nothing but plain tensors. Names, types and shapes
are compared with the net's before a value is read, and a net has at most `vgg.MOST_PARAMETERS` parameters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vggfeat import __version__
from vggfeat.checked import fitted, parse_json, regular, shown
from vggfeat.errors import VggfeatError
from vggfeat.files import whole
from vggfeat.images import CAFFE_MEAN_BGR, Preprocessing
from vggfeat.vgg import FC_LAYERS, MOST_PARAMETERS, NETS, TABLE_1, VGG

CAFFE = Preprocessing(mean=CAFFE_MEAN_BGR, std=(1.0, 1.0, 1.0), channel_order="BGR", input_range=255.0)
# Conversions of the authors' Caffe files; the digits in a name are the first of its sha256.
OXFORD = {
    "D": "https://web.eecs.umich.edu/~justincj/models/vgg16-00b39a1b.pth",
    "E": "https://web.eecs.umich.edu/~justincj/models/vgg19-d01eb7cb.pth",
}
OXFORD_FC = {"classifier.1": "classifier.0", "classifier.4": "classifier.3", "classifier.6": "classifier.6"}
TORCHVISION_NETS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
MINI = {net: Path(__file__).parent / "assets" / f"mini-{net}.safetensors" for net in ("A", "D")}
SOURCES = [
    ("mini, mini:A", "small nets D and A that come with the package, 5 MB each: for trying things"),
    ("oxford:D", "the authors' released net D (default); BGR 0-255 minus the mean, ceil pooling"),
    ("oxford:E", "the authors' released net E"),
    ("oxford:D@FILE", "the same from a local file (.pth or .safetensors)"),
    ("torchvision:vgg16", "torchvision's own VGG (vgg11, vgg13, vgg16, vgg19); also @FILE"),
    ("torchvision:vgg16.IMAGENET1K_FEATURES", "the released convolutions without FC layers"),
    ("timm:NAME", "any timm backbone that takes images of any size; also @FILE"),
    ("random:NET,width=W,crop=C,seed=S", "an untrained net: the floor of a comparison"),
    ("FILE.safetensors", "a weights file with its metadata (net, mean, channel order, ...)"),
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
        """fc7, the paper's descriptor (Appendix B); the deepest layer of weights that stop before it."""
        return "fc7" if "fc7" in self.layers else self.layers[-1]

    @property
    def default_scales(self) -> tuple[int, ...]:
        """Smallest sides Q in pixels: the S that the weights learned at; of a range its ends and its middle.

        The paper's 256, 384, 512 (Appendix B), which its nets learned at, where the weights don't tell.
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
        """The layer's map (N, D, h, w) of preprocessed float32 images, in the network's precision."""
        self.require(layer)
        return self.module(x_NCHW.to(DTYPES[self.precision]), layer)

    def crop_scores(self, x_NCHW: Tensor) -> Tensor:
        """Scores (N, K) of preprocessed float32 crops, FC layers as matrices, in the network's precision."""
        self.require("fc8")
        return self.module.crop_scores(x_NCHW.to(DTYPES[self.precision]))

    def scores(self, fc7_ND: Tensor) -> Tensor:
        """fc8 of fc7 descriptors: (N, K) float32. Of a mean descriptor it is the mean score map (fc8 is linear)."""
        self.require("fc8")
        fc8 = self.module.classifier[-1]
        return nn.functional.linear(fc7_ND.float(), fc8.weight.float(), fc8.bias.float())

    def set_pool(self, pool: str) -> Network:
        """Max-pooling of odd sides by "floor" or "ceil" instead of the weights' own; changes and returns this.

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
                f"weights {self.spec} were rounded to bfloat16: load them again with `precision` float32"
            )
        self.device, self.precision = place, wanted
        self.module.to(device=self.device, dtype=DTYPES[self.precision], memory_format=torch.channels_last)
        return self


def train_scale(text: str) -> tuple[int, int] | None:
    """The ends of the metadata's train_scale, S in pixels: "256" or "256-512"; None where it isn't told."""
    low, _, high = text.partition("-")
    return (int(low), int(high or low)) if text else None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> "bfloat16" where the hardware multiplies bfloat16, else "float32"; other names unchanged."""
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
        raise VggfeatError(f"there is no device {shown(device)}; give auto, cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise VggfeatError(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise VggfeatError(f"device {device!r} is not there: PyTorch sees {count} GPUs; give `device` cpu")
    return resolved


def load(
    name: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Network:
    """A ready network, in evaluation mode, on the hardware's device in its precision, as the commands have it.

    name: a spec (see this module's table), a path, or a net of Table 1 ("D", "E": the released weights).
    weights: a spec or path; `name` must then be the net that it holds.
    device: "auto", the first GPU or else the CPU; "cpu", "cuda", "cuda:N".
    precision: "auto", bfloat16 where the device multiplies it, else float32; "float32", "bfloat16".
    Raises VggfeatError: unknown name, missing or unfit file, wrong checksum, no network, no such device.
    """
    for what, given in (("name", name), ("weights", name if weights is None else weights)):
        if not isinstance(given, str | os.PathLike):
            raise VggfeatError(
                f"`{what}` must be a source of weights, as 'mini' or 'oxford:D', or a path, not {shown(given)}"
            )
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    name = os.fspath(name)
    if weights is not None:
        spec = f"mini:{name}" if weights == "mini" else weights
        network = load(spec, device=device, precision=precision)
        if name != network.name:
            raise VggfeatError(
                f"weights {weights} hold net {network.name}, not {name}: give that net, or the weights alone"
            )
        return network
    if name in NETS:
        if name not in OXFORD:
            raise VggfeatError(
                f"no weights were released for net {name} (but for D and E): give a file as `weights`"
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
    elif Path(name).suffix in (".safetensors", ".pth", ".pt"):
        network = _load_file(Path(name))
    else:
        raise VggfeatError(
            f"weights {shown(name)} are not known: give a .safetensors or .pth file, or one of "
            f"mini, oxford:D, torchvision:vgg16, timm:NAME, random:A (see `vggfeat weights`)"
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
    errors: str = "",
) -> None:
    """Write a VGG with its preprocessing as one .safetensors file; it appears whole or not at all."""
    metadata = {
        **_vgg_metadata(module, preprocessing),
        "classes": json.dumps(classes or []),
        "train_scale": train_scale,
        "source": source,
        "epoch": epoch,
        "recipe": recipe,
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


# --- reading files -----------------------------------------------------------------------------------------

MOST_HEADER = 16 << 20  # bytes of the names, shapes and metadata in a file
MOST_STEPS = 1_000_000  # of the pickle in a .pth file; a state dict takes about twenty a tensor
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What the pickle of a state dict names, and nothing else: weights_only allows much that takes memory or isn't dense.
_PLAIN = {
    "collections OrderedDict",
    *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(
        f"torch {name}Storage"
        for name in ("Half", "BFloat16", "Float", "Double", "Byte", "Int", "Long", "Bool")
    ),
}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors or .pth file; of most files the values are only mapped, not yet read.

    Raises VggfeatError: no such file; a header that is damaged or unsound; anything but dense tensors by name.
    """
    size = regular(path, "weights file")
    with _unreadable(path):
        if path.suffix == ".safetensors":
            with opened(path) as file:
                return {key: file.get_tensor(key) for key in file.keys()}, _metadata(file, path)  # noqa: SIM118
        with open(path, "rb") as pickled:
            mapped = _check_pickle(pickled, path, size)
            pickled.seek(0)
            place = _unicode_name(path, pickled) if mapped else pickled
            with warnings.catch_warnings(action="ignore"):  # of what a damaged file says of itself
                tensors = torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise VggfeatError(f"{path} holds no plain state dict (names to tensors)")
    return {key: tensor.detach() for key, tensor in tensors.items()}, {}


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except VggfeatError:
        raise
    except Exception as error:  # the readers raise whatever a broken file makes them raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VggfeatError(f"{path} can't be read as weights: {reason}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A .safetensors file whose header is of a sane length; the library compares it with the file's own length.

    Raises OSError for a file that can't be opened, which the library would call missing; ValueError, SafetensorError.
    """
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > MOST_HEADER:
            raise ValueError(f"its header claims {length:,} bytes")
        with safetensors.safe_open(_unicode_name(path, raw), framework="pt") as file:
            yield file


def _unicode_name(path: Path, file: IO[bytes]) -> str:
    """A name of an open file that libraries take, which want Unicode."""
    try:
        return os.fspath(path) if os.fspath(path).encode() else ""
    except UnicodeEncodeError:
        return f"/dev/fd/{file.fileno()}"


def _check_pickle(file: IO[bytes], path: Path, size: int) -> bool:
    """Refuse a .pth file that is more than tensors by name, before it is loaded; whether its values can be mapped."""
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise VggfeatError(f"{path} is compressed, as PyTorch's files never are: save it again")
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(entries) != 1:
            raise VggfeatError(
                f"{path} is a zip archive, and not one that PyTorch has written: it has {len(entries)} data.pkl"
            )
        (pickled,) = entries
        if pickled.file_size > MOST_HEADER:
            raise VggfeatError(f"{path} can't be read as weights: its pickle has {pickled.file_size:,} bytes")
        _check_names(io.BytesIO(archive.read(pickled)), 1, path)
        return True
    if size > 4 * MOST_PARAMETERS:
        raise VggfeatError(
            f"{path} has {size / 1e9:.1f} GB in PyTorch's old format, which is read whole: save it again"
        )
    file.seek(0)
    _check_names(file, 4, path)  # a magic number, a version, facts about the machine, the tensors
    return False


def _check_names(file: IO[bytes], pickles: int, path: Path) -> None:
    steps = 0
    for _ in range(pickles):
        for step, argument, _ in pickletools.genops(file):
            steps += 1
            if steps > MOST_STEPS:
                raise VggfeatError(f"{path} can't be read as weights: its pickle is too long")
            if "GLOBAL" in step.name and argument not in _PLAIN:
                what = argument or "a function"
                raise VggfeatError(
                    f"{path} can't be read as weights: it names {what}, not only tensors by their names"
                )


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises VggfeatError: no such file, a damaged one, metadata that can't be."""
    regular(path, "weights file")
    with _unreadable(path), opened(path) as file:
        return _metadata(file, path)


def _metadata(file: Any, path: Path) -> dict[str, str]:
    """The strings of an open file, those that are kept for the record checked; a net's own are by `_load_file`."""
    metadata = dict(file.metadata() or {})
    for key in ("recipe", "errors"):
        where = f"{path}: the metadata's {key}"
        record = fitted(parse_json(metadata.get(key) or "{}", where), dict[str, Any], where)
        fitted(record.get("seed", 0), int, f"{where}'s seed")
    scale = metadata.get("train_scale", "")
    if not re.fullmatch(r"([0-9]{1,5}(-[0-9]{1,5})?)?", scale):
        raise VggfeatError(f"{path}: the metadata's train_scale must be as 256 or 256-512, not {scale!r:.60}")
    return metadata


def _load_file(path: Path) -> Network:
    tensors, metadata = _read(path)
    place = os.path.realpath(path)  # kept in feature files and models, which are used from other folders
    if "classifier.1.weight" in tensors and "net" not in metadata:
        return _oxford(_net_by_convolutions(tensors, path), Path(place))
    if "net" not in metadata or ("mean" not in metadata and "mean_bgr" not in metadata):
        raise VggfeatError(
            f"{path} doesn't say which preprocessing its weights need; name the source, "
            f"as in torchvision:vgg16@{path} or oxford:D@{path}"
        )
    try:
        preprocessing = Preprocessing.from_metadata(metadata)
        width, crop = float(metadata.get("width", "1")), int(metadata.get("crop", "224"))
        names = metadata.get("classes") or "[]"
        classes = fitted(parse_json(names, "classes"), list[str], "classes") or None
        num_classes = len(classes) if classes else None
        if "num_classes" in metadata:
            num_classes = int(metadata["num_classes"])
    except (ValueError, VggfeatError) as error:
        raise VggfeatError(f"{path} has unusable metadata: {error}") from error
    if classes and len(classes) != num_classes:
        raise VggfeatError(f"{path} has unusable metadata: {len(classes)} names for {num_classes} classes")
    # Weights that subtract Caffe's BGR mean came through Caffe, whose pooling rounds up.
    pool = metadata.get("pool") or ("ceil" if "mean_bgr" in metadata else "floor")
    return _vgg_network(
        place,
        metadata["net"],
        tensors,
        preprocessing,
        pool,
        width,
        crop,
        num_classes,
        classes,
        metadata,
    )


def _net_by_convolutions(tensors: Mapping[str, Tensor], path: Path) -> str:
    count = sum(v.ndim == 4 for v in tensors.values())
    for net in OXFORD:
        if count == sum(len(stage) for stage in TABLE_1[net]):
            return net
    raise VggfeatError(f"{path} has {count} convolutions; the released nets have 13 (D) or 16 (E)")


def _vgg_network(
    spec: str,
    net: str,
    tensors: dict[str, Tensor],
    preprocessing: Preprocessing,
    pool: str,
    width: float = 1.0,
    crop: int = 224,
    num_classes: int | None = None,
    classes: list[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Network:
    """A Network from a state dict in torchvision's keys; it reaches as far as the weights do. Empties `tensors`.

    classes: of another number than fc8's outputs they are not its names.
    """
    if num_classes is None:
        fc8 = tensors.get("classifier.6.weight")
        num_classes = len(fc8) if fc8 is not None and fc8.ndim == 2 else 1000
    with torch.device("meta"):
        try:
            whole = VGG(net, num_classes, width, crop, pool)
        except VggfeatError as error:
            raise VggfeatError(f"{spec} can't be a net: {error}") from error
    expected = whole.state_dict()
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise VggfeatError(f"{spec} doesn't fit net {net}: it has {unknown[0]}, which the net doesn't")
    _refuse_unfit(tensors, expected, f"{spec} doesn't fit net {net} (width {width:g}, crop {crop})")
    reach = None
    start = 0
    for layer in whole.layers:
        if layer in FC_LAYERS:
            prefixes = [f"classifier.{3 * FC_LAYERS.index(layer)}."]
        else:
            prefixes = [f"features.{i}." for i in range(start, whole.ends[layer])]
            start = whole.ends[layer]
        keys = [k for k in expected if k.startswith(tuple(prefixes))]
        # Also ends here: torchvision's IMAGENET1K_FEATURES fills the FC layers with NaN.
        if any(k not in tensors or not _finite(tensors[k]) for k in keys):
            break
        reach = layer
    if reach is None:
        raise VggfeatError(f"{spec} has no usable weights of net {net}: conv1_1 is missing or not finite")
    with torch.device("meta"):
        module = VGG(net, num_classes, width, crop, pool, until=reach)
    own = {**(metadata or {}), **_vgg_metadata(module, preprocessing), "source": spec}
    if metadata and metadata.get("source"):
        own["source"] = metadata["source"]
    sha256 = fingerprint(tensors)
    # copied, as a file that is only mapped may change, or shrink under the process; one by one, as they may be large
    kept = {k: tensors.pop(k).to(torch.float32, copy=True).contiguous() for k in module.state_dict()}
    module.load_state_dict(kept, assign=True)
    names = classes if classes and len(classes) == num_classes else None
    return Network(spec, module, preprocessing, sha256, own, names)


def _refuse_unfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise VggfeatError where a tensor that is expected has another shape or kind of number; no value is read."""
    for key, wanted in expected.items():
        if key not in tensors:
            continue
        tensor = tensors[key]
        if tensor.shape != wanted.shape:
            raise VggfeatError(
                f"{what}: {key} has shape {tuple(tensor.shape)}, the net's is {tuple(wanted.shape)}"
            )
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.dtype not in (FLOATS if wanted.is_floating_point() else (wanted.dtype,)):
            kind = str(tensor.dtype).removeprefix("torch.") if dense else "not dense"
            raise VggfeatError(f"{what}: {key} is {kind}, not {str(wanted.dtype).removeprefix('torch.')}")


def _finite(tensor: Tensor) -> bool:
    """Whether all values are; without a mask of them, which may be large."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


# --- sources -----------------------------------------------------------------------------------------------


def _oxford(net: str, file: Path | None) -> Network:
    if net not in OXFORD:
        raise VggfeatError(f"no weights were released for net {net!r}; there are oxford:D and oxford:E")
    if file is None:
        tensors = _download(OXFORD[net], f"oxford:{net}@FILE")
    else:
        tensors, _ = _read(file)
    renamed = {}
    for key, value in tensors.items():
        head, _, kind = key.rpartition(".")
        renamed[f"{OXFORD_FC.get(head, head)}.{kind}"] = value
    spec = f"oxford:{net}" + (f"@{file}" if file else "")
    metadata = {"train_scale": "256-512", "source": OXFORD[net]}
    return _vgg_network(spec, net, renamed, CAFFE, "ceil", classes=_imagenet_categories(), metadata=metadata)


def _mini(net: str, file: Path | None) -> Network:
    if net not in MINI or file is not None:
        raise VggfeatError(
            f"there are no mini weights {net!r}: give {' or '.join(f'mini:{n}' for n in MINI)}"
        )
    network = _load_file(MINI[net])
    network.spec = f"mini:{net}"  # wherever the package lies
    return network


def _imagenet_categories() -> list[str]:
    """Names of the 1,000 ILSVRC classes in synset order, which is the released nets' (Caffe's) too."""
    from torchvision.models import VGG16_Weights

    return list(VGG16_Weights.IMAGENET1K_V1.meta["categories"])


def _download(url: str, by_hand: str) -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise VggfeatError(f"could not get {url}: {error}; fetch it by hand and give {by_hand}") from error


def _torchvision(what: str, file: Path | None) -> Network:
    from torchvision.models import get_model_weights

    architecture, _, entry = what.partition(".")
    if architecture not in TORCHVISION_NETS:
        raise VggfeatError(
            f"torchvision:{architecture} is not a net of Table 1; there are {', '.join(TORCHVISION_NETS)} "
            f"(for other models: timm:NAME)"
        )
    enum = get_model_weights(architecture)
    entries = list(enum.__members__)
    if entry and entry not in entries:
        raise VggfeatError(
            f"torchvision:{architecture} has no weights {entry!r}; there are {', '.join(entries)}"
        )
    weights = enum[entry] if entry else enum["IMAGENET1K_V1"]
    spec = f"torchvision:{what}" + (f"@{file}" if file else "")
    if file is None:
        try:
            tensors = dict(weights.get_state_dict(progress=True, check_hash=True))
        except (URLError, OSError, RuntimeError) as error:
            raise VggfeatError(
                f"could not get {weights.url}: {error}; fetch it by hand and give {spec}@FILE"
            ) from error
    else:
        tensors, _ = _read(file)
    # the enum's own transform: the preprocessing comes with the weights
    transform = weights.transforms()
    preprocessing = Preprocessing(
        mean=tuple(transform.mean), std=tuple(transform.std), channel_order="RGB", input_range=1.0
    )
    return _vgg_network(
        spec,
        TORCHVISION_NETS[architecture],
        tensors,
        preprocessing,
        # the released convolutions, trained in Caffe; torchvision's own training rounded down
        "ceil" if entry == "IMAGENET1K_FEATURES" else "floor",
        classes=list(weights.meta["categories"]) if weights.meta.get("categories") else None,
        metadata={"source": weights.url},
    )


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
            raise VggfeatError(
                f"random:{what} has a setting {setting!r}; write random:NET,width=0.25,crop=64,seed=0,classes=10"
            ) from error
    if file is not None:
        raise VggfeatError("random: weights come from a seed, not from a file")
    with torch.device("meta"):
        module = VGG(net, int(values["classes"]), values["width"], int(values["crop"]))  # nothing too large
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
    return _vgg_network(
        f"random:{what}",
        net,
        tensors,
        preprocessing,
        "floor",
        values["width"],
        int(values["crop"]),
        int(values["classes"]),
    )


class TimmBackbone(nn.Module):
    """A timm model's dense features as one layer named "features": (N, D, h, w), tokens as (N, D, L, 1)."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.name, self.model = name, model
        self.layers = ["features"]
        self.channels = {"features": int(model.num_features)}  # type: ignore[arg-type]
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        _, height, width = config["input_size"]
        if not config.get("fixed_input_size"):
            # Asked, not believed: not every model that is bound to one size says so.
            try:
                with torch.inference_mode():
                    self(torch.zeros(1, 3, height + 32, width + 64), "features")
                return
            except (AssertionError, RuntimeError, ValueError):
                pass
        raise VggfeatError(
            f"timm:{name} takes only {height}x{width} images, so it can't be applied densely; "
            f"choose a backbone without a fixed input size, e.g. timm:resnet50"
        )

    def min_side(self, layer: str) -> int:
        return 32

    def forward(self, x_NCHW: Tensor, layer: str = "features") -> Tensor:
        x = self.model.forward_features(x_NCHW)  # type: ignore[operator]
        channels = self.channels["features"]
        if x.ndim == 3:  # tokens; class and register tokens have no position
            return x[:, getattr(self.model, "num_prefix_tokens", 0) :].transpose(1, 2).unsqueeze(-1)
        if x.shape[1] != channels and x.shape[-1] == channels:
            x = x.permute(0, 3, 1, 2)
        return x


def _timm(what: str, file: Path | None) -> Network:
    import timm

    if not timm.is_model(what.partition(".")[0]):  # its own names only: no other repository, no folder
        raise VggfeatError(
            f"timm has no model {shown(what)}; `python -c 'import timm; print(timm.list_models())'`"
        )
    spec = f"timm:{what}" + (f"@{file}" if file else "")
    with _timm_says(spec), torch.device("meta"):  # shapes only
        wanted = timm.create_model(what, pretrained=False, num_classes=0).state_dict()
    count = sum(tensor.numel() for tensor in wanted.values())
    if count > MOST_PARAMETERS:
        raise VggfeatError(
            f"{spec} has {count / 1e6:,.0f} million parameters; at most {MOST_PARAMETERS // 10**6} million are loaded"
        )
    tensors: dict[str, Tensor] = {}
    if file is not None:
        tensors, _ = _read(file)
        missing = sorted(wanted.keys() - tensors.keys())
        if missing:
            raise VggfeatError(f"{file} doesn't fit timm:{what}: {missing[0]} is missing")
        _refuse_unfit(tensors, wanted, f"{file} doesn't fit timm:{what}")
    with _timm_says(spec):
        model = timm.create_model(what, pretrained=file is None, num_classes=0).eval()
    if file is not None:
        model.load_state_dict({k: tensors[k] for k in wanted})
    for key, tensor in model.state_dict().items():
        if not _finite(tensor):
            raise VggfeatError(f"{spec} has values of {key} that are not finite")
    config: Any = model.pretrained_cfg
    preprocessing = Preprocessing(
        mean=tuple(config["mean"]), std=tuple(config["std"]), channel_order="RGB", input_range=1.0
    )
    metadata = {"net": what, **preprocessing.to_metadata(), "source": spec}
    return Network(spec, TimmBackbone(what, model), preprocessing, fingerprint(model.state_dict()), metadata)


@contextmanager
def _timm_says(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub clients raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VggfeatError(
            f"could not get {spec}: {reason}; fetch it by hand and give {spec}@FILE"
        ) from error


_LOADERS = {"mini": _mini, "oxford": _oxford, "torchvision": _torchvision, "random": _random, "timm": _timm}
