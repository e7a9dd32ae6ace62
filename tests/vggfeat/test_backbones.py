"""timm's models, held against timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import torch
import torchvision

import vggfeat
from vggfeat import backbones
from vggfeat.describe import describe
from vggfeat.errors import VggfeatError

from ..conftest import assert_same_descriptors, photograph
from .conftest import zeros


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_timm_backbones_are_pooled_over_their_dense_map(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    network = vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")
    assert network.preprocessing.mean == pytest.approx(model.pretrained_cfg["mean"])
    image = torch.from_numpy(photograph(2, 96, 160)[None])
    with torch.inference_mode():
        expected = model.forward_features(network.preprocessing(image)).mean((2, 3))
    assert_same_descriptors(
        describe(network, image, "features", mirror=False).numpy(), expected.numpy()
    )
    assert network.dim("features") == expected.shape[1]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_timm_model_of_one_size_says_so(tmp_path: Path, name: str) -> None:
    import timm

    safetensors.torch.save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VggfeatError, match=f"timm:{name} takes only 224x224 images"):
        vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")


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
