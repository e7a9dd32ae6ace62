"""Numeric truths of the networks: Table 1, torchvision, timm, dense application (Sect. 3.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch.nn import functional

from vggfeat.errors import VggfeatError
from vggfeat.table1 import NETS, layer_names
from vggfeat.vgg import VGG

from ..conftest import Nets


def test_b_5x5_has_one_5x5_layer_for_each_pair_of_b() -> None:
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in VGG("B-5x5").features.parameters() if p.ndim == 4]
    assert shapes == [
        (64, 3, 5, 5),
        (128, 64, 5, 5),
        (256, 128, 5, 5),
        (512, 256, 5, 5),
        (512, 512, 5, 5),
    ]


@pytest.mark.parametrize(
    ("net", "name"), [("D", "vgg16"), ("E", "vgg19"), ("A", "vgg11"), ("B", "vgg13")]
)
def test_state_dicts_and_scores_equal_torchvisions_bit_for_bit(net: str, name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    ours = VGG(net).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        ours.load_state_dict(theirs.state_dict())
        scores = theirs(x)
        assert scores.std() > 0
        assert torch.equal(ours.crop_scores(x), scores)
        # and the other way round, with other weights
        for p in ours.parameters():
            p.mul_(1.01)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours.crop_scores(x), theirs(x))


def test_dense_map_equals_timms_dense_head() -> None:
    import timm

    torch.manual_seed(0)
    theirs: Any = timm.create_model("vgg16", pretrained=False, num_classes=0).eval()
    ours = VGG("D", until="fc7").eval()
    state = theirs.state_dict()
    ours.load_state_dict(
        {k: v for k, v in state.items() if k.startswith("features.")}
        | {
            "classifier.0.weight": state["pre_logits.fc1.weight"].flatten(1),
            "classifier.0.bias": state["pre_logits.fc1.bias"],
            "classifier.3.weight": state["pre_logits.fc2.weight"].flatten(1),
            "classifier.3.bias": state["pre_logits.fc2.bias"],
        }
    )
    x = torch.randn(2, 3, 256, 320)
    with torch.inference_mode():
        dense = theirs.pre_logits(theirs.forward_features(x))
        mine = ours(x, "fc7")
    assert mine.shape == (2, 4096, 2, 4)
    assert dense.std() > 0
    torch.testing.assert_close(mine, dense, rtol=0, atol=1e-4 * dense.abs().max().item())


@pytest.mark.parametrize("net", NETS)
def test_dense_at_the_crop_is_the_crops_scores(he: Nets, net: str) -> None:
    module = he(net, num_classes=7, width=0.125, crop=64).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        dense = module(x)
        assert dense.shape == (2, 7, 1, 1)
        torch.testing.assert_close(dense[..., 0, 0], module.crop_scores(x), rtol=1e-10, atol=1e-12)


def test_a_dense_position_is_the_fc_layers_on_that_window_of_pool5(he: Nets) -> None:
    """Of the whole image's pool5, not of a cut-out crop's: their borders differ (Sect. 3.2)."""
    module = he("D", num_classes=9, width=0.125, crop=96).double()
    x = torch.randn(1, 3, 160, 200, dtype=torch.float64)
    with torch.inference_mode():
        pool5, scores = module(x, "pool5"), module(x, "fc8")
        assert pool5.shape[2:] == (5, 6) and scores.shape == (1, 9, 3, 4)
        for i in range(3):
            for j in range(4):
                window = pool5[..., i : i + 3, j : j + 3].flatten(1)
                torch.testing.assert_close(
                    scores[..., i, j], module.classifier(window), rtol=1e-10, atol=1e-12
                )
        cut_out = module.crop_scores(x[..., 32:128, 32:128])
    assert (scores[..., 1, 1] - cut_out).abs().max() > 1e-3 * cut_out.abs().max()


def test_mean_score_map_is_fc8_of_the_mean_descriptor(he: Nets) -> None:
    module = he("E", num_classes=9, width=0.125, crop=64).double()
    x = torch.randn(2, 3, 130, 101, dtype=torch.float64)
    with torch.inference_mode():
        scores = module(x, "fc8").mean((2, 3))
        descriptor = module(x, "fc7").mean((2, 3))
        torch.testing.assert_close(scores, module.classifier[6](descriptor), rtol=1e-10, atol=1e-12)


def test_lrn_against_its_formula(he: Nets) -> None:
    """b_c = a_c / (k + alpha * sum over 5 neighbouring channels of a^2) ^ beta (Krizhevsky et al.,
    Sect. 3.3).
    """
    module = he("A-LRN", width=0.25, until="lrn1").double()
    x = 100 * torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        a = module(x, "conv1_1")
        got = module(x, "lrn1")
    expected = torch.empty_like(a)
    for c in range(a.shape[1]):
        neighbours = a[:, max(0, c - 2) : c + 3].square().sum(1)
        expected[:, c] = a[:, c] / (2 + 1e-4 * neighbours) ** 0.75
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert (got - a).abs().max() > 1
    norm = module.features[-1]
    low = norm(a.bfloat16())
    assert low.dtype == torch.bfloat16
    # one rounding
    torch.testing.assert_close(low.double(), norm(a.bfloat16().double()), rtol=2**-8, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(a.float()).double(), expected, rtol=1e-5, atol=0)


def test_layers_by_name_are_the_networks_own_steps(he: Nets) -> None:
    """Each layer's map, computed by hand from the weights in order; hidden ones after their
    ReLU.
    """
    module = he("C", num_classes=5, width=0.125, crop=32).double()
    x = torch.randn(1, 3, 70, 67, dtype=torch.float64)
    expected, convolutions = x, iter(list(module.features.parameters()))
    with torch.inference_mode():
        for name in layer_names("C")[:-3]:
            if name.startswith("pool"):
                expected = functional.max_pool2d(expected, 2)
            else:
                weight, bias = next(convolutions), next(convolutions)
                kernel = 1 if name in ("conv3_3", "conv4_3", "conv5_3") else 3  # Table 1, net C
                assert weight.shape[-1] == kernel
                expected = functional.conv2d(expected, weight, bias, padding=kernel // 2).relu()
            torch.testing.assert_close(module(x, name), expected, rtol=1e-12, atol=1e-12)
        assert (
            (module(x, "fc6") >= 0).all()
            and (module(x, "fc7") >= 0).all()
            and (module(x, "fc8") < 0).any()
        )


def test_nothing_past_the_layer_is_computed(he: Nets) -> None:
    module = he("D", width=0.125, crop=32)
    ran = []
    for name, child in module.features.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.append(int(name)))
    with torch.inference_mode():
        module(torch.zeros(1, 3, 64, 64), "pool2")
    assert ran == list(range(10))  # conv relu conv relu pool, twice


@pytest.mark.parametrize(("pool", "side"), [("floor", 7), ("ceil", 8)])
def test_pooling_of_odd_sides(he: Nets, pool: str, side: int) -> None:
    module = he("A", width=0.125, until="pool5", pool=pool)
    with torch.inference_mode():
        assert module(torch.zeros(1, 3, 225, 225), "pool5").shape[2:] == (side, side)
        assert module(torch.zeros(1, 3, 224, 224), "pool5").shape[2:] == (7, 7)
        module.set_pool("ceil" if pool == "floor" else "floor")
        assert module(torch.zeros(1, 3, 225, 225), "pool5").shape[2:] == (15 - side, 15 - side)


def test_min_side_is_the_smallest_that_works(he: Nets) -> None:
    for pool in ("floor", "ceil"):
        module = he("D", num_classes=3, width=0.125, crop=64, pool=pool)
        for layer in module.layers[:-3]:
            side = module.min_side(layer)
            with torch.inference_mode():
                assert (
                    min(module(torch.zeros(1, 3, side, side), layer).shape[2:]) == 1
                    or layer[-2:] == "_1"
                    or side == 1
                )
                if side > 1 and layer.startswith("pool"):
                    with pytest.raises(RuntimeError):
                        module(torch.zeros(1, 3, side - 1, side - 1), layer)
    assert module.min_side("fc7") == 64


def test_bad_requests_say_what_is_wrong(he: Nets) -> None:
    with pytest.raises(VggfeatError, match="no net 'Z'; Table 1 has A, A-LRN"):
        VGG("Z")
    with pytest.raises(VggfeatError, match="crop 100 is not a positive multiple of 32"):
        VGG("A", crop=100)
    with pytest.raises(VggfeatError, match=r"'fc7'.*reach pool5"):
        he("A", width=0.125, until="pool5")(torch.zeros(1, 3, 64, 64), "fc7")
    with pytest.raises(VggfeatError, match="60x90 image is smaller than the net's crop of 64"):
        he("A", width=0.125, crop=64)(torch.zeros(1, 3, 60, 90), "fc8")


def test_a_net_that_is_too_large_is_never_built() -> None:
    with pytest.raises(
        VggfeatError, match="has 116,002 million parameters; at most 700 million are built"
    ):
        VGG("A", width=30)
    for wrong in (
        {"width": float("nan")},
        {"width": float("inf")},
        {"width": -1.0},
        {"num_classes": 0},
    ):
        with pytest.raises(VggfeatError, match="must be positive and finite"):
            VGG("A", **wrong)
