"""Where weights come from: a name, a file or a net of Table 1 -> a ready network.

`SOURCES` is the table of them. What a file says of itself, by its metadata or by the names in it,
is believed: a source that says otherwise (`torchvision:vgg16@FILE`) is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from vggfeat.backbones import load_timm, timm_told
from vggfeat.checked import shown
from vggfeat.devices import resolve_device, resolve_precision
from vggfeat.errors import VggfeatError, WrongUsage, as_typed, reason
from vggfeat.hub import fetched, on_hub
from vggfeat.images import CAFFE, CAFFE_MEAN_BGR, Preprocessing
from vggfeat.table1 import NETS, TABLE_1, layer_names
from vggfeat.tensors import ENDINGS, metadata_of
from vggfeat.vgg import VGG
from vggfeat.weights import (
    MINI_WORKS,
    OWN_POOLING,
    TORCHVISION_NETS,
    WHOLE,
    Convention,
    Network,
    Told,
    agreed,
    as_vgg,
    describing,
    read_net,
    refuse_other_names,
    refuse_small,
    torchvisions_name,
    vgg_metadata,
    vgg_network,
)

# Conversions of the authors' Caffe files; the digits in a name are the first of its sha256.
OXFORD = {
    "D": "https://web.eecs.umich.edu/~justincj/models/vgg16-00b39a1b.pth",
    "E": "https://web.eecs.umich.edu/~justincj/models/vgg19-d01eb7cb.pth",
}
OXFORD_POOL = "ceil"
CONVOLUTIONS = "IMAGENET1K_FEATURES"
"""torchvision's name of those of the authors' net D, without usable FC layers."""
# sha1 of the authors' own files, VGG_ILSVRC_16_layers.caffemodel and that of 19 layers, as Caffe's
# model zoo has them
CAFFEMODELS = {
    "D": "9363e1f6d65f7dba68c4f27a1e62105cdf6c4e24",
    "E": "239785e7862442717d831f682bb824055e51e9ba",
}
MINI = {net: Path(__file__).parent / "assets" / f"mini-{net}.safetensors" for net in ("A", "D")}


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
        weights = os.fspath(weights)
        refuse_contradictions(name, weights)
        spec = _in_full(weights, name)
        network = load(spec, device=device, precision=precision)
        if name != network.name:
            with as_typed(of_words(spec)):
                raise VggfeatError(_holds(weights, network.name, name))
        return network
    name = _in_full(name)
    if name in NETS:
        raise WrongUsage(
            f"no weights were released for net {name} (but for D and E): give a file as `weights`"
        )
    if "\0" in name:
        raise VggfeatError(f"weights {name!r} can't be: no name has a zero byte")
    source, _, rest = name.partition(":")
    what, at, file = rest.partition("@")
    place = name if on_hub(name) else file if source in SOURCES and on_hub(file) else ""
    if place:
        return _of_hub(name.removesuffix(place), place, device, precision)
    if at and not file and source in SOURCES:  # a variable that isn't set, no wish for a download
        raise WrongUsage(f"weights {shown(name)} have no file behind the @")
    is_file = Path(name).suffix in ENDINGS or os.path.lexists(name) or os.sep in name
    if what and source in SOURCES:
        local = Path(os.path.realpath(file)) if file else None
        network = SOURCES[source].load(source, what, local)
    elif is_file and not (rest and source in SOURCES):
        network = _load_file(Path(name))
    elif source in SOURCES:
        raise WrongUsage(
            f"weights {shown(name)} don't say which of {source}'s are meant: give"
            f" {' or '.join(form for form, _ in SOURCES[source].forms)}"
        )
    else:
        examples = ", ".join(source.example for source in SOURCES.values())
        raise WrongUsage(
            f"weights {shown(name)} are not known: there is no such file, and no such source; give"
            f" a file, or one of {examples} (see `vggfeat weights`)"
        )
    network.module.eval().requires_grad_(False)
    return network.to(device, precision)


def _of_hub(named: str, place: str, device: torch.device, precision: str) -> Network:
    """named: what stands before the file's place on the hub, as "timm:NAME@", or ""."""
    found = fetched(place, "weights")
    with found.called():
        network = load(f"{named}{found.path}", device=device, precision=precision)
    network.spec = found.told(network.spec)
    network.metadata = {key: found.told(value) for key, value in network.metadata.items()}
    return network


def _load_file(path: Path) -> Network:
    tensors, metadata = read_net(path)
    # kept in feature files and models, which are used from other folders
    place = os.path.realpath(path)
    if "net" in metadata and "mean" in metadata:
        return vgg_network(place, tensors, metadata)
    if "classifier.1.weight" in tensors and "mean" not in metadata:
        network = _oxford("oxford", _net_by_convolutions(tensors, path), Path(place))
        network.spec = place  # by its names alone it is nobody's
        return network
    sources = [f"timm:NAME@{path}"]
    if any(key.startswith(("features.", "conv")) for key in tensors):
        sources = [f"torchvision:{torchvisions_name(tensors)}@{path}"]
        if "classifier.0.weight" not in tensors:
            sources += [
                f"oxford:{net}@{path}"
                for net in OXFORD
                if TORCHVISION_NETS[torchvisions_name(tensors)] == net
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


def _of_source(
    source: str,
    file: Path | None,
    url: str,
    release: Mapping[str, str],
    convention: Convention,
    caffemodel: str = "",
) -> Network:
    """The net of a release: downloaded, or from a file that doesn't contradict what the release is.

    Of another file than the released one, byte for byte, nothing is known of who trained it, and at
    which S. convention: of the release's names. caffemodel: sha1 of another file of the same
    release.
    """
    path = _downloaded(url, source) if file is None else file
    tensors, metadata = read_net(path)
    names_tell = any(key.startswith(("classifier.", "fc")) for key in tensors)
    if file is None:
        if not _checksum(path, "sha256").startswith(_digits(url)):
            raise VggfeatError(
                f"{path} is not the released file: its sha256 doesn't begin with {_digits(url)};"
                f" move it away, and the released one is fetched, or give {source}@FILE"
            )
        return vgg_network(source, tensors, release)
    if "mean" not in metadata:
        refuse_other_names(file, tensors, convention)
        if convention == "torchvision":
            _refuse_other_features(source, file, tensors)
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
    return vgg_network(f"{source}@{file}", tensors, facts)


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


def _oxford(source: str, net: str, file: Path | None) -> Network:
    if net not in OXFORD:
        there = " and ".join(f"{source}:{each}" for each in OXFORD)
        raise WrongUsage(f"no weights were released for net {net!r}; there are {there}")
    release = {
        "net": net,
        **CAFFE.to_metadata(),
        **WHOLE,
        "pool": OXFORD_POOL,
        "classes": json.dumps(_imagenet_categories()),
        "train_scale": "256-512",
        "source": OXFORD[net],
    }
    spec = f"{source}:{net}"
    return _of_source(spec, file, OXFORD[net], release, "authors", CAFFEMODELS[net])


def _oxford_told(net: str) -> Told | None:
    with torch.device("meta"):
        return Told(net, VGG(net, pool=OXFORD_POOL)) if net in OXFORD else None


def _mini(source: str, net: str, file: Path | None) -> Network:
    if file is not None:
        raise WrongUsage(
            f"the {source} weights come with the package: give {source}:{net}, or the file alone,"
            f" {file}"
        )
    if net not in MINI:
        there = " or ".join(f"{source}:{each}" for each in MINI)
        raise WrongUsage(f"there are no {source} weights {net!r}: give {there}")
    network = _load_file(MINI[net])
    network.spec = f"{source}:{net}"  # wherever the package lies
    return network


def _mini_told(net: str) -> Told | None:
    if net not in MINI:
        return None
    facts = metadata_of(MINI[net])
    with torch.device("meta"):
        classes, width, crop = int(facts["num_classes"]), float(facts["width"]), int(facts["crop"])
        return Told(net, VGG(net, classes, width, crop, facts["pool"]))


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


def _torchvision(source: str, what: str, file: Path | None) -> Network:
    from torchvision.models import get_model_weights

    architecture, _, entry = what.partition(".")
    if architecture not in TORCHVISION_NETS:
        raise WrongUsage(
            f"{source}:{shown(architecture)[1:-1]} is not a net of Table 1; there are "
            f"{', '.join(TORCHVISION_NETS)} (for other models: timm:NAME)"
        )
    enum = get_model_weights(architecture)
    entries = list(enum.__members__)
    if entry and entry not in entries:
        raise WrongUsage(
            f"{source}:{architecture} has no weights {entry!r}; there are {', '.join(entries)}"
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
        "pool": _torchvision_pool(entry),
        "classes": json.dumps(list(weights.meta.get("categories") or [])),
        "source": weights.url,
    }
    return _of_source(f"{source}:{what}", file, weights.url, release, "torchvision")


def _torchvision_pool(entry: str) -> str:
    # the released convolutions, trained in Caffe; torchvision's own training rounded down
    return OXFORD_POOL if entry == CONVOLUTIONS else "floor"


def _torchvision_told(what: str) -> Told | None:
    architecture, _, entry = what.partition(".")
    if architecture not in TORCHVISION_NETS:
        return None
    net, until = TORCHVISION_NETS[architecture], "pool5" if entry == CONVOLUTIONS else "fc8"
    with torch.device("meta"):
        return Told(net, VGG(net, pool=_torchvision_pool(entry), until=until))


def _refuse_other_features(source: str, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise VggfeatError where FC layers of NaN, or others, tell that a file is not of the release
    that was asked for: one of net D's has no FC layers, and its file NaN for them.
    """
    name, _, what = source.partition(":")
    features = f"{name}:vgg16.{CONVOLUTIONS}"
    fc6 = tensors.get("classifier.0.weight")
    if (
        what.partition(".")[0] == "vgg16"
        and fc6 is not None
        and fc6.numel()
        and fc6.is_floating_point()
    ):
        empty = bool(torch.isnan(fc6[0]).all())
        if empty != (source == features):
            told = "has NaN for its FC layers, as" if empty else "has FC layers, unlike"
            other = features if empty else f"{name}:vgg16"
            raise VggfeatError(f"{file} {told} {features}: give {other}@{file}")


def _random(source: str, what: str, file: Path | None) -> Network:
    """An untrained net: He's normal initialisation (fan-in), zero biases, from an explicit seed."""
    if file is not None:
        raise WrongUsage(f"{source}: weights come from a seed, not from a file")
    module, seed = _random_net(source, what)
    generator = torch.Generator().manual_seed(seed)
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
    return vgg_network(f"{source}:{what}", tensors, vgg_metadata(module, preprocessing))


def _random_told(what: str) -> Told | None:
    with suppress(WrongUsage):  # which loading says with the source's name
        module, _ = _random_net("", what)
        return Told(module.net, module)
    return None


def _random_net(source: str, what: str) -> tuple[VGG, int]:
    """The net that is meant, its weights on no device; and the seed. Raises WrongUsage."""
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
                f"{source}:{what} has a setting {setting!r}; write"
                f" {source}:NET,width=0.25,crop=64,seed=0,classes=10"
            ) from error
    with as_typed(), torch.device("meta"):  # nothing too large
        module = VGG(net, int(values["classes"]), values["width"], int(values["crop"]))
    return module, int(values["seed"])


@dataclass(frozen=True)
class Source:
    """Weights that have a name, as "oxford:D". name: what is before the colon. load: the name, what
    is after the colon, and the file after an @ or None -> a network. example: for who asked for
    something else. forms: all that can be written, each with what it is.

    told: what is after the colon -> what that tells, before anything is downloaded; None where only
    loading tells, or refuses. file_has_but_values: whether a file after an @ has the values alone
    of what the words tell; another may end early. short: a spec without a colon -> what is after
    the colon in the one that it stands for.
    """

    name: str
    load: Callable[[str, str, Path | None], Network]
    example: str
    forms: tuple[tuple[str, str], ...]
    told: Callable[[str], Told | None] | None = None
    file_has_but_values: bool = False
    short: Mapping[str, str] = field(default_factory=dict)


SOURCES = {
    source.name: source
    for source in (
        Source(
            "mini",
            _mini,
            "mini",
            (
                (
                    "mini, mini:A",
                    "small nets D and A that come with the package, 5 MB each: for trying things",
                ),
            ),
            told=_mini_told,
            short={"mini": "D"},
        ),
        Source(
            "oxford",
            _oxford,
            "oxford:D",
            (
                (
                    "oxford:D",
                    "the authors' released net D (default); BGR 0-255 minus the mean, ceil pooling",
                ),
                ("oxford:E", "the authors' released net E"),
                (
                    "oxford:D@FILE",
                    "the same from a local file: their conversion, or the authors' .caffemodel",
                ),
            ),
            told=_oxford_told,
            short={net: net for net in OXFORD},
        ),
        Source(
            "torchvision",
            _torchvision,
            "torchvision:vgg16",
            (
                (
                    "torchvision:vgg16",
                    "torchvision's own VGG (vgg11, vgg13, vgg16, vgg19); also @FILE",
                ),
                (
                    "torchvision:vgg16.IMAGENET1K_FEATURES",
                    "the released convolutions without FC layers; also @FILE",
                ),
            ),
            told=_torchvision_told,
        ),
        Source(
            "timm",
            load_timm,
            "timm:NAME",
            (("timm:NAME", "any timm backbone that takes images of any size; also @FILE"),),
            told=timm_told,
            file_has_but_values=True,
        ),
        Source(
            "random",
            _random,
            "random:A",
            (
                (
                    "random:NET,width=W,crop=C,seed=S,classes=K",
                    "an untrained net: the floor of a comparison",
                ),
            ),
            told=_random_told,
        ),
    )
}
FILES = (
    ("FILE.safetensors", "a weights file with its metadata (net, mean, channel order, ...)"),
    ("FILE.pth", "PyTorch's file of a conversion of the authors' net, known by its names"),
    ("FILE.caffemodel", "Caffe's file of a net of Table 1, as the authors released theirs"),
    ("hf:OWNER/NAME", "a file on the Hugging Face hub; also /FILE, @REVISION, and for FILE above"),
)


def of_words(spec: str) -> bool:
    """Whether a spec's words alone decide which net it is, and how far its weights reach."""
    source, _, file = _parted(spec)
    return source is not None and (not file or source.file_has_but_values)


def refuse_contradictions(
    net: str,
    weights: str,
    layers: Sequence[str] = (),
    scales: Sequence[int] | None = None,
    max_pool: str | None = None,
) -> None:
    """Raise WrongUsage where, by their words alone, weights can't hold a net, have these layers, be
    applied at the scales Q, or have their max-pooling set.

    net: "" where it isn't asked for. weights: a spec.
    """
    source, what, _ = _parted(weights, net)
    if source is None:  # a file, of a net of Table 1
        if net and net not in NETS:
            raise WrongUsage(f"there is no net {shown(net)}; Table 1 has {', '.join(NETS)}")
        nets = [net] if net else NETS
        _refuse_layers(
            weights, layers, dict.fromkeys(name for each in nets for name in layer_names(each))
        )
        return
    told = source.told(what) if source.told else None
    if told is None:
        return
    if net and net != told.net:
        raise WrongUsage(_holds(weights, told.net, net))
    _refuse_layers(weights, layers, told.outline.layers)
    with as_typed():
        if max_pool is not None:
            as_vgg(told.outline, weights, OWN_POOLING).set_pool(max_pool)
        if not layers and of_words(weights):
            layers = (describing(told.outline.layers),)
        for layer in layers if scales else ():
            refuse_small(scales or (), told.net, told.outline, layer)


def _refuse_layers(weights: str, layers: Sequence[str], there: Iterable[str]) -> None:
    for layer in layers:
        if layer not in there:
            raise WrongUsage(
                f"weights {weights} have no layer {layer!r}: give `layer` one of {', '.join(there)}"
            )


def _holds(weights: str, net: str, asked: str) -> str:
    return f"weights {weights} hold net {net}, not {asked}: give that net, or the weights alone"


def _in_full(spec: str, net: str = "") -> str:
    """A spec, spelt out where it is one of the short ones. net: that is asked for, or ""."""
    for source in SOURCES.values():
        if spec in source.short:
            own = spec == source.name and net  # which one of that source's is meant
            return f"{source.name}:{own or source.short[spec]}"
    return spec


def _parted(spec: str, net: str = "") -> tuple[Source | None, str, str]:
    """The source that a spec names, what stands behind the colon, and behind an @; None for a file.
    net: as of `_in_full`.
    """
    name, _, rest = _in_full(spec, net).partition(":")
    what, _, file = rest.partition("@")
    return SOURCES.get(name) if what else None, what, file


def forms() -> list[tuple[str, str]]:
    """All that `load` takes, each with what it is."""
    return [*(form for source in SOURCES.values() for form in source.forms), *FILES]
