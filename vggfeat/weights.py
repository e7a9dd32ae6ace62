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

No pickle is ever run: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vggfeat import __version__
from vggfeat.errors import VggfeatError
from vggfeat.files import whole
from vggfeat.images import CAFFE_MEAN_BGR, Preprocessing
from vggfeat.vgg import FC_LAYERS, NETS, TABLE_1, VGG

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
        """fc7, the paper's descriptor (Appendix B). Weights that stop before it have no default."""
        if not isinstance(self.module, VGG):
            return self.layers[-1]
        self.require("fc7")
        return "fc7"

    def require(self, layer: str) -> None:
        """Raise VggfeatError unless the weights reach `layer`."""
        if layer not in self.layers:
            raise VggfeatError(
                f"weights {self.spec} have no layer {layer!r}: they reach {self.layers[-1]}; "
                f"give --layer one of {', '.join(self.layers)}"
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

    def to(self, device: str | torch.device = "cpu", precision: str = "auto") -> Network:
        """Move to a device, in a precision (see `resolve_precision`); changes this object and returns it."""
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.module.to(device=self.device, dtype=DTYPES[self.precision], memory_format=torch.channels_last)
        return self


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
    if precision not in DTYPES:
        raise VggfeatError(f"precision {precision!r} is not one of auto, {', '.join(DTYPES)}")
    return precision


def resolve_device(device: str) -> torch.device:
    """ "auto" -> the first GPU, or the CPU; a GPU that isn't there raises VggfeatError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise VggfeatError(f"there is no device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise VggfeatError(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise VggfeatError(f"device {device!r} is not there: PyTorch sees {count} GPUs; give --device cpu")
    return resolved


def load(name: str, weights: str | os.PathLike[str] | None = None) -> Network:
    """A ready network, float32 on the CPU, in evaluation mode.

    name: a spec (see this module's table), or a net of Table 1 ("D", "E": the released weights).
    weights: a spec or path; `name` must then be the net that it holds.
    Raises VggfeatError: unknown name, missing or unfit file, wrong checksum, no network.
    """
    if weights is not None:
        network = load(f"mini:{name}" if weights == "mini" else os.fspath(weights))
        if name != network.name:
            raise VggfeatError(
                f"weights {weights} hold net {network.name}, not {name}; leave out --net or correct it"
            )
        return network
    if name in NETS:
        if name not in OXFORD:
            raise VggfeatError(
                f"no weights were released for net {name}; give --weights FILE (released: D, E)"
            )
        name = f"oxford:{name}"
    if name == "mini":
        name = "mini:D"
    source, _, rest = name.partition(":")
    if rest and source in _LOADERS:
        what, _, file = rest.partition("@")
        network = _LOADERS[source](what, Path(file).resolve() if file else None)
    elif Path(name).suffix in (".safetensors", ".pth", ".pt"):
        network = _load_file(Path(name))
    else:
        raise VggfeatError(
            f"weights {name!r} are not known: give a .safetensors or .pth file, or one of "
            f"mini, oxford:D, torchvision:vgg16, timm:NAME, random:A (see `vggfeat weights`)"
        )
    network.module.eval().requires_grad_(False)
    return network.to("cpu", "float32")


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
    with whole(Path(path)) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # safetensors makes files that only their owner can read


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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors or .pth file."""
    if not path.is_file():
        raise VggfeatError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever a broken file makes them raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VggfeatError(f"{path} can't be read as weights: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise VggfeatError(f"{path} holds no plain state dict (names to tensors)")
    return {str(k): v for k, v in tensors.items()}, {}


def _load_file(path: Path) -> Network:
    tensors, metadata = _read(path)
    if "classifier.1.weight" in tensors and "net" not in metadata:
        return _oxford(_net_by_convolutions(tensors, path), path.resolve())
    if "net" not in metadata or ("mean" not in metadata and "mean_bgr" not in metadata):
        raise VggfeatError(
            f"{path} doesn't say which preprocessing its weights need; name the source, "
            f"as in torchvision:vgg16@{path} or oxford:D@{path}"
        )
    try:
        preprocessing = Preprocessing.from_metadata(metadata)
        width, crop = float(metadata.get("width", "1")), int(metadata.get("crop", "224"))
        num_classes = int(metadata["num_classes"]) if "num_classes" in metadata else None
        classes = json.loads(metadata.get("classes") or "[]") or None
    except (ValueError, KeyError) as error:
        raise VggfeatError(f"{path} has unusable metadata: {error}") from error
    # Weights that subtract Caffe's BGR mean came through Caffe, whose pooling rounds up.
    pool = metadata.get("pool") or ("ceil" if "mean_bgr" in metadata else "floor")
    return _vgg_network(
        str(path.resolve()),  # kept in feature files and models, which are used from other folders
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
    """A Network from a state dict in torchvision's keys; it reaches as far as the weights do."""
    if num_classes is None:
        fc8 = tensors.get("classifier.6.weight")
        num_classes = 1000 if fc8 is None else fc8.shape[0]
    with torch.device("meta"):
        whole = VGG(net, num_classes, width, crop, pool)
    expected = whole.state_dict()
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise VggfeatError(f"{spec} doesn't fit net {net}: it has {unknown[0]}, which the net doesn't")
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
        if any(k not in tensors or not torch.isfinite(tensors[k]).all() for k in keys):
            break
        for k in keys:
            if tensors[k].shape != expected[k].shape:
                raise VggfeatError(
                    f"{spec} doesn't fit net {net} (width {width}, crop {crop}): {k} has shape "
                    f"{tuple(tensors[k].shape)}, the net's is {tuple(expected[k].shape)}"
                )
        reach = layer
    if reach is None:
        raise VggfeatError(f"{spec} has no usable weights of net {net}: conv1_1 is missing or not finite")
    with torch.device("meta"):
        module = VGG(net, num_classes, width, crop, pool, until=reach)
    kept = {k: tensors[k].to(torch.float32) for k in module.state_dict()}
    module.load_state_dict(kept, assign=True)
    own = {**(metadata or {}), **_vgg_metadata(module, preprocessing), "source": spec}
    if metadata and metadata.get("source"):
        own["source"] = metadata["source"]
    return Network(spec, module, preprocessing, fingerprint(tensors), own, classes)


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
        except ValueError as error:
            raise VggfeatError(
                f"random:{what} has a setting {setting!r}; write random:NET,width=0.25,crop=64,seed=0,classes=10"
            ) from error
    if file is not None:
        raise VggfeatError("random: weights come from a seed, not from a file")
    with torch.device("meta"):
        module = VGG(net, int(values["classes"]), values["width"], int(values["crop"]))
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

    if not timm.is_model(what.partition(".")[0]):
        raise VggfeatError(
            f"timm has no model {what!r}; `python -c 'import timm; print(timm.list_models())'`"
        )
    spec = f"timm:{what}" + (f"@{file}" if file else "")
    try:
        model = timm.create_model(what, pretrained=file is None, num_classes=0).eval()
    except Exception as error:  # hub clients raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VggfeatError(
            f"could not get {spec}: {reason}; fetch it by hand and give {spec}@FILE"
        ) from error
    if file is not None:
        tensors, _ = _read(file)
        wanted = model.state_dict()
        missing = sorted(wanted.keys() - tensors.keys())
        if missing:
            raise VggfeatError(f"{file} doesn't fit timm:{what}: {missing[0]} is missing")
        try:
            model.load_state_dict({k: tensors[k] for k in wanted})
        except RuntimeError as error:
            raise VggfeatError(
                f"{file} doesn't fit timm:{what}: {str(error).splitlines()[-1].strip()}"
            ) from error
    config: Any = model.pretrained_cfg
    preprocessing = Preprocessing(
        mean=tuple(config["mean"]), std=tuple(config["std"]), channel_order="RGB", input_range=1.0
    )
    metadata = {"net": what, **preprocessing.to_metadata(), "source": spec}
    return Network(spec, TimmBackbone(what, model), preprocessing, fingerprint(model.state_dict()), metadata)


_LOADERS = {"mini": _mini, "oxford": _oxford, "torchvision": _torchvision, "random": _random, "timm": _timm}
