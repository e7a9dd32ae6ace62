"""timm's models as networks: convolutional nets and transformers, over images of any size, with the
preprocessing of timm's configuration. timm's VGGs are nets of Table 1 (`vgg`).

N images, H, W height and width, D channels of a layer's map, h, w its positions.

A convolutional net has one layer, `features`: its last map. A transformer's are made of the tokens
after the last block:

- `patches`, the default: the patch tokens (N, D, h, w);
- `cls`, where it has a class token: that one (N, D, 1, 1);
- `cls+patches`: (N, 2 D, h, w), the class token at each position before the patch token;
- `block0`, `block1`, ...: the patch tokens after that block, where all blocks have one grid (not
  Swin), as timm's `forward_intermediates(..., norm=True)`: with the model's final norm.

The final norm is where the model has it: of each token, so that the map has it, or of the mean (its
head pools, then norms: ConvNeXt, transformers with `fc_norm`), so that `pooled` has it, for each of
these layers.

Positions are timm's: its models are made with `dynamic_img_size` (`strict_img_size=False`), which
interpolates positions to the grid of the image. Swin's windows and shifts stay those of its own
input size; what a window lacks is padded, as timm does it. An image whose sides aren't whole
patches is cropped to whole patches in the middle; of an odd margin, the smaller half is above and
left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vggfeat.checked import shown
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.images import FILTERS, Preprocessing, said
from vggfeat.table1 import MOST_PARAMETERS
from vggfeat.tensors import bare, read
from vggfeat.vgg import VGG
from vggfeat.weights import (
    MINI_WORKS,
    TIMM_FC,
    TORCHVISION_NETS,
    WHOLE,
    Network,
    Told,
    agreed,
    fingerprint,
    finite,
    refuse_other_names,
    refuse_unfit,
    vgg_network,
)

FEATURES, PATCHES, CLS, BOTH, BLOCK = "features", "patches", "cls", "cls+patches", "block"
SIZEABLE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How timm is asked for a model that takes images of any size; the first that it knows."""
UNITS = (1, 2, 4, 8, 14, 16, 32)
"""Pixels that sides are multiples of where a model doesn't tell its patch: the first that do."""
STRIDE = 32
"""Of nearly all convolutional nets: images of that side have a position."""


@dataclass(frozen=True)
class Outlined:
    """What of a timm model needs no weights, a `weights.Outline`.

    channels: layer -> length of its descriptor. patch: height and width that an image's sides are
    cropped to whole multiples of. tokens_last: whether channels are the last axis of what the
    model gives, (N, L, D) or (N, h, w, D), rather than (N, D, h, w). smallest: side of an image,
    in pixels.
    """

    channels: dict[str, int]
    patch: tuple[int, int]
    tokens_last: bool
    smallest: int

    @property
    def layers(self) -> list[str]:
        return list(self.channels)

    def min_side(self, layer: str) -> int:
        return self.smallest


class TimmBackbone(nn.Module):
    """A timm model as a `weights.Backbone`, see above. outline: of the same model."""

    def __init__(self, model: nn.Module, outline: Outlined) -> None:
        super().__init__()
        self.model, self.outline = model, outline
        self.channels, self.layers = outline.channels, outline.layers
        self.norm = _norm_of_mean(model, outline.channels[self.layers[-1]])

    def min_side(self, layer: str) -> int:
        """Of every layer: the patch's side, or what the convolutions need."""
        return self.outline.smallest

    def forward(self, x_NCHW: Tensor, layer: str) -> Tensor:
        """A layer's map (N, D, h, w) of preprocessed images, cropped to whole patches."""
        ((_, map_NDHW),) = self.maps(x_NCHW, (layer,))
        return map_NDHW

    def maps(self, x_NCHW: Tensor, layers: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(layer, map) of several layers, in one pass: blocks first."""
        model: Any = self.model
        x_NCHW = _whole_patches(x_NCHW, self.outline.patch)
        blocks = sorted(int(name.removeprefix(BLOCK)) for name in layers if name.startswith(BLOCK))
        last = [name for name in layers if not name.startswith(BLOCK)]
        if blocks:
            how = {"norm": True, "stop_early": not last, "intermediates_only": not last}
            made = model.forward_intermediates(x_NCHW, indices=blocks, **how)
            x, of_blocks = made if last else (None, made)
            for number, block_NDHW in zip(blocks, of_blocks, strict=True):
                yield f"{BLOCK}{number}", _tensor(block_NDHW)
        else:
            x = model.forward_features(x_NCHW)
        for layer in last:
            yield layer, self._map(_tensor(x), x_NCHW.shape[2:], layer)

    def _map(self, x: Tensor, sides: Sequence[int], layer: str) -> Tensor:
        """(N, D, h, w) of what the model makes of images with such sides."""
        if not self.outline.tokens_last:
            return x
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2)
        cls_ND = x[:, 0, :, None, None]
        if layer == CLS:
            return cls_ND
        patches = x[:, _prefix_tokens(self.model) :].transpose(1, 2)
        grid = [side // unit for side, unit in zip(sides, self.outline.patch, strict=True)]
        if layer == FEATURES:  # tokens of a model that doesn't tell their grid
            grid = [patches.shape[2], 1]
        map_NDHW: Tensor = patches.unflatten(2, grid)
        if layer == BOTH:
            return torch.cat([cls_ND.expand_as(map_NDHW), map_NDHW], dim=1)
        return map_NDHW

    def pooled(self, map_NDHW: Tensor, layer: str) -> Tensor:
        """Descriptors (N, D) float32: the mean over positions, with the norm that the model's head
        applies to it, if it does. As timm's `forward_head(..., pre_logits=True)` where its head is
        just that.
        """
        mean_ND = map_NDHW.mean(dim=(2, 3), dtype=torch.float32)
        if self.norm is None:
            return mean_ND
        # in float32, like the mean, whatever the weights' type
        weights = {name: value.float() for name, value in self.norm.named_parameters()}
        weights |= {name: value.float() for name, value in self.norm.named_buffers()}
        parts = []
        for part_ND in mean_ND.chunk(2 if layer == BOTH else 1, dim=1):
            x = part_ND if self.outline.tokens_last else part_ND[:, :, None, None]
            parts.append(torch.func.functional_call(self.norm, weights, (x,)).flatten(1))
        return torch.cat(parts, dim=1)

    def linear_pooled(
        self, coef_KD: np.ndarray, mean_D: np.ndarray, layer: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """As of `weights.Backbone`. Raises VggfeatError for a norm that isn't of a known kind."""
        if self.norm is None:
            return coef_KD, np.zeros(len(coef_KD))
        halves = 2 if layer == BOTH else 1
        parts = [
            _before_norm(self.norm, part_KD, part_D)
            for part_KD, part_D in zip(
                np.split(coef_KD, halves, axis=1), np.split(mean_D, halves), strict=True
            )
        ]
        weights_KD = np.concatenate([weights for weights, _ in parts], axis=1)
        offsets_K = np.sum([offsets for _, offsets in parts], axis=0)
        device = next(self.norm.parameters()).device
        mean_1D11 = torch.from_numpy(mean_D)[None, :, None, None].float().to(device)
        said_D = self.pooled(mean_1D11, layer)[0].detach().cpu().numpy()
        apart_K = np.abs(weights_KD @ mean_D + offsets_K - coef_KD @ said_D)
        if (apart_K > 1e-4 * (np.abs(coef_KD) @ np.abs(said_D))).any():
            raise VggfeatError(
                f"what the model's {type(self.norm).__name__} does to a mean isn't known: choose"
                " another backbone"
            )
        return weights_KD, offsets_K

    def looks_at(
        self, layer: str, grid: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, None]:
        """As of `weights.Backbone`: an equal part of the whole patches each, all of them where the
        model doesn't tell its tokens' grid. What a position sees isn't told.
        """
        tokens = layer == FEATURES and self.outline.tokens_last and grid[1] == 1
        sides = []
        for count, side, unit in zip(grid, shape, self.outline.patch, strict=True):
            first, whole = side % unit // 2, side // unit * unit
            edges = (first + np.linspace(0, whole, count + 1)) / side
            window = (
                [edges[[0, -1]]] * count if tokens else [edges[i : i + 2] for i in range(count)]
            )
            sides.append(np.array(window))
        return sides[0], sides[1], None


def _before_norm(norm: Any, coef_KD: np.ndarray, x_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, D) weights on x, and (K,) offsets, of weights on norm(x): by BatchNorm's statistics,
    LayerNorm's or the root mean square.
    """

    def values(name: str) -> np.ndarray:
        tensor = getattr(norm, name, None)
        return np.zeros(1) if tensor is None else tensor.detach().double().cpu().numpy()

    scaled_KD = coef_KD * values("weight")
    offsets_K = (coef_KD * values("bias")).sum(axis=1)
    if hasattr(norm, "running_mean"):
        scaled_KD = scaled_KD / np.sqrt(values("running_var") + norm.eps)
        return scaled_KD, offsets_K - scaled_KD @ values("running_mean")
    if "rms" in type(norm).__name__.lower():
        return scaled_KD / np.sqrt((x_D**2).mean() + norm.eps), offsets_K
    scaled_KD = scaled_KD / np.sqrt(x_D.var() + norm.eps)
    return scaled_KD - scaled_KD.mean(axis=1, keepdims=True), offsets_K


def _whole_patches(x_NCHW: Tensor, patch: tuple[int, int]) -> Tensor:
    """The middle of images, as many whole patches as are in them."""
    (height, width), (h, w) = x_NCHW.shape[2:], patch
    top, left = height % h // 2, width % w // 2
    return x_NCHW[..., top : top + height // h * h, left : left + width // w * w]


def _tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        raise TypeError("there is no single map of features")
    return x


def _prefix_tokens(model: Any) -> int:
    """Class and register tokens, which have no position."""
    return int(getattr(model, "num_prefix_tokens", 0))


def _norm_of_mean(model: Any, D: int) -> nn.Module | None:
    """The norm that a model's head applies to the mean over positions, where it has one.

    D: values of that mean; a norm of another number stands behind a further layer of the head.
    """
    if getattr(model, "attn_pool", None) is not None:  # what comes behind it is no mean's
        return None
    head = getattr(model, "head", None)
    for norm in (getattr(model, "fc_norm", None), getattr(head, "norm", None)):
        weight = getattr(norm, "weight", None)
        if isinstance(norm, nn.Module) and weight is not None and len(weight) == D:
            return norm
    return None


# --- which model it is ----------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _made(what: str) -> tuple[dict[str, Any], nn.Module]:
    """How timm makes a model that takes images of any size, if it can; that model without weights,
    on PyTorch's meta device. Raises what timm raises.
    """
    import timm

    for settings in SIZEABLE:
        try:
            with torch.device("meta"):
                model = timm.create_model(what, pretrained=False, num_classes=0, **settings)
        except TypeError:  # it knows no such setting
            if not settings:
                raise
        else:
            return settings, model.eval()
    raise AssertionError


@lru_cache(maxsize=4)
def outlined(what: str) -> Outlined:
    """The layers and sides of a timm model, which is asked: not every model that is bound to one
    size says so. One that says so is believed: some of them (CrossViT) squash an image to their
    size without a word. Raises VggfeatError where it can't be applied to other images.
    """
    settings, module = _made(what)
    model: Any = module
    config = model.pretrained_cfg
    _, height, width = config["input_size"]
    try:
        if config.get("fixed_input_size") and not settings:
            raise ValueError("it says so")
        patch, sides, x = _at_another_size(model, height, width)
    except TypeError as error:
        raise VggfeatError(
            f"timm:{what} can't be applied densely: {error}; choose another backbone, e.g."
            " timm:resnet50"
        ) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise VggfeatError(
            f"timm:{what} takes only {height}x{width} images, so it can't be applied densely; "
            "choose a backbone without a fixed input size, e.g. timm:resnet50"
        ) from error
    tokens_last = x.ndim == 3 or (x.shape[1] != model.num_features == x.shape[3])
    D = x.shape[-1] if tokens_last else x.shape[1]
    names = _layers_of(model, x, [side // unit for side, unit in zip(sides, patch, strict=True)])
    channels = {name: 2 * D if name == BOTH else D for name in names}
    return Outlined(channels, patch, tokens_last, _smallest(model, patch, min(height, width)))


def _at_another_size(
    model: Any, height: int, width: int
) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """The patch that images are cropped to multiples of, the sides of an image that isn't the
    model's own, an odd number of patches each, and what it makes of it. Raises what the model does
    where it takes no other size.
    """
    embed: Any = getattr(model, "patch_embed", None)
    told = hasattr(embed, "feat_ratio")
    patches = [tuple(embed.feat_ratio(as_scalar=False))] if told else [(n, n) for n in UNITS]
    for h, w in patches:
        sides = h * (height // h // 2 * 2 + 3), w * (width // w // 2 * 2 + 5)
        try:
            return (h, w), sides, _features(model, *sides)
        except (AssertionError, RuntimeError, ValueError):
            if (h, w) == patches[-1]:
                raise
    raise AssertionError


def _layers_of(model: Any, x: Tensor, grid: list[int]) -> list[str]:
    """Of a model that made x of an image of so many patches."""
    if not hasattr(getattr(model, "patch_embed", None), "feat_ratio"):
        return [FEATURES]
    prefix = _prefix_tokens(model)
    if x.ndim == 3 and x.shape[1] - prefix != grid[0] * grid[1]:
        return [FEATURES]
    one_grid = x.ndim == 3 or list(x.shape[1:3]) == grid
    blocks = len(model.blocks) if one_grid and hasattr(model, "blocks") else 0
    has_class = x.ndim == 3 and prefix and getattr(model, "cls_token", None) is not None
    return [
        *(f"{BLOCK}{number}" for number in range(blocks)),
        *((CLS, BOTH) if has_class else ()),
        PATCHES,
    ]


def _features(model: Any, height: int, width: int) -> Tensor:
    """Of an image of that size, on PyTorch's meta device: the shape alone."""
    with torch.inference_mode():
        return _tensor(model.forward_features(torch.empty(1, 3, height, width, device="meta")))


def _smallest(model: Any, patch: tuple[int, int], known: int) -> int:
    """Side of the smallest image that a model takes: one patch; of convolutional nets STRIDE, which
    leaves nearly all of them a position, or what more they need. known: a side that it takes.
    """
    low, step = (max(patch), max(patch)) if max(patch) > 1 else (STRIDE, 1)
    # sides in steps, the first that it takes, between one that it doesn't and one that it does
    fails, works = -1, (known - low) // step
    middle = 0
    while works - fails > 1:
        side = low + middle * step
        try:
            taken = min(_features(model, side, side).shape[1:]) > 0
        except (AssertionError, RuntimeError, ValueError, IndexError):
            taken = False
        fails, works = (fails, middle) if taken else (middle, works)
        middle = (fails + works) // 2
    return low + works * step


def timm_told(what: str) -> Told | None:
    """What the name of a timm model tells; a file has but its values. None where loading refuses
    it.
    """
    net = TORCHVISION_NETS.get(what.partition(".")[0])
    if net:
        with torch.device("meta"):
            return Told(net, VGG(net, until="fc7"))
    with suppress(Exception):  # of timm's; loading says which
        _check(what)
        return Told(what, outlined(what))
    return None


def _check(what: str) -> None:
    """Raise WrongUsage unless it is a model of timm's own: no other repository, no folder;
    VggfeatError where it is too large.
    """
    import timm

    if not timm.is_model(what.partition(".")[0]):
        raise WrongUsage(
            f"timm has no model {shown(what)}; `python -c 'import timm; print(timm.list_models())'`"
        )
    with _timm_says(f"timm:{what}"):
        _, model = _made(what)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    if count > MOST_PARAMETERS:
        raise VggfeatError(
            f"timm:{what} has {count / 1e6:,.0f} million parameters; at most"
            f" {MOST_PARAMETERS // 10**6} million are loaded"
        )


# --- its weights ----------------------------------------------------------------------------------


def load_timm(source: str, what: str, file: Path | None) -> Network:
    """The backbone that timm calls so, its weights fetched or of a file. Raises VggfeatError.

    source: what stands before the colon, as in the table `sources.SOURCES`.
    """
    import timm

    _check(what)
    settings, shapes = _made(what)
    vgg = TORCHVISION_NETS.get(what.partition(".")[0])
    outline = None if vgg else outlined(what)
    asked = f"{source}:{what}"
    spec = asked + (f"@{file}" if file else "")
    config: Any = shapes.pretrained_cfg
    preprocessing = Preprocessing(
        mean=tuple(config["mean"]), std=tuple(config["std"]), channel_order="RGB", input_range=1.0
    )
    metadata = {
        "net": what,
        **preprocessing.to_metadata(),
        "filter": _filter(asked, config),
        "source": spec,
    }
    wanted = shapes.state_dict()
    own = {"train_scale": str(min(config["input_size"][1:]))}
    if file is None:
        with _timm_says(spec, config), _hub_in_reach():
            model = timm.create_model(what, pretrained=True, num_classes=0, **settings).eval()
        tensors = model.state_dict()
    else:
        tensors, told = _read_for_timm(asked, file, wanted)
        agreed(asked, file, _as_table_1(what, metadata, told), told, None)
        own |= {key: told[key] for key in ("train_scale", "unwrapped") if key in told}
        tensors = {key: tensors[key] for key in wanted}
    for key, tensor in tensors.items():
        if not finite(tensor):
            raise VggfeatError(f"{spec} has values of {key} that are not finite")
    if outline is None:
        facts = {**metadata, **WHOLE, "net": str(vgg), "pool": "floor", **own}
        return vgg_network(spec, dict(tensors), facts)
    if file is not None:
        with _timm_says(spec):
            model = timm.create_model(what, pretrained=False, num_classes=0, **settings).eval()
        model.load_state_dict(tensors)
    sha256 = fingerprint(model.state_dict())
    return Network(spec, TimmBackbone(model, outline), preprocessing, sha256, metadata | own)


def _filter(asked: str, config: Mapping[str, Any]) -> str:
    """How timm's configuration rescales, in the words of `images.FILTERS`."""
    kinds = {name.partition(",")[0]: name for name in FILTERS}
    kind = config.get("interpolation", "bicubic")
    if kind not in kinds:
        raise VggfeatError(
            f"{asked} rescales images by {shown(kind)}: only {' and '.join(kinds)} are known"
        )
    return kinds[kind]


def _read_for_timm(
    source: str, file: Path, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that fit a timm model, and what the file says of itself; torchvision's VGGs by timm's
    names.
    """
    tensors, metadata = read(file)
    vgg = "pre_logits.fc1.weight" in wanted
    first = next(iter(wanted), "")
    tensors, metadata = bare(
        tensors, metadata, [["features.0.weight"] if vgg else [first, *wanted]], file
    )
    if vgg and "mean" not in said(metadata):
        refuse_other_names(file, tensors, "torchvision")
    for theirs, ours in TIMM_FC.items():
        for key, name in ((f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")):
            if vgg and key in wanted and key not in tensors and name in tensors:
                value = tensors[name]
                fits = value.is_contiguous() and value.numel() == wanted[key].numel()
                tensors[key] = value.view(wanted[key].shape) if fits else value
    for key in wanted:  # a counter that files of before 2018 lack, and that no description needs
        if key.endswith(".num_batches_tracked"):
            tensors.setdefault(key, torch.tensor(0))
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise VggfeatError(f"{file} doesn't fit {source}: {missing[0]} is missing")
    refuse_unfit(tensors, wanted, f"{file} doesn't fit {source}")
    return tensors, said(metadata)


def _as_table_1(what: str, metadata: Mapping[str, str], told: Mapping[str, str]) -> dict[str, str]:
    """A timm model's metadata in the words of a file, which may call a VGG as Table 1 does and has
    its pooling.
    """
    architecture = what.partition(".")[0]
    own = TORCHVISION_NETS.get(architecture)
    net = told.get("net", "")
    same = net.partition(".")[0] == architecture or net == own
    return {**metadata, **({**WHOLE, "pool": "floor"} if own else {}), "net": net if same else what}


@contextmanager
def _timm_says(spec: str, config: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Failures of timm in one line. config: of a model that is fetched, which tells from where."""
    try:
        yield
    except Exception as error:  # hub clients raise their own kinds
        why = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0].rstrip(".")
        if config is None:
            raise VggfeatError(f"timm can't make {spec}: {why}") from error
        from huggingface_hub import hf_hub_url

        place = config.get("url") or "it"
        if config.get("hf_hub_id"):
            place = hf_hub_url(
                config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors"
            )
        raise VggfeatError(
            f"could not get {spec}: {why}; fetch {place} by hand and give {spec}@FILE; {MINI_WORKS}"
        ) from error


@contextmanager
def _hub_in_reach() -> Iterator[None]:
    """Where the hub can't be reached, what it has left in its cache is used, without its minute of
    further attempts.
    """
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # of whichever client it uses
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
