"""Images per second of dense extraction beside the plain float32 forward, on the same photographs.

    python -m benchmarks.throughput --photos DIR [--net D] [--scales 256] [--repeats 5]

Ours: `describe_all`, from the JPEG on disk to the descriptor (decode, rescale, net in the precision that
`auto` picks, pooling). The peer: the obvious loop with torchvision: decode, resize, normalise, then
torchvision's `vgg16().features` in float32, one image at a time, global average. Both give pool5 descriptors
of the whole image at smallest side Q, without mirror; the peer is also run with its images already decoded,
"forward only". Random weights: speed doesn't depend on them. Runs are interleaved; medians; outputs compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

import vggfeat
from vggfeat.extract import describe_all, description_of
from vggfeat.weights import Network

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does; for both sides


def torchvision_net(network: Network) -> torch.nn.Module:
    peer = torchvision.models.vgg16(weights=None).features.eval()
    peer.load_state_dict(
        {k.removeprefix("features."): v for k, v in network.module.features.state_dict().items()}
    )
    return peer


def read(path: Path, scale: int, network: Network) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    ratio = scale / min(image.size)
    size = [int(side * ratio + 0.5) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    mean = np.array(network.preprocessing.mean, np.float32)
    return torch.from_numpy(pixels - mean).permute(2, 0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--scales", default="224,256,512")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = sorted(p for p in options.photos.iterdir() if p.is_file())[: options.limit]
    exact = vggfeat.load("random:D,crop=32")  # crop only sets fc6, which pool5 doesn't reach
    peer = torchvision_net(exact)
    ours = vggfeat.load("random:D,crop=32").to("cpu", "auto")
    rows = []
    for scale in (int(q) for q in options.scales.split(",")):
        description = description_of(ours, "pool5", (scale,), mirror=False)
        seconds: dict[str, list[float]] = {"ours": [], "forward": [], "loop": []}
        for _ in range(options.repeats):
            started = time.perf_counter()
            got = dict(describe_all(ours, photos, description))
            seconds["ours"].append(time.perf_counter() - started)

            expected = []
            forward = 0.0
            started = time.perf_counter()
            for path in photos:
                x = read(path, scale, exact)
                before = time.perf_counter()
                with torch.inference_mode():
                    expected.append(peer(x).mean((2, 3))[0].numpy())
                forward += time.perf_counter() - before
            seconds["loop"].append(time.perf_counter() - started)
            seconds["forward"].append(forward)
        cosine = min(
            float(got[i][0] @ e / np.linalg.norm(got[i][0]) / np.linalg.norm(e))
            for i, e in enumerate(expected)
        )
        rate = {name: len(photos) / statistics.median(values) for name, values in seconds.items()}
        row = {
            "scale": scale,
            "images": len(photos),
            "precision": ours.precision,
            "ours_images_per_s": rate["ours"],
            "float32_forward_images_per_s": rate["forward"],
            "float32_loop_images_per_s": rate["loop"],
            "ratio_to_forward": rate["ours"] / rate["forward"],
            "ratio_to_loop": rate["ours"] / rate["loop"],
            "least_cosine": cosine,
        }
        if cosine < 0.999:
            raise SystemExit(f"outputs differ at Q={scale}: least cosine {cosine:.5f}")
        rows.append(row)
        print(
            f"Q={scale}: ours {rate['ours']:.2f} images/s ({ours.precision}, end to end), plain float32 forward "
            f"{rate['forward']:.2f}, plain loop {rate['loop']:.2f}; ratio {row['ratio_to_forward']:.2f} to the "
            f"forward, {row['ratio_to_loop']:.2f} to the loop; least cosine {cosine:.5f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
