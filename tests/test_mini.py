"""The small nets in the package: whole, small, with their metadata and log, and as good as they
say.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vggfeat
from vggfeat import datasets
from vggfeat.decode import read_rgb
from vggfeat.images import smallest_side
from vggfeat.sources import MINI
from vggfeat.table1 import NETS

from .conftest import photograph

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("net", MINI)
def test_whole_small_and_documented(net: str) -> None:
    path = MINI[net]
    assert path.stat().st_size <= 5_000_000
    network = vggfeat.load(f"mini:{net}")
    assert (network.name, network.spec, network.layers[-1]) == (net, f"mini:{net}", "fc8")
    assert network.classes and len(network.classes) == 10 == network.vgg().num_classes
    recipe = json.loads(network.metadata["recipe"])
    assert (
        recipe["name"] == "mini" and recipe["width"] == network.vgg().width and recipe["crop"] == 96
    )
    errors = json.loads(network.metadata["errors"])
    assert 5 < errors["validation"]["top1"] < 30 and errors["validation"]["top5"] < 6
    lines = (ROOT / "docs" / f"mini-{net}.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert log[-1]["event"] == "val" and log[-1]["top1_error"] == pytest.approx(
        errors["validation"]["top1"]
    )
    stages = [event["stage"] for event in log if event["event"] == "start"]
    assert stages == (["A-112"] if net == "A" else ["A-112", "D-112", "D-112-160"])


def test_by_every_name(tmp_path: Path) -> None:
    d, a = vggfeat.load("mini"), vggfeat.load("A", "mini")
    assert (d.name, a.name) == ("D", "A")
    assert (
        vggfeat.load("D", "mini").fingerprint == d.fingerprint == vggfeat.load("mini:D").fingerprint
    )
    assert a.fingerprint == vggfeat.load("mini:A").fingerprint != d.fingerprint
    x = vggfeat.embed(d, [photograph(0, 120, 150)], scales=(96, 128))
    assert x.shape == (1, d.dim("fc7")) and np.linalg.norm(x) == pytest.approx(1)
    for name in [f"mini:{n}" for n in NETS if n not in MINI] + ["mini:", "mini:D@x.safetensors"]:
        with pytest.raises(vggfeat.VggfeatError):
            vggfeat.load(name)


@pytest.mark.parametrize("net", MINI)
def test_as_good_as_they_say(net: str, data: Path) -> None:
    """Top-1 error of the central crop on the 1,000 validation images, which nothing was decided
    on.
    """
    network = vggfeat.load(f"mini:{net}")
    assert network.classes
    items = datasets.load("imagenet", data / "imagenette144")
    rows = items.splits["val"]
    assert len(rows) == 1000 and items.labels is not None and items.classes == network.classes
    low, _, high = network.metadata["train_scale"].partition("-")
    Q, crop = (int(low) + int(high or low)) // 2, network.vgg().crop
    crops = []
    for row in rows:
        pixels = smallest_side(read_rgb(items.root / items.names[row]), Q)
        y, x = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
        crops.append(torch.from_numpy(np.ascontiguousarray(pixels[y : y + crop, x : x + crop])))
    with torch.inference_mode():
        scores = torch.cat(
            [
                network.crop_scores(network.preprocessing(torch.stack(part)))
                for part in _parts(crops)
            ]
        )
    wrong = (scores.argmax(1).numpy() != items.labels[rows]).mean()
    stated = json.loads(network.metadata["errors"])["validation"]["top1"]
    assert 100 * wrong == pytest.approx(stated, abs=0.8)  # trained in bfloat16, stored in float16


def _parts(crops: list[torch.Tensor], n: int = 100) -> list[list[torch.Tensor]]:
    return [crops[i : i + n] for i in range(0, len(crops), n)]
