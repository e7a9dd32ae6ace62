"""Mean and covariance of real pixels, against NumPy on all of them at once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.augment import SAMPLE, draw, keyed
from pretrain.colour import Colours, Sums, measure
from pretrain.replica import TrainingNet
from vggfeat.datasets.items import name_digest
from vggfeat.decode import read_rgb
from vggfeat.errors import VggfeatError
from vggfeat.images import smallest_side
from vggfeat.vgg import VGG


def test_mean_and_covariance_of_real_photographs(photos: Path) -> None:
    names = sorted(str(p.relative_to(photos)) for p in (photos / "train").rglob("*.JPEG"))[::4]
    colours = measure(photos, names, workers=2).colours(names)
    pixels = np.concatenate([read_rgb(photos / name).reshape(-1, 3) for name in names]) / 255.0
    assert np.allclose(colours.mean, 255 * pixels.mean(0), rtol=1e-12)
    assert np.allclose(colours.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)
    assert colours.images == len(names)
    # shared among processes in any way, exactly the same
    total = Sums()
    for part in (names[40:], names[:13], names[13:40]):
        total.add(measure(photos, part, workers=1))
    assert total.colours(names) == colours
    # eigenvectors times eigenvalues, longest first; a natural image's first component is nearly
    # grey
    components = colours.components / 255
    values = np.linalg.norm(components, axis=0)
    assert np.allclose(
        values, np.sort(np.linalg.eigvalsh(np.array(colours.covariance)))[::-1], rtol=1e-5
    )
    assert np.all(components[:, 0] / values[0] > 0.5)


def test_the_shift_that_reaches_the_net_has_the_formulas_covariance(photos: Path) -> None:
    names = sorted(str(p.relative_to(photos)) for p in (photos / "train").rglob("*.JPEG"))[::8]
    colours = measure(photos, names, workers=2).colours(names)
    seen: list[torch.Tensor] = []
    training_net = TrainingNet(VGG("A", 2, 0.05, 32), colours, dropout=0.5).eval()
    training_net.net.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    crops = [smallest_side(read_rgb(photos / name), 40)[:32, :32] for name in names]
    shifts = []
    for start in range(0, 4000, 100):
        keys = range(start, start + 100)
        batch = torch.from_numpy(np.stack([crops[i % len(crops)] for i in keys]))
        alpha = torch.tensor([draw(keyed(3, SAMPLE, 0, 0, i), (40, 40), 0.1).alpha for i in keys])
        with torch.inference_mode():
            training_net(batch, alpha.float(), torch.zeros(len(batch), 0, dtype=torch.uint8))
        unshifted = batch.permute(0, 3, 1, 2) - torch.tensor(colours.mean)[:, None, None]
        shift = (seen.pop() - unshifted).flatten(2)  # (100, 3, pixels)
        assert float(shift.std(2).max()) < 1e-4  # one colour for all pixels of an image
        shifts.append(shift.mean(2).numpy())
    # each component l_k p_k has a factor N(0, 0.1): Cov = 0.01 P diag(l^2) P' = 0.01 C^2, C of RGB
    # in [0, 1]
    expected = 0.01 * np.linalg.matrix_power(np.array(colours.covariance), 2) * 255**2
    measured = np.cov(np.concatenate(shifts).T)
    # 4.5 standard errors of 4000 draws
    assert np.abs(measured - expected).max() < 0.1 * expected.max()


def test_unreadable_images_are_named_and_left_out(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").symlink_to(next((photos / "train").rglob("*.JPEG")).resolve())
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    names = ["bad.jpg", "good.jpg", "gone.jpg"]
    colours = measure(tmp_path, names, 2).colours(names)
    assert list(colours.unreadable) == ["bad.jpg", "gone.jpg"]
    assert colours.images == 1
    colours.save(tmp_path / "colours.json")
    assert Colours.read(tmp_path / "colours.json") == colours
    with pytest.raises(VggfeatError, match="not one of the training images"):
        measure(tmp_path, ["bad.jpg"], 1).colours(["bad.jpg"])
    assert name_digest(["a", "b"]) != name_digest(["a\nb"])


SOUND = (
    '{"mean": [1, 2, 3], "covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],'
    ' "images": 4, "unreadable": {}, "training_set": ""}'
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"mean": [1], "covariance": [], "images": 0, "unreadable": {}, "training_set": ""}',
        *("[1]", "null", "[" * 100_000),
        SOUND.replace("[1, 2, 3]", "[NaN, 2, 3]"),
        SOUND.replace("[1, 2, 3]", "[1e9, 2, 3]"),
        SOUND.replace("[1, 0, 0]", "[-1, 0, 0]"),
        SOUND.replace("[1, 0, 0]", "[1, 5, 0]"),
        SOUND.replace("0, 1]", "0, Infinity]"),
        SOUND.replace(": 4", ": Infinity"),
        SOUND.replace("{}", '{"a": 3}'),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "colours.json"
    path.write_text(SOUND)
    assert Colours.read(path).images == 4
    path.write_text(text)
    with pytest.raises(VggfeatError, match="delete it to measure anew"):
        Colours.read(path)


def test_a_pipe_holds_no_colours(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "colours.json")  # its writer would be waited for
    with pytest.raises(VggfeatError, match=r"colours.json is no regular file"):
        Colours.read(tmp_path / "colours.json")
