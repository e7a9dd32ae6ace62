"""Pixels: how an image is rescaled, cut and normalised."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import (
    BICUBIC,
    CAFFE_MEAN_BGR,
    FILTERS,
    Preprocessing,
    centre_crop,
    grid_crops,
    mirror,
    smallest_side,
    smallest_side_shape,
)

from ..conftest import photograph

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
CAFFE = Preprocessing(CAFFE_MEAN_BGR, channel_order="BGR")


@pytest.mark.parametrize(
    ("size", "Q", "expected"),
    [
        ((375, 500), 256, (256, 341)),  # 341.33
        ((500, 375), 384, (512, 384)),
        ((2, 3), 3, (3, 5)),  # 4.5: halves up
        ((256, 256), 256, (256, 256)),
        ((1, 20000), 2, (2, 40000)),
    ],
)
def test_smallest_side_shape(size: tuple[int, int], Q: int, expected: tuple[int, int]) -> None:
    assert smallest_side_shape(*size, Q) == expected


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(1, 4096))
@example(10**12 - 1, 10**12, 4095)
def test_smallest_side_shape_is_exact(height: int, width: int, Q: int) -> None:
    h, w = smallest_side_shape(height, width, Q)
    assert min(h, w) == Q
    assert (w, h) == smallest_side_shape(width, height, Q)
    # the long side is within half a pixel of long * Q / short, as whole numbers
    short, long = sorted((height, width))
    assert -short < 2 * (max(h, w) * short - long * Q) <= short


def test_smallest_side_is_antialiased_and_bilinear() -> None:
    checkerboard = np.indices((256, 256)).sum(0) % 2 * np.uint8(255)
    small = smallest_side(read_rgb(checkerboard.astype(np.uint8)), 32)
    assert small.shape == (32, 32, 3)
    assert set(np.unique(small)) <= {127, 128}  # without antialiasing: 0 and 255
    # enlarged twice, 0 and 200 give weights of 1, 3/4, 1/4, 0 (pixel centres)
    pair = read_rgb(np.array([[0, 200], [0, 200]], np.uint8))
    assert smallest_side(pair, 4)[0, :, 0].tolist() == [0, 50, 150, 200]


def test_smallest_side_keeps_an_image_that_fits() -> None:
    assert smallest_side(PICTURE, 24) is PICTURE
    assert smallest_side(PICTURE, 48).shape == (48, 80, 3)
    assert smallest_side(np.ascontiguousarray(PICTURE.swapaxes(0, 1)), 12).shape == (20, 12, 3)


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 120),
    st.sampled_from(["noise", "smooth"]),
)
@example(375, 500, 256, "smooth")
@example(90, 17, 1, "noise")
@example(500, 375, 512, "noise")
def test_a_tensor_is_rescaled_to_within_a_level_of_pillows_values(
    height: int, width: int, Q: int, kind: str
) -> None:
    """On whatever device: the arithmetic is PyTorch's, in float32."""
    if kind == "noise":
        image = np.random.default_rng(Q).integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        image = photograph(Q, height, width)
    for filter in FILTERS:
        ours = smallest_side(torch.from_numpy(image), Q, filter)
        pillows = smallest_side(image, Q, filter)
        assert ours.shape == pillows.shape and ours.dtype == torch.uint8 and ours.is_contiguous()
        assert np.abs(ours.numpy().astype(int) - pillows).max() <= 1


def test_a_gpu_rescales_to_within_a_level_of_pillows_values(gpu: torch.device) -> None:
    """As small as it is asked to, see `batches.OnGPU`, and enlarged."""
    shapes = [(375, 500), (500, 333), (64, 64), (2, 3), (32 * 64, 3000), (4000, 4000), (100, 9000)]
    for i, (height, width) in enumerate(shapes):
        image = photograph(i, height, width)
        for Q, filter in product((64, 112, 255, 256), FILTERS):
            if filter == BICUBIC and min(height, width) > 16 * Q:
                continue
            ours = smallest_side(torch.from_numpy(image).to(gpu), Q, filter).cpu().numpy()
            pillows = smallest_side(image, Q, filter)
            assert np.abs(ours.astype(int) - pillows).max() <= 1, (height, width, Q)


def test_bicubic_is_timms_rescaling() -> None:
    """Of an image whose smallest side timm's own transform makes Q, without the crop."""
    from timm.data.transforms import str_to_interp_mode

    image = photograph(3, 300, 400)
    theirs = tv.resize(Image.fromarray(image), 150, str_to_interp_mode("bicubic"))
    assert np.array_equal(smallest_side(image, 150, BICUBIC), np.array(theirs))
    assert not np.array_equal(smallest_side(image, 150), smallest_side(image, 150, BICUBIC))


def test_tensors_keep_what_fits_and_refuse_strips_too() -> None:
    image = torch.from_numpy(PICTURE)
    assert smallest_side(image, 24) is image
    with pytest.raises(UnreadableImage, match="10240000x512, over the limit"):
        smallest_side(torch.zeros((1, 20000, 3), dtype=torch.uint8), 512)


def test_extreme_aspect_is_refused_before_it_is_computed() -> None:
    strip = np.zeros((1, 20000, 3), np.uint8)
    with pytest.raises(
        UnreadableImage, match="20000x1 pixels at Q=512 would be 10240000x512, over the limit"
    ):
        smallest_side(strip, 512)
    assert smallest_side(strip, 2, max_pixels=80000).shape == (2, 40000, 3)
    with pytest.raises(UnreadableImage):
        smallest_side(strip, 2, max_pixels=79999)


@pytest.mark.parametrize("Q", [0, -1])
def test_scale_must_be_positive(Q: int) -> None:
    with pytest.raises(VggfeatError, match="smallest side of"):
        smallest_side(PICTURE, Q)


def test_grid_positions_by_hand() -> None:
    # margins 256 - 224 = 32 and 341 - 224 = 117: 0, 29.25, 58.5, 87.75, 117
    rows, columns = np.mgrid[:256, :341]
    image = np.stack([rows % 256, columns % 256, columns // 256], axis=-1).astype(np.uint8)
    crops = grid_crops(image, 224)
    assert crops.shape == (25, 224, 224, 3) and crops.dtype == np.uint8
    corners = crops[:, 0, 0].astype(int)
    assert corners[::5, 0].tolist() == [0, 8, 16, 24, 32]
    assert (corners[:5, 1] + 256 * corners[:5, 2]).tolist() == [0, 29, 58, 88, 117]
    np.testing.assert_array_equal(crops[24], image[-224:, -224:])
    np.testing.assert_array_equal(crops[12], centre_crop(image, 224))
    np.testing.assert_array_equal(centre_crop(image, 224), image[16:240, 58:282])


@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 7))
def test_grid_is_flush_and_even(extra_height: int, extra_width: int, n: int) -> None:
    rows, columns = np.mgrid[: 4 + extra_height, : 4 + extra_width]
    image = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    tops = grid_crops(image, 4, n)[::n, 0, 0, 0].astype(int)
    assert tops[0] == 0 and tops[-1] == extra_height
    assert np.ptp(np.diff(tops)) <= 1


def test_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(VggfeatError, match="25x25 from 40x24 pixels"):
        grid_crops(PICTURE, 25)
    with pytest.raises(VggfeatError, match="25x25"):
        centre_crop(PICTURE, 25)
    assert grid_crops(PICTURE, 24).shape == (25, 24, 24, 3)


def test_mirror_flips_the_width_of_arrays_and_tensors() -> None:
    batch = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    flipped = mirror(batch)
    np.testing.assert_array_equal(flipped[:, :, 0], batch[:, :, 3])
    np.testing.assert_array_equal(mirror(flipped), batch)
    assert torch.equal(mirror(torch.from_numpy(batch)), torch.from_numpy(flipped))
    np.testing.assert_array_equal(mirror(batch[0]), flipped[0])


def test_caffe_preprocessing_subtracts_the_mean_in_bgr() -> None:
    batch = torch.tensor([[[[255, 0, 10]]]], dtype=torch.uint8)  # red, green, blue
    x = CAFFE(batch)
    assert x.shape == (1, 3, 1, 1) and x.dtype == torch.float32
    expected = torch.tensor([10 - 103.939, 0 - 116.779, 255 - 123.68], dtype=torch.float32)
    torch.testing.assert_close(x.flatten(), expected, rtol=0, atol=1e-5)


def test_preprocessing_of_range_1_is_torchvisions_bit_for_bit() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batch = torch.from_numpy(np.stack([PICTURE, PICTURE[::-1]]))
    before = batch.clone()
    x = Preprocessing(mean, std, "RGB", 1.0)(batch)
    for i in range(2):
        theirs = tv.normalize(tv.to_tensor(batch[i].numpy()), list(mean), list(std))
        assert torch.equal(x[i], theirs)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_preprocessing_is_channels_last(order: str) -> None:
    batch = torch.from_numpy(np.stack([PICTURE] * 2))
    for images in (batch, mirror(batch), batch.flip(1).transpose(1, 2)):
        x = Preprocessing((1, 2, 3), channel_order=order)(images)
        assert x.shape == (2, 3, *images.shape[1:3])
        assert x.is_contiguous(memory_format=torch.channels_last)
        channels = images.float().permute(0, 3, 1, 2)[:, [0, 1, 2] if order == "RGB" else [2, 1, 0]]
        assert torch.equal(x, channels - torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))


def test_preprocessing_inside_and_outside_inference_mode() -> None:
    batch = torch.from_numpy(PICTURE[None])
    own = Preprocessing((7.25, 8.5, 9.75))
    with torch.inference_mode():
        inside = own(batch)
    weight = torch.ones(1, requires_grad=True)
    # constants kept from inference mode must not poison training
    (own(batch) * weight).sum().backward()
    assert torch.equal(inside, own(batch))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3),
    ],
)
def test_preprocessing_refuses_other_batches(batch: torch.Tensor) -> None:
    with pytest.raises(VggfeatError, match=r"\(N, H, W, 3\) uint8"):
        CAFFE(batch)


finite = st.floats(0, 1)


@given(
    st.tuples(finite, finite, finite),
    st.tuples(*[st.floats(1e-6, 1e6)] * 3),
    st.sampled_from(["RGB", "BGR"]),
)
def test_metadata_round_trip_is_exact(
    mean: tuple[float, float, float], std: tuple[float, float, float], order: str
) -> None:
    r, g, b = mean
    for scale in (1.0, 255.0):
        own = Preprocessing((r * scale, g * scale, b * scale), std, order, scale)
        metadata = own.to_metadata()
        assert all(isinstance(value, str) for value in metadata.values())
        assert Preprocessing.from_metadata({**metadata, "net": "D"}) == own


def test_metadata_in_words() -> None:
    assert CAFFE.to_metadata() == {
        "mean": "103.939,116.779,123.68",
        "std": "1.0,1.0,1.0",
        "channel_order": "BGR",
        "input_range": "0..255",
    }
    bgr = {"mean_bgr": "103.939,116.779,123.68"}
    assert Preprocessing.from_metadata({**bgr, "channel_order": "BGR"}) == CAFFE
    assert Preprocessing.from_metadata(bgr) == CAFFE
    rgb = Preprocessing.from_metadata({**bgr, "channel_order": "RGB", "input_range": "0..255"})
    assert rgb == Preprocessing((123.68, 116.779, 103.939))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean": None}, "lacks mean"),
        ({"channel_order": None}, "lacks channel_order"),
        ({"input_range": None}, "lacks input_range"),
        ({"input_range": "0..2"}, "0..255 or 0..1"),
        ({"channel_order": "GBR"}, "RGB or BGR"),
        ({"mean": "1,2"}, "mean must be three numbers"),
        ({"mean": "1,2,x"}, "mean must be three numbers"),
        ({"mean": "nan,2,3"}, "mean must be finite"),
        ({"std": "1,0,1"}, "std must be positive"),
        ({"input_range": "0..1"}, "outside the input range 0..1"),
    ],
)
def test_bad_metadata_is_refused_in_a_sentence(change: dict[str, str], reason: str) -> None:
    metadata = {
        key: value for key, value in {**CAFFE.to_metadata(), **change}.items() if value is not None
    }
    with pytest.raises(VggfeatError, match=reason) as caught:
        Preprocessing.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def test_input_range_must_be_known() -> None:
    with pytest.raises(VggfeatError, match="255 or 1"):
        Preprocessing((0, 0, 0), input_range=2)
