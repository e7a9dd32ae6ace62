"""timm's models, held against timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

import vggfeat
from vggfeat import backbones
from vggfeat.describe import describe, description_of, network_of
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.images import BICUBIC, BILINEAR, smallest_side
from vggfeat.sources import SOURCES, refuse_contradictions
from vggfeat.store import differences
from vggfeat.weights import Network

from ..conftest import Command, assert_same_descriptors, photograph
from .conftest import zeros

TINY, DINO, SWIN = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "swin_tiny_patch4_window7_224",
)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Network, Any]]:
    """A network of a file of random weights of a timm model, and that model as timm makes it; no
    norm is the identity.
    """

    def made(name: str) -> tuple[Network, Any]:
        import timm

        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=False).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand_like(parameter))
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
        return vggfeat.load(f"timm:{name}@{path}", precision="float32"), model

    return made


def descriptor(network: Network, image_HWC: np.ndarray, layer: str) -> np.ndarray:
    return describe(network, torch.from_numpy(image_HWC[None]), layer, mirror=False).numpy()


def preprocessed(network: Network, image_HWC: np.ndarray) -> torch.Tensor:
    return network.preprocessing(torch.from_numpy(image_HWC[None]))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit2", "test_mambaout"])
def test_what_weighs_a_descriptor_weighs_the_mean_before_its_norm(
    saved: Callable[[str], tuple[Network, Any]], name: str
) -> None:
    """The value itself, and how it changes where the norm's deviation doesn't."""
    network, _ = saved(name)
    layer, rng = network.default_layer, np.random.default_rng(0)
    D = network.dim(layer)
    coef_KD, mean_D = rng.standard_normal((3, D)), rng.standard_normal(D) + 1
    weights_KD, offsets_K = network.module.linear_pooled(coef_KD, mean_D, layer)

    def pooled(x_D: np.ndarray) -> np.ndarray:
        map_1D11 = torch.from_numpy(x_D).float()[None, :, None, None]
        return network.module.pooled(map_1D11, layer)[0].detach().double().numpy()

    np.testing.assert_allclose(
        weights_KD @ mean_D + offsets_K, coef_KD @ pooled(mean_D), rtol=1e-4, atol=1e-3
    )
    # to first order neither the mean of squares nor the variance changes
    off = rng.standard_normal(D)
    plane = np.linalg.qr(np.stack([np.ones(D), mean_D]).T)[0]
    off -= plane @ (plane.T @ off)
    moved = (pooled(mean_D + 0.01 * off) - pooled(mean_D - 0.01 * off)) / 0.02
    np.testing.assert_allclose(weights_KD @ off, coef_KD @ moved, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit2", "test_mambaout"])
def test_a_descriptor_is_what_timms_head_classifies(
    saved: Callable[[str], tuple[Network, Any]], name: str
) -> None:
    """The mean over positions, normed where the head norms it: ConvNeXt's channels first, tokens',
    and channels last.
    """
    network, model = saved(name)
    layer = network.default_layer
    image = photograph(2, 96, 160)
    assert network.preprocessing.mean == pytest.approx(model.pretrained_cfg["mean"])
    with torch.inference_mode():
        if name == "test_vit2":
            model.set_input_size(img_size=(96, 160))
        features = model.forward_features(preprocessed(network, image))
        if name == "test_mambaout":  # its head goes on behind the norm
            expected = model.head.norm(features.mean((1, 2)))
        else:
            expected = model.forward_head(features, pre_logits=True)
    assert_same_descriptors(descriptor(network, image, layer), expected.numpy())
    assert network.dim(layer) == expected.shape[1]
    # the mirror image's descriptor is one of its own: two normed means are averaged
    both = describe(network, torch.from_numpy(image[None]), layer, mirror=True).numpy()
    theirs = descriptor(network, np.ascontiguousarray(image[:, ::-1]), layer)
    assert_same_descriptors(both, (expected.numpy() + theirs) / 2)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        (TINY, (224, 224)),
        (TINY, (96, 160)),
        (DINO, (70, 112)),
        (SWIN, (224, 224)),
        (SWIN, (92, 160)),
    ],
)
def test_transformers_are_timms_at_any_size(
    saved: Callable[[str], tuple[Network, Any]], name: str, sides: tuple[int, int]
) -> None:
    """Held against a model that timm has resized, and for Swin, whose windows would be shifted
    otherwise, made for any size.
    """
    import timm

    network, model = saved(name)
    image = photograph(3, *sides)
    with torch.inference_mode():
        if name == SWIN:
            any_size: Any = timm.create_model(name, strict_img_size=False).eval()
            any_size.load_state_dict(model.state_dict())
            map_NDHW = any_size.forward_features(preprocessed(network, image)).permute(0, 3, 1, 2)
        else:
            model.set_input_size(img_size=sides)
            tokens = model.forward_features(preprocessed(network, image))
            patch = model.patch_embed.patch_size[0]
            grid = [side // patch for side in sides]
            prefix = 5 if name == DINO else 1  # a class token, and four registers
            map_NDHW = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    ours = network.maps_of(torch.from_numpy(image[None]), "patches")
    assert ours.shape == map_NDHW.shape
    assert torch.allclose(ours, map_NDHW, rtol=0, atol=1e-4 * float(map_NDHW.abs().max()))
    expected = map_NDHW.mean((2, 3)).numpy()
    assert_same_descriptors(descriptor(network, image, "patches"), expected)
    if name == SWIN:
        assert network.layers == ["patches"] and network.dim("patches") == 768
        return
    cls = tokens[:, 0].numpy()
    assert_same_descriptors(descriptor(network, image, "cls"), cls)
    both = descriptor(network, image, "cls+patches")
    assert both.shape[1] == network.dim("cls+patches") == 2 * network.dim("cls")
    assert_same_descriptors(both[:, : cls.shape[1]], cls)
    assert_same_descriptors(both[:, cls.shape[1] :], expected)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_a_block_is_timms_intermediate(
    saved: Callable[[str], tuple[Network, Any]], name: str
) -> None:
    """The last one's is the default layer, where the norm is behind the mean, too."""
    network, model = saved(name)
    image = photograph(1, 160, 160)
    cls = ["cls", "cls+patches"] if name == "test_vit" else []  # the other has no class token
    n = len(model.blocks)
    assert network.layers == [*(f"block{i}" for i in range(n)), *cls, "patches"]
    with torch.inference_mode():
        theirs = model.forward_intermediates(
            preprocessed(network, image), norm=True, intermediates_only=True
        )
    for i in (0, 3):
        ours = network.maps_of(torch.from_numpy(image[None]), f"block{i}")
        assert torch.allclose(ours, theirs[i], atol=1e-5 * float(theirs[i].abs().max()))
    assert_same_descriptors(
        descriptor(network, image, f"block{n - 1}"), descriptor(network, image, "patches")
    )


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_vit", ("patches", "block3", "cls", "block0", "cls+patches")),
        ("test_vit2", ("block2", "block1")),
        ("test_mambaout", ("features",)),
    ],
)
def test_layers_of_one_pass_are_those_of_several(
    saved: Callable[[str], tuple[Network, Any]], name: str, layers: tuple[str, ...]
) -> None:
    network, _ = saved(name)
    image = photograph(1, 96, 160)
    together = describe(network, torch.from_numpy(image[None]), layers, mirror=False).numpy()
    alone = np.hstack([descriptor(network, image, layer) for layer in layers])
    assert together.tobytes() == alone.tobytes()


def test_images_are_cropped_to_whole_patches(
    saved: Callable[[str], tuple[Network, Any]],
) -> None:
    """In the middle; of an odd margin the smaller half is above and left."""
    network, _ = saved("test_vit")
    image = photograph(5, 57, 95)  # margins of 9 and 15 pixels
    for layer in ("patches", "cls", "block2"):
        ours = descriptor(network, image, layer)
        cropped = np.ascontiguousarray(image[4 : 4 + 48, 7 : 7 + 80])
        assert np.array_equal(ours, descriptor(network, cropped, layer))


@pytest.mark.parametrize(
    ("name", "side"),
    [(TINY, 16), (DINO, 14), (SWIN, 4), ("resnet18", 32), ("inception_v3", 75), ("csatv2", 64)],
)
def test_the_smallest_side_is_known_before_there_are_weights(name: str, side: int) -> None:
    """Asked on PyTorch's meta device."""
    told = SOURCES["timm"].told
    assert told
    words = told(name)
    assert words and words.net == name
    outline = words.outline
    assert {outline.min_side(layer) for layer in outline.layers} == {side}
    refuse_contradictions("", f"timm:{name}", (), [side])
    with pytest.raises(WrongUsage, match=f"scale {side - 1} is too small"):
        refuse_contradictions("", f"timm:{name}", (), [side - 1])


def test_the_smallest_side_works(saved: Callable[[str], tuple[Network, Any]]) -> None:
    for name in ("test_vit", SWIN, "test_convnext"):
        network, _ = saved(name)
        layer = network.default_layer
        side = network.min_side(layer)
        assert np.isfinite(descriptor(network, photograph(0, side, side + 1), layer)).all()
        with pytest.raises(VggfeatError, match="too small"):
            description_of(network, layer, (side - 1,), True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mixer_s32_224", "takes only 224x224 images"),
        ("coat_lite_tiny", "takes only 224x224 images"),
        ("halonet_h1", "takes only 256x256 images"),  # which its configuration doesn't say
        ("crossvit_tiny_240", "takes only 240x240 images"),
        ("efficientvim_m1", "can't be applied densely: there is no single map of features"),
    ],
)
def test_a_timm_model_of_one_size_says_so(tmp_path: Path, name: str, says: str) -> None:
    """Before its file is read."""
    with pytest.raises(VggfeatError, match=f"timm:{name} {says}"):
        vggfeat.load(f"timm:{name}@{tmp_path / 'missing.safetensors'}")


def test_a_description_has_timms_filter_and_preprocessing(
    saved: Callable[[str], tuple[Network, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    network, model = saved("test_vit")
    config = model.pretrained_cfg
    assert config["interpolation"] == "bicubic" and config["input_size"][1:] == (160, 160)
    assert network.default_scales == (160,)
    description = description_of(network, None, None, True)
    assert description.filter == BICUBIC and description.scales == (160,)
    assert description.preprocessing == (
        "mean 0.5,0.5,0.5; std 0.5,0.5,0.5; channel_order RGB; input_range 0..1"
    )
    assert type(description)(**json.loads(json.dumps(description.to_dict()))).preprocessing
    bilinear = replace(description, filter=BILINEAR)  # as of a file that is to be gone on with
    assert list(differences(bilinear, description)) == [f"filter {BILINEAR}, not {BICUBIC}"]
    image = photograph(4, 200, 240)
    embedded = vggfeat.embed(network, [image], mirror=False)
    by_hand = descriptor(network, smallest_side(image, 160, BICUBIC), "patches")
    assert_same_descriptors(embedded, by_hand / np.linalg.norm(by_hand))
    other = descriptor(network, smallest_side(image, 160), "patches")
    assert np.abs(other - by_hand).max() > 1e-4 * np.abs(by_hand).max()

    # the same weights under a configuration that says otherwise
    make = timm.create_model
    for change, says in (
        ({"interpolation": "bilinear"}, "ask for filter bilinear, .* described with bicubic"),
        ({"mean": (0.4, 0.5, 0.5)}, "ask for preprocessing mean 0.4,.* described with mean 0.5,"),
        ({"interpolation": "lanczos"}, "timm:test_vit rescales images by 'lanczos'"),
    ):

        def changed(what: str, change: dict[str, Any] = change, **settings: Any) -> torch.nn.Module:
            return make(what, pretrained_cfg_overlay=change, **settings)

        monkeypatch.setattr(timm, "create_model", changed)
        backbones._made.cache_clear()
        with pytest.raises(VggfeatError, match=says):
            network_of(description)
    backbones._made.cache_clear()


def test_timms_vggs_are_nets_of_table_1(tmp_path: Path) -> None:
    """Dense fc7 is what timm's own head makes of a dense map."""
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model("vgg11", pretrained=False).eval()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    network = vggfeat.load(f"timm:vgg11@{path}", precision="float32")
    assert network.name == "A" and network.layers[-2:] == ["fc6", "fc7"]
    assert network.default_layer == "fc7" and network.default_scales == (224,)
    assert network.filter == BILINEAR
    told = SOURCES["timm"].told
    assert told
    words = told("vgg11")
    assert words and (words.net, words.outline.layers) == ("A", network.layers)
    image = photograph(1, 224, 260)
    with torch.inference_mode():
        pool5 = model.forward_features(preprocessed(network, image))
        expected = model.pre_logits(pool5).mean((2, 3)).numpy()
    assert_same_descriptors(descriptor(network, image, "fc7"), expected)
    assert_same_descriptors(descriptor(network, image, "pool5"), pool5.mean((2, 3)).numpy())


def test_timms_vggs_by_torchvisions_names(tmp_path: Path) -> None:
    """fc8 may be there, and isn't taken; what else is lacking is told."""
    with torch.device("meta"):
        state = torchvision.models.vgg11().state_dict()
    path = tmp_path / "w.safetensors"
    zeros(path, state, {})
    assert vggfeat.load(f"timm:vgg11@{path}").layers[-1] == "fc7"
    zeros(path, {k: v for k, v in state.items() if not k.startswith("classifier.3")}, {})
    with pytest.raises(VggfeatError, match=r"doesn't fit timm:vgg11: pre_logits.fc2.* is missing"):
        vggfeat.load(f"timm:vgg11@{path}")


def test_a_transformer_from_images_to_predictions(
    command: Command,
    folder: Path,
    saved: Callable[[str], tuple[Network, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    network, _ = saved(TINY)
    extract = [
        *("extract", "--dataset", "folder", "--root", folder, "--weights", network.spec),
        *("--scales", "48,64", "--layer", "cls+patches", "--out", "f.h5"),
    ]
    ran = command(*extract)
    assert ran.status == 0, ran.err
    file = vggfeat.open_features("f.h5")
    assert file.shape[1:] == (2, 2 * 192) and file.description.filter == BICUBIC
    assert command("svm", "--features", "f.h5", "--out", "m.h5").status == 0
    names = [folder / file.names[i] for i in np.flatnonzero(file.readable)[:2]]
    ran = command("predict", *names, "--model", "m.h5", "--out", "p.csv")
    assert ran.status == 0, ran.err
    assert "bicubic, antialiased; mean 0.5,0.5,0.5" in command("info", "f.h5").out
    ran = command(*extract[:-6], "--layer", "cls", "--scales", "15", "--out", "g.h5")
    assert ran.status == 2 and "scale 15 is too small: cls of net" in ran.err
    ran = command(*extract[:-6], "--layer", "block12", "--out", "g.h5")
    assert ran.status == 2 and "one of block0, block1," in ran.err
    assert command(*extract[:-6], "--scales", "48", "--dry-run").status == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t * float("nan"), "has values of conv1.weight that are not finite"),
        (lambda t: t.to(torch.int32), "conv1.weight is int32, not float32"),
        (lambda t: t[:1], r"conv1.weight has shape \(1, 3, 7, 7\), the net's is"),
    ],
)
def test_a_timm_file_is_checked_before_it_is_loaded(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    import timm

    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"]).contiguous()
    safetensors.torch.save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(VggfeatError, match=says):
        vggfeat.load(f"timm:resnet18@{tmp_path / 't.safetensors'}")


def test_batch_normalisation_is_timms(tmp_path: Path) -> None:
    """torchvision's file under timm's names: the FC layers are convolutions there."""
    import timm

    with torch.device("meta"):
        state = torchvision.models.vgg11_bn().state_dict()
        wanted = timm.create_model("vgg11_bn", num_classes=0).state_dict()
    path = tmp_path / "bn.safetensors"
    zeros(path, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, {})
    for spec in (f"torchvision:vgg11@{path}", str(path)):
        with pytest.raises(VggfeatError, match=r"has batch normalisation .* give timm:vgg11_bn@"):
            vggfeat.load(spec)
    found, _ = backbones._read_for_timm("vgg11_bn", path, wanted)
    assert wanted.keys() <= found.keys()
    assert found["pre_logits.fc1.weight"].shape == (4096, 512, 7, 7)


def test_timm_without_a_hub_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look, as long as the hub's own patience; then the hub's offline mode, which fails at
    once.
    """
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> NoReturn:
            asked.append((url, timeout, constants.HF_HUB_OFFLINE))
            raise OSError("Name or service not known")

    def create(name: str, pretrained: bool, **settings: Any) -> torch.nn.Module:
        if pretrained:
            assert constants.HF_HUB_OFFLINE
            raise OSError("not in the cache")
        return make(name, pretrained=False, **settings)

    make = timm.create_model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(VggfeatError) as failed:
        vggfeat.load("timm:resnet18")
    said = str(failed.value)
    assert asked == [(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT, False)]
    assert constants.HF_HUB_OFFLINE is False
    assert (
        "timm/resnet18" in said
        and "model.safetensors by hand and give timm:resnet18@FILE; " in said
    )
    assert "`weights` mini" in said
