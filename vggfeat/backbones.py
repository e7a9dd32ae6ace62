"""timm's backbones as networks: their dense features, with the preprocessing of timm's
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggfeat.checked import shown
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.images import Preprocessing, said
from vggfeat.table1 import MOST_PARAMETERS
from vggfeat.tensors import bare, read
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
)


class _DenseFeatures:
    """A `weights.Outline` of whichever timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = ["features"]

    def min_side(self, layer: str) -> int:
        """Of the total stride of nearly all of timm's models."""
        return 32


def timm_told(what: str) -> Told:
    """What the name of a timm model tells; a file has but its values."""
    return Told(what, _DenseFeatures())


class TimmBackbone(_DenseFeatures, nn.Module):
    """A timm model as a `weights.Backbone` of one layer, "features": its dense features, (N, D, h,
    w), tokens as (N, D, L, 1).
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.name, self.model = name, model
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
            "choose a backbone without a fixed input size, e.g. timm:resnet50"
        )

    def forward(self, x_NCHW: Tensor, layer: str = "features") -> Tensor:
        """The features of preprocessed images."""
        x: Tensor = self.model.forward_features(x_NCHW)  # type: ignore[operator]
        channels = self.channels["features"]
        if x.ndim == 3:  # tokens; class and register tokens have no position
            first: int = getattr(self.model, "num_prefix_tokens", 0)
            return x[:, first:].transpose(1, 2).unsqueeze(-1)
        if x.shape[1] != channels and x.shape[-1] == channels:
            x = x.permute(0, 3, 1, 2)
        return x


def load_timm(source: str, what: str, file: Path | None) -> Network:
    """The backbone that timm calls so, its weights fetched or of a file. Raises VggfeatError.

    source: what stands before the colon, as in the table `sources.SOURCES`.
    """
    import timm

    # its own names only: no other repository, no folder
    if not timm.is_model(what.partition(".")[0]):
        raise WrongUsage(
            f"timm has no model {shown(what)}; `python -c 'import timm; print(timm.list_models())'`"
        )
    asked = f"{source}:{what}"
    spec = asked + (f"@{file}" if file else "")
    with _timm_says(spec), torch.device("meta"):  # shapes only
        shapes = timm.create_model(what, pretrained=False, num_classes=0)
    wanted = shapes.state_dict()
    count = sum(tensor.numel() for tensor in wanted.values())
    if count > MOST_PARAMETERS:
        raise VggfeatError(
            f"{spec} has {count / 1e6:,.0f} million parameters; at most {MOST_PARAMETERS // 10**6}"
            " million are loaded"
        )
    config: Any = shapes.pretrained_cfg
    preprocessing = Preprocessing(
        mean=tuple(config["mean"]), std=tuple(config["std"]), channel_order="RGB", input_range=1.0
    )
    metadata = {"net": what, **preprocessing.to_metadata(), "source": spec}
    if file is None:
        with _timm_says(spec, config), _hub_in_reach():
            model = timm.create_model(what, pretrained=True, num_classes=0).eval()
    else:
        tensors, told = _read_for_timm(asked, file, wanted)
        agreed(asked, file, _as_table_1(what, metadata, told), told, None)
        metadata |= {key: told[key] for key in ("train_scale", "unwrapped") if key in told}
        with _timm_says(spec):
            model = timm.create_model(what, pretrained=False, num_classes=0).eval()
        model.load_state_dict({k: tensors[k] for k in wanted})
    for key, tensor in model.state_dict().items():
        if not finite(tensor):
            raise VggfeatError(f"{spec} has values of {key} that are not finite")
    return Network(
        spec, TimmBackbone(what, model), preprocessing, fingerprint(model.state_dict()), metadata
    )


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
